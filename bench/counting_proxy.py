"""Proxy PostgreSQL's Unix socket, and count statements and round trips.

Used by message_rows.py. It parses only the head of each message of the server: one byte for the type, and four for
the length. Example:

    with CountingProxy(url, directory) as proxy: psycopg2.connect(proxy.url); print(proxy.statements)
"""

import contextlib
import socket
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import psycopg2.extensions

SOCKET = ".s.PGSQL.5432"  # libpq's name for the socket of the default port


class CountingProxy:
    """Forward each connection, and count the server's messages by type."""

    def __init__(self, url: str, directory: Path) -> None:
        directory.mkdir()
        self.target = f"{psycopg2.extensions.parse_dsn(url)['host']}/{SOCKET}"
        self.url = urlsplit(url)._replace(query=urlencode({"host": str(directory)})).geturl()
        self.messages: Counter[int] = Counter()
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(directory / SOCKET))
        self.listening.listen()
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    @property
    def statements(self) -> int:
        return self.messages[ord("C")]  # CommandComplete

    @property
    def round_trips(self) -> int:
        return self.messages[ord("Z")]  # ReadyForQuery: the client may send its next request

    def __enter__(self) -> "CountingProxy":
        return self

    def __exit__(self, *_: object) -> None:
        """Return when every connection has ended."""
        self.listening.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listening.close()
        for thread in self.threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            for pump in (
                threading.Thread(target=_pass_on, args=(client, server)),
                threading.Thread(target=self._count, args=(server, client)),
            ):
                pump.start()
                self.threads.append(pump)

    def _count(self, server: socket.socket, client: socket.socket) -> None:
        """Forward the server's messages, and count them by type."""
        received = b""
        with server, client:
            while piece := server.recv(65_536):
                with contextlib.suppress(OSError):  # the client has closed; count the rest of its responses
                    client.sendall(piece)
                received += piece
                while len(received) >= 5 and len(received) > (length := int.from_bytes(received[1:5])):
                    self.messages[received[0]] += 1
                    received = received[length + 1 :]
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)  # wakes the other thread if the server closed first


def _pass_on(client: socket.socket, server: socket.socket) -> None:
    """Forward the client's messages. When the client closes, end the server's session."""
    with contextlib.suppress(OSError):
        while piece := client.recv(65_536):
            server.sendall(piece)
        server.shutdown(socket.SHUT_WR)
