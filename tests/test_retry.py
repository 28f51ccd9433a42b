"""Check `python dispatcher.py --retry BATCH`."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ago, report_all, row_statuses, status_of, sync, tick
from testing import TestData

import batches
import db
import dispatcher


def test_retry_makes_failed_items_pending(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    batch_id = world.batch(status="sent")
    world.item(batch_id, status="failed", failure_reason="no", send_queue_id="old", queued_at=ago(9), claimed_at=ago(9))
    world.item(batch_id, status="failed", failure_reason="no")
    world.item(batch_id, status="sent", sent_at=ago(5))
    world.item(batch_id, status="skipped")
    other = world.item(world.batch(), status="failed")
    assert dispatcher.run_retry(batch_id) == 0
    assert capsys.readouterr().out == "2 failed items are pending again; the batch is sending\n"
    assert world.statuses(batch_id) == ["pending", "pending", "sent", "skipped"]
    assert status_of(world, other) == ("failed", None)
    left = "SELECT DISTINCT failure_reason, queued_at, claimed_at FROM outreach_batch_items WHERE status = 'pending'"
    assert world.quinn(left) == [(None,) * 3]
    assert dispatcher.run_retry(str(uuid.uuid4())) == 1
    assert "there is no batch" in capsys.readouterr().err


def test_retry_reports_unreachable_database(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in db.URL_VARIABLES.values():
        monkeypatch.setenv(variable, "postgresql://127.0.0.1:1/away")
    assert dispatcher.main(["--retry", str(uuid.uuid4())]) == 1
    assert capsys.readouterr().err.startswith("dispatcher.py: nothing was changed: ")


def test_retry_does_not_start_a_stopped_batch(world: TestData) -> None:
    for status in ("draft", "paused", "cancelled"):
        batch_id = world.batch(status=status)
        world.item(batch_id, status="failed")
        assert dispatcher.run_retry(batch_id) == 0
        assert world.quinn("SELECT status FROM outreach_batches WHERE id = %(id)s", id=batch_id) == [(status,)]


def test_retried_item_gets_a_second_row(world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device("mini")
    batch_id = world.batch(clients=1)
    tick(world, mac_sync)
    report_all(base_url, "mini", "failed", error="no such number")
    sync(world)
    tick(world, mac_sync)
    assert dispatcher.run_retry(batch_id) == 0
    tick(world, mac_sync)
    assert row_statuses(world) == [("failed", False), ("queued", False)]


def test_retry_waits_for_running_job(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a tick that is about to complete the batch would leave it `sent` with pending items."""
    batch_id = world.batch(status="sent")
    world.item(batch_id, status="failed")
    world.quinn("SELECT pg_advisory_lock(hashtext('outreach-dispatcher'))")
    monkeypatch.setattr(batches, "LOCK_WAIT", 0.2)
    assert dispatcher.run_retry(batch_id) == 1
    assert world.statuses() == ["failed"]
    monkeypatch.setattr(batches, "LOCK_WAIT", 10)
    with ThreadPoolExecutor() as threads:
        patient = threads.submit(dispatcher.run_retry, batch_id)
        world.quinn("SELECT pg_advisory_unlock(hashtext('outreach-dispatcher'))")
        assert patient.result(10) == 0
    assert world.statuses() == ["pending"]
