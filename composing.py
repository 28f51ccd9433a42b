"""Compose a batch: search its people, render its texts, show them to the owner, write the draft, approve it.

Used by outreach.py and outreach_server.py. Writes outreach_batches and outreach_batch_items in quinn, and one row of
icloud.send_queue for a test message; recipients.py decides who gets what. Each function takes autocommit connections.
A request that cannot be done raises batches.Refused. Example:

    draft = composing.draft(quinn, icloud, request, interval, created_by="owner")
    composing.send(quinn, draft.id, draft.digest, draft.items, first_n=5)

What a crash leads to: a draft is one transaction, so it exists whole or not at all; the same request again makes it, or
finds it. The approval is one statement.
"""

import collections
import contextlib
import hashlib
import json
import secrets
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
import psycopg2
import psycopg2.extras
from psycopg2 import errors

import audience
import batches
import db
import forecast
import handles
import history
import pacing
import quiet_times
import recipients
import repeats
import report
import templates
import unusual
from batches import Refused
from recipient_groups import Group
from recipients import LeftOut, Message, Person

SAMPLE = 10  # people that are listed for each reason
MAX_PAGE = 100  # entries of a page
TEST_VALIDITY = "10 minutes"
NO_TEMPLATE = "`template` is missing: it is the text"

Connection = Any  # psycopg2's connection
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class Request(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """What an owner asks for. `id` is the batch's, chosen by the client: the same request again is the same draft.

    `not_sent_within_days`: leave out who was written to in so many days. `recheck`: before it is sent, skip who no
    longer matches `query`. A search needs `query` only.
    """

    query: dict[str, Any]
    id: uuid.UUID | None = None
    name: Annotated[str, msgspec.Meta(max_length=200)] | None = None
    template: Text | None = None
    vars: dict[str, str | int | float | bool] = {}
    not_sent_within_days: Annotated[int, msgspec.Meta(ge=1, le=36_500)] | None = None
    send_from: Instant | None = None
    send_until: Instant | None = None
    first_n: Count | None = None
    recheck: bool = True

    def __post_init__(self) -> None:
        if self.send_from and self.send_until and self.send_from >= self.send_until:
            raise ValueError("`sendUntil` must be after `sendFrom`")
        if db.UNSTORABLE.search(f"{self.name}{self.template}{json.dumps(self.vars, ensure_ascii=False)}"):
            raise ValueError("`name`, `template` or `vars` has a NUL or half of a surrogate pair")


class Excluded(msgspec.Struct, rename="camel"):
    """A reason (recipients.REASONS), how many people are left out for it, and some of them."""

    reason: str
    count: int
    sample: list[Person]


class Preview(msgspec.Struct, rename="camel"):
    """A message of the draft. `why` it is shown: first, shortest, longest, or default (one was taken)."""

    client_id: str
    name: str | None
    handle: str
    body: str
    why: str


class UnusualValue(msgspec.Struct, rename="camel"):
    """A value to look at before sending, and why."""

    variable: str
    client_id: str
    value: str
    why: str


class Forecast(msgspec.Struct, rename="camel"):
    """When the first and the last message would go. `binds`: the rule that costs most of the time."""

    first_at: datetime | None
    last_at: datetime | None
    is_exact: bool
    binds: str | None


class Found(msgspec.Struct, rename="camel"):
    """The result of a search: how many people match, how many would get a text, and who is left out."""

    matched: int
    items: int
    left_out: list[Excluded]


class DryRun(Found, rename="camel"):
    """The result of a draft that is not written. `new_contacts`: people who were never written to before. `repeats`:
    earlier batches with the same text that reached some of these people.
    """

    digest: str
    previews: list[Preview]
    unusual: list[UnusualValue]
    warnings: list[str]
    new_contacts: int
    forecast: Forecast | None
    repeats: list[repeats.Repeat]


class Draft(DryRun, rename="camel"):
    """A draft that is written, or a later state of it."""

    id: str
    status: str


class Counts(msgspec.Struct, rename="camel"):
    """A batch's items by status. `unknown`: those of the failed ones that may have been sent."""

    pending: int = 0
    queued: int = 0
    sent: int = 0
    failed: int = 0
    skipped: int = 0
    unknown: int = 0


class BatchSummary(msgspec.Struct, rename="camel"):
    """A line of the list of batches."""

    id: str
    name: str | None
    status: str
    pause_reason: str | None
    created_at: datetime
    approved_at: datetime | None
    counts: Counts


class BatchDetail(BatchSummary, rename="camel"):
    """A batch. `draft` is what its owner was shown; None for one that was made by hand.

    `check_first`: what to look at before it is resumed.
    """

    template: str
    vars: dict[str, Any]
    query: dict[str, Any]
    not_sent_within_days: int | None
    send_from: datetime | None
    send_until: datetime | None
    first_n: int | None
    recheck: bool
    digest: str | None
    check_first: str | None
    draft: Found | None


class Item(msgspec.Struct, rename="camel"):
    """An item of a batch. `unknown`: it may have been sent, although it failed."""

    id: str
    client_id: str
    status: str
    body: str
    handle: str | None
    sent_at: datetime | None
    failure_reason: str | None
    unknown: bool
    attempt: int


class Page(msgspec.Struct, rename="camel"):
    """A page of a list. `after`: ask with it for the next page; None on the last one."""

    entries: list[Any]
    after: str | None


class Sent(msgspec.Struct, rename="camel"):
    """What an approval did."""

    id: str
    status: str
    recipients: int


# --- what an audience and a text give -----------------------------------------------------------------


class Collector:
    """Collect what is shown of a draft, one person after the other. Memory does not grow with them."""

    def __init__(self, variables: Iterable[str] = ()) -> None:
        self.items = 0
        self.groups: collections.Counter[Group] = collections.Counter()
        self.elsewhere = 0  # people whose clocks differ from the sender's
        self.repeats: list[repeats.Repeat] = []
        self.digest = hashlib.sha256()
        self.counts: dict[str, int] = {}
        self.samples: dict[str, list[Person]] = {}
        self.first: list[Message] = []
        self.special: dict[str, Message] = {}  # by `why`
        self.values = unusual.UnusualValues(variables)

    @property
    def new_contacts(self) -> int:
        return sum(count for group, count in self.groups.items() if group.is_new)

    def add(self, each: Message | LeftOut) -> None:
        if isinstance(each, LeftOut):
            self.counts[each.reason] = self.counts.get(each.reason, 0) + 1
            sample = self.samples.setdefault(each.reason, [])
            if len(sample) < SAMPLE:
                sample.append(each.person)
            return
        self.items += 1
        add_to_digest(self.digest, each.handle_key, each.body)
        self.values.add(each.client_id, each.values)
        if len(self.first) < 3:
            self.first.append(each)
        length = len(each.body)
        if "shortest" not in self.special or length < len(self.special["shortest"].body):
            self.special["shortest"] = each
        if "longest" not in self.special or length > len(self.special["longest"].body):
            self.special["longest"] = each
        if each.defaults_taken:
            self.special.setdefault("default", each)

    def found(self) -> Found:
        left_out = [
            Excluded(reason, self.counts[reason], self.samples[reason])
            for reason in recipients.REASONS
            if reason in self.counts
        ]
        return Found(self.items + sum(self.counts.values()), self.items, left_out)

    def dry_run(self) -> DryRun:
        """Return what an owner is shown, without the forecast."""
        found = self.found()
        shown = [*(("first", message) for message in self.first), *sorted(self.special.items())]
        previews: dict[str, Preview] = {}
        for why, message in shown:
            if message.client_id not in previews:
                previews[message.client_id] = Preview(
                    message.client_id, message.name, message.handle, message.body, why
                )
        return DryRun(
            matched=found.matched,
            items=found.items,
            left_out=found.left_out,
            digest=self.digest.hexdigest(),
            previews=list(previews.values()),
            unusual=[UnusualValue(*each) for each in self.values.found()],
            warnings=self.warnings(),
            new_contacts=self.new_contacts,
            forecast=None,
            repeats=self.repeats,
        )

    def warnings(self) -> list[str]:
        """Return what a text to people who were never written to lacks, and that it may be night where people are."""
        found = []
        if self.elsewhere:
            people = "1 person lives" if self.elsewhere == 1 else f"{self.elsewhere} people live"
            found.append(
                f"{people} in another time zone, or may, and quiet hours are those of the sender: to send nothing in "
                "their night, set quietHoursOf to recipient or both"
            )
        if self.new_contacts and self.first:
            people = "1 person was" if self.new_contacts == 1 else f"{self.new_contacts} people were"
            missing = unusual.missing_parts(self.first[0].body)
            found += [f"{people} never written to before: {part}" for part in missing]
        return found


def add_to_digest(digest: Any, handle_key: str, body: str) -> None:
    """Add an item to a batch's digest. The lengths keep two items from looking like two others."""
    for text in (handle_key, body):
        encoded = text.encode()
        digest.update(b"%d:" % len(encoded) + encoded)


@contextlib.contextmanager
def transaction(conn: Connection, is_read_only: bool) -> Iterator[None]:
    """Open a transaction that sees one state of the database, for a cursor over many clients."""
    with db.transaction(conn, "REPEATABLE READ", is_read_only):
        if is_read_only:
            db.query(conn, f"SET LOCAL statement_timeout = '{recipients.SEARCH_TIMEOUT}'")
        # A cursor's plan is otherwise one for its first rows: over a million clients it would follow the primary key.
        db.query(conn, "SET LOCAL cursor_tuple_fraction = 1")
        yield


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn the errors of an audience and of a text into Refused."""
    try:
        yield
    except audience.QueryError as error:
        raise Refused(400, str(error)) from error
    except templates.TemplateError as error:
        raise Refused(400, f"the text, {error}", {"line": error.line, "column": error.column}) from error
    except errors.QueryCanceled as error:
        raise Refused(400, "the search takes too long: ask for less, such as fewer conditions with contains") from error
    except psycopg2.DataError as error:
        raise Refused(400, f"the database cannot compare a value: {error.diag.message_primary}") from error


def search(quinn: Connection, icloud: Connection, request: Request) -> Found:
    """Return how many people match, and who would be left out. With a template, also those for whom it has gaps."""
    collector = Collector()
    with refusals(), transaction(quinn, is_read_only=True):
        for each in _walk(quinn, icloud, request):
            collector.add(each)
    return collector.found()


def people_left_out(
    quinn: Connection,
    icloud: Connection,
    request: Request,
    reason: str,
    after: str | None = None,
    limit: int = MAX_PAGE,
) -> Page:
    """Return a page of the people who are left out for one reason. `after`: the client id of the last one before."""
    if reason not in recipients.REASONS:
        raise Refused(400, f"there is no reason {reason!r}: use one of {', '.join(recipients.REASONS)}")
    people: list[Person] = []
    is_after = after is None
    with refusals(), transaction(quinn, is_read_only=True):
        for each in _walk(quinn, icloud, request):
            if isinstance(each, LeftOut) and each.reason == reason:
                if is_after:
                    people.append(each.person)
                is_after = is_after or each.person.client_id == after
                if len(people) > limit:
                    return Page(people[:limit], people[limit - 1].client_id)
    if not is_after:
        raise Refused(400, "`after` names nobody who is left out for this reason now: begin with the first page")
    return Page(people, None)


def dry_run(
    quinn: Connection, icloud: Connection, request: Request, interval: timedelta, matched: int | None = None
) -> DryRun:
    """Return what a draft would be; write nothing.

    `matched`: how many people the audience has if `request` asks for the first ones only. The forecast is then one for
    all, as if the others were like them.
    """
    if not request.template:
        raise Refused(400, NO_TEMPLATE)
    with refusals(), transaction(quinn, is_read_only=True):
        collector = _collect(quinn, icloud, request, recipients.read_selection(quinn, request.query), write=None)
    result = collector.dry_run()
    read = report.read_databases()
    if read.outreach and read.outreach.snapshot and result.items:
        share = (matched or result.matched) / result.matched
        groups = {group: round(count * share) for group, count in collector.groups.items()}
        result.forecast = _as_forecast(
            forecast.forecast_new_batch(
                read.outreach, read.queue, interval, groups, request.send_from, request.send_until, request.first_n
            )
        )
    return result


def _walk(quinn: Connection, icloud: Connection, request: Request) -> Iterator[Message | LeftOut]:
    selection = recipients.read_selection(quinn, request.query)
    template = _parse_template(request, selection) if request.template else None
    return recipients.walk(quinn, icloud, selection, template, _times(request))


def _times(request: Request) -> recipients.Times:
    return recipients.Times(request.not_sent_within_days, request.send_from, request.send_until)


def _parse_template(request: Request, selection: recipients.Selection) -> templates.Template:
    """Check a request's text. Raises templates.TemplateError, and Refused if there is none."""
    if not request.template:
        raise Refused(400, NO_TEMPLATE)
    return templates.parse(request.template, recipients.known_variables(selection.fields), request.vars)


def _collect(
    quinn: Connection, icloud: Connection, request: Request, selection: recipients.Selection, write: Any
) -> Collector:
    """Walk through the people; give `write` the messages of each chunk; return what is shown of them."""
    template = _parse_template(request, selection)
    collector = Collector(template.variables)
    # The stored draft was made without itself; the same must hold for a dry run of the same request.
    batch_id = str(request.id) if request.id else None
    earlier = repeats.Repeats(quinn, request.template or "", request.vars, batch_id)
    chunk: list[Message] = []
    snapshot = pacing.read_snapshot(quinn)

    def end_chunk() -> None:
        ids, keys = [message.client_id for message in chunk], [message.handle_key for message in chunk]
        known_ids, known_keys = history.written_to(quinn, ids, keys, days=None)
        is_new = [message.client_id not in known_ids and message.handle_key not in known_keys for message in chunk]
        collector.groups.update(map(Group, (message.time_zones for message in chunk), is_new))
        if snapshot:
            collector.elsewhere += sum(_is_in_another_night(snapshot, message) for message in chunk)
        earlier.add(keys)
        if write:
            write(chunk, is_new)
        chunk.clear()

    for each in recipients.walk(quinn, icloud, selection, template, _times(request)):
        collector.add(each)
        if isinstance(each, Message):
            chunk.append(each)
            if len(chunk) == recipients.CHUNK:
                end_chunk()
    if chunk:
        end_chunk()
    collector.repeats = earlier.found()
    return collector


def _is_in_another_night(snapshot: pacing.Snapshot, message: Message) -> bool:
    """Return whether it may be night where a person is while it is day for the sender, and no setting heeds it."""
    times = snapshot.settings.quiet_times
    has_quiet_times = times.start != times.end or times.days != quiet_times.QuietDays()
    return times.of == "sender" and has_quiet_times and times.is_elsewhere(message.time_zones, snapshot.now)


def forecast_written(batch_id: str, interval: timedelta) -> Forecast | None:
    """Return when the messages of a batch would go if it was approved now; None if a database cannot be read."""
    read = report.read_databases(batch_id)
    counts = read.outreach.counts.get(batch_id) if read.outreach else None
    if read.outreach is None or read.outreach.snapshot is None or counts is None or not counts.pending:
        return None
    return _as_forecast(forecast.forecast_batch(read.outreach, read.queue, interval, batch_id))


def _as_forecast(found: forecast.BatchForecast) -> Forecast:
    return Forecast(found.first_at, found.last_at, found.is_exact, found.bottleneck)


# --- the draft ----------------------------------------------------------------------------------------


def draft(
    quinn: Connection, icloud: Connection, request: Request, interval: timedelta, created_by: str | None = None
) -> Draft:
    """Write a draft with its items in one transaction; return it. The same request again returns the same draft."""
    if not request.template:
        raise Refused(400, NO_TEMPLATE)
    if request.id is None:
        raise Refused(400, "`id` is missing: choose a UUID for the batch, and repeat the request with the same one")
    batch_id = str(request.id)
    with refusals():
        selection = recipients.read_selection(quinn, request.query)
        values = _stored_values(request, selection.query)
        if _is_written(quinn, values):
            return _read_draft(quinn, request, interval)
        try:
            with transaction(quinn, is_read_only=False):
                _insert_batch(quinn, values, created_by)
                writer = ItemWriter(quinn, batch_id)
                shown = _collect(quinn, icloud, request, selection, writer.write).dry_run()
                if not shown.items:
                    raise Refused(409, f"nobody would get this text; {_count_left_out(shown)}")
                _finish_draft(quinn, batch_id, shown)
        except (errors.UniqueViolation, errors.LockNotAvailable, errors.SerializationFailure) as error:
            # Another request with this id has written it, or is writing it.
            if _is_written(quinn, values):
                return _read_draft(quinn, request, interval)
            raise Refused(409, "the same draft is being written by another request: try again in a moment") from error
    return _read_draft(quinn, request, interval)


class ItemWriter:
    """Insert items. All have the same created_at, so their ids decide the order: they ascend."""

    def __init__(self, quinn: Connection, batch_id: str) -> None:
        self.quinn, self.batch_id = quinn, batch_id
        self.next_id = secrets.randbits(96) << 32

    def write(self, messages: list[Message], is_new: list[bool]) -> None:
        sql = """
            INSERT INTO outreach_batch_items
                   (id, batch_id, client_id, rendered_body, handle_key, time_zones, new_contact)
            VALUES %s
        """
        rows = []
        for message, new_contact in zip(messages, is_new, strict=True):
            item_id, zones = str(uuid.UUID(int=self.next_id)), list(message.time_zones)
            rows.append(
                (item_id, self.batch_id, message.client_id, message.body, message.handle_key, zones, new_contact)
            )
            self.next_id += 1
        with self.quinn.cursor() as cursor:
            template = "(%s, %s, %s, %s, %s, %s::text[], %s)"
            psycopg2.extras.execute_values(cursor, sql, rows, template, page_size=len(rows))


def _stored_values(request: Request, query: dict[str, Any]) -> db.Params:
    """Return what outreach_batches keeps of a request."""
    return {
        "id": str(request.id),
        "name": request.name,
        "template": request.template,
        "vars": json.dumps(request.vars),
        "query": json.dumps(query),
        "send_from": request.send_from,
        "send_until": request.send_until,
        "first_n": request.first_n,
        "days": request.not_sent_within_days,
        "recheck": request.recheck,
    }


def _insert_batch(quinn: Connection, values: db.Params, created_by: str | None) -> None:
    sql = """
        INSERT INTO outreach_batches
               (id, name, status, template, vars, query_json, created_by, send_from, send_until, first_n,
                not_sent_within_days, recheck)
        VALUES (%(id)s, %(name)s, 'draft', %(template)s, %(vars)s, %(query)s, %(created_by)s, %(send_from)s,
                %(send_until)s, %(first_n)s, %(days)s, %(recheck)s)
    """
    db.query(quinn, sql, {**values, "created_by": created_by})


def _finish_draft(quinn: Connection, batch_id: str, shown: DryRun) -> None:
    sql = """
        UPDATE outreach_batches SET digest = %(digest)s, preview = %(preview)s, updated_at = now() WHERE id = %(id)s
    """
    preview = db.replace_unstorable(msgspec.json.encode(shown).decode())
    db.query(quinn, sql, {"id": batch_id, "digest": shown.digest, "preview": preview})


def _is_written(quinn: Connection, values: db.Params) -> bool:
    """Return whether the batch is there, from the same request. Raises Refused if it is another one."""
    sql = """
        SELECT digest IS NOT NULL
               AND (name, template, vars, query_json, send_from, send_until, not_sent_within_days, recheck)
                   IS NOT DISTINCT FROM
                   (%(name)s::text, %(template)s::text, %(vars)s::jsonb, %(query)s::jsonb, %(send_from)s::timestamptz,
                    %(send_until)s::timestamptz, %(days)s::integer, %(recheck)s)
               -- first_n of an approved batch is what the approval said.
               AND (approved_at IS NOT NULL OR first_n IS NOT DISTINCT FROM %(first_n)s::integer)
          FROM outreach_batches
         WHERE id = %(id)s
    """
    rows = db.query(quinn, sql, values)
    if rows and not rows[0][0]:
        raise Refused(409, f"there is another batch with the id {values['id']}: choose a new id for another request")
    return bool(rows)


def is_same_request(quinn: Connection, request: Request) -> bool:
    """Return whether the batch with the request's id was made by the same request."""
    with refusals():
        query = recipients.read_selection(quinn, request.query).query
    with contextlib.suppress(Refused):
        return _is_written(quinn, _stored_values(request, query))
    return False


def _read_draft(quinn: Connection, request: Request, interval: timedelta) -> Draft:
    """Return the stored draft as it was shown, with a forecast of now."""
    sql = "SELECT status, preview FROM outreach_batches WHERE id = %(id)s"
    [(status, preview)] = db.query(quinn, sql, {"id": str(request.id)})
    # A draft of an earlier version has no `repeats`.
    shown = msgspec.convert({"repeats": [], **(preview or {}), "id": str(request.id), "status": status}, Draft)
    shown.forecast = forecast_written(shown.id, interval)
    return shown


def _count_left_out(shown: Found) -> str:
    reasons = ", ".join(f"{left.count} {left.reason}" for left in shown.left_out)
    return f"{shown.matched} people match: {reasons}" if reasons else "nobody matches the audience"


# --- looking at batches -------------------------------------------------------------------------------


def show(quinn: Connection, batch_id: str) -> BatchDetail:
    """Return a batch, with what its owner was shown."""
    sql = """
        SELECT id, name, status, pause_reason, created_at, approved_at, template, vars, query_json,
               not_sent_within_days, send_from, send_until, first_n, recheck, digest, preview
          FROM outreach_batches
         WHERE id = %(id)s
    """
    rows = db.query(quinn, sql, {"id": batch_id})
    if not rows:
        raise Refused(404, f"there is no batch {batch_id}")
    *columns, preview = rows[0]
    names = (
        "id", "name", "status", "pause_reason", "created_at", "approved_at", "template", "vars", "query",
        "not_sent_within_days", "send_from", "send_until", "first_n", "recheck", "digest",
    )  # fmt: skip
    values = dict(zip(names, columns, strict=True))
    return BatchDetail(
        **values,
        counts=_read_counts(quinn, [batch_id]).get(batch_id, Counts()),
        check_first=batches.check_first(values["pause_reason"]) if values["status"] == "paused" else None,
        draft=msgspec.convert({"repeats": [], **preview}, DryRun) if preview else None,
    )


def list_batches(quinn: Connection, after: str | None = None, limit: int = 20) -> Page:
    """Return a page of the batches, the newest first. `after`: the id of the last one before."""
    sql = """
        SELECT id, name, status, pause_reason, created_at, approved_at
          FROM outreach_batches
         WHERE %(after)s::uuid IS NULL
            OR (created_at, id) < (SELECT created_at, id FROM outreach_batches WHERE id = %(after)s::uuid)
         ORDER BY created_at DESC, id DESC
         LIMIT %(limit)s
    """
    rows = db.query(quinn, sql, {"after": after, "limit": limit + 1})
    counts = _read_counts(quinn, [row[0] for row in rows[:limit]])
    found = [BatchSummary(*(*row, counts.get(row[0], Counts()))) for row in rows[:limit]]
    return Page(found, found[-1].id if len(rows) > limit else None)


def list_items(
    quinn: Connection, batch_id: str, status: str | None = None, after: str | None = None, limit: int = MAX_PAGE
) -> Page:
    """Return a page of a batch's items, in the order of sending. `after`: the id of the last one before."""
    sql = """
        SELECT id, client_id::text, status, rendered_body,
               COALESCE((SELECT min(handle) FROM contact_relationships
                          WHERE client_id = item.client_id AND is_primary), handle_key),
               sent_at, failure_reason, status = 'failed' AND outcome_unknown_at IS NOT NULL, attempt
          FROM outreach_batch_items AS item
         WHERE batch_id = %(batch_id)s
           AND (%(status)s::text IS NULL OR status = %(status)s)
           AND (%(after)s::uuid IS NULL
                OR (created_at, id) > (SELECT created_at, id FROM outreach_batch_items WHERE id = %(after)s::uuid))
         ORDER BY created_at, id
         LIMIT %(limit)s
    """
    rows = db.query(quinn, sql, {"batch_id": batch_id, "status": status, "after": after, "limit": limit + 1})
    if not rows and after is None:
        show(quinn, batch_id)  # raises Refused if there is no such batch
    found = [Item(*row) for row in rows[:limit]]
    return Page(found, found[-1].id if len(rows) > limit else None)


def _read_counts(quinn: Connection, batch_ids: list[str]) -> dict[str, Counts]:
    sql = """
        SELECT batch_id, status, count(*), count(*) FILTER (WHERE status = 'failed' AND outcome_unknown_at IS NOT NULL)
          FROM outreach_batch_items
         WHERE batch_id = ANY (%(ids)s::uuid[])
         GROUP BY batch_id, status
    """
    found = {batch_id: Counts() for batch_id in batch_ids}
    for batch_id, status, count, unknown in db.query(quinn, sql, {"ids": batch_ids}) if batch_ids else []:
        setattr(found[batch_id], status, count)
        found[batch_id].unknown += unknown
    return found


# --- a test message, and the approval -----------------------------------------------------------------


def send_test(quinn: Connection, icloud: Connection, batch_id: str, to: str, once: uuid.UUID | None = None) -> str:
    """Queue the first person's text for the owner's own handle, valid for 10 minutes; return its queue id.

    `once`: the id of this click; a second call with it queues nothing. The message belongs to no item, and no limit
    or pause holds it: the row has no drafted_at, so the dispatcher leaves it alone.
    """
    first = """
        SELECT rendered_body
          FROM outreach_batch_items
         WHERE batch_id = %(id)s
         ORDER BY created_at, id
         LIMIT 1
    """
    insert = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id, handle_key, valid_until)
        VALUES (%(device_id)s, %(to)s, %(body)s, COALESCE(%(once)s::uuid, gen_random_uuid()), %(key)s,
                now() + %(validity)s::interval)
            ON CONFLICT (batch_item_id) WHERE status <> 'failed' DO NOTHING
        RETURNING id
    """
    queued = "SELECT id FROM icloud.send_queue WHERE batch_item_id = %(once)s AND status <> 'failed'"
    handle = handles.to_send(to) if handles.is_handle(to) else None
    if handle is None:
        raise Refused(400, f"{to!r} is no handle that can be read: {handles.UNREADABLE_REMEDY}")
    detail = show(quinn, batch_id)
    rows = db.query(quinn, first, {"id": batch_id})
    if not rows:
        raise Refused(409, f"the batch {detail.id} has no items")
    if batches.opted_out(icloud, [handle]):
        raise Refused(422, f"{handles.mask_handle(handle)} has opted out: send START from it, or record an opt-in")
    snapshot = pacing.read_snapshot(quinn)
    known = pacing.devices(icloud)
    if snapshot is None or not known:
        raise Refused(409, pacing.NO_DEVICE)
    choices = [device.id for device in pacing.living(known, snapshot.now)]
    device_id = snapshot.settings.device_id if snapshot.settings.device_id in choices else choices[0]
    parameters = {
        "device_id": device_id, "to": handle, "body": rows[0][0], "key": handles.key(handle),
        "validity": TEST_VALIDITY, "once": str(once) if once else None,
    }  # fmt: skip
    rows = db.query(icloud, insert, parameters) or db.query(icloud, queued, parameters)
    return str(rows[0][0])


def send(quinn: Connection, batch_id: str, digest: str, recipients: int, first_n: int | None = None) -> Sent:
    """Approve a batch: draft -> sending; also one that was never approved, or whose approval has lapsed.

    The owner names the digest and the number of recipients that they have seen. Raises Refused if the batch has others.
    The same call again is harmless.
    """
    sql = """
        UPDATE outreach_batches AS batch
           SET status = 'sending', approved_at = now(), resumed_at = now(), pause_reason = NULL,
               first_n = COALESCE(%(first_n)s, CASE WHEN approved_at IS NULL THEN first_n END), updated_at = now()
         WHERE id = %(id)s AND digest = %(digest)s
           AND COALESCE(send_until > now(), true)
           AND (status = 'draft'
                OR (status IN ('sending', 'paused')
                    AND (approved_at IS NULL
                         OR pause_reason = %(lapsed)s
                         OR approved_at + (SELECT approval_days FROM outreach_settings WHERE id = 1)
                                          * interval '1 day' <= now())))
           AND (SELECT count(*) FROM outreach_batch_items WHERE batch_id = batch.id AND status = 'pending')
               = %(recipients)s
        RETURNING status
    """
    before = show(quinn, batch_id)
    if before.digest is None:
        raise Refused(
            409, "the batch was made by hand and has no digest: UPDATE outreach_batches SET status = 'sending'"
        )
    if before.digest != digest:
        raise Refused(409, f"this is not the batch that you have seen: its digest is {before.digest}, not {digest}")
    if before.approved_at and before.status == "sent":
        return Sent(batch_id, "sent", recipients)
    if read_digest(quinn, batch_id) != digest:
        raise Refused(409, "its messages were changed since the draft: make a new draft, and look at it")
    parameters = {
        "id": batch_id, "digest": digest, "recipients": recipients, "first_n": first_n, "lapsed": batches.LAPSED,
    }  # fmt: skip
    if not db.query(quinn, sql, parameters):
        _check_repeated(show(quinn, batch_id), recipients, first_n)
    return Sent(batch_id, "sending", recipients)


def _check_repeated(batch: BatchDetail, recipients: int, first_n: int | None) -> None:
    """Raise Refused unless a batch is being sent already as this approval asks."""
    if batch.send_until and batch.send_until <= datetime.now(UTC):
        raise Refused(409, f"it could be sent until {batch.send_until:%Y-%m-%d %H:%M %Z}: make a new draft")
    counts = batch.counts
    # What was sent since the approval is no longer pending.
    total = counts.pending + counts.queued + counts.sent + counts.failed + counts.skipped
    is_sending = batch.status == "sending" and batch.approved_at is not None
    most = total if is_sending else counts.pending
    if batch.status in ("draft", "sending", "paused") and not counts.pending <= recipients <= most:
        found = "1 recipient" if counts.pending == 1 else f"{counts.pending} recipients"
        raise Refused(409, f"it has {found}, not {recipients}: look at it again")
    if not is_sending:
        remedy = "; resume goes on with it" if batch.status == "paused" else ""
        raise Refused(409, f"the batch is {batch.status}: only a draft can be sent{remedy}")
    if first_n not in (None, batch.first_n):
        now = f"until {batch.first_n} are sent" if batch.first_n else "to all"
        raise Refused(409, f"it is being sent already, {now}: pause it, to stop it earlier")


def read_digest(quinn: Connection, batch_id: str) -> str:
    """Return the digest of a batch's items as they are stored now."""
    sql = """
        SELECT COALESCE(handle_key, ''), rendered_body
          FROM outreach_batch_items
         WHERE batch_id = %(id)s
         ORDER BY created_at, id
    """
    digest = hashlib.sha256()
    with transaction(quinn, is_read_only=True), quinn.cursor(name="items") as cursor:
        cursor.itersize = recipients.CHUNK
        cursor.execute(sql, {"id": batch_id})
        for handle_key, body in cursor:
            add_to_digest(digest, handle_key, body)
    return digest.hexdigest()
