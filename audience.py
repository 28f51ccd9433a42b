"""Parse an audience (a JSON document), and compile it to a condition over the columns that `clients` has.

Used by composing and by the dispatcher's last check; reads clients, contact_relationships, outreach_batches,
outreach_batch_items, outreach_imports and outreach_import_people, and writes nothing. The caller searches in a READ
ONLY transaction with a statement time-out of 5 seconds: a condition over a million clients may take seconds, but must
not hold up the tables. Example:

    fields = audience.read_fields(quinn)
    query = audience.parse({"v": 1, "where": {"field": "city", "eq": "Berlin"}}, fields)
    where, params = audience.condition(query, fields)    # over `FROM clients AS client`

What a document is:

    query = {"v": 1, "where": node, "limit"?: n}
    node  = {"all": [node, ...]} | {"any": [node, ...]} | {"not": node} | {"everyone": true} | leaf
    leaf  = {"field": F, OP: value}      with one OP of the table OPERATORS

client_fields.py says which fields there are. The normalised document writes a key of `attributes` as `attributes.KEY`,
so that a column which is removed later is an error, and no key that nobody has.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2.extensions
from psycopg2 import sql

import db
from client_fields import (
    ORDER,
    Column,
    Fields,
    Kind,
    QueryError,
    as_text,
    check_value,
    field_names,
    find_field,
    is_date,
    listed,
    quoted,
    read_columns,
    read_fields,
)

__all__ = ["Fields", "QueryError", "condition", "field_names", "identifier", "matching", "parse", "read_fields"]

MAX_DEPTH = 5  # nodes inside each other
MAX_LEAVES = 50
MAX_VALUES = 1000  # in all leaves together
MAX_BYTES = 16 * 1024  # of the document as compact JSON
MAX_DAYS = 36_500
MAX_LIMIT = 2**31 - 1
MAX_LISTED = 60  # fields in one message
VERSION = 1

COMPARISONS = {"eq": "=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
DAYS = ("before_days", "within_days")
OPERATORS: dict[Kind, tuple[str, ...]] = {
    "text": ("eq", "ne", *ORDER, "in", "contains", "empty", *DAYS),
    "json": ("eq", "ne", *ORDER, "in", "contains", "empty", *DAYS),
    "integer": ("eq", "ne", *ORDER, "in", "empty"),
    "number": ("eq", "ne", *ORDER, "in", "empty"),
    "boolean": ("eq", "ne", "in", "empty"),
    "date": ("eq", "ne", *ORDER, "in", "empty", *DAYS),
    "timestamp": ("eq", "ne", *ORDER, "in", "empty", *DAYS),
    "timestamptz": ("eq", "ne", *ORDER, "in", "empty", *DAYS),
    "uuid": ("eq", "ne", "in", "empty"),
    "enum": ("eq", "ne", *ORDER, "in", "empty"),
    "other": ("eq", "ne", "in", "contains", "empty"),  # compared as text
    "handle kind": ("eq", "ne", "in", "empty"),
    "handle prefix": ("eq", "ne", "in", "empty"),
    "batch": ("eq", "ne", "in"),
    "import": ("eq", "ne", "in"),
}
LIST_OPERATORS = ("contains", "in", "empty")  # of a column that is an array
ALL_OPERATORS = ("eq", "ne", *ORDER, "in", "contains", "empty", *DAYS)

NOW: dict[Kind, str] = {"timestamp": "LOCALTIMESTAMP", "timestamptz": "now()"}  # any other: CURRENT_DATE
# A number in a text, in SQL. It guards a cast, in a CASE: the cast never meets a row whose text does not fit. No
# bounded repetition such as {1,100}: it takes ten times as long.
SQL_IS_NUMBER = r"{text} ~ '^\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)\s*$' AND length({text}) <= 100"
# A text that begins with a date. Ten characters are compared as text, because a cast of 2026-02-30 would fail.
SQL_IS_DATE = r"{text} ~ '^[0-9]{{4}}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])([T ]|$)'"
# A text that shows something: it has a character for which values.is_blank() is false. \s differs between locales.
SQL_NOT_BLANK = (
    r"'[^\s\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180e\u2000-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]'"
)

BATCH_ITEMS = "SELECT client_id, batch_id, status FROM outreach_batch_items"
IMPORT_PEOPLE = "SELECT client_id, import_id FROM outreach_import_people"
PUNCTUATION = "[ ().-]*"  # which people write inside numbers


# --- parsing ------------------------------------------------------------------------------------------


def parse(query: object, fields: Fields) -> dict[str, Any]:
    """Check an audience strictly and return it normalised. Raises QueryError.

    A value is checked against the type of its field, so that PostgreSQL cannot refuse it later.
    """
    return _Parser(fields).document(query)


class _Parser:
    """Check one document, and count what it contains. `place` is where a part of it is, such as `where.all[1].not`."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.leaves = 0
        self.values = 0

    def document(self, query: object) -> dict[str, Any]:
        document = _object(query, "the query")
        _known_keys(document, {"v", "where", "limit"}, "the query")
        if "where" not in document:
            raise QueryError('the query has no "where": for everyone, write {"v": 1, "where": {"everyone": true}}')
        if document.get("v") is True or document.get("v") != VERSION or isinstance(document["v"], float):
            raise QueryError('the query\'s "v" must be 1, the version of this format')
        result: dict[str, Any] = {"v": VERSION, "where": self.node(document["where"], "where", 1)}
        if "limit" in document:
            result["limit"] = _whole(document["limit"], "limit", 1, MAX_LIMIT)
        size = len(json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode())
        if size > MAX_BYTES:
            raise QueryError(f"the query has {size:,} bytes: at most {MAX_BYTES:,} are allowed")
        return result

    def node(self, node: object, place: str, depth: int) -> dict[str, Any]:
        content = _object(node, place)
        if depth > MAX_DEPTH:
            raise QueryError(f"{place}: at most {MAX_DEPTH} nodes may be inside each other")
        if "field" in content:
            return self.leaf(content, place)
        if len(content) != 1 or not content.keys() <= {"all", "any", "not", "everyone"}:
            raise QueryError(
                f'{place} must have one of "all", "any", "not" and "everyone", or "field" and an operator; '
                f"it has {listed(content) or 'nothing'}"
            )
        [(key, value)] = content.items()
        inner = f"{place}.{key}"
        if key == "not":
            return {"not": self.node(value, inner, depth + 1)}
        if key == "everyone":
            self.count_leaf(place)
            if value is not True:
                raise QueryError(f'{place}: "everyone" must be true')
            return {"everyone": True}
        if not isinstance(value, list) or not value:
            raise QueryError(f"{inner} must be a list with at least one node; an empty one does not mean everyone")
        return {key: [self.node(child, f"{inner}[{i}]", depth + 1) for i, child in enumerate(value)]}

    def leaf(self, leaf: dict[str, Any], place: str) -> dict[str, Any]:
        self.count_leaf(place)
        name = leaf["field"]
        operators = [key for key in leaf if key != "field"]
        _known_keys(leaf, {"field", *ALL_OPERATORS}, place)
        if not isinstance(name, str):
            raise QueryError(f"{place}.field must be a text, the name of a field")
        if len(operators) != 1:
            raise QueryError(
                f"{place} must have one operator, and has {listed(operators) or 'none'}: "
                f"use one of {listed(ALL_OPERATORS)}"
            )
        column = self.column(name, place)
        [operator] = operators
        allowed = LIST_OPERATORS if column.is_array else OPERATORS[column.kind]
        if operator not in allowed:
            raise QueryError(
                f'{place}: the field "{name}" is {_described(column)}, and "{operator}" cannot be used with it; '
                f"use {listed(allowed)}"
            )
        value = self.value(leaf[operator], column, operator, f"{place}.{operator}")
        return {"field": f"attributes.{column.name}" if column.is_key else column.name, operator: value}

    def count_leaf(self, place: str) -> None:
        self.leaves += 1
        if self.leaves > MAX_LEAVES:
            raise QueryError(f"{place}: at most {MAX_LEAVES} conditions are allowed")

    def column(self, name: str, place: str) -> Column:
        """Return the field of this name. Raises QueryError, which lists all fields, if nobody has it."""
        column = find_field(name, self.fields)
        if column is None or (column.is_key and column.name not in self.fields.attribute_keys):
            names = field_names(self.fields)
            near = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {quoted(near[0])}?" if near else ""
            rest = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            listed = ", ".join(names[:MAX_LISTED])
            raise QueryError(f"{place}: there is no field {quoted(name)}.{hint} The fields are: {listed}{rest}")
        return column

    def value(self, value: object, column: Column, operator: str, place: str) -> Any:
        self.values += len(value) if isinstance(value, list) else 1
        if self.values > MAX_VALUES:
            raise QueryError(f"{place}: at most {MAX_VALUES:,} values are allowed")
        if operator == "empty":
            if not isinstance(value, bool):
                raise QueryError(f"{place} must be true or false")
            return value
        if operator in DAYS:
            return _whole(value, place, 0, MAX_DAYS)
        if operator == "in":
            if not isinstance(value, list) or not value:
                raise QueryError(f"{place} must be a list with at least one value")
            return [check_value(item, column, self.fields, operator, f"{place}[{i}]") for i, item in enumerate(value)]
        return check_value(value, column, self.fields, operator, place)


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise QueryError(f'{place} must be a JSON object that is not empty; for everyone, write {{"everyone": true}}')
    return value


def _known_keys(value: dict[str, Any], known: set[str], place: str) -> None:
    if unknown := [key for key in value if key not in known]:
        raise QueryError(f"{place} has {listed(unknown)}, which is unknown here: use {listed(sorted(known))}")


def _whole(value: object, place: str, lowest: int, highest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise QueryError(f"{place} must be a whole number from {lowest:,} to {highest:,}")
    return value


def _described(column: Column) -> str:
    """Return what a field is, for a message."""
    kinds = {
        "json": "JSON",
        "enum": "an enum",
        "other": "of a type that is compared as text",
        "batch": "a batch's id",
        "import": "an import's id",
    }
    described = kinds.get(column.kind, f"a {column.kind}").replace("a integer", "a whole number")
    described = described.replace("timestamptz", "time").replace("timestamp", "time")
    return f"a list ({described})" if column.is_array else described


# --- compiling ----------------------------------------------------------------------------------------


def condition(query: dict[str, Any], fields: Fields) -> tuple[sql.Composable, dict[str, Any]]:
    """Compile a parsed audience to a boolean over `FROM clients AS client`, and its parameters (`audience_0`, …).

    `limit` is the caller's. Run it with the parameters also if they are empty: a `%` in an identifier is doubled.
    Raises QueryError if a column has gone since the audience was parsed.
    """
    return _compile(query, fields, is_for_few=False)


def matching(
    quinn: psycopg2.extensions.connection,
    query: dict[str, Any],
    client_ids: Sequence[str],
    fields: Fields | None = None,
) -> set[str]:
    """Return those of the clients that match a parsed audience now; its `limit` does not count.

    `fields`: the columns, if they were just read. Raises QueryError if a column has gone since the audience was parsed.
    """
    fields = fields or read_columns(quinn)
    where, params = _compile(query, fields, is_for_few=True)
    statement = sql.SQL("""
        SELECT client.id::text
          FROM clients AS client
         WHERE client.id = ANY (%(client_ids)s::text[]::{key_type}[]) AND {where}
    """).format(key_type=_raw(fields.key_type), where=where)
    rows = db.query(quinn, statement.as_string(quinn), {**params, "client_ids": list(client_ids)})
    return {client_id for (client_id,) in rows}


def _compile(query: dict[str, Any], fields: Fields, is_for_few: bool) -> tuple[sql.Composable, dict[str, Any]]:
    compiler = _Compiler(fields, is_for_few)
    where, _ = compiler.node(query["where"])
    return where, compiler.params


class _Compiler:
    """Compile one audience; collect its parameters.

    For a few clients, OFFSET 0 keeps each EXISTS a look-up for each of them. Without it, the planner may join all
    handles or all items, which takes a second for a million.
    """

    def __init__(self, fields: Fields, is_for_few: bool) -> None:
        self.fields = fields
        self.offset = sql.SQL(" OFFSET 0" if is_for_few else "")
        self.params: dict[str, Any] = {}

    def node(self, node: dict[str, Any]) -> tuple[sql.Composable, bool]:
        """Return the SQL of a node, and whether it can be NULL.

        `not` needs COALESCE only for what can be NULL. Without it, the planner can join a NOT EXISTS; with it, it
        would run the EXISTS once for each client.
        """
        if "everyone" in node:
            return sql.SQL("true"), False
        if "not" in node:
            inner, can_be_null = self.node(node["not"])
            form = "NOT COALESCE({}, false)" if can_be_null else "NOT {}"
            return sql.SQL(form).format(inner), False
        for key, word in (("all", " AND "), ("any", " OR ")):
            if key in node:
                parts = [self.node(child) for child in node[key]]
                joined = sql.SQL(word).join([part for part, _ in parts])
                return sql.SQL("({})").format(joined), any(can_be_null for _, can_be_null in parts)
        [(operator, value)] = [(key, value) for key, value in node.items() if key != "field"]
        column = find_field(node["field"], self.fields)
        if column is None or (column.is_key and not node["field"].startswith("attributes.")):
            raise QueryError(f"clients has no column {quoted(node['field'])} any more")
        if column.source:
            return self.outreach(column, operator, value), False
        return sql.SQL("({})").format(self.client(column, operator, value)), True

    def add(self, value: Any) -> sql.Composable:
        """Add a parameter, as text; return its place in the statement."""
        name = f"audience_{len(self.params)}"
        self.params[name] = [as_text(item) for item in value] if isinstance(value, list) else as_text(value)
        return sql.Placeholder(name)

    def client(self, column: Column, operator: str, value: Any) -> sql.Composable:
        """Return a leaf over a column or a key of `attributes`."""
        if column.is_key:
            whole: sql.Composable = sql.SQL("(client.attributes -> {}::text)").format(self.add(column.name))
        else:
            whole = sql.SQL("client.{}").format(identifier(column.name))
        if column.is_array:
            return self.array(column, whole, operator, value)
        if column.kind == "json":
            return self.json_value(column, whole, operator, value)
        if column.kind == "other":
            whole = _as_written(whole)
        elif column.kind == "text" and column.type == "text":
            whole = sql.SQL("{}::text").format(whole)
        if column.needs_collation:
            whole = sql.SQL('{} COLLATE "default"').format(whole)
        return self.scalar(column, whole, operator, value)

    def scalar(self, column: Column, expression: sql.Composable, operator: str, value: Any) -> sql.Composable:
        """Return a leaf over an expression of the column's type."""
        if operator == "empty":
            found = sql.SQL("{} IS NOT NULL" if column.kind not in ("text", "json") else "{} ~ {}")
            filled = found.format(expression, sql.SQL(SQL_NOT_BLANK))
            return sql.SQL("NOT COALESCE({}, false)" if value else "COALESCE({}, false)").format(filled)
        if operator == "contains":
            return self.like(expression, f"%{_escaped(value)}%")
        if operator in DAYS:
            return self.days(column, expression, operator, value)
        if operator == "in":
            return self.any_of(column, expression, value)
        seen, cast_to = _view(column, expression, operator, value)
        form = "{} IS DISTINCT FROM {}::{}" if operator == "ne" else f"{{}} {COMPARISONS[operator]} {{}}::{{}}"
        return sql.SQL(form).format(seen, self.add(value), _raw(cast_to))

    def any_of(self, column: Column, expression: sql.Composable, values: list[Any]) -> sql.Composable:
        """Return whether one of the values is equal. Numbers, dates and texts among them are compared each as such."""
        groups: dict[str, tuple[sql.Composable, list[Any]]] = {}
        for value in values:
            seen, cast_to = _view(column, expression, "in", value)
            groups.setdefault(cast_to, (seen, []))[1].append(value)
        parts = [
            sql.SQL("{} = ANY ({}::text[]::{}[])").format(seen, self.add(group), _raw(cast_to))
            for cast_to, (seen, group) in groups.items()
        ]
        return sql.SQL("({})").format(sql.SQL(" OR ").join(parts))

    def like(self, expression: sql.Composable, pattern: str) -> sql.Composable:
        """Return whether a text matches a pattern in any case.

        In a database with the locale C, PostgreSQL folds only ASCII: therefore three forms of a pattern with umlauts.
        """
        patterns = [pattern] if pattern.isascii() else sorted({pattern, pattern.lower(), pattern.upper()})
        return sql.SQL("{}::text ILIKE ANY ({}::text[])").format(expression, self.add(patterns))

    def days(self, column: Column, expression: sql.Composable, operator: str, days: int) -> sql.Composable:
        """Return whether a time is over so many days ago, or within the last so many days; a future one is neither."""
        now: sql.Composable = sql.SQL(NOW.get(column.kind, "CURRENT_DATE"))
        before: sql.Composable = sql.SQL("({} - make_interval(days => {}::integer))").format(now, self.add(days))
        if column.kind in ("text", "json"):
            expression = _as_date(expression)
            now, before = (sql.SQL("(SELECT to_char({}, 'YYYY-MM-DD'))").format(moment) for moment in (now, before))
        form = "{} < {}" if operator == "before_days" else "{} BETWEEN {} AND {}"
        return sql.SQL(form).format(expression, before, now)

    def array(self, column: Column, whole: sql.Composable, operator: str, value: Any) -> sql.Composable:
        """Return a leaf over an array: it has an element that is equal (`contains`: in any case), or it has none."""
        if operator == "empty":
            filled = sql.SQL("cardinality({}) > 0").format(whole)
            return sql.SQL("NOT COALESCE({}, false)" if value else "COALESCE({}, false)").format(filled)
        element: sql.Composable = sql.SQL("element.value")
        if column.kind == "other":
            element = _as_written(element)
        elif column.type == "text":
            element = sql.SQL("({} #>> '{{}}')" if column.kind == "json" else "{}::text").format(element)
        if column.needs_collation:
            element = sql.SQL('{} COLLATE "default"').format(element)
        found = self.element(column, element, operator, value)
        return sql.SQL("EXISTS (SELECT FROM unnest({}) AS element (value) WHERE {})").format(whole, found)

    def element(self, column: Column, element: sql.Composable, operator: str, value: Any) -> sql.Composable:
        """Return whether an element is equal to the value (or to one of them)."""
        if operator == "contains" and column.kind in ("text", "json", "other"):
            return self.like(element, _escaped(value))
        return self.scalar(column, element, "eq" if operator == "contains" else operator, value)

    def json_value(self, column: Column, whole: sql.Composable, operator: str, value: Any) -> sql.Composable:
        """Return a leaf over JSON: a scalar as its text; `contains` and `in` also look into a list and an object."""
        text = sql.SQL("({} #>> '{{}}')").format(whole)
        if operator == "empty":
            form = sql.SQL("{} NOT IN ('[]', '{{}}') AND {} ~ {}")
            filled = form.format(whole, text, sql.SQL(SQL_NOT_BLANK))
            return sql.SQL("NOT COALESCE({}, false)" if value else "COALESCE({}, false)").format(filled)
        scalar = self.scalar(column, text, operator, value)
        if operator not in ("contains", "in"):
            return scalar
        element = self.element(column, sql.SQL("element.value"), operator, value)
        return sql.SQL("""
            CASE jsonb_typeof({whole})
                 WHEN 'array' THEN EXISTS (SELECT FROM jsonb_array_elements_text({whole}) AS element (value)
                                            WHERE {element})
                 WHEN 'object' THEN EXISTS (SELECT FROM jsonb_each_text({whole}) AS element (key, value)
                                             WHERE {element})
                 ELSE {scalar} END
        """).format(whole=whole, element=element, scalar=scalar)

    def outreach(self, column: Column, operator: str, value: Any) -> sql.Composable:
        """Return a leaf over outreach's own tables: EXISTS of a row with such a value, or NOT EXISTS of another one.

        A client without a row has no value, and a count of 0. The row that is looked for is never NULL, so both forms
        are exact, and the planner can join them.
        """
        if column.kind == "batch":
            rows, found = BATCH_ITEMS, self.batch(column, value)
            is_opposite = operator == "ne"
        elif column.kind == "import":
            rows, found = IMPORT_PEOPLE, self.is_imported(value)
            is_opposite = operator == "ne"
        else:
            rows, found = column.source, self.outreach_value(column, operator, value)
            is_opposite = _matches_nothing(column, operator, value)
            if is_opposite:
                found = sql.SQL("NOT ({})").format(found)
        return sql.SQL("{}EXISTS (SELECT FROM ({}) AS found WHERE found.client_id = client.id AND {}{})").format(
            sql.SQL("NOT " if is_opposite else ""), sql.SQL(rows), found, self.offset
        )

    def batch(self, column: Column, value: Any) -> sql.Composable:
        """Return whether an item is of one of the batches, and has the status that the field names."""
        return sql.SQL("found.status = {} AND found.batch_id = ANY ({}::text[]::uuid[])").format(
            sql.Literal(column.source), self.add(value if isinstance(value, list) else [value])
        )

    def is_imported(self, value: Any) -> sql.Composable:
        """Return whether a person was in one of the imported files."""
        ids = value if isinstance(value, list) else [value]
        return sql.SQL("found.import_id = ANY ({}::text[]::uuid[])").format(self.add(ids))

    def outreach_value(self, column: Column, operator: str, value: Any) -> sql.Composable:
        """Return whether a row of the field's source matches."""
        if operator == "empty":
            return sql.SQL("false" if value else "true")
        if column.kind in HANDLE_PATTERNS:
            make_pattern = HANDLE_PATTERNS[column.kind]
            patterns = "|".join(make_pattern(item) for item in (value if isinstance(value, list) else [value]))
            # On the bare column: only so can the planner estimate from its statistics how many handles match.
            form = "found.handle !~* {}" if operator == "ne" else "found.handle ~* {}"
            return sql.SQL(form).format(self.add(patterns))
        return self.scalar(column, sql.SQL("found.value"), operator, value)


def _prefix_pattern(prefix: str) -> str:
    """Return a regular expression for handles with this beginning; a number may have punctuation between its digits."""
    if re.search("[a-z@]", prefix):
        return r"^\s*" + re.sub(r"([^\w@])", r"\\\1", prefix)
    return "^" + "".join(PUNCTUATION + (r"\+" if character == "+" else character) for character in prefix)


HANDLE_PATTERNS: dict[Kind, Callable[[str], str]] = {
    "handle kind": lambda kind: "@" if kind == "email" else "^[^@]*$",
    "handle prefix": _prefix_pattern,
}


def _matches_nothing(column: Column, operator: str, value: Any) -> bool:
    """Return whether a client of whom outreach has no row matches."""
    if operator == "ne":
        return column.name != "sent_count" or value != 0
    if operator == "empty":
        return value is True
    if column.name != "sent_count":
        return False
    if operator == "in":
        return any(item == 0 for item in value)
    is_true: dict[str, bool] = {
        "eq": value == 0,
        "lt": value > 0,
        "lte": value >= 0,
        "gt": value < 0,
        "gte": value <= 0,
    }
    return is_true[operator]


def _view(column: Column, expression: sql.Composable, operator: str, value: Any) -> tuple[sql.Composable, str]:
    """Return how to see an expression beside this value, and the type of both.

    - a time beside a date: as its day
    - a text beside a number: as a number, and beside a date in order: as a date; NULL if it is none
    """
    if column.kind in ("timestamp", "timestamptz") and is_date(value):
        return sql.SQL("({})::date").format(expression), "date"
    if column.kind in ("text", "json"):
        if not isinstance(value, str | bool):
            return _as_number(expression), "numeric"
        if operator in ORDER and is_date(value):
            return _as_date(expression), "text"
    return expression, column.type


def _as_written(expression: sql.Composable) -> sql.Composable:
    """Return a value of any type as PostgreSQL prints it. A cast would print 10.0.0.1 as 10.0.0.1/32."""
    return sql.SQL("CASE WHEN {value} IS NOT NULL THEN format('%%s', {value}) END").format(value=expression)


def _as_number(text: sql.Composable) -> sql.Composable:
    return sql.SQL(f"CASE WHEN {SQL_IS_NUMBER} THEN {{text}}::text::numeric END").format(text=text)


def _as_date(text: sql.Composable) -> sql.Composable:
    form = f'(CASE WHEN {SQL_IS_DATE} THEN left({{text}}::text, 10) END COLLATE "C")'
    return sql.SQL(form).format(text=text)


def identifier(name: str) -> sql.Composable:
    """Quote a name. psycopg2 takes a `%` in a statement for a parameter."""
    return sql.Identifier(name.replace("%", "%%"))


def _raw(text: str) -> sql.Composable:
    """Return SQL of this file or of the catalogue (a type as format_type quotes it)."""
    return sql.SQL(text.replace("%", "%%"))


def _escaped(text: str) -> str:
    """Escape what LIKE takes for a wildcard."""
    return re.sub(r"([\\%_])", r"\\\1", text)
