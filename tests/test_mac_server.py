"""The sender's requests, over real sockets: what it believes, and what it takes for a server that is away."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import contract_server
import mac_sender
import pytest

pytestmark = pytest.mark.mac

TOKEN = "device-token-0123456789"


class Page:
    """What the server at the other end says to everything."""

    status = 200
    body = b'{"success": true, "data": {}}'
    headers: dict[str, str] = {}  # noqa: RUF012  # replaced, never changed


@pytest.fixture
def page() -> Iterator[tuple[Page, str, list[dict[str, str]]]]:
    """A server that says whatever the page says; its address; the headers that it got."""
    says, got = Page(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append({"path": self.path, **dict(self.headers)})
            self.send_response(says.status)
            for name, value in says.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(says.body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield says, f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


def client(url: str) -> mac_sender.Server:
    config = mac_sender.Config(home=Path("/nowhere"), url=url, token=TOKEN, hardware_uuid="A-B")
    return mac_sender.Server(config, mac_sender.Mac(config))


Served = tuple[Page, str, list[dict[str, str]]]


@pytest.mark.parametrize(("status", "body"), [
    (200, b"<html>Sign in to the Wi-Fi</html>"), (200, b"[]"), (200, b'{"items": []}'), (200, b""),
    (200, b'{"success": false, "error": "no"}'), (404, b"not found"), (404, b'{"success": true, "data": {}}'),
    (500, b'{"success": false, "error": "no"}'), (503, b'{"success": false, "error": "no"}'), (204, b""),
    (429, b'{"success": false, "error": "no"}'), (200, b"\xff\xfe"),
])  # fmt: skip
def test_what_is_not_the_servers_word_is_a_server_that_is_away(page: Served, status: int, body: bytes) -> None:
    says, url, _ = page
    says.status, says.body = status, body
    with pytest.raises(mac_sender.ServerAway):
        client(url).peek()


def test_a_redirect_is_not_followed(page: Served) -> None:
    says, url, got = page
    says.status, says.headers = 302, {"Location": url + "/elsewhere"}
    with pytest.raises(mac_sender.ServerAway):
        client(url).peek()
    assert len(got) == 1


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_a_refusal_is_the_servers_word(page: Served, status: int) -> None:
    says, url, _ = page
    says.status, says.body = status, b'{"success": false, "error": "because", "data": {"reason": "late"}}'
    assert client(url).peek() == (status, {"reason": "late"}, "because")


def test_after_an_error_the_server_is_left_alone(page: Served) -> None:
    says, url, got = page
    says.status = 500
    server = client(url)
    for _ in range(3):
        with pytest.raises(mac_sender.ServerAway):
            server.peek()
    assert len(got) == 1


def test_a_path_in_front_is_kept_and_the_token_is_in_its_header(page: Served) -> None:
    _, url, got = page
    client(f"{url}/queue/").peek()
    assert got[0]["path"] == "/queue/client/imessage/send-queue/pending?peek=true"
    assert got[0]["Authorization"] == f"Bearer {TOKEN}"


def test_an_id_cannot_lead_elsewhere(page: Served) -> None:
    _, url, got = page
    client(url).result("../../admin?x=", {})
    assert got[0]["path"] == "/client/imessage/send-queue/..%2F..%2Fadmin%3Fx%3D/result"


def test_a_server_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac_sender, "HTTP_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(mac_sender.ServerAway):
            client(f"http://127.0.0.1:{listener.getsockname()[1]}").peek()
        assert time.monotonic() - began < 5


def test_an_endless_response_is_given_up(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac_sender, "MAX_RESPONSE", 1000)
    says, url, _ = page
    says.body = b" " * 200_000
    with pytest.raises(mac_sender.ServerAway):
        client(url).peek()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(mac_sender.ServerAway):
        client(f"http://127.0.0.1:{port}").peek()


def test_a_refused_token_is_known(page: Served) -> None:
    says, url, _ = page
    says.status = 401
    server = client(url)
    with pytest.raises(mac_sender.ServerAway):
        server.peek()
    assert server.unauthorized


def test_the_instance_is_in_each_body_and_tells_no_hardware_uuid() -> None:
    with contract_server.ContractServer(TOKEN) as server:
        row = server.enqueue("+14155550123", "Hello")
        asked = client(server.url)
        asked.result(row["id"], {"status": "sent"})
        asked.health(None)
        assert server.instance == asked.config.instance
        assert len(asked.config.instance) == 64
        assert b"A-B" not in b"".join(server.received)


@pytest.mark.parametrize(("header", "seconds"), [
    (None, None), ("7", 7), ("999999", 3600), ("soon", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None),
])  # fmt: skip
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert mac_sender.retry_after(header) == seconds


ITEM: dict[str, Any] = {
    "id": "1", "batchItemId": "2", "attempt": 1, "toHandle": "+1", "body": "x", "draftedAt": "2026-11-25T12:00:00Z",
}  # fmt: skip


def test_an_item_is_read() -> None:
    item = mac_sender.parse_item({**ITEM, "createdAt": "2026-11-25T12:00:00Z", "more": 1})
    assert item == ("1", "2", 1, "+1", "x", 1795608000.0)


@pytest.mark.parametrize("name", ITEM)
@pytest.mark.parametrize("value", [None, "", 7.5, [], {}, True])
def test_an_item_that_is_not_as_agreed_is_none(name: str, value: object) -> None:
    assert mac_sender.parse_item({**ITEM, name: value}) is None


@pytest.mark.parametrize("value", [None, 7, "x", [], json.loads("{}")])
def test_no_item_is_none(value: object) -> None:
    assert mac_sender.parse_item(value) is None
