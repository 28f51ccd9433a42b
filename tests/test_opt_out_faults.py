"""Let opt-outs come at every step of a message's way, and at random; nothing is collected after one is recorded.

The server, the owner's API and PostgreSQL are real processes. Where a race is meant, a held transaction decides who is
first. opt_out_check.py judges from the requests and the recorded changes; it asks the product nothing. The expectations
of each step say which of the checks has to stop the message there: so the loss of one is seen, although the next one
would stop the message as well.
"""

import contextlib
import itertools
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import event_log
import opt_out_check
import pytest
import requests
from helpers import LOCK_WAITS, ApiClient, run_sql
from opt_out_check import Acts
from testing import OWNER_TOKEN, SERVICE_TOKEN, DeviceClient, Script, TestData, free_port, patient, wait_until

import db
import dispatcher

pytestmark = pytest.mark.faults

Start = Callable[..., Script]
THREADS = "40"  # of the server: all people's requests wait at one lock at once
TEXT = "Hello {{ client.name }}, this is Ann. Reply STOP to end."
EARLY = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)  # after it come the times of the replies
numbers = itertools.count(1)


class Unreachable(dispatcher.SendQueueClient):
    """A client whose server is down."""

    def enqueue(self, *_: Any) -> str:
        raise dispatcher.ServerUnavailable("down")


class WatchedClient(dispatcher.SendQueueClient):
    """A client that calls `before` ahead of the first request, and `after` behind each response."""

    def __init__(self, url: str) -> None:
        super().__init__(url, SERVICE_TOKEN)
        self.asked: list[str] = []
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[str], None] = lambda item_id: None

    def enqueue(self, item: dispatcher.Item, *arguments: Any) -> str:
        if not self.asked:
            self.before()
        self.asked.append(item.id)
        queue_id = super().enqueue(item, *arguments)
        self.after(item.id)
        return queue_id


class Site:
    """The two servers as processes over the test's databases, and two devices."""

    def __init__(self, world: TestData, start: Start, path: Path) -> None:
        self.world, self.start, self.path = world, start, path
        self.acts = Acts()
        self.kept: list[event_log.Change] = []  # from before a restore
        event_log.install(world.databases.quinn, world.databases.icloud)
        self.device_ids = [world.device(name) for name in ("a", "b")]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.serve()
        owner = start("outreach_server.py", OUTREACH_PORT="0")
        self.owner = ApiClient(f"http://127.0.0.1:{owner.port()}", OWNER_TOKEN)
        self.client = WatchedClient(self.url)
        self.devices = [DeviceClient(self.url, name) for name in ("a", "b")]

    def serve(self) -> None:
        url = patient(self.world.databases.icloud_url)
        self.server = self.start(
            "send_queue_server.py", SEND_QUEUE_PORT=str(self.port), SEND_QUEUE_THREADS=THREADS, QUINN_ICLOUD_DB_URL=url
        )
        self.server.port()

    def connect(self) -> Any:
        """Connect to the queue's database, in a transaction that lasts until the caller commits."""
        conn = db.connect(self.world.databases.icloud_url)
        conn.autocommit = False
        return conn

    def sync(self) -> None:
        dispatcher.sync(self.world.databases.quinn, self.world.databases.icloud)

    def dispatch(self, client: dispatcher.SendQueueClient | None = None) -> None:
        with contextlib.suppress(dispatcher.ServerUnavailable):
            dispatcher.dispatch(self.world.databases.quinn, self.world.databases.icloud, client or self.client)

    def changes(self) -> list[event_log.Change]:
        return self.kept + event_log.read(self.world.databases.quinn, self.world.databases.icloud)

    def violations(self, others: dict[str, list[str]]) -> list[str]:
        """Return what was collected after an opt-out, of the handle itself or of another one of the person."""
        changes = self.changes()
        collected = opt_out_check.collects(changes)
        syncs = event_log.EventLog(changes).syncs
        acts = self.acts.all
        return [
            *opt_out_check.collected_after_opt_out(acts, collected),
            *opt_out_check.collected_after_opt_out_of_person(acts, collected, others, syncs),
        ]

    # --- opt-outs -------------------------------------------------------------------------------------

    def reply(self, device: DeviceClient, handle: str, word: str, at: datetime) -> bool:
        """Report a reply of a person; return whether the server has accepted it."""
        return self.acts.note(
            "stop" if word == "STOP" else "start",
            handle,
            lambda: device.opt_out(handle, word, at.isoformat()).status_code == 200,
            at,
        )

    def owner_records(self, handle: str) -> bool:
        return self._owner("owner", handle, "/my/outreach/opt-outs", {"handle": handle, "word": "on the phone"})

    def owner_ends(self, handle: str) -> bool:
        return self._owner("end", handle, "/my/outreach/opt-outs/end", {"handle": handle})

    def owner_imports(self, handle: str) -> bool:
        return self._owner("import", handle, "/my/outreach/opt-outs/import", f"number\n{handle}\n")

    def _owner(self, kind: opt_out_check.Kind, handle: str, path: str, body: object) -> bool:
        return self.acts.note(kind, handle, lambda: self.owner.call("POST", path, body).status_code == 200)


@pytest.fixture
def site(world: TestData, start: Start, tmp_path: Path) -> Iterator[Site]:
    site = Site(world, start, tmp_path)
    yield site
    site.client.session.close()


# --- every step ---------------------------------------------------------------------------------------


class Person(NamedTuple):
    """Somebody with two handles, who gets a batch of their own. `phone`: the primary handle."""

    variant: str
    phone: str
    mail: str
    client_id: str
    batch_id: str


def minute(number: int) -> datetime:
    return EARLY + timedelta(minutes=number)


def replies(*said: tuple[int, str, int]) -> Callable[[Site, Person], None]:
    """Return what reports these replies one after another: the device's number, the word, the minute."""

    def act(site: Site, person: Person) -> None:
        for device, word, at in said:
            assert site.reply(site.devices[device], person.phone, word, minute(at))

    return act


def owner_and_start(site: Site, person: Person) -> None:
    assert site.owner_records(person.phone)
    assert site.reply(site.devices[0], person.phone, "START", minute(100))


def replaced_by_owner(site: Site, person: Person) -> None:
    assert site.reply(site.devices[1], person.phone, "STOP", minute(1))
    owner_and_start(site, person)


def imported(site: Site, person: Person) -> None:
    assert site.owner_imports(person.phone)


def owner_by_mail(site: Site, person: Person) -> None:
    assert site.owner_records(person.mail)


def reply_by_mail(site: Site, person: Person) -> None:
    assert site.reply(site.devices[1], person.mail, "STOP", minute(1))


def ended_by_owner(site: Site, person: Person) -> None:
    assert site.owner_records(person.phone)
    assert site.owner_ends(person.phone)


# What happens at the step. The opt-outs of the first group stop the message at once, by its own handle.
STOPS: dict[str, Callable[[Site, Person], None]] = {
    "STOP": replies((0, "STOP", 1)),
    "STOP twice": replies((0, "STOP", 1), (0, "STOP", 1)),
    "STOP from two devices": replies((0, "STOP", 1), (1, "STOP", 1)),
    "STOP that is a week late": replies((1, "STOP", -7 * 24 * 60)),
    "two STOPs out of order": replies((0, "STOP", 3), (1, "STOP", 1)),
    "START before STOP": replies((0, "START", 1), (1, "STOP", 2)),
    "START that is older, after STOP": replies((0, "STOP", 2), (1, "START", 1)),
    "START of the same moment": replies((0, "STOP", 2), (1, "START", 2)),
    "START between two STOPs, in the last place": replies((0, "STOP", 1), (1, "STOP", 3), (0, "START", 2)),
    "STOP, START, STOP": replies((0, "STOP", 1), (1, "START", 2), (0, "STOP", 3)),
    "owner, then START": owner_and_start,
    "STOP, owner, START": replaced_by_owner,
    "a list": imported,
}
OTHER_HANDLE = {"owner, by another handle": owner_by_mail, "STOP from another address": reply_by_mail}
GOES_ON: dict[str, Callable[[Site, Person], None]] = {
    "nothing": lambda site, person: None,
    "START after STOP": replies((0, "STOP", 1), (1, "START", 2)),
    "owner, then opt-in": ended_by_owner,
}
VARIANTS = STOPS | OTHER_HANDLE | GOES_ON


class Journey:
    """The way of one message for each variant, up to the step at which the opt-outs come.

    `is_polled`: the device collects everything by one poll. What only another handle stops takes a sync then, so those
    people are left out.
    """

    def __init__(self, site: Site, step: str, is_polled: bool) -> None:
        self.site, self.step, self.is_polled = site, step, is_polled
        self.device = site.devices[0]
        site.world.settings(device_id=site.device_ids[0])
        site.client.asked.clear()
        variants = STOPS | GOES_ON if is_polled else VARIANTS
        self.people = [self._person(variant) for variant in variants]
        self.item_of: dict[str, str] = {}  # the item of each batch
        self.left_out: list[str] = []
        self.failures: list[str] = []

    def _person(self, variant: str) -> Person:
        number = next(numbers)
        phone, mail = f"+1415{5550000 + number}", f"person{number}@example.com"
        client_id = self.site.world.client(phone)
        self.site.world.quinn(
            "INSERT INTO contact_relationships VALUES (%(id)s, %(mail)s)", id=client_id, mail=mail.upper()
        )
        return Person(variant, phone, mail, client_id, str(uuid.uuid4()))

    # --- the way --------------------------------------------------------------------------------------

    def opt_out(self) -> None:
        for person in self.people:
            VARIANTS[person.variant](self.site, person)

    def draft(self, again: bool = False) -> None:
        for place, person in enumerate(self.people):
            batch_id = str(uuid.uuid4()) if again else person.batch_id
            query = {"v": 1, "where": {"field": "id", "eq": person.client_id}}
            body = {"id": batch_id, "query": query, "template": TEXT}
            response = self.site.owner.call("POST", "/my/outreach/batch", body)
            if response.status_code != 200:
                self.left_out.append(person.variant)
            self.people[place] = person._replace(batch_id=batch_id)
        sql = "SELECT batch_id, id FROM outreach_batch_items WHERE batch_id = ANY (%(ids)s::uuid[])"
        self.item_of = dict(self.site.world.quinn(sql, ids=[person.batch_id for person in self.people]))

    def approve(self) -> None:
        digests = "SELECT id, digest FROM outreach_batches WHERE id = ANY (%(ids)s::uuid[])"
        for batch_id, digest in self.site.world.quinn(digests, ids=list(self.item_of)):
            response = self.site.owner.call(
                "POST", f"/my/outreach/batch/{batch_id}/send", {"digest": digest, "recipients": 1}
            )
            assert response.status_code == 200, response.text

    def rows(self) -> dict[str, list[str]]:
        """Return the rows of each batch, oldest first."""
        sql = "SELECT batch_item_id, id FROM icloud.send_queue ORDER BY created_at, id"
        found: dict[str, list[str]] = {batch_id: [] for batch_id in self.item_of}
        batch_of = {item_id: batch_id for batch_id, item_id in self.item_of.items()}
        for item_id, row_id in self.site.world.icloud(sql):
            if item_id in batch_of:
                found[batch_of[item_id]].append(row_id)
        return found

    def collect(self, variants: Sequence[str]) -> dict[str, str]:
        """Let the device collect what it can of these people; return the response for each, `ok` or the reason."""
        found: dict[str, str] = {}
        rows = self.rows()
        for person in self.people:
            for row_id in rows.get(person.batch_id, [])[-1:] if person.variant in variants else []:
                if self.is_polled:
                    continue
                response = self.device.collect(row_id)
                is_done = response.status_code == 200
                found[person.variant] = "ok" if is_done else response.json()["data"]["reason"]
        if self.is_polled:
            ids = {item["id"] for item in self.device.poll()}
            found = {person.variant: "ok" for person in self.people if ids & set(rows.get(person.batch_id, ()))}
        return found

    def send(self) -> None:
        """Let the device report what it has collected as sent."""
        sql = """
            SELECT id FROM icloud.send_queue WHERE status = 'queued' AND collected_at IS NOT NULL ORDER BY created_at
        """
        for (row_id,) in self.site.world.icloud(sql):
            assert self.device.result(row_id).status_code == 200

    def finish(self) -> None:
        """Go on until everything has ended. At once, before any sync, the device collects what it can."""
        at_once = self.collect([*STOPS, *GOES_ON])
        if stopped := [variant for variant in at_once if variant in STOPS and at_once[variant] == "ok"]:
            self.fail(f"collected at once: {stopped}")
        for _ in range(4):
            self.site.sync()
            self.site.dispatch()
            self.collect(list(VARIANTS))
            self.send()
        self.site.sync()

    # --- what must be so ------------------------------------------------------------------------------

    def fail(self, sentence: str) -> None:
        self.failures.append(f"{self.step}{', polled' if self.is_polled else ''}: {sentence}")

    def expect(self, expected: str, rows: int | None = None, asked: bool | None = None, claimed: bool = True) -> None:
        """Check how the items of those who opted out ended; by one of these ways only is a message stopped in time.

        `rows`: how many rows they had; None: any number. `asked`: whether the server was asked for one. `claimed`:
        False if none may have been claimed. All others were sent their message.
        """
        ended = dict(self.site.world.quinn("SELECT id, concat(status, ': ', failure_reason) FROM outreach_batch_items"))
        found_rows, claims = self.rows(), self._claims()
        for person in self.people:
            goes_on = person.variant in GOES_ON
            item_id = self.item_of.get(person.batch_id)
            end = ended.get(item_id, "left out")
            if end != ("sent: " if goes_on else expected):
                self.fail(f"{person.variant}: {end}")
            if goes_on or item_id is None:
                continue
            by_own_handle = person.variant in STOPS
            if rows is not None and by_own_handle and len(found_rows[person.batch_id]) != rows:
                self.fail(f"{person.variant}: {len(found_rows[person.batch_id])} rows")
            if asked is not None and (item_id in self.site.client.asked) != asked:
                self.fail(f"{person.variant}: the server was {'not ' if asked else ''}asked")
            if not claimed and item_id in claims:
                self.fail(f"{person.variant}: it was claimed")

    def _claims(self) -> set[str]:
        changes = event_log.read(self.site.world.databases.quinn, self.site.world.databases.icloud)
        return {
            change.id
            for change in changes
            if change.table == "outreach_batch_items" and change.new and change.new["claimed_at"]
        }

    def expect_expired(self) -> None:
        """Check that recording an opt-out has ended the time of what waits: the only check that sees a held collect."""
        sql = "SELECT id FROM icloud.send_queue WHERE valid_until = '-infinity' OR withdrawn_at IS NOT NULL"
        expired = {row_id for (row_id,) in self.site.world.icloud(sql)}
        rows = self.rows()
        for person in self.people:
            is_meant = person.variant in STOPS or person.variant == "owner, by another handle"
            if is_meant and not set(rows[person.batch_id]) & expired:
                self.fail(f"{person.variant}: its row is still valid")

    def others(self) -> dict[str, list[str]]:
        return {person.phone: [person.mail] for person in self.people}


def before_the_draft(journey: Journey) -> None:
    journey.opt_out()
    journey.draft()
    journey.approve()
    journey.finish()
    journey.expect("left out")


def after_the_draft(journey: Journey) -> None:
    journey.draft()
    journey.opt_out()
    journey.approve()
    journey.finish()
    journey.expect("skipped: opted out", rows=0, asked=False, claimed=False)


def after_the_approval(journey: Journey) -> None:
    journey.draft()
    journey.approve()
    journey.opt_out()
    journey.finish()
    journey.expect("skipped: opted out", rows=0, asked=False, claimed=False)


def claimed(journey: Journey) -> None:
    """The server is down when the items are claimed, and up again after the opt-outs."""
    journey.draft()
    journey.approve()
    journey.site.dispatch(Unreachable(journey.site.url, SERVICE_TOKEN))
    journey.opt_out()
    journey.finish()
    journey.expect("skipped: opted out", rows=0, asked=False)


def being_enqueued(journey: Journey) -> None:
    """The dispatcher has looked for opt-outs, and has not asked the server yet."""
    journey.draft()
    journey.approve()
    journey.site.client.before = journey.opt_out
    journey.site.dispatch()
    journey.site.client.before = lambda: None
    journey.finish()
    journey.expect("skipped: opted out", rows=0, asked=True)


def while_the_row_is_not_committed(journey: Journey) -> None:
    """The server has looked for opt-outs, and its INSERT waits: no recording of an opt-out can see the row.

    A rival holds the items' places in the unique index, and gives them up after the opt-outs.
    """
    site = journey.site
    journey.draft()
    journey.approve()
    site.dispatch(Unreachable(site.url, SERVICE_TOKEN))
    items = dispatcher.claimed_items(site.world.databases.quinn)
    insert = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id)
        SELECT %(device)s, 'rival', 'rival', id FROM unnest(%(ids)s::uuid[]) AS id
    """
    device_id = site.device_ids[0]
    with contextlib.closing(site.connect()) as rival, ThreadPoolExecutor(len(items)) as threads:
        db.query(rival, insert, {"device": device_id, "ids": [item.id for item in items]})
        waiting = [threads.submit(enqueue_alone, site, item, device_id) for item in items]
        wait_until(lambda: len(run_sql(site.world.databases.icloud_url, LOCK_WAITS)) == len(items))
        journey.opt_out()
        rival.rollback()
        assert {each.result(10) for each in waiting} == {200}
    journey.finish()
    journey.expect("skipped: opted out", rows=1)


def enqueue_alone(site: Site, item: dispatcher.Item, device_id: str) -> int:
    """Ask the server for a row as the dispatcher does; return the status."""
    message = {
        "batchItemId": item.id, "deviceId": device_id, "toHandle": item.handle, "body": item.body,
        "attempt": item.attempt, "draftedAt": item.created_at.isoformat(),
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    response = requests.post(f"{site.url}/admin/send-queue/enqueue", json=message, headers=headers, timeout=30)
    return response.status_code


def while_the_response_is_on_its_way(journey: Journey) -> None:
    """The row is there, and the item does not know it yet."""
    journey.draft()
    journey.approve()
    batch_of = {item_id: batch_id for batch_id, item_id in journey.item_of.items()}

    def after(item_id: str) -> None:
        [person] = [person for person in journey.people if person.batch_id == batch_of[item_id]]
        VARIANTS[person.variant](journey.site, person)

    journey.site.client.after = after
    journey.site.dispatch()
    journey.site.client.after = lambda item_id: None
    journey.expect_expired()
    journey.finish()
    journey.expect("skipped: opted out", rows=1)


def queued(journey: Journey) -> None:
    journey.draft()
    journey.approve()
    journey.site.dispatch()
    journey.opt_out()
    journey.expect_expired()
    journey.finish()
    journey.expect("skipped: opted out", rows=1)


def peeked(journey: Journey) -> None:
    """The Mac has the texts, and has not asked to hand them over."""
    journey.draft()
    journey.approve()
    journey.site.dispatch()
    assert len(journey.device.peek()["items"]) == len(journey.people)
    journey.opt_out()
    journey.finish()
    journey.expect("skipped: opted out", rows=1)


def collected_and_given_back(journey: Journey) -> None:
    """The Mac asks again for what it has: it does not get it again, and gives it back."""
    journey.draft()
    journey.approve()
    journey.site.dispatch()
    last = {batch_id: rows[-1] for batch_id, rows in journey.rows().items()}
    ids = {row_id: str(uuid.uuid4()) for row_id in last.values()}
    for row_id, collect_id in ids.items():
        assert journey.device.collect(row_id, collect_id).status_code == 200
    journey.opt_out()
    for person in journey.people:
        row_id = last[person.batch_id]
        again = journey.device.collect(row_id, ids[row_id])
        if person.variant in STOPS and again.status_code == 200:
            journey.fail(f"{person.variant}: handed over again")
        assert journey.device.result(row_id, "failed", error="asleep", outcome="not_started").status_code == 200
    journey.finish()
    journey.expect("skipped: opted out", rows=1)


def sent(journey: Journey) -> None:
    """What was sent stays so; the next draft leaves them out."""
    journey.draft()
    journey.approve()
    journey.site.dispatch()
    journey.collect(list(VARIANTS))
    journey.send()
    journey.opt_out()
    journey.site.sync()
    sql = "SELECT DISTINCT status FROM outreach_batch_items WHERE id = ANY (%(ids)s::uuid[])"
    if journey.site.world.quinn(sql, ids=list(journey.item_of.values())) != [("sent",)]:
        journey.fail("a message that was sent is not `sent`")
    journey.draft(again=True)
    journey.approve()
    journey.finish()
    journey.expect("left out")


def failed_and_retried(journey: Journey) -> None:
    journey.draft()
    journey.approve()
    journey.site.dispatch()
    for rows in journey.rows().values():
        assert journey.device.collect(rows[-1]).status_code == 200
        assert journey.device.result(rows[-1], "failed", error="not registered").status_code == 200
    journey.site.sync()
    journey.opt_out()
    journey.site.client.asked.clear()
    for batch_id in journey.item_of:
        assert journey.site.owner.call("POST", f"/my/outreach/batch/{batch_id}/retry", {}).status_code == 200
    journey.finish()
    journey.expect("skipped: opted out", rows=1, asked=False)


BY_ONE = (
    before_the_draft, after_the_draft, after_the_approval, claimed, being_enqueued, while_the_row_is_not_committed,
    while_the_response_is_on_its_way, queued, peeked, collected_and_given_back, sent, failed_and_retried,
)  # fmt: skip
BY_POLL = (while_the_row_is_not_committed, while_the_response_is_on_its_way, queued)
STEPS = [(step, False) for step in BY_ONE] + [(step, True) for step in BY_POLL]


@pytest.fixture
def no_brake(world: TestData) -> None:
    """Let no batch pause itself: here most people opt out, and messages fail on purpose."""
    world.settings(stop_after_failures=None)


def test_opt_outs_at_every_step_of_a_message(site: Site, no_brake: None, capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[str] = []
    others: dict[str, list[str]] = {}
    for step, is_polled in STEPS:
        journey = Journey(site, step.__name__.replace("_", " "), is_polled)
        step(journey)
        failures += journey.failures
        others |= journey.others()
    found = site.violations(others)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(STEPS)} steps, {len(others)} people: {figures(site)}\n")
    assert failures + found == []


def figures(site: Site) -> str:
    """Return how much happened, in words."""
    collected = opt_out_check.collects(site.changes())
    kinds = Counter(act.kind for act in site.acts.all)
    acts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{acts}; {len(collected)} collected, {opt_out_check.meanwhile(site.acts.all, collected)} of them meanwhile"
