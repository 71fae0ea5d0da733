"""Linear layers, with what a GPU's matrix multiply does on the way out: bias, residual, GELU.

forward   out = inp @ weight^T + bias                       (weight is (OC,C), as PyTorch's nn.Linear)
          out = residual + inp @ weight^T + bias            with residual
          pre_gelu = inp @ weight^T + bias, out = gelu(pre_gelu)      with pre_gelu

backward  dinp     = dout @ weight                          (times gelu'(pre_gelu) where inp was gelu(pre_gelu))
          dweight  = dout^T @ inp                           (+= with accumulate)
          dbias    = sum_n(dout)                            (+= with accumulate)

Where inp has a one behind each row, dbias is one more column of dweight. The dout of other layers is what
layernorm.backward gives, which adds up its columns too.
"""

from functools import partial

import numpy as np

from engine.ops.numpy import gelu
from engine.ops.numpy.parallel import matmul_blocks, run
from engine.ops.numpy.scratch import rows, scratch, write


def forward(
    out: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    residual: np.ndarray | None = None,
    pre_gelu: np.ndarray | None = None,
) -> None:
    """out (B,T,OC) = inp (B,T,C or Cx) @ weight (OC,C)^T, plus bias (OC), plus residual (B,T,OC).

    With pre_gelu (B,T,OC) =, the sum is kept there for backward and out is its GELU.
    """
    out, inp = rows(out), rows(inp)[:, : weight.shape[1]]
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
    dbias: np.ndarray | None = None,
    accumulate: bool,
) -> None:
    """dinp (B,T,C) =, dweight (OC,C) =; dout (B,T,OC), inp (B,T,C).

    With pre_gelu (B,T,C), inp was gelu(pre_gelu), and dinp is the gradient of pre_gelu. With dbias (OC) =, inp is
    (B,T,Cx). With accumulate, dweight and dbias +=.
    """
    C = weight.shape[1]
    dout, dx, x = rows(dout), rows(dinp), rows(inp)[:, : C + (dbias is not None)]
    pre = None if pre_gelu is None else rows(pre_gelu)

    def input_gradient(block: slice) -> None:
        np.matmul(dout[block], weight, out=dx[block])
        if pre is not None:
            gelu.apply_backward(dx[block], pre[block])

    def weight_gradient(block: slice) -> None:
        dy = dout[:, block]
        if dbias is None and not accumulate:
            np.matmul(dy.T, x, out=dweight[block])
            return
        product = np.matmul(dy.T, x, out=scratch("linear.dweight", (dy.shape[1], x.shape[1]), x.dtype))
        write(dweight[block], product[:, :C], accumulate)
        if dbias is not None:
            write(dbias[block], product[:, C], accumulate)

    run(
        [partial(input_gradient, block) for block in matmul_blocks(len(dx))]
        + [partial(weight_gradient, block) for block in matmul_blocks(len(dweight))]
    )
