"""Do to a batch what several places do to it: withdraw its messages, retry its failed items, lock the dispatcher out.

Used by the dispatcher's jobs and its --retry. Touches outreach_batches and outreach_batch_items in quinn, and withdraws
rows of icloud.send_queue. Example:

    batches.acquire_lock(quinn, stop); batches.retry(quinn, batch_id)
"""

import logging
import threading
import time
from typing import Any

import db
import pacing

LOCK = "outreach-dispatcher"  # hashed into the advisory lock's key
LOCK_WAIT = 10  # seconds to wait for another process that holds it
LOCK_HOLDERS = (
    "SELECT pid, client_addr FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory'"  # to be shown
)

Connection = Any  # psycopg2's connection
logger = logging.getLogger("outreach-dispatcher")


class LockTimeout(Exception):
    """Another process held the dispatcher's lock for LOCK_WAIT seconds, or this one is stopping."""


def acquire_lock(quinn: Connection, stop: threading.Event) -> None:
    """Take the dispatcher's lock for this connection: one process at a time runs a job. Raises LockTimeout."""
    end = time.monotonic() + LOCK_WAIT
    while not db.query(quinn, "SELECT pg_try_advisory_lock(hashtext(%(name)s))", {"name": LOCK})[0][0]:
        if time.monotonic() > end or stop.wait(0.1):
            raise LockTimeout


def withdraw(quinn: Connection, icloud: Connection, hold: pacing.Hold | None) -> int:
    """Withdraw the uncollected rows that must not be sent now; return how many.

    Those are all rows of items while a hold of everything lasts; otherwise the rows of batches that are not sending,
    rows past their valid_until, and rows that the dispatcher made (drafted_at) and whose item was deleted. It starts
    from the rows, because a crash may have left one whose item still says `pending`. A row that was put in by hand is
    left alone until its valid_until.
    """
    uncollected = """
        SELECT id, batch_item_id, COALESCE(valid_until <= now(), false), drafted_at IS NOT NULL
          FROM icloud.send_queue
         WHERE status = 'queued' AND collected_at IS NULL
    """
    wanted = """
        SELECT item.id,
               batch.status = 'sending' AND NOT batch.dry_run AND item.status IN ('pending', 'queued')
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.id = ANY (%(ids)s::uuid[])
    """
    rows = db.query(icloud, uncollected)
    if not rows:
        return 0
    item_ids = [item_id for _, item_id, _, _ in rows if item_id]
    is_wanted: dict[str, bool] = dict(db.query(quinn, wanted, {"ids": item_ids}))
    reasons: dict[str, str] = {}
    for row_id, item_id, is_expired, is_ours in rows:
        if is_expired:
            reasons[row_id] = "its time is over"
        elif item_id in is_wanted and hold:
            reasons[row_id] = str(hold)
        elif item_id in is_wanted and not is_wanted[item_id]:
            reasons[row_id] = "its batch is not being sent"
        elif item_id not in is_wanted and is_ours:
            reasons[row_id] = "its item was deleted"
    return _withdraw_rows(icloud, reasons) if reasons else 0


def _withdraw_rows(icloud: Connection, reasons: dict[str, str]) -> int:
    """queued -> failed and withdrawn, for each row that is still uncollected; return how many."""
    sql = """
        UPDATE icloud.send_queue AS message
           SET status = 'failed', withdrawn_at = now(), updated_at = now(), failure_reason = withdrawn.reason
          FROM unnest(%(ids)s::uuid[], %(reasons)s::text[]) AS withdrawn (id, reason)
         WHERE message.id = withdrawn.id AND status = 'queued' AND collected_at IS NULL
        RETURNING message.id
    """
    texts = [f"withdrawn: {reason}" for reason in reasons.values()]
    taken = db.query(icloud, sql, {"ids": list(reasons), "reasons": texts})
    for (row_id,) in taken:
        logger.info("row withdrawn sendQueueId=%s reason=%r", row_id, f"withdrawn: {reasons[row_id]}")
    return len(taken)


def retry(quinn: Connection, batch_id: str) -> tuple[str, int] | None:
    """failed -> pending for a batch's items, and sent -> sending for the batch, under the dispatcher's lock.

    Return the batch's status and how many items there were; None when there is no such batch.
    """
    sql = """
        WITH batch AS (
            UPDATE outreach_batches
               SET status = CASE WHEN status = 'sent' THEN 'sending' ELSE status END, updated_at = now()
             WHERE id = %(batch_id)s
            RETURNING id, status
        ), item AS (
            UPDATE outreach_batch_items
               -- send_queue_id stays: the row whose failure is known (see reconcile_claims).
               SET status = 'pending', failure_reason = NULL, device_id = NULL,
                   queued_at = NULL, claimed_at = NULL, updated_at = now()
             WHERE batch_id = %(batch_id)s AND status = 'failed'
            RETURNING id
        )
        SELECT status, (SELECT count(*) FROM item) FROM batch
    """
    rows = db.query(quinn, sql, {"batch_id": batch_id})
    return (rows[0][0], rows[0][1]) if rows else None
