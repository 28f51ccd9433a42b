"""Check what the sync job does with claimed items: link them to their rows, or release them."""

from datetime import datetime

import pytest
from helpers import ago, logged_problems, queue_row, status_of, sync
from testing import TestData

import dispatcher


@pytest.mark.parametrize(("status", "sent_at"), [("queued", None), ("sent", ago(7))])
def test_claim_with_lost_response_takes_its_row(
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
    assert "response was lost" in logged_problems(caplog)[0].message


def test_claim_takes_failure_reported_before_its_record(world: TestData) -> None:
    device_id = world.device()
    item_id = world.item(world.batch(), claimed_at=ago(5))
    row = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, status, failure_reason, created_at)
        VALUES (%(device)s, 'a@example.com', 'x', %(item)s, 'failed', 'not on iMessage', %(at)s) RETURNING id
    """
    world.icloud(row, device=device_id, item=item_id, at=ago(3))
    sync(world)
    assert status_of(world, item_id) == ("failed", "not on iMessage")


def test_claim_ignores_earlier_failure_and_withdrawal(world: TestData) -> None:
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


def test_claim_of_paused_batch_is_released(world: TestData) -> None:
    world.item(world.batch(status="paused"), claimed_at=ago(60))
    world.item(world.batch(dry_run=True), claimed_at=ago(60))
    kept = world.item(world.batch(), claimed_at=ago(60))
    sync(world)
    assert world.quinn("SELECT id FROM outreach_batch_items WHERE claimed_at IS NOT NULL") == [(kept,)]
