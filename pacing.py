"""When may the next item go, and what holds it? The rules of outreach_settings, as functions of what one look has read.

Used by the dispatcher, which obeys them, and by status.py, which explains them and plays them forward: there is no
second copy. Reads outreach_settings, outreach_batches, outreach_batch_items, icloud.devices and icloud.send_queue;
writes nothing. All instants are aware datetimes, and `now` is the database's. Example:

    pace = pacing.read(quinn); verdict = pacing.verdict(pace, pacing.batches(quinn))
"""

import bisect
import functools
import logging
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import db

WINDOWS = {
    "max_per_minute": timedelta(minutes=1),
    "max_per_hour": timedelta(hours=1),
    "max_per_day": timedelta(days=1),
}
# How far ahead a change of quiet hours is sought: a daylight-saving night may swallow one of them whole.
HORIZON = timedelta(days=3)
MINUTE = timedelta(minutes=1)
NO_DEVICE = "there is no device: `python db.py add-device NAME` makes one"
# A device that was not seen, or a message without a result, for longer than this is no longer a matter of patience.
PATIENCE = timedelta(minutes=10)
BRIEF = timedelta(minutes=2)  # a gate that opens within this is part of sending at the settings' pace
MISSED_TICKS = 3  # so many intervals, and LATE, after its last sync a dispatcher counts as not running
LATE = timedelta(seconds=10)

logger = logging.getLogger("outreach-dispatcher")


class Settings(NamedTuple):
    """outreach_settings' row; a limit of None is none, quiet hours are `HH:MM`."""

    paused: bool
    quiet_hours_start: str | None
    quiet_hours_end: str | None
    quiet_hours_tz: str | None
    max_per_minute: int | None
    max_per_hour: int | None
    max_per_day: int | None
    min_gap_seconds: int | None
    device_id: str | None


class Pace(NamedTuple):
    """What the limits look at. `sent`: newest first, those of the last day, as many as the largest limit needs.

    `last_tick`: when a sync last ended. `claimed_since`: when the item was claimed that waits longest for its enqueue.
    """

    settings: Settings
    now: datetime
    in_flight: int
    sent: Sequence[datetime]
    last_tick: datetime | None = None
    claimed_since: datetime | None = None


class Batch(NamedTuple):
    """A sending batch, as its turn looks at it. `last_sent_at` is read only where a gap is kept."""

    id: str
    pending: bool
    in_flight: bool
    last_sent_at: datetime | None


class Device(NamedTuple):
    """A device and its share of the queue: rows it has not collected, rows without a result, the oldest of both."""

    id: str
    name: str
    last_seen_at: datetime | None
    waiting: int
    collected: int
    oldest_at: datetime | None

    def is_late(self, now: datetime) -> bool:
        """Whether its messages wait for longer than patience explains."""
        seen, oldest = self.last_seen_at, self.oldest_at
        return oldest is not None and (seen is None or now - seen > PATIENCE or now - oldest > PATIENCE)

    def seen(self, now: datetime) -> str:
        return f"last seen {span(now - self.last_seen_at)} ago" if self.last_seen_at else "never seen"


class Gate(NamedTuple):
    """What holds sending: as the log has it, when it opens if time alone opens it, and as a person would say it.

    `soon`: no time is known, and yet it opens without an operator.
    """

    reason: str
    until: datetime | None = None
    words: str = ""
    soon: bool = False

    def __str__(self) -> str:
        return self.reason if self.until is None else f"{self.reason} until={self.until.isoformat(timespec='seconds')}"

    @property
    def kind(self) -> str:
        """The reason without its figures: `limit reached limit=max_per_hour`."""
        return self.reason.partition(" used=")[0]

    @property
    def needs_operator(self) -> bool:
        return self.until is None and not self.soon

    def lasts(self, now: datetime) -> bool:
        """Whether it is more than a breath between two sends."""
        return self.needs_operator or (self.until is not None and self.until - now > BRIEF)


# What holds sending, else the batch whose turn is next, else nothing to send.
Verdict = Gate | Batch | None


class Usage(NamedTuple):
    """One limit: how much of it is used, and when a place falls free by time alone."""

    limit: str
    most: int
    used: int
    free_at: datetime | None


class QuietHours(NamedTuple):
    """From `start` until `end`, minutes of the day in `zone` (None: this host's); over midnight if end < start."""

    start: int
    end: int
    zone: ZoneInfo | None

    def cover(self, moment: datetime) -> bool:
        local = moment.astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def next(self, moment: datetime, covered: bool) -> datetime | None:
        """The first whole minute after `moment` that they cover, or do not.

        Minute by minute: where a clock change skips or repeats an hour, that is still right.
        """
        minute = moment.astimezone(UTC).replace(second=0, microsecond=0) + MINUTE
        while minute < moment + HORIZON:
            if self.cover(minute) is covered:
                return minute
            minute += MINUTE
        return None


def read(quinn: Any) -> Pace | None:
    """One look at the settings and at what counts against the limits; None when the settings row is missing.

    In flight are the items that are queued, and those claimed: an enqueue whose answer was lost may have put
    their message into the queue.
    """
    sql = """
        SELECT paused, quiet_hours_start::text, quiet_hours_end::text, quiet_hours_tz,
               max_per_minute, max_per_hour, max_per_day, min_gap_seconds, device_id,
               now(),
               (SELECT count(*) FROM outreach_batch_items WHERE status = 'queued')
               + (SELECT count(*) FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL),
               ARRAY(SELECT sent_at FROM outreach_batch_items
                      WHERE status = 'sent' AND sent_at > now() - interval '1 day'
                      ORDER BY sent_at DESC
                      LIMIT COALESCE(GREATEST(max_per_minute, max_per_hour, max_per_day), 0)),
               last_synced_at,
               (SELECT min(claimed_at) FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL)
          FROM outreach_settings
         WHERE id = 1
    """
    rows = db.query(quinn, sql)
    return Pace(Settings(*rows[0][:9]), *rows[0][9:]) if rows else None


def batches(quinn: Any) -> list[Batch]:
    """The batches that are being sent, in the order of their turns: the one that waited longest comes first."""
    sql = """
        SELECT id,
               EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending'),
               EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued')
               OR EXISTS (SELECT FROM outreach_batch_items
                           WHERE batch_id = batch.id AND status = 'pending' AND claimed_at IS NOT NULL),
               CASE WHEN gap.seconds > 0 THEN
                   (SELECT max(sent_at) FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'sent')
               END
          FROM outreach_batches AS batch,
               (SELECT min_gap_seconds AS seconds FROM outreach_settings WHERE id = 1) AS gap
         WHERE status = 'sending' AND NOT dry_run
         ORDER BY last_served_at NULLS FIRST, created_at, id
    """
    return [Batch(*row) for row in db.query(quinn, sql)]


def devices(icloud: Any) -> list[Device]:
    """Every device, the oldest first, and what waits for it."""
    sql = """
        SELECT device.id, device.name, device.last_seen_at,
               count(message.id) FILTER (WHERE message.collected_at IS NULL),
               count(message.id) FILTER (WHERE message.collected_at IS NOT NULL),
               min(message.created_at)
          FROM icloud.devices AS device
          LEFT JOIN icloud.send_queue AS message ON message.device_id = device.id AND message.status = 'queued'
         GROUP BY device.id, device.name, device.last_seen_at, device.created_at
         ORDER BY device.created_at, device.id
    """
    return [Device(*row) for row in db.query(icloud, sql)]


def verdict(
    pace: Pace | None,
    waiting: Sequence[Batch],
    known: Sequence[Device] | None = None,
    interval: timedelta | None = None,
) -> Verdict:
    """What holds sending now, else the batch whose turn is next, else None: nothing to send.

    `waiting` and `known` are batches() and devices() (None: not to be had); `interval`, between two ticks, is
    given by an onlooker, who cannot take it for granted that the dispatcher runs. The gates in their order:
    1. the dispatcher runs; 2. closed(); 3. the server can be asked (1 and 3: for an onlooker only); 4. what an
    earlier tick claimed goes first; 5. there is something to send; 6. limited(); 7. gap(), of every batch;
    8. there is a device.
    """
    gate = closed(pace)
    if pace is None:
        return gate
    gate = (interval and (stopped(pace, interval) or gate or stuck(pace, interval))) or gate
    if gate:
        return gate
    if pace.claimed_since and (claimed := [batch for batch in waiting if batch.pending and batch.in_flight]):
        return claimed[0]
    if not any(batch.pending for batch in waiting):
        return awaited(pace, known) if pace.in_flight else None
    gate = limited(pace) or spaced(pace, waiting)
    if gate and gate.soon:
        return awaited(pace, known)
    if gate is None and known is not None and not known:
        return Gate("no device", words=NO_DEVICE)
    return gate or turns(pace, waiting)[0]


def stopped(pace: Pace, interval: timedelta) -> Gate | None:
    """That no dispatcher is at work: the gate before all others, for nobody looks at those."""
    if pace.last_tick is None:
        return Gate("dispatcher not running", words="it has not run yet")
    if pace.now - pace.last_tick <= MISSED_TICKS * interval + LATE:
        return None
    return Gate("dispatcher not running", words=f"last tick {span(pace.now - pace.last_tick)} ago")


def stuck(pace: Pace, interval: timedelta) -> Gate | None:
    """That claimed items could not be enqueued: a claim lives for one tick unless the server cannot be asked."""
    if pace.claimed_since is None or pace.now - pace.claimed_since <= interval:
        return None
    since = span(pace.now - pace.claimed_since)
    return Gate("server could not be asked", words=f"the send queue server could not be asked for {since}")


def awaited(pace: Pace, known: Sequence[Device] | None) -> Gate:
    """That nothing but results opens the way: whose they are, if the queue still waits for them."""
    flying = f"{pace.in_flight} message{'s' if pace.in_flight > 1 else ''} in flight"
    holding = [device for device in known or () if device.waiting or device.collected]
    if not holding:
        return Gate("waiting for results", words=f"waiting for the next tick to read the results; {flying}", soon=True)
    absent = min(holding, key=lambda device: (not device.is_late(pace.now), device.last_seen_at or device.oldest_at))
    return Gate(
        f"waiting for device name={absent.name!r}",
        words=f"waiting for device {absent.name!r}, {absent.seen(pace.now)}; {flying}",
        soon=not absent.is_late(pace.now),
    )


def span(length: timedelta) -> str:
    """`12 s`, `4 min`, `7 h 12 min`, `3 d 4 h`; nothing is shorter than 0 s."""
    seconds = max(int(length.total_seconds()), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if hours == 0:
        return f"{minutes} min"
    big, small = (f"{hours} h", f" {minutes % 60} min") if days == 0 else (f"{days} d", f" {hours % 24} h")
    return big + ("" if small.startswith(" 0 ") else small)


def closed(pace: Pace | None) -> Gate | None:
    """The gate that holds everything, also what waits in the queue: no settings, paused, or quiet hours."""
    if pace is None:
        return Gate("no settings: outreach_settings has no row with id 1; run `python db.py migrate`")
    if pace.settings.paused:
        return Gate("paused")
    hours = quiet_hours(*pace.settings[1:4])
    if hours and hours.cover(pace.now):
        return Gate("quiet hours", hours.next(pace.now, covered=False))
    return None


def next_quiet_hours(pace: Pace) -> datetime | None:
    """When quiet hours begin next; None without any."""
    hours = quiet_hours(*pace.settings[1:4])
    return hours.next(pace.now, covered=True) if hours else None


@functools.lru_cache(maxsize=1)  # so that what disables them is warned of once, not every tick
def quiet_hours(start: str | None, end: str | None, zone: str | None) -> QuietHours | None:
    """The settings' quiet hours; None when they are not set, are of no length, or cannot be read."""
    if problem := quiet_hours_problem(start, end, zone):
        logger.warning("quiet hours are disabled start=%r end=%r tz=%r; %s", start, end, zone, problem)
    if problem or not (start and end):
        return None
    return QuietHours(_minute_of_day(start), _minute_of_day(end), ZoneInfo(zone) if zone else None)


def quiet_hours_problem(start: str | None, end: str | None, zone: str | None) -> str | None:
    """Say why these settings amount to no quiet hours, and what to do; None when they are fine, or not set."""
    if not start and not end:
        return None
    try:
        is_same = _minute_of_day(start or "") == _minute_of_day(end or "")
        ZoneInfo(zone or "UTC")
    except (ValueError, KeyError, OSError) as error:  # the last two are ZoneInfo's, for an unknown name
        return f"they cannot be read: {error}; set both to HH:MM and quiet_hours_tz to an IANA name or NULL"
    return (
        "start and end are the same, which means no quiet hours; to stop sending use paused = true" if is_same else None
    )


def _minute_of_day(text: str) -> int:
    match = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])(:00)?", text.strip())  # seconds: a column of type TIME
    if not match:
        raise ValueError(f"{text!r} is not HH:MM")
    return int(match[1]) * 60 + int(match[2])


def usages(pace: Pace) -> list[Usage]:
    """Each limit that is set: what was sent in its window, and everything in flight, counts against it.

    Counting what is in flight is what keeps a Mac that was off all day from sending a burst when it wakes.
    """
    found = []
    for name, window in WINDOWS.items():
        most = getattr(pace.settings, name)
        if most is None:
            continue
        recent = bisect.bisect_left(pace.sent, window, key=pace.now.__sub__)  # newest first: ages ascend
        used = recent + pace.in_flight
        # The place that falls free is that of the send with most - in_flight newer ones or fewer.
        leaver = most - pace.in_flight - 1
        free_at = pace.sent[leaver] + window if 0 <= leaver < recent else None
        found.append(Usage(name, most, used, free_at if used >= most else None))
    return found


def limited(pace: Pace) -> Gate | None:
    """The limit that is reached; of several, the one that opens last."""
    reached = [usage for usage in usages(pace) if usage.used >= usage.most]
    if not reached:
        return None
    last = max(reached, key=lambda usage: (usage.free_at or datetime.max.replace(tzinfo=UTC), usage.most == 0))
    return Gate(
        f"limit reached limit={last.limit} used={last.used} of={last.most}",
        last.free_at,
        f"{last.limit} reached, {last.used} of {last.most}" if last.most else f"{last.limit} is 0",
        soon=last.most > 0 and last.free_at is None,
    )


def room(pace: Pace) -> int | None:
    """How many items may go now before a limit is reached; None: no limit is set."""
    return min((max(usage.most - usage.used, 0) for usage in usages(pace)), default=None)


def gap(pace: Pace, batch: Batch) -> Gate | None:
    """What keeps a batch from its next item for the sake of min_gap_seconds between two of its sends."""
    seconds = pace.settings.min_gap_seconds or 0
    if seconds <= 0:
        return None
    if batch.in_flight:
        return Gate("minimum gap: the batch has an item in flight", soon=True)
    opens = batch.last_sent_at + timedelta(seconds=seconds) if batch.last_sent_at else pace.now
    return Gate("minimum gap", opens, f"minimum gap of {seconds} s") if opens > pace.now else None


def spaced(pace: Pace, waiting: Sequence[Batch]) -> Gate | None:
    """The gap of all batches that have something to send, if each keeps one now: the first that ends by time."""
    gaps = []
    for batch in waiting:
        if batch.pending:
            gate = gap(pace, batch)
            if gate is None:
                return None
            gaps.append(gate)
    return min(gaps, key=lambda gate: gate.until or datetime.max.replace(tzinfo=UTC), default=None)


def turns(pace: Pace, waiting: Sequence[Batch]) -> list[Batch]:
    """The batches that may have their turn now, in its order, before limits."""
    return [batch for batch in waiting if batch.pending and gap(pace, batch) is None]


def take_turns(
    pace: Pace, waiting: Sequence[Batch], claim: Callable[[Sequence[str]], int]
) -> tuple[Pace, Sequence[Batch]]:
    """Give each batch its turn while there is room; return the pace after it, and the batches that had none.

    `claim` claims the next item of each of the batches it is given, and returns how many had one.
    """
    waiting = turns(pace, waiting)
    while waiting and not limited(pace):
        # Only a batch with nobody left to write to gives its place to the next one; else this runs once.
        places = room(pace)
        turn, waiting = waiting[:places], waiting[places:] if places else []
        pace = pace._replace(in_flight=pace.in_flight + claim([batch.id for batch in turn]))
    return pace, waiting
