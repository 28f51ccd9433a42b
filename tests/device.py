"""A device for the fault tests: it polls, sends and reports, and its log is the record of what it sent.

Run by test_faults.py and campaign.py, in their own process or in one that they may kill. To send is to write a line
to the log, `sent ID BODY` or `failed ID BODY`, in one write: no instant lies between the two. So a message that a poll
brings again is not sent again, also after a kill; its result is reported until an answer comes. Example:

    DEVICE_TOKEN=... python tests/device.py http://localhost:3201 device.log
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import requests

POLL_SECONDS = 0.1
TIMEOUT = 2  # seconds
FAILS = "fail"  # a body that has this word cannot be sent
FINAL = (200, 404, 409)  # answers after which a report is not made again


class Send(NamedTuple):
    """A line of a device's log: `sent` or `failed`, the queue's id of the message, and its body."""

    outcome: str
    queue_id: str
    body: str


class Device:
    """`ended`: how each message's sending ended, by its id; `told`: the ids whose report was answered."""

    def __init__(self, base_url: str, token: str, log: Path) -> None:
        self.base_url = f"{base_url}/client/imessage/send-queue"
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {token}"
        self.log = log
        self.ended = {send.queue_id: send.outcome for send in sends(log)}
        self.told = {line[1] for line in lines(log) if line[0] == "told"}

    def round(self) -> int:
        """Poll, send what is new, and report all that is not yet known to be reported; how many were new."""
        answer = self.session.get(f"{self.base_url}/pending", timeout=TIMEOUT)
        answer.raise_for_status()
        self._write(f"polled {time.time()}")
        new = [item for item in answer.json()["data"]["items"] if item["id"] not in self.ended]
        for item in new:
            outcome = "failed" if FAILS in item["body"] else "sent"
            self._write(f"{outcome} {item['id']} {item['body']}")
            self.ended[item["id"]] = outcome
        for queue_id in [queue_id for queue_id in self.ended if queue_id not in self.told]:
            self.report(queue_id)
        return len(new)

    def report(self, queue_id: str) -> None:
        body = {"status": self.ended[queue_id], "error": "not registered"}
        answer = self.session.post(f"{self.base_url}/{queue_id}/result", json=body, timeout=TIMEOUT)
        if answer.status_code not in FINAL:
            answer.raise_for_status()
        self.told.add(queue_id)
        self._write(f"told {queue_id}")

    def _write(self, line: str) -> None:
        with self.log.open("ab", buffering=0) as log:
            log.write(f"{line}\n".encode())


def lines(log: Path) -> list[list[str]]:
    return [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []


def sends(log: Path) -> list[Send]:
    """What a device has sent, or tried to, in order."""
    return [Send(*line) for line in lines(log) if line[0] in ("sent", "failed")]


def polls(log: Path) -> list[float]:
    """When its polls were answered, in seconds since 1970."""
    return [float(line[1]) for line in lines(log) if line[0] == "polled"]


def main() -> None:
    device = Device(sys.argv[1], os.environ["DEVICE_TOKEN"], Path(sys.argv[2]))
    while True:
        try:
            device.round()
        except requests.RequestException as error:
            sys.stderr.write(f"{type(error).__name__}\n")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
