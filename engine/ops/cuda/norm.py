"""The global gradient norm: see engine/ops/numpy/norm.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda import scalars
from engine.ops.cuda.scratch import blocks, scratch

Array = Any

PER_BLOCK = 1 << 13  # elements: a layer of 7 M makes 860 blocks, enough for all multiprocessors


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
        defines=kernels.grad_variant(grads.dtype),
    )
    scalars.total(out, partial)


def scratch_bytes(dims: Mapping[str, int]) -> int:
    """Of the larger of the two kinds of buckets: the embedding, and a layer with the final layernorm."""
    C = dims["C"]
    return 8 * blocks(max((dims["Vp"] + dims["maxT"]) * C, 12 * C * C + 15 * C), PER_BLOCK)
