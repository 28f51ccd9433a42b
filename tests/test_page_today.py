"""Check what Today says, and what a pause of everything does."""

import time
from datetime import timedelta
from typing import Any

import psycopg2
import pytest
from helpers import sync, tick
from page_browser import Browser
from page_world import PageWorld
from testing import DeviceClient, TestData

import dispatcher
import page
import page_today
import pausing
import people


def pause(world: TestData) -> pausing.Paused:
    return pausing.pause_all(world.databases.quinn, lambda: world.databases.icloud)


# --- pause and resume everything ----------------------------------------------------------------------


def test_a_pause_takes_back_at_once_what_no_mac_has_collected(
    world: TestData, mac_sync: dispatcher.SendQueueClient, mini: DeviceClient
) -> None:
    world.batch(1)
    batch_id = world.batch(1)
    tick(world, mac_sync)
    first, second = mini.peek()["items"]
    assert mini.collect(first["id"]).status_code == 200
    assert pause(world) == pausing.Paused(withdrawn=1, beyond_recall=1)
    assert mini.collect(second["id"]).status_code != 200
    mini.result(first["id"], sentAt="2026-04-22T12:00:00Z")
    sync(world)
    assert sorted(world.statuses()) == ["pending", "sent"]
    tick(world, mac_sync)
    assert sorted(world.statuses()) == ["pending", "sent"], "nothing more is enqueued"
    assert pausing.resume_all(world.databases.quinn)
    tick(world, mac_sync)
    assert "queued" in world.statuses()
    assert batch_id


def test_a_pause_again_is_harmless_and_a_resume_of_nothing_says_so(world: TestData) -> None:
    world.device()
    assert pause(world) == pause(world) == pausing.Paused(0, 0)
    assert pausing.resume_all(world.databases.quinn)
    assert not pausing.resume_all(world.databases.quinn)


def test_a_pause_leaves_a_message_that_was_put_in_by_hand(world: TestData) -> None:
    row_id = world.row(world.device())
    assert pause(world).withdrawn == 0
    assert world.row_columns(row_id, "status") == "queued"


def test_if_the_queues_database_is_down_everything_is_paused_all_the_same(world: TestData) -> None:
    def refuse() -> Any:
        raise psycopg2.OperationalError("connection refused")

    paused = pausing.pause_all(world.databases.quinn, refuse)
    assert paused == pausing.Paused(None, 0)
    assert world.quinn("SELECT paused FROM outreach_settings") == [(True,)]
    assert "nothing was taken back from it yet" in page_today.pause_sentence(paused)


@pytest.mark.parametrize(
    ("withdrawn", "beyond_recall", "sentence"),
    [
        (0, 0, "0 messages were taken back from the queue. No message is under way."),
        (1, 1, "1 message was taken back from the queue. 1 message is beyond recall"),
        (1200, 2, "1,200 messages were taken back from the queue. 2 messages are beyond recall"),
    ],
)
def test_a_pause_says_what_it_took_back(withdrawn: int, beyond_recall: int, sentence: str) -> None:
    assert sentence in page_today.taken_back(withdrawn, beyond_recall)


# --- what Today says ----------------------------------------------------------------------------------


def test_the_verdict_is_first_and_names_the_batch_with_a_link(world: TestData, visitor: Browser) -> None:
    shop = PageWorld(world)
    batch_id = shop.batch(["Jane", "Joe"], name="Spring <hours>")
    shown = visitor.get("/").text
    assert f'<a href="/batch/{batch_id}" id="v-{batch_id}">Spring &lt;hours&gt;</a>' in shown
    assert shown.index("<h1") < shown.index("<h2")
    assert "Sending: next item of" in shown


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"paused": True}, "Held: paused."),
        ({"max_per_day": 0}, "Held: “Messages in a day” is 0."),
        ({"last_tick_at": None}, "Dispatcher not running"),
    ],
)
def test_the_verdict_says_why_nothing_is_sent_in_the_words_of_the_page(
    world: TestData, visitor: Browser, settings: dict[str, Any], verdict: str
) -> None:
    PageWorld(world).batch(["Jane"])
    world.settings(**settings)
    shown = visitor.get("/").text
    assert verdict in shown
    assert "UPDATE outreach_settings" not in shown, "the page has a button for it"
    assert ("Resume everything" in shown) is (settings.get("paused") is True)
    assert ('href="/settings" id="to-settings"' in shown) is ("max_per_day" in settings)


def test_a_batch_that_paused_itself_is_said_once(world: TestData, visitor: Browser) -> None:
    shop = PageWorld(world)
    shop.batch(["Jane"])
    shop.batch(["Joe"], name="Thank you", status="paused", pause_reason="the last 5 messages failed")
    shown = visitor.get("/").text
    needs = shown[shown.index("Needs you") : shown.index("Being sent")]
    assert needs.count("the last 5 messages failed") == 1
    assert "Thank you</a> paused itself" in needs


def test_an_opt_out_of_nobody_needs_the_owner_and_is_not_asked_for_at_each_refresh(
    world: TestData, visitor: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = PageWorld(world)
    shop.reply("jane@example.com")
    shop.reply("+14155550123")
    world.client("(415) 555-0123".replace("(", "+1 ("))
    reads = []
    read = people.recently_unassigned

    def count_reads(*where: Any) -> Any:
        reads.append(where)
        return read(*where)

    monkeypatch.setattr(people, "recently_unassigned", count_reads)
    for _ in range(3):
        assert "1 opt-out from an unknown number or address" in visitor.get("/").text
    assert len(reads) == 1


def test_an_opt_out_from_long_ago_is_not_on_today(world: TestData) -> None:
    shop = PageWorld(world)
    shop.reply("jane@example.com")
    databases = world.databases
    assert len(people.recently_unassigned(databases.quinn, databases.icloud)) == 1
    world.icloud("UPDATE icloud.opt_outs SET created_at = now() - interval '31 days'")
    assert not people.recently_unassigned(databases.quinn, databases.icloud)


def test_a_value_is_remembered_for_its_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    site = page.Site("x" * 16, "", "", timedelta(), None)
    values = iter(range(9))
    assert [site.remember("a", 60, lambda: next(values)) for _ in range(2)] == [0, 0]
    now += 61
    assert site.remember("a", 60, lambda: next(values)) == 1
    site.forget()
    assert site.remember("a", 60, lambda: next(values)) == 2


def test_without_anything_the_page_says_where_to_begin(world: TestData, visitor: Browser) -> None:
    shown = visitor.get("/").text
    assert "There is no Mac yet." in shown
    assert "Write a message" in shown


def test_right_after_a_verb_the_page_shows_what_it_did(world: TestData, visitor: Browser) -> None:
    PageWorld(world).batch(["Jane", "Joe"])
    for _ in range(3):
        assert "Sending: next item of" in visitor.get("/").text
        assert "Held: paused." in visitor.get(visitor.post("/pause").headers["Location"]).text
        visitor.post("/resume", {"seen_at": str(int(time.time()))})
