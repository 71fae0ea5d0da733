"""How long a run takes to its first step: `python bench/first_step.py -- -i ... -j ... -e d12 -b 64 -r 0`.

Starts train.py as a user does, with the options behind `--`, for two steps: first with an empty cache of kernels and
algorithms, then with what that has left there. Of each the seconds from launch to each line that it prints, so that one
sees what the time goes to, up to that of the first step. It is there when the step is done, and on a GPU, whose log
comes a step late, when the second one has been launched.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import circumstances, told
from engine import device
from engine.errors import UsageError, exit_on_user_error

TRAIN = Path(__file__).parent.parent / "train.py"
FIRST = "step 1/"  # the beginning of the line


class Line(NamedTuple):
    """What train.py printed, and how many seconds after its launch."""

    seconds: float
    text: str


def first_step(options: tuple[str, ...], cache: Path) -> list[Line]:
    """The lines up to the first step's. UsageError where the run ends before it."""
    command = [sys.executable, str(TRAIN), *options, "-x", "2"]
    began = time.monotonic()
    lines = []
    with subprocess.Popen(
        command,
        env=os.environ | {"BACKHAND_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        assert run.stdout
        for text in run.stdout:
            lines.append(Line(time.monotonic() - began, text.rstrip()))
            if text.startswith(FIRST):
                run.stdout.read()  # the rest of the run, which is not timed
                return lines
    raise UsageError("train.py ended before its first step: " + " ".join(line.text for line in lines[-3:]))


@click.command(context_settings={"show_default": True})
@click.option("--warm", default=2, help="Runs that find what the first has left in the cache.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@exit_on_user_error
def main(warm: int, options: tuple[str, ...]) -> None:
    """Seconds from launch to the first step of `train.py OPTIONS`, with an empty cache and with a full one."""
    backend = device.choose("auto", lambda line: None)
    print("\n".join(told(circumstances("bench/first_step.py", backend))))
    with tempfile.TemporaryDirectory(prefix="backhand-cache-") as cache:
        for name in ("cold", *["warm"] * warm):
            lines = first_step(options, Path(cache))
            print(
                f"\n{name}: {lines[-1].seconds:.2f} s",
                *(f"{line.seconds:8.2f}  {line.text}" for line in lines),
                sep="\n",
            )


if __name__ == "__main__":
    main()
