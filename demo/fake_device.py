"""A pretended Mac: polls the send queue, "sends" each message, and reports the result, over real HTTP.

Run by demo.py. Touches no table. Like a Mac it may crash between a send and its report, and like a Mac's, its reports
and their answers get lost. So it keeps a journal: a send is written down before it is reported, and a message that a
later poll brings again is reported again and never sent again. Example:

    DEVICE_TOKEN=... python demo/fake_device.py http://localhost:3201 journal.txt
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import requests

POLL_SECONDS = 0.3
TIMEOUT = 5  # seconds
FAILS = 0.06  # of the sends: the handle is not registered, say
CRASHES = 0.06  # of the sends: the Mac restarts before it could report
LOSES = 0.06  # of the reports, on their way there; and as many of the answers, on their way back
CRASH_STATUS = 75


class Device:
    """`ended`: how each message's sending ended, by its id; `reported`: the ids whose report was answered."""

    def __init__(self, base_url: str, token: str, journal: Path, seed: int) -> None:
        self.base_url = f"{base_url}/client/imessage/send-queue"
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy of the host cannot reach this one
        self.session.headers["Authorization"] = f"Bearer {token}"
        self.journal = journal
        events = read(journal)
        self.ended = {queue_id: event for event, queue_id in events if event in ("sent", "failed")}
        self.reported = {queue_id for event, queue_id in events if event == "reported"}
        # Other dice after each restart: with the same ones it would crash at once again.
        self.dice = random.Random(f"{seed} {len(events)}")  # noqa: S311  # dice, not secrets

    def write(self, event: str, queue_id: str) -> None:
        with self.journal.open("a") as journal:
            journal.write(f"{event} {queue_id}\n")

    def round(self) -> None:
        """Send what is new in the queue, then report all sends that are not yet known to be reported."""
        for item in self.poll():
            if item["id"] in self.ended:
                self.write("again", item["id"])  # its report never arrived
            else:
                self.send(item["id"])
        for queue_id in [queue_id for queue_id in self.ended if queue_id not in self.reported]:
            self.report(queue_id)

    def poll(self) -> Any:
        answer = self.session.get(f"{self.base_url}/pending", timeout=TIMEOUT)
        answer.raise_for_status()
        return answer.json()["data"]["items"]

    def send(self, queue_id: str) -> None:
        """Send one message, as far as a pretended Mac does."""
        self.ended[queue_id] = "failed" if self.dice.random() < FAILS else "sent"
        self.write(self.ended[queue_id], queue_id)
        if self.dice.random() < CRASHES:
            self.write("crashed", queue_id)
            sys.exit(CRASH_STATUS)

    def report(self, queue_id: str) -> None:
        there, back = (self.dice.random() >= LOSES for _ in range(2))
        if there:
            body = {"status": self.ended[queue_id], "error": "not registered with iMessage"}
            answer = self.session.post(f"{self.base_url}/{queue_id}/result", json=body, timeout=TIMEOUT)
            answer.raise_for_status()
        if there and back:
            self.reported.add(queue_id)
            self.write("reported", queue_id)
        else:
            self.write("lost", queue_id)


def read(journal: Path) -> list[tuple[str, str]]:
    """A journal's lines: what happened, and the message's id."""
    if not journal.exists():
        return []
    return [(event, queue_id) for event, queue_id in map(str.split, journal.read_text().splitlines())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pretend to be a Mac that sends.",
        epilog="environment: DEVICE_TOKEN (needed). example: "
        "DEVICE_TOKEN=... python demo/fake_device.py http://localhost:3201 journal.txt",
    )
    parser.add_argument("base_url", help="where the send queue server is")
    parser.add_argument("journal", type=Path, help="the file that remembers what was sent")
    parser.add_argument("--seed", type=int, default=1, help="of the dice; default %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    device = Device(arguments.base_url, os.environ["DEVICE_TOKEN"], arguments.journal, arguments.seed)
    while True:
        try:
            device.round()
        except requests.RequestException as error:
            sys.stderr.write(f"the server could not be asked, trying again: {error}\n")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
