"""The send queue's HTTP surface: a Mac polls it for messages to send, and the dispatcher fills it.

Run by systemd (systemd/send-queue-server@.service) or by hand. Touches icloud.devices and icloud.send_queue.
The contract is openapi.yaml. Each request is one statement, the look-up of a device's token included. Example:

    curl -H "Authorization: Bearer $DEVICE_TOKEN" http://localhost:3201/client/imessage/send-queue/pending
"""

import argparse
import functools
import logging
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import bottle
import msgspec

import db
import handles
import runtime
import serving

LAST_SEEN_PRECISION = "10 seconds"  # an idle poll writes at most this often
REASON_LENGTH = 1000  # characters of a device's error text that are kept

PENDING = "/client/imessage/send-queue/pending"
RESULT = "/client/imessage/send-queue/<queue_id>/result"
ENQUEUE = "/admin/send-queue/enqueue"
STATUS = "/admin/send-queue/status"
HEALTH = "/healthz"

Data = dict[str, Any]
logger = logging.getLogger("send-queue-server")


class Enqueue(msgspec.Struct, rename="camel"):
    """The body of POST enqueue: UUIDs, a phone number or e-mail address, text; an instant with its offset."""

    batch_item_id: uuid.UUID
    device_id: uuid.UUID
    to_handle: Annotated[str, msgspec.Meta(max_length=handles.MAX_HANDLE_LENGTH)]
    body: Annotated[str, msgspec.Meta(min_length=1)]
    valid_until: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    drafted_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None

    def __post_init__(self) -> None:
        if not handles.HANDLE_PATTERN.fullmatch(self.to_handle) or db.UNSTORABLE.search(self.to_handle):
            raise ValueError("`toHandle` is neither a phone number nor an e-mail address")
        if db.UNSTORABLE.search(self.body):
            raise ValueError("`body` has a NUL or half of a surrogate pair")


class Result(msgspec.Struct):
    """The body of POST result: what became of a message, and the device's words when it failed."""

    status: Literal["sent", "failed"]
    error: str | None = None


def make_app(database: db.RetryingConnection, service_token: str) -> bottle.Bottle:
    """The WSGI application over `database`; `service_token` opens the admin path."""
    app = serving.make_app("QUINN_ICLOUD_DB_URL")
    app.route(PENDING, "GET", functools.partial(pending, database))
    app.route(RESULT, "POST", functools.partial(result, database))
    app.route(ENQUEUE, "POST", functools.partial(enqueue, database, service_token))
    app.route(STATUS, "GET", functools.partial(status, database, service_token))
    app.route(HEALTH, "GET", functools.partial(health, database))
    return app


def pending(database: db.RetryingConnection) -> Data:
    """GET pending: up to 50 of the device's queued messages, oldest first, until their results are in.

    Being handed out for the first time marks a row as collected, after which it is never withdrawn; a row past
    its valid_until is not handed out for the first time any more.
    """
    sql = """
        WITH device AS (
            SELECT id, last_seen_at FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), seen AS (
            UPDATE icloud.devices SET last_seen_at = now()
             WHERE id = (SELECT id FROM device
                          WHERE COALESCE(last_seen_at, '-infinity') < now() - %(precision)s::interval)
        ), page AS (
            SELECT id, to_handle, body, created_at, collected_at
              FROM icloud.send_queue
             WHERE device_id = (SELECT id FROM device)
               AND status = 'queued'
               AND (collected_at IS NOT NULL OR COALESCE(valid_until > now(), true))
             ORDER BY created_at, id
             LIMIT 50
        ), collected AS (
            -- Repeats the conditions, in a CASE (see schema.sql): the row may have been withdrawn since `page` saw it.
            UPDATE icloud.send_queue SET collected_at = now(), updated_at = now()
             WHERE id = ANY (ARRAY(SELECT id FROM page WHERE collected_at IS NULL))
               AND CASE status WHEN 'queued' THEN collected_at IS NULL END
            RETURNING id
        )
        SELECT page.id, to_handle, body, created_at
          FROM device
          LEFT JOIN page ON collected_at IS NOT NULL OR page.id IN (SELECT id FROM collected)
         ORDER BY created_at, page.id
    """
    rows = database.query(sql, {**_device_token(), "precision": LAST_SEEN_PRECISION})
    if not rows:
        serving.abort_unauthorized()
    items = [
        {"id": row_id, "toHandle": to_handle, "body": body, "createdAt": _instant(created_at)}
        for row_id, to_handle, body, created_at in rows
        if row_id
    ]
    logger.debug("polled items=%d", len(items))
    return {"items": items}


def result(database: db.RetryingConnection, queue_id: str) -> Data:
    """POST result: record once what became of a message. The same again is a 200, anything else a 409."""
    sql = """
        WITH device AS (
            SELECT id FROM icloud.devices WHERE token IN (%(plain)s, %(digest)s) LIMIT 1
        ), target AS (
            -- Locked, so that of two results at once the second sees the first.
            SELECT id, status FROM icloud.send_queue
             WHERE id = %(id)s AND device_id = (SELECT id FROM device)
               FOR UPDATE
        ), recorded AS (
            UPDATE icloud.send_queue
               SET status = %(status)s,
                   sent_at = CASE WHEN %(status)s = 'sent' THEN now() END,
                   failure_reason = %(reason)s,
                   updated_at = now()
             WHERE id = (SELECT id FROM target WHERE status = 'queued')
            RETURNING id
        )
        SELECT target.id, target.status, recorded.id IS NOT NULL
          FROM device LEFT JOIN target ON true LEFT JOIN recorded ON true
    """
    problem: bottle.HTTPResponse | None = None
    report = Result(status="failed")
    try:
        # Damaged UTF-8 in the device's words must not cost the result.
        report = serving.decode_body(serving.read_body().decode(errors="replace"), Result)
    except bottle.HTTPResponse as error:
        problem, queue_id = error, ""  # refused below, once the token is known to be good; "" finds no row
    reason = db.replace_unstorable(report.error or "")[:REASON_LENGTH] or "the device gave no reason"
    parameters = {
        "id": _uuid(queue_id),
        "status": report.status,
        "reason": reason if report.status == "failed" else None,
    }
    rows = database.query(sql, {**_device_token(), **parameters})
    if not rows:
        serving.abort_unauthorized()
    if problem:
        raise problem
    row_id, old_status, recorded = rows[0]
    if row_id is None:
        serving.abort(404, "there is no such message for this device")
    if not recorded and old_status != report.status:
        serving.abort(409, f"this message is already recorded as {old_status}, and a result never changes")
    if recorded:
        logger.info("result recorded sendQueueId=%s status=%s", row_id, report.status)
    return {"id": row_id, "status": report.status}


def enqueue(database: db.RetryingConnection, service_token: str) -> Data:
    """POST enqueue: put a message into a device's queue, once for each batchItemId.

    The same item again gets the row it has, unless that row failed or was withdrawn: then this is a retry and
    makes a new one. Other content for an item whose row is queued or sent is a 409 that names the row.
    """
    sql = """
        INSERT INTO icloud.send_queue AS live (device_id, to_handle, body, batch_item_id, valid_until, drafted_at)
        SELECT id, %(to_handle)s, %(body)s, %(batch_item_id)s,
               to_timestamp(%(valid_until)s), to_timestamp(%(drafted_at)s)
          FROM icloud.devices
         WHERE id = %(device_id)s
        ON CONFLICT (batch_item_id) WHERE status <> 'failed'
        -- Changes nothing; a DO NOTHING would return nothing either.
        DO UPDATE SET batch_item_id = EXCLUDED.batch_item_id
        RETURNING id, xmax = 0,
                  (device_id, to_handle, body) = (%(device_id)s, %(to_handle)s, %(body)s)
    """
    serving.require_token(service_token)
    message = serving.decode_body(serving.read_body(), Enqueue)
    parameters = {
        "batch_item_id": str(message.batch_item_id),
        "device_id": str(message.device_id),
        "to_handle": message.to_handle,
        "body": message.body,
        # As seconds, since PostgreSQL knows no offset of 16 hours and more, which the format allows.
        "valid_until": message.valid_until.timestamp() if message.valid_until else None,
        "drafted_at": message.drafted_at.timestamp() if message.drafted_at else None,
    }
    rows = database.query(sql, parameters)
    if not rows:
        serving.abort(400, f"`deviceId` {message.device_id} is not a known device")
    row_id, inserted, same = rows[0]
    if not same:
        error = f"batch item {message.batch_item_id} is in the queue already, with other content"
        serving.abort(409, error, {"sendQueueId": row_id})
    if inserted:
        to = handles.mask_handle(message.to_handle)
        logger.info("message enqueued sendQueueId=%s deviceId=%s to=%s", row_id, message.device_id, to)
    return {"sendQueueId": row_id}


def status(database: db.RetryingConnection, service_token: str) -> Data:
    """GET status: what waits for each device, and the results of the last hour; for monitors without a database."""
    sql = """
        WITH results AS (
            SELECT count(*) FILTER (WHERE status = 'sent') AS sent,
                   count(*) FILTER (WHERE status = 'failed' AND withdrawn_at IS NULL) AS failed
              FROM icloud.send_queue
             WHERE status <> 'queued' AND updated_at > now() - interval '1 hour'
        )
        SELECT results.sent, results.failed, device.id, device.name, device.last_seen_at,
               count(message.id) FILTER (WHERE message.collected_at IS NULL),
               count(message.id) FILTER (WHERE message.collected_at IS NOT NULL),
               EXTRACT(epoch FROM now() - min(message.created_at))::bigint
          FROM results
          LEFT JOIN icloud.devices AS device ON true
          LEFT JOIN icloud.send_queue AS message ON message.device_id = device.id AND message.status = 'queued'
         GROUP BY results.sent, results.failed, device.id, device.name, device.last_seen_at, device.created_at
         ORDER BY device.created_at, device.id
    """
    serving.require_token(service_token)
    rows = database.query(sql)
    devices = [
        {
            "id": device_id,
            "name": name,
            "lastSeenAt": _instant(seen) if seen else None,
            "waiting": waiting,
            "collected": collected,
            "oldestAgeSeconds": age,
        }
        for _, _, device_id, name, seen, waiting, collected, age in rows
        if device_id
    ]
    return {"devices": devices, "lastHour": {"sent": rows[0][0], "failed": rows[0][1]}}


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


def _uuid(text: str) -> str | None:
    return text.lower() if runtime.is_uuid(text) else None


def _instant(moment: datetime) -> datetime:
    """UTC, whole seconds, which msgspec writes with a Z: Swift's .iso8601 decoder refuses fractions."""
    return moment.astimezone(UTC).replace(microsecond=0)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description="Serve the send queue over HTTP.",
        epilog="environment: MAC_SYNC_SERVICE_TOKEN (needed), QUINN_ICLOUD_DB_URL, SEND_QUEUE_HOST, SEND_QUEUE_PORT, "
        "SEND_QUEUE_THREADS, LOG_LEVEL. examples: python send_queue_server.py; "
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
    app = make_app(db.RetryingConnection(db.url("icloud")), token)
    try:
        sockets = serving.systemd_sockets() or [serving.listen(host, port)]
    except OSError as error:
        raise runtime.ConfigError(
            f"cannot listen on {host}:{port}: {error}; set SEND_QUEUE_HOST and SEND_QUEUE_PORT to a free address"
        ) from None
    return serving.serve("send-queue-server", app, sockets, threads)


if __name__ == "__main__":
    runtime.run_main(main)
