"""Check what the dispatcher asks of composed batches: the last checks, send_from, send_until, first_n, the approval."""

import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import ago, record_statements
from testing import DeviceClient, TestData

import batches
import composing
import dispatcher
import pacing
import report

INTERVAL = timedelta(seconds=30)
BERLIN = {"v": 1, "where": {"field": "city", "eq": "Berlin"}}


@pytest.fixture
def tick(world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str) -> Callable[[], dispatcher.JobCounts]:
    """Run both jobs once; return what dispatch did."""

    def run() -> dispatcher.JobCounts:
        quinn, icloud = world.databases.quinn, world.databases.icloud
        dispatcher.sync(quinn, icloud)
        return dispatcher.dispatch(quinn, icloud, mac_sync)

    return run


def person(world: TestData, number: int, city: str = "Berlin") -> str:
    client_id = world.client(f"+1415555{number:04}")
    sql = "UPDATE clients SET name = %(name)s, attributes = %(attributes)s WHERE id = %(id)s"
    world.quinn(sql, name=f"Person {number}", attributes=json.dumps({"city": city}), id=client_id)
    return client_id


def approve(world: TestData, people: int = 1, first_n: int | None = None, **request: Any) -> str:
    """Draft and approve a batch for so many people in Berlin; return its id."""
    known = world.quinn("SELECT count(*) FROM clients")[0][0]
    for number in range(known, people):
        person(world, number)
    wanted = {"query": BERLIN, "id": uuid.uuid4(), "template": "Hello {{ client.name }}", "first_n": first_n, **request}
    quinn, icloud = world.databases.quinn, world.databases.icloud
    made = composing.draft(quinn, icloud, composing.Request(**wanted), INTERVAL)
    composing.send(quinn, made.id, made.digest, made.items)
    return made.id


def outcome(world: TestData) -> list[tuple[str, str | None]]:
    return world.quinn("SELECT status, failure_reason FROM outreach_batch_items ORDER BY created_at, id")


def run_mac(world: TestData, mini: DeviceClient, status: str = "sent") -> int:
    rows = mini.poll()
    for row in rows:
        mini.result(row["id"], status)
    return len(rows)


# --- a person drops out between the approval and the send ----------------------------------------------


def edited(world: TestData) -> None:
    world.quinn("UPDATE clients SET name = 'Somebody else'")


def moved_away(world: TestData) -> None:
    world.quinn('UPDATE clients SET attributes = \'{"city": "Paris"}\'')


def deleted(world: TestData) -> None:
    world.quinn("DELETE FROM clients")
    world.quinn("DELETE FROM contact_relationships")


def deleted_without_its_handles(world: TestData) -> None:
    world.quinn("DELETE FROM clients")


def another_primary_handle(world: TestData) -> None:
    world.quinn("UPDATE contact_relationships SET is_primary = false")
    world.quinn("INSERT INTO contact_relationships SELECT id, '+14155559999', true FROM clients")


def handle_written_in_another_way(world: TestData) -> None:
    world.quinn("UPDATE contact_relationships SET handle = '+1 (415) 555-0000'")


def opted_out(world: TestData) -> None:
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('+14155550000', 'owner')")


def written_to(world: TestData) -> None:
    [(client_id,)] = world.quinn("SELECT id FROM clients")
    world.item(world.batch(status="sent"), client_id, status="sent", sent_at=ago(hours=1))


def replaced_by_hand(world: TestData) -> None:
    world.quinn("UPDATE outreach_batch_items SET handle_key = NULL")


DROPPED_OUT: list[tuple[Callable[[TestData], None], str, str | None]] = [
    (edited, "queued", None),
    (moved_away, "skipped", "no longer matches the audience"),
    (deleted, "skipped", "no primary handle found"),
    (deleted_without_its_handles, "skipped", "no longer matches the audience"),
    (another_primary_handle, "skipped", "the handle changed after approval"),
    (handle_written_in_another_way, "queued", None),
    (opted_out, "skipped", "opted out"),
    (written_to, "skipped", "was written to in the last 7 days"),
    (replaced_by_hand, "skipped", "was added after approval"),
]


@pytest.mark.parametrize(("change", "status", "reason"), DROPPED_OUT, ids=[case[0].__name__ for case in DROPPED_OUT])
def test_change_after_the_approval(
    world: TestData, tick: Callable[[], Any], change: Callable[[TestData], None], status: str, reason: str | None
) -> None:
    batch_id = approve(world, not_sent_within_days=7)
    change(world)
    tick()
    sql = "SELECT status, failure_reason, rendered_body FROM outreach_batch_items WHERE batch_id = %(id)s"
    assert world.quinn(sql, id=batch_id) == [(status, reason, "Hello Person 0")]
    bodies = [body for (body,) in world.icloud("SELECT body FROM icloud.send_queue")]
    assert bodies == (["Hello Person 0"] if status == "queued" else [])


@pytest.mark.parametrize(("change", "status", "reason"), DROPPED_OUT, ids=[case[0].__name__ for case in DROPPED_OUT])
def test_change_while_the_claim_waits_through_an_outage(
    world: TestData, tick: Callable[[], Any], change: Callable[[TestData], None], status: str, reason: str | None
) -> None:
    batch_id = approve(world, not_sent_within_days=7)
    nobody = dispatcher.SendQueueClient("http://127.0.0.1:1", "service-token-of-16")
    with nobody.session, pytest.raises(dispatcher.ServerUnavailable):
        dispatcher.dispatch(world.databases.quinn, world.databases.icloud, nobody)
    assert world.quinn("SELECT count(*) FROM outreach_batch_items WHERE claimed_at IS NOT NULL") == [(1,)]
    change(world)
    tick()
    sql = "SELECT status, failure_reason FROM outreach_batch_items WHERE batch_id = %(id)s"
    assert world.quinn(sql, id=batch_id) == [(status, reason)]


def test_recheck_can_be_switched_off(world: TestData, tick: Callable[[], Any]) -> None:
    approve(world, recheck=False)
    moved_away(world)
    assert tick()["queued"] == 1


def test_batch_whose_audience_cannot_be_checked_pauses_alone(world: TestData, tick: Callable[[], Any]) -> None:
    person(world, 1)
    world.quinn("ALTER TABLE clients ADD COLUMN shoe_size INTEGER DEFAULT 42")
    broken = approve(world, query={"v": 1, "where": {"field": "shoe_size", "gt": 40}})
    other = world.batch(clients=1)
    world.quinn("ALTER TABLE clients DROP COLUMN shoe_size")
    assert tick()["queued"] == 1
    assert world.statuses(other) == ["queued"]
    [(status, reason)] = world.quinn("SELECT status, pause_reason FROM outreach_batches WHERE id = %(id)s", id=broken)
    assert status == "paused"
    assert reason.startswith("its audience cannot be checked any more: ")
    assert world.statuses(broken) == ["pending"]


def test_two_batches_for_the_same_people_are_not_both_sent(
    world: TestData, tick: Callable[[], Any], mini: DeviceClient
) -> None:
    for _ in range(2):
        approve(world, 3, not_sent_within_days=7)
    for _ in range(8):
        tick()
        run_mac(world, mini)
    tick()
    counts = world.quinn("SELECT status, failure_reason, count(*) FROM outreach_batch_items GROUP BY 1, 2 ORDER BY 1")
    assert counts == [("sent", None, 3), ("skipped", "was written to in the last 7 days", 3)]
    assert world.icloud("SELECT count(*), count(DISTINCT to_handle) FROM icloud.send_queue") == [(3, 3)]


def test_one_handle_gets_one_message_in_a_tick(world: TestData, tick: Callable[[], Any]) -> None:
    for _ in range(2):
        approve(world)
    assert tick()["queued"] == 1
    assert tick()["queued"] == 1, "nobody asked to leave out who was written to"


def test_batch_by_hand_asks_nothing(world: TestData, tick: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    world.batch(clients=2)
    statements = record_statements(monkeypatch)
    assert tick()["queued"] == 1
    assert not [sql for sql, _ in statements if "client.id = ANY" in sql or "pg_attribute" in sql]


# --- when -----------------------------------------------------------------------------------------------


def test_nothing_is_sent_before_send_from(world: TestData, tick: Callable[[], Any]) -> None:
    begins = datetime.now(UTC) + timedelta(hours=2)
    batch_id = approve(world, send_from=begins)
    assert tick()["queued"] == 0
    world.settings(last_dispatched_at=ago(1), last_synced_at=ago(1), last_tick_at=ago(1), quiet_hours_tz="UTC")
    verdict = report.report(INTERVAL).verdict
    time = f"{begins:%H:%M}" if begins.date() == datetime.now(UTC).date() else f"{begins:%a %H:%M}"
    assert verdict.sentence == f"Held: batch {batch_id[:8]}… begins at {time}."
    assert not verdict.needs_operator
    world.quinn("UPDATE outreach_batches SET send_from = now()")
    assert tick()["queued"] == 1


def test_nothing_is_sent_after_send_until(world: TestData, tick: Callable[[], Any], mini: DeviceClient) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    batch_id = approve(world, 3, send_until=ends)
    tick()
    assert world.icloud("SELECT valid_until FROM icloud.send_queue") == [(ends,)]
    world.quinn("UPDATE outreach_batches SET send_until = now()")
    world.icloud("UPDATE icloud.send_queue SET valid_until = now()")
    assert mini.peek()["items"] == []
    tick()
    tick()
    assert outcome(world) == [("skipped", batches.PAST_ITS_TIME)] * 3
    assert composing.show(world.databases.quinn, batch_id).status == "sent"


def test_approval_lapses(world: TestData, tick: Callable[[], Any], mini: DeviceClient) -> None:
    batch_id = approve(world, 2)
    tick()
    [(valid_until, approved_at)] = world.icloud("SELECT valid_until, now() FROM icloud.send_queue")
    assert abs(valid_until - approved_at - timedelta(days=7)) < timedelta(minutes=1)
    world.quinn("UPDATE outreach_batches SET approved_at = now() - interval '7 days'")
    counts = dispatcher.sync(world.databases.quinn, world.databases.icloud)
    assert (counts["batches paused"], counts["withdrawn"]) == (1, 1)
    detail = composing.show(world.databases.quinn, batch_id)
    assert (detail.status, detail.pause_reason) == ("paused", "approval lapsed")
    tick()
    assert mini.peek()["items"] == []
    composing.send(world.databases.quinn, batch_id, str(detail.digest), 2)
    assert tick()["queued"] == 1


def test_approval_without_days_does_not_lapse(world: TestData, tick: Callable[[], Any]) -> None:
    approve(world)
    world.settings(approval_days=None)
    world.quinn("UPDATE outreach_batches SET approved_at = now() - interval '400 days'")
    assert tick()["queued"] == 1
    assert world.icloud("SELECT valid_until FROM icloud.send_queue") == [(None,)]


# --- the first ones --------------------------------------------------------------------------------------


def test_batch_pauses_after_its_first_messages(world: TestData, tick: Callable[[], Any], mini: DeviceClient) -> None:
    batch_id = approve(world, 5, first_n=2)
    for _ in range(4):
        tick()
    assert world.statuses(batch_id).count("queued") == 2, "what is in flight counts"
    assert composing.show(world.databases.quinn, batch_id).status == "sending", "a pause would withdraw it"
    run_mac(world, mini)
    tick()
    detail = composing.show(world.databases.quinn, batch_id)
    assert (detail.status, detail.pause_reason) == ("paused", "the first 2 messages were sent")
    assert detail.check_first == "Look at what the first ones received, on the Mac."
    batches.resume(world.databases.quinn, batch_id)
    for _ in range(4):
        tick()
        run_mac(world, mini)
    tick()
    assert composing.show(world.databases.quinn, batch_id).status == "sent"


def test_batch_paused_by_its_owner_keeps_first_n(world: TestData, tick: Callable[[], Any], mini: DeviceClient) -> None:
    batch_id = approve(world, 5, first_n=2)
    tick()
    run_mac(world, mini)
    batches.pause(world.databases.quinn, world.databases.icloud, batch_id)
    batches.resume(world.databases.quinn, batch_id)
    for _ in range(4):
        tick()
        run_mac(world, mini)
    tick()
    assert sorted(world.statuses(batch_id)) == ["pending", "pending", "sent", "sent", "sent"]


def test_failed_message_is_none_of_the_first(world: TestData, tick: Callable[[], Any], mini: DeviceClient) -> None:
    batch_id = approve(world, 4, first_n=2)
    tick()
    run_mac(world, mini, "failed")
    for _ in range(3):
        tick()
        run_mac(world, mini)
    tick()
    assert sorted(world.statuses(batch_id)) == ["failed", "pending", "sent", "sent"]
    assert composing.show(world.databases.quinn, batch_id).status == "paused"


def test_decision_names_the_first_messages(world: TestData, tick: Callable[[], Any]) -> None:
    approve(world, 3, first_n=1)
    tick()
    snapshot = pacing.read_snapshot(world.databases.quinn)
    [batch] = pacing.batches(world.databases.quinn)
    assert snapshot
    assert batch.first_left == 0
    hold = pacing.batch_hold(snapshot, batch)
    assert hold
    assert hold.code == "first messages"
    assert hold.clears_itself


# --- what an outage, a retry or the owner's SQL leave behind ---------------------------------------------


def test_retry_by_name_is_sent_again_although_it_may_have_been_sent(
    world: TestData, tick: Callable[[], Any], mini: DeviceClient
) -> None:
    batch_id, other = (approve(world, not_sent_within_days=7) for _ in range(2))
    tick()
    [row] = mini.poll()
    mini.result(row["id"], "failed", outcome="unknown")
    dispatcher.sync(world.databases.quinn, world.databases.icloud)
    assert dispatcher.run_retry(batch_id, include_unknown=True) == 0
    tick()
    assert world.statuses(batch_id) == ["queued"]
    assert world.statuses(other) == ["skipped"], "for another batch, what may have been sent counts"


def test_send_from_of_a_batch_by_hand_holds_nothing(world: TestData, tick: Callable[[], Any]) -> None:
    world.batch(clients=1, send_from=datetime.now(UTC) + timedelta(hours=1))
    assert tick()["queued"] == 1


@pytest.mark.parametrize(
    "change",
    ["send_from = now() + interval '1 hour'", "send_until = now()", "approved_at = now() - interval '8 days'"],
)
def test_claim_that_may_not_go_now_holds_up_no_other_batch(
    world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str, change: str
) -> None:
    batch_id = approve(world)
    world.quinn("UPDATE outreach_batch_items SET claimed_at = now()")
    world.quinn(f"UPDATE outreach_batches SET {change}")
    by_hand = world.batch(clients=1)
    assert dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)["queued"] == 1
    assert (world.statuses(batch_id), world.statuses(by_hand)) == (["pending"], ["queued"])


def test_what_waits_of_a_batch_is_withdrawn_when_its_times_change(
    world: TestData, tick: Callable[[], Any], mini: DeviceClient
) -> None:
    batch_id = approve(world)
    tick()
    world.quinn("UPDATE outreach_batches SET send_from = now() + interval '1 hour'")
    assert dispatcher.sync(world.databases.quinn, world.databases.icloud)["withdrawn"] == 1
    assert world.statuses(batch_id) == ["pending"]
    world.quinn("UPDATE outreach_batches SET send_from = NULL")
    tick()
    world.quinn("UPDATE outreach_batches SET send_until = now()")
    tick()
    assert mini.peek()["items"] == []
    tick()
    assert world.statuses(batch_id) == ["skipped"]


def test_approval_of_a_paused_batch_lapses_too(world: TestData, tick: Callable[[], Any]) -> None:
    lapsed, fresh, draft = approve(world), approve(world), world.batch(clients=1, status="draft", digest="d")
    for batch_id in (lapsed, fresh):
        batches.pause(world.databases.quinn, world.databases.icloud, batch_id)
    world.quinn("UPDATE outreach_batches SET approved_at = now() - interval '7 days' WHERE id = %(id)s", id=lapsed)
    tick()
    reasons: dict[str, str | None] = dict(world.quinn("SELECT id, pause_reason FROM outreach_batches"))
    assert reasons == {lapsed: "approval lapsed", fresh: None, draft: None}
    with pytest.raises(batches.Refused, match="send it with its digest"):
        batches.resume(world.databases.quinn, lapsed)
    assert dispatcher.sync(world.databases.quinn, world.databases.icloud)["batches paused"] == 0, "it is told once"
