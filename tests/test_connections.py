"""Check the server below HTTP: silent and pipelining clients, urgent data, and too many connections."""

import contextlib
import os
import resource
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import bottle
import pytest
import requests
from helpers import lock_waits
from testing import ROOT, SERVICE_TOKEN, Databases, Script, TestData, patient, wait_until

import db
import send_queue_server
import serving

QUICK = b"GET /quick HTTP/1.1\r\nHost: here\r\n\r\n"
SLOW, BIG = (QUICK.replace(b"/quick", path) for path in (b"/slow", b"/big"))
WORDS = "what an error quotes of a message"


class Small(serving.Server):
    """Serve a small application, and count how often the main thread waits for clients."""

    turns = 0

    def _turn(self, timeout: float) -> None:
        self.turns += 1
        super()._turn(timeout)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.servers[0].effective_port), timeout=10)

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.servers[0].effective_port}{path}", timeout=10)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    """A server with a client time-out of one second."""
    monkeypatch.setattr(serving, "CLIENT_TIMEOUT", 1)
    monkeypatch.setattr(serving, "CHECK_INTERVAL", 0.1)
    app = bottle.Bottle()
    app.route("/quick", callback=lambda: "quick")
    app.route("/slow", callback=slow)
    app.route("/big", callback=lambda: b"x" * 8_000_000)
    server = Small(app, [serving.listen("127.0.0.1", 0)], threads=4)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join()
    server.close()


def slow() -> str:
    time.sleep(1.5)  # what makes it slow
    return "slow"


def ends(connection: socket.socket) -> bool:
    """Say whether the server closes the connection before the socket's time-out."""
    try:
        return connection.recv(65_536) == b""
    except ConnectionResetError:
        return True


def test_incomplete_request_is_closed_after_timeout(small: Small) -> None:
    with small.connect() as silent, small.connect() as half, small.connect() as trickling, small.connect() as idle:
        half.sendall(QUICK[:-4])
        idle.sendall(QUICK)
        assert idle.recv(65_536).endswith(b"quick")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begin < 5:
                trickling.sendall(b"G")
                time.sleep(0.1)  # its pace
        assert 0.9 < time.monotonic() - begin < 4
        assert ends(silent)
        assert ends(half)
        assert ends(idle)
        assert time.monotonic() - begin < 4


def test_handler_may_outlast_client_timeout(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    server = small.servers[0]
    wake = server.pull_trigger

    def wake_and_dawdle() -> None:
        """Let the main thread check the connection before the worker thread has finished with it."""
        wake()
        time.sleep(0.3)

    monkeypatch.setattr(server, "pull_trigger", wake_and_dawdle)
    monkeypatch.setattr(serving, "CHECK_INTERVAL", 0)
    with small.connect() as connection:
        connection.sendall(SLOW)
        assert connection.recv(65_536).endswith(b"slow")
        connection.sendall(QUICK)
        assert connection.recv(65_536).endswith(b"quick")


def test_client_that_never_reads_is_closed(small: Small) -> None:
    with small.connect() as one, small.connect() as many:
        one.sendall(BIG)
        many.sendall(BIG * 3)
        wait_until(lambda: len(small.servers[0].active_channels) == 2)
        wait_until(lambda: not small.servers[0].active_channels, seconds=5)


def test_pipelined_response_is_sent_when_ready(small: Small) -> None:
    with small.connect() as greedy:
        begin = time.monotonic()
        greedy.sendall(QUICK + SLOW + SLOW)
        turns = small.turns
        assert greedy.recv(65_536).endswith(b"quick")
        assert [small.get("/quick").text for _ in range(20)] == ["quick"] * 20, "they take one thread of four"
        assert time.monotonic() - begin < 1
        assert greedy.recv(65_536).endswith(b"slow")
        assert greedy.recv(65_536).endswith(b"slow")
        assert small.turns - turns < 300, "the main thread waited in between"


def test_urgent_data_closes_connection_silently(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    with small.connect() as urgent:
        urgent.send(b"!", socket.MSG_OOB)
        assert ends(urgent)
    assert not caplog.records


@pytest.mark.parametrize("rest", ["", "Content-Length: x\r\n"])
def test_unsent_body_is_not_waited_for(small: Small, rest: str) -> None:
    with small.connect() as connection:
        connection.sendall(f"GET /quick HTTP/1.1\r\nExpect: 100-continue\r\n{rest}\r\n".encode())
        response = connection.recv(65_536)
        assert response.startswith(b"HTTP/1.1 400" if rest else b"HTTP/1.1 200")


def test_read_error_closes_only_its_connection(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with small.connect() as good, small.connect() as bad:
        good.sendall(QUICK)
        assert good.recv(65_536).endswith(b"quick")
        with monkeypatch.context() as patch:
            patch.setattr(serving.Parser, "received", fail)
            bad.sendall(QUICK)
            assert ends(bad)
        good.sendall(QUICK)
        assert good.recv(65_536).endswith(b"quick")


def test_failing_application_gets_500_in_json(
    start: Callable[..., Script],
) -> None:
    code = f"""
import runtime, serving
def broken(error):
    raise RuntimeError({WORDS!r})
runtime.set_up_logging()
app = serving.make_app("A_URL")
app.error(404, broken)
serving.serve("a-server", app, [serving.listen("127.0.0.1", 0)], threads=1)
"""
    script = start("-c", code)
    response = requests.get(f"http://127.0.0.1:{script.port()}/", timeout=10)
    assert response.status_code == 500
    assert response.json() == {"success": False, "error": "the server failed; its log names the error"}
    log = script.log.read_text()
    assert "error=RuntimeError" in log
    assert "in broken" in log
    assert WORDS not in log
    assert script.end() == 0


def test_lost_listening_socket_ends_the_server(databases: Databases, start: Callable[..., Script]) -> None:
    code = """
import send_queue_server, serving, sys
def out_of_memory(*_):
    raise MemoryError
serving.Channel.__init__ = out_of_memory
sys.exit(send_queue_server.main([]))
"""
    script = start("-c", code, SEND_QUEUE_PORT="0")
    with socket.create_connection(("127.0.0.1", script.port()), timeout=10):
        assert script.process.wait(10) == 1
    assert "send-queue-server lost a listening socket" in script.log.read_text()


def test_descriptor_above_select_limit_is_served(databases: Databases, start: Callable[..., Script]) -> None:
    code = """
import os, resource, send_queue_server
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
many = [os.dup(0) for _ in range(1100)]
send_queue_server.main([])
"""
    script = start("-c", code, SEND_QUEUE_PORT="0")
    assert requests.get(f"http://127.0.0.1:{script.port()}/", timeout=10).status_code == 404


def test_all_systemd_sockets_are_served(databases: Databases) -> None:
    """systemd passes one socket for each ListenStream= line of the unit."""
    hand_on = 'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@" 3<&0 4<&1 </dev/null >/dev/null'
    command = ["/bin/sh", "-c", hand_on, "sh", sys.executable, "send_queue_server.py"]
    environment = {**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN}
    with serving.listen("127.0.0.1", 0) as one, serving.listen("127.0.0.1", 0) as other:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=one.fileno(), stdout=other.fileno())
        try:
            for listening in (one, other):
                port = listening.getsockname()[1]
                assert requests.get(f"http://127.0.0.1:{port}/", timeout=10).status_code == 404
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()


# Its argument: how many descriptors it may have.
IN_A_HURRY = """
import resource, send_queue_server, serving, sys
descriptors = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
serving.CLIENT_TIMEOUT_WHEN_FULL = 0.5
serving.CHECK_INTERVAL = 0.1
send_queue_server.main()
"""


def processor_seconds(script: Script) -> float:
    fields = Path(f"/proc/{script.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_connections_beyond_descriptors_wait_without_load(databases: Databases, start: Callable[..., Script]) -> None:
    """The same happens with `ulimit -n 1024` and a thousand devices."""
    script = start("-c", IN_A_HURRY, "128", SEND_QUEUE_PORT="0")
    port = script.port()
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        script.wait_for("connection limit")
        before = processor_seconds(script)
        begin = time.monotonic()
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=10).status_code == 404
        spent = time.monotonic() - begin
        assert spent > 0.5, "it waited until the others timed out"
        assert processor_seconds(script) - before < spent / 2
    assert "accept()" not in script.log.read_text()


class Tricklers:
    """Send a byte of a header every `pause` seconds over each connection; connect again when it is closed."""

    def __init__(self, port: int, count: int, pause: float) -> None:
        self.port, self.pause = port, pause
        self.selector = selectors.DefaultSelector()
        self.due: dict[socket.socket, float] = {}
        self.closed = 0
        for _ in range(count):
            self.connect()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def connect(self) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self.port))
        self.selector.register(connection, selectors.EVENT_READ)
        self.due[connection] = time.monotonic() + 0.1

    def run(self) -> None:
        while not self.stopped.is_set():
            for key, _ in self.selector.select(0.05):
                self.close(key.fileobj)
                self.closed += 1
                self.connect()
            now = time.monotonic()
            for connection in [connection for connection, due in self.due.items() if due < now]:
                self.due[connection] = now + self.pause
                with contextlib.suppress(OSError):  # closed: the selector says so
                    connection.send(b"G")

    def close(self, connection: Any) -> None:
        self.selector.unregister(connection)
        del self.due[connection]
        connection.close()

    def end(self) -> None:
        self.stopped.set()
        self.thread.join()
        for connection in list(self.due):
            self.close(connection)
        self.selector.close()


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Raise this process's limit of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def poll(port: int, token: str) -> float:
    """Poll over a new connection; return the seconds until the response."""
    begin = time.monotonic()
    url = f"http://127.0.0.1:{port}{send_queue_server.PENDING}"
    response = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
    assert response.status_code == 200
    return time.monotonic() - begin


def test_unfinished_requests_do_not_block_other_clients(
    world: TestData, start: Callable[..., Script], descriptors: None
) -> None:
    world.device("mini")
    script = start("-c", IN_A_HURRY, "4096", SEND_QUEUE_PORT="0")
    tricklers = Tricklers(script.port(), 1100, pause=3)
    try:
        script.wait_for("connection limit reached connections=1000")
        assert max(poll(script.port(), "mini") for _ in range(3)) < 5
        wait_until(lambda: tricklers.closed > 1000)
    finally:
        tricklers.end()
    assert script.log.read_text().count("connection") <= 3, "once a minute, and where it listens"


def test_lock_waits_delay_only_their_threads(world: TestData, start: Callable[..., Script]) -> None:
    device_id = world.device("mini")
    sql = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body)
        SELECT %(device_id)s, '+14155550123', 'Hello' FROM generate_series(1, 4) RETURNING id
    """
    queue_ids = [queue_id for (queue_id,) in world.icloud(sql, device_id=device_id)]
    world.device("idle")
    url = patient(world.databases.icloud_url)
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=url)
    port = script.port()

    def report(queue_id: str) -> int:
        url = f"http://127.0.0.1:{port}{send_queue_server.RESULT.replace('<queue_id>', queue_id)}"
        headers = {"Authorization": "Bearer mini"}
        return requests.post(url, json={"status": "sent"}, headers=headers, timeout=30).status_code

    with contextlib.closing(db.connect(world.databases.icloud_url)) as holder, ThreadPoolExecutor(5) as pool:
        holder.autocommit = False
        db.query(holder, "SELECT FROM icloud.send_queue FOR UPDATE")
        reports = [pool.submit(report, queue_id) for queue_id in queue_ids[:3]]
        wait_until(lambda: lock_waits(world) == 3)
        assert max(poll(port, "idle") for _ in range(10)) < 1
        reports.append(pool.submit(report, queue_ids[3]))
        wait_until(lambda: lock_waits(world) == 4)
        held = pool.submit(poll, port, "idle")
        assert not wait([held], timeout=1).done
        holder.rollback()
        assert held.result() > 1
        assert [report.result() for report in reports] == [200] * 4


def test_stop_waits_for_a_continuing_upload(databases: Databases, server: tuple[Script, str]) -> None:
    script, base_url = server
    body = b"x" * 20
    with socket.create_connection(("127.0.0.1", int(base_url.rsplit(":", 1)[1])), timeout=10) as connection:
        head = f"POST {send_queue_server.ENQUEUE} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        for number in range(len(body)):
            connection.sendall(body[number : number + 1])
            time.sleep(0.1)  # its pace
            if number == 5:
                script.process.terminate()
                script.wait_for("stopping")
        response = connection.recv(65_536)
        assert response.startswith(b"HTTP/1.1 401")
        assert b"Connection: close" in response
    assert script.process.wait(10) == 0
