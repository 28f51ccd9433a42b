"""Check the import of clients from a CSV file: what is planned, what is written, what is refused."""

import contextlib
import io
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.sql
import pytest
from testing import ROOT, TestData

import db
import handles
import import_columns
import importing
import spreadsheet

MAYA = "Name;Telefon;Stadt\nMaya;+49 170 1234567;Berlin\n"
MAYAS_NUMBER = "+491701234567"


@pytest.fixture(autouse=True)
def region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "DE")


def plan(world: TestData, text: str | bytes, **options: Any) -> importing.Job:
    data = text if isinstance(text, bytes) else text.encode()
    databases = world.databases
    return importing.plan(databases.quinn, databases.icloud, io.BytesIO(data), "people.csv", **options)


def load(world: TestData, text: str | bytes, **options: Any) -> importing.Applied:
    """Plan and apply."""
    return importing.apply(world.databases.quinn, plan(world, text, **options))


def people(world: TestData) -> list[tuple[Any, ...]]:
    """Return each client's name and attributes, and its handles, the primary one first."""
    sql = """
        SELECT name, attributes,
               ARRAY(SELECT handle FROM contact_relationships WHERE client_id = client.id
                      ORDER BY is_primary DESC, handle)
          FROM clients AS client
         ORDER BY name
    """
    return world.quinn(sql)


def counts(job: importing.Job) -> tuple[int, int, int, int]:
    return job.plan.new, job.plan.changed, job.plan.same, job.plan.bad


def refusal(world: TestData, text: str | bytes, **options: Any) -> str:
    """Return the sentence with which a file is refused."""
    with pytest.raises(importing.ImportRefused) as caught:
        load(world, text, **options)
    return str(caught.value)


def bad(world: TestData, text: str | bytes) -> list[tuple[int, str]]:
    """Return the bad lines of a file: their numbers and reasons."""
    return [(line.line, line.reason) for line in plan(world, text).plan.bad_lines]


# --- new, changed, the same ---------------------------------------------------------------------------


def test_new_people_become_clients(world: TestData) -> None:
    assert load(world, MAYA) == importing.Applied(made=1, changed=0, same=0, bad=0)
    assert people(world) == [("Maya", {"stadt": "Berlin"}, [MAYAS_NUMBER])]


def test_the_plan_writes_nothing(world: TestData) -> None:
    assert counts(plan(world, MAYA)) == (1, 0, 0, 0)
    assert people(world) == []


def test_the_same_file_twice_changes_nothing(world: TestData) -> None:
    load(world, MAYA)
    before = world.quinn("SELECT client, client.xmin FROM clients AS client")
    assert counts(plan(world, MAYA)) == (0, 0, 1, 0)
    assert load(world, MAYA) == importing.Applied(made=0, changed=0, same=1, bad=0)
    assert world.quinn("SELECT client, client.xmin FROM clients AS client") == before


@pytest.mark.parametrize(
    "written", ["+491701234567", "0170 1234567", "(0170) 123-4567", "0049 170 1234567", "+49 (0)170 1234567"]
)
def test_a_client_is_found_in_whatever_way_its_number_is_written(world: TestData, written: str) -> None:
    client_id = world.client(written)
    load(world, MAYA)
    assert people(world) == [("Maya", {"stadt": "Berlin"}, [written])]
    assert world.quinn("SELECT id FROM clients") == [(client_id,)]


@pytest.mark.parametrize(
    ("region", "written", "in_file"),
    [
        ("IS", "555 1234", "+3545551234"),  # seven digits, fewer than are compared
        ("MX", "+5215512345678", "55 1234 5678"),
        ("AR", "+5491123456789", "+541123456789"),
        ("IT", "06 1234567", "+39061234567"),
        ("US", "(415) 555-0123", "1-415-555-0123"),
        ("DE", "Maya@Example.com", " maya@example.COM "),
        ("DE", "mäya@example.com", "MÄYA@example.com"),
    ],
)
def test_a_handle_is_found_by_its_key(
    world: TestData, monkeypatch: pytest.MonkeyPatch, region: str, written: str, in_file: str
) -> None:
    monkeypatch.setenv("DEFAULT_REGION", region)
    world.client(written)
    assert counts(plan(world, f"name,handle\nMaya,{in_file}\n")) == (0, 1, 0, 0)


def test_changes_are_shown_old_and_new(world: TestData) -> None:
    load(world, MAYA)
    found = plan(world, "Name;Telefon;Stadt;Alter\nMaja;0170 1234567;Bonn;40\n").plan
    [example] = found.examples
    assert {(each.field, each.old, each.new) for each in example.changes} == {
        ("name", "Maya", "Maja"),
        ("stadt", "Berlin", "Bonn"),
        ("alter", None, "40"),
    }
    assert (found.changed, found.renames, example.line) == (1, 1, 2)


def test_renames_are_the_first_examples(world: TestData) -> None:
    rows = [(f"Person {i}", f"0170 100000{i}", "Berlin") for i in range(9)]
    load(world, "name,phone,city\n" + "".join(",".join(row) + "\n" for row in rows))
    rows = [(name if i < 8 else "Somebody else", phone, "Bonn") for i, (name, phone, _) in enumerate(rows)]
    found = plan(world, "name,phone,city\n" + "".join(",".join(row) + "\n" for row in rows)).plan
    assert (found.changed, found.renames, found.has_many_renames) == (9, 1, False)
    assert [example.name for example in found.examples][:2] == ["Somebody else", "Person 0"]
    assert len(found.examples) == 5


def test_many_renames_are_noticed(world: TestData) -> None:
    load(world, "name,phone\n" + "".join(f"Person {i},0170 100000{i}\n" for i in range(8)))
    found = plan(world, "name,phone\n" + "".join(f"Person {i + 1},0170 100000{i}\n" for i in range(8))).plan
    assert (found.renames, found.people, found.has_many_renames) == (8, 8, True)


def test_a_blank_cell_erases_nothing(world: TestData) -> None:
    load(world, MAYA)
    assert counts(plan(world, "Name;Telefon;Stadt\n ;0170 1234567; \n")) == (0, 0, 1, 0)
    load(world, "Name;Telefon;Stadt;Hund\n ;0170 1234567; ;Rex\n")
    assert people(world) == [("Maya", {"stadt": "Berlin", "hund": "Rex"}, [MAYAS_NUMBER])]


def test_an_attribute_that_is_a_number_is_the_same_as_its_text(world: TestData) -> None:
    load(world, MAYA)
    world.quinn("""UPDATE clients SET attributes = '{"stadt": "Berlin", "alter": 40, "deep": {"a": 1}}'""")
    assert counts(plan(world, "telefon;alter\n0170 1234567;40\n")) == (0, 0, 1, 0)
    load(world, "telefon;stadt\n0170 1234567;Bonn\n")
    assert people(world)[0][1] == {"stadt": "Bonn", "alter": 40, "deep": {"a": 1}}


def test_a_new_client_gets_all_handles_of_its_line_and_the_mobile_number_is_primary(world: TestData) -> None:
    load(world, "name,email,phone,mobile\nMaya,maya@example.com,030 1234567,0170 1234567\n")
    assert people(world)[0][2] == [MAYAS_NUMBER, "+49301234567", "maya@example.com"]


def test_a_known_client_gets_a_further_handle_which_is_not_primary(world: TestData) -> None:
    load(world, MAYA)
    found = plan(world, "phone,email\n0170 1234567,maya@example.com\n")
    assert [(each.field, each.new) for each in found.plan.examples[0].changes] == [("handle", "maya@example.com")]
    importing.apply(world.databases.quinn, found)
    assert people(world)[0][2] == [MAYAS_NUMBER, "maya@example.com"]
    assert world.quinn("SELECT count(*) FROM contact_relationships WHERE is_primary") == [(1,)]


def test_a_couple_with_one_address_stays_two_clients(world: TestData) -> None:
    couple = "name,phone,email\nMaya,0170 1234567,us@example.com\nTom,0170 7654321,us@example.com\n"
    load(world, couple)
    assert [name for name, *_ in people(world)] == ["Maya", "Tom"]
    assert counts(plan(world, couple)) == (0, 0, 2, 0)


def test_a_person_with_a_new_number_stays_one_client(world: TestData) -> None:
    load(world, "name,phone,email\nMaya,0170 1234567,maya@example.com\n")
    load(world, "name,phone,email\nMAYA,0170 7654321,maya@example.com\n")
    assert [handle for *_, handle in people(world)] == [["+491701234567", "+491707654321", "maya@example.com"]]


def test_a_handle_of_two_clients_is_bad(world: TestData) -> None:
    world.client(MAYAS_NUMBER)
    world.client("0170 1234567")
    [(number, reason)] = bad(world, MAYA)
    assert (number, "belongs to 2 clients" in reason) == (2, True)


def test_the_client_whose_primary_handle_it_is_comes_first(world: TestData) -> None:
    first, other = world.client(MAYAS_NUMBER), world.client("+491707654321")
    sql = "INSERT INTO contact_relationships VALUES (%(id)s, '0170 1234567', false)"
    world.quinn(sql, id=other)
    load(world, MAYA)
    assert world.quinn("SELECT id FROM clients WHERE name = 'Maya'") == [(first,)]


def test_a_handle_of_a_deleted_client_belongs_to_nobody(world: TestData) -> None:
    world.client(MAYAS_NUMBER)
    world.quinn("DELETE FROM clients")
    assert counts(plan(world, MAYA)) == (1, 0, 0, 0)


def test_the_second_line_of_a_person_is_bad(world: TestData) -> None:
    text = "name,phone\nMaya,0170 1234567\nTom,0170 7654321\nMaja,+49 170 1234567\n"
    assert bad(world, text) == [(4, "it has the same number as line 2, which counts")]
    load(world, text)
    assert [name for name, *_ in people(world)] == ["Maya", "Tom"]


def test_a_bad_line_is_no_double(world: TestData) -> None:
    assert bad(world, "name,phone\nMaya,0170 1234567,extra\nMaya,0170 1234567\n") == [
        (2, "it has 3 fields, and the header has 2")
    ]


def test_two_lines_with_two_handles_of_one_client_are_doubles(world: TestData) -> None:
    load(world, "name,phone,email\nMaya,0170 1234567,maya@example.com\n")
    text = "name,handle\nMaya B,0170 1234567\nMaya C,maya@example.com\n"
    assert bad(world, text) == [(3, "it is the same client as line 2, which counts")]


# --- opt-outs -----------------------------------------------------------------------------------------


def test_an_import_counts_opt_outs_and_takes_none_back(world: TestData) -> None:
    sql = "INSERT INTO icloud.opt_outs (handle_key, source) VALUES (%(key)s, 'owner')"
    world.icloud(sql, key=MAYAS_NUMBER)
    world.icloud(sql, key="+491700000000")
    assert plan(world, MAYA).plan.opted_out == 1
    load(world, "Name;Telefon;opted_out\nMaya;0170 1234567;false\n")
    assert world.icloud("SELECT count(*) FROM icloud.opt_outs WHERE ended_at IS NULL") == [(2,)]


# --- bad lines ----------------------------------------------------------------------------------------

AS_TEXT = "a spreadsheet has changed this number"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Maya;0170 1234567", "it has 2 fields, and the header has 3"),
        ("Maya;0170 1234567;Berlin;DE", "it has 4 fields, and the header has 3"),
        ("Maya;;Berlin", "it has no phone number and no e-mail address"),
        ("Maya;\0;Berlin", "it contains a NUL character"),
        ("Maya;4,91701E+11;Berlin", AS_TEXT),
        ("Maya;4.91701E+11;Berlin", AS_TEXT),
        ("Maya;491701234567.0;Berlin", AS_TEXT),
        ("Maya;Berlin;0170 1234567", "neither one phone number nor one e-mail address"),
        ("Maya;0170 1234567 / 0171 1234567;Berlin", "neither one phone number nor one e-mail address"),
        ("Maya;maya@example;Berlin", "neither one phone number nor one e-mail address"),
        ("Maya;+1415;Berlin", handles.UNREADABLE_REMEDY),
        ("Maya;+49;Berlin", "neither one phone number"),
        ("Maya;99999999999;Berlin", "no usual number of DEFAULT_REGION"),
        ('Maya;0170 1234567;"Berlin', "a quote is opened and not closed"),
        ('Maya;"0170" 1234567;Berlin', "a quote stands in the wrong place"),
    ],
)
def test_a_bad_line_skips_only_itself(world: TestData, line: str, reason: str) -> None:
    text = f"name;phone;city\nTom;0170 7654321;Bonn\n{line}\nAnna;0170 7654322;Bonn\n"
    [(number, said)] = bad(world, text)
    assert number == 3
    assert reason in said
    assert load(world, text) == importing.Applied(made=2, changed=0, same=0, bad=1)
    assert [name for name, *_ in people(world)] == ["Anna", "Tom"]


def test_a_value_without_a_column_name_is_bad(world: TestData) -> None:
    text = "name;phone;;\nMaya;0170 1234567;;\nTom;0170 7654321;;Bonn\n;;;\n"
    assert bad(world, text) == [(3, "field 4 has a value, and column 4 has no name")]


def test_lines_are_those_of_the_file(world: TestData) -> None:
    text = 'name;phone;note\n"Maya";0170 1234567;"one\ntwo\r\nthree"\n\nTom;1;x\n'
    assert [number for number, _ in bad(world, text)] == [6]
    load(world, text)
    assert people(world)[0][1] == {"note": "one\ntwo\nthree"}


def test_a_quote_that_is_never_closed_costs_one_line(world: TestData) -> None:
    text = 'name,phone\nMaya,"0170 1234567\n' + "".join(f"P{i},0170 {1000000 + i}\n" for i in range(300))
    job = plan(world, text)
    assert counts(job) == (300, 0, 0, 1)


def test_a_quote_that_is_closed_by_a_later_line_costs_one_line(world: TestData) -> None:
    text = 'name,phone\n"Maya,0170 1234567\nTom,0170 7654321\n"Anna",0170 7654322\n'
    assert [number for number, _ in bad(world, text)] == [2]


def test_strict_is_all_or_nothing(world: TestData) -> None:
    job = plan(world, MAYA + "Tom;1;Bonn\n")
    with pytest.raises(importing.ImportRefused, match="1 line is bad, so nothing is imported"):
        importing.apply(world.databases.quinn, job, strict=True)
    assert people(world) == []
    assert importing.apply(world.databases.quinn, plan(world, MAYA), strict=True).made == 1


def test_all_bad_lines_can_be_read(world: TestData) -> None:
    job = plan(world, "name,phone\n" + "Maya,1\n" * 50)
    assert (job.plan.bad, len(job.plan.bad_lines)) == (50, importing.SHOWN)
    assert [line.line for line in importing.bad_lines(world.databases.quinn)] == list(range(2, 52))
    assert [line.line for line in importing.bad_lines(world.databases.quinn, after=49)] == [50, 51]


# --- the file -----------------------------------------------------------------------------------------

UMLAUT = "Name;Telefon;Stadt\nJürgen;+49 170 1234567;Köln\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_files_of_spreadsheets_are_read(world: TestData, encoding: str, delimiter: str, line_end: str) -> None:
    load(world, UMLAUT.replace(";", delimiter).replace("\n", line_end).encode(encoding))
    assert people(world) == [("Jürgen", {"stadt": "Köln"}, [MAYAS_NUMBER])]


def test_excels_separator_line_is_read(world: TestData) -> None:
    assert bad(world, "sep=|\nname|phone\nMaya|0170 1234567\nTom|1\n")[0][0] == 4
    assert load(world, "sep=|\nname|phone\nMaya|0170 1234567\n").made == 1


def test_a_comma_in_a_header_is_no_delimiter(world: TestData) -> None:
    load(world, "Name;Telefon;Ort, Stadt\nMaya;0170 1234567;Berlin, Mitte\n")
    assert people(world)[0][1] == {"ort_stadt": "Berlin, Mitte"}


def test_one_column_is_enough(world: TestData) -> None:
    job = plan(world, "phone\n0170 1234567\n")
    assert job.plan.notes == ["1 person without a name"]
    importing.apply(world.databases.quinn, job)
    assert people(world) == [("", {}, [MAYAS_NUMBER])]


def test_windows_1252_is_refused_until_it_is_named(world: TestData) -> None:
    text = UMLAUT.encode("cp1252")
    said = refusal(world, text)
    assert said.startswith("line 2 is not UTF-8: in Excel, save it as `CSV UTF-8`")
    assert "--encoding windows-1252" in said
    load(world, text, encoding="windows-1252")
    assert people(world)[0][0] == "Jürgen"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"PK\x03\x04 and so on", "an Excel or Numbers workbook"),
        (b"\xd0\xcf\x11\xe0 and so on", "an old Excel workbook"),
        ("name,phone\nMaya,1\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("name,phone\nMaya,1\n".encode("utf-16")[:-1], "the file is not UTF-16"),
        (b"x" * 2_000_000, "line 1 has 1,000,000 characters or more"),
        (b"name,city\nMaya,Berlin\n", "no column is called phone, mobile"),
        (b"Maya,+491701234567\nTom,+491707654321\n", "The first line must have their names"),
        (b"name,phone,city,City\n", "the columns city and City would both become city"),
        (b"name,full name,phone,Name\n", "the columns name and Name would both become name"),
        (b'name,"phone\n', "line 1, which must have the names of the columns: a quote is opened and not closed"),
    ],
)
def test_what_is_no_such_file_is_refused(world: TestData, data: bytes, reason: str) -> None:
    assert reason in refusal(world, data)


def test_an_unknown_encoding_is_refused(world: TestData) -> None:
    assert "there is no encoding klingon" in refusal(world, MAYA, encoding="klingon")


def test_a_header_alone_plans_nothing(world: TestData) -> None:
    assert counts(plan(world, "name,phone\n")) == (0, 0, 0, 0)


def test_memory_does_not_grow_with_the_file(world: TestData) -> None:
    import tracemalloc  # costs time when it runs

    def peak(lines: int) -> int:
        text = "name,email\n" + "".join(f"Person {i},p{i}@example.com\n" for i in range(lines))
        file = io.BytesIO(text.encode())
        tracemalloc.start()
        try:
            importing.plan(world.databases.quinn, world.databases.icloud, file, "people.csv")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < peak(4_000) * 1.3


# --- columns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("First Name", "first_name"), ("E-Mail 1 - Value", "e_mail_1_value"), ("Straße", "strasse"),
        ("Größe (cm)", "grosse_cm"), ("2024", "_2024"), ("имя", "имя"), ("???", ""), ("PLZ", "plz"),
    ],
)  # fmt: skip
def test_headers_become_names_of_templates(header: str, name: str) -> None:
    assert import_columns.normalise(header) == name


def test_the_plan_says_what_becomes_of_each_column(world: TestData) -> None:
    text = "ID,Vorname,Nachname,Handy,E-Mail,Zeitzone,Kommentar,Geheim\n"
    found = plan(world, text, ignore=["Geheim"]).plan
    assert [(column.header, column.target) for column in found.columns] == [
        ("ID", "client.file_id"),
        ("Vorname", "client.first_name, part of clients.name"),
        ("Nachname", "client.last_name, part of clients.name"),
        ("Handy", "handle"),
        ("E-Mail", "handle"),
        ("Zeitzone", "clients.time_zone"),
        ("Kommentar", "client.kommentar"),
        ("Geheim", "left out"),
    ]


def test_first_and_last_name_become_the_name_and_are_kept(world: TestData) -> None:
    load(world, "Vorname;Nachname;Handy\nMaya;Öztürk;0170 1234567\n;Meier;0170 7654321\n")
    assert people(world) == [
        ("Maya Öztürk", {"first_name": "Maya", "last_name": "Öztürk"}, [MAYAS_NUMBER]),
        ("Meier", {"last_name": "Meier"}, ["+491707654321"]),
    ]


def test_columns_can_be_named(world: TestData) -> None:
    text = "who,number,phone\nMaya,0170 1234567,an iPhone\n"
    load(world, text, handle=["number"], name="who")
    assert people(world) == [("Maya", {"phone": "an iPhone"}, [MAYAS_NUMBER])]
    assert refusal(world, text, handle=["numbers"]).startswith("--handle numbers: 0 columns have this name")


def test_time_zone_and_consent_are_taken_from_columns_of_these_names(world: TestData) -> None:
    load(
        world,
        "phone,time_zone,consent_source,consent_at\n0170 1234567,Europe/Berlin,form,24.12.2025\n"
        "0170 7654321,Berlin,form,2025-12-24\n0170 7654322,,form,12/24/2025\n0170 7654323,,,2025-12-24 18:00+01\n",
    )
    sql = "SELECT time_zone, consent_source, consent_at::date::text FROM clients ORDER BY 1"
    assert world.quinn(sql) == [("Europe/Berlin", "form", "2025-12-24"), (None, None, "2025-12-24")]


def test_bad_zones_and_dates_say_how_to_write_them(world: TestData) -> None:
    text = "phone,time_zone,consent_at\n0170 1234567,Berlin,\n0170 7654321,,03/04/2025\n0170 7654322,,2025-02-30\n"
    zone, ambiguous, impossible = (reason for _, reason in bad(world, text))
    assert "write one such as Europe/Berlin" in zone
    assert "write 2025-12-31" in ambiguous
    assert "consent_at: date/time field value out of range" in impossible


def test_new_clients_agreed_by_the_file(world: TestData) -> None:
    world.client("+491707654321")
    load(world, MAYA + "Tom;0170 7654321;Bonn\n")
    sql = "SELECT name, consent_source, now() - consent_at < '1 minute' FROM clients ORDER BY name"
    assert world.quinn(sql) == [("Maya", "people.csv", True), ("Tom", None, None)]


def test_control_characters_are_removed(world: TestData) -> None:
    load(world, "name,phone,city\n\x1b[31mMaya\x07  B,0170 1234567,\x9bBerlin\n")
    assert people(world)[0][:2] == ("[31mMaya B", {"city": "Berlin"})


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "number", "repair"),
    [
        ("0170 1234567", "+491701234567", None),
        ("0170/1234567", "+491701234567", None),
        ("+49 (0)170 1234567", "+491701234567", None),
        ("\u202a+49\u00a0170\u20111234567\u202c", "+491701234567", None),
        ("+49 170 1234567", "+491701234567", None),  # full-width digits
        ("'0170 1234567", "+491701234567", "apostrophe"),
        ("1701234567", "+491701234567", "zero"),
        ("301234567", "+49301234567", "zero"),
        ("491701234567", "+491701234567", "plus"),
        ("4917012345678", "+4917012345678", "plus"),
        ("436641234567", "+436641234567", "plus"),
        ("0043 664 1234567", "+436641234567", None),
        ("16012345678", "+4916012345678", "zero"),  # would be valid in Mississippi, too
        ("maya@example.com", "maya@example.com", None),
        ("Maya.O'Neil@Example.com", "Maya.O'Neil@Example.com", None),
    ],
)
def test_numbers_of_spreadsheets_are_read(cell: str, number: str, repair: str | None) -> None:
    handle = spreadsheet.read_handle(cell)
    assert (handle.address, handle.repair) == (number, repair)
    assert handle.key == handles.key(number)


@pytest.mark.parametrize(
    ("region", "cell", "number"),
    [
        ("US", "(415) 555-0123", "+14155550123"),
        ("US", "14155550123", "+14155550123"),
        ("US", "4915112345678", "+4915112345678"),
        ("FR", "612345678", "+33612345678"),
        ("ES", "612345678", "+34612345678"),
        ("IT", "3331234567", "+393331234567"),
    ],
)
def test_numbers_are_read_by_the_region(monkeypatch: pytest.MonkeyPatch, region: str, cell: str, number: str) -> None:
    monkeypatch.setenv("DEFAULT_REGION", region)
    assert spreadsheet.read_handle(cell).address == number


def test_a_number_without_region_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFAULT_REGION")
    with pytest.raises(ValueError, match="set DEFAULT_REGION"):
        spreadsheet.read_handle("4155550123")  # would be valid in Switzerland


def test_the_plan_says_how_numbers_were_read(world: TestData) -> None:
    text = "phone\n0170 1234567\n1707654321\n436641234567\n+14155550123\nmaya@example.com\nx\n+1415\n"
    found = plan(world, text).plan
    assert {reading.country: reading.count for reading in found.read_as} == {
        "Germany": 2,
        "Austria": 1,
        "United States or Canada": 1,
        "e-mail address": 1,
    }
    assert found.unreadable == 2
    assert found.notes[0].startswith("1 handle without their first 0")


def test_the_key_of_a_handle_is_that_of_its_address_and_its_own() -> None:
    """Opt-outs are looked up by the address, and the import takes a handle that is written like the key for its own."""
    rng = random.Random(19)  # noqa: S311  # no secret
    read = 0
    for _ in range(3000):
        digits = "".join(rng.choice("0012345679") for _ in range(rng.randint(4, 14)))
        with contextlib.suppress(ValueError):
            handle = spreadsheet.read_handle(rng.choice(["", "+", "0", "+52", "+549", "+39", "+49"]) + digits)
            assert handles.key(handle.address) == handle.key == handles.key(handle.key)
            read += 1
    assert read > 500


# --- a platform's own tables --------------------------------------------------------------------------


def replace_clients(world: TestData, columns: str, contact: str = "") -> None:
    """Replace the two stand-ins by a platform's own tables."""
    kind = columns.split(",")[0].split()[1]
    world.quinn("DROP TABLE clients, contact_relationships")
    world.quinn(f"CREATE TABLE clients ({columns})")
    world.quinn(f"CREATE TABLE contact_relationships (client_id {kind}, handle text, is_primary boolean {contact})")


SHOP = "ID;First name;Last name;Phone;E-mail;Visits;Born\n7;Maya;Öztürk;0170 1234567;maya@example.com;3;24.12.1990\n"


def test_a_platform_with_identity_keys_gets_its_columns_filled(world: TestData) -> None:
    replace_clients(
        world,
        "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, first_name text NOT NULL, last_name varchar(10), "
        "email text UNIQUE NOT NULL, visits int NOT NULL DEFAULT 0, born date, status text NOT NULL DEFAULT 'active'",
        ", id bigserial PRIMARY KEY, note text",
    )
    load(world, SHOP, ignore=["ID"])
    [row] = world.quinn("SELECT id, first_name, last_name, email, visits, born::text, status FROM clients")
    assert row == (1, "Maya", "Öztürk", "maya@example.com", 3, "1990-12-24", "active")
    assert counts(plan(world, SHOP, ignore=["ID"])) == (0, 0, 1, 0)
    assert counts(plan(world, SHOP.replace(";3;", ";4;"), ignore=["ID"])) == (0, 1, 0, 0)
    text = "Phone;First name;E-mail;Visits;Last name\n0170 7654321;Tom;t@example.com;;\n0170 7654322;A;;1;\n" + (
        "0170 7654323;B;b@example.com;many;\n0170 7654324;C;c@example.com;1;A very long name\n"
    )
    [(long, too_long), (four, incomplete), (five, no_number)] = sorted(
        bad(world, text), key=lambda line: "too long" not in line[1]
    )
    assert (long, four, five) == (5, 3, 4)
    assert "value too long for type character varying(10)" in too_long
    assert incomplete == "it is a new client, and has no email, which clients requires"
    assert 'Visits: invalid input syntax for type integer: "many"' in no_number
    load(world, text)
    assert world.quinn("SELECT first_name, visits FROM clients ORDER BY id") == [("Maya", 3), ("Tom", 0)]


def test_columns_that_do_not_exist_are_refused_with_their_names(world: TestData) -> None:
    replace_clients(world, "id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text, city text")
    text = "name,phone,city,Shoe Size,dog\nMaya,0170 1234567,Berlin,38,Rex\n"
    assert refusal(world, text).startswith("clients has no column for Shoe Size, dog, and no attributes")
    load(world, text, ignore=["Shoe Size", "dog"])
    assert world.quinn("SELECT name, city FROM clients") == [("Maya", "Berlin")]


def test_an_id_in_the_file_is_never_written(world: TestData) -> None:
    replace_clients(world, "id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, name text")
    assert refusal(world, "id,name,phone\n7,Maya,0170 1234567\n").startswith("clients has no column for id")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uuid PRIMARY KEY", None),
        ("text PRIMARY KEY DEFAULT 'c' || floor(random() * 1e9)::text", None),
        ("bigserial PRIMARY KEY", "1"),
    ],
)
def test_keys_of_several_types(world: TestData, key: str, value: str | None) -> None:
    replace_clients(world, f'id {key}, name text, "Odd ""Name%%s" text')
    load(world, MAYA.replace(";Stadt", "").replace(";Berlin", ""))
    [(made, name)] = world.quinn("SELECT id::text, name FROM clients")
    assert name == "Maya"
    assert made == (value or made)
    assert counts(plan(world, "Name;Telefon\nMaja;0170 1234567\n")) == (0, 1, 0, 0)
    assert world.quinn("SELECT client_id::text, handle FROM contact_relationships") == [(made, MAYAS_NUMBER)]


def test_a_text_key_without_default_allows_changes_only(world: TestData) -> None:
    replace_clients(world, "id text PRIMARY KEY, name text")
    assert "clients.id has no default" in refusal(world, "name,phone\nMaya,0170 1234567\n")
    world.quinn("INSERT INTO clients VALUES ('a', 'Maja')")
    world.quinn("INSERT INTO contact_relationships VALUES ('a', '0170-1234567', true)")
    load(world, "name,phone\nMaya,0170 1234567\n")
    assert world.quinn("SELECT * FROM clients") == [("a", "Maya")]


def test_required_columns_are_named(world: TestData) -> None:
    replace_clients(world, "id bigserial PRIMARY KEY, name text, tenant int NOT NULL, slug text NOT NULL")
    assert "clients requires tenant, slug" in refusal(world, "name,phone\nMaya,0170 1234567\n")
    replace_clients(world, "id bigserial PRIMARY KEY, name text", ", kind text NOT NULL")
    assert "contact_relationships requires kind" in refusal(world, "name,phone\nMaya,0170 1234567\n")


def test_a_constraint_of_the_platform_refuses_everything(world: TestData) -> None:
    replace_clients(world, "id bigserial PRIMARY KEY, name text CONSTRAINT no_toms CHECK (name <> 'Tom')")
    said = refusal(world, "name,phone\nMaya,0170 1234567\nTom,0170 7654321\n")
    assert said.startswith("the database refuses a client (no_toms), so nothing is imported")
    assert world.quinn("SELECT count(*) FROM clients") == [(0,)]


def test_a_table_without_any_column_but_the_key_is_enough(world: TestData) -> None:
    replace_clients(world, "id bigserial PRIMARY KEY")
    assert load(world, "phone\n0170 1234567\n").made == 1
    assert load(world, "phone,email\n0170 1234567,m@example.com\n").changed == 1


def test_odd_column_names_are_quoted(world: TestData) -> None:
    replace_clients(world, 'id bigserial PRIMARY KEY, name text, "имя" text, _50 text, "order" text')
    text = "name,phone,имя,50%,Order\nMaya,0170 1234567,Майя,half,first\n"
    load(world, text)
    assert world.quinn("SELECT * FROM clients") == [(1, "Maya", "Майя", "half", "first")]
    load(world, text.replace("half", "'; DROP TABLE clients; --"))
    assert world.quinn("SELECT _50 FROM clients") == [("'; DROP TABLE clients; --",)]


# --- all or nothing -----------------------------------------------------------------------------------


def test_a_plan_is_applied_only_if_it_still_holds(world: TestData) -> None:
    job = plan(world, MAYA)
    client_id = world.client("0170 1234567")
    with pytest.raises(importing.ImportRefused, match="run the same command again") as caught:
        importing.apply(world.databases.quinn, job)
    assert caught.value.status == 409
    assert world.quinn("SELECT id, name FROM clients") == [(client_id, "somebody")]
    assert importing.apply(world.databases.quinn, plan(world, MAYA)).changed == 1


@pytest.mark.parametrize(
    "other", ["Mia;+49 170 1234567;Berlin", "Maya;+49 170 1234568;Berlin", "Maya;0170 1234567;Bonn"]
)
def test_the_digest_is_of_everything_that_would_be_written(world: TestData, other: str) -> None:
    digest = plan(world, MAYA).plan.digest
    assert plan(world, MAYA).plan.digest == digest
    assert plan(world, f"Name;Telefon;Stadt\n{other}\n").plan.digest != digest


def test_a_plan_is_applied_once(world: TestData) -> None:
    job = plan(world, MAYA)
    importing.apply(world.databases.quinn, job)
    with pytest.raises(importing.ImportRefused):
        importing.apply(world.databases.quinn, job)
    assert len(people(world)) == 1


def test_two_imports_at_once_make_nobody_twice(world: TestData) -> None:
    """Both have planned before either applies."""
    text = "name,phone\n" + "".join(f"P{i},0170 {1000000 + i}\n" for i in range(500))
    both_planned, results = threading.Barrier(2), []

    def run() -> None:
        urls = world.databases
        with contextlib.closing(db.connect(urls.quinn_url)) as quinn, contextlib.closing(
            db.connect(urls.icloud_url)
        ) as icloud:  # fmt: skip
            job = importing.plan(quinn, icloud, io.BytesIO(text.encode()), "people.csv")
            both_planned.wait(20)
            try:
                results.append(importing.apply(quinn, job).made)
            except importing.ImportRefused as error:
                results.append(error.status)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [409, 500]
    assert world.quinn("SELECT count(*), count(DISTINCT handle) FROM contact_relationships") == [(500, 500)]


def test_a_change_of_the_platform_during_apply_is_not_lost(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    load(world, MAYA)
    job = plan(world, MAYA.replace("Berlin", "Bonn"))
    write = importing._write

    def write_late(quinn: Any, job: importing.Job) -> None:
        with contextlib.closing(db.connect(world.databases.quinn_url)) as other:
            db.query(other, "UPDATE clients SET name = 'Maja'")
        write(quinn, job)

    monkeypatch.setattr(importing, "_write", write_late)
    with pytest.raises(importing.ImportRefused, match="run the same command again"):
        importing.apply(world.databases.quinn, job)
    assert people(world)[0][:2] == ("Maja", {"stadt": "Berlin"})


DOOMED = """
import os, signal, sys
import db, importing
query, count = db.query, 0
def doomed(*arguments):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return query(*arguments)
quinn, icloud = db.connect(db.url("quinn")), db.connect(db.url("icloud"))
with open(sys.argv[2], "rb") as file:
    job = importing.plan(quinn, icloud, file, "people.csv")
    db.query = doomed
    importing.apply(quinn, job)
"""


def test_a_process_that_is_killed_leaves_all_or_nothing(world: TestData, tmp_path: Path) -> None:
    """Kill it before each statement of apply, and run it again."""
    path = tmp_path / "people.csv"
    path.write_text("name,phone\nMaya,0170 1234567\nTom,0170 7654321\nAnna,0170 7654322\n")
    sql = "SELECT (SELECT count(*) FROM clients), (SELECT count(*) FROM contact_relationships)"
    for step in range(1, 100):
        world.quinn("TRUNCATE clients, contact_relationships")
        client_id = world.client(MAYAS_NUMBER)
        command = [sys.executable, "-c", DOOMED, str(step), str(path)]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        names = world.quinn("SELECT name FROM clients WHERE id = %(id)s", id=client_id)
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
        after_commit = world.quinn(sql) == [(3, 3)]
        assert (world.quinn(sql), names) in (([(1, 1)], [("somebody",)]), ([(3, 3)], [("Maya",)]))
        assert counts(plan(world, path.read_bytes())) == ((0, 0, 3, 0) if after_commit else (2, 1, 0, 0))
        load(world, path.read_bytes())
        assert world.quinn(sql) == [(3, 3)]
    assert step > 12


def test_a_database_that_fails_in_the_middle_leaves_nothing(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan(world, MAYA)
    monkeypatch.setattr(importing, "_update", lambda job: psycopg2.sql.SQL("SELECT 1 / 0"))
    with pytest.raises((psycopg2.Error, importing.ImportRefused)):
        importing.apply(world.databases.quinn, job)
    assert people(world) == []


def test_only_handles_that_may_match_are_parsed(world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(50):
        world.client(f"0171 {1000000 + i}")
    world.client("0170 1234567")
    parsed: list[str] = []
    key = handles.key

    def record(handle: str) -> str:
        parsed.append(handle)
        return key(handle)

    monkeypatch.setattr(handles, "key", record)
    assert counts(plan(world, MAYA)) == (0, 1, 0, 0)
    assert parsed == ["+49 170 1234567", "0170 1234567"]
