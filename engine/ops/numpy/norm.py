"""The global gradient norm, over a flat buffer."""

import numpy as np

from engine.ops.numpy.parallel import blocks


def squared(out: np.ndarray, grads: np.ndarray) -> None:
    """out () = sum of the squares of grads (n).

    Two stages, as on a GPU: a sum for each block in the dtype of grads, then the blocks in out's. Blocks are fixed,
    so the same gradients give the same bits.
    """
    out[...] = sum(float(np.dot(part, part)) for part in (grads[block] for block in blocks(grads.size, 1)))
