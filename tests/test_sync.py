"""Check how the sync job copies results from the queue to the items."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from helpers import ago, in_flight, queue_row, record_statements, status_of, sync
from testing import TestData

import dispatcher


def test_sync_copies_result_time_and_reason(world: TestData, base_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    device_id = world.device("mini")
    sent, _ = in_flight(world, device_id, status="sent", sent_at=ago(4000))
    failed, _ = in_flight(world, device_id, status="failed", failure_reason="no such number")
    speechless, _ = in_flight(world, device_id, status="failed")
    waiting, _ = in_flight(world, device_id)
    assert sync(world) == {"withdrawn": 0, "sent": 1, "failed": 2}
    assert status_of(world, sent) == ("sent", None)
    assert status_of(world, failed) == ("failed", "no such number")
    assert status_of(world, speechless) == ("failed", "the device gave no reason")
    assert status_of(world, waiting) == ("queued", None)
    logged = [(line.levelname, line.getMessage()) for line in caplog.records if line.getMessage().startswith("item ")]
    assert sorted(level for level, _ in logged) == ["INFO", "WARNING", "WARNING"]
    assert any(level == "INFO" and words.startswith("item sent ") and sent in words for level, words in logged)
    [(in_queue,)] = world.icloud("SELECT sent_at FROM icloud.send_queue WHERE status = 'sent'")
    [(item_sent_at, synced_at)] = world.quinn("SELECT item.sent_at, last_synced_at FROM outreach_batch_items AS item,"
                                              " outreach_settings WHERE item.status = 'sent'")  # fmt: skip
    assert item_sent_at == in_queue
    assert abs(synced_at - datetime.now(UTC)) < timedelta(seconds=10)


def test_sync_reads_old_results(world: TestData) -> None:
    item_id, _ = in_flight(world, world.device(), status="sent", sent_at=ago(10 * 86_400))
    world.settings(last_synced_at=ago(60))
    sync(world)
    assert status_of(world, item_id) == ("sent", None)


def test_missing_row_fails_its_item(world: TestData) -> None:
    device_id = world.device()
    vanished = [in_flight(world, device_id)[0] for _ in range(3)]
    world.icloud("DELETE FROM icloud.devices")
    assert sync(world)["failed"] == 3
    for item_id in vanished:
        assert status_of(world, item_id) == ("failed", "send queue row no longer exists")
    assert world.quinn("SELECT DISTINCT device_id FROM outreach_batch_items") == [(device_id,)]


def test_invalid_send_queue_id_fails_only_its_item(world: TestData) -> None:
    good, row_id = in_flight(world, world.device(), status="sent", sent_at=ago(5))
    world.quinn("UPDATE outreach_batch_items SET send_queue_id = upper(send_queue_id)")
    batch_id = world.batch()
    garbage = [None, "", "garbage", "'; DROP TABLE clients", f"{{{row_id}}}", row_id.replace("-", ""), "é" * 36]
    bad = [world.item(batch_id, status="queued", send_queue_id=text) for text in garbage]
    sync(world)
    assert status_of(world, good) == ("sent", None)
    assert {status_of(world, item_id) for item_id in bad} == {("failed", "send queue row no longer exists")}


def test_sent_row_without_time_uses_updated_at(world: TestData) -> None:
    """A platform's own send_queue may lack the constraint that schema.sql adds."""
    world.icloud("ALTER TABLE icloud.send_queue DROP CONSTRAINT send_queue_sent_has_a_time")
    device_id = world.device()
    queued, _ = in_flight(world, device_id, status="sent")
    claimed = world.item(world.batch(), claimed_at=ago(60))
    queue_row(world, claimed, device_id, status="sent")
    assert sync(world)["sent"] == 2
    changed = world.icloud("SELECT updated_at FROM icloud.send_queue ORDER BY updated_at")
    assert world.quinn("SELECT sent_at FROM outreach_batch_items ORDER BY sent_at") == changed
    assert status_of(world, queued) == status_of(world, claimed) == ("sent", None)


def test_result_does_not_change_ended_item(world: TestData) -> None:
    ended = [world.item(world.batch(), status=status, sent_at=ago(60)) for status in ("sent", "failed", "skipped")]
    ended.append(world.item(world.batch()))  # nor one that was never claimed
    before = world.quinn("SELECT * FROM outreach_batch_items ORDER BY id")
    for status in ("sent", "failed", "pending"):
        changes = [dispatcher.ItemUpdate(item_id, status, str(uuid.uuid4()), None, ago(0), "late") for item_id in ended]
        dispatcher.apply_updates(world.databases.quinn, changes)
    assert world.quinn("SELECT * FROM outreach_batch_items ORDER BY id") == before


def test_ten_thousand_results_take_two_statements(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher.logger, "info", lambda *_: None)  # ten thousand lines, which pytest would keep
    rows = """
        INSERT INTO icloud.send_queue (id, device_id, to_handle, body, status, sent_at, batch_item_id)
        SELECT md5('row' || n)::uuid, %(device)s, '+14155550123', 'Hello!', 'sent', now(), md5('item' || n)::uuid
          FROM generate_series(1, 10000) AS n
    """
    items = """
        INSERT INTO outreach_batch_items (id, batch_id, client_id, rendered_body, status, send_queue_id)
        SELECT md5('item' || n)::uuid, %(batch)s, %(client)s, 'Hello!', 'queued', md5('row' || n)::uuid
          FROM generate_series(1, 10000) AS n
    """
    world.icloud(rows, device=world.device())
    world.quinn(items, batch=world.batch(), client=world.client())
    statements = record_statements(monkeypatch)
    assert sync(world)["sent"] == 10_000
    of_results = [sql for sql, params in statements if params and "sent_at" in sql and "send_queue" in sql]
    assert len(of_results) == 2
    assert len(statements) <= 17
