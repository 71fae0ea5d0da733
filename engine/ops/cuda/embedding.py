"""Token and position embedding: see engine/ops/numpy/embedding.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda.scratch import blocks, scratch

Array = Any

CHUNK = 64  # positions of a token that one block adds up, as in kernels_cu/embedding.cu


def forward(out: Array, inp: Array, wte: Array, wpe: Array) -> None:
    (B, T), (Vp, C), maxT = inp.shape, wte.shape, len(wpe)
    grid = (blocks(out.size, 256 * 8),)
    kernels.launch("embedding", "embedding_forward", grid, (256,), out, inp, wte, wpe, B, T, C, Vp, maxT)


def backward(dwte: Array, dwpe: Array, dout: Array, inp: Array, *, accumulate: bool) -> None:
    (B, T), (Vp, C), maxT, N = inp.shape, dwte.shape, len(dwpe), inp.size
    rows = _rows_of_partial(N)
    count, start, arrival, unsorted, ordered, partial = scratch(
        *[((Vp,), np.int32)] * 2, *[((N,), np.int32)] * 3, ((rows, C), np.float32)
    )
    grid, block = (blocks(N, 256),), (256,)
    count.fill(0)
    kernels.launch("embedding", "embedding_count", grid, block, arrival, count, inp, N, Vp)
    kernels.launch("embedding", "embedding_starts", (blocks(Vp, 1024),), (1024,), start, count, Vp)
    kernels.launch("embedding", "embedding_gather", grid, block, unsorted, arrival, start, inp, N, Vp)
    kernels.launch("embedding", "embedding_rank", grid, block, ordered, unsorted, start, count, inp, N, Vp)

    defines, threads = kernels.grad_variant(dwte.dtype), min(blocks(C // 8, 32) * 32, 256)
    sizes = N, C, Vp, rows
    found = ordered, start, count, inp
    kernels.launch(
        "embedding",
        "embedding_backward_wte",
        (N,),
        (threads,),
        *(dwte, partial, dout, *found, *sizes),
        defines=defines,
    )
    kernels.launch(
        "embedding",
        "embedding_backward_wte_chunks",
        (blocks(N, CHUNK),),
        (threads,),
        *(dwte, partial, *found, *sizes),
        defines=defines,
    )
    kernels.launch(
        "embedding",
        "embedding_backward_wpe",
        (blocks((T if accumulate else maxT) * C, 256 * 8),),
        (256,),
        *(dwpe, dout, accumulate, B, T, C, maxT),
        defines=defines,
    )


def _rows_of_partial(N: int) -> int:
    return 2 * blocks(N, CHUNK)


def scratch_bytes(dims: Mapping[str, int]) -> int:
    N = dims["B"] * dims["T"]
    return 4 * (2 * dims["Vp"] + 3 * N + _rows_of_partial(N) * dims["C"])
