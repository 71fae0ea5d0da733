"""Token and position embedding: where the residual stream begins.

out[b,t] = wte[inp[b,t]] + wpe[t]
"""

import numpy as np

from engine.ops.numpy.scratch import rows, write


def forward(out: np.ndarray, inp: np.ndarray, wte: np.ndarray, wpe: np.ndarray) -> None:
    """out (B,T,C) = the rows of wte (Vp,C) that inp (B,T) int32 names, plus wpe (maxT,C) by position."""
    T = inp.shape[1]
    np.take(wte, inp, axis=0, out=out)
    out += wpe[:T]


def backward(dwte: np.ndarray, dwpe: np.ndarray, dout: np.ndarray, inp: np.ndarray, *, accumulate: bool) -> None:
    """dwte (Vp,C) += and dwpe (maxT,C) = the gradients, dwpe += with accumulate; dout (B,T,C), inp (B,T) int32.

    dwte is always added to: it has the classifier's gradient already. Positions beyond T have a gradient of zero.

    Positions of the same token are brought together by a stable sort and summed in that order: no matter how many
    there are, the same input gives the same bits.
    """
    T = inp.shape[1]
    tokens = inp.reshape(-1)
    order = np.argsort(tokens, kind="stable")
    present, starts = np.unique(tokens[order], return_index=True)
    dwte[present] += np.add.reduceat(rows(dout)[order], starts, axis=0)
    write(dwpe[:T], dout.sum(axis=0), accumulate)
    if not accumulate:
        dwpe[T:] = 0
