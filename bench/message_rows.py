"""Measure complete messages, one after another: enqueue, poll, and record the result.

The product is compared with two queues and with the limit: a server that only commits as often, with the same client.
The function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import queues
from counting_proxy import CountingProxy
from environment import LIMIT, PRODUCT, Bench
from http_rows import enqueue_request, result_request
from load import Connection, request
from peers import PENDING
from table import Row, Target, compared, medians

TARGETS = {"procrastinate": 1.0, "pgqueuer": 1.0, "limit": 0.5}
WARM_UP = 20  # messages, after which each of the server's threads has prepared its statements
COUNTED = (20, 60)  # messages of two runs; their difference is counted
REQUESTS = 3  # over HTTP, for each message

Way = Callable[[str, int], float]  # sends a number of messages one after another; returns messages per second


class Costs(NamedTuple):
    """The costs of a message in PostgreSQL. `commits`: only commits that wait for the disk."""

    statements: float
    commits: float
    round_trips: float


def message(bench: Bench) -> Iterator[Row]:
    """Compare complete messages, one after another, with two queues without HTTP and with the limit."""
    databases = {name: bench.database(f"way_{name}") for name in ("product", *TARGETS)}
    ways: dict[str, Way] = {
        "product": functools.partial(over_http, bench, PRODUCT, databases["product"].device("mac-mini")),
        "procrastinate": lambda url, count: asyncio.run(queues.procrastinate(url, count)),
        "pgqueuer": lambda url, count: asyncio.run(queues.pgqueuer(url, count)),
        "limit": functools.partial(over_http, bench, LIMIT, databases["limit"].device("mac-mini")),
    }
    measure = [functools.partial(way, databases[name].url, bench.size.messages) for name, way in ways.items()]
    rates = dict(zip(ways, medians(bench.size.rounds, measure), strict=True))
    for name, least in TARGETS.items():
        what = "a message's whole way, one after another"
        yield compared(what, name, [rates["product"]], [rates[name]], Target(at_least=least))
    costs = {name: count_costs(bench, name, way, databases[name].url) for name, way in ways.items()}
    for name in TARGETS:
        what = f"a message's statements, commits and round trips (and {REQUESTS} HTTP requests)"
        yield compared(what, name, costs["product"], costs[name], Target(at_most=1), "{:.1f}".format)


def over_http(bench: Bench, command: list[str], device: str, url: str, count: int) -> float:
    """Start a server; return its messages per second over one connection."""
    with bench.server(command, url) as server, contextlib.closing(Connection(server.port)) as connection:
        for _ in range(WARM_UP):
            send_one(connection, device)
        start = time.perf_counter()
        for _ in range(count):
            send_one(connection, device)
        return count / (time.perf_counter() - start)


def send_one(connection: Connection, device: str) -> None:
    """Enqueue a message, collect it, and report it as sent. Raises RuntimeError if a response is not a 200."""

    def ask(message_bytes: bytes) -> Any:
        status, body = connection.exchange(message_bytes)
        if status != 200:
            raise RuntimeError(f"HTTP {status}: {body!r}")
        return json.loads(body)["data"]

    ask(enqueue_request(device))
    [item] = ask(request("GET", PENDING, "mac-mini"))["items"]
    ask(result_request("mac-mini", item["id"]))


def count_costs(bench: Bench, name: str, way: Way, url: str) -> Costs:
    """Return the costs of a message: the difference of two runs, because connecting and preparing must not count."""
    totals = []
    for count in COUNTED:
        before = bench.wal_syncs()
        with CountingProxy(url, bench.directory / f"{name}-{count}") as proxy:
            way(proxy.url, count)
        totals.append((proxy.statements, bench.wal_syncs() - before, proxy.round_trips))
    return Costs(*((more - less) / (COUNTED[1] - COUNTED[0]) for less, more in zip(*totals, strict=True)))
