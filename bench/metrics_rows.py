"""Measure a scrape of GET /metrics on both servers, over a long history and a short one.

The function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import functools
from collections.abc import Iterator

import product
from dispatch_rows import add_sent_items, fill_items
from environment import OUTREACH_SERVER, PRODUCT, Bench, Database, Server
from http_rows import add_finished, fill_queue, rate_of
from load import request
from table import Row, Target, compared, medians, milliseconds

FEW = 1000  # finished rows, or sent items, of the short history


def scrape(bench: Bench) -> Iterator[Row]:
    """Compare a scrape of each server over a long history with a short one."""
    history, few = bench.size.history, min(FEW, bench.size.short_history)
    old_queue, new_queue = bench.copy("scrape_queue_old", "queue_history", fill_queue), bench.database("scrape_queue")
    add_finished(new_queue, few)
    old_items, new_items = bench.copy("scrape_items_old", "item_history", fill_items), bench.database("scrape_items")
    add_sent_items(new_items, few)
    for what, command, token, old, new in (
        ("send queue server", PRODUCT, product.SERVICE_TOKEN, old_queue, new_queue),
        ("outreach server", OUTREACH_SERVER, product.OWNER_TOKEN, old_items, new_items),
    ):
        new.settle()
        mine, other = compare_servers(bench, command, token, old, new)
        yield compared(
            f"scrape of the {what} over {history:,} messages that have ended", f"{few:,}", [mine], [other],
            Target(at_most=1.5), milliseconds,
        )  # fmt: skip


def compare_servers(bench: Bench, command: list[str], token: str, old: Database, new: Database) -> list[float]:
    """Return the seconds of a scrape over each database."""

    def seconds(server: Server) -> float:
        return 1 / rate_of(bench, server, [request("GET", "/metrics", token)], connections=1)

    with bench.server(command, old.url) as long, bench.server(command, new.url) as short:
        return medians(bench.size.rounds, [functools.partial(seconds, server) for server in (long, short)])
