"""Scratch memory, and how many blocks cover something.

Operations run one after the other on one stream, so one buffer serves them all. A run takes it before its first step,
of the size that the largest operation will ask for; without that it grows as they ask.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import cuda

Array = Any

_ALIGNMENT = 256
_buffer: Array = None


def scratch(*wanted: tuple[tuple[int, ...], Any]) -> list[Array]:
    """An uninitialised array for each (shape, dtype), valid until the next operation that asks."""
    starts, end = [], 0
    for shape, dtype in wanted:
        starts.append(end)
        end += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    reserve(end)
    return [
        _buffer[start : start + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        for start, (shape, dtype) in zip(starts, wanted, strict=True)
    ]


def reserve(nbytes: int) -> None:
    """Sees to it that there are so many bytes."""
    global _buffer
    if _buffer is None or _buffer.size < nbytes:
        _buffer = None  # given back before more is taken
        _buffer = cuda.zeros((nbytes,), np.uint8)


def most_bytes(dims: Mapping[str, int]) -> int:
    """What the operations of a GPT-2 of these sizes ask for at most."""
    B, T, C, NH, Vp = (dims[name] for name in ("B", "T", "C", "NH", "Vp"))
    N = B * T
    asked = {
        "attention": 4 * B * NH * T,
        "layernorm": 4 * 3 * C * min(1024, blocks(N, 8)),
        "linear": 4 * 4 * C * min(128, blocks(N, 32)),
        "embedding": 4 * (3 * Vp + 2 * N + 2 * blocks(N, 64) * C),
        "norm": 8 * blocks(max(Vp * C, 12 * C * C + 13 * C), 1 << 15),
    }
    return max(asked.values()) + 8 * _ALIGNMENT


def blocks(n: int, per_block: int) -> int:
    """How many blocks of so many it takes for n."""
    return -(-n // per_block)


def variant(grads: Array) -> dict[str, int]:
    """The definitions of the kernels that write gradients of parameters of this array's dtype."""
    return {"GRAD_FP32": 1} if grads.dtype == np.float32 else {}
