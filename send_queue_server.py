"""The send queue's HTTP surface: a Mac takes messages to send from it, and the dispatcher fills it.

Run by systemd (systemd/send-queue-server@.service) or by hand. Touches icloud.devices, icloud.send_queue and
icloud.opt_outs. The contract is openapi.yaml. Each request is one statement, the look-up of a device's token included;
the exceptions say why they are. Example:

    curl -H "Authorization: Bearer $DEVICE_TOKEN" http://localhost:3201/client/imessage/send-queue/pending
"""

import argparse
import contextlib
import functools
import logging
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

import bottle
import msgspec
import psycopg2.errors

import db
import handles
import metrics
import opt_outs
import runtime
import serving

LAST_SEEN_PRECISION = "10 seconds"  # an idle poll writes at most this often
REASON_LENGTH = 1000  # characters of a device's words that are kept
COLLECT_AGAIN = "60 seconds"  # for so long the same collectId gets the same message: its first response was lost
TRIES = 3  # of a statement that met a row which somebody else has just made

PENDING = "/client/imessage/send-queue/pending"
COLLECT = "/client/imessage/send-queue/<queue_id>/collect"
RESULT = "/client/imessage/send-queue/<queue_id>/result"
DEVICE_HEALTH = "/client/imessage/health"
OPT_OUTS = "/client/imessage/opt-outs"
ENQUEUE = "/admin/send-queue/enqueue"
STATUS = "/admin/send-queue/status"
METRICS = "/metrics"
HEALTH = "/healthz"

T = TypeVar("T")
Data = dict[str, Any]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
logger = logging.getLogger("send-queue-server")


class Collect(msgspec.Struct, rename="camel"):
    """The body of POST collect: the device's id of this hand-over, and which Mac it is."""

    collect_id: uuid.UUID
    instance: Name

    def __post_init__(self) -> None:
        _check_text(instance=self.instance)


class Result(msgspec.Struct, rename="camel"):
    """The body of POST result: what became of a message, and the device's words.

    `outcome` belongs to `failed`: it was not started, or may have been sent; without one, it was certainly not sent.
    `delivered_at`, `late_error`: what Messages learned after it was sent.
    """

    status: Literal["sent", "failed"]
    error: str | None = None
    outcome: Literal["not_started", "unknown"] | None = None
    watched_until: Instant | None = None
    delivered_at: Instant | None = None
    late_error: str | None = None
    instance: str | None = None

    def __post_init__(self) -> None:
        if self.outcome and self.status == "sent":
            raise ValueError("`outcome` is for the status `failed` only")


class Health(msgspec.Struct, rename="camel"):
    """The body of POST health: what is wrong with the Mac, null for nothing, and its sender's version."""

    problem: Annotated[str, msgspec.Meta(min_length=1)] | None
    version: Name | None = None

    def __post_init__(self) -> None:
        _check_text(version=self.version or "")


class OptOut(msgspec.Struct, rename="camel"):
    """The body of POST opt-outs: who replied with which word, and when."""

    handle: Annotated[str, msgspec.Meta(max_length=handles.MAX_HANDLE_LENGTH)]
    word: Name
    received_at: Instant

    def __post_init__(self) -> None:
        _check_handle("handle", self.handle)
        if not handles.reply_word(self.word):
            raise ValueError("`word` is neither a word that opts out, such as STOP, nor START or UNSTOP")


class Enqueue(msgspec.Struct, rename="camel"):
    """The body of POST enqueue: UUIDs, a phone number or e-mail address, text; instants with their offset."""

    batch_item_id: uuid.UUID
    device_id: uuid.UUID
    to_handle: Annotated[str, msgspec.Meta(max_length=handles.MAX_HANDLE_LENGTH)]
    body: Annotated[str, msgspec.Meta(min_length=1)]
    attempt: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    valid_until: Instant | None = None
    drafted_at: Instant | None = None

    def __post_init__(self) -> None:
        _check_handle("toHandle", self.to_handle)
        _check_text(body=self.body)


def _check_handle(name: str, handle: str) -> None:
    if not handles.HANDLE_PATTERN.fullmatch(handle) or db.UNSTORABLE.search(handle):
        raise ValueError(f"`{name}` is neither a phone number nor an e-mail address")


def _check_text(**fields: str) -> None:
    for name, text in fields.items():
        if db.UNSTORABLE.search(text):
            raise ValueError(f"`{name}` has a NUL or half of a surrogate pair")


def make_app(database: db.RetryingConnection, service_token: str) -> bottle.Bottle:
    """The WSGI application over `database`; `service_token` opens the admin path."""
    app = serving.make_app("QUINN_ICLOUD_DB_URL")
    app.route(PENDING, "GET", functools.partial(pending, database))
    app.route(COLLECT, "POST", functools.partial(collect, database))
    app.route(RESULT, "POST", functools.partial(result, database))
    app.route(DEVICE_HEALTH, "POST", functools.partial(device_health, database))
    app.route(OPT_OUTS, "POST", functools.partial(opt_out, database))
    app.route(ENQUEUE, "POST", functools.partial(enqueue, database, service_token))
    app.route(STATUS, "GET", functools.partial(status, database, service_token))
    app.route(METRICS, "GET", functools.partial(scrape, database, service_token))
    app.route(HEALTH, "GET", functools.partial(health, database))
    return app


# --- the device's endpoints ---------------------------------------------------------------------------


def pending(database: db.RetryingConnection) -> Data:
    """GET pending: up to 50 of the device's queued messages, oldest first, until their results are in.

    Being handed out for the first time marks a row as collected, after which it is never withdrawn. A row past its
    valid_until, or whose handle has opted out, is not handed out for the first time any more. With `?peek=true` it is
    the same list, and nothing is collected.
    """
    sql = """
        WITH device AS (
            SELECT id, last_seen_at FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), seen AS (
            UPDATE icloud.devices SET last_seen_at = now()
             WHERE id = (SELECT id FROM device
                          WHERE COALESCE(last_seen_at, '-infinity') < now() - %(precision)s::interval)
        ), page AS (
            SELECT id, to_handle, body, created_at, collected_at,
                   collected_at IS NULL AND handle_key IS NULL AS lacks_key
              FROM icloud.send_queue AS message
             WHERE device_id = (SELECT id FROM device)
               AND status = 'queued'
               AND (collected_at IS NOT NULL
                    OR (COALESCE(valid_until > now(), true)
                        AND NOT EXISTS (SELECT FROM icloud.opt_outs
                                         WHERE handle_key = message.handle_key AND ended_at IS NULL OFFSET 0)))
             ORDER BY created_at, id
             LIMIT 50
        ), collected AS (
            -- Repeats what an UPDATE can change, in a CASE (see schema.sql): since `page` saw it, the row may have been
            -- withdrawn, or an opt-out may have ended its time.
            UPDATE icloud.send_queue SET collected_at = now(), updated_at = now()
             WHERE id = ANY (ARRAY(SELECT id FROM page WHERE collected_at IS NULL AND NOT lacks_key))
               AND CASE status WHEN 'queued' THEN collected_at IS NULL AND COALESCE(valid_until > now(), true) END
            RETURNING id
        )
        SELECT page.id, to_handle, body, created_at, lacks_key
          FROM device
          LEFT JOIN page ON collected_at IS NOT NULL OR lacks_key OR page.id IN (SELECT id FROM collected)
         ORDER BY created_at, page.id
    """
    if _is_peek():
        return peek(database)
    rows = database.query(sql, {**_device_token(), "precision": LAST_SEEN_PRECISION})
    if not rows:
        serving.abort_unauthorized()
    if keyless := [(row_id, to_handle) for row_id, to_handle, _, _, lacks_key in rows if lacks_key]:
        _add_keys(database, keyless)
        return pending(database)
    items = [
        {"id": row_id, "toHandle": to_handle, "body": body, "createdAt": _instant(created_at)}
        for row_id, to_handle, body, created_at, _ in rows
        if row_id
    ]
    logger.debug("polled items=%d", len(items))
    return {"items": items}


def peek(database: db.RetryingConnection) -> Data:
    """GET pending?peek=true: the same list, to be collected one by one; and how many opt-outs the device reported."""
    sql = """
        WITH device AS (
            SELECT id, last_seen_at, opt_outs FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), seen AS (
            UPDATE icloud.devices SET last_seen_at = now()
             WHERE id = (SELECT id FROM device
                          WHERE COALESCE(last_seen_at, '-infinity') < now() - %(precision)s::interval)
        ), page AS (
            SELECT id, to_handle, body, created_at, batch_item_id, attempt, drafted_at,
                   collected_at IS NULL AND handle_key IS NULL AS lacks_key
              FROM icloud.send_queue AS message
             WHERE device_id = (SELECT id FROM device)
               AND status = 'queued'
               AND (collected_at IS NOT NULL
                    OR (COALESCE(valid_until > now(), true)
                        AND NOT EXISTS (SELECT FROM icloud.opt_outs
                                         WHERE handle_key = message.handle_key AND ended_at IS NULL OFFSET 0)))
             ORDER BY created_at, id
             LIMIT 50
        )
        SELECT page.id, to_handle, body, created_at, batch_item_id, attempt, drafted_at, lacks_key, opt_outs
          FROM device LEFT JOIN page ON true
         ORDER BY created_at, page.id
    """
    rows = database.query(sql, {**_device_token(), "precision": LAST_SEEN_PRECISION})
    if not rows:
        serving.abort_unauthorized()
    if keyless := [(row[0], row[1]) for row in rows if row[7]]:
        _add_keys(database, keyless)
        return peek(database)
    logger.debug("peeked items=%d", sum(row[0] is not None for row in rows))
    return {"items": [_message(*row[:7]) for row in rows if row[0]], "optOuts": rows[0][8]}


def collect(database: db.RetryingConnection, queue_id: str) -> Data:
    """POST collect: hand one message over, at the moment of sending. The server has the last word on each of them.

    The first collect of a device binds its token to that Mac. The first line of the contract's table that applies
    decides. An opt-out updates the same rows (see opt_out), so it waits for this, or this sees it.
    """
    sql = """
        WITH device AS (
            SELECT id, instance FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), target AS (
            SELECT id, status, to_handle, body, created_at, batch_item_id, attempt, drafted_at, handle_key,
                   collected_at, collect_id,
                   COALESCE(valid_until > now(), true)
                   AND NOT EXISTS (SELECT FROM icloud.opt_outs
                                    WHERE handle_key = message.handle_key AND ended_at IS NULL OFFSET 0) AS is_allowed
              FROM icloud.send_queue AS message
             WHERE id = %(id)s AND device_id = (SELECT id FROM device)
               FOR UPDATE
        ), bound AS (
            -- Of two first collects at once the second one waits here, and sees whose the token is now.
            UPDATE icloud.devices SET instance = %(instance)s
             WHERE id = (SELECT id FROM device WHERE instance IS NULL) AND COALESCE(instance = %(instance)s, true)
               AND EXISTS (SELECT FROM target)
            RETURNING id
        ), owner AS (
            SELECT COALESCE(instance = %(instance)s, EXISTS (SELECT FROM bound)) AS is_here FROM device
        ), collected AS (
            UPDATE icloud.send_queue SET collected_at = now(), collect_id = %(collect_id)s, updated_at = now()
             WHERE id = (SELECT id FROM target
                          WHERE status = 'queued' AND collected_at IS NULL AND handle_key IS NOT NULL AND is_allowed
                            AND (SELECT is_here FROM owner))
            RETURNING id
        )
        SELECT target.id, to_handle, body, created_at, batch_item_id, attempt, drafted_at,
               is_here, status = 'queued', collected_at IS NULL, status = 'queued' AND handle_key IS NULL,
               collected.id IS NOT NULL,
               COALESCE(collect_id = %(collect_id)s, false),
               is_allowed AND collected_at >= now() - %(again)s::interval
          FROM owner LEFT JOIN target ON true LEFT JOIN collected ON true
    """
    token, body = _device_body(database, Collect)
    parameters = {
        **token,
        "id": _uuid(queue_id),
        "collect_id": str(body.collect_id),
        "instance": body.instance,
        "again": COLLECT_AGAIN,
    }
    rows = database.query(sql, parameters)
    if rows and HandOver(*rows[0][7:]).lacks_key:
        _add_keys(database, [rows[0][:2]])
        rows = database.query(sql, parameters)
    if not rows:
        serving.abort_unauthorized()
    if rows[0][0] is None:
        _abort_unknown()
    _require_hand_over(HandOver(*rows[0][7:]))
    logger.info("message collected sendQueueId=%s", rows[0][0])
    return _message(*rows[0][:7])


class HandOver(NamedTuple):
    """What a collect found, and whether it has collected the row. `is_same`: it was collected with this collectId."""

    is_here: bool
    is_queued: bool
    was_uncollected: bool
    lacks_key: bool
    is_collected: bool
    is_same: bool
    may_again: bool


def _require_hand_over(found: HandOver) -> None:
    """Refuse a collect that did not hand the message over, neither now nor a moment ago to the same collectId."""
    if not found.is_here:
        _abort_other_instance()
    if not found.is_queued or (found.was_uncollected and not found.is_collected):
        _conflict("gone", "this message is not to be sent any more")
    if not found.was_uncollected and not found.is_same:
        _conflict("collected", "this message was handed over before: it may have been sent, so report it as unknown")
    if not found.was_uncollected and not found.may_again:
        _conflict("late", "this message was handed over too long ago, or may not go any more: give it back")


def result(database: db.RetryingConnection, queue_id: str) -> Data:
    """POST result: record once what became of a message. The same again is a 200, anything else a 409.

    Two things may come later: what Messages learned about a sent one, and what became of one whose outcome was unknown.
    """
    sql = """
        WITH device AS (
            SELECT id, COALESCE(instance = %(instance)s, true) AS is_here
              FROM icloud.devices
             WHERE token IN (%(plain)s, %(digest)s)
             LIMIT 1
        ), target AS (
            -- Locked, so that of two results at once the second sees the first.
            SELECT id, status, outcome FROM icloud.send_queue
             WHERE id = %(id)s AND device_id = (SELECT id FROM device)
               FOR UPDATE
        ), recorded AS (
            UPDATE icloud.send_queue
               SET status = %(status)s,
                   outcome = %(outcome)s,
                   sent_at = CASE WHEN %(status)s = 'sent' THEN COALESCE(sent_at, now()) END,
                   failure_reason = %(reason)s,
                   watched_until = to_timestamp(%(watched_until)s),
                   delivered_at = COALESCE(delivered_at, to_timestamp(%(delivered_at)s)),
                   late_error = COALESCE(late_error, %(late_error)s),
                   updated_at = CASE status WHEN 'queued' THEN now() ELSE updated_at END
             WHERE id = (SELECT id FROM target
                          WHERE (SELECT is_here FROM device)
                            AND (status = 'queued' OR (status = 'sent' AND %(status)s = 'sent' AND %(is_later)s)))
            RETURNING id
        )
        SELECT target.id, is_here, target.status, target.outcome
          FROM device LEFT JOIN target ON true LEFT JOIN recorded ON true
    """
    token, report = _device_body(database, Result)
    parameters = {"id": _uuid(queue_id), **result_columns(report)}
    rows = database.query(sql, {**token, **parameters})
    if not rows:
        serving.abort_unauthorized()
    row_id, is_here, status, outcome = rows[0]
    if row_id is None:
        _abort_unknown()
    if not is_here:
        _abort_other_instance()
    if status == "queued":
        logger.info("result recorded sendQueueId=%s status=%s outcome=%s", row_id, report.status, report.outcome)
    elif (status, outcome) != (report.status, report.outcome):
        if outcome != "unknown" or report.outcome:
            serving.abort(409, f"this message is already recorded as {status}, and a result never changes")
        return _resolve(database, parameters)
    return {"id": row_id, "status": report.status}


def result_columns(report: Result) -> Data:
    """What a result writes into its row; `instance` is compared with the device's."""
    has_failed, is_sent = report.status == "failed", report.status == "sent"
    delivered_at, late_error = (report.delivered_at, _words(report.late_error)) if is_sent else (None, None)
    watched_until = report.watched_until if report.outcome == "unknown" else None
    return {
        "status": report.status,
        "outcome": report.outcome,
        "reason": (_words(report.error) or "the device gave no reason") if has_failed else None,
        "watched_until": _seconds(watched_until),
        "delivered_at": _seconds(delivered_at),
        "late_error": late_error,
        "is_later": bool(delivered_at or late_error),
        "instance": _words(report.instance),
    }


def _resolve(database: db.RetryingConnection, parameters: Data) -> Data:
    """Record what became of a message whose outcome was unknown: the second statement of such a result.

    It was sent at about the time when that was reported, and counts against the limits from then on. If its item was
    retried, there is another row: that is withdrawn, or, if it is too late for that, this row stays as it is.
    """
    sql = """
        WITH target AS (
            SELECT id, batch_item_id FROM icloud.send_queue WHERE id = %(id)s AND outcome = 'unknown' FOR UPDATE
        ), retry AS (
            SELECT id, status, collected_at FROM icloud.send_queue
             WHERE batch_item_id = (SELECT batch_item_id FROM target) AND status <> 'failed' AND %(status)s = 'sent'
               FOR UPDATE
        ), withdrawn AS (
            UPDATE icloud.send_queue
               SET status = 'failed', withdrawn_at = now(), updated_at = now(),
                   failure_reason = 'withdrawn: the attempt before it was sent after all'
             WHERE id = (SELECT id FROM retry WHERE status = 'queued' AND collected_at IS NULL)
            RETURNING id
        ), free AS (
            SELECT NOT EXISTS (SELECT FROM retry) OR EXISTS (SELECT FROM withdrawn) AS is_free
        ), resolved AS (
            UPDATE icloud.send_queue
               SET status = %(status)s, outcome = NULL, failure_reason = %(reason)s, watched_until = NULL,
                   sent_at = CASE WHEN %(status)s = 'sent' THEN updated_at END,
                   delivered_at = to_timestamp(%(delivered_at)s), late_error = %(late_error)s, updated_at = now()
             WHERE id = (SELECT id FROM target) AND (SELECT is_free FROM free)
            RETURNING id
        ), noted AS (
            UPDATE icloud.send_queue
               SET late_error = COALESCE(late_error, 'it was sent after all, and a retry was on its way')
             WHERE id = (SELECT id FROM target) AND NOT (SELECT is_free FROM free)
            RETURNING id
        )
        SELECT (SELECT count(*) FROM resolved), (SELECT count(*) FROM noted)
    """
    [(resolved, noted)] = _query_again(database, sql, parameters)
    row_id, status = parameters["id"], parameters["status"]
    if noted:
        logger.warning("message sent after its item was retried sendQueueId=%s: it may arrive twice", row_id)
        return {"id": row_id, "status": "failed"}
    if resolved:
        logger.info("unknown outcome found out sendQueueId=%s status=%s", row_id, status)
    return {"id": row_id, "status": status}


def device_health(database: db.RetryingConnection) -> Data:
    """POST health: what is wrong with the Mac, in its own words, or nothing. Any Mac with the token may say it."""
    sql = """
        WITH device AS (
            SELECT id, problem FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        )
        UPDATE icloud.devices AS device
           SET problem = %(problem)s::text,
               problem_at = CASE WHEN %(problem)s::text IS NULL THEN NULL
                                 WHEN problem = %(problem)s THEN COALESCE(problem_at, now())
                                 ELSE now() END,
               version = COALESCE(%(version)s, version),
               last_seen_at = now()
         WHERE id = (SELECT id FROM device)
        RETURNING id, problem IS DISTINCT FROM (SELECT problem FROM device)
    """
    token, health = _device_body(database, Health)
    rows = database.query(sql, {**token, "problem": _words(health.problem), "version": health.version})
    if not rows:
        serving.abort_unauthorized()
    device_id, is_news = rows[0]
    if is_news and health.problem:
        logger.warning("device cannot send deviceId=%s; `python status.py` shows what it says", device_id)
    elif is_news:
        logger.info("device can send again deviceId=%s", device_id)
    return {}


def opt_out(database: db.RetryingConnection) -> Data:
    """POST opt-outs: a recipient replied with a word that opts out, or takes such an opt-out back.

    The same reply again changes nothing. Two statements, one after the other: a message that was enqueued while the
    first one ran is seen by the second, or by the collect that asks whether its handle has opted out. A transaction of
    both would leave a gap between the two.
    """
    token, reply = _device_body(database, OptOut)
    word, key = handles.reply_word(reply.word), handles.key(reply.handle)
    parameters = {**token, "word": word, "key": key, "received_at": _seconds(reply.received_at)}
    rows = _record_stop(database, parameters) if word in handles.STOP_WORDS else _record_start(database, parameters)
    if not rows:
        serving.abort_unauthorized()
    if word in handles.STOP_WORDS:
        opt_outs.expire_rows(database.query, [key])
    count, is_news = rows[0]
    if is_news:
        logger.info("opt-out or opt-in recorded word=%r from=%s", word, handles.mask_handle(reply.handle))
    return {"optOuts": count}


def _record_stop(database: db.RetryingConnection, parameters: Data) -> list[db.Row]:
    """Add an opt-out, once for each reply; one that comes while another is active has ended already."""
    sql = """
        WITH device AS (
            SELECT id, opt_outs FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), active AS (
            SELECT FROM icloud.opt_outs WHERE handle_key = %(key)s AND ended_at IS NULL
        ), added AS (
            INSERT INTO icloud.opt_outs (handle_key, word, source, device_id, received_at, ended_at, ended_by)
            SELECT %(key)s, %(word)s, 'reply', id, to_timestamp(%(received_at)s),
                   CASE WHEN EXISTS (SELECT FROM active) THEN now() END,
                   CASE WHEN EXISTS (SELECT FROM active) THEN 'another opt-out was active' END
              FROM device
             WHERE NOT EXISTS (SELECT FROM icloud.opt_outs
                                WHERE handle_key = %(key)s AND source = 'reply'
                                  AND received_at = to_timestamp(%(received_at)s))
            RETURNING id
        ), counted AS (
            UPDATE icloud.devices SET opt_outs = opt_outs + 1
             WHERE id = (SELECT id FROM device) AND EXISTS (SELECT FROM added)
            RETURNING opt_outs
        )
        SELECT COALESCE((SELECT opt_outs FROM counted), opt_outs), EXISTS (SELECT FROM added) FROM device
    """
    return _query_again(database, sql, parameters)


def _record_start(database: db.RetryingConnection, parameters: Data) -> list[db.Row]:
    """End an opt-out that came as a reply and is older than this; never one that the owner recorded."""
    sql = """
        WITH device AS (
            SELECT id, opt_outs FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), ended AS (
            UPDATE icloud.opt_outs SET ended_at = now(), ended_by = %(word)s
             WHERE handle_key = %(key)s AND ended_at IS NULL AND source = 'reply'
               AND EXISTS (SELECT FROM device)
               AND NOT EXISTS (SELECT FROM icloud.opt_outs
                                WHERE handle_key = %(key)s AND source = 'reply'
                                  AND received_at >= to_timestamp(%(received_at)s) OFFSET 0)
            RETURNING id
        )
        SELECT opt_outs, EXISTS (SELECT FROM ended) FROM device
    """
    return database.query(sql, parameters)


# --- the endpoints behind the service token -----------------------------------------------------------


def enqueue(database: db.RetryingConnection, service_token: str) -> Data:
    """POST enqueue: put a message into a device's queue, once for each batchItemId.

    1. The item's row is queued or sent: 200 with it if the content is the same, else 409. 2. The same attempt of the
    item has failed already: 200 with that row. 3. The handle has opted out: 422. 4. A new row; without an `attempt` it
    is the one after the last that failed.
    """
    sql = """
        WITH device AS (
            SELECT id FROM icloud.devices WHERE id = %(device_id)s
        ), live AS (
            SELECT id, (device_id, to_handle, body) = (%(device_id)s, %(to_handle)s, %(body)s) AS is_same
              FROM icloud.send_queue
             WHERE batch_item_id = %(batch_item_id)s AND status <> 'failed'
        ), ended AS (
            SELECT id, attempt, created_at FROM icloud.send_queue
             WHERE batch_item_id = %(batch_item_id)s AND status = 'failed'
               AND withdrawn_at IS NULL AND outcome IS DISTINCT FROM 'not_started'
        ), known AS (
            SELECT id FROM ended WHERE attempt = %(attempt)s ORDER BY created_at DESC LIMIT 1
        ), made AS (
            INSERT INTO icloud.send_queue AS message
                   (device_id, to_handle, body, batch_item_id, attempt, handle_key, valid_until, drafted_at)
            SELECT id, %(to_handle)s, %(body)s, %(batch_item_id)s,
                   COALESCE(%(attempt)s, (SELECT max(attempt) + 1 FROM ended), 1), %(handle_key)s,
                   to_timestamp(%(valid_until)s), to_timestamp(%(drafted_at)s)
              FROM device
             WHERE NOT EXISTS (SELECT FROM live) AND NOT EXISTS (SELECT FROM known)
               AND NOT EXISTS (SELECT FROM icloud.opt_outs WHERE handle_key = %(handle_key)s AND ended_at IS NULL)
            ON CONFLICT (batch_item_id) WHERE status <> 'failed'
            -- Somebody made it meanwhile. Changes nothing; a DO NOTHING would return nothing either.
            DO UPDATE SET batch_item_id = EXCLUDED.batch_item_id
            RETURNING id, xmax = 0 AS is_new,
                      (device_id, to_handle, body) = (%(device_id)s, %(to_handle)s, %(body)s) AS is_same
        )
        SELECT COALESCE(live.id, known.id, made.id), COALESCE(live.is_same, made.is_same, true),
               COALESCE(made.is_new, false)
          FROM device LEFT JOIN live ON true LEFT JOIN known ON true LEFT JOIN made ON true
    """
    serving.require_token(service_token)
    message = serving.decode_body(serving.read_body(), Enqueue)
    rows = database.query(sql, enqueue_columns(message))
    if not rows:
        serving.abort(400, f"`deviceId` {message.device_id} is not a known device")
    row_id, is_same, is_new = rows[0]
    if row_id is None:
        serving.abort(422, "this handle has opted out, and is not written to any more")
    if not is_same:
        error = f"batch item {message.batch_item_id} is in the queue already, with other content"
        serving.abort(409, error, {"sendQueueId": row_id})
    if is_new:
        to = handles.mask_handle(message.to_handle)
        logger.info("message enqueued sendQueueId=%s deviceId=%s to=%s", row_id, message.device_id, to)
    return {"sendQueueId": row_id}


def enqueue_columns(message: Enqueue) -> Data:
    """What a message writes into its row."""
    return {
        "batch_item_id": str(message.batch_item_id),
        "device_id": str(message.device_id),
        "to_handle": message.to_handle,
        "handle_key": handles.key(message.to_handle),
        "body": message.body,
        "attempt": message.attempt,
        "valid_until": _seconds(message.valid_until),
        "drafted_at": _seconds(message.drafted_at),
    }


def status(database: db.RetryingConnection, service_token: str) -> Data:
    """GET status: what waits for each device, and the results of the last hour; for monitors without a database."""
    sql = """
        WITH results AS (
            SELECT count(*) FILTER (WHERE status = 'sent') AS sent,
                   count(*) FILTER (WHERE status = 'failed' AND withdrawn_at IS NULL
                                      AND outcome IS DISTINCT FROM 'not_started') AS failed
              FROM icloud.send_queue
             WHERE status <> 'queued' AND updated_at > now() - interval '1 hour'
        )
        SELECT results.sent, results.failed, device.id, device.name, device.last_seen_at, device.problem,
               count(message.id) FILTER (WHERE message.collected_at IS NULL),
               count(message.id) FILTER (WHERE message.collected_at IS NOT NULL),
               EXTRACT(epoch FROM now() - min(message.created_at))::bigint
          FROM results
          LEFT JOIN icloud.devices AS device ON true
          LEFT JOIN icloud.send_queue AS message ON message.device_id = device.id AND message.status = 'queued'
         GROUP BY results.sent, results.failed, device.id, device.name, device.last_seen_at, device.problem,
                  device.created_at
         ORDER BY device.created_at, device.id
    """
    serving.require_token(service_token)
    rows = database.query(sql)
    devices = [
        {
            "id": device_id,
            "name": name,
            "lastSeenAt": _instant(seen) if seen else None,
            "problem": problem,
            "waiting": waiting,
            "collected": collected,
            "oldestAgeSeconds": age,
        }
        for _, _, device_id, name, seen, problem, waiting, collected, age in rows
        if device_id
    ]
    return {"devices": devices, "lastHour": {"sent": rows[0][0], "failed": rows[0][1]}}


def scrape(database: db.RetryingConnection, service_token: str) -> bottle.HTTPResponse:
    """GET metrics: what waits for each device, and the results of the last hour, for Prometheus."""
    serving.require_token(service_token)
    body = metrics.render(metrics.queue(database.query))
    return bottle.HTTPResponse(body, Content_Type=metrics.CONTENT_TYPE)


def health(database: db.RetryingConnection) -> Data:
    """GET healthz: whether the database answers; for monitors, without a token."""
    database.query("SELECT 1")
    return {"status": "ok"}


def _device_token() -> dict[str, str]:
    """The two forms in which a device's token may be stored. A stored digest is not itself a token: 401."""
    token = serving.bearer_token()
    if not token or token.startswith("sha256:"):
        serving.abort_unauthorized()
    return {"plain": token, "digest": db.hash_token(token)}


def _device_body(database: db.RetryingConnection, kind: type[T]) -> tuple[Data, T]:
    """The device's token and the request's body. An unknown token is refused before a body that cannot be read.

    Damaged UTF-8 in a device's words is replaced: it must not cost what the device has to say.
    """
    token = _device_token()
    try:
        return token, serving.decode_body(serving.read_body().decode(errors="replace"), kind)
    except bottle.HTTPResponse:
        if not database.query("SELECT id FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s)", token):
            serving.abort_unauthorized()
        raise


def _is_peek() -> bool:
    """Whether the request is a peek. Nothing else is taken for a poll, which would collect."""
    value = bottle.request.query.get("peek", "false")
    if value not in ("true", "false"):
        serving.abort(400, "`peek` must be true or false")
    return bool(value == "true")


def _add_keys(database: db.RetryingConnection, rows: Sequence[tuple[str, str]]) -> None:
    """Give rows that were made without the server their handle_key, by which opt-outs are looked up."""
    sql = """
        UPDATE icloud.send_queue AS message
           SET handle_key = (SELECT key FROM unnest(%(ids)s::text[]::uuid[], %(keys)s::text[]) AS keyed (id, key)
                              WHERE keyed.id = message.id)
         WHERE id = ANY (%(ids)s::text[]::uuid[]) AND handle_key IS NULL
    """
    ids, keys = [row_id for row_id, _ in rows], [handles.key(to_handle) for _, to_handle in rows]
    database.query(sql, {"ids": ids, "keys": keys})


def _query_again(database: db.RetryingConnection, sql: str, parameters: Data) -> list[db.Row]:
    """Run a statement that says what to do about a row that is there, again if somebody else has just made that row."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(psycopg2.errors.UniqueViolation):
            return database.query(sql, parameters)
    return database.query(sql, parameters)


def _conflict(reason: str, sentence: str) -> NoReturn:
    serving.abort(409, sentence, {"reason": reason})


def _abort_unknown() -> NoReturn:
    serving.abort(404, "there is no such message for this device")


def _abort_other_instance() -> NoReturn:
    _conflict("otherInstance", "this token is in use on another Mac: give this one a token of its own")


def _message(
    row_id: str,
    to_handle: str,
    body: str,
    created_at: datetime,
    batch_item_id: str | None,
    attempt: int,
    drafted_at: datetime | None,
) -> Data:
    """A message as a device that peeks needs it. One that was made by hand is its own item."""
    return {
        "id": row_id,
        "toHandle": to_handle,
        "body": body,
        "createdAt": _instant(created_at),
        "batchItemId": batch_item_id or row_id,
        "attempt": attempt,
        "draftedAt": _instant(drafted_at or created_at),
    }


def _words(text: str | None) -> str | None:
    """A device's words as they can be kept; None for none."""
    return db.replace_unstorable(text)[:REASON_LENGTH] if text else None


def _seconds(moment: datetime | None) -> float | None:
    """For to_timestamp(): PostgreSQL knows no offset of 16 hours and more, which the format allows."""
    return moment.timestamp() if moment else None


def _uuid(text: str) -> str | None:
    return text.lower() if runtime.is_uuid(text) else None


def _instant(moment: datetime) -> datetime:
    """UTC, whole seconds, which msgspec writes with a Z: Swift's .iso8601 decoder refuses fractions."""
    return moment.astimezone(UTC).replace(microsecond=0)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description="Serve the send queue over HTTP.",
        epilog="environment: MAC_SYNC_SERVICE_TOKEN (needed), QUINN_ICLOUD_DB_URL, SEND_QUEUE_HOST, SEND_QUEUE_PORT, "
        "SEND_QUEUE_THREADS, DEFAULT_REGION (the dispatcher's), LOG_LEVEL. examples: python send_queue_server.py; "
        "SEND_QUEUE_PORT=8080 python send_queue_server.py",
    ).parse_args(argv)
    runtime.load_settings()
    runtime.set_up_logging()
    token = runtime.service_token()
    if token is None:
        raise runtime.ConfigError("MAC_SYNC_SERVICE_TOKEN is not set: make one with `openssl rand -hex 24`")
    host = os.environ.get("SEND_QUEUE_HOST") or "127.0.0.1"
    port = runtime.env_int("SEND_QUEUE_PORT", 3201, lowest=0, highest=65_535)
    threads = runtime.env_int("SEND_QUEUE_THREADS", serving.THREADS, highest=64)
    handles.default_region()
    app = make_app(db.RetryingConnection(db.url("icloud")), token)
    sockets = serving.open_sockets(host, port, "SEND_QUEUE_HOST and SEND_QUEUE_PORT")
    return serving.serve("send-queue-server", app, sockets, threads)


def entry_point() -> None:
    """Run the command `send-queue-server`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
