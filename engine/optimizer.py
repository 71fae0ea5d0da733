"""AdamW over the flat buffers of a model, its learning-rate schedules, and the guard before each update."""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from engine.arena import Arena
from engine.config import RunConfig
from engine.device import eagerly
from engine.ops.numpy import rounding
from engine.zero import Zero


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


class AdamW:
    """Moments in fp32 for the parameters that this rank updates, and the windows of the outlier guard.

    Where parameters are bf16, remainders too, which make fp32 masters of them: the parameters are the masters, rounded
    to nearest. Without (-w 0) the parameters are rounded at random.

    The schedule aside, which is uploaded, a step needs nothing from the host: the guard's clip factor and skip flag
    stay on the device, and `decision` can be read whenever the host wants to log it.
    """

    def __init__(
        self,
        params: Arena,
        decayed: set[str],
        zero: Zero,
        run: RunConfig,
        ops: ModuleType,
        device: ModuleType,
        dtype: Any = np.float32,
    ):
        self._params, self._zero = params, zero
        self._run, self._ops, self._device = run, ops, device
        self.m, self.v = device.zeros((zero.num_owned,), dtype), device.zeros((zero.num_owned,), dtype)
        has_remainder = run.master_weights and params.flat.dtype == ml_dtypes.bfloat16
        self.remainder = device.zeros((zero.num_owned,), np.uint16) if has_remainder else None
        segments = _owned_segments(zero.owned, list(_decay_segments(params, decayed)), params.buckets)
        self._segments = {bucket: list(those) for bucket, those in groupby(segments, lambda segment: segment.bucket)}
        self._norm_squared = device.zeros((), np.float64)
        self._windows = {
            name: device.zeros((ops.guard.WINDOW + 1,), np.float64) for name in ("loss_window", "norm_window")
        }
        self.decision = ops.guard.Decision(*(device.zeros((), np.float64) for _ in ops.guard.Decision._fields))
        self._schedule = device.Upload((len(ops.adamw.Schedule._fields),), np.float64)

    def step(self, t: int, lr: float, loss: Any, replay: Callable[..., None] = eagerly) -> None:
        """Update number t (from 1) of the parameters, unless the guard skips it; loss () is this step's mean.

        The gradients have been summed over the ranks; afterwards every rank has all parameters, each bucket's after
        zero.need. replay: the device's, which calls what is the same in every step.
        """
        run = self._run
        options = {"beta1": run.beta1, "beta2": run.beta2, "eps": run.eps, "weight_decay": run.weight_decay}
        self._schedule(np.array(self._ops.adamw.Schedule.of(t, lr, **options)))
        replay(self._update, loss, replay is not eagerly)

    def _update(self, loss: Any, settles: bool) -> None:
        """settles: nothing is left aside, for what is recorded has to be whole."""
        run, ops = self._run, self._ops
        self._zero.norm_squared(self._norm_squared)
        ops.guard.decide(
            self.decision,
            self._windows["loss_window"],
            self._windows["norm_window"],
            loss,
            self._norm_squared,
            max_norm=run.max_norm or math.inf,
            max_loss_z=run.max_loss_z or math.inf,
            max_norm_z=run.max_norm_z or math.inf,
        )
        for bucket, segments in self._segments.items():
            for segment in segments:
                self._update_segment(segment)
            self._zero.gather_parameters(bucket)
        if settles:
            self._zero.settle()

    def _update_segment(self, segment: "_Segment") -> None:
        run = self._run
        self._ops.adamw.update(
            self._params.flat[segment.span],
            None if self.remainder is None else self.remainder[segment.owned],
            self.m[segment.owned],
            self.v[segment.owned],
            self._zero.gradient(segment.span, segment.owned),
            self.decision.clip,
            self.decision.skip,
            self._schedule.array,
            beta1=run.beta1,
            beta2=run.beta2,
            decayed=segment.decayed,
            seed=run.seed,
            stream=segment.bucket,
            first=segment.first,
        )

    def set_parameters(self, values: dict[str, np.ndarray]) -> None:
        """The parameters, and what makes masters of them, = values (fp32) by name."""
        remainders = {}
        for name, view in self._params.views.items():
            if self.remainder is None:
                self._device.put(view, values[name].astype(view.dtype))
            else:
                params, remainders[name] = rounding.split(values[name])
                self._device.put(view, params)
        if self.remainder is not None:
            self._take(self.remainder, remainders)

    def parameters(self) -> dict[str, np.ndarray]:
        """On rank 0's host: the parameters by name, with all the digits that there are; on other ranks none. All ranks
        call it together.
        """
        self._zero.settle()
        remainders = None if self.remainder is None else self._params.split(self._zero.whole(self.remainder))
        if self._zero.rank > 0:
            return {}
        params = {name: self._device.to_host(view) for name, view in self._params.views.items()}
        if remainders is None:
            return params
        return {name: rounding.join(params[name], remainders[name]) for name in params}

    def state(self) -> dict[str, np.ndarray]:
        """On rank 0's host: every array to be saved, by name, the same at any number of ranks. All ranks call it
        together.
        """
        moments = {
            f"{kind}.{name}": view
            for kind, owned in (("m", self.m), ("v", self.v))
            for name, view in self._params.split(self._zero.whole(owned)).items()
        }
        return moments | {name: self._device.to_host(window) for name, window in self._windows.items()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes this rank's part of what `state` gave, be it on another number of ranks."""
        for kind, owned in (("m", self.m), ("v", self.v)):
            self._take(owned, {name: state[f"{kind}.{name}"] for name in self._params.views})
        for name, window in self._windows.items():
            self._device.put(window, state[name])

    def _take(self, owned: Any, values: dict[str, np.ndarray]) -> None:
        """owned = this rank's part of values, which are all tensors by name."""
        flat = np.zeros(self._params.flat.size, owned.dtype)
        for name, view in self._params.split(flat).items():
            view[...] = values[name]
        self._zero.restore(owned, flat)


class _Segment(NamedTuple):
    """Neighbours that are updated together."""

    span: slice  # of the flat buffers
    owned: slice  # of the moments and remainders
    decayed: int  # how many of the first ones weight decay applies to
    bucket: int
    first: int  # the first one's index in its bucket: unlike that in the flat buffers, it depends on no padding


def _owned_segments(owned: list[slice], segments: list[tuple[slice, int]], buckets: list[slice]) -> Iterator[_Segment]:
    """All that this rank updates. owned: its slice of each bucket."""
    before = 0  # elements of the owned slices that came before this one
    for number, (own, bucket) in enumerate(zip(owned, buckets, strict=True)):
        for span, decayed in segments:
            start, stop = max(own.start, span.start), min(own.stop, span.stop)
            if start < stop:
                shift = before - own.start
                moments = slice(start + shift, stop + shift)
                decays = min(max(0, span.start + decayed - start), stop - start)
                yield _Segment(slice(start, stop), moments, decays, number, start - bucket.start)
        before += own.stop - own.start


def _decay_segments(params: Arena, decayed: set[str]) -> Iterator[tuple[slice, int]]:
    """Runs of neighbours in the flat buffer: some that weight decay applies to, whose number is told, then others."""
    start = others = stop = 0
    for name, span in params.spans().items():
        if name in decayed:
            if others < stop:
                yield slice(start, stop), others - start
                start = span.start
            others = span.stop
        stop = span.stop
    yield slice(start, stop), others - start
