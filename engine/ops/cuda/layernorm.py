"""Layer normalisation: see engine/ops/numpy/layernorm.py. N = B * T rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda.scratch import MULTIPROCESSORS, blocks, scratch, share_out

Array = Any

# Of backward, whose blocks each leave sums of 3 C numbers, to be added up: all blocks run at a time.
MOST_BLOCKS = 4  # on a multiprocessor
REGISTERS, ALL_REGISTERS = {1: 80, 2: 128}, 64 << 10  # of a thread, by the packs that it takes; of a multiprocessor
FEWEST_ROWS = 8  # of a block
STAGES = 2  # as in kernels_cu/layernorm.cu


def forward(out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
    N, C = mean.size, weight.size
    defines = packs(C)
    kernels.launch(
        "layernorm",
        "layernorm_forward",
        (N if "WIDE" in defines else blocks(N, 8),),
        (256,),
        *(out, mean, rstd, inp, weight, bias, N, C, out.shape[-1]),
        defines=defines,
    )


def backward(
    dinp: Array,
    dweight: Array,
    dbias: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    mean: Array,
    rstd: Array,
    dinp_sum: Array | None = None,
    *,
    accumulate: bool,
) -> None:
    N, C = mean.size, weight.size
    rows, count = shares(N, C)
    defines = packs(C) | kernels.grad_variant(dweight.dtype)
    (partial,) = scratch(((count, 3, C), np.float32))
    kernels.launch(
        "layernorm",
        "layernorm_backward",
        (count,),
        (threads(C),),
        *(dinp, partial, dout, inp, weight, mean, rstd, rows, count, N, C),
        shared_bytes=STAGES * 3 * C * 2,
        defines=defines,
    )
    kernels.launch(
        "layernorm",
        "layernorm_backward_sums",
        (blocks(C, 32), 3),
        (32, 32),
        *(dweight, dbias, dinp_sum, partial, accumulate, count, C),
        defines=defines,
    )


def scratch_bytes(dims: Mapping[str, int]) -> int:
    _, count = shares(dims["B"] * dims["T"], dims["C"])
    return count * 3 * dims["C"] * 4


def shares(N: int, C: int) -> tuple[int, int]:
    """(rows of a block, blocks) of backward."""
    room = ALL_REGISTERS // (threads(C) * REGISTERS[packs(C)["PACKS"]])
    return share_out(N, MULTIPROCESSORS * min(MOST_BLOCKS, room), FEWEST_ROWS)


def threads(C: int) -> int:
    """Of a block of backward: whole warps, which have all packs of a row."""
    return blocks(blocks(C // 8, packs(C)["PACKS"]), 32) * 32


def packs(C: int) -> dict[str, int]:
    """Packs of 8 channels that a thread takes: up to 8 of 32 threads in forward, or 4 of 256; in backward, registers
    allow 768 threads with one, 512 with two.
    """
    forward = {"ROW_PACKS": blocks(C, 32 * 8)} if C <= 32 * 8 * 8 else {"ROW_PACKS": blocks(C, 256 * 8), "WIDE": 1}
    return forward | {"PACKS": 1 if C <= 768 * 8 else 2}


MAX_C = 512 * 2 * 8
