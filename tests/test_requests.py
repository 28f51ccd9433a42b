"""Check what holds for every path of the server: path, method, body size, one statement a request."""

import json
import uuid
from collections.abc import Callable, Iterator

import pytest
import requests
from helpers import ENQUEUE, PENDING, STATUS, ApiClient, read_row, record_queries
from testing import TestData

import serving


def test_unknown_path_gets_404(admin: ApiClient) -> None:
    for path in ("/", "/nothing", PENDING + "/", "/client/imessage/send-queue//result", "/%00", "/%ff%fe"):
        response = admin.call("GET", path)
        assert response.status_code == 404
        assert "path" in response.json()["error"]


def test_wrong_method_gets_405_with_allow(
    world: TestData, base_url: str, admin: ApiClient, mac: ApiClient, mac_id: str
) -> None:
    queue_id = admin.enqueued(mac_id)
    result = f"/client/imessage/send-queue/{queue_id}/result"
    for path, right in {PENDING: "GET", STATUS: "GET", "/healthz": "GET", ENQUEUE: "POST", result: "POST"}.items():
        for method in {"HEAD", "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"} - {right}:
            response = requests.request(method, base_url + path, headers=mac.headers, timeout=5)
            assert (response.status_code, response.headers["Allow"]) == (405, right)
            assert method == "HEAD" or "method" in response.json()["error"]
    assert read_row(world, queue_id)["collected_at"] is None, "a HEAD must not collect"


def test_body_above_limit_gets_413(admin: ApiClient, mac_id: str) -> None:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": mac_id, "toHandle": "+14155550123", "body": ""}
    room = 65_536 - len(json.dumps(message))
    for length, status in ((room, 200), (room + 1, 413), (300_000, 413), (3_000_000, 413)):
        try:
            response = admin.call("POST", ENQUEUE, message | {"body": "x" * length})
        except requests.ConnectionError:
            assert length > serving.READ_LIMIT  # cut off while it was still talking
            continue
        assert response.status_code == status


def chunked(admin: ApiClient, pieces: Iterator[bytes]) -> requests.Response:
    return requests.post(admin.base_url + ENQUEUE, data=pieces, headers=admin.headers, timeout=5)


def test_chunked_body_is_accepted(admin: ApiClient, mac_id: str) -> None:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": mac_id, "toHandle": "+14155550123", "body": "in pieces"}

    assert chunked(admin, (bytes([byte]) for byte in json.dumps(message).encode())).status_code == 200


def test_chunked_body_above_limit_gets_413(admin: ApiClient) -> None:
    for length in (70_000, 300_000):
        response = chunked(admin, (b"x" * 1000 for _ in range(length // 1000)))
        assert (response.status_code, response.json()["success"]) == (413, False)


def test_each_request_is_one_statement(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = admin.enqueued(mac_id)
    for _ in range(8):  # each thread of the server has prepared its statements by then
        mac.pending(), mac.result(queue_id), admin.enqueue(mac_id)
    statements = record_queries(monkeypatch)
    calls: list[Callable[[], object]] = [
        mac.pending,
        lambda: mac.result(queue_id),
        lambda: admin.enqueue(mac_id),
        lambda: ApiClient(mac.base_url, "wrong").call("GET", PENDING),
        lambda: mac.result(queue_id, "nonsense"),
        lambda: admin.call("GET", STATUS),
        lambda: admin.call("GET", "/healthz"),
    ]
    for call in calls:
        statements.clear()
        call()
        assert len([sql for sql in statements if not sql.startswith("PREPARE")]) == 1
