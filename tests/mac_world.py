"""A Mac for the tests of the sender: its stand-ins, a server in memory, a clock that only moves when somebody waits.

In a `World` the sender runs in the test's own process, so that hours pass in milliseconds, and an exception takes the
place of kill -9 (`Killed`). doomed_sender.py runs the real process, over the same stand-ins.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract_server
import fake_messages
import mac_sender

NOON = 1_795_608_000.0  # some Wednesday in November 2026, in UTC
HANDLE = "+14155550123"
TOKEN = "device-token-0123456789"


class Killed(BaseException):
    """The process ends here, as with kill -9: no handler of the product may catch this."""


class Clock(fake_messages.Clock):
    """A clock that moves when somebody sleeps, and lets Messages do what is due meanwhile."""

    def __init__(self) -> None:
        self.wall = NOON
        self.monotonic = 1000.0
        self.messages: fake_messages.Messages | None = None
        self.alarms: list[tuple[float, Callable[[], object]]] = []

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something so many seconds from now."""
        self.alarms.append((self.monotonic + seconds, action))

    def now(self) -> float:
        return self.wall

    def awake(self) -> float:
        return self.monotonic

    def sleep(self, seconds: float) -> None:
        end = self.monotonic + seconds
        while self.messages:
            due = self.messages.next_due()
            alarm = min(self.alarms, key=lambda alarm: alarm[0], default=(end + 1, None))
            if due is not None and due <= min(end, alarm[0]):
                self._move(due)
                self.messages.advance()
            elif alarm[1] and alarm[0] <= end:
                self.alarms.remove(alarm)
                self._move(alarm[0])
                alarm[1]()
            else:
                break
        self._move(end)

    def _move(self, monotonic: float) -> None:
        if monotonic > self.monotonic:
            self.wall += monotonic - self.monotonic
            self.monotonic = monotonic

    def sleep_mac(self, seconds: float) -> None:
        """The Mac sleeps: nothing on it moves but the time of day."""
        self.wall += seconds


Hook = Callable[[str, str], None]


class Mac(mac_sender.Mac):
    """The product's seam, with programs that run in this process. `hook(moment, what)` is called around each."""

    def __init__(self, config: mac_sender.Config, clock: Clock, messages: fake_messages.Messages, hook: Hook) -> None:
        super().__init__(config)
        self.clock = clock
        self.fake = messages
        self.hook = hook
        self.room = 10**12
        self.chat_error: Exception | None = None
        self.open_error: OSError | None = None
        self.uid_here = os.getuid()

    def now(self) -> float:
        return self.clock.now()

    def awake(self) -> float:
        return self.clock.awake()

    def sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    def uid(self) -> int:
        return self.uid_here

    def free_bytes(self) -> int:
        return self.room

    def open_file(self, path: Path) -> None:
        if self.open_error:
            raise self.open_error
        super().open_file(path)

    def connect(self, uri: str) -> sqlite3.Connection:
        if self.chat_error and "immutable" not in uri:
            raise self.chat_error
        return super().connect(uri)

    def run(self, *command: str, text: str = "", limit: float = 10) -> mac_sender.Ran:
        name = Path(command[0]).name
        if name != "osascript":
            return self.run_small(name, command)
        self.hook("before", "probe" if len(command) < 3 else "osascript")
        self.fake.kill_at = self.clock.awake() + limit
        try:
            ran = mac_sender.Ran(*fake_messages.osascript(self.fake, text, list(command[2:])))
        except fake_messages.Hangs:
            ran = mac_sender.Ran(None, "")
        self.hook("after", "probe" if len(command) < 3 else "osascript")
        return ran

    def run_small(self, name: str, command: tuple[str, ...]) -> mac_sender.Ran:
        files = {"ioreg": "ioreg", "sw_vers": "version", "permission": "permission", "pmset": "pmset"}
        if name in files:
            return mac_sender.Ran(0, (self.fake.directory / f"{files[name]}.txt").read_text().strip())
        if command[1] == "managername":
            return mac_sender.Ran(0, "Aqua")
        return super().run(*command)


class Journal(mac_sender.Journal):
    """The product's journal, which calls the hook around each commit."""

    def __init__(self, path: Path, hook: Hook) -> None:
        super().__init__(path)
        self.connection.execute("PRAGMA synchronous = OFF")  # no test cuts the power
        self.hook = hook

    def write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        what = " ".join(statements[0][0].split()[:4]) if statements else "nothing"
        self.hook("before", f"journal {what}")
        super().write(*statements)
        self.hook("after", f"journal {what}")


class World:
    """A Mac with a sender, and a server that it polls."""

    def __init__(self, path: Path, version: str = "26.1", **settings: Any) -> None:
        self.path = path
        self.home = path / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self.clock = Clock()
        self.hook: Hook = lambda moment, what: None
        self.server = contract_server.ContractServer(TOKEN, self.clock.now)
        programs = fake_messages.make_mac(path / "mac", version)
        self.messages = fake_messages.Messages(path / "mac", self.clock)
        self.clock.messages = self.messages
        self.settings: dict[str, Any] = {
            **programs, "url": self.server.url, "token": TOKEN, "hardware_uuid": fake_messages.HARDWARE_UUID,
            "uid": os.getuid(), "installed_at": NOON - 60, **settings,
        }  # fmt: skip
        self.journal = Journal(self.home / "journal.db", self.call_hook)
        self.start()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.journal.close()
        self.messages.close()

    def start(self, **settings: Any) -> None:
        """Start the sender, or start it again."""
        self.journal.close()
        self.settings.update(settings)
        mac_sender.write_config(self.home, self.settings)
        config = mac_sender.load_config(self.home)
        self.mac = Mac(config, self.clock, self.messages, self.call_hook)
        self.journal = Journal(self.home / "journal.db", self.call_hook)
        self.sender = mac_sender.Sender(config, self.mac, self.journal)
        self.sender.server._exchange = self.exchange  # type: ignore[method-assign]

    def call_hook(self, moment: str, what: str) -> None:
        self.hook(moment, what)

    def exchange(self, method: str, path: str, body: Any) -> Any:
        """Ask the server without a socket; test_mac_server.py has those, and so has the real process."""
        what = f"{method} {path.rpartition('/')[2].partition('?')[0]}"
        self.hook("before", what)
        content = b"" if body is None else json.dumps({**body, "instance": self.sender.config.instance}).encode()
        token = f"Bearer {self.sender.config.token}"
        status, headers, value = self.server.exchange(method, mac_sender.PATH + path, token, content)
        self.hook("after", what)
        return status, {"Date": None, **headers}, json.dumps(value).encode()

    def round(self) -> None:
        self.clock.sleep(self.sender.round())

    def run(self, seconds: float) -> None:
        end = self.clock.awake() + seconds
        while self.clock.awake() < end:
            self.round()

    def settle(self, seconds: float = 3 * 3600) -> None:
        """Run until every row of the server has ended and this Mac has nothing more to report."""
        end = self.clock.awake() + seconds
        while self.clock.awake() < end:
            self.round()
            if self.server.is_quiet() and not self.journal.unreported() and not self.journal.undecided():
                return

    def send(
        self, text: str = "Hello!", handle: str = HANDLE, *acts: fake_messages.Act, **columns: Any
    ) -> dict[str, Any]:
        """Enqueue a message, let this happen to it, and run until it has ended. Returns the server's newest row."""
        if acts:
            self.messages.expect(*acts, text=text)
        item = self.server.enqueue(handle, text, **columns)["batchItemId"]
        self.settle()
        return self.server.row(item)

    def outcome(self, row: dict[str, Any]) -> str:
        return str(row["outcome"] or row["status"])

    def problem(self) -> str:
        return self.sender.problem or ""

    def journal_text(self) -> str:
        """Everything that the sender wrote to its folder, as one text."""
        files = [path for path in self.home.rglob("*") if path.is_file()]
        return "".join(path.read_bytes().decode("latin-1") for path in files)

    def set_file(self, name: str, text: str) -> None:
        (self.path / "mac" / name).write_text(text)

    def scenario(self, *acts: fake_messages.Act, **settings: Any) -> None:
        self.messages.expect(*acts, **settings)


def truth(world: World) -> list[str]:
    """Compare the server's results with the Mac's own book. Returns what is wrong.

    A text stands for one item here. Nothing leaves twice; what is `sent` left, and chat.db says so; what is `failed`
    for certain did not leave.
    """
    wrong = []
    left = [text for _, text in world.messages.left()]
    confirmed = set()
    for text, body in world.messages.chat.execute("SELECT text, attributedBody FROM message WHERE is_sent = 1"):
        confirmed.add(mac_sender.fold(text if text is not None else mac_sender.decode_body(body) or ""))
    for text in sorted(set(left)):
        if left.count(text) > 1:
            wrong.append(f"{text!r} left {left.count(text)} times")
    for row in world.server.rows.values():
        text, outcome = row["body"], world.outcome(row)
        if outcome == "sent" and (text not in left or mac_sender.fold(text) not in confirmed):
            wrong.append(f"{text!r} is `sent`, and did not leave")
        if outcome == "failed" and not row["withdrawn"] and text in left:
            wrong.append(f"{text!r} is `failed`, and left")
    return wrong
