"""Linear layers: see engine/ops/numpy/linear.py. N = B * T rows; the matrix multiplies are cublasLt's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.device import cublaslt, kernels
from engine.ops.cuda import column_sums, gelu

Array = Any

# GELU inside the matrix multiply: 0 never, 1 in forward, 2 in backward too. What is fused sees fp32 where a pass of its
# own sees bf16.
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
    out, inp = _rows(out), _rows(inp)
    skip, pre = None if residual is None else _rows(residual), None if pre_gelu is None else _rows(pre_gelu)
    if pre is None:
        cublaslt.matmul(out, inp, weight, transpose_b=True, add=skip, bias=bias)
    elif gelu_fusion >= 1 and bias is not None:
        cublaslt.matmul(out, inp, weight, transpose_b=True, add=skip, bias=bias, pre_gelu=pre)
    else:
        cublaslt.matmul(pre, inp, weight, transpose_b=True, add=skip, bias=bias)
        gelu.forward(out, pre)


def backward(
    dinp: Array,
    dweight: Array,
    dout: Array,
    inp: Array,
    weight: Array,
    *,
    pre_gelu: Array | None = None,
    dbias_below: Array | None = None,
) -> None:
    dout, dx, x = _rows(dout), _rows(dinp), _rows(inp)
    fused = pre_gelu is not None and gelu_fusion >= 2
    cublaslt.matmul(dx, dout, weight, dgelu=_rows(pre_gelu) if fused else None)
    if pre_gelu is not None and not fused:
        gelu.backward(dx, pre_gelu)
    if dbias_below is not None:
        column_sums.add(dbias_below, dinp)
    cublaslt.matmul(dweight, dout, x, transpose_a=True, add=dweight)


def multiplies(dims: Mapping[str, int], grad_dtype: Any) -> list[cublaslt.Operation]:
    """Those of a training step, as forward and backward ask for them, of a block's four layers and the classifier."""
    N, C = dims["B"] * dims["T"], dims["C"]
    gelu_bias, dgelu = "GELU_AUX_BIAS" if gelu_fusion >= 1 else "BIAS", "DGELU" if gelu_fusion >= 2 else "DEFAULT"
    found = []
    for OC, IC, epilogue, residual, before in (
        (3 * C, C, "BIAS", False, "DEFAULT"),
        (C, C, "BIAS", True, "DEFAULT"),
        (4 * C, C, gelu_bias, False, "DEFAULT"),
        (C, 4 * C, "BIAS", True, dgelu),
        (dims["Vp"], C, "DEFAULT", False, "DEFAULT"),
    ):
        found += [
            cublaslt.Operation(N, OC, IC, False, True, kernels.BF16, residual, epilogue),
            cublaslt.Operation(N, IC, OC, False, False, kernels.BF16, False, before),
            cublaslt.Operation(OC, IC, N, True, False, np.dtype(grad_dtype), True, "DEFAULT"),
        ]
    return found


def _rows(x: Array) -> Array:
    """x as a matrix (N, last dimension): a view."""
    assert x.flags.c_contiguous
    return x.reshape(-1, x.shape[-1])
