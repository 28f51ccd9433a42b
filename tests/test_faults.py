"""Killed at every step: each exchange of a process with the world outside it is a place where it may die.

A first run counts the exchanges: requests to the server, statements and session starts at PostgreSQL. Then the same is
done anew for each of them: a proxy kills the real process before it passes the exchange on, or when the answer has come
and is held back; or it cuts the connection there and lets the process live. The rest of the world goes on, a successor
does the rest of the work, and history.py judges all that has happened.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import campaign
import history
import proxy
import pytest
import requests
from conftest import ROOT, SERVICE_TOKEN, Databases, Script, World, numbers, on_database, until
from device import Device

import batches
import db
import dispatcher

pytestmark = pytest.mark.faults
WORKERS = 2  # experiments at a time
CYCLES = 15  # of sync and dispatch after a fault, in which all must have ended
FAULTS: tuple[tuple[proxy.Moment, str], ...] = (("before", "kill"), ("after", "kill"), ("after", "cut"))
TABLES = (
    "outreach_batch_items", "outreach_batches", "contact_relationships", "clients", "history.changes",
)  # fmt: skip


class Fault(NamedTuple):
    """What happens at which moment of the exchange with this number, the first one being 1."""

    number: int
    moment: proxy.Moment
    kind: str  # `kill` the process, or `cut` its connection


class Fate:
    """Numbers the exchanges, and lets `fault` happen when it is due. `victim` is killed."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.victim: Script | None = None
        self.steps: list[str] = []
        self.struck = threading.Event()
        self.lock = threading.Lock()
        self.here = threading.local()  # the number of the connection's own exchange

    def meddle(self, moment: proxy.Moment, what: str) -> bool:
        if moment == "before":
            with self.lock:
                self.steps.append(what)
                self.here.number = len(self.steps)
        if self.fault is None or self.struck.is_set() or (self.here.number, moment) != self.fault[:2]:
            return True
        self.struck.set()
        if self.fault.kind == "kill":
            assert self.victim
            self.victim.process.kill()
        return False


class Lab:
    """A pair of databases with their history, a server over them, and room for logs."""

    def __init__(self, databases: Databases, path: Path) -> None:
        self.databases = databases
        self.path = path
        self.world = World(databases)
        self.names = itertools.count(1)
        self.scripts: list[Script] = []
        history.install(databases.quinn, databases.icloud)
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
        """Empty databases, as at the start of time."""
        for table in TABLES:
            self.world.quinn(f"DELETE FROM {table}")
        for table in ("icloud.send_queue", "icloud.devices", "history.changes"):
            self.world.icloud(f"DELETE FROM {table}")
        self.world.settings(max_per_day=None, last_dispatched_at="now")

    def begin(self, **settings: Any) -> None:
        """These settings hold from now on: two syncs, by which history.py reckons, have taken note of them."""
        self.world.settings(**settings)
        for _ in range(2):
            self.world.quinn("UPDATE outreach_settings SET last_synced_at = clock_timestamp()")

    def device(self, name: str) -> Device:
        """A device of this process; its log is new."""
        self.world.device(name)
        return Device(self.server_url, name, self.path / f"{name}-{next(self.names)}.device")

    def cycle(self) -> None:
        """Sync and dispatch, as a successor would do them."""
        mac_sync = dispatcher.SendQueueClient(self.server_url, SERVICE_TOKEN)
        with (
            mac_sync.session,
            contextlib.closing(db.connect(self.databases.quinn_url)) as quinn,
            contextlib.closing(db.connect(self.databases.icloud_url)) as icloud,
        ):
            batches.acquire_lock(quinn, dispatcher.stop)
            dispatcher.sync(quinn, icloud)
            dispatcher.dispatch(quinn, icloud, mac_sync)

    def judge(self, devices: Sequence[Device]) -> list[str]:
        logs = [device.log for device in devices]
        return history.complaints(history.Past(history.read(self.databases.quinn, self.databases.icloud), logs))

    def proxies(self, fate: Fate, part: db.DatabaseName) -> tuple[proxy.Postgres, str]:
        url = self.databases.quinn_url if part == "quinn" else self.databases.icloud_url
        between = proxy.Postgres(proxy.behind(url), fate.meddle)
        return between, proxy.through(url, between)

    def close(self) -> None:
        for script in self.scripts:
            script.process.kill()
            script.process.wait()


@pytest.fixture
def labs(postgres: str, templates: dict[db.DatabaseName, str], tmp_path: Path) -> Iterator[list[Lab]]:
    """As many labs as there are experiments at a time."""
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(contextlib.closing(db.connect(postgres)))
        found: list[Lab] = []
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
            lab = Lab(Databases(urls["quinn"], urls["icloud"], *conns), path)
            stack.callback(lab.close)
            found.append(lab)
        yield found


Experiment = Callable[[Lab, Fate], list[str]]


def every_fault(labs: list[Lab], experiment: Experiment) -> None:
    """Run the experiment without a fault, then once for each fault of each step; none may give cause for complaint."""
    fate = Fate(None)
    assert experiment(labs[0], fate) == []
    assert len(fate.steps) > 3
    faults = [Fault(number, moment, kind) for number in range(1, len(fate.steps) + 1) for moment, kind in FAULTS]
    spare = list(labs)

    def attempt(fault: Fault) -> list[str]:
        lab, doomed = spare.pop(), Fate(fault)
        try:
            found = experiment(lab, doomed)
        except Exception as error:  # noqa: BLE001  # whatever it was, it belongs to this fault
            found = [f"{type(error).__name__}: {error}"]
        finally:
            spare.append(lab)
        if not doomed.struck.is_set():
            found = [*found, "the fault did not happen"]
        step = doomed.steps[fault.number - 1] if len(doomed.steps) >= fault.number else "?"
        return [f"{fault.kind} {fault.moment} step {fault.number} ({step[:70]}): {words}" for words in found]

    with ThreadPoolExecutor(WORKERS) as pool:
        found = [words for complaints in pool.map(attempt, faults) for words in complaints]
    assert not found, f"{len(fate.steps)} steps, {len(faults)} faults:\n" + "\n".join(found)


# --- the dispatcher -----------------------------------------------------------------------------------


def work_for_every_statement(world: World) -> dict[str, str]:
    """Batches that need all that sync and dispatch can do; how each item must end, by its body."""
    quick, slow = (str(row[0]) for row in world.icloud("SELECT id FROM icloud.devices ORDER BY name"))

    def item(batch_id: str, body: str, row: dict[str, Any] | None = None, **columns: Any) -> None:
        item_id = world.item(batch_id, rendered_body=body, **columns)
        if row is not None:
            sql = """
                INSERT INTO icloud.send_queue (batch_item_id, to_handle, body, device_id, status, collected_at, sent_at)
                VALUES (%(item)s, '+14155550123', %(body)s, %(device)s, %(status)s, now(),
                        CASE WHEN %(status)s = 'sent' THEN now() END)
                RETURNING id
            """
            [(row_id,)] = world.icloud(sql, item=item_id, body=body, **{"device": quick, "status": "queued", **row})
            if row.get("waits"):
                world.icloud("UPDATE icloud.send_queue SET collected_at = NULL WHERE id = %(id)s", id=row_id)
            if columns.get("status") == "queued":
                sql = "UPDATE outreach_batch_items SET send_queue_id = %(row)s WHERE id = %(item)s"
                world.quinn(sql, row=row_id, item=item_id)

    fresh = world.batch()
    world.item(fresh, world.client(None), rendered_body="skipped")
    item(fresh, "first")
    item(fresh, "second fails")
    item(world.batch(), "fails at once")
    item(world.batch(status="cancelled"), "withdrawn", {"device": slow, "waits": True}, status="queued")
    flying = world.batch()
    item(flying, "sent already", {"status": "sent"}, status="queued")
    item(flying, "fails already", {"status": "failed"}, status="queued")
    item(flying, "vanished", status="queued", send_queue_id="ffffffff-0000-0000-0000-000000000000")
    item(world.batch(), "answer was lost", {}, claimed_at="now")
    item(world.batch(status="paused"), "claim of a paused batch", claimed_at="now")
    item(world.batch(), "old", status="skipped", failure_reason="long ago")
    return {
        "skipped": "skipped", "first": "sent", "second fails": "failed", "fails at once": "failed",
        "withdrawn": "pending", "sent already": "sent", "fails already": "failed", "vanished": "failed",
        "answer was lost": "sent", "claim of a paused batch": "sent", "old": "skipped",
    }  # fmt: skip


def dispatcher_dies(lab: Lab, fate: Fate) -> list[str]:
    if not lab.server_url:
        _, lab.server_url = lab.serve()
    lab.clear()
    devices = [lab.device("quick"), lab.device("slow")]
    expected = work_for_every_statement(lab.world)
    # The limit is what will be sent: a message that is sent twice, or is forgotten in flight, finds no room.
    lab.begin(max_per_day=4)
    with devices[0].log.open("a") as log:  # the rows that ended before this story begins
        for row_id, status, body in lab.world.icloud("SELECT id, status, body FROM icloud.send_queue"):
            if status != "queued":
                log.write(f"{status} {row_id} {body}\n")
    with contextlib.ExitStack() as stack:
        quinn, quinn_url = lab.proxies(fate, "quinn")
        icloud, icloud_url = lab.proxies(fate, "icloud")
        host, port = lab.server_url.removeprefix("http://").split(":")
        server = proxy.Http((host, int(port)), fate.meddle)
        for between in (quinn, icloud, server):
            stack.callback(between.close)
        fate.victim = lab.start(
            "dispatcher.py", "--once", QUINN_DB_URL=quinn_url, QUINN_ICLOUD_DB_URL=icloud_url,
            MAC_SYNC_BASE_URL=f"http://127.0.0.1:{server.port}",
        )  # fmt: skip
        fate.victim.process.wait(20)
    devices[0] = Device(lab.server_url, "quick", devices[0].log)
    devices[0].round()  # what reached the queue is sent, or fails, before the successor comes
    for cycle in range(CYCLES):
        lab.cycle()
        for device in devices:
            device.round()
        if cycle == 2:
            lab.world.quinn("UPDATE outreach_batches SET status = 'sending' WHERE status = 'paused'")
    lab.cycle()
    ended: dict[str, str] = dict(lab.world.quinn("SELECT rendered_body, status FROM outreach_batch_items"))
    wrong = [f"item {body!r} is {ended[body]}" for body in expected if ended[body] != expected[body]]
    batches = sorted(status for (status,) in lab.world.quinn("SELECT status FROM outreach_batches"))
    if batches != ["cancelled"] + 6 * ["sent"]:
        wrong.append(f"the batches are {batches}")
    return wrong + lab.judge(devices)


def test_a_dispatcher_may_die_at_any_step(labs: list[Lab]) -> None:
    every_fault(labs, dispatcher_dies)


# --- the server ---------------------------------------------------------------------------------------


def server_dies(lab: Lab, fate: Fate) -> list[str]:
    """Its clients repeat what had no answer, as the dispatcher and a device do, and meet its successor."""
    lab.clear()
    lab.world.device("mini")
    batch_id = lab.world.batch()
    messages = [
        {
            "batchItemId": lab.world.item(batch_id, rendered_body=body, claimed_at="now"),
            "deviceId": str(lab.world.icloud("SELECT id FROM icloud.devices")[0][0]),
            "toHandle": "+14155550123",
            "body": body,
        }
        for body in ("first", "second fails")
    ]
    between, icloud_url = lab.proxies(fate, "icloud")
    fate.victim, direct = lab.serve(QUINN_ICLOUD_DB_URL=icloud_url, SEND_QUEUE_THREADS="1")
    front = proxy.Http(("127.0.0.1", int(direct.rpartition(":")[2])), fate.meddle)
    mini = Device(f"http://127.0.0.1:{front.port}", "mini", lab.path / f"{next(lab.names)}.device")
    where = [f"http://127.0.0.1:{front.port}"]

    def persist(ask: Callable[[], Any]) -> None:
        def done() -> bool:
            if fate.struck.is_set() and fate.fault and fate.fault.kind == "kill" and len(where) == 1:
                assert fate.victim
                fate.victim.process.wait(5)
                where.append(lab.serve()[1])
                mini.base_url = f"{where[-1]}/client/imessage/send-queue"
            with contextlib.suppress(requests.RequestException):
                ask()
                return True
            return False

        until(done)

    def enqueue(message: dict[str, str]) -> None:
        headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
        answer = requests.post(f"{where[-1]}/admin/send-queue/enqueue", json=message, headers=headers, timeout=5)
        answer.raise_for_status()

    for message in messages:
        persist(lambda message=message: enqueue(message))  # type: ignore[misc]  # mypy cannot infer such a lambda
    persist(mini.round)
    persist(mini.round)
    for closing in (between, front):
        closing.close()
    for script in lab.scripts:
        script.process.kill()
        script.process.wait()
    rows = lab.world.icloud("SELECT body, status FROM icloud.send_queue ORDER BY body")
    wrong = [] if rows == [("first", "sent"), ("second fails", "failed")] else [f"the queue is {rows}"]
    if len(list(lab.world.icloud("SELECT DISTINCT batch_item_id FROM icloud.send_queue"))) != len(messages):
        wrong.append("a message is missing")
    dispatcher.sync(lab.databases.quinn, lab.databases.icloud)
    if lab.world.statuses() != ["sent", "failed"]:
        wrong.append(f"the items are {lab.world.statuses()}")
    return wrong + lab.judge([mini])


def test_the_server_may_die_at_any_step(labs: list[Lab]) -> None:
    every_fault(labs, server_dies)


# --- a device -----------------------------------------------------------------------------------------


def device_dies(lab: Lab, fate: Fate) -> list[str]:
    if not lab.server_url:
        _, lab.server_url = lab.serve()
    lab.clear()
    lab.world.device("mini")
    for body in ("first", "second fails", "third"):
        lab.world.item(lab.world.batch(), rendered_body=body)
    lab.begin(max_per_day=3)
    lab.cycle()
    host, port = lab.server_url.removeprefix("http://").split(":")
    front = proxy.Http((host, int(port)), fate.meddle)
    log = lab.path / f"{next(lab.names)}.device"
    command = (str(ROOT / "tests/device.py"), f"http://127.0.0.1:{front.port}", str(log))
    fate.victim = lab.start(*command, DEVICE_TOKEN="mini")
    finished = "SELECT 1 FROM icloud.send_queue HAVING count(*) FILTER (WHERE status <> 'queued') = 3"
    until(lambda: fate.struck.is_set() or (fate.fault is None and lab.world.icloud(finished)))
    if fate.fault and fate.fault.kind == "kill":
        fate.victim.process.wait(5)
        fate.victim = lab.start(*command, DEVICE_TOKEN="mini")
    until(lambda: lab.world.icloud(finished))
    fate.victim.process.kill()
    fate.victim.process.wait()
    front.close()
    for _ in range(2):
        lab.cycle()
    wrong = [] if sorted(lab.world.statuses()) == ["failed", "sent", "sent"] else [f"items: {lab.world.statuses()}"]
    return wrong + lab.judge([Device(lab.server_url, "mini", log)])


def test_a_device_may_die_at_any_step(labs: list[Lab]) -> None:
    every_fault(labs, device_dies)


# --- everything at once -------------------------------------------------------------------------------


def test_a_minute_of_random_faults_loses_and_doubles_nothing(tmp_path: Path) -> None:
    report = campaign.round_of(seed=1, path=tmp_path)
    assert not report.complaints, "\n".join(report.lines())
    assert sum(report.faults.values()) >= 200
    assert report.messages >= 2000
