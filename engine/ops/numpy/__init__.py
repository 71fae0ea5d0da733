"""The specification of every operation, in numpy; also the CPU device.

Written for any dtype: float32 runs, float64 and complex128 prove. A complex input makes every function an analytic
one (maxima are taken of real parts, nothing is conjugated), so that a complex step gives exact derivatives.
"""

import warnings

from engine.ops.numpy import (
    adamw,
    attention,
    classifier,
    embedding,
    gelu,
    guard,
    layernorm,
    linear,
    norm,
    sampling,
)

# A run that diverges overflows; the guard sees every loss and gradient, and says so better than numpy does.
warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"engine\.ops\.numpy")

__all__ = [
    "adamw",
    "attention",
    "classifier",
    "embedding",
    "gelu",
    "guard",
    "layernorm",
    "linear",
    "norm",
    "sampling",
]
