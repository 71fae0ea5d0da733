"""Ranks on GPUs, on CPUs: NCCL, streams and events by a stand-in that sees races (see nccl_on_cpu.py)."""

import gc
import json
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import train
from engine import training
from engine.comm.one import OneRank
from engine.config import RunConfig
from engine.device import cuda
from engine.device import numpy as numpy_device
from engine.errors import UsageError
from tests.conftest import ROOT, Run, signals_restored
from tests.test_ranks import run  # skips this module too, where there is no mpirun

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: it runs the CUDA operations here")

# Four layers: in stage 2 three take memory by turns.
OPTIONS = {"model": "l4h2c32", "B": 1, "T": 16, "steps": 2, "val_every": 0, "sample_every": 0, "lr": 1e-2}
OPTIONS |= {"warmup": 1, "weight_decay": 0.1, "gemm_search": "off", "watchdog": 0}
HOW = {"beside", "copied", "said"}  # it was computed, not what


@pytest.fixture(scope="module")
def rank_nccl(shards_dir, tmp_path_factory):
    """rank_nccl(world, carrier="nccl", sabotage="", fails=False, **options): what the ranks computed; if that did not
    come about, with sabotage or where it may fail, how they ended. What has been asked for before is not run again.
    """
    known: dict[tuple, dict[str, np.ndarray] | Run] = {}

    def train(world: int, *args: str) -> dict[str, np.ndarray] | Run:
        target = tmp_path_factory.mktemp("ranks") / "results.npz"
        result = run(world, target, *args, program=ROOT / "tests/rank_nccl.py")
        if result.code:
            return result
        with np.load(target) as arrays:
            return dict(arrays)

    def rank_nccl(
        world: int, carrier: str = "nccl", sabotage: str = "", fails: bool = False, **options
    ) -> dict[str, np.ndarray] | Run:
        options = OPTIONS | {"train_data": f"{shards_dir}/train_*.bin"} | options
        call = world, carrier, sabotage, json.dumps(options, sort_keys=True)
        if call not in known:
            known[call] = train(*call)
        assert isinstance(known[call], dict) or sabotage or fails, known[call].err
        return known[call]

    return rank_nccl


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found.keys() - HOW:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("reduce", ["owner", "nccl"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_runs_beside_computing_gives_the_bits_of_one_thing_after_another(rank_nccl, stage, reduce):
    """And nothing races. Two micro-batches a rank."""
    options = {"zero_stage": stage, "reduce": reduce, "total_batch": 64}
    found = rank_nccl(2, **options)
    assert found["beside"] > 0
    if reduce == "owner":  # MPI can't add bf16
        expected = rank_nccl(2, "mpi", **options)
        assert expected["beside"] == 0
        assert_same(found, expected)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_copies_carry_what_nccl_carries(rank_nccl, stage, world):
    """From one rank's memory to the others', which meet by numbers that they write there."""
    options = {"zero_stage": stage, "total_batch": 32 * world}
    found, expected = rank_nccl(world, "copies", **options), rank_nccl(world, **options)
    assert found["copied"] > expected["copied"] == 0
    assert_same(found, expected)


def test_auto_is_copies_where_all_gpus_reach_each_other_and_nccl_elsewhere(rank_nccl):
    """The ranks agree, if rank 0's memory alone cannot be opened: rank 1 is the first that sees it."""
    found, without = rank_nccl(3, "auto", total_batch=48), rank_nccl(3, "auto", total_batch=48, unreachable=0)
    assert found["copied"] > without["copied"] == 0
    assert not any("--carrier" in line for line in found["said"])
    why = "--carrier auto is nccl here: the GPU of rank 1 and the others cannot reach each other's memory"
    assert any(line.startswith(why) for line in without["said"])
    assert_same(without, found)


def test_copies_are_refused_where_gpus_do_not_reach_each_other(rank_nccl):
    result = rank_nccl(2, "copies", fails=True, unreachable=1)
    assert result.code == 2
    assert result.err.count("the GPU of rank 0 and the others cannot reach each other's memory (peer access") == 1
    assert "--carrier nccl" in result.err


def test_a_run_opens_what_a_run_before_has_closed(rank_nccl):
    assert_same(rank_nccl(2, "copies", zero_stage=1, again=True), rank_nccl(2, "copies", zero_stage=1))


def test_copies_without_a_meeting_are_seen(rank_nccl):
    """So the stand-in's ranks do run beside each other."""
    options = {"zero_stage": 1, "total_batch": 64}
    expected, found = rank_nccl(2, "copies", **options), rank_nccl(2, "copies", sabotage="_wait", **options)
    assert isinstance(found, Run) or not np.array_equal(found["1.loss"], expected["1.loss"])


@pytest.mark.parametrize("options", [{"zero_stage": 0}, {"zero_stage": 1, "reduce": "nccl"}, {"lanes": 4}])
@pytest.mark.parametrize("carrier", ["nccl", "copies"])
def test_gradients_that_travel_late_are_the_same(rank_nccl, carrier, options):
    """With two micro-batches a rank."""
    options = {"zero_stage": 1, "total_batch": 64} | options
    assert_same(rank_nccl(2, carrier, **options, late=0), rank_nccl(2, carrier, **options))


def test_copies_of_lanes(rank_nccl):
    options = {"zero_stage": 1, "lanes": 4, "total_batch": 128}
    assert_same(rank_nccl(2, "copies", **options), rank_nccl(2, **options))


def test_the_stages_give_the_same_bits(rank_nccl):
    first, *others = (rank_nccl(3, zero_stage=stage, total_batch=48) for stage in (0, 1, 2))
    for other in others:
        assert_same(other, first)


def test_lanes_give_the_same_bits_on_1_2_and_4_ranks(rank_nccl):
    first, *others = (
        rank_nccl(world, zero_stage=stage, lanes=4, total_batch=128) for world, stage in ((1, 0), (2, 1), (4, 0))
    )
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("options", [{"master_weights": False}, {"grad_dtype": "fp32"}], ids=["-w 0", "fp32"])
def test_other_dtypes(rank_nccl, options):
    assert_same(rank_nccl(2, zero_stage=1, **options), rank_nccl(2, "mpi", zero_stage=1, **options))


@pytest.mark.parametrize(
    ("sabotage", "stage"), [("join", 0), ("join", 1), ("join", 2), ("_follow", 1), ("wait", 1), ("wait", 2)]
)
def test_a_wait_that_is_missing_is_seen(rank_nccl, sabotage, stage):
    """So the stand-in can be believed when it sees no race."""
    result = rank_nccl(2, sabotage=sabotage, zero_stage=stage)
    assert isinstance(result, Run)
    assert result.code == 1
    assert "AssertionError: race: " in result.err


@pytest.mark.parametrize("carrier", ["nccl", "copies"])
def test_a_checkpoint_goes_on_with_another_number_of_gpus(rank_nccl, tmp_path, carrier):
    """What is gathered for it lies in memory that is not shared, at other places of each rank."""
    saving = {"out_dir": str(tmp_path / "run"), "checkpoint_every": 2, "zero_stage": 1, "total_batch": 96}
    Path(saving["out_dir"]).mkdir()
    whole = rank_nccl(2, zero_stage=1, total_batch=96)
    rank_nccl(2, carrier, **saving)
    restored = rank_nccl(3, carrier, **saving, resume=True)
    for name in restored.keys() - HOW:
        np.testing.assert_array_equal(restored[name], whole[name], err_msg=name)


def test_what_is_recorded_is_gone_when_a_run_is_over(shards_dir, monkeypatch, tmp_path):
    """NCCL's end waits for the CUDA graphs with its work: in a cycle of references with it they would outlive it."""

    class Recorder:
        """As cuda.Replay, whose keys hold the run that holds it."""

        def __init__(self):
            self._keys = []

        def __call__(self, function, *args):
            self._keys.append(args)
            function(*args)

    recorders = []

    def replay(wanted, say):
        recorder = Recorder()
        recorders.append(weakref.ref(recorder))
        return recorder

    monkeypatch.setattr(numpy_device, "replay", replay)
    monkeypatch.setattr(train, "have_matplotlib", lambda: False)
    run = RunConfig(**OPTIONS | {"train_data": f"{shards_dir}/train_*.bin", "device": "cpu", "gemm_search": "auto"})
    gc.disable()
    try:
        with signals_restored():
            assert train.build_and_train(run, OneRank()) == 0
        assert [recorder() for recorder in recorders] == [None]
    finally:
        gc.enable()


# --- each rank its GPU


class Thread(OneRank):
    """A rank that is a thread of this process. machines: how many ranks each has."""

    def __init__(self, rank, machines, meet, table):
        places = [(i, size) for size in machines for i in range(size)]
        self.rank, self.world, (self.local_rank, self.local_world) = rank, len(places), places[rank]
        self._meet, self._table = meet, table

    def gather(self, values):
        self._table[self.rank] = values
        self._meet.wait()
        everyones = np.stack([self._table[rank] for rank in range(self.world)])
        self._meet.wait()
        return everyones


def share_out(machines, see, backends, monkeypatch):
    """What training.on_devices says to each rank. see(rank, local_rank): (the GPU it takes, how many it sees)."""
    world = sum(machines)
    meet, table, local = threading.Barrier(world), {}, threading.local()
    monkeypatch.setattr(training, "on_gpus", lambda comm, carrier, say: "on GPUs")
    monkeypatch.setattr(cuda, "take", lambda local_rank: see(local.rank, local_rank))

    def of(rank):
        local.rank = rank
        try:
            return training.on_devices(Thread(rank, machines, meet, table), backends[rank], "nccl", print)
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(of, range(world)))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    """Two machines that show all their GPUs, and one whose launcher shows each rank another."""
    machines = (2, 2, 3)

    def see(rank, local_rank):
        return (f"{rank // 2} {local_rank % 2}".encode(), 2) if rank < 4 else (f"shown to {rank}".encode(), 1)

    assert share_out(machines, see, ["cuda"] * 7, monkeypatch) == ["on GPUs"] * 7


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    said = share_out((1, 3), lambda rank, local: (f"{rank > 0} {local % 2}".encode(), 2), ["cuda"] * 4, monkeypatch)
    assert said == [said[0]] * 4
    assert "rank 3 and rank 1 would share a GPU: 3 ranks run on their machine and see 2 GPUs" in said[0]
    assert "CUDA_VISIBLE_DEVICES" in said[0]
    assert "-np" in said[0]


def test_ranks_with_and_without_a_gpu_are_refused(monkeypatch):
    said = share_out((3,), None, ["cuda", "numpy", "cuda"], monkeypatch)
    assert said == [said[0]] * 3
    assert "rank 0 has a GPU to train on, rank 1 has none" in said[0]
    cpus = share_out((2,), None, ["numpy"] * 2, monkeypatch)
    assert all(isinstance(comm, Thread) for comm in cpus)
