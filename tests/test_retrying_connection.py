"""Check db.RetryingConnection: lost connections, the class of each error, and prepared statements."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest
import requests
from helpers import run_sql
from testing import Databases, TestData

import db

KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


def test_ended_connection_is_replaced(databases: Databases) -> None:
    database = db.RetryingConnection(databases.icloud_url)
    for _ in range(3):
        [(first,)] = database.query("SELECT pg_backend_pid()")
        db.query(databases.icloud, KILL)
        [(second,)] = database.query("SELECT pg_backend_pid()")
        assert first != second


def test_database_is_unavailable_until_back(databases: Databases, postgres: str) -> None:
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


def test_refused_connection_is_unavailable() -> None:
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


def test_error_class_follows_sqlstate(databases: Databases) -> None:
    for sql, error in FAULTS.items():
        database = db.RetryingConnection(databases.icloud_url)
        for _ in range(2):  # on a new connection, and on one that was used
            with pytest.raises(error):
                database.query(sql)
            database.query("SET statement_timeout = 0; SELECT 1")


def test_unavailable_error_has_sqlstate(databases: Databases) -> None:
    with pytest.raises(db.DatabaseUnavailable, match="55P03"):
        db.RetryingConnection(databases.icloud_url).query("DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$")
    with pytest.raises(db.DatabaseUnavailable, match="no connection"):
        db.RetryingConnection("postgresql://127.0.0.1:1/nowhere").query("SELECT 1")


def test_unencodable_value_is_a_statement_error(databases: Databases) -> None:
    with pytest.raises(psycopg2.ProgrammingError, match="can't adapt"):
        db.RetryingConnection(databases.icloud_url).query("SELECT %(value)s", {"value": object()})


def test_each_thread_has_its_own_connection(databases: Databases) -> None:
    database = db.RetryingConnection(databases.icloud_url)
    own = database.query("SELECT pg_backend_pid()")
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(database.query, "SELECT pg_backend_pid()").result() != own
    assert database.query("SELECT pg_backend_pid()") == own


def test_request_succeeds_after_column_type_change(world: TestData, base_url: str) -> None:
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
def test_outdated_prepared_statement_is_prepared_again(empty_database: str, change: str) -> None:
    run_sql(
        empty_database, "CREATE TABLE thing (key UUID, name TEXT); INSERT INTO thing VALUES (gen_random_uuid(), 'it')"
    )
    [(key,)] = run_sql(empty_database, "SELECT key::text FROM thing")
    sql, params = "SELECT name FROM thing WHERE key = %(key)s", {"key": key}
    database = db.RetryingConnection(empty_database)
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
