"""The two jobs, called directly against real databases and a real server; processes where a claim is about one."""

import contextlib
import datetime as clock
import http.server
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
import responses
import schedule
from testing import ROOT, SERVICE_TOKEN, Databases, Script, TestData, wait_until

import batches
import db
import dispatcher
import pacing

HANDLE = "+14155550123"
LOST = "http://mac-sync.test"  # nobody is there: `responses` answers for it
ENQUEUE = f"{LOST}/admin/send-queue/enqueue"
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
Start = Callable[..., Script]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a new process would find: nothing told or scheduled yet. And no pause between retries."""
    monkeypatch.setattr(dispatcher, "decision_log", dispatcher.DecisionLog())
    dispatcher.stop.clear()
    schedule.clear()
    pacing.quiet_hours.cache_clear()
    monkeypatch.setattr(dispatcher, "RETRY_PAUSE", 0)
    yield
    dispatcher.stop.clear()
    schedule.clear()


@pytest.fixture
def odd() -> Iterator[responses.RequestsMock]:
    """Answers at ENQUEUE that no server of ours would give."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


def sync(world: TestData) -> dispatcher.JobCounts:
    return dispatcher.sync(world.databases.quinn, world.databases.icloud)


def tick(world: TestData, mac_sync: dispatcher.SendQueueClient) -> dispatcher.JobCounts:
    return dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)


def run_dispatch(mac_sync: dispatcher.SendQueueClient) -> dispatcher.JobCounts | None:
    """The dispatch job as the loop runs it: under the lock, with its failures logged."""
    return dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, mac_sync))


def lost_mac_sync() -> dispatcher.SendQueueClient:
    return dispatcher.SendQueueClient(LOST, SERVICE_TOKEN)


def poll(base_url: str, token: str) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"}
    answer = requests.get(f"{base_url}/client/imessage/send-queue/pending", headers=headers, timeout=5)
    items: list[dict[str, Any]] = answer.json()["data"]["items"]
    return items


def report(base_url: str, token: str, status: str = "sent", error: str | None = None) -> int:
    """What a device does: poll, then report each message; how many there were."""
    items = poll(base_url, token)
    for item in items:
        answer = requests.post(
            f"{base_url}/client/imessage/send-queue/{item['id']}/result",
            json={"status": status, "error": error},
            headers={"Authorization": f"Bearer {token}"},
            timeout=5,
        )
        assert answer.status_code == 200
    return len(items)


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def hhmm(minutes: int) -> str:
    """The wall time in UTC, so many minutes from now."""
    return (datetime.now(UTC) + timedelta(minutes=minutes)).strftime("%H:%M")


def quiet_now(world: TestData) -> None:
    world.settings(quiet_hours_start=hhmm(-60), quiet_hours_end=hhmm(60), quiet_hours_tz="UTC")


def queue_row(world: TestData, item_id: str | None, device_id: str, **columns: Any) -> str:
    """A row of the queue, put there past the dispatcher; returns its id."""
    values = {
        "device_id": device_id,
        "to_handle": HANDLE,
        "body": "Hello!",
        "batch_item_id": item_id,
        **columns,
    }
    names, places = ", ".join(values), ", ".join(f"%({name})s" for name in values)
    sql = f"INSERT INTO icloud.send_queue ({names}) VALUES ({places}) RETURNING id"
    return str(world.icloud(sql, **values)[0][0])


def in_flight(world: TestData, device_id: str, **columns: Any) -> tuple[str, str]:
    """An item that is queued, and its row with these columns; their ids."""
    item_id = world.item(world.batch(), status="queued", queued_at=ago(30), device_id=device_id)
    row_id = queue_row(world, item_id, device_id, **columns)
    world.quinn("UPDATE outreach_batch_items SET send_queue_id = %(row)s WHERE id = %(id)s", row=row_id, id=item_id)
    return item_id, row_id


def status_of(world: TestData, item_id: str) -> tuple[str, str | None]:
    """An item's status and failure reason."""
    sql = "SELECT status, failure_reason FROM outreach_batch_items WHERE id = %(id)s"
    [(status, reason)] = world.quinn(sql, id=item_id)
    return status, reason


def row_statuses(world: TestData) -> list[tuple[str, bool]]:
    """The status of each queue row, and whether it was withdrawn."""
    return world.icloud("SELECT status, withdrawn_at IS NOT NULL FROM icloud.send_queue ORDER BY created_at, id")


def loud(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the dispatcher told its operator as trouble."""
    records = [record for record in caplog.records if record.name == "outreach-dispatcher"]
    return [record for record in records if record.levelno >= logging.WARNING]


# --- what is told -------------------------------------------------------------------------------------


def test_an_hour_of_sending_is_told_in_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = datetime.now(UTC)
    pace = pacing.Snapshot(pacing.Settings(False, None, None, None, 2, None, None, 30, None), now, 0, [])
    sending = pacing.Batch("a batch", True, False, None)
    gap = pacing.Hold("minimum gap", now + timedelta(seconds=20))
    limit = pacing.Hold("limit reached limit=max_per_minute used=2 of=2", now + timedelta(seconds=50))
    night = pacing.Hold("quiet hours", now + timedelta(hours=9))
    told: list[tuple[pacing.Decision, str]] = [
        (sending, "sending"), (gap, "sending is held: minimum gap"), (sending, ""), (gap, ""),
        (limit, "sending is held: limit reached"), (gap, ""), (sending, ""), (limit, ""),
        (night, "sending is held: quiet hours"), (night, ""),
        (sending, "sending"), (gap, "sending is held: minimum gap"), (sending, ""),
        (None, "nothing to send"), (None, ""), (sending, "sending"), (None, "nothing to send"),
    ]  # fmt: skip
    decision_log = dispatcher.DecisionLog()
    for verdict, words in told:
        caplog.clear()
        decision_log.log_change(pace, verdict)
        assert "".join(caplog.messages).startswith(words)
        assert len(caplog.messages) == (1 if words else 0)
    decision_log.log_change(None, pacing.global_hold(None))
    assert caplog.records[-1].levelname == "ERROR"


# --- whose turn it is ---------------------------------------------------------------------------------


def test_an_item_travels_from_its_batch_to_a_device_and_back(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    batch_id = world.batch(clients=2)
    for _ in range(2):
        assert tick(world, mac_sync)["queued"] == 1
        [(queued_at, claimed_at)] = world.quinn(
            "SELECT queued_at, claimed_at FROM outreach_batch_items WHERE status = 'queued'"
        )
        assert queued_at > ago(5)
        assert claimed_at is None
        assert report(base_url, "mini") == 1
        assert sync(world)["sent"] == 1
    assert world.statuses(batch_id) == ["sent", "sent"]
    tick(world, mac_sync)
    assert world.quinn("SELECT status FROM outreach_batches") == [("sent",)]
    [(last_dispatched_at, last_synced_at)] = world.quinn(
        "SELECT last_dispatched_at, last_synced_at FROM outreach_settings"
    )
    assert last_dispatched_at > ago(5)
    assert last_synced_at > ago(5)


def test_a_tick_takes_one_item_of_each_batch_the_oldest_first(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    batch_ids = [world.batch(clients=3) for _ in range(3)]
    assert tick(world, mac_sync)["queued"] == 3
    assert [world.statuses(batch_id) for batch_id in batch_ids] == [["queued", "pending", "pending"]] * 3


def test_a_large_batch_does_not_starve_the_others(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    world.settings(max_per_minute=1)
    names = {world.batch(clients=4): "large", world.batch(clients=1): "small", world.batch(clients=1): "late"}
    served = []
    for _ in range(6):
        assert tick(world, mac_sync)["queued"] == 1
        served += world.quinn("SELECT batch_id FROM outreach_batch_items WHERE status = 'queued'")
        report(base_url, "mini")
        sync(world)
        world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - interval '1 minute' WHERE sent_at IS NOT NULL")
    assert [names[batch_id] for (batch_id,) in served] == ["large", "small", "late", "large", "large", "large"]


def test_the_batch_served_longest_ago_goes_first(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.settings(max_per_hour=2)
    recent = world.batch(clients=1, last_served_at=ago(10))
    long_ago = world.batch(clients=1, last_served_at=ago(100))
    never = world.batch(clients=1)
    tick(world, mac_sync)
    assert [world.statuses(batch_id) for batch_id in (never, long_ago, recent)] == [["queued"], ["queued"], ["pending"]]


@pytest.mark.parametrize("name", list(pacing.WINDOWS))
def test_a_limit_counts_the_sent_of_its_window_and_all_in_flight(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    world.device()
    window = pacing.WINDOWS[name].total_seconds()
    old = world.batch()
    world.item(old, status="sent", sent_at=ago(window - 5))
    world.item(old, status="sent", sent_at=ago(window + 5))  # no longer counts
    world.item(old, status="queued", queued_at=ago(90_000))
    world.item(world.batch(status="paused"), claimed_at=ago(90_000))  # its row may be in the queue
    fresh = [world.batch(clients=1), world.batch(clients=1)]
    world.settings(**{name: 4})
    assert tick(world, mac_sync)["queued"] == 1
    assert [world.statuses(batch_id) for batch_id in fresh] == [["queued"], ["pending"]]
    assert f"limit reached limit={name} used=4 of=4" in caplog.text
    world.settings(**{name: 5})
    assert tick(world, mac_sync)["queued"] == 1


def test_no_limit_is_none_and_a_limit_of_zero_is_nothing(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    for _ in range(5):
        world.batch(clients=2)
    world.settings(max_per_day=0)
    assert not +tick(world, mac_sync)
    world.settings(max_per_day=None)
    assert tick(world, mac_sync)["queued"] == 5


def test_the_tightest_of_several_limits_holds(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    for _ in range(5):
        world.batch(clients=1)
    world.settings(max_per_minute=4, max_per_hour=2, max_per_day=3)
    assert tick(world, mac_sync)["queued"] == 2


@pytest.mark.parametrize(("sent_ago", "queued"), [(50, 0), (61, 1)])
def test_a_batch_waits_while_its_newest_send_is_less_than_the_gap_ago(
    world: TestData, mac_sync: dispatcher.SendQueueClient, sent_ago: int, queued: int
) -> None:
    world.device()
    world.settings(min_gap_seconds=60)
    batch_id = world.batch(clients=1)
    world.item(batch_id, status="sent", sent_at=ago(sent_ago))
    world.item(batch_id, status="sent", sent_at=ago(600))
    other = world.batch(clients=1)
    assert tick(world, mac_sync)["queued"] == queued + 1
    assert world.statuses(other) == ["queued"]


def test_with_a_gap_a_batch_has_one_item_in_flight(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.settings(min_gap_seconds=1)
    batch_id = world.batch(clients=2)
    world.item(batch_id, status="sent", sent_at=ago(600))
    assert tick(world, mac_sync)["queued"] == 1
    assert tick(world, mac_sync)["queued"] == 0
    world.settings(min_gap_seconds=0)
    assert tick(world, mac_sync)["queued"] == 1


def test_a_batch_is_sent_once_it_has_items_and_each_has_ended(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    empty, done, waiting = world.batch(), world.batch(), world.batch()
    world.item(done, status="sent", sent_at=ago(5))
    world.item(done, status="failed", failure_reason="no such number")
    world.item(done, status="skipped", failure_reason="no primary handle found")
    world.item(waiting, status="sent", sent_at=ago(5))
    world.item(waiting, status="queued")
    tick(world, mac_sync)
    statuses: dict[str, str] = dict(world.quinn("SELECT id, status FROM outreach_batches"))
    assert statuses == {empty: "sending", done: "sent", waiting: "sending"}


@pytest.mark.parametrize("gate", ["paused", "quiet hours"])
def test_the_last_result_completes_its_batch_while_sending_is_held(world: TestData, gate: str) -> None:
    in_flight(world, world.device(), status="sent", sent_at=ago(5), collected_at=ago(6))
    hold(world, gate)
    sync(world)
    assert world.quinn("SELECT status FROM outreach_batches") == [("sent",)]


def test_the_last_result_completes_its_batch_during_an_outage(world: TestData, odd: responses.RequestsMock) -> None:
    item_id, _ = in_flight(world, world.device(), status="sent", sent_at=ago(5))
    world.batch(clients=1)
    odd.post(ENQUEUE, status=503)
    sync(world)
    run_dispatch(lost_mac_sync())
    sql = "SELECT batch.status FROM outreach_batches AS batch JOIN outreach_batch_items AS item ON batch_id = batch.id"
    assert world.quinn(f"{sql} WHERE item.id = %(id)s", id=item_id) == [("sent",)]


def test_only_a_sending_batch_that_is_no_dry_run_is_touched(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    statuses = ["draft", "paused", "cancelled", "sent"]
    for status in statuses:
        world.batch(clients=1, status=status)
    world.batch(clients=1, dry_run=True)
    world.item(world.batch(dry_run=True), status="skipped")  # has ended, and yet is no sent batch
    tick(world, mac_sync)
    assert world.statuses() == ["pending"] * 5 + ["skipped"]
    assert world.quinn("SELECT 1 FROM outreach_batch_items WHERE claimed_at IS NOT NULL") == []
    assert world.quinn("SELECT status FROM outreach_batches ORDER BY created_at") == [
        (status,) for status in [*statuses, "sending", "sending"]
    ]


def test_a_client_without_a_primary_handle_is_skipped_and_the_next_one_written_to_in_the_same_turn(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world.device()
    secondary = world.client(handle=None)
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, '+14155550177', false)", id=secondary)
    batch_id = world.batch(clients=[world.client(handle=None), secondary, world.client(), world.client(handle=None)])
    assert tick(world, mac_sync) == {"skipped": 2, "queued": 1}
    assert world.statuses(batch_id) == ["skipped", "skipped", "queued", "pending"]
    reasons = world.quinn("SELECT DISTINCT failure_reason FROM outreach_batch_items WHERE status = 'skipped'")
    assert reasons == [("no primary handle found",)]
    assert len([line for line in caplog.messages if line.startswith("item skipped item=")]) == 2


def test_who_was_written_to_before_does_not_hide_who_cannot_be(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    """Else the item that cannot be sent would take the turn of the one after it."""
    world.device()
    batch_id = world.batch(clients=[world.client(), world.client(handle=None), world.client()])
    tick(world, mac_sync)
    assert tick(world, mac_sync) == {"skipped": 1, "queued": 1}
    assert world.statuses(batch_id) == ["queued", "skipped", "queued"]


def test_of_two_primary_handles_the_first_in_order_is_written_to(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    client = world.client("+14155550188")
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, '+14155550123', true)", id=client)
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, '+14155550100', false)", id=client)
    world.batch(clients=[client])
    tick(world, mac_sync)
    assert world.icloud("SELECT to_handle FROM icloud.send_queue") == [("+14155550123",)]


def test_a_claimed_item_is_not_sent_once_its_batch_has_become_a_dry_run(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    world.item(world.batch(dry_run=True), claimed_at=ago(60))
    assert tick(world, mac_sync)["queued"] == 0
    assert row_statuses(world) == []


def test_a_batch_that_its_owner_has_stopped_meanwhile_is_not_called_sent(world: TestData) -> None:
    batches = [world.batch(status=status) for status in ("paused", "cancelled", "draft")]
    for batch_id in batches:
        world.item(batch_id, status="skipped")
    dispatcher.complete_batches(world.databases.quinn, batches)
    assert world.quinn("SELECT count(*) FROM outreach_batches WHERE status = 'sent'") == [(0,)]


def test_a_batch_with_nobody_left_gives_its_place_to_the_next_one(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    world.settings(max_per_minute=1)
    nobody = [world.batch(clients=[world.client(handle=None)]) for _ in range(2)]
    somebody, later = world.batch(clients=1), world.batch(clients=1)
    tick(world, mac_sync)
    assert [world.statuses(batch_id) for batch_id in (*nobody, somebody, later)] == [
        ["skipped"], ["skipped"], ["queued"], ["pending"],
    ]  # fmt: skip
    sent = {batch_id for (batch_id,) in world.quinn("SELECT id FROM outreach_batches WHERE status = 'sent'")}
    assert sent == set(nobody)


def test_the_number_of_statements_does_not_follow_the_number_of_batches(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.device()
    world.settings(max_per_minute=1)
    statements = spied(monkeypatch)
    counts = []
    for more in (2, 40):
        for _ in range(more):
            world.batch(clients=1)
        world.quinn("UPDATE outreach_batch_items SET status = 'skipped' WHERE status = 'queued'")
        statements.clear()
        assert tick(world, mac_sync)["queued"] == 1
        counts.append(len(statements))
    assert counts[0] == counts[1]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The statements that the jobs and the server run from now on, with their parameters."""
    seen: list[tuple[str, Any]] = []
    query, ask = db.query, db.RetryingConnection.query

    def spy(conn: Any, sql: str, params: Any = None) -> list[db.Row]:
        if not sql.startswith(("PREPARE", "EXECUTE")):  # the server's, which `spy_server` has seen
            seen.append((sql, params))
        return query(conn, sql, params)

    def spy_server(database: db.RetryingConnection, sql: str, params: Any = None) -> list[db.Row]:
        seen.append((sql, params))
        return ask(database, sql, params)

    monkeypatch.setattr(db, "query", spy)
    monkeypatch.setattr(db.RetryingConnection, "query", spy_server)
    return seen


# --- which device, and until when ---------------------------------------------------------------------


def test_the_device_is_the_clients_last_one_else_the_settings_one_else_the_oldest(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    oldest, chosen, last, earlier = (world.device(name) for name in ("oldest", "chosen", "last", "earlier"))
    known, unknown = world.client(), world.client()
    old = world.batch(status="sent")
    world.item(old, known, status="sent", sent_at=ago(90_000), device_id=last)
    world.item(old, known, status="sent", sent_at=ago(99_000), device_id=earlier)
    world.item(old, known, status="failed", updated_at=ago(5), device_id=earlier)
    world.settings(device_id=chosen)

    def devices() -> list[str]:
        world.quinn("DELETE FROM outreach_batches WHERE status <> 'sent'")
        world.batch(clients=[known])
        world.batch(clients=[unknown])
        tick(world, mac_sync)
        sql = "SELECT device_id FROM outreach_batch_items WHERE status = 'queued' ORDER BY created_at"
        return [device_id for (device_id,) in world.quinn(sql)]

    assert devices() == [last, chosen]
    world.icloud("DELETE FROM icloud.devices WHERE name = 'last'")
    assert devices() == [chosen, chosen]
    world.icloud("DELETE FROM icloud.devices WHERE name = 'chosen'")
    assert devices() == [oldest, oldest]


def test_without_a_device_an_item_fails_with_the_reason(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    batch_id = world.batch(clients=2)
    tick(world, mac_sync)
    assert world.statuses(batch_id) == ["failed", "pending"]
    assert world.quinn("SELECT count(claimed_at) FROM outreach_batch_items") == [(0,)]
    assert (
        "there is no device" in world.quinn("SELECT failure_reason FROM outreach_batch_items ORDER BY created_at")[0][0]
    )


def test_a_row_is_valid_until_the_next_start_of_quiet_hours(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    world.batch(clients=1)
    world.settings(quiet_hours_start=hhmm(90), quiet_hours_end=hhmm(180), quiet_hours_tz="UTC")
    expected = (datetime.now(UTC) + timedelta(minutes=90)).replace(second=0, microsecond=0)
    tick(world, mac_sync)
    [(valid_until,)] = world.icloud("SELECT valid_until FROM icloud.send_queue")
    assert abs(valid_until - expected) <= timedelta(minutes=1)  # the clock may have moved on by one


def test_without_quiet_hours_a_row_has_no_limit_of_time(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.batch(clients=1)
    tick(world, mac_sync)
    assert world.icloud("SELECT valid_until FROM icloud.send_queue") == [(None,)]


@pytest.mark.parametrize("gate", ["paused", "quiet hours", "no settings"])
def test_nothing_is_dispatched_while_sending_is_held(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture, gate: str
) -> None:
    caplog.set_level(logging.INFO)
    world.device()
    world.batch(clients=1)
    hold(world, gate)
    for _ in range(3):
        assert not +tick(world, mac_sync)
    assert world.statuses() == ["pending"]
    told = [record for record in caplog.records if gate in record.message]
    assert [record.levelno for record in told] == [logging.ERROR if gate == "no settings" else logging.INFO]


def hold(world: TestData, gate: str) -> None:
    """Make `gate` the one that holds sending."""
    if gate == "paused":
        world.settings(paused=True)
    elif gate == "quiet hours":
        quiet_now(world)
    else:
        world.quinn("DELETE FROM outreach_settings")


# --- what mac-sync may answer -------------------------------------------------------------------------

OUTAGES: dict[str, dict[str, Any]] = {
    **{str(code): {"status": code, "json": {"error": "no"}} for code in (201, 301, 302, 401, 403, 404, 405, 408, 429)},
    **{str(code): {"status": code, "json": {"error": "no"}} for code in (502, 503, 504)},
    "a redirect": {"status": 307, "headers": {"Location": f"{LOST}/elsewhere"}},
    "no id": {"json": {"success": True, "data": {}}},
    "null data": {"json": {"success": True, "data": None}},
    "text for data": {"json": {"success": True, "data": "queued"}},
    "an id that is none": {"json": {"data": {"sendQueueId": "42"}}},
    "an id in braces": {"json": {"data": {"sendQueueId": "{550e8400-e29b-41d4-a716-446655440000}"}}},
    "a number for an id": {"json": {"data": {"sendQueueId": 42}}},
    "a list": {"json": [1, 2]},
    "a proxy's page": {"body": "<html>welcome</html>"},
    "half a document": {"body": '{"success": true, "data": {"sendQ'},
    "bytes": {"body": b"\xff\xfe\x00"},
    "a deep document": {"body": "[" * 100_000},
    "nothing": {"body": ""},
    "409 without an id": {"status": 409, "json": {"success": False, "error": "conflict"}},
    "no connection": {"body": requests.ConnectionError("refused")},
    "no answer": {"body": requests.ReadTimeout("slow")},
    "half an answer": {"body": requests.exceptions.ChunkedEncodingError("cut")},
    **{f"a proxy's page with status {code}": {"status": code, "body": "<html>"} for code in (400, 404, 413)},
    **{f"another program's {code}": {"status": code, "json": {"error": "no"}} for code in (400, 413)},
}  # fmt: skip
# Those that end without an operator.
PASSING = ("408", "429", "502", "503", "504", "no connection", "no answer", "half an answer")


def test_an_outage_loses_nothing_stops_the_tick_and_is_one_log_line(
    world: TestData, odd: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    world.device()
    for _ in range(3):
        world.batch(clients=2)
    for name, answer in OUTAGES.items():
        odd.reset()
        odd.post(ENQUEUE, **answer)
        caplog.clear()
        assert run_dispatch(lost_mac_sync()) is None, name
        assert len(odd.calls) == 1, name
        assert world.statuses() == ["pending"] * 6, name
        [record] = loud(caplog)
        assert "enqueue stopped: mac-sync unavailable; items stay pending" in record.message
        assert record.levelno == (logging.WARNING if name in PASSING else logging.ERROR), name
        wrong = "MAC_SYNC_SERVICE_TOKEN" if name in ("401", "403") else "MAC_SYNC_BASE_URL"
        assert wrong in record.message, name


def test_after_an_outage_the_items_go_on_within_the_limit(
    world: TestData, odd: responses.RequestsMock, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    world.settings(max_per_hour=2)
    for _ in range(3):
        world.batch(clients=2)
    odd.add_passthru(re.compile(r"http://127\.0\.0\.1"))
    odd.post(ENQUEUE, status=503)
    for _ in range(3):
        run_dispatch(lost_mac_sync())
        sync(world)
    assert tick(world, mac_sync)["queued"] == 2
    assert tick(world, mac_sync)["queued"] == 0
    assert sorted(world.statuses()) == ["pending"] * 4 + ["queued"] * 2


def test_nobody_listening_and_nobody_answering_are_outages(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "HTTP_TIMEOUT", (0.2, 0.2))
    world.device()
    world.batch(clients=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(dispatcher.ServerUnavailable, match="ReadTimeout"):
            tick(world, dispatcher.SendQueueClient(address, SERVICE_TOKEN))
    with pytest.raises(dispatcher.ServerUnavailable, match="ConnectionError"):
        tick(world, dispatcher.SendQueueClient(address, SERVICE_TOKEN))
    assert world.statuses() == ["pending"]


@pytest.mark.parametrize(("code", "requests_made"), [(400, 1), (413, 1), (500, 3)])
def test_an_item_that_mac_sync_refuses_fails_with_its_words_and_the_tick_goes_on(
    world: TestData, odd: responses.RequestsMock, code: int, requests_made: int
) -> None:
    world.device()
    item_id, other = world.item(world.batch()), world.item(world.batch())
    for _ in range(requests_made):
        odd.post(ENQUEUE, status=code, json={"success": False, "error": "`toHandle` is odd\0"})
    odd.post(ENQUEUE, json={"success": True, "data": {"sendQueueId": str(uuid.uuid4())}})
    assert run_dispatch(lost_mac_sync()) == {"failed": 1, "queued": 1, "skipped": 0}
    assert status_of(world, item_id) == ("failed", f"HTTP {code}: `toHandle` is odd\ufffd")
    assert status_of(world, other) == ("queued", None)
    assert len(odd.calls) == requests_made + 1


def test_a_500_that_passes_costs_nothing(world: TestData, odd: responses.RequestsMock) -> None:
    world.device()
    world.batch(clients=1)
    odd.post(ENQUEUE, status=500)
    odd.post(ENQUEUE, status=500)
    odd.post(ENQUEUE, json={"success": True, "data": {"sendQueueId": str(uuid.uuid4())}})
    assert tick(world, lost_mac_sync())["queued"] == 1


def test_an_item_whose_earlier_content_is_in_the_queue_takes_that_row(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    item_id = world.item(world.batch())
    row_id = queue_row(world, item_id, world.device(), body="What was sent before the item was edited")
    assert tick(world, mac_sync)["queued"] == 1
    assert world.quinn("SELECT status, send_queue_id FROM outreach_batch_items") == [("queued", row_id)]
    [record] = loud(caplog)
    assert row_id in record.message


def test_an_item_that_another_hand_changed_meanwhile_is_left_as_it_is(
    world: TestData,
    mac_sync: dispatcher.SendQueueClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world.device()
    world.batch(clients=1)
    enqueue = dispatcher.SendQueueClient.enqueue

    def meanwhile(*arguments: Any) -> str:
        queue_id = enqueue(*arguments)
        world.quinn("UPDATE outreach_batch_items SET status = 'skipped'")
        return queue_id

    monkeypatch.setattr(dispatcher.SendQueueClient, "enqueue", meanwhile)
    tick(world, mac_sync)
    assert world.statuses() == ["skipped"]
    assert "item changed concurrently during enqueue" in loud(caplog)[0].message
    assert sync(world)["withdrawn"] == 1  # nobody wants its row any more


def test_an_item_that_another_hand_ends_during_its_refusal_stays_as_it_was_made(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.device()
    world.batch(clients=1)

    def meanwhile(*_: Any) -> str:
        world.quinn("UPDATE outreach_batch_items SET status = 'skipped', failure_reason = 'not now'")
        raise dispatcher.EnqueueRejected("HTTP 400")

    monkeypatch.setattr(dispatcher.SendQueueClient, "enqueue", meanwhile)
    tick(world, mac_sync)
    assert world.quinn("SELECT status, failure_reason FROM outreach_batch_items") == [("skipped", "not now")]


def test_a_stop_leaves_the_rest_of_the_tick_to_the_next_start(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.device()
    for _ in range(3):
        world.batch(clients=1)
    enqueue = dispatcher.SendQueueClient.enqueue

    def stopped(*arguments: Any) -> str:
        dispatcher.stop.set()
        return enqueue(*arguments)

    monkeypatch.setattr(dispatcher.SendQueueClient, "enqueue", stopped)
    assert tick(world, mac_sync)["queued"] == 1
    dispatcher.stop.clear()
    monkeypatch.setattr(dispatcher.SendQueueClient, "enqueue", enqueue)
    assert tick(world, mac_sync)["queued"] == 2


def test_what_does_not_fit_into_one_interval_waits_for_the_next_look_at_the_settings(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.device()
    world.batch(clients=1)
    with monkeypatch.context() as patch:
        patch.setattr(dispatcher, "interval", lambda: -1)
        assert tick(world, mac_sync)["queued"] == 0
    assert world.statuses() == ["pending"]
    assert tick(world, mac_sync)["queued"] == 1


def test_a_proxy_of_the_host_is_not_asked(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    world.device()
    world.batch(clients=1)
    assert tick(world, mac_sync)["queued"] == 1


# --- what the log must not tell -----------------------------------------------------------------------

SECRETS = (HANDLE, "Hello!", SERVICE_TOKEN, "mini-token")


def test_no_log_line_tells_a_body_a_token_or_a_handle_even_where_an_error_text_does(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    words = " ".join(SECRETS)
    world.device("mini", token="mini-token")
    world.batch(clients=[world.client(HANDLE)])
    tick(world, mac_sync)
    report(base_url, "mini-token", "failed", error=words)
    sync(world)
    for code in (400, 401, 409, 500):
        world.batch(clients=[world.client(HANDLE)])
        with responses.RequestsMock() as odd:
            odd.post(
                ENQUEUE,
                status=code,
                json={"success": False, "error": words, "data": {"sendQueueId": str(uuid.uuid4())}},
            )
            run_dispatch(lost_mac_sync())
    reasons = world.quinn("SELECT failure_reason FROM outreach_batch_items WHERE failure_reason IS NOT NULL")
    assert len(reasons) == 4  # the device's, and those of the 400 and the 500: these do keep the words
    assert all("Hello!" in reason for (reason,) in reasons)
    [queued, *_] = [line for line in caplog.messages if line.startswith("item queued to mac-sync")]
    assert queued.endswith("to=+1415•••23")
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_no_log_line_tells_the_row_that_a_failed_statement_quotes(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    world.device()
    world.batch(clients=1)
    world.quinn("ALTER TABLE outreach_batch_items ADD CONSTRAINT none_queued CHECK (status <> 'queued')")
    assert run_dispatch(mac_sync) is None
    assert "dispatch job failed" in caplog.text
    assert "Hello!" not in caplog.text


# --- the sync job -------------------------------------------------------------------------------------


def test_results_come_home_with_the_queues_time_and_the_devices_words(
    world: TestData, base_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device_id = world.device("mini")
    sent, _ = in_flight(world, device_id, status="sent", sent_at=ago(4000))
    failed, _ = in_flight(world, device_id, status="failed", failure_reason="no such number")
    speechless, _ = in_flight(world, device_id, status="failed")
    waiting, _ = in_flight(world, device_id)
    assert sync(world) == {"withdrawn": 0, "sent": 1, "failed": 2}
    assert status_of(world, sent) == ("sent", None)
    assert status_of(world, failed) == ("failed", "no such number")
    assert status_of(world, speechless) == ("failed", "the device gave no reason")
    assert status_of(world, waiting) == ("queued", None)
    told = [(line.levelname, line.getMessage()) for line in caplog.records if line.getMessage().startswith("item ")]
    assert sorted(level for level, _ in told) == ["INFO", "WARNING", "WARNING"]
    assert any(level == "INFO" and words.startswith("item sent ") and sent in words for level, words in told)
    [(in_queue,)] = world.icloud("SELECT sent_at FROM icloud.send_queue WHERE status = 'sent'")
    [(item_sent_at, synced_at)] = world.quinn("SELECT item.sent_at, last_synced_at FROM outreach_batch_items AS item,"
                                              " outreach_settings WHERE item.status = 'sent'")  # fmt: skip
    assert item_sent_at == in_queue
    assert abs(synced_at - datetime.now(UTC)) < timedelta(seconds=10)


def test_a_result_that_came_long_ago_while_the_dispatcher_was_down_is_not_lost(world: TestData) -> None:
    item_id, _ = in_flight(world, world.device(), status="sent", sent_at=ago(10 * 86_400))
    world.settings(last_synced_at=ago(60))
    sync(world)
    assert status_of(world, item_id) == ("sent", None)


def test_a_row_that_vanished_with_its_device_fails_its_item(world: TestData) -> None:
    device_id = world.device()
    vanished = [in_flight(world, device_id)[0] for _ in range(3)]
    world.icloud("DELETE FROM icloud.devices")
    assert sync(world)["failed"] == 3
    for item_id in vanished:
        assert status_of(world, item_id) == ("failed", "send queue row no longer exists")
    assert world.quinn("SELECT DISTINCT device_id FROM outreach_batch_items") == [(device_id,)]


def test_garbage_in_send_queue_id_fails_that_item_and_no_other(world: TestData) -> None:
    good, row_id = in_flight(world, world.device(), status="sent", sent_at=ago(5))
    world.quinn("UPDATE outreach_batch_items SET send_queue_id = upper(send_queue_id)")
    batch_id = world.batch()
    garbage = [None, "", "garbage", "'; DROP TABLE clients", f"{{{row_id}}}", row_id.replace("-", ""), "é" * 36]
    bad = [world.item(batch_id, status="queued", send_queue_id=text) for text in garbage]
    sync(world)
    assert status_of(world, good) == ("sent", None)
    assert {status_of(world, item_id) for item_id in bad} == {("failed", "send queue row no longer exists")}


def test_a_failure_that_was_reported_before_its_enqueue_was_recorded_is_the_items(world: TestData) -> None:
    device_id = world.device()
    item_id = world.item(world.batch(), claimed_at=ago(5))
    row = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, status, failure_reason, created_at)
        VALUES (%(device)s, 'a@example.com', 'x', %(item)s, 'failed', 'not on iMessage', %(at)s) RETURNING id
    """
    world.icloud(row, device=device_id, item=item_id, at=ago(3))
    sync(world)
    assert status_of(world, item_id) == ("failed", "not on iMessage")


def test_a_failure_known_before_a_retry_and_a_withdrawal_are_not_of_a_later_claim(world: TestData) -> None:
    device_id = world.device()
    row = """
        INSERT INTO icloud.send_queue
               (device_id, to_handle, body, batch_item_id, status, failure_reason, withdrawn_at, created_at)
        VALUES (%(device)s, 'a@example.com', 'x', %(item)s, 'failed', 'why', %(withdrawn)s, %(at)s) RETURNING id
    """
    batch_id = world.batch()
    retried, withdrawn = world.item(batch_id), world.item(batch_id)
    [(queue_id,)] = world.icloud(row, device=device_id, item=retried, withdrawn=None, at=ago(60))
    world.quinn(
        "UPDATE outreach_batch_items SET status = 'failed', send_queue_id = %(row)s WHERE id = %(id)s",
        row=queue_id,
        id=retried,
    )
    world.icloud(row, device=device_id, item=withdrawn, withdrawn=None, at=ago(60))
    world.icloud(row, device=device_id, item=withdrawn, withdrawn=ago(50), at=ago(55))
    assert dispatcher.run_retry(batch_id) == 0
    lost = world.item(batch_id)
    queue_row(world, lost, device_id)
    world.quinn("UPDATE outreach_batch_items SET claimed_at = now()")
    sync(world)
    assert world.statuses() == ["pending", "pending", "queued"], "of the later claim is what came after them"


@pytest.mark.parametrize(("status", "sent_at"), [("queued", None), ("sent", ago(7))])
def test_a_claimed_item_whose_answer_was_lost_takes_the_row_that_is_in_the_queue(
    world: TestData, caplog: pytest.LogCaptureFixture, status: str, sent_at: datetime | None
) -> None:
    device_id = world.device()
    item_id = world.item(world.batch(), claimed_at=ago(60))
    row_id = queue_row(world, item_id, device_id, status=status, sent_at=sent_at)
    sync(world)
    sql = (
        "SELECT status, send_queue_id, device_id, sent_at, claimed_at, queued_at IS NOT NULL FROM outreach_batch_items"
    )
    assert world.quinn(sql) == [(status, row_id, device_id, sent_at, None, True)]
    assert "response was lost" in loud(caplog)[0].message


def test_a_result_does_not_change_an_item_that_has_ended(world: TestData) -> None:
    ended = [world.item(world.batch(), status=status, sent_at=ago(60)) for status in ("sent", "failed", "skipped")]
    ended.append(world.item(world.batch()))  # nor one that was never claimed
    before = world.quinn("SELECT * FROM outreach_batch_items ORDER BY id")
    for status in ("sent", "failed", "pending"):
        changes = [dispatcher.ItemUpdate(item_id, status, str(uuid.uuid4()), None, ago(0), "late") for item_id in ended]
        dispatcher.apply_updates(world.databases.quinn, changes)
    assert world.quinn("SELECT * FROM outreach_batch_items ORDER BY id") == before


def test_a_row_whose_item_has_ended_is_withdrawn(world: TestData) -> None:
    queue_row(world, world.item(world.batch(), status="skipped"), world.device())
    assert sync(world)["withdrawn"] == 1
    assert row_statuses(world) == [("failed", True)]


def test_the_claim_of_a_batch_that_is_paused_is_given_up(world: TestData) -> None:
    world.item(world.batch(status="paused"), claimed_at=ago(60))
    world.item(world.batch(dry_run=True), claimed_at=ago(60))
    kept = world.item(world.batch(), claimed_at=ago(60))
    sync(world)
    assert world.quinn("SELECT id FROM outreach_batch_items WHERE claimed_at IS NOT NULL") == [(kept,)]


@pytest.mark.parametrize(
    "why", ["paused", "quiet hours", "no settings", "past its time", "batch paused", "batch cancelled", "dry run"]
)
def test_a_row_that_no_device_has_collected_is_withdrawn(world: TestData, why: str) -> None:
    item_id, _ = in_flight(world, world.device())
    if why == "past its time":
        world.icloud("UPDATE icloud.send_queue SET valid_until = now() - interval '1 second'")
    elif why == "dry run":
        world.quinn("UPDATE outreach_batches SET dry_run = true")
    elif why.startswith("batch "):
        world.quinn("UPDATE outreach_batches SET status = %(status)s", status=why.removeprefix("batch "))
    else:
        hold(world, why)
    assert sync(world)["withdrawn"] == 1
    assert row_statuses(world) == [("failed", True)]
    assert status_of(world, item_id) == ("pending", None)
    assert world.quinn("SELECT send_queue_id, device_id, queued_at, claimed_at FROM outreach_batch_items") == [
        (None,) * 4
    ]


def test_a_row_that_a_device_has_collected_is_never_withdrawn(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    world.batch(clients=1)
    tick(world, mac_sync)
    assert len(poll(base_url, "mini")) == 1
    world.icloud("UPDATE icloud.send_queue SET valid_until = now() - interval '1 second'")
    world.quinn("UPDATE outreach_batches SET status = 'cancelled'")
    world.settings(paused=True)
    assert sync(world)["withdrawn"] == 0
    assert world.statuses() == ["queued"]
    assert report(base_url, "mini") == 1
    sync(world)
    assert world.statuses() == ["sent"]


def test_a_row_that_belongs_to_no_item_is_left_alone(world: TestData) -> None:
    device_id = world.device()
    queue_row(world, None, device_id)
    queue_row(world, str(uuid.uuid4()), device_id, valid_until=ago(-60))  # put in by hand, with some id
    queue_row(world, None, device_id, valid_until=ago(5))
    world.settings(paused=True)
    assert sync(world)["withdrawn"] == 1
    assert row_statuses(world) == [("queued", False), ("queued", False), ("failed", True)]


def test_the_row_of_a_deleted_batch_is_withdrawn(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    batch_id = world.batch(clients=1)
    tick(world, mac_sync)
    world.quinn("DELETE FROM outreach_batches WHERE id = %(id)s", id=batch_id)
    assert sync(world) == {"withdrawn": 1}
    assert row_statuses(world) == [("failed", True)]
    assert world.icloud("SELECT failure_reason FROM icloud.send_queue") == [("withdrawn: its item was deleted",)]


def test_nothing_is_withdrawn_without_a_cause(world: TestData) -> None:
    in_flight(world, world.device(), valid_until=ago(-60))
    sync(world)
    assert row_statuses(world) == [("queued", False)]


def test_a_row_left_by_a_crash_is_withdrawn_although_its_item_says_pending(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    item_id = world.item(world.batch(), claimed_at=ago(60))
    row_id = queue_row(world, item_id, world.device())
    world.settings(paused=True)
    assert sync(world)["withdrawn"] == 1
    assert f"row withdrawn sendQueueId={row_id} reason='withdrawn: paused'" in caplog.messages
    assert status_of(world, item_id) == ("pending", None)
    world.settings(paused=False)
    sync(world)
    assert tick(world, mac_sync)["queued"] == 1
    assert row_statuses(world) == [("failed", True), ("queued", False)]


def test_a_poll_that_comes_before_the_withdrawal_wins(world: TestData) -> None:
    item_id, _ = in_flight(world, world.device())
    world.settings(paused=True)
    with contextlib.closing(db.connect(world.databases.icloud_url)) as device, ThreadPoolExecutor() as threads:
        device.autocommit = False
        db.query(device, "UPDATE icloud.send_queue SET collected_at = now()")
        withdrawal = threads.submit(sync, world)
        with contextlib.closing(db.connect(world.databases.icloud_url)) as watcher:
            wait_until(lambda: db.query(watcher, WAITING), 2)
        device.commit()
        assert withdrawal.result(5)["withdrawn"] == 0
    assert status_of(world, item_id) == ("queued", None)
    assert row_statuses(world) == [("queued", False)]


def test_a_poll_that_comes_after_the_withdrawal_gets_nothing(world: TestData, base_url: str) -> None:
    in_flight(world, world.device("mini"))
    with contextlib.closing(db.connect(world.databases.icloud_url)) as withdrawal, ThreadPoolExecutor() as threads:
        withdrawal.autocommit = False
        db.query(withdrawal, "UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now()")
        device = threads.submit(poll, base_url, "mini")
        wait_until(lambda: world.icloud(WAITING), 2)
        withdrawal.commit()
        assert device.result(5) == []
    assert row_statuses(world) == [("failed", True)]


def test_ten_thousand_results_are_one_read_and_one_write(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher.logger, "info", lambda *_: None)  # ten thousand lines, which pytest would keep
    rows = """
        INSERT INTO icloud.send_queue (id, device_id, to_handle, body, status, sent_at, batch_item_id)
        SELECT md5('row' || n)::uuid, %(device)s, '+14155550123', 'Hello!', 'sent', now(), md5('item' || n)::uuid
          FROM generate_series(1, 10000) AS n
    """
    items = """
        INSERT INTO outreach_batch_items (id, batch_id, client_id, rendered_body, status, send_queue_id)
        SELECT md5('item' || n)::uuid, %(batch)s, %(client)s, 'Hello!', 'queued', md5('row' || n)::uuid
          FROM generate_series(1, 10000) AS n
    """
    world.icloud(rows, device=world.device())
    world.quinn(items, batch=world.batch(), client=world.client())
    statements = spied(monkeypatch)
    assert sync(world)["sent"] == 10_000
    of_results = [sql for sql, params in statements if params and "sent_at" in sql]
    assert len(of_results) == 2
    assert len(statements) <= 10


# --- running the jobs ---------------------------------------------------------------------------------


class Relay:
    """Stands between dispatcher and server: passes a request on, and lets `before_answer` decide what comes back."""

    def __init__(self, base_url: str, before_answer: Callable[[], object]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {"Authorization": self.headers["Authorization"]}
                answer = requests.post(base_url + self.path, data=body, headers=headers, timeout=5)
                before_answer()
                with contextlib.suppress(OSError):  # the one who asked may have been killed
                    self.send_response(answer.status_code)
                    self.end_headers()
                    self.wfile.write(answer.content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, args=(0.02,)).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def cli(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run dispatcher.py to its end."""
    return subprocess.run(
        [sys.executable, "dispatcher.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_three_dispatchers_at_once_make_one_row_for_each_item(world: TestData, base_url: str, start: Start) -> None:
    world.device()
    world.batch(clients=2)
    world.batch(clients=2)
    rivals = [start("dispatcher.py", "--once", MAC_SYNC_BASE_URL=base_url) for _ in range(3)]
    assert [rival.process.wait(20) for rival in rivals] == [0, 0, 0]
    assert world.statuses() == ["queued"] * 4
    [(rows, items)] = world.icloud("SELECT count(*), count(DISTINCT batch_item_id) FROM icloud.send_queue")
    assert (rows, items) == (4, 4)


def test_a_dispatcher_killed_after_the_server_committed_leaves_one_row(
    world: TestData, base_url: str, start: Start
) -> None:
    world.device()
    world.batch(clients=1)
    committed, over = threading.Event(), threading.Event()

    def swallow() -> None:
        committed.set()
        over.wait(20)

    with Relay(base_url, swallow) as relay_url:
        victim = start("dispatcher.py", "--once", MAC_SYNC_BASE_URL=relay_url)
        assert committed.wait(15)
        assert victim.end(signal.SIGKILL) == -signal.SIGKILL
        over.set()
    assert world.statuses() == ["pending"]
    assert row_statuses(world) == [("queued", False)]
    done = cli("--once", MAC_SYNC_BASE_URL=base_url)
    assert done.stdout == "sync: 1 queued\ndispatch: nothing to do\n"
    assert done.returncode == 0
    assert world.statuses() == ["queued"]
    assert row_statuses(world) == [("queued", False)]


def test_sigterm_finishes_the_item_in_hand(world: TestData, base_url: str, start: Start) -> None:
    world.device()
    world.batch(clients=1)
    world.batch(clients=1)
    asked = threading.Event()

    def slow() -> None:
        asked.set()
        time.sleep(0.5)  # the server's answer takes this long: the signal arrives meanwhile

    with Relay(base_url, slow) as relay_url:
        daemon = start("dispatcher.py", MAC_SYNC_BASE_URL=relay_url)
        assert asked.wait(15)
        assert daemon.end() == 0
    assert world.statuses() == ["queued", "pending"]
    assert "outreach-dispatcher starting" in daemon.lines()[0]
    assert "outreach-dispatcher stopped" in daemon.lines()[-1]


def test_sigterm_ends_the_daemon_within_ten_seconds_while_mac_sync_hangs(world: TestData, start: Start) -> None:
    world.device()
    world.batch(clients=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        daemon = start("dispatcher.py", MAC_SYNC_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(15)
        connection, _ = silent.accept()
        with connection:
            begun = time.monotonic()
            assert daemon.end() == 0
            assert time.monotonic() - begun < 10
    assert world.statuses() == ["pending"]


def test_a_500_while_stopping_is_not_tried_again_and_eats_no_item(world: TestData, odd: responses.RequestsMock) -> None:
    world.device()
    world.batch(clients=1)

    def last_words(_: object) -> tuple[int, dict[str, str], str]:
        dispatcher.stop.set()
        return 500, {}, "{}"

    odd.add_callback(responses.POST, ENQUEUE, last_words)
    run_dispatch(lost_mac_sync())
    assert len(odd.calls) == 1
    assert world.statuses() == ["pending"]


def loop(monkeypatch: pytest.MonkeyPatch, *jobs: dispatcher.Job) -> None:
    """The loop with other jobs, a second apart; a job ends it through `stop`."""
    monkeypatch.setenv("DISPATCH_INTERVAL_SECONDS", "1")
    monkeypatch.setattr(dispatcher, "build_jobs", lambda _: {f"job {n}": job for n, job in enumerate(jobs)})
    dispatcher.run_forever(SERVICE_TOKEN)


def test_a_job_that_raises_stops_neither_the_other_one_nor_its_own_next_run(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[str] = []

    def broken(*_: object) -> dispatcher.JobCounts:
        runs.append("broken")
        raise RuntimeError("a bug")

    def well(*_: object) -> dispatcher.JobCounts:
        runs.append("well")
        if len(runs) == 4:
            dispatcher.stop.set()
        return dispatcher.JobCounts()

    loop(monkeypatch, broken, well)
    assert runs == ["broken", "well"] * 2
    assert caplog.text.count("job 0 job failed") == 2


@pytest.mark.parametrize("seconds", [0, 0.3], ids=["between the jobs", "after both"])
def test_the_jobs_run_on_when_the_wall_clock_is_set_back(
    world: TestData, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    back = timedelta(0)

    class WallClock(clock.datetime):
        @classmethod
        def now(cls, tz: clock.tzinfo | None = None) -> Any:
            return datetime.now(tz) + back

    runs: list[int] = []

    def job(*_: object) -> dispatcher.JobCounts:
        runs.append(1)
        if len(runs) == 2:
            dispatcher.stop.set()
        return dispatcher.JobCounts()

    def set_back() -> None:
        nonlocal back
        back = timedelta(hours=-1)  # what has its next run planned has it an hour away now

    def last_job(*_: object) -> dispatcher.JobCounts:
        threading.Timer(seconds, set_back).start() if seconds else set_back()
        return dispatcher.JobCounts()

    stand_in = types.SimpleNamespace(**{**vars(clock), "datetime": WallClock})
    monkeypatch.setattr(schedule, "datetime", stand_in)
    thread = threading.Thread(target=loop, args=(monkeypatch, job, last_job))
    thread.start()
    thread.join(5)
    dispatcher.stop.set()
    thread.join()
    assert len(runs) == 2


def test_a_database_that_is_away_fails_the_job_and_not_the_process(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUINN_ICLOUD_DB_URL", "postgresql://127.0.0.1:1/away")
    assert dispatcher.run_job("sync", dispatcher.sync) is None
    monkeypatch.setenv("QUINN_ICLOUD_DB_URL", world.databases.icloud_url)
    assert dispatcher.run_job("sync", dispatcher.sync) is not None
    assert [record.levelname for record in loud(caplog)] == ["ERROR"]
    assert "the next run tries again" in caplog.text


def test_a_statement_that_times_out_is_named(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.batch(clients=1)
    monkeypatch.setitem(db.CONNECTION_DEFAULTS, "options", "-c lock_timeout=100ms")
    with contextlib.closing(db.connect(world.databases.quinn_url)) as rival:
        rival.autocommit = False
        db.query(rival, "LOCK TABLE outreach_batches")
        assert dispatcher.run_job("sync", dispatcher.sync) is None
    assert "statement=release_claims error=LockNotAvailable" in caplog.text


def test_a_tick_writes_its_heartbeat_also_when_its_job_fails(world: TestData) -> None:
    def broken(*_: object) -> dispatcher.JobCounts:
        raise RuntimeError("a bug")

    dispatcher.run_job("sync", broken)
    [(ticked, synced)] = world.quinn("SELECT last_tick_at, last_synced_at FROM outreach_settings")
    assert ticked > ago(5)
    assert synced is None


def test_missing_tables_are_answered_with_the_command_that_makes_them(
    world: TestData, caplog: pytest.LogCaptureFixture
) -> None:
    world.quinn("ALTER TABLE outreach_batch_items RENAME TO old_items")
    assert dispatcher.run_job("sync", dispatcher.sync) is None
    assert "db.py migrate" in caplog.text


def test_a_role_that_may_not_write_is_answered_with_what_to_grant(
    databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(quinn: Any, _: Any) -> dispatcher.JobCounts:
        db.query(quinn, "DO $$ BEGIN RAISE SQLSTATE '42501'; END $$")
        return dispatcher.JobCounts()

    assert dispatcher.run_job("sync", forbidden) is None
    assert "GRANT the tables' owner" in caplog.text


def test_a_job_that_a_stop_ends_while_it_waits_for_the_lock_blames_nobody(
    world: TestData, caplog: pytest.LogCaptureFixture
) -> None:
    world.quinn("SELECT pg_advisory_lock(hashtext('outreach-dispatcher'))")
    waits = "SELECT query LIKE 'SELECT pg_try_advisory_lock%' FROM pg_stat_activity WHERE datname = current_database()"
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(dispatcher.run_job, "sync", dispatcher.sync)
        wait_until(lambda: (True,) in db.query(world.databases.quinn, waits))
        dispatcher.stop.set()
        assert waiting.result(5) is None
    assert not caplog.records


def test_a_second_dispatcher_waits_for_the_lock_and_says_why_it_gave_up(
    world: TestData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batches, "LOCK_WAIT", 0.2)
    rival = "SELECT pg_advisory_lock(hashtext('outreach-dispatcher'))"
    world.quinn(rival)
    assert dispatcher.run_job("sync", dispatcher.sync) is None
    assert "job skipped: lock held by another dispatcher" in caplog.text
    [(pid,)] = world.quinn("SELECT pg_backend_pid()")
    assert pid in [holder for holder, _ in world.quinn(caplog.messages[0].partition("see ")[2])]
    monkeypatch.setattr(batches, "LOCK_WAIT", 10)
    with ThreadPoolExecutor() as threads:
        patient = threads.submit(dispatcher.run_job, "sync", dispatcher.sync)
        world.quinn(rival.replace("pg_advisory_lock", "pg_advisory_unlock"))
        assert patient.result(10) is not None


def test_once_prints_what_it_did_and_fails_when_a_job_did(world: TestData, base_url: str) -> None:
    world.device()
    world.batch(clients=[world.client(handle=None), world.client()])
    done = cli("--once", MAC_SYNC_BASE_URL=base_url)
    assert (done.stdout, done.returncode) == ("sync: nothing to do\ndispatch: 1 queued, 1 skipped\n", 0)
    world.batch(clients=1)
    done = cli("--once", MAC_SYNC_BASE_URL="http://127.0.0.1:1")
    assert (done.stdout, done.returncode) == ("sync: nothing to do\ndispatch: failed\n", 1)


def test_retry_makes_failed_items_pending_and_a_sent_batch_sending(
    world: TestData, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_id = world.batch(status="sent")
    world.item(batch_id, status="failed", failure_reason="no", send_queue_id="old", queued_at=ago(9), claimed_at=ago(9))
    world.item(batch_id, status="failed", failure_reason="no")
    world.item(batch_id, status="sent", sent_at=ago(5))
    world.item(batch_id, status="skipped")
    other = world.item(world.batch(), status="failed")
    assert dispatcher.run_retry(batch_id) == 0
    assert capsys.readouterr().out == "2 failed items are pending again; the batch is sending\n"
    assert world.statuses(batch_id) == ["pending", "pending", "sent", "skipped"]
    assert status_of(world, other) == ("failed", None)
    left = "SELECT DISTINCT failure_reason, queued_at, claimed_at FROM outreach_batch_items WHERE status = 'pending'"
    assert world.quinn(left) == [(None,) * 3]
    assert dispatcher.run_retry(str(uuid.uuid4())) == 1
    assert "there is no batch" in capsys.readouterr().err


def test_a_retry_that_cannot_reach_the_database_says_that_nothing_was_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in db.URL_VARIABLES.values():
        monkeypatch.setenv(variable, "postgresql://127.0.0.1:1/away")
    assert dispatcher.main(["--retry", str(uuid.uuid4())]) == 1
    assert capsys.readouterr().err.startswith("dispatcher.py: nothing was changed: ")


def test_retry_does_not_start_a_batch_that_its_owner_stopped(world: TestData) -> None:
    for status in ("draft", "paused", "cancelled"):
        batch_id = world.batch(status=status)
        world.item(batch_id, status="failed")
        assert dispatcher.run_retry(batch_id) == 0
        assert world.quinn("SELECT status FROM outreach_batches WHERE id = %(id)s", id=batch_id) == [(status,)]


def test_a_retried_item_gets_a_second_row_after_its_first_one_failed(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    batch_id = world.batch(clients=1)
    tick(world, mac_sync)
    report(base_url, "mini", "failed", error="no such number")
    sync(world)
    tick(world, mac_sync)
    assert dispatcher.run_retry(batch_id) == 0
    tick(world, mac_sync)
    assert row_statuses(world) == [("failed", False), ("queued", False)]


def test_a_tick_comes_every_thirty_seconds_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPATCH_INTERVAL_SECONDS", raising=False)
    assert dispatcher.interval() == 30


def test_a_retry_waits_for_the_job_that_runs(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick between its look at a batch and its completion would leave the batch `sent` with pending items."""
    batch_id = world.batch(status="sent")
    world.item(batch_id, status="failed")
    world.quinn("SELECT pg_advisory_lock(hashtext('outreach-dispatcher'))")
    monkeypatch.setattr(batches, "LOCK_WAIT", 0.2)
    assert dispatcher.run_retry(batch_id) == 1
    assert world.statuses() == ["failed"]
    monkeypatch.setattr(batches, "LOCK_WAIT", 10)
    with ThreadPoolExecutor() as threads:
        patient = threads.submit(dispatcher.run_retry, batch_id)
        world.quinn("SELECT pg_advisory_unlock(hashtext('outreach-dispatcher'))")
        assert patient.result(10) == 0
    assert world.statuses() == ["pending"]


def test_without_a_token_the_daemon_warns_and_exits_with_0() -> None:
    done = cli(MAC_SYNC_SERVICE_TOKEN="")
    assert done.returncode == 0
    assert "disabled: MAC_SYNC_SERVICE_TOKEN is not set" in done.stderr


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("MAC_SYNC_SERVICE_TOKEN", "fifteen-letters", "MAC_SYNC_SERVICE_TOKEN"),
        ("QUINN_ICLOUD_DB_URL", "", "QUINN_ICLOUD_DB_URL"),
        ("QUINN_DB_URL", "localhost:5432/quinn", "QUINN_DB_URL"),
        ("MAC_SYNC_BASE_URL", "localhost:3201", "MAC_SYNC_BASE_URL"),
        ("DISPATCH_INTERVAL_SECONDS", "soon", "DISPATCH_INTERVAL_SECONDS"),
    ],
)
def test_a_daemon_that_is_misconfigured_exits_with_2_and_names_the_variable(
    setting: str, value: str, named: str
) -> None:
    away = "postgresql://127.0.0.1:1/away"
    done = cli("--once", **{"QUINN_DB_URL": away, "QUINN_ICLOUD_DB_URL": away, setting: value})
    assert done.returncode == 2
    assert re.search(rf"^dispatcher\.py: {named} ", done.stderr, re.MULTILINE)
    assert "fifteen-letters" not in done.stderr


def test_help_lists_the_environment_and_two_examples() -> None:
    done = cli("--help")
    assert done.returncode == 0
    for word in ("MAC_SYNC_SERVICE_TOKEN", "MAC_SYNC_BASE_URL", "QUINN_DB_URL", "dispatcher.py --once"):
        assert word in done.stdout


def test_the_requests_to_mac_sync_are_the_contracts(world: TestData, odd: responses.RequestsMock) -> None:
    device_id = world.device()
    item_id = world.item(world.batch(), world.client(HANDLE))
    odd.post(ENQUEUE, json={"success": True, "data": {"sendQueueId": str(uuid.uuid4())}})
    tick(world, lost_mac_sync())
    request = odd.calls[0].request
    [(drafted_at,)] = world.quinn("SELECT created_at FROM outreach_batch_items")
    assert json.loads(request.body or b"") == {
        "batchItemId": item_id, "deviceId": device_id, "toHandle": HANDLE, "body": "Hello!",
        "draftedAt": drafted_at.isoformat(),
    }  # fmt: skip
    assert request.headers["Authorization"] == f"Bearer {SERVICE_TOKEN}"


# --- handles and devices ------------------------------------------------------------------------------


def test_a_number_goes_out_in_e164_and_an_unreadable_one_as_it_is_with_a_warning(
    world: TestData,
    mac_sync: dispatcher.SendQueueClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "US")
    world.device()
    for handle in ("(415) 555-0123", "a@example.com", "555 0123"):
        world.batch(clients=[world.client(handle)])
    tick(world, mac_sync)
    written = world.icloud("SELECT to_handle FROM icloud.send_queue ORDER BY to_handle")
    assert written == [("+14155550123",), ("555 0123",), ("a@example.com",)]
    [record] = loud(caplog)
    assert "number cannot be read, it is passed on as it is" in record.message
    assert "set DEFAULT_REGION" in record.message


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ({"old": 2, "last": 1, "set": 1}, "last"),
        ({"old": 2, "last": 30, "set": 1}, "set"),
        ({"old": 2, "last": 30, "set": 30}, "old"),
        ({"old": 30, "last": None, "set": 30, "new": 1}, "new"),
        ({"old": 30, "last": 30, "set": 30}, "last"),
    ],
)
def test_a_device_that_was_not_seen_for_a_day_is_passed_over_while_another_one_lives(
    world: TestData, mac_sync: dispatcher.SendQueueClient, seen: dict[str, int | None], chosen: str
) -> None:
    devices = {name: world.device(name) for name in seen}
    for name, hours in seen.items():
        at = ago(hours * 3600) if hours else None
        world.icloud("UPDATE icloud.devices SET last_seen_at = %(at)s WHERE name = %(name)s", at=at, name=name)
    world.settings(device_id=devices["set"])
    client_id = world.client()
    world.item(world.batch(status="sent"), client_id, status="sent", sent_at=ago(99_999), device_id=devices["last"])
    world.batch(clients=[client_id])
    assert tick(world, mac_sync)["queued"] == 1
    assert world.icloud("SELECT device_id FROM icloud.send_queue") == [(devices[chosen],)]


def test_more_unreachable_items_than_one_tick_skips_hold_nobody_up(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "MAX_SKIPPED", 2)
    world.device()
    batch_id = world.batch(clients=[*(world.client(None) for _ in range(3)), world.client()])
    assert tick(world, mac_sync) == {"skipped": 2, "queued": 1}
    tick(world, mac_sync)
    assert world.statuses(batch_id) == ["skipped", "skipped", "skipped", "queued"]


def test_a_row_that_was_sent_without_a_time_has_that_of_its_last_change(world: TestData) -> None:
    """A platform's own send_queue may lack the check that our tables have."""
    world.icloud("ALTER TABLE icloud.send_queue DROP CONSTRAINT send_queue_sent_has_a_time")
    device_id = world.device()
    queued, _ = in_flight(world, device_id, status="sent")
    claimed = world.item(world.batch(), claimed_at=ago(60))
    queue_row(world, claimed, device_id, status="sent")
    assert sync(world)["sent"] == 2
    changed = world.icloud("SELECT updated_at FROM icloud.send_queue ORDER BY updated_at")
    assert world.quinn("SELECT sent_at FROM outreach_batch_items ORDER BY sent_at") == changed
    assert status_of(world, queued) == status_of(world, claimed) == ("sent", None)
