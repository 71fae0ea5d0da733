"""The sums of a gradient's columns: what the bias that was added to every row receives."""

from functools import partial

import numpy as np

from engine.ops.numpy.parallel import matmul_blocks, run
from engine.ops.numpy.scratch import rows, write


def add(out: np.ndarray, x: np.ndarray, *, accumulate: bool) -> None:
    """out (C) = the sums of the columns of x (B,T,C), += with accumulate."""
    x = rows(x)

    def sums(block: slice) -> None:
        write(out[block], np.einsum("nc->c", x[:, block]), accumulate)

    run([partial(sums, block) for block in matmul_blocks(len(out))])
