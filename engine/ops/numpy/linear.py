"""Linear layers, with what a GPU's matrix multiply does on the way out: bias, residual, GELU.

forward   out = inp @ weight^T + bias                       (weight is (OC,C), as PyTorch's nn.Linear)
          out = residual + inp @ weight^T + bias            with residual
          pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)      with pre_gelu

backward  dinp     = dout @ weight                          (times gelu'(pre_gelu) where inp was gelu(pre_gelu))
          dweight  = dout^T @ inp                           (+= with accumulate)

The gradient of a bias is sum_n(dout). Whoever makes dout adds up its columns along with it: layernorm.backward those of
its dinp, attention.backward those of dqkv, and backward here those of dinp, for the layer below.
"""

from functools import partial

import numpy as np

from engine.ops.numpy import column_sums, gelu
from engine.ops.numpy.parallel import matmul_blocks, run
from engine.ops.numpy.scratch import rows, scratch


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
    skip = None if residual is None else rows(residual)

    def project(block: slice) -> None:
        np.matmul(inp[block], weight.T, out=y[block])
        if bias is not None:
            y[block] += bias
        if skip is not None:
            y[block] += skip[block]
        if pre_gelu is not None:
            gelu.apply(out[block], y[block])

    run([partial(project, block) for block in matmul_blocks(len(y))])


def backward(
    dinp: np.ndarray,
    dweight: np.ndarray,
    dout: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    *,
    pre_gelu: np.ndarray | None = None,
    dbias_below: np.ndarray | None = None,
    accumulate: bool,
) -> None:
    """dinp (B,T,C) =, dweight (OC,C) =; dout (B,T,OC), inp (B,T,C) as forward saw it.

    With pre_gelu (B,T,C), inp was gelu(pre_gelu), and dinp is the gradient of pre_gelu. dbias_below (C) =, which may
    be given then, receives the column sums of dinp: the bias gradient of the layer whose output pre_gelu was. With
    accumulate, dweight and dbias_below +=.
    """
    dout, dx, x = rows(dout), rows(dinp), rows(inp)
    pre = None if pre_gelu is None else rows(pre_gelu)

    def input_gradient(block: slice) -> None:
        np.matmul(dout[block], weight, out=dx[block])
        if pre is not None:
            gelu.apply_backward(dx[block], pre[block])

    def weight_gradient(block: slice) -> None:
        dy = dout[:, block]
        if accumulate:
            dweight[block] += np.matmul(dy.T, x, out=scratch("linear.dweight", dweight[block].shape, x.dtype))
        else:
            np.matmul(dy.T, x, out=dweight[block])

    run(
        [partial(input_gradient, block) for block in matmul_blocks(len(dx))]
        + [partial(weight_gradient, block) for block in matmul_blocks(len(dweight))]
    )
    if dbias_below is not None:
        column_sums.add(dbias_below, dinp, accumulate=accumulate)
