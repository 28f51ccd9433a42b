"""Decide who gets a text, and who is left out for which reason, one person after the other.

Used by composing.py. Reads clients, contact_relationships and outreach_batch_items in quinn, and icloud.opt_outs;
writes nothing. Memory grows with the number of different handles only. Example:

    for each in recipients.walk(quinn, icloud, recipients.read_selection(quinn, query), template, Times(days=30)):
        ...  # a Message or a LeftOut

The order of the people is that of clients.id; a batch is sent in this order.
"""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from psycopg2 import sql

import audience
import batches
import db
import handles
import history
import pacing
import quiet_times
import templates
import zones
from client_fields import Fields

CHUNK = 1000  # people that are read and checked at a time
SEARCH_TIMEOUT = "5s"  # of a statement that searches clients
# The reasons, in the order in which they are checked. A person counts for the first one that applies.
NO_HANDLE, BAD_HANDLE, OPTED_OUT, SAME_HANDLE = "noHandle", "badHandle", "optedOut", "sameHandle"
SENT_RECENTLY, OVER_WEEKLY_LIMIT, NO_HOUR = "sentRecently", "overWeeklyLimit", "noHour"
EMPTY_VARIABLE, TOO_LONG = "emptyVariable", "tooLong"
REASONS = (
    NO_HANDLE, BAD_HANDLE, OPTED_OUT, SAME_HANDLE, SENT_RECENTLY, OVER_WEEKLY_LIMIT, NO_HOUR, EMPTY_VARIABLE, TOO_LONG,
)  # fmt: skip
NAME_COLUMNS = ("name", "full_name", "display_name", "first_name")  # the first one that clients has is shown

Connection = Any  # psycopg2's connection


class Person(msgspec.Struct, rename="camel"):
    """Somebody who is left out. `detail`: what is wrong, for the reasons that differ between people."""

    client_id: str
    name: str | None
    handle: str | None
    detail: str | None = None


class LeftOut(NamedTuple):
    """A person who does not get the text, and why: one of REASONS."""

    reason: str
    person: Person


class Message(NamedTuple):
    """What one person gets. `values`: the person's variables. `body` is empty if there is no template.

    `time_zones`: where the person may be, as zones.zones_of_person() says.
    """

    client_id: str
    name: str | None
    handle: str
    handle_key: str
    body: str
    defaults_taken: bool
    values: dict[str, Any]
    time_zones: tuple[str, ...]


class Times(NamedTuple):
    """When a batch may be sent, and how often one person may be written to.

    `days`: leave out who was written to in so many days. `send_from`, `send_until`: of the batch.
    """

    days: int | None = None
    send_from: datetime | None = None
    send_until: datetime | None = None


class Selection(NamedTuple):
    """An audience that audience.parse() has checked, over the fields that it was checked with."""

    query: dict[str, Any]
    fields: Fields


class Candidate(NamedTuple):
    """A person of the audience, as the database has them. `handle` is the primary one."""

    client_id: str
    name: str | None
    handle: str | None
    handles: list[str]
    time_zone: str | None
    values: dict[str, Any]


def read_selection(quinn: Connection, query: object) -> Selection:
    """Check an audience. Raises audience.QueryError."""
    fields = audience.read_fields(quinn)
    return Selection(audience.parse(query, fields), fields)


def known_variables(fields: Fields) -> set[str]:
    """Return the names that client.* may have: columns, and the keys of `attributes` that somebody has."""
    return {*fields.columns, *fields.attribute_keys}


def walk(
    quinn: Connection, icloud: Connection, selection: Selection, template: templates.Template | None, times: Times
) -> Iterator[Message | LeftOut]:
    """Yield what each person of the audience gets, or why they are left out.

    Needs an open transaction, because it reads with a cursor.
    """
    seen: set[str] = set()
    sender_zone = read_sender_zone(quinn)
    snapshot = pacing.read_snapshot(quinn)
    weekly = snapshot.settings.max_per_client_per_week if snapshot else None
    names = sorted(template.variables) if template else []
    for people in candidates(quinn, selection, names):
        keys = {handle: handles.key(handle) for person in people for handle in person.handles}
        opted_out = batches.opted_out(icloud, keys)
        ids, all_keys = [person.client_id for person in people], list(keys.values())
        nobody: tuple[set[str], set[str]] = (set(), set())
        recent = history.written_to(quinn, ids, all_keys, times.days) if times.days else nobody
        full = history.written_to(quinn, ids, all_keys, 7, times=weekly) if weekly else nobody
        for person in people:
            reason, detail = excluded(person, keys, opted_out, seen, recent, full)
            time_zones = () if reason else zones.zones_of_person(person.time_zone, person.handles)
            if not reason and snapshot and not _has_hour(snapshot, times, time_zones):
                reason, detail = NO_HOUR, ", ".join(time_zones) or None
            zone = quiet_times.zone_of(person.time_zone, sender_zone)
            message = None if reason else compose(person, keys, template, zone, time_zones)
            if isinstance(message, Message):
                seen.add(message.handle_key)
                yield message
            else:
                reason, detail = message or (reason, detail)
                yield LeftOut(str(reason), Person(person.client_id, person.name, person.handle, detail))


def candidates(quinn: Connection, selection: Selection, names: Sequence[str]) -> Iterator[list[Candidate]]:
    """Yield the people of the audience in chunks, in the order of clients.id, with the values of these variables."""
    where, parameters = audience.condition(selection.query, selection.fields)
    columns = selection.fields.columns
    name_column = next((audience.identifier(name) for name in NAME_COLUMNS if name in columns), None)
    values = [
        sql.SQL("client.{}").format(audience.identifier(name))
        if name in columns
        # psycopg2 takes a % in a statement for a parameter.
        else sql.SQL("client.attributes -> {}").format(sql.Literal(name.replace("%", "%%")))
        for name in names
    ]
    statement = sql.SQL("""
        SELECT client.id::text, {name}::text,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = client.id AND is_primary),
               ARRAY(SELECT handle FROM contact_relationships
                      WHERE client_id = client.id AND handle IS NOT NULL
                      ORDER BY is_primary DESC NULLS LAST, handle),
               {time_zone}::text{values}
          FROM clients AS client
         WHERE {where}
         ORDER BY client.id
         LIMIT %(maximum)s
    """).format(
        name=sql.SQL("client.{}").format(name_column) if name_column else sql.SQL("NULL"),
        time_zone=sql.SQL("client.time_zone") if "time_zone" in columns else sql.SQL("NULL"),
        values=sql.SQL("").join(sql.SQL(", {}").format(value) for value in values),
        where=where,
    )
    with quinn.cursor(name="audience") as cursor:
        cursor.itersize = CHUNK
        cursor.execute(statement, {**parameters, "maximum": selection.query.get("limit")})
        while rows := cursor.fetchmany(CHUNK):
            yield [Candidate(*(*row[:5], dict(zip(names, row[5:], strict=True)))) for row in rows]


def _has_hour(snapshot: pacing.Snapshot, times: Times, time_zones: Sequence[str]) -> bool:
    """Return whether there is an hour at which a person in these zones may be written to.

    A batch whose send_until is over leaves nobody out for it: its approval is refused.
    """
    start = max(snapshot.now, times.send_from or snapshot.now)
    opens_at = snapshot.settings.quiet_times.next_open(time_zones, start)
    ends_at = times.send_until
    return opens_at is not None and (ends_at is None or ends_at <= snapshot.now or opens_at < ends_at)


def excluded(
    person: Candidate,
    keys: dict[str, str],
    opted_out: set[str],
    seen: set[str],
    recent: tuple[set[str], set[str]],
    full: tuple[set[str], set[str]],
) -> tuple[str | None, str | None]:
    """Return the reason that leaves a person out whatever the text is, and its detail; None for no reason.

    `recent`: the clients, and the handle keys, that were written to lately; `full`: those that were written to as often
    as max_per_client_per_week allows.
    """
    if person.handle is None:
        return NO_HANDLE, None
    if not handles.is_handle(person.handle) or handles.to_send(person.handle) is None:
        return BAD_HANDLE, handles.UNREADABLE_REMEDY if "@" not in person.handle else None
    if any(keys[handle] in opted_out for handle in person.handles):
        return OPTED_OUT, None
    if keys[person.handle] in seen:
        return SAME_HANDLE, None
    if person.client_id in recent[0] or any(keys[handle] in recent[1] for handle in person.handles):
        return SENT_RECENTLY, None
    if person.client_id in full[0] or any(keys[handle] in full[1] for handle in person.handles):
        return OVER_WEEKLY_LIMIT, None
    return None, None


def compose(
    person: Candidate,
    keys: dict[str, str],
    template: templates.Template | None,
    zone: tzinfo,
    time_zones: tuple[str, ...],
) -> Message | tuple[str, str]:
    """Return a person's message, or the reason and the detail that leave them out."""
    handle = person.handle or ""
    body, defaults_taken = "", False
    if template:
        try:
            body, defaults_taken = template.render(person.values, zone)
        except templates.EmptyVariable as empty:
            return EMPTY_VARIABLE, str(empty)
        except templates.TooLong as too_long:
            return TOO_LONG, str(too_long)
    return Message(person.client_id, person.name, handle, keys[handle], body, defaults_taken, person.values, time_zones)


def read_sender_zone(quinn: Connection) -> tzinfo:
    """Return the time zone of quiet hours, else this host's: where a person's own is not known, dates are in it."""
    rows = db.query(quinn, "SELECT quiet_hours_tz FROM outreach_settings WHERE id = 1")
    name = rows[0][0] if rows else None
    with contextlib.suppress(OSError, ValueError), open("/etc/localtime", "rb") as file:
        return quiet_times.zone_of(name, ZoneInfo.from_file(file, key="localtime"))
    return quiet_times.zone_of(name, UTC)
