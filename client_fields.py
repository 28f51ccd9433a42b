"""Find out what an audience can ask for in this database, and check the values that it compares with.

Used by audience.py; reads the catalogue, clients, outreach_batches and outreach_imports. Example:

    names = client_fields.field_names(client_fields.read_fields(quinn))

A field is looked for in this order: outreach's own (OUTREACH_FIELDS), a column of `clients`, a key of its JSONB column
`attributes`. `attributes.KEY` is always a key.
"""

import json
import math
import re
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, cast

import psycopg2.extensions

import db

MAX_KEYS = 1000  # of `attributes` that are looked for

Kind = Literal[
    "text", "json", "integer", "number", "boolean", "date", "timestamp", "timestamptz", "uuid", "enum", "other",
    "handle kind", "handle prefix", "batch", "import",
]  # fmt: skip
ORDER = ("lt", "lte", "gt", "gte")  # operators that need an order of values

# PostgreSQL's name of a type -> (kind, the type that values are cast to). Without a length or a precision: a cast to
# varchar(3) would cut the value off, and then compare it.
TYPES: dict[str, tuple[Kind, str]] = {
    "int2": ("integer", "smallint"),
    "int4": ("integer", "integer"),
    "int8": ("integer", "bigint"),
    "numeric": ("number", "numeric"),
    "float4": ("number", "real"),
    "float8": ("number", "double precision"),
    "bool": ("boolean", "boolean"),
    "date": ("date", "date"),
    "timestamp": ("timestamp", "timestamp without time zone"),
    "timestamptz": ("timestamptz", "timestamp with time zone"),
    "uuid": ("uuid", "uuid"),
    "jsonb": ("json", "text"),
}
# The lowest and the highest value; for a float the smallest and the largest amount, because PostgreSQL refuses both.
RANGES: dict[str, tuple[float, float]] = {
    "smallint": (-(2**15), 2**15 - 1),
    "integer": (-(2**31), 2**31 - 1),
    "bigint": (-(2**63), 2**63 - 1),
    "real": (1.2e-37, 3.4e38),
    "double precision": (2.3e-307, 1.7e308),
    "numeric": (1e-307, 1.7e308),
}
NUMBER = re.compile(r"[+-]?([0-9]{1,100}(\.[0-9]{0,100})?|\.[0-9]{1,100})")
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2})?"
)


# Rows of outreach's own fields. A client's primary handle is the first one, as for the dispatcher; written without
# min(), because the planner can join this, and would group all handles for a few clients.
PRIMARY = """
    SELECT client_id, handle FROM contact_relationships AS first
     WHERE is_primary AND handle IS NOT NULL
       AND NOT EXISTS (SELECT FROM contact_relationships AS other
                        WHERE other.client_id = first.client_id AND other.is_primary AND other.handle < first.handle)
"""
SENT = """
    SELECT client_id, max(sent_at) AS value FROM outreach_batch_items
     WHERE status = 'sent' AND sent_at IS NOT NULL GROUP BY client_id
"""
SENT_COUNT = """
    SELECT client_id, count(*) AS value FROM outreach_batch_items WHERE status = 'sent' GROUP BY client_id
"""
FAILED = """
    SELECT client_id, max(updated_at) AS value FROM outreach_batch_items WHERE status = 'failed' GROUP BY client_id
"""


class QueryError(ValueError):
    """The audience cannot be used. The message says what is wrong, where in the document, and what is possible."""


class Column(NamedTuple):
    """A field: a column of `clients`, a key of its `attributes`, or one of outreach's own."""

    name: str
    kind: Kind
    type: str  # what values are cast to
    labels: tuple[str, ...] = ()  # of an enum, in its order
    is_array: bool = False  # then `kind` and `type` are those of its elements
    is_key: bool = False  # `name` is a key of `attributes`
    source: str = ""  # outreach's own: rows of client_id and value
    needs_collation: bool = False  # no LIKE and no regular expression work with the column's own


class Fields(NamedTuple):
    """What can be asked for in this database."""

    columns: dict[str, Column]
    key_type: str  # the type of clients.id
    attribute_keys: frozenset[str] = frozenset()  # those that somebody has
    batch_ids: frozenset[str] = frozenset()
    import_ids: frozenset[str] = frozenset()

    @property
    def has_attributes(self) -> bool:
        """Return whether `clients` has a JSONB column `attributes`."""
        column = self.columns.get("attributes")
        return column is not None and column.kind == "json" and not column.is_array


OUTREACH_FIELDS: dict[str, Column] = {
    "handle.kind": Column("handle.kind", "handle kind", "text", ("phone", "email"), source=PRIMARY),
    "handle.prefix": Column("handle.prefix", "handle prefix", "text", source=PRIMARY),
    "batch.sent": Column("batch.sent", "batch", "uuid", source="sent"),
    "batch.failed": Column("batch.failed", "batch", "uuid", source="failed"),
    "batch.skipped": Column("batch.skipped", "batch", "uuid", source="skipped"),
    "import.id": Column("import.id", "import", "uuid", source="import"),
    "last_sent": Column("last_sent", "timestamptz", "timestamp with time zone", source=SENT),
    "sent_count": Column("sent_count", "integer", "bigint", source=SENT_COUNT),
    "last_failed": Column("last_failed", "timestamptz", "timestamp with time zone", source=FAILED),
}


# --- what clients has ---------------------------------------------------------------------------------


def read_fields(quinn: psycopg2.extensions.connection) -> Fields:
    """Return the fields of this database: columns, the keys of `attributes` that somebody has, and the batches.

    Takes 0.3 s for a million clients, because it looks for keys in all of them.
    """
    fields = read_columns(quinn)
    batches = db.query(quinn, "SELECT id::text FROM outreach_batches")
    imports = db.query(quinn, "SELECT id::text FROM outreach_imports WHERE applied_at IS NOT NULL")
    keys = _read_attribute_keys(quinn) if fields.has_attributes else frozenset()
    return fields._replace(
        attribute_keys=keys,
        batch_ids=frozenset(batch_id for (batch_id,) in batches),
        import_ids=frozenset(import_id for (import_id,) in imports),
    )


def field_names(fields: Fields) -> list[str]:
    """Return the names of all fields: columns, keys of `attributes` that no column hides, and outreach's own."""
    keys = (key if key not in fields.columns else f"attributes.{key}" for key in sorted(fields.attribute_keys))
    return list(dict.fromkeys([*fields.columns, *keys, *OUTREACH_FIELDS]))


def read_columns(quinn: psycopg2.extensions.connection) -> Fields:
    """Return the columns of `clients` that this role may read, from the catalogue, without keys and batches."""
    statement = """
        WITH RECURSIVE base AS (
            SELECT attnum, attname, atttypid AS type_id, attcollation
              FROM pg_attribute
             WHERE attrelid = to_regclass('clients') AND attnum > 0 AND NOT attisdropped
               AND has_column_privilege(attrelid, attnum, 'SELECT')
             UNION ALL
            SELECT attnum, attname, typbasetype, attcollation  -- of a domain, the type that it restricts
              FROM base JOIN pg_type ON pg_type.oid = type_id
             WHERE typtype = 'd'
        )
        SELECT attname, COALESCE(element.typname, type.typname), COALESCE(element.typtype, type.typtype),
               COALESCE(element.typcategory, type.typcategory), format_type(COALESCE(element.oid, type.oid), NULL),
               COALESCE(element.typnamespace, type.typnamespace) = 'pg_catalog'::regnamespace,
               ARRAY(SELECT enumlabel::text FROM pg_enum
                      WHERE enumtypid = COALESCE(element.oid, type.oid) ORDER BY enumsortorder),
               element.oid IS NOT NULL, COALESCE(NOT collisdeterministic, false)
          FROM base
          JOIN pg_type AS type ON type.oid = type_id AND type.typtype <> 'd'
          LEFT JOIN pg_type AS element ON element.oid = type.typelem AND type.typcategory = 'A'
          LEFT JOIN pg_collation ON pg_collation.oid = attcollation
         ORDER BY attnum
    """
    columns: dict[str, Column] = {}
    key_type = "text"
    for name, type_name, group, category, written, is_builtin, labels, is_array, is_unusual in db.query(
        quinn, statement
    ):
        kind, cast_to = _kind(type_name, group, category, written, is_builtin)
        columns[name] = Column(name, kind, cast_to, tuple(labels), is_array, needs_collation=is_unusual)
        if name == "id":
            key_type = "bpchar" if type_name == "bpchar" else written
    return Fields(columns, key_type)


def _kind(type_name: str, group: str, category: str, written: str, is_builtin: bool) -> tuple[Kind, str]:
    """Return the kind of a type of the catalogue, and the type that values are cast to."""
    if group == "e":
        return "enum", written
    if category == "S":
        return "text", written if type_name == "citext" else "text"
    return TYPES.get(type_name, ("other", "text")) if is_builtin else ("other", "text")


def _read_attribute_keys(quinn: psycopg2.extensions.connection) -> frozenset[str]:
    """Return the keys that the `attributes` of at least one client has; not more than MAX_KEYS.

    Each run reads up to 1,000 clients who have another key than those known. The last run reads all and finds nobody.
    One DISTINCT over the keys of all clients would take four times as long.
    """
    statement = """
        SELECT DISTINCT key
          FROM (SELECT attributes
                  FROM clients
                 WHERE CASE jsonb_typeof(attributes) WHEN 'object' THEN attributes - %(known)s::text[] <> '{}' END
                 LIMIT 1000) AS client, jsonb_object_keys(attributes) AS key
    """
    known: set[str] = set()
    while len(known) < MAX_KEYS:
        found = {key for (key,) in db.query(quinn, statement, {"known": sorted(known)})}
        if found <= known:
            break
        known |= found
    return frozenset(sorted(known)[:MAX_KEYS])


def find_field(name: str, fields: Fields) -> Column | None:
    """Return the field of this name; a key of `attributes` whether or not somebody has it."""
    if name in OUTREACH_FIELDS:
        return OUTREACH_FIELDS[name]
    if name in fields.columns:
        return fields.columns[name]
    if not fields.has_attributes or db.UNSTORABLE.search(name):
        return None
    return Column(name.removeprefix("attributes."), "json", "text", is_key=True)


# --- values -------------------------------------------------------------------------------------------


def check_value(value: object, column: Column, fields: Fields, operator: str, place: str) -> Any:
    """Return a value as its field needs it; `place` is where it stands in the document. Raises QueryError.

    PostgreSQL can cast the result to the field's type: no statement fails because of a value.
    """
    if value is None:
        raise QueryError(
            f'{place} is null: for "has no value", write {{"field": {quoted(column.name)}, "empty": true}}'
        )
    if not isinstance(value, str | int | float):
        raise QueryError(f"{place} must be a text, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise QueryError(f"{place} must be a finite number")
    if isinstance(value, str) and db.UNSTORABLE.search(value):
        raise QueryError(f"{place} contains a character that no text in the database can contain")
    if column.kind in ("batch", "import"):
        return _check_id(value, column.kind, fields, place)
    return CHECKS[column.kind](value, column, operator, place)


def _check_id(value: object, kind: str, fields: Fields, place: str) -> str:
    """Return the id of a batch or an import that exists. With `ne` or `not`, any other id would mean everyone."""
    known = fields.batch_ids if kind == "batch" else fields.import_ids
    known_id = value.lower() if isinstance(value, str) else ""
    if known_id not in known:
        raise QueryError(f"{place}: there is no {kind} with the id {quoted(value)}")
    return known_id


def _check_text(value: Any, column: Column, operator: str, place: str) -> str | int | float | bool:
    """Return a text, or a number, which compares numbers. Refuse what would compare something else than it says."""
    if operator == "contains":
        if isinstance(value, bool) or not str(value).strip():
            raise QueryError(f"{place} must be a text that is not blank")
        return as_text(value)
    if operator in ORDER and isinstance(value, bool):
        raise QueryError(f"{place} must be a text or a number")
    if operator in ORDER and isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        raise QueryError(
            f'{place} is a number in quotes, and as texts "9" is after "10": write {value.strip()} without'
        )
    if not isinstance(value, str | bool):
        _check_amount(value, RANGES["numeric"], column, place)
    return cast("str | int | float | bool", value)


def _check_other(value: Any, column: Column, operator: str, place: str) -> str:
    return as_text(_check_text(value, column, operator, place))


def _check_integer(value: Any, column: Column, operator: str, place: str) -> int:
    lowest, highest = RANGES[column.type]
    text = as_text(value).strip()
    is_whole = not isinstance(value, bool) and (NUMBER.fullmatch(text) or isinstance(value, float))
    number = Decimal(text) if is_whole else Decimal("0.5")
    if number != int(number) or not lowest <= number <= highest:
        raise QueryError(
            f"{place}: {quoted(value)} does not fit: {quoted(column.name)} has whole numbers "
            f"from {int(lowest)} to {int(highest)}"
        )
    return int(number)


def _check_number(value: Any, column: Column, operator: str, place: str) -> int | float | str:
    if isinstance(value, bool) or (isinstance(value, str) and not NUMBER.fullmatch(value.strip())):
        raise QueryError(f"{place}: {quoted(value)} is no number, such as 12.5; {quoted(column.name)} is a number")
    _check_amount(value, RANGES[column.type], column, place)
    return value.strip() if isinstance(value, str) else cast("int | float", value)


def _check_amount(value: str | float, bounds: tuple[float, float], column: Column, place: str) -> None:
    amount = abs(Decimal(as_text(value).strip()))
    if amount and not Decimal(bounds[0]) <= amount <= Decimal(bounds[1]):
        raise QueryError(f"{place}: the number is outside the range of {quoted(column.name)}")


def _check_boolean(value: Any, column: Column, operator: str, place: str) -> bool:
    if not isinstance(value, bool) and value not in ("true", "false"):
        raise QueryError(f"{place} must be true or false: {quoted(column.name)} is a boolean")
    return value in (True, "true")


def _check_date(value: Any, column: Column, operator: str, place: str) -> str:
    if not is_date(value):
        raise QueryError(f"{place}: {quoted(value)} is no date, such as 2026-01-31; {quoted(column.name)} is a date")
    return cast(str, value)


def _check_time(value: Any, column: Column, operator: str, place: str) -> str:
    """Return a date, or a time: with its offset exactly if the column has one; else it would be some other time."""
    if is_date(value):
        return cast(str, value)
    has_zone = column.kind == "timestamptz"
    example = "2026-01-31T09:00:00+01:00" if has_zone else "2026-01-31T09:00:00"
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) and TIME.fullmatch(value) else None
        if moment is None or (moment.tzinfo is not None) != has_zone:
            raise ValueError
        return moment.astimezone(UTC).isoformat() if has_zone else moment.isoformat()
    except (ValueError, OverflowError):
        raise QueryError(
            f"{place}: {quoted(value)} is no date and no time of this column: write 2026-01-31, or {example}"
        ) from None


def _check_uuid(value: Any, column: Column, operator: str, place: str) -> str:
    try:
        return str(uuid.UUID(str(value)))
    except ValueError:
        raise QueryError(f"{place}: {quoted(value)} is no UUID; {quoted(column.name)} is one") from None


def _check_label(value: Any, column: Column, operator: str, place: str) -> str:
    if value not in column.labels:
        raise QueryError(f"{place}: {quoted(column.name)} is one of {listed(column.labels)}")
    return cast(str, value)


def _check_prefix(value: Any, column: Column, operator: str, place: str) -> str:
    """Return the beginning of a number without punctuation, or of an e-mail address in lower case."""
    prefix = value.strip().lower() if isinstance(value, str) else ""
    if not re.search("[a-z@]", prefix):
        prefix = re.sub("[ ().-]", "", prefix)
    if not re.fullmatch(r"\+?[0-9]+|[^\s\x00-\x1f\x7f]*[a-z@][^\s\x00-\x1f\x7f]*", prefix):
        raise QueryError(f'{place} must be the beginning of a number or an e-mail address, such as "+49"')
    return prefix


def is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and DATE.fullmatch(value) is not None and bool(date.fromisoformat(value))
    except ValueError:
        return False


def as_text(value: str | float | bool) -> str:
    """Return a JSON value as PostgreSQL reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


CHECKS: dict[Kind, Callable[[Any, Column, str, str], Any]] = {
    "text": _check_text,
    "json": _check_text,
    "integer": _check_integer,
    "number": _check_number,
    "boolean": _check_boolean,
    "date": _check_date,
    "timestamp": _check_time,
    "timestamptz": _check_time,
    "uuid": _check_uuid,
    "enum": _check_label,
    "other": _check_other,
    "handle kind": _check_label,
    "handle prefix": _check_prefix,
}


def quoted(value: object) -> str:
    """Return a value for a message, shortened."""
    text = json.dumps(db.replace_unstorable(str(value)), ensure_ascii=False)
    return text if len(text) <= 60 else f'{text[:56]}…"'


def listed(words: Iterable[str]) -> str:
    return ", ".join(quoted(word) for word in list(words)[:20])
