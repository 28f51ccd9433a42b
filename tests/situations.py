"""Put the databases into each situation that the report distinguishes; SITUATIONS lists them all."""

from collections.abc import Callable
from typing import Any

from helpers import ago, start_quiet_hours
from testing import TestData

Situation = Callable[[TestData], object]


NOWHERE = "postgresql://somebody:secret-word@127.0.0.1:1/nowhere"


def running_system(world: TestData) -> None:
    """Set the last tick to 18 s ago, and insert a device that polled 3 s ago."""
    world.settings(last_tick_at=ago(seconds=18), last_synced_at=ago(seconds=18), last_dispatched_at=ago(seconds=18))
    world.device()
    world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '3 seconds'")


def uncollected_items(world: TestData, count: int = 1, batch_id: str | None = None, seen: float | None = 3) -> str:
    """Insert items in flight that the device, last seen so many seconds ago, has not collected; return their batch."""
    batch_id = batch_id or world.batch()
    device_id = world.icloud("SELECT id FROM icloud.devices LIMIT 1")[0][0]
    for _ in range(count):
        sql = "INSERT INTO icloud.send_queue (device_id, to_handle, body) VALUES (%(id)s, 'a@b.de', 'Hi') RETURNING id"
        row = world.icloud(sql, id=device_id)
        world.item(batch_id, status="queued", send_queue_id=row[0][0], queued_at=ago(seconds=20))
    world.icloud("UPDATE icloud.devices SET last_seen_at = %(at)s", at=ago(seconds=seen) if seen is not None else None)
    return batch_id


def sent_items(world: TestData, count: int, **length: float) -> None:
    """Insert items that were sent so long ago."""
    old = world.batch(status="sent")
    for _ in range(count):
        world.item(old, status="sent", sent_at=ago(**length))


def idle(world: TestData) -> None: ...


def sending(world: TestData) -> None:
    world.batch(clients=2)


def paused(world: TestData) -> None:
    sending(world)
    world.settings(paused=True)


def no_settings(world: TestData) -> None:
    sending(world)
    world.quinn("DELETE FROM outreach_settings")


def in_quiet_hours(world: TestData) -> None:
    sending(world)
    start_quiet_hours(world)


def invalid_quiet_hours(world: TestData) -> None:
    sending(world)
    world.settings(quiet_hours_start="25:00", quiet_hours_end="08:00")


def stopped(world: TestData) -> None:
    sending(world)
    world.settings(last_tick_at=ago(minutes=11))


def never_ran(world: TestData) -> None:
    sending(world)
    world.settings(last_tick_at=None)


def hour_is_full(world: TestData) -> None:
    sending(world)
    sent_items(world, 3, minutes=20)
    world.settings(max_per_hour=3)


def minute_and_hour_are_full(world: TestData) -> None:
    sending(world)
    sent_items(world, 3, seconds=10)
    world.settings(max_per_minute=1, max_per_hour=3)


def day_is_full(world: TestData) -> None:
    sending(world)
    sent_items(world, 2, hours=5)
    world.settings(max_per_hour=1, max_per_day=2)


def zero(world: TestData) -> None:
    sending(world)
    world.settings(max_per_day=0)


def zero_and_in_flight(world: TestData) -> None:
    uncollected_items(world)
    sending(world)
    world.settings(max_per_minute=1, max_per_day=0)


def device_is_off(world: TestData) -> None:
    sending(world)
    uncollected_items(world, 2, seen=3 * 3600 + 60)
    world.settings(max_per_minute=2)


def device_is_slow(world: TestData) -> None:
    sending(world)
    uncollected_items(world, 2)
    world.settings(max_per_minute=2)


def device_never_seen(world: TestData) -> None:
    uncollected_items(world, seen=None)


def last_in_flight(world: TestData) -> None:
    uncollected_items(world)


def results_to_read(world: TestData) -> None:
    uncollected_items(world)
    world.icloud("UPDATE icloud.send_queue SET status = 'sent', sent_at = now()")


def gap(world: TestData) -> None:
    world.item(world.batch(clients=1), status="sent", sent_at=ago(seconds=40))
    world.settings(min_gap_seconds=300)


def gap_of_one(world: TestData) -> None:
    gap(world)
    world.batch(clients=1)


def gap_in_flight(world: TestData) -> None:
    uncollected_items(world, batch_id=world.batch(clients=1), seen=7200)
    world.settings(min_gap_seconds=30)


def gap_and_limit(world: TestData) -> None:
    gap(world)
    world.settings(max_per_hour=1)


def paused_in_quiet_hours(world: TestData) -> None:
    in_quiet_hours(world)
    world.settings(paused=True)


def quiet_and_full(world: TestData) -> None:
    hour_is_full(world)
    start_quiet_hours(world)


def paused_and_off(world: TestData) -> None:
    device_is_off(world)
    world.settings(paused=True)


def stopped_and_paused(world: TestData) -> None:
    paused(world)
    world.settings(last_tick_at=ago(hours=2))


def no_device(world: TestData) -> None:
    sending(world)
    world.icloud("DELETE FROM icloud.devices")


def no_device_in_quiet_hours(world: TestData) -> None:
    no_device(world)
    start_quiet_hours(world)


def only_drafts(world: TestData) -> None:
    world.batch(clients=2, status="draft")
    world.batch(clients=2, status="paused")
    world.batch(clients=1, dry_run=True)


def no_items_yet(world: TestData) -> None:
    world.batch()


def claimed(world: TestData) -> None:
    world.item(world.batch(), claimed_at=ago(seconds=2))
    world.settings(max_per_minute=1)


def server_is_down(world: TestData) -> None:
    world.item(world.batch(), claimed_at=ago(minutes=4))
    world.settings(max_per_minute=1)


def server_is_down_at_night(world: TestData) -> None:
    server_is_down(world)
    start_quiet_hours(world)


def sync_fails(world: TestData) -> None:
    uncollected_items(world)
    world.settings(last_tick_at=ago(seconds=5), last_synced_at=ago(hours=2, seconds=5))


def dispatch_fails_while_paused(world: TestData) -> None:
    paused(world)
    world.settings(last_tick_at=ago(seconds=5), last_dispatched_at=ago(minutes=20))


def sync_never_worked(world: TestData) -> None:
    world.settings(last_synced_at=None)


def one_batch_below_the_limit(world: TestData) -> None:
    world.batch(clients=3)
    world.settings(max_per_minute=60)


def unreadable_number(world: TestData) -> None:
    world.batch(clients=[world.client("0170 1234567"), world.client()])


def all_have_ended(world: TestData) -> None:
    world.item(world.batch(status="sent"), status="failed", failure_reason="not registered")


DISK = "Full Disk Access is missing for /usr/bin/python3"


def mac_says(world: TestData, name: str = "mac-mini", problem: str = DISK) -> None:
    sql = "UPDATE icloud.devices SET problem = %(problem)s, problem_at = now() WHERE name = %(name)s"
    world.icloud(sql, name=name, problem=problem)


def mac_says_and_paused(world: TestData) -> None:
    paused(world)
    mac_says(world, problem=f"{DISK}.")


def mac_says_and_stopped(world: TestData) -> None:
    stopped(world)
    mac_says(world)


def another_mac(world: TestData) -> None:
    world.device("mac-2")
    world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '3 seconds'")


def both_macs_say(world: TestData) -> None:
    another_mac(world)
    mac_says(world)
    mac_says(world, "mac-2", "Messages is signed out")


def one_of_two_macs_says(world: TestData) -> None:
    sending(world)
    another_mac(world)
    mac_says(world, "mac-2")


def one_of_two_macs_holds_the_limit(world: TestData) -> None:
    sending(world)
    uncollected_items(world, 2)
    another_mac(world)
    mac_says(world)
    world.settings(max_per_minute=2)


def a_mac_that_is_gone_says(world: TestData) -> None:
    one_of_two_macs_says(world)
    world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '25 hours' WHERE name = 'mac-2'")


def batch_stopped_itself(world: TestData) -> None:
    world.batch(
        clients=1, status="paused", digest="d", approved_at=ago(3600), pause_reason="the last 5 messages failed"
    )


def batch_stopped_itself_beside_another(world: TestData) -> None:
    batch_stopped_itself(world)
    sending(world)


def outcome_unknown(world: TestData, days: float = 7) -> None:
    world.item(world.batch(status="sent"), status="failed", outcome_unknown_at=ago(days=days))


def outcome_unknown_long_ago(world: TestData) -> None:
    outcome_unknown(world, days=9)


def composed(world: TestData, clients: int = 2, **columns: Any) -> str:
    return world.batch(clients=clients, **{"digest": "d", "approved_at": ago(3600), **columns})


def begins_later(world: TestData) -> None:
    composed(world, send_from=ago(hours=-26))


def begins_later_beside_another(world: TestData) -> None:
    begins_later(world)
    sending(world)


def begins_later_and_device_is_off(world: TestData) -> None:
    begins_later(world)
    gap_in_flight(world)


def begins_later_and_hour_is_full(world: TestData) -> None:
    begins_later(world)
    hour_is_full(world)


def two_begin_later(world: TestData) -> None:
    begins_later(world)
    composed(world, send_from=ago(days=-3))


def by_hand_has_no_times(world: TestData) -> None:
    world.batch(clients=1, send_from=ago(hours=-26))


def first_ones_are_in_flight(world: TestData) -> None:
    uncollected_items(world, 1, composed(world, first_n=1))


def first_ones_were_sent(world: TestData) -> None:
    composed(world, status="paused", first_n=2, pause_reason="the first 2 messages were sent")


def time_is_over(world: TestData) -> None:
    composed(world, send_until=ago(seconds=5))


def approval_is_over(world: TestData) -> None:
    composed(world, approved_at=ago(days=7, seconds=5))


def approval_lapsed(world: TestData) -> None:
    composed(world, status="paused", approved_at=ago(days=8), pause_reason="approval lapsed")


def audience_is_broken(world: TestData) -> None:
    composed(world, status="paused", pause_reason="its audience cannot be checked any more: there is no column")


def too_late_for_most(world: TestData) -> None:
    composed(world, clients=9, send_until=ago(seconds=-80))


# The situation, the first line of status.py, and its exit status.
SITUATIONS: list[tuple[Situation, str, int]] = [
    (idle, r"Nothing to send\.", 0),
    (all_have_ended, r"Nothing to send\.", 0),
    (only_drafts, r"Nothing to send\.", 0),
    (no_items_yet, r"Nothing to send\.", 0),
    (sending, r"Sending: next item of batch [0-9a-f]{8}… in about 1[12] s\.", 0),
    (gap_of_one, r"Sending: next item of batch .*", 0),
    (claimed, r"Sending: next item of batch .*", 0),
    (invalid_quiet_hours, r"Sending: next item of batch .*", 1),
    (paused, r"Held: paused\.", 1),
    (paused_in_quiet_hours, r"Held: paused\.", 1),
    (paused_and_off, r"Held: paused\.", 1),
    (no_settings, r"Held: no settings: outreach_settings has no row with id 1; run `python db.py migrate`\.", 1),
    (in_quiet_hours, r"Held: quiet hours until (\w+ )?\d\d:\d\d \(UTC\), (59 min|1 h)\.", 0),
    (quiet_and_full, r"Held: quiet hours until .*", 0),
    (server_is_down_at_night, r"Held: quiet hours until .*", 0),
    (no_device_in_quiet_hours, r"Held: quiet hours until .*", 1),
    (hour_is_full, r"Held: max_per_hour reached, 3 of 3; next place at (\w+ )?\d\d:\d\d\.", 0),
    (minute_and_hour_are_full, r"Held: max_per_hour reached, 3 of 3; next place at .*", 0),
    (day_is_full, r"Held: max_per_day reached, 2 of 2; next place at .*", 0),
    (gap_and_limit, r"Held: max_per_hour reached, 1 of 1; next place at .*", 0),
    (zero, r"Held: max_per_day is 0\.", 1),
    (zero_and_in_flight, r"Held: max_per_day is 0\.", 1),
    (gap, r"Held: minimum gap of 300 s; next message at \d\d:\d\d:\d\d\.", 0),
    (gap_in_flight, r"Held: waiting for device 'mac-mini', last seen 2 h ago; 1 message in flight\.", 1),
    (device_is_off, r"Held: waiting for device 'mac-mini', last seen 3 h 1 min ago; 2 messages in flight\.", 1),
    (device_is_slow, r"Held: waiting for device 'mac-mini', last seen 3 s ago; 2 messages in flight\.", 0),
    (device_never_seen, r"Held: waiting for device 'mac-mini', never seen; 1 message in flight\.", 1),
    (last_in_flight, r"Held: waiting for device 'mac-mini', last seen 3 s ago; 1 message in flight\.", 0),
    (results_to_read, r"Held: waiting for the next tick to read the results; 1 message in flight\.", 0),
    (no_device, r"Failing: there is no device: `python db.py add-device NAME` makes one\.", 1),
    (server_is_down, r"Held: the send queue server has been unavailable for 4 min\.", 1),
    (sync_fails, r"Failing: the dispatcher runs, and its sync job has failed for 2 h\.", 1),
    (sync_never_worked, r"Failing: the dispatcher runs, and its sync job has failed since its first run\.", 1),
    (dispatch_fails_while_paused, r"Failing: the dispatcher runs, and its dispatch job has failed for 20 min\.", 1),
    (one_batch_below_the_limit, r"Sending: next item of batch .*", 0),
    (unreadable_number, r"Sending: next item of batch .*", 1),
    (stopped, r"Dispatcher not running: last tick 11 min ago\.", 1),
    (never_ran, r"Dispatcher not running: it has not run yet\.", 1),
    (stopped_and_paused, r"Dispatcher not running: last tick 2 h ago\.", 1),
    (mac_says, rf"Held: mac-mini says: {DISK}\.", 1),
    (mac_says_and_paused, rf"Held: mac-mini says: {DISK}\.", 1),
    (mac_says_and_stopped, rf"Held: mac-mini says: {DISK}\.", 1),
    (both_macs_say, rf"Held: mac-mini says: {DISK}; mac-2 says: Messages is signed out\.", 1),
    (one_of_two_macs_says, r"Sending: next item of batch .*", 1),
    (one_of_two_macs_holds_the_limit, rf"Held: mac-mini says: {DISK}; 2 messages in flight\.", 1),
    (a_mac_that_is_gone_says, r"Sending: next item of batch .*", 0),
    (batch_stopped_itself, r"Held: batch [0-9a-f]{8}… paused itself: the last 5 messages failed\.", 1),
    (batch_stopped_itself_beside_another, r"Sending: next item of batch .*", 1),
    (begins_later, r"Held: batch [0-9a-f]{8}… begins at (\w+ )?\d\d:\d\d\.", 0),
    (two_begin_later, r"Held: batch [0-9a-f]{8}… begins at (\w+ )?\d\d:\d\d\.", 0),
    (begins_later_beside_another, r"Sending: next item of batch .*", 0),
    (
        begins_later_and_device_is_off,
        r"Held: waiting for device 'mac-mini', last seen 2 h ago; 1 message in flight\.",
        1,
    ),
    (begins_later_and_hour_is_full, r"Held: max_per_hour reached, 3 of 3; next place at .*", 0),
    (by_hand_has_no_times, r"Sending: next item of batch .*", 0),
    (first_ones_are_in_flight, r"Held: waiting for device 'mac-mini', last seen 3 s ago; 1 message in flight\.", 0),
    (first_ones_were_sent, r"Held: batch [0-9a-f]{8}… paused itself: the first 2 messages were sent\.", 1),
    (time_is_over, r"Held: the time of batch [0-9a-f]{8}… is over: the next tick ends it\.", 0),
    (approval_is_over, r"Held: the time of batch [0-9a-f]{8}… is over: the next tick ends it\.", 0),
    (approval_lapsed, r"Held: batch [0-9a-f]{8}… paused itself: approval lapsed\.", 1),
    (audience_is_broken, r"Held: batch [0-9a-f]{8}… paused itself: its audience cannot be checked any more: .*\.", 1),
    (too_late_for_most, r"Sending: next item of batch .*", 0),
    (outcome_unknown, r"Nothing to send\.", 1),
    (outcome_unknown_long_ago, r"Nothing to send\.", 0),
]
