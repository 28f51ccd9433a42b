"""Check the report: its summary in each situation, its warnings, and what it says of a database's error."""

import re
from datetime import timedelta
from typing import Any

import psycopg2
import pytest
from helpers import record_queries
from situations import SITUATIONS, Situation, running_system, uncollected_items
from testing import Databases, TestData

import db
import dispatcher
import forecast
import report
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
    outside = ("dispatcher not running", "sync job fails", "dispatch job fails", "server unavailable", "no device")
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
    forecast.read_outreach(world.databases.quinn)
    assert statements[0] == "SELECT now()"
    statements.clear()
    forecast.read_queue(world.databases.icloud, [])
    assert statements[0] == "SELECT now()"


@pytest.mark.parametrize(("count", "kept"), [(1, "1 message"), (2, "2 messages")])
def test_late_device_is_a_warning(world: TestData, count: int, kept: str) -> None:
    running_system(world)
    uncollected_items(world, count, seen=3 * 3600)
    assert report.report(INTERVAL).warnings == [f"device 'mac-mini', last seen 3 h ago, keeps {kept} waiting"]
