"""Backups and copies: a server or a journal that has forgotten, two Macs with one token. Sent twice: 0."""

from __future__ import annotations

import copy
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_messages as messages
import mac_sender
import pytest
from mac_world import HANDLE, Killed, World, truth

pytestmark = pytest.mark.mac

HOUR, DAY = 3600, 86_400


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path, poll_seconds=30) as world:
        yield world


def backup(world: World) -> dict[str, Any]:
    names = ("rows", "opt_outs", "opted_out", "instance")
    return copy.deepcopy({name: getattr(world.server, name) for name in names})


def restore(world: World, saved: dict[str, Any]) -> None:
    for name, value in copy.deepcopy(saved).items():
        setattr(world.server, name, value)


def restart_without_journal(world: World, old: Path | None = None) -> None:
    world.journal.close()
    world.journal.path.unlink()
    if old:
        shutil.copy(old, world.journal.path)
    world.start()


ACTS = {
    "sent": (messages.sent(), "sent"),
    "failed": (messages.fails(22), "failed"),
    "no trace": (messages.vanishes(leaves=3), "unknown"),
    "given back": (messages.error("account", -600), "not_started"),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("moment", ["before the collect", "after the collect"])
def test_a_restored_server_gets_the_result_again_and_nothing_is_sent_again(
    world: World, name: str, moment: str
) -> None:
    act, outcome = ACTS[name]
    world.messages.expect(act, times=None)
    item = world.server.enqueue(HANDLE, "Hello")["batchItemId"]
    world.server.requeues = name != "given back"
    saved = backup(world)
    if moment == "after the collect":

        def save(when: str, what: str) -> None:
            if (when, what) == ("after", "POST collect"):
                saved.update(backup(world))

        world.hook = save
    world.run(HOUR)
    before = world.messages.asked()
    restore(world, saved)
    world.run(HOUR)
    assert world.outcome(world.server.row(item)) == outcome
    assert world.messages.asked() == before
    assert truth(world) == []


def test_a_stop_that_comes_while_the_server_is_restored_hides_no_older_one(world: World) -> None:
    """The new one makes the server's count as high as before."""
    saved = backup(world)
    world.messages.receive(HANDLE, "STOP")
    world.run(60)
    restore(world, saved)
    world.messages.receive("+14155550177", "STOP")
    world.run(60)
    assert world.server.opted_out == {HANDLE, "+14155550177"}


def test_a_restored_server_that_enqueues_the_item_anew_gets_the_result(world: World) -> None:
    """Only the platform's database was restored: the item comes again, in a new row."""
    row = world.send("Hello")
    again = world.server.enqueue(HANDLE, "Hello", row["batchItemId"])
    world.settle()
    assert world.outcome(again) == "sent"
    assert len(world.messages.left()) == 1


def test_an_item_that_comes_again_while_its_message_is_undecided_is_not_started_again(world: World) -> None:
    world.messages.expect(messages.fails_then_sms(again=500), times=1)
    row = world.server.enqueue(HANDLE, "Hello")
    world.run(60)
    del world.server.rows[row["id"]]
    again = world.server.enqueue(HANDLE, "Hello", row["batchItemId"])
    world.run(HOUR)
    assert world.outcome(again) == "sent"
    assert len(world.messages.asked()) == 1


def test_a_retry_that_somebody_asked_for_is_sent(world: World) -> None:
    row = world.send("Hello", HANDLE, messages.fails(22))
    world.run(HOUR)
    again = world.server.enqueue(HANDLE, "Hello", row["batchItemId"], attempt=2, draftedAt=row["draftedAt"])
    world.settle()
    assert world.outcome(again) == "sent"
    assert len(world.messages.left()) == 1


def test_a_retry_of_an_unknown_message_that_left_after_all_is_not_sent_again(world: World) -> None:
    """Messages acted three minutes after osascript was killed: the row is no candidate, but the person has the text."""
    row = world.send("Hello", HANDLE, messages.slow(300, messages.sent(after=180)))
    assert world.outcome(row) == "unknown"
    world.run(2 * HOUR)
    again = world.server.enqueue(HANDLE, "Hello", row["batchItemId"], attempt=2, draftedAt=row["draftedAt"])
    world.settle()
    assert world.outcome(again) == "sent"
    assert len(world.messages.left()) == 1


@pytest.mark.parametrize("name", ["sent", "no trace"])
@pytest.mark.parametrize("step", ["before osascript", "after osascript", "before POST result"])
def test_a_lost_journal_sends_nothing_twice(world: World, name: str, step: str) -> None:
    """The sender dies, and its journal is gone: the server says `collected`, and chat.db is asked for the text."""
    act, _ = ACTS[name]
    world.messages.expect(act, times=None)

    def die(moment: str, what: str) -> None:
        if f"{moment} {what}" == step:
            raise Killed

    world.hook = die
    row = world.server.enqueue(HANDLE, "Hello")
    with pytest.raises(Killed):
        world.settle()
    world.hook = lambda moment, what: None
    restart_without_journal(world)
    world.run(2 * HOUR)
    is_shown = name == "sent" and step != "before osascript"
    assert world.outcome(row) == ("sent" if is_shown else "unknown")
    assert row["history"] == [world.outcome(row)]  # chat.db is asked before anything is reported
    assert len(world.messages.asked()) == (step != "before osascript")
    assert truth(world) == []


def test_a_journal_that_disappears_ends_the_process(world: World) -> None:
    """SQLite refuses to write to a file that is not there any more; launchd starts a process with a new one."""
    world.journal.path.unlink()
    world.server.enqueue(HANDLE, "Hello")
    with pytest.raises(sqlite3.OperationalError):
        world.run(60)
    assert world.messages.asked() == []
    world.start()
    world.settle()
    assert len(world.messages.left()) == 1


def test_the_journal_of_yesterday_sends_nothing_twice(world: World) -> None:
    """Time Machine brought it back. What happened today is known to the server and to chat.db."""
    world.send("Yesterday")
    world.run(60)
    old = world.path / "old.db"
    shutil.copy(world.journal.path, old)
    world.run(DAY / 4)
    rows = [world.send(f"Today {number}") for number in range(3)]
    saved = backup(world)
    world.server.enqueue(HANDLE, "At last")

    def die(moment: str, what: str) -> None:
        if (moment, what) == ("after", "osascript"):
            raise Killed

    world.hook = die
    with pytest.raises(Killed):
        world.settle()
    world.hook = lambda moment, what: None
    restart_without_journal(world, old)
    world.settle()
    assert all(world.outcome(row) == "sent" for row in world.server.rows.values())
    assert len(world.messages.left()) == 5
    restore(world, saved)  # and now the server forgets, too
    for row in world.server.rows.values():
        if row["body"].startswith("Today"):
            row.update(status="queued")
    world.run(HOUR)
    assert [world.outcome(world.server.rows[row["id"]]) for row in rows] == ["sent"] * 3
    assert len(world.messages.left()) == 5
    assert truth(world) == []


@pytest.mark.parametrize("is_shown", [True, False])
def test_both_have_forgotten(world: World, is_shown: bool) -> None:
    """The server was restored to before the collect, and the journal is gone. chat.db shows what was sent since."""
    saved_row = world.server.enqueue(HANDLE, "Hello")
    saved = backup(world)
    world.settle()
    restore(world, saved)
    restart_without_journal(world)
    if not is_shown:
        saved_row = world.server.enqueue("+14155550177", "To somebody else")
    world.settle()
    assert world.outcome(world.server.row(saved_row["batchItemId"])) == "sent"
    assert len(world.messages.left()) == 1 + (not is_shown)


def test_two_macs_with_one_token(world: World, tmp_path: Path) -> None:
    """Migration Assistant made a second one: it collects nothing, and says so."""
    world.send("Hello")
    with World(tmp_path / "clone") as clone:
        clone.server.close()
        clone.server = world.server
        clone.set_file("ioreg.txt", '"IOPlatformUUID" = "00000000-0000-0000-0000-000000000000"')
        clone.run(60)
        assert "belongs to another Mac" in clone.problem()
        clone.start(hardware_uuid="00000000-0000-0000-0000-000000000000")
        row = world.server.enqueue(HANDLE, "Next")
        clone.run(60)
        assert "another Mac uses this token" in clone.problem()
        assert clone.messages.asked() == []
        assert row["status"] == "queued"
    world.settle()
    assert world.outcome(row) == "sent"


def test_a_second_mac_stops_at_a_result(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.server.enqueue(HANDLE, "Hello")
    world.run(0.1)
    world.server.instance = "another"
    world.run(600)
    assert "another Mac uses this token" in world.problem()
    assert caplog.text.count("stopped reason") == 1


def test_a_row_that_is_deleted_in_flight_is_nothing_to_report_any_more(world: World) -> None:
    row = world.server.enqueue(HANDLE, "Hello")

    def delete(moment: str, what: str) -> None:
        if what == "osascript":
            world.server.rows.pop(row["id"], None)

    world.hook = delete
    world.run(60)
    assert world.journal.unreported() == []
    assert len(world.messages.left()) == 1
    assert world.problem() == ""


def test_a_new_chat_db_stops_it_until_the_owner_has_looked(world: World) -> None:
    world.send("Hello")
    world.messages.rebuild()
    row = world.server.enqueue(HANDLE, "Next")
    world.run(300)
    assert "chat.db is not the one of before" in (world.server.problem or "")
    assert row["collected_at"] is None
    world.journal.release(None, world.clock.now())
    world.settle()
    assert world.outcome(row) == "sent"


def test_renumbered_rows_stop_it_too(world: World) -> None:
    world.send("Hello")
    world.messages.chat.execute("UPDATE sqlite_sequence SET seq = 0 WHERE name = 'message'")
    world.messages.chat.execute("DELETE FROM message")
    world.run(60)
    assert "chat.db is not the one of before" in (world.server.problem or "")


def test_a_deleted_conversation_does_not_stop_it(world: World) -> None:
    world.send("Hello")
    world.messages.chat.execute("DELETE FROM message")
    assert world.outcome(world.send("Next")) == "sent"


def test_a_clock_that_is_set_back_starts_nothing(world: World) -> None:
    def set_back(moment: str, what: str) -> None:
        if (moment, what) == ("after", "POST collect"):
            world.hook = lambda moment, what: None
            world.clock.wall -= HOUR

    world.hook = set_back
    row = world.server.enqueue(HANDLE, "Hello")
    world.round()
    assert world.messages.asked() == []
    world.settle()
    assert world.outcome(row) == "not_started"


def test_the_journal_forgets_after_a_year(world: World) -> None:
    world.send("Hello")
    world.journal.forget_old(world.clock.now() + mac_sender.YEAR - DAY)
    assert len(world.journal.messages("true")) == 1
    world.journal.forget_old(world.clock.now() + mac_sender.YEAR + DAY)
    assert world.journal.messages("true") == []


def test_only_the_owner_can_read_the_configuration(world: World) -> None:
    assert (world.home / "config.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fault", [ConnectionResetError, Killed])
def test_a_lost_response_to_collect_is_asked_for_again_with_the_same_id(
    world: World, fault: type[BaseException]
) -> None:
    def lose(moment: str, what: str) -> None:
        if (moment, what) == ("after", "POST collect"):
            world.hook = lambda moment, what: None
            raise fault

    world.hook = lose
    row = world.server.enqueue(HANDLE, "Hello")
    try:
        world.settle()
    except Killed:
        world.start()
        world.settle()
    assert world.outcome(row) == "sent"
    assert len(world.messages.left()) == 1
    assert sum(what.endswith("collect") for what in world.server.requests) == 2


def test_a_message_that_messages_takes_up_again_meanwhile_holds_the_next_one(world: World) -> None:
    """A failed message holds nobody. It went back to the outbox while the next one was handed over."""
    world.messages.expect(messages.fails(22), text="first")
    world.server.enqueue(HANDLE, "first")
    world.run(60)
    row = world.server.enqueue(HANDLE, "second")

    def take_up(moment: str, what: str) -> None:
        if (moment, what) == ("after", "POST collect"):
            world.journal.connection.execute("UPDATE messages SET row = 'outbox' WHERE row = 'failing'")

    world.hook = take_up
    world.run(60)
    assert world.outcome(row) == "not_started"
    assert len(world.messages.asked()) == 1


def test_a_row_stands_for_one_message_only(world: World) -> None:
    """Two batches have the same text for one person, seconds apart. The second message leaves no trace."""
    world.messages.expect(messages.sent(), messages.vanishes())
    rows = [world.server.enqueue(HANDLE, "Hello") for _ in range(2)]
    world.settle()
    assert [world.outcome(row) for row in rows] == ["sent", "unknown"]
    assert len(world.messages.asked()) == 2


def test_a_year_of_messages_makes_no_round_slower(world: World) -> None:
    """Each statement of a round finds its rows by an index."""
    statements: list[str] = []
    world.messages.expect(messages.fails(22), messages.vanishes(), messages.sent(delivered=300), messages.outbox(600))
    for number in range(4):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.journal.connection.set_trace_callback(statements.append)
    world.run(HOUR)
    world.journal.connection.set_trace_callback(None)
    selects = {sql for sql in statements if "FROM messages" in sql and sql.lstrip().startswith("SELECT")}
    assert len(selects) > 10
    for sql in selects:
        plan = [row[3] for row in world.journal.connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
        assert not any(step.startswith("SCAN messages") and "INDEX" not in step for step in plan), (sql, plan)
