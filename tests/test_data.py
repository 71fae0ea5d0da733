"""Samples, order, loader: every sample once an epoch, one order whatever reads it, exact positions."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import Loader, Order, Samples
from engine.errors import DataError
from engine.shards import Shard, ShardWriter, open_shard

T = 4
LENGTHS = (41, 4, 18, 5, 64)  # tokens; 10, 0, 4, 1 and 15 samples
N = 30


def make_shards(lengths=LENGTHS) -> list[Shard]:
    """Shards in memory whose tokens are all different."""
    starts = np.cumsum((0, *lengths))
    return [
        Shard(Path(f"s_{i:06d}.bin"), np.arange(start, start + length, dtype=np.uint16), 0)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


@pytest.fixture
def samples() -> Samples:
    return Samples(make_shards(), T)


def rows_of_step(samples, B, world, num_rows, position=0, **options) -> list[list[int]]:
    """The first token of each of the num_rows samples from position on, as all ranks together read them."""
    firsts = []
    loaders = [Loader(samples, B, position=position, rank=r, world=world, **options) for r in range(world)]
    while len(firsts) < num_rows:
        for loader in loaders:
            firsts += loader.next()[0][:, 0].tolist()
    for loader in loaders:
        loader.close()
    return firsts


# Samples


def test_a_sample_is_tokens_and_their_next_ones(samples):
    assert len(samples) == N
    assert samples.counts.tolist() == [10, 0, 4, 1, 15]
    inp, targets = samples.read(np.array([0, 9, 10, 14, 15, 29]))
    assert inp.dtype == targets.dtype == np.int32
    assert inp[:, 0].tolist() == [0, 36, 45, 63, 68, 124]
    assert (inp == inp[:, :1] + np.arange(T)).all()
    assert (targets == inp + 1).all()


@pytest.mark.parametrize("index", [-1, N])
def test_samples_out_of_range(samples, index):
    with pytest.raises(IndexError, match=r"\[0, 30\)"):
        samples.read(np.array([0, index]))


def test_not_one_sample():
    with pytest.raises(DataError, match=r"s_000001\.bin: not one sample of T = 8 .* 8 .*at least 9"):
        Samples(make_shards((3, 8)), 8)
    assert len(Samples(make_shards((3, 9)), 8)) == 1
    with pytest.raises(DataError, match="no token shards"):
        Samples([], 8)


def test_describe_names_files_and_tokens(samples):
    names_and_tokens = [shard[:2] for shard in samples.describe()]
    assert names_and_tokens[:2] == [["s_000000.bin", 41], ["s_000001.bin", 4]]


def test_describe_tells_changed_tokens(tmp_path):
    """One token changed in a shard of the same name and length."""
    descriptions = []
    for last in (1, 2):
        with ShardWriter(tmp_path / "a.bin", 256) as writer:
            writer.append([5] * 99 + [last])
        descriptions.append(Samples([open_shard(tmp_path / "a.bin")], 8).describe())
    assert descriptions[0] != descriptions[1]


def test_real_files(tmp_path):
    for i in range(2):
        with ShardWriter(tmp_path / f"{i}.bin", 0) as writer:
            writer.append(np.arange(9) + 100 * i)
    with Loader(Samples([open_shard(path) for path in sorted(tmp_path.iterdir())], T), 4, shuffle=False) as loader:
        assert loader.next()[1][:, -1].tolist() == [4, 8, 104, 108]


# Order


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_sample_once_an_epoch(counts, seed, shuffle):
    order = Order(counts, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        assert sorted(order.indices(epoch * sum(counts), sum(counts)).tolist()) == list(range(sum(counts)))


@given(first=st.integers(0, 4 * N), count=st.integers(0, 3 * N), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_stretch_is_a_stretch_of_the_one_order(first, count, shuffle):
    counts = [10, 0, 4, 1, 15]
    whole = Order(counts, seed=7, shuffle=shuffle).indices(0, 7 * N)
    assert (
        Order(counts, seed=7, shuffle=shuffle).indices(first, count).tolist() == whole[first : first + count].tolist()
    )


def test_shards_are_read_one_after_the_other():
    counts = [50, 60, 70]
    shard_of = np.repeat([0, 1, 2], counts)[Order(counts, seed=1, shuffle=True).indices(0, 180)]
    assert [shard for shard, _ in itertools.groupby(shard_of)] in map(list, itertools.permutations([0, 1, 2]))


def test_epochs_and_seeds_differ():
    orders = [
        tuple(Order([40, 40], seed=seed, shuffle=True).indices(epoch * 80, 80))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    # Shards too change places, and within the epochs of one seed.
    assert {order[0] < 40 for order in orders[:4] + orders[4:8]} == {True, False}


def test_order_of_today_is_the_order_of_tomorrow():
    """A resumed run needs this very order, whatever numpy it resumes under. Never change these numbers."""
    order = Order([5, 3, 4], seed=1234, shuffle=True)
    assert order.indices(0, 24).tolist() == [
        3,
        0,
        1,
        4,
        2,
        10,
        8,
        11,
        9,
        5,
        7,
        6,
        7,
        6,
        5,
        1,
        0,
        3,
        2,
        4,
        11,
        9,
        10,
        8,
    ]


def test_unshuffled_is_the_files_in_order(samples):
    with Loader(samples, 7, shuffle=False) as loader:
        read = np.concatenate([loader.next()[0] for _ in range(5)])
    expected = [s.tokens[i * T : (i + 1) * T] for s in make_shards() for i in range((len(s.tokens) - 1) // T)]
    assert (read[:N] == expected).all()
    assert (read[N:] == expected[: 35 - N]).all()


def test_order_does_not_cost_an_epoch_per_call():
    order = Order([10**6, 10**6], seed=0, shuffle=True)
    calls = 0
    permutation = order._permutation

    def counted(n, shard):
        nonlocal calls
        calls += n > 2
        return permutation(n, shard)

    order._permutation = counted
    for position in range(0, 10**6, 10**4):
        order.indices(position, 8)
    assert calls == 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        Order([1], seed=seed, shuffle=True)


# Loader


@pytest.mark.parametrize(("B", "world"), list(itertools.product([1, 2, 3, 8], [1, 2, 4])))
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_sees_the_same_samples_however_it_is_cut(samples, B, world, shuffle):
    """A step of 96 rows, more than three epochs, whatever the micro-batch, the ranks and the accumulation."""
    rows = 96
    assert rows % (B * world) == 0
    whole = rows_of_step(samples, 96, 1, 96, seed=3, shuffle=shuffle)
    assert rows_of_step(samples, B, world, rows, seed=3, shuffle=shuffle) == whole


def test_a_position_resumes_exactly_anywhere(samples):
    whole = rows_of_step(samples, 1, 1, 100, seed=5)
    for position in range(70):
        with Loader(samples, 3, seed=5, position=position) as loader:
            for i in range(3):
                assert loader.position == position + 3 * i
                assert loader.epoch == (position + 3 * i) // N
                assert loader.next()[0][:, 0].tolist() == whole[position + 3 * i :][:3]


def test_small_data_wraps_within_a_batch():
    samples = Samples(make_shards((9,)), T)
    with Loader(samples, 5, world=2, rank=1, shuffle=False) as loader:
        assert loader.next()[0][:, 0].tolist() == [4, 0, 4, 0, 4]
        assert (loader.position, loader.epoch) == (10, 5)


def test_rewind_starts_again(samples):
    with Loader(samples, 4, seed=1) as loader:
        first = [loader.next()[0] for _ in range(3)]
        for calls in (0, 1, 2, 3):
            loader.rewind()
            assert loader.position == 0
            for expected in first[:calls]:
                assert (loader.next()[0] == expected).all()


def test_batches_belong_to_the_caller(samples):
    with Loader(samples, N, shuffle=False) as loader:
        inp, targets = loader.next()
        assert inp.shape == targets.shape == (N, T)
        assert inp.flags.c_contiguous
        assert targets.flags.c_contiguous
        inp[:] = targets[:] = -1
        loader.rewind()
        assert loader.next()[0].min() == 0


class Watched(Samples):
    """Samples that tell when they are read, and fail when told to."""

    def __init__(self):
        super().__init__(make_shards(), T)
        self.num_reads, self.read_twice, self.fail = 0, threading.Event(), False

    def read(self, indices):
        if self.fail:
            raise OSError("the disk went away")
        self.num_reads += 1
        if self.num_reads == 2:
            self.read_twice.set()
        return super().read(indices)


def test_reading_ahead_does_not_move_the_position():
    samples = Watched()
    with Loader(samples, 4) as loader:
        loader.next()
        assert samples.read_twice.wait(10)
        assert loader.position == 4


def test_what_fails_in_the_thread_is_raised_by_next():
    samples = Watched()
    with Loader(samples, 4) as loader:
        loader.next()
        assert samples.read_twice.wait(10)
        samples.fail = True
        loader.next()
        for _ in range(2):
            with pytest.raises(OSError, match="the disk went away"):
                loader.next()
        assert loader.position == 8
        samples.fail = False
        loader.rewind()
        loader.next()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_close_ends_the_thread(samples):
    before = prefetch_threads()
    loader = Loader(samples, 2)
    (thread,) = set(prefetch_threads()) - set(before)
    loader.close()
    loader.close()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        loader.next()


def test_an_unclosed_loader_does_not_keep_the_process():
    script = (
        "from pathlib import Path; import numpy as np\n"
        "from engine.data import Loader, Samples; from engine.shards import Shard\n"
        "samples = Samples([Shard(Path('a'), np.arange(99, dtype=np.uint16), 0)], 4)\n"
        "loader = Loader(samples, 2); loader.next()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], timeout=30, check=True)


@pytest.mark.parametrize("options", [{"B": 0}, {"position": -1}, {"rank": 1}, {"rank": -1}, {"world": 0}])
def test_impossible_loaders(samples, options):
    with pytest.raises(ValueError, match="impossible loader"):
        Loader(samples, **({"B": 1} | options))
