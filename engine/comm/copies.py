"""What ranks on one machine exchange, copied from GPU to GPU by the copy engines.

NCCL's kernels take multiprocessors, which the multiplies then lack, and wait for them. Copies take none. Each rank puts
what the others are to have where they will read it, in memory that they have opened to it (CUDA, "Interprocess
Communication"), and tells them by a flag that it sets there too and that their streams wait for (CUDA driver, "Stream
Memory Operations"). Nothing is added up here, so the bits are those that NCCL would carry.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from engine.comm import Communicator, fingerprints
from engine.errors import UsageError

Array = Any

READY, DONE = range(2)  # what ranks tell each other: mine may be written to; yours has been
EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
HANDLE = 64  # bytes


class Shared(NamedTuple):
    """An array that the others may write to."""

    begin: int  # its addresses
    end: int
    everyones: list[int]  # where every rank's begins, in this rank's addresses


class Copies:
    """Exchanges on one stream, in the order in which they are called, which is the same on all ranks of `control`: of
    what lies in arrays that all of them have shared.
    """

    def __init__(self, control: Communicator, stream: Any):
        """All ranks call this together. UsageError where GPUs can't reach each other."""
        import cupy

        if control.local_world < control.world:
            raise UsageError("--carrier copies: the ranks are not all on one machine. Take --carrier nccl")
        self._cupy, self._control, self._stream = cupy, control, stream
        self._rank, self._world = control.rank, control.world
        self._opened: dict[tuple[int, bytes], int] = {}  # (peer, handle) -> where its memory lies here
        self._shared: list[Shared] = []
        self._told = cupy.zeros((2, self._world), np.uint32)  # whether each peer has told READY, and DONE
        cupy.cuda.get_current_stream().synchronize()  # zeros are there before a peer writes
        try:
            self._told_there = self._open(self._told)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise UsageError(
                f"--carrier copies: the GPU of rank {self._rank} cannot reach all others' memory ({error}). Take "
                "--carrier nccl"
            ) from error

    def share(self, array: Array) -> None:
        """The others may write to it from now on. All ranks call this together, with arrays of one size, which live
        until `close`: what takes its place later would be written to.
        """
        begin = address_of(array)
        self._shared.append(Shared(begin, begin + array.nbytes, self._open(array)))

    def is_shared(self, array: Array) -> bool:
        """Whether it lies in an array that has been shared: on all ranks or on none, if it is the same of each."""
        return self._find(array) is not None

    def exchange(self, out: Array, inp: Array) -> None:
        """out (world, n), shared, = what every rank has for this one: its inp (world, n) in this rank's row."""
        theirs, row = self._everyones(out), out[0].nbytes
        with self._meeting():
            for peer in self._peers():
                self._copy(theirs[peer] + self._rank * row, address_of(inp[peer]), row)
            self._copy(address_of(out[self._rank]), address_of(inp[self._rank]), row)

    def all_gather(self, buffer: Array) -> None:
        """buffer (world * n), shared, holds, in each rank's n elements, what that rank has there."""
        theirs, part = self._everyones(buffer), buffer.nbytes // self._world
        with self._meeting():
            for peer in self._peers():
                self._copy(theirs[peer] + self._rank * part, address_of(buffer) + self._rank * part, part)

    def close(self) -> None:
        """Lets go of the others' memory, before they give it back: a new array in its place could not be reached. All
        ranks call this together, with nothing under way.
        """
        self._control.barrier()
        for address in self._opened.values():
            self._cupy.cuda.runtime.ipcCloseMemHandle(address)
        self._opened.clear()
        self._shared.clear()
        self._control.barrier()

    def _peers(self) -> Iterator[int]:
        """The next one first: so no two ranks write to the same at a time."""
        return ((self._rank + i) % self._world for i in range(1, self._world))

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """What is copied in it finds the others' arrays free, as their streams have come so far too; and what this
        rank's stream is given later finds here what they have copied.
        """
        self._tell(READY)
        yield
        self._tell(DONE)

    def _tell(self, what: int) -> None:
        """In the order of the stream: all others that this rank has come so far, and waits until they have.

        Then it takes their flags down. A peer sets the same one again only after this rank has told the other, which it
        does later: so none is lost. (Counts would do without that, but a graph repeats what was recorded.)
        """
        driver, stream, size = _driver(), ctypes.c_void_p(self._stream.ptr), self._told.itemsize

        def write(address: int, flag: bool) -> None:
            _check(driver.cuStreamWriteValue32_v2(stream, ctypes.c_uint64(address), ctypes.c_uint32(flag), 0))

        for peer in self._peers():
            write(self._told_there[peer] + (what * self._world + self._rank) * size, True)
        for peer in self._peers():
            here = address_of(self._told) + (what * self._world + peer) * size
            _check(driver.cuStreamWaitValue32_v2(stream, ctypes.c_uint64(here), ctypes.c_uint32(True), EQUAL))
            write(here, False)

    def _copy(self, to: int, what: int, nbytes: int) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(to, what, nbytes, runtime.memcpyDefault, self._stream.ptr)

    def _find(self, array: Array) -> Shared | None:
        """The shared array that it lies in."""
        return next((each for each in self._shared if each.begin <= address_of(array) < each.end), None)

    def _everyones(self, array: Array) -> list[int]:
        """Where every rank's array lies in this rank's addresses."""
        shared = self._find(array)
        assert shared, "not in a shared array"
        return [address + address_of(array) - shared.begin for address in shared.everyones]

    def _open(self, array: Array) -> list[int]:
        """Where every rank's array lies in this rank's addresses."""
        runtime = self._cupy.cuda.runtime
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        address = ctypes.c_uint64(address_of(array))
        _check(_driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address))
        offset = np.array([address_of(array) - base.value], np.uint64)
        everyones = fingerprints(self._control, bytes(runtime.ipcGetMemHandle(base.value)) + offset.tobytes())
        found = []
        for peer, blob in enumerate(everyones):
            key = peer, blob[:HANDLE]
            if peer == self._rank:
                found.append(address_of(array))
                continue
            if key not in self._opened:
                self._opened[key] = runtime.ipcOpenMemHandle(blob[:HANDLE])
            found.append(self._opened[key] + int(np.frombuffer(blob[HANDLE:], np.uint64)[0]))
        return found


def address_of(array: Array) -> int:
    """Where an array of a GPU begins."""
    return array.data.ptr


def _check(error: int) -> None:
    assert error == 0, f"CUDA's error {error}"


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
