"""Keep what the owner is composing on the page, as it was typed; turn it into a request for a draft and back.

Used by the owner's page. Touches outreach_compositions in quinn. What was typed is kept at each step, so a reload, the
back button, a phone that closes the tab and an ended session lose nothing. Example:

    saved = compositions.save(quinn, composition_id, version, form)
    request, errors = compositions.to_request(form, fields, zone)

Two tabs with one composition: the second one that saves another text gets a composition of its own. So neither
overwrites what the other one wrote.
"""

import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime, tzinfo
from typing import Any, NamedTuple

import msgspec

import audience
import audience_rows
import composing
import db
from audience_rows import Row
from batches import Refused
from client_fields import Fields, QueryError

KEPT = "30 days"  # after the last save
MAX_LISTED = 20
MODES = ("", "all", "any", "everyone", "json")
LOCAL_TIME = "%Y-%m-%dT%H:%M"  # as a browser's field for date and time has it
# The field of the form that a refusal of composing.Request is about, by the name in JSON.
FORM_FIELDS = {
    "name": "name", "template": "text", "vars": "vars", "notSentWithinDays": "days", "sendFrom": "send_from",
    "sendUntil": "send_until", "firstN": "first_n",
}  # fmt: skip

Connection = Any  # psycopg2's connection
Errors = dict[str, str]  # sentences, by the field of the form


class ComposeForm(msgspec.Struct):
    """The fields of the form as they were typed. `tab`: the page that they were typed in, a random text. `sequence`
    counts what that page sends: two of its requests may arrive in the other order.
    """

    name: str = ""
    mode: str = ""  # of MODES; "" as long as nothing was chosen
    rows: list[Row] = []
    json: str = ""
    limit: str = ""
    days: str = ""
    text: str = ""
    vars: str = ""  # a line `key = value` each
    send_from: str = ""
    send_until: str = ""
    first_n: str = ""
    recheck: bool = True
    tab: str = ""
    sequence: int = 0


class Composition(NamedTuple):
    """A composition that is kept. `status`: of the draft that was made of it, if there is one."""

    id: str
    version: int
    form: ComposeForm
    batch_id: str
    updated_at: datetime
    status: str | None


class Saved(NamedTuple):
    """Where a form was saved. `is_fork`: under a new id, because another tab had changed the composition."""

    id: str
    version: int
    is_fork: bool = False


# --- keeping it ---------------------------------------------------------------------------------------


def save(quinn: Connection, composition_id: str, version: int, form: ComposeForm) -> Saved:
    """Keep a form. `version`: of the composition that the page showed, 0 for a new one."""
    delete_old = "DELETE FROM outreach_compositions WHERE updated_at < now() - %(kept)s::interval"
    insert = """
        INSERT INTO outreach_compositions (id, form) VALUES (%(id)s, %(form)s) ON CONFLICT DO NOTHING RETURNING version
    """
    # The same tab may not have received the response to its last save; and an older request of it may come later.
    find_newer = """
        SELECT version FROM outreach_compositions
         WHERE id = %(id)s AND form ->> 'tab' = %(tab)s AND (form ->> 'sequence')::integer > %(sequence)s
    """
    update = """
        UPDATE outreach_compositions
           SET form = %(form)s, version = version + 1, updated_at = now()
         WHERE id = %(id)s
           AND (form ->> 'tab' <> %(tab)s OR (form ->> 'sequence')::integer <= %(sequence)s)
           AND (version = %(version)s OR form ->> 'tab' = %(tab)s
                OR form - '{tab,sequence}'::text[] = %(form)s::jsonb - '{tab,sequence}'::text[])
        RETURNING version
    """
    db.query(quinn, delete_old, {"kept": KEPT})
    text = json.dumps(_storable(msgspec.to_builtins(form)), ensure_ascii=False)
    values = {"id": composition_id, "version": version, "form": text, "tab": form.tab, "sequence": form.sequence}
    for sql in (insert, find_newer, update):
        if rows := db.query(quinn, sql, values):
            return Saved(composition_id, rows[0][0])
    forked = str(uuid.uuid4())
    [(version,)] = db.query(quinn, insert, {**values, "id": forked})
    return Saved(forked, version, is_fork=True)


def _storable(value: Any) -> Any:
    """Return JSON without characters that no text in the database can contain."""
    if isinstance(value, dict):
        return {key: _storable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(part) for part in value]
    return db.replace_unstorable(value) if isinstance(value, str) else value


def find(quinn: Connection, composition_id: str) -> Composition | None:
    """Return a composition, and the status of its draft."""
    sql = """
        SELECT composition.id::text, version, form, batch_id::text, composition.updated_at, batch.status
          FROM outreach_compositions AS composition
          LEFT JOIN outreach_batches AS batch ON batch.id = batch_id
         WHERE composition.id = %(id)s
    """
    rows = db.query(quinn, sql, {"id": composition_id})
    return _composition(rows[0]) if rows else None


def unfinished(quinn: Connection) -> list[Composition]:
    """Return what was begun and is not being sent, the newest first."""
    sql = """
        SELECT composition.id::text, version, form, batch_id::text, composition.updated_at, batch.status
          FROM outreach_compositions AS composition
          LEFT JOIN outreach_batches AS batch ON batch.id = batch_id
         WHERE batch.status IS NULL OR batch.status = 'draft'
         ORDER BY composition.updated_at DESC
         LIMIT %(limit)s
    """
    return [_composition(row) for row in db.query(quinn, sql, {"limit": MAX_LISTED})]


def _composition(row: db.Row) -> Composition:
    composition_id, version, form, batch_id, updated_at, status = row
    return Composition(composition_id, version, msgspec.convert(form, ComposeForm), batch_id, updated_at, status)


def delete(quinn: Connection, composition_id: str) -> None:
    """Throw a composition away; its draft stays."""
    db.query(quinn, "DELETE FROM outreach_compositions WHERE id = %(id)s", {"id": composition_id})


def of_batch(quinn: Connection, batch_id: str) -> str | None:
    """Return the id of the composition of a draft."""
    rows = db.query(quinn, "SELECT id::text FROM outreach_compositions WHERE batch_id = %(id)s", {"id": batch_id})
    return str(rows[0][0]) if rows else None


def renew_batch_id(quinn: Connection, composition_id: str, batch_id: str) -> str:
    """Choose a new id for the draft, unless another request has just done so; return the id that counts."""
    sql = """
        UPDATE outreach_compositions SET batch_id = gen_random_uuid() WHERE id = %(id)s AND batch_id = %(batch_id)s
    """
    db.query(quinn, sql, {"id": composition_id, "batch_id": batch_id})
    rows = db.query(quinn, "SELECT batch_id::text FROM outreach_compositions WHERE id = %(id)s", {"id": composition_id})
    if not rows:
        raise Refused(404, "this has been thrown away in the meantime")
    return str(rows[0][0])


# --- from what was typed to a request -----------------------------------------------------------------


def to_query(form: ComposeForm, fields: Fields) -> tuple[dict[str, Any] | None, Errors]:
    """Return the audience of a form, normalised; or None, and what is wrong with it."""
    errors: Errors = {}
    limit = _whole(form.limit, "limit", errors)
    try:
        query = _where(form, fields)
    except audience_rows.RowError as error:
        errors["rows" if error.row is None else f"value-{error.row}"] = _sentence(str(error))
        return None, errors
    except (QueryError, ValueError) as error:
        errors["json"] = _sentence(str(error))
        return None, errors
    if limit:
        query = {**query, "limit": limit}
    return (None if errors else query), errors


def _where(form: ComposeForm, fields: Fields) -> dict[str, Any]:
    """Return the audience without the limit of the form. Raises RowError, QueryError and ValueError."""
    if form.mode == "everyone":
        return {"v": audience.VERSION, "where": {"everyone": True}}
    if form.mode == "json":
        try:
            document = json.loads(form.json)
        except (ValueError, RecursionError):
            raise ValueError("This is no JSON: a bracket, a comma or a quote may be missing.") from None
        return audience.parse(document, fields)
    if form.mode not in ("all", "any"):
        raise audience_rows.RowError(None, "Say who is meant: add a condition, or choose everyone.")
    return audience_rows.to_query(form.mode, form.rows, fields)


def to_request(form: ComposeForm, fields: Fields, zone: tzinfo | None) -> tuple[composing.Request | None, Errors]:
    """Return the request for a draft of a form, without an id; or None, and what is wrong with it.

    Only what can be seen without the clients: composing.py checks the text. `zone`: the owner's.
    """
    query, errors = to_query(form, fields)
    document = {
        "query": query or {},
        "name": form.name.strip() or None,
        "template": form.text if form.text.strip() else None,
        "vars": read_vars(form.vars, errors),
        "notSentWithinDays": _whole(form.days, "days", errors),
        "sendFrom": _moment(form.send_from, "send_from", zone, errors),
        "sendUntil": _moment(form.send_until, "send_until", zone, errors),
        "firstN": _whole(form.first_n, "first_n", errors),
        "recheck": form.recheck,
    }
    try:
        request = msgspec.convert(document, composing.Request)
    except msgspec.ValidationError as error:
        named = re.search(rf"`(?:\$\.)?({'|'.join(FORM_FIELDS)})\b", str(error))
        sentence = re.sub(r" - at `\$\.\w+`", "", str(error))
        errors.setdefault(FORM_FIELDS[named[1]] if named else "text", _sentence(_plain(sentence)))
        return None, errors
    return (None if errors else request), errors


def _plain(text: str) -> str:
    """Say a refusal of msgspec in words for a person."""
    if match := re.search(r"`str` of length <= (\d+)", text):
        return f"it has more than {int(match[1]):,} characters"
    if match := re.search(r"`int` <= (\d+)", text):
        return f"it must be at most {int(match[1]):,}"
    if "`int` >= 1" in text:
        return "it must be 1 or more"
    if "surrogate" in text:
        return "a character in the name, the text or its values cannot be sent: remove it, and type it again"
    return text.replace("`sendUntil` must be after `sendFrom`", "the end must be after the beginning")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def _whole(text: str, name: str, errors: Errors) -> int | None:
    digits = text.strip().replace(",", "")
    if not digits:
        return None
    if not re.fullmatch("[0-9]{1,9}", digits) or int(digits) == 0:
        errors[name] = "Type a whole number from 1, or leave it empty."
        return None
    return int(digits)


def _moment(text: str, name: str, zone: tzinfo | None, errors: Errors) -> str | None:
    """Return an instant with its offset. What was typed is a time of day in the owner's zone."""
    if not text.strip():
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
        local = moment if moment.tzinfo else moment.replace(tzinfo=zone) if zone else moment.astimezone()
        return local.isoformat()
    except (ValueError, OverflowError):
        errors[name] = "This is no date with a time. Write it as 2026-03-01 09:00."
        return None


def read_vars(text: str, errors: Errors) -> dict[str, str]:
    """Return the values of vars.* that were typed, a line `key = value` each."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        key, sign, value = line.partition("=")
        if not sign or not key.strip():
            errors["vars"] = f"Line {number} has no “=”. Write a line such as: code = SPRING"
            continue
        if key.strip() in found:
            errors["vars"] = f"Line {number}: {key.strip()} has a value already."
        found[key.strip()] = value.strip()
    return found


# --- from a batch or an import to a form --------------------------------------------------------------


def from_query(query: Mapping[str, Any], fields: Fields) -> ComposeForm:
    """Return a form with an audience: rows if they can express it, else JSON."""
    limit = str(query["limit"]) if isinstance(query.get("limit"), int) else ""
    document = {key: value for key, value in query.items() if key != "limit"}
    found = audience_rows.from_query(document, fields)
    if found is None:
        return ComposeForm(mode="json", json=json.dumps(document, ensure_ascii=False, indent=2), limit=limit)
    return ComposeForm(mode=found[0], rows=found[1], limit=limit)


def from_batch(batch: composing.BatchDetail, fields: Fields, zone: tzinfo | None) -> ComposeForm:
    """Return the form of a batch, to change it or to write something like it."""

    def local(moment: datetime | None) -> str:
        return f"{moment.astimezone(zone):{LOCAL_TIME}}" if moment else ""

    form = from_query(batch.query, fields)
    form.name = batch.name or ""
    form.text = batch.template
    form.vars = "\n".join(f"{key} = {value}" for key, value in sorted(batch.vars.items()))
    form.days = str(batch.not_sent_within_days or "")
    form.send_from, form.send_until = local(batch.send_from), local(batch.send_until)
    form.first_n = str(batch.first_n or "")
    form.recheck = batch.recheck
    return form


def request_of(batch: composing.BatchDetail) -> composing.Request:
    """Return the request that made a batch."""
    return composing.Request(
        query=batch.query,
        id=uuid.UUID(batch.id),
        name=batch.name,
        template=batch.template,
        vars=batch.vars,
        not_sent_within_days=batch.not_sent_within_days,
        send_from=batch.send_from,
        send_until=batch.send_until,
        first_n=batch.first_n,
        recheck=batch.recheck,
    )
