"""Check POST /client/imessage/send-queue/ID/result: what a device may report, once."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from helpers import ApiClient, lock_waits, read_row
from testing import TestData, wait_until

import db


def test_result_is_recorded(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    sent, failed = admin.enqueued(mac_id), admin.enqueued(mac_id)
    assert mac.result(sent, error="ignored").json()["data"] == {"id": sent, "status": "sent"}
    assert mac.result(failed, "failed", error="not on iMessage").json()["data"] == {"id": failed, "status": "failed"}
    now = world.icloud("SELECT now()")[0][0]
    assert abs((read_row(world, sent)["sent_at"] - now).total_seconds()) < 5
    assert read_row(world, sent)["failure_reason"] is None
    assert read_row(world, failed)["sent_at"] is None
    assert read_row(world, failed)["failure_reason"] == "not on iMessage"


@pytest.mark.parametrize(("first", "other"), [("sent", "failed"), ("failed", "sent")])
def test_recorded_result_never_changes(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, first: str, other: str
) -> None:
    queue_id = admin.enqueued(mac_id)
    mac.result(queue_id, first, error="the first words")
    recorded = read_row(world, queue_id)
    assert mac.result(queue_id, first, error="other words").status_code == 200
    assert mac.result(queue_id, other).status_code == 409
    assert read_row(world, queue_id) == recorded


def test_any_error_text_is_stored(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    words = {"": "the device gave no reason", "x" * 5000: "x" * 1000, "a\0b": "a\ufffdb", "a\ud800b": "a\ufffdb"}
    for error, reason in words.items():
        queue_id = admin.enqueued(mac_id)
        assert mac.result(queue_id, "failed", error=error or None).status_code == 200
        assert read_row(world, queue_id)["failure_reason"] == reason


def test_invalid_utf8_in_error_text_is_replaced(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    body = b'{"status": "failed", "error": "caf\xe9"}'
    assert mac.call("POST", f"/client/imessage/send-queue/{queue_id}/result", body).status_code == 200
    assert read_row(world, queue_id)["failure_reason"] == "caf\ufffd"


def test_unknown_and_foreign_messages_get_same_404(
    world: TestData, base_url: str, admin: ApiClient, mac: ApiClient, mac_id: str
) -> None:
    world.device("other")
    queue_id = admin.enqueued(mac_id)
    responses = [ApiClient(base_url, "other").result(queue_id), mac.result(str(uuid.uuid4())), mac.result("no-uuid")]
    assert [response.status_code for response in responses] == [404, 404, 404]
    assert len({response.text for response in responses}) == 1
    assert "no such message" in responses[0].text
    assert read_row(world, queue_id)["status"] == "queued"
    assert mac.result(queue_id.upper()).status_code == 200


BAD_RESULTS = [
    b"",
    b"{",
    b"[]",
    b'"sent"',
    b"{}",
    b'{"status": "gone"}',
    b'{"status": 1}',
    b'{"status": "failed", "error": 5}',
]


def test_malformed_result_changes_nothing(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    path = f"/client/imessage/send-queue/{queue_id}/result"
    for body in BAD_RESULTS:
        assert mac.call("POST", path, body).status_code == 400
        assert ApiClient(mac.base_url, "wrong").call("POST", path, body).status_code == 401, "the token comes first"
    assert read_row(world, queue_id)["status"] == "queued"


def test_one_of_two_concurrent_results_is_recorded(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str
) -> None:
    for _ in range(10):
        queue_id = admin.enqueued(mac_id)
        with ThreadPoolExecutor(2) as pool:
            responses = list(pool.map(lambda status: mac.result(queue_id, status), ("sent", "failed")))  # noqa: B023
        assert sorted(response.status_code for response in responses) == [200, 409]
        winner = next(response for response in responses if response.status_code == 200)
        assert read_row(world, queue_id)["status"] == winner.json()["data"]["status"]


def test_result_waits_for_concurrent_result(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    with closing(db.connect(world.databases.icloud_url)) as first, ThreadPoolExecutor(1) as pool:
        first.autocommit = False
        sql = "UPDATE icloud.send_queue SET status = 'sent', sent_at = now() WHERE id = %(id)s"
        db.query(first, sql, {"id": queue_id})
        response = pool.submit(mac.result, queue_id, "failed")
        wait_until(lambda: lock_waits(world) == 1)
        first.commit()
        assert response.result().status_code == 409
    assert read_row(world, queue_id)["status"] == "sent"
