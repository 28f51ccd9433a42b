"""Check the embedded PostgreSQL: who starts it, who shares it, and when it stops."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run_sql
from testing import ROOT, wait_until


class Home:
    """A directory with the scripts, and the processes that use its ./pgdata."""

    HOLD = "import db, sys; print(db.url('quinn'), flush=True); sys.stdin.read()"

    def __init__(self, path: Path) -> None:
        for name in ("db.py", "runtime.py", "schema.sql"):
            shutil.copy(ROOT / name, path)
        self.path = path
        self.environment = {**os.environ, "QUINN_DB_URL": "", "QUINN_ICLOUD_DB_URL": "", "PYTHONPATH": str(path)}

    def holder(self) -> "subprocess.Popen[str]":
        """Start a process that prints the URL of the embedded PostgreSQL and uses it until its stdin is closed."""
        return subprocess.Popen(
            [sys.executable, "-c", self.HOLD],
            cwd=self.path, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "db.py", "url"],
            cwd=self.path, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def is_running(self) -> bool:
        return (self.path / "pgdata" / "postmaster.pid").exists()


@pytest.fixture
def home() -> Iterator[Home]:
    """A home outside pytest's directory: see running_postgres() in conftest.py."""
    with tempfile.TemporaryDirectory(prefix="home-", ignore_cleanup_errors=True) as directory:
        yield Home(Path(directory))


def url_of(holder: "subprocess.Popen[str]") -> str:
    assert holder.stdout
    return holder.stdout.readline().strip()


def test_embedded_postgresql_stops_with_last_user(home: Home) -> None:
    with home.holder() as holder:
        url = url_of(holder)
        assert home.ask().stdout.strip() == url
        assert run_sql(url, "SELECT count(*) FROM outreach_settings") == [(1,)]  # it is migrated, and still runs
        assert home.is_running()
        assert holder.stdin
        holder.stdin.close()
    wait_until(lambda: not home.is_running())


def test_embedded_postgresql_outlives_killed_script(home: Home) -> None:
    with home.holder() as killed:
        url = url_of(killed)
        killed.kill()
    assert home.is_running(), "else this test shows nothing"
    asked = home.ask()
    assert asked.stdout.strip() == url
    assert not home.is_running()
    assert home.ask().stdout.strip() == url, "and it can be started again"
    assert not home.is_running()


def test_embedded_postgresql_stops_after_earlier_kill(home: Home) -> None:
    with home.holder() as last:
        url_of(last)
        with home.holder() as killed:
            url_of(killed)
            killed.kill()
        assert last.stdin
        last.stdin.close()
    assert not home.is_running()


def test_embedded_postgresql_refuses_path_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "My Documents"
    path.mkdir()
    asked = Home(path).ask()
    assert asked.returncode == 2
    assert asked.stderr.startswith(f"db.py: the embedded PostgreSQL cannot work in '{path}/pgdata': use a path without")
    assert not (path / "pgdata").exists()
