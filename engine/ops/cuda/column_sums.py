"""The sums of a gradient's columns: see engine/ops/numpy/column_sums.py; and of what kernels left of such sums."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda.scratch import at_a_time, blocks, scratch, share_out

Array = Any

COLUMNS = THREADS = 256  # of a block
REGISTERS = 40  # of a thread
FEWEST_ROWS = 32  # of a block


def add(out: Array, x: Array, *, accumulate: bool) -> None:
    C = out.size
    N = x.size // C
    rows, count = shares(N, C)
    (partial,) = scratch(((count, C), np.float32))
    kernels.launch(
        "column_sums",
        "column_sums_of_blocks",
        (blocks(C, COLUMNS), count),
        (THREADS,),
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
    C = 4 * dims["C"]
    _, count = shares(dims["B"] * dims["T"], C)
    return count * C * 4


def shares(N: int, C: int) -> tuple[int, int]:
    """(rows of a block, blocks for N rows) of the sums over rows: as many as run at a time, with those beside them."""
    return share_out(N, at_a_time(THREADS, REGISTERS) // blocks(C, COLUMNS) or 1, FEWEST_ROWS)
