"""The memory report, and arenas whose tensors and buckets share memory."""

import numpy as np
import pytest

from engine import device, ops
from engine.arena import ALIGNMENT, Arena, Tensor, own_slot
from engine.config import GPT2Config, RunConfig
from engine.memory import memory_by_class
from engine.models import gpt2


@pytest.mark.parametrize("L", [1, 2, 3, 6])
@pytest.mark.parametrize(("world", "stage"), [(1, 2), (4, 0), (4, 1), (4, 2)])
def test_the_memory_report_is_what_the_arenas_take(L, world, stage):
    """Of gradients: all, or with -z 2 this rank's and what backward writes before they are sharded."""
    run = RunConfig(B=2, T=16, zero_stage=stage)
    config = GPT2Config(maxT=16, V=300, L=L, NH=2, C=16)
    reported = memory_by_class(run, config, device.load("numpy"), ops.load("numpy"), world)
    shards = stage == 2 and world > 1
    model = gpt2.GPT2(
        *(config, ops.load("numpy"), device.load("numpy")),
        **{"B": run.B, "T": run.T, "recompute": run.recompute, "shares": world},
        grad_slots=gpt2.slots_by_turns if shards else own_slot,
    )
    params = model.params.nbytes
    assert reported["parameters"] == params
    assert reported["activations"] == model.acts.nbytes
    assert reported["gradients"] == model.grads.nbytes + shards * params // world
    assert reported["optimizer"] == 2 * params // (world if stage else 1)
    if shards and L > 2:
        assert model.grads.nbytes < params


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
    tensors = [Tensor(f"{bucket}", (100 * (bucket + 1),), np.float32, bucket) for bucket in range(4)]
    apart, by_turns = Arena(tensors, zeros, 3), Arena(tensors, zeros, 3, gpt2.slots_by_turns)
    lengths = [[span.stop - span.start for span in arena.buckets] for arena in (apart, by_turns)]
    assert lengths[0] == lengths[1]
    assert all(length % (3 * ALIGNMENT) == 0 for length in lengths[0])
    by_turns.views["1"][...] = 1
    assert by_turns.views["3"][:200].tolist() == [1] * 200
    assert not by_turns.views["2"].any()
    assert not by_turns.views["0"].any()
    assert by_turns.nbytes == 4 * (lengths[0][0] + lengths[0][2] + lengths[0][3])
    assert apart.nbytes == 4 * sum(lengths[0])
