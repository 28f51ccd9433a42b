"""What every HTTP server of ours shares: how waitress runs and ends, bearer tokens, bodies, errors as JSON.

Imported by the servers; touches no table. Example:

    app = serving.make_app("QUINN_DB_URL")
    sys.exit(serving.serve("outreach-server", app, [serving.listen("127.0.0.1", 3030)], threads=4))
"""

import functools
import hmac
import json
import logging
import os
import re
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import bottle
import msgspec
import psycopg2
import waitress
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore
from bottle import request, response

import db
import runtime

BODY_LIMIT = 64 * 1024  # bytes
# A body up to here is read to its end before it is refused. A connection that is closed over unread bytes is reset,
# and the client would see the reset in place of the 413.
READ_LIMIT = 1024 * 1024  # bytes
HEADER_LIMIT = 16 * 1024  # bytes; a bearer token and a proxy's additions fit many times over
THREADS = 4  # one client's statement that waits for a lock leaves three for the others
CONNECTION_LIMIT = 1000  # sockets; new connections above it wait in the listening socket
FILES_PER_CONNECTION = 3  # its socket, a body in a file, and as much again for large responses and all else
# Below so many bytes, waitress' main thread sends a response, and not the thread that made it. With waitress' default
# of 1 that thread sends head and body one by one, and waits for the interpreter's lock after each: 64 connections get
# 0.4 times as many polls answered.
SEND_BYTES = 18_000
MAX_UNSENT_BYTES = 1024 * 1024  # of responses to requests that a client sent at once; its further ones are dropped
CLIENT_TIMEOUT = 20  # seconds for a request to come whole, for the next one to begin, and for a response to be read
CLIENT_TIMEOUT_WHEN_FULL = 2  # seconds; at the connection limit, where slow clients would keep the others out
CHECK_INTERVAL = 1  # seconds between two checks of these
WARNING_INTERVAL = 60  # seconds between two log lines that say that the connection limit is reached
SHUTDOWN_TIMEOUT = 8  # seconds for the requests in hand, of the ten that systemd's stop should take at most
SHUTDOWN_SILENCE = 1  # seconds in which a busy client sends its next request, and is told to connect again
RETRY_AFTER = "5"  # seconds; how long a client is asked to wait for a database that is away

BEARER = re.compile(r"Bearer +([!-~]+) *", re.IGNORECASE)

T = TypeVar("T")
Data = dict[str, Any]
logger = logging.getLogger(__name__)


# --- waitress: overrides, a loop, and the end -------------------------------------------------------------------------


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # waitress has no type hints
    """Note when a request began, and fill two gaps; can go when waitress limits a request's time and has neither gap.

    waitress closes the connection without a response to a URI that urlsplit() refuses, such as `http://[`. And it
    waits for the body of a request that has none, but asks for `100 Continue`.
    """

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.time()

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise waitress.parser.ParsingError("Bad URI") from None
        finally:
            if self.body_rcv is None:
                self.expect_continue = False


class Task(waitress.task.WSGITask):  # type: ignore[misc]  # waitress has no type hints
    """Say `Connection: close` when the server stops, so that the client connects to the next process.

    Also to a client that sends requests and reads no responses: they would fill the memory. Can go when waitress ends
    gracefully, and limits what it keeps without holding a thread.
    """

    def build_response_header(self) -> bytes:
        channel = self.channel
        channel.last_activity = time.time()  # from here on its client has CLIENT_TIMEOUT to read the response
        if not channel.server.accepting or channel.total_outbufs_len > MAX_UNSENT_BYTES:
            self.request.headers["CONNECTION"] = "close"
        return bytes(super().build_response_header())


class ErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]  # waitress has no type hints
    """Respond in JSON to what is not HTTP, and with 400 to an odd encoding; can go when waitress has a setting for it.

    waitress responds in plain text, and with 501 to an encoding.
    """

    def execute(self) -> None:
        code, reason = self.request.error.code, self.request.error.reason
        if code == 501:
            code, reason = 400, "Bad Request"
        sentences = {
            413: "the body is too large",
            431: "the headers are too large",
            500: "the server failed; its log names the error",
        }
        body = _error(sentences.get(code, "this is not a valid HTTP request"))
        self.status = f"{code} {reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]  # waitress has no type hints
    parser_class = Parser
    task_class = Task
    error_task_class = ErrorTask

    def handle_write(self) -> None:
        """Send also a short response while a request that came with it runs.

        waitress holds it back, but asks poll() whether it could be sent: yes, at once, again and again. Can go when
        its writable() agrees with its handle_write().
        """
        if self.requests:
            self._flush_exception(self._flush_some_if_lockable)
        super().handle_write()

    def handle_expt(self) -> None:
        """Close a connection that has a byte of urgent data. poll() would report it again and again.

        Can go when waitress reads it, or closes the connection itself.
        """
        self.handle_close()


class Server:
    """waitress on listening sockets: one thread reads and sends, `threads` others run whole requests.

    So a slow client holds a socket and never a thread.
    """

    def __init__(self, app: bottle.Bottle, sockets: Sequence[socket.socket], threads: int) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # poll() reports a new connection again and again as long as there is no descriptor to accept it with.
        self.connection_limit = min(CONNECTION_LIMIT, descriptors // FILES_PER_CONNECTION)
        self.map: dict[int, Any] = {}  # waitress' sockets, by descriptor
        waitress.create_server(
            app,
            map=self.map,
            sockets=sockets,
            threads=threads,
            max_request_body_size=READ_LIMIT,
            max_request_header_size=HEADER_LIMIT,
            inbuf_overflow=BODY_LIMIT,  # a longer body waits in a file for its 413
            connection_limit=self.connection_limit,
            send_bytes=SEND_BYTES,
            ident=None,
        )
        self.servers = [entry for entry in self.map.values() if isinstance(entry, waitress.server.BaseWSGIServer)]
        for server in self.servers:
            server.channel_class = Channel
        self.stopping = False
        self.next_warning = 0.0  # as time.monotonic() has it

    def run(self) -> None:
        """Serve until stop() is called, or until waitress closes a listening socket, as it does after an error."""
        next_check = 0.0
        while not self.stopping and all(server.accepting for server in self.servers):
            self._turn(timeout=CHECK_INTERVAL)
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + CHECK_INTERVAL
                self._close_late()

    def stop(self) -> None:
        """Let run() return; from a signal handler or another thread."""
        self.stopping = True
        self.servers[0].pull_trigger()

    def drain(self) -> None:
        """Accept no more, finish the requests in hand, and close each connection that then stays silent.

        Where systemd holds the listening socket, new connections wait there for the next process.
        """
        for server in self.servers:
            waitress.wasyncore.dispatcher.close(server)  # the listening socket only
        end = time.monotonic() + SHUTDOWN_TIMEOUT
        began = time.time()
        while self._channels() and time.monotonic() < end:
            self._turn(timeout=0.05)
            for channel in self._channels():
                if not channel.requests and time.time() - max(began, channel.last_activity) > SHUTDOWN_SILENCE:
                    channel.handle_close()

    def close(self) -> None:
        """End the threads and close all sockets; for a server that its process outlives."""
        self.servers[0].task_dispatcher.shutdown()
        waitress.wasyncore.close_all(self.map)

    def _turn(self, timeout: float) -> None:
        """Wait for clients, `timeout` seconds at most, and read and send what they are ready for."""
        # poll(), since select() fails beyond 1,024 descriptors
        waitress.wasyncore.loop(timeout=timeout, use_poll=True, map=self.map, count=1)

    def _channels(self) -> list[Channel]:
        return [channel for server in self.servers for channel in server.active_channels.values()]

    def _close_late(self) -> None:
        """Close each connection that is late with the rest of its request, its next request, or reading its response.

        waitress' own check knows neither the first nor the last.
        """
        full = len(self.map) >= self.connection_limit
        timeout = CLIENT_TIMEOUT_WHEN_FULL if full else CLIENT_TIMEOUT
        if full and time.monotonic() >= self.next_warning:
            self.next_warning = time.monotonic() + WARNING_INTERVAL
            logger.warning(
                "connection limit reached connections=%d: new ones wait, and late ones are closed after %s s",
                self.connection_limit,
                timeout,
            )
        for channel in self._channels():
            since = channel.request.began if channel.request else channel.last_activity
            if time.time() - since > timeout and not channel.requests:
                channel.handle_close()


def serve(name: str, app: bottle.Bottle, sockets: Sequence[socket.socket], threads: int) -> int:
    """Serve on sockets that listen until SIGTERM or SIGINT, then end within 10 s; return the exit status."""
    logging.getLogger("waitress").addFilter(_filter_waitress)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns whenever a request waits for a thread
    server = Server(app, sockets, threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    for listening in sockets:
        logger.info(
            "%s listening port=%s threads=%d connections=%d",
            name, listening.getsockname()[1], threads, server.connection_limit,
        )  # fmt: skip
    runtime.sd_notify("READY=1")
    server.run()
    if not server.stopping:
        logger.critical("%s lost a listening socket, and stops to be started again", name)
    runtime.sd_notify("STOPPING=1")
    logger.info("%s stopping, once the requests in hand have their responses", name)
    server.drain()
    logger.info("%s stopped", name)
    return 0 if server.stopping else 1


def _filter_waitress(record: logging.LogRecord) -> bool:
    """Drop the text of an exception, which may quote a message, and what Server logs once in WARNING_INTERVAL."""
    if record.exc_info and record.exc_info[1]:
        error = record.exc_info[1]
        record.msg = f"{record.getMessage()} error={type(error).__name__}\n{_frames(error)}"
        record.args, record.exc_info = (), None
    return not record.getMessage().startswith("total open connections")


def _frames(error: BaseException) -> str:
    """Return where it was raised, a line each."""
    return "".join(traceback.format_tb(error.__traceback__))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def systemd_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd passes on, as sd_listen_fds(3) describes it; [] without any.

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


# --- an application: tokens, bodies, errors ---------------------------------------------------------------------------


def make_app(url_variable: str) -> bottle.Bottle:
    """Make an application whose endpoints return data, and whose every response is JSON.

    `url_variable`: the setting that the log names when the database is away.
    """
    app = bottle.Bottle()
    app.catchall = False  # bottle would log an exception's text; waitress' log goes through _filter_waitress()
    app.install(functools.partial(_handle_errors, url_variable=url_variable))
    app.default_error_handler = _json_error
    return app


def bearer_token() -> str:
    """Return the request's bearer token, "" when there is none or it is malformed."""
    match = BEARER.fullmatch(request.environ.get("HTTP_AUTHORIZATION", ""))
    return match[1] if match else ""


def require_token(expected: str) -> None:
    """Refuse a request whose bearer token is not the `expected` one."""
    if not hmac.compare_digest(bearer_token().encode(), expected.encode()):
        abort_unauthorized()


def read_body() -> bytes:
    """Return the request's body; a 413 if it is larger than BODY_LIMIT."""
    length = max(request.content_length, 0)
    if length > BODY_LIMIT:
        abort(413, f"the body is larger than {BODY_LIMIT} bytes")
    return bytes(request.environ["wsgi.input"].read(length))


def decode_body(body: bytes | str, kind: type[T]) -> T:
    """Decode `body` as a `kind`; a 400 that names the field otherwise.

    The standard library parses, since it passes a lone surrogate on: the field that has one can be named.
    """
    try:
        return msgspec.convert(json.loads(body), kind)
    except msgspec.ValidationError as error:
        abort(400, str(error))
    except (ValueError, RecursionError):
        abort(400, "the body is not JSON in UTF-8")


def abort(status: int, sentence: str, data: Data | None = None, **headers: str) -> NoReturn:
    """Respond with an error: a sentence that says what to do, and what a program has to know of it in `data`."""
    raise bottle.HTTPResponse(_error(sentence, data), status, Content_Type="application/json", **headers)


def abort_unauthorized() -> NoReturn:
    abort(401, "the bearer token is missing or not valid here", WWW_Authenticate="Bearer")


def _error(sentence: str, data: Data | None = None) -> bytes:
    content = {"success": False, "error": sentence}
    return msgspec.json.encode({**content, "data": data} if data else content)


def _handle_errors(endpoint: Callable[..., Data], url_variable: str) -> Callable[..., bytes]:
    """Wrap an endpoint: its data as JSON, and what it raises as an error's response and a log line.

    Of an error only its kind is logged: PostgreSQL's texts quote the values of the statement.
    """

    def handle(**arguments: str) -> bytes:
        try:
            if request.method == "HEAD":  # bottle would run the GET for it, and throw its data away
                abort(405, "HEAD is not allowed here", Allow="GET")
            data = endpoint(**arguments)
        except bottle.HTTPResponse as refusal:
            level = logging.WARNING if refusal.status_code in (401, 409) else logging.INFO
            hint = "; compare its token with those that this server knows" if refusal.status_code == 401 else ""
            logger.log(level, "request refused status=%d request=%r%s", refusal.status_code, _where(), hint)
            raise
        except db.DatabaseUnavailable as error:
            hint = f"; see that PostgreSQL runs, and {url_variable}"
            logger.error("database unavailable sqlstate=%r request=%r%s", str(error), _where(), hint)
            abort(503, "the database cannot be reached; try again soon", Retry_After=RETRY_AFTER)
        except psycopg2.Error as error:
            _abort_statement(error)
        except Exception as error:  # noqa: BLE001  # a bug must end as a 500 in JSON, and its text must not be logged
            logger.error("endpoint failed error=%s request=%r\n%s", type(error).__name__, _where(), _frames(error))
            abort(500, "the server failed; its log names the error")
        response.content_type = "application/json"
        return msgspec.json.encode({"success": True, "data": data})

    return handle


def _abort_statement(error: psycopg2.Error) -> NoReturn:
    """Respond to a statement that failed: 503 where the schema or its rights do not fit the server, else 500."""
    kind, code = f"{type(error).__name__} {error.pgcode}", error.pgcode or ""
    hint = "; run `python db.py migrate`" if code.startswith("42") else ""
    hint = "; GRANT the tables' owner to this role" if code == "42501" else hint
    logger.error("statement failed error=%r request=%r%s", kind, _where(), hint)
    if hint:
        # It is no judgement of the request: the same one will do once the operator has been there.
        abort(503, "the database is not ready for this server; its log says what to do", Retry_After=RETRY_AFTER)
    abort(500, "the database refused the statement; the server's log names the error")


def _where() -> str:
    """Return the request as a log may show it: its own path may have anything in it."""
    return f"{request.method} {request.environ['bottle.route'].rule}"


def _json_error(error: bottle.HTTPError) -> bytes:
    """Respond to bottle's own errors: no such path, another method. Its headers are in `response` already."""
    response.content_type = "application/json"
    if error.status_code == 405:
        # bottle lists the HEAD that _handle_errors() refuses.
        response.set_header("Allow", error.get_header("Allow").replace(",HEAD", ""))
    sentences = {404: "there is nothing at this path", 405: "this method is not allowed here"}
    return _error(sentences.get(error.status_code, str(error.body)))
