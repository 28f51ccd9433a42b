"""Real PostgreSQL for every test: a template of the migrated databases, cloned for each test that asks.

The server is the wheel's, or the one that TEST_DATABASE_URL names (a role that may create databases).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testing import SERVICE_TOKEN, Databases, PrivatePostgres, Script, TestData, numbers, on_database

import db
import dispatcher
import send_queue_server
import serving


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a PostgreSQL server that tests may fill with databases."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        return url
    url = db.embedded(tmp_path_factory.mktemp("postgres"))
    with contextlib.closing(db.connect(url)) as server:
        # No test cuts the power: so the disk need not be waited for.
        db.query(server, "ALTER SYSTEM SET fsync = off")
        db.query(server, "SELECT pg_reload_conf()")
    return url


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


@pytest.fixture
def databases(
    postgres: str, templates: dict[db.DatabaseName, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Databases]:
    """Two fresh databases, named in the environment as a script would find them."""
    names = {part: f"test_{part}_{os.getpid()}_{next(numbers)}" for part in db.URL_VARIABLES}
    urls = {part: on_database(postgres, name) for part, name in names.items()}
    with contextlib.closing(db.connect(postgres)) as server:
        # A third of the time that the default takes; before 15 it is the only way.
        strategy = "STRATEGY file_copy" if server.server_version >= 150_000 else ""
        for part, name in names.items():
            db.query(server, f"CREATE DATABASE {name} TEMPLATE {templates[part]} {strategy}")
            monkeypatch.setenv(db.URL_VARIABLES[part], urls[part])
        with (
            contextlib.closing(db.connect(urls["quinn"])) as quinn,
            contextlib.closing(db.connect(urls["icloud"])) as icloud,
        ):
            yield Databases(urls["quinn"], urls["icloud"], quinn, icloud)
        for name in names.values():
            db.query(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def private_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivatePostgres]:
    """A running PostgreSQL that no other test uses, with both parts in its one database."""
    postgres = PrivatePostgres(tmp_path_factory.mktemp("private"))
    yield postgres
    postgres.server.cleanup()


@pytest.fixture
def world(databases: Databases) -> TestData:
    return TestData(databases)


@pytest.fixture
def base_url(databases: Databases) -> Iterator[str]:
    """The send queue server on a real socket, in a thread of this process, over the test's databases."""
    app = send_queue_server.make_app(db.RetryingConnection(databases.icloud_url), SERVICE_TOKEN)
    listening = serving.listen("127.0.0.1", 0)
    server = serving.Server(app, [listening], threads=4)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.stop()
    thread.join()
    server.close()


@pytest.fixture
def mac_sync(base_url: str) -> Iterator[dispatcher.SendQueueClient]:
    """The dispatcher's client of that server."""
    client = dispatcher.SendQueueClient(base_url, SERVICE_TOKEN)
    yield client
    client.session.close()


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
