"""Check which items the dispatch job claims, and in which order. The jobs run against real databases and a server."""

import logging
from typing import Any

import pytest
from helpers import ago, hold_sending, logged_problems, record_statements, report_all, row_statuses, sync, tick
from testing import TestData

import choosing
import dispatcher


def test_item_goes_to_device_and_back(world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device("mini")
    batch_id = world.batch(clients=2)
    for _ in range(2):
        assert tick(world, mac_sync)["queued"] == 1
        [(queued_at, claimed_at)] = world.quinn(
            "SELECT queued_at, claimed_at FROM outreach_batch_items WHERE status = 'queued'"
        )
        assert queued_at > ago(5)
        assert claimed_at is None
        assert report_all(base_url, "mini") == 1
        assert sync(world)["sent"] == 1
    assert world.statuses(batch_id) == ["sent", "sent"]
    tick(world, mac_sync)
    assert world.quinn("SELECT status FROM outreach_batches") == [("sent",)]
    [(last_dispatched_at, last_synced_at)] = world.quinn(
        "SELECT last_dispatched_at, last_synced_at FROM outreach_settings"
    )
    assert last_dispatched_at > ago(5)
    assert last_synced_at > ago(5)


def test_tick_takes_oldest_item_of_each_batch(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    batch_ids = [world.batch(clients=3) for _ in range(3)]
    assert tick(world, mac_sync)["queued"] == 3
    assert [world.statuses(batch_id) for batch_id in batch_ids] == [["queued", "pending", "pending"]] * 3


def test_large_batch_does_not_starve_others(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device("mini")
    world.settings(max_per_minute=1)
    names = {world.batch(clients=4): "large", world.batch(clients=1): "small", world.batch(clients=1): "late"}
    served = []
    for _ in range(6):
        assert tick(world, mac_sync)["queued"] == 1
        served += world.quinn("SELECT batch_id FROM outreach_batch_items WHERE status = 'queued'")
        report_all(base_url, "mini")
        sync(world)
        world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - interval '1 minute' WHERE sent_at IS NOT NULL")
    assert [names[batch_id] for (batch_id,) in served] == ["large", "small", "late", "large", "large", "large"]


def test_batch_served_longest_ago_goes_first(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.settings(max_per_hour=2)
    recent = world.batch(clients=1, last_served_at=ago(10))
    long_ago = world.batch(clients=1, last_served_at=ago(100))
    never = world.batch(clients=1)
    tick(world, mac_sync)
    assert [world.statuses(batch_id) for batch_id in (never, long_ago, recent)] == [["queued"], ["queued"], ["pending"]]


def test_dispatch_ignores_idle_batches_and_dry_runs(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
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


def test_client_without_primary_handle_is_skipped(
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


def test_skip_also_works_behind_ended_items(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    """Otherwise the unreachable item would cost the next item its tick."""
    world.device()
    batch_id = world.batch(clients=[world.client(), world.client(handle=None), world.client()])
    tick(world, mac_sync)
    assert tick(world, mac_sync) == {"skipped": 1, "queued": 1}
    assert world.statuses(batch_id) == ["queued", "skipped", "queued"]


def test_many_unreachable_items_do_not_block_a_batch(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "LOOKS", (1, 2))
    world.device()
    batch_id = world.batch(clients=[*(world.client(None) for _ in range(4)), world.client()])
    other = world.batch(clients=1)
    assert tick(world, mac_sync) == {"skipped": 3, "queued": 1}
    assert world.statuses(other) == ["queued"]
    assert tick(world, mac_sync) == {"skipped": 1, "queued": 1}
    assert world.statuses(batch_id) == ["skipped"] * 4 + ["queued"]


def test_unreachable_batch_gives_place_to_next(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
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


def test_first_of_two_primary_handles_is_used(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    client = world.client("+14155550188")
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, '+14155550123', true)", id=client)
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, '+14155550100', false)", id=client)
    world.batch(clients=[client])
    tick(world, mac_sync)
    assert world.icloud("SELECT to_handle FROM icloud.send_queue") == [("+14155550123",)]


def test_dry_run_stops_a_claimed_item(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.item(world.batch(dry_run=True), claimed_at=ago(60))
    assert tick(world, mac_sync)["queued"] == 0
    assert row_statuses(world) == []


@pytest.mark.parametrize("hold", ["paused", "quiet hours", "no settings"])
def test_hold_stops_dispatch_and_is_logged_once(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture, hold: str
) -> None:
    caplog.set_level(logging.INFO)
    world.device()
    world.batch(clients=1)
    hold_sending(world, hold)
    for _ in range(3):
        assert not +tick(world, mac_sync)
    assert world.statuses() == ["pending"]
    logged = [record for record in caplog.records if hold in record.message]
    assert [record.levelno for record in logged] == [logging.ERROR if hold == "no settings" else logging.INFO]


def test_item_changed_during_enqueue_stays_changed(
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
    assert tick(world, mac_sync)["withdrawn"] == 1  # its row is not wanted any more
    assert world.statuses() == ["skipped"]
    assert "item changed concurrently during enqueue" in logged_problems(caplog)[0].message


def test_item_ended_during_rejection_stays_ended(
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


def test_stop_ends_tick_after_current_item(
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


def test_tick_ends_after_one_interval(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.device()
    world.batch(clients=1)
    with monkeypatch.context() as patch:
        patch.setattr(dispatcher, "interval", lambda: -1)
        assert tick(world, mac_sync)["queued"] == 0
    assert world.statuses() == ["pending"]
    assert tick(world, mac_sync)["queued"] == 1


def test_statement_count_ignores_batch_count(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.device()
    world.settings(max_per_minute=1)
    statements = record_statements(monkeypatch)
    counts = []
    for more in (2, 40):
        for _ in range(more):
            world.batch(clients=1)
        world.quinn("UPDATE outreach_batch_items SET status = 'skipped' WHERE status = 'queued'")
        statements.clear()
        assert tick(world, mac_sync)["queued"] == 1
        counts.append(len(statements))
    assert counts[0] == counts[1]
