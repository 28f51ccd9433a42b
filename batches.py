"""Do to a batch what several places do to it: pause, resume, cancel, withdraw, retry, stop it when it goes wrong.

Also what several places ask: the dispatcher's lock, the opt-outs. Used by the dispatcher, by composing.py and by the
owner's scripts. Touches outreach_batches and outreach_batch_items in quinn, withdraws rows of
icloud.send_queue, and reads icloud.opt_outs. Example:

    batches.pause(quinn, icloud, batch_id)
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import db
import handles
import pacing
import recipient_zones
import runtime

LOCK = "outreach-dispatcher"  # hashed into the advisory lock's key
LOCK_WAIT = 10  # seconds to wait for another process that holds it
LOCK_HOLDERS = (
    "SELECT pid, client_addr FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory'"  # to be shown
)
LAPSED = "approval lapsed"  # a pause_reason
PAST_ITS_TIME = "its time to be sent was over"  # why an item is skipped

Connection = Any  # psycopg2's connection
logger = logging.getLogger("outreach-dispatcher")


class Refused(Exception):
    """A request that cannot be done. The message is a sentence that says what to do.

    `status`: as in HTTP (400 wrong, 404 unknown, 409 in conflict with what is stored, 422 opted out). `data`: for a
    program, such as the place of a template's error.
    """

    def __init__(self, status: int, message: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.data = status, data


class Changed(NamedTuple):
    """What a verb did. `withdrawn`: messages taken back. `beyond_recall`: messages that a device has collected, and of
    which it has not reported a result.
    """

    status: str
    withdrawn: int
    beyond_recall: int

    def as_data(self) -> dict[str, str | int]:
        """Return it as the owner's API and command line write it in JSON."""
        return {"status": self.status, "withdrawn": self.withdrawn, "beyondRecall": self.beyond_recall}


class LockTimeout(Exception):
    """Another process held the dispatcher's lock for LOCK_WAIT seconds, or this one is stopping."""


def acquire_lock(quinn: Connection, stop: threading.Event) -> None:
    """Take the dispatcher's lock for this connection: one process at a time runs a job. Raises LockTimeout."""
    end = time.monotonic() + LOCK_WAIT
    while not db.try_lock(quinn, LOCK):
        if time.monotonic() > end or stop.wait(0.1):
            raise LockTimeout


def withdraw(quinn: Connection, icloud: Connection, snapshot: pacing.Snapshot | None) -> int:
    """Withdraw the uncollected rows that must not be sent now; return how many.

    Those are all rows of items while a hold of everything lasts; otherwise
    - the rows for recipients where it is quiet
    - rows of batches that may not be sent now: their status, their times, their approval
    - rows to people of whom another handle has opted out: the server knows no clients, so it stops only rows to the
      handle itself
    - rows past their valid_until
    - rows that the dispatcher made (drafted_at) and whose item was deleted

    It starts from the rows, because a crash may have left one whose item still says `pending`. A row that was put in by
    hand is left alone until its valid_until.
    """
    uncollected = """
        SELECT id, batch_item_id, COALESCE(valid_until <= now(), false), drafted_at IS NOT NULL
          FROM icloud.send_queue
         WHERE status = 'queued' AND collected_at IS NULL
    """
    wanted = """
        SELECT item.id,
               batch.status = 'sending' AND NOT batch.dry_run AND item.status IN ('pending', 'queued')
               AND (batch.digest IS NULL
                    OR (batch.approved_at IS NOT NULL AND now() >= COALESCE(send_from, '-infinity')
                        AND now() < LEAST(send_until, approved_at + approval_days * interval '1 day', 'infinity'))),
               ARRAY(SELECT handle FROM contact_relationships WHERE client_id = item.client_id AND handle IS NOT NULL)
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
          LEFT JOIN outreach_settings AS settings ON settings.id = 1
         WHERE item.id = ANY (%(ids)s::uuid[])
    """
    rows = db.query(icloud, uncollected)
    if not rows:
        return 0
    hold = pacing.global_hold(snapshot)
    item_ids = [item_id for _, item_id, _, _ in rows if item_id]
    items = db.query(quinn, wanted, {"ids": item_ids})
    is_wanted: dict[str, bool] = {item_id: may_go for item_id, may_go, _ in items}
    stopped = opted_out(icloud, (address for _, _, addresses in items for address in addresses))
    has_opted_out = {
        item_id for item_id, _, addresses in items if any(handles.key(address) in stopped for address in addresses)
    }
    asleep = _asleep(quinn, snapshot, list(is_wanted)) if snapshot and not hold else set()
    reasons: dict[str, str] = {}
    for row_id, item_id, is_expired, is_ours in rows:
        if is_expired:
            reasons[row_id] = "its time is over"
        elif item_id in is_wanted and hold:
            reasons[row_id] = str(hold)
        elif item_id in is_wanted and not is_wanted[item_id]:
            reasons[row_id] = "its batch is not being sent"
        elif item_id in asleep:
            reasons[row_id] = "it is quiet where its recipient is"
        elif item_id in has_opted_out:
            reasons[row_id] = "opted out"
        elif item_id not in is_wanted and is_ours:
            reasons[row_id] = "its item was deleted"
    return _withdraw_rows(icloud, reasons) if reasons else 0


def _asleep(quinn: Connection, snapshot: pacing.Snapshot, item_ids: Sequence[str]) -> set[str]:
    """Return those of the items for whose recipients it is quiet now, or will be in a moment."""
    times = snapshot.settings.quiet_times
    if times.of == "sender":
        return set()
    found = recipient_zones.of_items(quinn, item_ids)
    return {item_id for item_id, names in found.items() if not times.is_open(names, snapshot.now)}


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


# --- the owner's verbs --------------------------------------------------------------------------------


def pause(quinn: Connection, icloud: Connection, batch_id: str) -> Changed:
    """sending -> paused; withdraw what no device has collected, also while the dispatcher does not run."""
    sql = """
        UPDATE outreach_batches
           SET status = 'paused', pause_reason = NULL, updated_at = now()
         WHERE id = %(id)s AND status = 'sending'
        RETURNING status
    """
    if not db.query(quinn, sql, {"id": batch_id}) and _status(quinn, batch_id) != "paused":
        raise Refused(409, f"the batch is {_status(quinn, batch_id)}: only a batch that is being sent can be paused")
    return _take_back(quinn, icloud, batch_id, "its batch was paused")


def cancel(quinn: Connection, icloud: Connection, batch_id: str) -> Changed:
    """draft, sending or paused -> cancelled, for good; withdraw what no device has collected."""
    sql = """
        UPDATE outreach_batches
           SET status = 'cancelled', updated_at = now()
         WHERE id = %(id)s AND status IN ('draft', 'sending', 'paused')
        RETURNING status
    """
    if not db.query(quinn, sql, {"id": batch_id}) and _status(quinn, batch_id) != "cancelled":
        raise Refused(409, f"the batch is {_status(quinn, batch_id)}: there is nothing left to cancel")
    return _take_back(quinn, icloud, batch_id, "its batch was cancelled")


def resume(quinn: Connection, batch_id: str) -> Changed:
    """paused -> sending, if its approval has not lapsed. What happened before does not count for the rules that pause
    it. If the first_n messages were sent, the rest follows. If its owner paused it before, first_n begins again.
    """
    sql = """
        UPDATE outreach_batches
           SET status = 'sending', resumed_at = now(), pause_reason = NULL, updated_at = now(),
               first_n = CASE WHEN pause_reason LIKE 'the first %%' THEN NULL ELSE first_n END
         WHERE id = %(id)s AND status = 'paused' AND pause_reason IS DISTINCT FROM %(lapsed)s
           AND (digest IS NULL
                OR approved_at + COALESCE((SELECT approval_days FROM outreach_settings WHERE id = 1), 36500)
                                 * interval '1 day' > now())
        RETURNING status
    """
    if not db.query(quinn, sql, {"id": batch_id, "lapsed": LAPSED}):
        status = _status(quinn, batch_id)
        if status == "paused":
            raise Refused(
                409, "its approval has lapsed, or there is none: look at the batch again, and send it with its digest"
            )
        if status != "sending":
            remedy = "; a draft is started with send" if status == "draft" else ""
            raise Refused(409, f"the batch is {status}: only a paused batch can be resumed{remedy}")
    return Changed("sending", 0, 0)


def check_first(pause_reason: str | None) -> str | None:
    """Return what to look at before a batch that paused itself goes on; None if its owner paused it."""
    if pause_reason is None:
        return None
    if "failed" in pause_reason:
        return "Look at the reasons of the failures, and at the Mac: python mac_sender.py doctor."
    if "opted out" in pause_reason:
        return "Read the text again, as somebody who did not expect it, and see how these people were chosen."
    if pause_reason == LAPSED:
        return "Look at the batch again: people and prices may have changed since its approval."
    if pause_reason.endswith("sent"):
        return "Look at what the first ones received, on the Mac."
    return "Correct what the reason says."


def _status(quinn: Connection, batch_id: str) -> str:
    """Return a batch's status. Raises Refused if there is no such batch."""
    rows = db.query(quinn, "SELECT status FROM outreach_batches WHERE id = %(id)s", {"id": batch_id})
    if not rows:
        raise Refused(404, f"there is no batch {batch_id}")
    return str(rows[0][0])


def _take_back(quinn: Connection, icloud: Connection, batch_id: str, reason: str) -> Changed:
    """Withdraw a batch's rows that no device has collected; count those that one has."""
    in_flight = """
        SELECT id FROM outreach_batch_items WHERE batch_id = %(id)s AND status = 'queued'
        UNION ALL
        SELECT id FROM outreach_batch_items WHERE batch_id = %(id)s AND status = 'pending' AND claimed_at IS NOT NULL
    """
    rows_of = """
        SELECT id, collected_at IS NOT NULL
          FROM icloud.send_queue
         WHERE batch_item_id = ANY (%(ids)s::uuid[]) AND status <> 'failed' AND CASE status WHEN 'queued' THEN true END
    """
    ids = [item_id for (item_id,) in db.query(quinn, in_flight, {"id": batch_id})]
    rows = db.query(icloud, rows_of, {"ids": ids}) if ids else []
    waiting = {row_id: reason for row_id, is_collected in rows if not is_collected}
    withdrawn = _withdraw_rows(icloud, waiting) if waiting else 0
    # A row that was collected between the two statements is beyond recall, too.
    return Changed(_status(quinn, batch_id), withdrawn, len(rows) - withdrawn)


# --- opt-outs, and trying again -----------------------------------------------------------------------


def opted_out(icloud: Connection, addresses: Iterable[str]) -> set[str]:
    """Return the keys (handles.key) of those of the handles that have opted out."""
    return opted_out_keys(icloud, {handles.key(address) for address in addresses})


def opted_out_keys(icloud: Connection, keys: Iterable[str]) -> set[str]:
    """Return those of the handle keys that have opted out."""
    sql = "SELECT handle_key FROM icloud.opt_outs WHERE handle_key = ANY (%(keys)s) AND ended_at IS NULL"
    listed = sorted(keys)
    return {key for (key,) in db.query(icloud, sql, {"keys": listed})} if listed else set()


def retry(quinn: Connection, batch_id: str, include_unknown: bool = False) -> tuple[str, int, int] | None:
    """failed -> pending for a batch's items, and sent -> sending for the batch, under the dispatcher's lock.

    An item whose outcome is unknown may have been sent: it stays as it is unless that is asked for. Return the batch's
    status, how many items are pending again, and how many have an unknown outcome; None when there is no such batch.
    Raises Refused to include unknown outcomes that a device may still find out.
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
                   queued_at = NULL, claimed_at = NULL, updated_at = now(),
                   -- The next tick looks the client up again: another batch may have written to them since.
                   time_zones = NULL
             WHERE batch_id = %(batch_id)s AND status = 'failed'
               AND (outcome_unknown_at IS NULL OR %(include_unknown)s)
               AND erased_at IS NULL  -- nothing is left to send
            RETURNING id
        )
        SELECT status, (SELECT count(*) FROM item),
               (SELECT count(*) FROM outreach_batch_items
                 WHERE batch_id = %(batch_id)s AND status = 'failed' AND outcome_unknown_at IS NOT NULL)
          FROM batch
    """
    if include_unknown:
        _refuse_watched(quinn, batch_id)
    rows = db.query(quinn, sql, {"batch_id": batch_id, "include_unknown": include_unknown})
    return (rows[0][0], rows[0][1], rows[0][2]) if rows else None


def _refuse_watched(quinn: Connection, batch_id: str) -> None:
    """Raise Refused while a device watches messages of unknown outcome: they may yet leave, and would go twice."""
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
    with contextlib.closing(db.connect(db.url("icloud"))) as icloud:
        [(count, until)] = db.query(icloud, sql, {"ids": ids})
    if until:
        what = "1 message, which" if count == 1 else f"{count} messages, which"
        when = f"{until.astimezone():%Y-%m-%d %H:%M %Z}"
        raise Refused(409, f"the Mac still watches {what} may yet leave. Try again after {when}")


# --- a batch that goes wrong stops itself -------------------------------------------------------------


def stop_failing(quinn: Connection, icloud: Connection) -> list[str]:
    """sending -> paused, with the reason, for the composed batches that go wrong; return their ids."""
    stopped = [
        *_stop_lapsed(quinn),
        *_stop_after_failures(quinn),
        *_stop_after_opt_outs(quinn, icloud),
        *_stop_after_first(quinn),
    ]
    for batch_id, reason in stopped:
        logger.warning("batch paused batch=%s reason=%r; `python status.py` says how to go on", batch_id, reason)
    return [batch_id for batch_id, _ in stopped]


def pause_broken(quinn: Connection, batch_id: str, reason: str) -> None:
    """sending -> paused, with the reason: its last checks fail, which must not hold up the other batches."""
    sql = """
        UPDATE outreach_batches
           SET status = 'paused', pause_reason = %(reason)s, updated_at = now()
         WHERE id = %(id)s AND status = 'sending'
        RETURNING id
    """
    for (paused,) in db.query(quinn, sql, {"id": batch_id, "reason": reason}):
        logger.warning("batch paused batch=%s reason=%r; `python status.py` says how to go on", paused, reason)


def _stop_lapsed(quinn: Connection) -> list[db.Row]:
    """Pause the composed batches whose approval is older than approval_days. A paused one says so, too."""
    sql = """
        UPDATE outreach_batches AS batch
           SET status = 'paused', pause_reason = %(reason)s, updated_at = now()
          FROM outreach_settings AS settings
         WHERE settings.id = 1 AND digest IS NOT NULL AND approved_at + approval_days * interval '1 day' <= now()
           AND (batch.status = 'sending' OR (batch.status = 'paused' AND pause_reason IS DISTINCT FROM %(reason)s))
        RETURNING batch.id, batch.pause_reason
    """
    return db.query(quinn, sql, {"reason": LAPSED})


def _stop_after_first(quinn: Connection) -> list[db.Row]:
    """Pause the composed batches whose first_n messages were sent, or may have been, since the approval.

    Not while one is in flight: a message of a paused batch is withdrawn.
    """
    sql = """
        UPDATE outreach_batches AS batch
           SET status = 'paused', updated_at = now(),
               pause_reason = CASE first_n WHEN 1 THEN 'the first message was sent'
                                           ELSE 'the first ' || first_n || ' messages were sent' END
         WHERE status = 'sending' AND digest IS NOT NULL AND first_n IS NOT NULL
           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued' OFFSET 0)
           AND NOT EXISTS (SELECT FROM outreach_batch_items
                            WHERE batch_id = batch.id AND status = 'pending' AND claimed_at IS NOT NULL OFFSET 0)
           AND EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending' OFFSET 0)
           AND first_n <= (SELECT count(*) FROM outreach_batch_items
                            WHERE batch_id = batch.id AND status = 'sent'
                              AND sent_at > COALESCE(batch.resumed_at, '-infinity'))
                        + (SELECT count(*) FROM outreach_batch_items
                            WHERE batch_id = batch.id AND outcome_unknown_at > COALESCE(batch.resumed_at, '-infinity')
                              AND CASE status WHEN 'failed' THEN true END)
        RETURNING batch.id, batch.pause_reason
    """
    return db.query(quinn, sql)


def end_late(quinn: Connection, maximum: int = 10_000) -> int:
    """pending -> skipped, for items of composed batches past send_until; return how many, `maximum` at most.

    Call it after claims were reconciled: what is claimed still has no row then.
    """
    sql = """
        UPDATE outreach_batch_items
           SET status = 'skipped', failure_reason = %(reason)s, claimed_at = NULL, updated_at = now()
         WHERE CASE status WHEN 'pending' THEN true END
           AND id = ANY (ARRAY(
               SELECT item.id
                 FROM outreach_batches AS batch
                CROSS JOIN LATERAL (SELECT id FROM outreach_batch_items
                                     WHERE batch_id = batch.id AND status = 'pending'
                                     LIMIT %(maximum)s) AS item
                WHERE batch.status = 'sending' AND digest IS NOT NULL AND send_until <= now()
                LIMIT %(maximum)s))
        RETURNING id
    """
    return len(db.query(quinn, sql, {"maximum": maximum, "reason": PAST_ITS_TIME}))


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
