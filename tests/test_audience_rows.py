"""Check the rows of conditions: to the audience and back, errors at their rows, and the choices that are offered."""

import json
from typing import Any

import pytest
from testing import TestData

import audience
import audience_rows
from audience_rows import Row
from client_fields import Fields

PEOPLE = (
    ("Ana", {"city": "Berlin", "visits": "12", "tags": ["new"]}),
    ("<script>alert(1)</script>", {"city": "Berlin", "visits": "3"}),
    ("Bo", {"city": "Köln, Deutz", "vip": True}),
    ("", {"city": "  "}),
)


@pytest.fixture
def fields(world: TestData) -> Fields:
    """The fields of a database with four people and a batch."""
    for number, (name, attributes) in enumerate(PEOPLE):
        client_id = world.client(f"+1415555010{number}")
        sql = "UPDATE clients SET name = %(name)s, attributes = %(attributes)s WHERE id = %(id)s"
        world.quinn(sql, name=name, attributes=json.dumps(attributes), id=client_id)
    world.batch(status="sent", name="Spring")
    return audience.read_fields(world.databases.quinn)


ROWS = [
    ("all", [Row("attributes.city", "eq", "Berlin")]),
    ("any", [Row("attributes.city", "contains", "ber"), Row("name", "ne", "Ana")]),
    ("all", [Row("attributes.city", "in", "Berlin, Hamburg"), Row("attributes.visits", "gte", "5")]),
    ("all", [Row("attributes.visits", "lt", "2.5"), Row("consent_at", "before_days", "30")]),
    ("all", [Row("attributes.vip", "empty"), Row("name", "filled")]),
    ("all", [Row("consent_at", "gt", "2026-01-31"), Row("sent_count", "eq", "0"), Row("handle.kind", "eq", "phone")]),
    ("all", [Row("handle.prefix", "eq", "+1"), Row("last_sent", "within_days", "7")]),
    ("everyone", []),
]


@pytest.mark.parametrize(("mode", "rows"), ROWS)
def test_rows_become_an_audience_and_the_same_rows_again(fields: Fields, mode: str, rows: list[Row]) -> None:
    everyone = {"v": 1, "where": {"everyone": True}}
    query = everyone if mode == "everyone" else audience_rows.to_query(mode, rows, fields)
    assert audience.parse(query, fields) == query
    assert audience_rows.from_query(query, fields) == (mode, rows)


def test_a_single_condition_of_the_command_line_is_a_row(fields: Fields) -> None:
    query = {"v": 1, "where": {"field": "city", "eq": "Berlin"}}
    assert audience_rows.from_query(query, fields) == ("all", [Row("attributes.city", "eq", "Berlin")])


@pytest.mark.parametrize(
    "where",
    [
        {"not": {"field": "city", "eq": "Berlin"}},
        {"all": [{"any": [{"field": "city", "eq": "Berlin"}]}]},
        {"field": "city", "in": ["Köln, Deutz"]},  # the comma would make it two
        {"field": "city", "eq": 5},  # a number; a row would compare with the text 5
        {"field": "city", "eq": ""},
        {"field": "nothing", "eq": "x"},
    ],
)
def test_what_rows_cannot_express_has_no_rows(fields: Fields, where: dict[str, Any]) -> None:
    assert audience_rows.from_query({"v": 1, "where": where}, fields) is None


GOOD = Row("name", "eq", "Ana")


@pytest.mark.parametrize(
    ("rows", "number", "sentence"),
    [
        ([], None, "Say who is meant"),
        ([GOOD, Row("", "eq", "x")], 1, "Choose what to compare"),
        ([GOOD, Row("name", "eq", " ")], 1, "Type a value"),
        ([GOOD, Row("name", "drop table", "x")], 1, "does not fit here"),
        ([GOOD, Row("sent_count", "contains", "1")], 1, "Choose one of: is, is not"),
        ([GOOD, Row("consent_at", "within_days", "a week")], 1, "a number of days"),
        ([GOOD, Row("consent_at", "within_days", "99999999")], 1, "the value must be a whole number"),
        ([GOOD, Row("consent_at", "gt", "tomorrow")], 1, "is no date and no time"),
        ([GOOD, Row("sent_count", "gt", "many")], 1, "whole numbers"),
        ([GOOD, Row("batch.sent", "eq", "x")], 1, "there is no batch"),
        ([GOOD, Row("nobody has this", "eq", "x")], 1, "there is no field"),
        ([GOOD, Row("name", "in", " , ,")], 1, "must be a list with at least one value"),
        ([GOOD, Row("name", "eq", "\0")], 1, "no text in the database can contain"),
        ([GOOD] * 51, 50, "at most 50 conditions"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_at_its_place(
    fields: Fields, rows: list[Row], number: int | None, sentence: str
) -> None:
    with pytest.raises(audience_rows.RowError, match=sentence) as refused:
        audience_rows.to_query("all", rows, fields)
    assert refused.value.row == number
    assert "where" not in str(refused.value)


def test_the_fields_are_those_that_there_are(fields: Fields) -> None:
    choices = {choice.name: choice.label for choice in audience_rows.field_choices(fields)}
    assert choices["attributes.city"] == "city"
    assert choices["batch.sent"] == "got the batch"
    assert not {"id", "attributes"} & set(choices)
    for name in choices:
        assert audience_rows.operator_choices(name, fields)


def test_the_values_are_those_that_people_have_with_their_counts(world: TestData, fields: Fields) -> None:
    quinn = world.databases.quinn

    def offered(name: str) -> list[tuple[str, int | None]]:
        return [(choice.value, choice.people) for choice in audience_rows.values(quinn, name, fields)]

    assert offered("attributes.city") == [("Berlin", 2), ("Köln, Deutz", 1)]
    assert ("<script>alert(1)</script>", 1) in offered("name")
    assert offered("attributes.vip") == [("true", 1)]
    assert offered("attributes.tags") == [], "a list is no value to be chosen"
    assert [value for value, _ in offered("handle.kind")] == ["phone", "email"]
    [batch] = audience_rows.values(quinn, "batch.sent", fields)
    assert batch.label.startswith("Spring, 20")
    assert audience_rows.values(quinn, "", fields) == audience_rows.values(quinn, "nothing%s", fields) == []


def test_values_of_many_people_are_offered_without_counts(
    world: TestData, fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience_rows, "COUNTED_CLIENTS", 3)
    assert all(choice.people is None for choice in audience_rows.values(world.databases.quinn, "name", fields))


def test_a_name_or_a_value_that_turns_the_line_around_is_not_offered(world: TestData, fields: Fields) -> None:
    world.quinn("""UPDATE clients SET name = E'\\u202eturned', attributes = E'{"\\u202ekey": "x", "city": "York"}'""")
    found = audience.read_fields(world.databases.quinn)
    assert not [choice for choice in audience_rows.field_choices(found) if "\u202e" in choice.name]
    assert audience_rows.values(world.databases.quinn, "name", found) == []
    query = {"v": 1, "where": {"field": "\u202ekey", "eq": "x"}}
    assert audience_rows.from_query(query, found) is None, "it is shown as JSON"
