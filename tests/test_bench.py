"""Check that the benchmark runs, with each group at its smallest size. The figures mean nothing there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from testing import ROOT

# Groups, and the rows that each has.
GROUPS = {
    "peek": 3,
    "lock": 1,
    "queue_history": 5,
    "prepared": 1,
    "tick": 2,
    "stale_statistics": 1,
    "item_history": 2,
    "bulk": 3,
    "scrape": 2,
    "memory": 3,
    "search": 1,
    "draft": 3,
    "import_file": 1,
    "pages": 10,
    "open_pages": 1,
}
GROUPS_WITH_PEERS = {"requests": 16, "message": 6}
PEERS = ("asyncpg", "httptools", "pgqueuer", "procrastinate", "starlette", "uvicorn", "uvloop")


pytestmark = pytest.mark.bench


def run_bench(table: Path, groups: dict[str, int]) -> list[str]:
    """Run these groups; return the rows of the table that they write into a page."""
    table.write_text("# Page\n<!-- bench -->\nold\n<!-- /bench -->\nend\n")
    only = [argument for group in groups for argument in ("--only", group)]
    done = subprocess.run(
        [sys.executable, "bench/bench.py", "--quick", "--markdown", str(table), *only],
        cwd=ROOT, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(f"{group}: " in done.stdout for group in groups)
    start, written = table.read_text().split("<!-- bench -->\n")
    written, end = written.split("<!-- /bench -->\n")
    assert (start, end) == ("# Page\n", "end\n")
    lines = written.splitlines()
    assert "old" not in lines
    rows = [line for line in lines if line.endswith(("| met |", "| **MISSED** |"))]
    assert len(rows) == sum(groups.values())
    assert " cores, " in lines[-1], "the caption"
    return rows


def test_benchmark_writes_a_row_for_each_measurement(tmp_path: Path) -> None:
    rows = run_bench(tmp_path / "table.md", GROUPS)
    # Over so few batches a tick cannot be 50 times faster, and its statements are always as many.
    assert next(row for row in rows if "queries for each batch" in row).endswith("**MISSED** |")
    assert next(row for row in rows if "statements of a tick" in row).endswith("met |")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PEERS)), reason="without the bench extra")
def test_benchmark_compares_product_with_peers(tmp_path: Path) -> None:
    run_bench(tmp_path / "table.md", GROUPS_WITH_PEERS)
