"""Show what a text would be for some people, while the owner is writing it.

Used by the owner's page. Reads what composing.py reads; writes nothing. A draft checks everybody, which takes 20 s for
100,000 people; a preview checks the first MAX_CHECKED, and counts the others. Example:

    shown = previews.preview(quinn, icloud, request, interval)
"""

import re
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec
from psycopg2 import sql

import audience
import composing
import db
import recipients
import templates

MAX_CHECKED = 500  # people; about 0.2 s
END_OF_TAG = re.compile(r"\s*[}%]\}")

Connection = Any  # psycopg2's connection


class Preview(NamedTuple):
    """What a preview found. `matched`: how many people the audience has; `checked`: how many of them were looked at."""

    matched: int
    checked: int
    found: composing.Found  # a DryRun if there is a text
    forecast: composing.Forecast | None

    @property
    def is_partial(self) -> bool:
        return self.checked < self.matched


class Place(NamedTuple):
    """Where the error of a text is: its line, in three parts. What is wrong ends with the tag or the variable."""

    line: int
    before: str
    wrong: str
    after: str


def preview(quinn: Connection, icloud: Connection, request: composing.Request, interval: timedelta) -> Preview:
    """Return what the first people would get. Raises Refused, as composing.dry_run does."""
    matched = count(quinn, request.query)
    first = {**request.query, "limit": min(matched, MAX_CHECKED) or 1}
    part = msgspec.structs.replace(request, query=first)
    checked = min(matched, MAX_CHECKED)
    if not request.template:
        return Preview(matched, checked, composing.search(quinn, icloud, part), None)
    found = composing.dry_run(quinn, icloud, part, interval, matched)
    return Preview(matched, checked, found, found.forecast)


def count(quinn: Connection, query: dict[str, Any]) -> int:
    """Return how many clients an audience has, with its limit. Raises Refused."""
    statement = sql.SQL("SELECT count(*) FROM (SELECT FROM clients AS client WHERE {} LIMIT %(maximum)s) AS found")
    with composing.refusals(), db.transaction(quinn, "READ COMMITTED", is_read_only=True):
        db.query(quinn, f"SET LOCAL statement_timeout = '{recipients.SEARCH_TIMEOUT}'")
        selection = recipients.read_selection(quinn, query)
        where, parameters = audience.condition(selection.query, selection.fields)
        text = statement.format(where).as_string(quinn)
        rows = db.query(quinn, text, {**parameters, "maximum": selection.query.get("limit")})
    return int(rows[0][0])


def variables(fields: audience.Fields) -> list[str]:
    """Return the variables that a text may have, as they are written in it."""
    names = sorted(recipients.known_variables(fields) - {"id", "attributes"})
    return [f"{{{{ {templates.show_name('client', name)} }}}}" for name in names]


def place(text: str, line: int, column: int) -> Place:
    """Return where in a text an error is, as templates.TemplateError has it."""
    lines = text.split("\n")
    content = lines[line - 1] if line <= len(lines) else ""
    before, rest = content[: column - 1], content[column - 1 :]
    end = END_OF_TAG.search(rest)
    length = end.start() if end and end.start() else len(rest)
    return Place(line, before, rest[:length], rest[length:])
