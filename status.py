"""Why is nothing sending? The verdict first, then each batch with a forecast of its end, each device, the limits.

Run by an operator, or by a monitor (--json). Needs only the two databases' URLs, and says so when one is down. Reads
both databases in read-only sessions and writes nothing; the gates are pacing's, the dispatcher's own. Example:

    python status.py --watch
"""

import argparse
import collections
import contextlib
import itertools
import math
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple, TypeVar, cast
from zoneinfo import ZoneInfo

import msgspec
import psycopg2
from psycopg2 import errors
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import db
import pacing
import service

WATCH_PAUSE = 2  # seconds between two looks of --watch
SHOWN = 20  # batches, devices: what fits a screen; --json has all
FAILURES_SHOWN = 5
PLAIN_WIDTH = 1000  # columns, where the output is no terminal: nothing is to be cut or wrapped
WIDE = 118  # columns from which a batch's whole id fits
# The forecast lets a device answer this long after a tick. Every moment between two ticks comes to the same.
ANSWER = timedelta(seconds=1)
# Above so many pending items, their handles are not looked up one by one: each counts as one that will be sent.
EXACT_ITEMS = 20_000
# A forecast stops after so much work, some 0.3 s of it, and goes on by the rate so far. A unit is a look at a batch;
# the others are multiples of it, as measured.
WORK = 1_000_000
GAP_WORK, ITEM_WORK = 6, 6  # a look at a batch with a gap; an item taken
TICK_WORK, NIGHT_WORK = 100, 4000  # a tick, whatever is in it; finding the end of quiet hours
NIGHT = "quiet hours"
CADENCE = "one message of a batch in each tick"
SENT, FAILED, SKIPPED = "s", "f", "k"  # what will become of an item

T = TypeVar("T")


# --- what is read -------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """A batch and its items by status; `last_served_at`, `created_at` and id are its place in the turns."""

    id: str
    status: str
    last_served_at: datetime | None
    created_at: datetime
    pending: int
    queued: int
    sent: int
    failed: int
    skipped: int

    @property
    def turn(self) -> tuple[datetime, datetime, str]:
        return self.last_served_at or datetime.min.replace(tzinfo=UTC), self.created_at, self.id


class Failure(msgspec.Struct, rename="camel"):
    """A reason why items of the last week failed, how many, and when last."""

    reason: str
    count: int
    last_at: datetime


class Quinn(NamedTuple):
    """One look at quinn. `plans`: what will become of each batch's pending items, in their order."""

    now: datetime
    pace: pacing.Pace | None
    waiting: list[pacing.Batch]
    counts: dict[str, Counts]
    plans: dict[str, str]
    claims: collections.Counter[str]
    flights: list[tuple[str, str]]
    others: dict[str, int]
    failures: list[Failure]
    exact: bool


class Problem(NamedTuple):
    """What is wrong with a database, and what to do about it."""

    what: str
    cure: str


class Icloud(NamedTuple):
    """One look at icloud. `ended`: the rows in flight that have a result, and when they were sent."""

    devices: list[pacing.Device]
    ended: dict[str, datetime | None]


def read_quinn(quinn: Any, batch_id: str | None) -> Quinn:
    """What quinn holds of the sending batches, and of `batch_id` whatever its status."""
    pace = pacing.read(quinn)
    counts = read_counts(quinn, batch_id)
    size = sum(batch.pending for batch in counts.values())
    known = list(counts) if size <= EXACT_ITEMS else [batch_id] if batch_id else []
    plans, claims = read_plans(quinn, known)
    return Quinn(
        now=db.query(quinn, "SELECT now()")[0][0],
        pace=pace,
        waiting=pacing.batches(quinn),
        counts=counts,
        plans={name: plans.get(name, SENT * batch.pending) for name, batch in counts.items()},
        claims=claims,
        flights=read_flights(quinn),
        others=read_others(quinn),
        failures=read_failures(quinn),
        exact=size <= EXACT_ITEMS,
    )


def read_flights(quinn: Any) -> list[tuple[str, str]]:
    """The batch and the queue row of each queued item."""
    sql = "SELECT batch_id, COALESCE(send_queue_id, '') FROM outreach_batch_items WHERE status = 'queued'"
    return [(batch_id, queue_id) for batch_id, queue_id in db.query(quinn, sql)]


def read_others(quinn: Any) -> dict[str, int]:
    """How many batches wait for their owner, by status."""
    sql = """
        SELECT CASE WHEN status = 'sending' THEN 'dry run' ELSE status END, count(*)
          FROM outreach_batches
         WHERE status IN ('draft', 'paused') OR (status = 'sending' AND dry_run)
         GROUP BY 1
    """
    return dict(db.query(quinn, sql))


def read_counts(quinn: Any, batch_id: str | None) -> dict[str, Counts]:
    sql = """
        WITH batch AS (
            SELECT id, status, last_served_at, created_at FROM outreach_batches
             WHERE (status = 'sending' AND NOT dry_run) OR id = %(batch_id)s::uuid
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
               COALESCE(sum(count) FILTER (WHERE item.status = 'skipped'), 0)::bigint
          FROM batch LEFT JOIN item ON item.batch_id = batch.id
         GROUP BY batch.id, batch.status, batch.last_served_at, batch.created_at
    """
    return {row[0]: Counts(*row) for row in db.query(quinn, sql, {"batch_id": batch_id})}


def read_plans(quinn: Any, batch_ids: Sequence[str]) -> tuple[dict[str, str], collections.Counter[str]]:
    """What will become of each pending item, a letter each, and how many of them are claimed."""
    sql = """
        SELECT item.batch_id, item.claimed_at IS NOT NULL,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = item.client_id AND is_primary),
               item.rendered_body = ''
          FROM outreach_batch_items AS item
         WHERE item.status = 'pending' AND item.batch_id = ANY (%(ids)s::uuid[])
         ORDER BY item.batch_id, item.created_at, item.id
    """
    rows = db.query(quinn, sql, {"ids": list(batch_ids)}) if batch_ids else []
    plans = {
        batch_id: "".join(outcome(handle, empty) for _, _, handle, empty in items)
        for batch_id, items in itertools.groupby(rows, lambda row: cast(str, row[0]))
    }
    return plans, collections.Counter(row[0] for row in rows if row[1])


def outcome(handle: str | None, empty: bool) -> str:
    """What the dispatcher and the server will make of an item with this primary handle."""
    if handle is None:
        return SKIPPED
    fits = 0 < len(handle) <= service.HANDLE_LENGTH and service.HANDLE.fullmatch(handle)
    return SENT if fits and not empty else FAILED


def read_failures(quinn: Any) -> list[Failure]:
    sql = """
        SELECT COALESCE(failure_reason, 'no reason given'), count(*), max(updated_at)
          FROM outreach_batch_items
         WHERE status = 'failed' AND updated_at > now() - interval '7 days'
         GROUP BY 1
         ORDER BY 3 DESC
         LIMIT %(most)s
    """
    return [Failure(*row) for row in db.query(quinn, sql, {"most": FAILURES_SHOWN})]


def read_icloud(icloud: Any, flights: Sequence[tuple[str, str]]) -> Icloud:
    ended = "SELECT id, sent_at FROM icloud.send_queue WHERE id = ANY (%(ids)s::uuid[]) AND status <> 'queued'"
    ids = [queue_id for _, queue_id in flights if service.is_uuid(queue_id)]  # the column is TEXT
    rows = db.query(icloud, ended, {"ids": ids}) if 0 < len(ids) <= EXACT_ITEMS else []
    return Icloud(pacing.devices(icloud), dict(rows))


def look(part: db.Part, read: Callable[[Any], T]) -> tuple[T | None, Problem | None]:
    """What `read` reads of a database in one read-only snapshot, or why it cannot."""
    try:
        with contextlib.closing(db.connect(db.url(part))) as conn:
            conn.set_session(isolation_level="REPEATABLE READ", readonly=True, autocommit=False)
            return read(conn), None
    except psycopg2.Error as error:
        return None, problem_of(part, error)


BLOCKERS = "SELECT pid, xact_start, query FROM pg_stat_activity ORDER BY xact_start"
# The problem and its remedy, by the error's class, or by the server's words, since one from connecting has no SQLSTATE.
PROBLEMS: list[tuple[tuple[type[psycopg2.Error], ...], str, str, str]] = [
    ((errors.UndefinedTable, errors.UndefinedColumn, errors.InvalidSchemaName), "",
     "is not complete", "run `python db.py migrate`"),
    ((errors.InsufficientPrivilege,), "", "refuses this role", "GRANT the tables' owner to it"),
    ((errors.LockNotAvailable, errors.DeadlockDetected), "", "is locked by another session",
     f"wait for it to end, such as a migration, or find it: {BLOCKERS}"),
    ((errors.QueryCanceled,), "", "answers too slowly",
     f"see what else it does: {BLOCKERS}; then run `python db.py migrate`, in case an index is missing"),
    ((errors.TooManyConnections,), "too many (clients|connections)|connection slots are reserved",
     "has no connection left", "close other sessions, or raise max_connections"),
    ((errors.CannotConnectNow, errors.AdminShutdown, errors.CrashShutdown),
     "is (shutting down|starting up)|in recovery mode|administrator command|not yet accepting",
     "is shutting down or starting", "look again in a moment; if it stays so, start PostgreSQL"),
]  # fmt: skip


def problem_of(part: db.Part, error: psycopg2.Error) -> Problem:
    """What is wrong with a database, by the error of a look at it."""
    words = (error.diag.message_primary or str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    for classes, phrases, what, cure in PROBLEMS:
        if isinstance(error, classes) or (phrases and error.pgcode is None and re.search(phrases, str(error))):
            return Problem(f"database {part} {what}", f"{words}; {cure}")
    cure = f"{words}; start PostgreSQL, mend {db.VARIABLES[part]}, or run this as the user sendqueue"
    return Problem(f"database {part} cannot be reached", cure)


# --- the forecast -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Course:
    """A batch's way through the forecast. `plan` from `at` on is still pending; `last`: when its last item ended."""

    batch: pacing.Batch
    turn: tuple[datetime, datetime, str]
    plan: str
    at: int = 0
    first: datetime | None = None
    last: datetime | None = None
    exact: bool = True

    @property
    def left(self) -> int:
        return len(self.plan) - self.at

    def skip(self, tick: datetime) -> None:
        """Pass over the items that have nobody to go to."""
        while self.plan.startswith(SKIPPED, self.at):
            self.at += 1
        self.last = None if self.left else tick

    def take(self, tick: datetime) -> bool:
        """Take the next item in the tick; whether it was sent."""
        is_sent = self.plan[self.at] == SENT
        self.at += 1
        if is_sent:
            self.first = self.first or tick
            self.batch = self.batch._replace(last_sent_at=tick + ANSWER)
        self.last = None if self.left else tick
        return is_sent


def play(
    pace: pacing.Pace, courses: Sequence[Course], tick: datetime, interval: timedelta, target: Course | None = None
) -> dict[str, timedelta]:
    """Play the dispatcher's ticks forward in memory until every course, or `target`, has ended.

    A device answers every message at once. Returns how long each gate held. A course that no tick can end, for
    the gate that holds then opens by no time, keeps `last` None.
    """
    start, work, look = tick, 0, GAP_WORK if pace.settings.min_gap_seconds else 1
    waits: collections.Counter[str] = collections.Counter()  # in intervals
    most = max((limit for limit in pace.settings[4:7] if limit is not None), default=0)
    sent = collections.deque(pace.sent[:most], maxlen=most)
    waiting = [course for course in courses if course.left]
    by_id = {course.batch.id: course for course in waiting}
    while waiting and (target is None or target.left):
        if work > WORK:
            open_for = tick - start - waits[NIGHT] * interval
            extrapolate(pace, courses, waiting, open_for, any(kind.startswith("limit") for kind in waits))
            break
        work += TICK_WORK
        pace = pace._replace(now=tick, in_flight=0, sent=sent)
        batches = [course.batch for course in waiting]
        verdict = pacing.verdict(pace, batches)
        if isinstance(verdict, pacing.Gate):
            if verdict.until is None:
                break
            ticks = max(math.ceil((verdict.until - tick) / interval), 1)
            work += NIGHT_WORK if verdict.reason == NIGHT else look * len(waiting)
            waits[verdict.kind] += ticks
            tick += ticks * interval
            continue
        taken, still = play_tick(pace, waiting, by_id)
        sent.extendleft([tick + ANSWER] * sum(course.take(tick) for course in taken))
        waiting = [course for course in still if course.left]
        work += 2 * look * len(batches) + ITEM_WORK * len(taken)
        waits[CADENCE] += 1
        tick += interval
    return {kind.removeprefix("limit reached limit="): ticks * interval for kind, ticks in waits.items()}


def play_tick(
    pace: pacing.Pace, waiting: Sequence[Course], by_id: dict[str, Course]
) -> tuple[list[Course], list[Course]]:
    """One tick: the courses whose next item is taken, and those that still have items, in the order of their turns."""
    rounds: list[list[Course]] = []
    taken: list[Course] = []

    def claim(turn: Sequence[str]) -> int:
        served = [by_id[batch_id] for batch_id in turn]
        for course in served:
            course.skip(pace.now)
        heads = [course for course in served if course.left]
        taken.extend(heads)
        # What is served in one statement has one last_served_at, and is in the order of its creation then.
        rounds.append(sorted(served, key=lambda course: course.turn[1:]))
        return len(heads)

    pacing.take_turns(pace, [course.batch for course in waiting], claim)
    served = list(itertools.chain(*rounds))
    ids = {course.batch.id for course in served}
    still = [course for course in waiting if course.batch.id not in ids] + served
    return taken, still


def extrapolate(
    pace: pacing.Pace, courses: Sequence[Course], waiting: Sequence[Course], open_for: timedelta, limited: bool
) -> None:
    """Let the unfinished courses end at the rate that they had while sending was open, and the limits allow.

    Where limits bind, the batches share them in turns: one that has n messages left ends when each of the others
    has sent n more, or all of its own. Where none does, a batch goes on at its own rate.
    """
    hours = pacing.quiet_hours(*pace.settings[1:4])
    open_share = 1 - (hours.end - hours.start) % 1440 / 1440 if hours else 1.0
    seconds = max(open_for.total_seconds(), 1.0)
    rate = sum(course.at for course in courses) / seconds * open_share
    for name, window in pacing.WINDOWS.items():
        if (most := getattr(pace.settings, name)) is not None:
            share = 1.0 if name == "max_per_day" else open_share
            rate = min(rate, most / window.total_seconds() * share)
    before, ahead = 0, 0
    by_length = sorted(waiting, key=lambda course: course.left)
    for index, course in enumerate(by_length):
        ahead += (course.left - before) * (len(by_length) - index)
        before = course.left
        course.exact = False
        own_rate = course.at / seconds * open_share
        with contextlib.suppress(OverflowError, ZeroDivisionError):
            needed = ahead / rate if limited else course.left / own_rate
            course.last = pace.now + timedelta(seconds=needed)


def forecast(
    quinn: Quinn, icloud: Icloud | None, interval: timedelta, target_id: str | None = None
) -> tuple[dict[str, Course], dict[str, timedelta]]:
    """Each sending batch's course from the next tick on, and how long each gate will hold.

    With `target_id`, that batch is sent too, whatever its status, and a pause is taken as over.
    """
    pace = cast(pacing.Pace, quinn.pace)
    waiting = list(quinn.waiting)
    if target_id and target_id not in {batch.id for batch in waiting}:
        turn = quinn.counts[target_id].turn
        place = sum(quinn.counts[batch.id].turn < turn for batch in waiting)
        waiting.insert(place, pacing.Batch(target_id, bool(quinn.plans[target_id]), False, None))
    if target_id:
        pace = pace._replace(settings=pace.settings._replace(paused=False))
    courses = {
        batch.id: Course(
            batch._replace(in_flight=False), quinn.counts[batch.id].turn, quinn.plans[batch.id], exact=quinn.exact
        )
        for batch in waiting
    }
    tick = max(pace.last_tick + interval, pace.now) if pace.last_tick else pace.now
    pace, tick = settle(quinn, icloud, pace, courses, tick, interval)
    waits = play(pace, list(courses.values()), tick, interval, courses[target_id] if target_id else None)
    return courses, waits


def settle(
    quinn: Quinn,
    icloud: Icloud | None,
    pace: pacing.Pace,
    courses: dict[str, Course],
    tick: datetime,
    interval: timedelta,
) -> tuple[pacing.Pace, datetime]:
    """Let what is in flight be sent: the queued now, if they were not before, the claimed in the next tick."""
    ended = icloud.ended if icloud else {}
    landed = []
    for batch_id, queue_id in quinn.flights:
        sent_at = ended.get(queue_id.lower(), pace.now)
        if sent_at:  # else it failed
            landed.append(sent_at)
            if course := courses.get(batch_id):
                course.batch = course.batch._replace(last_sent_at=max(sent_at, course.batch.last_sent_at or sent_at))
    claimed = [batch_id for batch_id in quinn.claims.elements() if batch_id in courses and not pacing.closed(pace)]
    for batch_id in claimed:
        course = courses[batch_id]
        if course.take(tick):
            landed.append(tick + ANSWER)
    for course in courses.values():
        course.last = None if course.left else tick
    if claimed:
        tick += interval
    return pace._replace(sent=sorted([*pace.sent, *landed], reverse=True), claimed_since=None), tick


# --- the report ---------------------------------------------------------------------------------------


class Verdict(msgspec.Struct, rename="camel"):
    """The first line. `state`: sending, held, idle or down; `gate`: its name, as in the dispatcher's log."""

    state: str
    sentence: str
    gate: str | None
    until: datetime | None
    batch_id: str | None
    needs_operator: bool
    advice: str | None


class BatchLine(msgspec.Struct, rename="camel"):
    """A sending batch. `gate`: what holds it, in a sentence's words; `finish`: None where no time can be told."""

    id: str
    pending: int
    queued: int
    sent: int
    failed: int
    skipped: int
    gate: str | None
    finish: datetime | None
    finish_is_exact: bool


class DeviceLine(msgspec.Struct, rename="camel"):
    """A device: messages it has not collected, messages without a result, the oldest of both."""

    id: str
    name: str
    last_seen_at: datetime | None
    waiting: int
    collected: int
    oldest_at: datetime | None


class LimitLine(msgspec.Struct, rename="camel"):
    """A limit, and when a place falls free if it is reached and time alone frees one."""

    limit: str
    most: int
    used: int
    free_at: datetime | None


class Report(msgspec.Struct, rename="camel"):
    """All that is shown. What a database that is down would tell is None."""

    now: datetime
    zone: str | None
    verdict: Verdict
    warnings: list[str]
    last_tick_at: datetime | None
    in_flight: int | None
    batches: list[BatchLine] | None
    not_sending: dict[str, int] | None
    limits: list[LimitLine] | None
    devices: list[DeviceLine] | None
    failures: list[Failure] | None


class Outlook(msgspec.Struct, rename="camel"):
    """What sending a batch would do, were it started now. `binds`: what holds it longest, nights aside."""

    batch_id: str
    status: str
    pending: int
    would_send: int
    would_skip: dict[str, int]
    would_fail: dict[str, int]
    first_at: datetime | None
    last_at: datetime | None
    is_exact: bool
    binds: str | None
    held_seconds: dict[str, int]
    notes: list[str]


def look_around(batch_id: str | None = None) -> tuple[Quinn | None, Icloud | None, list[Problem]]:
    """Both databases, each None with its problem when it cannot be reached."""
    quinn, quinn_problem = look("quinn", lambda conn: read_quinn(conn, batch_id))
    flights = quinn.flights if quinn else []
    icloud, icloud_problem = look("icloud", lambda conn: read_icloud(conn, flights))
    return quinn, icloud, [problem for problem in (quinn_problem, icloud_problem) if problem]


def report(interval: timedelta) -> Report:
    """One look, judged."""
    quinn, icloud, problems = look_around()
    pace = quinn.pace if quinn else None
    now = quinn.now if quinn else datetime.now(UTC)
    zone = pace.settings.quiet_hours_tz if pace else None
    clock = Clock(now, zone)
    devices = icloud.devices if icloud else None
    judged = pacing.verdict(pace, quinn.waiting, devices, interval) if quinn else None
    verdict = down(problems) if problems else told(judged, pace, interval, clock)
    beside = [told(judged, pace, interval, clock).sentence.rstrip(".")] if problems and quinn else []
    courses = forecast(quinn, icloud, interval)[0] if quinn and pace else {}
    return Report(
        now=now,
        zone=clock.name,
        verdict=verdict,
        warnings=warnings(quinn, devices, now) + beside,
        last_tick_at=pace.last_tick if pace else None,
        in_flight=pace.in_flight if pace else None,
        batches=[batch_line(quinn, courses.get(batch.id), batch, clock) for batch in quinn.waiting] if quinn else None,
        not_sending=quinn.others if quinn else None,
        limits=[LimitLine(*usage) for usage in pacing.usages(pace)] if pace else None,
        devices=[DeviceLine(*device) for device in devices] if devices is not None else None,
        failures=quinn.failures if quinn else None,
    )


def batch_line(quinn: Quinn, course: Course | None, batch: pacing.Batch, clock: "Clock") -> BatchLine:
    counts = quinn.counts[batch.id]
    gate = pacing.closed(quinn.pace)
    if quinn.pace and batch.pending and not gate:
        gate = pacing.gap(quinn.pace, batch) or pacing.limited(quinn.pace)
    return BatchLine(
        id=batch.id,
        pending=counts.pending,
        queued=counts.queued,
        sent=counts.sent,
        failed=counts.failed,
        skipped=counts.skipped,
        gate=words(gate, clock) if gate and batch.pending else None,
        finish=course.last if course else None,
        finish_is_exact=course.exact if course else False,
    )


def warnings(quinn: Quinn | None, devices: Sequence[pacing.Device] | None, now: datetime) -> list[str]:
    """What an operator has to mend although it holds nothing now."""
    found = []
    if quinn and quinn.pace:
        start, end, zone = quinn.pace.settings[1:4]
        if problem := pacing.quiet_hours_problem(start, end, zone):
            found.append(f"quiet hours are disabled: start={start!r} end={end!r} tz={zone!r}; {problem}")
    for device in devices or ():
        if device.is_late(now):
            kept = device.waiting + device.collected
            messages = "1 message" if kept == 1 else f"{kept} messages"
            found.append(f"device {device.name!r}, {device.seen(now)}, keeps {messages} waiting")
    if devices is not None and not devices:
        found.append(pacing.NO_DEVICE)
    return found


# --- words --------------------------------------------------------------------------------------------


class Clock:
    """Instants as an operator reads them: in the time zone of quiet hours, else this host's."""

    def __init__(self, now: datetime, zone: str | None) -> None:
        self.now = now
        self.zone: tzinfo | None = None
        with contextlib.suppress(ValueError, KeyError, OSError):  # ZoneInfo's, for an unknown name
            self.zone = ZoneInfo(zone) if zone else None
        self.name = zone if self.zone else now.astimezone().tzname()

    def at(self, moment: datetime) -> str:
        """`14:32`; with seconds if it is near, with the day if it is another."""
        local, today = moment.astimezone(self.zone), self.now.astimezone(self.zone)
        if abs(moment - self.now) < timedelta(minutes=10):
            return f"{local:%H:%M:%S}"
        days = (local.date() - today.date()).days
        return f"{local:%H:%M}" if days == 0 else f"{local:%a %H:%M}" if 0 < days < 7 else f"{local:%Y-%m-%d %H:%M}"


ADVICE = {
    "paused": "To go on: UPDATE outreach_settings SET paused = false;",
    "dispatcher not running": "See: systemctl status outreach-dispatcher; journalctl -u outreach-dispatcher -n 30",
    "server could not be asked": "See: systemctl status 'send-queue-server*'; journalctl -u outreach-dispatcher -n 30",
    "waiting for device": "Switch the device on, and see that its sender runs and has its token.",
    "limit reached": "Nothing goes while a limit is 0. For none: UPDATE outreach_settings SET … = NULL;",
}


def words(gate: pacing.Gate, clock: Clock) -> str:
    """A gate and when it opens, without a full stop."""
    said = gate.words or gate.reason
    if gate.until is None:
        return said
    if gate.reason == NIGHT:
        return f"{said} until {clock.at(gate.until)} ({clock.name}), {pacing.span(gate.until - clock.now)}"
    return f"{said}; next {'place' if gate.kind.startswith('limit') else 'message'} at {clock.at(gate.until)}"


def told(verdict: pacing.Verdict, pace: pacing.Pace | None, interval: timedelta, clock: Clock) -> Verdict:
    """pacing's verdict as the first line."""
    if verdict is None:
        return Verdict("idle", "Nothing to send.", None, None, None, False, None)
    if isinstance(verdict, pacing.Batch):
        due = (pace.last_tick + interval - clock.now) if pace and pace.last_tick else timedelta(0)
        when = f"in about {pacing.span(due)}" if due > timedelta(0) else "at any moment"
        return Verdict(
            "sending", f"Sending: next item of batch {verdict.id[:8]}… {when}.", None, None, verdict.id, False, None
        )
    start = {"dispatcher not running": "Dispatcher not running", "no device": "Failing"}.get(verdict.kind, "Held")
    advice = next((text for kind, text in ADVICE.items() if verdict.kind.startswith(kind)), None)
    needs_operator = verdict.needs_operator
    return Verdict(
        "held", f"{start}: {words(verdict, clock)}.", verdict.kind, verdict.until, None, needs_operator,
        advice if needs_operator else None,
    )  # fmt: skip


def down(problems: Sequence[Problem]) -> Verdict:
    sentence = f"Held: {'; '.join(problem.what for problem in problems)}."
    return Verdict("down", sentence, "database down", None, None, True, "\n".join(problem.cure for problem in problems))


def printable(text: str) -> str:
    """`text` without what would move a terminal's cursor: reasons and names come from outside."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


# --- the screen ---------------------------------------------------------------------------------------


def screen(report: Report, console: Console) -> RenderableType:
    """The report for a terminal, or in plain lines where the output is none."""
    clock = Clock(report.now, report.zone)
    verdict = report.verdict
    colour = "red" if verdict.needs_operator else "yellow" if verdict.state == "held" else "green"
    parts: list[RenderableType] = [Text(printable(verdict.sentence), style=f"bold {colour}")]
    parts += [Text(verdict.advice)] if verdict.advice else []
    parts += [Text(f"Warning: {printable(warning)}.", style="red") for warning in report.warnings]
    for table in (batches_table(report, clock, console), limits_table(report, clock), devices_table(report),
                  failures_table(report, clock)):  # fmt: skip
        parts += [Text(), table] if table else []
    return Group(*parts, Text(), Text(footer(report, clock), style="dim"))


def table(*columns: str, title: str) -> Table:
    """An empty table: its first column reads from the left, numbers from the right."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), show_edge=False)
    made.add_column(title, no_wrap=True, header_style="bold")
    for column in columns:
        is_number = column in NUMBERS
        made.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    return made


NUMBERS = {"pending", "queued", "sent", "failed", "skipped", "used", "of", "waiting", "collected", "times", "done"}


def batches_table(report: Report, clock: Clock, console: Console) -> Table | None:
    if not report.batches:
        return None
    bars = ["", "done"] if console.is_terminal else ["done"]
    made = table(*bars, "pending", "queued", "sent", "failed", "skipped", "finish", "now", title="Batches")
    for batch in report.batches[:SHOWN]:
        total = batch.pending + batch.queued + batch.sent + batch.failed + batch.skipped
        ended = total - batch.pending - batch.queued
        bar: list[RenderableType] = [ProgressBar(max(total, 1), ended, width=12)] if console.is_terminal else []
        finish = clock.at(batch.finish) if batch.finish else "no time known" if batch.pending else ""
        made.add_row(
            batch.id if console.width >= WIDE else batch.id[:8], *bar, f"{ended * 100 // total if total else 0} %",
            str(batch.pending), str(batch.queued), str(batch.sent), str(batch.failed), str(batch.skipped),
            finish if batch.finish_is_exact or not batch.finish else f"about {finish}",
            batch.gate or ("its turn is next" if batch.id == report.verdict.batch_id else ""),
        )  # fmt: skip
    if len(report.batches) > SHOWN:
        made.add_row(f"and {len(report.batches) - SHOWN} more")
    return made


def limits_table(report: Report, clock: Clock) -> Table | None:
    made = table("used", "of", "next place", title="Limits")
    for limit in report.limits or ():
        free = clock.at(limit.free_at) if limit.free_at else "" if limit.used < limit.most else "no time known"
        made.add_row(limit.limit, str(limit.used), str(limit.most), free)
    return made if made.row_count else None


def devices_table(report: Report) -> Table | None:
    made = table("last seen", "waiting", "collected", "oldest", title="Devices")
    for device in (report.devices or ())[:SHOWN]:
        seen = f"{pacing.span(report.now - device.last_seen_at)} ago" if device.last_seen_at else "never"
        oldest = f"{pacing.span(report.now - device.oldest_at)}" if device.oldest_at else ""
        made.add_row(Text(printable(device.name)), seen, str(device.waiting), str(device.collected), oldest)
    return made if made.row_count else None


def failures_table(report: Report, clock: Clock) -> Table | None:
    made = table("times", "last", title="Failures of the last 7 days")
    for failure in report.failures or ():
        made.add_row(
            Text(printable(failure.reason), overflow="ellipsis"), str(failure.count), clock.at(failure.last_at)
        )
    return made if made.row_count else None


def footer(report: Report, clock: Clock) -> str:
    """The time, the last tick, and the batches that wait for their owner."""
    said = [f"{report.now.astimezone(clock.zone):%H:%M:%S} {clock.name}"]
    if report.last_tick_at:
        said.append(f"last tick {pacing.span(report.now - report.last_tick_at)} ago")
    if report.in_flight is not None:
        said.append(f"in flight {report.in_flight}")
    said += [f"batches in status {status}: {count}" for status, count in sorted((report.not_sending or {}).items())]
    return " · ".join(said)


# --- the forecast of one batch ------------------------------------------------------------------------


def outlook(quinn: Quinn, icloud: Icloud | None, interval: timedelta, batch_id: str) -> Outlook:
    """What sending this batch would do, were it started now."""
    counts, plan = quinn.counts[batch_id], quinn.plans[batch_id]
    found = Outlook(
        batch_id=batch_id,
        status=counts.status,
        pending=counts.pending,
        would_send=plan.count(SENT),
        would_skip=+collections.Counter({"no primary handle": plan.count(SKIPPED)}),
        would_fail=+collections.Counter({"invalid handle, or an empty message": plan.count(FAILED)}),
        first_at=None,
        last_at=None,
        is_exact=quinn.exact,
        binds=None,
        held_seconds={},
        notes=notes(quinn, icloud, interval),
    )
    if quinn.pace:
        courses, waits = forecast(quinn, icloud, interval, batch_id)
        course = courses[batch_id]
        gates = {kind: length for kind, length in waits.items() if kind not in (NIGHT, CADENCE)}
        found.first_at, found.last_at, found.is_exact = course.first, course.last, course.exact
        found.binds = max(gates, key=lambda kind: gates[kind], default=CADENCE if plan else None)
        found.held_seconds = {kind: int(length.total_seconds()) for kind, length in waits.items() if kind != CADENCE}
        if plan and course.last is None:
            found.binds = next((usage.limit for usage in pacing.usages(quinn.pace) if usage.most == 0), None)
    return found


def notes(quinn: Quinn, icloud: Icloud | None, interval: timedelta) -> list[str]:
    """What the forecast takes for granted although it is not so now."""
    said = []
    if quinn.pace is None:
        return [str(pacing.closed(None))]
    if quinn.pace.settings.paused:
        said.append("sending is paused: this counts as if it went on now")
    if gate := pacing.stopped(quinn.pace, interval):
        said.append(f"the dispatcher is not running ({gate.words}): this counts as if it started now")
    if icloud and not icloud.devices:
        said.append("there is no device: as it is, each message would fail; `python db.py add-device NAME` makes one")
    return said


def outlook_screen(outlook: Outlook, clock: Clock) -> RenderableType:
    """The forecast in plain words."""
    about = "" if outlook.is_exact else "about "
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_row("would be sent", f"{outlook.would_send}")
    for what, reasons in (("skipped", outlook.would_skip), ("failed", outlook.would_fail)):
        for reason, count in reasons.items():
            made.add_row(f"would be {what}", f"{count}  {reason}")
    if outlook.pending:
        made.add_row("first message", clock.at(outlook.first_at) if outlook.first_at else "no time known")
        made.add_row("last message", about + clock.at(outlook.last_at) if outlook.last_at else "no time known")
        made.add_row("what binds", outlook.binds or "")
    for kind, seconds in outlook.held_seconds.items():
        made.add_row("held by", f"{kind}, {pacing.span(timedelta(seconds=seconds))} in all")
    title = (
        f"Batch {outlook.batch_id} ({outlook.status}), {outlook.pending} items pending. If it were sent from now on:"
    )
    warned = [Text(f"Note: {note}.", style="yellow") for note in outlook.notes]
    return Group(Text(title, style="bold"), made, *warned, Text("Nothing was written.", style="dim"))


# --- running ------------------------------------------------------------------------------------------


def show(console: Console, interval: timedelta, as_json: bool) -> int:
    """Look once and show it; 1 when something needs the operator."""
    seen = report(interval)
    if as_json:
        sys.stdout.write(msgspec.json.encode(seen).decode() + "\n")
    else:
        console.print(screen(seen, console))
    return exit_status(seen)


def exit_status(seen: Report) -> int:
    return 1 if seen.verdict.needs_operator or seen.warnings else 0


def watch(console: Console, interval: timedelta) -> int:
    """Look every two seconds until Ctrl-C; return the last look's exit status."""
    seen = report(interval)
    try:
        if not console.is_terminal:
            while True:
                console.print(screen(seen, console), "")
                time.sleep(WATCH_PAUSE)
                seen = report(interval)
        with Live(screen(seen, console), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_PAUSE)
                seen = report(interval)
                live.update(screen(seen, console), refresh=True)
    except KeyboardInterrupt:
        return exit_status(seen)


def show_forecast(console: Console, interval: timedelta, batch_id: str, as_json: bool) -> int:
    quinn, icloud, problems = look_around(batch_id)
    for problem in problems:
        sys.stderr.write(f"status.py: {problem.what}: {problem.cure}\n")
    if quinn is None:
        return 1
    if batch_id not in quinn.counts:
        sys.stderr.write(f"status.py: there is no batch {batch_id}\n")
        return 1
    found = outlook(quinn, icloud, interval, batch_id)
    if as_json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        zone = quinn.pace.settings.quiet_hours_tz if quinn.pace else None
        console.print(outlook_screen(found, Clock(quinn.now, zone)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Say why nothing is being sent, or what is; exit 0 when sending or idle, "
        "1 when something needs the operator.",
        epilog="environment: QUINN_DB_URL, QUINN_ICLOUD_DB_URL, DISPATCH_INTERVAL_SECONDS (the dispatcher's, if it is "
        "not 30). examples: python status.py; python status.py --watch",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="look again every two seconds, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="one JSON document, for scripts")
    parser.add_argument(
        "--forecast", metavar="BATCH_ID", type=uuid.UUID, help="what sending this batch would do; writes nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.watch and arguments.forecast:
        parser.error("--forecast looks once: leave out --watch")
    service.load_settings()
    pacing.logger.disabled = True  # what it would warn of is on the screen
    interval = timedelta(seconds=service.integer("DISPATCH_INTERVAL_SECONDS", 30))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    if arguments.forecast:
        return show_forecast(console, interval, str(arguments.forecast), arguments.json)
    return watch(console, interval) if arguments.watch else show(console, interval, arguments.json)


if __name__ == "__main__":
    service.run(main)
