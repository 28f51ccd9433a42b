"""Check the limits and the minimum gap, as the dispatch job applies them."""

import logging
import re

import pytest
import responses
from helpers import MOCK_ENQUEUE, ago, mock_client, run_dispatch, sync, tick
from testing import TestData

import dispatcher
import pacing


@pytest.mark.parametrize("name", list(pacing.WINDOWS))
def test_limit_counts_sent_and_in_flight(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    world.device()
    window = pacing.WINDOWS[name].total_seconds()
    old = world.batch()
    world.item(old, status="sent", sent_at=ago(window - 5))
    world.item(old, status="sent", sent_at=ago(window + 5))  # no longer counts
    world.item(old, status="queued", queued_at=ago(90_000))
    world.item(world.batch(status="paused"), claimed_at=ago(90_000))  # its row may be in the queue
    fresh = [world.batch(clients=1), world.batch(clients=1)]
    world.settings(**{name: 4})
    assert tick(world, mac_sync)["queued"] == 1
    assert [world.statuses(batch_id) for batch_id in fresh] == [["queued"], ["pending"]]
    assert f"limit reached limit={name} used=4 of=4" in caplog.text
    world.settings(**{name: 5})
    assert tick(world, mac_sync)["queued"] == 1


def test_null_is_unlimited_and_zero_sends_nothing(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    for _ in range(5):
        world.batch(clients=2)
    world.settings(max_per_day=0)
    assert not +tick(world, mac_sync)
    world.settings(max_per_day=None)
    assert tick(world, mac_sync)["queued"] == 5


def test_tightest_limit_applies(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    for _ in range(5):
        world.batch(clients=1)
    world.settings(max_per_minute=4, max_per_hour=2, max_per_day=3)
    assert tick(world, mac_sync)["queued"] == 2


@pytest.mark.parametrize(("sent_ago", "queued"), [(50, 0), (61, 1)])
def test_gap_starts_at_newest_sent_item(
    world: TestData, mac_sync: dispatcher.SendQueueClient, sent_ago: int, queued: int
) -> None:
    world.device()
    world.settings(min_gap_seconds=60)
    batch_id = world.batch(clients=1)
    world.item(batch_id, status="sent", sent_at=ago(sent_ago))
    world.item(batch_id, status="sent", sent_at=ago(600))
    other = world.batch(clients=1)
    assert tick(world, mac_sync)["queued"] == queued + 1
    assert world.statuses(other) == ["queued"]


def test_gap_allows_one_item_in_flight(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    world.device()
    world.settings(min_gap_seconds=1)
    batch_id = world.batch(clients=2)
    world.item(batch_id, status="sent", sent_at=ago(600))
    assert tick(world, mac_sync)["queued"] == 1
    assert tick(world, mac_sync)["queued"] == 0
    world.settings(min_gap_seconds=0)
    assert tick(world, mac_sync)["queued"] == 1


def test_limit_applies_after_outage(
    world: TestData, mock_server: responses.RequestsMock, mac_sync: dispatcher.SendQueueClient
) -> None:
    world.device()
    world.settings(max_per_hour=2)
    for _ in range(3):
        world.batch(clients=2)
    mock_server.add_passthru(re.compile(r"http://127\.0\.0\.1"))
    mock_server.post(MOCK_ENQUEUE, status=503)
    for _ in range(3):
        run_dispatch(mock_client())
        sync(world)
    assert tick(world, mac_sync)["queued"] == 2
    assert tick(world, mac_sync)["queued"] == 0
    assert sorted(world.statuses()) == ["pending"] * 4 + ["queued"] * 2
