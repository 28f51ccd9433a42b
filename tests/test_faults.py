"""Kill each process at every step: at each of its exchanges with the server or with PostgreSQL.

A first run counts the exchanges: requests to the server, statements, and session starts. Then there is one experiment
for each exchange and each fault. A proxy kills the process before it passes the request on, or after the response has
come; or it cuts the connection and lets the process live. A successor does the rest of the work, and event_log.py
checks all that happened. A failure names the exchange and the fault; running the same test again replays all of them.
"""

import contextlib
import itertools
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import chaos
import event_log
import proxy
import pytest
import requests
from event_log import EventLog
from simulated_mac import SimulatedMac
from testing import SERVICE_TOKEN, Databases, Script, TestData, numbers, on_database, wait_until

import batches
import db
import dispatcher

pytestmark = pytest.mark.faults
WORKERS = 2  # experiments at a time
CYCLES = 15  # ticks after a fault in which every item must end
FAULTS: tuple[tuple[proxy.Moment, str], ...] = (("before", "kill"), ("after", "kill"), ("after", "cut"))
TABLES = (
    "outreach_batch_items", "outreach_batches", "contact_relationships", "clients", "event_log.changes",
)  # fmt: skip


class Fault(NamedTuple):
    """What happens at which moment of the exchange with this number, the first one being 1."""

    number: int
    moment: proxy.Moment
    kind: str  # `kill` the process, or `cut` its connection


class FaultInjector:
    """Count the exchanges, and inject `fault` at its own one. `script` is the process that is killed."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.script: Script | None = None
        self.steps: list[str] = []
        self.injected = threading.Event()
        self.lock = threading.Lock()
        self.current = threading.local()  # the number of the exchange of this connection

    def on_exchange(self, moment: proxy.Moment, what: str) -> bool:
        if moment == "before":
            with self.lock:
                self.steps.append(what)
                self.current.number = len(self.steps)
        if self.fault is None or self.injected.is_set() or (self.current.number, moment) != self.fault[:2]:
            return True
        self.injected.set()
        if self.fault.kind == "kill":
            assert self.script
            self.script.process.kill()
        return False


class TestEnvironment:
    """A pair of databases with their event log, a server over them, and a directory for logs."""

    __test__ = False  # not a class of tests, in spite of its name

    def __init__(self, databases: Databases, path: Path) -> None:
        self.databases = databases
        self.path = path
        self.data = TestData(databases)
        self.names = itertools.count(1)
        self.scripts: list[Script] = []
        event_log.install(databases.quinn, databases.icloud)
        self.server_url = ""

    def start(self, *arguments: str, **environment: str) -> Script:
        urls = {"QUINN_DB_URL": self.databases.quinn_url, "QUINN_ICLOUD_DB_URL": self.databases.icloud_url}
        script = Script(self.path / f"{next(self.names)}.log", *arguments, **{**urls, **environment})
        self.scripts.append(script)
        return script

    def serve(self, **environment: str) -> tuple[Script, str]:
        """A server on a free port, and its base URL."""
        script = self.start("send_queue_server.py", SEND_QUEUE_PORT="0", **environment)
        return script, f"http://127.0.0.1:{script.port()}"

    def clear(self) -> None:
        """Empty the databases."""
        for table in TABLES:
            self.data.quinn(f"DELETE FROM {table}")
        for table in ("icloud.send_queue", "icloud.devices", "event_log.changes"):
            self.data.icloud(f"DELETE FROM {table}")
        self.data.settings(max_per_day=None, last_dispatched_at="now")

    def apply_settings(self, **settings: Any) -> None:
        """Change the settings, and record the two syncs after which event_log.py expects them to be obeyed."""
        self.data.settings(**settings)
        for _ in range(2):
            self.data.quinn("UPDATE outreach_settings SET last_synced_at = clock_timestamp()")

    def device(self, name: str) -> SimulatedMac:
        """Return a simulated Mac in this process, with a new log."""
        self.data.device(name)
        return SimulatedMac(self.server_url, name, self.path / f"{name}-{next(self.names)}.device")

    def cycle(self) -> None:
        """Sync and dispatch, as the successor of a killed dispatcher does."""
        mac_sync = dispatcher.SendQueueClient(self.server_url, SERVICE_TOKEN)
        with (
            mac_sync.session,
            contextlib.closing(db.connect(self.databases.quinn_url)) as quinn,
            contextlib.closing(db.connect(self.databases.icloud_url)) as icloud,
        ):
            batches.acquire_lock(quinn, dispatcher.stop)
            dispatcher.sync(quinn, icloud)
            dispatcher.dispatch(quinn, icloud, mac_sync)

    def violations(self, devices: Sequence[SimulatedMac]) -> list[str]:
        logs = [device.log for device in devices]
        return event_log.violations(EventLog(event_log.read(self.databases.quinn, self.databases.icloud), logs))

    def proxies(self, injector: FaultInjector, part: db.DatabaseName) -> tuple[proxy.Postgres, str]:
        url = self.databases.quinn_url if part == "quinn" else self.databases.icloud_url
        between = proxy.Postgres(proxy.behind(url), injector.on_exchange)
        return between, proxy.through(url, between)

    def close(self) -> None:
        for script in self.scripts:
            script.process.kill()
            script.process.wait()


@pytest.fixture
def environments(
    postgres: str, templates: dict[db.DatabaseName, str], tmp_path: Path
) -> Iterator[list[TestEnvironment]]:
    """Yield an environment for each experiment that runs at the same time."""
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(contextlib.closing(db.connect(postgres)))
        found: list[TestEnvironment] = []
        for _ in range(WORKERS):
            urls = {}
            for part in db.URL_VARIABLES:
                name = f"faults_{part}_{next(numbers)}"
                db.query(admin, f"CREATE DATABASE {name} TEMPLATE {templates[part]}")
                stack.callback(db.query, admin, f"DROP DATABASE {name} WITH (FORCE)")
                urls[part] = on_database(postgres, name)
            conns = [stack.enter_context(contextlib.closing(db.connect(urls[part]))) for part in ("quinn", "icloud")]
            path = tmp_path / str(len(found))
            path.mkdir()
            environment = TestEnvironment(Databases(urls["quinn"], urls["icloud"], *conns), path)
            stack.callback(environment.close)
            found.append(environment)
        yield found


Experiment = Callable[[TestEnvironment, FaultInjector], list[str]]


def every_fault(environments: list[TestEnvironment], experiment: Experiment) -> None:
    """Run the experiment without a fault, then once for each fault at each step; no run may violate a rule."""
    injector = FaultInjector(None)
    assert experiment(environments[0], injector) == []
    assert len(injector.steps) > 3
    faults = [Fault(number, moment, kind) for number in range(1, len(injector.steps) + 1) for moment, kind in FAULTS]
    unused = list(environments)

    def attempt(fault: Fault) -> list[str]:
        environment, injector = unused.pop(), FaultInjector(fault)
        try:
            found = experiment(environment, injector)
        except Exception as error:  # noqa: BLE001  # whatever it was, it belongs to this fault
            found = [f"{type(error).__name__}: {error}"]
        finally:
            unused.append(environment)
        if not injector.injected.is_set():
            found = [*found, "the fault did not happen"]
        step = injector.steps[fault.number - 1] if len(injector.steps) >= fault.number else "?"
        return [f"{fault.kind} {fault.moment} step {fault.number} ({step[:70]}): {sentence}" for sentence in found]

    with ThreadPoolExecutor(WORKERS) as pool:
        found = [sentence for sentences in pool.map(attempt, faults) for sentence in sentences]
    assert not found, f"{len(injector.steps)} steps, {len(faults)} faults:\n" + "\n".join(found)


# --- the dispatcher -----------------------------------------------------------------------------------


def work_for_every_statement(data: TestData) -> dict[str, str]:
    """Insert batches that need each statement of both jobs; return how each item must end, by its body."""
    quick, slow = (str(row[0]) for row in data.icloud("SELECT id FROM icloud.devices ORDER BY name"))

    def item(batch_id: str, body: str, row: dict[str, Any] | None = None, **columns: Any) -> None:
        item_id = data.item(batch_id, rendered_body=body, **columns)
        if row is not None:
            sql = """
                INSERT INTO icloud.send_queue (batch_item_id, to_handle, body, device_id, status, collected_at, sent_at)
                VALUES (%(item)s, '+14155550123', %(body)s, %(device)s, %(status)s, now(),
                        CASE WHEN %(status)s = 'sent' THEN now() END)
                RETURNING id
            """
            [(row_id,)] = data.icloud(sql, item=item_id, body=body, **{"device": quick, "status": "queued", **row})
            if row.get("waits"):
                data.icloud("UPDATE icloud.send_queue SET collected_at = NULL WHERE id = %(id)s", id=row_id)
            if columns.get("status") == "queued":
                sql = "UPDATE outreach_batch_items SET send_queue_id = %(row)s WHERE id = %(item)s"
                data.quinn(sql, row=row_id, item=item_id)

    fresh = data.batch()
    data.item(fresh, data.client(None), rendered_body="skipped")
    item(fresh, "first")
    item(fresh, "second fails")
    item(data.batch(), "fails at once")
    item(data.batch(status="cancelled"), "withdrawn", {"device": slow, "waits": True}, status="queued")
    in_flight = data.batch()
    item(in_flight, "sent already", {"status": "sent"}, status="queued")
    item(in_flight, "fails already", {"status": "failed"}, status="queued")
    item(in_flight, "vanished", status="queued", send_queue_id="ffffffff-0000-0000-0000-000000000000")
    item(data.batch(), "response was lost", {}, claimed_at="now")
    item(data.batch(status="paused"), "claim of a paused batch", claimed_at="now")
    item(data.batch(), "old", status="skipped", failure_reason="long ago")
    return {
        "skipped": "skipped", "first": "sent", "second fails": "failed", "fails at once": "failed",
        "withdrawn": "pending", "sent already": "sent", "fails already": "failed", "vanished": "failed",
        "response was lost": "sent", "claim of a paused batch": "sent", "old": "skipped",
    }  # fmt: skip


def dispatcher_dies(environment: TestEnvironment, injector: FaultInjector) -> list[str]:
    if not environment.server_url:
        _, environment.server_url = environment.serve()
    environment.clear()
    devices = [environment.device("quick"), environment.device("slow")]
    expected = work_for_every_statement(environment.data)
    # As many as will be sent, and the vanished one, which may have been. One more in flight would exceed the limit.
    environment.apply_settings(max_per_day=5)
    with devices[0].log.open("a") as log:  # the rows that have ended already
        for row_id, status, body in environment.data.icloud("SELECT id, status, body FROM icloud.send_queue"):
            if status != "queued":
                log.write(f"{status} {row_id} {body}\n")
    with contextlib.ExitStack() as stack:
        quinn, quinn_url = environment.proxies(injector, "quinn")
        icloud, icloud_url = environment.proxies(injector, "icloud")
        host, port = environment.server_url.removeprefix("http://").split(":")
        server = proxy.Http((host, int(port)), injector.on_exchange)
        for between in (quinn, icloud, server):
            stack.callback(between.close)
        injector.script = environment.start(
            "dispatcher.py", "--once", QUINN_DB_URL=quinn_url, QUINN_ICLOUD_DB_URL=icloud_url,
            MAC_SYNC_BASE_URL=f"http://127.0.0.1:{server.port}",
        )  # fmt: skip
        injector.script.process.wait(20)
    devices[0] = SimulatedMac(environment.server_url, "quick", devices[0].log)
    devices[0].round()  # what is in the queue is sent, or fails, before the successor starts
    for cycle in range(CYCLES):
        environment.cycle()
        for device in devices:
            device.round()
        if cycle == 2:
            environment.data.quinn("UPDATE outreach_batches SET status = 'sending' WHERE status = 'paused'")
    environment.cycle()
    ended: dict[str, str] = dict(environment.data.quinn("SELECT rendered_body, status FROM outreach_batch_items"))
    problems = [f"item {body!r} is {ended[body]}" for body in expected if ended[body] != expected[body]]
    batches = sorted(status for (status,) in environment.data.quinn("SELECT status FROM outreach_batches"))
    if batches != ["cancelled"] + 6 * ["sent"]:
        problems.append(f"the batches are {batches}")
    return problems + environment.violations(devices)


def test_dispatcher_may_die_at_any_step(environments: list[TestEnvironment]) -> None:
    every_fault(environments, dispatcher_dies)


# --- the server ---------------------------------------------------------------------------------------


def server_dies(environment: TestEnvironment, injector: FaultInjector) -> list[str]:
    """Repeat each request without a response, as the dispatcher and a device do, until a new server responds."""
    environment.clear()
    environment.data.device("mini")
    batch_id = environment.data.batch()
    messages = [
        {
            "batchItemId": environment.data.item(batch_id, rendered_body=body, claimed_at="now"),
            "deviceId": str(environment.data.icloud("SELECT id FROM icloud.devices")[0][0]),
            "toHandle": "+14155550123",
            "body": body,
        }
        for body in ("first", "second fails")
    ]
    between, icloud_url = environment.proxies(injector, "icloud")
    injector.script, direct = environment.serve(QUINN_ICLOUD_DB_URL=icloud_url, SEND_QUEUE_THREADS="1")
    front = proxy.Http(("127.0.0.1", int(direct.rpartition(":")[2])), injector.on_exchange)
    mini = SimulatedMac(
        f"http://127.0.0.1:{front.port}", "mini", environment.path / f"{next(environment.names)}.device"
    )
    where = [f"http://127.0.0.1:{front.port}"]

    def persist(ask: Callable[[], Any]) -> None:
        def done() -> bool:
            if injector.injected.is_set() and injector.fault and injector.fault.kind == "kill" and len(where) == 1:
                assert injector.script
                injector.script.process.wait(5)
                where.append(environment.serve()[1])
                mini.base_url = f"{where[-1]}/client/imessage/send-queue"
            with contextlib.suppress(requests.RequestException):
                ask()
                return True
            return False

        wait_until(done)

    def enqueue(message: dict[str, str]) -> None:
        headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
        response = requests.post(f"{where[-1]}/admin/send-queue/enqueue", json=message, headers=headers, timeout=5)
        response.raise_for_status()

    for message in messages:
        persist(lambda message=message: enqueue(message))  # type: ignore[misc]  # mypy cannot infer such a lambda
    persist(mini.round)
    persist(mini.round)
    for closing in (between, front):
        closing.close()
    for script in environment.scripts:
        script.process.kill()
        script.process.wait()
    rows = environment.data.icloud("SELECT body, status FROM icloud.send_queue ORDER BY body")
    problems = [] if rows == [("first", "sent"), ("second fails", "failed")] else [f"the queue is {rows}"]
    if len(list(environment.data.icloud("SELECT DISTINCT batch_item_id FROM icloud.send_queue"))) != len(messages):
        problems.append("a message is missing")
    dispatcher.sync(environment.databases.quinn, environment.databases.icloud)
    if environment.data.statuses() != ["sent", "failed"]:
        problems.append(f"the items are {environment.data.statuses()}")
    return problems + environment.violations([mini])


def test_server_may_die_at_any_step(environments: list[TestEnvironment]) -> None:
    every_fault(environments, server_dies)


# --- a device -----------------------------------------------------------------------------------------


def device_dies(environment: TestEnvironment, injector: FaultInjector) -> list[str]:
    if not environment.server_url:
        _, environment.server_url = environment.serve()
    environment.clear()
    environment.data.device("mini")
    for body in ("first", "second fails", "third"):
        environment.data.item(environment.data.batch(), rendered_body=body)
    environment.apply_settings(max_per_day=3)
    environment.cycle()
    host, port = environment.server_url.removeprefix("http://").split(":")
    front = proxy.Http((host, int(port)), injector.on_exchange)
    log = environment.path / f"{next(environment.names)}.device"
    command = ("tools/simulated_mac.py", f"http://127.0.0.1:{front.port}", str(log))
    injector.script = environment.start(*command, DEVICE_TOKEN="mini")
    finished = "SELECT 1 FROM icloud.send_queue HAVING count(*) FILTER (WHERE status <> 'queued') = 3"
    wait_until(lambda: injector.injected.is_set() or (injector.fault is None and environment.data.icloud(finished)))
    if injector.fault and injector.fault.kind == "kill":
        injector.script.process.wait(5)
        injector.script = environment.start(*command, DEVICE_TOKEN="mini")
    wait_until(lambda: environment.data.icloud(finished))
    injector.script.process.kill()
    injector.script.process.wait()
    front.close()
    for _ in range(2):
        environment.cycle()
    problems = (
        []
        if sorted(environment.data.statuses()) == ["failed", "sent", "sent"]
        else [f"items: {environment.data.statuses()}"]
    )
    return problems + environment.violations([SimulatedMac(environment.server_url, "mini", log)])


def test_device_may_die_at_any_step(environments: list[TestEnvironment]) -> None:
    every_fault(environments, device_dies)


# --- everything at once -------------------------------------------------------------------------------


def test_random_faults_lose_and_repeat_nothing(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as path:
        report = chaos.chaos_run(seed, Path(path))
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(report.lines()) + "\n")
    assert not report.violations
    assert sum(report.faults.values()) >= 70  # on an idle machine some 160
    assert report.messages >= 50  # on an idle machine some 100: osascript takes its time
