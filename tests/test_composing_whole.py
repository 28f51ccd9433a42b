"""Check composing as a whole: against a naive reading of the rules, over platforms' tables, and killed at each step."""

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testing import ROOT, TestData

import batches
import composing
import db
import dispatcher
import handles

INTERVAL = timedelta(seconds=30)


# --- against a naive reading --------------------------------------------------------------------------


class Someone(NamedTuple):
    """An invented person. `handle`: the primary one."""

    name: str
    city: str | None
    handle: str | None


CITIES = ("Berlin", "Köln", "berlin")
HANDLES = (
    "+14155550100", "+1 (415) 555-0100", "+14155550101", "ana@example.com", "ANA@example.com", "0170 123",
    "+525512345678", "+5215512345678", None,
)  # fmt: skip
OPTED_OUT = {"+14155550101"}
QUERIES: list[tuple[dict[str, Any], Any]] = [
    ({"everyone": True}, lambda one: True),
    ({"field": "city", "eq": "Berlin"}, lambda one: one.city == "Berlin"),
    ({"field": "city", "ne": "Berlin"}, lambda one: one.city != "Berlin"),
    ({"not": {"field": "city", "in": ["Köln"]}}, lambda one: one.city != "Köln"),
    ({"field": "city", "contains": "BER"}, lambda one: "ber" in (one.city or "").lower()),
    ({"field": "city", "empty": True}, lambda one: not one.city),
    ({"all": [{"field": "name", "empty": False}, {"field": "city", "gt": "C"}]}, lambda one: (
        bool(one.name.strip()) and (one.city or "") > "C")),
]  # fmt: skip
TEMPLATES: list[tuple[str, Any]] = [
    ("Hello {{ client.name }}!", lambda one: f"Hello {one.name.strip()}!" if one.name.strip() else None),
    ("Hi {{ client.name | default: 'you' }}", lambda one: f"Hi {one.name.strip() or 'you'}"),
    (
        "{% if client.city == 'Berlin' %}Near{% else %}Far{% endif %}",
        lambda one: "Near" if one.city == "Berlin" else "Far",
    ),
    ("{{ client.city | upcase }}", lambda one: one.city.upper() if one.city else None),
]
people = st.lists(
    st.builds(Someone, st.sampled_from(["Ana", "Bo", "", "  ", "{{x}}"]), st.sampled_from([*CITIES, None]),
              st.sampled_from(HANDLES)), min_size=1, max_size=8,
)  # fmt: skip


def naive(crowd: dict[str, Someone], matches: Any, render: Any) -> dict[str, tuple[str, str]]:
    """Return the handle key and the text of each person who gets one, by client id, in the order of the ids."""
    found: dict[str, tuple[str, str]] = {}
    for client_id in sorted(crowd):
        one = crowd[client_id]
        if not matches(one) or one.handle is None or handles.to_send(one.handle) is None:
            continue
        key, body = handles.key(one.handle), render(one)
        if key in OPTED_OUT or key in {known for known, _ in found.values()} or body is None or "{{" in body:
            continue
        found[client_id] = (key, body)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crowd=people, query=st.sampled_from(QUERIES), template=st.sampled_from(TEMPLATES))
def test_draft_is_what_a_naive_reading_of_the_rules_says(
    world: TestData, crowd: list[Someone], query: tuple[dict[str, Any], Any], template: tuple[str, Any]
) -> None:
    world.quinn("TRUNCATE clients, contact_relationships, outreach_batches CASCADE")
    world.icloud("TRUNCATE icloud.opt_outs")
    for key in OPTED_OUT:
        world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES (%(key)s, 'owner')", key=key)
    world.client(None)  # somebody has each variable, so that no text is refused
    world.quinn("""UPDATE clients SET name = '', attributes = '{"city": "Nowhere"}'""")
    known = {}
    for one in crowd:
        client_id = world.client(one.handle)
        attributes = json.dumps({"city": one.city} if one.city else {})
        sql = "UPDATE clients SET name = %(name)s, attributes = %(attributes)s WHERE id = %(id)s"
        world.quinn(sql, name=one.name, attributes=attributes, id=client_id)
        known[client_id] = one
    expected = naive(known, query[1], template[1])
    request = composing.Request(id=uuid.uuid4(), query={"v": 1, "where": query[0]}, template=template[0])
    quinn, icloud = world.databases.quinn, world.databases.icloud
    if not expected:
        with pytest.raises(batches.Refused, match="nobody would get this text"):
            composing.draft(quinn, icloud, request, INTERVAL)
        return
    made = composing.draft(quinn, icloud, request, INTERVAL)
    sql = "SELECT client_id, handle_key, rendered_body FROM outreach_batch_items ORDER BY created_at, id"
    items = {client_id: (key, body) for client_id, key, body in world.quinn(sql)}
    assert items == expected
    assert list(items) == list(expected)
    assert made.items == len(expected)
    assert {preview.body for preview in made.previews} <= {body for _, body in expected.values()}


# --- a platform's own tables --------------------------------------------------------------------------


PLATFORMS = {
    "identity key": "id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name TEXT, city TEXT, balance NUMERIC(10, 2)",
    "text key": "id TEXT PRIMARY KEY DEFAULT 'c' || gen_random_uuid(), full_name TEXT, name TEXT, city TEXT, "
    "balance NUMERIC(10, 2), attributes JSONB",
    "odd key": 'id INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "Name" TEXT, name TEXT, city VARCHAR(20), '
    "balance NUMERIC(10, 2), created DATE DEFAULT '2026-01-31'",
}


@pytest.fixture(params=PLATFORMS)
def platform(empty_database: str, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """Two connections to a migrated database of a platform with clients of its own."""
    with (
        contextlib.closing(db.connect(empty_database)) as quinn,
        contextlib.closing(db.connect(empty_database)) as icloud,
    ):
        db.query(quinn, f"CREATE TABLE clients ({PLATFORMS[request.param]})")
        for part in ("icloud", "quinn"):
            db.migrate(empty_database, part)
        db.query(quinn, "INSERT INTO clients (name, city, balance) VALUES ('Ana', 'Berlin', 9.9), ('Bo', 'Köln', 20)")
        db.query(
            quinn,
            "INSERT INTO contact_relationships SELECT id, '+1415555010' || row_number() OVER (), true FROM clients",
        )
        db.query(quinn, "UPDATE outreach_settings SET quiet_hours_start = NULL, quiet_hours_end = NULL")
        yield quinn, icloud


def test_platform_with_its_own_clients(platform: tuple[Any, Any], mac_sync: dispatcher.SendQueueClient) -> None:
    quinn, icloud = platform
    before = db.query(quinn, "SELECT * FROM clients ORDER BY id")
    request = composing.Request(
        id=uuid.uuid4(),
        query={"v": 1, "where": {"field": "city", "eq": "Berlin"}},
        template="{{ client.name }} owes {{ client.balance | times: 2 }}",
        not_sent_within_days=7,
    )
    made = composing.draft(quinn, icloud, request, INTERVAL)
    assert [preview.body for preview in made.previews] == ["Ana owes 19.80"]
    composing.send(quinn, made.id, made.digest, 1)

    class Recorder(dispatcher.SendQueueClient):
        sent: list[str] = []  # noqa: RUF012

        def enqueue(self, item: dispatcher.Item, *_: Any) -> str:
            self.sent.append(item.body)
            return str(uuid.uuid4())

    db.query(icloud, "INSERT INTO icloud.devices (name, token) VALUES ('mini', 'mini')")
    assert dispatcher.dispatch(quinn, icloud, Recorder("http://mac-sync.test", ""))["queued"] == 1
    assert Recorder.sent == ["Ana owes 19.80"]
    Recorder.sent.clear()
    assert composing.search(quinn, icloud, request).left_out[0].reason == "sentRecently"
    assert db.query(quinn, "SELECT * FROM clients ORDER BY id") == before, "nothing writes to the platform's table"


# --- killed at each step ------------------------------------------------------------------------------


DOOMED = """
import os, signal, sys, uuid
from datetime import timedelta
import psycopg2.extras
import composing, db
count = 0
def step():
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
def dying(function):
    def call(*arguments, **named):
        step()
        result = function(*arguments, **named)
        step()
        return result
    return call
db.query = dying(db.query)
psycopg2.extras.execute_values = dying(psycopg2.extras.execute_values)
quinn, icloud = db.connect(db.url("quinn")), db.connect(db.url("icloud"))
request = composing.Request(id=uuid.UUID(sys.argv[2]), query={"v": 1, "where": {"everyone": True}},
                            template="Hello {{ client.name }}", not_sent_within_days=7)
made = composing.draft(quinn, icloud, request, timedelta(seconds=30))
composing.send(quinn, made.id, made.digest, made.items)
"""


@pytest.mark.faults
def test_draft_and_send_killed_at_each_step_are_all_or_nothing(world: TestData) -> None:
    """Kill it before and after each statement, and run it again."""
    for number in range(3):
        world.client(f"+1415555010{number}")
    sql = """
        SELECT status, digest IS NOT NULL, approved_at IS NOT NULL,
               (SELECT count(*) FROM outreach_batch_items WHERE batch_id = batch.id)
          FROM outreach_batches AS batch
    """
    draft, sending = ("draft", True, False, 3), ("sending", True, True, 3)
    seen = set()
    for step in range(1, 200, 3):  # each statement is two steps: so it is met before or after
        world.quinn("TRUNCATE outreach_batches CASCADE")
        command = [sys.executable, "-c", DOOMED, str(step), str(uuid.uuid4())]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        found = world.quinn(sql)
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
        assert found in ([], [draft], [sending])
        seen.add(found[0][0] if found else "nothing")
        command[3] = "0"
        subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, check=True)
        assert world.quinn(sql) == [sending]
    assert step > 12
    assert seen >= {"nothing", "draft"}
