"""Check openapi-owner.yaml against the outreach server: each documented status occurs, and has the documented form."""

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import psycopg2
import pytest
import requests
from contract import Contract, run_schemathesis
from testing import OWNER_TOKEN, Script, TestData

import batches
import composing
import db
import importing
import outreach_server
import recipients
import report
import settings

CONTRACT = Contract("openapi-owner.yaml")
SETTINGS, STATUS, CLIENTS = outreach_server.SETTINGS, outreach_server.STATUS, outreach_server.CLIENTS
SEARCH, DRY_RUN, BATCHES = outreach_server.SEARCH, outreach_server.DRY_RUN, outreach_server.BATCHES
BATCH = "/my/outreach/batch/{id}"
OPT_OUTS, PEOPLE = outreach_server.OPT_OUTS, outreach_server.PEOPLE
BATCH_ID = "7b5b1f0e-3f0c-4c07-9d4d-0d6f2c2b8a11"
NOBODY = "5a6a6e1b-0000-4000-8000-000000000000"
EVERYONE = {"v": 1, "where": {"everyone": True}}
TEMPLATE = "Hello {{ client.name | default: 'you' }}, this is Ann."
TOO_LONG = b"x" * 70_000
FILE = b"name,phone\nJane,+14155550123\nJoe,none\n"


class Owner:
    """Call the outreach server."""

    def __init__(self, base_url: str, world: TestData) -> None:
        self.base_url, self.world = base_url, world

    def call(self, method: str, path: str, token: str | None = OWNER_TOKEN, **body: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.request(method, self.base_url + path, headers=headers, timeout=10, **body)

    def change(self, **fields: object) -> requests.Response:
        return self.call("PUT", SETTINGS, json=fields)

    def upload(self, query: str = "") -> requests.Response:
        return self.call("POST", CLIENTS + query, data=FILE)

    def apply(self) -> requests.Response:
        return self.upload(f"?apply={self.upload().json()['data']['plan']['digest']}")

    def busy_status(self) -> requests.Response:
        self.world.device()
        batch_id = self.world.batch(2)
        self.world.item(batch_id, status="failed", failure_reason="not registered")
        self.world.settings(max_per_hour=5)
        return self.call("GET", STATUS)

    def post(self, path: str, body: object, token: str | None = OWNER_TOKEN) -> requests.Response:
        return self.call("POST", path, token, json=body)

    def request(self, path: str, **fields: object) -> requests.Response:
        """Ask for a batch to three people, one of whom has no handle."""
        if not self.world.quinn("SELECT FROM clients"):
            for handle in ("+14155550123", "+14155550124", None):
                self.world.client(handle)
            self.world.quinn("UPDATE clients SET name = 'TEST 1' WHERE id = (SELECT max(id::text)::uuid FROM clients)")
        return self.post(path, {"id": BATCH_ID, "query": EVERYONE, "template": TEMPLATE} | fields)

    def on_draft(self, verb: str, body: object = None, method: str = "POST") -> requests.Response:
        """Write the draft, and call one of its endpoints."""
        self.request(BATCHES)
        return self.call(method, BATCH.format(id=BATCH_ID) + verb, json=body)

    def on_nobody(self, verb: str, body: object = None, method: str = "POST") -> requests.Response:
        return self.call(method, BATCH.format(id=NOBODY) + verb, json=body)

    def sending(self, **fields: object) -> requests.Response:
        """Send the draft."""
        digest = self.request(BATCHES).json()["data"]["digest"]
        return self.post(BATCH.format(id=BATCH_ID) + "/send", {"digest": digest, "recipients": 2} | fields)

    def on_sending(self, verb: str, body: object = None) -> requests.Response:
        self.sending()
        return self.on_draft(verb, body)

    def resume(self) -> requests.Response:
        self.on_sending("/pause")
        return self.on_draft("/resume")

    def test(self, to: str = "+14155550199") -> requests.Response:
        self.world.device()
        return self.on_draft("/test", {"to": to})

    def cancel_finished(self) -> requests.Response:
        self.request(BATCHES)
        self.world.quinn("UPDATE outreach_batches SET status = 'sent'")
        return self.on_draft("/cancel")

    def retry_while_busy(self) -> requests.Response:
        batches.acquire_lock(self.world.databases.quinn, threading.Event())
        response = self.on_draft("/retry", {})
        self.world.quinn("SELECT pg_advisory_unlock_all()")
        return response

    def test_to_opted_out(self) -> requests.Response:
        self.world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('+14155550199', 'owner')")
        return self.test()

    def opted_out(self) -> requests.Response:
        """Record the opt-out of somebody who was written to; list all."""
        self.sending()
        said = {"handle": "+14155550123", "word": "on the phone", "receivedAt": "2026-01-31T09:00:00Z"}
        assert self.post(OPT_OUTS, said).status_code == 200
        assert self.post(OPT_OUTS, {"handle": "unknown@example.com"}).status_code == 200
        return self.call("GET", OPT_OUTS)

    def of_person(self, path: str) -> requests.Response:
        self.opted_out()
        return self.post(path, {"handle": "+14155550123"})

    def assign(self) -> requests.Response:
        return self.post(f"{OPT_OUTS}/assign", {"handle": "unknown@example.com", "clientId": self.world.client()})


SEND = {"digest": "0" * 64, "recipients": 2}
PROVOKED: dict[tuple[str, str, int], Callable[[Owner], requests.Response]] = {
    (SEARCH, "post", 200): lambda owner: owner.request(SEARCH),
    (SEARCH, "post", 400): lambda owner: owner.request(SEARCH, query={}),
    (DRY_RUN, "post", 200): lambda owner: owner.request(DRY_RUN),
    (DRY_RUN, "post", 400): lambda owner: owner.request(DRY_RUN, template="{{ client.nmae }}"),
    (BATCHES, "post", 200): lambda owner: owner.request(BATCHES),
    (BATCHES, "post", 400): lambda owner: owner.request(BATCHES, id=None),
    (BATCHES, "post", 409): lambda owner: owner.request(BATCHES, query={"v": 1, "where": {"not": {"everyone": True}}}),
    (BATCHES, "get", 200): lambda owner: [owner.request(BATCHES), owner.call("GET", BATCHES)][1],
    (BATCHES, "get", 400): lambda owner: owner.call("GET", f"{BATCHES}?limit=0"),
    (BATCH, "get", 200): lambda owner: owner.on_draft("", method="GET"),
    (BATCH, "get", 404): lambda owner: owner.on_nobody("", method="GET"),
    (f"{BATCH}/items", "get", 200): lambda owner: owner.on_draft("/items", method="GET"),
    (f"{BATCH}/items", "get", 400): lambda owner: owner.on_draft("/items?status=lost", method="GET"),
    (f"{BATCH}/items", "get", 404): lambda owner: owner.on_nobody("/items", method="GET"),
    (f"{BATCH}/test", "post", 200): lambda owner: owner.test(),
    (f"{BATCH}/test", "post", 400): lambda owner: owner.test(to="Ann"),
    (f"{BATCH}/test", "post", 404): lambda owner: owner.on_nobody("/test", {"to": "+14155550199"}),
    (f"{BATCH}/test", "post", 409): lambda owner: owner.on_draft("/test", {"to": "+14155550199"}),
    (f"{BATCH}/test", "post", 422): lambda owner: owner.test_to_opted_out(),
    (f"{BATCH}/send", "post", 200): lambda owner: owner.sending(),
    (f"{BATCH}/send", "post", 400): lambda owner: owner.sending(recipients=0),
    (f"{BATCH}/send", "post", 404): lambda owner: owner.on_nobody("/send", SEND),
    (f"{BATCH}/send", "post", 409): lambda owner: owner.on_draft("/send", SEND),
    (f"{BATCH}/pause", "post", 200): lambda owner: owner.on_sending("/pause"),
    (f"{BATCH}/pause", "post", 404): lambda owner: owner.on_nobody("/pause"),
    (f"{BATCH}/pause", "post", 409): lambda owner: owner.on_draft("/pause"),
    (f"{BATCH}/resume", "post", 200): lambda owner: owner.resume(),
    (f"{BATCH}/resume", "post", 404): lambda owner: owner.on_nobody("/resume"),
    (f"{BATCH}/resume", "post", 409): lambda owner: owner.on_draft("/resume"),
    (f"{BATCH}/cancel", "post", 200): lambda owner: owner.on_draft("/cancel"),
    (f"{BATCH}/cancel", "post", 404): lambda owner: owner.on_nobody("/cancel"),
    (f"{BATCH}/cancel", "post", 409): lambda owner: owner.cancel_finished(),
    (f"{BATCH}/retry", "post", 200): lambda owner: owner.on_draft("/retry", {"includeUnknown": False}),
    (f"{BATCH}/retry", "post", 400): lambda owner: owner.on_draft("/retry", {"includeUnknown": 7}),
    (f"{BATCH}/retry", "post", 404): lambda owner: owner.on_nobody("/retry", {}),
    (f"{BATCH}/retry", "post", 409): lambda owner: owner.retry_while_busy(),
    (SETTINGS, "get", 200): lambda owner: owner.call("GET", SETTINGS),
    (SETTINGS, "put", 200): lambda owner: owner.change(paused=True, quietHoursTz="Europe/Berlin"),
    (SETTINGS, "put", 400): lambda owner: owner.change(quietHoursStart="9pm"),
    (STATUS, "get", 200): lambda owner: owner.busy_status(),
    (CLIENTS, "post", 200): lambda owner: owner.apply(),
    (CLIENTS, "post", 400): lambda owner: owner.call("POST", CLIENTS, data=b"a,b\n1,2\n"),
    (CLIENTS, "post", 409): lambda owner: owner.upload("?apply=other"),
    (CLIENTS, "post", 413): lambda owner: owner.call("POST", CLIENTS, "wrong", data=b"x" * 2_000_000),
    (CLIENTS, "post", 431): lambda owner: owner.upload(f"?name={'x' * 20_000}"),
    (OPT_OUTS, "get", 200): lambda owner: owner.opted_out(),
    (OPT_OUTS, "get", 400): lambda owner: owner.call("GET", f"{OPT_OUTS}?unassigned=yes"),
    (OPT_OUTS, "post", 200): lambda owner: owner.post(OPT_OUTS, {"handle": "+14155550123"}),
    (OPT_OUTS, "post", 400): lambda owner: owner.post(OPT_OUTS, {"handle": "Jane"}),
    (f"{OPT_OUTS}.csv", "get", 200): lambda owner: [owner.opted_out(), owner.call("GET", f"{OPT_OUTS}.csv")][1],
    (f"{OPT_OUTS}/import", "post", 200): lambda owner: owner.call("POST", f"{OPT_OUTS}/import", data=FILE),
    (f"{OPT_OUTS}/import", "post", 400): lambda owner: owner.call("POST", f"{OPT_OUTS}/import", data=b"%PDF"),
    (f"{OPT_OUTS}/import", "post", 413): lambda owner: owner.call(
        "POST", f"{OPT_OUTS}/import", "wrong", data=b"x" * 2_000_000
    ),
    (f"{OPT_OUTS}/end", "post", 200): lambda owner: owner.of_person(f"{OPT_OUTS}/end"),
    (f"{OPT_OUTS}/end", "post", 400): lambda owner: owner.post(f"{OPT_OUTS}/end", {}),
    (f"{OPT_OUTS}/assign", "post", 200): lambda owner: owner.assign(),
    (f"{OPT_OUTS}/assign", "post", 400): lambda owner: owner.post(
        f"{OPT_OUTS}/assign", {"handle": "+14155550123", "clientId": NOBODY}
    ),
    (f"{PEOPLE}/show", "post", 200): lambda owner: owner.of_person(f"{PEOPLE}/show"),
    (f"{PEOPLE}/show", "post", 400): lambda owner: owner.post(f"{PEOPLE}/show", {"handle": "a\ud800@b.de"}),
    (f"{PEOPLE}/forget", "post", 200): lambda owner: owner.of_person(f"{PEOPLE}/forget"),
    (f"{PEOPLE}/forget", "post", 400): lambda owner: owner.post(f"{PEOPLE}/forget", {"handle": "Jane"}),
    ("/metrics", "get", 200): lambda owner: owner.call("GET", "/metrics"),
    ("/healthz", "get", 200): lambda owner: owner.call("GET", "/healthz", None),
}


def test_contract_names_every_route() -> None:
    app = outreach_server.make_app(outreach_server.Api("", "", "", timedelta()))
    routes = {(route.rule.replace("<batch_id>", "{id}"), route.method) for route in app.routes}
    assert {route for route in routes if route[1] != "HEAD"} == {
        (path, method.upper()) for path, method, _ in CONTRACT.promises
    }


def test_each_documented_response_occurs(world: TestData, owner_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LOCK_WAIT", 0.1)
    for path, method, status in CONTRACT.promises:
        if status in (500, 503):
            continue
        world.quinn("TRUNCATE clients, contact_relationships, outreach_batches CASCADE")
        world.icloud("TRUNCATE icloud.devices, icloud.opt_outs CASCADE")
        owner, some_path = Owner(owner_url, world), path.format(id=BATCH_ID)
        if (path, method, status) in PROVOKED:
            response = PROVOKED[path, method, status](owner)
        elif status == 401:
            response = owner.call(method.upper(), some_path, "wrong", json={})
        elif status == 405:
            response = owner.call("DELETE", some_path)
        else:
            response = owner.call(method.upper(), some_path, data=TOO_LONG)
        CONTRACT.check(response, path, method, status)


def test_database_errors_get_documented_responses(
    world: TestData, owner_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Owner(owner_url, world)
    world.quinn("DELETE FROM outreach_settings")
    CONTRACT.check(owner.call("GET", SETTINGS), SETTINGS, "get", 503)
    CONTRACT.check(owner.change(paused=True), SETTINGS, "put", 503)
    world.quinn("ALTER TABLE outreach_settings RENAME TO elsewhere")
    CONTRACT.check(owner.call("GET", SETTINGS), SETTINGS, "get", 503)
    for error, status in ((psycopg2.DataError(), 500), (psycopg2.OperationalError(), 503)):
        with monkeypatch.context() as patch:
            patch.setattr(db, "connect", failing(error))
            for path, method in sorted({(path, method) for path, method, _ in CONTRACT.promises}):
                if path != STATUS:  # it is a 200 also without a database: its verdict says so
                    response = owner.call(method.upper(), path.format(id=BATCH_ID), json={})
                    CONTRACT.check(response, path, method, status)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Search", composing.Request),
        ("Person", recipients.Person),
        ("Found", composing.Found),
        ("DryRun", composing.DryRun),
        ("Draft", composing.Draft),
        ("Counts", composing.Counts),
        ("BatchSummary", composing.BatchSummary),
        ("Batch", composing.BatchDetail),
        ("Item", composing.Item),
        ("Items", composing.Page),
        ("Sent", composing.Sent),
        ("Test", outreach_server.Test),
        ("Send", outreach_server.Send),
        ("Retry", outreach_server.Retry),
        ("Handle", outreach_server.Person),
        ("OptOut", outreach_server.OptOut),
        ("Assignment", outreach_server.Assignment),
        ("Settings", settings.Settings),
        ("Changes", settings.Changes),
        ("Report", report.Report),
        ("SendingBatch", report.BatchLine),
        ("Device", report.DeviceLine),
        ("Plan", importing.Plan),
    ],
)
def test_each_field_is_documented(name: str, kind: type[msgspec.Struct]) -> None:
    schema = CONTRACT.schema_of({"$ref": f"#/components/schemas/{name}"})
    parts = schema.get("allOf", [schema])
    parts = [inner for part in parts for inner in part.get("allOf", [part])]
    fields = set(kind.__struct_encode_fields__)
    assert {field for part in parts for field in part["properties"]} == fields
    if name not in (
        "Search",
        "Send",
        "Retry",
        "Changes",
        "OptOut",
    ):  # these are requests, with fields that may be left out
        assert {field for part in parts for field in part["required"]} == fields


def test_the_reasons_are_documented() -> None:
    assert CONTRACT.content["components"]["schemas"]["Reason"]["enum"] == list(recipients.REASONS)


def test_contract_examples_match_their_schemas(world: TestData, owner_url: str) -> None:
    schema = CONTRACT.content["components"]["schemas"]["Changes"]
    examples = {name: each["example"] for name, each in schema["properties"].items() if "example" in each}
    jsonschema.validate(examples, CONTRACT.schema_of(schema))
    assert Owner(owner_url, world).change(**examples).status_code == 200


@pytest.mark.faults
@pytest.mark.parametrize("authenticated", [True, False])
def test_generated_requests_get_only_documented_responses(
    world: TestData, start: Callable[..., Script], tmp_path: Path, seed: int, authenticated: bool
) -> None:
    """Run all checks of schemathesis. A copy of the contract has only values that the database knows."""
    script = start("outreach_server.py", OUTREACH_PORT="0")
    Owner(f"http://127.0.0.1:{script.port()}", world).sending()
    contract = Contract("openapi-owner.yaml").content
    contract["components"]["parameters"]["BatchId"]["schema"]["enum"] = [BATCH_ID, NOBODY]
    request = contract["components"]["schemas"]["Search"]["properties"]
    request["query"] = {"type": "object", "enum": [EVERYONE, EVERYONE | {"limit": 1}]}
    request["template"] = {"type": "string", "enum": [TEMPLATE, "Hi"]}
    changes = contract["components"]["schemas"]["Changes"]["properties"]
    changes["deviceId"]["enum"] = [world.device(), None]
    changes["quietHoursTz"]["enum"] = ["Europe/Berlin", "UTC", None]
    tokens = {"ownerToken": OWNER_TOKEN} if authenticated else {}
    # Quiet hours without an end, or an unknown encoding, fit the schemas, and are a 400.
    url = f"http://127.0.0.1:{script.port()}"
    run_schemathesis(tmp_path, contract, url, tokens, seed, accepts_all_that_fits=False, max_examples=20)
