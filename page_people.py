"""The pages of people: find one, see what was sent to whom, opt out, opt in, assign an opt-out, show, forget.

Used by outreach_server.py. Reads through people.py; the verbs are those of opt_outs.py and personal_data.py. A name or
a number never becomes a part of an address: a search is posted, and a person's page has the client's id.
"""

import io
import json
import re
import urllib.parse
from datetime import datetime, timedelta

import handles
import opt_outs
import page
import page_today
import people
import personal_data
import runtime
from page_templates import count

PER_PAGE = 20
FORGET = "forget"  # what the owner types


def show(call: page.Call, status: int = 200, **values: object) -> page.Answer:
    """GET people."""
    after = call.query.text("after")
    sent = people.latest(call.quinn, after if runtime.is_uuid(after) else None, PER_PAGE + 1)
    common: dict[str, object] = {
        "sent": sent[:PER_PAGE],
        "after": sent[PER_PAGE - 1].item_id if len(sent) > PER_PAGE else None,
        "is_first": not after,
        "known": people.by_id(call.quinn, [each.client_id for each in sent[:PER_PAGE]]),
        "unassigned": page_today.unassigned(call) if not after else [],
        "opted_out": opt_outs.page(call.icloud, None, 5, active_only=True) if not after else [],
        "text": "",
    }
    return call.render("people.html", status, **(common | values))


def find(call: page.Call) -> page.Answer:
    """POST people/find: who has this name, number, address or id."""
    text = call.form.text("text").strip()
    if not text:
        return show(call, 400, errors={"text": "Write a name, a number or an e-mail address."})
    found = people.find(call.quinn, text)
    if len(found) == 1 and handles.is_handle(text):
        return call.redirect(person_path(found[0].client_id))
    opt_out = None
    if handles.is_handle(text):
        opt_out = people.active_opt_outs(call.icloud, [handles.key(text)]).get(handles.key(text))
    return call.render(
        "people_found.html", text=text, found=found, is_handle=handles.is_handle(text), opt_out=opt_out,
        is_more=len(found) == people.MAX_FOUND, assign=None,
    )  # fmt: skip


def person_path(client_id: str) -> str:
    return f"/people/{urllib.parse.quote(client_id, safe='')}"


def show_person(call: page.Call, client_id: str, status: int = 200, **values: object) -> page.Answer:
    """GET people/ID."""
    found = people.details(call.quinn, call.icloud, client_id)
    if found is None:
        page.refuse(404, "There is nobody at this address. Perhaps the person was deleted.")
    return call.render("person.html", status, **({"found": found, "path_of": person_path, "typed": {}} | values))


# --- opt-outs -----------------------------------------------------------------------------------------


def opt_out(call: page.Call) -> page.Answer:
    """POST people/opt-out: record that somebody wants no more messages, in the owner's words."""
    form = call.form
    handle, word, day = form.text("handle").strip(), form.text("word").strip(), form.text("day").strip()
    errors: dict[str, str] = {}
    received_at = _day(day, call) if day else None
    if day and received_at is None:
        errors["day"] = f"{day} is no day that is over or today. Write it such as 2026-03-01."
    if not handles.is_handle(handle):
        errors["handle"] = f"{handle or 'Nothing'} is neither a phone number nor an e-mail address."
    if errors:
        return show(call, 400, errors=errors, typed={"handle": handle, "word": word, "day": day})
    recorded = opt_outs.record(call.quinn, call.icloud, handle, word or None, received_at)
    text = f"{handle} gets no more messages, nor does any other number or address of the same person."
    text += "" if recorded.is_new else " They had opted out before."
    text += "" if recorded.is_readable else f" But the number cannot be read: {handles.UNREADABLE_REMEDY}."
    return call.redirect(_next(call), text)


def _day(text: str, call: page.Call) -> datetime | None:
    """Return noon of a day, in the owner's time zone; None if it is no day, or one to come."""
    try:
        moment = datetime.fromisoformat(f"{text}T12:00")
    except ValueError:
        return None
    zone = call.formatter.zone
    moment = moment.replace(tzinfo=zone) if zone else moment.astimezone()
    if moment > call.formatter.now + timedelta(days=1):
        return None
    return min(moment, call.formatter.now)


def opt_in(call: page.Call) -> page.Answer:
    """POST people/opt-in: end an opt-out, because the person asked for it."""
    handle = call.form.text("handle").strip()
    is_ended = opt_outs.end(call.icloud, handle)
    others = opt_outs.others_of_person(call.quinn, call.icloud, handle)
    text = f"{handle} may be written to again." if is_ended else "There was no opt-out to end."
    if others:
        text += f" But nobody writes to this person while these have opted out: {', '.join(others)}."
    return call.redirect(_next(call), text)


def choose(call: page.Call) -> page.Answer:
    """POST people/choose: who may be the person of an opt-out that nobody has."""
    handle, text = call.form.text("handle").strip(), call.form.text("text").strip()
    found = people.find(call.quinn, text) if text else []
    return call.render(
        "people_found.html", text=text, found=found, is_handle=False, opt_out=None,
        is_more=len(found) == people.MAX_FOUND, assign=handle,
    )  # fmt: skip


def assign(call: page.Call) -> page.Answer:
    """POST people/assign: give a number or address to a client, so that its opt-out counts there."""
    handle, client_id = call.form.text("handle").strip(), call.form.text("client_id")
    try:
        is_new = opt_outs.assign(call.quinn, call.icloud, handle, client_id)
    except opt_outs.OptOutError as error:
        return show(call, 400, errors={"": page.as_sentence(str(error))})
    text = f"{handle} belongs to this person {'now' if is_new else 'already'}. Its opt-out counts for the person."
    return call.redirect(person_path(client_id), text)


def list_opt_outs(call: page.Call) -> page.Answer:
    """GET people/opt-outs: the record, newest first."""
    after = call.query.text("after")
    found = opt_outs.page(call.icloud, after if runtime.is_uuid(after) else None, 50)
    return call.render("opt_outs.html", found=found, after=found[-1].id if len(found) == 50 else None)


def download_opt_outs(call: page.Call) -> page.Answer:
    """GET people/opt-outs.csv: the whole record."""
    file = io.StringIO()
    opt_outs.write_csv(call.icloud, file)
    answer = page.Answer(file.getvalue().encode("utf-8-sig"), Content_Type="text/csv; charset=utf-8")
    answer.set_header("Content-Disposition", 'attachment; filename="opt-outs.csv"')
    return answer


# --- what is stored, and forgetting -------------------------------------------------------------------


def show_stored(call: page.Call, client_id: str) -> page.Answer:
    """GET people/ID/stored: all that is stored about a person; with `?as=json`, for the person to take along."""
    found, handle = _find(call, client_id)
    shown = personal_data.show_person(call.quinn, call.icloud, handle)
    if call.query.text("as") == "json":
        content = json.dumps(shown, ensure_ascii=False, indent=2, default=str)
        answer = page.Answer(content.encode(), Content_Type="application/json")
        answer.set_header("Content-Disposition", 'attachment; filename="person.json"')
        return answer
    return call.render(
        "stored.html", found=found, text=personal_data.as_text(shown), back=person_path(found.person.client_id)
    )


def forget(call: page.Call, client_id: str) -> page.Answer:
    """POST people/ID/forget: erase a person's messages and name; the opt-out stays."""
    _, handle = _find(call, client_id)
    if call.form.text("typed").strip().lower() != FORGET:
        errors = {"typed": f"Write the word {FORGET}. Nothing was erased."}
        return show_person(call, client_id, 400, errors=errors, typed={"typed": call.form.text("typed")})
    forgotten = personal_data.forget(call.quinn, call.icloud, handle)
    return call.redirect("/people", forgotten_sentence(forgotten))


def forgotten_sentence(forgotten: personal_data.Forgotten) -> str:
    """Return what was erased, and what is left for the owner to do."""
    parts = [
        f"Erased: {count(forgotten.erased.items, 'message')} of {count(forgotten.clients, 'person', 'people')}. The "
        f"opt-out of {', '.join(forgotten.keys)} stays, without a name.",
    ]
    if not forgotten.is_deleted:
        parts.append("The table of clients is your platform's: delete the person there.")
    if forgotten.in_flight:
        parts.append(f"{count(forgotten.in_flight, 'message')} under way: do this again when it has its result.")
    if forgotten.unfinished:
        parts.append(
            f"{count(len(forgotten.unfinished), 'batch', 'batches')} that is not finished names the person: cancel it, "
            "then do this again."
        )
    parts.append("The Mac has the conversation in Messages, and the number in its journal for a year.")
    return " ".join(parts)


def _find(call: page.Call, client_id: str) -> tuple[people.Details, str]:
    """Return a person, and one of their handles."""
    found = people.details(call.quinn, call.icloud, client_id)
    if found is None:
        page.refuse(404, "There is nobody at this address. Perhaps the person was deleted.")
    if not found.handles:
        page.refuse(409, "This person has no number and no address, so nothing was written to them.")
    return found, found.handles[0].handle


def _next(call: page.Call) -> str:
    """Return where a form says that it came from: a person's page, or People."""
    path = call.form.text("next")
    return path if re.fullmatch(r"/people/[!-.0-~]+", path) else "/people"


ROUTES = [
    page.Route("GET", "/people", show),
    page.Route("POST", "/people/find", find),
    *(page.Route("GET", f"/people/{name}", lambda call: call.redirect("/people")) for name in ("find", "choose")),
    page.Route("POST", "/people/opt-out", opt_out),
    page.Route("POST", "/people/opt-in", opt_in),
    page.Route("POST", "/people/choose", choose),
    page.Route("POST", "/people/assign", assign),
    page.Route("GET", "/people/opt-outs", list_opt_outs),
    page.Route("GET", "/people/opt-outs.csv", download_opt_outs),
    page.Route("GET", "/people/<client_id>", show_person),
    page.Route("GET", "/people/<client_id>/stored", show_stored),
    page.Route("POST", "/people/<client_id>/forget", forget),
]
