"""Check what the command line shows of audiences, drafts and batches: in 80 columns, without control characters."""

import io
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

import screens
import terminal

PERSON = {"clientId": "1", "name": "Maya", "handle": "+491701234567", "detail": None}
FOUND: dict[str, Any] = {
    "matched": 230,
    "items": 183,
    "leftOut": [
        {"reason": "optedOut", "count": 12, "sample": [PERSON, {**PERSON, "name": None}]},
        {"reason": "emptyVariable", "count": 35, "sample": []},
    ],
}
DRAFT: dict[str, Any] = {
    **FOUND,
    "digest": "d" * 64,
    "previews": [{"clientId": "1", "handle": "+491701234567", "body": "Hello Maya,\nsee you.", "why": "first"}],
    "unusual": [{"variable": "client.name", "clientId": "7", "value": "TEST", "why": "a placeholder"}],
    "warnings": ["the text does not say who writes"],
    "forecast": {
        "firstAt": "2026-03-01T09:00:00+00:00",
        "lastAt": "2026-03-02T17:30:00+00:00",
        "isExact": False,
        "binds": "100 per day",
    },
}
BATCH: dict[str, Any] = {
    **DRAFT,
    "id": "0d8b43c7-53ad-4d52-a3a2-06b2b2b5a1f4",
    "status": "draft",
    "name": "Spring",
    "counts": {"pending": 183, "queued": 0, "sent": 0, "failed": 0, "skipped": 0, "unknown": 0},
}


def at(moment: datetime) -> str:
    return f"{moment:%a %H:%M}"


def show(parts: Sequence[RenderableType], width: int = 80) -> str:
    """Print for a terminal of this width, without its colours."""
    output = io.StringIO()
    console = Console(file=output, width=width, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(Text(terminal.printable(part)) if isinstance(part, str) else part)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def test_an_audience_says_who_is_left_out_and_why() -> None:
    text = show(screens.audience(FOUND))
    assert "230 people match. 183 would get a message." in text
    assert "12  opted out" in text
    assert "Maya, +491701234567" in text
    assert "--list REASON:\n    optedOut, emptyVariable" in text


def test_a_draft_shows_texts_unusual_values_warnings_and_the_forecast() -> None:
    text = show(screens.draft(DRAFT, at))
    assert "To +491701234567 (first):\n    Hello Maya,\n    see you." in text
    for words in (
        "TEST",
        "a placeholder",
        "Warning: the text does not say who writes",
        "about Mon 17:30",
        "100 per day",
    ):
        assert words in text
    assert "first message  Sun 09:00" in text


def test_a_batch_says_what_to_do_next() -> None:
    text = show(screens.batch(BATCH, at))
    assert f"python outreach.py send {BATCH['id']}" in text
    assert "python outreach.py send" not in show(screens.batch({**BATCH, "status": "sent"}, at))
    assert "It has paused itself: the last 5 messages failed." in show(
        screens.batch({**BATCH, "status": "paused", "pauseReason": "the last 5 messages failed"}, at)
    )


def test_a_forecast_without_an_end_says_so() -> None:
    forecast = {"firstAt": None, "lastAt": None, "isExact": True, "binds": None}
    assert "last message   no time known" in show(screens.draft({**DRAFT, "forecast": forecast}, at))


def test_nobody_and_nothing_are_said() -> None:
    assert "Nobody is left out for optedOut." in show(screens.left_out("optedOut", []))
    assert "There is no batch." in show(screens.batch_list([]))


def dirty(value: Any) -> Any:
    """Return the document with escape sequences, a bidi override, and great length in each of its texts."""
    if isinstance(value, dict):
        return {
            key: each if key.endswith("At") or key in ("status", "reason", "id") else dirty(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [dirty(each) for each in value]
    return f"\x1b[2J\x9b1m\u202e{value}\x07" + "x" * 200 if isinstance(value, str) else value


@pytest.mark.parametrize("width", [80, 1000])
def test_nothing_raw_reaches_the_terminal_and_no_line_is_wider(width: int) -> None:
    document = dirty(BATCH)
    parts = [*screens.batch(document, at), *screens.left_out("noHandle", [dirty(PERSON)])]
    text = show([*parts, *screens.batch_list([document])], width)
    assert not set(text) & set("\x1b\x9b\x07\u202e")
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_ids_of_a_list_are_whole() -> None:
    text = show(screens.batch_list([{**BATCH, "name": "A name that is rather long for a list of batches"}]))
    assert BATCH["id"] in text
    assert "draft" in text


def test_an_emoji_of_several_signs_stays_whole() -> None:
    assert terminal.printable("👩‍💻 ok") == "👩‍💻 ok"
