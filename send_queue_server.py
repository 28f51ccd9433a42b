"""The send queue's HTTP surface: a Mac polls it for messages to send, and the dispatcher fills it.

Run by systemd (systemd/send-queue-server@.service) or by hand. Touches icloud.devices and icloud.send_queue.
The contract is openapi.yaml. Each request is one statement, the look-up of a device's token included. Example:

    curl -H "Authorization: Bearer $DEVICE_TOKEN" http://localhost:3201/client/imessage/send-queue/pending
"""

import argparse
import collections
import functools
import hmac
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import bottle
import msgspec
import psycopg2
import waitress
import waitress.channel
import waitress.parser
import waitress.task
import waitress.wasyncore
from bottle import request, response

import db
import handles
import runtime

BODY_LIMIT = 64 * 1024  # bytes; the contract's
# A body up to here is read to its end before it is refused: a connection closed over unread bytes is reset,
# and the client would see that in place of the 413.
READ_LIMIT = 1024 * 1024  # bytes
HEADER_LIMIT = 16 * 1024  # bytes; a bearer token and a proxy's additions fit many times over
# A request runs when it has been read to its end, so that a slow client holds a socket and never a thread.
# A socket that says nothing, or reads nothing of its answer, is closed after this.
SILENCE_LIMIT = 20  # seconds
SWEEP_PAUSE = 5  # seconds between two looks for such sockets
CONNECTION_LIMIT = 1000  # sockets; above it new ones wait in the backlog
# One would wait for each commit, and take a third fewer messages a second; four fight over the interpreter's lock,
# and answer a sixth fewer polls. For more than one core, run more processes (`make bench`).
THREADS = 2
UNREAD_LIMIT = 1024 * 1024  # bytes of answers that a client has not read, before its next request waits for that
SHUTDOWN_LIMIT = 8  # seconds for the requests in hand, of the ten that systemd's stop should take at most
SHUTDOWN_SILENCE = 1  # seconds in which a busy client sends its next request, and is told to connect anew
RETRY_AFTER = "5"  # seconds; what a client is asked to wait for a database that is away
LAST_SEEN_PRECISION = "10 seconds"  # an idle poll writes at most this often
REASON_LENGTH = 1000  # characters of a device's error text that are kept

PENDING = "/client/imessage/send-queue/pending"
RESULT = "/client/imessage/send-queue/<queue_id>/result"
ENQUEUE = "/admin/send-queue/enqueue"
STATUS = "/admin/send-queue/status"
HEALTH = "/healthz"

T = TypeVar("T")
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
    app = bottle.Bottle()
    app.install(_guarded)
    app.default_error_handler = _as_json
    for path in (PENDING, STATUS, HEALTH):
        app.route(path, "HEAD", _refuse_head)
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
        _refuse_token()
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
    problem: bottle.HTTPError | None = None
    report = Result(status="failed")
    try:
        # Damaged UTF-8 in the device's words must not cost the result.
        report = _decoded(_body().decode(errors="replace"), Result)
    except bottle.HTTPError as error:
        problem, queue_id = error, ""  # refused below, once the token is known to be good; "" finds no row
    reason = db.replace_unstorable(report.error or "")[:REASON_LENGTH] or "the device gave no reason"
    parameters = {
        "id": _uuid(queue_id),
        "status": report.status,
        "reason": reason if report.status == "failed" else None,
    }
    rows = database.query(sql, {**_device_token(), **parameters})
    if not rows:
        _refuse_token()
    if problem:
        raise problem
    row_id, old_status, recorded = rows[0]
    if row_id is None:
        _refuse(404, "there is no such message for this device")
    if not recorded and old_status != report.status:
        _refuse(409, f"this message is already recorded as {old_status}, and a result never changes")
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
    _check(service_token)
    message = _decoded(_body(), Enqueue)
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
        _refuse(400, f"`deviceId` {message.device_id} is not a known device")
    row_id, inserted, same = rows[0]
    if not same:
        error = f"batch item {message.batch_item_id} is in the queue already, with other content"
        body = _json({"success": False, "error": error, "data": {"sendQueueId": row_id}})
        raise bottle.HTTPResponse(body, 409, {"Content-Type": "application/json"})
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
    _check(service_token)
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


def _bearer() -> str:
    """The request's bearer token, "" when there is none or it is malformed."""
    match = re.fullmatch(r"Bearer +([!-~]+) *", request.environ.get("HTTP_AUTHORIZATION", ""), re.IGNORECASE)
    return match[1] if match else ""


def _check(service_token: str) -> None:
    if not hmac.compare_digest(_bearer().encode(), service_token.encode()):
        _refuse_token()


def _device_token() -> dict[str, str]:
    """The two forms in which a device's token may be stored. A stored digest is not itself a token: 401."""
    token = _bearer()
    if not token or token.startswith("sha256:"):
        _refuse_token()
    return {"plain": token, "digest": db.hash_token(token)}


def _refuse(status: int, sentence: str) -> NoReturn:
    raise bottle.HTTPError(status, sentence)


def _refuse_token() -> NoReturn:
    _refuse(401, "the bearer token is missing or not valid here")


def _refuse_head() -> NoReturn:
    # Bottle would run the GET for it, and collect messages that nobody receives.
    _refuse(405, "HEAD is not allowed here")


def _body() -> bytes:
    length = max(request.content_length, 0)
    if length > BODY_LIMIT:
        _refuse(413, f"the body is larger than {BODY_LIMIT} bytes")
    return bytes(request.environ["wsgi.input"].read(length))


def _decoded(body: bytes | str, kind: type[T]) -> T:
    """`body` as a `kind`; a 400 that names the field otherwise.

    The standard library parses, since it passes a lone surrogate on: the field that has one can be named.
    """
    try:
        return msgspec.convert(json.loads(body), kind)
    except msgspec.ValidationError as error:
        _refuse(400, str(error))
    except (ValueError, RecursionError):
        _refuse(400, "the body is not JSON in UTF-8")


def _uuid(text: str) -> str | None:
    return text.lower() if runtime.is_uuid(text) else None


def _instant(moment: datetime) -> datetime:
    """UTC, whole seconds, which msgspec writes with a Z: Swift's .iso8601 decoder refuses fractions."""
    return moment.astimezone(UTC).replace(microsecond=0)


def _json(answer: Data) -> bytes:
    response.content_type = "application/json"
    return msgspec.json.encode(answer)


def _guarded(handler: Callable[..., Data]) -> Callable[..., bytes]:
    """Wrap an endpoint: its data as JSON, and what the database raises as an answer and a log line.

    Of an error only its kind is logged: PostgreSQL's texts quote the values of the statement.
    """

    def guarded(**arguments: str) -> bytes:
        where = f"{request.method} {request.environ['bottle.route'].rule}"
        try:
            return _json({"success": True, "data": handler(**arguments)})
        except bottle.HTTPResponse as refusal:
            level = logging.WARNING if refusal.status_code in (401, 409) else logging.INFO
            hint = "; compare its token with the server's, or a device's" if refusal.status_code == 401 else ""
            logger.log(level, "request refused status=%d request=%r%s", refusal.status_code, where, hint)
            raise
        except db.DatabaseUnavailable as error:
            hint = "; see that PostgreSQL runs, and QUINN_ICLOUD_DB_URL"
            logger.error("database unavailable sqlstate=%r request=%r%s", str(error), where, hint)
            raise bottle.HTTPError(503, "the database cannot be reached; try again soon") from None
        except psycopg2.Error as error:
            kind = f"{type(error).__name__} {error.pgcode}"
            code = error.pgcode or ""
            hint = "; run `python db.py migrate`" if code.startswith("42") else ""
            hint = "; GRANT the tables' owner to this role" if code == "42501" else hint
            logger.error("statement failed error=%r request=%r%s", kind, where, hint)
            raise bottle.HTTPError(
                500, "the database refused the statement; the server's log names the error"
            ) from None
        except Exception as error:  # noqa: BLE001  # a bug must end as a 500 in JSON, and its text must not be logged
            logger.error("endpoint failed error=%s request=%r\n%s", type(error).__name__, where, _frames(error))
            raise bottle.HTTPError(500, "the server failed; its log names the error") from None

    return guarded


def _frames(error: BaseException) -> str:
    """Where it was raised. Its own text may quote a message."""
    return "".join(traceback.format_tb(error.__traceback__))


def _as_json(error: bottle.HTTPError) -> bytes:
    """The error's status and one sentence. The caller has applied its headers to `response`."""
    sentences = {404: "there is nothing at this path", 405: "this method is not allowed here"}
    if error.status_code == 401:
        response.set_header("WWW-Authenticate", "Bearer")
    if error.status_code == 405:
        # Bottle lists the HEAD that _refuse_head answers; that refusal itself lists nothing.
        response.set_header("Allow", error.get_header("Allow", "GET").replace(",HEAD", ""))
    if error.status_code == 503:
        response.set_header("Retry-After", RETRY_AFTER)
    if error.status_code == 404 and "bottle.route" in request.environ:
        sentences = {}  # an endpoint's own 404 has its own words
    return _json({"success": False, "error": sentences.get(error.status_code, str(error.body))})


class JSONErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]  # waitress has no type hints
    """Waitress' answer to what is not HTTP, as JSON like any other; its 501 for an odd encoding is a 400 here."""

    def execute(self) -> None:
        code, reason = self.request.error.code, self.request.error.reason
        if code == 501:
            code, reason = 400, "Bad Request"
        sentences = {
            413: "the body is too large",
            431: "the headers are too large",
            500: "the server failed; its log names the error",
        }
        sentence = sentences.get(code, "this is not a valid HTTP request")
        body = msgspec.json.encode({"success": False, "error": sentence})
        self.status = f"{code} {reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(waitress.task.WSGITask):  # type: ignore[misc]  # waitress has no type hints
    """A request; one that comes while the server stops is answered, and its connection closed after that."""

    wrote_header: bool

    def execute(self) -> None:
        if not self.channel.server.accepting:
            self.set_close_on_finish()
        super().execute()

    def write(self, data: bytes) -> None:
        """Send an answer's head and body at once: waitress' two system calls cost a sixth of all requests a second."""
        head = b"" if self.wrote_header else self.build_response_header()
        self.wrote_header = True
        self.content_bytes_written += len(data)
        self.channel.write_soon(head + data)


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # waitress has no type hints
    """waitress' parser, with two of its gaps filled: what it raises at a URI such as `http://[` closes the connection,
    and after the `100 Continue` for a request without a body it waits for that body.
    """

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise waitress.parser.ParsingError("Bad URI") from None
        finally:
            if self.body_rcv is None:
                self.expect_continue = False


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]  # waitress has no type hints
    parser_class = Parser
    task_class = Task
    error_task_class = JSONErrorTask

    def handle_expt(self) -> None:
        """A byte of urgent data. Nobody sends one for good, and poll() would report it without end."""
        self.handle_close()

    def waits(self) -> bool:
        """Whether it has a request to run, and has read the answers before it."""
        return bool(self.requests) and self.total_outbufs_len < UNREAD_LIMIT


class Worker(threading.Thread):
    """A thread that accepts connections, reads their requests, runs them and sends the answers, all by itself.

    It takes the place of waitress' pool of threads (its `task dispatcher`), to which one thread hands what it has
    read: changing hands costs a quarter of all requests a second, and more.
    """

    def __init__(self, app: bottle.Bottle, listening: socket.socket, connections: int = CONNECTION_LIMIT) -> None:
        """Serve `app` on a socket that it shares with other workers, to so many `connections` at once."""
        super().__init__(daemon=True)  # one that a database holds does not hold the end of the process
        self.channels: dict[int, Any] = {}
        self.tasks: collections.deque[Channel] = collections.deque()  # connections that have a request to run
        self.stopping = False
        self.next_sweep = 0.0  # as time.time() has it
        self.server = waitress.create_server(
            app,
            map=self.channels,
            _dispatcher=self,
            sockets=[listening.dup()],
            max_request_body_size=READ_LIMIT,
            max_request_header_size=HEADER_LIMIT,
            inbuf_overflow=BODY_LIMIT,  # a longer body waits in a file for its 413
            connection_limit=connections,
            outbuf_high_watermark=sys.maxsize,  # never wait for a client that does not read: see turn()
            ident=None,
        )
        self.server.channel_class = Channel
        self.server.next_channel_cleanup = math.inf  # never by waitress: see sweep()
        self.server.pull_trigger = lambda: None  # it would wake the thread that reads, which is this one

    def add_task(self, channel: Channel) -> None:
        """Called by waitress, in the middle of reading, when a connection has a whole request."""
        self.tasks.append(channel)

    def run(self) -> None:
        try:
            while not self.stopping:
                self.turn(timeout=1)
                if not self.server.accepting:
                    raise RuntimeError("waitress has closed the listening socket")
            self.drain()
        except BaseException as error:  # noqa: BLE001  # its clients would wait for ever; systemd starts a new process
            logger.critical("a thread failed, so the server stops error=%s\n%s", type(error).__name__, _frames(error))
            os._exit(1)

    def turn(self, timeout: float) -> None:
        """Wait for clients, `timeout` seconds at most, and run what they have asked, a request of each."""
        if any(channel.waits() for channel in self.tasks):
            timeout = 0
        # poll(), since select() fails beyond 1,024 descriptors
        waitress.wasyncore.loop(timeout=timeout, use_poll=True, map=self.channels, count=1)
        self.sweep()
        for _ in range(len(self.tasks)):
            channel = self.tasks.popleft()
            if channel.waits():
                self.run_task(channel)
            else:
                self.tasks.append(channel)

    def run_task(self, channel: Channel) -> None:
        """Answer a connection's next request; if it has sent another one already, that is a task again."""
        try:
            channel.service()
        except Exception as error:  # noqa: BLE001  # of the system or in waitress: it must not cost the others
            logger.error("a connection failed, and is closed error=%s\n%s", type(error).__name__, _frames(error))
            channel.handle_close()

    def sweep(self) -> None:
        """Close the connections that have been silent for too long.

        waitress' own look for them comes before it reads, and would close one whose request came while this thread
        was held up; and it spares those that do not read their answers.
        """
        now = time.time()
        if now < self.next_sweep:
            return
        self.next_sweep = now + SWEEP_PAUSE
        for channel in list(self.server.active_channels.values()):
            if channel.last_activity < now - SILENCE_LIMIT and not channel.waits():
                channel.handle_close()

    def stop(self) -> None:
        """End soon; from another thread."""
        self.stopping = True
        self.server.trigger.pull_trigger()

    def drain(self) -> None:
        """Accept no more, and let the open connections end: each with its next answer, or when it stays silent.

        Where systemd holds the listening socket, new connections wait there for the next process.
        """
        waitress.wasyncore.dispatcher.close(self.server)  # the listening socket only
        start = time.monotonic()
        while self.server.active_channels and time.monotonic() - start < SHUTDOWN_LIMIT:
            busy = any(
                channel.requests
                or channel.total_outbufs_len
                or (channel.request and time.time() - channel.last_activity < SHUTDOWN_SILENCE)
                for channel in self.server.active_channels.values()
            )
            if not busy and time.monotonic() - start > SHUTDOWN_SILENCE:
                break
            self.turn(timeout=0.05)
        for channel in list(self.server.active_channels.values()):
            channel.handle_close()  # now, since a request that comes before the process ends would find nobody here


def serve(app: bottle.Bottle, sockets: Sequence[socket.socket], threads: int) -> None:
    """Serve on sockets that listen, with so many threads each, until SIGTERM or SIGINT; then end within 10 s."""
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the workers inherit it: the signals are for sigwait() below
    share = CONNECTION_LIMIT // (threads * len(sockets))
    workers = [Worker(app, listening, share) for listening in sockets for _ in range(threads)]
    for listening in sockets:
        logger.info("send-queue-server listening port=%s threads=%d", listening.getsockname()[1], threads)
        listening.close()  # each worker has its own descriptor
    for worker in workers:
        worker.start()
    runtime.sd_notify("READY=1")
    signal.sigwait(ends)
    runtime.sd_notify("STOPPING=1")
    logger.info("send-queue-server stopping, once the requests in hand have their answers")
    for worker in workers:
        worker.stop()
    end = time.monotonic() + SHUTDOWN_LIMIT + 1
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    logger.info("send-queue-server stopped")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def inherited() -> list[socket.socket]:
    """The listening sockets that systemd passes on, as sd_listen_fds(3) describes it; [] without any.

    So several processes can serve one port, and a restart refuses no connection.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=3 + number) for number in range(int(os.environ["LISTEN_FDS"]))]
    for listening in sockets:
        # The processes share this flag. Python takes the socket for a blocking one, and dup() would make it that for
        # a moment, in which the others' accept() could wait for a connection that has gone to somebody else.
        listening.setblocking(False)
    return sockets


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
    threads = runtime.env_int("SEND_QUEUE_THREADS", THREADS, highest=64)
    app = make_app(db.RetryingConnection(db.url("icloud")), token)
    try:
        sockets = inherited() or [bound(host, port)]
    except OSError as error:
        raise runtime.ConfigError(
            f"cannot listen on {host}:{port}: {error}; set SEND_QUEUE_HOST and SEND_QUEUE_PORT to a free address"
        ) from None
    serve(app, sockets, threads)
    return 0


if __name__ == "__main__":
    runtime.run_main(main)
