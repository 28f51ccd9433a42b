"""Check how much each frequent statement reads: it grows with the open work, under any statistics of the planner.

The statements are the product's own, recorded while the jobs run and a device polls and reports. Then EXPLAIN ANALYZE
counts the rows and the buffers that each of them reads, under statistics that are missing, stale and fresh.
"""

import contextlib
import functools
import json
from typing import Any, NamedTuple

import pytest
import requests
from helpers import plan_nodes, record_statements
from testing import SERVICE_TOKEN, Databases, DeviceClient, TestData

import audience
import db
import dispatcher
import metrics

HISTORY = 100_000  # finished rows of the queue, and sent items
ENDED_BADLY = 10_000  # of each: items of unknown outcome, of long ago; opt-outs, active and ended
OTHERS = 500  # messages that wait, uncollected, for another device; and pending items of a paused batch
BATCHES, ITEMS = 100, 100  # sending batches, and pending items of each
TABLES = {"send_queue", "outreach_batch_items", "contact_relationships", "opt_outs", "clients"}
# The audience of each composed batch, which the dispatcher checks again. Everybody is in it.
AUDIENCE = {
    "v": 1,
    "where": {"all": [{"not": {"field": "city", "eq": "Rome"}}, {"field": "handle.prefix", "eq": "+1"}]},
}
# What one statement may read: some rows and pages for each batch and for the handful that is in hand.
MAX_ROWS = 6 * BATCHES
MAX_BUFFERS = 40 * BATCHES
# What could be withdrawn, and what waits for each device: these two have the `OTHERS` in hand as well.
ALL_WAITING = ("drafted_at IS NOT NULL", "count(message.id) FILTER")

Statement = tuple[str, Any]


class Work(NamedTuple):
    """The rows and pages that a statement read, and those of TABLES that it scanned in full."""

    rows: int
    buffers: int
    scanned: list[str]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Statement]:
    """Each statement of the jobs and of the server, before it is run."""
    return record_statements(monkeypatch)


def fill_history(databases: Databases, device: str) -> None:
    rows = """
        INSERT INTO icloud.send_queue
               (device_id, to_handle, body, status, sent_at, collected_at, batch_item_id, created_at, updated_at)
        SELECT %(device)s, '+14155550123', 'Hello!', 'sent', moment, moment, gen_random_uuid(), moment, moment
          FROM (SELECT now() - n * interval '15 minutes' FROM generate_series(1, %(count)s) AS n) AS past (moment)
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
    unknown = """
        INSERT INTO outreach_batch_items
               (batch_id, client_id, rendered_body, status, outcome_unknown_at, queued_at, send_queue_id, device_id)
        SELECT md5('batch' || n %% 100)::uuid, md5('client' || n %% 500)::uuid, 'Hello!', 'failed',
               now() - interval '9 days' - n * interval '1 minute', now() - interval '9 days', gen_random_uuid(),
               %(device)s
          FROM generate_series(1, %(count)s) AS n
    """
    opt_outs = """
        INSERT INTO icloud.opt_outs (handle_key, word, source, device_id, received_at, created_at, ended_at, ended_by)
        SELECT '+1212555' || lpad(n::text, 5, '0'), 'STOP', 'reply', %(device)s, moment, moment,
               CASE ended WHEN 1 THEN moment END, CASE ended WHEN 1 THEN 'START' END
          FROM generate_series(1, %(count)s) AS n, generate_series(0, 1) AS ended,
               LATERAL (SELECT now() - interval '1 day' - (2 * n + ended) * interval '1 minute') AS past (moment)
    """
    db.query(databases.icloud, rows, {"device": device, "count": HISTORY})
    db.query(databases.quinn, items, {"device": device, "count": HISTORY})
    db.query(databases.quinn, unknown, {"device": device, "count": ENDED_BADLY})
    db.query(databases.icloud, opt_outs, {"device": device, "count": ENDED_BADLY})


def fill_waiting(databases: Databases, other: str) -> None:
    """Insert rows that wait for another device, a paused batch, and many sending batches, half of them composed."""
    uncollected = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, handle_key)
        SELECT %(device)s, '+14155550123', 'Hello!', gen_random_uuid(), '+1312555' || n
          FROM generate_series(1, %(count)s) AS n
    """
    paused = """
        WITH batch AS (
            INSERT INTO outreach_batches (template, status) VALUES ('hello', 'paused') RETURNING id
        )
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
        SELECT batch.id, gen_random_uuid(), 'Hello!' FROM batch, generate_series(1, %(count)s)
    """
    clients = """
        WITH client AS (
            INSERT INTO clients (id, name, attributes)
            SELECT md5('client' || n)::uuid, n, '{"city": "Berlin"}' FROM generate_series(1, 10000) AS n
            ON CONFLICT DO NOTHING
            RETURNING id, name AS n
        )
        INSERT INTO contact_relationships (client_id, handle, is_primary)
        SELECT id, '+14157' || to_char(n::integer, 'FM000000'), true FROM client
         UNION ALL
        SELECT id, n || '@example.com', false FROM client
    """
    sending = """
        WITH batch AS (
            INSERT INTO outreach_batches (template, status, digest, approved_at, first_n, not_sent_within_days,
                                          query_json)
            SELECT 'hello', 'sending', CASE WHEN n %% 2 = 0 THEN 'digest' END, now() - interval '1 hour', 1000,
                   CASE n WHEN 2 THEN 30 END,
                   %(audience)s
              FROM generate_series(1, %(batches)s) AS n
            RETURNING id, digest
        )
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, created_at, handle_key)
        SELECT batch.id, md5('client' || n)::uuid, 'Hello!', now() + n * interval '1 microsecond',
               CASE WHEN digest IS NOT NULL THEN '+14157' || to_char(n, 'FM000000') END
          FROM batch, generate_series(1, %(items)s) AS n
    """
    db.query(databases.icloud, uncollected, {"device": other, "count": OTHERS})
    db.query(databases.quinn, paused, {"count": OTHERS})
    db.query(databases.quinn, clients)
    query = audience.parse(AUDIENCE, audience.read_fields(databases.quinn))
    db.query(databases.quinn, sending, {"batches": BATCHES, "items": ITEMS, "audience": json.dumps(query)})


def run_a_day(world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient) -> None:
    """Do everything that the jobs and the endpoints do, once: claims left behind, sends, results, a pause."""
    quinn, icloud = world.databases.quinn, world.databases.icloud
    device = requests.Session()
    device.headers["Authorization"] = "Bearer mini"
    nobody = dispatcher.SendQueueClient("http://127.0.0.1:1", SERVICE_TOKEN)
    with device, nobody.session:
        world.batch(clients=[world.client(handle=None)])
        with contextlib.suppress(dispatcher.ServerUnavailable):
            dispatcher.dispatch(quinn, icloud, nobody)
        dispatcher.sync(quinn, icloud)
        dispatcher.dispatch(quinn, icloud, mac_sync)
        run_the_mac(world, base_url)
        pending = f"{base_url}/client/imessage/send-queue/pending"
        for item in device.get(pending, timeout=5).json()["data"]["items"][:3]:
            result = f"{base_url}/client/imessage/send-queue/{item['id']}/result"
            device.post(result, json={"status": "sent"}, timeout=5).raise_for_status()
        dispatcher.sync(quinn, icloud)
        dispatcher.dispatch(quinn, icloud, mac_sync)
        world.settings(paused=True)
        dispatcher.sync(quinn, icloud)
        world.settings(paused=False)


def run_the_mac(world: TestData, base_url: str) -> None:
    """Do what a Mac does that peeks: each outcome, what comes later, a STOP, and a START."""
    with world.databases.icloud.cursor() as past_the_spy:  # what an earlier day's poll collected would be refused
        past_the_spy.execute(
            "UPDATE icloud.send_queue SET status = 'failed' WHERE status = 'queued' AND collected_at < now()"
        )
    mac = DeviceClient(base_url, "mini")
    mac.health(None)
    outcomes: list[dict[str, str]] = [
        {"status": "sent"}, {"status": "failed", "outcome": "unknown"}, {"status": "failed", "outcome": "unknown"},
        {"status": "failed", "outcome": "not_started"}, {"status": "failed"},
    ]  # fmt: skip
    ids = [item["id"] for item in mac.peek()["items"]]
    for row_id, outcome in zip(ids, outcomes, strict=False):
        mac.collect(row_id).raise_for_status()
        mac.result(row_id, **outcome).raise_for_status()
    mac.result(ids[0], deliveredAt="2026-04-22T12:00:00Z").raise_for_status()
    mac.result(ids[1]).raise_for_status()
    world.batch(clients=[world.client(f"opted.out.{number}@example.com") for number in range(3)])
    for number in range(3):
        mac.opt_out(f"opted.out.{number}@example.com").raise_for_status()
    mac.opt_out("opted.out.0@example.com", "START", "2026-04-22T13:00:00Z").raise_for_status()


def explain(conn: Any, sql: str, params: Any, tables: set[str] = TABLES) -> Work:
    """Run a statement, undo what it wrote, and return what it read."""
    db.query(conn, "BEGIN")
    try:
        [([plan],)] = db.query(conn, "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + sql, params)
    finally:
        db.query(conn, "ROLLBACK")
    scans = [node for node in plan_nodes(plan["Plan"]) if node.get("Relation Name") in tables]
    rows = sum(
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in scans
        if "Scan" in node["Node Type"]
    )
    buffers = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
    return Work(int(rows), buffers, [node["Relation Name"] for node in scans if node["Node Type"] == "Seq Scan"])


def test_frequent_statement_reads_only_open_work(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient, spied: list[Statement]
) -> None:
    world.settings(max_per_minute=400, max_per_hour=600, max_per_day=1500, min_gap_seconds=1)
    fill_history(world.databases, world.device("mini"))
    other = world.device("other")
    fill_waiting(world.databases, other)
    check_a_day(world, base_url, mac_sync, spied, "missing")
    empty_waiting(world)
    analyze(world)
    fill_waiting(world.databases, other)
    check_a_day(world, base_url, mac_sync, spied, "stale")
    empty_waiting(world)
    fill_waiting(world.databases, other)
    analyze(world)
    check_a_day(world, base_url, mac_sync, spied, "fresh")


def test_choice_among_sleeping_recipients_reads_only_who_may_go(
    world: TestData, mac_sync: dispatcher.SendQueueClient, spied: list[Statement]
) -> None:
    """Ten thousand pending items of 25 zones: messages go from 12:00 to 14:00, so in two or three of them."""
    world.settings(
        quiet_hours_of="recipient", quiet_hours_start="14:00", quiet_hours_end="12:00", quiet_hours_tz="UTC",
        max_new_contacts_per_day=1000, max_per_client_per_week=5, max_per_minute=None, max_per_hour=None,
    )  # fmt: skip
    clients = """
        UPDATE clients SET time_zone = 'Etc/GMT' || CASE WHEN zone < 0 THEN zone::text ELSE '+' || zone END
          FROM (SELECT id, get_byte(uuid_send(id), 0) %% 25 - 12 AS zone FROM clients) AS of_client
         WHERE clients.id = of_client.id
    """
    zones = """
        UPDATE outreach_batch_items AS item
           SET time_zones = ARRAY[time_zone], new_contact = get_byte(uuid_send(clients.id), 1) %% 2 = 0
          FROM clients
         WHERE clients.id = client_id AND item.status = 'pending'
           AND batch_id IN (SELECT id FROM outreach_batches WHERE status = 'sending')
    """
    fill_history(world.databases, world.device("mini"))
    fill_waiting(world.databases, world.device("other"))
    world.quinn(clients)
    world.quinn(zones)
    world.settings(min_gap_seconds=None, max_per_day=None)
    quinn, icloud = world.databases.quinn, world.databases.icloud
    for statistics in ("missing", "fresh"):
        spied.clear()
        dispatcher.sync(quinn, icloud)
        assert dispatcher.dispatch(quinn, icloud, mac_sync)["queued"] > 0
        for sql, params in [(sql, params) for sql, params in spied if any(table in sql for table in TABLES)]:
            work = explain(icloud if "icloud." in sql else quinn, sql, params)
            assert not work.scanned, f"with {statistics} statistics this scans {work.scanned}: {sql}"
            in_hand = OTHERS if any(phrase in sql for phrase in ALL_WAITING) else 0
            assert work.rows <= 4 * MAX_ROWS + in_hand, f"with {statistics} statistics: {work.rows} rows: {sql}"
        analyze(world)


def test_scrape_reads_only_open_work(world: TestData, spied: list[Statement]) -> None:
    """Count over a history with many ended batches, whose items of the cancelled ones are still pending."""
    ended = """
        INSERT INTO outreach_batches (template, status)
        SELECT 'hello', CASE n %% 2 WHEN 0 THEN 'sent' ELSE 'cancelled' END FROM generate_series(1, 10000) AS n
    """
    left = """
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
        SELECT id, gen_random_uuid(), 'Hello!' FROM outreach_batches WHERE status = 'cancelled'
    """
    world.settings(max_per_minute=400, max_per_hour=600, max_per_day=1500)
    fill_history(world.databases, world.device("mini"))
    other = world.device("other")
    world.quinn(ended)
    world.quinn(left)
    fill_waiting(world.databases, other)
    check_scrape(world, spied, "missing")
    empty_waiting(world)
    analyze(world)
    fill_waiting(world.databases, other)
    check_scrape(world, spied, "stale")
    analyze(world)
    check_scrape(world, spied, "fresh")


def check_scrape(world: TestData, spied: list[Statement], statistics: str) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    for conn in (quinn, icloud):
        db.query(conn, "SET enable_seqscan = off")  # as both servers do
    spied.clear()
    metrics.render([*metrics.queue(functools.partial(db.query, icloud)), *metrics.outreach(quinn)])
    statements = list(spied)
    assert len(statements) == 6
    for sql, params in statements:
        work = explain(icloud if "icloud." in sql else quinn, sql, params, TABLES | {"outreach_batches"})
        pending = BATCHES * ITEMS if "ARRAY(SELECT id FROM outreach_batches" in sql else 0
        limit = 1500 if "max_per_day" in sql else 0  # the sends of the last day, at most max_per_day of them
        assert not work.scanned, f"with {statistics} statistics this scans {work.scanned}: {sql}"
        bound = MAX_ROWS + OTHERS + pending + limit
        assert work.rows <= bound, f"with {statistics} statistics this reads {work.rows} rows: {sql}"
        assert work.buffers <= MAX_BUFFERS, f"with {statistics} statistics this reads {work.buffers} pages: {sql}"


def empty_waiting(world: TestData) -> None:
    world.icloud("DELETE FROM icloud.send_queue WHERE status = 'queued'")
    world.quinn("DELETE FROM outreach_batches WHERE status IN ('sending', 'paused')")


def analyze(world: TestData) -> None:
    world.icloud("ANALYZE")
    world.quinn("ANALYZE")


def check_a_day(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient, spied: list[Statement], statistics: str
) -> None:
    spied.clear()
    run_a_day(world, base_url, mac_sync)
    hot = [(sql, params) for sql, params in spied if any(table in sql for table in TABLES)]
    kinds = {sql for sql, _ in hot if "INTO outreach" not in sql}
    assert len(kinds) >= 37, "the statements of the two jobs and of the endpoints"
    for part in (
        "FROM clients AS client\n         WHERE client.id = ANY (%(client_ids)s::",
        "unnest(%(keys)s::text[]) AS key",
    ):
        assert any(part in sql for sql in kinds), "the last checks of composed batches"
    for sql, params in hot:
        conn = world.databases.icloud if "icloud." in sql else world.databases.quinn
        work = explain(conn, sql, params)
        assert not work.scanned, f"with {statistics} statistics this scans {work.scanned}: {sql}"
        in_hand = OTHERS if any(phrase in sql for phrase in ALL_WAITING) else 0
        assert work.rows <= MAX_ROWS + in_hand, f"with {statistics} statistics this reads {work.rows} rows: {sql}"
        assert work.buffers <= MAX_BUFFERS, f"with {statistics} statistics this reads {work.buffers} pages: {sql}"


@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed while empty"])
@pytest.mark.parametrize("plan", ["force_generic_plan", "force_custom_plan"])
def test_plan_prepared_over_empty_tables_stays_good(
    world: TestData, base_url: str, spied: list[Statement], plan: str, analyzed: bool
) -> None:
    """A fresh install prepares its statements while nothing is in the tables, and keeps these plans until ANALYZE."""
    database = db.RetryingConnection(world.databases.icloud_url)
    database.query(f"SET plan_cache_mode = {plan}")
    device, other = world.device("mini"), world.device("other")
    mac = {"Authorization": "Bearer mini"}
    message = {"batchItemId": device, "deviceId": device, "toHandle": "+14155550123", "body": "Hello!"}
    service = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    world.icloud("UPDATE icloud.devices SET last_seen_at = now()")
    spied.clear()
    requests.get(f"{base_url}/client/imessage/send-queue/pending", headers=mac, timeout=5).raise_for_status()
    requests.post(f"{base_url}/admin/send-queue/enqueue", headers=service, json=message, timeout=5).raise_for_status()
    [(row_id,)] = world.icloud("SELECT id FROM icloud.send_queue")
    result = f"{base_url}/client/imessage/send-queue/{row_id}/result"
    requests.post(result, headers=mac, json={"status": "sent"}, timeout=5).raise_for_status()
    run_the_others(world, base_url, row_id)
    # The product's begin with a new line, the test's do not.
    of_product = [(sql, params) for sql, params in spied if sql.startswith("\n")]
    statements = [(sql, params) for sql, params in of_product if "send_queue" in sql or "opt_outs" in sql]
    assert len({sql for sql, _ in statements}) == 10
    world.icloud("TRUNCATE icloud.send_queue, icloud.opt_outs")
    if analyzed:
        world.icloud("VACUUM ANALYZE icloud.send_queue")
        world.icloud("VACUUM ANALYZE icloud.opt_outs")
    for sql, params in statements:
        database.query(sql, params)  # planned now
    world.icloud("DELETE FROM icloud.send_queue")
    world.icloud("DELETE FROM icloud.opt_outs")
    rows = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, handle_key)
        SELECT %(device)s, '+14155550123', 'Hello!', gen_random_uuid(), n FROM generate_series(1, %(count)s) AS n
    """
    opt_outs = """
        INSERT INTO icloud.opt_outs (handle_key, word, source, device_id, received_at)
        SELECT n + 20, 'STOP', 'reply', %(device)s, now() FROM generate_series(1, %(count)s) AS n
    """
    world.icloud(rows, device=other, count=50_000)
    world.icloud(rows, device=device, count=10)
    world.icloud(opt_outs, device=device, count=50_000)
    read = """
        SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables
         WHERE relname IN ('send_queue', 'opt_outs')
    """
    for sql, params in statements:
        database.query("BEGIN")
        database.query(sql, params)
        [(count,)] = database.query(read)
        database.query("ROLLBACK")
        assert count <= 100, f"prepared over an empty table, this reads {count} rows: {sql}"


def run_the_others(world: TestData, base_url: str, row_id: str) -> None:
    """Ask what only a Mac asks that peeks: a row without a key, a collect, an outcome that is found out, opt-outs."""
    mac = DeviceClient(base_url, "mini")
    world.set_row(row_id, "status = 'queued', sent_at = NULL, handle_key = NULL")
    mac.peek()
    mac.collect(row_id).raise_for_status()
    mac.result(row_id, "failed", outcome="unknown").raise_for_status()
    mac.result(row_id).raise_for_status()
    mac.opt_out().raise_for_status()
    mac.opt_out(word="START").raise_for_status()
