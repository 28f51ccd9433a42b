"""Check what is kept of a form while the owner composes, and the way from the form to a request and back."""

import uuid
from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from testing import TestData

import audience
import composing
import compositions
from audience_rows import Row
from client_fields import Fields
from compositions import ComposeForm

BERLIN = ZoneInfo("Europe/Berlin")
ROWS = [Row("name", "eq", "somebody")]
FORM = ComposeForm(
    name="Spring", mode="all", rows=ROWS, limit="5", days="30", text="Hello {{ client.name }}\n{{ vars.code }}",
    vars="code = SPRING\nurl = https://example.com/?a=b", send_from="2026-03-01T09:00", send_until="2026-03-02T09:00",
    first_n="3", recheck=False,
)  # fmt: skip


def changed(**changes: Any) -> ComposeForm:
    values = {name: getattr(FORM, name) for name in FORM.__struct_fields__}
    return ComposeForm(**{**values, **changes})


@pytest.fixture
def fields(world: TestData) -> Fields:
    world.client()
    return audience.read_fields(world.databases.quinn)


# --- keeping it ---------------------------------------------------------------------------------------


def test_what_was_typed_is_kept(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    assert compositions.find(quinn, composition_id) is None
    assert compositions.save(quinn, composition_id, 0, FORM) == (composition_id, 1, False)
    kept = compositions.find(quinn, composition_id)
    assert kept is not None
    assert (kept.form, kept.version, kept.status) == (FORM, 1, None)
    assert [one.id for one in compositions.unfinished(quinn)] == [composition_id]


def test_two_tabs_do_not_overwrite_each_other(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    compositions.save(quinn, composition_id, 0, changed(tab="a"))
    assert compositions.save(quinn, composition_id, 1, changed(tab="a", text="one")).version == 2
    second = compositions.save(quinn, composition_id, 1, changed(tab="b", text="two"))
    assert second.is_fork
    texts = {one.id: one.form.text for one in compositions.unfinished(quinn)}
    assert texts == {composition_id: "one", second.id: "two"}


def test_a_double_click_and_a_lost_response_are_no_second_composition(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    for tab in ("a", "a", "b"):
        assert compositions.save(quinn, composition_id, 0, changed(tab=tab)).id == composition_id
    assert not compositions.save(quinn, composition_id, 1, changed(tab="b", text="more")).is_fork


def test_a_request_that_was_overtaken_saves_nothing(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    compositions.save(quinn, composition_id, 0, changed(tab="a", sequence=1))
    newest = compositions.save(quinn, composition_id, 1, changed(tab="a", sequence=3, text="all of it"))
    late = compositions.save(quinn, composition_id, 1, changed(tab="a", sequence=2, text="a part"))
    assert late == newest
    assert [one.form.text for one in compositions.unfinished(quinn)] == ["all of it"]


def test_a_composition_is_deleted_30_days_after_its_last_save(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    compositions.save(quinn, composition_id, 0, FORM)
    world.quinn("UPDATE outreach_compositions SET updated_at = now() - interval '31 days'")
    compositions.save(quinn, str(uuid.uuid4()), 0, FORM)
    assert compositions.find(quinn, composition_id) is None


def test_what_is_being_sent_is_no_longer_unfinished(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    compositions.save(quinn, composition_id, 0, FORM)
    batch_id = world.batch(status="draft")
    world.quinn("UPDATE outreach_compositions SET batch_id = %(id)s", id=batch_id)
    assert [one.status for one in compositions.unfinished(quinn)] == ["draft"]
    assert compositions.of_batch(quinn, batch_id) == composition_id
    world.quinn("UPDATE outreach_batches SET status = 'sending'")
    assert compositions.unfinished(quinn) == []


def test_two_requests_for_a_new_draft_agree_on_its_id(world: TestData) -> None:
    quinn, composition_id = world.databases.quinn, str(uuid.uuid4())
    compositions.save(quinn, composition_id, 0, FORM)
    kept = compositions.find(quinn, composition_id)
    assert kept is not None
    first = compositions.renew_batch_id(quinn, composition_id, kept.batch_id)
    assert first != kept.batch_id
    assert compositions.renew_batch_id(quinn, composition_id, kept.batch_id) == first


def test_a_form_with_anything_in_it_can_be_kept(world: TestData) -> None:
    quinn = world.databases.quinn
    odd = changed(text="\0\ud800<script>\u202e" + "x" * 10_000, rows=[Row("\0", "\0", "\0")])
    compositions.save(quinn, composition_id := str(uuid.uuid4()), 0, odd)
    kept = compositions.find(quinn, composition_id)
    assert kept is not None
    assert kept.form.text.endswith("x" * 10_000)


# --- from what was typed to a request -----------------------------------------------------------------


def test_a_form_is_a_request_and_the_batch_is_the_same_form(world: TestData, fields: Fields) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    request, errors = compositions.to_request(FORM, fields, BERLIN)
    assert not errors
    assert request is not None
    assert request.vars == {"code": "SPRING", "url": "https://example.com/?a=b"}
    assert request.send_from is not None
    assert request.send_from.isoformat() == "2026-03-01T09:00:00+01:00"
    assert (request.first_n, request.not_sent_within_days, request.recheck) == (3, 30, False)
    request.id = uuid.uuid4()
    made = composing.draft(quinn, icloud, request, timedelta(seconds=30))
    detail = composing.show(quinn, made.id)
    assert compositions.from_batch(detail, fields, BERLIN) == FORM
    assert composing.draft(quinn, icloud, compositions.request_of(detail), timedelta(seconds=30)).id == made.id


@pytest.mark.parametrize(
    ("changes", "field", "sentence"),
    [
        ({"mode": ""}, "rows", "Say who is meant"),
        ({"rows": []}, "rows", "Say who is meant"),
        ({"mode": "drop"}, "rows", "Say who is meant"),
        ({"rows": [*ROWS, Row("nothing", "eq", "x")]}, "value-1", "There is no field"),
        ({"mode": "json", "json": "{"}, "json", "no JSON"),
        ({"mode": "json", "json": "[" * 5000}, "json", "JSON"),
        ({"mode": "json", "json": '{"v": 1, "where": {"field": "x", "eq": 1}}'}, "json", "Where: there is no field"),
        ({"limit": "-1"}, "limit", "whole number"),
        ({"days": "a month"}, "days", "whole number"),
        ({"days": "99999"}, "days", "at most 36,500"),
        ({"first_n": "0"}, "first_n", "whole number"),
        ({"first_n": "1" * 50}, "first_n", "whole number"),
        ({"send_from": "soon"}, "send_from", "no date"),
        ({"send_until": "2026-02-01T09:00"}, "send_until", "after the beginning"),
        ({"name": "x" * 201}, "name", "more than 200 characters"),
        ({"vars": "code"}, "vars", "Line 1 has no"),
        ({"vars": "a = 1\na = 2"}, "vars", "has a value already"),
    ],
)
def test_what_cannot_be_used_is_a_sentence_at_its_field(
    fields: Fields, changes: dict[str, Any], field: str, sentence: str
) -> None:
    request, errors = compositions.to_request(changed(**changes), fields, BERLIN)
    assert request is None
    assert sentence in errors[field]
    assert errors[field][0].isupper()


def test_a_text_with_half_a_character_is_a_sentence_too(fields: Fields) -> None:
    request, errors = compositions.to_request(changed(text="\ud800"), fields, BERLIN)
    assert request is None
    assert "cannot be sent" in errors["name"]


def test_an_audience_that_rows_cannot_express_is_json(fields: Fields) -> None:
    query = {"v": 1, "where": {"not": {"field": "name", "eq": "x"}}, "limit": 7}
    form = compositions.from_query(query, fields)
    assert (form.mode, form.limit) == ("json", "7")
    assert compositions.to_query(form, fields) == (query, {})
