"""Check quiet hours against PostgreSQL's calendar, and limits against brute force and against the jobs."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from helpers import Crash, CrashingClient
from hypothesis import HealthCheck, example, given, settings
from testing import SERVICE_TOKEN, TestData

import db
import dispatcher
import pacing
import quiet_times

# With daylight saving of an hour, of half an hour, in the south, with half hours and quarters of one in the offset.
ZONES = (
    "Europe/Berlin", "America/New_York", "America/St_Johns", "Australia/Lord_Howe", "Pacific/Chatham",
    "Australia/Adelaide", "America/Havana", "Asia/Kathmandu", "UTC",
)  # fmt: skip
NOW = datetime(2026, 4, 22, 12, 0, tzinfo=UTC)
MIDNIGHT = datetime(2026, 1, 1, tzinfo=UTC)
NO_LIMITS = pacing.Settings(False, None, None, None, None, None, None, None, None)


@pytest.fixture(scope="module")
def postgres_clock(postgres: str) -> Iterator[Any]:
    """A connection that knows the time zones; no tables are needed."""
    with contextlib.closing(db.connect(postgres)) as conn:
        yield conn


# --- quiet hours --------------------------------------------------------------------------------------


@functools.cache
def clock_changes(zone: str) -> list[datetime]:
    """Return the days on which the zone's clocks change, from 2024 to 2026."""
    days = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(3 * 365)]
    offsets = [day.astimezone(ZoneInfo(zone)).utcoffset() for day in days]
    return [day for day, before, after in zip(days, offsets, offsets[1:], strict=False) if before != after] or days[:1]


def instants(zone: str) -> st.SearchStrategy[tuple[str, datetime]]:
    """Draw the zone and an instant within two days of one of its clock changes."""
    seconds = st.integers(-86_400, 2 * 86_400)
    return st.tuples(
        st.just(zone),
        st.builds(lambda day, s: day + timedelta(seconds=s), st.sampled_from(clock_changes(zone)), seconds),
    )


# Clocks change at night: half of the boundaries lie there.
minutes = st.integers(0, 1439) | st.integers(0, 4 * 60)


def hhmm(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


ORACLE = """
    WITH minute AS (
        SELECT moment, (moment AT TIME ZONE %(zone)s)::time AS wall
          FROM (SELECT %(moment)s::timestamptz
                 UNION ALL
                SELECT generate_series(date_trunc('minute', %(moment)s::timestamptz) + interval '1 minute',
                                       %(moment)s::timestamptz + interval '50 hours', interval '1 minute')
               ) AS looked_at (moment)
    ), judged AS (
        SELECT moment,
               CASE WHEN %(start)s::time < %(end)s::time THEN wall >= %(start)s::time AND wall < %(end)s::time
                    ELSE wall >= %(start)s::time OR wall < %(end)s::time END AS quiet
          FROM minute
    )
    SELECT (SELECT quiet FROM judged WHERE moment = %(moment)s),
           (SELECT min(moment) FROM judged WHERE quiet)
"""


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(ZONES).flatmap(instants), start=minutes, end=minutes)
@example(("Europe/Berlin", datetime(2026, 3, 29, 0, 59, 59, tzinfo=UTC)), 120, 180)  # an hour that does not exist
@example(("Europe/Berlin", datetime(2026, 10, 25, 0, 30, tzinfo=UTC)), 120, 150)  # one that comes twice
@example(("UTC", datetime(2026, 1, 1, 20, 59, 59, 999999, tzinfo=UTC)), 1260, 480)
def test_quiet_hours_agree_with_postgresql(
    postgres_clock: Any, where: tuple[str, datetime], start: int, end: int
) -> None:
    zone, moment = where
    if start == end:
        return
    parameters = {"zone": zone, "moment": moment, "start": hhmm(start), "end": hhmm(end)}
    [(quiet, next_quiet)] = db.query(postgres_clock, ORACLE, parameters)
    times = quiet_times.read(hhmm(start), hhmm(end), zone, "sender", None)
    assert times.is_quiet((), moment) is quiet
    assert times.next_quiet((), moment) == next_quiet


def test_quiet_hours_include_start_and_exclude_end() -> None:
    for start, end in ((21 * 60, 8 * 60), (13 * 60, 14 * 60)):
        times = quiet_times.QuietTimes(start, end, ZoneInfo("UTC"))
        second = timedelta(seconds=1)
        first, last = MIDNIGHT + timedelta(minutes=start), MIDNIGHT + timedelta(minutes=end)
        covered = [times.is_quiet((), moment) for moment in (first - second, first, last - second, last)]
        assert covered == [False, True, True, False]


@pytest.mark.parametrize(("zone", "utc_hour"), [("America/New_York", 12), ("Asia/Kathmandu", 2)])
def test_quiet_hours_default_to_local_time(monkeypatch: pytest.MonkeyPatch, zone: str, utc_hour: int) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        quiet_times._quiet_in_zone.cache_clear()
        quiet_times._quiet_minutes.cache_clear()
        times = quiet_times.read("07:00", "09:00", None, "sender", None)
        assert times.is_quiet((), datetime(2026, 1, 15, utc_hour, 30, tzinfo=UTC))
        assert not times.is_quiet((), datetime(2026, 1, 15, utc_hour + 3, 30, tzinfo=UTC))
    finally:
        monkeypatch.undo()
        time.tzset()
        quiet_times._quiet_in_zone.cache_clear()
        quiet_times._quiet_minutes.cache_clear()


@pytest.mark.parametrize(
    ("text", "minute"),
    [("00:00", 0), ("7:05", 425), ("07:05", 425), ("23:59", 1439), (" 21:00 ", 1260), ("21:00:00", 1260)],
)
def test_time_of_day_formats(text: str, minute: int) -> None:
    times = quiet_times.read(text, "12:34", "UTC", "sender", None)
    assert times == quiet_times.QuietTimes(minute, 754, ZoneInfo("UTC"))


@pytest.mark.parametrize(
    ("start", "end", "zone"),
    [
        ("25:00", "08:00", None), ("24:00", "08:00", None), ("21:60", "08:00", None), ("2100", "08:00", None),
        ("9 pm", "08:00", None), ("21:00:30", "08:00", None), ("21:00", "8", None), ("２１:00", "08:00", None),
        ("21:00", None, None), (None, "08:00", None), ("21:00", "", None), ("08:00", "08:00", None),
        ("21:00", "08:00", "Europe/Atlantis"), ("21:00", "08:00", "../etc/passwd"), ("21:00", "08:00", "Europe"),
        ("21:00", "08:00", "Ä" * 300), ("21:00", "08:00", "UTC+1 or so"),
    ],
)  # fmt: skip
def test_invalid_quiet_hours_are_disabled_with_warning(
    caplog: pytest.LogCaptureFixture, start: str | None, end: str | None, zone: str | None
) -> None:
    pace = pacing.Snapshot(
        NO_LIMITS._replace(quiet_hours_start=start, quiet_hours_end=end, quiet_hours_tz=zone), NOW, 0, []
    )
    for _ in range(3):
        assert pacing.global_hold(pace) is None
        assert pace.settings.quiet_times.valid_until((), NOW) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "quiet hours are disabled" in caplog.text


def test_empty_quiet_hours_are_disabled_with_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(3):
        assert not quiet_times.read("08:00", "8:00", None, "sender", None).is_quiet((), NOW)
    meant = "start and end are the same, which means no quiet hours; to stop sending use paused = true"
    assert [record.getMessage() for record in caplog.records] == [
        f"quiet hours are disabled start='08:00' end='8:00' tz=None; {meant}"
    ]


@given(st.text(), st.text(), st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0")))
@settings(max_examples=50)
def test_no_text_in_settings_stops_a_tick(start: str, end: str, zone: str | None) -> None:
    quiet_times.read(start, end, zone, start, end)
    quiet_times.read("21:00", "08:00", zone, zone, start)


def test_missing_quiet_hours_cause_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    for nothing in (None, ""):
        assert not quiet_times.read(nothing, nothing, "Europe/Atlantis", None, nothing).is_quiet((), NOW)
    assert not caplog.records


def test_quiet_hours_accept_columns_of_type_time(world: TestData) -> None:
    for column in ("quiet_hours_start", "quiet_hours_end"):
        world.quinn(f"ALTER TABLE outreach_settings ALTER {column} TYPE TIME USING {column}::time")
    world.settings(quiet_hours_start="00:00", quiet_hours_end="23:59", quiet_hours_tz="UTC")
    pace = pacing.read_snapshot(world.databases.quinn)
    assert pace
    assert pace.settings.quiet_times == quiet_times.QuietTimes(0, 1439, ZoneInfo("UTC"))


def test_oldest_claim_and_message_are_read(world: TestData) -> None:
    now = world.quinn("SELECT now()")[0][0]
    batch_id = world.batch()
    for minutes in (5, 9, 7):
        world.item(batch_id, claimed_at=now - timedelta(minutes=minutes))
    pace = pacing.read_snapshot(world.databases.quinn)
    assert pace is not None
    assert pace.claimed_since == now - timedelta(minutes=9)
    young, old = world.device("young"), world.device("old")
    insert = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, created_at)
        VALUES (%(device)s, '+14155550123', 'Hello!', %(at)s)
    """
    for minutes in (5, 9, 7):
        world.icloud(insert, device=young, at=now - timedelta(minutes=minutes))
    world.icloud("UPDATE icloud.devices SET created_at = now() - interval '1 day' WHERE id = %(id)s", id=old)
    older = [world.device(f"number {days}") for days in range(2, 10)]
    for days, device in enumerate(older, 2):
        sql = "UPDATE icloud.devices SET created_at = now() - %(days)s * interval '1 day' WHERE id = %(id)s"
        world.icloud(sql, id=device, days=days)
    *oldest, first, second = pacing.devices(world.databases.icloud)
    assert [device.id for device in oldest] == older[::-1]
    assert (first.id, first.oldest_at) == (old, None)
    assert (second.id, second.oldest_at, second.waiting) == (young, now - timedelta(minutes=9), 3)


def test_quiet_hours_hold_says_when_it_ends() -> None:
    night = NO_LIMITS._replace(quiet_hours_start="11:00", quiet_hours_end="14:30", quiet_hours_tz="UTC")
    hold = pacing.global_hold(pacing.Snapshot(night, NOW, 0, []))
    assert hold
    assert hold.until == NOW.replace(hour=14, minute=30)
    assert str(hold) == "quiet hours until=2026-04-22T14:30:00+00:00"
    assert str(pacing.global_hold(pacing.Snapshot(night._replace(paused=True), NOW, 0, []))) == "paused"


# --- limits -------------------------------------------------------------------------------------------

limit_values = st.none() | st.integers(0, 6)
send_times = st.lists(st.integers(-120, 90_000) | st.integers(0, 70), max_size=12)  # seconds ago


@given(limit_values, limit_values, limit_values, st.integers(0, 5), send_times)
@settings(max_examples=300)
def test_limit_frees_at_first_possible_instant(
    minute: int | None, hour: int | None, day: int | None, in_flight: int, sent_ago: list[int]
) -> None:
    limits: dict[str, Any] = {"max_per_minute": minute, "max_per_hour": hour, "max_per_day": day}
    every_sent = sorted((NOW - timedelta(seconds=seconds) for seconds in sent_ago), reverse=True)
    read = every_sent[: max((limit for limit in limits.values() if limit is not None), default=0)]  # what read() reads
    pace = pacing.Snapshot(NO_LIMITS._replace(**limits), NOW, in_flight, read)
    places = []
    for usage in pacing.limit_usage(pace):
        window, most = pacing.WINDOWS[usage.limit], limits[usage.limit]
        assert most is not None

        def used(moment: datetime, window: timedelta = window) -> int:
            return sum(sent > moment - window for sent in every_sent) + in_flight

        assert usage.used == used(NOW) or usage.used >= most
        opening = [sent + window for sent in every_sent if used(sent + window) < most and sent + window > NOW]
        assert usage.frees_at == (min(opening, default=None) if used(NOW) >= most else None)
        places.append(max(most - used(NOW), 0))
    assert pacing.remaining_capacity(pace) == min(places, default=None)
    assert (pacing.limit_hold(pace) is None) == (pacing.remaining_capacity(pace) != 0)


def test_limit_that_frees_last_is_named() -> None:
    limits = NO_LIMITS._replace(max_per_minute=1, max_per_hour=1)
    hold = pacing.limit_hold(pacing.Snapshot(limits, NOW, 0, [NOW]))
    assert str(hold) == "limit reached limit=max_per_hour used=1 of=1 until=2026-04-22T13:00:00+00:00"
    hold = pacing.limit_hold(pacing.Snapshot(limits, NOW, 1, []))
    assert str(hold) == "limit reached limit=max_per_minute used=1 of=1"  # only a result frees it


STEPS = st.one_of(
    st.just("cycle"), st.just("cycle"), st.just("tick"), st.just("sync"), st.just("crash"),
    st.just("poll"), st.just("sent"), st.just("failed"), st.just("pause"), st.just("resume"),
    st.sampled_from([1, 59, 61, 1800, 3601, 80_000, -90, -3600]),  # seconds that the clock moves
)  # fmt: skip
POLL = "UPDATE icloud.send_queue SET collected_at = now() WHERE status = 'queued'"
RESULT = """
    UPDATE icloud.send_queue SET status = %(status)s, sent_at = CASE WHEN %(status)s = 'sent' THEN now() END
     WHERE id = (SELECT id FROM icloud.send_queue WHERE status = 'queued' AND collected_at IS NOT NULL LIMIT 1)
"""
USED = """
    SELECT count(*) FILTER (WHERE status = 'queued' OR sent_at > now() - interval '1 minute'),
           count(*) FILTER (WHERE status = 'queued' OR sent_at > now() - interval '1 hour'),
           count(*) FILTER (WHERE status = 'queued' OR sent_at > now() - interval '1 day'),
           count(*) FILTER (WHERE status <> 'failed') - count(DISTINCT batch_item_id) FILTER (WHERE status <> 'failed')
      FROM icloud.send_queue
"""


def take(world: TestData, mac_sync: CrashingClient, step: str | int) -> None:
    """Do one step of the dispatcher, the device, the operator or the clock."""
    databases = world.databases.quinn, world.databases.icloud
    if isinstance(step, int):
        # Moving all stored times into the past has the effect of moving the clock on.
        for query, table in ((world.quinn, "outreach_batch_items"), (world.icloud, "icloud.send_queue")):
            query(f"UPDATE {table} SET sent_at = sent_at - make_interval(secs => %(s)s) WHERE status = 'sent'", s=step)
    elif step in ("pause", "resume"):
        world.settings(paused=step == "pause")
    elif step == "poll":
        world.icloud(POLL)
    elif step in ("sent", "failed"):
        world.icloud(RESULT, status=step)
    else:
        mac_sync.crash = step == "crash"
        if step in ("cycle", "sync"):
            dispatcher.sync(*databases)
        if step != "sync":
            with contextlib.suppress(Crash):
                dispatcher.dispatch(*databases, mac_sync)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(STEPS, min_size=10, max_size=30),
    limits=st.tuples(*[st.none() | st.integers(1, 4)] * 3).filter(any),
)
@example(["crash", "sent", "cycle", "poll", "cycle", "sent", "crash", "tick", "cycle"], (2, None, None))
@example(["tick", "poll", 80_000, "tick", "sent", "tick", "sent", "cycle", "cycle"], (None, 1, 3))
@example(["cycle", "poll", "sent", 3601] * 5, (None, 1, 3))
def test_no_window_exceeds_its_limit(
    world: TestData, base_url: str, steps: list[str | int], limits: tuple[int | None, ...]
) -> None:
    world.quinn("TRUNCATE outreach_batches CASCADE")
    world.icloud("TRUNCATE icloud.devices CASCADE")
    world.settings(paused=False, **dict(zip(pacing.WINDOWS, limits, strict=True)))
    world.device()
    client_id = world.client()
    for _ in range(3):
        world.batch(clients=[client_id] * 4)
    mac_sync = CrashingClient(base_url, SERVICE_TOKEN)
    with mac_sync.session:
        for step in steps:
            take(world, mac_sync, step)
            *used, doubled = world.icloud(USED)[0]
            assert all(limit is None or count <= limit for count, limit in zip(used, limits, strict=True)), (step, used)
            assert doubled == 0
