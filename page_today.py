"""The page Today: what is happening and why, what needs the owner, and the switch for everything.

Used by outreach_server.py. Reads both databases through report.py; pausing.py pauses. Nothing is decided here.
"""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psycopg2
from markupsafe import Markup, escape

import composing
import db
import opt_outs
import pacing
import page
import pausing
import people
import report
import setting_fields
from page_templates import count, plain, short

STALE = 120  # seconds after which a page's button no longer resumes
REPORT_LIFE = 1.0  # seconds
LISTED = 10  # batches that are not being sent
UNASSIGNED_LIFE = 60  # seconds for which the opt-outs of unknown people are remembered: finding them reads all handles
# Holds that a button or a link of the page ends. The advice of the others names commands of the host.
ENDED_HERE = ("paused", "batch stopped itself", "limit reached")
BATCH = re.compile(r"\b[Bb]atch ([0-9a-f]{8})…")


class LastPause:
    """When this process paused everything last, by time.time(): a page from before must not resume it."""

    at = 0.0


class Batch(NamedTuple):
    """A batch that is being sent, as it is shown."""

    line: report.BatchLine
    total: int
    ended: int


def show(call: page.Call) -> page.Answer:
    """GET /."""
    seen = read_report(call)
    others = list_others(call, seen)
    names = read_names(call, seen)
    return call.render(
        "today.html",
        seen=seen,
        seen_at=int(time.time()),
        mood=mood(seen.verdict),
        sentence=with_links(setting_fields.in_words(seen.verdict.sentence), names),
        advice=advice(seen.verdict),
        names=names,
        warnings=[with_links(as_warning(warning), names) for warning in seen.warnings],
        in_words=setting_fields.in_words,
        sending=[as_shown(line) for line in seen.batches or ()],
        others=others,
        unassigned=unassigned(call),
        limit_words=limit_words,
        ago=lambda moment: pacing.format_duration(seen.now - moment),
    )


def read_report(call: page.Call) -> report.Report:
    """Return the report; all pages that are open share one, so thirty of them cost as much as one."""
    if call.is_database_down:
        return report.report(call.site.interval)
    return call.site.remember("report", REPORT_LIFE, lambda: report.report(call.site.interval))


def as_warning(text: str) -> str:
    """Return a warning as a sentence, in the words of the page."""
    return page.as_sentence(setting_fields.in_words(text.removeprefix("Held: ")))


def mood(verdict: report.Summary) -> str:
    """Return the colour of the verdict: sending, held, wrong, or idle."""
    return "wrong" if verdict.needs_operator else verdict.state


def advice(verdict: report.Summary) -> str | None:
    """Return what to do where the page has no button for it."""
    return None if (verdict.hold or "").startswith(ENDED_HERE) else verdict.advice


def limit_words(name: str) -> str:
    """Return what a limit counts, as in the form of the settings."""
    fields = setting_fields.fields()
    label = fields[name].meaning.label if name in fields else name
    return label[:1].lower() + label[1:]


def as_shown(line: report.BatchLine) -> Batch:
    total = line.pending + line.queued + line.sent + line.failed + line.skipped
    return Batch(line, total, line.sent + line.failed + line.skipped)


def list_others(call: page.Call, seen: report.Report) -> list[composing.BatchSummary]:
    """Return the newest batches, but those that are being sent, which are listed above them."""
    if seen.batches is None or call.is_database_down:
        return []
    shown = {line.id for line in seen.batches}
    newest = composing.list_batches(call.quinn, None, LISTED).entries
    return [batch for batch in newest if batch.id not in shown]


def read_names(call: page.Call, seen: report.Report) -> dict[str, str]:
    """Return what the batches of a report are called, by their id."""
    sql = "SELECT id, name FROM outreach_batches WHERE id = ANY (%(ids)s::uuid[])"
    lists: Sequence[Sequence[Any]] = (seen.batches or (), seen.stopped_batches or (), seen.finished_batches or ())
    ids = [each.id for each in (each for several in lists for each in several)]
    ids += [seen.verdict.batch_id] if seen.verdict.batch_id else []
    if not ids or call.is_database_down:
        return {}
    return {batch_id: title(batch_id, name) for batch_id, name in db.query(call.quinn, sql, {"ids": ids})}


def title(batch_id: str, name: str | None) -> str:
    """Return what a batch is called on the page."""
    return short(name) if name and name.strip() else f"Batch {batch_id[:8]}"


def with_links(sentence: str, names: dict[str, str]) -> Markup:
    """Return a sentence in which a batch has its name, and leads to its page."""

    def link(match: re.Match[str]) -> str:
        found = next((batch_id for batch_id in names if batch_id.startswith(match[1])), None)
        if found is None:
            return str(escape(match[0]))
        return str(Markup('<a href="/batch/{}" id="v-{}">{}</a>').format(found, found, plain(names[found])))

    parts, end = [], 0
    text = plain(sentence)
    for match in BATCH.finditer(text):
        parts += [str(escape(text[end : match.start()])), link(match)]
        end = match.end()
    return Markup("".join([*parts, str(escape(text[end:]))]))  # noqa: S704  # each part was escaped


def unassigned(call: page.Call) -> list[opt_outs.OptOut]:
    """Return the opt-outs of the last 30 days whose person is not known; [] while a database is unavailable."""

    def read() -> list[opt_outs.OptOut]:
        return people.recently_unassigned(call.quinn, call.icloud)

    try:
        return call.site.remember("unassigned", UNASSIGNED_LIFE, read)
    except psycopg2.Error:
        return []


# --- the switch for everything ------------------------------------------------------------------------


def pause(call: page.Call) -> page.Answer:
    """POST pause: stop everything; say what is held and what is beyond recall."""
    try:
        paused = pausing.pause_all(call.quinn, lambda: call.icloud)
    except psycopg2.Error as error:
        raise page.Refusal(
            503,
            "Nothing could be paused: the database cannot be reached. No Mac gets a message without the send queue "
            "server: to stop it, run this on its host: systemctl stop send-queue-server.socket",
        ) from db.classify_error(error)
    LastPause.at = time.time()
    return call.redirect("/", pause_sentence(paused))


def pause_sentence(paused: pausing.Paused) -> str:
    """Return what a pause of everything did, in words."""
    if paused.withdrawn is None:
        return (
            "Everything is paused, and nothing more is queued. The queue's database cannot be reached, so nothing was "
            "taken back from it yet."
        )
    return f"Everything is paused. {taken_back(paused.withdrawn, paused.beyond_recall)}"


def taken_back(withdrawn: int, beyond_recall: int) -> str:
    """Return what a pause took back, and what it could not."""
    taken = f"{count(withdrawn, 'message was', 'messages were')} taken back from the queue."
    if not beyond_recall:
        return f"{taken} No message is under way."
    under_way = count(beyond_recall, "message is", "messages are")
    return f"{taken} {under_way} beyond recall: a Mac has collected what it sends now."


def is_stale(call: page.Call) -> bool:
    """Return whether the page of a button is too old to resume by it, or from before the last pause."""
    text = call.form.text("seen_at")
    seen_at = int(text) if re.fullmatch("[0-9]{1,12}", text) else 0
    return seen_at < LastPause.at - 1 or time.time() - seen_at > STALE


def resume(call: page.Call) -> page.Answer:
    """POST resume: go on, unless the page that asks for it is old."""
    if is_stale(call):
        text = "Nothing was resumed: the page that you pressed it on was old. This is how it is now."
        return call.redirect("/", text, "problem")
    pausing.resume_all(call.quinn)
    return call.redirect("/", "The pause of everything has ended. Batches that are paused themselves stay paused.")


ROUTES = [
    page.Route("GET", "/", show),
    page.Route("POST", "/pause", pause),
    page.Route("POST", "/resume", resume),
]
