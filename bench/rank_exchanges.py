"""What a step's exchanges cost: the step with them and without, each of them beside computing and alone, and how long
computing waits for them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np

import train
from engine.comm import Communicator
from engine.device import eagerly
from engine.training import Training

Medians = dict[tuple[str, int], tuple[float, float]]
EXCHANGES = ("exchange", "reduce_scatter", "all_gather")
# One after the other is left out, to see what it costs: gathering (parameters, or with -z 0 gradients), exchanging
# gradients, and adding them up.
LEFT_OUT = {"gathering": ("all_gather",), "exchanging": ("exchange", "reduce_scatter"), "adding": ("sum",)}
FEW = 3  # steps: before those that are timed, and where each exchange is, for the marks between them cost a little


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


class Steps:
    """The steps of a training, one after another."""

    def __init__(self, t: Training):
        self.t, self._numbers = t, count()

    def take(self, steps: int) -> None:
        for _ in range(steps):
            train.train_step(self.t, next(self._numbers))

    def seconds(self, ranks: Communicator, steps: int) -> float:
        """Of one of so many steps, on this rank; all ranks begin them together."""
        dev = self.t.device
        self.take(FEW)
        dev.to_host(self.t.loss)  # they are done
        ranks.barrier()
        began = dev.mark()
        self.take(steps)
        self.t.zero.settle()
        return float(dev.seconds_between(began, dev.mark()) / steps)


@contextmanager
def without(t: Training, replay: Callable[..., None], left_out: Sequence[str]) -> Iterator[None]:
    """t leaves out these exchanges, or "sum", the sums over ranks: its numbers are nonsense then, if as many.

    replay: of its own, for graphs hold what was there.
    """
    zero: Any = t.zero
    usual = zero._comm, zero._ops, t.replay
    nothing: dict[str, Callable[..., None]] = dict.fromkeys(left_out, lambda *_, **__: None)
    if summing := nothing.pop("sum", None):
        zero._ops = Instead(t.ops, reduce=Instead(t.ops.reduce, sum_slices=summing))
    zero._comm, t.replay = Instead(zero._comm, **nothing), replay
    yield
    zero._comm, zero._ops, t.replay = usual


def seconds_in_turns(alone: Steps, together: Steps, steps: int, turns: int) -> dict[str, np.ndarray]:
    """Seconds of a step, (ranks, turns): "alone", of each rank on its own, all at once; "together"; and as LEFT_OUT
    calls it, of all, without that and all that stands before it.

    By turns, for a card's clock goes down while it gets warm, and up and down for other reasons.
    """
    t = together.t
    replays = {name: t.device.replay(t.run.cuda_graph, print) for name in LEFT_OUT}
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns):
        found["alone"].append(alone.seconds(t.comm, steps))
        found["together"].append(together.seconds(t.comm, steps))
        left_out: list[str] = []
        for name, these in LEFT_OUT.items():
            left_out += these
            with without(t, replays[name], left_out):
                found[name].append(together.seconds(t.comm, steps))
    return {name: t.comm.gather(np.array(seconds)) for name, seconds in found.items()}


def cost_of_exchanges(together: Steps) -> dict[str, Any]:
    """How long each exchange and sum takes, beside computing and alone, and how long computing waits for them: of each
    the least of all ranks, for others have also waited for a rank that came later.
    """
    t = together.t
    zero: Any = t.zero
    comm, summing, usual = t.comm, t.ops.reduce, t.replay
    timed, waits = Timed(t.device), Timed(t.device)
    zero._comm = Instead(
        comm,
        gather=waits.function("norm", comm.gather),
        **{name: timed.function(name, getattr(comm, name)) for name in EXCHANGES},
    )
    zero._ops = Instead(t.ops, reduce=Instead(summing, sum_slices=timed.function("sum", summing.sum_slices)))
    zero.settle, t.model.on_need = waits.function("sums", zero.settle), waits.function("parameters", zero.need)
    t.comm = Instead(comm, gather=waits.function("loss", comm.gather))
    t.replay = eagerly  # a graph would go on with what it has recorded
    together.take(FEW)
    waited = least(comm, waits.totals())
    del zero.settle
    t.comm, t.model.on_need, t.replay = comm, zero.need, usual
    zero.settle()
    beside = timed.medians()
    exchanges_alone(t)
    zero._comm, zero._ops = comm, t.ops
    return {"waits": waited, "phases": phases(comm, beside, alone=timed.medians())}


def phases(comm: Communicator, beside: Medians, alone: Medians) -> list[dict[str, Any]]:
    """Each kind of exchange and sum, by the bytes that it is of: beside computing, and alone."""
    us, us_alone = (least(comm, {key: us for key, (_, us) in medians.items()}) for medians in (beside, alone))
    return [
        {"name": name, "bytes": nbytes, "times": times, "us": us[name, nbytes], "us_alone": us_alone[name, nbytes]}
        for (name, nbytes), (times, _) in sorted(beside.items())
    ]


def least(comm: Communicator, figures: dict[Any, float]) -> dict[Any, float]:
    """The least of all ranks, who all have these figures, in this order."""
    return dict(zip(figures, comm.gather(np.array([*figures.values()])).min(axis=0).tolist(), strict=True))


def exchanges_alone(t: Training) -> None:
    """Every exchange and sum of a step, one after another, with nothing beside."""
    for _ in range(FEW):
        for bucket in range(len(t.model.params.buckets)):
            t.comm.barrier()
            t.zero.reduce(bucket)
            t.zero.settle()
            t.zero.gather_parameters(bucket)
            t.zero.settle()
