"""AdamW over the flat buffers of a model, its learning-rate schedules, and the guard before each update."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from engine.arena import Arena, Tensor
from engine.config import RunConfig


def learning_rate(step: int, steps: int, run: RunConfig) -> float:
    """The learning rate of step (from 0) of `steps`: linear warm-up, then the schedule from lr to final_lr * lr.

    cosine and linear decay over all that follows the warm-up. wsd stays at lr until 80 % of the run, then falls as
    1 - sqrt (Haegele et al. 2024, arXiv 2405.18392). Formulas as llm.c's, save that its constant has no warm-up.
    """
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    low = run.final_lr * run.lr
    done = (step - run.warmup) / (steps - run.warmup)
    if run.schedule == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * done)) * (run.lr - low)
    if run.schedule == "linear":
        return low + (1 - done) * (run.lr - low)
    if run.schedule == "wsd":
        decay_start = int(0.8 * steps)
        decayed = max(0.0, (step - decay_start) / (steps - decay_start))
        return low + (1 - math.sqrt(decayed)) * (run.lr - low)
    return run.lr


def optimizer_tensors(parameters: list[Tensor], dtype: Any) -> list[Tensor]:
    """What AdamW keeps for these parameters: one moment's table; it has two (and masters where dtypes differ)."""
    return [Tensor(tensor.name, tensor.shape, dtype) for tensor in parameters]


class AdamW:
    """Moments and masters in fp32 for `params`, and the windows of the outlier guard.

    The learning rate aside, a step needs nothing from the host: the guard's clip factor and skip flag stay on the
    device, and `decision` can be read whenever the host wants to log it.
    """

    def __init__(
        self,
        params: Arena,
        grads: Arena,
        decayed: set[str],
        run: RunConfig,
        ops: ModuleType,
        device: ModuleType,
        dtype: Any = np.float32,
    ):
        self._params, self._grads, self._run, self._ops = params, grads, run, ops
        tensors = optimizer_tensors(list(params.tensors), dtype)
        self.m, self.v = Arena(tensors, device.zeros), Arena(tensors, device.zeros)
        self._segments = list(_decay_segments(params, decayed))
        self._norm_squared = device.zeros((), np.float64)
        self.loss_window = device.zeros((ops.guard.WINDOW + 1,), np.float64)
        self.norm_window = device.zeros((ops.guard.WINDOW + 1,), np.float64)
        self.decision = ops.guard.Decision(*(device.zeros((), np.float64) for _ in ops.guard.Decision._fields))

    def step(self, t: int, lr: float, loss: Any) -> None:
        """Update number t (from 1) of params from grads, unless the guard skips it; loss () is this step's mean."""
        run, ops = self._run, self._ops
        ops.norm.squared(self._norm_squared, self._grads.flat)
        ops.guard.decide(
            self.decision,
            self.loss_window,
            self.norm_window,
            loss,
            self._norm_squared,
            max_norm=run.max_norm or math.inf,
            max_loss_z=run.max_loss_z or math.inf,
            max_norm_z=run.max_norm_z or math.inf,
        )
        params, m, v, grads = self._params.flat, self.m.flat, self.v.flat, self._grads.flat
        for span, decays in self._segments:
            ops.adamw.update(
                params[span],
                params[span],
                m[span],
                v[span],
                grads[span],
                self.decision.clip,
                self.decision.skip,
                t=t,
                lr=lr,
                beta1=run.beta1,
                beta2=run.beta2,
                eps=run.eps,
                weight_decay=run.weight_decay if decays else 0.0,
            )

    def state(self) -> dict[str, Any]:
        """Every array to be saved and restored, by name."""
        moments = {f"{kind}.{name}": view for kind in ("m", "v") for name, view in getattr(self, kind).views.items()}
        return moments | {"loss_window": self.loss_window, "norm_window": self.norm_window}


def _decay_segments(params: Arena, decayed: set[str]) -> Iterator[tuple[slice, bool]]:
    """Runs of neighbours in the flat buffer with the same answer to: does weight decay apply?"""
    start = stop = 0
    decays = False
    for name, span in params.spans().items():
        if (name in decayed) != decays:
            if stop > start:
                yield slice(start, stop), decays
            start, decays = span.start, name in decayed
        stop = span.stop
    yield slice(start, stop), decays
