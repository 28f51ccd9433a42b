"""Check GET /admin/send-queue/status and /healthz."""

from datetime import UTC

import requests
from helpers import STATUS, ApiClient
from situations import running_system, uncollected_items
from testing import TestData


def test_status_without_device_has_only_last_hour(admin: ApiClient, databases: object) -> None:
    data = admin.call("GET", STATUS).json()["data"]
    assert data == {"devices": [], "lastHour": {"sent": 0, "failed": 0}}


def test_status_counts_by_device_and_hour(world: TestData, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    other_id = world.device("older")
    world.icloud("UPDATE icloud.devices SET created_at = now() - interval '1 day' WHERE id = %(id)s", id=other_id)
    done = [admin.enqueued(mac_id) for _ in range(5)]
    mac.result(done[0]), mac.result(done[1]), mac.result(done[2], "failed"), mac.result(done[4], "failed")
    world.icloud(
        "UPDATE icloud.send_queue SET updated_at = now() - interval '61 minutes' WHERE id = %(id)s", id=done[1]
    )
    world.icloud(
        "UPDATE icloud.send_queue SET status = 'failed', withdrawn_at = now() WHERE id = %(id)s", id=done[3]
    )  # fmt: skip
    old, _ = admin.enqueued(mac_id), admin.enqueued(mac_id)
    world.icloud("UPDATE icloud.send_queue SET created_at = now() - interval '90 seconds' WHERE id = %(id)s", id=old)
    mac.pending()
    admin.enqueued(mac_id)
    data = admin.call("GET", STATUS).json()["data"]
    assert data["lastHour"] == {"sent": 1, "failed": 2}
    older, mini = data["devices"]
    assert older == {
        "id": other_id, "name": "older", "lastSeenAt": None, "problem": None, "waiting": 0, "collected": 0,
        "oldestAgeSeconds": None,
    }  # fmt: skip
    assert (mini["id"], mini["waiting"], mini["collected"]) == (mac_id, 1, 2)
    assert 90 <= mini["oldestAgeSeconds"] < 100
    assert mini["lastSeenAt"].endswith("Z")


def test_health_needs_no_token(base_url: str) -> None:
    assert ApiClient(base_url, None).call("GET", "/healthz").json()["data"] == {"status": "ok"}


def test_status_counts_waiting_collected_and_ended_rows(world: TestData, admin: ApiClient) -> None:
    assert admin.call("GET", STATUS).json()["data"] == {"devices": [], "lastHour": {"sent": 0, "failed": 0}}
    running_system(world)
    uncollected_items(world, 3)
    world.icloud("UPDATE icloud.send_queue SET created_at = now() - interval '90 seconds'")
    one = "WHERE id = (SELECT id FROM icloud.send_queue WHERE status = 'queued' LIMIT 1)"
    world.icloud(f"UPDATE icloud.send_queue SET collected_at = now() {one}")
    uncollected_items(world, 3)
    ends = (
        "status = 'sent', sent_at = now()",
        "status = 'failed'",
        "status = 'failed', withdrawn_at = now(), collected_at = NULL",
    )
    for end in ends:
        world.icloud(f"UPDATE icloud.send_queue SET {end} WHERE id = (SELECT id FROM icloud.send_queue"
                     " WHERE status = 'queued' ORDER BY created_at DESC LIMIT 1)")  # fmt: skip
    device_id, seen_at = world.icloud("SELECT id, last_seen_at FROM icloud.devices")[0]
    data = admin.call("GET", STATUS).json()["data"]
    assert data["lastHour"] == {"sent": 1, "failed": 1}
    assert data["devices"] == [
        {
            "id": device_id,
            "name": "mac-mini",
            "lastSeenAt": f"{seen_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "problem": None,
            "waiting": 2,
            "collected": 1,
            "oldestAgeSeconds": 90,
        }
    ]


def test_status_needs_service_token_and_get(world: TestData, base_url: str) -> None:
    world.device(token="mini")
    for token in ("mini", "wrong"):
        assert ApiClient(base_url, token).call("GET", STATUS).status_code == 401
    assert requests.post(base_url + STATUS, timeout=5).status_code == 405
    assert requests.head(base_url + STATUS, timeout=5).status_code == 405
