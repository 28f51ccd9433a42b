"""Generate load on an HTTP server: keep-alive connections over raw sockets, the same for every contender.

Used by the other files in bench/. `Load` sends the next request after each response, from several processes. `paced`
sends at fixed intervals, from the calling process. This client needs about 20 microseconds for a request, so two
processes can load several servers. Example:

    load = Load(processes=2); load.run(port, [request("GET", "/healthz", "token")], connections=16, seconds=1)
"""

import heapq
import itertools
import multiprocessing
import multiprocessing.connection
import re
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
RESPONSE_TIMEOUT = 30  # seconds; a server that needs longer has failed


class Sample(NamedTuple):
    """The result of a measurement: requests per second, responses other than 200, and the seconds of each response."""

    rate: float
    errors: int
    latencies: list[float]


class Connection:
    """A keep-alive connection, with the time of its last request and the part of the response that has arrived."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=RESPONSE_TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""
        self.sent_at = 0.0

    def send(self, message: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.socket.sendall(message)

    def receive(self) -> tuple[int, bytes]:
        """Read once; return the status and the body if the response is complete, else 0 and b"".

        Raises ConnectionError if the server has closed the connection.
        """
        piece = self.socket.recv(65_536)
        if not piece:
            raise ConnectionError("the server closed a connection")
        self.received += piece
        head, separator, body = self.received.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        if not separator or length is None or len(body) < int(length[1]):
            return 0, b""
        self.received = b""
        return int(head[9:12]), body

    def exchange(self, message: bytes) -> tuple[int, bytes]:
        """Send a request and wait for its response; return the status and the body."""
        self.send(message)
        while not (response := self.receive())[0]:
            pass
        return response

    def close(self) -> None:
        self.socket.close()


def request(method: str, path: str, token: str, body: bytes = b"") -> bytes:
    """Return the bytes of one HTTP request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def hammer(connections: Sequence[Connection], requests: Sequence[bytes], seconds: float) -> Sample:
    """Send the next request on each connection after its response, until the time or `requests` are used up.

    Repeats a single request; sends several requests once each. Waits for at least one response.
    """
    remaining = iter(requests) if len(requests) > 1 else itertools.repeat(requests[0])
    by_descriptor = {connection.socket.fileno(): connection for connection in connections}
    poll = select.epoll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.EPOLLIN)
    errors = 0
    latencies: list[float] = []
    start = time.perf_counter()
    end = start + seconds
    busy = {descriptor for descriptor, connection in by_descriptor.items() if _send_next(connection, remaining)}
    while busy and ((now := time.perf_counter()) < end or not latencies):
        for descriptor, _ in poll.poll(max(0.01, end - now)):
            connection = by_descriptor[descriptor]
            status, _ = connection.receive()
            if status:
                errors += status != 200
                latencies.append(time.perf_counter() - connection.sent_at)
                if not _send_next(connection, remaining):
                    busy.discard(descriptor)
    spent = time.perf_counter() - start
    poll.close()
    return Sample(len(latencies) / spent, errors, latencies)


def _send_next(connection: Connection, remaining: Iterator[bytes]) -> bool:
    """Send the next request; return False if there is none."""
    message = next(remaining, None)
    if message is None:
        return False
    connection.send(message)
    return True


def paced(connections: Sequence[Connection], requests: Sequence[bytes], interval: float, seconds: float) -> Sample:
    """Send the connection's own request of `requests` every `interval` seconds, spread over the interval.

    If a response is late, its connection sends the next request after it. Waits for every response: the connections
    can be used again.
    """
    by_descriptor = {connection.socket.fileno(): number for number, connection in enumerate(connections)}
    poll = select.epoll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.EPOLLIN)
    errors, latencies = 0, []
    start = time.perf_counter()
    end = start + seconds
    due = [(start + interval * number / len(connections), number) for number in range(len(connections))]
    sent_due: dict[int, float] = {}  # for each request without a response: its connection, and when it was due
    while due or sent_due:
        while due and due[0][0] <= time.perf_counter():
            moment, number = heapq.heappop(due)
            sent_due[number] = moment
            connections[number].send(requests[number])
        timeout = max(0.0, due[0][0] - time.perf_counter()) if due else RESPONSE_TIMEOUT
        for descriptor, _ in poll.poll(timeout):
            number = by_descriptor[descriptor]
            status, _ = connections[number].receive()
            if status:
                errors += status != 200
                latencies.append(time.perf_counter() - connections[number].sent_at)
                next_due = max(sent_due.pop(number) + interval, time.perf_counter())
                if next_due < end:
                    heapq.heappush(due, (next_due, number))
    poll.close()
    return Sample(len(latencies) / seconds, errors, latencies)


class Load:
    """Run client processes for the whole benchmark. Create it before any thread or connection, because it forks."""

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes: list[multiprocessing.connection.Connection] = []
        self.processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            process = context.Process(target=_obey, args=(theirs, self.pipes), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)

    def run(self, port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Sample:
        """Call hammer() in all processes at once, each with its share of the connections and requests.

        The measurement starts when every process has its connections. Raises the exception of a process.
        """
        pipes = self.pipes[:connections]
        for number, pipe in enumerate(pipes):
            share = requests if len(requests) == 1 else requests[number :: len(pipes)]
            own = connections // len(pipes) + (number < connections % len(pipes))
            pipe.send((port, own, share, seconds))
        _received(pipes)
        for pipe in pipes:
            pipe.send("start")
        samples = _received(pipes)
        return Sample(
            sum(sample.rate for sample in samples),
            sum(sample.errors for sample in samples),
            [latency for sample in samples for latency in sample.latencies],
        )

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # ends the process' loop
        for process in self.processes:
            process.join()


def _received(pipes: Sequence[multiprocessing.connection.Connection]) -> list[Any]:
    """Return the next message of each process. Raise the first message that is an exception."""
    messages = [pipe.recv() for pipe in pipes]
    for message in messages:
        if isinstance(message, Exception):
            raise message
    return messages


def _obey(
    pipe: multiprocessing.connection.Connection, inherited: Sequence[multiprocessing.connection.Connection]
) -> None:
    """Run the measurements that Load.run() requests, until the pipe is closed. Send two messages: ready, the sample."""
    for other in inherited:
        other.close()  # includes the other end of `pipe`; open, it would prevent EOFError
    while True:
        try:
            port, number, requests, seconds = pipe.recv()
        except EOFError:
            return
        connections: list[Connection] = []
        try:
            connections = [Connection(port) for _ in range(number)]
            pipe.send("ready")
            pipe.recv()
            pipe.send(hammer(connections, requests, seconds))
        except Exception as error:  # noqa: BLE001  # Load.run() raises it
            pipe.send(error)
        for connection in connections:
            connection.close()
