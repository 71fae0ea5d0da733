"""Scratch memory, and how many blocks cover something.

Operations run one after the other on one stream, so one buffer serves them all. A run takes it before its first step,
of the size that the largest operation will ask for; without that it grows as they ask.
"""

import math
from typing import Any

import numpy as np

from engine.device import cuda

Array = Any

# Of an H100 SXM: how work is shared out, and so the order of sums, is the same on every GPU.
MULTIPROCESSORS = 132

_ALIGNMENT = 256
PADDING = 8 * _ALIGNMENT  # of the arrays that one operation asks for, at most
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


def blocks(n: int, per_block: int) -> int:
    """How many blocks of so many it takes for n."""
    return -(-n // per_block)


def share_out(n: int, most_blocks: int, fewest_rows: int) -> tuple[int, int]:
    """(rows of a block, blocks) for n rows: as many blocks as that, or fewer where they would have fewer rows."""
    rows = max(fewest_rows, blocks(n, most_blocks))
    return rows, blocks(n, rows)
