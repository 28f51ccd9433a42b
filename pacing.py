"""Apply the rules of outreach_settings: decide which batch sends next, or which hold stops sending.

Used by the dispatcher, which follows the decision, and by report.py and forecast.py, which explain and predict it.
Reads outreach_settings, outreach_batches, outreach_batch_items, icloud.devices and icloud.send_queue; writes nothing.
All datetimes are aware, and `now` is the database's. Example:

    snapshot = pacing.read_snapshot(quinn)
    decision = pacing.decide(snapshot, pacing.batches(quinn, snapshot))
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import db
import quiet_times
import recipient_groups
from recipient_groups import Group

WINDOWS = {
    "max_per_minute": timedelta(minutes=1),
    "max_per_hour": timedelta(hours=1),
    "max_per_day": timedelta(days=1),
}
NEW_CONTACT_WINDOWS = {
    "max_new_contacts_per_hour": timedelta(hours=1),
    "max_new_contacts_per_day": timedelta(days=1),
}
NO_DEVICE = "there is no device: `python db.py add-device NAME` makes one"
# A device is late if it was not seen, or has kept a message without a result, for longer than this.
DEVICE_LATE_AFTER = timedelta(minutes=10)
DEVICE_GONE_AFTER = timedelta(days=1)  # skip a device that was not seen for this long, if another one was
# Codes of holds.
DEVICE_PROBLEM, NOT_BEGUN, QUIET_HOURS = "device problem", "batch not begun", "quiet hours"
QUIET_FOR_RECIPIENTS, NO_HOUR = "quiet for recipients", "no hour for recipients"
SHORT_HOLD = timedelta(minutes=2)  # a shorter hold is a normal pause between two sends
# The dispatcher counts as not running if its heartbeat is older than MISSED_TICKS intervals plus HEARTBEAT_GRACE.
MISSED_TICKS = 3
HEARTBEAT_GRACE = timedelta(seconds=10)


class Settings(NamedTuple):
    """The row of outreach_settings. A limit of None means no limit; quiet hours are `HH:MM`.

    `approval_days`: an approval lapses after so many days; None: never.
    """

    paused: bool
    quiet_hours_start: str | None
    quiet_hours_end: str | None
    quiet_hours_tz: str | None
    max_per_minute: int | None
    max_per_hour: int | None
    max_per_day: int | None
    min_gap_seconds: int | None
    device_id: str | None
    approval_days: int | None = None
    quiet_hours_of: str | None = None
    quiet_days: str | None = None
    max_new_contacts_per_hour: int | None = None
    max_new_contacts_per_day: int | None = None
    max_per_client_per_week: int | None = None

    @property
    def quiet_times(self) -> quiet_times.QuietTimes:
        return quiet_times.read(
            self.quiet_hours_start, self.quiet_hours_end, self.quiet_hours_tz, self.quiet_hours_of, self.quiet_days
        )

    @property
    def limits(self) -> dict[str, int]:
        """Return the limits that are set, by name, shortest window first."""
        return self._limits_of(WINDOWS)

    @property
    def new_contact_limits(self) -> dict[str, int]:
        """Return the limits on new contacts that are set, by name, shortest window first."""
        return self._limits_of(NEW_CONTACT_WINDOWS)

    @property
    def is_by_recipient(self) -> bool:
        """Return whether some items of a batch may go while others must wait, because of who they are for."""
        return self.quiet_times.of != "sender" or bool(self.new_contact_limits)

    def _limits_of(self, windows: Mapping[str, timedelta]) -> dict[str, int]:
        values = {name: getattr(self, name) for name in windows}
        return {name: value for name, value in values.items() if value is not None}


class Snapshot(NamedTuple):
    """The input of the rules.

    `sent`: when the last day's messages were sent, or ended with an unknown outcome, which counts as sent; newest
    first, as many as the largest limit needs. `claimed_since`: the time of the oldest claim. `last_tick`: the
    heartbeat, written at the start of a tick. `last_synced` and `last_dispatched`: when each job last succeeded.
    `new_in_flight` and `new_sent`: the same as `in_flight` and `sent`, of first messages to clients. `groups`: those
    of the pending items, with the number of their items if it is known; empty unless the settings need them.
    """

    settings: Settings
    now: datetime
    in_flight: int
    sent: Sequence[datetime]
    claimed_since: datetime | None = None
    last_tick: datetime | None = None
    last_synced: datetime | None = None
    last_dispatched: datetime | None = None
    new_in_flight: int = 0
    new_sent: Sequence[datetime] = ()
    groups: Mapping[Group, int] = {}


class Batch(NamedTuple):
    """A sending batch. `last_sent_at` includes unknown outcomes; it is None while min_gap_seconds is not set.

    `send_from`: nothing is sent before it. `ends_at`: nothing is sent after it (send_until, or the end of the
    approval). `first_left`: how many messages may go before the batch pauses itself; None if it has no first_n.
    `held`: why none of its pending items may go now, because of their recipients; None: one may. `is_known_due`:
    one of those that may go is for a client who was written to before.
    """

    id: str
    pending: bool
    in_flight: bool
    last_sent_at: datetime | None
    send_from: datetime | None = None
    ends_at: datetime | None = None
    first_left: int | None = None
    held: "Hold | None" = None
    is_known_due: bool = True


class Device(NamedTuple):
    """A device and its queued rows.

    `waiting`: rows not collected. `collected`: rows without a result. `oldest_at`: when the oldest of both was made.
    `problem`: the problem that the Mac has reported, since `problem_at`. `version`: the version of its sender.
    """

    id: str
    name: str
    last_seen_at: datetime | None
    waiting: int
    collected: int
    oldest_at: datetime | None
    problem: str | None = None
    problem_at: datetime | None = None
    version: str | None = None

    def is_late(self, now: datetime) -> bool:
        """Return whether it has rows, and was not seen, or has kept a row without a result, for DEVICE_LATE_AFTER."""
        if self.oldest_at is None:
            return False
        is_unseen = self.last_seen_at is None or now - self.last_seen_at > DEVICE_LATE_AFTER
        return is_unseen or now - self.oldest_at > DEVICE_LATE_AFTER

    @property
    def complaint(self) -> str:
        return f"{self.name} says: {(self.problem or '').rstrip('.')}"

    def seen(self, now: datetime) -> str:
        return f"last seen {format_duration(now - self.last_seen_at)} ago" if self.last_seen_at else "never seen"


class Hold(NamedTuple):
    """A rule that stops sending now.

    `code`: its name in the log. `until`: when it ends, if only time has to pass. `message`: a text for people.
    `clears_itself`: it ends without an operator, but its end is unknown. `details`: figures for the log. `next_count`:
    how many items may go at `until`, if it is known.
    """

    code: str
    until: datetime | None = None
    message: str = ""
    clears_itself: bool = False
    details: str = ""
    next_count: int | None = None

    def __str__(self) -> str:
        until = f"until={self.until.isoformat(timespec='seconds')}" if self.until else ""
        return " ".join(part for part in (self.code, self.details, until) if part)

    @property
    def needs_operator(self) -> bool:
        return self.until is None and not self.clears_itself

    def is_long(self, now: datetime) -> bool:
        """Return whether the hold needs an operator or lasts longer than SHORT_HOLD."""
        return self.needs_operator or (self.until is not None and self.until - now > SHORT_HOLD)


# A hold if sending is stopped; else the batch that is served next; None if no item is pending.
Decision = Hold | Batch | None


class LimitUsage(NamedTuple):
    """The usage of one limit. `frees_at`: if the limit is reached, when a send leaves its window; None if unknown."""

    limit: str
    maximum: int
    used: int
    frees_at: datetime | None


# --- reading ------------------------------------------------------------------------------------------
# schema.sql explains the OFFSET 0 in an EXISTS.


def read_snapshot(quinn: Any) -> Snapshot | None:
    """Read the settings and the items that count against the limits; None if the settings row is missing.

    Queued and claimed items are in flight. A claimed item counts because its enqueue may have made a row although the
    response was lost.
    """
    sql = """
        SELECT paused, quiet_hours_start::text, quiet_hours_end::text, quiet_hours_tz,
               max_per_minute, max_per_hour, max_per_day, min_gap_seconds, device_id, approval_days,
               quiet_hours_of, quiet_days, max_new_contacts_per_hour, max_new_contacts_per_day, max_per_client_per_week,
               now(),
               (SELECT count(*) FROM outreach_batch_items WHERE status = 'queued')
               + (SELECT count(*) FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL),
               ARRAY((SELECT sent_at FROM outreach_batch_items
                       WHERE status = 'sent' AND sent_at > now() - interval '1 day'
                       ORDER BY sent_at DESC
                       LIMIT COALESCE(GREATEST(max_per_minute, max_per_hour, max_per_day), 0))
                      UNION ALL
                     (SELECT outcome_unknown_at FROM outreach_batch_items
                       WHERE outcome_unknown_at > now() - interval '1 day'
                       ORDER BY outcome_unknown_at DESC
                       LIMIT COALESCE(GREATEST(max_per_minute, max_per_hour, max_per_day), 0))
                      ORDER BY 1 DESC
                      LIMIT COALESCE(GREATEST(max_per_minute, max_per_hour, max_per_day), 0)),
               (SELECT min(claimed_at) FROM outreach_batch_items WHERE status = 'pending' AND claimed_at IS NOT NULL),
               last_tick_at, last_synced_at, last_dispatched_at,
               (SELECT count(*) FILTER (WHERE new_contact) FROM outreach_batch_items WHERE status = 'queued')
               + (SELECT count(*) FILTER (WHERE new_contact) FROM outreach_batch_items
                   WHERE status = 'pending' AND claimed_at IS NOT NULL),
               ARRAY((SELECT sent_at FROM outreach_batch_items
                       WHERE status = 'sent' AND new_contact AND sent_at > now() - interval '1 day'
                       ORDER BY sent_at DESC
                       LIMIT COALESCE(GREATEST(max_new_contacts_per_hour, max_new_contacts_per_day), 0))
                      UNION ALL
                     (SELECT outcome_unknown_at FROM outreach_batch_items
                       WHERE outcome_unknown_at > now() - interval '1 day' AND new_contact
                       ORDER BY outcome_unknown_at DESC
                       LIMIT COALESCE(GREATEST(max_new_contacts_per_hour, max_new_contacts_per_day), 0))
                      ORDER BY 1 DESC
                      LIMIT COALESCE(GREATEST(max_new_contacts_per_hour, max_new_contacts_per_day), 0))
          FROM outreach_settings
         WHERE id = 1
    """
    rows = db.query(quinn, sql)
    columns = len(Settings._fields)
    return Snapshot(Settings(*rows[0][:columns]), *rows[0][columns:]) if rows else None


def read_groups(quinn: Any, snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with the groups of the pending items, if the settings need them."""
    if not snapshot.settings.is_by_recipient:
        return snapshot
    return snapshot._replace(groups=dict.fromkeys(recipient_groups.read(quinn), 0))


def batches(quinn: Any, snapshot: Snapshot | None = None) -> list[Batch]:
    """Read the sending batches, least recently served first. The dispatcher serves them in this order.

    A composed batch (with a digest) is left out until its owner has approved it, whatever its status. `snapshot`: with
    groups, to say of each batch whether one of its items may go now.
    """
    sql = """
        WITH gap AS (
            SELECT min_gap_seconds AS seconds, approval_days FROM outreach_settings WHERE id = 1
        ), unknown AS MATERIALIZED (
            SELECT batch_id, outcome_unknown_at
              FROM outreach_batch_items
             WHERE outcome_unknown_at > now() - (SELECT seconds FROM gap) * interval '1 second'
        ), due AS MATERIALIZED (
            SELECT zones::text[] AS time_zones, is_new
              FROM unnest(%(zones)s::text[], %(is_new)s::boolean[]) AS due (zones, is_new)
        )
        SELECT id,
               EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending' OFFSET 0),
               EXISTS (SELECT FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'queued' OFFSET 0)
               OR EXISTS (SELECT FROM outreach_batch_items
                           WHERE batch_id = batch.id AND status = 'pending' AND claimed_at IS NOT NULL OFFSET 0),
               CASE WHEN gap.seconds > 0 THEN GREATEST(
                   (SELECT sent_at FROM outreach_batch_items
                     WHERE batch_id = batch.id AND status = 'sent'
                     ORDER BY sent_at DESC
                     LIMIT 1),
                   (SELECT max(outcome_unknown_at) FROM unknown WHERE batch_id = batch.id))
               END,
               CASE WHEN digest IS NOT NULL THEN send_from END,
               CASE WHEN digest IS NOT NULL
                    THEN LEAST(send_until, approved_at + gap.approval_days * interval '1 day') END,
               CASE WHEN digest IS NOT NULL AND first_n IS NOT NULL THEN first_n
                    - (SELECT count(*) FROM outreach_batch_items
                        WHERE batch_id = batch.id AND status = 'sent'
                          AND sent_at > COALESCE(resumed_at, '-infinity'))
                    - (SELECT count(*) FROM outreach_batch_items
                        WHERE batch_id = batch.id AND outcome_unknown_at > COALESCE(resumed_at, '-infinity')
                          AND CASE status WHEN 'failed' THEN true END)
                    - (SELECT count(*) FROM outreach_batch_items
                        WHERE batch_id = batch.id AND status = 'queued')
                    - (SELECT count(*) FROM outreach_batch_items
                        WHERE batch_id = batch.id AND status = 'pending' AND claimed_at IS NOT NULL)
               END,
               NOT %(in_groups)s OR EXISTS (
                   SELECT FROM due
                    WHERE EXISTS (SELECT FROM outreach_batch_items
                                   WHERE status = 'pending' AND time_zones = due.time_zones
                                     AND new_contact = due.is_new AND batch_id = batch.id OFFSET 0)),
               NOT %(is_new_limited)s OR EXISTS (
                   SELECT FROM due
                    WHERE NOT due.is_new
                      AND EXISTS (SELECT FROM outreach_batch_items
                                   WHERE status = 'pending' AND time_zones = due.time_zones
                                     AND new_contact = due.is_new AND batch_id = batch.id OFFSET 0))
          FROM outreach_batches AS batch, gap
         WHERE status = 'sending' AND NOT dry_run AND (digest IS NULL OR approved_at IS NOT NULL)
         ORDER BY last_served_at NULLS FIRST, created_at, id
    """
    due = due_groups(snapshot) if snapshot else None
    is_new_limited = due is not None and bool(snapshot and snapshot.settings.new_contact_limits)
    rows = db.query(quinn, sql, {**recipient_groups.parameters(due), "is_new_limited": is_new_limited})
    not_due = (
        {group: count for group, count in snapshot.groups.items() if group not in due}
        if snapshot and due is not None
        else {}
    )
    held = recipients_hold(snapshot, not_due) if snapshot else None
    held = held or Hold("looking up recipients", message="the next tick looks its recipients up", clears_itself=True)
    return [Batch(*row[:-2])._replace(held=None if row[-2] else held, is_known_due=row[-1]) for row in rows]


def devices(icloud: Any) -> list[Device]:
    """Read every device with the number of its queued rows, oldest device first."""
    sql = """
        SELECT device.id, device.name, device.last_seen_at,
               count(message.id) FILTER (WHERE message.collected_at IS NULL),
               count(message.id) FILTER (WHERE message.collected_at IS NOT NULL),
               min(message.created_at),
               device.problem, device.problem_at, device.version
          FROM icloud.devices AS device
          LEFT JOIN icloud.send_queue AS message ON message.device_id = device.id AND message.status = 'queued'
         GROUP BY device.id, device.name, device.last_seen_at, device.problem, device.problem_at, device.version,
                  device.created_at
         ORDER BY device.created_at, device.id
    """
    return [Device(*row) for row in db.query(icloud, sql)]


def living(known: Sequence[Device], now: datetime) -> list[Device]:
    """Return the devices that were seen within DEVICE_GONE_AFTER; all of them if none was."""
    seen = [device for device in known if device.last_seen_at and now - device.last_seen_at < DEVICE_GONE_AFTER]
    return seen or list(known)


# --- the decision -------------------------------------------------------------------------------------


def decide(
    snapshot: Snapshot | None,
    waiting: Sequence[Batch],
    known: Sequence[Device] | None = None,
    interval: timedelta | None = None,
) -> Decision:
    """Return the hold that stops sending now, else the batch that is served next; None if no item is pending.

    `waiting` and `known` are the results of batches() and devices() (None: could not be read). Only status.py passes
    `interval`, the time between two ticks, because it cannot assume that the dispatcher runs. The order:
    1. device_problem_hold() (status.py only)
    2. heartbeat_hold() (status.py only)
    3. global_hold()
    4. server_outage_hold() (status.py only)
    5. the batch of an item that an earlier tick claimed, and that may go now
    6. None, or results_hold(), if no item is pending
    7. limit_hold()
    8. all_batches_hold(): each batch is held by its times, its first messages, its recipients or the gap
    9. there is no device
    """
    hold = global_hold(snapshot)
    if snapshot is None:
        return hold
    if interval:
        hold = (
            device_problem_hold(known or (), snapshot.now)
            or heartbeat_hold(snapshot, interval)
            or hold
            or server_outage_hold(snapshot, interval)
        )
    if hold:
        return hold
    if snapshot.claimed_since:
        claimed = [batch for batch in waiting if batch.pending and batch.in_flight]
        if due := [batch for batch in claimed if batch_time_hold(snapshot, batch) is None]:
            return due[0]
    if not any(batch.pending for batch in waiting):
        return results_hold(snapshot, known) if snapshot.in_flight else None
    hold = limit_hold(snapshot) or all_batches_hold(snapshot, waiting)
    if hold and hold.clears_itself and snapshot.in_flight:
        return results_hold(snapshot, known)
    if hold is None and known is not None and not known:
        return Hold("no device", message=NO_DEVICE)
    return hold or next(eligible_batches(snapshot, waiting))


def device_problem_hold(known: Sequence[Device], now: datetime) -> Hold | None:
    """Return the hold of devices that cannot send and say why; None while a living one has no problem."""
    said = [device.complaint for device in living(known, now) if device.problem]
    if not said or len(said) < len(living(known, now)):
        return None
    return Hold(DEVICE_PROBLEM, message="; ".join(said))


def heartbeat_hold(snapshot: Snapshot, interval: timedelta) -> Hold | None:
    """Return a hold if the dispatcher does not run, or if one of its jobs fails at every tick."""
    if snapshot.last_tick is None:
        return Hold("dispatcher not running", message="it has not run yet")
    patience = MISSED_TICKS * interval + HEARTBEAT_GRACE
    if snapshot.now - snapshot.last_tick > patience:
        since = format_duration(snapshot.now - snapshot.last_tick)
        return Hold("dispatcher not running", message=f"last tick {since} ago")
    for job, last in (("sync", snapshot.last_synced), ("dispatch", snapshot.last_dispatched)):
        if last is None or snapshot.now - last > patience:
            since = f"for {format_duration(snapshot.now - last)}" if last else "since its first run"
            return Hold(f"{job} job fails", message=f"the dispatcher runs, and its {job} job has failed {since}")
    return None


def server_outage_hold(snapshot: Snapshot, interval: timedelta) -> Hold | None:
    """Return a hold if a claim is older than one tick: the server is unavailable."""
    if snapshot.claimed_since is None or snapshot.now - snapshot.claimed_since <= interval:
        return None
    since = format_duration(snapshot.now - snapshot.claimed_since)
    return Hold("server unavailable", message=f"the send queue server has been unavailable for {since}")


def results_hold(snapshot: Snapshot, known: Sequence[Device] | None) -> Hold:
    """Return the hold that lasts until results arrive. Name the device that is expected to report them."""
    flying = f"{snapshot.in_flight} message{'s' if snapshot.in_flight > 1 else ''} in flight"
    holding = [device for device in known or () if device.waiting or device.collected]
    if not holding:
        message = f"waiting for the next tick to read the results; {flying}"
        return Hold("waiting for results", message=message, clears_itself=True)
    slowest = min(
        holding,
        key=lambda device: (
            device.problem is None, not device.is_late(snapshot.now), device.last_seen_at or device.oldest_at,
        ),
    )  # fmt: skip
    if slowest.problem:
        return Hold(DEVICE_PROBLEM, message=f"{slowest.complaint}; {flying}")
    return Hold(
        f"waiting for device name={slowest.name!r}",
        message=f"waiting for device {slowest.name!r}, {slowest.seen(snapshot.now)}; {flying}",
        clears_itself=not slowest.is_late(snapshot.now),
    )


def global_hold(snapshot: Snapshot | None) -> Hold | None:
    """Return the hold of all batches: no settings, paused, or the sender's quiet hours. It applies to queued rows, too.

    It begins a little before quiet hours do (quiet_times.MARGIN).
    """
    if snapshot is None:
        return Hold("no settings", details="outreach_settings has no row with id 1; run `python db.py migrate`")
    if snapshot.settings.paused:
        return Hold("paused")
    times = snapshot.settings.quiet_times
    if times.of == "recipient" or times.is_open((), snapshot.now):
        return None
    return Hold(QUIET_HOURS, times.next_open((), snapshot.now), "quiet day" if times.is_quiet_day(snapshot.now) else "")


# --- limits and the gap -------------------------------------------------------------------------------


def limit_usage(snapshot: Snapshot) -> list[LimitUsage]:
    """Return the usage of each limit that is set: the sends in its window plus all items in flight.

    If items in flight did not count, a Mac that was off all day would send a burst when it is on again.
    """
    return _usage(snapshot.settings.limits, WINDOWS, snapshot.now, snapshot.in_flight, snapshot.sent)


def new_contact_usage(snapshot: Snapshot) -> list[LimitUsage]:
    """Return the usage of each limit on new contacts that is set."""
    limits = snapshot.settings.new_contact_limits
    return _usage(limits, NEW_CONTACT_WINDOWS, snapshot.now, snapshot.new_in_flight, snapshot.new_sent)


def _usage(
    limits: Mapping[str, int],
    windows: Mapping[str, timedelta],
    now: datetime,
    in_flight: int,
    sent: Sequence[datetime],
) -> list[LimitUsage]:
    found = []
    for name, maximum in limits.items():
        window = windows[name]
        recent = bisect.bisect_left(sent, window, key=now.__sub__)  # newest first: ages ascend
        used = recent + in_flight
        # A place becomes free when the send that has `maximum - in_flight - 1` newer ones leaves the window.
        leaver = maximum - in_flight - 1
        frees_at = sent[leaver] + window if 0 <= leaver < recent else None
        found.append(LimitUsage(name, maximum, used, frees_at if used >= maximum else None))
    return found


def limit_hold(snapshot: Snapshot) -> Hold | None:
    """Return the hold of the limit that is reached; if several are, of the one that lasts longest."""
    return _reached(limit_usage(snapshot))


def new_contacts_hold(snapshot: Snapshot) -> Hold | None:
    """Return the hold of new contacts: the limit that is reached, and lasts longest."""
    return _reached(new_contact_usage(snapshot))


def _reached(usages: Sequence[LimitUsage]) -> Hold | None:
    reached = [usage for usage in usages if usage.used >= usage.maximum]
    if not reached:
        return None
    last = max(reached, key=lambda usage: (usage.frees_at or datetime.max.replace(tzinfo=UTC), usage.maximum == 0))
    return Hold(
        f"limit reached limit={last.limit}",
        last.frees_at,
        f"{last.limit} reached, {last.used} of {last.maximum}" if last.maximum else f"{last.limit} is 0",
        clears_itself=last.maximum > 0 and last.frees_at is None,
        details=f"used={last.used} of={last.maximum}",
    )


def remaining_capacity(snapshot: Snapshot) -> int | None:
    """Return how many items may go now before a limit is reached; None: no limit is set."""
    return _capacity(limit_usage(snapshot))


def remaining_new_contacts(snapshot: Snapshot) -> int | None:
    """Return how many new contacts may be written to now; None: no limit on them is set."""
    return _capacity(new_contact_usage(snapshot))


def _capacity(usages: Sequence[LimitUsage]) -> int | None:
    return min((max(usage.maximum - usage.used, 0) for usage in usages), default=None)


# --- recipients ---------------------------------------------------------------------------------------


def due_groups(snapshot: Snapshot) -> list[Group] | None:
    """Return the groups whose items may go now; None if those of all groups may."""
    if not snapshot.settings.is_by_recipient:
        return None
    limit = new_contacts_hold(snapshot)
    due = [group for group in snapshot.groups if _opens_at(snapshot, group, limit) == snapshot.now]
    return due if len(due) < len(snapshot.groups) else None


def _opens_at(snapshot: Snapshot, group: Group, limit: Hold | None) -> datetime | None:
    """Return when an item of a group may go: now, or later; None if only a result, or a person, can tell.

    `limit`: new_contacts_hold().
    """
    if group.time_zones is None:
        return None
    start = snapshot.now
    if limit and group.is_new:
        if limit.until is None:
            return None
        start = limit.until
    return snapshot.settings.quiet_times.next_open(group.time_zones, start)


def recipients_hold(snapshot: Snapshot, groups: Mapping[Group, int]) -> Hold | None:
    """Return the hold of items in these groups if none of them may go now, because of their recipients.

    `groups`: with the number of items of each. Items of which the dispatcher has not looked up the recipient yet are
    not held by this.
    """
    if not snapshot.settings.is_by_recipient or not groups or any(group.time_zones is None for group in groups):
        return None
    times, now = snapshot.settings.quiet_times, snapshot.now
    limit = new_contacts_hold(snapshot)
    opens = {group: _opens_at(snapshot, group, limit) for group in groups}
    if now in opens.values():
        return None
    total = sum(groups.values())
    first = min((moment for moment in opens.values() if moment), default=None)
    asleep = [group for group in groups if not times.is_open(group.time_zones or (), now)]
    if limit and len(asleep) < len(groups):
        quiet = sum(groups[group] for group in asleep)
        where = f"; it is quiet where the other {quiet} are" if quiet else ""
        message = f"{limit.message}, and {_count(total - quiet)} to new contacts{where}"
        return limit._replace(until=first, message=message, clears_itself=limit.clears_itself and first is None)
    if first is None and all(times.next_open(group.time_zones or (), now) is None for group in groups):
        who = "1 remaining recipient" if total == 1 else f"all {total} remaining recipients"
        return Hold(NO_HOUR, message=f"{who}: no hour is outside quiet hours in all time zones that count")
    message = (
        "quiet where the remaining recipient is" if total == 1 else f"quiet where all {total} remaining recipients are"
    )
    next_count = sum(groups[group] for group, moment in opens.items() if moment == first)
    return Hold(QUIET_FOR_RECIPIENTS, first, message, clears_itself=first is None, next_count=next_count)


def _count(messages: int) -> str:
    return "the remaining message goes" if messages == 1 else f"{messages} remaining messages go"


# --- batches ------------------------------------------------------------------------------------------


def batch_gap_hold(snapshot: Snapshot, batch: Batch) -> Hold | None:
    """Return a hold if the batch's last send is less than min_gap_seconds ago, or one of its items is in flight."""
    seconds = snapshot.settings.min_gap_seconds or 0
    if seconds <= 0:
        return None
    if batch.in_flight:
        return Hold("minimum gap: the batch has an item in flight", clears_itself=True)
    ends = batch.last_sent_at + timedelta(seconds=seconds) if batch.last_sent_at else snapshot.now
    return Hold("minimum gap", ends, f"minimum gap of {seconds} s") if ends > snapshot.now else None


def batch_hold(snapshot: Snapshot, batch: Batch) -> Hold | None:
    """Return the hold of one batch: its times, its first messages, its recipients, or the gap."""
    if hold := batch_time_hold(snapshot, batch):
        return hold
    if batch.first_left is not None and batch.first_left <= 0:
        message = f"the first messages of batch {batch.id[:8]}… are on their way"
        return Hold("first messages", message=message, clears_itself=True)
    return batch.held or batch_gap_hold(snapshot, batch)


def batch_time_hold(snapshot: Snapshot, batch: Batch) -> Hold | None:
    """Return the hold of a composed batch before its send_from, after its send_until, or without a valid approval."""
    if batch.ends_at and batch.ends_at <= snapshot.now:
        message = f"the time of batch {batch.id[:8]}… is over: the next tick ends it"
        return Hold("batch is over", message=message, clears_itself=True)
    if batch.send_from and batch.send_from > snapshot.now:
        return Hold(NOT_BEGUN, batch.send_from, f"batch {batch.id[:8]}… begins")
    return None


def all_batches_hold(snapshot: Snapshot, waiting: Sequence[Batch]) -> Hold | None:
    """Return a hold if every batch that has pending items is held: the one that ends first.

    A batch that begins later is named last: what the others wait for may need an operator now.
    """
    holds = []
    for batch in waiting:
        if batch.pending:
            hold = batch_hold(snapshot, batch)
            if hold is None:
                return None
            holds.append(hold)
    if len(holds) > 1 and all(batch.held for batch in waiting if batch.pending):
        return recipients_hold(snapshot, snapshot.groups) or holds[0]
    latest = datetime.max.replace(tzinfo=UTC)
    return min(holds, key=lambda hold: (hold.code == NOT_BEGUN, hold.until or latest), default=None)


def eligible_batches(snapshot: Snapshot, waiting: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the batches that have pending items and no hold of their own, in their order. Limits are not checked."""
    return (batch for batch in waiting if batch.pending and batch_hold(snapshot, batch) is None)


def claim_round_robin(
    snapshot: Snapshot, waiting: Sequence[Batch], claim: Callable[[Snapshot, Sequence[str]], tuple[int, int]]
) -> tuple[Snapshot, bool]:
    """Claim one item of each eligible batch while the limits have capacity.

    Returns the snapshot after the claims, and whether eligible batches are left. `claim` gets the snapshot and batch
    ids, claims the next item of each batch that may go, and returns the number of claimed items, and of new contacts
    among them.
    """
    eligible = (
        batch
        for batch in eligible_batches(snapshot, waiting)
        # `snapshot` is that of the moment. If the limit on new contacts is reached, only known clients are left.
        if batch.is_known_due or remaining_new_contacts(snapshot) != 0
    )
    while not limit_hold(snapshot):
        # If a batch has only unreachable clients left, its capacity goes to the next batch. Otherwise this runs once.
        served = [batch.id for batch in itertools.islice(eligible, remaining_capacity(snapshot))]
        if not served:
            return snapshot, False
        claimed, new_contacts = claim(snapshot, served)
        snapshot = snapshot._replace(
            in_flight=snapshot.in_flight + claimed, new_in_flight=snapshot.new_in_flight + new_contacts
        )
    return snapshot, next(eligible, None) is not None


def format_duration(length: timedelta) -> str:
    """Return `12 s`, `4 min`, `7 h 12 min` or `3 d 4 h`; `0 s` for a negative length."""
    seconds = max(int(length.total_seconds()), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if hours == 0:
        return f"{minutes} min"
    big, small = (f"{hours} h", f" {minutes % 60} min") if days == 0 else (f"{days} d", f" {hours % 24} h")
    return big + ("" if small.startswith(" 0 ") else small)
