"""Make the folder of a Mac with the real sender over fake_messages.py, and read what really left it.

Used by the demo, by chaos.py and by the tests' machine. Two processes run over a folder: Messages (`APP`) and the
sender (`SENDER`). Three records tell what happened: the stand-in's own book (what left), chat.db (what Messages shows),
and the sender's journal (what the sender believes). Example:

    mac_folder.make(path, "http://127.0.0.1:3201", token); ...
    mac_folder.read(path).left
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fake_messages
import mac_sender

SENDER = "tools/doomed_sender.py"
APP = "tools/fake_messages.py"
# The sender's waiting times, in seconds, so that a run takes seconds instead of hours. Messages' own are as short.
CONSTANTS = {
    "NO_ROW_SECONDS": 2, "SETTLE_SECONDS": 1.5, "BACK_OFF_SECONDS": [0.05, 0.4], "KILL_SECONDS": 6, "PROBE_SECONDS": 1,
}  # fmt: skip
ENVIRONMENT = {"CONSTANTS": json.dumps(CONSTANTS)}


class Send(NamedTuple):
    """A message that left the Mac, or that osascript was asked to send."""

    at: float  # seconds since 1970
    address: str
    text: str


class Known(NamedTuple):
    """What the journal says of an attempt to send an item's message."""

    item_id: str
    attempt: int
    queue_id: str
    state: str
    error: str | None


class Row(NamedTuple):
    """A message from this Mac in chat.db. `state`: as the sender reads it (`sent`, `failing`, `outbox`)."""

    state: str
    text: str


class Records(NamedTuple):
    left: list[Send]
    asked: list[Send]
    rows: list[Row]
    journal: list[Known]


def make(path: Path, url: str, token: str, uuid: str = fake_messages.HARDWARE_UUID, **settings: Any) -> None:
    """Make the Mac's folder, with config.json as `install` writes it."""
    programs = fake_messages.make_mac(path / "mac")
    (path / "mac/ioreg.txt").write_text(f'    | |   "IOPlatformUUID" = "{uuid}"\n')
    (path / "home").mkdir()
    mac_sender.write_config(path / "home", config(programs, url, token, hardware_uuid=uuid, **settings))
    messages(path).close()  # makes the book


def config(programs: dict[str, Any], url: str, token: str, **settings: Any) -> dict[str, Any]:
    """Return the values of config.json. Polls and pauses are short, and no ceiling is near."""
    return {
        **programs, "url": url, "token": token, "hardware_uuid": fake_messages.HARDWARE_UUID, "uid": os.getuid(),
        "installed_at": time.time() - 60, "poll_seconds": 0.1, "pause_seconds": 0, "ceiling_per_hour": 10**6,
        "ceiling_per_day": 10**6, **settings,
    }  # fmt: skip


def messages(path: Path) -> fake_messages.Messages:
    """Open the Messages of a Mac, to say what happens to a message, or to receive one."""
    return fake_messages.Messages(path / "mac")


def quick(delivered: float | None = 0.1) -> fake_messages.Act:
    """A message whose row is there, and sent, in a tenth of a second."""
    steps: list[list[Any]] = [[0.05, {"is_sent": 1, "is_finished": 1}]]
    if delivered is not None:
        steps.append([delivered, {"is_delivered": 1}])
    return {"rows": [{"after": 0.02, "steps": steps, "leaves": 0.05}]}


def app_command(path: Path) -> tuple[str, ...]:
    return APP, "app", str(path / "mac")


def sender_command(path: Path) -> tuple[str, ...]:
    return SENDER, "--home", str(path / "home"), "run"


def is_stopped(path: Path) -> bool:
    """Return whether the sender waits for its owner to say `release`."""
    with contextlib.suppress(sqlite3.OperationalError), _reader(path / "home/journal.db") as journal:
        # Some stops are only in the problem that the sender reports: it names the command.
        problem = "SELECT 1 FROM meta WHERE name = 'problem' AND value LIKE '%release%'"
        return bool(journal.execute(f"SELECT 1 FROM stops UNION ALL {problem}").fetchall())
    return False


def release(path: Path) -> None:
    """Let a sender that has stopped go on, as its owner does."""
    with contextlib.closing(mac_sender.Journal(path / "home/journal.db")) as journal:
        journal.release(None, time.time())


def read(path: Path) -> Records:
    """Read the three records of a Mac, also while its processes run."""
    journal = "SELECT batch_item_id, attempt, queue_id, state, error FROM messages ORDER BY asked_at"
    sends = "SELECT at, address, text FROM {} ORDER BY at"
    with _reader(path / "mac/book.db") as book:
        left, asked = ([Send(*row) for row in book.execute(sends.format(name))] for name in ("sent", "asked"))
    with _reader(path / "mac/chat.db") as chat:
        rows = [_row(*row) for row in chat.execute(CHAT)]
    found: list[Known] = []
    with contextlib.suppress(sqlite3.OperationalError), _reader(path / "home/journal.db") as kept:
        found = [Known(*row) for row in kept.execute(journal)]  # without the table, the sender has not started yet
    return Records(left, asked, rows, found)


CHAT = "SELECT is_sent, is_finished, error, text, attributedBody FROM message WHERE is_from_me = 1"


def _row(is_sent: int, is_finished: int, error: int, text: str | None, body: bytes | None) -> Row:
    state = "sent" if is_sent and is_finished else "failing" if error else "outbox"
    return Row(state, text if text is not None else mac_sender.decode_body(body) or "")


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(str(path), timeout=30)) as connection:
        yield connection
