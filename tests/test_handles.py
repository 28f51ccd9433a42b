"""Check handles: their form for Messages, their key, their mask in logs, and what the dispatcher sends."""

import pytest
from helpers import logged_problems, tick
from testing import TestData

import dispatcher
import handles
import runtime


@pytest.fixture(autouse=True)
def no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFAULT_REGION", raising=False)


@pytest.mark.parametrize(
    ("handle", "region", "written"),
    [
        ("+1 (415) 555-0123", None, "+14155550123"),
        ("(415) 555-0123", "US", "+14155550123"),
        ("415.555.0123", "us", "+14155550123"),
        ("0170 1234567", "DE", "+491701234567"),
        ("0049 170 1234567", "DE", "+491701234567"),
        ("+49 170 1234567", "US", "+491701234567"),
        ("+800 12345678", None, "+80012345678"),
        ("+52 1 55 1234 5678", None, "+525512345678"),
        ("+54 9 11 1234-5678", None, "+5491112345678"),
        ("Jane@Example.com", None, "Jane@Example.com"),
        ("+1 555 0123", None, None),
        ("0170 1234567", None, None),
        ("911", "US", None),
        ("+99912345678", None, None),
        ("call me", "US", None),
        ("1-800-FLOWERS", "US", None),
    ],
)
def test_number_is_sent_in_e164(
    monkeypatch: pytest.MonkeyPatch, handle: str, region: str | None, written: str | None
) -> None:
    if region:
        monkeypatch.setenv("DEFAULT_REGION", region)
    assert handles.to_send(handle) == written


@pytest.mark.parametrize(
    "ways",
    [
        ("+14155550123", "(415) 555-0123", "1 415 555 0123", "415-555-0123"),
        ("+525512345678", "+52 1 55 1234 5678", "+5215512345678"),
        ("+541112345678", "+54 9 11 1234 5678"),
        ("Jane@Example.com", "jane@example.COM"),
    ],
)
def test_all_spellings_of_handle_share_key(monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "US")
    assert len({handles.key(way) for way in ways}) == 1


def test_key_of_unreadable_number_is_its_digits() -> None:
    assert handles.key("0170 123-4567") == handles.key("(0170) 1234567") == "01701234567"


def test_unknown_region_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "UK")
    with pytest.raises(runtime.ConfigError, match="DEFAULT_REGION is 'UK': set it to a country's two letters"):
        handles.default_region()


@pytest.mark.parametrize(
    ("handle", "shown"),
    [
        ("+14155552671", "+1415•••71"), ("14155552671", "1415•••71"), ("+491701234567", "+4917•••67"),
        ("jane.doe@example.com", "j•••@example.com"), ("@example.com", "•••@example.com"),
        ("5550100123", "•••23"), ("(415) 555-0123", "•••23"), ("911", "•••11"), ("", "•••"),
    ],
)  # fmt: skip
def test_log_masks_handle(handle: str, shown: str) -> None:
    assert handles.mask_handle(handle) == shown


def test_dispatch_sends_e164_or_unreadable_number_unchanged(
    world: TestData,
    mac_sync: dispatcher.SendQueueClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "US")
    world.device()
    for handle in ("(415) 555-0123", "a@example.com", "555 0123"):
        world.batch(clients=[world.client(handle)])
    tick(world, mac_sync)
    written = world.icloud("SELECT to_handle FROM icloud.send_queue ORDER BY to_handle")
    assert written == [("+14155550123",), ("555 0123",), ("a@example.com",)]
    [record] = logged_problems(caplog)
    assert "number cannot be read, it is passed on as it is" in record.message
    assert "set DEFAULT_REGION" in record.message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("STOP", "STOP"), ("Stop.", "STOP"), ("  stop ! ", "STOP"), ("STOP\u2026", "STOP"), ("ARRÊT!!", "ARRET"),
        ("arre\u0302t", "ARRET"), ("Opt  out", "OPT OUT"), ("opt\u00a0out", "OPT OUT"), ("ｓｔｏｐ", "STOP"),
        ("abmelden", "ABMELDEN"), ("Baja.", "BAJA"), ("stop\ufe0f", "STOP"), ("start", "START"), ("Unstop!", "UNSTOP"),
        ("stop by at 5?", None), ("Reply STOP to end", None), ("Liked “Reply STOP …”", None), ("!stop", None),
        ("stopp it", None), ("nonstop", None), ("", None), ("…", None), ("STOP STOP", None), ("s t o p", None),
    ],
)  # fmt: skip
def test_a_reply_counts_when_the_whole_of_it_is_a_word(text: str, word: str | None) -> None:
    assert handles.reply_word(text) == word


def test_each_word_is_written_as_it_is_recognised() -> None:
    for word in handles.STOP_WORDS | handles.START_WORDS:
        assert handles.reply_word(f" {word.lower()}. ") == word
    assert not handles.STOP_WORDS & handles.START_WORDS
