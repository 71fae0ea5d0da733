"""Ranks on CPUs, over MPI."""

import os
import time

import numpy as np
from mpi4py import MPI

from engine.comm.one import InOrder
from engine.errors import UsageError

FORWARDING = 0.3  # seconds for mpirun to pass on what a rank has printed: after an abort it throws the rest away


class MPIRanks(InOrder):
    """The ranks of MPI_COMM_WORLD, or of another of MPI's communicators. Buffers are numpy arrays of any real dtype,
    bfloat16 among them.
    """

    def __init__(self, comm: MPI.Intracomm = MPI.COMM_WORLD) -> None:
        self._comm = comm
        self.rank, self.world = self._comm.rank, self._comm.size
        neighbours = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_world = neighbours.rank, neighbours.size
        neighbours.Free()
        self.library = MPI.Get_library_version().splitlines()[0]
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise UsageError(f"{self.library} was built without threads, which the watchdog needs: take another MPI")
        self._pulses = self._comm.Dup()  # its messages are never taken for those of the collectives
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []

    def exchange(self, out: np.ndarray, inp: np.ndarray) -> None:
        self._comm.Alltoall(_known(inp), _known(out))

    def reduce_scatter(self, buffer: np.ndarray) -> None:
        """Of dtypes that MPI can add: float32 and float64."""
        own = np.split(buffer, self.world)[self.rank]
        total = np.empty_like(own)
        self._comm.Reduce_scatter_block(buffer, total)
        own[...] = total

    def all_gather(self, buffer: np.ndarray) -> None:
        self._comm.Allgather(MPI.IN_PLACE, _known(buffer))

    def gather(self, values: np.ndarray) -> np.ndarray:
        values = np.array(values, np.float64, order="C")
        out = np.empty((self.world, *values.shape))
        self._comm.Allgather(values, out)
        return out

    def barrier(self) -> None:
        self._comm.Barrier()

    def pulse(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        # A message's memory must stay until it is sent; to a rank that listens no more it may never be.
        self._sent = [(request, message) for request, message in self._sent if not request.Test()]
        message = np.array(values, np.float64)
        for rank in range(self.world):
            if rank != self.rank:
                self._sent.append((self._pulses.Isend(message, rank), message))
        heard = []
        status = MPI.Status()
        while self._pulses.Iprobe(status=status):
            received = np.empty_like(message)
            self._pulses.Recv(received, source=status.Get_source())
            heard.append((status.Get_source(), received))
        return heard

    def abort(self, code: int) -> None:
        time.sleep(FORWARDING)
        self._comm.Abort(code)
        os._exit(code)  # MPICH's Abort can return, while the others are still being ended


def _known(array: np.ndarray) -> np.ndarray:
    """The same memory in a dtype that MPI knows: nothing is computed with it on its way."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
