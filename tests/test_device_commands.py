"""Check the commands of db.py for devices: add, list, rename, remove, and new tokens."""

import re
from datetime import UTC, datetime

import pytest
from helpers import PENDING, ApiClient, queue_row
from testing import DeviceClient, TestData

import db
import dispatcher


def polled(base_url: str, token: str) -> int:
    """Poll with this token; return the status code."""
    return ApiClient(base_url, token).call("GET", PENDING).status_code


def test_device_with_plain_token_can_poll(world: TestData, base_url: str) -> None:
    world.icloud("INSERT INTO icloud.devices (name, token) VALUES ('test-device', 'test-token-abc123')")
    assert polled(base_url, "test-token-abc123") == 200
    assert polled(base_url, "test-token-abc124") == 401


def test_add_device_stores_only_token_hash(world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert db.main(["add-device", "mac-mini"]) == 0
    said = re.fullmatch(
        r"device ([0-9a-f-]{36})\ntoken  (\S{40,})\nThe token is shown this once.*\n", capsys.readouterr().out
    )
    assert said
    device_id, token = said.groups()
    [(name, stored)] = world.icloud("SELECT name, token FROM icloud.devices WHERE id = %(id)s", id=device_id)
    assert name == "mac-mini"
    assert re.fullmatch("sha256:[0-9a-f]{64}", stored)
    assert token not in stored
    assert polled(base_url, token) == 200
    assert polled(base_url, stored) == 401


SEEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).astimezone()


def test_devices_lists_waiting_and_collected(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    assert db.main(["devices"]) == 0
    assert capsys.readouterr().out == "There is no device: `python db.py add-device NAME` makes one.\n"
    busy, idle = world.device("mac-mini"), world.device("\x1b[2Jold mac")
    world.icloud("UPDATE icloud.devices SET last_seen_at = '2026-01-02 03:04:05+00' WHERE id = %(id)s", id=busy)
    for _ in range(3):
        queue_row(world, None, busy)
    queue_row(world, None, busy, collected_at="2026-01-02")
    queue_row(world, None, busy, status="sent", sent_at="2026-01-02")
    assert db.main(["devices"]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["NAME", "ID", "LAST", "SEEN", "WAITING", "COLLECTED"]
    assert first.split() == ["mac-mini", busy, *f"{SEEN:%Y-%m-%d %H:%M:%S %Z}".split(), "3", "1"]
    assert second.split("  ")[0] == "\ufffd[2Jold mac"
    assert second.split()[2:] == [idle, "never", "0", "0"]
    assert len(heading) == len(first) == len(second)
    for name in "cabed":
        world.device(name)
    assert db.main(["devices"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()[3:]] == list("cabed"), "the oldest first"


def test_new_token_replaces_old_token(world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = world.device("mac-mini", token="the-old-one")
    world.device("other", token="other")
    assert polled(base_url, "the-old-one") == 200
    assert db.main(["new-token", "mac-mini"]) == 0
    said = re.fullmatch(rf"device {device}\ntoken  (\S{{40,}})\nThe old token no longer .*\n", capsys.readouterr().out)
    assert said
    assert polled(base_url, said[1]) == polled(base_url, "other") == 200
    assert polled(base_url, "the-old-one") == 401
    assert world.icloud("SELECT token FROM icloud.devices WHERE id = %(id)s", id=device) == [(db.hash_token(said[1]),)]


def test_rename_device_keeps_its_token(world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = world.device("mac-mini", token="mini")
    world.device("other")
    assert db.main(["rename-device", "mac-mini", "the office"]) == 0
    assert capsys.readouterr().out == f"device {device} is now called 'the office'\n"
    assert world.icloud("SELECT name FROM icloud.devices ORDER BY name") == [("other",), ("the office",)]
    assert polled(base_url, "mini") == 200
    assert db.main(["rename-device", "the office", "other"]) == 1
    assert capsys.readouterr().err == "db.py: there is a device 'other' already: choose another name\n"


COMMANDS = (
    ["new-token", "mac"], ["rename-device", "mac", "new"], ["release-device", "mac"], ["remove-device", "mac", "--yes"],
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_unknown_or_ambiguous_device_is_an_error(
    world: TestData, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    world.device("mini", token="0")
    assert db.main(command) == 1
    assert capsys.readouterr().err == "db.py: there is no device 'mac': `python db.py devices` lists them\n"
    ids = sorted(world.device("mac", token=token) for token in "12")
    before = world.icloud("SELECT * FROM icloud.devices ORDER BY id")
    assert db.main(command) == 1
    refusal = f"db.py: 2 devices are called 'mac': give the id of one of them instead, {ids[0]}, {ids[1]}\n"
    assert capsys.readouterr().err == refusal
    assert world.icloud("SELECT * FROM icloud.devices ORDER BY id") == before
    assert db.main([command[0], ids[0], *command[2:]]) == 0
    changed = world.icloud("SELECT * FROM icloud.devices ORDER BY id")
    touched = [row for row in before if row[0] == ids[0]] if command[0] != "release-device" else []
    assert [row for row in before if row not in changed] == touched


def test_remove_device_needs_yes(world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    device, other = world.device("mac mini", token="mini"), world.device("other")
    queue_row(world, None, device)
    queue_row(world, None, device, collected_at="2026-01-02")
    for _ in range(2):
        queue_row(world, None, device, status="sent", sent_at="2026-01-02")
    queue_row(world, None, other)
    assert db.main(["remove-device", "mac mini"]) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        f"device 'mac mini', {device}, last seen: never\n- 1 message not collected: deleted, and the"
    )
    assert "\n- 1 message collected, without a result: deleted, and the items become `failed`. The device\n" in said
    assert "\n- 2 messages with a result: deleted from the queue." in said
    assert said.endswith("\nNothing is changed. To remove it: python db.py remove-device 'mac mini' --yes\n")
    assert world.icloud("SELECT count(*) FROM icloud.send_queue") == [(5,)]
    assert polled(base_url, "mini") == 200  # and it collects the other one
    assert db.main(["remove-device", "mac mini", "--yes"]) == 0
    assert "- 2 messages collected, without a result" in capsys.readouterr().out
    assert world.icloud("SELECT device_id FROM icloud.send_queue") == [(other,)]
    assert world.icloud("SELECT name FROM icloud.devices") == [("other",)]
    assert polled(base_url, "mini") == 401
    assert db.main(["remove-device", "other"]) == 1
    assert "- 1 message not collected" in capsys.readouterr().out
    world.icloud("DELETE FROM icloud.send_queue")
    assert db.main(["remove-device", "other", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["- Nothing is in flight.", "The device is removed."]


def test_remove_device_waits_for_unread_results(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    device = world.device("mac")
    batch = world.batch()
    # The response to the first one's enqueue was lost; the second one was sent; the third one waits.
    claimed = world.item(batch, claimed_at="2026-01-02")
    queue_row(world, claimed, device, collected_at="2026-01-02")
    world.device("idle")
    sent = world.item(
        batch, status="queued", send_queue_id=queue_row(world, None, device, status="sent", sent_at="2026-01-02")
    )
    world.item(batch, status="queued", send_queue_id=queue_row(world, None, device))
    world.item(batch, status="queued", send_queue_id="no uuid")
    assert db.main(["remove-device", "mac", "--yes"]) == 1
    refusal = "db.py: nothing is changed: the dispatcher has not read yet what became of 2 messages, and "
    assert capsys.readouterr().err.startswith(refusal)
    assert db.main(["remove-device", "idle", "--yes"]) == 0, "it has none of them"
    assert world.icloud("SELECT count(*) FROM icloud.devices") == [(1,)]
    dispatcher.sync(world.databases.quinn, world.databases.icloud)
    assert world.quinn("SELECT status FROM outreach_batch_items WHERE id = %(id)s", id=sent) == [("sent",)]
    assert db.main(["remove-device", "mac", "--yes"]) == 0
    dispatcher.sync(world.databases.quinn, world.databases.icloud)
    assert sorted(world.statuses()) == ["failed", "failed", "failed", "sent"], "and none is pending again"


@pytest.mark.parametrize("command", ["add-device", "rename-device"])
def test_device_needs_a_name(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        db.main([command, *["mac"] * (command == "rename-device"), " "])
    assert "a device needs a name" in capsys.readouterr().err


def test_release_device_ends_what_it_has_collected_as_unknown_and_nothing_else(
    world: TestData, base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device, other = world.device("mac mini", token="mini"), world.device("other")
    collected = [queue_row(world, None, device, collected_at="2026-01-02") for _ in range(2)]
    waiting = queue_row(world, None, device)
    others = queue_row(world, None, other, collected_at="2026-01-02")
    done = queue_row(world, None, device, status="sent", sent_at="2026-01-02", collected_at="2026-01-02")
    before = [world.row_columns(row_id, "*") for row_id in (waiting, others, done)]
    assert db.main(["release-device", "mac mini"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"device 'mac mini', {device}, last seen: never\n- 2 messages collected, without a result: the"
    )
    assert "python dispatcher.py --retry BATCH_ID --include-unknown\n" in said
    assert "- 1 message not collected: still waiting for this device." in said
    for row_id in collected:
        assert world.row_columns(row_id, "status, outcome, watched_until") == ("failed", "unknown", None)
    assert [world.row_columns(row_id, "*") for row_id in (waiting, others, done)] == before
    mac = DeviceClient(base_url, "mini")
    assert mac.collect(collected[0]).json()["data"]["reason"] == "gone"
    assert mac.result(collected[0]).json()["data"] == {"id": collected[0], "status": "sent"}, "the Mac came back"
    assert db.main(["release-device", "mac mini"]) == 0
    assert "- It has collected nothing without a result, so nothing is changed.\n" in capsys.readouterr().out


def test_a_dead_mac_does_not_hold_the_limits_of_all_once_it_is_released(
    world: TestData, mac_sync: dispatcher.SendQueueClient, capsys: pytest.CaptureFixture[str]
) -> None:
    device = world.device("dead")
    item_id = world.item(world.batch(), status="queued")
    row_id = queue_row(world, item_id, device, collected_at="2026-01-02")
    world.quinn("UPDATE outreach_batch_items SET send_queue_id = %(row)s", row=row_id)
    world.batch(clients=1)
    world.settings(max_per_minute=1)
    assert dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)["queued"] == 0
    db.main(["release-device", "dead"])
    dispatcher.sync(world.databases.quinn, world.databases.icloud)
    world.quinn(
        "UPDATE outreach_batch_items SET outcome_unknown_at = now() - interval '1 minute' WHERE status = 'failed'"
    )
    assert dispatcher.dispatch(world.databases.quinn, world.databases.icloud, mac_sync)["queued"] == 1
