"""Stopping a run from outside without losing anything."""

import signal
from pathlib import Path
from types import FrameType

import numpy as np

from engine.comm import Communicator

STOP_FILE = "STOP"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REASONS = ("", STOP_FILE, *(number.name for number in SIGNALS))


class StopRequest:
    """Whether someone asked the run to stop after the current step: SIGINT (Ctrl-C), SIGTERM, SIGUSR1, or a STOP file.

    SIGUSR1 and the file are the ways that survive mpirun, which follows SIGTERM with SIGKILL half a second later. A
    second Ctrl-C stops at once. The file, in out_dir, is removed when it has been seen.
    """

    def __init__(self, out_dir: Path | None):
        self._file = out_dir / STOP_FILE if out_dir else None
        self._reason = ""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def reason(self, comm: Communicator) -> str:
        """What asked for the stop, or "" if nothing did. All ranks call it together and get the same answer.

        A launcher passes a signal on to all ranks, but they may hear it in different steps. Rank 0 looks for the file.
        """
        if self._file and comm.rank == 0 and self._file.exists():
            self._file.unlink()
            self._reason = STOP_FILE
        heard = comm.gather(np.array([REASONS.index(self._reason)]))
        return REASONS[int(heard.max())]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
