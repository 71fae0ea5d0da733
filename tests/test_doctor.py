"""The doctor's report and its choice of an extra, on this machine and with drivers and packages made for the test."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TIMEOUT, Run

BARE = ("-S", "-E")  # Python without site-packages: what a fresh machine has

GIB = 1 << 30
H100 = ("NVIDIA H100 80GB HBM3", 80 * GIB, 9, 0)
V100 = ("Tesla V100-SXM2-16GB", 16 * GIB, 7, 0)

# The driver's library as the doctor calls it: one GPU, and what cuInit returns.
LIBCUDA = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *version) { *version = %(version)d; return 0; }
int cuInit(unsigned flags) { return %(init)d; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "%(name)s", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = %(nbytes)dULL; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? %(major)d : attribute == 76 ? %(minor)d : -1;
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "made to fail"; return 0; }
"""

# As much of the CUDA extra's packages as the doctor looks at.
CUDA_PACKAGES = {
    "cupy/__init__.py": "from cupy import cuda\n__version__, dtype = '14.9', lambda dtype: dtype\n",
    "cupy/cuda/__init__.py": (
        "class runtime:\n    runtimeGetVersion = staticmethod(lambda: 13000)\n"
        "class nvrtc:\n    getVersion = staticmethod(lambda: (13, 0))\n"
    ),
    "cupy/cuda/nccl.py": "available, get_version = True, lambda: 22907\n",
    "cupy/_core/__init__.py": "",
    "cupy/_core/_scalar.py": "get_typename = str\n",
    "nvmath/__init__.py": "",
    "nvmath/bindings/__init__.py": "",
    "nvmath/bindings/cublasLt.py": "get_version = lambda: 130101\n",
}


def doctor(*args: str, python: tuple[str, ...] = (), **environ: object) -> Run:
    """`python -m engine.doctor args`, which never shows a traceback and says nothing beside its report."""
    result = subprocess.run(
        [sys.executable, *python, "-m", "engine.doctor", *args],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in environ.items()},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert "Traceback" not in result.stdout
    assert not result.stderr
    return Run(result.returncode, result.stdout, result.stderr)


def lines(report: str) -> dict[str, str]:
    """{subject: what the report says of it, its advice included}."""
    said: dict[str, str] = {}
    subject = ""
    for line in filter(None, report.splitlines()):
        if line.startswith("trains on the "):
            subject, line = line.split(": ", 1)
        elif not line.startswith(" "):
            subject, line = line[:16].strip(), line[16:]
        said[subject] = f"{said.get(subject, '')} {line.strip()}".strip()
    return said


def make(*args: object, **environ: object) -> str:
    """What `make -n args` prints."""
    command = ["make", "-n", f"PYTHON={sys.executable}", *map(str, args)]
    # Without what a `make test` that runs this was called with.
    environment = os.environ | {"MAKEFLAGS": ""} | {name: str(value) for name, value in environ.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def driver(tmp_path):
    """driver(version, gpu, init=0) -> a folder for LD_LIBRARY_PATH, which the loader searches before any other."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")

    def build(version: int, gpu: tuple[str, int, int, int], init: int = 0) -> Path:
        name, nbytes, major, minor = gpu
        values = {"version": version, "init": init, "name": name, "nbytes": nbytes, "major": major, "minor": minor}
        source = write(tmp_path / "driver", {"libcuda.c": LIBCUDA % values}) / "libcuda.c"
        library = source.with_name("libcuda.so.1")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return library.parent

    return build


def have_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(have_driver(), reason="has an NVIDIA driver")
def test_a_machine_without_a_gpu_trains_on_its_cpu():
    code, report, _ = doctor()
    said = lines(report)
    assert code == 0, report
    assert said["NVIDIA driver"] == "none found"
    assert said["trains on the CPU"] == "yes"
    assert said["trains on the GPU"].startswith("no (NVIDIA driver: none found")
    assert all(said.values())
    assert doctor("--extra") == Run(0, "\n", "")


def test_before_anything_is_installed():
    code, report, _ = doctor(python=BARE)
    said = lines(report)
    assert code == 1
    assert "numpy missing" in said["core packages"]
    assert said["core packages"].endswith("tiktoken missing pip install -e .")
    assert said["trains on the CPU"].startswith("no (core packages: numpy missing")


@pytest.mark.parametrize(
    ("version", "gpu", "extra"),
    [
        (13020, H100, "cuda13"),
        (13000, H100, "cuda13"),
        (12040, H100, "cuda12"),
        (11080, H100, ""),
        (13000, V100, ""),
    ],
)
def test_the_extra_for_a_gpu(driver, version, gpu, extra):
    assert doctor("--extra", python=BARE, LD_LIBRARY_PATH=driver(version, gpu)) == Run(0, f"{extra}\n", "")


@pytest.mark.parametrize("version", [13000, 12040])
def test_a_gpu_for_which_nothing_is_installed(driver, version):
    said = lines(doctor(python=BARE, LD_LIBRARY_PATH=driver(version, H100)).out)
    assert said["NVIDIA driver"] == {13000: "supports CUDA 13.0", 12040: "supports CUDA 12.4"}[version]
    assert said["GPUs"] == "1 x NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0"
    for subject in ("CuPy", "NVRTC", "cublasLt", "NCCL"):
        assert said[subject].endswith(f'not installed pip install -e ".[cuda{version // 1000}]"')
    assert "CuPy: not installed" in said["trains on the GPU"]


def test_a_gpu_with_all_that_it_takes(driver, tmp_path):
    packages = write(tmp_path / "packages", CUDA_PACKAGES)
    code, report, _ = doctor(LD_LIBRARY_PATH=driver(13000, H100), PYTHONPATH=packages)
    said = lines(report)
    assert said["CuPy"].endswith("for CUDA 13, with bfloat16")
    assert said["NVRTC"] == "13.0"
    assert said["cublasLt"].startswith("13.1.1, nvmath-python")
    assert said["NCCL"] == "2.29.7"
    assert said["trains on the GPU"] == said["trains on the CPU"] == "yes"
    assert code == 0


def test_a_driver_and_a_gpu_that_are_too_old(driver):
    said = lines(doctor(python=BARE, LD_LIBRARY_PATH=driver(11080, V100)).out)
    assert said["NVIDIA driver"].startswith("supports CUDA 11.8 CUDA 12 is the least")
    assert "Tesla V100-SXM2-16GB: too old, bfloat16 needs compute capability 8.0" in said["GPUs"]
    assert "NVIDIA driver" in said["trains on the GPU"]
    assert "GPUs" in said["trains on the GPU"]


def test_a_driver_that_shows_no_gpu(driver):
    said = lines(doctor(python=BARE, LD_LIBRARY_PATH=driver(13000, H100, init=100), CUDA_VISIBLE_DEVICES="").out)
    assert said["NVIDIA driver"] == "supports CUDA 13.0"
    assert said["GPUs"] == "none that the driver shows unset CUDA_VISIBLE_DEVICES, which may hide it"


def test_a_driver_that_does_not_start(driver, tmp_path):
    environ = {
        "LD_LIBRARY_PATH": driver(13000, H100, init=803),
        "PYTHONPATH": write(tmp_path / "packages", CUDA_PACKAGES),
    }
    code, report, _ = doctor(**environ)
    assert code == 1
    assert lines(report)["NVIDIA driver"].startswith("broken ([Errno 803] cuInit: made to fail)")
    assert doctor("--extra", **environ) == Run(0, "\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's driver is there on Linux")
def test_a_library_that_is_none(tmp_path):
    folder = write(tmp_path, CUDA_PACKAGES | {"libcuda.so.1": "no library\n"})
    code, report, _ = doctor(LD_LIBRARY_PATH=folder, PYTHONPATH=folder)
    assert code == 1
    assert lines(report)["NVIDIA driver"].startswith("broken (")
    assert doctor("--extra", LD_LIBRARY_PATH=folder) == Run(0, "\n", "")


def test_cupy_for_a_newer_cuda_than_the_drivers(driver, tmp_path):
    distribution = {"cupy_cuda13x-14.9.dist-info/METADATA": "Name: cupy-cuda13x\nVersion: 14.9\n"}
    packages = write(tmp_path / "packages", CUDA_PACKAGES | distribution)
    said = lines(doctor(python=("-S",), LD_LIBRARY_PATH=driver(12040, H100), PYTHONPATH=packages).out)
    fix = 'pip uninstall -y cupy-cuda13x; pip install -e ".[cuda12]"'
    assert said["CuPy"] == f"14.9 (cupy-cuda13x) for CUDA 13 the driver supports CUDA 12.4 only: {fix}"


@pytest.mark.parametrize("failure", ["raise RuntimeError('made to fail')", "raise SystemExit(0)", "1 +"])
def test_a_broken_package(tmp_path, failure):
    code, report, _ = doctor(PYTHONPATH=write(tmp_path, {"cupy/__init__.py": failure}))
    said = lines(report)
    assert code == 1
    assert said["CuPy"].startswith("does not work (")
    assert "pip install --force-reinstall" in said["CuPy"]
    assert said["trains on the CPU"] == "yes"


def test_cupy_without_a_place_for_its_cache(tmp_path):
    """It makes ~/.cupy as it is imported."""
    broken = write(tmp_path, {"cupy/__init__.py": "import os\nos.mkdir('/proc/self/none/.cupy')"})
    code, report, _ = doctor(PYTHONPATH=broken)
    assert code == 1
    assert "set CUPY_CACHE_DIR" in lines(report)["CuPy"]


def test_a_core_package_that_is_broken_or_old(tmp_path):
    broken = write(tmp_path / "broken", {"click.py": "raise ImportError('made to fail')"})
    code, report, _ = doctor(PYTHONPATH=broken)
    assert code == 1
    assert "click broken: ImportError: made to fail" in lines(report)["core packages"]
    assert lines(report)["core packages"].endswith("pip install --force-reinstall -e .")
    old = {"click.py": "", "click-7.0.dist-info/METADATA": "Name: click\nVersion: 7.0\n"}
    code, report, _ = doctor(PYTHONPATH=write(tmp_path / "old", old))
    assert code == 1
    assert "click 7.0 (8.1 or later is needed)" in lines(report)["core packages"]


def test_the_kernel_cache_is_a_finding(tmp_path):
    """Where the user's cache can't be written, it says so, and leaves nothing behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    said = lines(doctor(BACKHAND_CACHE=tmp_path).out)
    assert said["kernel cache"] == str(tmp_path / "backhand" / "kernels")
    (tmp_path / "file").touch()
    said = lines(doctor(BACKHAND_CACHE=tmp_path / "file", TMPDIR=temporary).out)
    assert "set BACKHAND_CACHE" in said["kernel cache"]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("target", ["train", "test"])
@pytest.mark.parametrize("version", [13000, 12040, 11080])
def test_make_installs_the_extra(driver, tmp_path, target, version):
    """And once more where the stamp of an installation without it is there."""
    extra = {13000: "cuda13", 12040: "cuda12", 11080: ""}[version]
    venv, environ = tmp_path / "venv", {"LD_LIBRARY_PATH": driver(version, H100)}
    extras = {"train": "demo", "test": "test,demo,data,gpt2,mpi"}[target] + f",{extra}" * bool(extra)
    install = f'{venv}/bin/python -m pip install --quiet -e ".[{extras}]"\n'
    assert install in make(target, f"VENV={venv}", **environ)

    stamp = {"train": "demo", "test": "test"}[target]
    write(venv, {"bin/python": "", stamp: ""})
    printed = make(target, f"VENV={venv}", **environ)
    assert (install in printed) == bool(extra)
    assert "-m venv" not in printed

    write(venv, {f"{stamp}-{extra}": ""})
    assert "pip" not in make(target, f"VENV={venv}", **environ)
    assert "cuda" not in make(target, f"VENV={venv}", "CUDA_EXTRA=", **environ)
