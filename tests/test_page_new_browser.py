"""Compose in a real browser: by keyboard alone, with and without JavaScript, axe, sizes, hostile people, accidents."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Open, check_accessibility, check_fits, press, press_tab_to, submit, write
from page_world import HOSTILE, PageWorld
from test_page_browser import check_hostile, check_targets
from testing import OWNER_TOKEN, TestData, wait_until

import outreach_server

if TYPE_CHECKING:
    from playwright.sync_api import Page

EACH_WAY = pytest.mark.parametrize(("width", "has_script"), [(390, True), (390, False), (1280, True), (1280, False)])
SIZES = [(390, 844), (320, 568), (1280, 800)]
CITIES = ("York", "Leeds", "York")
TEXT = "Hi {{ client.first_name }}, this is Ana from Blue Salon. Reply STOP to opt out."
CSV = "Name,Phone\nAna,+447700900301\nBo,12\n" + "".join(f'"{name}",x\n' for name in ("<script>", "\u202eturned"))


@pytest.fixture
def shop(world: TestData) -> PageWorld:
    """A Mac, and three people in two cities; one has no first name."""
    made = PageWorld(world)
    for number, city in enumerate(CITIES):
        client_id = made.client(f"Person {number}", f"+44770090020{number}")
        attributes = {"city": city, "first_name": f"Name{number}" if number else ""}
        sql = "UPDATE clients SET attributes = %(attributes)s WHERE id = %(id)s"
        world.quinn(sql, attributes=json.dumps(attributes), id=client_id)
    return made


def choose(page: "Page", selector: str, words: str) -> None:
    """Go to a list with Tab, and type the beginning of a choice."""
    press_tab_to(page, selector)
    page.keyboard.type(words)


def add(page: "Page", selector: str, text: str) -> None:
    """Go to a text with Tab, and type."""
    press_tab_to(page, selector)
    page.keyboard.type(text)


def settle(page: "Page", has_script: bool) -> None:
    """Wait until the script has saved what was typed, and has shown it."""
    if has_script:
        page.wait_for_timeout(900)  # longer than the pause of compose.js
        page.wait_for_load_state("networkidle")


def draft_id(page: "Page") -> str:
    found = re.search("/new/check/([0-9a-f-]{36})", page.url)
    assert found
    return found[1]


# --- by keyboard --------------------------------------------------------------------------------------


@EACH_WAY
def test_compose_test_and_send(open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool) -> None:
    page = open_page("/new", width=width, has_script=has_script)
    choose(page, "#f-field-0", "city")
    settle(page, has_script)
    choose(page, "#f-op-0", "is one of")
    add(page, "#f-value-0", "York, Leeds")
    add(page, "#f-text", TEXT)
    settle(page, has_script)
    press(page, "#preview-button")
    assert "3 people match. 2 would get a message." in page.locator("#matched").inner_text()
    assert "Hi Name1, this is Ana" in page.locator("#preview").inner_text()
    press(page, "#left-out-emptyVariable summary")
    assert "Person 0" in page.locator("#left-out-emptyVariable").inner_text()
    press(page, "#go-on")
    page.get_by_text("2 people would get this message. Nothing was sent yet.").wait_for()
    write(page, "#f-to", "+447700900999")
    submit(page)
    assert "A test is on its way" in page.locator("#message").inner_text()
    assert world.icloud("SELECT to_handle FROM icloud.send_queue") == [("+447700900999",)]
    batch_id = draft_id(page)
    write(page, "#f-first_n", "1")
    write(page, "#f-recipients", "3")
    submit(page)
    assert "You typed 3, and it is 2 people." in page.locator("#e-recipients").inner_text()
    assert page.locator("#f-first_n").input_value() == "1"
    assert shop.status(batch_id) == "draft"
    write(page, "#f-recipients", "2")
    press(page, "#send-it")
    assert "It is being sent to 2 people. It pauses after 1 message" in page.locator("#message").inner_text()
    assert shop.status(batch_id) == "sending"


@EACH_WAY
def test_conditions_are_added_and_removed(open_page: Open, shop: PageWorld, width: int, has_script: bool) -> None:
    page = open_page("/new", width=width, has_script=has_script)
    choose(page, "#f-field-0", "city")
    settle(page, has_script)
    add(page, "#f-value-0", "York")
    settle(page, has_script)
    press(page, "#add")
    page.locator("#f-field-1").wait_for()
    assert page.locator("#f-value-0").input_value() == "York"
    choose(page, "#f-field-1", "number of messages")
    settle(page, has_script)
    choose(page, "#f-op-1", "is at least")
    settle(page, has_script)
    add(page, "#f-value-1", "1")
    settle(page, has_script)
    press(page, "#count")
    assert "0 people match" in page.locator("#matched").inner_text()
    press(page, "#row-1 button")
    assert page.locator("#f-field-1").count() == 0
    press(page, "#count")
    assert "2 people match" in page.locator("#matched").inner_text()


@EACH_WAY
def test_import_a_file(
    open_page: Open, shop: PageWorld, world: TestData, tmp_path: Path, width: int, has_script: bool
) -> None:
    (tmp_path / "people.csv").write_text(CSV)
    page = open_page("/new", width=width, has_script=has_script)
    page.on("filechooser", lambda _: None)  # playwright now looks for it, before the key is pressed
    add(page, "#f-text", TEXT)
    page.locator(".skip").focus()
    press(page, "#from-file summary")
    press_tab_to(page, "#f-file")
    with page.expect_file_chooser() as chosen:
        page.keyboard.press("Enter")
    chosen.value.set_files(tmp_path / "people.csv")
    press(page, "#upload")
    page.get_by_text("1 new person, 0 changed, 0 known already, 3 lines cannot be used").wait_for()
    assert page.locator("td.wrong").first.inner_text() == "12"
    press(page, "#import")
    assert "Imported: 1 new person" in page.locator("#message").inner_text()
    assert "1 person matches" in page.locator("#matched").inner_text()
    assert page.locator("#f-text").input_value() == TEXT, "what was typed before is still there"


def test_every_verb_of_new_is_in_a_test_by_keyboard() -> None:
    """A new verb needs such a test in this file."""
    routes = [route for routes in outreach_server.PAGES for route in routes]
    rules = {route.rule for route in routes if route.method == "POST" and route.rule.startswith("/new")}
    assert rules == {
        "/new/<composition_id>", "/new/upload", "/new/file/<upload_id>",
        "/new/check/<batch_id>/test", "/new/check/<batch_id>/send",
    }  # fmt: skip


def test_a_composition_is_thrown_away(open_page: Open, shop: PageWorld, world: TestData) -> None:
    page = open_page("/new", has_script=False)
    add(page, "#f-text", TEXT)
    press(page, "#preview-button")
    press(page, "#throw summary")
    press(page, "#throw-away")
    assert world.quinn("SELECT count(*) FROM outreach_compositions") == [(0,)]


# --- axe, sizes, hostile people -----------------------------------------------------------------------


def pages(page: "Page", world: TestData, tmp_path: Path) -> "list[str]":
    """Make a composition, a draft and an upload; return the address of each page about them."""
    (tmp_path / "people.csv").write_text(CSV)
    page.goto("/new")
    page.select_option("#f-field-0", "name")
    page.select_option("#f-op-0", "filled")
    page.fill("#f-text", "Hi {{ client.name }}, this is Ana from Blue Salon.")
    page.fill("#f-name", HOSTILE[0])
    page.click("#go-on")
    page.wait_for_url("**/check/**")
    checked = f"/new/check/{draft_id(page)}"
    [(composition_id,)] = world.quinn("SELECT id::text FROM outreach_compositions")
    page.goto("/new")
    page.fill("#f-text", "Hi {{ client.nobody }},\nthis is " + HOSTILE[0])
    page.click("#from-file summary")
    page.set_input_files("#f-file", tmp_path / "people.csv")
    page.click("#upload")
    page.wait_for_url("**/file/**")
    file = page.url.partition("/new")[2]
    [(wrong,)] = world.quinn("SELECT id::text FROM outreach_compositions WHERE id <> %(id)s", id=composition_id)
    return [
        "/new", f"/new/{composition_id}?preview=1", f"/new/{wrong}?preview=1", checked, f"{checked}/left-out/noHandle",
        f"/new{file}",
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page: Open, shop: PageWorld, world: TestData, tmp_path: Path, scheme: str) -> None:
    world.client(None)
    page = open_page("/new", width=390, height=844, scheme=scheme)
    for path in pages(page, world, tmp_path):
        page.goto(path)
        for summary in page.locator("summary").all():
            if summary.is_visible():
                summary.click()
        page.evaluate("scrollTo({top: 0, behavior: 'instant'})")  # nothing is half under the head of the page
        check_accessibility(page)
        if "/check/" in path and "left-out" not in path:
            page.fill("#f-recipients", "7")
            page.click("#send-it")
            check_accessibility(page)  # with a refused field


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_page_fits_and_does_not_jump(
    open_page: Open, shop: PageWorld, world: TestData, tmp_path: Path, width: int, height: int
) -> None:
    page = open_page("/new", width=width, height=height)
    addresses = pages(page, world, tmp_path)
    page.add_init_script("""
        window.shift = 0;
        new PerformanceObserver(list => list.getEntries().forEach(each => { window.shift += each.value; }))
            .observe({type: "layout-shift", buffered: true});
    """)
    for path in addresses:
        page.goto(path)
        check_fits(page)
        check_targets(page)
        assert page.evaluate("window.shift") < 0.001, path


@pytest.mark.parametrize("has_script", [True, False])
def test_hostile_people_are_only_texts(open_page: Open, world: TestData, tmp_path: Path, has_script: bool) -> None:
    shop = PageWorld(world)
    shop.fill_hostile()
    world.quinn("UPDATE clients SET attributes = jsonb_build_object('note', name, left(name, 40), 'x')")
    page = open_page("/new", width=320, height=568, has_script=has_script)
    for path in pages(page, world, tmp_path):
        page.goto(path)
        check_hostile(page, path)
        page.wait_for_timeout(100)
    page.goto("/new")
    page.select_option("#f-field-0", "attributes.note")
    page.click("#count")
    check_hostile(page, "values")


# --- comfort and accidents ----------------------------------------------------------------------------


def test_variables_are_clicked_into_the_text_and_the_preview_follows(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/new")
    page.select_option("#mode, #f-mode", "everyone")
    page.fill("#f-text", "Hi ")
    page.get_by_role("button", name="{{ client.first_name }}").click()
    page.keyboard.type("!")
    page.get_by_text("Hi Name1!").wait_for()
    page.fill("#f-text", "Hi {{ client.frst_name }}!")
    page.get_by_text("did you mean client.first_name?").wait_for()
    assert page.locator("#preview mark").inner_text() == "client.frst_name"


def test_values_that_people_have_are_offered_when_a_field_is_chosen(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/new")
    page.select_option("#f-field-0", "attributes.city")
    page.locator('#l-0 option[value="York"]').wait_for(state="attached")
    assert page.locator('#l-0 option[value="York"]').inner_text() == "2 people"
    page.select_option("#f-field-0", "handle.kind")
    page.locator("select#f-value-0").wait_for()


def test_a_reload_and_the_back_button_lose_nothing(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/new")
    page.select_option("#f-mode", "everyone")
    page.fill("#f-text", TEXT)
    page.locator("#matched").get_by_text("3 people match").wait_for()
    page.reload()
    assert page.locator("#f-text").input_value() == TEXT
    page.click("#go-on")
    page.wait_for_url("**/check/**")
    page.reload()
    page.go_back()
    assert page.locator("#f-text").input_value() == TEXT
    page.go_forward()
    page.wait_for_url("**/check/**")


def test_two_tabs_keep_what_each_wrote(open_page: Open, shop: PageWorld, world: TestData) -> None:
    first = open_page("/new")
    first.select_option("#f-mode", "everyone")
    first.fill("#f-text", "Hi one")
    first.locator("#matched").get_by_text("3 people match").wait_for()
    second = first.context.new_page()
    second.goto(first.url)
    first.fill("#f-text", "Hi one, again")
    first.locator("#preview").get_by_text("Hi one, again").first.wait_for()
    second.fill("#f-text", "Hi two")
    second.locator("#preview").get_by_text("Hi two").first.wait_for()
    assert second.url != first.url
    texts = {text for (text,) in world.quinn("SELECT form ->> 'text' FROM outreach_compositions")}
    assert texts == {"Hi one, again", "Hi two"}


def test_a_double_click_sends_once(open_page: Open, shop: PageWorld, world: TestData) -> None:
    page = open_page("/new")
    page.select_option("#f-mode", "everyone")
    page.fill("#f-text", TEXT)
    page.dblclick("#go-on")
    page.get_by_text("2 people would get this message").wait_for()
    assert world.quinn("SELECT count(*) FROM outreach_batches") == [(1,)]
    page.fill("#f-to", "+447700900999")
    page.dblclick("#send-test")
    page.get_by_text("A test is on its way").wait_for()
    page.wait_for_load_state("networkidle")
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(1,)]
    page.fill("#f-recipients", "2")
    page.dblclick("#send-it")
    page.wait_for_url("**/batch/**")
    assert world.quinn("SELECT status FROM outreach_batches") == [("sending",)]


@pytest.mark.parametrize("has_script", [True, False])
def test_a_session_that_ends_while_composing_loses_no_text(
    open_page: Open, shop: PageWorld, world: TestData, has_script: bool
) -> None:
    page = open_page("/new", has_script=has_script)
    page.select_option("#f-mode", "everyone")
    world.quinn("DELETE FROM outreach_sessions")
    page.fill("#f-text", TEXT + ' "more" <b>')
    if has_script:
        page.get_by_text("Your session has ended. Press Preview to log in").wait_for()
    page.click("#preview-button")
    page.get_by_text("Nothing that you wrote is lost").wait_for()
    page.get_by_label("Owner's token").fill(OWNER_TOKEN)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("button", name="Go on with it").click()
    assert page.locator("#f-text").input_value() == TEXT + ' "more" <b>'
    page.get_by_text('Hi Name1, this is Ana from Blue Salon. Reply STOP to opt out. "more" <b>').wait_for()


def test_a_server_that_is_away_is_said_and_the_next_change_saves(
    open_page: Open, shop: PageWorld, world: TestData
) -> None:
    page = open_page("/new")
    page.route("**/new/*", lambda route: route.abort())
    page.fill("#f-text", "Hi one")
    page.get_by_text("The server does not answer").wait_for()
    page.unroute("**/new/*")
    page.fill("#f-text", "Hi two")
    wait_until(lambda: world.quinn("SELECT form ->> 'text' FROM outreach_compositions") == [("Hi two",)])


# --- speed --------------------------------------------------------------------------------------------


def test_every_page_is_light(open_page: Open, shop: PageWorld, world: TestData, tmp_path: Path) -> None:
    page = open_page("/new")
    addresses = pages(page, world, tmp_path)
    weights: dict[str, int] = {}
    page.on(
        "response", lambda response: weights.update({response.url: weights.get(response.url, 0) + len(response.body())})
    )
    for path in addresses:
        weights.clear()
        page.goto(path)
        page.wait_for_load_state("networkidle")
        assert sum(weights.values()) < 50_000, (path, weights)
