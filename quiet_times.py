"""Decide when it is quiet for a recipient: quiet hours and quiet days, in every time zone that counts.

Used by pacing.py, the dispatcher and recipients.py. Reads no table and no clock. All datetimes are aware. A message may
go only while it is quiet in none of the zones. Example:

    times = read("21:00", "08:00", "Europe/Berlin", "recipient", "sat,sun,2026-12-25")
    times.next_open(["America/Chicago", "America/New_York"], now)

How it is computed: for each zone and each day of UTC, the quiet minutes are the bits of one integer, and the zones of a
recipient are joined with `|`. It is exact where a clock change skips or repeats an hour. The integers are cached, so a
tick with many items costs one look-up for each different set of zones.
"""

import bisect
import contextlib
import functools
import logging
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Literal, NamedTuple, TypeVar, get_args
from zoneinfo import ZoneInfo

import zones

DAY = 1440  # minutes
WHOLE_DAY = (1 << DAY) - 1
# Nothing is enqueued so shortly before it is quiet: Messages may take a moment to send what a device has collected.
MARGIN = timedelta(minutes=2)
MARGIN_MINUTES = MARGIN // timedelta(minutes=1)
# How many days ahead to search for an hour at which it is quiet in no zone. One week has each weekday and, if a clock
# change falls into it, both offsets.
SEARCH_DAYS = 8
MAX_DATES = 366
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
QUIET_DAYS_REMEDY = "write weekdays and dates such as sat,sun,2026-12-25"

Of = Literal["sender", "recipient", "both"]
T = TypeVar("T")
logger = logging.getLogger("outreach-dispatcher")


class QuietDays(NamedTuple):
    """Days on which nothing goes: weekdays (0 is Monday), and dates."""

    weekdays: frozenset[int] = frozenset()
    dates: frozenset[date] = frozenset()

    def contains(self, ordinal: int) -> bool:
        day = date.fromordinal(ordinal)
        return day.weekday() in self.weekdays or day in self.dates


class QuietTimes(NamedTuple):
    """The settings of quiet hours and quiet days.

    `start`, `end`: minutes of the day, over midnight if end < start; no quiet hours if they are the same. `sender`: the
    sender's zone; None is this host's. `of`: whose zones count. The arguments `names` are the recipient's zones; if
    none of them is known, the sender's counts.
    """

    start: int
    end: int
    sender: ZoneInfo | None
    of: Of = "sender"
    days: QuietDays = QuietDays()

    def is_quiet(self, names: Sequence[str], moment: datetime) -> bool:
        """Return whether it is quiet at `moment` in any of the zones. What is enqueued must be withdrawn then."""
        day, minute = _utc_minute(moment)
        return bool(_quiet_minutes(self, tuple(names), day) >> minute & 1)

    def is_open(self, names: Sequence[str], moment: datetime) -> bool:
        """Return whether a message may be enqueued: it is quiet in none of the zones, and will not be within MARGIN."""
        day, minute = _utc_minute(moment)
        return not _closed_minutes(self, tuple(names), day) >> minute & 1

    def next_open(self, names: Sequence[str], moment: datetime) -> datetime | None:
        """Return `moment` if it is open, else the first minute that is; None if there is no such hour.

        Each listed date adds two days to SEARCH_DAYS, because one date is quiet for that long in zones far apart. So
        None means that an ordinary week has no such hour, not that a holiday is near.
        """
        day, minute = _utc_minute(moment)
        for ahead in range(SEARCH_DAYS + 1 + 2 * len(self.days.dates)):
            is_open = ~_closed_minutes(self, tuple(names), day + ahead) & WHOLE_DAY
            found = _first_bit(is_open, 0 if ahead else minute)
            if found is not None:
                return max(moment, _moment(day + ahead, found))
        return None

    def next_quiet(self, names: Sequence[str], moment: datetime) -> datetime | None:
        """Return `moment` if it is quiet in any of the zones, else the first minute at which it is; None if never."""
        day, minute = _utc_minute(moment)
        dates = sorted(listed.toordinal() for listed in self.days.dates)
        later = [near for listed in dates for near in (listed - 1, listed, listed + 1) if near > day + SEARCH_DAYS]
        for searched in (*range(day, day + SEARCH_DAYS + 1), *later):
            quiet = _quiet_minutes(self, tuple(names), searched)
            found = _first_bit(quiet, minute if searched == day else 0)
            if found is not None:
                return max(moment, _moment(searched, found))
        return None

    def valid_until(self, names: Sequence[str], moment: datetime) -> datetime | None:
        """Return until when a message that is enqueued at `moment` may be collected; None if there is no limit."""
        quiet = self.next_quiet(names, moment)
        return quiet - MARGIN if quiet else None

    def is_quiet_day(self, moment: datetime) -> bool:
        """Return whether it is a quiet day where the sender is."""
        return self.days.contains(moment.astimezone(self.sender).toordinal())

    def is_elsewhere(self, names: Sequence[str], moment: datetime) -> bool:
        """Return whether the clocks of one of the zones differ from the sender's."""
        here = moment.astimezone(self.sender).utcoffset()
        return any(zones.is_known(name) and moment.astimezone(ZoneInfo(name)).utcoffset() != here for name in names)

    def open_share(self, moment: datetime) -> float:
        """Return for which part of the next 7 days messages may go, where the sender is."""
        day, _ = _utc_minute(moment)
        closed = [_closed_minutes(self, (), day + ahead).bit_count() for ahead in range(7)]
        return 1 - sum(closed) / (7 * DAY)


# --- reading the settings -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # without the cache, every tick would log the warnings
def read(start: str | None, end: str | None, zone: str | None, of: str | None, days: str | None) -> QuietTimes:
    """Return the quiet times of the settings of these names. What cannot be read is left out, with a warning."""
    if problem := hours_problem(start, end, zone):
        logger.warning("quiet hours are disabled start=%r end=%r tz=%r; %s", start, end, zone, problem)
    if unreadable := quiet_days_problem(days):
        logger.warning("quiet days are incomplete quiet_days=%r; %s", days, unreadable)
    found = quiet_days(days)
    whose: Of = "recipient" if of == "recipient" else "both" if of == "both" else "sender"
    if problem or not (start and end):
        return QuietTimes(0, 0, zone_of(zone, None), whose, found)
    return QuietTimes(_minute_of_day(start), _minute_of_day(end), zone_of(zone, None), whose, found)


def hours_problem(start: str | None, end: str | None, zone: str | None) -> str | None:
    """Return why these quiet hours are disabled, and what to do; None if they are valid or not set."""
    if not start and not end:
        return None
    try:
        is_same = _minute_of_day(start or "") == _minute_of_day(end or "")
        ZoneInfo(zone or "UTC")
    except (ValueError, KeyError, OSError) as error:  # the last two are ZoneInfo's, for an unknown name
        return f"they cannot be read: {error}; set both to HH:MM and quiet_hours_tz to an IANA name or NULL"
    if is_same:
        return "start and end are the same, which means no quiet hours; to stop sending use paused = true"
    return None


def zone_of(name: str | None, otherwise: T) -> ZoneInfo | T:
    """Return the time zone with an IANA name; `otherwise` if there is none of this name."""
    with contextlib.suppress(ValueError, KeyError, OSError):  # the last two are ZoneInfo's, for an unknown name
        return ZoneInfo(name) if name else otherwise
    return otherwise


def is_of(text: str | None) -> bool:
    """Return whether `text` is a value of quiet_hours_of."""
    return text in get_args(Of)


def quiet_days(text: str | None) -> QuietDays:
    """Return the readable days of the setting quiet_days, such as `sat,sun,2026-12-25`."""
    found = [_day(part) for part in _parts(text)]
    return QuietDays(
        frozenset(day for day in found if isinstance(day, int)),
        frozenset(sorted(day for day in found if isinstance(day, date))[-MAX_DATES:]),
    )


def quiet_days_problem(text: str | None) -> str | None:
    """Return what of the setting quiet_days cannot be read, and what to do; None if all of it can. The rest counts."""
    unreadable = [part for part in _parts(text) if _day(part) is None]
    if unreadable:
        return f"these days cannot be read: {', '.join(unreadable)}; {QUIET_DAYS_REMEDY}"
    if len(quiet_days(text).weekdays) == len(WEEKDAYS):
        return "every day of the week is quiet; to stop sending, set paused = true"
    dates = [part for part in _parts(text) if isinstance(_day(part), date)]
    return f"more than {MAX_DATES} dates: remove those that are past" if len(dates) > MAX_DATES else None


def _minute_of_day(text: str) -> int:
    match = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])(:00)?", text.strip())  # seconds: a column of type TIME
    if not match:
        raise ValueError(f"{text!r} is not HH:MM")
    return int(match[1]) * 60 + int(match[2])


def _parts(text: str | None) -> list[str]:
    return [part for part in re.split(r"[,;\s]+", text or "") if part]


def _day(part: str) -> int | date | None:
    """Return a weekday, by its name or the first three letters of it, or a date; None for anything else."""
    for number, name in enumerate(WEEKDAYS):
        if part.lower() in (name, name[:3]):
            return number
    try:
        return date.fromisoformat(part) if re.fullmatch(r"\d{4}-\d\d-\d\d", part) else None
    except ValueError:  # such as 2026-02-30
        return None


# --- the minutes of a day -----------------------------------------------------------------------------
# A day is an ordinal (date.toordinal) of UTC. Bit 0 of an integer is its first minute.


@functools.lru_cache(maxsize=50_000)  # of one tick: the different sets of zones, for the days until the next open one
def _closed_minutes(times: QuietTimes, names: tuple[str, ...], day: int) -> int:
    """Return the minutes at which it is quiet, or will be within MARGIN."""
    quiet = _quiet_minutes(times, names, day) | _quiet_minutes(times, names, day + 1) << DAY
    closed = quiet
    for minutes in range(1, MARGIN_MINUTES + 1):
        closed |= quiet >> minutes
    return closed & WHOLE_DAY


@functools.lru_cache(maxsize=50_000)
def _quiet_minutes(times: QuietTimes, names: tuple[str, ...], day: int) -> int:
    """Return the minutes at which it is quiet in any of the zones that count."""
    known = [ZoneInfo(name) for name in names if zones.is_known(name)] if times.of != "sender" else []
    counting: list[ZoneInfo | None] = [*known]
    if times.of != "recipient" or not known:
        counting.append(times.sender)
    quiet = 0
    for zone in counting:
        quiet |= _quiet_in_zone(times, zone, day)
    return quiet


@functools.lru_cache(maxsize=50_000)
def _quiet_in_zone(times: QuietTimes, zone: tzinfo | None, day: int) -> int:
    """Return the minutes at which it is quiet in one zone.

    The offset from UTC changes at most once in a day, at a whole minute. If it does, each part has its own offset.
    """
    before, after = _offset(zone, day, 0), _offset(zone, day + 1, 0)
    if before == after:
        return _local_minutes(times, day, before)
    minutes = range(1, DAY)
    change = 1 + bisect.bisect_left(minutes, True, key=lambda minute: _offset(zone, day, minute) != before)
    first_part = (1 << change) - 1
    return _local_minutes(times, day, before) & first_part | _local_minutes(times, day, after) & ~first_part


def _local_minutes(times: QuietTimes, day: int, offset: int) -> int:
    """Return the quiet minutes of a day of UTC where the clocks are `offset` minutes ahead of UTC."""
    quiet = 0
    for number, local_day in enumerate((day - 1, day, day + 1)):
        quiet |= _quiet_on(times, local_day) << number * DAY
    return quiet >> DAY + offset & WHOLE_DAY


def _quiet_on(times: QuietTimes, local_day: int) -> int:
    """Return the quiet minutes of a day of the local calendar."""
    if times.days.contains(local_day):
        return WHOLE_DAY
    from_start, from_end = WHOLE_DAY >> times.start << times.start, WHOLE_DAY >> times.end << times.end
    return from_start & ~from_end if times.start <= times.end else from_start | WHOLE_DAY & ~from_end


def _offset(zone: tzinfo | None, day: int, minute: int) -> int:
    """Return how many minutes the clocks of a zone (None: of this host) are ahead of UTC."""
    offset = _moment(day, minute).astimezone(zone).utcoffset()
    return (offset or timedelta()) // timedelta(minutes=1)


def _utc_minute(moment: datetime) -> tuple[int, int]:
    """Return the day and the minute of a moment in UTC."""
    utc = moment.astimezone(UTC)
    return utc.toordinal(), utc.hour * 60 + utc.minute


def _moment(day: int, minute: int) -> datetime:
    return datetime.fromordinal(day).replace(tzinfo=UTC) + timedelta(minutes=minute)


def _first_bit(bits: int, minute: int) -> int | None:
    """Return the first minute from `minute` on whose bit is set; None if there is none."""
    left = bits >> minute
    return minute + (left & -left).bit_length() - 1 if left else None
