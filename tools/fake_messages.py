"""Stand in for Messages.app, osascript, chat.db and a few more programs of a Mac. For tests and for the demo.

`make_mac` fills a directory: chat.db as one of macOS 12, 13, 15, 26, 27 has it; executables (osascript, ioreg,
launchctl, caffeinate, pmset, sw_vers, permission); scenario.json, which says what happens to each message; and book.db,
which knows what really left the Mac. The osascript reads the real script from its standard input, runs it as Apple's
would, and refuses what Messages refuses. What Messages does later with a message (rows, receipts, re-sends) is written
to the book as events. Another process, or a test with a clock of its own, carries them out when they are due:

    python tools/fake_messages.py app DIRECTORY

A scenario is {"accounts": [{"type": "iMessage", "enabled": true}], "error": 0, "rules": [RULE, ...]}. Every Apple event
ends in `error`, unless that is 0. The first rule that fits a message decides: {"to": "", "text": "part of it",
"times": 1, "act": ACT}. The functions under "acts" make an ACT.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Act = dict[str, Any]
APPLE_EPOCH = 978_307_200  # 2001-01-01 UTC, in seconds since 1970
HARDWARE_UUID = "8F7C2D7A-1111-5222-9333-ABCDEF012345"
OWNER = "E:owner@example.com"  # the account that messages leave from

SCHEMA = """
    CREATE TABLE handle (ROWID INTEGER PRIMARY KEY AUTOINCREMENT UNIQUE, id TEXT NOT NULL, country TEXT,
        service TEXT NOT NULL, uncanonicalized_id TEXT, person_centric_id TEXT, UNIQUE (id, service));
    CREATE TABLE chat (ROWID INTEGER PRIMARY KEY AUTOINCREMENT, guid TEXT UNIQUE NOT NULL, style INTEGER,
        state INTEGER, account_id TEXT, properties BLOB, chat_identifier TEXT, service_name TEXT, room_name TEXT,
        account_login TEXT,
        is_archived INTEGER DEFAULT 0, last_addressed_handle TEXT, display_name TEXT, group_id TEXT,
        is_filtered INTEGER,
        successful_query INTEGER);
    CREATE TABLE message (ROWID INTEGER PRIMARY KEY AUTOINCREMENT, guid TEXT UNIQUE NOT NULL, text TEXT,
        replace INTEGER DEFAULT 0, service_center TEXT, handle_id INTEGER DEFAULT 0, subject TEXT, country TEXT,
        attributedBody BLOB, version INTEGER DEFAULT 0, type INTEGER DEFAULT 0, service TEXT, account TEXT,
        account_guid TEXT, error INTEGER DEFAULT 0, date INTEGER, date_read INTEGER, date_delivered INTEGER,
        is_delivered INTEGER DEFAULT 0, is_finished INTEGER DEFAULT 0, is_emote INTEGER DEFAULT 0,
        is_from_me INTEGER DEFAULT 0, is_empty INTEGER DEFAULT 0, is_delayed INTEGER DEFAULT 0,
        is_auto_reply INTEGER DEFAULT 0, is_prepared INTEGER DEFAULT 0, is_read INTEGER DEFAULT 0,
        is_system_message INTEGER DEFAULT 0, is_sent INTEGER DEFAULT 0, has_dd_results INTEGER DEFAULT 0,
        is_service_message INTEGER DEFAULT 0, is_forward INTEGER DEFAULT 0, was_downgraded INTEGER DEFAULT 0,
        item_type INTEGER DEFAULT 0, associated_message_guid TEXT, associated_message_type INTEGER DEFAULT 0,
        balloon_bundle_id TEXT, destination_caller_id TEXT);
    CREATE TABLE chat_message_join (chat_id INTEGER, message_id INTEGER, message_date INTEGER DEFAULT 0,
        PRIMARY KEY (chat_id, message_id));
    CREATE TABLE chat_handle_join (chat_id INTEGER, handle_id INTEGER, UNIQUE (chat_id, handle_id));
    CREATE INDEX message_idx_date ON message (date);
"""
NEWER_COLUMNS = (
    (13, "date_retracted INTEGER"),
    (13, "date_edited INTEGER"),
    (15, "schedule_type INTEGER DEFAULT 0"),
    (15, "schedule_state INTEGER DEFAULT 0"),
    (27, "retry_count INTEGER DEFAULT 0"),
)
BOOK = """
    CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, due REAL NOT NULL, action TEXT NOT NULL);
    -- What really left this Mac.
    CREATE TABLE IF NOT EXISTS sent
        (at REAL NOT NULL, address TEXT NOT NULL, text TEXT NOT NULL, service TEXT NOT NULL);
    -- What osascript was asked to send.
    CREATE TABLE IF NOT EXISTS asked (at REAL NOT NULL, address TEXT, text TEXT, form TEXT);
    CREATE TABLE IF NOT EXISTS uses (rule INTEGER PRIMARY KEY, count INTEGER NOT NULL);
"""


# --- acts: what becomes of a message ------------------------------------------------------------------


def sent(after: float = 0.3, delivered: float | None = 2.0, leaves: float = 0.5, **row: Any) -> Act:
    """A row, sent `leaves` seconds later, and delivered so long after that. `row`: see `Messages.insert`."""
    steps: list[list[Any]] = [[after + leaves, {"is_sent": 1, "is_finished": 1}]]
    if delivered is not None:
        steps.append([after + leaves + delivered, {"is_delivered": 1}])
    return {"rows": [{"after": after, "steps": steps, "leaves": after + leaves, **row}]}


def fails(number: int, after: float = 0.3, error_after: float = 2.0, **row: Any) -> Act:
    """A row that ends in an error."""
    return {"rows": [{"after": after, "steps": [[error_after, {"error": number, "is_finished": 1}]], **row}]}


def fails_then_sms(number: int = 22, again: float = 60.0) -> Act:
    """A row that fails, and that Messages then sends over SMS by itself."""
    steps = [
        [2.0, {"error": number, "is_finished": 1}],
        [again, {"service": "SMS", "error": 0, "is_finished": 0}],
        [again + 2, {"is_sent": 1, "is_finished": 1}],
    ]
    return {"rows": [{"after": 0.3, "steps": steps, "leaves": again + 2}]}


def outbox(leaves: float | None = None) -> Act:
    """A row that stays in the outbox, for ever or until it leaves."""
    steps = [] if leaves is None else [[leaves, {"is_sent": 1, "is_finished": 1}]]
    return {"rows": [{"after": 0.3, "steps": steps, "leaves": leaves}]}


def vanishes(leaves: float | None = None) -> Act:
    """No row at all. The message leaves all the same, or it does not."""
    return {"rows": [], "leaves": leaves}


def error(phase: str, number: int, then: Act | None = None) -> Act:
    """An error while resolving the `account` or the address (`resolve`), or at `dispatch`, and what happens then."""
    return {**(then or {"rows": []}), "error": [phase, number]}


def slow(seconds: float, then: Act, phase: str = "dispatch") -> Act:
    """An Apple event that takes long. Messages acts on the one for `send` also when osascript was killed meanwhile."""
    return {**then, "takes": seconds, "slow_phase": phase}


def dies(phase: str, then: Act) -> Act:
    """osascript is killed in this phase; at `dispatch`, after Messages has the message."""
    return {**then, "takes": 0, "slow_phase": phase, "dies": True}


def with_url(url: str, then: Act | None = None) -> Act:
    """The row, and 1.5 s later a second one for the preview of a URL."""
    balloon = {
        "after": 1.8, "text": url, "balloon_bundle_id": "com.apple.messages.URLBalloonProvider",
        "steps": [[2.0, {"is_sent": 1, "is_finished": 1}]],
    }  # fmt: skip
    act = then or sent()
    return {**act, "rows": [*act["rows"], balloon]}


def twice(then: Act | None = None) -> Act:
    """Two equal rows for one message, as Messages makes them for a message to oneself."""
    act = then or sent()
    return {**act, "rows": [*act["rows"], {**act["rows"][0], "leaves": None}]}


# --- typedstream --------------------------------------------------------------------------------------


def encode_body(text: str, mutable: bool = False) -> bytes:
    """Encode an attributed string as NSArchiver does."""
    data = text.encode()
    if len(data) < 0x80:
        length = bytes([len(data)])
    elif len(data) < 0x1_0000:
        length = b"\x81" + len(data).to_bytes(2, "little")
    else:
        length = b"\x82" + len(data).to_bytes(4, "little")
    kinds = (b"NSMutableAttributedString", b"NSMutableString") if mutable else (b"NSAttributedString", b"")
    outer = bytes([len(kinds[0])]) + kinds[0] + b"\x00"
    if mutable:
        outer += b"\x84\x84\x12NSAttributedString\x00"
    inner = b"\x84\x84\x84" + (b"\x0fNSMutableString\x01\x84\x84" if mutable else b"") + b"\x08NSString\x01"
    attributes = b"\x84\x02iI\x01\x0e\x92\x84\x84\x84\x0cNSDictionary\x00\x94\x84\x01i\x01\x86\x86\x86"
    head = b"\x04\x0bstreamtyped\x81\xe8\x03\x84\x01@\x84\x84\x84" + outer + b"\x84\x84\x08NSObject\x00\x85\x92"
    return head + inner + b"\x95\x84\x01+" + length + data + b"\x86" + attributes


# --- Messages.app -------------------------------------------------------------------------------------


class Clock:
    """The host's time. A test has one of its own, with a Mac that sleeps.

    For processes, the file `slept` of the directory says how many seconds the time of day is ahead of the host's.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.slept = directory / "slept" if directory else None

    def now(self) -> float:
        return time.time() + (float(self.slept.read_text()) if self.slept and self.slept.exists() else 0)

    def awake(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Messages:
    """chat.db and the book of one directory."""

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self.directory = directory
        self.clock = clock or Clock(directory)
        self.kill_at: float | None = None  # when osascript is killed, if it runs in the test's own process
        self.chat_path = directory / "chat.db"
        self.chat = self._open(self.chat_path)
        self.book = self._open(directory / "book.db")
        self.book.executescript(BOOK)

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(str(path), timeout=30, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = OFF")  # no test cuts the power
        connection.execute("PRAGMA journal_mode = WAL")
        return connection

    def close(self) -> None:
        self.chat.close()
        self.book.close()

    @property
    def scenario(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "scenario.json").read_text())
        return found

    def expect(self, *acts: Act, text: str = "", to: str = "", times: int | None = 1, **settings: Any) -> None:
        """Change the scenario: each act happens to the next message that fits, `times` times (None: always)."""
        scenario = {**self.scenario, **settings}
        rules = [{"to": to, "text": text, "times": times, "act": act} for act in acts]
        scenario["rules"] = [*scenario["rules"], *rules]
        path = self.directory / "scenario.new"
        path.write_text(json.dumps(scenario))
        path.replace(self.directory / "scenario.json")

    def choose(self, address: str, text: str) -> Act:
        """Return the act of the first rule that fits and is not used up."""
        for number, rule in enumerate(self.scenario["rules"]):
            if rule["to"] not in ("", address) or rule["text"] not in text:
                continue
            count = "INSERT INTO uses VALUES (?, 1) ON CONFLICT (rule) DO UPDATE SET count = count + 1"
            used = self.book.execute("SELECT count FROM uses WHERE rule = ?", (number,)).fetchone()
            if rule["times"] is None or (used[0] if used else 0) < rule["times"]:
                self.book.execute(count, (number,))
                act: Act = rule["act"]
                return act
        return sent()

    def accept(self, address: str, text: str, service: str, act: Act) -> None:
        """Take a message from osascript: from here on nothing stops it."""
        start = self.clock.awake()
        events: list[tuple[float, dict[str, Any]]] = []
        for row in act["rows"]:
            guid = str(uuid.uuid4()).upper()
            columns = {name: value for name, value in row.items() if name not in ("after", "steps", "leaves")}
            insert = {"do": "insert", "guid": guid, "address": address, "service": service, "text": text, **columns}
            events.append((start + row["after"], insert))
            events += [(start + after, {"do": "update", "guid": guid, "set": values}) for after, values in row["steps"]]
            if "join_after" in row:
                events.append(
                    (start + row["after"] + row["join_after"], {"do": "join", "guid": guid, "address": address})
                )
        for leaves in [row.get("leaves") for row in act["rows"]] + [act.get("leaves")]:
            if leaves is not None:
                events.append((start + leaves, {"do": "leave", "address": address, "text": text, "service": service}))
        sql = "INSERT INTO events (due, action) VALUES (?, ?)"
        self.book.execute("BEGIN IMMEDIATE")
        self.book.executemany(sql, [(due, json.dumps(action)) for due, action in events])
        self.book.execute("COMMIT")

    def advance(self) -> None:
        """Do what is due. An event may be done twice by processes that are killed: it changes nothing then."""
        sql = "SELECT id, action FROM events WHERE due <= ? ORDER BY due, id"
        for event_id, action in self.book.execute(sql, (self.clock.awake(),)).fetchall():
            event = json.loads(action)
            kind = event.pop("do")
            if kind == "insert":
                self.insert(**event)
            elif kind == "update":
                self.update(event["guid"], **event["set"])
            elif kind == "join":
                self.join(event["guid"], event["address"])
            self.book.execute("BEGIN IMMEDIATE")
            done = self.book.execute("DELETE FROM events WHERE id = ?", (event_id,)).rowcount
            if kind == "leave" and done:
                values = (self.clock.now(), event["address"], event["text"], event["service"])
                self.book.execute("INSERT INTO sent VALUES (?, ?, ?, ?)", values)
            self.book.execute("COMMIT")

    def take(self, seconds: float) -> None:
        """Let osascript wait. Raises Hangs if it is killed before the end of that."""
        rest = self.kill_at - self.clock.awake() if self.kill_at is not None else seconds
        self.clock.sleep(min(seconds, rest))
        if rest < seconds:
            raise Hangs

    def next_due(self) -> float | None:
        found: float | None = self.book.execute("SELECT min(due) FROM events").fetchone()[0]
        return found

    def insert(
        self, address: str, text: str, service: str = "iMessage", guid: str = "", from_me: bool = True,
        date: float | None = None, handle: str | None = None, with_handle: bool = True, with_join: bool = True,
        text_column: bool = False, mutable: bool = False, join_after: float | None = None, style: int = 45,
        **columns: Any,
    ) -> str:  # fmt: skip
        """Add a row to chat.db. `handle`: another address than the right one; `with_handle`: else handle_id is 0."""
        row = {
            "guid": guid or str(uuid.uuid4()).upper(),
            "text": text if text_column or self.version < 13 else None,
            "attributedBody": encode_body(text, mutable),
            "handle_id": self.handle_id(handle or address, service) if with_handle else 0,
            "service": service,
            "account": OWNER,
            "date": int(((self.clock.now() if date is None else date) - APPLE_EPOCH) * 1e9),
            "is_from_me": int(from_me),
            "is_finished": int(not from_me),
            **columns,
        }
        sql = f"INSERT OR IGNORE INTO message ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        self.chat.execute(sql, tuple(row.values()))
        if with_join and join_after is None:
            self.join(row["guid"], handle or address, style)
        return str(row["guid"])

    def update(self, guid: str, **columns: Any) -> None:
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self.chat.execute(f"UPDATE message SET {assignments} WHERE guid = ?", (*columns.values(), guid))

    def delete(self, guid: str) -> None:
        self.chat.execute("DELETE FROM message WHERE guid = ?", (guid,))

    def handle_id(self, address: str, service: str) -> int:
        self.chat.execute("INSERT OR IGNORE INTO handle (id, service) VALUES (?, ?)", (address, service))
        sql = "SELECT ROWID FROM handle WHERE id = ? AND service = ?"
        return int(self.chat.execute(sql, (address, service)).fetchone()[0])

    def join(self, guid: str, address: str, style: int = 45) -> None:
        """Put a row into the chat with an address (style 45), or into a group (43)."""
        name = f"any;{'-' if style == 45 else '+'};{address}"
        insert = "INSERT OR IGNORE INTO chat (guid, style, chat_identifier) VALUES (?, ?, ?)"
        self.chat.execute(insert, (name, style, address if style == 45 else f"chat{abs(hash(address))}"))
        sql = """
            INSERT OR IGNORE INTO chat_message_join
            SELECT chat.ROWID, message.ROWID, message.date FROM chat, message WHERE chat.guid = ? AND message.guid = ?
        """
        self.chat.execute(sql, (name, guid))

    def receive(self, address: str, text: str, **columns: Any) -> str:
        """A message from somebody."""
        return self.insert(address, text, from_me=False, **columns)

    def rebuild(self, gap: int = 0) -> None:
        """Make chat.db anew, as Messages does: another file, with other ROWIDs."""
        rows = self.chat.execute("SELECT * FROM message ORDER BY date DESC").fetchall()
        names = [column[0] for column in self.chat.execute("SELECT * FROM message LIMIT 0").description]
        handles = self.chat.execute("SELECT ROWID, id, service FROM handle").fetchall()
        self.chat.close()
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.chat_path}{suffix}", f"{self.chat_path}{suffix}.old")
        make_chat(self.chat_path, self.version)
        self.chat = self._open(self.chat_path)
        self.chat.executemany("INSERT INTO handle (ROWID, id, service) VALUES (?, ?, ?)", handles)
        sql = f"INSERT INTO message ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        self.chat.executemany(sql, [(gap + number, *row[1:]) for number, row in enumerate(rows, 1)])

    @property
    def version(self) -> int:
        return int((self.directory / "version.txt").read_text().split(".")[0])

    def left(self, text: str | None = None) -> list[tuple[str, str]]:
        """Return what really left the Mac: address and text."""
        sql = "SELECT address, text FROM sent WHERE text = ? OR ? IS NULL ORDER BY at"
        return self.book.execute(sql, (text, text)).fetchall()

    def asked(self) -> list[tuple[str, str]]:
        """Return what osascript was asked to send: address and text."""
        return self.book.execute("SELECT address, text FROM asked ORDER BY at").fetchall()


def make_chat(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)
        for since, column in NEWER_COLUMNS:
            if version >= since:
                connection.execute(f"ALTER TABLE message ADD COLUMN {column}")


# --- osascript ----------------------------------------------------------------------------------------


class AppleError(Exception):
    """An AppleScript error with its number."""

    def __init__(self, number: int) -> None:
        super().__init__(str(number))
        self.number = number


class Hangs(Exception):
    """osascript was killed."""


class SyntaxProblem(Exception):
    """osascript cannot compile this."""


class Returned(Exception):
    """`return` was run."""


class Interpreter:
    """Run the part of AppleScript that a sender needs. Anything else is a syntax error (-2741)."""

    def __init__(self, messages: Messages, arguments: list[str]) -> None:
        self.messages = messages
        self.values: dict[str, Any] = {"argv": arguments}
        self.in_tell = False
        self.act: Act | None = None

    def run(self, source: str) -> str:
        lines = [line.strip() for line in source.splitlines() if line.strip()]
        if not lines or lines[0] != "on run argv" or lines[-1] != "end run":
            raise SyntaxProblem("the arguments are not those of `on run argv`")
        try:
            self.block(lines[1:-1])
        except Returned as value:
            return str(value)
        return ""

    def block(self, lines: list[str]) -> None:
        position = 0
        while position < len(lines):
            line = lines[position]
            kind = next(
                (kind for kind in ("try", "with timeout", "tell") if line.split(" of ")[0].startswith(kind)), None
            )
            if kind is None or " to " in line.split('"')[0]:
                self.statement(line)
                position += 1
                continue
            end = self.end_of(lines, position, kind.split()[-1])
            self.nested(kind, line, lines[position + 1 : end])
            position = end + 1

    @staticmethod
    def end_of(lines: list[str], start: int, word: str) -> int:
        depth = 0
        for position in range(start, len(lines)):
            opens = {"try": r"try", "timeout": r"with timeout of \d+ seconds", "tell": r'tell application "Messages"'}[
                word
            ]
            depth += bool(re.fullmatch(opens, lines[position]))
            depth -= lines[position] == f"end {word}"
            if depth == 0:
                return position
        raise SyntaxProblem(f"no end {word}")

    def nested(self, kind: str, line: str, body: list[str]) -> None:
        if kind == "tell":
            if line != 'tell application "Messages"':
                raise SyntaxProblem(line)
            self.in_tell = True
            try:
                self.block(body)
            finally:
                self.in_tell = False
        elif kind == "with timeout":
            self.block(body)
        else:
            self.attempt(body)

    def attempt(self, body: list[str]) -> None:
        depth, handler = 0, len(body)
        for position, line in enumerate(body):
            depth += (line == "try") - (line == "end try")
            if depth == 0 and line.startswith("on error"):
                handler = position
        outer = self.in_tell
        try:
            self.block(body[:handler])
        except AppleError as problem:
            self.in_tell = outer
            if handler < len(body):
                match = re.fullmatch(r"on error number (\w+)", body[handler])
                if not match:
                    raise SyntaxProblem(body[handler]) from None
                self.values[match[1]] = problem.number
                self.block(body[handler + 1 :])

    def statement(self, line: str) -> None:
        if match := re.fullmatch(r"set (\w+) to (.+)", line):
            self.values[match[1]] = self.value(match[2])
        elif match := re.fullmatch(r"if (.+) > (\w+) then return (.+)", line):
            if self.value(match[1]) > self.value(match[2]):
                raise Returned(self.value(match[3]))
        elif match := re.fullmatch(r"return (.+)", line):
            raise Returned(self.value(match[1]))
        elif match := re.fullmatch(r"send (\w+) to (\w+)", line):
            self.send(self.value(match[1]), self.value(match[2]))
        else:
            raise SyntaxProblem(line)

    def value(self, text: str) -> Any:
        if " & " in text:
            return "".join(str(self.value(part)) for part in text.split(" & "))
        if match := re.fullmatch(r'"([^"]*)"', text):
            return match[1]
        if match := re.fullmatch(r"\(?item (\d+) of argv\)?( as number)?", text):
            found = self.values["argv"][int(match[1]) - 1]
            return float(found) if match[2] else found
        if text == '((do shell script "/bin/date +%s") as number)':
            return float(int(self.messages.clock.now()))
        if text in self.values:
            return self.values[text]
        if not self.in_tell:
            raise SyntaxProblem(text)
        return self.ask_messages(text)

    # What Messages itself responds to.

    def ask_messages(self, text: str) -> Any:
        if number := self.messages.scenario["error"]:
            raise AppleError(number)
        noun = "service" if self.messages.version < 13 else "account"
        if text == f"count of {noun}s":
            return len(self.messages.scenario["accounts"])
        if match := re.fullmatch(rf"count of \({noun}s whose service type = (\w+)( and enabled = true)?\)", text):
            return len(self.accounts(match[1], bool(match[2])))
        if match := re.fullmatch(rf"1st {noun} whose service type = (\w+)", text):
            self.fail_at("account")
            if not self.accounts(match[1]):
                raise AppleError(-1728)
            return {"service": match[1]}
        if match := re.fullmatch(r"(participant|buddy) (\w+) of (\w+)", text):
            return self.person(match[1], self.value(match[2]), self.value(match[3]))
        raise SyntaxProblem(text)  # a chat by its id, or `service` on a new macOS

    def accounts(self, service: str, enabled: bool = False) -> list[dict[str, Any]]:
        if service not in ("iMessage", "SMS", "RCS"):
            raise AppleError(-1700)  # `any`
        accounts = self.messages.scenario["accounts"]
        return [account for account in accounts if account["type"] == service and (account["enabled"] or not enabled)]

    def person(self, form: str, address: str, account: dict[str, str]) -> dict[str, str]:
        self.act = self.messages.choose(address, self.values["theText"])
        if self.act.get("form", form) != form:
            self.act = vanishes()  # this form reaches nobody, and says nothing of it
        self.fail_at("resolve")
        if re.match(r"chat\d|.*;\+;", address):
            raise AssertionError("a group was addressed")
        return {"address": address, "form": form, **account}

    def send(self, text: str, person: dict[str, str]) -> None:
        if not self.in_tell or not isinstance(person, dict):
            raise SyntaxProblem("send outside of Messages")
        messages, address = self.messages, person["address"]
        act = self.act or sent()
        if "@" not in address and not re.fullmatch(r"\+[1-9]\d{6,14}", address):
            act = fails(22)  # accepted, and failed later
        messages.book.execute(
            "INSERT INTO asked VALUES (?, ?, ?, ?)", (messages.clock.now(), address, text, person["form"])
        )
        messages.accept(address, text, person["service"], act)
        self.fail_at("dispatch")

    def fail_at(self, phase: str) -> None:
        """Take long in this phase, and then fail, if the act says so."""
        act = self.act
        if act is None and phase == "account":  # the act belongs to the message, which is known by its arguments
            act = next(
                (
                    rule["act"]
                    for rule in self.messages.scenario["rules"]
                    if rule["act"].get("error", [""])[0] == "account" and rule["text"] in self.values["theText"]
                ),
                {},
            )
        if not act:
            return
        if act.get("slow_phase") == phase:
            self.messages.take(act["takes"])
            if act.get("dies"):
                raise Hangs
        if act.get("error", [""])[0] == phase:
            raise AppleError(act["error"][1])


def osascript(messages: Messages, source: str, arguments: list[str]) -> tuple[int, str]:
    """Run a script. Returns the exit status and the output."""
    try:
        return 0, Interpreter(messages, arguments).run(source)
    except SyntaxProblem:
        return 1, ""
    except AppleError:
        return 1, ""


# --- the other programs -------------------------------------------------------------------------------


def make_mac(directory: Path, version: str = "26.1", python: str = sys.executable) -> dict[str, Any]:
    """Fill a directory, and return what config.json needs to use what is in it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "version.txt").write_text(version + "\n")
    (directory / "scenario.json").write_text(
        json.dumps({"accounts": [{"type": "iMessage", "enabled": True}], "error": 0, "rules": []})
    )
    (directory / "ioreg.txt").write_text(f'    | |   "IOPlatformUUID" = "{HARDWARE_UUID}"\n')
    (directory / "pmset.txt").write_text(" sleep                0\n displaysleep         10\n")
    (directory / "permission.txt").write_text("0\n")
    (directory / "console").touch()
    make_chat(directory / "chat.db", int(version.split(".")[0]))
    for name, file in (("ioreg", "ioreg"), ("pmset", "pmset"), ("sw_vers", "version"), ("permission", "permission")):
        make_program(directory / name, f"exec cat '{directory}/{file}.txt'")
    make_program(directory / "caffeinate", f"echo \"$@\" >> '{directory}/caffeinate.log'")
    # An import, because Python keeps no compiled form of a file that it runs.
    source = f"import sys; sys.path.insert(0, '{Path(__file__).resolve().parent}'); import fake_messages as f; f.main()"
    for name in ("osascript", "launchctl"):
        make_program(directory / name, f"exec '{python}' -I -S -c \"{source}\" {name} '{directory}' \"$@\"")
    programs = {name: str(directory / name) for name in PROGRAMS}
    return {**programs, "chat_db": str(directory / "chat.db"), "console": str(directory / "console")}


PROGRAMS = ("osascript", "ioreg", "launchctl", "caffeinate", "pmset", "sw_vers", "permission")


def make_program(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def run_osascript(directory: Path, arguments: list[str]) -> NoReturn:
    if arguments[:1] == ["-e"]:
        source, rest = arguments[1], arguments[2:]
    elif arguments[:1] == ["-"]:
        source, rest = sys.stdin.read(), arguments[1:]
    else:
        sys.exit(2)
    try:
        status, output = osascript(Messages(directory), source, rest)
    except Hangs:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout.write(output + "\n" if status == 0 else "")
    sys.stderr.write("" if status == 0 else "execution error: an error of type -2741 or so\n")
    sys.exit(status)


def launchctl(directory: Path, arguments: list[str]) -> int:
    """Start and end an agent as launchd does, without starting it again."""
    import plistlib  # only here: each osascript would take a third longer to start
    import subprocess

    with (directory / "launchctl.log").open("a") as log:
        log.write(" ".join(arguments) + "\n")
    pid_file = directory / "agent.pid"
    if arguments[0] == "managername":
        sys.stdout.write((directory / "manager.txt").read_text() if (directory / "manager.txt").exists() else "Aqua\n")
    elif arguments[0] == "bootstrap":
        agent = plistlib.loads(Path(arguments[2]).read_bytes())
        environment = {**os.environ, **agent["EnvironmentVariables"]}
        with open(agent["StandardErrorPath"], "ab") as stderr:
            process = subprocess.Popen(
                agent["ProgramArguments"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=stderr, start_new_session=True,
            )  # fmt: skip
        pid_file.write_text(str(process.pid))
    elif arguments[0] == "bootout":
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
        pid_file.unlink(missing_ok=True)
    elif arguments[0] == "print":
        return 0 if pid_file.exists() else 113
    return 0


def app(directory: Path) -> None:
    """Carry out the events that are due, until killed."""
    messages = Messages(directory)
    while True:
        messages.advance()
        time.sleep(0.01)


def main() -> None:
    command, directory, *arguments = sys.argv[1:]
    if command == "app":
        app(Path(directory))
    commands: dict[str, Callable[[Path, list[str]], int]] = {"osascript": run_osascript, "launchctl": launchctl}
    sys.exit(commands[command](Path(directory), arguments))


if __name__ == "__main__":
    main()
