"""The pages of batches: the list, one batch with its progress, items and failures, and the verbs for it.

Used by outreach_server.py. Reads through composing.py and report.py; the verbs are those of batches.py.
"""

import csv
import io
import re
import tempfile
import threading
import time
from typing import Any, NamedTuple

import batches
import composing
import db
import page
import page_today
import people
import report
import runtime
import setting_fields
from page_templates import count, plain

PER_PAGE = 50  # items, and batches, on one page
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run
COLUMNS = ("name", "handle", "status", "sentAt", "reason", "mayHaveBeenSent", "attempt", "text")
# The items of each tab, as outreach_batch_items.status has them; None: all.
TABS = {
    "all": None, "pending": "pending", "queued": "queued", "sent": "sent", "failed": "failed", "skipped": "skipped",
}  # fmt: skip


class Reason(NamedTuple):
    """Why items failed or were left out, and how many. `is_unknown`: they may have been sent."""

    status: str
    reason: str
    number: int
    is_unknown: bool


def index(call: page.Call) -> page.Answer:
    """GET batch: all batches, newest first."""
    found = composing.list_batches(call.quinn, _after(call), PER_PAGE)
    return call.render("batches.html", found=found)


def show(call: page.Call, batch_id: str, status: int = 200, errors: dict[str, str] | None = None) -> page.Answer:
    """GET batch/ID."""
    batch_id = check_id(batch_id)
    detail = composing.show(call.quinn, batch_id)
    counts = detail.counts
    tab = call.query.text("show", "failed" if counts.failed else "all")
    tab = tab if tab in TABS else "all"
    items = composing.list_items(call.quinn, batch_id, TABS[tab], _after(call), PER_PAGE)
    total = counts.pending + counts.queued + counts.sent + counts.failed + counts.skipped
    return call.render(
        "batch.html",
        status,
        batch=detail,
        title=page_today.title(batch_id, detail.name),
        total=total,
        ended=counts.sent + counts.failed + counts.skipped,
        line=read_line(call, batch_id) if detail.status == "sending" else None,
        reasons=read_reasons(call, batch_id) if counts.failed or counts.skipped else [],
        unknown=read_unknown(call, batch_id) if counts.unknown else [],
        items=items,
        known=people.by_id(call.quinn, [item.client_id for item in items.entries]),
        tab=tab,
        tabs={name: total if name == "all" else getattr(counts, name) for name in TABS},
        is_lapsed=detail.pause_reason == batches.LAPSED,
        seen_at=int(time.time()),
        in_words=setting_fields.in_words,
        errors=errors or {},
    )


class Line(NamedTuple):
    """What the report says of a batch that is being sent. `sentence`: why it is held, or that it is being sent.

    `needs_owner`: it goes on only after somebody has done something, so no end can be told.
    """

    line: report.BatchLine
    sentence: str
    needs_owner: bool


def read_line(call: page.Call, batch_id: str) -> Line | None:
    """Return when the batch is finished, and what holds it; None if the report cannot say it."""
    seen = page_today.read_report(call)
    line = next((line for line in seen.batches or () if line.id == batch_id), None)
    if line is None:
        return None
    if seen.verdict.state != "sending":
        return Line(line, seen.verdict.sentence, seen.verdict.needs_operator)
    return Line(line, f"Held: {line.hold}." if line.hold else "Sending.", needs_owner=False)


def read_reasons(call: page.Call, batch_id: str) -> list[Reason]:
    """Return the reasons of a batch, the most frequent one first."""
    sql = """
        SELECT status, COALESCE(failure_reason, 'no reason given'), count(*),
               status = 'failed' AND outcome_unknown_at IS NOT NULL
          FROM outreach_batch_items
         WHERE batch_id = %(id)s AND status IN ('failed', 'skipped')
         GROUP BY 1, 2, 4
         ORDER BY 1, 3 DESC
         LIMIT 20
    """
    return [Reason(*row) for row in db.query(call.quinn, sql, {"id": batch_id})]


def read_unknown(call: page.Call, batch_id: str) -> list[str]:
    """Return whom a second message may reach if the items of unknown outcome are sent again."""
    sql = """
        SELECT client_id::text, COALESCE(handle_key, '')
          FROM outreach_batch_items
         WHERE batch_id = %(id)s AND status = 'failed' AND outcome_unknown_at IS NOT NULL AND erased_at IS NULL
         ORDER BY created_at, id
         LIMIT 100
    """
    rows = db.query(call.quinn, sql, {"id": batch_id})
    known = people.by_id(call.quinn, [client_id for client_id, _ in rows])
    names = ((known[client_id].name if client_id in known else None, key) for client_id, key in rows)
    return [f"{name} ({key})" if name and key else name or key for name, key in names]


def check_id(batch_id: str) -> str:
    if not runtime.is_uuid(batch_id):
        page.refuse(404, "There is no batch at this address.")
    return batch_id.lower()


def _after(call: page.Call) -> str | None:
    after = call.query.text("after")
    return after if runtime.is_uuid(after) else None


# --- verbs --------------------------------------------------------------------------------------------


def pause(call: page.Call, batch_id: str) -> page.Answer:
    """POST batch/ID/pause."""
    changed = batches.pause(call.quinn, call.icloud, check_id(batch_id))
    text = f"This batch is paused. {page_today.taken_back(changed.withdrawn, changed.beyond_recall)}"
    return _back(call, batch_id, text)


def cancel(call: page.Call, batch_id: str) -> page.Answer:
    """POST batch/ID/cancel."""
    changed = batches.cancel(call.quinn, call.icloud, check_id(batch_id))
    text = f"This batch is cancelled. {page_today.taken_back(changed.withdrawn, changed.beyond_recall)}"
    return _back(call, batch_id, text)


def resume(call: page.Call, batch_id: str) -> page.Answer:
    """POST batch/ID/resume: go on, if the page that asks for it shows why the batch is paused now."""
    detail = composing.show(call.quinn, check_id(batch_id))
    if page_today.is_stale(call) or call.form.text("seen_reason") != plain(detail.pause_reason or ""):
        text = "Nothing was resumed: the page that you pressed it on was old. This is how it is now."
        return _back(call, batch_id, text, "problem")
    batches.resume(call.quinn, detail.id)
    paused = " Nothing goes yet, because everything is paused." if call.settings_row[0] else ""
    return _back(call, batch_id, f"This batch is being sent again.{paused}")


def retry(call: page.Call, batch_id: str) -> page.Answer:
    """POST batch/ID/retry: try the failed items again; those of unknown outcome only if the box is ticked."""
    batch_id = check_id(batch_id)
    include_unknown = call.form.text("include_unknown") == "true"
    if call.form.has("is_unknown") and not include_unknown:
        errors = {"include_unknown": "Tick the box first: these people may get the message twice."}
        return show(call, batch_id, 400, errors)
    batches.acquire_lock(call.quinn, threading.Event())  # until the connection is closed
    found = batches.retry(call.quinn, batch_id, include_unknown)
    if found is None:
        page.refuse(404, "There is no batch at this address.")
    _, pending, unknown = found
    text = f"{count(pending, 'message is', 'messages are')} tried again."
    if unknown and not include_unknown:
        text += f" {count(unknown, 'message', 'messages')} that may have been sent stay as they are."
    return _back(call, batch_id, text)


def _back(call: page.Call, batch_id: str, text: str, kind: str = "done") -> page.Answer:
    return call.redirect(f"/batch/{check_id(batch_id)}", text, kind)


# --- CSV ----------------------------------------------------------------------------------------------


def download(call: page.Call, batch_id: str) -> page.Answer:
    """GET batch/ID.csv: every item, with what became of it."""
    batch_id = check_id(batch_id)
    composing.show(call.quinn, batch_id)
    # A file, because a batch of 100,000 people would fill the memory. waitress closes it.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    after = None
    while True:
        items = composing.list_items(call.quinn, batch_id, None, after, composing.MAX_PAGE)
        known = people.by_id(call.quinn, [item.client_id for item in items.entries])
        writer.writerows([_row(item, known.get(item.client_id)) for item in items.entries])
        after = items.after
        if after is None:
            break
    text.detach()
    size = file.tell()
    file.seek(0)
    answer = page.Answer(file, Content_Type="text/csv; charset=utf-8", Content_Length=str(size))
    answer.set_header("Content-Disposition", f'attachment; filename="batch-{batch_id[:8]}.csv"')
    return answer


def _row(item: composing.Item, known: people.Known | None) -> list[str]:
    sent_at = item.sent_at.isoformat(timespec="seconds") if item.sent_at else ""
    values = (
        known.name if known else "", item.handle, item.status, sent_at, item.failure_reason,
        "yes" if item.unknown else "", item.attempt, item.body,
    )  # fmt: skip
    return [cell(value) for value in values]


def cell(value: Any) -> str:
    """Return a value as a cell. A number that begins with + stays one; a formula becomes a text."""
    text = "" if value is None else str(value)
    is_number = re.fullmatch(r"\+[0-9]+", text)
    return f"'{text}" if text.startswith(FORMULA) and not is_number else text


ROUTES = [
    page.Route("GET", "/batch", index),
    page.Route("GET", "/batch/<batch_id>.csv", download),
    page.Route("GET", "/batch/<batch_id>", show),
    *(page.Route("POST", f"/batch/<batch_id>/{verb.__name__}", verb) for verb in (pause, resume, cancel, retry)),
]
