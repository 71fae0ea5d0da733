"""A sum over ranks or lanes: see engine/ops/numpy/reduce.py. n divides by 8."""

from typing import Any

from engine.device import kernels
from engine.ops.cuda.scratch import blocks

Array = Any


def sum_slices(out: Array, slices: Array, add: bool = False) -> None:
    n = out.size
    kernels.launch(
        "reduce",
        "reduce_sum_slices",
        (blocks(n, 256 * 8),),
        (256,),
        *(out, slices, len(slices), add, n),
        defines=kernels.grad_variant(out.dtype),
    )
