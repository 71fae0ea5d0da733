"""A training step to be timed, whole or operation by operation, on any device."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import click
import numpy as np

from engine import device, ops, training
from engine.comm import Communicator
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.device import eagerly
from engine.errors import UsageError
from engine.memory import gradient_dtype, require_memory
from engine.training import Training
from engine.watchdog import Watchdog

Array = Any

# What is multiplied costs power, and so time: 2 % more after 200 steps at 3e-4 than at first (bench/LOG.md). So peers
# are to be given this rate and as many batches, not one that is soon known by heart.
LEARNING_RATE, BATCHES = 1e-4, 8

# Arguments that are both read and written, by position or keyword. The gradients of parameters are not: a step of one
# micro-batch accumulates nothing.
ADDED_TO = {
    "layernorm.backward": (0,),
    "gelu.backward": (0,),
    "classifier.forward_backward": (1,),
    "adamw.update": (0, 1, 2, 3),
}


class Call(NamedTuple):
    """One call of an operation: its arrays tell what it had to do."""

    name: str  # as "linear.forward"
    arrays: Mapping[Any, Array]  # by position or keyword
    again: Callable[[], Any]  # makes the same call
    began: Any  # marks of the device
    ended: Any

    @property
    def shapes(self) -> dict[Any, tuple[int, ...]]:
        return {key: x.shape for key, x in self.arrays.items()}

    @property
    def nbytes(self) -> dict[Any, int]:
        return {key: x.nbytes for key, x in self.arrays.items()}


class Setting(NamedTuple):
    """Everything that a step needs, ready for it."""

    backend: str
    dev: ModuleType
    operations: ModuleType
    config: GPT2Config
    run: RunConfig
    tuning: dict[str, Any]


class Rates(NamedTuple):
    """What this device reaches: FLOP/s of a large matrix multiply, bytes/s (read and written) of a large copy."""

    flops: float
    nbytes: float


def options(command: Callable) -> Callable:
    """Gives a command the options that `set_up` takes: what of train.py's says how large a step is and how it runs."""
    for option in (
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="As in train.py."),
        click.option("--vocabulary", "V", default=50257, help="Tokens in the vocabulary."),
        click.option("--gemm-search", type=click.Choice(["auto", "full", "off"]), default="auto", help="See train.py."),
        click.option("-ge", "gelu_fusion", type=click.IntRange(-1, 2), default=-1, help="GELU fusion, as in train.py."),
        click.option("-r", "recompute", type=click.IntRange(0, 2), default=0, help="Recomputation, as in train.py."),
        click.option("-t", "T", default=1024, help="Tokens in a sequence."),
        click.option("-b", "B", default=64, help="Sequences in a step."),
        click.option("-e", "model", default="d12", help="Size, as in train.py."),
    ):
        command = option(command)
    return command


def set_up(V: int, layers: int | None = None, **values: Any) -> Setting:
    """As train.py does it for the same options: every kernel compiled, the multiplies tuned. Raises UserErrors.

    layers: so many instead of the model's.
    """
    run = RunConfig(**values)
    backend = device.choose(run.device, print)
    dev, operations = device.load(backend), ops.load(backend)
    config = model_from_descriptor(run.model, V, run.T)
    config = replace(config, L=layers or config.L)
    if problem := operations.unsupported(run.B, config.C, config.HS):
        raise UsageError(f"-e {run.model}: {problem}")
    require_memory(run, config, dev, operations, 1)
    tuning = prepare_and_tune(run, OneRank(), config, dev, operations, accumulates=False, say=print)
    return Setting(backend, dev, operations, config, run, tuning)


def prepare_and_tune(
    run: RunConfig,
    comm: Communicator,
    config: GPT2Config,
    dev: ModuleType,
    operations: ModuleType,
    *,
    accumulates: bool,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compiles every kernel and tunes the multiplies for the run's size: their table, the same on all ranks."""
    dims, dtype = config.dims() | {"B": run.B, "T": run.T}, gradient_dtype(run, dev)
    operations.prepare(dims, run.gelu_fusion, dtype)
    return training.tune_together(run, comm, operations, dims, dtype, accumulates, {}, say)


def random_batches(run: RunConfig, config: GPT2Config, seed: int = 0, count: int = BATCHES) -> np.ndarray:
    """Tokens and targets of so many batches, int32 (count,2,B,T)."""
    return np.random.default_rng(seed).integers(0, config.V, (count, 2, run.B, run.T)).astype(np.int32)


def make_step(
    config: GPT2Config, batches: np.ndarray, dev: ModuleType, operations: Any, *, recompute: int
) -> Callable[..., Array]:
    """A step of the engine: forward, backward, guard, clip, AdamW, on one batch after another, which are tokens and
    targets, int32 (count,2,B,T). Returns the loss ().

    It takes what calls the parts that are the same in every step: the device's `replay`, or `eagerly`, the default.
    """
    _, _, B, T = batches.shape
    run = RunConfig(B=B, T=T, recompute=recompute, weight_decay=0.1)
    model, _, optimizer = training.assemble(run, OneRank(), config, dev, operations)
    optimizer.set_parameters(training.initial_parameters(config, run.seed))
    loss, ready, batch = dev.zeros((), np.float64), dev.to_device(batches), dev.zeros((2, B, T), np.int32)
    tokens, targets = batch
    updates = 0

    def forward_and_backward() -> None:
        model.forward(tokens)
        loss.fill(0)
        operations.classifier.add_mean(loss, model.backward(tokens, targets, 1 / tokens.size, accumulate=False), 1.0)

    def step(replay: Callable[..., None] = eagerly) -> Array:
        nonlocal updates
        batch[...] = ready[updates % len(ready)]
        updates += 1
        replay(forward_and_backward)
        optimizer.step(updates, LEARNING_RATE, loss, replay)
        return loss

    return step


initial_parameters = cache(training.initial_parameters)  # for one run after another


def make_training(
    run: RunConfig, comm: Any, config: GPT2Config, dev: ModuleType, operations: Any, batches: Iterator[Any]
) -> Training:
    """A run of train.py's on batches: the tokens and targets, int32 (2,B,T), of one micro-batch after another."""
    model, zero, optimizer = training.assemble(run, comm, config, dev, operations)
    optimizer.set_parameters(initial_parameters(config, run.seed))
    return Training(
        run=run,
        comm=comm,
        config=config,
        device=dev,
        ops=operations,
        model=model,
        zero=zero,
        optimizer=optimizer,
        loader=SimpleNamespace(next=batches.__next__),  # type: ignore[arg-type]
        val=None,
        tokenizer=None,
        steps=1 << 30,
        start=0,
        watchdog=Watchdog(OneRank(), 0),
        uploads=(dev.Upload((run.B, run.T), np.int32), dev.Upload((run.B, run.T), np.int32)),
        replay=dev.replay(run.cuda_graph, print),
        lane_losses=dev.zeros((len(model.lanes),), np.float64),
        loss=dev.zeros((), np.float64),
        identity={},
    )


def release(dev: ModuleType) -> None:
    """Gives back the memory that nothing refers to any more, so that the next run finds it in one piece."""
    gc.collect()
    dev.free_unused()


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
            again = partial(function, *args, **kwargs)
            self.calls.append(Call(name, arrays, again, began, self._dev.mark()))
            return result

        return call


def flops(call: Call) -> float:
    """Of the matrix products in a call; what the rest takes is not counted."""
    kind, shapes = call.name, call.shapes
    if kind == "linear.forward":
        return 2.0 * math.prod(shapes[0]) * shapes[2][-1]
    if kind == "linear.backward":
        return 4.0 * math.prod(shapes[0]) * shapes[2][-1]
    if kind.startswith("attention"):
        (B, T, C), products = shapes[0 if kind == "attention.forward" else 1], 2 if kind == "attention.forward" else 5
        return 2.0 * products * B * T * (T + 1) / 2 * C
    return 0.0


def nbytes(call: Call) -> float:
    """The least that a call moves. Of an embedding's tables, the rows that occur at most."""
    if call.name.startswith("embedding"):
        tokens = 3 if call.name.endswith("backward") else 2
        activations = call.nbytes[0 if call.name.endswith("forward") else 2]
        return tokens * activations
    return sum(call.nbytes.values()) + sum(call.nbytes.get(key, 0) for key in ADDED_TO.get(call.name, ()))


def label(call: Call) -> str:
    """The operation, and of a linear layer its channels."""
    if call.name == "linear.forward":
        return f"{call.name} {call.shapes[2][-1]}>{call.shapes[0][-1]}"
    if call.name == "linear.backward":
        return f"{call.name} {call.shapes[0][-1]}<{call.shapes[2][-1]}"
    return call.name


def seconds_of(dev: ModuleType, function: Callable[[], Any], repeat: int) -> float:
    """The median of some repetitions, after one."""
    function()
    times = []
    for _ in range(repeat):
        began = dev.mark()
        function()
        times.append(dev.seconds_between(began, dev.mark()))
    return float(np.median(times))


def measure_rates(dev: ModuleType, operations: ModuleType) -> Rates:
    """On random data: zeros are faster, for they cost less power."""
    n = 8192 if dev.WORKS_ALONE else 1024
    rng = np.random.default_rng(0)
    a, b = (dev.to_device(rng.normal(size=(n, n)).astype(np.float32).astype(dev.COMPUTE_DTYPE)) for _ in range(2))
    out = dev.zeros((n, n), dev.COMPUTE_DTYPE)
    copy, moved = large_copy(dev)
    multiply = seconds_of(dev, lambda: operations.linear.forward(out, a, b), 10)
    return Rates(2.0 * n**3 / multiply, moved / seconds_of(dev, copy, 10))


def large_copy(dev: ModuleType) -> tuple[Callable[[], None], float]:
    """A copy from array to array, and the bytes that it reads and writes."""
    size = 1 << 30 if dev.WORKS_ALONE else 1 << 25
    source, target = dev.zeros((size,), "uint8"), dev.zeros((size,), "uint8")
    source[...] = 123

    def copy() -> None:
        target[...] = source

    return copy, 2.0 * size


def in_turns(
    dev: ModuleType, contenders: Sequence[Callable[[], Any]], warm_up: float, seconds: float
) -> list[list[float]]:
    """Seconds of each one's calls, for `seconds` after so much load: a card's clock falls while it gets warm, and by
    turns it falls for all of them alike. Each has one at least.
    """
    times: list[list[float]] = [[] for _ in contenders]
    began, marks = time.monotonic(), [dev.mark()]
    for turn in count():
        if all(times) and time.monotonic() - began >= warm_up + seconds:
            break
        contenders[turn % len(contenders)]()
        marks = [*marks[-2:], dev.mark()]
        if len(marks) == 3 and time.monotonic() - began >= warm_up:
            # One turn late: the device always has one to go on with.
            times[(turn - 1) % len(contenders)].append(dev.seconds_between(*marks[:2]))
    return times
