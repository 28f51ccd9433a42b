"""Check the server's response and log line for each error, above all for those of the database."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import requests
from helpers import PENDING, STATUS, ApiClient
from testing import SERVICE_TOKEN, PrivatePostgres, Script, TestData, wait_until

import db


def test_refusals_for_the_operator_are_warnings(
    admin: ApiClient, mac: ApiClient, mac_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    queue_id = admin.enqueued(mac_id)
    mac.result(queue_id)
    refused: dict[int, Callable[[], requests.Response]] = {
        401: lambda: mac.call("GET", STATUS),
        409: lambda: mac.result(queue_id, "failed"),
        404: lambda: mac.result(str(uuid.uuid4())),
        400: lambda: admin.enqueue(str(uuid.uuid4())),
    }
    for status, call in refused.items():
        caplog.clear()
        assert call().status_code == status
        [line] = [line for line in caplog.records if f"status={status}" in line.getMessage()]
        assert line.levelname == ("WARNING" if status in (401, 409) else "INFO")
        assert ("compare its token" in line.getMessage()) is (status == 401)


def test_old_tables_get_503_until_migrated(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The response is 503: a 500 would fail the dispatcher's items."""
    for older in ("ALTER TABLE icloud.send_queue DROP COLUMN valid_until", "DROP TABLE icloud.send_queue"):
        world.icloud(older)
        for response in (admin.enqueue(mac_id), mac.call("GET", PENDING)):
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) > 0
            assert "log" in response.json()["error"]
        assert caplog.text.count("run `python db.py migrate`") == 2
        caplog.clear()
        db.migrate(world.databases.icloud_url, "icloud")
        queue_id = admin.enqueued(mac_id)
        assert [item["id"] for item in mac.pending()][-1] == queue_id


def test_missing_permission_gets_503_and_is_logged(
    admin: ApiClient, mac_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    execute = db.RetryingConnection._execute

    def forbidden(self: db.RetryingConnection, conn: Any, *_: object) -> list[db.Row]:
        return execute(self, conn, "DO $$ BEGIN RAISE SQLSTATE '42501'; END $$", None)

    monkeypatch.setattr(db.RetryingConnection, "_execute", forbidden)
    response = admin.enqueue(mac_id)
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert "GRANT the tables' owner" in caplog.text
    assert "migrate" not in caplog.text


WORDS = "of an exception, which may quote a message"


def test_bug_gets_500_and_hides_exception_text(
    mac: ApiClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError(WORDS)

    monkeypatch.setattr(db.RetryingConnection, "query", broken)
    assert mac.call("GET", PENDING).status_code == 500
    assert "KeyError" in caplog.text
    assert "in pending" in caplog.text
    assert WORDS not in caplog.text


def test_failed_statement_gets_500_without_sql(
    world: TestData, admin: ApiClient, mac_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.icloud("ALTER TABLE icloud.send_queue ADD CONSTRAINT no_hello CHECK (body <> 'Hello!')")
    response = admin.enqueue(mac_id)
    assert response.status_code == 500
    assert "INSERT" not in response.text
    assert "no_hello" not in response.text
    assert "Hello" not in response.text
    assert "CheckViolation" in caplog.text
    assert "migrate" not in caplog.text


NOT_NOW = ["08006", "25006", "40001", "40P01", "53100", "53300", "55P03", "57014", "57P03", "58030"]


NOT_MIGRATED = ["42P01", "42703", "42883", "42501"]


AT_FAULT = ["22001", "22P02", "23514", "P0001", "XX000"]


def test_sqlstate_decides_between_503_and_500(world: TestData, admin: ApiClient, mac_id: str) -> None:
    world.icloud("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'a secret' USING ERRCODE = TG_ARGV[0]; END $$
    """)
    for code, status in [(code, 503) for code in NOT_NOW + NOT_MIGRATED] + [(code, 500) for code in AT_FAULT]:
        world.icloud(f"CREATE TRIGGER refuse BEFORE INSERT ON icloud.send_queue EXECUTE FUNCTION refuse('{code}')")
        response = admin.enqueue(mac_id)
        assert (response.status_code, code) == (status, code)
        assert ("Retry-After" in response.headers) is (status == 503)
        assert "secret" not in response.text
        world.icloud("DROP TRIGGER refuse ON icloud.send_queue")
    admin.enqueued(mac_id)


def test_unreachable_database_gets_503_until_back(
    world: TestData, base_url: str, admin: ApiClient, mac: ApiClient, mac_id: str
) -> None:
    assert mac.pending() == []
    [(name,)] = world.icloud("SELECT current_database()")
    with closing(db.connect(world.databases.quinn_url)) as server:
        away = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %(name)s"
        db.query(server, away, {"name": name})
        assert mac.pending() == [], "a lost connection is replaced without an error"
        db.query(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        db.query(server, away, {"name": name})
        for response in (mac.call("GET", PENDING), admin.enqueue(mac_id), admin.call("GET", "/healthz")):
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) > 0
        db.query(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert mac.pending() == []


class Load:
    """Enqueue and poll until stopped; record the start and the status code of each request."""

    def __init__(self, admin: ApiClient, mac: ApiClient, device_id: str) -> None:
        self.admin, self.mac, self.device_id = admin, mac, device_id
        self.responses: list[tuple[float, int]] = []
        self.queue_ids: list[str] = []  # of the messages that the server accepted
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            began = time.monotonic()
            enqueued = self.admin.enqueue(self.device_id)
            if enqueued.status_code == 200:
                self.queue_ids.append(enqueued.json()["data"]["sendQueueId"])
            for response in (enqueued, self.mac.call("GET", PENDING)):
                assert response.status_code == 200 or int(response.headers["Retry-After"]) > 0
                self.responses.append((began, response.status_code))

    def has_response(self, status: int, since: float) -> bool:
        return any(began > since and code == status for began, code in self.responses)


def test_postgresql_killed_under_load_loses_no_message(
    private_postgres: PrivatePostgres, start: Callable[..., Script]
) -> None:
    url = private_postgres.url
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=url, QUINN_DB_URL=url)
    base_url = f"http://127.0.0.1:{script.port()}"
    with closing(db.connect(url)) as conn:
        sql = "INSERT INTO icloud.devices (name, token) VALUES ('mac-mini', 'mac-mini') RETURNING id"
        [(mac_id,)] = db.query(conn, sql)
    load = Load(ApiClient(base_url, SERVICE_TOKEN), ApiClient(base_url, "mac-mini"), mac_id)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(load.run) for _ in range(4)]
        try:
            wait_until(lambda: load.has_response(200, since=0))
            killed = time.monotonic()
            private_postgres.kill()
            wait_until(lambda: load.has_response(503, since=killed))
            private_postgres.start()
            back = time.monotonic()
            wait_until(lambda: load.has_response(200, since=back + 1))
        finally:
            load.stopped.set()
        for client in clients:
            client.result()
    assert {code for _, code in load.responses} == {200, 503}, "never a 500"
    assert not load.has_response(503, since=back + 1), "it recovers within a second"
    assert script.process.poll() is None, "by the same process"
    with closing(db.connect(url)) as conn:
        kept = {queue_id for (queue_id,) in db.query(conn, "SELECT id FROM icloud.send_queue")}
    assert set(load.queue_ids) <= kept
