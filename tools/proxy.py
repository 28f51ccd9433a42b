"""Proxy HTTP or PostgreSQL's protocol, and call a function twice in each exchange.

Used by test_faults.py and chaos.py. A proxy parses only the ends of requests and responses. It calls
`on_exchange(moment, what)` `before` it forwards the request, and `after` it has received the whole response but not
forwarded it. The function may wait or kill a process. If it returns False, the proxy cuts the connection at once.
Example:

    between = Http(("127.0.0.1", 3201), lambda moment, what: moment == "before")  # loses each response
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
OnExchange = Callable[[Moment, str], bool]
Address = tuple[str, int] | str  # TCP, or the path of a Unix socket
Stream = Any  # a buffered reader over a socket
ENCRYPTION_REQUESTS = (80877103, 80877104)  # SSLRequest, GSSENCRequest
CREDENTIALS_WANTED = (3, 5, 10, 11)  # types of an Authentication message after which the client sends its own


class Cut(Exception):
    """The connection has to end now."""


class Proxy:
    """Listen on a free port of 127.0.0.1, and forward each connection to `target`."""

    def __init__(self, target: Address, on_exchange: OnExchange) -> None:
        self.target = target
        self.on_exchange = on_exchange
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
        # Ignore these errors: killed processes and cut connections are the purpose of the proxies.
        with (
            contextlib.suppress(OSError, Cut, EOFError),
            client,
            self._connect() as server,
            client.makefile("rb") as requests,
            server.makefile("rb") as responses,
        ):
            self._talk(client, server, requests, responses)

    def _connect(self) -> socket.socket:
        if isinstance(self.target, str):
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self.target)
            except OSError:  # PostgreSQL was killed
                server.close()
                raise
            return server
        return socket.create_connection(self.target)

    def _talk(self, client: socket.socket, server: socket.socket, requests: Stream, responses: Stream) -> None:
        raise NotImplementedError

    def _at(self, moment: Moment, what: str) -> None:
        if not self.on_exchange(moment, what):
            raise Cut


class Http(Proxy):
    """Proxy HTTP. An exchange is a request, named `POST /path`, with its response."""

    def _talk(self, client: socket.socket, server: socket.socket, requests: Stream, responses: Stream) -> None:
        while True:
            request = _http_message(requests)
            what = " ".join(request.split(b" ", 2)[i].decode() for i in range(2))
            self._at("before", what)
            server.sendall(request)
            response = _http_message(responses)
            self._at("after", what)
            client.sendall(response)


class Postgres(Proxy):
    """Proxy PostgreSQL. An exchange is a statement with its result, or the start of a session, named `connect`."""

    def _talk(self, client: socket.socket, server: socket.socket, requests: Stream, responses: Stream) -> None:
        start = _startup(client, requests)
        self._at("before", "connect")
        server.sendall(start)
        response = _session(client, server, requests, responses)
        self._at("after", "connect")
        client.sendall(response)
        while True:
            kind, message = _message(requests)
            if kind != b"Q":  # Terminate
                server.sendall(message)
                return
            what = " ".join(message[5:-1].decode().split())
            self._at("before", what)
            server.sendall(message)
            response = _until_ready(responses)
            self._at("after", what)
            client.sendall(response)


def _http_message(stream: Stream) -> bytes:
    """Read a request or response: the head, and Content-Length bytes of body."""
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


def _startup(client: socket.socket, requests: Stream) -> bytes:
    """Read the StartupMessage; decline a request for encryption before it."""
    while True:
        head = _exactly(requests, 8)
        length, code = struct.unpack("!II", head)
        if code not in ENCRYPTION_REQUESTS:
            return head + _exactly(requests, length - 8)
        client.sendall(b"N")


def _session(client: socket.socket, server: socket.socket, requests: Stream, responses: Stream) -> bytes:
    """Forward credentials if the server asks for them; return the messages up to ReadyForQuery."""
    kept = b""
    while True:
        kind, message = _message(responses)
        kept += message
        if kind == b"R" and struct.unpack("!I", message[5:9])[0] in CREDENTIALS_WANTED:
            client.sendall(kept)
            kept = b""
            server.sendall(_message(requests)[1])
        elif kind in (b"Z", b"E"):
            return kept


def _message(stream: Stream) -> tuple[bytes, bytes]:
    head = _exactly(stream, 5)
    kind, length = struct.unpack("!cI", head)
    return kind, head + _exactly(stream, length - 4)


def _until_ready(stream: Stream) -> bytes:
    """Return the messages up to ReadyForQuery, or up to a FATAL error, which is the last message of a session."""
    kept = b""
    while True:
        kind, message = _message(stream)
        kept += message
        if kind == b"Z" or (kind == b"E" and b"SFATAL\0" in message):
            return kept


def behind(url: str) -> Address:
    """Return the address of the PostgreSQL of `url`."""
    parts = psycopg2.extensions.parse_dsn(url)
    host, port = parts.get("host") or "localhost", int(parts.get("port") or 5432)
    return str(Path(host) / f".s.PGSQL.{port}") if host.startswith("/") else (host, port)


def through(url: str, proxy: Postgres) -> str:
    """Return `url` with the proxy's address."""
    return psycopg2.extensions.make_dsn(url, host="127.0.0.1", port=proxy.port, sslmode="disable", gssencmode="disable")
