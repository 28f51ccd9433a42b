"""What chat.db shows, and what the sender says of it: one situation a row, several problems at once among them.

After each situation, the results are compared with the Mac's own book (`mac_world.truth`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fake_messages as messages
import pytest
from mac_world import HANDLE, NOON, World, truth

pytestmark = pytest.mark.mac

Act = messages.Act
MINUTE, HOUR, DAY = 60, 3600, 86_400
TEXT = "Hello, this is about Thursday."
OTHER = "+14155550199"


class Situation(NamedTuple):
    """`before` and `after` change the world: before the message is enqueued, and so many seconds after that."""

    name: str
    act: Act
    outcome: str  # of the server's row, at the end
    problem: str = ""  # a part of what the sender says of itself at the end
    text: str = TEXT
    handle: str = HANDLE
    starts: int = 1
    version: str = "26.1"
    seconds: float = 0  # that pass at least; it goes on until the result is there
    before: Callable[[World], Any] | None = None
    after: tuple[tuple[float, Callable[[World], Any]], ...] = ()
    history: list[str] | None = None  # the results that the server got, in order
    settings: dict[str, Any] = {}  # noqa: RUF012  # never changed
    by_hand: bool = False  # what left by hand is not in the Mac's book


def typed(text: str = TEXT, handle: str = HANDLE, **columns: Any) -> Callable[[World], Any]:
    """The owner sends something by hand."""
    finished = {"is_finished": 1, "is_sent": 1, **columns}
    return lambda world: world.messages.insert(handle, text, **finished)


def scenario(**settings: Any) -> Callable[[World], Any]:
    return lambda world: world.scenario(**settings)


def unreadable(world: World) -> None:
    world.mac.open_error = PermissionError(1, "Operation not permitted")


def readable(world: World) -> None:
    world.mac.open_error = None


def forget_row(world: World) -> None:
    world.messages.chat.execute("DELETE FROM message WHERE is_from_me = 1")


def rebuild(world: World) -> None:
    world.messages.rebuild(gap=7)


def backfill(world: World) -> None:
    """iCloud inserts an old row with the same text again, with a high ROWID, a fresh guid and its own date."""
    world.messages.insert(HANDLE, TEXT, date=world.clock.now() - 30 * DAY, is_sent=1, is_finished=1)


def failed_long_ago(world: World) -> None:
    typed(is_sent=0, error=22)(world)
    world.clock.sleep(11 * MINUTE)


ok, sent, fails, error = messages.sent(), messages.sent, messages.fails, messages.error
vanishes, outbox, slow = messages.vanishes, messages.outbox, messages.slow
STOPPED, GRANT = "release", "Automation"

SITUATIONS = [
    # One candidate, which is sent.
    Situation("a row at once", ok, "sent"),
    Situation("a row after 100 s: beyond the time in which it may be ours", sent(after=100), "unknown"),
    Situation("a row after 50 s", sent(after=50), "sent"),
    Situation("a row that osascript's end precedes by 20 s", slow(20, sent(after=35)), "sent"),
    Situation("macOS 12: text in its column, `service` in the script", ok, "sent", version="12.7"),
    Situation("macOS 13", ok, "sent", version="13.6"),
    Situation("macOS 15", ok, "sent", version="15.1"),
    Situation("macOS 27", ok, "sent", version="27.0"),
    Situation("the text in its column", sent(text_column=True), "sent"),
    Situation("a mutable string", sent(mutable=True), "sent"),
    Situation("handle_id 0, the chat tells the address", sent(with_handle=False), "sent"),
    Situation("handle_id 0, the chat is joined 20 s later", sent(with_handle=False, join_after=20), "sent"),
    Situation("handle_id 0, asleep for hours before the chat is joined", sent(with_handle=False, join_after=20), "sent",
              after=((5, lambda world: world.clock.sleep_mac(8 * HOUR)),), history=["sent"], seconds=9 * HOUR),
    Situation("handle_id 0, no chat ever", sent(with_handle=False, with_join=False), "unknown"),
    Situation("sent over SMS at once", sent(service="SMS", delivered=None), "sent"),
    Situation("sent over iMessageLite", sent(service="iMessageLite"), "sent"),
    Situation("sent over RCS", sent(service="RCS"), "sent"),
    Situation("another row for the URL", messages.with_url("https://example.com"), "sent", text="See https://example.com"),
    Situation("curly quotes, dash, ellipsis", sent(text="It’s “on” — …"), "sent", text="It's \"on\" -- ..."),
    Situation("white space at the end is gone", sent(text="Hello"), "sent", text="Hello \n"),
    Situation("CRLF became LF", sent(text="a\nb"), "sent", text="a\r\nb"),
    Situation("U+FE0F is gone", sent(text="I \u2764 it"), "sent", text="I \u2764\ufe0f it"),
    Situation("U+FE0F was added", sent(text="I \u2764\ufe0f it"), "sent", text="I \u2764 it"),
    Situation("U+FFFC was added", sent(text="\ufffcHi"), "sent", text="Hi"),
    Situation("another normal form", sent(text=unicodedata.normalize("NFD", "Fähre")), "sent", text="Fähre"),
    Situation("an emoji alone", ok, "sent", text="🎉"),
    Situation("quotes, a backslash, a script", ok, "sent", text='"\\ & (do shell script "id")'),
    Situation("a long text", ok, "sent", text="long " * 4000),
    Situation("an e-mail address in capitals", sent(handle="anna@example.com"), "sent", handle="Anna@Example.com"),
    Situation("Mexico's 1", sent(handle="+5215512345678"), "sent", handle="+525512345678"),
    Situation("Argentina's 9", sent(handle="+541123456789"), "sent", handle="+5491123456789"),
    Situation("brackets and spaces in the number", ok, "sent", handle="+1 (415) 555-0123"),
    Situation("no receipt", sent(delivered=None), "sent"),
    # Rows that look like ours, and are not.
    Situation("another emoji was typed, ours fails", fails(22), "failed", text="🎉", after=((1, typed("🙈")),)),
    Situation("a backfill of an old row with the same text", ok, "sent", before=backfill, after=((1, backfill),)),
    Situation("a tapback that quotes us", ok, "sent", after=((0.1, typed(associated_message_type=2000)),)),
    Situation("Send Later with the same text", ok, "sent", after=((0.1, typed(schedule_type=2)),)),
    Situation("a group got the same text", ok, "sent", after=((0.1, typed(style=43)),)),
    Situation("only a group got the text", vanishes(), "unknown", after=((0.1, typed(style=43)),)),
    Situation("the owner writes something else meanwhile", ok, "sent", after=((0.1, typed("See you")),)),
    # Failed for certain.
    Situation("error 22", fails(22), "failed"),
    Situation("error 4", fails(4), "failed"),
    Situation("an error without a name", fails(77), "failed"),
    Situation("error 22 after a minute", fails(22, error_after=60), "failed"),
    Situation("the error changes after 9 minutes", {
        "rows": [{"after": 0.3, "steps": [[2, {"error": 22, "is_finished": 1}], [540, {"error": 4}]]}],
    }, "failed"),
    Situation("re-sent over SMS after a minute", messages.fails_then_sms(), "sent"),
    Situation("re-sent over SMS after 9 minutes", messages.fails_then_sms(again=540), "sent"),
    Situation("an account error", fails(32), "failed", "account"),
    Situation("an account error, then sent", messages.fails_then_sms(33), "sent", "account"),
    Situation("a number without its +", ok, "failed", handle="4155550123", starts=0),
    Situation("a group's name", ok, "failed", handle="chat123456", starts=0),
    Situation("a group's address", ok, "failed", handle="iMessage;+;chat123", starts=0),
    Situation("a text of white space", ok, "failed", text=" \n", starts=0),
    # In the outbox.
    Situation("leaves after 10 minutes", outbox(leaves=600), "sent", history=["sent"]),
    Situation("leaves after 2 hours", outbox(leaves=2 * HOUR), "sent", history=["unknown", "sent"], seconds=3 * HOUR),
    Situation("stays in the outbox", outbox(), "unknown", "outbox", seconds=2 * HOUR),
    Situation("leaves after 6 days", outbox(leaves=6 * DAY), "sent", seconds=7 * DAY, history=["unknown", "sent"],
              settings={"poll_seconds": 1200}),
    Situation("finished, not sent, no error: the outbox", {
        "rows": [{"after": 0.3, "steps": [[1, {"is_finished": 1}]]}],
    }, "unknown", "outbox", seconds=2 * HOUR),
    Situation("the outbox, then an error", {
        "rows": [{"after": 0.3, "steps": [[2 * HOUR, {"error": 6, "is_finished": 1}]]}],
    }, "failed", history=["unknown", "failed"], seconds=4 * HOUR),
    Situation("the owner deletes the row from the outbox", outbox(), "unknown", "outbox",
              after=((60, forget_row),), seconds=2 * HOUR),
    # No row, an error while resolving: nothing was sent.
    Situation("no such address", error("resolve", -1728), "failed", starts=0),
    Situation("no iMessage account", error("account", -1728), "not_started", starts=0),
    Situation("Automation is missing", error("account", -1743), "not_started", starts=0),
    Situation("macOS would ask for Automation", error("account", -1744), "not_started", starts=0),
    Situation("Messages does not run", error("account", -600), "not_started", starts=0),
    Situation("Messages cannot be launched", error("account", -10810), "not_started", starts=0),
    Situation("-1719 while resolving", error("resolve", -1719), "not_started", starts=0),
    Situation("-1700 while resolving", error("resolve", -1700), "not_started", starts=0),
    # No row, anything else: perhaps.
    Situation("-1712 while resolving", error("resolve", -1712), "unknown", starts=0),
    Situation("-609 while resolving", error("resolve", -609), "unknown", starts=0),
    Situation("-10004 while resolving", error("resolve", -10004), "unknown", STOPPED, starts=0),
    Situation("-10004 at dispatch, and sent", error("dispatch", -10004, ok), "sent", STOPPED),
    Situation("-1728 at dispatch, no row", error("dispatch", -1728), "unknown"),
    Situation("-1728 at dispatch, and sent", error("dispatch", -1728, ok), "sent"),
    Situation("-1712 at dispatch, no row", error("dispatch", -1712), "unknown"),
    Situation("-1712 at dispatch, and sent", error("dispatch", -1712, ok), "sent"),
    Situation("-1712 at dispatch, in the outbox", error("dispatch", -1712, outbox()), "unknown", "outbox",
              seconds=2 * HOUR),
    Situation("success, and no trace", vanishes(), "unknown"),
    Situation("success, no trace, and yet it leaves", vanishes(leaves=5), "unknown"),
    Situation("osascript hangs at dispatch, and it leaves", slow(300, ok), "sent"),
    Situation("osascript hangs at dispatch, no trace", slow(300, vanishes()), "unknown"),
    Situation("osascript hangs while resolving: too late to send", slow(25, ok, "resolve"), "not_started", starts=0),
    Situation("killed, and Messages acts 3 minutes later", slow(300, sent(after=180)), "unknown"),
    # Two candidates, or one with another text.
    Situation("the owner types the same text on the phone", ok, "unknown", after=((0.1, typed()),)),
    Situation("the owner types the same text, ours leaves no row", vanishes(), "sent",
              after=((0.1, typed()),), by_hand=True),
    Situation("Messages changed the text", sent(text="Quite another text"), "unknown"),
    Situation("no row of ours, another text by the owner", vanishes(), "unknown", after=((0.1, typed("See you")),)),
    Situation("to oneself: two rows", messages.twice(), "sent", handle="owner@example.com"),
    # Wrong address, wrong account.
    Situation("the row is somebody else's", sent(handle=OTHER), "unknown", "another address"),
    Situation("another account than send_as", ok, "sent", "send_as", settings={"send_as": "+14155550000"}),
    Situation("the account of send_as", ok, "sent", settings={"send_as": "Owner@example.com"}),
    # The person has the text already.
    Situation("sent by hand since the draft", ok, "sent", before=typed(), starts=0),
    Situation("sent by hand over SMS since the draft", ok, "sent", before=typed(service="SMS"), starts=0),
    Situation("by hand, still in the outbox", ok, "unknown", "outbox", starts=0,
              before=typed(is_sent=0, is_finished=0), seconds=2 * HOUR),
    Situation("by hand, failed for good", ok, "sent", before=failed_long_ago),
    Situation("by hand, fails right now", ok, "failed", before=typed(is_sent=0, error=22), starts=0),
    Situation("by hand to somebody else", ok, "sent", before=typed(handle=OTHER)),
    # Several things at once.
    Situation("URL, no handle, late join, macOS 12",
              messages.with_url("https://a.b", sent(with_handle=False, join_after=9)), "sent",
              text="See https://a.b", version="12.7"),
    Situation("error while resolving, and yet a row", error("resolve", -1728, ok), "sent",
              after=((1, typed()),), starts=0),
    Situation("a time-out, and two rows", error("dispatch", -1712, ok), "unknown", after=((0.1, typed()),)),
    Situation("killed, then error 22, then SMS", slow(300, messages.fails_then_sms()), "sent"),
    Situation("-1728 at dispatch, then error 22", error("dispatch", -1728, fails(22)), "failed"),
    Situation("chat.db unreadable for 5 minutes, and sent", ok, "sent", after=((0.1, unreadable), (300, readable))),
    Situation("chat.db unreadable for 5 minutes, no trace", vanishes(), "unknown",
              after=((0.1, unreadable), (300, readable))),
    Situation("chat.db unreadable, and resolving failed", error("resolve", -1728), "failed", starts=0,
              after=((0.1, unreadable), (300, readable))),
    Situation("chat.db rebuilt before the row is sent", outbox(leaves=60), "sent", "not the one of before",
              after=((20, rebuild),)),
    Situation("rebuilt, and the row failed", fails(22, error_after=40), "failed", "not the one of before",
              after=((20, rebuild),)),
    Situation("the network goes, Messages quits", outbox(leaves=900), "sent",
              after=((5, scenario(error=-600)), (600, scenario(error=0)))),
    Situation("the account is blocked, the owner types", fails(33), "unknown", after=((0.1, typed()),)),
    Situation("wrong account and outbox", outbox(), "unknown", "send_as", seconds=2 * HOUR,
              settings={"send_as": "+14155550000"}),
    Situation("hangs, and the row has no handle", slow(300, sent(with_handle=False)), "sent"),
    Situation("curly quotes in a row without a handle, late", sent(after=40, with_handle=False, text="It’s"), "sent",
              text="It's"),
]  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS, ids=[situation.name for situation in SITUATIONS])
def test_the_result_is_what_chat_db_shows(situation: Situation, tmp_path: Path) -> None:
    with World(tmp_path, situation.version, **{"poll_seconds": 60, **situation.settings}) as world:
        item = world.server.enqueue(situation.handle, situation.text)["batchItemId"]
        if situation.before:
            situation.before(world)
        world.scenario(text=situation.text, times=None, *(situation.act,))  # noqa: B026
        for seconds, action in situation.after:
            world.clock.at(seconds, lambda action=action: action(world))  # type: ignore[misc]
        world.settle(HOUR / 2)
        world.run(max(situation.seconds - (world.clock.now() - NOON), 60))
        row = world.server.row(item)
        assert world.outcome(row) == situation.outcome
        assert situation.problem in world.problem()
        assert situation.problem or not world.problem()
        assert len(world.messages.asked()) == situation.starts
        assert situation.history is None or row["history"] == situation.history
        if situation.starts and not situation.by_hand:
            assert truth(world) == []


def test_there_are_at_least_sixty_situations() -> None:
    assert len({situation.name for situation in SITUATIONS}) == len(SITUATIONS) >= 60
