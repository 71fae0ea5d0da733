"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on flat buffers.

g = clip * grads
m = beta1 * m + (1 - beta1) * g           v = beta2 * v + (1 - beta2) * g^2
params -= lr * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * params)

A bfloat16 parameter and its remainder are a float32 number, its master. Without remainders it is rounded at random.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from engine.ops.numpy import rounding
from engine.ops.numpy.parallel import for_each_block
from engine.ops.numpy.scratch import scratch


class Schedule(NamedTuple):
    """All that changes from one update to the next, in the order in which `update` takes it as an array.

    Both bias corrections are taken out of the fraction: with c = sqrt(1 - beta2^t) it is
    lr * c / (1 - beta1^t) * m / (sqrt(v) + eps * c).
    """

    t: float  # counts updates from 1
    epsilon: float  # eps * c
    step_size: float  # lr * c / (1 - beta1^t)
    keep: float  # 1 - lr * weight_decay

    @classmethod
    def of(cls, t: int, lr: float, *, beta1: float, beta2: float, eps: float, weight_decay: float) -> "Schedule":
        c = math.sqrt(1 - beta2**t)
        return cls(t, eps * c, lr * c / (1 - beta1**t), 1 - lr * weight_decay)


def update(
    params: np.ndarray,
    remainder: np.ndarray | None,
    m: np.ndarray,
    v: np.ndarray,
    grads: np.ndarray,
    clip: np.ndarray,
    skip: np.ndarray,
    schedule: np.ndarray,
    *,
    beta1: float,
    beta2: float,
    decayed: int,
    seed: int = 0,
    stream: int = 0,
    first: int = 0,
) -> None:
    """params (n) +=, remainder (n) =, m (n) =, v (n) =; grads (n) are read.

    Weight decay applies to the first `decayed` elements. clip () scales the gradient and skip () != 0 leaves everything
    as it is: both are arrays that the device decided on (guard.decide), so that no host waits. schedule (4) float64
    holds a Schedule: an array too, so that every update is the same call, which a device may record once and replay.
    remainder, uint16, makes float32 of bfloat16 parameters (rounding.join); other parameters have none. Without one
    bfloat16 is rounded at random, by bits that are keyed by (seed, t) and counted by (stream, index); first is the
    index of the first element.
    """
    at_random = remainder is None and params.dtype == ml_dtypes.bfloat16
    if skip:
        return
    t, epsilon, step_size, keep = schedule.tolist()

    def update_block(block: slice) -> None:
        x, mb, vb = params[block], m[block], v[block]
        if remainder is not None:
            x = rounding.join(x, remainder[block])
        elif at_random:
            x = x.astype(np.float32)
        g = scratch("adamw.g", x.shape, x.dtype)
        np.multiply(grads[block], float(clip), out=g)
        tmp = scratch("adamw.tmp", x.shape, x.dtype)

        mb *= beta1
        mb += np.multiply(g, 1 - beta1, out=tmp)
        vb *= beta2
        g *= g
        vb += np.multiply(g, 1 - beta2, out=tmp)

        np.sqrt(vb, out=tmp)
        tmp += epsilon
        np.divide(mb, tmp, out=tmp)
        tmp *= step_size
        x[: max(0, decayed - block.start)] *= keep
        x -= tmp
        if remainder is not None:
            params[block], remainder[block] = rounding.split(x)
        elif at_random:
            bits = rounding.random_bits(first + block.start, x.size, seed=seed, t=int(t), stream=stream)
            params[block] = rounding.stochastic(x, bits)

    for_each_block(update_block, params.size, 1)
