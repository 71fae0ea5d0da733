"""Causal self-attention: see engine/ops/numpy/attention.py; NH by lse's shape."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import kernels
from engine.ops.cuda.scratch import blocks, scratch

Array = Any

HEAD_SIZES = (16, 32, 64, 80, 96, 128)
ROWS = 64  # of a block, as in kernels_cu/attention.cu
THREADS = 128


def forward(out: Array, lse: Array, qkv: Array) -> None:
    (B, NH, T), HS = lse.shape, out.shape[-1] // lse.shape[1]
    _launch("attention_forward", B, NH, T, HS, out, lse, qkv)


def backward(dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array) -> None:
    (B, NH, T), HS = lse.shape, out.shape[-1] // lse.shape[1]
    (D,) = scratch((lse.shape, np.float32))
    kernels.launch(
        "attention",
        "attention_backward_d",
        (blocks(lse.size, 256),),
        (256,),
        *(D, dout, out, B, T, NH),
        defines={"HS": HS},
    )
    _launch("attention_backward_kv", B, NH, T, HS, dqkv, dout, qkv, lse, D)
    _launch("attention_backward_q", B, NH, T, HS, dqkv, dout, qkv, lse, D)


def scratch_bytes(dims: Mapping[str, int]) -> int:
    return dims["B"] * dims["NH"] * dims["T"] * 4


def shared_bytes(HS: int) -> dict[str, int]:
    """What a block of each kernel takes for its rows of q, k, v and dout, two steps' of those that it goes through."""
    query_step = 32 if HS > 64 else 64
    rows = {
        "attention_forward": 5 * ROWS,
        "attention_backward_kv": 2 * ROWS + 4 * query_step,
        "attention_backward_q": 6 * ROWS,
    }
    return {name: count * (HS + 8) * 2 for name, count in rows.items()}


def _launch(name: str, B: int, NH: int, T: int, HS: int, *arrays: Array) -> None:
    """A kernel with a block for each ROWS rows of a head."""
    kernels.launch(
        "attention",
        name,
        (blocks(T, ROWS), NH, B),
        (THREADS,),
        *(*arrays, B, T, NH),
        shared_bytes=shared_bytes(HS)[name],
        defines={"HS": HS},
    )
