"""engine/device/tuning.py and what is tuned by it, without a GPU: who is asked for an algorithm, and what is kept."""

import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from engine import ops
from engine.config import GPT2Config
from engine.device import cublaslt, cuda, kernels, tuning
from engine.device.kernels import BF16
from engine.models.gpt2 import GPT2
from tests import cublaslt_on_cpu
from tests.cublaslt_on_cpu import OTHER, SMALL, VARIANT, put, varied
from tests.twins import F32

CUDA = ops.load("cuda")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """With an empty cache on the disk."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path)
    return cublaslt_on_cpu.install(monkeypatch)


def silent(line):
    pytest.fail(f"said: {line}")


def nothing(line):
    """For what may be said."""


def chosen(table):
    """The algorithms' numbers, by operation."""
    return {name: record["id"] for name, record in table["algorithms"].items()}


search = partial(tuning.tune, thorough=True)


def new_process():
    """What one process knows goes; what lies on the disk stays."""
    cublaslt.library.cache_clear()


def test_the_fastest_is_chosen_and_followed(stand_in):
    stand_in.proposed, stand_in.speeds = [2, 3, 4, 5], Counter({2: 2.0, 3: 1.2, 4: 1.0, 5: 9.0})
    lines = []
    table = tuning.tune([SMALL, OTHER], {}, lines.append)
    assert chosen(table) == {"5x7x3 nt bfloat16 BIAS": 4, "7x3x5 tn float32 DEFAULT add": 4}
    assert len(lines) == 1
    assert lines[0].startswith("timed 2 kinds of matrix multiply in ")
    a, b, out, bias = put(np.ones((5, 3))), put(np.ones((7, 3))), put(np.zeros((5, 7))), put(np.zeros(7))
    stand_in.ran.clear()
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)  # made before the table is in use
    tuning.use(table)
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    cublaslt.matmul(out, a, b, transpose_b=True)  # in no table
    tuning.use({})
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    assert stand_in.ran == [2, 4, 2, 2]


def test_variants_are_timed_where_they_are_asked_for_and_for_good(stand_in):
    varied(stand_in).speeds[VARIANT] = 1e-6
    few = tuning.tune([SMALL], {}, nothing)
    assert VARIANT not in stand_in.ran
    new_process()
    many = search([SMALL], {}, nothing)  # not what the cache has
    assert [record["thorough"] for table in (few, many) for record in table["algorithms"].values()] == [False, True]
    assert VARIANT in stand_in.ran
    new_process()
    assert search([SMALL], {}, silent) == many
    assert tuning.tune([SMALL], {}, silent) == many  # there is nothing better
    assert search([SMALL], few, silent) == few  # a run keeps to its own


def test_what_was_chosen_is_kept_on_the_disk(stand_in, tmp_path):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    table = tuning.tune([SMALL], {}, nothing)
    assert json.loads(json.dumps(table)) == table
    new_process()
    stand_in.ran.clear()
    stand_in.speeds = Counter({2: 1.0, 3: 2.0})
    assert tuning.tune([SMALL], {}, silent) == table
    assert not stand_in.ran
    both = tuning.tune([SMALL, OTHER], {}, nothing)  # what is new joins what is there
    assert list(chosen(both).values()) == [3, 2]
    new_process()
    assert tuning.tune([OTHER, SMALL], {}, silent) == both
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".table"]


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "not text"])
def test_a_damaged_cache_is_timed_again(stand_in, tmp_path, damage):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    table = tuning.tune([SMALL], {}, nothing)
    (file,) = tmp_path.glob("*.table")
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:-5],
            "changed": whole.replace(b"0300", b"0200", 1),
            "emptied": b"",
            "not text": b"\xff\n\xff",
        }[damage]
    )
    assert file.read_bytes() != whole
    new_process()
    stand_in.ran.clear()
    assert tuning.tune([SMALL], {}, nothing) == table
    assert stand_in.ran
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(stand_in, monkeypatch):
    def full(path, content):
        raise OSError("no space")

    monkeypatch.setattr(tuning, "write_whole", full)
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    for _ in range(2):
        stand_in.ran.clear()
        assert set(chosen(tuning.tune([SMALL], {}, nothing)).values()) == {3}
        assert stand_in.ran


def test_a_run_s_table_wins_over_the_cache_and_leaves_it_alone(stand_in, tmp_path):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    old = tuning.tune([SMALL], {}, nothing)
    (file,) = tmp_path.glob("*.table")
    file.unlink()
    new_process()
    stand_in.speeds = Counter({2: 1.0, 3: 2.0})
    old = json.loads(json.dumps(old))
    assert list(chosen(tuning.tune([SMALL, OTHER], old, nothing)).values()) == [3, 2]  # and keeps the other's
    fresh = tuning.tune([SMALL], {}, nothing)
    assert set(chosen(fresh).values()) == {2}
    assert tuning.tune([SMALL], old, silent) == old
    assert tuning.tune([SMALL], {}, silent) == fresh


@pytest.mark.parametrize("other", ["gpu", "cublaslt", "workspace"])
def test_on_another_gpu_or_library_all_is_timed_anew_and_said(stand_in, monkeypatch, other):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    old = tuning.tune([SMALL], {}, nothing)
    new_process()
    if other == "gpu":
        monkeypatch.setattr(cuda, "describe", lambda: "another GPU")
    elif other == "cublaslt":
        stand_in.version = 130200
    else:
        old["workspace"] //= 2
    stand_in.speeds = Counter({2: 1.0, 3: 2.0})
    lines = []
    new = tuning.tune([SMALL], old, lines.append)
    assert set(chosen(new).values()) == ({3} if other == "workspace" else {2})  # of the first, the cache is still good
    assert "chosen anew, and results may differ" in lines[0]
    assert f"{other} {old[other]}" in lines[0]
    assert f"{other} {new[other]}" in lines[0]


@pytest.mark.parametrize("problem", ["refused", "workspace"])
def test_an_algorithm_that_cannot_run_here_is_not_taken(stand_in, problem):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    old = tuning.tune([SMALL], {}, nothing)
    if problem == "refused":
        stand_in.refused = {3}
    else:
        stand_in.needed = {3: cublaslt.WORKSPACE_BYTES + 1}
    stand_in.proposed = [2]
    lines = []
    assert set(chosen(tuning.tune([SMALL], old, lines.append)).values()) == {2}
    assert "the checkpoint's algorithm for 5x7x3 nt bfloat16 BIAS cannot be had here" in lines[0]


@pytest.fixture
def own(stand_in, monkeypatch):
    """A multiply of SMALL that is not cublasLt's, which takes half a second: the operands that it was given."""
    given = []

    def multiply(*operands):
        given.append(operands)
        stand_in.clock += 0.5

    monkeypatch.setattr(cublaslt, "own_multiply", lambda op: multiply if op == SMALL else None)
    return given


@pytest.mark.parametrize(("seconds", "choice"), [(1.0, cublaslt.OWN), (0.4, 2)])
def test_what_is_not_cublaslt_s_is_timed_beside_it(stand_in, own, seconds, choice):
    stand_in.proposed, stand_in.speeds = [2], Counter({2: seconds})
    table = tuning.tune([SMALL, OTHER], {}, nothing)
    record = table["algorithms"][SMALL.name]
    assert record["algo"] == choice if choice == cublaslt.OWN else record["id"] == choice
    assert (record["us"], record["first_us"]) == (1e6 * min(0.5, seconds), 1e6 * seconds)
    assert table["algorithms"][OTHER.name]["id"] == 2
    tuning.use(json.loads(json.dumps(table)))
    a, b, out, bias = put(np.ones((5, 3))), put(np.ones((7, 3))), put(np.zeros((5, 7))), put(np.zeros(7))
    stand_in.ran.clear()
    own.clear()
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    assert len(own) == (choice == cublaslt.OWN)
    assert len(stand_in.ran) == (choice != cublaslt.OWN)
    for operands in own:
        assert all(x is y for x, y in zip(operands, (out, a, b, None, bias, None), strict=True))
    first, second = cublaslt.library().contenders(SMALL, thorough=False, most=5)
    assert (first.settings == {}) == (choice == cublaslt.OWN)
    assert (second.settings == {}) == (choice != cublaslt.OWN)


def test_where_there_is_no_such_multiply_a_table_that_names_it_is_timed_anew(stand_in, own, monkeypatch):
    stand_in.proposed, stand_in.speeds = [2], Counter({2: 1.0})
    table = tuning.tune([SMALL], {}, nothing)
    assert tuning.tune([SMALL], table, silent) == table
    monkeypatch.setattr(cublaslt, "own_multiply", lambda op: None)
    lines = []
    assert set(chosen(tuning.tune([SMALL], table, lines.append)).values()) == {2}
    assert "cannot be had here" in lines[0]


@pytest.mark.parametrize("grad_dtype", [BF16, np.dtype(F32)])
@pytest.mark.parametrize("fusion", [0, 1, 2])
@pytest.mark.parametrize("accumulates", [False, True])
def test_the_multiplies_that_are_tuned_are_those_of_a_step(stand_in, monkeypatch, accumulates, fusion, grad_dtype):
    """The model's own step, with all else left out, asks for just these."""
    monkeypatch.setattr(CUDA.linear, "gelu_fusion", fusion)
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)
    monkeypatch.setattr(CUDA.linear, "gelu", SimpleNamespace(forward=lambda *_: None, backward=lambda *_: None))
    asked = set()
    monkeypatch.setattr(cublaslt.Library, "run", lambda self, operation, *_: asked.add(operation))
    left_out = SimpleNamespace(**dict.fromkeys(("forward", "backward", "forward_backward"), lambda *_, **__: None))
    operations = SimpleNamespace(**dict.fromkeys(CUDA.__all__, left_out))
    operations.linear = CUDA.linear
    config = GPT2Config(maxT=16, V=200, L=2, NH=2, C=128)
    dev = SimpleNamespace(zeros=cuda.zeros)
    model = GPT2(config, operations, dev, B=2, T=16, dtype=BF16, grad_dtype=grad_dtype)
    tokens = np.zeros((2, 16), np.int32)
    model.forward(tokens)
    for accumulate in (False, True) if accumulates else (False,):
        model.backward(tokens, tokens, 1.0, accumulate=accumulate)
    dims = config.dims() | {"B": 2, "T": 16}
    listed = CUDA.linear.multiplies(dims, grad_dtype, fusion, accumulates)
    assert len(set(listed)) == len(listed) == (18 if accumulates else 15)
    assert set(listed) == asked


DIMS = {"B": 1, "T": 4, "C": 16, "Cx": 32, "Vp": 32}


@pytest.fixture
def gelu_apart(stand_in, monkeypatch):
    """GELU apart takes 3 us in forward, and in backward."""

    def take(*_):
        stand_in.clock += 3e-6

    monkeypatch.setattr(CUDA.linear, "gelu_fusion", 0)
    monkeypatch.setattr(CUDA.linear, "gelu", SimpleNamespace(forward=take, backward=take))
    stand_in.speeds = Counter({2: 9e-6, 3: 1e-6})


def fused_takes(stand_in, forward, backward):
    """GELU in the multiply: so many us."""
    stand_in.delays = Counter({164: forward * 1e-6, 192: backward * 1e-6})


def level_of(table):
    CUDA.use_tuning(table)
    return CUDA.linear.gelu_fusion


@pytest.mark.parametrize(
    ("forward", "backward", "level"),
    [(2, 2, 2), (2, 4, 1), (1, 4.5, 1), (4, 4, 0), (4, 1, 2), (5, 2, 0), (4, 2, 0), (3, 3, 0), (2.99, 2.99, 0)],
)
def test_gelu_is_where_it_is_timed_fastest(stand_in, gelu_apart, forward, backward, level):
    """With the algorithms that were chosen. Where only backward gains, by what both take; where nothing does, apart."""
    fused_takes(stand_in, forward, backward)
    lines = []
    table = CUDA.tune(DIMS, -1, BF16, False, {}, lines.append)
    ways = {"forward": forward, "backward": backward}
    us = {name: {"apart": 4.0, "fused": pytest.approx(1 + each, abs=0.05)} for name, each in ways.items()}
    assert table["gelu_fusion"] == {"of": "4x16", "level": level, "us": us}
    assert json.loads(json.dumps(table)) == table
    assert len(lines) == 2
    assert lines[0].startswith("timed 17 kinds of matrix multiply in ")
    took = [table["gelu_fusion"]["us"][name]["fused"] for name in ("forward", "backward")]
    assert lines[1] == (
        f"timed GELU inside the matrix multiply: forward {took[0]} instead of 4.0 us, backward {took[1]} instead of "
        f"4.0 us: -ge {level}"
    )
    assert level_of(table) == level
    assert {op.name for op in CUDA.linear.multiplies(DIMS, BF16, level, False)} <= table["algorithms"].keys()


def test_where_gelu_is_comes_from_the_run_s_table_or_the_disk(stand_in, gelu_apart, tmp_path):
    fused_takes(stand_in, 2, 4)
    table = CUDA.tune(DIMS, -1, BF16, False, {}, nothing)
    new_process()
    fused_takes(stand_in, 2, 2)
    stand_in.ran.clear()
    assert CUDA.tune(DIMS, -1, BF16, False, {}, silent) == table
    before_there_was_a_choice = {key: value for key, value in table.items() if key != "gelu_fusion"}
    assert CUDA.tune(DIMS, -1, BF16, False, before_there_was_a_choice, silent) == table
    for level in (0, 1, 2):
        saved = table | {"gelu_fusion": table["gelu_fusion"] | {"level": level}}
        assert CUDA.tune(DIMS, -1, BF16, False, json.loads(json.dumps(saved)), silent) == saved
        assert level_of(saved) == level
    (file,) = tmp_path.glob("*.table")
    file.unlink()
    assert CUDA.tune(DIMS, -1, BF16, False, table, silent) == table
    assert not stand_in.ran
    lines = []
    assert level_of(CUDA.tune(DIMS, -1, BF16, False, before_there_was_a_choice, lines.append)) == 2
    assert [line.split(":")[0] for line in lines] == ["timed GELU inside the matrix multiply"]
    new_process()
    assert level_of(CUDA.tune(DIMS, -1, BF16, False, before_there_was_a_choice, silent)) == 2  # what was timed is kept


@pytest.mark.parametrize("other", ["gpu", "cublaslt", "sizes"])
def test_where_gelu_is_is_timed_anew_where_the_table_is_of_something_else(stand_in, gelu_apart, monkeypatch, other):
    fused_takes(stand_in, 2, 4)
    old = CUDA.tune(DIMS, -1, BF16, False, {}, nothing)
    new_process()
    fused_takes(stand_in, 2, 2)
    if other == "gpu":
        monkeypatch.setattr(cuda, "describe", lambda: "another GPU")
    elif other == "cublaslt":
        stand_in.version = 130200
    lines = []
    new = CUDA.tune(DIMS | {"T": 8} if other == "sizes" else DIMS, -1, BF16, False, old, lines.append)
    assert level_of(new) == 2
    assert "-ge 2" in lines[-1]
    assert ("chosen anew, and results may differ" in lines[0]) == (other != "sizes")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_is_asked_for_is_not_timed_and_wins_over_a_table(stand_in, gelu_apart, monkeypatch, level):
    fused_takes(stand_in, 2, 4)
    saved = CUDA.tune(DIMS, -1, BF16, False, {}, nothing)
    assert saved["gelu_fusion"]["level"] == 1
    monkeypatch.setattr(CUDA.linear, "gelu_fusion", level)  # as `prepare` does
    stand_in.ran.clear()
    table = CUDA.tune(DIMS, level, BF16, False, saved, silent)
    assert not stand_in.ran
    assert "gelu_fusion" not in table
    assert table["algorithms"].keys() == {op.name for op in CUDA.linear.multiplies(DIMS, BF16, level, False)}
    assert level_of(table) == level


@pytest.mark.parametrize(
    ("capability", "asked", "level"), [(80, -1, 0), (90, -1, 2), (120, -1, 2), (80, 1, 1), (90, 0, 0)]
)
def test_where_nothing_is_timed_the_gpu_s_kind_says_where_gelu_is(stand_in, monkeypatch, capability, asked, level):
    monkeypatch.setattr(CUDA.linear, "gelu_fusion", None)
    monkeypatch.setattr(CUDA.attention, "for_hopper", False)
    monkeypatch.setattr(cublaslt, "own_multiply", cublaslt.nothing_else)
    monkeypatch.setattr(CUDA.cuda, "compute_capability", lambda: capability)
    monkeypatch.setattr(CUDA.cuda, "shared_memory_limit", lambda: 163 << 10)
    monkeypatch.setattr(CUDA.kernels, "KERNELS", SimpleNamespace(load=lambda *_: None))
    monkeypatch.setattr(CUDA.scratch, "reserve", lambda nbytes: None)
    config = GPT2Config(maxT=16, V=200, L=2, NH=2, C=128)
    CUDA.prepare(config.dims() | {"B": 2, "T": 16}, asked, BF16)
    CUDA.use_tuning({})  # as --gemm-search off does
    assert CUDA.linear.gelu_fusion == level
