"""The real sender as a process that may be killed at any step: for test_mac_processes.py and chaos.py.

Each commit of the journal, each run of a program and each request is a step, before it and after it. The process
writes them down in STEPS, and ends itself with SIGKILL at the one with the number DIE_AT, at the first one with the
name DIE_IN, or at each with the probability DIE_RATE. CONSTANTS replaces waiting times of the product.

If SLEEPS names a directory, the Mac sleeps there: at the step that the file `sleep_at` names, the process makes the
file `asleep`, and goes on when that is gone. The time of day of this Mac is ahead by the seconds in the file `slept`;
its monotonic clock stood still. While the file that DENIED names exists, the sender has no Full Disk Access. Example:

    DIE_AT=17 STEPS=steps.txt python tools/doomed_sender.py --home DIRECTORY run
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "mac"))

import mac_sender

die_at = int(os.environ.get("DIE_AT", "0"))
die_rate = float(os.environ.get("DIE_RATE", "0"))
die_in = os.environ.get("DIE_IN", "")
denied = Path(os.environ["DENIED"]) if "DENIED" in os.environ else None
sleeps = Path(os.environ["SLEEPS"]) if "SLEEPS" in os.environ else None
steps = Path(os.environ["STEPS"]) if "STEPS" in os.environ else None
count = 0


def step(what: str) -> None:
    global count
    count += 1
    if steps:
        with steps.open("a") as file:
            file.write(what + "\n")
    if count == die_at or what == die_in or random.random() < die_rate:
        os.kill(os.getpid(), signal.SIGKILL)
    if sleeps and (sleeps / "sleep_at").exists() and (sleeps / "sleep_at").read_text() == what:
        (sleeps / "sleep_at").unlink()
        (sleeps / "asleep").touch()
        while (sleeps / "asleep").exists():
            time.sleep(0.005)


class Journal(mac_sender.Journal):
    def write(self, *statements: Any) -> None:
        is_state = statements and statements[0][0].startswith("UPDATE messages SET state")
        what = f"write {statements[0][1][0]}" if is_state else "write"
        step(f"before {what}")
        super().write(*statements)
        step(f"after {what}")


class Mac(mac_sender.Mac):
    def now(self) -> float:
        return super().now() + (float((sleeps / "slept").read_text()) if sleeps else 0)

    def open_file(self, path: Path) -> None:
        if denied and denied.exists():
            raise PermissionError(errno.EPERM, "Operation not permitted")
        super().open_file(path)

    def run(self, *command: str, text: str = "", limit: float = 10) -> mac_sender.Ran:
        what = Path(command[0]).name + ("" if len(command) < 3 else " send")
        step(f"before {what}")
        ran = super().run(*command, text=text, limit=limit)
        step(f"after {what}")
        return ran


class Server(mac_sender.Server):
    def _exchange(self, method: str, path: str, body: Any) -> Any:
        what = f"{method} {path.rpartition('/')[2]}"
        step(f"before {what}")
        response = super()._exchange(method, path, body)
        step(f"after {what}")
        return response


if __name__ == "__main__":
    for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
        setattr(mac_sender, name, value)
    mac_sender.Journal = Journal  # type: ignore[misc]
    mac_sender.Mac = Mac  # type: ignore[misc]
    mac_sender.Server = Server  # type: ignore[misc]
    sys.exit(mac_sender.main())
