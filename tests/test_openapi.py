"""Check openapi.yaml against the running server: each documented status occurs, and has the documented form."""

import re
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

import jsonschema
import psycopg2
import pytest
import requests
from contract import Contract
from testing import SERVICE_TOKEN, TestData

import db
import handles
import send_queue_server

CONTRACT = Contract("openapi.yaml")
PENDING = "/client/imessage/send-queue/pending"
COLLECT = "/client/imessage/send-queue/{id}/collect"
RESULT = "/client/imessage/send-queue/{id}/result"
DEVICE_HEALTH = "/client/imessage/health"
OPT_OUTS = "/client/imessage/opt-outs"
ENQUEUE = "/admin/send-queue/enqueue"
STATUS = "/admin/send-queue/status"
METRICS = "/metrics"
TOO_LONG = b"x" * 70_000


class Api:
    """Call a server that has one device, one queued message and one sent message."""

    def __init__(self, base_url: str, world: TestData) -> None:
        self.base_url, self.world = base_url, world
        self.device_id = world.device("mac-mini")
        self.queued, self.sent = (self.enqueue().json()["data"]["sendQueueId"] for _ in range(2))
        self.result({"status": "sent"}, queue_id=self.sent)

    def call(self, method: str, path: str, token: str | None, **body: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.request(method, self.base_url + path, headers=headers, timeout=5, **body)

    def pending(self, token: str | None = "mac-mini") -> requests.Response:
        return self.call("GET", PENDING, token)

    def result(self, body: object, queue_id: str | None = None, token: str | None = "mac-mini") -> requests.Response:
        return self.call("POST", RESULT.format(id=queue_id or self.queued), token, json=body)

    def collect(
        self, queue_id: str | None = None, token: str | None = "mac-mini", **fields: object
    ) -> requests.Response:
        body = {"collectId": str(uuid.uuid4()), "instance": "this Mac"}
        return self.call("POST", COLLECT.format(id=queue_id or self.queued), token, json=body | fields)

    def health(self, token: str | None = "mac-mini", **fields: object) -> requests.Response:
        return self.call("POST", DEVICE_HEALTH, token, json={"problem": "no Full Disk Access"} | fields)

    def opt_out(self, token: str | None = "mac-mini", **fields: object) -> requests.Response:
        body = {"handle": "+14155550199", "word": "STOP", "receivedAt": "2026-04-22T12:00:00Z"}
        return self.call("POST", OPT_OUTS, token, json=body | fields)

    def enqueue(self, token: str | None = SERVICE_TOKEN, **fields: object) -> requests.Response:
        message = {
            "batchItemId": str(uuid.uuid4()),
            "deviceId": self.device_id,
            "toHandle": "+14155550123",
            "body": "Hi",
        }
        return self.call("POST", ENQUEUE, token, json=message | fields)

    def enqueue_to_opted_out(self) -> requests.Response:
        self.opt_out()
        return self.enqueue(toHandle="+1 415 555 0199")

    def conflict(self) -> requests.Response:
        item_id = str(uuid.uuid4())
        self.enqueue(batchItemId=item_id)
        return self.enqueue(batchItemId=item_id, body="other")


PROVOKED: dict[tuple[str, int], Callable[[Api], requests.Response]] = {
    (PENDING, 200): lambda api: api.pending(),
    (PENDING, 400): lambda api: api.call("GET", PENDING + "?peek=1", "mac-mini"),
    (PENDING, 401): lambda api: api.pending(token=None),
    (PENDING, 405): lambda api: api.call("POST", PENDING, None),
    (COLLECT, 200): lambda api: api.collect(),
    (COLLECT, 400): lambda api: api.collect(collectId="1"),
    (COLLECT, 401): lambda api: api.collect(token="wrong"),
    (COLLECT, 404): lambda api: api.collect(queue_id="unknown"),
    (COLLECT, 405): lambda api: api.call("GET", COLLECT.format(id=api.queued), None),
    (COLLECT, 409): lambda api: api.collect(queue_id=api.sent),
    (COLLECT, 413): lambda api: api.call("POST", COLLECT.format(id=api.queued), "mac-mini", data=TOO_LONG),
    (DEVICE_HEALTH, 200): lambda api: api.health(version="1.0"),
    (DEVICE_HEALTH, 400): lambda api: api.health(problem=""),
    (DEVICE_HEALTH, 401): lambda api: api.health(token=SERVICE_TOKEN),
    (DEVICE_HEALTH, 405): lambda api: api.call("GET", DEVICE_HEALTH, "mac-mini"),
    (DEVICE_HEALTH, 413): lambda api: api.call("POST", DEVICE_HEALTH, "mac-mini", data=TOO_LONG),
    (OPT_OUTS, 200): lambda api: api.opt_out(),
    (OPT_OUTS, 400): lambda api: api.opt_out(word="maybe"),
    (OPT_OUTS, 401): lambda api: api.opt_out(token=None),
    (OPT_OUTS, 405): lambda api: api.call("GET", OPT_OUTS, "mac-mini"),
    (OPT_OUTS, 413): lambda api: api.call("POST", OPT_OUTS, "mac-mini", data=TOO_LONG),
    (RESULT, 200): lambda api: api.result({"status": "failed", "error": None}),
    (RESULT, 400): lambda api: api.result({"status": "gone"}),
    (RESULT, 401): lambda api: api.result({"status": "sent"}, token="wrong"),
    (RESULT, 404): lambda api: api.result({"status": "sent"}, queue_id="unknown"),
    (RESULT, 405): lambda api: api.call("GET", RESULT.format(id=api.queued), None),
    (RESULT, 409): lambda api: api.result({"status": "failed"}, queue_id=api.sent),
    (RESULT, 413): lambda api: api.call("POST", RESULT.format(id=api.queued), "mac-mini", data=TOO_LONG),
    (ENQUEUE, 200): lambda api: api.enqueue(),
    (ENQUEUE, 400): lambda api: api.enqueue(body=""),
    (ENQUEUE, 401): lambda api: api.enqueue(token=None),
    (ENQUEUE, 405): lambda api: api.call("DELETE", ENQUEUE, None),
    (ENQUEUE, 409): lambda api: api.conflict(),
    (ENQUEUE, 413): lambda api: api.call("POST", ENQUEUE, SERVICE_TOKEN, data=TOO_LONG),
    (ENQUEUE, 422): lambda api: api.enqueue_to_opted_out(),
    (STATUS, 200): lambda api: api.call("GET", STATUS, SERVICE_TOKEN),
    (STATUS, 401): lambda api: api.call("GET", STATUS, "mac-mini"),
    (STATUS, 405): lambda api: api.call("POST", STATUS, SERVICE_TOKEN),
    (METRICS, 200): lambda api: api.call("GET", METRICS, SERVICE_TOKEN),
    (METRICS, 401): lambda api: api.call("GET", METRICS, None),
    (METRICS, 405): lambda api: api.call("POST", METRICS, SERVICE_TOKEN),
    ("/healthz", 200): lambda api: api.call("GET", "/healthz", None),
    ("/healthz", 405): lambda api: api.call("POST", "/healthz", None),
}
ASKED: dict[str, Callable[[Api], requests.Response]] = {
    PENDING: lambda api: api.pending(),
    COLLECT: lambda api: api.collect(),
    RESULT: lambda api: api.result({"status": "sent"}),
    DEVICE_HEALTH: lambda api: api.health(),
    OPT_OUTS: lambda api: api.opt_out(),
    ENQUEUE: lambda api: api.enqueue(),
    STATUS: lambda api: api.call("GET", STATUS, SERVICE_TOKEN),
    METRICS: lambda api: api.call("GET", METRICS, SERVICE_TOKEN),
    "/healthz": lambda api: api.call("GET", "/healthz", None),
}


def test_contract_names_every_route(databases: object) -> None:
    app = send_queue_server.make_app(db.RetryingConnection(""), SERVICE_TOKEN)
    routes = {
        (route.rule.replace("<queue_id>", "{id}"), route.method) for route in app.routes if route.method != "HEAD"
    }
    assert routes == {(path, method.upper()) for path, method, _ in CONTRACT.promises}


def test_each_documented_response_occurs(world: TestData, base_url: str) -> None:
    for path, method, status in CONTRACT.promises:
        if status not in (500, 503):
            world.icloud("TRUNCATE icloud.devices CASCADE")
            CONTRACT.check(PROVOKED[path, status](Api(base_url, world)), path, method, status)


def test_database_errors_get_documented_responses(
    world: TestData, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Api(base_url, world)
    for error, status in ((psycopg2.DataError(), 500), (db.DatabaseUnavailable("no connection"), 503)):
        with monkeypatch.context() as patch:
            patch.setattr(db.RetryingConnection, "query", failing(error))
            for path, method in sorted({(path, method) for path, method, _ in CONTRACT.promises}):
                CONTRACT.check(ASKED[path](api), path, method, status)
    world.icloud("ALTER SCHEMA icloud RENAME TO elsewhere")
    for path, method in sorted({(path, method) for path, method, _ in CONTRACT.promises if path != "/healthz"}):
        CONTRACT.check(ASKED[path](api), path, method, 503)


def failing(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


# What \s is in ECMA's regular expressions, which clients are generated for: without the U+0085 that it has in Python's.
# U+FEFF is a space in ECMA's alone. No address has one, so that difference may stay.
ECMA_SPACE = r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
ONLY_ECMAS_SPACE = 0xFEFF


def test_contract_and_server_accept_same_handles() -> None:
    pattern = CONTRACT.content["components"]["schemas"]["Handle"]["pattern"]
    # ECMA's $ is the very end, where Python's also stands before a last newline.
    promised = re.compile(pattern.replace(r"\s", ECMA_SPACE).removesuffix("$") + r"\Z")
    digits = ["12", "123", "1" * 15, "1" * 16, "+123", "++123", "+1 (415) 555-0123", "123 ", "123\n", "1/23", "٣٣٣"]
    addresses = ["a@b.de", "a@b", "@b.de", "a@.de", "a@b.", "a@b@c.de", "a@b.de\n", "a@b.c.de", ""]
    characters = [chr(code) for code in range(0x10000) if code != ONLY_ECMAS_SPACE]
    anywhere = [text for one in characters for text in (f"{one}@b.de", f"a@{one}.de", f"a@b.{one}")]
    for handle in [*digits, *addresses, *anywhere]:
        fits = handles.HANDLE_PATTERN.fullmatch(handle) is not None
        assert bool(promised.search(handle)) is fits, handle.encode("unicode_escape")


def test_peek_and_collect_match_contract(world: TestData, base_url: str) -> None:
    api = Api(base_url, world)
    peeked = api.call("GET", PENDING + "?peek=true", "mac-mini")
    CONTRACT.check(peeked, PENDING, "get", 200)
    item_message = CONTRACT.schema_of({"$ref": "#/components/schemas/ItemMessage"})
    [item] = peeked.json()["data"]["items"]
    for found in (item, api.collect().json()["data"]):
        jsonschema.validate(found, item_message, format_checker=jsonschema.FormatChecker())


def test_contract_and_server_accept_same_words() -> None:
    words = CONTRACT.content["components"]["schemas"]["OptOut"]["properties"]["word"]["enum"]
    assert set(words) == handles.STOP_WORDS | handles.START_WORDS


def test_contract_examples_match_their_schemas() -> None:
    for name in ("Enqueue", "Result", "Message", "Collect", "Health", "OptOut"):
        for definition in CONTRACT.content["components"]["schemas"][name]["properties"].values():
            if "example" in definition:
                jsonschema.validate(definition["example"], CONTRACT.schema_of(definition))
