"""Check that nothing goes in a recipient's night, and that nobody waits for somebody who sleeps."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import ago, record_statements, zone_at
from testing import TestData

import db
import dispatcher
import pacing
import quiet_times
import recipient_zones
import report

INTERVAL = timedelta(seconds=30)
Tick = Callable[[], dispatcher.JobCounts]


@pytest.fixture
def tick(world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str) -> Tick:
    """Run both jobs once; return what dispatch did. Quiet hours are those of the recipient, from 21:00 to 8:00."""
    world.settings(quiet_hours_of="recipient", quiet_hours_start="21:00", quiet_hours_end="08:00", quiet_hours_tz="UTC")

    def run() -> dispatcher.JobCounts:
        quinn, icloud = world.databases.quinn, world.databases.icloud
        dispatcher.sync(quinn, icloud)
        return dispatcher.dispatch(quinn, icloud, mac_sync)

    return run


def person(world: TestData, time_zone: str | None, *handles: str) -> str:
    client_id = world.client(handles[0] if handles else "+14155550123")
    world.quinn("UPDATE clients SET time_zone = %(zone)s WHERE id = %(id)s", zone=time_zone, id=client_id)
    for handle in handles[1:]:
        world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, %(handle)s)", id=client_id, handle=handle)
    return client_id


def places(world: TestData) -> list[Any]:
    return world.quinn("SELECT status, time_zones, new_contact FROM outreach_batch_items ORDER BY created_at, id")


def test_who_is_awake_does_not_wait_for_who_sleeps(world: TestData, tick: Tick) -> None:
    asleep, awake = zone_at(2), zone_at(12)
    world.batch(clients=[person(world, zone) for zone in (asleep, asleep, awake, asleep, awake)])
    assert tick()["queued"] == 1
    assert [status for status, _, _ in places(world)] == ["pending", "pending", "queued", "pending", "pending"]
    assert tick()["queued"] == 1
    assert tick()["queued"] == 0
    assert [status for status, _, _ in places(world)] == ["pending", "pending", "queued", "pending", "queued"]


def test_item_by_hand_is_looked_up_at_first_sight(world: TestData, tick: Tick) -> None:
    people = [
        person(world, "Europe/Berlin", "+14155550123"), person(world, "Mars/Base", "+12125550123"),
        person(world, None, "+18502341234"), person(world, None, "jane@example.com"),
        person(world, None, "jane@example.com", "+12125550199"), person(world, None, "+18005550199"),
        world.client(None),
    ]  # fmt: skip
    world.batch(clients=people)
    assert [zones for _, zones, _ in places(world)] == [None] * 7
    tick()
    assert [zones for _, zones, _ in places(world)] == [
        ["Europe/Berlin"], ["America/New_York"], ["America/Chicago", "America/New_York"], [], ["America/New_York"],
        [], [],
    ]  # fmt: skip
    assert {is_new for _, _, is_new in places(world)} == {True}


def test_where_nothing_says_where_the_sender_counts(world: TestData, tick: Tick) -> None:
    world.batch(clients=[person(world, None, "jane@example.com")])
    world.settings(quiet_hours_tz=zone_at(2))
    assert tick()["queued"] == 0
    world.settings(quiet_hours_tz=zone_at(12))
    assert tick()["queued"] == 1


@pytest.mark.parametrize(("of", "queued"), [("sender", [0, 1]), ("recipient", [1, 0]), ("both", [0, 0])])
def test_whose_night_counts(world: TestData, tick: Tick, of: str, queued: list[int]) -> None:
    world.settings(quiet_hours_of=of)
    day, night = zone_at(12), zone_at(2)
    found = []
    for sender, recipient in ((night, day), (day, night)):
        world.settings(quiet_hours_tz=sender)
        world.batch(clients=[person(world, recipient)])
        found.append(tick()["queued"])
        world.quinn("UPDATE outreach_batches SET status = 'cancelled'")
    assert found == queued


def test_message_is_valid_until_two_minutes_before_it_is_quiet_in_any_zone(world: TestData, tick: Tick) -> None:
    world.settings(quiet_hours_start="20:00")
    client_id = person(world, None, "+18502341234")  # Florida's north: Chicago and New York
    world.batch(clients=[client_id])
    times = quiet_times.read("20:00", "08:00", "UTC", "recipient", None)
    here = ("America/Chicago", "America/New_York")
    opens_at = times.next_open(here, datetime.now(UTC))
    queued = tick()["queued"]
    if opens_at and opens_at > datetime.now(UTC):
        # It is night there now: a day in which this message may go is made by moving the hours.
        assert queued == 0
        now = datetime.now(UTC)
        start, end = now + timedelta(hours=9), now + timedelta(hours=11)
        zone = "America/New_York"
        hours = [f"{each.astimezone(quiet_times.zone_of(zone, UTC)):%H:%M}" for each in (start, end)]
        world.settings(quiet_hours_start=hours[0], quiet_hours_end=hours[1])
        times = quiet_times.read(*hours, "UTC", "recipient", None)
        queued = tick()["queued"]
    assert queued == 1
    [(valid_until,)] = world.icloud("SELECT valid_until FROM icloud.send_queue")
    quiet_from = times.next_quiet(here, datetime.now(UTC))
    assert quiet_from
    assert valid_until == quiet_from - timedelta(minutes=2)


def test_number_that_changed_counts_as_it_is_now(world: TestData, tick: Tick) -> None:
    client_id = person(world, zone_at(12))
    world.batch(clients=[client_id])
    world.quinn("UPDATE outreach_batch_items SET time_zones = %(zones)s, new_contact = true", zones=[zone_at(12)])
    world.quinn("UPDATE clients SET time_zone = %(zone)s", zone=zone_at(2))
    assert tick()["queued"] == 0
    assert places(world) == [("pending", [zone_at(2)], True)]
    assert world.quinn("SELECT claimed_at FROM outreach_batch_items") == [(None,)]


def test_claim_that_waited_into_the_night_is_given_up(world: TestData, tick: Tick) -> None:
    batch_id = world.batch(clients=[person(world, zone_at(2))])
    world.quinn("UPDATE outreach_batch_items SET claimed_at = now() - interval '2 hours'")
    assert tick()["queued"] == 0
    assert world.quinn("SELECT claimed_at FROM outreach_batch_items") == [(None,)]
    assert world.statuses(batch_id) == ["pending"]


def test_message_in_the_queue_is_taken_back_if_it_is_quiet_there_now(world: TestData, tick: Tick) -> None:
    world.settings(quiet_hours_of="sender", quiet_hours_tz=zone_at(12))
    world.batch(clients=[person(world, zone_at(2)), person(world, zone_at(12))])
    world.batch(clients=[person(world, zone_at(12))])
    assert tick()["queued"] == 2
    world.settings(quiet_hours_of="recipient")
    tick()
    [(reason,)] = world.icloud("SELECT failure_reason FROM icloud.send_queue WHERE withdrawn_at IS NOT NULL")
    assert reason == "withdrawn: it is quiet where its recipient is"
    assert [status for status, _, _ in places(world)] == ["pending", "queued", "queued"]


def test_quiet_day_holds_all_and_names_itself(world: TestData, tick: Tick) -> None:
    world.batch(clients=1)
    today = datetime.now(UTC)
    world.settings(
        quiet_hours_of="sender", quiet_hours_start=None, quiet_hours_end=None, quiet_days=f"{today:%Y-%m-%d}"
    )
    assert tick()["queued"] == 0
    running(world)
    sentence = report.report(INTERVAL).verdict.sentence
    if datetime.now(UTC).date() == today.date():
        assert sentence.startswith("Held: quiet day until "), sentence


def running(world: TestData) -> None:
    world.settings(last_tick_at=ago(1), last_synced_at=ago(1), last_dispatched_at=ago(1))


def test_verdict_says_for_how_many_it_is_quiet_and_who_is_next(world: TestData, tick: Tick) -> None:
    early, late = zone_at(5), zone_at(1)
    world.batch(clients=[person(world, zone) for zone in (early, late, late)])
    world.batch(clients=[person(world, zone) for zone in (early, late)])
    assert tick()["queued"] == 0
    running(world)
    verdict = report.report(INTERVAL).verdict
    opens = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=3)
    day = "" if opens.date() == datetime.now(UTC).date() else f"{opens:%a} "
    assert verdict.sentence == (
        f"Held: quiet where all 5 remaining recipients are; next at {day}{opens:%H:%M} for 2 of them."
    )
    assert not verdict.needs_operator
    assert verdict.hold == "quiet for recipients"


def test_batch_whose_recipients_sleep_says_so_beside_one_that_is_sent(world: TestData, tick: Tick) -> None:
    world.batch(clients=[person(world, zone_at(2))])
    awake = world.batch(clients=[person(world, zone_at(12)), person(world, zone_at(12))])
    tick()
    running(world)
    seen = report.report(INTERVAL)
    assert seen.verdict.sentence.startswith(f"Sending: next item of batch {awake[:8]}")
    holds = {batch.id == awake: batch.hold for batch in seen.batches or []}
    assert holds[True] is None
    assert (holds[False] or "").startswith("quiet where the remaining recipient is; next at ")


def test_recipient_without_any_hour_is_held_visibly(world: TestData, tick: Tick) -> None:
    names = [f"Etc/GMT{hours:+}" for hours in range(-12, 13, 3)]
    batch_id = world.batch(clients=1)
    zones = "UPDATE outreach_batch_items SET time_zones = %(zones)s, new_contact = true"
    world.quinn(zones, zones=sorted(names))
    other = world.batch(clients=[person(world, zone_at(12))])
    assert tick()["queued"] == 1
    assert (world.statuses(batch_id), world.statuses(other)) == (["pending"], ["queued"])
    world.quinn("UPDATE outreach_batches SET status = 'cancelled' WHERE id = %(id)s", id=other)
    running(world)
    verdict = report.report(INTERVAL).verdict
    assert verdict.sentence == (
        "Held: 1 remaining recipient: no hour is outside quiet hours in all time zones that count."
    )
    assert verdict.needs_operator
    assert verdict.advice == "Shorten quiet hours, or set quiet_hours_of to 'sender' or 'recipient'."


def test_sleeping_batches_cost_no_statement_each(world: TestData, tick: Tick, monkeypatch: pytest.MonkeyPatch) -> None:
    world.settings(max_per_minute=2)
    asleep, awake = person(world, zone_at(2)), person(world, zone_at(12))
    counts = []
    for batches in (3, 30):
        world.quinn("UPDATE outreach_batches SET status = 'cancelled'")
        world.quinn("DELETE FROM outreach_batch_items")
        world.icloud("DELETE FROM icloud.send_queue")
        for _ in range(batches):
            world.batch(clients=[asleep])
        world.batch(clients=[awake])
        with monkeypatch.context() as patch:
            statements = record_statements(patch)
            assert tick()["queued"] == 1
        counts.append(len(statements))
    assert counts[0] == counts[1]


def test_many_items_by_hand_are_looked_up_over_several_ticks_fairly(
    world: TestData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipient_zones, "MAX_LOOKED_UP", 10)
    for clients in (40, 1, 1):
        world.batch(clients=clients)
    assert recipient_zones.fill_in(world.databases.quinn) == 5  # a third of ten of the first batch, and the two others
    sql = "SELECT count(*) FROM outreach_batch_items WHERE time_zones IS NULL"
    assert world.quinn(sql) == [(37,)]
    for _ in range(4):
        recipient_zones.fill_in(world.databases.quinn)
    assert world.quinn(sql) == [(0,)]


def test_zones_without_quiet_hours_of_the_recipient_are_not_looked_up(world: TestData, tick: Tick) -> None:
    world.settings(quiet_hours_of="sender", quiet_hours_start=None, quiet_hours_end=None)
    world.batch(clients=2)
    tick()
    assert {zones for _, zones, _ in places(world)} == {None}
    assert db.query(world.databases.quinn, "SELECT count(*) FROM outreach_batch_items WHERE status = 'queued'") == [
        (1,)
    ]


def test_known_client_whose_claim_is_given_up_at_night_stays_known(world: TestData, tick: Tick) -> None:
    client_id = person(world, zone_at(2))
    world.item(world.batch(status="sent"), client_id, status="sent", sent_at=ago(days=30))
    batch_id = world.batch(clients=[client_id])
    world.quinn("UPDATE outreach_batch_items SET claimed_at = now() WHERE batch_id = %(id)s", id=batch_id)
    tick()
    tick()
    sql = "SELECT claimed_at, time_zones, new_contact FROM outreach_batch_items WHERE batch_id = %(id)s"
    assert world.quinn(sql, id=batch_id) == [(None, [zone_at(2)], False)]


def test_one_sleeping_batch_is_said_to_sleep_in_the_decision(world: TestData, tick: Tick) -> None:
    world.batch(clients=[person(world, zone_at(2))])
    tick()
    quinn = world.databases.quinn
    snapshot = pacing.read_snapshot(quinn)
    assert snapshot
    snapshot = pacing.read_groups(quinn, snapshot)
    decision = pacing.decide(snapshot, pacing.batches(quinn, snapshot))
    assert isinstance(decision, pacing.Hold)
    assert decision.code == pacing.QUIET_FOR_RECIPIENTS
