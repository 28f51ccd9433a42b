"""What the benchmark measures the product against, as processes and as functions.

Run by bench.py. `constant` is waitress and bottle with nothing behind them: the most that a server on them can
answer. `starlette` does the product's work, with the product's own SQL, on starlette, uvicorn and asyncpg.
`procrastinate` and `pgqueuer` are queues on PostgreSQL without HTTP. `tick_by_batch` is the dispatcher's tick as
queries for each batch. Example (descriptor 3 is a listening socket, QUINN_ICLOUD_DB_URL the database):

    python demo/bench_peers.py starlette 3<&SOCKET
"""

import hmac
import io
import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

import db  # the product is beside this directory
import handles
import runtime
import send_queue_server

LISTENING = 3  # the descriptor of the inherited socket
POOL = 4  # connections a process; 2 and 8 answer no more
SERVICE_TOKEN = "service-token-0123456789"  # noqa: S105  # guards nothing
NOWHERE = str(uuid.UUID(int=0))
logger = logging.getLogger("starlette-peer")


# --- over HTTP ----------------------------------------------------------------------------------------


def constant(listening: socket.socket) -> None:
    """Waitress and bottle, answering every request with the same short JSON."""
    import bottle
    import waitress

    app = bottle.Bottle()
    app.route("<path:path>", ["GET", "POST"], lambda path: {"success": True, "data": {"items": []}})
    waitress.serve(app, sockets=[listening], threads=1)  # more answer less


class Recorder:
    """Stand in for db.RetryingConnection and keep the statement: a peer runs the one that the product runs."""

    sql = ""

    def query(self, sql: str, params: db.Params | None = None) -> list[db.Row]:
        self.sql = sql
        return []


def statement(method: str, path: str, token: str, body: bytes = b"") -> str:
    """The SQL of one of the product's endpoints."""
    recorder = Recorder()
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
    return recorder.sql


def numbered(sql: str) -> tuple[str, list[str]]:
    """`sql` with $1, $2 … for %(name)s, and the names in that order."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", sql)))
    return re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", sql), names


def starlette(listening: socket.socket) -> None:
    """The three endpoints and their log, on starlette, uvicorn (uvloop, httptools) and asyncpg (prepared)."""
    import asyncpg
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    message = {"batchItemId": NOWHERE, "deviceId": NOWHERE, "toHandle": "+14155550123", "body": "Hello"}
    pending_sql, pending_names = numbered(statement("GET", send_queue_server.PENDING, "x"))
    result_path = send_queue_server.RESULT.replace("<queue_id>", NOWHERE)
    result_sql, result_names = numbered(statement("POST", result_path, "x", b'{"status": "sent"}'))
    enqueue_body = msgspec.json.encode(message)
    enqueue_sql, enqueue_names = numbered(statement("POST", send_queue_server.ENQUEUE, SERVICE_TOKEN, enqueue_body))
    pool: Any = None

    def token(request: Request) -> str:
        return str(request.headers.get("authorization", "")).removeprefix("Bearer ")

    def answer(data: Any) -> Response:
        return Response(msgspec.json.encode({"success": True, "data": data}), media_type="application/json")

    async def fetch(sql: str, names: Sequence[str], values: dict[str, Any]) -> Any:
        async with pool.acquire() as conn:
            return await conn.fetch(sql, *[values[name] for name in names])

    async def pending(request: Request) -> Response:
        plain = token(request)
        values = {"plain": plain, "digest": db.hash_token(plain), "precision": timedelta(seconds=10)}
        rows = await fetch(pending_sql, pending_names, values)
        if not rows:
            return Response(status_code=401)
        items = [
            {
                "id": row[0],
                "toHandle": row[1],
                "body": row[2],
                "createdAt": row[3].astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            for row in rows
            if row[0]
        ]
        return answer({"items": items})

    async def result(request: Request) -> Response:
        report = msgspec.json.decode(await request.body(), type=send_queue_server.Result)
        plain = token(request)
        reason = (report.error or "the device gave no reason") if report.status == "failed" else None
        values = {
            "plain": plain,
            "digest": db.hash_token(plain),
            "id": request.path_params["queue_id"],
            "status": report.status,
            "reason": reason,
        }
        rows = await fetch(result_sql, result_names, values)
        if not rows or rows[0][0] is None or not (rows[0][2] or rows[0][1] == report.status):
            return Response(status_code=409)
        logger.info("result recorded sendQueueId=%s status=%s", rows[0][0], report.status)
        return answer({"id": rows[0][0], "status": report.status})

    async def enqueue(request: Request) -> Response:
        if not hmac.compare_digest(token(request), SERVICE_TOKEN):
            return Response(status_code=401)
        wanted = msgspec.json.decode(await request.body(), type=send_queue_server.Enqueue)
        rows = await fetch(enqueue_sql, enqueue_names, msgspec.structs.asdict(wanted))
        if not rows or not rows[0][2]:
            return Response(status_code=409)
        to = handles.mask_handle(wanted.to_handle)
        logger.info("message enqueued sendQueueId=%s deviceId=%s to=%s", rows[0][0], wanted.device_id, to)
        return answer({"sendQueueId": rows[0][0]})

    app = Starlette(
        routes=[
            Route(send_queue_server.PENDING, pending),
            Route(send_queue_server.RESULT.replace("<queue_id>", "{queue_id}"), result, methods=["POST"]),
            Route(send_queue_server.ENQUEUE, enqueue, methods=["POST"]),
        ]
    )

    async def serve() -> None:
        nonlocal pool
        runtime.set_up_logging()
        pool = await asyncpg.create_pool(os.environ["QUINN_ICLOUD_DB_URL"], min_size=POOL, max_size=POOL)
        await uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).serve(sockets=[listening])

    import uvloop

    uvloop.run(serve())


# --- queues without HTTP ------------------------------------------------------------------------------


def timed(count: int, step: Callable[[], Awaitable[None]]) -> Awaitable[float]:
    """Messages a second, one after another."""

    async def run() -> float:
        await step()  # the first one prepares statements
        start = time.perf_counter()
        for _ in range(count):
            await step()
        return count / (time.perf_counter() - start)

    return run()


async def procrastinate(url: str, count: int) -> float:
    """Messages a second through procrastinate: defer, fetch, finish."""
    import procrastinate as library
    from procrastinate.jobs import Status

    app = library.App(connector=library.PsycopgConnector(conninfo=url, min_size=1, max_size=1))

    # The task itself is never run: the loop below fetches its jobs and finishes them.
    send = app.task(name="send", queue="outbox")(lambda to_handle, body: None)

    async with app.open_async():
        manager = app.job_manager
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        worker = await manager.register_worker()

        async def step() -> None:
            await send.defer_async(to_handle="+14155550123", body="Hello")
            job = await manager.fetch_job(["outbox"], worker)
            if job is None:
                raise RuntimeError("procrastinate had no job")
            await manager.finish_job(job, Status.SUCCEEDED, delete_job=False)

        return await timed(count, step)


async def pgqueuer(url: str, count: int) -> float:
    """Messages a second through pgqueuer: enqueue, dequeue, log as done."""
    import asyncpg
    from pgqueuer.queries import EntrypointExecutionParameter, Queries

    conn = await asyncpg.connect(url)
    try:
        queries = Queries.from_asyncpg_connection(conn)
        if not await queries.schema_is_installed():
            await queries.install()
        manager = uuid.uuid4()
        entrypoints = {"send": EntrypointExecutionParameter(0)}
        payload = msgspec.json.encode({"toHandle": "+14155550123", "body": "Hello"})

        async def step() -> None:
            await queries.enqueue("send", payload)
            [job] = await queries.dequeue(1, entrypoints, manager, None, timedelta(seconds=30))
            await queries.log_jobs([(job, "successful", None)])

        return await timed(count, step)
    finally:
        await conn.close()


# --- the dispatcher's tick as queries for each batch --------------------------------------------------


def tick_by_batch(quinn: Any, icloud: Any, enqueue: Callable[[], str]) -> int:
    """The dispatch job's rules as a loop asks for them, batch by batch, over the same tables and indexes."""
    sending = """
        SELECT id FROM outreach_batches WHERE status = 'sending' AND NOT dry_run
         ORDER BY last_served_at NULLS FIRST, created_at, id
    """
    sent = 0
    for (batch_id,) in db.query(quinn, sending):
        [settings] = db.query(quinn, "SELECT paused, max_per_minute, max_per_hour, max_per_day, min_gap_seconds "
                              "FROM outreach_settings WHERE id = 1")  # fmt: skip
        if settings[0] or _limit_reached(quinn, settings[1:4]) or _gap_is_kept(quinn, batch_id, settings[4]):
            continue
        sent += _send_oldest(quinn, icloud, batch_id, enqueue)
    return sent


def _limit_reached(quinn: Any, limits: Sequence[int | None]) -> bool:
    usage = """
        SELECT (SELECT count(*) FROM outreach_batch_items
                 WHERE status = 'sent' AND sent_at > now() - %(window)s::interval)
             + (SELECT count(*) FROM outreach_batch_items WHERE status = 'queued')
    """
    used = [db.query(quinn, usage, {"window": window})[0][0] for window in ("1 minute", "1 hour", "1 day")]
    return any(limit is not None and usage >= limit for limit, usage in zip(limits, used, strict=True))


def _gap_is_kept(quinn: Any, batch_id: str, seconds: int | None) -> bool:
    newest = """
        SELECT max(sent_at) > now() - make_interval(secs => %(seconds)s)
          FROM outreach_batch_items WHERE batch_id = %(batch_id)s AND status = 'sent'
    """
    in_flight = "SELECT FROM outreach_batch_items WHERE batch_id = %(batch_id)s AND status = 'queued' LIMIT 1"
    parameters = {"batch_id": batch_id, "seconds": seconds}
    return bool(seconds) and bool(db.query(quinn, in_flight, parameters) or db.query(quinn, newest, parameters)[0][0])


def _send_oldest(quinn: Any, icloud: Any, batch_id: str, enqueue: Callable[[], str]) -> int:
    oldest = """
        SELECT id, client_id FROM outreach_batch_items WHERE batch_id = %(batch_id)s AND status = 'pending'
         ORDER BY created_at, id LIMIT 1
    """
    counts = "SELECT status, count(*) FROM outreach_batch_items WHERE batch_id = %(batch_id)s GROUP BY status"
    over = "UPDATE outreach_batches SET status = 'sent', updated_at = now() WHERE id = %(batch_id)s"
    primary = "SELECT handle FROM contact_relationships WHERE client_id = %(client_id)s AND is_primary"
    skipped = "UPDATE outreach_batch_items SET status = 'skipped', updated_at = now() WHERE id = %(id)s"
    queued = """
        UPDATE outreach_batch_items
           SET status = 'queued', send_queue_id = %(queue_id)s, queued_at = now(), updated_at = now()
         WHERE id = %(id)s AND status = 'pending'
    """
    served = "UPDATE outreach_batches SET last_served_at = now() WHERE id = %(batch_id)s"
    items = db.query(quinn, oldest, {"batch_id": batch_id})
    if not items:
        if not dict(db.query(quinn, counts, {"batch_id": batch_id})).keys() & {"pending", "queued"}:
            db.query(quinn, over, {"batch_id": batch_id})
        return 0
    item_id, client_id = items[0]
    if not db.query(quinn, primary, {"client_id": client_id}):
        db.query(quinn, skipped, {"id": item_id})
        return 0
    db.query(icloud, "SELECT id FROM icloud.devices LIMIT 1")
    db.query(quinn, queued, {"id": item_id, "queue_id": enqueue()})
    db.query(quinn, served, {"batch_id": batch_id})
    return 1


if __name__ == "__main__":
    contenders = {"constant": constant, "starlette": starlette}
    contenders[sys.argv[1]](socket.socket(fileno=LISTENING))
