"""Check that nobody gets what was not previewed for them, whatever changes between the preview and the approval.

test_last_checks.py changes the same things after the approval.
"""

import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import test_last_checks
from test_last_checks import BERLIN, DROPPED_OUT, person
from testing import TestData

import batches
import composing
import dispatcher

INTERVAL = timedelta(seconds=30)
Change = Callable[[TestData], None]


def request(**more: Any) -> composing.Request:
    wanted = {"query": BERLIN, "id": uuid.uuid4(), "template": "Hello {{ client.name }}", "not_sent_within_days": 7}
    return composing.Request(**{**wanted, **more})


def draft(world: TestData, **more: Any) -> composing.Draft:
    return composing.draft(world.databases.quinn, world.databases.icloud, request(**more), INTERVAL)


def dispatch(world: TestData, mac_sync: dispatcher.SendQueueClient, ticks: int = 1) -> list[tuple[str, str]]:
    """Run the dispatch job; return the handle and the text of each message in the queue."""
    for _ in range(ticks):
        dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)
    return world.icloud("SELECT to_handle, body FROM icloud.send_queue ORDER BY created_at, id")


@pytest.mark.parametrize(
    ("change", "status", "reason"), DROPPED_OUT[:-1], ids=[case[0].__name__ for case in DROPPED_OUT[:-1]]
)
def test_change_between_draft_and_approval(
    world: TestData,
    mac_sync: dispatcher.SendQueueClient,
    device_id: str,
    change: Change,
    status: str,
    reason: str | None,
) -> None:
    person(world, 0)
    made = draft(world)
    change(world)
    composing.send(world.databases.quinn, made.id, made.digest, made.items)
    sent = dispatch(world, mac_sync)
    assert sent == ([("+14155550000", "Hello Person 0")] if status == "queued" else [])
    sql = "SELECT status, failure_reason, rendered_body FROM outreach_batch_items WHERE batch_id = %(id)s"
    assert world.quinn(sql, id=made.id) == [(status, reason, "Hello Person 0")]


@pytest.mark.parametrize(
    "change",
    [
        test_last_checks.edited, test_last_checks.moved_away, test_last_checks.deleted, test_last_checks.opted_out,
        test_last_checks.another_primary_handle, test_last_checks.written_to,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_draft_that_is_not_what_the_dry_run_showed_is_not_sent_with_its_digest(world: TestData, change: Change) -> None:
    person(world, 0)
    quinn, icloud = world.databases.quinn, world.databases.icloud
    seen = composing.dry_run(quinn, icloud, request(), INTERVAL)
    change(world)
    person(world, 1)  # or there would be no draft for nobody
    made = draft(world)
    with pytest.raises(batches.Refused, match="this is not the batch that you have seen") as refused:
        composing.send(quinn, made.id, seen.digest, seen.items)
    assert refused.value.status == 409
    assert composing.show(quinn, made.id).status == "draft"


def test_person_who_is_added_after_the_draft_gets_nothing(
    world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    person(world, 0)
    made = draft(world)
    person(world, 1)
    composing.send(world.databases.quinn, made.id, made.digest, made.items)
    assert dispatch(world, mac_sync, ticks=3) == [("+14155550000", "Hello Person 0")]


def test_number_that_two_clients_share_by_now_gets_one_message(
    world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    ids = [person(world, number) for number in range(4)]
    made = draft(world)
    composing.send(world.databases.quinn, made.id, made.digest, made.items)
    ways = ("+52 1 55 1234 5678", "+525512345678", "+52 (55) 1234-5678", "+5215512345678")
    for client_id, handle in zip(ids, ways, strict=True):
        sql = "UPDATE contact_relationships SET handle = %(handle)s WHERE client_id = %(id)s"
        world.quinn(sql, handle=handle, id=client_id)
    assert dispatch(world, mac_sync, ticks=5) == [], "none of them is the handle that was approved"
    again = draft(world)
    assert (again.items, again.left_out[0].reason, again.left_out[0].count) == (1, "sameHandle", 3)
    composing.send(world.databases.quinn, again.id, again.digest, again.items)
    assert [handle for handle, _ in dispatch(world, mac_sync, ticks=5)] == ["+525512345678"]


def test_item_for_another_handle_than_the_drafts_is_not_sent(world: TestData) -> None:
    person(world, 0)
    made = draft(world)
    world.quinn("UPDATE outreach_batch_items SET handle_key = '+14155550009'")
    with pytest.raises(batches.Refused, match="changed since the draft"):
        composing.send(world.databases.quinn, made.id, made.digest, made.items)


def test_two_drafts_for_the_same_people_that_are_approved_together_write_to_nobody_twice(
    world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    for number in range(3):
        person(world, number)
    both = [draft(world, template=f"{word} {{{{ client.name }}}}") for word in ("Hello", "Bye")]
    for made in both:
        composing.send(world.databases.quinn, made.id, made.digest, made.items)
    handles = [handle for handle, _ in dispatch(world, mac_sync, ticks=8)]
    assert sorted(handles) == ["+14155550000", "+14155550001", "+14155550002"]
    reasons = world.quinn("SELECT DISTINCT failure_reason FROM outreach_batch_items WHERE status = 'skipped'")
    assert reasons == [("was written to in the last 7 days",)]
