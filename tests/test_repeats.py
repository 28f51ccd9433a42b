"""Check that a draft says to how many of its people the same text was sent before."""

import uuid
from datetime import timedelta
from typing import Any

import pytest
from testing import TestData

import composing
import outreach

INTERVAL = timedelta(seconds=30)
EVERYONE = {"v": 1, "where": {"everyone": True}}
TEXT = "Hello {{ client.name }}, this is Ann. Reply STOP to end."


def request(**changes: Any) -> composing.Request:
    values = {"id": uuid.uuid4(), "name": "Spring", "query": EVERYONE, "template": TEXT, **changes}
    return composing.Request(**values)


def draft(world: TestData, **changes: Any) -> composing.Draft:
    return composing.draft(world.databases.quinn, world.databases.icloud, request(**changes), INTERVAL)


def dry_run(world: TestData, **changes: Any) -> composing.DryRun:
    return composing.dry_run(world.databases.quinn, world.databases.icloud, request(**changes), INTERVAL)


@pytest.fixture
def sent(world: TestData) -> composing.Draft:
    """A batch for three people of whom two were sent it."""
    for number in range(3):
        world.client(f"+1415555010{number}")
    made = draft(world)
    composing.send(world.databases.quinn, made.id, made.digest, 3)
    world.quinn("""
        UPDATE outreach_batch_items SET status = 'sent', sent_at = '2026-01-31 09:00Z'
         WHERE handle_key <> '+14155550102'
    """)
    return made


def test_the_same_text_says_who_got_it_before(world: TestData, sent: composing.Draft) -> None:
    world.client("+14155550103")
    for found in (dry_run(world), draft(world)):
        [repeat] = found.repeats
        assert (repeat.batch_id, repeat.name, repeat.people) == (sent.id, "Spring", 2)
        assert repeat.sent_at.isoformat().startswith("2026-01-31T")


@pytest.mark.parametrize("changes", [{"template": TEXT + " "}, {"vars": {"code": "X"}}])
def test_another_text_or_variable_is_no_repeat(world: TestData, sent: composing.Draft, changes: dict[str, Any]) -> None:
    assert dry_run(world, **changes).repeats == []


def test_a_batch_does_not_repeat_itself_and_a_draft_reached_nobody(world: TestData, sent: composing.Draft) -> None:
    world.quinn("UPDATE outreach_batches SET status = 'draft' WHERE id = %(id)s", id=sent.id)
    assert dry_run(world).repeats == []
    world.quinn("UPDATE outreach_batches SET status = 'sent' WHERE id = %(id)s", id=sent.id)
    assert dry_run(world, id=uuid.UUID(sent.id)).repeats == []


def test_the_batch_that_reached_most_of_them_is_the_first_of_three(world: TestData, sent: composing.Draft) -> None:
    for number in range(4):
        other = world.batch(status="sent", template=TEXT, name=f"Batch {number}")
        world.item(other, status="sent", sent_at="2026-02-01 09:00Z", handle_key="+14155550102")
    assert [repeat.people for repeat in dry_run(world).repeats] == [2, 1, 1]


def test_the_command_line_says_so_too(
    world: TestData, sent: composing.Draft, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert outreach.main(["draft", "--everyone", "--template", str(tmp_path / "text"), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "You sent this text before, to 2 of these 3 people: Spring, 2026-01-31 " in said
