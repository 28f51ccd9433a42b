"""Restore both databases amid opt-outs, and let people opt out at random while processes die and responses are lost.

opt_out_check.py judges from the requests and from the recorded changes; it asks the product nothing.
"""

import contextlib
import itertools
import random
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import opt_out_check
import proxy
import pytest
import requests
from helpers import run_sql
from opt_out_site import Backup, Mac, Site, figures
from opt_out_step_run import Person, StepRun, minute
from testing import SERVICE_TOKEN, DeviceClient, Script, TestData

import db

pytestmark = pytest.mark.faults

Start = Callable[..., Script]


@pytest.fixture
def site(world: TestData, start: Start, tmp_path: Path) -> Iterator[Site]:
    site = Site(world, start, tmp_path)
    yield site
    site.client.session.close()


@pytest.fixture
def no_pauses(world: TestData) -> None:
    """Let no batch pause itself: here most people opt out, and messages fail on purpose."""
    world.settings(stop_after_failures=None)


# --- a restore ----------------------------------------------------------------------------------------


def test_opt_outs_outlive_a_restore_of_both_databases(site: Site, no_pauses: None) -> None:
    """Messages wait at the backup, and people opt out before and after it; nobody gets one, by whichever device."""
    run = StepRun(site, "restored", is_polled=False)
    macs = [Mac(site, device) for device in site.devices]
    variants = itertools.cycle(
        ["reply before", "owner before", "reply to a", "reply to b", "owner", "a list", "START", "by mail", "nothing"]
    )
    run.people = [person._replace(variant=next(variants)) for person in run.people]

    def opt_out(person: Person) -> None:
        if "owner" in person.variant:
            assert site.owner_records(person.phone)
        elif person.variant == "a list":
            assert site.owner_imports(person.phone)
        elif person.variant != "nothing":
            handle = person.mail if person.variant == "by mail" else person.phone
            macs[person.variant == "reply to b"].receive(handle, "STOP", minute(1))
        if person.variant == "START":
            macs[1].receive(person.phone, "START", minute(2))

    run.draft()
    run.approve()
    site.dispatch()
    backup = None
    for is_before in (True, False):
        if not is_before:
            backup = Backup(site)
        for person in run.people:
            if ("before" in person.variant) is is_before:
                opt_out(person)
        for mac in macs:
            mac.report()
            mac.known = mac.device.peek()["optOuts"]
    site.server.end(signal.SIGKILL)
    assert backup
    backup.restore(macs)
    for _ in range(4):
        site.sync()
        site.dispatch()
        for mac in macs:
            mac.round()
    site.sync()
    ended: dict[str, str] = dict(site.world.quinn("SELECT batch_id, status FROM outreach_batch_items"))
    got = {person.variant for person in run.people if ended[person.batch_id] != "skipped"}
    assert got == {"START", "nothing"}
    assert site.violations(run.others()) == []


# --- at random ----------------------------------------------------------------------------------------

PHASE = 5.0  # seconds before the restore, and after it
LOSS = 0.03  # the share of the devices' exchanges whose request, or whose response, is lost
PEOPLE, BATCHES, ITEMS = 20, 12, 40  # whom the dispatcher writes to
OTHERS = 20  # people with one handle, whom another program writes to, as fast as the server takes it


class RandomRun:
    """Threads that let people and the owner opt out and in, devices collect, and processes die, until it is over."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site, self.seed = site, seed
        self.is_over = threading.Event()
        self.failures: list[str] = []
        self.kills: Counter[str] = Counter()
        self.front = proxy.Http(("127.0.0.1", site.port), self._lose())
        url = f"http://127.0.0.1:{self.front.port}"
        self.macs = [Mac(site, DeviceClient(url, "a")), Mac(site, DeviceClient(url, "b"), is_polling=True)]
        self.clients = [(f"+1415556{number:04}", f"random{number}@example.com") for number in range(PEOPLE)]
        self.others = [f"+1415557{number:04}" for number in range(OTHERS)]
        self.people = self.clients + [(phone, phone) for phone in self.others]
        self.dispatcher: Script | None = None

    def fill(self) -> None:
        """Insert the people and the batches, and start the owner's server."""
        assert self.site.owner.call("GET", "/healthz").ok
        data = self.site.world
        rng = random.Random(self.seed)  # noqa: S311  # dice, not secrets
        clients = [data.client(phone) for phone, _ in self.clients]
        for client_id, (_, mail) in zip(clients, self.clients, strict=True):
            data.quinn("INSERT INTO contact_relationships VALUES (%(id)s, %(mail)s)", id=client_id, mail=mail)
        for _ in range(BATCHES):
            data.batch(rng.choices(clients, k=ITEMS))

    def start_dispatcher(self) -> None:
        environment = {"MAC_SYNC_BASE_URL": self.site.url, "DISPATCH_INTERVAL_SECONDS": "1"}
        self.dispatcher = self.site.start("dispatcher.py", **environment)

    def _lose(self) -> proxy.OnExchange:
        rng, lock = random.Random(f"{self.seed} loss"), threading.Lock()  # noqa: S311  # dice, not secrets

        def on_exchange(_moment: proxy.Moment, _what: str) -> bool:
            with lock:
                return self.is_over.is_set() or rng.random() > LOSS

        return on_exchange

    def run_phase(self, phase: int) -> Backup | None:
        """Let everything happen for a phase; in the first, make a backup amid it."""
        self.is_over.clear()
        self.start_dispatcher()
        loops: list[Callable[[random.Random], None]] = [self._owner, self._replies]
        loops += [self._enqueue, self._enqueue_late, self._hold]
        loops += [self._kill, self._switch, *map(self._device, self.macs)]
        with ThreadPoolExecutor(len(loops)) as threads:
            running = [threads.submit(self._repeat, loop, f"{phase} {number}") for number, loop in enumerate(loops)]
            begun = time.monotonic()
            try:
                time.sleep(PHASE / 3)
                backup = Backup(self.site) if phase == 1 else None
                time.sleep(max(0.0, begun + PHASE - time.monotonic()))
            finally:
                self.is_over.set()
        for each in running:
            each.result()
        assert self.dispatcher
        self.dispatcher.end(signal.SIGKILL)
        for mac in self.macs:
            mac.report()
        return backup

    def _repeat(self, act: Callable[[random.Random], None], name: str) -> None:
        rng = random.Random(f"{self.seed} {name}")  # noqa: S311  # dice, not secrets
        while not self.is_over.is_set():
            try:
                act(rng)
            except requests.RequestException:  # a response was lost, or the server is dead
                time.sleep(0.02)
            except AssertionError as error:
                self.failures.append(str(error))
                return

    # --- what happens -------------------------------------------------------------------------------------

    def _device(self, mac: Mac) -> Callable[[random.Random], None]:
        def act(rng: random.Random) -> None:
            mac.round(lambda: time.sleep(rng.choice((0, 0, 0.01, 0.05))))
            time.sleep(rng.uniform(0, 0.1))

        return act

    def _choose(self, rng: random.Random) -> tuple[str, str]:
        """Choose somebody; mostly one for whom a message waits."""
        waiting = "SELECT DISTINCT to_handle FROM icloud.send_queue WHERE status = 'queued' AND collected_at IS NULL"
        phones = {phone for (phone,) in run_sql(self.site.world.databases.icloud_url, waiting)}
        wanted = [person for person in self.people if person[0] in phones]
        return rng.choice(wanted if wanted and rng.random() < 0.8 else self.people)

    def _replies(self, rng: random.Random) -> None:
        """Let somebody write to one of the devices, or to both; now, or long ago; in order, or not."""
        phone, mail = self._choose(rng)
        handle = mail if rng.random() < 0.15 else phone
        now = datetime.now(UTC) - timedelta(seconds=rng.choice((0, 0, 0, rng.uniform(0, 3600))))
        words = rng.choice((["STOP"], ["STOP"], ["STOP", "START"], ["START", "STOP"], ["STOP", "START", "STOP"]))
        said = [(word, now + timedelta(milliseconds=number)) for number, word in enumerate(words)]
        if rng.random() < 0.3:
            rng.shuffle(said)
        for word, at in said:
            macs = self.macs if rng.random() < 0.2 else [rng.choice(self.macs)]
            for mac in macs * rng.choice((1, 1, 2)):
                mac.receive(handle, word, at)
        if rng.random() < 0.5:
            for mac in self.macs:
                mac.report()
        time.sleep(rng.uniform(0, 0.15))

    def _enqueue(self, rng: random.Random) -> None:
        """Put a message into a device's queue, as a program without batches does."""
        self._post(rng, str(uuid.UUID(int=rng.getrandbits(128))), rng.choice(self.others))
        self.is_over.wait(rng.uniform(0, 0.03))

    def _enqueue_late(self, rng: random.Random) -> None:
        """Hold a message's place in the unique index, so that its INSERT waits after it has looked for opt-outs."""
        item_id, phone = str(uuid.UUID(int=rng.getrandbits(128))), rng.choice(self.others)
        insert = """
            INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
            VALUES (%(device)s, 'rival', 'rival', %(item)s)
        """
        with contextlib.closing(self.site.connect()) as rival, ThreadPoolExecutor() as threads:
            db.query(rival, insert, {"device": self.site.device_ids[0], "item": item_id})
            posted = threads.submit(self._post, rng, item_id, phone)
            time.sleep(rng.uniform(0.01, 0.05))
            if rng.random() < 0.5:
                mac = rng.choice(self.macs)
                mac.receive(phone, "STOP", datetime.now(UTC))
                mac.report()
            rival.rollback()
            posted.result()

    def _post(self, rng: random.Random, item_id: str, phone: str) -> None:
        device_id = rng.choice(self.site.device_ids)
        body = {"batchItemId": item_id, "deviceId": device_id, "toHandle": phone, "body": "Hello!"}
        headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
        url = f"{self.site.url}/admin/send-queue/enqueue"
        status = requests.post(url, json=body, headers=headers, timeout=10).status_code
        assert status in (200, 422), status

    def _hold(self, rng: random.Random) -> None:
        """Hold rows of the queue, so that a collect waits after it has looked for opt-outs."""
        sql = """
            SELECT id FROM icloud.send_queue WHERE status = 'queued' AND collected_at IS NULL
             ORDER BY created_at DESC LIMIT 5 FOR UPDATE SKIP LOCKED
        """
        with contextlib.closing(self.site.connect()) as rival:
            db.query(rival, sql)
            time.sleep(rng.uniform(0.01, 0.05))
            rival.rollback()
        self.is_over.wait(rng.uniform(0, 0.05))

    def _owner(self, rng: random.Random) -> None:
        """Let the owner opt somebody out, in most cases somebody in again: else nobody would be left."""
        phone, mail = self._choose(rng)
        act = rng.choice((self.site.owner_records, self.site.owner_imports))
        act(mail if rng.random() < 0.15 else phone)
        time.sleep(rng.uniform(0, 0.1))
        for handle in rng.choice(self.people) + rng.choice(self.people):
            self.site.owner_ends(handle)

    def _kill(self, rng: random.Random) -> None:
        """Kill a process, and start it again."""
        if self.is_over.wait(rng.uniform(0.8, 2)):
            return
        name = rng.choice(("server", "dispatcher", "owner's server"))
        self.kills[name] += 1
        if name == "server":
            self.site.server.end(signal.SIGKILL)
            self.site.serve()
        elif name == "dispatcher":
            assert self.dispatcher
            self.dispatcher.end(signal.SIGKILL)
            self.start_dispatcher()
        else:
            self.site.owner_server.end(signal.SIGKILL)
            self.site.serve_owner()

    def _switch(self, rng: random.Random) -> None:
        """Let the dispatcher choose the other device, also for those whom the first one has reached."""
        sql = f"UPDATE outreach_settings SET device_id = '{rng.choice(self.site.device_ids)}'"
        run_sql(self.site.world.databases.quinn_url, sql)
        self.is_over.wait(rng.uniform(0.2, 1))


def test_opt_outs_at_random(site: Site, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Two phases, and between them both databases are restored from a backup that was made amid the first."""
    run = RandomRun(site, seed)
    run.fill()
    backup = run.run_phase(1)
    assert backup
    site.server.end(signal.SIGKILL)
    backup.restore(run.macs)
    run.run_phase(2)
    run.front.close()
    found = site.violations({phone: [mail] for phone, mail in run.clients})
    collected = opt_out_check.collects(site.changes())
    with capsys.disabled():
        sys.stdout.write(f"\nseed {seed}: {figures(site)}; killed: {dict(run.kills)}\n")
    assert not run.failures + found, "\n".join(run.failures + found)
    assert len(collected) >= 30  # on an idle machine some 150
    assert sum(act.kind == "stop" and act.acknowledged_at is not None for act in site.acts.all) >= 60
