"""Run an HTTP server on waitress, and check bearer tokens, decode bodies and respond to errors in JSON.

Imported by each server script; touches no table. Example:

    app = serving.make_app("QUINN_DB_URL")
    sys.exit(serving.serve("outreach-server", app, [serving.listen("127.0.0.1", 3030)], threads=4))
"""

import copy
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

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
# The server reads a body of up to this size completely before it responds 413. If it closed the connection earlier, the
# kernel would reset it, and the client would see the reset instead of the 413.
READ_LIMIT = 1024 * 1024  # bytes
UPLOAD_TIMEOUT = 300  # seconds to send a whole upload
HEADER_LIMIT = 16 * 1024  # bytes; many times a bearer token and the headers that a proxy adds
THREADS = 4  # if one client's statement waits for a lock, three threads remain for the others
CONNECTION_LIMIT = 1000  # sockets; new connections above it wait in the listening socket
FILES_PER_CONNECTION = 3  # descriptors: the socket, a body in a file, a large response in a file
# If a response has fewer bytes, waitress' main thread sends it, not the worker thread. With waitress' default of 1, the
# worker sends head and body separately and waits for the GIL after each. Then 64 connections get 0.4 times as many
# responses per second.
SEND_BYTES = 18_000
MAX_UNSENT_BYTES = 1024 * 1024  # of pipelined responses; above it, the server ignores the client's further requests
CLIENT_TIMEOUT = 20  # seconds to send a whole request, to begin the next request, and to read a response
CLIENT_TIMEOUT_WHEN_FULL = 2  # seconds; at the connection limit, slow clients would block the others
CHECK_INTERVAL = 1  # seconds between two checks of the client time-outs
WARNING_INTERVAL = 60  # seconds between two "connection limit reached" log lines
SHUTDOWN_TIMEOUT = 8  # seconds for running requests; the whole shutdown should take at most 10
SHUTDOWN_SILENCE = 1  # seconds; a busy client sends a request within them, and gets `Connection: close`
RETRY_AFTER = "5"  # seconds; the Retry-After header while the database is unavailable

BEARER = re.compile(r"Bearer +([!-~]+) *", re.IGNORECASE)

T = TypeVar("T")
Data = dict[str, Any]
Application = Callable[..., Any]  # as WSGI has it
logger = logging.getLogger(__name__)


# --- waitress: overrides, the loop, shutdown -------------------------------------------------------------------------


class Upload(NamedTuple):
    """Paths to which a request may send a body of less than `limit` bytes, if `is_allowed` says so of its headers.

    `is_allowed` gets the headers by their names in capitals, with `_` for `-`. It must not wait for anything.
    """

    paths: Sequence[str]
    limit: int
    is_allowed: Callable[[Mapping[str, str]], bool]


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # waitress has no type hints
    """Record when a request began, and work around two bugs of waitress.

    1. If urlsplit() refuses the URI, such as `http://[`, waitress closes the connection without a response.
    2. If a request without a body asks for `100 Continue`, waitress waits for its body.
    Remove this class when waitress limits the time of a request and has fixed both.
    """

    adj: Any  # waitress' settings of the server

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.time()
        self.is_upload = False

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise waitress.parser.ParsingError("Bad URI") from None
        finally:
            if self.body_rcv is None:
                self.expect_continue = False
        # Who sends it is checked before the body is read, so that nobody else can fill the disk.
        for upload in self.adj.uploads:
            if self.path in upload.paths and upload.is_allowed(self.headers):
                self.adj = copy.copy(self.adj)
                self.adj.max_request_body_size = upload.limit
                self.is_upload = True


class Task(waitress.task.WSGITask):  # type: ignore[misc]  # waitress has no type hints
    """Send `Connection: close` when the server stops; the client then connects to another process.

    Send it also to a client that sends requests and reads no responses: the unsent responses would fill the memory.
    Remove this class when waitress shuts down gracefully, and limits unsent responses without blocking a thread.
    """

    def build_response_header(self) -> bytes:
        channel = self.channel
        channel.last_activity = time.time()  # CLIENT_TIMEOUT for reading the response starts here
        if not channel.server.accepting or channel.total_outbufs_len > MAX_UNSENT_BYTES:
            self.request.headers["CONNECTION"] = "close"
        return bytes(super().build_response_header())


class ErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]  # waitress has no type hints
    """Respond in JSON to a malformed request, and with 400 to an unknown transfer encoding.

    waitress responds in plain text, and with 501 to an unknown encoding. Remove this class when waitress has a setting
    for both.
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
    """Use the classes above, and work around two busy loops of waitress."""

    parser_class = Parser
    task_class = Task
    error_task_class = ErrorTask

    def handle_write(self) -> None:
        """Send a short response also while the client's next, pipelined request runs.

        waitress keeps the response back, although its writable() reports it as ready: poll() then returns at once, in
        a busy loop. Remove this method when writable() and handle_write() of waitress agree.
        """
        if self.requests:
            self._flush_exception(self._flush_some_if_lockable)
        super().handle_write()

    def handle_expt(self) -> None:
        """Close a connection that has urgent data: poll() would report it in a busy loop.

        Remove this method when waitress reads urgent data, or closes the connection itself.
        """
        self.handle_close()


class Server:
    """Run waitress on listening sockets: one thread reads and sends, `threads` others run complete requests.

    So a slow client occupies a socket, but no thread.
    """

    def __init__(
        self, app: Application, sockets: Sequence[socket.socket], threads: int, uploads: Sequence[Upload] = ()
    ) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # If no descriptor is left for accept(), poll() reports the new connection in a busy loop.
        self.connection_limit = min(CONNECTION_LIMIT, descriptors // FILES_PER_CONNECTION)
        self.map: dict[int, Any] = {}  # waitress' sockets, by descriptor
        waitress.create_server(
            app,
            map=self.map,
            sockets=sockets,
            threads=threads,
            max_request_body_size=READ_LIMIT,
            max_request_header_size=HEADER_LIMIT,
            inbuf_overflow=BODY_LIMIT,  # a longer body goes to a file until the response, 413
            connection_limit=self.connection_limit,
            send_bytes=SEND_BYTES,
            ident=None,
        )
        self.servers = [entry for entry in self.map.values() if isinstance(entry, waitress.server.BaseWSGIServer)]
        for server in self.servers:
            server.channel_class = Channel
            server.adj.uploads = uploads  # for Parser, to which waitress passes nothing else
        self.stopping = False
        self.next_warning = 0.0  # time.monotonic()

    def run(self) -> None:
        """Serve until stop() is called, or until waitress closes a listening socket, as it does after an error."""
        next_check = 0.0
        while not self.stopping and all(server.accepting for server in self.servers):
            self._turn(timeout=CHECK_INTERVAL)
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + CHECK_INTERVAL
                self._close_late()

    def stop(self) -> None:
        """Make run() return. Call this from a signal handler or another thread."""
        self.stopping = True
        self.servers[0].pull_trigger()

    def drain(self) -> None:
        """Accept no connection, finish the running requests, and close each connection that stays idle after them.

        If systemd owns the listening socket, new connections wait in it for the next process.
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
        """End the threads and close all sockets. Call this if the process continues after the server has stopped."""
        self.servers[0].task_dispatcher.shutdown()
        waitress.wasyncore.close_all(self.map)

    def _turn(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for sockets that are ready; read and write them."""
        # poll(), because select() fails above 1,024 descriptors
        waitress.wasyncore.loop(timeout=timeout, use_poll=True, map=self.map, count=1)

    def _channels(self) -> list[Channel]:
        return [channel for server in self.servers for channel in server.active_channels.values()]

    def _close_late(self) -> None:
        """Close each connection whose client is late: with a whole request, with its next request, or in reading.

        waitress' own check covers only the next request.
        """
        full = len(self.map) >= self.connection_limit
        timeout = CLIENT_TIMEOUT_WHEN_FULL if full else CLIENT_TIMEOUT  # of all but an upload
        if full and time.monotonic() >= self.next_warning:
            self.next_warning = time.monotonic() + WARNING_INTERVAL
            logger.warning(
                "connection limit reached connections=%d: new ones wait, and late ones are closed after %s s",
                self.connection_limit,
                timeout,
            )
        for channel in self._channels():
            since = channel.request.began if channel.request else channel.last_activity
            is_upload = channel.request is not None and channel.request.is_upload
            if time.time() - since > (UPLOAD_TIMEOUT if is_upload else timeout) and not channel.requests:
                channel.handle_close()


def serve(
    name: str, app: Application, sockets: Sequence[socket.socket], threads: int, uploads: Sequence[Upload] = ()
) -> int:
    """Serve on sockets that listen until SIGTERM or SIGINT, then end within 10 s; return the exit status."""
    logging.getLogger("waitress").addFilter(_filter_waitress)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns whenever a request waits for a thread
    server = Server(app, sockets, threads, uploads)
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
        logger.critical("%s lost a listening socket; it stops, for systemd to restart it", name)
    runtime.sd_notify("STOPPING=1")
    logger.info("%s stopping after the running requests", name)
    server.drain()
    logger.info("%s stopped", name)
    return 0 if server.stopping else 1


def _filter_waitress(record: logging.LogRecord) -> bool:
    """Remove the text of an exception, which may quote a message. Drop the lines that Server logs less often itself."""
    if record.exc_info and record.exc_info[1]:
        error = record.exc_info[1]
        record.msg = f"{record.getMessage()} error={type(error).__name__}\n{frames(error)}"
        record.args, record.exc_info = (), None
    return not record.getMessage().startswith("total open connections")


def frames(error: BaseException) -> str:
    """Return the stack of an exception without its text."""
    return "".join(traceback.format_tb(error.__traceback__))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host` and `port`. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def systemd_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd passes to this process (sd_listen_fds(3)); [] if there are none.

    With them, several processes can serve one port, and a restart refuses no connection.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=3 + number) for number in range(int(os.environ["LISTEN_FDS"]))]
    for listening in sockets:
        # All processes share this flag. Python assumes a blocking socket, and its dup() would clear the flag for a
        # moment. Then another process could block in accept() after a third one has taken the connection.
        listening.setblocking(False)
    return sockets


def open_sockets(host: str, port: int, variables: str) -> list[socket.socket]:
    """Return systemd's sockets, else one that listens. Raises runtime.ConfigError, which names the `variables`."""
    try:
        return systemd_sockets() or [listen(host, port)]
    except OSError as error:
        raise runtime.ConfigError(
            f"cannot listen on {host}:{port}: {error}; set {variables} to a free address"
        ) from None


# --- an application: tokens, bodies, errors ---------------------------------------------------------------------------


def make_app(url_variable: str) -> bottle.Bottle:
    """Make an application whose endpoints return data, and whose responses are all JSON.

    `url_variable`: the setting that the log names if the database is unavailable.
    """
    app = bottle.Bottle()
    app.catchall = False  # bottle would log an exception's text; _filter_waitress() removes it from waitress' log
    app.install(functools.partial(_handle_errors, url_variable=url_variable))
    app.default_error_handler = _json_error
    return app


def bearer_token() -> str:
    """Return the request's bearer token; "" if it is missing or malformed."""
    return _bearer_token(request.environ.get("HTTP_AUTHORIZATION", ""))


def _bearer_token(authorization: str) -> str:
    match = BEARER.fullmatch(authorization)
    return match[1] if match else ""


def _is_token(authorization: str, expected: str) -> bool:
    return hmac.compare_digest(_bearer_token(authorization).encode(), expected.encode())


def has_token(expected: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request's headers, by their names in capitals, have this bearer token."""
    return _is_token(headers.get("AUTHORIZATION", ""), expected)


def require_token(expected: str) -> None:
    """Abort with 401 if the request's bearer token is not `expected`."""
    if not _is_token(request.environ.get("HTTP_AUTHORIZATION", ""), expected):
        abort_unauthorized()


def read_body() -> bytes:
    """Return the request's body. Abort with 413 if it is larger than BODY_LIMIT."""
    length = max(request.content_length, 0)
    if length > BODY_LIMIT:
        abort(413, f"the body is larger than {BODY_LIMIT} bytes")
    return bytes(request.environ["wsgi.input"].read(length))


def decode_body(body: bytes | str, kind: type[T]) -> T:
    """Decode `body` as a `kind`. Abort with 400 if that fails, and name the field.

    The JSON parser is the standard library's, because it accepts a lone surrogate: a later check can name the field.
    """
    try:
        return msgspec.convert(json.loads(body), kind)
    except msgspec.ValidationError as error:
        abort(400, str(error))
    except (ValueError, RecursionError):
        abort(400, "the body is not JSON in UTF-8")


def abort(status: int, sentence: str, data: Data | None = None, **headers: str) -> NoReturn:
    """Respond with an error: a sentence for a person, and in `data` the facts that a program needs."""
    raise bottle.HTTPResponse(_error(sentence, data), status, Content_Type="application/json", **headers)


def abort_unauthorized() -> NoReturn:
    abort(401, "the bearer token is missing or not valid here", WWW_Authenticate="Bearer")


def _error(sentence: str, data: Data | None = None) -> bytes:
    content = {"success": False, "error": sentence}
    return msgspec.json.encode({**content, "data": data} if data else content)


def _handle_errors(endpoint: Callable[..., object], url_variable: str) -> Callable[..., bytes | bottle.HTTPResponse]:
    """Wrap an endpoint: respond with its data as JSON, or with its own response; log an exception and say what failed.

    The log gets only the kind of an exception, because PostgreSQL's texts quote the values of the statement.
    """

    def handle(**arguments: str) -> bytes | bottle.HTTPResponse:
        try:
            if request.method == "HEAD":  # bottle would run the GET endpoint and discard its data
                abort(405, "HEAD is not allowed here", Allow="GET")
            data = endpoint(**arguments)
        except bottle.HTTPResponse as refusal:
            level = logging.WARNING if refusal.status_code in (401, 409) else logging.INFO
            hint = "; compare its token with the tokens that this server knows" if refusal.status_code == 401 else ""
            logger.log(level, "request refused status=%d request=%r%s", refusal.status_code, _where(), hint)
            raise
        except db.DatabaseUnavailable as error:
            hint = f"; check that PostgreSQL runs, and check {url_variable}"
            logger.error("database unavailable sqlstate=%r request=%r%s", str(error), _where(), hint)
            abort(503, "the database cannot be reached; try again soon", Retry_After=RETRY_AFTER)
        except psycopg2.Error as error:
            _abort_statement(error)
        except Exception as error:  # noqa: BLE001  # a bug must end as a 500 in JSON, and its text must not be logged
            logger.error("endpoint failed error=%s request=%r\n%s", type(error).__name__, _where(), frames(error))
            abort(500, "the server failed; its log names the error")
        if isinstance(data, bottle.HTTPResponse):
            return data
        response.content_type = "application/json"
        return msgspec.json.encode({"success": True, "data": data})

    return handle


def _abort_statement(error: psycopg2.Error) -> NoReturn:
    """Respond to a failed statement: 503 if tables, columns or privileges are missing, else 500."""
    kind, code = f"{type(error).__name__} {error.pgcode}", error.pgcode or ""
    hint = "; run `python db.py migrate`" if code.startswith("42") else ""
    hint = "; GRANT the tables' owner to this role" if code == "42501" else hint
    logger.error("statement failed error=%r request=%r%s", kind, _where(), hint)
    if hint:
        # 503, not 500: the request is valid, and succeeds after the operator has fixed the database.
        abort(503, "the database is not ready for this server; its log says what to do", Retry_After=RETRY_AFTER)
    abort(500, "the database refused the statement; the server's log names the error")


def _where() -> str:
    """Return the method and the route for the log. The path itself may contain anything."""
    return f"{request.method} {request.environ['bottle.route'].rule}"


def _json_error(error: bottle.HTTPError) -> bytes:
    """Return the body for bottle's own errors, 404 and 405. bottle has already set the headers of `response`."""
    response.content_type = "application/json"
    if error.status_code == 405:
        # bottle lists HEAD, but _handle_errors() refuses it.
        response.set_header("Allow", error.get_header("Allow").replace(",HEAD", ""))
    sentences = {404: "there is nothing at this path", 405: "this method is not allowed here"}
    return _error(sentences.get(error.status_code, str(error.body)))
