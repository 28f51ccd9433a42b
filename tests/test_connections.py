"""What clients do to the server's threads below HTTP: silence, haste, urgent data, too many of them at once."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import bottle
import pytest
import waitress
from conftest import ROOT, SERVICE_TOKEN, Databases, Script, until

import send_queue_server

QUICK = b"GET /quick HTTP/1.1\r\nHost: here\r\n\r\n"
SLOW, SLOWER, BIG = (QUICK.replace(b"/quick", path) for path in (b"/slow", b"/slower", b"/big"))
WORDS = "what an error quotes of a message"
began = threading.Event()  # set when a slow request runs


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[send_queue_server.Worker]:
    """A thread of the server over a small application, for which two seconds are a long silence."""
    monkeypatch.setattr(send_queue_server, "SILENCE_LIMIT", 2)
    monkeypatch.setattr(send_queue_server, "SWEEP_PAUSE", 0.1)

    def slow(seconds: float) -> str:
        began.set()
        time.sleep(seconds)
        return "slow"

    began.clear()
    app = bottle.Bottle()
    app.route("/quick", callback=lambda: "quick")
    app.route("/slow", callback=lambda: slow(0.5))
    app.route("/slower", callback=lambda: slow(3))
    app.route("/big", callback=lambda: b"x" * 8_000_000)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        made = send_queue_server.Worker(app, listening)
        made.start()
        yield made
    made.stop()
    made.join()
    waitress.wasyncore.close_all(made.channels)


def connect(worker: send_queue_server.Worker) -> socket.socket:
    return socket.create_connection(("127.0.0.1", worker.server.effective_port), timeout=10)


def ends(connection: socket.socket) -> bool:
    """Whether the server closes the connection before the time-out."""
    try:
        return connection.recv(65_536) == b""
    except ConnectionResetError:
        return True


def test_a_request_that_comes_while_the_thread_is_held_up_is_answered(worker: send_queue_server.Worker) -> None:
    with connect(worker) as first, connect(worker) as second:
        second.sendall(QUICK)
        assert second.recv(65_536).endswith(b"quick")
        first.sendall(SLOWER)
        assert began.wait(10)
        second.sendall(QUICK)  # when it is read, its connection will have been silent for longer than the limit
        assert first.recv(65_536).endswith(b"slow")
        assert second.recv(65_536).endswith(b"quick")


def test_a_connection_that_says_nothing_is_closed(worker: send_queue_server.Worker) -> None:
    with connect(worker) as silent, connect(worker) as half:
        half.sendall(QUICK[:-4])
        begin = time.monotonic()
        assert ends(silent)
        assert ends(half)
        assert 1.5 < time.monotonic() - begin < 5


def test_a_client_that_never_reads_its_answers_is_closed(worker: send_queue_server.Worker) -> None:
    with connect(worker) as one, connect(worker) as many:
        one.sendall(BIG)
        many.sendall(BIG * 3)
        until(lambda: len(worker.server.active_channels) == 2)
        until(lambda: not worker.server.active_channels)


def test_one_that_sends_many_requests_at_once_lets_the_others_have_their_turns(
    worker: send_queue_server.Worker,
) -> None:
    with connect(worker) as greedy, connect(worker) as other:
        greedy.sendall(SLOW * 8)
        assert began.wait(10)
        begin = time.monotonic()
        other.sendall(QUICK)
        assert other.recv(65_536).endswith(b"quick")
        assert time.monotonic() - begin < 2, "after two of the eight at most"
        answers = b""
        while answers.count(b"slow") < 8:
            answers += greedy.recv(65_536)


def test_urgent_data_ends_the_connection_and_is_no_news(
    worker: send_queue_server.Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(worker) as urgent:
        urgent.send(b"!", socket.MSG_OOB)
        assert ends(urgent)
    assert not caplog.records


@pytest.mark.parametrize("rest", ["", "Content-Length: x\r\n"])
def test_a_promise_of_a_body_that_does_not_come_is_not_waited_for(worker: send_queue_server.Worker, rest: str) -> None:
    with connect(worker) as connection:
        connection.sendall(f"GET /quick HTTP/1.1\r\nExpect: 100-continue\r\n{rest}\r\n".encode())
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 400" if rest else b"HTTP/1.1 200")


def test_a_failure_of_one_connection_is_not_the_others(
    worker: send_queue_server.Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = send_queue_server.Channel.service

    def fails_for_slow(channel: send_queue_server.Channel) -> None:
        if channel.requests[0].path == "/slow":
            raise OSError(WORDS)
        service(channel)

    monkeypatch.setattr(send_queue_server.Channel, "service", fails_for_slow)
    with connect(worker) as good, connect(worker) as bad:
        bad.sendall(SLOW)
        assert ends(bad)
        good.sendall(QUICK)
        assert good.recv(65_536).endswith(b"quick")
    assert "a connection failed, and is closed error=OSError" in caplog.text
    assert WORDS not in caplog.text


def test_an_application_that_fails_as_a_whole_is_a_500_in_json(worker: send_queue_server.Worker) -> None:
    worker.server.application = lambda *_: 1 / 0
    with connect(worker) as connection:
        connection.sendall(QUICK)
        with connection.makefile("rb") as stream:
            answer = stream.read()
    assert answer.startswith(b"HTTP/1.1 500")
    assert answer.endswith(b'{"success":false,"error":"the server failed; its log names the error"}')


def test_a_server_whose_listening_socket_is_gone_ends_so_that_it_is_started_again(start: Callable[..., Script]) -> None:
    broken = """
import send_queue_server
def out_of_memory(*_):
    raise MemoryError
send_queue_server.Channel.__init__ = out_of_memory
send_queue_server.main([])
"""
    script = start(
        "-c", broken, SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL="postgresql://x", QUINN_DB_URL="postgresql://x"
    )
    with socket.create_connection(("127.0.0.1", script.port()), timeout=10):
        assert script.process.wait(10) == 1
    assert "waitress has closed the listening socket" in script.log.read_text()
    assert "a thread failed, so the server stops error=RuntimeError" in script.log.read_text()


def test_a_descriptor_beyond_what_select_can_take_is_served(start: Callable[..., Script], databases: Databases) -> None:
    crowded = """
import os, resource, send_queue_server
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
many = [os.dup(0) for _ in range(1100)]
send_queue_server.main([])
"""
    script = start("-c", crowded, SEND_QUEUE_PORT="0")
    with socket.create_connection(("127.0.0.1", script.port()), timeout=10) as connection:
        connection.sendall(QUICK)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 404")


def test_two_sockets_share_the_number_of_connections(tmp_path: Path, databases: Databases) -> None:
    """systemd hands on both of two ListenStream= lines."""
    limited = "import send_queue_server; send_queue_server.CONNECTION_LIMIT = 16; send_queue_server.main([])"
    hand_on = 'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@" 3<&0 4<&1 </dev/null >/dev/null'
    log = tmp_path / "server.log"
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["/bin/sh", "-c", hand_on, "sh", sys.executable, "-c", limited],
                cwd=ROOT,
                env={**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN, "SEND_QUEUE_THREADS": "1"},
                stdin=sockets[0].fileno(), stdout=sockets[1].fileno(), stderr=stderr,
            )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        for listening in sockets:
            many = [socket.create_connection(listening.getsockname(), timeout=10) for _ in range(12)]
            until(lambda: log.read_text().count("connection limit") > sockets.index(listening))  # noqa: B023
            for connection in many:
                connection.close()
            with socket.create_connection(listening.getsockname(), timeout=10) as connection:
                connection.sendall(QUICK)
                assert connection.recv(65_536).startswith(b"HTTP/1.1 404")
        assert process.poll() is None


def test_a_stop_lets_an_upload_go_on_that_does(databases: Databases, server: tuple[Script, str]) -> None:
    script, base_url = server
    body = b"x" * 30
    with socket.create_connection(("127.0.0.1", int(base_url.rsplit(":", 1)[1])), timeout=10) as connection:
        head = f"POST {send_queue_server.ENQUEUE} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        for number in range(len(body)):
            connection.sendall(body[number : number + 1])
            time.sleep(0.1)
            if number == 5:
                script.process.terminate()
                script.wait_for("stopping")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 401")
    assert script.process.wait(10) == 0
