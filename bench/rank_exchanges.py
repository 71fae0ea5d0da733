"""What a step's exchanges cost: the step with them and without, and each of them beside computing and alone."""

from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

import train
from engine.device import eagerly
from engine.training import Training

EXCHANGES = ("exchange", "reduce_scatter", "all_gather")
FEW = 3  # steps whose exchanges are timed one by one: the marks between them cost a little


class Instead:
    """Something with other functions in place of some of its own."""

    def __init__(self, of: Any, **functions: Any):
        self._of = of
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class Timed:
    """Functions that are timed where they run. calls: (name, bytes of the last array, mark before, mark after)."""

    def __init__(self, dev: ModuleType):
        self._dev = dev
        self.calls: list[tuple[str, int, Any, Any]] = []

    def function(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            began = self._dev.mark()
            function(*args, **options)
            self.calls.append((name, args[-1].nbytes, began, self._dev.mark()))

        return call

    def medians(self) -> dict[tuple[str, int], tuple[float, float]]:
        """(name, bytes) -> how often in each of FEW steps, and how many us: of the calls since the last time."""
        seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        for name, nbytes, began, ended in self.calls:
            seconds[name, nbytes].append(self._dev.seconds_between(began, ended))
        self.calls.clear()
        return {key: (len(each) / FEW, 1e6 * float(np.median(each))) for key, each in seconds.items()}


def start_beside_attention(t: Training) -> None:
    """The exchange of a layer begins when attention's backward of the layer below does, not with the next multiply.

    An experiment: NCCL's blocks take a multiprocessor each for themselves, and a multiply whose blocks stay from its
    beginning to its end, one on each, ends late if it does not get all at once; attention has many short blocks.
    """
    waiting: list[int] = []
    operations: Any = t.ops

    def begin() -> None:
        while waiting:
            t.zero.reduce(waiting.pop(0))

    def ready(bucket: int) -> None:
        waiting.append(bucket)
        if bucket <= 1:  # no attention follows
            begin()

    def attention_backward(*args: Any, **options: Any) -> None:
        begin()
        operations.attention.backward(*args, **options)

    attention = Instead(operations.attention, backward=attention_backward)
    t.model.ops = Instead(operations, attention=attention)  # type: ignore[assignment]
    before = t.zero.when_ready
    t.zero.when_ready = lambda first, last: ready if last else before(first, last)  # type: ignore[method-assign]


def seconds_a_step(t: Training, warm_up: int, steps: int) -> float:
    """Of the slowest rank."""
    for step in range(warm_up):
        train.train_step(t, step)
    t.device.to_host(t.loss)
    t.comm.barrier()
    began = t.device.mark()
    for step in range(warm_up, warm_up + steps):
        train.train_step(t, step)
    t.zero.settle()
    seconds = t.device.seconds_between(began, t.device.mark()) / steps
    return float(t.comm.gather(np.array([seconds])).max())


def cost_of_exchanges(t: Training, steps: int) -> dict[str, Any]:
    """Each exchange's and sum's times, and the seconds of a step without exchanges: t has none from then on."""
    zero: Any = t.zero
    timed = Timed(t.device)
    summed = Instead(t.ops.reduce, sum_slices=timed.function("sum", t.ops.reduce.sum_slices))
    zero._comm = Instead(t.comm, **{name: timed.function(name, getattr(t.comm, name)) for name in EXCHANGES})
    zero._ops = Instead(t.ops, reduce=summed)
    t.replay = eagerly  # a graph would go on with what it has recorded
    found: dict[str, Any] = {"phases": phases(t, timed)}
    zero._comm = Instead(t.comm, **dict.fromkeys(EXCHANGES, lambda *_: None))
    zero._ops, t.replay = t.ops, t.device.replay(t.run.cuda_graph, print)
    return found | {"seconds_silent": seconds_a_step(t, 2, steps)}


def phases(t: Training, timed: Timed) -> list[dict[str, Any]]:
    """Each kind of exchange and sum, by the bytes that it is of: beside computing and alone."""
    for step in range(FEW):
        train.train_step(t, step)
    t.zero.settle()
    beside = timed.medians()
    exchanges_alone(t)
    alone = timed.medians()
    return [
        {"name": name, "bytes": nbytes, "times": times, "us": us, "us_alone": alone[name, nbytes][1]}
        for (name, nbytes), (times, us) in sorted(beside.items())
    ]


def exchanges_alone(t: Training) -> None:
    """Every exchange and sum of a step, one after another, with nothing beside."""
    for _ in range(FEW):
        for bucket in range(len(t.model.params.buckets)):
            t.comm.barrier()
            t.zero.reduce(bucket)
            t.zero.settle()
            t.zero.gather_parameters(bucket)
            t.zero.settle()
