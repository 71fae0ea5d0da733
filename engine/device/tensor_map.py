"""Maps for Hopper's tensor memory accelerator: what kernels_cu/hopper.cuh's copy_box is told about a tensor."""

from typing import Any

import numpy as np

from engine.device import cuda
from engine.device.kernels import address_of

Array = Any

BOX = (64, 64)  # columns and rows: 128 bytes, which are swizzled, and as many rows as a warpgroup takes

_maps: dict[tuple[int, ...], Array] = {}  # a map holds an address, never what lies there: it stays true


def rows(array: Array, B: int, T: int, columns: int) -> Array:
    """The map, uint64 (16) on the device, of bf16 (B,T,columns) by boxes of 64 rows of a b and 64 columns."""
    key = address_of(array), B, T, columns
    if key not in _maps:
        _maps[key] = cuda.to_device(encode(array, (columns, T, B), (2 * columns, 2 * columns * T), (*BOX, 1)))
    return _maps[key]


def encode(array: Array, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """What the driver makes of a bf16 tensor, uint64 (16). dims, in elements, and box innermost first; strides: bytes
    from one to the next in all dimensions but the innermost.
    """
    from cuda.bindings import driver

    error, made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(dims),
        address_of(array),
        [driver.cuuint64_t(n) for n in dims],
        [driver.cuuint64_t(n) for n in strides],
        [driver.cuuint32_t(n) for n in box],
        [driver.cuuint32_t(1)] * len(dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    assert error == driver.CUresult.CUDA_SUCCESS, f"a map of {dims}, {strides}, {box}: {error}"
    return np.array([int(word) for word in made.opaque], np.uint64)
