"""Do to a batch what several places do to it: withdraw, retry, stop it when it goes wrong; the lock, the opt-outs.

Used by the dispatcher's jobs and its --retry. Touches outreach_batches and outreach_batch_items in quinn, withdraws
rows of icloud.send_queue, and reads icloud.opt_outs. Example:

    batches.acquire_lock(quinn, stop); batches.retry(quinn, batch_id)
"""

import logging
import threading
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import db
import handles
import pacing
import runtime

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
               AND (batch.digest IS NULL OR batch.approved_at IS NOT NULL)
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


def opted_out(icloud: Connection, addresses: Iterable[str]) -> set[str]:
    """Return the keys (handles.key) of those of the handles that have opted out."""
    sql = "SELECT handle_key FROM icloud.opt_outs WHERE handle_key = ANY (%(keys)s) AND ended_at IS NULL"
    keys = sorted({handles.key(address) for address in addresses})
    return {key for (key,) in db.query(icloud, sql, {"keys": keys})} if keys else set()


def retry(quinn: Connection, batch_id: str, include_unknown: bool = False) -> tuple[str, int, int] | None:
    """failed -> pending for a batch's items, and sent -> sending for the batch, under the dispatcher's lock.

    An item whose outcome is unknown may have been sent: it stays as it is unless that is asked for. Return the batch's
    status, how many items are pending again, and how many have an unknown outcome; None when there is no such batch.
    """
    sql = """
        WITH batch AS (
            UPDATE outreach_batches
               SET status = CASE WHEN status = 'sent' THEN 'sending' ELSE status END, updated_at = now()
             WHERE id = %(batch_id)s
            RETURNING id, status
        ), item AS (
            UPDATE outreach_batch_items
               -- send_queue_id stays: the row whose failure is known (see reconcile_claims). outcome_unknown_at
               -- stays, too: what may have been sent counts against the limits.
               SET status = 'pending', attempt = attempt + 1, failure_reason = NULL, device_id = NULL,
                   queued_at = NULL, claimed_at = NULL, updated_at = now()
             WHERE batch_id = %(batch_id)s AND status = 'failed'
               AND (outcome_unknown_at IS NULL OR %(include_unknown)s)
            RETURNING id
        )
        SELECT status, (SELECT count(*) FROM item),
               (SELECT count(*) FROM outreach_batch_items
                 WHERE batch_id = %(batch_id)s AND status = 'failed' AND outcome_unknown_at IS NOT NULL)
          FROM batch
    """
    rows = db.query(quinn, sql, {"batch_id": batch_id, "include_unknown": include_unknown})
    return (rows[0][0], rows[0][1], rows[0][2]) if rows else None


def watched(quinn: Connection, icloud: Connection, batch_id: str) -> tuple[int, datetime | None]:
    """Return how many of a batch's unknown outcomes a device may still find out, and until when it tries."""
    unknown = """
        SELECT send_queue_id
          FROM outreach_batch_items
         WHERE batch_id = %(batch_id)s AND status = 'failed' AND outcome_unknown_at IS NOT NULL
    """
    sql = """
        SELECT count(*), max(watched_until)
          FROM icloud.send_queue
         WHERE id = ANY (%(ids)s::uuid[]) AND outcome = 'unknown' AND watched_until > now()
    """
    rows = db.query(quinn, unknown, {"batch_id": batch_id})
    ids = [queue_id for (queue_id,) in rows if runtime.is_uuid(queue_id)]  # the column is TEXT
    [(count, until)] = db.query(icloud, sql, {"ids": ids})
    return count, until


# --- a batch that goes wrong stops itself -------------------------------------------------------------


def stop_failing(quinn: Connection, icloud: Connection) -> list[str]:
    """sending -> paused, with the reason, for the composed batches that go wrong; return their ids."""
    stopped = [*_stop_after_failures(quinn), *_stop_after_opt_outs(quinn, icloud)]
    for batch_id, reason in stopped:
        logger.warning("batch paused batch=%s reason=%r; `python status.py` says how to go on", batch_id, reason)
    return [batch_id for batch_id, _ in stopped]


def _stop_after_failures(quinn: Connection) -> list[db.Row]:
    """Pause the batches whose newest results, in the order of the queue, are stop_after_failures failures of devices.

    What was known before the batch was resumed does not count.
    """
    sql = """
        WITH failing AS MATERIALIZED (
            SELECT batch.id, settings.stop_after_failures AS maximum
              FROM outreach_batches AS batch, outreach_settings AS settings
             WHERE settings.id = 1 AND settings.stop_after_failures > 0
               AND batch.status = 'sending' AND batch.digest IS NOT NULL
               AND settings.stop_after_failures = (
                   SELECT count(*)
                     FROM (SELECT FROM outreach_batch_items AS item
                            WHERE batch_id = batch.id AND status = 'failed' AND device_id IS NOT NULL
                              AND updated_at > COALESCE(batch.resumed_at, '-infinity')
                              AND queued_at > COALESCE((SELECT queued_at FROM outreach_batch_items
                                                         WHERE batch_id = batch.id AND status = 'sent'
                                                         ORDER BY sent_at DESC
                                                         LIMIT 1), '-infinity')
                            ORDER BY queued_at DESC
                            LIMIT settings.stop_after_failures) AS in_a_row)
        )
        UPDATE outreach_batches AS batch
           SET status = 'paused', updated_at = now(),
               pause_reason = CASE maximum WHEN 1 THEN 'the last message failed'
                                           ELSE 'the last ' || maximum || ' messages failed' END
          FROM failing
         WHERE batch.id = failing.id AND batch.status = 'sending'
        RETURNING batch.id, batch.pause_reason
    """
    return db.query(quinn, sql)


def _stop_after_opt_outs(quinn: Connection, icloud: Connection) -> list[db.Row]:
    """Pause the batches of whose recipients more than 5 %, and at least 3, opted out since (and since it was resumed).

    Only a sync that finds an opt-out which may be new counts. Five minutes: an opt-out may become visible after it
    was made, and the two databases' clocks may differ.
    """
    composed = """
        SELECT min(COALESCE(resumed_at, approved_at)),
               (SELECT last_synced_at - interval '5 minutes' FROM outreach_settings WHERE id = 1)
          FROM outreach_batches
         WHERE status = 'sending' AND digest IS NOT NULL AND approved_at IS NOT NULL
    """
    latest = """
        SELECT handle_key, created_at
          FROM icloud.opt_outs
         -- Two bounds: of one, the planner without statistics expects a third of the table, and scans it.
         WHERE created_at BETWEEN %(since)s AND now() AND CASE WHEN ended_at IS NULL THEN true END
           AND (SELECT max(created_at) FROM icloud.opt_outs) > COALESCE(%(last_synced)s::timestamptz, '-infinity')
    """
    stop = """
        WITH lost AS MATERIALIZED (
            SELECT item.batch_id, count(*) AS count
              FROM unnest(%(keys)s::text[], %(times)s::timestamptz[]) AS opt_out (handle_key, created_at)
              JOIN outreach_batch_items AS item ON item.handle_key = opt_out.handle_key AND item.status = 'sent'
              JOIN outreach_batches AS batch ON batch.id = item.batch_id
             WHERE batch.status = 'sending' AND batch.digest IS NOT NULL
               AND opt_out.created_at > item.queued_at
               AND opt_out.created_at > COALESCE(batch.resumed_at, '-infinity')
             GROUP BY item.batch_id
        ), reached AS MATERIALIZED (
            SELECT batch_id, lost.count AS opted_out,
                   (SELECT count(*) FROM outreach_batch_items AS item
                     WHERE item.batch_id = lost.batch_id AND status = 'sent') AS sent
              FROM lost
             WHERE lost.count >= 3
        )
        UPDATE outreach_batches AS batch
           SET status = 'paused', updated_at = now(),
               pause_reason = opted_out || ' of the ' || sent || ' people that it was sent to opted out'
          FROM reached
         WHERE batch.id = reached.batch_id AND batch.status = 'sending' AND opted_out > sent * 0.05
        RETURNING batch.id, batch.pause_reason
    """
    [(since, last_synced)] = db.query(quinn, composed)
    rows = db.query(icloud, latest, {"since": since, "last_synced": last_synced}) if since else []
    if not rows:
        return []
    return db.query(quinn, stop, {"keys": [key for key, _ in rows], "times": [moment for _, moment in rows]})
