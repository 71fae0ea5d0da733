"""Who owns which slice of the flat buffers: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

Parameters and gradients lie in buckets, one for each layer, of a size that every rank gets an equal share of. After
backward has finished a bucket, its gradient is summed over the ranks and each rank keeps its own share of the sum.

stage 0   the sums are gathered again: every rank has all moments and updates all parameters
stage 1   a rank has the moments of its shares alone, and updates those; then the parameters are gathered

Both do the same arithmetic, so they give the same bits.
"""

import math
from types import ModuleType
from typing import Any

from engine.arena import Arena, Array
from engine.comm import Communicator


class Zero:
    """The shares of this rank, and the exchanges around a step.

    owned: the slices of the flat buffers that this rank updates.
    """

    def __init__(self, comm: Communicator, params: Arena, grads: Arena, stage: int):
        self._comm, self._params, self._grads, self._stage = comm, params, grads, stage
        self._shares = [_share(bucket, comm) for bucket in params.buckets]
        self.owned = self._shares if stage >= 1 else params.buckets

    @property
    def num_owned(self) -> int:
        return sum(span.stop - span.start for span in self.owned)

    def reduce(self, bucket: int) -> None:
        """The gradient of a bucket, finished here, becomes the sum over the ranks: of this share, or all of it."""
        gradient = self._grads.flat[self._params.buckets[bucket]]
        self._comm.reduce_scatter(gradient)
        if self._stage == 0:
            self._comm.all_gather(gradient)

    def norm_squared(self, ops: ModuleType, out: Array, device: ModuleType) -> None:
        """out () = the sum of the squares of the whole gradient, share by share, in the order of the ranks."""
        parts = device.zeros((len(self._shares),), out.dtype)
        for part, share in zip(range(len(parts)), self._shares, strict=True):
            ops.norm.squared(parts[part : part + 1].reshape(()), self._grads.flat[share])
        everyones = self._comm.gather(device.to_host(parts))
        out[...] = math.fsum(everyones.ravel())

    def gather_parameters(self) -> None:
        """Every rank has all parameters again, after each has updated its own."""
        if self._stage >= 1:
            for bucket in self._params.buckets:
                self._comm.all_gather(self._params.flat[bucket])

    def whole(self, owned: Any, zeros: Any) -> Any:
        """A flat buffer of all elements from each rank's `owned` ones (num_owned), in the order of the flat buffers."""
        flat, start = zeros((self._params.flat.size,), owned.dtype), 0
        for span in self.owned:
            size = span.stop - span.start
            flat[span] = owned[start : start + size]
            start += size
        if self._stage >= 1:
            for bucket in self._params.buckets:
                self._comm.all_gather(flat[bucket])
        return flat

    def restore(self, owned: Any, flat: Any) -> None:
        """owned (num_owned) = this rank's elements of flat: the inverse of `whole`."""
        start = 0
        for span in self.owned:
            size = span.stop - span.start
            owned[start : start + size] = flat[span]
            start += size


def _share(bucket: slice, comm: Communicator) -> slice:
    size = (bucket.stop - bucket.start) // comm.world
    return slice(bucket.start + comm.rank * size, bucket.start + (comm.rank + 1) * size)
