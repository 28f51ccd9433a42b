"""Run the commands of docs/composing.md: from a CSV file of 200 people to a finished batch, by the real sender."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mac_machine import SENDER, TOKEN, Machine
from test_docs import code_blocks, run
from testing import ROOT, Script, TestData, wait_until

import dispatcher

pytestmark = pytest.mark.mac

PAGE = ROOT / "docs" / "composing.md"
OPTED_OUT = "+447700900012"  # somebody in York


@pytest.fixture
def machine(server: tuple[Script, str], world: TestData, tmp_path: Path) -> Iterator[Machine]:
    """A Mac whose sender polls the real server."""
    world.device("mac-mini", token=TOKEN)
    with Machine(tmp_path / "mac", url=server[1]) as machine:
        machine.start(script=SENDER)
        yield machine
    (ROOT / "spring.txt").unlink(missing_ok=True)  # which the page's commands write


@pytest.fixture
def client(server: tuple[Script, str]) -> Iterator[dispatcher.SendQueueClient]:
    client = dispatcher.SendQueueClient(server[1], "service-token-0123456789")
    yield client
    client.session.close()


def until_still(world: TestData, client: dispatcher.SendQueueClient) -> None:
    """Run ticks until the batch is paused or sent, and nothing is in flight."""
    quinn, icloud = world.databases.quinn, world.databases.icloud

    def is_still() -> bool:
        dispatcher.sync(quinn, icloud)
        dispatcher.dispatch(quinn, icloud, client)
        return world.quinn("SELECT 1 FROM outreach_batches WHERE status = 'sending'") == [] and (
            "queued" not in world.statuses()
        )

    wait_until(is_still, seconds=120, pause=0.2)


def test_way_from_a_file_of_people_to_a_finished_batch_works(
    world: TestData, machine: Machine, client: dispatcher.SendQueueClient
) -> None:
    world.settings(max_per_minute=None, max_per_hour=None, max_per_day=None, min_gap_seconds=None)
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES (%(handle)s, 'owner')", handle=OPTED_OUT)
    imported, search, draft, show, test, send, go_on = code_blocks(PAGE, "sh", "The whole way")
    region = {"DEFAULT_REGION": "GB"}

    done = run([imported], **region)
    assert "Imported: 191 new clients" in done.stdout
    assert "opted out" in done.stdout

    done = run([search], **region)
    assert re.search(r"\b1 +opted out", done.stdout)

    done = run([draft], **region)
    [(batch_id, recipients)] = world.quinn(
        "SELECT batch.id::text, (SELECT count(*)::text FROM outreach_batch_items) FROM outreach_batches AS batch"
    )
    assert batch_id in done.stdout
    assert f"{recipients} " in done.stdout
    batch = {**region, "BATCH_ID": batch_id, "RECIPIENTS": recipients}
    assert "this is Ana from Blue Salon" in run([show], **batch).stdout

    run([test], **batch)
    wait_until(lambda: [address for address, _ in machine.messages.left()] == ["+447700900999"], seconds=30)

    run([send], **batch)
    until_still(world, client)
    assert len(machine.messages.left()) == 1 + 5

    run([go_on], **batch)
    until_still(world, client)
    assert set(world.statuses(batch_id)) == {"sent"}
    left = machine.messages.left()[1:]
    assert len(left) == len(dict(left)) == int(recipients)
    assert OPTED_OUT not in dict(left)
    expected = world.quinn("SELECT rendered_body FROM outreach_batch_items ORDER BY 1")
    assert sorted(text for _, text in left) == sorted(body for (body,) in expected)
    assert all(re.match(r"Hi \S", text) for _, text in left)
