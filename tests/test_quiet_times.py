"""Check when it is quiet for a recipient, against a reading minute by minute that knows no shortcut."""

import random
import zoneinfo
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta

import hypothesis
import hypothesis.strategies as st
import pytest

import quiet_times
import zones
from quiet_times import MARGIN, QuietDays, QuietTimes

BERLIN, NEW_YORK, SYDNEY = (
    zoneinfo.ZoneInfo(name) for name in ("Europe/Berlin", "America/New_York", "Australia/Sydney")
)
NIGHT = (21 * 60, 8 * 60)
MINUTE = timedelta(minutes=1)
# Zones with unusual clocks: half and quarter hours, a change of half an hour, far east and west, changes at midnight,
# summer time in the southern hemisphere, and a change for one month of the Islamic calendar.
NAMES = (
    "America/New_York", "America/Chicago", "Europe/London", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe",
    "Australia/Sydney", "Pacific/Chatham", "Pacific/Kiritimati", "Pacific/Niue", "America/St_Johns", "Africa/Cairo",
    "America/Santiago", "Asia/Beirut", "Africa/Casablanca", "Atlantic/Azores", "America/Nuuk", "Antarctica/Troll",
)  # fmt: skip


def naive_quiet(times: QuietTimes, names: Sequence[str], moment: datetime) -> bool:
    """Read the clocks of all zones that count."""
    known: list[zoneinfo.ZoneInfo | None] = [zoneinfo.ZoneInfo(name) for name in names if name != "Mars/Base"]
    counting: dict[str, list[zoneinfo.ZoneInfo | None]] = {
        "sender": [times.sender],
        "recipient": known or [times.sender],
        "both": [*known, times.sender],
    }
    for zone in counting[times.of]:
        local = moment.astimezone(zone)
        minute = local.hour * 60 + local.minute
        if local.weekday() in times.days.weekdays or local.date() in times.days.dates:
            return True
        if times.start < times.end and times.start <= minute < times.end:
            return True
        if times.start > times.end and (minute >= times.start or minute < times.end):
            return True
    return False


def minutes_from(moment: datetime, days: int) -> Iterator[datetime]:
    """Yield a moment, and then each whole minute."""
    yield moment
    whole = moment.astimezone(UTC).replace(second=0, microsecond=0)
    for number in range(1, days * 1440):
        yield whole + number * MINUTE


def naive_open(times: QuietTimes, names: Sequence[str], moment: datetime) -> bool:
    return not any(naive_quiet(times, names, moment + MINUTE * ahead) for ahead in range(MARGIN // MINUTE + 1))


def day_starts(name: str, year: int) -> list[datetime]:
    """Return the start of each day of UTC on which this zone's offset changes, and of the day before."""
    zone = zoneinfo.ZoneInfo(name)
    days = [datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=number) for number in range(366)]
    offsets = [day.astimezone(zone).utcoffset() for day in days]
    changes = [day for day, one, two in zip(days, offsets, offsets[1:], strict=False) if one != two]
    return [near for day in changes for near in (day - timedelta(days=1), day)]


# --- the same as minute by minute -----------------------------------------------------------------------------------

settings = st.builds(
    QuietTimes,
    start=st.integers(0, 1439),
    end=st.integers(0, 1439),
    sender=st.sampled_from([BERLIN, NEW_YORK, SYDNEY, None]),
    of=st.sampled_from(["sender", "recipient", "both"]),
    days=st.builds(
        QuietDays,
        weekdays=st.frozensets(st.integers(0, 6), max_size=3),
        dates=st.frozensets(st.dates(date(2026, 3, 1), date(2026, 4, 15)), max_size=4),
    ),
)
zone_sets = st.lists(st.sampled_from([*NAMES, "Mars/Base"]), max_size=3)
# March and April have the clock changes of the north and of the south.
moments = st.integers(0, 42 * 86_400).map(lambda seconds: datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=seconds))


@hypothesis.given(settings, zone_sets, moments)
@hypothesis.settings(max_examples=400)
def test_one_moment_is_read_as_minute_by_minute(times: QuietTimes, names: list[str], moment: datetime) -> None:
    assert times.is_quiet(names, moment) == naive_quiet(times, names, moment)
    assert times.is_open(names, moment) == naive_open(times, names, moment)


@hypothesis.given(settings, zone_sets, moments)
@hypothesis.settings(max_examples=60)
def test_next_open_and_next_quiet_are_the_first_ones(times: QuietTimes, names: list[str], moment: datetime) -> None:
    found = times.next_open(names, moment)
    expected = (at for at in minutes_from(moment, 9) if naive_open(times, names, at))
    assert found == next(expected, found), "nothing before it"
    assert found is None or naive_open(times, names, found)
    quiet = times.next_quiet(names, moment)
    expected = (at for at in minutes_from(moment, 9) if naive_quiet(times, names, at))
    assert quiet == next(expected, quiet)
    assert quiet is None or naive_quiet(times, names, quiet)
    until = times.valid_until(names, moment)
    assert until is None or (until > moment) == times.is_open(names, moment)


@pytest.mark.parametrize("seed", range(4))
def test_a_year_of_minutes_in_random_zones(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311  # a choice of settings, no secret
    names = rng.sample(NAMES, rng.randrange(1, 4))
    weekdays = frozenset(rng.sample(range(7), rng.randrange(3)))
    days = QuietDays(weekdays, frozenset({date(2026, 12, 25), date(2027, 1, 1)}))
    start, end = rng.choice([NIGHT, (9 * 60, 17 * 60), (23 * 60 + 30, 30), (2 * 60 + 15, 2 * 60 + 45)])
    times = QuietTimes(start, end, BERLIN, rng.choice(["recipient", "both"]), days)
    moment = datetime(2026, 4, 1, tzinfo=UTC)
    for _ in range(365 * 1440):
        assert times.is_quiet(names, moment) == naive_quiet(times, names, moment), (names, moment)
        moment += MINUTE


def test_each_minute_of_a_clock_change_in_every_zone() -> None:
    for name in sorted({name for names in zones._zones_by_area_code().values() for name in names} | set(NAMES)):
        for times in (
            QuietTimes(90, 150, BERLIN, "recipient"),
            QuietTimes(23 * 60, 60, BERLIN, "recipient", QuietDays(frozenset({6}))),
        ):
            for start in day_starts(name, 2026):
                for number in range(1440):
                    moment = start + number * MINUTE
                    assert times.is_quiet([name], moment) == naive_quiet(times, [name], moment), (name, moment)


# --- clock changes on either side -----------------------------------------------------------------------------------


def test_skipped_and_repeated_hours_of_either_side_count() -> None:
    times = QuietTimes(*NIGHT, BERLIN, "both")
    # On 8 March New York changes, and Berlin does not until 29 March: for three weeks they are five hours apart.
    for day, opens in (("2026-03-06", 13), ("2026-03-09", 12), ("2026-03-30", 12)):
        midnight = datetime.fromisoformat(f"{day}T00:00:00+00:00")
        assert times.next_open(["America/New_York"], midnight) == midnight + timedelta(hours=opens)
    closes = {"2026-03-06": 20, "2026-03-09": 20, "2026-03-30": 19}  # 21:00 in Berlin
    for day, hour in closes.items():
        noon = datetime.fromisoformat(f"{day}T15:00:00+00:00")
        assert times.next_quiet(["America/New_York"], noon) == noon.replace(hour=hour)
        assert times.valid_until(["America/New_York"], noon) == noon.replace(hour=hour) - MARGIN


def test_quiet_hours_that_a_clock_change_skips_are_over_at_once() -> None:
    times = QuietTimes(2 * 60, 3 * 60, NEW_YORK, "recipient")
    before = datetime(2026, 3, 8, 6, 30, tzinfo=UTC)  # 01:30; at 07:00 UTC the clocks go from 02:00 to 03:00
    assert times.next_quiet(["America/New_York"], before) == datetime(2026, 3, 9, 6, 0, tzinfo=UTC)


def test_repeated_hour_is_quiet_twice() -> None:
    times = QuietTimes(60, 90, NEW_YORK, "recipient")
    for minutes, is_quiet in ((0, True), (29, True), (30, False), (59, False), (60, True), (89, True), (90, False)):
        moment = datetime(2026, 11, 1, 5, 0, tzinfo=UTC) + minutes * MINUTE
        assert times.is_quiet(["America/New_York"], moment) is is_quiet, minutes


# --- whose zones count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "names", "is_quiet"),
    [
        ("sender", ["Asia/Tokyo"], False),
        ("recipient", ["Asia/Tokyo"], True),
        ("both", ["Asia/Tokyo"], True),
        ("recipient", ["Europe/Paris", "Asia/Tokyo"], True),
        ("recipient", ["Mars/Base"], False),
        ("recipient", ["Mars/Base", "Asia/Tokyo"], True),
        ("recipient", [], False),
        ("both", ["Europe/Paris"], False),
    ],
)
def test_quiet_in_any_zone_that_counts_is_quiet(of: quiet_times.Of, names: list[str], is_quiet: bool) -> None:
    noon_in_berlin = datetime(2026, 6, 3, 12, 30, tzinfo=BERLIN)  # 19:30 in Tokyo
    times = QuietTimes(19 * 60, 20 * 60, BERLIN, of)
    assert times.is_quiet(names, noon_in_berlin) is is_quiet


def test_two_minutes_before_quiet_hours_nothing_is_enqueued_and_nothing_is_withdrawn() -> None:
    times = QuietTimes(*NIGHT, BERLIN)
    for second, is_open, is_quiet in ((-121, True, False), (-120, False, False), (-1, False, False), (0, False, True)):
        moment = datetime(2026, 6, 3, 21, 0, tzinfo=BERLIN) + timedelta(seconds=second)
        assert (times.is_open([], moment), times.is_quiet([], moment)) == (is_open, is_quiet)


def test_without_quiet_hours_and_days_nothing_is_ever_quiet() -> None:
    times = QuietTimes(480, 480, None, "both")
    now = datetime(2026, 6, 3, 12, 0, 30, tzinfo=UTC)
    assert times.is_open(["Asia/Tokyo"], now)
    assert times.next_open(["Asia/Tokyo"], now) == now
    assert times.next_quiet(["Asia/Tokyo"], now) is times.valid_until(["Asia/Tokyo"], now) is None


# --- no hour ----------------------------------------------------------------------------------------------------------


def test_people_whose_zones_leave_no_common_hour_have_none() -> None:
    times = QuietTimes(17 * 60, 9 * 60, BERLIN, "recipient")
    now = datetime(2026, 6, 3, 12, 0, tzinfo=UTC)
    assert times.next_open(["Australia/Sydney", "America/New_York"], now) is None
    assert times.next_open(["Australia/Sydney"], now)
    assert times._replace(of="both").next_open(["Australia/Sydney"], now) is None


def test_holidays_of_two_weeks_are_not_a_person_without_an_hour() -> None:
    holidays = frozenset(date(2026, 12, 21) + timedelta(days=number) for number in range(14))
    times = QuietTimes(*NIGHT, BERLIN, "both", QuietDays(frozenset({5, 6}), holidays))
    now = datetime(2026, 12, 20, 12, 0, tzinfo=UTC)
    assert times.next_open(["America/New_York"], now) == datetime(2027, 1, 4, 8, 0, tzinfo=NEW_YORK)


def test_date_months_away_ends_the_validity_of_a_message() -> None:
    times = QuietTimes(0, 0, BERLIN, "sender", QuietDays(dates=frozenset({date(2026, 12, 25)})))
    now = datetime(2026, 6, 3, 12, 0, tzinfo=UTC)
    assert times.next_quiet([], now) == datetime(2026, 12, 25, 0, 0, tzinfo=BERLIN)
    assert times.next_quiet([], now + timedelta(days=300)) is None


# --- the setting quiet_days -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weekdays", "dates", "problem"),
    [
        (None, set(), set(), None),
        (" ", set(), set(), None),
        ("sat,sun,2026-12-25", {5, 6}, {date(2026, 12, 25)}, None),
        ("Saturday; SUN 2026-12-25", {5, 6}, {date(2026, 12, 25)}, None),
        ("sat,sunn", {5}, set(), "sunn"),
        ("2026-02-30,mon", {0}, set(), "2026-02-30"),
        ("25.12.2026", set(), set(), "25.12.2026"),
        ("20261225", set(), set(), "20261225"),
        ("mon,tue,wed,thu,fri,sat,sun", set(range(7)), set(), "set paused = true"),
    ],
)
def test_readable_quiet_days_count_and_the_others_are_named(
    text: str | None, weekdays: set[int], dates: set[date], problem: str | None
) -> None:
    assert quiet_times.quiet_days(text) == QuietDays(frozenset(weekdays), frozenset(dates))
    said = quiet_times.quiet_days_problem(text)
    assert said is None if problem is None else problem in str(said)
    if problem and "paused" not in problem:
        assert str(said).endswith("; write weekdays and dates such as sat,sun,2026-12-25")


def test_quiet_hours_of_has_three_values() -> None:
    assert [text for text in ("sender", "recipient", "both", "Sender", "", None) if quiet_times.is_of(text)] == [
        "sender",
        "recipient",
        "both",
    ]
