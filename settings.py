"""Read, check and change the settings of sending: pause, quiet hours, limits, the device.

Used by outreach_server.py. Touches outreach_settings in quinn, and reads icloud.devices. Example:

    settings.change(quinn, icloud, settings.Changes(paused=True))
"""

import logging
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

import db
import quiet_times
import runtime

Connection = Any  # psycopg2's connection
Amount = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Days = Annotated[int, msgspec.Meta(ge=1, le=3650)]
Retention = Annotated[int, msgspec.Meta(ge=8, le=36_500)]  # days; an unknown outcome may be found out for 8 days
logger = logging.getLogger("outreach-server")


class SettingsRefused(Exception):
    """The change is not possible. The message is a sentence: which setting, and what to write."""


class NoSettings(Exception):
    """outreach_settings has no row. The message says what to do."""


class Settings(msgspec.Struct, rename="camel"):
    """The settings, and when the dispatcher's jobs last ran. A limit that is None means none."""

    paused: bool
    quiet_hours_start: str | None
    quiet_hours_end: str | None
    quiet_hours_tz: str | None
    quiet_hours_of: str
    quiet_days: str | None
    max_per_minute: int | None
    max_per_hour: int | None
    max_per_day: int | None
    max_new_contacts_per_hour: int | None
    max_new_contacts_per_day: int | None
    max_per_client_per_week: int | None
    min_gap_seconds: int | None
    device_id: str | None
    stop_after_failures: int | None
    approval_days: int | None
    keep_bodies_days: int | None
    last_dispatched_at: datetime | None
    last_synced_at: datetime | None
    last_tick_at: datetime | None


class Changes(msgspec.Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """New values. What is left out stays as it is."""

    paused: bool | UnsetType = UNSET
    quiet_hours_start: str | UnsetType | None = UNSET
    quiet_hours_end: str | UnsetType | None = UNSET
    quiet_hours_tz: str | UnsetType | None = UNSET
    quiet_hours_of: quiet_times.Of | UnsetType = UNSET
    quiet_days: Annotated[str, msgspec.Meta(max_length=10_000)] | UnsetType | None = UNSET
    max_per_minute: Amount | UnsetType | None = UNSET
    max_per_hour: Amount | UnsetType | None = UNSET
    max_per_day: Amount | UnsetType | None = UNSET
    max_new_contacts_per_hour: Amount | UnsetType | None = UNSET
    max_new_contacts_per_day: Amount | UnsetType | None = UNSET
    max_per_client_per_week: Positive | UnsetType | None = UNSET
    min_gap_seconds: Amount | UnsetType | None = UNSET
    device_id: str | UnsetType | None = UNSET
    stop_after_failures: Amount | UnsetType | None = UNSET
    approval_days: Days | UnsetType | None = UNSET
    keep_bodies_days: Retention | UnsetType | None = UNSET


def read(quinn: Connection, is_locked: bool = False) -> Settings:
    """Return the settings. `is_locked`: nobody else can change them until this transaction ends.

    Raises NoSettings.
    """
    sql = """
        SELECT paused, quiet_hours_start::text, quiet_hours_end::text, quiet_hours_tz, quiet_hours_of, quiet_days,
               max_per_minute, max_per_hour, max_per_day, max_new_contacts_per_hour, max_new_contacts_per_day,
               max_per_client_per_week, min_gap_seconds, device_id::text, stop_after_failures, approval_days,
               keep_bodies_days, last_dispatched_at, last_synced_at, last_tick_at
          FROM outreach_settings
         WHERE id = 1
    """
    rows = db.query(quinn, sql + " FOR UPDATE" if is_locked else sql)
    if not rows:
        raise NoSettings("outreach_settings has no row, so nothing is sent: run `python db.py migrate`")
    return Settings(*rows[0])


def change(quinn: Connection, icloud: Connection, changes: Changes) -> Settings:
    """Change the settings that are given, and return all. Raises NoSettings, and SettingsRefused if nothing changes."""
    sql = """
        UPDATE outreach_settings
           SET paused = %(paused)s, quiet_hours_start = %(quiet_hours_start)s, quiet_hours_end = %(quiet_hours_end)s,
               quiet_hours_tz = %(quiet_hours_tz)s, quiet_hours_of = %(quiet_hours_of)s, quiet_days = %(quiet_days)s,
               max_new_contacts_per_hour = %(max_new_contacts_per_hour)s,
               max_new_contacts_per_day = %(max_new_contacts_per_day)s,
               max_per_client_per_week = %(max_per_client_per_week)s, max_per_minute = %(max_per_minute)s,
               max_per_hour = %(max_per_hour)s, max_per_day = %(max_per_day)s, min_gap_seconds = %(min_gap_seconds)s,
               device_id = %(device_id)s, stop_after_failures = %(stop_after_failures)s,
               approval_days = %(approval_days)s, keep_bodies_days = %(keep_bodies_days)s
         WHERE id = 1
    """
    given = {name: value for name in changes.__struct_fields__ if (value := getattr(changes, name)) is not UNSET}
    with db.transaction(quinn):
        before = read(quinn, is_locked=True)
        after = msgspec.structs.replace(before, **given)
        _check(icloud, after, set(given))
        db.query(quinn, sql, msgspec.structs.asdict(after))
    for name in given:
        if getattr(before, name) != getattr(after, name):
            logger.info("setting changed %s=%r before=%r", name, getattr(after, name), getattr(before, name))
    return after


def _check(icloud: Connection, after: Settings, given: set[str]) -> None:
    """Raise SettingsRefused for quiet hours and a device that would not work."""
    hours = {"quiet_hours_start", "quiet_hours_end", "quiet_hours_tz"}
    if given & hours:
        texts = (after.quiet_hours_start, after.quiet_hours_end, after.quiet_hours_tz)
        if any(text is not None and db.UNSTORABLE.search(text) for text in texts):
            raise SettingsRefused("quiet hours: a text has a NUL or half of a surrogate pair")
        if bool(after.quiet_hours_start) != bool(after.quiet_hours_end):
            raise SettingsRefused("quietHoursStart and quietHoursEnd belong together: set both, or both to null")
        # With the zone also if there are no hours: it would disable the hours that are set later.
        problem = quiet_times.hours_problem(
            after.quiet_hours_start or "21:00", after.quiet_hours_end or "08:00", after.quiet_hours_tz
        )
        if problem:
            raise SettingsRefused(f"quiet hours: {problem}")
    if "quiet_days" in given and after.quiet_days and db.UNSTORABLE.search(after.quiet_days):
        raise SettingsRefused("quietDays: the text has a NUL or half of a surrogate pair")
    if "quiet_days" in given and (problem := quiet_times.quiet_days_problem(after.quiet_days)):
        raise SettingsRefused(f"quietDays: {problem}")
    if "device_id" in given and after.device_id is not None:
        known = {str(device_id): name for device_id, name in db.query(icloud, "SELECT id, name FROM icloud.devices")}
        if not runtime.is_uuid(after.device_id) or after.device_id.lower() not in known:
            listed = ", ".join(f"{name} ({device_id})" for device_id, name in known.items()) or "none yet"
            raise SettingsRefused(f"deviceId is not the id of a device; the devices are: {listed}")
