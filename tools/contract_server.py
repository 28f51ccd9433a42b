"""The device's part of the send queue server, in memory: for tests of the sender alone.

It follows the contract line by line and is deliberately simple. A test fills it (`enqueue`), looks at its rows, and
breaks what passes (`on_exchange`, which is called before a request is handled and before its response is sent; if it
returns False, the connection is cut there). It keeps every byte that came from the Mac in `received`. Example:

    with contract_server.ContractServer("token") as server:
        server.enqueue("+14155550123", "Hello!")
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Data = dict[str, Any]
COLLECT_AGAIN = 60  # seconds in which the same collectId gets the same message
LISTED = 50
PENDING = "/client/imessage/send-queue/pending"


class Refusal(Exception):
    """A response other than 200."""

    def __init__(self, status: int, error: str, data: Data | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.data = data


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def same_handle(handle: str) -> str:
    return handle.lower().replace(" ", "")


class ContractServer:
    def __init__(self, token: str, now: Callable[[], float] = time.time) -> None:
        self.token = token
        self.now = now
        self.rows: dict[str, Data] = {}
        self.opt_outs: dict[tuple[str, str], str] = {}  # (handle, receivedAt): word
        self.opted_out: set[str] = set()
        self.instance: str | None = None
        self.problem: str | None = None
        self.health: list[Data] = []
        self.requeues = True  # what is given back becomes a new row, at most three times in a row
        self.skew = 0.0  # seconds by which its clock is wrong
        self.is_old = False  # a server of before: it knows no peek
        self.received: list[bytes] = []
        self.requests: list[str] = []
        self.responses: list[tuple[str, int]] = []
        self.refuse_with: tuple[int, dict[str, str]] | None = None  # a status and headers for every request
        self.on_exchange: Callable[[str, str], bool] = lambda moment, what: True
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are killed here on purpose
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> ContractServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self.close()

    def close(self) -> None:
        self._http.server_close()

    # What a test does.

    def enqueue(self, handle: str, body: str, item: str | None = None, attempt: int = 1, **columns: Any) -> Data:
        with self.lock:
            row: Data = {
                "id": str(uuid.uuid4()), "toHandle": handle, "body": body, "batchItemId": item or str(uuid.uuid4()),
                "attempt": attempt, "draftedAt": self.now(), "createdAt": self.now(), "status": "queued",
                "number": next(self._numbers), "collected_at": None, "collect_id": None, "valid_until": None,
                "withdrawn": False, "outcome": None, "error": None, "deliveredAt": None, "lateError": None,
                "watchedUntil": None, **columns,
            }  # fmt: skip
            self.rows[row["id"]] = row
            return row

    def row(self, item: str) -> Data:
        """Return the newest row of a batch item."""
        return max(
            (row for row in self.rows.values() if row["batchItemId"] == item), key=lambda row: int(row["number"])
        )

    def pause(self) -> None:
        """Withdraw what is not collected."""
        with self.lock:
            for row in self.rows.values():
                if row["status"] == "queued" and row["collected_at"] is None:
                    row.update(status="failed", withdrawn=True)

    def is_quiet(self) -> bool:
        """Return whether every row has ended."""
        with self.lock:
            return all(row["status"] != "queued" for row in self.rows.values())

    # The endpoints.

    def pending(self, query: str) -> Data:
        peeks = query == "peek=true" and not self.is_old
        listed = sorted(
            (
                row
                for row in self.rows.values()
                if row["status"] == "queued" and (row["collected_at"] or self.allowed(row))
            ),
            key=lambda row: int(row["number"]),
        )[:LISTED]
        if not peeks:
            for row in listed:
                row["collected_at"] = row["collected_at"] or self.now()
        items = []
        for row in listed:
            item = {
                "id": row["id"],
                "toHandle": row["toHandle"],
                "body": row["body"],
                "createdAt": iso(row["createdAt"]),
            }
            if peeks:
                item.update(batchItemId=row["batchItemId"], attempt=row["attempt"], draftedAt=iso(row["draftedAt"]))
            items.append(item)
        count = sum(word != "START" for word in self.opt_outs.values())
        return {"items": items, "optOuts": count} if peeks else {"items": items}

    def allowed(self, row: Data) -> bool:
        in_time = row["valid_until"] is None or row["valid_until"] > self.now()
        return in_time and same_handle(row["toHandle"]) not in self.opted_out

    def collect(self, queue_id: str, body: Data) -> Data:
        row = self.rows.get(queue_id)
        if not row:
            raise Refusal(404, "there is no such message for this device")
        self.check_instance(body)
        same = row["collect_id"] is not None and row["collect_id"] == body["collectId"]
        if row["status"] != "queued":
            raise Refusal(409, "it has ended", {"reason": "gone"})
        if row["collected_at"] is None:
            if not self.allowed(row):
                raise Refusal(409, "it may not go any more", {"reason": "gone"})
            row.update(collected_at=self.now(), collect_id=body["collectId"])
        elif not same:
            raise Refusal(409, "it was collected before", {"reason": "collected"})
        elif self.now() - row["collected_at"] > COLLECT_AGAIN or not self.allowed(row):
            raise Refusal(409, "it was collected too long ago", {"reason": "late"})
        return {name: row[name] for name in ("id", "toHandle", "body", "batchItemId", "attempt")}

    def check_instance(self, body: Data) -> None:
        self.instance = self.instance or body["instance"]
        if self.instance != body["instance"]:
            raise Refusal(409, "this token is in use on another Mac", {"reason": "otherInstance"})

    def result(self, queue_id: str, body: Data) -> Data:
        row = self.rows.get(queue_id)
        if not row:
            raise Refusal(404, "there is no such message for this device")
        self.check_instance(body)
        status, outcome = body["status"], body.get("outcome")
        resolves = row["outcome"] == "unknown" and outcome is None
        if row["status"] not in ("queued", status) and not resolves:
            raise Refusal(409, f"this message is already recorded as {row['status']}")
        if row["status"] == "queued" or resolves:
            names = ("error", "watchedUntil")
            row.update(status=status, outcome=outcome, **{name: body.get(name) for name in names})
            row["history"] = [*row.get("history", []), outcome or status]
            if outcome == "not_started":
                self.requeue(row)
        for name in ("deliveredAt", "lateError"):
            row[name] = row[name] or body.get(name)
        return {"id": queue_id, "status": row["status"]}

    def requeue(self, row: Data) -> None:
        """Do what the dispatcher does with a message that was given back."""
        pair = (row["batchItemId"], row["attempt"])
        rows = [other for other in self.rows.values() if (other["batchItemId"], other["attempt"]) == pair]
        in_a_row = sum(other["outcome"] == "not_started" for other in rows)
        if self.requeues and in_a_row < 3 and self.allowed(row):
            self.enqueue(row["toHandle"], row["body"], *pair, draftedAt=row["draftedAt"])

    def opt_out(self, body: Data) -> Data:
        handle = same_handle(body["handle"])
        self.opt_outs.setdefault((handle, body["receivedAt"]), body["word"])
        latest = max((at, word) for (who, at), word in self.opt_outs.items() if who == handle)
        if latest[1] in ("START", "UNSTOP"):
            self.opted_out.discard(handle)
        else:
            self.opted_out.add(handle)
        return {"optOuts": sum(word != "START" for word in self.opt_outs.values())}

    def record_health(self, body: Data) -> Data:
        self.problem = body["problem"]
        self.health.append(body)
        return {}

    def respond(self, method: str, path: str, token: str, content: bytes) -> tuple[int, Data]:
        if token != f"Bearer {self.token}":
            return 401, {"success": False, "error": "the bearer token is missing or not valid here"}
        path, _, query = path.partition("?")
        try:
            body = json.loads(content) if content else {}
            if method == "GET" and path == PENDING:
                return 200, {"success": True, "data": self.pending(query)}
            if match := re.fullmatch("/client/imessage/send-queue/([^/]+)/(collect|result)", path):
                return 200, {"success": True, "data": getattr(self, match[2])(match[1], body)}
            if path == "/client/imessage/health":
                return 200, {"success": True, "data": self.record_health(body)}
            if path == "/client/imessage/opt-outs":
                return 200, {"success": True, "data": self.opt_out(body)}
            raise Refusal(404, "there is nothing at this path")
        except Refusal as refusal:
            data = {"data": refusal.data} if refusal.data else {}
            return refusal.status, {"success": False, "error": refusal.error, **data}

    def exchange(self, method: str, path: str, token: str, content: bytes) -> tuple[int, dict[str, str], Data]:
        """Handle one request, and keep it. Returns status, headers and the response."""
        what = f"{method} {path}"
        with self.lock:
            self.received.append(what.encode() + b"\n" + content)
            self.requests.append(what)
            if self.refuse_with:
                status, headers = self.refuse_with
                value: Data = {"success": False, "error": "refused"}
            else:
                headers = {}
                status, value = self.respond(method, path, token, content)
            self.responses.append((what, status))
            return status, headers, value

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # the handler has a `self` of its own
        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = f"{self.command} {self.path}"
                if not server.on_exchange("before", what):
                    return
                token = self.headers.get("Authorization", "")
                status, headers, value = server.exchange(self.command, self.path, token, content)
                if not server.on_exchange("after", what):
                    return
                body = json.dumps(value).encode()
                self.send_response(status)
                for name, text in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = handle_any

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(int(time.time() + server.skew))

            def log_message(self, *_: object) -> None:
                pass

        return Handler
