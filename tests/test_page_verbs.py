"""Do everything on the owner's page by keyboard alone, with and without JavaScript, on a phone and on a desktop."""

import time
from typing import TYPE_CHECKING

import pytest
from browser import Open, press, press_tab_to, submit, write
from page_world import PageWorld
from testing import TestData

import outreach_server
import page_batch
import page_people

if TYPE_CHECKING:
    from playwright.sync_api import Page

EACH_WAY = pytest.mark.parametrize(("width", "has_script"), [(390, True), (390, False), (1280, True), (1280, False)])
TWICE = pytest.mark.parametrize(("width", "has_script"), [(390, False), (1280, True)])


@pytest.fixture
def shop(world: TestData) -> PageWorld:
    made = PageWorld(world)
    made.fill()
    return made


def message(page: "Page") -> str:
    """Return what the page says after a verb."""
    return page.locator("#message").inner_text()


# --- everything ---------------------------------------------------------------------------------------


@EACH_WAY
def test_pause_everything_and_resume(
    open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool
) -> None:
    items = shop.items(shop.sending)
    for item in items[4:7]:
        row_id = world.row(shop.device, batch_item_id=item, drafted_at="now")
        shop.set_item(item, "status = 'queued', queued_at = now(), send_queue_id = %(row)s", row=row_id)
    world.set_row(row_id, "collected_at = now()")
    page = open_page("/settings", width=width, has_script=has_script)
    began = time.monotonic()
    press(page, "#pause-everything")
    said = message(page)
    assert time.monotonic() - began < 5  # on a busy host; `make bench` measures it
    assert "2 messages were taken back" in said
    assert "1 message is beyond recall" in said
    assert world.quinn("SELECT paused FROM outreach_settings") == [(True,)]
    assert page.get_by_role("heading", level=1).inner_text().startswith("Held: paused")
    press(page, "#resume-everything")
    assert "has ended" in message(page)
    assert world.quinn("SELECT paused FROM outreach_settings") == [(False,)]
    assert shop.status(shop.paused) == "paused", "it paused itself for a reason of its own"


@pytest.mark.parametrize("path", ["/", "/batch", "/people", "/settings", "/people/opt-outs", "/nowhere"])
def test_every_page_has_the_button_that_pauses_everything(open_page: Open, shop: PageWorld, path: str) -> None:
    page = open_page("/")
    page.goto(path)
    assert page.get_by_role("button", name="Pause everything").is_visible() or path == "/nowhere"


def test_a_double_click_on_pause_is_one_pause(open_page: Open, shop: PageWorld, world: TestData) -> None:
    page = open_page("/")
    page.get_by_role("button", name="Pause everything").dblclick()
    page.get_by_role("button", name="Resume everything").wait_for()
    assert world.quinn("SELECT paused FROM outreach_settings") == [(True,)]


def test_the_back_button_and_a_reload_do_nothing_again(open_page: Open, shop: PageWorld, world: TestData) -> None:
    page = open_page("/")
    page.get_by_role("button", name="Pause everything").click()
    page.get_by_role("button", name="Resume everything").click()
    page.get_by_text("has ended").wait_for()
    page.reload()
    page.go_back()
    page.go_back()
    page.reload()
    assert world.quinn("SELECT paused FROM outreach_settings") == [(False,)]


# --- a batch ------------------------------------------------------------------------------------------


@TWICE
def test_pause_resume_and_cancel_a_batch(open_page: Open, shop: PageWorld, width: int, has_script: bool) -> None:
    page = open_page("/", width=width, has_script=has_script)
    press(page, f"#b-{shop.sending}")
    press(page, "#pause")
    assert "This batch is paused." in message(page)
    assert shop.status(shop.sending) == "paused"
    press(page, "#resume")
    assert "being sent again" in message(page)
    assert shop.status(shop.sending) == "sending"
    press(page, "#cancel-details summary")
    press(page, "#cancel")
    assert "This batch is cancelled." in message(page)
    assert shop.status(shop.sending) == "cancelled"


@TWICE
def test_a_batch_that_paused_itself_says_why_and_what_to_look_at(
    open_page: Open, shop: PageWorld, width: int, has_script: bool
) -> None:
    page = open_page(f"/batch/{shop.paused}", width=width, has_script=has_script)
    page.get_by_text("This batch paused itself: the last 5 messages failed.").wait_for()
    page.get_by_text("Look at the reasons of the failures").wait_for()
    press(page, "#resume")
    assert shop.status(shop.paused) == "sending"


def test_a_tab_that_shows_another_reason_does_not_resume_a_batch(
    open_page: Open, shop: PageWorld, world: TestData
) -> None:
    page = open_page(f"/batch/{shop.paused}", has_script=False)
    world.quinn(
        "UPDATE outreach_batches SET pause_reason = '3 of the 40 people opted out' WHERE id = %(id)s", id=shop.paused
    )
    page.locator("#resume").click()
    assert "Nothing was resumed" in message(page)
    assert shop.status(shop.paused) == "paused"
    page.get_by_text("3 of the 40 people opted out").wait_for()


def test_a_batch_whose_approval_lapsed_is_not_resumed_but_looked_at(
    open_page: Open, shop: PageWorld, world: TestData
) -> None:
    world.quinn("UPDATE outreach_batches SET pause_reason = 'approval lapsed' WHERE id = %(id)s", id=shop.paused)
    page = open_page(f"/batch/{shop.paused}")
    assert page.locator("#resume").count() == 0
    assert page.locator("#look").get_attribute("href") == f"/new/check/{shop.paused}"


@TWICE
def test_failures_have_reasons_and_are_tried_again(
    open_page: Open, shop: PageWorld, width: int, has_script: bool
) -> None:
    page = open_page(f"/batch/{shop.sending}", width=width, has_script=has_script)
    page.get_by_text("Not delivered: the number has no iMessage").first.wait_for()
    press(page, "#retry")
    assert "1 message is tried again. 1 message that may have been sent stay as they are." in message(page)
    statuses = shop.world.statuses(shop.sending)
    assert (statuses[1], statuses[2]) == ("pending", "failed")


@TWICE
def test_what_may_have_been_sent_goes_again_only_by_name_and_with_the_box_ticked(
    open_page: Open, shop: PageWorld, width: int, has_script: bool
) -> None:
    page = open_page(f"/batch/{shop.sending}", width=width, has_script=has_script)
    press(page, "#unknown-details summary")
    assert "Person 2 (" in page.locator("#unknown-details ul").inner_text()
    press(page, "#retry-unknown")
    page.get_by_text("these people may get the message twice").first.wait_for()
    assert shop.world.statuses(shop.sending)[2] == "failed"
    press_tab_to(page, "#f-include_unknown")
    page.keyboard.press("Space")
    press(page, "#retry-unknown")
    assert "2 messages are tried again." in message(page)
    assert shop.world.statuses(shop.sending)[1:3] == ["pending", "pending"]


def test_items_are_listed_by_status_a_page_at_a_time(
    open_page: Open, shop: PageWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = shop.batch([f"Somebody {number:03}" for number in range(page_batch.PER_PAGE + 5)], name="Many")
    page = open_page(f"/batch/{batch_id}")
    listed = page.get_by_role("link", name="Somebody")
    assert listed.count() == page_batch.PER_PAGE
    page.get_by_role("link", name="Next page").click()
    page.get_by_role("link", name="Somebody 054").wait_for()
    assert listed.count() == 5
    page.get_by_role("link", name="To go").click()
    assert listed.count() == page_batch.PER_PAGE


# --- people -------------------------------------------------------------------------------------------


@TWICE
def test_find_a_person_opt_them_out_in_words_and_in_again(
    open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool
) -> None:
    page = open_page("/people", width=width, has_script=has_script)
    write(page, "#f-text", "person 5")
    submit(page)
    press(page, "main a[href^='/people/']")
    press(page, "#opt-out summary")
    write(page, "#f-word", "called: no more, please")
    submit(page)
    assert "gets no more messages" in message(page)
    page.get_by_text("Nobody writes to this person").wait_for()
    page.get_by_text("called: no more, please").wait_for()
    assert world.icloud("SELECT count(*) FROM icloud.opt_outs WHERE word = 'called: no more, please'") == [(1,)]
    press(page, "main details summary")
    press(page, "form[action='/people/opt-in'] button")
    assert "may be written to again" in message(page)


@TWICE
def test_an_opt_out_of_a_number_that_no_client_has(
    open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool
) -> None:
    page = open_page("/people", width=width, has_script=has_script)
    press(page, "main details summary")
    write(page, "#f-handle", "not a number")
    write(page, "#f-word", "wrote a letter")
    write(page, "#f-day", "2026-02-30")
    submit(page)
    page.get_by_text("not a number is neither a phone number nor an e-mail address.").first.wait_for()
    page.get_by_text("2026-02-30 is no day").first.wait_for()
    assert page.locator("#f-word").input_value() == "wrote a letter"
    write(page, "#f-handle", "+44 7700 900999")
    write(page, "#f-day", "2026-01-31")
    submit(page)
    assert "+44 7700 900999 gets no more messages" in message(page)
    sql = "SELECT handle_key, word, received_at::date::text FROM icloud.opt_outs WHERE source = 'owner'"
    assert world.icloud(sql) == [("+447700900999", "wrote a letter", "2026-01-31")]


@TWICE
def test_say_whose_an_opt_out_is(
    open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool
) -> None:
    page = open_page("/", width=width, has_script=has_script)
    press(page, "#to-unassigned")
    write(page, "#who-1", "Person 3")
    submit(page)
    press(page, "form[action='/people/assign'] button")
    assert "jane@example.com belongs to this person now." in message(page)
    page.get_by_text("Nobody writes to this person").wait_for()
    page.goto("/")
    assert page.locator("#to-unassigned").count() == 0
    found = world.quinn("SELECT is_primary FROM contact_relationships WHERE handle = 'jane@example.com'")
    assert found == [(False,)]


@TWICE
def test_erase_a_person_after_the_word_was_typed(
    open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool
) -> None:
    page = open_page(f"/people/{shop.jane}", width=width, has_script=has_script)
    press(page, "#forget summary")
    press(page, "#forget button")
    page.get_by_text("Nothing was erased.").first.wait_for()
    write(page, "#f-typed", page_people.FORGET)
    submit(page)
    assert "Erased:" in message(page)
    assert not world.quinn("SELECT FROM clients WHERE id = %(id)s", id=shop.jane)
    assert page.url.split("?")[0].endswith("/people")


def test_what_is_stored_can_be_seen_and_taken_along(open_page: Open, shop: PageWorld) -> None:
    page = open_page(f"/people/{shop.jane}")
    page.get_by_role("link", name="Show all that is stored").click()
    assert "Jane Doe" in page.locator("pre").inner_text()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as JSON").click()
    assert "Jane Doe" in download.value.path().read_text()


def test_no_name_and_no_number_is_in_an_address(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/people")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_label("Find a person").fill("+447700900111")
    page.get_by_role("button", name="Find", exact=True).click()
    page.get_by_role("heading", name="Jane Doe").wait_for()
    page.goto("/people")
    page.get_by_label("Find a person").fill("Jane")
    page.get_by_role("button", name="Find", exact=True).click()
    page.get_by_role("link", name="Jane Doe").click()
    page.get_by_role("heading", name="Jane Doe").wait_for()
    assert not [url for url in asked if "900111" in url or "Jane" in url]


# --- settings -----------------------------------------------------------------------------------------


@EACH_WAY
def test_change_a_setting_after_one_was_refused(
    open_page: Open, shop: PageWorld, world: TestData, width: int, has_script: bool
) -> None:
    page = open_page("/settings", width=width, has_script=has_script)
    write(page, "#f-quiet_hours_start", "9pm")
    write(page, "#f-quiet_hours_end", "08:00")
    write(page, "#f-max_per_day", "100")
    submit(page)
    page.get_by_role("alert").wait_for()
    assert "'9pm' is not HH:MM" in page.locator("#e-quiet_hours_start").inner_text()
    assert page.locator("#f-max_per_day").input_value() == "100", "nothing that was typed is lost"
    assert world.quinn("SELECT max_per_day FROM outreach_settings") == [(150,)], "and nothing is changed by half"
    write(page, "#f-quiet_hours_start", "21:00")
    submit(page)
    assert "Messages in a day: 150 → 100" in message(page)
    sql = "SELECT max_per_day, quiet_hours_start, quiet_hours_end FROM outreach_settings"
    assert world.quinn(sql) == [(100, "21:00", "08:00")]


# --- what the routes are ------------------------------------------------------------------------------


def test_every_verb_of_the_pages_is_in_a_test_by_keyboard() -> None:
    """A new verb needs such a test, here or in the file of its page."""
    routes = [route for routes in outreach_server.PAGES for route in routes]
    rules = {route.rule for route in routes if route.method == "POST" and not route.rule.startswith("/new")}
    assert rules == {
        "/login", "/logout", "/pause", "/resume", "/settings",
        "/batch/<batch_id>/pause", "/batch/<batch_id>/resume", "/batch/<batch_id>/cancel", "/batch/<batch_id>/retry",
        "/people/find", "/people/opt-out", "/people/opt-in", "/people/choose", "/people/assign",
        "/people/<client_id>/forget",
    }  # fmt: skip


def test_log_out_by_keyboard(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/")
    press(page, "footer button")
    page.get_by_label("Owner's token").wait_for()
    page.goto("/people")
    page.get_by_label("Owner's token").wait_for()
