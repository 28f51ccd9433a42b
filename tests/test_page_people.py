"""Check how the owner's page finds people, also in a platform's own tables, and what its forms refuse."""

import csv
import io

import pytest
from page_browser import Browser
from page_world import PageWorld
from testing import TestData

import opt_outs
import page_batch
import people

NOBODY = "5a6a6e1b-0000-4000-8000-000000000000"


@pytest.fixture
def shop(world: TestData) -> PageWorld:
    return PageWorld(world)


def names(world: TestData, text: str) -> list[str | None]:
    return [known.name for known in people.find(world.databases.quinn, text)]


# --- finding ------------------------------------------------------------------------------------------


def test_a_person_is_found_by_number_address_id_and_part_of_the_name(world: TestData, shop: PageWorld) -> None:
    jane = shop.client("Jane Doe", "+447700900111")
    shop.client("Marijane Smith", "mary@example.com")
    shop.client("100 % Jörg_", "+447700900113")
    assert names(world, " +44 (7700) 900-111 ") == ["Jane Doe"]
    assert names(world, "MARY@example.com") == ["Marijane Smith"]
    assert names(world, jane) == ["Jane Doe"]
    assert names(world, "JANE") == ["Jane Doe", "Marijane Smith"], "first the names that begin with it"
    assert names(world, "jörg") == ["100 % Jörg_"]
    assert names(world, "%") == ["100 % Jörg_"], "no pattern: it is looked for as it is"


@pytest.mark.parametrize("text", ["", "   ", "nobody", "+4477009", "\x00", "\ud800", "' OR 1=1 --", "x" * 10_000, "%s"])
def test_what_fits_nobody_finds_nobody(world: TestData, shop: PageWorld, text: str) -> None:
    shop.client("Jane Doe")
    assert names(world, text) == []


def test_a_search_has_an_end(world: TestData, shop: PageWorld) -> None:
    for number in range(people.MAX_FOUND + 3):
        shop.client(f"Jane {number}")
    assert len(names(world, "jane")) == people.MAX_FOUND


@pytest.mark.new_clone
def test_a_platforms_clients_with_other_columns_and_ids(world: TestData, visitor: Browser) -> None:
    for sql in (
        "DROP TABLE contact_relationships, clients CASCADE",
        "ALTER TABLE outreach_batch_items ALTER client_id TYPE integer USING 0",
        'CREATE TABLE clients (id integer PRIMARY KEY, full_name text, "odd %% column" text)',
        "CREATE TABLE contact_relationships (client_id integer, handle text, is_primary boolean NOT NULL)",
        "INSERT INTO clients VALUES (7, 'Jane Doe'), (8, NULL)",
        "INSERT INTO contact_relationships VALUES (7, '+447700900111', true), (8, 'x@example.com', false)",
        f"INSERT INTO outreach_batches (id, template) VALUES ('{NOBODY}', 'Hi')",
        "INSERT INTO outreach_batch_items (batch_id, client_id, rendered_body, status, sent_at) "
        f"VALUES ('{NOBODY}', 7, 'Hi', 'sent', now())",
    ):
        world.quinn(sql)
    assert names(world, "jane") == ["Jane Doe"]
    assert names(world, "7") == ["Jane Doe"]
    assert names(world, "x@example.com") == [None]
    for path in (
        "/people",
        "/people/7",
        "/people/8",
        "/people/7/stored",
        f"/batch/{NOBODY}",
    ):
        assert visitor.get(path).status_code == 200, path
    for path in ("/people/9", "/people/x", "/people/99999999999999999999", "/people/7%27"):
        assert visitor.get(path).status_code == 404, path


def test_what_was_sent_is_listed_newest_first_a_page_at_a_time(world: TestData, shop: PageWorld) -> None:
    batch_id = shop.batch([f"Person {number}" for number in range(5)])
    for number, item in enumerate(shop.items(batch_id)):
        shop.sent(item, f"text {number}", minutes=number)
    first = people.latest(world.databases.quinn, None, 3)
    rest = people.latest(world.databases.quinn, first[-1].item_id, 3)
    assert [each.body for each in [*first, *rest]] == [f"text {number}" for number in range(5)]


# --- forms --------------------------------------------------------------------------------------------


def test_a_search_for_nothing_gets_a_sentence(visitor: Browser) -> None:
    shown = visitor.post("/people/find", {"text": "  "})
    assert shown.status_code == 400
    assert "Write a name, a number or an e-mail address." in shown.text


@pytest.mark.parametrize("day", ["2026-02-30", "yesterday", "2999-01-01", "01.02.2026", "2026-1-1 OR", "1" * 300])
def test_a_day_that_is_none_is_refused_and_nothing_typed_is_lost(
    world: TestData, shop: PageWorld, visitor: Browser, day: str
) -> None:
    shown = visitor.post("/people/opt-out", {"handle": "+447700900111", "word": "wrote <b>me</b>", "day": day})
    assert shown.status_code == 400
    assert "is no day" in shown.text
    assert 'value="wrote &lt;b&gt;me&lt;/b&gt;"' in shown.text
    assert 'value="+447700900111"' in shown.text
    assert not world.icloud("SELECT FROM icloud.opt_outs")


def test_an_opt_out_stops_what_waits_for_the_person_at_once(world: TestData, shop: PageWorld, visitor: Browser) -> None:
    row_id = world.row(shop.device, to_handle="+447700900111", handle_key="+447700900111")
    assert visitor.post("/people/opt-out", {"handle": "+44 7700 900111", "word": "", "day": ""}).status_code == 303
    assert world.row_columns(row_id, "valid_until < now()")


def test_an_opt_out_is_assigned_to_a_client_that_exists(world: TestData, shop: PageWorld, visitor: Browser) -> None:
    shop.reply("jane@example.com")
    for client_id in ("", "nobody", NOBODY):
        shown = visitor.post("/people/assign", {"handle": "jane@example.com", "client_id": client_id})
        assert shown.status_code == 400
        assert "no client" in shown.text
    assert len(opt_outs.unassigned(world.databases.quinn, world.databases.icloud)) == 1


def test_a_form_leads_back_to_a_page_of_people_only(shop: PageWorld, visitor: Browser) -> None:
    jane = shop.client("Jane", "+447700900111")
    for back, wanted in (
        (f"/people/{jane}", f"/people/{jane}"), ("//evil.example", "/people"), ("/settings", "/people"),
        ("", "/people"),
        ("/people//evil.example/../..", "/people"), ("/people/x\r\nSet-Cookie: a=b", "/people"),
    ):  # fmt: skip
        location = visitor.post("/people/opt-in", {"handle": "+447700900111", "next": back}).headers["Location"]
        assert location.partition("?")[0] == wanted


def test_a_person_without_a_handle_has_a_page_and_nothing_to_erase(world: TestData, visitor: Browser) -> None:
    client_id = world.client(None)
    assert "No number and no address." in visitor.get(f"/people/{client_id}").text
    assert visitor.post(f"/people/{client_id}/forget", {"typed": "forget"}).status_code == 409
    assert world.quinn("SELECT count(*) FROM clients") == [(1,)]


# --- CSV ----------------------------------------------------------------------------------------------


def test_the_csv_of_a_batch_has_each_item_and_no_formula(shop: PageWorld, visitor: Browser) -> None:
    hostile = ['=HYPERLINK("http://evil")', "+1+1", "-2", "@SUM(A1)", "\tx", 'Jane; "Doe"', "Jörg\nMüller"]
    batch_id = shop.batch(hostile, name="Spring")
    items = shop.items(batch_id)
    shop.sent(items[0], "=1+1\nsecond line")
    shop.failed(items[1], "@reason")
    shop.unknown(items[2])
    answer = visitor.get(f"/batch/{batch_id}.csv")
    assert answer.headers["Content-Disposition"] == f'attachment; filename="batch-{batch_id[:8]}.csv"'
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.content.startswith(b"\xef\xbb\xbf"), "Excel reads UTF-8 with it"
    rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"), newline="")))
    assert [row["status"] for row in rows] == ["sent", "failed", "failed", *["pending"] * 4]
    assert rows[0]["text"] == "'=1+1\nsecond line"
    assert rows[2]["mayHaveBeenSent"] == "yes"
    assert all(row["handle"].startswith("+44") for row in rows), "a number stays a number"
    assert not [cell for row in rows for cell in row.values() if cell.startswith(page_batch.FORMULA) and len(cell) < 12]


def test_the_csv_of_a_long_batch_is_whole(world: TestData, shop: PageWorld, visitor: Browser) -> None:
    batch_id = shop.batch(["Person"] * 230)
    lines = visitor.get(f"/batch/{batch_id}.csv").text.strip().splitlines()
    assert len(lines) == 231


@pytest.mark.parametrize("path", ["/batch/x", f"/batch/{NOBODY}", "/batch/x.csv"])
def test_a_batch_that_is_not_there_is_a_page_that_says_so(visitor: Browser, path: str) -> None:
    shown = visitor.get(path)
    assert shown.status_code == 404
    assert "no batch" in shown.text


def test_a_verb_that_is_too_late_gets_a_sentence(shop: PageWorld, visitor: Browser) -> None:
    batch_id = shop.batch(["Jane"], status="sent")
    shown = visitor.post(f"/batch/{batch_id}/pause")
    assert shown.status_code == 409
    assert "The batch is sent: only a batch that is being sent can be paused." in shown.text


def test_the_csv_of_the_opt_outs(shop: PageWorld, visitor: Browser) -> None:
    shop.reply("jane@example.com", "=STOP")
    answer = visitor.get("/people/opt-outs.csv")
    assert "jane@example.com,'=STOP,reply,Mac mini" in answer.text
