"""The memory report, and arenas whose tensors and buckets share memory."""

import numpy as np
import pytest

from engine import device, ops
from engine.arena import ALIGNMENT, Arena, Tensor, own_slot
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig
from engine.device import cublaslt, cuda, kernels
from engine.errors import OutOfMemoryError
from engine.memory import gradient_dtype, memory_by_class, require_memory
from engine.models import gpt2
from engine.optimizer import AdamW
from engine.zero import Zero
from tests.twins import on


class Ranks(OneRank):
    """A rank among others that never exchanges anything."""

    def __init__(self, world):
        self.world = world


def build(run, config, dev, operations, world):
    """What training.build takes memory for, but for some scalars."""
    grad_dtype = gradient_dtype(run, dev)
    operations.prepare(config.dims() | {"B": run.B, "T": run.T}, 0, grad_dtype)
    model = gpt2.GPT2(
        *(config, operations, dev),
        **{"B": run.B, "T": run.T, "recompute": run.recompute, "dtype": dev.COMPUTE_DTYPE, "grad_dtype": grad_dtype},
        lanes=run.lanes_per_rank(world),
        shares=run.lanes or world,
        grad_slots=gpt2.slots_by_turns if run.shards_gradients(world) else own_slot,
    )
    exchanged = Ranks(world), model.params, model.lanes, run.zero_stage
    zero = Zero(*exchanged, operations, dev, by_library=run.reduce == "nccl")
    return AdamW(model.params, gpt2.decayed(config), zero, run, operations, dev)


@pytest.mark.parametrize("L", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {"zero_stage": 2}),
        (4, {"zero_stage": 0}),
        (4, {"zero_stage": 1}),
        (4, {"zero_stage": 2}),
        (1, {"lanes": 4, "total_batch": 128}),
        (2, {"lanes": 4, "total_batch": 128, "zero_stage": 1}),
        (4, {"reduce": "nccl", "zero_stage": 1}),
        (1, {"master_weights": False}),
        (1, {"grad_dtype": "fp32", "recompute": 2}),
        (4, {"grad_dtype": "fp32", "zero_stage": 2}),
    ],
)
@pytest.mark.parametrize("backend", ["numpy", "cuda"])
def test_the_memory_report_is_what_a_run_takes(backend, L, world, options):
    """Every array that is taken, counted: on the CPU, and for a GPU too, whose arrays are numpy's here."""
    run = RunConfig(B=2, T=16, **options)
    config = GPT2Config(maxT=16, V=300, L=L, NH=2, C=32)
    taken = 0

    def counted(shape, dtype):
        nonlocal taken
        taken += int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.zeros(shape, dtype)

    with on("forward"), pytest.MonkeyPatch.context() as patch:
        dev, operations = device.load(backend), ops.load(backend)
        patch.setattr(dev, "zeros", counted)
        patch.setattr(cuda, "compute_capability", lambda: 90)
        patch.setattr(kernels.KERNELS, "load", lambda *_: None)
        reported = memory_by_class(run, config, dev, operations, world)
        build(run, config, dev, operations, world)
    elsewhere = dev.overhead_bytes(world) + (cublaslt.WORKSPACE_BYTES if backend == "cuda" else 0)
    assert 0 <= taken - (sum(reported.values()) - elsewhere) < 8192  # scalars, and the guard's windows


def test_sharded_gradients_take_less_than_whole_ones():
    config = GPT2Config(maxT=16, V=300, L=6, NH=2, C=32)
    whole, sharded = (
        memory_by_class(RunConfig(B=2, T=16, zero_stage=stage), config, device.load("numpy"), ops.load("numpy"), 4)
        for stage in (1, 2)
    )
    assert sharded["gradients"] < whole["gradients"]


@pytest.mark.parametrize(("world", "share"), [(1, 1), (2, 2), (8, 8)])
def test_memory_is_shared_out_among_the_ranks_that_there_are(monkeypatch, world, share):
    """A launcher's variables may speak of more processes than take part."""
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8")
    dev, run = device.load("numpy"), RunConfig(B=2, T=16)
    config = GPT2Config(maxT=16, V=300, L=1, NH=2, C=32)
    needed = sum(memory_by_class(run, config, dev, ops.load("numpy"), world).values())
    monkeypatch.setattr(dev, "available_bytes", lambda: needed * share)
    require_memory(run, config, dev, ops.load("numpy"), world)
    monkeypatch.setattr(dev, "available_bytes", lambda: needed * share - share)
    with pytest.raises(OutOfMemoryError):
        require_memory(run, config, dev, ops.load("numpy"), world)


def zeros(shape, dtype):
    return np.zeros(shape, dtype)


def test_tensors_of_one_region_share_the_memory_of_the_largest():
    tensors = [
        Tensor("a", (10,), np.float32),
        Tensor("small", (5,), np.float32, region="r"),
        Tensor("b", (10,), np.float32),
        Tensor("large", (300,), np.float32, region="r"),
    ]
    arena = Arena(tensors, zeros)
    arena.views["large"][...] = 1
    assert arena.views["small"].tolist() == [1] * 5
    assert not arena.views["a"].any()
    assert not arena.views["b"].any()
    assert arena.nbytes == (ALIGNMENT + 3 * ALIGNMENT + ALIGNMENT) * 4


def test_buckets_of_one_slot_take_the_same_memory():
    tensors = [Tensor(f"{bucket}", (100 * (bucket + 1),), np.float32, bucket) for bucket in range(5)]
    apart, by_turns = Arena(tensors, zeros, 3), Arena(tensors, zeros, 3, gpt2.slots_by_turns)
    lengths = [[span.stop - span.start for span in arena.buckets] for arena in (apart, by_turns)]
    assert lengths[0] == lengths[1]
    assert all(length % (3 * ALIGNMENT) == 0 for length in lengths[0])
    by_turns.views["1"][...] = 1
    assert by_turns.views["4"][:200].tolist() == [1] * 200
    for other in "023":
        assert not by_turns.views[other].any()
    assert by_turns.nbytes == 4 * (lengths[0][0] + lengths[0][2] + lengths[0][3] + lengths[0][4])
    assert apart.nbytes == 4 * sum(lengths[0])
