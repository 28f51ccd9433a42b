"""What each hot statement reads, over two hundred thousand rows of history: what is in hand, and no more.

The statements are the product's own, taken while the jobs run and a device polls and reports.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from conftest import SERVICE_TOKEN, Databases, World

import db
import dispatcher

HISTORY = 200_000  # finished rows of the queue, and sent items
OTHERS = 500  # messages that wait, uncollected, for another device; and pending items of a paused batch
HISTORIES = {"send_queue", "outreach_batch_items"}
# Rows that a statement may read of them: some for each of the handful that is in hand, and nothing like a history.
FEW = 400
# What could be withdrawn, and what waits for each device: these two have the `OTHERS` in hand as well.
ALL_WAITING = ("collected_at IS NULL AND batch_item_id IS NOT NULL", "count(message.id) FILTER")

Statement = tuple[str, Any]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Statement]:
    """Each statement of the jobs (db.query) and of the server (Database.query), before it is run."""
    seen: list[Statement] = []
    query, ask = db.query, db.Database.query

    def spy_jobs(conn: Any, sql: str, params: Any = None) -> list[db.Row]:
        if not sql.startswith(("PREPARE", "EXECUTE")):  # the server's, which the other spy sees
            seen.append((sql, params))
        return query(conn, sql, params)

    def spy_server(database: db.Database, sql: str, params: Any = None) -> list[db.Row]:
        seen.append((sql, params))
        return ask(database, sql, params)

    monkeypatch.setattr(db, "query", spy_jobs)
    monkeypatch.setattr(db.Database, "query", spy_server)
    return seen


def fill(databases: Databases, device: str, other: str) -> None:
    """The history, and what waits for somebody else. The planner's statistics are from before it."""
    rows = """
        INSERT INTO icloud.send_queue
               (device_id, to_handle, body, status, sent_at, collected_at, batch_item_id, created_at)
        SELECT %(device)s, '+14155550123', 'Hello!', 'sent', moment, moment, gen_random_uuid(), moment
          FROM (SELECT now() - n * interval '15 minutes' FROM generate_series(1, %(count)s) AS n) AS past (moment)
    """
    uncollected = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
        SELECT %(device)s, '+14155550123', 'Hello!', gen_random_uuid() FROM generate_series(1, %(count)s)
    """
    items = """
        WITH batch AS (
            INSERT INTO outreach_batches (id, template, status)
            SELECT md5('batch' || n)::uuid, 'hello', 'sent' FROM generate_series(0, 99) AS n
        )
        INSERT INTO outreach_batch_items
               (batch_id, client_id, rendered_body, status, sent_at, send_queue_id, device_id)
        SELECT md5('batch' || n %% 100)::uuid, md5('client' || n %% 500)::uuid, 'Hello!', 'sent',
               now() - n * interval '15 minutes', gen_random_uuid(), %(device)s
          FROM generate_series(1, %(count)s) AS n
    """
    paused = """
        WITH batch AS (
            INSERT INTO outreach_batches (template, status) VALUES ('hello', 'paused') RETURNING id
        )
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
        SELECT batch.id, gen_random_uuid(), 'Hello!' FROM batch, generate_series(1, %(count)s)
    """
    db.query(databases.icloud, rows, {"device": device, "count": HISTORY})
    db.query(databases.icloud, uncollected, {"device": other, "count": OTHERS})
    db.query(databases.quinn, items, {"device": device, "count": HISTORY})
    db.query(databases.quinn, paused, {"count": OTHERS})


def a_day(world: World, base_url: str, mac_sync: dispatcher.MacSync) -> None:
    """Every kind of thing that the jobs and the endpoints do, once: claims left behind, sends, results, a pause."""
    quinn, icloud = world.databases.quinn, world.databases.icloud
    device = requests.Session()
    device.headers["Authorization"] = "Bearer mini"
    nobody = dispatcher.MacSync("http://127.0.0.1:1", SERVICE_TOKEN)
    with device, nobody.session:
        for _ in range(3):
            world.batch(clients=2)
        world.batch(clients=[world.client(handle=None)])
        with contextlib.suppress(dispatcher.Outage):
            dispatcher.dispatch(quinn, icloud, nobody)
        dispatcher.sync(quinn, icloud)
        dispatcher.dispatch(quinn, icloud, mac_sync)
        pending = f"{base_url}/client/imessage/send-queue/pending"
        for item in device.get(pending, timeout=5).json()["data"]["items"]:
            result = f"{base_url}/client/imessage/send-queue/{item['id']}/result"
            device.post(result, json={"status": "sent"}, timeout=5).raise_for_status()
        dispatcher.sync(quinn, icloud)
        dispatcher.dispatch(quinn, icloud, mac_sync)
        world.settings(paused=True)
        dispatcher.sync(quinn, icloud)
        world.settings(paused=False)


def rows_read(conn: Any, sql: str, params: Any) -> tuple[int, list[str]]:
    """The rows that a statement reads of the two histories, and which of those it scans; what it writes is undone."""
    db.query(conn, "BEGIN")
    try:
        [([plan],)] = db.query(conn, "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) " + sql, params)
    finally:
        db.query(conn, "ROLLBACK")
    scans = [node for node in nodes(plan["Plan"]) if node.get("Relation Name") in HISTORIES]
    reads = sum(
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in scans
        if "Scan" in node["Node Type"]
    )
    return int(reads), [node["Relation Name"] for node in scans if node["Node Type"] == "Seq Scan"]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's node and all below it."""
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


def test_a_hot_statement_reads_what_is_in_hand_and_not_the_history(
    world: World, base_url: str, mac_sync: dispatcher.MacSync, spied: list[Statement]
) -> None:
    world.settings(max_per_minute=50, max_per_hour=60, max_per_day=150, min_gap_seconds=1)
    fill(world.databases, world.device("mini"), world.device("other"))
    spied.clear()
    # First as on a day of many messages, with statistics from the day before; then with those of today.
    for statistics in ("stale", "fresh"):
        if statistics == "fresh":
            world.icloud("ANALYZE")
            world.quinn("ANALYZE")
        spied.clear()
        a_day(world, base_url, mac_sync)
        hot = [(sql, params) for sql, params in spied if any(table in sql for table in HISTORIES)]
        kinds = {sql for sql, _ in hot if "INTO outreach" not in sql}
        assert len(kinds) >= 15, "the statements of the two jobs and the three endpoints"
        for sql, params in hot:
            conn = world.databases.icloud if "icloud." in sql else world.databases.quinn
            read, scanned = rows_read(conn, sql, params)
            assert not scanned, f"with {statistics} statistics this scans {scanned}: {sql}"
            in_hand = OTHERS if any(phrase in sql for phrase in ALL_WAITING) else 0
            assert read <= FEW + in_hand, f"with {statistics} statistics this reads {read} rows: {sql}"


def test_a_poll_keeps_its_plan_once_it_is_prepared(world: World, base_url: str, spied: list[Statement]) -> None:
    """PostgreSQL may plan a prepared statement once for all parameters: that plan must be the good one, too."""
    fill(world.databases, world.device("mini"), world.device("other"))
    spied.clear()
    pending = f"{base_url}/client/imessage/send-queue/pending"
    requests.get(pending, headers={"Authorization": "Bearer mini"}, timeout=5).raise_for_status()
    [poll] = spied
    read = """
        SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'send_queue'
    """
    database = db.Database(world.databases.icloud_url)
    database.query("SET plan_cache_mode = force_generic_plan")
    database.query("BEGIN")
    for _ in range(20):
        database.query(*poll)
    [(scanned, fetched)] = database.query(read)
    database.query("ROLLBACK")
    assert scanned == 0
    assert fetched <= FEW
