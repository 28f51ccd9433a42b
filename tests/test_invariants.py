"""Check each rule that always holds, in one test each. The other files have the details."""

import contextlib
import logging
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import requests
from helpers import (
    HANDLE,
    LOCK_WAITS,
    Crash,
    CrashingClient,
    plan_nodes,
    poll,
    record_statements,
    report_all,
    row_statuses,
    run_dispatch,
    start_quiet_hours,
    sync,
    tick,
    zone_at,
)
from testing import SERVICE_TOKEN, DeviceClient, Script, TestData, wait_until

import composing
import db
import dispatcher
from report import report as read_report


def test_1_kills_after_commit_leave_one_row(world: TestData, server: tuple[Script, str], base_url: str) -> None:
    device_id, item_id = world.device("mini"), world.item(world.batch())
    # The server dies while its INSERT waits for a rival's of the same item. When that is rolled back, PostgreSQL
    # commits the server's all the same, for nobody.
    insert = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
        VALUES (%(device_id)s, '+14155550123', 'Hello!', %(item_id)s)
    """
    with contextlib.closing(db.connect(world.databases.icloud_url)) as rival, ThreadPoolExecutor() as threads:
        rival.autocommit = False
        db.query(rival, insert, {"device_id": device_id, "item_id": item_id})
        asked = threads.submit(tick, world, dispatcher.SendQueueClient(server[1], SERVICE_TOKEN))
        wait_until(lambda: world.icloud(LOCK_WAITS), 2)
        server[0].process.kill()
        with pytest.raises(dispatcher.ServerUnavailable):
            asked.result(10)
        rival.rollback()
    wait_until(lambda: world.icloud("SELECT 1 FROM icloud.send_queue"))
    # The next tick finds that row, and sends no request.
    tick(world, dispatcher.SendQueueClient("http://127.0.0.1:1", SERVICE_TOKEN))
    assert world.statuses() == ["queued"]
    # The dispatcher dies between the response of the next server and the record of it.
    world.batch(clients=1)
    victim = CrashingClient(base_url, SERVICE_TOKEN)
    victim.crash = True
    with pytest.raises(Crash):
        tick(world, victim)
    assert report_all(base_url, "mini") == 2
    # The next dispatcher finds the message sent by then.
    tick(world, dispatcher.SendQueueClient(base_url, SERVICE_TOKEN))
    sync(world)
    assert row_statuses(world) == [("sent", False)] * 2
    assert world.statuses() == ["sent"] * 2


def test_2_each_item_ends_with_reason_or_waits(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    clients = [
        world.client(),
        world.client(handle=None),
        world.client("no handle at all"),
        world.client(),
        world.client(),
    ]
    batch_id = world.batch(clients)
    stopped = world.batch(clients=1, status="paused")
    for turn in range(6):
        run_dispatch(dispatcher.SendQueueClient("http://127.0.0.1:1", SERVICE_TOKEN))
        sync(world)
        tick(world, mac_sync)
        report_all(base_url, "mini", "failed" if turn == 0 else "sent")
        sync(world)
    assert world.statuses(batch_id) == ["failed", "skipped", "failed", "sent", "sent"]
    assert world.statuses(stopped) == ["pending"]
    ended = "SELECT failure_reason IS NOT NULL FROM outreach_batch_items WHERE status IN ('failed', 'skipped')"
    assert world.quinn(ended) == [(True,)] * 3


def test_3_limit_holds_while_device_is_off(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    world.settings(max_per_minute=2, max_per_hour=3)
    for _ in range(5):
        world.batch(clients=5)
    for _ in range(5):
        tick(world, mac_sync)
        world.quinn(
            "UPDATE outreach_batch_items SET queued_at = queued_at - interval '5 hours' WHERE status = 'queued'"
        )
        sync(world)
    assert report_all(base_url, "mini") == 2  # all that the device finds when it is on again
    sync(world)
    tick(world, mac_sync)
    assert poll(base_url, "mini") == []  # the minute's two are sent
    world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - interval '1 minute' WHERE status = 'sent'")
    tick(world, mac_sync)
    assert len(poll(base_url, "mini")) == 1  # the hour has a place for one


def test_4_quiet_hours_and_pause_stop_collection(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    batch_id = world.batch(clients=1)
    world.settings(quiet_hours_start="03:00", quiet_hours_end="03:01", quiet_hours_tz="UTC")
    tick(world, mac_sync)
    # Quiet hours start, and no dispatcher runs.
    world.icloud("UPDATE icloud.send_queue SET valid_until = now() WHERE valid_until IS NOT NULL")
    assert poll(base_url, "mini") == []
    start_quiet_hours(world)
    sync(world)
    assert not +tick(world, mac_sync)
    world.settings(quiet_hours_start=None, quiet_hours_end=None)
    tick(world, mac_sync)
    world.settings(paused=True)
    sync(world)
    assert poll(base_url, "mini") == []
    assert world.statuses(batch_id) == ["pending"]


def test_5_recorded_result_never_changes(world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device("mini")
    world.batch(clients=1)
    tick(world, mac_sync)
    [message] = poll(base_url, "mini")
    recorded = []
    for status, code in (("sent", 200), ("sent", 200), ("failed", 409)):
        response = requests.post(
            f"{base_url}/client/imessage/send-queue/{message['id']}/result",
            json={"status": status, "error": "late"},
            headers={"Authorization": "Bearer mini"},
            timeout=5,
        )
        assert response.status_code == code
        recorded.append(world.icloud("SELECT * FROM icloud.send_queue"))
        world.settings(paused=True)
        sync(world)
    assert recorded[0] == recorded[1] == recorded[2] == world.icloud("SELECT * FROM icloud.send_queue")
    assert world.statuses() == ["sent"]


def test_6_device_sees_and_changes_only_its_rows(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    world.device("stranger")
    world.batch(clients=1)
    tick(world, mac_sync)
    before = world.icloud("SELECT * FROM icloud.send_queue")
    assert poll(base_url, "stranger") == []
    responses = [
        requests.post(
            f"{base_url}/client/imessage/send-queue/{row_id}/result",
            json={"status": "sent"},
            headers={"Authorization": "Bearer stranger"},
            timeout=5,
        )
        for row_id in (before[0][0], uuid.uuid4())
    ]
    assert [response.status_code for response in responses] == [404, 404]
    assert responses[0].content == responses[1].content
    assert world.icloud("SELECT * FROM icloud.send_queue") == before


def test_7_failing_job_stops_no_job(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPATCH_INTERVAL_SECONDS", "1")
    world.item(world.batch(), status="failed")
    world.icloud("ALTER TABLE icloud.send_queue RENAME valid_until TO away")  # which breaks the sync job
    daemon = threading.Thread(target=dispatcher.run_forever, args=(SERVICE_TOKEN,))
    daemon.start()
    try:
        wait_until(lambda: world.quinn("SELECT 1 FROM outreach_batches WHERE status = 'sent'"))
        world.icloud("ALTER TABLE icloud.send_queue RENAME away TO valid_until")
        wait_until(lambda: world.quinn("SELECT 1 FROM outreach_settings WHERE last_synced_at IS NOT NULL"))
    finally:
        dispatcher.stop.set()
        daemon.join()


def test_8_no_statement_scans_the_history(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    history(world)
    world.settings(max_per_minute=50, max_per_day=100_000, min_gap_seconds=1)
    for _ in range(3):
        world.batch(clients=2)
    item_id = world.item(world.batch(), status="queued")
    statements = record_statements(monkeypatch)
    with contextlib.suppress(dispatcher.ServerUnavailable):
        tick(world, dispatcher.SendQueueClient("http://127.0.0.1:1", SERVICE_TOKEN))  # leaves claims behind
    sync(world)
    tick(world, mac_sync)
    report_all(base_url, "mini")
    sync(world)
    monkeypatch.undo()
    assert world.quinn("SELECT status FROM outreach_batch_items WHERE id = %(id)s", id=item_id) == [("failed",)]
    assert len({sql for sql, _ in statements}) > 15
    for sql, params in statements:
        if sql.startswith("SET "):
            continue
        look = world.databases.icloud if "icloud." in sql else world.databases.quinn
        [([plan],)] = db.query(look, "EXPLAIN (FORMAT JSON) " + sql, params)
        reads = [
            node
            for node in plan_nodes(plan["Plan"])
            if node.get("Relation Name") in ("send_queue", "outreach_batch_items")
        ]
        assert not [node for node in reads if node["Node Type"] == "Seq Scan"], sql
        whole = [
            node["Index Name"] for node in plan_nodes(plan["Plan"]) if "Index Name" in node and "Index Cond" not in node
        ]
        assert not [name for name in whole if name not in ALIVE], (sql, whole)


# Indexes that hold only rows in flight: a plan may read all of them.
ALIVE = {"send_queue_uncollected", "send_queue_waiting", "outreach_batch_items_queued", "outreach_batch_items_claimed",
         "outreach_batches_sending"}  # fmt: skip


def history(world: TestData) -> None:
    """Insert 20,000 messages sent in 200 batches over 200 days, and 5,000 of a paused batch."""
    device_id = world.device("mini")
    rows = """
        INSERT INTO icloud.send_queue
               (id, device_id, to_handle, body, status, sent_at, collected_at, batch_item_id, created_at)
        SELECT md5('row' || n)::uuid, %(device)s, '+14155550123', 'Hello!', 'sent', sent_at, sent_at,
               md5('item' || n)::uuid, sent_at
          FROM generate_series(1, 20000) AS n, LATERAL (SELECT now() - n * interval '15 minutes') AS once (sent_at)
    """
    batches = """
        INSERT INTO outreach_batches (id, template, status)
        SELECT md5('batch' || n)::uuid, 'hello', 'sent' FROM generate_series(0, 199) AS n
    """
    items = """
        INSERT INTO outreach_batch_items
               (id, batch_id, client_id, rendered_body, status, sent_at, send_queue_id, device_id)
        SELECT md5('item' || n)::uuid, md5('batch' || n / 101)::uuid, md5('client' || n %% 500)::uuid, 'Hello!', 'sent',
               now() - n * interval '15 minutes', md5('row' || n)::uuid, %(device)s
          FROM generate_series(1, 20000) AS n
    """
    waiting = """
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
        SELECT %(batch)s, md5('client' || n %% 500)::uuid, 'Hello!' FROM generate_series(1, 5000) AS n
    """
    world.icloud(rows, device=device_id)
    world.quinn(waiting, batch=world.batch(status="paused"))
    world.quinn(batches)
    world.quinn(items, device=device_id)
    world.icloud("ANALYZE")
    world.quinn("ANALYZE")


def test_9_logs_hide_token_body_and_handle(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = (HANDLE, "Hello!", SERVICE_TOKEN, "mini-token", "stolen-token")
    world.device("mini", token="mini-token")
    world.batch(clients=[world.client(HANDLE), world.client(HANDLE)])
    refused = dispatcher.SendQueueClient(base_url, "stolen-token-0123456789")
    with contextlib.suppress(dispatcher.ServerUnavailable):
        tick(world, refused)
    for status in ("sent", "failed"):
        tick(world, mac_sync)
        report_all(base_url, "mini-token", status, error=" ".join(secrets))
        sync(world)
    for body in (f"Hello! {HANDLE}", f'{{"toHandle": "{HANDLE}", "body": "Hello!"'):
        headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
        requests.post(f"{base_url}/admin/send-queue/enqueue", data=body, headers=headers, timeout=5)
    assert sorted(world.statuses()) == ["failed", "sent"]
    for event in ("item queued to mac-sync", "message enqueued", "result recorded", "request refused"):
        assert event in caplog.text
    assert not [secret for secret in secrets if secret in caplog.text]


def test_10_bad_input_gets_4xx_and_writes_nothing(world: TestData, base_url: str) -> None:
    device_id = world.device("mini")
    good: dict[str, Any] = {
        "batchItemId": str(uuid.uuid4()), "deviceId": device_id, "toHandle": "+14155550123", "body": "Hello!",
    }  # fmt: skip
    wrong: list[Any] = [None, "", 0, True, [], {}, "\0", "\ud800", "x" * 70_000]
    bodies: list[Any] = [
        {**good, name: value} for name in good for value in wrong if (name, value) != ("body", "x" * 70_000)
    ]
    bodies += [{name: value for name, value in good.items() if name != left_out} for left_out in good]
    bodies += [
        {**good, "deviceId": str(uuid.uuid4())},
        {**good, "validUntil": "tomorrow"},
        {**good, "body": "x" * 70_000},
    ]
    bodies += [b"", b"null", b"[]", b"{", b'"text"', b"\xff", b"[" * 60_000, b"1e999", b"NaN"]
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    with requests.Session() as session:
        for body in bodies:
            content = {"data": body} if isinstance(body, bytes) else {"json": body}
            response = session.post(f"{base_url}/admin/send-queue/enqueue", headers=headers, timeout=5, **content)
            assert 400 <= response.status_code < 500, body
            assert response.json()["success"] is False
            assert len(response.json()["error"]) > 10
    mac = {"Authorization": "Bearer mini"}
    row_id = world.row(device_id)
    for path, body in BAD_FROM_DEVICES:
        response = requests.post(
            f"{base_url}/client/imessage/{path.format(id=row_id)}", headers=mac, json=body, timeout=5
        )
        assert 400 <= response.status_code < 500, (path, body)
        assert len(response.json()["error"]) > 10
    assert row_statuses(world) == [("queued", False)]
    assert world.icloud("SELECT collected_at FROM icloud.send_queue") == [(None,)]
    assert world.icloud("SELECT problem, instance, opt_outs FROM icloud.devices") == [(None, None, 0)]


BAD_FROM_DEVICES: list[tuple[str, Any]] = [
    *(("send-queue/{id}/collect", body) for body in ({}, {"collectId": "1", "instance": "a"}, {"collectId": None})),
    *(("send-queue/{id}/result", body) for body in ({}, {"status": "sent", "outcome": "unknown"}, {"status": None})),
    *(("health", body) for body in ({}, {"problem": 1}, {"problem": ""}, {"problem": None, "version": "\0"})),
    *(("opt-outs", {"handle": "+14155550123", "word": word, "receivedAt": at})
      for word, at in (("maybe", "2026-04-22T12:00:00Z"), ("STOP", "today"), (None, None))),
]  # fmt: skip


def test_11_what_may_have_been_sent_is_sent_again_only_when_somebody_asks_for_it_by_name(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    batch_id = world.batch(clients=1)
    tick(world, mac_sync)
    [item] = mini.peek()["items"]
    mini.collect(item["id"])
    mini.result(item["id"], "failed", outcome="unknown", error="no trace of it")
    for _ in range(3):  # however often the jobs run, and whatever else is retried
        sync(world)
        tick(world, mac_sync)
        assert dispatcher.run_retry(batch_id) == 0
        assert mini.peek()["items"] == []
        assert read_report(timedelta(seconds=30)).warnings == ["1 message whose outcome is unknown: look at the Mac"]
    assert dispatcher.run_retry(batch_id, include_unknown=True) == 0
    tick(world, mac_sync)
    assert [again["attempt"] for again in mini.peek()["items"]] == [2]


def test_12_nothing_is_collected_for_a_handle_after_its_opt_out_is_recorded(
    world: TestData, mini: DeviceClient, base_url: str, device_id: str
) -> None:
    """Rows come and go while the person opts out: what is collected after the response was collected before it."""
    url = f"{base_url}/admin/send-queue/enqueue"
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    ended = threading.Event()

    def enqueue_and_collect(collect: bool) -> None:
        while not ended.is_set():
            message = {"batchItemId": str(uuid.uuid4()), "deviceId": device_id, "toHandle": HANDLE, "body": "Hello!"}
            requests.post(url, json=message, headers=headers, timeout=5)
            for item in mini.peek()["items"] if collect else mini.poll():
                mini.collect(item["id"])

    with ThreadPoolExecutor(6) as threads:
        for turn in range(5):
            ended.clear()
            running = [threads.submit(enqueue_and_collect, collect) for collect in (True, False, True, False)]
            wait_until(lambda: world.icloud("SELECT 1 FROM icloud.send_queue WHERE collected_at IS NOT NULL"))
            assert mini.opt_out(HANDLE, at=f"2026-04-22T12:00:0{turn}Z").status_code == 200
            [(collected,)] = world.icloud("SELECT count(*) FROM icloud.send_queue WHERE collected_at IS NOT NULL")
            ended.set()
            for each in running:
                each.result(10)
            after = "SELECT count(*) FROM icloud.send_queue WHERE collected_at IS NOT NULL"
            assert world.icloud(after) == [(collected,)]
            mini.opt_out(HANDLE, "START", "2026-04-22T13:00:00Z")
            world.icloud("DELETE FROM icloud.send_queue")


PEOPLE = {"v": 1, "where": {"everyone": True}}


def draft(world: TestData, **wanted: Any) -> composing.Draft:
    request = composing.Request(**{"id": uuid.uuid4(), "query": PEOPLE, "template": "Hi {{ client.name }}!", **wanted})
    return composing.draft(world.databases.quinn, world.databases.icloud, request, timedelta(seconds=30))


def named(world: TestData, name: str, handle: str) -> str:
    client_id = world.client(handle)
    world.quinn("UPDATE clients SET name = %(name)s WHERE id = %(id)s", name=name, id=client_id)
    return client_id


def send_all(world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient) -> list[tuple[str, str]]:
    """Run both jobs and the device until nothing is left; return what the device sent."""
    sent = []
    for _ in range(10):
        sync(world)
        tick(world, mac_sync)
        for item in mini.poll():
            sent.append((item["toHandle"], item["body"]))
            mini.result(item["id"], "sent")
    return sorted(sent)


def test_13_what_is_sent_is_what_was_approved(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    people = {name: named(world, name, f"+1415555{number:04}") for number, name in enumerate("ABCDEF")}
    made = draft(world)
    approved = world.quinn("SELECT handle_key, rendered_body FROM outreach_batch_items ORDER BY handle_key")
    assert {(preview.handle, preview.body) for preview in made.previews} <= set(approved)
    composing.send(world.databases.quinn, made.id, made.digest, made.items)
    world.quinn("UPDATE clients SET name = 'Z'")
    world.quinn("UPDATE contact_relationships SET handle = '+1 415 555 0001' WHERE client_id = %(id)s", id=people["B"])
    world.quinn("UPDATE contact_relationships SET handle = '+14155559999' WHERE client_id = %(id)s", id=people["C"])
    world.quinn("DELETE FROM contact_relationships WHERE client_id = %(id)s", id=people["D"])
    world.quinn("DELETE FROM clients WHERE id = %(id)s", id=people["E"])
    mini.opt_out("+14155550005")
    world.item(made.id, named(world, "G", "+14155550006"))  # by hand, after the approval
    named(world, "H", "+14155550007")  # the audience has one more
    assert send_all(world, mini, mac_sync) == approved[:2]
    assert world.quinn("SELECT count(*) FROM outreach_batch_items WHERE failure_reason IS NOT NULL") == [(5,)]


def test_14_nobody_gets_a_batch_twice(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, base_url: str
) -> None:
    for handle in ("+14155550001", "+1 (415) 555-0001", "001 415 555 0001", "+1-415-555-0001", "a@example.com"):
        named(world, "A", handle)
    batch_id = uuid.uuid4()
    made, again = (draft(world, id=batch_id) for _ in range(2))
    assert (made.id, made.digest, made.items) == (again.id, again.digest, again.items)
    assert made.items == 2
    with ThreadPoolExecutor(4) as threads:  # a double click

        def click(_: int) -> str:
            with contextlib.closing(db.connect(world.databases.quinn_url)) as quinn:
                return composing.send(quinn, made.id, made.digest, made.items).status

        assert set(threads.map(click, range(4))) == {"sending"}
    victim = CrashingClient(base_url, SERVICE_TOKEN)
    victim.crash = True
    with pytest.raises(Crash):  # after the response, before it is recorded
        tick(world, victim)
    sent = send_all(world, mini, mac_sync)
    assert [to for to, _ in sent] == ["+14155550001", "a@example.com"]
    assert composing.send(world.databases.quinn, made.id, made.digest, made.items).status == "sent"
    assert send_all(world, mini, mac_sync) == []


def test_15_nothing_is_collected_while_it_is_quiet_in_any_zone_of_the_recipient(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    """Two zones, in one of which it is night; then it becomes night in one while the dispatcher is dead."""
    world.device("mini")
    world.settings(quiet_hours_start="21:00", quiet_hours_end="08:00", quiet_hours_tz="UTC", quiet_hours_of="recipient")
    client_id = world.client()
    place = "UPDATE clients SET time_zone = %(zone)s WHERE id = %(id)s"
    world.quinn(place, zone=zone_at(22), id=client_id)
    batch_id = world.batch(clients=[client_id])
    tick(world, mac_sync)
    assert world.icloud("SELECT id FROM icloud.send_queue") == []
    world.quinn(place, zone=zone_at(12), id=client_id)
    world.quinn("UPDATE outreach_batch_items SET time_zones = NULL")
    tick(world, mac_sync)
    [(seconds,)] = world.icloud("SELECT extract(epoch FROM valid_until - now()) FROM icloud.send_queue")
    assert 7 * 3600 < seconds <= 9 * 3600 - 120, "from between 12 and 13 o'clock until two minutes before 21"
    world.icloud("UPDATE icloud.send_queue SET valid_until = now()")  # the hours pass, and no dispatcher runs
    assert poll(base_url, "mini") == []
    sync(world)
    assert world.statuses(batch_id) == ["pending"]


@pytest.mark.parametrize(
    "change",
    ["send_from = now() + interval '1 minute'", "send_until = now() - interval '1 second'",
     "approved_at = now() - interval '7 days'"],
)  # fmt: skip
def test_16_nothing_is_collected_outside_the_times_of_a_batch_and_its_approval(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, change: str
) -> None:
    """See also test_times.py."""
    named(world, "A", "+14155550001")
    made = draft(world)
    composing.send(world.databases.quinn, made.id, made.digest, made.items)
    world.quinn("UPDATE outreach_batch_items SET claimed_at = now()")  # a claim may wait through an outage
    world.quinn(f"UPDATE outreach_batches SET {change}")
    tick(world, mac_sync)  # also if the sync failed
    assert world.icloud("SELECT 1 FROM icloud.send_queue") == []
    assert send_all(world, mini, mac_sync) == []
    world.quinn("UPDATE outreach_batches SET status = 'sending', send_from = NULL, send_until = NULL")
    world.quinn("UPDATE outreach_batches SET approved_at = now()")
    world.quinn("UPDATE outreach_batch_items SET status = 'pending'")
    tick(world, mac_sync)
    world.quinn(f"UPDATE outreach_batches SET {change}")
    sync(world)
    assert mini.peek()["items"] == []
