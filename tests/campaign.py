"""A long random run: everything that can break does, by a seeded schedule, and not one message is lost or doubled.

Run by `make faults` (one round) and `make soak` (rounds for as long as asked), over a PostgreSQL of its own. The
processes are the real ones: a server, two dispatchers, three devices. Time runs fast by their settings alone: a cycle
a second, limits that fill within the minute. Each round prints what it did; a failing seed replays its schedule:

    python tests/campaign.py --seconds 600 --seed 7
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import device
import history
import proxy
import psycopg2
from conftest import ROOT, Databases, PrivatePostgres, Script, World, on_database, until

import db

STORM = 60  # seconds of a round in which things break
CALM = 90  # seconds that it may take after that until each message has ended
BATCHES, ITEMS = 80, 32  # so many batches of so many messages
FAILING, UNREACHABLE = 0.15, 0.02  # shares of the messages that a device cannot send, and that have no handle
LOSS, DELAY = 0.012, 0.02  # of the exchanges over HTTP: request lost, answer lost; answer late
CUT = 0.002  # of the statements: connection lost before, or after it was run
BREAKING_EVERY, CHANGING_EVERY = 0.4, 0.9  # seconds between two faults, and two changes of the settings
LOOKS_EVERY = 15  # seconds between two looks of the checker
EXITS = 12  # seconds in which SIGTERM must end a process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Over(Exception):
    """The storm has ended while this fault waited for its turn."""


class Member:
    """A process of the round, which is started again whenever it has ended."""

    def __init__(self, name: str, path: Path, command: tuple[str, ...], environment: dict[str, str]) -> None:
        self.name, self.command, self.environment = name, command, environment
        self.log = path / f"{name}.log"
        self.lock = threading.Lock()  # one fault at a time
        self.script: Script | None = None

    def start(self) -> None:
        self.log.touch()
        self.told = len(self.log.read_bytes())
        self.script = Script(self.log, *self.command, **self.environment)

    def signal(self, number: int) -> None:
        if self.script:
            self.script.process.send_signal(number)

    def end(self, number: int) -> int:
        """Send it the signal that ends it; its exit status."""
        assert self.script
        self.signal(number)
        return self.script.process.wait(EXITS)

    def terminate(self) -> str:
        """End it with SIGTERM; what was wrong about its end, "" for an exit with 0.

        While its modules are loaded, it dies of the signal as any process does.
        """
        ready = any(phrase in self.log.read_bytes()[self.told :] for phrase in (b"listening", b"starting"))
        try:
            status = self.end(signal.SIGTERM)
            wrong = f"ended with {status}" if status and ready else ""
        except subprocess.TimeoutExpired:
            self.end(signal.SIGKILL)
            wrong = f"did not end within {EXITS} s"
        last = self.log.read_text(errors="replace").splitlines()[-3:]
        return wrong and f"{self.name} {wrong} on SIGTERM; its last lines: {last}"


@dataclass
class Report:
    """What a round has done and found. `recovery`: the longest time from a fault's end to the next sync and poll."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    stormy: int = 0  # of the messages, those sent while things broke
    duplicates: int = 0
    losses: int = 0
    violations: int = 0
    recovery: float = 0.0
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        def listed(counts: Counter[str]) -> str:
            return f"{sum(counts.values())} ({', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))})"

        return [
            f"seed {self.seed}: {self.seconds:.0f} s on {os.cpu_count()} cores",
            f"  faults injected   {listed(self.faults)}",
            f"  changes made      {listed(self.changes)}",
            f"  messages          {self.messages}, {self.stormy} of them amid the faults",
            f"  duplicates        {self.duplicates}",
            f"  losses            {self.losses}",
            f"  limit violations  {self.violations}",
            f"  longest recovery  {self.recovery:.1f} s",
            *(f"  WRONG: {words}" for words in self.complaints[:40]),
        ]


class Event(NamedTuple):
    """Something to do, `at` seconds into the round; `dice` decides the rest, the same way whenever it is replayed."""

    at: float
    kind: str
    dice: random.Random


class Round:
    """One seeded run over fresh databases."""

    def __init__(self, seed: int, path: Path, cluster: PrivatePostgres) -> None:
        self.report = Report(seed)
        self.path, self.cluster = path, cluster
        self.dice = random.Random(seed)
        self.ends: list[float] = []  # when each fault was over
        self.storm = True
        self.lock = threading.Lock()
        urls = {}
        with contextlib.closing(db.connect(cluster.url)) as admin:
            for part in db.URL_VARIABLES:
                db.query(admin, f"CREATE DATABASE {part}_{seed}")
                urls[part] = on_database(cluster.url, f"{part}_{seed}")
                db.migrate(urls[part], part)
        self.urls = urls
        conns = [db.connect(urls[part]) for part in ("quinn", "icloud")]
        history.install(*conns)
        self.world = World(Databases(urls["quinn"], urls["icloud"], *conns))
        self.deleted: set[str] = set()
        self.members = self._members()

    # --- the cast -------------------------------------------------------------------------------------

    def _members(self) -> dict[str, Member]:
        port = free_port()
        self.wires: list[proxy.Proxy] = [
            wire(("127.0.0.1", port), self._http_weather()) for wire in (proxy.Http, proxy.Http)
        ]
        self.statements = {
            part: proxy.Postgres(proxy.behind(url), self._statement_weather()) for part, url in self.urls.items()
        }
        self.wires += self.statements.values()
        environment = {
            db.URL_VARIABLES[part]: proxy.through(url, self.statements[part]) for part, url in self.urls.items()
        } | {"SEND_QUEUE_PORT": str(port), "DISPATCH_INTERVAL_SECONDS": "1"}
        members = {"server": Member("server", self.path, ("send_queue_server.py",), environment)}
        for number in (1, 2):
            base_url = {"MAC_SYNC_BASE_URL": f"http://127.0.0.1:{self.wires[0].port}"}
            name = f"dispatcher-{number}"
            members[name] = Member(name, self.path, ("dispatcher.py",), environment | base_url)
        for number in (1, 2, 3):
            members[f"device-{number}"] = self._device(f"device-{number}")
        return members

    def _device(self, name: str) -> Member:
        self.world.device(name)
        base_url, log = f"http://127.0.0.1:{self.wires[1].port}", self.path / f"{name}.device"
        command = (str(ROOT / "tests/device.py"), base_url, str(log))
        return Member(name, self.path, command, {"DEVICE_TOKEN": name})

    def fill(self) -> None:
        """The batches, with clients that get several messages each."""
        clients = [self.world.client(f"+1415555{number:04}") for number in range(200)]
        unreachable = self.world.client(None)
        number = itertools.count(1)
        for _ in range(BATCHES):
            batch_id = self.world.batch()
            for _ in range(ITEMS):
                words = f"message {next(number)}" + (" fails" if self.dice.random() < FAILING else "")
                client = unreachable if self.dice.random() < UNREACHABLE else self.dice.choice(clients)
                self.world.item(batch_id, client, rendered_body=words)
        self.world.settings(max_per_minute=900)
        for conn in (self.world.databases.quinn, self.world.databases.icloud):
            conn.close()  # PostgreSQL will be killed, and would say so to them

    # --- what breaks by chance ------------------------------------------------------------------------

    def _http_weather(self) -> proxy.Meddle:
        dice, lock = random.Random(self.dice.random()), threading.Lock()

        def meddle(moment: proxy.Moment, _what: str) -> bool:
            if not self.storm:
                return True
            with lock:
                lost, late = dice.random() < LOSS, moment == "after" and dice.random() < DELAY
                wait = dice.choice(5 * (0.05, 0.1, 0.3) + (1.0, 6.0))
            if lost:
                self._count("request lost" if moment == "before" else "answer lost")
            elif late:
                self._count("answer delayed")
                time.sleep(wait)
            return not lost

        return meddle

    def _statement_weather(self) -> proxy.Meddle:
        dice, lock = random.Random(self.dice.random()), threading.Lock()

        def meddle(moment: proxy.Moment, _what: str) -> bool:
            with lock:
                cut = self.storm and dice.random() < CUT
            if cut:
                self._count(f"database connection cut {moment} a statement")
            return not cut

        return meddle

    def _count(self, kind: str) -> None:
        with self.lock:
            self.report.faults[kind] += 1

    # --- what breaks by schedule ----------------------------------------------------------------------

    def schedule(self) -> list[Event]:
        """The round's faults and changes, all decided before it starts."""
        faults = ["kill"] * 16 + ["term"] * 5 + ["stop"] * 10 + ["off"] * 4 + ["postgres", "postgres", "backend"]
        changes = ["pause", "quiet", "gap"] + ["limit"] * 3 + ["choose"] * 3 + ["batch"] * 8
        events = []
        for every, kinds in ((BREAKING_EVERY, faults), (CHANGING_EVERY, changes)):
            at = 2.0
            while at < STORM:
                events.append(Event(at, self.dice.choice(kinds), random.Random(self.dice.random())))
                at += self.dice.expovariate(1 / every)
        events.append(Event(STORM * 0.4, "night", random.Random(self.dice.random())))
        events.append(Event(STORM * 0.6, "delete", random.Random(self.dice.random())))
        return sorted(events, key=lambda event: event.at)

    def happen(self, event: Event) -> None:
        """Carry an event out, in a thread of its own, to its end."""
        action: Callable[[random.Random], None] = getattr(self, f"_{event.kind}")
        while True:
            try:
                return action(event.dice)
            except psycopg2.Error:  # the database is away just now: a change is made later
                if not self.storm:
                    return
                time.sleep(0.2)
            except Over:
                return
            except Exception as error:  # noqa: BLE001  # in a thread, where it would pass unseen
                self.report.complaints.append(f"{event.kind} could not be done: {type(error).__name__} {error}")
                return

    @contextlib.contextmanager
    def _fault(self, member: Member | None, kind: str) -> Iterator[None]:
        """Count it, and note when it was over. A member suffers one fault at a time; the next waits for it."""
        with member.lock if member else contextlib.nullcontext():
            if not self.storm:
                raise Over
            self._count(kind)
            yield
            self.ends.append(time.time())

    def _complain(self, words: str) -> None:
        if words:
            self.report.complaints.append(words)

    def _victim(self, dice: random.Random, among: str = "") -> Member:
        names = [name for name in self.members if name.startswith(among) and name not in self.deleted]
        return self.members[dice.choice(names)]

    def _kill(self, dice: random.Random) -> None:
        member = self._victim(dice)
        with self._fault(member, f"SIGKILL of a {member.name.split('-')[0]}"):
            member.end(signal.SIGKILL)
            time.sleep(dice.choice((0, 0, 0.5)))
            self._revive(member)

    def _term(self, dice: random.Random) -> None:
        member = self._victim(dice)
        with self._fault(member, f"SIGTERM of a {member.name.split('-')[0]}"):
            self._complain(member.terminate())
            self._revive(member)

    def _stop(self, dice: random.Random) -> None:
        member = self._victim(dice)
        with self._fault(member, f"SIGSTOP of a {member.name.split('-')[0]}"):
            member.signal(signal.SIGSTOP)
            time.sleep(dice.choice(4 * (0.1, 0.3, 0.5) + (1, 2, 6)))
            member.signal(signal.SIGCONT)

    def _off(self, dice: random.Random) -> None:
        member = self._victim(dice, "device")
        with self._fault(member, "device off"):
            member.end(signal.SIGKILL)
            time.sleep(dice.uniform(2, 6))
            self._revive(member)

    def _revive(self, member: Member) -> None:
        if member.name not in self.deleted:
            member.start()

    def _postgres(self, dice: random.Random) -> None:
        kind = dice.choice(("stop", "SIGKILL"))
        with self.cluster_lock, self._fault(None, f"{kind} of PostgreSQL"):
            (self.cluster.kill if kind == "SIGKILL" else self.cluster.server.stop)()
            self.cluster.start()

    def _backend(self, dice: random.Random) -> None:
        """A session's process dies, and PostgreSQL, which trusts its memory no longer, starts itself anew."""
        with self.cluster_lock, contextlib.closing(db.connect(self.urls["quinn"])) as conn:
            sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' ORDER BY pid"
            pid = dice.choice(db.query(conn, sql))[0]
            with self._fault(None, "SIGKILL of a PostgreSQL session"):
                os.kill(pid, signal.SIGKILL)
                until(self._database_answers)

    def _database_answers(self) -> bool:
        with contextlib.suppress(psycopg2.Error), contextlib.closing(db.connect(self.urls["quinn"])):
            return True
        return False

    cluster_lock = threading.Lock()

    # --- what its owner changes -----------------------------------------------------------------------

    def _change(self, kind: str, sql: str, part: db.DatabaseName = "quinn", **params: Any) -> list[db.Row]:
        with contextlib.closing(db.connect(self.urls[part])) as conn:
            rows = db.query(conn, sql, params)
        with self.lock:
            self.report.changes[kind] += 1
        return rows

    def _for_a_while(self, dice: random.Random, kind: str, on: str, off: str, **params: Any) -> None:
        self._change(kind, on, **params)
        end = time.monotonic() + dice.uniform(0.5, 2.5)
        while time.monotonic() < end and self.storm:
            time.sleep(0.1)
        while self.storm:
            with contextlib.suppress(psycopg2.Error):
                self._change(f"{kind} over", off)
                return

    def _pause(self, dice: random.Random) -> None:
        on, off = (f"UPDATE outreach_settings SET paused = {value}" for value in (True, False))
        self._for_a_while(dice, "sending paused", on, off)

    def _quiet(self, dice: random.Random, begins: datetime | None = None) -> None:
        begins = begins or datetime.now(UTC)
        on = "UPDATE outreach_settings SET quiet_hours_tz = 'UTC', quiet_hours_start = %(s)s, quiet_hours_end = %(e)s"
        off = "UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL"
        ends = begins + timedelta(minutes=3)
        self._for_a_while(dice, "quiet hours", on, off, s=f"{begins:%H:%M}", e=f"{ends:%H:%M}")

    def _night(self, _dice: random.Random) -> None:
        """Quiet hours begin by themselves at the next full minute; the dispatchers are dead then."""
        begins = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
        on = "UPDATE outreach_settings SET quiet_hours_tz = 'UTC', quiet_hours_start = %(s)s, quiet_hours_end = %(e)s"
        off = "UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL"
        self._change("night", on, s=f"{begins:%H:%M}", e=f"{begins + timedelta(minutes=2):%H:%M}")
        while self.storm and datetime.now(UTC) < begins - timedelta(seconds=1):
            time.sleep(0.1)
        if not self.storm:
            return
        members = [self.members["dispatcher-1"], self.members["dispatcher-2"]]
        with contextlib.ExitStack() as dead:
            for member in members:
                dead.enter_context(self._fault(member, "SIGKILL of a dispatcher"))
                member.end(signal.SIGKILL)
            time.sleep(4)
            for member in members:
                member.start()
        self._change("night over", off)

    def _limit(self, dice: random.Random) -> None:
        name = dice.choice(("max_per_minute", "max_per_minute", "max_per_hour"))
        most = dice.choice((600, 900, 1200, 1500) if name == "max_per_minute" else (1000, 1500, None))
        self._change("limit changed", f"UPDATE outreach_settings SET {name} = %(most)s", most=most)

    def _gap(self, dice: random.Random) -> None:
        sql = "UPDATE outreach_settings SET min_gap_seconds = %(gap)s"
        self._change("gap changed", sql, gap=dice.choice((None, None, None, 0, 1)))

    def _choose(self, dice: random.Random) -> None:
        rows = self._change("device chosen", "SELECT id FROM icloud.devices ORDER BY created_at", "icloud")
        self._change("device chosen", "UPDATE outreach_settings SET device_id = %(id)s", id=dice.choice(rows)[0])

    def _batch(self, dice: random.Random) -> None:
        """Most are paused for a while, a few are cancelled."""
        sql = "SELECT id FROM outreach_batches WHERE status = 'sending' ORDER BY created_at"
        with contextlib.closing(db.connect(self.urls["quinn"])) as conn:
            rows = db.query(conn, sql)
        if not rows:
            return
        batch_id = dice.choice(rows)[0]
        move = "UPDATE outreach_batches SET status = '{}' WHERE id = '{}' AND status = '{}'"
        if dice.random() < 0.15:
            self._change("batch cancelled", move.format("cancelled", batch_id, "sending"))
        else:
            on, off = move.format("paused", batch_id, "sending"), move.format("sending", batch_id, "paused")
            self._for_a_while(dice, "batch paused", on, off)

    def _delete(self, _dice: random.Random) -> None:
        member = self.members["device-3"]
        with member.lock:
            self.deleted.add(member.name)
            member.end(signal.SIGKILL)
            self._change("device deleted", "DELETE FROM icloud.devices WHERE name = 'device-3'", "icloud")

    # --- the run --------------------------------------------------------------------------------------

    def run(self) -> Report:
        start = time.monotonic()
        self.fill()
        for member in self.members.values():
            member.start()
        try:
            self._weather(start)
            self._calm()
            self._judge(history.CHECKS)
        finally:
            self.storm = False
            self._end()
        self.report.seconds = time.monotonic() - start
        return self.report

    def _weather(self, start: float) -> None:
        threads, looked = [], time.monotonic()
        for event in self.schedule():
            time.sleep(max(0, start + event.at - time.monotonic()))
            threads.append(threading.Thread(target=self.happen, args=(event,)))
            threads[-1].start()
            if time.monotonic() - looked > LOOKS_EVERY and not self.report.complaints:
                looked = time.monotonic()
                # The books agree only when everything has ended.
                self._judge([check for check in history.CHECKS if check is not history.books_agree])
            if self.report.complaints:
                break
        self.report.stormy = sum(len(device.sends(log)) for log in self.path.glob("*.device"))
        self.storm = False
        for thread in threads:
            thread.join()

    def _calm(self) -> None:
        """Everything works and nothing is held: so everything must end."""
        with contextlib.closing(db.connect(self.urls["quinn"])) as conn:
            sql = """
                UPDATE outreach_settings
                   SET paused = false, quiet_hours_start = NULL, quiet_hours_end = NULL, min_gap_seconds = NULL,
                       max_per_minute = NULL, max_per_hour = NULL
            """
            db.query(conn, sql)
            db.query(conn, "UPDATE outreach_batches SET status = 'sending' WHERE status = 'paused'")
        try:
            until(self._all_has_ended, CALM)
        except AssertionError:
            self.report.complaints.append(f"not everything has ended {CALM} s after the last fault")

    def _all_has_ended(self) -> bool:
        quinn = """
            SELECT (SELECT count(*) FROM outreach_batches WHERE status = 'sending')
                 + (SELECT count(*) FROM outreach_batch_items WHERE status = 'queued' OR claimed_at IS NOT NULL)
        """
        icloud = "SELECT count(*) FROM icloud.send_queue WHERE status = 'queued'"
        time.sleep(0.2)
        left = 0
        for part, sql in {"quinn": quinn, "icloud": icloud}.items():
            with contextlib.closing(db.connect(self.urls[part])) as conn:  # type: ignore[index]  # a Part
                left += db.query(conn, sql)[0][0]
        return left == 0

    def _past(self) -> history.Past:
        with (
            contextlib.closing(db.connect(self.urls["quinn"])) as quinn,
            contextlib.closing(db.connect(self.urls["icloud"])) as icloud,
        ):
            return history.Past(history.read(quinn, icloud), self.path.glob("*.device"))

    def _judge(self, checks: Any) -> None:
        try:
            past = self._past()
        except psycopg2.Error:  # away just now: the next look will tell
            return
        report = self.report
        found = history.complaints(past, checks)
        report.complaints += found
        report.messages = len(past.sends)
        report.duplicates = len(history.doubled(past)) + sum("live rows" in words for words in found)
        report.losses = sum(words.startswith("books_agree") for words in found)
        report.violations = sum(words.startswith("limits_hold") for words in found)
        report.recovery = self._longest_recovery(past)

    def _longest_recovery(self, past: history.Past) -> float:
        """From the end of a fault to the next sync and the next answered poll, whatever else breaks meanwhile."""
        polls = sorted(at for log in self.path.glob("*.device") for at in device.polls(log))
        longest = 0.0
        for end in self.ends:
            nexts = [next((at for at in signs if at >= end), end) for signs in (past.syncs, polls)]
            longest = max(longest, *(at - end for at in nexts))
        return longest

    def _end(self) -> None:
        for member in self.members.values():
            member.signal(signal.SIGCONT)
            self._complain(member.terminate())
        for wire in self.wires:
            wire.close()


def round_of(seed: int, path: Path) -> Report:
    """A round over a cluster of its own, under `path`."""
    cluster = PrivatePostgres(path / "postgres")
    try:
        return Round(seed, path, cluster).run()
    finally:
        cluster.server.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Break everything at random, and count what is lost or doubled.",
        epilog="example: python tests/campaign.py --seconds 3600 --seed 1",
    )
    parser.add_argument("--seconds", type=int, default=60, help="no new round begins after these; default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the first round, the next one's is one more")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    for seed in itertools.count(arguments.seed):
        with tempfile.TemporaryDirectory() as path:
            report = round_of(seed, Path(path))
        sys.stdout.write("\n".join(report.lines()) + "\n")
        sys.stdout.flush()
        if report.complaints:
            sys.stdout.write(f"replay: python tests/campaign.py --seed {seed} --seconds 1\n")
            return 1
        if time.monotonic() > end:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
