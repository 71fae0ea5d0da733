"""The sums of a gradient's columns: see engine/ops/numpy/column_sums.py; and of what kernels left of such sums.

Kernels that read a gradient anyway leave sums of some rows each (`partial`), which a small kernel adds up. `together`
has one launch for all of a layer instead of one each.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from engine.device import cuda, kernels
from engine.device.kernels import address_of
from engine.ops.cuda.scratch import Memory, blocks, share_out

Array = Any

MOST_BLOCKS = 128  # of rows, in the sums over them
FEWEST_ROWS = 128  # of a block
COLUMNS = 32  # of a block that adds up what others left


class Sum(NamedTuple):
    """The sums of the columns of `partial` from `first` on, for out."""

    out: Array
    partial: Array
    first: int


OF_PARTIAL_SUMS = Memory()
_waiting: list[tuple[Sum, bool]] | None = None  # and whether it accumulates; None: nothing waits
_tables: dict[tuple[int, ...], Array] = {}  # a table holds addresses, never what lies there: it stays true


def add(out: Array, x: Array, *, accumulate: bool) -> None:
    C = out.size
    N = x.size // C
    rows, count = share_out(N, MOST_BLOCKS, FEWEST_ROWS)
    left = partial(count, C)
    kernels.launch(
        "column_sums",
        "column_sums_of_blocks",
        (blocks(C, 256), count),
        (256,),
        *(left, x, rows, count, N, C),
        defines=kernels.grad_variant(out.dtype),
    )
    add_up([out], left, accumulate=accumulate)


@contextmanager
def together() -> Iterator[None]:
    global _waiting
    _waiting = []
    try:
        yield
        if _waiting:
            _launch([each for each, _ in _waiting], {accumulates for _, accumulates in _waiting})
    finally:
        _waiting = None
        OF_PARTIAL_SUMS.give_back()


def partial(rows: int, columns: int) -> Array:
    """Uninitialised fp32 (rows,columns), where a kernel leaves sums, till add_up has added them up."""
    return OF_PARTIAL_SUMS.take((rows, columns), np.float32)


def add_up(outs: Sequence[Array | None], partial: Array, *, accumulate: bool) -> None:
    """outs, which have the columns of partial side by side, = the sums of its columns; += with accumulate. None:
    nobody asks for those. Inside `together`, when that ends.
    """
    ends = np.cumsum([partial.shape[1] // len(outs)] * len(outs))
    sums = [Sum(out, partial, int(end) - out.size) for out, end in zip(outs, ends, strict=True) if out is not None]
    if _waiting is None:
        _launch(sums, {accumulate})
        OF_PARTIAL_SUMS.give_back()
    else:
        _waiting.extend((each, accumulate) for each in sums)


def _launch(sums: Sequence[Sum], accumulates: set[bool]) -> None:
    (accumulate,), (dtype,) = accumulates, {out.dtype for out, _, _ in sums}
    table, block = [], 0
    for out, partial, first in sums:
        rows, stride = partial.shape
        assert first + out.size <= stride
        table += [address_of(out), address_of(partial) + first * partial.itemsize, rows, stride, out.size, block]
        block += blocks(out.size, COLUMNS)
    if (key := tuple(table)) not in _tables:
        _tables[key] = cuda.to_device(np.array(table, np.int64))
    kernels.launch(
        "column_sums",
        "column_sums_add",
        (block,),
        (COLUMNS, 32),
        *(_tables[key], accumulate, len(sums)),
        defines=kernels.grad_variant(dtype),
    )


def partial_bytes(dims: Mapping[str, int]) -> int:
    """Of the widest bias, that of 4 C channels."""
    _, count = share_out(dims["B"] * dims["T"], MOST_BLOCKS, FEWEST_ROWS)
    return count * 4 * dims["C"] * 4
