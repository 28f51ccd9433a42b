"""Check the demo as a process: its records, its bars, and that it leaves nothing behind."""

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from testing import ROOT, wait_until

pytestmark = pytest.mark.mac  # its device is the sender

COMMAND = [sys.executable, "demo/demo.py", "--clients", "4"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """The parent of the demo's temporary directory. It is short, as a socket's path is limited."""
    with tempfile.TemporaryDirectory(prefix="demo", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(directory), "TERM": "xterm"}


def left_behind(directory: Path) -> list[str]:
    """Return the command lines of the processes in `directory`, and the demo's directories there."""
    found = [str(path) for path in directory.glob("send-queue-demo-*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text() + (process / "environ").read_text()
        except (OSError, UnicodeDecodeError):  # the process has ended, or is another user's
            continue
        if str(directory) in words and int(process.name) != os.getpid():
            found.append(words.split("\0\0")[0])
    return found


def test_demo_records_match_and_nothing_remains(environment: dict[str, str], directory: Path) -> None:
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) items = (\d+) sent \+ (\d+) failed \+ (\d+) skipped", done.stdout)
    assert counts
    items, *ended = map(int, counts.groups())
    assert items == 4 == sum(ended)
    assert ended[1:] == [0, 1]
    assert "Imported: 191 new clients, 0 changed." in done.stdout
    assert "Of unknown outcome: 0." in done.stdout
    assert "the sender was killed 2 times" in done.stdout
    assert "Sent twice: 0. Lost: 0. The records match." in done.stdout
    assert "\033" not in done.stdout
    assert left_behind(directory) == []


def test_ctrl_c_stops_all_demo_processes(environment: dict[str, str], directory: Path) -> None:
    ours, theirs = pty.openpty()
    demo = subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def drawn_twice() -> bool:
        nonlocal seen
        seen += os.read(ours, 65536).decode()
        return seen.count("Your next appointment") > 2

    wait_until(drawn_twice, 30)
    assert re.search(r"Spring opening hours  \[[#>.]{14}\] ", seen)
    assert "\033[4A\033[2K" in seen, "the heading and the three bars are drawn in place"
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to all of its foreground group
    assert demo.wait(20) == 130
    os.close(ours)
    assert left_behind(directory) == []


def test_the_demo_says_where_the_page_is_and_serves_it_until_ctrl_c(
    environment: dict[str, str], directory: Path
) -> None:
    log = directory / "demo.log"
    with log.open("wb") as stdout:
        demo = subprocess.Popen(
            [*COMMAND, "--page"],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True,
        )  # fmt: skip
    wait_until(lambda: "Everything runs until Ctrl-C." in log.read_text(), 60)
    said = re.findall(r"page: (http://\S+/)   The token: (\S+)", log.read_text())
    assert len(said) == 2, "at the beginning, and at the end"
    url, token = said[-1]
    with requests.Session() as browser:
        headers = {"Sec-Fetch-Site": "same-origin"}
        shown = browser.post(f"{url}login", {"password": token}, headers=headers, timeout=10)
    assert "Nothing to send." in shown.text
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(20) == 130
    assert left_behind(directory) == []


def test_sigterm_during_start_leaves_nothing(environment: dict[str, str], directory: Path) -> None:
    demo = subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: list(directory.glob("send-queue-demo-*/postgres/*")))
    demo.terminate()
    assert demo.wait(20) == 128 + signal.SIGTERM
    assert left_behind(directory) == []


def test_run_serves_until_ctrl_c(environment: dict[str, str], directory: Path) -> None:
    copy = directory / "clone"  # with a pgdata of its own
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "pgdata", "tests"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name in ("QUINN_DB_URL", "QUINN_ICLOUD_DB_URL", "MAC_SYNC_BASE_URL", "MAC_SYNC_SERVICE_TOKEN"):
        environment.pop(name, None)
    output = directory / "output.txt"
    with output.open("w") as stream:
        run = subprocess.Popen(
            [sys.executable, "demo/demo.py", "--run"],
            cwd=copy,
            env={**environment, "SEND_QUEUE_PORT": port},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        wait_until(lambda: all(phrase in output.read_text() for phrase in ("listening", "starting")))
        # The latter at night, by the settings that migrate makes.
        wait_until(
            lambda: any(verdict in output.read_text() for verdict in ("nothing to send", "is held: quiet hours"))
        )
        assert "quiet hours 21:00 to 08:00 (local time), at most 2 a minute" in output.read_text()
        commands = output.read_text().split("\n\n  ")[1:3]
        done = subprocess.run(["bash", "-c", "\n".join(commands)], capture_output=True, text=True, check=True)
        assert '"sendQueueId"' in done.stdout
        assert '"toHandle":"+12015550123"' in done.stdout
    finally:
        os.killpg(run.pid, signal.SIGINT)
        status = run.wait(20)
    assert status == 130
    assert "outreach-dispatcher stopped" in output.read_text()
    assert "send-queue-server stopped" in output.read_text()
    assert left_behind(directory) == []


@pytest.mark.parametrize("where", ["the environment", ".env"])
@pytest.mark.parametrize("variable", ["QUINN_DB_URL", "QUINN_ICLOUD_DB_URL"])
def test_run_refuses_real_databases(environment: dict[str, str], directory: Path, variable: str, where: str) -> None:
    copy = directory / "clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "pgdata", "tests"))
    for name in ("QUINN_DB_URL", "QUINN_ICLOUD_DB_URL", "MAC_SYNC_SERVICE_TOKEN"):
        environment.pop(name, None)
    if where == ".env":
        (copy / ".env").write_text(f"{variable}=postgresql://127.0.0.1:1/real\n")
    else:
        environment[variable] = "postgresql://127.0.0.1:1/real"
    done = subprocess.run(
        [sys.executable, "demo/demo.py", "--run"],
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("demo.py: `make run` uses only its own ./pgdata")
    assert f" Unset {variable} " in done.stderr
    assert "run `python send_queue_server.py` and `python dispatcher.py`" in done.stderr
    assert done.stdout == ""
