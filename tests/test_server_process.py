"""Check send_queue_server.py as a process: slow clients, start, stop and exit status."""

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from helpers import ENQUEUE, PENDING, ApiClient, lock_waits, read_row
from testing import SERVICE_TOKEN, Script, TestData, patient, wait_until

import db
import serving

HALF_REQUESTS = [
    b"POST /admin/send-queue/enqueue HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"GET /client/imessage/send-queue/pending HTTP/1.1\r\nAuthor",
]


def half_a_request(base_url: str, number: int) -> socket.socket:
    host, port = base_url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(HALF_REQUESTS[number % 2])
    return connection


def test_slow_clients_do_not_delay_the_next(world: TestData, server: tuple[Script, str]) -> None:
    world.device("mac-mini")
    slow = [half_a_request(server[1], number) for number in range(50)]
    start = time.monotonic()
    assert ApiClient(server[1], "mac-mini").pending() == []
    assert time.monotonic() - start < 2
    for connection in slow:
        connection.close()


def read_responses(connection: socket.socket, count: int) -> list[dict[str, Any]]:
    """Read so many JSON responses from the connection."""
    with connection.makefile("rb") as stream:
        responses = []
        for _ in range(count):
            length = 0
            while line := stream.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            responses.append(json.loads(stream.read(length)))
    return responses


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (f"Content-Length: {2 * serving.READ_LIMIT}", "the body is too large"),
        (f"X-Long: {'x' * serving.HEADER_LIMIT}", "the headers are too large"),
    ],
)
def test_oversized_request_is_refused_in_json(base_url: str, header: str, words: str) -> None:
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        connection.sendall(f"POST {ENQUEUE} HTTP/1.1\r\n{header}\r\n\r\n".encode())
        assert read_responses(connection, 1) == [{"success": False, "error": words}]


def pipelined(base_url: str, token: str, count: int) -> socket.socket:
    """Return a connection over which so many polls were sent at once."""
    host, port = base_url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=15)
    connection.sendall(f"GET {PENDING} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode() * count)
    return connection


def test_pipelined_requests_get_responses_at_once(world: TestData, server: tuple[Script, str]) -> None:
    world.device("mac-mini")
    start = time.monotonic()
    with pipelined(server[1], "mac-mini", 5) as connection:
        assert read_responses(connection, 5) == [{"success": True, "data": {"items": []}}] * 5
    assert time.monotonic() - start < 1, "without waiting for another event"


def fill(world: TestData, device_id: str, count: int, size: int) -> None:
    """Insert so many messages of so many characters for the device."""
    sql = """
        INSERT INTO icloud.send_queue (device_id, to_handle, handle_key, body)
        SELECT %(device_id)s, '+14155550123', '+14155550123', repeat('x', %(size)s) FROM generate_series(1, %(count)s)
    """
    world.icloud(sql, device_id=device_id, count=count, size=size)


def test_client_that_never_reads_delays_nobody(
    world: TestData, start: Callable[..., Script], databases: object
) -> None:
    """Ten polls with responses of 3 MB go to the only thread at once; the client reads late."""
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", SEND_QUEUE_THREADS="1", LOG_LEVEL="DEBUG")
    base_url = f"http://127.0.0.1:{script.port()}"
    big, _ = world.device("big"), world.device("mac-mini")
    fill(world, big, count=50, size=64_000)
    with pipelined(base_url, "big", 10) as connection:
        for _ in range(20):
            begin = time.monotonic()
            assert ApiClient(base_url, "mac-mini").pending() == []
            assert time.monotonic() - begin < 2
        polled = script.log.read_text().count("polled items=50")
        assert 1 <= polled < 10, "the others wait, and take no memory"
        assert [len(response["data"]["items"]) for response in read_responses(connection, polled)] == [50] * polled
        assert connection.recv(1) == b""


def test_stop_waits_only_for_clients_that_read(world: TestData, server: tuple[Script, str]) -> None:
    script, base_url = server
    for name in ("reader", "sleeper"):
        fill(world, world.device(name), count=20, size=1_000_000)
    with (
        half_a_request(base_url, 0),
        pipelined(base_url, "reader", 1) as reader,
        pipelined(base_url, "sleeper", 1) as sleeper,
        reader.makefile("rb") as stream,
    ):
        assert stream.read(1) == sleeper.recv(1) == b"H"
        script.process.terminate()
        script.wait_for("stopping")
        begin = time.monotonic()
        size = 0
        while piece := stream.read(1_000_000):
            size += len(piece)
            time.sleep(0.15)  # the reader's pace: all pieces take three times as long as a silent client has
        assert size > 20_000_000
        assert script.process.wait(10) == 0
        assert time.monotonic() - begin < 6


def test_stop_does_not_wait_for_database_locks(world: TestData, start: Callable[..., Script]) -> None:
    world.device("mac-mini")
    code = "import serving, send_queue_server; serving.SHUTDOWN_TIMEOUT = 2; send_queue_server.main([])"
    script = start("-c", code, SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=patient(world.databases.icloud_url))
    base_url = f"http://127.0.0.1:{script.port()}"
    with closing(db.connect(world.databases.icloud_url)) as holder:
        holder.autocommit = False
        db.query(holder, "LOCK TABLE icloud.send_queue")
        with pipelined(base_url, "mac-mini", 1):
            wait_until(lambda: lock_waits(world) == 1)
            begin = time.monotonic()
            assert script.end() == 0
            assert 1.9 < time.monotonic() - begin < 5


def test_sigterm_finishes_current_request(world: TestData, start: Callable[..., Script]) -> None:
    url = patient(world.databases.icloud_url)
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0", QUINN_ICLOUD_DB_URL=url)
    base_url = f"http://127.0.0.1:{script.port()}"
    mac_id = world.device("mac-mini")
    mac = ApiClient(base_url, "mac-mini")
    queue_id = ApiClient(base_url, SERVICE_TOKEN).enqueued(mac_id)
    with closing(db.connect(world.databases.icloud_url)) as holder, ThreadPoolExecutor(1) as pool:
        holder.autocommit = False
        db.query(holder, "SELECT FROM icloud.send_queue FOR UPDATE")
        response = pool.submit(mac.result, queue_id)
        wait_until(lambda: lock_waits(world) == 1)
        script.process.terminate()
        script.wait_for("stopping")
        time.sleep(1.5)  # longer than a silent client has
        holder.rollback()
        assert response.result().status_code == 200
        assert response.result().headers["Connection"] == "close"
    assert script.process.wait(10) == 0
    assert read_row(world, queue_id)["status"] == "sent"


def test_failed_main_thread_ends_the_process(start: Callable[..., Script]) -> None:
    broken = "import send_queue_server, waitress; del waitress.wasyncore.loop; send_queue_server.main([])"
    nowhere = "postgresql://nowhere"
    script = start("-c", broken, SEND_QUEUE_PORT="0", QUINN_DB_URL=nowhere, QUINN_ICLOUD_DB_URL=nowhere)
    assert script.process.wait(15) == 1
    assert "AttributeError" in script.log.read_text()


@pytest.mark.parametrize("token", ["", "short", "fifteen-letters", "with a space in it"])
def test_server_needs_service_token_of_sixteen_characters(
    databases: object, start: Callable[..., Script], token: str
) -> None:
    script = start("send_queue_server.py", MAC_SYNC_SERVICE_TOKEN=token)
    assert script.process.wait(10) == 2
    assert "MAC_SYNC_SERVICE_TOKEN" in script.lines()[-1]


def test_port_in_use_is_named(world: TestData, server: tuple[Script, str], start: Callable[..., Script]) -> None:
    port = server[1].rsplit(":", 1)[1]
    script = start("send_queue_server.py", SEND_QUEUE_PORT=port)
    assert script.process.wait(10) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in script.lines()[-1]
    assert "SEND_QUEUE_PORT" in script.lines()[-1]


def test_invalid_port_is_named(databases: object, start: Callable[..., Script]) -> None:
    script = start("send_queue_server.py", SEND_QUEUE_PORT="65536")
    assert script.process.wait(10) == 2
    assert "SEND_QUEUE_PORT is '65536'" in script.lines()[-1]
