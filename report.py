"""Describe what is happening and why: the verdict, batches with their finish, limits, devices and failures, as data.

Used by status.py; every other view of the product's state asks here too. Reads both databases in read-only sessions and
writes nothing; the holds are pacing's, the ones that the dispatcher obeys. Example:

    print(report.report(timedelta(seconds=30)).verdict.sentence)
"""

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import msgspec
import psycopg2

import batches
import db
import forecast
import pacing
import quiet_times
import snapshots

MAX_FAILURES = 5  # reasons that are listed
MAX_CLOCK_DIFFERENCE = timedelta(seconds=5)  # between the hosts of the two databases
MAX_STOPPED = 20  # batches that stopped themselves, and are listed

T = TypeVar("T")


class Failure(msgspec.Struct, rename="camel"):
    """A reason why items of the last week failed, how many, and when last."""

    reason: str
    count: int
    last_at: datetime


class Summary(msgspec.Struct, rename="camel"):
    """The first line. `state`: sending, held, idle or down. `hold`: its code, as in the dispatcher's log."""

    state: str
    sentence: str
    hold: str | None = None
    until: datetime | None = None
    batch_id: str | None = None
    needs_operator: bool = False
    advice: str | None = None


class BatchLine(msgspec.Struct, rename="camel"):
    """A sending batch. `hold`: what holds it, as a phrase. `finish`: None where no time can be told.

    `late`: how many messages will not go, because send_until, or the approval, ends before.
    """

    id: str
    pending: int
    queued: int
    sent: int
    failed: int
    skipped: int
    hold: str | None
    finish: datetime | None
    finish_is_exact: bool
    late: int


class StoppedBatch(msgspec.Struct, rename="camel"):
    """A batch that the dispatcher paused because it went wrong, and why."""

    id: str
    reason: str


class FinishedBatch(msgspec.Struct, rename="camel"):
    """A batch that was finished in the last day, and not without failures. `unknown`: may have been sent."""

    id: str
    finished_at: datetime
    failed: int
    unknown: int


class DeviceLine(msgspec.Struct, rename="camel"):
    """A device: messages it has not collected, messages without a result, the oldest of both.

    `problem`: what the Mac says is wrong with it, `problem_at` since when. `version`: its sender's.
    """

    id: str
    name: str
    last_seen_at: datetime | None
    waiting: int
    collected: int
    oldest_at: datetime | None
    problem: str | None
    problem_at: datetime | None
    version: str | None


class LimitLine(msgspec.Struct, rename="camel"):
    """A limit and, if it is reached, when time alone frees a place."""

    limit: str
    maximum: int
    used: int
    frees_at: datetime | None


class Report(msgspec.Struct, rename="camel"):
    """Everything that is shown. What only an unavailable database knows is None."""

    now: datetime
    zone: str | None
    verdict: Summary
    warnings: list[str]
    last_tick_at: datetime | None
    in_flight: int | None
    batches: list[BatchLine] | None
    stopped_batches: list[StoppedBatch] | None
    finished_batches: list[FinishedBatch] | None
    idle_batches: dict[str, int] | None
    unknown_outcomes: int | None
    limits: list[LimitLine] | None
    devices: list[DeviceLine] | None
    failures: list[Failure] | None


# --- reading ------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """What quinn holds beside the batches that are sent.

    `unknown`: how many items may have been sent, in all; `watched`: those of them that a device may still find out.
    """

    idle_batches: dict[str, int]
    stopped: list[StoppedBatch]
    finished: list[FinishedBatch]
    failures: list[Failure]
    unknown: int
    watched: int


class Databases(NamedTuple):
    """What was read of both databases. `outreach` and `ended`, or `queue`, are None where `problems` says why."""

    outreach: snapshots.OutreachSnapshot | None
    ended: Ended | None
    queue: snapshots.QueueSnapshot | None
    problems: list[db.DatabaseProblem]


def read_databases(batch_id: str | None = None) -> Databases:
    """Read both databases; with `batch_id`, that batch too, whatever its status."""

    def read_quinn(quinn: Any) -> tuple[snapshots.OutreachSnapshot, Ended]:
        ended = Ended(
            _read_idle_batches(quinn),
            _read_stopped(quinn),
            _read_finished(quinn),
            _read_failures(quinn),
            *_count_unknown(quinn),
        )
        return snapshots.read_outreach(quinn, batch_id), ended

    quinn, quinn_problem = read_database("quinn", read_quinn)
    outreach, ended = quinn or (None, None)
    queue, queue_problem = read_database("icloud", lambda icloud: snapshots.read_queue(icloud, outreach))
    problems = [problem for problem in (quinn_problem, queue_problem) if problem]
    return Databases(outreach, ended, queue, problems)


def read_database(name: db.DatabaseName, read: Callable[[Any], T]) -> tuple[T | None, db.DatabaseProblem | None]:
    """Return what `read` reads of a database in one read-only snapshot, or why it cannot."""
    try:
        with contextlib.closing(db.connect(db.url(name))) as conn:
            conn.set_session(isolation_level="REPEATABLE READ", readonly=True, autocommit=False)
            return read(conn), None
    except psycopg2.Error as error:
        return None, db.diagnose(error, name)


def _read_idle_batches(quinn: Any) -> dict[str, int]:
    """Return how many batches wait for their owner, by status."""
    sql = """
        SELECT CASE WHEN status = 'sending' AND dry_run THEN 'dry run'
                    WHEN status = 'sending' THEN 'not approved' ELSE status END, count(*)
          FROM outreach_batches
         WHERE status IN ('draft', 'paused')
            OR (status = 'sending' AND (dry_run OR (digest IS NOT NULL AND approved_at IS NULL)))
         GROUP BY 1
    """
    return dict(db.query(quinn, sql))


def _read_stopped(quinn: Any) -> list[StoppedBatch]:
    """Return the batches that the dispatcher paused, the last one first."""
    sql = """
        SELECT id, pause_reason
          FROM outreach_batches
         WHERE status = 'paused' AND pause_reason IS NOT NULL
         ORDER BY updated_at DESC, id
         LIMIT %(maximum)s
    """
    return [StoppedBatch(*row) for row in db.query(quinn, sql, {"maximum": MAX_STOPPED})]


def _read_finished(quinn: Any) -> list[FinishedBatch]:
    """Return the batches that were finished in the last day with failures of its last month, the last one first."""
    sql = """
        SELECT batch.id, batch.updated_at,
               count(*) FILTER (WHERE outcome_unknown_at IS NULL),
               count(*) FILTER (WHERE outcome_unknown_at IS NOT NULL)
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.status = 'failed' AND item.updated_at > now() - interval '30 days'
           AND batch.status = 'sent' AND batch.updated_at > now() - interval '1 day'
         GROUP BY batch.id, batch.updated_at
         ORDER BY batch.updated_at DESC
         LIMIT %(maximum)s
    """
    return [FinishedBatch(*row) for row in db.query(quinn, sql, {"maximum": MAX_STOPPED})]


def _count_unknown(quinn: Any) -> tuple[int, int]:
    """Return how many items may have been sent: all of them, and those that a device may still find out."""
    sql = """
        SELECT count(*), count(*) FILTER (WHERE outcome_unknown_at > now() - interval '8 days')
          FROM outreach_batch_items
         WHERE outcome_unknown_at IS NOT NULL AND status = 'failed'
    """
    [(count, watched)] = db.query(quinn, sql)
    return count, watched


def _read_failures(quinn: Any) -> list[Failure]:
    sql = """
        SELECT COALESCE(failure_reason, 'no reason given'), count(*), max(updated_at)
          FROM outreach_batch_items
         WHERE status = 'failed' AND updated_at > now() - interval '7 days'
         GROUP BY 1
         ORDER BY 3 DESC
         LIMIT %(maximum)s
    """
    return [Failure(*row) for row in db.query(quinn, sql, {"maximum": MAX_FAILURES})]


# --- the report ---------------------------------------------------------------------------------------


def report(interval: timedelta) -> Report:
    """Read both databases and describe them. `interval`: the dispatcher's, between two ticks."""
    read = read_databases()
    outreach, devices = read.outreach, read.queue.devices if read.queue else None
    snapshot = outreach.snapshot if outreach else None
    now = outreach.now if outreach else datetime.now(UTC)
    formatter = LocalTimeFormatter(now, snapshot.settings.quiet_hours_tz if snapshot else None)
    warnings = _warnings(outreach, read.ended, read.queue, now)
    verdict = summarize_outage(read.problems)
    if outreach:
        decided, hidden = _decide(outreach, read.ended, devices, interval, formatter)
        warnings += [summary.sentence.rstrip(".") for summary in hidden]
        if read.problems:
            warnings.append(decided.sentence.rstrip("."))
        else:
            verdict = decided
    simulations = forecast.forecast(outreach, read.queue, interval)[0] if outreach and snapshot else {}
    return Report(
        now=now,
        zone=formatter.name,
        verdict=verdict,
        warnings=warnings,
        last_tick_at=snapshot.last_tick if snapshot else None,
        in_flight=snapshot.in_flight if snapshot else None,
        batches=[
            _batch_line(outreach, simulations.get(batch.id), batch, formatter) for batch in outreach.waiting
        ] if outreach else None,
        stopped_batches=read.ended.stopped if read.ended else None,
        finished_batches=read.ended.finished if read.ended else None,
        idle_batches=read.ended.idle_batches if read.ended else None,
        unknown_outcomes=read.ended.unknown if read.ended else None,
        limits=[
            LimitLine(*usage) for usage in (*pacing.limit_usage(snapshot), *pacing.new_contact_usage(snapshot))
        ] if snapshot else None,
        devices=[DeviceLine(*device) for device in devices] if devices is not None else None,
        failures=read.ended.failures if read.ended else None,
    )  # fmt: skip


def _decide(
    outreach: snapshots.OutreachSnapshot,
    ended: Ended | None,
    devices: Sequence[pacing.Device] | None,
    interval: timedelta,
    formatter: "LocalTimeFormatter",
) -> tuple[Summary, list[Summary]]:
    """Return what is the case, and what else needs the operator: the word of the Mac comes before everything else, and
    a batch that stopped itself after everything else.
    """
    decision = pacing.decide(outreach.snapshot, outreach.waiting, devices, interval)
    hidden = []
    if isinstance(decision, pacing.Hold) and decision.code == pacing.DEVICE_PROBLEM:
        silent = [device._replace(problem=None) for device in devices or ()]
        other = pacing.decide(outreach.snapshot, outreach.waiting, silent, interval)
        if isinstance(other, pacing.Hold) and other.needs_operator:
            hidden.append(summarize(other, outreach, interval, formatter))
    stopped = [summarize_stopped(batch) for batch in (ended.stopped if ended else ())]
    if decision is None and stopped:
        return stopped[0], stopped[1:]
    return summarize(decision, outreach, interval, formatter), hidden + stopped


def _batch_line(
    outreach: snapshots.OutreachSnapshot,
    simulation: forecast.BatchSimulation | None,
    batch: pacing.Batch,
    formatter: "LocalTimeFormatter",
) -> BatchLine:
    counts, snapshot = outreach.counts[batch.id], outreach.snapshot
    hold = pacing.global_hold(snapshot)
    if snapshot and batch.pending and not hold:
        hold = pacing.batch_hold(snapshot, batch) or pacing.limit_hold(snapshot)
    return BatchLine(
        id=batch.id,
        pending=counts.pending,
        queued=counts.queued,
        sent=counts.sent,
        failed=counts.failed,
        skipped=counts.skipped,
        hold=describe_hold(hold, formatter) if hold and batch.pending else None,
        finish=simulation.last if simulation else None,
        finish_is_exact=simulation.is_exact if simulation else False,
        late=simulation.late if simulation else 0,
    )


def _warnings(
    outreach: snapshots.OutreachSnapshot | None,
    ended: Ended | None,
    queue: snapshots.QueueSnapshot | None,
    now: datetime,
) -> list[str]:
    """Return what an operator has to correct although it holds nothing now."""
    found = _clock_warnings(outreach, queue) if outreach and queue else []
    devices = queue.devices if queue else None
    if ended and ended.watched:
        messages = "1 message" if ended.watched == 1 else f"{ended.watched} messages"
        found.append(f"{messages} whose outcome is unknown: look at the Mac")
    if outreach and outreach.snapshot:
        settings = outreach.snapshot.settings
        start, end, zone = settings.quiet_hours_start, settings.quiet_hours_end, settings.quiet_hours_tz
        if problem := quiet_times.hours_problem(start, end, zone):
            found.append(f"quiet hours are disabled: start={start!r} end={end!r} tz={zone!r}; {problem}")
        if problem := quiet_times.quiet_days_problem(settings.quiet_days):
            found.append(f"quiet days: {problem}")
    if unreadable := _count_unreadable(outreach):
        found.append(forecast.unreadable_note(unreadable))
    has_hold = pacing.device_problem_hold(devices or (), now) is not None  # then the first line says it
    if not has_hold:
        found += [device.complaint for device in pacing.living(devices or (), now) if device.problem]
    for device in devices or ():
        if device.is_late(now):
            count = device.waiting + device.collected
            messages = f"{count} message{'s' if count > 1 else ''}"
            found.append(f"device {device.name!r}, {device.seen(now)}, keeps {messages} waiting")
    if devices is not None and not devices:
        found.append(pacing.NO_DEVICE)
    return found


def _count_unreadable(outreach: snapshots.OutreachSnapshot | None) -> int:
    items = [item for batch in outreach.items.values() for item in batch] if outreach else []
    return sum(item.outcome == snapshots.UNREADABLE for item in items)


def _clock_warnings(outreach: snapshots.OutreachSnapshot, queue: snapshots.QueueSnapshot) -> list[str]:
    """Return a warning if the clocks of the two databases differ.

    icloud is read after quinn, perhaps seconds later: so each clock is compared with this host's.
    """
    ahead = (queue.now - queue.read_at) - (outreach.now - outreach.read_at)
    if abs(ahead) <= MAX_CLOCK_DIFFERENCE:
        return []
    difference, direction = pacing.format_duration(abs(ahead)), "ahead of" if ahead > timedelta(0) else "behind"
    return [
        f"the clock of database icloud is {difference} {direction} that of quinn; limits and quiet hours go "
        "by both: synchronize their hosts with NTP (`timedatectl` shows whether they are)"
    ]


# --- sentences ----------------------------------------------------------------------------------------


class LocalTimeFormatter:
    """Write instants as an operator reads them: in the time zone of quiet hours, else this host's."""

    def __init__(self, now: datetime, zone: str | None) -> None:
        self.now = now
        self.zone = quiet_times.zone_of(zone, None)
        self.name = zone if self.zone else now.astimezone().tzname()

    def at(self, moment: datetime) -> str:
        """Return `14:32`; with seconds if it is near, with the day if it is another."""
        local, today = moment.astimezone(self.zone), self.now.astimezone(self.zone)
        if abs(moment - self.now) < timedelta(minutes=10):
            return f"{local:%H:%M:%S}"
        days = (local.date() - today.date()).days
        return f"{local:%H:%M}" if days == 0 else f"{local:%a %H:%M}" if 0 < days < 7 else f"{local:%Y-%m-%d %H:%M}"

    def day(self, moment: datetime) -> str:
        """Return the day of a past instant in a sentence: `today at 14:32`, `on Tuesday`, `on 2026-01-31`."""
        local, today = moment.astimezone(self.zone), self.now.astimezone(self.zone)
        days = (today.date() - local.date()).days
        return f"today at {local:%H:%M}" if days == 0 else f"on {local:%A}" if 0 < days < 7 else f"on {local:%Y-%m-%d}"


# By the beginning of a hold's code: what a person does about it.
ADVICE = {
    pacing.DEVICE_PROBLEM: "See what else is wrong, on that Mac: python3 mac_sender.py doctor",
    "paused": "To go on: UPDATE outreach_settings SET paused = false;",
    "dispatcher not running": "See: systemctl status outreach-dispatcher; journalctl -u outreach-dispatcher -n 30",
    "sync job fails": "See why: journalctl -u outreach-dispatcher -p err -n 30",
    "dispatch job fails": "See why: journalctl -u outreach-dispatcher -p err -n 30",
    "server unavailable": "See: systemctl status 'send-queue-server*'; journalctl -u outreach-dispatcher -n 30",
    "waiting for device": "Switch the device on, and see that its sender runs and has its token.",
    pacing.NO_HOUR: "Shorten quiet hours, or set quiet_hours_of to 'sender' or 'recipient'.",
    "limit reached": "Nothing goes while a limit is 0. For none: UPDATE outreach_settings SET … = NULL;",
}
RESUME = "{} Then: python outreach.py resume {}"
SEND_AGAIN = "{} Then: python outreach.py send {}"
# Where the first word is not "Held".
BEGINNINGS = {
    "dispatcher not running": "Dispatcher not running",
    "sync job fails": "Failing",
    "dispatch job fails": "Failing",
    "no device": "Failing",
}


def describe_hold(hold: pacing.Hold, formatter: LocalTimeFormatter) -> str:
    """Return a hold and when it ends, without a full stop."""
    message = hold.message or ": ".join(part for part in (hold.code, hold.details) if part)
    if hold.until is None:
        return message
    if hold.code == pacing.QUIET_HOURS:
        length = pacing.format_duration(hold.until - formatter.now)
        return f"{message} until {formatter.at(hold.until)} ({formatter.name}), {length}"
    if hold.code == pacing.NOT_BEGUN:
        return f"{message} at {formatter.at(hold.until)}"
    if hold.code == pacing.QUIET_FOR_RECIPIENTS:
        return f"{message}; next at {formatter.at(hold.until)} for {hold.next_count} of them"
    what = "place" if hold.code.startswith("limit") else "message"
    return f"{message}; next {what} at {formatter.at(hold.until)}"


def summarize(
    decision: pacing.Decision, outreach: snapshots.OutreachSnapshot, interval: timedelta, formatter: LocalTimeFormatter
) -> Summary:
    """Return a decision as the first line."""
    if decision is None:
        return Summary("idle", "Nothing to send.")
    if isinstance(decision, pacing.Batch):
        last_tick = outreach.snapshot.last_tick if outreach.snapshot else None
        due = last_tick + interval - formatter.now if last_tick else timedelta(0)
        when = f"in about {pacing.format_duration(due)}" if due > timedelta(0) else "at any moment"
        sentence = f"Sending: next item of batch {decision.id[:8]}… {when}."
        return Summary("sending", sentence, batch_id=decision.id, advice=_pace_advice(outreach, interval))
    beginning = BEGINNINGS.get(decision.code, "Held")
    advice = next((text for code, text in ADVICE.items() if decision.code.startswith(code)), None)
    return Summary(
        "held",
        f"{beginning}: {describe_hold(decision, formatter)}.",
        hold=decision.code,
        until=decision.until,
        needs_operator=decision.needs_operator,
        advice=advice if decision.needs_operator else None,
    )


def summarize_stopped(batch: StoppedBatch) -> Summary:
    """Return a batch that stopped itself as the first line."""
    return Summary(
        "held",
        f"Held: batch {batch.id[:8]}… paused itself: {batch.reason}.",
        hold="batch stopped itself",
        batch_id=batch.id,
        needs_operator=True,
        advice=(SEND_AGAIN if batch.reason == batches.LAPSED else RESUME).format(
            batches.check_first(batch.reason), batch.id
        ),
    )


def _pace_advice(outreach: snapshots.OutreachSnapshot, interval: timedelta) -> str | None:
    """Return why fewer messages go than max_per_minute allows: each batch sends one in each tick."""
    maximum = outreach.snapshot.settings.max_per_minute if outreach.snapshot else None
    pending = [batch for batch in outreach.waiting if batch.pending]
    a_minute = len(pending) * timedelta(minutes=1) / interval
    if maximum is None or a_minute >= maximum or max(outreach.counts[batch.id].pending for batch in pending) < 2:
        return None
    batches = "1 batch sends" if len(pending) == 1 else f"{len(pending)} batches send"
    return (
        f"{batches} at most {a_minute:.3g} a minute, one message of a batch in each tick; max_per_minute allows "
        f"{maximum}. To send faster, make several smaller batches."
    )


def summarize_outage(problems: Sequence[db.DatabaseProblem]) -> Summary:
    """Return the first line when a database is unavailable."""
    return Summary(
        "down",
        f"Held: {'; '.join(problem.what for problem in problems)}.",
        hold="database down",
        needs_operator=True,
        advice="\n".join(problem.remedy for problem in problems),
    )
