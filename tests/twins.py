"""What holds the CUDA operations to their numpy twins, on a GPU or, by the shim, on a CPU.

Inputs are rounded to the dtypes that the operation takes, then both sides compute from them: numpy in float64, which is
taken for exact, and the kernels. What may lie between them is counted, not tuned: every path says where it rounds, and
each rounding is at most

    2^-8 of a value that is stored as bf16, 2^-24 of one that is stored as fp32,
    sum_error(n) of the sum of the terms' sizes, for a sum of n terms in fp32

Every array lies between guard bytes, which must be there afterwards. Outputs that an operation overwrites hold NaN
before.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.device import cublaslt, cuda, kernels, numpy, tensor_map
from engine.ops.cuda import attention, linear, scratch
from tests import shim

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
EPS16 = 2.0**-8  # half a unit in the last place of bf16, relative: it has 8 binary digits
EPS32 = 2.0**-23  # a whole one of fp32: what tensor cores, which truncate, may lose in an addition
TINY = 2.0**-126  # below it, numbers have fewer digits
GUARD = 512  # bytes on either side of an array
GUARD_BYTE = 0xA5

Array = Any


def sum_error(n: int) -> float:
    """How far a sum of n terms in fp32 may be off, relative to the sum of their sizes.

    Whatever the order of the additions: n of them at worst; and since roundings are as often up as down, no more than
    lambda sqrt(n) with probability 1 - 2 exp(-lambda^2 / 2) (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5), theorem
    3.1). lambda = 8 leaves 1e-14.
    """
    return min(n, 8 * math.sqrt(n)) * EPS32


def stored(exact: np.ndarray, before: np.ndarray | float, dtype: Any) -> np.ndarray:
    """The bound of a value that was `before` off when it was rounded to dtype."""
    eps = EPS16 if np.dtype(dtype) == BF16 else EPS32 / 2
    return before + eps * (np.abs(exact) + before) + TINY


class Twin:
    """A device with the CUDA operations on it: arrays between guards, and their values in float64."""

    def __init__(self, name: str):
        self.name = name
        self.on_gpu = name == "gpu"
        if self.on_gpu:
            import cupy

            self._xp: Any = cupy
            if os.environ.get(
                "SMALL_SIZES"
            ):  # compute-sanitizer sees the ends of allocations, not those of a pool's parts
                cupy.cuda.set_allocator(None)
        else:
            self._xp = np
        self._guarded: list[tuple[Array, int]] = []

    def put(self, values: np.ndarray, dtype: Any = BF16) -> Array:
        """values on the device, rounded to dtype."""
        host = np.asarray(values).astype(dtype)
        raw = self._xp.full(host.nbytes + 3 * GUARD, GUARD_BYTE, np.uint8)
        start = GUARD + -self._address(raw) % 256
        array = raw[start : start + host.nbytes].view(host.dtype).reshape(host.shape)
        array[...] = self._xp.asarray(host)
        self._guarded.append((raw, start))
        return array

    def nan(self, *shape: int, dtype: Any = BF16) -> Array:
        """An array that the operation has to write, every element of it."""
        return self.put(np.full(shape, np.nan), dtype)

    def get(self, array: Array) -> np.ndarray:
        """The values, in float64 where they are numbers with a fraction."""
        host = array if isinstance(array, np.ndarray) else array.get()
        return host.astype(np.float64) if host.dtype in (BF16, F32) else host.copy()

    def check_guards(self) -> None:
        for raw, start in self._guarded:
            host = raw if isinstance(raw, np.ndarray) else raw.get()
            size = len(host) - 3 * GUARD
            for part, where in ((host[:start], "before"), (host[start + size :], "behind")):
                assert (part == GUARD_BYTE).all(), f"something was written {where} an array"
        self._guarded.clear()

    def _address(self, array: Array) -> int:
        return kernels.address_of(array)


def rounded(values: np.ndarray, dtype: Any = BF16) -> np.ndarray:
    """What values become on the device, in float64."""
    return np.asarray(values).astype(dtype).astype(np.float64)


def assert_within(actual: np.ndarray, exact: np.ndarray, bound: np.ndarray | float, name: str) -> None:
    """|actual - exact| <= bound, element by element."""
    assert actual.shape == exact.shape, (name, actual.shape, exact.shape)
    error = np.abs(actual - exact)
    ratio = error / np.broadcast_to(bound, error.shape)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
    assert (error <= bound).all(), (
        f"{name}{list(map(int, worst))}: {actual[worst]:.7g} instead of {exact[worst]:.7g}, "
        f"{ratio[worst]:.3g} times what its roundings explain"
    )


@contextmanager
def on(name: str) -> Iterator[Twin]:
    """The CUDA operations on "gpu", or by the shim with its threads in an order: "forward", "reversed", "shuffled"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "_buffer", None)
        patch.setattr(linear, "gelu_fusion", 0)
        patch.setattr(attention, "for_hopper", False)
        patch.setattr(cublaslt, "own_multiply", cublaslt.nothing_else)
        if name != "gpu":
            shim.set_order(name)
            if "BACKHAND_KERNELS" in os.environ:  # a changed copy of the sources: see planted_faults.py
                patch.setattr(kernels, "SOURCES", Path(os.environ["BACKHAND_KERNELS"]))
            patch.setattr(kernels, "KERNELS", kernels.Kernels(ShimModule))
            patch.setattr(cublaslt, "matmul", matmul)
            patch.setattr(tensor_map, "encode", shim.tensor_map)
            patch.setattr(cuda, "to_device", lambda host: host)
            patch.setattr(cuda, "put", numpy.put)
            patch.setattr(cuda, "zeros", lambda shape, dtype: np.zeros(shape, dtype))
            patch.setattr(cuda, "Upload", numpy.Upload)
            patch.setattr(cuda, "shared_memory_limit", lambda: 227 << 10)
        twin = Twin(name)
        yield twin
        twin.check_guards()


class ShimModule:
    """A source of kernels on the CPU."""

    def __init__(self, source: kernels.Source, defines: kernels.Defines, parameters: Any):
        names = {
            name: ["const " * p.const + p.type + "*" * p.pointer for p in each] for name, each in parameters.items()
        }
        values = {key: str(value) for key, value in defines.items()}
        self._module = shim.ShimModule(source.path, values, [kernels.SOURCES], names)

    def launch(self, name: str, grid: Any, block: Any, shared_bytes: int, args: Any) -> None:
        three = [(*size, 1, 1)[:3] for size in (grid, block)]
        self._module.launch(name, *three, shared_bytes, args)


def matmul(
    out: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    add: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    pre_gelu: np.ndarray | None = None,
    dgelu: np.ndarray | None = None,
) -> None:
    """What cublaslt.matmul promises, where there is none."""
    from engine.ops.numpy import gelu

    x, y = (operand.astype(np.float32) for operand in (a, b))
    total = (x.T if transpose_a else x) @ (y.T if transpose_b else y)
    for addend in (add, bias):
        if addend is not None:
            total += addend.astype(np.float32)
    if pre_gelu is not None:
        pre_gelu[...] = total
        gelu.forward(total, total.copy())
    if dgelu is not None:
        gelu.backward(total, dgelu.astype(np.float32))
    out[...] = total
