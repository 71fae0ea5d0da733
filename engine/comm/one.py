"""A single rank: everything is there already."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class InOrder:
    """Ranks whose collectives are done when they return, or that have none: nothing runs beside anything, and arrays
    need not be shared.
    """

    def share(self, array: Any) -> None:
        pass

    def close(self) -> None:
        pass

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def join(self) -> None:
        pass


class OneRank(InOrder):
    """The communicator of a run without company."""

    rank, world = 0, 1
    local_rank, local_world = 0, 1

    def exchange(self, out: Any, inp: Any) -> None:
        out[...] = inp

    def reduce_scatter(self, buffer: Any) -> None:
        pass

    def all_gather(self, buffer: Any) -> None:
        pass

    def gather(self, values: np.ndarray) -> np.ndarray:
        return values[None]

    def barrier(self) -> None:
        pass

    def pulse(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        return []

    def abort(self, code: int) -> None:
        sys.exit(code)
