"""The specification of every operation, in numpy; also the CPU device.

Written for any dtype: float32 runs, float64 and complex128 prove. A complex input makes every function an analytic
one (maxima are taken of real parts, nothing is conjugated), so that a complex step gives exact derivatives.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

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
    reduce,
    sampling,
    scalars,
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
    "reduce",
    "sampling",
    "scalars",
]


def unsupported(B: int, C: int, HS: int) -> str:
    """Why these operations cannot run B sequences of a model of C channels and heads of HS; empty if they can."""
    return ""


def scratch_bytes(dims: Mapping[str, int], grad_dtype: Any) -> int:
    """Memory besides the arguments that the operations take at these sizes (by letter) with gradients of grad_dtype, if
    it is worth a word.
    """
    return 0


def prepare(dims: Mapping[str, int], gelu_fusion: int, grad_dtype: Any) -> None:
    """What can be done before the first step, for these sizes and gradients of grad_dtype. gelu_fusion: as -ge."""


def tune(
    dims: Mapping[str, int],
    gelu_fusion: int,
    grad_dtype: Any,
    accumulates: bool,
    saved: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    thorough: bool = False,
) -> dict[str, Any]:
    """What this device chose by timing for a training step, after `prepare` for the same: a table as JSON can hold it,
    empty where there is no choice. accumulates: whether some micro-batches' gradients are added to those of others.
    `saved`: such a table that a run has used before, which is kept to where it is good here. thorough: among more ways.
    """
    return {}


def use_tuning(table: Mapping[str, Any]) -> None:
    """From now on the operations follow this table, which `tune` gave; an empty one leaves all to the libraries."""
