"""Measure the send queue server: compared with its peers, with a long history, and while a statement waits.

Each function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import contextlib
import functools
import json
import statistics
import threading
import uuid
from collections.abc import Callable, Iterator

import product
from environment import BODY, CONSTANT, PRODUCT, STARLETTE, Bench, Database, Server, wait_until
from load import Connection, paced, request
from peers import ENQUEUE, PENDING, RESULT
from table import Row, Target, compared, medians, milliseconds

COLLECT = "/client/imessage/send-queue/{id}/collect"
# The endpoints, and the target: the ratio to the rate of a constant response. `enqueue` and `result` wait for the disk.
BESIDE_CONSTANT = {"empty poll": 0.5, "poll of 10": 0.4, "enqueue": 0.2, "result": 0.2}
ENDPOINTS = tuple(BESIDE_CONSTANT)
CONNECTIONS = (1, 16, 64)
MANY = 16  # connections of a measurement that has only one number of them
# Requests prepared for each second of a measurement. No contender reaches this rate. A result can be sent only once.
FASTEST = 12_000
POLLS = 3_000  # the same for polls that collect, which need ten rows each
DEVICES = 50  # each polls once a second
CLIENTS = 40  # clients that poll while another one waits for a lock
CLIENT_INTERVAL = 0.2  # seconds
SLOWEST = 0.2  # seconds; bound of a response while another client's statement waits for a lock


def requests_for(endpoint: str, database: Database, count: int) -> list[bytes]:
    """Return the requests of one measurement of an endpoint: one to repeat, or `count` to send once each.

    Inserts the device and the rows that they need.
    """
    if endpoint == "empty poll":
        database.device("idle")
        return [request("GET", PENDING, "idle")]
    if endpoint == "poll of 10":
        device = database.device("ten")
        if not database.run("SELECT FROM icloud.send_queue WHERE device_id = %(device)s LIMIT 1", device=device):
            database.collected(device, 10)
        return [request("GET", PENDING, "ten")]
    if endpoint == "enqueue":
        device = database.device("enqueue")
        return [enqueue_request(device) for _ in range(count)]
    return [result_request("result", row_id) for row_id in database.collected(database.device("result"), count)]


def enqueue_request(device: str) -> bytes:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": device, "toHandle": "+14155550123", "body": BODY}
    return request("POST", ENQUEUE, product.SERVICE_TOKEN, json.dumps(message).encode())


def result_request(token: str, row_id: str) -> bytes:
    return request("POST", RESULT.format(id=row_id), token, b'{"status":"sent"}')


def rate(bench: Bench, server: Server, database: Database, endpoint: str, connections: int) -> float:
    """Return the requests per second of one measurement of an endpoint."""
    messages = requests_for(endpoint, database, int(FASTEST * bench.size.seconds))
    return rate_of(bench, server, messages, connections)


def rate_of(bench: Bench, server: Server, messages: list[bytes], connections: int = MANY) -> float:
    """Return the responses per second to these requests. Raises RuntimeError if one is not a 200."""
    sample = bench.load.run(server.port, messages, connections, bench.size.seconds)
    if sample.errors:
        raise RuntimeError(f"{sample.errors} responses were not 200, such as to {messages[0][:80]!r}")
    return sample.rate


def requests(bench: Bench) -> Iterator[Row]:
    """Compare each endpoint with starlette doing the same work, and with a constant of waitress and bottle."""
    database = bench.database("requests")
    with contextlib.ExitStack() as stack:
        servers = {
            processes: [
                stack.enter_context(bench.server(command, database.url, processes))
                for command in (PRODUCT, STARLETTE, CONSTANT)
            ]
            for processes in (1, 2)
        }
        for endpoint in ENDPOINTS:
            for processes, contenders in servers.items():
                figures = []
                for connections in CONNECTIONS:
                    measure = [
                        functools.partial(rate, bench, server, database, endpoint, connections) for server in contenders
                    ]
                    figures.append(medians(bench.size.rounds, measure))
                ours, starlette, constant = zip(*figures, strict=True)
                at = ", ".join(map(str, CONNECTIONS))
                what = f"{endpoint}, {processes} process{'es' if processes > 1 else ''}; {at} connections"
                yield compared(what, "starlette, asyncpg", ours, starlette, Target(at_least=0.9))
                # With two processes on two cores, PostgreSQL takes CPU time from the product, not from the constant.
                bound = Target(at_least=BESIDE_CONSTANT[endpoint] / processes)
                yield compared(what, "a constant response", ours, constant, bound)


def peek(bench: Bench) -> Iterator[Row]:
    """Compare a peek, and a collect, with the specification's poll, which collects what it returns."""
    database = bench.database("peek")
    with bench.server(PRODUCT, database.url) as server:
        measure: list[Callable[[], float]] = [
            lambda: rate_of(bench, server, [peek_request(database)]),
            lambda: rate_of(bench, server, collect_requests(bench, database)),
            lambda: rate_of(bench, server, first_polls(bench, database)),
            functools.partial(rate, bench, server, database, "poll of 10", MANY),
        ]
        peeks, collects, polls, repeated_polls = medians(bench.size.rounds, measure)
    yield compared("peek of 10 messages", "a poll that collects 10", [peeks], [polls], Target(at_least=1))
    yield compared("peek of 10 messages", "a repeated poll of 10", [peeks], [repeated_polls], Target(at_least=0.9))
    yield compared("collect of 1 message", "a poll that collects 10", [collects], [polls], Target(at_least=0.9))


def uncollected(database: Database, devices: list[str], count: int) -> list[str]:
    """Insert `count` rows for each device, as the server makes them; return their ids."""
    sql = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, handle_key, drafted_at)
        SELECT device::uuid, '+14155550123', %(body)s, gen_random_uuid(), '+14155550123', now()
          FROM unnest(%(devices)s) AS device, generate_series(1, %(count)s)
        RETURNING id
    """
    return [row_id for (row_id,) in database.run(sql, devices=devices, body=BODY, count=count)]


def peek_request(database: Database) -> bytes:
    """Return a peek of a device with ten rows, which stay as they are."""
    device = database.device("peek")
    if not database.run("SELECT 1 FROM icloud.send_queue WHERE device_id = %(device)s LIMIT 1", device=device):
        uncollected(database, [device], 10)
    return request("GET", f"{PENDING}?peek=true", "peek")


def collect_requests(bench: Bench, database: Database) -> list[bytes]:
    """Return a collect for each of many new rows of one device."""
    device = database.device("collect")
    return [
        request(
            "POST",
            COLLECT.format(id=row_id),
            "collect",
            json.dumps({"collectId": str(uuid.uuid4()), "instance": "one"}).encode(),
        )
        for row_id in uncollected(database, [device], int(FASTEST * bench.size.seconds))
    ]


def first_polls(bench: Bench, database: Database) -> list[bytes]:
    """Return the first polls of many new devices, each of which has ten rows."""
    sql = """
        INSERT INTO icloud.devices (name, token) SELECT 'new', token FROM unnest(%(digests)s) AS token RETURNING id
    """
    tokens = [str(uuid.uuid4()) for _ in range(int(POLLS * bench.size.seconds))]
    devices = database.run(sql, digests=[product.hash_token(token) for token in tokens])
    uncollected(database, [device for (device,) in devices], 10)
    return [request("GET", PENDING, token) for token in tokens]


def lock(bench: Bench) -> Iterator[Row]:
    """Measure the responses to other clients while the statement of one client waits for a lock."""
    database = bench.database("lock")
    [row_id] = database.collected(database.device("blocked"), 1)
    polls = []
    for number in range(CLIENTS):
        database.device(f"device-{number}")
        polls.append(request("GET", PENDING, f"device-{number}"))
    hold = "SELECT FROM icloud.send_queue WHERE id = %(id)s FOR UPDATE"
    seconds = 4 * bench.size.seconds
    free, blocked = [], []
    with bench.server(PRODUCT, database.url) as server:
        for _ in range(bench.size.rounds):
            # The connections are older than the lock: the server has given them to its threads by then.
            connections = [Connection(server.port) for _ in polls]
            free.append(max(paced(connections, polls, CLIENT_INTERVAL, seconds).latencies))
            database.run("BEGIN")
            database.run(hold, id=row_id)
            with repeated(server.port, result_request("blocked", row_id)):
                wait_until(lambda: someone_waits(database), "a statement that waits for a lock")
                blocked.append(max(paced(connections, polls, CLIENT_INTERVAL, seconds).latencies))
                database.run("ROLLBACK")
            for connection in connections:
                connection.close()
    without = milliseconds(max(free))
    what = f"slowest response to {CLIENTS} clients beside one that waits for a lock ({without} without it)"
    yield compared(what, "the bound", [max(blocked)], [SLOWEST], Target(at_most=1), milliseconds)


def per_request(seconds: float) -> str:
    """Format the time of a request for compared()."""
    return f"{1e6 * seconds:,.0f} us"


def someone_waits(database: Database) -> bool:
    sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
    return bool(database.run(sql)[0][0])


@contextlib.contextmanager
def repeated(port: int, message: bytes) -> Iterator[None]:
    """Repeat a request in a thread, and ignore the responses."""
    ended = threading.Event()

    def repeat() -> None:
        connection = Connection(port)
        while not ended.is_set():
            connection.exchange(message)
        connection.close()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def fill_queue(bench: Bench, database: Database) -> None:
    """Fill the template of the groups that have a long history of the queue."""
    add_finished(database, bench.size.history)


def add_finished(database: Database, count: int) -> None:
    """Insert finished rows, one every 30 seconds."""
    sql = """
        INSERT INTO icloud.send_queue
               (device_id, to_handle, body, batch_item_id, created_at, collected_at, sent_at, updated_at, status)
        SELECT %(device)s, '+14155550123', %(body)s, gen_random_uuid(), moment, moment, moment, moment, 'sent'
          FROM (SELECT now() - number * interval '30 seconds' FROM generate_series(1, %(count)s) AS number)
               AS past (moment)
    """
    database.fill(sql, device=database.device("idle"), body=BODY, count=count)


def queue_history(bench: Bench) -> Iterator[Row]:
    """Compare the endpoints with a long history of finished rows and with an empty queue; compare p99 with p50."""
    old = bench.copy("queue_old", "queue_history", fill_queue)
    new = bench.database("queue_new")
    polls = []
    for number in range(DEVICES):
        old.device(f"device-{number}")
        polls.append(request("GET", PENDING, f"device-{number}"))
    with bench.server(PRODUCT, old.url) as long, bench.server(PRODUCT, new.url) as short:
        for endpoint in ENDPOINTS:
            measure = [
                functools.partial(rate, bench, long, old, endpoint, MANY),
                functools.partial(rate, bench, short, new, endpoint, MANY),
            ]
            mine, other = medians(bench.size.rounds, measure)
            what = f"{endpoint} over {bench.size.history:,} finished rows"
            yield compared(what, "an empty queue", [mine], [other], Target(at_least=0.83))
        connections = [Connection(long.port) for _ in polls]
        sample = paced(connections, polls, 1.0, 20 * bench.size.seconds)
    cuts = statistics.quantiles(sample.latencies, n=100)
    what = f"p99 of a poll, {DEVICES} devices once a second, over these rows"
    yield compared(what, "p50", [cuts[98]], [cuts[49]], Target(at_most=10), milliseconds)


def prepared(bench: Bench) -> Iterator[Row]:
    """Compare a poll with and without rows of another device, inserted after the server has prepared its statements."""
    times = []
    for statistics_of in ("never", "empty"):  # the planner's statistics: none, and those of an empty table
        crowded, alone = bench.database(f"crowded_{statistics_of}"), bench.database(f"alone_{statistics_of}")
        if statistics_of == "empty":
            crowded.settle()
            alone.settle()
        with bench.server(PRODUCT, crowded.url) as beside, bench.server(PRODUCT, alone.url) as undisturbed:
            for server, database in ((beside, crowded), (undisturbed, alone)):
                # After these polls, each thread has prepared the statement, and PostgreSQL has chosen a generic plan.
                rate(bench, server, database, "empty poll", MANY)
            crowded.waiting(crowded.device("other"), bench.size.waiting)
            measure = [
                functools.partial(rate, bench, beside, crowded, "empty poll", MANY),
                functools.partial(rate, bench, undisturbed, alone, "empty poll", MANY),
            ]
            times.append([1 / polls for polls in medians(bench.size.rounds, measure)])
    mine, other = zip(*times, strict=True)
    what = (
        f"empty poll while {bench.size.waiting:,} rows wait for another device; prepared before them, with the table "
    )
    what += "never analysed, and analysed while empty"
    yield compared(what, "no such rows", mine, other, Target(at_most=1.3), per_request)
