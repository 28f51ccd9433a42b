"""Take a CSV file on the page New: show its errors in its rows and what it would change, import it, and go on with it.

Used by outreach_server.py. uploads.py keeps the file from the upload to the import; importing.py plans and imports.
The form of page_new.py sends the file together with all else that was typed, which is saved first.
"""

import re
from typing import NamedTuple

from bottle import request

import audience
import batches
import compositions
import importing
import page
import page_new
import screens
import uploads
from page_templates import count

UPLOAD = "/new/upload"
ENCODINGS = ("", "windows-1252", "mac-roman", "iso-8859-15")
# Options of the command line in a refusal, and what they are called on the page.
OPTIONS = {
    "name the one with the phone number or e-mail address, --handle COLUMN":
        "choose below the one with the phone number or e-mail address",
    "--handle COLUMN": "choose it below", "--ignore COLUMN": "the list “Leave out” below",
    "--encoding windows-1252": "choose its encoding below", "--name": "the name", "--handle": "the address",
    "--ignore": "leave out", "DEFAULT_REGION": "your country",
}  # fmt: skip


class BadRow(NamedTuple):
    """A row of the file that is left out: its cells, which of them is wrong, and why."""

    line: int
    cells: list[str]
    wrong: int | None
    reason: str


class Seen(NamedTuple):
    """What the page shows of a file that can be read."""

    plan: importing.Plan
    header: list[str]
    bad_rows: list[BadRow]


def upload(call: page.Call) -> page.Answer:
    """POST new/upload: keep what was typed, and the file; go to its plan."""
    composition_id = page_new.check_id(call.form.text("id"))
    form = page_new.read_form(call.form)
    saved = compositions.save(call.quinn, composition_id, page_new.version_of(call.form), form)
    file = call.form.files.get("file")
    content = file.file.read() if file else b""
    if file is None or not content:
        text = "Choose a file first: it was empty, or none was chosen."
        return call.redirect(f"/new/{saved.id}", text, "problem")
    name = re.split(r"[/\\]", file.raw_filename)[-1]
    upload_id = uploads.add(call.quinn, content, name)
    return call.redirect(f"/new/file/{upload_id}?for={saved.id}")


def show(call: page.Call, upload_id: str, status: int = 200, problem: str | None = None) -> page.Answer:
    """GET new/file/ID: the errors of a file in their rows, and what it would change."""
    upload_id = page_new.check_id(upload_id)
    kept = uploads.find(call.quinn, upload_id)
    target = _target(call)
    if kept.applied_at:
        return call.redirect(f"/new?import={upload_id}" if target is None else f"/new/{target}?preview=1#who")
    errors: dict[str, str] = {"": problem} if problem else {}
    seen = None
    try:
        seen = read(call, kept)
    except importing.ImportRefused as refused:
        errors["columns"] = page.as_sentence(_words(str(refused)))
    header = uploads.header(call.quinn, upload_id, kept.options.encoding)
    return call.render(
        "import.html",
        status,
        upload=kept,
        seen=seen,
        header=header,
        encodings=ENCODINGS,
        target=target,
        earlier=uploads.earlier(call.quinn, upload_id),
        read_as=screens.read_as(seen.plan) if seen else "",
        notes=[_words(note) for note in seen.plan.notes] if seen else [],
        day=call.formatter.day,
        errors=errors,
    )


def read(call: page.Call, kept: uploads.Upload) -> Seen:
    """Return the plan of a file, and its bad rows. Raises ImportRefused."""
    plan = uploads.plan(call.quinn, call.icloud, kept.id).plan
    bad = importing.bad_lines(call.quinn, limit=uploads.MAX_RAW_ROWS)
    header, cells = uploads.read_rows(call.quinn, kept.id, kept.options.encoding, [line.line for line in bad])
    rows = []
    for line in bad:
        wrong = header.index(line.column) if line.column in header else None
        rows.append(BadRow(line.line, cells.get(line.line, []), wrong, page.as_sentence(_words(line.reason))))
    return Seen(plan, header, rows)


def _words(text: str) -> str:
    """Say a refusal without the options of the command line."""
    for option, words in OPTIONS.items():
        text = text.replace(option, words)
    return text


def change(call: page.Call, upload_id: str) -> page.Answer:
    """POST new/file/ID: say which column is what, or import the file."""
    upload_id, target = page_new.check_id(upload_id), _target(call)
    query = f"?for={target}" if target else ""
    if call.form.text("do") == "columns":
        handle, name, encoding = (call.form.text(field) for field in ("handle", "name", "encoding"))
        options = uploads.Options(
            handle=[handle] if handle else [],
            name=name or None,
            ignore=[each for each in call.form.texts("ignore") if each],
            encoding=encoding if encoding in ENCODINGS and encoding else None,
        )
        uploads.set_options(call.quinn, upload_id, options)
        return call.redirect(f"/new/file/{upload_id}{query}")
    return apply(call, upload_id, target)


def apply(call: page.Call, upload_id: str, target: str | None) -> page.Answer:
    """Import the file as the page has shown it, and go on with its people. A second click finds it imported."""
    kept = uploads.find(call.quinn, upload_id)
    if kept.applied_at is None:
        try:
            job = uploads.plan(call.quinn, call.icloud, upload_id)
            if job.plan.has_many_renames and call.form.text("renames").strip() != str(job.plan.renames):
                sentence = f"Type {job.plan.renames} if so many people are to be renamed. Nothing was imported."
                return show(call, upload_id, 400, sentence)
            applied = uploads.apply(call.quinn, upload_id, job, call.form.text("digest"))
        except (importing.ImportRefused, batches.Refused) as refused:
            if uploads.find(call.quinn, upload_id).applied_at is None:
                return show(call, upload_id, refused.status, page.as_sentence(str(refused)))
            return go_on(call, upload_id, target, "The file is imported.")
        made, changed = count(applied.made, "new person", "new people"), f"{applied.changed:,} changed"
        return go_on(call, upload_id, target, f"Imported: {made}, {changed}, {applied.same:,} known already.")
    return go_on(call, upload_id, target, "The file was imported already.")


def go_on(call: page.Call, upload_id: str, target: str | None, text: str) -> page.Answer:
    """Make the people of a file the audience of the composition, and go there."""
    found = compositions.find(call.quinn, target) if target else None
    if found is None:
        return call.redirect(f"/new?import={upload_id}", text)
    page_new.KnownFields.found.clear()
    people = compositions.from_query(uploads.audience(upload_id), audience.read_fields(call.quinn))
    form = found.form
    form.mode, form.rows, form.limit = people.mode, people.rows, ""
    saved = compositions.save(call.quinn, found.id, found.version, form)
    return call.redirect(f"/new/{saved.id}?preview=1", text)


def _target(call: page.Call) -> str | None:
    """Return the id of the composition that the file is for."""
    text = call.query.text("for") or (call.form.text("for") if request.method == "POST" else "")
    return page_new.check_id(text) if text else None


ROUTES = [
    page.Route("POST", UPLOAD, upload),
    page.Route("GET", "/new/file/<upload_id>", show),
    page.Route("POST", "/new/file/<upload_id>", change),
]
