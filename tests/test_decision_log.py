"""Check the log of the dispatcher's decisions: it says what changes, once."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from situations import device_is_off, running_system
from testing import TestData

import dispatcher
import pacing


def test_decision_log_omits_repeated_decisions(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = datetime.now(UTC)
    pace = pacing.Snapshot(pacing.Settings(False, None, None, None, 2, None, None, 30, None), now, 0, [])
    sending = pacing.Batch("a batch", True, False, None)
    gap = pacing.Hold("minimum gap", now + timedelta(seconds=20))
    limit = pacing.Hold("limit reached limit=max_per_minute used=2 of=2", now + timedelta(seconds=50))
    night = pacing.Hold("quiet hours", now + timedelta(hours=9))
    logged: list[tuple[pacing.Decision, str]] = [
        (sending, "sending"), (gap, "sending is held: minimum gap"), (sending, ""), (gap, ""),
        (limit, "sending is held: limit reached"), (gap, ""), (sending, ""), (limit, ""),
        (night, "sending is held: quiet hours"), (night, ""),
        (sending, "sending"), (gap, "sending is held: minimum gap"), (sending, ""),
        (None, "nothing to send"), (None, ""), (sending, "sending"), (None, "nothing to send"),
    ]  # fmt: skip
    decision_log = dispatcher.DecisionLog()
    for verdict, words in logged:
        caplog.clear()
        decision_log.log_change(pace, verdict)
        assert "".join(caplog.messages).startswith(words)
        assert len(caplog.messages) == (1 if words else 0)
    decision_log.log_change(None, pacing.global_hold(None))
    assert caplog.records[-1].levelname == "ERROR"


def test_limit_filled_by_late_device_is_logged_once(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outreach-dispatcher")
    running_system(world)
    device_is_off(world)
    for _ in range(5):
        dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)
    assert [line for line in caplog.messages if "held" in line] == [
        "sending is held: waiting for device name='mac-mini'"
    ]


def test_twenty_ticks_log_four_decisions(
    world: TestData, mac_sync: dispatcher.SendQueueClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outreach-dispatcher")
    world.device()
    world.settings(max_per_minute=1, max_per_hour=5)
    databases = world.databases.quinn, world.databases.icloud
    dispatcher.dispatch(*databases, mac_sync)
    world.batch(clients=7)
    for _ in range(20):
        dispatcher.sync(*databases)
        dispatcher.dispatch(*databases, mac_sync)
        world.icloud("UPDATE icloud.send_queue SET status = 'sent', sent_at = now() WHERE status = 'queued'")
        world.quinn("UPDATE outreach_batch_items SET sent_at = sent_at - interval '30 seconds' WHERE status = 'sent'")
    story = [record.message for record in caplog.records if record.message.startswith(("sending", "nothing"))]
    assert [re.sub(" used=.*", "", line) for line in story] == [
        "nothing to send",
        "sending",
        "sending is held: limit reached limit=max_per_minute",
        "sending is held: limit reached limit=max_per_hour",
    ]
