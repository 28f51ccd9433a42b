"""Predict when each batch ends, and what sending one batch would do, by simulating the dispatcher's ticks.

Used by report.py, composing.py and status.py. The simulation calls the rules of pacing.py with its own clock. Reads no
table: snapshots.py has done so. Example:

    simulations, holds = forecast.forecast(outreach, queue, interval)
"""

import collections
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import cast

import msgspec

import handles
import pacing
import snapshots
from recipient_groups import Group
from snapshots import ANYBODY, ARE_SENT, ARE_SKIPPED, FAILED, UNREADABLE, OutreachSnapshot, PendingItem, QueueSnapshot

MAX_SIMULATED_TIME = timedelta(days=365)  # if a batch ends later, its finish is unknown
# The simulated device reports a result this long after a tick. Any time before the next tick has the same effect.
DEVICE_LATENCY = timedelta(seconds=1)
SEND_FROM = "send_from"
ONE_PER_TICK = "one message of a batch in each tick"
ARE_NIGHTS = (pacing.QUIET_HOURS, pacing.QUIET_FOR_RECIPIENTS)


# --- the simulation -----------------------------------------------------------------------------------


@dataclass(slots=True)
class BatchSimulation:
    """The state of a batch in the simulation.

    `items`: those that are pending, oldest first. `maximum`: how many of them are sent until the batch pauses itself;
    None: all. `first`: when its first item was sent. `last`: when its last item ended, or the batch paused itself. Both
    are None until then. `late`: how many items are left when send_until, or the approval, ends.
    """

    batch: pacing.Batch
    sort_key: tuple[datetime, datetime, str]
    items: Sequence[PendingItem]
    maximum: int | None = None
    first: datetime | None = None
    last: datetime | None = None
    is_exact: bool = True
    late: int = 0
    pending: int = 0
    positions: dict[Group, collections.deque[int]] = field(default_factory=dict)  # of the pending items of each group

    def __post_init__(self) -> None:
        self.pending = len(self.items)
        for position, item in enumerate(self.items):
            self.positions.setdefault(item.group, collections.deque()).append(position)

    @property
    def left(self) -> int:
        return self.pending if self.maximum is None else min(self.pending, max(self.maximum, 0))

    def next(self, due: Container[Group] | None) -> PendingItem | None:
        """Return the oldest pending item in these groups (None: in any)."""
        heads = [held[0] for group, held in self.positions.items() if held and (due is None or group in due)]
        return self.items[min(heads)] if heads else None

    def skip(self, tick: datetime, due: Container[Group] | None) -> None:
        """Skip the next items that nobody gets."""
        while (item := self.next(due)) and item.outcome in ARE_SKIPPED:
            self._remove(item, tick)

    def take(self, tick: datetime, due: Container[Group] | None) -> PendingItem | None:
        """End the next item in this tick; return it if it was sent."""
        item = self.next(due)
        if item is None:
            return None
        if item.outcome in ARE_SENT:
            self.first = self.first or tick
            self.batch = self.batch._replace(last_sent_at=tick + DEVICE_LATENCY)
            self.maximum = None if self.maximum is None else self.maximum - 1
        self._remove(item, tick)
        return item if item.outcome in ARE_SENT else None

    def end(self) -> None:
        """Send nothing more: the time of the batch is over."""
        self.late, self.last = self.left, self.batch.ends_at

    def _remove(self, item: PendingItem, tick: datetime) -> None:
        self.positions[item.group].popleft()
        self.pending -= 1
        self.last = None if self.left else tick


class Recipients:
    """Which groups of items may go at a tick, and what holds the others. It asks pacing.py only when that changes."""

    def __init__(self, waiting: dict[str, BatchSimulation]) -> None:
        self.waiting = waiting
        self.groups: collections.Counter[Group] = collections.Counter()
        self.due: list[Group] | None = None
        self.until: datetime | None = None  # how long `due` holds
        self.limit: pacing.Hold | None = None

    def update(self, snapshot: pacing.Snapshot) -> pacing.Snapshot:
        """Return the snapshot of this tick with the groups that are still pending."""
        if not snapshot.settings.is_by_recipient:
            return snapshot
        limit = pacing.new_contacts_hold(snapshot)
        if self.until is None or snapshot.now >= self.until or (limit is None) != (self.limit is None):
            self._ask(snapshot)
        self.limit = limit
        return snapshot._replace(groups=self.groups)

    def _ask(self, snapshot: pacing.Snapshot) -> None:
        self.groups = collections.Counter()
        for simulation in self.waiting.values():
            self.groups.update({group: len(held) for group, held in simulation.positions.items() if held})
        self.due = pacing.due_groups(snapshot._replace(groups=self.groups))
        times, now = snapshot.settings.quiet_times, snapshot.now
        opens = [times.next_open(group.time_zones or (), now) for group in self.groups]
        changes = [
            times.valid_until(group.time_zones or (), now) if moment == now else moment
            for group, moment in zip(self.groups, opens, strict=True)
        ]
        self.until = min((moment for moment in changes if moment), default=now + timedelta(days=1))

    def sending(self, snapshot: pacing.Snapshot) -> list[pacing.Batch]:
        """Return the batches as they are in this tick."""
        if self.due is None:
            return [simulation.batch for simulation in self.waiting.values()]
        not_due = {group: count for group, count in self.groups.items() if group not in self.due}
        held = pacing.recipients_hold(snapshot, not_due)
        known = [group for group in self.due if not group.is_new]
        return [
            simulation.batch._replace(
                held=None if simulation.next(self.due) else held, is_known_due=simulation.next(known) is not None
            )
            for simulation in self.waiting.values()
        ]

    def due_within_limit(self, snapshot: pacing.Snapshot, new_contacts: int) -> list[Group] | None:
        """Return the groups that may go after so many new contacts in this tick."""
        places = pacing.remaining_new_contacts(snapshot)
        if places is None or new_contacts < places:
            return self.due
        return [group for group in (self.groups if self.due is None else self.due) if not group.is_new]


def forecast(
    outreach: OutreachSnapshot, queue: QueueSnapshot | None, interval: timedelta, target_id: str | None = None
) -> tuple[dict[str, BatchSimulation], dict[str, timedelta]]:
    """Return the simulation of each sending batch from the next tick on, and how long each hold will last.

    With `target_id`, simulate that batch too, with any status, and assume that sending is not paused.
    """
    snapshot = cast(pacing.Snapshot, outreach.snapshot)
    waiting = list(outreach.waiting)
    if target_id:
        snapshot = snapshot._replace(settings=snapshot.settings._replace(paused=False))
        if target_id not in {batch.id for batch in waiting}:
            sort_key = outreach.counts[target_id].sort_key
            place = sum(outreach.counts[batch.id].sort_key < sort_key for batch in waiting)
            waiting.insert(place, outreach.counts[target_id].as_sending(snapshot.settings, snapshot.now))
    simulations = {
        batch.id: BatchSimulation(
            batch._replace(in_flight=False, first_left=None, held=None),
            outreach.counts[batch.id].sort_key,
            snapshots.foreseen(outreach.items[batch.id], queue),
            # The claimed items are pending, too.
            None if batch.first_left is None else max(batch.first_left, 0) + outreach.claims[batch.id],
            is_exact=outreach.is_exact,
        )
        for batch in waiting
    }
    tick = max(snapshot.last_tick + interval, snapshot.now) if snapshot.last_tick else snapshot.now
    snapshot, tick = apply_in_flight(outreach, queue, snapshot, simulations, tick, interval)
    if not outreach.is_exact:
        return simulations, estimate(snapshot, simulations, tick, interval)
    return simulations, simulate(snapshot, simulations, tick, interval, target_id)


def simulate(
    snapshot: pacing.Snapshot,
    simulations: dict[str, BatchSimulation],
    tick: datetime,
    interval: timedelta,
    target_id: str | None = None,
) -> dict[str, timedelta]:
    """Simulate ticks until every batch, or the target, has ended; return how long each hold lasted.

    The device reports every message DEVICE_LATENCY after its tick. If a hold has no known end, the batches that it
    holds keep `last` None.
    """
    end = tick + MAX_SIMULATED_TIME
    hold_durations: collections.Counter[str] = collections.Counter()  # in intervals
    largest = max(snapshot.settings.limits.values(), default=0)
    sent = collections.deque(snapshot.sent[:largest], maxlen=largest)
    most_new = max(snapshot.settings.new_contact_limits.values(), default=0)
    new_sent = collections.deque(snapshot.new_sent[:most_new], maxlen=most_new)
    waiting = {name: simulation for name, simulation in simulations.items() if simulation.left}
    recipients = Recipients(waiting)
    while waiting and (target_id is None or target_id in waiting) and tick < end:
        end_late(waiting, tick)
        snapshot = snapshot._replace(now=tick, in_flight=0, sent=sent, new_in_flight=0, new_sent=new_sent)
        snapshot = recipients.update(snapshot)
        sending = recipients.sending(snapshot)
        decision = pacing.decide(snapshot, sending)
        if decision is None:
            break
        if isinstance(decision, pacing.Hold):
            if decision.until is None:
                break
            ticks = max(math.ceil((decision.until - tick) / interval), 1)
            hold_durations[decision.code] += ticks
            tick += ticks * interval
            continue
        count, new_contacts = simulate_tick(snapshot, sending, waiting, recipients)
        sent.extendleft([tick + DEVICE_LATENCY] * count)
        new_sent.extendleft([tick + DEVICE_LATENCY] * new_contacts)
        hold_durations[ONE_PER_TICK] += 1
        tick += interval
    end_late(waiting, end)  # what is held without a known end still ends by its own times
    names = {pacing.NOT_BEGUN: SEND_FROM}
    return {
        names.get(code, code.removeprefix("limit reached limit=")): ticks * interval
        for code, ticks in hold_durations.items()
    }


def end_late(waiting: dict[str, BatchSimulation], tick: datetime) -> None:
    """Remove the batches whose time is over in this tick."""
    for name, simulation in list(waiting.items()):
        if simulation.batch.ends_at and simulation.batch.ends_at <= tick:
            waiting.pop(name).end()


def simulate_tick(
    snapshot: pacing.Snapshot,
    sending: Sequence[pacing.Batch],
    waiting: dict[str, BatchSimulation],
    recipients: Recipients,
) -> tuple[int, int]:
    """Simulate one tick; return how many items were sent, and how many of these to new contacts.

    A served batch moves to the end of `waiting`. A batch that has ended is removed from it.
    """
    sent: list[PendingItem] = []

    def claim(current: pacing.Snapshot, batch_ids: Sequence[str]) -> tuple[int, int]:
        claimed = new_contacts = 0
        served = []
        for simulation in [waiting[batch_id] for batch_id in batch_ids]:
            simulation.skip(snapshot.now, recipients.due)
            due = recipients.due_within_limit(current, new_contacts)
            head = simulation.next(due)
            if head is None and simulation.next(recipients.due):
                continue  # it waits for a place for new contacts, and keeps its turn
            served.append(waiting.pop(simulation.batch.id))
            if head:
                claimed += 1
                new_contacts += head.group.is_new
                sent.extend(item for item in (simulation.take(snapshot.now, due),) if item)
        # One statement gives all its batches the same last_served_at; after that, created_at decides their order.
        waiting.update(
            (each.batch.id, each) for each in sorted(served, key=lambda each: each.sort_key[1:]) if each.left
        )
        return claimed, new_contacts

    pacing.claim_round_robin(snapshot, sending, claim)
    return len(sent), sum(item.group.is_new for item in sent)


def apply_in_flight(
    outreach: OutreachSnapshot,
    queue: QueueSnapshot | None,
    snapshot: pacing.Snapshot,
    simulations: dict[str, BatchSimulation],
    tick: datetime,
    interval: timedelta,
) -> tuple[pacing.Snapshot, datetime]:
    """Simulate the items in flight: the queued items end now, or have ended already; the claimed ones end in `tick`.

    Returns the snapshot with their sends, and the first tick that can claim new items.
    """
    ended = queue.ended if queue else {}
    sent_times: list[datetime] = []
    new_times: list[datetime] = []  # those of them that went to new contacts
    for batch_id, queue_id, is_new in outreach.queued_items:
        sent_at = ended.get(queue_id.lower(), snapshot.now)
        if sent_at is None:  # the item failed
            continue
        sent_times.append(sent_at)
        new_times += [sent_at] * is_new
        if simulation := simulations.get(batch_id):
            last_sent_at = max(sent_at, simulation.batch.last_sent_at or sent_at)
            simulation.batch = simulation.batch._replace(last_sent_at=last_sent_at)
    due = {
        batch_id for batch_id, simulation in simulations.items()
        if not pacing.global_hold(snapshot) and not pacing.batch_time_hold(snapshot, simulation.batch)
    }  # fmt: skip
    claimed = [batch_id for batch_id in outreach.claims.elements() if batch_id in due]
    for batch_id in claimed:
        if item := simulations[batch_id].take(tick, None):
            sent_times.append(tick + DEVICE_LATENCY)
            new_times += [tick + DEVICE_LATENCY] * item.group.is_new
    for simulation in simulations.values():
        simulation.last = None if simulation.left else tick
    sent = sorted([*snapshot.sent, *sent_times], reverse=True)
    new_sent = sorted([*snapshot.new_sent, *new_times], reverse=True)
    return snapshot._replace(sent=sent, new_sent=new_sent, claimed_since=None), tick + interval if claimed else tick


def estimate(
    snapshot: pacing.Snapshot, simulations: dict[str, BatchSimulation], tick: datetime, interval: timedelta
) -> dict[str, timedelta]:
    """Estimate when each batch ends; return the bottleneck and its length.

    The batches share the rate of each limit, and a batch sends at most one item in a tick. The dispatcher serves the
    batches round-robin: a batch with n items left ends when every other batch has sent n items, or all of its own.
    Windows and the gap are rounded up to whole ticks. Quiet hours lengthen the time in proportion.
    """
    open_share = snapshot.settings.quiet_times.open_share(snapshot.now)
    rates = {}  # items a second
    for name, maximum in snapshot.settings.limits.items():
        is_open_at_night = name == "max_per_day"
        seconds = _whole_ticks(pacing.WINDOWS[name], interval).total_seconds()
        rates[name] = maximum / seconds * (1.0 if is_open_at_night else open_share)
    new = sum(count for group, count in snapshot.groups.items() if group.is_new)
    new_share = new / max(sum(snapshot.groups.values()), 1)
    for name, maximum in snapshot.settings.new_contact_limits.items():
        is_open_at_night = name == "max_new_contacts_per_day"
        rate = maximum / pacing.NEW_CONTACT_WINDOWS[name].total_seconds() * (1.0 if is_open_at_night else open_share)
        rates[name] = rate / new_share if new_share else math.inf
    cadence = max(interval, _whole_ticks(timedelta(seconds=snapshot.settings.min_gap_seconds or 0), interval))
    before, shared, bottleneck, longest = 0, 0, ONE_PER_TICK, timedelta(0)
    waiting = sorted((each for each in simulations.values() if each.left), key=lambda each: each.left)
    for index, simulation in enumerate(waiting):
        shared += (simulation.left - before) * (len(waiting) - index)
        before = simulation.left
        needed = {ONE_PER_TICK: simulation.left * cadence.total_seconds() / open_share}
        needed |= {name: shared / rate if rate else math.inf for name, rate in rates.items()}
        bottleneck = max(needed, key=lambda name: needed[name])
        if snapshot.settings.paused or needed[bottleneck] > timedelta.max.total_seconds() / 2:
            continue
        longest = timedelta(seconds=needed[bottleneck])
        simulation.first = max(tick, simulation.batch.send_from or tick)
        simulation.last = simulation.first + longest
        ends_at = simulation.batch.ends_at
        if ends_at and simulation.last > ends_at:
            share = max((ends_at - simulation.first) / longest, 0)
            simulation.late, simulation.last = round(simulation.left * (1 - share)), ends_at
    return {bottleneck: longest} if waiting else {}


def _whole_ticks(length: timedelta, interval: timedelta) -> timedelta:
    """Return the time from a tick to the first tick at which its sends have left a window of this length."""
    return ((length + DEVICE_LATENCY) // interval + 1) * interval if length else timedelta(0)


# --- the forecast of one batch ------------------------------------------------------------------------


class BatchForecast(msgspec.Struct, rename="camel"):
    """What would happen if a batch were sent now. `bottleneck`: the hold that lasts longest, except quiet hours.

    `late`: how many messages would not go, because send_until, or the approval, ends before.
    """

    batch_id: str
    status: str
    pending: int
    would_send: int
    would_skip: dict[str, int]
    would_fail: dict[str, int]
    first_at: datetime | None
    last_at: datetime | None
    is_exact: bool
    bottleneck: str | None
    held_seconds: dict[str, int]
    notes: list[str]
    late: int = 0


def forecast_batch(
    outreach: OutreachSnapshot, queue: QueueSnapshot | None, interval: timedelta, batch_id: str
) -> BatchForecast:
    """Return what would happen if this batch were sent now."""
    counts = outreach.counts[batch_id]
    outcomes = collections.Counter(item.outcome for item in snapshots.foreseen(outreach.items[batch_id], queue))
    found = BatchForecast(
        batch_id=batch_id,
        status=counts.status,
        pending=counts.pending,
        would_send=sum(outcomes[outcome] for outcome in ARE_SENT),
        would_skip={outcome: outcomes[outcome] for outcome in ARE_SKIPPED if outcomes[outcome]},
        would_fail=+collections.Counter({"invalid handle, or an empty message": outcomes[FAILED]}),
        first_at=None,
        last_at=None,
        is_exact=outreach.is_exact,
        bottleneck=None,
        held_seconds={},
        notes=_notes(outreach, queue, interval, outcomes[UNREADABLE]),
    )
    if outreach.snapshot:
        simulations, durations = forecast(outreach, queue, interval, batch_id)
        simulation = simulations[batch_id]
        holds = {code: length for code, length in durations.items() if code not in (*ARE_NIGHTS, ONE_PER_TICK)}
        found.first_at, found.last_at = simulation.first, simulation.last
        found.bottleneck = max(holds, key=lambda code: holds[code], default=ONE_PER_TICK if outcomes else None)
        found.held_seconds = {
            code: int(length.total_seconds()) for code, length in durations.items() if code != ONE_PER_TICK
        }
        if outcomes and simulation.last is None:
            usages = [*pacing.limit_usage(outreach.snapshot), *pacing.new_contact_usage(outreach.snapshot)]
            found.bottleneck = next((usage.limit for usage in usages if usage.maximum == 0), None)
        if simulation.late:
            found.late = simulation.late
            found.bottleneck = "send_until" if simulation.batch.ends_at == counts.send_until else "approval_days"
            found.notes.append(f"{found.late} of them would not go: {found.bottleneck} ends the batch before")
    return found


def forecast_new_batch(
    outreach: OutreachSnapshot,
    queue: QueueSnapshot | None,
    interval: timedelta,
    groups: dict[Group, int],
    send_from: datetime | None = None,
    send_until: datetime | None = None,
    first_n: int | None = None,
) -> BatchForecast:
    """Return what would happen if a batch, which is not written yet, were sent now.

    `groups`: how many messages it has, by the group of their recipients.
    """
    name, count = "new batch", sum(groups.values())
    counts = snapshots.BatchCounts(
        name, "draft", None, outreach.now, count, 0, 0, 0, 0,
        is_composed=True, send_from=send_from, send_until=send_until, first_n=first_n,
    )  # fmt: skip
    total = count + sum(batch.pending for batch in outreach.counts.values())
    is_by_recipient = outreach.snapshot is not None and outreach.snapshot.settings.is_by_recipient
    items = [
        PendingItem(group=group if is_by_recipient else ANYBODY)
        for group, number in sorted(groups.items())
        for _ in range(number)
    ]
    assumed = outreach._replace(
        counts={**outreach.counts, name: counts},
        items={**outreach.items, name: items},
        is_exact=outreach.is_exact and total <= snapshots.MAX_SIMULATED_ITEMS,
    )
    return forecast_batch(assumed, queue, interval, name)


def _notes(outreach: OutreachSnapshot, queue: QueueSnapshot | None, interval: timedelta, unreadable: int) -> list[str]:
    """Return the assumptions of the forecast that are not true now, and the problems to correct before sending."""
    notes = []
    if outreach.snapshot is None:
        return [str(pacing.global_hold(None))]
    if outreach.snapshot.settings.paused:
        notes.append("sending is paused: the forecast assumes that it resumes now")
    if hold := pacing.heartbeat_hold(outreach.snapshot, interval):
        notes.append(f"{hold.code} ({hold.message}): the forecast assumes that it works from now on")
    if queue and not queue.devices:
        notes.append("there is no device: as it is, each message would fail; `python db.py add-device NAME` makes one")
    if unreadable:
        notes.append(unreadable_note(unreadable))
    return notes


def unreadable_note(count: int) -> str:
    """Return the warning about numbers without a country code."""
    what = "1 pending item has a number" if count == 1 else f"{count} pending items have numbers"
    return f"{what} without a country code, which may fail at the device; {handles.UNREADABLE_REMEDY}"
