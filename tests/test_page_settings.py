"""Check the page Settings: every setting has words, a refusal stands at its field, a stale form overwrites nothing."""

from typing import Any, Literal

import msgspec
import pytest
from page_browser import Browser
from testing import ROOT, TestData

import setting_fields
import settings


@pytest.fixture
def form(world: TestData) -> dict[str, str]:
    """What a browser sends if nothing was changed."""
    current = settings.read(world.databases.quinn)
    values = {name: setting_fields.as_text(getattr(current, name)) for name in setting_fields.fields()}
    return values | {f"was-{name}": value for name, value in values.items()}


def stored(world: TestData, name: str) -> Any:
    return world.quinn(f"SELECT {name} FROM outreach_settings")[0][0]


def test_every_setting_that_can_be_changed_has_words() -> None:
    assert {*setting_fields.fields()} == {*settings.Changes.__struct_fields__} - {"paused"}
    for name, field in setting_fields.fields().items():
        assert name in setting_fields.MEANINGS, f"setting_fields.MEANINGS lacks {name}"
        assert field.meaning.text
        assert len({each.meaning.label for each in setting_fields.fields().values()}) == len(setting_fields.fields())
    documented = (ROOT / "docs" / "operating.md").read_text()
    for name in setting_fields.fields():
        assert f"| `{name}` |" in documented


def test_a_setting_without_words_appears_all_the_same() -> None:
    class Changes(msgspec.Struct, rename="camel"):
        shout_loudly: bool
        quiet_kind: Literal["sender", "odd"]
        new_limit: settings.Amount | None

    info = msgspec.inspect.type_info(Changes)
    assert isinstance(info, msgspec.inspect.StructType)
    made = [setting_fields._field(field) for field in info.fields]
    assert [field.kind for field in made] == ["tick", "choice", "number"]
    assert made[0].meaning.label == "Shout loudly"
    assert made[1].choices == (("odd", "odd"), ("sender", "where I am"))
    assert made[2].lowest == 0


def test_nothing_changed_changes_nothing(world: TestData, visitor: Browser, form: dict[str, str]) -> None:
    before = settings.read(world.databases.quinn)
    where = visitor.post("/settings", form).headers["Location"]
    assert "Nothing was changed" in visitor.get(where).text
    assert settings.read(world.databases.quinn) == before


@pytest.mark.parametrize(
    ("name", "typed", "sentence"),
    [
        ("max_per_day", "many", "“many” is no whole number from 0"),
        ("max_per_day", "-1", "is no whole number from 0"),
        ("max_per_day", "1.5", "is no whole number from 0"),
        ("max_per_day", "99999999999", "is no whole number from 0"),
        ("approval_days", "0", "is no whole number from 1 to 3,650"),
        ("approval_days", "4000", "is no whole number from 1 to 3,650"),
        ("quiet_hours_start", "9pm", "'9pm' is not HH:MM"),
        ("quiet_hours_end", "25:00", "'25:00' is not HH:MM"),
        ("quiet_hours_tz", "Mars/Base", "Mars/Base"),
        ("quiet_hours_start", "", "“Quiet from” and “Quiet until” belong together: set both, or both to nothing."),
        ("device_id", "5a6a6e1b-0000-4000-8000-000000000000", "“Mac for new people” is not the id of a device"),
    ],
)
def test_a_refused_value_gets_a_sentence_at_its_field_and_stays_typed(
    world: TestData, visitor: Browser, name: str, typed: str, sentence: str
) -> None:
    world.settings(quiet_hours_start="21:00", quiet_hours_end="08:00")
    before = settings.read(world.databases.quinn)
    values = {each: setting_fields.as_text(getattr(before, each)) for each in setting_fields.fields()}
    sent = values | {f"was-{each}": value for each, value in values.items()} | {name: typed, "max_per_hour": "77"}
    shown = visitor.post("/settings", sent)
    assert shown.status_code == 400
    field = shown.text.partition(f'id="e-{name}"')[2].partition("</p>")[0]
    assert sentence.replace("'", "&#39;") in field
    assert 'value="77"' in shown.text
    assert settings.read(world.databases.quinn) == before


@pytest.mark.parametrize(("typed", "value"), [("1,500", 1500), ("1 500", 1500), (" 20 ", 20), ("", None), ("0", 0)])
def test_a_number_may_be_written_as_people_do(
    world: TestData, visitor: Browser, form: dict[str, str], typed: str, value: int | None
) -> None:
    world.settings(max_per_day=7)
    assert visitor.post("/settings", form | {"was-max_per_day": "7", "max_per_day": typed}).status_code == 303
    assert stored(world, "max_per_day") == value


def test_a_stale_form_does_not_take_back_what_was_changed_meanwhile(
    world: TestData, visitor: Browser, form: dict[str, str]
) -> None:
    world.settings(max_per_day=500, max_per_hour=50)
    assert visitor.post("/settings", form | {"min_gap_seconds": "9"}).status_code == 303
    assert (stored(world, "max_per_day"), stored(world, "min_gap_seconds")) == (500, 9), "only what was typed changes"
    clash = visitor.post("/settings", form | {"max_per_day": "8"})
    assert clash.status_code == 400
    assert "it became “500” meanwhile" in clash.text
    assert stored(world, "max_per_day") == 500


def test_the_settings_never_end_or_begin_the_pause_of_everything(
    world: TestData, visitor: Browser, form: dict[str, str]
) -> None:
    world.settings(paused=True)
    visitor.post("/settings", form | {"paused": "false", "was-paused": "true", "max_per_day": "3"})
    assert stored(world, "paused") is True
    assert stored(world, "max_per_day") == 3
