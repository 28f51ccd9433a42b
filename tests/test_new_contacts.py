"""Check the limits on new contacts and on messages to one client: known clients go on, new ones wait for a place."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from helpers import ago
from testing import DeviceClient, TestData

import batches
import dispatcher
import report

INTERVAL = timedelta(seconds=30)
Tick = Callable[[], dispatcher.JobCounts]


@pytest.fixture
def tick(world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str) -> Tick:
    """Run both jobs once; return what dispatch did."""

    def run() -> dispatcher.JobCounts:
        quinn, icloud = world.databases.quinn, world.databases.icloud
        dispatcher.sync(quinn, icloud)
        return dispatcher.dispatch(quinn, icloud, mac_sync)

    return run


def known(world: TestData, handle: str = "+14155550123", when: datetime | None = None) -> str:
    """Insert a client who was written to; return its id."""
    client_id = world.client(handle)
    world.item(world.batch(status="sent"), client_id, status="sent", sent_at=when or ago(days=30))
    return client_id


def send_all(world: TestData) -> None:
    world.icloud("UPDATE icloud.send_queue SET collected_at = now() WHERE status = 'queued'")
    world.icloud("UPDATE icloud.send_queue SET status = 'sent', sent_at = now() WHERE status = 'queued'")


def running(world: TestData) -> None:
    world.settings(last_tick_at=ago(1), last_synced_at=ago(1), last_dispatched_at=ago(1))


@pytest.mark.parametrize("window", ["hour", "day"])
def test_known_clients_go_on_while_new_ones_wait(world: TestData, tick: Tick, window: str) -> None:
    world.settings(**{f"max_new_contacts_per_{window}": 1})
    batch_id = world.batch(clients=[world.client(), world.client(), world.client(), known(world), known(world)])
    for _ in range(4):
        tick()
        send_all(world)
    assert world.statuses(batch_id) == ["sent", "pending", "pending", "sent", "sent"]
    age = {"hour": timedelta(minutes=61), "day": timedelta(hours=25)}[window]
    world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - %(age)s", age=age)
    assert tick()["queued"] == 1
    assert world.statuses(batch_id) == ["sent", "queued", "pending", "sent", "sent"]


def test_one_tick_writes_to_no_more_new_contacts_than_allowed(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_day=1)
    mixed = [world.batch(clients=[world.client(), world.client(), known(world)]) for _ in range(3)]
    only_new = world.batch(clients=[world.client()])
    assert tick()["queued"] == 3
    assert sorted(world.statuses(batch_id) for batch_id in mixed) == [
        ["pending", "pending", "queued"], ["pending", "pending", "queued"], ["queued", "pending", "pending"],
    ]  # fmt: skip
    assert world.statuses(only_new) == ["pending"]


def test_new_contact_in_flight_counts(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_hour=1)
    world.batch(clients=[world.client(), world.client()])
    assert tick()["queued"] == 1
    assert tick()["queued"] == 0
    running(world)
    world.icloud("UPDATE icloud.devices SET last_seen_at = now()")
    verdict = report.report(INTERVAL).verdict
    assert verdict.sentence.startswith("Held: waiting for device 'mac-mini', last seen ")
    assert not verdict.needs_operator


def test_message_of_unknown_outcome_counts_as_a_new_contact(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_hour=1)
    world.batch(clients=[world.client(), world.client()])
    tick()
    world.icloud("UPDATE icloud.send_queue SET status = 'failed', outcome = 'unknown', updated_at = now()")
    assert tick()["queued"] == 0
    assert sorted(world.statuses()) == ["failed", "pending"]


def test_message_that_was_not_started_makes_nobody_known(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_hour=1)
    world.batch(clients=[world.client()])
    tick()
    world.icloud("UPDATE icloud.send_queue SET status = 'failed', outcome = 'not_started', collected_at = now()")
    assert tick()["queued"] == 1
    assert world.quinn("SELECT new_contact FROM outreach_batch_items") == [(True,)]


def test_client_is_known_once_a_message_was_sent(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_day=1)
    client_id = world.client()
    world.batch(clients=[client_id])
    other = world.batch(clients=[world.client(), client_id])
    assert tick()["queued"] == 1
    send_all(world)
    assert tick()["queued"] == 1
    assert world.statuses(other) == ["pending", "queued"]
    sql = "SELECT new_contact FROM outreach_batch_items WHERE batch_id = %(id)s ORDER BY created_at, id"
    assert world.quinn(sql, id=other) == [(True,), (False,)]


def test_who_was_taken_for_known_and_is_new_waits_and_holds_up_nobody(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_day=0)
    batch_id = world.batch(clients=[world.client(), known(world)])
    world.quinn("UPDATE outreach_batch_items SET time_zones = '{}', new_contact = false WHERE status = 'pending'")
    assert tick()["queued"] == 1
    assert world.statuses(batch_id) == ["pending", "queued"]


def test_verdict_names_the_limit_and_the_next_place(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_hour=1)
    world.batch(clients=[world.client(), world.client(), world.client()])
    tick()
    send_all(world)
    tick()
    running(world)
    seen = report.report(INTERVAL)
    [(sent_at,)] = world.quinn("SELECT sent_at FROM outreach_batch_items WHERE status = 'sent'")
    until = seen.verdict.until
    assert until
    assert abs(until - sent_at - timedelta(hours=1)) < timedelta(minutes=1)
    assert seen.verdict.sentence.startswith(
        "Held: max_new_contacts_per_hour reached, 1 of 1, and 2 remaining messages go to new contacts; next place at "
    )
    limits = {line.limit: (line.used, line.maximum) for line in seen.limits or []}
    assert limits["max_new_contacts_per_hour"] == (1, 1)


def test_verdict_of_a_limit_of_zero_needs_its_operator(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_day=0)
    world.batch(clients=[world.client()])
    assert tick()["queued"] == 0
    running(world)
    verdict = report.report(INTERVAL).verdict
    assert verdict.sentence == "Held: max_new_contacts_per_day is 0, and the remaining message goes to new contacts."
    assert verdict.needs_operator


def test_client_gets_no_more_messages_in_a_week_than_allowed(world: TestData, tick: Tick) -> None:
    world.settings(max_per_client_per_week=2)
    client_id = known(world, when=ago(days=3))
    batches = [world.batch(clients=[client_id]) for _ in range(3)]
    assert tick()["queued"] == 1
    send_all(world)
    tick()
    states = [status for batch_id in batches for status in world.statuses(batch_id)]
    assert sorted(states) == ["sent", "skipped", "skipped"]
    reasons = world.quinn("SELECT DISTINCT failure_reason FROM outreach_batch_items WHERE status = 'skipped'")
    assert reasons == [("got 2 messages in the last 7 days, as many as max_per_client_per_week allows",)]


def test_message_of_more_than_a_week_ago_does_not_count(world: TestData, tick: Tick) -> None:
    world.settings(max_per_client_per_week=1)
    world.batch(clients=[known(world, when=datetime.now(UTC) - timedelta(days=7, minutes=1))])
    assert tick()["queued"] == 1


def test_limits_on_new_contacts_hold_over_a_day_of_ticks(world: TestData, tick: Tick, mini: DeviceClient) -> None:
    """Twelve hours of ticks: in no hour more than 2 new contacts, and every known client is served before the end."""
    world.settings(max_new_contacts_per_hour=2, max_new_contacts_per_day=7)
    people = [known(world) if number % 3 == 0 else world.client() for number in range(30)]
    for number in range(3):
        world.batch(clients=people[number::3] if number else people[0::3])
    sent: list[tuple[datetime, bool]] = []
    moved = timedelta(0)
    for _ in range(24):
        tick()
        send_all(world)
        tick()
        age = timedelta(minutes=30)
        world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - %(age)s", age=age)
        moved += age
    sql = "SELECT sent_at, new_contact FROM outreach_batch_items WHERE status = 'sent' AND new_contact ORDER BY sent_at"
    sent = [(at, is_new) for at, is_new in world.quinn(sql)]
    for at, _ in sent:
        assert sum(at <= other < at + timedelta(minutes=59) for other, _ in sent) <= 2
    assert len(sent) == 7
    waiting = "SELECT count(*) FROM outreach_batch_items WHERE status = 'pending' AND NOT new_contact"
    assert world.quinn(waiting) == [(0,)]


def test_batches_with_only_new_contacts_take_turns_at_the_places(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_hour=1)
    older, newer = (world.batch(clients=[world.client() for _ in range(3)]) for _ in range(2))
    for _ in range(4):
        tick()
        send_all(world)
        tick()
        world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - interval '61 minutes'")
    assert world.statuses(older).count("sent") == 2
    assert world.statuses(newer).count("sent") == 2


def test_retried_client_who_was_written_to_meanwhile_does_not_wait_for_a_place(world: TestData, tick: Tick) -> None:
    world.settings(max_new_contacts_per_hour=0)
    client_id = known(world)
    batch_id = world.batch(clients=[client_id])
    sql = (
        "UPDATE outreach_batch_items SET status = 'failed', failure_reason = 'x', new_contact = true, time_zones = '{}'"
    )
    world.quinn(sql + " WHERE batch_id = %(id)s", id=batch_id)
    batches.retry(world.databases.quinn, batch_id)
    assert tick()["queued"] == 1


def test_client_over_the_weekly_limit_costs_the_batch_no_turn(world: TestData, tick: Tick) -> None:
    world.settings(max_per_client_per_week=1)
    batch_id = world.batch(clients=[known(world, when=ago(days=3)), world.client()])
    assert tick()["queued"] == 1
    assert world.statuses(batch_id) == ["skipped", "queued"]
