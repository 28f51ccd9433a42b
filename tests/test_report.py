"""Check the report: its summary in each situation, its warnings, and what it says of a database's error."""

import json
import re
from datetime import timedelta
from typing import Any

import psycopg2
import pytest
from helpers import record_queries, run_script
from situations import (
    DISK,
    SITUATIONS,
    Situation,
    batch_stopped_itself_beside_another,
    mac_says_and_paused,
    mac_says_and_stopped,
    one_of_two_macs_says,
    outcome_unknown,
    outcome_unknown_long_ago,
    running_system,
    uncollected_items,
)
from testing import Databases, TestData

import batches
import db
import dispatcher
import report
import snapshots
import status


@pytest.mark.parametrize(("situation", "line", "code"), SITUATIONS, ids=[case[0].__name__ for case in SITUATIONS])
def test_first_line_names_the_hold(
    world: TestData, capsys: pytest.CaptureFixture[str], situation: Situation, line: str, code: int
) -> None:
    running_system(world)
    situation(world)
    assert status.main([]) == code
    assert re.fullmatch(line, capsys.readouterr().out.splitlines()[0])


INTERVAL = timedelta(seconds=30)


@pytest.mark.parametrize("situation", [case[0] for case in SITUATIONS], ids=[case[0].__name__ for case in SITUATIONS])
def test_summary_agrees_with_next_tick(
    world: TestData, mac_sync: dispatcher.SendQueueClient, situation: Situation
) -> None:
    running_system(world)
    situation(world)
    verdict = report.report(INTERVAL).verdict
    tally = dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)
    # These holds come from a dispatcher or server that does not run; here both do.
    outside = (
        "dispatcher not running", "sync job fails", "dispatch job fails", "server unavailable", "no device",
        "device problem",
    )  # fmt: skip
    if verdict.hold not in outside:
        assert bool(tally["queued"]) == (verdict.state == "sending")
    assert bool(tally["failed"]) == (verdict.hold == "no device")


def test_missing_permission_suggests_grant(databases: Databases) -> None:
    def forbidden(conn: Any) -> None:
        db.query(conn, "DO $$ BEGIN RAISE EXCEPTION 'permission denied' USING ERRCODE = '42501'; END $$")

    words = "permission denied; GRANT the tables' owner to it"
    assert report.read_database("quinn", forbidden) == (
        None,
        db.DatabaseProblem("database quinn refuses this role", words),
    )


# A failing statement, and the problem and remedy that are reported.
FAILING = {
    "SET LOCAL statement_timeout = 10; SELECT pg_sleep(5)": (
        "responds too slowly", r"canceling statement due to statement timeout; see what else it runs: SELECT pid.*"
    ),
    "DO $$ BEGIN RAISE admin_shutdown; END $$": (
        "is shutting down or starting", r"admin_shutdown; try again in a moment.*"
    ),
    "DO $$ BEGIN RAISE deadlock_detected; END $$": (
        "is locked by another session", r"deadlock_detected; wait for it to end.*"
    ),
    "SELECT 1 / 0": ("refuses a statement", r"division by zero; see PostgreSQL.s log"),
}  # fmt: skip


@pytest.mark.parametrize("sql", FAILING)
def test_failed_read_is_classified(databases: Databases, sql: str) -> None:
    seen, problem = report.read_database("quinn", lambda conn: db.query(conn, sql))
    what, remedy = FAILING[sql]
    assert seen is None
    assert problem
    assert problem.what == f"database quinn {what}"
    assert re.fullmatch(remedy, problem.remedy)


def write_error(part: db.DatabaseName) -> None:
    """Try to write in the report's session; raise PostgreSQL's error."""
    errors: list[psycopg2.Error] = []

    def write(conn: Any) -> None:
        try:
            db.query(conn, "CREATE TABLE written (id INTEGER)")
        except psycopg2.Error as error:
            errors.append(error)

    report.read_database(part, write)
    raise errors[0]


def test_session_is_read_only(databases: Databases) -> None:
    for part in db.URL_VARIABLES:
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            write_error(part)


@pytest.mark.parametrize(
    ("ahead", "words"),
    [(6, "6 s ahead of that of quinn"), (-90, "90 s behind that of quinn"), (4, None), (-4, None)],
)
def test_clock_difference_is_a_warning(world: TestData, ahead: int, words: str | None) -> None:
    running_system(world)
    read = report.read_databases()
    assert read.outreach
    assert read.queue
    queue = read.queue._replace(now=read.outreach.now + timedelta(seconds=ahead), read_at=read.outreach.read_at)
    warnings = report._warnings(read.outreach, read.ended, queue, read.outreach.now)
    if words is None:
        assert warnings == []
    else:
        [warning] = warnings
        assert words in warning
        assert "NTP" in warning


def test_late_reading_is_no_clock_difference(world: TestData) -> None:
    running_system(world)
    read = report.read_databases()
    assert read.outreach
    assert read.queue
    later = timedelta(seconds=60)
    queue = read.queue._replace(now=read.queue.now + later, read_at=read.queue.read_at + later)
    assert report._warnings(read.outreach, read.ended, queue, read.outreach.now) == []


def test_transaction_reads_clock_first(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    statements = record_queries(monkeypatch)
    snapshots.read_outreach(world.databases.quinn)
    assert statements[0] == "SELECT now()"
    statements.clear()
    snapshots.read_queue(world.databases.icloud, None)
    assert statements[0] == "SELECT now()"


@pytest.mark.parametrize(("count", "kept"), [(1, "1 message"), (2, "2 messages")])
def test_late_device_is_a_warning(world: TestData, count: int, kept: str) -> None:
    running_system(world)
    uncollected_items(world, count, seen=3 * 3600)
    assert report.report(INTERVAL).warnings == [f"device 'mac-mini', last seen 3 h ago, keeps {kept} waiting"]


@pytest.mark.parametrize(
    ("situation", "hidden"),
    [(mac_says_and_paused, "Held: paused"), (mac_says_and_stopped, "Dispatcher not running: last tick 11 min ago")],
)
def test_what_else_holds_is_said_after_what_the_mac_says(world: TestData, situation: Situation, hidden: str) -> None:
    running_system(world)
    situation(world)
    lines = run_script("status.py").stdout.splitlines()
    assert lines[0] == f"Held: mac-mini says: {DISK}."
    assert lines[1] == "See what else is wrong, on that Mac: python3 mac_sender.py doctor"
    assert f"Warning: {hidden}." in lines
    device = json.loads(run_script("status.py", "--json").stdout)["devices"][0]
    assert device["problem"].startswith(DISK)
    assert device["problemAt"]


def test_what_one_of_two_macs_says_is_a_warning(world: TestData) -> None:
    running_system(world)
    one_of_two_macs_says(world)
    assert report.report(INTERVAL).warnings == [f"mac-2 says: {DISK}"]


def test_a_batch_that_stopped_itself_says_why_and_what_to_do(world: TestData) -> None:
    running_system(world)
    batch_stopped_itself_beside_another(world)
    reason = r"Warning: Held: batch [0-9a-f]{8}… paused itself: the last 5 messages failed\."
    assert re.search(reason, run_script("status.py").stdout)
    world.quinn("DELETE FROM outreach_batches WHERE status = 'sending'")
    lines = run_script("status.py").stdout.splitlines()
    assert re.fullmatch(reason.removeprefix("Warning: "), lines[0])
    advice = report.report(INTERVAL).verdict.advice or ""
    assert advice.startswith("Look at the reasons of the failures, and at the Mac: python mac_sender.py doctor. Then: ")
    command, batch_id = advice.rsplit(maxsplit=1)
    assert command.endswith("Then: python outreach.py resume")
    batches.resume(world.databases.quinn, batch_id)
    assert world.quinn("SELECT status, pause_reason, resumed_at IS NOT NULL FROM outreach_batches") == [
        ("sending", None, True)
    ]
    [stopped_batch] = [seen for seen in [report.report(INTERVAL).stopped_batches] if seen is not None]
    assert stopped_batch == []


def test_a_batch_that_its_owner_paused_is_none_that_stopped_itself(world: TestData) -> None:
    running_system(world)
    world.batch(clients=1, status="paused", digest="d")
    assert report.report(INTERVAL).verdict.state == "idle"


@pytest.mark.parametrize(("count", "what"), [(1, "1 message"), (2, "2 messages")])
def test_an_unknown_outcome_is_always_visible(world: TestData, count: int, what: str) -> None:
    running_system(world)
    for _ in range(count):
        outcome_unknown(world)
    assert f"Warning: {what} whose outcome is unknown: look at the Mac.\n" in run_script("status.py").stdout
    outcome_unknown_long_ago(world)
    world.quinn("UPDATE outreach_batch_items SET outcome_unknown_at = outcome_unknown_at - interval '9 days'")
    shown = run_script("status.py").stdout
    assert "Warning" not in shown
    assert f"outcome unknown {count + 1}" in shown
    world.quinn("UPDATE outreach_batch_items SET status = 'sent', sent_at = '2026-01-02'")
    assert "unknown" not in run_script("status.py").stdout


def test_a_composed_batch_that_waits_for_approval_is_counted(world: TestData) -> None:
    running_system(world)
    world.batch(clients=1, digest="d")
    assert "batches in status not approved: 1" in run_script("status.py").stdout
