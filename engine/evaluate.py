"""Validation loss."""

from types import ModuleType

import numpy as np

from engine.data import Samples
from engine.models.gpt2 import GPT2


def validation_loss(model: GPT2, device: ModuleType, samples: Samples, B: int, count: int) -> float:
    """Mean cross-entropy in nats of the first `count` samples, B at a time, the last batch being what is left.

    The sum is made in float64: it depends on which samples there are, not on B (float32 rounding inside a batch aside).
    """
    total = 0.0
    for start in range(0, count, B):
        inp, targets = samples.read(np.arange(start, min(start + B, count)))
        model.forward(device.to_device(inp))
        total += float(device.to_host(model.losses(device.to_device(targets))).sum(dtype=np.float64))
    return total / (count * samples.T)
