"""The outreach dispatcher: every 30 s it syncs results back, then feeds the send queue from sending batches.

Run by systemd (systemd/outreach-dispatcher.service), or once by hand. Its two jobs are `sync` and `dispatch`.
Touches outreach_batches, outreach_batch_items and outreach_settings in quinn; reads icloud.devices and
icloud.send_queue, and withdraws rows of the latter. Example:

    python dispatcher.py --once

A crash at any instruction is safe, because of the order in which things are written:

    claim (commit) -> POST enqueue (the server commits) -> record (commit)

A crash or a lost answer in between leaves a claimed item. It counts as in flight, and the next sync finds
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
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg2
import psycopg2.errors
import requests
import schedule

import db
import pacing
import service

LOCK = "outreach-dispatcher"  # hashed into the advisory lock's key
LOCK_WAIT = 10  # seconds that a second dispatcher waits for the first one's job
# Seconds to connect and to wait for an answer: with the recording after it still within a stop's ten seconds.
HTTP_TIMEOUT = (2, 5)
RETRIES = 2  # of a 500, which may be one bad moment of the server's
RETRY_PAUSE = 0.5  # seconds
REASON_LENGTH = 500  # characters of an error text that an item keeps

Connection = Any  # psycopg2's connection
Tally = Counter[str]
Job = Callable[[Connection, Connection], Tally]
logger = logging.getLogger("outreach-dispatcher")
stop = threading.Event()


class Outage(Exception):
    """mac-sync could not be asked about an item. `mend`: an operator has to act, waiting will not help."""

    def __init__(self, kind: str, mend: bool = False) -> None:
        super().__init__(kind)
        self.mend = mend


class Busy(Exception):
    """Another dispatcher holds the lock."""


class Rejected(Exception):
    """mac-sync judged the item. The message, the item's failure reason, may quote it: it is not for the log."""


class Item(NamedTuple):
    """A claimed item. `handle`: its client's primary one. `device_id`: the device that reached the client last."""

    id: str
    batch_id: str
    body: str
    handle: str | None
    device_id: str | None


class Change(NamedTuple):
    """What a queue row has become, as it is written back to its item."""

    item_id: str
    status: str
    queue_id: str | None
    device_id: str | None
    sent_at: datetime | None
    reason: str | None


# --- the sync job -------------------------------------------------------------------------------------


def sync(quinn: Connection, icloud: Connection) -> Tally:
    """Take back what should not be sent any more, then bring the results of what is in flight home."""
    gate = pacing.closed(pacing.read(quinn))
    tally = Tally(withdrawn=withdraw(quinn, icloud, gate))
    changes = [*results(quinn, icloud), *adoptions(quinn, icloud)]
    write_back(quinn, changes)
    tally.update(change.status for change in changes)
    release(quinn)
    db.query(quinn, "UPDATE outreach_settings SET last_synced_at = now() WHERE id = 1")
    return tally


def withdraw(quinn: Connection, icloud: Connection, gate: pacing.Gate | None) -> int:
    """Take back uncollected rows while sending is closed, of batches no longer sending, and those past their time.

    It starts from the rows, since a crash may have left one whose item still says `pending`. A row without an
    item was put in by hand, and is left alone.
    """
    uncollected = """
        SELECT id, batch_item_id, COALESCE(valid_until <= now(), false)
          FROM icloud.send_queue
         WHERE status = 'queued' AND collected_at IS NULL AND batch_item_id IS NOT NULL
    """
    wanted = """
        SELECT item.id,
               batch.status = 'sending' AND NOT batch.dry_run AND item.status IN ('pending', 'queued')
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.id = ANY (%(ids)s::uuid[])
    """
    take = """
        UPDATE icloud.send_queue
           SET status = 'failed', withdrawn_at = now(), updated_at = now(), failure_reason = %(reason)s
         WHERE id = ANY (%(ids)s::uuid[]) AND status = 'queued' AND collected_at IS NULL
        RETURNING id
    """
    rows = db.query(icloud, uncollected)
    if not rows:
        return 0
    is_wanted: dict[str, bool] = dict(db.query(quinn, wanted, {"ids": [item_id for _, item_id, _ in rows]}))
    ids = [
        row_id
        for row_id, item_id, expired in rows
        if item_id in is_wanted and (gate or expired or not is_wanted[item_id])
    ]
    reason = f"withdrawn: {gate.reason if gate else 'its batch is not being sent, or its time is over'}"
    taken = db.query(icloud, take, {"ids": ids, "reason": reason}) if ids else []
    for (row_id,) in taken:
        logger.info("row withdrawn sendQueueId=%s reason=%r", row_id, reason)
    return len(taken)


def results(quinn: Connection, icloud: Connection) -> Iterable[Change]:
    """How the rows of the queued items ended; nothing for those that still wait."""
    in_flight = "SELECT id, send_queue_id FROM outreach_batch_items WHERE status = 'queued'"
    ended = """
        SELECT id, status, device_id, COALESCE(sent_at, updated_at), failure_reason, withdrawn_at IS NOT NULL
          FROM icloud.send_queue
         WHERE id = ANY (%(ids)s::uuid[])
    """
    items = db.query(quinn, in_flight)
    if not items:
        return
    ids = [queue_id for _, queue_id in items if service.is_uuid(queue_id)]
    rows = {row[0]: row[1:] for row in db.query(icloud, ended, {"ids": ids})}
    for item_id, queue_id in items:
        row = rows.get(queue_id.lower()) if service.is_uuid(queue_id) else None
        if row is None:
            yield Change(item_id, "failed", queue_id, None, None, "send queue row no longer exists")
            continue
        status, device_id, ended_at, reason, withdrawn = row
        if withdrawn:
            yield Change(item_id, "pending", None, None, None, None)
        elif status == "sent":
            yield Change(item_id, "sent", queue_id, device_id, ended_at, None)
        elif status == "failed":
            yield Change(item_id, "failed", queue_id, device_id, None, reason or "the device gave no reason")


def adoptions(quinn: Connection, icloud: Connection) -> Iterable[Change]:
    """The rows of claimed items: their enqueue reached the queue, and its answer did not reach the item.

    An item's newest row tells, and it may have ended by now. What the item knows already (its failure before a
    retry) or what was withdrawn is not of this claim.
    """
    claimed = "SELECT id, send_queue_id FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL"
    newest = """
        SELECT batch_item_id, id, status, device_id, sent_at, failure_reason, withdrawn_at IS NOT NULL
          FROM (SELECT * FROM icloud.send_queue WHERE batch_item_id = ANY (%(ids)s::uuid[]) AND status <> 'failed'
                 UNION ALL
                SELECT * FROM icloud.send_queue WHERE batch_item_id = ANY (%(ids)s::uuid[]) AND status = 'failed'
               ) AS message
         ORDER BY created_at
    """
    known: dict[str, str | None] = dict(db.query(quinn, claimed))
    rows = db.query(icloud, newest, {"ids": list(known)}) if known else []
    for item_id, row in {row[0]: row[1:] for row in rows}.items():
        queue_id, status, device_id, sent_at, reason, withdrawn = row
        if withdrawn or queue_id == known[item_id]:
            continue
        logger.warning("item was in the queue already sendQueueId=%s item=%s: an answer was lost", queue_id, item_id)
        yield Change(item_id, status, queue_id, device_id, sent_at, reason)


def write_back(quinn: Connection, changes: Sequence[Change]) -> None:
    """queued -> sent, failed or (withdrawn) pending; a claimed pending one -> queued, sent or failed. One statement."""
    sql = """
        UPDATE outreach_batch_items AS item
           SET status = ended.status,
               send_queue_id = ended.queue_id,
               device_id = COALESCE(ended.device_id, CASE WHEN ended.status = 'failed' THEN item.device_id END),
               queued_at = CASE WHEN ended.status <> 'pending' THEN COALESCE(item.queued_at, item.claimed_at) END,
               sent_at = ended.sent_at,
               failure_reason = ended.reason,
               claimed_at = NULL,
               updated_at = now()
          FROM unnest(%(item_id)s::uuid[], %(status)s::text[], %(queue_id)s::text[], %(device_id)s::uuid[],
                      %(sent_at)s::timestamptz[], %(reason)s::text[])
               AS ended (item_id, status, queue_id, device_id, sent_at, reason)
         WHERE item.id = ended.item_id
           AND (item.status = 'queued' OR (item.status = 'pending' AND item.claimed_at IS NOT NULL))
    """
    if not changes:
        return
    db.query(quinn, sql, dict(zip(Change._fields, map(list, zip(*changes, strict=True)), strict=True)))
    for change in changes:
        if change.status == "sent":
            logger.info("item sent sendQueueId=%s item=%s", change.queue_id, change.item_id)
        elif change.status == "failed":
            # The reason is a device's words, which may name a person: it is in failure_reason, not in the log.
            logger.warning("item failed item=%s sendQueueId=%s", change.item_id, change.queue_id)


def release(quinn: Connection) -> None:
    """Give up the claims of batches that are no longer sending: no row came of them (adoptions has just looked)."""
    sql = """
        UPDATE outreach_batch_items AS item
           SET claimed_at = NULL, updated_at = now()
          FROM outreach_batches AS batch
         WHERE item.status = 'pending' AND item.claimed_at IS NOT NULL
           AND batch.id = item.batch_id AND (batch.status <> 'sending' OR batch.dry_run)
    """
    db.query(quinn, sql)


# --- the dispatch job ---------------------------------------------------------------------------------


def dispatch(quinn: Connection, icloud: Connection, mac_sync: "MacSync") -> Tally:
    """The second job of a tick: claim the items whose turn it is, as far as the settings let them, and enqueue them.

    What an earlier tick claimed and could not enqueue goes first, and alone: it holds its place in the limits.
    """
    # Once more, for a sync that failed: a request repeated after its row has ended would make a second one.
    write_back(quinn, list(adoptions(quinn, icloud)))
    pace = pacing.read(quinn)
    gate = pacing.closed(pace)
    if pace is None or gate:
        story.tell(pace, gate)
        return Tally(skipped=0, queued=0)
    tally = Tally()
    items = claimed(quinn)
    perhaps_over = [item.batch_id for item in items]
    if not items:
        tally["skipped"], perhaps_over = claim(quinn, icloud, pace)
        items = claimed(quinn)
    deliver(quinn, icloud, mac_sync, pace, items, tally)
    complete(quinn, perhaps_over)
    return tally


def claim(quinn: Connection, icloud: Connection, pace: pacing.Pace) -> tuple[int, list[str]]:
    """Claim the next item of each batch in turn while there is room.

    Return how many items were skipped on the way, and the batches that may have no item left: all that had none,
    and those that had their turn.
    """
    skipped = 0
    waiting = pacing.batches(quinn)
    perhaps_over = [batch.id for batch in waiting if not batch.pending]

    def claim_turn(turn: Sequence[str]) -> int:
        nonlocal skipped
        perhaps_over.extend(turn)
        skipped += skip(quinn, turn)
        return claim_heads(quinn, turn)

    story.tell(pace, pacing.verdict(pace, waiting, pacing.devices(icloud)))
    pace, passed_over = pacing.take_turns(pace, waiting, claim_turn)
    if passed_over:
        story.tell(pace, pacing.limited(pace))
    return skipped, perhaps_over


def skip(quinn: Connection, turn: Sequence[str]) -> int:
    """pending -> skipped, for the items at the head of their batch whose client has no primary handle."""
    sql = """
        UPDATE outreach_batch_items AS item
           SET status = 'skipped', failure_reason = 'no primary handle found', updated_at = now()
          FROM unnest(%(turn)s::uuid[]) AS served (batch_id)
          LEFT JOIN LATERAL (
               SELECT created_at, id
                 FROM outreach_batch_items AS candidate
                WHERE batch_id = served.batch_id AND status = 'pending'
                  AND EXISTS (SELECT FROM contact_relationships
                               WHERE client_id = candidate.client_id AND is_primary)
                ORDER BY created_at, id
                LIMIT 1
               ) AS reachable ON true
         WHERE item.batch_id = served.batch_id AND item.status = 'pending'
           AND (item.created_at, item.id) < (COALESCE(reachable.created_at, 'infinity'), reachable.id)
        RETURNING item.id
    """
    skipped = db.query(quinn, sql, {"turn": turn})
    for (item_id,) in skipped:
        logger.info("item skipped item=%s reason='no primary handle found'", item_id)
    return len(skipped)


def claim_heads(quinn: Connection, turn: Sequence[str]) -> int:
    """Claim the oldest pending item of each batch of `turn`, and note that the batch was served."""
    sql = """
        WITH served AS (
            UPDATE outreach_batches SET last_served_at = now() WHERE id = ANY (%(turn)s::uuid[])
        )
        UPDATE outreach_batch_items AS item
           SET claimed_at = now(), updated_at = now()
          FROM unnest(%(turn)s::uuid[]) AS served_batch (id)
         CROSS JOIN LATERAL (
               SELECT id FROM outreach_batch_items
                WHERE batch_id = served_batch.id AND status = 'pending'
                ORDER BY created_at, id
                LIMIT 1
               ) AS head
         WHERE item.id = head.id AND item.status = 'pending'
        RETURNING item.id
    """
    return len(db.query(quinn, sql, {"turn": turn}))


def claimed(quinn: Connection) -> list[Item]:
    """The claimed items of sending batches, with what their message needs."""
    sql = """
        SELECT item.id, item.batch_id, item.rendered_body,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = item.client_id AND is_primary),
               (SELECT device_id FROM outreach_batch_items
                 WHERE client_id = item.client_id AND status = 'sent' AND device_id IS NOT NULL
                 ORDER BY sent_at DESC
                 LIMIT 1)
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.status = 'pending' AND item.claimed_at IS NOT NULL
           AND batch.status = 'sending' AND NOT batch.dry_run
         ORDER BY item.claimed_at, item.created_at, item.id
    """
    return [Item(*row) for row in db.query(quinn, sql)]


def deliver(
    quinn: Connection, icloud: Connection, mac_sync: "MacSync", pace: pacing.Pace, items: Sequence[Item], tally: Tally
) -> None:
    """Enqueue each item and record what came of it. Raises Outage, with the rest still claimed."""
    if not items:
        return
    devices = [row[0] for row in db.query(icloud, "SELECT id FROM icloud.devices ORDER BY created_at, id")]
    valid_until = pacing.next_quiet_hours(pace)
    # The settings were read once, for this tick. What does not fit into one interval waits for the next look.
    end = time.monotonic() + interval()
    for item in items:
        if stop.is_set() or time.monotonic() > end:
            return
        service.notify("WATCHDOG=1")
        outcome = deliver_one(quinn, mac_sync, item, device_for(item, pace, devices), valid_until)
        tally[outcome] += 1


def device_for(item: Item, pace: pacing.Pace, devices: Sequence[str]) -> str | None:
    """The device that last reached the client, else the settings' one, else the oldest."""
    wishes = (item.device_id, pace.settings.device_id, *devices[:1])
    return next((device for device in wishes if device in devices), None)


def deliver_one(
    quinn: Connection, mac_sync: "MacSync", item: Item, device_id: str | None, valid_until: datetime | None
) -> str:
    """Enqueue one item and record it; return its new status. No transaction is open during the request.

    A crash before the record leaves the item claimed: see the head of this file.
    """
    if item.handle is None:  # it had one when it was claimed
        return end_item(quinn, item, "skipped", "no primary handle found")
    if device_id is None:
        return end_item(quinn, item, "failed", pacing.NO_DEVICE)
    try:
        queue_id = mac_sync.enqueue(item, item.handle, device_id, valid_until)
    except Rejected as rejection:
        return end_item(quinn, item, "failed", str(rejection))
    return record(quinn, item, queue_id, device_id)


def record(quinn: Connection, item: Item, queue_id: str, device_id: str) -> str:
    """pending -> queued."""
    sql = """
        WITH dispatched AS (
            UPDATE outreach_settings SET last_dispatched_at = now() WHERE id = 1
        )
        UPDATE outreach_batch_items
           SET status = 'queued', send_queue_id = %(queue_id)s, device_id = %(device_id)s,
               queued_at = now(), claimed_at = NULL, updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
        RETURNING id
    """
    if db.query(quinn, sql, {"id": item.id, "queue_id": queue_id, "device_id": device_id}):
        to = service.masked(item.handle or "")
        logger.info(
            "item queued to mac-sync sendQueueId=%s item=%s batch=%s to=%s", queue_id, item.id, item.batch_id, to
        )
    else:
        logger.warning("item changed by another hand while it was enqueued item=%s sendQueueId=%s", item.id, queue_id)
    return "queued"


def end_item(quinn: Connection, item: Item, status: str, reason: str) -> str:
    """pending -> failed or skipped, with the reason."""
    sql = """
        UPDATE outreach_batch_items
           SET status = %(status)s, failure_reason = %(reason)s, claimed_at = NULL, updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
    """
    db.query(quinn, sql, {"id": item.id, "status": status, "reason": reason})
    logger.warning("item %s item=%s batch=%s: failure_reason says why", status, item.id, item.batch_id)
    return status


def complete(quinn: Connection, perhaps_over: Sequence[str]) -> None:
    """sending -> sent, for those of the batches that have items, all of them ended."""
    sql = """
        UPDATE outreach_batches AS batch
           SET status = 'sent', updated_at = now()
         WHERE id = ANY (%(ids)s::uuid[]) AND status = 'sending' AND NOT dry_run
           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending')
           AND NOT EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued')
           AND EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id)
        RETURNING id
    """
    for (batch_id,) in db.query(quinn, sql, {"ids": list(perhaps_over)}):
        logger.info("batch sent batch=%s: each of its items has ended", batch_id)


class MacSync:
    """The send queue server, asked over one kept-alive session. One is made for each tick."""

    def __init__(self, base_url: str, token: str) -> None:
        self.url = base_url.rstrip("/") + "/admin/send-queue/enqueue"
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy or a .netrc of the host must not see, or replace, the token
        self.session.headers["Authorization"] = f"Bearer {token}"

    def enqueue(self, item: Item, handle: str, device_id: str, valid_until: datetime | None) -> str:
        """Put the item's message into the queue; return its row's id. Raises Rejected or Outage."""
        message = {"batchItemId": item.id, "deviceId": device_id, "toHandle": handle, "body": item.body}
        if valid_until:
            message["validUntil"] = valid_until.isoformat()
        answer = self._post(message)
        words, queue_id = _read(answer)
        if answer.status_code == 200 and queue_id:
            return queue_id
        if answer.status_code == 409 and queue_id:
            # Put there before a crash, and before somebody edited the item or its client: that row is what is sent.
            logger.warning("item is in the queue already, with other content item=%s sendQueueId=%s", item.id, queue_id)
            return queue_id
        if answer.status_code in (400, 404, 413, 500):
            raise Rejected(f"HTTP {answer.status_code}: {words}")
        raise Outage(f"HTTP {answer.status_code} for item {item.id}", mend=answer.status_code in (401, 403))

    def _post(self, message: dict[str, str]) -> requests.Response:
        for pause in [RETRY_PAUSE] * RETRIES + [0]:
            try:
                answer = self.session.post(self.url, json=message, timeout=HTTP_TIMEOUT, allow_redirects=False)
            except requests.RequestException as error:
                raise Outage(f"{type(error).__name__} at {self.url}") from error
            if answer.status_code != 500:
                break
            if stop.wait(pause):
                raise Outage("HTTP 500, and there is no time to ask again")
        return answer


def _read(answer: requests.Response) -> tuple[str, str | None]:
    """The error sentence and the queue id of an answer, which may be anything: a proxy's page, half a document."""
    try:
        body = answer.json()
        words = body.get("error") or answer.reason
        queue_id = (body.get("data") or {}).get("sendQueueId")
    except (ValueError, AttributeError, RecursionError):
        words, queue_id = answer.reason or "not a JSON answer", None
    return db.storable(str(words))[:REASON_LENGTH], queue_id if service.is_uuid(queue_id) else None


# --- running the jobs ---------------------------------------------------------------------------------


class Story:
    """Tells a verdict when it changes; a gate that stays shut for a night is one line, and so is an hour of sending.

    Between two sends at the settings' pace a gate shuts for a moment. Such a one is told once in each stretch of
    sending, and does not make what follows it news.
    """

    def __init__(self) -> None:
        self.last = ""  # the kind of the last verdict
        self.told: set[str] = set()  # the kinds told in this stretch

    def tell(self, pace: pacing.Pace | None, verdict: pacing.Verdict) -> None:
        gate = verdict if isinstance(verdict, pacing.Gate) else None
        kind = gate.kind if gate else "sending" if verdict else "nothing to send"
        lasts = verdict is None or pace is None or (gate is not None and gate.lasts(pace.now))
        is_news = kind != self.last if lasts or not self.last else kind not in self.told
        self.told = {kind} if lasts or not self.last else self.told | {kind}
        self.last = kind
        level = logging.ERROR if pace is None else logging.INFO
        logger.log(level if is_news else logging.DEBUG, "%s", f"sending is held: {gate}" if gate else kind)


story = Story()


def run(name: str, job: Job) -> Tally | None:
    """Run a job once, on new connections and under the lock; None when it failed. Nothing it raises gets out.

    New connections for each run are what makes a restarted database no event here.
    """
    service.notify("WATCHDOG=1")  # each job has the watchdog's whole time
    if stop.is_set():
        return None
    try:
        with (
            contextlib.closing(db.connect(db.url("quinn"))) as quinn,
            contextlib.closing(db.connect(db.url("icloud"))) as icloud,
        ):
            lock(quinn)
            return job(quinn, icloud)
    except Busy:
        if not stop.is_set():
            find = "SELECT pid, client_addr FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory'"
            logger.warning("%s job passed: another dispatcher has been at work for %d s; see %s", name, LOCK_WAIT, find)
    except Outage as outage:
        hint = "see that the server runs at MAC_SYNC_BASE_URL"
        if outage.mend:
            hint = "the token must be the server's MAC_SYNC_SERVICE_TOKEN"
        logger.log(
            logging.ERROR if outage.mend else logging.WARNING,
            "mac-sync could not be asked, its items stay pending error=%r; %s", str(outage), hint,
        )  # fmt: skip
    except (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedColumn) as error:
        logger.error("%s job failed, run `python db.py migrate` error=%r", name, error.diag.message_primary)
    except psycopg2.errors.InsufficientPrivilege as error:
        logger.error("%s job failed, GRANT the tables' owner to this role error=%r", name, error.diag.message_primary)
    except psycopg2.OperationalError as error:
        reason = str(error).strip()
        logger.error(
            "%s job could not use the database, the next run tries again; see that it runs error=%r", name, reason
        )
    except psycopg2.Error as error:
        # Not its whole text: PostgreSQL's DETAIL quotes the row, a message's body included.
        kind, words = type(error).__name__, error.diag.message_primary
        logger.error("%s job failed, the next run tries again error=%s %r", name, kind, words)
    except Exception:
        logger.exception("%s job failed, the next run tries again", name)
    return None


def lock(quinn: Connection) -> None:
    """One job at a time, whoever runs it; the lock goes with the connection. Raises Busy."""
    end = time.monotonic() + LOCK_WAIT
    while not db.query(quinn, "SELECT pg_try_advisory_lock(hashtext(%(name)s))", {"name": LOCK})[0][0]:
        if time.monotonic() > end or stop.wait(0.1):
            raise Busy


def jobs(token: str) -> dict[str, Job]:
    """The two jobs by name, in their order. Raises service.Misconfigured."""
    base_url = os.environ.get("MAC_SYNC_BASE_URL") or "http://localhost:3201"
    if not re.match("https?://[^/]", base_url):
        raise service.Misconfigured(
            f"MAC_SYNC_BASE_URL is {base_url!r}: set it to the server's address, such as http://localhost:3201"
        )

    def dispatch_job(quinn: Connection, icloud: Connection) -> Tally:
        mac_sync = MacSync(base_url, token)
        with mac_sync.session:
            return dispatch(quinn, icloud, mac_sync)

    return {"sync": sync, "dispatch": dispatch_job}


def interval() -> int:
    """Seconds between two ticks."""
    return service.integer("DISPATCH_INTERVAL_SECONDS", 30)


def run_forever(token: str) -> None:
    """Both jobs at once and then every interval(), sync first, until SIGTERM or SIGINT."""
    for name, job in jobs(token).items():
        schedule.every(interval()).seconds.do(run, name, job)
    service.notify("READY=1")
    schedule.run_all()  # schedule's own first run comes only after an interval
    while not stop.wait(min(1.0, max(0.05, schedule.idle_seconds() or 0))):
        service.notify("WATCHDOG=1")
        # schedule goes by the local wall clock. Where that was set back, by hand or at the end of summer
        # time, the next run of a job, or of both, has moved an hour away.
        runs = [job.next_run for job in schedule.get_jobs() if job.next_run]
        if (schedule.idle_seconds() or 0) + (max(runs) - min(runs)).total_seconds() > interval():
            schedule.run_all()
        schedule.run_pending()


def run_once(token: str) -> int:
    """Both jobs once, with what they did on stdout; 1 when one failed."""
    tallies = {name: run(name, job) for name, job in jobs(token).items()}
    for name, tally in tallies.items():
        did = (
            "failed"
            if tally is None
            else ", ".join(f"{count} {what}" for what, count in sorted(tally.items()) if count)
        )
        sys.stdout.write(f"{name}: {did or 'nothing to do'}\n")
    return 1 if None in tallies.values() else 0


def retry(batch_id: str) -> int:
    """failed -> pending for a batch's items, and sent -> sending for the batch; how many, on stdout."""
    sql = """
        WITH batch AS (
            UPDATE outreach_batches
               SET status = CASE WHEN status = 'sent' THEN 'sending' ELSE status END, updated_at = now()
             WHERE id = %(batch_id)s
            RETURNING id, status
        ), item AS (
            UPDATE outreach_batch_items
               -- send_queue_id stays: the row whose failure is known (see adoptions).
               SET status = 'pending', failure_reason = NULL, device_id = NULL,
                   queued_at = NULL, claimed_at = NULL, updated_at = now()
             WHERE batch_id = %(batch_id)s AND status = 'failed'
            RETURNING id
        )
        SELECT status, (SELECT count(*) FROM item) FROM batch
    """
    with contextlib.closing(db.connect(db.url("quinn"))) as quinn:
        rows = db.query(quinn, sql, {"batch_id": batch_id})
    if not rows:
        sys.stderr.write(f"dispatcher.py: there is no batch {batch_id}\n")
        return 1
    status, count = rows[0]
    sys.stdout.write(f"{count} failed items are pending again; the batch is {status}\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Feed the send queue from outreach batches, and sync the results back.",
        epilog="environment: MAC_SYNC_SERVICE_TOKEN (needed), MAC_SYNC_BASE_URL, QUINN_DB_URL, QUINN_ICLOUD_DB_URL, "
        "DISPATCH_INTERVAL_SECONDS, LOG_LEVEL. examples: python dispatcher.py; python dispatcher.py --once",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="sync, then dispatch, exactly once; exit 1 if either failed")
    what.add_argument("--retry", metavar="BATCH_ID", type=uuid.UUID, help="make a batch's failed items pending again")
    arguments = parser.parse_args(argv)
    service.load_settings()
    service.set_up_logging()
    if arguments.retry:
        try:
            return retry(str(arguments.retry))
        except psycopg2.Error as error:
            sys.stderr.write(f"dispatcher.py: nothing was changed: {str(error).strip()}\n")
            return 1
    token = service.service_token()
    if token is None:
        service.notify("READY=1")  # systemd would take an exit before it for a failure
        logger.warning(
            "outreach-dispatcher disabled: MAC_SYNC_SERVICE_TOKEN is not set; set the server's, and start this again"
        )
        return 0
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        # From a thread: set() takes a lock that the wait() interrupted by the signal may hold.
        signal.signal(signal_number, lambda *_: threading.Thread(target=stop.set).start())
    logger.info("outreach-dispatcher starting interval=%ds", interval())
    for part in db.VARIABLES:
        db.url(part)  # misconfigured: say so now, not in every job
    if arguments.once:
        return run_once(token)
    run_forever(token)
    logger.info("outreach-dispatcher stopped")
    return 0


if __name__ == "__main__":
    service.run(main)
