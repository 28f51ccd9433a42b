"""What became of a message: results with an outcome, what Messages learns later, and what the dispatcher does then."""

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import ago, enqueue, enqueued, in_flight, row_statuses, status_of, sync, tick
from testing import DeviceClient, TestData, wait_until

import db
import dispatcher

WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
UNKNOWN = "status = 'failed', outcome = 'unknown', failure_reason = 'no trace of it', updated_at = '2026-04-22'"
HOUR = timedelta(hours=1)


@pytest.fixture
def row_id(world: TestData, mini: DeviceClient, device_id: str) -> str:
    """A message that the device has collected."""
    row_id = world.row(device_id, batch_item_id=str(uuid.uuid4()))
    assert mini.collect(row_id).status_code == 200
    return row_id


# --- POST result --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["not_started", "unknown", None])
def test_the_outcome_of_a_failure_is_recorded_beside_it(
    world: TestData, mini: DeviceClient, row_id: str, outcome: str | None
) -> None:
    until = "2026-05-01T00:00:00Z"
    response = mini.result(row_id, "failed", error="no trace of it", outcome=outcome, watchedUntil=until)
    assert response.json()["data"] == {"id": row_id, "status": "failed"}
    columns = world.row_columns(row_id, "status, outcome, failure_reason, watched_until")
    watched_until = datetime(2026, 5, 1, tzinfo=UTC) if outcome == "unknown" else None
    assert columns == ("failed", outcome, "no trace of it", watched_until)


def test_the_same_result_again_changes_nothing_and_another_one_is_refused(
    world: TestData, mini: DeviceClient, device_id: str
) -> None:
    outcomes: list[dict[str, str]] = [
        {"status": "sent"}, {"status": "failed"}, {"status": "failed", "outcome": "not_started"},
        {"status": "failed", "outcome": "unknown"},
    ]  # fmt: skip
    for first in outcomes:
        row_id = world.row(device_id)
        for second in [first, *outcomes]:
            resolves = first.get("outcome") == "unknown" and "outcome" not in second
            if resolves:
                continue
            status = mini.result(row_id, **second).status_code
            assert status == (200 if first == second else 409), (first, second)
            stored = world.row_columns(row_id, "status, outcome")
            assert stored == (first["status"], first.get("outcome"))


@pytest.mark.parametrize(
    ("name", "column", "value", "stored"),
    [
        ("deliveredAt", "delivered_at", "2026-04-22T12:00:00.5Z", datetime(2026, 4, 22, 12, 0, 0, 500_000, UTC)),
        ("lateError", "late_error", "Messages error 22\0", "Messages error 22\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_what_messages_learns_later_is_kept_beside_the_result_once(
    world: TestData, mini: DeviceClient, row_id: str, name: str, column: str, value: str, stored: object
) -> None:
    everything = "SELECT * FROM icloud.send_queue"
    mini.result(row_id)
    [before] = world.icloud(everything)
    for later in (value, "2026-04-23T12:00:00Z"):
        assert mini.result(row_id, **{name: later}).status_code == 200
        assert world.row_columns(row_id, column) == stored
    mini.result(row_id)
    [after] = world.icloud(everything)
    assert [new for old, new in zip(before, after, strict=True) if new != old] == [stored], "and nothing else changes"


def test_a_receipt_may_come_with_the_result_itself(world: TestData, mini: DeviceClient, row_id: str) -> None:
    assert mini.result(row_id, deliveredAt="2026-04-22T12:00:00Z").status_code == 200
    assert world.row_columns(row_id, "status, delivered_at IS NOT NULL") == ("sent", True)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"status": "sent", "outcome": "unknown"}, "outcome"),
        ({"status": "failed", "outcome": "perhaps"}, "outcome"),
        ({"status": "failed", "outcome": "unknown", "watchedUntil": "soon"}, "watchedUntil"),
        ({"status": "sent", "deliveredAt": "2026-04-22T12:00:00"}, "deliveredAt"),
        ({"status": "sent", "lateError": 22}, "lateError"),
        ({"status": "sent", "instance": 1}, "instance"),
    ],
)
def test_a_result_that_cannot_be_right_is_refused_by_name(
    world: TestData, mini: DeviceClient, row_id: str, body: dict[str, Any], field: str
) -> None:
    response = mini.call("POST", f"/send-queue/{row_id}/result", body)
    assert response.status_code == 400
    assert field in response.json()["error"]
    assert world.row_columns(row_id, "status") == "queued"


def test_a_device_s_words_never_cost_its_result(world: TestData, mini: DeviceClient, row_id: str) -> None:
    words = "x\0\ud800" + "y" * 5000
    assert mini.result(row_id, "failed", error=words, lateError=words, outcome="unknown").status_code == 200
    assert world.row_columns(row_id, "length(failure_reason), late_error") == (1000, None)


# --- an unknown outcome is found out ------------------------------------------------------------------


@pytest.mark.parametrize("status", ["sent", "failed"])
def test_an_unknown_outcome_may_be_found_out_once(
    world: TestData, mini: DeviceClient, row_id: str, status: str
) -> None:
    world.set_row(row_id, f"{UNKNOWN}, watched_until = 'infinity'")
    response = mini.result(row_id, status, error="not sent after all", deliveredAt="2026-04-22T12:00:00Z")
    assert (response.status_code, response.json()["data"]) == (200, {"id": row_id, "status": status})
    found = world.row_columns(row_id, "status, outcome, watched_until, failure_reason, sent_at = '2026-04-22'")
    expected = {"sent": ("sent", None, None, None, True), "failed": ("failed", None, None, "not sent after all", None)}
    assert found == expected[status]
    assert world.row_columns(row_id, "delivered_at IS NOT NULL") is (status == "sent")
    other = "failed" if status == "sent" else "sent"
    assert mini.result(row_id, other).status_code == 409
    assert mini.result(row_id, "failed", outcome="unknown").status_code == 409


def test_an_unknown_outcome_is_not_given_back_later(world: TestData, mini: DeviceClient, row_id: str) -> None:
    world.set_row(row_id, UNKNOWN)
    assert mini.result(row_id, "failed", outcome="not_started").status_code == 409
    assert world.row_columns(row_id, "outcome") == "unknown"


def retry_of(world: TestData, row_id: str, **columns: Any) -> str:
    """The row of a retry of the same item."""
    device_id, item_id = world.row_columns(row_id, "device_id, batch_item_id")
    return world.row(device_id, batch_item_id=item_id, attempt=2, handle_key="+14155550123", **columns)


def test_a_late_sent_withdraws_the_retry_that_nobody_has_collected(
    world: TestData, mini: DeviceClient, row_id: str
) -> None:
    world.set_row(row_id, UNKNOWN)
    retry = retry_of(world, row_id)
    assert mini.result(row_id).json()["data"] == {"id": row_id, "status": "sent"}
    assert world.row_columns(row_id, "status, outcome") == ("sent", None)
    assert world.row_columns(retry, "status, withdrawn_at IS NOT NULL") == ("failed", True)
    assert mini.poll() == []


@pytest.mark.parametrize(
    "columns", [{"collected_at": "2026-04-22"}, {"status": "sent", "sent_at": "2026-04-22"}], ids=["collected", "sent"]
)
def test_a_late_sent_stays_beside_the_result_when_the_retry_is_on_its_way(
    world: TestData, mini: DeviceClient, row_id: str, columns: dict[str, str]
) -> None:
    world.set_row(row_id, UNKNOWN)
    retry = retry_of(world, row_id, **columns)
    before = world.row_columns(retry, "status, collected_at, sent_at, updated_at")
    for _ in range(2):
        assert mini.result(row_id).json()["data"] == {"id": row_id, "status": "failed"}
    found = world.row_columns(row_id, "status, outcome, late_error, updated_at = '2026-04-22'")
    assert found == ("failed", "unknown", "it was sent after all, and a retry was on its way", True)
    assert world.row_columns(retry, "status, collected_at, sent_at, updated_at") == before


def test_a_late_failed_leaves_the_retry_alone(world: TestData, mini: DeviceClient, row_id: str) -> None:
    world.set_row(row_id, UNKNOWN)
    retry = retry_of(world, row_id)
    assert mini.result(row_id, "failed", error="not sent").status_code == 200
    assert world.row_columns(row_id, "outcome, failure_reason") == (None, "not sent")
    assert world.row_columns(retry, "status") == "queued"


@pytest.mark.parametrize("rival", ["enqueue", "collect"])
def test_a_late_sent_that_meets_the_retry_is_no_error(
    world: TestData, mini: DeviceClient, row_id: str, rival: str
) -> None:
    world.set_row(row_id, UNKNOWN)
    device_id, item_id = world.row_columns(row_id, "device_id, batch_item_id")
    change = "INSERT INTO icloud.send_queue (device_id, to_handle, body, batch_item_id) VALUES (%(d)s, 'a', 'b', %(i)s)"
    if rival == "collect":
        world.icloud(change, d=device_id, i=item_id)
        change = "UPDATE icloud.send_queue SET collected_at = now() WHERE status = 'queued'"
    with contextlib.closing(db.connect(world.databases.icloud_url)) as other, ThreadPoolExecutor() as threads:
        other.autocommit = False
        db.query(other, change, {"d": device_id, "i": item_id})
        response = threads.submit(mini.result, row_id)
        wait_until(lambda: world.icloud(WAITING))
        other.commit()
        assert response.result(10).json()["data"]["status"] == ("sent" if rival == "enqueue" else "failed")
    assert row_statuses(world) == [("sent" if rival == "enqueue" else "failed", False), *(
        [("failed", True)] if rival == "enqueue" else [("queued", False)]
    )]  # fmt: skip


# --- enqueue knows the attempts -----------------------------------------------------------------------


ENDED = {
    "failed": ("status = 'failed', collected_at = now()", True),
    "failed, uncollected": ("status = 'failed'", True),
    "unknown": ("status = 'failed', outcome = 'unknown', collected_at = now()", True),
    "given back": ("status = 'failed', outcome = 'not_started', collected_at = now()", False),
    "withdrawn": ("status = 'failed', withdrawn_at = now()", False),
}


@pytest.mark.parametrize("end", ENDED)
def test_an_attempt_that_has_ended_is_not_made_again_but_the_next_one_is(
    world: TestData, base_url: str, device_id: str, end: str
) -> None:
    """After a restore of the platform's database, the item asks once more for what it has had."""
    item_id, (assignments, has_ended) = str(uuid.uuid4()), ENDED[end]
    first = enqueued(base_url, device_id, item_id, attempt=1)
    world.set_row(first, assignments)
    again = enqueued(base_url, device_id, item_id, attempt=1)
    assert (again == first) is has_ended
    second = enqueued(base_url, device_id, item_id, attempt=2)
    assert (second != again) is has_ended, "a retry makes a row, unless one is waiting"
    assert world.row_columns(second, "attempt") == (2 if has_ended else 1)


def test_a_row_that_waits_or_was_sent_comes_before_an_attempt_that_has_failed(
    world: TestData, base_url: str, device_id: str
) -> None:
    item_id = str(uuid.uuid4())
    world.set_row(enqueued(base_url, device_id, item_id, attempt=1), "status = 'failed', collected_at = now()")
    second = enqueued(base_url, device_id, item_id, attempt=2)
    assert enqueued(base_url, device_id, item_id, attempt=1) == second
    world.set_row(second, "status = 'sent', sent_at = now()")
    assert enqueued(base_url, device_id, item_id, attempt=1) == second


def test_without_an_attempt_each_retry_is_the_next_one(world: TestData, base_url: str, device_id: str) -> None:
    """So the journal of a Mac can tell it from a repetition, although the dispatcher is of the specification's kind."""
    item_id = str(uuid.uuid4())
    attempts = []
    for end in ("status = 'failed', withdrawn_at = now()", "status = 'failed', outcome = 'not_started'",
                "status = 'failed'", "status = 'failed', outcome = 'unknown'", "status = 'failed'"):  # fmt: skip
        row_id = enqueued(base_url, device_id, item_id)
        attempts.append(world.row_columns(row_id, "attempt"))
        world.set_row(row_id, end)
    assert attempts == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("attempt", [0, -1, 1.5, "1", 2**31])
def test_an_attempt_that_is_none_is_refused_by_name(base_url: str, device_id: str, attempt: object) -> None:
    response = enqueue(base_url, device_id, str(uuid.uuid4()), attempt=attempt)
    assert response.status_code == 400
    assert "attempt" in response.json()["error"]


# --- the dispatcher: given back -----------------------------------------------------------------------


def give_back(mini: DeviceClient, times: int = 1) -> None:
    for item in mini.peek()["items"]:
        assert mini.collect(item["id"]).status_code == 200
        for _ in range(times):
            assert mini.result(item["id"], "failed", outcome="not_started", error="Messages is busy").status_code == 200


def test_an_item_that_is_given_back_goes_again_as_the_same_attempt(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    item_id = world.item(world.batch())
    tick(world, mac_sync)
    give_back(mini, times=2)
    sync(world)
    assert status_of(world, item_id) == ("pending", None)
    tick(world, mac_sync)
    [item] = mini.peek()["items"]
    assert (item["batchItemId"], item["attempt"]) == (item_id, 1)
    assert mini.collect(item["id"]).status_code == 200
    mini.result(item["id"])
    sync(world)
    assert status_of(world, item_id) == ("sent", None)


def test_an_item_that_is_given_back_three_times_in_a_row_has_failed_until_it_is_retried(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    batch_id = world.batch()
    item_id = world.item(batch_id)
    for status in ("pending", "pending", "failed"):
        tick(world, mac_sync)
        give_back(mini)
        for _ in range(3):  # no sync counts one twice
            sync(world)
        assert status_of(world, item_id)[0] == status
    assert status_of(world, item_id) == ("failed", "Messages is busy")
    tick(world, mac_sync)
    assert dispatcher.run_retry(batch_id) == 0
    for status in ("pending", "pending", "failed"):
        tick(world, mac_sync)
        assert mini.peek()["items"][0]["attempt"] == 2
        give_back(mini)
        sync(world)
        assert status_of(world, item_id)[0] == status


def test_a_withdrawal_between_two_give_backs_does_not_count(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    item_id = world.item(world.batch())
    for _ in range(2):
        tick(world, mac_sync)
        give_back(mini)
        sync(world)
        tick(world, mac_sync)
        world.settings(paused=True)
        sync(world)
        world.settings(paused=False)
        sync(world)
        assert status_of(world, item_id)[0] == "pending"


@pytest.mark.parametrize("times", [1, 3])
def test_a_message_given_back_before_its_enqueue_was_recorded_is_not_the_end_of_the_claim(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, device_id: str, times: int
) -> None:
    item_id = world.item(world.batch(), claimed_at=ago(60))
    for _ in range(times):
        world.row(device_id, batch_item_id=item_id, status="failed", outcome="not_started", failure_reason="busy")
    tick(world, mac_sync)
    assert status_of(world, item_id) == (("failed", "busy") if times == 3 else ("queued", None))


# --- the dispatcher: unknown --------------------------------------------------------------------------


def unknown(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, **more: object
) -> tuple[str, str]:
    """A batch whose only message was collected, and whose outcome is unknown; its id and its item's."""
    batch_id = world.batch()
    item_id = world.item(batch_id)
    tick(world, mac_sync)
    [item] = mini.peek()["items"]
    assert mini.collect(item["id"]).status_code == 200
    assert mini.result(item["id"], "failed", outcome="unknown", error="no trace of it", **more).status_code == 200
    sync(world)
    return batch_id, item_id


def unknown_at(world: TestData, item_id: str) -> datetime | None:
    [(moment,)] = world.quinn("SELECT outcome_unknown_at FROM outreach_batch_items WHERE id = %(id)s", id=item_id)
    assert moment is None or isinstance(moment, datetime)
    return moment


def test_an_unknown_outcome_fails_its_item_and_marks_it(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    batch_id, item_id = unknown(world, mini, mac_sync)
    assert status_of(world, item_id) == ("failed", "no trace of it")
    assert [(unknown_at(world, item_id),)] == world.icloud("SELECT updated_at FROM icloud.send_queue")
    assert "outcome unknown" in caplog.text
    assert world.quinn("SELECT id, status FROM outreach_batches") == [(batch_id, "sent")]


@pytest.mark.parametrize("retried", [False, True])
def test_an_unknown_outcome_counts_against_the_limits_as_sent_also_after_a_retry(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, retried: bool
) -> None:
    batch_id, item_id = unknown(world, mini, mac_sync)
    if retried:
        assert dispatcher.run_retry(batch_id, include_unknown=True) == 0
        world.settings(max_per_hour=2)
        assert tick(world, mac_sync)["queued"] == 1
        assert mini.collect(mini.peek()["items"][0]["id"]).status_code == 200
        mini.result(mini.peek()["items"][0]["id"])
        sync(world)
        assert status_of(world, item_id) == ("sent", None)
    used = 2 if retried else 1
    other = world.batch(clients=1)
    world.settings(max_per_hour=used)
    assert not +tick(world, mac_sync)
    world.settings(max_per_hour=used + 1)
    assert tick(world, mac_sync)["queued"] == 1
    assert world.statuses(other) == ["queued"]


def test_the_gap_counts_from_an_unknown_outcome_too(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    batch_id, item_id = unknown(world, mini, mac_sync)
    world.item(batch_id)
    world.quinn("UPDATE outreach_batches SET status = 'sending'")
    world.settings(min_gap_seconds=600)
    assert tick(world, mac_sync)["queued"] == 0
    world.quinn(
        "UPDATE outreach_batch_items SET outcome_unknown_at = %(at)s WHERE id = %(id)s", at=ago(601), id=item_id
    )
    assert tick(world, mac_sync)["queued"] == 1


@pytest.mark.parametrize(("status", "expected"), [("sent", ("sent", None)), ("failed", ("failed", "certainly not"))])
@pytest.mark.parametrize(("days", "is_read"), [(7.9, True), (8.1, False)])
def test_an_unknown_outcome_that_is_found_out_within_eight_days_is_the_items(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, status: str,
    expected: tuple[str, str | None], days: float, is_read: bool,
) -> None:  # fmt: skip
    _, item_id = unknown(world, mini, mac_sync)
    reported_at = unknown_at(world, item_id)
    moment = datetime.now(UTC) - timedelta(days=days)
    world.quinn("UPDATE outreach_batch_items SET outcome_unknown_at = %(moment)s", moment=moment)
    [(row_id,)] = world.icloud("SELECT id FROM icloud.send_queue")
    assert mini.result(row_id, status, error="certainly not").status_code == 200
    sync(world)
    if not is_read:
        assert status_of(world, item_id) == ("failed", "no trace of it")
        return
    assert status_of(world, item_id) == expected
    assert unknown_at(world, item_id) is None
    sent_at = reported_at if status == "sent" else None
    assert world.quinn("SELECT sent_at FROM outreach_batch_items") == [(sent_at,)], "it counts from where it counted"


def test_a_row_that_is_gone_may_have_been_sent(world: TestData, device_id: str) -> None:
    item_id, row_id = in_flight(world, device_id, collected_at=ago(60))
    garbage = world.item(world.batch(), status="queued", send_queue_id="garbage")
    world.icloud("DELETE FROM icloud.send_queue WHERE id = %(id)s", id=row_id)
    for _ in range(2):
        sync(world)
    for each in (item_id, garbage):
        assert status_of(world, each) == ("failed", "send queue row no longer exists")
        moment = unknown_at(world, each)
        assert moment
        assert moment > ago(10)


# --- --retry ------------------------------------------------------------------------------------------


def test_retry_spares_what_may_have_been_sent_and_says_how_to_include_it(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_id, item_id = unknown(world, mini, mac_sync)
    other = world.item(batch_id, status="failed", failure_reason="no such number")
    assert dispatcher.main(["--retry", batch_id]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1 failed items are pending again; the batch is sending"
    assert second.startswith("1 more may have been sent and stay failed: look at the Mac.")
    assert second.endswith(f"python dispatcher.py --retry {batch_id} --include-unknown")
    assert (status_of(world, item_id)[0], status_of(world, other)[0]) == ("failed", "pending")
    assert dispatcher.main(["--retry", batch_id, "--include-unknown"]) == 0
    assert capsys.readouterr().out == "1 failed items are pending again; the batch is sending\n"
    assert world.quinn("SELECT DISTINCT attempt, status FROM outreach_batch_items") == [(2, "pending")]
    tick(world, mac_sync)
    [item] = mini.peek()["items"]
    assert (item["batchItemId"], item["attempt"]) == (item_id, 2)


def test_retry_refuses_what_the_device_still_watches(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, capsys: pytest.CaptureFixture[str]
) -> None:
    until = datetime.now(UTC) + HOUR
    batch_id, item_id = unknown(world, mini, mac_sync, watchedUntil=until.isoformat())
    world.item(batch_id, status="failed")
    before = world.quinn("SELECT * FROM outreach_batch_items ORDER BY id")
    capsys.readouterr()  # the log of what was before
    assert dispatcher.main(["--retry", batch_id, "--include-unknown"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dispatcher.py: nothing was changed: the Mac still watches 1 message, which may yet leave.")
    assert f"Try again after {until.astimezone():%Y-%m-%d %H:%M}" in said
    assert world.quinn("SELECT * FROM outreach_batch_items ORDER BY id") == before
    world.icloud("UPDATE icloud.send_queue SET watched_until = now() - interval '1 second'")
    assert dispatcher.main(["--retry", batch_id, "--include-unknown"]) == 0
    assert status_of(world, item_id) == ("pending", None)


def test_include_unknown_belongs_to_retry(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        dispatcher.main(["--once", "--include-unknown"])
    assert end.value.code == 2
    assert "--include-unknown belongs to --retry" in capsys.readouterr().err


def test_an_item_that_was_sent_after_all_is_not_sent_again_by_its_retry(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    batch_id, item_id = unknown(world, mini, mac_sync)
    [(row_id,)] = world.icloud("SELECT id FROM icloud.send_queue")
    assert dispatcher.run_retry(batch_id, include_unknown=True) == 0
    tick(world, mac_sync)
    assert mini.result(row_id).json()["data"]["status"] == "sent"  # it withdraws the retry
    for _ in range(2):
        sync(world)
        tick(world, mac_sync)
    assert mini.peek()["items"] == []
    assert status_of(world, item_id) == ("sent", None)
    assert row_statuses(world) == [("sent", False), ("failed", True)]


@pytest.mark.parametrize("claimed", [False, True])
def test_a_retry_that_was_not_enqueued_yet_finds_the_message_sent(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, claimed: bool
) -> None:
    batch_id, item_id = unknown(world, mini, mac_sync)
    [(row_id,)] = world.icloud("SELECT id FROM icloud.send_queue")
    assert dispatcher.run_retry(batch_id, include_unknown=True) == 0
    if claimed:
        world.quinn("UPDATE outreach_batch_items SET claimed_at = now()")
    mini.result(row_id)
    tick(world, mac_sync)
    sync(world)
    assert status_of(world, item_id) == ("sent", None)
    assert row_statuses(world) == [("sent", False)]


# --- after a restore of the platform's database -------------------------------------------------------


@pytest.mark.parametrize("end", ["status = 'sent', sent_at = now()", "status = 'failed'", UNKNOWN])
@pytest.mark.parametrize("claimed", [False, True])
def test_an_item_of_a_restored_database_takes_the_result_that_its_attempt_has(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, device_id: str, end: str, claimed: bool
) -> None:
    item_id = world.item(world.batch(), claimed_at=ago(60) if claimed else None)
    row_id = world.row(device_id, batch_item_id=item_id, collected_at=ago(600))
    world.set_row(row_id, end)
    tick(world, mac_sync)
    sync(world)
    assert status_of(world, item_id)[0] == ("sent" if "sent" in end else "failed")
    assert (unknown_at(world, item_id) is not None) is ("unknown" in end)
    assert len(row_statuses(world)) == 1, "nothing is sent twice"


# --- a pause between the claim and the record ---------------------------------------------------------


STOPS = {
    "pause": ("UPDATE outreach_settings SET paused = true", "UPDATE outreach_settings SET paused = false"),
    "batch paused": ("UPDATE outreach_batches SET status = 'paused'", "UPDATE outreach_batches SET status = 'sending'"),
    "dry run": ("UPDATE outreach_batches SET dry_run = true", "UPDATE outreach_batches SET dry_run = false"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_before_the_request_is_seen(
    world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    world.batch(clients=1)
    mark = dispatcher.mark_dispatched

    def stopped(quinn: Any) -> None:
        mark(quinn)
        world.quinn(STOPS[stop][0])

    monkeypatch.setattr(dispatcher, "mark_dispatched", stopped)
    assert not +tick(world, mac_sync)
    monkeypatch.undo()
    assert row_statuses(world) == []
    world.quinn(STOPS[stop][1])
    assert tick(world, mac_sync)["queued"] == 1


@pytest.mark.parametrize("stop", STOPS)
def test_what_is_enqueued_while_sending_is_stopped_is_withdrawn_at_once(
    world: TestData,
    mini: DeviceClient,
    mac_sync: dispatcher.SendQueueClient,
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
) -> None:
    for _ in range(3):
        world.batch(clients=1)
    enqueue = dispatcher.SendQueueClient.enqueue

    def meanwhile(*arguments: Any) -> str:
        queue_id = enqueue(*arguments)
        world.quinn(STOPS[stop][0])
        return queue_id

    monkeypatch.setattr(dispatcher.SendQueueClient, "enqueue", meanwhile)
    assert tick(world, mac_sync) == {"queued": 1, "skipped": 0, "withdrawn": 1}
    assert row_statuses(world) == [("failed", True)]
    assert mini.peek()["items"] == []
    sync(world)
    assert world.statuses() == ["pending"] * 3
