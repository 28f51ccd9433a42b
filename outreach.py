"""Import people, compose a batch, look at it, test it, send it; record opt-outs, forget: the owner's command line.

Run by the owner. Touches the tables of importing.py, composing.py, batches.py, opt_outs.py and personal_data.py,
through them. Every command prints for a person, or for a script with --json. Exit status: 0 done, 1 failed or refused,
2 misconfigured or used wrongly.
Example:

    python outreach.py draft --where city=Berlin --template spring.txt
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import psycopg2
from rich.text import Text

import batches
import composing
import db
import handles
import importing
import opt_outs
import personal_data
import report
import runtime
import screens
import spreadsheet
from terminal import Terminal, count, one_line, people, printable

CREATED_BY = "outreach.py"  # outreach_batches.created_by
LISTED = 100_000  # people of one reason that --list shows
PAGE = 100  # items of a batch, or batches, on one screen
MAX_TEMPLATE = 1_000_000  # characters that are read of a template; composing refuses more than 4 KB
# FIELD OPERATOR VALUE of --where; the longer operators first.
CONDITION = re.compile(r"(?P<field>[^!<>=~]+)(?P<sign>!=|<=|>=|=|<|>|~)(?P<value>.*)", re.DOTALL)
OPERATORS = {"=": "eq", "!=": "ne", "<": "lt", "<=": "lte", ">": "gt", ">=": "gte", "~": "contains"}
# A name in JSON, and the option for it, for error messages.
OPTIONS = {
    "notSentWithinDays": "--not-sent-within", "sendFrom": "--send-from", "sendUntil": "--send-until",
    "firstN": "--first", "template": "--template", "vars": "--var", "name": "--name",
}  # fmt: skip
NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")

Connection = Any  # psycopg2's connection
Zone = tzinfo | None


class Failed(Exception):
    """The command was refused, or cannot go on. The message says what to do; the status is 1."""


class Usage(Exception):
    """The command was given wrongly. The message says how to give it; the status is 2."""


@contextlib.contextmanager
def connected() -> Iterator[tuple[Connection, Connection]]:
    """Open a connection to each of the two databases."""
    with contextlib.closing(_connect("quinn")) as quinn, contextlib.closing(_connect("icloud")) as icloud:
        yield quinn, icloud


def _connect(part: db.DatabaseName) -> Connection:
    """Connect to one database. Raises Failed, which names the database."""
    try:
        return db.connect(db.url(part))
    except psycopg2.Error as error:
        problem = db.diagnose(error, part)
        raise Failed(f"{problem.what}: {problem.remedy}") from None


# --- import -------------------------------------------------------------------------------------------


def import_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Show what a file would change, ask, and import it."""
    path = Path(arguments.file)
    with _open(path) as file, connected() as (quinn, icloud):
        with terminal.progress(f"Reading {path.name}", os.fstat(file.fileno()).st_size) as progress:
            job = importing.plan(
                quinn, icloud, file, path.name, handle=arguments.handle, name=arguments.name_column,
                ignore=arguments.ignore, encoding=arguments.encoding, progress=progress,
            )  # fmt: skip
        bad_lines = importing.bad_lines(quinn) if arguments.bad_lines else job.plan.bad_lines
        terminal.show(*screens.import_plan(job.plan, bad_lines))
        applied = None
        if job.plan.bad and arguments.strict:
            terminal.write_json({"plan": job.plan, "applied": None})
            raise Failed(
                f"{count(job.plan.bad, 'line is', 'lines are')} bad, so nothing is imported: correct the file, or "
                "leave out --strict"
            )
        if not job.plan.new + job.plan.changed:
            terminal.show(f"Nothing to import: {people(job.plan.same)} known, and no change.")
        elif is_import_confirmed(terminal, job.plan, arguments):
            with terminal.progress("Importing"):
                applied = importing.apply(quinn, job, arguments.strict)
            terminal.show(f"Imported: {count(applied.made, 'new client')}, {applied.changed:,} changed.")
        terminal.write_json({"plan": job.plan, "applied": applied})
    return 0 if applied or not job.plan.new + job.plan.changed else 1


def _open(path: Path) -> BinaryIO:
    """Open a file; copy a pipe, such as /dev/stdin, because the file is read from its start twice. Raises Usage."""
    try:
        file = path.open("rb")
        if file.seekable():
            return file
        copy = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        with file:
            shutil.copyfileobj(file, copy)
        copy.seek(0)
        return cast(BinaryIO, copy)
    except OSError as error:
        raise Usage(f"{path} cannot be read ({error.strerror}): check its name and its permissions") from None


def is_import_confirmed(terminal: Terminal, plan: importing.Plan, arguments: argparse.Namespace) -> bool:
    """Return whether the owner wants this import; if not, say how to say so."""
    affected = plan.new + plan.changed
    renames = f"This renames {plan.renames:,} of {people(plan.people)}."
    if plan.has_many_renames and arguments.renames == plan.renames and arguments.yes:
        return True
    if terminal.can_ask and not (arguments.yes and not plan.has_many_renames):
        expected = plan.renames if plan.has_many_renames else affected
        question = renames if plan.has_many_renames else f"Import {people(affected)}?"
        if terminal.ask(f"{question} Type {expected} to go on:", str(expected)):
            return True
        terminal.show("Nothing is imported.")
        return False
    if plan.has_many_renames:
        terminal.err.print(Text(f"Nothing is imported. {renames} If that is right, add --yes --renames {plan.renames}"))
        return False
    if not arguments.yes:
        terminal.err.print(Text("Nothing is imported. To import it, add --yes"))
    return bool(arguments.yes)


# --- an audience --------------------------------------------------------------------------------------


def read_query(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the audience of --query, --where or --everyone. Raises Usage."""
    if arguments.query is not None:
        try:
            query = json.loads(arguments.query)
        except (ValueError, RecursionError) as error:
            raise Usage(f"--query is no JSON ({error}): see docs/composing.md for what it can be") from None
        if not isinstance(query, dict):
            raise Usage('--query must be an object: {"v": 1, "where": {"field": "city", "eq": "Berlin"}}')
        return query
    if arguments.everyone:
        return {"v": 1, "where": {"everyone": True}}
    if not arguments.where:
        raise Usage("say who is meant: --where city=Berlin, --query JSON, or --everyone")
    conditions = [read_condition(text) for text in arguments.where]
    return {"v": 1, "where": {"all": conditions} if len(conditions) > 1 else conditions[0]}


def read_condition(text: str) -> dict[str, Any]:
    """Return the leaf of a query for `city=Berlin`, `visits>=3`, `note~garden` or `city=`, which is empty."""
    match = CONDITION.fullmatch(text)
    if not match:
        raise Usage(f"--where {text}: write FIELD=VALUE, such as city=Berlin; also != < <= > >= and ~ (contains)")
    field, sign, value = match["field"].strip(), match["sign"], match["value"].strip()
    if not value and sign in ("=", "!="):
        return {"field": field, "empty": sign == "="}
    # An order compares numbers as numbers; "9" is after "10" as text.
    is_amount = sign[0] in "<>" and NUMBER.fullmatch(value)
    return {"field": field, OPERATORS[sign]: json.loads(value) if is_amount else value}


def read_request(arguments: argparse.Namespace, template: str | None, zone: Zone) -> composing.Request:
    """Return what the command line asks for. Raises Usage."""
    document = {
        "query": read_query(arguments),
        "template": template,
        "notSentWithinDays": arguments.not_sent_within,
        "vars": dict(arguments.vars),
        "id": getattr(arguments, "id", None) or str(uuid.uuid4()),
        "name": getattr(arguments, "name", None),
        "sendFrom": read_moment(getattr(arguments, "send_from", None), zone),
        "sendUntil": read_moment(getattr(arguments, "send_until", None), zone),
        "firstN": getattr(arguments, "first", None),
        "recheck": not getattr(arguments, "no_recheck", False),
    }
    try:
        return msgspec.convert(document, composing.Request)
    except msgspec.ValidationError as error:
        raise Usage(re.sub(r"`(?:\$\.)?(\w+)`", lambda name: OPTIONS.get(name[1], name[0]), str(error))) from None


def read_moment(text: str | None, zone: Zone) -> str | None:
    """Return an instant of the command line in ISO 8601 with its offset; without one it is in the owner's time zone."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Usage(f"{text!r} is no time: write one such as '2026-03-01 09:00'") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone) if zone else moment.astimezone()
    return moment.isoformat()


def read_template(name: str | None) -> str | None:
    """Return the text of a file, or of stdin for `-`. Raises Usage."""
    if name is None:
        return None
    try:
        data = sys.stdin.buffer.read(MAX_TEMPLATE) if name == "-" else _read(Path(name))
        # A text file ends with a line end, which is not a part of the message.
        text = data.decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")
    except OSError as error:
        raise Usage(f"--template {name} cannot be read ({error.strerror}): check its name") from None
    except UnicodeDecodeError:
        raise Usage(f"--template {name} is not UTF-8: save it as UTF-8") from None
    if not text.strip():
        raise Usage(f"--template {name} is empty: write the text into it")
    return text


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_TEMPLATE)


def search_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Say how many people are meant, and who is left out; with --list, show those of one reason."""
    template = read_template(arguments.template)
    with connected() as (quinn, icloud):
        request = read_request(arguments, template, None)
        if arguments.list:
            with terminal.progress("Searching"):
                page = composing.people_left_out(quinn, icloud, request, arguments.list, limit=LISTED)
            terminal.show(*screens.left_out(arguments.list, as_data(page.entries)))
            terminal.write_json(page)
            return 0
        with terminal.progress("Searching"):
            found = composing.search(quinn, icloud, request)
    terminal.show(*screens.audience(as_data(found)))
    terminal.write_json(found)
    return 0


# --- a batch ------------------------------------------------------------------------------------------


def draft_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Write a draft and show it; with --dry-run, only show it."""
    template = read_template(arguments.template)
    interval = timedelta(seconds=runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30))
    with connected() as (quinn, icloud):
        formatter = read_formatter(quinn)
        request = read_request(arguments, template, formatter.zone)
        if arguments.dry_run:
            with terminal.progress("Writing the texts"):
                seen = composing.dry_run(quinn, icloud, request, interval)
            terminal.show(*screens.draft(as_data(seen), formatter.at), "", "Nothing was written.")
            terminal.write_json(seen)
            return 0
        with terminal.progress("Writing the draft"):
            made = composing.draft(quinn, icloud, request, interval, CREATED_BY)
    terminal.show(*screens.batch({"name": request.name, **as_data(made)}, formatter.at))
    terminal.write_json(made)
    return 0


def list_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """List the batches, the newest first."""
    with connected() as (quinn, _):
        page = composing.list_batches(quinn, arguments.after, PAGE)
        terminal.show(*screens.batch_list(as_data(page.entries)), *_more(page))
    terminal.write_json(page)
    return 0


def show_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Show a batch as its owner was shown it, or the text of each person."""
    with connected() as (quinn, _):
        if arguments.items:
            page = composing.list_items(quinn, arguments.batch, arguments.status, arguments.after, PAGE)
            terminal.show(*screens.items(as_data(page.entries)), *_more(page))
            terminal.write_json(page)
            return 0
        detail = composing.show(quinn, arguments.batch)
        terminal.show(*show_detail(quinn, detail))
    terminal.write_json(detail)
    return 0


def show_detail(quinn: Connection, detail: composing.BatchDetail) -> list[Any]:
    """Return the screen of a batch that is in the database."""
    data = as_data(detail)
    return screens.batch({**(data["draft"] or {}), **data}, read_formatter(quinn).at)


def _more(page: composing.Page) -> list[Any]:
    return [f"There are more: --after {page.after}"] if page.after else []


def test_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Queue the first person's text for the owner's own handle."""
    with connected() as (quinn, icloud):
        queue_id = composing.send_test(quinn, icloud, arguments.batch, arguments.to)
    terminal.show(f"Queued for {arguments.to}. The Mac sends it within 10 minutes, or not at all.")
    terminal.write_json({"sendQueueId": queue_id})
    return 0


def send_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Show a draft, ask for the number of its recipients, and let it be sent."""
    with connected() as (quinn, _):
        detail = composing.show(quinn, arguments.batch)
        digest = arguments.digest or detail.digest or ""
        recipients = detail.counts.pending
        # `sending`, too: its approval may be missing, or have lapsed.
        can_start = detail.digest == digest and detail.status in ("draft", "sending", "paused")
        if can_start and not (arguments.yes and arguments.recipients is not None):
            terminal.show(*show_detail(quinn, detail))
            if not is_send_confirmed(terminal, recipients, arguments.first):
                return 1
        else:
            recipients = arguments.recipients if arguments.recipients is not None else recipients
        sent = composing.send(quinn, arguments.batch, digest, recipients, arguments.first)
    pause = f" It pauses after {arguments.first:,}." if arguments.first else ""
    terminal.show(f"It is being sent to {people(sent.recipients)}.{pause} To see how it goes: python status.py")
    terminal.write_json(sent)
    return 0


def is_send_confirmed(terminal: Terminal, recipients: int, first: int | None) -> bool:
    """Ask for the number of recipients on a terminal; elsewhere say how to name it."""
    if not terminal.can_ask:
        terminal.err.print(Text(f"Nothing is sent. To send to {people(recipients)}: --yes --recipients {recipients}"))
        return False
    pause = f" It pauses after {first:,}." if first else ""
    if terminal.ask(f"Send to {people(recipients)}?{pause} Type {recipients} to go on:", str(recipients)):
        return True
    terminal.show("Nothing is sent.")
    return False


def pause_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Stop a batch, and take back what no Mac has collected."""
    with connected() as (quinn, icloud):
        return take_back(terminal, batches.pause(quinn, icloud, arguments.batch))


def cancel_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """End a batch for good, and take back what no Mac has collected."""
    with connected() as (quinn, icloud):
        return take_back(terminal, batches.cancel(quinn, icloud, arguments.batch))


def take_back(terminal: Terminal, changed: batches.Changed) -> int:
    """Say what a batch's end or pause took back."""
    verb = "was" if changed.withdrawn == 1 else "were"
    late = ""
    if changed.beyond_recall:
        late = f" {count(changed.beyond_recall, 'message')} cannot be taken back: a Mac has collected them."
    terminal.show(f"The batch is {changed.status}. {count(changed.withdrawn, 'message')} {verb} taken back.{late}")
    terminal.write_json(changed.as_data())
    return 0


def resume_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Let a paused batch go on. If it has paused itself, say first what to look at."""
    with connected() as (quinn, _):
        detail = composing.show(quinn, arguments.batch)
        if detail.check_first:
            terminal.show(f"It has paused itself: {detail.pause_reason}.", f"Check first: {detail.check_first}")
            if terminal.can_ask and not arguments.yes and not terminal.ask("Type resume to go on:", "resume"):
                terminal.show("It stays paused.")
                return 1
        changed = batches.resume(quinn, arguments.batch)
    terminal.show("It is being sent again. To see how it goes: python status.py")
    terminal.write_json(changed.as_data())
    return 0


def retry_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Let the failed messages of a batch be tried again."""
    with connected() as (quinn, _):
        batches.acquire_lock(quinn, threading.Event())
        found = batches.retry(quinn, arguments.batch, arguments.include_unknown)
    if found is None:
        raise Failed(f"there is no batch {arguments.batch}: `python outreach.py list` lists them")
    status, again, unknown = found
    terminal.show(f"{count(again, 'message')} will be tried again; the batch is {status}.")
    if unknown and not arguments.include_unknown:
        terminal.show(
            f"{count(unknown, 'message')} may have been sent, and stay as they are. Ask the recipients, or look at the "
            "Mac; then, to send them in any case: --include-unknown"
        )
    terminal.write_json({"status": status, "again": again, "unknown": unknown})
    return 0


# --- people -------------------------------------------------------------------------------------------


def opt_out_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Record that a person wants no more messages."""
    with connected() as (quinn, icloud):
        moment = read_moment(arguments.date, read_formatter(quinn).zone)
        received_at = datetime.fromisoformat(moment) if moment else None
        recorded = opt_outs.record(quinn, icloud, arguments.handle, arguments.word, received_at)
    before = "" if recorded.is_new else " They had opted out before."
    terminal.show(f"{arguments.handle} gets no more messages, nor does any other handle of the same person.{before}")
    if not recorded.is_readable:
        terminal.show(f"The number cannot be read: {handles.UNREADABLE_REMEDY}, and record it again.")
    terminal.write_json(recorded.as_data())
    return 0


def opt_in_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """End a handle's opt-out."""
    with connected() as (quinn, icloud):
        is_ended = opt_outs.end(icloud, arguments.handle)
        others = opt_outs.others_of_person(quinn, icloud, arguments.handle)
    terminal.show(f"{arguments.handle} may be written to again." if is_ended else "There was no opt-out to end.")
    if others:
        terminal.show(f"But nobody writes to this person while these have opted out: {', '.join(others)}")
    terminal.write_json({"isEnded": is_ended, "others": others})
    return 0


def opt_outs_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """List the opt-outs, export all of them, or import a list."""
    with connected() as (quinn, icloud):
        if arguments.csv:
            opt_outs.write_csv(icloud, sys.stdout)
            return 0
        if arguments.import_file:
            return import_opt_outs(terminal, quinn, icloud, Path(arguments.import_file))
        if arguments.unassigned:
            found = opt_outs.unassigned(quinn, icloud, arguments.after, PAGE)
        else:
            found = opt_outs.page(icloud, arguments.after, PAGE)
        formatter = read_formatter(quinn)
    terminal.show(screens.opt_out_list(found, formatter.at))
    if len(found) == PAGE:
        terminal.show(f"To go on: --after {found[-1].id}")
    terminal.write_json([one.as_data() for one in found])
    return 0


def import_opt_outs(terminal: Terminal, quinn: Connection, icloud: Connection, path: Path) -> int:
    """Record an opt-out for each line of a file."""
    with _open(path) as file:
        try:
            imported = opt_outs.import_list(quinn, icloud, opt_outs.read_list(file))
        except spreadsheet.Unreadable as error:
            raise Failed(str(error)) from None
    terminal.show(f"{people(imported.new)} opted out; {people(imported.known)} had opted out before.")
    for bad in imported.bad[:PAGE]:
        terminal.show(f"line {bad.line}: no number or address: {one_line(bad.text)}")
    terminal.write_json(imported.as_data())
    return 1 if imported.bad else 0


def assign_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Give a handle to a client, as one that is not primary."""
    with connected() as (quinn, icloud):
        is_new = opt_outs.assign(quinn, icloud, arguments.handle, arguments.client)
    terminal.show(f"{arguments.handle} belongs to client {arguments.client}{' now' if is_new else ' already'}.")
    terminal.write_json({"isNew": is_new})
    return 0


def show_person_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Show all that is stored about a person."""
    with connected() as (quinn, icloud):
        shown = personal_data.show_person(quinn, icloud, arguments.handle)
    terminal.show(personal_data.as_text(shown))
    terminal.write_json(shown)
    return 0


def forget_command(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Erase a person, after the owner has confirmed it."""
    with connected() as (quinn, icloud):
        number = len(personal_data.find(quinn, arguments.handle).client_ids)
        whom = f"{count(number, 'client')} with {arguments.handle}"
        if not arguments.yes:
            if not terminal.can_ask:
                raise Failed(f"nothing is erased. To erase the messages and names of {whom}: --yes")
            if not terminal.ask(f"Erase {whom}? Type forget to go on:", "forget"):
                terminal.show("Nothing is erased.")
                return 1
        forgotten = personal_data.forget(quinn, icloud, arguments.handle)
    terminal.show(*screens.forgotten(forgotten))
    terminal.write_json(forgotten.as_data())
    return 1 if forgotten.in_flight or forgotten.unfinished else 0


# --- what several commands need -----------------------------------------------------------------------


def read_formatter(quinn: Connection) -> report.LocalTimeFormatter:
    """Return how the owner reads times: in the time zone of the quiet hours, else in this host's."""
    rows = db.query(quinn, "SELECT quiet_hours_tz FROM outreach_settings WHERE id = 1")
    return report.LocalTimeFormatter(datetime.now(UTC), rows[0][0] if rows else None)


def as_data(value: object) -> Any:
    """Return an answer of composing.py as its JSON."""
    return msgspec.to_builtins(value)


# --- running ------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Import people, compose a batch, look at it, test it, and send it. Exit status: 0 done, 1 failed "
        "or refused, 2 misconfigured or used wrongly.",
        epilog="environment: QUINN_DB_URL, QUINN_ICLOUD_DB_URL, DEFAULT_REGION (the country of numbers without +, such "
        "as US or DE), DISPATCH_INTERVAL_SECONDS (the dispatcher's, if it is not 30). examples: python outreach.py "
        "import people.csv; python outreach.py draft --where city=Berlin --template spring.txt",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document, for scripts")

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common])
        made.set_defaults(run=run)
        return made

    _add_import(command("import", import_command, "make and change clients from a CSV file; first shows what changes"))
    _add_audience(search := command("search", search_command, "say how many people are meant, and who is left out"))
    search.add_argument("--template", metavar="FILE", help="a text: also leave out whom it does not fit")
    search.add_argument("--list", metavar="REASON", help="list the people who are left out for this reason")
    _add_draft(command("draft", draft_command, "write a text to each person, without sending it, and show it"))
    _add_batch_commands(command)
    _add_people_commands(command)
    return parser


def _add_audience(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("who is meant")
    who.add_argument("--where", action="append", metavar="FIELD=VALUE", help="a condition, also with != < <= > >= or ~ "
                     "(contains); several must all hold")  # fmt: skip
    who.add_argument("--query", metavar="JSON", help="the audience as JSON, in place of --where")
    who.add_argument("--everyone", action="store_true", help="all clients")
    who.add_argument("--not-sent-within", type=int, metavar="DAYS", help="leave out whom you wrote to in so many days")
    parser.add_argument("--var", dest="vars", action="append", default=[], type=variable, metavar="KEY=VALUE",
                        help="a value for {{ vars.KEY }}")  # fmt: skip


def variable(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: write KEY=VALUE, such as code=SPRING")
    return key, value


def batch_id(text: str) -> str:
    if not runtime.is_uuid(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no id of a batch: `python outreach.py list` shows the ids")
    return text.lower()


def _add_draft(parser: argparse.ArgumentParser) -> None:
    _add_audience(parser)
    parser.add_argument("--template", metavar="FILE", required=True, help="the text, a file or - for a pipe")
    parser.add_argument("--name", help="what the list of batches calls it")
    parser.add_argument("--send-from", metavar="TIME", help="nothing is sent before, such as '2026-03-01 09:00'")
    parser.add_argument("--send-until", metavar="TIME", help="nothing is sent after; the rest is skipped")
    parser.add_argument("--first", type=int, metavar="N", help="pause after so many messages")
    parser.add_argument("--no-recheck", action="store_true", help="send it also to who no longer matches by then")
    parser.add_argument(
        "--id", type=batch_id, metavar="UUID", help="the batch's id; the same command again is harmless"
    )
    parser.add_argument("--dry-run", action="store_true", help="show it, and write nothing")


def _add_batch_commands(command: Callable[[str, Callable[..., int], str], argparse.ArgumentParser]) -> None:
    """Add the commands about a batch that has been written."""
    listing = command("list", list_command, "list the batches, the newest first")
    listing.add_argument("--after", type=batch_id, metavar="ID", help="go on after this one")

    def of_batch(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = command(name, run, text)
        made.add_argument("batch", metavar="ID", type=batch_id, help="the batch's id")
        return made

    showing = of_batch("show", show_command, "show a batch as you have seen it, or each text")
    showing.add_argument("--items", action="store_true", help="each person, text and result, 100 at a time")
    showing.add_argument("--status", choices=["pending", "queued", "sent", "failed", "skipped"], help="of the items")
    showing.add_argument("--after", type=batch_id, metavar="ID", help="go on after this item")
    testing = of_batch("test", test_command, "send the first person's text to yourself")
    testing.add_argument("--to", required=True, metavar="HANDLE", help="your own number or address")
    sending = of_batch("send", send_command, "send a draft, after you have typed the number of its recipients")
    sending.add_argument("--first", type=int, metavar="N", help="pause after so many messages")
    sending.add_argument("--digest", help="of the draft that you have seen")
    sending.add_argument("--yes", action="store_true", help="do not ask; needs --recipients")
    sending.add_argument("--recipients", type=int, metavar="N", help="how many people you have seen that it has")
    of_batch("pause", pause_command, "stop a batch, and take back what no Mac has collected")
    resuming = of_batch("resume", resume_command, "let a paused batch go on")
    resuming.add_argument("--yes", action="store_true", help="do not ask")
    of_batch("cancel", cancel_command, "end a batch for good, and take back what no Mac has collected")
    retrying = of_batch("retry", retry_command, "try the failed messages of a batch again")
    retrying.add_argument("--include-unknown", action="store_true", help="also those that may have been sent")


def _add_people_commands(command: Callable[[str, Callable[..., int], str], argparse.ArgumentParser]) -> None:
    """Add the commands about opt-outs, and about what is stored."""

    def of_person(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = command(name, run, text)
        made.add_argument("handle", metavar="HANDLE", help="the number or e-mail address")
        return made

    opting_out = of_person("opt-out", opt_out_command, "record that a person wants no more messages")
    opting_out.add_argument("--word", metavar="TEXT", help="what the person said, and where")
    opting_out.add_argument("--date", metavar="TIME", help="when, if not now, such as '2026-03-01 09:00'")
    of_person("opt-in", opt_in_command, "end a person's opt-out, because they asked for it")
    listing = command("opt-outs", opt_outs_command, "list the opt-outs, the newest first")
    what = listing.add_mutually_exclusive_group()
    what.add_argument("--csv", action="store_true", help="print the whole record as CSV")
    what.add_argument("--unassigned", action="store_true", help="those of handles that no client has")
    what.add_argument("--import", dest="import_file", metavar="FILE", help="record one for each line of a file")
    listing.add_argument("--after", type=opt_out_id, metavar="ID", help="go on after this one")
    assigning = of_person("assign", assign_command, "give a handle to a client, so that its opt-out counts there")
    assigning.add_argument("client", metavar="CLIENT", help="the client's id")
    of_person("show-person", show_person_command, "show all that is stored about a person")
    forgetting = of_person("forget", forget_command, "erase a person's messages and name; the opt-out stays")
    forgetting.add_argument("--yes", action="store_true", help="do not ask")


def opt_out_id(text: str) -> str:
    if not runtime.is_uuid(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no id of an opt-out: `python outreach.py opt-outs` shows the ids"
        )
    return text.lower()


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a CSV file; its first line has the names of the columns")
    parser.add_argument(
        "--handle", action="append", default=[], metavar="COLUMN",
        help="a column of numbers or addresses, if its name does not say so; the first is primary",
    )  # fmt: skip
    parser.add_argument("--name", dest="name_column", metavar="COLUMN", help="the column with the name")
    parser.add_argument("--ignore", action="append", default=[], metavar="COLUMN", help="a column to leave out")
    parser.add_argument("--encoding", help="such as windows-1252, if the file is not UTF-8")
    parser.add_argument("--strict", action="store_true", help="import nothing if a line is bad")
    parser.add_argument("--bad-lines", action="store_true", help="list all bad lines")
    parser.add_argument("--yes", action="store_true", help="import without asking")
    parser.add_argument("--renames", type=int, metavar="N", help="with --yes: how many people are renamed")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command_line().parse_args(argv)
    runtime.load_settings()
    terminal = Terminal(arguments.json)
    try:
        return int(arguments.run(terminal, arguments))
    except Usage as error:
        return complain(str(error), 2)
    except (Failed, importing.ImportRefused, batches.Refused, opt_outs.OptOutError) as error:
        return complain(str(error), 1)
    except batches.LockTimeout:
        return complain("the dispatcher is at work on the batches: try again in a moment", 1)
    except psycopg2.Error as error:
        problem = db.diagnose(error)
        return complain(f"{problem.what}: {problem.remedy}", 1)
    except KeyboardInterrupt:
        return complain("stopped; what was not said to be done is not done", 1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it at exit
        return 1


def complain(message: str, status: int) -> int:
    """Print why a command did not work; return its exit status."""
    sys.stderr.write(f"outreach.py: {printable(message)}\n")
    return status


def entry_point() -> None:
    """Run the command `outreach`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
