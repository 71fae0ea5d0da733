"""Who owns which slice of the flat buffers: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

Parameters and gradients lie in buckets, one for each layer, each divided into equal shares. After backward has finished
a bucket, its gradient is summed over the ranks, and each rank keeps the sum of its own shares.

stage 0   the sums are gathered again: every rank has all moments and updates all parameters
stage 1   a rank has the moments of its shares alone, and updates those; then the parameters are gathered
stage 2   as 1, and a rank keeps the gradient of its shares alone: that of a bucket is summed over the ranks as soon as
          a micro-batch has finished it, added to what the rank has, and its memory is used for another bucket

All do the same arithmetic, so they give the same bits; stage 2 with one micro-batch a step: with several, it adds up
ranks first, and then micro-batches.

The owner of a share receives what all ranks have of it and adds that up in fp32, in an order that their number alone
fixes, rounding once (ops.reduce). As an alternative the library that carries it adds up on the way, in an order of its
own.

Lanes make the bits independent of the number of ranks too. A lane is a gradient of its own: micro-batch j of a step
goes into lane j mod lanes, and nothing is ever added across lanes but by the owner, in that same way. There
are as many shares as lanes, so the layout, and with it the norm's partial sums, is the same for any number of ranks
that divides the lanes. Without the option there is one lane a rank.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any

import numpy as np

from engine.arena import Arena, Array
from engine.comm import Communicator

# A GPU's links sleep after 50 ms without traffic (`nvidia-smi nvlink -gLowPwrInfo`). Awake they take 1 to 2 % of its
# power, which the multiplies then lack. So gradients travel together, while backward finishes the last quarter of the
# buckets. That is long enough where a micro-batch is large: a layer's weights are exchanged as 24 C^2 bytes, while
# backward takes 48 C^2 operations for each token. Between machines links are slower.
LATE_SHARE, LATE_TOKENS = 1 / 4, 1 << 14

PIECE = 1 << 24  # elements that are gathered at a time on their way to the host: not to take a GPU's memory for all


class Zero:
    """The shares of this rank, and the exchanges around a step.

    lanes: of this rank, each the gradients of one lane; lane i of rank r is lane i * world + r of all. The first also
    receives the sums, but in stage 2: there is one lane then, whose buckets may take the same memory by turns.
    by_library: the communicator adds up, not the owner; with one lane a rank. late: but in stage 2, no gradient is
    exchanged before backward has come to the last LATE_SHARE of the buckets. owned: the slice of each bucket that this
    rank updates; owned_by_bucket: where it lies among all that this rank owns.
    """

    def __init__(
        self,
        comm: Communicator,
        params: Arena,
        lanes: list[Arena],
        stage: int,
        ops: ModuleType,
        device: ModuleType,
        *,
        by_library: bool = False,
        late: bool = False,
    ):
        self.rank, self._comm, self._params, self._lanes, self._stage = comm.rank, comm, params, lanes, stage
        self._ops, self._device, self._by_library, self._late = ops, device, by_library, late
        assert len(lanes) == 1 or not by_library
        self.owned = [_own(bucket, comm) for bucket in params.buckets] if stage >= 1 else params.buckets
        ends = list(accumulate(_length(span) for span in self.owned))
        self.owned_by_bucket = [slice(end - _length(span), end) for span, end in zip(self.owned, ends, strict=True)]
        if self.shards_gradients:
            assert len(lanes) == 1
            self._shard = device.zeros((self.num_owned,), lanes[0].flat.dtype)
            self._shares = self.owned_by_bucket
        else:
            self._shares = [share for bucket in params.buckets for share in _shares(bucket, comm, len(lanes))]
        self._is_alone = len(lanes) * comm.world == 1
        most = 0 if self._is_alone or by_library else len(lanes) * max(map(_length, params.buckets))
        self._received = device.zeros((most,), lanes[0].flat.dtype)
        # Where parameters, in stage 0 sums of gradients, and what others have of this rank's shares arrive.
        for array in (params.flat, lanes[0].flat, self._received):
            comm.share(array)
        self._reducing: Any = None  # in stage 2, the communicator's mark behind the last bucket
        self._gathering: dict[int, Any] = {}  # bucket -> the mark behind the gathering of its parameters
        self._share_bounds = device.to_device(np.array([(share.start, share.stop) for share in self._shares], np.int64))
        self._partial_norms = device.zeros((len(self._shares),), "float64")
        each = len(self._shares) // len(self.owned)
        self._everyones_norms = device.zeros((len(self.owned), comm.world, each), "float64")

    @property
    def num_owned(self) -> int:
        return sum(map(_length, self.owned))

    @property
    def owns_all(self) -> bool:
        """Whether what this rank updates is the flat buffers from end to end."""
        return self.num_owned == self._params.flat.size

    @property
    def shards_gradients(self) -> bool:
        """Whether this rank keeps the gradient of its own shares only."""
        return self._stage == 2 and self._comm.world > 1

    def accumulates(self, first: bool) -> bool:
        """Whether backward adds to the gradients of the micro-batches before, the lane's first one in a step or not: in
        stage 2 they have been taken away.
        """
        return not (first or self.shards_gradients)

    def when_ready(self, first: bool, last: bool) -> Callable[[int], None]:
        """What happens to a bucket that a micro-batch has finished, the first or last one of its step or not."""
        if self.shards_gradients:
            return partial(self.reduce, add=not first)
        if not last:
            return _nothing
        return self._reduce_late() if self._late else self.reduce

    def _reduce_late(self) -> Callable[[int], None]:
        """`reduce` for one bucket after another, which begins when few are missing."""
        finished: list[int] = []
        missing = len(self._params.buckets)
        few = int(LATE_SHARE * missing)

        def ready(bucket: int) -> None:
            nonlocal missing
            missing -= 1
            finished.append(bucket)
            if missing <= few:
                for each in finished:
                    self.reduce(each)
                finished.clear()

        return ready

    def gradient(self, span: slice, owned: slice) -> Array:
        """The summed gradient of a part of what this rank updates: of the flat buffers, and of owned elements."""
        return self._shard[owned] if self.shards_gradients else self._lanes[0].flat[span]

    def reduce(self, bucket: int, add: bool = False) -> None:
        """The gradient of a bucket, finished here in all lanes, becomes the sum over lanes: of this share, or all. With
        add, in stage 2, it joins that of the micro-batches before.

        Aside: what comes next has the sums after `settle`.
        """
        if self._is_alone:
            return
        if self._reducing is not None:
            # Backward is about to write where the bucket before this one was (see gpt2.slots_by_turns).
            self._comm.wait(self._reducing)
        with self._comm.aside():
            self._reduce(bucket, add)
        if self.shards_gradients:
            self._reducing = self._comm.mark()

    def settle(self) -> None:
        """Everything that was put aside comes before what comes next."""
        self._comm.join()
        self._reducing = None
        self._gathering.clear()

    def _reduce(self, bucket: int, add: bool) -> None:
        gradient, *_ = gradients = [lane.flat[lane.buckets[bucket]] for lane in self._lanes]
        own = gradient[_own(slice(0, gradient.size), self._comm)]
        parts = self._summed_on_the_way(gradient, own) if self._by_library else self._everyones(gradients)
        if self.shards_gradients:
            self._ops.reduce.sum_slices(self._shard[self.owned_by_bucket[bucket]], parts, add=add)
            gradient.fill(0)  # another bucket's padding may lie where these gradients did
            return
        if not self._by_library:
            self._ops.reduce.sum_slices(own, parts)
        if self._stage == 0:
            self._comm.all_gather(gradient)

    def _everyones(self, gradients: list[Array]) -> Array:
        """(all lanes, n): what every lane of every rank has of this rank's share of a bucket."""
        world, size = self._comm.world, gradients[0].size
        received = self._received[: len(gradients) * size].reshape(len(gradients) * world, -1)
        for i, gradient in enumerate(gradients):
            self._comm.exchange(received[i * world : (i + 1) * world], gradient.reshape(world, -1))
        return received

    def _summed_on_the_way(self, gradient: Array, own: Array) -> Array:
        """(1, n): this rank's share of a bucket, which has become the sum."""
        self._comm.reduce_scatter(gradient)
        return own.reshape(1, -1)

    def norm_squared(self, out: Array) -> None:
        """out () = the sum of the squares of the whole gradient: of each share, then of all shares as they lie in the
        flat buffer, which is an order that does not depend on who has them.
        """
        summed = self._shard if self.shards_gradients else self._lanes[0].flat
        self._ops.norm.squared(self._partial_norms, summed, self._share_bounds)
        buckets, world, each = self._everyones_norms.shape
        by_rank = self._comm.gather(self._partial_norms).reshape(world, buckets, each)
        self._everyones_norms[...] = by_rank.swapaxes(0, 1)
        self._ops.scalars.total(out, self._everyones_norms.reshape(-1))

    def gather_parameters(self, bucket: int) -> None:
        """Every rank has all parameters of a bucket again, after each has updated its own.

        Aside: what comes next has them after `need`, or `settle`.
        """
        if self._stage >= 1:
            with self._comm.aside():
                self._comm.all_gather(self._params.flat[self._params.buckets[bucket]])
            self._gathering[bucket] = self._comm.mark()

    def need(self, bucket: int) -> None:
        """What comes next has all parameters of a bucket."""
        if bucket in self._gathering:
            self._comm.wait(self._gathering.pop(bucket))

    def whole(self, owned: Array) -> np.ndarray:
        """On rank 0's host: all elements from each rank's `owned` ones (num_owned), in the order of the flat buffers.

        On other ranks zeros, which take no memory until someone writes there. All ranks call it together.
        """
        comm = self._comm
        if self.owns_all and comm.rank == 0:
            return self._device.to_host(owned)
        flat = np.zeros(self._params.flat.size, owned.dtype)
        for part, bucket in zip(self.owned_by_bucket, self._params.buckets, strict=True) if not self.owns_all else ():
            everyones = flat[bucket].reshape(comm.world, -1)
            step = max(1, PIECE // comm.world)
            for start in range(0, everyones.shape[1], step):
                some = owned[part][start : start + step]
                piece = self._device.zeros((comm.world, some.size), owned.dtype)
                piece[comm.rank] = some
                comm.all_gather(piece.reshape(-1))
                if comm.rank == 0:
                    everyones[:, start : start + step] = self._device.to_host(piece)
        return flat

    def restore(self, owned: Array, flat: np.ndarray) -> None:
        """owned (num_owned) = this rank's elements of flat, which lies on the host: the inverse of `whole`."""
        for span, part in zip(self.owned, self.owned_by_bucket, strict=True):
            self._device.put(owned[part], flat[span])


def _nothing(bucket: int) -> None:
    """What happens to gradients that further micro-batches will add to."""


def _length(span: slice) -> int:
    return span.stop - span.start


def _own(bucket: slice, comm: Communicator) -> slice:
    """This rank's part of a bucket."""
    size = (bucket.stop - bucket.start) // comm.world
    return slice(bucket.start + comm.rank * size, bucket.start + (comm.rank + 1) * size)


def _shares(bucket: slice, comm: Communicator, count: int) -> list[slice]:
    """The `count` equal shares that this rank's part of a bucket consists of."""
    own = _own(bucket, comm)
    size = (own.stop - own.start) // count
    return [slice(own.start + i * size, own.start + (i + 1) * size) for i in range(count)]
