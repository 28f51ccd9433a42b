"""The sender's view of texts and addresses: the decoder of attributedBody, what counts as the same, STOP words."""

from __future__ import annotations

import unicodedata

import fake_messages
import mac_sender
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.mac

TEXTS = st.text(st.characters(codec="utf-8"), max_size=400)
TRICKY = st.sampled_from([
    "", "\0", "\0 leads", "\u2184", "a" * 127, "a" * 128, "a" * 255, "a" * 256, "ä" * 32_768, "🎉" * 40_000,
    "\x84\x01+", "+", "NSString", "\ufeffBOM", "86 84", "\x86\x84", "streamtyped", "é" * 63 + "x",
])  # fmt: skip


@given(TEXTS | TRICKY, st.booleans())
def test_what_is_encoded_is_decoded(text: str, mutable: bool) -> None:
    assert mac_sender.decode_body(fake_messages.encode_body(text, mutable)) == text


@given(TEXTS | TRICKY, st.data())
def test_a_body_that_is_cut_off_in_its_text_gives_nothing(text: str, data: st.DataObject) -> None:
    body = fake_messages.encode_body(text)
    end = body.rindex(b"\x86\x84\x02iI")
    assert mac_sender.decode_body(body[: data.draw(st.integers(0, end))]) is None


@given(TEXTS.filter(bool), st.data())
def test_a_wrong_length_gives_nothing_or_the_text(text: str, data: st.DataObject) -> None:
    body = bytearray(fake_messages.encode_body(text))
    at = body.index(b"\x84\x01+") + 3
    body[at] = data.draw(st.integers(0, 255))
    found = mac_sender.decode_body(bytes(body))
    if found is not None and found != text:  # the end marker is an 0x86, which may be part of a letter
        assert b"\x86" in text.encode() or len(found) > len(text)


@given(st.binary(max_size=300))
def test_anything_else_gives_nothing(blob: bytes) -> None:
    assert mac_sender.decode_body(blob) is None
    mac_sender.decode_body(mac_sender.HEADER + blob)
    mac_sender.decode_body(mac_sender.HEADER + mac_sender.MARKER + blob)


@pytest.mark.parametrize("value", [None, 7, "text", b"", mac_sender.HEADER])
def test_no_body_is_no_text(value: object) -> None:
    assert mac_sender.decode_body(value) is None


@pytest.mark.parametrize(
    "length", [b"\x85", b"\x83\x02", b"\x84\x02", b"\x92", b"\xff", b"\x80", b"\x81\x02", b"\x82\x02\x00"]
)
def test_a_length_that_is_none_gives_nothing(length: bytes) -> None:
    assert mac_sender.decode_body(mac_sender.HEADER + mac_sender.MARKER + length + b"ab\x86\x84") is None


def test_utf_16_gives_nothing() -> None:
    text = "Hello".encode("utf-16")
    assert mac_sender.decode_body(mac_sender.HEADER + mac_sender.MARKER + bytes([len(text)]) + text + b"\x86") is None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("It's \"on\"", "It’s “on”"), ("wait -- what...", "wait — what…"), ("a\r\nb", "a\nb"), ("a\u2028b", "a\nb"),
        ("Hi  \n", "Hi"), ("❤️", "❤"), ("x\u200by", "xy"), ("é", "e\u0301"), ("2-3", "2–3"),
    ],
)  # fmt: skip
def test_what_messages_changes_makes_no_difference(ours: str, theirs: str) -> None:
    assert mac_sender.digest(ours) == mac_sender.digest(theirs)


@pytest.mark.parametrize(
    ("one", "other"), [("🎉", "🙈"), ("Hi!", "Hi?"), ("See you", "see you"), ("1", "2"), ("", "x")]
)
def test_other_texts_are_other_texts(one: str, other: str) -> None:
    assert mac_sender.digest(one) != mac_sender.digest(other)


@given(TEXTS)
def test_folding_twice_changes_nothing_more(text: str) -> None:
    assert mac_sender.fold(mac_sender.fold(text)) == mac_sender.fold(text)


@given(TEXTS)
def test_a_missing_text_equals_none(text: str) -> None:
    assert mac_sender.digest(text) != mac_sender.digest(None)


@pytest.mark.parametrize("text", [
    "STOP", "stop", " Stop. ", "ARRÊT!!", "arret", "Unsubscribe", "opt out", "Opt  Out.", "OPTOUT", "Stop…", "STOPP",
    "baja", "Quit?", "\ufffcSTOP", "stop\u200b", "End\n", unicodedata.normalize("NFD", "Arrêt"), "CANCEL ...", "stop !",
])  # fmt: skip
def test_a_whole_text_that_is_a_word_counts(text: str) -> None:
    assert mac_sender.reply_word(text) in mac_sender.STOP_WORDS


@pytest.mark.parametrize("text", ["start", "START!", "Unstop."])
def test_a_start_word_counts(text: str) -> None:
    assert mac_sender.reply_word(text) in mac_sender.START_WORDS


@pytest.mark.parametrize("text", [
    "", "stop by at 5?", "Count me in! We have to STOP this bill", 'Loved “Reply STOP to end”', "non-stop", "STOP STOP",
    "don't stop", "!!!", "the end", "🛑",
])  # fmt: skip
def test_a_text_that_only_has_a_word_in_it_does_not_count(text: str) -> None:
    assert mac_sender.reply_word(text) is None


@pytest.mark.parametrize(("handle", "expected"), [
    ("+14155550123", "+14155550123"), ("+1 (415) 555-0123", "+14155550123"), ("+49.30.123456", "+4930123456"),
    ("anna@example.com", "anna@example.com"), (" Anna@Example.com ", "Anna@Example.com"),
    ("4155550123", None), ("chat123456789", None), ("iMessage;-;+14155550123", None), ("any;+;chat1@a.b", None),
    ("", None), ("+1", None), ("+0123456789", None), ("+1415555012345678", None), ("+١٤١٥٥٥٥٠١٢٣", None), ("a@b", None),
    ("a b@c.de", None), ("+14155550123\nx", None), ("urn:biz:123", None),
])  # fmt: skip
def test_an_address_is_a_number_or_an_e_mail_address(handle: str, expected: str | None) -> None:
    assert mac_sender.address(handle) == expected


@given(st.text(max_size=40))
def test_no_address_is_a_groups(handle: str) -> None:
    found = mac_sender.address(handle)
    assert found is None or (";" not in found and (found[0] == "+" or "@" in found))


@pytest.mark.parametrize(("one", "other"), [
    ("+1 (415) 555-0123", "+14155550123"), ("Anna@Example.com", "anna@example.com"),
    ("+5215512345678", "+525512345678"), ("+5491123456789", "+541123456789"),
])  # fmt: skip
def test_one_address_has_one_key(one: str, other: str) -> None:
    assert mac_sender.key(one) == mac_sender.key(other)


def test_an_account_is_known_by_its_address() -> None:
    assert mac_sender.login("E:Owner@example.com") == mac_sender.key("owner@example.com")
    assert mac_sender.login("P:+14155550123") == "+14155550123"


@given(st.floats(0, 4e9))
def test_an_instant_survives_the_server(moment: float) -> None:
    found = mac_sender.from_iso(mac_sender.to_iso(moment))
    assert found is not None
    assert abs(found - moment) < 2e-6


@pytest.mark.parametrize(
    "text", [None, 7, "", "yesterday", "2026-11-25", "2026-13-25T07:00:00Z", "2026-11-25T07:00:00"]
)
def test_no_instant_is_none(text: object) -> None:
    assert mac_sender.from_iso(text) is None


def test_instants_with_offsets_and_fractions() -> None:
    assert mac_sender.from_iso("2001-01-01T01:00:00+01:00") == mac_sender.APPLE_EPOCH
    assert mac_sender.from_iso("2001-01-01T00:00:00.25Z") == mac_sender.APPLE_EPOCH + 0.25


@given(st.from_regex(r"\+[1-9][0-9]{6,14}|[a-z]{2,9}@[a-z]{2,9}\.de", fullmatch=True))
def test_a_mask_hides_most_of_a_handle(handle: str) -> None:
    assert handle not in mac_sender.mask_handle(handle)
