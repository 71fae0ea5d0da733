"""Matrix multiplies by cublasLt, through nvmath-python's bindings (CuPy has none): the only module that knows them.

Operands are row-major, as everywhere else; cublasLt's are column-major. A row-major (M,N) is a column-major (N,M), so
out = a b is asked for as out^T = b^T a^T: the operands change places, and no data moves.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from engine.device import cuda
from engine.device.kernels import BF16

Array = Any

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper

# Numbers of cublasLt's C interface that the bindings do not name.
COMPUTE_32F = 68
CUDA_TYPES = {np.dtype(np.float32): 0, BF16: 14}
CANDIDATES = 8
ALIGNMENT = 256  # bytes: what cublasLt chooses algorithms for unless it is told


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


class Plan(NamedTuple):
    """cublasLt's descriptors and the algorithm chosen."""

    description: int
    a: int
    b: int
    out: int
    algorithm: Any  # a numpy record, whose address cublasLt takes


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
    is bf16 and there is no bias. a and b are bf16, as is all else but out and add, which may be fp32, and may be the
    same array. transpose_a: a is (K,M); transpose_b: b is (N,K). With pre_gelu (M,N) =, which takes the sum, out is its
    GELU. With dgelu (M,N), out is the product times gelu'(dgelu).
    """
    (M, N), K = out.shape, a.shape[0] if transpose_a else a.shape[1]
    assert a.shape == ((K, M) if transpose_a else (M, K)), (a.shape, out.shape)
    assert b.shape == ((N, K) if transpose_b else (K, N)), (b.shape, out.shape)
    assert a.dtype == b.dtype == BF16
    for other in (add, pre_gelu, dgelu):
        assert other is None or other.shape == out.shape
    for array in (out, a, b, add, bias, pre_gelu, dgelu):
        assert array is None or (array.flags.c_contiguous and array.data.ptr % ALIGNMENT == 0)
    assert pre_gelu is None or bias is not None, "cublasLt's GELU comes with a bias"
    epilogue = ((pre_gelu, "GELU_AUX_BIAS"), (dgelu, "DGELU"), (bias, "BIAS"))
    name = next((name for array, name in epilogue if array is not None), "DEFAULT")
    operation = Operation(M, N, K, transpose_a, transpose_b, np.dtype(out.dtype), add is not None, name)
    _library().run(operation, out, a, b, add, bias, dgelu if pre_gelu is None else pre_gelu)


def _bindings() -> Any:
    from nvmath.bindings import cublasLt

    return cublasLt


@cache
def _library() -> "_Library":
    return _Library()


class _Library:
    """cublasLt on the current GPU: its handle, its workspace, and the plans made so far."""

    def __init__(self) -> None:
        import cupy

        self._lt, self._cupy = _bindings(), cupy
        self._handle = self._lt.create()
        self._workspace = cuda.zeros((WORKSPACE_BYTES,), np.uint8)
        self._plans: dict[Operation, Plan] = {}
        self._one, self._zero, self._pointer = np.ones(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.uint64)

    def run(self, operation: Operation, out: Array, a: Array, b: Array, add: Array, bias: Array, aux: Array) -> None:
        """The multiply, with what it needs of add, bias and the epilogue's other array; None for what it does not."""
        plan = self._plans.get(operation) or self._plans.setdefault(operation, self._plan(operation))
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

    def _plan(self, op: Operation) -> Plan:
        lt, attributes = self._lt, self._lt.MatmulDescAttribute
        description = lt.matmul_desc_create(COMPUTE_32F, CUDA_TYPES[np.dtype(np.float32)])

        def describe(attribute: int, value: int, dtype: type) -> None:
            buffer: np.ndarray = np.array([value], dtype)
            lt.matmul_desc_set_attribute(description, attribute, buffer.ctypes.data, buffer.nbytes)

        # Column-major, a row-major matrix is its transpose already: so `transposed` is where ours is not.
        describe(attributes.TRANSA, op.transpose_b, np.int32)
        describe(attributes.TRANSB, op.transpose_a, np.int32)
        describe(attributes.EPILOGUE, lt.Epilogue[op.epilogue], np.uint32)
        if op.epilogue in ("BIAS", "GELU_AUX_BIAS"):
            describe(attributes.BIAS_DATA_TYPE, CUDA_TYPES[BF16], np.int32)
        if op.epilogue in ("DGELU", "GELU_AUX_BIAS"):
            describe(attributes.EPILOGUE_AUX_LD, op.N, np.int64)

        a_rows, a_columns = (op.K, op.M) if op.transpose_a else (op.M, op.K)
        b_rows, b_columns = (op.N, op.K) if op.transpose_b else (op.K, op.N)
        a = lt.matrix_layout_create(CUDA_TYPES[BF16], a_columns, a_rows, a_columns)
        b = lt.matrix_layout_create(CUDA_TYPES[BF16], b_columns, b_rows, b_columns)
        out = lt.matrix_layout_create(CUDA_TYPES[op.dtype], op.N, op.M, op.N)

        # Partial sums of split products are kept and added in fp32, never in the type of out.
        preference, preferences = lt.matmul_preference_create(), lt.MatmulPreferenceAttribute
        for attribute, setting in (
            (preferences.MAX_WORKSPACE_BYTES, np.array([WORKSPACE_BYTES], np.uint64)),
            (preferences.REDUCTION_SCHEME_MASK, np.array([lt.ReductionScheme.COMPUTE_TYPE], np.uint32)),
        ):
            lt.matmul_preference_set_attribute(preference, attribute, setting.ctypes.data, setting.nbytes)
        found, count = np.zeros(CANDIDATES, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        lt.matmul_algo_get_heuristic(
            self._handle, description, b, a, out, out, preference, CANDIDATES, found.ctypes.data, count.ctypes.data
        )  # fmt: skip
        lt.matmul_preference_destroy(preference)
        usable = found[: count[0]][found[: count[0]]["state"] == 0]
        assert len(usable), f"cublasLt has no algorithm for {op}"
        return Plan(description, a, b, out, usable[:1]["algo"].copy())
