"""What a step's exchanges cost: the step with them and without, each of them beside computing and alone, and how long
computing waits for them.
"""

from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

import train
from engine.device import eagerly
from engine.training import Training

Medians = dict[tuple[str, int], tuple[float, float]]
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
    """Functions that are timed where they run. calls: (name, bytes of the last argument, mark before, mark after)."""

    def __init__(self, dev: ModuleType):
        self._dev = dev
        self.calls: list[tuple[str, int, Any, Any]] = []

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = self._dev.mark()
            result = function(*args, **options)
            nbytes = getattr(args[-1], "nbytes", 0) if args else 0
            self.calls.append((name, nbytes, began, self._dev.mark()))
            return result

        return call

    def medians(self) -> Medians:
        """(name, bytes) -> how often in each of FEW steps, and how many us: of the calls since the last time."""
        seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        for name, nbytes, began, ended in self.calls:
            seconds[name, nbytes].append(self._dev.seconds_between(began, ended))
        self.calls.clear()
        return {key: (len(each) / FEW, 1e6 * float(np.median(each))) for key, each in seconds.items()}

    def totals(self) -> dict[str, float]:
        """name -> us in each of FEW steps: of the calls since the last time."""
        us: dict[str, float] = defaultdict(float)
        for name, _, began, ended in self.calls:
            us[name] += 1e6 * self._dev.seconds_between(began, ended) / FEW
        self.calls.clear()
        return dict(us)


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
    """Each exchange's and sum's times, the waits for them, and the seconds of a step without exchanges: t has none from
    then on.
    """
    zero: Any = t.zero
    comm = t.comm
    timed, waits = Timed(t.device), Timed(t.device)
    summed = Instead(t.ops.reduce, sum_slices=timed.function("sum", t.ops.reduce.sum_slices))
    zero._comm = Instead(
        comm,
        gather=waits.function("norm", comm.gather),
        **{name: timed.function(name, getattr(comm, name)) for name in EXCHANGES},
    )
    zero._ops = Instead(t.ops, reduce=summed)
    zero.settle, t.model.on_need = waits.function("sums", zero.settle), waits.function("parameters", zero.need)
    t.comm = Instead(comm, gather=waits.function("loss", comm.gather))
    t.replay = eagerly  # a graph would go on with what it has recorded
    for step in range(FEW):
        train.train_step(t, step)
    waited = waits.totals()
    t.comm, t.model.on_need = comm, zero.need
    del zero.settle
    zero.settle()
    beside = timed.medians()
    exchanges_alone(t)
    found: dict[str, Any] = {"waits": waited, "phases": phases(beside, alone=timed.medians())}
    zero._comm = Instead(comm, **dict.fromkeys(EXCHANGES, lambda *_: None))
    zero._ops, t.replay = t.ops, t.device.replay(t.run.cuda_graph, print)
    return found | {"seconds_silent": seconds_a_step(t, 2, steps)}


def phases(beside: Medians, alone: Medians) -> list[dict[str, Any]]:
    """Each kind of exchange and sum, by the bytes that it is of: beside computing, and alone."""
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
