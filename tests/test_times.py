"""A property: nothing of a composed batch is collected before send_from, after send_until or after its approval ended.

hypothesis draws batches, and what happens minute by minute: a tick, a tick without a server, a poll, a pause, a longer
outage. The jobs, the server and the SQL are the real ones; a minute passes by moving all stored times into the past.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testing import DeviceClient, TestData

import batches
import dispatcher

MINUTE = timedelta(minutes=1)
MINUTES = 14  # of a story
# One minute passes.
MOVE = {
    "quinn": (
        "UPDATE outreach_batch_items SET sent_at = sent_at - {0}, claimed_at = claimed_at - {0},"
        " queued_at = queued_at - {0}, outcome_unknown_at = outcome_unknown_at - {0}",
        "UPDATE outreach_batches SET send_from = send_from - {0}, send_until = send_until - {0},"
        " approved_at = approved_at - {0}, resumed_at = resumed_at - {0}",
    ),
    "icloud": (
        "UPDATE icloud.send_queue SET sent_at = sent_at - {0}, collected_at = collected_at - {0},"
        " valid_until = valid_until - {0}",
    ),
}
# What happens in a minute: often, the device polls and no tick has gone before.
EVENTS = st.sampled_from(
    [["tick"], ["tick", "poll"], ["poll"], ["poll", "tick"], ["only dispatch"], ["only dispatch", "poll"], ["outage"],
     ["pause"], ["resume", "tick"], []]
)  # fmt: skip


@dataclass
class Plan:
    """A batch, in minutes from the beginning. `lapses`: when its approval ends."""

    begins: int | None
    ends: int | None
    lapses: int
    first_n: int | None
    people: int

    def may_send_at(self, minute: int) -> bool:
        begins, ends = self.begins or 0, MINUTES if self.ends is None else self.ends
        return begins <= minute < min(ends, self.lapses)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    begins = draw(st.none() | st.integers(-2, 6))
    ends = draw(st.none() | st.integers(max(begins or 0, 0) + 1, 9))
    return Plan(begins, ends, draw(st.integers(1, 12)), draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 4)))


class Story:
    """Run one example over the real databases, server and jobs."""

    def __init__(self, world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient) -> None:
        self.world, self.mini, self.mac_sync = world, mini, mac_sync
        self.minute = 0
        self.plans: dict[str, Plan] = {}
        self.collected: list[tuple[str, int]] = []

    def add(self, plan: Plan) -> None:
        # Half a minute: a moment of the plan is never in doubt because of the time that the statements take.
        start = datetime.now(UTC) - MINUTE / 2
        moments = [None if at is None else start + at * MINUTE for at in (plan.begins, plan.ends)]
        approved_at = start + plan.lapses * MINUTE - timedelta(days=7)
        batch_id = self.world.batch(
            clients=plan.people,
            digest="d",
            approved_at=approved_at,
            send_from=moments[0],
            send_until=moments[1],
            first_n=plan.first_n,
        )
        self.plans[batch_id] = plan

    def pass_minute(self) -> None:
        self.minute += 1
        for query, statements in ((self.world.quinn, MOVE["quinn"]), (self.world.icloud, MOVE["icloud"])):
            for statement in statements:
                query(statement.format("interval '1 minute'"))

    def happen(self, event: str) -> None:
        quinn, icloud = self.world.databases.quinn, self.world.databases.icloud
        if event == "tick":
            dispatcher.sync(quinn, icloud)
        if event in ("tick", "only dispatch"):
            dispatcher.dispatch(quinn, icloud, self.mac_sync)
        elif event == "outage":
            with no_server() as nobody, contextlib.suppress(dispatcher.ServerUnavailable):
                dispatcher.dispatch(quinn, icloud, nobody)
        elif event == "poll":
            self.poll()
        elif event in ("pause", "resume"):
            for batch_id in self.plans:
                with contextlib.suppress(batches.Refused):
                    batches.pause(quinn, icloud, batch_id) if event == "pause" else batches.resume(quinn, batch_id)

    def poll(self) -> None:
        batch_of = "SELECT batch_id FROM outreach_batch_items WHERE id = %(id)s"
        item_of = "SELECT batch_item_id FROM icloud.send_queue WHERE id = %(id)s"
        for row in self.mini.poll():
            [(item_id,)] = self.world.icloud(item_of, id=row["id"])
            self.collected.append((self.world.quinn(batch_of, id=item_id)[0][0], self.minute))
            self.mini.result(row["id"], "sent")


@contextlib.contextmanager
def no_server() -> Iterator[dispatcher.SendQueueClient]:
    client = dispatcher.SendQueueClient("http://127.0.0.1:1", "service-token-of-16")
    with client.session:
        yield client


def begin(world: TestData) -> None:
    """Empty the tables: hypothesis runs all its examples in one test."""
    for table in ("outreach_batch_items", "outreach_batches", "contact_relationships", "clients"):
        world.quinn(f"DELETE FROM {table}")
    world.icloud("DELETE FROM icloud.send_queue")


def test_nothing_is_collected_outside_the_times_of_its_batch(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    ended: set[str] = set()

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(st.lists(plans(), min_size=1, max_size=3), st.lists(EVENTS, min_size=MINUTES, max_size=MINUTES))
    def check(some: list[Plan], minutes: list[list[str]]) -> None:
        begin(world)
        story = Story(world, mini, mac_sync)
        for plan in some:
            story.add(plan)
        for events in minutes:
            for event in events:
                story.happen(event)
            story.pass_minute()
        early_or_late = [
            (story.plans[batch_id], minute)
            for batch_id, minute in story.collected
            if not story.plans[batch_id].may_send_at(minute)
        ]
        assert not early_or_late
        ended.update(row[0] for row in world.quinn("SELECT failure_reason FROM outreach_batch_items"))
        ended.update(row[0] for row in world.quinn("SELECT pause_reason FROM outreach_batches"))
        ended.update("collected" for _ in story.collected)

    check()
    assert {"collected", batches.PAST_ITS_TIME, batches.LAPSED} <= ended


def test_each_batch_ends_with_a_reason_for_each_person(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    @given(st.lists(plans(), min_size=1, max_size=3))
    def check(some: list[Plan]) -> None:
        begin(world)
        story = Story(world, mini, mac_sync)
        for plan in some:
            story.add(plan)
        for _ in range(MINUTES):
            story.happen("tick")
            story.happen("poll")
            story.pass_minute()
        story.happen("tick")
        for batch_id, plan in story.plans.items():
            check_end(world, batch_id, plan, story)

    check()


def check_end(world: TestData, batch_id: str, plan: Plan, story: Story) -> None:
    """Compare with the rules in plain Python: one message a minute, which is sent in the same minute."""
    status, reason, pending, sent, skipped = "sending", None, plan.people, 0, 0
    for minute in range(MINUTES + 1):
        if status == "sending" and plan.ends is not None and minute >= plan.ends:
            pending, skipped = 0, pending
        if status == "sending" and not pending:
            status = "sent"
        if status != "sent" and minute >= plan.lapses:
            status, reason = "paused", batches.LAPSED
        elif status == "sending" and plan.first_n and sent >= plan.first_n:
            status = "paused"
        if status == "sending" and plan.may_send_at(minute):
            pending, sent = pending - 1, sent + 1
    [found] = world.quinn("SELECT status, pause_reason FROM outreach_batches WHERE id = %(id)s", id=batch_id)
    assert found == (status, reason)
    expected = ["pending"] * pending + ["sent"] * sent + ["skipped"] * skipped
    assert sorted(world.statuses(batch_id)) == expected
    assert sum(name == batch_id for name, _ in story.collected) == sent
