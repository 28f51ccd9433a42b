"""Answer requests for the owner's page: who may ask, forms, redirects with a message, errors as pages.

Used by the page_*.py modules and outreach_server.py. Reads outreach_settings in quinn; sessions.py has the login. How a
module adds pages:

    def show(call: page.Call) -> page.Answer:
        return call.render("new.html", people=composing.search(call.quinn, call.icloud, request))

    def write(call: page.Call) -> page.Answer:
        call.form.text("name")
        return call.redirect("/new", "The draft is written.")

    ROUTES = [page.Route("GET", "/new", show), page.Route("POST", "/new", write)]

and outreach_server.PAGES lists the module's ROUTES (PAGE_UPLOADS: the addresses that take a file). An endpoint that
refuses what was typed renders its form again, with status 400 and `errors={"field's name": "sentence"}`, which the
macros in pages/macros.html show; `call.form` has all that was typed. A batches.Refused that an endpoint does not handle
becomes a page with its sentence. Each template extends base.html. An address never contains a text of a person: it
ends in logs. Endpoints know nothing of sessions and of cross-site requests; all that is checked here, before they run:

1. `Host` is the base URL's, or this host's own name at the port (a rebinding name of a stranger is 421).
2. A request that is not GET or HEAD comes from our own page: `Sec-Fetch-Site: same-origin`, or, without this header, an
   `Origin` that is ours. Otherwise it is 403.
3. The cookie names a session. Otherwise the login page; it carries a form that was posted, and gives it back after the
   login.

The cookie opens the page only. The JSON API under /my/outreach takes the bearer token, and never the cookie.
"""

import contextlib
import functools
import http.cookies
import logging
import re
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import bottle
import psycopg2
from bottle import request

import batches
import db
import opt_outs
import page_templates
import report
import serving
import sessions
import settings

FORM_LIMIT = 256 * 1024  # bytes of a form without files
MESSAGE_LIFE = 600  # seconds for which a message after a redirect can be shown again
MAX_MESSAGES = 500
CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "Referrer-Policy": "same-origin",  # with no-referrer, the Origin of our own forms would be `null`
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for a browser that does not know frame-ancestors
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
IMMUTABLE = "public, max-age=31536000, immutable"
COOKIE, SECURE_COOKIE = "outreach", "__Host-outreach"
LOCAL_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]*")  # of this site: `//host` and `/\host` are other ones

Connection = Any  # psycopg2's connection
T = TypeVar("T")
logger = logging.getLogger("outreach-server")


class Answer(bottle.HTTPResponse):  # type: ignore[misc]  # bottle has no type hints
    """A response: its body, its status and its headers."""


class Message(NamedTuple):
    """What is shown once after a redirect. `kind`: done or problem."""

    text: str
    kind: str
    session: str
    written_at: float  # time.monotonic()


class Messages:
    """Keep messages from a redirect until the next page. The URL has an id only, of which nothing can be forged."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[str, Message] = {}

    def add(self, text: str, kind: str, session: str) -> str:
        name = secrets.token_urlsafe(9)
        with self.lock:
            while len(self.kept) >= MAX_MESSAGES:
                del self.kept[next(iter(self.kept))]
            self.kept[name] = Message(text, kind, session, time.monotonic())
        return name

    def find(self, name: str, session: str | None) -> Message | None:
        """Return a message of this session, unless it is old."""
        found = self.kept.get(name)
        is_shown = found is not None and found.session == session and time.monotonic() - found.written_at < MESSAGE_LIFE
        return found if is_shown else None


class Form:
    """The fields of a request in their order, and its files. Texts are as typed; a line ends with `\\n`."""

    def __init__(self, pairs: Sequence[tuple[str, str]], files: dict[str, Any] | None = None) -> None:
        self.pairs = [(name, value.replace("\r\n", "\n")) for name, value in pairs]
        self.files = files or {}  # bottle's FileUpload, by field

    def text(self, name: str, default: str = "") -> str:
        """Return the first value of a field."""
        return next((value for other, value in self.pairs if other == name), default)

    def texts(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for other, value in self.pairs if other == name]

    def has(self, name: str) -> bool:
        return any(other == name for other, _ in self.pairs)


class Site:
    """What all requests share. `base_url`: the address at which the owner's browser finds the page, without a path."""

    def __init__(self, token: str, quinn_url: str, icloud_url: str, interval: timedelta, base_url: str | None) -> None:
        self.quinn_url, self.icloud_url, self.interval, self.base_url = quinn_url, icloud_url, interval, base_url
        self.sessions = sessions.Sessions(token)
        self.messages = Messages()
        self.remembered: dict[str, tuple[float, Any]] = {}
        self.writes = 0  # POST requests so far

    def remember(self, name: str, seconds: float, read: Callable[[], T]) -> T:
        """Return what `read` returned in the last seconds: for what costs too much at each refresh of each open page.

        A POST ends it: after a verb, the owner sees what the verb did.
        """
        read_at, value = self.remembered.get(name, (0.0, None))
        if name not in self.remembered or time.monotonic() - read_at > seconds:
            writes, began = self.writes, time.monotonic()
            value = read()
            if writes == self.writes:  # else it may be from before the verb
                self.remembered[name] = (began, value)
        return value  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Remember nothing of before now."""
        self.writes += 1
        self.remembered.clear()

    def origins(self) -> dict[str, str]:
        """Return the origin of our pages for each `Host` at which they are served."""
        port = request.environ["SERVER_PORT"]
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
        hosts += ["127.0.0.1", "localhost", "[::1]"] if port == "80" else []
        found = {host: f"http://{host}" for host in hosts}
        if self.base_url:
            found[self.base_url.partition("://")[2]] = self.base_url
        return found


class Call:
    """One request: its session, its form, connections to the databases, and the answers."""

    def __init__(self, site: Site, stack: contextlib.ExitStack) -> None:
        self.site, self.stack = site, stack
        self.session: str | None = None  # the hash
        self.is_database_down = False

    @functools.cached_property
    def quinn(self) -> Connection:
        """A connection of this request. Raises psycopg2.Error."""
        return self.stack.enter_context(contextlib.closing(db.connect(self.site.quinn_url)))

    @functools.cached_property
    def icloud(self) -> Connection:
        return self.stack.enter_context(contextlib.closing(db.connect(self.site.icloud_url)))

    @functools.cached_property
    def origin(self) -> str | None:
        """The origin of our pages at the request's Host; None if the Host is not ours."""
        return self.site.origins().get(request.environ.get("HTTP_HOST", "").lower())

    @functools.cached_property
    def form(self) -> Form:
        """The posted fields. Raises HTTPResponse with 413 or 400."""
        return read_form()

    @functools.cached_property
    def query(self) -> Form:
        """The fields of the URL."""
        text = request.query_string
        return Form(urllib.parse.parse_qsl(text, keep_blank_values=True, errors="replace"))

    @functools.cached_property
    def settings_row(self) -> tuple[bool | None, str | None]:
        """Whether all sending is paused, and the time zone of quiet hours; None if a database cannot say it."""
        sql = "SELECT paused, quiet_hours_tz FROM outreach_settings WHERE id = 1"
        try:
            rows = [] if self.session is None or self.is_database_down else db.query(self.quinn, sql)
        except psycopg2.Error:
            rows = []
        return (rows[0][0], rows[0][1]) if rows else (None, None)

    @functools.cached_property
    def formatter(self) -> report.LocalTimeFormatter:
        """How the owner reads times."""
        return report.LocalTimeFormatter(datetime.now(UTC), self.settings_row[1])

    def render(self, template: str, status: int = 200, **values: object) -> Answer:
        """Return a page. Templates also have `message`, `paused`, `path`, `at` (writes an instant) and `errors`."""
        message = self.site.messages.find(self.query.text("m"), self.session) if self.session else None
        common = {
            "is_logged_in": self.session is not None, "message": message, "paused": self.settings_row[0],
            "path": request.path, "at": self.formatter.at, "now": self.formatter.now, "errors": {},
        }  # fmt: skip
        body = page_templates.render(template, **(common | values))
        return Answer(body.encode(errors="replace"), status, Content_Type="text/html; charset=utf-8")

    def redirect(self, path: str, text: str | None = None, kind: str = "done") -> Answer:
        """Go to another page after a POST, with a message. `path`: of this site; it may have a query and an anchor."""
        path, hash_sign, anchor = path.partition("#")
        if text is not None and self.session:
            sign = "&" if "?" in path else "?"
            path = f"{path}{sign}m={self.site.messages.add(text, kind, self.session)}"
        return Answer("", 303, Location=f"{path}{hash_sign}{anchor}")

    def cookie_name(self) -> str:
        """`__Host-` keeps other hosts of the same domain from setting the cookie; it needs TLS."""
        return SECURE_COOKIE if self.is_tls else COOKIE

    @property
    def is_tls(self) -> bool:
        """Whether the browser sees https: the base URL says so. `Secure` at plain http would lose the cookie."""
        return (self.origin or "").startswith("https://")

    def cookie(self) -> str:
        return str(request.get_cookie(self.cookie_name()) or "")

    def set_cookie(self, answer: Answer, value: str) -> None:
        """Set the session's cookie; with "", remove it."""
        answer.set_cookie(
            self.cookie_name(), value, path="/", httponly=True, samesite="strict", secure=self.is_tls,
            max_age=sessions.MAX_DAYS * 86_400 if value else 0,
        )  # fmt: skip


Endpoint = Callable[..., Answer]


class Route(NamedTuple):
    """An endpoint. `rule`: as bottle has it; its parts are passed by name. `is_public`: works without a session."""

    method: str
    rule: str
    endpoint: Endpoint
    is_public: bool = False


def make_app(site: Site, routes: Sequence[Route]) -> bottle.Bottle:
    """The WSGI application of the pages."""
    app = bottle.Bottle()
    app.catchall = False  # bottle would log an exception's text
    for route in routes:
        app.route(route.rule, route.method, functools.partial(_answer, site, route))
    app.route("/static/<digest>/<name>", "GET", functools.partial(_answer, site, STATIC_ROUTE))
    app.default_error_handler = functools.partial(_error_page, site)
    return app


def serve_static(call: Call, digest: str, name: str) -> Answer:
    """GET static/DIGEST/NAME: a style sheet, a script or an image."""
    found = page_templates.STATIC.get(name)
    if found is None:
        refuse(404, "There is nothing at this address.")
    is_current = found.path == f"/static/{digest}/{name}"
    answer = Answer(found.content, Content_Type=found.type)
    answer.set_header("Cache-Control", IMMUTABLE if is_current else "no-store")
    return answer


STATIC_ROUTE = Route("GET", "", serve_static, is_public=True)


# --- checks -------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request that gets an error page. The message is a sentence."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


def refuse(status: int, sentence: str, **headers: str) -> NoReturn:
    """End the request with an error page."""
    raise Refusal(status, sentence, **headers)


def check_host(call: Call) -> None:
    """Refuse a request by another name: a stranger's name can be made to lead to this address (DNS rebinding)."""
    if call.origin is None:
        refuse(421, "The page is not served under this name. To allow it, set OUTREACH_BASE_URL to the page's address.")


def check_origin(call: Call) -> None:
    """Refuse a request that changes something and does not come from our own page."""
    if request.method in ("GET", "HEAD"):
        return
    fetch_site = request.environ.get("HTTP_SEC_FETCH_SITE")
    is_ours = (
        fetch_site == "same-origin"
        if fetch_site is not None
        # Over plain http at another address than localhost, a browser sends no Sec-Fetch-Site.
        else request.environ.get("HTTP_ORIGIN") == call.origin
    )
    if not is_ours:
        refuse(403, "This came from another site, so nothing was done. Open the page itself, and try again there.")


def check_session(call: Call) -> bool:
    """Find the session of the cookie; return whether there is one.

    If the database is unavailable, a session that was found in the last hour counts: the page then says what is wrong.
    """
    value = call.cookie()
    if not value:
        return False
    try:
        call.session = call.site.sessions.find(call.quinn, value)
    except psycopg2.Error as error:
        problem = db.classify_error(error)
        call.session = call.site.sessions.recall(value)
        if not isinstance(problem, db.DatabaseUnavailable) or not call.session:
            raise problem from None
        call.is_database_down = True
    return call.session is not None


def may_upload(site: Site, headers: Mapping[str, str]) -> bool:
    """Return whether a request may have a long body, before it is read: its cookie names a session of the last hour.

    The server's thread that reads sockets calls this, so it must not wait for a database.
    """
    cookies = http.cookies.SimpleCookie()
    try:
        cookies.load(headers.get("COOKIE", ""))
    except http.cookies.CookieError:
        return False
    values = [cookies[name].value for name in (COOKIE, SECURE_COOKIE) if name in cookies]
    return any(site.sessions.recall(value) for value in values)


def read_form() -> Form:
    """Return the fields and files of the request's body."""
    try:
        if request.content_type.startswith("multipart/"):
            posted = request.POST
            pairs = [(name, value) for name, value in posted.allitems() if isinstance(value, str)]
            files = {name: value for name, value in posted.allitems() if not isinstance(value, str)}
            return Form(pairs, files)
        length = max(request.content_length, 0)
        if length > FORM_LIMIT:
            refuse(413, "That is too long for a form. Make it shorter, and send it again.")
        text = request.environ["wsgi.input"].read(length).decode("ascii")
        return Form(urllib.parse.parse_qsl(text, keep_blank_values=True, errors="replace", max_num_fields=2000))
    except (ValueError, bottle.HTTPError):
        refuse(400, "The form cannot be read.")


def local_path(text: str) -> str:
    """Return a path of this site, or `/` if the text is none: a link could otherwise lead to another site."""
    return text if LOCAL_PATH.fullmatch(text) else "/"


def ask_for_login(call: Call) -> Answer:
    """Return the login page. It carries the form that was posted, so that nothing that was typed is lost."""
    if request.method == "POST":
        carried = call.form.pairs  # a file cannot be carried: its page asks for it again
        return call.render("login.html", 401, next=request.path, carried=carried, is_post=True)
    if request.environ.get("HTTP_SEC_FETCH_SITE") == "cross-site" and not call.cookie():
        # A link in a mail: the browser keeps a strict cookie back. From our own page, it sends it.
        return call.render("arrive.html")
    target = request.path + (f"?{request.query_string}" if request.query_string else "")
    return call.render("login.html", 401, next=local_path(target), carried=[], is_post=False)


# --- answers ------------------------------------------------------------------------------------------


def _answer(site: Site, route: Route, **arguments: str) -> Answer:
    """Check a request, run its endpoint, and turn each error into a page."""
    with contextlib.ExitStack() as stack:
        call = Call(site, stack)
        try:
            answer = _run(call, route, arguments)
        except Refusal as refusal:
            level = logging.INFO if refusal.status in (400, 404) else logging.WARNING
            logger.log(level, "page refused status=%d request=%r", refusal.status, _where())
            answer = _sentence_page(call, refusal)
        for name, value in HEADERS.items():
            if name not in answer.headers:
                answer.set_header(name, value)
        return answer


def _run(call: Call, route: Route, arguments: dict[str, str]) -> Answer:
    with _as_refusals():
        check_host(call)
        check_origin(call)
        if not route.is_public and not check_session(call):
            return ask_for_login(call)
        # bottle leaves a path's parts as WSGI has them: each byte is a character.
        decoded = {name: value.encode("latin-1").decode(errors="replace") for name, value in arguments.items()}
        if route.method == "GET":
            return route.endpoint(call, **decoded)
        try:
            return route.endpoint(call, **decoded)
        finally:
            call.site.forget()


@contextlib.contextmanager
def _as_refusals() -> Iterator[None]:
    """Turn what the rules refuse, and what a database cannot do, into Refusal. Log no text of an exception."""
    try:
        yield
    except batches.Refused as refused:
        raise Refusal(refused.status, as_sentence(str(refused))) from None
    except opt_outs.OptOutError as refused:
        raise Refusal(400, as_sentence(str(refused))) from None
    except settings.NoSettings as refused:
        raise Refusal(503, as_sentence(str(refused))) from None
    except batches.LockTimeout:
        raise Refusal(409, "The dispatcher is busy. Try again in a moment.") from None
    except (db.DatabaseUnavailable, psycopg2.Error) as error:
        problem = db.classify_error(error) if isinstance(error, psycopg2.Error) else error
        code = getattr(error, "pgcode", None) or str(problem)[:5]
        logger.error("page failed error=%s sqlstate=%r request=%r", type(problem).__name__, code, _where())
        raise Refusal(503, "The database cannot be reached, or is not ready. The server's log says more.") from None
    except (Refusal, bottle.HTTPResponse):
        raise
    except Exception as error:  # noqa: BLE001  # a bug must end as a page, and its text must not be logged
        logger.error("page failed error=%s request=%r\n%s", type(error).__name__, _where(), serving.frames(error))
        raise Refusal(500, "The server failed. Its log names the error. Nothing more was done.") from None


def _sentence_page(call: Call, refusal: Refusal) -> Answer:
    answer = call.render("error.html", refusal.status, sentence=str(refusal))
    for name, value in refusal.headers.items():
        answer.set_header(name.replace("_", "-"), value)
    return answer


def _error_page(site: Site, error: bottle.HTTPError) -> bytes:
    """Return the page for bottle's own errors, 404 and 405."""
    with contextlib.ExitStack() as stack:
        call = Call(site, stack)
        sentences = {404: "There is no page at this address.", 405: "This address does not take this kind of request."}
        sentence = sentences.get(error.status_code, "The request cannot be answered.")
        answer = call.render("error.html", error.status_code, sentence=sentence)
        for name, value in HEADERS.items():
            bottle.response.set_header(name, value)
        bottle.response.content_type = "text/html; charset=utf-8"
        return bytes(answer.body)


def as_sentence(text: str) -> str:
    """Return a rule's message as a sentence of the page: with a capital letter and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…", ".)")) else ".")


def _where() -> str:
    """Return the method and the route for the log. The path itself may contain anything."""
    return f"{request.method} {request.environ['bottle.route'].rule}"
