"""POST health: what a Mac says is wrong with it, and where that is seen."""

from typing import Any

import pytest
import requests
from testing import SERVICE_TOKEN, DeviceClient, TestData

PROBLEM = "Full Disk Access is missing for /usr/bin/python3"


def columns(world: TestData) -> Any:
    [found] = world.icloud("SELECT problem, problem_at, version FROM icloud.devices WHERE name = 'mac-mini'")
    return found


def test_a_problem_is_kept_with_the_time_since_when_and_is_a_sign_of_life(world: TestData, mini: DeviceClient) -> None:
    assert mini.health(PROBLEM, version="1.0").json()["data"] == {}
    problem, since, version = columns(world)
    assert (problem, version) == (PROBLEM, "1.0")
    assert world.icloud("SELECT problem_at = last_seen_at FROM icloud.devices") == [(True,)]
    world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '5 seconds'")
    mini.health(PROBLEM)
    assert columns(world) == (PROBLEM, since, "1.0"), "the same problem has lasted since then"
    assert world.icloud("SELECT last_seen_at > problem_at FROM icloud.devices") == [(True,)]
    mini.health("Messages is signed out")
    assert columns(world)[0] == "Messages is signed out"
    assert columns(world)[1] > since
    mini.health(None)
    assert columns(world) == (None, None, "1.0")


def test_a_poll_leaves_the_problem_alone(world: TestData, mini: DeviceClient) -> None:
    mini.health(PROBLEM)
    mini.poll()
    mini.peek()
    assert columns(world)[0] == PROBLEM


def test_a_device_s_words_are_cut_and_cleaned(world: TestData, mini: DeviceClient) -> None:
    assert mini.health("x\0\ud800" + "y" * 5000).status_code == 200
    assert columns(world)[0] == "x\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}" + "y" * 997


def test_also_a_mac_whose_token_is_another_ones_may_say_so(
    world: TestData, mini: DeviceClient, base_url: str, device_id: str
) -> None:
    mini.collect(world.row(device_id))
    assert DeviceClient(base_url, instance="its clone").health("another Mac uses this token").status_code == 200
    assert columns(world)[0] == "another Mac uses this token"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "problem"), ({"problem": ""}, "problem"), ({"problem": 1}, "problem"),
        ({"problem": None, "version": ""}, "version"), ({"problem": None, "version": "1\0"}, "version"),
        ({"problem": None, "version": "1" * 201}, "version"),
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_right_is_refused_by_name_and_changes_nothing(
    world: TestData, mini: DeviceClient, body: dict[str, Any], field: str
) -> None:
    mini.health(PROBLEM, version="1.0")
    response = mini.call("POST", "/health", body)
    assert response.status_code == 400
    assert field in response.json()["error"]
    assert (columns(world)[0], columns(world)[2]) == (PROBLEM, "1.0")


def test_a_device_speaks_for_itself_alone(world: TestData, mini: DeviceClient, base_url: str) -> None:
    world.device("other")
    mini.health(PROBLEM)
    assert world.icloud("SELECT problem FROM icloud.devices WHERE name = 'other'") == [(None,)]
    assert DeviceClient(base_url, SERVICE_TOKEN).health(None).status_code == 401
    assert columns(world)[0] == PROBLEM


def test_a_problem_is_logged_when_it_changes_and_without_its_words(
    mini: DeviceClient, device_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for problem in (PROBLEM, PROBLEM, "release +14155550123", None, None):
        mini.health(problem)
    cannot = f"device cannot send deviceId={device_id}; `python status.py` shows what it says"
    assert caplog.messages == [cannot, cannot, f"device can send again deviceId={device_id}"]


def test_a_monitor_sees_the_problem(mini: DeviceClient, base_url: str) -> None:
    mini.health(PROBLEM)
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    response = requests.get(f"{base_url}/admin/send-queue/status", headers=headers, timeout=10)
    assert [device["problem"] for device in response.json()["data"]["devices"]] == [PROBLEM]
