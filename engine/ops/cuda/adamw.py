"""AdamW on flat buffers: see engine/ops/numpy/adamw.py. Sizes divide by 8."""

import math
from typing import Any

from engine.device import kernels
from engine.ops.cuda.scratch import blocks

Array = Any


def update(
    params: Array,
    master: Array,
    m: Array,
    v: Array,
    grads: Array,
    clip: Array,
    skip: Array,
    *,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int = 0,
    stream: int = 0,
    first: int = 0,
) -> None:
    n, c = params.size, math.sqrt(1 - beta2**t)
    scalars = n, beta1, beta2, eps * c, lr * c / (1 - beta1**t), 1 - lr * weight_decay
    args: tuple[Any, ...]
    if master is params:
        name, args = "adamw_update_without_master", (params, m, v, grads, clip, skip, *scalars, seed, t, stream, first)
    else:
        name, args = "adamw_update", (params, master, m, v, grads, clip, skip, *scalars)
    kernels.launch("adamw", name, (blocks(n, 256 * 8),), (256,), *args, defines=kernels.grad_variant(grads.dtype))
