"""Make each situation that needs a person for real, and receive the message: once, also after a restart of everything.

The product runs in processes: the send queue server, the dispatcher, alert.py, on a Mac the sender, and PostgreSQL. The
tests set the time: they move what the databases and the state file say about it, and wait for no patience to end.
"""

import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from helpers import ago, run_script
from mac_machine import TOKEN, Machine
from receiver import Receiver, running_receiver
from testing import Databases, DeviceClient, PrivatePostgres, Script, TestData, free_port, running_postgres, wait_until

import alert
import db

pytestmark = pytest.mark.faults
INTERVAL = "1"  # seconds between two ticks


class System:
    """The product in processes, and a receiver of its alerts. What a test has stopped stays so in restart()."""

    def __init__(self, postgres: PrivatePostgres, receiver: Receiver, directory: Path) -> None:
        self.postgres, self.receiver, self.directory = postgres, receiver, directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **dict.fromkeys(db.URL_VARIABLES.values(), postgres.url),
            "SEND_QUEUE_PORT": str(self.port),
            "MAC_SYNC_BASE_URL": self.url,
            "DISPATCH_INTERVAL_SECONDS": INTERVAL,
            "STATE_DIRECTORY": str(directory),
            "ALERT_URLS": receiver.alert_url,
        }
        self.scripts: list[Script] = []
        self.server: Script | None = None
        self.dispatcher: Script | None = None
        self.postgres_runs = True

    def reset(self) -> None:
        """Let everything run, with a device that has just polled, empty tables and no state of alert.py."""
        if not self.postgres_runs:
            self.start_postgres()
        self.connect()
        self.world.quinn(
            "TRUNCATE outreach_batches, clients, contact_relationships, icloud.devices, icloud.opt_outs CASCADE"
        )
        self.world.settings(paused=False)
        (self.directory / alert.STATE_FILE).unlink(missing_ok=True)
        if not self.server:
            self.start_server()
        if not self.dispatcher:
            self.start_dispatcher()
        self.world.device("mac-mini")
        device(self).poll()
        self.receiver.alerts.clear()

    def end(self) -> None:
        for script in self.scripts:
            script.process.kill()
            script.process.wait()
        self.world.databases.quinn.close()

    def start(self, name: str) -> Script:
        log = self.directory / f"{len(self.scripts)}.log"
        self.scripts.append(Script(log, name, **self.environment))
        return self.scripts[-1]

    def connect(self) -> None:
        conn = db.connect(self.postgres.url)
        self.world = TestData(Databases(self.postgres.url, self.postgres.url, conn, conn))

    def start_server(self) -> None:
        self.server = self.start("send_queue_server.py")
        self.server.port()

    def start_dispatcher(self) -> None:
        """Start the dispatcher; return after its first tick, if PostgreSQL runs."""
        self.dispatcher = self.start("dispatcher.py")
        self.dispatcher.wait_for("outreach-dispatcher starting")
        if self.postgres_runs:
            self.tick()

    def tick(self) -> None:
        """Wait until the dispatch job, which follows the sync job, has succeeded after this moment."""
        sql = "SELECT 1 FROM outreach_settings WHERE LEAST(last_tick_at, last_dispatched_at) > %(now)s"
        [(now,)] = self.world.quinn("SELECT clock_timestamp()")
        wait_until(lambda: self.world.quinn(sql, now=now), seconds=30)

    def stop_dispatcher(self) -> None:
        """Kill it, five minutes ago."""
        assert self.dispatcher
        self.dispatcher.end(signal.SIGKILL)
        self.dispatcher = None
        self.world.settings(last_tick_at=ago(minutes=5))

    def stop_server(self) -> None:
        assert self.server
        self.server.end(signal.SIGKILL)
        self.server = None

    def stop_postgres(self) -> None:
        self.world.databases.quinn.close()
        self.postgres.kill()
        self.postgres_runs = False

    def start_postgres(self) -> None:
        self.postgres.start()
        self.postgres_runs = True
        self.connect()

    def restart(self) -> None:
        """Stop and start all that runs; each run of alert.py is a new process anyway."""
        for script in (self.dispatcher, self.server):
            if script:
                script.end()
        if self.postgres_runs:
            self.stop_postgres()
            self.start_postgres()
        if self.server:
            self.start_server()
        if self.dispatcher:
            self.start_dispatcher()

    def alerts(self, runs: int = 1) -> list[str]:
        """Run alert.py so often; return the messages that were received."""
        for _ in range(runs):
            done = run_script("alert.py", **self.environment)
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return self.receiver.texts()

    def outreach(self, *arguments: str) -> None:
        """Run a command of the owner."""
        done = run_script("outreach.py", *arguments, **self.environment)
        assert done.returncode == 0, done.stderr

    def later(self, **length: float) -> None:
        """Let everything that the state file knows have begun so much earlier."""
        path = self.directory / alert.STATE_FILE
        state = msgspec.json.decode(path.read_bytes(), type=alert.State)
        for known in state.conditions.values():
            known.since -= timedelta(**length)
        path.write_bytes(msgspec.json.encode(state))

    def check(self, begins: str, end: Callable[[], object] | None) -> None:
        """Check that one message begins like this, that a restart repeats nothing, and that one message tells its end.

        `end`: what ends it; None if a second message does not follow.
        """
        self.check_one(self.alerts(2), begins)
        self.restart()
        assert self.alerts() == []
        if end:
            end()
            self.check_one(self.alerts(2), f"Over: {begins}")
            self.restart()
        assert self.alerts() == []

    def check_one(self, texts: list[str], begins: str) -> None:
        assert len(texts) == 1, texts
        assert texts[0].startswith(begins)
        assert len(texts[0].splitlines()) <= 2, "a sentence, and what to do"


@pytest.fixture(scope="module")
def running_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_postgres() as postgres, running_receiver() as receiver:
        system = System(postgres, receiver, tmp_path_factory.mktemp("system"))
        system.reset()
        yield system
        system.end()


@pytest.fixture
def system(running_system: System) -> System:
    running_system.reset()
    return running_system


def device(system: System) -> DeviceClient:
    return DeviceClient(system.url, "mac-mini")


def collect_all(system: System, count: int) -> list[str]:
    """Poll until the device has this many messages; return their ids."""
    found = wait_until(lambda: messages if len(messages := device(system).poll()) == count else None)
    return [message["id"] for message in found]


def test_killed_dispatcher_is_told(system: System) -> None:
    system.stop_dispatcher()
    assert system.alerts() == [], "a restart of the dispatcher is no outage"
    system.later(minutes=3)
    system.check("Dispatcher not running: last tick 5 min ago", system.start_dispatcher)


def test_stopped_postgresql_is_told(system: System) -> None:
    def start() -> None:
        system.start_postgres()
        system.tick()

    system.stop_postgres()
    assert system.alerts() == [], "a restart of PostgreSQL is no outage"
    system.later(minutes=3)
    system.check("Held: database quinn cannot be reached; database icloud cannot be reached", start)


def test_failing_sync_is_told(system: System) -> None:
    refuse = """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON outreach_batch_items
           FOR EACH ROW WHEN (NEW.status = 'sent') EXECUTE FUNCTION refuse()
    """

    def accept() -> None:
        system.world.quinn("DROP FUNCTION refuse CASCADE")
        wait_until(lambda: system.world.statuses() == ["sent"])
        system.tick()

    system.world.batch(clients=1)
    [row_id] = collect_all(system, 1)
    system.world.quinn(refuse)
    device(system).result(row_id).raise_for_status()
    assert system.dispatcher
    system.dispatcher.wait_for("sync job failed")
    system.world.settings(last_synced_at=ago(minutes=5))
    assert system.alerts() == []
    system.later(minutes=3)
    system.check("Failing: the dispatcher runs, and its sync job has failed for 5 min", accept)


def test_killed_server_is_told(system: System) -> None:
    def start() -> None:
        system.start_server()
        [row_id] = collect_all(system, 1)
        device(system).result(row_id).raise_for_status()
        wait_until(lambda: system.world.statuses() == ["sent"])

    system.stop_server()
    system.world.batch(clients=1)
    since = "UPDATE outreach_batch_items SET claimed_at = now() - interval '4 minutes' WHERE claimed_at IS NOT NULL"
    wait_until(lambda: system.world.quinn(f"{since} RETURNING 1"))
    assert system.alerts() == []
    system.later(minutes=3)
    system.check("Held: the send queue server has been unavailable for ", start)


def test_silent_mac_is_told(system: System) -> None:
    def report() -> None:
        device(system).result(collect_all(system, 1)[0]).raise_for_status()
        wait_until(lambda: system.world.statuses() == ["sent"])

    system.world.batch(clients=1)
    wait_until(lambda: system.world.statuses() == ["queued"])
    assert system.alerts() == []
    system.world.icloud("UPDATE icloud.devices SET last_seen_at = now() - interval '11 minutes'")
    system.world.icloud("UPDATE icloud.send_queue SET created_at = now() - interval '11 minutes'")
    system.check("mac-mini, last seen 11 min ago, keeps messages waiting.", report)


def test_mac_without_full_disk_access_is_told(system: System, tmp_path: Path) -> None:
    denied = tmp_path / "denied"
    denied.touch()
    problem = "SELECT 1 FROM icloud.devices WHERE name = 'Mac' AND problem IS {} NULL AND version IS NOT NULL"
    system.world.icloud("DELETE FROM icloud.devices")
    system.world.device("Mac", token=TOKEN)
    with Machine(tmp_path / "mac", url=system.url) as mac:

        def grant() -> None:
            """Let the owner grant the access, and the sender start again, as it does by itself after a minute."""
            denied.unlink()
            sender.kill()
            mac.start(DENIED=str(denied))
            wait_until(lambda: system.world.icloud(problem.format("")), seconds=30)

        sender = mac.start(DENIED=str(denied))
        wait_until(lambda: system.world.icloud(problem.format("NOT")), seconds=30)
        assert system.alerts() == []
        system.later(minutes=3)
        system.check("Mac says: Full Disk Access is missing for ", grant)


def test_batch_that_paused_itself_is_told(system: System) -> None:
    def cancel() -> None:
        system.outreach("cancel", batch_id)

    system.world.settings(stop_after_failures=2)
    batch_id = system.world.batch(clients=3, digest="d", approved_at=ago(60), recheck=False)
    for _ in range(2):
        device(system).result(collect_all(system, 1)[0], "failed", error="not registered").raise_for_status()
        system.tick()
    wait_until(lambda: system.world.quinn("SELECT 1 FROM outreach_batches WHERE status = 'paused'"))
    system.check(f"Batch {batch_id[:8]}… paused itself: the last 2 messages failed.", cancel)


def test_batch_that_is_finished_with_failures_is_told(system: System) -> None:
    batch_id = system.world.batch(clients=3)
    sent, failed, unknown = collect_all(system, 3)
    for row_id, outcome in ((sent, {"status": "sent"}), (failed, {"status": "failed"})):
        device(system).result(row_id, **outcome).raise_for_status()
    device(system).result(unknown, "failed", outcome="unknown", error="Messages shows no trace").raise_for_status()
    wait_until(lambda: system.world.quinn("SELECT 1 FROM outreach_batches WHERE status = 'sent'"))
    system.check(
        f"Batch {batch_id[:8]}… is finished: 1 message failed, 1 may have been sent: look at the Mac.", end=None
    )


def test_hold_that_only_a_person_can_end_is_told_after_ten_minutes(system: System) -> None:
    def resume() -> None:
        system.world.settings(paused=False)

    system.world.batch(clients=1)
    system.world.settings(paused=True)
    assert system.alerts() == []
    system.later(minutes=9)
    assert system.alerts() == []
    system.later(minutes=1)
    system.check("Held: paused.", resume)


def test_opt_out_that_the_owner_has_to_assign_is_told(system: System) -> None:
    client_id = system.world.client("+14155550123")
    device(system).opt_out("+14155550123").raise_for_status()
    device(system).opt_out("somebody@example.com").raise_for_status()
    system.check("Opted out, and no client has this number or address: s•••@example.com.", end=None)
    system.outreach("assign", "somebody@example.com", client_id)
    assert system.alerts() == []
