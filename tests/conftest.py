"""Real PostgreSQL for every test. The server is the wheel's, or the one of TEST_DATABASE_URL.

The role that TEST_DATABASE_URL names must be allowed to create databases.

How tests are isolated from each other:

1. Two migrated databases are templates. Each has one clone, and the tests use the clones one after the other.
2. Before a test gets a clone, `Clone.reset` ends all other sessions in it, empties its tables and puts back the rows
   that `migrate` made. It does so before a test and not after it: the processes of the last test have ended by then.
3. Then it compares the catalogue with that of a clone that no test has used. If they differ (the last test changed
   the schema, or ran ANALYZE), or if anything failed, it drops the clone and makes a new one.

So a test may change whatever it likes in its databases. A test marked `new_clone` gets clones that no test has used
and nothing has emptied: their indexes have the statistics of a new installation.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import responses
import schedule
from helpers import ApiClient
from testing import (
    OWNER_TOKEN,
    SERVICE_TOKEN,
    Clone,
    Databases,
    DeviceClient,
    PrivatePostgres,
    Script,
    TestData,
    numbers,
    on_database,
    running_postgres,
)

import db
import dispatcher
import outreach_server
import quiet_times
import send_queue_server
import serving

pytest_plugins = ["browser", "page_browser"]


@contextlib.contextmanager
def fast_postgres() -> Iterator[str]:
    """The URL of a PostgreSQL for all tests, which is fast rather than safe."""
    with running_postgres() as postgres:
        with contextlib.closing(db.connect(postgres.url)) as server:
            # No test cuts the power: so the disk need not be waited for.
            db.query(server, "ALTER SYSTEM SET fsync = off")
            # Autovacuum would bring statistics at another moment each day.
            db.query(server, "ALTER SYSTEM SET autovacuum = off")
            db.query(server, "SELECT pg_reload_conf()")
        yield postgres.url


# Without a seed, hypothesis tries the same examples every day. A slow host is no reason to fail.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("chance", derandomize=False, deadline=None, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """Choose hypothesis' profile, and start one server for all workers of `pytest -n`: they inherit its URL."""
    hypothesis.settings.load_profile("chance" if config.getoption("--hypothesis-seed") else "same")
    if config.getoption("numprocesses", None) and not os.environ.get("TEST_DATABASE_URL"):
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        os.environ["TEST_DATABASE_URL"] = stack.enter_context(fast_postgres())


# The files that `make owner-test` runs.
OWNER_TESTS = {
    "alert", "approved", "audience", "audience_rows", "composing", "composing_clients", "composing_recipients",
    "composing_whole", "compositions", "importing", "metrics", "openapi_owner", "outreach", "outreach_server",
    "owner_opt_outs", "packaging", "page", "page_new", "page_people", "page_settings", "page_today", "personal_data",
    "quiet_times", "repeats", "screens", "sessions", "settings", "templates", "unusual", "uploads", "zones",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of what the owner uses, and those in a browser: all together they take longer than two minutes."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("page")
        elif item.path.stem.removeprefix("test_") in OWNER_TESTS:
            item.add_marker("owner")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker of `pytest -n` the same tests, in the same order, every day.

    Of three workers, the second gets the second, the fifth and the eighth test, and so on. Without this, a test would
    follow whichever test happened to end first.
    """
    scheduler = importlib.import_module("xdist.scheduler")

    class FixedShares(scheduler.LoadScopeScheduling):  # type: ignore[name-defined, misc]  # not imported without -n
        def _split_scope(self, nodeid: str) -> str:
            return str(self.collection.index(nodeid) % self.numnodes)

    return FixedShares(config, log)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test find what a new process finds: no decision logged, no job scheduled, no quiet hours read.

    The client of the server does not pause between its attempts.
    """
    monkeypatch.setattr(dispatcher, "decision_log", dispatcher.DecisionLog())
    monkeypatch.setattr(dispatcher, "RETRY_PAUSE", 0)
    monkeypatch.setattr(quiet_times.logger, "disabled", False)  # status.main() disables it for its process
    quiet_times.read.cache_clear()
    dispatcher.stop.clear()
    schedule.clear()
    yield
    dispatcher.stop.clear()
    schedule.clear()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The number from which all chance of `make faults` follows."""
    return int(request.config.getoption("--hypothesis-seed") or 1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that tests may fill with databases."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        with fast_postgres() as url:
            yield url


@pytest.fixture(scope="session")
def templates(postgres: str) -> Iterator[dict[db.DatabaseName, str]]:
    """The names of two migrated databases to clone."""
    names: dict[db.DatabaseName, str] = {part: f"template_{part}_{os.getpid()}" for part in db.URL_VARIABLES}
    with contextlib.closing(db.connect(postgres)) as server:
        for part, name in names.items():
            db.query(server, f"CREATE DATABASE {name}")
            db.migrate(on_database(postgres, name), part)
        yield names
        for name in names.values():
            db.query(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def clones(postgres: str, templates: dict[db.DatabaseName, str]) -> Iterator[dict[db.DatabaseName, Clone]]:
    """The pair of databases that the tests use in turn."""
    pair = {part: Clone(postgres, template) for part, template in templates.items()}
    yield pair
    for clone in pair.values():
        clone.drop()


@pytest.fixture
def databases(
    clones: dict[db.DatabaseName, Clone], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Databases:
    """Two databases as migrate leaves them, named in the environment as a script would find them."""
    for part, clone in clones.items():
        if request.node.get_closest_marker("new_clone"):
            clone.drop()
            clone.make()
        else:
            clone.reset()
        monkeypatch.setenv(db.URL_VARIABLES[part], clone.url)
    quinn, icloud = clones["quinn"], clones["icloud"]
    return Databases(quinn.url, icloud.url, quinn.conn, icloud.conn)


@pytest.fixture
def empty_database(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of one empty database, which the environment names for both parts."""
    name = f"test_empty_{os.getpid()}_{next(numbers)}"
    with contextlib.closing(db.connect(postgres)) as server:
        db.query(server, f"CREATE DATABASE {name}")
        for variable in db.URL_VARIABLES.values():
            monkeypatch.setenv(variable, on_database(postgres, name))
        yield on_database(postgres, name)
        db.query(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def private_postgres() -> Iterator[PrivatePostgres]:
    """A running PostgreSQL that no other test uses, with both parts in its one database."""
    with running_postgres() as postgres:
        yield postgres


@pytest.fixture
def world(databases: Databases) -> TestData:
    return TestData(databases)


@contextlib.contextmanager
def running_server(app: serving.Application, uploads: Sequence[serving.Upload] = ()) -> Iterator[str]:
    """Serve on a free port, in a thread of this process; yield the URL."""
    listening = serving.listen("127.0.0.1", 0)
    server = serving.Server(app, [listening], threads=4, uploads=uploads)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:  # else a test that fails in a `with` would leave a thread for which the process waits
        server.stop()
        thread.join()
        server.close()


@pytest.fixture
def base_url(databases: Databases) -> Iterator[str]:
    """The send queue server on a real socket, over the test's databases."""
    app = send_queue_server.make_app(db.RetryingConnection(databases.icloud_url), SERVICE_TOKEN)
    with running_server(app) as url:
        yield url


@pytest.fixture
def device_id(world: TestData) -> str:
    """A device whose token is its name, mac-mini."""
    return world.device("mac-mini")


@pytest.fixture
def mini(base_url: str, device_id: str) -> DeviceClient:
    """That device's client of the server."""
    return DeviceClient(base_url)


@pytest.fixture
def mac_sync(base_url: str) -> Iterator[dispatcher.SendQueueClient]:
    """The dispatcher's client of that server."""
    client = dispatcher.SendQueueClient(base_url, SERVICE_TOKEN)
    yield client
    client.session.close()


@pytest.fixture
def admin(base_url: str) -> ApiClient:
    """A client of that server with the service token."""
    return ApiClient(base_url, SERVICE_TOKEN)


@pytest.fixture
def owner_url(databases: Databases) -> Iterator[str]:
    """The outreach server on a real socket, over the test's databases."""
    api = outreach_server.Api(OWNER_TOKEN, databases.quinn_url, databases.icloud_url, timedelta(seconds=30))
    with running_server(outreach_server.make_app(api), [outreach_server.api_upload(OWNER_TOKEN)]) as url:
        yield url


@pytest.fixture
def owner(owner_url: str) -> ApiClient:
    """A client of that server with the owner's token."""
    return ApiClient(owner_url, OWNER_TOKEN)


@pytest.fixture
def mac(base_url: str, mac_id: str) -> ApiClient:
    """A client of that server with the token of the device `mac_id`."""
    return ApiClient(base_url, "mac-mini")


@pytest.fixture
def mac_id(world: TestData) -> str:
    """The id of a device."""
    return world.device("mac-mini")


@pytest.fixture
def mock_server() -> Iterator[responses.RequestsMock]:
    """A mock of the server at `helpers.MOCK_ENQUEUE`, for responses that the real server never gives."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """start("dispatcher.py", "--once", LOG_LEVEL="DEBUG"): a script that is killed after the test at the latest."""
    scripts: list[Script] = []

    def start_script(*arguments: str, **environment: str) -> Script:
        scripts.append(Script(tmp_path / f"{len(scripts)}.log", *arguments, **environment))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.process.kill()
        script.process.wait()


@pytest.fixture
def server(databases: Databases, start: Callable[..., Script]) -> tuple[Script, str]:
    """The send queue server as a real process on a free port, and its base URL."""
    script = start("send_queue_server.py", SEND_QUEUE_PORT="0")
    return script, f"http://127.0.0.1:{script.port()}"
