#!/usr/bin/env python3
"""Send the queue's messages with Messages.app on this Mac, and report what became of each one.

launchd runs it as an agent of the logged-in user. One file, standard library only, Python 3.9: copy it as it is.
It reads ~/Library/Messages/chat.db, and never writes to it. What it keeps (config.json, journal.db, sender.log) is in
~/Library/Application Support/send-queue. docs/mac.md is the page for the owner. Example:

    python3 mac_sender.py install

One message takes seven steps. Each step is written to the journal, and is on the disk, before the next one begins:

1. Peek: ask the server what waits. A crash after this: nothing has happened.
2. Check, and choose a `collectId`: `asked`. A crash after this: collect again with the same id.
3. POST collect: `collected`, or the refusal. A crash after this: collect again with the same id. The server hands the
   message over once more within 60 s. Later it says `late`, and the message is given back.
4. Check again: `started`. A crash after this: the message is never started again. chat.db decides (step 6). If it has
   no row, the outcome is `unknown`, because nobody can know more.
5. osascript: the phase and the number that it returned. A crash after this: as after step 4. The script looks at the
   time once more before it sends, because it may outlive this process, or sleep with the Mac.
6. Watch chat.db: `sent`, `failed` or `unknown`, and the row's guid. A crash before that: watch again, from the
   beginning of each waiting time.
7. POST result: `reported`. A crash before that: report again. Results are idempotent.

The journal has one row for each (batchItemId, attempt). A pair that it knows as started, and not as `not_started`, is
never started again, whatever the server lists: the sender reports what it knows.

The file's blocks: settings, text and addresses, the Mac, scripts for Messages, chat.db, the journal, the server,
the sender (round, checks, sending, confirming, replies), the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import email.utils
import fcntl
import hashlib
import http.client
import json
import logging
import logging.handlers
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
import unicodedata
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "1.0"
LABEL = "send-queue.mac-sender"  # of the LaunchAgent

# Waiting times, in seconds. "Awake" time stands still while the Mac sleeps, so that Messages had all of it, too.
NO_ROW_SECONDS = 120  # awake, without a row in chat.db: then none is expected any more
SETTLE_SECONDS = 600  # awake, without a change of a failed row: Messages re-sends by itself
OUTBOX_SECONDS = 3600  # in Messages' outbox: then the outcome is unknown
SEARCH_SECONDS = 3600  # a row that did not appear is looked for during so long after that
WATCH_SECONDS = 7 * 86_400  # a row in the outbox is followed for so long
LATER_SECONDS = 86_400  # a sent row is watched for a receipt or a late error for so long
COLLECT_SECONDS = 10  # between asking for a message and starting it; more means that the Mac slept
START_SECONDS = 20  # between the start and the `send` in the script
SCRIPT_SECONDS = 30  # the script's own time limit
KILL_SECONDS = 45  # ours, which is longer: a killed osascript may still act
PROBE_SECONDS = 60  # an idle sender asks Messages this often whether it is ready
HEALTH_SECONDS = 60  # a problem is repeated to the server this often
HTTP_SECONDS = 10
UNAUTHORIZED_SECONDS = 600  # between two tries with a token that the server refuses
BACK_OFF_SECONDS = (2.0, 300.0)  # the first and the longest pause after an error
RESTART_SECONDS = 60  # after which a sender without Full Disk Access starts anew: grants are read at the start
REPLY_OVERLAP = 3 * 86_400  # how far back replies are read at each poll: iCloud may bring them late
DAY, YEAR = 86_400, 365 * 86_400
ROOM = 200 * 1024 * 1024  # bytes that must be free for the journal
MAX_RESPONSE = 8 * 1024 * 1024  # bytes

Json = dict[str, Any]
logger = logging.getLogger("mac-sender")


# --- settings -----------------------------------------------------------------------------------------


class ConfigError(Exception):
    """config.json cannot be used. The message says what to do."""


class Config(NamedTuple):
    """config.json. The last block names what a test or an unusual Mac puts in place of Apple's own."""

    home: Path
    url: str
    token: str
    hardware_uuid: str = ""  # of the Mac that `install` ran on
    uid: int = -1  # of the user who ran it
    installed_at: float = 0.0  # seconds since 1970: replies are read from here on
    poll_seconds: float = 10.0
    pause_seconds: float = 3.0  # between two messages
    sms: bool = False  # send as SMS what is certainly not on iMessage
    send_as_text_message_is_off: bool = False  # the owner's word, needed for `sms`: no API tells
    address_form: str = "participant"
    send_as: str = ""  # the login that messages must leave from; empty: any
    ceiling_per_hour: int = 60
    ceiling_per_day: int = 300

    osascript: str = "/usr/bin/osascript"
    ioreg: str = "/usr/sbin/ioreg"
    launchctl: str = "/bin/launchctl"
    caffeinate: str = "/usr/bin/caffeinate"
    pmset: str = "/usr/bin/pmset"
    sw_vers: str = "/usr/bin/sw_vers"
    console: str = "/dev/console"
    chat_db: str = "~/Library/Messages/chat.db"
    permission: str = ""  # a program that prints the Automation permission; empty: this file does

    @property
    def instance(self) -> str:
        """Identify this Mac to the server without telling it the hardware UUID."""
        return hashlib.sha256(self.hardware_uuid.encode()).hexdigest()


def load_config(home: Path) -> Config:
    """Read config.json. Raises ConfigError."""
    path = home / "config.json"
    try:
        path.chmod(0o600)  # it holds the token
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: run `python3 mac_sender.py install`") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}): run `install` again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object: run `install` again")
    config = check_config(home, values)
    if not config.installed_at:
        raise ConfigError(f"{path} is not complete: run `install` again")
    return config


def check_config(home: Path, values: Json) -> Config:
    """Return the settings. Raises ConfigError, which names the setting."""
    defaults = Config._field_defaults
    for name, value in values.items():
        if name not in Config._fields or name == "home":
            raise ConfigError(f"config.json: there is no setting `{name}`")
        kind = type(defaults.get(name, ""))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"config.json: `{name}` must be a {kind.__name__}")
        if kind in (int, float) and name != "uid" and value < 0:
            raise ConfigError(f"config.json: `{name}` must not be negative")
    config = Config(home=home, **{"url": "", "token": "", **values})
    if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", config.url):
        raise ConfigError("config.json: `url` must look like https://host or http://host:3201")
    if not re.fullmatch("[!-~]+", config.token):
        raise ConfigError("config.json: `token` is missing: `python db.py add-device NAME` on the server prints one")
    if config.address_form not in ADDRESS_FORMS:
        raise ConfigError(f"config.json: `address_form` must be one of {', '.join(ADDRESS_FORMS)}")
    if config.sms and not config.send_as_text_message_is_off:
        raise ConfigError(
            "config.json: `sms` needs `send_as_text_message_is_off`: true. Switch off Send as Text Message in the"
            " iPhone's settings for Messages first: with both on, a person gets the message twice"
        )
    return config


def write_config(home: Path, values: Json) -> None:
    """Replace config.json, readable by the owner only."""
    path = home / "config.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(values, indent=2) + "\n")
    fresh.chmod(0o600)
    fresh.replace(path)


# --- text and addresses -------------------------------------------------------------------------------

# The FCC's and the carriers', French, German, Spanish; without accents. The server has the same.
STOP_WORDS = frozenset(
    (
        "STOP", "QUIT", "END", "REVOKE", "OPT OUT", "CANCEL", "UNSUBSCRIBE", "STOPALL", "OPTOUT", "REMOVE", "ARRET",
        "STOPP", "ABMELDEN", "ABBESTELLEN", "AUSTRAGEN", "ALTO", "PARAR", "BAJA", "CANCELAR", "DETENER",
    )
)  # fmt: skip
START_WORDS = frozenset({"START", "UNSTOP"})

QUOTES = dict.fromkeys(map(ord, "‘’‚‛′`´"), "'")
DOUBLE_QUOTES = dict.fromkeys(map(ord, "“”„‟″«»"), '"')
DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−"), "-")
INVISIBLE = dict.fromkeys((0xFFFC, 0xFE0E, 0xFE0F, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF))
FOLDS: dict[int, str | None] = {**QUOTES, **DOUBLE_QUOTES, **DASHES, ord("…"): "...", **INVISIBLE}


def fold(text: str) -> str:
    """Return `text` without what Messages changes between osascript and chat.db."""
    text = unicodedata.normalize("NFC", text).translate(FOLDS)
    text = re.sub("-+", "-", text)  # it writes -- as a dash
    return " ".join(text.split())


def digest(text: str | None) -> str:
    """Return what stands for a text in the journal, which keeps no texts; "" for no text."""
    return hashlib.sha256(fold(text).encode()).hexdigest() if text is not None else ""


def reply_word(text: str) -> str | None:
    """Return the STOP or START word that is the whole of `text`, without case, accents and closing punctuation."""
    text = unicodedata.normalize("NFKD", text.translate(INVISIBLE))
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    word = " ".join(text.upper().split())
    while word and unicodedata.category(word[-1])[0] in "PZ":
        word = word[:-1]
    return word if word in STOP_WORDS or word in START_WORDS else None


def address(handle: str) -> str | None:
    """Return `handle` as Messages accepts it, strict E.164 or an e-mail address; None for anything else.

    `chat123…` and `…;+;…` are groups, and match neither.
    """
    number = re.sub(r"[\s().-]", "", handle)
    if re.fullmatch(r"\+[1-9][0-9]{6,14}", number):
        return number
    mail = handle.strip()
    return mail if re.fullmatch(r"[^@\s;\x00-\x1f\x7f]+@[^@\s;\x00-\x1f\x7f]+\.[^@\s;\x00-\x1f\x7f]+", mail) else None


def key(handle: str) -> str:
    """Return one spelling for all the ways to write one address."""
    if "@" in handle:
        return handle.strip().lower()
    number = re.sub(r"[\s().-]", "", handle)
    for old, new in (("+521", "+52"), ("+549", "+54")):  # Mexican and Argentine mobile numbers have two
        if number.startswith(old) and len(number) == 14:
            number = new + number[4:]
    return number


def login(account: str) -> str:
    """Return the address in chat.db's name of an account, such as `E:me@icloud.com` or `P:+14155550123`."""
    return key(re.sub("^[EePp]:", "", account))


def mask_handle(handle: str) -> str:
    """Return `handle` as a log may show it: `+1415•••71`, `a•••@example.com`."""
    name, at, domain = handle.partition("@")
    if at:
        return f"{name[:1]}•••@{domain}"
    digits = re.sub("[^0-9]", "", handle)
    return f"+{digits[:4]}•••{digits[-2:]}" if len(digits) >= 11 else f"•••{digits[-2:]}"


def to_iso(moment: float) -> str:
    """Return seconds since 1970 as UTC for the server."""
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def from_iso(text: object) -> float | None:
    """Return the server's instant as seconds since 1970, None for anything else."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,6})?\d*(Z|[+-]\d\d:\d\d)", str(text))
    if not match:
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    try:
        moment = datetime.datetime.fromisoformat(match[1] + zone)
    except ValueError:
        return None
    return moment.timestamp() + float(match[2] or 0)


def local_time(moment: float) -> str:
    return time.strftime("%a %H:%M", time.localtime(moment))


# --- the Mac: every program, device and clock that a test replaces ------------------------------------


class Ran(NamedTuple):
    """How a program ended. `status` is None if it was killed after its time limit, or could not be started."""

    status: int | None
    output: str
    began: bool = True


class Mac:
    """Reach everything of macOS that is not chat.db's content. Tests put stand-ins here."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def now(self) -> float:
        """Return the time of day, in seconds since 1970."""
        return time.time()

    def awake(self) -> float:
        """Return seconds on a clock that stands still while the Mac sleeps."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def run(self, *command: str, text: str = "", limit: float = 10) -> Ran:
        """Run a program with `text` on its standard input. Kill it and its children after `limit` seconds."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # localised, and may quote the message
                start_new_session=True,
            )
        except (OSError, ValueError):
            return Ran(None, "", began=False)
        try:
            output, _ = process.communicate(text.encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Ran(None, "")
        return Ran(process.returncode, output.decode(errors="replace").strip())

    def hardware_uuid(self) -> str:
        """Return this Mac's hardware UUID, "" if it cannot be had."""
        ran = self.run(self.config.ioreg, "-rd1", "-c", "IOPlatformExpertDevice")
        match = re.search(r'"IOPlatformUUID"\s*=\s*"([0-9A-Fa-f-]+)"', ran.output)
        return match[1] if match else ""

    def macos(self) -> str:
        """Return the version of macOS, such as `26.1`."""
        return self.run(self.config.sw_vers, "-productVersion").output

    def manager(self) -> str:
        """Return the name of the session: `Aqua` for a logged-in user's."""
        return self.run(self.config.launchctl, "managername").output

    def console_owner(self) -> int:
        """Return the uid of the user whose session is in front."""
        return os.stat(self.config.console).st_uid

    def uid(self) -> int:
        return os.getuid()

    def permission(self) -> int | None:
        """Return macOS' word on the Automation permission without raising its window; None if it cannot be had."""
        own = (sys.executable, os.path.abspath(__file__), "permission")
        ran = self.run(*((self.config.permission,) if self.config.permission else own), limit=5)
        return int(ran.output) if re.fullmatch(r"-?\d{1,6}", ran.output) else None

    def free_bytes(self) -> int:
        room = os.statvfs(self.config.home)
        return room.f_bavail * room.f_frsize

    def chat_path(self) -> Path:
        return Path(self.config.chat_db).expanduser()

    def open_file(self, path: Path) -> None:
        """Raise the OSError that says why a file cannot be opened, if it cannot."""
        os.close(os.open(path, os.O_RDONLY))

    def connect(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, timeout=5)


def automation_permission() -> int:
    """Ask macOS whether this program may control Messages, without a window (AEDeterminePermissionToAutomateTarget)."""
    import ctypes  # only here: it costs memory

    class Descriptor(ctypes.Structure):
        _pack_ = 2  # as AEDataModel.h says
        _fields_ = (("type", ctypes.c_uint32), ("data", ctypes.c_void_p))

    services = ctypes.CDLL("/System/Library/Frameworks/ApplicationServices.framework/ApplicationServices")
    bundle, target = b"com.apple.MobileSMS", Descriptor()
    kind, any_event = int.from_bytes(b"bund", "big"), int.from_bytes(b"****", "big")
    services.AECreateDesc.argtypes = [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_long, ctypes.c_void_p]
    services.AECreateDesc.restype = ctypes.c_int16
    determine = services.AEDeterminePermissionToAutomateTarget
    determine.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint8]
    determine.restype = ctypes.c_int32
    if services.AECreateDesc(kind, bundle, len(bundle), ctypes.byref(target)):
        raise OSError("AECreateDesc failed")
    return int(determine(ctypes.byref(target), any_event, any_event, 0))


# --- scripts for Messages -----------------------------------------------------------------------------

ADDRESS_FORMS = ("participant", "buddy")

# The address, the text and the deadline are arguments: spliced into the script they would be a program.
# `set` fetches the object, so a missing one raises its error there, and not at `send`.
SEND = """
on run argv
    set theAddress to item 1 of argv
    set theText to item 2 of argv
    set theDeadline to (item 3 of argv) as number
    set thePhase to "account"
    try
        with timeout of {seconds} seconds
            tell application "Messages"
                set theAccount to 1st {noun} whose service type = {service}
                set thePhase to "resolve"
                set thePerson to {form} theAddress of theAccount
            end tell
            if ((do shell script "/bin/date +%s") as number) > theDeadline then return "late 0"
            set thePhase to "dispatch"
            tell application "Messages"
                send theText to thePerson
            end tell
        end timeout
    on error number theNumber
        return thePhase & " " & theNumber
    end try
    return "done 0"
end run
"""

# Harmless: it counts. It starts Messages, if that does not run. `enabled` may be unknown to a system: then it is
# not asked for.
PROBE = """
on run argv
    try
        with timeout of {seconds} seconds
            tell application "Messages"
                set theTotal to count of {noun}s
                set theReady to count of ({noun}s whose service type = iMessage)
                try
                    set theReady to count of ({noun}s whose service type = iMessage and enabled = true)
                end try
            end tell
        end timeout
    on error number theNumber
        return "error " & theNumber
    end try
    return "accounts " & theTotal & " " & theReady
end run
"""

# Errors that prove that nothing was sent, if they come while the script resolves the account or the address.
NOT_SENT = {
    -1743: "the Automation permission is missing",
    -1744: "macOS would ask for the Automation permission",
    -600: "Messages is not running",
    -10810: "Messages cannot be launched",
    -1728: "Messages knows no such account or address",
    -1719: "Messages knows no such account or address",
    -1700: "Messages knows no such kind of account or address",
}
BROKEN_AUTOMATION = -10004


class Script(NamedTuple):
    """What the script for sending returned. `perhaps` stands for everything that proves nothing."""

    phase: str  # account, resolve, late, dispatch, done; perhaps; unborn: osascript itself could not be started
    number: int

    @property
    def certainly_not_sent(self) -> bool:
        return self.phase in ("late", "unborn") or (self.phase in ("account", "resolve") and self.number in NOT_SENT)


class Messages:
    """Speak with Messages.app through osascript."""

    def __init__(self, config: Config, mac: Mac) -> None:
        self.config = config
        self.mac = mac
        self._noun = ""

    @property
    def noun(self) -> str:
        """Return what this macOS calls an account: 11 and 12 say `service`."""
        if not self._noun:
            major = self.mac.macos().partition(".")[0]
            self._noun = "service" if major in ("10", "11", "12") else "account"
        return self._noun

    def send(self, handle: str, text: str, service: str, deadline: float, form: str = "") -> Script:
        """Send one message, once."""
        source = SEND.format(
            seconds=SCRIPT_SECONDS, noun=self.noun, service=service, form=form or self.config.address_form
        )
        command = (self.config.osascript, "-", handle, text, str(int(deadline)))
        ran = self.mac.run(*command, text=source, limit=KILL_SECONDS)
        if not ran.began:
            return Script("unborn", 0)
        match = re.fullmatch(r"(account|resolve|late|dispatch|done) (-?\d+)", ran.output)
        if ran.status != 0 or not match:
            return Script("perhaps", ran.status or 0)
        return Script(match[1], int(match[2]))

    def probe(self, limit: float = 10) -> str | None:
        """Return why Messages is not ready, None if it is."""
        source = PROBE.format(seconds=int(limit), noun=self.noun)
        ran = self.mac.run(self.config.osascript, "-", text=source, limit=limit + 5)
        match = re.fullmatch(r"(accounts|error) (-?\d+)(?: (\d+))?", ran.output)
        if ran.status != 0 or not match:
            return "Messages does not respond: quit it and open it again"
        if match[1] == "error":
            return probe_sentence(int(match[2]))
        return None if int(match[3]) else "Messages is not signed in to iMessage: sign in under Settings > iMessage"


def probe_sentence(number: int) -> str:
    """Return what an error of the harmless probe, or of the permission probe, means for the owner."""
    if number == -1743:
        return (
            f"Automation is missing: allow {sys.executable} to control Messages"
            " in System Settings > Privacy & Security > Automation"
        )
    if number == -1744:
        return "macOS has not asked for Automation yet: run `install` again, with somebody in front of the Mac"
    if number == BROKEN_AUTOMATION:
        return "macOS refuses Automation (-10004): log out and in again, then run `install` again"
    if number in (-600, -10810):
        return "Messages cannot be started: open it by hand"
    return f"Messages does not respond (error {number}): quit it and open it again"


# --- chat.db ------------------------------------------------------------------------------------------

APPLE_EPOCH = 978_307_200  # 2001-01-01 UTC, in seconds since 1970
HEADER = b"\x04\x0bstreamtyped\x81\xe8\x03"
MARKER = b"\x84\x01+"  # a string of bytes follows
END = b"\x86"  # of the object

ERRORS = {
    1: "unknown error", 2: "cancelled", 3: "time-out", 4: "sending failed", 5: "internal error", 6: "network error",
    7: "lookup failed", 8: "connection failed", 9: "no network", 10: "busy", 11: "denied", 19: "invalid token",
    20: "rejected by the server", 21: "remote user invalid", 22: "the recipient does not exist on this service",
    23: "incompatible", 24: "rejected by the recipient", 25: "transcoding failed", 26: "encryption failed",
    27: "encryption failed", 28: "encryption failed", 29: "encryption failed", 30: "the account is disabled",
    31: "there is no account", 32: "the account needs an update", 33: "the account is invalid", 34: "attachment error",
    35: "attachment error", 36: "attachment error", 37: "attachment error", 38: "macOS needs an update",
    39: "the message service crashed", 40: "wrong credentials", 41: "file not found", 42: "rendering failed",
    **dict.fromkeys(range(12, 19), "server error"),
}  # fmt: skip
ACCOUNT_ERRORS = frozenset({19, 20, 30, 31, 32, 33, 38, 39, 40})
NO_SUCH_RECIPIENT = 22


class ChatUnreadable(Exception):
    """chat.db cannot be read. The message is a sentence for the owner."""

    def __init__(self, sentence: str, needs_restart: bool = False) -> None:
        super().__init__(sentence)
        self.needs_restart = needs_restart


class Row(NamedTuple):
    """An ordinary message of chat.db."""

    guid: str
    handle: str  # "" if chat.db does not tell
    text: str | None
    date: float  # seconds since 1970
    service: str
    account: str
    error: int
    is_sent: bool
    is_finished: bool
    delivered_at: float | None

    @property
    def state(self) -> str:
        """Return what became of an outgoing row: sent, failing (Messages may re-send it by itself), or outbox."""
        if self.is_finished and self.is_sent:
            return "sent"
        return "failing" if self.is_finished and self.error else "outbox"


def decode_body(blob: object) -> str | None:
    """Return the text of an `attributedBody` (a typedstream), None if it is damaged or holds something else.

    The marker is followed by the length of the text, then by its UTF-8, then by the end of the object. Nothing is
    searched but the marker: its bytes, and those of the end, may be part of a text.
    """
    if not isinstance(blob, bytes) or not blob.startswith(HEADER):
        return None
    marker = blob.find(MARKER, len(HEADER))
    at = marker + len(MARKER)
    if marker < 0 or at >= len(blob):
        return None
    width = {0x81: 2, 0x82: 4}.get(blob[at], 0)
    if not width and blob[at] > 0x7F:
        return None
    start = at + 1 + width
    length = int.from_bytes(blob[at + 1 : start], "little") if width else blob[at]
    if blob[start + length : start + length + 1] != END:
        return None
    try:
        return blob[start : start + length].decode()
    except UnicodeDecodeError:
        return None


class Chat:
    """chat.db, opened read-only for one look: a file that Messages replaced is noticed at the next one."""

    # What a system does not have yet reads as 0 or NULL.
    COLUMNS = (
        "associated_message_guid", "associated_message_type", "balloon_bundle_id", "schedule_type", "item_type",
        "attributedBody", "account", "date_delivered", "is_delivered",
    )  # fmt: skip
    ORDINARY = (
        "COALESCE({item_type}, 0) = 0 AND COALESCE({associated_message_type}, 0) = 0"
        " AND COALESCE({schedule_type}, 0) = 0 AND {associated_message_guid} IS NULL AND {balloon_bundle_id} IS NULL"
    )
    # The address of a row without a handle is that of its only chat, if that is one to one (style 45). A row in a
    # group (style 43) has no address at all.
    SELECT = """
        SELECT m.guid, h.id, m.text, {attributedBody}, m.date, m.service, {account}, m.error, m.is_sent, m.is_finished,
               {is_delivered}, {date_delivered}, chats.groups, chats.identifiers, chats.identifier
          FROM message AS m
          LEFT JOIN handle AS h ON h.ROWID = m.handle_id
          LEFT JOIN (SELECT j.message_id, count(CASE WHEN c.style = 43 THEN 1 END) AS groups,
                            count(DISTINCT c.chat_identifier) AS identifiers, min(c.chat_identifier) AS identifier
                       FROM chat_message_join AS j JOIN chat AS c ON c.ROWID = j.chat_id
                      WHERE j.message_id IN (SELECT ROWID FROM message AS m WHERE {which})
                      GROUP BY j.message_id) AS chats ON chats.message_id = m.ROWID
         WHERE {which} AND {ordinary}
         ORDER BY m.date, m.ROWID
    """

    # Of all rows that this file ever had: deleting a conversation does not lower it.
    HIGHEST_ROWID = """
        SELECT max(COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'message'), 0),
                   COALESCE((SELECT max(ROWID) FROM message), 0))
    """

    def __init__(self, mac: Mac) -> None:
        self.path = mac.chat_path()
        self.connection = self._open(mac)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _open(self, mac: Mac) -> sqlite3.Connection:
        uri = f"{self.path.as_uri()}?mode=ro"
        try:
            mac.open_file(self.path)
            self.inode = os.stat(self.path).st_ino
            return self._connect(mac, uri)
        except OSError as error:
            raise self._why(error) from None
        except sqlite3.Error as error:
            if "authoriz" in str(error):
                raise self._why(PermissionError()) from None
            if self._is_quiet():
                with contextlib.suppress(sqlite3.Error):
                    return self._connect(mac, f"{uri}&immutable=1")
            raise cannot_read(error) from None

    def _connect(self, mac: Mac, uri: str) -> sqlite3.Connection:
        connection = mac.connect(uri)
        connection.text_factory = lambda text: text.decode(errors="replace")  # one damaged row must not hide the others
        try:
            self.columns = {row[1] for row in connection.execute("PRAGMA table_info(message)")}
            if not {"guid", "date", "is_sent", "is_finished", "error"} <= self.columns:
                raise ChatUnreadable("chat.db is not as on the macOS versions that this sender knows: see docs/mac.md")
            self.highest_rowid = int(connection.execute(self.HIGHEST_ROWID).fetchone()[0])
        except BaseException:
            connection.close()
            raise
        return connection

    def _is_quiet(self) -> bool:
        """Return whether Messages has closed chat.db: then it has no sidecars, and Apple's SQLite refuses it."""
        return not any(os.path.exists(f"{self.path}{suffix}") for suffix in ("-wal", "-shm"))

    def _why(self, error: OSError) -> ChatUnreadable:
        if isinstance(error, FileNotFoundError):
            return ChatUnreadable(f"{self.path} does not exist: open Messages and sign in")
        if isinstance(error, PermissionError):
            binary = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
            sentence = (
                f"Full Disk Access is missing for {binary}: add it in System Settings > Privacy & Security >"
                " Full Disk Access (if it is there: switch it off and on)"
            )
            return ChatUnreadable(sentence, needs_restart=True)
        return ChatUnreadable(f"chat.db cannot be opened ({error.strerror}): restart the Mac")

    def _rows(self, which: str, *parameters: object) -> Iterator[Row]:
        names = {name: f"m.{name}" if name in self.columns else "NULL" for name in self.COLUMNS}
        ordinary = self.ORDINARY.format(**names)
        sql = self.SELECT.format(which=which, ordinary=ordinary, **names)
        try:
            for values in self.connection.execute(sql, parameters * 2):
                yield self._row(*values)
        except sqlite3.Error as error:
            raise cannot_read(error) from None

    @staticmethod
    def _row(
        guid: str, handle: str | None, text: str | None, body: bytes | None, date: int, service: str | None,
        account: str | None, error: int | None, is_sent: int, is_finished: int, is_delivered: int | None,
        date_delivered: int | None, groups: int | None, identifiers: int | None, identifier: str | None,
    ) -> Row:  # fmt: skip
        if groups:
            handle = None
        elif not handle and identifiers == 1:
            handle = identifier
        delivered = None
        if is_delivered or date_delivered:
            delivered = APPLE_EPOCH + (date_delivered or date) / 1e9
        return Row(
            guid, handle or "", text if text is not None else decode_body(body), APPLE_EPOCH + (date or 0) / 1e9,
            service or "", account or "", error or 0, bool(is_sent), bool(is_finished), delivered,
        )  # fmt: skip

    def by_guid(self, guid: str) -> Row | None:
        return next(self._rows("m.guid = ?", guid), None)

    def outgoing(self, since: float, until: float) -> list[Row]:
        """Return the ordinary messages that left this account in a time, whatever device they were typed on."""
        return list(self._rows("m.is_from_me = 1 AND m.date BETWEEN ? AND ?", to_apple(since), to_apple(until)))

    def incoming(self, since: float) -> Iterator[Row]:
        """Yield the ordinary messages that came in."""
        return self._rows("m.is_from_me = 0 AND m.date >= ?", to_apple(since))

    def newest_account(self) -> str:
        """Return the account that the newest outgoing message left from, "" if there is none."""
        sql = "SELECT account FROM message WHERE is_from_me = 1 AND account <> '' ORDER BY date DESC LIMIT 1"
        row = self.connection.execute(sql).fetchone() if "account" in self.columns else None
        return str(row[0]) if row else ""

    @staticmethod
    def signature(path: Path) -> tuple[object, ...]:
        """Return what changes whenever Messages writes to chat.db."""
        found: list[object] = []
        for name in (path, Path(f"{path}-wal")):
            with contextlib.suppress(OSError):
                state = name.stat()
                found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        return tuple(found)


def cannot_read(error: sqlite3.Error) -> ChatUnreadable:
    return ChatUnreadable(f"chat.db cannot be read ({type(error).__name__}): quit Messages, open it again")


def to_apple(moment: float) -> int:
    """Return seconds since 1970 as chat.db writes a date: nanoseconds since 2001."""
    return int((moment - APPLE_EPOCH) * 1e9)


# --- the journal --------------------------------------------------------------------------------------

# What the server should know of a message by now.
REPORT = """
    state || CASE WHEN late_error IS NOT NULL THEN '+late' WHEN delivered_at IS NOT NULL THEN '+delivered' ELSE '' END
"""
SCHEMA = f"""
    CREATE TABLE IF NOT EXISTS messages (
        batch_item_id TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        queue_id TEXT NOT NULL,                   -- where the result goes; '': nowhere, made by `test`
        collect_id TEXT,                          -- the hand-over that we asked for
        handle TEXT NOT NULL,
        digest TEXT NOT NULL,                     -- of the folded text; the text itself is not kept
        service TEXT NOT NULL DEFAULT 'iMessage', -- that the script uses
        state TEXT NOT NULL,                      -- asked, collected, started; sent, failed, not_started, unknown
        asked_at REAL NOT NULL,                   -- times are seconds since 1970
        started_at REAL,                          -- from when chat.db is searched
        ended_at REAL,                            -- when osascript ended or was killed
        phase TEXT,                               -- what it returned
        number INTEGER,
        guid TEXT,                                -- of the row in chat.db
        row TEXT NOT NULL DEFAULT 'none',         -- what became of it: none, outbox, failing, sent
        row_service TEXT,
        decided_at REAL,
        error TEXT,
        watched_until REAL,
        released INTEGER NOT NULL DEFAULT 0,      -- the owner said: go on
        delivered_at REAL,
        late_error TEXT,
        reported TEXT,                            -- the last REPORT that the server accepted
        PRIMARY KEY (batch_item_id, attempt)
    );
    -- A year of messages makes no round slower.
    CREATE INDEX IF NOT EXISTS messages_state ON messages (state, decided_at);
    CREATE INDEX IF NOT EXISTS messages_started ON messages (started_at);
    CREATE INDEX IF NOT EXISTS messages_unreported ON messages (decided_at)
        WHERE decided_at IS NOT NULL AND reported IS NOT ({REPORT});
    -- Each row of chat.db that stands for a message of ours. It confirms no second one.
    CREATE TABLE IF NOT EXISTS guids (guid TEXT PRIMARY KEY, batch_item_id TEXT NOT NULL, seen_at REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS replies (
        handle TEXT NOT NULL,
        received_at REAL NOT NULL,
        word TEXT NOT NULL,
        reported INTEGER NOT NULL DEFAULT 0,      -- 1: accepted by the server, 2: refused
        PRIMARY KEY (handle, received_at)
    );
    -- Why the sender stopped, until the owner says `release`.
    CREATE TABLE IF NOT EXISTS stops (sentence TEXT PRIMARY KEY, at REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);
"""


class Message(NamedTuple):
    """A row of the journal's table of messages."""

    batch_item_id: str
    attempt: int
    queue_id: str
    collect_id: str | None
    handle: str
    digest: str
    service: str
    state: str
    asked_at: float
    started_at: float | None
    ended_at: float | None
    phase: str | None
    number: int | None
    guid: str | None
    row: str
    row_service: str | None
    decided_at: float | None
    error: str | None
    watched_until: float | None
    released: int
    delivered_at: float | None
    late_error: str | None
    reported: str | None

    @property
    def pair(self) -> tuple[str, int]:
        return self.batch_item_id, self.attempt

    @property
    def is_ended(self) -> bool:
        return self.state in ("sent", "failed", "not_started", "unknown")

    def __str__(self) -> str:
        return f"item={self.batch_item_id} attempt={self.attempt} to={mask_handle(self.handle)}"


class Journal:
    """What this Mac did, on the disk before the next step begins. One writer runs at a time (see `lock`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = sqlite3.connect(str(path), timeout=10, isolation_level=None)
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute("PRAGMA fullfsync = ON")  # macOS' fsync alone leaves it in the drive's cache
        self.connection.executescript(SCHEMA)

    def close(self) -> None:
        self.connection.close()

    def write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        """Run the statements in one transaction. It is on the disk when this returns."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            for sql, parameters in statements:
                self.connection.execute(sql, parameters)
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def messages(self, where: str, *parameters: object) -> list[Message]:
        sql = f"SELECT {', '.join(Message._fields)} FROM messages WHERE {where}"  # noqa: S608  # constants of this file
        return [Message(*row) for row in self.connection.execute(sql, parameters)]

    def get(self, pair: tuple[str, int]) -> Message | None:
        return next(iter(self.messages("batch_item_id = ? AND attempt = ?", *pair)), None)

    def meta(self, name: str) -> str | None:
        row = self.connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_meta(self, name: str, value: str | None) -> None:
        if self.meta(name) != value:
            self.write(("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value)))

    # The steps of a message. Each one names the states that it leads from.

    def ask(self, item: Item, now: float) -> Message:
        """Write down that the item's message is asked for. One that was asked for already keeps its collectId."""
        sql = """
            INSERT INTO messages (batch_item_id, attempt, queue_id, collect_id, handle, digest, state, asked_at)
            VALUES (?, ?, ?, ?, ?, ?, 'asked', ?)
            ON CONFLICT (batch_item_id, attempt) DO UPDATE
               SET collect_id = CASE WHEN queue_id = excluded.queue_id AND state IN ('asked', 'collected')
                                     THEN collect_id ELSE excluded.collect_id END,
                   queue_id = excluded.queue_id, handle = excluded.handle, digest = excluded.digest,
                   state = 'asked', asked_at = excluded.asked_at, started_at = NULL, ended_at = NULL, phase = NULL,
                   number = NULL, guid = NULL, row = 'none', decided_at = NULL, error = NULL, watched_until = NULL,
                   released = 0, reported = NULL
             WHERE state IN ('asked', 'collected', 'not_started')
        """
        self.write((sql, (*item.pair, item.queue_id, str(uuid.uuid4()), item.handle, digest(item.text), now)))
        message = self.get(item.pair)
        if not message or message.state != "asked":
            raise AssertionError("only a message that was not started is asked for")
        return message

    def collected(self, message: Message, handle: str, text: str) -> None:
        self.write(self._set(message, "asked", state="collected", handle=handle, digest=digest(text)))

    def start(self, message: Message, now: float) -> None:
        """Write down that the message is being sent. From here on it is never started again."""
        self.write(self._set(message, "collected", state="started", started_at=now))

    def ended(self, message: Message, script: Script, now: float) -> None:
        self.write(self._set(message, "started", ended_at=now, phase=script.phase, number=script.number))

    def adopt(self, message: Message, row: Row, now: float) -> None:
        """Take a row that was there before as the message's own: nothing is started."""
        update = self._set(message, "asked collected", state="started", started_at=now, ended_at=now, phase="adopted")
        self.write(update, *self._seen(message, row, now))

    def collected_elsewhere(self, message: Message, drafted: float, now: float) -> None:
        """Prepare the search for a message that somebody collected before and that this journal does not know."""
        self.write(self._set(message, "asked", state="started", started_at=drafted, ended_at=now, phase="elsewhere"))

    def seen(self, message: Message, row: Row, now: float) -> None:
        """Write down the message's row in chat.db and its state."""
        self.write(*self._seen(message, row, now))

    def own(self, message: Message, row: Row, now: float) -> None:
        """Write down that a row is the message's, too."""
        self.write(self._seen(message, row, now)[1])

    def decide(
        self, message: Message, state: str, now: float, error: str | None = None, watched_until: float | None = None
    ) -> None:
        """Write down what became of a message. Only `unknown` is ever decided again."""
        states = "asked collected started unknown"
        columns = {"decided_at": now, "error": error, "watched_until": watched_until}
        self.write(self._set(message, states, state=state, **columns))

    def next_service(self, message: Message, service: str) -> None:
        self.write(self._set(message, "started unknown", service=service))

    def later(self, message: Message, delivered_at: float | None, late_error: str | None) -> None:
        self.write(self._set(message, "sent", delivered_at=delivered_at, late_error=late_error))

    def reported(self, message: Message) -> None:
        """Write down that the server has accepted what `message` says."""
        later = "+late" if message.late_error else "+delivered" if message.delivered_at else ""
        self.write(self._set(message, message.state, reported=message.state + later))

    def relist(self, message: Message, queue_id: str) -> None:
        """Report a known message again, to the row that the server lists for it now."""
        if message.queue_id != queue_id or (message.is_ended and message.reported):
            self.write(self._set(message, message.state, queue_id=queue_id, reported=None))

    def _set(self, message: Message, states: str, **columns: object) -> tuple[str, tuple[object, ...]]:
        """Return the UPDATE of a message that is in one of these states. The names are those of this file."""
        names = ", ".join(f"{name} = ?" for name in columns)
        marks = ", ".join("?" * len(states.split()))
        sql = f"UPDATE messages SET {names} WHERE batch_item_id = ? AND attempt = ? AND state IN ({marks})"  # noqa: S608
        return sql, (*columns.values(), *message.pair, *states.split())

    def _seen(self, message: Message, row: Row, now: float) -> tuple[tuple[str, tuple[object, ...]], ...]:
        insert = "INSERT OR IGNORE INTO guids VALUES (?, ?, ?)"
        return (
            self._set(
                message, "asked collected started unknown", guid=row.guid, row=row.state, row_service=row.service
            ),
            (insert, (row.guid, message.batch_item_id, now)),
        )

    # What the sender asks of it.

    def followed(self, now: float) -> list[Message]:
        """Return the messages that chat.db may still tell something about."""
        where = """
            state = 'started'
            OR state = 'unknown' AND (watched_until > ? OR row = 'failing')
            OR state = 'unknown' AND row = 'outbox' AND (NOT released OR started_at > ?)
            OR state = 'sent' AND guid IS NOT NULL AND decided_at > ? AND delivered_at IS NULL AND late_error IS NULL
            ORDER BY started_at
        """
        return self.messages(where, now, now - WATCH_SECONDS, now - LATER_SECONDS)

    def undecided(self) -> list[Message]:
        """Return the messages that keep others from being started. A failed one that waits to settle does not."""
        where = """
            state IN ('started', 'unknown') AND NOT released
            AND (state = 'started' AND row <> 'failing' OR state = 'unknown' AND row = 'outbox')
        """
        return self.messages(where)

    def unreported(self) -> list[Message]:
        """Return the messages of which the server does not know what it should. One made by `test` has no row there."""
        where = f"decided_at IS NOT NULL AND reported IS NOT ({REPORT}) AND queue_id <> '' ORDER BY decided_at"
        return self.messages(where)

    def latest_starts(self, count: int) -> list[Message]:
        """Return the newest messages that this Mac started since the last `release`, newest first."""
        where = """
            started_at > ? AND phase IS NOT 'elsewhere' AND phase IS NOT 'adopted'
            ORDER BY started_at DESC LIMIT ?
        """
        return self.messages(where, float(self.meta("released_at") or 0), count)

    def starts_since(self, moment: float) -> int:
        sql = (
            "SELECT count(*) FROM messages WHERE started_at > ? AND phase IS NOT 'elsewhere' AND phase IS NOT 'adopted'"
        )
        return int(self.connection.execute(sql, (moment,)).fetchone()[0])

    def owner_of(self, guid: str) -> str | None:
        """Return the batch item that a row of chat.db stands for."""
        row = self.connection.execute("SELECT batch_item_id FROM guids WHERE guid = ?", (guid,)).fetchone()
        return row[0] if row else None

    # Stops.

    def stop(self, sentence: str, now: float) -> None:
        if sentence not in self.stops():
            logger.error("stopped reason=%r", sentence)
            self.write(("INSERT INTO stops VALUES (?, ?)", (sentence, now)))

    def stops(self) -> list[str]:
        return [row[0] for row in self.connection.execute("SELECT sentence FROM stops ORDER BY at")]

    def release(self, message_id: str | None, now: float) -> int:
        """Let the sender go on: past one message, or past everything that stopped it. Returns how many."""
        if message_id:
            found = self.messages("(batch_item_id = ? OR queue_id = ?) AND NOT released", message_id, message_id)
            sql = "UPDATE messages SET released = 1 WHERE batch_item_id = ? AND attempt = ?"
            self.write(*((sql, message.pair) for message in found))
            return len(found)
        count = len(self.stops())
        self.write(
            ("DELETE FROM stops", ()),
            ("DELETE FROM meta WHERE name IN ('chat_inode', 'chat_rowid')", ()),
            ("INSERT OR REPLACE INTO meta VALUES ('released_at', ?)", (str(now),)),
        )
        return count

    # Replies.

    def add_reply(self, handle: str, received_at: float, word: str) -> None:
        sql = "INSERT INTO replies (handle, received_at, word) VALUES (?, ?, ?)"
        known = "SELECT 1 FROM replies WHERE handle = ? AND received_at = ?"
        if not self.connection.execute(known, (handle, received_at)).fetchone():
            self.write((sql, (handle, received_at, word)))

    def unreported_replies(self) -> list[tuple[str, float, str]]:
        sql = "SELECT handle, received_at, word FROM replies WHERE reported = 0 ORDER BY received_at"
        return list(self.connection.execute(sql))

    def reply_reported(self, handle: str, received_at: float, accepted: bool) -> None:
        sql = "UPDATE replies SET reported = ? WHERE handle = ? AND received_at = ?"
        self.write((sql, (1 if accepted else 2, handle, received_at)))

    def report_all_replies_again(self) -> None:
        self.write(("UPDATE replies SET reported = 0 WHERE reported <> 0", ()))

    def forget_old(self, now: float) -> None:
        """Drop what ended a year ago."""
        sql = "DELETE FROM messages WHERE asked_at < ? AND state <> 'started'"
        self.write((sql, (now - YEAR,)), ("DELETE FROM guids WHERE seen_at < ?", (now - YEAR,)))


@contextlib.contextmanager
def lock(home: Path) -> Iterator[None]:
    """Let one sender work on this journal at a time. Raises ConfigError if another one does."""
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("another sender runs on this journal: end it first") from None
        yield


# --- the server ---------------------------------------------------------------------------------------

PATH = "/client/imessage"


class ServerAway(Exception):
    """The server cannot be asked now. Nothing is lost: everything is repeated."""


class Response(NamedTuple):
    status: int
    data: Json
    error: str

    @property
    def reason(self) -> str:
        return str(self.data.get("reason", ""))


class Item(NamedTuple):
    """A message as the server lists it."""

    queue_id: str
    batch_item_id: str
    attempt: int
    handle: str
    text: str
    drafted_at: float

    @property
    def pair(self) -> tuple[str, int]:
        return self.batch_item_id, self.attempt


def parse_item(value: object) -> Item | None:
    """Return a listed message, None if it is not as the contract has it."""
    if not isinstance(value, dict):
        return None
    texts = [value.get(name) for name in ("id", "batchItemId", "toHandle", "body")]
    attempt, drafted = value.get("attempt"), from_iso(value.get("draftedAt"))
    if not all(isinstance(text, str) and text for text in texts) or type(attempt) is not int or drafted is None:
        return None
    queue_id, batch_item_id, handle, body = map(str, texts)
    return Item(queue_id, batch_item_id, attempt, handle, body, drafted)


class Server:
    """The send queue server. After an error it is left alone for a while, longer each time."""

    def __init__(self, config: Config, mac: Mac) -> None:
        self.config = config
        self.mac = mac
        self.quiet_until = 0.0  # awake time
        self.failures = 0
        self.unauthorized = False
        self.clock_ahead = 0.0  # seconds by which the Mac's clock is ahead of the server's

    def peek(self) -> Response:
        return self.request("GET", "/send-queue/pending?peek=true")

    def collect(self, message: Message) -> Response:
        path = f"/send-queue/{urllib.parse.quote(message.queue_id, safe='')}/collect"
        return self.request("POST", path, {"collectId": message.collect_id})

    def result(self, queue_id: str, result: Json) -> Response:
        return self.request("POST", f"/send-queue/{urllib.parse.quote(queue_id, safe='')}/result", result)

    def health(self, problem: str | None) -> Response:
        return self.request("POST", "/health", {"problem": problem, "version": VERSION})

    def opt_out(self, handle: str, received_at: float, word: str) -> Response:
        body = {"handle": handle, "word": word, "receivedAt": to_iso(received_at)}
        return self.request("POST", "/opt-outs", body)

    def request(self, method: str, path: str, body: Json | None = None) -> Response:
        """Ask the server. Returns what it judged (such as 200, 404, 409). Raises ServerAway for anything else."""
        if self.mac.awake() < self.quiet_until:
            raise ServerAway("the server is left alone for a while")
        try:
            status, headers, content = self._exchange(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise self._away(type(error).__name__) from None
        response = parse_response(status, content)
        if status == 401:
            self.unauthorized = True
            raise self._away("the server refuses the token", UNAUTHORIZED_SECONDS)
        if response is None or status not in (200, 400, 404, 409, 413, 422):
            raise self._away(f"status {status}", retry_after(headers.get("Retry-After")))
        self.failures, self.unauthorized = 0, False
        with contextlib.suppress(TypeError, ValueError):
            self.clock_ahead = self.mac.now() - email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
        return response

    def _exchange(self, method: str, path: str, body: Json | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Make one request, on a connection of its own. A redirect is not followed: it could lead the token away."""
        url = urllib.parse.urlsplit(self.config.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.netloc, timeout=HTTP_SECONDS)
        headers = {"Authorization": f"Bearer {self.config.token}", "Connection": "close"}
        if body is not None:
            body = {**body, "instance": self.config.instance}
            headers["Content-Type"] = "application/json"
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, url.path.rstrip("/") + PATH + path, content, headers)
            response = connection.getresponse()
            return response.status, response.headers, read_response(response)
        finally:
            connection.close()

    def _away(self, reason: str, wait: float | None = None) -> ServerAway:
        first, longest = BACK_OFF_SECONDS
        pause = wait if wait is not None else min(first * 2**self.failures, longest)
        self.failures = min(self.failures + 1, 20)
        self.quiet_until = self.mac.awake() + pause
        logger.warning("server cannot be asked reason=%r; next try in %.0f s", reason, pause)
        return ServerAway(reason)


def read_response(response: http.client.HTTPResponse) -> bytes:
    """Return the body. In pieces: for a length that may be long, Python 3.9 takes all the memory at once."""
    content = b""
    while piece := response.read(65_536):
        content += piece
        if len(content) > MAX_RESPONSE:
            raise http.client.HTTPException("the response is too long")
    return content


def parse_response(status: int, content: bytes) -> Response | None:
    """Return the server's own JSON, None for anything else, such as a proxy's page."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("success") is not (status == 200):
        return None
    data = value.get("data")
    return Response(status, data if isinstance(data, dict) else {}, str(value.get("error", "")))


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After asks for, an hour at most."""
    return min(float(header), 3600.0) if header and re.fullmatch(r"\d{1,9}", header.strip()) else None


# --- the sender ---------------------------------------------------------------------------------------

RUN_RELEASE = "then run `python3 mac_sender.py release`"
OLD_SERVER = "the server is older than this sender: upgrade it"


class Sender:
    """The loop: one round follows what was started, reports, reads replies, checks, and sends one message at most."""

    def __init__(self, config: Config, mac: Mac, journal: Journal) -> None:
        self.config = config
        self.mac = mac
        self.journal = journal
        self.messages = Messages(config, mac)
        self.server = Server(config, mac)
        self.since: dict[tuple[str, int], tuple[object, float]] = {}  # what a message shows, from which awake time on
        self.not_before = 0.0  # awake time of the next start
        self.give_backs = 0  # in a row
        self.probed: float | None = None  # awake time at which Messages was ready; None: it was not
        self.told: tuple[str | None, float] | None = None  # the server's last word from us, and when
        self.problem: str | None = None
        self.restart_at: float | None = None  # awake time
        self.chat_signature: object = None
        self.replies_read = 0.0  # wall time of the last complete reading
        self.is_right_mac = False
        self.is_aqua = False

    def round(self) -> float:
        """Do what is due, and return how many seconds to wait."""
        problem = self.read_chat()
        try:
            self.report()
            self.report_replies()
            problem = problem or self.find_problem()
            self.tell(problem)
            if not problem and self.mac.awake() >= self.not_before and not self.journal.undecided():
                self.poll()
        except ServerAway:
            problem = problem or self.find_problem()
            if self.server.unauthorized:
                problem = problem or "the server refuses the token: run `install` again with a new one"
        self.note(problem)
        return self.wait()

    def wait(self) -> float:
        """Return the seconds until the next round: short while a row is expected."""
        ages = [self.age(message) for message in self.journal.undecided()]
        if ages and 0 <= min(ages) < NO_ROW_SECONDS + 30:
            return min(0.5 if min(ages) < 15 else 2.0, self.config.poll_seconds)
        pauses = [moment - self.mac.awake() for moment in (self.not_before, self.server.quiet_until)]
        return min([pause for pause in pauses if pause > 0] + [self.config.poll_seconds])

    def note(self, problem: str | None) -> None:
        """Keep the problem for `status`, and log it when it changes."""
        if problem != self.problem:
            logger.warning("problem: %s", problem) if problem else logger.info("no problem any more")
        self.problem = problem
        self.journal.set_meta("problem", problem)

    def tell(self, problem: str | None) -> None:
        """Tell the server how the Mac is, when that changes and now and then."""
        age = self.mac.awake() - self.told[1] if self.told else 0
        if self.told and self.told[0] == problem and age < (HEALTH_SECONDS if problem else 3600):
            return
        self.server.health(problem)
        self.told = (problem, self.mac.awake())

    def stop(self, sentence: str) -> str:
        """Stop until the owner says `release`."""
        sentence = f"{sentence}, {RUN_RELEASE}"
        self.journal.stop(sentence, self.mac.now())
        return sentence

    def age(self, message: Message) -> float:
        """Return the seconds since a message was started."""
        return self.mac.now() - (message.started_at or self.mac.now())

    # --- checks: before each poll, and twice before each start ---

    def find_problem(self, fresh: bool = False) -> str | None:
        """Return the first reason not to poll and not to send. `fresh`: ask Messages also if it was fine lately."""
        for check in (self.check_stops, self.check_outbox, self.check_streaks, self.check_ceilings):
            if problem := check():
                return problem
        return self.find_obstacle(fresh)

    def find_obstacle(self, fresh: bool) -> str | None:
        """Return the first thing about this Mac, as it is now, that keeps a message from being sent."""
        for check in (self.check_mac, self.check_session, self.check_disk, self.check_chat):
            if problem := check():
                return problem
        return self.check_messages(fresh)

    def check_stops(self) -> str | None:
        return next(iter(self.journal.stops()), None)

    def check_outbox(self) -> str | None:
        for message in self.journal.undecided():
            if message.row == "outbox" and self.age(message) >= OUTBOX_SECONDS:
                return (
                    f"a message to {mask_handle(message.handle)} is in Messages' outbox since"
                    f" {local_time(message.started_at or 0)}: look at Messages, then run"
                    f" `python3 mac_sender.py release {message.batch_item_id}`"
                )
        return None

    def check_streaks(self) -> str | None:
        """Find what several messages show together: an address form that sends nothing, a blocked account."""
        three = self.journal.latest_starts(3)
        if len(three) == 3 and all(message.state == "unknown" and message.row == "none" for message in three):
            return f"three messages in a row left no trace in Messages: run `test HANDLE` to see why, {RUN_RELEASE}"
        sent = [message for message in self.journal.latest_starts(50) if (message.row_service or "").startswith("iM")]
        in_a_row = [message.state == "sent" for message in sent[:10]]
        if len(in_a_row) == 10 and all(in_a_row) and not any(message.delivered_at for message in sent):
            return (
                "of the last messages none was delivered, the account may be blocked:"
                f" send one by hand and see whether it arrives, {RUN_RELEASE}"
            )
        return None

    def check_ceilings(self) -> str | None:
        now = self.mac.now()
        for name, seconds in (("ceiling_per_hour", 3600), ("ceiling_per_day", DAY)):
            most = getattr(self.config, name)
            if self.journal.starts_since(now - seconds) >= most:
                return f"{most} messages were started, `{name}` of config.json: the sender waits"
        return None

    def check_mac(self) -> str | None:
        self.is_right_mac = self.is_right_mac or self.mac.hardware_uuid() == (self.config.hardware_uuid or "none")
        if not self.is_right_mac:
            return "config.json belongs to another Mac: run `install` here, with a token of its own"
        if self.mac.uid() != self.config.uid:
            return "config.json belongs to another user: run `install` as this one"
        return None

    def check_session(self) -> str | None:
        """See that this user's session is in front. A locked screen is fine."""
        try:
            is_in_front = self.mac.console_owner() == self.mac.uid()
        except OSError:
            is_in_front = False
        self.is_aqua = self.is_aqua or self.mac.manager() == "Aqua"
        if not self.is_aqua:
            return "this is no session of the desktop (no ssh): log in at the Mac, and start the sender with `install`"
        return None if is_in_front else "another user is in front of the Mac, or nobody: log in as the sender's user"

    def check_disk(self) -> str | None:
        return None if self.mac.free_bytes() >= ROOM else "the disk is full: free 200 MB at least"

    def check_chat(self) -> str | None:
        """See that chat.db can be read and is the one of before: Messages may rebuild it, with other rows."""
        try:
            with Chat(self.mac) as chat:
                inode, highest = str(chat.inode), chat.highest_rowid
        except ChatUnreadable as problem:
            return self.unreadable(problem)
        self.restart_at = None
        if self.journal.meta("chat_inode") not in (None, inode) or highest < int(self.journal.meta("chat_rowid") or 0):
            return self.stop("chat.db is not the one of before: see that Messages shows your conversations")
        self.journal.set_meta("chat_inode", inode)
        self.journal.set_meta("chat_rowid", str(highest))
        return None

    def unreadable(self, problem: ChatUnreadable) -> str:
        if problem.needs_restart and self.restart_at is None:
            self.restart_at = self.mac.awake() + RESTART_SECONDS
        return str(problem)

    def check_messages(self, fresh: bool) -> str | None:
        """Ask Messages whether it runs and is signed in. The permission is asked for first: that raises no window."""
        was_ready = self.probed is not None and self.mac.awake() - self.probed < PROBE_SECONDS
        if was_ready and not fresh:
            return None
        permission = None if was_ready else self.mac.permission()
        if permission in (-1743, -1744, BROKEN_AUTOMATION):
            problem: str | None = probe_sentence(permission)
        else:
            problem = self.messages.probe()
        self.probed = None if problem else self.mac.awake()
        return problem

    # --- polling and sending: steps 1 to 5 ---

    def poll(self) -> None:
        """Ask what waits, and take the first message that was never started."""
        response = self.server.peek()
        (self.config.home / "last_poll").touch()
        items, count = response.data.get("items"), response.data.get("optOuts")
        if response.status != 200 or not isinstance(items, list):
            self.stop(f"the server refuses a poll ({response.error}): see its log")
            return
        if type(count) is not int or any(isinstance(item, dict) and "attempt" not in item for item in items):
            self.stop(OLD_SERVER)
            return
        if self.has_forgotten(count):
            return
        for value in items:
            item = parse_item(value)
            if item and self.take(item):
                return

    def take(self, item: Item) -> bool:
        """Handle a listed message. Returns whether this round has done enough."""
        known = self.journal.get(item.pair)
        if known and (known.state == "not_started" and known.queue_id == item.queue_id):
            self.journal.relist(known, item.queue_id)  # the server has lost our report
            return False
        if known and known.state not in ("asked", "collected", "not_started"):
            self.journal.relist(known, item.queue_id)
            return False
        if self.find_problem(fresh=True):
            return True  # the next round says what it is
        return self.collect(self.journal.ask(item, self.mac.now()), item)

    def collect(self, message: Message, item: Item) -> bool:
        """Ask for one message, and start it. The server has the last word."""
        asked = self.mac.now()
        response = self.server.collect(message)
        now = self.mac.now()
        if response.status == 200:
            handle, text = str(response.data.get("toHandle", "")), str(response.data.get("body", ""))
            self.journal.collected(message, handle, text)
            self.start(message._replace(handle=handle, digest=digest(text), state="collected"), item, text, asked)
            return True
        logger.info("not handed over %s status=%d reason=%s", message, response.status, response.reason)
        if response.reason == "otherInstance":
            self.stop_for_other_mac()
        elif response.reason == "late":
            self.give_back(message, "handed over too long ago")
        elif response.reason == "collected":
            self.search_elsewhere(message, item, now)
        else:  # `gone`, or a 404: nothing is sent, and there is nothing to report
            return False
        return True

    def start(self, message: Message, item: Item, text: str, asked: float) -> None:
        """Check once more, then send: steps 4 and 5."""
        target = address(message.handle)
        if refusal := unsendable(target, text):
            self.decide(message, "failed", refusal)
            return
        problem = self.find_problem(fresh=True)
        if problem or self.journal.undecided():
            self.give_back(message, problem or "another message is undecided")
            return
        try:
            row = self.already_sent(message, item.drafted_at)
        except ChatUnreadable as unreadable:
            self.give_back(message, self.unreadable(unreadable))
            return
        now = self.mac.now()
        if not 0 <= now - asked <= COLLECT_SECONDS:
            self.give_back(message, f"more than {COLLECT_SECONDS} s went by: the Mac slept, or is slow")
            return
        if row:
            logger.info("not started, the text was sent before %s", message)
            self.journal.adopt(message, row, now)
            return
        self.journal.start(message, now)
        self.run_script(message, str(target), text, now)

    def run_script(self, message: Message, target: str, text: str, now: float, form: str = "") -> Script:
        logger.info("message started %s", message)
        script = self.messages.send(target, text, message.service, now + START_SECONDS, form)
        self.journal.ended(message, script, self.mac.now())
        logger.info("osascript ended %s phase=%s number=%d", message, script.phase, script.number)
        if script.number == BROKEN_AUTOMATION:
            self.stop(probe_sentence(BROKEN_AUTOMATION))
        if script.certainly_not_sent:
            self.probed = None
        else:
            self.give_backs = 0
        self.not_before = self.mac.awake() + self.config.pause_seconds
        return script

    def already_sent(self, message: Message, drafted: float) -> Row | None:
        """Find an outgoing row with this text to this address since the draft: the person has it already.

        One that failed for good does not count, nor does one that stands for another batch item.
        """
        now = self.mac.now()
        with Chat(self.mac) as chat:
            rows = [
                row
                for row in chat.outgoing(drafted, now + DAY)
                if key(row.handle) == key(message.handle)
                and digest(row.text) == message.digest
                and self.journal.owner_of(row.guid) in (None, message.batch_item_id)
                and not (row.state == "failing" and now - row.date >= SETTLE_SECONDS)
            ]
        return next((row for row in rows if row.state == "sent"), rows[-1] if rows else None)

    def search_elsewhere(self, message: Message, item: Item, now: float) -> None:
        """Look for a message that was collected before and that the journal does not know: it was lost or restored."""
        try:
            row = self.already_sent(message, item.drafted_at)
        except ChatUnreadable as unreadable:
            self.unreadable(unreadable)
            return  # asked again in the next round
        if row:
            self.journal.adopt(message, row, now)
            return
        self.journal.collected_elsewhere(message, item.drafted_at, now)
        error = "it was collected before, by somebody that this journal does not know"
        self.decide(message, "unknown", error, now + SEARCH_SECONDS)

    def give_back(self, message: Message, reason: str) -> None:
        """Return a message that was not started, and leave the server alone for a while."""
        self.decide(message, "not_started", reason)
        first, longest = BACK_OFF_SECONDS
        self.not_before = self.mac.awake() + min(first * 2**self.give_backs, longest)
        self.give_backs = min(self.give_backs + 1, 20)

    def decide(
        self, message: Message, state: str, error: str | None = None, watched_until: float | None = None
    ) -> None:
        self.journal.decide(message, state, self.mac.now(), error, watched_until)
        self.since.pop(message.pair, None)
        logger.info("message %s %s%s", state.replace("_", " "), message, f" reason={error!r}" if error else "")

    # --- confirming: step 6 ---

    def read_chat(self) -> str | None:
        """Follow what was started and read the replies. Returns why chat.db cannot be read, None if it can."""
        try:
            followed = self.journal.followed(self.mac.now())
            if followed:
                with Chat(self.mac) as chat:
                    for message in followed:
                        self.follow(chat, message)
            self.read_replies()
        except ChatUnreadable as problem:
            return self.unreadable(problem)
        return None

    def follow(self, chat: Chat, message: Message) -> None:
        """Let chat.db decide about one message."""
        row = chat.by_guid(message.guid) if message.guid else None
        if message.state == "sent":
            self.follow_later(message, row)
            return
        finding = ""
        if not row:
            row, finding = self.find_row(chat, message)
        if row:
            self.judge_row(message, row)
        elif message.state == "started":
            self.judge_absence(message, finding)

    def find_row(self, chat: Chat, message: Message) -> tuple[Row | None, str]:
        """Return the one candidate, or why there is none: none, two, other text, elsewhere."""
        started = message.started_at or 0.0
        until = (message.ended_at or started + KILL_SECONDS) + 60
        rows = [row for row in chat.outgoing(started - 10, until) if not self.journal.owner_of(row.guid)]
        here = [row for row in rows if row.handle and key(row.handle) == key(message.handle)]
        same = [row for row in here if digest(row.text) == message.digest]
        if len(same) > 1 and any(login(row.account) == key(message.handle) for row in same):
            for row in same[1:]:  # to oneself, one message may make two rows
                self.journal.own(message, row, self.mac.now())
            same = same[:1]
        if len(same) == 1:
            return same[0], ""
        if here:
            return None, "two" if same else "other text"
        strays = [row for row in rows if row.handle and digest(row.text) == message.digest]
        missing = {key(other.handle) for other in self.journal.followed(self.mac.now()) if not other.guid}
        return None, "elsewhere" if any(key(row.handle) not in missing for row in strays) else "none"

    def judge_row(self, message: Message, row: Row) -> None:
        """Decide about a message with a row: sent, failed (after ten minutes without a change), in the outbox."""
        if (message.guid, message.row, message.row_service) != (row.guid, row.state, row.service):
            self.journal.seen(message, row, self.mac.now())
            self.check_account(row)
        if row.state == "sent":
            self.decide(message, "sent")
        elif row.state == "failing":
            if self.unchanged(message, (row.guid, row.service, row.error, row.is_sent)) >= SETTLE_SECONDS:
                self.fail(message, row)
        elif message.state == "started" and self.age(message) >= OUTBOX_SECONDS:
            error = "it is in Messages' outbox for an hour, and may still leave"
            self.decide(message, "unknown", error, self.mac.now() + WATCH_SECONDS)

    def check_account(self, row: Row) -> None:
        """Stop if a row shows that the account is at fault, or is not the one of the configuration."""
        if row.state == "failing" and row.error in ACCOUNT_ERRORS:
            self.stop(f"Messages has a problem with its account ({error_text(row)}): sign out and in again")
        if self.config.send_as and row.account and login(row.account) != key(self.config.send_as):
            self.stop("Messages sends from another account than `send_as` in config.json: choose it in its settings")

    def fail(self, message: Message, row: Row) -> None:
        """Decide about a row that failed and did not change for ten minutes."""
        error = error_text(row)
        if self.config.sms and message.service == "iMessage" and row.error == NO_SUCH_RECIPIENT:
            # Given back, so that the server has the last word on the second start, too: ten minutes went by.
            self.journal.next_service(message, "SMS")
            self.decide(message, "not_started", f"{error}; the next start uses SMS")
        else:
            self.decide(message, "failed", error)

    def judge_absence(self, message: Message, finding: str) -> None:
        """Decide about a message without a row."""
        now, script = self.mac.now(), Script(message.phase or "perhaps", message.number or 0)
        if finding == "two":
            self.decide(message, "unknown", "Messages shows two messages with this text to this address")
        elif message.guid:  # it had a row, which was deleted
            if self.age(message) >= OUTBOX_SECONDS:
                self.decide(message, "unknown", "its row disappeared from chat.db", now + SEARCH_SECONDS)
        elif self.unchanged(message, "no row") < NO_ROW_SECONDS:
            return
        elif script.certainly_not_sent:
            if script == ("resolve", -1728):
                self.decide(message, "failed", "Messages knows no such address")
            else:
                self.give_back(message, NOT_SENT.get(script.number, "the script came too late, or could not run"))
        else:
            self.decide(message, "unknown", self.explain(finding), now + SEARCH_SECONDS)

    def explain(self, finding: str) -> str:
        """Return why the outcome is unknown, and stop if the message went to somebody else."""
        if finding == "elsewhere":
            sentence = "Messages shows the text in a conversation with another address than the one it was meant for"
            self.stop(f"{sentence}: see which")
            return sentence
        if finding == "other text":
            return "Messages shows another text to this address at that time"
        return "Messages shows no trace of it"

    def follow_later(self, message: Message, row: Row | None) -> None:
        """Look for what comes after `sent`: a receipt, or an error."""
        if row and row.delivered_at:
            self.journal.later(message, row.delivered_at, None)
        elif row and row.error and not row.is_sent:
            self.journal.later(message, None, error_text(row))

    def unchanged(self, message: Message, what: object) -> float:
        """Return for how long this process, awake, has seen the same of a message."""
        seen, since = self.since.get(message.pair, (None, 0.0))
        if seen != what:
            since = self.mac.awake()
            self.since[message.pair] = (what, since)
        return self.mac.awake() - since

    # --- reporting: step 7 ---

    def report(self) -> None:
        for message in self.journal.unreported():
            response = self.server.result(message.queue_id, result_body(message))
            if response.reason == "otherInstance":
                self.stop_for_other_mac()
                return
            if response.status != 200:
                logger.error("result refused %s status=%d error=%r", message, response.status, response.error)
            self.journal.reported(message)

    def stop_for_other_mac(self) -> None:
        self.stop("another Mac uses this token: make one for this Mac (`python db.py add-device NAME`), run `install`")

    # --- replies ---

    def read_replies(self) -> None:
        """Write the STOP and START words among the incoming messages to the journal, and nothing else of them.

        iCloud brings messages late, and with their own dates: so each reading goes three days back, and the first
        one in a day goes back to the installation. Groups do not count: nothing was ever sent to one.
        """
        signature = Chat.signature(self.mac.chat_path())
        now = self.mac.now()
        is_complete = not 0 <= now - self.replies_read < DAY
        if signature == self.chat_signature and not is_complete:
            return
        since = self.config.installed_at if is_complete else max(self.config.installed_at, now - REPLY_OVERLAP)
        with Chat(self.mac) as chat:
            for row in chat.incoming(since):
                word = reply_word(row.text) if row.text and row.handle else None
                if word:
                    self.journal.add_reply(row.handle, row.date, word)
        self.chat_signature = signature
        if is_complete:
            self.replies_read = now
            self.journal.report_all_replies_again()
            self.journal.forget_old(now)

    def report_replies(self) -> None:
        """Have the server accept each reply. Nothing is polled before that.

        Before a new one raises the server's count, see whether the count is lower than it was.
        """
        if self.journal.unreported_replies() and self.journal.meta("opt_outs") not in (None, "0"):
            count = self.server.peek().data.get("optOuts")
            if type(count) is int:
                self.has_forgotten(count)
        for handle, received_at, word in self.journal.unreported_replies():
            response = self.server.opt_out(handle, received_at, word)
            if response.status == 404:  # no such endpoint
                self.stop(OLD_SERVER)
                return
            logger.info("reply reported word=%s from=%s status=%d", word, mask_handle(handle), response.status)
            self.journal.reply_reported(handle, received_at, response.status == 200)
            count = response.data.get("optOuts")
            if type(count) is int and self.has_forgotten(count):
                self.report_replies()
                return

    def has_forgotten(self, count: int) -> bool:
        """See whether the server knows fewer opt-outs of ours than before: it was restored. Then report all again."""
        known = int(self.journal.meta("opt_outs") or 0)
        self.journal.set_meta("opt_outs", str(count))
        if count < known:
            logger.warning("the server has forgotten replies, all are reported again known=%d there=%d", known, count)
            self.journal.report_all_replies_again()
        return count < known


def error_text(row: Row) -> str:
    return f"Messages error {row.error}: {ERRORS.get(row.error, 'unknown error')}"


def unsendable(target: str | None, text: str) -> str | None:
    """Return why a message can never be sent, None if it can."""
    if target is None:
        return "the handle is neither a phone number with its + and country code nor an e-mail address"
    if not fold(text):
        return "the text is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not valid Unicode"
    return "the text has a NUL" if "\0" in text else None


def result_body(message: Message) -> Json:
    """Return the body of POST result."""
    if message.state == "sent":
        body: Json = {"status": "sent"}
        if message.late_error:
            body["lateError"] = message.late_error
        elif message.delivered_at:
            body["deliveredAt"] = to_iso(message.delivered_at)
        return body
    body = {"status": "failed", "error": message.error or "unknown error"}
    if message.state != "failed":
        body["outcome"] = message.state
    if message.state == "unknown" and message.watched_until:
        body["watchedUntil"] = to_iso(message.watched_until)
    return body


# --- the commands -------------------------------------------------------------------------------------

CLIENT_FOLDERS = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents")  # macOS guards each of them


def agent_file() -> Path:
    return Path.home() / "Library/LaunchAgents" / f"{LABEL}.plist"


def run(home: Path, once: bool = False) -> int:
    """Send until the end, or until nothing is undecided after one poll."""
    config = load_config(home)
    mac = Mac(config)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # it may end at any step, so also here
    with lock(home), contextlib.closing(Journal(home / "journal.db")) as journal:
        logger.info("mac-sender starting version=%s python=%s", VERSION, sys.executable)
        with contextlib.suppress(OSError):  # a Mac that sleeps sends nothing
            subprocess.Popen([config.caffeinate, "-i", "-w", str(os.getpid())])
        ask_for_permission(home, config, mac)
        sender = Sender(config, mac, journal)
        while True:
            pause = sender.round()
            if once and (sender.problem or not journal.undecided()):
                return 1 if sender.problem else 0
            if once:
                sender.not_before = float("inf")
            if sender.restart_at and mac.awake() >= sender.restart_at:
                logger.info("ending, so that launchd starts a process that sees new grants")
                return 0
            mac.sleep(pause)


def ask_for_permission(home: Path, config: Config, mac: Mac) -> None:
    """Raise macOS' question about Automation, if `install` waits for it with the owner in front of the Mac.

    It must come from the process that launchd starts: a grant to Terminal does not count for that.
    """
    marker = home / "ask"
    if marker.exists():
        problem = Messages(config, mac).probe(limit=120)
        logger.info("Automation was asked for problem=%r", problem)
        marker.unlink()


def doctor(home: Path) -> int:
    """Print each check and its remedy. Returns 1 if one fails."""
    findings: list[tuple[str, str | None]] = []
    try:
        config = load_config(home)
    except ConfigError as error:
        say(f"FAIL  settings: {error}")
        return 1
    mac = Mac(config)
    with contextlib.closing(Journal(home / "journal.db")) as journal:
        sender = Sender(config, mac, journal)
        findings = [
            ("settings", None),
            ("folder", folder_problem(home)),
            ("this Mac", sender.check_mac()),
            ("session", sender.check_session()),
            ("sleep", sleep_problem(mac)),
            ("disk", sender.check_disk()),
            ("chat.db", chat_problem(config, mac)),
            ("Messages", sender.check_messages(fresh=True)),
            ("server", server_problem(sender)),
            ("agent", agent_problem(config, mac)),
            ("journal", "; ".join(journal.stops()) or None),
            ("the running sender", journal.meta("problem")),
        ]
    say(f"Python {sys.executable} (really {os.path.realpath(getattr(sys, '_base_executable', sys.executable))})")
    say(f"macOS {mac.macos() or '?'}; messages leave from {sending_account(mac) or '?'}")
    for name, problem in findings:
        say(f"FAIL  {name}: {problem}" if problem else f"ok    {name}")
    return 1 if any(problem for _, problem in findings) else 0


def folder_problem(home: Path) -> str | None:
    if any(home.resolve().is_relative_to((Path.home() / folder).resolve()) for folder in CLIENT_FOLDERS):
        return f"{home} is in a folder that macOS guards: use the default, or another --home"
    return None


def sleep_problem(mac: Mac) -> str | None:
    match = re.search(r"^\s*sleep\s+(\d+)", mac.run(mac.config.pmset, "-g").output, re.MULTILINE)
    if match and match[1] == "0":
        return None
    return "the Mac goes to sleep, and sends nothing then: run `sudo pmset -a sleep 0`"


def chat_problem(config: Config, mac: Mac) -> str | None:
    try:
        with Chat(mac) as chat:
            account = chat.newest_account()
    except ChatUnreadable as problem:
        return str(problem)
    if config.send_as and account and login(account) != key(config.send_as):
        return f"messages leave from {account}, and `send_as` is {config.send_as}: choose it in Messages' settings"
    return None


def sending_account(mac: Mac) -> str:
    with contextlib.suppress(ChatUnreadable), Chat(mac) as chat:
        return chat.newest_account()
    return ""


def server_problem(sender: Sender) -> str | None:
    """Poll once without collecting anything."""
    try:
        response = sender.server.peek()
    except ServerAway as away:
        return f"{sender.config.url} cannot be asked ({away}): see `url` and `token` in config.json, and that it runs"
    if response.status != 200 or "optOuts" not in response.data:
        return "the server does not know this sender's requests: see `url` in config.json, or upgrade the server"
    if abs(sender.server.clock_ahead) > 60:
        return "the Mac's clock is not the server's: let both set date and time automatically"
    return None


def agent_problem(config: Config, mac: Mac) -> str | None:
    ran = mac.run(config.launchctl, "print", f"gui/{os.getuid()}/{LABEL}")
    return None if ran.status == 0 else "launchd does not run the sender: run `install` again"


def install(home: Path) -> int:
    """Ask for the settings, have launchd start the sender, and let macOS ask its question."""
    try:
        values = json.loads((home / "config.json").read_text())
    except (OSError, ValueError):
        values = {}
    old = dict(values)
    url, token = values.get("url", ""), values.get("token", "")
    values["url"] = ask(f"Address of the send queue server [{url or 'https://…'}]: ") or url
    values["token"] = ask_secret("This Mac's token (`python db.py add-device NAME` prints it): ") or token
    seams = check_config(home, {**values, "url": "http://unused", "token": "unused"})
    mac = Mac(seams)
    values.update(hardware_uuid=mac.hardware_uuid(), uid=os.getuid())
    values.setdefault("installed_at", mac.now())
    is_copied = old.get("hardware_uuid", values["hardware_uuid"]) != values["hardware_uuid"]
    if is_copied and old.get("token") == values["token"]:
        raise ConfigError("this folder was copied from another Mac: give this one a token of its own")
    config = check_config(home, values)
    write_config(home, values)
    with contextlib.closing(Journal(home / "journal.db")) as journal:
        journal.release(None, mac.now())
    program = home / "mac_sender.py"
    if Path(__file__).resolve() != program.resolve():
        program.write_bytes(Path(__file__).read_bytes())
    (home / "ask").touch()
    load_agent(home, config, mac, program)
    say("macOS now asks whether Python may control Messages: click OK (there may be no question if it is allowed).")
    for _ in range(130):
        if not (home / "ask").exists():
            break
        mac.sleep(1)
    return doctor(home)


def load_agent(home: Path, config: Config, mac: Mac, program: Path) -> None:
    """Write the LaunchAgent and start it. It starts again after each login, and after each end."""
    import plistlib  # only here: it costs memory

    settings = {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, str(program), "--home", str(home), "run"],
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 30,
        "LimitLoadToSessionType": "Aqua",
        "ProcessType": "Standard",
        "EnvironmentVariables": {"LANG": "en_US.UTF-8"},
        "StandardOutPath": "/dev/null",
        "StandardErrorPath": str(home / "stderr.log"),
    }
    agent_file().parent.mkdir(parents=True, exist_ok=True)
    agent_file().write_bytes(plistlib.dumps(settings))
    unload_agent(config, mac)
    for _ in range(10):  # launchd may still be ending the old one
        if mac.run(config.launchctl, "bootstrap", f"gui/{os.getuid()}", str(agent_file()), limit=30).status == 0:
            break
        mac.sleep(1)
    else:
        raise ConfigError("launchd refuses the sender: log in at the Mac itself (not by ssh), then run this again")
    mac.run(config.launchctl, "kickstart", f"gui/{os.getuid()}/{LABEL}", limit=30)


def unload_agent(config: Config, mac: Mac) -> None:
    mac.run(config.launchctl, "bootout", f"gui/{os.getuid()}/{LABEL}", limit=30)


def uninstall(home: Path) -> int:
    """Remove the agent and the token. The journal stays, because it knows what was sent."""
    try:
        config = load_config(home)
    except ConfigError:
        config = check_config(home, {"url": "http://unused", "token": "unused"})
    unload_agent(config, Mac(config))
    for path in (agent_file(), home / "config.json", home / "mac_sender.py"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    say(f"The sender is removed. The journal stays in {home}.")
    return 0


def status(home: Path) -> int:
    """Print what the sender last did, and what it waits for. Returns 1 if there is a problem."""
    with contextlib.closing(Journal(home / "journal.db")) as journal:
        with contextlib.suppress(OSError):
            say(f"Last poll: {local_time((home / 'last_poll').stat().st_mtime)}")
        problem = journal.meta("problem")
        say(f"Problem: {problem or 'none'}")
        for stop in journal.stops():
            say(f"Stopped: {stop}")
        sql = "SELECT state, count(*) FROM messages WHERE asked_at > ? GROUP BY state ORDER BY state"
        counts = journal.connection.execute(sql, (time.time() - DAY,))
        say("Last 24 hours: " + (", ".join(f"{count} {state}" for state, count in counts) or "nothing"))
        for message in journal.messages("state IN ('asked', 'collected', 'started', 'unknown') ORDER BY asked_at"):
            say(f"{local_time(message.asked_at)} {message.state} row={message.row} {message} {message.error or ''}")
        refused = journal.connection.execute("SELECT count(*) FROM replies WHERE reported = 2").fetchone()[0]
        if refused:
            say(f"The server refused {refused} replies: its log says why.")
    return 1 if problem else 0


def release(home: Path, message_id: str | None) -> int:
    with contextlib.closing(Journal(home / "journal.db")) as journal:
        count = journal.release(message_id, time.time())
    if message_id and not count:
        say(f"The journal has no such message: {message_id}")
        return 1
    say("The sender goes on.")
    return 0


def test(home: Path, handle: str) -> int:
    """Send a message with each address form, with the owner watching. Returns 1 if none arrived in Messages as sent."""
    config = load_config(home)
    target = address(handle)
    if not target:
        raise ConfigError("write the number with its + and country code, or an e-mail address")
    mac = Mac(config)
    is_loaded = agent_problem(config, mac) is None
    unload_agent(config, mac)
    try:
        with lock(home), contextlib.closing(Journal(home / "journal.db")) as journal:
            sender = Sender(config, mac, journal)
            forms = sorted(ADDRESS_FORMS, key=lambda form: form != config.address_form)
            worked = [form for form in forms if test_form(sender, target, form)]
    finally:
        if is_loaded:
            mac.run(config.launchctl, "bootstrap", f"gui/{os.getuid()}", str(agent_file()), limit=30)
    if worked and config.address_form not in worked:
        say(f'Write "address_form": "{worked[0]}" into config.json, and run `install` again.')
    return 0 if worked else 1


def test_form(sender: Sender, target: str, form: str) -> bool:
    """Send one message with one address form, and print what happens. Returns whether Messages sent it."""
    if ask(f"Send a message to {target} with the form `{form}`? [y/N] ").lower() != "y":
        return False
    mac, journal = sender.mac, sender.journal
    if problem := sender.find_obstacle(fresh=True):
        say(f"  not started: {problem}")
        return False
    text = f"Test of the sender, {form}, {time.strftime('%H:%M:%S')}"
    item = Item("", f"test-{uuid.uuid4()}", 1, target, text, mac.now())
    message = journal.ask(item, mac.now())
    journal.collected(message, target, text)
    journal.start(message, mac.now())
    script = sender.run_script(message, target, text, mac.now(), form)
    say(f"  osascript: {script.phase} {script.number}" + (" (which proves nothing)" if script.phase == "done" else ""))
    began, shown = mac.awake(), ""
    while mac.awake() - began < NO_ROW_SECONDS + 30:
        if problem := sender.read_chat():
            say(f"  {problem}")
        message = journal.get(item.pair) or message
        line = f"  chat.db: row {message.row}, service {message.row_service or '-'}, so far: {message.state}"
        if line != shown:
            say(line)
        shown = line
        if message.delivered_at or message.state in ("failed", "not_started", "unknown"):
            break
        mac.sleep(0.5)
    say("  delivered" if message.delivered_at else f"  {message.error or 'no receipt so far'}")
    return message.state == "sent"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def ask(question: str) -> str:
    say(question)
    return sys.stdin.readline().strip()


def ask_secret(question: str) -> str:
    if not sys.stdin.isatty():
        return ask(question)
    import getpass  # only here: it costs memory

    return getpass.getpass(question).strip()


def set_up_logging(home: Path) -> None:
    """Log to sender.log, five files of a megabyte, and to a terminal if there is one."""
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(home / "sender.log", maxBytes=1_000_000, backupCount=4)
    ]
    if sys.stderr.isatty():
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level="INFO", handlers=handlers, format="%(asctime)s %(levelname)s %(message)s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Send the queue's messages with Messages.app.",
        epilog="examples: python3 mac_sender.py install; python3 mac_sender.py test +14155550123",
    )
    default = Path.home() / "Library/Application Support/send-queue"
    parser.add_argument("--home", type=Path, default=default, help="config.json, the journal and the log; %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="set up this Mac, and start the sender")
    commands.add_parser("doctor", help="check everything, and say what to do")
    commands.add_parser("status", help="what it last did, and what it waits for")
    commands.add_parser("run", help="send; launchd runs this").add_argument("--once", action="store_true")
    commands.add_parser("test", help="send a test message, and say what happens").add_argument("handle")
    commands.add_parser("release", help="go on after a stop, or past a message").add_argument("id", nargs="?")
    commands.add_parser("uninstall", help="remove the agent and the token; the journal stays")
    commands.add_parser("permission", help="the number of macOS' word on Automation")
    return parser.parse_args()


def dispatch(arguments: argparse.Namespace, home: Path) -> int:
    if arguments.command == "run":
        return run(home, arguments.once)
    if arguments.command == "test":
        return test(home, arguments.handle)
    if arguments.command == "release":
        return release(home, arguments.id)
    commands = {"install": install, "doctor": doctor, "status": status, "uninstall": uninstall}
    return commands[arguments.command](home)


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "permission":
        say(str(automation_permission()))
        return 0
    os.umask(0o077)
    home = arguments.home.expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    set_up_logging(home)
    try:
        return dispatch(arguments, home)
    except ConfigError as error:
        logger.error("%s", error)
        sys.stderr.write(f"mac_sender.py: {error}\n")
        return 2
    except Exception as error:  # noqa: BLE001  # its text may quote a message, so only its kind is logged
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("the sender failed error=%s\n%s", type(error).__name__, frames)
        return 1


if __name__ == "__main__":
    sys.exit(main())
