"""The benchmark: the product and its limits in one run, interleaved, on this machine and the embedded PostgreSQL.

Run by `make bench`. Makes a PostgreSQL of its own, with its default durability, in a temporary directory, and leaves
nothing but the table it prints and, with --svg, a drawing of it. Example:

    python demo/bench.py --quick
"""

import argparse
import asyncio
import contextlib
import functools
import html
import json
import logging
import math
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psycopg2.extensions

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_load
import bench_peers
from bench_load import Load, request

import db
import dispatcher
import send_queue_server

ROOT = Path(__file__).parent.parent
CORES = os.cpu_count() or 1
CONNECTIONS = 16
DEVICES = 50  # that poll once a second
TOKEN = bench_peers.SERVICE_TOKEN
# Rows that a load may use up in a second: above what any contender does, for a result can be given only once.
FASTEST = 12_000
MEMORY_REQUESTS = 200  # to each endpoint in a round of the load under which memory is watched


class Size(NamedTuple):
    """How much is measured."""

    seconds: float  # of one measurement
    rounds: int  # of A B A B
    history: int  # finished rows, or sent items
    short_history: int
    batches: int
    items: int  # of each batch
    messages: int  # one after another
    results: int  # that come in at once
    sends: int  # in one tick
    memory_seconds: float


FULL = Size(2.0, 5, 1_000_000, 10_000, 1000, 1000, 500, 10_000, 1000, 600)
QUICK = Size(0.2, 1, 20_000, 200, 30, 30, 20, 500, 50, 1)


class Row(NamedTuple):
    """A line of the table. `good`: whether the target is met."""

    what: str
    ours: str
    other: str
    ratio: str
    target: str
    good: bool


# --- what is measured: servers and databases ----------------------------------------------------------


class Server:
    """Processes of one contender on one listening socket, each of which inherits it as descriptor 3."""

    def __init__(self, command: Sequence[str], processes: int, address: str, log: Path) -> None:
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = listening.getsockname()[1]
        environment = {
            **os.environ,
            "QUINN_ICLOUD_DB_URL": address,
            "QUINN_DB_URL": address,
            "MAC_SYNC_SERVICE_TOKEN": TOKEN,
        }
        # The shell's number becomes the script's, as LISTEN_PID demands.
        shell = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
        with log.open("ab") as stderr:
            self.processes = [
                subprocess.Popen(
                    ["/bin/sh", "-c", shell, "sh", sys.executable, *command],
                    cwd=ROOT, env=environment, stdin=listening.fileno(), stdout=stderr, stderr=stderr,
                )
                for _ in range(processes)
            ]  # fmt: skip
        listening.close()
        self.answer_once()

    def answer_once(self) -> None:
        """Wait for the first answer, whatever it is. The socket holds the connection until a process accepts it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request("GET", send_queue_server.PENDING, "nobody"))
            connection.recv(1024)

    def resident(self) -> float:
        """The largest process' resident memory in MB."""
        return max(resident(process.pid) for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Bench:
    """The PostgreSQL of the run, its databases, the clients, and the directory of the logs."""

    def __init__(self, size: Size, directory: Path) -> None:
        self.size = size
        self.directory = directory
        self.server_url = db.embedded(directory / "postgres")
        self.load = Load(processes=2)

    def database(self, name: str) -> "Database":
        """A new database with both parts."""
        with contextlib.closing(db.connect(self.server_url)) as conn:
            db.query(conn, f"CREATE DATABASE {name}")
        address = urlsplit(self.server_url)._replace(path=f"/{name}").geturl()
        for part in db.URL_VARIABLES:
            db.migrate(address, part)
        return Database(address)

    @contextlib.contextmanager
    def server(self, command: Sequence[str], database: "Database", processes: int = 1) -> Iterator[Server]:
        server = Server(command, processes, database.url, self.directory / "servers.log")
        try:
            yield server
        finally:
            server.stop()


class Database:
    """One database and what the measurements put into it."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Filling it may take longer than a statement of the product's may.
        slow = psycopg2.extensions.make_dsn(url, options="-c statement_timeout=0")
        self.conn = db.connect(slow)

    def run(self, sql: str, **params: Any) -> list[db.Row]:
        return db.query(self.conn, sql, params or None)

    def device(self, token: str, waiting: int = 0) -> str:
        """A device, its token stored as add-device stores it, with `waiting` messages; returns its id."""
        made = """
            INSERT INTO icloud.devices (name, token) VALUES (%(name)s, %(digest)s)
            ON CONFLICT (token) DO UPDATE SET name = EXCLUDED.name RETURNING id
        """
        [(device_id,)] = self.run(made, name=token, digest=db.hash_token(token))
        there = self.run("SELECT FROM icloud.send_queue WHERE device_id = %(device)s LIMIT 1", device=device_id)
        if waiting and not there:
            self.collected(device_id, waiting)
        return str(device_id)

    def collected(self, device_id: str, count: int) -> list[str]:
        """The ids of `count` new rows that the device has collected."""
        sql = """
            INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, collected_at)
            SELECT %(device)s, '+14155550123', 'Hello, are you free on Friday?', gen_random_uuid(), now()
              FROM generate_series(1, %(count)s)
            RETURNING id
        """
        return [row_id for (row_id,) in self.run(sql, device=device_id, count=count)]

    def settle(self) -> None:
        """What PostgreSQL would otherwise do in the middle of a measurement."""
        self.run("VACUUM ANALYZE")
        self.run("CHECKPOINT")


OURS = ["send_queue_server.py"]
CONSTANT = ["demo/bench_peers.py", "constant"]
STARLETTE = ["demo/bench_peers.py", "starlette"]
ENDPOINTS = ("poll, nothing waiting", "poll, 10 waiting", "enqueue", "result")
BODY = "Hello, are you free on Friday?"


def requests_for(endpoint: str, database: Database, count: int) -> list[bytes]:
    """What one measurement of an endpoint sends: one request for ever, or each of `count` once."""
    if endpoint == "poll, nothing waiting":
        database.device("idle")
        return [request("GET", send_queue_server.PENDING, "idle")]
    if endpoint == "poll, 10 waiting":
        database.device("ten", waiting=10)
        return [request("GET", send_queue_server.PENDING, "ten")]
    if endpoint == "enqueue":
        device = database.device("enqueue")
        return [request("POST", send_queue_server.ENQUEUE, TOKEN, message(device)) for _ in range(count)]
    ids = database.collected(database.device("result"), count)
    return [request("POST", result_path(row_id), "result", b'{"status":"sent"}') for row_id in ids]


def result_path(row_id: str) -> str:
    return send_queue_server.RESULT.replace("<queue_id>", row_id)


def message(device_id: str) -> bytes:
    """The body of an enqueue."""
    content = {"batchItemId": str(uuid.uuid4()), "deviceId": device_id, "toHandle": "+14155550123", "body": BODY}
    return json.dumps(content).encode()


def interleaved(rounds: int, contenders: Sequence[Callable[[], float]]) -> list[float]:
    """The median of each contender's figures, taken in turns: A B A B."""
    figures: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, taken in zip(contenders, figures, strict=True):
            taken.append(contender())
    return [statistics.median(taken) for taken in figures]


def rate(bench: Bench, server: Server, endpoint: str, database: Database) -> float:
    """Requests a second of one measurement. Raises when an answer was not a 200."""
    wanted = requests_for(endpoint, database, int(FASTEST * bench.size.seconds))
    sample = bench.load.run(server.port, wanted, CONNECTIONS, bench.size.seconds)
    if sample.errors:
        raise RuntimeError(f"{sample.errors} answers to {endpoint} were not 200")
    return sample.rate


def compared(what: str, ours: float, other: float, least: float, unit: str = "/s") -> Row:
    """A row for two rates."""
    ratio = ours / other
    return Row(what, f"{ours:,.0f}{unit}", f"{other:,.0f}{unit}", f"{ratio:.2f}", f">= {least:.2f}", ratio >= least)


# --- the table's rows ---------------------------------------------------------------------------------


def one_process(bench: Bench) -> Iterator[Row]:
    """Each endpoint against a constant answer, a process each."""
    database = bench.database("one_process")
    with bench.server(OURS, database) as ours, bench.server(CONSTANT, database) as constant:
        for endpoint in ENDPOINTS:
            mine, other = interleaved(
                bench.size.rounds,
                [
                    functools.partial(rate, bench, ours, endpoint, database),
                    functools.partial(rate, bench, constant, endpoint, database),
                ],
            )
            least = 0.5 if endpoint == "result" else 0.55
            yield compared(f"{endpoint}; 1 process; other: constant answer", mine, other, least)


def all_cores(bench: Bench) -> Iterator[Row]:
    """Each endpoint against the asynchronous peer, a process for each core; and ours with 1, 2 and 4."""
    database = bench.database("all_cores")
    with bench.server(OURS, database, CORES) as ours, bench.server(STARLETTE, database, CORES) as peer:
        for endpoint in ENDPOINTS:
            mine, other = interleaved(
                bench.size.rounds,
                [
                    functools.partial(rate, bench, ours, endpoint, database),
                    functools.partial(rate, bench, peer, endpoint, database),
                ],
            )
            yield compared(f"{endpoint}; {CORES} processes; other: starlette", mine, other, 0.95)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(bench.server(OURS, database, number)) for number in (1, 2, 4)]
        for endpoint in ENDPOINTS[::2]:
            measure = [functools.partial(rate, bench, server, endpoint, database) for server in servers]
            one, two, four = interleaved(bench.size.rounds, measure)
            steps = f"{two:,.0f} and {four:,.0f}/s"
            yield Row(
                f"{endpoint}; 2 and 4 processes; other: 1", steps, f"{one:,.0f}/s", f"{four / one:.2f}", "-", True
            )


def tail_of_polls(bench: Bench) -> Iterator[Row]:
    """The slowest polls of devices that poll once a second each."""
    database = bench.database("tail")
    polls = []
    for number in range(DEVICES):
        database.device(f"device-{number}")
        polls.append(request("GET", send_queue_server.PENDING, f"device-{number}"))
    with bench.server(OURS, database) as server:
        sample = bench.load.devices(server.port, polls, max(2.0, bench.size.seconds * 10))
    cuts = statistics.quantiles(sample.latencies, n=100)
    p50, p99 = 1000 * cuts[49], 1000 * cuts[98]
    what = f"p99 of a poll, {DEVICES} devices once a second; other: p50"
    yield Row(what, f"{p99:.1f} ms", f"{p50:.1f} ms", f"{p99 / p50:.1f}", "< 10", p99 < 10 * p50)


def history(bench: Bench) -> Iterator[Row]:
    """Each endpoint over a long history of finished rows, against none; and the server's memory after that."""
    finished = """
        INSERT INTO icloud.send_queue
               (device_id, to_handle, body, batch_item_id, created_at, collected_at, sent_at, status)
        SELECT %(device)s, '+14155550123', %(body)s, gen_random_uuid(), moment, moment, moment, 'sent'
          FROM (SELECT now() - number * interval '30 seconds' FROM generate_series(1, %(count)s) AS number)
               AS past (moment)
    """
    old, new = bench.database("queue_old"), bench.database("queue_new")
    old.run(finished, device=old.device("idle"), body=BODY, count=bench.size.history)
    old.settle()
    with bench.server(OURS, old) as long, bench.server(OURS, new) as short:
        before = long.resident()
        for endpoint in ENDPOINTS:
            mine, other = interleaved(
                bench.size.rounds,
                [
                    functools.partial(rate, bench, long, endpoint, old),
                    functools.partial(rate, bench, short, endpoint, new),
                ],
            )
            what = f"{endpoint}; {bench.size.history:,} finished rows; other: none"
            row = compared(what, mine, other, 1 / 1.2)
            yield row
        yield from memory_under_load(bench, long, old, before)


def memory_under_load(bench: Bench, server: Server, database: Database, before: float) -> Iterator[Row]:
    """The server's resident memory while polls, enqueues and results go on, some hundred of each a second."""
    after_start = server.resident()
    end = time.monotonic() + bench.size.memory_seconds
    requests = 0
    while time.monotonic() < end:
        pause = time.monotonic() + 1
        for endpoint in ENDPOINTS:
            wanted = requests_for(endpoint, database, MEMORY_REQUESTS)
            wanted = wanted * (MEMORY_REQUESTS // len(wanted))
            requests += len(bench.load.run(server.port, wanted, CONNECTIONS, seconds=5).latencies)
        time.sleep(max(0.0, pause - time.monotonic()))
    after = server.resident()
    minutes = bench.size.memory_seconds / 60
    yield Row("server memory, after the history; other: idle", f"{after_start:.0f} MB", f"{before:.0f} MB", "-",
              "< 60 MB", after_start < 60)  # fmt: skip
    what = f"server memory, {minutes:.0f} min and {requests:,} requests later; other: before"
    growth = after / after_start
    yield Row(what, f"{after:.1f} MB", f"{after_start:.1f} MB", f"{growth:.2f}", "<= 1.02", growth <= 1.02)


class Spy:
    """Counts and times the statements of the dispatcher, which all go through db.query."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.seconds = 0.0

    def __enter__(self) -> "Spy":
        self.query, db.query = db.query, self.timed
        return self

    def __exit__(self, *_: object) -> None:
        db.query = self.query

    def timed(self, conn: Any, sql: str, params: db.Params | None = None) -> list[db.Row]:
        start = time.perf_counter()
        try:
            return self.query(conn, sql, params)
        finally:
            self.seconds += time.perf_counter() - start
            self.statements.append(sql)


class Accepting:
    """Stands in for the dispatcher's MacSync where only SQL is measured: accepts every message at once."""

    def enqueue(self, *_: object) -> str:
        return str(uuid.uuid4())


class Outreach:
    """A database with batches, and the dispatcher's two connections to it."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.database = bench.database(name)
        self.database.device("mac-mini")
        self.quinn, self.icloud = db.connect(self.database.url), db.connect(self.database.url)
        self.settings(max_per_minute=10, max_per_hour=100, max_per_day=1000, min_gap_seconds=30)

    def settings(self, **values: int | None) -> None:
        """Set the limits, and take quiet hours away."""
        sql = """
            UPDATE outreach_settings
               SET quiet_hours_start = NULL, quiet_hours_end = NULL, max_per_minute = %(max_per_minute)s,
                   max_per_hour = %(max_per_hour)s, max_per_day = %(max_per_day)s,
                   min_gap_seconds = %(min_gap_seconds)s
        """
        self.database.run(sql, **values)

    def batches(self, batches: int, items: int) -> None:
        """Sending batches of pending items to the same clients."""
        clients = "INSERT INTO clients SELECT md5('client' || n)::uuid, 'A' FROM generate_series(1, %(items)s) AS n"
        handles = """
            INSERT INTO contact_relationships
            SELECT md5('client' || n)::uuid, '+1555' || lpad(n::text, 7, '0'), true
              FROM generate_series(1, %(items)s) AS n
        """
        made = """
            WITH batch AS (
                INSERT INTO outreach_batches (template, status)
                SELECT 'hello', 'sending' FROM generate_series(1, %(batches)s) RETURNING id
            )
            INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
            SELECT batch.id, md5('client' || n)::uuid, %(body)s FROM batch, generate_series(1, %(items)s) AS n
        """
        for sql in (clients, handles, made):
            self.database.run(sql, batches=batches, items=items, body=BODY)
        self.database.settle()

    def sent(self, count: int) -> None:
        """A history of `count` sent items, one every ten minutes, in batches of a thousand."""
        sql = """
            WITH batch AS (
                INSERT INTO outreach_batches (template, status)
                SELECT 'hello', 'sent' FROM generate_series(1, CEIL(%(count)s / 1000.0)::int) RETURNING id
            ), numbered AS (
                SELECT id, row_number() OVER () - 1 AS number FROM batch
            )
            INSERT INTO outreach_batch_items
                   (batch_id, client_id, rendered_body, status, sent_at, send_queue_id, device_id)
            SELECT numbered.id, md5('client' || n %% 1000)::uuid, %(body)s, 'sent',
                   now() - (number * 1000 + n) * interval '10 minutes', gen_random_uuid()::text, device.id
              FROM numbered, generate_series(1, LEAST(1000, %(count)s)) AS n, icloud.devices AS device
        """
        self.database.run(sql, count=count, body=BODY)
        self.database.settle()

    def results(self, count: int) -> None:
        """`count` more queued items in a batch, each with a queue row that was sent."""
        sql = """
            WITH batch AS (
                INSERT INTO outreach_batches (template, status) VALUES ('hello', 'sending') RETURNING id
            ), message AS (
                INSERT INTO icloud.send_queue
                       (device_id, to_handle, body, batch_item_id, collected_at, sent_at, status)
                SELECT device.id, '+14155550123', %(body)s, gen_random_uuid(), now(), now(), 'sent'
                  FROM icloud.devices AS device, generate_series(1, %(count)s)
                RETURNING id, batch_item_id, device_id
            )
            INSERT INTO outreach_batch_items
                   (id, batch_id, client_id, rendered_body, status, send_queue_id, device_id, queued_at)
            SELECT message.batch_item_id, batch.id, gen_random_uuid(), %(body)s, 'queued', message.id::text,
                   message.device_id, now()
              FROM batch, message
        """
        self.database.run(sql, count=count, body=BODY)

    def again(self) -> None:
        """Make what a tick has queued pending once more."""
        sql = """
            UPDATE outreach_batch_items SET status = 'pending', send_queue_id = NULL, queued_at = NULL
             WHERE status = 'queued'
        """
        self.database.run(sql)

    def tick(self) -> Spy:
        """Run the dispatch job; its statements."""
        with Spy() as spy:
            dispatcher.dispatch(self.quinn, self.icloud, Accepting())  # type: ignore[arg-type]
        self.again()
        return spy

    def tick_by_batch(self) -> Spy:
        """Run its counterpart that asks batch by batch."""
        with Spy() as spy:
            bench_peers.tick_by_batch(self.quinn, self.icloud, Accepting().enqueue)
        self.again()
        return spy

    def sync(self) -> Spy:
        """Run the sync job."""
        with Spy() as spy:
            dispatcher.sync(self.quinn, self.icloud)
        return spy


def ticks(bench: Bench) -> Iterator[Row]:
    """A tick over many batches against the same rules batch by batch; and its number of statements."""
    size = bench.size
    many, few = Outreach(bench, "many"), Outreach(bench, "few")
    many.batches(size.batches, size.items)
    few.batches(10, 10)
    mine, other = interleaved(size.rounds, [lambda: many.tick().seconds, lambda: many.tick_by_batch().seconds])
    what = f"SQL of a tick, {size.batches:,} batches x {size.items:,} items; other: queries per batch"
    ratio = other / mine
    yield Row(what, f"{1000 * mine:.1f} ms", f"{1000 * other:.0f} ms", f"{ratio:.0f}x", ">= 50x", ratio >= 50)
    count, count_few = len(many.tick().statements), len(few.tick().statements)
    what = f"statements of a tick, {size.batches:,} batches; other: 10 batches"
    yield Row(what, str(count), str(count_few), f"{count / count_few:.2f}", "1.00", count == count_few)


def past(bench: Bench) -> Iterator[Row]:
    """A tick and a sync over a long history of sent items, against a short one."""
    size = bench.size
    old, new = Outreach(bench, "items_old"), Outreach(bench, "items_new")
    old.sent(size.history)
    new.sent(size.short_history)
    for outreach in (old, new):
        outreach.batches(10, 100)
    for name, job in (("tick", Outreach.tick), ("sync of 10 results", with_results)):

        def seconds(outreach: Outreach, job: Callable[[Outreach], Spy] = job) -> float:
            return job(outreach).seconds

        contenders = [functools.partial(seconds, old), functools.partial(seconds, new)]
        mine, other = interleaved(4 * size.rounds, contenders)
        what = f"SQL of a {name}, {size.history:,} sent items; other: {size.short_history:,}"
        yield Row(what, f"{1000 * mine:.1f} ms", f"{1000 * other:.1f} ms", f"{mine / other:.2f}", "<= 1.30",
                  mine <= 1.3 * other)  # fmt: skip
    new.results(size.results)
    start = time.perf_counter()
    spy = new.sync()
    spent = time.perf_counter() - start
    kinds = [sql.split()[0] for sql in spy.statements if "unnest(%(item_id)s" in sql or "COALESCE(sent_at" in sql]
    what = f"sync of {size.results:,} results at once; other: its reads and writes of them"
    once = kinds.count("SELECT") == kinds.count("UPDATE") == 1
    yield Row(what, f"{spent:.2f} s", f"{kinds.count('SELECT')} + {kinds.count('UPDATE')}", "-", "< 1 s, 1 + 1",
              once and spent < 1)  # fmt: skip
    old.settings(max_per_minute=0, max_per_hour=None, max_per_day=None, min_gap_seconds=None)
    idle = _dispatcher_memory(bench, old.database)
    old.results(size.results)
    busy = _dispatcher_memory(bench, old.database)
    what = f"dispatcher memory, {size.results:,} results over that history; other: none"
    yield Row(what, f"{busy:.0f} MB", f"{idle:.0f} MB", "-", "< 60 MB", max(idle, busy) < 60)


def _dispatcher_memory(bench: Bench, database: Database) -> float:
    """The resident memory of a dispatcher in MB, once it has brought all results home and gone on for two ticks."""
    with _dispatcher(bench, database, DISPATCH_INTERVAL_SECONDS="1") as process:
        for _ in range(3):
            [(synced,)] = database.run("SELECT last_synced_at FROM outreach_settings")
            moved = "SELECT last_synced_at IS DISTINCT FROM %(synced)s FROM outreach_settings"
            _wait(lambda: database.run(moved, synced=synced)[0][0])  # noqa: B023  # is called at once
        return resident(process.pid)


@contextlib.contextmanager
def _dispatcher(bench: Bench, database: Database, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A dispatcher process over the database."""
    urls = {"QUINN_DB_URL": database.url, "QUINN_ICLOUD_DB_URL": database.url, "MAC_SYNC_SERVICE_TOKEN": TOKEN}
    with (bench.directory / "dispatcher.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "dispatcher.py"], cwd=ROOT, env={**os.environ, **urls, **settings}, stderr=log
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(15)


def _wait(done: Callable[[], bool]) -> None:
    """Until it is true. Raises after a minute."""
    end = time.monotonic() + 60
    while not done():
        if time.monotonic() > end:
            raise RuntimeError("the dispatcher did not get on within a minute")
        time.sleep(0.1)


def with_results(outreach: Outreach) -> Spy:
    """A sync that finds ten results."""
    outreach.results(10)
    return outreach.sync()


def sends(bench: Bench) -> Iterator[Row]:
    """Many sends in one tick, over HTTP; and the dispatcher's memory, idle and with that behind it."""
    outreach = Outreach(bench, "sends")
    outreach.settings(max_per_minute=None, max_per_hour=None, max_per_day=None, min_gap_seconds=None)
    outreach.batches(bench.size.sends, 1)
    with bench.server(OURS, outreach.database) as server:
        base_url = f"http://127.0.0.1:{server.port}"
        with _dispatcher(bench, outreach.database, MAC_SYNC_BASE_URL=base_url) as process:
            taken = _seconds_of_sends(outreach.database, bench.size.sends)
            memory = resident(process.pid)
    what = f"{bench.size.sends:,} sends in one tick; other: each"
    each = f"{1000 * taken / bench.size.sends:.1f} ms"
    yield Row(what, f"{taken:.2f} s", each, "-", "< 3 s", taken < 3)
    yield Row("dispatcher memory, after that tick", f"{memory:.0f} MB", "-", "-", "< 60 MB", memory < 60)


def _seconds_of_sends(database: Database, count: int) -> float:
    """From the claim to the last record, as the rows' own times tell it."""
    sql = """
        SELECT count(*), extract(epoch FROM max(item.queued_at) - min(batch.last_served_at))
          FROM outreach_batch_items AS item JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.status = 'queued'
    """
    _wait(lambda: database.run(sql)[0][0] == count)
    return float(database.run(sql)[0][1])


def one_after_another(bench: Bench) -> Iterator[Row]:
    """A message's whole way, one message after another, against two queues that use no HTTP."""
    count = bench.size.messages
    mine = bench.database("whole_way")
    peers = {name: bench.database(name) for name in ("procrastinate", "pgqueuer")}
    device = mine.device("mac-mini")
    with bench.server(OURS, mine) as server:
        ours, first, second = interleaved(
            bench.size.rounds,
            [
                lambda: whole_way(server.port, device, count),
                lambda: asyncio.run(bench_peers.procrastinate(peers["procrastinate"].url, count)),
                lambda: asyncio.run(bench_peers.pgqueuer(peers["pgqueuer"].url, count)),
            ],
        )
    for name, other in (("procrastinate", first), ("pgqueuer", second)):
        what = f"a message's whole way, one after another; other: {name}"
        yield compared(what, ours, other, 1.0)


def whole_way(port: int, device: str, count: int) -> float:
    """Messages a second, enqueued, polled and reported one after another, over one connection."""
    connection = bench_load.Connection(port)

    def ask(message_bytes: bytes) -> Any:
        connection.send(message_bytes)
        while not (body := connection.body()):
            pass
        return json.loads(body)["data"]

    start = time.perf_counter()
    for _ in range(count):
        ask(request("POST", send_queue_server.ENQUEUE, TOKEN, message(device)))
        [item] = ask(request("GET", send_queue_server.PENDING, "mac-mini"))["items"]
        ask(request("POST", result_path(item["id"]), "mac-mini", b'{"status":"sent"}'))
    connection.socket.close()
    return count / (time.perf_counter() - start)


def resident(pid: int) -> float:
    """Resident memory in MB, from Linux' own account."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- table and drawing --------------------------------------------------------------------------------


def machine() -> str:
    """The machine and the versions, in a line."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else platform.machine()
    load = os.getloadavg()[0]
    return f"{CORES} cores, {model}, Linux, Python {platform.python_version()}; load {load:.1f} at the start"


def line(row: Row) -> str:
    verdict = "" if row.target == "-" else "met" if row.good else "MISSED"
    return f"{row.what:<68}{row.ours:>18}{row.other:>13}{row.ratio:>8}  {row.target:<13}{verdict}"


def drawing(rows: Sequence[Row], caption: str) -> str:
    """An SVG with a bar for each ratio of two rates: ours in parts of the other's, which is the upright line."""
    rates = [row for row in rows if row.ours.endswith("/s") and row.other.endswith("/s")]
    unit, step = 260, 26  # pixels for a ratio of 1, and for a row
    widest = max(float(row.ratio) for row in rates)
    width, height = 560 + math.ceil(unit * max(widest, 1)) + 300, step * len(rates) + 90
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="16" y="26" font-size="15">'
        "Requests a second, as a share of the other's (the line); orange: below its target</text>",
        f'<text x="16" y="{height - 14}" fill="#666" font-size="11">{html.escape(caption)}</text>',
    ]
    for number, row in enumerate(rates):
        y, length = 44 + number * step, unit * float(row.ratio)
        label = f"{row.ratio}: {row.ours} against {row.other}"
        parts += [
            f'<text x="545" y="{y + 14}" text-anchor="end">{html.escape(row.what)}</text>',
            f'<rect x="560" y="{y}" width="{length:.0f}" height="18" fill="{"#2a7" if row.good else "#c73"}"/>',
            f'<text x="{568 + max(length, unit):.0f}" y="{y + 14}" fill="#333">{label}</text>',
        ]
    parts.append(f'<path d="M{560 + unit} 38V{height - 40}" stroke="#333" stroke-dasharray="3 3"/></svg>')
    return "\n".join(parts) + "\n"


SECTIONS = (one_process, all_cores, tail_of_polls, history, ticks, past, sends, one_after_another)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure the product beside its limits and its peers.",
        epilog="examples: python demo/bench.py --quick; python demo/bench.py --svg docs/bench.svg",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute; its figures mean nothing")
    parser.add_argument("--memory-minutes", type=float, metavar="N", help="how long memory is watched under load")
    parser.add_argument("--only", choices=[section.__name__ for section in SECTIONS], action="append")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the rates there")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.memory_minutes is not None:
        size = size._replace(memory_seconds=60 * arguments.memory_minutes)
    rows = []
    caption = machine()
    print(caption)
    print(f"{'what is measured':<68}{'ours':>18}{'other':>13}{'ratio':>8}  target", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        # What the dispatcher logs, as where it runs for real: formatted, and written to a file.
        logging.basicConfig(filename=Path(directory) / "jobs.log", level="INFO", force=True)
        bench = Bench(size, Path(directory))
        with contextlib.closing(bench.load):
            for section in SECTIONS:
                if not arguments.only or section.__name__ in arguments.only:
                    for row in section(bench):
                        print(line(row), flush=True)
                        rows.append(row)
    if arguments.svg:
        arguments.svg.write_text(drawing(rows, caption))
    return 0


if __name__ == "__main__":
    sys.exit(main())
