"""Simulate years of ticks in random zones and settings: nothing is collected in a recipient's night, nobody waits.

pacing.py decides, as it does for the dispatcher, and quiet_times.py says until when a message may be collected. A
device collects each message at a random moment until then: the dispatcher may be dead. The check reads the clocks by
itself.
"""

import random
import zoneinfo
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

import forecast
import pacing
import zones
from recipient_groups import Group
from snapshots import PendingItem

pytestmark = pytest.mark.faults
YEARS = 4
MINUTES = 365 * 1440
TICK = 5  # minutes
MINUTE = timedelta(minutes=1)
NAMES = sorted(name for name in zoneinfo.available_timezones() if zones.is_known(name))
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Year:
    """A year of ticks, one every five minutes, over batches that are made again before they end."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)  # noqa: S311  # a scenario, no secret
        self.start, self.end = rng.sample(range(1440), 2)
        self.days = rng.sample(WEEKDAYS, rng.choice([0, 0, 1, 2]))
        self.settings = pacing.Settings(
            paused=False,
            quiet_hours_start=self.text(self.start),
            quiet_hours_end=self.text(self.end),
            quiet_hours_tz=rng.choice(NAMES),
            max_per_minute=None,
            max_per_hour=rng.choice([None, 20]),
            max_per_day=None,
            min_gap_seconds=None,
            device_id=None,
            quiet_hours_of=rng.choice(["sender", "recipient", "recipient", "both"]),
            quiet_days=",".join(self.days),
            max_new_contacts_per_hour=rng.choice([None, 3]),
        )
        self.now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=rng.randrange(365 * 4))
        self.sent: list[tuple[datetime, bool]] = []
        self.collected = self.looked_at = 0

    @staticmethod
    def text(minute: int) -> str:
        return f"{minute // 60:02}:{minute % 60:02}"

    def is_quiet(self, names: Sequence[str], moment: datetime) -> bool:
        """Read the clocks of the zones that count."""
        sender = str(self.settings.quiet_hours_tz)
        places = {"sender": [sender], "recipient": [*names] or [sender], "both": [*names, sender]}
        for place in places[str(self.settings.quiet_hours_of)]:
            local = moment.astimezone(zoneinfo.ZoneInfo(place))
            minute = local.hour * 60 + local.minute
            is_in_hours = (
                self.start <= minute < self.end if self.start < self.end else minute >= self.start or minute < self.end
            )
            if is_in_hours or WEEKDAYS[local.weekday()] in self.days:
                return True
        return False

    def new_batch(self) -> forecast.BatchSimulation:
        rng = self.rng
        zones_of = [tuple(sorted(rng.sample(NAMES, rng.choice([1, 1, 1, 2, 0])))) for _ in range(8)]
        items = [PendingItem(group=Group(rng.choice(zones_of), rng.random() < 0.5)) for _ in range(40)]
        batch = pacing.Batch(str(rng.random()), True, False, None)
        return forecast.BatchSimulation(batch, (self.now, self.now, batch.id), items)

    def snapshot(self) -> pacing.Snapshot:
        day = [(moment, is_new) for moment, is_new in self.sent if moment > self.now - timedelta(hours=1)]
        self.sent = day
        return pacing.Snapshot(
            self.settings, self.now, 0, [moment for moment, _ in reversed(day)],
            new_sent=[moment for moment, is_new in reversed(day) if is_new],
        )  # fmt: skip

    def collect(self, item: PendingItem) -> None:
        """Let a device collect the message at a random moment before its valid_until: it is not quiet there then."""
        names = item.group.time_zones or ()
        until = self.settings.quiet_times.valid_until(names, self.now)
        latest = until or self.now + timedelta(days=3)
        assert latest > self.now, "it was enqueued although it may not be collected any more"
        for share in (0, 0.999999, self.rng.random()):
            moment = self.now + share * (latest - self.now)
            assert not self.is_quiet(names, moment), (self.settings, names, self.now, moment)
        self.collected += 1

    def run(self) -> None:
        waiting = {each.batch.id: each for each in (self.new_batch() for _ in range(3))}
        recipients = forecast.Recipients(waiting)
        for minute in range(0, MINUTES, TICK):
            snapshot = recipients.update(self.snapshot())
            if pacing.global_hold(snapshot) is None:
                self.tick(snapshot, waiting, recipients)
            self.now += TICK * MINUTE
            if minute % 4000 == 0:  # so that something is pending all year
                waiting.clear()
                waiting |= {each.batch.id: each for each in (self.new_batch() for _ in range(3))}
                recipients.until = None

    def tick(
        self, snapshot: pacing.Snapshot, waiting: dict[str, forecast.BatchSimulation], recipients: forecast.Recipients
    ) -> None:
        sending = recipients.sending(snapshot)
        taken: list[tuple[forecast.BatchSimulation, PendingItem]] = []

        def claim(current: pacing.Snapshot, batch_ids: Sequence[str]) -> tuple[int, int]:
            new_contacts = claimed = 0
            for batch_id in batch_ids:
                due = recipients.due_within_limit(current, new_contacts)
                if item := waiting[batch_id].take(self.now, due):
                    taken.append((waiting[batch_id], item))
                    claimed += 1
                    new_contacts += item.group.is_new
            return claimed, new_contacts

        is_looked_at = self.rng.random() < 0.02  # reading all clocks takes long
        awake = {name: self.first_awake(each, snapshot) for name, each in waiting.items()} if is_looked_at else {}
        after, _ = pacing.claim_round_robin(snapshot, sending, claim)
        for _, item in taken:
            self.collect(item)
            self.sent.append((self.now, item.group.is_new))
        if pacing.limit_hold(after) is None and pacing.new_contacts_hold(after) is None:
            served = {batch.batch.id: item for batch, item in taken}
            for name, first in awake.items():
                assert served.get(name) is first, "an item that may go waits behind one that may not"
                self.looked_at += 1

    def first_awake(self, batch: forecast.BatchSimulation, snapshot: pacing.Snapshot) -> PendingItem | None:
        """Return the batch's oldest item for which it is not quiet now, nor in two minutes; by the clocks."""
        is_full = pacing.new_contacts_hold(snapshot) is not None
        heads = [
            held[0] for group, held in batch.positions.items()
            if held and not (is_full and group.is_new)
            and not any(self.is_quiet(group.time_zones or (), self.now + ahead * MINUTE) for ahead in range(3))
        ]  # fmt: skip
        return batch.items[min(heads)] if heads else None


@pytest.mark.parametrize("seed", range(YEARS))
def test_nothing_is_collected_in_a_night_of_the_year_and_nobody_waits_for_a_sleeper(seed: int) -> None:
    year = Year(seed)
    year.run()
    print(f"seed {seed}: {MINUTES} minutes, {year.collected} collected, {year.looked_at} batches looked at")  # noqa: T201
    assert year.collected > 100
    assert year.looked_at > 100
