"""The CUDA device: arrays are CuPy arrays, on the GPU that is current; everything is put on the current stream."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from engine.errors import OutOfMemoryError

NAME = "the GPU"
COMPUTE_DTYPE = np.dtype(ml_dtypes.bfloat16)  # of parameters, gradients and activations in a run
WORKS_ALONE = True  # whether it computes while the host goes on
OVERHEAD_BYTES = 512 << 20  # of memory that a run takes besides its arrays: the code of kernels and of cublasLt

Array = Any


def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """A zeroed array, aligned to 512 bytes. OutOfMemoryError says what was asked for and what is free."""
    import cupy

    with _taking(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize):
        return cupy.zeros(shape, dtype)


def to_device(host: np.ndarray) -> Array:
    """host as an array of this device. OutOfMemoryError as in zeros."""
    import cupy

    with _taking(host.nbytes):
        return cupy.asarray(host)


@contextmanager
def _taking(nbytes: int) -> Iterator[None]:
    import cupy

    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the GPU has no {nbytes / 2**30:,.2f} GiB in one piece; {available_bytes() / 2**30:,.2f} GiB are free. "
            "Another program may have taken some since the start: take a smaller -b, or -r 2"
        ) from error


def to_host(array: Array) -> np.ndarray:
    """array as a numpy array. Waits for what computes it."""
    return array.get()


def available_bytes() -> int:
    """Memory of the GPU that a run can still take, in bytes."""
    import cupy

    return cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()


class Upload:
    """Host arrays of one shape and dtype, tokens say, on their way to an array of the device that stays where it is.

    The copies go through page-locked memory, so that the host need not wait for the device: only before it reuses
    a buffer whose copy, `slots` uploads ago, has not been made yet.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, slots: int = 4):
        import cupy
        import cupyx

        self._host = [cupyx.empty_pinned(shape, dtype) for _ in range(slots)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(slots)]
        self._device = zeros(shape, dtype)
        self._next = 0

    def __call__(self, host: np.ndarray) -> Array:
        """The device's array, which has host's values for all that is put on the stream from now on."""
        slot, self._next = self._next, (self._next + 1) % len(self._host)
        self._copied[slot].synchronize()
        self._host[slot][...] = host
        self._device.set(self._host[slot])
        self._copied[slot].record()
        return self._device


def download(arrays: Sequence[Array]) -> Callable[[], list[np.ndarray]]:
    """What arrays hold when the device gets here; the function that is returned waits until then."""
    import cupy
    import cupyx

    stream = cupy.cuda.get_current_stream()
    buffers = [cupyx.empty_pinned(array.shape, array.dtype) for array in arrays]
    copies = [array.get(stream, out=out, blocking=False) for array, out in zip(arrays, buffers, strict=True)]
    done = stream.record()

    def wait() -> list[np.ndarray]:
        done.synchronize()
        return copies

    return wait


def mark() -> Any:
    """A point in time: when the device gets here."""
    import cupy

    return cupy.cuda.get_current_stream().record(cupy.cuda.Event())


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one mark to a later one. Waits for it."""
    import cupy

    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1000


def compute_capability() -> int:
    """As 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device().compute_capability)


def shared_memory_limit() -> int:
    """Bytes of shared memory that a block may have."""
    from cupy.cuda import Device, runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, Device().id)


def describe() -> str:
    """The GPU, for the plan of a run."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return f"{properties['name'].decode()} with {properties['totalGlobalMem'] / 2**30:,.0f} GiB"
