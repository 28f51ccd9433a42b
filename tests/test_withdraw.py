"""Check which rows the sync job withdraws from the queue, and which it leaves there."""

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    LOCK_WAITS,
    ago,
    hold_sending,
    in_flight,
    poll,
    queue_row,
    report_all,
    row_statuses,
    status_of,
    sync,
    tick,
)
from testing import TestData, wait_until

import db
import dispatcher


@pytest.mark.parametrize(
    "why", ["paused", "quiet hours", "no settings", "past its time", "batch paused", "batch cancelled", "dry run"]
)
def test_withdraw_takes_uncollected_rows(world: TestData, why: str) -> None:
    item_id, _ = in_flight(world, world.device())
    if why == "past its time":
        world.icloud("UPDATE icloud.send_queue SET valid_until = now() - interval '1 second'")
    elif why == "dry run":
        world.quinn("UPDATE outreach_batches SET dry_run = true")
    elif why.startswith("batch "):
        world.quinn("UPDATE outreach_batches SET status = %(status)s", status=why.removeprefix("batch "))
    else:
        hold_sending(world, why)
    assert sync(world)["withdrawn"] == 1
    assert row_statuses(world) == [("failed", True)]
    assert status_of(world, item_id) == ("pending", None)
    assert world.quinn("SELECT send_queue_id, device_id, queued_at, claimed_at FROM outreach_batch_items") == [
        (None,) * 4
    ]


def test_withdraw_skips_collected_rows(world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device("mini")
    world.batch(clients=1)
    tick(world, mac_sync)
    assert len(poll(base_url, "mini")) == 1
    world.icloud("UPDATE icloud.send_queue SET valid_until = now() - interval '1 second'")
    world.quinn("UPDATE outreach_batches SET status = 'cancelled'")
    world.settings(paused=True)
    assert sync(world)["withdrawn"] == 0
    assert world.statuses() == ["queued"]
    assert report_all(base_url, "mini") == 1
    sync(world)
    assert world.statuses() == ["sent"]


def test_withdraw_skips_rows_without_item(world: TestData) -> None:
    device_id = world.device()
    queue_row(world, None, device_id)
    queue_row(world, str(uuid.uuid4()), device_id, valid_until=ago(-60))  # put in by hand, with some id
    queue_row(world, None, device_id, valid_until=ago(5))
    world.settings(paused=True)
    assert sync(world)["withdrawn"] == 1
    assert row_statuses(world) == [("queued", False), ("queued", False), ("failed", True)]


def test_withdraw_needs_a_reason(world: TestData) -> None:
    in_flight(world, world.device(), valid_until=ago(-60))
    sync(world)
    assert row_statuses(world) == [("queued", False)]


def test_withdraw_takes_rows_of_ended_items(world: TestData) -> None:
    queue_row(world, world.item(world.batch(), status="skipped"), world.device())
    assert sync(world)["withdrawn"] == 1
    assert row_statuses(world) == [("failed", True)]


def test_withdraw_takes_rows_of_deleted_batches(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    batch_id = world.batch(clients=1)
    tick(world, mac_sync)
    world.quinn("DELETE FROM outreach_batches WHERE id = %(id)s", id=batch_id)
    assert sync(world) == {"withdrawn": 1}
    assert row_statuses(world) == [("failed", True)]
    assert world.icloud("SELECT failure_reason FROM icloud.send_queue") == [("withdrawn: its item was deleted",)]


def test_withdraw_takes_row_left_by_crash(
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


def test_poll_before_withdrawal_gets_the_row(world: TestData) -> None:
    item_id, _ = in_flight(world, world.device())
    world.settings(paused=True)
    with contextlib.closing(db.connect(world.databases.icloud_url)) as device, ThreadPoolExecutor() as threads:
        device.autocommit = False
        db.query(device, "UPDATE icloud.send_queue SET collected_at = now()")
        withdrawal = threads.submit(sync, world)
        with contextlib.closing(db.connect(world.databases.icloud_url)) as watcher:
            wait_until(lambda: db.query(watcher, LOCK_WAITS), 2)
        device.commit()
        assert withdrawal.result(5)["withdrawn"] == 0
    assert status_of(world, item_id) == ("queued", None)
    assert row_statuses(world) == [("queued", False)]


def test_poll_after_withdrawal_gets_nothing(world: TestData, base_url: str) -> None:
    in_flight(world, world.device("mini"))
    with contextlib.closing(db.connect(world.databases.icloud_url)) as withdrawal, ThreadPoolExecutor() as threads:
        withdrawal.autocommit = False
        db.query(withdrawal, "UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now()")
        device = threads.submit(poll, base_url, "mini")
        wait_until(lambda: world.icloud(LOCK_WAITS), 2)
        withdrawal.commit()
        assert device.result(5) == []
    assert row_statuses(world) == [("failed", True)]
