"""Ranks on GPUs: NCCL carries what lies on them, or copies.py what is shared; MPI carries all else."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from engine.comm import Communicator
from engine.comm.copies import Copies, address_of
from engine.errors import UsageError

Array = Any

# NVLink's multicast needs a permission that containers often lack, and NCCL then does not start.
DEFAULTS = {"NCCL_NVLS_ENABLE": "0"}


class NCCLRanks:
    """The ranks of `control`, each on a GPU of its own, which is current. Buffers are contiguous CuPy arrays.

    All collectives run on one stream, the communicator's, in the order in which they are called; the host waits for
    none. One that is called from another stream comes after what that was given before, and before what it is given
    later. Called aside, it comes before nothing until that is asked for.
    """

    def __init__(self, control: Communicator, unique_id: bytes, carrier: str, say: Callable[[str], None]):
        """unique_id: rank 0's, as `new_id` gives it. carrier: of what is exchanged and gathered in shared arrays,
        "nccl", or "copies" without it; "auto": copies, where GPUs reach each other's memory. All ranks call this
        together. UsageError if they can't connect.
        """
        import cupy

        self._cupy, self._nccl, self._control = cupy, _library(), control
        self.rank, self.world = control.rank, control.world
        self.local_rank, self.local_world = control.local_rank, control.local_world
        self._dtypes = {
            np.dtype(ml_dtypes.bfloat16): self._nccl.NCCL_BFLOAT16,
            np.dtype(np.float32): self._nccl.NCCL_FLOAT32,
            np.dtype(np.float64): self._nccl.NCCL_FLOAT64,
        }
        try:
            self._ranks = self._nccl.NcclCommunicator(self.world, unique_id, self.rank)
        except self._nccl.NcclError as error:
            raise UsageError(
                f"NCCL cannot connect the ranks' GPUs ({error}): with NCCL_DEBUG=INFO in the environment it says more; "
                "--device cpu does without"
            ) from error
        # With priority, or its kernels would wait until the last block of the one that computes has begun.
        self._stream = cupy.cuda.Stream(non_blocking=True, priority=-1)
        self._behind, self._ahead = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._is_ahead = False  # has something been put aside that nobody has waited for?
        self._gathered: dict[tuple[int, int], Array] = {}
        self._copies: Copies | None = None
        if carrier != "nccl":
            try:
                self._copies = Copies(control, self._stream)
            except UsageError as error:
                if carrier == "copies":
                    raise
                say(f"--carrier auto is nccl here: {error.args[0]}")

    def share(self, array: Array) -> None:
        self._check(array)
        if self._copies and array.size:
            self._copies.share(array)

    def exchange(self, out: Array, inp: Array) -> None:
        self._check(out, inp)
        count, code = inp.size // self.world, self._dtypes[inp.dtype]
        with self._in_order():
            if self._copies and self._copies.is_shared(out):
                self._copies.exchange(out, inp)
                return
            # NCCL would take as many multiprocessors for what stays here as for what a peer gets.
            self._cupy.copyto(out[self.rank], inp[self.rank])
            with self._group():
                for peer in (rank for rank in range(self.world) if rank != self.rank):
                    self._ranks.send(address_of(inp[peer]), count, code, peer, self._stream.ptr)
                    self._ranks.recv(address_of(out[peer]), count, code, peer, self._stream.ptr)

    def reduce_scatter(self, buffer: Array) -> None:
        self._check(buffer)
        count = buffer.size // self.world
        own = buffer[self.rank * count :][:count]
        with self._in_order():
            self._ranks.reduceScatter(
                *(address_of(buffer), address_of(own), count),
                *(self._dtypes[buffer.dtype], self._nccl.NCCL_SUM, self._stream.ptr),
            )

    def all_gather(self, buffer: Array) -> None:
        self._check(buffer)
        count = buffer.size // self.world
        own = buffer[self.rank * count :][:count]
        if self._copies and self._copies.is_shared(buffer):
            with self._in_order():
                self._copies.all_gather(buffer)
        else:
            self._all_gather(own, buffer)

    def gather(self, values: Array) -> Array:
        """On the GPU, if the values are: then out is the same array for every call with the same one."""
        if not isinstance(values, self._cupy.ndarray):
            return self._control.gather(values)
        self._check(values)
        key = address_of(values), values.size
        if key not in self._gathered:  # in the first step, so that later ones allocate nothing
            self._gathered[key] = self._cupy.zeros((self.world, *values.shape), values.dtype)
        self._all_gather(values, self._gathered[key])
        return self._gathered[key]

    def close(self) -> None:
        self._stream.synchronize()
        self._gathered.clear()
        if self._copies:
            self._copies.close()

    def barrier(self) -> None:
        self._control.barrier()

    def pulse(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        return self._control.pulse(values)

    def abort(self, code: int) -> None:
        self._control.abort(code)

    @contextmanager
    def aside(self) -> Iterator[None]:
        if self._is_aside():
            yield
            return
        self._follow()
        self._is_ahead = True
        with self._stream:
            yield

    def mark(self) -> Any:
        return self._stream.record(self._cupy.cuda.Event(disable_timing=True))

    def wait(self, mark: Any) -> None:
        self._cupy.cuda.get_current_stream().wait_event(mark)

    def join(self) -> None:
        if self._is_ahead:
            self._cupy.cuda.get_current_stream().wait_event(self._stream.record(self._ahead))
            self._is_ahead = False

    def _follow(self) -> None:
        """What is put aside from now on comes after what the current stream has been given."""
        self._stream.wait_event(self._cupy.cuda.get_current_stream().record(self._behind))

    def _is_aside(self) -> bool:
        return self._cupy.cuda.get_current_stream().ptr == self._stream.ptr

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """For a collective: on the communicator's stream, in the order of the current one, unless that is aside."""
        is_aside = self._is_aside()
        with self.aside():
            yield
        if not is_aside:
            self.join()

    @contextmanager
    def _group(self) -> Iterator[None]:
        """What is sent and received in it goes on at the same time."""
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def _all_gather(self, own: Array, out: Array) -> None:
        with self._in_order():
            code = self._nccl.NCCL_CHAR  # bytes, whatever they mean
            self._ranks.allGather(address_of(own), address_of(out), own.nbytes, code, self._stream.ptr)

    def _check(self, *arrays: Array) -> None:
        """NCCL takes addresses and counts, and believes them."""
        first = arrays[0]
        for array in arrays:
            assert isinstance(array, self._cupy.ndarray), type(array)
            assert array.flags.c_contiguous
            assert (array.dtype, array.size) == (first.dtype, first.size)


def new_id() -> bytes:
    """What ranks find each other by: one of them makes it, and all take it."""
    return _library().get_unique_id()


def _library() -> Any:
    """CuPy's binding of NCCL. UsageError if NCCL can't be loaded."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from cupy.cuda import nccl

    if not nccl.available:
        raise UsageError(
            "several ranks on GPUs need NCCL, which cannot be loaded (libnccl.so.2): "
            'pip install -e ".[cuda13]" (or cuda12); --device cpu does without'
        )
    return nccl
