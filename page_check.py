"""The page that shows a draft before it is sent: texts, unusual values, who is left out, a test to oneself, and send.

Used by outreach_server.py. Everything is composing.py's. To send, the owner types the number of people, and the form
has the digest of what was shown: if somebody has changed it since, nothing is sent.
"""

import uuid

import batches
import composing
import compositions
import page
import page_new
import runtime
import screens
from page_templates import count


def show(call: page.Call, batch_id: str, status: int = 200, errors: dict[str, str] | None = None) -> page.Answer:
    """GET new/check/ID. After a refusal, it shows again what was typed."""
    detail = composing.show(call.quinn, page_new.check_id(batch_id))
    can_send = detail.digest is not None and (
        detail.status == "draft" or (detail.status == "paused" and detail.pause_reason == batches.LAPSED)
    )
    is_posted = errors is not None
    forecast = composing.forecast_written(detail.id, call.site.interval) if can_send else None
    return call.render(
        "check.html",
        status,
        batch=detail,
        can_send=can_send,
        composition=compositions.of_batch(call.quinn, detail.id),
        forecast=forecast,
        reasons=screens.REASONS,
        day=call.formatter.day,
        limit_words=page_new.limit_words,
        once=uuid.uuid4(),
        to=call.form.text("to") if is_posted else "",
        typed=call.form.text("recipients") if is_posted else "",
        first_n=call.form.text("first_n") if is_posted and call.form.has("first_n") else str(detail.first_n or ""),
        errors=errors or {},
    )


def test(call: page.Call, batch_id: str) -> page.Answer:
    """POST new/check/ID/test: send one of the texts to the owner."""
    batch_id, to, once = page_new.check_id(batch_id), call.form.text("to").strip(), call.form.text("once")
    if not to:
        return show(call, batch_id, 400, {"to": "Type your own number or e-mail address."})
    try:
        composing.send_test(call.quinn, call.icloud, batch_id, to, uuid.UUID(once) if runtime.is_uuid(once) else None)
    except batches.Refused as refused:
        return show(call, batch_id, refused.status, {"to": page.as_sentence(str(refused))})
    text = f"A test is on its way to {to}. The Mac sends it within 10 minutes, or not at all."
    return call.redirect(f"/new/check/{batch_id}", text)


def send(call: page.Call, batch_id: str) -> page.Answer:
    """POST new/check/ID/send: approve what was shown."""
    batch_id, digest = page_new.check_id(batch_id), call.form.text("digest")
    detail = composing.show(call.quinn, batch_id)
    errors: dict[str, str] = {}
    recipients = _number(call, "recipients", errors)
    first_n = _number(call, "first_n", errors)
    if recipients is None and "recipients" not in errors:
        errors["recipients"] = f"Type the number of people, {detail.counts.pending:,}."
    elif recipients not in (None, detail.counts.pending) and detail.status == "draft":
        errors["recipients"] = (
            f"You typed {recipients:,}, and it is {count(detail.counts.pending, 'person', 'people')}."
        )
    if errors or recipients is None:
        return show(call, batch_id, 400, errors)
    try:
        sent = composing.send(call.quinn, batch_id, digest, recipients, first_n)
    except batches.Refused as refused:
        return show(call, batch_id, refused.status, {"recipients": page.as_sentence(_words(str(refused)))})
    pause = f" It pauses after {count(first_n, 'message')}, so that you can look." if first_n else ""
    people = count(sent.recipients, "person", "people")
    return call.redirect(f"/batch/{batch_id}", f"It is being sent to {people}.{pause}")


def _words(text: str) -> str:
    """Say a refusal without a digest, which says nothing to a person."""
    if "its digest is" in text:
        return (
            "somebody has changed this draft since you saw it, so nothing was sent. This is how it is now: look at it"
        )
    return text


def _number(call: page.Call, name: str, errors: dict[str, str]) -> int | None:
    digits = call.form.text(name).strip().replace(",", "").replace(".", "").replace(" ", "")
    if not digits:
        return None
    if not digits.isascii() or not digits.isdigit() or len(digits) > 9 or int(digits) == 0:
        errors[name] = "Type a whole number."
        return None
    return int(digits)


def left_out(call: page.Call, batch_id: str, reason: str) -> page.Answer:
    """GET new/check/ID/left-out/REASON: the people who would be left out now for one reason."""
    detail = composing.show(call.quinn, page_new.check_id(batch_id))
    back = f"/new/check/{detail.id}#left-out"
    return page_new.render_left_out(call, compositions.request_of(detail), reason, back)


ROUTES = [
    page.Route("GET", "/new/check/<batch_id>", show),
    page.Route("POST", "/new/check/<batch_id>/test", test),
    page.Route("POST", "/new/check/<batch_id>/send", send),
    page.Route("GET", "/new/check/<batch_id>/left-out/<reason>", left_out),
]
