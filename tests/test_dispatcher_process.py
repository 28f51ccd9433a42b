"""Check dispatcher.py as a process: rivals, a kill, signals, options and exit status."""

import contextlib
import http.server
import re
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest
import requests
from helpers import Start, row_statuses, run_script
from testing import TestData


def test_three_dispatchers_make_one_row_per_item(world: TestData, base_url: str, start: Start) -> None:
    world.device()
    world.batch(clients=2)
    world.batch(clients=2)
    rivals = [start("dispatcher.py", "--once", MAC_SYNC_BASE_URL=base_url) for _ in range(3)]
    assert [rival.process.wait(20) for rival in rivals] == [0, 0, 0]
    assert world.statuses() == ["queued"] * 4
    [(rows, items)] = world.icloud("SELECT count(*), count(DISTINCT batch_item_id) FROM icloud.send_queue")
    assert (rows, items) == (4, 4)


class Relay:
    """Forward each request to the server, and call `before_response` before the response goes back."""

    def __init__(self, base_url: str, before_response: Callable[[], object]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {"Authorization": self.headers["Authorization"]}
                response = requests.post(base_url + self.path, data=body, headers=headers, timeout=5)
                before_response()
                with contextlib.suppress(OSError):  # the dispatcher may have been killed
                    self.send_response(response.status_code)
                    self.end_headers()
                    self.wfile.write(response.content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, args=(0.02,)).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_kill_after_server_commit_leaves_one_row(world: TestData, base_url: str, start: Start) -> None:
    world.device()
    world.batch(clients=1)
    committed, over = threading.Event(), threading.Event()

    def swallow() -> None:
        committed.set()
        over.wait(20)

    with Relay(base_url, swallow) as relay_url:
        victim = start("dispatcher.py", "--once", MAC_SYNC_BASE_URL=relay_url)
        assert committed.wait(15)
        assert victim.end(signal.SIGKILL) == -signal.SIGKILL
        over.set()
    assert world.statuses() == ["pending"]
    assert row_statuses(world) == [("queued", False)]
    done = run_script("dispatcher.py", "--once", MAC_SYNC_BASE_URL=base_url)
    assert done.stdout == "sync: 1 queued\ndispatch: nothing to do\n"
    assert done.returncode == 0
    assert world.statuses() == ["queued"]
    assert row_statuses(world) == [("queued", False)]


def test_sigterm_finishes_current_item(world: TestData, base_url: str, start: Start) -> None:
    world.device()
    world.batch(clients=1)
    world.batch(clients=1)
    asked = threading.Event()

    def slow() -> None:
        asked.set()
        time.sleep(0.5)  # the server's response takes this long: the signal arrives in between

    with Relay(base_url, slow) as relay_url:
        daemon = start("dispatcher.py", MAC_SYNC_BASE_URL=relay_url)
        assert asked.wait(15)
        assert daemon.end() == 0
    assert world.statuses() == ["queued", "pending"]
    assert "outreach-dispatcher starting" in daemon.lines()[0]
    assert "outreach-dispatcher stopped" in daemon.lines()[-1]


def test_sigterm_ends_daemon_while_server_hangs(world: TestData, start: Start) -> None:
    world.device()
    world.batch(clients=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        daemon = start("dispatcher.py", MAC_SYNC_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(15)
        connection, _ = silent.accept()
        with connection:
            begun = time.monotonic()
            assert daemon.end() == 0
            assert time.monotonic() - begun < 10
    assert world.statuses() == ["pending"]


def test_once_prints_counts_and_sets_exit_status(world: TestData, base_url: str) -> None:
    world.device()
    world.batch(clients=[world.client(handle=None), world.client()])
    done = run_script("dispatcher.py", "--once", MAC_SYNC_BASE_URL=base_url)
    assert (done.stdout, done.returncode) == ("sync: nothing to do\ndispatch: 1 queued, 1 skipped\n", 0)
    world.batch(clients=1)
    done = run_script("dispatcher.py", "--once", MAC_SYNC_BASE_URL="http://127.0.0.1:1")
    assert (done.stdout, done.returncode) == ("sync: nothing to do\ndispatch: failed\n", 1)


def test_daemon_without_token_warns_and_exits_0() -> None:
    done = run_script("dispatcher.py", MAC_SYNC_SERVICE_TOKEN="")
    assert done.returncode == 0
    assert "disabled: MAC_SYNC_SERVICE_TOKEN is not set" in done.stderr


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("MAC_SYNC_SERVICE_TOKEN", "fifteen-letters", "MAC_SYNC_SERVICE_TOKEN"),
        ("QUINN_ICLOUD_DB_URL", "", "QUINN_ICLOUD_DB_URL"),
        ("QUINN_DB_URL", "localhost:5432/quinn", "QUINN_DB_URL"),
        ("MAC_SYNC_BASE_URL", "localhost:3201", "MAC_SYNC_BASE_URL"),
        ("DISPATCH_INTERVAL_SECONDS", "soon", "DISPATCH_INTERVAL_SECONDS"),
    ],
)
def test_misconfigured_daemon_names_variable_and_exits_2(setting: str, value: str, named: str) -> None:
    away = "postgresql://127.0.0.1:1/away"
    done = run_script("dispatcher.py", "--once", **{"QUINN_DB_URL": away, "QUINN_ICLOUD_DB_URL": away, setting: value})
    assert done.returncode == 2
    assert re.search(rf"^dispatcher\.py: {named} ", done.stderr, re.MULTILINE)
    assert "fifteen-letters" not in done.stderr


def test_help_lists_variables_and_examples() -> None:
    done = run_script("dispatcher.py", "--help")
    assert done.returncode == 0
    for word in ("MAC_SYNC_SERVICE_TOKEN", "MAC_SYNC_BASE_URL", "QUINN_DB_URL", "dispatcher.py --once"):
        assert word in done.stdout
