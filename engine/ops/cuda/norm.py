"""The global gradient norm: see engine/ops/numpy/norm.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda.scratch import blocks, scratch

Array = Any

MOST_BLOCKS = 1024  # of a slice: about as many as a GPU has at a time
FEWEST_PACKS = 1024  # of a block, of 8 elements
MOST_SLICES = 64  # of a launch: what is to be added up takes scratch memory


def squared(out: Array, grads: Array, slices: Array) -> None:
    """Slices begin and end at multiples of 8."""
    defines, count = kernels.grad_variant(grads.dtype), _blocks(grads.size)
    for first in range(0, out.size, MOST_SLICES):
        some, theirs = slices[first : first + MOST_SLICES], out[first : first + MOST_SLICES]
        S = theirs.size
        (partial,) = scratch(((S, count), np.float64))
        sizes = FEWEST_PACKS, MOST_BLOCKS, count, S, grads.size
        kernels.launch("norm", "norm_squared", (count, S), (256,), *(partial, grads, some, *sizes), defines=defines)
        kernels.launch("norm", "norm_sums", (S,), (256,), theirs, partial, count, S, defines=defines)


def _blocks(n: int) -> int:
    """How many blocks a slice takes at most, of a buffer of n elements."""
    return min(MOST_BLOCKS, blocks(n, FEWEST_PACKS * 8))


def scratch_bytes(dims: Mapping[str, int]) -> int:
    """Of as many slices as a launch takes, each with the blocks that the whole flat buffer would take."""
    L, C = dims["L"], dims["C"]
    n = (dims["Vp"] + dims["maxT"]) * C + L * (12 * C * C + 13 * C) + 2 * C
    return 8 * MOST_SLICES * _blocks(n)
