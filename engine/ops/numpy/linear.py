"""Linear layers, with what a GPU's matrix multiply does on the way out: bias, residual, GELU.

forward   out = inp @ weight^T + bias                       (weight is (OC,C), as PyTorch's nn.Linear)
          out = residual + inp @ weight^T + bias            with residual
          pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)      with pre_gelu

backward  dinp     = dout @ weight                          (times gelu'(pre_gelu) where inp was gelu(pre_gelu))
          dweight += dout^T @ inp        dbias += sum_n(dout)
"""

import numpy as np

from engine.ops.numpy import gelu
from engine.ops.numpy.memory import for_each_block, rows, scratch


def forward(
    out: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    residual: np.ndarray | None = None,
    pre_gelu: np.ndarray | None = None,
) -> None:
    """out (B,T,OC) = inp (B,T,C) @ weight (OC,C)^T, plus bias (OC), plus residual (B,T,OC).

    With pre_gelu (B,T,OC) =, the sum is kept there for backward and out is its GELU.
    """
    out, inp = rows(out), rows(inp)
    y = out if pre_gelu is None else rows(pre_gelu)
    np.matmul(inp, weight.T, out=y)

    def finish(block: slice) -> None:
        if bias is not None:
            y[block] += bias
        if residual is not None:
            y[block] += rows(residual)[block]
        if pre_gelu is not None:
            gelu.apply(out[block], y[block])

    if bias is not None or residual is not None or pre_gelu is not None:
        for_each_block(finish, *y.shape)


def backward(
    dinp: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray | None,
    dout: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    *,
    pre_gelu: np.ndarray | None = None,
) -> None:
    """dinp (B,T,C) =, dweight (OC,C) +=, dbias (OC) +=; dout (B,T,OC), inp (B,T,C) as forward saw it.

    dbias is None where there is no bias, or where its gradient comes from layernorm.backward's dinp_sum. With
    pre_gelu (B,T,C), inp was gelu(pre_gelu), and dinp is the gradient of pre_gelu.
    """
    dout, dx = rows(dout), rows(dinp)
    product = np.matmul(dout.T, rows(inp), out=scratch("linear.dweight", weight.shape, weight.dtype))
    dweight += product
    if dbias is not None:
        dbias += dout.sum(axis=0)
    np.matmul(dout, weight, out=dx)
    if pre_gelu is not None:
        gelu.backward(dinp, pre_gelu)
