"""Inject random faults by a seeded schedule, and check that no message is lost or sent twice.

Run by `make faults` (one run of two minutes or three) and `make soak` (one run after another). The processes are real:
a server, two dispatchers, a PostgreSQL, and three Macs, each with the sender and a stand-in for Messages. Faults hit
all of them. A tick each second, short waiting times and limits that fill within a minute make a run short. What really
left the Macs is in the stand-ins' own books. Each run prints a report. To replay a run, give its seed: the schedule of
faults and changes is then the same, but not the timing of threads. Example:

    make soak SEED=7 SECONDS=1
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import event_log
import fake_messages
import mac_folder
import proxy
import psycopg2
from event_log import EventLog
from testing import Databases, PrivatePostgres, Script, TestData, free_port, on_database, wait_until

import batches
import db

FAULT_PHASE = 60  # seconds of a run in which faults happen
RECOVERY_PHASE = 150  # seconds after the fault phase within which each message must end
BATCHES, ITEMS = 30, 6  # number of batches, and of items in each
UNREACHABLE = 0.02  # the share of the messages whose client has no handle
UNUSUAL = 0.12  # the share of the messages with which Messages or osascript does something else than to send it
DIE_RATE = 0.002  # the probability that the sender is killed at one of its steps: some 50 for each message
LOSS, DELAY = 0.012, 0.02  # shares of the HTTP exchanges: request or response lost; response delayed
CUT = 0.002  # the share of SQL statements before or after which the connection is cut
FAULT_EVERY, CHANGE_EVERY = 0.7, 0.9  # mean seconds between two faults, and between two changes of the settings
CHECK_EVERY = 15  # seconds between two checks during the fault phase
EXIT_TIMEOUT = 12  # seconds within which SIGTERM must end a process
MAX_VIOLATIONS = 40  # printed in a report


class FaultPhaseOver(Exception):
    """The fault phase ended while this fault waited for another one."""


class ManagedProcess:
    """A process of the run, which a fault can end and restart."""

    def __init__(self, name: str, path: Path, command: tuple[str, ...], environment: dict[str, str]) -> None:
        self.name, self.command, self.environment = name, command, environment
        self.log = path / f"{name}.log"
        self.lock = threading.Lock()  # one fault at a time
        self.script: Script | None = None

    def start(self) -> None:
        self.log.touch()
        self.log_start = len(self.log.read_bytes())
        self.script = Script(self.log, *self.command, **self.environment)

    def signal(self, number: int) -> None:
        if self.script:
            self.script.process.send_signal(number)

    def end(self, number: int) -> int:
        """Send a signal that ends the process; return the exit status."""
        assert self.script
        self.signal(number)
        return self.script.process.wait(EXIT_TIMEOUT)

    def terminate(self) -> str:
        """End the process with SIGTERM; return the problem if its exit status is not 0 or it takes too long, else "".

        Any exit status is right if the process has not logged its start yet: it may have no signal handler yet.
        """
        is_ready = any(phrase in self.log.read_bytes()[self.log_start :] for phrase in (b"listening", b"starting"))
        try:
            status = self.end(signal.SIGTERM)
            problem = f"ended with {status}" if status and is_ready else ""
        except subprocess.TimeoutExpired:
            self.end(signal.SIGKILL)
            problem = f"did not end within {EXIT_TIMEOUT} s"
        last = self.log.read_text(errors="replace").splitlines()[-3:]
        return problem and f"{self.name} {problem} on SIGTERM; its last lines: {last}"


@dataclass
class Report:
    """The result of a run. `recovery`: the longest time from a fault's end to the next sync and poll, in seconds."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    sent_amid_faults: int = 0
    duplicates: int = 0
    false_sent: int = 0
    false_failed: int = 0
    unknown: int = 0
    unknown_left: int = 0
    decidable: int = 0
    releases: int = 0
    pauses: int = 0
    after_pause: int = 0
    stops: int = 0
    after_stop: int = 0
    limits_exceeded: int = 0
    recovery: float = 0.0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report as lines of text, with the command that replays the run."""

        def listed(counts: Counter[str]) -> str:
            return f"{sum(counts.values())} ({', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))})"

        return [
            f"seed {self.seed}: {self.seconds:.0f} s on {os.cpu_count()} cores",
            f"  faults injected   {listed(self.faults)}",
            f"  changes made      {listed(self.changes)}",
            f"  messages          {self.messages}, {self.sent_amid_faults} of them sent amid the faults",
            f"  duplicates        {self.duplicates}",
            f"  false sent        {self.false_sent}",
            f"  false failed      {self.false_failed}",
            f"  unknown           {self.unknown}, {self.unknown_left} of them left; decidable: {self.decidable}",
            f"  sender stopped    {self.releases} times, until the owner released it",
            f"  after a pause     at most {self.after_pause} messages from one Mac ({self.pauses} pauses)",
            f"  after a STOP      at most {self.after_stop} messages from one Mac ({self.stops} opt-outs)",
            f"  limits exceeded   {self.limits_exceeded}",
            f"  longest recovery  {self.recovery:.1f} s",
            *(f"  VIOLATION: {violation}" for violation in self.violations[:MAX_VIOLATIONS]),
            f"  replay with       make soak SEED={self.seed} SECONDS=1",
        ]


class Pause(NamedTuple):
    """A batch was paused by its owner's verb, which returned at `since`, and not resumed before `until`."""

    batch_id: str
    since: float
    until: float


class Event(NamedTuple):
    """A fault or change, `at` seconds after the start. `rng` makes its random choices, the same ones in each replay."""

    at: float
    kind: str
    rng: random.Random


class ChaosRun:
    """Do one seeded run with new databases."""

    def __init__(self, seed: int, path: Path, cluster: PrivatePostgres) -> None:
        self.report = Report(seed)
        self.path, self.cluster = path, cluster
        self.rng = random.Random(seed)
        self.fault_ends: list[float] = []
        self.polls: list[float] = []
        self.pauses: list[Pause] = []
        self.devices: dict[str, str] = {}  # the id of each device, by its name
        self.in_fault_phase = True
        self.lock = threading.Lock()
        urls = {}
        with contextlib.closing(db.connect(cluster.url)) as admin:
            for part in db.URL_VARIABLES:
                db.query(admin, f"CREATE DATABASE {part}_{seed}")
                urls[part] = on_database(cluster.url, f"{part}_{seed}")
                db.migrate(urls[part], part)
        self.urls = urls
        conns = [db.connect(urls[part]) for part in ("quinn", "icloud")]
        event_log.install(*conns)
        self.data = TestData(Databases(urls["quinn"], urls["icloud"], *conns))
        self.deleted: set[str] = set()  # names of processes that are not started again
        self.processes = self._make_processes()

    # --- processes ------------------------------------------------------------------------------------

    def _make_processes(self) -> dict[str, ManagedProcess]:
        port = free_port()
        self.proxies: list[proxy.Proxy] = [proxy.Http(("127.0.0.1", port), self._http_faults()) for _ in range(2)]
        self.database_proxies = {
            part: proxy.Postgres(proxy.behind(url), self._statement_faults()) for part, url in self.urls.items()
        }
        self.proxies += self.database_proxies.values()
        environment = {
            db.URL_VARIABLES[part]: proxy.through(url, self.database_proxies[part]) for part, url in self.urls.items()
        } | {"SEND_QUEUE_PORT": str(port), "DISPATCH_INTERVAL_SECONDS": "1"}
        processes = {"server": ManagedProcess("server", self.path, ("send_queue_server.py",), environment)}
        for number in (1, 2):
            base_url = {"MAC_SYNC_BASE_URL": f"http://127.0.0.1:{self.proxies[0].port}"}
            name = f"dispatcher-{number}"
            processes[name] = ManagedProcess(name, self.path, ("dispatcher.py",), environment | base_url)
        for number in (1, 2, 3):
            processes |= self._mac(f"mac-{number}", f"00000000-0000-0000-0000-00000000000{number}")
        return processes

    def _mac(self, name: str, uuid: str) -> dict[str, ManagedProcess]:
        """Make a device, its folder, and the processes that run over it."""
        path = self.path / name
        self.devices[name] = self.data.device(name)
        mac_folder.make(path, f"http://127.0.0.1:{self.proxies[1].port}", name, uuid)
        environment = {**mac_folder.ENVIRONMENT, "DIE_RATE": str(DIE_RATE)}
        commands = {"messages": mac_folder.app_command(path), "sender": mac_folder.sender_command(path)}
        return {
            f"{kind}-{name}": ManagedProcess(f"{kind}-{name}", self.path, command, environment)
            for kind, command in commands.items()
        }

    def fill(self) -> None:
        """Insert the batches, and decide what Messages does with each message. Each client gets several messages."""
        clients = [self.data.client(f"+1415555{number:04}") for number in range(60)]
        unreachable = self.data.client(None)
        number = itertools.count(1)
        acts = [("message", mac_folder.quick())]
        for _ in range(BATCHES):
            batch_id = self.data.batch()
            for _ in range(ITEMS):
                body = f"message {next(number)}."
                client = unreachable if self.rng.random() < UNREACHABLE else self.rng.choice(clients)
                self.data.item(batch_id, client, rendered_body=body)
                if self.rng.random() < UNUSUAL:
                    acts.insert(0, (body, self.rng.choice(unusual_acts())))
        for name in self.devices:
            with contextlib.closing(mac_folder.messages(self.path / name)) as messages:
                rules = [{"to": "", "text": body, "times": None, "act": act} for body, act in acts]
                messages.expect(rules=rules)
        self.data.settings(max_per_minute=150)
        for conn in (self.data.databases.quinn, self.data.databases.icloud):
            conn.close()  # PostgreSQL will be killed

    # --- faults of single exchanges -------------------------------------------------------------------

    def _http_faults(self) -> proxy.OnExchange:
        rng, lock = random.Random(self.rng.random()), threading.Lock()

        def on_exchange(moment: proxy.Moment, what: str) -> bool:
            if moment == "after" and "/pending" in what:
                self.polls.append(time.time())
            if not self.in_fault_phase:
                return True
            with lock:
                lost, late = rng.random() < LOSS, moment == "after" and rng.random() < DELAY
                wait = rng.choice(5 * (0.05, 0.1, 0.3) + (1.0, 6.0))
            if lost:
                self._count("request lost" if moment == "before" else "response lost")
            elif late:
                self._count("response delayed")
                time.sleep(wait)
            return not lost

        return on_exchange

    def _statement_faults(self) -> proxy.OnExchange:
        rng, lock = random.Random(self.rng.random()), threading.Lock()

        def on_exchange(moment: proxy.Moment, _what: str) -> bool:
            with lock:
                cut = self.in_fault_phase and rng.random() < CUT
            if cut:
                self._count(f"database connection cut {moment} a statement")
            return not cut

        return on_exchange

    def _count(self, kind: str) -> None:
        with self.lock:
            self.report.faults[kind] += 1

    # --- scheduled faults -----------------------------------------------------------------------------

    def schedule(self) -> list[Event]:
        """Decide all faults and changes of the run before it starts."""
        faults = (
            ["kill"] * 16 + ["term"] * 5 + ["stop"] * 10 + ["off"] * 2 + ["osascript"] * 8 + ["postgres", "backend"]
        )
        changes = ["pause", "quiet", "gap"] + ["limit"] * 3 + ["choose_device"] * 6 + ["batch"] * 8 + ["reply"] * 3
        events = []
        for every, kinds in ((FAULT_EVERY, faults), (CHANGE_EVERY, changes)):
            at = 2.0
            while at < FAULT_PHASE:
                events.append(Event(at, self.rng.choice(kinds), random.Random(self.rng.random())))
                at += self.rng.expovariate(1 / every)
        events.append(Event(FAULT_PHASE * 0.4, "night", random.Random(self.rng.random())))
        events.append(Event(FAULT_PHASE * 0.6, "delete", random.Random(self.rng.random())))
        return sorted(events, key=lambda event: event.at)

    def carry_out(self, event: Event) -> None:
        """Carry out an event completely. Called in a thread for each event."""
        action: Callable[[random.Random], None] = getattr(self, f"_{event.kind}")
        while True:
            try:
                return action(event.rng)
            except psycopg2.Error:  # the database is down: try again later
                if not self.in_fault_phase:
                    return
                time.sleep(0.2)
            except FaultPhaseOver:
                return
            except Exception as error:  # noqa: BLE001  # a thread's exception would be lost
                self.report.violations.append(f"{event.kind} could not be done: {type(error).__name__} {error}")
                return

    @contextlib.contextmanager
    def _fault(self, process: ManagedProcess | None, kind: str) -> Iterator[None]:
        """Count a fault and record when it ends. Each process has one fault at a time; the next fault waits."""
        with process.lock if process else contextlib.nullcontext():
            if not self.in_fault_phase:
                raise FaultPhaseOver
            self._count(kind)
            yield
            self.fault_ends.append(time.time())

    def _add_violation(self, violation: str) -> None:
        if violation:
            self.report.violations.append(violation)

    def _choose_process(self, rng: random.Random, prefix: str = "") -> ManagedProcess:
        names = [name for name in self.processes if name.startswith(prefix) and name not in self.deleted]
        return self.processes[rng.choice(names)]

    def _kill(self, rng: random.Random) -> None:
        process = self._choose_process(rng)
        with self._fault(process, f"SIGKILL of a {process.name.split('-')[0]}"):
            process.end(signal.SIGKILL)
            time.sleep(rng.choice((0, 0, 0.5)))
            self._restart(process)

    def _term(self, rng: random.Random) -> None:
        process = self._choose_process(rng)
        with self._fault(process, f"SIGTERM of a {process.name.split('-')[0]}"):
            self._add_violation(process.terminate())
            self._restart(process)

    def _stop(self, rng: random.Random) -> None:
        process = self._choose_process(rng)
        with self._fault(process, f"SIGSTOP of a {process.name.split('-')[0]}"):
            process.signal(signal.SIGSTOP)
            time.sleep(rng.choice(4 * (0.1, 0.3, 0.5) + (1, 2, 6)))
            process.signal(signal.SIGCONT)

    def _off(self, rng: random.Random) -> None:
        process = self._choose_process(rng, "sender")
        with self._fault(process, "sender off"):
            process.end(signal.SIGKILL)
            time.sleep(rng.uniform(2, 6))
            self._restart(process)

    def _osascript(self, rng: random.Random) -> None:
        """Kill an osascript while it runs. What Messages has accepted by then leaves all the same."""
        name = rng.choice(sorted(self.devices))
        end = time.monotonic() + 3
        while time.monotonic() < end and self.in_fault_phase:
            if found := running_osascript(self.path / name):
                with self._fault(None, "SIGKILL of an osascript"), contextlib.suppress(ProcessLookupError):
                    os.kill(found, signal.SIGKILL)
                return
            time.sleep(0.01)

    def _restart(self, process: ManagedProcess) -> None:
        if process.name not in self.deleted:
            process.start()

    def _postgres(self, rng: random.Random) -> None:
        kind = rng.choice(("stop", "SIGKILL"))
        with self.cluster_lock, self._fault(None, f"{kind} of PostgreSQL"):
            (self.cluster.kill if kind == "SIGKILL" else self.cluster.server.stop)()
            self.cluster.start()

    def _backend(self, rng: random.Random) -> None:
        """Kill a session's process. PostgreSQL then restarts, because its shared memory may be damaged."""
        with self.cluster_lock, contextlib.closing(db.connect(self.urls["quinn"])) as conn:
            sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' ORDER BY pid"
            pid = rng.choice(db.query(conn, sql))[0]
            with self._fault(None, "SIGKILL of a PostgreSQL session"):
                os.kill(pid, signal.SIGKILL)
                wait_until(self._database_responds)

    def _database_responds(self) -> bool:
        with contextlib.suppress(psycopg2.Error), contextlib.closing(db.connect(self.urls["quinn"])):
            return True
        return False

    cluster_lock = threading.Lock()
    is_over = False

    # --- scheduled changes ----------------------------------------------------------------------------

    def _change(self, kind: str, sql: str, part: db.DatabaseName = "quinn", **params: Any) -> list[db.Row]:
        with contextlib.closing(db.connect(self.urls[part])) as conn:
            rows = db.query(conn, sql, params)
        with self.lock:
            self.report.changes[kind] += 1
        return rows

    def _for_a_while(self, rng: random.Random, kind: str, on: str, off: str, **params: Any) -> None:
        self._change(kind, on, **params)
        end = time.monotonic() + rng.uniform(0.5, 2.5)
        while time.monotonic() < end and self.in_fault_phase:
            time.sleep(0.1)
        while self.in_fault_phase:
            with contextlib.suppress(psycopg2.Error):
                self._change(f"{kind} over", off)
                return

    def _pause(self, rng: random.Random) -> None:
        on, off = (f"UPDATE outreach_settings SET paused = {value}" for value in (True, False))
        self._for_a_while(rng, "sending paused", on, off)

    def _quiet(self, rng: random.Random, begins: datetime | None = None) -> None:
        begins = begins or datetime.now(UTC)
        on = "UPDATE outreach_settings SET quiet_hours_tz = 'UTC', quiet_hours_start = %(s)s, quiet_hours_end = %(e)s"
        off = "UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL"
        ends = begins + timedelta(minutes=3)
        self._for_a_while(rng, "quiet hours", on, off, s=f"{begins:%H:%M}", e=f"{ends:%H:%M}")

    def _night(self, _rng: random.Random) -> None:
        """Let quiet hours begin at the next full minute, while both dispatchers are dead."""
        begins = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
        on = "UPDATE outreach_settings SET quiet_hours_tz = 'UTC', quiet_hours_start = %(s)s, quiet_hours_end = %(e)s"
        off = "UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL"
        self._change("night", on, s=f"{begins:%H:%M}", e=f"{begins + timedelta(minutes=2):%H:%M}")
        while self.in_fault_phase and datetime.now(UTC) < begins - timedelta(seconds=1):
            time.sleep(0.1)
        if not self.in_fault_phase:
            return
        processes = [self.processes["dispatcher-1"], self.processes["dispatcher-2"]]
        with contextlib.ExitStack() as dead:
            for process in processes:
                dead.enter_context(self._fault(process, "SIGKILL of a dispatcher"))
                process.end(signal.SIGKILL)
            time.sleep(4)
            for process in processes:
                process.start()
        self._change("night over", off)

    def _limit(self, rng: random.Random) -> None:
        name = rng.choice(("max_per_minute", "max_per_minute", "max_per_hour"))
        maximum = rng.choice((90, 120, 150, 200) if name == "max_per_minute" else (150, 200, None))
        self._change("limit changed", f"UPDATE outreach_settings SET {name} = %(maximum)s", maximum=maximum)

    def _gap(self, rng: random.Random) -> None:
        sql = "UPDATE outreach_settings SET min_gap_seconds = %(gap)s"
        self._change("gap changed", sql, gap=rng.choice((None, None, None, 0, 1)))

    def _choose_device(self, rng: random.Random) -> None:
        rows = self._change("device chosen", "SELECT id FROM icloud.devices ORDER BY created_at", "icloud")
        self._change("device chosen", "UPDATE outreach_settings SET device_id = %(id)s", id=rng.choice(rows)[0])

    def _batch(self, rng: random.Random) -> None:
        """Pause a batch for a while, or cancel it."""
        sql = "SELECT id FROM outreach_batches WHERE status = 'sending' ORDER BY created_at"
        with contextlib.closing(db.connect(self.urls["quinn"])) as conn:
            rows = db.query(conn, sql)
        if not rows:
            return
        batch_id = rng.choice(rows)[0]
        if rng.random() < 0.15:
            sql = f"UPDATE outreach_batches SET status = 'cancelled' WHERE id = '{batch_id}' AND status = 'sending'"
            self._change("batch cancelled", sql)
        else:
            self._pause_batch(batch_id, rng.uniform(0.5, 2.5))

    def _pause_batch(self, batch_id: str, seconds: float) -> None:
        """Pause a batch as its owner does, which also takes back what waits, and resume it later."""
        with self._connections() as (quinn, icloud), contextlib.suppress(batches.Refused):  # it has ended meanwhile
            batches.pause(quinn, icloud, batch_id)
        since, end = time.time(), time.monotonic() + seconds
        with self.lock:
            self.report.changes["batch paused"] += 1
        while time.monotonic() < end and self.in_fault_phase:
            time.sleep(0.1)
        self.pauses.append(Pause(batch_id, since, time.time()))
        while self.in_fault_phase:
            with contextlib.suppress(psycopg2.Error, batches.Refused), self._connections() as (quinn, _):
                batches.resume(quinn, batch_id)
                return
            time.sleep(0.2)

    @contextlib.contextmanager
    def _connections(self) -> Iterator[tuple[Any, Any]]:
        with (
            contextlib.closing(db.connect(self.urls["quinn"])) as quinn,
            contextlib.closing(db.connect(self.urls["icloud"])) as icloud,
        ):
            yield quinn, icloud

    def _reply(self, rng: random.Random) -> None:
        """Let a person reply STOP to one of the Macs."""
        name, number = rng.choice(("mac-1", "mac-2")), rng.randrange(60)
        with contextlib.closing(mac_folder.messages(self.path / name)) as messages:
            messages.receive(f"+1415555{number:04}", "Stop.")
        with self.lock:
            self.report.changes["reply of STOP"] += 1

    def _delete(self, _rng: random.Random) -> None:
        process = self.processes["sender-mac-3"]
        with process.lock:
            self.deleted.add(process.name)
            process.end(signal.SIGKILL)
            self._change("device deleted", "DELETE FROM icloud.devices WHERE name = 'mac-3'", "icloud")

    # --- what runs beside the faults ------------------------------------------------------------------

    def _look_after_macs(self) -> None:
        """Do what launchd and the owner do: start a sender that has ended, and release one that has stopped."""
        while not self.is_over:
            for name in self.devices:
                process = self.processes[f"sender-{name}"]
                if process.lock.acquire(blocking=False):
                    try:
                        self._look_after(process, self.path / name)
                    finally:
                        process.lock.release()
            time.sleep(0.1)

    def _look_after(self, process: ManagedProcess, path: Path) -> None:
        if process.name in self.deleted or not process.script:
            return
        status = process.script.process.poll()
        if status is not None:
            self._count(f"sender killed at one of its steps, or ended ({status})")
            if not self.in_fault_phase:
                process.environment["DIE_RATE"] = "0"
            process.start()
            self.fault_ends.append(time.time())
        elif mac_folder.is_stopped(path):
            mac_folder.release(path)
            self.report.releases += 1

    # --- the run --------------------------------------------------------------------------------------

    def run(self) -> Report:
        start = time.monotonic()
        self.fill()
        for process in self.processes.values():
            process.start()
        helper = threading.Thread(target=self._look_after_macs)
        helper.start()
        try:
            self._inject_faults(start)
            self._recover()
            self._check(event_log.FINAL_MAC_CHECKS)
        finally:
            self.in_fault_phase = False
            self.is_over = True
            helper.join()
            self._end()
        self.report.seconds = time.monotonic() - start
        return self.report

    def _inject_faults(self, start: float) -> None:
        """Carry out the schedule, and check every CHECK_EVERY seconds; stop at a violation."""
        threads, checked = [], time.monotonic()
        for event in self.schedule():
            time.sleep(max(0, start + event.at - time.monotonic()))
            threads.append(threading.Thread(target=self.carry_out, args=(event,)))
            threads[-1].start()
            if time.monotonic() - checked > CHECK_EVERY and not self.report.violations:
                checked = time.monotonic()
                self._check(event_log.MAC_CHECKS)
            if self.report.violations:
                break
        self.report.sent_amid_faults = sum(len(records.left) for records in self._read_macs().values())
        self.in_fault_phase = False
        for thread in threads:
            thread.join()

    def _recover(self) -> None:
        """Lift every hold and wait until every message has ended."""
        wait_until(self._is_up, RECOVERY_PHASE)  # it may still be recovering from the last fault
        with contextlib.closing(db.connect(self.urls["quinn"])) as conn:
            sql = """
                UPDATE outreach_settings
                   SET paused = false, quiet_hours_start = NULL, quiet_hours_end = NULL, min_gap_seconds = NULL,
                       max_per_minute = 120, max_per_hour = NULL
            """
            db.query(conn, sql)
            db.query(conn, "UPDATE outreach_batches SET status = 'sending' WHERE status = 'paused'")
        try:
            wait_until(self._has_ended, RECOVERY_PHASE)
        except AssertionError:
            self.report.violations.append(
                f"some items or batches have not ended {RECOVERY_PHASE} s after the last fault"
            )

    def _is_up(self) -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            db.connect(self.urls["quinn"]).close()
            return True
        return False

    def _has_ended(self) -> bool:
        quinn = """
            SELECT (SELECT count(*) FROM outreach_batches WHERE status = 'sending')
                 + (SELECT count(*) FROM outreach_batch_items WHERE status = 'queued' OR claimed_at IS NOT NULL)
        """
        icloud = "SELECT count(*) FROM icloud.send_queue WHERE status = 'queued'"
        time.sleep(0.2)
        with contextlib.closing(db.connect(self.urls["quinn"])) as conn:  # all Macs share the work
            device = random.choice([self.devices["mac-1"], self.devices["mac-2"]])
            db.query(conn, "UPDATE outreach_settings SET device_id = %(id)s", {"id": device})
        left = 0
        for part, sql in {"quinn": quinn, "icloud": icloud}.items():
            with contextlib.closing(db.connect(self.urls[part])) as conn:  # type: ignore[index]  # a DatabaseName
                left += db.query(conn, sql)[0][0]
        return left == 0

    def _read_macs(self) -> dict[str, mac_folder.Records]:
        return {device: mac_folder.read(self.path / name) for name, device in self.devices.items()}

    def _read_events(self) -> EventLog:
        with self._connections() as (quinn, icloud):
            return EventLog(event_log.read(quinn, icloud), macs=self._read_macs())

    def _check(self, checks: Sequence[event_log.Check]) -> None:
        """Run the checks and add their violations to the report."""
        try:
            events = self._read_events()
        except psycopg2.Error:  # the database is down: the next check covers the same events
            return
        report = self.report
        found = event_log.violations(events, checks)
        report.violations += found

        def count(*names: str) -> int:
            return sum(violation.startswith(names) for violation in found)

        report.messages = sum(len(records.asked) for records in events.macs.values())
        report.duplicates = len(event_log.left_twice(events)) + sum("live rows" in violation for violation in found)
        report.false_sent, report.false_failed = count("no_false_sent"), count("no_false_failed")
        report.decidable = count("unknown_is_undecidable")
        report.limits_exceeded = count("limits_hold")
        report.recovery = self._longest_recovery(events)
        self._count_unknown(events)
        self._count_late_sends(events)

    def _count_unknown(self, events: EventLog) -> None:
        unknown = [
            (device, row["body"])
            for device in events.macs
            for row in event_log.last_rows(events, device)
            if row["outcome"] == "unknown"
        ]
        self.report.unknown = len(unknown)
        left = {(device, send.text) for device, records in events.macs.items() for send in records.left}
        self.report.unknown_left = sum(each in left for each in unknown)

    def _count_late_sends(self, events: EventLog) -> None:
        """Count what osascript was asked to send after a pause or a STOP, at most, on one Mac."""
        batch_of = {
            (versions[-1].new or {}).get("rendered_body"): (versions[-1].new or {}).get("batch_id")
            for versions in events.items.values()
        }
        late = [
            sum(batch_of.get(send.text) == pause.batch_id and pause.since < send.at < pause.until for send in mac.asked)
            for pause in self.pauses
            for mac in events.macs.values()
        ]
        stops = [count for _, count in event_log.after_stops(events)]
        self.report.pauses, self.report.after_pause = len(self.pauses), max(late, default=0)
        self.report.stops, self.report.after_stop = len(stops) // len(events.macs), max(stops, default=0)
        if self.report.after_pause > 1:
            self.report.violations.append(f"{self.report.after_pause} messages left one Mac after a pause")

    def _longest_recovery(self, events: EventLog) -> float:
        """Return the longest time from a fault's end to the next sync and poll; it may contain later faults."""
        longest = 0.0
        for end in list(self.fault_ends):
            nexts = [next((at for at in times if at >= end), end) for times in (events.syncs, sorted(self.polls))]
            longest = max(longest, *(at - end for at in nexts))
        return longest

    def _end(self) -> None:
        for process in self.processes.values():
            process.signal(signal.SIGCONT)
            self._add_violation(process.terminate())
        for each in self.proxies:
            each.close()


def unusual_acts() -> list[fake_messages.Act]:
    """Return what Messages and osascript may do instead of sending a message at once."""
    good = mac_folder.quick()
    return [
        fake_messages.fails(22, after=0.02, error_after=0.1),
        fake_messages.error("resolve", -1728),
        fake_messages.error("account", -600),
        fake_messages.dies("resolve", good),
        fake_messages.dies("dispatch", good),
        fake_messages.vanishes(),
        fake_messages.vanishes(leaves=0.2),
        fake_messages.outbox(leaves=1.0),
        fake_messages.slow(1.0, good),
        fake_messages.with_url("https://example.com", good),
    ]


def running_osascript(path: Path) -> int | None:
    """Return the process id of an osascript of a Mac that has a message, None if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            words = (process / "cmdline").read_text().split("\0")
            if "osascript" in words and str(path / "mac") in words and len(words) > 8:
                return int(process.name)
    return None


def chaos_run(seed: int, path: Path) -> Report:
    """Do one run with its own PostgreSQL in `path`."""
    cluster = PrivatePostgres(path / "postgres")
    try:
        return ChaosRun(seed, path, cluster).run()
    finally:
        cluster.server.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Inject random faults, and count what is sent twice or reported wrongly.",
        epilog="examples: make soak; make soak SEED=7 SECONDS=1 (replays the run of seed 7)",
    )
    parser.add_argument("--seconds", type=int, default=60, help="start no new run after this time; default %(default)s")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the first run; each next run adds 1; default %(default)s"
    )
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    for seed in itertools.count(arguments.seed):
        with tempfile.TemporaryDirectory() as path:
            report = chaos_run(seed, Path(path))
        sys.stdout.write("\n".join(report.lines()) + "\n")
        sys.stdout.flush()
        if report.violations:
            return 1
        if time.monotonic() > end:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
