"""The losses of 1, 2, 4, ... ranks on the same global batches, in words and as a picture."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import train
from bench.step import make_training, prepare_and_tune, release
from engine import training
from engine.comm import Communicator
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig

WORDS, WORD = 2000, 4  # the text: words of a language, each so many tokens
MOST_SAMPLES = 16  # of a micro-batch: the losses count, not the speed


def text_of_words(config: GPT2Config, run: RunConfig, comm: Any) -> Iterator[np.ndarray]:
    """This rank's micro-batches, int32 (2,B,T): the samples of a step are the same on any number of ranks.

    A language to learn: some words are frequent, each of the same few tokens.
    """
    words = np.random.default_rng(0).integers(0, config.V, (WORDS, WORD))
    for batch in count():
        first = (batch * comm.world + comm.rank) * run.B
        drawn = [
            np.random.default_rng((1, i)).zipf(1.3, run.T // WORD + 1) % WORDS for i in range(first, first + run.B)
        ]
        tokens = words[np.array(drawn)].reshape(run.B, -1).astype(np.int32)
        yield np.stack([tokens[:, : run.T], tokens[:, 1 : run.T + 1]])


def loss_curves(
    run: RunConfig, comm: Communicator, config: GPT2Config, dev: ModuleType, operations: Any, steps: int
) -> dict[str, list[float]]:
    """What 1, 2, 4, ... ranks, up to all, see on the same global batches: the loss of every step."""
    from mpi4py import MPI

    from engine.comm.mpi import MPIRanks

    B = min(run.B, MOST_SAMPLES)
    step = replace(run, B=B, total_batch=comm.world * B * run.T, steps=steps, lr=6e-4, warmup=min(steps, 20))
    prepare_and_tune(step, comm, config, dev, operations, accumulates=True)  # one rank does
    found: dict[str, list[float]] = {}
    for world in sorted(n for n in {1, 2, 4, 8, comm.world} if comm.world % n == 0):
        some = MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.Get_group().Incl(range(world))) if comm.rank < world else None
        if some:
            several: Communicator = MPIRanks(some) if world > 1 else OneRank()
            ranks = training.on_devices(several, "cuda" if dev.WORKS_ALONE else "numpy", "nccl", print)
            found[str(world)] = losses_of(replace(step, zero_stage=int(world > 1)), ranks, config, dev, operations)
        comm.barrier()
    return found


def losses_of(run: RunConfig, comm: Any, config: GPT2Config, dev: ModuleType, operations: Any) -> list[float]:
    t = make_training(run, comm, config, dev, operations, text_of_words(config, run, comm))
    t.steps = run.steps
    losses = []
    for step in range(run.steps):
        train.train_step(t, step)
        losses.append(float(dev.to_host(t.loss)))
    release(dev)
    return losses


def losses_in_words(curves: dict[str, list[float]]) -> Iterator[str]:
    steps = len(curves["1"])
    yield "losses of so many ranks on the same global batches:"
    yield f"{'step':>8}" + "".join(f"{world:>12}" for world in curves)
    for step in sorted({0, 1, steps // 4, steps // 2, 3 * steps // 4, steps - 1}):
        yield f"{step + 1:8}" + "".join(f"{curve[step]:12.5f}" for curve in curves.values())
    one = np.array(curves["1"])
    for world, curve in curves.items():
        if world != "1":
            off = np.abs(np.array(curve) / one - 1)
            yield f"{world} ranks: off by {off[0]:.1e} of one rank's at first, {off.max():.1e} at most"


def draw(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120)
    axes = figure.subplots()
    for i, (world, curve) in enumerate(curves.items()):
        label = f"{world} GPU" + "s" * (world != "1")
        axes.plot(range(1, len(curve) + 1), curve, label=label, linewidth=4 - i, alpha=0.7)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title("the same global batches")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
