"""Check POST /admin/send-queue/enqueue: one row for each item, and which fields are refused."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ENQUEUE, ApiClient, read_row
from testing import TestData


@pytest.mark.parametrize("status", ["queued", "sent"])
def test_repeated_enqueue_returns_same_row(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, status: str
) -> None:
    item_id = str(uuid.uuid4())
    queue_id = admin.enqueued(mac_id, batchItemId=item_id)
    if status == "sent":
        mac.result(queue_id)
    recorded = read_row(world, queue_id)
    assert admin.enqueued(mac_id, batchItemId=item_id.upper(), unknownField=1) == queue_id
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]
    assert read_row(world, queue_id) == recorded


@pytest.mark.parametrize("change", [{"body": "Other"}, {"toHandle": "a@example.com"}, {"deviceId": "other"}])
@pytest.mark.parametrize("status", ["queued", "sent"])
def test_other_content_gets_409_with_row_id(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, change: dict[str, str], status: str
) -> None:
    item_id = str(uuid.uuid4())
    queue_id = admin.enqueued(mac_id, batchItemId=item_id)
    if status == "sent":
        mac.result(queue_id)
    if "deviceId" in change:
        change = {"deviceId": world.device("other")}
    response = admin.enqueue(mac_id, batchItemId=item_id, **change)
    assert response.status_code == 409
    assert response.json()["data"] == {"sendQueueId": queue_id}
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]


@pytest.mark.parametrize("ended", ["failure_reason = 'not on iMessage'", "withdrawn_at = now()"])
def test_failed_or_withdrawn_item_gets_new_row(world: TestData, admin: ApiClient, mac_id: str, ended: str) -> None:
    item_id = str(uuid.uuid4())
    first = admin.enqueued(mac_id, batchItemId=item_id)
    world.icloud(f"UPDATE icloud.send_queue SET status = 'failed', {ended}")
    second = admin.enqueued(mac_id, batchItemId=item_id, body="mended")
    assert second != first
    assert [read_row(world, queue_id)["status"] for queue_id in (first, second)] == ["failed", "queued"]


def test_twenty_threads_enqueue_one_row(world: TestData, admin: ApiClient, mac_id: str) -> None:
    item_id = str(uuid.uuid4())
    with ThreadPoolExecutor(20) as pool:
        queue_ids = set(pool.map(lambda _: admin.enqueued(mac_id, batchItemId=item_id), range(20)))
    assert len(queue_ids) == 1
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]


NO_UUIDS = [None, 5, "", "no-uuid", "{" + "a" * 36]


NO_PHONES = ["", " ", "name", "12", "1" * 16, "+1\0415555", "+1415555012x"]


NO_ADDRESSES = ["a@b", "@b.de", "a b@c.de", "a@b.de\n", "\ud800@b.de", "a\0@b.de", "a" * 250 + "@b.de"]


BAD_FIELDS: dict[str, list[object]] = {
    "batchItemId": [*NO_UUIDS],
    "deviceId": [*NO_UUIDS],
    "toHandle": [None, 5, *NO_PHONES, *NO_ADDRESSES],
    "body": [None, 5, "", [], "a\0b", "a\ud800b"],
    "validUntil": [5, "", "tomorrow", "2026-04-22T12:00:00", "2026-13-01T00:00:00Z"],
}


def test_invalid_field_is_named(world: TestData, admin: ApiClient, mac_id: str) -> None:
    for field, value in [(field, value) for field, values in BAD_FIELDS.items() for value in values]:
        response = admin.enqueue(mac_id, **{field: value})
        assert (response.status_code, value) == (400, value)
        assert field in response.json()["error"]
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(0,)]


def test_missing_field_is_named(admin: ApiClient, mac_id: str) -> None:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": mac_id, "toHandle": "+14155550123", "body": "Hello!"}
    for field in message:
        response = admin.call("POST", ENQUEUE, {name: text for name, text in message.items() if name != field})
        assert response.status_code == 400
        assert field in response.json()["error"]


def test_handles_are_stored_unchanged(admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    handles = ["+14155550123", "4155550123", "(415) 555-0123", "+1 415.555.0123", "a.b+c@mail.example.com"]
    for handle in handles:
        admin.enqueued(mac_id, toHandle=handle)
    assert [item["toHandle"] for item in mac.pending()] == handles


FAR_INSTANTS = {
    "2026-04-22T12:00:00+23:59": "2026-04-21 12:01:00+00",  # PostgreSQL itself refuses such an offset
    "2026-04-22T12:00:00.25-16:00": "2026-04-23 04:00:00.25+00",
    "9999-12-31T23:59:59-12:00": "10000-01-01 11:59:59+00",
    "0001-01-01T00:00:00+12:00": "0001-12-31 12:00:00+00 BC",
}


@pytest.mark.parametrize(("valid_until", "instant"), FAR_INSTANTS.items())
def test_valid_until_takes_any_instant_with_offset(
    world: TestData, admin: ApiClient, mac_id: str, valid_until: str, instant: str
) -> None:
    admin.enqueued(mac_id, validUntil=valid_until)
    kept = "SELECT valid_until = %(instant)s::timestamptz FROM icloud.send_queue"
    assert world.icloud(kept, instant=instant) == [(True,)]


def test_unknown_device_is_named(admin: ApiClient, databases: object) -> None:
    response = admin.enqueue(str(uuid.uuid4()))
    assert response.status_code == 400
    assert "deviceId" in response.json()["error"]


def test_body_arrives_unchanged(admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    bodies = ['Grüße 👋\n\t\\ " %s %(body)s $1 ; --', "\u2028\U0001f468\u200d\U0001f469", " "]
    for body in bodies:
        admin.enqueued(mac_id, body=body)
    assert [item["body"] for item in mac.pending()] == bodies
