"""Measure the owner's page: the server's time and the weight of each page, and what open pages cost the queue.

Each function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import contextlib
import http.client
import statistics
import threading
import time
import urllib.parse
from collections.abc import Iterator

import product
from composing_rows import add_people
from environment import PRODUCT, Bench, Database
from http_rows import CLIENT_INTERVAL, CLIENTS
from load import Connection, paced, request
from peers import PENDING
from table import Row, Target, compared, milliseconds

OUTREACH = ["outreach_server.py"]
PAGE_SECONDS = 0.05  # bound of a page's time
PAGE_KILOBYTES = 50.0
PAUSE_SECONDS = 1.0
OPEN_PAGES = 30
REFRESH = 5.0  # seconds between two refreshes of an open page
SENDING = 5  # batches that are being sent; the others are finished
REMEMBERED = 1.05  # seconds, after which no page is shown from the report of the visit before


def kilobytes(amount: float) -> str:
    """Format kilobytes for compared()."""
    return f"{amount:.1f} kB"


def fill_outreach(bench: Bench, database: Database) -> None:
    """Make people, and batches with items, most of them finished long ago; opt-outs; one Mac."""
    batches = """
        INSERT INTO outreach_batches (id, name, template, status, digest, approved_at, created_at, updated_at)
        SELECT md5('batch' || n)::uuid, 'Batch ' || n, 'Hello',
               CASE WHEN n <= %(sending)s THEN 'sending' ELSE 'sent' END, md5('digest' || n),
               now() - CASE WHEN n <= %(sending)s THEN interval '1 hour' ELSE interval '90 days' END,
               now() - n * interval '8 hours', now() - n * interval '7 hours'
          FROM generate_series(1, %(batches)s) AS n
    """
    items = """
        INSERT INTO outreach_batch_items
               (batch_id, client_id, rendered_body, handle_key, status, sent_at, queued_at, failure_reason, updated_at)
        SELECT md5('batch' || b)::uuid, md5('client' || client)::uuid, %(body)s, '+1415' || lpad(client::text, 7, '0'),
               status, CASE WHEN status = 'sent' THEN at END, at, CASE WHEN status = 'failed' THEN 'no iMessage' END, at
          FROM generate_series(1, %(batches)s) AS b,
               generate_series(1, %(items)s) AS n,
               LATERAL (SELECT (b * 7919 + n) %% %(people)s + 1 AS client,
                               CASE WHEN b <= %(sending)s AND n %% 2 = 0 THEN 'pending'
                                    WHEN n %% 50 = 1 THEN 'failed' ELSE 'sent' END AS status,
                               now() - b * interval '8 hours' - n * interval '3 seconds' AS at) AS made
            ON CONFLICT DO NOTHING
    """
    opt_outs = """
        INSERT INTO icloud.opt_outs (handle_key, word, source, device_id, received_at)
        SELECT '+1415' || lpad((n * 97)::text, 7, '0'), 'STOP', 'reply', %(device)s, now() - n * interval '1 hour'
          FROM generate_series(1, 500) AS n
    """
    size = {"batches": bench.size.batches, "items": bench.size.items, "sending": SENDING}
    add_people(database, bench.size.recipients)
    database.fill(batches, batches=bench.size.batches, sending=SENDING)
    database.fill(items, body="Hello!", people=bench.size.recipients, **size)
    database.fill(opt_outs, device=database.device("mac"))
    database.run("UPDATE icloud.devices SET last_seen_at = now()")
    for column in ("last_tick_at", "last_synced_at", "last_dispatched_at"):
        database.run(f"UPDATE outreach_settings SET {column} = now()")  # noqa: S608


class Visitor:
    """A browser that is logged in."""

    def __init__(self, port: int) -> None:
        self.port = port
        body = urllib.parse.urlencode({"password": product.OWNER_TOKEN})
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Sec-Fetch-Site": "same-origin"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/login", body, headers)
            self.cookie = (connection.getresponse().getheader("Set-Cookie") or "").partition(";")[0]

    def visit_later(self, path: str) -> tuple[float, int]:
        """As visit(), when the server remembers nothing of the visit before."""
        time.sleep(REMEMBERED)
        return self.visit(path)

    def press(self, path: str) -> str:
        """Press a button, and follow the redirect; return the page."""
        headers = {"Cookie": self.cookie, "Sec-Fetch-Site": "same-origin"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("POST", path, headers={**headers, "Content-Length": "0"})
            response = connection.getresponse()
            response.read()
            connection.request("GET", response.getheader("Location") or "/", headers=headers)
            return connection.getresponse().read().decode()

    def visit(self, path: str) -> tuple[float, int]:
        """Return the seconds of a page, and its bytes. Raises RuntimeError if it is not a 200."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            start = time.perf_counter()
            connection.request("GET", path, headers={"Cookie": self.cookie})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise RuntimeError(f"{path} responded {response.status}")
            return time.perf_counter() - start, len(content)


def pages(bench: Bench) -> Iterator[Row]:
    """Compare the time of each page over a long history, and the bytes of the heaviest one, with their bounds."""
    database = bench.copy("pages", "outreach", fill_outreach)
    names = "SELECT md5('batch1')::uuid::text, md5('batch' || %(last)s)::uuid::text, md5('client1')::uuid::text"
    [(sending, finished, person)] = database.run(names, last=bench.size.batches)
    paths = {
        "Today": "/", "Batch, being sent": f"/batch/{sending}", "Batch, finished": f"/batch/{finished}",
        "all batches": "/batch", "People": "/people", "a person": f"/people/{person}", "opt-outs": "/people/opt-outs",
        "Settings": "/settings",
    }  # fmt: skip
    size = bench.size
    history = f"{size.recipients:,} people, {size.batches:,} batches, {size.batches * size.items:,} items"
    heaviest = 0
    with bench.server(OUTREACH, database.url) as server:
        visitor = Visitor(server.port)
        for name, path in paths.items():
            visitor.visit(path)  # the first visit reads what the next ones find in memory
            visits = [visitor.visit_later(path) for _ in range(bench.size.rounds + 2)]
            heaviest = max(heaviest, *(size for _, size in visits))
            taken = statistics.median(seconds for seconds, _ in visits)
            what = f"page {name}: {history}"
            yield compared(what, "the bound", [taken], [PAGE_SECONDS], Target(at_most=1), milliseconds)
        taken = pause_everything(bench, database, visitor)
        what = f"pause everything, {bench.size.sends:,} messages in the queue"
        yield compared(what, "the bound", [taken], [PAUSE_SECONDS], Target(at_most=1), milliseconds)
    weight = [heaviest / 1000]
    yield compared("the heaviest of these pages", "the bound", weight, [PAGE_KILOBYTES], Target(at_most=1), kilobytes)


def pause_everything(bench: Bench, database: Database, visitor: Visitor) -> float:
    """Return the seconds until the page says what a pause took back: the POST, and the page that follows."""
    queue = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, drafted_at)
        SELECT (SELECT id FROM icloud.devices LIMIT 1), '+14155550123', 'Hello!', id, now()
          FROM outreach_batch_items
         WHERE status = 'pending'
         LIMIT %(count)s
    """
    database.run(queue, count=bench.size.sends)
    waiting = database.run("SELECT count(*) FROM icloud.send_queue WHERE status = 'queued'")[0][0]
    start = time.perf_counter()
    content = visitor.press("/pause")
    taken = time.perf_counter() - start
    if f"{waiting:,} messages were taken back" not in content:
        raise RuntimeError("the pause did not take back every message")
    return taken


def open_pages(bench: Bench) -> Iterator[Row]:
    """Compare the p99 of the devices' polls with and without thirty open pages that refresh themselves."""
    database = bench.copy("open_pages", "outreach", fill_outreach)
    polls = []
    for number in range(CLIENTS):
        database.device(f"device-{number}")
        polls.append(request("GET", PENDING, f"device-{number}"))
    with bench.server(PRODUCT, database.url) as queue, bench.server(OUTREACH, database.url) as outreach:
        visitor = Visitor(outreach.port)
        cuts = []
        for is_open in (True, False):
            with open_browsers(visitor) if is_open else contextlib.nullcontext():
                connections = [Connection(queue.port) for _ in polls]
                sample = paced(connections, polls, CLIENT_INTERVAL, 20 * bench.size.seconds)
            cuts.append(statistics.quantiles(sample.latencies, n=100)[98])
    what = f"p99 of a poll while {OPEN_PAGES} open pages refresh themselves"
    yield compared(what, "no page is open", [cuts[0]], [cuts[1]], Target(at_most=1.5), milliseconds)


@contextlib.contextmanager
def open_browsers(visitor: Visitor) -> Iterator[None]:
    """Refresh Today as OPEN_PAGES browsers do."""
    ended = threading.Event()

    def refresh(delay: float) -> None:
        while not ended.wait(delay):
            visitor.visit("/")
            delay = REFRESH

    threads = [threading.Thread(target=refresh, args=(REFRESH * number / OPEN_PAGES,)) for number in range(OPEN_PAGES)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
