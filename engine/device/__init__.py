"""Where arrays live. Every device offers the same few functions: see engine/device/numpy.py."""

import ctypes
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from engine.errors import UsageError

DOCTOR = "python -m engine.doctor says what is there and what is missing"


def load(device: str) -> ModuleType:
    """The functions of `device`: "numpy" or "cuda"."""
    return import_module(f"engine.device.{device}")


def eagerly(function: Callable[..., None], *args: Any) -> None:
    """What a device's `replay` gives where nothing is recorded: calls the function."""
    function(*args)


def choose(wanted: str, say: Callable[[str], None]) -> str:
    """The device that --device means, for `load`: "numpy" or "cuda".

    auto is the GPU where one can train, else the CPU; where there is a driver for a GPU, it says why the GPU is not
    taken. UsageError where cuda is asked for and can't be had, or kernels that it has not.
    """
    if wanted == "cpu":
        return "numpy"
    problem = cuda_problem()
    if not problem:
        if os.environ.get("BACKHAND_CAPABILITY"):
            say(f"note       by BACKHAND_CAPABILITY, kernels of compute capability {load('cuda').compute_capability()}")
        return "cuda"
    if wanted == "cuda":
        raise UsageError(f"--device cuda: {problem}. {DOCTOR}; --device cpu does without a GPU")
    if _has_driver():
        say(f"note       on the CPU, although there is an NVIDIA driver: {problem}. {DOCTOR}")
    return "numpy"


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cuda_problem() -> str:
    """Why no GPU can train here; empty if one can."""
    if not _has_driver():
        return "there is no NVIDIA driver"
    try:
        import cupy
        from nvmath.bindings import cublasLt

        cupy.cuda.nvrtc.getVersion()
        cublasLt.get_version()
    except Exception as error:  # a broken installation raises anything
        return f'CuPy, NVRTC or cublasLt cannot be loaded ({error}); pip install -e ".[cuda13]" (or cuda12)'
    try:
        if not cupy.cuda.is_available():
            return "CuPy finds no GPU"
        capability = cupy.cuda.Device().compute_capability
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA does not start ({error})"
    if int(capability) < 80:
        return f"the GPU has compute capability {capability[:-1]}.{capability[-1]}, and bfloat16 takes 8.0"
    return ""
