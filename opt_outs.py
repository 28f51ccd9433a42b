"""Keep the record of who must not be written to: what the owner records, ends, lists, exports and imports.

Used by outreach.py and outreach_server.py; send_queue_server.py, which records replies, shares expire_rows(). Touches
icloud.opt_outs and icloud.send_queue, and contact_relationships in quinn. No row of the record is deleted: an opt-in
ends it. Example:

    opt_outs.record(quinn, icloud, "+1 (415) 555-0123", word="said so on the phone")
"""

import csv
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO

import psycopg2.errors

import contacts
import db
import handles
import runtime
import spreadsheet

WORD_LENGTH = 1000  # characters of the owner's words that are kept
TRIES = 3  # of a statement that met an opt-out which somebody else has just recorded
CHUNK = 1000  # handles of an imported list, or rows of an export, in one statement
BAD_LINES = 100  # bad lines of an imported list that are shown
BAD_LENGTH = 200  # characters of a bad line that are shown
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins with one of these

Connection = Any  # psycopg2's connection
Query = Callable[[str, Any], list[db.Row]]
Source = Literal["owner", "import"]
logger = logging.getLogger("outreach")


class OptOutError(ValueError):
    """An opt-out that cannot be recorded or assigned. The message says what to do."""


class Recorded(NamedTuple):
    """What became of one handle. `is_new`: it had not opted out. `is_readable`: Messages can read the number."""

    key: str
    is_new: bool
    is_readable: bool

    def as_data(self) -> dict[str, str | bool]:
        """Return it as values for JSON."""
        return {"handleKey": self.key, "isNew": self.is_new, "isReadable": self.is_readable}


class OptOut(NamedTuple):
    """A row of the record. `device`: the Mac that reported a reply. `ended_at` is None while it is active."""

    id: str
    handle_key: str
    word: str | None
    source: str
    device: str | None
    received_at: datetime | None
    created_at: datetime
    ended_at: datetime | None
    ended_by: str | None

    def as_data(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "id": self.id,
            "handleKey": self.handle_key,
            "word": self.word,
            "source": self.source,
            "device": self.device,
            "receivedAt": self.received_at,
            "createdAt": self.created_at,
            "endedAt": self.ended_at,
            "endedBy": self.ended_by,
        }


class Entry(NamedTuple):
    """A line of a list to import: its number, the handle or what stands in its place, and what an export knows."""

    line: int
    text: str
    word: str | None = None
    received_at: datetime | None = None


class BadLine(NamedTuple):
    """A line of an imported list that has no handle."""

    line: int
    text: str


class Imported(NamedTuple):
    """What became of a list: how many opted out now, how many had opted out before, and which lines have no handle."""

    new: int
    known: int
    bad: list[BadLine]

    def as_data(self) -> dict[str, Any]:
        """Return it as values for JSON, with the first bad lines."""
        lines = [{"line": bad.line, "text": bad.text[:BAD_LENGTH]} for bad in self.bad[:BAD_LINES]]
        return {"new": self.new, "known": self.known, "bad": len(self.bad), "badLines": lines}


# --- recording ----------------------------------------------------------------------------------------


def record(
    quinn: Connection, icloud: Connection, handle: str, word: str | None = None, received_at: datetime | None = None
) -> Recorded:
    """Record that a person opted out, in the owner's words; take effect at once. Raises OptOutError.

    `received_at`: when the person said so, if that was not now. An opt-out that came as a reply is replaced, because a
    reply of START would end it.
    """
    if not _is_handle(handle):
        raise OptOutError(f"{handle!r} is neither a phone number nor an e-mail address")
    if received_at and received_at > datetime.now(UTC):
        raise OptOutError("the date is in the future: write when the person said so")
    [recorded] = record_all(quinn, icloud, [(handle.strip(), word, received_at)], "owner")
    logger.info("opt-out recorded source=owner to=%s new=%s", handles.mask_handle(recorded.key), recorded.is_new)
    return recorded


def import_list(quinn: Connection, icloud: Connection, entries: Iterable[Entry]) -> Imported:
    """Record an opt-out for each entry. A bad line skips itself."""
    new, known, bad = 0, 0, []
    remaining = iter(entries)
    while chunk := list(islice(remaining, CHUNK)):
        bad += [BadLine(entry.line, entry.text) for entry in chunk if not _is_handle(entry.text)]
        good = [(entry.text.strip(), entry.word, entry.received_at) for entry in chunk if _is_handle(entry.text)]
        recorded = record_all(quinn, icloud, good, "import") if good else []
        new += sum(one.is_new for one in recorded)
        known += sum(not one.is_new for one in recorded)
    logger.info("opt-outs imported new=%d known=%d bad=%d", new, known, len(bad))
    return Imported(new, known, bad)


def read_list(file: BinaryIO) -> Iterator[Entry]:
    """Yield the entries of a CSV file for import_list(). Raises spreadsheet.Unreadable.

    In each line, the first cell that is a handle counts, and those in the columns `word` and `received_at`. A first
    line without a handle has the columns' names. Of an export, what has ended is left out.
    """
    sheet = spreadsheet.open_sheet(file)
    names = [name.strip().lower() for name in sheet.header]
    if any(map(_is_handle, sheet.header)):
        yield Entry(1, next(filter(_is_handle, sheet.header)))
        names = []
    for line in sheet.lines():
        cells = dict(zip(names, line.fields, strict=False))
        if not cells.get("ended_at"):
            handle = next(filter(_is_handle, line.fields), line.problem or ", ".join(line.fields))
            yield Entry(line.number, handle, cells.get("word") or None, _moment(cells.get("received_at")))
    sheet.close()


def _moment(cell: str | None) -> datetime | None:
    """Return the time that an export has written; None for anything else, which costs no opt-out."""
    try:
        moment = datetime.fromisoformat(cell or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def _is_handle(cell: str) -> bool:
    return handles.is_handle(cell.strip()) and not db.UNSTORABLE.search(cell)


def record_all(
    quinn: Connection,
    icloud: Connection,
    entries: Sequence[tuple[str, str | None, datetime | None]],
    source: Source,
) -> list[Recorded]:
    """Record these handles, then end what waits for these people. Two statements, as in the server's opt_out()."""
    sql = """
        WITH wanted AS (
            SELECT DISTINCT ON (key) key, word, received_at
              FROM unnest(%(keys)s::text[], %(words)s::text[], %(times)s::timestamptz[])
                   AS entry (key, word, received_at)
             ORDER BY key
        ), active AS (
            SELECT handle_key, bool_or(source <> 'reply') AS is_ours
              FROM icloud.opt_outs
             WHERE handle_key = ANY (%(keys)s) AND ended_at IS NULL
             GROUP BY handle_key
        ), replaced AS (
            UPDATE icloud.opt_outs SET ended_at = now(), ended_by = 'the owner recorded another'
             WHERE handle_key = ANY (%(keys)s) AND ended_at IS NULL AND source = 'reply'
            RETURNING id
        ), added AS (
            INSERT INTO icloud.opt_outs (handle_key, word, source, received_at)
            SELECT key, word, %(source)s, received_at
              FROM wanted
             WHERE NOT EXISTS (SELECT FROM active WHERE handle_key = key AND is_ours)
               -- First the UPDATE: of one handle, one opt-out is active at a time.
               AND (SELECT count(*) FROM replaced) >= 0
            RETURNING handle_key
        )
        SELECT key, NOT EXISTS (SELECT FROM active WHERE handle_key = key) FROM wanted
    """
    keys = [handles.key(handle) for handle, _, _ in entries]
    words = [db.replace_unstorable(word)[:WORD_LENGTH] if word else None for _, word, _ in entries]
    times = [received_at for _, _, received_at in entries]
    parameters = {"keys": keys, "words": words, "times": times, "source": source}
    rows = _query_again(icloud, sql, parameters)
    _expire(icloud, keys)  # at once; finding the other handles of these people takes longer
    _expire(icloud, _keys_of_persons(quinn, keys))
    readable = {handles.key(handle) for handle, _, _ in entries if handles.to_send(handle)}
    return [Recorded(key, is_new, key in readable) for key, is_new in rows]


def expire_rows(query: Query, keys: Sequence[str]) -> int:
    """End the validity of what waits for these handles; return how many messages no device had collected.

    `query` runs a statement over icloud. An earlier time than every transaction's: now() may be before the opt-out.
    """
    sql = """
        UPDATE icloud.send_queue SET valid_until = '-infinity', updated_at = now()
         WHERE handle_key = ANY (%(keys)s) AND status = 'queued'
        RETURNING collected_at IS NULL
    """
    return sum(is_waiting for (is_waiting,) in query(sql, {"keys": list(keys)}))


def _expire(icloud: Connection, keys: Sequence[str]) -> int:
    return expire_rows(functools.partial(db.query, icloud), keys)


def _keys_of_persons(quinn: Connection, keys: Sequence[str]) -> list[str]:
    """Return these keys and those of the same clients' other handles: an opt-out counts for the person."""
    return sorted({*keys, *(contact.key for contact in contacts.of_handles(quinn, keys))})


def _query_again(icloud: Connection, sql: str, parameters: dict[str, Any]) -> list[db.Row]:
    """Run a statement, again if somebody else has just recorded an opt-out of the same handle."""
    for attempt in range(1, TRIES + 1):
        try:
            return db.query(icloud, sql, parameters)
        except psycopg2.errors.UniqueViolation:
            if attempt == TRIES:
                raise
    return []


# --- taking back --------------------------------------------------------------------------------------


def end(icloud: Connection, handle: str) -> bool:
    """End a handle's opt-out (an opt-in that the owner records); return whether there was one.

    A message that the opt-out stopped does not go again by itself: its item has been skipped.
    """
    sql = """
        UPDATE icloud.opt_outs SET ended_at = now(), ended_by = 'owner'
         WHERE handle_key = %(key)s AND ended_at IS NULL
        RETURNING id
    """
    ended = bool(db.query(icloud, sql, {"key": handles.key(handle.strip())}))
    logger.info("opt-in recorded source=owner from=%s ended=%s", handles.mask_handle(handle.strip()), ended)
    return ended


def others_of_person(quinn: Connection, icloud: Connection, handle: str) -> list[str]:
    """Return the other handles of the same clients that have opted out: because of them nobody writes to the person."""
    sql = "SELECT handle_key FROM icloud.opt_outs WHERE handle_key = ANY (%(keys)s) AND ended_at IS NULL ORDER BY 1"
    key = handles.key(handle.strip())
    keys = [other for other in _keys_of_persons(quinn, [key]) if other != key]
    return [other for (other,) in db.query(icloud, sql, {"keys": keys})] if keys else []


# --- showing ------------------------------------------------------------------------------------------


def page(icloud: Connection, after: str | None = None, limit: int = 100, active_only: bool = False) -> list[OptOut]:
    """Return a page of the record, newest first. `after`: the id of the last one of the page before."""
    sql = """
        SELECT opt_out.id, handle_key, word, source, device.name, received_at, opt_out.created_at, ended_at, ended_by
          FROM icloud.opt_outs AS opt_out
          LEFT JOIN icloud.devices AS device ON device.id = opt_out.device_id
         WHERE (ended_at IS NULL OR NOT %(active_only)s)
           AND (%(after)s::uuid IS NULL
                OR (opt_out.created_at, opt_out.id)
                   < (SELECT created_at, id FROM icloud.opt_outs WHERE id = %(after)s::uuid))
         ORDER BY opt_out.created_at DESC, opt_out.id DESC
         LIMIT %(limit)s
    """
    if after is not None and not runtime.is_uuid(after):
        raise OptOutError(f"{after!r} is no opt-out's id: use the id of the last one that you have")
    rows = db.query(icloud, sql, {"after": after, "limit": limit, "active_only": active_only})
    return [OptOut(*row) for row in rows]


def pages(icloud: Connection, active_only: bool = False) -> Iterator[OptOut]:
    """Yield the whole record, newest first, a page at a time: memory does not grow with it."""
    after = None
    while found := page(icloud, after, CHUNK, active_only):
        yield from found
        after = found[-1].id


def write_csv(icloud: Connection, file: TextIO) -> int:
    """Write the whole record as CSV, times in UTC; return the number of its rows."""
    writer = csv.writer(file)
    writer.writerow(OptOut._fields[1:])
    count = 0
    for opt_out in pages(icloud):
        writer.writerow([_cell(name, value) for name, value in opt_out._asdict().items() if name != "id"])
        count += 1
    return count


def _cell(name: str, value: object) -> str:
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    text = str(value or "")
    return f"'{text}" if name != "handle_key" and text.startswith(FORMULA) else text


def unassigned(quinn: Connection, icloud: Connection, after: str | None = None, limit: int = 100) -> list[OptOut]:
    """Return active opt-outs of handles that no client has, newest first: people answer from another address.

    Such an opt-out does not yet count for a client. The owner says whose it is with assign(). `after`: as for page().
    """
    found: list[OptOut] = []
    while len(found) < limit and (candidates := page(icloud, after, CHUNK, active_only=True)):
        nobodys = of_nobody(quinn, [one.handle_key for one in candidates])
        found += [one for one in candidates if one.handle_key in nobodys]
        after = candidates[-1].id
    return found[:limit]


def recent_replies(icloud: Connection, length: timedelta, limit: int) -> dict[str, str]:
    """Return the handle of each active opt-out that came as a reply within `length`, by the opt-out's id."""
    sql = """
        SELECT id, handle_key
          FROM icloud.opt_outs
         WHERE created_at > now() - %(length)s AND source = 'reply' AND ended_at IS NULL
         ORDER BY created_at DESC
         LIMIT %(limit)s
    """
    return dict(db.query(icloud, sql, {"length": length, "limit": limit}))


def of_nobody(quinn: Connection, keys: Sequence[str]) -> set[str]:
    """Return those of these keys (handles.key) that no client has. Reads all contacts: see contacts.py."""
    return set(keys) - {contact.key for contact in contacts.of_handles(quinn, keys)}


def assign(quinn: Connection, icloud: Connection, handle: str, client_id: str) -> bool:
    """Give a handle to a client, as one that is not primary; return whether it is new there. Raises OptOutError.

    If the handle has opted out, that counts for the client from now on, and what waits for the client ends.
    """
    known = "SELECT handle FROM contact_relationships WHERE client_id::text = %(client_id)s"
    insert = """
        INSERT INTO contact_relationships (client_id, handle, is_primary)
        SELECT id, %(handle)s, false FROM clients WHERE id::text = %(client_id)s
        RETURNING handle
    """
    opted_out = "SELECT id FROM icloud.opt_outs WHERE handle_key = %(key)s AND ended_at IS NULL"
    key = handles.key(handle.strip())
    if not _is_handle(handle):
        raise OptOutError(f"{handle!r} is neither a phone number nor an e-mail address")
    is_new = key not in {handles.key(other) for (other,) in db.query(quinn, known, {"client_id": client_id})}
    if is_new:
        try:
            if not db.query(quinn, insert, {"client_id": client_id, "handle": handle.strip()}):
                raise OptOutError(f"there is no client {client_id}")
        except psycopg2.IntegrityError as error:
            problem = f"contact_relationships refuses the row, so add the handle there yourself: {error}"
            raise OptOutError(problem) from None
    if db.query(icloud, opted_out, {"key": key}):
        _expire(icloud, _keys_of_persons(quinn, [key]))
    logger.info("handle assigned handle=%s client=%s new=%s", handles.mask_handle(handle.strip()), client_id, is_new)
    return is_new
