"""AdamW on flat buffers: see engine/ops/numpy/adamw.py. Sizes divide by 8, `decayed` too."""

from typing import Any

from engine.device import kernels
from engine.ops.cuda.scratch import blocks
from engine.ops.numpy.adamw import Schedule

Array = Any

__all__ = ["Schedule", "update"]


def update(
    params: Array,
    remainder: Array | None,
    m: Array,
    v: Array,
    grads: Array,
    clip: Array,
    skip: Array,
    schedule: Array,
    *,
    beta1: float,
    beta2: float,
    decayed: int,
    seed: int = 0,
    stream: int = 0,
    first: int = 0,
) -> None:
    n = params.size
    scalars = clip, skip, schedule, n, decayed, beta1, beta2
    args: tuple[Any, ...]
    if remainder is None:
        name, args = "adamw_update_without_remainder", (params, m, v, grads, *scalars, seed, stream, first)
    else:
        name, args = "adamw_update", (params, remainder, m, v, grads, *scalars)
    kernels.launch("adamw", name, (blocks(n, 256 * 8),), (256,), *args, defines=kernels.grad_variant(grads.dtype))
