"""Turn an audience into rows of a form and back, and offer the columns and values that there really are.

Used by the owner's page. Reads clients, outreach_batches and outreach_imports. A row is a field, an operator and a
value as somebody types it. An audience that rows cannot express (a `not`, an `any` inside an `all`) has no rows: the
page shows it as JSON. Example:

    fields = audience.read_fields(quinn)
    audience_rows.to_query("all", [Row("city", "eq", "Berlin")], fields)  # {"v": 1, "where": {"all": [...]}}
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from psycopg2 import sql

import audience
import db
from client_fields import NUMBER, OUTREACH_FIELDS, Column, Fields, QueryError, as_text, field_names, find_field

MAX_ROWS = 50  # audience.MAX_LEAVES
MAX_CHOICES = 50  # values of one field that are offered
COUNTED_CLIENTS = 20_000  # more are not counted, because the page must not wait
LONGEST_CHOICE = 100  # characters

# What an operator is called, and the one of the audience that it stands for. `filled` is `empty` with false.
OPERATORS = {
    "eq": "is",
    "ne": "is not",
    "in": "is one of",
    "contains": "contains",
    "lt": "is less than",
    "lte": "is at most",
    "gt": "is more than",
    "gte": "is at least",
    "within_days": "is within the last … days",
    "before_days": "is more than … days ago",
    "empty": "has no value",
    "filled": "has a value",
}
TIME_OPERATORS = {"lt": "is before", "lte": "is at or before", "gt": "is after", "gte": "is at or after"}
TIMES = ("date", "timestamp", "timestamptz")
# Control characters, and what turns the direction of a line: a name or a value with them is not offered.
ODD = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
WITHOUT_VALUE = ("empty", "filled")
DAYS = ("within_days", "before_days")
LABELS = {
    "handle.kind": "kind of address (phone or email)",
    "handle.prefix": "address begins with",
    "batch.sent": "got the batch",
    "batch.failed": "failed in the batch",
    "batch.skipped": "was skipped in the batch",
    "import.id": "was in the file",
    "last_sent": "last message sent",
    "sent_count": "number of messages sent",
    "last_failed": "last message failed",
}
CLOSED = ("enum", "boolean", "handle kind", "batch", "import")  # kinds with values to choose from, and no others
PLACE = re.compile(r"where(?:\.(?:all|any)\[(\d+)\])?[\w.\[\]]*(:?) ")


class Row(NamedTuple):
    """One condition as it stands in the form."""

    field: str
    operator: str
    value: str = ""


class Choice(NamedTuple):
    """A value that is offered. `people`: how many clients have it; None if they were not counted."""

    value: str
    label: str
    people: int | None = None


class FieldChoice(NamedTuple):
    name: str
    label: str
    group: str


class RowError(ValueError):
    """A row that cannot be used. `row`: its number from 0; None for the whole audience."""

    def __init__(self, row: int | None, message: str) -> None:
        super().__init__(message)
        self.row = row


# --- rows and the audience ----------------------------------------------------------------------------


def to_query(mode: str, rows: Sequence[Row], fields: Fields) -> dict[str, Any]:
    """Return the audience of these rows, normalised. `mode`: all or any. Raises RowError, which names the row."""
    if not rows:
        raise RowError(None, "Say who is meant: add a condition, or choose everyone.")
    leaves = [_leaf(number, row, fields) for number, row in enumerate(rows)]
    try:
        return audience.parse({"v": audience.VERSION, "where": {mode: leaves}}, fields)
    except QueryError as error:
        raise _row_error(str(error)) from None


def _row_error(text: str) -> RowError:
    """Return the error of an audience at its row. The place in the document, `where.all[1].eq`, says nothing there."""
    match = PLACE.match(text)
    if match is None:
        return RowError(None, text)
    rest = text[match.end() :]
    return RowError(int(match[1]) if match[1] else None, rest if match[2] else f"the value {rest}")


def _leaf(number: int, row: Row, fields: Fields) -> dict[str, Any]:
    """Return the leaf of a row. Raises RowError if something is missing in it."""
    if not row.field:
        raise RowError(number, "Choose what to compare, or remove this condition.")
    column = find_field(row.field, fields)
    allowed = dict(operator_choices(row.field, fields))
    if row.operator not in allowed:
        raise RowError(number, f"That comparison does not fit here. Choose one of: {', '.join(allowed.values())}.")
    if row.operator in WITHOUT_VALUE:
        return {"field": row.field, "empty": row.operator == "empty"}
    value = row.value.strip()
    if not value:
        raise RowError(number, "Type a value, or choose “has no value”.")
    if row.operator in DAYS:
        if not re.fullmatch("[0-9]{1,9}", value):
            raise RowError(number, "Type a number of days, such as 30.")
        return {"field": row.field, row.operator: int(value)}
    if row.operator == "in":
        values = [part.strip() for part in value.split(",") if part.strip()]
        return {"field": row.field, "in": values}
    is_text = column is None or column.kind in ("text", "json")
    if row.operator in ("lt", "lte", "gt", "gte") and is_text and NUMBER.fullmatch(value):
        return {"field": row.field, row.operator: _number(value)}
    return {"field": row.field, row.operator: value}


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() and "." not in text and abs(number) < 2**53 else number


def from_query(query: object, fields: Fields) -> tuple[str, list[Row]] | None:
    """Return the mode (all, any or everyone) and the rows of an audience; None if rows cannot express it."""
    try:
        wanted = audience.parse(query, fields)
    except QueryError:
        return None
    where = wanted["where"]
    if "everyone" in where:
        return "everyone", []
    mode = next((key for key in ("all", "any") if key in where), "all")
    nodes = where.get(mode, [where])
    if not all("field" in node and not ODD.search(node["field"]) for node in nodes):
        return None
    rows = [_row(node) for node in nodes]
    # A value that a row would read as another one, such as a text with a comma in a list: no row can express it.
    try:
        again = to_query(mode, rows, fields)
    except RowError:
        return None
    return (mode, rows) if again["where"][mode] == nodes else None


def _row(leaf: dict[str, Any]) -> Row:
    [(operator, value)] = [(key, value) for key, value in leaf.items() if key != "field"]
    if operator == "empty":
        return Row(leaf["field"], "empty" if value else "filled")
    text = ", ".join(as_text(part) for part in value) if isinstance(value, list) else as_text(value)
    return Row(leaf["field"], operator, text)


# --- what there is to choose from ---------------------------------------------------------------------


def field_choices(fields: Fields) -> list[FieldChoice]:
    """Return the fields, grouped: what is known of a person, and what was sent."""
    chosen = []
    for name in field_names(fields):
        if name in OUTREACH_FIELDS:
            chosen.append(FieldChoice(name, LABELS.get(name, name), "What was sent, and how"))
        elif name not in ("id", "attributes") and not ODD.search(name):
            label = name.removeprefix("attributes.").replace("_", " ")
            # The normalised audience writes a key of `attributes` so.
            is_key = name not in fields.columns and not name.startswith("attributes.")
            chosen.append(FieldChoice(f"attributes.{name}" if is_key else name, label, "What you know of them"))
    return sorted(chosen, key=lambda choice: choice.group, reverse=True)


def operator_choices(name: str, fields: Fields) -> list[tuple[str, str]]:
    """Return the operators of a field and their words; all of them as long as no field is chosen."""
    column = find_field(name, fields) if name else None
    if column is None:
        return list(OPERATORS.items())
    allowed = audience.LIST_OPERATORS if column.is_array else audience.OPERATORS[column.kind]
    words = OPERATORS | (TIME_OPERATORS if column.kind in TIMES else {})
    found = [(operator, word) for operator, word in words.items() if operator in allowed]
    return [*found, ("filled", OPERATORS["filled"])] if "empty" in allowed else found


def is_closed(name: str, operator: str, fields: Fields) -> bool:
    """Return whether a value is chosen from a list, and not typed."""
    column = find_field(name, fields) if name else None
    return column is not None and column.kind in CLOSED and not column.is_array and operator != "in"


def values(quinn: Any, name: str, fields: Fields) -> list[Choice]:
    """Return the values that clients have in a field, the most frequent first."""
    column = find_field(name, fields) if name else None
    if column is None:
        return []
    if column.kind == "batch":
        return _batches(quinn)
    if column.kind == "import":
        return _imports(quinn)
    if column.kind == "boolean":
        return [Choice("true", "yes"), Choice("false", "no")]
    if column.kind in ("enum", "handle kind"):
        return [Choice(label, label) for label in column.labels]
    if column.source or column.is_array or column.kind in ("timestamp", "timestamptz", "uuid", "other"):
        return []
    return _client_values(quinn, column)


def _client_values(quinn: Any, column: Column) -> list[Choice]:
    """Return the values of a column or a key of `attributes`, with their counts if the clients are few."""
    statement = sql.SQL("""
        SELECT value, count(*), (SELECT count(*) FROM (SELECT FROM clients LIMIT %(most)s + 1) AS sample) <= %(most)s
          FROM (SELECT {value} AS value FROM clients AS client LIMIT %(most)s) AS sample
         WHERE btrim(value) <> '' AND length(value) <= %(longest)s
         GROUP BY value
         ORDER BY count(*) DESC, value
         LIMIT %(limit)s
    """)
    if column.is_key:
        key = sql.Literal(column.name.replace("%", "%%"))
        # A list or an object is no value to be chosen.
        form = "CASE WHEN jsonb_typeof(attributes -> {}) NOT IN ('array', 'object') THEN attributes ->> {} END"
        value: sql.Composable = sql.SQL(form).format(key, key)
    elif column.kind == "json":
        return []
    else:
        value = sql.SQL("client.{}::text").format(audience.identifier(column.name))
    parameters = {"most": COUNTED_CLIENTS, "longest": LONGEST_CHOICE, "limit": MAX_CHOICES}
    rows = db.query(quinn, statement.format(value=value).as_string(quinn), parameters)
    return [
        Choice(text, text, count if is_counted else None) for text, count, is_counted in rows if not ODD.search(text)
    ]


def _batches(quinn: Any) -> list[Choice]:
    statement = """
        SELECT id::text,
               COALESCE(NULLIF(btrim(name), ''), 'without a name') || ', ' || to_char(created_at, 'YYYY-MM-DD')
          FROM outreach_batches
         WHERE status <> 'draft'
         ORDER BY created_at DESC
         LIMIT %(limit)s
    """
    return [Choice(*row) for row in db.query(quinn, statement, {"limit": MAX_CHOICES})]


def _imports(quinn: Any) -> list[Choice]:
    statement = """
        SELECT id::text, file || ', ' || to_char(applied_at, 'YYYY-MM-DD HH24:MI'), people
          FROM outreach_imports
         WHERE applied_at IS NOT NULL
         ORDER BY applied_at DESC
         LIMIT %(limit)s
    """
    return [Choice(*row) for row in db.query(quinn, statement, {"limit": MAX_CHOICES})]


def is_date_field(name: str, fields: Fields) -> bool:
    """Return whether a date is typed beside this field."""
    column = find_field(name, fields) if name else None
    return column is not None and column.kind in TIMES
