"""Show the benchmark's results, rows with a target each, as a table on a terminal and in Markdown.

Used by the other files in bench/. Example:

    row = compared("empty poll", "a constant response", [900.0], [1000.0], Target(at_least=0.8)); show("polls", [row])
"""

import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import rich.box
import rich.console
import rich.markup
import rich.table

WIDTH = 160  # characters, if the output is not a terminal
# The part of docs/performance.md that the table replaces.
MARKED = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
console = rich.console.Console(width=None if os.isatty(1) else WIDTH)
# The columns, and the share of the width of each; the last two are as wide as their text.
HEADINGS = {"what": 17, "beside": 8, "product": 11, "other": 11, "ratio": 7, "target": None, "": None}


class Row(NamedTuple):
    """A line of the table, as text; `met`: whether the target is met."""

    what: str
    beside: str
    product: str
    other: str
    ratio: str
    target: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        return (*self[:6], "met" if self.met else "MISSED")


class Target(NamedTuple):
    """The bound of a ratio. Exactly one of the two is set."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Return whether the ratio meets the target. Round it as printed: a printed 0.90 meets a target of 0.90."""
        shown = float(_figure(ratio))
        if self.at_least is not None:
            return shown >= self.at_least
        return self.at_most is not None and shown <= self.at_most

    def __str__(self) -> str:
        sign, bound = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {bound:g}"


def compared(
    what: str,
    beside: str,
    product: Sequence[float],
    other: Sequence[float],
    target: Target,
    unit: Callable[[float], str] = "{:,.0f}/s".format,
) -> Row:
    """Make a row of one or several pairs of figures; each ratio, product to other, must meet the target."""
    ratios = [_ratio(ours, theirs) for ours, theirs in zip(product, other, strict=True)]
    return Row(
        what,
        beside,
        "  ".join(map(unit, product)),
        "  ".join(map(unit, other)),
        "  ".join(map(_figure, ratios)),
        str(target),
        all(map(target.met, ratios)),
    )


def milliseconds(seconds: float) -> str:
    """Format a time for compared()."""
    return "timed out" if seconds == math.inf else f"{1000 * seconds:,.{0 if seconds > 0.1 else 1}f} ms"


def period(rate: float) -> str:
    """Format a rate as a time for compared()."""
    return milliseconds(1 / rate)


def _ratio(product: float, other: float) -> float:
    if product == other:  # also of two zeros
        return 1.0
    return product / other if other else math.inf


def _figure(ratio: float) -> str:
    """Format a ratio with two decimals, or with one if it is at least 10."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def medians(rounds: int, contenders: Sequence[Callable[[], float]]) -> list[float]:
    """Measure the contenders alternately, A B A B; return the median of each."""
    figures: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, taken in zip(contenders, figures, strict=True):
            taken.append(contender())
    return [statistics.median(taken) for taken in figures]


def describe_machine(postgres_version: str) -> str:
    """Describe the machine and the versions in one line."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return (
        f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}, PostgreSQL {postgres_version}; "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows of a group."""
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, expand=True)
    for heading, share in HEADINGS.items():
        table.add_column(heading, ratio=share, no_wrap=share is None)
    for row in rows:
        table.add_row(*map(rich.markup.escape, row.cells()), style="" if row.met else "bold red")
    console.print(table)


def write_markdown(path: Path, caption: str, rows: Sequence[Row]) -> None:
    """Write a Markdown table and its caption. Replace the text between `bench` comments, else the whole file."""
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    for row in rows:
        *cells, verdict = row.cells()
        lines.append([*cells, verdict if row.met else f"**{verdict}**"])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text = f"{table}\n{caption}\n"
    page = path.read_text() if path.exists() else ""
    path.write_text(MARKED.sub(lambda _: text, page) if MARKED.search(page) else text)
