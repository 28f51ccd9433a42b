"""A composed batch that goes wrong stops itself; one that is not approved is not sent; one made by hand goes on."""

from typing import Any

import pytest
from helpers import ago, row_statuses, sync, tick
from testing import DeviceClient, TestData

import dispatcher
import snapshots

APPROVED: dict[str, Any] = {"digest": "of what was previewed", "approved_at": ago(9999)}
REASON = "SELECT status, pause_reason FROM outreach_batches WHERE id = %(id)s"


def results(world: TestData, batch_id: str, outcomes: str, **columns: Any) -> None:
    """Items of a batch that a device has ended, in the order of the queue: s sent, f failed, u of unknown outcome."""
    for number, outcome in enumerate(outcomes):
        moment = ago(5000 - number)
        more: dict[str, Any] = {"status": "failed", "failure_reason": "no"}
        if outcome == "s":
            more = {"status": "sent", "sent_at": moment}
        if outcome == "u":
            more["outcome_unknown_at"] = moment
        more["device_id"] = "550e8400-e29b-41d4-a716-446655440000"
        world.item(batch_id, queued_at=moment, **{**more, **columns})


def status_of(world: TestData, batch_id: str) -> tuple[str, str | None]:
    [(status, reason)] = world.quinn(REASON, id=batch_id)
    return status, reason


# --- failures in a row --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "stops"),
    [("ffff", False), ("fffff", True), ("ffsffff", False), ("sfffff", True), ("fffffs", False), ("ffuff", True),
     ("fffffff", True)],
)  # fmt: skip
def test_five_failures_of_devices_in_a_row_pause_a_composed_batch(
    world: TestData, caplog: pytest.LogCaptureFixture, outcomes: str, stops: bool
) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    results(world, batch_id, outcomes)
    assert sync(world)["batches paused"] == stops
    assert status_of(world, batch_id) == (("paused", "the last 5 messages failed") if stops else ("sending", None))
    assert (f"batch paused batch={batch_id} reason='the last 5 messages failed'" in caplog.text) is stops


def test_failures_that_no_device_reported_do_not_count(world: TestData) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    results(world, batch_id, "fffff", device_id=None)
    sync(world)
    assert status_of(world, batch_id) == ("sending", None)


@pytest.mark.parametrize(
    ("maximum", "reason"), [(1, "the last message failed"), (2, "the last 2 messages failed"), (0, None), (None, None)]
)
def test_the_settings_say_how_many_failures_are_too_many(
    world: TestData, maximum: int | None, reason: str | None
) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    results(world, batch_id, "f" * (maximum or 9))
    world.settings(stop_after_failures=maximum)
    sync(world)
    assert status_of(world, batch_id) == ("paused" if reason else "sending", reason)


def test_what_was_known_before_a_batch_was_resumed_does_not_count(world: TestData) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    results(world, batch_id, "fffff")
    world.quinn("UPDATE outreach_batches SET resumed_at = now()")
    results(world, batch_id, "ffff")
    sync(world)
    assert status_of(world, batch_id) == ("sending", None)
    results(world, batch_id, "f")
    sync(world)
    assert status_of(world, batch_id) == ("paused", "the last 5 messages failed")


def test_a_batch_made_by_hand_goes_on(world: TestData) -> None:
    by_hand, composed = world.batch(clients=1), world.batch(clients=1, **APPROVED)
    for batch_id in (by_hand, composed):
        results(world, batch_id, "fffff")
    assert sync(world)["batches paused"] == 1
    assert status_of(world, by_hand) == ("sending", None)


def test_a_batch_that_is_over_is_not_paused(world: TestData) -> None:
    batch_id = world.batch(**APPROVED)
    results(world, batch_id, "fffff")
    sync(world)
    assert status_of(world, batch_id) == ("sent", None)


def test_what_waits_of_a_batch_that_stops_is_withdrawn_at_once(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.settings(stop_after_failures=1)
    batch_id = world.batch(clients=4, **APPROVED)
    for _ in range(3):
        tick(world, mac_sync)
    first, collected, _ = mini.peek()["items"]
    for item in (first, collected):
        assert mini.collect(item["id"]).status_code == 200
    mini.result(first["id"], "failed", error="not registered with iMessage")
    sync(world)
    assert status_of(world, batch_id) == ("paused", "the last message failed")
    assert [item["id"] for item in mini.peek()["items"]] == [collected["id"]]
    assert row_statuses(world) == [("failed", False), ("queued", False), ("failed", True)]
    tick(world, mac_sync)
    sync(world)
    assert world.statuses(batch_id) == ["failed", "queued", "pending", "pending"]


# --- opt-outs -----------------------------------------------------------------------------------------


def sent_to(world: TestData, batch_id: str, count: int) -> list[str]:
    """So many items that were sent to different people; return their handles."""
    handles = [f"+1415555{number:04}" for number in range(count)]
    for handle in handles:
        world.item(batch_id, status="sent", queued_at=ago(600), sent_at=ago(590), handle_key=handle)
    return handles


@pytest.mark.parametrize(
    ("people", "opted_out", "stops"),
    [(10, 2, False), (10, 3, True), (60, 3, False), (59, 3, True), (80, 4, False), (79, 4, True)],
)
def test_opt_outs_of_more_than_a_twentieth_and_three_at_least_pause_a_composed_batch(
    world: TestData, mini: DeviceClient, people: int, opted_out: int, stops: bool
) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    by_hand = world.batch(clients=1)
    handles = sent_to(world, batch_id, people)
    sent_to(world, by_hand, people)
    for handle in handles[:opted_out]:
        mini.opt_out(handle)
    mini.opt_out("+14155559999")  # it was not sent to them
    sync(world)
    reason = f"{opted_out} of the {people} people that it was sent to opted out"
    assert status_of(world, batch_id) == (("paused", reason) if stops else ("sending", None))
    assert status_of(world, by_hand) == ("sending", None)


def test_opt_outs_from_before_the_message_or_taken_back_do_not_count(world: TestData, mini: DeviceClient) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    handles = sent_to(world, batch_id, 10)
    for handle in handles[:4]:
        mini.opt_out(handle, at="2026-04-22T12:00:00Z")
    mini.opt_out(handles[0], "START", "2026-04-22T13:00:00Z")
    world.icloud(
        "UPDATE icloud.opt_outs SET created_at = now() - interval '11 minutes' WHERE handle_key = %(h)s", h=handles[1]
    )
    sync(world)
    assert status_of(world, batch_id) == ("sending", None)
    mini.opt_out(handles[4])
    sync(world)
    assert status_of(world, batch_id) == ("paused", "3 of the 10 people that it was sent to opted out")


def test_opt_outs_from_before_the_batch_was_resumed_do_not_count(world: TestData, mini: DeviceClient) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    handles = sent_to(world, batch_id, 10)
    for handle in handles[:5]:
        mini.opt_out(handle)
    world.quinn("UPDATE outreach_batches SET resumed_at = now()")
    for handle in handles[5:7]:
        mini.opt_out(handle)
    sync(world)
    assert status_of(world, batch_id) == ("sending", None)
    mini.opt_out(handles[7])
    sync(world)
    assert status_of(world, batch_id)[0] == "paused"


def test_opt_outs_that_came_while_the_dispatcher_was_down_are_seen(world: TestData, mini: DeviceClient) -> None:
    batch_id = world.batch(clients=1, **APPROVED)
    for handle in sent_to(world, batch_id, 10)[:3]:
        mini.opt_out(handle)
    world.icloud("UPDATE icloud.opt_outs SET created_at = now() - interval '9 minutes'")
    world.settings(last_synced_at=ago(3600))
    sync(world)
    assert status_of(world, batch_id)[0] == "paused"


# --- approval -----------------------------------------------------------------------------------------


def test_a_composed_batch_without_approval_is_never_sent(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    batch_id = world.batch(clients=2, digest="of what was previewed")
    assert not +tick(world, mac_sync)
    world.quinn("UPDATE outreach_batch_items SET claimed_at = now()")
    assert not +tick(world, mac_sync)
    sync(world)
    assert world.quinn("SELECT DISTINCT status, claimed_at FROM outreach_batch_items") == [("pending", None)]
    assert batch_id not in snapshots.read_outreach(world.databases.quinn).counts
    world.quinn("UPDATE outreach_batches SET approved_at = now()")
    assert tick(world, mac_sync)["queued"] == 1
    world.quinn("UPDATE outreach_batches SET approved_at = NULL")
    assert sync(world)["withdrawn"] == 1
    assert mini.peek()["items"] == []
