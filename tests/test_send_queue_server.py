"""The HTTP contract, over a real socket: what each request is answered, and what it leaves in the database."""

import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import requests
from testing import SERVICE_TOKEN, PrivatePostgres, Script, TestData, patient, wait_until

import db
import serving

PENDING = "/client/imessage/send-queue/pending"
ENQUEUE = "/admin/send-queue/enqueue"
WORDS = "of an exception, which may quote a message"
STATUS = "/admin/send-queue/status"


class Client:
    """Calls of the API with a token; each answer must be JSON of the promised form."""

    def __init__(self, base_url: str, token: str | None) -> None:
        self.base_url = base_url
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, method: str, path: str, body: object = None, **options: Any) -> requests.Response:
        data = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
        options.setdefault("headers", self.headers)
        answer = requests.request(method, self.base_url + path, data=data, timeout=10, **options)
        assert answer.headers["Content-Type"] == "application/json"
        content = answer.json()
        assert content["success"] is (answer.status_code == 200)
        assert "data" in content if content["success"] else re.search(r"\w", content["error"])
        return answer

    def pending(self) -> list[dict[str, str]]:
        answer = self.call("GET", PENDING)
        assert answer.status_code == 200
        items: list[dict[str, str]] = answer.json()["data"]["items"]
        return items

    def result(self, queue_id: str, status: str = "sent", **more: object) -> requests.Response:
        return self.call("POST", f"/client/imessage/send-queue/{queue_id}/result", {"status": status, **more})

    def enqueue(self, device_id: str, **fields: object) -> requests.Response:
        message = {
            "batchItemId": str(uuid.uuid4()),
            "toHandle": "+14155550123",
            "body": "Hello!",
            "deviceId": device_id,
        }
        return self.call("POST", ENQUEUE, message | fields)

    def enqueued(self, device_id: str, **fields: object) -> str:
        answer = self.enqueue(device_id, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"]["sendQueueId"])


@pytest.fixture
def admin(base_url: str) -> Client:
    return Client(base_url, SERVICE_TOKEN)


@pytest.fixture
def mac(base_url: str, mac_id: str) -> Client:
    return Client(base_url, "mac-mini")


@pytest.fixture
def mac_id(world: TestData) -> str:
    return world.device("mac-mini")


def row(world: TestData, queue_id: str) -> dict[str, Any]:
    columns = "status, sent_at, failure_reason, collected_at, withdrawn_at, valid_until, updated_at, device_id"
    [values] = world.icloud(f"SELECT {columns} FROM icloud.send_queue WHERE id = %(id)s", id=queue_id)
    return dict(zip(columns.split(", "), values, strict=True))


# --- who may ask ------------------------------------------------------------------------------------------------------

WITHOUT_A_GOOD_TOKEN = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Basic bWFjLW1pbmk6",
    "mac-mini",
    "Bearer mac mini",
    "Bearer mac-mini extra",
    "Bearer m\xe4c",
]


def test_a_token_that_is_missing_malformed_or_wrong_is_refused_everywhere(base_url: str, mac_id: str) -> None:
    result = f"/client/imessage/send-queue/{uuid.uuid4()}/result"
    for header in WITHOUT_A_GOOD_TOKEN:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, path in (("GET", PENDING), ("POST", result), ("POST", ENQUEUE), ("GET", STATUS)):
            answer = Client(base_url, None).call(method, path, {}, headers=headers)
            assert (answer.status_code, header) == (401, header)
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_an_operator_has_to_look_at_is_a_warning(
    admin: Client, mac: Client, mac_id: str, caplog: pytest.LogCaptureFixture
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


def test_neither_token_opens_the_other_ones_paths(base_url: str, admin: Client, mac: Client, mac_id: str) -> None:
    assert mac.enqueue(mac_id).status_code == 401
    assert mac.call("GET", STATUS).status_code == 401
    assert admin.call("GET", PENDING).status_code == 401
    assert admin.result(str(uuid.uuid4())).status_code == 401


def test_a_plain_token_and_a_stored_digest_both_authenticate(world: TestData, base_url: str) -> None:
    device_id, token = db.add_device("with a digest")
    assert world.icloud("SELECT token FROM icloud.devices") == [(db.hash_token(token),)]
    world.device(token="plain-token")
    for owner_id, known in ((device_id, token), (world.icloud("SELECT id FROM icloud.devices")[1][0], "plain-token")):
        queue_id = Client(base_url, SERVICE_TOKEN).enqueued(owner_id)
        assert [item["id"] for item in Client(base_url, known).pending()] == [queue_id]
        assert Client(base_url, known).result(queue_id).status_code == 200


def test_a_digest_from_a_stolen_dump_is_no_token(base_url: str, databases: object) -> None:
    _, token = db.add_device("with a digest")
    assert Client(base_url, db.hash_token(token)).call("GET", PENDING).status_code == 401


def test_a_device_with_an_empty_token_lets_nobody_in(world: TestData, base_url: str) -> None:
    world.icloud("INSERT INTO icloud.devices (name, token) VALUES ('empty', '')")
    assert Client(base_url, None).call("GET", PENDING).status_code == 401


def test_the_scheme_is_read_in_any_case(base_url: str, mac_id: str) -> None:
    assert Client(base_url, None).call("GET", PENDING, headers={"Authorization": "bearer  mac-mini"}).status_code == 200


# --- pending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False], ids=["by the index", "by any plan"])
def test_a_device_gets_its_queued_messages_oldest_first_and_fifty_at_most(
    world: TestData, admin: Client, mac: Client, mac_id: str, index: bool
) -> None:
    if not index:  # which has the same order
        [(name,)] = world.icloud("SELECT current_database()")
        for scan in ("indexscan", "indexonlyscan", "bitmapscan"):
            world.icloud(f"ALTER DATABASE {name} SET enable_{scan} = off")
    other = world.device("other")
    queue_ids = [admin.enqueued(mac_id, body=f"number {number}") for number in range(52)]
    admin.enqueued(other)
    world.icloud(
        "UPDATE icloud.send_queue SET created_at = '2026-04-22 14:00:00.75+02' WHERE id = %(id)s", id=queue_ids[7]
    )
    items = mac.pending()
    assert [item["id"] for item in items] == [queue_ids[7], *queue_ids[:7], *queue_ids[8:50]]
    assert items[0] == {
        "id": queue_ids[7],
        "toHandle": "+14155550123",
        "body": "number 7",
        "createdAt": "2026-04-22T12:00:00Z",
    }
    assert row(world, queue_ids[49])["collected_at"] is not None
    assert row(world, queue_ids[50])["collected_at"] is None, "what is not handed out is not collected"


def test_a_message_is_collected_once_and_handed_out_until_its_result_is_in(
    world: TestData, admin: Client, mac: Client, mac_id: str
) -> None:
    queue_id = admin.enqueued(mac_id)
    assert row(world, queue_id)["collected_at"] is None
    assert len(mac.pending()) == 1
    first = row(world, queue_id)
    assert first["collected_at"] is not None
    assert len(mac.pending()) == 1
    assert row(world, queue_id) == first
    mac.result(queue_id)
    assert mac.pending() == []


def test_a_row_past_its_time_is_not_handed_out_for_the_first_time(
    world: TestData, admin: Client, mac: Client, mac_id: str
) -> None:
    late = admin.enqueued(mac_id, validUntil="2020-01-01T00:00:00Z")
    collected = admin.enqueued(mac_id, validUntil="2099-01-01T00:00:00+02:00")
    assert [item["id"] for item in mac.pending()] == [collected]
    world.icloud("UPDATE icloud.send_queue SET valid_until = now() - interval '1 second'")
    assert [item["id"] for item in mac.pending()] == [collected], "it may be on its way already"
    assert row(world, late)["collected_at"] is None


def test_a_withdrawn_or_finished_row_is_not_handed_out(
    world: TestData, admin: Client, mac: Client, mac_id: str
) -> None:
    withdrawn, failed = admin.enqueued(mac_id), admin.enqueued(mac_id)
    world.icloud("UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now() WHERE id = %(id)s", id=withdrawn)
    mac.result(failed, "failed")
    assert mac.pending() == []


def test_a_poll_notes_when_the_device_was_seen_but_not_at_every_poll(world: TestData, mac: Client) -> None:
    def seen() -> Any:
        return world.icloud("SELECT last_seen_at FROM icloud.devices")[0][0]

    assert seen() is None
    mac.pending()
    first = seen()
    assert first is not None
    mac.pending()
    assert seen() == first
    world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '11 seconds'")
    mac.pending()
    assert seen() >= first


def test_an_idle_poll_writes_nothing(world: TestData, mac: Client) -> None:
    mac.pending()
    version = "SELECT xmin, ctid FROM icloud.devices"
    before = world.icloud(version)
    for _ in range(5):
        mac.pending()
    assert world.icloud(version) == before


# --- result -----------------------------------------------------------------------------------------------------------


def test_a_result_is_recorded(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    sent, failed = admin.enqueued(mac_id), admin.enqueued(mac_id)
    assert mac.result(sent, error="ignored").json()["data"] == {"id": sent, "status": "sent"}
    assert mac.result(failed, "failed", error="not on iMessage").json()["data"] == {"id": failed, "status": "failed"}
    now = world.icloud("SELECT now()")[0][0]
    assert abs((row(world, sent)["sent_at"] - now).total_seconds()) < 5
    assert row(world, sent)["failure_reason"] is None
    assert row(world, failed)["sent_at"] is None
    assert row(world, failed)["failure_reason"] == "not on iMessage"


@pytest.mark.parametrize(("first", "other"), [("sent", "failed"), ("failed", "sent")])
def test_a_result_never_changes(
    world: TestData, admin: Client, mac: Client, mac_id: str, first: str, other: str
) -> None:
    queue_id = admin.enqueued(mac_id)
    mac.result(queue_id, first, error="the first words")
    recorded = row(world, queue_id)
    assert mac.result(queue_id, first, error="other words").status_code == 200
    assert mac.result(queue_id, other).status_code == 409
    assert row(world, queue_id) == recorded


def test_a_devices_words_never_cost_the_result(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    words = {"": "the device gave no reason", "x" * 5000: "x" * 1000, "a\0b": "a\ufffdb", "a\ud800b": "a\ufffdb"}
    for error, reason in words.items():
        queue_id = admin.enqueued(mac_id)
        assert mac.result(queue_id, "failed", error=error or None).status_code == 200
        assert row(world, queue_id)["failure_reason"] == reason


def test_damaged_utf8_in_a_devices_words_is_replaced(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    body = b'{"status": "failed", "error": "caf\xe9"}'
    assert mac.call("POST", f"/client/imessage/send-queue/{queue_id}/result", body).status_code == 200
    assert row(world, queue_id)["failure_reason"] == "caf\ufffd"


def test_what_is_unknown_or_anothers_is_the_same_404(
    world: TestData, base_url: str, admin: Client, mac: Client, mac_id: str
) -> None:
    world.device("other")
    queue_id = admin.enqueued(mac_id)
    answers = [Client(base_url, "other").result(queue_id), mac.result(str(uuid.uuid4())), mac.result("no-uuid")]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert len({answer.text for answer in answers}) == 1
    assert "no such message" in answers[0].text
    assert row(world, queue_id)["status"] == "queued"
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


def test_a_result_that_cannot_be_read_changes_nothing(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    path = f"/client/imessage/send-queue/{queue_id}/result"
    for body in BAD_RESULTS:
        assert mac.call("POST", path, body).status_code == 400
        assert Client(mac.base_url, "wrong").call("POST", path, body).status_code == 401, "the token comes first"
    assert row(world, queue_id)["status"] == "queued"


def test_of_two_results_at_once_one_is_recorded(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    for _ in range(10):
        queue_id = admin.enqueued(mac_id)
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda status: mac.result(queue_id, status), ("sent", "failed")))  # noqa: B023
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        winner = next(answer for answer in answers if answer.status_code == 200)
        assert row(world, queue_id)["status"] == winner.json()["data"]["status"]


def test_a_result_that_meets_another_waits_for_it(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    with closing(db.connect(world.databases.icloud_url)) as first, ThreadPoolExecutor(1) as pool:
        first.autocommit = False
        sql = "UPDATE icloud.send_queue SET status = 'sent', sent_at = now() WHERE id = %(id)s"
        db.query(first, sql, {"id": queue_id})
        answer = pool.submit(mac.result, queue_id, "failed")
        wait_until(lambda: waits_for_a_lock(world))
        first.commit()
        assert answer.result().status_code == 409
    assert row(world, queue_id)["status"] == "sent"


# --- enqueue ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["queued", "sent"])
def test_the_same_item_again_gets_the_row_it_has(
    world: TestData, admin: Client, mac: Client, mac_id: str, status: str
) -> None:
    item_id = str(uuid.uuid4())
    queue_id = admin.enqueued(mac_id, batchItemId=item_id)
    if status == "sent":
        mac.result(queue_id)
    recorded = row(world, queue_id)
    assert admin.enqueued(mac_id, batchItemId=item_id.upper(), unknownField=1) == queue_id
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]
    assert row(world, queue_id) == recorded


@pytest.mark.parametrize("change", [{"body": "Other"}, {"toHandle": "a@example.com"}, {"deviceId": "other"}])
@pytest.mark.parametrize("status", ["queued", "sent"])
def test_other_content_for_an_item_in_the_queue_is_refused_with_its_row(
    world: TestData, admin: Client, mac: Client, mac_id: str, change: dict[str, str], status: str
) -> None:
    item_id = str(uuid.uuid4())
    queue_id = admin.enqueued(mac_id, batchItemId=item_id)
    if status == "sent":
        mac.result(queue_id)
    if "deviceId" in change:
        change = {"deviceId": world.device("other")}
    answer = admin.enqueue(mac_id, batchItemId=item_id, **change)
    assert answer.status_code == 409
    assert answer.json()["data"] == {"sendQueueId": queue_id}
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]


@pytest.mark.parametrize("ended", ["failure_reason = 'not on iMessage'", "withdrawn_at = now()"])
def test_an_item_whose_row_failed_or_was_withdrawn_gets_a_new_row(
    world: TestData, admin: Client, mac_id: str, ended: str
) -> None:
    item_id = str(uuid.uuid4())
    first = admin.enqueued(mac_id, batchItemId=item_id)
    world.icloud(f"UPDATE icloud.send_queue SET status = 'failed', {ended}")
    second = admin.enqueued(mac_id, batchItemId=item_id, body="mended")
    assert second != first
    assert [row(world, queue_id)["status"] for queue_id in (first, second)] == ["failed", "queued"]


def test_twenty_threads_enqueue_one_item_once(world: TestData, admin: Client, mac_id: str) -> None:
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


def test_a_field_that_cannot_be_right_is_refused_by_name(world: TestData, admin: Client, mac_id: str) -> None:
    for field, value in [(field, value) for field, values in BAD_FIELDS.items() for value in values]:
        answer = admin.enqueue(mac_id, **{field: value})
        assert (answer.status_code, value) == (400, value)
        assert field in answer.json()["error"]
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(0,)]


def test_a_missing_field_is_refused_by_name(admin: Client, mac_id: str) -> None:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": mac_id, "toHandle": "+14155550123", "body": "Hello!"}
    for field in message:
        answer = admin.call("POST", ENQUEUE, {name: text for name, text in message.items() if name != field})
        assert answer.status_code == 400
        assert field in answer.json()["error"]


def test_phone_numbers_and_email_addresses_are_taken_as_they_are(admin: Client, mac: Client, mac_id: str) -> None:
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
def test_any_instant_with_its_offset_can_be_a_messages_last(
    world: TestData, admin: Client, mac_id: str, valid_until: str, instant: str
) -> None:
    admin.enqueued(mac_id, validUntil=valid_until)
    kept = "SELECT valid_until = %(instant)s::timestamptz FROM icloud.send_queue"
    assert world.icloud(kept, instant=instant) == [(True,)]


def test_an_unknown_device_is_refused_by_name(admin: Client, databases: object) -> None:
    answer = admin.enqueue(str(uuid.uuid4()))
    assert answer.status_code == 400
    assert "deviceId" in answer.json()["error"]


def test_a_message_arrives_as_it_was_written(admin: Client, mac: Client, mac_id: str) -> None:
    bodies = ['Grüße 👋\n\t\\ " %s %(body)s $1 ; --', "\u2028\U0001f468\u200d\U0001f469", " "]
    for body in bodies:
        admin.enqueued(mac_id, body=body)
    assert [item["body"] for item in mac.pending()] == bodies


# --- every path -------------------------------------------------------------------------------------------------------


def test_an_unknown_path_is_a_404(admin: Client) -> None:
    for path in ("/", "/nothing", PENDING + "/", "/client/imessage/send-queue//result", "/%00", "/%ff%fe"):
        answer = admin.call("GET", path)
        assert answer.status_code == 404
        assert "path" in answer.json()["error"]


def test_another_method_is_a_405_that_names_the_right_one(
    world: TestData, base_url: str, admin: Client, mac: Client, mac_id: str
) -> None:
    queue_id = admin.enqueued(mac_id)
    result = f"/client/imessage/send-queue/{queue_id}/result"
    for path, right in {PENDING: "GET", STATUS: "GET", "/healthz": "GET", ENQUEUE: "POST", result: "POST"}.items():
        for method in {"HEAD", "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"} - {right}:
            answer = requests.request(method, base_url + path, headers=mac.headers, timeout=5)
            assert (answer.status_code, answer.headers["Allow"]) == (405, right)
            assert method == "HEAD" or "method" in answer.json()["error"]
    assert row(world, queue_id)["collected_at"] is None, "a HEAD must not collect"


def test_a_body_of_the_limit_is_taken_and_a_longer_one_is_a_413(admin: Client, mac_id: str) -> None:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": mac_id, "toHandle": "+14155550123", "body": ""}
    room = 65_536 - len(json.dumps(message))
    for length, status in ((room, 200), (room + 1, 413), (300_000, 413), (3_000_000, 413)):
        try:
            answer = admin.call("POST", ENQUEUE, message | {"body": "x" * length})
        except requests.ConnectionError:
            assert length > serving.READ_LIMIT  # cut off while it was still talking
            continue
        assert answer.status_code == status


def test_a_chunked_body_is_read_like_any_other(admin: Client, mac_id: str) -> None:
    message = {"batchItemId": str(uuid.uuid4()), "deviceId": mac_id, "toHandle": "+14155550123", "body": "in pieces"}

    assert chunked(admin, (bytes([byte]) for byte in json.dumps(message).encode())).status_code == 200


def test_a_chunked_body_beyond_the_limit_is_a_413_too(admin: Client) -> None:
    for length in (70_000, 300_000):
        answer = chunked(admin, (b"x" * 1000 for _ in range(length // 1000)))
        assert (answer.status_code, answer.json()["success"]) == (413, False)


def chunked(admin: Client, pieces: Iterator[bytes]) -> requests.Response:
    return requests.post(admin.base_url + ENQUEUE, data=pieces, headers=admin.headers, timeout=5)


def test_health_is_open_and_asks_the_database(base_url: str) -> None:
    assert Client(base_url, None).call("GET", "/healthz").json()["data"] == {"status": "ok"}


def test_status_without_a_device_has_only_the_last_hour(admin: Client, databases: object) -> None:
    data = admin.call("GET", STATUS).json()["data"]
    assert data == {"devices": [], "lastHour": {"sent": 0, "failed": 0}}


def test_status_tells_what_waits_for_each_device_and_the_last_hours_results(
    world: TestData, admin: Client, mac: Client, mac_id: str
) -> None:
    other_id = world.device("older")
    world.icloud("UPDATE icloud.devices SET created_at = now() - interval '1 day' WHERE id = %(id)s", id=other_id)
    done = [admin.enqueued(mac_id) for _ in range(5)]
    mac.result(done[0]), mac.result(done[1]), mac.result(done[2], "failed"), mac.result(done[4], "failed")
    world.icloud(
        "UPDATE icloud.send_queue SET updated_at = now() - interval '61 minutes' WHERE id = %(id)s", id=done[1]
    )
    world.icloud(
        "UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now() WHERE id = %(id)s", id=done[3]
    )  # fmt: skip
    old, _ = admin.enqueued(mac_id), admin.enqueued(mac_id)
    world.icloud("UPDATE icloud.send_queue SET created_at = now() - interval '90 seconds' WHERE id = %(id)s", id=old)
    mac.pending()
    admin.enqueued(mac_id)
    data = admin.call("GET", STATUS).json()["data"]
    assert data["lastHour"] == {"sent": 1, "failed": 2}
    older, mini = data["devices"]
    assert older == {
        "id": other_id, "name": "older", "lastSeenAt": None, "waiting": 0, "collected": 0, "oldestAgeSeconds": None,
    }  # fmt: skip
    assert (mini["id"], mini["waiting"], mini["collected"]) == (mac_id, 1, 2)
    assert 90 <= mini["oldestAgeSeconds"] < 100
    assert mini["lastSeenAt"].endswith("Z")


def test_each_request_is_one_statement(
    world: TestData, admin: Client, mac: Client, mac_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = admin.enqueued(mac_id)
    for _ in range(8):  # each thread of the server has prepared its statements by then
        mac.pending(), mac.result(queue_id), admin.enqueue(mac_id)
    statements: list[str] = []
    query = db.query

    def noted(conn: Any, sql: str, params: db.Params | None = None) -> list[db.Row]:
        statements.append(sql)
        return query(conn, sql, params)

    monkeypatch.setattr(db, "query", noted)
    calls: list[Callable[[], object]] = [
        mac.pending,
        lambda: mac.result(queue_id),
        lambda: admin.enqueue(mac_id),
        lambda: Client(mac.base_url, "wrong").call("GET", PENDING),
        lambda: mac.result(queue_id, "nonsense"),
        lambda: admin.call("GET", STATUS),
        lambda: admin.call("GET", "/healthz"),
    ]
    for call in calls:
        statements.clear()
        call()
        assert len([sql for sql in statements if not sql.startswith("PREPARE")]) == 1


# --- when the database fails ------------------------------------------------------------------------------------------


def test_a_server_that_is_newer_than_the_tables_says_what_to_run_and_needs_no_restart_after_it(
    world: TestData, admin: Client, mac: Client, mac_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """503 and not 500, which would fail the dispatcher's items."""
    for older in ("ALTER TABLE icloud.send_queue DROP COLUMN valid_until", "DROP TABLE icloud.send_queue"):
        world.icloud(older)
        for answer in (admin.enqueue(mac_id), mac.call("GET", PENDING)):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert "log" in answer.json()["error"]
        assert caplog.text.count("run `python db.py migrate`") == 2
        caplog.clear()
        db.migrate(world.databases.icloud_url, "icloud")
        queue_id = admin.enqueued(mac_id)
        assert [item["id"] for item in mac.pending()][-1] == queue_id


def test_what_the_role_may_not_do_is_a_503_and_the_log_says_what_to_grant(
    admin: Client, mac_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    execute = db.RetryingConnection._execute

    def forbidden(self: db.RetryingConnection, conn: Any, *_: object) -> list[db.Row]:
        return execute(self, conn, "DO $$ BEGIN RAISE SQLSTATE '42501'; END $$", None)

    monkeypatch.setattr(db.RetryingConnection, "_execute", forbidden)
    answer = admin.enqueue(mac_id)
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert "GRANT the tables' owner" in caplog.text
    assert "migrate" not in caplog.text


def test_a_bug_is_a_500_in_json_and_its_words_are_not_logged(
    mac: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError(WORDS)

    monkeypatch.setattr(db.RetryingConnection, "query", broken)
    assert mac.call("GET", PENDING).status_code == 500
    assert "KeyError" in caplog.text
    assert "in pending" in caplog.text
    assert WORDS not in caplog.text


def test_a_statement_that_fails_is_a_500_without_sql(
    world: TestData, admin: Client, mac_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.icloud("ALTER TABLE icloud.send_queue ADD CONSTRAINT no_hello CHECK (body <> 'Hello!')")
    answer = admin.enqueue(mac_id)
    assert answer.status_code == 500
    assert "INSERT" not in answer.text
    assert "no_hello" not in answer.text
    assert "Hello" not in answer.text
    assert "CheckViolation" in caplog.text
    assert "migrate" not in caplog.text


NOT_NOW = ["08006", "25006", "40001", "40P01", "53100", "53300", "55P03", "57014", "57P03", "58030"]
NOT_MIGRATED = ["42P01", "42703", "42883", "42501"]
AT_FAULT = ["22001", "22P02", "23514", "P0001", "XX000"]


def test_an_error_is_a_503_when_it_says_not_now_and_a_500_when_it_judges_the_statement(
    world: TestData, admin: Client, mac_id: str
) -> None:
    world.icloud("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'a secret' USING ERRCODE = TG_ARGV[0]; END $$
    """)
    for code, status in [(code, 503) for code in NOT_NOW + NOT_MIGRATED] + [(code, 500) for code in AT_FAULT]:
        world.icloud(f"CREATE TRIGGER refuse BEFORE INSERT ON icloud.send_queue EXECUTE FUNCTION refuse('{code}')")
        answer = admin.enqueue(mac_id)
        assert (answer.status_code, code) == (status, code)
        assert ("Retry-After" in answer.headers) is (status == 503)
        assert "secret" not in answer.text
        world.icloud("DROP TRIGGER refuse ON icloud.send_queue")
    admin.enqueued(mac_id)


def test_a_database_that_is_away_is_a_503_and_its_return_is_noticed_at_once(
    world: TestData, base_url: str, admin: Client, mac: Client, mac_id: str
) -> None:
    assert mac.pending() == []
    [(name,)] = world.icloud("SELECT current_database()")
    with closing(db.connect(world.databases.quinn_url)) as server:
        away = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %(name)s"
        db.query(server, away, {"name": name})
        assert mac.pending() == [], "a lost connection is replaced without an error"
        db.query(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        db.query(server, away, {"name": name})
        for answer in (mac.call("GET", PENDING), admin.enqueue(mac_id), admin.call("GET", "/healthz")):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
        db.query(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert mac.pending() == []


class Load:
    """Clients that enqueue and poll until stopped, and note when each request began and how it was answered."""

    def __init__(self, admin: Client, mac: Client, device_id: str) -> None:
        self.admin, self.mac, self.device_id = admin, mac, device_id
        self.answers: list[tuple[float, int]] = []
        self.queue_ids: list[str] = []  # of the messages that the server said it has
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            began = time.monotonic()
            enqueued = self.admin.enqueue(self.device_id)
            if enqueued.status_code == 200:
                self.queue_ids.append(enqueued.json()["data"]["sendQueueId"])
            for answer in (enqueued, self.mac.call("GET", PENDING)):
                assert answer.status_code == 200 or int(answer.headers["Retry-After"]) > 0
                self.answers.append((began, answer.status_code))

    def answered(self, status: int, since: float) -> bool:
        return any(began > since and code == status for began, code in self.answers)


def test_postgresql_killed_under_load_is_a_503_until_it_is_back_and_costs_no_message(
    private_postgres: PrivatePostgres, start: Callable[..., Script]
) -> None:
    url = private_postgres.url
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=url, QUINN_DB_URL=url)
    base_url = f"http://127.0.0.1:{script.port()}"
    with closing(db.connect(url)) as conn:
        sql = "INSERT INTO icloud.devices (name, token) VALUES ('mac-mini', 'mac-mini') RETURNING id"
        [(mac_id,)] = db.query(conn, sql)
    load = Load(Client(base_url, SERVICE_TOKEN), Client(base_url, "mac-mini"), mac_id)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(load.run) for _ in range(4)]
        try:
            wait_until(lambda: load.answered(200, since=0))
            killed = time.monotonic()
            private_postgres.kill()
            wait_until(lambda: load.answered(503, since=killed))
            private_postgres.start()
            back = time.monotonic()
            wait_until(lambda: load.answered(200, since=back + 1))
        finally:
            load.stopped.set()
        for client in clients:
            client.result()
    assert {code for _, code in load.answers} == {200, 503}, "nothing but the two, never a 500"
    assert not load.answered(503, since=back + 1), "healed within a second"
    assert script.process.poll() is None, "by the same process"
    with closing(db.connect(url)) as conn:
        kept = {queue_id for (queue_id,) in db.query(conn, "SELECT id FROM icloud.send_queue")}
    assert set(load.queue_ids) <= kept


# --- the process ------------------------------------------------------------------------------------------------------


HALF_REQUESTS = [
    b"POST /admin/send-queue/enqueue HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"GET /client/imessage/send-queue/pending HTTP/1.1\r\nAuthor",
]


def half_a_request(base_url: str, number: int) -> socket.socket:
    host, port = base_url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(HALF_REQUESTS[number % 2])
    return connection


def test_fifty_slow_clients_do_not_keep_the_next_one_waiting(world: TestData, server: tuple[Script, str]) -> None:
    world.device("mac-mini")
    slow = [half_a_request(server[1], number) for number in range(50)]
    start = time.monotonic()
    assert Client(server[1], "mac-mini").pending() == []
    assert time.monotonic() - start < 2
    for connection in slow:
        connection.close()


def read_answers(connection: socket.socket, count: int) -> list[dict[str, Any]]:
    """So many JSON answers of one connection."""
    with connection.makefile("rb") as stream:
        answers = []
        for _ in range(count):
            length = 0
            while line := stream.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            answers.append(json.loads(stream.read(length)))
    return answers


def pipelined(base_url: str, token: str, count: int) -> socket.socket:
    """A connection that has sent so many polls at once."""
    host, port = base_url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=15)
    connection.sendall(f"GET {PENDING} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode() * count)
    return connection


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (f"Content-Length: {2 * serving.READ_LIMIT}", "the body is too large"),
        (f"X-Long: {'x' * serving.HEADER_LIMIT}", "the headers are too large"),
    ],
)
def test_what_is_too_large_to_be_read_is_refused_in_words(base_url: str, header: str, words: str) -> None:
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        connection.sendall(f"POST {ENQUEUE} HTTP/1.1\r\n{header}\r\n\r\n".encode())
        assert read_answers(connection, 1) == [{"success": False, "error": words}]


def test_requests_sent_at_once_are_answered_at_once(world: TestData, server: tuple[Script, str]) -> None:
    world.device("mac-mini")
    start = time.monotonic()
    with pipelined(server[1], "mac-mini", 5) as connection:
        assert read_answers(connection, 5) == [{"success": True, "data": {"items": []}}] * 5
    assert time.monotonic() - start < 1, "without waiting for anything else to happen"


def test_a_client_that_does_not_read_its_responses_keeps_nobody_waiting(
    world: TestData, start: Callable[..., Script], databases: object
) -> None:
    """It sends ten polls of 3 MB at once, to the only thread, and reads late; some of them it has to send again."""
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", SEND_QUEUE_THREADS="1", LOG_LEVEL="DEBUG")
    base_url = f"http://127.0.0.1:{script.port()}"
    big, _ = world.device("big"), world.device("mac-mini")
    fill(world, big, count=50, size=64_000)
    with pipelined(base_url, "big", 10) as connection:
        for _ in range(20):
            begin = time.monotonic()
            assert Client(base_url, "mac-mini").pending() == []
            assert time.monotonic() - begin < 2
        polled = script.log.read_text().count("polled items=50")
        assert 1 <= polled < 10, "the others wait, and take no memory"
        assert [len(answer["data"]["items"]) for answer in read_answers(connection, polled)] == [50] * polled
        assert connection.recv(1) == b""


def fill(world: TestData, device_id: str, count: int, size: int) -> None:
    """So many messages of so many characters for the device."""
    sql = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body)
        SELECT %(device_id)s, '+14155550123', repeat('x', %(size)s) FROM generate_series(1, %(count)s)
    """
    world.icloud(sql, device_id=device_id, count=count, size=size)


def test_a_stop_waits_for_a_client_that_reads_slowly_and_for_none_that_does_not_read(
    world: TestData, server: tuple[Script, str]
) -> None:
    script, base_url = server
    for name in ("reader", "sleeper"):
        fill(world, world.device(name), count=20, size=1_000_000)
    with (
        half_a_request(base_url, 0),
        pipelined(base_url, "reader", 1) as reader,
        pipelined(base_url, "sleeper", 1) as sleeper,
        reader.makefile("rb") as stream,
    ):
        assert stream.read(1) == sleeper.recv(1) == b"H"
        script.process.terminate()
        script.wait_for("stopping")
        begin = time.monotonic()
        size = 0
        while piece := stream.read(1_000_000):
            size += len(piece)
            time.sleep(0.15)  # the reader's pace: all pieces take three times as long as a silent client has
        assert size > 20_000_000
        assert script.process.wait(10) == 0
        assert time.monotonic() - begin < 6


def test_a_request_that_the_database_holds_does_not_hold_a_stop(world: TestData, start: Callable[..., Script]) -> None:
    world.device("mac-mini")
    code = "import serving, send_queue_server; serving.SHUTDOWN_TIMEOUT = 2; send_queue_server.main([])"
    script = start("-c", code, SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=patient(world.databases.icloud_url))
    base_url = f"http://127.0.0.1:{script.port()}"
    with closing(db.connect(world.databases.icloud_url)) as holder:
        holder.autocommit = False
        db.query(holder, "LOCK TABLE icloud.send_queue")
        with pipelined(base_url, "mac-mini", 1):
            wait_until(lambda: waits_for_a_lock(world))
            begin = time.monotonic()
            assert script.end() == 0
            assert 1.9 < time.monotonic() - begin < 5


def test_a_server_whose_main_thread_fails_ends_so_that_it_is_started_again(start: Callable[..., Script]) -> None:
    broken = "import send_queue_server, waitress; del waitress.wasyncore.loop; send_queue_server.main([])"
    nowhere = "postgresql://nowhere"
    script = start("-c", broken, SEND_QUEUE_PORT="0", QUINN_DB_URL=nowhere, QUINN_ICLOUD_DB_URL=nowhere)
    assert script.process.wait(15) == 1
    assert "AttributeError" in script.log.read_text()


def test_sigterm_lets_the_request_in_hand_end(world: TestData, start: Callable[..., Script]) -> None:
    url = patient(world.databases.icloud_url)
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=url)
    base_url = f"http://127.0.0.1:{script.port()}"
    mac_id = world.device("mac-mini")
    mac = Client(base_url, "mac-mini")
    queue_id = Client(base_url, SERVICE_TOKEN).enqueued(mac_id)
    with closing(db.connect(world.databases.icloud_url)) as holder, ThreadPoolExecutor(1) as pool:
        holder.autocommit = False
        db.query(holder, "SELECT FROM icloud.send_queue FOR UPDATE")
        answer = pool.submit(mac.result, queue_id)
        wait_until(lambda: waits_for_a_lock(world))
        script.process.terminate()
        script.wait_for("stopping")
        time.sleep(1.5)  # longer than a silent client has
        holder.rollback()
        assert answer.result().status_code == 200
        assert answer.result().headers["Connection"] == "close"
    assert script.process.wait(10) == 0
    assert row(world, queue_id)["status"] == "sent"


@pytest.mark.parametrize("token", ["", "short", "fifteen-letters", "with a space in it"])
def test_the_server_does_not_start_without_a_service_token_of_sixteen_characters(
    databases: object, start: Callable[..., Script], token: str
) -> None:
    script = start("send_queue_server.py", MAC_SYNC_SERVICE_TOKEN=token)
    assert script.process.wait(10) == 2
    assert "MAC_SYNC_SERVICE_TOKEN" in script.lines()[-1]


def test_a_port_in_use_is_said(world: TestData, server: tuple[Script, str], start: Callable[..., Script]) -> None:
    port = server[1].rsplit(":", 1)[1]
    script = start("send_queue_server.py", SEND_QUEUE_PORT=port)
    assert script.process.wait(10) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in script.lines()[-1]
    assert "SEND_QUEUE_PORT" in script.lines()[-1]


def test_a_port_that_is_none_is_said(databases: object, start: Callable[..., Script]) -> None:
    script = start("send_queue_server.py", SEND_QUEUE_PORT="65536")
    assert script.process.wait(10) == 2
    assert "SEND_QUEUE_PORT is '65536'" in script.lines()[-1]


WITHDRAW = """
    UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now(), updated_at = now()
     WHERE status = 'queued' AND collected_at IS NULL
"""


@pytest.mark.parametrize("withdrawn", [True, False])
def test_a_poll_that_meets_a_withdrawal_waits_for_its_outcome(
    world: TestData, admin: Client, mac: Client, mac_id: str, withdrawn: bool
) -> None:
    queue_id = admin.enqueued(mac_id)
    with closing(db.connect(world.databases.icloud_url)) as dispatcher, ThreadPoolExecutor(1) as pool:
        dispatcher.autocommit = False
        db.query(dispatcher, WITHDRAW)
        polled = pool.submit(mac.pending)
        wait_until(lambda: waits_for_a_lock(world))
        dispatcher.commit() if withdrawn else dispatcher.rollback()
        items = polled.result()
    assert [item["id"] for item in items] == ([] if withdrawn else [queue_id])
    assert (row(world, queue_id)["collected_at"] is None) is withdrawn


def waits_for_a_lock(world: TestData) -> bool:
    sql = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return len(world.icloud(sql)) == 1


def test_a_row_is_never_both_handed_out_and_withdrawn(world: TestData, admin: Client, mac: Client, mac_id: str) -> None:
    for _ in range(15):
        queue_ids = {admin.enqueued(mac_id) for _ in range(3)}
        together = threading.Barrier(2)

        def poll(together: threading.Barrier = together) -> set[str]:
            together.wait()
            return {item["id"] for item in mac.pending()}

        with ThreadPoolExecutor(1) as pool:
            polled = pool.submit(poll)
            together.wait()
            world.icloud(WITHDRAW)
            handed_out = polled.result() & queue_ids
        withdrawn = {queue_id for queue_id in queue_ids if row(world, queue_id)["withdrawn_at"]}
        assert not handed_out & withdrawn
        assert handed_out == {queue_id for queue_id in queue_ids if row(world, queue_id)["collected_at"]}
        world.icloud("DELETE FROM icloud.send_queue")
