"""Check GET /client/imessage/send-queue/pending: what a device collects, and when."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from helpers import ApiClient, lock_waits, read_row
from testing import TestData, wait_until

import db


@pytest.mark.parametrize("index", [True, False], ids=["by the index", "by any plan"])
def test_poll_returns_oldest_fifty_of_its_device(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, index: bool
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
    assert read_row(world, queue_ids[49])["collected_at"] is not None
    assert read_row(world, queue_ids[50])["collected_at"] is None, "what is not handed out is not collected"


def test_poll_repeats_message_until_its_result(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    queue_id = admin.enqueued(mac_id)
    assert read_row(world, queue_id)["collected_at"] is None
    assert len(mac.pending()) == 1
    first = read_row(world, queue_id)
    assert first["collected_at"] is not None
    assert len(mac.pending()) == 1
    assert read_row(world, queue_id) == first
    mac.result(queue_id)
    assert mac.pending() == []


def test_poll_omits_uncollected_rows_past_valid_until(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str
) -> None:
    late = admin.enqueued(mac_id, validUntil="2020-01-01T00:00:00Z")
    collected = admin.enqueued(mac_id, validUntil="2099-01-01T00:00:00+02:00")
    assert [item["id"] for item in mac.pending()] == [collected]
    world.icloud("UPDATE icloud.send_queue SET valid_until = now() - interval '1 second'")
    assert [item["id"] for item in mac.pending()] == [collected], "it may be on its way already"
    assert read_row(world, late)["collected_at"] is None


def test_poll_omits_withdrawn_and_finished_rows(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    withdrawn, failed = admin.enqueued(mac_id), admin.enqueued(mac_id)
    world.icloud("UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now() WHERE id = %(id)s", id=withdrawn)
    mac.result(failed, "failed")
    assert mac.pending() == []


def test_poll_updates_last_seen_every_ten_seconds(world: TestData, mac: ApiClient) -> None:
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


def test_idle_poll_writes_nothing(world: TestData, mac: ApiClient) -> None:
    mac.pending()
    version = "SELECT xmin, ctid FROM icloud.devices"
    before = world.icloud(version)
    for _ in range(5):
        mac.pending()
    assert world.icloud(version) == before


WITHDRAW = """
    UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now(), updated_at = now()
     WHERE status = 'queued' AND collected_at IS NULL
"""


@pytest.mark.parametrize("withdrawn", [True, False])
def test_poll_waits_for_concurrent_withdrawal(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str, withdrawn: bool
) -> None:
    queue_id = admin.enqueued(mac_id)
    with closing(db.connect(world.databases.icloud_url)) as dispatcher, ThreadPoolExecutor(1) as pool:
        dispatcher.autocommit = False
        db.query(dispatcher, WITHDRAW)
        polled = pool.submit(mac.pending)
        wait_until(lambda: lock_waits(world) == 1)
        dispatcher.commit() if withdrawn else dispatcher.rollback()
        items = polled.result()
    assert [item["id"] for item in items] == ([] if withdrawn else [queue_id])
    assert (read_row(world, queue_id)["collected_at"] is None) is withdrawn


def test_row_is_never_both_collected_and_withdrawn(
    world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str
) -> None:
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
        withdrawn = {queue_id for queue_id in queue_ids if read_row(world, queue_id)["withdrawn_at"]}
        assert not handed_out & withdrawn
        assert handed_out == {queue_id for queue_id in queue_ids if read_row(world, queue_id)["collected_at"]}
        world.icloud("DELETE FROM icloud.send_queue")
