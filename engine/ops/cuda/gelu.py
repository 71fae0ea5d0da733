"""GELU: see engine/ops/numpy/gelu.py."""

from typing import Any

from engine.device import kernels
from engine.ops.cuda.scratch import blocks

Array = Any

PER_BLOCK = 256 * 8  # elements: 8 for each thread


def forward(out: Array, inp: Array) -> None:
    kernels.launch("gelu", "gelu_forward", (blocks(inp.size, PER_BLOCK),), (256,), out, inp, inp.size)


def backward(dinp: Array, inp: Array) -> None:
    kernels.launch("gelu", "gelu_backward", (blocks(inp.size, PER_BLOCK),), (256,), dinp, inp, inp.size)
