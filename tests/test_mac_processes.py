"""The sender as a real process over real ones, killed with SIGKILL at each step, or at random while all else fails."""

from __future__ import annotations

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import fake_messages as messages
import pytest
from mac_machine import SENDER, Machine, until, usage

pytestmark = pytest.mark.mac

ACTS = [messages.sent(0.05, 0.1), messages.fails(22, 0.05, 0.2), messages.error("resolve", -1728)]


class Experiment(NamedTuple):
    steps: list[str]
    wrong: list[str]
    was_killed: bool


def experiment(path: Path, die_at: int) -> Experiment:
    """Send three messages, with a kill at one step."""
    with Machine(path) as machine:
        texts = [f"Message {number}" for number in range(len(ACTS))]
        for text, act in zip(texts, ACTS, strict=True):
            machine.messages.expect(act, text=text, times=None)
        machine.enqueue(*texts)
        process = machine.start(DIE_AT=str(die_at))
        until(lambda: machine.server.is_quiet() or process.poll() is not None)
        if process.poll() is not None:
            machine.start()
        until(machine.server.is_quiet)
        steps = (path / "steps.txt").read_text().splitlines()
        wrong = machine.truth()
        outcomes = [machine.server.row(row["batchItemId"])["status"] for row in list(machine.server.rows.values())]
        if "queued" in outcomes:
            wrong.append("a message is lost")
        return Experiment(steps, wrong, process.poll() == -9)


def killed_at(path: Path, numbers: list[int]) -> list[str]:
    """Kill it at each of these steps. A run may have fewer steps than the first one: it looks at chat.db less often."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda number: experiment(path / str(number), number), numbers))
    assert sum(run.was_killed for run in done) >= 0.9 * len(done)
    pairs = zip(numbers, done, strict=True)
    return [f"killed at {number} ({run.steps[number - 1]}): {run.wrong}" for number, run in pairs if run.wrong]


def test_a_sender_that_is_killed_at_some_steps_doubles_and_loses_nothing(tmp_path: Path) -> None:
    steps, wrong, _ = experiment(tmp_path / "first", 0)
    assert wrong == []
    assert "before osascript send" in steps
    first = steps.index("before osascript send")
    assert killed_at(tmp_path, [first + 1, first + 2]) == []


@pytest.mark.mac_faults
def test_a_sender_that_is_killed_at_any_step_doubles_and_loses_nothing(tmp_path: Path) -> None:
    steps, wrong, _ = experiment(tmp_path / "first", 0)
    assert wrong == []
    last = len(steps) - 1 - steps[::-1].index("before POST result")
    assert killed_at(tmp_path, list(range(1, last + 4))) == []


def storm(path: Path, seed: int, count: int, seconds: float) -> dict[str, int]:
    """Kill the sender, Messages and osascript at random, and cut connections, while messages go out."""
    rng = random.Random(seed)  # noqa: S311  # dice, not secrets
    with Machine(path) as machine:
        good, dead = messages.sent(0.02, 0.1), messages.dies("dispatch", messages.sent(0.02, 0.1))
        others = [dead, messages.dies("resolve", good), messages.vanishes(), *ACTS[1:], messages.outbox(leaves=1)]
        for number in range(count):
            text = f"Message {number}."
            machine.messages.expect(rng.choice(others) if rng.random() < 0.1 else good, text=text, times=None)
            machine.enqueue(text)
        machine.server.on_exchange = lambda moment, what: rng.random() > 0.02
        sender = machine.start(DIE_RATE="0.004")
        end = time.monotonic() + seconds
        while not machine.server.is_quiet() and time.monotonic() < end:
            if sender.poll() is not None:
                sender = machine.start("run", DIE_RATE="0.004")
            if rng.random() < 0.02:
                machine.app.kill()
                machine.app.wait()
                machine.app = machine.start_app()
            if machine.server.problem and "release" in machine.server.problem:
                machine.call("release")
            time.sleep(0.05)
        if sender.poll() is not None:
            machine.start()
        time.sleep(1)  # an outcome that became known is reported
        assert machine.truth() == []
        ends = [row["outcome"] or row["status"] for row in machine.server.rows.values()]
        return {end: ends.count(end) for end in set(ends)}


def test_everything_is_killed_at_random(tmp_path: Path) -> None:
    assert storm(tmp_path, 1, 10, 60)["sent"] > 3


@pytest.mark.mac_faults
def test_everything_is_killed_at_random_for_minutes(tmp_path: Path) -> None:
    found = storm(tmp_path, 2, 150, 300)
    print(found)  # noqa: T201  # for docs/reliability.md
    assert found["sent"] > 100


def test_it_needs_little_memory_and_less_time(tmp_path: Path) -> None:
    """Idle for ten polls. `pytest -m mac_faults` measures a minute."""
    with Machine(tmp_path, poll_seconds=0.5) as machine:
        pid = machine.start(script=SENDER).pid
        until(lambda: sum("peek" in what for what in machine.server.requests) >= 2)
        before, requests = usage(pid), len(machine.server.requests)
        until(lambda: len(machine.server.requests) >= requests + 10)
        after = usage(pid)
        assert after.rss < 30 * 1024 * 1024
        assert (after.cpu - before.cpu) / 10 < 0.02  # seconds a poll
        assert all("peek" in what for what in machine.server.requests[requests:])  # a poll is one request


@pytest.mark.mac_faults
def test_an_idle_sender_needs_little(tmp_path: Path) -> None:
    """A minute, or as long as IDLE_SECONDS says: docs/mac.md quotes ten minutes."""
    seconds = float(os.environ.get("IDLE_SECONDS", "60"))
    with Machine(tmp_path, poll_seconds=10) as machine:
        pid = machine.start(script=SENDER).pid
        until(lambda: any("peek" in what for what in machine.server.requests))
        before, began = usage(pid), time.monotonic()
        polls = len(machine.server.requests)
        until(lambda: time.monotonic() - began > seconds, seconds + 60)
        after = usage(pid)
        polls = len(machine.server.requests) - polls
        cpu, programs = (after.cpu - before.cpu) / seconds, (after.programs - before.programs) / seconds
        sys.stdout.write(
            f"\nidle for {seconds:.0f} s, {polls} requests: {after.rss / 10**6:.1f} MB, at most"
            f" {after.peak / 10**6:.1f} MB; {cpu:.3%} of a core, and {programs:.3%} for the stand-ins that it runs\n"
        )
        assert after.peak < 30 * 10**6
        assert cpu < 0.005
