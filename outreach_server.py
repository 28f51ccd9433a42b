"""The owner's page and HTTP API: find people, write batches, import clients, record opt-outs, change the settings.

Run by systemd (systemd/outreach-server.service) or by hand. Touches the tables of quinn, icloud.send_queue and
icloud.opt_outs, through composing, batches, importing, opt_outs, personal_data and settings. The contract is
openapi-owner.yaml. Each request opens connections of its own. Example:

    curl -H "Authorization: Bearer $OUTREACH_OWNER_TOKEN" http://localhost:3030/my/outreach/status
"""

import argparse
import contextlib
import functools
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple, TypeVar

import bottle
import msgspec
import psycopg2

import batches
import composing
import db
import handles
import import_columns
import importing
import metrics
import opt_outs
import page
import page_batch
import page_check
import page_import
import page_login
import page_new
import page_people
import page_settings
import page_today
import personal_data
import quiet_times
import report
import runtime
import serving
import settings
import spreadsheet

MAX_FILENAME = 300  # characters
CREATED_BY = "owner's API"  # outreach_batches.created_by
STATUSES = ("pending", "queued", "sent", "failed", "skipped")  # of items
UPLOAD_LIMIT = 64 * 1024 * 1024  # bytes of a CSV file; 100,000 people have about 10 MB

SEARCH = "/my/outreach/search"
DRY_RUN = "/my/outreach/dry-run"
BATCHES = "/my/outreach/batch"
BATCH = "/my/outreach/batch/<batch_id>"
SETTINGS = "/my/outreach/settings"
STATUS = "/my/outreach/status"
CLIENTS = "/my/outreach/clients"
OPT_OUTS = "/my/outreach/opt-outs"
OPT_OUTS_CSV = "/my/outreach/opt-outs.csv"
OPT_OUTS_IMPORT = "/my/outreach/opt-outs/import"
PEOPLE = "/my/outreach/people"
METRICS = "/metrics"
HEALTH = "/healthz"
UPLOADS = (CLIENTS, OPT_OUTS_IMPORT)

# The pages; each module says which addresses are its own. And the addresses of the page that take a file.
PAGES = (
    page_login.ROUTES, page_today.ROUTES, page_batch.ROUTES, page_people.ROUTES, page_settings.ROUTES, page_new.ROUTES,
    page_check.ROUTES, page_import.ROUTES,
)  # fmt: skip
PAGE_UPLOADS = (page_import.UPLOAD,)

Connection = Any  # psycopg2's connection
T = TypeVar("T")
logger = logging.getLogger("outreach-server")


Handle = Annotated[str, msgspec.Meta(min_length=1, max_length=handles.MAX_HANDLE_LENGTH)]


class Test(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """The body of POST test: the owner's own handle."""

    to: Handle


class Send(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """The body of POST send: what the owner has seen, and after how many messages the batch pauses."""

    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    recipients: composing.Count
    first_n: composing.Count | None = None


class Retry(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """The body of POST retry. `include_unknown`: items that may have been sent are sent again, too."""

    include_unknown: bool = False


class Person(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """The body of what is about one person: a handle of theirs. It is in no URL, because URLs are logged."""

    handle: Handle

    def __post_init__(self) -> None:
        if not handles.is_handle(self.handle.strip()) or db.UNSTORABLE.search(self.handle):
            raise ValueError("`handle` is neither a phone number nor an e-mail address")


class OptOut(Person, rename="camel", forbid_unknown_fields=True):
    """The body of POST opt-outs: who wants no more messages, in the owner's words, and since when if not from now."""

    word: Annotated[str, msgspec.Meta(max_length=opt_outs.WORD_LENGTH)] | None = None
    received_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class Assignment(Person, rename="camel", forbid_unknown_fields=True):
    """The body of POST assign: the client who has this handle."""

    client_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if db.UNSTORABLE.search(self.client_id):
            raise ValueError("`clientId` is no client's id")


class Api(NamedTuple):
    """What the endpoints share: the owner's token, the databases' URLs, the dispatcher's interval between two ticks."""

    token: str
    quinn_url: str
    icloud_url: str
    interval: timedelta


def make_app(api: Api) -> bottle.Bottle:
    """The WSGI application. Every endpoint but HEALTH needs the owner's token."""
    app = serving.make_app("QUINN_DB_URL and QUINN_ICLOUD_DB_URL")

    def route(path: str, method: str, endpoint: Callable[..., object]) -> None:
        app.route(path, method, functools.partial(_answer, api, endpoint))

    route(SEARCH, "POST", search)
    route(DRY_RUN, "POST", dry_run)
    route(BATCHES, "POST", draft)
    route(BATCHES, "GET", list_batches)
    route(BATCH, "GET", show)
    route(f"{BATCH}/items", "GET", list_items)
    for verb in (test, send, pause, resume, cancel, retry):
        route(f"{BATCH}/{verb.__name__}", "POST", verb)
    route(SETTINGS, "GET", read_settings)
    route(SETTINGS, "PUT", change_settings)
    route(STATUS, "GET", status)
    route(CLIENTS, "POST", import_clients)
    route(OPT_OUTS, "GET", list_opt_outs)
    route(OPT_OUTS, "POST", opt_out)
    route(OPT_OUTS_CSV, "GET", export_opt_outs)
    route(OPT_OUTS_IMPORT, "POST", import_opt_outs)
    route(f"{OPT_OUTS}/end", "POST", opt_in)
    route(f"{OPT_OUTS}/assign", "POST", assign)
    route(f"{PEOPLE}/show", "POST", show_person)
    route(f"{PEOPLE}/forget", "POST", forget)
    route(METRICS, "GET", scrape)
    app.route(HEALTH, "GET", functools.partial(health, api))
    return app


# --- people and batches -------------------------------------------------------------------------------


def search(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST search: how many people match, and who is left out and why; `?reason=` lists all of one reason."""
    request, reason, after, limit = _body(composing.Request), _text("reason"), _text("after"), _limit()
    if reason is None:
        return composing.search(quinn, icloud, request)
    return composing.people_left_out(quinn, icloud, request, reason, after, limit)


def dry_run(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST dry-run: what a draft would contain, without writing it."""
    return composing.dry_run(quinn, icloud, _body(composing.Request), api.interval)


def draft(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST batch: write a draft. The same request again is the same draft."""
    return composing.draft(quinn, icloud, _body(composing.Request), api.interval, CREATED_BY)


def list_batches(api: Api, quinn: Connection, icloud: Connection) -> object:
    """GET batch: the batches, newest first, a page at a time."""
    return composing.list_batches(quinn, _after(), _limit())


def show(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """GET batch/ID: a batch, its counts, and what its owner was shown of it."""
    return composing.show(quinn, _batch_id(batch_id))


def list_items(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """GET batch/ID/items: its items in the order of sending, a page at a time."""
    status = _text("status")
    if status is not None and status not in STATUSES:
        serving.abort(400, f"`status` must be one of {', '.join(STATUSES)}")
    return composing.list_items(quinn, _batch_id(batch_id), status, _after(), _limit())


# --- verbs --------------------------------------------------------------------------------------------


def test(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """POST test: queue the first person's text for the owner's own handle; it expires after 10 minutes."""
    return {"sendQueueId": composing.send_test(quinn, icloud, _batch_id(batch_id), _body(Test).to)}


def send(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """POST send: approve the content that the digest names."""
    seen = _body(Send)
    return composing.send(quinn, _batch_id(batch_id), seen.digest, seen.recipients, seen.first_n)


def pause(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """POST pause: stop a batch, and withdraw what no device has collected."""
    return batches.pause(quinn, icloud, _batch_id(batch_id)).as_data()


def resume(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """POST resume: go on with a batch that is paused and approved."""
    return batches.resume(quinn, _batch_id(batch_id)).as_data()


def cancel(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """POST cancel: end a batch for good, and withdraw what no device has collected."""
    return batches.cancel(quinn, icloud, _batch_id(batch_id)).as_data()


def retry(api: Api, quinn: Connection, icloud: Connection, batch_id: str) -> object:
    """POST retry: make the failed items of a batch pending again."""
    batch_id, body = _batch_id(batch_id), serving.read_body()
    include_unknown = serving.decode_body(body, Retry).include_unknown if body else False
    try:
        batches.acquire_lock(quinn, threading.Event())  # until the connection is closed
    except batches.LockTimeout:
        serving.abort(409, "the dispatcher is busy: try again in a moment")
    found = batches.retry(quinn, batch_id, include_unknown)
    if found is None:
        serving.abort(404, f"there is no batch {batch_id}")
    status, pending, unknown = found
    return {"status": status, "pending": pending, "unknown": unknown}


# --- settings, status, clients ------------------------------------------------------------------------


def read_settings(api: Api, quinn: Connection, icloud: Connection) -> object:
    """GET settings."""
    return settings.read(quinn)


def change_settings(api: Api, quinn: Connection, icloud: Connection) -> object:
    """PUT settings: change the settings that the body has; the others stay as they are."""
    return settings.change(quinn, icloud, _body(settings.Changes))


def status(api: Api, quinn: Connection, icloud: Connection) -> object:
    """GET status: what is being sent, or why nothing is, as status.py says it."""
    return report.report(api.interval)


def import_clients(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST clients: what the CSV file in the body would change; with `?apply=DIGEST` of that plan, change it."""
    options: dict[str, Any] = {name: _texts(name) for name in ("handle", "ignore")}
    options |= {name: _text(name) or None for name in ("name", "encoding")}
    filename, wanted, is_strict = _text("filename") or "upload.csv", _text("apply"), _flag("strict")
    if len(filename) > MAX_FILENAME:
        serving.abort(400, f"`filename` is longer than {MAX_FILENAME} characters")
    job = importing.plan(quinn, icloud, bottle.request.environ["wsgi.input"], filename, **options)
    if wanted is None:
        return {"plan": job.plan, "applied": None}
    if wanted != job.plan.digest:
        serving.abort(409, "this file would not change what the plan said: look at the new plan", {"plan": job.plan})
    return {"plan": job.plan, "applied": importing.apply(quinn, job, strict=is_strict)}


# --- opt-outs, what is stored -------------------------------------------------------------------------


def list_opt_outs(api: Api, quinn: Connection, icloud: Connection) -> object:
    """GET opt-outs: the record, newest first; with `?unassigned=true` what no client has. A page at a time."""
    after, limit = _after(), _limit()
    if _flag("unassigned"):
        found = opt_outs.unassigned(quinn, icloud, after, limit + 1)
    else:
        found = opt_outs.page(icloud, after, limit + 1)
    shown = found[:limit]
    return {"entries": [one.as_data() for one in shown], "after": shown[-1].id if len(found) > limit else None}


def export_opt_outs(api: Api, quinn: Connection, icloud: Connection) -> object:
    """GET opt-outs.csv: the whole record, for an authority or for another program."""
    file = io.StringIO()
    opt_outs.write_csv(icloud, file)
    headers = {"Content-Type": "text/csv; charset=utf-8", "Content-Disposition": 'attachment; filename="opt-outs.csv"'}
    return bottle.HTTPResponse(file.getvalue().encode(), 200, headers)


def import_opt_outs(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST opt-outs/import: record an opt-out for each line of the CSV file in the body."""
    entries = opt_outs.read_list(bottle.request.environ["wsgi.input"])
    return opt_outs.import_list(quinn, icloud, entries).as_data()


def opt_out(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST opt-outs: record that a person wants no more messages; it takes effect at once."""
    said = _body(OptOut)
    return opt_outs.record(quinn, icloud, said.handle, said.word, said.received_at).as_data()


def opt_in(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST opt-outs/end: end a handle's opt-out; name what else of the same person has opted out."""
    handle = _body(Person).handle
    is_ended = opt_outs.end(icloud, handle)
    return {"isEnded": is_ended, "others": opt_outs.others_of_person(quinn, icloud, handle)}


def assign(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST opt-outs/assign: give a handle to a client, so that its opt-out counts there."""
    wanted = _body(Assignment)
    return {"isNew": opt_outs.assign(quinn, icloud, wanted.handle, wanted.client_id)}


def show_person(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST people/show: all that is stored about a person."""
    return personal_data.show_person(quinn, icloud, _body(Person).handle)


def forget(api: Api, quinn: Connection, icloud: Connection) -> object:
    """POST people/forget: erase a person's messages and name; the opt-out stays."""
    return personal_data.forget(quinn, icloud, _body(Person).handle).as_data()


def scrape(api: Api, quinn: Connection, icloud: Connection) -> object:
    """GET metrics: the queue's, and those of the batches, limits and jobs, for Prometheus."""
    for conn in (quinn, icloud):
        # Every statement has an index. Without statistics, the planner might read a whole table instead.
        db.query(conn, "SET enable_seqscan = off")
    body = metrics.render([*metrics.queue(functools.partial(db.query, icloud)), *metrics.outreach(quinn)])
    return bottle.HTTPResponse(body, Content_Type=metrics.CONTENT_TYPE)


def health(api: Api) -> object:
    """GET healthz: whether both databases answer; for monitors, without a token."""
    with _databases(api) as (quinn, icloud):
        db.query(quinn, "SELECT 1")
        db.query(icloud, "SELECT 1")
    return {"status": "ok"}


# --- requests -----------------------------------------------------------------------------------------


def _answer(api: Api, endpoint: Callable[..., object], **arguments: str) -> object:
    """Run an endpoint with the databases, for the owner only; turn what the rules refuse into responses."""
    serving.require_token(api.token)
    try:
        with _databases(api) as (quinn, icloud):
            return endpoint(api, quinn, icloud, **arguments)
    except batches.Refused as refusal:
        serving.abort(refusal.status, str(refusal), refusal.data)
    except import_columns.ImportRefused as refusal:
        serving.abort(refusal.status, str(refusal))
    except (settings.SettingsRefused, opt_outs.OptOutError, spreadsheet.Unreadable) as refusal:
        serving.abort(400, str(refusal))
    except settings.NoSettings as problem:
        serving.abort(503, str(problem), Retry_After=serving.RETRY_AFTER)


@contextlib.contextmanager
def _databases(api: Api) -> Iterator[tuple[Connection, Connection]]:
    """Connect to both databases for one request. Raises db.DatabaseUnavailable."""
    try:
        with (
            contextlib.closing(db.connect(api.quinn_url)) as quinn,
            contextlib.closing(db.connect(api.icloud_url)) as icloud,
        ):
            yield quinn, icloud
    except psycopg2.Error as error:
        raise db.classify_error(error) from None


def _body(kind: type[T]) -> T:
    return serving.decode_body(serving.read_body(), kind)


def _batch_id(text: str) -> str:
    if not runtime.is_uuid(text):
        serving.abort(404, f"there is no batch {text!r:.60}: its id is a UUID")
    return text.lower()


def _limit() -> int:
    """Return how many entries the page is to have."""
    text = _text("limit")
    if text is None:
        return composing.MAX_PAGE
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= composing.MAX_PAGE:
        serving.abort(400, f"`limit` must be a whole number from 1 to {composing.MAX_PAGE}")
    return int(text)


def _after() -> str | None:
    """Return the id after which the page begins."""
    after = _text("after")
    if after is not None and not runtime.is_uuid(after):
        serving.abort(400, "`after` must be the `after` of the page before")
    return after


def _text(name: str) -> str | None:
    """Return a parameter of the query; None if it is missing."""
    return next(iter(_texts(name)), None)


def _texts(name: str) -> list[str]:
    """Return all values of a parameter. Abort with 400 if one is no text that the database can store."""
    try:
        # bottle leaves them as WSGI has them: each byte is a character.
        values = [value.encode("latin-1").decode() for value in bottle.request.query.getall(name)]
    except UnicodeError:
        values = ["\0"]
    if any(db.UNSTORABLE.search(value) for value in values):
        serving.abort(400, f"`{name}` is no text in UTF-8")
    return values


def _flag(name: str) -> bool:
    value = bottle.request.query.get(name, "false")
    if value not in ("true", "false"):
        serving.abort(400, f"`{name}` must be true or false")
    return bool(value == "true")


# --- the page and the API at one address --------------------------------------------------------------


def make_site(api: Api, base_url: str | None) -> tuple[serving.Application, list[serving.Upload]]:
    """The WSGI application of the API and of the owner's page, and which requests may have a long body."""
    site = page.Site(api.token, api.quinn_url, api.icloud_url, api.interval, base_url)
    api_app, page_app = make_app(api), page.make_app(site, [route for routes in PAGES for route in routes])
    api_paths = {route.rule for route in api_app.routes}

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        is_for_api = path.startswith("/my/") or path in api_paths
        return (api_app if is_for_api else page_app)(environ, start_response)

    may_upload = functools.partial(page.may_upload, site)
    return application, [
        api_upload(api.token),
        serving.Upload(PAGE_UPLOADS, UPLOAD_LIMIT, may_upload),
    ]


def api_upload(token: str) -> serving.Upload:
    """To whom a long body is open at the API."""
    return serving.Upload(UPLOADS, UPLOAD_LIMIT, functools.partial(serving.has_token, token))


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        description="Serve the owner's page and API over HTTP.",
        epilog="environment: OUTREACH_OWNER_TOKEN (needed), QUINN_DB_URL, QUINN_ICLOUD_DB_URL, OUTREACH_HOST, "
        "OUTREACH_PORT, OUTREACH_BASE_URL (the page's address in the browser), DISPATCH_INTERVAL_SECONDS and "
        "DEFAULT_REGION (the dispatcher's), LOG_LEVEL. "
        "examples: python outreach_server.py; OUTREACH_PORT=8080 python outreach_server.py",
    ).parse_args(argv)
    runtime.load_settings()
    runtime.set_up_logging()
    quiet_times.logger.disabled = True  # the report shows its warnings
    token = runtime.owner_token()
    host = os.environ.get("OUTREACH_HOST") or "127.0.0.1"
    port = runtime.env_int("OUTREACH_PORT", 3030, lowest=0, highest=65_535)
    interval = timedelta(seconds=runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30))
    handles.default_region()
    app, uploads = make_site(Api(token, db.url("quinn"), db.url("icloud"), interval), runtime.base_url())
    sockets = serving.open_sockets(host, port, "OUTREACH_HOST and OUTREACH_PORT")
    return serving.serve("outreach-server", app, sockets, serving.THREADS, uploads)


def entry_point() -> None:
    """Run the command `outreach-server`, which an installation of the package has."""
    runtime.run_main(main)


if __name__ == "__main__":
    entry_point()
