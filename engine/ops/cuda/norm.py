"""The global gradient norm: see engine/ops/numpy/norm.py."""

from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda import scalars
from engine.ops.cuda.scratch import blocks, scratch, variant

Array = Any

PER_BLOCK = 1 << 15  # elements


def squared(out: Array, grads: Array) -> None:
    """grads (n): n divides by 8."""
    count = blocks(grads.size, PER_BLOCK)
    (partial,) = scratch(((count,), np.float64))
    kernels.launch(
        "norm",
        "norm_squared",
        (count,),
        (256,),
        *(partial, grads, PER_BLOCK, count, grads.size),
        defines=variant(grads),
    )
    scalars.total(out, partial)
