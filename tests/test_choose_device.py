"""Check which device the dispatch job chooses for an item."""

import pytest
from helpers import ago, tick
from testing import TestData

import dispatcher


def test_device_is_last_used_then_configured_then_oldest(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    oldest, chosen, last, earlier = (world.device(name) for name in ("oldest", "chosen", "last", "earlier"))
    known, unknown = world.client(), world.client()
    old = world.batch(status="sent")
    world.item(old, known, status="sent", sent_at=ago(90_000), device_id=last)
    world.item(old, known, status="sent", sent_at=ago(99_000), device_id=earlier)
    world.item(old, known, status="failed", updated_at=ago(5), device_id=earlier)
    world.settings(device_id=chosen)

    def devices() -> list[str]:
        world.quinn("DELETE FROM outreach_batches WHERE status <> 'sent'")
        world.batch(clients=[known])
        world.batch(clients=[unknown])
        tick(world, mac_sync)
        sql = "SELECT device_id FROM outreach_batch_items WHERE status = 'queued' ORDER BY created_at"
        return [device_id for (device_id,) in world.quinn(sql)]

    assert devices() == [last, chosen]
    world.icloud("DELETE FROM icloud.devices WHERE name = 'last'")
    assert devices() == [chosen, chosen]
    world.icloud("DELETE FROM icloud.devices WHERE name = 'chosen'")
    assert devices() == [oldest, oldest]


def test_item_fails_without_device(world: TestData, mac_sync: dispatcher.SendQueueClient) -> None:
    batch_id = world.batch(clients=2)
    tick(world, mac_sync)
    assert world.statuses(batch_id) == ["failed", "pending"]
    assert world.quinn("SELECT count(claimed_at) FROM outreach_batch_items") == [(0,)]
    assert (
        "there is no device" in world.quinn("SELECT failure_reason FROM outreach_batch_items ORDER BY created_at")[0][0]
    )


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ({"old": 2, "last": 1, "set": 1}, "last"),
        ({"old": 2, "last": 30, "set": 1}, "set"),
        ({"old": 2, "last": 30, "set": 30}, "old"),
        ({"old": 30, "last": None, "set": 30, "new": 1}, "new"),
        ({"old": 30, "last": 30, "set": 30}, "last"),
    ],
)
def test_device_unseen_for_a_day_is_avoided(
    world: TestData, mac_sync: dispatcher.SendQueueClient, seen: dict[str, int | None], chosen: str
) -> None:
    devices = {name: world.device(name) for name in seen}
    for name, hours in seen.items():
        at = ago(hours * 3600) if hours else None
        world.icloud("UPDATE icloud.devices SET last_seen_at = %(at)s WHERE name = %(name)s", at=at, name=name)
    world.settings(device_id=devices["set"])
    client_id = world.client()
    world.item(world.batch(status="sent"), client_id, status="sent", sent_at=ago(99_999), device_id=devices["last"])
    world.batch(clients=[client_id])
    assert tick(world, mac_sync)["queued"] == 1
    assert world.icloud("SELECT device_id FROM icloud.send_queue") == [(devices[chosen],)]
