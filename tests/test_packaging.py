"""Build the wheel, install it into an environment of its own, and run each of its commands there, without a network."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from testing import OWNER_TOKEN, ROOT, SERVICE_TOKEN, wait_until

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


class Installation:
    """A virtual environment with the wheel; its directory `elsewhere` is where the commands run."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        self.bin, self.elsewhere = directory / "bin", directory / "elsewhere"
        venv.create(directory, with_pip=False)
        self.elsewhere.mkdir()
        python = str(self.bin / "python")
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(wheel))
        # The packages that the wheel needs come from the tests' environment. This does not read that environment's own
        # .pth files, one of which leads to the modules of this clone.
        [packages] = directory.glob("lib/python*/site-packages")
        needed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (packages / "needed.pth").write_text("\n".join(needed))

    def run(self, command: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.bin / command, *arguments],
            cwd=self.elsewhere, env={**os.environ, **environment},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory))
    [wheel] = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installation:
    return Installation(tmp_path_factory.mktemp("installation"), wheel)


@pytest.fixture
def server(
    installation: Installation, empty_database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[str]:
    """The URL of an installed server, over a database that the installed command has migrated."""
    assert installation.run("send-queue-db", "migrate").returncode == 0
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [installation.bin / request.param],
            cwd=installation.elsewhere, stderr=stderr,
            env={
                **os.environ, "MAC_SYNC_SERVICE_TOKEN": SERVICE_TOKEN, "OUTREACH_OWNER_TOKEN": OWNER_TOKEN,
                "SEND_QUEUE_PORT": "0", "OUTREACH_PORT": "0",
            },
        )  # fmt: skip
    try:
        wait_until(lambda: "listening" in log.read_text() or process.poll() is not None, seconds=30)
        yield f"http://127.0.0.1:{log.read_text().partition('port=')[2].split()[0]}"
    finally:
        process.terminate()
        process.wait(15)


def test_wheel_has_the_modules_and_the_files_that_they_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    pages = [path for path in ROOT.glob("pages/**/*") if path.is_file() and "__pycache__" not in path.parts]
    files = [*ROOT.glob("*.py"), ROOT / "schema.sql", *pages]
    assert names == {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_each_command_runs_from_the_wheel(installation: Installation, command: str) -> None:
    done = installation.run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command} ")


def test_wheel_and_not_this_clone_is_run(installation: Installation) -> None:
    done = installation.run("python", "-c", "import db, runtime; print(db.__file__, runtime.DATA_DIR)")
    module, data = done.stdout.split()
    assert Path(module).is_relative_to(installation.bin.parent)
    assert Path(data) == installation.elsewhere, "an upgrade would delete what is beside the modules"


def test_installed_migrate_makes_the_tables(installation: Installation, empty_database: str) -> None:
    done = installation.run("send-queue-db", "migrate")
    assert done.returncode == 0, done.stderr
    assert "icloud: made table send_queue\n" in done.stdout
    assert "quinn: made table outreach_batches\n" in done.stdout
    assert installation.run("send-queue-db", "migrate").stdout == "icloud: nothing to do\nquinn: nothing to do\n"
    assert installation.run("send-queue-status").stdout.startswith("Dispatcher not running")
    once = installation.run("outreach-dispatcher", "--once", MAC_SYNC_SERVICE_TOKEN=SERVICE_TOKEN)
    assert once.returncode == 0, once.stderr
    assert installation.run("send-queue-status").stdout.startswith(("Nothing to send.", "Held: quiet hours"))


def test_installed_command_reads_the_working_directory_and_names_a_bad_setting(installation: Installation) -> None:
    (installation.elsewhere / ".env").write_text("QUINN_DB_URL=postgresql://nobody@/nowhere\n")
    done = installation.run("send-queue-db", "url", QUINN_ICLOUD_DB_URL="")
    (installation.elsewhere / ".env").unlink()
    assert done.returncode == 2
    assert done.stderr.startswith("send-queue-db: QUINN_ICLOUD_DB_URL is not set")


@pytest.mark.parametrize("server", ["send-queue-server", "outreach-server"], indirect=True)
def test_installed_server_serves(server: str) -> None:
    assert requests.get(f"{server}/healthz", timeout=10).json()["data"] == {"status": "ok"}
