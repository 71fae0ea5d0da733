"""The CUDA device: arrays are CuPy arrays, on the GPU that is current; everything is put on the current stream."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ml_dtypes
import numpy as np

from engine.device import eagerly
from engine.errors import OutOfMemoryError, UsageError

NAME = "the GPU"
COMPUTE_DTYPE = np.dtype(ml_dtypes.bfloat16)  # of parameters, gradients and activations in a run
WORKS_ALONE = True  # whether it computes while the host goes on
CODE_BYTES = 512 << 20  # of memory that the code of kernels and of cublasLt takes
# NCCL's: 1,308 to 1,831 MiB were seen with two ranks, 3,088 to 3,584 with four. More ranks are reckoned from that.
NCCL_BYTES, NCCL_BYTES_OF_RANK = 1024 << 20, 912 << 20
SHARED_BY_RANKS = False  # whether those on one machine take their memory from the same

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


def put(array: Array, host: np.ndarray) -> None:
    """array, which lies in one piece, = host, of its shape and dtype: without more memory of the GPU."""
    array.set(host)


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


def free_unused() -> None:
    """What arrays that are gone have taken goes back to the GPU, where arrays of any size can have it."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()


class Upload:
    """Host arrays of one shape and dtype, tokens say, on their way to `array` of the device, which stays where it is.

    The copies go through page-locked memory, so that the host need not wait for the device: only before it reuses
    a buffer whose copy, `slots` uploads ago, has not been made yet.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, slots: int = 4):
        import cupy
        import cupyx

        self._host = [cupyx.empty_pinned(shape, dtype) for _ in range(slots)]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(slots)]
        self.array = zeros(shape, dtype)
        self._next = 0

    def __call__(self, host: np.ndarray) -> None:
        """array = host, for all that is put on the stream from now on."""
        slot, self._next = self._next, (self._next + 1) % len(self._host)
        self._copied[slot].synchronize()
        self._host[slot][...] = host
        self.array.set(self._host[slot])
        self._copied[slot].record()


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


def replay(wanted: str, say: Callable[[str], None]) -> Callable[..., None]:
    """See the numpy twin. UsageError, when it is called, if recording fails and wanted is "on"."""
    return eagerly if wanted == "off" else Replay(must=wanted == "on", say=say)


class Replay:
    """Calls functions; from the second call with the same arguments on by a CUDA graph, which is a single launch.

    The first call is a usual one: it loads kernels and makes cublasLt's plans. The second one is recorded: nothing runs
    then, and what kernels are given, pointers and numbers, is kept. So a function that is called here may take nothing
    else from the host, and must put all it does on the current stream. It may not allocate: others would be given the
    memory, which the graph goes on to use.
    """

    def __init__(self, must: bool, say: Callable[[str], None]):
        self._must, self._say = must, say
        self._graphs: dict[tuple, Any] = {}  # None for what has been called once
        self._refused = False

    def __call__(self, function: Callable[..., None], *args: Any) -> None:
        key = (function, *map(_identity, args))
        if self._refused or key not in self._graphs:
            function(*args)
            self._graphs[key] = None
            return
        if self._graphs[key] is None:
            try:
                self._graphs[key] = _recorded(function, args)
            except Exception as error:  # whatever CUDA, CuPy or cublasLt make of it
                self._refuse(error)
                function(*args)
                return
        self._graphs[key].launch()

    def _refuse(self, error: Exception) -> None:
        reason = f"a step cannot be recorded as a CUDA graph ({type(error).__name__}: {error})"
        if self._must:
            raise UsageError(f"--cuda-graph on: {reason}; --cuda-graph off does without") from error
        self._say(f"note       without a CUDA graph: {reason}")
        self._refused = True


def _identity(argument: Any) -> Any:
    """What tells an argument from others: of an array, where it lies and what it is, not its values."""
    import cupy

    is_array = isinstance(argument, cupy.ndarray)
    return (argument.data.ptr, argument.shape, argument.dtype) if is_array else argument


def _recorded(function: Callable[..., None], args: tuple) -> Any:
    """The graph of what the function launches. It is recorded on a stream of its own, and can be launched on any."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(_no_memory):
        stream.begin_capture()
        try:
            function(*args)
        except BaseException:
            with suppress(Exception):  # the first error is the one that tells
                stream.end_capture()
            raise
        return stream.end_capture()


def _no_memory(nbytes: int) -> Any:
    raise RuntimeError(f"{nbytes:,} bytes are allocated in it")


def mark() -> Any:
    """A point in time: when the device gets here."""
    import cupy

    return cupy.cuda.get_current_stream().record(cupy.cuda.Event())


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one mark to a later one. Waits for it."""
    import cupy

    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1000


def take(local_rank: int) -> tuple[bytes, int]:
    """Makes a GPU the current one: of those that this process sees the local_rank-th, beginning anew behind the last.

    (What tells it from all other GPUs, how many this process sees.)
    """
    from cupy.cuda import Device, runtime

    count = runtime.getDeviceCount()
    device = Device(local_rank % count)
    device.use()
    name = socket.gethostname(), device.pci_bus_id, runtime.getDeviceProperties(device.id)["uuid"]
    return repr(name).encode(), count


def overhead_bytes(world: int) -> int:
    """Of memory that each of `world` ranks takes besides its arrays."""
    return CODE_BYTES + nccl_bytes(world)


def nccl_bytes(world: int) -> int:
    return NCCL_BYTES + (world - 1) * NCCL_BYTES_OF_RANK if world > 1 else 0


def compute_capability() -> int:
    """Whose kernels are taken where there are several: the GPU's, as 90 for 9.0, or by $BACKHAND_CAPABILITY an older
    one's. UsageError where that is not.
    """
    import cupy

    gpu, wanted = int(cupy.cuda.Device().compute_capability), os.environ.get("BACKHAND_CAPABILITY", "")
    if not wanted:
        return gpu
    if not wanted.isdigit() or not 80 <= int(wanted) <= gpu:
        raise UsageError(f"BACKHAND_CAPABILITY={wanted}: this GPU takes kernels of 80 (Ampere, 8.0) to {gpu}")
    return int(wanted)


def shared_memory_limit() -> int:
    """Bytes of shared memory that a block may have."""
    from cupy.cuda import Device, runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, Device().id)


def multiprocessors() -> int:
    """How many the GPU has."""
    from cupy.cuda import Device, runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, Device().id)


def describe() -> str:
    """The GPU, for the plan of a run."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return f"{properties['name'].decode()} with {properties['totalGlobalMem'] / 2**30:,.0f} GiB"
