"""Do on the owner's page, with every process running, what somebody does who has never seen the product.

The send queue server, the dispatcher, the outreach server and the sender are real; the sender works over the stand-in
for Messages.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fake_messages
import mac_folder
import pytest
from testing import OWNER_TOKEN, Script, TestData, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MINE = "+447700900999"
FAILING = ("+447700900104", "+447700900109")
NAMES = ("Ana", "Ben", "Cem", "Dua", "Eva", "Finn", "Gil", "Hugo", "Ida", "Jan", "Kim", "Lou")
PEOPLE = (
    "First name,Last name,Mobile,City\n"
    + "".join(f"{name},Smith,07700 9001{number:02},York\n" for number, name in enumerate(NAMES))
    + "Max,Smith,4.47701E+11,York\nNina,Smith,,York\n"
)


@pytest.fixture
def messages(
    world: TestData, server: tuple[Script, str], start: Callable[..., Script], tmp_path: Path
) -> Iterator[fake_messages.Messages]:
    """Messages on a Mac whose sender runs; two people cannot be reached. The dispatcher runs, too."""
    world.device("Mac mini", token="device-token-0123456789")
    world.settings(max_per_minute=None, max_per_hour=None, max_per_day=None, min_gap_seconds=None)
    mac = tmp_path / "mac mini"
    mac.mkdir()
    mac_folder.make(mac, server[1], "device-token-0123456789")
    with contextlib.closing(mac_folder.messages(mac)) as messages:
        for handle in FAILING:
            messages.expect(fake_messages.fails(22, after=0.02, error_after=0.05), to=handle, times=None)
        messages.expect(mac_folder.quick(), times=None)
        start(*mac_folder.app_command(mac))
        start(*mac_folder.sender_command(mac), HOME=str(mac), **mac_folder.ENVIRONMENT)
        start("dispatcher.py", MAC_SYNC_BASE_URL=server[1], DISPATCH_INTERVAL_SECONDS="1")
        yield messages


@pytest.fixture
def page(chromium: "Browser", messages: fake_messages.Messages, start: Callable[..., Script]) -> "Iterator[Page]":
    """The page of the owner, on a phone, not logged in."""
    script = start("outreach_server.py", OUTREACH_PORT="0", DEFAULT_REGION="GB", DISPATCH_INTERVAL_SECONDS="1")
    context = chromium.new_context(
        viewport={"width": 390, "height": 844}, base_url=f"http://127.0.0.1:{script.port()}", locale="en-GB"
    )
    context.set_default_timeout(15_000)
    with contextlib.closing(context):
        yield context.new_page()


def handles_left(messages: fake_messages.Messages) -> list[str]:
    return [handle for handle, _ in messages.left()]


def test_somebody_who_has_never_seen_the_product_sends_a_batch(
    page: "Page", messages: fake_messages.Messages, world: TestData, tmp_path: Path
) -> None:
    (tmp_path / "people.csv").write_text(PEOPLE)

    # logs in,
    page.goto("/")
    page.get_by_label("Owner's token").fill(OWNER_TOKEN)
    page.get_by_role("button", name="Log in").click()

    # imports a CSV,
    page.get_by_role("link", name="New", exact=True).click()
    page.get_by_text("Or take the people from a CSV file").click()
    page.get_by_label("The file").set_input_files(tmp_path / "people.csv")
    page.get_by_role("button", name="Upload it").click()
    page.get_by_text("12 new people, 0 changed, 0 known already, 2 lines cannot be used").wait_for()
    page.get_by_text("a spreadsheet has changed this number").wait_for()
    page.get_by_role("button", name="Import, and write to these 12 people").click()
    page.get_by_text("Imported: 12 new people").wait_for()

    # writes a text with a name in it,
    page.get_by_label("The text").fill("Hi ")
    page.get_by_role("button", name="{{ client.first_name }}").click()
    page.get_by_label("The text").press_sequentially(", this is Ana from Blue Salon. Reply STOP to opt out.")
    page.get_by_text("this is Ana from Blue Salon. Reply STOP to opt out.").nth(1).wait_for()  # the live preview
    page.get_by_label("Name, for yourself").fill("Spring")
    page.get_by_role("button", name="Check everybody, and go on").click()
    page.get_by_text("12 people would get this message. Nothing was sent yet.").wait_for()

    # tests it on themselves,
    page.get_by_label("Your number or e-mail address").fill(MINE)
    page.get_by_role("button", name="Send me a test").click()
    page.get_by_text(f"A test is on its way to {MINE}").wait_for()
    wait_until(lambda: handles_left(messages) == [MINE], seconds=30)
    assert messages.left()[0][1].startswith("Hi ")

    # sends the first five,
    page.get_by_label("Pause after the first").fill("5")
    page.get_by_label("Type the number of people").fill("12")
    page.get_by_role("button", name="Send to 12 people").click()
    page.get_by_text("It is being sent to 12 people. It pauses after 5 messages").wait_for()

    # looks,
    page.get_by_text("This batch paused itself").wait_for(timeout=60_000)
    assert len(handles_left(messages)) == 1 + 5
    assert set(world.statuses()) >= {"pending"}

    # sends the rest,
    page.get_by_role("button", name="Resume this batch").click()

    # pauses in the middle,
    wait_until(lambda: len(handles_left(messages)) >= 1 + 6, seconds=30)
    page.get_by_role("button", name="Pause this batch").click()
    page.get_by_text("You paused this batch.").wait_for()
    wait_until(lambda: "queued" not in world.statuses(), seconds=30)
    assert "pending" in world.statuses()

    # resumes,
    page.get_by_role("button", name="Resume this batch").click()
    wait_until(lambda: not {"pending", "queued"} & set(world.statuses()), seconds=60, pause=0.2)

    # finds the two failures and their reasons,
    page.get_by_role("link", name="Today").click()
    page.get_by_role("link", name="Spring").first.click()
    page.get_by_text("Why messages failed or were left out").wait_for()
    page.get_by_text("2 failed", exact=True).wait_for()
    page.get_by_role("link", name="Failed 2").click()
    for number in (4, 9):
        page.get_by_role("link", name=f"{NAMES[number]} Smith").wait_for()
    reasons = {reason for (reason,) in world.quinn("SELECT DISTINCT failure_reason FROM outreach_batch_items")} - {None}
    assert len(reasons) == 1
    page.get_by_text(reasons.pop()).first.wait_for()

    # opts one person out,
    page.get_by_role("link", name=f"{NAMES[4]} Smith").click()
    page.get_by_text("This person wants no more messages").click()
    page.get_by_label("What the person said, and where").fill("called, wants no more messages")
    page.get_by_role("button", name="Send no more messages").click()
    page.get_by_text("Nobody writes to this person").wait_for()
    assert world.icloud("SELECT handle_key FROM icloud.opt_outs") == [(FAILING[0],)]

    # and changes the quiet hours.
    page.get_by_role("link", name="Settings").click()
    page.get_by_label("Quiet from").fill("20:30")
    page.get_by_label("Quiet until").fill("09:15")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved.").wait_for()
    assert world.quinn("SELECT quiet_hours_start, quiet_hours_end FROM outreach_settings") == [("20:30", "09:15")]

    # Everybody who could be reached got it once.
    expected = {f"+4477009001{number:02}" for number in range(len(NAMES))} - set(FAILING)
    left = handles_left(messages)[1:]
    assert sorted(left) == sorted(expected)
