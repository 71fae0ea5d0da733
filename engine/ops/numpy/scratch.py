"""Scratch arrays, the matrix view of an activation, and = or += by an option."""

import math
import threading

import numpy as np

_buffers = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, reused by every later call with this name on this thread: a step allocates nothing."""
    size = math.prod(shape)
    buffers = _buffers.__dict__
    key = f"{name} {dtype}"
    if key not in buffers or buffers[key].size < size:
        buffers[key] = np.empty(size, dtype)
    return buffers[key][:size].reshape(shape)


def rows(x: np.ndarray) -> np.ndarray:
    """x as a matrix (N, last dimension): a view, never a copy that writes would miss."""
    assert x.flags.c_contiguous
    return x.reshape(-1, x.shape[-1])


def write(out: np.ndarray, value: np.ndarray, accumulate: bool) -> None:
    """out = value, += with accumulate."""
    if accumulate:
        out += value
    else:
        out[...] = value
