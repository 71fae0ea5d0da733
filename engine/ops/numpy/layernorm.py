"""Layer normalisation over channels (Ba et al. 2016, arXiv 1607.06450, section 3).

forward   mean = sum_c(inp) / C      rstd = 1 / sqrt(sum_c((inp - mean)^2) / C + EPS)
          out  = (inp - mean) * rstd * weight + bias

backward  with xhat = (inp - mean) * rstd and g = dout * weight
          dinp    += rstd * (g - sum_c(g) / C - xhat * sum_c(g * xhat) / C)
          dweight  = sum_n(dout * xhat)      dbias  = sum_n(dout)      (+= with accumulate)
"""

import numpy as np

from engine.ops.numpy.parallel import column_sums, for_each_block
from engine.ops.numpy.scratch import rows, scratch, write

EPS = 1e-5  # GPT-2's


def forward(
    out: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
) -> None:
    """out (B,T,C) = layernorm(inp (B,T,C)); mean (B,T) = and rstd (B,T) = are kept for backward. An out of (B,T,Cx)
    receives a one and zeros behind each row.
    """
    inp, out, mean, rstd = rows(inp), rows(out), mean.reshape(-1, 1), rstd.reshape(-1, 1)
    N, C = inp.shape
    behind = out[:, C:]
    behind[:, :1], behind[:, 1:] = 1, 0

    def normalize(block: slice) -> None:
        x, y = inp[block], out[block, :C]
        mean[block] = np.einsum("nc->n", x)[:, None] / C
        np.subtract(x, mean[block], out=y)
        variance = np.einsum("nc,nc->n", y, y)[:, None] / C
        np.divide(1, np.sqrt(variance + EPS), out=rstd[block])
        y *= rstd[block]
        y *= weight
        y += bias

    for_each_block(normalize, N, C)


def backward(
    dinp: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray,
    dout: np.ndarray,
    inp: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    dinp_sum: np.ndarray | None = None,
    *,
    accumulate: bool,
) -> None:
    """dinp (B,T,C) +=, dweight (C) =, dbias (C) =.

    dinp is the residual stream's gradient: what has come down the skip connection is already in it. dinp_sum (C) =,
    if given, receives the column sums of the finished dinp: the bias gradient of the projection that wrote inp, for the
    price of no extra pass over memory. With accumulate, dweight, dbias and dinp_sum +=.
    """
    dinp, dout, inp = rows(dinp), rows(dout), rows(inp)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    N, C = inp.shape

    def denormalize(block: slice) -> tuple[np.ndarray, ...]:
        dx, dy, x = dinp[block], dout[block], inp[block]
        xhat = np.subtract(x, mean[block], out=scratch("layernorm.xhat", x.shape, x.dtype))
        xhat *= rstd[block]
        sums = [np.einsum("nc,nc->c", dy, xhat), np.einsum("nc->c", dy)]
        g = np.multiply(dy, weight, out=scratch("layernorm.g", x.shape, x.dtype))
        g_mean = np.einsum("nc->n", g)[:, None] / C
        xhat *= np.einsum("nc,nc->n", g, xhat)[:, None] / C
        g -= g_mean
        g -= xhat
        g *= rstd[block]
        dx += g
        if dinp_sum is not None:
            sums.append(np.einsum("nc->c", dx))
        return tuple(sums)

    dweight_part, dbias_part, *dinp_part = column_sums(denormalize, N, C)
    write(dweight, dweight_part, accumulate)
    write(dbias, dbias_part, accumulate)
    if dinp_sum is not None:
        write(dinp_sum, dinp_part[0], accumulate)
