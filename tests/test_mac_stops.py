"""When the sender does not poll: what is wrong with the Mac, what several messages show together, and `release`."""

from __future__ import annotations

import errno
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract_server
import fake_messages as messages
import mac_sender
import pytest
from mac_world import HANDLE, Killed, World, truth

pytestmark = pytest.mark.mac

HOUR = 3600


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        yield world


def no_permission(world: World) -> None:
    world.mac.open_error = PermissionError(errno.EPERM, "Operation not permitted")


def denied_sidecar(world: World) -> None:
    world.mac.chat_error = sqlite3.OperationalError("authorization denied")


def no_chat(world: World) -> None:
    world.mac.open_error = FileNotFoundError(errno.ENOENT, "No such file or directory")


def strange_chat(world: World) -> None:
    world.messages.chat.execute("ALTER TABLE message RENAME COLUMN is_finished TO finished")


def full_disk(world: World) -> None:
    world.mac.room = 10**6


def other_mac(world: World) -> None:
    world.set_file("ioreg.txt", '"IOPlatformUUID" = "00000000-0000-0000-0000-000000000000"')
    world.start()


def other_user(world: World) -> None:
    world.start(uid=4242)


def other_session(world: World) -> None:
    world.start(console="/nowhere")


PROBLEMS: list[tuple[Callable[[World], Any], str]] = [
    (no_permission, "Full Disk Access is missing for"),
    (denied_sidecar, "Full Disk Access is missing for"),
    (no_chat, "does not exist: open Messages"),
    (strange_chat, "not as on the macOS versions"),
    (full_disk, "the disk is full"),
    (other_mac, "belongs to another Mac"),
    (other_user, "belongs to another user"),
    (other_session, "log in as the sender's user"),
    (lambda world: world.set_file("permission.txt", "-1743"), "Automation is missing: allow"),
    (lambda world: world.set_file("permission.txt", "-1744"), "run `install` again, with somebody in front"),
    (lambda world: world.scenario(error=-1743), "Automation is missing: allow"),
    (lambda world: world.scenario(error=-10004), "refuses Automation (-10004)"),
    (lambda world: world.scenario(error=-600), "Messages cannot be started"),
    (lambda world: world.scenario(error=-1712), "does not respond (error -1712)"),
    (lambda world: world.scenario(accounts=[]), "not signed in to iMessage"),
    (lambda world: world.scenario(accounts=[{"type": "iMessage", "enabled": False}]), "not signed in to iMessage"),
    (lambda world: world.scenario(accounts=[{"type": "SMS", "enabled": True}]), "not signed in to iMessage"),
]


@pytest.mark.parametrize(("break_it", "sentence"), PROBLEMS)
def test_a_mac_that_cannot_send_does_not_poll_and_says_why(
    world: World, break_it: Callable[[World], Any], sentence: str
) -> None:
    break_it(world)
    row = world.server.enqueue(HANDLE, "Hello")
    world.run(200)
    assert sentence in (world.server.problem or "")
    assert not any("pending" in what for what in world.server.requests)
    assert row["collected_at"] is None
    assert len(world.server.health) >= 3  # it repeats it, so that the server knows that the Mac lives
    assert world.messages.asked() == []


def test_a_problem_that_goes_away_is_forgotten(world: World) -> None:
    world.scenario(error=-600)
    world.run(60)
    assert world.server.problem
    world.scenario(error=0)
    assert world.outcome(world.send()) == "sent"
    assert world.server.problem is None


def test_a_permission_that_cannot_be_asked_for_is_probed(world: World) -> None:
    world.set_file("permission.txt", "no such framework")
    assert world.outcome(world.send()) == "sent"


def test_a_quiet_chat_db_is_read_all_the_same(world: World) -> None:
    """Messages has closed it: without its sidecars, Apple's SQLite refuses a read-only connection."""
    world.messages.chat.execute("PRAGMA journal_mode = DELETE")
    world.mac.chat_error = sqlite3.OperationalError("unable to open database file")
    world.run(30)
    assert world.problem() == ""


def test_a_chat_db_that_is_locked_is_a_problem(world: World) -> None:
    world.mac.chat_error = sqlite3.OperationalError("unable to open database file")
    Path(f"{world.messages.chat_path}-wal").touch()
    world.run(30)
    assert "chat.db cannot be read" in world.problem()


def test_missing_disk_access_makes_the_process_end_after_a_minute(world: World) -> None:
    """Grants are read when a process starts: launchd starts another one."""
    no_permission(world)
    world.run(30)
    assert world.sender.restart_at
    world.mac.open_error = None
    world.run(30)
    assert world.sender.restart_at is None


def test_messages_that_quits_between_collect_and_start_costs_nothing(world: World) -> None:
    def quit_after_collect(moment: str, what: str) -> None:
        if (moment, what) == ("after", "POST collect"):
            world.scenario(error=-600)

    world.hook = quit_after_collect
    row = world.server.enqueue(HANDLE, "Hello")
    world.run(30)
    assert world.outcome(row) == "not_started"
    world.hook = lambda moment, what: None
    world.scenario(error=0)
    world.settle()
    assert world.outcome(world.server.row(row["batchItemId"])) == "sent"
    assert truth(world) == []


# --- what several messages show together --------------------------------------------------------------


def test_three_messages_without_a_trace_stop_it(world: World) -> None:
    world.scenario(messages.vanishes(), times=3)
    for number in range(5):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.run(HOUR)
    assert "three messages in a row left no trace" in (world.server.problem or "")
    assert len(world.messages.asked()) == 3
    world.journal.release(None, world.clock.now())
    world.settle()
    assert len(world.messages.asked()) == 5


def test_three_addresses_that_do_not_exist_do_not_stop_it(world: World) -> None:
    world.scenario(messages.error("resolve", -1728), times=3)
    for number in range(4):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.settle()
    assert [text for _, text in world.messages.left()] == ["Message 3"]


def test_ten_sent_and_none_of_fifty_delivered_stop_it(world: World) -> None:
    world.scenario(messages.sent(delivered=None), times=None)
    for number in range(12):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.run(HOUR)
    assert "none was delivered" in (world.server.problem or "")
    assert len(world.messages.asked()) == 10
    world.journal.release(None, world.clock.now())
    world.settle()
    assert len(world.messages.asked()) == 12


@pytest.mark.parametrize("act", [messages.sent(delivered=None, service="SMS"), messages.sent()])
def test_sms_and_delivered_messages_do_not_stop_it(world: World, act: messages.Act) -> None:
    world.scenario(act, times=None)
    for number in range(12):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.settle()
    assert len(world.messages.left()) == 12


def test_one_receipt_lets_it_go_on(world: World) -> None:
    world.scenario(messages.sent(delivered=2 * HOUR), times=1)
    world.scenario(messages.sent(delivered=None), times=None)
    for number in range(12):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.run(HOUR)
    assert len(world.messages.asked()) == 10
    world.run(2 * HOUR)
    assert len(world.messages.asked()) == 12


@pytest.mark.parametrize(("name", "seconds"), [("ceiling_per_hour", HOUR), ("ceiling_per_day", 24 * HOUR)])
def test_a_ceiling_holds_until_its_time_is_over(world: World, name: str, seconds: int) -> None:
    world.start(**{name: 3, "poll_seconds": 60})
    for number in range(5):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.run(seconds - 100)
    assert len(world.messages.asked()) == 3
    assert name in (world.server.problem or "")
    world.run(500)
    assert len(world.messages.asked()) == 5


def test_a_message_in_the_outbox_holds_the_others_until_it_is_released(world: World) -> None:
    world.scenario(messages.outbox(), text="stuck")
    world.server.enqueue(HANDLE, "stuck")
    world.server.enqueue(HANDLE, "next")
    world.run(HOUR - 60)
    assert world.problem() == ""
    world.run(120)
    sentence = world.server.problem or ""
    assert "a message to +1415•••23 is in Messages' outbox" in sentence
    assert world.messages.left() == []
    message_id = sentence.split("release ")[1].strip("`")
    assert world.journal.release(message_id, world.clock.now()) == 1
    world.run(60)
    assert world.messages.left() == [(HANDLE, "next")]
    assert world.server.problem is None


def test_a_failed_message_that_settles_does_not_hold_the_others(world: World) -> None:
    world.scenario(messages.fails(22), text="fails")
    world.server.enqueue(HANDLE, "fails")
    world.server.enqueue(HANDLE, "next")
    world.run(60)
    assert world.messages.left() == [(HANDLE, "next")]


def test_one_message_at_a_time_with_a_pause(world: World) -> None:
    world.start(pause_seconds=7)
    for number in range(3):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.settle()
    times = [at for (at,) in world.messages.book.execute("SELECT at FROM asked ORDER BY at")]
    assert all(later - earlier >= 7 for earlier, later in itertools.pairwise(times))


def test_a_pause_stops_all_but_the_message_that_is_being_sent(world: World) -> None:
    def pause(moment: str, what: str) -> None:
        if (moment, what) == ("before", "osascript"):
            world.server.pause()

    world.hook = pause
    for number in range(5):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.settle()
    world.run(60)
    assert [text for _, text in world.messages.left()] == ["Message 0"]


# --- the server -----------------------------------------------------------------------------------------


def test_a_server_of_before_is_not_trusted(world: World) -> None:
    """It knows no peek, and has handed everything over. Nothing is sent; after its upgrade all is unknown."""
    world.server.is_old = True
    row = world.server.enqueue(HANDLE, "Hello")
    world.run(60)
    assert "the server is older than this sender: upgrade it" in (world.server.problem or "")
    assert sum("pending" in what for what in world.server.requests) == 1
    world.server.is_old = False
    world.journal.release(None, world.clock.now())
    world.run(60)
    assert world.outcome(row) == "unknown"
    assert world.messages.asked() == []


def test_a_server_of_before_is_recognised_without_messages(world: World) -> None:
    world.server.is_old = True
    world.run(60)
    assert "upgrade it" in (world.server.problem or "")


def test_a_refused_token_stops_every_request_for_ten_minutes(world: World) -> None:
    world.server.token = "another"
    world.run(500)
    assert len(world.server.requests) == 1
    assert "refuses the token" in world.problem()
    world.server.token = world.settings["token"]
    world.run(200)
    assert world.problem() == ""
    assert world.outcome(world.send()) == "sent"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_retry_after_is_obeyed(world: World, status: int) -> None:
    world.server.refuse_with = (status, {"Retry-After": "120"})
    world.run(110)
    assert len(world.server.requests) == 1
    world.server.refuse_with = None
    world.run(60)
    assert len(world.server.requests) > 2


def test_a_server_that_is_away_is_asked_less_and_less_often(world: World) -> None:
    world.server.refuse_with = (503, {})
    world.run(HOUR)
    assert 10 < len(world.server.requests) < 30


def test_a_withdrawn_message_is_nothing_to_report(world: World) -> None:
    def withdraw(moment: str, what: str) -> None:
        if (moment, what) == ("before", "POST collect"):
            world.server.pause()

    world.hook = withdraw
    world.server.enqueue(HANDLE, "Hello")
    world.run(60)
    assert world.messages.asked() == []
    assert world.journal.unreported() == []
    assert not any(what.endswith("result") for what in world.server.requests)


def test_a_message_of_last_evening_is_given_back_in_the_night(world: World) -> None:
    """It was collected, and the Mac crashed. Hours later the server says `late`."""

    def fall_asleep(moment: str, what: str) -> None:
        if what == "POST collect":
            world.hook = lambda moment, what: None
            world.clock.sleep_mac(6 * HOUR)

    world.hook = fall_asleep
    row = world.server.enqueue(HANDLE, "Hello")
    world.round()
    world.round()
    assert world.outcome(row) == "not_started"
    world.settle()
    assert len(world.messages.left()) == 1


def test_a_mac_that_crashed_in_the_evening_sends_nothing_in_the_night(world: World) -> None:
    def crash(moment: str, what: str) -> None:
        if (moment, what) == ("after", "POST collect"):
            raise Killed

    world.hook = crash
    world.server.requeues = False
    row = world.server.enqueue(HANDLE, "Hello")
    with pytest.raises(Killed):
        world.round()
    world.hook = lambda moment, what: None
    world.clock.sleep_mac(6 * HOUR)
    world.start()
    world.settle()
    assert world.outcome(row) == "not_started"
    assert world.messages.asked() == []


def test_a_second_start_over_sms_is_handed_over_by_the_server_again(world: World) -> None:
    world.start(sms=True, send_as_text_message_is_off=True)
    world.scenario(accounts=[{"type": "iMessage", "enabled": True}, {"type": "SMS", "enabled": True}])
    world.scenario(messages.fails(22), times=1)
    first = world.server.enqueue(HANDLE, "Hello")
    world.settle()
    services = [service for (service,) in world.messages.book.execute("SELECT service FROM sent")]
    assert services == ["SMS"]
    assert (world.outcome(first), world.outcome(world.server.row(first["batchItemId"]))) == ("not_started", "sent")


def test_no_second_start_over_sms_after_a_stop(world: World) -> None:
    world.start(sms=True, send_as_text_message_is_off=True)
    world.scenario(messages.fails(22), times=1)
    world.server.enqueue(HANDLE, "Hello")
    world.clock.at(60, lambda: world.messages.receive(HANDLE, "STOP"))
    world.settle()
    assert world.messages.left() == []
    assert len(world.messages.asked()) == 1


def test_without_the_setting_there_is_no_second_start(world: World) -> None:
    assert world.outcome(world.send("Hi", HANDLE, messages.fails(22))) == "failed"
    assert len(world.messages.asked()) == 1


def test_receipts_and_late_errors_are_reported_once(world: World) -> None:
    row = world.send("Hi", HANDLE, messages.sent(delivered=HOUR))
    assert (row["status"], row["deliveredAt"]) == ("sent", None)
    world.run(HOUR + 60)
    assert row["deliveredAt"]
    late = {"rows": [{"after": 0.3, "leaves": 1, "steps": [
        [1, {"is_sent": 1, "is_finished": 1}], [HOUR, {"is_sent": 0, "error": 4}],
    ]}]}  # fmt: skip
    other = world.send("Ho", HANDLE, late)
    world.run(HOUR + 60)
    assert (other["status"], other["lateError"]) == ("sent", "Messages error 4: sending failed")
    results = sum(what.endswith("result") for what in world.server.requests)
    assert results == 4


def test_many_messages_go_out_once_each(world: World) -> None:
    for number in range(120):
        world.server.enqueue(f"+1415555{number:04}", "The same text for everybody")
    world.start(ceiling_per_hour=1000, pause_seconds=0)
    world.settle()
    assert len(set(world.messages.left())) == len(world.messages.left()) == 120


def test_a_listed_message_that_is_not_as_agreed_is_left_alone(world: World) -> None:
    world.server.enqueue(HANDLE, "Hello", attempt="one")  # type: ignore[arg-type]
    assert world.outcome(world.send("Next")) == "sent"
    assert world.messages.left() == [(HANDLE, "Next")]


def test_the_contract_server_lists_fifty() -> None:
    server = contract_server.ContractServer("x")
    for number in range(60):
        server.enqueue(HANDLE, str(number))
    assert len(server.pending("peek=true")["items"]) == 50
    server.close()


def test_an_error_of_the_account_stops_at_once(world: World) -> None:
    for number in sorted(mac_sender.ACCOUNT_ERRORS):
        world.scenario(messages.fails(number), text=f"Error {number}")
        world.server.enqueue(HANDLE, f"Error {number}")
        world.server.enqueue(HANDLE, f"After {number}")
        world.run(60)
        assert f"error {number}" in world.problem()
        assert (HANDLE, f"After {number}") not in world.messages.left()
        world.server.pause()
        world.journal.release(None, world.clock.now())
