"""The real jobs, handlers and SQL beside a small model in memory: whatever is done, in whatever order, the two agree.

hypothesis invents the story: batches, settings, polls, results, outages, lost responses, edits, deletions. The model is
the rules once more, in plain Python, with minutes for a clock; after each step databases and model must be the same.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
import requests
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from testing import SERVICE_TOKEN, TestData

import db
import dispatcher
import send_queue_server

MINUTE, DAY = 1, 24 * 60  # the model's clock counts minutes
BASE_URL = "http://mac-sync.test"
PICK = st.integers(0, 10**6)  # an index into whatever there is to choose from
Act = TypeVar("Act", bound=Callable[..., None])
LIMITS = st.sampled_from([None, None, None, 3, 2, 1, 0])


class Wire(requests.adapters.BaseAdapter):
    """Pass requests to the WSGI application without a socket; `outcome` decides the fate of the next enqueue."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self.app = app
        self.outcome = "ok"

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        outcome = self.outcome if "enqueue" in str(request.url) else "ok"
        if outcome == "down":
            raise requests.ConnectionError
        response = self._ask(request)
        if outcome == "lost":
            raise requests.ReadTimeout
        return response

    def close(self) -> None:
        pass

    def _ask(self, request: requests.PreparedRequest) -> requests.Response:
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        response = requests.Response()
        response.request = request

        def start(status: str, headers: list[tuple[str, str]], _problem: Any = None) -> None:
            response.status_code = int(status[:3])
            response.headers.update(headers)

        environ = {
            "REQUEST_METHOD": request.method, "PATH_INFO": request.path_url, "QUERY_STRING": "",
            "SERVER_NAME": "mac-sync.test", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json",
            "HTTP_AUTHORIZATION": request.headers.get("Authorization", ""),
            "wsgi.input": io.BytesIO(body), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
        }  # fmt: skip
        response.raw = io.BytesIO(b"".join(self.app(environ, start)))
        return response


# --- the model ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """A queue row. `made`: a serial number. `timed`: it has a valid_until; `expired`: that is past."""

    item: "Item | None"
    device: str
    content: tuple[str, str]
    made: int
    status: str = "queued"
    collected: bool = False
    withdrawn: bool = False
    timed: bool = False
    expired: bool = False
    sent_at: int = 0
    id: str = ""  # once it is known


@dataclass
class Batch:
    id: str
    status: str
    dry_run: bool
    served: int = -1  # the number of the turn; the lowest goes first
    items: list["Item"] = field(default_factory=list)

    @property
    def is_sending(self) -> bool:
        return self.status == "sending" and not self.dry_run


@dataclass
class Item:
    id: str
    batch: Batch
    client: str
    status: str = "pending"
    claimed: int = 0  # the number of its claim
    row: Row | None = None  # the one that send_queue_id names
    sent: tuple[int, int] = (0, 0)  # the minute, and a serial number
    device: str | None = None
    attempts: list[Row] = field(default_factory=list)

    @property
    def flies(self) -> bool:
        return self.status == "queued" or (self.status == "pending" and self.claimed > 0)

    @property
    def live_row(self) -> Row | None:
        return next((row for row in self.attempts if row.status != "failed"), None)


class Model:
    """What must be in the databases. `devices` in the order of their age; `handles` by client."""

    def __init__(self) -> None:
        self.minute = DAY
        self.serial = 0
        self.paused = False
        self.quiet: str | None = None  # `now` or `later`
        self.limits: dict[str, int | None] = {"max_per_minute": None, "max_per_day": None}
        self.gap: int | None = None
        self.chosen: str | None = None
        self.devices: list[str] = []
        self.seen: set[str] = set()  # the devices that have polled; no day passes here
        self.handles: dict[str, str | None] = {}
        self.batches: list[Batch] = []
        self.rows: list[Row] = []

    @property
    def items(self) -> list[Item]:
        return [item for batch in self.batches for item in batch.items]

    @property
    def closed(self) -> bool:
        return self.paused or self.quiet == "now"

    def next(self) -> int:
        self.serial += 1
        return self.serial

    # sync

    def sync(self) -> None:
        for row in self.rows:
            if row.status == "queued" and not row.collected and row.item and self._is_unwanted(row, row.item):
                row.status, row.withdrawn = "failed", True
        for item in self.items:
            if item.status == "queued":
                self._bring_home(item)
            elif item.status == "pending" and item.claimed:
                self._adopt(item)
            if item.status == "pending" and not item.batch.is_sending:
                item.claimed = 0
        self._complete(self.batches)

    def _complete(self, candidates: list[Batch]) -> None:
        for batch in candidates:
            if batch.is_sending and batch.items and not any(i.status in ("pending", "queued") for i in batch.items):
                batch.status = "sent"

    def _is_unwanted(self, row: Row, item: Item) -> bool:
        over = not item.batch.is_sending or item.status not in ("pending", "queued")
        return self.closed or row.expired or over

    def _bring_home(self, item: Item) -> None:
        row = item.row
        if row is None or row not in self.rows:
            self._end(item, "failed")
        elif row.withdrawn:
            item.status, item.row, item.device = "pending", None, None
        elif row.status != "queued":
            self._end(item, row.status, row)

    def _adopt(self, item: Item) -> None:
        """The enqueue of a claimed item had no response: its newest row says what became of it."""
        rows = [row for row in item.attempts if row in self.rows and not row.withdrawn and self._is_of_claim(row, item)]
        if not rows:
            return
        item.row = rows[-1]
        if rows[-1].status == "queued":
            item.status, item.claimed = "queued", 0
        else:
            self._end(item, rows[-1].status, rows[-1])

    def _is_of_claim(self, row: Row, item: Item) -> bool:
        """Whether the row is no earlier try, which failed and is retried."""
        return row.status != "failed" or row.made > item.claimed

    def _end(self, item: Item, status: str, row: Row | None = None) -> None:
        item.status, item.claimed = status, 0
        if row and status == "sent":
            item.sent, item.device = (row.sent_at, self.next()), row.device

    # dispatch

    def dispatch(self, outcome: str) -> None:
        for item in self.items:
            if item.status == "pending" and item.claimed:
                self._adopt(item)
        if self.closed:
            return
        claimed = self._claimed()
        if not claimed:
            self._claim()
        for item in self._claimed():
            if not self._deliver(item, outcome):
                return  # an outage stops the tick
        # While an earlier tick's claims go first, no other batch is looked at.
        self._complete([item.batch for item in claimed] or self.batches)

    def _claimed(self) -> list[Item]:
        found = [item for item in self.items if item.status == "pending" and item.claimed and item.batch.is_sending]
        return sorted(found, key=lambda item: item.claimed)

    def room(self) -> int | None:
        """Places that the limits leave."""
        flying = sum(item.flies for item in self.items)
        windows = {"max_per_minute": MINUTE, "max_per_day": DAY}
        sent = [item.sent[0] for item in self.items if item.status == "sent"]
        left = [
            most - flying - sum(self.minute - at < windows[name] for at in sent)
            for name, most in self.limits.items()
            if most is not None
        ]
        return max(min(left), 0) if left else None

    def _claim(self) -> None:
        turns = [batch for batch in self.batches if batch.is_sending and self._may_have_a_turn(batch)]
        turns.sort(key=lambda batch: batch.served)  # the sort keeps the older batch first
        while turns and self.room() != 0:
            places = self.room()
            served, turns = turns[:places], turns[places:] if places else []
            number = self.next()
            for batch in served:
                batch.served = number
                self._claim_of(batch, number)

    def _may_have_a_turn(self, batch: Batch) -> bool:
        if not any(item.status == "pending" for item in batch.items):
            return False
        if not self.gap:
            return True
        recent = any(item.status == "sent" and item.sent[0] == self.minute for item in batch.items)
        return not recent and not any(item.flies for item in batch.items)

    def _claim_of(self, batch: Batch, number: int) -> None:
        for item in batch.items:
            if item.status == "pending" and self.handles[item.client]:
                item.claimed = number
                return
            if item.status == "pending":
                item.status = "skipped"

    def _deliver(self, item: Item, outcome: str) -> bool:
        handle, device = self.handles[item.client], self._device_of(item)
        if handle is None:
            self._end(item, "skipped")
        elif device is None:
            self._end(item, "failed")
        elif outcome == "down":
            return False
        else:
            row = item.live_row or self.put(item, device, (handle, "Hello!"))
            if outcome == "lost":
                return False
            item.status, item.claimed, item.row, item.device = "queued", 0, row, device
        return True

    def put(self, item: Item | None, device: str, content: tuple[str, str]) -> Row:
        row = Row(item, device, content, self.next(), timed=self.quiet is not None and item is not None)
        if item:
            item.attempts.append(row)
        self.rows.append(row)
        return row

    def _device_of(self, item: Item) -> str | None:
        reached = [other for other in self.items if other.client == item.client and other.status == "sent"]
        last = max(reached, key=lambda other: other.sent, default=None)
        choices = [device for device in self.devices if device in self.seen] or self.devices
        wishes = (last and last.device, self.chosen, *choices[:1])
        return next((device for device in wishes if device in choices), None)

    # devices

    def poll(self, device: str) -> list[Row]:
        self.seen.add(device)
        found = [
            row for row in self.rows
            if row.device == device and row.status == "queued" and (row.collected or not row.expired)
        ]  # fmt: skip
        for row in found:
            row.collected = True
        return found


# --- the machine --------------------------------------------------------------------------------------


ACTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {}  # what an owner may do, with what it takes


def owner(**strategies: st.SearchStrategy[Any]) -> Callable[[Act], Act]:
    """Makes a method one of the owner's acts: each by itself is rare beside the jobs' and the devices' work."""

    def register(act: Act) -> Act:
        ACTS[act.__name__] = strategies
        return act

    return register


class Machine(RuleBasedStateMachine):
    """Does each step to both, and compares."""

    def __init__(self, world: TestData) -> None:
        super().__init__()
        self.world = world
        self.model = Model()
        self.tokens: dict[str, str] = {}
        self.database = db.RetryingConnection(world.databases.icloud_url)
        self.wire = Wire(send_queue_server.make_app(self.database, SERVICE_TOKEN))
        self.http = requests.Session()
        self.http.mount(BASE_URL, self.wire)
        self.mac_sync = dispatcher.SendQueueClient(BASE_URL, SERVICE_TOKEN)
        self.mac_sync.session.mount(BASE_URL, self.wire)

    @initialize()
    def empty(self) -> None:
        for table in ("outreach_batch_items", "outreach_batches", "contact_relationships", "clients"):
            self.world.quinn(f"DELETE FROM {table}")
        for table in ("send_queue", "devices"):
            self.world.icloud(f"DELETE FROM icloud.{table}")
        self.world.settings(paused=False, quiet_hours_start=None, quiet_hours_end=None, quiet_hours_tz="UTC")
        self.world.settings(max_per_minute=None, max_per_day=None, min_gap_seconds=None, device_id=None)
        self.device()
        for _ in range(2):
            self.batch("sending", False, [True, True, True])

    # what an owner does

    @rule(act=st.deferred(lambda: st.sampled_from(sorted(ACTS))), data=st.data())
    def the_owner_acts(self, act: str, data: st.DataObject) -> None:
        getattr(self, act)(**{name: data.draw(strategy, name) for name, strategy in ACTS[act].items()})

    @owner()
    def device(self) -> None:
        device = self.world.device(token := f"token-{self.model.next()}")
        self.tokens[device] = token
        self.model.devices.append(device)

    @owner(
        status=st.sampled_from(["draft", "sending", "sending", "sending"]),
        dry_run=st.sampled_from([False, False, False, True]),
        reachable=st.lists(st.sampled_from([True, True, False]), max_size=4),
    )
    def batch(self, status: str, dry_run: bool, reachable: list[bool]) -> None:
        batch = Batch(self.world.batch(status=status, dry_run=dry_run), status, dry_run)
        self.model.batches.append(batch)
        for has_handle in reachable:
            client = self.world.client("+14155550123" if has_handle else None)
            self.model.handles[client] = "+14155550123" if has_handle else None
            batch.items.append(Item(self.world.item(batch.id, client), batch, client))

    @owner(which=PICK, who=PICK)
    def one_more_item(self, which: int, who: int) -> None:
        if not (self.model.batches and self.model.handles):
            return
        batch = self.model.batches[which % len(self.model.batches)]
        clients = list(self.model.handles)
        client = clients[who % len(clients)]
        batch.items.append(Item(self.world.item(batch.id, client), batch, client))

    @owner(which=PICK, status=st.sampled_from(["sending", "sending", "paused", "cancelled"]))
    def a_batch_is_moved(self, which: int, status: str) -> None:
        if not self.model.batches:
            return
        batch = self.model.batches[which % len(self.model.batches)]
        batch.status = status
        self.world.quinn("UPDATE outreach_batches SET status = %(s)s WHERE id = %(id)s", s=status, id=batch.id)

    @owner(who=PICK, handle=st.sampled_from([None, "+14155550123", "a@example.com"]))
    def a_handle_is_edited(self, who: int, handle: str | None) -> None:
        if not self.model.handles:
            return
        clients = list(self.model.handles)
        client = clients[who % len(clients)]
        self.model.handles[client] = handle
        self.world.quinn("DELETE FROM contact_relationships WHERE client_id = %(id)s", id=client)
        if handle:
            self.world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, %(h)s, true)", id=client, h=handle)

    @rule(paused=st.sampled_from([False, False, False, True]))
    def sending_is_paused_or_goes_on(self, paused: bool) -> None:
        self.model.paused = paused
        self.world.settings(paused=paused)

    @rule(when=st.sampled_from([None, "later", "later", "now"]))
    def quiet_hours_are_set(self, when: str | None) -> None:
        self.model.quiet = when
        hour = timedelta(hours=1)
        first, last = {None: (None, None), "now": (-hour, 2 * hour), "later": (3 * hour, 6 * hour)}[when]
        now = datetime.now(UTC)
        times = [None if delta is None else f"{now + delta:%H:%M}" for delta in (first, last)]
        self.world.settings(quiet_hours_start=times[0], quiet_hours_end=times[1])

    @owner(minute=LIMITS, day=LIMITS, gap=st.sampled_from([None, 0, 30]))
    def limits_are_set(self, minute: int | None, day: int | None, gap: int | None) -> None:
        self.model.limits = {"max_per_minute": minute, "max_per_day": day}
        self.model.gap = gap
        self.world.settings(max_per_minute=minute, max_per_day=day, min_gap_seconds=gap)

    @owner(which=PICK)
    def a_device_is_chosen(self, which: int) -> None:
        if not self.model.devices:
            return
        self.model.chosen = self.model.devices[which % len(self.model.devices)]
        self.world.settings(device_id=self.model.chosen)

    @owner(which=PICK)
    def a_device_is_deleted(self, which: int) -> None:
        if len(self.model.devices) == 1:
            return
        device = self.model.devices.pop(which % len(self.model.devices))
        gone = [row for row in self.model.rows if row.device == device]
        self.model.rows = [row for row in self.model.rows if row.device != device]
        for item in self.model.items:
            item.attempts = [row for row in item.attempts if row not in gone]
        self.world.icloud("DELETE FROM icloud.devices WHERE id = %(id)s", id=device)

    @owner(which=PICK)
    def the_failed_are_retried(self, which: int) -> None:
        if not self.model.batches:
            return
        batch = self.model.batches[which % len(self.model.batches)]
        if batch.status == "sent":
            batch.status = "sending"
        for item in batch.items:
            if item.status == "failed":
                item.status, item.row, item.device = "pending", None, None
        assert dispatcher.run_retry(batch.id) == 0

    # what time does

    @rule()
    def a_minute_passes(self) -> None:
        self.model.minute += MINUTE
        for part, table in ((self.world.quinn, "outreach_batch_items"), (self.world.icloud, "icloud.send_queue")):
            part(f"UPDATE {table} SET sent_at = sent_at - interval '1 minute'")

    @rule()
    def the_night_comes_for_what_waits(self) -> None:
        for row in self.model.rows:
            row.expired = row.expired or (row.timed and row.status == "queued")
        self.world.icloud("UPDATE icloud.send_queue SET valid_until = now() WHERE valid_until IS NOT NULL")

    # the jobs

    @rule()
    def sync(self) -> None:
        self.model.sync()
        dispatcher.sync(self.world.databases.quinn, self.world.databases.icloud)

    @rule()
    def cycle(self) -> None:
        self.sync()
        self.dispatch("ok")

    @rule(outcome=st.sampled_from(["lost", "lost", "down"]))
    def cycle_with_outage(self, outcome: str) -> None:
        self.sync()
        self.dispatch(outcome)

    @rule()
    def dispatch_after_a_sync_that_failed(self) -> None:
        self.dispatch("ok")

    def dispatch(self, outcome: str) -> None:
        self.model.dispatch(outcome)
        self.wire.outcome = outcome
        try:
            dispatcher.dispatch(self.world.databases.quinn, self.world.databases.icloud, self.mac_sync)
        except dispatcher.ServerUnavailable:
            assert outcome != "ok"
        self.wire.outcome = "ok"
        self.learn_ids()

    def learn_ids(self) -> None:
        """The ids that the queue gave to the rows that the model has made."""
        known = {row.id for row in self.model.rows}
        for row_id, item_id in self.world.icloud("SELECT id, batch_item_id FROM icloud.send_queue"):
            if row_id not in known:
                new = [row for row in self.model.rows if not row.id and row.item and row.item.id == item_id]
                assert len(new) == 1, f"item {item_id} has a row that it should not have"
                new[0].id = row_id

    # what comes over HTTP

    @precondition(lambda self: self.model.devices)
    @rule(which=PICK)
    def poll(self, which: int) -> None:
        device = self.model.devices[which % len(self.model.devices)]
        response = self.ask("GET", "client/imessage/send-queue/pending", self.tokens[device])
        assert response.status_code == 200
        expected = [(row.id, *row.content) for row in self.model.poll(device)]
        items = [(item["id"], item["toHandle"], item["body"]) for item in response.json()["data"]["items"]]
        assert sorted(items) == sorted(expected)

    @precondition(lambda self: self.model.rows and self.model.devices)
    @rule(
        which=PICK,
        who=PICK,
        status=st.sampled_from(["sent", "sent", "failed"]),
        own=st.sampled_from([True] * 4 + [False]),
    )
    def result(self, which: int, who: int, status: str, own: bool) -> None:
        collected = [row for row in self.model.rows if row.collected] or self.model.rows
        row = collected[which % len(collected)]
        device = row.device if own else self.model.devices[who % len(self.model.devices)]
        self.report(row, device, status)

    def report(self, row: Row, device: str, status: str) -> None:
        path = f"client/imessage/send-queue/{row.id}/result"
        response = self.ask("POST", path, self.tokens[device], {"status": status})
        assert response.status_code == self.expected_of(row, device, status)
        if row.status == "queued" and row.device == device:
            row.status = status
            row.sent_at = self.model.minute if status == "sent" else 0

    def expected_of(self, row: Row, device: str, status: str) -> int:
        if row.device != device:
            return 404
        return 200 if row.status in ("queued", status) else 409

    @precondition(lambda self: self.model.devices)
    @rule(again=st.booleans(), other=st.booleans(), which=PICK)
    def enqueue_by_hand(self, again: bool, other: bool, which: int) -> None:
        """A row of no item; or an item's message once more, the same or with other words."""
        items = [item for item in self.model.items if item.live_row] if again else []
        row = items[which % len(items)].live_row if items else None
        device = row.device if row else self.model.devices[which % len(self.model.devices)]
        handle, body = row.content if row else ("b@example.com", "By hand")
        message = {
            "batchItemId": row.item.id if row and row.item else f"00000000-0000-0000-0000-{self.model.next():012}",
            "deviceId": device, "toHandle": handle, "body": "Something else" if other else body,
        }  # fmt: skip
        response = self.ask("POST", "admin/send-queue/enqueue", SERVICE_TOKEN, message)
        assert response.status_code == (409 if row and other else 200)
        queue_id = response.json()["data"]["sendQueueId"]
        if row:
            assert queue_id == row.id
        else:
            self.model.put(None, device, (handle, message["body"])).id = queue_id

    def ask(self, method: str, path: str, token: str, body: Any = None) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return self.http.request(method, f"{BASE_URL}/{path}", data=json.dumps(body) if body else None, headers=headers)

    # what must be the same

    @invariant()
    def items_agree(self) -> None:
        sql = "SELECT id, status, claimed_at IS NOT NULL, send_queue_id FROM outreach_batch_items"
        real = {row[0]: row[1:] for row in self.world.quinn(sql)}
        for item in self.model.items:
            claimed = item.status == "pending" and bool(item.claimed)
            assert real[item.id][:2] == (item.status, claimed), item.batch.status
            if item.status == "queued" and item.row:
                assert real[item.id][2] == item.row.id

    @invariant()
    def rows_agree(self) -> None:
        sql = "SELECT id, device_id, status, collected_at IS NOT NULL, withdrawn_at IS NOT NULL FROM icloud.send_queue"
        expected = [(row.id, row.device, row.status, row.collected, row.withdrawn) for row in self.model.rows]
        assert sorted(self.world.icloud(sql)) == sorted(expected)

    @invariant()
    def batches_agree(self) -> None:
        real: dict[str, str] = dict(self.world.quinn("SELECT id, status FROM outreach_batches"))
        assert real == {batch.id: batch.status for batch in self.model.batches}

    def teardown(self) -> None:
        self.http.close()
        self.mac_sync.session.close()
        if self.database.conn:  # hundreds of machines would take all connections
            self.database.conn.close()


def play(world: TestData, examples: int, steps: int) -> None:
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Machine(world), settings=profile)  # type: ignore[arg-type]  # it takes a factory too


def test_jobs_and_handlers_match_model(world: TestData) -> None:
    play(world, examples=25, steps=25)


@pytest.mark.faults
def test_jobs_and_handlers_match_model_for_long(world: TestData) -> None:
    play(world, examples=200, steps=50)
