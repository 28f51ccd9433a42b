"""The page New: choose who, write the text with a preview of real people, and make a draft of it.

Used by outreach_server.py. compositions.py keeps what was typed, audience_rows.py has the conditions, previews.py the
preview; composing.py makes the draft. page_check.py shows the draft and sends it, page_import.py takes a file. Each
button of the form saves it first; then the answer leads to a page that can be reloaded.
"""

import secrets
import time
import uuid
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

import audience
import audience_rows
import batches
import composing
import compositions
import page
import previews
import runtime
import screens
import setting_fields
import uploads
from audience_rows import Row
from client_fields import Fields
from compositions import ComposeForm, Composition, Errors

CREATED_BY = "owner's page"  # outreach_batches.created_by
FRESH = timedelta(minutes=15)  # an older draft of the same text is written again: the clients may have changed
FIELDS_LIFE = 20  # seconds
LISTED = 500  # people of one reason on a page
NOT_CHOSEN = Row("", "eq", "")


class RowView(NamedTuple):
    """One condition, with what it offers."""

    number: int
    row: Row
    operators: list[tuple[str, str]]
    values: list[audience_rows.Choice]
    is_closed: bool
    is_date: bool
    is_unknown: bool  # nobody has the field any more


class Shown(NamedTuple):
    """What the page says about a form: the preview of real people, or why there is none."""

    preview: previews.Preview | None
    errors: Errors
    place: previews.Place | None = None  # of the text's error


# --- the pages ----------------------------------------------------------------------------------------


def start(call: page.Call) -> page.Answer:
    """GET new: what was begun, and an empty form; `?from=BATCH` and `?import=UPLOAD` fill it."""
    is_filled = call.query.has("from") or call.query.has("import")
    fields = audience.read_fields(call.quinn) if is_filled else known_fields(call)
    form = ComposeForm(mode="all", rows=[NOT_CHOSEN])
    if (batch_id := call.query.text("from")) and runtime.is_uuid(batch_id):
        form = compositions.from_batch(composing.show(call.quinn, batch_id), fields, call.formatter.zone)
    elif (import_id := call.query.text("import")) and runtime.is_uuid(import_id):
        form = compositions.from_query(uploads.audience(import_id), fields)
    return _render(call, form, str(uuid.uuid4()), 0, fields, begun=compositions.unfinished(call.quinn))


def show(call: page.Call, composition_id: str) -> page.Answer:
    """GET new/ID: a composition; with `?preview=1`, what it would be."""
    composition_id = check_id(composition_id)
    found = compositions.find(call.quinn, composition_id)
    if found is None:
        composing.show(call.quinn, composition_id)  # raises Refused if it is no batch either
        return call.redirect(f"/new/check/{composition_id}")
    has_preview = call.query.has("preview")
    fields = audience.read_fields(call.quinn) if has_preview else known_fields(call)
    is_draft = call.query.text("preview") == "draft"
    shown = examine(call, found.form, fields, is_draft) if has_preview else None
    return _render(call, found.form, found.id, found.version, fields, shown, found)


class KnownFields:
    """The fields that were read last, by database: to find the keys of 100,000 clients takes 35 ms."""

    found: ClassVar[dict[str, tuple[float, Fields]]] = {}


def known_fields(call: page.Call) -> Fields:
    """Return the fields to choose from, as they were at most FIELDS_LIFE seconds ago.

    A preview and a draft read them again.
    """
    read_at, fields = KnownFields.found.get(call.site.quinn_url, (-FIELDS_LIFE, None))
    if fields is None or time.monotonic() - read_at > FIELDS_LIFE:
        fields = audience.read_fields(call.quinn)
        KnownFields.found[call.site.quinn_url] = (time.monotonic(), fields)
    return fields


def save(call: page.Call, composition_id: str) -> page.Answer:
    """POST new/ID: keep what was typed, and do what the button says."""
    composition_id = check_id(composition_id)
    action = call.form.text("do", "preview")
    name, _, number = action.partition("-")
    if name == "delete":
        compositions.delete(call.quinn, composition_id)
        return call.redirect("/new", "It is thrown away.")
    form = read_form(call.form)
    if name == "add":
        form.mode = form.mode if form.mode in ("all", "any") else "all"
        form.rows = [*form.rows, NOT_CHOSEN][: audience_rows.MAX_ROWS]
    elif name == "remove" and number.isdigit():
        form.rows = [row for index, row in enumerate(form.rows) if index != int(number)]
    saved = compositions.save(call.quinn, composition_id, version_of(call.form), form)
    text = (
        "Another tab has changed this in the meantime. What you wrote here is a copy of its own."
        if saved.is_fork
        else None
    )
    kind = "problem" if saved.is_fork else "done"
    if name == "draft":
        return make_draft(call, saved, form)
    anchor = {"add": f"#row-{len(form.rows) - 1}", "remove": "#who", "count": "#who"}.get(name, "#preview")
    has_preview = "" if name in ("add", "remove") else "?preview=1"
    # A message is at the top of the page.
    return call.redirect(f"/new/{saved.id}{has_preview}{'' if text else anchor}", text, kind)


def make_draft(call: page.Call, saved: compositions.Saved, form: ComposeForm) -> page.Answer:
    """Write the draft, and go to the page that shows it; or go back to the form, which says what is wrong."""
    fields = audience.read_fields(call.quinn)
    request, _ = compositions.to_request(form, fields, call.formatter.zone)
    if request is None or not request.template:
        return call.redirect(f"/new/{saved.id}?preview=draft#preview")
    found = compositions.find(call.quinn, saved.id)
    if found is None:
        page.refuse(404, "This has been thrown away in the meantime.")
    try:
        made = write_draft(call, found, request)
    except batches.Refused as refused:
        if refused.status == 400 or "nobody would get" in str(refused):
            return call.redirect(f"/new/{saved.id}?preview=draft#preview")
        return call.redirect(f"/new/{saved.id}?preview=draft", page.as_sentence(str(refused)), "problem")
    return call.redirect(f"/new/check/{made.id}")


def write_draft(call: page.Call, found: Composition, request: composing.Request) -> composing.Draft:
    """Write the draft of a composition; end its last draft if that is another one, or an old one.

    A second request for the same, such as a double click, finds the draft that the first one has made.
    """
    batch_id = found.batch_id
    if found.status and _must_renew(call, found, request):
        batch_id = compositions.renew_batch_id(call.quinn, found.id, found.batch_id)
        if found.status == "draft":
            batches.cancel(call.quinn, call.icloud, found.batch_id)
    request.id = uuid.UUID(batch_id)
    return composing.draft(call.quinn, call.icloud, request, call.site.interval, CREATED_BY)


def _must_renew(call: page.Call, found: Composition, request: composing.Request) -> bool:
    """Return whether the last draft of a composition is another one, an old one, or cancelled."""
    last = composing.show(call.quinn, found.batch_id)
    if last.status == "cancelled" or (last.status == "draft" and call.formatter.now - last.created_at > FRESH):
        return True
    request.id = uuid.UUID(last.id)
    return not composing.is_same_request(call.quinn, request)


def left_out(call: page.Call, composition_id: str, reason: str) -> page.Answer:
    """GET new/ID/left-out/REASON: the people who are left out for one reason."""
    found = compositions.find(call.quinn, check_id(composition_id))
    if found is None:
        page.refuse(404, "There is no such page any more.")
    fields = audience.read_fields(call.quinn)
    request, _ = compositions.to_request(found.form, fields, call.formatter.zone)
    if request is None:
        return call.redirect(f"/new/{found.id}?preview=1#preview")
    return render_left_out(call, request, reason, f"/new/{found.id}?preview=1#preview")


def render_left_out(call: page.Call, request: composing.Request, reason: str, back: str) -> page.Answer:
    """Return the page of the people who are left out for one reason."""
    found = composing.people_left_out(call.quinn, call.icloud, request, reason, None, LISTED)
    words = screens.REASONS.get(reason, reason)
    return call.render("left_out.html", people=found.entries, has_more=found.after is not None, reason=words, back=back)


# --- the form -----------------------------------------------------------------------------------------


def read_form(form: page.Form) -> ComposeForm:
    """Return what was typed."""
    numbers = [name.removeprefix("field-") for name, _ in form.pairs if name.startswith("field-")]
    rows = [Row(form.text(f"field-{n}"), form.text(f"op-{n}"), form.text(f"value-{n}")) for n in numbers]
    mode = form.text("mode")
    return ComposeForm(
        name=form.text("name"),
        mode=mode if mode in compositions.MODES else "",
        rows=rows[: audience_rows.MAX_ROWS],
        json=form.text("json"),
        limit=form.text("limit"),
        days=form.text("days"),
        text=form.text("text"),
        vars=form.text("vars"),
        send_from=form.text("send_from"),
        send_until=form.text("send_until"),
        first_n=form.text("first_n"),
        recheck=form.has("recheck"),
        tab=form.text("tab"),
        sequence=_number(form.text("sequence")),
    )


def version_of(form: page.Form) -> int:
    """Return the version of the composition that the page showed; 0 for a new one."""
    return _number(form.text("version"))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0


def examine(call: page.Call, form: ComposeForm, fields: Fields, is_draft: bool) -> Shown:
    """Return the preview of a form, or what is wrong with it, at its fields. `is_draft`: a text is needed, too."""
    request, errors = compositions.to_request(form, fields, call.formatter.zone)
    if request is None:
        return Shown(None, errors)
    if not request.template and is_draft:
        errors["text"] = "Write the text."
    try:
        return Shown(previews.preview(call.quinn, call.icloud, request, call.site.interval), errors)
    except batches.Refused as refused:
        sentence = page.as_sentence(str(refused).removeprefix("the text, "))
        data: Any = refused.data or {}
        if "line" not in data:
            return Shown(None, {"rows": sentence})
        place = previews.place(form.text, data["line"], data["column"])
        return Shown(None, {"text": sentence}, place)


def _render(
    call: page.Call, form: ComposeForm, composition_id: str, version: int, fields: Fields,
    shown: Shown | None = None, found: Composition | None = None, begun: list[Composition] | None = None,
) -> page.Answer:  # fmt: skip
    return call.render(
        "new.html",
        form=form,
        id=composition_id,
        version=version,
        tab=secrets.token_urlsafe(9),
        rows=[view(call, number, row, fields) for number, row in enumerate(form.rows)],
        groups=_groups(fields),
        variables=previews.variables(fields),
        zone=call.formatter.name,
        shown=shown,
        errors=shown.errors if shown else {},
        found=found,
        begun=begun or [],
        reasons=screens.REASONS,
        day=call.formatter.day,
        limit_words=limit_words,
    )


def limit_words(name: str | None) -> str:
    """Return what decides when the last message goes; a setting by its label."""
    field = setting_fields.fields().get(name or "")
    return field.meaning.label if field else name or ""


def view(call: page.Call, number: int, row: Row, fields: Fields) -> RowView:
    """Return a condition with the operators and values that its field has."""
    return RowView(
        number,
        row,
        audience_rows.operator_choices(row.field, fields),
        audience_rows.values(call.quinn, row.field, fields),
        audience_rows.is_closed(row.field, row.operator, fields),
        audience_rows.is_date_field(row.field, fields),
        row.field not in {"", *(choice.name for choice in audience_rows.field_choices(fields))},
    )


def _groups(fields: Fields) -> dict[str, list[audience_rows.FieldChoice]]:
    groups: dict[str, list[audience_rows.FieldChoice]] = {}
    for choice in audience_rows.field_choices(fields):
        groups.setdefault(choice.group, []).append(choice)
    return groups


def check_id(text: str) -> str:
    """Return an id in lower case. Raises Refusal if it is none."""
    if not runtime.is_uuid(text):
        page.refuse(404, "There is no page at this address.")
    return text.lower()


ROUTES = [
    page.Route("GET", "/new", start),
    page.Route("GET", "/new/<composition_id>", show),
    page.Route("POST", "/new/<composition_id>", save),
    page.Route("GET", "/new/<composition_id>/left-out/<reason>", left_out),
]
