"""What a benchmark ran on: the processor, the versions, the clock and the watts."""

import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engine.ops.numpy.parallel import CORES

PACKAGES = (
    *("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cublas-cu12", "nvidia-cublas"),
    *(
        "nvidia-nccl-cu12",
        "nvidia-nccl-cu13",
        "nvidia-cudnn-cu12",
        "nvidia-cudnn-cu13",
        "torch",
        "triton",
        "matplotlib",
    ),
)
SECONDS_BETWEEN_SAMPLES = 2.0


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def nvidia_smi(fields: str) -> list[str]:
    """What nvidia-smi says of the GPU that the runs use: nothing where there is none."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [field.strip() for field in answer.split(",")]


@contextmanager
def watched_gpu(device: str) -> Iterator[dict[str, float]]:
    """A dictionary that is filled at the end: mean clock and power while the GPU was busy, and its peak of memory.

    Busy is what keeps the start, the compilation and the checkpoint out of the means.
    """
    figures: dict[str, float] = {}
    samples: list[list[float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_SAMPLES):
            if fields := nvidia_smi("clocks.sm,power.draw,memory.used,utilization.gpu"):
                samples.append([number(field) for field in fields])

    thread = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        thread.start()
    try:
        yield figures
    finally:
        done.set()
        if thread.ident:
            thread.join()
        if samples:
            table = np.array(samples)
            busy = table[table[:, 3] >= 50] if (table[:, 3] >= 50).any() else table
            figures |= {
                "clock_mhz": round(float(busy[:, 0].mean())),
                "watts": round(float(busy[:, 1].mean())),
                "peak_mib": round(float(table[:, 2].max())),
                "samples": len(busy),
            }


def number(field: str) -> float:
    """A field of nvidia-smi's; 0 where the GPU does not tell, as "[N/A]"."""
    try:
        return float(field)
    except ValueError:
        return 0.0


def machine(device: str) -> str:
    """The processor that the runs are on, by name."""
    if device == "cuda" and (answer := nvidia_smi("name,driver_version,power.limit,clocks.max.sm")):
        name, driver, watts, mhz = answer
        return f"{name}, driver {driver}, at most {watts} W and {mhz} MHz"
    return f"{processor()}, {CORES} threads"


def versions() -> str:
    """Python and the packages that matter, those that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def circumstances(program: str, device: str) -> dict[str, Any]:
    """What every benchmark says of itself: the command, when and on what it ran."""
    return {
        "command": f"python {program} {shlex.join(sys.argv[1:])}",
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
        "machine": machine(device),
        "versions": versions(),
    }


def told(figures: dict[str, Any]) -> list[str]:
    """The circumstances, as lines."""
    return [f"$ {figures['command']}", f"{figures['date']}, {figures['machine']}", figures["versions"]]


def told_of_gpu(gpu: dict[str, float]) -> list[str]:
    """What watched_gpu found, as a line; none where there was no GPU."""
    if not gpu:
        return []
    return [f"{gpu['clock_mhz']:,} MHz, {gpu['watts']} W (means), peak of memory {gpu['peak_mib']:,} MiB"]
