"""Check items once more before they are sent: these checks only ever remove people.

Used by the dispatcher, when it chooses an item and right before its request. Reads clients and outreach_batch_items,
and writes nothing. A batch that was made by hand has no rules of its own; max_per_client_per_week counts for all.
Example:

    rules = last_checks.read_rules(quinn, batch_ids)
    reasons, broken = last_checks.check(quinn, rules, people, with_claimed=True, weekly=2)
"""

import itertools
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import errors

import audience
import client_fields
import db
import handles
import history

HANDLE_CHANGED = "the handle changed after approval"
NOT_APPROVED = "was added after approval"
NO_MATCH = "no longer matches the audience"
WRITTEN_TO = "was written to in the last {} days"
OVER_WEEKLY = "got {} in the last 7 days, as many as max_per_client_per_week allows"

Connection = Any  # psycopg2's connection


class Rules(NamedTuple):
    """What a composed batch asks of its items. `query`: None if they need not match it any more.

    `days`: skip who was written to in so many. `ends_at`: send_until or the end of the approval, the earlier one.
    `fields`: the columns of `clients`, which are read once for all batches.
    """

    query: dict[str, Any] | None
    days: int | None
    ends_at: datetime | None
    fields: client_fields.Fields


class Person(NamedTuple):
    """An item's client. `handle_key`: of the handle that the owner approved. `handle`: the primary one, now."""

    item_id: str
    batch_id: str
    client_id: str
    handle_key: str | None
    handle: str | None


def read_rules(quinn: Connection, batch_ids: Sequence[str]) -> dict[str, Rules]:
    """Return the rules of those of the batches that are composed."""
    sql = """
        SELECT batch.id, CASE WHEN recheck THEN query_json END, not_sent_within_days,
               LEAST(send_until, approved_at + approval_days * interval '1 day')
          FROM outreach_batches AS batch, outreach_settings AS settings
         WHERE settings.id = 1 AND batch.id = ANY (%(ids)s::uuid[]) AND digest IS NOT NULL
    """
    rows = db.query(quinn, sql, {"ids": list(batch_ids)}) if batch_ids else []
    if not rows:
        return {}
    fields = client_fields.read_columns(quinn)
    return {batch_id: Rules(query, days, ends_at, fields) for batch_id, query, days, ends_at in rows}


def check(
    quinn: Connection,
    rules: dict[str, Rules],
    people: Sequence[Person],
    with_claimed: bool,
    weekly: int | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Return why items are to be skipped, by their id; and why a batch cannot be checked, by its id.

    `with_claimed`: whether a claimed item counts as written to; see history.written_to. `weekly`:
    max_per_client_per_week.
    """
    reasons = _over_weekly(quinn, people, with_claimed, weekly) if weekly else {}
    broken: dict[str, str] = {}
    composed = sorted((person for person in people if person.batch_id in rules), key=lambda person: person.batch_id)
    for batch_id, group in itertools.groupby(composed, key=lambda person: person.batch_id):
        asked, members = rules[batch_id], list(group)
        ids = [each.client_id for each in members]
        try:
            matching = audience.matching(quinn, asked.query, ids, asked.fields) if asked.query else None
        except (audience.QueryError, psycopg2.Error) as error:
            broken[batch_id] = _failure(error)
            continue
        written: tuple[set[str], set[str]] = (set(), set())
        if asked.days:
            keys = [each.handle_key or "" for each in members]
            item_ids = [each.item_id for each in members]
            written = history.written_to(quinn, ids, keys, asked.days, with_claimed, item_ids)
        for each in members:
            if reason := _reason(each, asked, matching, written):
                reasons[each.item_id] = reason
    return reasons, broken


def _over_weekly(quinn: Connection, people: Sequence[Person], with_claimed: bool, weekly: int) -> dict[str, str]:
    """Return the reason of each item whose client has had `weekly` messages in the last 7 days."""
    keys = {each.item_id: each.handle_key or handles.key(each.handle or "") for each in people}
    ids = [each.client_id for each in people]
    clients, known = history.written_to(quinn, ids, list(keys.values()), 7, with_claimed, list(keys), times=weekly)
    reason = OVER_WEEKLY.format("1 message" if weekly == 1 else f"{weekly} messages")
    return {each.item_id: reason for each in people if each.client_id in clients or keys[each.item_id] in known}


def _reason(person: Person, rules: Rules, matching: set[str] | None, written: tuple[set[str], set[str]]) -> str | None:
    if person.handle_key is None:
        return NOT_APPROVED
    if person.handle is not None and handles.key(person.handle) != person.handle_key:
        return HANDLE_CHANGED
    if matching is not None and person.client_id not in matching:
        return NO_MATCH
    if person.client_id in written[0] or person.handle_key in written[1]:
        return WRITTEN_TO.format(rules.days)
    return None


def _failure(error: Exception) -> str:
    """Return why the audience cannot be checked. Raises what has nothing to do with the audience."""
    if isinstance(error, psycopg2.Error):
        is_slow = isinstance(error, errors.QueryCanceled)
        if not is_slow and (error.pgcode is None or error.pgcode.startswith(db.TRANSIENT_SQLSTATES)):
            raise error
        text = "it takes too long" if is_slow else (error.diag.message_primary or "the database refuses it")
    else:
        text = str(error)
    return f"its audience cannot be checked any more: {text}"
