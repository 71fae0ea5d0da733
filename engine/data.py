"""Token shards -> batches, in a seeded order that depends on nothing but the seed.

A run consumes an endless sequence of samples, numbered by their global position. One micro-batch of all
ranks takes the next world * B positions: from p on, row b of rank r is number p + r * B + b. What an
optimizer step sees is therefore the same whatever the micro-batch size, the number of ranks or the
accumulation, and one integer resumes a run.

    B rows of a micro-batch · T tokens of a sample · N samples of the data set, the length of an epoch
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import numpy as np

from engine.errors import DataError
from engine.shards import Shard, fingerprint

Batch = tuple[np.ndarray, np.ndarray]
_Request = tuple[int, "Future[Batch]"]

_ORDER_OF_SHARDS = 2**32 - 1  # stands where a shard's number would in a key


class Samples:
    """A data set seen as N samples: T consecutive tokens and, one further on, their T targets.

    Samples of a shard start at multiples of T; none spans two shards, so a tail of up to T tokens stays
    unread. counts: (num_shards,) int64, the samples of each shard. DataError if no shard holds T + 1 tokens.
    """

    def __init__(self, shards: Sequence[Shard], T: int):
        if T < 1:
            raise ValueError(f"a sample needs at least one token, not {T}")
        self.T = T
        self._shards = list(shards)
        self.counts = np.array([(len(shard.tokens) - 1) // T for shard in self._shards], np.int64)
        self._ends = np.cumsum(self.counts)
        if len(self) == 0:
            raise DataError(self._too_short())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: np.ndarray) -> Batch:
        """Samples by number: (n,) integers in [0, N) -> inputs and targets, each (n, T) int32."""
        if len(indices) and not 0 <= np.min(indices) <= np.max(indices) < len(self):
            raise IndexError(f"sample numbers must lie in [0, {len(self):,})")
        rows = np.empty((len(indices), self.T + 1), np.int32)
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = (indices - (self._ends - self.counts)[shards]) * self.T
        for row, shard, start in zip(rows, shards, starts, strict=True):
            row[:] = self._shards[shard].tokens[start : start + self.T + 1]
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def describe(self) -> list[list[str | int]]:
        """[file name, number of tokens, fingerprint] of each shard, as JSON can hold it: equal for the same data."""
        return [[shard.path.name, len(shard.tokens), fingerprint(shard)] for shard in self._shards]

    def _too_short(self) -> str:
        if not self._shards:
            return "no token shards were given. Name at least one file."
        longest = max(self._shards, key=lambda shard: len(shard.tokens))
        return (
            f"{longest.path}: not one sample of T = {self.T:,} tokens fits: this longest of "
            f"{len(self._shards):,} shard(s) has {len(longest.tokens):,} tokens, expected at least "
            f"{self.T + 1:,}. Choose a shorter sequence length or prepare more text."
        )


class Order:
    """An endless order over the samples of some shards: epoch after epoch, each sample once in each.

    counts: (num_shards,) integers, the samples of each shard. Shuffled, every epoch visits the shards in a
    new order and the samples of each in a new order: shard after shard keeps the reads local and the memory
    at one shard's permutation. Otherwise 0, 1, 2, ... ValueError unless 0 <= seed < 2**64.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, *, seed: int, shuffle: bool):
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed must lie in [0, 2**64), not {seed}")
        self._counts = np.asarray(counts, np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._num_samples = int(self._counts.sum())
        self._seed, self._shuffle = seed, shuffle
        if self._num_samples == 0:
            raise ValueError("there is no order over no samples")
        self._enter_epoch(0)

    def indices(self, first: int, count: int) -> np.ndarray:
        """Which samples stand at positions [first, first + count) -> (count,) int64."""
        out = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(first + done, self._num_samples)
            ahead = self._from(epoch, place)[: count - done]
            out[done : done + len(ahead)] = ahead
            done += len(ahead)
        return out

    def _from(self, epoch: int, place: int) -> np.ndarray:
        """The samples from a place of an epoch to the end of the shard that it lies in."""
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        turn = int(np.searchsorted(self._turn_ends, place, side="right"))
        if turn != self._turn:
            self._enter_shard(turn)
        return self._samples[place - int(self._turn_ends[turn]) :]

    def _enter_epoch(self, epoch: int) -> None:
        self._epoch, self._turn = epoch, -1
        self._shards = self._permutation(len(self._counts), _ORDER_OF_SHARDS)
        self._turn_ends = np.cumsum(self._counts[self._shards])

    def _enter_shard(self, turn: int) -> None:
        shard = int(self._shards[turn])
        self._samples = self._first[shard] + self._permutation(int(self._counts[shard]), shard)
        self._turn = turn

    def _permutation(self, n: int, shard: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(n)
        # numpy may change what its Generators draw (permutation, integers, ...) from one version to the next;
        # only a BitGenerator's raw stream is promised to stay, and a run may be resumed after an upgrade.
        key = np.array([self._seed, self._epoch << 32 | shard], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class Loader:
    """This rank's micro-batches, endlessly, each read in the background while the one before is computed on.

    position: samples consumed by all ranks before the first micro-batch; any value continues exactly there,
    whatever B and world were until then. Small data wraps round, within a micro-batch if need be. ValueError
    for an impossible B, rank, world, position or seed. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        samples: Samples,
        B: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        position: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if B < 1 or position < 0 or not 0 <= rank < world:
            raise ValueError(f"impossible loader: {B=}, {position=}, {rank=}, {world=}")
        self._num_samples, self._stride = len(samples), world * B
        order = Order(samples.counts, seed=seed, shuffle=shuffle)

        def read(start: int) -> Batch:
            return samples.read(order.indices(start + rank * B, B))

        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        # A daemon that knows only the queue: it keeps neither the process nor this object alive.
        Thread(target=_serve, args=(self._requests, read), name="prefetch", daemon=True).start()
        self._closed = False
        self._expect(position)

    @property
    def position(self) -> int:
        """Samples handed out so far, over all ranks; what is prefetched does not count."""
        return self._position

    @property
    def epoch(self) -> int:
        """Whole passes over the data made so far."""
        return self._position // self._num_samples

    def next(self) -> Batch:
        """The next inputs and targets, each (B, T) int32 and the caller's own. Raises what reading raised."""
        if self._closed:
            raise ValueError("the loader is closed")
        batch = self._ahead.result()
        self._expect(self._position + self._stride)
        return batch

    def rewind(self) -> None:
        """Start again from position 0, as an evaluation does each time."""
        self._expect(0)

    def close(self) -> None:
        """End the thread. Closing twice is fine."""
        self._closed = True
        self._requests.put(None)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _expect(self, position: int) -> None:
        # Each request has a future of its own, so a batch that nobody waits for any more is simply forgotten.
        ahead: Future[Batch] = Future()
        self._requests.put((position, ahead))
        self._position, self._ahead = position, ahead


def _serve(requests: "SimpleQueue[_Request | None]", read: Callable[[int], Batch]) -> None:
    while (request := requests.get()) is not None:
        position, ahead = request
        try:
            ahead.set_result(read(position))
        except BaseException as error:  # next() raises it, in the thread that can act on it
            ahead.set_exception(error)
