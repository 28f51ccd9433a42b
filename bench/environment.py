"""Run the benchmark's PostgreSQL, its databases, and the processes of the product and its peers.

Used by the *_rows.py files. All files are in one temporary directory. PostgreSQL has its default durability. Its
autovacuum is off, because its runs would change a measurement: each group updates the statistics itself. Example:

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

# `exec` keeps the shell's process id, because LISTEN_PID must be the server's.
WITH_SOCKET = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
START_TIMEOUT = 30  # seconds
STOP_TIMEOUT = 15  # seconds
WAIT_TIMEOUT = 60  # seconds
PRODUCT = ["send_queue_server.py"]
OUTREACH_SERVER = ["outreach_server.py"]
CONSTANT = ["bench/peers.py", "constant"]
STARLETTE = ["bench/peers.py", "starlette"]
LIMIT = ["bench/peers.py", "limit"]
BODY = "Hello, are you free on Friday?"
Query = list[tuple[Any, ...]]


class Size(NamedTuple):
    """The sizes of the measurements."""

    seconds: float  # of one measurement
    rounds: int  # of alternating measurements, A B A B
    history: int  # finished rows of the queue, or sent items
    short_history: int
    waiting: int  # rows that wait for another device
    batches: int
    items: int  # of each batch
    messages: int  # sent one after another
    results: int  # of one sync
    sends: int  # in one tick
    clients: int  # of a search
    recipients: int  # of a draft, and lines of an imported file
    memory_seconds: float
    fsync: str  # PostgreSQL's setting


FULL = Size(0.5, 5, 1_000_000, 10_000, 50_000, 1000, 1000, 300, 10_000, 1000, 1_000_000, 100_000, 10, "on")
QUICK = Size(0.02, 1, 2000, 200, 200, 20, 10, 5, 50, 5, 2000, 500, 0.1, "off")


class Server:
    """Run the processes of one contender. They inherit one listening socket as descriptor 3."""

    port: int

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], processes: int, environment: Mapping[str, str], directory: Path) -> None:
        """Start the processes; return when each has sent READY=1."""
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
        # Filling a table takes longer than the default statement_timeout.
        self.conn = product.connect(psycopg2.extensions.make_dsn(url, options="-c statement_timeout=0"))

    def run(self, sql: str, **params: Any) -> Query:
        return product.query(self.conn, sql, params or None)

    def fill(self, sql: str, **params: Any) -> None:
        """Run a statement that inserts many rows. Skip the checks of foreign keys, which take most of the time."""
        self.run("SET session_replication_role = replica")
        self.run(sql, **params)
        self.run("RESET session_replication_role")

    def settle(self) -> None:
        """Update the statistics and write a checkpoint, so that no checkpoint falls into a measurement."""
        self.run("VACUUM ANALYZE")
        self.run("CHECKPOINT")

    def device(self, name: str) -> str:
        """Return the id of the device whose token is its name; insert it, with a digest, if there is none."""
        sql = """
            INSERT INTO icloud.devices (name, token) VALUES (%(name)s, %(token)s)
            ON CONFLICT (token) DO UPDATE SET name = EXCLUDED.name
            RETURNING id
        """
        return str(self.run(sql, name=name, token=product.hash_token(name))[0][0])

    def collected(self, device: str, count: int) -> list[str]:
        """Insert `count` rows that the device has collected; return their ids."""
        sql = """
            INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, collected_at)
            SELECT %(device)s, '+14155550123', %(body)s, gen_random_uuid(), now()
              FROM generate_series(1, %(count)s)
            RETURNING id
        """
        return [row_id for (row_id,) in self.run(sql, device=device, body=BODY, count=count)]

    def waiting(self, device: str, count: int) -> None:
        """Insert `count` rows that the device has not collected."""
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
        """Return how often commits waited for the disk. Only sessions that have ended count."""
        sql = "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal' AND backend_type = 'client backend'"
        return int(product.query(self.conn, sql)[0][0])

    def database(self, name: str) -> Database:
        """Create a database with the product's tables."""
        product.query(self.conn, f"CREATE DATABASE {name}")
        url = self.url_of(name)
        product.migrate(url)
        return Database(url)

    def url_of(self, name: str) -> str:
        return urlsplit(self.url)._replace(path=f"/{name}").geturl()

    def copy(self, name: str, template: str, fill: "Callable[[Bench, Database], None]") -> Database:
        """Copy the database `template`. At first use, create it, fill it and update its statistics."""
        if template not in self.templates:
            self.templates.add(template)
            with contextlib.closing(self.database(template)) as database:
                fill(self, database)
                database.settle()
        product.query(self.conn, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return Database(self.url_of(name))

    @contextlib.contextmanager
    def server(self, command: Sequence[str], database_url: str, processes: int = 1) -> Iterator[Server]:
        """Run a contender's processes with a database."""
        server = Server()
        try:
            server.start(command, processes, environment_of(database_url), self.directory)
            yield server
        finally:
            server.stop()

    @contextlib.contextmanager
    def dispatcher(self, database: Database, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a dispatcher process with a database."""
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
    """Return the environment variables of a script that uses one database for both parts."""
    return {
        "QUINN_DB_URL": database_url,
        "QUINN_ICLOUD_DB_URL": database_url,
        "MAC_SYNC_SERVICE_TOKEN": product.SERVICE_TOKEN,
        "OUTREACH_OWNER_TOKEN": product.OWNER_TOKEN,
    }


def resident(pid: int) -> float:
    """Return a process' resident memory in MB, as Linux counts it."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Call `done` every 10 ms until it is true. Raises RuntimeError with `what` after WAIT_TIMEOUT."""
    end = time.monotonic() + WAIT_TIMEOUT
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"not seen within {WAIT_TIMEOUT} s: {what}")
        time.sleep(0.01)
