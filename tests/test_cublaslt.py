"""engine/device/cublaslt.py and race.py without a GPU: what cublasLt is told, and which of its algorithms wins."""

import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from engine.device import cublaslt, cuda, race
from engine.device.kernels import BF16
from tests import cublaslt_on_cpu
from tests.cublaslt_on_cpu import EPILOGUES, OTHER, SMALL, VARIANT, Variant, put, varied
from tests.twins import EPS16, F32, matmul, sum_error

RNG = np.random.default_rng(0)


@pytest.fixture
def stand_in(monkeypatch):
    return cublaslt_on_cpu.install(monkeypatch)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("options", ["", "add", "bias", "add bias", "pre_gelu bias", "dgelu", "fp32 accumulate"])
def test_what_cublaslt_is_told_is_what_the_docstring_promises(stand_in, transpose_a, transpose_b, options):
    M, N, K = 5, 7, 3
    a, b = (RNG.normal(size=shape) for shape in ((K, M) if transpose_a else (M, K), (N, K) if transpose_b else (K, N)))
    dtype = F32 if "fp32" in options else BF16
    out, pre = put(np.zeros((M, N)), dtype), put(np.full((M, N), np.nan))
    add = put(RNG.normal(size=(M, N)), dtype)
    given = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    given |= {"add": add} if "add" in options else {}
    given |= {"bias": put(RNG.normal(size=N))} if "bias" in options else {}
    given |= {"dgelu": put(RNG.normal(size=(M, N)))} if "dgelu" in options else {}
    if "accumulate" in options:
        out[...] = add
        given["add"] = out
    expected, expected_pre = out.copy(), np.zeros((M, N), BF16)
    told = {name: expected if value is out else value for name, value in given.items()}
    matmul(expected, put(a), put(b), **told, **({"pre_gelu": expected_pre} if "pre_gelu" in options else {}))
    cublaslt.matmul(out, put(a), put(b), **given, **({"pre_gelu": pre} if "pre_gelu" in options else {}))
    # Both sum in fp32, in different orders, and round once.
    bound = (EPS16 if dtype == BF16 else 0) * 2 + sum_error(K + 2) * 8
    np.testing.assert_allclose(out.astype(F32), expected.astype(F32), rtol=bound, atol=bound)
    if "pre_gelu" in options:
        np.testing.assert_allclose(pre.astype(F32), expected_pre.astype(F32), rtol=bound, atol=bound)


def test_a_plan_is_made_once_for_each_kind_of_multiply(stand_in):
    a, b, out = put(np.ones((4, 8))), put(np.ones((8, 16))), put(np.zeros((4, 16)))
    for _ in range(3):
        cublaslt.matmul(out, a, b)
    assert stand_in.plans == 1
    cublaslt.matmul(out, a, b, add=out)
    cublaslt.matmul(put(np.zeros((4, 16)), F32), a, b)
    assert stand_in.plans == 3


def test_operands_that_do_not_fit_are_refused(stand_in):
    a, b, out = put(np.ones((4, 8))), put(np.ones((8, 16))), put(np.zeros((4, 16)))
    off = put(np.ones(40))[8:].reshape(4, 8)
    for operands, options in (
        ((out, a, out), {}),
        ((out, a, b), {"transpose_a": True}),
        ((out, off, b), {}),
        ((out, a.astype(F32), b), {}),
        ((out, a, b), {"pre_gelu": out}),
        ((out, a, b), {"add": b}),
    ):
        with pytest.raises(AssertionError):
            cublaslt.matmul(*operands, **options)


def fastest(operation, thorough=False):
    return cublaslt.library().fastest(operation, thorough)


search = partial(fastest, thorough=True)


def test_what_rounds_partial_sums_is_never_chosen_but_can_be_timed(stand_in):
    stand_in.rounding, stand_in.speeds = [8, 9], Counter({2: 2e-6, 3: 1.5e-6, 8: 3e-6, 9: 1e-6})
    assert fastest(SMALL)["id"] == 3
    assert {8, 9}.isdisjoint(stand_in.ran)
    stand_in.ran.clear()
    assert cublaslt.library().fastest_by_reduction(SMALL) == pytest.approx((1.5, 1.0))
    assert stand_in.ran[:4] == [2, 3, 8, 9]  # in turns, each once
    stand_in.rounding = []
    assert cublaslt.library().fastest_by_reduction(SMALL) == pytest.approx((1.5, 1.5))


def test_all_run_in_turns_until_the_slow_ones_are_dropped(stand_in):
    stand_in.proposed, stand_in.speeds = [2, 3, 4], Counter({2: 1.0, 3: 9.0, 4: 0.9})
    fastest(SMALL)
    assert stand_in.ran == [2, 3, 4] * race.FIRST_ROUNDS + [2, 4] * (race.ROUNDS - race.FIRST_ROUNDS)


@pytest.mark.parametrize("trouble", ["falling clock", "hiccup"])
def test_a_clock_that_falls_or_a_hiccup_does_not_change_the_choice(stand_in, monkeypatch, trouble):
    """Each round is slower than the one before by more than the algorithms differ; or one time is far off."""
    stand_in.proposed, stand_in.speeds = [2, 3], Counter({2: 1.05, 3: 1.0})
    measured = iter(range(100))

    def seconds_between(began, ended):
        n = next(measured)
        return (ended - began) * 1.1 ** (n // 2) if trouble == "falling clock" else ended - began + 50.0 * (n == 3)

    monkeypatch.setattr(cuda, "seconds_between", seconds_between)
    assert fastest(SMALL)["id"] == 3


@pytest.mark.parametrize(("first", "choice"), [(1.009, 2), (1.011, 3)])
def test_of_equally_fast_ones_the_library_s_order_decides(stand_in, first, choice):
    stand_in.proposed, stand_in.speeds = [2, 3, 4], Counter({2: first, 3: 1.0, 4: 1.0})
    assert fastest(SMALL)["id"] == choice


def test_a_table_tells_people_what_was_chosen_and_what_it_gains(stand_in):
    stand_in.proposed, stand_in.speeds = [2, 3, 4], Counter({2: 9e-6, 3: 2e-6, 4: 3e-6})
    record = fastest(SMALL)
    assert bytes.fromhex(record.pop("algo")) == np.array([3] + [0] * 7, np.uint64).tobytes()
    assert (record.pop("id"), record.pop("us"), record.pop("first_us"), record.pop("thorough")) == (3, 2.0, 9.0, False)
    assert record == dict.fromkeys(("tile_id", "stages_id", "splitk_num", "reduction_scheme", "cluster_shape_id"), 7)


def test_what_is_timed_leaves_no_trace_in_what_is_computed(stand_in):
    """Every epilogue can be raced; operands of a race are its own."""
    for case in (SMALL._replace(epilogue=name, add=add) for name in EPILOGUES for add in (False, True)):
        assert fastest(case)["id"] == 2


def variants_run(stand_in):
    """In the order of their first run."""
    return [each for each in dict.fromkeys(stand_in.ran) if isinstance(each, Variant)]


def test_a_variant_faster_than_every_proposal_is_chosen_and_followed(stand_in):
    varied(stand_in).speeds[VARIANT] = 1.5e-6
    found = {operation.name: search(operation) for operation in (SMALL, OTHER)}
    for record in found.values():
        assert (record["id"], record["tile_id"], record["us"], record["first_us"]) == (2, 11, 1.5, 2.0)
    stand_in.ran.clear()
    cublaslt.library().use({name: record["algo"] for name, record in json.loads(json.dumps(found)).items()})
    out, a, b, bias = put(np.zeros((5, 7))), put(np.ones((5, 3))), put(np.ones((7, 3))), put(np.zeros(7))
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    assert stand_in.ran == [VARIANT]


@pytest.mark.parametrize(("seconds", "choice"), [(1.99e-6, 2), (1.97e-6, VARIANT)])
def test_a_proposal_wins_a_tie_with_variants(stand_in, seconds, choice):
    """Even with more of them than stay in the race."""
    tiles = list(range(10, 11 + 2 * race.MOST))
    varied(stand_in, TILE_IDS=tiles).speeds.update({Variant(2, tile): seconds for tile in tiles})
    record = search(SMALL)
    assert (record["tile_id"] == 7) == (choice == 2)
    assert record["first_us"] == 2.0


def test_proposals_run_first_then_variants_of_their_tiles_then_the_rest_the_same_way_each_time(stand_in):
    tiles = list(range(10, 30))
    varied(stand_in, TILE_IDS=tiles, CUSTOM_OPTION_MAX=[2], CTA_SWIZZLING_SUPPORT=[1], STAGES_IDS=[4, 5])
    proposed = Variant(2, 25), Variant(2, 26, STAGES_ID=5)
    stand_in.proposed = [proposed[0], 3, proposed[1]]
    search(SMALL)
    first = list(dict.fromkeys(stand_in.ran))
    assert first[:3] == [proposed[0], 3, proposed[1]]
    settings = [(stages, custom, swizzled) for stages in (4, 5) for custom in (0, 1, 2) for swizzled in (0, 1)]
    near, far = first[3:26], first[26:]
    every = {Variant(2, tile, 1, 0, *setting) for tile in tiles for setting in settings}
    assert {*near, *far} == every - set(proposed)  # of the proposals, the second is a variant too: it is not run twice
    assert Counter(stand_in.ran) == {each: race.ROUNDS if each == 3 else race.FIRST_ROUNDS for each in first}
    assert {each.TILE_ID for each in near} == {25, 26}
    assert {25, 26}.isdisjoint(each.TILE_ID for each in far)
    assert {each[4:7] for each in far[:60]} == set(settings)  # so a budget takes some of every kind
    assert len({each.TILE_ID for each in far[:60]}) > 9
    for operation in (SMALL, OTHER):
        stand_in.ran.clear()
        search(operation)
        assert list(dict.fromkeys(stand_in.ran)) == first


@pytest.mark.parametrize("K", [cublaslt.LONG_SUM - 1, cublaslt.LONG_SUM])
def test_no_variant_rounds_partial_sums_and_only_long_sums_are_split(stand_in, K):
    """Even if proposals did round: the variants take nothing of that."""
    stand_in.proposed = [Variant(2, 10, SPLITK_NUM=4, REDUCTION_SCHEME=4), Variant(2, 10, SPLITK_NUM=3)]
    varied(stand_in).rounding = [Variant(2, 10, SPLITK_NUM=5, REDUCTION_SCHEME=1)]
    search(SMALL._replace(K=K, a_width=K))
    variants = set(variants_run(stand_in)) - set(stand_in.proposed)
    splits = {(1, 0), (3, 2), (4, 2)} if K == cublaslt.LONG_SUM else {(1, 0)}
    assert variants == {Variant(2, tile, *split) for tile in (10, 11, 12) for split in splits}


@pytest.mark.parametrize("trouble", ["cluster", "check", "workspace", "setting", "algorithm", "none"])
def test_a_variant_that_cublaslt_refuses_is_never_run(stand_in, trouble):
    varied(stand_in).speeds[VARIANT] = 1e-6
    needed = cublaslt.WORKSPACE_BYTES + (trouble == "workspace")
    stand_in.needed = {VARIANT: needed}
    stand_in.clusters = {0, 3} if trouble == "cluster" else {2}
    stand_in.refused = {VARIANT} if trouble == "check" else set()
    stand_in.unknown = {("TILE_ID", 11)} if trouble == "setting" else set()
    stand_in.capabilities |= {3: stand_in.capabilities.pop(2)} if trouble == "algorithm" else {}
    records = [search(each) for each in (*(SMALL._replace(epilogue=name) for name in EPILOGUES), OTHER)]
    assert (VARIANT in stand_in.ran) == (trouble == "none")
    assert {record["tile_id"] for record in records} == {11 if trouble == "none" else 7}
    if trouble == "cluster":
        assert {each.CLUSTER_SHAPE_ID for each in variants_run(stand_in)} == {0, 3}


def test_an_algorithm_of_which_nothing_is_said_is_varied_in_its_clusters_alone(stand_in):
    varied(stand_in).capabilities = {2: {}}
    stand_in.clusters = {0, 2}
    search(SMALL)
    assert set(variants_run(stand_in)) == {Variant(2, 0), Variant(2, 0, CLUSTER_SHAPE_ID=0)}


def test_a_variant_that_fails_is_out_of_the_race(stand_in):
    varied(stand_in).speeds.update({VARIANT: 1e-6, Variant(2, 12): 1.5e-6})
    stand_in.failing = {VARIANT}
    record = search(SMALL)
    assert (record["tile_id"], record["us"]) == (12, 1.5)
    assert stand_in.ran.count(VARIANT) == 1
    stand_in.capabilities, stand_in.failing = {}, {3}
    with pytest.raises(stand_in.cuBLASLtError):  # what is proposed has to work
        search(SMALL)


def test_a_way_that_fails_late_loses(stand_in):
    def fails_later():
        stand_in.clock += 1
        if stand_in.clock > 12:
            raise race.FailedError

    def works():
        stand_in.clock += 1.2

    assert race.fastest([fails_later, works]) == (1, [np.inf, pytest.approx(1.2)])


def test_the_host_is_ahead_of_the_gpu_from_a_round_s_first_way_on(monkeypatch):
    """Though both have waited before, and the host is slow to begin with: else the first way seems slow."""
    now = SimpleNamespace(host=0.0, gpu=0.0, cold=True)

    def launch(host, gpu):
        now.host += host
        now.gpu = max(now.gpu, now.host) + gpu

    def way(seconds):
        launch(30 if now.cold else 2, seconds)
        now.cold = False

    def mark():
        launch(1, 0)
        return now.gpu

    def seconds_between(began, ended):
        now.host, now.cold = max(now.host, now.gpu), True
        return ended - began

    buffer = SimpleNamespace(fill=lambda value: launch(1, 6))
    monkeypatch.setattr(
        race, "cuda", SimpleNamespace(zeros=lambda *_: buffer, mark=mark, seconds_between=seconds_between)
    )
    assert race.fastest([partial(way, 10), partial(way, 10.5)]) == (0, [10, 10.5])


@pytest.mark.parametrize(("M", "count"), [(5, 100), (1_000_000, 50)])
def test_a_budget_bounds_how_many_variants_run(stand_in, monkeypatch, M, count):
    """The larger the multiply, the fewer."""
    varied(stand_in, TILE_IDS=list(range(1000)))
    monkeypatch.setattr(cublaslt, "SEARCH_SECONDS", 100.5 * race.FIRST_ROUNDS * cublaslt.PAUSE)
    operation = SMALL._replace(M=M, K=8, a_width=8, N=int(cublaslt.PAUSE * cublaslt.FLOPS / 16e6))
    library = cublaslt.library()
    proposals = library._candidates(operation, plan := library._describe(operation))
    assert len(library._variants(operation, plan, proposals)) == count
    monkeypatch.setattr(cublaslt, "CHECKS", 22)
    assert 0 < len(library._variants(operation, plan, proposals)) < 22  # of some ten clusters, one can be


def test_only_the_fastest_go_on_after_the_first_rounds(stand_in):
    tiles = list(range(10, 12 + 2 * race.MOST))
    varied(stand_in, TILE_IDS=tiles).speeds.update({Variant(2, tile): (2 - tile / 1000) * 1e-6 for tile in tiles})
    record = search(SMALL)
    runs = Counter(stand_in.ran)
    went_on = {each for each, count in runs.items() if count == race.ROUNDS}
    assert len(went_on) == race.MOST
    assert {count for each, count in runs.items() if each not in went_on} == {race.FIRST_ROUNDS}
    assert went_on == {Variant(2, tile) for tile in tiles[-race.MOST :]}
    assert 56 <= record["tile_id"]  # within TIE of the fastest
