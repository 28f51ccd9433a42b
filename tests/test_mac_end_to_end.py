"""The whole way of a message: the real dispatcher, server, database and sender, over a stand-in for Messages."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import mac_sender
import pytest
from mac_machine import SENDER, TOKEN, Machine
from testing import Script, TestData, wait_until

import dispatcher
import handles
import report


@pytest.fixture
def machine(
    server: tuple[Script, str], world: TestData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """A Mac whose sender polls the real server; the server of the other tests is not asked."""
    world.device("mac-mini", token=TOKEN)
    with Machine(tmp_path / "mac", url=server[1]) as machine:
        yield machine
        assert not machine.server.requests


def tick(world: TestData, client: dispatcher.SendQueueClient) -> None:
    quinn, icloud = world.databases.quinn, world.databases.icloud
    dispatcher.sync(quinn, icloud)
    dispatcher.dispatch(quinn, icloud, client)


def until_ended(world: TestData, client: dispatcher.SendQueueClient) -> None:
    """Run ticks until no item is pending or in flight."""

    def is_over() -> bool:
        tick(world, client)
        return not {"pending", "queued"} & set(world.statuses())

    wait_until(is_over, seconds=60, pause=0.3)


@pytest.fixture
def client(server: tuple[Script, str]) -> Iterator[dispatcher.SendQueueClient]:
    client = dispatcher.SendQueueClient(server[1], "service-token-0123456789")
    yield client
    client.session.close()


def test_batch_is_sent_through_messages(world: TestData, machine: Machine, client: dispatcher.SendQueueClient) -> None:
    clients = [world.client(f"+1415555012{number}") for number in range(5)]
    batch_id = world.batch(clients=clients)
    machine.start(script=SENDER)
    until_ended(world, client)
    assert world.statuses(batch_id) == ["sent"] * 5
    assert sorted(address for address, _ in machine.messages.left()) == [f"+1415555012{number}" for number in range(5)]
    rows = world.icloud("SELECT DISTINCT status, collect_id IS NOT NULL FROM icloud.send_queue")
    assert rows == [("sent", True)]


def test_stop_reply_ends_what_waits_for_the_person(
    world: TestData, machine: Machine, client: dispatcher.SendQueueClient
) -> None:
    first, second = world.client("+14155550123"), world.client("+14155550124")
    batch_id = world.batch(clients=[first])
    machine.start(script=SENDER)
    until_ended(world, client)
    machine.messages.receive("+14155550123", "Stop.")
    wait_until(lambda: world.icloud("SELECT handle_key FROM icloud.opt_outs") == [("+14155550123",)], seconds=30)
    world.item(batch_id, first)
    world.item(batch_id, second)
    world.quinn("UPDATE outreach_batches SET status = 'sending'")
    until_ended(world, client)
    assert world.statuses(batch_id) == ["sent", "skipped", "sent"]
    assert [address for address, _ in machine.messages.left()] == ["+14155550123", "+14155550124"]


def test_status_says_what_the_mac_says(world: TestData, machine: Machine, client: dispatcher.SendQueueClient) -> None:
    (machine.path / "mac" / "permission.txt").write_text("-1743\n")  # Automation is not granted
    machine.start(script=SENDER)
    wait_until(lambda: world.icloud("SELECT 1 FROM icloud.devices WHERE problem IS NOT NULL"), seconds=30)
    world.batch(clients=1)
    dispatcher.run_job("sync", dispatcher.sync)
    dispatcher.run_job("dispatch", lambda quinn, icloud: dispatcher.dispatch(quinn, icloud, client))
    sentence = report.report(timedelta(seconds=30)).verdict.sentence
    assert sentence.startswith("Held: mac-mini says: ")


def test_server_and_sender_know_the_same_words() -> None:
    assert mac_sender.STOP_WORDS == handles.STOP_WORDS
    assert mac_sender.START_WORDS == handles.START_WORDS
