"""Maps for Hopper's tensor memory accelerator: what kernels_cu/hopper.cuh's copy_box is told about a tensor."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from engine.device import cuda
from engine.device.kernels import address_of

Array = Any

BOX = (64, 64)  # columns and rows: 128 bytes, which are swizzled, and as many rows as a warpgroup takes

# Of cuda.h: its CUtensorMap, in words and bytes, and numbers of its enumerations.
WORDS, ALIGNMENT = 16, 128
BFLOAT16, NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_TO_256B, FILL_WITH_ZEROS = 9, 0, 3, 3, 0

_maps: dict[tuple[int, ...], Array] = {}  # a map holds an address, never what lies there: it stays true


def rows(array: Array, B: int, T: int, columns: int) -> Array:
    """The map, uint64 (16) on the device, of bf16 (B,T,columns) by boxes of 64 rows of a b and 64 columns."""
    key = address_of(array), B, T, columns
    if key not in _maps:
        _maps[key] = cuda.to_device(encode(array, (columns, T, B), (2 * columns, 2 * columns * T), (*BOX, 1)))
    return _maps[key]


def spread(array: Array, N: int, K: int) -> Array:
    """The map, uint64 (16) on the device, of bf16 (N,K), N a multiple of 32, by boxes of 64 rows and 64 columns, row
    8 a + 2 b + i of each 32 where rows() has row 8 b + 2 a + i. Where a product of a warpgroup has them as columns, a
    thread then has, of each 32, eight side by side instead of four times two.
    """
    key = address_of(array), N, K
    if key not in _maps:
        strides = tuple(2 * K * rows for rows in (1, 8, 2, 32))
        _maps[key] = cuda.to_device(encode(array, (K, 2, 4, 4, N // 32), strides, (64, 2, 4, 4, 2)))
    return _maps[key]


def encode(array: Array, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """What the driver makes of a bf16 tensor, uint64 (16). dims, in elements, and box innermost first; strides: bytes
    from one to the next in all dimensions but the innermost.
    """
    room = np.zeros(WORDS + ALIGNMENT // 8, np.uint64)
    made = room[-room.ctypes.data % ALIGNMENT // 8 :][:WORDS]
    error = _driver().cuTensorMapEncodeTiled(
        made.ctypes,
        BFLOAT16,
        len(dims),
        ctypes.c_void_p(address_of(array)),
        np.array(dims, np.uint64).ctypes,
        np.array(strides, np.uint64).ctypes,
        np.array(box, np.uint32).ctypes,
        np.ones(len(dims), np.uint32).ctypes,  # takes every element
        *(NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_TO_256B, FILL_WITH_ZEROS),
    )
    assert error == 0, f"a map of {dims}, {strides}, {box}: CUDA's error {error}"
    return made


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
