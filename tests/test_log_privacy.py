"""Check that no log line of the dispatcher shows a message, a token or a full handle."""

import logging
import uuid

import pytest
import responses
from helpers import HANDLE, MOCK_ENQUEUE, mock_client, report_all, run_dispatch, sync, tick
from testing import SERVICE_TOKEN, TestData

import dispatcher

SECRETS = (HANDLE, "Hello!", SERVICE_TOKEN, "mini-token")


def test_logs_hide_text_of_server_errors(
    world: TestData, base_url: str, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    words = " ".join(SECRETS)
    world.device("mini", token="mini-token")
    world.batch(clients=[world.client(HANDLE)])
    tick(world, mac_sync)
    report_all(base_url, "mini-token", "failed", error=words)
    sync(world)
    for code in (400, 401, 409, 500):
        world.batch(clients=[world.client(HANDLE)])
        with responses.RequestsMock() as mock_server:
            mock_server.post(
                MOCK_ENQUEUE,
                status=code,
                json={"success": False, "error": words, "data": {"sendQueueId": str(uuid.uuid4())}},
            )
            run_dispatch(mock_client())
    reasons = world.quinn("SELECT failure_reason FROM outreach_batch_items WHERE failure_reason IS NOT NULL")
    assert len(reasons) == 4  # the device's, and those of the 400 and the 500: these do keep the words
    assert all("Hello!" in reason for (reason,) in reasons)
    [queued, *_] = [line for line in caplog.messages if line.startswith("item queued to mac-sync")]
    assert queued.endswith("to=+1415•••23")
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_logs_hide_row_of_failed_statement(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    world.device()
    world.batch(clients=1)
    world.quinn("ALTER TABLE outreach_batch_items ADD CONSTRAINT none_queued CHECK (status <> 'queued')")
    assert run_dispatch(mac_sync) is None
    assert "dispatch job failed" in caplog.text
    assert "Hello!" not in caplog.text
