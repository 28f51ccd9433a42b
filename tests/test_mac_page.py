"""docs/mac.md: each sentence that the sender says is on the page with a remedy, and its commands work."""

from __future__ import annotations

import ast
import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import mac_sender
import pytest
from mac_machine import ROOT, SENDER
from mac_world import World

pytestmark = pytest.mark.mac

PAGE = (ROOT / "docs/mac.md").read_text()
SOURCE = ast.parse(SENDER.read_text())
SAYING = ("probe", "probe_sentence", "_why", "_open", "_connect", "_rows", "round", "stop_for_other_mac", "poll")
NO_SENTENCE = ("check_config",)


def texts(node: ast.AST) -> Iterator[str]:
    """Yield the strings in a piece of the source, with an ellipsis for each value that is put in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def sentences() -> set[str]:
    """Collect what the checks return and what stops the sender."""
    found = {mac_sender.OLD_SERVER}
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.FunctionDef) and (node.name.startswith("check_") or node.name in SAYING):
            if node.name in NO_SENTENCE:
                continue
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return | ast.Call | ast.Assign | ast.Raise):
                    found.update(
                        text for text in texts(inner) if len(text) > 25 and " " in text and "SELECT" not in text
                    )
    return {text for text in found if not text.startswith(("PRAGMA", " ", '"', "(", "/")) and text[-1] not in ".?"}


@pytest.mark.parametrize("sentence", sorted(sentences()))
def test_each_sentence_is_on_the_page(sentence: str) -> None:
    beginning = re.split(r"[:(…]", sentence.lstrip("…"))[0].strip(" ,`")
    assert beginning in PAGE.replace("*", "")


def test_there_are_sentences() -> None:
    assert len(sentences()) > 20


def test_each_sentence_of_the_page_is_one_of_the_sender() -> None:
    table = PAGE.split("| it says | do this |")[1].split("\n\n")[0]
    source = " ".join(SENDER.read_text().split()).replace('" f"', "").replace('" "', "").replace("{RUN_RELEASE}", "")
    for line in table.splitlines()[2:]:
        for said in line.split("|")[1].strip().removesuffix("(`doctor` only)").split(" / "):
            for part in said.split("…"):
                assert part.strip(" `)(") in source, part


def test_each_command_and_setting_is_on_the_page() -> None:
    for command in ("install", "doctor", "status", "test HANDLE", "release ID", "uninstall", "run"):
        assert f"`{command}" in PAGE
    for name in mac_sender.Config._fields[1:14]:
        assert f"`{name}`" in PAGE


def test_the_journal_is_read_as_the_page_says(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        world.send("Hello")
        sql = re.search(r'"(SELECT datetime.*?)"\n', PAGE, re.DOTALL)
        assert sql
        with contextlib.closing(sqlite3.connect(world.journal.path)) as journal:
            [row] = journal.execute(sql[1]).fetchall()
        assert row[1:] == ("+14155550123", "sent", "sent", "done", 0, None)
