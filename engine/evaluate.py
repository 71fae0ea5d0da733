"""Validation loss."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np

from engine.comm import Communicator
from engine.data import Samples
from engine.models.gpt2 import GPT2


def validation_loss(
    model: GPT2,
    device: ModuleType,
    comm: Communicator,
    samples: Samples,
    B: int,
    count: int,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross-entropy in nats of the first `count` samples, in batches of B that are shared out among the ranks.

    Each sample's loss is summed in float64, and the sum over samples is exact: it depends on which samples there are,
    not on B or the number of ranks (float32 rounding inside a sample aside). tick is called for each batch.
    """
    sums = np.zeros(count)  # zeros stay where another rank has the sample
    for start in range(comm.rank * B, count, comm.world * B):
        indices = np.arange(start, min(start + B, count))
        inp, targets = samples.read(indices)
        model.forward(device.to_device(inp))
        losses = device.to_host(model.losses(device.to_device(targets)))
        sums[indices] = losses.sum(axis=1, dtype=np.float64)
        tick()
    return math.fsum(comm.gather(sums).ravel()) / (count * samples.T)
