"""Provide a real browser for the tests of the owner's page: Debian's Chromium, driven by playwright.

A plugin of pytest, which conftest.py names. A test that uses `chromium` or `open_page` gets the marker `page`.
Where no browser is installed, it is skipped. CHROMIUM names another executable. Example:

    def test_the_page_opens(open_page: Open) -> None:
        page = open_page("/", width=390, height=844, has_script=False, scheme="dark")
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from testing import OWNER_TOKEN, Databases, Script

import db
import sessions

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE = {"width": 390, "height": 844}
SMALL = {"width": 320, "height": 568}
DESKTOP = {"width": 1280, "height": 800}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]  # axe's tags


class Open(Protocol):
    """Open a page of the site in a new window of its own, logged in."""

    def __call__(
        self, path: str = "/", *, width: int = 1280, height: int = 800, has_script: bool = True,
        scheme: str = "light", is_logged_in: bool = True, others: tuple[str, ...] = (),
    ) -> "Page": ...  # fmt: skip


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    """One browser for all tests; each page gets a context of its own."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not executable:
        pytest.skip("no Chromium is installed: apt-get install chromium, or set CHROMIUM")
    if not importlib.util.find_spec("playwright"):
        pytest.skip("playwright is not installed: pip install playwright axe-playwright-python")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def site(databases: Databases, start: Callable[..., Script]) -> tuple[Script, str]:
    """The outreach server as a real process on a free port, and its base URL."""
    script = start("outreach_server.py", OUTREACH_PORT="0")
    return script, f"http://127.0.0.1:{script.port()}"


def session_cookie(quinn_url: str, base_url: str) -> Any:
    """Log in without the login page; return the cookie for playwright."""
    with contextlib.closing(db.connect(quinn_url)) as quinn:
        value = sessions.Sessions(OWNER_TOKEN).begin(quinn)
    return {"name": "outreach", "value": value, "url": base_url, "httpOnly": True, "sameSite": "Strict"}


@pytest.fixture
def open_page(chromium: "Browser", site: tuple[Script, str], databases: Databases) -> Iterator[Open]:
    """open_page("/settings", width=390): a page of the running server. Fails if a page logs an error or asks elsewhere.

    `others`: origins to which it may send requests, too.
    What a content security policy refuses is an error in the browser's console.
    """
    _, base_url = site
    problems: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_one(
            path: str = "/", *, width: int = 1280, height: int = 800, has_script: bool = True,
            scheme: str = "light", is_logged_in: bool = True, others: tuple[str, ...] = (),
        ) -> "Page":  # fmt: skip
            context = chromium.new_context(
                viewport={"width": width, "height": height}, java_script_enabled=has_script,
                color_scheme=scheme, base_url=base_url,  # type: ignore[arg-type]
            )  # fmt: skip
            stack.callback(context.close)
            context.set_default_timeout(10_000)
            if is_logged_in:
                context.add_cookies([session_cookie(databases.quinn_url, base_url)])
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda said: problems.append(said.text) if _is_problem(said) else None)
            page.on("request", lambda request: problems.extend(_foreign(request.url, (base_url, *others))))
            page.goto(path)
            return page

        yield open_one
    assert not problems


def _is_problem(said: Any) -> bool:
    """Return whether a line of the console is an error, but for the status of a response: 400 is an answer."""
    return said.type == "error" and "Failed to load resource" not in said.text


def _foreign(url: str, ours: Sequence[str]) -> list[str]:
    return [] if url.startswith(tuple(f"{origin}/" for origin in ours)) else [f"a request to {url}"]


def check_accessibility(page: "Page") -> None:
    """Fail if axe finds anything."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": RULES}}).response["violations"]
    assert not found, [(each["id"], [node["html"] for node in each["nodes"]], each["help"]) for each in found]


def check_fits(page: "Page") -> None:
    """Fail if the page is wider than the window: one would have to scroll sideways."""
    wide, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= window, f"{wide} px in a window of {window} px"


def press_tab_to(page: "Page", selector: str, most: int = 150) -> None:
    """Press Tab until an element has the focus, as somebody without a mouse does."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement?.matches(selector)", selector):
            return
    raise AssertionError(f"Tab never reaches {selector}")


def press(page: "Page", selector: str) -> None:
    """Go to a button, a link or a summary with Tab, and press Enter; wait for the page that this opens."""
    press_tab_to(page, selector)
    if page.evaluate("document.activeElement.matches('summary')"):
        page.keyboard.press("Enter")
    else:
        submit(page)


def write(page: "Page", selector: str, text: str) -> None:
    """Go to a field with Tab, and replace its text."""
    press_tab_to(page, selector)
    page.keyboard.press("Control+A")
    page.keyboard.type(text)


def submit(page: "Page") -> None:
    """Press Enter where the focus is, and wait for the page that this opens."""
    with page.expect_navigation():
        page.keyboard.press("Enter")
