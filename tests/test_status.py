"""The verdict in every situation, what the output says, and that status.py writes nothing."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import pytest
import requests
from testing import ROOT, SERVICE_TOKEN, Databases, TestData, on_database

import db
import dispatcher
import forecast
import pacing
import report
import status

INTERVAL = timedelta(seconds=30)
Setting = Callable[[TestData], object]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process would find: no quiet hours read and nothing told yet."""
    pacing.quiet_hours.cache_clear()
    dispatcher.decision_log.last = ""
    monkeypatch.setattr(pacing.logger, "disabled", False)  # which status.main() changes for its process


def ago(**length: float) -> datetime:
    return datetime.now(UTC) - timedelta(**length)


def alive(world: TestData) -> None:
    """A dispatcher whose last tick was 18 s ago, and a device that has just polled."""
    world.settings(last_tick_at=ago(seconds=18), last_synced_at=ago(seconds=18), last_dispatched_at=ago(seconds=18))
    world.device()
    world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '3 seconds'")


def hours(start: float, end: float) -> tuple[str, str]:
    """HH:MM so many hours from now, in UTC."""
    now = datetime.now(UTC)
    return f"{now + timedelta(hours=start):%H:%M}", f"{now + timedelta(hours=end):%H:%M}"


def quiet(world: TestData, start: float = -1, end: float = 1) -> None:
    first, last = hours(start, end)
    world.settings(quiet_hours_start=first, quiet_hours_end=last, quiet_hours_tz="UTC")


def in_flight(world: TestData, count: int = 1, batch_id: str | None = None, seen: float | None = 3) -> str:
    """Items in flight whose rows the device, last seen so many seconds ago, has not collected."""
    batch_id = batch_id or world.batch()
    device_id = world.icloud("SELECT id FROM icloud.devices LIMIT 1")[0][0]
    for _ in range(count):
        sql = "INSERT INTO icloud.send_queue (device_id, to_handle, body) VALUES (%(id)s, 'a@b.de', 'Hi') RETURNING id"
        row = world.icloud(sql, id=device_id)
        world.item(batch_id, status="queued", send_queue_id=row[0][0], queued_at=ago(seconds=20))
    world.icloud("UPDATE icloud.devices SET last_seen_at = %(at)s", at=ago(seconds=seen) if seen is not None else None)
    return batch_id


def sent(world: TestData, count: int, **length: float) -> None:
    old = world.batch(status="sent")
    for _ in range(count):
        world.item(old, status="sent", sent_at=ago(**length))


def idle(world: TestData) -> None: ...


def sending(world: TestData) -> None:
    world.batch(clients=2)


def paused(world: TestData) -> None:
    sending(world)
    world.settings(paused=True)


def no_settings(world: TestData) -> None:
    sending(world)
    world.quinn("DELETE FROM outreach_settings")


def in_quiet_hours(world: TestData) -> None:
    sending(world)
    quiet(world)


def invalid_quiet_hours(world: TestData) -> None:
    sending(world)
    world.settings(quiet_hours_start="25:00", quiet_hours_end="08:00")


def stopped(world: TestData) -> None:
    sending(world)
    world.settings(last_tick_at=ago(minutes=11))


def never_ran(world: TestData) -> None:
    sending(world)
    world.settings(last_tick_at=None)


def hour_is_full(world: TestData) -> None:
    sending(world)
    sent(world, 3, minutes=20)
    world.settings(max_per_hour=3)


def minute_and_hour_are_full(world: TestData) -> None:
    sending(world)
    sent(world, 3, seconds=10)
    world.settings(max_per_minute=1, max_per_hour=3)


def day_is_full(world: TestData) -> None:
    sending(world)
    sent(world, 2, hours=5)
    world.settings(max_per_hour=1, max_per_day=2)


def zero(world: TestData) -> None:
    sending(world)
    world.settings(max_per_day=0)


def zero_and_in_flight(world: TestData) -> None:
    in_flight(world)
    sending(world)
    world.settings(max_per_minute=1, max_per_day=0)


def device_is_off(world: TestData) -> None:
    sending(world)
    in_flight(world, 2, seen=3 * 3600 + 60)
    world.settings(max_per_minute=2)


def device_is_slow(world: TestData) -> None:
    sending(world)
    in_flight(world, 2)
    world.settings(max_per_minute=2)


def device_never_seen(world: TestData) -> None:
    in_flight(world, seen=None)


def last_in_flight(world: TestData) -> None:
    in_flight(world)


def results_to_read(world: TestData) -> None:
    in_flight(world)
    world.icloud("UPDATE icloud.send_queue SET status = 'sent', sent_at = now()")


def gap(world: TestData) -> None:
    world.item(world.batch(clients=1), status="sent", sent_at=ago(seconds=40))
    world.settings(min_gap_seconds=300)


def gap_of_one(world: TestData) -> None:
    gap(world)
    world.batch(clients=1)


def gap_in_flight(world: TestData) -> None:
    in_flight(world, batch_id=world.batch(clients=1), seen=7200)
    world.settings(min_gap_seconds=30)


def gap_and_limit(world: TestData) -> None:
    gap(world)
    world.settings(max_per_hour=1)


def paused_in_quiet_hours(world: TestData) -> None:
    in_quiet_hours(world)
    world.settings(paused=True)


def quiet_and_full(world: TestData) -> None:
    hour_is_full(world)
    quiet(world)


def paused_and_off(world: TestData) -> None:
    device_is_off(world)
    world.settings(paused=True)


def stopped_and_paused(world: TestData) -> None:
    paused(world)
    world.settings(last_tick_at=ago(hours=2))


def no_device(world: TestData) -> None:
    sending(world)
    world.icloud("DELETE FROM icloud.devices")


def no_device_in_quiet_hours(world: TestData) -> None:
    no_device(world)
    quiet(world)


def only_drafts(world: TestData) -> None:
    world.batch(clients=2, status="draft")
    world.batch(clients=2, status="paused")
    world.batch(clients=1, dry_run=True)


def no_items_yet(world: TestData) -> None:
    world.batch()


def claimed(world: TestData) -> None:
    world.item(world.batch(), claimed_at=ago(seconds=2))
    world.settings(max_per_minute=1)


def server_is_down(world: TestData) -> None:
    world.item(world.batch(), claimed_at=ago(minutes=4))
    world.settings(max_per_minute=1)


def server_is_down_at_night(world: TestData) -> None:
    server_is_down(world)
    quiet(world)


def sync_fails(world: TestData) -> None:
    in_flight(world)
    world.settings(last_tick_at=ago(seconds=5), last_synced_at=ago(hours=2, seconds=5))


def dispatch_fails_while_paused(world: TestData) -> None:
    paused(world)
    world.settings(last_tick_at=ago(seconds=5), last_dispatched_at=ago(minutes=20))


def sync_never_worked(world: TestData) -> None:
    world.settings(last_synced_at=None)


def one_batch_below_the_limit(world: TestData) -> None:
    world.batch(clients=3)
    world.settings(max_per_minute=60)


def unreadable_number(world: TestData) -> None:
    world.batch(clients=[world.client("0170 1234567"), world.client()])


def all_have_ended(world: TestData) -> None:
    world.item(world.batch(status="sent"), status="failed", failure_reason="not registered")


# What is so, the first line, and the exit status.
SITUATIONS: list[tuple[Setting, str, int]] = [
    (idle, r"Nothing to send\.", 0),
    (all_have_ended, r"Nothing to send\.", 0),
    (only_drafts, r"Nothing to send\.", 0),
    (no_items_yet, r"Nothing to send\.", 0),
    (sending, r"Sending: next item of batch [0-9a-f]{8}… in about 1[12] s\.", 0),
    (gap_of_one, r"Sending: next item of batch .*", 0),
    (claimed, r"Sending: next item of batch .*", 0),
    (invalid_quiet_hours, r"Sending: next item of batch .*", 1),
    (paused, r"Held: paused\.", 1),
    (paused_in_quiet_hours, r"Held: paused\.", 1),
    (paused_and_off, r"Held: paused\.", 1),
    (no_settings, r"Held: no settings: outreach_settings has no row with id 1; run `python db.py migrate`\.", 1),
    (in_quiet_hours, r"Held: quiet hours until (\w+ )?\d\d:\d\d \(UTC\), (59 min|1 h)\.", 0),
    (quiet_and_full, r"Held: quiet hours until .*", 0),
    (server_is_down_at_night, r"Held: quiet hours until .*", 0),
    (no_device_in_quiet_hours, r"Held: quiet hours until .*", 1),
    (hour_is_full, r"Held: max_per_hour reached, 3 of 3; next place at (\w+ )?\d\d:\d\d\.", 0),
    (minute_and_hour_are_full, r"Held: max_per_hour reached, 3 of 3; next place at .*", 0),
    (day_is_full, r"Held: max_per_day reached, 2 of 2; next place at .*", 0),
    (gap_and_limit, r"Held: max_per_hour reached, 1 of 1; next place at .*", 0),
    (zero, r"Held: max_per_day is 0\.", 1),
    (zero_and_in_flight, r"Held: max_per_day is 0\.", 1),
    (gap, r"Held: minimum gap of 300 s; next message at \d\d:\d\d:\d\d\.", 0),
    (gap_in_flight, r"Held: waiting for device 'mac-mini', last seen 2 h ago; 1 message in flight\.", 1),
    (device_is_off, r"Held: waiting for device 'mac-mini', last seen 3 h 1 min ago; 2 messages in flight\.", 1),
    (device_is_slow, r"Held: waiting for device 'mac-mini', last seen 3 s ago; 2 messages in flight\.", 0),
    (device_never_seen, r"Held: waiting for device 'mac-mini', never seen; 1 message in flight\.", 1),
    (last_in_flight, r"Held: waiting for device 'mac-mini', last seen 3 s ago; 1 message in flight\.", 0),
    (results_to_read, r"Held: waiting for the next tick to read the results; 1 message in flight\.", 0),
    (no_device, r"Failing: there is no device: `python db.py add-device NAME` makes one\.", 1),
    (server_is_down, r"Held: the send queue server has been unavailable for 4 min\.", 1),
    (sync_fails, r"Failing: the dispatcher runs, and its sync job has failed for 2 h\.", 1),
    (sync_never_worked, r"Failing: the dispatcher runs, and its sync job has failed since its first run\.", 1),
    (dispatch_fails_while_paused, r"Failing: the dispatcher runs, and its dispatch job has failed for 20 min\.", 1),
    (one_batch_below_the_limit, r"Sending: next item of batch .*", 0),
    (unreadable_number, r"Sending: next item of batch .*", 1),
    (stopped, r"Dispatcher not running: last tick 11 min ago\.", 1),
    (never_ran, r"Dispatcher not running: it has not run yet\.", 1),
    (stopped_and_paused, r"Dispatcher not running: last tick 2 h ago\.", 1),
]


@pytest.mark.parametrize(("situation", "line", "code"), SITUATIONS, ids=[case[0].__name__ for case in SITUATIONS])
def test_the_first_line_names_the_gate(
    world: TestData, capsys: pytest.CaptureFixture[str], situation: Setting, line: str, code: int
) -> None:
    alive(world)
    situation(world)
    assert status.main([]) == code
    assert re.fullmatch(line, capsys.readouterr().out.splitlines()[0])


@pytest.mark.parametrize("situation", [case[0] for case in SITUATIONS], ids=[case[0].__name__ for case in SITUATIONS])
def test_what_status_says_is_what_the_next_tick_does(
    world: TestData, mac_sync: dispatcher.SendQueueClient, situation: Setting
) -> None:
    alive(world)
    situation(world)
    verdict = report.report(INTERVAL).verdict
    tally = dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)
    # Whether a dispatcher, its jobs and the server work is not the settings' to say, and here all do.
    outside = ("dispatcher not running", "sync job fails", "dispatch job fails", "server unavailable", "no device")
    if verdict.hold not in outside:
        assert bool(tally["queued"]) == (verdict.state == "sending")
    assert bool(tally["failed"]) == (verdict.hold == "no device")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """status.py as a process of its own, its output piped."""
    return subprocess.run(
        [sys.executable, "status.py", *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


NOWHERE = "postgresql://somebody:secret-word@127.0.0.1:1/nowhere"


def test_with_both_databases_down_it_says_so_and_what_to_do() -> None:
    done = run(QUINN_DB_URL=NOWHERE, QUINN_ICLOUD_DB_URL=NOWHERE)
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database quinn cannot be reached; database icloud cannot be reached.\n")
    assert "Connection refused; start PostgreSQL, correct QUINN_ICLOUD_DB_URL, or" in done.stdout
    assert "Traceback" not in done.stderr
    assert "secret-word" not in done.stdout + done.stderr


def test_with_one_database_down_it_still_shows_the_other(world: TestData) -> None:
    alive(world)
    sending(world)
    done = run(QUINN_ICLOUD_DB_URL=NOWHERE)
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database icloud cannot be reached")
    assert "Batches" in done.stdout
    done = run(QUINN_DB_URL=NOWHERE)
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database quinn cannot be reached")
    assert "mac-mini" in done.stdout


def test_a_url_that_is_none_is_named_and_not_shown(world: TestData) -> None:
    done = run(QUINN_DB_URL="somebody secret-word")
    assert done.returncode == 2
    assert done.stderr.startswith("status.py: QUINN_DB_URL is no PostgreSQL URL: set it to one such as postgresql://")
    assert "secret-word" not in done.stdout + done.stderr


def test_a_database_without_our_tables_is_sent_to_migrate(databases: Databases, postgres: str) -> None:
    bare = on_database(postgres, "template1")
    done = run(QUINN_DB_URL=bare, QUINN_ICLOUD_DB_URL=bare)
    assert done.returncode == 1
    assert "run `python db.py migrate`" in done.stdout


def test_a_role_that_may_not_read_is_told_what_to_grant(databases: Databases) -> None:
    def forbidden(conn: Any) -> None:
        db.query(conn, "DO $$ BEGIN RAISE EXCEPTION 'permission denied' USING ERRCODE = '42501'; END $$")

    words = "permission denied; GRANT the tables' owner to it"
    assert report.read_database("quinn", forbidden) == (
        None,
        db.DatabaseProblem("database quinn refuses this role", words),
    )


def test_a_lock_that_is_held_is_not_a_server_that_is_away(world: TestData) -> None:
    impatient = f"{world.databases.quinn_url} options='-c lock_timeout=50ms'"
    world.quinn("BEGIN")
    world.quinn("LOCK TABLE outreach_batches IN ACCESS EXCLUSIVE MODE")
    done = run(QUINN_DB_URL=impatient)
    world.quinn("COMMIT")
    assert done.returncode == 1
    assert done.stdout.startswith("Held: database quinn is locked by another session.\n")
    assert "canceling statement due to lock timeout; wait for it to end" in done.stdout
    assert "start PostgreSQL" not in done.stdout


# A statement of a look, and what is said of its error.
FAILING = {
    "SET LOCAL statement_timeout = 10; SELECT pg_sleep(5)": (
        "answers too slowly", r"canceling statement due to statement timeout; see what else it does: SELECT pid.*"
    ),
    "DO $$ BEGIN RAISE admin_shutdown; END $$": (
        "is shutting down or starting", r"admin_shutdown; look again in a moment.*"
    ),
    "DO $$ BEGIN RAISE deadlock_detected; END $$": (
        "is locked by another session", r"deadlock_detected; wait for it to end.*"
    ),
    "SELECT 1 / 0": ("refuses a statement", r"division by zero; see PostgreSQL.s log"),
}  # fmt: skip


@pytest.mark.parametrize("sql", FAILING)
def test_a_look_that_fails_says_what_it_is(databases: Databases, sql: str) -> None:
    seen, problem = report.read_database("quinn", lambda conn: db.query(conn, sql))
    what, remedy = FAILING[sql]
    assert seen is None
    assert problem
    assert problem.what == f"database quinn {what}"
    assert re.fullmatch(remedy, problem.remedy)


def test_a_server_without_a_free_connection_is_not_a_server_that_is_away(databases: Databases) -> None:
    role = f"test_role_{os.getpid()}"
    db.query(databases.quinn, f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        done = run(QUINN_DB_URL=f"{databases.quinn_url} user={role}")
    finally:
        db.query(databases.quinn, f"DROP ROLE {role}")
    assert done.stdout.startswith("Held: database quinn has no connection left.\n")
    assert f'too many connections for role "{role}"; close other sessions, or raise max_connections' in done.stdout


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("FATAL:  sorry, too many clients already", "has no connection left"),
        ("FATAL:  remaining connection slots are reserved for roles", "has no connection left"),
        ("FATAL:  the database system is shutting down", "is shutting down or starting"),
        ("FATAL:  the database system is starting up", "is shutting down or starting"),
        ("FATAL:  the database system is in recovery mode", "is shutting down or starting"),
        ("FATAL:  the database system is not yet accepting connections", "is shutting down or starting"),
        ('FATAL:  password authentication failed for user "x"', "cannot be reached"),
    ],
)  # fmt: skip
def test_a_server_that_lets_nobody_in_says_why(words: str, what: str) -> None:
    error = psycopg2.OperationalError(f'connection to server on socket "/run" failed: {words}\n')
    assert db.diagnose(error, "icloud").what == f"database icloud {what}"


def contents(world: TestData) -> list[list[db.Row]]:
    quinn = ("outreach_batches", "outreach_batch_items", "outreach_settings", "clients", "contact_relationships")
    icloud = ("icloud.devices", "icloud.send_queue")
    return [
        *(world.quinn(f"SELECT t::text, xmin::text FROM {table} AS t ORDER BY 1") for table in quinn),
        *(world.icloud(f"SELECT t::text, xmin::text FROM {table} AS t ORDER BY 1") for table in icloud),
    ]


def test_nothing_is_written(world: TestData) -> None:
    alive(world)
    device_is_off(world)
    server_is_down(world)
    draft = world.batch(clients=[world.client(), world.client(None)], status="draft")
    before = contents(world)
    # A server that refuses each write proves it, whatever is in the tables.
    for database in (world.databases.quinn, world.databases.icloud):
        name = db.query(database, "SELECT current_database()")[0][0]
        db.query(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    for arguments in ([], ["--json"], ["--forecast", draft]):
        assert "read-only" not in run(*arguments).stdout
    assert contents(world) == before


def test_its_session_refuses_a_write(databases: Databases) -> None:
    for part in db.URL_VARIABLES:
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            refused(part)


def refused(part: db.DatabaseName) -> None:
    errors: list[psycopg2.Error] = []

    def write(conn: Any) -> None:
        try:
            db.query(conn, "CREATE TABLE written (id INTEGER)")
        except psycopg2.Error as error:
            errors.append(error)

    report.read_database(part, write)
    raise errors[0]


KEYS = {
    "now", "zone", "verdict", "warnings", "lastTickAt", "inFlight", "batches", "idleBatches", "limits", "devices",
    "failures",
}  # fmt: skip


def test_json_has_every_figure(world: TestData) -> None:
    alive(world)
    device_is_off(world)
    sent(world, 1, seconds=30)
    world.item(world.batch(status="sent"), status="failed", failure_reason="not registered")
    world.batch(status="draft")
    done = run("--json")
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


def test_json_is_json_with_both_databases_down() -> None:
    seen = json.loads(run("--json", QUINN_DB_URL=NOWHERE, QUINN_ICLOUD_DB_URL=NOWHERE).stdout)
    assert set(seen) == KEYS
    assert seen["verdict"]["state"] == "down"
    assert seen["batches"] is seen["devices"] is None


def on_a_terminal(*arguments: str) -> str:
    """What status.py shows on a terminal of 80 columns."""
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


def test_a_terminal_gets_colour_and_bars_and_a_pipe_plain_lines(world: TestData) -> None:
    alive(world)
    sending(world)
    terminal, piped = on_a_terminal(), run().stdout
    assert "\x1b[" in terminal
    assert "━" in terminal
    assert "\x1b" not in piped
    assert "━" not in piped
    assert max(len(line) for line in re.sub("\x1b\\[[0-9;]*m", "", terminal).splitlines()) <= 80


def test_words_from_outside_cannot_move_the_cursor(world: TestData) -> None:
    alive(world)
    world.icloud("UPDATE icloud.devices SET name = E'[red]\\x1b[2Jmac'")
    world.item(world.batch(status="sent"), status="failed", failure_reason="\x1b[2J [bold]no\nsecond line")
    for shown in (run().stdout, on_a_terminal()):
        assert "\x1b[2J" not in shown
        assert "[red]" in shown
        assert "[bold]no" in shown


def test_why_a_single_batch_is_slower_than_its_limit_is_said(world: TestData) -> None:
    alive(world)
    one_batch_below_the_limit(world)
    assert (
        "1 batch sends at most 2 a minute, one message of a batch in each tick; max_per_minute allows 60."
        in run().stdout
    )


def test_a_number_without_country_code_is_warned_of(world: TestData) -> None:
    alive(world)
    unreadable_number(world)
    warning = "1 pending item has a number without a country code, which may fail at the device"
    assert f"Warning: {warning}; write the number with +" in run().stdout
    [draft] = world.quinn("SELECT id FROM outreach_batches")[0]
    assert f"Note: {warning}" in run("--forecast", draft).stdout
    assert "Warning" not in run(DEFAULT_REGION="DE").stdout


@pytest.mark.parametrize(
    ("ahead", "words"),
    [(6, "6 s ahead of that of quinn"), (-90, "90 s behind that of quinn"), (4, None), (-4, None)],
)
def test_clocks_that_differ_are_warned_of(world: TestData, ahead: int, words: str | None) -> None:
    alive(world)
    read = report.read_databases()
    assert read.outreach
    assert read.queue
    queue = read.queue._replace(now=read.outreach.now + timedelta(seconds=ahead), read_at=read.outreach.read_at)
    warnings = report._warnings(read.outreach, queue, read.outreach.now)
    if words is None:
        assert warnings == []
    else:
        [warning] = warnings
        assert words in warning
        assert "NTP" in warning


def test_the_time_between_the_two_readings_is_no_difference_of_the_clocks(world: TestData) -> None:
    alive(world)
    read = report.read_databases()
    assert read.outreach
    assert read.queue
    later = timedelta(seconds=60)
    queue = read.queue._replace(now=read.queue.now + later, read_at=read.queue.read_at + later)
    assert report._warnings(read.outreach, queue, read.outreach.now) == []


def test_each_clock_is_read_at_the_start_of_its_transaction(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    statements: list[str] = []
    query = db.query

    def record(conn: Any, sql: str, params: db.Params | None = None) -> list[db.Row]:
        statements.append(sql)
        return query(conn, sql, params)

    monkeypatch.setattr(db, "query", record)
    forecast.read_outreach(world.databases.quinn)
    assert statements[0] == "SELECT now()"
    statements.clear()
    forecast.read_queue(world.databases.icloud, [])
    assert statements[0] == "SELECT now()"


def test_invalid_quiet_hours_are_warned_of_once(world: TestData) -> None:
    alive(world)
    invalid_quiet_hours(world)
    done = run()
    assert done.stdout.count("quiet hours are disabled") == 1
    assert done.stderr == ""


def test_quiet_hours_of_no_length_are_warned_of_and_it_is_said_how_to_stop_sending(world: TestData) -> None:
    alive(world)
    sending(world)
    world.settings(quiet_hours_start="08:00", quiet_hours_end="8:00")
    done = run()
    assert done.stdout.startswith("Sending: next item of batch ")
    assert done.returncode == 1
    assert "Warning: quiet hours are disabled: start='08:00' end='8:00' tz=None; start and end are the same, which" in (
        done.stdout
    )
    assert "which means no quiet hours; to stop sending use paused = true.\n" in done.stdout


@pytest.mark.parametrize(("count", "kept"), [(1, "1 message"), (2, "2 messages")])
def test_a_late_device_is_warned_of(world: TestData, count: int, kept: str) -> None:
    alive(world)
    in_flight(world, count, seen=3 * 3600)
    assert report.report(INTERVAL).warnings == [f"device 'mac-mini', last seen 3 h ago, keeps {kept} waiting"]


# --- the forecast of a draft --------------------------------------------------------------------------


def test_a_draft_s_forecast_says_how_many_go_and_why_others_do_not(world: TestData) -> None:
    alive(world)
    handles = ["+14155550123", None, "a@example.com", "call me", None, "+14155550124"]
    draft = world.batch(clients=[world.client(handle) for handle in handles], status="draft")
    world.settings(max_per_minute=1)
    done = run("--json", "--forecast", draft)
    assert done.returncode == 0
    seen = json.loads(done.stdout)
    assert (seen["pending"], seen["wouldSend"]) == (6, 3)
    assert seen["wouldSkip"] == {"no primary handle": 2}
    assert seen["wouldFail"] == {"invalid handle, or an empty message": 1}
    assert seen["bottleneck"] == "max_per_minute"
    assert seen["isExact"] is True
    first, last = (datetime.fromisoformat(seen[name]) for name in ("firstAt", "lastAt"))
    # One goes; the next place is free three ticks later; the one that fails takes a tick of its own.
    assert (last - first) in (timedelta(seconds=90 + 90), timedelta(seconds=90 + 30 + 90))
    assert run("--forecast", draft).stdout.splitlines()[0].endswith("6 items pending. If it were sent from now on:")


def test_a_draft_waits_for_its_turn_beside_what_is_being_sent(world: TestData) -> None:
    alive(world)
    world.settings(max_per_hour=2)
    world.batch(clients=2)
    draft = world.batch(clients=2, status="draft")
    seen = json.loads(run("--json", "--forecast", draft).stdout)
    first, last = (datetime.fromisoformat(seen[name]) for name in ("firstAt", "lastAt"))
    assert last - first == timedelta(minutes=60, seconds=30)


def test_a_forecast_while_paused_says_what_it_takes_for_granted(world: TestData) -> None:
    alive(world)
    paused(world)
    seen = json.loads(run("--json", "--forecast", world.batch(clients=1, status="draft")).stdout)
    assert seen["lastAt"]
    assert seen["notes"] == ["sending is paused: this assumes that it goes on now"]


def test_an_unknown_batch_is_an_error(world: TestData) -> None:
    done = run("--forecast", "00000000-0000-0000-0000-000000000000")
    assert done.returncode == 1
    assert done.stderr == "status.py: there is no batch 00000000-0000-0000-0000-000000000000\n"


# --- the queue's half, over HTTP ----------------------------------------------------------------------


def ask(base_url: str, token: str = SERVICE_TOKEN) -> requests.Response:
    url = f"{base_url}/admin/send-queue/status"
    return requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=5)


def test_the_server_tells_what_waits_and_what_came_back(world: TestData, base_url: str) -> None:
    assert ask(base_url).json()["data"] == {"devices": [], "lastHour": {"sent": 0, "failed": 0}}
    alive(world)
    in_flight(world, 3)
    world.icloud("UPDATE icloud.send_queue SET created_at = now() - interval '90 seconds'")
    one = "WHERE id = (SELECT id FROM icloud.send_queue WHERE status = 'queued' LIMIT 1)"
    world.icloud(f"UPDATE icloud.send_queue SET collected_at = now() {one}")
    in_flight(world, 3)
    ends = (
        "status = 'sent', sent_at = now()",
        "status = 'failed'",
        "status = 'failed', withdrawn_at = now(), collected_at = NULL",
    )
    for end in ends:
        world.icloud(f"UPDATE icloud.send_queue SET {end} WHERE id = (SELECT id FROM icloud.send_queue"
                     " WHERE status = 'queued' ORDER BY created_at DESC LIMIT 1)")  # fmt: skip
    device_id, seen_at = world.icloud("SELECT id, last_seen_at FROM icloud.devices")[0]
    data = ask(base_url).json()["data"]
    assert data["lastHour"] == {"sent": 1, "failed": 1}
    assert data["devices"] == [
        {
            "id": device_id,
            "name": "mac-mini",
            "lastSeenAt": f"{seen_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "waiting": 2,
            "collected": 1,
            "oldestAgeSeconds": 90,
        }
    ]


def test_the_server_s_status_is_the_service_token_s(world: TestData, base_url: str) -> None:
    world.device(token="mini")
    assert ask(base_url, "mini").status_code == ask(base_url, "wrong").status_code == 401
    assert requests.post(f"{base_url}/admin/send-queue/status", timeout=5).status_code == 405
    assert requests.head(f"{base_url}/admin/send-queue/status", timeout=5).status_code == 405


# --- the dispatcher's story ---------------------------------------------------------------------------


def test_limits_that_a_late_device_fills_are_logged_once(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outreach-dispatcher")
    alive(world)
    device_is_off(world)
    for _ in range(5):
        dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)
    assert [line for line in caplog.messages if "held" in line] == [
        "sending is held: waiting for device name='mac-mini'"
    ]


def test_a_day_is_told_in_a_dozen_lines(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outreach-dispatcher")
    world.device()
    world.settings(max_per_minute=1, max_per_hour=5)
    databases = world.databases.quinn, world.databases.icloud
    dispatcher.dispatch(*databases, mac_sync)
    world.batch(clients=7)
    for _ in range(20):
        dispatcher.sync(*databases)
        dispatcher.dispatch(*databases, mac_sync)
        world.icloud("UPDATE icloud.send_queue SET status = 'sent', sent_at = now() WHERE status = 'queued'")
        world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - interval '30 seconds' WHERE status = 'sent'")
    story = [record.message for record in caplog.records if record.message.startswith(("sending", "nothing"))]
    assert [re.sub(" used=.*", "", line) for line in story] == [
        "nothing to send",
        "sending",
        "sending is held: limit reached limit=max_per_minute",
        "sending is held: limit reached limit=max_per_hour",
    ]
