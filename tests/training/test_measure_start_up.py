"""What a large index costs at the start: its rows stay in files, however many there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = ("before", "opened", "40 examples drawn", "in an epoch, at most", "after it")


def test_rows_are_not_held_in_memory():
    command = [sys.executable, str(ROOT / "training" / "benchmarks" / "measure_start_up.py")]
    command += ["--rows", "400000", "--files", "20", "--drawn", "40"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "rows 400,000\n" in result.stdout
    first, second = map(float, re.search(r"after ([\d.]+) s; .* again ([\d.]+) s", result.stdout).groups())
    assert max(first, second) < 30 * 400_000 / 1_600_000 / 2
    memory = dict(re.findall(r"^(.+?) +(\d+) MB +\d+ MB$", result.stdout, re.MULTILINE))
    assert tuple(memory) == MOMENTS and int(memory["opened"]) > 0
    # 194 here; of fewer rows it is mostly what the allocators keep. 700 where a list holds them as Python objects.
    assert int(re.search(r"per row (-?\d+) bytes", result.stdout)[1]) < 300
