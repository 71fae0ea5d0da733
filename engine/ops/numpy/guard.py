"""Whether a step's update may happen, and how much of its gradient: decided where the loss and the norm are.

clip = max_norm / norm where norm > max_norm, else 1
skip = 1 where the loss or the norm is NaN or infinite, or its z-score exceeds its limit, else 0

A z-score is (value - mean) / standard deviation over the last WINDOW finite values, the new one included, and NaN
until WINDOW values have been seen. NaN and infinity never enter a window. A finite outlier that was skipped does:
if the loss has really moved, the window follows it and training goes on.
"""

import math
from typing import NamedTuple

import numpy as np

WINDOW = 128


class Decision(NamedTuple):
    """What `decide` writes, each a float64 array of shape ()."""

    clip: np.ndarray
    skip: np.ndarray
    norm: np.ndarray
    loss_z: np.ndarray
    norm_z: np.ndarray


def decide(
    decision: Decision,
    loss_window: np.ndarray,
    norm_window: np.ndarray,
    loss: np.ndarray,
    norm_squared: np.ndarray,
    *,
    max_norm: float,
    max_loss_z: float,
    max_norm_z: float,
) -> None:
    """Every field of decision =; loss_window and norm_window (WINDOW + 1) float64 +=: a ring, and how many it has seen.

    loss () and norm_squared () are this step's. max_norm, max_loss_z and max_norm_z: math.inf means no limit.
    """
    norm = math.sqrt(norm_squared) if norm_squared >= 0 else math.nan
    loss_z, norm_z = _score(loss_window, float(loss)), _score(norm_window, norm)
    finite = math.isfinite(loss) and math.isfinite(norm)
    decision.clip[...] = max_norm / norm if norm > max_norm else 1.0
    decision.skip[...] = not finite or loss_z > max_loss_z or norm_z > max_norm_z
    decision.norm[...] = norm
    decision.loss_z[...] = loss_z
    decision.norm_z[...] = norm_z


def _score(window: np.ndarray, value: float) -> float:
    """Puts value into the window and gives its z-score."""
    if not math.isfinite(value):
        return math.nan
    seen = int(window[WINDOW])
    window[seen % WINDOW] = value
    window[WINDOW] = seen + 1
    if seen < WINDOW:
        return math.nan
    deviation = float(window[:WINDOW].std())
    return (value - float(window[:WINDOW].mean())) / deviation if deviation > 0 else 0.0
