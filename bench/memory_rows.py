"""Measure the memory of the server and of the dispatcher.

The function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import time
from collections.abc import Iterator

from dispatch_rows import Outreach, fill_items
from environment import PRODUCT, Bench, Database, Server, resident, wait_until
from http_rows import ENDPOINTS, MANY, fill_queue, requests_for
from table import Row, Target, compared

BOUND = 60.0  # MB
REQUESTS = 200  # of each endpoint in a round of the load
TICKS = 2


def megabytes(amount: float) -> str:
    """Format megabytes for compared()."""
    return f"{amount:.1f} MB"


def memory(bench: Bench) -> Iterator[Row]:
    """Measure the memory of the server and of the dispatcher with a long history, before and after a load."""
    database = bench.copy("queue_memory", "queue_history", fill_queue)
    with bench.server(PRODUCT, database.url) as server:
        run_requests(bench, server, database)  # then each thread has its connection and its statements
        before = server.resident()
        end = time.monotonic() + bench.size.memory_seconds
        count = 0
        while time.monotonic() < end:
            count += run_requests(bench, server, database)
        after = server.resident()
    what = f"server memory after {count:,} requests"
    yield compared(what, "the bound", [after], [BOUND], Target(at_most=1), megabytes)
    yield compared(what, "before them", [after], [before], Target(at_most=1.02), megabytes)
    outreach = Outreach(bench.copy("item_memory", "item_history", fill_items))
    outreach.set_limits(max_per_minute=0)
    idle = dispatcher_memory(bench, outreach)
    outreach.add_results(bench.size.results)
    busy = dispatcher_memory(bench, outreach)
    what = f"dispatcher memory, idle and after {bench.size.results:,} results"
    yield compared(what, "the bound", [idle, busy], [BOUND, BOUND], Target(at_most=1), megabytes)


def run_requests(bench: Bench, server: Server, database: Database) -> int:
    """Send REQUESTS requests to each endpoint; return the number of all responses."""
    count = 0
    for endpoint in ENDPOINTS:
        messages = requests_for(endpoint, database, REQUESTS)
        messages *= REQUESTS // len(messages)
        count += len(bench.load.run(server.port, messages, MANY, seconds=30).latencies)
    return count


def dispatcher_memory(bench: Bench, outreach: Outreach) -> float:
    """Return the resident memory of a dispatcher in MB after its second tick, which has fetched all results."""
    synced_at = "SELECT last_synced_at FROM outreach_settings"
    with bench.dispatcher(outreach.database, DISPATCH_INTERVAL_SECONDS="1") as process:
        for _ in range(TICKS):
            before = outreach.database.run(synced_at)
            wait_until(lambda: outreach.database.run(synced_at) != before, "a sync")  # noqa: B023  # called at once
        return resident(process.pid)
