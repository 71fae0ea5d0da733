"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on flat buffers.

g = clip * grads
m = beta1 * m + (1 - beta1) * g           v = beta2 * v + (1 - beta2) * g^2
master -= lr * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * master)
params  = master, rounded to their dtype: to nearest, or at random where bfloat16 parameters have no master
"""

import math

import ml_dtypes
import numpy as np

from engine.ops.numpy import rounding
from engine.ops.numpy.parallel import for_each_block
from engine.ops.numpy.scratch import scratch


def update(
    params: np.ndarray,
    master: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    grads: np.ndarray,
    clip: np.ndarray,
    skip: np.ndarray,
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
    """params (n) =, master (n) +=, m (n) =, v (n) =; grads (n) are read; t counts updates from 1.

    clip () scales the gradient and skip () != 0 leaves everything as it is: both are arrays that the device decided
    on (guard.decide), so that no host waits. master may be params itself: then bfloat16 parameters are rounded at
    random, by bits that are keyed by (seed, t) and counted by (stream, index); first is the index of the first element.
    """
    at_random = master is params and params.dtype == ml_dtypes.bfloat16
    if skip:
        return
    # With both bias corrections taken out of the fraction:  m / (sqrt(v) + eps * c) * (lr * c / (1 - beta1^t)).
    c = math.sqrt(1 - beta2**t)
    step_size = lr * c / (1 - beta1**t)

    def update_block(block: slice) -> None:
        x, mb, vb = master[block], m[block], v[block]
        if at_random:
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
        tmp += eps * c
        np.divide(mb, tmp, out=tmp)
        tmp *= step_size
        x *= 1 - lr * weight_decay
        x -= tmp
        if at_random:
            bits = rounding.random_bits(first + block.start, x.size, seed=seed, t=t, stream=stream)
            params[block] = rounding.stochastic(x, bits)
        elif params is not master:
            params[block] = x

    for_each_block(update_block, master.size, 1)
