"""Find people for the owner: by name, number, address or id; what was sent last, and to whom.

Used by the owner's page. Reads clients, contact_relationships, outreach_batches and outreach_batch_items in quinn, and
icloud.opt_outs; of clients, only columns that are there. Example:

    people.find(quinn, "jane")
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import sql

import audience
import client_fields
import contacts
import db
import handles
import opt_outs
import recipients

MAX_FOUND = 20  # people of one search
RECENT_DAYS = 30  # opt-outs that are looked at for their person, on a page that is refreshed
MAX_RECENT = 500

Connection = Any  # psycopg2's connection


class Known(NamedTuple):
    """A client: the name, and the primary handle."""

    client_id: str
    name: str | None
    handle: str | None


class Sent(NamedTuple):
    """A message that was sent, or that may have been. `item_id` is the place in the list, for the next page."""

    item_id: str
    client_id: str
    batch_id: str
    batch_name: str | None
    body: str
    sent_at: datetime
    handle: str | None


class Message(NamedTuple):
    """A message to one person, and what became of it."""

    item_id: str
    batch_id: str
    batch_name: str | None
    status: str
    body: str
    sent_at: datetime | None
    failure_reason: str | None
    is_unknown: bool
    is_erased: bool


class Handle(NamedTuple):
    """A handle of a person. `opt_out`: the record while it is active."""

    handle: str
    key: str
    is_primary: bool
    opt_out: opt_outs.OptOut | None


class Details(NamedTuple):
    """A person: handles, the first one primary, and messages, newest first."""

    person: Known
    handles: list[Handle]
    messages: list[Message]

    @property
    def has_opted_out(self) -> bool:
        """An opt-out of any handle counts for the person."""
        return any(handle.opt_out for handle in self.handles)


# --- finding ------------------------------------------------------------------------------------------


def find(quinn: Connection, text: str, limit: int = MAX_FOUND) -> list[Known]:
    """Return the people whose handle or id this is, else whose name contains it. A person who fits best comes first."""
    text = text.strip()
    if not text or db.UNSTORABLE.search(text):
        return []
    if handles.is_handle(text):
        found = contacts.of_handles(quinn, [handles.key(text)])
        return _known(quinn, [contact.client_id for contact in found])[:limit]
    return _known(quinn, [text]) or _with_name(quinn, text, limit)


def by_id(quinn: Connection, client_ids: Iterable[str]) -> dict[str, Known]:
    """Return these clients by their id; one that was deleted is missing."""
    return {known.client_id: known for known in _known(quinn, list(client_ids))}


def _known(quinn: Connection, client_ids: Sequence[str]) -> list[Known]:
    """Return these clients, in this order; nobody if a text is no id."""
    fields = client_fields.read_columns(quinn)
    statement = sql.SQL("""
        SELECT client.id::text, {name}::text,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = client.id AND is_primary)
          FROM clients AS client
         WHERE client.id = ANY (%(ids)s::text[]::{type}[])
    """).format(name=_name(fields), type=_type(fields))
    wanted = list(dict.fromkeys(client_ids))
    try:
        found = {row[0]: Known(*row) for row in _run(quinn, statement, {"ids": wanted})} if wanted else {}
    except psycopg2.DataError:
        return []
    return [found[text] for text in (client_id.strip() for client_id in wanted) if text in found] or list(
        found.values()
    )


def _with_name(quinn: Connection, text: str, limit: int) -> list[Known]:
    """Return the people whose name contains this: those whose name begins with it come first."""
    fields = client_fields.read_columns(quinn)
    statement = sql.SQL("""
        SELECT client.id::text, {name}::text,
               (SELECT min(handle) FROM contact_relationships WHERE client_id = client.id AND is_primary)
          FROM clients AS client
         WHERE strpos(lower({name}::text), lower(%(text)s)) > 0
         ORDER BY strpos(lower({name}::text), lower(%(text)s)), lower({name}::text), client.id
         LIMIT %(limit)s
    """).format(name=_name(fields))
    return [Known(*row) for row in _run(quinn, statement, {"text": text, "limit": limit})]


def _name(fields: client_fields.Fields) -> sql.Composable:
    """Return the column with a person's name; NULL if there is none."""
    column = next((name for name in recipients.NAME_COLUMNS if name in fields.columns), None)
    return sql.SQL("client.{}").format(audience.identifier(column)) if column else sql.SQL("NULL")


def _type(fields: client_fields.Fields) -> sql.SQL:
    """Return the type of clients.id, as the catalogue writes it."""
    return sql.SQL(fields.key_type.replace("%", "%%"))


def _run(quinn: Connection, statement: sql.Composable, parameters: db.Params) -> list[db.Row]:
    with quinn.cursor() as cursor:
        cursor.execute(statement, parameters)
        return list(cursor.fetchall())


# --- what was sent to whom ----------------------------------------------------------------------------


def latest(quinn: Connection, after: str | None, limit: int) -> list[Sent]:
    """Return what was sent, newest first. `after`: the id of the last one before."""
    statement = """
        SELECT item.id, client_id::text, batch_id, batch.name, rendered_body, sent_at, handle_key
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.status = 'sent'
           AND (%(after)s::uuid IS NULL
                OR (sent_at, item.id) < (SELECT sent_at, id FROM outreach_batch_items WHERE id = %(after)s::uuid))
         ORDER BY sent_at DESC, item.id DESC
         LIMIT %(limit)s
    """
    return [Sent(*row) for row in db.query(quinn, statement, {"after": after, "limit": limit})]


def details(quinn: Connection, icloud: Connection, client_id: str) -> Details | None:
    """Return what the owner sees of a person; None if there is no such client."""
    statement = sql.SQL("""
        SELECT item.id, batch_id, batch.name, item.status, rendered_body, sent_at, failure_reason,
               item.status = 'failed' AND outcome_unknown_at IS NOT NULL, item.erased_at IS NOT NULL
          FROM clients AS client
          JOIN outreach_batch_items AS item ON item.client_id = client.id
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE client.id = %(id)s::text::{type}
         ORDER BY item.created_at DESC, item.id DESC
         LIMIT 100
    """).format(type=_type(client_fields.read_columns(quinn)))
    known = _known(quinn, [client_id])
    if not known:
        return None
    messages = [Message(*row) for row in _run(quinn, statement, {"id": known[0].client_id})]
    return Details(known[0], _handles(quinn, icloud, known[0].client_id), messages)


def _handles(quinn: Connection, icloud: Connection, client_id: str) -> list[Handle]:
    statement = sql.SQL("""
        SELECT DISTINCT handle, is_primary
          FROM clients AS client
          JOIN contact_relationships ON client_id = client.id
         WHERE client.id = %(id)s::text::{type} AND handle IS NOT NULL
         ORDER BY is_primary DESC, handle
    """).format(type=_type(client_fields.read_columns(quinn)))
    rows = _run(quinn, statement, {"id": client_id})
    found = [(handle, handles.key(handle), is_primary) for handle, is_primary in rows]
    active = active_opt_outs(icloud, [key for _, key, _ in found])
    return [Handle(handle, key, primary, active.get(key)) for handle, key, primary in found]


# --- opt-outs -----------------------------------------------------------------------------------------


def active_opt_outs(icloud: Connection, keys: Sequence[str]) -> dict[str, opt_outs.OptOut]:
    """Return the active opt-outs of these keys."""
    statement = """
        SELECT opt_out.id, handle_key, word, source, device.name, received_at, opt_out.created_at, ended_at, ended_by
          FROM icloud.opt_outs AS opt_out
          LEFT JOIN icloud.devices AS device ON device.id = opt_out.device_id
         WHERE handle_key = ANY (%(keys)s) AND ended_at IS NULL
    """
    rows = db.query(icloud, statement, {"keys": list(keys)}) if keys else []
    return {row[1]: opt_outs.OptOut(*row) for row in rows}


def recently_unassigned(quinn: Connection, icloud: Connection) -> list[opt_outs.OptOut]:
    """Return the active opt-outs of the last 30 days whose handle no client has, newest first.

    As opt_outs.unassigned(), but with a bound: a page that refreshes itself asks for them.
    """
    statement = """
        SELECT opt_out.id, handle_key, word, source, device.name, received_at, opt_out.created_at, ended_at, ended_by
          FROM icloud.opt_outs AS opt_out
          LEFT JOIN icloud.devices AS device ON device.id = opt_out.device_id
         WHERE opt_out.created_at BETWEEN now() - %(days)s * interval '1 day' AND now()
           AND CASE WHEN ended_at IS NULL THEN source = 'reply' END
         ORDER BY opt_out.created_at DESC
         LIMIT %(limit)s
    """
    rows = db.query(icloud, statement, {"days": RECENT_DAYS, "limit": MAX_RECENT})
    recent = [opt_outs.OptOut(*row) for row in rows]
    if not recent:
        return []
    known = {contact.key for contact in contacts.of_handles(quinn, [one.handle_key for one in recent])}
    return [one for one in recent if one.handle_key not in known]
