"""An upgrade under load: server processes are replaced on a listening socket that stays, and no request fails.

The test holds the socket and hands it on as systemd does: as descriptor 3, named by LISTEN_PID and LISTEN_FDS.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import bottle
import pytest
import requests
import waitress
from conftest import ROOT, SERVICE_TOKEN, World, until

import send_queue_server

CLIENTS = 8
# The shell's process id is kept by exec, as LISTEN_PID demands.
HAND_ON = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


class Servers:
    """Server processes on one listening socket that outlives them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.base_url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """One more process, once it accepts connections."""
        log = self.directory / f"server-{len(self.started)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["/bin/sh", "-c", HAND_ON, "sh", sys.executable, "send_queue_server.py"],
                cwd=ROOT,
                env={**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN},
                stdin=self.socket.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        self.started.append(process)
        until(lambda: "listening" in log.read_text())
        return process

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        self.socket.close()


class Load:
    """Clients that enqueue and poll, one request after another, each over a kept-alive connection."""

    def __init__(self, base_url: str, device_id: str) -> None:
        self.base_url = base_url
        self.device_id = device_id
        self.enqueued: list[str] = []
        self.answers = 0
        self.failures: list[str] = []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def work(self) -> None:
        with requests.Session() as session:
            while not self.stopped.is_set():
                self.ask(session, self.enqueue)
                self.ask(session, self.poll)

    def ask(self, session: requests.Session, call: Callable[[requests.Session], requests.Response]) -> None:
        try:
            answer = call(session)
        except requests.RequestException as error:
            self.failures.append(repr(error))
            return
        self.answers += 1
        if answer.status_code != 200:
            self.failures.append(f"{answer.status_code} {answer.text}")

    def enqueue(self, session: requests.Session) -> requests.Response:
        item_id = str(uuid.uuid4())
        message = {"batchItemId": item_id, "deviceId": self.device_id, "toHandle": "+14155550123", "body": "Hello!"}
        headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
        answer = session.post(f"{self.base_url}/admin/send-queue/enqueue", json=message, headers=headers, timeout=10)
        self.enqueued.append(item_id)
        return answer

    def poll(self, session: requests.Session) -> requests.Response:
        headers = {"Authorization": "Bearer mini"}
        return session.get(f"{self.base_url}/client/imessage/send-queue/pending", headers=headers, timeout=10)

    def end(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def servers(world: World, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path)
    yield servers
    servers.end()


@pytest.fixture
def load(world: World, servers: Servers) -> Iterator[Callable[[], Load]]:
    loads: list[Load] = []

    def begin() -> Load:
        loads.append(Load(servers.base_url, world.device("mini")))
        return loads[-1]

    yield begin
    for started in loads:
        started.end()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


def answered(load: Load, more: int = 200) -> None:
    """Wait until so many more requests have been answered."""
    goal = load.answers + more
    until(lambda: load.answers >= goal or load.failures)


def queued(world: World) -> set[str]:
    return {item_id for (item_id,) in world.icloud("SELECT batch_item_id FROM icloud.send_queue")}


def test_a_restart_under_load_fails_no_request(world: World, servers: Servers, load: Callable[[], Load]) -> None:
    """One process, stopped before its successor starts: connections wait in the socket meanwhile."""
    process = servers.start()
    clients = load()
    for _ in range(3):
        answered(clients)
        stop(process)
        process = servers.start()
    answered(clients)
    clients.end()
    assert clients.failures == []
    assert queued(world) == set(clients.enqueued)


def test_processes_on_one_port_are_replaced_one_by_one_and_no_request_fails(
    world: World, servers: Servers, load: Callable[[], Load]
) -> None:
    old = [servers.start(), servers.start()]
    clients = load()
    for process in old:
        answered(clients)
        servers.start()
        stop(process)
    answered(clients)
    clients.end()
    assert clients.failures == []
    assert queued(world) == set(clients.enqueued)


def test_two_processes_on_one_port_both_answer(servers: Servers, load: Callable[[], Load]) -> None:
    servers.start()
    servers.start()
    clients = load()
    answered(clients, 400)
    clients.end()
    assert clients.failures == []
    recorded = [log.read_text().count("message enqueued") for log in sorted(servers.directory.glob("server-*.log"))]
    assert len(recorded) == 2
    assert min(recorded) > 0


def test_a_process_does_not_make_the_shared_socket_blocking() -> None:
    """The flag is the other processes', too: one of them would wait in accept(), and serve nobody meanwhile."""
    code = "import send_queue_server; [listening] = send_queue_server.inherited(); listening.dup()"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        command = ["/bin/sh", "-c", HAND_ON, "sh", sys.executable, "-c", code]
        subprocess.run(command, cwd=ROOT, stdin=listening.fileno(), timeout=60, check=True)
        assert not os.get_blocking(listening.fileno())


def test_a_thread_that_stops_closes_its_silent_connections_and_leaves_none_to_wait_for_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        worker = send_queue_server.Worker(bottle.Bottle(), listening)
        worker.start()
        with socket.create_connection(listening.getsockname(), timeout=5) as silent:
            silent.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert silent.recv(65_536).startswith(b"HTTP/1.1 404")
            worker.stop()
            worker.join()
            assert silent.recv(65_536) == b""  # raises TimeoutError where it is still open
        waitress.wasyncore.close_all(worker.channels)
