"""What the benchmark measures on: a PostgreSQL of its own, databases in it, and the contenders' processes.

Used by the files of rows. Everything is in one temporary directory. PostgreSQL keeps its default durability. Its
autovacuum is off, so that no measurement depends on when it runs: each group says which statistics it wants. Example:

    with Bench(QUICK, directory) as bench, bench.server(PRODUCT, bench.database("polls")) as server: ...
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import product
import psycopg2.extensions
from load import Load

# The shell's process id becomes the server's, as LISTEN_PID demands.
WITH_SOCKET = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
START_TIMEOUT = 30  # seconds
STOP_TIMEOUT = 15  # seconds
WAIT_TIMEOUT = 60  # seconds
PRODUCT = ["send_queue_server.py"]
CONSTANT = ["bench/peers.py", "constant"]
STARLETTE = ["bench/peers.py", "starlette"]
LIMIT = ["bench/peers.py", "limit"]
BODY = "Hello, are you free on Friday?"
Query = list[tuple[Any, ...]]


class Size(NamedTuple):
    """How much is measured."""

    seconds: float  # of one measurement
    rounds: int  # of A B A B
    history: int  # finished rows of the queue, or sent items
    short_history: int
    waiting: int  # rows that wait for another device
    batches: int
    items: int  # of each batch
    messages: int  # one after another
    results: int  # that come in at once
    sends: int  # in one tick
    memory_seconds: float
    fsync: str  # PostgreSQL's setting


FULL = Size(0.5, 5, 1_000_000, 10_000, 50_000, 1000, 1000, 300, 10_000, 1000, 10, "on")
QUICK = Size(0.02, 1, 2000, 200, 200, 20, 10, 5, 50, 5, 0.1, "off")


class Server:
    """The processes of one contender on one listening socket, which each of them inherits as descriptor 3."""

    port: int

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], processes: int, environment: Mapping[str, str], directory: Path) -> None:
        """Start the processes, and return when each has said, as to systemd, that it is ready."""
        address = directory / "notify"
        with (
            contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notifications,
            socket.create_server(("127.0.0.1", 0), backlog=1024) as listening,
            (directory / "servers.log").open("ab") as log,
        ):
            notifications.settimeout(START_TIMEOUT)
            notifications.bind(str(address))
            self.port = listening.getsockname()[1]
            for _ in range(processes):
                process = subprocess.Popen(
                    ["/bin/sh", "-c", WITH_SOCKET, "sh", sys.executable, *command],
                    cwd=product.ROOT, env={**os.environ, **environment, "NOTIFY_SOCKET": str(address)},
                    stdin=listening.fileno(), stdout=log, stderr=log,
                )  # fmt: skip
                self.processes.append(process)
            for _ in self.processes:
                while b"READY=1" not in notifications.recv(1024):
                    pass
        address.unlink()

    def resident(self) -> float:
        """Return the largest process' resident memory in MB."""
        return max(resident(process.pid) for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Database:
    """One database of the run."""

    def __init__(self, url: str) -> None:
        self.url = url
        # The benchmark's own statements fill tables, which may take longer than a statement of the product may.
        self.conn = product.connect(psycopg2.extensions.make_dsn(url, options="-c statement_timeout=0"))

    def run(self, sql: str, **params: Any) -> Query:
        return product.query(self.conn, sql, params or None)

    def fill(self, sql: str, **params: Any) -> None:
        """Run a statement that inserts very many rows, without a look at their foreign keys, which take most time."""
        self.run("SET session_replication_role = replica")
        self.run(sql, **params)
        self.run("RESET session_replication_role")

    def settle(self) -> None:
        """Do now what PostgreSQL would otherwise do during a measurement."""
        self.run("VACUUM ANALYZE")
        self.run("CHECKPOINT")

    def device(self, name: str) -> str:
        """Return the id of the device whose token is its name; make it if there is none. Stored as add-device does."""
        sql = """
            INSERT INTO icloud.devices (name, token) VALUES (%(name)s, %(token)s)
            ON CONFLICT (token) DO UPDATE SET name = EXCLUDED.name
            RETURNING id
        """
        return str(self.run(sql, name=name, token=product.hash_token(name))[0][0])

    def collected(self, device: str, count: int) -> list[str]:
        """Make `count` rows that the device has collected; return their ids."""
        sql = """
            INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, collected_at)
            SELECT %(device)s, '+14155550123', %(body)s, gen_random_uuid(), now()
              FROM generate_series(1, %(count)s)
            RETURNING id
        """
        return [row_id for (row_id,) in self.run(sql, device=device, body=BODY, count=count)]

    def waiting(self, device: str, count: int) -> None:
        """Make `count` rows that wait for the device, uncollected."""
        sql = """
            INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
            SELECT %(device)s, '+14155550123', %(body)s, gen_random_uuid() FROM generate_series(1, %(count)s)
        """
        self.run(sql, device=device, body=BODY, count=count)

    def close(self) -> None:
        self.conn.close()


class Bench:
    """The PostgreSQL of the run, its databases, the load generator, and the directory of the logs."""

    def __init__(self, size: Size, directory: Path) -> None:
        self.size = size
        self.directory = directory
        self.load = Load(processes=2)
        self.url, self.stop_postgres = product.start_postgres(directory / "postgres")
        self.conn = product.connect(psycopg2.extensions.make_dsn(self.url, options="-c statement_timeout=0"))
        self.templates: set[str] = set()
        product.query(self.conn, "ALTER SYSTEM SET autovacuum = off")
        product.query(self.conn, f"ALTER SYSTEM SET fsync = {size.fsync}")
        product.query(self.conn, "SELECT pg_reload_conf()")

    def postgres_version(self) -> str:
        return str(product.query(self.conn, "SELECT split_part(version(), ' ', 2)")[0][0])

    def wal_syncs(self) -> int:
        """Return how often sessions that have ended waited for the disk at a commit."""
        sql = "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal' AND backend_type = 'client backend'"
        return int(product.query(self.conn, sql)[0][0])

    def database(self, name: str) -> Database:
        """Make a database with the product's tables."""
        product.query(self.conn, f"CREATE DATABASE {name}")
        url = self.url_of(name)
        product.migrate(url)
        return Database(url)

    def url_of(self, name: str) -> str:
        return urlsplit(self.url)._replace(path=f"/{name}").geturl()

    def copy(self, name: str, template: str, fill: "Callable[[Bench, Database], None]") -> Database:
        """Make a database as a copy of `template`, which is made and filled, with fresh statistics, at first use."""
        if template not in self.templates:
            self.templates.add(template)
            with contextlib.closing(self.database(template)) as database:
                fill(self, database)
                database.settle()
        product.query(self.conn, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return Database(self.url_of(name))

    @contextlib.contextmanager
    def server(self, command: Sequence[str], database_url: str, processes: int = 1) -> Iterator[Server]:
        """Run a contender's processes over a database."""
        server = Server()
        try:
            server.start(command, processes, environment_of(database_url), self.directory)
            yield server
        finally:
            server.stop()

    @contextlib.contextmanager
    def dispatcher(self, database: Database, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a dispatcher process over a database."""
        environment = {**os.environ, **environment_of(database.url), **settings}
        with (self.directory / "dispatcher.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "dispatcher.py", *arguments],
                cwd=product.ROOT, env=environment, stdout=log, stderr=log,
            )  # fmt: skip
            try:
                yield process
            finally:
                process.terminate()
                process.wait(STOP_TIMEOUT)

    def close(self) -> None:
        self.load.close()
        self.conn.close()
        self.stop_postgres()


def environment_of(database_url: str) -> dict[str, str]:
    """Return the settings of a script of the product's over one database."""
    return {
        "QUINN_DB_URL": database_url,
        "QUINN_ICLOUD_DB_URL": database_url,
        "MAC_SYNC_SERVICE_TOKEN": product.SERVICE_TOKEN,
    }


def resident(pid: int) -> float:
    """Return a process' resident memory in MB, as Linux counts it."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Look again every 10 ms until `done` is true. Raises after a minute, naming what was waited for."""
    end = time.monotonic() + WAIT_TIMEOUT
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"within {WAIT_TIMEOUT} s not seen: {what}")
        time.sleep(0.01)
