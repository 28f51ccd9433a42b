"""Make and update clients from a CSV file: read it, plan what would change, apply the plan.

Used by outreach.py and outreach_server.py. Touches clients and contact_relationships in quinn, and reads
icloud.opt_outs. The lines of the file are in temporary tables of the connection, so memory does not grow with the
file, and a process that is killed leaves nothing. Example:

    found = importing.plan(quinn, icloud, file, "people.csv"); importing.apply(quinn, found)

What becomes of a column of the file:

- a phone number or e-mail address becomes a handle. The first one of a line decides whose line it is.
- the name becomes clients.name; a first and a last name become it together, and are kept, too.
- any other becomes the column of `clients` with its name, or else a key of clients.attributes. The name is written in
  lower case, without accents, with _ for anything else: `First Name` is client.first_name in a template.
"""

import contextlib
import csv
import functools
import io
import json
import re
import time
import unicodedata
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import msgspec
import psycopg2
import psycopg2.extensions
from psycopg2 import sql

import db
import handles
import import_columns
import spreadsheet
from import_columns import Clients, ImportRefused, Place

__all__ = ["Applied", "BadLine", "ImportRefused", "Job", "Plan", "apply", "bad_lines", "plan"]

Connection = Any  # psycopg2's connection
Progress = Callable[[int], None]  # is told how many bytes of the file have been read

LOCK = "outreach-import"  # hashed into the advisory lock's key: one import at a time
LOCK_WAIT = 30  # seconds to wait for another import
CHUNK = 2000  # lines or handles between two COPYs
SHOWN = 20  # bad lines in a plan; `bad_lines` has all
EXAMPLES = 5
# A plan that renames more than this is likely to have a wrong column.
MANY_RENAMES = 5
MANY_RENAMES_SHARE = 0.1
SUFFIX = 9  # last digits of a number by which to look for it before it is parsed

DATES = re.compile(r"(?:date|timestamp(?:\(\d\))? with(?:out)? time zone)")
ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:[ T].*)?")
DOTTED_DATE = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(.*)")


class Column(msgspec.Struct, rename="camel"):
    """What becomes of one column of the file: `target` is `handle`, `clients.x`, `client.x`, both, or `left out`."""

    header: str
    target: str


class Change(msgspec.Struct, rename="camel"):
    field: str
    old: str | None
    new: str


class Example(msgspec.Struct, rename="camel"):
    line: int
    name: str
    changes: list[Change]


class BadLine(msgspec.Struct, rename="camel"):
    """A line that is left out. `column`: the header of the cell that is wrong; None if it is the whole line."""

    line: int
    reason: str
    column: str | None = None


class CellProblem(ValueError):
    """A cell that cannot be read. The message names it, and says why."""

    def __init__(self, message: str, header: str) -> None:
        super().__init__(message)
        self.header = header


class Reading(msgspec.Struct, rename="camel"):
    country: str
    count: int


class Plan(msgspec.Struct, rename="camel"):
    """What an import would do. `people` are the lines that are not bad: new, changed or the same."""

    file: str
    encoding: str
    delimiter: str
    columns: list[Column]
    people: int
    new: int
    changed: int
    same: int
    bad: int
    renames: int
    opted_out: int
    unreadable: int
    examples: list[Example]
    bad_lines: list[BadLine]
    read_as: list[Reading]
    notes: list[str]
    digest: str

    @property
    def has_many_renames(self) -> bool:
        return self.renames >= MANY_RENAMES and self.renames > self.people * MANY_RENAMES_SHARE


class Applied(msgspec.Struct, rename="camel"):
    made: int
    changed: int
    same: int
    bad: int


# --- the lines of the file, in temporary tables -------------------------------------------------------


class _Staging:
    """Writes the lines of a file into the temporary tables, and counts what it read."""

    def __init__(self, quinn: Connection, clients: Clients, places: Sequence[Place]) -> None:
        self.quinn = quinn
        self.clients = clients
        self.places = places
        self.countries: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.unreadable = 0
        self.nameless = 0
        self.line_rows: list[tuple[Any, ...]] = []
        self.handle_rows: list[tuple[Any, ...]] = []

    def add(self, line: spreadsheet.Line) -> None:
        """Read one line; keep it, or the reason why it is bad."""
        problem, bad_column = line.problem, None
        name = ""
        values: dict[str, str] = {}
        attributes: dict[str, str] = {}
        if not problem:
            try:
                name, values, attributes = self._read_cells(line.fields)
                addresses = self._read_handles(line.fields)
            except ValueError as error:
                problem = str(error)
                bad_column = error.header if isinstance(error, CellProblem) else None
        if not problem:
            self.nameless += not name
            for position, handle in enumerate(addresses):
                self.handle_rows.append((line.number, position, handle.key, handle.address, *suffix(handle)))
        self.line_rows.append((line.number, name, _json(values), _json(attributes), problem or "", bad_column or ""))
        if len(self.line_rows) >= CHUNK:
            self.flush()

    def _read_cells(self, fields: Sequence[str]) -> tuple[str, dict[str, str], dict[str, str]]:
        """Return the person's name, and what is not blank: values of columns, and attributes. Raises ValueError."""
        values: dict[str, str] = {}
        attributes: dict[str, str] = {}
        parts: dict[str, str] = {}
        for each in self.places:
            text = clean(fields[each.field])
            if not text:
                continue
            if each.part:
                text = parts[each.part] = " ".join(text.split())
            if each.part == "zone" and text not in _zones():
                message = f"{each.header} {text!r} is not a time zone: write one such as Europe/Berlin"
                raise CellProblem(message, each.header)
            if each.column:
                is_date = DATES.fullmatch(self.clients.type_of(each.column))
                values[each.column] = iso_date(each.header, text) if is_date else text
            elif each.attribute:
                attributes[each.attribute] = text
        whole = parts.get("name") or " ".join(part for part in (parts.get("first"), parts.get("last")) if part)
        if whole and self.clients.writable("name"):
            values.setdefault("name", whole)
        return whole, values, attributes

    def _read_handles(self, fields: Sequence[str]) -> list[spreadsheet.Handle]:
        """Return the handles of a line, each once. Raises ValueError if it has none, or one that is not readable."""
        found: dict[str, spreadsheet.Handle] = {}
        for each in self.places:
            if not each.is_handle or not (cell := fields[each.field].strip()):
                continue
            try:
                handle = spreadsheet.read_handle(cell)
            except ValueError as error:
                self.unreadable += 1
                raise CellProblem(f"{each.header} {cell[:40]!r}: {error}", each.header) from None
            self.countries[handle.country or "e-mail address"] += 1
            self.repairs[handle.repair or ""] += 1
            found.setdefault(handle.key, handle)
        if not found:
            raise ValueError("it has no phone number and no e-mail address")
        return list(found.values())

    def flush(self) -> None:
        _copy(self.quinn, "import_line (line, name, columns, attributes, problem, bad_column)", self.line_rows)
        _copy(self.quinn, "import_handle (line, position, key, handle, digits, suffix)", self.handle_rows)
        self.line_rows, self.handle_rows = [], []


def clean(cell: str) -> str:
    """Return a cell without control characters (but line ends and tabs) and without blanks around it."""
    if cell.isprintable():
        return cell.strip()
    return "".join(letter for letter in cell if letter in "\n\t" or unicodedata.category(letter) != "Cc").strip()


def iso_date(header: str, text: str) -> str:
    """Return a date as PostgreSQL reads it in one way only. Raises ValueError: 03/04/2025 has two meanings."""
    if dotted := DOTTED_DATE.fullmatch(text):
        day, month, year, rest = dotted.groups()
        return f"{year}-{int(month):02}-{int(day):02}{rest}"
    if not ISO_DATE.fullmatch(text):
        raise CellProblem(f"{header} {text[:40]!r} is not a date that has one meaning only: write 2025-12-31", header)
    return text


def suffix(handle: spreadsheet.Handle) -> tuple[int, str]:
    """Return by what to look for a handle in any way of writing: the number of its last digits, and these.

    Whatever stands before them (+, 00, a national 0, Mexico's 1) differs between the ways to write a number. For an
    e-mail address the number is 0, and the text is its ASCII in lower case.
    """
    if handle.country is None:
        return 0, "".join(letter for letter in handle.key if " " <= letter <= "~")
    code = next(end for end in (1, 2, 3) if spreadsheet.is_calling_code(handle.key[1 : 1 + end]))
    digits = min(SUFFIX, len(handle.key) - 1 - code)
    return digits, handle.key[-digits:]


@functools.cache
def _zones() -> set[str]:
    return zoneinfo.available_timezones()


def _json(values: Mapping[str, str]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _copy(quinn: Connection, target: str, rows: Sequence[Sequence[Any]]) -> None:
    """COPY rows into a temporary table. Every value is quoted, so an empty text stays one and is no NULL."""
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows(rows)
    buffer.seek(0)
    with quinn.cursor() as cursor:
        cursor.copy_expert(f"COPY {target} FROM STDIN (FORMAT csv)", buffer)


def _make_tables(quinn: Connection, clients: Clients) -> None:
    """Make the temporary tables. Their client_id has the type of clients.id, so that the indexes of both fit."""
    statement = """
        DROP TABLE IF EXISTS pg_temp.import_line, pg_temp.import_handle, pg_temp.import_known,
                             pg_temp.import_person, pg_temp.import_opt_out;
        -- `problem` is empty for a good line. `bad_column` is the header of the cell that it is about, or empty.
        CREATE TEMP TABLE import_line (
            line INTEGER PRIMARY KEY, name TEXT, columns JSONB, attributes JSONB, problem TEXT, bad_column TEXT
        );
        -- `position` 0 is the handle that decides whose line it is.
        CREATE TEMP TABLE import_handle (
            line INTEGER, position INTEGER, key TEXT, handle TEXT, digits INTEGER, suffix TEXT
        );
        -- The handles of the database that have the key of a handle of the file.
        CREATE TEMP TABLE import_known (client_id {key}, key TEXT, is_primary BOOLEAN);
        -- What would become of each good line. `client_id` is NULL for a new client until the plan is applied.
        CREATE TEMP TABLE import_person (
            line INTEGER PRIMARY KEY, client_id {key}, is_new BOOLEAN, problem TEXT, columns JSONB, attributes JSONB,
            positions INTEGER[]
        );
        CREATE TEMP TABLE import_opt_out (key TEXT);
        -- For the look-ups for each line.
        CREATE INDEX ON import_handle (line);
        CREATE INDEX ON import_handle (key);
        CREATE INDEX ON import_known (key);
        CREATE INDEX ON import_opt_out (key);
    """
    db.query(quinn, statement.replace("{key}", clients.key_type))


def _stage(
    quinn: Connection, sheet: spreadsheet.Sheet, clients: Clients, places: Sequence[Place], progress: Progress | None
) -> _Staging:
    """Read the whole file into the temporary tables."""
    staging = _Staging(quinn, clients, places)
    named = {index for index, header in enumerate(sheet.header) if header}
    for line in sheet.lines():
        extra = next((index for index, cell in enumerate(line.fields) if index not in named and cell.strip()), None)
        if extra is not None:
            line = line._replace(problem=f"field {extra + 1} has a value, and column {extra + 1} has no name")
        staging.add(line)
        if progress and line.number % CHUNK == 0:
            progress(sheet.position())
    staging.flush()
    db.query(quinn, "ANALYZE pg_temp.import_line; ANALYZE pg_temp.import_handle")
    return staging


def _check_types(quinn: Connection, clients: Clients, places: Sequence[Place]) -> None:
    """Mark the lines with a value that the type of its column does not take.

    An assignment in PL/pgSQL also checks what a cast would change silently: a text that is too long is not cut.
    """
    function = sql.SQL("""
        CREATE OR REPLACE FUNCTION pg_temp.import_problem(value TEXT) RETURNS TEXT LANGUAGE plpgsql AS $$
        DECLARE target {type};
        BEGIN
            target := value;
            RETURN NULL;
        EXCEPTION WHEN OTHERS THEN
            RETURN SQLERRM;
        END $$
    """)
    check = """
        UPDATE import_line
           SET problem = %(header)s || ': ' || found.problem, bad_column = %(header)s
          FROM (SELECT line, pg_temp.import_problem(columns ->> %(column)s) AS problem
                  FROM import_line
                 WHERE problem = '' AND columns ? %(column)s
                OFFSET 0) AS found
         WHERE import_line.line = found.line AND found.problem IS NOT NULL
    """
    for each in places:
        if each.column and clients.type_of(each.column) not in ("text", "character varying"):
            db.query(quinn, function.format(type=sql.SQL(clients.type_of(each.column))).as_string(quinn))
            db.query(quinn, check, {"header": each.header, "column": each.column})


def _mark_doubles(quinn: Connection) -> None:
    """Mark each line whose first handle is that of an earlier good line: the first one counts."""
    statement = """
        UPDATE import_line
           SET problem = 'it has the same ' || CASE WHEN handle LIKE '%%@%%' THEN 'e-mail address' ELSE 'number' END
                         || ' as line ' || first || ', which counts'
          FROM (SELECT line, handle, min(line) OVER (PARTITION BY key) AS first
                  FROM import_handle
                  JOIN import_line USING (line)
                 WHERE position = 0 AND problem = '') AS double
         WHERE import_line.line = double.line AND double.first < double.line
    """
    db.query(quinn, statement, {})


# --- what would become of each line -------------------------------------------------------------------


def _find_known(quinn: Connection, clients: Clients) -> None:
    """Fill import_known: whose handles have the key of a handle of the file, in whatever way they are written.

    Only handles that end in the same digits are parsed, and of these only those that are not written like the key:
    parsing a million handles would take half a minute.
    """
    same = """
        TRUNCATE import_known;
        INSERT INTO import_known
        SELECT DISTINCT contact.client_id::{key}, contact.handle, COALESCE(contact.is_primary, false)
          FROM contact_relationships AS contact
         WHERE contact.handle IN (SELECT key FROM import_handle)
    """
    similar = """
        DECLARE import_similar NO SCROLL CURSOR FOR
        SELECT contact.client_id::text, contact.handle, COALESCE(contact.is_primary, false)
          FROM contact_relationships AS contact
         CROSS JOIN (SELECT DISTINCT digits FROM import_handle) AS length
          JOIN (SELECT DISTINCT digits, suffix FROM import_handle) AS wanted
            ON wanted.digits = length.digits
           AND wanted.suffix = CASE length.digits
                   WHEN 0 THEN regexp_replace(lower(contact.handle), '[^!-~]', '', 'g')
                   ELSE right(regexp_replace(contact.handle, '[^0-9]', '', 'g'), length.digits) END
         WHERE NOT EXISTS (SELECT FROM import_handle WHERE key = contact.handle)
    """
    db.query(quinn, same.replace("{key}", clients.key_type))
    db.query(quinn, similar)
    while rows := db.query(quinn, f"FETCH {CHUNK} FROM import_similar"):
        known = [(client_id, handles.key(handle), is_primary) for client_id, handle, is_primary in rows]
        _copy(quinn, "import_known (client_id, key, is_primary)", known)
    db.query(quinn, "CLOSE import_similar; ANALYZE pg_temp.import_known")


def _resolve(quinn: Connection, clients: Clients, places: Sequence[Place]) -> None:
    """Fill import_person: whose line each is, and what it would change.

    The first handle decides: the client whose primary handle it is, else the only client who has it. If nobody has it,
    the line is for the client of the same name with another handle of the line, and else for a new client. So a couple
    with one e-mail address stays two clients, and a person with a new number stays one.
    """
    statement = sql.SQL("""
        INSERT INTO import_person
        WITH choice AS (
            SELECT line.line,
                   array_agg(DISTINCT client.id)
                       FILTER (WHERE position = 0 AND known.is_primary AND client.id IS NOT NULL) AS by_primary,
                   array_agg(DISTINCT client.id) FILTER (WHERE position = 0 AND client.id IS NOT NULL) AS by_handle,
                   array_agg(DISTINCT client.id) FILTER (WHERE lower({name}) = lower(line.name)) AS by_name
              FROM import_line AS line
              JOIN import_handle AS handle USING (line)
              LEFT JOIN import_known AS known USING (key)
              LEFT JOIN clients AS client ON client.id = known.client_id
             WHERE line.problem = ''
             GROUP BY line.line
        ), owner AS (
            SELECT line, COALESCE(by_primary, by_handle, by_name) AS ids
              FROM choice
        ), person AS (
            SELECT line, ids[1] AS id, cardinality(ids) AS owners,
                   min(line) OVER (PARTITION BY CASE cardinality(ids) WHEN 1 THEN ids[1] END) AS first
              FROM owner
        )
        SELECT line.line, client.id, client.id IS NULL,
               CASE WHEN owners > 1 THEN 'its handle belongs to ' || owners || ' clients: make them one, or give the '
                                         'handle to one of them'
                    WHEN first < line.line AND owners = 1
                         THEN 'it is the same client as line ' || first || ', which counts'
                    ELSE '' END,
               CASE WHEN client.id IS NULL THEN '{{}}' ELSE {columns} END,
               {attributes},
               ARRAY(SELECT position
                       FROM import_handle AS handle
                      WHERE handle.line = line.line
                        AND NOT EXISTS (SELECT FROM import_known AS known
                                         WHERE known.key = handle.key AND known.client_id = client.id)
                      ORDER BY position)
          FROM person
          JOIN import_line AS line USING (line)
          LEFT JOIN clients AS client ON client.id = person.id
    """)
    db.query(quinn, "TRUNCATE import_person")
    pieces = [
        sql.SQL("'{}'::jsonb"),
        *(_column_change(clients, name) for name in import_columns.written(clients, places)),
    ]
    filled = statement.format(
        name=_name_of_client(clients),
        columns=sql.SQL(" || ").join(pieces),
        attributes=sql.SQL(ATTRIBUTE_CHANGES if clients.has_attributes else "'{}'"),
    )
    db.query(quinn, filled.as_string(quinn))
    db.query(quinn, "ANALYZE pg_temp.import_person")
    _mark_incomplete(quinn, clients, places)


# The attributes of a line that differ from the client's: {key: [old, new]}. A number 5 and the text 5 are the same.
ATTRIBUTE_CHANGES = """
    COALESCE((SELECT jsonb_object_agg(key, jsonb_build_array(client.attributes ->> key, value))
                FROM jsonb_each_text(line.attributes)
               WHERE client.id IS NOT NULL AND (client.attributes ->> key) IS DISTINCT FROM value), '{}')
"""


def _column_change(clients: Clients, name: str) -> sql.Composable:
    """Return the SQL of {column: [old, new]} for a column whose value in the file differs, else of {}."""
    template = sql.SQL("""
        CASE WHEN client.{column}::text IS DISTINCT FROM (line.columns ->> {key})::{type}::text
                  AND line.columns ? {key}
             THEN jsonb_build_object({key}, jsonb_build_array(client.{column}::text, line.columns ->> {key}))
             ELSE '{{}}' END
    """)
    return template.format(column=_identifier(name), key=sql.Literal(name), type=sql.SQL(clients.type_of(name)))


def _name_of_client(clients: Clients) -> sql.Composable:
    if clients.writable("name"):
        return sql.SQL("client.name::text")
    if clients.writable("first_name") and clients.writable("last_name"):
        return sql.SQL("concat_ws(' ', client.first_name, client.last_name)")
    return sql.SQL("NULL::text")


def _identifier(name: str) -> sql.Composable:
    return sql.Identifier(name)


def _mark_incomplete(quinn: Connection, clients: Clients, places: Sequence[Place]) -> None:
    """Mark the new clients that `clients` would refuse. Raises ImportRefused if it would refuse all of them."""
    new = "SELECT count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE positions <> '{}') FROM import_person"
    mark = """
        UPDATE import_person AS person
           SET problem = 'it is a new client, and has no ' || %(column)s || ', which clients requires'
          FROM import_line AS line
         WHERE line.line = person.line AND is_new AND person.problem = '' AND NOT line.columns ? %(column)s
    """
    [(makes, adds)] = db.query(quinn, new)
    filled = {*import_columns.written(clients, places), *_consent(clients, places, "")}
    required = [name for name, column in clients.columns.items() if column.is_required and name != "id"]
    required = [name for name in required if name != "name" or not clients.has_text(name)]
    if makes and (missing := [name for name in required if name not in filled]):
        raise ImportRefused(
            f"this would make {makes:,} new clients, and clients requires {', '.join(missing)}: add columns of these "
            "names to the file, or give them a default in the database"
        )
    if makes and clients.new_id is None:
        raise ImportRefused(
            f"this would make {makes:,} new clients, and clients.id has no default: give it one, or make these clients "
            "in your platform first"
        )
    if adds and clients.required_of_contact:
        raise ImportRefused(
            f"this would add handles, and contact_relationships requires {', '.join(clients.required_of_contact)}: "
            "give these columns a default in the database"
        )
    for name in required:
        db.query(quinn, mark, {"column": name})


def _consent(clients: Clients, places: Sequence[Place], file: str) -> dict[str, sql.Composable]:
    """Return what the file's name and time are written to, for new clients: columns that the file does not have."""
    filled = {name for each in places for name in (each.column, each.attribute)}
    values: dict[str, sql.Composable] = {}
    if clients.has_text("consent_source") and "consent_source" not in filled:
        values["consent_source"] = sql.Literal(file)
    if (
        "consent_at" in clients.columns
        and "consent_at" not in filled
        and DATES.fullmatch(clients.type_of("consent_at"))
    ):
        values["consent_at"] = sql.SQL("now()")
    return values


# --- the plan -----------------------------------------------------------------------------------------


def plan(
    quinn: Connection,
    icloud: Connection,
    file: BinaryIO,
    filename: str,
    *,
    handle: Sequence[str] = (),
    name: str | None = None,
    ignore: Sequence[str] = (),
    encoding: str | None = None,
    progress: Progress | None = None,
) -> "Job":
    """Read the file, and find what it would change; write nothing. Raises ImportRefused.

    `handle`, `name` and `ignore` are columns of the file: those with handles, with the name, and those to leave out.
    """
    try:
        sheet = spreadsheet.open_sheet(file, encoding)
        with contextlib.closing(sheet):
            clients = import_columns.read_clients(quinn)
            places = import_columns.place(sheet.header, clients, handle, name, ignore)
            with _transaction(quinn, "READ COMMITTED"):
                _make_tables(quinn, clients)
                staging = _stage(quinn, sheet, clients, places, progress)
                _check_types(quinn, clients, places)
                _mark_doubles(quinn)
                _copy_opt_outs(quinn, icloud)
    except spreadsheet.Unreadable as error:
        raise ImportRefused(str(error)) from None
    with _transaction(quinn, "REPEATABLE READ"):
        _find_known(quinn, clients)
        _resolve(quinn, clients, places)
        found = _describe(quinn, clients, places, sheet, staging, filename)
    return Job(found, clients, places)


class Job(NamedTuple):
    """A plan, and what `apply` needs beside it. It belongs to the connection that made it."""

    plan: Plan
    clients: Clients
    places: list[Place]


@contextlib.contextmanager
def _transaction(quinn: Connection, isolation: str) -> Iterator[None]:
    """Run statements in one transaction, without the time-out of statements: a large file needs longer."""
    with db.transaction(quinn, isolation):
        db.query(quinn, "SET LOCAL statement_timeout = 0")
        yield


def _copy_opt_outs(quinn: Connection, icloud: Connection) -> None:
    """Copy the keys of the active opt-outs beside the file's: the two may be different databases."""
    statement = """
        SELECT handle_key FROM icloud.opt_outs
         WHERE ended_at IS NULL AND handle_key > %(after)s
         ORDER BY handle_key
         LIMIT %(chunk)s
    """
    after = ""
    while rows := db.query(icloud, statement, {"after": after, "chunk": CHUNK}):
        _copy(quinn, "import_opt_out (key)", rows)
        after = rows[-1][0]


def _describe(
    quinn: Connection, clients: Clients, places: Sequence[Place], sheet: spreadsheet.Sheet, staging: _Staging, file: str
) -> Plan:
    """Return what import_person says, in numbers and examples."""
    counts = """
        SELECT count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new AND differs),
               count(*) FILTER (WHERE NOT is_new AND NOT differs), count(*) FILTER (WHERE is_rename),
               count(*) FILTER (WHERE EXISTS (SELECT FROM import_handle AS handle
                                                JOIN import_opt_out USING (key)
                                               WHERE handle.line = person.line)),
               (SELECT count(*) FROM import_line WHERE problem <> '')
               + (SELECT count(*) FROM import_person WHERE problem <> '')
          FROM ({persons}) AS person
    """
    names = [*(each.column for each in places if each.column and each.part in ("name", "first", "last")), "name"]
    counted = db.query(quinn, counts.replace("{persons}", PERSONS), {"names": names})
    new, changed, same, renames, opted_out, bad = counted[0]
    return Plan(
        file=file,
        encoding=sheet.encoding,
        delimiter=sheet.delimiter,
        columns=_columns(sheet.header, clients, places),
        people=new + changed + same,
        new=new,
        changed=changed,
        same=same,
        bad=bad,
        renames=renames,
        opted_out=opted_out,
        unreadable=staging.unreadable,
        examples=_examples(quinn, names),
        bad_lines=bad_lines(quinn, limit=SHOWN),
        read_as=[Reading(country, count) for country, count in staging.countries.most_common()],
        notes=_notes(staging),
        digest=_digest(quinn),
    )


# The good lines of import_person, with whether they change anything, and rename somebody who has a name.
PERSONS = """
    SELECT *, columns <> '{}' OR attributes <> '{}' OR positions <> '{}' AS differs,
           EXISTS (SELECT FROM jsonb_each(columns)
                    WHERE key = ANY (%(names)s) AND btrim(value ->> 0) <> '') AS is_rename
      FROM import_person
     WHERE problem = ''
"""


def _columns(header: Sequence[str], clients: Clients, places: Sequence[Place]) -> list[Column]:
    """Say what becomes of each column, in the order of the file."""
    targets = {}
    for each in places:
        found = ["handle"] if each.is_handle else []
        found += [f"clients.{each.column}"] if each.column else []
        found += [f"client.{each.attribute}"] if each.attribute else []
        if each.part in ("first", "last") and clients.writable("name") and not any(p.part == "name" for p in places):
            found.append("part of clients.name")
        targets[each.field] = ", ".join(found)
    return [Column(name, targets.get(index, "left out")) for index, name in enumerate(header) if name]


def _examples(quinn: Connection, names: Sequence[str]) -> list[Example]:
    """Return some of the clients that change, renamed ones first: a wrong column shows there."""
    statement = """
        SELECT person.line, line.name, person.columns, person.attributes,
               ARRAY(SELECT handle FROM import_handle AS handle
                      WHERE handle.line = person.line AND position = ANY (person.positions) ORDER BY position)
          FROM ({persons}) AS person
          JOIN import_line AS line USING (line)
         WHERE NOT is_new AND differs
         ORDER BY is_rename DESC, person.line
         LIMIT %(limit)s
    """
    examples = []
    rows = db.query(quinn, statement.replace("{persons}", PERSONS), {"names": names, "limit": EXAMPLES})
    for line, name, columns, attributes, added in rows:
        changes = [Change(field, old, new) for field, (old, new) in sorted({**attributes, **columns}.items())]
        changes += [Change("handle", None, address) for address in added]
        examples.append(Example(line, name, changes))
    return examples


def bad_lines(quinn: Connection, after: int = 0, limit: int | None = None) -> list[BadLine]:
    """Return the bad lines of the plan that this connection has made last, in the file's order."""
    statement = """
        SELECT line, problem, NULLIF(bad_column, '') FROM import_line WHERE problem <> '' AND line > %(after)s
         UNION ALL
        SELECT line, problem, NULL FROM import_person WHERE problem <> '' AND line > %(after)s
         ORDER BY line
         LIMIT %(limit)s
    """
    return [BadLine(*row) for row in db.query(quinn, statement, {"after": after, "limit": limit})]


def _notes(staging: _Staging) -> list[str]:
    """Return what the owner should check: what was repaired, and who has no name."""
    repairs = staging.repairs
    said = {
        "zero": "without their first 0, which a spreadsheet removes: read as numbers of DEFAULT_REGION",
        "plus": "without + that are no numbers of DEFAULT_REGION: read as international ones",
        "apostrophe": "after an apostrophe, which marks text in a spreadsheet: read without it",
    }
    notes = [f"{_count(repairs[what], 'handle')} {how}" for what, how in said.items() if repairs[what]]
    if staging.nameless:
        notes.append(f"{_count(staging.nameless, 'person', 'people')} without a name")
    return notes


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _digest(quinn: Connection) -> str:
    """Return a value that changes when anything does that the import would write."""
    statement = """
        SELECT md5(count(*) || ' ' || COALESCE(sum(('x' || left(hash, 15))::bit(60)::bigint), 0))
          FROM (SELECT md5(person::text || content::text
                           || ARRAY(SELECT ROW (position, key) FROM import_handle AS handle
                                     WHERE handle.line = content.line ORDER BY position)::text)
                  FROM import_person AS person
                  JOIN import_line AS content USING (line)) AS written (hash)
    """
    return str(db.query(quinn, statement)[0][0])


# --- applying it --------------------------------------------------------------------------------------


def apply(quinn: Connection, job: Job, strict: bool = False, import_id: str | None = None) -> Applied:
    """Do what the plan says, in one transaction. Raises ImportRefused if it would now be anything else.

    `strict`: refuse the whole file if one of its lines is bad. `import_id`: the upload whose people these are. Call it
    with the connection of `plan`.
    """
    found = job.plan
    if strict and found.bad:
        raise ImportRefused(f"{_count(found.bad, 'line is', 'lines are')} bad, so nothing is imported (--strict)")
    _acquire_lock(quinn)  # before the transaction, whose first statement decides which changes it sees
    try:
        with _transaction(quinn, "REPEATABLE READ"):
            _find_known(quinn, job.clients)
            _resolve(quinn, job.clients, job.places)
            if _digest(quinn) != found.digest:
                raise ImportRefused(CHANGED, 409)
            _write(quinn, job)
            if import_id:
                _keep_people(quinn, job, import_id)
    except (psycopg2.extensions.TransactionRollbackError, psycopg2.errors.LockNotAvailable):
        raise ImportRefused(CHANGED, 409) from None
    except (psycopg2.IntegrityError, psycopg2.DataError) as error:
        where = error.diag.constraint_name or error.diag.message_primary
        raise ImportRefused(
            f"the database refuses a client ({where}), so nothing is imported: correct the file"
        ) from None
    finally:
        if not quinn.closed:
            with contextlib.suppress(psycopg2.Error):
                db.query(quinn, "SELECT pg_advisory_unlock(hashtext(%(name)s))", {"name": LOCK})
    return Applied(found.new, found.changed, found.same, found.bad)


CHANGED = "the clients have changed since this was planned, so nothing is imported: run the same command again"


def _acquire_lock(quinn: Connection) -> None:
    """Let one import at a time write. Raises ImportRefused."""
    end = time.monotonic() + LOCK_WAIT
    while not db.try_lock(quinn, LOCK):
        if time.monotonic() > end:
            raise ImportRefused("another import is running: wait for its end, then run the same command again", 409)
        time.sleep(0.1)


def _write(quinn: Connection, job: Job) -> None:
    """Insert the new clients, update the changed ones, and add the handles that they do not have."""
    identify = "UPDATE import_person SET client_id = {new_id} WHERE is_new AND problem = ''"
    contacts = """
        INSERT INTO contact_relationships (client_id, handle, is_primary)
        SELECT person.client_id, handle.handle,
               position = 0 AND NOT EXISTS (SELECT FROM contact_relationships AS contact
                                             WHERE contact.client_id = person.client_id AND contact.is_primary)
          FROM import_person AS person
          JOIN import_handle AS handle ON handle.line = person.line AND position = ANY (positions)
         WHERE person.problem = ''
         ORDER BY person.line, position
    """
    if job.plan.new:
        db.query(quinn, identify.replace("{new_id}", str(job.clients.new_id)))
        db.query(quinn, _insert(job).as_string(quinn))
    if update := _update(job):
        db.query(quinn, update.as_string(quinn))
    db.query(quinn, contacts)


def _keep_people(quinn: Connection, job: Job, import_id: str) -> None:
    """Keep who was in the file, and erase its content. Raises ImportRefused if another request has done so."""
    finish = """
        UPDATE outreach_imports
           SET applied_at = now(), content = NULL, people = %(people)s
         WHERE id = %(id)s AND applied_at IS NULL
        RETURNING id
    """
    insert = """
        INSERT INTO outreach_import_people (import_id, client_id)
        SELECT DISTINCT %(id)s::uuid, client_id FROM import_person WHERE problem = '' AND client_id IS NOT NULL
    """
    if not db.query(quinn, finish, {"id": import_id, "people": job.plan.people}):
        raise ImportRefused("this file has been imported already", 409)
    db.query(quinn, insert, {"id": import_id})


def _insert(job: Job) -> sql.Composable:
    """Return the INSERT of the new clients. A blank cell becomes the column's default."""
    statement = sql.SQL("""
        INSERT INTO clients (id, {columns}) OVERRIDING SYSTEM VALUE
        SELECT person.client_id, {values}
          FROM import_person AS person
          JOIN import_line AS line USING (line)
         WHERE is_new AND person.problem = ''
         ORDER BY person.line
    """)
    clients = job.clients
    values: dict[str, sql.Composable] = dict(_consent(clients, job.places, job.plan.file))
    for name in import_columns.written(clients, job.places):
        default = clients.columns[name].default or ("''" if name == "name" and clients.has_text(name) else "NULL")
        values[name] = sql.SQL("COALESCE({value}, {default})").format(
            value=_value(clients, name), default=sql.SQL(default)
        )
    if clients.has_text("name"):
        values.setdefault("name", sql.SQL("''"))
    if clients.has_attributes:
        values["attributes"] = sql.SQL("line.attributes")
    if not values:
        return sql.SQL(statement.string.replace("id, {columns}", "id").replace(", {values}", ""))
    return statement.format(
        columns=sql.SQL(", ").join(_identifier(name) for name in values), values=sql.SQL(", ").join(values.values())
    )


def _update(job: Job) -> sql.Composable | None:
    """Return the UPDATE of the changed clients: a blank cell leaves what is there. None if no column can change."""
    statement = sql.SQL("""
        UPDATE clients AS client
           SET {assignments}
          FROM import_person AS person
          JOIN import_line AS line USING (line)
         WHERE client.id = person.client_id AND NOT is_new AND person.problem = ''
           AND (person.columns <> '{{}}' OR person.attributes <> '{{}}')
    """)
    assignments: list[sql.Composable] = [
        sql.SQL("{column} = CASE WHEN person.columns ? {key} THEN {value} ELSE client.{column} END").format(
            column=_identifier(name), key=sql.Literal(name), value=_value(job.clients, name)
        )
        for name in import_columns.written(job.clients, job.places)
    ]
    if job.clients.has_attributes:
        assignments.append(sql.SQL(MERGED_ATTRIBUTES))
    return statement.format(assignments=sql.SQL(", ").join(assignments)) if assignments else None


MERGED_ATTRIBUTES = """
    attributes = COALESCE(client.attributes, '{}')
                 || COALESCE((SELECT jsonb_object_agg(key, value -> 1) FROM jsonb_each(person.attributes)), '{}')
"""


def _value(clients: Clients, name: str) -> sql.Composable:
    """Return the SQL of the value of a line for a column, in the column's type; NULL if its cell is blank."""
    return sql.SQL("(line.columns ->> {key})::{type}").format(
        key=sql.Literal(name), type=sql.SQL(clients.type_of(name))
    )
