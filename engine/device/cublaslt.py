"""Matrix multiplies by cublasLt, through nvmath-python's bindings (CuPy has none): the only module that knows them.

Operands are row-major, as everywhere else; cublasLt's are column-major. A row-major (M,N) is a column-major (N,M), so
out = a b is asked for as out^T = b^T a^T: the operands change places, and no data moves.

Many algorithms can do a multiply, each with sums in its own order: which one is taken decides the last bits. It is
cublasLt's first proposal, unless `Library.use` has named another. `Library.fastest` times the proposals, or these and
variants of them, and beside them what `own_multiply` gives; tuning.py decides when, and remembers what was found.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from engine.device import cuda, race
from engine.device.kernels import BF16

Array = Any

WORKSPACE_BYTES = 64 << 20  # twice what NVIDIA advises for Hopper: more ways to split a sum can be tried

# Numbers of cublasLt's C interface that the bindings do not name.
COMPUTE_32F = 68
CUDA_TYPES = {np.dtype(np.float32): 0, BF16: 14}

WITH_BIAS, WITH_AUX = ("BIAS", "GELU_AUX_BIAS"), ("DGELU", "GELU_AUX_BIAS")  # epilogues
CANDIDATES = 32  # proposals that cublasLt is asked for
ALIGNMENT = 256  # bytes: what cublasLt chooses algorithms for unless it is told

# What a variant sets of an algorithm, in the order that `_variants` gives the values in.
SETTINGS = ("TILE_ID", "STAGES_ID", "CUSTOM_OPTION", "CTA_SWIZZLING", "CLUSTER_SHAPE_ID", "SPLITK_NUM")
CLUSTERS = ("AUTO", "1x1x1", "2x1x1", "1x2x1", "2x2x1", "4x1x1", "1x4x1", "4x2x1", "2x4x1", "8x1x1", "1x8x1")
LONG_SUM = 8192  # from this K on, variants too split it
CHECKS = 20_000  # variants that cublasLt is asked about at most, for each multiply: 0.06 ms each
SEARCH_SECONDS = 0.5  # that the variants of a multiply may take in the rounds that all run in
FLOPS, PAUSE = 5e14, 2e-4  # roughly, of a fast multiply in a second, and the seconds between two that are timed


OWN = "own"  # what tables call the algorithm that is not cublasLt's


class Operation(NamedTuple):
    """Everything about a multiply but where its operands lie: what a plan is made for."""

    M: int
    N: int
    K: int
    transpose_a: bool
    transpose_b: bool
    dtype: np.dtype  # of out and of what is added to it; a and b are bf16
    add: bool
    epilogue: str  # the name of one of cublasLt's
    a_width: int  # elements from a row of a to the next: more than it has columns, if a is a part of a wider array

    @property
    def a_shape(self) -> tuple[int, int]:
        """As a lies in memory."""
        return (self.K, self.M) if self.transpose_a else (self.M, self.K)

    @property
    def name(self) -> str:
        """As tables call it: "512x2304x768 nt bfloat16 BIAS add"; with " of 784" if a's rows are so wide."""
        transposes = "".join("nt"[transposed] for transposed in (self.transpose_a, self.transpose_b))
        wider = f" of {self.a_width}" * (self.a_width > self.a_shape[1])
        return f"{self.M}x{self.N}x{self.K} {transposes} {self.dtype} {self.epilogue}" + " add" * self.add + wider


# A multiply: of out, a, b, and what it needs of add, bias and the epilogue's other array, None for what it does not.
Multiply = Callable[[Array, Array, Array, Array, Array, Array], None]


def nothing_else(operation: Operation) -> None:
    """There is cublasLt alone."""


# For an operation, if there is one, a multiply that is not cublasLt's.
own_multiply: Callable[[Operation], Multiply | None] = nothing_else


class Plan(NamedTuple):
    """cublasLt's descriptors and the algorithm chosen."""

    description: int
    a: int
    b: int
    out: int
    algorithm: Any  # a numpy record, whose address cublasLt takes; None until one is chosen


class Contender(NamedTuple):
    """An algorithm that can do a multiply."""

    settings: dict[str, int]
    seconds: float  # its median in a race
    again: Callable[[], None]


def matmul(
    out: Array,
    a: Array,
    b: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    add: Array | None = None,
    bias: Array | None = None,
    pre_gelu: Array | None = None,
    dgelu: Array | None = None,
) -> None:
    """out (M,N) = a (M,K) b (K,N) + add (M,N) + bias (N), summed in fp32.

    cublasLt may round the product to out's dtype before it adds `add`, and again afterwards: seen on an H100 where out
    is bf16 and there is no bias. What is not cublasLt's may do so anywhere, and before GELU. a and b are bf16, as is
    all else but out and add, which may be fp32, and may be the same array. transpose_a: a is (K,M); transpose_b: b is
    (N,K). a may be the first columns of a wider array. With pre_gelu (M,N) =, which takes the sum, out is its GELU.
    With dgelu (M,N), out is the product times gelu'(dgelu).
    """
    (M, N), K = out.shape, a.shape[0] if transpose_a else a.shape[1]
    assert a.shape == ((K, M) if transpose_a else (M, K)), (a.shape, out.shape)
    assert b.shape == ((N, K) if transpose_b else (K, N)), (b.shape, out.shape)
    assert a.dtype == b.dtype == BF16
    for other in (add, pre_gelu, dgelu):
        assert other is None or other.shape == out.shape
    a_width = a.strides[0] // a.itemsize
    assert a.strides[1] == a.itemsize
    for array in (out, b, add, bias, pre_gelu, dgelu):
        assert array is None or array.flags.c_contiguous
    for array in (out, a, b, add, bias, pre_gelu, dgelu):
        assert array is None or array.data.ptr % ALIGNMENT == 0
    assert pre_gelu is None or bias is not None, "cublasLt's GELU comes with a bias"
    epilogue = ((pre_gelu, "GELU_AUX_BIAS"), (dgelu, "DGELU"), (bias, "BIAS"))
    name = next((name for array, name in epilogue if array is not None), "DEFAULT")
    operation = Operation(M, N, K, transpose_a, transpose_b, np.dtype(out.dtype), add is not None, name, a_width)
    library().run(operation, out, a, b, add, bias, dgelu if pre_gelu is None else pre_gelu)


@cache
def library() -> "Library":
    """cublasLt, opened once."""
    return Library()


class Library:
    """cublasLt on the current GPU: its handle, its workspace, and the plans made so far."""

    def __init__(self) -> None:
        import cupy
        from nvmath.bindings import cublasLt

        self._lt: Any = cublasLt
        self._cupy = cupy
        self._handle = self._lt.create()
        self._workspace = cuda.zeros((WORKSPACE_BYTES,), np.uint8)
        self._described: dict[Operation, Plan] = {}
        self._in_use: dict[Operation, Multiply] = {}
        self._chosen: dict[str, str] = {}
        self._one, self._zero, self._pointer = np.ones(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.uint64)

    def identity(self) -> dict[str, Any]:
        """What algorithms and their times are good for."""
        return {"gpu": cuda.describe(), "cublaslt": int(self._lt.get_version()), "workspace": WORKSPACE_BYTES}

    def use(self, chosen: dict[str, str]) -> None:
        """From now on multiplies follow these algorithms, in hexadecimal digits or OWN, by the names of their
        operations.
        """
        self._chosen = chosen
        self._in_use.clear()

    def run(self, operation: Operation, out: Array, a: Array, b: Array, add: Array, bias: Array, aux: Array) -> None:
        """As a Multiply."""
        multiply = self._in_use.get(operation) or self._in_use.setdefault(operation, self._multiply(operation))
        multiply(out, a, b, add, bias, aux)

    def _launch(self, plan: Plan, out: Array, a: Array, b: Array, add: Array, bias: Array, aux: Array) -> None:
        attributes = self._lt.MatmulDescAttribute
        if bias is not None:
            self._set(plan.description, attributes.BIAS_POINTER, bias.data.ptr)
        if aux is not None:
            self._set(plan.description, attributes.EPILOGUE_AUX_POINTER, aux.data.ptr)
        self._lt.matmul(
            self._handle,
            plan.description,
            self._one.ctypes.data,
            b.data.ptr,
            plan.b,
            a.data.ptr,
            plan.a,
            (self._zero if add is None else self._one).ctypes.data,
            (out if add is None else add).data.ptr,
            plan.out,
            out.data.ptr,
            plan.out,
            plan.algorithm.ctypes.data,
            self._workspace.data.ptr,
            WORKSPACE_BYTES,
            self._cupy.cuda.get_current_stream().ptr,
        )

    def _set(self, description: int, attribute: int, address: int) -> None:
        self._pointer[0] = address
        self._lt.matmul_desc_set_attribute(description, attribute, self._pointer.ctypes.data, 8)

    def _multiply(self, op: Operation) -> Multiply:
        """By the algorithm that was chosen."""
        chosen = self._chosen.get(op.name)
        if chosen == OWN:
            multiply = own_multiply(op)
            assert multiply, f"{op.name}: no table that is in use says so"
            return multiply
        plan = self._describe(op)
        algorithm = self._algorithm(chosen) if chosen else self._candidates(op, plan)[0]
        return partial(self._launch, plan._replace(algorithm=algorithm))

    def _describe(self, op: Operation) -> Plan:
        """The plan without an algorithm, made once."""
        if op not in self._described:
            self._described[op] = self._make_descriptors(op)
        return self._described[op]

    def _make_descriptors(self, op: Operation) -> Plan:
        lt, attributes = self._lt, self._lt.MatmulDescAttribute
        description = lt.matmul_desc_create(COMPUTE_32F, CUDA_TYPES[np.dtype(np.float32)])

        def describe(attribute: int, value: int, dtype: type) -> None:
            buffer: np.ndarray = np.array([value], dtype)
            lt.matmul_desc_set_attribute(description, attribute, buffer.ctypes.data, buffer.nbytes)

        # Column-major, a row-major matrix is its transpose already: so `transposed` is where ours is not.
        describe(attributes.TRANSA, op.transpose_b, np.int32)
        describe(attributes.TRANSB, op.transpose_a, np.int32)
        describe(attributes.EPILOGUE, lt.Epilogue[op.epilogue], np.uint32)
        if op.epilogue in WITH_BIAS:
            describe(attributes.BIAS_DATA_TYPE, CUDA_TYPES[BF16], np.int32)
        if op.epilogue in WITH_AUX:
            describe(attributes.EPILOGUE_AUX_LD, op.N, np.int64)

        a_rows, a_columns = op.a_shape
        b_rows, b_columns = (op.N, op.K) if op.transpose_b else (op.K, op.N)
        a = lt.matrix_layout_create(CUDA_TYPES[BF16], a_columns, a_rows, op.a_width)
        b = lt.matrix_layout_create(CUDA_TYPES[BF16], b_columns, b_rows, b_columns)
        out = lt.matrix_layout_create(CUDA_TYPES[op.dtype], op.N, op.M, op.N)
        return Plan(description, a, b, out, None)

    def accepts(self, op: Operation, chosen: str) -> bool:
        """Whether it can be done with this algorithm: its digits or OWN."""
        if chosen == OWN:
            return own_multiply(op) is not None
        return self._can_run(op, self._describe(op), self._algorithm(chosen))

    def _can_run(self, op: Operation, plan: Plan, algorithm: Any) -> bool:
        lt, attributes = self._lt, self._lt.MatmulDescAttribute
        for attribute, epilogues in ((attributes.BIAS_POINTER, WITH_BIAS), (attributes.EPILOGUE_AUX_POINTER, WITH_AUX)):
            if op.epilogue in epilogues:  # any address will do, until there is one to compute with
                self._set(plan.description, attribute, self._workspace.data.ptr)
        result = np.zeros(1, lt.matmul_heuristic_result_dtype)
        operands = plan.description, plan.b, plan.a, plan.out, plan.out
        try:
            lt.matmul_algo_check(self._handle, *operands, algorithm.ctypes.data, result.ctypes.data)
        except lt.cuBLASLtError:
            return False
        return bool(result["workspace_size"][0] <= WORKSPACE_BYTES)

    def _algorithm(self, digits: str) -> Any:
        """What `fastest` gave as digits."""
        return np.frombuffer(bytes.fromhex(digits), self._lt.matmul_heuristic_result_dtype["algo"]).copy()

    def _settings(self, algorithm: Any) -> dict[str, int]:
        """What it is, as far as tables tell and variants begin from."""
        lt, found = self._lt, {}
        for name in ("ID", "TILE_ID", "STAGES_ID", "SPLITK_NUM", "REDUCTION_SCHEME", "CLUSTER_SHAPE_ID"):
            attribute, written = lt.MatmulAlgoConfigAttribute[name], np.zeros(1, np.uint64)
            value = np.zeros(1, lt.get_matmul_algo_config_attribute_dtype(attribute))
            lt.matmul_algo_config_get_attribute(
                algorithm.ctypes.data, attribute, value.ctypes.data, value.nbytes, written.ctypes.data
            )
            found[name.lower()] = int(value[0])
        return found

    def _candidates(self, op: Operation, plan: Plan, reductions: str = "COMPUTE_TYPE") -> list[Any]:
        """cublasLt's proposals, by its own estimate the fastest first. reductions: how partial sums of split products
        may be kept and added: in fp32, or "MASK", any way, in the type of out too.
        """
        lt, description, a, b, out, _ = self._lt, *plan
        preference, preferences = lt.matmul_preference_create(), lt.MatmulPreferenceAttribute
        for attribute, setting in (
            (preferences.MAX_WORKSPACE_BYTES, np.array([WORKSPACE_BYTES], np.uint64)),
            (preferences.REDUCTION_SCHEME_MASK, np.array([lt.ReductionScheme[reductions]], np.uint32)),
        ):
            lt.matmul_preference_set_attribute(preference, attribute, setting.ctypes.data, setting.nbytes)
        found, count = np.zeros(CANDIDATES, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        lt.matmul_algo_get_heuristic(
            self._handle, description, b, a, out, out, preference, CANDIDATES, found.ctypes.data, count.ctypes.data
        )  # fmt: skip
        lt.matmul_preference_destroy(preference)
        usable = found[: count[0]][found[: count[0]]["state"] == 0]
        assert len(usable), f"cublasLt has no algorithm for {op}"
        return [usable[n : n + 1]["algo"].copy() for n in range(len(usable))]

    def fastest(self, op: Operation, thorough: bool) -> dict[str, Any]:
        """The fastest of cublasLt's proposals, and if thorough their variants, and of what there is beside them, for a
        table: its digits or OWN, and for people what it is, its microseconds and those of the first proposal.
        """
        algorithms, ways = self._contenders(op, thorough)
        best, medians = race.fastest(ways)
        times = {"us": round(medians[best] * 1e6, 1), "first_us": round(medians[0] * 1e6, 1)}
        return {"algo": algorithms[best]} | self._told(algorithms[best]) | times | {"thorough": thorough}

    def _contenders(self, op: Operation, thorough: bool) -> tuple[list[str], list[Callable[[], None]]]:
        """What `fastest` chooses among, as tables name it, and for a race."""
        plan, operands = self._describe(op), self._noise(op)
        proposals = self._candidates(op, plan)
        variants = self._variants(op, plan, proposals) if thorough else []
        algorithms = [algorithm.tobytes().hex() for algorithm in (*proposals, *variants)]
        ways = self._ways(plan, operands, proposals, variants)
        if multiply := own_multiply(op):
            algorithms.append(OWN)
            ways.append(partial(multiply, *operands))
        return algorithms, ways

    def _told(self, chosen: str) -> dict[str, int]:
        """What an algorithm of a table is, for people."""
        return {} if chosen == OWN else self._settings(self._algorithm(chosen))

    def contenders(self, op: Operation, thorough: bool, most: int) -> list[Contender]:
        """For benchmarks: of what `fastest` chooses among the fastest `most`, and first of all the one in use."""
        algorithms, ways = self._contenders(op, thorough)
        _, medians = race.fastest(ways)
        in_use = self._chosen.get(op.name, algorithms[0])
        found = [
            (algorithm != in_use, Contender(self._told(algorithm), seconds, way))
            for algorithm, seconds, way in zip(algorithms, medians, ways, strict=True)
            if math.isfinite(seconds)
        ]
        found.sort(key=lambda each: (each[0], each[1].seconds))
        return [contender for _, contender in found[:most]]

    def fastest_by_reduction(self, op: Operation) -> tuple[float, float]:
        """For benchmarks: microseconds of its fastest algorithm among those that are taken here, and among all, those
        too that add up partial sums in out's type.
        """
        plan = self._describe(op)
        taken = self._candidates(op, plan)
        known = {candidate.tobytes() for candidate in taken}
        others = [each for each in self._candidates(op, plan, "MASK") if each.tobytes() not in known]
        _, medians = race.fastest(self._ways(plan, self._noise(op), [*taken, *others]))
        return min(medians[: len(taken)]) * 1e6, min(medians) * 1e6

    def _noise(self, op: Operation) -> tuple[Array, ...]:
        """What a Multiply takes."""
        return (
            race.noise((op.M, op.N), op.dtype),
            race.noise((op.a_shape[0] * op.a_width,), BF16),
            race.noise((op.K * op.N,), BF16),
            race.noise((op.M, op.N), op.dtype) if op.add else None,
            race.noise((op.N,), BF16) if op.epilogue in WITH_BIAS else None,
            race.noise((op.M, op.N), BF16) if op.epilogue in WITH_AUX else None,
        )

    def _ways(
        self, plan: Plan, operands: tuple[Array, ...], proposals: Sequence[Any], variants: Sequence[Any] = ()
    ) -> list[Callable[[], None]]:
        """For a race, the same multiply by each algorithm: the first, which cublasLt estimates to be the fastest, wins
        ties there; a variant that fails loses.
        """

        def attempt(plan: Plan) -> None:
            try:
                self._launch(plan, *operands)
            except self._lt.cuBLASLtError as error:
                raise race.FailedError from error

        ways: list[Callable[[], None]] = [
            partial(self._launch, plan._replace(algorithm=each), *operands) for each in proposals
        ]
        return [*ways, *(partial(attempt, plan._replace(algorithm=each)) for each in variants)]

    def _variants(self, op: Operation, plan: Plan, proposals: Sequence[Any]) -> list[Any]:
        """The proposed algorithms in other settings that cublasLt accepts, as many as SEARCH_SECONDS allow: those of a
        proposed tile first, apart from that in a random order that is always the same. None rounds partial sums.
        """
        proposed = [self._settings(algorithm) for algorithm in proposals]
        clusters = [int(self._lt.ClusterShape[f"SHAPE_{shape}"]) for shape in CLUSTERS]
        splits = {1} | {each["splitk_num"] for each in proposed if each["splitk_num"] > 1 and op.K >= LONG_SUM}
        choices: list[tuple[int, ...]] = []
        bare = {}
        for number in sorted({each["id"] for each in proposed}):
            with suppress(self._lt.cuBLASLtError):  # it cannot be had by its number
                bare[number] = algorithm = self._bare(op, number)
                tiles, stages = (self._capability(algorithm, name) for name in ("TILE_IDS", "STAGES_IDS"))
                custom, swizzled = (
                    range(self._capability(algorithm, name)[0] + 1)
                    for name in ("CUSTOM_OPTION_MAX", "CTA_SWIZZLING_SUPPORT")
                )
                choices += itertools.product([number], tiles, stages, custom, swizzled, clusters, sorted(splits))
        random.Random(0).shuffle(choices)
        likely = {(each["id"], each["tile_id"]) for each in proposed}
        choices.sort(key=lambda choice: choice[:2] not in likely)

        seconds = race.FIRST_ROUNDS * (2 * op.M * op.N * op.K / FLOPS + PAUSE)
        known = {algorithm.tobytes() for algorithm in proposals}
        found: list[Any] = []
        for number, *values in choices[:CHECKS]:
            if (len(found) + 1) * seconds > SEARCH_SECONDS:
                break
            algorithm = bare[number].copy()
            with suppress(self._lt.cuBLASLtError):  # it has no such setting
                self._configure(algorithm, values)
                if algorithm.tobytes() not in known and self._can_run(op, plan, algorithm):
                    found.append(algorithm)
        return found

    def _bare(self, op: Operation, number: int) -> Any:
        """The algorithm of this number, with nothing set."""
        algorithm = np.zeros(1, self._lt.matmul_heuristic_result_dtype["algo"])
        types = [CUDA_TYPES[dtype] for dtype in (np.dtype(np.float32), BF16, BF16, op.dtype, op.dtype)]
        self._lt.matmul_algo_init(self._handle, COMPUTE_32F, *types, number, algorithm.ctypes.data)
        return algorithm

    def _capability(self, algorithm: Any, name: str) -> list[int]:
        """What cublasLt says of it, a list or one number; [0], which is what is set by default, if it says nothing."""
        lt, found, written = self._lt, np.zeros(4096, np.int32), np.zeros(1, np.uint64)
        with suppress(lt.cuBLASLtError):
            attribute = lt.MatmulAlgoCapAttribute[name]
            lt.matmul_algo_cap_get_attribute(
                algorithm.ctypes.data, attribute, found.ctypes.data, found.nbytes, written.ctypes.data
            )
        return found[: int(written[0]) // found.itemsize].tolist() or [0]

    def _configure(self, algorithm: Any, values: Sequence[int]) -> None:
        """Gives it these SETTINGS; partial sums, if there are any, are kept in fp32."""
        lt, splits = self._lt, values[SETTINGS.index("SPLITK_NUM")]
        reduction = int(lt.ReductionScheme["COMPUTE_TYPE" if splits > 1 else "NONE"])
        for name, value in zip((*SETTINGS, "REDUCTION_SCHEME"), (*values, reduction), strict=True):
            attribute = lt.MatmulAlgoConfigAttribute[name]
            buffer = np.array([value], lt.get_matmul_algo_config_attribute_dtype(attribute))
            lt.matmul_algo_config_set_attribute(algorithm.ctypes.data, attribute, buffer.ctypes.data, buffer.nbytes)
