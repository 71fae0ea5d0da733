"""The CPU device: arrays are numpy arrays, and moving one is doing nothing."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.device import eagerly
from engine.errors import UsageError

CGROUP = Path("/sys/fs/cgroup")
NAME = "the CPU"
COMPUTE_DTYPE = np.float32  # of parameters, gradients and activations in a run
WORKS_ALONE = False  # whether it computes while the host goes on
SHARED_BY_RANKS = True  # whether those on one machine take their memory from the same


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A zeroed array, aligned to 64 bytes: a cache line, and a vector register of AVX-512."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def to_device(host: np.ndarray) -> np.ndarray:
    """host as an array of this device."""
    return host


def put(array: np.ndarray, host: np.ndarray) -> None:
    """array = host, of its shape and dtype."""
    array[...] = host


def to_host(array: np.ndarray) -> np.ndarray:
    """array as a numpy array."""
    return array


def available_bytes() -> int:
    """Memory that a run can still take, in bytes: the kernel's estimate, or all there is where it gives none.

    In a container, what its limit leaves.
    """
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo, limit, used = Path("/proc/meminfo"), CGROUP / "memory.max", CGROUP / "memory.current"
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def free_unused() -> None:
    """What arrays that are gone have taken goes back at once here; a GPU is told to."""


class Upload:
    """Host arrays of one shape and dtype, on their way to the device."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.array = zeros(shape, dtype)

    def __call__(self, host: np.ndarray) -> None:
        """array = host."""
        self.array[...] = host


def download(arrays: Sequence[np.ndarray]) -> Callable[[], list[np.ndarray]]:
    """What arrays hold now, for later: on a device that works on its own, the function that is returned waits."""
    copies = [array.copy() for array in arrays]
    return lambda: copies


def replay(wanted: str, say: Callable[[str], None]) -> Callable[..., None]:
    """replay(...)(function, *args) calls the function, whose calls with the same arguments are always the same.

    A GPU records what it launches, and replays that: see --cuda-graph, which is `wanted`. say is told where it can't.
    """
    if wanted == "on":
        raise UsageError("--cuda-graph on: the CPU has no CUDA graphs; --cuda-graph auto does without")
    return eagerly


def mark() -> float:
    """A point in time: when the device gets here."""
    return time.perf_counter()


def seconds_between(start: float, end: float) -> float:
    """Seconds from one mark to a later one."""
    return end - start


def describe() -> str:
    """The device, for the plan of a run."""
    return NAME


def overhead_bytes(world: int) -> int:
    """Of memory that each of `world` ranks takes besides its arrays: nothing to speak of."""
    return 0
