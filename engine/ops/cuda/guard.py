"""Whether a step's update may happen: see engine/ops/numpy/guard.py."""

from typing import Any

from engine.device import kernels
from engine.ops.numpy.guard import WINDOW, Decision

Array = Any

__all__ = ["WINDOW", "Decision", "decide"]


def decide(
    decision: Decision,
    loss_window: Array,
    norm_window: Array,
    loss: Array,
    norm_squared: Array,
    *,
    max_norm: float,
    max_loss_z: float,
    max_norm_z: float,
) -> None:
    kernels.launch(
        "guard",
        "guard_decide",
        (1,),
        (WINDOW,),
        *decision,
        *(loss_window, norm_window, loss, norm_squared, max_norm, max_loss_z, max_norm_z),
    )
