"""Provide what the tests of the jobs and of the server share: calls of both, rows, times and records.

`testing` (in tools/) has the databases and processes, which the tools use as well. The fixtures are in conftest.py.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from testing import ROOT, SERVICE_TOKEN, Script, TestData

import db
import dispatcher

HANDLE = "+14155550123"
PENDING = "/client/imessage/send-queue/pending"
ENQUEUE = "/admin/send-queue/enqueue"
STATUS = "/admin/send-queue/status"
MOCK_URL = "http://mac-sync.test"  # nothing listens there: the fixture `mock_server` responds
MOCK_ENQUEUE = MOCK_URL + ENQUEUE
LOCK_WAITS = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
Start = Callable[..., Script]


# --- the jobs -----------------------------------------------------------------------------------------


def sync(world: TestData) -> dispatcher.JobCounts:
    """Run the sync job once. Its errors reach the test."""
    return dispatcher.sync(world.databases.quinn, world.databases.icloud)


def tick(world: TestData, mac_sync: dispatcher.SendQueueClient) -> dispatcher.JobCounts:
    """Run the dispatch job once. Its errors reach the test."""
    return dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)


def run_dispatch(mac_sync: dispatcher.SendQueueClient) -> dispatcher.JobCounts | None:
    """Run the dispatch job as the loop does: under the lock, and with its errors logged."""
    return dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, mac_sync))


def mock_client() -> dispatcher.SendQueueClient:
    """Return a client of the fixture `mock_server`."""
    return dispatcher.SendQueueClient(MOCK_URL, SERVICE_TOKEN)


class Crash(BaseException):
    """The simulated end of the process."""


class CrashingClient(dispatcher.SendQueueClient):
    """A client that, if `crash` is set, raises Crash after the server's commit and before the response is recorded."""

    crash = False

    def enqueue(self, *arguments: Any) -> str:
        queue_id = super().enqueue(*arguments)
        if self.crash:
            raise Crash
        return queue_id


def logged_problems(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the dispatcher's log records from WARNING on."""
    records = [record for record in caplog.records if record.name == "outreach-dispatcher"]
    return [record for record in records if record.levelno >= logging.WARNING]


# --- the server ---------------------------------------------------------------------------------------


class ApiClient:
    """Call the API with a token. Fail unless each response is JSON of the promised form."""

    def __init__(self, base_url: str, token: str | None) -> None:
        self.base_url = base_url
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(
        self, method: str, path: str, body: object = None, timeout: float = 10, **options: Any
    ) -> requests.Response:
        """Send a request whose body is bytes, text, or a value for JSON."""
        data = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
        options.setdefault("headers", self.headers)
        response = requests.request(method, self.base_url + path, data=data, timeout=timeout, **options)
        assert response.headers["Content-Type"] == "application/json"
        content = response.json()
        assert content["success"] is (response.status_code == 200)
        assert "data" in content if content["success"] else re.search(r"\w", content["error"])
        return response

    def pending(self) -> list[dict[str, str]]:
        response = self.call("GET", PENDING)
        assert response.status_code == 200
        items: list[dict[str, str]] = response.json()["data"]["items"]
        return items

    def result(self, queue_id: str, status: str = "sent", **more: object) -> requests.Response:
        return self.call("POST", f"/client/imessage/send-queue/{queue_id}/result", {"status": status, **more})

    def enqueue(self, device_id: str, **fields: object) -> requests.Response:
        """Enqueue a message for this device, with these fields in place of the usual ones."""
        message = {
            "batchItemId": str(uuid.uuid4()),
            "toHandle": "+14155550123",
            "body": "Hello!",
            "deviceId": device_id,
        }
        return self.call("POST", ENQUEUE, message | fields)

    def enqueued(self, device_id: str, **fields: object) -> str:
        """Enqueue a message, which must succeed; return the id of its row."""
        response = self.enqueue(device_id, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["data"]["sendQueueId"])


def lock_waits(world: TestData) -> int:
    """Return how many sessions of the queue's database wait for a lock."""
    return len(world.icloud(LOCK_WAITS))


# --- a device -----------------------------------------------------------------------------------------


def poll(base_url: str, token: str) -> list[dict[str, str]]:
    """Poll as the device with this token; return the messages."""
    return ApiClient(base_url, token).pending()


def report_all(base_url: str, token: str, status: str = "sent", error: str | None = None) -> int:
    """Poll as a device does, then report a result for each message; return their number."""
    device = ApiClient(base_url, token)
    items = device.pending()
    for item in items:
        assert device.result(item["id"], status, error=error).status_code == 200
    return len(items)


# --- times and holds ----------------------------------------------------------------------------------


def enqueue(base_url: str, device_id: str, item_id: str, **fields: object) -> requests.Response:
    """Ask the server to enqueue a message of an item."""
    message = {"batchItemId": item_id, "deviceId": device_id, "toHandle": "+14155550123", "body": "Hello!", **fields}
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    return requests.post(f"{base_url}/admin/send-queue/enqueue", json=message, headers=headers, timeout=10)


def enqueued(base_url: str, device_id: str, item_id: str, **fields: object) -> str:
    """Enqueue a message of an item; return its row's id."""
    response = enqueue(base_url, device_id, item_id, **fields)
    assert response.status_code == 200, response.text
    return str(response.json()["data"]["sendQueueId"])


def ago(seconds: float = 0, **length: float) -> datetime:
    """Return the time that was so many seconds ago, or `minutes=`, `hours=` and so on."""
    return datetime.now(UTC) - timedelta(seconds=seconds, **length)


def utc_in(minutes: float) -> str:
    """Return the time of day in UTC, HH:MM, in so many minutes."""
    return f"{datetime.now(UTC) + timedelta(minutes=minutes):%H:%M}"


def zone_at(hour: int) -> str:
    """Return a zone without summer time where it is now between `hour` and an hour later."""
    ahead = (hour - datetime.now(UTC).hour + 12) % 24 - 12
    return f"Etc/GMT{-ahead:+}" if ahead else "UTC"


def start_quiet_hours(world: TestData) -> None:
    """Set quiet hours that began an hour ago and end in an hour."""
    world.settings(quiet_hours_start=utc_in(-60), quiet_hours_end=utc_in(60), quiet_hours_tz="UTC")


def hold_sending(world: TestData, hold: str) -> None:
    """Make `hold` hold sending: "paused", "quiet hours" or "no settings"."""
    if hold == "paused":
        world.settings(paused=True)
    elif hold == "quiet hours":
        start_quiet_hours(world)
    else:
        world.quinn("DELETE FROM outreach_settings")


# --- rows ---------------------------------------------------------------------------------------------


def queue_row(world: TestData, item_id: str | None, device_id: str, **columns: Any) -> str:
    """Insert a row of the queue, without the dispatcher; return its id."""
    values = {
        "device_id": device_id,
        "to_handle": HANDLE,
        "body": "Hello!",
        "batch_item_id": item_id,
        **columns,
    }
    names, places = ", ".join(values), ", ".join(f"%({name})s" for name in values)
    sql = f"INSERT INTO icloud.send_queue ({names}) VALUES ({places}) RETURNING id"
    return str(world.icloud(sql, **values)[0][0])


def in_flight(world: TestData, device_id: str, **columns: Any) -> tuple[str, str]:
    """Insert a queued item, and its row with these columns; return their ids."""
    item_id = world.item(world.batch(), status="queued", queued_at=ago(30), device_id=device_id)
    row_id = queue_row(world, item_id, device_id, **columns)
    world.quinn("UPDATE outreach_batch_items SET send_queue_id = %(row)s WHERE id = %(id)s", row=row_id, id=item_id)
    return item_id, row_id


def status_of(world: TestData, item_id: str) -> tuple[str, str | None]:
    """Return an item's status and failure reason."""
    sql = "SELECT status, failure_reason FROM outreach_batch_items WHERE id = %(id)s"
    [(status, reason)] = world.quinn(sql, id=item_id)
    return status, reason


def read_row(world: TestData, queue_id: str) -> dict[str, Any]:
    """Return a row of the queue as a dictionary."""
    columns = "status, sent_at, failure_reason, collected_at, withdrawn_at, valid_until, updated_at, device_id"
    [values] = world.icloud(f"SELECT {columns} FROM icloud.send_queue WHERE id = %(id)s", id=queue_id)
    return dict(zip(columns.split(", "), values, strict=True))


def row_statuses(world: TestData) -> list[tuple[str, bool]]:
    """Return the status of each row of the queue, and whether it was withdrawn, oldest first."""
    return world.icloud("SELECT status, withdrawn_at IS NOT NULL FROM icloud.send_queue ORDER BY created_at, id")


# --- scripts ------------------------------------------------------------------------------------------


def run_script(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of the product to its end, with its output piped."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# --- statements ---------------------------------------------------------------------------------------


def run_sql(url: str, sql: str) -> list[db.Row]:
    """Run a statement over a connection of its own."""
    with contextlib.closing(db.connect(url)) as conn:
        return db.query(conn, sql)


def record_statements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return a list that receives each statement of the jobs and the server, with its parameters, from now on."""
    seen: list[tuple[str, Any]] = []
    query, server_query = db.query, db.RetryingConnection.query

    def record(conn: Any, sql: str, params: Any = None) -> list[db.Row]:
        if not sql.startswith(("PREPARE", "EXECUTE")):  # the server's, which `record_server` has seen
            seen.append((sql, params))
        return query(conn, sql, params)

    def record_server(connection: db.RetryingConnection, sql: str, params: Any = None) -> list[db.Row]:
        seen.append((sql, params))
        return server_query(connection, sql, params)

    monkeypatch.setattr(db, "query", record)
    monkeypatch.setattr(db.RetryingConnection, "query", record_server)
    return seen


def record_queries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the text of each `db.query`, from now on."""
    seen: list[str] = []
    query = db.query

    def record(conn: Any, sql: str, params: db.Params | None = None) -> list[db.Row]:
        seen.append(sql)
        return query(conn, sql, params)

    monkeypatch.setattr(db, "query", record)
    return seen


def plan_nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a plan's node and all nodes below it."""
    yield plan
    for part in plan.get("Plans", []):
        yield from plan_nodes(part)
