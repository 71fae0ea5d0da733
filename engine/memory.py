"""How much memory a run takes, known from the tables before any is taken."""

import math
import os
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from engine.arena import Tensor, largest_bucket, memory_of
from engine.config import GPT2Config, RunConfig
from engine.errors import OutOfMemoryError
from engine.launcher import ranks_on_this_machine
from engine.models import gpt2


def memory_by_class(
    run: RunConfig, config: GPT2Config, dev: ModuleType, operations: ModuleType, world: int
) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer, activations and scratch on each of `world` ranks, as the tables say.

    Resolved for one and two layers, whose difference is what each further layer costs: a mistyped number of layers
    must not take the time and memory of its table before it can be refused.
    """
    one, two = (_bytes_of_tables(run, replace(config, L=L), dev, world) for L in (1, 2))
    tables = {name: one[name] + (config.L - 1) * (two[name] - one[name]) for name in one}
    tables["gradients"] += _gradients_by_turns(run, replace(config, L=min(config.L, 3)), dev, world)
    if run.reduce == "owner" and run.lanes_per_rank(world) * world > 1:  # what lanes and ranks have for this one
        shares = run.lanes or world
        tables["gradients"] += run.lanes_per_rank(world) * largest_bucket(_gradient_tensors(run, config, dev), shares)
    scratch = operations.scratch_bytes(config.dims() | {"B": run.B, "T": run.T}, gradient_dtype(run, dev))
    return tables | {"scratch": scratch, "overhead": dev.overhead_bytes(world)}


def _bytes_of_tables(run: RunConfig, config: GPT2Config, dev: ModuleType, world: int) -> dict[str, int]:
    parameters = gpt2.parameter_tensors(config, dev.COMPUTE_DTYPE)
    shares = run.lanes or world
    in_fp32 = gpt2.parameter_tensors(config, np.float32)
    remainders = gpt2.parameter_tensors(config, np.uint16)
    has_remainder = run.master_weights and np.dtype(dev.COMPUTE_DTYPE) != np.float32
    activations = gpt2.activation_tensors(
        config,
        B=run.B,
        T=run.T,
        recompute=run.recompute,
        dtype=dev.COMPUTE_DTYPE,
        statistic_dtype=np.float32,
    )
    return {
        "parameters": memory_of(parameters, shares),
        "gradients": run.lanes_per_rank(world)
        * memory_of(_gradient_tensors(run, config, dev), shares)
        // (world if run.shards_gradients(world) else 1),
        "optimizer": (2 * memory_of(in_fp32, shares) + has_remainder * memory_of(remainders, shares))
        // (world if run.zero_stage else 1),
        "activations": memory_of(activations),
    }


def gradient_dtype(run: RunConfig, dev: ModuleType) -> Any:
    """In which the gradients of parameters are accumulated."""
    return np.float32 if run.grad_dtype == "fp32" else dev.COMPUTE_DTYPE


def _gradient_tensors(run: RunConfig, config: GPT2Config, dev: ModuleType) -> list[Tensor]:
    return gpt2.parameter_tensors(config, gradient_dtype(run, dev))


def _gradients_by_turns(run: RunConfig, config: GPT2Config, dev: ModuleType, world: int) -> int:
    """Where gradients are sharded, what backward writes before they are: of three layers, however many there are."""
    if not run.shards_gradients(world):
        return 0
    return memory_of(_gradient_tensors(run, config, dev), world, gpt2.slots_by_turns)


def require_memory(run: RunConfig, config: GPT2Config, dev: ModuleType, operations: ModuleType, world: int) -> None:
    """OutOfMemoryError, with options that would fit, if the device has less for each rank than that needs."""
    memory = memory_by_class(run, config, dev, operations, world)
    sharing = min(world, ranks_on_this_machine(os.environ)) if dev.SHARED_BY_RANKS and world > 1 else 1
    free = dev.available_bytes() // sharing
    if sum(memory.values()) <= free:
        return
    samples = run.samples_per_step(world) // world
    small = [n for n in range(1, math.isqrt(samples) + 1) if samples % n == 0]
    divisors = {B for n in small for B in (n, samples // n) if B <= run.B}
    candidates = (
        replace(run, B=B, recompute=level, total_batch=samples * world * run.T)
        for B in sorted(divisors, reverse=True)
        if samples // B % run.lanes_per_rank(world) == 0
        for level in (run.recompute, 2)
    )
    fitting = (r for r in candidates if sum(memory_by_class(r, config, dev, operations, world).values()) <= free)
    remedy = next((f"-b {r.B} -d {r.total_batch} -r {r.recompute}" for r in fitting), None)
    raise OutOfMemoryError(
        f"{'a rank' if world > 1 else 'the run'} needs {sum(memory.values()) / 2**30:,.1f} GiB, "
        f"{free / 2**30:,.1f} GiB are free\n  "
        + ", ".join(f"{name} {nbytes / 2**30:,.1f}" for name, nbytes in memory.items())
        + (
            f"\n  this fits, with the same steps but for rounding: {remedy}"
            if remedy
            else "\n  no -b fits: take a smaller model -e"
        )
    )
