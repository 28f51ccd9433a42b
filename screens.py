"""Format what outreach.py shows: the plan of an import, an audience, a draft, a batch, opt-outs.

Used by outreach.py; touches no table. What comes from composing.py is read by its names in JSON, which the
HTTP API fixes. Example:

    terminal.show(*screens.import_plan(plan, plan.bad_lines))
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import importing
import opt_outs
import personal_data
from terminal import count, one_line, people, printable, table

# --- import -------------------------------------------------------------------------------------------


def import_plan(plan: importing.Plan, bad_lines: Sequence[importing.BadLine]) -> list[RenderableType]:
    """Return what an import would do, for a person."""
    delimiter = {";": "semicolons", ",": "commas", "\t": "tabs"}.get(plan.delimiter, f"{plan.delimiter!r}")
    parts: list[RenderableType] = [f"{plan.file} ({plan.encoding}, {delimiter})", "", _columns_table(plan), ""]
    parts += [_counts_table(plan), ""]
    if plan.read_as:
        parts.append(f"Handles: {read_as(plan)}.")
    parts += [f"Check: {note}." for note in plan.notes]
    if plan.opted_out:
        parts.append(f"{people(plan.opted_out)} of the file opted out. They stay opted out and get no message.")
    if plan.examples:
        parts += ["", _examples_table(plan)]
    if plan.renames:
        parts.append(f"{plan.renames:,} of {people(plan.people)} would be renamed.")
    if bad_lines:
        made = table("#line", "reason", title="Bad lines, which are left out")
        for line in bad_lines:
            made.add_row(f"{line.line}", Text(printable(line.reason)))
        parts += ["", made]
    if len(bad_lines) < plan.bad:
        parts.append(f"and {plan.bad - len(bad_lines):,} more: --bad-lines lists all")
    return [*parts, ""]


def _columns_table(plan: importing.Plan) -> Table:
    made = table("column", "becomes")
    for column in plan.columns:
        made.add_row(Text(one_line(column.header)), Text(one_line(column.target)))
    return made


def _counts_table(plan: importing.Plan) -> Table:
    made = table("", "")
    made.columns[0].justify = "right"
    for number, what in ((plan.new, "new"), (plan.changed, "changed"), (plan.same, "the same"), (plan.bad, "bad")):
        made.add_row(f"{number:,}", what)
    return made


def read_as(plan: importing.Plan) -> str:
    """Return how the handles were read: `197 as Germany, 3 as Austria, 2 not readable`."""
    phrases = [
        count(reading.count, reading.country, f"{reading.country}es")
        if reading.country == "e-mail address"
        else f"{reading.count:,} as {reading.country}"
        for reading in plan.read_as
    ]
    return ", ".join(phrases + ([f"{plan.unreadable:,} not readable"] if plan.unreadable else []))


def _examples_table(plan: importing.Plan) -> Table:
    made = table("#line", "field", "old", "new", title="Changes, for example")
    for example in plan.examples:
        for change in example.changes:
            old = "" if change.old is None else change.old
            made.add_row(f"{example.line}", *(Text(one_line(text)) for text in (change.field, old, change.new)))
    return made


# --- an audience, a draft, a batch --------------------------------------------------------------------

Data = Mapping[str, Any]  # a document of composing.py, by its names in JSON
At = Callable[[datetime], str]  # writes an instant as the owner reads it

REASONS = {
    "noHandle": "no primary number or address",
    "badHandle": "a number or address that cannot be read",
    "optedOut": "opted out",
    "sameHandle": "the same number as somebody before",
    "sentRecently": "written to within the days that were asked for",
    "overWeeklyLimit": "had as many messages in a week as a person may get",
    "noHour": "no hour at which they may be written to",
    "emptyVariable": "a variable of the text is empty",
    "tooLong": "their text is too long",
}
SAMPLES = 3  # names beside a reason
NO_TIME = "no time known"


def audience(found: Data) -> list[RenderableType]:
    """Return how many people match, how many would get a message, and who is left out for which reason."""
    parts: list[RenderableType] = [
        f"{people(found['matched'])} match. {found['items']:,} would get a message.",
    ]
    if found.get("newContacts"):
        parts.append(f"{people(found['newContacts'])} were never written to before.")
    if found["leftOut"]:
        made = table("#left out", "reason", "such as")
        for each in found["leftOut"]:
            names = ", ".join(_who(person) for person in each["sample"][:SAMPLES])
            made.add_row(f"{each['count']:,}", _reason(each["reason"]), Text(one_line(names)))
        parts += ["", made, "", "To list them: search, with the same options and --list REASON:"]
        parts += [f"    {', '.join(each['reason'] for each in found['leftOut'])}"]
    return parts


def _repeats(found: Data, at: At) -> list[str]:
    """Return which earlier batches said the same to some of these people."""
    return [
        f"You sent this text before, to {each['people']:,} of these {people(found['items'])}: "
        f"{one_line(each.get('name') or each['batchId'])}, {at(datetime.fromisoformat(each['sentAt']))}."
        for each in found.get("repeats", [])
    ]


def left_out(reason: str, page: Sequence[Data]) -> list[RenderableType]:
    """Return the people who are left out for one reason."""
    made = table("client", "name", "handle", "detail", title=f"Left out: {_reason(reason)}")
    for person in page:
        values = (person.get(key) or "" for key in ("clientId", "name", "handle", "detail"))
        made.add_row(*(Text(one_line(value)) for value in values))
    return [made] if page else [f"Nobody is left out for {reason}."]


def draft(found: Data, at: At) -> list[RenderableType]:
    """Return all that the owner must see before sending: the audience, texts, unusual values, the forecast."""
    parts = audience(found)
    for preview in found.get("previews") or ():
        name = f"{preview['name']}, " if preview.get("name") else ""
        parts += ["", *_text(one_line(f"To {name}{preview['handle']} ({preview['why']})") + ":", preview["body"])]
    if found.get("unusual"):
        made = table("variable", "value", "why", "client", title="Unusual values: look at them before you send")
        for each in found["unusual"]:
            values = (each.get(key) for key in ("variable", "value", "why", "clientId"))
            made.add_row(*(Text(one_line("" if value is None else value)) for value in values))
        parts += ["", made]
    warnings = [*_repeats(found, at), *(found.get("warnings") or ())]
    parts += [""] if warnings else []
    parts += [Text(f"Warning: {printable(str(warning))}", style="yellow") for warning in warnings]
    if forecast := found.get("forecast"):
        parts += ["", _forecast(forecast, at)]
    return parts


def batch(found: Data, at: At) -> list[RenderableType]:
    """Return a batch that has been written: its state, then what its owner was shown, then what to do next."""
    batch_id, status = found["id"], found["status"]
    title = f"{found.get('name') or 'Batch'} ({status})"
    parts: list[RenderableType] = [Text(printable(title), style="bold"), f"id      {batch_id}"]
    parts += [f"digest  {found['digest']}"] if found.get("digest") else []
    for name, key in (("from", "sendFrom"), ("until", "sendUntil"), ("first", "firstN")):
        if value := found.get(key):
            parts.append(f"{name:8}{_moment(value, at) or value}")
    if found.get("pauseReason"):
        parts.append(Text(f"It has paused itself: {printable(found['pauseReason'])}.", style="yellow"))
        parts.append(f"Check first: {found.get('checkFirst') or ''}")
    if status != "draft" and (counts := found.get("counts")):
        parts.append(", ".join(f"{number:,} {what}" for what, number in counts.items() if number) or "no items")
    parts += ["", *draft(found, at), ""] if "matched" in found else []
    if status == "draft":
        parts += ["To test it, and to send it:", f"    python outreach.py test {batch_id} --to HANDLE"]
        parts += [f"    python outreach.py send {batch_id}"]
    return parts


def batch_list(rows: Sequence[Data]) -> list[RenderableType]:
    """Return the batches, as they come."""
    made = table("id", "name", "status", "#pending", "#sent")
    for row in rows:
        numbers = (f"{row['counts'][key]:,}" for key in ("pending", "sent"))
        made.add_row(row["id"], Text(one_line(row.get("name") or "")), row["status"], *numbers)
    return [made] if rows else ["There is no batch. To write one: python outreach.py draft --help"]


def items(rows: Sequence[Data]) -> list[RenderableType]:
    """Return each person's text, and what became of it."""
    parts: list[RenderableType] = []
    for row in rows:
        result = "may have been sent" if row["unknown"] else row["status"]
        reason = f", {row['failureReason']}" if row.get("failureReason") else ""
        parts += [*_text(f"{row['handle']} ({result}{reason}, item {row['id']}):", row["body"]), ""]
    return parts or ["There is none."]


def _reason(reason: str) -> str:
    return REASONS.get(reason, reason)


def _who(person: Data) -> str:
    return str(person.get("name") or person.get("handle") or person.get("clientId"))


def _text(heading: str, body: str) -> list[RenderableType]:
    """Return one text as its recipient reads it, indented: it cannot be taken for our own words."""
    return [Text(printable(heading), style="bold"), Padding(Text(printable(body)), (0, 0, 0, 4), expand=False)]


def _forecast(forecast: Data, at: At) -> Table:
    made = table("", "")
    about = "" if forecast.get("isExact") else "about "
    first, last = (_moment(forecast.get(key), at) for key in ("firstAt", "lastAt"))
    made.add_row("first message", first or NO_TIME)
    made.add_row("last message", about + last if last else NO_TIME)
    if forecast.get("binds"):
        made.add_row("decided by", Text(one_line(forecast["binds"])))
    return made


def _moment(value: object, at: At) -> str:
    return at(datetime.fromisoformat(value)) if isinstance(value, str) else ""


# --- people -------------------------------------------------------------------------------------------


def opt_out_list(rows: Sequence[opt_outs.OptOut], at: At) -> RenderableType:
    """Return opt-outs, as they come."""
    made = table("handle", "recorded", "words", "from", "until")
    for row in rows:
        origin = row.device or row.source
        until = f"{at(row.ended_at)}, {row.ended_by}" if row.ended_at else ""
        cells = (row.handle_key, at(row.received_at or row.created_at), row.word or "", origin, until)
        made.add_row(*(Text(one_line(cell)) for cell in cells))
    return made if rows else "There is none."


def forgotten(result: personal_data.Forgotten) -> list[RenderableType]:
    """Return what was erased of a person, and what is left for the owner to do."""
    parts: list[RenderableType] = [
        f"Erased: {count(result.erased.items, 'message')} of {count(result.clients, 'client')}, "
        f"{count(result.erased.rows, 'row')} of the queue.",
        f"These handles stay in the opt-outs, without a name: {', '.join(result.keys)}",
    ]
    if not result.is_deleted and not result.in_flight and not result.unfinished:
        parts.append("The table `clients` is your platform's: delete the person there.")
    if result.in_flight:
        parts.append(f"{count(result.in_flight, 'message')} in flight: run this again when its result is there.")
    for batch_id in result.unfinished:
        parts.append(f"Batch {batch_id} is not finished and names the person: cancel it, then run this again.")
    parts.append("The Mac has the conversation in Messages, and the number in its journal for a year (docs/people.md).")
    return parts
