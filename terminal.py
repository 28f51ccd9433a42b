"""Print for a person, at 80 columns or into a pipe: tables, progress bars, questions whose answer must be typed.

Used by outreach.py and its screens.py; touches no table. Example:

    terminal = Terminal(as_json=False); terminal.show("Imported: 3 new clients.")
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 1000  # columns, if the output is not a terminal: wide enough to cut and wrap no line
SLOW = 1.0  # seconds after which a progress bar appears
JOINERS = "\u200c\u200d"  # invisible, but they hold an emoji or an Arabic word together
MAX_CELL = 60  # characters of a text in a table


class Terminal:
    """Where a command prints, and whom it can ask."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.out = _console(is_stderr=False)
        self.err = _console(is_stderr=True)
        self.can_ask = sys.stdin.isatty() and self.out.is_terminal and not as_json

    def show(self, *parts: RenderableType) -> None:
        """Print for a person; nothing with --json."""
        if not self.as_json:
            for part in parts:
                self.out.print(Text(printable(part)) if isinstance(part, str) else part)

    def write_json(self, value: object) -> None:
        """Print one JSON document if --json asks for it."""
        if self.as_json:
            sys.stdout.write(msgspec.json.encode(value).decode() + "\n")

    def ask(self, question: str, answer: str) -> bool:
        """Ask for an answer that must be typed; return whether it was."""
        self.out.print(Text(printable(question), style="bold"), end=" ")
        self.out.file.flush()
        return sys.stdin.readline().strip() == answer

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a progress bar on a terminal if the work takes longer than a second; yield its update."""
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            console=self.err, transient=True,
        )  # fmt: skip
        task = bar.add_task(what, total=total)
        timer = threading.Timer(SLOW, bar.start)
        timer.daemon = True
        if self.err.is_terminal:
            timer.start()
        try:
            yield lambda completed: bar.update(task, completed=completed)
        finally:
            timer.cancel()
            if timer.ident:
                timer.join()
            if bar.live.is_started:  # else it would print an empty line
                bar.stop()


def _console(is_stderr: bool) -> Console:
    """Return a console of the terminal's width, or of PLAIN_WIDTH for a pipe or a file."""
    stream = sys.stderr if is_stderr else sys.stdout
    made = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def printable(text: str) -> str:
    """Replace control characters: a name could otherwise move the terminal's cursor, or turn the line around."""
    return "".join(
        letter if letter.isprintable() or letter in JOINERS or letter == "\n" else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def one_line(text: object) -> str:
    """Return a value for a table: on one line, and cut."""
    line = " ".join(printable(str(text)).split())
    return line if len(line) <= MAX_CELL else line[: MAX_CELL - 1] + "…"


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table. A name of a column that begins with # is one of numbers."""
    made = Table(
        box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left",
        header_style="dim", title_style="bold", show_header=any(columns),
    )  # fmt: skip
    for name in columns:
        is_number = name.startswith("#")
        is_whole = is_number or name in ("id", "status")  # an id that is cut cannot be copied
        made.add_column(name.lstrip("#"), justify="right" if is_number else "left", no_wrap=is_whole)
    return made


def count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def people(number: int) -> str:
    return count(number, "person", "people")
