"""Measure the dispatcher: its two jobs with many batches, with a long history, and with many results or sends.

Each function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import functools
import math
import time
import uuid
import zoneinfo
from collections.abc import Callable, Iterator
from datetime import datetime
from statistics import median

import product
from environment import BODY, PRODUCT, WAIT_TIMEOUT, Bench, Database
from product import StatementLog
from table import Row, Target, compared, medians, milliseconds, period
from tick_by_batch import tick_by_batch

import zones

SYNC_SECONDS = 1.0  # bound of a sync of Size.results results
SENDS_SECONDS = 3.0  # bound of a tick of Size.sends sends
STALE_BATCHES = 100


class Outreach:
    """A database with batches, and the dispatcher's two connections to it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.timed_out = False
        self.database.device("mac-mini")
        self.quinn, self.icloud = product.connect(database.url), product.connect(database.url)
        self.set_limits(max_per_minute=10, max_per_hour=100, max_per_day=1000, min_gap_seconds=30)

    def set_limits(self, **values: int | None) -> None:
        """Set the given limits, and remove all other limits and the quiet hours."""
        sql = """
            UPDATE outreach_settings
               SET quiet_hours_start = NULL, quiet_hours_end = NULL, max_per_minute = %(max_per_minute)s,
                   max_per_hour = %(max_per_hour)s, max_per_day = %(max_per_day)s,
                   min_gap_seconds = %(min_gap_seconds)s
        """
        names = ("max_per_minute", "max_per_hour", "max_per_day", "min_gap_seconds")
        self.database.run(sql, **(dict.fromkeys(names) | values))

    def add_batches(self, batches: int, items: int) -> None:
        """Insert sending batches of pending items. All batches have the same clients."""
        sql = """
            WITH batch AS (
                INSERT INTO outreach_batches (template, status)
                SELECT 'hello', 'sending' FROM generate_series(1, %(batches)s) RETURNING id
            )
            INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
            SELECT batch.id, md5('client' || n)::uuid, %(body)s FROM batch, generate_series(1, %(items)s) AS n
        """
        self.database.fill(sql, batches=batches, items=items, body=BODY)

    def add_results(self, count: int) -> None:
        """Insert queued items in a new batch, each with a queue row that was sent."""
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

    def reset(self) -> None:
        """Set the claimed and queued items back to pending."""
        sql = """
            UPDATE outreach_batch_items
               SET status = 'pending', send_queue_id = NULL, queued_at = NULL, claimed_at = NULL
             WHERE status = 'queued' OR (status = 'pending' AND claimed_at IS NOT NULL)
        """
        self.database.run(sql)

    def dispatch(self) -> StatementLog:
        """Run the dispatch job, and undo it."""
        log = product.run_dispatch(self.quinn, self.icloud)
        self.reset()
        return log

    def dispatch_seconds(self) -> float:
        """Return the seconds of the dispatch job's SQL; infinity if PostgreSQL has cancelled a statement."""
        if not self.timed_out:
            log = self.dispatch()
            self.timed_out = log.timed_out
        return math.inf if self.timed_out else log.seconds

    def dispatch_by_batch_seconds(self) -> float:
        """Return the seconds of the SQL of tick_by_batch(), which runs queries for each batch."""
        with StatementLog() as log:
            tick_by_batch(self.quinn, self.icloud, lambda: str(uuid.uuid4()))
        self.reset()
        return log.seconds

    def sync(self, results: int) -> StatementLog:
        """Run the sync job with this number of results to fetch."""
        self.add_results(results)
        return product.run_sync(self.quinn, self.icloud)

    def sync_seconds(self, results: int) -> float:
        return self.sync(results).seconds


def add_clients(database: Database, count: int) -> None:
    """Insert clients with a primary handle each."""
    clients = "INSERT INTO clients SELECT md5('client' || n)::uuid, 'A' FROM generate_series(1, %(count)s) AS n"
    handles = """
        INSERT INTO contact_relationships
        SELECT md5('client' || n)::uuid, '+1555' || lpad(n::text, 7, '0'), true
          FROM generate_series(1, %(count)s) AS n
    """
    for sql in (clients, handles):
        database.run(sql, count=count)


def add_sent_items(database: Database, count: int) -> None:
    """Insert sent items, one every ten minutes, in batches of a thousand."""
    sql = """
        WITH batch AS (
            INSERT INTO outreach_batches (template, status)
            SELECT 'hello', 'sent' FROM generate_series(1, CEIL(%(count)s / 1000.0)::int) RETURNING id
        ), numbered AS (
            SELECT id, row_number() OVER () - 1 AS number FROM batch
        )
        INSERT INTO outreach_batch_items
               (batch_id, client_id, rendered_body, status, sent_at, send_queue_id, device_id)
        SELECT numbered.id, md5('client' || n)::uuid, %(body)s, 'sent',
               now() - (number * 1000 + n) * interval '10 minutes', gen_random_uuid()::text, %(device)s
          FROM numbered, generate_series(1, LEAST(1000, %(count)s)) AS n
    """
    database.fill(sql, count=count, body=BODY, device=database.device("mac-mini"))


def fill_items(bench: Bench, database: Database) -> None:
    """Fill the template of the groups that have a long history."""
    add_clients(database, bench.size.items)
    add_sent_items(database, bench.size.history)


def tick(bench: Bench) -> Iterator[Row]:
    """Compare a tick over many batches with queries for each batch."""
    size = bench.size
    many, few = Outreach(bench.database("many")), Outreach(bench.database("few"))
    for outreach, batches, items in ((many, size.batches, size.items), (few, 10, 10)):
        add_clients(outreach.database, items)
        outreach.add_batches(batches, items)
        outreach.database.settle()
    mine, other = medians(size.rounds, [many.dispatch_seconds, many.dispatch_by_batch_seconds])
    what = f"SQL of a tick: {size.batches:,} batches of {size.items:,} items, 10 sends"
    yield compared(what, "queries for each batch", [1 / mine], [1 / other], Target(at_least=50), period)
    counts = [len(outreach.dispatch().statements) for outreach in (many, few)]
    what = f"statements of a tick over {size.batches:,} batches"
    yield compared(what, "10 batches", counts[:1], counts[1:], Target(at_most=1), number)


def number(count: float) -> str:
    """Format a count for compared()."""
    return f"{count:.0f}"


def night(bench: Bench) -> Iterator[Row]:
    """Compare a tick whose recipients live in 40 zones, 36 of which sleep, with the same tick without zones."""
    size = bench.size
    outreach = Outreach(bench.database("night"))
    add_clients(outreach.database, size.items)
    outreach.add_batches(size.batches, size.items)
    place_recipients(outreach.database, forty_zones())
    outreach.database.settle()
    recipient = """
        UPDATE outreach_settings
           SET quiet_hours_of = 'recipient', quiet_hours_start = '14:00', quiet_hours_end = '12:00',
               quiet_hours_tz = 'UTC'
    """
    sender = """
        UPDATE outreach_settings SET quiet_hours_of = 'sender', quiet_hours_start = NULL, quiet_hours_end = NULL
    """

    def by_recipient() -> float:
        outreach.database.run(recipient)
        return outreach.dispatch_seconds()

    def without() -> float:
        outreach.database.run(sender)
        return outreach.dispatch_seconds()

    mine, other = medians(size.rounds, [by_recipient, without])
    what = f"SQL of a tick: {size.batches:,} batches of {size.items:,} items in 40 zones, 36 of them asleep"
    yield compared(what, "the same tick without zones", [mine], [other], Target(at_most=1.5), milliseconds)


def forty_zones() -> list[str]:
    """Return 40 time zones, in 4 of which messages go now from 12:00 to 14:00."""
    awake, asleep = [], []
    for name in sorted(zoneinfo.available_timezones()):
        if not zones.is_known(name):
            continue
        local = datetime.now(zoneinfo.ZoneInfo(name))
        minute = local.hour * 60 + local.minute
        if 12 * 60 + 5 <= minute < 13 * 60 + 30:
            awake.append(name)
        elif not 11 * 60 <= minute < 14 * 60:
            asleep.append(name)
    return awake[:4] + asleep[:: len(asleep) // 36][:36]


def place_recipients(database: Database, names: list[str]) -> None:
    """Let the clients live in these zones, in turn, and their items know it."""
    clients = """
        UPDATE clients SET time_zone = (%(names)s::text[])[1 + place %% %(count)s]
          FROM (SELECT id, row_number() OVER (ORDER BY id) AS place FROM clients) AS placed
         WHERE placed.id = clients.id
    """
    items = """
        UPDATE outreach_batch_items SET time_zones = ARRAY[time_zone], new_contact = true
          FROM clients WHERE clients.id = client_id
    """
    database.run(clients, names=names, count=len(names))
    database.run(items)


def stale_statistics(bench: Bench) -> Iterator[Row]:
    """Compare a tick whose batches are newer than the statistics with a tick with fresh statistics."""
    size = bench.size
    batches = min(STALE_BATCHES, size.batches)
    stale, fresh = (Outreach(bench.copy(name, "item_history", fill_items)) for name in ("stale", "fresh"))
    for outreach in (stale, fresh):
        outreach.set_limits()
        outreach.add_batches(batches, size.items)
    fresh.database.run("ANALYZE")
    mine, other = medians(size.rounds, [stale.dispatch_seconds, fresh.dispatch_seconds])
    what = f"SQL of a tick with old statistics: {batches} new batches of {size.items:,}, {size.history:,} sent items"
    yield compared(what, "fresh statistics", [mine], [other], Target(at_most=1.5), milliseconds)


def item_history(bench: Bench) -> Iterator[Row]:
    """Compare a tick and a sync over a long history of sent items with a short one."""
    size = bench.size
    old, new = Outreach(bench.copy("items_old", "item_history", fill_items)), Outreach(bench.database("items_new"))
    add_clients(new.database, size.items)
    add_sent_items(new.database, size.short_history)
    for outreach in (old, new):
        outreach.add_batches(10, min(100, size.items))
        outreach.database.settle()
    jobs: dict[str, Callable[[Outreach], float]] = {
        "tick": Outreach.dispatch_seconds,
        "sync of 10 results": functools.partial(Outreach.sync_seconds, results=10),
    }
    for name, job in jobs.items():
        # A job takes a few milliseconds: more rounds reduce the noise, and cost little.
        mine, other = medians(4 * size.rounds, [functools.partial(job, old), functools.partial(job, new)])
        what = f"SQL of a {name} over {size.history:,} sent items"
        yield compared(what, f"{size.short_history:,}", [mine], [other], Target(at_most=1.3), milliseconds)


def bulk(bench: Bench) -> Iterator[Row]:
    """Measure a sync with many results, and a tick with many sends."""
    count = bench.size.results
    outreach = Outreach(bench.database("results"))
    few = len(outreach.sync(10).statements)
    seconds = []
    for _ in range(bench.size.rounds):
        outreach.add_results(count)
        start = time.perf_counter()
        log = product.run_sync(outreach.quinn, outreach.icloud)
        seconds.append(time.perf_counter() - start)
    what = f"sync of {count:,} results"
    yield compared(what, "the bound", [median(seconds)], [SYNC_SECONDS], Target(at_most=1), milliseconds)
    yield compared("statements of that sync", "10 results", [len(log.statements)], [few], Target(at_most=1), number)
    yield from sends(bench)


def sends(bench: Bench) -> Iterator[Row]:
    """Measure a tick with many sends over HTTP."""
    outreach = Outreach(bench.database("sends"))
    outreach.set_limits()
    add_clients(outreach.database, 1)
    with bench.server(PRODUCT, outreach.database.url) as server:
        base_url = f"http://127.0.0.1:{server.port}"
        seconds = [seconds_of_sends(bench, outreach, base_url) for _ in range(bench.size.rounds)]
    what = f"{bench.size.sends:,} sends in one tick, over HTTP"
    yield compared(what, "the bound", [median(seconds)], [SENDS_SECONDS], Target(at_most=1), milliseconds)


def seconds_of_sends(bench: Bench, outreach: Outreach, base_url: str) -> float:
    """Return the seconds from the claim of new items until the last one is queued, by the timestamps of the rows."""
    spent = """
        SELECT count(*), extract(epoch FROM max(item.queued_at) - min(batch.last_served_at))
          FROM outreach_batch_items AS item JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.status = 'queued'
    """
    finish_items = "UPDATE outreach_batch_items SET status = 'sent', sent_at = now() WHERE status = 'queued'"
    finish_batches = "UPDATE outreach_batches SET status = 'sent' WHERE status = 'sending'"
    outreach.add_batches(bench.size.sends, 1)
    outreach.database.settle()
    with bench.dispatcher(outreach.database, "--once", MAC_SYNC_BASE_URL=base_url) as process:
        process.wait(WAIT_TIMEOUT)
    [(count, seconds)] = outreach.database.run(spent)
    if count != bench.size.sends:
        raise RuntimeError(f"of {bench.size.sends} items {count} were queued")
    for sql in (finish_items, finish_batches):
        outreach.database.run(sql)
    return float(seconds)
