"""Show what is stored about a person, and erase it: on a person's demand, or because it is old.

Used by outreach.py and outreach_server.py, and erase_old() by the dispatcher. Touches outreach_batches,
outreach_batch_items, clients and contact_relationships in quinn, and icloud.send_queue; opt-outs are recorded, never
removed. What is unfinished stays as it is until it has ended. Example:

    personal_data.forget(quinn, icloud, "+1 (415) 555-0123")
"""

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import contacts
import db
import handles
import opt_outs
import zones

# Of one run of erase_old(): so a tick stays short, also on the day on which keep_bodies_days is set.
MAX_MESSAGES = 500
MAX_BATCHES = 20
ERASED = "erased"  # in place of a reason, or of a value in a query
# The columns of `clients` and of `contact_relationships` of our own making. A platform's tables are the platform's.
OUR_COLUMNS = {
    "clients": {"id", "name", "attributes", "time_zone", "consent_source", "consent_at"},
    "contact_relationships": {"client_id", "handle", "is_primary"},
}

Connection = Any  # psycopg2's connection
logger = logging.getLogger("outreach")


class Erased(NamedTuple):
    """How many items, queue rows and batches were erased."""

    items: int
    rows: int
    batches: int


class Forgotten(NamedTuple):
    """What forget() did.

    `keys`: the handles that have opted out now. `in_flight`: messages that have no result yet: run it again when they
    have. `unfinished`: batches that are not finished and name the person in their query. `is_deleted`: the person was
    deleted from `clients`. False while one of the two is left, because only the clients lead to it; and if that is the
    platform's table, where the owner deletes the person.
    """

    keys: list[str]
    clients: int
    erased: Erased
    in_flight: int
    unfinished: list[str]
    is_deleted: bool

    def as_data(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "keys": self.keys,
            "clients": self.clients,
            "erased": self.erased._asdict(),
            "inFlight": self.in_flight,
            "unfinished": self.unfinished,
            "isDeleted": self.is_deleted,
        }


class Person(NamedTuple):
    """Whom a handle belongs to: the clients who have it, and the keys of their handles, also of former ones.

    A handle that another client has as well, such as a couple's e-mail address, is not among the keys, unless it is the
    one that was asked for.
    """

    client_ids: list[str]
    keys: list[str]


# --- what is old --------------------------------------------------------------------------------------


def erase_old(quinn: Connection, icloud: Connection) -> Erased:
    """Erase texts and handles of what ended longer than keep_bodies_days ago; a bounded number, oldest first.

    Batches follow when their items are erased. Call it after a sync: a row whose result no item has is left alone.
    """
    sql = "SELECT GREATEST(keep_bodies_days, 8) FROM outreach_settings WHERE id = 1 AND keep_bodies_days IS NOT NULL"
    settings = db.query(quinn, sql)
    if not settings:
        return Erased(0, 0, 0)
    days = settings[0][0]
    items = _erase_old_items(quinn, days)
    erased = Erased(
        items, _erase_old_rows(quinn, icloud, days), _erase_old_batches(quinn, days) if items < MAX_MESSAGES else 0
    )
    if any(erased):
        logger.info("old texts erased items=%d rows=%d batches=%d", *erased)
    return erased


def _erase_old_items(quinn: Connection, days: int) -> int:
    """Erase ended items; return how many. The second condition holds if an item is retried at the same moment."""
    sql = """
        UPDATE outreach_batch_items
           SET rendered_body = '', handle_key = NULL, erased_at = now(),
               failure_reason = CASE WHEN failure_reason IS NOT NULL THEN %(erased)s END
         WHERE id = ANY (ARRAY(SELECT id FROM outreach_batch_items
                                WHERE status IN ('sent', 'failed', 'skipped') AND erased_at IS NULL
                                  AND updated_at < now() - %(days)s * interval '1 day'
                                ORDER BY updated_at
                                LIMIT %(maximum)s))
           AND CASE status WHEN 'pending' THEN false WHEN 'queued' THEN false ELSE true END
        RETURNING id
    """
    return len(db.query(quinn, sql, {"days": days, "maximum": MAX_MESSAGES, "erased": ERASED}))


def _erase_old_rows(quinn: Connection, icloud: Connection, days: int) -> int:
    """Erase ended rows, but those whose item still waits for the result; return how many."""
    candidates = """
        SELECT id, batch_item_id
          FROM icloud.send_queue
         WHERE status <> 'queued' AND erased_at IS NULL AND updated_at < now() - %(days)s * interval '1 day'
         ORDER BY updated_at
         LIMIT %(maximum)s
    """
    rows = db.query(icloud, candidates, {"days": days, "maximum": MAX_MESSAGES})
    waiting = _in_flight(quinn, [item_id for _, item_id in rows if item_id])
    return _erase_rows(icloud, [row_id for row_id, item_id in rows if item_id not in waiting])


def _in_flight(quinn: Connection, item_ids: Sequence[str]) -> set[str]:
    """Return those of the items that are in flight."""
    sql = """
        SELECT id FROM outreach_batch_items
         WHERE id = ANY (%(ids)s::uuid[])
           AND CASE status WHEN 'queued' THEN true WHEN 'pending' THEN claimed_at IS NOT NULL END
    """
    return {item_id for (item_id,) in db.query(quinn, sql, {"ids": list(item_ids)})} if item_ids else set()


def _erase_rows(icloud: Connection, row_ids: Sequence[str]) -> int:
    """Erase these rows, if they have ended; return how many. `updated_at` stays: it is the time of the result."""
    sql = """
        UPDATE icloud.send_queue
           SET to_handle = '', body = '', handle_key = NULL, late_error = NULL, erased_at = now(),
               failure_reason = CASE WHEN failure_reason IS NOT NULL THEN %(erased)s END
         WHERE id = ANY (%(ids)s::uuid[]) AND CASE status WHEN 'queued' THEN false ELSE true END
        RETURNING id
    """
    return len(db.query(icloud, sql, {"ids": list(row_ids), "erased": ERASED})) if row_ids else 0


def _erase_old_batches(quinn: Connection, days: int) -> int:
    """Erase vars, preview and the query's values of ended batches; return how many.

    What a cancelled batch has not sent ends here: it is `skipped`.
    """
    ended = """
        SELECT id, status, query_json
          FROM outreach_batches
         WHERE status IN ('sent', 'cancelled') AND erased_at IS NULL
           AND updated_at < now() - %(days)s * interval '1 day'
         ORDER BY updated_at
         LIMIT %(maximum)s
    """
    unsent = """
        UPDATE outreach_batch_items
           SET status = 'skipped', failure_reason = 'its batch was cancelled', rendered_body = '', handle_key = NULL,
               erased_at = now(), updated_at = now()
         WHERE id = ANY (ARRAY(SELECT id FROM outreach_batch_items
                                WHERE batch_id = %(id)s AND status = 'pending' AND claimed_at IS NULL
                                LIMIT %(maximum)s))
           AND CASE status WHEN 'pending' THEN claimed_at IS NULL END
        RETURNING id
    """
    erased, remaining = 0, MAX_MESSAGES
    for batch_id, status, query in db.query(quinn, ended, {"days": days, "maximum": MAX_BATCHES}):
        if status == "cancelled":
            remaining -= len(db.query(quinn, unsent, {"id": batch_id, "maximum": remaining}))
            if remaining <= 0:  # perhaps it has more: the next run goes on with it
                break
        erased += _erase_batch(quinn, batch_id, query)
    return erased


def _erase_batch(quinn: Connection, batch_id: str, query: object) -> int:
    """Erase what an ended batch says about people; return 1, or 0 if it is not ended any more."""
    sql = """
        UPDATE outreach_batches
           SET vars = '{}', preview = NULL, query_json = %(query)s, erased_at = now()
         WHERE id = %(id)s AND status IN ('sent', 'cancelled')
        RETURNING id
    """
    return len(db.query(quinn, sql, {"id": batch_id, "query": json.dumps(_without_texts(query))}))


def _without_texts(node: Any) -> Any:
    """Return a query with its fields and operators, and without the texts that it compares them with."""
    if isinstance(node, list):
        return [_without_texts(part) for part in node]
    if not isinstance(node, dict):
        return ERASED if isinstance(node, str) else node
    return {name: value if name == "field" else _without_texts(value) for name, value in node.items()}


# --- a person -----------------------------------------------------------------------------------------


def forget(quinn: Connection, icloud: Connection, handle: str) -> Forgotten:
    """Erase the messages and the names of everybody who has this handle; their handles' keys stay as opt-outs.

    The keys stay so that the next import does not bring the people back. Each step can run again. The opt-outs are
    first, so that nothing is sent meanwhile; the clients are last, because only they lead to their other handles and
    items: they stay until nothing is in flight and no unfinished batch names them.
    Raises opt_outs.OptOutError.
    """
    person = find(quinn, handle)
    opt_outs.record(quinn, icloud, handle)
    opt_outs.record_all(quinn, icloud, [(key, None, None) for key in person.keys], "owner")
    _erase_words(icloud, person.keys)
    item_ids, in_flight = _erase_items_of(quinn, person)
    rows = _erase_rows(icloud, _rows_of(quinn, icloud, person, item_ids))
    batches, unfinished = _erase_mentions(quinn, person)
    _erase_from_page(quinn, person)
    is_deleted = not in_flight and not unfinished and _delete_clients(quinn, person.client_ids)
    erased = Erased(len(item_ids), rows, batches)
    logger.info(
        "person forgotten to=%s clients=%d items=%d rows=%d inFlight=%d",
        handles.mask_handle(handle.strip()), len(person.client_ids), erased.items, rows, in_flight,
    )  # fmt: skip
    return Forgotten(person.keys, len(person.client_ids), erased, in_flight, unfinished, is_deleted)


def find(quinn: Connection, handle: str) -> Person:
    """Return whom a handle belongs to."""
    former = """
        SELECT DISTINCT handle_key FROM outreach_batch_items
         WHERE client_id::text = ANY (%(ids)s) AND handle_key IS NOT NULL
    """
    key = handles.key(handle.strip())
    known = contacts.of_handles(quinn, [key])
    client_ids = sorted({contact.client_id for contact in known})
    keys = {key, *(contact.key for contact in known)}
    keys |= {former_key for (former_key,) in db.query(quinn, former, {"ids": client_ids})}
    of_others = {contact.key for contact in contacts.of_handles(quinn, keys) if contact.client_id not in client_ids}
    return Person(client_ids, sorted(keys - of_others))


def _erase_words(icloud: Connection, keys: Sequence[str]) -> None:
    """Erase the owner's own words about an opt-out; a reply's word is STOP or the like."""
    sql = "UPDATE icloud.opt_outs SET word = NULL WHERE handle_key = ANY (%(keys)s) AND source <> 'reply'"
    db.query(icloud, sql, {"keys": list(keys)})


def _erase_items_of(quinn: Connection, person: Person) -> tuple[list[str], int]:
    """Erase a person's items; what is not claimed ends as `skipped`. Return their ids, and how many are in flight."""
    erase = """
        UPDATE outreach_batch_items
           SET status = CASE status WHEN 'pending' THEN 'skipped' ELSE status END,
               failure_reason = CASE WHEN status = 'pending' THEN 'opted out'
                                     WHEN failure_reason IS NOT NULL THEN %(erased)s END,
               updated_at = CASE status WHEN 'pending' THEN now() ELSE updated_at END,
               rendered_body = '', handle_key = NULL, erased_at = now()
         WHERE (client_id::text = ANY (%(ids)s) OR handle_key = ANY (%(keys)s))
           AND (status IN ('sent', 'failed', 'skipped') OR (status = 'pending' AND claimed_at IS NULL))
        RETURNING id
    """
    in_flight = """
        SELECT count(*) FROM outreach_batch_items
         WHERE (client_id::text = ANY (%(ids)s) OR handle_key = ANY (%(keys)s)) AND status IN ('pending', 'queued')
    """
    parameters = {"ids": person.client_ids, "keys": person.keys, "erased": ERASED}
    item_ids = [item_id for (item_id,) in db.query(quinn, erase, parameters)]
    return item_ids, db.query(quinn, in_flight, parameters)[0][0]


def _rows_of(quinn: Connection, icloud: Connection, person: Person, item_ids: Collection[str]) -> list[str]:
    """Return the ids of the ended rows to a person's handles, or of these items, but of items in flight."""
    sql = """
        SELECT id, to_handle, handle_key, batch_item_id
          FROM icloud.send_queue
         WHERE status <> 'queued' AND erased_at IS NULL
           AND (handle_key IS NULL OR handle_key = ANY (%(keys)s) OR batch_item_id = ANY (%(items)s::uuid[]))
    """
    rows = db.query(icloud, sql, {"keys": person.keys, "items": list(item_ids)})
    own_items = set(item_ids)
    mine = [
        (row_id, item_id)
        for row_id, to_handle, key, item_id in rows
        if item_id in own_items or (key or handles.key(to_handle)) in person.keys
    ]
    waiting = _in_flight(quinn, [item_id for _, item_id in mine if item_id])
    return [row_id for row_id, item_id in mine if item_id not in waiting]


def _erase_mentions(quinn: Connection, person: Person) -> tuple[int, list[str]]:
    """Erase a person from the previews and queries of batches; return of how many, and the unfinished ones.

    The query of an unfinished batch decides who gets it, so it stays, and its owner has to end the batch.
    """
    erase_preview = "UPDATE outreach_batches SET preview = %(preview)s WHERE id = %(id)s"
    erased, unfinished = 0, []
    for batch_id, status, query, variables, preview in _batches_naming(quinn, person):
        if status in ("sent", "cancelled"):
            erased += _erase_batch(quinn, batch_id, query)
            continue
        if _names(preview, person):
            db.query(quinn, erase_preview, {"id": batch_id, "preview": json.dumps(_without_person(preview, person))})
            erased += 1
        if _names([query, variables], person):
            unfinished.append(batch_id)
    return erased, unfinished


def _erase_from_page(quinn: Connection, person: Person) -> None:
    """Erase who was in an imported file, what the owner is composing about the person, and files not yet imported."""
    people = "DELETE FROM outreach_import_people WHERE client_id::text = ANY (%(ids)s)"
    composing = """
        DELETE FROM outreach_compositions
         WHERE EXISTS (SELECT FROM unnest(%(words)s::text[]) AS word
                        WHERE strpos(regexp_replace(lower(form::text), '[ ().-]', '', 'g'),
                                     regexp_replace(word, '[ ().-]', '', 'g')) > 0)
    """
    db.query(quinn, people, {"ids": person.client_ids})
    db.query(quinn, composing, {"words": _words(person)})
    db.query(quinn, "DELETE FROM outreach_imports WHERE applied_at IS NULL")


def _batches_naming(quinn: Connection, person: Person) -> list[db.Row]:
    """Return id, status, query, vars and preview of the batches that name a person. SQL finds the candidates."""
    sql = """
        SELECT id, status, query_json, vars, preview
          FROM outreach_batches
         WHERE EXISTS (SELECT FROM unnest(%(words)s::text[]) AS word
                        WHERE strpos(regexp_replace(lower(concat(query_json, vars, preview)), '[ ().-]', '', 'g'),
                                     regexp_replace(word, '[ ().-]', '', 'g')) > 0)
         ORDER BY created_at, id
    """
    rows = db.query(quinn, sql, {"words": _words(person)})
    return [row for row in rows if _names(list(row[2:]), person)]


def _words(person: Person) -> list[str]:
    """Return what a text that names the person contains: an id, an e-mail address, the last digits of a number."""
    return [*person.client_ids, *(key if "@" in key else key[-contacts.TAIL :] for key in person.keys)]


def _names(node: Any, person: Person) -> bool:
    """Return whether JSON names a person: by a client's id in a query or a preview, or by a handle anywhere."""
    if isinstance(node, list):
        return any(_names(part, person) for part in node)
    if not isinstance(node, dict):
        return isinstance(node, str) and handles.is_handle(node) and handles.key(node) in person.keys
    if node.get("field") == "id":
        values = [value for name, value in node.items() if name != "field"]
        compared = [part for value in values for part in (value if isinstance(value, list) else [value])]
        return any(str(value).lower() in person.client_ids for value in compared)
    return node.get("clientId") in person.client_ids or any(_names(value, person) for value in node.values())


def _without_person(node: Any, person: Person) -> Any:
    """Return a preview without the list entries about a person."""
    if isinstance(node, dict):
        return {name: _without_person(value, person) for name, value in node.items()}
    if isinstance(node, list):
        return [_without_person(part, person) for part in node if not _is_about(part, person)]
    return node


def _is_about(part: Any, person: Person) -> bool:
    """Return whether an entry of a list names a person itself, and not in a list of its own."""
    values = [value for value in part.values() if isinstance(value, str)] if isinstance(part, dict) else []
    return bool(values) and (part.get("clientId") in person.client_ids or _names(values, person))


def _delete_clients(quinn: Connection, client_ids: Sequence[str]) -> bool:
    """Delete clients with their handles, in tables of our own making; return whether they are ours."""
    columns = """
        SELECT attrelid::regclass::text, array_agg(attname::text)
          FROM pg_attribute
         WHERE attrelid IN ('clients'::regclass, 'contact_relationships'::regclass) AND attnum > 0 AND NOT attisdropped
         GROUP BY attrelid
    """
    delete = """
        WITH contact AS (
            DELETE FROM contact_relationships WHERE client_id::text = ANY (%(ids)s) RETURNING client_id
        )
        DELETE FROM clients WHERE id::text = ANY (%(ids)s)
    """
    if {table: set(names) for table, names in db.query(quinn, columns)} != OUR_COLUMNS:
        return False
    db.query(quinn, delete, {"ids": list(client_ids)})
    return True


# --- what is stored about a person --------------------------------------------------------------------


def show_person(quinn: Connection, icloud: Connection, handle: str) -> dict[str, Any]:
    """Return all that is stored about everybody who has a handle, as values for JSON; times in UTC.

    `clients`: their rows, handles and time zones. `optOuts`: their record. `messages`: what was written to them, or
    will be. `queue`: the rows of the queue. `batches`: the batches whose query, vars or preview name them. `imports`:
    the files that were imported on the page and had them.
    """
    clients = "SELECT to_jsonb(client) FROM clients AS client WHERE id::text = ANY (%(ids)s) ORDER BY id::text"
    person = find(quinn, handle)
    parameters = {"ids": person.client_ids, "keys": person.keys}
    known = contacts.of_handles(quinn, person.keys)
    shown = []
    for (row,) in db.query(quinn, clients, parameters):
        own = [contact.handle for contact in known if contact.client_id == str(row["id"])]
        shown.append({"client": row, "handles": own, "timeZones": zones.zones_of_person(row.get("time_zone"), own)})
    return {
        "handle": handle.strip(),
        "clients": shown,
        "optOuts": _opt_outs_of(icloud, person),
        "messages": _messages_of(quinn, person),
        "queue": _queue_of(icloud, person),
        "batches": [{"id": batch_id, "status": status} for batch_id, status, *_ in _batches_naming(quinn, person)],
        "imports": _imports_of(quinn, person),
    }


def _imports_of(quinn: Connection, person: Person) -> list[dict[str, Any]]:
    sql = """
        SELECT DISTINCT jsonb_build_object('file', file, 'applied_at', applied_at)
          FROM outreach_import_people
          JOIN outreach_imports ON id = import_id
         WHERE client_id::text = ANY (%(ids)s)
         ORDER BY 1
    """
    return [row for (row,) in db.query(quinn, sql, {"ids": person.client_ids})]


def _messages_of(quinn: Connection, person: Person) -> list[dict[str, Any]]:
    sql = """
        SELECT to_jsonb(item) || jsonb_build_object('batch', batch.name, 'batch_status', batch.status)
          FROM outreach_batch_items AS item
          JOIN outreach_batches AS batch ON batch.id = item.batch_id
         WHERE item.client_id::text = ANY (%(ids)s) OR item.handle_key = ANY (%(keys)s)
         ORDER BY item.created_at, item.id
    """
    return [row for (row,) in db.query(quinn, sql, {"ids": person.client_ids, "keys": person.keys})]


def _queue_of(icloud: Connection, person: Person) -> list[dict[str, Any]]:
    """Return the rows to a person's handles. A row that was made by hand may have no key yet."""
    sql = """
        SELECT to_jsonb(message), message.to_handle
          FROM icloud.send_queue AS message
         WHERE handle_key = ANY (%(keys)s) OR (handle_key IS NULL AND erased_at IS NULL)
         ORDER BY created_at, id
    """
    rows = db.query(icloud, sql, {"keys": person.keys})
    return [row for row, to_handle in rows if row["handle_key"] or handles.key(to_handle) in person.keys]


def _opt_outs_of(icloud: Connection, person: Person) -> list[dict[str, Any]]:
    sql = (
        "SELECT to_jsonb(opt_out) FROM icloud.opt_outs AS opt_out WHERE handle_key = ANY (%(keys)s) ORDER BY created_at"
    )
    return [row for (row,) in db.query(icloud, sql, {"keys": person.keys})]


def as_text(shown: dict[str, Any]) -> str:
    """Return show_person()'s answer as text: a heading for each part, and a line for each value that is not empty."""
    parts = [f"What is stored about {shown['handle']}"]
    for name in ("clients", "optOuts", "messages", "queue", "batches", "imports"):
        entries = ["\n".join(_lines(entry)) for entry in shown[name]]
        parts.append(f"{name}: {len(entries)}" + "".join(f"\n{entry}" for entry in entries))
    return "\n\n".join(parts) + "\n"


def _lines(entry: dict[str, Any]) -> list[str]:
    values = [(name, value) for name, value in entry.items() if value not in (None, "", [], {})]
    return ["  -"] + [f"    {name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in values]
