"""Opt-outs: POST opt-outs, the end of what waits for the handle, the 422 at enqueue, and whom the dispatcher skips."""

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers import ago, enqueue, enqueued, record_statements, status_of, sync, tick
from testing import DeviceClient, TestData, wait_until

import db
import dispatcher

HANDLE = "+14155550123"
WAITING = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
FIRST, SECOND, THIRD = ("2026-04-22T12:00:00.25Z", "2026-04-22T13:00:00Z", "2026-04-22T14:00:00+00:00")


def active(world: TestData) -> list[str]:
    """The handle keys that have opted out."""
    return [key for (key,) in world.icloud("SELECT handle_key FROM icloud.opt_outs WHERE ended_at IS NULL ORDER BY 1")]


def owner_records(world: TestData, key: str = HANDLE) -> None:
    """What the owner's command does."""
    world.icloud(
        "INSERT INTO icloud.opt_outs (handle_key, word, source) VALUES (%(key)s, 'on the phone', 'owner')", key=key
    )


def owner_ends(world: TestData) -> None:
    world.icloud("UPDATE icloud.opt_outs SET ended_at = now(), ended_by = 'owner' WHERE ended_at IS NULL")


# --- POST opt-outs ------------------------------------------------------------------------------------


def test_a_reply_that_opts_out_is_recorded_with_its_word_and_time(
    world: TestData, mini: DeviceClient, device_id: str
) -> None:
    response = mini.opt_out("+1 (415) 555-0123", " Arrêt! ", FIRST)
    assert (response.status_code, response.json()["data"]) == (200, {"optOuts": 1})
    columns = "handle_key, word, source, device_id, received_at = '2026-04-22 12:00:00.25+00', ended_at"
    assert world.icloud(f"SELECT {columns} FROM icloud.opt_outs") == [(HANDLE, "ARRET", "reply", device_id, True, None)]


def test_the_same_reply_again_changes_nothing(world: TestData, mini: DeviceClient) -> None:
    mini.opt_out(at=FIRST)
    before = world.icloud("SELECT * FROM icloud.opt_outs")
    for _ in range(2):
        assert mini.opt_out("+1 415 555 0123", at=FIRST).json()["data"] == {"optOuts": 1}
    assert world.icloud("SELECT * FROM icloud.opt_outs") == before


def test_a_peek_says_how_many_opt_outs_this_device_has_reported(
    world: TestData, mini: DeviceClient, base_url: str
) -> None:
    world.device("other")
    other = DeviceClient(base_url, "other")
    for count, handle in enumerate((HANDLE, "a@example.com", HANDLE), start=1):
        assert mini.opt_out(handle, at=f"2026-04-22T12:00:0{count}Z").json()["data"] == {"optOuts": count}
    assert mini.opt_out(HANDLE, "START", THIRD).json()["data"] == {"optOuts": 3}, "it counts opt-outs"
    assert (mini.peek()["optOuts"], other.peek()["optOuts"]) == (3, 0)
    world.icloud("TRUNCATE icloud.opt_outs")
    world.icloud("UPDATE icloud.devices SET opt_outs = 0")  # a restore of the database
    assert mini.peek()["optOuts"] == 0


def test_a_second_stop_is_recorded_and_one_of_them_is_active(world: TestData, mini: DeviceClient) -> None:
    for at in (FIRST, SECOND):
        assert mini.opt_out(at=at).status_code == 200
    sql = "SELECT received_at < '2026-04-22 13:00+00', ended_by FROM icloud.opt_outs ORDER BY received_at"
    assert world.icloud(sql) == [(True, None), (False, "another opt-out was active")]


@pytest.mark.parametrize("word", ["START", "unstop."])
def test_start_takes_back_an_older_opt_out(world: TestData, mini: DeviceClient, word: str) -> None:
    mini.opt_out(at=FIRST)
    mini.opt_out(word=word, at=SECOND)
    assert active(world) == []
    assert world.icloud("SELECT ended_by FROM icloud.opt_outs") == [(word.upper().strip("."),)]
    for word_again, at in (("STOP", FIRST), (word, SECOND)):  # the Mac's daily repetition
        mini.opt_out(word=word_again, at=at)
        assert active(world) == []
    mini.opt_out(at=THIRD)
    mini.opt_out(word=word, at=SECOND)
    assert active(world) == [HANDLE], "a later STOP stands"


def test_start_takes_back_no_opt_out_that_is_newer_however_late_it_comes(world: TestData, mini: DeviceClient) -> None:
    mini.opt_out(at=FIRST)
    mini.opt_out(at=THIRD)
    mini.opt_out(word="START", at=SECOND)
    assert active(world) == [HANDLE]
    mini.opt_out(word="START", at=THIRD)
    assert active(world) == [HANDLE], "at the same moment, STOP means stop"


def test_start_never_takes_back_what_the_owner_recorded(world: TestData, mini: DeviceClient) -> None:
    owner_records(world)
    mini.opt_out(at=FIRST)
    mini.opt_out(word="START", at=SECOND)
    assert active(world) == [HANDLE]


def test_the_daily_repetition_never_undoes_an_opt_in_that_the_owner_recorded(
    world: TestData, mini: DeviceClient
) -> None:
    for at in (FIRST, SECOND):
        mini.opt_out(at=at)
    owner_ends(world)
    for at in (FIRST, SECOND):
        mini.opt_out(at=at)
    assert active(world) == []
    mini.opt_out(at=THIRD)
    assert active(world) == [HANDLE], "a new reply counts"


def test_two_macs_that_report_at_once_record_each_reply_once(
    world: TestData, mini: DeviceClient, base_url: str
) -> None:
    world.device("other")
    macs = [mini, DeviceClient(base_url, "other")] * 4
    with ThreadPoolExecutor(8) as threads:
        for at in (FIRST, SECOND):
            responses = list(threads.map(lambda mac: mac.opt_out(at=at), macs))  # noqa: B023  # it runs in this turn
            assert {response.status_code for response in responses} == {200}
    assert active(world) == [HANDLE]
    assert world.icloud("SELECT count(*), (SELECT sum(opt_outs) FROM icloud.devices) FROM icloud.opt_outs") == [(2, 2)]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"handle": "chat123;+;456"}, "handle"), ({"handle": "a\ud800@b.de"}, "handle"), ({"handle": ""}, "handle"),
        ({"handle": None}, "handle"), ({"word": "stop by at 5?"}, "word"), ({"word": ""}, "word"),
        ({"word": "STOP\0"}, "word"), ({"at": "yesterday"}, "receivedAt"), ({"at": None}, "receivedAt"),
        ({"at": "2026-04-22T12:00:00"}, "receivedAt"),
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_right_is_refused_by_name(
    world: TestData, mini: DeviceClient, fields: dict[str, Any], field: str
) -> None:
    response = mini.opt_out(**fields)
    assert response.status_code == 400
    assert field in response.json()["error"]
    assert world.icloud("SELECT * FROM icloud.opt_outs") == []


def test_only_a_device_may_report(world: TestData, base_url: str) -> None:
    assert DeviceClient(base_url, "stranger").opt_out().status_code == 401
    assert DeviceClient(base_url, "stranger").opt_out(word="maybe").status_code == 401
    assert DeviceClient(base_url, "stranger").opt_out(word="START").status_code == 401
    assert world.icloud("SELECT * FROM icloud.opt_outs") == []


# --- what waits for the handle ------------------------------------------------------------------------


def test_nothing_that_waits_for_the_handle_is_handed_out_any_more(
    world: TestData, mini: DeviceClient, device_id: str, base_url: str
) -> None:
    item_ids = [str(uuid.uuid4()) for _ in range(3)]
    waiting, collected, sent = (enqueued(base_url, device_id, item_id) for item_id in item_ids)
    by_hand = world.row(device_id, to_handle="+1 415 555 0123")
    other = world.row(device_id, to_handle="+14155550124")
    collect_id = str(uuid.uuid4())
    assert mini.collect(collected, collect_id).status_code == 200
    mini.result(sent)
    mini.opt_out("+1 (415) 555-0123")
    assert [item["id"] for item in mini.peek()["items"]] == [collected, other]
    assert [mini.collect(row_id).json()["data"]["reason"] for row_id in (waiting, by_hand)] == ["gone"] * 2
    assert mini.collect(collected, collect_id).json()["data"]["reason"] == "late"
    assert [item["id"] for item in mini.poll()] == [collected, other]
    assert world.row_columns(sent, "valid_until") is None
    for row_id in (waiting, by_hand):
        assert world.row_columns(row_id, "collected_at") is None


def test_a_poll_that_meets_an_opt_out_hands_nothing_over(world: TestData, mini: DeviceClient, device_id: str) -> None:
    row_id = world.row(device_id, handle_key=HANDLE)
    with contextlib.closing(db.connect(world.databases.icloud_url)) as rival, ThreadPoolExecutor() as threads:
        rival.autocommit = False
        db.query(rival, "UPDATE icloud.send_queue SET valid_until = '-infinity'")  # its second statement
        polled = threads.submit(mini.poll)
        wait_until(lambda: world.icloud(WAITING))
        rival.commit()
        assert polled.result(10) == []
    assert world.row_columns(row_id, "collected_at") is None


def test_a_message_that_is_enqueued_while_its_handle_opts_out_is_not_handed_out(
    world: TestData, mini: DeviceClient, device_id: str
) -> None:
    """The opt-out does not see the row, which is not committed; a collect sees both."""
    with contextlib.closing(db.connect(world.databases.icloud_url)) as rival:
        rival.autocommit = False
        insert = """
            INSERT INTO icloud.send_queue (device_id, to_handle, body, handle_key)
            VALUES (%(device)s, %(handle)s, 'Hello!', %(handle)s) RETURNING id
        """
        [(row_id,)] = db.query(rival, insert, {"device": device_id, "handle": HANDLE})
        assert mini.opt_out().status_code == 200
        rival.commit()
    assert mini.peek()["items"] == mini.poll() == []
    assert mini.collect(row_id).json()["data"]["reason"] == "gone"


# --- enqueue ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [HANDLE, "+1 (415) 555-0123", "a@Example.COM"])
def test_a_message_to_a_handle_that_opted_out_is_a_422_until_it_opts_in(
    world: TestData, mini: DeviceClient, device_id: str, base_url: str, way: str
) -> None:
    item_id, handle = str(uuid.uuid4()), "A@example.com" if "@" in way else HANDLE
    mini.opt_out(handle, at=FIRST)
    response = enqueue(base_url, device_id, item_id, toHandle=way)
    assert response.status_code == 422
    assert "opted out" in response.json()["error"]
    assert world.icloud("SELECT * FROM icloud.send_queue") == []
    mini.opt_out(handle, "START", SECOND)
    enqueued(base_url, device_id, item_id, toHandle=way)


def test_a_message_that_is_in_the_queue_or_was_sent_is_no_422(
    world: TestData, mini: DeviceClient, device_id: str, base_url: str
) -> None:
    """The dispatcher asks again after a lost response: what was sent must not look like skipped."""
    for end in ("status = 'queued'", "status = 'sent', sent_at = now()", "status = 'failed', collected_at = now()"):
        item_id = str(uuid.uuid4())
        row_id = enqueued(base_url, device_id, item_id, attempt=1)
        world.set_row(row_id, end)
        mini.opt_out()
        assert enqueued(base_url, device_id, item_id, attempt=1) == row_id
        owner_ends(world)


# --- the dispatcher -----------------------------------------------------------------------------------


def client_with(world: TestData, *handles: str) -> str:
    """A client whose first handle is the primary one."""
    client_id = world.client(handles[0])
    for handle in handles[1:]:
        world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, %(handle)s)", id=client_id, handle=handle)
    return client_id


def test_who_opted_out_by_any_handle_is_skipped_and_the_next_one_written_to_in_the_same_turn(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    mini.opt_out("+14155550101")
    mini.opt_out("Jane@Example.com")
    clients = [
        client_with(world, "+1 415 555 0101"),
        client_with(world, "+14155550102", "jane@example.com"),
        world.client(handle=None),
        client_with(world, "+14155550103", "other@example.com"),
        client_with(world, "+14155550104"),
    ]
    batch_id = world.batch(clients)
    assert tick(world, mac_sync) == {"skipped": 3, "queued": 1}
    assert world.statuses(batch_id) == ["skipped"] * 3 + ["queued", "pending"]
    reasons = world.quinn(
        "SELECT failure_reason FROM outreach_batch_items WHERE status = 'skipped' ORDER BY created_at, id"
    )
    assert [reason for (reason,) in reasons] == ["opted out", "opted out", "no primary handle found"]
    assert mini.peek()["items"][0]["toHandle"] == "+14155550103"


def test_an_opt_out_while_a_claim_waited_is_seen(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    client_id = client_with(world, HANDLE)
    item_id = world.item(world.batch(), client_id, claimed_at=ago(60))
    mini.opt_out("added.later@example.com")
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, 'added.later@example.com')", id=client_id)
    assert +tick(world, mac_sync) == {"skipped": 1}
    assert status_of(world, item_id) == ("skipped", "opted out")
    assert world.icloud("SELECT * FROM icloud.send_queue") == []


def test_an_opt_out_of_another_handle_during_a_tick_is_seen_before_the_next_request(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        world.batch([client_with(world, f"+1415555010{number}", f"other{number}@example.com")])
    enqueue = dispatcher.enqueue_item

    def meanwhile(*arguments: Any) -> tuple[str, bool]:
        for number in (1, 2):
            mini.opt_out(f"other{number}@example.com")
        return enqueue(*arguments)

    monkeypatch.setattr(dispatcher, "enqueue_item", meanwhile)
    assert +tick(world, mac_sync) == {"skipped": 1, "queued": 1}
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]


def test_an_opt_out_between_the_look_and_the_request_is_a_422_and_a_skip(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    item_id = world.item(world.batch(), world.client(HANDLE))
    wanted = dispatcher.is_wanted

    def meanwhile(quinn: Any, item: dispatcher.Item) -> bool:
        mini.opt_out()
        return wanted(quinn, item)

    monkeypatch.setattr(dispatcher, "is_wanted", meanwhile)
    assert +tick(world, mac_sync) == {"skipped": 1}
    assert status_of(world, item_id) == ("skipped", "opted out")


def test_an_item_whose_message_an_opt_out_stopped_is_skipped(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    item_id = world.item(world.batch(), world.client(HANDLE))
    tick(world, mac_sync)
    mini.opt_out()
    assert sync(world)["withdrawn"] == 1
    assert status_of(world, item_id) == ("pending", None)
    assert +tick(world, mac_sync) == {"skipped": 1}
    assert status_of(world, item_id) == ("skipped", "opted out")


def test_an_opt_out_by_another_handle_withdraws_what_waits_at_the_next_sync(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient
) -> None:
    item_id = world.item(world.batch(), client_with(world, HANDLE, "Jane@Example.com"))
    other_id = world.item(world.batch(), client_with(world, "+14155550199", "joe@example.com"))
    tick(world, mac_sync)
    mini.opt_out("jane@example.com")
    assert sync(world)["withdrawn"] == 1
    assert world.icloud("SELECT failure_reason FROM icloud.send_queue WHERE status = 'failed'") == [
        ("withdrawn: opted out",)
    ]
    assert +tick(world, mac_sync) == {"skipped": 1}
    assert status_of(world, item_id) == ("skipped", "opted out")
    assert status_of(world, other_id)[0] == "queued"


def test_the_work_follows_the_heads_that_are_looked_at(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve people in a row opted out, of a batch of fifty: three looks, whatever the list's length."""
    clients = [client_with(world, f"+1415555{number:04}") for number in range(50)]
    batch_id = world.batch(clients)
    world.batch(clients=1)
    for number in range(12):
        mini.opt_out(f"+1415555{number:04}")
    statements = record_statements(monkeypatch)
    assert tick(world, mac_sync) == {"skipped": 12, "queued": 2}
    asked = [params["keys"] for sql, params in statements if "opt_outs WHERE handle_key = ANY" in sql]
    assert [len(keys) for keys in asked] == [2, 10, 39, 1, 1], (
        "the first batch has one head, then ten, then the rest; then each of the two before its request"
    )
    assert world.statuses(batch_id) == ["skipped"] * 12 + ["queued"] + ["pending"] * 37


def test_no_log_line_has_a_handle(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    world.batch([world.client(HANDLE), world.client("jane@example.com")])
    for handle in (HANDLE, "jane@example.com"):
        mini.opt_out(handle)
    tick(world, mac_sync)
    assert "opt-out or opt-in recorded word='STOP' from=+1415•••23" in caplog.text
    assert not [secret for secret in (HANDLE, "jane", "mac-mini") if secret in caplog.text]
