"""Ranks that train together: one interface, whatever carries it. At one rank every exchange is a no-op.

What a communicator offers, each a collective that all ranks call in the same order:

    rank, world               this one's number, and how many there are
    local_rank, local_world   the same among those on this machine
    share(array)              what will be exchanged and gathered again and again lies in such an array, which is of one
                              size on all ranks and lives until all call close
    close()                   nothing is exchanged any more, and arrays may go
    exchange(out, inp)        out (world, n) = what every rank has for this one: its inp (world, n) in this rank's row
    reduce_scatter(buffer)    buffer (world * n): this rank's n elements become the sum of all ranks' there
    all_gather(buffer)        buffer (world * n) holds, in each rank's n elements, what that rank has there
    gather(values)            float64 (world, n): every rank's values, float64 (n), where those are: a host's or a GPU's
    barrier()                 returns when all have called it
    pulse(values)             (not a collective, and on a thread of its own) sends values to all others, and gives
                              (rank, values) of what has come from them since, oldest first
    abort(code)               ends every rank at once (not a collective: one rank calls it)

On GPUs a collective, as every operation, is only given to the device, which does it in its turn. So one can go on
beside the computing that does not need it:

    with aside():             what the device is given in here, operations too, comes after all that it was given
                              before, and runs beside what it is given later
    mark()                    what has been put aside so far
    wait(mark)                what the device is given from now on comes after that
    join()                    what the device is given from now on comes after all that was put aside

Only reduce_scatter adds anything up, in its library's order. Other sums are made where their order is known, so the
same inputs give the same bits, whatever library carries them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from engine.comm.one import OneRank
from engine.errors import UsageError, UserError, complain
from engine.launcher import mismatch, ranks


class Communicator(Protocol):
    """See the module's docstring."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    def share(self, array: Any) -> None: ...
    def close(self) -> None: ...
    def exchange(self, out: Any, inp: Any) -> None: ...
    def reduce_scatter(self, buffer: Any) -> None: ...
    def all_gather(self, buffer: Any) -> None: ...
    def gather(self, values: Any) -> Any: ...
    def barrier(self) -> None: ...
    def pulse(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]: ...
    def abort(self, code: int) -> None: ...
    def aside(self) -> AbstractContextManager[None]: ...
    def mark(self) -> Any: ...
    def wait(self, mark: Any) -> None: ...
    def join(self) -> None: ...


def connect(environ: Mapping[str, str]) -> Communicator:
    """All ranks that the launcher has started. UsageError if they cannot find each other."""
    world, _ = ranks(environ)
    if world == 1:
        return OneRank()
    try:
        from engine.comm.mpi import MPIRanks
    except ImportError as error:
        raise UsageError(
            f"{world} ranks were started, but mpi4py cannot be loaded ({error}): "
            'pip install -e ".[mpi]", and start with the mpirun that it brings'
        ) from error
    comm = MPIRanks()
    if comm.world != world:
        raise UsageError(
            f"the launcher has started {world} ranks, but MPI sees {comm.world}: {mismatch(environ, comm.library)}"
        )
    return comm


def on_gpus(comm: Communicator, carrier: str, say: Callable[[str], None]) -> Communicator:
    """The same ranks for arrays on GPUs, each on one of its own, which is current. carrier, say: as NCCLRanks takes
    them. UsageError if they can't connect.
    """
    from engine.comm.nccl import NCCLRanks, new_id

    assert not isinstance(comm, OneRank)
    return NCCLRanks(comm, from_rank_0(comm, new_id() if comm.rank == 0 else b""), carrier, say)


@contextmanager
def ending_together(comm: Communicator) -> Iterator[None]:
    """An error on one rank ends all: otherwise the others would wait for it for ever. One rank says why."""
    try:
        yield
    except BaseException as error:
        if comm.world == 1 or isinstance(error, SystemExit):
            raise
        complain(error)
        comm.abort(error.exit_code if isinstance(error, UserError) else 1)


def fingerprints(comm: Communicator, digest: bytes) -> list[bytes]:
    """Every rank's digest, all of one length."""
    return [bytes(row.astype(np.uint8)) for row in comm.gather(np.frombuffer(digest, np.uint8).astype(np.float64))]


def from_rank_0(comm: Communicator, content: bytes) -> bytes:
    """Rank 0's content, whatever the other ranks give."""
    size = int(comm.gather(np.array([len(content)], np.float64))[0, 0])
    sent = np.zeros(size)
    if comm.rank == 0:
        sent[:] = np.frombuffer(content, np.uint8)
    return bytes(comm.gather(sent)[0].astype(np.uint8))
