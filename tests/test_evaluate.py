"""The validation loss is the mean over its samples, however they are batched."""

import numpy as np
import pytest

from engine import device, ops
from engine.comm.one import OneRank
from engine.config import GPT2Config
from engine.data import Samples
from engine.evaluate import validation_loss
from engine.models.gpt2 import GPT2, parameter_table
from engine.shards import open_shard
from tests.conftest import write_shards

CONFIG = GPT2Config(maxT=12, V=256, L=2, NH=2, C=8)
NUMPY = device.load("numpy")
T = 12


@pytest.fixture
def samples(tmp_path) -> Samples:
    """7 samples from two shards."""
    folder = write_shards(tmp_path / "shards", {"a.bin": 4 * T + 5, "b.bin": 3 * T + 1})
    found = Samples([open_shard(folder / "a.bin"), open_shard(folder / "b.bin")], T)
    assert len(found) == 7
    return found


def make(B: int, dtype=np.float64) -> GPT2:
    model = GPT2(CONFIG, ops.load("numpy"), NUMPY, B=B, T=T, dtype=dtype, statistic_dtype=dtype)
    rng = np.random.default_rng(0)
    for name, line, _ in parameter_table(CONFIG):
        view = model.params.views[name]
        view[...] = rng.normal(1.0 if line.init == "1" else 0.0, 0.3, view.shape)
    return model


def one_by_one(samples: Samples, count: int) -> float:
    """The mean of the first `count` samples, written anew: softmax of the logits of each."""
    model, losses = make(1), []
    for index in range(count):
        inp, targets = samples.read(np.array([index]))
        logits = model.forward(inp)[0, :, : CONFIG.V]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        losses += (-np.log(p[np.arange(T), targets[0]] / p.sum(axis=1))).tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize("B", [1, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_the_mean_is_that_of_the_samples_whatever_the_batch(samples, B, count):
    """7 samples leave a last batch of 1 for B = 3, and of 3 for B = 4."""
    found = validation_loss(make(B), NUMPY, OneRank(), samples, B, count)
    assert found == pytest.approx(one_by_one(samples, count), rel=1e-13)


def test_in_float32_batches_differ_by_rounding_only(samples):
    found = [validation_loss(make(B, np.float32), NUMPY, OneRank(), samples, B, 7) for B in (1, 3, 4)]
    assert found == pytest.approx([one_by_one(samples, 7)] * 3, rel=16 * float(np.finfo(np.float32).eps))


def test_it_is_the_same_each_time_and_changes_no_parameter(samples):
    model = make(3)
    model.grads.flat.fill(1)
    params = model.params.flat.tobytes()
    first = validation_loss(model, NUMPY, OneRank(), samples, 3, 7)
    assert validation_loss(model, NUMPY, OneRank(), samples, 3, 7) == first
    assert model.params.flat.tobytes() == params
    assert (model.grads.flat == 1).all()
