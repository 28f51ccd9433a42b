"""The sender ends, the server goes, or the Mac falls asleep, at every step; the Mac's own book says what really left.

Each commit of the journal, each run of osascript and each request is a place for a fault, before it and after it. A
first run counts them. Then the same work is done once for each of them, and a new sender goes on over what is on the
disk.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_messages as messages
import pytest
from mac_world import HANDLE, Killed, World, truth

pytestmark = pytest.mark.mac

Fault = Callable[[World, str], None]
HOUR = 3600


def kill(world: World, what: str) -> None:
    raise Killed


def lose(world: World, what: str) -> None:
    """The connection breaks: before the server has the request, or before its response is here."""
    if what.startswith(("GET", "POST")):
        raise ConnectionResetError


def fall_asleep(world: World, what: str) -> None:
    world.clock.sleep_mac(8 * HOUR)


def nap(world: World, what: str) -> None:
    world.clock.sleep_mac(15)


FAULTS: dict[str, Fault] = {"kill": kill, "lose": lose, "sleep": fall_asleep, "nap": nap}
WORK: dict[str, list[messages.Act]] = {
    "sent": [messages.sent(), messages.sent()],
    "no trace": [messages.vanishes()],
    "failed": [messages.fails(22), messages.sent()],
    "sent over SMS later": [messages.fails_then_sms()],
    "no such address": [messages.error("resolve", -1728)],
    "outbox": [messages.outbox(leaves=300), messages.sent()],
    "time-out": [messages.slow(60, messages.sent())],
    "Messages is not running": [messages.error("account", -600)],
}


class Points:
    """Counts the places, and lets the fault happen at one of them."""

    def __init__(self, world: World, strike: int | None = None, fault: Fault = kill) -> None:
        self.world = world
        self.seen: list[str] = []
        self.strike = strike
        self.fault = fault
        world.hook = self

    def __call__(self, moment: str, what: str) -> None:
        self.seen.append(f"{moment} {what}")
        if len(self.seen) == self.strike:
            self.fault(self.world, what)


def work(world: World, acts: list[messages.Act], points: Points) -> None:
    """Send these messages, whatever happens, and give unknown outcomes the time to become known."""
    for number, act in enumerate(acts):
        text = f"Message {number}"
        world.messages.expect(act, text=text, times=None)
        world.server.enqueue(HANDLE, text)
    persist(world, world.settle)
    points.strike = None
    if any(world.outcome(row) == "unknown" for row in world.server.rows.values()):
        world.run(1.3 * HOUR)


def persist(world: World, action: Callable[[], Any]) -> None:
    """Start the sender again whenever it dies."""
    while True:
        try:
            action()
            return
        except Killed:
            world.start()


def complaints(world: World, may_be_unknown: bool = False) -> list[str]:
    """Return what is wrong. An outcome may stay unknown although the message left, if the Mac slept for hours between
    osascript's end and the row: its date is not one that a row of ours may have.
    """
    found = truth(world)
    for what, status in world.server.responses:
        if status not in (200, 409) or (status == 409 and what.endswith("/result")):
            found.append(f"{what} got {status}")
    for at, text in world.messages.book.execute("SELECT at, text FROM asked"):
        collected = [
            row["collected_at"] for row in world.server.rows.values() if row["body"] == text and row["collected_at"]
        ]
        if not any(0 <= at - moment <= 60 + 30 for moment in collected):
            found.append(f"{text!r} was started long after its collect")
    left = [] if may_be_unknown else [text for _, text in world.messages.left()]
    for row in world.server.rows.values():
        if world.outcome(row) == "queued" or (world.outcome(row) == "unknown" and row["body"] in left):
            found.append(f"{row['body']!r} is {world.outcome(row)}")
    return found


def experiments(path: Path, name: str, fault: Fault, every: int = 1) -> Iterator[tuple[str, list[str]]]:
    """Run the work once for each place, and yield the place with what was wrong."""
    with World(path / "first", poll_seconds=60) as world:
        points = Points(world)
        work(world, WORK[name], points)
        assert complaints(world) == []
        seen = list(points.seen)
        first_quiet = next((number for number, what in enumerate(seen) if what == "after POST result"), len(seen))
    for number in range(1, min(len(seen), first_quiet + 40) + 1, every):
        with World(path / str(number), poll_seconds=60) as world:
            points = Points(world, number, fault)
            work(world, WORK[name], points)
            yield f"{number} {seen[number - 1]}", complaints(world, may_be_unknown=fault is fall_asleep)


@pytest.mark.parametrize(("name", "fault"), [("sent", "kill"), ("sent", "lose"), ("no such address", "nap")])
def test_a_fault_at_some_steps_doubles_and_loses_nothing(name: str, fault: str, tmp_path: Path) -> None:
    wrong = [(where, found) for where, found in experiments(tmp_path, name, FAULTS[fault], every=4) if found]
    assert wrong == []


@pytest.mark.mac_faults
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WORK)
def test_a_fault_at_any_step_doubles_and_loses_nothing(name: str, fault: str, tmp_path: Path) -> None:
    """SIGKILL at each step of the common work; every third step of the rest."""
    every = 1 if fault == "kill" and name in ("sent", "failed", "no trace") else 3
    wrong = [(where, found) for where, found in experiments(tmp_path, name, FAULTS[fault], every) if found]
    assert wrong == []


def storm(path: Path, seed: int, count: int) -> dict[str, int]:
    """Send so many messages with faults all over. Returns how many ended how."""
    rng = random.Random(seed)  # noqa: S311  # dice, not secrets
    acts = [act for acts in WORK.values() for act in acts]
    with World(path, pause_seconds=0, ceiling_per_hour=10**6, ceiling_per_day=10**6) as world:

        def hook(moment: str, what: str) -> None:
            if rng.random() < 0.01:
                rng.choice([kill, kill, lose, lose, nap])(world, what)

        world.hook = hook
        for number in range(count):
            text = f"Message {number} of {seed}"
            world.messages.expect(rng.choice(acts) if rng.random() < 0.15 else messages.sent(), text=text, times=None)
            world.server.enqueue(HANDLE, text)

        def go_on() -> None:
            for _ in range(count):
                world.settle(6 * HOUR)
                if world.server.is_quiet():
                    return
                world.journal.release(None, world.clock.now())  # three unknown ones in a row stop it: the owner looks

        persist(world, go_on)
        world.hook = lambda moment, what: None
        world.run(1.3 * HOUR)
        assert complaints(world) == []
        ends = [world.outcome(row) for row in world.server.rows.values()]
        return {end: ends.count(end) for end in set(ends)}


def test_a_storm_of_faults_doubles_and_loses_nothing(tmp_path: Path) -> None:
    assert storm(tmp_path, 1, 40)["sent"] > 20


@pytest.mark.mac_faults
def test_two_thousand_messages_with_faults_all_over(tmp_path: Path) -> None:
    total: dict[str, int] = {}
    for seed in itertools.count(1):
        for end, count in storm(tmp_path / str(seed), seed, 100).items():
            total[end] = total.get(end, 0) + count
        if sum(total.values()) >= 2000:
            break
    assert total["sent"] > 1500
    print(total)  # noqa: T201  # the figures of docs/reliability.md
