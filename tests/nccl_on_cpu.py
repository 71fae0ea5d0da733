"""GPUs of several ranks on CPUs: CuPy's streams, events and NCCL, and of CUDA what engine/comm/ needs.

Arrays are numpy's, MPI carries them, and kernels run by the shim. What a GPU is given is done at once. But every access
to memory is noted with the stream that makes it, and the vector clocks of streams say what a GPU might do at the same
time (Lamport 1978; Mattern 1989): two accesses to the same memory, one of which writes, without an event between them,
end the program as a race.
"""

import ctypes
import mmap
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from engine import device, training
from engine.comm import copies
from engine.device import cublaslt, cuda, kernels, tuning
from tests import twins

# NCCL's numbers, as nccl.h gives them
CODES = {7: np.dtype(np.float32), 8: np.dtype(np.float64), 9: np.dtype(ml_dtypes.bfloat16)}
BYTES = 0
CODES[BYTES] = np.dtype(np.uint8)
SUM = 0
ID = bytes(range(128))
DEFAULT_STREAM = 0


class Access(NamedTuple):
    """Of a stream to the bytes from start to end, at a tick of its clock."""

    start: int
    end: int
    writes: bool
    stream: int
    tick: int
    what: str


class Gpu:
    """One rank's: what its streams have done, and what of that each of them knows to be done."""

    def __init__(self) -> None:
        self.current: Any = None  # stream
        self.clocks: dict[int, Counter[int]] = {DEFAULT_STREAM: Counter()}
        self.beside = 0  # how many operations were given to other streams
        self._accesses: list[Access] = []

    def new_stream(self) -> int:
        number = len(self.clocks)
        self.clocks[number] = Counter()
        return number

    def do(self, what: str, reads: Sequence[Any], writes: Sequence[Any], stream: int | None = None) -> None:
        """An operation is given to a stream, the current one unless it is named. AssertionError if it races."""
        stream = self.current.ptr if stream is None else stream
        clock = self.clocks[stream]
        clock[stream] += 1
        self.beside += stream != DEFAULT_STREAM
        for arrays, is_write in ((reads, False), (writes, True)):
            for array in arrays:
                if isinstance(array, np.ndarray) and array.size:
                    start = array.ctypes.data
                    mine = Access(start, start + array.nbytes, is_write, stream, clock[stream], what)
                    for other in self._accesses:
                        meets = other.start < mine.end and mine.start < other.end
                        knows = clock[other.stream] >= other.tick
                        assert not meets or knows or not (is_write or other.writes), f"race: {what} and {other.what}"
                    self._accesses.append(mine)
        known = {s: min(each[s] for each in self.clocks.values()) for s in self.clocks}
        self._accesses = [access for access in self._accesses if access.tick > known[access.stream]]


GPU = Gpu()


class Memory(np.ndarray):
    """A GPU's memory."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    def fill(self, value: Any) -> None:
        GPU.do("fill", [], [self])
        np.ndarray.fill(self, value)

    def __setitem__(self, where: Any, values: Any) -> None:
        GPU.do("copy", [values], [self[where]])
        np.ndarray.__setitem__(self, where, values)


def copyto(out: Memory, inp: Memory) -> None:
    assert out.dtype == inp.dtype  # or it is no copy of memory, but a kernel
    assert out.flags.c_contiguous
    assert inp.flags.c_contiguous
    out[...] = inp


class Pool:
    """A rank's memory, of which it gives pieces and takes none back: a file, so that other ranks can open it."""

    SIZE = 1 << 26

    def __init__(self, folder: Path, rank: int):
        self._folder, self.rank, self._taken = folder, rank, 0
        self._mapped: dict[int, np.ndarray] = {}
        path = self._path(rank)
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.truncate(self.SIZE)

    def _path(self, rank: int) -> Path:
        return self._folder / f"gpu{rank}"

    def of(self, rank: int) -> np.ndarray:
        """All of a rank's memory, as bytes."""
        if rank not in self._mapped:
            with self._path(rank).open("r+b") as file:
                self._mapped[rank] = np.frombuffer(mmap.mmap(file.fileno(), self.SIZE), np.uint8)
        return self._mapped[rank]

    def zeros(self, shape: Any, dtype: Any) -> Memory:
        """As a pool gives it: what was there before is of no concern."""
        dtype = np.dtype(dtype)
        start, nbytes = self._taken, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._taken += -(-nbytes // 256) * 256
        assert self._taken <= self.SIZE
        return self.of(self.rank)[start : start + nbytes].view(dtype).reshape(shape).view(Memory)

    def base(self, rank: int) -> int:
        return self.of(rank).ctypes.data


class RefusedError(RuntimeError):
    """CUDARuntimeError."""

    def __init__(self, status: int):
        super().__init__({208: "resource already mapped", 217: "peer access is not supported"}[status])
        self.status = status


class Runtime(SimpleNamespace):
    """Of CUDA's: memory of one process opened by another. A handle names a rank. Opened once until it is closed: CUDA
    refuses what is still opened, if its owner has given it back meanwhile.
    """

    memcpyDefault = 4
    unreachable: int | None = None  # a rank whose memory cannot be opened
    seconds = 0.0  # that a copy takes
    copied = 0  # how often

    def __init__(self, **names: Any):
        super().__init__(opened=set(), CUDARuntimeError=RefusedError, **names)

    def ipcGetMemHandle(self, base: int) -> bytes:
        assert base == self.pool.base(self.pool.rank), "not where an allocation begins"
        return bytes([self.pool.rank]) * 64

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        assert handle == handle[:1] * 64
        assert handle[0] != self.pool.rank, "a process cannot open its own memory"
        address = self.pool.base(handle[0])
        if address in self.opened:
            raise RefusedError(208)
        if handle[0] == self.unreachable:
            raise RefusedError(217)
        self.opened.add(address)
        return address

    def ipcCloseMemHandle(self, address: int) -> None:
        self.opened.remove(address)

    def memcpyAsync(self, to: int, what: int, nbytes: int, kind: int, stream: int) -> None:
        assert kind == self.memcpyDefault
        target, source = (_memory(address, nbytes, BYTES) for address in (to, what))
        GPU.do("memcpy", [source], [target], stream)
        time.sleep(self.seconds)
        target[...] = source
        Runtime.copied += 1


class Driver(SimpleNamespace):
    """Of CUDA's: numbers in memory that streams wait for until they are equal. Here the process does."""

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: ctypes.c_uint64) -> int:
        base._obj.value, size._obj.value = self.pool.base(self.pool.rank), self.pool.SIZE
        assert base._obj.value <= address.value < base._obj.value + size._obj.value
        return 0

    def cuStreamBatchMemOp_v2(self, stream: Any, count: int, operations: Any, flags: int) -> int:
        assert (count, flags) == (len(operations), 0)
        until = time.monotonic() + 30
        for each in operations:
            number = ctypes.c_uint32.from_address(each.address)
            if each.kind == copies.WRITE:
                number.value = each.value
                continue
            assert (each.kind, each.flags) == (copies.WAIT, copies.EQUAL)
            while number.value != each.value:
                assert time.monotonic() < until, "waits for a number that nobody writes"
                time.sleep(0)
        return 0


class Event:
    def __init__(self, disable_timing: bool = False):
        self.clock: Counter[int] = Counter()


class Stream:
    """default: the one, with which another kind than non_blocking would wait."""

    def __init__(self, non_blocking: bool = False, priority: int = 0, default: bool = False):
        assert non_blocking != default
        self.ptr = DEFAULT_STREAM if default else GPU.new_stream()
        self._before: list[Stream] = []

    def synchronize(self) -> None:
        pass

    def record(self, event: Event) -> Event:
        event.clock = GPU.clocks[self.ptr].copy()
        return event

    def wait_event(self, event: Event) -> None:
        GPU.clocks[self.ptr] |= event.clock  # the later of each

    def __enter__(self) -> "Stream":
        self._before.append(GPU.current)
        GPU.current = self
        return self

    def __exit__(self, *_: Any) -> None:
        GPU.current = self._before.pop()


class NcclError(RuntimeError):
    pass


def _memory(address: int, count: int, code: int) -> np.ndarray:
    dtype = CODES[code]
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, np.uint8).view(dtype)


class NcclCommunicator:
    """Carried by MPI. What one rank sends must be what the other expects, in number and kind."""

    def __init__(self, world: int, unique_id: bytes, rank: int):
        self._mpi = MPI.COMM_WORLD.Dup()
        assert (world, rank) == (self._mpi.size, self._mpi.rank)
        if unique_id != ID:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT: no such unique id")

    def send(self, address: int, count: int, code: int, peer: int, stream: int) -> None:
        assert peer != self._mpi.rank, "NCCL carries what need not be carried"
        _group().append(("send", self, address, count, code, peer, stream))

    def recv(self, address: int, count: int, code: int, peer: int, stream: int) -> None:
        _group().append(("recv", self, address, count, code, peer, stream))

    def exchange(self, calls: list[tuple]) -> None:
        """What a group has collected."""
        sends, recvs = (
            {peer: (address, count, code, stream) for kind, _, address, count, code, peer, stream in calls if kind == k}
            for k in ("send", "recv")
        )
        assert len(sends) + len(recvs) == len(calls)
        everyones = self._mpi.allgather({peer: call[1:3] for peer, call in sends.items()})
        for peer, (_, count, code, _) in recvs.items():
            assert everyones[peer][self._mpi.rank] == (count, code), "sent and received differ"
        requests = []
        for peer, (address, count, code, stream) in sends.items():
            sent = _memory(address, count, code)
            GPU.do("send", [sent], [], stream)
            requests.append(self._mpi.Isend(sent.view(np.uint8).copy(), peer))
        for peer, (address, count, code, stream) in recvs.items():
            received = _memory(address, count, code)
            GPU.do("recv", [], [received], stream)
            self._mpi.Recv(received.view(np.uint8), peer)
        MPI.Request.Waitall(requests)

    def allGather(self, address: int, out: int, count: int, code: int, stream: int) -> None:
        self._alike("allGather", count, code)
        sent, received = _memory(address, count, code), _memory(out, count * self._mpi.size, code)
        GPU.do("allGather", [sent], [received], stream)
        self._mpi.Allgather(sent.view(np.uint8).copy(), received.view(np.uint8))

    def reduceScatter(self, address: int, out: int, count: int, code: int, op: int, stream: int) -> None:
        self._alike("reduceScatter", count, code, op)
        assert op == SUM
        sent, received = _memory(address, count * self._mpi.size, code), _memory(out, count, code)
        GPU.do("reduceScatter", [sent], [received], stream)
        total = np.zeros(sent.size)
        self._mpi.Allreduce(sent.astype(np.float64), total)
        received[...] = total[self._mpi.rank * count :][:count]

    def _alike(self, *call: Any) -> None:
        assert self._mpi.allgather(call) == [call] * self._mpi.size, "ranks call different collectives"


_groups: list[list[tuple]] = []


def _group() -> list[tuple]:
    assert _groups, "outside a group each would wait for the other"
    return _groups[-1]


def _group_end() -> None:
    calls = _groups.pop()
    calls[0][1].exchange(calls)


def _cupy(pool: Pool) -> dict[str, ModuleType]:
    nccl = ModuleType("cupy.cuda.nccl")
    vars(nccl).update(
        available=True,
        NCCL_CHAR=BYTES,
        NCCL_FLOAT32=7,
        NCCL_FLOAT64=8,
        NCCL_BFLOAT16=9,
        NCCL_SUM=SUM,
        NcclCommunicator=NcclCommunicator,
        NcclError=NcclError,
        get_unique_id=lambda: ID,
        groupStart=lambda: _groups.append([]),
        groupEnd=_group_end,
    )
    GPU.current = Stream(default=True)
    cuda_module = ModuleType("cupy.cuda")
    vars(cuda_module).update(
        nccl=nccl,
        runtime=Runtime(pool=pool),
        Stream=Stream,
        Event=Event,
        get_current_stream=lambda: GPU.current,
        __path__=[],
    )
    cupy = ModuleType("cupy")
    vars(cupy).update(ndarray=Memory, copyto=copyto, zeros=pool.zeros, cuda=cuda_module, __path__=[])
    return {"cupy": cupy, "cupy.cuda": cuda_module, "cupy.cuda.nccl": nccl}


class _Kernels(kernels.Kernels):
    """The shim's, whose arguments are noted: a source says which of them it only reads."""

    def launch(self, source: str, name: str, grid: Any, block: Any, *args: Any, **options: Any) -> None:
        _, parameters = self.load(source, options.get("defines") or {})
        pointers = [(p, arg) for p, arg in zip(parameters[name], args, strict=True) if p.pointer]
        reads, writes = ([arg for p, arg in pointers if p.const == const] for const in (True, False))
        GPU.do(name, reads, writes)
        super().launch(source, name, grid, block, *args, **options)


def _matmul(out: Any, a: Any, b: Any, **options: Any) -> None:
    written = options.get("pre_gelu")
    reads = [value for name, value in options.items() if name != "pre_gelu"]
    GPU.do("matmul", [a, b, *reads], [out, written])
    twins.matmul(out, a, b, **options)


def _to_host(array: Any) -> np.ndarray:
    GPU.do("to_host", [array], [])
    return np.array(array)


@contextmanager
def several_gpus(folder: Path) -> Iterator[Gpu]:
    """training.build builds for a GPU, each rank's its own. folder: where files that are their memory can lie."""
    pool = Pool(folder, MPI.COMM_WORLD.rank)
    with twins.on("forward"), pytest.MonkeyPatch.context() as patch:
        for name, module in _cupy(pool).items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(device, "choose", lambda *_: "cuda")
        patch.setattr(kernels, "KERNELS", _Kernels(twins.ShimModule))
        patch.setattr(cublaslt, "matmul", _matmul)
        patch.setattr(tuning, "use", lambda table: None)
        patch.setattr(cuda, "take", lambda local_rank: (f"GPU {local_rank}".encode(), MPI.COMM_WORLD.size))
        patch.setattr(cuda, "zeros", pool.zeros)
        patch.setattr(copies, "_driver", lambda: Driver(pool=pool))
        patch.setattr(cuda, "to_device", lambda host: np.array(host).view(Memory))
        patch.setattr(cuda, "to_host", _to_host)
        patch.setattr(cuda, "available_bytes", lambda: 1 << 40)
        patch.setattr(cuda, "compute_capability", lambda: 80)
        patch.setattr(training, "cuda", cuda)
        yield GPU
