"""Check that each request gets a documented response in JSON, and that no log line shows its content."""

import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from contract import Contract, run_schemathesis
from testing import SERVICE_TOKEN, Script, TestData

SECRET_BODY = "The-body-of-a-message"
SECRET_HANDLE = "+14155550199"
DEVICE_TOKEN = "the-token-of-a-device"
SECRETS = (SECRET_BODY, SECRET_HANDLE, DEVICE_TOKEN, SERVICE_TOKEN)


@pytest.fixture
def talkative(databases: object, start: Callable[..., Script]) -> tuple[Script, int]:
    """The server's process at log level DEBUG, and its port."""
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", LOG_LEVEL="DEBUG")
    return script, script.port()


def malformed(seed: int) -> Iterator[bytes]:
    """Yield some hundred malformed requests, as bytes for the socket."""
    rng = random.Random(seed)  # noqa: S311  # test input, no secrets
    paths = ["/client/imessage/send-queue/pending", "/client/imessage/send-queue/%s/result" % ("a" * 36)]
    paths += ["/admin/send-queue/enqueue", "/healthz", "/", "/%00", "/%ff", "/" + "x" * 5000, "//", "/../etc/passwd"]
    tokens = [DEVICE_TOKEN, SERVICE_TOKEN, "", "x" * 10_000, "\xff\xfe", "a b", "sha256:" + "0" * 64, "' OR 1=1 --"]
    item = {"batchItemId": "550e8400-e29b-41d4-a716-446655440000", "deviceId": "550e8400-e29b-41d4-a716-446655440001"}
    good = json.dumps({**item, "toHandle": SECRET_HANDLE, "body": SECRET_BODY}).encode()
    bodies = [
        good,
        b"",
        b"null",
        b"[" * 60_000,
        b"{" * 3000,
        b'{"status": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00",
        b"\x00",
    ]
    bodies += [good[: len(good) // 2], good.replace(b"The", b"\\ud800"), good.replace(b"The", b"\\u0000"), good + b"}"]
    bodies += [
        b'{"status": "sent\\u0000"}',
        b'{"status": NaN}',
        b'{"status": "failed", "error": {}}',
        b"\xef\xbb\xbf{}",
    ]
    for _ in range(300):
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW", "get", "G\x01T"])
        body = rng.choice(bodies)
        head = f"{method} {rng.choice(paths)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {rng.choice(tokens)}\r\nContent-Length: {len(body)}\r\n\r\n"
        yield head.encode("latin-1") + body
    start_of_post = b"POST /admin/send-queue/enqueue HTTP/1.1\r\nHost: x\r\n"
    yield from (
        b"\r\n\r\n\r\nnonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 50_000 + b"\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        start_of_post + b"Transfer-Encoding: gzip\r\n\r\n",
        start_of_post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        start_of_post + b"Content-Length: -1\r\n\r\n",
        start_of_post + b"Content-Length: 1e3\r\n\r\n",
        start_of_post + b"Content-Length: 99999999999\r\n\r\n",
        start_of_post + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    )


def response_to(request: bytes, port: int) -> bytes:
    """Return all that the server sends after `request`, until it closes the connection."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        connection.sendall(request)
        response = b""
        while True:
            try:
                more = connection.recv(65536)
            except ConnectionResetError:
                return response
            if not more:
                return response
            response += more


def test_malformed_requests_get_4xx_and_are_not_logged(world: TestData, talkative: tuple[Script, int]) -> None:
    script, port = talkative
    world.device(token=DEVICE_TOKEN)
    statuses = set()
    for request in malformed(seed=1):
        head, _, body = response_to(request, port).partition(b"\r\n\r\n")
        status = int(head.split()[1])
        statuses.add(status)
        assert status < 500, request[:200]
        assert status == 400 or b"Transfer-Encoding: gzip" not in request
        if not request.startswith(b"HEAD"):
            assert json.loads(body)["success"] is (status == 200), request[:200]
    assert {400, 401, 404, 405, 413, 431} <= statuses
    log = script.log.read_text()
    assert "request refused" in log
    assert [secret for secret in SECRETS if secret in log] == []
    assert script.end() == 0


def test_success_logs_hide_token_body_and_handle(world: TestData, talkative: tuple[Script, int]) -> None:
    script, port = talkative
    device_id = world.device(token=DEVICE_TOKEN)
    item_id = "550e8400-e29b-41d4-a716-446655440000"
    message = {"batchItemId": item_id, "deviceId": device_id, "toHandle": SECRET_HANDLE, "body": SECRET_BODY}

    def post(path: str, token: str, content: object) -> None:
        body = json.dumps(content)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n"
        assert b" 200 OK" in response_to(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode(), port)

    post("/admin/send-queue/enqueue", SERVICE_TOKEN, message)
    [(queue_id,)] = world.icloud("SELECT id FROM icloud.send_queue")
    words = f"{SECRET_BODY} could not be sent to {SECRET_HANDLE}"
    post(f"/client/imessage/send-queue/{queue_id}/result", DEVICE_TOKEN, {"status": "failed", "error": words})
    log = script.log.read_text()
    assert f"message enqueued sendQueueId={queue_id}" in log
    assert "+1415•••99" in log
    assert f"result recorded sendQueueId={queue_id} status=failed" in log
    assert [secret for secret in SECRETS if secret in log] == []


@pytest.mark.faults
@pytest.mark.parametrize("authenticated", [True, False])
def test_generated_requests_get_only_documented_responses(
    world: TestData, server: tuple[Script, str], tmp_path: Path, seed: int, authenticated: bool
) -> None:
    """Run all checks of schemathesis. A copy of the contract names the device, so that requests can name it."""
    contract = Contract("openapi.yaml").content
    device_id = contract["components"]["schemas"]["Enqueue"]["properties"]["deviceId"]
    device_id["enum"] = [world.device(token=DEVICE_TOKEN)]
    tokens = {"deviceToken": DEVICE_TOKEN, "serviceToken": SERVICE_TOKEN} if authenticated else {}
    run_schemathesis(tmp_path, contract, server[1], tokens, seed)
