"""Check the owner's command line: what it prints, asks and refuses, and its exit status."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_script
from testing import ROOT, TestData

import outreach

PEOPLE = "Name;Telefon;Stadt\nMaya;+49 170 1234567;Berlin\nTom;0170 7654321;Bonn\nAnna;1;Bonn\n"
ESCAPE = "\x1b"
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")  # colours, and the bar's own cursor movements

Write = Callable[[str], str]


@pytest.fixture(autouse=True)
def region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGION", "DE")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write people.csv; return its path."""

    def write_file(text: str) -> str:
        path = tmp_path / "people.csv"
        path.write_text(text)
        return str(path)

    return write_file


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process, piped; return its status, stdout and stderr."""
    try:
        status = outreach.main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    said = capsys.readouterr()
    return status, said.out, said.err


class Typist:
    """Run the script on a pseudo-terminal, and type."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
            os.execve(sys.executable, [sys.executable, "outreach.py", *arguments], environment)  # noqa: S606
        self.seen = ""

    def read_until(self, phrase: str, seconds: float = 20) -> str:
        """Read until `phrase` is there, or the process ends if it is empty; return all that was printed."""
        end = time.monotonic() + seconds
        while not phrase or phrase not in self.text():
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:  # Linux: the other end is closed
                    data = b""
                if not data:
                    assert not phrase, self.seen
                    break
                self.seen += data.decode()
        return self.text()

    def text(self) -> str:
        return ANSI.sub("", self.seen).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Read the rest, and return the exit status."""
        self.read_until("")
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def names(world: TestData) -> list[str]:
    return [name for (name,) in world.quinn("SELECT name FROM clients ORDER BY name")]


# --- import -------------------------------------------------------------------------------------------


def test_an_import_first_shows_what_it_would_do(
    world: TestData, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "import", write(PEOPLE))
    assert status == 1
    assert err == "Nothing is imported. To import it, add --yes\n"
    assert re.search(r"Stadt +client\.stadt", out)
    assert re.search(r"2 +new", out)
    assert "Handles: 2 as Germany, 1 not readable." in out
    assert re.search(r"4 +Telefon '1': it is neither one phone number", out)
    assert names(world) == []


def test_yes_imports(world: TestData, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "import", write(PEOPLE), "--yes")
    assert (status, out.splitlines()[-1]) == (0, "Imported: 2 new clients, 0 changed.")
    assert names(world) == ["Maya", "Tom"]
    status, out, _ = run(capsys, "import", write(PEOPLE), "--yes")
    assert (status, out.splitlines()[-1]) == (0, "Nothing to import: 2 people known, and no change.")


def test_strict_imports_nothing_if_a_line_is_bad(
    world: TestData, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "import", write(PEOPLE), "--yes", "--strict")
    assert (status, "1 line is bad, so nothing is imported" in err) == (1, True)
    assert names(world) == []


def test_changes_are_shown(world: TestData, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "import", write(PEOPLE), "--yes")
    _, out, _ = run(capsys, "import", write(PEOPLE.replace("Maya", "Maja").replace("Berlin", "Köln")))
    assert re.search(r"2 +name +Maya +Maja", out)
    assert re.search(r"2 +stadt +Berlin +Köln", out)
    assert "1 of 2 people would be renamed." in out


MANY = "name,phone\n" + "".join(f"Person {i},0170 {1000000 + i}\n" for i in range(30))
RENAMED = MANY.replace("Person", "Somebody")


def test_many_renames_need_their_number(world: TestData, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "import", write(MANY), "--yes")
    path = write(RENAMED)
    status, _, err = run(capsys, "import", path, "--yes")
    assert (status, err) == (
        1,
        "Nothing is imported. This renames 30 of 30 people. If that is right, add --yes --renames 30\n",
    )
    assert run(capsys, "import", path, "--yes", "--renames", "29")[0] == 1
    assert names(world)[0] == "Person 0"
    assert run(capsys, "import", path, "--yes", "--renames", "30")[0] == 0
    assert names(world)[0] == "Somebody 0"


def test_json_is_one_document(world: TestData, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "import", write(PEOPLE), "--json")
    document = json.loads(out)
    assert (status, document["applied"], document["plan"]["new"]) == (1, None, 2)
    status, out, _ = run(capsys, "import", write(PEOPLE), "--json", "--yes")
    assert json.loads(out)["applied"] == {"made": 2, "changed": 0, "same": 0, "bad": 1}


@pytest.mark.parametrize(
    ("text", "status", "sentence"),
    [
        ("", 1, "the file is empty"),
        ("name,city\nMaya,Berlin\n", 1, "no column is called phone"),
        ("name,phone\n", 0, ""),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence(
    world: TestData, write: Write, capsys: pytest.CaptureFixture[str], text: str, status: int, sentence: str
) -> None:
    ended, _, err = run(capsys, "import", write(text), "--yes")
    assert ended == status
    assert sentence in err
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_a_wrong_use(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "import", "nowhere.csv")
    assert (status, err.startswith("outreach.py: nowhere.csv cannot be read (No such file")) == (2, True)


def test_bad_lines_lists_all(world: TestData, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("name,phone\n" + "Maya,1\n" * 50)
    assert "and 30 more: --bad-lines lists all" in run(capsys, "import", path)[1]
    out = run(capsys, "import", path, "--bad-lines")[1]
    assert re.search(r"\n +51 +phone", out)


def test_columns_and_encoding_can_be_named(world: TestData, tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_bytes("wer;nummer;rest\nJürgen;0170 1234567;x\n".encode("cp1252"))
    options = ["--handle", "nummer", "--name", "wer", "--ignore", "rest", "--encoding", "windows-1252", "--yes"]
    ended = run_script("outreach.py", "import", str(path), *options)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert world.quinn("SELECT name, attributes FROM clients") == [("Jürgen", {})]


def test_a_pipe_can_be_imported(world: TestData) -> None:
    command = f"printf 'name,phone\\nMaya,0170 1234567\\n' | {sys.executable} outreach.py import /dev/stdin --yes"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert names(world) == ["Maya"]


# --- search, draft ------------------------------------------------------------------------------------

TEMPLATE = "Hello {{ client.name }}, this is Ana from Blue Salon. {{ vars.code }}\nReply STOP to opt out.\n"
BERLIN = ("--where", "stadt=Berlin")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The path of a template."""
    path = tmp_path / "text.txt"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture
def crowd(world: TestData, write: Write, capsys: pytest.CaptureFixture[str]) -> TestData:
    """Three people in Berlin, one of whom opted out, one without a name; one in Bonn."""
    people = "Name;Telefon;Stadt;Besuche\nMaya;0170 1234560;Berlin;9\nTom;0170 1234561;Berlin;10\n"
    people += ";0170 1234562;Berlin;11\nAnna;0170 1234563;Bonn;1\n"
    assert run(capsys, "import", write(people), "--yes")[0] == 0
    world.icloud("INSERT INTO icloud.opt_outs (handle_key, source) VALUES ('+491701234561', 'owner')")
    return world


def draft(capsys: pytest.CaptureFixture[str], text: str, *options: str) -> dict[str, Any]:
    """Write a draft to everyone in Berlin; return its JSON."""
    status, out, err = run(capsys, "draft", *BERLIN, "--template", text, "--var", "code=SPRING", "--json", *options)
    assert status == 0, err
    return dict(json.loads(out))


def batch_status(world: TestData) -> str:
    return str(world.quinn("SELECT status FROM outreach_batches")[0][0])


def test_search_says_who_is_meant_and_who_is_left_out(
    crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "search", *BERLIN, "--template", text, "--var", "code=X")
    assert status == 0
    assert "3 people match. 1 would get a message." in out
    assert re.search(r"1 +opted out +Tom", out)
    assert re.search(r"1 +a variable of the text is empty +\+491701234562", out)


def test_the_people_of_one_reason_are_listed(crowd: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "search", *BERLIN, "--list", "optedOut")
    assert (status, "Tom" in out, "+491701234561" in out) == (0, True, True)
    out = run(capsys, "search", *BERLIN, "--list", "optedOut", "--json")[1]
    assert [person["name"] for person in json.loads(out)["entries"]] == ["Tom"]
    status, _, err = run(capsys, "search", *BERLIN, "--list", "tired")
    assert (status, "there is no reason 'tired'" in err) == (1, True)


@pytest.mark.parametrize(
    ("options", "matched"),
    [
        (["--where", "stadt=Berlin"], 3),
        (["--where", "stadt=Berlin", "--where", "besuche>=10"], 2),
        (["--where", "besuche>9"], 2),
        (["--where", "besuche<2"], 1),
        (["--where", "besuche<=9"], 2),
        (["--where", "stadt!=Berlin"], 1),
        (["--where", "stadt~onn"], 1),
        (["--where", "name="], 1),
        (["--where", "name!="], 3),
        (["--everyone"], 4),
        (["--query", '{"v": 1, "where": {"field": "stadt", "in": ["Bonn", "Berlin"]}}'], 4),
    ],
)
def test_an_audience_is_asked_for(
    crowd: TestData, capsys: pytest.CaptureFixture[str], options: list[str], matched: int
) -> None:
    status, out, err = run(capsys, "search", "--json", *options)
    assert status == 0, err
    assert json.loads(out)["matched"] == matched


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        ([], 2, "say who is meant"),
        (["--where", "Berlin"], 2, "write FIELD=VALUE"),
        (["--where", "town=Berlin"], 1, "town"),
        (["--query", "{"], 2, "--query is no JSON"),
        (["--query", "[]"], 2, "--query must be an object"),
        (["--query", "{}"], 1, "v"),
        (["--everyone", "--not-sent-within", "0"], 2, "--not-sent-within"),
        (["--everyone", "--template", "nowhere.txt"], 2, "--template nowhere.txt cannot be read"),
        (["--everyone", "--var", "code"], 2, "write KEY=VALUE"),
    ],
)
def test_a_wrong_audience_is_a_sentence(
    crowd: TestData, capsys: pytest.CaptureFixture[str], options: list[str], status: int, sentence: str
) -> None:
    ended, _, err = run(capsys, "search", *options)
    assert ended == status
    assert sentence in err
    assert "Traceback" not in err


def test_a_draft_is_written_and_shown(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "draft", *BERLIN, "--template", text, "--var", "code=SPRING", "--name", "Spring")
    assert status == 0
    assert "Spring (draft)" in out
    assert "Hello Maya, this is Ana from Blue Salon. SPRING" in out
    [(batch_id, name, created_by)] = crowd.quinn("SELECT id, name, created_by FROM outreach_batches")
    assert (name, created_by) == ("Spring", "outreach.py")
    assert f"python outreach.py send {batch_id}" in out
    assert crowd.quinn("SELECT rendered_body FROM outreach_batch_items") == [
        ("Hello Maya, this is Ana from Blue Salon. SPRING\nReply STOP to opt out.",)
    ]


def test_a_dry_run_writes_nothing(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--template", text, "--var", "code=SPRING", "--dry-run"]
    status, out, _ = run(capsys, "draft", *BERLIN, *options)
    assert (status, "Hello Maya" in out, out.splitlines()[-1]) == (0, True, "Nothing was written.")
    assert crowd.quinn("SELECT count(*) FROM outreach_batches") == [(0,)]


def test_a_template_is_read_from_a_pipe(crowd: TestData) -> None:
    arguments = [sys.executable, "outreach.py", "draft", *BERLIN, "--template", "-", "--var", "code=X", "--json"]
    ended = subprocess.run(arguments, cwd=ROOT, input=TEMPLATE, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(ended.stdout)["items"] == 1, ended.stderr


def test_the_same_draft_with_its_id_is_written_once(
    crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_id = "0d8b43c7-53ad-4d52-a3a2-06b2b2b5a1f4"
    first = draft(capsys, text, "--id", batch_id)
    assert draft(capsys, text, "--id", batch_id)["digest"] == first["digest"]
    assert crowd.quinn("SELECT id FROM outreach_batches") == [(batch_id,)]


def test_times_without_an_offset_are_the_owners(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    crowd.settings(quiet_hours_tz="Europe/Berlin")
    draft(capsys, text, "--send-from", "2030-07-01 09:00", "--send-until", "2030-07-02T09:00Z", "--first", "5")
    sql = "SELECT send_from AT TIME ZONE 'UTC', send_until AT TIME ZONE 'UTC', first_n FROM outreach_batches"
    [(begin, end, first)] = crowd.quinn(sql)
    assert (f"{begin:%H:%M}", f"{end:%H:%M}", first) == ("07:00", "09:00", 5)


@pytest.mark.parametrize(
    ("template", "options", "status", "sentence"),
    [
        ("Hello {{ client.nmae }}", [], 1, "line 1, column 10"),
        ("Hello {{ client.name", [], 1, "line 1"),
        ("", [], 2, "is empty: write the text"),
        ("Hello", ["--send-from", "tomorrow"], 2, "'tomorrow' is no time"),
        (
            "Hello",
            ["--send-from", "2030-07-02", "--send-until", "2030-07-01"],
            2,
            "--send-until must be after --send-from",
        ),
        ("Hello", ["--first", "0"], 2, "--first"),
        ("Hello", ["--id", "7"], 2, "is no id of a batch"),
    ],
)
def test_a_wrong_draft_is_a_sentence(
    crowd: TestData, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, options: list[str],
    status: int, sentence: str,
) -> None:  # fmt: skip
    path = tmp_path / "wrong.txt"
    path.write_text(template)
    ended, _, err = run(capsys, "draft", *BERLIN, "--template", str(path), *options)
    assert (ended, sentence in err) == (status, True), err
    assert "Traceback" not in err
    assert crowd.quinn("SELECT count(*) FROM outreach_batches") == [(0,)]


# --- send, and the verbs ------------------------------------------------------------------------------


def test_sending_needs_the_number_of_recipients(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch_id = draft(capsys, text)["id"]
    status, out, err = run(capsys, "send", batch_id)
    assert (status, "Hello Maya" in out) == (1, True)
    assert err == "Nothing is sent. To send to 1 person: --yes --recipients 1\n"
    assert run(capsys, "send", batch_id, "--yes")[0] == 1
    status, _, err = run(capsys, "send", batch_id, "--yes", "--recipients", "2")
    assert (status, "it has 1 recipient, not 2" in err) == (1, True)
    assert batch_status(crowd) == "draft"
    status, out, _ = run(capsys, "send", batch_id, "--yes", "--recipients", "1", "--first", "1")
    assert status == 0
    assert out.startswith("It is being sent to 1 person. It pauses after 1.")
    assert crowd.quinn("SELECT status, first_n FROM outreach_batches") == [("sending", 1)]
    assert run(capsys, "send", batch_id, "--yes", "--recipients", "1")[0] == 0  # a double click


def test_sending_refuses_another_digest(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = draft(capsys, text)
    options = [made["id"], "--yes", "--recipients", "1", "--digest"]
    status, _, err = run(capsys, "send", *options, "0" * 64)
    assert (status, "this is not the batch that you have seen" in err) == (1, True)
    assert run(capsys, "send", *options, made["digest"])[0] == 0


def test_on_a_terminal_the_number_of_recipients_is_typed(
    crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_id = draft(capsys, text)["id"]
    typist = Typist("send", batch_id)
    typist.read_until("Send to 1 person? Type 1 to go on:")
    assert "Hello Maya, this is Ana" in typist.text()
    typist.type("2\n")
    assert typist.end() == 1
    assert batch_status(crowd) == "draft"
    typist = Typist("send", batch_id, "--first", "1")
    typist.read_until("Send to 1 person? It pauses after 1. Type 1 to go on:")
    typist.type("1\n")
    assert typist.end() == 0
    assert batch_status(crowd) == "sending"


def test_a_test_goes_to_the_owner(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    crowd.device()
    batch_id = draft(capsys, text)["id"]
    assert run(capsys, "test", batch_id, "--to", "0170 9999999")[0] == 0
    [(to, body)] = crowd.icloud("SELECT to_handle, body FROM icloud.send_queue")
    assert (to, body.startswith("Hello Maya")) == ("+491709999999", True)
    status, _, err = run(capsys, "test", batch_id, "--to", "me")
    assert (status, "'me' is no handle" in err) == (1, True)


def test_a_batch_is_paused_resumed_and_cancelled(
    crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_id = draft(capsys, text)["id"]
    status, _, err = run(capsys, "pause", batch_id)
    assert (status, "the batch is draft" in err) == (1, True)
    run(capsys, "send", batch_id, "--yes", "--recipients", "1")
    device_id = crowd.device()
    [(item_id,)] = crowd.quinn("UPDATE outreach_batch_items SET status = 'queued', queued_at = now() RETURNING id")
    crowd.row(device_id, batch_item_id=item_id)
    assert run(capsys, "pause", batch_id)[1] == "The batch is paused. 1 message was taken back.\n"
    assert run(capsys, "resume", batch_id)[0] == 0
    assert batch_status(crowd) == "sending"
    crowd.row(device_id, batch_item_id=item_id, collected_at="now")
    _, out, _ = run(capsys, "cancel", batch_id)
    assert "0 messages were taken back. 1 message cannot be taken back: a Mac has collected" in out
    assert batch_status(crowd) == "cancelled"
    assert run(capsys, "resume", batch_id)[0] == 1


def test_resume_says_what_to_check_first(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch_id = draft(capsys, text)["id"]
    run(capsys, "send", batch_id, "--yes", "--recipients", "1")
    crowd.quinn("UPDATE outreach_batches SET status = 'paused', pause_reason = 'the last 5 messages failed'")
    assert "Check first: Look at the reasons of the failures" in run(capsys, "show", batch_id)[1]
    typist = Typist("resume", batch_id)
    typist.read_until("Check first: Look at the reasons of the failures")
    typist.read_until("Type resume to go on:")
    typist.type("\n")
    assert typist.end() == 1
    assert batch_status(crowd) == "paused"
    assert run(capsys, "resume", batch_id)[0] == 0
    assert batch_status(crowd) == "sending"


def test_retry_refuses_a_message_that_may_yet_leave(
    crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_id = draft(capsys, text)["id"]
    crowd.watched_outcome(crowd.quinn("SELECT id FROM outreach_batch_items")[0][0])
    status, _, err = run(capsys, "retry", batch_id, "--include-unknown")
    assert (status, "the Mac still watches 1 message, which may yet leave. Try again after" in err) == (1, True)
    assert crowd.statuses() == ["failed"]


def test_failed_messages_are_retried(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch_id = draft(capsys, text)["id"]
    crowd.quinn("UPDATE outreach_batches SET status = 'sent'")
    crowd.quinn("UPDATE outreach_batch_items SET status = 'failed', outcome_unknown_at = now()")
    status, out, _ = run(capsys, "retry", batch_id)
    assert (status, "1 message may have been sent" in out) == (0, True)
    out = run(capsys, "retry", batch_id, "--include-unknown")[1]
    assert out.startswith("1 message will be tried again; the batch is sending.")
    assert crowd.statuses() == ["pending"]


def test_batches_are_listed_and_shown(crowd: TestData, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no batch." in run(capsys, "list")[1]
    batch_id = draft(capsys, text, "--name", "Spring")["id"]
    assert re.search(rf"{batch_id} +Spring +draft +1 +0", run(capsys, "list")[1])
    out = run(capsys, "show", batch_id)[1]
    assert "3 people match. 1 would get a message." in out
    assert "Hello Maya" in out
    assert json.loads(run(capsys, "show", batch_id, "--json")[1])["counts"]["pending"] == 1
    out = run(capsys, "show", batch_id, "--items")[1]
    assert out.startswith("+491701234560 (pending, item ")
    assert "There is none." in run(capsys, "show", batch_id, "--items", "--status", "failed")[1]


def test_a_batch_that_was_made_by_hand_is_shown(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    batch_id = world.batch(clients=2)
    status, out, _ = run(capsys, "show", batch_id)
    assert (status, "2 pending" in out) == (0, True)


@pytest.mark.parametrize(
    "command",
    [
        ("show",), ("show", "--items"), ("send", "--yes", "--recipients", "1"), ("pause",), ("resume",), ("cancel",),
        ("retry",), ("test", "--to", "+491709999999"),
    ],
)  # fmt: skip
def test_a_batch_that_is_not_there_is_a_sentence(
    world: TestData, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    name, *options = command
    status, _, err = run(capsys, name, "0d8b43c7-53ad-4d52-a3a2-06b2b2b5a1f4", *options)
    assert (status, "there is no batch 0d8b43c7" in err) == (1, True)


@pytest.mark.parametrize("command", ["send", "show", "draft"])
def test_escape_sequences_of_names_do_not_reach_the_terminal_from_a_draft(
    world: TestData, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    client_id = world.client("+491701234567")
    world.quinn("UPDATE clients SET name = %(name)s", name=f"{ESCAPE}]0;owned\x07Maya{ESCAPE}[2J\x9b1m")
    path = tmp_path / "text.txt"
    path.write_text("Hello {{ client.name }}, Ana here.")
    options = ["--everyone", "--template", str(path)]
    if command == "draft":
        typist = Typist("draft", *options, "--name", f"Spring{ESCAPE}[2J")
    else:
        typist = Typist(command, json.loads(run(capsys, "draft", *options, "--json")[1])["id"])
    if command == "send":
        typist.read_until("to go on:")
        typist.type("\n")
    typist.end()
    assert "Maya" in typist.text()
    assert not set(typist.text()) & {ESCAPE, "\x07", "\x9b"}
    assert max(len(line) for line in typist.text().splitlines()) <= 80
    assert client_id


# --- on a terminal ------------------------------------------------------------------------------------


def test_on_a_terminal_the_number_is_typed(world: TestData, write: Write) -> None:
    typist = Typist("import", write(PEOPLE))
    typist.read_until("Import 2 people? Type 2 to go on:")
    assert names(world) == []
    typist.type("2\n")
    typist.read_until("Imported: 2 new clients, 0 changed.")
    assert typist.end() == 0
    assert names(world) == ["Maya", "Tom"]


@pytest.mark.parametrize("typed", ["3\n", "\n", "y\n", "\x04", "\x03"])
def test_anything_else_imports_nothing(world: TestData, write: Write, typed: str) -> None:
    typist = Typist("import", write(PEOPLE))
    typist.read_until("to go on:")
    typist.type(typed)
    assert typist.end() == 1
    assert "Traceback" not in typist.text()
    assert names(world) == []


def test_on_a_terminal_the_number_of_many_renames_is_typed(
    world: TestData, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "import", write(MANY), "--yes")
    typist = Typist("import", write(RENAMED), "--yes")
    typist.read_until("This renames 30 of 30 people. Type 30 to go on:")
    typist.type("30\n")
    assert typist.end() == 0
    assert names(world)[0] == "Somebody 0"


def test_the_screen_fits_80_columns(world: TestData, write: Write) -> None:
    long = "x" * 300
    typist = Typist("import", write(f"name;phone;{'city ' * 30}\nMaya;{long};Bonn\n{long};0170 1234567;Bonn\n"))
    typist.read_until("to go on:")
    assert max(len(line) for line in typist.text().splitlines()) <= 80
    typist.type("\n")
    typist.end()


def test_escape_sequences_do_not_reach_the_terminal(world: TestData, write: Write) -> None:
    """In a file: in a header, a bad cell and a name; in the database: in an old name."""
    client_id = world.client("+491701234567")
    world.quinn("UPDATE clients SET name = %(name)s", name=f"{ESCAPE}]0;owned\x07{ESCAPE}[2Jold\u202e")
    typist = Typist("import", write(f"name;phone;ci{ESCAPE}[2Jty\nMaya;0170 1234567;x\nTom;{ESCAPE}[31m1;x\n"))
    typist.read_until("to go on:")
    typist.type("\n")
    typist.end()
    assert ESCAPE not in typist.text()
    assert "\x07" not in typist.text()
    assert "\u202e" not in typist.text()
    assert "\N{REPLACEMENT CHARACTER}[2Jold" in typist.text()
    assert client_id


def test_a_progress_bar_appears_when_it_takes_longer_than_a_second(world: TestData, write: Write) -> None:
    typist = Typist("import", write("name,phone\n" + "".join(f"P{i},0170 {1000000 + i}\n" for i in range(40_000))))
    typist.read_until("Reading people.csv ━")
    typist.read_until("to go on:", 60)
    typist.type("\n")
    assert typist.end() == 1


# --- any command --------------------------------------------------------------------------------------


def test_help_names_the_variables_and_two_examples() -> None:
    ended = run_script("outreach.py", "--help")
    assert ended.returncode == 0
    text = " ".join(ended.stdout.split())
    for word in ("QUINN_DB_URL", "QUINN_ICLOUD_DB_URL", "DEFAULT_REGION", "DISPATCH_INTERVAL_SECONDS"):
        assert word in text
    assert text.count("python outreach.py") >= 2


@pytest.mark.parametrize("arguments", [(), ("fly",), ("import",), ("import", "x.csv", "--renames", "many")])
def test_a_wrong_use_is_status_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    status, _, err = run(capsys, *arguments)
    assert (status, err.startswith("usage:")) == (2, True)


def test_one_url_without_the_other_is_status_2(write: Write) -> None:
    ended = run_script("outreach.py", "import", write(PEOPLE), QUINN_DB_URL="postgresql://x/y", QUINN_ICLOUD_DB_URL="")
    assert ended.returncode == 2
    assert ended.stderr.startswith("outreach.py: QUINN_ICLOUD_DB_URL is not set")


def test_a_database_that_is_away_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("QUINN_DB_URL", "QUINN_ICLOUD_DB_URL"):
        monkeypatch.setenv(variable, "postgresql://127.0.0.1:1/away")
    status, _, err = run(capsys, "import", write(PEOPLE))
    assert (status, err.startswith("outreach.py: database quinn cannot be reached")) == (1, True)


def test_a_reader_that_stops_reading_is_no_traceback(world: TestData, write: Write) -> None:
    path = write("name,phone\n" + "Maya,1\n" * 20_000)
    command = f"{sys.executable} outreach.py import {path} --bad-lines | head -1"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.startswith("people.csv")
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_no_setting_is_needed_beside_the_urls(world: TestData, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFAULT_REGION")
    ended = run_script("outreach.py", "import", write(PEOPLE))
    assert ended.returncode == 1
    assert "set DEFAULT_REGION" in ended.stdout


# --- people -----------------------------------------------------------------------------------------------------------


def test_opt_out_is_recorded_listed_and_ended(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    client_id = world.client("0170 1234567")
    world.quinn("INSERT INTO contact_relationships VALUES (%(id)s, 'maya@example.com')", id=client_id)
    assert run(capsys, "opt-out", "0170 1234567", "--word", "on the phone")[:2] == (
        0,
        "0170 1234567 gets no more messages, nor does any other handle of the same person.\n",
    )
    assert "They had opted out before." in run(capsys, "opt-out", "+49 170 1234567")[1]
    run(capsys, "opt-out", "maya@example.com")
    status, out, _ = run(capsys, "opt-outs")
    assert status == 0
    assert re.search(r"\+491701234567 .* on the phone +owner", out)
    assert run(capsys, "opt-in", "0170 1234567")[1] == (
        "0170 1234567 may be written to again.\n"
        "But nobody writes to this person while these have opted out: maya@example.com\n"
    )
    status, out, _ = run(capsys, "opt-outs", "--csv")
    assert out.splitlines()[0] == "handle_key,word,source,device,received_at,created_at,ended_at,ended_by"
    assert len(out.splitlines()) == 3
    status, _, err = run(capsys, "opt-out", "call me")
    assert (status, "neither a phone number nor an e-mail address" in err) == (1, True)


def test_opt_out_of_a_number_without_country_says_what_to_do(
    world: TestData, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEFAULT_REGION")
    assert "write the number with + and its country code" in run(capsys, "opt-out", "0170 1234567")[1]


@pytest.mark.parametrize(
    ("text", "new", "bad"),
    [
        ("+49 170 1234567\nmaya@example.com\n", 2, 0),
        ("name;number;word\nMaya;0170 1234567;letter\nTom;unknown;\n", 1, 1),
        ("handle_key,word,ended_at\n+491701234567,STOP,\n+491701234568,STOP,2026-01-01T00:00:00Z\n", 1, 0),
    ],
)
def test_list_of_opt_outs_is_imported(
    world: TestData, capsys: pytest.CaptureFixture[str], write: Write, text: str, new: int, bad: int
) -> None:
    status, out, _ = run(capsys, "opt-outs", "--import", write(text), "--json")
    found = json.loads(out)
    assert (status, found["new"], found["bad"], len(found["badLines"])) == (1 if bad else 0, new, bad, bad)
    assert world.icloud("SELECT count(*) FROM icloud.opt_outs WHERE ended_at IS NULL") == [(new,)]


def test_own_export_can_be_imported_after_a_restore(
    world: TestData, capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    for handle in ("maya@example.com", "tom@example.com"):
        run(capsys, "opt-out", handle, "--word", "said so", "--date", "2026-01-31T10:00+01:00")
    run(capsys, "opt-in", "tom@example.com")
    path = write(run(capsys, "opt-outs", "--csv")[1])
    world.icloud("TRUNCATE icloud.opt_outs")
    assert run(capsys, "opt-outs", "--import", path)[0] == 0
    sql = "SELECT handle_key, word, received_at = '2026-01-31 09:00+00' FROM icloud.opt_outs"
    assert world.icloud(sql) == [("maya@example.com", "said so", True)]


def test_unknown_address_is_assigned(world: TestData, capsys: pytest.CaptureFixture[str]) -> None:
    client_id = world.client()
    run(capsys, "opt-out", "unknown@example.com")
    assert "unknown@example.com" in run(capsys, "opt-outs", "--unassigned")[1]
    assert run(capsys, "assign", "unknown@example.com", client_id)[0] == 0
    assert run(capsys, "opt-outs", "--unassigned")[1] == "There is none.\n"


def test_person_is_shown_and_forgotten_after_a_confirmation(
    world: TestData, capsys: pytest.CaptureFixture[str]
) -> None:
    world.item(world.batch(status="sent"), world.client(), status="sent", sent_at="2026-01-01", rendered_body="Hi Maya")
    assert "rendered_body: Hi Maya" in run(capsys, "show-person", "+14155550123")[1]
    assert (
        json.loads(run(capsys, "show-person", "+14155550123", "--json")[1])["messages"][0]["rendered_body"] == "Hi Maya"
    )
    status, _, err = run(capsys, "forget", "+14155550123")
    assert (status, "nothing is erased" in err, "--yes" in err) == (1, True, True)
    assert len(world.quinn("SELECT id FROM clients")) == 1
    status, out, _ = run(capsys, "forget", "+14155550123", "--yes")
    assert status == 0
    assert "Erased: 1 message of 1 client, 0 rows of the queue." in out
    assert world.quinn("SELECT rendered_body FROM outreach_batch_items") == [("",)]
    assert world.quinn("SELECT id FROM clients") == []


def test_owner_types_forget(world: TestData) -> None:
    world.client()
    typist = Typist("forget", "+14155550123")
    typist.read_until("Type forget to go on:")
    typist.type("no\n")
    assert "Nothing is erased." in typist.read_until("")
    assert len(world.quinn("SELECT id FROM clients")) == 1
