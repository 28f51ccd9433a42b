"""Check composing.py: who gets a text and who is left out, the draft, its digest, and the approval."""

import contextlib
import json
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import ago
from testing import TestData

import batches
import composing
import db
import dispatcher
import handles

INTERVAL = timedelta(seconds=30)
EVERYONE = {"v": 1, "where": {"everyone": True}}
BATCH = uuid.UUID("11111111-2222-4333-8444-555555555555")


def person(world: TestData, name: str = "Ana", handle: str | None = None, **attributes: Any) -> str:
    """Insert a client with attributes; return its id. Without a handle, give it one of its own."""
    count = world.quinn("SELECT count(*) FROM contact_relationships")[0][0]
    client_id = world.client(handle or f"+1415555{count + 100:04}")
    sql = "UPDATE clients SET name = %(name)s, attributes = %(attributes)s WHERE id = %(id)s"
    world.quinn(sql, name=name, attributes=json.dumps(attributes), id=client_id)
    return client_id


def request(template: str | None = "Hello {{ client.name }}", **more: Any) -> composing.Request:
    return composing.Request(**{"query": EVERYONE, "id": BATCH, "template": template, **more})


def draft(world: TestData, template: str = "Hello {{ client.name }}", **more: Any) -> composing.Draft:
    return composing.draft(world.databases.quinn, world.databases.icloud, request(template, **more), INTERVAL)


def search(world: TestData, template: str | None = None, **more: Any) -> dict[str, int]:
    """Return how many people are left out, by reason, and how many would get a text."""
    found = composing.search(world.databases.quinn, world.databases.icloud, request(template, **more))
    counts = {left.reason: left.count for left in found.left_out}
    assert found.matched == found.items + sum(counts.values())
    return {"items": found.items, **counts}


def send(world: TestData, made: composing.Draft, **more: Any) -> composing.Sent:
    return composing.send(world.databases.quinn, made.id, made.digest, more.pop("recipients", made.items), **more)


def bodies(world: TestData) -> list[str]:
    return [body for (body,) in world.quinn("SELECT rendered_body FROM outreach_batch_items ORDER BY created_at, id")]


# --- who is left out ----------------------------------------------------------------------------------


def no_handle(world: TestData) -> None:
    world.quinn("DELETE FROM contact_relationships WHERE client_id = %(id)s", id=person(world))


def only_secondary_handle(world: TestData) -> None:
    world.quinn("UPDATE contact_relationships SET is_primary = false WHERE client_id = %(id)s", id=person(world))


def unreadable_number(world: TestData) -> None:
    person(world, handle="0170 1234567")


def no_handle_at_all(world: TestData) -> None:
    person(world, handle="see notes")


def opt_out(world: TestData, handle: str, **columns: Any) -> None:
    key = handles.key(handle)
    sql = (
        "INSERT INTO icloud.opt_outs (handle_key, source, ended_at, ended_by) VALUES (%(key)s, 'owner', %(at)s, %(by)s)"
    )
    world.icloud(sql, key=key, at=columns.get("ended_at"), by="owner" if columns.get("ended_at") else None)


def opted_out(world: TestData) -> None:
    person(world, handle="+14155550123")
    opt_out(world, "+1 (415) 555-0123")


def opted_out_by_another_handle(world: TestData) -> None:
    sql = "INSERT INTO contact_relationships VALUES (%(id)s, 'Ana@Example.com', false)"
    world.quinn(sql, id=person(world))
    opt_out(world, "ana@example.com")


def same_number_in_four_ways(world: TestData) -> None:
    for handle in ("+52 1 55 1234 5678", "+525512345678", "+52 (55) 1234-5678", "+5215512345678"):
        person(world, handle=handle)


def sent_to_client(world: TestData, **columns: Any) -> None:
    world.item(world.batch(status="sent"), person(world), **{"status": "sent", "sent_at": ago(days=3), **columns})


def sent_to_handle(world: TestData) -> None:
    person(world, handle="+14155550999")
    old = world.client(None)
    item_id = world.item(world.batch(status="sent"), old, status="sent", sent_at=ago(days=3), handle_key="+14155550999")
    assert item_id
    world.quinn("DELETE FROM clients WHERE id = %(id)s", id=old)


def in_flight(world: TestData) -> None:
    sent_to_client(world, status="queued", sent_at=None)


def claimed(world: TestData) -> None:
    sent_to_client(world, status="pending", sent_at=None, claimed_at=ago(seconds=5))


def unknown(world: TestData) -> None:
    sent_to_client(world, status="failed", sent_at=None, outcome_unknown_at=ago(days=3))


LEFT_OUT: list[tuple[Callable[[TestData], None], dict[str, int]]] = [
    (no_handle, {"noHandle": 1}),
    (only_secondary_handle, {"noHandle": 1}),
    (unreadable_number, {"badHandle": 1}),
    (no_handle_at_all, {"badHandle": 1}),
    (opted_out, {"optedOut": 1}),
    (opted_out_by_another_handle, {"optedOut": 1}),
    (same_number_in_four_ways, {"items": 2, "sameHandle": 3}),
    (sent_to_client, {"sentRecently": 1}),
    (sent_to_handle, {"sentRecently": 1}),
    (in_flight, {"sentRecently": 1}),
    (claimed, {"sentRecently": 1}),
    (unknown, {"sentRecently": 1}),
]


@pytest.mark.parametrize(("situation", "expected"), LEFT_OUT, ids=[case[0].__name__ for case in LEFT_OUT])
def test_each_reason_leaves_a_person_out(
    world: TestData, situation: Callable[[TestData], None], expected: dict[str, int]
) -> None:
    person(world, "Somebody else", handle="+442079460000")
    situation(world)
    assert search(world, not_sent_within_days=7) == {"items": 1, **expected}


@pytest.mark.parametrize("days", [None, 2])
def test_older_message_leaves_nobody_out(world: TestData, days: int | None) -> None:
    sent_to_client(world)
    assert search(world, not_sent_within_days=days) == {"items": 1}


def test_opt_out_that_has_ended_leaves_nobody_out(world: TestData) -> None:
    person(world, handle="+14155550123")
    opt_out(world, "+14155550123", ended_at=ago(hours=1))
    assert search(world) == {"items": 1}


def test_person_counts_for_the_first_reason_only(world: TestData) -> None:
    opt_out(world, "+14155550123")
    person(world, "", handle="+14155550123")
    world.item(world.batch(status="sent"), person(world, "", handle="+14155550124"), status="sent", sent_at=ago(days=1))
    assert search(world, "Hello {{ client.name }}", not_sent_within_days=7) == {
        "items": 0, "optedOut": 1, "sentRecently": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", "   ", "\u200b\u2060", "\u00a0"])
def test_empty_name_leaves_a_person_out(world: TestData, name: str) -> None:
    person(world, name)
    assert search(world, "Hello {{ client.name }},") == {"items": 0, "emptyVariable": 1}
    assert search(world, "Hello {{ client.name | default: 'you' }},") == {"items": 1}


def test_too_long_text_leaves_a_person_out(world: TestData) -> None:
    person(world, note="x" * 1995)
    person(world, note="short")
    assert search(world, "Note: {{ client.note }}") == {"items": 1, "tooLong": 1}


def test_each_person_left_out_can_be_listed(world: TestData) -> None:
    names = [f"Person {number}" for number in range(12)]
    for name in names:
        person(world, name, handle="0170 1234567")
    person(world, "Reachable")
    databases = world.databases
    found = composing.search(databases.quinn, databases.icloud, request())
    assert [(left.reason, left.count, len(left.sample)) for left in found.left_out] == [("badHandle", 12, 10)]
    listed, after = [], None
    while True:
        page = composing.people_left_out(databases.quinn, databases.icloud, request(), "badHandle", after, limit=5)
        listed += [entry.name for entry in page.entries]
        if not (after := page.after):
            break
    assert sorted(listed) == sorted(names)


def test_page_after_an_unknown_person_is_refused(world: TestData) -> None:
    person(world, handle="0170 1234567")
    databases = world.databases
    with pytest.raises(batches.Refused, match="begin with the first page"):
        composing.people_left_out(databases.quinn, databases.icloud, request(), "badHandle", str(uuid.uuid4()))


def test_columns_and_keys_may_have_any_name(world: TestData) -> None:
    name = '"100%% ""sure"""'
    world.quinn(f"ALTER TABLE clients ADD COLUMN {name} TEXT DEFAULT 'yes'")
    person(world, **{"50%s of 'it'": "half"})
    query = {"v": 1, "where": {"field": '100% "sure"', "eq": "yes"}}
    made = draft(world, """{{ client['100% "sure"'] }} and {{ client["50%s of 'it'"] }}""", query=query)
    assert made.items == 1
    assert bodies(world) == ["yes and half"]


# --- the draft ----------------------------------------------------------------------------------------


def test_draft_stores_what_it_shows(world: TestData) -> None:
    for name in ("Ana", "Bo", "Christopher"):
        person(world, name)
    person(world, "")
    made = draft(world, name="Spring")
    assert (made.status, made.matched, made.items) == ("draft", 4, 3)
    assert {preview.body for preview in made.previews} == {"Hello Ana", "Hello Bo", "Hello Christopher"}
    assert sorted(bodies(world)) == ["Hello Ana", "Hello Bo", "Hello Christopher"]
    assert composing.read_digest(world.databases.quinn, made.id) == made.digest
    detail = composing.show(world.databases.quinn, made.id)
    assert (detail.name, detail.status, detail.counts.pending) == ("Spring", "draft", 3)
    assert detail.draft
    assert detail.draft.left_out == made.left_out
    tally = dispatcher.dispatch(world.databases.quinn, world.databases.icloud, None)  # type: ignore[arg-type]
    assert tally["queued"] == 0, "a draft is not sent"


def test_items_are_sent_in_the_order_of_the_list(world: TestData) -> None:
    for number in range(30):
        person(world, f"Person {number}")
    draft(world)
    sql = "SELECT client_id FROM outreach_batch_items ORDER BY created_at, id"
    order = [client_id for (client_id,) in world.quinn(sql)]
    assert order == [client_id for (client_id,) in world.quinn("SELECT id FROM clients ORDER BY id")]


def test_previews_show_first_shortest_longest_and_a_default(world: TestData) -> None:
    names = ["Anastasia", "Benedikta", "Christina", "Dee", "Elisabeth-Charlotte", ""]
    for name in names:
        person(world, name)
    made = draft(world, "Hello {{ client.name | default: 'dear client' }}")
    whys = [preview.why for preview in made.previews]
    assert whys[:3] == ["first", "first", "first"]
    shown = {preview.body for preview in made.previews}
    assert {"Hello Dee", "Hello Elisabeth-Charlotte", "Hello dear client"} <= shown


def test_unusual_values_and_warnings_are_shown(world: TestData) -> None:
    for name in ("Ana", "BERND", "test", "x@example.com", "Dora"):
        person(world, name)
    made = draft(world, "Hello {{ client.name }}")
    assert {unusual.value for unusual in made.unusual} >= {"BERND", "test", "x@example.com"}
    assert made.new_contacts == 5
    assert len(made.warnings) == 2, "neither who writes, nor how to opt out"


def test_same_request_again_is_the_same_draft(world: TestData) -> None:
    person(world)
    first = draft(world)
    person(world, "Bo")
    again = draft(world)
    first.forecast = again.forecast = None  # it is of now
    assert again == first
    assert len(bodies(world)) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"template": "Bye {{ client.name }}"},
        {"name": "Another"},
        {"query": {"v": 1, "where": {"field": "name", "eq": "Ana"}}},
        {"not_sent_within_days": 30},
        {"send_until": datetime(2030, 1, 1, tzinfo=UTC)},
        {"first_n": 1},
        {"vars": {"code": "X"}},
        {"recheck": False},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_request_with_the_same_id_is_refused(world: TestData, other: dict[str, Any]) -> None:
    person(world)
    draft(world)
    with pytest.raises(batches.Refused, match="another batch with the id") as refused:
        draft(world, **{"template": "Hello {{ client.name }}", **other})
    assert refused.value.status == 409
    assert bodies(world) == ["Hello Ana"]


def test_two_requests_at_once_make_one_draft(world: TestData) -> None:
    for number in range(300):
        person(world, f"Person {number}")
    made: list[Any] = []

    def compose() -> None:
        quinn, icloud = (db.connect(url) for url in (world.databases.quinn_url, world.databases.icloud_url))
        made.append(composing.draft(quinn, icloud, request(), INTERVAL))
        quinn.close()
        icloud.close()

    threads = [threading.Thread(target=compose) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    assert len({(each.id, each.digest, each.items) for each in made}) == 1
    assert len(bodies(world)) == 300


def test_nobody_to_write_to_is_refused(world: TestData) -> None:
    person(world, "")
    with pytest.raises(batches.Refused, match="nobody would get this text; 1 people match: 1 emptyVariable"):
        draft(world)
    assert world.quinn("SELECT count(*) FROM outreach_batches") == [(0,)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"query": {}}, "for everyone, write"),
        ({"query": {"v": 1, "where": {}}}, "where"),
        ({"query": {"v": 1, "where": {"field": "nmae", "eq": "x"}}}, "name"),
        ({"template": "Hello {{ client.nmae }}"}, "line 1, column 10: .*did you mean client.name"),
        ({"template": None}, "template"),
        ({"id": None}, "id"),
    ],
)
def test_wrong_request_writes_nothing(world: TestData, more: dict[str, Any], message: str) -> None:
    person(world)
    with pytest.raises(batches.Refused, match=message) as refused:
        draft(world, **{"template": "Hello {{ client.name }}", **more})
    assert refused.value.status == 400
    assert world.quinn("SELECT count(*) FROM outreach_batches") == [(0,)]


# --- the approval -------------------------------------------------------------------------------------


def test_approved_batch_is_sent(world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str) -> None:
    for name in ("Ana", "Bo"):
        person(world, name)
    made = draft(world)
    assert send(world, made).status == "sending"
    assert send(world, made).status == "sending", "a double click does no harm"
    for _ in range(2):
        dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)
    queued = [body for (body,) in world.icloud("SELECT body FROM icloud.send_queue ORDER BY body")]
    assert queued == ["Hello Ana", "Hello Bo"]


def test_other_digest_or_number_is_refused(world: TestData) -> None:
    person(world)
    made = draft(world)
    with pytest.raises(batches.Refused, match="its digest is") as refused:
        composing.send(world.databases.quinn, made.id, "0" * 64, 1)
    assert refused.value.status == 409
    with pytest.raises(batches.Refused, match="it has 1 recipient, not 2"):
        send(world, made, recipients=2)
    assert composing.show(world.databases.quinn, made.id).status == "draft"


def test_changed_message_is_refused(world: TestData) -> None:
    person(world)
    made = draft(world)
    world.quinn("UPDATE outreach_batch_items SET rendered_body = 'Bye'")
    with pytest.raises(batches.Refused, match="changed since the draft"):
        send(world, made)


@pytest.mark.parametrize("status", ["paused", "cancelled"])
def test_only_a_draft_is_sent(world: TestData, status: str) -> None:
    person(world)
    made = draft(world)
    world.quinn("UPDATE outreach_batches SET status = %(status)s, approved_at = now()", status=status)
    with pytest.raises(batches.Refused, match=f"the batch is {status}: only a draft can be sent") as refused:
        send(world, made)
    assert refused.value.status == 409


def test_same_send_again_is_harmless_when_the_batch_is_finished(world: TestData) -> None:
    person(world)
    made = draft(world)
    send(world, made)
    world.quinn("UPDATE outreach_batch_items SET status = 'skipped'")
    world.quinn("UPDATE outreach_batches SET status = 'sent'")
    assert send(world, made).status == "sent"


def test_lapsed_approval_needs_the_digest_again(world: TestData) -> None:
    person(world)
    made = draft(world)
    send(world, made)
    world.quinn("UPDATE outreach_batches SET status = 'paused', pause_reason = 'approval lapsed', approved_at = %(at)s",
                at=ago(days=8))  # fmt: skip
    with pytest.raises(batches.Refused, match="send it with its digest"):
        batches.resume(world.databases.quinn, made.id)
    assert send(world, made).status == "sending"
    assert world.quinn("SELECT approved_at > now() - interval '1 minute', pause_reason FROM outreach_batches") == [
        (True, None)
    ]


def raised_days(world: TestData) -> None:
    world.quinn("UPDATE outreach_batches SET status = 'paused', pause_reason = 'approval lapsed'")
    world.settings(approval_days=100)


def never_approved(world: TestData) -> None:
    world.quinn("UPDATE outreach_batches SET status = 'paused', approved_at = NULL")


def set_to_sending_by_hand(world: TestData) -> None:
    world.quinn("UPDATE outreach_batches SET status = 'sending', approved_at = NULL")


def lapsed_before_a_tick(world: TestData) -> None:
    world.quinn("UPDATE outreach_batches SET approved_at = %(at)s", at=ago(days=8))


@pytest.mark.parametrize(
    "change",
    [raised_days, never_approved, set_to_sending_by_hand, lapsed_before_a_tick],
    ids=lambda each: each.__name__,
)
def test_batch_without_an_approval_is_started_by_send_alone(
    world: TestData, change: Callable[[TestData], None], mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    person(world)
    made = draft(world)
    send(world, made)
    change(world)
    with contextlib.suppress(batches.Refused):
        assert batches.resume(world.databases.quinn, made.id).status == "sending"
        assert change in (set_to_sending_by_hand, lapsed_before_a_tick), "it was not paused"
    with pytest.raises(batches.Refused, match="it has 1 recipient, not 2"):
        send(world, made, recipients=2)
    assert send(world, made).status == "sending"
    assert world.quinn("SELECT approved_at > now() - interval '1 minute' FROM outreach_batches") == [(True,)]
    assert dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)["queued"] == 1


def test_repeated_send_must_ask_for_the_same(world: TestData) -> None:
    for _ in range(3):
        person(world)
    made = draft(world)
    send(world, made, first_n=2)
    world.quinn("UPDATE outreach_batch_items SET status = 'sent', sent_at = now() WHERE id = "
                "(SELECT id FROM outreach_batch_items LIMIT 1)")  # fmt: skip
    assert send(world, made, first_n=2).status == "sending"
    with pytest.raises(batches.Refused, match="it has 2 recipients, not 4"):
        send(world, made, recipients=4)
    with pytest.raises(batches.Refused, match="being sent already, until 2 are sent"):
        send(world, made, first_n=1)


def test_batch_past_its_time_is_not_sent(world: TestData) -> None:
    person(world)
    made = draft(world, send_until=ago(hours=1))
    with pytest.raises(batches.Refused, match=r"it could be sent until .* UTC: make a new draft") as refused:
        send(world, made)
    assert refused.value.status == 409
    assert composing.show(world.databases.quinn, made.id).status == "draft"


def test_test_message_goes_to_the_owner_alone(world: TestData, device_id: str) -> None:
    person(world, "Ana")
    made = draft(world)
    databases = world.databases
    row_id = composing.send_test(databases.quinn, databases.icloud, made.id, "+1 415 555 0777")
    columns = "to_handle, body, handle_key, valid_until - created_at, drafted_at, device_id"
    assert world.row_columns(row_id, columns) == (
        "+14155550777", "Hello Ana", "+14155550777", timedelta(minutes=10), None, device_id,
    )  # fmt: skip
    opt_out(world, "+14155550777")
    with pytest.raises(batches.Refused, match="has opted out") as refused:
        composing.send_test(databases.quinn, databases.icloud, made.id, "+14155550777")
    assert refused.value.status == 422
    with pytest.raises(batches.Refused, match="no handle that can be read"):
        composing.send_test(databases.quinn, databases.icloud, made.id, "me")


# --- pause, resume, cancel ----------------------------------------------------------------------------


def test_pause_takes_back_what_waits(world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str) -> None:
    for number in range(3):
        person(world, f"Person {number}")
    made = draft(world)
    send(world, made)
    quinn, icloud = world.databases.quinn, world.databases.icloud
    for _ in range(3):
        dispatcher.dispatch(quinn, icloud, mac_sync)
    world.icloud("UPDATE icloud.send_queue SET collected_at = now() WHERE body = 'Hello Person 1'")
    assert batches.pause(quinn, icloud, made.id) == ("paused", 2, 1)
    assert batches.pause(quinn, icloud, made.id) == ("paused", 0, 1)
    assert batches.resume(quinn, made.id).status == "sending"
    assert batches.cancel(quinn, icloud, made.id).status == "cancelled"
    with pytest.raises(batches.Refused, match="only a paused batch can be resumed"):
        batches.resume(quinn, made.id)
    with pytest.raises(batches.Refused, match="only a batch that is being sent can be paused"):
        batches.pause(quinn, icloud, made.id)


def test_draft_cannot_be_resumed_or_paused(world: TestData) -> None:
    person(world)
    made = draft(world)
    quinn, icloud = world.databases.quinn, world.databases.icloud
    with pytest.raises(batches.Refused, match="a draft is started with send"):
        batches.resume(quinn, made.id)
    with pytest.raises(batches.Refused, match="the batch is draft"):
        batches.pause(quinn, icloud, made.id)


@pytest.mark.parametrize("verb", [batches.pause, batches.cancel])
def test_unknown_batch_is_refused(world: TestData, verb: Callable[..., Any]) -> None:
    with pytest.raises(batches.Refused, match="there is no batch") as refused:
        verb(world.databases.quinn, world.databases.icloud, str(BATCH))
    assert refused.value.status == 404


# --- lists --------------------------------------------------------------------------------------------


def test_lists_have_pages(world: TestData) -> None:
    ids = [world.batch(clients=2) for _ in range(5)]
    quinn = world.databases.quinn
    page = composing.list_batches(quinn, limit=3)
    rest = composing.list_batches(quinn, page.after, limit=3)
    assert {entry.id for entry in page.entries + rest.entries} == set(ids)
    assert (len(page.entries), len(rest.entries), rest.after) == (3, 2, None)
    assert page.entries[0].counts.pending == 2
    items = composing.list_items(quinn, ids[0], limit=1)
    more = composing.list_items(quinn, ids[0], after=items.after, limit=1)
    assert items.entries[0].id != more.entries[0].id
    assert more.after is None
    assert composing.list_items(quinn, ids[0], status="sent").entries == []
