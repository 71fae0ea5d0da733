"""Several ranks on as many GPUs, by the real mpirun and NCCL: the same run as one rank's, and an end for all.

A process takes some seconds to start on a GPU, so one trains all that is compared (rank_trains.py).
"""

import json
import os
import signal
import time

import numpy as np
import pytest

from engine.zero import LATE_TOKENS
from tests.conftest import ROOT, TIMEOUT, TRAIN, Run, data, finish, write_shards
from tests.test_cuda_train import assert_same_checkpoint, checkpoint, losses, records
from tests.test_ranks import (  # skips this module too, where there is no mpirun
    altered,
    start,
    wait_for_end,
    wait_for_ranks,
)

pytestmark = pytest.mark.gpu

# Five layers: in stage 2 three take memory by turns. 8 sequences in a step, however they are shared out.
SIZE = ("--device", "cuda", "-e", "l5h2c64", "-t", 64, "-d", 512, "-l", 1e-3, "-s", 0, "-v", 0, "-m", 2)
CONSTANT = ("-k", "constant", "-n", 4)
REDUCE = ("owner", "nccl")
VARIANTS = {"bf16": (), "fp32": ("--grad-dtype", "fp32"), "-w 0": ("-w", 0), "nccl": ("--reduce", "nccl")}
VARIANTS |= {"carried by nccl": ("--carrier", "nccl")}
LARGE = ("-b", LATE_TOKENS // 64, "-d", 2 * LATE_TOKENS)
LATE = {"0": ("-z", 0), "1": ("-z", 1), "nccl": ("-z", 1, "--carrier", "nccl"), "2": ("-z", 2)}
STAGES = {"a": 0, "b": 1, "c": 1, "d": 2, "e": 2}


@pytest.fixture(scope="module", autouse=True)
def gpus():
    from cupy.cuda import runtime

    if (count := runtime.getDeviceCount()) < 2:
        pytest.skip("needs two GPUs")
    return count


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    sizes = {"train_000000.bin": 70001, "val_000000.bin": 2001}
    return data(write_shards(tmp_path_factory.mktemp("data") / "shards", sizes))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where the runs are, each under its name."""
    return tmp_path_factory.mktemp("runs")


def run(world: int, *args: object, program=TRAIN) -> Run:
    return finish(start(world, *args, program=program), 4 * TIMEOUT)


@pytest.fixture(scope="module")
def train_all(shards, out):
    """train_all(world, {name: options}): one run after another, in the same processes."""

    def train_all(world: int, runs: dict[str, tuple]) -> None:
        names = [[*map(str, (*SIZE, *shards, *options, "-o", out / name))] for name, options in runs.items()]
        (out / "runs.json").write_text(json.dumps(names))
        result = run(world, out / "runs.json", program=ROOT / "tests/rank_trains.py")
        assert result.code == 0, result.err

    return train_all


@pytest.fixture(scope="module")
def two(train_all):
    """Two ranks' runs."""
    runs = {f"gradients {way}": ("-b", 4, "-x", 1, "-n", 1, "--clip", 0, "-z", 1, "--reduce", way) for way in REDUCE}
    runs |= {f"run {way}": ("-b", 4, "-x", 8, "-v", 4, "-z", 1, "--reduce", way) for way in REDUCE}
    for variant, options in VARIANTS.items():
        for name, stage in STAGES.items():
            runs[f"{variant} {name}"] = ("-b", 4, *options, "-x", 12, "-n", 12, "-v", 3, "-z", stage)
    runs["copies"] = ("-b", 4, "--carrier", "copies", "-x", 12, "-n", 12, "-v", 3, "-z", STAGES["b"])
    runs |= {f"accumulated {name}": ("-b", 1, "-x", 12, "-n", 12, "-z", 2) for name in "ab"}
    runs |= {f"lanes {B} 2": ("-b", B, "--lanes", 4, "-x", 12, "-n", 12, "-z", 1) for B in (2, 1)}
    runs |= {f"late {name}": (*LARGE, *options, "-x", 12, "-n", 12) for name, options in LATE.items()}
    runs |= {name: ("-b", 4, *CONSTANT, "-x", x, "-z", 1) for name, x in (("whole", 12), ("parts", 4))}
    train_all(2, runs)


@pytest.fixture(scope="module")
def one(train_all, two):
    """One rank's runs, one of which goes on where two ranks have stopped."""
    runs = {
        "gradients": ("-b", 8, "-x", 1, "-n", 1, "--clip", 0),
        "run": ("-b", 8, "-x", 12, "-v", 4),
        "parts": ("-b", 8, *CONSTANT, "-x", 8, "-y", 1),
    }
    runs |= {f"lanes {B} 1": ("-b", B, "--lanes", 4, "-x", 12, "-n", 12) for B in (2, 1)}
    train_all(1, runs)


@pytest.fixture(scope="module")
def four(train_all, gpus):
    if gpus < 4:
        pytest.skip("needs four GPUs")
    runs = {f"four {stage}": ("-b", 2, "-x", 12, "-n", 12, "-v", 4, "-z", stage) for stage in (0, 1, 2)}
    runs["four nccl"] = (*runs["four 1"], "--carrier", "nccl")
    runs |= {f"lanes {B} 4": ("-b", B, "--lanes", 4, "-x", 12, "-n", 12, "-z", 1) for B in (2, 1)}
    train_all(4, runs)


def first_gradients(folder) -> dict[str, np.ndarray]:
    """From the moments after one update without clipping: m = (1 - beta1) * gradient."""
    return {name: values / 0.1 for name, values in checkpoint(folder, 1).items() if name.startswith("m.")}


def assert_same_run(one, other) -> None:
    """Of 12 steps, bit for bit."""
    assert records(other) == records(one)
    assert records(other, "val") == records(one, "val")
    assert_same_checkpoint(checkpoint(other, 12), checkpoint(one, 12))


@pytest.mark.parametrize("way", REDUCE)
def test_the_first_gradients_are_those_of_one_rank(one, two, out, way):
    """One rank rounds a gradient to bf16 once; two round theirs, and the sum: as a norm, within 2^-8 (1 + 2)."""
    alone, both = (first_gradients(out / name) for name in ("gradients", f"gradients {way}"))
    for name, exact in alone.items():
        C = exact.shape[0] // 3
        if name.endswith("qkvb"):  # the key bias's true gradient is zero: what is computed is rounding
            exact[C : 2 * C] = both[name][C : 2 * C] = 0
        assert np.linalg.norm(both[name] - exact) <= 3 * 2**-8 * np.linalg.norm(exact), name


@pytest.mark.parametrize("way", REDUCE)
def test_the_run_is_that_of_one_rank(one, two, out, way):
    np.testing.assert_allclose(losses(out / f"run {way}"), losses(out / "run")[:8], rtol=2**-8)
    alone, both = ([r["loss"] for r in records(out / name, "val")] for name in ("run", f"run {way}"))
    np.testing.assert_allclose(both, alone[:3], rtol=2**-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_stages_and_every_repetition_give_the_same_bits(two, out, variant):
    """Replicas are compared at every validation."""
    for name in STAGES:
        assert_same_run(out / f"{variant} a", out / f"{variant} {name}")


def test_copies_carry_what_nccl_carries(two, out):
    assert_same_run(out / "copies", out / "carried by nccl b")
    assert_same_run(out / "copies", out / "bf16 b")


def test_gradients_that_travel_late_are_the_same(two, out):
    """In stage 2 they do not travel late."""
    for name in LATE:
        assert_same_run(out / "late 2", out / f"late {name}")


def test_with_accumulation_every_repetition_gives_the_same_bits(one, two, out):
    """In stage 2 every micro-batch's gradients are exchanged, in memory that is used again and again."""
    assert_same_run(out / "accumulated a", out / "accumulated b")
    np.testing.assert_allclose(losses(out / "accumulated a"), losses(out / "run"), rtol=2**-8)


@pytest.mark.parametrize("B", [2, 1], ids=["one micro-batch a lane", "two micro-batches a lane"])
def test_lanes_make_the_bits_independent_of_the_number_of_ranks(one, two, out, B):
    assert_same_run(out / f"lanes {B} 1", out / f"lanes {B} 2")


def test_four_ranks(one, four, out):
    for way in (1, 2, "nccl"):
        assert_same_run(out / "four 0", out / f"four {way}")
    np.testing.assert_allclose(losses(out / "four 0"), losses(out / "run"), rtol=2**-8)
    for B in (2, 1):
        assert_same_run(out / f"lanes {B} 1", out / f"lanes {B} 4")


def test_a_run_goes_on_with_another_number_of_ranks(one, train_all, out):
    """A checkpoint that two ranks wrote goes on in one, and that one's in two; nothing is lost at the borders."""
    train_all(2, {"parts": ("-b", 4, *CONSTANT, "-x", 12, "-z", 1, "-y", 1)})
    assert_same_checkpoint(checkpoint(out / "parts", 4), checkpoint(out / "whole", 4))
    np.testing.assert_allclose(losses(out / "parts"), losses(out / "whole"), rtol=2**-8)


def test_recorded_steps_are_the_steps(train_all, two, out):
    """NCCL's work and the waits between streams in CUDA graphs."""
    runs = {
        f"recorded {stage}": ("-b", 4, "-x", 12, "-n", 12, "-v", 3, "-z", stage, "--cuda-graph", "on")
        for stage in (0, 1, 2)
    }
    runs["recorded nccl"] = (*runs["recorded 1"], "--carrier", "nccl")
    runs["recorded late"] = (*LARGE, *LATE["1"], "-x", 12, "-n", 12, "--cuda-graph", "on")
    runs["recorded accumulated"] = ("-b", 1, "-x", 12, "-n", 12, "-z", 2, "--cuda-graph", "on")
    train_all(2, runs)
    for name in (0, 1, 2, "nccl"):
        assert_same_run(out / "bf16 a", out / f"recorded {name}")
    assert_same_run(out / "late 2", out / "recorded late")
    assert_same_run(out / "accumulated a", out / "recorded accumulated")


# --- an end for all

NO_GPU = """
import os, runpy, sys
from mpi4py import MPI
os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if MPI.COMM_WORLD.rank else {}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

RAISES = """
import os, runpy, sys, time
from pathlib import Path
import engine.data
from mpi4py import MPI
take = engine.data.Loader.next
calls = 0
def next_or_raise(self):
    global calls
    calls += 1
    if calls == 5 and MPI.COMM_WORLD.rank == 1:
        Path(os.environ["RAISED_AT"]).write_text(str(time.time()))
        1 / 0
    return take(self)
engine.data.Loader.next = next_or_raise
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_memory(gpus: int) -> list[int]:
    from cupy.cuda import Device, runtime

    found = []
    for number in range(gpus):
        with Device(number):
            found.append(runtime.memGetInfo()[0])
    return found


@pytest.fixture
def ended(gpus, capsys):
    """ended(how, began): says how long after `began` (of time.time()) the ranks were down, and their GPUs free."""
    before = free_memory(gpus)

    def ended(how: str, began: float) -> None:
        down = time.time() - began
        while any(free < was - 2**26 for free, was in zip(free_memory(gpus), before, strict=True)):
            assert time.time() - began < 30, f"{before} bytes were free before, {free_memory(gpus)} are now"
            time.sleep(0.05)
        free = time.time() - began
        with capsys.disabled():
            print(f"\n{how}: all ranks down after {down:.1f} s, their GPUs free after {free:.1f} s")

    return ended


def test_more_ranks_than_gpus_are_refused(shards, gpus):
    result = run(gpus + 1, *SIZE, *shards, "-b", 1, "-d", 64 * (gpus + 1), "-x", 1)
    assert result.code == 2
    assert f"{gpus + 1} ranks run on their machine and see {gpus} GPUs" in result.err
    assert result.err.count("error (exit 2)") == 1


def test_ranks_of_which_one_sees_no_gpu_are_refused(shards, tmp_path):
    program = altered(NO_GPU, tmp_path)
    result = run(2, "--device", "auto", *SIZE[2:], *shards, "-b", 4, "-x", 1, program=program)
    assert result.code == 2
    assert "rank 0 has a GPU to train on, rank 1 has none" in result.err


def test_a_rank_that_is_killed_takes_the_others_with_it(shards, tmp_path, ended):
    options = (*SIZE, *shards, "-b", 4, "-x", 10**6, "-z", 1, "-o", tmp_path / "run")
    with start(2, *options) as process:
        pids = wait_for_ranks(process, 2)
        began = time.time()
        os.kill(pids[1], signal.SIGKILL)
        result = finish(process, timeout=15)
        wait_for_end(pids)
    assert result.code != 0
    ended("kill -9 of one rank", began)
    assert time.time() - began < 5


def test_an_exception_on_one_rank_ends_all(shards, tmp_path, monkeypatch, ended):
    monkeypatch.setenv("RAISED_AT", str(tmp_path / "raised"))
    result = run(2, *SIZE, *shards, "-b", 4, "-x", 10**6, program=altered(RAISES, tmp_path))
    assert result.code == 1
    assert result.err.count("ZeroDivisionError: division by zero") == 1
    began = float((tmp_path / "raised").read_text())
    ended("an exception on one rank", began)
    assert time.time() - began < 5


def test_a_rank_that_is_stopped_is_named_and_ends_the_job(shards, tmp_path, ended):
    """The others' GPUs wait in NCCL for the one of the rank that is stopped; their watchdogs do not."""
    options = (*SIZE, *shards, "-b", 4, "-x", 10**6, "--watchdog", 3, "-o", tmp_path / "run")
    with start(2, *options) as process:
        pids = wait_for_ranks(process, 2)
        began = time.time()
        os.kill(pids[1], signal.SIGSTOP)
        result = finish(process, timeout=30)
        wait_for_end(pids)
    assert result.code == 17
    assert "rank 1 is silent, perhaps stopped or dead" in result.err
    ended("SIGSTOP of one rank, --watchdog 3", began)


def test_the_benchmark_runs(tmp_path):
    size = "-e l3h2c64 -b 4 -t 64 --vocabulary 200 --device cuda --lanes 4".split()
    steps = "--warm-up 2 --steps 4 --turns 2 --loss-steps 10".split()
    result = run(2, *size, *steps, "--json", tmp_path / "ranks.json", program=ROOT / "bench/ranks.py")
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "ranks.json").read_text())
    same = {f"-z {stage}" for stage in (0, 1, 2)} | {"-z 1 --cuda-graph on"}
    assert len({figures["variants"][name]["loss"] for name in same}) == 1
    for variant in figures["variants"].values():
        assert variant["held"] == {name: variant["memory"][name] for name in ("gradients", "optimizer")}
    assert figures["nccl"]["with exchanges"] <= figures["nccl_allowed"]
    np.testing.assert_allclose(figures["losses"]["2"], figures["losses"]["1"], rtol=2**-8)
