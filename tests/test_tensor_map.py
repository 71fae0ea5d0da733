"""engine/device/tensor_map.py without a GPU: what the driver is told, by a library that notes it."""

import ctypes
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

from engine.device import tensor_map

# The declaration is cuda.h's, but for the names of its types. What it is told comes back as the words of the map.
DRIVER = """
#include <stdint.h>
int cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, void *address, const uint64_t *dims,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
    if ((uintptr_t)map % 128 || rank != 3) return 1;
    uint64_t told[16] = {(uintptr_t)address, type, interleave, swizzle, promotion, fill, dims[0], dims[1], dims[2],
                         strides[0], strides[1], box[0], box[1], box[2], steps[0] * steps[1] * steps[2], rank};
    for (int i = 0; i < 16; i++) map[i] = told[i];
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path_factory.mktemp("driver") / "libcuda.c"
    source.write_text(DRIVER)
    library = source.with_name("libcuda.so.1")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def test_what_the_driver_is_told(monkeypatch, driver):
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    B, T, columns = 2, 70, 192
    array, wide = np.zeros((B, T, columns), ml_dtypes.bfloat16), 1 << 33  # a dimension that takes 64 bits
    for dims, strides in (
        ((columns, T, B), (2 * columns, 2 * columns * T)),
        ((columns, wide, B), (2 * columns, 2 * columns * wide)),
    ):
        told = tensor_map.encode(array, dims, strides, (64, 32, 1))
        assert told.dtype == np.uint64
        # bfloat16; not interleaved, swizzled by 128 bytes, 256 bytes fetched into L2, zeros beyond the edge
        assert told.tolist() == [array.ctypes.data, 9, 0, 3, 3, 0, *dims, *strides, 64, 32, 1, 1, 3]


def test_what_the_driver_refuses_is_an_error(monkeypatch, driver):
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    with pytest.raises(AssertionError, match="CUDA's error 1"):
        tensor_map.encode(np.zeros((4, 64), ml_dtypes.bfloat16), (64, 4), (128,), (64, 4))
