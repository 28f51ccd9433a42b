"""Check alert.py: what it tells, once at the beginning and once at the end, over real HTTP through apprise."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from helpers import ago, run_script
from receiver import Receiver, running_receiver
from situations import (
    NOWHERE,
    device_is_off,
    in_quiet_hours,
    paused,
    running_system,
    sending,
    stopped,
    uncollected_items,
    zero,
)
from testing import TestData

import alert
import contacts
import runtime

STOPPED = {"status": "paused", "digest": "d", "pause_reason": "the last 5 messages failed"}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Receiver]:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    with running_receiver() as receiver:
        monkeypatch.setenv("ALERT_URLS", receiver.alert_url)
        yield receiver


@pytest.fixture
def later(tmp_path: Path) -> Callable[..., None]:
    """later(minutes=11): let the conditions of the state file have begun so much earlier."""

    def shift(**length: float) -> None:
        path = tmp_path / alert.STATE_FILE
        state = msgspec.json.decode(path.read_bytes(), type=alert.State)
        for known in state.conditions.values():
            known.since -= timedelta(**length)
        path.write_bytes(msgspec.json.encode(state))

    return shift


def resume(world: TestData) -> None:
    world.settings(paused=False)


def test_hold_is_told_after_ten_minutes_and_once(
    world: TestData, receiver: Receiver, later: Callable[..., None]
) -> None:
    running_system(world)
    paused(world)
    assert alert.main([]) == 0
    later(minutes=9)
    assert alert.main([]) == 0
    assert receiver.texts() == []
    later(minutes=2)
    for _ in range(3):
        assert alert.main([]) == 0
    [text] = receiver.texts()
    assert text == "Held: paused. To go on: UPDATE outreach_settings SET paused = false;"
    resume(world)
    for _ in range(3):
        assert alert.main([]) == 0
    assert receiver.texts() == ["Over: Held: paused."]


def test_short_hold_is_never_told(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    paused(world)
    assert alert.main([]) == 0
    resume(world)
    assert alert.main([]) == 0
    assert receiver.texts() == []


@pytest.mark.parametrize(
    ("situation", "text"),
    [
        (stopped, "Dispatcher not running: last tick 11 min ago"),
        (zero, "Held: max_per_day is 0."),
        (device_is_off, "mac-mini, last seen 3 h 1 min ago, keeps messages waiting."),
    ],
    ids=["dispatcher", "limit", "device"],
)
def test_what_needs_a_person_is_told(
    world: TestData,
    receiver: Receiver,
    later: Callable[..., None],
    situation: Callable[[TestData], None],
    text: str,
) -> None:
    running_system(world)
    situation(world)
    assert alert.main([]) == 0
    later(minutes=11)
    assert alert.main([]) == 0
    assert [told.startswith(text) for told in receiver.texts()] == [True]


@pytest.mark.parametrize("situation", [sending, in_quiet_hours], ids=["sending", "quiet hours"])
def test_what_time_alone_ends_is_not_told(
    world: TestData, receiver: Receiver, later: Callable[..., None], situation: Callable[[TestData], None]
) -> None:
    running_system(world)
    situation(world)
    assert alert.main([]) == 0
    later(hours=9)
    assert alert.main([]) == 0
    assert receiver.texts() == []


def test_problem_of_a_device_is_told_without_a_full_handle(
    world: TestData, receiver: Receiver, later: Callable[..., None]
) -> None:
    running_system(world)
    world.icloud("UPDATE icloud.devices SET problem = 'Messages refuses +14155550123 and eve@example.com'")
    assert alert.main([]) == 0
    later(minutes=3)
    assert alert.main([]) == 0
    assert receiver.texts() == ["mac-mini says: Messages refuses +1415•••23 and e•••@example.com."]
    world.icloud("UPDATE icloud.devices SET problem = NULL")
    assert alert.main([]) == 0
    assert receiver.texts() == ["Over: mac-mini says: Messages refuses +1415•••23 and e•••@example.com."]


def test_batch_that_paused_itself_is_told_at_once(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    batch_id = world.batch(clients=1, **STOPPED)
    assert alert.main([]) == 0
    assert alert.main([]) == 0
    assert receiver.texts() == [f"Batch {batch_id[:8]}… paused itself: the last 5 messages failed."]


def test_finished_batch_is_told_once_and_only_with_failures(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    good, bad, old = (world.batch(status="sent") for _ in range(3))
    world.item(good, status="sent", sent_at=ago(minutes=1))
    world.item(bad, status="failed")
    world.item(bad, status="failed", outcome_unknown_at=ago(minutes=1))
    world.item(old, status="failed")
    world.quinn("UPDATE outreach_batches SET updated_at = now() - interval '25 hours' WHERE id = %(id)s", id=old)
    assert alert.main([]) == 0
    assert alert.main([]) == 0
    expected = f"Batch {bad[:8]}… is finished: 1 message failed, 1 may have been sent: look at the Mac."
    assert receiver.texts() == [expected]


def reply_stop(world: TestData, key: str, **columns: object) -> None:
    values = {"handle_key": key, "word": "STOP", "source": "reply", "received_at": ago(60)} | columns
    names, places = ", ".join(values), ", ".join(f"%({name})s" for name in values)
    world.icloud(f"INSERT INTO icloud.opt_outs ({names}) VALUES ({places})", **values)


def test_opt_out_of_a_handle_that_no_client_has_is_told_once(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    world.client("(+1) 415 555-0123")
    reply_stop(world, "+14155550123")
    reply_stop(world, "+14155550177", created_at=ago(days=8))
    reply_stop(world, "+14155550188", source="owner")
    reply_stop(world, "+14155550199", ended_at=ago(5), ended_by="START")
    assert alert.main([]) == 0
    assert receiver.texts() == []
    reply_stop(world, "eve@example.com")
    for _ in range(3):
        assert alert.main([]) == 0
    expected = "Opted out, and no client has this number or address: e•••@example.com. Say whose it is: "
    assert [text.startswith(expected) for text in receiver.texts()] == [True]
    assert alert.main([]) == 0
    assert receiver.texts() == [], "not even that it is over: the owner has assigned it"


def test_many_opt_outs_are_one_short_message(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    for number in range(9):
        reply_stop(world, f"+1415555019{number}")
    assert alert.main([]) == 0
    [text] = receiver.texts()
    assert (text.count("•••"), text.count("and 4 more")) == (5, 1)


def test_opt_out_is_looked_up_once(
    world: TestData, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each look-up reads all contacts. It is repeated only if a database was down, or nobody got the message."""
    running_system(world)
    reply_stop(world, "eve@example.com")
    receiver.accepts = False
    assert alert.main([]) == 1
    receiver.texts()
    receiver.accepts = True
    assert alert.main([]) == 0
    assert len(receiver.texts()) == 1
    monkeypatch.setattr(contacts, "of_handles", lambda *_: pytest.fail("it was looked up again"))
    assert alert.main([]) == 0
    url = world.databases.icloud_url
    monkeypatch.setenv("QUINN_ICLOUD_DB_URL", NOWHERE)
    assert alert.main([]) == 0
    monkeypatch.setenv("QUINN_ICLOUD_DB_URL", url)
    assert alert.main([]) == 0


def test_hold_behind_another_hold_is_not_over(world: TestData, receiver: Receiver, later: Callable[..., None]) -> None:
    running_system(world)
    paused(world)
    assert alert.main([]) == 0
    later(minutes=11)
    assert alert.main([]) == 0
    world.settings(last_tick_at=ago(minutes=11))
    assert alert.main([]) == 0
    later(minutes=3)
    assert alert.main([]) == 0
    first, second = receiver.texts()
    assert first.startswith("Held: paused.")
    assert second.startswith("Dispatcher not running")
    resume(world)
    world.settings(last_tick_at=ago(seconds=1))
    assert alert.main([]) == 0
    [text] = receiver.texts()
    assert [line[:11] for line in text.splitlines()] == ["Over: Held:", "Over: Dispa"]


def test_nothing_is_over_while_a_database_is_down(
    world: TestData, receiver: Receiver, later: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    running_system(world)
    world.batch(clients=1, **STOPPED)
    assert alert.main([]) == 0
    assert len(receiver.texts()) == 1
    url = world.databases.quinn_url
    monkeypatch.setenv("QUINN_DB_URL", "postgresql://nobody@127.0.0.1:1/nowhere")
    assert alert.main([]) == 0
    later(minutes=3)
    assert alert.main([]) == 0
    [text] = receiver.texts()
    assert text.startswith("Held: database quinn cannot be reached.")
    monkeypatch.setenv("QUINN_DB_URL", url)
    assert alert.main([]) == 0
    [text] = receiver.texts()
    assert text.startswith("Over: Held: database quinn cannot be reached.")


def test_refused_alert_is_sent_by_the_next_run(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    world.batch(clients=1, **STOPPED)
    receiver.accepts = False
    assert alert.main([]) == 1
    receiver.texts()
    receiver.accepts = True
    assert alert.main([]) == 0
    assert alert.main([]) == 0
    assert len(receiver.texts()) == 1


def test_new_process_tells_nothing_twice(world: TestData, receiver: Receiver) -> None:
    running_system(world)
    world.batch(clients=1, **STOPPED)
    for _ in range(2):
        done = run_script("alert.py")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(receiver.texts()) == 1


def test_heartbeat_says_whether_all_is_well(
    world: TestData, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_system(world)
    monkeypatch.setenv("HEARTBEAT_URL", f"http://{receiver.address}/ping/")
    assert alert.main([]) == 0
    batch_id = world.batch(clients=1, **STOPPED)
    assert alert.main([]) == 0
    world.quinn("UPDATE outreach_batches SET status = 'cancelled' WHERE id = %(id)s", id=batch_id)
    assert alert.main([]) == 0
    assert receiver.pings == ["/ping", "/ping/fail", "/ping"]
    receiver.accepts = False
    assert alert.main([]) == 1


def test_damaged_state_file_is_replaced(world: TestData, receiver: Receiver, tmp_path: Path) -> None:
    running_system(world)
    uncollected_items(world)
    (tmp_path / alert.STATE_FILE).write_bytes(b'{"conditions": {"')
    assert alert.main([]) == 0
    assert msgspec.json.decode((tmp_path / alert.STATE_FILE).read_bytes(), type=alert.State).conditions == {}


def test_test_message_arrives(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    assert alert.main(["--test"]) == 0
    assert capsys.readouterr().out == "sent to every address\n"
    [text] = receiver.texts()
    assert text.endswith("Alerts arrive here.")


def test_settings_are_checked(world: TestData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running_system(world)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert alert.main([]) == 0, "without an address there is nothing to do"
    with pytest.raises(runtime.ConfigError, match="ALERT_URLS is not set"):
        alert.main(["--test"])
    monkeypatch.setenv("ALERT_URLS", "nonsense")
    with pytest.raises(runtime.ConfigError, match="ALERT_URLS has an address that apprise cannot read"):
        alert.main(["--test"])
    with pytest.raises(runtime.ConfigError, match="STATE_DIRECTORY"):
        alert.main([])
