"""Compose over the platform's own clients tables: other keys, other columns, and none of ours.

Each table is there before `migrate`, as a platform has it. The whole way: audience, text, pages, draft, approval, the
last checks, the queue.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from helpers import ago
from testing import TestData

import batches
import composing
import db
import dispatcher

INTERVAL = timedelta(seconds=30)
PHONES = ["+14155550101", "+1 415 555 0102", "+14155550103", "0170 12345", "+14155550105"]


@dataclass
class Platform:
    """A platform's table: its columns, the rows of five people, an audience that leaves out the last one, a text."""

    columns: str
    rows: list[tuple[Any, ...]]
    where: dict[str, Any]
    template: str
    texts: list[str]
    names: list[str | None]
    leave: str  # an assignment after which the first one no longer matches


PLATFORMS = {
    "bigint key": Platform(
        "id bigint PRIMARY KEY, full_name varchar(40), visits smallint, price numeric(8,2), born date, tags text[]",
        [
            (9, "Maya Öztürk", 3, Decimal("19.90"), "1990-12-24", ["vip"]),
            (10, "Bo", 4, Decimal("5.00"), "2001-02-03", ["vip", "new"]),
            (2**53 + 1, "Cy", 5, Decimal("0.50"), None, ["vip"]),
            (2**53 + 2, "Di", 6, Decimal("1.00"), None, ["vip"]),
            (2**53 + 3, "Ed", 6, Decimal("1.00"), None, None),
        ],
        {"all": [{"field": "tags", "contains": "vip"}, {"field": "visits", "gte": 3}]},
        "Hi {{ client.full_name }}, {{ client.price | times: 2 }}{% if client.born %}, {{ client.born }}{% endif %}",
        ["Hi Maya Öztürk, 39.80, 24 December 1990", "Hi Bo, 10.00, 3 February 2001", "Hi Cy, 1.00"],
        ["Maya Öztürk", "Bo", "Cy", "Di"],
        "visits = 2",
    ),
    "text key": Platform(
        'id text PRIMARY KEY, first_name text, "E-Mail opt in" boolean, attributes json, time_zone integer',
        [
            ("c'1", "Ana", True, '{"a": 1}', 1),
            ('c"2', "Bea", True, None, 2),
            ("c,{3}\\", "Cleo", True, None, None),
            ("c%s 4", "Dea", True, None, None),
            ("ü 5", "Eva", False, None, None),
        ],
        {"field": "E-Mail opt in", "eq": True},
        'Hello {{ client.first_name }}{% if client["E-Mail opt in"] %}!{% endif %}',
        ["Hello Ana!", "Hello Bea!", "Hello Cleo!"],
        ["Ana", "Bea", "Cleo", "Dea"],
        '"E-Mail opt in" = NULL',
    ),
    "no name": Platform(
        "id uuid PRIMARY KEY, city text, since timestamptz",
        [(str(uuid.UUID(int=number)), city, "2025-05-01T12:00:00Z") for number, city in enumerate("BBBBP")],
        {"not": {"field": "city", "eq": "P"}},
        "You are with us since {{ client.since | date: '%Y' }}",
        ["You are with us since 2025"] * 3,
        [None] * 4,
        "city = 'P'",
    ),
}  # fmt: skip


@pytest.fixture(params=list(PLATFORMS))
def platform(request: pytest.FixtureRequest, world: TestData) -> Platform:
    """Replace the tables by a platform's, and migrate."""
    found = PLATFORMS[request.param]
    world.quinn("DROP SCHEMA public CASCADE")
    world.quinn(f"CREATE SCHEMA public; CREATE TABLE clients ({found.columns})")
    db.migrate(world.databases.quinn_url, "quinn")
    for row, phone in zip(found.rows, PHONES, strict=True):
        places = ", ".join(["%s"] * len(row))
        with world.databases.quinn.cursor() as cursor:
            cursor.execute(f"INSERT INTO clients VALUES ({places})", row)
            cursor.execute("INSERT INTO contact_relationships VALUES (%s, %s, true)", (row[0], phone))
    TestData(world.databases)  # sets no limits
    return found


def request(platform: Platform, **more: Any) -> composing.Request:
    query = {"v": 1, "where": platform.where}
    wanted = {"query": query, "id": uuid.UUID(int=7), "template": platform.template, "not_sent_within_days": 7, **more}
    return composing.Request(**wanted)


def ids(platform: Platform, numbers: Iterable[int]) -> list[str]:
    return [str(platform.rows[number][0]) for number in numbers]


def by_order_of_the_key(world: TestData, found: list[str]) -> list[str]:
    known = [
        client_id for (client_id,) in world.quinn("SELECT client.id::text FROM clients AS client ORDER BY client.id")
    ]
    return sorted(found, key=known.index)


def allow_reading_only(world: TestData) -> None:
    """Let every statement fail that writes to the platform's tables."""
    world.quinn("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'this table is not ours'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON clients EXECUTE FUNCTION refuse();
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON contact_relationships EXECUTE FUNCTION refuse();
    """)


def test_batch_is_composed_approved_and_sent(
    world: TestData, platform: Platform, mac_sync: dispatcher.SendQueueClient, device_id: str
) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    allow_reading_only(world)
    seen = composing.dry_run(quinn, icloud, request(platform), INTERVAL)
    made = composing.draft(quinn, icloud, request(platform), INTERVAL)
    assert made.digest == seen.digest
    assert sorted(each.body for each in made.previews) == sorted(platform.texts)
    page = composing.list_items(quinn, made.id, limit=2)
    items = page.entries + composing.list_items(quinn, made.id, after=page.after, limit=2).entries
    assert [each.client_id for each in items] == by_order_of_the_key(world, ids(platform, range(3)))
    assert sorted(each.body for each in items) == sorted(platform.texts)
    composing.send(quinn, made.id, made.digest, made.items)
    world.quinn("DROP FUNCTION refuse() CASCADE")
    world.quinn(f"UPDATE clients SET {platform.leave} WHERE id::text = %(id)s", id=ids(platform, [0])[0])
    for _ in range(3):
        dispatcher.dispatch(quinn, icloud, mac_sync)
    sql = "SELECT client_id::text, failure_reason FROM outreach_batch_items WHERE status <> 'queued'"
    assert world.quinn(sql) == [(*ids(platform, [0]), "no longer matches the audience")]
    rows = world.icloud("SELECT to_handle, body FROM icloud.send_queue ORDER BY to_handle")
    assert rows == list(zip(["+14155550102", "+14155550103"], platform.texts[1:], strict=True))


def test_people_are_left_out_and_listed(world: TestData, platform: Platform) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    world.item(world.batch(status="sent"), ids(platform, [1])[0], status="sent", sent_at=ago(days=1))
    found = composing.search(quinn, icloud, request(platform))
    assert (found.matched, found.items) == (4, 2)
    shown = [(left.reason, [(each.client_id, each.name) for each in left.sample]) for left in found.left_out]
    assert shown == [
        ("badHandle", [(*ids(platform, [3]), platform.names[3])]),
        ("sentRecently", [(*ids(platform, [1]), platform.names[1])]),
    ]
    for wrong in ({"template": "{{ client.no_column }}"}, {"query": {"v": 1, "where": {"field": "zip", "eq": "1"}}}):
        with pytest.raises(batches.Refused, match=r"no_column|zip") as refused:
            composing.draft(quinn, icloud, request(platform, **wrong), INTERVAL)
        assert refused.value.status == 400
    world.quinn("UPDATE contact_relationships SET handle = 'see notes'")
    listed: list[str] = []
    after = None
    while not listed or after:
        page = composing.people_left_out(quinn, icloud, request(platform), "badHandle", after, limit=1)
        listed += [each.client_id for each in page.entries]
        after = page.after
    assert listed == by_order_of_the_key(world, ids(platform, range(4)))
