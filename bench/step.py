"""A training step to be timed, whole or operation by operation, on any device."""

from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from engine import training
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig
from engine.device import eagerly

Array = Any


class Call(NamedTuple):
    """One call of an operation: its arguments' shapes tell what it had to do."""

    name: str  # as "linear.forward"
    shapes: Mapping[Any, tuple[int, ...]]  # of the arrays, by position or keyword
    nbytes: Mapping[Any, int]
    began: Any  # marks of the device
    ended: Any


def make_step(
    config: GPT2Config,
    inp: np.ndarray,
    targets: np.ndarray,
    dev: ModuleType,
    operations: Any,
    *,
    recompute: int,
) -> Callable[..., Array]:
    """A step of the engine on one batch (int32 (B,T)): forward, backward, guard, clip, AdamW. Returns the loss ().

    It takes what calls the parts that are the same in every step: the device's `replay`, or `eagerly`, the default.
    """
    B, T = inp.shape
    run = RunConfig(B=B, T=T, recompute=recompute, weight_decay=0.1)
    model, _, optimizer = training.assemble(run, OneRank(), config, dev, operations)
    optimizer.set_parameters(training.initial_parameters(config, run.seed))
    loss, tokens, wanted = dev.zeros((), np.float64), dev.to_device(inp), dev.to_device(targets)
    updates = 0

    def accumulate() -> None:
        model.zero_grads()
        model.forward(tokens)
        loss.fill(0)
        operations.classifier.add_mean(loss, model.backward(tokens, wanted, 1 / inp.size), 1.0)

    def step(replay: Callable[..., None] = eagerly) -> Array:
        nonlocal updates
        updates += 1
        replay(accumulate)
        optimizer.step(updates, 3e-4, loss, replay)
        return loss

    return step


class Recorded:
    """The operations of a device; while `calls` is a list, every call is noted there."""

    def __init__(self, operations: ModuleType, dev: ModuleType):
        self.calls: list[Call] | None = None
        self._dev = dev
        for module in operations.__all__:
            members = vars(getattr(operations, module))
            own = {
                name: self._wrap(f"{module}.{name}", member)
                for name, member in members.items()
                if callable(member)
                and not isinstance(member, type)
                and not name.startswith("_")
                and getattr(member, "__module__", "").endswith(f".{module}")
            }
            setattr(self, module, SimpleNamespace(**{**members, **own}))

    def _wrap(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.calls is None:
                return function(*args, **kwargs)
            began = self._dev.mark()
            result = function(*args, **kwargs)
            arrays = {key: x for key, x in [*enumerate(args), *kwargs.items()] if hasattr(x, "nbytes")}
            shapes = {key: x.shape for key, x in arrays.items()}
            self.calls.append(Call(name, shapes, {key: x.nbytes for key, x in arrays.items()}, began, self._dev.mark()))
            return result

        return call
