"""What ranks on one machine exchange, copied from GPU to GPU by the copy engines.

NCCL's kernels take multiprocessors, which the multiplies then lack, and wait for them. Copies take none. Each rank puts
what the others are to have where they will read it, in memory that they have opened to it (CUDA, "Interprocess
Communication"), and tells them by a flag that it sets there too and that their streams wait for (CUDA driver, "Stream
Memory Operations"). Nothing is added up here, so the bits are those that NCCL would carry.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from engine.comm import Communicator, fingerprints
from engine.errors import UsageError

Array = Any
T = TypeVar("T")

READY, DONE = range(2)  # what ranks tell each other: mine may be written to; yours has been
WAIT, WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, _WRITE_VALUE_32
EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
HANDLE = 64  # bytes


class MemoryOperation(ctypes.Structure):
    """CUstreamBatchMemOpParams, of which flags mean something to WAIT alone."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("unused", ctypes.c_uint64 * 2),
    )


class Shared(NamedTuple):
    """An array that the others may write to."""

    begin: int  # its addresses
    end: int
    everyones: list[int]  # where every rank's begins, in this rank's addresses


class Copies:
    """Exchanges in the order of one stream, in which they are called, the same on all ranks of `control`: of what lies
    in arrays that all of them have shared.
    """

    def __init__(self, control: Communicator, stream: Any):
        """All ranks call this together. UsageError, on all of them, where GPUs can't reach each other."""
        import cupy

        if control.local_world < control.world:
            raise UsageError("the ranks are on several machines, between which --carrier nccl alone carries")
        self._cupy, self._control, self._stream = cupy, control, stream
        self._rank, self._world = control.rank, control.world
        self._opened: dict[tuple[int, bytes], int] = {}  # (peer, handle) -> where its memory lies here
        self._shared: list[Shared] = []
        self._told = cupy.zeros((2, self._world), np.uint32)  # whether each peer has told READY, and DONE
        cupy.cuda.get_current_stream().synchronize()  # zeros are there before a peer writes
        self._told_there = self._open(self._told)

    def share(self, array: Array) -> None:
        """The others may write to it from now on. All ranks call this together, with arrays of one size, which live
        until `close`: what takes its place later would be written to. UsageError, on all, where one can't reach it.
        """
        begin = address_of(array)
        self._shared.append(Shared(begin, begin + array.nbytes, self._open(array)))

    def is_shared(self, array: Array) -> bool:
        """Whether it lies in an array that has been shared: on all ranks or on none, if it is the same of each."""
        return self._find(array) is not None

    def exchange(self, out: Array, inp: Array) -> None:
        """out (world, n), shared, = what every rank has for this one: its inp (world, n) in this rank's row."""
        theirs, row = self._everyones(out), out[0].nbytes
        self._meet(READY)
        for peer in self._peers():
            self._copy(theirs[peer] + self._rank * row, address_of(inp[peer]), row)
        self._tell(DONE)
        self._copy(address_of(out[self._rank]), address_of(inp[self._rank]), row)  # while others' copies arrive
        self._wait(DONE)

    def all_gather(self, buffer: Array) -> None:
        """buffer (world * n), shared, holds, in each rank's n elements, what that rank has there."""
        theirs, part = self._everyones(buffer), buffer.nbytes // self._world
        own = self._rank * part
        self._meet(READY)
        for peer in self._peers():
            self._copy(theirs[peer] + own, address_of(buffer) + own, part)
        self._meet(DONE)

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

    def _peers(self) -> list[int]:
        """The next one first: so no two ranks write to the same at a time."""
        return [(self._rank + i) % self._world for i in range(1, self._world)]

    def _copy(self, to: int, what: int, nbytes: int) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(to, what, nbytes, runtime.memcpyDefault, self._stream.ptr)

    def _meet(self, what: int) -> None:
        self._tell(what)
        self._wait(what)

    def _tell(self, what: int) -> None:
        """In the order of the stream: all others that this rank has come so far."""
        flags = [self._flag(self._told_there[peer], what, self._rank) for peer in self._peers()]
        self._operate([MemoryOperation(WRITE, flag, True) for flag in flags])

    def _wait(self, what: int) -> None:
        """In the order of the stream: until all others have told it. Then their flags are taken down.

        A peer sets the same one again only after this rank has told the other, which it does later: so none is lost.
        (Counts would do without that, but a graph repeats what was recorded.)
        """
        flags = [self._flag(address_of(self._told), what, peer) for peer in self._peers()]
        waits = [MemoryOperation(WAIT, flag, True, EQUAL) for flag in flags]
        self._operate([*waits, *(MemoryOperation(WRITE, flag, False) for flag in flags)])

    def _flag(self, begin: int, what: int, rank: int) -> int:
        """Where it stands, in an array like `told` that begins there, whether a rank has told that."""
        return begin + (what * self._world + rank) * self._told.itemsize

    def _operate(self, operations: list[MemoryOperation]) -> None:
        stream, count = ctypes.c_void_p(self._stream.ptr), len(operations)
        _check(_driver().cuStreamBatchMemOp_v2(stream, count, (MemoryOperation * count)(*operations), 0))

    def _find(self, array: Array) -> Shared | None:
        """The shared array that it lies in."""
        return next((each for each in self._shared if each.begin <= address_of(array) < each.end), None)

    def _everyones(self, array: Array) -> list[int]:
        """Where every rank's array lies in this rank's addresses."""
        shared = self._find(array)
        assert shared, "not in a shared array"
        return [address + address_of(array) - shared.begin for address in shared.everyones]

    def _open(self, array: Array) -> list[int]:
        """Where every rank's array lies in this rank's addresses. All ranks call this together."""
        everyones = fingerprints(self._control, self._agreed(self._place_of, array))
        return self._agreed(self._open_places, array, everyones)

    def _place_of(self, array: Array) -> bytes:
        """Where it lies, for other processes: a handle of the memory in which it does, and how far behind its begin."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        address = ctypes.c_uint64(address_of(array))
        _check(_driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address))
        offset = np.array([address_of(array) - base.value], np.uint64)
        return bytes(self._cupy.cuda.runtime.ipcGetMemHandle(base.value)) + offset.tobytes()

    def _open_places(self, array: Array, everyones: list[bytes]) -> list[int]:
        found = []
        for rank, place in enumerate(everyones):
            if rank == self._rank:
                found.append(address_of(array))
                continue
            key = rank, place[:HANDLE]
            if key not in self._opened:
                self._opened[key] = self._cupy.cuda.runtime.ipcOpenMemHandle(place[:HANDLE])
            found.append(self._opened[key] + int(np.frombuffer(place[HANDLE:], np.uint64)[0]))
        return found

    def _agreed(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args), which all ranks call together: UsageError on all of them, where CUDA refuses it on one."""
        refused = self._cupy.cuda.runtime.CUDARuntimeError
        status = 0
        try:
            result = function(*args)
        except refused as error:
            status = error.status
        statuses = self._control.gather(np.array([status], np.float64))[:, 0].astype(int)
        if statuses.any():
            rank = int(statuses.argmax())
            self.close()
            raise UsageError(
                f"the GPU of rank {rank} and the others cannot reach each other's memory ({refused(statuses[rank])}), "
                "which --carrier nccl does without"
            )
        return result


def address_of(array: Array) -> int:
    """Where an array of a GPU begins."""
    return array.data.ptr


def _check(error: int) -> None:
    assert error == 0, f"CUDA's error {error}"


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
