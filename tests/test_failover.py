"""Check several hosts: two servers, two dispatchers, and a primary PostgreSQL whose synchronous standby takes over."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import event_log
import pytest
import simulated_mac
from event_log import EventLog
from replicated_postgres import ReplicatedPostgres, migrated_pair, replicated_postgres
from testing import Script, TestData, wait_until

import db

pytestmark = pytest.mark.faults
BATCHES, ITEMS = 20, 15
MESSAGES = BATCHES * ITEMS
SENT_BEFORE = 100  # messages that are sent before the primary is killed
MACS = ("mac-1", "mac-2")  # each polls a server of its own
RECOVERS_WITHIN = 15  # seconds from the kill to the next message; below 3 on an idle machine

Start = Callable[..., Script]


@pytest.fixture
def postgres_pair() -> Iterator[ReplicatedPostgres]:
    with replicated_postgres() as postgres:
        yield postgres


@pytest.fixture
def data(postgres_pair: ReplicatedPostgres) -> Iterator[TestData]:
    """Both databases on the primary, migrated, over URLs that name both servers."""
    with migrated_pair(postgres_pair) as data:
        yield data


# --- a killed primary ---------------------------------------------------------------------------------


def insert_batches(data: TestData) -> None:
    """Insert batches for as many clients as there are messages, half of them clients of the second Mac."""
    devices = [data.device(name) for name in MACS]
    old_batch = data.batch(status="sent")
    last_month = datetime.now(UTC) - timedelta(days=30)
    clients = [data.client() for _ in range(MESSAGES)]
    for client in clients[::2]:  # a client keeps the device that reached it last
        data.item(old_batch, client, status="sent", sent_at=last_month, device_id=devices[1])
    event_log.install(data.databases.quinn, data.databases.icloud)
    for number in range(BATCHES):
        batch_id = data.batch()
        for client in clients[number::BATCHES]:
            data.item(batch_id, client, rendered_body=f"message {client}")
    # As many as there are: a message that were sent twice would exceed the limit.
    data.settings(max_per_day=MESSAGES)


def start_processes(start: Start, data: TestData, path: Path) -> tuple[list[Script], list[Path]]:
    """Start two servers, a dispatcher and a Mac for each; return the product's processes and the Macs' logs."""
    environment = {
        "QUINN_DB_URL": data.databases.quinn_url,
        "QUINN_ICLOUD_DB_URL": data.databases.icloud_url,
        "DISPATCH_INTERVAL_SECONDS": "1",
    }
    scripts, logs = [], []
    for name in MACS:
        server = start("send_queue_server.py", SEND_QUEUE_PORT="0", **environment)
        base_url = f"http://127.0.0.1:{server.port()}"
        scripts += [server, start("dispatcher.py", MAC_SYNC_BASE_URL=base_url, **environment)]
        logs.append(path / f"{name}.mac")
        start("tools/simulated_mac.py", base_url, str(logs[-1]), DEVICE_TOKEN=name)
    return scripts, logs


class Failover(NamedTuple):
    """The times of the kill and of the promotion, in seconds since 1970, and the messages sent before."""

    killed_at: float
    promoted_at: float
    sent_before: int


def fail_over(postgres_pair: ReplicatedPostgres, logs: list[Path]) -> Failover:
    """Kill the primary amid the messages and promote the standby at once.

    At the kill, the primary has commits that the standby does not have: whatever they did must have had no effect yet.
    """

    def sent() -> int:
        return sum(len(simulated_mac.sends(log)) for log in logs)

    wait_until(lambda: sent() >= SENT_BEFORE, 60)
    postgres_pair.cut_replication()
    killed_at = time.time()
    postgres_pair.primary.kill()
    sent_before = sent()
    postgres_pair.standby.promote()
    return Failover(killed_at, time.time(), sent_before)


def first_send_after(logs: list[Path], at: float) -> float:
    """Return when the first message was sent that a Mac polled after `at`."""
    times, polled_at = [], 0.0
    for log in logs:
        for line in simulated_mac.lines(log):
            if line[0] == "polled":
                polled_at = float(line[1])
            elif line[0] == "sent" and polled_at > at:
                times.append(polled_at)
    return min(times)


def test_failover_under_load_loses_and_repeats_nothing(
    postgres_pair: ReplicatedPostgres, data: TestData, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    insert_batches(data)
    scripts, logs = start_processes(start, data, tmp_path)
    failover = fail_over(postgres_pair, logs)
    with (
        contextlib.closing(db.connect(data.databases.quinn_url)) as quinn,
        contextlib.closing(db.connect(data.databases.icloud_url)) as icloud,
    ):
        wait_until(lambda: not db.query(quinn, "SELECT 1 FROM outreach_batches WHERE status = 'sending'"), 90)
        bodies = db.query(quinn, "SELECT rendered_body FROM outreach_batch_items WHERE rendered_body LIKE 'message%'")
        events = EventLog(event_log.read(quinn, icloud), logs)
    assert Counter(send.body for send in events.sends) == Counter(body for (body,) in bodies)
    assert event_log.violations(events) == []
    assert not [line for script in scripts for line in script.lines() if "Traceback" in line]
    assert failover.sent_before < MESSAGES, "the primary was killed after the last message"
    first_send = first_send_after(logs, failover.promoted_at) - failover.killed_at
    with capsys.disabled():
        sys.stdout.write(
            f"\nprimary killed after {failover.sent_before} of {MESSAGES} messages, standby promoted after "
            f"{failover.promoted_at - failover.killed_at:.1f} s, first send after {first_send:.1f} s; "
            f"sent {len(events.sends)}, none lost, none twice\n"
        )
    assert first_send < RECOVERS_WITHIN


# --- a primary that became read-only -------------------------------------------------------------------


def test_connection_leaves_read_only_primary(postgres_pair: ReplicatedPostgres, data: TestData) -> None:
    def rename_device() -> list[db.Row]:
        sql = "UPDATE icloud.devices SET name = 'other' RETURNING inet_server_port()"
        return database.query(sql)

    primary, standby = postgres_pair.primary, postgres_pair.standby
    data.device()
    database = db.RetryingConnection(data.databases.icloud_url)
    assert rename_device() == [(primary.port,)]
    primary.run("ALTER SYSTEM SET default_transaction_read_only = on")  # as before a planned switch of the primary
    primary.run("SELECT pg_reload_conf()")
    wait_until(lambda: database.query("SHOW transaction_read_only") == [("on",)])
    with pytest.raises(db.DatabaseUnavailable):
        rename_device()
    standby.promote()
    assert rename_device() == [(standby.port,)]
