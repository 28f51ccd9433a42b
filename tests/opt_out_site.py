"""Run the two servers for the tests of opt-outs, with devices, the dispatcher, and a backup. No tests are in here.

The servers and PostgreSQL are real processes; the dispatcher's jobs are called, so that a test can stop between two of
their steps. Every opt-out and opt-in is noted for opt_out_check.py.
"""

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import event_log
import opt_out_check
import requests
from helpers import ApiClient
from opt_out_check import Acts
from test_disasters import dump, restore
from testing import OWNER_TOKEN, SERVICE_TOKEN, DeviceClient, Script, TestData, free_port, patient

import db
import dispatcher

Start = Callable[..., Script]
THREADS = "40"  # of the server: all people's requests wait at one lock at once


class Unreachable(dispatcher.SendQueueClient):
    """A client whose server is down."""

    def enqueue(self, *_: Any) -> str:
        raise dispatcher.ServerUnavailable("down")


class WatchedClient(dispatcher.SendQueueClient):
    """A client that calls `before` ahead of each request, and `after` behind each response, with the item's id."""

    def __init__(self, url: str) -> None:
        super().__init__(url, SERVICE_TOKEN)
        self.asked: list[str] = []
        self.before: Callable[[str], None] = lambda item_id: None
        self.after: Callable[[str], None] = lambda item_id: None

    def enqueue(self, item: dispatcher.Item, *arguments: Any) -> str:
        self.before(item.id)
        self.asked.append(item.id)
        queue_id = super().enqueue(item, *arguments)
        self.after(item.id)
        return queue_id


class Site:
    """The two servers as processes over the test's databases, and two devices."""

    def __init__(self, world: TestData, start: Start, path: Path) -> None:
        self.world, self.start, self.path = world, start, path
        self.acts = Acts()
        self.kept: list[event_log.Change] = []  # from before a restore
        event_log.install(world.databases.quinn, world.databases.icloud)
        self.device_ids = [world.device(name) for name in ("a", "b")]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.serve()
        self.owner_port = free_port()
        self.client = WatchedClient(self.url)
        self.devices = [DeviceClient(self.url, name) for name in ("a", "b")]

    def serve(self) -> None:
        url = patient(self.world.databases.icloud_url)
        self.server = self.start(
            "send_queue_server.py", SEND_QUEUE_PORT=str(self.port), SEND_QUEUE_THREADS=THREADS, QUINN_ICLOUD_DB_URL=url
        )
        self.server.port()

    @functools.cached_property
    def owner(self) -> ApiClient:
        """The owner's client of a server that starts with the first use."""
        self.serve_owner()
        return ApiClient(f"http://127.0.0.1:{self.owner_port}", OWNER_TOKEN)

    def serve_owner(self) -> None:
        self.owner_server = self.start("outreach_server.py", OUTREACH_PORT=str(self.owner_port))
        self.owner_server.port()

    def connect(self) -> Any:
        """Connect to the queue's database, in a transaction that lasts until the caller commits."""
        conn = db.connect(self.world.databases.icloud_url)
        conn.autocommit = False
        return conn

    def sync(self) -> None:
        dispatcher.sync(self.world.databases.quinn, self.world.databases.icloud)

    def dispatch(self, client: dispatcher.SendQueueClient | None = None) -> None:
        with contextlib.suppress(dispatcher.ServerUnavailable):
            dispatcher.dispatch(self.world.databases.quinn, self.world.databases.icloud, client or self.client)

    def changes(self) -> list[event_log.Change]:
        """Return every change, each once. What was before a backup is in the restored databases, too."""
        found = self.kept + event_log.read(self.world.databases.quinn, self.world.databases.icloud)
        return sorted({(each.at, each.table, each.id): each for each in found}.values(), key=lambda each: each.at)

    def violations(self, others: dict[str, list[str]]) -> list[str]:
        """Return what was collected after an opt-out, of the handle itself or of another one of the person."""
        changes = self.changes()
        collected = opt_out_check.collects(changes)
        syncs = event_log.EventLog(changes).syncs
        acts = self.acts.all
        return [
            *opt_out_check.collected_after_opt_out(acts, collected),
            *opt_out_check.collected_after_opt_out_of_person(acts, collected, others, syncs),
        ]

    # --- opt-outs -------------------------------------------------------------------------------------

    def reply(self, device: DeviceClient, handle: str, word: str, at: datetime) -> bool:
        """Report a reply of a person; return whether the server has accepted it."""
        return self.acts.note(
            "stop" if word == "STOP" else "start",
            handle,
            lambda: device.opt_out(handle, word, at.isoformat()).status_code == 200,
            at,
        )

    def owner_records(self, handle: str) -> bool:
        return self._owner("owner", handle, "/my/outreach/opt-outs", {"handle": handle, "word": "on the phone"})

    def owner_ends(self, handle: str) -> bool:
        return self._owner("end", handle, "/my/outreach/opt-outs/end", {"handle": handle})

    def owner_imports(self, handle: str) -> bool:
        return self._owner("import", handle, "/my/outreach/opt-outs/import", f"number\n{handle}\n")

    def _owner(self, kind: opt_out_check.Kind, handle: str, path: str, body: object) -> bool:
        return self.acts.note(kind, handle, lambda: self.owner.call("POST", path, body).status_code == 200)


class Mac:
    """Report replies and collect messages as mac_sender.py does, with a journal of the replies.

    It collects nothing before the server has accepted all replies. If the server knows fewer than it has told before,
    the server was restored: then all are reported again. `is_polling`: a device that takes all by one poll.
    """

    def __init__(self, site: Site, device: DeviceClient, is_polling: bool = False) -> None:
        self.site, self.device, self.is_polling = site, device, is_polling
        self.replies: list[tuple[str, str, datetime]] = []
        self.unreported: list[tuple[str, str, datetime]] = []
        self.known = 0
        self.reporting = threading.Lock()

    def receive(self, handle: str, word: str, at: datetime) -> None:
        self.replies.append((handle, word, at))
        self.unreported.append((handle, word, at))

    def report(self) -> None:
        """Report what the server has not accepted yet, one after another."""
        with self.reporting:
            while self.unreported:
                if not self.site.reply(self.device, *self.unreported[0]):
                    return
                del self.unreported[0]

    def round(self, pause: Callable[[], None] = lambda: None) -> None:
        """Report, peek, collect and send; `pause` is called before each message."""
        self.report()
        found = self.device.peek()
        if found["optOuts"] < self.known:
            with self.reporting:
                self.unreported[:] = self.replies
        self.known = found["optOuts"]
        if self.unreported:
            return
        pause()
        for item in self.device.poll() if self.is_polling else found["items"]:
            if not self.is_polling:
                pause()
            if self.is_polling or self.device.collect(item["id"]).ok:
                self.device.result(item["id"])


class Backup:
    """Dumps of both databases, and the way of docs/backups.md back to them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.urls = {"quinn": site.world.databases.quinn_url, "icloud": site.world.databases.icloud_url}
        for name, url in self.urls.items():
            dump(url, site.path / f"{name}.dump")

    def restore(self, macs: Sequence[Mac]) -> None:
        """Restore while nothing runs but the owner's server; then pause, import the export, let the Macs report."""
        site = self.site
        exported = requests.get(
            f"{site.owner.base_url}/my/outreach/opt-outs.csv", headers=site.owner.headers, timeout=10
        )
        site.kept = site.changes()
        for name, url in self.urls.items():
            restore(url, site.path / f"{name}.dump")
        site.world.settings(paused=True)
        site.sync()
        imported = site.owner.call("POST", "/my/outreach/opt-outs/import", exported.content)
        assert imported.status_code == 200, imported.text
        site.serve()
        for mac in macs:
            for _ in range(2):  # the first sees that the server has forgotten something
                mac.round()
            assert not mac.unreported
        site.world.settings(paused=False)


def figures(site: Site) -> str:
    """Return how much happened, in words."""
    collected = opt_out_check.collects(site.changes())
    kinds = Counter(act.kind for act in site.acts.all)
    acts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{acts}; {len(collected)} collected, {opt_out_check.meanwhile(site.acts.all, collected)} of them meanwhile"
