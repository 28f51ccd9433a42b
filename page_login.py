"""Log in and out of the owner's page.

Used by outreach_server.py. Touches outreach_sessions in quinn, through sessions.py.
"""

import json
import logging
import re

from bottle import request

import page
import sessions

MAX_CARRIED = 200  # fields of a form that the login page carries
logger = logging.getLogger("outreach-server")


def show(call: page.Call) -> page.Answer:
    """GET login."""
    if page.check_session(call):
        return call.redirect("/")
    return call.render("login.html", next=page.local_path(call.query.text("next", "/")), carried=[], is_post=False)


def log_in(call: page.Call) -> page.Answer:
    """POST login: check the password, set the cookie, and go on where the owner was."""
    target, carried = page.local_path(call.form.text("next", "/")), _carried(call)
    is_post = call.form.text("is_post") == "true"

    def again(status: int, sentence: str) -> page.Answer:
        logger.warning("login refused status=%d address=%s", status, request.environ.get("REMOTE_ADDR"))
        return call.render(
            "login.html", status, next=target, carried=carried, is_post=is_post, errors={"password": sentence}
        )

    try:
        call.site.sessions.check_password(call.form.text("password").strip())
    except sessions.WrongToken:
        return again(403, "This is not the owner's token. It is OUTREACH_OWNER_TOKEN in the server's settings.")
    except sessions.TooManyAttempts as refused:
        answer = again(429, f"There were too many wrong attempts. Wait {refused.seconds} seconds, and try again.")
        answer.set_header("Retry-After", str(refused.seconds))
        return answer
    value = call.site.sessions.begin(call.quinn)
    call.session = call.site.sessions.hash(value)
    answer = call.render("carried.html", next=target, carried=carried) if is_post else call.redirect(target)
    call.set_cookie(answer, value)
    return answer


def log_out(call: page.Call) -> page.Answer:
    """POST logout."""
    call.site.sessions.end(call.quinn, call.cookie())
    answer = call.redirect("/login")
    call.set_cookie(answer, "")
    return answer


def _carried(call: page.Call) -> list[tuple[str, str]]:
    """Return the fields of a form that was posted without a session."""
    fields = []
    for text in call.form.texts("carried")[:MAX_CARRIED]:
        try:
            name, value = json.loads(text)
        except (ValueError, TypeError):
            continue
        if isinstance(name, str) and isinstance(value, str) and re.fullmatch(r"[\w.\-\[\]]{1,100}", name):
            fields.append((name, value))
    return fields


ROUTES = [
    page.Route("GET", "/login", show, is_public=True),
    page.Route("POST", "/login", log_in, is_public=True),
    page.Route("POST", "/logout", log_out),
]
