"""Compare the product with its peers and its limits, alternately, in one run on this machine.

Run by `make bench`. Starts its own PostgreSQL, with default durability, in a temporary directory. Each row has a ratio
and a target, and says MISSED if the ratio misses the target. Example:

    python bench/bench.py --only tick --only message
"""

import argparse
import contextlib
import logging
import signal
import sys
import tempfile
import time
from pathlib import Path

import composing_rows
import dispatch_rows
import http_rows
import memory_rows
import message_rows
import metrics_rows
import page_rows
from environment import FULL, QUICK, Bench
from table import Row, console, describe_machine, show, write_markdown

GROUPS = {
    group.__name__: group
    for group in (
        http_rows.requests,
        http_rows.peek,
        http_rows.lock,
        http_rows.queue_history,
        http_rows.prepared,
        dispatch_rows.tick,
        dispatch_rows.night,
        dispatch_rows.stale_statistics,
        dispatch_rows.item_history,
        dispatch_rows.bulk,
        metrics_rows.scrape,
        message_rows.message,
        memory_rows.memory,
        composing_rows.search,
        composing_rows.draft,
        composing_rows.import_file,
        page_rows.pages,
        page_rows.open_pages,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure the product beside its peers and its limits.",
        epilog="examples: python bench/bench.py --only tick; python bench/bench.py --markdown docs/performance.md",
    )
    parser.add_argument("--quick", action="store_true", help="use the smallest sizes, to test the benchmark itself")
    parser.add_argument("--only", choices=GROUPS, action="append", help="run only this group; may be repeated")
    parser.add_argument("--memory-minutes", type=float, metavar="N", help="length of the server's memory test")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.memory_minutes is not None:
        size = size._replace(memory_seconds=60 * arguments.memory_minutes)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("terminated")
    )  # exit through `finally`, which ends PostgreSQL and the servers
    rows: list[Row] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        # Jobs in this process log to a file, because logging costs time in production too.
        logging.basicConfig(filename=Path(directory) / "jobs.log", level="INFO", force=True)
        with contextlib.closing(Bench(size, Path(directory))) as bench:
            caption = describe_machine(bench.postgres_version())
            console.print(caption, highlight=False)
            for name in arguments.only or GROUPS:
                with console.status(name):
                    found = list(GROUPS[name](bench))
                show(f"{name}: {GROUPS[name].__doc__}", found)
                rows += found
    missed = sum(not row.met for row in rows)
    console.print(f"{len(rows)} rows, {missed} missed, in {time.monotonic() - start:.0f} s", highlight=False)
    if arguments.markdown:
        write_markdown(arguments.markdown, caption, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
