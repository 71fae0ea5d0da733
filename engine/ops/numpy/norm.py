"""The global gradient norm, over slices of a flat buffer."""

import numpy as np

from engine.ops.numpy.parallel import blocks


def squared(out: np.ndarray, grads: np.ndarray, slices: np.ndarray) -> None:
    """out (S) float64 = the sums of squares of S slices of grads (n), from where to where slices (S,2) int64 says.

    Two stages, as on a GPU: a sum for each block in the dtype of grads, then the blocks in out's. Blocks are fixed,
    so the same gradients give the same bits.
    """
    for s, (start, stop) in enumerate(slices.tolist()):
        whole = grads[start:stop]
        out[s] = sum(float(np.dot(part, part)) for part in (whole[block] for block in blocks(whole.size, 1)))
