"""Several ranks on as many GPUs, by the real mpirun and NCCL: the same run as one rank's, and an end for all."""

import json
import os
import signal
import time

import numpy as np
import pytest

from tests.conftest import ROOT, TIMEOUT, TRAIN, Run, data, finish, write_shards
from tests.test_cuda_train import assert_same_checkpoint, checkpoint, losses, records
from tests.test_ranks import (  # skips this module too, where there is no mpirun
    BROKEN_RANK,
    altered,
    start,
    wait_for_end,
    wait_for_ranks,
)

pytestmark = pytest.mark.gpu

# Five layers: in stage 2 three take memory by turns. 8 sequences in a step, however they are shared out.
SIZE = ("--device", "cuda", "-e", "l5h2c64", "-t", 64, "-d", 512, "-l", 1e-3, "-s", 0, "-v", 0, "-m", 2)


@pytest.fixture(scope="module", autouse=True)
def gpus():
    from cupy.cuda import runtime

    if (count := runtime.getDeviceCount()) < 2:
        pytest.skip("needs two GPUs")
    return count


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    sizes = {"train_000000.bin": 30001, "val_000000.bin": 2001}
    return data(write_shards(tmp_path_factory.mktemp("data") / "shards", sizes))


def run(world: int, *args: object, program=TRAIN) -> Run:
    return finish(start(world, *args, program=program), 4 * TIMEOUT)


def trained(world: int, *args: object, B: int | None = None) -> Run:
    result = run(world, *SIZE, "-b", B or 8 // world, *args)
    assert result.code == 0, result.err
    return result


def first_gradients(folder) -> dict[str, np.ndarray]:
    """From the moments after one update without clipping: m = (1 - beta1) * gradient."""
    return {name: values / 0.1 for name, values in checkpoint(folder, 1).items() if name.startswith("m.")}


@pytest.mark.parametrize("reduce", ["owner", "nccl"])
def test_the_first_gradients_are_those_of_one_rank(shards, tmp_path, reduce):
    """One rank rounds a gradient to bf16 once; two round theirs, and the sum: as a norm, within 2^-8 (1 + 2)."""
    for world in (1, 2):
        options = ("-x", 1, "-n", 1, "--clip", 0, "--reduce", reduce, "-o", tmp_path / str(world))
        trained(world, *shards, *options, "-z", 1)
    one, two = (first_gradients(tmp_path / str(world)) for world in (1, 2))
    for name, exact in one.items():
        C = exact.shape[0] // 3
        if name.endswith("qkvb"):  # the key bias's true gradient is zero: what is computed is rounding
            exact[C : 2 * C] = two[name][C : 2 * C] = 0
        assert np.linalg.norm(two[name] - exact) <= 3 * 2**-8 * np.linalg.norm(exact), name


@pytest.mark.parametrize("reduce", ["owner", "nccl"])
def test_the_run_is_that_of_one_rank(shards, tmp_path, reduce):
    options = ("-x", 8, "-v", 4, "--reduce", reduce)
    for world in (1, 2):
        trained(world, *shards, *options, "-z", 1, "-o", tmp_path / str(world))
    one, two = (losses(tmp_path / str(world)) for world in (1, 2))
    np.testing.assert_allclose(two, one, rtol=2**-8)
    one, two = ([r["loss"] for r in records(tmp_path / str(world), "val")] for world in (1, 2))
    np.testing.assert_allclose(two, one, rtol=2**-8)


@pytest.mark.parametrize("options", [(), ("--grad-dtype", "fp32"), ("-w", 0)], ids=["bf16", "fp32", "-w 0"])
def test_all_stages_and_every_repetition_give_the_same_bits(shards, tmp_path, options):
    """Replicas are compared at every validation."""
    for name, stage in (("a", 0), ("b", 1), ("c", 1), ("d", 2), ("e", 2)):
        trained(2, *shards, *options, "-x", 12, "-n", 12, "-v", 3, "-z", stage, "-o", tmp_path / name)
    for name in "bcde":
        assert records(tmp_path / name) == records(tmp_path / "a")
        assert records(tmp_path / name, "val") == records(tmp_path / "a", "val")
        assert_same_checkpoint(checkpoint(tmp_path / name, 12), checkpoint(tmp_path / "a", 12))


def test_with_accumulation_every_repetition_gives_the_same_bits(shards, tmp_path):
    """In stage 2 every micro-batch's gradients are exchanged, in memory that is used again and again."""
    for name in "ab":
        trained(2, *shards, "-x", 12, "-n", 12, "-z", 2, "-o", tmp_path / name, B=1)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert_same_checkpoint(checkpoint(tmp_path / "a", 12), checkpoint(tmp_path / "b", 12))
    trained(1, *shards, "-x", 12, "-o", tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "one"), rtol=2**-8)


@pytest.mark.parametrize("B", [2, 1], ids=["one micro-batch a lane", "two micro-batches a lane"])
def test_lanes_make_the_bits_independent_of_the_number_of_ranks(shards, tmp_path, B, gpus):
    worlds = [world for world in (1, 2, 4) if world <= gpus]
    for world in worlds:
        options = ("--lanes", 4, "-x", 12, "-n", 12, "-z", int(world > 1), "-o", tmp_path / str(world))
        trained(world, *shards, *options, B=B)
    for world in worlds[1:]:
        assert records(tmp_path / str(world)) == records(tmp_path / "1")
        assert_same_checkpoint(checkpoint(tmp_path / str(world), 12), checkpoint(tmp_path / "1", 12))


def test_a_run_goes_on_with_another_number_of_ranks(shards, tmp_path):
    """A checkpoint that two ranks wrote goes on in one, and that one's in two; nothing is lost at the borders."""
    constant = ("-k", "constant", "-n", 4)
    trained(2, *shards, *constant, "-x", 12, "-z", 1, "-o", tmp_path / "whole")
    for world, steps in ((2, 4), (1, 8), (2, 12)):
        trained(world, *shards, *constant, "-x", steps, "-z", 1, "-o", tmp_path / "parts", "-y", int(steps > 4))
    assert_same_checkpoint(checkpoint(tmp_path / "parts", 4), checkpoint(tmp_path / "whole", 4))
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=2**-8)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recorded_steps_are_the_steps(shards, tmp_path, stage):
    """NCCL's work and the waits between streams in CUDA graphs."""
    for name in ("off", "on"):
        trained(2, *shards, "-x", 12, "-n", 12, "-z", stage, "--cuda-graph", name, "-o", tmp_path / name)
    assert records(tmp_path / "on") == records(tmp_path / "off")
    assert_same_checkpoint(checkpoint(tmp_path / "on", 12), checkpoint(tmp_path / "off", 12))


def test_more_ranks_than_gpus_are_refused(shards, gpus):
    result = run(gpus + 1, *SIZE, *shards, "-b", 1, "-d", 64 * (gpus + 1), "-x", 1)
    assert result.code == 2
    assert f"{gpus + 1} ranks run on their machine and see {gpus} GPUs" in result.err
    assert result.err.count("error (exit 2)") == 1


def test_ranks_of_which_one_sees_no_gpu_are_refused(shards, tmp_path):
    hide = "import os, runpy, sys\nfrom mpi4py import MPI\n"
    hide += 'os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if MPI.COMM_WORLD.rank else {}\n'
    program = altered(hide + 'runpy.run_path(sys.argv[0], run_name="__main__")\n', tmp_path)
    result = run(2, "--device", "auto", *SIZE[2:], *shards, "-b", 4, "-x", 1, program=program)
    assert result.code == 2
    assert "rank 0 has a GPU to train on, rank 1 has none" in result.err


def test_a_rank_that_is_killed_takes_the_others_with_it(shards, tmp_path):
    options = (*SIZE, *shards, "-b", 4, "-x", 10**6, "-z", 1, "-o", tmp_path / "run")
    with start(2, *options) as process:
        pids = wait_for_ranks(process, 2)
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        result = finish(process, timeout=15)
        wait_for_end(pids)
    assert result.code != 0
    print(f"all down {time.monotonic() - began:.1f} s after kill -9")


def test_an_exception_on_one_rank_ends_all(shards, tmp_path):
    result = run(2, *SIZE, *shards, "-b", 4, "-x", 4, program=altered(BROKEN_RANK, tmp_path))
    assert result.code == 1
    assert result.err.count("ZeroDivisionError: division by zero") == 1


def test_a_rank_that_is_stopped_is_named_and_ends_the_job(shards, tmp_path):
    """The others' GPUs wait in NCCL for the one of the rank that is stopped; their watchdogs do not."""
    options = (*SIZE, *shards, "-b", 4, "-x", 10**6, "--watchdog", 3, "-o", tmp_path / "run")
    with start(2, *options) as process:
        pids = wait_for_ranks(process, 2)
        os.kill(pids[1], signal.SIGSTOP)
        result = finish(process, timeout=30)
        wait_for_end(pids)
    assert result.code == 17
    assert "rank 1 is silent, perhaps stopped or dead" in result.err


def test_the_benchmark_runs(tmp_path):
    options = (
        *"-e l3h2c64 -b 4 -t 64 --vocabulary 200 --device cuda --warm-up 2 --steps 4 --lanes 4".split(),
        "--json",
    )
    result = run(2, *options, tmp_path / "ranks.json", program=ROOT / "bench/ranks.py")
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "ranks.json").read_text())
    assert len({variant["loss"] for name, variant in figures["variants"].items() if len(name) == len("-z 0")}) == 1
