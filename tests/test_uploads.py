"""Check what becomes of an uploaded file between its plan and its import."""

import contextlib
from typing import Any

import pytest
from testing import TestData

import audience
import batches
import composing
import db
import importing
import personal_data
import uploads

FILE = (
    b"Name,Phone,Consent at\nAna,+14155550123,2026-01-31\nBo,12,\n<script>,+14155550124,03/04/2025\nCy,+14155550125,\n"
)
NOBODY = "5a6a6e1b-0000-4000-8000-000000000000"


def apply(world: TestData, upload_id: str, digest: str | None = None) -> importing.Applied:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    job = uploads.plan(quinn, icloud, upload_id)
    return uploads.apply(quinn, upload_id, job, digest or job.plan.digest)


def names_of(world: TestData, query: dict[str, Any]) -> list[str]:
    """Return the names of an audience."""
    fields = audience.read_fields(world.databases.quinn)
    where, parameters = audience.condition(audience.parse(query, fields), fields)
    statement = f"SELECT name FROM clients AS client WHERE {where.as_string(world.databases.quinn)} ORDER BY name"
    return [name for (name,) in db.query(world.databases.quinn, statement, parameters)]


def test_an_imported_file_is_an_audience_of_those_who_were_in_it(world: TestData) -> None:
    world.client("+14155550999")
    world.quinn("UPDATE clients SET name = 'Somebody else'")
    upload_id = uploads.add(world.databases.quinn, FILE, "people.csv")
    assert apply(world, upload_id).made == 2
    assert names_of(world, uploads.audience(upload_id)) == ["Ana", "Cy"]
    again = uploads.add(world.databases.quinn, FILE, "people.csv")
    assert again != upload_id
    assert apply(world, again).same == 2, "also those who were known are the people of the file"
    assert names_of(world, uploads.audience(again)) == ["Ana", "Cy"]


def test_the_file_is_erased_when_it_is_imported(world: TestData) -> None:
    upload_id = uploads.add(world.databases.quinn, FILE, "people.csv")
    apply(world, upload_id)
    assert world.quinn("SELECT content, people FROM outreach_imports") == [(None, 2)]
    with pytest.raises(batches.Refused, match="imported already"):
        apply(world, upload_id)
    assert uploads.find(world.databases.quinn, upload_id).applied_at is not None


def test_of_two_requests_at_the_same_time_one_imports(world: TestData) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    apply(world, uploads.add(quinn, FILE, "people.csv"))
    upload_id = uploads.add(quinn, FILE, "people.csv")
    with contextlib.closing(db.connect(world.databases.quinn_url)) as other:
        jobs = [uploads.plan(conn, icloud, upload_id) for conn in (quinn, other)]
        uploads.apply(quinn, upload_id, jobs[0], jobs[0].plan.digest)
        with pytest.raises(importing.ImportRefused, match="imported already"):
            uploads.apply(other, upload_id, jobs[1], jobs[1].plan.digest)


def test_an_upload_that_nobody_imports_is_erased_after_a_day(world: TestData) -> None:
    quinn = world.databases.quinn
    upload_id = uploads.add(quinn, FILE, "people.csv")
    assert uploads.add(quinn, FILE, "people.csv") == upload_id, "a double click is one upload"
    world.quinn("UPDATE outreach_imports SET created_at = now() - interval '25 hours'")
    uploads.add(quinn, b"other", "other.csv")
    with pytest.raises(batches.Refused, match="no longer here"):
        uploads.find(quinn, upload_id)
    with pytest.raises(batches.Refused, match="no longer here"):
        uploads.find(quinn, NOBODY)


def test_a_plan_that_no_longer_holds_writes_nothing(world: TestData) -> None:
    quinn = world.databases.quinn
    upload_id = uploads.add(quinn, FILE, "people.csv")
    seen = uploads.plan(quinn, world.databases.icloud, upload_id).plan.digest
    world.client("+14155550123")
    with pytest.raises(batches.Refused, match="somebody has changed the clients"):
        apply(world, upload_id, seen)
    assert world.quinn("SELECT count(*) FROM clients") == [(1,)]
    assert apply(world, upload_id).made == 1


def test_a_bad_line_names_its_cell(world: TestData) -> None:
    quinn = world.databases.quinn
    upload_id = uploads.add(quinn, FILE + b"Di,+14155550126\n", "people.csv")
    bad = uploads.plan(quinn, world.databases.icloud, upload_id).plan.bad_lines
    assert [(line.line, line.column) for line in bad] == [(3, "Phone"), (4, "Consent at"), (6, None)]
    header, rows = uploads.read_rows(quinn, upload_id, None, [line.line for line in bad])
    assert header == ["Name", "Phone", "Consent at"]
    assert rows[3] == ["Bo", "12", ""]
    assert rows[6] == ["Di", "+14155550126"]


def test_the_options_say_which_column_is_what(world: TestData) -> None:
    quinn = world.databases.quinn
    upload_id = uploads.add(quinn, b"Who,Reach\nAna,+14155550123\n", "people.csv")
    with pytest.raises(importing.ImportRefused, match="no column is called"):
        uploads.plan(quinn, world.databases.icloud, upload_id)
    assert uploads.header(quinn, upload_id, None) == ["Who", "Reach"]
    uploads.set_options(quinn, upload_id, uploads.Options(handle=["Reach"], name="Who"))
    assert apply(world, upload_id).made == 1
    assert world.quinn("SELECT name FROM clients") == [("Ana",)]


def test_the_same_file_again_says_what_was_sent_to_its_people(world: TestData) -> None:
    quinn = world.databases.quinn
    first = uploads.add(quinn, FILE, "people.csv")
    assert uploads.earlier(quinn, first) is None
    apply(world, first)
    again = uploads.add(quinn, FILE, "people again.csv")
    before = uploads.earlier(quinn, again)
    assert before is not None
    assert (before.file, before.people, before.sent) == ("people.csv", 2, 0)
    batch_id = world.batch(status="sent", name="Spring")
    for (client_id,) in world.quinn("SELECT id FROM clients"):
        world.item(batch_id, client_id, status="sent", sent_at="now")
    before = uploads.earlier(quinn, again)
    assert before is not None
    assert (before.batch_id, before.batch_name, before.sent) == (batch_id, "Spring", 2)


def test_forget_erases_who_was_in_a_file_and_files_that_wait(world: TestData) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    apply(world, upload_id := uploads.add(quinn, FILE, "people.csv"))
    uploads.add(quinn, FILE + b"x", "more.csv")
    [imported] = personal_data.show_person(quinn, icloud, "+1 415 555 0123")["imports"]
    assert imported["file"] == "people.csv"
    personal_data.forget(quinn, icloud, "+1 415 555 0123")
    assert world.quinn("SELECT count(*) FROM outreach_import_people") == [(1,)]
    assert world.quinn("SELECT id::text FROM outreach_imports") == [(upload_id,)]


def test_a_draft_to_the_people_of_a_file_can_be_made(world: TestData) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    apply(world, upload_id := uploads.add(quinn, FILE, "people.csv"))
    found = composing.search(quinn, icloud, composing.Request(query=uploads.audience(upload_id)))
    assert (found.matched, found.items) == (2, 2)


@pytest.mark.parametrize("key", ["BIGINT GENERATED ALWAYS AS IDENTITY", "TEXT DEFAULT 'c' || gen_random_uuid()"])
def test_a_file_of_a_platform_with_other_keys_is_an_audience_too(empty_database: str, key: str) -> None:
    with contextlib.closing(db.connect(empty_database)) as conn:
        db.query(conn, f"CREATE TABLE clients (id {key} PRIMARY KEY, name TEXT)")
        for part in ("icloud", "quinn"):
            db.migrate(empty_database, part)
        upload_id = uploads.add(conn, b"Name,Phone\nAna,+14155550123\n", "people.csv")
        job = uploads.plan(conn, conn, upload_id)
        assert uploads.apply(conn, upload_id, job, job.plan.digest).made == 1
        found = composing.search(conn, conn, composing.Request(query=uploads.audience(upload_id)))
        assert (found.matched, found.items) == (1, 1)
        personal_data.forget(conn, conn, "+14155550123")
        assert db.query(conn, "SELECT count(*) FROM outreach_import_people") == [(0,)]
