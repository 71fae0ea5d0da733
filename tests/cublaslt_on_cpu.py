"""cublasLt without a GPU: a stand-in for nvmath's bindings, which obeys what it is told to the letter.

It reads and writes memory by the addresses, layouts and attributes it is given, column-major as cublasLt is. So a wrong
transpose, leading dimension, epilogue or addend shows on the CPU.
"""

import ctypes
import sys
from collections import Counter, defaultdict
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np

from engine.device import cublaslt, cuda, race
from engine.device.kernels import BF16
from engine.ops.numpy import gelu
from tests.twins import F32

TYPES = {0: F32, 14: BF16}


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


def install(monkeypatch):
    """The stand-in, which is cublasLt until monkeypatch is undone; memory is numpy's, and the GPU's clock its own."""
    found = StandIn()
    monkeypatch.setattr(cuda, "zeros", lambda shape, dtype: put(np.zeros(shape), dtype))
    monkeypatch.setattr(cuda, "to_device", lambda host: host)
    monkeypatch.setattr(cuda, "describe", lambda: "a GPU")
    monkeypatch.setattr(cuda, "mark", lambda: found.clock)
    monkeypatch.setattr(cuda, "seconds_between", lambda began, ended: ended - began)
    monkeypatch.setattr(race, "FLUSH_BYTES", 64)
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0)),
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", SimpleNamespace(cublasLt=found))
    monkeypatch.setattr(cublaslt, "library", cache(cublaslt.Library))
    return found


SMALL = cublaslt.Operation(5, 7, 3, False, True, BF16, False, "BIAS", 3)
OTHER = cublaslt.Operation(7, 3, 5, True, False, F32, True, "DEFAULT", 7)
VARIANT = Variant(2, TILE_ID=11)


def varied(stand_in, **capabilities):
    """The stand-in with 2 and 3 proposed, which take 2 us, and 2 to be had with other tiles, which take 3."""
    stand_in.speeds = defaultdict(lambda: 3e-6, {2: 2e-6, 3: 2e-6})
    stand_in.capabilities = {2: {"TILE_IDS": [10, 11, 12]} | capabilities}
    return stand_in
