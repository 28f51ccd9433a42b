"""Predict when each batch ends, and what sending one batch would do, by simulating the dispatcher's ticks.

Used by report.py and status.py. The simulation calls the rules of pacing.py with its own clock. Reads the outreach
tables, contact_relationships, icloud.devices and icloud.send_queue; writes nothing. Example:

    simulations, holds = forecast.forecast(outreach, queue, interval)
"""

import collections
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import msgspec

import batches
import db
import handles
import pacing
import runtime

# If there are more pending items, estimate() replaces the simulation.
MAX_SIMULATED_ITEMS = 20_000
MAX_SIMULATED_TIME = timedelta(days=365)  # if a batch ends later, its finish is unknown
# The simulated device reports a result this long after a tick. Any time before the next tick has the same effect.
DEVICE_LATENCY = timedelta(seconds=1)
QUIET_HOURS = "quiet hours"
SEND_FROM = "send_from"
ONE_PER_TICK = "one message of a batch in each tick"
# The predicted outcome of an item. The server queues an unreadable number unchanged, and it may fail at the device.
SENT, UNREADABLE, FAILED, SKIPPED = "s", "u", "f", "k"


# --- reading -------------------------------------------------------------------------------------


class BatchCounts(NamedTuple):
    """A batch and the number of its items by status. `sort_key` is its place in the order of serving.

    `send_from`, `send_until`, `first_n`: of a composed batch, if it was sent, or resumed, now. `approved_at`: None if
    it would have to be approved first.
    """

    id: str
    status: str
    last_served_at: datetime | None
    created_at: datetime
    pending: int
    queued: int
    sent: int
    failed: int
    skipped: int
    is_composed: bool = False
    approved_at: datetime | None = None
    send_from: datetime | None = None
    send_until: datetime | None = None
    first_n: int | None = None

    @property
    def sort_key(self) -> tuple[datetime, datetime, str]:
        return self.last_served_at or datetime.min.replace(tzinfo=UTC), self.created_at, self.id

    def as_sending(self, settings: pacing.Settings, now: datetime) -> pacing.Batch:
        """Return the batch as it would be if it were sent, or resumed, now."""
        batch = pacing.Batch(self.id, self.pending > 0, False, None)
        if not self.is_composed:
            return batch
        days = settings.approval_days
        lapses_at = (self.approved_at or now) + timedelta(days=days) if days else None
        ends_at = min((moment for moment in (self.send_until, lapses_at) if moment), default=None)
        return batch._replace(send_from=self.send_from, ends_at=ends_at, first_left=self.first_n)


class OutreachSnapshot(NamedTuple):
    """The sending batches in the quinn database. `now` is its clock, `read_at` this host's clock at the same moment.

    `predicted_outcomes`: for each batch, a letter for each pending item, in their order. `claims`: the number of
    claimed items of each batch. `queued_items`: the batch id and queue row id of each queued item. `is_exact`: True if
    there are few enough items to simulate.
    """

    now: datetime
    read_at: datetime
    snapshot: pacing.Snapshot | None
    waiting: list[pacing.Batch]
    counts: dict[str, BatchCounts]
    predicted_outcomes: dict[str, str]
    claims: collections.Counter[str]
    queued_items: list[tuple[str, str]]
    is_exact: bool


class QueueSnapshot(NamedTuple):
    """The queue in the icloud database. `now` and `read_at` are the same as in OutreachSnapshot.

    `ended`: for each row of a queued item that has a result, when it was sent, or may have been sent (None: certainly
    not sent).
    """

    now: datetime
    read_at: datetime
    devices: list[pacing.Device]
    ended: dict[str, datetime | None]


def read_outreach(quinn: Any, batch_id: str | None = None) -> OutreachSnapshot:
    """Read the sending batches, and `batch_id` with any status, from the quinn database."""
    queued = "SELECT batch_id, COALESCE(send_queue_id, '') FROM outreach_batch_items WHERE status = 'queued'"
    now, read_at = _read_clock(quinn)
    counts = _read_counts(quinn, batch_id)
    is_exact = sum(batch.pending for batch in counts.values()) <= MAX_SIMULATED_ITEMS
    known = list(counts) if is_exact else [batch_id] if batch_id else []
    outcomes, claims = _read_outcomes(quinn, known)
    return OutreachSnapshot(
        now=now,
        read_at=read_at,
        snapshot=pacing.read_snapshot(quinn),
        waiting=pacing.batches(quinn),
        counts=counts,
        predicted_outcomes={name: outcomes.get(name, SENT * batch.pending) for name, batch in counts.items()},
        claims=claims,
        queued_items=[(batch_id, queue_id) for batch_id, queue_id in db.query(quinn, queued)],
        is_exact=is_exact,
    )


def _read_clock(conn: Any) -> tuple[datetime, datetime]:
    """Return the database's now() and this host's time. Call it first: now() is the start of the transaction."""
    return db.query(conn, "SELECT now()")[0][0], datetime.now(UTC)


def _read_counts(quinn: Any, batch_id: str | None) -> dict[str, BatchCounts]:
    sql = """
        WITH batch AS (
            SELECT id, status, last_served_at, created_at, digest IS NOT NULL AS is_composed,
                   CASE WHEN pause_reason IS DISTINCT FROM %(lapsed)s THEN approved_at END AS approved_at,
                   send_from, send_until,
                   -- After the first ones, the rest follows.
                   CASE WHEN COALESCE(pause_reason, '') NOT LIKE 'the first %%' THEN first_n END AS first_n
              FROM outreach_batches
             WHERE (status = 'sending' AND NOT dry_run AND (digest IS NULL OR approved_at IS NOT NULL))
                OR id = %(batch_id)s::uuid
        ), item AS (
            SELECT batch_id, status, count(*) AS count FROM outreach_batch_items
             WHERE batch_id IN (SELECT id FROM batch)
             GROUP BY batch_id, status
        )
        SELECT batch.id, batch.status, batch.last_served_at, batch.created_at,
               COALESCE(sum(count) FILTER (WHERE item.status = 'pending'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'queued'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'sent'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'failed'), 0)::bigint,
               COALESCE(sum(count) FILTER (WHERE item.status = 'skipped'), 0)::bigint,
               is_composed, approved_at, send_from, send_until, first_n
          FROM batch LEFT JOIN item ON item.batch_id = batch.id
         GROUP BY batch.id, batch.status, batch.last_served_at, batch.created_at, is_composed, approved_at, send_from,
                  send_until, first_n
    """
    parameters = {"batch_id": batch_id, "lapsed": batches.LAPSED}
    return {row[0]: BatchCounts(*row) for row in db.query(quinn, sql, parameters)}


def _read_outcomes(quinn: Any, batch_ids: Sequence[str]) -> tuple[dict[str, str], collections.Counter[str]]:
    """Return the predicted outcomes of each batch, and the number of its claimed items."""
    sql = """
        SELECT item.batch_id, item.claimed_at IS NOT NULL,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = item.client_id AND is_primary),
               item.rendered_body = ''
          FROM outreach_batch_items AS item
         WHERE item.status = 'pending' AND item.batch_id = ANY (%(ids)s::uuid[])
         ORDER BY item.batch_id, item.created_at, item.id
    """
    rows = db.query(quinn, sql, {"ids": list(batch_ids)}) if batch_ids else []
    outcomes = {
        batch_id: "".join(predict_outcome(handle, is_empty) for _, _, handle, is_empty in items)
        for batch_id, items in itertools.groupby(rows, lambda row: cast(str, row[0]))
    }
    return outcomes, collections.Counter(row[0] for row in rows if row[1])


def predict_outcome(handle: str | None, is_empty: bool) -> str:
    """Return the outcome that the dispatcher and the server would give an item with this primary handle."""
    if handle is None:
        return SKIPPED
    if is_empty or not handles.is_handle(handle):
        return FAILED
    return SENT if handles.to_send(handle) else UNREADABLE


def read_queue(icloud: Any, queued_items: Sequence[tuple[str, str]]) -> QueueSnapshot:
    """Read the devices, and which of the queued items have a result that the dispatcher has not read yet."""
    sql = """
        SELECT id, CASE outcome WHEN 'unknown' THEN updated_at ELSE sent_at END
          FROM icloud.send_queue
         WHERE id = ANY (%(ids)s::uuid[]) AND status <> 'queued'
    """
    now, read_at = _read_clock(icloud)
    ids = [queue_id for _, queue_id in queued_items if runtime.is_uuid(queue_id)]  # a TEXT column
    rows = db.query(icloud, sql, {"ids": ids}) if 0 < len(ids) <= MAX_SIMULATED_ITEMS else []
    return QueueSnapshot(now, read_at, pacing.devices(icloud), dict(rows))


# --- the simulation -----------------------------------------------------------------------------------


@dataclass(slots=True)
class BatchSimulation:
    """The state of a batch in the simulation. The items from `position` on are pending.

    `first`: when its first item was sent. `last`: when its last item ended, or the batch paused itself. Both are None
    until then. `late`: how many items are left when send_until, or the approval, ends.
    """

    batch: pacing.Batch
    sort_key: tuple[datetime, datetime, str]
    outcomes: str
    position: int = 0
    first: datetime | None = None
    last: datetime | None = None
    is_exact: bool = True
    late: int = 0

    @property
    def left(self) -> int:
        return len(self.outcomes) - self.position

    def skip(self, tick: datetime) -> None:
        """Skip the next items whose client has no handle."""
        while self.outcomes.startswith(SKIPPED, self.position):
            self.position += 1
        self.last = None if self.left else tick

    def take(self, tick: datetime) -> bool:
        """End the next item in this tick; return whether it was sent."""
        is_sent = self.outcomes[self.position] in (SENT, UNREADABLE)
        self.position += 1
        if is_sent:
            self.first = self.first or tick
            self.batch = self.batch._replace(last_sent_at=tick + DEVICE_LATENCY)
        self.last = None if self.left else tick
        return is_sent

    def end(self) -> None:
        """Send nothing more: the time of the batch is over."""
        self.late, self.last = self.left, self.batch.ends_at


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
            batch._replace(in_flight=False, first_left=None),
            outreach.counts[batch.id].sort_key,
            # The claimed items are pending, and have their places among the first ones.
            first_outcomes(outreach.predicted_outcomes[batch.id], batch.first_left, outreach.claims[batch.id]),
            is_exact=outreach.is_exact,
        )
        for batch in waiting
    }
    tick = max(snapshot.last_tick + interval, snapshot.now) if snapshot.last_tick else snapshot.now
    snapshot, tick = apply_in_flight(outreach, queue, snapshot, simulations, tick, interval)
    if not outreach.is_exact:
        return simulations, estimate(snapshot, simulations, tick, interval)
    return simulations, simulate(snapshot, simulations, tick, interval, target_id)


def first_outcomes(outcomes: str, maximum: int | None, claimed: int) -> str:
    """Return the outcomes of the items until the batch has sent first_n messages and pauses itself.

    `maximum`: how many may go, beside the claimed ones; None: all.
    """
    if maximum is None:
        return outcomes
    places = max(maximum, 0) + claimed
    for position, outcome in enumerate(outcomes):
        if places <= 0:
            return outcomes[:position]
        places -= outcome in (SENT, UNREADABLE)
    return outcomes


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
    waiting = {name: simulation for name, simulation in simulations.items() if simulation.left}
    while waiting and (target_id is None or target_id in waiting) and tick < end:
        snapshot = snapshot._replace(now=tick, in_flight=0, sent=sent)
        end_late(waiting, tick)
        sending = [simulation.batch for simulation in waiting.values()]
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
        sent.extendleft([tick + DEVICE_LATENCY] * simulate_tick(snapshot, sending, waiting))
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
    snapshot: pacing.Snapshot, sending: Sequence[pacing.Batch], waiting: dict[str, BatchSimulation]
) -> int:
    """Simulate one tick; return how many items were sent.

    A served batch moves to the end of `waiting`. A batch that has ended is removed from it.
    """
    sent = 0

    def claim(batch_ids: Sequence[str]) -> int:
        nonlocal sent
        claimed = 0
        # One statement gives all its batches the same last_served_at; after that, created_at decides their order.
        for served in sorted((waiting.pop(batch_id) for batch_id in batch_ids), key=lambda each: each.sort_key[1:]):
            served.skip(snapshot.now)
            if served.left:
                claimed += 1
                sent += served.take(snapshot.now)
            if served.left:
                waiting[served.batch.id] = served
        return claimed

    pacing.claim_round_robin(snapshot, sending, claim)
    return sent


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
    sent_times = []
    for batch_id, queue_id in outreach.queued_items:
        sent_at = ended.get(queue_id.lower(), snapshot.now)
        if sent_at is None:  # the item failed
            continue
        sent_times.append(sent_at)
        if simulation := simulations.get(batch_id):
            last_sent_at = max(sent_at, simulation.batch.last_sent_at or sent_at)
            simulation.batch = simulation.batch._replace(last_sent_at=last_sent_at)
    due = {
        batch_id for batch_id, simulation in simulations.items()
        if not pacing.global_hold(snapshot) and not pacing.batch_time_hold(snapshot, simulation.batch)
    }  # fmt: skip
    claimed = [batch_id for batch_id in outreach.claims.elements() if batch_id in due]
    for batch_id in claimed:
        if simulations[batch_id].take(tick):
            sent_times.append(tick + DEVICE_LATENCY)
    for simulation in simulations.values():
        simulation.last = None if simulation.left else tick
    sent = sorted([*snapshot.sent, *sent_times], reverse=True)
    return snapshot._replace(sent=sent, claimed_since=None), tick + interval if claimed else tick


def estimate(
    snapshot: pacing.Snapshot, simulations: dict[str, BatchSimulation], tick: datetime, interval: timedelta
) -> dict[str, timedelta]:
    """Estimate when each batch ends; return the bottleneck and its length.

    The batches share the rate of each limit, and a batch sends at most one item in a tick. The dispatcher serves the
    batches round-robin: a batch with n items left ends when every other batch has sent n items, or all of its own.
    Windows and the gap are rounded up to whole ticks. Quiet hours lengthen the time in proportion.
    """
    hours = snapshot.settings.quiet_hours
    open_share = 1 - (hours.end - hours.start) % 1440 / 1440 if hours else 1.0
    rates = {}  # items a second
    for name, maximum in snapshot.settings.limits.items():
        is_open_at_night = name == "max_per_day"
        seconds = _whole_ticks(pacing.WINDOWS[name], interval).total_seconds()
        rates[name] = maximum / seconds * (1.0 if is_open_at_night else open_share)
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
    counts, outcomes = outreach.counts[batch_id], outreach.predicted_outcomes[batch_id]
    found = BatchForecast(
        batch_id=batch_id,
        status=counts.status,
        pending=counts.pending,
        would_send=outcomes.count(SENT) + outcomes.count(UNREADABLE),
        would_skip=+collections.Counter({"no primary handle": outcomes.count(SKIPPED)}),
        would_fail=+collections.Counter({"invalid handle, or an empty message": outcomes.count(FAILED)}),
        first_at=None,
        last_at=None,
        is_exact=outreach.is_exact,
        bottleneck=None,
        held_seconds={},
        notes=_notes(outreach, queue, interval, outcomes.count(UNREADABLE)),
    )
    if outreach.snapshot:
        simulations, durations = forecast(outreach, queue, interval, batch_id)
        simulation = simulations[batch_id]
        holds = {code: length for code, length in durations.items() if code not in (QUIET_HOURS, ONE_PER_TICK)}
        found.first_at, found.last_at = simulation.first, simulation.last
        found.bottleneck = max(holds, key=lambda code: holds[code], default=ONE_PER_TICK if outcomes else None)
        found.held_seconds = {
            code: int(length.total_seconds()) for code, length in durations.items() if code != ONE_PER_TICK
        }
        if outcomes and simulation.last is None:
            usages = pacing.limit_usage(outreach.snapshot)
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
    count: int,
    send_from: datetime | None = None,
    send_until: datetime | None = None,
    first_n: int | None = None,
) -> BatchForecast:
    """Return what would happen if a batch of so many messages, which is not written yet, were sent now."""
    name = "new batch"
    counts = BatchCounts(
        name, "draft", None, outreach.now, count, 0, 0, 0, 0,
        is_composed=True, send_from=send_from, send_until=send_until, first_n=first_n,
    )  # fmt: skip
    total = count + sum(batch.pending for batch in outreach.counts.values())
    assumed = outreach._replace(
        counts={**outreach.counts, name: counts},
        predicted_outcomes={**outreach.predicted_outcomes, name: SENT * count},
        is_exact=outreach.is_exact and total <= MAX_SIMULATED_ITEMS,
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
