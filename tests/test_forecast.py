"""Compare the forecast with what the real jobs then do, and check the forecast of a draft."""

import json
import random
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import run_script
from situations import paused, running_system
from testing import TestData

import dispatcher
import forecast
import pacing
import report
import snapshots
from snapshots import ANYBODY, PendingItem

# Moving all stored times into the past has the effect of moving the clock on.
SHIFTS = {
    "quinn": (
        "UPDATE outreach_batch_items SET sent_at = sent_at - {0}, updated_at = updated_at - {0},"
        " outcome_unknown_at = outcome_unknown_at - {0},"
        " created_at = created_at - {0}, claimed_at = claimed_at - {0}, queued_at = queued_at - {0}",
        "UPDATE outreach_batches SET last_served_at = last_served_at - {0}, created_at = created_at - {0},"
        " send_from = send_from - {0}, send_until = send_until - {0}",
        "UPDATE outreach_settings SET last_synced_at = last_synced_at - {0}, last_tick_at = last_tick_at - {0}",
    ),
    "icloud": (
        "UPDATE icloud.send_queue SET sent_at = sent_at - {0}, updated_at = updated_at - {0},"
        " created_at = created_at - {0}, collected_at = collected_at - {0}, valid_until = valid_until - {0}",
        "UPDATE icloud.devices SET last_seen_at = last_seen_at - {0}",
    ),
}
DEVICE_LATENCY = timedelta(seconds=10)  # after the tick; longer than a tick takes here, and shorter than any interval
MOST_TICKS = 150
TICKS = [30, 60, 300, 900, 7200]  # seconds


class Days:
    """Move the clock of the databases, and let the device send each message shortly after its tick."""

    def __init__(self, world: TestData, mac_sync: dispatcher.SendQueueClient, interval: timedelta) -> None:
        self.world, self.mac_sync, self.interval = world, mac_sync, interval
        self.moved = timedelta(0)
        self.quiet: tuple[int, int] | None = None  # minutes of the day

    def pass_time(self, length: timedelta) -> None:
        for query, statements in ((self.world.quinn, SHIFTS["quinn"]), (self.world.icloud, SHIFTS["icloud"])):
            for statement in statements:
                query(statement.format(f"interval '{length.total_seconds()} seconds'"))
        self.moved += length
        if self.quiet:
            # Quiet hours are the one instant that is not in a row's past: they come nearer.
            minutes = [(edge - self.moved // timedelta(minutes=1)) % 1440 for edge in self.quiet]
            start, end = (f"{minute // 60:02}:{minute % 60:02}" for minute in minutes)
            self.world.settings(quiet_hours_start=start, quiet_hours_end=end, quiet_hours_tz="UTC")

    def tick(self) -> None:
        dispatcher.run_job("sync", dispatcher.sync)
        dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, self.mac_sync))

    def send(self) -> None:
        """Let the device send its messages, then let the time until the next tick pass."""
        self.pass_time(DEVICE_LATENCY)
        self.world.icloud("UPDATE icloud.send_queue SET collected_at = now() WHERE status = 'queued'")
        self.world.icloud("UPDATE icloud.send_queue SET status = 'sent', sent_at = now() WHERE status = 'queued'")
        self.pass_time(self.interval - DEVICE_LATENCY)

    def ends(self) -> dict[str, datetime]:
        """Return when the last item of each batch ended."""
        sql = """
            SELECT batch_id, max(COALESCE(sent_at, updated_at)) FILTER (WHERE status <> 'pending')
              FROM outreach_batch_items
             GROUP BY batch_id
        """
        return dict(self.world.quinn(sql))

    def is_over(self) -> bool:
        return not self.world.quinn("SELECT 1 FROM outreach_batches WHERE status = 'sending' LIMIT 1")


def scene(days: Days, rng: random.Random) -> None:
    """Insert settings, batches and a history, drawn from `rng` so that all is sent within MOST_TICKS."""
    world, tick = days.world, days.interval.total_seconds()
    world.device()
    limit = {30: "max_per_minute", 60: "max_per_minute", 300: "max_per_hour", 900: "max_per_hour"}.get(
        int(tick), "max_per_day"
    )
    world.settings(**{limit: rng.choice([None, 1, 2, 3, 5])})
    world.settings(max_per_day=rng.choice([None, 40]) if limit != "max_per_day" else rng.choice([2, 4, 6]))
    world.settings(min_gap_seconds=rng.choice([None, 0, int(tick), int(2.5 * tick)]))
    handles = ["+14155550123", "a@example.com", "+14155550124", None, "no handle at all"]
    for _ in range(rng.randint(1, 4)):
        clients = [world.client(handle) for handle in rng.choices(handles, [8, 3, 3, 2, 1], k=rng.randint(1, 6))]
        served = datetime.now(UTC) - timedelta(minutes=rng.randint(1, 500)) if rng.random() < 0.5 else None
        world.batch(clients=clients, last_served_at=served)
    for _ in range(rng.randint(0, 2)):
        composed_batch(days, rng)
    history = world.batch(status="sent")
    for _ in range(rng.randint(0, 4)):
        ago = timedelta(seconds=rng.uniform(0, {"max_per_minute": 60, "max_per_hour": 3600}.get(limit, 86_400)))
        world.item(history, status="sent", sent_at=datetime.now(UTC) - ago, updated_at=datetime.now(UTC) - ago)
    if tick >= 60 and rng.random() < 0.6:
        now = datetime.now(UTC)
        start = now.hour * 60 + now.minute + rng.randint(1, 5) * int(tick // 60) + rng.randint(0, 3)
        days.quiet = start % 1440, (start + rng.randint(1, 4) * int(tick // 60) + 1) % 1440
        days.pass_time(timedelta(0))


def composed_batch(days: Days, rng: random.Random) -> None:
    """Insert an approved batch which begins later, ends early or pauses itself, or some of these."""
    days.world.settings(approval_days=None)  # a lapse would be a matter of the days that have passed here
    begins = datetime.now(UTC) + rng.choice([-1, 2, 5, 9]) * days.interval
    days.world.batch(
        clients=rng.randint(1, 6),
        digest="d",
        approved_at=datetime.now(UTC),
        first_n=rng.choice([None, None, 1, 3]),
        send_from=begins if rng.random() < 0.5 else None,
        send_until=begins + rng.randint(2, 8) * days.interval if rng.random() < 0.5 else None,
    )


def recipients(days: Days, rng: random.Random) -> None:
    """Let recipients live in several zones, some of them new contacts, with a limit on these."""
    world = days.world
    zones = [f"Etc/GMT{hours:+}" for hours in rng.sample(range(-9, 10), 3)]
    for (client_id,) in world.quinn("SELECT id FROM clients"):
        world.quinn("UPDATE clients SET time_zone = %(zone)s WHERE id = %(id)s", zone=rng.choice(zones), id=client_id)
    now = datetime.now(UTC)
    start = (now.hour * 60 + now.minute + rng.randint(0, 1439)) % 1440
    days.quiet = start, (start + rng.randint(300, 800)) % 1440
    days.pass_time(timedelta(0))
    world.settings(quiet_hours_of=rng.choice(["recipient", "recipient", "both"]), max_per_day=rng.choice([None, 20]))
    world.settings(max_new_contacts_per_hour=rng.choice([None, 1, 2]), max_new_contacts_per_day=rng.choice([None, 6]))


@pytest.mark.parametrize("seed", range(28))
def test_forecast_is_within_one_interval_of_jobs(
    world: TestData, mac_sync: dispatcher.SendQueueClient, seed: int
) -> None:
    rng = random.Random(seed)  # noqa: S311  # a scenario, no secret
    has_recipients = seed >= 20
    days = Days(world, mac_sync, timedelta(seconds=rng.choice([1800, 7200] if has_recipients else TICKS)))
    scene(days, rng)
    if has_recipients:
        recipients(days, rng)
    for _ in range(rng.randint(0, 3)):
        days.tick()
        days.send()
    if is_between_ticks := rng.random() < 0.5:
        days.tick()  # so that the forecast finds messages in flight
    began, moved = time.monotonic(), days.moved
    seen = report.report(days.interval)
    if is_between_ticks:
        days.send()
    for _ in range(MOST_TICKS):
        if days.is_over():
            break
        days.tick()
        days.send()
    endless = {batch.id for batch in seen.batches or [] if batch.finish is None}
    left = {batch_id for (batch_id,) in world.quinn("SELECT id FROM outreach_batches WHERE status = 'sending'")}
    assert left == endless, seen
    ends, moved = days.ends(), days.moved - moved
    # The clock went on by itself, too, while this ran.
    slack = days.interval + timedelta(seconds=time.monotonic() - began)
    assert seen.batches is not None
    for batch in seen.batches:
        if batch.finish is None:
            continue
        assert batch.finish_is_exact
        assert abs(batch.finish - moved - ends[batch.id]) <= slack, (batch, ends[batch.id] + moved)


def simulations(batches: int, items: int, now: datetime) -> dict[str, forecast.BatchSimulation]:
    """Insert so many batches with so many sendable items each."""
    return {
        str(number): forecast.BatchSimulation(
            pacing.Batch(str(number), True, False, None), (now, now, str(number)), [PendingItem()] * items
        )
        for number in range(batches)
    }


@pytest.mark.parametrize(
    ("limits", "days"),
    [
        ({"max_per_day": 150}, 1_000_000 / 150),
        ({"max_per_minute": 10}, 1_000_000 / 10 * 90 / 86_400),  # a place is free again in the third tick after
        ({"min_gap_seconds": 300}, 1_000 * 330 / 86_400),
        ({}, 1_000 * 30 / 86_400),
        ({"min_gap_seconds": 300, "quiet_hours_start": "20:00", "quiet_hours_end": "08:00"}, 2_000 * 330 / 86_400),
    ],
)
def test_million_item_forecast_is_fast_and_close(limits: dict[str, Any], days: float) -> None:
    now = datetime(2026, 4, 22, 12, 0, 7, tzinfo=UTC)
    settings = pacing.Settings(False, None, None, "UTC", None, None, None, None, None)._replace(**limits)
    estimated = simulations(1_000, 1_000, now)
    began = time.process_time()
    forecast.estimate(pacing.Snapshot(settings, now, 0, []), estimated, now, timedelta(seconds=30))
    assert time.process_time() - began < 1
    for simulation in estimated.values():
        assert simulation.last is not None
        assert (simulation.last - now) / timedelta(days=1) == pytest.approx(days, rel=0.1)


@pytest.mark.parametrize(
    ("begins", "ends", "last", "late"), [(None, None, 6, 0), (3, None, 9, 0), (None, 3, 3, 360), (2, 5, 5, 360)]
)
def test_estimate_obeys_the_times_of_a_batch(begins: int | None, ends: int | None, last: int, late: int) -> None:
    now = datetime(2026, 4, 22, 12, 0, tzinfo=UTC)
    settings = pacing.Settings(False, None, None, "UTC", None, None, None, None, None)
    estimated = simulations(1, 720, now)  # six hours
    moments = [now + timedelta(hours=hours) if hours else None for hours in (begins, ends)]
    estimated["0"].batch = estimated["0"].batch._replace(send_from=moments[0], ends_at=moments[1])
    forecast.estimate(pacing.Snapshot(settings, now, 0, []), estimated, now, timedelta(seconds=30))
    assert estimated["0"].first == now + timedelta(hours=begins or 0)
    assert estimated["0"].last == now + timedelta(hours=last)
    assert estimated["0"].late == late


@pytest.mark.parametrize(
    ("outcomes", "maximum", "expected"),
    [("sss", None, "sss"), ("sss", 2, "ss"), ("sss", 0, ""), ("fsss", 1, "fs"), ("usf", 2, "us"), ("s", 5, "s"),
     ("", 0, "")],
)  # fmt: skip
def test_batch_pauses_itself_after_its_first_messages(outcomes: str, maximum: int | None, expected: str) -> None:
    now = datetime(2026, 4, 22, 12, 0, tzinfo=UTC)
    names = {"s": snapshots.SENT, "u": snapshots.UNREADABLE, "f": snapshots.FAILED}
    items = [PendingItem(names[letter]) for letter in outcomes]
    simulation = forecast.BatchSimulation(pacing.Batch("", True, False, None), (now, now, ""), items, maximum)
    ended = ""
    while simulation.left:
        ended += outcomes[len(ended)]
        simulation.take(now, None)
    assert ended == expected


def test_first_message_that_is_claimed_can_be_forecast(world: TestData) -> None:
    running_system(world)
    world.batch(clients=2, digest="d", approved_at=datetime.now(UTC), first_n=1)
    world.quinn(
        "UPDATE outreach_batch_items SET claimed_at = now() WHERE id = (SELECT id FROM outreach_batch_items LIMIT 1)"
    )
    [batch] = report.report(timedelta(seconds=30)).batches or []
    assert batch.finish
    assert batch.late == 0


# send_from and send_until in minutes from now, first_n; the first and the last message in seconds, how many are too
# late, and what decides. Each batch has 5 messages, one of which goes every 30 s.
NEW_BATCHES: list[tuple[int | None, int | None, int | None, int, int, int, str]] = [
    (None, None, None, 0, 120, 0, forecast.ONE_PER_TICK),
    (10, None, None, 600, 720, 0, "send_from"),
    (-10, None, None, 0, 120, 0, forecast.ONE_PER_TICK),
    (None, None, 2, 0, 30, 0, forecast.ONE_PER_TICK),
    (None, 1, None, 0, 60, 3, "send_until"),
    (10, 11, None, 600, 660, 3, "send_until"),
    (10, 11, 2, 600, 630, 0, "send_from"),
    (None, 60 * 24 * 9, None, 0, 120, 0, forecast.ONE_PER_TICK),
]


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize(("begins", "ends", "first_n", "first", "last", "late", "binds"), NEW_BATCHES)
def test_forecast_of_a_draft_obeys_its_times(
    world: TestData, begins: int | None, ends: int | None, first_n: int | None, first: int, last: int, late: int,
    binds: str, is_written: bool,
) -> None:  # fmt: skip
    interval = timedelta(seconds=30)
    [(now,)] = world.quinn("SELECT now()")
    send_from, send_until = (now + timedelta(minutes=each) if each else None for each in (begins, ends))
    columns = {"send_from": send_from, "send_until": send_until, "first_n": first_n}
    draft = world.batch(clients=5, status="draft", digest="d", **columns) if is_written else None
    outreach = snapshots.read_outreach(world.databases.quinn, draft)
    assert outreach.snapshot
    outreach = outreach._replace(now=now, snapshot=outreach.snapshot._replace(now=now))
    if draft:
        found = forecast.forecast_batch(outreach, None, interval, draft)
    else:
        found = forecast.forecast_new_batch(outreach, None, interval, {ANYBODY: 5}, send_from, send_until, first_n)
    assert found.first_at
    assert found.last_at
    assert (found.first_at - now, found.last_at - now) == (timedelta(seconds=first), timedelta(seconds=last))
    assert (found.late, found.bottleneck, found.is_exact) == (late, binds, True)
    assert len([note for note in found.notes if "would not go" in note]) == (late > 0)


def test_forecast_of_a_long_batch_ends_with_its_approval(world: TestData) -> None:
    world.settings(max_per_hour=None, max_per_minute=None, max_per_day=10)
    outreach = snapshots.read_outreach(world.databases.quinn)
    found = forecast.forecast_new_batch(outreach, None, timedelta(seconds=30), {ANYBODY: 100})
    assert (found.late, found.bottleneck) == (30, "approval_days")
    world.settings(approval_days=None)
    outreach = snapshots.read_outreach(world.databases.quinn)
    found = forecast.forecast_new_batch(outreach, None, timedelta(seconds=30), {ANYBODY: 100})
    assert (found.late, found.bottleneck) == (0, "max_per_day")


@pytest.mark.parametrize(
    ("columns", "late", "ends_with"),
    [({"pause_reason": "the first 2 messages were sent", "first_n": 2}, 0, 5),
     ({"first_n": 2}, 0, 2),
     ({"pause_reason": "approval lapsed", "approved_at": datetime(2026, 1, 1, tzinfo=UTC)}, 0, 5)],
)  # fmt: skip
def test_forecast_of_a_paused_batch_is_that_of_its_resume(
    world: TestData, columns: dict[str, Any], late: int, ends_with: int
) -> None:
    columns = {"approved_at": datetime.now(UTC), **columns}
    batch_id = world.batch(clients=5, status="paused", digest="d", **columns)
    outreach = snapshots.read_outreach(world.databases.quinn, batch_id)
    found = forecast.forecast_batch(outreach, None, timedelta(seconds=30), batch_id)
    assert found.first_at
    assert found.last_at
    assert (found.late, found.last_at - found.first_at) == (late, (ends_with - 1) * timedelta(seconds=30))


def test_batch_that_is_over_does_not_end_the_forecast_of_one_that_begins_later(world: TestData) -> None:
    running_system(world)
    now = datetime.now(UTC)
    approved: dict[str, Any] = {"digest": "d", "approved_at": now}
    over = world.batch(clients=9, send_until=now + timedelta(minutes=1), **approved)
    later = world.batch(clients=1, send_from=now + timedelta(minutes=9), **approved)
    lines = {batch.id: batch for batch in report.report(timedelta(seconds=30)).batches or []}
    assert lines[over].finish == now + timedelta(minutes=1)
    assert lines[over].late in (7, 8)
    finish = lines[later].finish
    assert finish
    assert timedelta(minutes=9) <= finish - now <= timedelta(minutes=9, seconds=30)
    assert re.search(rf"{over[:8]}.* \d\d:\d\d:\d\d, [78] too late", run_script("status.py").stdout)


def test_endless_hold_leaves_finish_unknown(world: TestData) -> None:
    world.device()
    world.settings(max_per_day=0, last_tick_at=datetime.now(UTC))
    world.batch(clients=1)
    seen = report.report(timedelta(seconds=30))
    assert seen.batches is not None
    assert [batch.finish for batch in seen.batches] == [None]


def test_claimed_items_go_first_and_alone(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    days = Days(world, mac_sync, timedelta(seconds=30))
    world.device()
    world.settings(last_tick_at=datetime.now(UTC))
    world.item(world.batch(), claimed_at=datetime.now(UTC))
    world.batch(clients=1)
    seen = report.report(days.interval)
    assert seen.batches is not None
    first, second = sorted(batch.finish for batch in seen.batches if batch.finish)
    assert second - first == days.interval
    days.tick()
    assert sorted(world.statuses()) == ["pending", "queued"]


def test_draft_forecast_counts_sends_skips_and_failures(world: TestData) -> None:
    running_system(world)
    handles = ["+14155550123", None, "a@example.com", "call me", None, "+14155550124"]
    draft = world.batch(clients=[world.client(handle) for handle in handles], status="draft")
    world.settings(max_per_minute=1)
    done = run_script("status.py", "--json", "--forecast", draft)
    assert done.returncode == 0
    seen = json.loads(done.stdout)
    assert (seen["pending"], seen["wouldSend"]) == (6, 3)
    assert seen["wouldSkip"] == {"no primary handle": 2}
    assert seen["wouldFail"] == {"invalid handle, or an empty message": 1}
    assert seen["bottleneck"] == "max_per_minute"
    assert seen["isExact"] is True
    first, last = (datetime.fromisoformat(seen[name]) for name in ("firstAt", "lastAt"))
    # One goes; the next place is free three ticks later; the one that fails takes a tick of its own.
    assert (last - first) in (timedelta(seconds=90 + 90), timedelta(seconds=90 + 30 + 90))
    heading = run_script("status.py", "--forecast", draft).stdout.splitlines()[0]
    assert heading.endswith("6 items pending. If it were sent from now on:")


def test_draft_forecast_includes_sending_batches(world: TestData) -> None:
    running_system(world)
    world.settings(max_per_hour=2)
    world.batch(clients=2)
    draft = world.batch(clients=2, status="draft")
    seen = json.loads(run_script("status.py", "--json", "--forecast", draft).stdout)
    first, last = (datetime.fromisoformat(seen[name]) for name in ("firstAt", "lastAt"))
    assert last - first == timedelta(minutes=60, seconds=30)


def test_forecast_while_paused_names_its_assumption(world: TestData) -> None:
    running_system(world)
    paused(world)
    seen = json.loads(run_script("status.py", "--json", "--forecast", world.batch(clients=1, status="draft")).stdout)
    assert seen["lastAt"]
    assert seen["notes"] == ["sending is paused: the forecast assumes that it resumes now"]


def test_forecast_of_unknown_batch_is_an_error(world: TestData) -> None:
    done = run_script("status.py", "--forecast", "00000000-0000-0000-0000-000000000000")
    assert done.returncode == 1
    assert done.stderr == "status.py: there is no batch 00000000-0000-0000-0000-000000000000\n"
