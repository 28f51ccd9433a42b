"""Send a message for each kind of opt-out up to the step at which the opt-outs come. No tests are in here.

What a run expects at its end says which of the product's checks has to stop the message. So a test sees its loss,
although the next one would stop the message as well.
"""

import itertools
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import event_log
from opt_out_site import Site

TEXT = "Hello {{ client.name }}, this is Ann. Reply STOP to end."
EARLY = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)  # the times of the replies follow it
numbers = itertools.count(1)


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


def assigned(site: Site, person: Person) -> None:
    """A reply from an address that no client has; then the owner says whose it is."""
    address = f"unknown.{person.mail}"
    assert site.reply(site.devices[1], address, "STOP", minute(1))
    wanted = {"handle": address, "clientId": person.client_id}
    assert site.owner.call("POST", "/my/outreach/opt-outs/assign", wanted).status_code == 200


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
OTHER_HANDLE = {
    "owner, by another handle": owner_by_mail,
    "STOP from an address that is assigned": assigned,
    "STOP from another address": reply_by_mail,
}
GOES_ON: dict[str, Callable[[Site, Person], None]] = {
    "nothing": lambda site, person: None,
    "START after STOP": replies((0, "STOP", 1), (1, "START", 2)),
    "owner, then opt-in": ended_by_owner,
}
VARIANTS = STOPS | OTHER_HANDLE | GOES_ON


class StepRun:
    """One message for each variant, sent up to the step at which the opt-outs come.

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
        self.failures: list[str] = []

    def _person(self, variant: str) -> Person:
        number = next(numbers)
        phone, mail = f"+1415{5550000 + number}", f"person{number}@example.com"
        client_id = self.site.world.client(phone)
        self.site.world.quinn(
            "INSERT INTO contact_relationships VALUES (%(id)s, %(mail)s)", id=client_id, mail=mail.upper()
        )
        return Person(variant, phone, mail, client_id, str(uuid.uuid4()))

    # --- its steps ------------------------------------------------------------------------------------

    def opt_out(self) -> None:
        """Let each person's kind of opt-out happen, several people at a time."""
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda person: VARIANTS[person.variant](self.site, person), self.people))

    def opt_out_one(self, item_id: str) -> None:
        """Let the kind of opt-out happen of the person who gets this item."""
        for person in self.people:
            if self.item_of.get(person.batch_id) == item_id:
                VARIANTS[person.variant](self.site, person)

    def draft(self, again: bool = False) -> None:
        """Draft a batch for each person; `again`: another one than before."""
        if again:
            self.people = [person._replace(batch_id=str(uuid.uuid4())) for person in self.people]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(self._draft, self.people))
        sql = "SELECT batch_id, id FROM outreach_batch_items WHERE batch_id = ANY (%(ids)s::uuid[])"
        self.item_of = dict(self.site.world.quinn(sql, ids=[person.batch_id for person in self.people]))

    def _draft(self, person: Person) -> None:
        query = {"v": 1, "where": {"field": "id", "eq": person.client_id}}
        body = {"id": person.batch_id, "query": query, "template": TEXT}
        response = self.site.owner.call("POST", "/my/outreach/batch", body)
        assert response.status_code in (200, 409), response.text  # 409: a draft for nobody

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
        ended: dict[str | None, str] = dict(
            self.site.world.quinn("SELECT id, concat(status, ': ', failure_reason) FROM outreach_batch_items")
        )
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
            # The server, which records a reply, does not know the person's other handles.
            is_meant = person.variant not in GOES_ON and person.variant != "STOP from another address"
            if is_meant and not set(rows[person.batch_id]) & expired:
                self.fail(f"{person.variant}: its row is still valid")

    def others(self) -> dict[str, list[str]]:
        return {person.phone: [person.mail, f"unknown.{person.mail}"] for person in self.people}
