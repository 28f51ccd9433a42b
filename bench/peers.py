"""Run one of the HTTP servers that the benchmark compares with the product's server.

Run by environment.py. `constant`: waitress and bottle without a database, the upper bound of a server on them.
`starlette`: the product's work and SQL on starlette, uvicorn and asyncpg. `limit`: read a request, commit once, and
respond with a constant, the least work for a message. Example (descriptor 3
is a listening socket, QUINN_ICLOUD_DB_URL the database):

    python bench/peers.py starlette 3<&SOCKET
"""

import hmac
import logging
import os
import re
import socket
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, timedelta
from typing import Any

import msgspec
import product
from load import CONTENT_LENGTH

LISTENING = 3  # the descriptor of the inherited socket
POOL = 4  # asyncpg's connections in each process; 2 and 8 are not faster
SOME_ID = str(uuid.UUID(int=0))
PENDING = "/client/imessage/send-queue/pending"
RESULT = "/client/imessage/send-queue/{id}/result"
ENQUEUE = "/admin/send-queue/enqueue"
LAST_SEEN_PRECISION = timedelta(seconds=10)  # the product's
PARAMETER = re.compile(r"%\((\w+)\)s")
logger = logging.getLogger("peer")


def database_url() -> str:
    return os.environ["QUINN_ICLOUD_DB_URL"]


def constant(listening: socket.socket) -> None:
    """Respond to every request with the same short JSON, with waitress and bottle."""
    import bottle
    import waitress

    app = bottle.Bottle()
    app.route("<path:path>", ["GET", "POST"], lambda path: {"success": True, "data": {"items": []}})
    # send_bytes: with the default of 1, each write wakes the main thread, and 64 connections get 5 % of the
    # responses.
    server = waitress.create_server(
        app, sockets=[listening], threads=4, asyncore_use_poll=True, send_bytes=18_000, ident=None
    )
    product.sd_notify("READY=1")
    server.run()


def limit(listening: socket.socket) -> None:
    """Commit one row for each request and respond with a constant, one connection at a time."""
    conn = product.connect(database_url())
    product.query(conn, "CREATE TABLE IF NOT EXISTS commits (committed_at TIMESTAMPTZ)")
    product.query(conn, "PREPARE commit_once AS INSERT INTO commits VALUES (now())")
    body = msgspec.json.encode({"success": True, "data": {"items": [{"id": SOME_ID}]}})
    response = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    product.sd_notify("READY=1")
    while True:
        client, _ = listening.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        while piece := client.recv(65_536):
            received += piece
            head, separator, rest = received.partition(b"\r\n\r\n")
            length = CONTENT_LENGTH.search(head)
            if separator and len(rest) >= (int(length[1]) if length else 0):
                received = b""
                product.query(conn, "EXECUTE commit_once")
                client.sendall(response)
        client.close()


def numbered(sql: str) -> tuple[str, list[str]]:
    """Replace each %(name)s of `sql` with $1, $2 …; return the new SQL and the names in that order."""
    names = list(dict.fromkeys(PARAMETER.findall(sql)))
    return PARAMETER.sub(lambda match: f"${names.index(match[1]) + 1}", sql), names


class StarlettePeer:
    """Implement the three endpoints and their log lines with starlette and asyncpg, which prepares the statements."""

    def __init__(self) -> None:
        from starlette.responses import Response

        content = {"batchItemId": SOME_ID, "deviceId": SOME_ID, "toHandle": "+14155550123", "body": "Hello"}
        message, sent = msgspec.json.encode(content), b'{"status": "sent"}'
        self.pending_sql = numbered(product.endpoint_sql("GET", PENDING, "x"))
        self.result_sql = numbered(product.endpoint_sql("POST", RESULT.format(id=SOME_ID), "x", sent))
        self.enqueue_sql = numbered(product.endpoint_sql("POST", ENQUEUE, product.SERVICE_TOKEN, message))
        self.response = Response
        self.pool: Any = None

    async def connect(self) -> None:
        import asyncpg

        self.pool = await asyncpg.create_pool(database_url(), min_size=POOL, max_size=POOL)

    async def fetch(self, statement: tuple[str, Sequence[str]], values: dict[str, Any]) -> Any:
        sql, names = statement
        async with self.pool.acquire() as conn:
            return await conn.fetch(sql, *[values[name] for name in names])

    def succeed(self, data: Any) -> Any:
        return self.response(msgspec.json.encode({"success": True, "data": data}), media_type="application/json")

    async def pending(self, request: Any) -> Any:
        values = {**_tokens(request), "precision": LAST_SEEN_PRECISION}
        rows = await self.fetch(self.pending_sql, values)
        if not rows:
            return self.response(status_code=401)
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
        return self.succeed({"items": items})

    async def result(self, request: Any) -> Any:
        report = msgspec.json.decode(await request.body(), type=product.ResultBody)
        values = {**_tokens(request), "id": request.path_params["id"], **product.result_columns(report)}
        rows = await self.fetch(self.result_sql, values)
        if not rows or rows[0][0] is None or rows[0][2] not in ("queued", report.status):
            return self.response(status_code=409)
        logger.info("result recorded sendQueueId=%s status=%s", rows[0][0], report.status)
        return self.succeed({"id": rows[0][0], "status": report.status})

    async def enqueue(self, request: Any) -> Any:
        if not hmac.compare_digest(_token(request), product.SERVICE_TOKEN):
            return self.response(status_code=401)
        message = msgspec.json.decode(await request.body(), type=product.EnqueueBody)
        rows = await self.fetch(self.enqueue_sql, product.enqueue_columns(message))
        if not rows or not rows[0][1]:
            return self.response(status_code=409)
        to = product.mask_handle(message.to_handle)
        logger.info("message enqueued sendQueueId=%s deviceId=%s to=%s", rows[0][0], message.device_id, to)
        return self.succeed({"sendQueueId": rows[0][0]})


def _token(request: Any) -> str:
    return str(request.headers.get("authorization", "")).removeprefix("Bearer ")


def _tokens(request: Any) -> dict[str, str]:
    """Return the two forms in which a device's token may be stored, as the product's SQL names them."""
    token = _token(request)
    return {"plain": token, "digest": product.hash_token(token)}


def starlette(listening: socket.socket) -> None:
    """Serve StarlettePeer with uvicorn, uvloop and httptools."""
    import uvicorn
    import uvloop
    from starlette.applications import Starlette
    from starlette.routing import Route

    peer = StarlettePeer()
    app = Starlette(
        routes=[
            Route(PENDING, peer.pending),
            Route(RESULT, peer.result, methods=["POST"]),
            Route(ENQUEUE, peer.enqueue, methods=["POST"]),
        ]
    )

    class Server(uvicorn.Server):  # type: ignore[misc]  # mypy ignores uvicorn's types
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await peer.connect()
            await super().startup(sockets)
            product.sd_notify("READY=1")

    product.set_up_logging()
    uvloop.run(Server(uvicorn.Config(app, log_level="warning", access_log=False)).serve(sockets=[listening]))


if __name__ == "__main__":
    servers = {"constant": constant, "limit": limit, "starlette": starlette}
    servers[sys.argv[1]](socket.socket(fileno=LISTENING))
