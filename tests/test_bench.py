"""The benchmark runs: what of it needs no more than the tests do, at its smallest size."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_benchmark_prints_its_table(tmp_path: Path) -> None:
    sections = ("one_process", "ticks", "sends")
    chosen = [argument for section in sections for argument in ("--only", section)]
    done = subprocess.run(
        [sys.executable, "demo/bench.py", "--quick", "--svg", str(tmp_path / "bench.svg"), *chosen],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 10
    assert "statements of a tick" in done.stdout
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")
