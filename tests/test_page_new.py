"""Check the page New over HTTP: what each button does, what is refused where, double clicks, tabs, other sessions."""

import csv
import io
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from page_browser import Browser, serving_at
from test_page import Fields
from testing import OWNER_TOKEN, Databases, TestData

import compositions
import page_new
import previews
import uploads

TEXT = "Hello {{ client.name }}, this is Ann. Reply STOP to end."
HOSTILE = "<script>window.hacked = 1</script>"
NOBODY = "5a6a6e1b-0000-4000-8000-000000000000"
CSV = f"Name,Phone\nAna,+14155550123\n{HOSTILE},12\n{HOSTILE},+14155550124\n"
FORM = {
    "mode": "all", "field-0": "name", "op-0": "filled", "value-0": "", "text": TEXT, "tab": "a", "version": "0",
    "recheck": "true",
}  # fmt: skip


@pytest.fixture
def url(databases: Databases) -> Iterator[str]:
    page_new.KnownFields.found.clear()  # of the test before, over the same databases
    with serving_at(databases) as url:
        yield url


@pytest.fixture
def stranger(url: str) -> Browser:
    return Browser(url)


@pytest.fixture
def owner(url: str) -> Browser:
    """A browser that is logged in."""
    browser = Browser(url)
    assert browser.log_in().status_code == 303
    return browser


@pytest.fixture
def people(world: TestData) -> list[str]:
    """Three people, one of them without a handle, and a device."""
    world.device("mac-mini")
    ids = [world.client(handle) for handle in ("+14155550123", "+14155550124", None)]
    world.quinn("UPDATE clients SET name = 'Ana ' || left(id::text, 4)")
    return ids


def new_id() -> str:
    return str(uuid.uuid4())


def follow(browser: Browser, response: requests.Response) -> requests.Response:
    """Go where a response leads; fail unless it leads somewhere."""
    assert response.status_code == 303, response.text
    return browser.get(response.headers["Location"])


def post(browser: Browser, composition_id: str, do: str, **changes: Any) -> requests.Response:
    return browser.post(f"/new/{composition_id}", {**FORM, "do": do, **changes})


def draft(browser: Browser, composition_id: str, **changes: Any) -> str:
    """Make a draft; return its id."""
    response = post(browser, composition_id, "draft", **changes)
    assert response.status_code == 303, response.text
    assert "/new/check/" in response.headers["Location"], follow(browser, response).text
    return str(response.headers["Location"].rpartition("/")[2])


def digest_in(page: requests.Response) -> str:
    return dict(Fields(page.text).found)["digest"]


def send(browser: Browser, batch_id: str, recipients: str = "2", **fields: str) -> requests.Response:
    digest = fields.pop("digest", None) or digest_in(browser.get(f"/new/check/{batch_id}"))
    return browser.post(f"/new/check/{batch_id}/send", {"digest": digest, "recipients": recipients, **fields})


def statuses(world: TestData) -> list[str]:
    return [status for (status,) in world.quinn("SELECT status FROM outreach_batches ORDER BY created_at")]


# --- composing ----------------------------------------------------------------------------------------


def test_nothing_is_written_before_something_is_posted(owner: Browser, world: TestData) -> None:
    assert owner.get("/new").status_code == 200
    assert world.quinn("SELECT count(*) FROM outreach_compositions") == [(0,)]


def test_a_row_is_added_and_removed_and_what_was_typed_stays(owner: Browser, people: list[str]) -> None:
    one = new_id()
    page = follow(owner, post(owner, one, "add"))
    assert 'name="field-1"' in page.text
    assert TEXT.replace("'", "&#39;") in page.text
    version = dict(Fields(page.text).found)["version"]
    page = follow(owner, post(owner, one, "remove-0", version=version, **{"field-1": "sent_count", "op-1": "eq"}))
    assert 'name="field-1"' not in page.text
    assert re.search(r'<option value="sent_count" selected>', page.text)


def test_the_preview_shows_texts_and_who_is_left_out(owner: Browser, people: list[str]) -> None:
    page = follow(owner, post(owner, new_id(), "preview"))
    assert "3 people match" in page.text
    assert "2 would get a message" in page.text
    assert re.search(r"Hello Ana \w{4}, this is Ann", page.text)
    assert "1 person: no primary number or address" in page.text


def test_the_error_of_a_text_is_shown_at_its_place(owner: Browser, people: list[str]) -> None:
    page = follow(owner, post(owner, new_id(), "draft", text="Hello\nMs {{ client.nmae }}, hi"))
    assert "Line 2, column 7: nobody has client.nmae: did you mean client.name?" in page.text
    assert "Ms {{<mark>" in page.text.replace(" <mark>", "<mark>")
    assert "<mark>client.nmae</mark>" in page.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text": " "}, "Write the text."),
        ({"mode": ""}, "Say who is meant"),
        ({"field-0": ""}, "Choose what to compare"),
        ({"first_n": "none"}, "Type a whole number from 1"),
        ({"send_from": "2999"}, "no date"),
        ({"op-0": "eq", "value-0": "Nobody"}, "0 people match."),
    ],
)
def test_a_draft_that_cannot_be_made_leads_back_to_the_form_with_a_sentence(
    owner: Browser, world: TestData, people: list[str], changes: dict[str, str], sentence: str
) -> None:
    page = follow(owner, post(owner, new_id(), "draft", name="Spring", **changes))
    assert sentence in page.text
    assert 'value="Spring"' in page.text
    assert statuses(world) == []


def test_a_second_tab_gets_a_composition_of_its_own(owner: Browser, world: TestData, people: list[str]) -> None:
    one = new_id()
    post(owner, one, "preview", tab="a")
    post(owner, one, "preview", tab="a", version="1", text=TEXT + " One.")
    response = post(owner, one, "preview", tab="b", version="1", text=TEXT + " Two.")
    assert one not in response.headers["Location"]
    page = follow(owner, response)
    assert "Another tab has changed this" in page.text
    assert "Two." in page.text
    assert "One." in owner.get(f"/new/{one}").text


def test_a_draft_is_made_once_and_again_only_for_another_text(
    owner: Browser, world: TestData, people: list[str]
) -> None:
    one = new_id()
    first = draft(owner, one)
    assert draft(owner, one) == first, "a double click"
    other = draft(owner, one, text=TEXT + " Bye.")
    assert other != first
    assert statuses(world) == ["cancelled", "draft"]
    assert draft(owner, one, text=TEXT + " Bye.") == other
    back = draft(owner, one)
    assert back not in (first, other)
    assert statuses(world) == ["cancelled", "cancelled", "draft"]


def test_an_old_draft_of_the_same_text_is_written_again(owner: Browser, world: TestData, people: list[str]) -> None:
    one = new_id()
    first = draft(owner, one)
    world.quinn("UPDATE outreach_batches SET created_at = now() - interval '1 hour'")
    assert draft(owner, one) != first


def test_what_was_begun_is_listed_until_it_is_sent(owner: Browser, world: TestData, people: list[str]) -> None:
    one = new_id()
    post(owner, one, "preview", name=HOSTILE)
    page = owner.get("/new")
    assert f'href="/new/{one}"' in page.text
    assert HOSTILE not in page.text
    send(owner, draft(owner, one, name=HOSTILE))
    assert f'href="/new/{one}"' not in owner.get("/new").text
    assert "sent already" in owner.get(f"/new/{one}").text
    post(owner, one, "delete")
    assert owner.get(f"/new/{one}").status_code == 404


def test_a_batch_can_be_copied_into_the_form(owner: Browser, world: TestData, people: list[str]) -> None:
    batch_id = draft(owner, new_id(), name="Spring", days="30")
    page = owner.get(f"/new?from={batch_id}")
    assert 'value="Spring"' in page.text
    assert TEXT in page.text
    assert owner.get(f"/new/{batch_id}").headers["Location"] == f"/new/check/{batch_id}"


def test_a_query_that_rows_cannot_express_stays_json(owner: Browser, world: TestData, people: list[str]) -> None:
    query = json.dumps({"v": 1, "where": {"not": {"field": "name", "eq": "x"}}})
    batch_id = draft(owner, new_id(), mode="json", json=query)
    assert "&#34;not&#34;" in owner.get(f"/new?from={batch_id}").text


def test_people_who_are_left_out_are_listed(owner: Browser, world: TestData, people: list[str]) -> None:
    one = new_id()
    world.quinn("UPDATE clients SET name = %(name)s WHERE id = %(id)s", name=HOSTILE, id=people[2])
    batch_id = draft(owner, one)
    for path in (f"/new/{one}", f"/new/check/{batch_id}"):
        page = owner.get(f"{path}/left-out/noHandle")
        assert "&lt;script&gt;" in page.text
        assert HOSTILE not in page.text
        assert "Nobody is left out" in owner.get(f"{path}/left-out/tooLong").text
        assert owner.get(f"{path}/left-out/nothing").status_code == 400


# --- checking and sending -----------------------------------------------------------------------------


def test_send_needs_the_number_that_is_shown(owner: Browser, world: TestData, people: list[str]) -> None:
    batch_id = draft(owner, new_id())
    for typed, sentence in (("", "Type the number of people, 2"), ("3", "You typed 3, and it is 2"), ("two", "whole")):
        refused = send(owner, batch_id, typed)
        assert refused.status_code == 400
        assert sentence in refused.text
        assert statuses(world) == ["draft"]
    for _ in range(2):  # a double click
        response = send(owner, batch_id, digest=world.quinn("SELECT digest FROM outreach_batches")[0][0], first_n="1")
        assert (response.status_code, response.headers["Location"].partition("?")[0]) == (303, f"/batch/{batch_id}")
    assert world.quinn("SELECT status, first_n FROM outreach_batches") == [("sending", 1)]
    assert "look at it" in owner.get(f"/new/check/{batch_id}").text


def test_a_draft_that_somebody_has_changed_is_not_sent_and_nothing_typed_is_lost(
    owner: Browser, world: TestData, people: list[str]
) -> None:
    batch_id = draft(owner, new_id())
    refused = send(owner, batch_id, digest="0" * 64, first_n="1")
    assert refused.status_code == 409
    assert "somebody has changed this draft" in refused.text.lower()
    assert 'value="1"' in refused.text
    world.quinn("UPDATE outreach_batch_items SET rendered_body = 'other'")
    refused = send(owner, batch_id)
    assert refused.status_code == 409
    assert "messages were changed since the draft" in refused.text
    assert statuses(world) == ["draft"]


def test_a_draft_that_was_replaced_is_not_sent(owner: Browser, world: TestData, people: list[str]) -> None:
    one = new_id()
    first = draft(owner, one)
    digest = digest_in(owner.get(f"/new/check/{first}"))
    draft(owner, one, text=TEXT + " Bye.")
    refused = send(owner, first, digest=digest)
    assert refused.status_code == 409
    assert "the new draft is under" in refused.text
    assert statuses(world) == ["cancelled", "draft"]


def test_a_test_goes_to_the_owner_once_for_each_click(owner: Browser, world: TestData, people: list[str]) -> None:
    batch_id = draft(owner, new_id())
    world.icloud("UPDATE icloud.devices SET last_seen_at = now()")
    once = dict(Fields(owner.get(f"/new/check/{batch_id}").text).found)["once"]
    for _ in range(2):
        response = owner.post(f"/new/check/{batch_id}/test", {"to": "+14155550199", "once": once})
        assert "A test is on its way to +14155550199" in follow(owner, response).text
    assert world.icloud("SELECT to_handle FROM icloud.send_queue") == [("+14155550199",)]
    for to, sentence in (("", "Type your own number"), ("nobody", "is no handle")):
        refused = owner.post(f"/new/check/{batch_id}/test", {"to": to, "once": once})
        assert refused.status_code == 400
        assert sentence in refused.text
    assert statuses(world) == ["draft"]


def test_the_same_text_again_says_who_got_it(owner: Browser, world: TestData, people: list[str]) -> None:
    batch_id = draft(owner, new_id(), name="Spring")
    send(owner, batch_id)
    world.quinn("UPDATE outreach_batch_items SET status = 'sent', sent_at = now() - interval '2 days'")
    again = new_id()
    sentence = r"You sent this text on \w+day to 2 of these 2 people: <a href=\"/batch/[0-9a-f-]+\">Spring</a>"
    assert re.search(sentence, follow(owner, post(owner, again, "preview")).text)
    assert re.search(sentence, owner.get(f"/new/check/{draft(owner, again)}").text)


# --- a file -------------------------------------------------------------------------------------------


def upload(browser: Browser, composition_id: str, content: str, name: str = "people.csv") -> requests.Response:
    """Send the form with a file, as a browser does."""
    fields = [(key, (None, value)) for key, value in {**FORM, "id": composition_id}.items()]
    prepared = requests.Request(
        "POST", f"{browser.url}/new/upload", files=[*fields, ("file", (name, content.encode()))]
    ).prepare()
    assert isinstance(prepared.body, bytes)
    return browser.post("/new/upload", prepared.body, Content_Type=prepared.headers["Content-Type"])


def test_a_file_shows_its_errors_in_its_rows_and_is_imported(owner: Browser, world: TestData) -> None:
    one = new_id()
    response = upload(owner, one, CSV)
    page = follow(owner, response)
    assert "2 new people, 0 changed, 0 known already, 1 line cannot be used" in page.text
    assert re.search(r'<td class="wrong" aria-describedby="why-3">12</td>', page.text)
    assert HOSTILE not in page.text
    path = response.headers["Location"].partition("?")[0]
    fields = dict(Fields(page.text).found)
    assert world.quinn("SELECT count(*) FROM clients") == [(0,)]
    for _ in range(2):  # a double click
        response = owner.post(path, {"do": "apply", "digest": fields["digest"], "for": fields["for"]})
        assert response.headers["Location"].startswith(f"/new/{one}?preview=1")
    assert world.quinn("SELECT count(*) FROM clients") == [(2,)]
    page = owner.get(response.headers["Location"])
    assert "2 people match" in page.text
    assert TEXT in page.text, "what was typed before the upload is still there"
    assert owner.get(path).status_code == 303, "a reload of the plan leads on"


def test_a_plan_that_no_longer_holds_is_shown_again(owner: Browser, world: TestData) -> None:
    response = upload(owner, new_id(), CSV)
    path = response.headers["Location"].partition("?")[0]
    digest = digest_in(follow(owner, response))
    world.client("+14155550123")
    refused = owner.post(path, {"do": "apply", "digest": digest})
    assert refused.status_code == 409
    assert "Somebody has changed the clients since you saw the plan" in refused.text
    assert "1 new person, 1 changed" in refused.text
    assert world.quinn("SELECT count(*) FROM clients") == [(1,)]


def test_many_renames_need_their_number(owner: Browser, world: TestData) -> None:
    for number in range(6):
        world.client(f"+1415555010{number}")
    text = "Name,Phone\n" + "".join(f"New {number},+1415555010{number}\n" for number in range(6))
    response = upload(owner, new_id(), text)
    path = response.headers["Location"].partition("?")[0]
    page = follow(owner, response)
    assert "This renames 6 of 6 people" in page.text
    refused = owner.post(path, {"do": "apply", "digest": digest_in(page)})
    assert refused.status_code == 400
    assert "Type 6" in refused.text
    done = owner.post(path, {"do": "apply", "digest": digest_in(page), "renames": "6"})
    assert done.status_code == 303
    assert world.quinn("SELECT count(*) FROM clients WHERE name LIKE 'New%%'") == [(6,)]


def test_a_file_without_a_column_for_the_number_can_be_told_which_one_it_is(owner: Browser, world: TestData) -> None:
    response = upload(owner, new_id(), "Who,Reach\nAna,+14155550123\n")
    path = response.headers["Location"]
    page = follow(owner, response)
    assert "no column is called phone" in page.text.lower()
    assert "--handle" not in page.text
    owner.post(path.partition("?")[0], {"do": "columns", "handle": "Reach", "name": "Who"})
    assert "1 new person" in owner.get(path).text


@pytest.mark.parametrize(
    "content", ["PK\x03\x04 a workbook", "Name,Phone\n\xe9,12\n".encode("latin-1").decode("latin-1")]
)
def test_a_file_that_is_no_csv_says_what_to_do(owner: Browser, world: TestData, content: str) -> None:
    response = upload(owner, new_id(), content)
    page = follow(owner, response)
    assert page.status_code == 200
    assert ("save it as CSV" in page.text) or ("cannot be used" in page.text)


def test_no_file_is_a_sentence_and_nothing_is_lost(owner: Browser, world: TestData) -> None:
    page = follow(owner, upload(owner, new_id(), ""))
    assert "Choose a file first" in page.text
    assert TEXT in page.text


def test_a_large_file_needs_a_session(owner: Browser, stranger: Browser, world: TestData) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["Name", "Phone", "Note"])
    writer.writerows(["Ana", f"+1415555{number:04}", "x" * 1000] for number in range(2000))
    assert follow(owner, upload(owner, new_id(), out.getvalue())).status_code == 200
    assert upload(stranger, new_id(), out.getvalue()).status_code == 413


def test_the_same_file_again_says_so(owner: Browser, world: TestData) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    upload_id = uploads.add(quinn, CSV.encode(), "people.csv")
    job = uploads.plan(quinn, icloud, upload_id)
    uploads.apply(quinn, upload_id, job, job.plan.digest)
    page = follow(owner, upload(owner, new_id(), CSV))
    assert "You imported the same file today at" in page.text
    assert "Write to these 2 people" in page.text


def test_an_import_without_a_composition_begins_one(owner: Browser, world: TestData) -> None:
    upload_id = uploads.add(world.databases.quinn, CSV.encode(), "people.csv")
    digest = digest_in(owner.get(f"/new/file/{upload_id}"))
    response = owner.post(f"/new/file/{upload_id}", {"do": "apply", "digest": digest})
    assert response.headers["Location"].startswith(f"/new?import={upload_id}")
    assert "people.csv" in follow(owner, response).text


# --- sessions, other people ---------------------------------------------------------------------------


def test_a_session_that_ends_while_composing_loses_no_text(owner: Browser, world: TestData, people: list[str]) -> None:
    one = new_id()
    world.quinn("DELETE FROM outreach_sessions")
    login = post(owner, one, "draft", text=TEXT + ' "quoted" <b>')
    assert login.status_code == 401
    assert world.quinn("SELECT count(*) FROM outreach_compositions") == [(0,)]
    carried = owner.post("/login", [("password", OWNER_TOKEN), *Fields(login.text).found])
    assert carried.status_code == 200
    fields = Fields(carried.text).found
    assert ("text", TEXT + ' "quoted" <b>') in fields
    assert "/new/check/" in owner.post(f"/new/{one}", fields).headers["Location"]


def test_a_session_that_ends_before_an_upload_loses_the_file_only(owner: Browser, world: TestData) -> None:
    one = new_id()
    world.quinn("DELETE FROM outreach_sessions")
    login = upload(owner, one, CSV)
    carried = owner.post("/login", [("password", OWNER_TOKEN), *Fields(login.text).found])
    page = follow(owner, owner.post("/new/upload", Fields(carried.text).found))
    assert "Choose a file first" in page.text
    assert TEXT in page.text


@pytest.mark.parametrize("path", ["/new", f"/new/{NOBODY}", "/new/upload", f"/new/file/{NOBODY}"])
def test_a_stranger_and_another_site_reach_nothing(
    owner: Browser, stranger: Browser, world: TestData, path: str
) -> None:
    assert stranger.get(path).status_code in (401, 404, 405)
    assert owner.post(path, FORM, Sec_Fetch_Site="cross-site").status_code in (403, 405)
    assert world.quinn("SELECT count(*) FROM outreach_compositions") == [(0,)]


@pytest.mark.parametrize("text", [HOSTILE, "\u202eevil", "x" * 10_000, "\0", "{{ client", "'\"><img src=x onerror=a>"])
def test_hostile_texts_are_escaped_and_come_back_as_typed(owner: Browser, world: TestData, text: str) -> None:
    world.client()
    world.quinn("UPDATE clients SET name = %(name)s", name=text.replace("\0", ""))
    one = new_id()
    names = ("text", "name", "json", "vars", "limit", "days", "send_from", "first_n", "value-0", "field-0", "op-0")
    page = follow(owner, owner.post(f"/new/{one}", {**FORM, **dict.fromkeys(names, text), "do": "preview"}))
    assert page.status_code == 200
    assert "<script>window" not in page.text
    assert "<img src=x" not in page.text
    kept = compositions.find(world.databases.quinn, one)
    assert kept is not None
    assert kept.form.text == text.replace("\0", "\ufffd")
    page = follow(owner, owner.post(f"/new/{one}", {**FORM, "version": "1", "op-0": "eq", "do": "preview"}))
    assert page.status_code == 200
    assert "<script>window" not in page.text, "the values that are offered"


def test_no_text_of_a_person_is_in_a_url_or_a_log(
    owner: Browser, world: TestData, caplog: pytest.LogCaptureFixture
) -> None:
    world.client()
    world.quinn("UPDATE clients SET name = 'Geheim'")
    caplog.set_level("DEBUG")
    one = new_id()
    changes = {"op-0": "eq", "value-0": "Geheim", "name": "Geheim"}
    locations = [post(owner, one, do, **changes).headers["Location"] for do in ("add", "preview", "draft")]
    assert "Geheim" not in " ".join(locations)
    assert "Geheim" not in caplog.text


def test_a_preview_of_many_people_checks_the_first_and_says_so(
    owner: Browser, world: TestData, people: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "MAX_CHECKED", 2)
    one = new_id()
    page = follow(owner, post(owner, one, "preview"))
    assert "3 people match. Of the first 2" in " ".join(page.text.split())
    limited = follow(owner, post(owner, one, "preview", version="1", limit="1"))
    assert "1 person matches." in limited.text
    assert "Of the first" not in limited.text
