"""The benchmark's load generator: keep-alive connections over raw sockets, driven from several processes.

Used by bench.py, the same for every contender. A client in plain Python costs about 20 microseconds a request,
so that it has the time to keep several servers busy. Example:

    load = Load(processes=2); load.run(port, [poll] * 8)
"""

import multiprocessing
import re
import select
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

LEAD = 0.2  # seconds from the order to the start: enough for every process to be connected

LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Sample(NamedTuple):
    """What was measured: requests a second, answers other than 200, and each answer's seconds."""

    rate: float
    errors: int
    latencies: list[float]


class Connection:
    """One keep-alive connection: what it sent when, and the answer as far as it has come."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answer = b""
        self.sent_at = 0.0

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> int:
        """Read what has come; the status once the answer is complete, else 0. Raises ConnectionError."""
        return self._read()[0]

    def body(self) -> bytes:
        """Read what has come; the body of a complete 200, else nothing. Raises ConnectionError."""
        status, body = self._read()
        if status not in (0, 200):
            raise ConnectionError(f"HTTP {status}")
        return body

    def _read(self) -> tuple[int, bytes]:
        piece = self.socket.recv(65_536)
        if not piece:
            raise ConnectionError("the server closed a connection")
        self.answer += piece
        head, separator, body = self.answer.partition(b"\r\n\r\n")
        if not separator:
            return 0, b""
        length = LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return 0, b""
        self.answer = b""
        return int(head[9:12]), body


def request(method: str, path: str, token: str, body: bytes = b"") -> bytes:
    """The bytes of one request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def hammer(port: int, connections: int, requests: Sequence[bytes], begin: float, seconds: float) -> Sample:
    """Each connection sends its next request as soon as it has an answer, until time or `requests` are over.

    One request in `requests` is repeated for ever; of several, each is sent once.
    """
    left = iter(requests) if len(requests) > 1 else iter(lambda: requests[0], None)
    poll = select.epoll()
    opened = {}
    for _ in range(connections):
        connection = Connection(port)
        opened[connection.socket.fileno()] = connection
        poll.register(connection.socket, select.EPOLLIN)
    time.sleep(max(0.0, begin - time.monotonic()))
    errors, latencies = 0, []
    start = time.perf_counter()
    end = start + seconds
    idle = {fd for fd, connection in opened.items() if not _next(connection, left)}
    while (now := time.perf_counter()) < end and len(idle) < connections:
        for fd, _ in poll.poll(end - now):
            status = opened[fd].receive()
            if status:
                errors += status != 200
                latencies.append(time.perf_counter() - opened[fd].sent_at)
                if not _next(opened[fd], left):
                    idle.add(fd)
    spent = time.perf_counter() - start
    for connection in opened.values():
        connection.socket.close()
    poll.close()
    return Sample(len(latencies) / spent, errors, latencies)


def _next(connection: Connection, left: "object") -> bool:
    message = next(left, None)  # type: ignore[call-overload]
    if message:
        connection.send(message)
    return bool(message)


def tick(port: int, requests: Sequence[bytes], begin: float, seconds: float) -> Sample:
    """A connection for each of `requests` sends it once a second, spread over the second, like so many devices."""
    connections = [Connection(port) for _ in requests]
    errors, latencies = 0, []
    turns = int(seconds) * len(requests)
    for turn in range(turns):
        connection, message = connections[turn % len(requests)], requests[turn % len(requests)]
        time.sleep(max(0.0, begin + turn / len(requests) - time.monotonic()))
        connection.send(message)
        while not (status := connection.receive()):
            pass
        errors += status != 200
        latencies.append(time.perf_counter() - connection.sent_at)
    for connection in connections:
        connection.socket.close()
    return Sample(turns / seconds, errors, latencies)


class Load:
    """A few client processes, kept for the whole run."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def run(self, port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Sample:
        """hammer() from every process at once, with its share of the connections and of the requests."""
        shares = [requests[number :: self.processes] or requests for number in range(self.processes)]
        if len(requests) == 1:
            shares = [requests] * self.processes
        begin = time.monotonic() + LEAD + len(requests) / 100_000  # the requests travel to the processes first
        each = connections // self.processes
        waiting = [self.pool.submit(hammer, port, each, share, begin, seconds) for share in shares]
        samples = [future.result() for future in waiting]
        return Sample(
            sum(sample.rate for sample in samples),
            sum(sample.errors for sample in samples),
            [latency for sample in samples for latency in sample.latencies],
        )

    def devices(self, port: int, requests: Sequence[bytes], seconds: float) -> Sample:
        """tick() from one process."""
        return self.pool.submit(tick, port, requests, time.monotonic() + LEAD, seconds).result()

    def close(self) -> None:
        self.pool.shutdown()
