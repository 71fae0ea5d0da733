"""What a run says: the status line for people, main.log in llm.c's format, log.jsonl for programs.

main.log    s:STEP tel:LOSS                      validation loss
            s:STEP trl:LOSS lr:RATE norm:NORM    training step
log.jsonl   one object a line, with "step" and "kind":
            train: loss, lr, norm, loss_z, norm_z (null until known), skipped, tokens, ms
            val:   loss            sample: text
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from engine.errors import CheckpointError
from engine.launcher import ranks

SECONDS_BETWEEN_LINES = 1.0  # of the status, where it can't be overwritten in place


class RunLog:
    """Logs of one run: to `stream`, and to files in out_dir if there is one.

    A resumed run keeps the lines of the steps before `start` and writes the rest again, so that the files read as
    those of a run that never stopped. A log that can't be written any more never ends a run: it says so once.
    """

    def __init__(self, out_dir: Path | None, start: int, steps: int, stream: TextIO | None = None):
        stream = stream or sys.stdout
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        self._stream, self._start, self._steps = stream, start, steps
        # Open MPI's mpirun gives a rank a terminal even where all that is printed goes into a file.
        self._live = stream.isatty() and ranks(os.environ)[0] == 1
        self._line_open = False
        self._last_line = -math.inf
        self._began = time.monotonic()
        self._files: dict[str, FileIO] = {}
        if out_dir:
            try:
                for name, step_of in (("main.log", _main_log_step), ("log.jsonl", _jsonl_step)):
                    self._files[name] = _reopen(out_dir / name, start, step_of)
            except OSError as error:
                raise CheckpointError(f"{out_dir}: cannot write the logs: {error.strerror}") from error

    def say(self, text: str) -> None:
        """A line for people."""
        self._show("\n" * self._line_open + text + "\n")
        self._line_open = False

    def _show(self, text: str) -> None:
        """text on the stream; into the void from the first time on that the stream cannot take it."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # What the stream still holds must go nowhere too, or Python's own flush at the end would fail.
            void = silence()
            with contextlib.suppress(OSError):
                os.dup2(void.fileno(), self._stream.fileno())
            self._stream, self._live = void, False

    def train(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        norm: float,
        loss_z: float,
        norm_z: float,
        skipped: bool,
        tokens: int,
        seconds: float,
    ) -> None:
        """Step `step` (from 0) is done: its mean loss, learning rate, gradient norm, z-scores, tokens and time."""
        self._write("main.log", f"s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}")
        self._record(
            step,
            "train",
            loss=loss,
            lr=lr,
            norm=norm,
            loss_z=loss_z,
            norm_z=norm_z,
            skipped=skipped,
            tokens=tokens,
            ms=round(seconds * 1000, 3),
        )
        done = step + 1 - self._start
        left = (time.monotonic() - self._began) / done * (self._steps - step - 1)
        self._status(
            f"step {step + 1:{len(str(self._steps))}}/{self._steps} | {duration(left)} left | "
            f"loss {loss:.4f}{_score(loss_z)} | norm {norm:.3f}{_score(norm_z)} | lr {lr:.2e} | "
            f"{seconds * 1000:.1f} ms | {tokens / seconds:,.0f} tok/s",
            last=step + 1 == self._steps,
        )
        if skipped:
            self.say(
                f"step {step + 1}: update skipped, loss {loss:.4g}{_score(loss_z)}, norm {norm:.4g}{_score(norm_z)}"
            )

    def validation(self, step: int, loss: float) -> None:
        """Validation loss after `step` updates."""
        self._write("main.log", f"s:{step} tel:{loss:.4f}")
        self._record(step, "val", loss=loss)
        self.say(f"step {step}: validation loss {loss:.4f}")

    def sample(self, step: int, text: str) -> None:
        """Text generated after `step` updates."""
        self._record(step, "sample", text=text)
        self.say(f"step {step}: sample\n---\n{printable(text)}\n---")

    def close(self) -> None:
        if self._line_open:
            self._show("\n")
        for file in self._files.values():
            file.close()

    def _status(self, line: str, *, last: bool) -> None:
        if self._live:
            width = os.get_terminal_size(self._stream.fileno()).columns
            self._show("\r\x1b[K" + line[: width - 1])
            self._line_open = True
        elif last or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(line)

    def _record(self, step: int, kind: str, **values: Any) -> None:
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._write("log.jsonl", json.dumps({"step": step, "kind": kind, **plain}))

    def _write(self, name: str, line: str) -> None:
        file = self._files.get(name)
        if file is None:
            return
        try:
            rest = (line + "\n").encode()
            while rest:  # a disk that is nearly full takes a part
                rest = rest[file.write(rest) :]
        except OSError as error:
            self._files.pop(name).close()
            self.say(f"warning: {file.name} can't be written any more ({error.strerror}); training goes on without it")


def _score(z: float) -> str:
    """How many standard deviations off the last steps' mean, once there have been enough of them."""
    return f" ({z:+.2f}z)" if math.isfinite(z) else ""


def silence() -> TextIO:
    """A stream for ranks that have nothing to say."""
    return Path(os.devnull).open("w")


def printable(text: str) -> str:
    """text without control characters: a young model writes any, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def duration(seconds: float) -> str:
    """3h05m, 3m05s or 5s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _reopen(path: Path, start: int, step_of: Any) -> FileIO:
    """path open for appending, without the lines of steps from `start` on and what a crash cut short."""
    kept = []
    if start and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                if line.endswith("\n") and step_of(line) < start:
                    kept.append(line)
            except (ValueError, KeyError, IndexError):
                break
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("ab", buffering=0)  # a buffer would try again to write what the disk refused, when it is closed


def _main_log_step(line: str) -> int:
    return int(line.split()[0].removeprefix("s:"))


def _jsonl_step(line: str) -> int:
    return int(json.loads(line)["step"])
