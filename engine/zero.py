"""Who owns which slice of the flat buffers: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

Parameters and gradients lie in buckets, one for each layer, each divided into equal shares. After backward has finished
a bucket, its gradient is summed over the ranks, and each rank keeps the sum of its own shares.

stage 0   the sums are gathered again: every rank has all moments and updates all parameters
stage 1   a rank has the moments of its shares alone, and updates those; then the parameters are gathered

Both do the same arithmetic, so they give the same bits.

Lanes make the bits independent of the number of ranks too. A lane is a gradient of its own: micro-batch j of a step
goes into lane j mod lanes, and nothing is ever added across lanes but in one binary tree over all of them, whose every
node is rounded once, whoever computes it. There are as many shares as lanes, so the layout, and with it the norm's
partial sums, is the same for any number of ranks that divides the lanes. Without the option there is one lane a rank.
"""

from types import ModuleType

from engine.arena import Arena, Array
from engine.comm import Communicator


class Zero:
    """The shares of this rank, and the exchanges around a step.

    lanes: of this rank, each the gradients of one lane; lane i of rank r is lane i * world + r of all. The first also
    receives the sums. owned: the slices of the flat buffers that this rank updates.
    """

    def __init__(self, comm: Communicator, params: Arena, lanes: list[Arena], stage: int, device: ModuleType):
        self._comm, self._params, self._lanes, self._stage = comm, params, lanes, stage
        self._device = device
        self._shares = [share for bucket in params.buckets for share in _shares(bucket, comm, len(lanes))]
        self.owned = [_own(bucket, comm) for bucket in params.buckets] if stage >= 1 else params.buckets
        most = max((bucket.stop - bucket.start for bucket in params.buckets), default=0)
        self._received = [device.zeros((most,), params.flat.dtype) for _ in lanes] if comm.world > 1 else []
        self._partial_norms = device.zeros((len(self._shares),), "float64")

    @property
    def num_owned(self) -> int:
        return sum(span.stop - span.start for span in self.owned)

    @property
    def owns_all(self) -> bool:
        """Whether what this rank updates is the flat buffers from end to end."""
        return self.num_owned == self._params.flat.size

    def reduce(self, bucket: int) -> None:
        """The gradient of a bucket, finished here in all lanes, becomes the sum over lanes: of this share, or all."""
        span = self._params.buckets[bucket]
        gradients = [lane.flat[span] for lane in self._lanes]
        if self._comm.world == 1:
            _add_in_a_tree(gradients)
            return
        parts = []
        for gradient, buffer in zip(gradients, self._received, strict=True):
            received = buffer[: gradient.size].reshape(self._comm.world, -1)
            self._comm.exchange(received, gradient.reshape(self._comm.world, -1))
            parts += list(received)
        _add_in_a_tree(parts)
        self._lanes[0].flat[_own(span, self._comm)] = parts[0]
        if self._stage == 0:
            self._comm.all_gather(gradients[0])

    def norm_squared(self, out: Array, ops: ModuleType) -> None:
        """out () = the sum of the squares of the whole gradient: of each share, then their exact sum."""
        for part, share in enumerate(self._shares):
            ops.norm.squared(self._partial_norms[part : part + 1].reshape(()), self._lanes[0].flat[share])
        ops.scalars.total(out, self._comm.gather(self._partial_norms).reshape(-1))

    def gather_parameters(self) -> None:
        """Every rank has all parameters again, after each has updated its own."""
        if self._stage >= 1:
            for bucket in self._params.buckets:
                self._comm.all_gather(self._params.flat[bucket])

    def whole(self, owned: Array) -> Array:
        """A flat buffer of all elements from each rank's `owned` ones (num_owned), in the order of the flat buffers."""
        if self.owns_all:
            return owned
        flat, start = self._device.zeros((self._params.flat.size,), owned.dtype), 0
        for span in self.owned:
            size = span.stop - span.start
            flat[span] = owned[start : start + size]
            start += size
        for bucket in self._params.buckets:
            self._comm.all_gather(flat[bucket])
        return flat

    def restore(self, owned: Array, flat: Array) -> None:
        """owned (num_owned) = this rank's elements of flat: the inverse of `whole`."""
        start = 0
        for span in self.owned:
            size = span.stop - span.start
            owned[start : start + size] = flat[span]
            start += size


def _own(bucket: slice, comm: Communicator) -> slice:
    """This rank's part of a bucket."""
    size = (bucket.stop - bucket.start) // comm.world
    return slice(bucket.start + comm.rank * size, bucket.start + (comm.rank + 1) * size)


def _shares(bucket: slice, comm: Communicator, count: int) -> list[slice]:
    """The `count` equal shares that this rank's part of a bucket consists of."""
    own = _own(bucket, comm)
    size = (own.stop - own.start) // count
    return [slice(own.start + i * size, own.start + (i + 1) * size) for i in range(count)]


def _add_in_a_tree(parts: list[Array]) -> None:
    """parts[0] = the sum of the parts: of neighbours, then of neighbouring sums, and so on. The others are spent."""
    step = 1
    while step < len(parts):
        for i in range(0, len(parts) - step, 2 * step):
            parts[i] += parts[i + step]
        step *= 2
