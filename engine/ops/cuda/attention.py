"""Causal self-attention: see engine/ops/numpy/attention.py; NH by lse's shape."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from engine.device import kernels, tensor_map
from engine.ops.cuda.scratch import MULTIPROCESSORS, blocks, scratch

Array = Any

HEAD_SIZES = (16, 32, 64, 80, 96, 128)
ROWS = 64  # of a block, or of a warpgroup on Hopper, as in kernels_cu/attention.cu and attention_hopper.cu
THREADS = 128  # for them

# Whether Hopper's kernels are taken where there are some: kernels_cu/attention_hopper.cu.
for_hopper = False


class Block(NamedTuple):
    """What a block of Hopper's kernels is, as in that file: its warpgroups, of ROWS rows each, the stages that they go
    through, and how many blocks a multiprocessor has room for, which decides nothing but their order.
    """

    groups: int
    stages: int
    room: int


HOPPER = {  # by head size
    64: {"forward": Block(1, 2, 5), "backward_q": Block(2, 4, 2), "backward_kv": Block(1, 2, 3)},
    128: {"forward": Block(2, 2, 2), "backward_q": Block(2, 4, 1), "backward_kv": Block(1, 2, 2)},
}


def forward(out: Array, lse: Array, qkv: Array) -> None:
    (B, NH, T), HS = lse.shape, out.shape[-1] // lse.shape[1]
    if on_hopper(HS):
        _launch_hopper("forward", B, NH, T, HS, out, lse, tensor_map.rows(qkv, B, T, 3 * NH * HS))
    else:
        _launch("forward", B, NH, T, HS, out, lse, qkv)


def backward(dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array) -> None:
    (B, NH, T), HS = lse.shape, out.shape[-1] // lse.shape[1]
    if on_hopper(HS):
        count = blocks(T, ROWS)
        (statistics,) = scratch(((B, NH, count, 2, ROWS), np.float32))
        maps = tensor_map.rows(dout, B, T, NH * HS), tensor_map.rows(qkv, B, T, 3 * NH * HS)
        _launch_hopper("backward_q", B, NH, T, HS, dqkv, statistics, *maps, out, lse, count)
        _launch_hopper("backward_kv", B, NH, T, HS, dqkv, *maps, statistics, count)
        return
    (D,) = scratch((lse.shape, np.float32))
    kernels.launch(
        "attention",
        "attention_backward_d",
        (blocks(lse.size, 256),),
        (256,),
        *(D, dout, out, B, T, NH),
        defines={"HS": HS},
    )
    _launch("backward_kv", B, NH, T, HS, dqkv, dout, qkv, lse, D)
    _launch("backward_q", B, NH, T, HS, dqkv, dout, qkv, lse, D)


def scratch_bytes(dims: Mapping[str, int]) -> int:
    """D; of heads that Hopper's kernels are for, lse and D."""
    B, T, NH, C = (dims[name] for name in ("B", "T", "NH", "C"))
    if C // NH in HOPPER:
        return B * NH * blocks(T, ROWS) * 2 * ROWS * 4
    return B * NH * T * 4


def on_hopper(HS: int) -> bool:
    return for_hopper and HS in HOPPER


def shared_bytes(HS: int) -> dict[str, int]:
    """What a block of each kernel takes for its rows of q, k, v and dout, two steps' of those that it goes through."""
    query_step = 32 if HS > 64 else 64
    rows = {"forward": 5 * ROWS, "backward_kv": 2 * ROWS + 4 * query_step, "backward_q": 6 * ROWS}
    return {name: count * (HS + 8) * 2 for name, count in rows.items()}


def _launch(name: str, B: int, NH: int, T: int, HS: int, *arrays: Array) -> None:
    """A kernel with a block for each ROWS rows of a head."""
    kernels.launch(
        "attention",
        f"attention_{name}",
        (blocks(T, ROWS), NH, B),
        (THREADS,),
        *(*arrays, B, T, NH),
        shared_bytes=shared_bytes(HS)[name],
        defines={"HS": HS},
    )


def _launch_hopper(name: str, B: int, NH: int, T: int, HS: int, *args: Any) -> None:
    """A kernel with a warpgroup for each ROWS rows of a head; two arrays' rows in a stage."""
    block, own = HOPPER[HS][name], 1 if name == "forward" else 2
    shares = blocks(T, ROWS * block.groups)
    # So many that the longest of their blocks, started first, end before the others do.
    tail = min(B * NH, blocks(5 * block.room * MULTIPROCESSORS, 2 * (shares + 1)))
    kernels.launch(
        "attention_hopper",
        f"attention_hopper_{name}",
        (shares * B * NH,),
        (THREADS * block.groups,),
        *(*args, tail, B, T, NH),
        shared_bytes=(own * block.groups + 2 * block.stages) * ROWS * HS * 2,
        defines={"HS": HS},
    )
