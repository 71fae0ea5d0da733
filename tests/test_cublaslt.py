"""engine/device/cublaslt.py without a GPU: what it tells cublasLt, carried out by a stand-in that obeys to the letter.

The stand-in reads and writes memory by the addresses, layouts and attributes it is given, column-major as cublasLt is.
So a wrong transpose, leading dimension, epilogue or addend shows here, on the CPU.
"""

import ctypes
import json
import sys
from collections import Counter, defaultdict
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from engine import ops
from engine.config import GPT2Config
from engine.device import cublaslt, race
from engine.device.kernels import BF16
from engine.models.gpt2 import GPT2
from engine.ops.numpy import gelu
from tests.twins import EPS16, F32, matmul, sum_error

CUDA = ops.load("cuda")
TYPES = {0: F32, 14: BF16}
RNG = np.random.default_rng(0)


class OnDevice(np.ndarray):
    """A numpy array that tells its address as CuPy's do."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def put(values, dtype=BF16):
    values = np.asarray(values).astype(dtype)
    raw = np.zeros(values.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    array = raw[start : start + values.nbytes].view(dtype).reshape(values.shape).view(OnDevice)
    array[...] = values
    return array


def at(address, dtype, count):
    """The memory there, as an array."""
    nbytes = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype)


EPILOGUES = {"DEFAULT": 1, "BIAS": 4, "GELU_AUX_BIAS": 164, "DGELU": 192}


class Attributes:
    """Whatever is asked for by name is its own number, or what `numbers` says."""

    def __init__(self, numbers=EPILOGUES.__getitem__):
        self._numbers = numbers

    def __getattr__(self, name):
        return name

    def __getitem__(self, name):
        return self._numbers(name)


class Variant(NamedTuple):
    """An algorithm with all that is set of it, named as cublasLt names it; by default as the stand-in's are."""

    ID: int
    TILE_ID: int
    SPLITK_NUM: int = 1
    REDUCTION_SCHEME: int = 0
    STAGES_ID: int = 0
    CUSTOM_OPTION: int = 0
    CTA_SWIZZLING: int = 0
    CLUSTER_SHAPE_ID: int = 2


class StandIn:
    """As much of nvmath.bindings.cublasLt as is called, with a clock that each algorithm takes its time by.

    It proposes the algorithms 1, which it can't do, and those of `proposed`, with those of `rounding` before them where
    partial sums need not be added in fp32; each takes the seconds in `speeds`. An algorithm is a number, of which
    nothing but itself is known, or a Variant. Those of numbers in `capabilities` can be varied, by default none.
    """

    cuBLASLtError = type("cuBLASLtError", (Exception,), {})
    MatmulAlgoConfigAttribute = Attributes(lambda name: name)

    MatmulAlgoCapAttribute = Attributes(lambda name: name)
    ClusterShape = Attributes(lambda name: {"SHAPE_AUTO": 0, "SHAPE_1x1x1": 2, "SHAPE_2x1x1": 3}.get(name, 99))
    MatmulDescAttribute, MatmulPreferenceAttribute, Epilogue = Attributes(), Attributes(), Attributes()
    ReductionScheme = MappingProxyType({"NONE": 0, "COMPUTE_TYPE": 2, "MASK": 7})
    matmul_heuristic_result_dtype = np.dtype(
        [("algo", [("data_", "<u8", (8,))]), ("workspace_size", "<u8"), ("state", "<i4")]
    )

    def __init__(self):
        self.objects = [None]
        self.plans = 0
        self.version = 130100
        self.proposed, self.rounding = [2, 3], []
        self.speeds = Counter()
        self.delays = Counter()  # more seconds, by epilogue
        self.clock = 0.0
        self.ran = []  # algorithms, in order
        self.refused = set()
        self.needed = {}  # bytes of workspace, by algorithm
        self.failing = set()  # these pass every check, and don't run
        self.capabilities = {}  # by number, then name: lists
        self.clusters = {2}  # that can be
        self.unknown = set()  # names and values that can't be set
        self.out_types = {}  # by number: of the multiply that it was last begun for

    def get_version(self):
        return self.version

    def _new(self, thing):
        self.objects.append(thing)
        return len(self.objects) - 1

    def create(self):
        return self._new("handle")

    def matmul_desc_create(self, compute_type, scale_type):
        assert (compute_type, scale_type) == (68, 0)  # fp32 sums, fp32 factors
        return self._new({})

    def matmul_desc_set_attribute(self, description, attribute, buffer, size):
        self.objects[description][attribute] = int.from_bytes(ctypes.string_at(buffer, size), "little")

    def matrix_layout_create(self, kind, rows, columns, leading):
        return self._new((TYPES[kind], rows, columns, leading))

    def matmul_preference_create(self):
        return self._new({})

    def matmul_preference_set_attribute(self, preference, attribute, buffer, size):
        self.objects[preference][attribute] = int.from_bytes(ctypes.string_at(buffer, size), "little")

    def matmul_preference_destroy(self, preference):
        assert self.objects[preference]["MAX_WORKSPACE_BYTES"] == 64 << 20

    def matmul_algo_get_heuristic(self, handle, description, a, b, c, d, preference, asked, results, count):
        found = at(results, self.matmul_heuristic_result_dtype, asked)
        reductions = self.objects[preference]["REDUCTION_SCHEME_MASK"]
        proposed = {2: self.proposed, 7: [*self.rounding, *self.proposed]}[reductions]
        n = 1 + len(proposed)
        found["state"][:n] = [15] + [0] * len(proposed)  # the first is not supported
        for record, algorithm in zip(found["algo"]["data_"], [1, *proposed], strict=False):
            record[: np.size(algorithm)] = algorithm
        at(count, np.int32, 1)[0] = n
        self.plans += 1

    @staticmethod
    def _named(algo):
        """What the tests call it."""
        found = Variant(*(int(each) for each in at(algo, np.uint64, 8)))
        return found if any(found[1:]) else found.ID

    def matmul_algo_init(self, handle, compute, scale, a, b, c, d, number, algo):
        assert (compute, scale, a, b) == (68, 0, 14, 14)
        assert c == d
        if number not in self.capabilities:
            raise self.cuBLASLtError
        at(algo, np.uint64, 8)[:] = [number] + [0] * 7
        self.out_types[number] = TYPES[d]

    def matmul_algo_cap_get_attribute(self, algo, attribute, buffer, size, written):
        known = self.capabilities[self._named(algo)]
        if attribute not in known:
            raise self.cuBLASLtError
        values = np.array(known[attribute], np.int32)
        assert size >= values.nbytes
        at(buffer, np.int32, len(values))[:] = values
        at(written, np.uint64, 1)[0] = values.nbytes

    def matmul_algo_config_set_attribute(self, algo, attribute, buffer, size):
        dtype = self.get_matmul_algo_config_attribute_dtype(attribute)
        assert size == np.dtype(dtype).itemsize
        value = int(at(buffer, dtype, 1)[0])
        if (attribute, value) in self.unknown:
            raise self.cuBLASLtError
        at(algo, np.uint64, 8)[Variant._fields.index(attribute)] = value

    def matmul_algo_check(self, handle, description, a, b, c, d, algo, result):
        told, named = self.objects[description], self._named(algo)
        assert told["EPILOGUE"] not in (4, 164) or told["BIAS_POINTER"] % 16 == 0
        assert told["EPILOGUE"] not in (164, 192) or told["EPILOGUE_AUX_POINTER"] % 16 == 0
        if named in self.refused:
            raise self.cuBLASLtError
        if isinstance(named, Variant):
            assert self.objects[d][0] == self.out_types[named.ID]
            if named.CLUSTER_SHAPE_ID not in self.clusters:
                raise self.cuBLASLtError
        at(result, self.matmul_heuristic_result_dtype, 1)["workspace_size"] = self.needed.get(named, 0)

    def get_matmul_algo_config_attribute_dtype(self, attribute):
        return {"CLUSTER_SHAPE_ID": np.uint16}.get(attribute, np.uint32)

    def matmul_algo_config_get_attribute(self, algo, attribute, buffer, size, written):
        assert size == np.dtype(self.get_matmul_algo_config_attribute_dtype(attribute)).itemsize
        named = self._named(algo)
        known = named._asdict() if isinstance(named, Variant) else {"ID": named}
        at(buffer, self.get_matmul_algo_config_attribute_dtype(attribute), 1)[0] = known.get(attribute, 7)

    def matmul(self, handle, description, alpha, a, la, b, lb, beta, c, lc, d, ld, algo, workspace, nbytes, stream):
        told = self.objects[description]
        self.ran.append(self._named(algo))
        if self.ran[-1] in self.failing:
            raise self.cuBLASLtError
        self.clock += self.speeds[self.ran[-1]] + self.delays[told["EPILOGUE"]]
        assert at(alpha, F32, 1)[0] == 1
        x = self._matrix(a, la).astype(F32)
        y = self._matrix(b, lb).astype(F32)
        out, addend = self._matrix(d, ld), self._matrix(c, lc).astype(F32)
        total = (x.T if told["TRANSA"] else x) @ (y.T if told["TRANSB"] else y)
        if at(beta, F32, 1)[0] != 0:  # what lies there is not read, not even a NaN
            total += at(beta, F32, 1)[0] * addend
        epilogue = told["EPILOGUE"]
        if epilogue in (4, 164):
            assert told["BIAS_DATA_TYPE"] == 14
            total += at(told["BIAS_POINTER"], BF16, len(total)).astype(F32)[:, None]  # of the rows, here
        if epilogue in (164, 192):
            aux = (
                at(told["EPILOGUE_AUX_POINTER"], BF16, total.size)
                .reshape(-1, told["EPILOGUE_AUX_LD"])[:, : len(total)]
                .T
            )
        if epilogue == 164:
            aux[...] = total
            gelu.forward(total, np.ascontiguousarray(total))
        if epilogue == 192:
            total = np.ascontiguousarray(total)
            gelu.backward(total, np.ascontiguousarray(aux.astype(F32)))
        out[...] = total

    def _matrix(self, address, layout):
        dtype, rows, columns, leading = self.objects[layout]
        return at(address, dtype, leading * columns).reshape(columns, leading)[:, :rows].T


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    found = StandIn()
    monkeypatch.setattr(cublaslt, "_bindings", lambda: found)
    monkeypatch.setattr(cublaslt.cuda, "zeros", lambda shape, dtype: put(np.zeros(shape), dtype))
    monkeypatch.setattr(cublaslt.cuda, "to_device", lambda host: host)
    monkeypatch.setattr(cublaslt.cuda, "describe", lambda: "a GPU")
    monkeypatch.setattr(cublaslt.cuda, "mark", lambda: found.clock)
    monkeypatch.setattr(cublaslt.cuda, "seconds_between", lambda began, ended: ended - began)
    monkeypatch.setattr(race, "FLUSH_BYTES", 64)
    monkeypatch.setattr(cublaslt, "cache_dir", lambda: tmp_path)
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0)),
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cublaslt._library.cache_clear()
    yield found
    cublaslt._library.cache_clear()


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


SMALL = cublaslt.Operation(5, 7, 3, False, True, BF16, False, "BIAS")
OTHER = cublaslt.Operation(7, 3, 5, True, False, F32, True, "DEFAULT")


def silent(line):
    pytest.fail(f"said: {line}")


def nothing(line):
    """For what may be said."""


def chosen(table):
    """The algorithms' numbers, by operation."""
    return {name: record["id"] for name, record in table["algorithms"].items()}


search = partial(cublaslt.tune, thorough=True)


def new_process():
    """What one process knows goes; what lies on the disk stays."""
    cublaslt._library.cache_clear()


def test_the_fastest_is_chosen_and_followed(stand_in):
    stand_in.proposed, stand_in.speeds = [2, 3, 4, 5], Counter({2: 2.0, 3: 1.2, 4: 1.0, 5: 9.0})
    lines = []
    table = cublaslt.tune([SMALL, OTHER], {}, lines.append)
    assert chosen(table) == {"5x7x3 nt bfloat16 BIAS": 4, "7x3x5 tn float32 DEFAULT add": 4}
    assert len(lines) == 1
    assert lines[0].startswith("timed 2 kinds of matrix multiply in ")
    a, b, out, bias = put(np.ones((5, 3))), put(np.ones((7, 3))), put(np.zeros((5, 7))), put(np.zeros(7))
    stand_in.ran.clear()
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)  # made before the table is in use
    cublaslt.use(table)
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    cublaslt.matmul(out, a, b, transpose_b=True)  # in no table
    cublaslt.use({})
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    assert stand_in.ran == [2, 4, 2, 2]


def test_what_rounds_partial_sums_is_never_chosen_but_can_be_timed(stand_in):
    stand_in.rounding, stand_in.speeds = [8, 9], Counter({2: 2e-6, 3: 1.5e-6, 8: 3e-6, 9: 1e-6})
    table = cublaslt.tune([SMALL], {}, nothing)
    assert set(chosen(table).values()) == {3}
    assert {8, 9}.isdisjoint(stand_in.ran)
    stand_in.ran.clear()
    assert cublaslt.fastest_by_reduction(SMALL) == pytest.approx((1.5, 1.0))
    assert stand_in.ran[:4] == [2, 3, 8, 9]  # in turns, each once
    stand_in.rounding = []
    assert cublaslt.fastest_by_reduction(SMALL) == pytest.approx((1.5, 1.5))


def test_all_run_in_turns_until_the_slow_ones_are_dropped(stand_in):
    stand_in.proposed, stand_in.speeds = [2, 3, 4], Counter({2: 1.0, 3: 9.0, 4: 0.9})
    cublaslt.tune([SMALL], {}, nothing)
    assert stand_in.ran == [2, 3, 4] * race.FIRST_ROUNDS + [2, 4] * (race.ROUNDS - race.FIRST_ROUNDS)


@pytest.mark.parametrize("trouble", ["falling clock", "hiccup"])
def test_a_clock_that_falls_or_a_hiccup_does_not_change_the_choice(stand_in, monkeypatch, trouble):
    """Each round is slower than the one before by more than the algorithms differ; or one time is far off."""
    stand_in.proposed, stand_in.speeds = [2, 3], Counter({2: 1.05, 3: 1.0})
    measured = iter(range(100))

    def seconds_between(began, ended):
        n = next(measured)
        return (ended - began) * 1.1 ** (n // 2) if trouble == "falling clock" else ended - began + 50.0 * (n == 3)

    monkeypatch.setattr(cublaslt.cuda, "seconds_between", seconds_between)
    assert set(chosen(cublaslt.tune([SMALL], {}, nothing)).values()) == {3}


@pytest.mark.parametrize(("first", "choice"), [(1.009, 2), (1.011, 3)])
def test_of_equally_fast_ones_the_library_s_order_decides(stand_in, first, choice):
    stand_in.proposed, stand_in.speeds = [2, 3, 4], Counter({2: first, 3: 1.0, 4: 1.0})
    assert set(chosen(cublaslt.tune([SMALL], {}, nothing)).values()) == {choice}


def test_a_table_tells_people_what_was_chosen_and_what_it_gains(stand_in):
    stand_in.proposed, stand_in.speeds = [2, 3, 4], Counter({2: 9e-6, 3: 2e-6, 4: 3e-6})
    (record,) = cublaslt.tune([SMALL], {}, nothing)["algorithms"].values()
    assert bytes.fromhex(record.pop("algo")) == np.array([3] + [0] * 7, np.uint64).tobytes()
    assert (record.pop("id"), record.pop("us"), record.pop("first_us"), record.pop("thorough")) == (3, 2.0, 9.0, False)
    assert record == dict.fromkeys(("tile_id", "stages_id", "splitk_num", "reduction_scheme", "cluster_shape_id"), 7)


VARIANT = Variant(2, TILE_ID=11)


def varied(stand_in, **capabilities):
    """The stand-in with 2 and 3 proposed, which take 2 us, and 2 to be had with other tiles, which take 3."""
    stand_in.speeds = defaultdict(lambda: 3e-6, {2: 2e-6, 3: 2e-6})
    stand_in.capabilities = {2: {"TILE_IDS": [10, 11, 12]} | capabilities}
    return stand_in


def variants_run(stand_in):
    """In the order of their first run."""
    return [each for each in dict.fromkeys(stand_in.ran) if isinstance(each, Variant)]


def test_a_variant_faster_than_every_proposal_is_chosen_and_followed(stand_in):
    varied(stand_in).speeds[VARIANT] = 1.5e-6
    table = search([SMALL, OTHER], {}, nothing)
    for record in table["algorithms"].values():
        assert (record["id"], record["tile_id"], record["us"], record["first_us"]) == (2, 11, 1.5, 2.0)
    stand_in.ran.clear()
    cublaslt.use(json.loads(json.dumps(table)))
    out, a, b, bias = put(np.zeros((5, 7))), put(np.ones((5, 3))), put(np.ones((7, 3))), put(np.zeros(7))
    cublaslt.matmul(out, a, b, transpose_b=True, bias=bias)
    assert stand_in.ran == [VARIANT]


@pytest.mark.parametrize(("seconds", "choice"), [(1.99e-6, 2), (1.97e-6, VARIANT)])
def test_a_proposal_wins_a_tie_with_variants(stand_in, seconds, choice):
    """Even with more of them than stay in the race."""
    tiles = list(range(10, 11 + 2 * race.MOST))
    varied(stand_in, TILE_IDS=tiles).speeds.update({Variant(2, tile): seconds for tile in tiles})
    (record,) = search([SMALL], {}, nothing)["algorithms"].values()
    assert (record["tile_id"] == 7) == (choice == 2)
    assert record["first_us"] == 2.0


def test_proposals_run_first_then_variants_of_their_tiles_then_the_rest_the_same_way_each_time(stand_in):
    tiles = list(range(10, 30))
    varied(stand_in, TILE_IDS=tiles, CUSTOM_OPTION_MAX=[2], CTA_SWIZZLING_SUPPORT=[1], STAGES_IDS=[4, 5])
    proposed = Variant(2, 25), Variant(2, 26, STAGES_ID=5)
    stand_in.proposed = [proposed[0], 3, proposed[1]]
    search([SMALL], {}, nothing)
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
        cublaslt._library().fastest(operation, True)
        assert list(dict.fromkeys(stand_in.ran)) == first


@pytest.mark.parametrize("K", [cublaslt.LONG_SUM - 1, cublaslt.LONG_SUM])
def test_no_variant_rounds_partial_sums_and_only_long_sums_are_split(stand_in, K):
    """Even if proposals did round: the variants take nothing of that."""
    stand_in.proposed = [Variant(2, 10, SPLITK_NUM=4, REDUCTION_SCHEME=4), Variant(2, 10, SPLITK_NUM=3)]
    varied(stand_in).rounding = [Variant(2, 10, SPLITK_NUM=5, REDUCTION_SCHEME=1)]
    search([SMALL._replace(K=K)], {}, nothing)
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
    cases = [SMALL._replace(epilogue=name) for name in EPILOGUES]
    table = search([*cases, OTHER], {}, nothing)
    assert (VARIANT in stand_in.ran) == (trouble == "none")
    assert {record["tile_id"] for record in table["algorithms"].values()} == {11 if trouble == "none" else 7}
    if trouble == "cluster":
        assert {each.CLUSTER_SHAPE_ID for each in variants_run(stand_in)} == {0, 3}


def test_an_algorithm_of_which_nothing_is_said_is_varied_in_its_clusters_alone(stand_in):
    varied(stand_in).capabilities = {2: {}}
    stand_in.clusters = {0, 2}
    search([SMALL], {}, nothing)
    assert set(variants_run(stand_in)) == {Variant(2, 0), Variant(2, 0, CLUSTER_SHAPE_ID=0)}


def test_a_variant_that_fails_is_out_of_the_race(stand_in):
    varied(stand_in).speeds.update({VARIANT: 1e-6, Variant(2, 12): 1.5e-6})
    stand_in.failing = {VARIANT}
    (record,) = search([SMALL], {}, nothing)["algorithms"].values()
    assert (record["tile_id"], record["us"]) == (12, 1.5)
    assert stand_in.ran.count(VARIANT) == 1
    new_process()
    stand_in.capabilities, stand_in.failing = {}, {3}
    with pytest.raises(stand_in.cuBLASLtError):  # what is proposed has to work
        cublaslt._library().fastest(SMALL, True)


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
    operation = SMALL._replace(M=M, K=8, N=int(cublaslt.PAUSE * cublaslt.FLOPS / 16e6))
    library = cublaslt._library()
    proposals = library._candidates(operation, plan := library._describe(operation))
    assert len(library._variants(operation, plan, proposals)) == count
    monkeypatch.setattr(cublaslt, "CHECKS", 22)
    assert 0 < len(library._variants(operation, plan, proposals)) < 22  # of some ten clusters, one can be


def test_only_the_fastest_go_on_after_the_first_rounds(stand_in):
    tiles = list(range(10, 12 + 2 * race.MOST))
    varied(stand_in, TILE_IDS=tiles).speeds.update({Variant(2, tile): (2 - tile / 1000) * 1e-6 for tile in tiles})
    (record,) = search([SMALL], {}, nothing)["algorithms"].values()
    runs = Counter(stand_in.ran)
    went_on = {each for each, count in runs.items() if count == race.ROUNDS}
    assert len(went_on) == race.MOST
    assert {count for each, count in runs.items() if each not in went_on} == {race.FIRST_ROUNDS}
    assert went_on == {Variant(2, tile) for tile in tiles[-race.MOST :]}
    assert 56 <= record["tile_id"]  # within TIE of the fastest


def test_variants_are_timed_where_they_are_asked_for_and_for_good(stand_in):
    varied(stand_in).speeds[VARIANT] = 1e-6
    few = cublaslt.tune([SMALL], {}, nothing)
    assert VARIANT not in stand_in.ran
    new_process()
    many = search([SMALL], {}, nothing)  # not what the cache has
    assert [record["thorough"] for table in (few, many) for record in table["algorithms"].values()] == [False, True]
    assert VARIANT in stand_in.ran
    new_process()
    assert search([SMALL], {}, silent) == many
    assert cublaslt.tune([SMALL], {}, silent) == many  # there is nothing better
    assert search([SMALL], few, silent) == few  # a run keeps to its own


def test_what_was_chosen_is_kept_on_the_disk(stand_in, tmp_path):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    table = cublaslt.tune([SMALL], {}, nothing)
    assert json.loads(json.dumps(table)) == table
    new_process()
    stand_in.ran.clear()
    stand_in.speeds = Counter({2: 1.0, 3: 2.0})
    assert cublaslt.tune([SMALL], {}, silent) == table
    assert not stand_in.ran
    both = cublaslt.tune([SMALL, OTHER], {}, nothing)  # what is new joins what is there
    assert list(chosen(both).values()) == [3, 2]
    new_process()
    assert cublaslt.tune([OTHER, SMALL], {}, silent) == both
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".table"]


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "not text"])
def test_a_damaged_cache_is_timed_again(stand_in, tmp_path, damage):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    table = cublaslt.tune([SMALL], {}, nothing)
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
    assert cublaslt.tune([SMALL], {}, nothing) == table
    assert stand_in.ran
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(stand_in, monkeypatch):
    def full(path, content):
        raise OSError("no space")

    monkeypatch.setattr(cublaslt, "write_whole", full)
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    for _ in range(2):
        stand_in.ran.clear()
        assert set(chosen(cublaslt.tune([SMALL], {}, nothing)).values()) == {3}
        assert stand_in.ran


def test_a_run_s_table_wins_over_the_cache_and_leaves_it_alone(stand_in, tmp_path):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    old = cublaslt.tune([SMALL], {}, nothing)
    (file,) = tmp_path.glob("*.table")
    file.unlink()
    new_process()
    stand_in.speeds = Counter({2: 1.0, 3: 2.0})
    old = json.loads(json.dumps(old))
    assert list(chosen(cublaslt.tune([SMALL, OTHER], old, nothing)).values()) == [3, 2]  # and keeps the other's
    fresh = cublaslt.tune([SMALL], {}, nothing)
    assert set(chosen(fresh).values()) == {2}
    assert cublaslt.tune([SMALL], old, silent) == old
    assert cublaslt.tune([SMALL], {}, silent) == fresh


@pytest.mark.parametrize("other", ["gpu", "cublaslt", "workspace"])
def test_on_another_gpu_or_library_all_is_timed_anew_and_said(stand_in, monkeypatch, other):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    old = cublaslt.tune([SMALL], {}, nothing)
    new_process()
    if other == "gpu":
        monkeypatch.setattr(cublaslt.cuda, "describe", lambda: "another GPU")
    elif other == "cublaslt":
        stand_in.version = 130200
    else:
        old["workspace"] //= 2
    stand_in.speeds = Counter({2: 1.0, 3: 2.0})
    lines = []
    new = cublaslt.tune([SMALL], old, lines.append)
    assert set(chosen(new).values()) == ({3} if other == "workspace" else {2})  # of the first, the cache is still good
    assert "chosen anew, and results may differ" in lines[0]
    assert f"{other} {old[other]}" in lines[0]
    assert f"{other} {new[other]}" in lines[0]


@pytest.mark.parametrize("problem", ["refused", "workspace"])
def test_an_algorithm_that_cannot_run_here_is_not_taken(stand_in, problem):
    stand_in.speeds = Counter({2: 2.0, 3: 1.0})
    old = cublaslt.tune([SMALL], {}, nothing)
    if problem == "refused":
        stand_in.refused = {3}
    else:
        stand_in.needed = {3: cublaslt.WORKSPACE_BYTES + 1}
    stand_in.proposed = [2]
    lines = []
    assert set(chosen(cublaslt.tune([SMALL], old, lines.append)).values()) == {2}
    assert "cublasLt refuses the checkpoint's algorithm for 5x7x3 nt bfloat16 BIAS" in lines[0]


def test_what_is_timed_leaves_no_trace_in_what_is_computed(stand_in):
    """Every epilogue can be raced; operands of a race are its own."""
    cases = [SMALL._replace(epilogue=name, add=add) for name in EPILOGUES for add in (False, True)]
    table = cublaslt.tune(cases, {}, nothing)
    assert len(table["algorithms"]) == len(cases)


@pytest.mark.parametrize("grad_dtype", [BF16, np.dtype(F32)])
@pytest.mark.parametrize("fusion", [0, 1, 2])
@pytest.mark.parametrize("accumulates", [False, True])
def test_the_multiplies_that_are_tuned_are_those_of_a_step(stand_in, monkeypatch, accumulates, fusion, grad_dtype):
    """The model's own step, with all else left out, asks for just these."""
    monkeypatch.setattr(CUDA.linear, "gelu_fusion", fusion)
    monkeypatch.setattr(CUDA.linear, "column_sums", SimpleNamespace(add=lambda *_, **__: None))
    monkeypatch.setattr(CUDA.linear, "gelu", SimpleNamespace(forward=lambda *_: None, backward=lambda *_: None))
    asked = set()
    monkeypatch.setattr(cublaslt._Library, "run", lambda self, operation, *_: asked.add(operation))
    left_out = SimpleNamespace(**dict.fromkeys(("forward", "backward", "forward_backward"), lambda *_, **__: None))
    operations = SimpleNamespace(**dict.fromkeys(CUDA.__all__, left_out))
    operations.linear = CUDA.linear
    config = GPT2Config(maxT=16, V=200, L=2, NH=2, C=128)
    dev = SimpleNamespace(zeros=cublaslt.cuda.zeros)
    model = GPT2(config, operations, dev, B=2, T=16, dtype=BF16, grad_dtype=grad_dtype)
    tokens = np.zeros((2, 16), np.int32)
    model.forward(tokens)
    for accumulate in (False, True) if accumulates else (False,):
        model.backward(tokens, tokens, 1.0, accumulate=accumulate)
    dims = config.dims() | {"B": 2, "T": 16}
    listed = CUDA.linear.multiplies(dims, grad_dtype, fusion, accumulates)
    assert len(set(listed)) == len(listed) == (20 if accumulates else 15)
    assert set(listed) == asked


DIMS = {"B": 1, "T": 4, "C": 16, "Vp": 32}


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
        monkeypatch.setattr(cublaslt.cuda, "describe", lambda: "another GPU")
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
    monkeypatch.setattr(CUDA.cuda, "compute_capability", lambda: capability)
    monkeypatch.setattr(CUDA.cuda, "shared_memory_limit", lambda: 163 << 10)
    monkeypatch.setattr(CUDA.kernels, "KERNELS", SimpleNamespace(load=lambda *_: None))
    monkeypatch.setattr(CUDA.scratch, "reserve", lambda nbytes: None)
    config = GPT2Config(maxT=16, V=200, L=2, NH=2, C=128)
    CUDA.prepare(config.dims() | {"B": 2, "T": 16}, asked, BF16)
    CUDA.use_tuning({})  # as --gemm-search off does
    assert CUDA.linear.gelu_fusion == level
