"""Open every page in a real browser: accessibility, sizes, hostile texts, the refresh, weight."""

import re
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from browser import Open, check_accessibility, check_fits, session_cookie
from page_world import PageWorld
from testing import Databases, Script, TestData

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZES = [(390, 844), (320, 568), (1280, 800)]


@pytest.fixture
def shop(world: TestData) -> PageWorld:
    made = PageWorld(world)
    made.fill()
    return made


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_page(open_page: Open, shop: PageWorld, scheme: str) -> None:
    page = open_page("/", width=390, height=844, scheme=scheme)
    for path in shop.pages():
        page.goto(path)
        for summary in page.locator("summary").all():
            summary.click()
        check_accessibility(page)
    page.goto("/")
    page.get_by_role("button", name="Pause everything").click()
    check_accessibility(page)  # with a message, and with the button to resume
    page.goto("/settings")
    page.get_by_label("Messages in a day").fill("many")
    page.get_by_role("button", name="Save").click()
    check_accessibility(page)  # with a refused field
    page.goto("/people")
    page.get_by_label("Find a person").fill("Person")
    page.get_by_role("button", name="Find", exact=True).click()
    check_accessibility(page)
    page.get_by_role("button", name="Log out").click()
    check_accessibility(page)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_page_fits_and_does_not_jump(open_page: Open, shop: PageWorld, width: int, height: int) -> None:
    page = open_page("/", width=width, height=height)
    page.add_init_script("""
        window.shift = 0;
        new PerformanceObserver(list => list.getEntries().forEach(each => { window.shift += each.value; }))
            .observe({type: "layout-shift", buffered: true});
    """)
    for path in shop.pages():
        page.goto(path)
        check_fits(page)
        check_targets(page)
        assert page.evaluate("window.shift") < 0.001, path


def check_targets(page: "Page") -> None:
    """Fail if something that is pressed is too small for a finger; a link in a text is as high as its line."""
    small = page.evaluate("""
        [...document.querySelectorAll("button, summary, .button, header a, input:not([type=hidden]), select")]
            .filter(each => each.checkVisibility() && !each.closest(".skip"))
            .map(each => [each.outerHTML.slice(0, 80), each.getBoundingClientRect()])
            .filter(([, box]) => box.height < 24 || box.width < 24)
    """)
    assert not small


@pytest.mark.parametrize("has_script", [True, False])
def test_hostile_texts_are_only_texts_on_every_page(open_page: Open, world: TestData, has_script: bool) -> None:
    shop = PageWorld(world)
    shop.fill_hostile()
    page = open_page("/", width=320, height=568, has_script=has_script)
    for path in shop.pages():
        page.goto(path)
        check_hostile(page, path)
    page.goto("/people")
    page.get_by_label("Find a person").fill("<script>")
    page.get_by_role("button", name="Find", exact=True).click()
    check_hostile(page, "found")


def check_hostile(page: "Page", path: str) -> None:
    content = page.content()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f\x1b\x07]", content), path
    assert page.locator("#hacked, main script, main img").count() == 0, path
    assert page.evaluate("window.hacked") is None, path
    assert "49" not in page.locator("h1").first.inner_text()
    check_fits(page)


@pytest.mark.parametrize("has_script", [True, False])
def test_hostile_texts_that_are_typed_come_back_as_typed(open_page: Open, shop: PageWorld, has_script: bool) -> None:
    page = open_page("/settings", has_script=has_script)
    typed = '"><script>window.hacked = 1</script>'
    page.get_by_label("Quiet from").fill(typed)
    page.get_by_label("Messages in a day").fill(typed)
    page.get_by_role("button", name="Save").click()
    assert page.get_by_label("Quiet from").input_value() == typed
    assert page.get_by_label("Messages in a day").input_value() == typed
    assert page.evaluate("window.hacked") is None


def test_every_page_is_light(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/")
    weights: dict[str, int] = {}
    page.on(
        "response", lambda response: weights.update({response.url: weights.get(response.url, 0) + len(response.body())})
    )
    for path in shop.pages():
        weights.clear()
        page.goto(path)
        page.wait_for_load_state("networkidle")
        assert sum(weights.values()) < 50_000, (path, weights)


# --- the refresh --------------------------------------------------------------------------------------


def test_today_shows_what_is_new_without_a_reload(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/")
    page.evaluate("window.marked = true")
    page.get_by_text("1 of 8 sent").wait_for()
    for item in shop.items(shop.sending)[4:6]:
        shop.sent(item)
    page.get_by_text("3 of 8 sent").wait_for(timeout=8000)
    assert page.evaluate("window.marked"), "it was not reloaded"


def test_a_refresh_keeps_the_focus_and_what_is_open(open_page: Open, shop: PageWorld) -> None:
    page = open_page(f"/batch/{shop.sending}")
    page.locator("#cancel-details summary").click()
    page.locator("#cancel").focus()
    shop.sent(shop.items(shop.sending)[4])
    page.get_by_text("2 of 8 sent").wait_for(timeout=8000)
    assert page.locator("#cancel").is_visible()
    assert page.evaluate("document.activeElement.id") == "cancel"


def test_the_page_says_when_the_server_is_away_and_when_it_is_back(
    open_page: Open, shop: PageWorld, site: tuple[Script, str]
) -> None:
    page = open_page("/")
    site[0].process.send_signal(signal.SIGSTOP)
    page.get_by_text("The server has not answered since").wait_for(timeout=20_000)
    site[0].process.send_signal(signal.SIGCONT)
    page.locator("#away").wait_for(state="hidden", timeout=15_000)


def test_the_page_says_when_its_session_has_ended(open_page: Open, shop: PageWorld, world: TestData) -> None:
    page = open_page("/")
    world.quinn("DELETE FROM outreach_sessions")
    page.get_by_text("Your session has ended.").wait_for(timeout=8000)
    page.get_by_role("link", name="Log in").click()
    page.get_by_label("Owner's token").wait_for()


def test_a_page_that_is_hidden_asks_nothing(open_page: Open, shop: PageWorld) -> None:
    page = open_page("/")
    asked: list[float] = []
    page.wait_for_load_state("networkidle")
    page.on("request", lambda request: asked.append(time.monotonic()))
    hide(page, is_hidden=True)
    time.sleep(6)  # longer than the interval of the refresh: nothing can be waited for
    assert not asked
    with page.expect_request("**/", timeout=3000):  # at once, when it is seen again
        hide(page, is_hidden=False)


def hide(page: "Page", is_hidden: bool) -> None:
    page.evaluate(
        """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }""",
        is_hidden,
    )


# --- without a session --------------------------------------------------------------------------------


@pytest.mark.parametrize("has_script", [True, False])
def test_log_in_by_keyboard_and_come_back_to_where_one_was(open_page: Open, shop: PageWorld, has_script: bool) -> None:
    page = open_page("/settings", has_script=has_script, is_logged_in=False)
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("This is not the owner's token.").first.wait_for()
    page.get_by_label("Owner's token").fill("owner-token-0123456789")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Settings").wait_for()
    assert page.url.endswith("/settings")


@pytest.mark.parametrize("has_script", [True, False])
def test_a_session_that_ends_while_one_writes_loses_nothing(
    open_page: Open, shop: PageWorld, world: TestData, has_script: bool
) -> None:
    page = open_page("/settings", has_script=has_script)
    page.get_by_label("Messages in a day").fill("99")
    world.quinn("DELETE FROM outreach_sessions")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Nothing that you wrote is lost").wait_for()
    page.get_by_label("Owner's token").fill("owner-token-0123456789")
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("button", name="Go on with it").click()
    page.get_by_text("Saved.").wait_for()
    assert world.quinn("SELECT max_per_day FROM outreach_settings") == [(99,)]


def test_a_page_of_another_site_cannot_pause(
    open_page: Open, shop: PageWorld, site: tuple[Script, str], databases: Databases, world: TestData
) -> None:
    """A real browser with a real session: the other site is another port of this host, as a stranger's server is."""
    base_url = site[1].replace("127.0.0.1", "localhost")
    page = open_page("/", is_logged_in=False, others=(base_url, "http://127.0.0.1:1"))
    page.context.add_cookies([session_cookie(databases.quinn_url, base_url)])
    page.goto(base_url + "/")
    page.get_by_role("button", name="Pause everything").wait_for()
    page.context.route(
        "http://127.0.0.1:1/*",
        lambda route: route.fulfill(
            content_type="text/html", body=f'<form method="post" action="{base_url}/pause"><button>Win</button></form>'
        ),
    )
    answers: list[Any] = []
    page.on("response", lambda response: answers.append(response.status))
    page.goto("http://127.0.0.1:1/")
    page.get_by_role("button", name="Win").click()
    page.get_by_text("came from another site").wait_for()
    assert 403 in answers
    assert world.quinn("SELECT paused FROM outreach_settings") == [(False,)]
