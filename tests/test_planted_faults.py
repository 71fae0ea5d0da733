"""The CPU tests of the CUDA kernels notice the faults that people make; and this count of them can be believed."""

import shutil
from collections import Counter

import pytest

from tests import planted_faults
from tests.conftest import plant_faults
from tests.planted_faults import FAULTS, KERNELS, Fault, Result, try_fault

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")


def test_all_are_caught(pytestconfig):
    """By a process that has begun with the first test: see conftest.py."""
    process, printed = plant_faults(pytestconfig)
    assert process.wait() == 0, printed.read_text()
    assert f"{len(FAULTS)} of {len(FAULTS)} caught" in printed.read_text()


def test_every_source_has_some():
    counts = Counter(fault.file for fault in FAULTS)
    assert not {path.name for path in KERNELS.glob("*.cu") if counts[path.name] < 2}
    assert counts["attention.cu"] >= 8
    assert sum("barrier" in fault.what or "waited" in fault.what or "sync" in fault.what for fault in FAULTS) >= 5
    assert len(set(FAULTS)) == len(FAULTS)


def test_what_is_not_a_fault_survives(tmp_path):
    same = Fault("scalars.cu", "scalars_total", "another name", "double sum = 0.0;", "double sum = 0.0, unused = sum;")
    assert try_fault(same, str(tmp_path)) == Result("SURVIVED", "")


@pytest.mark.parametrize(
    ("function", "old", "new", "says"),
    [
        ("scalars_total", "sum / divisor", "sum / ", "does not compile"),
        ("scalars_total", "sum", "total", "occurs 6 times"),
        ("scalars_mean", "sum", "total", "no function scalars_mean"),
    ],
)
def test_a_wrong_entry_is_not_taken_for_a_caught_fault(tmp_path, function, old, new, says):
    verdict, by = try_fault(Fault("scalars.cu", function, "wrong", old, new), str(tmp_path))
    assert verdict == "ERROR"
    assert says in by


def test_no_test_is_not_taken_for_a_caught_fault(tmp_path):
    fault = Fault("scalars.cu", "scalars_total", "no test", "sum / divisor", "sum", tests="test_nothing")
    assert try_fault(fault, str(tmp_path)).verdict == "ERROR"
    with pytest.raises(RuntimeError, match="fail without any fault"):
        planted_faults.run([fault])
