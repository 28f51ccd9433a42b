"""Compare responses with an OpenAPI specification, and run schemathesis over one. No tests are in here."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import requests
import yaml
from testing import ROOT


class Contract:
    """An OpenAPI 3.0 file beside the scripts. `promises`: each path, method and status that it documents."""

    def __init__(self, name: str) -> None:
        self.content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
        self.promises = [
            (path, method, int(status))
            for path, operations in self.content["paths"].items()
            for method, operation in operations.items()
            for status in operation["responses"]
        ]

    def schema_of(self, definition: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON Schema of an OpenAPI 3.0 schema: its references resolved, its `nullable` a type."""
        if "$ref" in definition:
            target: Any = self.content
            for name in definition["$ref"].removeprefix("#/").split("/"):
                target = target[name]
            return self.schema_of(target)
        schema: dict[str, Any] = {
            key: self.schema_of(value) if isinstance(value, dict) else value for key, value in definition.items()
        }
        for key in ("allOf", "anyOf"):
            if key in schema:
                schema[key] = [self.schema_of(each) for each in schema[key]]
        return {**schema, "type": [schema["type"], "null"]} if schema.get("nullable") is True else schema

    def check(self, response: requests.Response, path: str, method: str, status: int) -> None:
        """Fail unless the response has the documented status, headers, type and form."""
        assert response.status_code == status, (path, method, response.text)
        promised = self.schema_of(self.content["paths"][path][method]["responses"][str(status)])
        for name, header in promised.get("headers", {}).items():
            jsonschema.validate(response.headers.get(name), header["schema"])
        [(media_type, content)] = promised["content"].items()
        assert response.headers["Content-Type"] == media_type
        data = response.json() if media_type == "application/json" else response.text
        jsonschema.validate(data, content["schema"], format_checker=jsonschema.FormatChecker())


def run_schemathesis(
    directory: Path,
    contract: dict[str, Any],
    url: str,
    tokens: dict[str, str],
    seed: int,
    accepts_all_that_fits: bool = True,
    max_examples: int = 150,
) -> None:
    """Run all checks of schemathesis against the server at `url`; without tokens, each response may be a 401.

    `accepts_all_that_fits`: what fits the schemas is never a 400.
    """
    (directory / "openapi.yaml").write_text(yaml.safe_dump(contract))
    settings = [f'[auth.openapi.{name}]\nbearer = "{token}"\n' for name, token in tokens.items()]
    (directory / "schemathesis.toml").write_text("".join(settings))
    program = str(Path(sys.executable).with_name("schemathesis"))
    options = [
        "--checks=all",
        "--phases=examples,coverage,fuzzing",
        f"--max-examples={max_examples}",
        f"--seed={seed}",
        "--no-color",
    ]
    if not tokens or not accepts_all_that_fits:
        options.append("--exclude-checks=positive_data_acceptance")
    done = subprocess.run(
        [program, "--config-file=schemathesis.toml", "run", "openapi.yaml", f"--url={url}", *options],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
