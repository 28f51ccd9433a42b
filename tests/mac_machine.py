"""A Mac of real processes, for test_mac_processes.py and test_mac_commands.py.

The sender (under Python 3.9, where there is one), Messages and osascript each run in a process of their own, and the
server listens on a socket.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import contract_server
import fake_messages
import mac_folder

ROOT = Path(__file__).parent.parent
SENDER = ROOT / "mac/mac_sender.py"
DOOMED = ROOT / "tools/doomed_sender.py"
TOKEN = "device-token-0123456789"


@functools.cache
def mac_python() -> str:
    """A Python 3.9, which is what macOS has, else this one. MAC_PYTHON names another."""
    if found := os.environ.get("MAC_PYTHON"):
        return found
    pyenv = sorted((Path.home() / ".pyenv/versions").glob("3.9*/bin/python3.9"))
    for candidate in [*map(str, pyenv), "python3.9"]:
        with contextlib.suppress(OSError):
            if subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
                return candidate
    return sys.executable


class Machine:
    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.home = path / "home"
        self.home.mkdir(parents=True)
        self.server = contract_server.ContractServer(TOKEN)
        self.programs = fake_messages.make_mac(path / "mac")
        self.messages = fake_messages.Messages(path / "mac")
        self.settings = mac_folder.config(self.programs, **{"url": self.server.url, "token": TOKEN, **settings})
        (self.home / "config.json").write_text(json.dumps(self.settings))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.app = self.start_app()

    def __enter__(self) -> Machine:
        self.server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.server.__exit__()
        self.messages.close()

    def start_app(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "tools/fake_messages.py"), "app", str(self.path / "mac")]
        self.processes.append(subprocess.Popen(command))
        return self.processes[-1]

    def start(self, *arguments: str, script: Path = DOOMED, **environment: str) -> subprocess.Popen[bytes]:
        """Start the sender in a process of its own."""
        values = {**mac_folder.ENVIRONMENT, "STEPS": str(self.path / "steps.txt"), **environment}
        command = [mac_python(), str(script), "--home", str(self.home), *(arguments or ("run",))]
        with (self.path / "stderr.txt").open("ab") as stderr:
            process = subprocess.Popen(
                command, env={**os.environ, "HOME": str(self.path), **values}, stdin=subprocess.DEVNULL,
                stdout=stderr, stderr=stderr,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def call(self, *arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the product itself to its end."""
        command = [mac_python(), str(SENDER), "--home", str(self.home), *arguments]
        return subprocess.run(
            command, env={**os.environ, "HOME": str(self.path), **environment}, input=text, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    def enqueue(self, *texts: str, handle: str = "+14155550123") -> list[dict[str, Any]]:
        return [self.server.enqueue(handle, text) for text in texts]

    def truth(self) -> list[str]:
        """Compare the results with what left; each text stands for one message."""
        wrong = []
        left = [text for _, text in self.messages.left()]
        for row in self.server.rows.values():
            outcome, times = row["outcome"] or row["status"], left.count(row["body"])
            if times > 1 or (outcome == "sent" and times == 0) or (outcome == "failed" and times > 0):
                wrong.append(f"{row['body']!r} is {outcome} and left {times} times")
        return wrong


class Usage(NamedTuple):
    """What Linux says of a process."""

    rss: int  # bytes
    peak: int  # bytes, the highest that `rss` has been
    cpu: float  # seconds of its own
    programs: float  # seconds of the programs that it ran


def usage(pid: int) -> Usage:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, child_user, child_system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:15])
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert peak
    return Usage(pages * os.sysconf("SC_PAGE_SIZE"), int(peak[1]) * 1024, user + system, child_user + child_system)


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    """Return the first true value of `look`, asked again and again."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.02)
    return found
