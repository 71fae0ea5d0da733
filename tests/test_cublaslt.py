"""engine/device/cublaslt.py without a GPU: what it tells cublasLt, carried out by a stand-in that obeys to the letter.

The stand-in reads and writes memory by the addresses, layouts and attributes it is given, column-major as cublasLt is.
So a wrong transpose, leading dimension, epilogue or addend shows here, on the CPU.
"""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine.device import cublaslt
from engine.device.kernels import BF16
from engine.ops.numpy import gelu
from tests.twins import EPS16, F32, matmul, sum_error

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


class Attributes:
    """Whatever is asked for by name is its own number."""

    def __getattr__(self, name):
        return name

    def __getitem__(self, name):
        return {"DEFAULT": 1, "BIAS": 4, "GELU_AUX_BIAS": 164, "DGELU": 192}[name]


class StandIn:
    """As much of nvmath.bindings.cublasLt as is called."""

    MatmulDescAttribute, MatmulPreferenceAttribute, Epilogue = Attributes(), Attributes(), Attributes()
    ReductionScheme = SimpleNamespace(COMPUTE_TYPE=2)
    matmul_heuristic_result_dtype = np.dtype([("algo", "<u8", (8,)), ("state", "<i4")])

    def __init__(self):
        self.objects = [None]
        self.plans = 0

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
        assert self.objects[preference] == {"MAX_WORKSPACE_BYTES": 32 << 20, "REDUCTION_SCHEME_MASK": 2}

    def matmul_algo_get_heuristic(self, handle, description, a, b, c, d, preference, asked, results, count):
        found = at(results, self.matmul_heuristic_result_dtype, asked)
        found["state"][:3] = 15, 0, 0  # the first is not supported
        found["algo"][:3, 0] = 1, 2, 3
        at(count, np.int32, 1)[0] = 3
        self.plans += 1

    def matmul(self, handle, description, alpha, a, la, b, lb, beta, c, lc, d, ld, algo, workspace, nbytes, stream):
        told = self.objects[description]
        assert at(algo, np.uint64, 1)[0] == 2
        assert at(alpha, F32, 1)[0] == 1
        x = self._matrix(a, la).astype(F32)
        y = self._matrix(b, lb).astype(F32)
        out, addend = self._matrix(d, ld), self._matrix(c, lc).astype(F32)
        total = (x.T if told["TRANSA"] else x) @ (y.T if told["TRANSB"] else y)
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
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(cublaslt, "_bindings", lambda: found)
    monkeypatch.setattr(cublaslt.cuda, "zeros", lambda shape, dtype: put(np.zeros(shape), dtype))
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0)))
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
