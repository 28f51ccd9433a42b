"""POST collect and GET pending?peek=true: a device takes one message, and the server has the last word on it."""

import contextlib
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from testing import DeviceClient, TestData, wait_until

import batches
import db
import pacing

COLLECT_ID = "1b671a64-40d5-491e-99b0-da01ff1f3341"
OTHER_ID = "2b671a64-40d5-491e-99b0-da01ff1f3342"
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
HOLDING = "collected_at, collect_id, updated_at"


def answered(response: requests.Response) -> int | str:
    """The status of a response; of a 409, its reason."""
    return str(response.json()["data"]["reason"]) if response.status_code == 409 else response.status_code


# --- peek ---------------------------------------------------------------------------------------------


def test_a_peek_lists_what_a_poll_hands_out_and_collects_nothing(
    world: TestData, mini: DeviceClient, device_id: str
) -> None:
    item_id = str(uuid.uuid4())
    world.row(device_id, batch_item_id=item_id, attempt=3, drafted_at="2026-04-22 11:59:30.7+00")
    collected = world.row(device_id, collected_at="2026-04-22", valid_until="2026-04-22")
    for unwanted in ({"valid_until": "2026-04-22"}, {"status": "failed"}, {"status": "sent", "sent_at": "2026-04-22"}):
        world.row(device_id, **unwanted)
    world.row(world.device("other"))
    peeked = mini.peek()
    assert peeked["optOuts"] == 0
    first, second = peeked["items"]
    assert (first["batchItemId"], first["attempt"], first["draftedAt"]) == (item_id, 3, "2026-04-22T11:59:30Z")
    assert second["id"] == collected
    assert world.icloud("SELECT count(*) FROM icloud.send_queue WHERE collected_at IS NOT NULL") == [(1,)]
    assert mini.peek() == peeked
    polled = mini.poll()
    assert polled == [
        {name: item[name] for name in ("id", "toHandle", "body", "createdAt")} for item in peeked["items"]
    ]
    assert world.icloud("SELECT count(*) FROM icloud.send_queue WHERE collected_at IS NOT NULL") == [(2,)]


def test_a_message_that_was_made_by_hand_is_its_own_item(world: TestData, mini: DeviceClient, device_id: str) -> None:
    row_id = world.row(device_id)
    [item] = mini.peek()["items"]
    assert (item["batchItemId"], item["attempt"], item["draftedAt"]) == (row_id, 1, item["createdAt"])
    assert mini.collect(row_id).json()["data"] == item


def test_a_peek_notes_when_the_device_was_seen(world: TestData, mini: DeviceClient) -> None:
    mini.peek()
    assert world.icloud("SELECT last_seen_at > now() - interval '5 seconds' FROM icloud.devices") == [(True,)]


@pytest.mark.parametrize("value", ["1", "yes", "TRUE", ""])
def test_what_is_neither_a_peek_nor_a_poll_collects_nothing(
    world: TestData, mini: DeviceClient, device_id: str, value: str
) -> None:
    row_id = world.row(device_id)
    response = mini.call("GET", f"/send-queue/pending?peek={value}")
    assert response.status_code == 400
    assert "`peek`" in response.json()["error"]
    assert world.row_columns(row_id, "collected_at") is None
    assert mini.call("GET", "/send-queue/pending?peek=false").status_code == 200
    assert world.row_columns(row_id, "collected_at") is not None


# --- collect ------------------------------------------------------------------------------------------


def test_a_collect_hands_the_message_over_and_stores_how(world: TestData, mini: DeviceClient, device_id: str) -> None:
    world.row(device_id)
    [item] = mini.peek()["items"]
    response = mini.collect(item["id"], COLLECT_ID)
    assert (response.status_code, response.json()["data"]) == (200, item)
    is_now, collect_id = world.row_columns(item["id"], "collected_at > now() - interval '5 seconds', collect_id")
    assert (is_now, collect_id) == (True, COLLECT_ID)
    assert world.icloud("SELECT instance FROM icloud.devices") == [("this Mac",)]
    assert mini.peek()["items"] == [item], "until its result is in"


COLLECTED = f"collected_at = now(), collect_id = '{COLLECT_ID}'"
LONG_AGO = f"collected_at = now() - interval '61 seconds', collect_id = '{COLLECT_ID}'"
SITUATIONS = {
    "waits": ("", 200),
    "waits within its time": ("valid_until = now() + interval '1 minute'", 200),
    "is past its time": ("valid_until = now()", "gone"),
    "was withdrawn": ("status = 'failed', withdrawn_at = now()", "gone"),
    "was sent": (f"status = 'sent', sent_at = now(), {COLLECTED}", "gone"),
    "failed": (f"status = 'failed', {COLLECTED}", "gone"),
    "was collected by this": (COLLECTED, 200),
    "was collected by this, within its time": (f"{COLLECTED}, valid_until = now() + interval '1 minute'", 200),
    "was collected by this 59 s ago": (LONG_AGO.replace("61", "59"), 200),
    "was collected by this 61 s ago": (LONG_AGO, "late"),
    "was collected by this, and its time is over": (f"{COLLECTED}, valid_until = now()", "late"),
    "was collected by another": (COLLECTED.replace(COLLECT_ID, OTHER_ID), "collected"),
    "was collected by another, and its time is over": (
        f"{COLLECTED}, valid_until = now()".replace(COLLECT_ID, OTHER_ID), "collected",
    ),
    "was collected by a poll": ("collected_at = now()", "collected"),
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_response_is_that_of_the_contract_for_a_message_that(
    world: TestData, mini: DeviceClient, device_id: str, situation: str
) -> None:
    row_id = world.row(device_id)
    assignments, expected = SITUATIONS[situation]
    if assignments:
        world.set_row(row_id, assignments)
    before = world.row_columns(row_id, HOLDING)
    assert answered(mini.collect(row_id, COLLECT_ID)) == expected
    if "waits" not in situation:
        assert world.row_columns(row_id, HOLDING) == before, "and nothing is changed"


@pytest.mark.parametrize(
    ("assignments", "expected"), [("", "gone"), (COLLECTED, "late"), ("collected_at = now()", "collected")]
)
def test_the_response_is_that_of_the_contract_for_a_message_whose_handle_opted_out(
    world: TestData, mini: DeviceClient, device_id: str, assignments: str, expected: str
) -> None:
    row_id = world.row(device_id)
    if assignments:
        world.set_row(row_id, assignments)
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('+14155550123', 'owner')")
    assert answered(mini.collect(row_id, COLLECT_ID)) == expected


def test_a_message_of_another_device_and_an_unknown_one_are_the_same_404_and_bind_nothing(
    world: TestData, mini: DeviceClient
) -> None:
    others = world.row(world.device("other"))
    responses = [mini.collect(row_id) for row_id in (others, str(uuid.uuid4()), "no UUID")]
    assert [response.status_code for response in responses] == [404] * 3
    assert len({response.content for response in responses}) == 1
    assert world.row_columns(others, "collected_at") is None
    assert world.icloud("SELECT DISTINCT instance FROM icloud.devices") == [(None,)]


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "collectId"), ({"collectId": COLLECT_ID}, "instance"), ({"collectId": "1", "instance": "a"}, "collectId"),
    ({"collectId": None, "instance": "a"}, "collectId"), ({"collectId": COLLECT_ID, "instance": ""}, "instance"),
    ({"collectId": COLLECT_ID, "instance": "a" * 201}, "instance"),
    ({"collectId": COLLECT_ID, "instance": "a\0"}, "instance"),
    ({"collectId": COLLECT_ID, "instance": "\ud800"}, "instance"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), BAD)
def test_a_collect_that_cannot_be_right_is_refused_by_name_and_changes_nothing(
    world: TestData, mini: DeviceClient, device_id: str, body: dict[str, Any], field: str
) -> None:
    row_id = world.row(device_id)
    response = mini.call("POST", f"/send-queue/{row_id}/collect", body)
    assert response.status_code == 400
    assert field in response.json()["error"]
    assert world.row_columns(row_id, "collected_at") is None
    mini.headers = {"Authorization": "Bearer wrong"}
    assert mini.call("POST", f"/send-queue/{row_id}/collect", body).status_code == 401


def test_a_message_without_a_key_gets_one_before_it_is_handed_out(
    world: TestData, mini: DeviceClient, device_id: str
) -> None:
    hand_outs: list[Callable[[str], object]] = [lambda _: mini.peek(), lambda _: mini.poll(), mini.collect]
    for hand_out in hand_outs:
        row_id = world.row(device_id, to_handle="+52 1 55 1234 5678")
        hand_out(row_id)
        assert world.row_columns(row_id, "handle_key") == "+525512345678"
        world.set_row(row_id, "status = 'failed'")


def test_a_poll_gives_keys_to_more_than_one_page(world: TestData, mini: DeviceClient, device_id: str) -> None:
    """An opt-out leaves room on the page for rows that have no key either."""
    for number in range(120):
        world.row(
            device_id, to_handle=f"+1415555{number:04}", created_at=f"2026-04-22 12:{number // 60:02}:{number % 60:02}"
        )
    for number in range(60):
        mini.opt_out(f"+1415555{number:04}")
    handles = [item["toHandle"] for item in mini.poll()]
    assert handles == [f"+1415555{number:04}" for number in range(60, 110)]
    assert world.icloud("SELECT count(*) FROM icloud.send_queue WHERE collected_at IS NOT NULL") == [(50,)]


# --- which Mac ----------------------------------------------------------------------------------------


def test_a_token_is_bound_to_the_mac_that_collects_first_until_it_is_replaced(
    world: TestData, mini: DeviceClient, base_url: str, device_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = world.row(device_id), world.row(device_id)
    clone = DeviceClient(base_url, instance="its clone")
    assert answered(mini.collect(first)) == 200
    assert answered(clone.collect(second)) == "otherInstance"
    assert answered(clone.collect(first)) == "otherInstance"
    assert answered(clone.result(first, instance="its clone")) == "otherInstance"
    assert world.row_columns(first, "status") == "queued"
    assert clone.result(first).status_code == 200, "a device of the specification's kind says nothing of itself"
    assert db.main(["new-token", "mac-mini"]) == 0
    token = capsys.readouterr().out.split()[3]
    assert answered(DeviceClient(base_url, token, "a new Mac").collect(second)) == 200
    assert world.icloud("SELECT instance FROM icloud.devices") == [("a new Mac",)]


@pytest.mark.parametrize(("instances", "expected"), [(("a", "b"), {200, "otherInstance"}), (("a", "a"), {200})])
def test_of_two_macs_that_collect_first_at_once_one_gets_the_token(
    world: TestData,
    mini: DeviceClient,
    base_url: str,
    device_id: str,
    instances: tuple[str, str],
    expected: set[int | str],
) -> None:
    rows = [world.row(device_id, handle_key="+14155550123") for _ in instances]
    macs = [DeviceClient(base_url, instance=instance) for instance in instances]
    with contextlib.closing(db.connect(world.databases.icloud_url)) as rival, ThreadPoolExecutor() as threads:
        rival.autocommit = False
        db.query(rival, "SELECT FROM icloud.devices FOR UPDATE")
        responses = [threads.submit(mac.collect, row_id) for mac, row_id in zip(macs, rows, strict=True)]
        wait_until(lambda: len(world.icloud(WAITING)) == 2)
        rival.rollback()
        assert {answered(response.result(10)) for response in responses} == expected
    collected = world.icloud("SELECT count(*) FROM icloud.send_queue WHERE collected_at IS NOT NULL")
    assert collected == [(2 if expected == {200} else 1,)]


# --- races --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [("status = 'failed', withdrawn_at = now()", "gone"), ("valid_until = '-infinity'", "gone"), ("attempt = 1", 200)],
    ids=["withdrawal", "opt-out", "none"],
)
def test_a_collect_that_meets_another_change_waits_for_it(
    world: TestData, mini: DeviceClient, device_id: str, change: str, expected: int | str
) -> None:
    row_id = world.row(device_id, handle_key="+14155550123")
    with contextlib.closing(db.connect(world.databases.icloud_url)) as rival, ThreadPoolExecutor() as threads:
        rival.autocommit = False
        db.query(rival, f"UPDATE icloud.send_queue SET {change}")
        response = threads.submit(mini.collect, row_id)
        wait_until(lambda: world.icloud(WAITING))
        rival.commit()
        assert answered(response.result(10)) == expected
    assert world.row_columns(row_id, "collected_at IS NOT NULL") is (expected == 200)


def test_a_message_is_never_both_collected_and_withdrawn(world: TestData, mini: DeviceClient, device_id: str) -> None:
    rows = [world.row(device_id, valid_until="infinity") for _ in range(40)]
    assert len(mini.peek()["items"]) == 40  # so that each row has its key
    world.icloud("UPDATE icloud.send_queue SET batch_item_id = id, drafted_at = now()")  # of items that do not exist
    barrier = threading.Barrier(2)

    def withdraw() -> int:
        barrier.wait()
        return sum(
            batches.withdraw(world.databases.quinn, world.databases.icloud, pacing.read_snapshot(world.databases.quinn))
            for _ in range(3)
        )

    with ThreadPoolExecutor() as threads:
        withdrawn = threads.submit(withdraw)
        barrier.wait()
        handed_over = [answered(mini.collect(row_id)) for row_id in rows]
        assert withdrawn.result(30) + handed_over.count(200) >= 40
    sql = "SELECT count(*) FROM icloud.send_queue WHERE (collected_at IS NULL) = (withdrawn_at IS NULL)"
    assert world.icloud(sql) == [(0,)]
    assert set(handed_over) <= {200, "gone"}
