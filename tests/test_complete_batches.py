"""Check when a batch becomes `sent`."""

import pytest
import responses
from helpers import MOCK_ENQUEUE, ago, hold_sending, in_flight, mock_client, run_dispatch, sync, tick
from testing import TestData

import dispatcher


def test_batch_completes_when_all_items_ended(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    empty, done, waiting = world.batch(), world.batch(), world.batch()
    world.item(done, status="sent", sent_at=ago(5))
    world.item(done, status="failed", failure_reason="no such number")
    world.item(done, status="skipped", failure_reason="no primary handle found")
    world.item(waiting, status="sent", sent_at=ago(5))
    world.item(waiting, status="queued")
    tick(world, mac_sync)
    statuses: dict[str, str] = dict(world.quinn("SELECT id, status FROM outreach_batches"))
    assert statuses == {empty: "sending", done: "sent", waiting: "sending"}


@pytest.mark.parametrize("hold", ["paused", "quiet hours"])
def test_last_result_completes_batch_during_hold(world: TestData, hold: str) -> None:
    in_flight(world, world.device(), status="sent", sent_at=ago(5), collected_at=ago(6))
    hold_sending(world, hold)
    sync(world)
    assert world.quinn("SELECT status FROM outreach_batches") == [("sent",)]


def test_last_result_completes_batch_during_outage(world: TestData, mock_server: responses.RequestsMock) -> None:
    item_id, _ = in_flight(world, world.device(), status="sent", sent_at=ago(5))
    world.batch(clients=1)
    mock_server.post(MOCK_ENQUEUE, status=503)
    sync(world)
    run_dispatch(mock_client())
    sql = "SELECT batch.status FROM outreach_batches AS batch JOIN outreach_batch_items AS item ON batch_id = batch.id"
    assert world.quinn(f"{sql} WHERE item.id = %(id)s", id=item_id) == [("sent",)]


def test_stopped_batch_does_not_complete(world: TestData) -> None:
    batches = [world.batch(status=status) for status in ("paused", "cancelled", "draft")]
    for batch_id in batches:
        world.item(batch_id, status="skipped")
    dispatcher.complete_batches(world.databases.quinn, batches)
    assert world.quinn("SELECT count(*) FROM outreach_batches WHERE status = 'sent'") == [(0,)]
