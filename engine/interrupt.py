"""Stopping a run from outside without losing anything."""

import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"


class StopRequest:
    """Whether someone asked the run to stop after the current step: SIGINT (Ctrl-C), SIGTERM, SIGUSR1, or a STOP file.

    SIGUSR1 and the file are the ways that survive mpirun, which follows SIGTERM with SIGKILL half a second later. A
    second Ctrl-C stops at once. The file, in out_dir, is removed when it has been seen.
    """

    def __init__(self, out_dir: Path | None):
        self._file = out_dir / STOP_FILE if out_dir else None
        self._reason = ""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def reason(self) -> str:
        """What asked for the stop, or "" if nothing did."""
        if self._file and self._file.exists():
            self._file.unlink()
            self._reason = f"the file {self._file}"
        return self._reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
