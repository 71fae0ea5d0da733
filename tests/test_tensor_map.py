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
    const int settings[] = {type, interleave, swizzle, promotion, fill, (int)rank};
    if ((uintptr_t)map % 128 || rank < 3) return 1;
    map[0] = (uintptr_t)address, map[1] = 0;
    for (int i = 0; i < 6; i++) map[1] |= (uint64_t)settings[i] << 8 * i;
    for (uint32_t i = 0; i < 5; i++) {
        if (i < rank && steps[i] != 1) return 2;
        map[2 + i] = i < rank ? dims[i] : 0;
        map[7 + i] = i < rank ? box[i] : 0;
        if (i < 4) map[12 + i] = i + 1 < rank ? strides[i] : 0;
    }
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


def words(array, dims, strides, box):
    """What comes back: bfloat16; not interleaved, swizzled by 128 bytes, 256 bytes fetched into L2, zeros beyond."""
    rank, more = len(dims), [0] * (5 - len(dims))
    settings = sum(setting << 8 * i for i, setting in enumerate((9, 0, 3, 3, 0, rank)))
    return [array.ctypes.data, settings, *dims, *more, *box, *more, *strides, *more]


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
        assert told.tolist() == words(array, dims, strides, (64, 32, 1))


def test_rows_that_are_spread(monkeypatch, driver):
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    monkeypatch.setattr(tensor_map, "_maps", {})
    monkeypatch.setattr(tensor_map.cuda, "to_device", lambda host: host)
    array = np.zeros((96, 128), ml_dtypes.bfloat16)
    told = tensor_map.spread(array, 96, 128)
    assert told.tolist() == words(array, (128, 2, 4, 4, 3), (256, 8 * 256, 2 * 256, 32 * 256), (64, 2, 4, 4, 2))


def test_what_the_driver_refuses_is_an_error(monkeypatch, driver):
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    with pytest.raises(AssertionError, match="CUDA's error 1"):
        tensor_map.encode(np.zeros((4, 64), ml_dtypes.bfloat16), (64, 4), (128,), (64, 4))
