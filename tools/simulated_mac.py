"""Simulate a Mac: poll the send queue, log each message as sent, and report the result, over real HTTP.

Run by demo.py, test_faults.py, test_failover.py and chaos.py, each in a process that they may kill. Touches no table.
It sends a message by writing a line to its log, with one write(). So the log is complete even after a kill. If a later
poll returns the same message, it does not send the message again. It repeats a report until it gets a response.

It fails to send a message whose body contains `fail`. With --mishaps it also fails at random, crashes between a send
and its report, and loses reports and responses; --seed determines when. Example:

    DEVICE_TOKEN=... python tools/simulated_mac.py http://localhost:3201 mac.log --mishaps
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import requests

POLL_SECONDS = 0.1
TIMEOUT = 2  # seconds
FAILS = "fail"  # sending a body that contains this fails
FINAL = (200, 404, 409)  # status codes after which a report is not repeated
MISHAP = 0.06  # the probability of each mishap: of a send, or of a report
CRASH_STATUS = 75  # the exit status of a crash


class Send(NamedTuple):
    """A line of the log: `sent` or `failed`, the queue's id of the message, and its body."""

    outcome: str
    queue_id: str
    body: str


class SimulatedMac:
    """Poll, send and report. `outcomes`: of each send, by id. `reported`: the ids whose report had a response."""

    def __init__(self, base_url: str, token: str, log: Path, mishaps_seed: int | None = None) -> None:
        self.base_url = f"{base_url}/client/imessage/send-queue"
        self.session = requests.Session()
        self.session.trust_env = False  # ignore HTTP_PROXY: such a proxy cannot reach this server
        self.session.headers["Authorization"] = f"Bearer {token}"
        self.log = log
        self.outcomes = {send.queue_id: send.outcome for send in sends(log)}
        self.reported = {line[1] for line in lines(log) if line[0] == "reported"}
        # A different sequence after each restart. With the same one, it would crash again at once.
        self.rng = None if mishaps_seed is None else random.Random(f"{mishaps_seed} {len(lines(log))}")

    def round(self) -> int:
        """Poll, send new messages, and report every unreported outcome; return the number of new messages."""
        new = 0
        for message in self.poll():
            if message["id"] in self.outcomes:
                self._write(f"again {message['id']}")  # its report did not arrive
            else:
                self.send(message["id"], message["body"])
                new += 1
        for queue_id in [queue_id for queue_id in self.outcomes if queue_id not in self.reported]:
            self.report(queue_id)
        return new

    def poll(self) -> Any:
        """Return the messages that the server has for this device."""
        response = self.session.get(f"{self.base_url}/pending", timeout=TIMEOUT)
        response.raise_for_status()
        self._write(f"polled {time.time()}")
        return response.json()["data"]["items"]

    def send(self, queue_id: str, body: str) -> None:
        """Log the message as sent or failed. A simulated Mac does not send it."""
        outcome = "failed" if FAILS in body or self._has_mishap() else "sent"
        self._write(f"{outcome} {queue_id} {body}")
        self.outcomes[queue_id] = outcome
        if self._has_mishap():
            self._write(f"crashed {queue_id}")
            sys.exit(CRASH_STATUS)

    def report(self, queue_id: str) -> None:
        """Report the result of a message. If the response is lost, the next round reports it again."""
        is_request_lost, is_response_lost = self._has_mishap(), self._has_mishap()
        if not is_request_lost:
            body = {"status": self.outcomes[queue_id], "error": "not registered with iMessage"}
            response = self.session.post(f"{self.base_url}/{queue_id}/result", json=body, timeout=TIMEOUT)
            if response.status_code not in FINAL:
                response.raise_for_status()
        if is_request_lost or is_response_lost:
            self._write(f"lost {queue_id}")
        else:
            self.reported.add(queue_id)
            self._write(f"reported {queue_id}")

    def _has_mishap(self) -> bool:
        return self.rng is not None and self.rng.random() < MISHAP

    def _write(self, line: str) -> None:
        with self.log.open("ab", buffering=0) as log:
            log.write(f"{line}\n".encode())


def lines(log: Path) -> list[list[str]]:
    """Return the lines of a log, each split into the event, the id and the body."""
    return [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []


def sends(log: Path) -> list[Send]:
    """Return the sends of a simulated Mac, also the failed ones, in order."""
    return [Send(*line) for line in lines(log) if line[0] in ("sent", "failed")]


def polls(log: Path) -> list[float]:
    """Return the times of the polls that had a response, in seconds since 1970."""
    return [float(line[1]) for line in lines(log) if line[0] == "polled"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Simulate a Mac: poll, log each message as sent, report.",
        epilog="environment: DEVICE_TOKEN (needed). example: "
        "DEVICE_TOKEN=... python tools/simulated_mac.py http://localhost:3201 mac.log",
    )
    parser.add_argument("base_url", help="URL of the send queue server")
    parser.add_argument("log", type=Path, help="the file that records what was sent")
    parser.add_argument("--mishaps", action="store_true", help="fail, crash and lose reports at random")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mishaps; default %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    seed = arguments.seed if arguments.mishaps else None
    mac = SimulatedMac(arguments.base_url, os.environ["DEVICE_TOKEN"], arguments.log, seed)
    while True:
        try:
            mac.round()
        except requests.RequestException as error:
            sys.stderr.write(f"no response, trying again in {POLL_SECONDS} s: {error}\n")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
