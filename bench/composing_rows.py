"""Measure composing: a search over many clients, a draft, and the import of a file.

Each function is a group of `bench.py --only`, measures on a `Bench`, and yields rows.
"""

import csv
import io
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import product
from environment import Bench, Database, environment_of
from table import Row, Target, compared, milliseconds

SEARCH_SECONDS = 1.0  # bound of a search over Size.clients clients
DRAFT_SECONDS = 20.0  # bound of a draft of Size.recipients people
CITIES = 100  # with as many clients each
LOOP_SHARE = 50  # the loop drafts one in so many people, because it needs too long for all
HEADER = ("Name", "Phone", "City", "Visits")
TEMPLATE = "Hello {{ client.name }}, this is Ana. You have been here {{ client.visits }} times. Reply STOP to opt out."
# Runs a draft in a process of its own, and prints its seconds and its largest resident memory in MB.
DRAFT = """
import json, resource, sys, time
import product
start = time.perf_counter()
count = product.draft(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
seconds = time.perf_counter() - start
print(json.dumps([count, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000]))
"""


def megabytes(amount: float) -> str:
    """Format megabytes for compared()."""
    return f"{amount:.1f} MB"


def seconds(amount: float) -> str:
    """Format seconds for compared()."""
    return f"{amount:.1f} s"


def people_per_second(rate: float) -> str:
    """Format a rate for compared()."""
    return f"{rate:,.0f} people/s"


def add_people(database: Database, count: int) -> None:
    """Insert clients with a primary number each, and with attributes as an import makes them."""
    sql = """
        WITH made AS (
            INSERT INTO clients (id, name, attributes)
            SELECT md5('client' || n)::uuid, 'Person ' || n,
                   jsonb_build_object('city', 'City ' || n %% %(cities)s, 'visits', (n %% 40)::text)
              FROM generate_series(1, %(count)s) AS n
        )
        INSERT INTO contact_relationships (client_id, handle, is_primary)
        SELECT md5('client' || n)::uuid, '+1415' || lpad(n::text, 7, '0'), true
          FROM generate_series(1, %(count)s) AS n
    """
    database.fill(sql, count=count, cities=CITIES)


def fill_people(bench: Bench, database: Database) -> None:
    """Fill the template of the search."""
    add_people(database, bench.size.clients)


def search(bench: Bench) -> Iterator[Row]:
    """Search for one city in a hundred: count the people, and those who are left out for each reason."""
    database = bench.copy("search", "people", fill_people)
    taken = []
    for number in range(bench.size.rounds):
        start = time.perf_counter()
        product.search(database.url, {"field": "city", "eq": f"City {number}"})
        taken.append(time.perf_counter() - start)
    what = f"search in {bench.size.clients:,} clients, of whom {bench.size.clients // CITIES:,} match"
    yield compared(what, "the bound", [median(taken)], [SEARCH_SECONDS], Target(at_most=1), milliseconds)


def draft(bench: Bench) -> Iterator[Row]:
    """Draft a batch: find the people, render each text, and write the items in one transaction."""
    few = bench.size.recipients // 10
    database = bench.database("draft")
    add_people(database, bench.size.recipients)
    database.settle()
    small = run_draft(database, few)
    large = run_draft(database, bench.size.recipients)
    loop = draft_in_a_loop(database, bench.size.recipients // LOOP_SHARE)
    what = f"draft of {bench.size.recipients:,} people"
    yield compared(what, "the bound", [large[0]], [DRAFT_SECONDS], Target(at_most=1), seconds)
    yield compared(
        what, "a loop that renders and inserts one by one",
        [bench.size.recipients / large[0]], [loop], Target(at_least=1), people_per_second,
    )  # fmt: skip
    yield compared(
        f"memory of that draft, and of one of {few:,}", "", [large[1]], [small[1]], Target(at_most=1.1), megabytes
    )


def run_draft(database: Database, people: int) -> tuple[float, float]:
    """Draft for so many people in a new process; return its seconds, and its largest resident memory in MB."""
    query = {"v": 1, "where": {"everyone": True}, "limit": people}
    done = subprocess.run(
        [sys.executable, "-c", DRAFT, database.url, json.dumps(query), TEMPLATE],
        cwd=Path(__file__).parent, env=environment_of(database.url), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    count, taken, memory = json.loads(done.stdout)
    if count != people:
        raise RuntimeError(f"{count} people were drafted instead of {people}")
    return taken, memory


def draft_in_a_loop(database: Database, people: int) -> float:
    """Render and insert one person's text after another, each INSERT a transaction; return people per second."""
    batch = "INSERT INTO outreach_batches (template, status) VALUES (%(template)s, 'draft') RETURNING id::text"
    clients = "SELECT id::text, name, attributes FROM clients ORDER BY id LIMIT %(people)s"
    insert = """
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, handle_key)
        SELECT %(batch_id)s, %(client_id)s, %(body)s, handle
          FROM contact_relationships WHERE client_id = %(client_id)s AND is_primary
    """
    render = product.renderer(TEMPLATE, ("name", "city", "visits"))
    start = time.perf_counter()
    [(batch_id,)] = database.run(batch, template=TEMPLATE)
    for client_id, name, attributes in database.run(clients, people=people):
        database.run(insert, batch_id=batch_id, client_id=client_id, body=render({"name": name, **attributes}))
    return people / (time.perf_counter() - start)


def import_file(bench: Bench) -> Iterator[Row]:
    """Import a CSV file of new people: read, plan, and apply; beside COPY of the same clients and handles."""
    path = bench.directory / "people.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        lines = bench.size.recipients
        writer.writerows((f"Person {n}", f"+1415{n:07}", f"City {n % CITIES}", n % 40) for n in range(lines))
    product_seconds, copy_seconds = [], []
    for number in range(min(bench.size.rounds, 3)):
        database = bench.database(f"import_{number}")
        start = time.perf_counter()
        product.import_file(database.url, path)
        product_seconds.append(time.perf_counter() - start)
        database.run("TRUNCATE clients, contact_relationships")
        copy_seconds.append(copy_people(database, path))
        database.close()
    what = f"import of {lines:,} lines"
    ours, theirs = median(product_seconds), median(copy_seconds)
    yield compared(what, "COPY of the same rows", [ours], [theirs], Target(at_most=12), seconds)


def copy_people(database: Database, path: Path) -> float:
    """Write the file's people with COPY, without any check of a line; return the seconds."""
    start = time.perf_counter()
    clients, contacts = io.StringIO(), io.StringIO()
    with path.open(newline="") as file:
        for name, phone, city, visits in list(csv.reader(file))[1:]:
            client_id = uuid.uuid4()
            clients.write(f"{client_id}\t{name}\t{json.dumps({'city': city, 'visits': visits})}\n")
            contacts.write(f"{client_id}\t{phone}\tt\n")
    with database.conn.cursor() as cursor:
        for target, rows in (("clients (id, name, attributes)", clients), ("contact_relationships", contacts)):
            rows.seek(0)
            cursor.copy_expert(f"COPY {target} FROM STDIN", rows)
    return time.perf_counter() - start
