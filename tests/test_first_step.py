"""bench/first_step.py: it times train.py's own start, twice."""

import re
import subprocess
import sys

from tests.conftest import ROOT, TINY


def first_step(folder, *options) -> subprocess.CompletedProcess:
    """In this folder, as a user who works there."""
    command = [sys.executable, str(ROOT / "bench/first_step.py"), "--warm", "1", "--", *map(str, options)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_cold_and_a_warm_start_are_timed(shards_dir):
    result = first_step(shards_dir, "-i", "train_*.bin", "-j", "val_*.bin", *TINY, "--device", "cpu", "-s", 0)
    assert result.returncode == 0, result.stderr
    starts = re.findall(r"^(cold|warm): (\d+\.\d+) s\n((?: .*\n?)+)", result.stdout, re.MULTILINE)
    assert [name for name, _, _ in starts] == ["cold", "warm"]
    for _, seconds, lines in starts:
        *before, last = lines.rstrip().splitlines()
        assert last.split()[0] == seconds
        assert last.split()[1:3] == ["step", "1/2"]
        assert any("model" in line for line in before)
        times = [float(line.split()[0]) for line in (*before, last)]
        assert times == sorted(times)


def test_a_run_that_does_not_start_is_told(tmp_path):
    result = first_step(tmp_path, "-i", "none.bin", "--device", "cpu")
    assert result.returncode == 2
    assert "train.py ended before its first step" in result.stderr
    assert "none.bin" in result.stderr
