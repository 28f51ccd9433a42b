"""Check the owner's API: tokens and bodies; each refusal with its sentence; what each endpoint does."""

import json
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import requests
from helpers import ApiClient, run_script
from testing import OWNER_TOKEN, ROOT, SERVICE_TOKEN, Databases, Script, TestData

import batches
import outreach_server
import serving

NOBODY = "5a6a6e1b-0000-4000-8000-000000000000"  # the id of no batch and no device
BATCH = f"/my/outreach/batch/{NOBODY}"
VERBS = ("test", "send", "pause", "resume", "cancel", "retry")
EVERYONE = {"v": 1, "where": {"everyone": True}}
DIGEST = "0" * 64
ENDPOINTS = [
    ("POST", "/my/outreach/search"),
    ("POST", "/my/outreach/dry-run"),
    ("POST", "/my/outreach/batch"),
    ("GET", "/my/outreach/batch"),
    ("GET", BATCH),
    ("GET", f"{BATCH}/items"),
    *[("POST", f"{BATCH}/{verb}") for verb in VERBS],
    ("GET", "/my/outreach/settings"),
    ("PUT", "/my/outreach/settings"),
    ("GET", "/my/outreach/status"),
    ("POST", "/my/outreach/clients"),
    ("GET", "/my/outreach/opt-outs"),
    ("POST", "/my/outreach/opt-outs"),
    ("GET", "/my/outreach/opt-outs.csv"),
    *[("POST", f"/my/outreach/opt-outs/{verb}") for verb in ("import", "end", "assign")],
    *[("POST", f"/my/outreach/people/{verb}") for verb in ("show", "forget")],
    ("GET", "/metrics"),
]


def refused(response: requests.Response, status: int) -> str:
    """Fail unless the response is an error with this status; return its sentence."""
    assert response.status_code == status, response.text
    return str(response.json()["error"])


def done(response: requests.Response) -> Any:
    """Fail unless the request succeeded; return its data."""
    assert response.status_code == 200, response.text
    return response.json()["data"]


# --- tokens, paths, bodies ----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
@pytest.mark.parametrize("token", [None, "wrong", SERVICE_TOKEN, OWNER_TOKEN + "x"])
def test_every_endpoint_needs_the_owners_token(owner_url: str, method: str, path: str, token: str | None) -> None:
    response = ApiClient(owner_url, token).call(method, path, "{")  # a body that cannot be read is no news to strangers
    assert "bearer token" in refused(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_each_route_is_in_this_list(databases: Databases) -> None:
    api = outreach_server.Api("", "", "", timedelta())
    routes = {
        (route.method, route.rule.replace("<batch_id>", NOBODY)) for route in outreach_server.make_app(api).routes
    }
    assert {route for route in routes if route[0] != "HEAD"} == {*ENDPOINTS, ("GET", "/healthz")}


def test_unknown_paths_and_methods_are_errors_in_json(owner: ApiClient) -> None:
    assert "nothing at this path" in refused(owner.call("GET", "/my/outreach"), 404)
    assert "not allowed" in refused(owner.call("DELETE", "/my/outreach/settings"), 405)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{", "the body is not JSON in UTF-8"),
        (b'{"paused": "\xff"}', "the body is not JSON in UTF-8"),
        ("[" * 5000, "the body is not JSON in UTF-8"),
        ([], "Expected `object`"),
    ],
)
def test_a_body_that_is_no_object_is_a_400(owner: ApiClient, body: object, sentence: str) -> None:
    assert sentence in refused(owner.call("PUT", "/my/outreach/settings", body), 400)


def test_a_body_over_the_limit_is_a_413(owner: ApiClient) -> None:
    for size in (serving.BODY_LIMIT + 1, serving.READ_LIMIT + 1):
        response = owner.call("PUT", "/my/outreach/settings", b"x" * size)
        assert "too large" in refused(response, 413) or "larger than" in refused(response, 413)


# --- people and batches -------------------------------------------------------------------------------


@pytest.fixture
def request_body(world: TestData) -> dict[str, Any]:
    """A request for a batch to two people; a third one has no handle."""
    for handle in ("+14155550123", "+14155550124", None):
        world.client(handle)
    world.quinn("UPDATE clients SET name = 'Client ' || id")
    return {"id": NOBODY, "query": EVERYONE, "template": "Hello {{ client.name }}, this is Ann. Reply STOP to end."}


@pytest.fixture
def drafted(owner: ApiClient, request_body: dict[str, Any]) -> dict[str, Any]:
    """That batch as a draft."""
    draft: dict[str, Any] = done(owner.call("POST", "/my/outreach/batch", request_body))
    return draft


def test_a_search_counts_people_and_lists_who_is_left_out(owner: ApiClient, request_body: dict[str, Any]) -> None:
    found = done(owner.call("POST", "/my/outreach/search", {"query": EVERYONE}))
    assert (found["matched"], found["items"]) == (3, 2)
    [left_out] = found["leftOut"]
    assert (left_out["reason"], left_out["count"]) == ("noHandle", 1)
    page = done(owner.call("POST", "/my/outreach/search?reason=noHandle&limit=1", {"query": EVERYONE}))
    assert page == {"entries": left_out["sample"], "after": None}


def test_a_dry_run_writes_nothing_and_says_what_the_draft_says(
    owner: ApiClient, world: TestData, request_body: dict[str, Any]
) -> None:
    shown = done(owner.call("POST", "/my/outreach/dry-run", request_body))
    assert world.quinn("SELECT count(*) FROM outreach_batches") == [(0,)]
    draft = done(owner.call("POST", "/my/outreach/batch", request_body))
    assert draft["digest"] == shown["digest"]
    assert draft["previews"] == shown["previews"] != []


def test_the_same_request_is_the_same_draft_and_another_one_is_a_409(
    owner: ApiClient, request_body: dict[str, Any], drafted: dict[str, Any]
) -> None:
    again = done(owner.call("POST", "/my/outreach/batch", request_body))
    assert again["digest"] == drafted["digest"]
    other = request_body | {"template": "Hi"}
    assert "another batch with the id" in refused(owner.call("POST", "/my/outreach/batch", other), 409)


def test_send_needs_the_digest_and_the_number_that_were_seen(
    owner: ApiClient, world: TestData, drafted: dict[str, Any]
) -> None:
    send = {"digest": drafted["digest"], "recipients": 2, "firstN": 1}
    assert "its digest is" in refused(owner.call("POST", f"{BATCH}/send", send | {"digest": DIGEST}), 409)
    assert "2 recipients, not 3" in refused(owner.call("POST", f"{BATCH}/send", send | {"recipients": 3}), 409)
    assert world.quinn("SELECT status, approved_at FROM outreach_batches") == [("draft", None)]
    for _ in range(2):  # a double click
        assert done(owner.call("POST", f"{BATCH}/send", send))["status"] == "sending"
    assert world.quinn("SELECT status, first_n FROM outreach_batches") == [("sending", 1)]


def test_the_verbs_change_the_batch_and_say_what_they_withdrew(
    owner: ApiClient, world: TestData, drafted: dict[str, Any]
) -> None:
    def call(verb: str, body: object = None) -> Any:
        return owner.call("POST", f"{BATCH}/{verb}", body)

    assert "a draft is started with send" in refused(call("resume"), 409)
    assert "only a batch that is being sent can be paused" in refused(call("pause"), 409)
    done(call("send", {"digest": drafted["digest"], "recipients": 2}))
    assert done(call("pause")) == {"status": "paused", "withdrawn": 0, "beyondRecall": 0}
    assert done(call("resume"))["status"] == "sending"
    world.quinn("UPDATE outreach_batch_items SET status = 'failed'")
    assert done(call("retry")) == {"status": "sending", "pending": 2, "unknown": 0}
    assert done(call("retry", {"includeUnknown": True}))["pending"] == 0
    assert done(call("cancel"))["status"] == "cancelled"
    assert "only a paused batch" in refused(call("resume"), 409)


def test_retry_refuses_a_message_that_may_yet_leave(owner: ApiClient, world: TestData, drafted: dict[str, Any]) -> None:
    for (item_id,) in world.quinn("SELECT id FROM outreach_batch_items"):
        world.watched_outcome(item_id)
    response = owner.call("POST", f"{BATCH}/retry", {"includeUnknown": True})
    assert "the Mac still watches 2 messages, which may yet leave" in refused(response, 409)
    assert world.statuses() == ["failed"] * 2


def test_a_retry_waits_for_the_dispatcher_and_then_gives_up(
    owner: ApiClient, databases: Databases, drafted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LOCK_WAIT", 0.2)
    batches.acquire_lock(databases.quinn, threading.Event())
    assert "the dispatcher is busy" in refused(owner.call("POST", f"{BATCH}/retry"), 409)
    databases.quinn.close()
    assert done(owner.call("POST", f"{BATCH}/retry"))["pending"] == 0


def test_a_test_message_goes_to_the_owner(owner: ApiClient, world: TestData, drafted: dict[str, Any]) -> None:
    assert "device" in refused(owner.call("POST", f"{BATCH}/test", {"to": "+14155550199"}), 409)
    world.device()
    queue_id = done(owner.call("POST", f"{BATCH}/test", {"to": "+1 (415) 555-0199"}))["sendQueueId"]
    assert world.row_columns(queue_id, "to_handle, status") == ("+14155550199", "queued")
    assert "is no handle" in refused(owner.call("POST", f"{BATCH}/test", {"to": "Ann"}), 400)
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('+14155550199', 'owner')")
    assert "has opted out" in refused(owner.call("POST", f"{BATCH}/test", {"to": "+14155550199"}), 422)


def test_batches_and_items_come_in_pages(owner: ApiClient, world: TestData, drafted: dict[str, Any]) -> None:
    for _ in range(2):
        world.batch(1)
    first = done(owner.call("GET", "/my/outreach/batch?limit=2"))
    rest = done(owner.call("GET", f"/my/outreach/batch?limit=2&after={first['after']}"))
    assert [len(page["entries"]) for page in (first, rest)] == [2, 1]
    assert (rest["entries"][0]["id"], rest["after"]) == (NOBODY, None)
    item, other = (done(owner.call("GET", f"{BATCH}/items?limit=1{more}")) for more in ("", "&status=pending"))
    assert item["entries"] == other["entries"]
    assert item["after"] == item["entries"][0]["id"]
    assert done(owner.call("GET", BATCH))["counts"]["pending"] == 2


@pytest.mark.parametrize(("method", "path"), [each for each in ENDPOINTS if NOBODY in each[1]])
def test_a_batch_that_does_not_exist_is_a_404(owner: ApiClient, method: str, path: str) -> None:
    bodies = {"test": {"to": "+14155550123"}, "send": {"digest": DIGEST, "recipients": 1}}
    body = bodies.get(path.rpartition("/")[2])
    assert "there is no batch" in refused(owner.call(method, path, body), 404)
    assert "its id is a UUID" in refused(owner.call(method, path.replace(NOBODY, "7"), body), 404)


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("search", {}, "missing required field `query`"),
        ("search", {"query": EVERYONE, "x": 1}, "unknown field `x`"),
        ("search", {"query": []}, "`$.query`"),
        ("search", {"query": {}}, "the query must be a JSON object that is not empty"),
        ("search", {"query": {"v": 1, "where": {}}}, "where must be a JSON object that is not empty"),
        ("search", {"query": {"v": 1, "where": {"field": "ctiy", "eq": "x"}}}, "The fields are: id, name,"),
        ("search", {"query": EVERYONE, "notSentWithinDays": 0}, "`$.notSentWithinDays`"),
        ("search?reason=tired", {"query": EVERYONE}, "there is no reason 'tired': use one of noHandle"),
        ("search?reason=%00", {"query": EVERYONE}, "`reason` is no text"),
        ("dry-run", {"query": EVERYONE}, "`template` is missing"),
        ("dry-run", {"query": EVERYONE, "template": 7}, "`$.template`"),
        ("dry-run", {"query": EVERYONE, "template": "a\x00"}, "has a NUL"),
        ("batch", {"query": EVERYONE, "template": "Hi"}, "`id` is missing"),
        ("batch", {"query": EVERYONE, "template": "Hi", "id": "7"}, "`$.id`"),
        ("batch", {"query": EVERYONE, "template": "Hi", "firstN": 0}, "`$.firstN`"),
        ("batch", {"query": EVERYONE, "template": "Hi", "sendFrom": "2026-01-31T09:00:00"}, "`$.sendFrom`"),
        (f"batch/{NOBODY}/test", {}, "missing required field `to`"),
        (f"batch/{NOBODY}/test", {"to": ""}, "`$.to`"),
        (f"batch/{NOBODY}/send", {"digest": DIGEST}, "missing required field `recipients`"),
        (f"batch/{NOBODY}/send", {"digest": "x", "recipients": 1}, "`$.digest`"),
        (f"batch/{NOBODY}/send", {"digest": DIGEST, "recipients": 0}, "`$.recipients`"),
        (f"batch/{NOBODY}/send", {"digest": DIGEST, "recipients": True}, "`$.recipients`"),
        (f"batch/{NOBODY}/retry", {"includeUnknown": "yes"}, "`$.includeUnknown`"),
    ],
)
def test_a_request_that_does_not_fit_is_a_400_that_names_the_place(
    owner: ApiClient, path: str, body: object, sentence: str
) -> None:
    assert sentence in refused(owner.call("POST", f"/my/outreach/{path}", body), 400)


def test_an_error_in_a_text_has_its_line_and_column(owner: ApiClient, world: TestData) -> None:
    world.client()
    body = {"query": EVERYONE, "template": "Hello\n  {{ client.nmae }}"}
    response = owner.call("POST", "/my/outreach/dry-run", body)
    assert "client.nmae" in refused(response, 400)
    assert response.json()["data"]["line"] == 2


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        *[(f"limit={text}", "`limit` must be a whole number from 1 to 100") for text in ("0", "101", "x", "1.5", "²")],
        ("after=7", "`after` must be the `after` of the page before"),
    ],
)
@pytest.mark.parametrize("path", ["/my/outreach/batch", f"{BATCH}/items"])
def test_a_page_that_cannot_be_is_a_400(owner: ApiClient, path: str, query: str, sentence: str) -> None:
    assert sentence in refused(owner.call("GET", f"{path}?{query}"), 400)


def test_items_are_asked_for_by_a_status_that_exists(owner: ApiClient) -> None:
    assert "`status` must be one of pending" in refused(owner.call("GET", f"{BATCH}/items?status=lost"), 400)


# --- settings and status ------------------------------------------------------------------------------


def test_settings_are_changed_one_at_a_time(owner: ApiClient, world: TestData) -> None:
    before = done(owner.call("GET", "/my/outreach/settings"))
    after = done(owner.call("PUT", "/my/outreach/settings", {"paused": True, "maxPerHour": 7}))
    assert after == before | {"paused": True, "maxPerHour": 7} == done(owner.call("GET", "/my/outreach/settings"))
    assert world.quinn("SELECT paused, max_per_hour FROM outreach_settings") == [(True, 7)]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"quietHoursStart": "9pm", "quietHoursEnd": "08:00"}, "'9pm' is not HH:MM"),
        ({"maxPerHour": -1}, "`$.maxPerHour`"),
        ({"limits": {}}, "unknown field `limits`"),
        ({"deviceId": NOBODY}, "deviceId is not the id of a device"),
    ],
)
def test_a_setting_that_would_not_work_is_a_400(owner: ApiClient, body: object, sentence: str) -> None:
    before = done(owner.call("GET", "/my/outreach/settings"))
    assert sentence in refused(owner.call("PUT", "/my/outreach/settings", body), 400)
    assert done(owner.call("GET", "/my/outreach/settings")) == before


def test_status_says_what_status_py_says(owner: ApiClient, world: TestData, databases: Databases) -> None:
    world.settings(paused=True)
    world.device()
    world.batch(1)
    shown = done(owner.call("GET", "/my/outreach/status"))
    printed = json.loads(run_script("status.py", "--json").stdout)
    assert shown["verdict"] == printed["verdict"]
    assert set(shown) == set(printed)


# --- clients ------------------------------------------------------------------------------------------

PEOPLE = "name;Handy;city\nAnna;0170 1111111;Köln\nBob;+49 170 2222222;Berlin\nCarl;none;Bonn\n"
CLIENTS = "/my/outreach/clients"


def test_an_import_shows_first_what_it_would_do(
    owner: ApiClient, world: TestData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "DE")
    shown = done(owner.call("POST", f"{CLIENTS}?filename=people.csv", PEOPLE.encode()))
    assert (shown["plan"]["new"], shown["plan"]["bad"], shown["applied"]) == (2, 1, None)
    assert world.quinn("SELECT count(*) FROM clients") == [(0,)]
    path = f"{CLIENTS}?filename=people.csv&apply={shown['plan']['digest']}"
    made = done(owner.call("POST", path, PEOPLE.encode()))
    assert made["applied"]["made"] == 2
    assert world.quinn("SELECT name, consent_source FROM clients ORDER BY name") == [
        ("Anna", "people.csv"),
        ("Bob", "people.csv"),
    ]


@pytest.mark.parametrize(
    ("query", "body", "status", "sentence"),
    [
        ("", b"", 400, ""),
        ("", b"a,b\n1,2\n", 400, ""),
        ("?encoding=nonsense", PEOPLE.encode(), 400, ""),
        ("?handle=nobody", PEOPLE.encode(), 400, ""),
        (f"?filename={'x' * 301}", PEOPLE.encode(), 400, "`filename` is longer than 300 characters"),
        ("?name=%ff", PEOPLE.encode(), 400, "`name` is no text in UTF-8"),
        ("?filename=%00", PEOPLE.encode(), 400, "`filename` is no text in UTF-8"),
        ("?apply=other", PEOPLE.encode(), 409, "this file would not change what the plan said"),
        ("?strict=1", PEOPLE.encode(), 400, "`strict` must be true or false"),
    ],
)
def test_a_file_that_cannot_be_imported_changes_nothing(
    owner: ApiClient, world: TestData, query: str, body: bytes, status: int, sentence: str
) -> None:
    assert sentence in refused(owner.call("POST", CLIENTS + query, body), status)
    assert world.quinn("SELECT count(*) FROM clients") == [(0,)]


def test_a_parameter_may_have_any_letter(owner: ApiClient) -> None:
    file = "Größe;Straße\n+491701111111;Anna\n".encode()
    plan = done(owner.call("POST", f"{CLIENTS}?handle=Größe&name=Straße", file))["plan"]
    assert {column["header"]: column["target"] for column in plan["columns"]} == {
        "Größe": "handle",
        "Straße": "clients.name",
    }


def test_a_strict_import_is_all_or_nothing(owner: ApiClient, world: TestData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "DE")
    digest = done(owner.call("POST", CLIENTS, PEOPLE.encode()))["plan"]["digest"]
    assert "bad" in refused(owner.call("POST", f"{CLIENTS}?strict=true&apply={digest}", PEOPLE.encode()), 400)
    assert world.quinn("SELECT count(*) FROM clients") == [(0,)]


def test_only_an_import_may_be_large_and_only_the_owners(owner: ApiClient, owner_url: str) -> None:
    lines = "".join(f"Person {number},+4917{number:08},{'x' * 500}\n" for number in range(3000))
    file = f"name,phone,note\n{lines}".encode()
    assert len(file) > serving.READ_LIMIT
    assert done(owner.call("POST", CLIENTS, file))["plan"]["new"] == 3000
    assert "too large" in refused(owner.call("PUT", "/my/outreach/settings", file), 413)
    assert "too large" in refused(ApiClient(owner_url, "wrong").call("POST", CLIENTS, file), 413)


def test_a_file_over_the_limit_is_a_413(owner_url: str) -> None:
    host, port = owner_url.removeprefix("http://").split(":")
    head = (
        f"POST {CLIENTS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {OWNER_TOKEN}\r\n"
        f"Content-Length: {outreach_server.UPLOAD_LIMIT}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


# --- opt-outs, what is stored -------------------------------------------------------------------------

OPT_OUTS = "/my/outreach/opt-outs"
JANE = {"handle": "+1 (415) 555-0123"}


def test_an_opt_out_is_recorded_with_words_and_date_listed_and_ended(owner: ApiClient, world: TestData) -> None:
    client_id = world.client("(415) 555-0123")
    world.quinn("UPDATE contact_relationships SET handle = '+1 415 555 0123'")
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, 'jane@example.com')", id=client_id)
    said = {"word": "on the phone", "receivedAt": "2026-01-31T10:00:00+01:00"}
    recorded = done(owner.call("POST", OPT_OUTS, JANE | said))
    assert recorded == {"handleKey": "+14155550123", "isNew": True, "isReadable": True}
    assert done(owner.call("POST", OPT_OUTS, JANE))["isNew"] is False
    done(owner.call("POST", OPT_OUTS, {"handle": "jane@example.com"}))
    newest, oldest = done(owner.call("GET", OPT_OUTS))["entries"]
    assert newest["handleKey"] == "jane@example.com"
    assert (oldest["word"], oldest["receivedAt"], oldest["source"]) == ("on the phone", "2026-01-31T09:00:00Z", "owner")
    ended = done(owner.call("POST", f"{OPT_OUTS}/end", JANE))
    assert ended == {"isEnded": True, "others": ["jane@example.com"]}
    assert done(owner.call("POST", f"{OPT_OUTS}/end", JANE))["isEnded"] is False


def test_opt_outs_come_in_pages(owner: ApiClient) -> None:
    done(owner.call("POST", f"{OPT_OUTS}/import", "".join(f"+1415555{number:04}\n" for number in range(5))))
    seen, after = [], ""
    while after is not None:
        page = done(owner.call("GET", f"{OPT_OUTS}?limit=2{after and f'&after={after}'}"))
        seen += [entry["handleKey"] for entry in page["entries"]]
        after = page["after"]
    assert sorted(seen) == [f"+1415555{number:04}" for number in range(5)]


def test_an_opt_out_of_an_unknown_address_is_listed_until_it_is_assigned(owner: ApiClient, world: TestData) -> None:
    client_id = world.client()
    for handle in ("unknown@example.com", "+14155550123"):
        done(owner.call("POST", OPT_OUTS, {"handle": handle}))
    [entry] = done(owner.call("GET", f"{OPT_OUTS}?unassigned=true"))["entries"]
    wanted = {"handle": entry["handleKey"], "clientId": client_id}
    assert [done(owner.call("POST", f"{OPT_OUTS}/assign", wanted))["isNew"] for _ in range(2)] == [True, False]
    assert done(owner.call("GET", f"{OPT_OUTS}?unassigned=true")) == {"entries": [], "after": None}


def test_the_record_is_exported_as_csv_and_its_export_can_be_imported(
    owner: ApiClient, owner_url: str, world: TestData
) -> None:
    done(owner.call("POST", OPT_OUTS, JANE | {"word": "Größe, =1+1", "receivedAt": "2026-01-31T09:00:00Z"}))
    done(owner.call("POST", OPT_OUTS, {"handle": "joe@example.com"}))
    done(owner.call("POST", f"{OPT_OUTS}/end", {"handle": "joe@example.com"}))
    exported = requests.get(f"{owner_url}{OPT_OUTS}.csv", headers=owner.headers, timeout=10)
    assert exported.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert "attachment" in exported.headers["Content-Disposition"]
    world.icloud("TRUNCATE icloud.opt_outs")
    imported = done(owner.call("POST", f"{OPT_OUTS}/import", exported.content + b"nobody,,,,,,,\n"))
    assert imported == {"new": 1, "known": 0, "bad": 1, "badLines": [{"line": 4, "text": "nobody, , , , , , , "}]}
    [entry] = done(owner.call("GET", OPT_OUTS))["entries"]
    assert (entry["word"], entry["receivedAt"]) == ("Größe, =1+1", "2026-01-31T09:00:00Z")


def test_a_long_list_of_opt_outs_may_be_imported(owner: ApiClient) -> None:
    file = "handle,note\n" + "".join(f"+4917{number:08},{'x' * 500}\n" for number in range(3000))
    assert len(file) > serving.READ_LIMIT
    assert done(owner.call("POST", f"{OPT_OUTS}/import", file))["new"] == 3000


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("opt-outs", {}, "missing required field `handle`"),
        ("opt-outs", {"handle": "Jane"}, "`handle` is neither a phone number nor an e-mail address"),
        ("opt-outs", {"handle": "a\ud800@b.de"}, "`handle` is neither"),
        ("opt-outs", JANE | {"word": 7}, "`$.word`"),
        ("opt-outs", JANE | {"receivedAt": "2026-01-31T09:00:00"}, "`$.receivedAt`"),
        ("opt-outs", JANE | {"receivedAt": "2126-01-31T09:00:00Z"}, "the date is in the future"),
        ("opt-outs", JANE | {"reason": "none"}, "unknown field `reason`"),
        ("opt-outs/end", {"handle": "Jane"}, "`handle` is neither"),
        ("opt-outs/assign", JANE, "missing required field `clientId`"),
        ("opt-outs/assign", JANE | {"clientId": NOBODY}, f"there is no client {NOBODY}"),
        ("opt-outs/assign", JANE | {"clientId": "\0"}, "`clientId` is no client's id"),
        ("opt-outs/import", b"", "the file is empty"),
        ("opt-outs/import", b"%PDF-1.7", "the file is a PDF"),
        ("people/show", {"handle": "Jane"}, "`handle` is neither"),
        ("people/forget", {"handle": "Jane"}, "`handle` is neither"),
    ],
)
def test_what_is_no_opt_out_is_a_400_and_records_nothing(
    owner: ApiClient, world: TestData, path: str, body: object, sentence: str
) -> None:
    assert sentence in refused(owner.call("POST", f"/my/outreach/{path}", body), 400)
    assert world.icloud("SELECT * FROM icloud.opt_outs") == []


def test_a_list_of_opt_outs_is_asked_for_with_parameters_that_exist(owner: ApiClient) -> None:
    assert "`unassigned` must be true or false" in refused(owner.call("GET", f"{OPT_OUTS}?unassigned=1"), 400)
    assert "`after` must be" in refused(owner.call("GET", f"{OPT_OUTS}?after=7"), 400)
    assert "`limit` must be" in refused(owner.call("GET", f"{OPT_OUTS}?limit=0"), 400)


def test_a_person_is_shown_and_forgotten(owner: ApiClient, world: TestData) -> None:
    world.item(world.batch(status="sent"), world.client(), status="sent", sent_at="2026-01-01", rendered_body="Hi Jane")
    world.item(world.batch(), world.quinn("SELECT id FROM clients")[0][0], claimed_at="now")
    shown = done(owner.call("POST", "/my/outreach/people/show", JANE))
    assert [message["rendered_body"] for message in shown["messages"]] == ["Hi Jane", "Hello!"]
    forgotten = done(owner.call("POST", "/my/outreach/people/forget", JANE))
    assert forgotten == {
        "keys": ["+14155550123"], "clients": 1, "erased": {"items": 1, "rows": 0, "batches": 0}, "inFlight": 1,
        "unfinished": [], "isDeleted": False,
    }  # fmt: skip
    world.quinn("UPDATE outreach_batch_items SET claimed_at = NULL WHERE status = 'pending'")
    again = done(owner.call("POST", "/my/outreach/people/forget", JANE))
    assert (again["inFlight"], again["isDeleted"]) == (0, True)
    assert world.icloud("SELECT handle_key, source FROM icloud.opt_outs") == [("+14155550123", "owner")]


# --- health, errors, start ----------------------------------------------------------------------------


def test_health_needs_no_token(owner_url: str) -> None:
    assert done(ApiClient(owner_url, None).call("GET", "/healthz")) == {"status": "ok"}


@pytest.mark.parametrize("part", ["quinn_url", "icloud_url"])
def test_without_a_database_the_response_is_a_503(databases: Databases, part: str) -> None:
    urls = {"quinn_url": databases.quinn_url, "icloud_url": databases.icloud_url, part: "postgresql://localhost:1/x"}
    api = outreach_server.Api(OWNER_TOKEN, interval=timedelta(seconds=30), **urls)
    app = outreach_server.make_app(api)
    for path in ("/healthz", "/my/outreach/settings"):
        status, headers, content = call_app(app, path)
        assert (status, headers["Retry-After"]) == ("503 Service Unavailable", serving.RETRY_AFTER)
        assert content["error"] == "the database cannot be reached; try again soon"


def call_app(app: Any, path: str) -> tuple[str, dict[str, str], Any]:
    """Call a WSGI application with the owner's token; return status, headers and body."""
    started: list[Any] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_AUTHORIZATION": f"Bearer {OWNER_TOKEN}"}
    body = b"".join(app(environ, lambda *arguments: started.extend(arguments)))
    return started[0], dict(started[1]), json.loads(body)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("", "OUTREACH_OWNER_TOKEN is not set"),
        ("short", "must have at least 16 characters"),
        ("with spaces in it", "visible ASCII"),
        (SERVICE_TOKEN, "is the same as MAC_SYNC_SERVICE_TOKEN"),
    ],
)
def test_without_a_good_token_the_server_does_not_start(databases: Databases, token: str, sentence: str) -> None:
    ended = run_script("outreach_server.py", OUTREACH_OWNER_TOKEN=token, OUTREACH_PORT="0")
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "openssl rand -hex 24" in ended.stderr


def test_a_port_that_is_taken_is_named(databases: Databases, start: Callable[..., Script]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_script("outreach_server.py", OUTREACH_OWNER_TOKEN=OWNER_TOKEN, OUTREACH_PORT=port)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "set OUTREACH_HOST and OUTREACH_PORT" in ended.stderr


def test_the_server_ends_cleanly_and_logs_no_secret(databases: Databases, start: Callable[..., Script]) -> None:
    script = start("outreach_server.py", OUTREACH_PORT="0")
    client = ApiClient(f"http://127.0.0.1:{script.port()}", OWNER_TOKEN)
    done(client.call("POST", CLIENTS, b"name,phone\nZelda Zuckerberg,+491701234567\n"))
    refused(client.call("PUT", "/my/outreach/settings", {"quietHoursTz": "Zuckerberg"}), 400)
    assert script.end() == 0
    log = script.log.read_text()
    assert "outreach-server stopped" in log
    for secret in ("Zuckerberg", "1701234567", OWNER_TOKEN):
        assert secret not in log


def test_the_unit_names_the_script() -> None:
    assert "outreach_server.py" in (ROOT / "systemd" / "outreach-server.service").read_text()
