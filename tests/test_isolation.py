"""Check that a test finds nothing of the previous test in its databases, as conftest.py promises."""

import contextlib
from typing import Any

import psycopg2
import pytest
from testing import Clone

import db

HARM = {
    "rows": "INSERT INTO clients (name) VALUES ('somebody')",
    "deleted rows": "DELETE FROM outreach_settings",
    "changed rows": "UPDATE outreach_settings SET paused = true",
    "statistics": "INSERT INTO clients (name) VALUES ('somebody'); ANALYZE clients",
    "statistics of an empty table": "ANALYZE clients",
    "a renamed column": "ALTER TABLE clients RENAME name TO title",
    "another default": "ALTER TABLE outreach_batches ALTER status SET DEFAULT 'sent'",
    "a lost index": "DROP INDEX outreach_batch_items_pending",
    "a lost table": "DROP TABLE outreach_batch_items",
    "a renamed constraint": "ALTER TABLE outreach_settings RENAME CONSTRAINT outreach_settings_is_one_row TO one",
    "a trigger": "CREATE TRIGGER lazy BEFORE UPDATE ON outreach_batches FOR EACH ROW"
    " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "a function": "CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "a type": "CREATE TYPE mood AS ENUM ('good', 'bad')",
    "a schema": "CREATE SCHEMA more",
    "a renamed schema": "ALTER SCHEMA public RENAME TO elsewhere",
    "a setting of the database": "DO $$ BEGIN EXECUTE format("
    "'ALTER DATABASE %I SET work_mem = ''1MB''', current_database()); END $$",
    "a setting of the session": "SET work_mem = '1MB'",
    "an advisory lock": "SELECT pg_advisory_lock(1)",
    "a transaction": "BEGIN; LOCK TABLE clients",
    "a failed transaction": "BEGIN; DO $$ BEGIN RAISE 'failed'; END $$",
}
CATALOGUES = ("attribute", "attrdef", "constraint", "trigger", "proc", "type", "namespace")


@pytest.fixture
def clone(clones: dict[db.DatabaseName, Clone]) -> Clone:
    clones["quinn"].reset()
    return clones["quinn"]


def seen(clone: Clone) -> list[Any]:
    """Return all that a test can notice."""
    advisory_locks = """
        SELECT 1 FROM pg_locks JOIN pg_database AS d ON d.oid = database
         WHERE locktype = 'advisory' AND datname = current_database()
    """
    with contextlib.closing(db.connect(clone.url)) as new_session:
        return [
            *(db.query(clone.conn, f"TABLE {table}") for table in ("clients", "outreach_settings")),
            *(db.query(session, "SHOW work_mem") for session in (clone.conn, new_session)),
            # The namespaces of temporary tables stay, for the next session that needs one.
            *(
                db.query(
                    clone.conn, f"SELECT c::text FROM pg_{name} AS c WHERE c::text !~ 'pg_(toast_)?temp_' ORDER BY 1"
                )
                for name in CATALOGUES
            ),
            db.query(clone.conn, "SELECT relname, relpages, reltuples FROM pg_class ORDER BY oid"),
            db.query(clone.conn, "SELECT tablename FROM pg_stats ORDER BY tablename"),
            db.query(clone.conn, advisory_locks),
        ]


@pytest.mark.parametrize("harm", HARM)
def test_reset_removes_what_the_last_test_left(clone: Clone, harm: str) -> None:
    before = seen(clone)
    with contextlib.suppress(psycopg2.errors.RaiseException):
        db.query(clone.conn, HARM[harm])
    clone.reset()
    assert seen(clone) == before


def test_reset_ends_open_sessions(clone: Clone) -> None:
    before = seen(clone)
    with contextlib.closing(db.connect(clone.url)) as left_open:
        for harm in ("an advisory lock", "a transaction"):
            db.query(left_open, HARM[harm])
        first = clone.url
        clone.reset()
        assert clone.url == first
        assert seen(clone) == before
        with pytest.raises(psycopg2.OperationalError):
            db.query(left_open, "SELECT 1")


def test_clone_is_reused_unless_catalogue_changed(clone: Clone) -> None:
    first = clone.url
    db.query(clone.conn, HARM["rows"])
    clone.reset()
    assert clone.url == first
    db.query(clone.conn, HARM["a renamed column"])
    clone.reset()
    assert clone.url != first


@pytest.mark.new_clone
def test_new_clone_has_statistics_of_new_installation(databases: Any) -> None:
    sql = "SELECT DISTINCT relpages, reltuples FROM pg_class WHERE relkind = 'i' AND relname LIKE 'outreach%'"
    assert db.query(databases.quinn, sql) == [(1, 0)]
