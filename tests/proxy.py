"""TCP proxies for the fault tests, which stop at each exchange of HTTP or of PostgreSQL's protocol.

Each understands just enough of what passes to know where a request and its answer end. At each of the two moments
of an exchange, `before` the request is passed on and `after` the whole answer has come and is held, it calls
`meddle(moment, what)`: that may wait, kill somebody, or return False, which cuts the connection there and then.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psycopg2.extensions

Moment = Literal["before", "after"]
Meddle = Callable[[Moment, str], bool]
Address = tuple[str, int] | str  # TCP, or the path of a Unix socket
Stream = Any  # a buffered reader over a socket
ENCRYPTION_REQUESTS = (80877103, 80877104)  # SSLRequest, GSSENCRequest
CREDENTIALS_WANTED = (3, 5, 10, 11)  # of an Authentication message: the client's turn


class Cut(Exception):
    """The connection is to be ended here."""


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes each connection on to `target`."""

    def __init__(self, target: Address, meddle: Meddle) -> None:
        self.target = target
        self.meddle = meddle
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # Whoever is killed, stopped or cut off at the other end is what these proxies are for.
        with (
            contextlib.suppress(OSError, Cut, EOFError),
            client,
            self._connect() as server,
            client.makefile("rb") as asked,
            server.makefile("rb") as answered,
        ):
            self._talk(client, server, asked, answered)

    def _connect(self) -> socket.socket:
        if isinstance(self.target, str):
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self.target)
            except OSError:  # PostgreSQL is down, as it should be now and then
                server.close()
                raise
            return server
        return socket.create_connection(self.target)

    def _talk(self, client: socket.socket, server: socket.socket, asked: Stream, answered: Stream) -> None:
        raise NotImplementedError

    def _at(self, moment: Moment, what: str) -> None:
        if not self.meddle(moment, what):
            raise Cut


class Http(Proxy):
    """An exchange is a request, `POST /path`, with its response."""

    def _talk(self, client: socket.socket, server: socket.socket, asked: Stream, answered: Stream) -> None:
        while True:
            request = _http_message(asked)
            what = " ".join(request.split(b" ", 2)[i].decode() for i in range(2))
            self._at("before", what)
            server.sendall(request)
            answer = _http_message(answered)
            self._at("after", what)
            client.sendall(answer)


class Postgres(Proxy):
    """An exchange is a statement with all that it returns; the start of a session, `connect`, is one as well."""

    def _talk(self, client: socket.socket, server: socket.socket, asked: Stream, answered: Stream) -> None:
        start = _startup(client, asked)
        self._at("before", "connect")
        server.sendall(start)
        answer = _session(client, server, asked, answered)
        self._at("after", "connect")
        client.sendall(answer)
        while True:
            kind, message = _message(asked)
            if kind != b"Q":  # Terminate
                server.sendall(message)
                return
            what = " ".join(message[5:-1].decode().split())
            self._at("before", what)
            server.sendall(message)
            answer = _until_ready(answered)
            self._at("after", what)
            client.sendall(answer)


def _http_message(stream: Stream) -> bytes:
    """A request or response with its head and as much body as its Content-Length says."""
    lines, length = [], 0
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    if not line:
        raise EOFError
    return b"".join([*lines, line, _exactly(stream, length)])


def _exactly(stream: Stream, length: int) -> bytes:
    found: bytes = stream.read(length)
    if len(found) < length:
        raise EOFError
    return found


def _startup(client: socket.socket, asked: Stream) -> bytes:
    """The StartupMessage; a wish for encryption before it is declined."""
    while True:
        head = _exactly(asked, 8)
        length, code = struct.unpack("!II", head)
        if code not in ENCRYPTION_REQUESTS:
            return head + _exactly(asked, length - 8)
        client.sendall(b"N")


def _session(client: socket.socket, server: socket.socket, asked: Stream, answered: Stream) -> bytes:
    """Pass credentials to and fro, if any are wanted; return what ends with ReadyForQuery."""
    kept = b""
    while True:
        kind, message = _message(answered)
        kept += message
        if kind == b"R" and struct.unpack("!I", message[5:9])[0] in CREDENTIALS_WANTED:
            client.sendall(kept)
            kept = b""
            server.sendall(_message(asked)[1])
        elif kind in (b"Z", b"E"):
            return kept


def _message(stream: Stream) -> tuple[bytes, bytes]:
    head = _exactly(stream, 5)
    kind, length = struct.unpack("!cI", head)
    return kind, head + _exactly(stream, length - 4)


def _until_ready(stream: Stream) -> bytes:
    """Messages up to ReadyForQuery. A FATAL one is the last of its session: it is passed on by itself."""
    kept = b""
    while True:
        kind, message = _message(stream)
        kept += message
        if kind == b"Z" or (kind == b"E" and b"SFATAL\0" in message):
            return kept


def behind(url: str) -> Address:
    """Where the PostgreSQL of `url` listens."""
    parts = psycopg2.extensions.parse_dsn(url)
    host, port = parts.get("host") or "localhost", int(parts.get("port") or 5432)
    return str(Path(host) / f".s.PGSQL.{port}") if host.startswith("/") else (host, port)


def through(url: str, proxy: Postgres) -> str:
    """`url` with the proxy in between."""
    return psycopg2.extensions.make_dsn(url, host="127.0.0.1", port=proxy.port, sslmode="disable", gssencmode="disable")
