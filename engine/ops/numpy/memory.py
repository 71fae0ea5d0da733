"""Scratch arrays, and row blocks on all cores: how these functions stay in the cache and allocate nothing in a step.

numpy's matrix multiply uses every core, its elementwise functions one. But they release Python's lock, so threads
that each take the next block of rows keep all cores busy. What a block computes never depends on who computes it, and
blocks depend on shapes alone: the same bits on any number of cores.
"""

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

# Elements of a block: few enough that what one pass over it writes is still in a core's L2 cache when the next pass
# reads it (64 Ki float32 are 256 KiB), and enough that numpy's own cost of a call does not show.
BLOCK = 2**20
SMALLEST_BLOCK = 2**13

_scratch = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, reused by every later call with this name on this thread."""
    size = math.prod(shape)
    buffers = _scratch.__dict__.setdefault("buffers", {})
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.size < size:
        buffer = buffers[name, dtype] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def rows(x: np.ndarray) -> np.ndarray:
    """x as a matrix (N, last dimension): a view, never a copy that writes would miss."""
    assert x.flags.c_contiguous
    return x.reshape(-1, x.shape[-1])


def blocks(n: int, width: int) -> list[slice]:
    """Slices that cover n rows of `width` elements: blocks of nearly equal size, an even number where that pays."""
    count = -(-n * width // BLOCK)
    if n * width >= 2 * SMALLEST_BLOCK:
        count += count % 2
    step = -(-n // max(1, count))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def for_each_block(function: Callable[[slice], None], n: int, width: int) -> None:
    """function(block) for each of blocks(n, width), on all cores."""
    todo = blocks(n, width)
    if len(todo) == 1 or CORES == 1:
        for block in todo:
            function(block)
    else:
        _team().run(function, todo)


def column_sums(function: Callable[[slice], tuple[np.ndarray, ...]], n: int, width: int) -> list[np.ndarray]:
    """The sums over blocks of the arrays that function(block) returns: added in the order of the blocks."""
    parts: dict[int, tuple[np.ndarray, ...]] = {}

    def keep(block: slice) -> None:
        parts[block.start] = function(block)

    for_each_block(keep, n, width)
    return [
        sum(arrays[1:], arrays[0]) for arrays in zip(*(parts[start] for start in sorted(parts)), strict=True)
    ]


def _cores() -> int:
    """As many threads as the matrix multiply uses: OMP_NUM_THREADS, else the cores this process may run on."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return int(setting) if setting.isdigit() and int(setting) > 0 else len(os.sched_getaffinity(0))


CORES = _cores()


class _Team:
    """Threads that share out a list of blocks with the caller, who works too."""

    def __init__(self, helpers: int):
        self._calls: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(helpers)]
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        for calls in self._calls:
            threading.Thread(target=self._serve, args=(calls,), daemon=True).start()

    def run(self, function: Callable[[slice], None], todo: list[slice]) -> None:
        next_block = iter(todo)
        helpers = self._calls[: len(todo) - 1]
        for calls in helpers:
            calls.put((function, next_block))
        errors = [self._work(function, next_block), *(self._done.get() for _ in helpers)]
        for error in errors:
            if error:
                raise error

    def _serve(self, calls: queue.SimpleQueue) -> None:
        while True:
            self._done.put(self._work(*calls.get()))

    @staticmethod
    def _work(function: Callable[[slice], None], next_block: Iterator[slice]) -> BaseException | None:
        try:
            for (
                block
            ) in next_block:  # taking the next one is atomic: iterators of lists are, under Python's lock
                function(block)
        except BaseException as error:
            return error
        return None


_teams: dict[int, _Team] = {}


def _team() -> _Team:
    """This process's team: threads do not survive a fork."""
    pid = os.getpid()
    if pid not in _teams:
        _teams[pid] = _Team(CORES - 1)
    return _teams[pid]
