"""bench/multiplies.py: its figures, without a GPU, and that it runs on one."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from bench import multiplies
from engine.device import cublaslt, cuda, tuning
from tests import cublaslt_on_cpu
from tests.conftest import ROOT
from tests.cublaslt_on_cpu import OTHER, SMALL


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """With an empty cache on the disk."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path)
    return cublaslt_on_cpu.install(monkeypatch)


def test_what_is_fastest_is_told_beside_what_is_in_use(stand_in):
    """The one in use, and the others in the order of their times; a slow one is left out."""
    stand_in.proposed = [2, 3, 4, 5]
    stand_in.speeds = Counter({2: 1.2e-3, 3: 1.1e-3, 4: 1e-3, 5: 3e-3})
    tuning.use(tuning.tune([SMALL, OTHER], {}, print))
    found = [
        multiplies.compare(operation, times, cuda, thorough=False, most=3, seconds=0.002)
        for operation, times in ((SMALL, 12), (OTHER, 1))
    ]
    for multiply in found:
        assert [each["id"] for each in multiply["algorithms"]] == [4, 3, 2]
        for each in multiply["algorithms"]:
            assert each["us"] == pytest.approx(1e6 * stand_in.speeds[each["id"]])
            assert each["us_raced"] == pytest.approx(each["us"])
    assert multiplies.lines(found[0])[0] == f"{SMALL.name}, 12 times a step"
    assert multiplies.lines(found[0])[1].split()[-2:] == ["1000.0", "1000.0"]
    assert multiplies.a_step(found, lambda algorithms: algorithms[0]) == pytest.approx(13 * 1.0)
    assert multiplies.a_step(found, lambda algorithms: algorithms[2]) == pytest.approx(13 * 1.2)


def test_our_own_stands_among_cublaslts(stand_in, monkeypatch):
    calls = []
    monkeypatch.setattr(cublaslt, "own_multiply", lambda operation: lambda *operands: calls.append(operation))
    stand_in.proposed, stand_in.speeds = [2], Counter({2: 2e-3})
    found = multiplies.compare(SMALL, 12, cuda, thorough=False, most=5, seconds=0.002)
    table = [line.split() for line in multiplies.lines(found)[1:]]
    assert [row[:-2] for row in table] == [["2", "7", "7", "7", "7"], ["our", "own"]]
    assert set(calls) == {SMALL}


def test_what_is_in_use_comes_first_though_it_is_slower(stand_in):
    """Without a table that is cublasLt's first proposal."""
    stand_in.proposed, stand_in.speeds = [2, 3], Counter({2: 2e-3, 3: 1e-3})
    first, second = cublaslt.library().contenders(SMALL, thorough=False, most=5)
    assert (first.settings["id"], second.settings["id"]) == (2, 3)
    tuning.use(tuning.tune([SMALL], {}, print))
    first, second = cublaslt.library().contenders(SMALL, thorough=False, most=5)
    assert (first.settings["id"], second.settings["id"]) == (3, 2)


def bench(*args):
    command = [sys.executable, "bench/multiplies.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_cpu_has_no_algorithms():
    result = bench("--device", "cpu")
    assert result.returncode == 2
    assert "on a CPU there are no algorithms to choose from" in result.stderr


@pytest.mark.gpu
def test_it_runs(tmp_path):
    target = tmp_path / "multiplies.json"
    size = ("-e", "l2h2c128", "-b", "4", "-t", "64", "--vocabulary", "700")
    result = bench(*size, "--seconds", "0.05", "--most", "2", "--json", str(target))
    assert result.returncode == 0, result.stderr
    figures = json.loads(target.read_text())
    assert len(figures["multiplies"]) == 15
    for multiply in figures["multiplies"]:
        assert multiply["name"] in result.stdout
        for each in multiply["algorithms"]:
            assert each["us"] > 0
    assert 0 < figures["ms"]["fastest under load"] <= figures["ms"]["in use"]
