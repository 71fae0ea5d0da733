"""The sums of a gradient's columns: see engine/ops/numpy/column_sums.py; and of what kernels left of such sums."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda.scratch import blocks, scratch, share_out

Array = Any

MOST_BLOCKS = 128  # of rows, in the sums over them
FEWEST_ROWS = 32  # of a block


def add(out: Array, x: Array, *, accumulate: bool) -> None:
    C = out.size
    N = x.size // C
    rows, count = share_out(N, MOST_BLOCKS, FEWEST_ROWS)
    (partial,) = scratch(((count, C), np.float32))
    kernels.launch(
        "column_sums",
        "column_sums_of_blocks",
        (blocks(C, 256), count),
        (256,),
        *(partial, x, rows, count, N, C),
        defines=kernels.grad_variant(out.dtype),
    )
    add_partial(out, partial, accumulate=accumulate)


def add_partial(out: Array, partial: Array, *, accumulate: bool) -> None:
    """out (C) = the sums of the columns of partial (rows,C) fp32, in the order of the rows; += with accumulate."""
    kernels.launch(
        "column_sums",
        "column_sums_add",
        (blocks(out.size, 32),),
        (32, 32),
        *(out, partial, accumulate, len(partial), out.size),
        defines=kernels.grad_variant(out.dtype),
    )


def scratch_bytes(dims: Mapping[str, int]) -> int:
    """Of the widest bias, that of 4 C channels."""
    _, count = share_out(dims["B"] * dims["T"], MOST_BLOCKS, FEWEST_ROWS)
    return count * 4 * dims["C"] * 4
