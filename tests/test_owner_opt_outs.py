"""Check the opt-outs that the owner records, ends, lists, imports and assigns. test_opt_outs.py has the replies."""

import contextlib
import csv
import io
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from helpers import LOCK_WAITS, ago, enqueue, enqueued, run_sql, status_of, tick
from testing import DeviceClient, TestData, wait_until

import contacts
import db
import dispatcher
import opt_outs

HANDLE = "+14155550123"
FIRST, SECOND = "2026-04-22T12:00:00.25Z", "2026-04-22T13:00:00Z"


def active(world: TestData) -> list[tuple[str, str]]:
    """Return the active opt-outs: key and source."""
    return world.icloud("SELECT handle_key, source FROM icloud.opt_outs WHERE ended_at IS NULL ORDER BY 1")


def record(world: TestData, handle: str = HANDLE, word: str | None = None) -> opt_outs.Recorded:
    return opt_outs.record(world.databases.quinn, world.databases.icloud, handle, word)


def end(world: TestData, handle: str = HANDLE) -> bool:
    return opt_outs.end(world.databases.icloud, handle)


def assign(world: TestData, handle: str, client_id: str) -> bool:
    return opt_outs.assign(world.databases.quinn, world.databases.icloud, handle, client_id)


def client_with(world: TestData, *handles: str) -> str:
    """Insert a client whose first handle is the primary one."""
    client_id = world.client(handles[0])
    for handle in handles[1:]:
        world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, %(handle)s)", id=client_id, handle=handle)
    return client_id


# --- recording --------------------------------------------------------------------------------------------------------


def test_owner_records_an_opt_out_in_his_own_words(world: TestData) -> None:
    received_at = datetime(2026, 4, 22, 12, 0, tzinfo=UTC)
    recorded = opt_outs.record(
        world.databases.quinn, world.databases.icloud, " +1 (415) 555-0123 ", "said so\0 on the phone", received_at
    )
    assert recorded == (HANDLE, True, True)
    [row] = opt_outs.page(world.databases.icloud)
    assert row[1:6] == (HANDLE, "said so\ufffd on the phone", "owner", None, received_at)
    assert (row.ended_at, row.ended_by) == (None, None)


def test_recording_again_changes_nothing(world: TestData) -> None:
    record(world, word="once")
    before = world.icloud("SELECT * FROM icloud.opt_outs")
    assert record(world, "+1 (415) 555-0123", "twice") == (HANDLE, False, True)
    assert world.icloud("SELECT * FROM icloud.opt_outs") == before


def test_what_waits_for_the_person_is_not_collected_any_more(
    world: TestData, mini: DeviceClient, device_id: str, base_url: str
) -> None:
    """Also what waits for another handle of the same client."""
    client_with(world, "jane@example.com", "(415) 555 0123", "+1 415 555 0123")
    waiting, other, collected, stranger = (
        enqueued(base_url, device_id, str(uuid.uuid4()), toHandle=handle)
        for handle in (HANDLE, "Jane@Example.com", HANDLE, "+14155550199")
    )
    collect_id = str(uuid.uuid4())
    assert mini.collect(collected, collect_id).status_code == 200
    record(world)
    assert [mini.collect(row_id).json()["data"]["reason"] for row_id in (waiting, other)] == ["gone"] * 2
    assert mini.collect(collected, collect_id).json()["data"]["reason"] == "late"
    assert mini.collect(stranger).status_code == 200
    assert enqueue(base_url, device_id, str(uuid.uuid4())).status_code == 422


def test_number_that_messages_cannot_read_is_recorded_and_said(world: TestData) -> None:
    assert record(world, "0170 123-4567") == ("01701234567", True, False)
    assert active(world) == [("01701234567", "owner")]


@pytest.mark.parametrize("handle", ["", "call me", "12", "jane@", "a\0@b.de"])
def test_what_is_no_handle_is_refused(world: TestData, handle: str) -> None:
    with pytest.raises(opt_outs.OptOutError, match="neither a phone number nor an e-mail address"):
        record(world, handle)
    assert active(world) == []


def test_owner_record_replaces_a_reply_so_that_start_does_not_end_it(world: TestData, mini: DeviceClient) -> None:
    mini.opt_out(at=FIRST)
    assert record(world).is_new is False
    assert active(world) == [(HANDLE, "owner")]
    mini.opt_out(word="START", at=SECOND)
    mini.opt_out(at=FIRST)  # the Mac's daily repetition
    assert active(world) == [(HANDLE, "owner")]
    ended = world.icloud("SELECT source, ended_by FROM icloud.opt_outs WHERE ended_at IS NOT NULL")
    assert ended == [("reply", "the owner recorded another")]


@pytest.mark.parametrize("source", ["owner", "reply"])
def test_opt_out_that_is_recorded_meanwhile_leaves_one_active(world: TestData, source: str) -> None:
    insert = """
        INSERT INTO icloud.opt_outs (handle_key, source, word, received_at) VALUES (%(key)s, %(source)s, 'STOP', now())
    """
    with contextlib.closing(db.connect(world.databases.icloud_url)) as rival, ThreadPoolExecutor() as threads:
        rival.autocommit = False
        db.query(rival, insert, {"key": HANDLE, "source": source})
        recorded = threads.submit(record, world)
        with contextlib.closing(db.connect(world.databases.icloud_url)) as watcher:
            wait_until(lambda: db.query(watcher, LOCK_WAITS))
        rival.commit()
        assert recorded.result(10) == (HANDLE, False, True)
    assert active(world) == [(HANDLE, "owner")]


def test_date_in_the_future_is_refused(world: TestData) -> None:
    with pytest.raises(opt_outs.OptOutError, match="in the future"):
        opt_outs.record(world.databases.quinn, world.databases.icloud, HANDLE, None, ago(minutes=-5))
    assert active(world) == []


# --- taking back ------------------------------------------------------------------------------------------------------


def test_owner_ends_any_opt_out_and_repetitions_do_not_undo_it(world: TestData, mini: DeviceClient) -> None:
    mini.opt_out(at=FIRST)
    assert end(world, "+1 415 555 0123") is True
    assert end(world) is False
    mini.opt_out(at=FIRST)
    assert active(world) == []
    record(world)
    assert end(world) is True
    assert world.icloud("SELECT DISTINCT ended_by FROM icloud.opt_outs") == [("owner",)]


def test_other_opt_outs_of_the_person_are_named(world: TestData) -> None:
    client_with(world, HANDLE, "Jane@Example.com", "other@example.com")
    for handle in (HANDLE, "jane@example.com", "+14155550199"):
        record(world, handle)
    end(world)
    others = opt_outs.others_of_person(world.databases.quinn, world.databases.icloud, HANDLE)
    assert others == ["jane@example.com"]
    assert opt_outs.others_of_person(world.databases.quinn, world.databases.icloud, "+14155550199") == []


# --- the list ---------------------------------------------------------------------------------------------------------


def test_pages_have_each_opt_out_once_newest_first(world: TestData) -> None:
    """All of an import have the same time."""
    entries = [opt_outs.Entry(number, f"+1415555{number:04}") for number in range(250)]
    opt_outs.import_list(world.databases.quinn, world.databases.icloud, entries)
    record(world, "newest@example.com")
    end(world, "+14155550007")
    seen: list[opt_outs.OptOut] = []
    while found := opt_outs.page(world.databases.icloud, seen[-1].id if seen else None, 100):
        seen += found
    assert [one.handle_key for one in seen[:1]] == ["newest@example.com"]
    assert len({one.id for one in seen}) == len(seen) == 251
    assert len(opt_outs.page(world.databases.icloud, limit=1000, active_only=True)) == 250
    with pytest.raises(opt_outs.OptOutError, match="no opt-out's id"):
        opt_outs.page(world.databases.icloud, "' OR true")


def test_csv_has_the_whole_record(world: TestData, mini: DeviceClient) -> None:
    mini.opt_out(at=FIRST)
    end(world)
    record(world, "jane@example.com", '=HYPERLINK("http://example.com"), she said')
    file = io.StringIO()
    assert opt_outs.write_csv(world.databases.icloud, file) == 2
    file.seek(0)
    owner, reply = csv.DictReader(file)
    assert (owner["handle_key"], owner["source"], owner["ended_at"]) == ("jane@example.com", "owner", "")
    assert owner["word"] == '\'=HYPERLINK("http://example.com"), she said', "a spreadsheet does not run it"
    assert (reply["handle_key"], reply["device"], reply["word"]) == (HANDLE, "mac-mini", "STOP")
    assert (reply["received_at"], reply["ended_by"]) == ("2026-04-22T12:00:00Z", "owner")


def test_list_is_imported_line_by_line(world: TestData, mini: DeviceClient) -> None:
    record(world, "known@example.com")
    mini.opt_out("+14155550101", at=FIRST)
    entries = [
        opt_outs.Entry(1, "handle"),
        opt_outs.Entry(2, " +1 415 555 0100 ", "wrote a letter"),
        opt_outs.Entry(3, "known@example.com"),
        opt_outs.Entry(4, "+14155550101"),
        opt_outs.Entry(5, ""),
        opt_outs.Entry(6, "+1 (415) 555-0100", "again"),
    ]
    imported = opt_outs.import_list(world.databases.quinn, world.databases.icloud, entries)
    assert imported == (1, 2, [(1, "handle"), (5, "")])
    assert active(world) == [("+14155550100", "import"), ("+14155550101", "import"), ("known@example.com", "owner")]
    again = opt_outs.import_list(world.databases.quinn, world.databases.icloud, entries)
    assert again == (0, 3, [(1, "handle"), (5, "")])
    assert world.icloud("SELECT count(*) FROM icloud.opt_outs") == [(4,)]


# --- whose handle it is -----------------------------------------------------------------------------------------------


def test_opt_out_from_an_unknown_address_is_shown_and_counts_once_it_is_assigned(
    world: TestData, mini: DeviceClient, mac_sync: dispatcher.SendQueueClient, device_id: str, base_url: str
) -> None:
    client_id = client_with(world, "+1 (415) 555-0123")
    waiting = enqueued(base_url, device_id, str(uuid.uuid4()), toHandle=HANDLE)
    client_with(world, "+14155550102", "KNOWN@example.com")
    for handle in ("jane@example.com", "known@example.com"):
        mini.opt_out(handle, at=FIRST)
    quinn, icloud = world.databases.quinn, world.databases.icloud
    assert [one.handle_key for one in opt_outs.unassigned(quinn, icloud)] == ["jane@example.com"]
    assert assign(world, "jane@example.com", client_id) is True
    assert assign(world, "Jane@Example.com", client_id) is False
    assert opt_outs.unassigned(quinn, icloud) == []
    assert mini.collect(waiting).json()["data"]["reason"] == "gone"
    item_id = world.item(world.batch(), client_id)
    tick(world, mac_sync)
    assert status_of(world, item_id) == ("skipped", "opted out")
    contacts = world.quinn(
        "SELECT handle, is_primary FROM contact_relationships WHERE client_id = %(id)s", id=client_id
    )
    assert sorted(contacts) == [("+1 (415) 555-0123", True), ("jane@example.com", False)]


def test_handle_is_assigned_to_a_known_client_only(world: TestData) -> None:
    for client_id in (str(uuid.uuid4()), "nobody"):
        with pytest.raises(opt_outs.OptOutError, match=f"there is no client {client_id}"):
            assign(world, "jane@example.com", client_id)
    with pytest.raises(opt_outs.OptOutError, match="neither"):
        assign(world, "jane", world.client())


def test_platform_table_that_refuses_the_row_is_named(world: TestData) -> None:
    client_id = world.client()
    run_sql(world.databases.quinn_url, "ALTER TABLE contact_relationships ADD kind TEXT NOT NULL DEFAULT ''")
    run_sql(world.databases.quinn_url, "ALTER TABLE contact_relationships ALTER kind DROP DEFAULT")
    with pytest.raises(opt_outs.OptOutError, match="contact_relationships refuses the row"):
        assign(world, "jane@example.com", client_id)


# --- the clients of a handle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "key"),
    [
        ("+1 (415) 555-0123", HANDLE), ("+1.415.555.0123", HANDLE), ("+52 1 55 1234 5678", "+525512345678"),
        ("+54 9 11 1234-5678", "+541112345678"), ("  JANE@Example.com\t", "jane@example.com"),
        ("JÄNE@EXAMPLE.COM", "jäne@example.com"), ("0170 / 1234567", "01701234567"), ("12345", "12345"),
    ],
)  # fmt: skip
def test_clients_of_a_handle_are_found_however_it_is_written(world: TestData, stored: str, key: str) -> None:
    client_id = client_with(world, stored, "second@example.com")
    client_with(world, "+1 212 555 0123", "jane@example.org")
    found = contacts.of_handles(world.databases.quinn, [key])
    assert [(contact.client_id, contact.handle) for contact in found] == [
        (client_id, stored),
        (client_id, "second@example.com"),
    ]
    assert [contact.is_primary for contact in found] == [True, False]
    assert contacts.of_handles(world.databases.quinn, []) == []


def test_no_log_line_has_a_handle(world: TestData, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    client_id = world.client("jane@example.com")
    record(world)
    record(world, "jane@example.com", "a word of hers")
    entries = [opt_outs.Entry(1, "ann@example.com"), opt_outs.Entry(2, "bad")]
    opt_outs.import_list(world.databases.quinn, world.databases.icloud, entries)
    assign(world, HANDLE, client_id)
    end(world)
    assert "opt-out recorded source=owner to=+1415•••23 new=True" in caplog.text
    assert "opt-in recorded source=owner from=+1415•••23 ended=True" in caplog.text
    assert not [secret for secret in (HANDLE, "jane", "ann@", "hers") if secret in caplog.text]
