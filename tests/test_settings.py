"""Check what can be set, and that a refused value changes nothing."""

import threading
from typing import Any

import msgspec
import psycopg2
import pytest
from helpers import LOCK_WAITS
from testing import TestData, wait_until

import db
import settings


def change(world: TestData, **fields: Any) -> settings.Settings:
    """Change settings as the API does, from JSON."""
    changes = msgspec.convert(fields, settings.Changes)
    return settings.change(world.databases.quinn, world.databases.icloud, changes)


def test_what_is_left_out_stays_as_it_is(world: TestData) -> None:
    world.settings(max_per_hour=7)
    changed = change(world, paused=True, quietHoursStart="22:00", quietHoursEnd="07:30", quietHoursTz="Europe/Berlin")
    assert (changed.paused, changed.max_per_hour, changed.quiet_hours_end) == (True, 7, "07:30")
    assert settings.read(world.databases.quinn) == changed
    assert change(world) == changed


def test_null_takes_a_limit_and_quiet_hours_away(world: TestData) -> None:
    change(world, maxPerDay=5, quietHoursStart="22:00", quietHoursEnd="7:00")
    changed = change(world, maxPerDay=None, quietHoursStart=None, quietHoursEnd=None, approvalDays=None)
    assert (changed.max_per_day, changed.quiet_hours_start, changed.approval_days) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"quietHoursStart": "25:00", "quietHoursEnd": "08:00"}, "'25:00' is not HH:MM"),
        ({"quietHoursStart": "9pm", "quietHoursEnd": "08:00"}, "'9pm' is not HH:MM"),
        ({"quietHoursStart": "21:00"}, "belong together: set both, or both to null"),
        ({"quietHoursEnd": "21:00", "quietHoursStart": ""}, "belong together"),
        ({"quietHoursStart": "21:00", "quietHoursEnd": "21:00"}, "to stop sending use paused = true"),
        ({"quietHoursTz": "Mars/Base"}, "quiet_hours_tz to an IANA name or NULL"),
        ({"quietHoursTz": "../../etc/passwd"}, "they cannot be read"),
        ({"quietHoursTz": "Europe/Berlin\x00"}, "a NUL"),
        ({"quietDays": "sat,someday"}, "quietDays: these days cannot be read: someday"),
        ({"quietDays": "mon,tue,wed,thu,fri,sat,sun"}, "every day of the week is quiet"),
        ({"quietDays": "sat\x00"}, "a NUL"),
        ({"deviceId": "mac-mini"}, "deviceId is not the id of a device; the devices are: mac-mini ("),
        ({"deviceId": "00000000-0000-4000-8000-000000000000"}, "deviceId is not the id of a device"),
    ],
)
def test_a_refused_value_gets_a_sentence_and_changes_nothing(
    world: TestData, fields: dict[str, Any], sentence: str
) -> None:
    world.device()
    before = settings.read(world.databases.quinn)
    with pytest.raises(settings.SettingsRefused) as refusal:
        change(world, paused=True, **fields)
    assert sentence in str(refusal.value)
    assert settings.read(world.databases.quinn) == before


@pytest.mark.parametrize(
    "fields",
    [{"maxPerHour": -1}, {"maxPerHour": 2**31}, {"maxPerHour": "7"}, {"paused": None}, {"approvalDays": 0}, {"x": 1}],
)
def test_a_value_of_the_wrong_type_is_refused(world: TestData, fields: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        change(world, **fields)


def test_a_device_is_chosen_by_its_id(world: TestData) -> None:
    device_id = world.device()
    assert change(world, deviceId=device_id.upper()).device_id in (device_id, device_id.upper())
    assert settings.read(world.databases.quinn).device_id == device_id
    assert change(world, deviceId=None).device_id is None


def test_without_its_row_there_is_an_instruction(world: TestData) -> None:
    world.quinn("DELETE FROM outreach_settings")
    with pytest.raises(settings.NoSettings, match=r"run `python db.py migrate`"):
        settings.read(world.databases.quinn)


def test_two_changes_at_once_do_not_undo_each_other(world: TestData) -> None:
    quinn = world.databases.quinn
    other = db.connect(world.databases.quinn_url)
    other.autocommit = False
    db.query(other, "UPDATE outreach_settings SET max_per_hour = 5")
    thread = threading.Thread(target=change, args=(world,), kwargs={"maxPerDay": 50})
    thread.start()
    wait_until(lambda: db.query(other, LOCK_WAITS))
    other.commit()
    other.close()
    thread.join()
    changed = settings.read(quinn)
    assert (changed.max_per_hour, changed.max_per_day) == (5, 50)


def test_a_table_whose_quiet_hours_are_of_type_time_works(world: TestData) -> None:
    for column in ("quiet_hours_start", "quiet_hours_end"):
        world.quinn(f"ALTER TABLE outreach_settings ALTER {column} TYPE time USING {column}::time")
    change(world, quietHoursStart="21:00", quietHoursEnd="8:00")
    assert settings.read(world.databases.quinn).quiet_hours_end == "08:00:00"
    assert change(world, paused=True).paused


def test_a_lost_connection_reaches_the_caller(world: TestData) -> None:
    world.databases.quinn.close()
    with pytest.raises(psycopg2.InterfaceError):
        settings.read(world.databases.quinn)
