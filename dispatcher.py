"""The outreach dispatcher: every 30 s it syncs results back, then feeds the send queue from sending batches.

Run by systemd (systemd/outreach-dispatcher.service), or once by hand. Its two jobs are `sync` and `dispatch`.
Touches outreach_batches, outreach_batch_items and outreach_settings in quinn; reads icloud.devices and
icloud.send_queue, and withdraws rows of the latter. Example:

    python dispatcher.py --once

A crash at any instruction is safe, because of the order of the writes:

    claim (commit) -> POST enqueue (the server commits) -> record (commit)

A crash or a lost response in between leaves a claimed item. It counts as in flight, and the next sync finds
its row in the queue, or the next tick repeats the request, which the queue's unique batch_item_id makes harmless.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg2
import psycopg2.errors
import requests
import schedule

import batches
import choosing
import db
import handles
import last_checks
import pacing
import personal_data
import recipient_zones
import runtime
import zones

# Seconds to connect and to wait for a response: with the recording after it still within a stop's ten seconds.
HTTP_TIMEOUT = (2, 5)
RETRIES = 2  # of a 500, which may be one bad moment of the server's
RETRY_PAUSE = 0.5  # seconds
REASON_LENGTH = 500  # characters of an error text that an item keeps
NO_REASON = "the device gave no reason"
ROW_GONE = "send queue row no longer exists"
MAX_GIVEN_BACK = 3  # an item that devices gave back so often in a row, within one attempt, has failed

Connection = Any  # psycopg2's connection
JobCounts = Counter[str]
Job = Callable[[Connection, Connection], JobCounts]
logger = logging.getLogger("outreach-dispatcher")
stop = threading.Event()


class ServerUnavailable(Exception):
    """mac-sync could not be asked about an item. `remedy`: what an operator has to do; None: waiting helps."""

    def __init__(self, what: str, remedy: str | None = None) -> None:
        super().__init__(what)
        self.remedy = remedy


class EnqueueRejected(Exception):
    """mac-sync judged the item. The message, the item's failure reason, may quote it: it is not for the log."""

    def __init__(self, reason: str, item_status: str = "failed") -> None:
        super().__init__(reason)
        self.item_status = item_status


class Item(NamedTuple):
    """A claimed item. `handle`: its client's primary one. `device_id`: the device that reached the client last.

    `handles`: all of its client's, primary ones first. `handle_key`: of the handle that the owner approved.
    `attempt`: 1, and one more for each retry. `time_zone`: the client's own.
    """

    id: str
    batch_id: str
    client_id: str
    handle_key: str | None
    body: str
    created_at: datetime
    attempt: int
    handle: str | None
    handles: list[str]
    device_id: str | None
    time_zone: str | None


class QueueRow(NamedTuple):
    """A row of the send queue, as sync reads it. `ended_at`: when it was sent, or when it failed.

    `given_back`: how many rows of the same item and attempt have the outcome `not_started`, if this one has.
    """

    id: str
    batch_item_id: str | None
    attempt: int
    status: str
    outcome: str | None
    device_id: str
    ended_at: datetime
    reason: str | None
    is_withdrawn: bool
    given_back: int


class ItemUpdate(NamedTuple):
    """What became of an item's queue row, as it is written back to the item.

    `unknown_at`: when it ended, if it may have been sent.
    """

    item_id: str
    status: str
    queue_id: str | None = None
    device_id: str | None = None
    sent_at: datetime | None = None
    reason: str | None = None
    unknown_at: datetime | None = None


# --- the sync job -------------------------------------------------------------------------------------


def sync(quinn: Connection, icloud: Connection) -> JobCounts:
    """Withdraw what must not be sent any more, then write back the results of what is in flight.

    A batch that goes wrong by these results is paused, and what waits of it is withdrawn at once.
    """
    snapshot = pacing.read_snapshot(quinn)
    counts = JobCounts(withdrawn=batches.withdraw(quinn, icloud, snapshot))
    updates = [*fetch_results(quinn, icloud), *reconcile_claims(quinn, icloud)]
    apply_updates(quinn, updates)
    counts.update(update.status for update in updates)
    if ended := batches.end_late(quinn):
        counts["skipped"] += ended
        logger.info("items skipped count=%d reason=%r", ended, batches.PAST_ITS_TIME)
    # Here too, because dispatch does not get that far while sending is paused or the server is unavailable.
    complete_batches(quinn, [batch.id for batch in pacing.batches(quinn) if not batch.pending])
    if stopped := batches.stop_failing(quinn, icloud):
        counts["batches paused"] += len(stopped)
        counts["withdrawn"] += batches.withdraw(quinn, icloud, snapshot)
    release_claims(quinn)
    db.query(quinn, "UPDATE outreach_settings SET last_synced_at = now() WHERE id = 1")
    if erased := sum(personal_data.erase_old(quinn, icloud)):
        counts["erased"] += erased
    return counts


def fetch_results(quinn: Connection, icloud: Connection) -> list[ItemUpdate]:
    """Return what became of the queued items, and of those with an unknown outcome, which a device may find out.

    Nothing for those that still wait. A device watches a message for a week at most.
    """
    work_list = """
        SELECT id, send_queue_id, true, now()
          FROM outreach_batch_items
         WHERE status = 'queued'
        UNION ALL
        SELECT id, send_queue_id, false, now()
          FROM outreach_batch_items
         WHERE outcome_unknown_at > now() - interval '8 days' AND CASE status WHEN 'failed' THEN true END
    """
    rows_of = """
        SELECT id, batch_item_id, attempt, status, outcome, device_id, COALESCE(sent_at, updated_at), failure_reason,
               withdrawn_at IS NOT NULL,
               CASE outcome WHEN 'not_started' THEN
                   (SELECT count(*) FROM icloud.send_queue AS other
                     WHERE other.batch_item_id = message.batch_item_id AND other.attempt = message.attempt
                       AND other.status = 'failed' AND other.outcome = 'not_started')
               ELSE 0 END
          FROM icloud.send_queue AS message
         WHERE id = ANY (%(ids)s::uuid[])
    """
    items = db.query(quinn, work_list)
    ids = [queue_id for _, queue_id, _, _ in items if runtime.is_uuid(queue_id)]  # the column is TEXT
    rows = {row[0]: QueueRow(*row) for row in db.query(icloud, rows_of, {"ids": ids})} if items else {}
    updates = []
    for item_id, queue_id, is_queued, now in items:
        row = rows.get(queue_id.lower()) if runtime.is_uuid(queue_id) else None
        if row is None and is_queued:
            # Its device was deleted, or the queue was restored from a backup: it may have been sent.
            updates.append(ItemUpdate(item_id, "failed", queue_id, reason=ROW_GONE, unknown_at=now))
        elif row and row.status != "queued" and (is_queued or row.outcome != "unknown"):
            updates.append(item_update(item_id, row))
    return updates


def reconcile_claims(quinn: Connection, icloud: Connection) -> list[ItemUpdate]:
    """Return the updates of claimed items whose row is in the queue: the response to their enqueue was lost.

    A row that is queued or was sent counts, else the newest failure of the item's attempt. What a retry knows already
    does not belong to this claim, nor does a row that was withdrawn or given back.
    """
    claimed = """
        SELECT id, attempt, send_queue_id FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL
    """
    rows_of = """
        SELECT id, batch_item_id, attempt, status, outcome, device_id, COALESCE(sent_at, updated_at), failure_reason,
               withdrawn_at IS NOT NULL,
               count(*) FILTER (WHERE outcome = 'not_started') OVER (PARTITION BY batch_item_id, attempt)
          FROM (SELECT * FROM icloud.send_queue WHERE batch_item_id = ANY (%(ids)s::uuid[]) AND status <> 'failed'
                 UNION ALL
                SELECT * FROM icloud.send_queue WHERE batch_item_id = ANY (%(ids)s::uuid[]) AND status = 'failed'
               ) AS message
         ORDER BY status <> 'failed', created_at
    """
    items = {item_id: (attempt, known) for item_id, attempt, known in db.query(quinn, claimed)}
    rows = [QueueRow(*row) for row in db.query(icloud, rows_of, {"ids": list(items)})] if items else []
    updates = {}
    for row in rows:
        item_id = str(row.batch_item_id)
        attempt, known = items[item_id]
        update = item_update(item_id, row)
        if update.status != "failed" or (row.attempt == attempt and row.id != known):
            updates[item_id] = update
    recovered = [update for update in updates.values() if update.status != "pending"]
    for update in recovered:
        logger.warning("enqueue recovered sendQueueId=%s item=%s: response was lost", update.queue_id, update.item_id)
    return recovered


def item_update(item_id: str, row: QueueRow) -> ItemUpdate:
    """Map a queue row to its item: sent, failed and queued as they are; withdrawn, or given back -> pending.

    The third time in a row that an item is given back, it has failed. A failure of unknown outcome is marked as one.
    """
    if row.is_withdrawn or (row.outcome == "not_started" and row.given_back < MAX_GIVEN_BACK):
        return ItemUpdate(item_id, "pending")
    if row.status == "sent":
        return ItemUpdate(item_id, "sent", row.id, row.device_id, sent_at=row.ended_at)
    if row.status == "failed":
        unknown_at = row.ended_at if row.outcome == "unknown" else None
        return ItemUpdate(
            item_id, "failed", row.id, row.device_id, reason=row.reason or NO_REASON, unknown_at=unknown_at
        )
    return ItemUpdate(item_id, "queued", row.id, row.device_id)


def apply_updates(quinn: Connection, updates: Sequence[ItemUpdate]) -> None:
    """queued -> sent, failed or pending; a claimed pending one -> queued, sent or failed; failed, of unknown outcome ->
    sent or failed. One statement.
    """
    sql = """
        UPDATE outreach_batch_items AS item
           SET status = ended.status,
               send_queue_id = ended.queue_id,
               device_id = COALESCE(ended.device_id, CASE WHEN ended.status = 'failed' THEN item.device_id END),
               queued_at = CASE WHEN ended.status <> 'pending' THEN COALESCE(item.queued_at, item.claimed_at) END,
               sent_at = ended.sent_at,
               failure_reason = ended.reason,
               -- That of an attempt before a retry stays: it counts against the limits.
               outcome_unknown_at = COALESCE(ended.unknown_at, CASE WHEN 'failed' NOT IN (item.status, ended.status)
                                                                    THEN item.outcome_unknown_at END),
               claimed_at = NULL,
               updated_at = now()
          FROM unnest(%(item_id)s::uuid[], %(status)s::text[], %(queue_id)s::text[], %(device_id)s::uuid[],
                      %(sent_at)s::timestamptz[], %(reason)s::text[], %(unknown_at)s::timestamptz[])
               AS ended (item_id, status, queue_id, device_id, sent_at, reason, unknown_at)
         WHERE item.id = ended.item_id
           AND CASE item.status WHEN 'queued' THEN true
                                WHEN 'pending' THEN item.claimed_at IS NOT NULL
                                WHEN 'failed' THEN item.outcome_unknown_at IS NOT NULL END
    """
    if not updates:
        return
    db.query(quinn, sql, dict(zip(ItemUpdate._fields, map(list, zip(*updates, strict=True)), strict=True)))
    recipient_zones.mark_known(quinn, [update.item_id for update in updates if update.sent_at or update.unknown_at])
    for update in updates:
        if update.status == "sent":
            logger.info("item sent sendQueueId=%s item=%s", update.queue_id, update.item_id)
        elif update.unknown_at:
            logger.warning(
                "item failed, outcome unknown item=%s sendQueueId=%s: it may have been sent; look at the Mac",
                update.item_id, update.queue_id,
            )  # fmt: skip
        elif update.status == "failed":
            # The reason is a device's words, which may name a person: it is in failure_reason, not in the log.
            logger.warning("item failed item=%s sendQueueId=%s", update.item_id, update.queue_id)


def release_claims(quinn: Connection) -> None:
    """Give up the claims of batches that may not be sent now: they have no row (reconcile_claims has just looked)."""
    sql = """
        WITH claimed AS MATERIALIZED (
            SELECT id, batch_id FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL
        )
        UPDATE outreach_batch_items AS item
           SET claimed_at = NULL, updated_at = now()
         WHERE CASE status WHEN 'pending' THEN true END
           AND id = ANY (ARRAY(SELECT claimed.id
                                 FROM outreach_settings AS settings,
                                      claimed JOIN outreach_batches AS batch ON batch.id = claimed.batch_id
                                WHERE settings.id = 1
                                  AND (batch.status <> 'sending' OR batch.dry_run
                                       OR (batch.digest IS NOT NULL
                                           AND (batch.approved_at IS NULL OR now() < send_from
                                                OR now() >= LEAST(send_until,
                                                                  approved_at + approval_days * interval '1 day'))))))
    """
    db.query(quinn, sql)


# --- the dispatch job ---------------------------------------------------------------------------------


def dispatch(quinn: Connection, icloud: Connection, client: "SendQueueClient") -> JobCounts:
    """Claim the items that are served now, as far as the settings let them, and enqueue them.

    What an earlier tick claimed and could not enqueue goes first, and alone: it holds its place in the limits.
    """
    # Again, for a sync that failed: a request repeated after its row has ended would make a second row.
    apply_updates(quinn, reconcile_claims(quinn, icloud))
    snapshot = pacing.read_snapshot(quinn)
    hold = pacing.global_hold(snapshot)
    if snapshot is None or hold:
        decision_log.log_change(snapshot, hold)
        mark_dispatched(quinn)
        return JobCounts(skipped=0, queued=0)
    counts = JobCounts()
    devices = pacing.devices(icloud)
    items = claimed_items(quinn)
    completion_candidates = [item.batch_id for item in items]
    if not items:
        counts["skipped"], completion_candidates = claim(quinn, icloud, snapshot, devices)
        items = claimed_items(quinn)
    mark_dispatched(quinn)
    enqueue_claimed(quinn, icloud, client, snapshot, devices, items, counts)
    complete_batches(quinn, completion_candidates)
    return counts


def mark_dispatched(quinn: Connection) -> None:
    """Note that this job has decided what goes; status.py tells from it that the job works."""
    db.query(quinn, "UPDATE outreach_settings SET last_dispatched_at = now() WHERE id = 1")


def claim(
    quinn: Connection, icloud: Connection, snapshot: pacing.Snapshot, devices: Sequence[pacing.Device]
) -> tuple[int, list[str]]:
    """Claim the next item of each batch while the limits have capacity.

    Return how many items were skipped on the way, and the batches that may have no item left: all that had none,
    and those that were served.
    """
    skipped = 0
    snapshot = pacing.read_groups(quinn, snapshot)
    if any(group.time_zones is None for group in snapshot.groups):
        recipient_zones.fill_in(quinn)
        snapshot = pacing.read_groups(quinn, snapshot)
    waiting = pacing.batches(quinn, snapshot)
    completion_candidates = [batch.id for batch in waiting if not batch.pending]

    def claim_batches(current: pacing.Snapshot, batch_ids: Sequence[str]) -> tuple[int, int]:
        nonlocal skipped
        completion_candidates.extend(batch_ids)
        found, new_contacts, deferred, skips = choosing.next_items_within_limits(quinn, icloud, batch_ids, current)
        skipped += skips
        # A batch that waits for a place keeps its turn. Otherwise the batch that took the place is older, and takes
        # the next one, too.
        served = [batch_id for batch_id in batch_ids if batch_id not in deferred]
        claimed = claim_next_items(quinn, served, list(found.values()), new_contacts)
        return len(claimed), len(claimed & (new_contacts or set()))

    decision = pacing.decide(snapshot, waiting, devices)
    decision_log.log_change(snapshot, decision)
    snapshot, rate_limited = pacing.claim_round_robin(snapshot, waiting, claim_batches)
    if rate_limited and not isinstance(decision, pacing.Hold):
        decision_log.log_change(snapshot, pacing.limit_hold(snapshot))
    return skipped, completion_candidates


def claim_next_items(
    quinn: Connection, batch_ids: Sequence[str], item_ids: Sequence[str], new_contacts: set[str] | None
) -> set[str]:
    """Claim these items, and note that their batches were served; return those that were claimed.

    `new_contacts`: those of them whose client was never written to; None: nobody has asked.
    """
    sql = """
        WITH served AS (
            UPDATE outreach_batches SET last_served_at = now() WHERE id = ANY (%(batch_ids)s::uuid[])
        )
        UPDATE outreach_batch_items
           SET claimed_at = now(), updated_at = now(),
               new_contact = COALESCE(id = ANY (%(new_contacts)s::uuid[]), new_contact)
         WHERE id = ANY (%(item_ids)s::uuid[]) AND CASE status WHEN 'pending' THEN true END
        RETURNING id
    """
    parameters = {
        "batch_ids": list(batch_ids), "item_ids": list(item_ids),
        "new_contacts": None if new_contacts is None else list(new_contacts),
    }  # fmt: skip
    return {item_id for (item_id,) in db.query(quinn, sql, parameters)}


def claimed_items(quinn: Connection) -> list[Item]:
    """Return the claimed items of batches that may be sent now, with what their message needs."""
    sql = """
        WITH claimed AS MATERIALIZED (
            SELECT id, batch_id, client_id, handle_key, rendered_body, created_at, claimed_at, attempt
              FROM outreach_batch_items
             WHERE status = 'pending' AND claimed_at IS NOT NULL
        )
        SELECT claimed.id, claimed.batch_id, claimed.client_id::text, claimed.handle_key, claimed.rendered_body,
               claimed.created_at, claimed.attempt,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = claimed.client_id AND is_primary),
               ARRAY(SELECT handle FROM contact_relationships
                      WHERE client_id = claimed.client_id AND handle IS NOT NULL
                      ORDER BY is_primary DESC NULLS LAST, handle),
               (SELECT device_id FROM outreach_batch_items
                 WHERE client_id = claimed.client_id AND status = 'sent' AND device_id IS NOT NULL
                 ORDER BY sent_at DESC
                 LIMIT 1),
               (SELECT to_jsonb(client) ->> 'time_zone' FROM clients AS client WHERE id = claimed.client_id)
          FROM outreach_settings AS settings,
               claimed
          JOIN outreach_batches AS batch ON batch.id = claimed.batch_id
         WHERE settings.id = 1 AND batch.status = 'sending' AND NOT batch.dry_run
           AND (batch.digest IS NULL
                OR (batch.approved_at IS NOT NULL AND now() >= COALESCE(send_from, '-infinity')
                    AND now() < LEAST(send_until, approved_at + approval_days * interval '1 day', 'infinity')))
         ORDER BY claimed.claimed_at, claimed.created_at, claimed.id
    """
    return [Item(*row) for row in db.query(quinn, sql)]


def enqueue_claimed(
    quinn: Connection,
    icloud: Connection,
    client: "SendQueueClient",
    snapshot: pacing.Snapshot,
    devices: Sequence[pacing.Device],
    items: Sequence[Item],
    counts: JobCounts,
) -> None:
    """Enqueue each item and record what became of it. Raises ServerUnavailable, with the rest still claimed.

    A claim may have waited through an outage, and a tick may be long: so it looks again before each request: for
    opt-outs, for a pause, for what the item's batch asks (last_checks.py), and whether it is quiet where the recipient
    is by their present number. What is enqueued all the same is withdrawn at once.
    """
    rules = last_checks.read_rules(quinn, sorted({item.batch_id for item in items}))
    times = snapshot.settings.quiet_times
    # The settings were read once, for this tick. What does not fit into one interval waits for the next tick.
    end = time.monotonic() + interval()
    for item in items:
        if stop.is_set() or time.monotonic() > end:
            return
        runtime.sd_notify("WATCHDOG=1")
        opted_out = batches.opted_out(icloud, item.handles)  # the server knows only this one handle
        names = zones.zones_of_person(item.time_zone, item.handles)
        weekly = snapshot.settings.max_per_client_per_week
        if reason := choosing.skip_reason(item.handle, item.handles, opted_out) or late_reason(
            quinn, rules, item, weekly
        ):
            counts[mark_ended(quinn, item, "skipped", reason)] += 1
        elif not times.is_open(names, snapshot.now):
            release_claim(quinn, item, names)
        elif is_wanted(quinn, item):
            device_id = device_for(item, snapshot, devices)
            quiet_from = times.valid_until(names, snapshot.now)
            ends_at = rules[item.batch_id].ends_at if item.batch_id in rules else None
            valid_until = min((moment for moment in (quiet_from, ends_at) if moment), default=None)
            status, is_still_wanted = enqueue_item(quinn, client, item, device_id, valid_until)
            counts[status] += 1
            if not is_still_wanted:
                counts["withdrawn"] += batches.withdraw(quinn, icloud, pacing.read_snapshot(quinn))


def release_claim(quinn: Connection, item: Item, names: Sequence[str]) -> None:
    """Give up the claim of an item for whose recipient it is quiet; store where the recipient is.

    If nobody has looked yet whether the client is a new contact, the next tick looks up both.
    """
    sql = """
        UPDATE outreach_batch_items
           SET claimed_at = NULL, time_zones = CASE WHEN new_contact IS NOT NULL THEN %(zones)s::text[] END,
               updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
    """
    db.query(quinn, sql, {"id": item.id, "zones": list(names)})


def late_reason(quinn: Connection, rules: dict[str, last_checks.Rules], item: Item, weekly: int | None) -> str | None:
    """Return why an item is to be skipped right before its request; None if it is not.

    If the audience of its batch cannot be checked, its batch is paused: is_wanted() then says no.
    """
    if item.batch_id not in rules and weekly is None:
        return None
    person = last_checks.Person(item.id, item.batch_id, item.client_id, item.handle_key, item.handle)
    reasons, broken = last_checks.check(quinn, rules, [person], with_claimed=False, weekly=weekly)
    for batch_id, reason in broken.items():
        batches.pause_broken(quinn, batch_id, reason)
    return reasons.get(item.id)


def is_wanted(quinn: Connection, item: Item) -> bool:
    """Tell whether a claimed item may go now: it is still claimed, its batch is being sent, nobody paused sending."""
    sql = """
        SELECT NOT settings.paused AND batch.status = 'sending' AND NOT batch.dry_run
               AND (batch.digest IS NULL
                    OR (batch.approved_at IS NOT NULL AND now() >= COALESCE(send_from, '-infinity')
                        AND now() < LEAST(send_until, approved_at + approval_days * interval '1 day', 'infinity')))
               AND item.status = 'pending' AND item.claimed_at IS NOT NULL
          FROM outreach_settings AS settings,
               outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE settings.id = 1 AND item.id = %(id)s
    """
    return db.query(quinn, sql, {"id": item.id}) == [(True,)]


def device_for(item: Item, snapshot: pacing.Snapshot, devices: Sequence[pacing.Device]) -> str | None:
    """Return the device that last reached the client, else the settings' one, else the oldest.

    A device that was not seen for a day is passed over while another one lives.
    """
    choices = [device.id for device in pacing.living(devices, snapshot.now)]
    wishes = (item.device_id, snapshot.settings.device_id, *choices[:1])
    return next((device_id for device_id in wishes if device_id in choices), None)


def enqueue_item(
    quinn: Connection, client: "SendQueueClient", item: Item, device_id: str | None, valid_until: datetime | None
) -> tuple[str, bool]:
    """Enqueue one item and record it; return its new status, and whether it is still to be sent.

    No transaction is open during the request. A crash before the record leaves the item claimed: see the head of this
    file.
    """
    if device_id is None:
        return mark_ended(quinn, item, "failed", pacing.NO_DEVICE), True
    address = item.handle or ""
    handle = handles.to_send(address)
    if handle is None:
        logger.warning(
            "number cannot be read, it is passed on as it is item=%s to=%s; %s",
            item.id, handles.mask_handle(address), handles.UNREADABLE_REMEDY,
        )  # fmt: skip
    try:
        queue_id = client.enqueue(item, handle or address, device_id, valid_until)
    except EnqueueRejected as rejection:
        return mark_ended(quinn, item, rejection.item_status, str(rejection)), True
    return "queued", mark_queued(quinn, item, queue_id, device_id)


def mark_queued(quinn: Connection, item: Item, queue_id: str, device_id: str) -> bool:
    """pending -> queued; return whether it is still to be sent: neither it, nor its batch, nor a pause came between."""
    sql = """
        UPDATE outreach_batch_items AS item
           SET status = 'queued', send_queue_id = %(queue_id)s, device_id = %(device_id)s,
               queued_at = now(), claimed_at = NULL, updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
        RETURNING (SELECT NOT paused FROM outreach_settings WHERE id = 1)
                  AND (SELECT status = 'sending' AND NOT dry_run AND (digest IS NULL OR approved_at IS NOT NULL)
                         FROM outreach_batches AS batch
                        WHERE batch.id = item.batch_id)
    """
    rows = db.query(quinn, sql, {"id": item.id, "queue_id": queue_id, "device_id": device_id})
    if rows:
        to = handles.mask_handle(item.handle or "")
        logger.info(
            "item queued to mac-sync sendQueueId=%s item=%s batch=%s to=%s", queue_id, item.id, item.batch_id, to
        )
    else:
        logger.warning("item changed concurrently during enqueue item=%s sendQueueId=%s", item.id, queue_id)
    return rows == [(True,)]


def mark_ended(quinn: Connection, item: Item, status: str, reason: str) -> str:
    """pending -> failed or skipped, with the reason."""
    sql = """
        UPDATE outreach_batch_items
           SET status = %(status)s, failure_reason = %(reason)s, claimed_at = NULL, updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
    """
    db.query(quinn, sql, {"id": item.id, "status": status, "reason": reason})
    level = logging.WARNING if status == "failed" else logging.INFO
    logger.log(level, "item %s item=%s batch=%s: failure_reason says why", status, item.id, item.batch_id)
    return status


def complete_batches(quinn: Connection, candidates: Sequence[str]) -> None:
    """sending -> sent, for those of the batches that have items, all of them ended. OFFSET 0: see schema.sql."""
    sql = """
        UPDATE outreach_batches AS batch
           SET status = 'sent', updated_at = now()
         WHERE id = ANY (%(ids)s::uuid[]) AND status = 'sending' AND NOT dry_run
           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending' OFFSET 0)
           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued' OFFSET 0)
           -- Counted once in a batch's life. For one row of it, the planner may prefer to scan the table.
           AND (SELECT count(*) FROM outreach_batch_items WHERE batch_id = batch.id) > 0
        RETURNING id
    """
    for (batch_id,) in db.query(quinn, sql, {"ids": list(candidates)}) if candidates else []:
        logger.info("batch sent batch=%s: each of its items has ended", batch_id)


# --- the HTTP client ----------------------------------------------------------------------------------


class SendQueueClient:
    """The send queue server, asked over one kept-alive session. One client is made for each tick."""

    def __init__(self, base_url: str, token: str) -> None:
        self.url = base_url.rstrip("/") + "/admin/send-queue/enqueue"
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy or a .netrc of the host must not see, or replace, the token
        self.session.headers["Authorization"] = f"Bearer {token}"

    def enqueue(self, item: Item, handle: str, device_id: str, valid_until: datetime | None) -> str:
        """Put the item's message into the queue; return its row's id. Raises EnqueueRejected or ServerUnavailable."""
        message: dict[str, str | int] = {
            "batchItemId": item.id,
            "deviceId": device_id,
            "toHandle": handle,
            "body": item.body,
            "attempt": item.attempt,
            "draftedAt": item.created_at.isoformat(),
        }
        if valid_until:
            message["validUntil"] = valid_until.isoformat()
        response = self._post(message)
        error, queue_id = _read(response)
        status = response.status_code
        if status == 200 and queue_id:
            return queue_id
        if status == 409 and queue_id:
            # Put there before a crash, and before somebody edited the item or its client: that row is what is sent.
            logger.warning("item is in the queue already, with other content item=%s sendQueueId=%s", item.id, queue_id)
            return queue_id
        if status == 422 and error:
            raise EnqueueRejected(choosing.OPTED_OUT, "skipped")
        if status in (400, 413, 500) and error:
            raise EnqueueRejected(f"HTTP {status}: {error}")
        raise ServerUnavailable(f"HTTP {status} from {self.url}", _remedy(status))

    def _post(self, message: dict[str, str | int]) -> requests.Response:
        for pause in [RETRY_PAUSE] * RETRIES + [0]:
            try:
                response = self.session.post(self.url, json=message, timeout=HTTP_TIMEOUT, allow_redirects=False)
            except requests.RequestException as error:
                raise ServerUnavailable(f"{type(error).__name__} at {self.url}") from error
            if response.status_code != 500:
                break
            if stop.wait(pause):
                raise ServerUnavailable("HTTP 500, and there is no time to ask again")
        return response


def _read(response: requests.Response) -> tuple[str | None, str | None]:
    """Return the error sentence and the queue id of the server's JSON; (None, None) for anything else.

    Anything else may be a proxy's page, or the first half of a document.
    """
    try:
        body = response.json()
        is_error, error = body.get("success") is False, body.get("error")
        queue_id = (body.get("data") or {}).get("sendQueueId")
    except (ValueError, AttributeError, RecursionError):
        return None, None
    text = db.replace_unstorable(error)[:REASON_LENGTH] if is_error and isinstance(error, str) else None
    return text, queue_id if runtime.is_uuid(queue_id) else None


def _remedy(status: int) -> str | None:
    """Return what an operator has to do about a response that says nothing of the item; None: waiting helps."""
    if status in (401, 403):
        return "set MAC_SYNC_SERVICE_TOKEN to the server's"
    if status in (408, 429, 502, 503, 504):
        return None
    return "set MAC_SYNC_BASE_URL to the send queue server's address: something else responds there"


# --- the decision log ---------------------------------------------------------------------------------


class DecisionLog:
    """Log a decision only when it changes: a night of quiet hours is one line, and so is an hour of sending.

    A short hold between two sends at the settings' pace is logged once in each stretch of sending, and the sending
    after it is not logged again.
    """

    def __init__(self) -> None:
        self.last = ""  # the code of the last decision
        self.logged: set[str] = set()  # the codes logged in this stretch

    def log_change(self, snapshot: pacing.Snapshot | None, decision: pacing.Decision) -> None:
        hold = decision if isinstance(decision, pacing.Hold) else None
        code = hold.code if hold else "sending" if decision else "nothing to send"
        is_long = decision is None or snapshot is None or (hold is not None and hold.is_long(snapshot.now))
        is_news = code != self.last if is_long or not self.last else code not in self.logged
        self.logged = {code} if is_long or not self.last else self.logged | {code}
        self.last = code
        level = logging.ERROR if snapshot is None else logging.INFO
        logger.log(level if is_news else logging.DEBUG, "%s", f"sending is held: {hold}" if hold else code)


decision_log = DecisionLog()


# --- running the jobs ---------------------------------------------------------------------------------


def run_job(name: str, job: Job) -> JobCounts | None:
    """Run a job once, under the lock; log every exception and return None.

    Each run opens new connections, so a database restart fails at most one run.
    """
    runtime.sd_notify("WATCHDOG=1")  # each job has the watchdog's whole time
    if stop.is_set():
        return None
    try:
        with contextlib.closing(db.connect(db.url("quinn"))) as quinn:
            batches.acquire_lock(quinn, stop)
            # The heartbeat, whatever happens after it: status.py tells a failing job from a dead dispatcher by it.
            db.query(quinn, "UPDATE outreach_settings SET last_tick_at = now() WHERE id = 1")
            with contextlib.closing(db.connect(db.url("icloud"))) as icloud:
                return job(quinn, icloud)
    except batches.LockTimeout:
        if not stop.is_set():
            logger.warning(
                "%s job skipped: lock held by another dispatcher for %d s; see %s",
                name, batches.LOCK_WAIT, batches.LOCK_HOLDERS,
            )  # fmt: skip
    except ServerUnavailable as error:
        logger.log(
            logging.ERROR if error.remedy else logging.WARNING,
            "enqueue stopped: mac-sync unavailable; items stay pending error=%r; %s",
            str(error), error.remedy or "see that the server runs at MAC_SYNC_BASE_URL",
        )  # fmt: skip
    except psycopg2.Error as error:
        _log_database_error(name, error)
    except Exception:
        logger.exception("%s job failed, the next run tries again", name)
    return None


def _log_database_error(name: str, error: psycopg2.Error) -> None:
    """Log which statement failed, by its function (the innermost one outside db.py), why, and the next action."""
    here = os.path.dirname(db.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame.name for frame in frames if os.path.dirname(frame.filename) == here and frame.filename != db.__file__]
    problem = db.diagnose(error)
    logger.error(
        "%s job failed: %s statement=%s error=%s; %s; the next run tries again",
        name, problem.what, ours[-1], type(error).__name__, problem.remedy,
    )  # fmt: skip


def build_jobs(token: str) -> dict[str, Job]:
    """Return the two jobs by name, in their order. Raises runtime.ConfigError."""
    base_url = os.environ.get("MAC_SYNC_BASE_URL") or "http://localhost:3201"
    if not re.match("https?://[^/]", base_url):
        raise runtime.ConfigError(
            f"MAC_SYNC_BASE_URL is {base_url!r}: set it to the server's address, such as http://localhost:3201"
        )

    def dispatch_job(quinn: Connection, icloud: Connection) -> JobCounts:
        client = SendQueueClient(base_url, token)
        with client.session:
            return dispatch(quinn, icloud, client)

    return {"sync": sync, "dispatch": dispatch_job}


def interval() -> int:
    """Return the seconds between two ticks."""
    return runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30)


def run_forever(token: str) -> None:
    """Run both jobs at once and then every interval(), sync first, until SIGTERM or SIGINT."""
    for name, job in build_jobs(token).items():
        schedule.every(interval()).seconds.do(run_job, name, job)
    runtime.sd_notify("READY=1")
    schedule.run_all()  # schedule's own first run comes only after an interval
    while not stop.wait(min(1.0, max(0.05, schedule.idle_seconds() or 0))):
        runtime.sd_notify("WATCHDOG=1")
        # schedule goes by the local wall clock. Where that was set back, by hand or at the end of summer
        # time, the next run of a job, or of both, has moved an hour away.
        runs = [job.next_run for job in schedule.get_jobs() if job.next_run]
        if (schedule.idle_seconds() or 0) + (max(runs) - min(runs)).total_seconds() > interval():
            schedule.run_all()
        schedule.run_pending()


def run_once(token: str) -> int:
    """Run both jobs once and print what they did; return 1 when one failed."""
    results = {name: run_job(name, job) for name, job in build_jobs(token).items()}
    for name, counts in results.items():
        did = (
            "failed"
            if counts is None
            else ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count)
        )
        sys.stdout.write(f"{name}: {did or 'nothing to do'}\n")
    return 1 if None in results.values() else 0


def run_retry(batch_id: str, include_unknown: bool = False) -> int:
    """Make a batch's failed items pending again, between two jobs, and print how many."""
    try:
        with contextlib.closing(db.connect(db.url("quinn"))) as quinn:
            batches.acquire_lock(quinn, stop)
            found = batches.retry(quinn, batch_id, include_unknown)
    except batches.LockTimeout:
        sys.stderr.write(
            f"dispatcher.py: nothing was changed: the dispatcher was busy for {batches.LOCK_WAIT} s; try again\n"
        )
        return 1
    except (batches.Refused, psycopg2.Error) as problem:
        sys.stderr.write(f"dispatcher.py: nothing was changed: {str(problem).strip()}\n")
        return 1
    if found is None:
        sys.stderr.write(f"dispatcher.py: there is no batch {batch_id}\n")
        return 1
    status, count, unknown = found
    sys.stdout.write(f"{count} failed items are pending again; the batch is {status}\n")
    if unknown and not include_unknown:
        sys.stdout.write(
            f"{unknown} more may have been sent and stay failed: look at the Mac. To send them again, too: "
            f"python dispatcher.py --retry {batch_id} --include-unknown\n"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Feed the send queue from outreach batches, and sync the results back.",
        epilog="environment: MAC_SYNC_SERVICE_TOKEN (needed), MAC_SYNC_BASE_URL, QUINN_DB_URL, QUINN_ICLOUD_DB_URL, "
        "DEFAULT_REGION, DISPATCH_INTERVAL_SECONDS, LOG_LEVEL. examples: python dispatcher.py; "
        "python dispatcher.py --once",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="sync, then dispatch, exactly once; exit 1 if either failed")
    what.add_argument("--retry", metavar="BATCH_ID", type=uuid.UUID, help="make a batch's failed items pending again")
    parser.add_argument(
        "--include-unknown", action="store_true", help="with --retry: also the items that may have been sent already"
    )
    arguments = parser.parse_args(argv)
    if arguments.include_unknown and not arguments.retry:
        parser.error("--include-unknown belongs to --retry")
    runtime.load_settings()
    runtime.set_up_logging()
    if arguments.retry:
        return run_retry(str(arguments.retry), arguments.include_unknown)
    token = runtime.service_token()
    if token is None:
        runtime.sd_notify("READY=1")  # systemd would take an exit before it for a failure
        logger.warning(
            "outreach-dispatcher disabled: MAC_SYNC_SERVICE_TOKEN is not set; set the server's, and start this again"
        )
        return 0
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        # From a thread: set() takes a lock that the wait() interrupted by the signal may hold.
        signal.signal(signal_number, lambda *_: threading.Thread(target=stop.set).start())
    logger.info("outreach-dispatcher starting interval=%ds", interval())
    for name in db.URL_VARIABLES:
        db.url(name)  # misconfigured: say so now, not in every job
    handles.default_region()
    if arguments.once:
        return run_once(token)
    run_forever(token)
    logger.info("outreach-dispatcher stopped")
    return 0


def entry_point() -> None:
    """Run the command `outreach-dispatcher`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
