"""The real sender as a process that may be killed at any step: for test_mac_processes.py.

Each commit of the journal, each run of a program and each request is a step, before it and after it. The process writes
them down in STEPS, and ends itself with SIGKILL at the one with the number DIE_AT, or at each with the probability
DIE_RATE. CONSTANTS replaces waiting times of the product. Example:

    DIE_AT=17 STEPS=steps.txt python tests/doomed_sender.py --home DIRECTORY run
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "mac"))

import mac_sender

die_at = int(os.environ.get("DIE_AT", "0"))
die_rate = float(os.environ.get("DIE_RATE", "0"))
steps = Path(os.environ["STEPS"])
count = 0


def step(what: str) -> None:
    global count
    count += 1
    with steps.open("a") as file:
        file.write(what + "\n")
    if count == die_at or random.random() < die_rate:  # noqa: S311  # dice, not secrets
        os.kill(os.getpid(), signal.SIGKILL)


class Journal(mac_sender.Journal):
    def write(self, *statements: Any) -> None:
        step("before write")
        super().write(*statements)
        step("after write")


class Mac(mac_sender.Mac):
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
