"""Nothing hangs: when no rank gets on any more, the job ends, and says which rank is late and in what.

A rank that crashed is noticed by mpirun. One that is stopped, swapped out or stuck is not: the others wait for it in
their next exchange, for ever. So a thread of every rank tells the others all the time how far its rank is. A thread
that holds Python's lock for good stops this one too; then the other ranks report the silence.
"""

import faulthandler
import sys
import threading
import time
from typing import NamedTuple

import numpy as np

from engine.comm import Communicator
from engine.errors import STUCK

PHASES = ("start", "validation", "sample", "checkpoint", "data", "forward and backward", "update", "log")
INTERVAL = 0.5  # seconds between pulses
STAGGER = 2.0  # seconds that each rank waits longer than the one before
SILENT_AFTER = 2.0  # seconds without one: more than a busy machine makes of an interval


class Pulse(NamedTuple):
    """How far a rank is: a number that grows whenever it gets on, its step, and the index of its phase."""

    beat: float
    step: float
    phase: float


class Watchdog:
    """Ends the job with exit code 17 when no rank has got on for `limit` seconds. 0, or one rank: off."""

    def __init__(self, comm: Communicator, limit: float):
        self._comm, self._limit = comm, limit
        self._pulse = Pulse(0, 0, 0)
        if comm.world > 1 and limit > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """This rank begins a phase of a step."""
        self._pulse = Pulse(self._pulse.beat + 1, step, PHASES.index(phase))

    def tick(self) -> None:
        """This rank gets on within its phase, which may take longer than the limit."""
        self._pulse = self._pulse._replace(beat=self._pulse.beat + 1)

    def _watch(self) -> None:
        latest = np.zeros((self._comm.world, len(Pulse._fields)))
        heard = np.full(self._comm.world, time.monotonic())
        still, last = 0.0, time.monotonic()
        while True:
            own, now, before = np.array(self._pulse), time.monotonic(), latest[:, 0].copy()
            for rank, values in [*self._comm.pulse(own), (self._comm.rank, own)]:
                latest[rank], heard[rank] = values, now
            # A job that was suspended as a whole (Ctrl-Z, a laptop's lid) has not hung: only watched time counts.
            still = 0.0 if (latest[:, 0] != before).any() else still + min(now - last, 2 * INTERVAL)
            last = now
            # A rank at a time, so that one message is read and not many: the first that speaks ends all.
            if still > self._limit + self._comm.rank * STAGGER:
                self._end(latest, now - heard > SILENT_AFTER)
            time.sleep(INTERVAL)

    def _end(self, latest: np.ndarray, silent: np.ndarray) -> None:
        late = np.flatnonzero(silent if silent.any() else latest[:, 0] == latest[:, 0].min())
        lines = [f"watchdog (exit {STUCK}): no rank has got on for {self._limit:g} seconds"]
        for rank in late:
            pulse = Pulse(*latest[rank])
            state = "silent, perhaps stopped or dead" if silent[rank] else "the furthest behind"
            lines.append(f"  rank {rank} is {state}: step {pulse.step + 1:.0f}, {PHASES[int(pulse.phase)]}")
        lines.append("  look at that machine and process; --watchdog SECONDS allows more time, 0 any")
        print("\n".join(lines), file=sys.stderr, flush=True)
        if self._comm.rank in late:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._comm.abort(STUCK)
