"""Check status.py as a process: its output on a terminal, in a pipe and as JSON. It writes nothing."""

import json
import os
import pty
import re
import subprocess
import sys
from datetime import datetime

from helpers import run_script
from situations import (
    NOWHERE,
    device_is_off,
    invalid_quiet_hours,
    one_batch_below_the_limit,
    running_system,
    sending,
    sent_items,
    server_is_down,
    unreadable_number,
)
from testing import ROOT, Databases, TestData, on_database

import db


def test_both_databases_down_are_named_with_remedy() -> None:
    done = run_script("status.py", QUINN_DB_URL=NOWHERE, QUINN_ICLOUD_DB_URL=NOWHERE)
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database quinn cannot be reached; database icloud cannot be reached.\n")
    assert "Connection refused; start PostgreSQL, correct QUINN_ICLOUD_DB_URL, or" in done.stdout
    assert "Traceback" not in done.stderr
    assert "secret-word" not in done.stdout + done.stderr


def test_one_database_down_leaves_the_other(world: TestData) -> None:
    running_system(world)
    sending(world)
    done = run_script("status.py", QUINN_ICLOUD_DB_URL=NOWHERE)
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database icloud cannot be reached")
    assert "Batches" in done.stdout
    done = run_script("status.py", QUINN_DB_URL=NOWHERE)
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database quinn cannot be reached")
    assert "mac-mini" in done.stdout


def test_invalid_url_is_named_but_not_shown(world: TestData) -> None:
    done = run_script("status.py", QUINN_DB_URL="somebody secret-word")
    assert done.returncode == 2
    assert done.stderr.startswith("status.py: QUINN_DB_URL is no PostgreSQL URL: set it to one such as postgresql://")
    assert "secret-word" not in done.stdout + done.stderr


def test_missing_tables_suggest_migrate(databases: Databases, postgres: str) -> None:
    bare = on_database(postgres, "template1")
    done = run_script("status.py", QUINN_DB_URL=bare, QUINN_ICLOUD_DB_URL=bare)
    assert done.returncode == 1
    assert "run `python db.py migrate`" in done.stdout


def test_lock_is_not_reported_as_outage(world: TestData) -> None:
    impatient = f"{world.databases.quinn_url} options='-c lock_timeout=50ms'"
    world.quinn("BEGIN")
    world.quinn("LOCK TABLE outreach_batches IN ACCESS EXCLUSIVE MODE")
    done = run_script("status.py", QUINN_DB_URL=impatient)
    world.quinn("COMMIT")
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database quinn is locked by another session.\n")
    assert "canceling statement due to lock timeout; wait for it to end" in done.stdout
    assert "start PostgreSQL" not in done.stdout


def test_full_server_is_not_reported_as_outage(databases: Databases) -> None:
    role = f"test_role_{os.getpid()}"
    db.query(databases.quinn, f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        done = run_script("status.py", QUINN_DB_URL=f"{databases.quinn_url} user={role}")
    finally:
        db.query(databases.quinn, f"DROP ROLE {role}")
    assert done.stdout.startswith("Held: database quinn has no connection left.\n")
    assert f'too many connections for role "{role}"; close other sessions, or raise max_connections' in done.stdout


def contents(world: TestData) -> list[list[db.Row]]:
    quinn = ("outreach_batches", "outreach_batch_items", "outreach_settings", "clients", "contact_relationships")
    icloud = ("icloud.devices", "icloud.send_queue")
    return [
        *(world.quinn(f"SELECT t::text, xmin::text FROM {table} AS t ORDER BY 1") for table in quinn),
        *(world.icloud(f"SELECT t::text, xmin::text FROM {table} AS t ORDER BY 1") for table in icloud),
    ]


def test_status_writes_nothing(world: TestData) -> None:
    running_system(world)
    device_is_off(world)
    server_is_down(world)
    draft = world.batch(clients=[world.client(), world.client(None)], status="draft")
    before = contents(world)
    # A server that refuses each write proves it, whatever is in the tables.
    for database in (world.databases.quinn, world.databases.icloud):
        name = db.query(database, "SELECT current_database()")[0][0]
        db.query(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    for arguments in ([], ["--json"], ["--forecast", draft]):
        assert "read-only" not in run_script("status.py", *arguments).stdout
    assert contents(world) == before


KEYS = {
    "now", "zone", "verdict", "warnings", "lastTickAt", "inFlight", "batches", "stoppedBatches", "finishedBatches",
    "idleBatches", "unknownOutcomes", "limits", "devices", "failures",
}  # fmt: skip


def test_json_has_every_figure(world: TestData) -> None:
    running_system(world)
    device_is_off(world)
    sent_items(world, 1, seconds=30)
    world.item(world.batch(status="sent"), status="failed", failure_reason="not registered")
    world.batch(status="draft")
    done = run_script("status.py", "--json")
    assert done.returncode == 1
    seen = json.loads(done.stdout)
    assert set(seen) == KEYS
    assert seen["verdict"]["state"] == "held"
    assert seen["verdict"]["hold"] == "waiting for device name='mac-mini'"
    assert seen["verdict"]["needsOperator"] is True
    assert seen["inFlight"] == 2
    assert seen["idleBatches"] == {"draft": 1}
    assert [(line["limit"], line["used"], line["maximum"]) for line in seen["limits"]] == [("max_per_minute", 3, 2)]
    assert [(line["name"], line["waiting"], line["collected"]) for line in seen["devices"]] == [("mac-mini", 2, 0)]
    assert [(line["reason"], line["count"]) for line in seen["failures"]] == [("not registered", 1)]
    counts = ("pending", "queued", "sent", "failed", "skipped")
    assert [[line[name] for name in counts] for line in seen["batches"]] == [[2, 0, 0, 0, 0], [0, 2, 0, 0, 0]]
    assert all(datetime.fromisoformat(line["finish"]).tzinfo for line in seen["batches"])


def test_json_is_valid_with_both_databases_down() -> None:
    seen = json.loads(run_script("status.py", "--json", QUINN_DB_URL=NOWHERE, QUINN_ICLOUD_DB_URL=NOWHERE).stdout)
    assert set(seen) == KEYS
    assert seen["verdict"]["state"] == "down"
    assert seen["batches"] is seen["devices"] is None


def run_on_terminal(*arguments: str) -> str:
    """Return the output of status.py on a terminal of 80 columns."""
    main, end = pty.openpty()
    shown = b""
    with subprocess.Popen(
        [sys.executable, "status.py", *arguments], cwd=ROOT, stdout=end, stderr=end, stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
    ):  # fmt: skip
        os.close(end)
        try:
            while part := os.read(main, 65_536):
                shown += part
        except OSError:  # Linux' way to say that the other end is closed
            os.close(main)
    return shown.decode()


def test_only_terminals_get_colour_and_bars(world: TestData) -> None:
    running_system(world)
    sending(world)
    terminal, piped = run_on_terminal(), run_script("status.py").stdout
    assert "\x1b[" in terminal
    assert "━" in terminal
    assert "\x1b" not in piped
    assert "━" not in piped
    assert max(len(line) for line in re.sub("\x1b\\[[0-9;]*m", "", terminal).splitlines()) <= 80


def test_stored_text_cannot_move_the_cursor(world: TestData) -> None:
    running_system(world)
    world.icloud("UPDATE icloud.devices SET name = E'[red]\\x1b[2Jmac'")
    world.item(world.batch(status="sent"), status="failed", failure_reason="\x1b[2J [bold]no\nsecond line")
    for shown in (run_script("status.py").stdout, run_on_terminal()):
        assert "\x1b[2J" not in shown
        assert "[red]" in shown
        assert "[bold]no" in shown


def test_single_batch_below_limit_is_explained(world: TestData) -> None:
    running_system(world)
    one_batch_below_the_limit(world)
    assert (
        "1 batch sends at most 2 a minute, one message of a batch in each tick; max_per_minute allows 60."
        in run_script("status.py").stdout
    )


def test_number_without_country_code_is_a_warning(world: TestData) -> None:
    running_system(world)
    unreadable_number(world)
    warning = "1 pending item has a number without a country code, which may fail at the device"
    assert f"Warning: {warning}; write the number with +" in run_script("status.py").stdout
    [draft] = world.quinn("SELECT id FROM outreach_batches")[0]
    assert f"Note: {warning}" in run_script("status.py", "--forecast", draft).stdout
    assert "Warning" not in run_script("status.py", DEFAULT_REGION="DE").stdout


def test_invalid_quiet_hours_are_one_warning(world: TestData) -> None:
    running_system(world)
    invalid_quiet_hours(world)
    done = run_script("status.py")
    assert done.stdout.count("quiet hours are disabled") == 1
    assert done.stderr == ""


def test_empty_quiet_hours_are_a_warning(world: TestData) -> None:
    running_system(world)
    sending(world)
    world.settings(quiet_hours_start="08:00", quiet_hours_end="8:00")
    done = run_script("status.py")
    assert done.stdout.startswith("Sending: next item of batch ")
    assert done.returncode == 1
    assert "Warning: quiet hours are disabled: start='08:00' end='8:00' tz=None; start and end are the same, which" in (
        done.stdout
    )
    assert "which means no quiet hours; to stop sending use paused = true.\n" in done.stdout
