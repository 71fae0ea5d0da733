"""A sum over ranks or lanes, where one of them has what all have of the same elements."""

import numpy as np

from engine.ops.numpy.parallel import for_each_block

GROUP = 8  # slices that are added as a binary tree, before the next ones are read


def sum_slices(out: np.ndarray, slices: np.ndarray, add: bool = False) -> None:
    """out (n) = the sum of slices (W,n), both of one dtype; += with add.

    bfloat16 is added up in fp32, and rounded once. The order is fixed: eight slices at a time as a binary tree of
    neighbours, these sums one after another. So the bits depend on the slices and their order alone.
    """
    wide = np.promote_types(out.dtype, np.float32)

    def sum_block(block: slice) -> None:
        total = out[block].astype(wide) if add else None
        for first in range(0, len(slices), GROUP):
            group = [part[block].astype(wide) for part in slices[first : first + GROUP]]
            step = 1
            while step < len(group):
                for i in range(0, len(group) - step, 2 * step):
                    group[i] += group[i + step]
                step *= 2
            total = group[0] if total is None else total + group[0]
        out[block] = total

    for_each_block(sum_block, out.size, len(slices))
