"""Log the owner in on the page, and recognise the browser again.

Used by page.py. Touches outreach_sessions in quinn. The owner's token is the password. A session is an opaque random
value in a cookie. The table keeps only its HMAC-SHA-256, whose key is the owner's token: so neither a stolen database
nor write access to it gives a session, and a new token ends all sessions. Example:

    value = sessions.log_in(quinn, password); sessions.find(quinn, value)
"""

import hashlib
import hmac
import logging
import math
import secrets
import threading
import time
from typing import Any

import db

IDLE_DAYS = 14  # a session that nobody used for so long has ended
MAX_DAYS = 90  # so has one that was made so long ago
# Wrong attempts that are checked at once, and the seconds until one more is: 8,640 a day, in however many requests.
BURST = 5
REFILL = 10
REMEMBERED = 3600  # seconds for which a session that was found counts while the database is unavailable
MAX_REMEMBERED = 1000

Connection = Any  # psycopg2's connection
logger = logging.getLogger("outreach-server")


class WrongToken(Exception):
    """The password is not the owner's token."""


class TooManyAttempts(Exception):
    """This attempt was not checked. `seconds`: after so many, one is."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many wrong attempts: the next one is checked in {seconds} s")
        self.seconds = seconds


class Attempts:
    """Count wrong attempts, of all clients together: behind a proxy all have one address.

    An attempt is counted before it is checked. So parallel requests get no more attempts than successive ones, and none
    of them occupies a thread for longer than a comparison.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.left = float(BURST)
        self.counted_at = time.monotonic()

    def begin(self) -> None:
        """Count an attempt. Raises TooManyAttempts if none is left."""
        with self.lock:
            now = time.monotonic()
            self.left = min(BURST, self.left + (now - self.counted_at) / REFILL)
            self.counted_at = now
            if self.left < 1:
                raise TooManyAttempts(math.ceil((1 - self.left) * REFILL))
            self.left -= 1

    def succeed(self) -> None:
        """Take back the attempt that was right."""
        with self.lock:
            self.left = min(BURST, self.left + 1)


class Sessions:
    """The sessions of the holder of one token."""

    def __init__(self, token: str) -> None:
        self.token = token.encode()
        self.attempts = Attempts()
        self.remembered: dict[str, float] = {}  # hash -> time.monotonic() at which it was found

    def hash(self, value: str) -> str:
        """Return what the table has of a cookie's value."""
        return hmac.new(self.token, value.encode(errors="replace"), hashlib.sha256).hexdigest()

    def check_password(self, password: str) -> None:
        """Raises WrongToken and TooManyAttempts."""
        self.attempts.begin()
        if not hmac.compare_digest(password.encode(errors="replace"), self.token):
            raise WrongToken
        self.attempts.succeed()

    def begin(self, quinn: Connection) -> str:
        """Make a session after the password was checked; return the cookie's value. Delete those that have ended."""
        delete = """
            DELETE FROM outreach_sessions
             WHERE last_used_at < now() - %(idle)s * interval '1 day' OR created_at < now() - %(max)s * interval '1 day'
        """
        insert = "INSERT INTO outreach_sessions (token_hash) VALUES (%(hash)s)"
        value = secrets.token_urlsafe(32)
        db.query(quinn, delete, {"idle": IDLE_DAYS, "max": MAX_DAYS})
        db.query(quinn, insert, {"hash": self.hash(value)})
        self._remember(self.hash(value))
        logger.info("owner logged in")
        return value

    def find(self, quinn: Connection, value: str) -> str | None:
        """Return the hash of a cookie's session; None if there is no such session, or if it has ended.

        Its use is written down at most every 10 minutes: a page that refreshes itself would write every 5 seconds.
        """
        sql = """
            WITH used AS (
                UPDATE outreach_sessions
                   SET last_used_at = now()
                 WHERE token_hash = %(hash)s AND last_used_at < now() - interval '10 minutes'
                   AND last_used_at > now() - %(idle)s * interval '1 day'
                   AND created_at > now() - %(max)s * interval '1 day'
            )
            SELECT token_hash
              FROM outreach_sessions
             WHERE token_hash = %(hash)s AND last_used_at > now() - %(idle)s * interval '1 day'
               AND created_at > now() - %(max)s * interval '1 day'
        """
        hashed = self.hash(value)
        if db.query(quinn, sql, {"hash": hashed, "idle": IDLE_DAYS, "max": MAX_DAYS}):
            self._remember(hashed)
            return hashed
        self.remembered.pop(hashed, None)
        return None

    def recall(self, value: str) -> str | None:
        """Return the hash of a cookie's session if this process found it in the last hour; ask no database.

        For a page that says that the database is unavailable, and for an upload before its body is read.
        """
        hashed = self.hash(value)
        found_at = self.remembered.get(hashed)
        return hashed if found_at is not None and time.monotonic() - found_at < REMEMBERED else None

    def end(self, quinn: Connection, value: str) -> None:
        """Log out."""
        hashed = self.hash(value)
        self.remembered.pop(hashed, None)
        db.query(quinn, "DELETE FROM outreach_sessions WHERE token_hash = %(hash)s", {"hash": hashed})
        logger.info("owner logged out")

    def _remember(self, hashed: str) -> None:
        if len(self.remembered) >= MAX_REMEMBERED:
            self.remembered.clear()
        self.remembered[hashed] = time.monotonic()
