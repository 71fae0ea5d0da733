"""Linear layers: see engine/ops/numpy/linear.py. N = B * T rows; the matrix multiplies are cublasLt's.

Its epilogues that add up a bias's gradient make a multiply take up to three times as long, and a pass of its own costs
more than one more column (bench/LOG.md, "One behind each row").
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from engine.device import cublaslt, cuda, kernels, race
from engine.ops.cuda import gelu
from engine.ops.cuda.scratch import blocks, scratch

Array = Any

# GELU inside the matrix multiply: 0 never, 1 in forward, 2 in backward too. What is fused may see fp32 where a pass of
# its own sees bf16.
gelu_fusion = 0


def forward(
    out: Array,
    inp: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    pre_gelu: Array | None = None,
) -> None:
    """residual is the multiply's addend; with pre_gelu there is none."""
    out, inp = _rows(out), _rows(inp)[:, : weight.shape[1]]
    skip, pre = None if residual is None else _rows(residual), None if pre_gelu is None else _rows(pre_gelu)
    if pre is None:
        cublaslt.matmul(out, inp, weight, transpose_b=True, add=skip, bias=bias)
    else:
        assert skip is None
        _gelu_of_product(out, pre, inp, weight, bias, fused=gelu_fusion >= 1 and bias is not None)


def backward(
    dinp: Array,
    dweight: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    *,
    pre_gelu: Array | None = None,
    dbias: Array | None = None,
    accumulate: bool,
) -> None:
    dout, dx, x = _rows(dout), _rows(dinp), _rows(inp)
    if pre_gelu is None:
        cublaslt.matmul(dx, dout, weight)
    else:
        _gradient_through_gelu(dx, dout, weight, _rows(pre_gelu), fused=gelu_fusion >= 2)
    if dbias is None:
        cublaslt.matmul(dweight, dout, x, transpose_a=True, add=dweight if accumulate else None)
    else:
        _gradients_in_one(dweight, dbias, dout, x, accumulate)


def _gradients_in_one(dweight: Array, dbias: Array, dout: Array, x: Array, accumulate: bool) -> None:
    """Of dout^T x (OC,Cx), the first columns are dweight's, the next is dbias; =, += with accumulate."""
    (OC, C), width = dweight.shape, x.shape[1]
    (product,) = scratch(((OC, width), dweight.dtype))
    cublaslt.matmul(product, dout, x, transpose_a=True)
    kernels.launch(
        "linear",
        "linear_share_out",
        (blocks(OC * C // 8, 256),),
        (256,),
        *(dweight, dbias, product, accumulate, OC, C, width),
        defines=kernels.grad_variant(dweight.dtype),
    )


def scratch_bytes(dims: Mapping[str, int], grad_dtype: Any) -> int:
    return 4 * dims["C"] * dims["Cx"] * np.dtype(grad_dtype).itemsize


def _gelu_of_product(out: Array, pre: Array, inp: Array, weight: Array, bias: Array | None, *, fused: bool) -> None:
    """pre (N,OC) = inp (N,C) weight (OC,C)^T + bias, out = gelu(pre)."""
    if fused:
        cublaslt.matmul(out, inp, weight, transpose_b=True, bias=bias, pre_gelu=pre)
    else:
        cublaslt.matmul(pre, inp, weight, transpose_b=True, bias=bias)
        gelu.forward(out, pre)


def _gradient_through_gelu(dx: Array, dout: Array, weight: Array, pre: Array, *, fused: bool) -> None:
    """dx (N,C) = dout (N,OC) weight (OC,C) times gelu'(pre)."""
    cublaslt.matmul(dx, dout, weight, dgelu=pre if fused else None)
    if not fused:
        gelu.backward(dx, pre)


def time_fusion(dims: Mapping[str, int]) -> dict[str, Any]:
    """The fastest gelu_fusion at these sizes, with the algorithms in use, as "level"; and for people the microseconds
    of a block's multiplies with GELU apart and fused. Of equally fast ways the one apart is taken: it rounds as -ge 0.

    No level fuses backward alone: where only that gains, both are fused if together they gain, else none.
    """
    N, C = dims["B"] * dims["T"], dims["C"]
    # Of the sizes that a run's numbers have: GELU takes longer for some than for others.
    x, bias = race.noise((N, dims["Cx"]), kernels.BF16)[:, :C], race.noise((4 * C,), kernels.BF16)
    dout = race.noise((N, C), kernels.BF16)
    weight = race.noise((4 * C, C), kernels.BF16, C**-0.5)
    out, pre = (cuda.zeros((N, 4 * C), kernels.BF16) for _ in range(2))
    wins, us = {}, {}
    for name, run in (
        ("forward", partial(_gelu_of_product, out, pre, x, weight, bias)),
        ("backward", partial(_gradient_through_gelu, out, dout, weight.reshape(C, 4 * C), pre)),
    ):
        wins[name], seconds = race.fastest([partial(run, fused=fused) for fused in (False, True)])
        us[name] = {way: round(each * 1e6, 1) for way, each in zip(("apart", "fused"), seconds, strict=True)}
    apart, fused = (sum(each[way] for each in us.values()) for way in ("apart", "fused"))
    both = wins["backward"] and fused < apart
    return {"level": 2 if both else wins["forward"], "us": us}


def multiplies(
    dims: Mapping[str, int], grad_dtype: Any, gelu_fusion: int, accumulates: bool
) -> list[cublaslt.Operation]:
    """Those of a training step, as forward and backward ask for them with this gelu_fusion, of a block's four layers
    and the classifier. accumulates: whether some micro-batches do.
    """
    N, C = dims["B"] * dims["T"], dims["C"]
    gelu_bias, dgelu = "GELU_AUX_BIAS" if gelu_fusion >= 1 else "BIAS", "DGELU" if gelu_fusion >= 2 else "DEFAULT"
    found = []
    for OC, IC, width, epilogue, residual, before in (
        (3 * C, C, dims["Cx"], "BIAS", False, "DEFAULT"),
        (C, C, C, "BIAS", True, "DEFAULT"),
        (4 * C, C, dims["Cx"], gelu_bias, False, "DEFAULT"),
        (C, 4 * C, 4 * C, "BIAS", True, dgelu),
        (dims["Vp"], C, C, "DEFAULT", False, "DEFAULT"),
    ):
        adds = (False, True) if accumulates and width == IC else (False,)
        found += [
            cublaslt.Operation(N, OC, IC, False, True, kernels.BF16, residual, epilogue, width),
            cublaslt.Operation(N, IC, OC, False, False, kernels.BF16, False, before, OC),
            *(cublaslt.Operation(OC, width, N, True, False, np.dtype(grad_dtype), add, "DEFAULT", OC) for add in adds),
        ]
    return found


def _rows(x: Array) -> Array:
    """x as a matrix (N, last dimension): a view."""
    assert x.flags.c_contiguous
    return x.reshape(-1, x.shape[-1])
