"""What several ranks cost: `mpirun -np 4 python bench/ranks.py`.

Tokens per second of one rank alone and of all, in the same call on the same machine; for each way to share out (-z,
--reduce, --lanes) the step's time, with the exchanges and without them: the difference is what of them is not hidden
behind computing. Then how long each exchange and sum takes, on whatever stream it runs, and each rank's memory.

Tokens are random, and the updates are real ones. All that is timed is train.py's own step.
"""

import gc
import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from bench.machine import machine, versions
from engine import device, ops, training
from engine.comm import Communicator, connect, ending_together
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.device import eagerly
from engine.errors import UsageError, exit_on_user_error
from engine.memory import gradient_dtype, memory_by_class, require_memory
from engine.training import Training
from engine.watchdog import Watchdog

EXCHANGES = ("exchange", "reduce_scatter", "all_gather")
FEW = 3  # steps whose exchanges are timed one by one: the marks between them cost a little


class Silent:
    """Ranks that exchange nothing of a bucket: what a step would take if that cost nothing."""

    def __init__(self, comm: Communicator):
        self._comm = comm
        for name in EXCHANGES:
            setattr(self, name, lambda *_: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


class Timed:
    """Ranks whose exchanges are timed where they run. calls: (name, bytes of a rank's buffer, mark before, after)."""

    def __init__(self, comm: Communicator, dev: ModuleType):
        self._comm, self._dev = comm, dev
        self.calls: list[tuple[str, int, Any, Any]] = []
        for name in EXCHANGES:
            setattr(self, name, self.timed(name, getattr(comm, name)))

    def timed(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            began = self._dev.mark()
            function(*args, **options)
            self.calls.append((name, args[-1].nbytes, began, self._dev.mark()))

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def make(run: RunConfig, comm: Any, config: GPT2Config, dev: ModuleType, operations: Any, tokens: Any) -> Training:
    """A run on random tokens, int32 (2,B,T): every micro-batch is the same one."""
    model, zero, optimizer = training.assemble(run, comm, config, dev, operations)
    optimizer.set_parameters(training.initial_parameters(config, run.seed))
    parts: dict[str, Any] = {"run": run, "comm": comm, "config": config, "device": dev, "ops": operations}
    parts |= {"model": model, "zero": zero, "optimizer": optimizer, "val": None, "tokenizer": None, "identity": {}}
    return Training(
        **parts,
        loader=SimpleNamespace(next=lambda: tokens),  # type: ignore[arg-type]
        steps=1 << 30,
        start=0,
        watchdog=Watchdog(OneRank(), 0),
        uploads=(dev.Upload((run.B, run.T), np.int32), dev.Upload((run.B, run.T), np.int32)),
        replay=dev.replay(run.cuda_graph, print),
        lane_losses=dev.zeros((len(model.lanes),), np.float64),
        loss=dev.zeros((), np.float64),
    )


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


def phases(t: Training, timed: Timed) -> list[dict[str, Any]]:
    """Of rank 0: each kind of exchange and sum, by the bytes that it is of, per step."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name, nbytes, began, ended in timed.calls:
        seconds[name, nbytes].append(t.device.seconds_between(began, ended))
    return [
        {"name": name, "bytes": nbytes, "times": len(each) / FEW, "us": 1e6 * float(np.median(each))}
        for (name, nbytes), each in sorted(seconds.items())
    ]


def release(dev: ModuleType) -> None:
    """What nothing refers to any more is given back, so that the next run finds it in one piece."""
    gc.collect()
    if dev.WORKS_ALONE:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()


def measure(
    run: RunConfig, comm: Communicator, config: GPT2Config, dev: ModuleType, tokens: Any, warm_up: int, steps: int
) -> dict[str, Any]:
    """One way to share out: a step's time with exchanges and without, its phases, its memory."""
    operations = ops.load("cuda" if dev.WORKS_ALONE else "numpy")
    require_memory(run, config, dev, operations, comm.world)
    free = dev.available_bytes()
    t = make(run, comm, config, dev, operations, tokens)
    taken = free - dev.available_bytes()
    found: dict[str, Any] = {"seconds": seconds_a_step(t, warm_up, steps), "loss": float(dev.to_host(t.loss))}
    if comm.world > 1:
        zero: Any = t.zero
        timed = Timed(comm, dev)
        summed = SimpleNamespace(sum_slices=timed.timed("sum", operations.reduce.sum_slices))
        zero._comm, zero._ops = timed, SimpleNamespace(**vars(operations) | {"reduce": summed})
        t.replay = eagerly  # a graph would go on with what it has recorded
        for step in range(FEW):
            train.train_step(t, step)
        found["phases"] = phases(t, timed)
        zero._comm, zero._ops, t.replay = Silent(comm), operations, dev.replay(run.cuda_graph, print)
        found["seconds_silent"] = seconds_a_step(t, 2, steps)
    found["memory"] = memory_by_class(run, config, dev, operations, comm.world)
    found["taken"] = taken if dev.WORKS_ALONE else None  # on CPUs other programs take some too
    found["tokens_per_second"] = run.samples_per_step(comm.world) * run.T / found["seconds"]
    t = zero = None  # type: ignore[assignment]
    release(dev)
    return found


def name_of(run: RunConfig) -> str:
    parts = [f"-z {run.zero_stage}", f"--reduce {run.reduce}" * (run.reduce != "owner"), f"--lanes {run.lanes}"]
    accumulated = f"-d {run.total_batch}" * (run.total_batch != -1)
    return " ".join(part for part in (*parts[: 3 if run.lanes else 2], accumulated) if part)


def variants(run: RunConfig, world: int, lanes: int) -> list[RunConfig]:
    """The ways to share out that are measured."""
    found = [replace(run, zero_stage=stage, reduce=reduce) for stage in (0, 1, 2) for reduce in ("owner", "nccl")]
    if lanes:
        tokens = max(run.total_batch, lanes * run.B * run.T, world * run.B * run.T)
        step = replace(run, zero_stage=1, total_batch=tokens)
        found += [step, replace(step, lanes=lanes)]
    return found


def text(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{figures['command']}   {figures['date']}",
        figures["machine"],
        figures["versions"],
        "",
        *(
            f"one rank, {name}: {found['seconds'] * 1000:.2f} ms a step, {found['tokens_per_second']:,.0f} tokens/s"
            for name, found in figures["one rank"].items()
        ),
        f"ideal: {figures['world']} times that; exposed: the step less the same step without exchanges",
        "",
        f"{'':34}{'ms':>9}{'tokens/s':>13}{'of ideal':>10}{'exposed ms':>12}{'loss':>11}",
    ]
    for name, found in figures["variants"].items():
        exposed = (found["seconds"] - found["seconds_silent"]) * 1000
        lines.append(
            f"{name:34}{found['seconds'] * 1000:9.2f}{found['tokens_per_second']:13,.0f}"
            f"{found['of_ideal']:10.2%}{exposed:12.2f}{found['loss']:11.5f}"
        )
    for name, found in figures["variants"].items():
        lines += ["", f"{name}: on rank 0, by the bytes of the buffer"]
        for row in found["phases"]:
            rate = row["bytes"] / row["us"] / 1000
            lines.append(
                f"  {row['name']:16}{row['bytes']:>13,} bytes {row['times']:6.1f} times a step"
                f"{row['us']:12.1f} us each{rate:9.1f} GB/s"
            )
        classes = ", ".join(f"{kind} {nbytes / 2**20:,.1f}" for kind, nbytes in found["memory"].items() if nbytes)
        measured = f"; taken {found['taken'] / 2**20:,.1f}" if found["taken"] is not None else ""
        lines.append(f"  memory of a rank, MiB: {classes}{measured}")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("-e", "model", default="d12", help="Size, as in train.py.")
@click.option("-b", "B", default=64, help="Sequences of a rank's micro-batch.")
@click.option("-t", "T", default=1024, help="Tokens in a sequence.")
@click.option("-d", "total_batch", default=-1, help="Tokens in a step, as in train.py.")
@click.option("-r", "recompute", type=click.IntRange(0, 2), default=0, help="Recomputation, as in train.py.")
@click.option("--lanes", default=0, help="Measure so many lanes too, and the same step without.")
@click.option("--only", default="", help="Only what is called this, as -z 1; several with commas between them.")
@click.option("--cuda-graph", type=click.Choice(["on", "off"]), default="off", help="As in train.py.")
@click.option("--vocabulary", "V", default=50257, help="Tokens in the vocabulary.")
@click.option("--device", "wanted", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="As in train.py.")
@click.option("--warm-up", default=10, help="Steps before any that is timed.")
@click.option("--steps", default=20, help="Steps that are timed.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
@exit_on_user_error
def main(model: str, B: int, T: int, V: int, wanted: str, json_path: Path | None, **options: Any) -> None:
    """What several ranks cost, on random tokens."""
    comm = connect(os.environ)
    with ending_together(comm):
        if comm.world == 1:
            raise UsageError("one rank has nobody to exchange with: start several with mpirun -np")
        config = model_from_descriptor(model, V, T)
        common = {name: options[name] for name in ("total_batch", "recompute", "cuda_graph")}
        run = RunConfig(model=model, B=B, T=T, weight_decay=0.1, **common)
        wanted_names = {name.strip() for name in options["only"].split(",") if name.strip()}
        runs = {name_of(each): each for each in variants(run, comm.world, options["lanes"])}
        if unknown := wanted_names - runs.keys():
            raise UsageError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(runs)}")
        figures = compare(
            {name: each for name, each in runs.items() if not wanted_names or name in wanted_names},
            *(comm, config, wanted, options["warm_up"], options["steps"]),
        )
        if comm.rank == 0:
            print(text(figures))
            if json_path:
                json_path.write_text(json.dumps(figures, indent=1) + "\n")


def compare(
    runs: dict[str, RunConfig], comm: Communicator, config: GPT2Config, wanted: str, warm_up: int, steps: int
) -> dict[str, Any]:
    """All that is measured."""
    backend = device.choose(wanted, print if comm.rank == 0 else lambda line: None)
    ranks = training.on_devices(comm, backend)
    dev, operations = device.load(backend), ops.load(backend)
    run = next(iter(runs.values()))
    if problem := operations.unsupported(run.B, config.C, config.HS):
        raise UsageError(f"-e {run.model}: {problem}")
    dims, dtype = config.dims() | {"B": run.B, "T": run.T}, gradient_dtype(run, dev)
    operations.prepare(dims, run.gelu_fusion, dtype)
    training.tune_together(run, ranks, operations, dims, dtype, {}, lambda line: None)
    rng = np.random.default_rng(comm.rank)
    tokens = tuple(rng.integers(0, config.V, (run.B, run.T)).astype(np.int32) for _ in range(2))
    measuring = config, dev, tokens, warm_up, steps
    # Each way is compared with one rank that takes the same micro-batches, or with -d the same steps.
    alone = {each.total_batch: replace(each, zero_stage=0, reduce="owner", lanes=0) for each in runs.values()}
    one = {batch: measure(each, OneRank(), *measuring) if comm.rank == 0 else {} for batch, each in alone.items()}
    ranks.barrier()
    found: dict[str, Any] = {name: measure(each, ranks, *measuring) for name, each in runs.items()}
    if comm.rank == 0:
        for name, each in runs.items():
            ideal = comm.world * one[each.total_batch]["tokens_per_second"]
            found[name]["of_ideal"] = found[name]["tokens_per_second"] / ideal
    return {
        "one rank": {name_of(alone[batch]): each for batch, each in one.items()},
        "variants": found,
        "world": comm.world,
        "command": shlex.join(["mpirun", "-np", str(comm.world), "python", *sys.argv]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "machine": f"{comm.world} ranks, each on {dev.describe()}; {machine(backend)}",
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
