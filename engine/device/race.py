"""Which of several ways to do the same on the GPU is the fastest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.device import cuda

Array = Any

ROUNDS = 10  # in each, every way still in the race runs once
FIRST_ROUNDS = 3  # the first loads code and is not timed; by the others the slow ones are dropped
SLOW = 1.25  # times the fastest
MOST = 32  # ways run in the rounds after the first, the fastest
TIE = 1.01  # times the fastest is as fast: then the order decides, and the same way wins more often
FLUSH_BYTES = 256 << 20
HEAD_START = 8  # fills before a round, whose first way would wait for the host else: the GPU has been idle meanwhile
NOISE = 1 << 18  # numbers, before they repeat


class FailedError(Exception):
    """What a way raises that turns out not to work here: it is out of the race."""


def fastest(ways: Sequence[Callable[[], None]]) -> tuple[int, list[float]]:
    """Which of them is the fastest, and the median of each one's seconds, infinitely many if it failed; some way must
    not. They run in turns, so that a clock that drifts is the same for all.
    """
    flush = cuda.zeros((FLUSH_BYTES,), np.uint8)

    def timed(way: Callable[[], None]) -> tuple[Any, Any]:
        # Takes the operands out of the GPU's cache, and long enough for the host to get ahead of the GPU.
        flush.fill(0)
        began = cuda.mark()
        way()
        return began, cuda.mark()

    racing = list(range(len(ways)))
    seconds: dict[int, list[float]] = {n: [] for n in racing}
    for turn in range(ROUNDS):
        for _ in range(HEAD_START):
            flush.fill(0)
        marks = {}
        for n in racing:
            try:
                marks[n] = timed(ways[n])
            except FailedError:
                seconds[n] = [math.inf]
        racing = list(marks)
        for n, (began, ended) in marks.items():
            seconds[n] += [cuda.seconds_between(began, ended)] if turn else []
        if turn == FIRST_ROUNDS - 1:
            least = {n: min(seconds[n]) for n in racing}
            best = min(least.values())
            # Ties are ties here too: of those as fast as the fastest, the first stay.
            by_speed = sorted(racing, key=lambda n: max(least[n], TIE * best))
            racing = sorted(n for n in by_speed[:MOST] if least[n] <= SLOW * best)
    medians = [float(np.median(seconds[n])) for n in range(len(ways))]
    limit = TIE * min(medians[n] for n in racing)
    return next(n for n in racing if medians[n] <= limit), medians


def noise(shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Array:
    """An array of normal numbers times scale, which repeat: zeros are multiplied faster, for they cost less power."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    numbers = (scale * np.random.default_rng(0).standard_normal(min(size, NOISE), np.float32)).astype(dtype)
    array, filled = cuda.zeros((size * dtype.itemsize,), np.uint8), numbers.nbytes
    array[:filled] = cuda.to_device(numbers.view(np.uint8))
    while filled < array.size:
        more = min(filled, array.size - filled)
        array[filled : filled + more] = array[:more]
        filled += more
    return array.view(dtype).reshape(shape)
