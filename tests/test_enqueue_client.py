"""Check the HTTP client of the dispatcher: its request, and its reaction to each response and each outage."""

import json
import logging
import socket
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
import responses
from helpers import (
    HANDLE,
    MOCK_ENQUEUE,
    MOCK_URL,
    logged_problems,
    mock_client,
    queue_row,
    run_dispatch,
    status_of,
    tick,
    utc_in,
)
from testing import SERVICE_TOKEN, TestData

import dispatcher


def test_request_matches_contract(world: TestData, mock_server: responses.RequestsMock) -> None:
    device_id = world.device()
    item_id = world.item(world.batch(), world.client(HANDLE))
    mock_server.post(MOCK_ENQUEUE, json={"success": True, "data": {"sendQueueId": str(uuid.uuid4())}})
    tick(world, mock_client())
    request = mock_server.calls[0].request
    [(drafted_at,)] = world.quinn("SELECT created_at FROM outreach_batch_items")
    assert json.loads(request.body or b"") == {
        "batchItemId": item_id, "deviceId": device_id, "toHandle": HANDLE, "body": "Hello!",
        "attempt": 1, "draftedAt": drafted_at.isoformat(),
    }  # fmt: skip
    assert request.headers["Authorization"] == f"Bearer {SERVICE_TOKEN}"


def test_row_is_valid_until_two_minutes_before_quiet_hours(
    world: TestData, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    world.batch(clients=1)
    world.settings(quiet_hours_start=utc_in(90), quiet_hours_end=utc_in(180), quiet_hours_tz="UTC")
    expected = (datetime.now(UTC) + timedelta(minutes=88)).replace(second=0, microsecond=0)
    tick(world, mac_sync)
    [(valid_until,)] = world.icloud("SELECT valid_until FROM icloud.send_queue")
    assert abs(valid_until - expected) <= timedelta(minutes=1)  # the clock may have moved on by one


def test_row_without_quiet_hours_never_expires(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.batch(clients=1)
    tick(world, mac_sync)
    assert world.icloud("SELECT valid_until FROM icloud.send_queue") == [(None,)]


OUTAGES: dict[str, dict[str, Any]] = {
    **{str(code): {"status": code, "json": {"error": "no"}} for code in (201, 301, 302, 401, 403, 404, 405, 408, 429)},
    **{str(code): {"status": code, "json": {"error": "no"}} for code in (502, 503, 504)},
    "a redirect": {"status": 307, "headers": {"Location": f"{MOCK_URL}/elsewhere"}},
    "no id": {"json": {"success": True, "data": {}}},
    "null data": {"json": {"success": True, "data": None}},
    "text for data": {"json": {"success": True, "data": "queued"}},
    "an id that is none": {"json": {"data": {"sendQueueId": "42"}}},
    "an id in braces": {"json": {"data": {"sendQueueId": "{550e8400-e29b-41d4-a716-446655440000}"}}},
    "a number for an id": {"json": {"data": {"sendQueueId": 42}}},
    "a list": {"json": [1, 2]},
    "a proxy's page": {"body": "<html>welcome</html>"},
    "half a document": {"body": '{"success": true, "data": {"sendQ'},
    "bytes": {"body": b"\xff\xfe\x00"},
    "a deep document": {"body": "[" * 100_000},
    "nothing": {"body": ""},
    "409 without an id": {"status": 409, "json": {"success": False, "error": "conflict"}},
    "no connection": {"body": requests.ConnectionError("refused")},
    "no response": {"body": requests.ReadTimeout("slow")},
    "half an response": {"body": requests.exceptions.ChunkedEncodingError("cut")},
    **{f"a proxy's page with status {code}": {"status": code, "body": "<html>"} for code in (400, 404, 413)},
    **{f"another program's {code}": {"status": code, "json": {"error": "no"}} for code in (400, 413)},
}  # fmt: skip


# Those that end without an operator.
PASSING = ("408", "429", "502", "503", "504", "no connection", "no response", "half an response")


def test_outage_stops_tick_and_keeps_items(
    world: TestData, mock_server: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    world.device()
    for _ in range(3):
        world.batch(clients=2)
    for name, response in OUTAGES.items():
        mock_server.reset()
        mock_server.post(MOCK_ENQUEUE, **response)
        caplog.clear()
        assert run_dispatch(mock_client()) is None, name
        assert len(mock_server.calls) == 1, name
        assert world.statuses() == ["pending"] * 6, name
        [record] = logged_problems(caplog)
        assert "enqueue stopped: mac-sync unavailable; items stay pending" in record.message
        assert record.levelno == (logging.WARNING if name in PASSING else logging.ERROR), name
        wrong = "MAC_SYNC_SERVICE_TOKEN" if name in ("401", "403") else "MAC_SYNC_BASE_URL"
        assert wrong in record.message, name


def test_refused_connection_and_timeout_are_outages(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "HTTP_TIMEOUT", (0.2, 0.2))
    world.device()
    world.batch(clients=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(dispatcher.ServerUnavailable, match="ReadTimeout"):
            tick(world, dispatcher.SendQueueClient(address, SERVICE_TOKEN))
    with pytest.raises(dispatcher.ServerUnavailable, match="ConnectionError"):
        tick(world, dispatcher.SendQueueClient(address, SERVICE_TOKEN))
    assert world.statuses() == ["pending"]


@pytest.mark.parametrize(("code", "requests_made"), [(400, 1), (413, 1), (500, 3)])
def test_rejected_item_fails_alone(
    world: TestData, mock_server: responses.RequestsMock, code: int, requests_made: int
) -> None:
    world.device()
    item_id, other = world.item(world.batch()), world.item(world.batch())
    for _ in range(requests_made):
        mock_server.post(MOCK_ENQUEUE, status=code, json={"success": False, "error": "`toHandle` is odd\0"})
    mock_server.post(MOCK_ENQUEUE, json={"success": True, "data": {"sendQueueId": str(uuid.uuid4())}})
    assert run_dispatch(mock_client()) == {"failed": 1, "queued": 1, "skipped": 0}
    assert status_of(world, item_id) == ("failed", f"HTTP {code}: `toHandle` is odd\ufffd")
    assert status_of(world, other) == ("queued", None)
    assert len(mock_server.calls) == requests_made + 1


def test_status_500_is_retried(world: TestData, mock_server: responses.RequestsMock) -> None:
    world.device()
    world.batch(clients=1)
    mock_server.post(MOCK_ENQUEUE, status=500)
    mock_server.post(MOCK_ENQUEUE, status=500)
    mock_server.post(MOCK_ENQUEUE, json={"success": True, "data": {"sendQueueId": str(uuid.uuid4())}})
    assert tick(world, mock_client())["queued"] == 1


def test_status_500_is_not_retried_while_stopping(world: TestData, mock_server: responses.RequestsMock) -> None:
    world.device()
    world.batch(clients=1)

    def last_words(_: object) -> tuple[int, dict[str, str], str]:
        dispatcher.stop.set()
        return 500, {}, "{}"

    mock_server.add_callback(responses.POST, MOCK_ENQUEUE, last_words)
    run_dispatch(mock_client())
    assert len(mock_server.calls) == 1
    assert world.statuses() == ["pending"]


def test_conflict_links_item_to_existing_row(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    item_id = world.item(world.batch())
    row_id = queue_row(world, item_id, world.device(), body="What was sent before the item was edited")
    assert tick(world, mac_sync)["queued"] == 1
    assert world.quinn("SELECT status, send_queue_id FROM outreach_batch_items") == [("queued", row_id)]
    [record] = logged_problems(caplog)
    assert row_id in record.message


def test_client_ignores_proxy_settings(
    world: TestData, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    world.device()
    world.batch(clients=1)
    assert tick(world, mac_sync)["queued"] == 1
