"""What several ranks cost: `mpirun -np 4 python bench/ranks.py`.

For each way to share out (-z, --reduce, --carrier, --lanes), in turns on the same machine, the step's time of one rank
alone, of all, and of all without exchanges, one kind after the other: by what it is less, they are not hidden. Then how
long each exchange and sum takes, on whatever stream it runs, beside computing and without it, and how long computing
waits for them (the least of all ranks: others wait for one that is late, too), and each rank's memory: what the tables
say, what there is, and what NCCL takes. Last, the losses of 1, 2, 4, ... ranks on the same global batches, in one
picture.

Tokens are random, and the updates are real ones, if small. All that is timed is train.py's own step. NCCL takes its
variables (NCCL_MAX_CTAS, ...) from the environment, and they are written down.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import machine, versions
from bench.rank_exchanges import FEW, LEFT_OUT, Steps, cost_of_exchanges, seconds_in_turns
from bench.rank_losses import draw, loss_curves, losses_in_words
from bench.step import make_training, prepare_and_tune, random_batches, release
from engine import device, ops, training
from engine.comm import Communicator, connect, ending_together
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.device import cuda
from engine.errors import UsageError, exit_on_user_error
from engine.memory import memory_by_class, require_memory
from engine.report import have_matplotlib
from engine.training import Training

LOSSES = "losses"  # what --only calls the runs on 1, 2, 4, ... ranks
LEARNING_RATE = 1e-6  # what has learned more takes more power, and so time: all are to stay at the beginning


def held(t: Training) -> dict[str, int]:
    """Bytes that the arrays of gradients and of the optimizer take."""
    zero: Any = t.zero
    received = [zero._received, *([zero._shard] if zero.shards_gradients else [])]
    gradients = [*(lane.flat for lane in t.model.lanes), *received]
    moments = [t.optimizer.m, t.optimizer.v, *([] if t.optimizer.remainder is None else [t.optimizer.remainder])]
    return {name: sum(a.nbytes for a in arrays) for name, arrays in (("gradients", gradients), ("optimizer", moments))}


def measure(
    run: RunConfig, comm: Communicator, config: GPT2Config, dev: ModuleType, warm_up: int, steps: int, turns: int
) -> dict[str, Any]:
    """One way to share out, in turns with one rank that takes the same micro-batches, or with -d the same steps.

    All ranks take those at once, each for itself: no GPU is as fast as another.
    """
    operations = ops.load("cuda" if dev.WORKS_ALONE else "numpy")
    batches, of_one = random_batches(run, config, seed=comm.rank), on_one_rank(run)
    require_memory(of_one, config, dev, operations, 1)
    alone = Steps(make_training(of_one, OneRank(), config, dev, operations, cycle(batches)))
    require_memory(run, config, dev, operations, comm.world)  # beside that
    free = dev.available_bytes()
    t = make_training(run, comm, config, dev, operations, cycle(batches))
    taken = free - dev.available_bytes()
    alone.take(warm_up)
    together = Steps(t)
    together.take(FEW)
    loss = float(dev.to_host(t.loss))
    found = {
        **speed(run, of_one, comm.world, seconds_in_turns(alone, together, steps, turns)),
        "loss": loss,
        **cost_of_exchanges(together),
        "memory": memory_by_class(run, config, dev, operations, comm.world),
        "held": held(t),
        "taken": taken if dev.WORKS_ALONE else None,  # on CPUs other programs take some too
    }
    if run.carrier != "nccl":
        comm.close()  # it was made for this way alone, and lets go of memory before others give that back
    del t, together, alone
    release(dev)
    return found


def speed(run: RunConfig, of_one: RunConfig, world: int, each: dict[str, np.ndarray]) -> dict[str, Any]:
    """What follows from the seconds of steps, by seconds_in_turns. Ideal: as if the ranks on their own shared out their
    work as they are fast.
    """
    slowest = {name: seconds.max(axis=0) for name, seconds in each.items()}  # a step is over when it is on all ranks
    samples, of_each = run.samples_per_step(world), of_one.samples_per_step(1)

    def ideal(seconds_of_each: np.ndarray) -> np.ndarray:
        return samples / (of_each / seconds_of_each).sum(axis=0)

    alone, seconds = each["alone"].mean(axis=1), float(slowest["together"].mean())
    return {
        "seconds": seconds,
        "seconds_ideal": float(ideal(alone)),
        "seconds_alone": alone.tolist(),
        "tokens_per_second": samples * run.T / seconds,
        "of_ideal": float(ideal(alone)) / seconds,
        "of_ideal_by_turns": (ideal(each["alone"]) / slowest["together"]).tolist(),
        "seconds_without": {name: float(slowest[name].mean()) for name in LEFT_OUT},
    }


def free_before_nccl(comm: Communicator) -> int:
    """Bytes of this rank's GPU that are free once CUDA has started on it."""
    from cupy.cuda import runtime

    cuda.take(comm.local_rank)
    return runtime.memGetInfo()[0]


def of_nccl(ranks: Communicator, dev: ModuleType, free_before: int) -> dict[str, int]:
    """Bytes of a GPU's memory that NCCL takes: to connect the ranks, and with the first exchange of each kind."""
    from cupy.cuda import runtime

    def free() -> int:
        runtime.deviceSynchronize()
        return runtime.memGetInfo()[0]

    connected = free_before - free()
    buffers = [dev.zeros((ranks.world, 1 << 20), dev.COMPUTE_DTYPE) for _ in range(2)]
    before = free()
    ranks.exchange(*buffers)
    ranks.all_gather(buffers[0].reshape(-1))
    ranks.reduce_scatter(buffers[0].reshape(-1))
    return {"connected": connected, "with exchanges": connected + before - free()}


def most_of(comm: Communicator, sizes: dict[str, int]) -> dict[str, int]:
    """The most that any rank has of each."""
    most = comm.gather(np.array([*sizes.values()], np.float64)).max(axis=0)
    return {name: int(nbytes) for name, nbytes in zip(sizes, most, strict=True)}


def name_of(run: RunConfig) -> str:
    reduce = f"--reduce {run.reduce}" * (run.reduce != "owner")
    lanes = f"--lanes {run.lanes}" * (run.lanes > 0)
    accumulated = f"-d {run.total_batch}" * (run.total_batch != -1)
    graph = f"--cuda-graph {run.cuda_graph}" * (run.cuda_graph != "off")
    carrier = f"--carrier {run.carrier}" * (run.carrier != RunConfig.carrier)
    return " ".join(filter(None, (f"-z {run.zero_stage}", reduce, lanes, accumulated, graph, carrier)))


def variants(run: RunConfig, world: int, lanes: int, on_gpus: bool) -> dict[str, RunConfig]:
    """The ways to share out that are measured."""
    found = [replace(run, zero_stage=stage, reduce=reduce) for stage in (0, 1, 2) for reduce in ("owner", "nccl")]
    if on_gpus:
        ways = (("nccl", "off"), ("auto", "on"), ("nccl", "on"))
        found += [replace(run, zero_stage=1, carrier=carrier, cuda_graph=graph) for carrier, graph in ways]
    if lanes:
        tokens = max(run.total_batch, lanes * run.B * run.T, world * run.B * run.T)
        step = replace(run, zero_stage=1, total_batch=tokens)
        found += [step, replace(step, lanes=lanes)]
    return {name_of(each): each for each in found}


def on_one_rank(run: RunConfig) -> RunConfig:
    """The same steps where there is nothing to share out."""
    return replace(run, zero_stage=0, reduce="owner", lanes=0, cuda_graph="off", carrier="auto")


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures for people: what is measured later comes later."""
    yield f"{figures['command']}   {figures['date']}"
    yield from (figures["machine"], figures["versions"])
    if figures["environment"]:
        yield " ".join(f"{name}={value}" for name, value in figures["environment"].items())
    if nccl := figures["nccl"]:
        sizes = ", ".join(f"{name} {nbytes / 2**20:,.1f}" for name, nbytes in nccl.items())
        allowed = f"{figures['nccl_allowed'] / 2**20:,.0f}"
        yield f"NCCL's memory on a GPU, the most of all ranks, MiB: {sizes}; a run leaves {allowed} free for it"
    yield f"ideal: {figures['world']} times one rank; exposed: the step less one without gathering and exchanging"
    for name, found in figures["variants"].items():
        yield ""
        exposed = (found["seconds"] - found["seconds_without"]["exchanging"]) * 1000
        yield (
            f"{name}: {found['seconds'] * 1000:.2f} ms a step, {found['tokens_per_second']:,.0f} tokens/s, "
            f"{found['of_ideal']:.2%} of ideal, exposed {exposed:.2f} ms, loss {found['loss']:.5f}"
        )
        alone = ", ".join(f"{1000 * each:.2f}" for each in found["seconds_alone"])
        turns = ", ".join(f"{each:.2%}" for each in found["of_ideal_by_turns"])
        yield f"  in turns with one rank, ms a step, each on its own: {alone}; of ideal: {turns}"
        left_out = ", then ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in found["seconds_without"].items())
        yield f"  and of all without {left_out}"
        for row in found["phases"]:
            rate = row["bytes"] / row["us_alone"] / 1000
            yield (
                f"  {row['name']:16}{row['bytes']:>13,} bytes {row['times']:6.1f} times a step"
                f"{row['us']:12.1f} us each,{row['us_alone']:9.1f} us alone ({rate:.1f} GB/s)"
            )
        waits = ", ".join(f"{what} {us:.0f}" for what, us in found["waits"].items())
        yield f"  computing waits for them, us a step, where it waits least: {waits}"
        classes = ", ".join(f"{kind} {nbytes / 2**20:,.1f}" for kind, nbytes in found["memory"].items() if nbytes)
        arrays = " and ".join(f"{kind} {nbytes / 2**20:,.1f}" for kind, nbytes in found["held"].items())
        measured = f"; taken {found['taken'] / 2**20:,.1f}" if found["taken"] is not None else ""
        yield f"  memory of a rank, MiB, by the tables: {classes}"
        yield f"  and of its arrays: {arrays}{measured}"
    if curves := figures["losses"]:
        yield ""
        yield from losses_in_words(curves)
    if "took" in figures:
        yield ""
        yield f"{figures['took']:.0f} s in all"


@click.command(context_settings={"show_default": True})
@click.option("-e", "model", default="d12", help="Size, as in train.py.")
@click.option("-b", "B", default=64, help="Sequences of a rank's micro-batch.")
@click.option("-t", "T", default=1024, help="Tokens in a sequence.")
@click.option("-d", "total_batch", default=-1, help="Tokens in a step, as in train.py.")
@click.option("-r", "recompute", type=click.IntRange(0, 2), default=0, help="Recomputation, as in train.py.")
@click.option("--lanes", default=0, help="Measure so many lanes too, and the same step without.")
@click.option("--only", default="", help="Only what is called so, as -z 1, losses, with commas between.")
@click.option("--vocabulary", "V", default=50257, help="Tokens in the vocabulary.")
@click.option("--device", "wanted", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="As in train.py.")
@click.option("--warm-up", default=10, help="Steps of one rank before any that is timed: 200 take 20 s at -b 64.")
@click.option("--steps", default=10, help="Steps of a turn, that are timed.")
@click.option("--turns", default=5, help="Turns of one rank alone, of all, and of all without exchanges.")
@click.option("--loss-steps", default=100, help="Steps of the runs whose losses are compared.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Draw the losses here.")
@exit_on_user_error
def main(model: str, B: int, T: int, V: int, wanted: str, only: str, **options: Any) -> None:
    """What several ranks cost, on random tokens."""
    comm = connect(os.environ)
    with ending_together(comm):
        if comm.world == 1:
            raise UsageError("one rank has nobody to exchange with: start several with mpirun -np")
        if options["png_path"] and not have_matplotlib():
            raise UsageError("--png needs matplotlib: pip install matplotlib")

        def say(line: str) -> None:
            if comm.rank == 0:
                print(line, flush=True)

        backend = device.choose(wanted, say)
        common = {name: options[name] for name in ("total_batch", "recompute")}
        run = RunConfig(model=model, B=B, T=T, weight_decay=0.1, lr=LEARNING_RATE, cuda_graph="off", **common)
        runs = variants(run, comm.world, options["lanes"], on_gpus=device.load(backend).WORKS_ALONE)
        chosen = {name.strip() for name in only.split(",") if name.strip()} or {*runs, LOSSES}
        if unknown := chosen - {*runs, LOSSES}:
            raise UsageError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(runs)}, {LOSSES}")
        shown = 0
        for figures in compare(
            run,
            {name: each for name, each in runs.items() if name in chosen},
            comm,
            model_from_descriptor(model, V, T),
            backend,
            *(options["warm_up"], options["steps"], options["turns"]),
            loss_steps=options["loss_steps"] if LOSSES in chosen else 0,
            say=say,
        ):
            if comm.rank:
                continue
            text = [*lines(figures)]
            print(*text[shown:], sep="\n", flush=True)
            shown = len(text)
            if options["json_path"]:
                options["json_path"].write_text(json.dumps(figures, indent=1) + "\n")
            if options["png_path"] and figures["losses"]:
                draw(figures["losses"], options["png_path"])


def compare(
    run: RunConfig,
    runs: dict[str, RunConfig],
    comm: Communicator,
    config: GPT2Config,
    backend: str,
    warm_up: int,
    steps: int,
    turns: int,
    *,
    loss_steps: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """All that is measured, as far as it is: again and again, the more the later."""
    began = time.monotonic()
    dev, operations = device.load(backend), ops.load(backend)
    if problem := operations.unsupported(run.B, config.C, config.HS):
        raise UsageError(f"-e {run.model}: {problem}")
    free = free_before_nccl(comm) if dev.WORKS_ALONE else 0
    ranks = training.on_devices(comm, backend, "nccl", say)
    nccl = most_of(comm, of_nccl(ranks, dev, free)) if dev.WORKS_ALONE else {}
    # One rank that takes the steps of several does accumulate.
    prepare_and_tune(run, ranks, config, dev, operations, accumulates=True)
    figures: dict[str, Any] = {
        "world": comm.world,
        "nccl": nccl,
        "nccl_allowed": cuda.nccl_bytes(comm.world),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
        "command": shlex.join(["mpirun", "-np", str(comm.world), "python", *sys.argv]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "machine": f"{comm.world} ranks, each on {dev.describe()}; {machine(backend)}",
        "versions": versions(),
        "variants": {},
        "losses": {},
    }
    yield figures
    for name, each in runs.items():
        carried = ranks if each.carrier == "nccl" else training.on_devices(comm, backend, each.carrier, say)
        figures["variants"][name] = measure(each, carried, config, dev, warm_up, steps, turns)
        warm_up = 0  # it is warm now
        yield figures
    if loss_steps:
        figures["losses"] = loss_curves(run, ranks, config, dev, operations, loss_steps)
    yield figures | {"took": time.monotonic() - began}


if __name__ == "__main__":
    main()
