"""Take the pictures of the owner's page for the documentation, from the running demo, in Debian's Chromium.

Run by `make pictures`. Writes PNG files into the directory that it is given. Example:

    python tools/pictures.py docs/pictures
"""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
LARGEST = 150_000  # bytes of a picture: it stays in the repository's history
TIMEOUT = 120  # seconds for the demo
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1120, "height": 760}
PAGE = re.compile(r"page: (http://\S+)/\s+The token: (\S+)")


@contextlib.contextmanager
def running_demo() -> Iterator[tuple[str, str]]:
    """Start the demo with its page; yield the page's address and its token."""
    demo = subprocess.Popen(
        [sys.executable, "demo/demo.py", "--page", "--clients", "42"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        yield read_page(demo)
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait(30)


def read_page(demo: subprocess.Popen[str]) -> tuple[str, str]:
    assert demo.stdout
    for line in demo.stdout:
        if match := PAGE.search(line):
            return match[1], match[2]
    raise SystemExit("the demo ended before it said where its page is")


def take(page: Any, path: Path) -> None:
    """Write what the window shows."""
    page.screenshot(path=path)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
    sys.stdout.write(f"{path}\n")


def pictures(browser: Any, base_url: str, token: str, directory: Path) -> None:
    """Take a picture of each page: while messages are sent, then of what became of them."""
    context = browser.new_context(base_url=base_url, viewport=PHONE)
    page = context.new_page()
    page.goto("/")
    page.get_by_label("Owner's token").fill(token)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Being sent").wait_for(timeout=TIMEOUT * 1000)
    page.get_by_text(re.compile(r"[2-9] of \d+ sent")).first.wait_for(timeout=TIMEOUT * 1000)
    take(page, directory / "today.png")
    page.set_viewport_size(DESKTOP)
    take(page, directory / "today-wide.png")
    page.set_viewport_size(PHONE)
    page.get_by_role("button", name="Pause everything").click()
    page.get_by_text("Everything is paused").wait_for()
    take(page, directory / "paused.png")
    page.get_by_role("button", name="Resume everything").click()
    page.locator("main a[href^='/batch/']").first.click()
    page.get_by_role("heading", name="People and texts").wait_for()
    take(page, directory / "batch.png")
    for name in ("new", "people", "settings"):
        page.goto(f"/{name}")
        take(page, directory / f"{name}.png")
    context.close()


def main() -> int:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    start = time.monotonic()
    with running_demo() as (base_url, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        pictures(browser, base_url, token, directory)
        browser.close()
    sys.stdout.write(f"taken in {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
