"""AdamW on flat buffers: see engine/ops/numpy/adamw.py. Sizes divide by 8."""

import math
from typing import Any

from engine.device import kernels
from engine.ops.cuda.scratch import blocks, variant

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
    grid, block = (blocks(n, 256 * 8),), (256,)
    if master is params:
        kernels.launch(
            "adamw",
            "adamw_update_without_master",
            grid,
            block,
            *(params, m, v, grads, clip, skip, *scalars, seed, t, stream, first),
            defines=variant(grads),
        )
    else:
        kernels.launch(
            "adamw",
            "adamw_update",
            grid,
            block,
            *(params, master, m, v, grads, clip, skip, *scalars),
            defines=variant(grads),
        )
