"""What can go wrong for a user, and the exit code that says so. The codes are an interface: scripts rely on them.

0 done · 2 usage, or a kernel that does not compile · 3 data · 4 checkpoint or disk · 5 does not fit in memory
6 non-finite, gave up · 17 ranks hung, or their parameters differ
75 stopped on request and saved: the same command with -y 1 goes on · 130 stopped on request, nothing to save to
"""

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from engine.launcher import ranks

PATIENCE = 2.0  # seconds that other ranks wait for rank 0 to say the same


class UserError(Exception):
    """A mistake or misfortune that the user can mend: what, where, why and what to do, without a traceback."""

    exit_code: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} (exit {self.exit_code}): {super().__str__()}"


class UsageError(UserError):
    """An option that is unknown, contradictory or impossible."""

    exit_code, kind = 2, "usage error"


class DataError(UserError):
    """A token file, text or tokenizer that cannot be used."""

    exit_code, kind = 3, "data error"


class CheckpointError(UserError):
    """A checkpoint or run directory that cannot be written or read."""

    exit_code, kind = 4, "checkpoint error"


class OutOfMemoryError(UserError):
    """The run needs more memory than there is."""

    exit_code, kind = 5, "memory error"


class NonFiniteError(UserError):
    """The loss or the gradient stayed NaN or infinite."""

    exit_code, kind = 6, "numerical error"


STUCK = 17


class DesyncError(UserError):
    """Ranks whose parameters should be the same have different ones."""

    exit_code, kind = STUCK, "desync error"


def complain(error: BaseException) -> None:
    """Says what ended the program: a UserError's text, else a traceback.

    Most mistakes show on all ranks at once. Rank 0 speaks first, and its end is that of the others: they wait.
    """
    _, rank = ranks(os.environ)
    time.sleep(PATIENCE if rank else 0)
    if isinstance(error, UserError):
        print(error, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def exit_on_user_error(function: Callable[..., Any]) -> Callable[..., None]:
    """A command that exits with the code that function returns, or with a UserError's, its text on stderr."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            code = function(*args, **kwargs)
        except UserError as error:
            complain(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = STOPPED
        sys.exit(code)

    return command


STOPPED_AND_SAVED = 75  # EX_TEMPFAIL of sysexits.h
STOPPED = 130  # what a shell reports after Ctrl-C
