"""Check what is shown of a person, forgotten on demand, and erased when it is old; and what must stay."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers import LOCK_WAITS, ago, plan_nodes, queue_row, run_sql, status_of, sync, tick
from testing import DeviceClient, TestData, wait_until

import batches
import db
import dispatcher
import opt_outs
import personal_data

HANDLE = "+14155550123"
OLD: dict[str, Any] = {"updated_at": ago(days=40)}


def erase_old(world: TestData) -> personal_data.Erased:
    return personal_data.erase_old(world.databases.quinn, world.databases.icloud)


def forget(world: TestData, handle: str = HANDLE) -> personal_data.Forgotten:
    return personal_data.forget(world.databases.quinn, world.databases.icloud, handle)


def show(world: TestData, handle: str = HANDLE) -> dict[str, Any]:
    return personal_data.show_person(world.databases.quinn, world.databases.icloud, handle)


def old_item(world: TestData, batch_id: str, **columns: Any) -> str:
    """Insert an item that ended 40 days ago."""
    sent = {"status": "sent", "sent_at": ago(days=40), "handle_key": HANDLE}
    return world.item(batch_id, world.client(), **{**sent, **OLD, **columns})


def old_row(world: TestData, device_id: str, item_id: str | None = None, **columns: Any) -> str:
    sent = {"status": "sent", "sent_at": ago(days=40), "collected_at": ago(days=40), "handle_key": HANDLE}
    return queue_row(world, item_id, device_id, **{**sent, **OLD, **columns})


def item_texts(world: TestData, item_id: str) -> tuple[Any, ...]:
    sql = "SELECT rendered_body, handle_key, failure_reason, status FROM outreach_batch_items WHERE id = %(id)s"
    return tuple(world.quinn(sql, id=item_id)[0])


def row_texts(world: TestData, row_id: str) -> tuple[Any, ...]:
    sql = "SELECT body, to_handle, handle_key, failure_reason FROM icloud.send_queue WHERE id = %(id)s"
    return tuple(world.icloud(sql, id=row_id)[0])


# --- what is old ------------------------------------------------------------------------------------------------------


def test_without_keep_bodies_days_nothing_is_erased(world: TestData, device_id: str) -> None:
    item_id = old_item(world, world.batch())
    old_row(world, device_id, item_id)
    assert erase_old(world) == (0, 0, 0)
    assert item_texts(world, item_id) == ("Hello!", HANDLE, None, "sent")


def test_what_ended_longer_ago_loses_its_text_and_handle_in_both_databases(world: TestData, device_id: str) -> None:
    world.settings(keep_bodies_days=30)
    batch_id = world.batch()
    sent = old_item(world, batch_id)
    failed = old_item(
        world, batch_id, status="failed", sent_at=None, handle_key=None, failure_reason=f"{HANDLE} is bad"
    )
    recent = old_item(world, batch_id, updated_at=ago(days=29), handle_key="recent")
    rows = [
        old_row(world, device_id, sent),
        old_row(world, device_id, to_handle="by.hand@example.com", handle_key=None),
    ]
    bad = old_row(world, device_id, failed, status="failed", sent_at=None, failure_reason=f"{HANDLE} is bad")
    assert erase_old(world) == (2, 3, 0)
    assert item_texts(world, sent) == ("", None, None, "sent")
    assert item_texts(world, failed) == ("", None, "erased", "failed")
    assert item_texts(world, recent) == ("Hello!", "recent", None, "sent")
    assert [row_texts(world, row_id) for row_id in rows] == [("", "", None, None)] * 2
    assert row_texts(world, bad) == ("", "", None, "erased")
    assert world.icloud("SELECT count(*) FROM icloud.send_queue WHERE updated_at > now() - interval '39 days'") == [
        (0,)
    ]
    assert erase_old(world) == (0, 0, 0)


def test_nothing_unfinished_is_erased(world: TestData, device_id: str) -> None:
    """Old as it is: a draft, a paused batch, a message in flight, and a result that no item has yet."""
    world.settings(keep_bodies_days=30)
    for status in ("draft", "paused", "sending"):
        world.item(world.batch(status=status, updated_at=ago(days=90)), **OLD)
    flying = world.item(world.batch(), status="queued", queued_at=ago(days=40), **OLD)
    claimed = world.item(world.batch(), claimed_at=ago(days=40), **OLD)
    old_row(world, device_id, flying)
    old_row(world, device_id, claimed, status="failed", sent_at=None, failure_reason="the number does not exist")
    waiting = queue_row(world, None, device_id, **OLD)
    assert erase_old(world) == (0, 0, 0)
    assert world.quinn("SELECT DISTINCT rendered_body FROM outreach_batch_items") == [("Hello!",)]
    assert row_texts(world, waiting)[:2] == ("Hello!", HANDLE)
    assert sync(world)["erased"] == 2, "the sync has read the results, and erases their rows"
    assert status_of(world, claimed) == ("failed", "the number does not exist")


@pytest.mark.parametrize(
    "retry",
    [
        "UPDATE outreach_batch_items SET status = 'pending', failure_reason = NULL",
        "UPDATE outreach_batches SET status = 'sending'",
    ],
)
def test_what_is_retried_at_the_same_moment_is_not_erased(world: TestData, retry: str) -> None:
    """A retry holds the item, or its batch, while the erasure has already chosen it."""
    world.settings(keep_bodies_days=30)
    days = {"items": (40, 1), "batches": (1, 40)}["items" if "items" in retry else "batches"]
    batch_id = world.batch(status="sent", updated_at=ago(days=days[1]), vars='{"code": "SPRING"}')
    item_id = old_item(
        world, batch_id, status="failed", sent_at=None, failure_reason="no", updated_at=ago(days=days[0])
    )
    with contextlib.closing(db.connect(world.databases.quinn_url)) as rival, ThreadPoolExecutor() as threads:
        rival.autocommit = False
        db.query(rival, retry)
        erasing = threads.submit(erase_old, world)
        wait_until(lambda: run_sql(world.databases.quinn_url, LOCK_WAITS))
        rival.commit()
        assert erasing.result(10) == (0, 0, 0)
    assert item_texts(world, item_id)[0] == "Hello!"
    assert world.quinn("SELECT vars FROM outreach_batches") == [({"code": "SPRING"},)]


def test_pending_item_keeps_its_text_when_its_earlier_rows_lose_theirs(world: TestData, device_id: str) -> None:
    world.settings(keep_bodies_days=30)
    item_id = world.item(world.batch(status="paused"), **OLD)
    withdrawn = {"status": "failed", "sent_at": None, "collected_at": None, "withdrawn_at": ago(days=40)}
    row_id = old_row(world, device_id, item_id, **withdrawn)
    assert erase_old(world) == (0, 1, 0)
    assert item_texts(world, item_id)[0] == "Hello!"
    assert row_texts(world, row_id)[0] == ""


def test_a_bounded_number_is_erased_at_once_oldest_first(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal_data, "MAX_MESSAGES", 2)
    world.settings(keep_bodies_days=30)
    batch_id = world.batch(status="sent", updated_at=ago(days=35))
    items = [old_item(world, batch_id, handle_key=None, updated_at=ago(days=days)) for days in (38, 40, 39)]
    assert erase_old(world) == (2, 0, 0)
    assert [item_texts(world, item_id)[0] for item_id in items] == ["Hello!", "", ""]
    assert erase_old(world) == (1, 0, 1), "the batch after its items"


def test_ended_batch_loses_vars_preview_and_the_values_of_its_query(world: TestData) -> None:
    world.settings(keep_bodies_days=30)
    query = {
        "v": 1,
        "where": {
            "all": [{"field": "id", "in": ["7"]}, {"field": "city", "eq": "Lisbon"}, {"field": "sent_count", "gt": 3}]
        },
    }
    columns: dict[str, Any] = {
        "query_json": json.dumps(query),
        "vars": '{"code": "Jane"}',
        "preview": '{"previews": [{"handle": "+14155550123"}]}',
    }
    batch_id = world.batch(status="sent", updated_at=ago(days=31), **columns)
    recent = world.batch(status="sent", **columns)
    assert erase_old(world) == (0, 0, 1)
    sql = "SELECT query_json, vars, preview FROM outreach_batches WHERE id = %(id)s"
    [(kept, variables, preview)] = world.quinn(sql, id=batch_id)
    assert (variables, preview) == ({}, None)
    assert kept["where"]["all"] == [
        {"field": "id", "in": ["erased"]},
        {"field": "city", "eq": "erased"},
        {"field": "sent_count", "gt": 3},
    ]
    assert world.quinn(sql, id=recent)[0][0] == query


def test_cancelled_batch_ends_what_it_has_not_sent(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal_data, "MAX_MESSAGES", 2)
    world.settings(keep_bodies_days=30)
    batch_id = world.batch(3, status="cancelled", updated_at=ago(days=31))
    claimed = world.item(batch_id, claimed_at=ago(1))
    assert [erase_old(world).batches for _ in range(3)] == [0, 1, 0]
    assert world.statuses(batch_id) == ["skipped"] * 3 + ["pending"]
    reasons = world.quinn(
        "SELECT DISTINCT failure_reason, rendered_body FROM outreach_batch_items WHERE erased_at > '-infinity'"
    )
    assert reasons == [("its batch was cancelled", "")]
    assert item_texts(world, claimed)[0] == "Hello!"


def test_erased_item_is_never_sent_again(world: TestData, mac_sync: dispatcher.SendQueueClient, device_id: str) -> None:
    world.settings(keep_bodies_days=30)
    batch_id = world.batch(status="sent")
    erased = old_item(world, batch_id, status="failed", sent_at=None, failure_reason="no", handle_key=None)
    recent = world.item(batch_id, status="failed", failure_reason="no")
    erase_old(world)
    assert batches.retry(world.databases.quinn, batch_id, include_unknown=True) == ("sending", 1, 0)
    tick(world, mac_sync)
    assert [status_of(world, item_id)[0] for item_id in (erased, recent)] == ["failed", "queued"]
    with pytest.raises(Exception, match="outreach_batch_items_erased_has_ended"):
        world.quinn("UPDATE outreach_batch_items SET status = 'pending' WHERE id = %(id)s", id=erased)


def test_fewer_than_eight_days_are_refused(world: TestData) -> None:
    """An unknown outcome may be found out for eight days."""
    with pytest.raises(Exception, match="keep_bodies_days_is_8_or_more"):
        world.settings(keep_bodies_days=7)


def test_eight_days_are_kept_on_a_table_without_that_check(world: TestData) -> None:
    """A platform's table, and one that an earlier version made, may lack it."""
    world.quinn("ALTER TABLE outreach_settings DROP CONSTRAINT outreach_settings_keep_bodies_days_is_8_or_more")
    world.settings(keep_bodies_days=1)
    recent, old = (old_item(world, world.batch(), updated_at=ago(days=days)) for days in (7, 9))
    assert erase_old(world).items == 1
    assert [item_texts(world, item_id)[0] for item_id in (recent, old)] == ["Hello!", ""]


@pytest.mark.parametrize("analyzed", [True, False])
def test_cost_does_not_grow_with_what_was_erased(
    world: TestData, device_id: str, monkeypatch: pytest.MonkeyPatch, analyzed: bool
) -> None:
    world.settings(keep_bodies_days=30)
    batch_id = world.batch()
    client = world.client()
    items = """
        INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, status, sent_at, updated_at, erased_at)
        SELECT %(batch)s, %(client)s, '', 'sent', now() - interval '1 year', now() - interval '1 year', now()
          FROM generate_series(1, 5000)
    """
    rows = """
        INSERT INTO icloud.send_queue (device_id, to_handle, body, status, sent_at, updated_at, erased_at)
        SELECT %(device)s, '', '', 'sent', now() - interval '1 year', now() - interval '1 year', now()
          FROM generate_series(1, 5000)
    """
    world.quinn(items, batch=batch_id, client=client)
    world.icloud(rows, device=device_id)
    old_row(world, device_id, old_item(world, batch_id))
    if analyzed:
        for url in (world.databases.quinn_url, world.databases.icloud_url):
            run_sql(url, "ANALYZE")
    read = []
    query = db.query

    def explain(conn: Any, sql: str, params: Any = None) -> list[db.Row]:
        if "LIMIT %(maximum)s" in sql:
            [(plan,)] = query(conn, "EXPLAIN (ANALYZE, FORMAT JSON) " + sql, params)
            nodes = list(plan_nodes(plan[0]["Plan"]))
            read.append(sum(node["Actual Rows"] + node.get("Rows Removed by Filter", 0) for node in nodes))
        return query(conn, sql, params)

    monkeypatch.setattr(db, "query", explain)
    erase_old(world)
    assert len(read) == 3
    assert max(read) < 20


# --- a person who is forgotten ----------------------------------------------------------------------------------------


@pytest.fixture
def jane(world: TestData) -> str:
    """A client with three handles, one of which she shares with another client."""
    client_id = world.client("+1 (415) 555-0123")
    for handle in ("Jane@Example.com", "family@example.com"):
        world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, %(handle)s)", id=client_id, handle=handle)
    world.quinn("UPDATE clients SET name = 'Jane' WHERE id = %(id)s", id=client_id)
    world.client("FAMILY@example.com")
    return client_id


def test_forgotten_person_is_nowhere_but_in_the_opt_outs(world: TestData, jane: str, device_id: str) -> None:
    ended = world.batch(status="sent", query_json=json.dumps({"where": {"field": "id", "in": [jane]}}))
    sent = world.item(ended, jane, status="sent", sent_at=ago(5), handle_key=HANDLE)
    former = world.item(ended, jane, status="failed", failure_reason="no", handle_key="+14155550188")
    draft = world.batch(
        status="draft",
        preview=json.dumps({
            "previews": [{"clientId": jane, "handle": HANDLE, "body": "Hi Jane"}, {"clientId": "x", "handle": "+1"}],
            "leftOut": [{"reason": "optedOut", "count": 1, "sample": [{"clientId": jane, "name": "Jane"}]}],
        }),
    )  # fmt: skip
    pending = world.item(draft, jane, handle_key=HANDLE)
    rows = [
        old_row(world, device_id, sent),
        queue_row(world, None, device_id, status="failed", to_handle="jane@example.com", body="By hand"),
        old_row(world, device_id, former, handle_key="+14155550188", to_handle="+14155550188"),
    ]
    forgotten = forget(world, "+1 415-555-0123")
    assert forgotten.keys == [HANDLE, "+14155550188", "jane@example.com"]
    assert (forgotten.clients, forgotten.is_deleted, forgotten.in_flight, forgotten.unfinished) == (1, True, 0, [])
    assert forgotten.erased == (3, 3, 2)
    assert item_texts(world, sent) == ("", None, None, "sent")
    assert item_texts(world, pending) == ("", None, "opted out", "skipped")
    assert {row_texts(world, row_id)[:3] for row_id in rows} == {("", "", None)}
    assert world.quinn("SELECT id::text FROM clients WHERE id = %(id)s OR name = 'Jane'", id=jane) == []
    assert world.quinn("SELECT handle FROM contact_relationships WHERE client_id = %(id)s", id=jane) == []
    [(preview,)] = world.quinn("SELECT preview FROM outreach_batches WHERE id = %(id)s", id=draft)
    assert preview == {
        "previews": [{"clientId": "x", "handle": "+1"}],
        "leftOut": [{"reason": "optedOut", "count": 1, "sample": []}],
    }
    for shown in (show(world), show(world, "jane@example.com")):
        assert {name: len(shown[name]) for name in ("clients", "messages", "queue", "batches")} == dict.fromkeys(
            ("clients", "messages", "queue", "batches"), 0
        )
        assert [row["word"] for row in shown["optOuts"]] == [None]


def test_message_to_a_number_that_the_client_has_no_more_is_erased(world: TestData, jane: str, device_id: str) -> None:
    """The item of a batch made by hand names no handle: only the item leads to the row."""
    item_id = world.item(world.batch(), jane, status="sent", sent_at=ago(5))
    row_id = old_row(world, device_id, item_id, to_handle="+14155550177", handle_key="+14155550177")
    assert forget(world).erased == (1, 1, 0)
    assert row_texts(world, row_id)[:3] == ("", "", None)


def test_owners_words_about_an_opt_out_are_erased_and_a_reply_keeps_its_word(
    world: TestData, jane: str, mini: DeviceClient
) -> None:
    opt_outs.record(world.databases.quinn, world.databases.icloud, HANDLE, "her husband called: she is ill")
    mini.opt_out("jane@example.com")
    forget(world)
    assert world.icloud("SELECT handle_key, source, word FROM icloud.opt_outs ORDER BY 1, 2") == [
        (HANDLE, "owner", None),
        ("jane@example.com", "owner", None),
        ("jane@example.com", "reply", "STOP"),
    ]


def test_message_that_waits_is_not_erased_and_not_collected(
    world: TestData, jane: str, mini: DeviceClient, device_id: str
) -> None:
    row_id = queue_row(world, None, device_id, body="By hand", handle_key=HANDLE)
    assert forget(world).erased.rows == 0
    assert row_texts(world, row_id)[:2] == ("By hand", HANDLE)
    assert mini.peek()["items"] == mini.poll() == []


def test_nothing_of_another_client_is_forgotten(world: TestData, jane: str, device_id: str) -> None:
    [(other,)] = world.quinn("SELECT client_id FROM contact_relationships WHERE handle = 'FAMILY@example.com'")
    item_id = world.item(world.batch(), other, status="sent", sent_at=ago(5), handle_key="family@example.com")
    row_id = old_row(world, device_id, item_id, to_handle="family@example.com", handle_key="family@example.com")
    forget(world)
    assert item_texts(world, item_id) == ("Hello!", "family@example.com", None, "sent")
    assert row_texts(world, row_id)[0] == "Hello!"
    assert world.icloud("SELECT handle_key FROM icloud.opt_outs WHERE ended_at IS NULL ORDER BY 1") == [
        (HANDLE,),
        ("jane@example.com",),
    ]


def test_message_in_flight_is_named_and_goes_at_the_next_time(
    world: TestData, jane: str, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    item_id = world.item(world.batch(), jane)
    tick(world, mac_sync)
    [row] = mini.peek()["items"]
    assert mini.collect(row["id"]).status_code == 200
    forgotten = forget(world)
    assert (forgotten.in_flight, forgotten.erased, forgotten.is_deleted) == (1, (0, 0, 0), False)
    assert item_texts(world, item_id)[0] == "Hello!"
    mini.result(row["id"])
    sync(world)
    assert status_of(world, item_id) == ("sent", None)
    again = forget(world)
    assert (again.in_flight, again.erased, again.is_deleted) == (0, (1, 1, 0), True)
    assert item_texts(world, item_id)[0] == "", "only its client led to this item"
    assert row_texts(world, row["id"])[:2] == ("", "")


def test_result_that_no_item_has_yet_is_not_erased(
    world: TestData, jane: str, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    """The row has ended, and the next sync reads why: until then it stays, whether the item is queued or claimed."""
    queued = world.item(world.batch(), jane)
    tick(world, mac_sync)
    [row] = mini.peek()["items"]
    mini.result(row["id"], "failed", error="the number does not exist")
    claimed = world.item(world.batch(), jane, claimed_at=ago(1))
    other = old_row(world, device_id, claimed, status="failed", sent_at=None, failure_reason="not registered")
    forgotten = forget(world)
    assert (forgotten.in_flight, forgotten.erased.rows) == (2, 0)
    assert row_texts(world, row["id"])[0] == row_texts(world, other)[0] == "Hello!"
    sync(world)
    assert status_of(world, queued) == ("failed", "the number does not exist")
    assert status_of(world, claimed) == ("failed", "not registered")
    assert forget(world).erased == (2, 2, 0)


def test_forgotten_person_is_not_written_to_after_the_next_import(
    world: TestData, jane: str, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    forget(world)
    item_id = world.item(world.batch(), world.client("+1 (415) 555-0123"))
    tick(world, mac_sync)
    assert status_of(world, item_id) == ("skipped", "opted out")


def test_unfinished_batch_that_names_the_person_is_named(world: TestData, jane: str) -> None:
    by_id = world.batch(status="paused", query_json=json.dumps({"where": {"field": "id", "eq": jane}}))
    by_handle = world.batch(status="draft", vars='{"contact": "+1 (415) 555-0123"}')
    world.batch(status="draft", query_json=json.dumps({"where": {"field": "city", "eq": "Lisbon"}}))
    forgotten = forget(world)
    assert sorted(forgotten.unfinished) == sorted([by_id, by_handle])
    assert forgotten.is_deleted is False
    world.quinn("UPDATE outreach_batches SET status = 'cancelled'")
    again = forget(world)
    assert (again.unfinished, again.erased.batches, again.is_deleted) == ([], 2, True)
    assert jane not in str(world.quinn("SELECT query_json FROM outreach_batches WHERE id = %(id)s", id=by_id))


def test_numeric_client_id_is_no_other_number(empty_database: str) -> None:
    run_sql(
        empty_database,
        """
        CREATE TABLE clients (id BIGINT PRIMARY KEY, full_name TEXT);
        CREATE TABLE contact_relationships (client_id BIGINT, handle TEXT, is_primary BOOLEAN);
        INSERT INTO clients VALUES (1, 'Jane'), (2, 'Bob');
        INSERT INTO contact_relationships VALUES (1, '+14155550123', true), (2, '+14155550124', true);
        """,
    )
    db.migrate(empty_database, "icloud")
    db.migrate(empty_database, "quinn")
    run_sql(
        empty_database,
        """
        INSERT INTO outreach_batches (status, template, query_json) VALUES
            ('draft', 'a', '{"where": {"field": "visits", "eq": 1}}'),
            ('draft', 'b', '{"where": {"field": "id", "in": [1]}}');
        """,
    )
    conn = db.connect(empty_database)
    shown = personal_data.show_person(conn, conn, HANDLE)
    forgotten = personal_data.forget(conn, conn, HANDLE)
    assert shown["clients"][0]["client"] == {"id": 1, "full_name": "Jane"}
    assert len(forgotten.unfinished) == 1
    db.query(conn, "UPDATE outreach_batches SET status = 'cancelled'")
    again = personal_data.forget(conn, conn, HANDLE)
    assert (again.unfinished, again.is_deleted) == ([], False), "the platform's tables are the platform's"
    assert db.query(conn, "SELECT count(*) FROM clients") == [(2,)]
    conn.close()


def test_what_is_no_handle_is_refused_before_anything_is_erased(world: TestData, jane: str) -> None:
    with pytest.raises(opt_outs.OptOutError, match="neither a phone number"):
        forget(world, "Jane")
    assert len(show(world)["clients"]) == 1


# --- what is stored about a person ------------------------------------------------------------------------------------


def test_person_is_shown_with_everything_that_is_stored(
    world: TestData, jane: str, mini: DeviceClient, device_id: str
) -> None:
    batch_id = world.batch(name="Spring", query_json=json.dumps({"where": {"field": "id", "eq": jane}}))
    world.item(batch_id, jane, status="sent", sent_at=ago(5), handle_key=HANDLE, rendered_body="Hi Jane")
    world.item(batch_id, world.client("+14155550199"), rendered_body="Hi Bob")
    queue_row(world, None, device_id, to_handle="+1 415 555 0123", body="By hand")
    queue_row(world, None, device_id, to_handle="+14155550199", body="To Bob")
    mini.opt_out("jane@example.com")
    shown = show(world, "+1 415 555 0123")
    [client] = shown["clients"]
    assert client["client"]["name"] == "Jane"
    assert client["handles"] == ["+1 (415) 555-0123", "Jane@Example.com", "family@example.com"]
    assert client["timeZones"] == ("America/Los_Angeles",)
    assert [(row["rendered_body"], row["batch"]) for row in shown["messages"]] == [("Hi Jane", "Spring")]
    assert [row["body"] for row in shown["queue"]] == ["By hand"]
    assert [row["word"] for row in shown["optOuts"]] == ["STOP"]
    assert shown["batches"] == [{"id": batch_id, "status": "sending"}]
    assert json.loads(json.dumps(shown))["handle"] == "+1 415 555 0123"
    text = personal_data.as_text(shown)
    assert "rendered_body: Hi Jane" in text
    assert "word: STOP" in text
    assert "Bob" not in text


def test_unknown_person_is_shown_as_nothing(world: TestData) -> None:
    shown = show(world, "nobody@example.com")
    assert personal_data.as_text(shown) == (
        "What is stored about nobody@example.com\n\nclients: 0\n\noptOuts: 0\n\nmessages: 0\n\nqueue: 0\n\n"
        "batches: 0\n\nimports: 0\n"
    )


def test_no_log_line_has_a_handle(world: TestData, jane: str, device_id: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    world.settings(keep_bodies_days=30)
    old_row(world, device_id, old_item(world, world.batch()))
    erase_old(world)
    forget(world)
    assert "old texts erased items=1 rows=1 batches=0" in caplog.text
    assert "person forgotten to=+1415•••23" in caplog.text
    assert not [secret for secret in (HANDLE, "Jane", "example.com", "Hello") if secret in caplog.text]
