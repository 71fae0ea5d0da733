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
PADDING = 8 * _ALIGNMENT  # of the arrays that are taken together, at most


class Memory:
    """Memory that is given out piece by piece, until all of it is free again."""

    def __init__(self) -> None:
        self.buffer: Array = None
        self._taken = 0

    def reserve(self, nbytes: int) -> None:
        """Sees to it that there are so many bytes. What was taken before keeps what it has, but nobody else will."""
        if self.buffer is None or self.buffer.size < nbytes:
            self.buffer = None  # given back before more is taken
            self.buffer = cuda.zeros((nbytes,), np.uint8)

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised array."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        start, self._taken = self._taken, self._taken + aligned(nbytes)
        self.reserve(self._taken)
        return self.buffer[start : start + nbytes].view(dtype).reshape(shape)

    def give_back(self) -> None:
        """All that was taken."""
        self._taken = 0


OF_OPERATIONS = Memory()


def scratch(*wanted: tuple[tuple[int, ...], Any]) -> list[Array]:
    """An uninitialised array for each (shape, dtype), valid until the next operation that asks."""
    OF_OPERATIONS.give_back()
    OF_OPERATIONS.reserve(sum(aligned(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in wanted))
    return [OF_OPERATIONS.take(shape, dtype) for shape, dtype in wanted]


def aligned(nbytes: int) -> int:
    """So many bytes, and what is left free behind them."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def blocks(n: int, per_block: int) -> int:
    """How many blocks of so many it takes for n."""
    return -(-n // per_block)


def share_out(n: int, most_blocks: int, fewest_rows: int) -> tuple[int, int]:
    """(rows of a block, blocks) for n rows: as many blocks as that, or fewer where they would have fewer rows."""
    rows = max(fewest_rows, blocks(n, most_blocks))
    return rows, blocks(n, rows)
