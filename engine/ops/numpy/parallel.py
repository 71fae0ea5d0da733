"""Work in blocks, on all cores.

numpy's functions use one core, but release Python's lock while they compute: so threads that each take the next block
of an operation keep all cores busy. What a block computes does not depend on who computes it, and blocks depend on
shapes alone: the same bits on any number of cores. BLAS would bring threads of its own, which spin between calls and
take the cores from these; it gets one.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import threadpoolctl

from engine.launcher import ranks_on_this_machine

# Sharing out pays from about 100 microseconds of work a block on, for waking a thread takes tens of them.
MATMUL_ROWS = 384  # rows of a product in a block
ELEMENTS = 2**18  # of an elementwise pass in a block
FEW_ELEMENTS = 2**17  # not worth sharing

Task = Callable[[], None]


def split(n: int, most: int, least: int = 1) -> list[slice]:
    """Nearly equal slices of range(n): of `most` at most, an even number of them unless they would fall below least."""
    count = -(-n // most)
    if count % 2 and n // (count + 1) >= least:
        count += 1
    step = -(-n // count)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def matmul_blocks(n: int) -> list[slice]:
    """Blocks of the n rows of a matrix product."""
    return split(n, MATMUL_ROWS, MATMUL_ROWS // 8)


def blocks(n: int, width: int) -> list[slice]:
    """Blocks of n rows of `width` elements, for elementwise passes."""
    return split(n, max(1, ELEMENTS // width), max(1, FEW_ELEMENTS // 2 // width))


def for_each_block(function: Callable[[slice], None], n: int, width: int) -> None:
    """function(block) for each of blocks(n, width), on all cores."""
    run([partial(function, block) for block in blocks(n, width)])


def column_sums(function: Callable[[slice], tuple[np.ndarray, ...]], n: int, width: int) -> list[np.ndarray]:
    """The sums over blocks of the arrays that function(block) returns, added in the order of the blocks."""
    parts: dict[int, tuple[np.ndarray, ...]] = {}

    def keep(block: slice) -> None:
        parts[block.start] = function(block)

    for_each_block(keep, n, width)
    first, *others = (parts[start] for start in sorted(parts))
    return [sum(arrays[1:], arrays[0]) for arrays in zip(first, *others, strict=True)]


def run(tasks: Sequence[Task]) -> None:
    """Every task, on all cores. Tasks write to different places. Raises what one of them raised."""
    if len(tasks) == 1 or CORES == 1:
        for task in tasks:
            task()
    else:
        _team().run(tasks)


class _Team:
    """Threads that share out tasks with their caller, who works too."""

    def __init__(self, helpers: int):
        self._jobs: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(helpers)]
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        for jobs in self._jobs:
            threading.Thread(target=self._serve, args=(jobs,), daemon=True).start()

    def run(self, tasks: Sequence[Task]) -> None:
        remaining = iter(tasks)
        called = self._jobs[: len(tasks) - 1]
        for jobs in called:
            jobs.put(remaining)
        errors = [_work(remaining), *(self._done.get() for _ in called)]
        for error in errors:
            if error:
                raise error

    def _serve(self, jobs: queue.SimpleQueue) -> None:
        while True:
            self._done.put(_work(jobs.get()))


def _work(remaining: Iterator[Task]) -> BaseException | None:
    """Tasks until none remain; Python's lock sees to it that each goes to one thread."""
    try:
        for task in remaining:
            task()
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


def _cores() -> int:
    """OMP_NUM_THREADS, which a user sets who wants fewer, else this rank's part of the cores that it may run on."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_on_this_machine(os.environ))


CORES = _cores()
threadpoolctl.threadpool_limits(1, user_api="blas")
