"""Check an upgrade under load: server processes are replaced on a lasting socket, and no request fails.

The test holds the socket and passes it on as systemd does: as descriptor 3, named by LISTEN_PID and LISTEN_FDS.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from testing import ROOT, SERVICE_TOKEN, TestData, wait_until

import serving

CLIENTS = 8
# The shell's process id is kept by exec, as LISTEN_PID demands.
PASS_ON = ["/bin/sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null', "sh", sys.executable]


class Servers:
    """Run server processes on one listening socket that outlives them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = serving.listen("127.0.0.1", 0)
        self.socket.listen(128)
        self.base_url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """Start another process; return it when it accepts connections."""
        log = self.directory / f"server-{len(self.started)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*PASS_ON, "send_queue_server.py"],
                cwd=ROOT,
                env={**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN},
                stdin=self.socket.fileno(),
                stderr=stderr,
            )
        self.started.append(process)
        wait_until(lambda: "listening" in log.read_text())
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0

    def enqueued(self) -> list[int]:
        """Return how many messages each process has enqueued."""
        logs = sorted(self.directory.glob("server-*.log"))
        return [log.read_text().count("message enqueued") for log in logs]

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        self.socket.close()


class Load:
    """Enqueue and poll in threads, each over its own connection, which it keeps for ten requests of each kind."""

    def __init__(self, base_url: str, device_id: str) -> None:
        self.base_url = base_url
        self.device_id = device_id
        self.sent: list[str] = []
        self.responses = 0
        self.failures: list[str] = []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def work(self) -> None:
        while not self.stopped.is_set():
            with requests.Session() as session:
                for _ in range(10):
                    item = {"batchItemId": str(uuid.uuid4()), "deviceId": self.device_id}
                    self.sent.append(item["batchItemId"])
                    message = {**item, "toHandle": "+14155550123", "body": "Hello!"}
                    self.call(session, "POST", "/admin/send-queue/enqueue", SERVICE_TOKEN, message)
                    self.call(session, "GET", "/client/imessage/send-queue/pending", "mini")

    def call(self, session: requests.Session, method: str, path: str, token: str, body: object = None) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        try:
            response = session.request(method, self.base_url + path, json=body, headers=headers, timeout=10)
            if response.status_code != 200:
                self.failures.append(f"{response.status_code} {response.text}")
        except requests.RequestException as error:
            self.failures.append(repr(error))
        self.responses += 1

    def wait(self, more: int = 200) -> None:
        """Return after so many more responses, or a failure."""
        goal = self.responses + more
        wait_until(lambda: self.responses >= goal or self.failures)

    def end(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def servers(world: TestData, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path)
    yield servers
    servers.end()


@pytest.fixture
def load(world: TestData, servers: Servers) -> Iterator[Load]:
    """A load that starts at once: its first connections wait in the socket for a process."""
    load = Load(servers.base_url, world.device("mini"))
    yield load
    load.end()


def assert_nothing_lost(world: TestData, load: Load) -> None:
    load.end()
    assert load.failures == []
    queued = {item_id for (item_id,) in world.icloud("SELECT batch_item_id FROM icloud.send_queue")}
    assert queued == set(load.sent)


def test_restart_under_load_fails_no_request(world: TestData, servers: Servers, load: Load) -> None:
    """The only process stops before the next one starts. Until then connections wait in the socket."""
    for _ in range(3):
        process = servers.start()
        load.wait()
        servers.stop(process)
    servers.start()
    load.wait()
    assert_nothing_lost(world, load)


def test_processes_share_one_socket_and_are_replaceable(world: TestData, servers: Servers, load: Load) -> None:
    old = [servers.start(), servers.start()]
    for process in old:
        wait_until(lambda: min(servers.enqueued()) > 0)
        servers.start()
        servers.stop(process)
    wait_until(lambda: min(servers.enqueued()) > 0)
    assert_nothing_lost(world, load)


def test_process_keeps_shared_socket_non_blocking() -> None:
    """All processes share the flag: with a blocking socket, one of them would hang in accept()."""
    code = "import serving; [listening] = serving.systemd_sockets(); listening.dup()"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        subprocess.run([*PASS_ON, "-c", code], cwd=ROOT, stdin=listening.fileno(), timeout=60, check=True)
        assert not os.get_blocking(listening.fileno())
