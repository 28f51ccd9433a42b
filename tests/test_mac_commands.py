"""The sender's commands, as the owner types them: each a real process."""

from __future__ import annotations

import json
import plistlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_messages
import mac_sender
import pytest
from mac_machine import ROOT, SENDER, TOKEN, Machine, mac_python, until

pytestmark = pytest.mark.mac

HANDLE = "+14155550123"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with Machine(tmp_path) as machine:
        yield machine
        if (tmp_path / "mac/agent.pid").exists():
            machine.call("uninstall")


def fresh(machine: Machine) -> None:
    """Leave in config.json only where the stand-ins are: nothing is installed."""
    (machine.home / "config.json").write_text(json.dumps(machine.programs))


def install(machine: Machine, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    return machine.call("install", text=f"{machine.server.url}\n{token}\n")


def test_from_nothing_to_a_first_message(machine: Machine) -> None:
    fresh(machine)
    done = install(machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    config = json.loads((machine.home / "config.json").read_text())
    assert (config["url"], config["token"], config["hardware_uuid"]) == (
        machine.server.url, TOKEN, fake_messages.HARDWARE_UUID,
    )  # fmt: skip
    machine.enqueue("Hello")
    until(machine.server.is_quiet)
    assert machine.messages.left() == [(HANDLE, "Hello")]
    for name in ("config.json", "journal.db", "sender.log"):
        assert (machine.home / name).stat().st_mode & 0o077 == 0
    assert not (machine.home / "ask").exists()


def test_the_agent_is_as_launchd_wants_it(machine: Machine) -> None:
    fresh(machine)
    install(machine)
    agent = plistlib.loads((machine.path / f"Library/LaunchAgents/{mac_sender.LABEL}.plist").read_bytes())
    assert agent["Label"] == mac_sender.LABEL
    assert agent["ProgramArguments"][1:] == [str(machine.home / "mac_sender.py"), "--home", str(machine.home), "run"]
    assert (agent["RunAtLoad"], agent["KeepAlive"], agent["LimitLoadToSessionType"]) == (True, True, "Aqua")
    assert (machine.home / "mac_sender.py").read_bytes() == SENDER.read_bytes()
    log = (machine.path / "mac/launchctl.log").read_text().splitlines()
    assert [line.split()[0] for line in log if line.startswith(("boot", "kick"))] == [
        "bootout",
        "bootstrap",
        "kickstart",
    ]


def test_the_token_is_in_no_argument_list_and_no_log(machine: Machine) -> None:
    fresh(machine)
    install(machine)
    machine.enqueue("A text that is nobody's business")
    until(machine.server.is_quiet)
    agent = (machine.path / "mac/agent.pid").read_text()
    lines = [Path(f"/proc/{agent}/cmdline").read_text()]
    log = (machine.home / "sender.log").read_text() + (machine.home / "stderr.log").read_text()
    for text in (*lines, log, (machine.path / "mac/launchctl.log").read_text()):
        assert TOKEN not in text
        assert HANDLE not in text
        assert "nobody's business" not in text


def test_install_again_keeps_what_it_does_not_ask_for(machine: Machine) -> None:
    machine.settings["pause_seconds"] = 5
    (machine.home / "config.json").write_text(json.dumps(machine.settings))
    assert machine.call("install", text="\n\n").returncode == 0
    config = json.loads((machine.home / "config.json").read_text())
    assert (config["pause_seconds"], config["token"]) == (5, TOKEN)
    assert config["installed_at"] == machine.settings["installed_at"]


def test_a_copied_folder_needs_a_token_of_its_own(machine: Machine) -> None:
    (machine.path / "mac/ioreg.txt").write_text('"IOPlatformUUID" = "00000000-0000-0000-0000-000000000000"')
    done = machine.call("install", text="\n\n")
    assert done.returncode == 2
    assert "a token of its own" in done.stderr


def test_install_clears_what_stopped_it(machine: Machine) -> None:
    machine.call("status")
    journal = mac_sender.Journal(machine.home / "journal.db")
    journal.stop("another Mac uses this token", 1.0)
    assert machine.call("install", text="\n\n").returncode == 0
    assert journal.stops() == []
    journal.close()


def test_uninstall_keeps_the_journal(machine: Machine) -> None:
    fresh(machine)
    install(machine)
    assert machine.call("uninstall").returncode == 0
    assert not (machine.home / "config.json").exists()
    assert not (machine.home / "mac_sender.py").exists()
    assert not list((machine.path / "Library/LaunchAgents").iterdir())
    assert (machine.home / "journal.db").exists()
    assert not (machine.path / "mac/agent.pid").exists()
    assert machine.call("uninstall").returncode == 0


CHECKS: list[tuple[str, Callable[[Machine], Any], str]] = [
    ("this Mac", lambda machine: file(machine, "ioreg.txt", ""), "belongs to another Mac"),
    ("session", lambda machine: file(machine, "manager.txt", "Background\n"), "no session of the desktop"),
    ("sleep", lambda machine: file(machine, "pmset.txt", " sleep   10\n"), "sudo pmset -a sleep 0"),
    ("chat.db", lambda machine: (machine.path / "mac/chat.db").unlink(), "open Messages and sign in"),
    ("Messages", lambda machine: file(machine, "permission.txt", "-1743\n"), "Privacy & Security > Automation"),
    ("Messages", lambda machine: machine.messages.expect(accounts=[]), "not signed in to iMessage"),
    ("server", lambda machine: setattr(machine.server, "token", "other"), "see `url` and `token`"),
    ("server", lambda machine: setattr(machine.server, "is_old", True), "upgrade the server"),
    ("server", lambda machine: setattr(machine.server, "skew", 90), "let both set date and time automatically"),
    ("agent", lambda machine: (machine.path / "mac/agent.pid").unlink(), "run `install` again"),
]


def file(machine: Machine, name: str, text: str) -> None:
    (machine.path / "mac" / name).write_text(text)


@pytest.mark.parametrize(("name", "break_it", "remedy"), CHECKS)
def test_doctor_names_a_remedy(machine: Machine, name: str, break_it: Callable[[Machine], Any], remedy: str) -> None:
    file(machine, "agent.pid", "999999999")
    assert machine.call("doctor").returncode == 0
    break_it(machine)
    done = machine.call("doctor")
    (machine.path / "mac/agent.pid").unlink(missing_ok=True)
    assert done.returncode == 1
    assert remedy in next(line for line in done.stdout.splitlines() if line.startswith(f"FAIL  {name}:"))


def test_doctor_prints_the_real_python(machine: Machine) -> None:
    assert str(Path(mac_python()).resolve()) in machine.call("doctor").stdout


def test_doctor_says_who_sends(machine: Machine) -> None:
    machine.messages.insert(HANDLE, "Hello", is_sent=1)
    machine.settings["send_as"] = "other@example.com"
    (machine.home / "config.json").write_text(json.dumps(machine.settings))
    done = machine.call("doctor")
    assert "messages leave from E:owner@example.com" in done.stdout
    assert "`send_as` is other@example.com" in done.stdout


def test_doctor_collects_nothing(machine: Machine) -> None:
    [row] = machine.enqueue("Hello")
    machine.call("doctor")
    assert row["collected_at"] is None


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"token": ""}, "`token` is missing"),
    ({"url": "host:3201"}, "`url` must look like"),
    ({"url": "http://user@host"}, "`url` must look like"),
    ({"poll_second": 3}, "there is no setting `poll_second`"),
    ({"poll_seconds": "3"}, "`poll_seconds` must be a float"),
    ({"ceiling_per_day": -1}, "must not be negative"),
    ({"ceiling_per_day": True}, "must be a int"),
    ({"address_form": "chat"}, "must be one of participant, buddy"),
    ({"sms": True}, "Switch off Send as Text Message"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["doctor", "run"])
def test_a_setting_that_cannot_be_is_named(machine: Machine, command: str, settings: Any, sentence: str) -> None:
    (machine.home / "config.json").write_text(json.dumps({**machine.settings, **settings}))
    done = machine.call(command)
    assert done.returncode == (1 if command == "doctor" else 2)
    assert sentence in done.stdout + done.stderr


def test_without_a_configuration_it_says_how_to_get_one(machine: Machine) -> None:
    (machine.home / "config.json").unlink()
    assert "run `python3 mac_sender.py install`" in machine.call("run").stderr
    (machine.home / "config.json").write_text("{")
    assert "run `install` again" in machine.call("run").stderr


def test_run_once_sends_one_message_and_ends(machine: Machine) -> None:
    machine.enqueue("One", "Two")
    assert machine.call("run", "--once").returncode == 0
    assert machine.messages.left() == [(HANDLE, "One")]
    assert machine.call("run", "--once").returncode == 0
    assert len(machine.messages.left()) == 2


def test_run_once_exits_1_with_a_problem(machine: Machine) -> None:
    machine.messages.expect(error=-600)
    assert machine.call("run", "--once").returncode == 1


def test_it_holds_a_power_assertion(machine: Machine) -> None:
    machine.call("run", "--once")
    assert (machine.path / "mac/caffeinate.log").read_text().startswith("-i -w ")


def test_one_sender_per_mac(machine: Machine) -> None:
    machine.start("run", script=SENDER)
    until(lambda: machine.server.requests)
    done = machine.call("run", "--once")
    assert done.returncode == 2
    assert "another sender runs" in done.stderr
    done = machine.call("test", HANDLE, text="y\n")
    assert done.returncode == 2


def test_sigterm_ends_it_wherever_it_is(machine: Machine) -> None:
    machine.enqueue(*(f"Message {number}" for number in range(6)))

    def has_gone_on(requests: int) -> bool:
        return len(machine.server.requests) >= requests

    for count in range(1, 7):
        process = machine.start()
        until(lambda: has_gone_on(5 * count))  # noqa: B023  # called at once
        process.terminate()
        assert process.wait(20) == 0
    machine.start()
    until(machine.server.is_quiet)
    assert machine.truth() == []


def test_status_says_what_it_waits_for(machine: Machine) -> None:
    machine.messages.expect(fake_messages.outbox())
    machine.enqueue("Hello")
    machine.start("run", script=SENDER)
    until(lambda: machine.call("status").stdout.count("row=outbox"))
    text = machine.call("status").stdout
    assert "Last poll: " in text
    assert "Problem: none" in text
    assert "Last 24 hours: 1 started" in text
    assert "to=+1415•••23" in text
    assert "Hello" not in text


def test_status_exits_1_with_a_problem(machine: Machine) -> None:
    machine.messages.expect(error=-600)
    machine.call("run", "--once")
    done = machine.call("status")
    assert done.returncode == 1
    assert "Problem: Messages cannot be started: open it by hand" in done.stdout


def test_release_lets_a_stopped_sender_go_on(machine: Machine) -> None:
    machine.server.is_old = True
    machine.start("run", script=SENDER)
    until(lambda: "upgrade" in (machine.server.problem or ""))
    assert "Stopped: the server is older" in machine.call("status").stdout
    machine.server.is_old = False
    assert machine.call("release").returncode == 0
    until(lambda: machine.server.problem is None)


def test_release_of_a_message_that_the_journal_does_not_have(machine: Machine) -> None:
    done = machine.call("release", "550e8400-e29b-41d4-a716-446655440000")
    assert done.returncode == 1
    assert "no such message" in done.stdout


def test_test_tries_the_forms_and_says_which_one_works(machine: Machine) -> None:
    machine.messages.expect({**fake_messages.sent(0.1, 0.2), "form": "buddy"}, times=None)
    machine.settings["address_form"] = "buddy"
    (machine.home / "config.json").write_text(json.dumps(machine.settings))
    done = machine.call("test", HANDLE, text="y\nn\n")
    assert done.returncode == 0
    assert "with the form `buddy`? [y/N]" in done.stdout
    assert "osascript: done 0 (which proves nothing)" in done.stdout
    assert "chat.db: row sent, service iMessage, so far: sent" in done.stdout
    assert "delivered" in done.stdout
    assert len(machine.messages.left()) == 1
    assert machine.server.requests == []


def test_test_names_the_form_to_use(machine: Machine) -> None:
    machine.messages.expect({**fake_messages.sent(0.1, 0.2), "form": "buddy"}, times=None)
    done = machine.call("test", HANDLE, text="n\ny\n")
    assert 'Write "address_form": "buddy" into config.json' in done.stdout


def test_test_sends_nothing_when_the_owner_says_no(machine: Machine) -> None:
    assert machine.call("test", HANDLE, text="\n\n").returncode == 1
    assert machine.messages.asked() == []


def test_test_refuses_what_is_no_address(machine: Machine) -> None:
    assert machine.call("test", "4155550123").returncode == 2
    assert machine.call("test", "chat123").returncode == 2


def test_test_says_why_nothing_was_started(machine: Machine) -> None:
    machine.messages.expect(error=-600)
    done = machine.call("test", HANDLE, text="y\ny\n")
    assert "not started: Messages cannot be started" in done.stdout


def test_a_bug_is_logged_without_its_text(machine: Machine) -> None:
    machine.server.pending = lambda query: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    done = subprocess.run(
        [mac_python(), "-c", "import sys; sys.argv = ['x', '--home', sys.argv[1], 'run']; import mac_sender as m\n"
         "def bad(*_): raise RuntimeError('a secret')\n"
         "m.Sender.round = bad\nsys.exit(m.main())", str(machine.home)],
        env={"PYTHONPATH": str(ROOT / "mac"), "HOME": str(machine.path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    log = (machine.home / "sender.log").read_text()
    assert done.returncode == 1
    assert "the sender failed error=RuntimeError" in log
    assert "secret" not in log + done.stderr + done.stdout


def test_without_apples_frameworks_the_permission_is_not_known(machine: Machine) -> None:
    """On a Mac this prints a number; the sender asks Messages itself where it cannot be had."""
    assert machine.call("permission").returncode == 1


@pytest.mark.parametrize("source", [
    'on run argv\nreturn "x"\n', "return 1", 'on run argv\nset a to chat id "any;-;+1"\nend run',
    'on run argv\ntell application "Messages"\nset a to 1st account whose service type = any\nend tell\nend run',
])  # fmt: skip
def test_the_stand_in_refuses_what_osascript_refuses(machine: Machine, source: str) -> None:
    done = subprocess.run([machine.programs["osascript"], "-e", source], capture_output=True, check=False)
    assert done.returncode == 1


def test_it_runs_under_an_old_python() -> None:
    """Which Python the tests of processes use; the linter checks the syntax and the library for 3.9."""
    version = subprocess.run([mac_python(), "--version"], capture_output=True, text=True, check=True).stdout
    if mac_python() == sys.executable:
        pytest.skip("no Python 3.9 on this host")
    assert version.startswith("Python 3.9.")
