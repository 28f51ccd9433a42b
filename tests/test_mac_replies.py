"""STOP and START: read before each poll, accepted by the server before each poll. And nothing else leaves the Mac."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import contract_server
import fake_messages as messages
import mac_sender
import pytest
from mac_world import HANDLE, NOON, World

pytestmark = pytest.mark.mac

OTHER = "+14155550199"
DAY = 86_400


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        yield world


def words(world: World) -> list[tuple[str, str]]:
    return [(handle, word) for (handle, _), word in world.server.opt_outs.items()]


def test_a_stop_is_accepted_before_the_next_poll(world: World) -> None:
    world.run(30)
    world.messages.receive(HANDLE, "Stop.")
    world.server.enqueue(HANDLE, "Hello")
    before = len(world.server.requests)
    world.run(60)
    news = world.server.requests[before:]
    assert news[0].endswith("opt-outs")
    assert words(world) == [(HANDLE, "STOP")]
    assert world.messages.asked() == []


def test_after_a_stop_only_the_message_that_is_being_sent_goes_out(world: World) -> None:
    def reply(moment: str, what: str) -> None:
        if (moment, what) == ("before", "osascript"):
            world.messages.receive(HANDLE, "STOP")
            world.hook = lambda moment, what: None

    world.hook = reply
    for number in range(5):
        world.server.enqueue(HANDLE, f"Message {number}")
    world.run(120)
    assert [text for _, text in world.messages.left()] == ["Message 0"]


def test_nothing_is_polled_while_the_server_does_not_accept_a_stop(world: World) -> None:
    world.run(30)

    def refuse(moment: str, what: str) -> None:
        if what == "POST opt-outs":
            raise ConnectionResetError

    world.hook = refuse
    world.messages.receive(HANDLE, "STOP")
    world.server.enqueue(OTHER, "Hello")
    before = len(world.server.requests)
    world.run(300)
    assert not any("pending" in what for what in world.server.requests[before:])
    world.hook = lambda moment, what: None
    world.run(300)
    assert words(world) == [(HANDLE, "STOP")]
    assert len(world.messages.left()) == 1


@pytest.mark.parametrize("columns", [
    {}, {"text_column": True}, {"mutable": True}, {"with_handle": False}, {"service": "SMS"}, {"with_join": False},
])  # fmt: skip
def test_a_stop_counts_however_it_is_stored(world: World, columns: dict[str, object]) -> None:
    world.messages.receive("anna@example.com", "ARRÊT!!", **columns)
    world.run(30)
    assert words(world) == [("anna@example.com", "ARRET")]


@pytest.mark.parametrize(("text", "columns"), [
    ("stop by at 5?", {}),
    ("Loved “Reply STOP to end”", {"associated_message_type": 2000}),
    ("STOP", {"associated_message_type": 3006}),
    ("STOP", {"associated_message_guid": "p:0/ABC"}),
    ("STOP", {"item_type": 1}),
    ("STOP", {"style": 43}),
    ("STOP", {"date": NOON - 3600}),
    ("STOP", {"balloon_bundle_id": "com.apple.messages.URLBalloonProvider"}),
])  # fmt: skip
def test_what_is_no_reply_is_not_reported(world: World, text: str, columns: dict[str, object]) -> None:
    world.messages.receive(HANDLE, text, **columns)
    world.run(30)
    assert words(world) == []


def test_what_the_owner_writes_is_no_reply(world: World) -> None:
    world.messages.insert(HANDLE, "STOP", is_sent=1)
    world.run(30)
    assert words(world) == []


def test_a_damaged_row_hides_no_other(world: World) -> None:
    world.messages.chat.execute(
        "INSERT INTO message (guid, text, date, is_from_me) VALUES ('x', CAST(x'ff53544f50' AS TEXT), ?, 0)",
        (mac_sender.to_apple(NOON + 1),),
    )
    world.messages.receive(HANDLE, "STOP", date=NOON + 2)
    world.run(30)
    assert words(world) == [(HANDLE, "STOP")]
    assert world.problem() == ""


def test_start_takes_a_stop_back(world: World) -> None:
    world.messages.receive(HANDLE, "STOP")
    world.run(30)
    world.messages.receive(HANDLE, "Start!")
    assert world.outcome(world.send()) == "sent"


def test_a_stop_that_icloud_brings_late_counts(world: World) -> None:
    world.run(3600)
    world.messages.receive(HANDLE, "STOP", date=world.clock.now() - 3000)
    world.run(30)
    assert words(world) == [(HANDLE, "STOP")]


def test_a_stop_that_is_older_than_three_days_is_found_within_a_day(world: World) -> None:
    world.start(poll_seconds=600)
    world.run(6 * DAY)
    world.messages.receive(HANDLE, "STOP", date=world.clock.now() - 5 * DAY)
    world.run(DAY)
    assert words(world) == [(HANDLE, "STOP")]


def test_a_backfill_with_fresh_guids_is_no_second_stop(world: World) -> None:
    world.messages.receive(HANDLE, "STOP", date=NOON + 1)
    world.run(30)
    world.messages.receive(HANDLE, "STOP", date=NOON + 1)
    world.run(30)
    assert sum(what.endswith("opt-outs") for what in world.server.requests) == 1


def test_all_are_reported_again_at_each_start_and_once_a_day(world: World) -> None:
    world.start(poll_seconds=600)
    world.messages.receive(HANDLE, "STOP")
    world.run(60)
    world.start()
    world.run(60)
    assert sum(what.endswith("opt-outs") for what in world.server.requests) == 2
    world.run(DAY + 1200)
    assert sum(what.endswith("opt-outs") for what in world.server.requests) == 3


def test_a_server_that_was_restored_gets_all_of_them_before_anything_is_collected(world: World) -> None:
    world.messages.receive(HANDLE, "STOP")
    world.run(60)
    world.server.opt_outs.clear()
    world.server.opted_out.clear()
    world.server.enqueue(HANDLE, "Hello")
    world.run(60)
    assert words(world) == [(HANDLE, "STOP")]
    assert world.messages.asked() == []


def test_a_restored_server_is_noticed_when_a_new_stop_comes_in_between(world: World) -> None:
    world.messages.receive(HANDLE, "STOP")
    world.messages.receive("+14155550111", "STOP")
    world.run(60)
    world.server.opt_outs.clear()
    world.server.opted_out.clear()
    world.messages.receive(OTHER, "STOP")
    world.run(60)
    assert len(words(world)) == 3


def test_a_stop_that_the_server_refuses_does_not_hold_everything(world: World) -> None:
    def refuse(body: object) -> NoReturn:
        raise contract_server.Refusal(400, "`handle` is neither a phone number nor an e-mail address")

    world.server.opt_out = refuse  # type: ignore[method-assign]
    world.messages.receive("262966", "STOP")
    assert world.outcome(world.send()) == "sent"


def test_a_server_without_the_endpoint_stops_the_sender_and_gets_the_stop_later(world: World) -> None:
    def missing(body: object) -> NoReturn:
        raise contract_server.Refusal(404, "there is nothing at this path")

    accepts = world.server.opt_out
    world.server.opt_out = missing  # type: ignore[method-assign]
    world.messages.receive(HANDLE, "STOP")
    world.run(60)
    assert "upgrade it" in world.problem()
    world.server.opt_out = accepts  # type: ignore[method-assign]
    world.journal.release(None, world.clock.now())
    world.run(60)
    assert words(world) == [(HANDLE, "STOP")]


def test_a_stop_is_reported_while_messages_is_away(world: World) -> None:
    world.scenario(error=-600)
    world.run(30)
    world.messages.receive(HANDLE, "STOP")
    world.run(30)
    assert words(world) == [(HANDLE, "STOP")]


def test_nothing_else_of_anybodys_messages_leaves_the_mac(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Secrets are all over chat.db. No request, log line or file of the sender has one, nor has it our own text."""
    caplog.set_level(logging.DEBUG)
    world.messages.receive(OTHER, "my secret is mauve")
    world.messages.receive("carol@secret.example", "stop it, mauve")
    world.messages.receive(HANDLE, "STOP")
    world.messages.insert(OTHER, "mauve, from the owner", is_sent=1, is_finished=1)
    world.messages.receive("+14155550177", "STOP", style=43)
    acts = [
        messages.sent(),
        messages.fails(22),
        messages.vanishes(),
        messages.error("resolve", -1728),
        messages.outbox(60),
    ]
    bodies = []
    for number, act in enumerate(acts):
        bodies.append(f"our text number {number}")
        world.send(bodies[-1], "+14155550133", act)
    sent = b"".join(world.server.received).decode()
    kept = world.journal_text().replace("+14155550133", "").replace(HANDLE, "")
    for text in (sent, kept, caplog.text):
        for secret in ("mauve", "our text", "secret.example", OTHER, "+14155550177"):
            assert secret not in text
    assert HANDLE not in caplog.text
    assert "+14155550133" not in caplog.text
    assert "+14155550133" not in sent
    assert world.settings["token"] not in caplog.text
    assert sent.count(HANDLE) == 1
