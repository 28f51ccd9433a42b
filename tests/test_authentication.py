"""Check who may use which path: the service token, a device's token, and everybody else."""

import uuid

from helpers import ENQUEUE, PENDING, STATUS, ApiClient
from testing import SERVICE_TOKEN, TestData

import db

WITHOUT_A_GOOD_TOKEN = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Basic bWFjLW1pbmk6",
    "mac-mini",
    "Bearer mac mini",
    "Bearer mac-mini extra",
    "Bearer m\xe4c",
]


def test_bad_token_is_refused_on_every_path(base_url: str, mac_id: str) -> None:
    result = f"/client/imessage/send-queue/{uuid.uuid4()}/result"
    for header in WITHOUT_A_GOOD_TOKEN:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, path in (("GET", PENDING), ("POST", result), ("POST", ENQUEUE), ("GET", STATUS)):
            response = ApiClient(base_url, None).call(method, path, {}, headers=headers)
            assert (response.status_code, header) == (401, header)
            assert response.headers["WWW-Authenticate"] == "Bearer"


def test_token_opens_only_its_own_paths(base_url: str, admin: ApiClient, mac: ApiClient, mac_id: str) -> None:
    assert mac.enqueue(mac_id).status_code == 401
    assert mac.call("GET", STATUS).status_code == 401
    assert admin.call("GET", PENDING).status_code == 401
    assert admin.result(str(uuid.uuid4())).status_code == 401


def test_plain_and_hashed_tokens_authenticate(world: TestData, base_url: str) -> None:
    device_id, token = db.add_device("with a digest")
    assert world.icloud("SELECT token FROM icloud.devices") == [(db.hash_token(token),)]
    world.device(token="plain-token")
    for owner_id, known in ((device_id, token), (world.icloud("SELECT id FROM icloud.devices")[1][0], "plain-token")):
        queue_id = ApiClient(base_url, SERVICE_TOKEN).enqueued(owner_id)
        assert [item["id"] for item in ApiClient(base_url, known).pending()] == [queue_id]
        assert ApiClient(base_url, known).result(queue_id).status_code == 200


def test_stored_hash_is_not_a_token(base_url: str, databases: object) -> None:
    _, token = db.add_device("with a digest")
    assert ApiClient(base_url, db.hash_token(token)).call("GET", PENDING).status_code == 401


def test_empty_token_of_device_admits_nobody(world: TestData, base_url: str) -> None:
    world.icloud("INSERT INTO icloud.devices (name, token) VALUES ('empty', '')")
    assert ApiClient(base_url, None).call("GET", PENDING).status_code == 401


def test_bearer_scheme_ignores_case(base_url: str, mac_id: str) -> None:
    assert (
        ApiClient(base_url, None).call("GET", PENDING, headers={"Authorization": "bearer  mac-mini"}).status_code == 200
    )
