"""Check the units in systemd/ and the scripts' messages to systemd, without a running systemd."""

import configparser
import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import requests
import waitress.adjustments
from testing import OWNER_TOKEN, ROOT, SERVICE_TOKEN, Databases, Script, TestData, numbers

import outreach_server
import runtime
import send_queue_server
import serving

INSTALLED = "/opt/send-queue/"
UNITS = sorted((ROOT / "systemd").glob("*.service"))
DISPATCHER = ROOT / "systemd" / "outreach-dispatcher.service"
ALERT = ROOT / "systemd" / "outreach-alert.service"  # run by its timer, so systemd does not restart it
RESTARTED = [unit for unit in UNITS if unit != ALERT]
SOCKET = ROOT / "systemd" / "send-queue-server.socket"
TEMPLATE = ROOT / "systemd" / "send-queue-server@.service"
OWNER_SOCKET = ROOT / "systemd" / "outreach-server.socket"
OWNER_SERVICE = ROOT / "systemd" / "outreach-server.service"
# Each server: its socket, its service, the service that the first connection starts.
SERVERS = [(SOCKET, TEMPLATE, "send-queue-server@1.service"), (OWNER_SOCKET, OWNER_SERVICE, OWNER_SERVICE.name)]

each_server = pytest.mark.parametrize(
    ("socket_unit", "service", "first"), SERVERS, ids=["send-queue-server", "outreach-server"]
)

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this host has no systemd-analyze")


def section(unit: Path, name: str) -> dict[str, str]:
    """Return a section of a unit file; a repeated key has its last value."""
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys keep their case
    parser.read(unit)
    return dict(parser[name])


def verify(systemd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([systemd / "verify"], capture_output=True, text=True, timeout=60, check=False)


def assert_refused(directory: Path, unit: Path, good: str, bad: str) -> None:
    """Fail unless verify names `unit` after `bad` has replaced `good` in it."""
    shutil.copytree(ROOT / "systemd", directory / "systemd")
    text = unit.read_text()
    assert good in text
    (directory / "systemd" / unit.name).write_text(text.replace(good, bad))
    done = verify(directory / "systemd")
    assert done.returncode == 1
    assert unit.name.replace("@.", "@1.") in done.stderr


class Systemd:
    """Receive what a script sends to NOTIFY_SOCKET."""

    def __init__(self, name: str) -> None:
        self.address = f"@{name}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{name}")

    def next(self, seconds: float = 15) -> str:
        """Return the next notification, or raise TimeoutError."""
        self.socket.settimeout(seconds)
        return self.socket.recv(4096).decode()

    def drain(self) -> None:
        """Discard all notifications so far."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.socket.recv(4096):
                pass


@pytest.fixture
def systemd(databases: Databases) -> Iterator[Systemd]:
    receiver = Systemd(f"notify-{os.getpid()}-{next(numbers)}")
    with receiver.socket:
        yield receiver


@pytest.fixture
def endless() -> Iterator[tuple[str, threading.Event]]:
    """A server whose first response never ends: its URL, and an event that is set by the first request."""
    asked, over = threading.Event(), threading.Event()

    def trickle() -> None:
        conn, _ = listener.accept()
        with conn, contextlib.suppress(OSError):
            conn.recv(4096)
            asked.set()
            conn.sendall(b"HTTP/1.1 200 OK\r\nX-Endless: ")
            while not over.wait(0.5):
                conn.sendall(b".")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        over.set()
        if not asked.is_set():
            socket.create_connection(listener.getsockname()).close()  # ends the accept()
        thread.join()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_unit_runs_an_existing_script(unit: Path) -> None:
    python, script = section(unit, "Service")["ExecStart"].split()
    assert python == f"{INSTALLED}.venv/bin/python"
    assert script.startswith(INSTALLED)
    assert (ROOT / script.removeprefix(INSTALLED)).is_file()


def test_units_share_user_and_environment_file() -> None:
    assert UNITS == [ALERT, DISPATCHER, OWNER_SERVICE, TEMPLATE]
    services = [section(unit, "Service") for unit in UNITS]
    assert [(service["User"], service["EnvironmentFile"]) for service in services] == [
        ("sendqueue", "/etc/send-queue.env")
    ] * len(UNITS)


@pytest.mark.parametrize("unit", RESTARTED, ids=lambda unit: unit.stem)
def test_unit_restarts_without_limit(unit: Path) -> None:
    assert section(unit, "Unit")["StartLimitIntervalSec"] == "0"
    assert section(unit, "Service")["Restart"] == "on-failure"


@each_server
def test_server_processes_follow_their_socket(socket_unit: Path, service: Path, first: str) -> None:
    assert section(service, "Service")["Sockets"] == socket_unit.name
    assert section(service, "Unit")["Requires"] == socket_unit.name
    assert socket_unit.name in section(service, "Install")["WantedBy"].split()
    assert section(socket_unit, "Socket")["Service"] == first


@pytest.mark.parametrize(
    ("script", "socket_unit"),
    [(send_queue_server, SOCKET), (outreach_server, OWNER_SOCKET)],
    ids=["send-queue-server", "outreach-server"],
)
def test_socket_unit_uses_default_address(
    monkeypatch: pytest.MonkeyPatch, script: ModuleType, socket_unit: Path
) -> None:
    def listen(host: str, port: int) -> NoReturn:
        addresses.append(f"{host}:{port}")
        raise OSError("not in a test")

    addresses: list[str] = []
    monkeypatch.setattr(serving, "listen", listen)
    monkeypatch.setattr(runtime, "load_settings", lambda: None)
    monkeypatch.setattr(runtime, "set_up_logging", lambda: None)
    monkeypatch.setenv("MAC_SYNC_SERVICE_TOKEN", SERVICE_TOKEN)
    monkeypatch.setenv("OUTREACH_OWNER_TOKEN", OWNER_TOKEN)
    for name in ("QUINN_DB_URL", "QUINN_ICLOUD_DB_URL"):
        monkeypatch.setenv(name, "postgresql://nowhere")
    for name in ("SEND_QUEUE_HOST", "SEND_QUEUE_PORT", "OUTREACH_HOST", "OUTREACH_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(runtime.ConfigError, match="cannot listen"):
        script.main([])
    assert addresses == [section(socket_unit, "Socket")["ListenStream"]]
    assert section(socket_unit, "Install")["WantedBy"] == "sockets.target"


def test_dispatcher_starts_after_server() -> None:
    first = section(SOCKET, "Socket")["Service"]
    assert first == TEMPLATE.name.replace("@", "@1")
    assert first in section(DISPATCHER, "Unit")["After"].split()


@each_server
def test_socket_backlog_matches_server(socket_unit: Path, service: Path, first: str) -> None:
    assert section(socket_unit, "Socket")["Backlog"] == str(waitress.adjustments.Adjustments.backlog)


@each_server
def test_unit_allows_enough_descriptors_and_stop_time(socket_unit: Path, service: Path, first: str) -> None:
    unit = section(service, "Service")
    assert int(unit["LimitNOFILE"]) >= serving.CONNECTION_LIMIT * serving.FILES_PER_CONNECTION
    assert int(unit["TimeoutStopSec"]) > serving.SHUTDOWN_TIMEOUT + 2


@each_server
def test_unit_keeps_shared_socket_non_blocking(socket_unit: Path, service: Path, first: str) -> None:
    assert section(service, "Service")["NonBlocking"] == "yes"


@needs_systemd
def test_systemd_accepts_hardened_units() -> None:
    done = verify(ROOT / "systemd")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"exposure level for \S+: ([0-9.]+)", done.stdout) == ["1.2"] * len(UNITS)


@needs_systemd
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        pytest.param("PrivateIPC=", "PrivateICP=", id="unknown key"),
        pytest.param("ProtectProc=invisible", "ProtectProc=sometimes", id="unknown value"),
        pytest.param("ExecStart=/opt/send-queue/.venv/bin/python", "ExecStart=python9", id="no interpreter"),
        pytest.param("PrivateUsers=yes", "PrivateUsers=no\nCapabilityBoundingSet=~\nNoNewPrivileges=no", id="soft"),
    ],
)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_verify_refuses_broken_unit(tmp_path: Path, unit: Path, good: str, bad: str) -> None:
    assert_refused(tmp_path, unit, good, bad)


@needs_systemd
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        pytest.param("Backlog=", "Backlogs=", id="unknown key"),
        pytest.param("ListenStream=127.0.0.1:3201", "ListenStream=127.0.0.1:99999", id="no such port"),
        pytest.param("Service=send-queue-server@1.service", "Service=send-queue-server@1.socket", id="no service"),
    ],
)
def test_verify_refuses_broken_socket(tmp_path: Path, good: str, bad: str) -> None:
    assert_refused(tmp_path, SOCKET, good, bad)


@needs_systemd
def test_verify_refuses_broken_socket_of_the_owners_api(tmp_path: Path) -> None:
    assert_refused(tmp_path, OWNER_SOCKET, "ListenStream=127.0.0.1:3030", "ListenStream=127.0.0.1:99999")


@pytest.mark.parametrize("name", ["send_queue_server.py", "outreach_server.py"])
def test_server_is_ready_when_it_accepts_connections(systemd: Systemd, start: Callable[..., Script], name: str) -> None:
    script = start(name, SEND_QUEUE_PORT="0", OUTREACH_PORT="0", NOTIFY_SOCKET=systemd.address)
    assert systemd.next() == "READY=1"
    [line] = [line for line in script.lines() if "listening" in line]  # logged before it is ready
    port = line.partition("port=")[2].split()[0]
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200


def test_dispatcher_pings_watchdog_every_second(systemd: Systemd, start: Callable[..., Script]) -> None:
    start("dispatcher.py", NOTIFY_SOCKET=systemd.address)
    assert systemd.next() == "READY=1"
    assert systemd.next() == "WATCHDOG=1"
    start_of_rest = time.monotonic()
    assert [systemd.next(seconds=5) for _ in range(6)] == ["WATCHDOG=1"] * 6  # of them two or three by the first tick
    assert time.monotonic() - start_of_rest > 2, "an idle dispatcher sleeps"


def test_dispatcher_without_token_is_ready_first(systemd: Systemd, start: Callable[..., Script]) -> None:
    script = start("dispatcher.py", MAC_SYNC_SERVICE_TOKEN="", NOTIFY_SOCKET=systemd.address)
    assert script.process.wait(15) == 0
    assert systemd.next() == "READY=1"


def test_hanging_tick_stops_watchdog_pings(
    world: TestData, systemd: Systemd, endless: tuple[str, threading.Event], start: Callable[..., Script]
) -> None:
    url, asked = endless
    world.device()
    world.batch(1)
    start("dispatcher.py", MAC_SYNC_BASE_URL=url, NOTIFY_SOCKET=systemd.address)
    assert asked.wait(15)
    systemd.drain()
    with pytest.raises(TimeoutError):  # an idle dispatcher pings every second
        systemd.next(seconds=3)
