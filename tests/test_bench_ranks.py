"""bench/ranks.py: it runs, and its figures follow from each other."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from bench.rank_exchanges import EXCHANGES, LEFT_OUT, Instead, least, without
from bench.ranks import on_one_rank, speed, variants
from engine.comm.one import OneRank
from engine.config import RunConfig
from tests.conftest import ROOT
from tests.test_ranks import run  # skips this module too, where there is no mpirun

B, T, WORLD = 2, 32, 2
SMALL = (*"-e l2h2c64 --device cpu --vocabulary 200 --warm-up 1 --steps 2 --turns 2".split(), "-b", B, "-t", T)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    target = tmp_path_factory.mktemp("ranks") / "ranks.json"
    picture = target.with_suffix(".png")
    options = ("--lanes", 4, "--loss-steps", 30, "--json", target, "--png", picture)
    result = run(WORLD, *SMALL, *options, program=ROOT / "bench/ranks.py")
    assert result.code == 0, result.err
    assert picture.stat().st_size > 5000
    found = json.loads(target.read_text())
    for name, variant in found["variants"].items():
        assert any(line.startswith(name) and f"{variant['of_ideal']:.2%}" in line for line in result.out.splitlines())
    return found


def test_all_ways_to_share_out_are_there_and_compared_with_one_rank(figures):
    stages = [f"-z {stage}{reduce}" for stage in (0, 1, 2) for reduce in ("", " --reduce nccl")]
    tokens = 4 * B * T
    accumulated = [f"-z 1 -d {tokens}", f"-z 1 --lanes 4 -d {tokens}"]
    assert [*figures["variants"]] == [*stages, *accumulated]
    for name, variant in figures["variants"].items():
        taken = tokens if "-d" in name else WORLD * B * T
        taken_alone = tokens if "-d" in name else B * T
        assert variant["tokens_per_second"] == pytest.approx(taken / variant["seconds"])
        fastest, slowest = min(variant["seconds_alone"]), max(variant["seconds_alone"])
        assert fastest <= variant["seconds_ideal"] * WORLD * taken_alone / taken <= slowest
        assert variant["of_ideal"] == pytest.approx(variant["seconds_ideal"] / variant["seconds"])
        assert len(variant["of_ideal_by_turns"]) == 2
        assert [*variant["seconds_without"]] == ["gathering", "exchanging", "adding"]
        assert all(seconds > 0 for seconds in variant["seconds_without"].values())
        assert {*variant["waits"]} == {"parameters", "sums", "loss", "norm"}
        assert all(us > 0 for us in variant["waits"].values())


def test_one_rank_takes_nothing_of_what_ranks_exchange():
    """On GPUs too, where there are more ways."""
    ways = variants(RunConfig(B=B, T=T, cuda_graph="off"), WORLD, 4, on_gpus=True)
    assert {way.carrier for way in ways.values()} == {"auto", "nccl"}
    assert any(way.cuda_graph == "on" for way in ways.values())
    for way in ways.values():
        alone = on_one_rank(way)
        assert alone == RunConfig(B=B, T=T, cuda_graph="off", total_batch=way.total_batch)


@pytest.mark.parametrize(("total_batch", "ideal"), [(-1, 4 / 3), (4 * B * T, 2 / 3)])
def test_ideal_is_that_each_rank_works_as_fast_as_it_does_alone(total_batch, ideal):
    """Two ranks that take 1 and 2 s for a step do 3/4 of two such steps each second, or 3/2 of one that they share."""
    run = RunConfig(B=B, T=T, total_batch=total_batch)
    seconds = {"alone": [[0.9, 1.1], [2.0, 2.0]], "together": [[2.0, 1.0], [1.0, 2.0]]}
    each = {name: np.array(seconds.get(name, [[1.0, 1.0], [1.5, 0.5]])) for name in (*seconds, *LEFT_OUT)}
    found = speed(run, on_one_rank(run), 2, each)
    assert found["seconds_alone"] == pytest.approx([1.0, 2.0])
    assert found["seconds"] == 2.0  # whichever rank it was that took so long
    assert found["seconds_ideal"] == pytest.approx(ideal)
    assert found["of_ideal"] == pytest.approx(ideal / 2)
    assert found["seconds_without"] == dict.fromkeys(LEFT_OUT, 1.25)


def test_of_waits_the_least_of_all_ranks_counts():
    comm = SimpleNamespace(gather=lambda values: np.array([values, values[::-1]]))
    assert least(comm, {"norm": 1.0, "sums": 3.0, "loss": 2.0}) == {"norm": 1.0, "sums": 3.0, "loss": 1.0}


@pytest.mark.parametrize(
    ("left_out", "called"),
    [
        ((), {"exchange": 1, "all_gather": 1, "sum": 1}),
        (("all_gather",), {"exchange": 1, "sum": 1}),
        (("all_gather", "exchange", "sum"), {}),
    ],
)
def test_what_is_left_out_is_left_out_and_comes_back(left_out, called):
    """Of a rank's sharing out, which notes what it calls."""
    calls = Counter()

    def noted(name):
        return lambda *_, **__: calls.update([name])

    comm = Instead(OneRank(), **{name: noted(name) for name in EXCHANGES})
    ops = SimpleNamespace(reduce=SimpleNamespace(sum_slices=noted("sum")))
    t = SimpleNamespace(zero=SimpleNamespace(_comm=comm, _ops=ops), ops=ops, replay="usual")

    def share_out():
        t.zero._comm.exchange(None, None)
        t.zero._ops.reduce.sum_slices(None, None, add=False)
        t.zero._comm.all_gather(None)
        return Counter({name: calls.pop(name) for name in [*calls]})

    with without(t, "own", left_out):
        assert t.replay == "own"
        assert share_out() == Counter(called)
    assert share_out() == {"exchange": 1, "all_gather": 1, "sum": 1}
    assert t.replay == "usual"


def test_every_bucket_s_exchange_is_there(figures):
    """Three buckets a step: exchanged once in each lane, summed, and the parameters gathered (-z 0: the gradients)."""
    for name, variant in figures["variants"].items():
        times = dict.fromkeys((*EXCHANGES, "sum"), 0)
        for row in variant["phases"]:
            times[row["name"]] += row["times"]
            assert row["us"] > 0
            assert row["us_alone"] > 0
        on_the_way = "nccl" in name
        lanes = 2 if "lanes" in name else 1
        assert times["exchange"] == (0 if on_the_way else 3 * lanes)
        assert times["reduce_scatter"] == (3 if on_the_way else 0)
        assert times["sum"] == (0 if on_the_way and "-z 2" not in name else 3)
        assert times["all_gather"] == 3


def test_the_stages_train_the_same(figures):
    losses = {figures["variants"][name]["loss"] for name in ("-z 0", "-z 1", "-z 2")}
    assert len(losses) == 1


def test_the_arrays_of_a_rank_take_what_the_tables_say(figures):
    for variant in figures["variants"].values():
        assert variant["held"] == {name: variant["memory"][name] for name in ("gradients", "optimizer")}


def test_ranks_see_the_losses_of_one(figures):
    """In float32; the text can be learned, so it is not that nothing happens."""
    one, two = (figures["losses"][str(world)] for world in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] < one[0] - 0.3


@pytest.mark.parametrize(
    ("world", "options", "words"), [(1, (), "start several with mpirun"), (2, ("--only", "-z 3"), "there are -z 0, ")]
)
def test_what_cannot_be_measured_is_refused(world, options, words):
    result = run(world, *SMALL, *options, program=ROOT / "bench/ranks.py")
    assert result.code == 2
    assert words in result.err
