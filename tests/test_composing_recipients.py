"""Check what a draft says of its recipients' night, of the weekly limit and of new contacts."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import ago, zone_at
from test_composing import draft, person, search
from testing import TestData

import forecast
import report

NIGHT = {"quiet_hours_start": "21:00", "quiet_hours_end": "08:00", "quiet_hours_tz": "UTC"}
INTERVAL = timedelta(seconds=30)


def place(world: TestData, client_id: str, time_zone: str) -> str:
    world.quinn("UPDATE clients SET time_zone = %(zone)s WHERE id = %(id)s", zone=time_zone, id=client_id)
    return client_id


def items(world: TestData) -> list[Any]:
    sql = "SELECT time_zones, new_contact FROM outreach_batch_items WHERE status = 'pending' ORDER BY created_at, id"
    return sorted(world.quinn(sql))


def test_draft_stores_where_people_are_and_whether_they_are_new(world: TestData) -> None:
    place(world, person(world), "Asia/Tokyo")
    known = person(world, handle="+18502341234")
    world.item(world.batch(status="sent"), known, status="sent", sent_at=ago(days=3))
    person(world, handle="jane@example.com")
    made = draft(world)
    assert made.new_contacts == 2
    assert items(world) == [([], True), (["America/Chicago", "America/New_York"], False), (["Asia/Tokyo"], True)]


def test_who_has_no_hour_is_left_out_and_the_zones_are_named(world: TestData) -> None:
    world.settings(**NIGHT, quiet_hours_of="both")
    world.settings(quiet_hours_start="18:00", quiet_hours_end="09:00")
    place(world, person(world), "Etc/GMT+12")
    place(world, person(world), "Europe/London")
    assert search(world) == {"items": 1, "noHour": 1}
    [left] = draft(world).left_out
    assert (left.reason, left.sample[0].detail) == ("noHour", "Etc/GMT+12")
    world.settings(quiet_hours_of="recipient")
    assert search(world) == {"items": 2}


def test_who_sleeps_until_the_end_of_the_batch_has_no_hour(world: TestData) -> None:
    world.settings(**NIGHT, quiet_hours_of="recipient")
    place(world, person(world), zone_at(2))
    place(world, person(world), zone_at(12))
    soon = datetime.now(UTC) + timedelta(hours=2)
    assert search(world, send_until=soon) == {"items": 1, "noHour": 1}
    assert search(world, send_until=soon + timedelta(hours=12)) == {"items": 2}
    assert search(world, send_from=soon + timedelta(hours=5), send_until=soon + timedelta(hours=6)) == {"items": 2}


def test_who_had_the_messages_of_a_week_is_left_out(world: TestData) -> None:
    world.settings(max_per_client_per_week=2)
    sent = world.batch(status="sent")
    for client_id, days in ((person(world), (1, 6)), (person(world), (1, 8)), (person(world), (1,))):
        for age in days:
            world.item(sent, client_id, status="sent", sent_at=ago(days=age))
    assert search(world) == {"items": 2, "overWeeklyLimit": 1}


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({**NIGHT}, True), ({**NIGHT, "quiet_hours_of": "recipient"}, False), ({**NIGHT, "quiet_hours_of": "both"}, False),
     ({"quiet_hours_start": None, "quiet_hours_end": None, "quiet_hours_tz": "UTC"}, False),
     ({"quiet_hours_start": None, "quiet_hours_end": None, "quiet_days": "sun", "quiet_hours_tz": "UTC"}, True)],
)  # fmt: skip
def test_draft_warns_if_people_live_in_another_night(world: TestData, settings: dict[str, Any], warned: bool) -> None:
    world.settings(**settings)
    for time_zone in ("Asia/Tokyo", "America/New_York", "UTC"):
        place(world, person(world), time_zone)
    found = [warning for warning in draft(world).warnings if "time zone" in warning]
    assert len(found) == warned
    if warned:
        assert found[0].startswith(
            "2 people live in another time zone, or may, and quiet hours are those of the sender"
        )


def test_forecast_of_a_draft_heeds_night_and_new_contacts(world: TestData) -> None:
    world.settings(**NIGHT, quiet_hours_of="recipient")
    world.settings(max_per_minute=None, max_per_hour=None, max_per_day=None, min_gap_seconds=None)
    for _ in range(3):
        place(world, person(world), zone_at(2))
    opens = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=6)
    made = draft(world)
    assert made.forecast
    assert made.forecast.first_at
    assert abs(made.forecast.first_at - opens) <= timedelta(minutes=1)
    world.settings(quiet_hours_of="sender", quiet_hours_start=None, quiet_hours_end=None, max_new_contacts_per_hour=1)
    made = draft(world)
    assert made.forecast
    assert made.forecast.binds == "max_new_contacts_per_hour"
    assert made.forecast.first_at
    assert made.forecast.last_at
    assert abs(made.forecast.last_at - made.forecast.first_at - timedelta(hours=2)) <= timedelta(minutes=2)


def test_forecast_foresees_who_has_opted_out_since(world: TestData) -> None:
    person(world, handle="+14155550101")
    ana = person(world, handle="+14155550102")
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, 'ana@example.com', false)", id=ana)
    made = draft(world)
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('ana@example.com', 'owner')")
    read = report.read_databases(made.id)
    assert read.outreach
    found = forecast.forecast_batch(read.outreach, read.queue, INTERVAL, made.id)
    assert (found.would_send, found.would_skip) == (1, {"opted out": 1})
