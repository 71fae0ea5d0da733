"""Memory declared once: a table of tensors becomes one allocation with named views.

Sizes, offsets, checkpoints and the memory report all derive from the table. Nothing is allocated in a step.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np

# Every tensor starts at a multiple of this many elements: 16-byte accesses stay aligned in any dtype, and arenas of
# one table have the same element offsets whatever their dtype (parameters, gradients, moments, remainders).
ALIGNMENT = 128

Array = Any  # a numpy or a CuPy array


def shape_of(text: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that "B,T,3C" means under dims {"B": 4, "T": 64, "C": 128}: (4, 64, 384)."""
    shape = []
    for term in text.split(","):
        match = re.fullmatch(r"(\d*)([A-Za-z]+)", term)
        assert match, f"not a dimension: {term!r}"
        shape.append(int(match[1] or 1) * dims[match[2]])
    return tuple(shape)


@dataclass(frozen=True)
class Tensor:
    """One line of a resolved table.

    bucket: neighbours of one number are exchanged between ranks together. region: tensors of one name share one memory,
    for they are never needed at the same time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    bucket: int = 0
    region: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Slots = Callable[[int], int]


def own_slot(bucket: int) -> int:
    """The slot of a bucket that has memory of its own."""
    return bucket


class Arena:
    """One zeroed allocation that holds `tensors` in their order.

    Each bucket is padded so that it divides into `shares` equal parts; those of one slot take the same memory by turns.
    views: name -> array. flat: the whole as one array, padding included, if all have one dtype (the padding is zero,
    and stays zero under every operation on flat buffers). buckets: the slice of flat that each bucket takes.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        zeros: Callable[[tuple[int, ...], Any], Array],
        shares: int = 1,
        slots: Slots = own_slot,
    ):
        self.tensors = tuple(tensors)
        self._places, self._bucket_places, self.nbytes = _lay_out(self.tensors, shares, slots)
        self._bytes = zeros((self.nbytes,), np.uint8)
        self.views = {tensor.name: self.view(tensor) for tensor in self.tensors}

    @property
    def flat(self) -> Array:
        return self._bytes.view(self._dtype)

    @property
    def buckets(self) -> list[slice]:
        itemsize = np.dtype(self._dtype).itemsize
        return [slice(start // itemsize, end // itemsize) for start, end in self._bucket_places.values()]

    def view(self, tensor: Tensor) -> Array:
        """The memory of the tensor of this name, seen with another (smaller) shape."""
        start = self._places[tensor.name][0]
        nbytes = tensor.size * np.dtype(tensor.dtype).itemsize
        return self._bytes[start : start + nbytes].view(tensor.dtype).reshape(tensor.shape)

    def spans(self) -> dict[str, slice]:
        """Where each tensor lies in `flat`, padding included."""
        itemsize = np.dtype(self._dtype).itemsize
        return {name: slice(start // itemsize, end // itemsize) for name, (start, end) in self._places.items()}

    def split(self, flat: Array) -> dict[str, Array]:
        """Views by name and shape of another flat array that is laid out as this arena's."""
        spans = self.spans()
        return {t.name: flat[spans[t.name].start :][: t.size].reshape(t.shape) for t in self.tensors}

    @property
    def _dtype(self) -> Any:
        (dtype,) = {tensor.dtype for tensor in self.tensors}
        return dtype


def memory_of(tensors: Iterable[Tensor], shares: int = 1, slots: Slots = own_slot) -> int:
    """Bytes of an arena of these tensors."""
    return _lay_out(tuple(tensors), shares, slots)[2]


def largest_bucket(tensors: Iterable[Tensor], shares: int) -> int:
    """Bytes of the largest bucket of an arena of these tensors."""
    return max(end - start for start, end in _lay_out(tuple(tensors), shares, own_slot)[1].values())


Place = tuple[int, int]  # (start, end) in bytes


def _lay_out(tensors: tuple[Tensor, ...], shares: int, slots: Slots) -> tuple[dict[str, Place], dict[int, Place], int]:
    """Where each tensor lies, padding included, where each bucket lies, and the bytes of all."""
    within = {bucket: _bucket(list(members), shares) for bucket, members in groupby(tensors, lambda t: t.bucket)}
    sizes: dict[int, int] = {}
    for bucket, (_, size) in within.items():
        sizes[slots(bucket)] = max(size, sizes.get(slots(bucket), 0))
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    places: dict[str, Place] = {}
    buckets: dict[int, Place] = {}
    for bucket, (members, size) in within.items():
        base = starts[slots(bucket)]
        buckets[bucket] = (base, base + size)
        places |= {name: (base + start, base + end) for name, (start, end) in members.items()}
    return places, buckets, sum(sizes.values())


def _bucket(tensors: list[Tensor], shares: int) -> tuple[dict[str, Place], int]:
    """Where each tensor of a bucket lies in it, aligned, the last one up to equal shares; and the bucket's bytes."""
    places: dict[str, Place] = {}
    regions: dict[str, Place] = {}
    start = 0
    for tensor in tensors:
        if tensor.region in regions:
            places[tensor.name] = regions[tensor.region]
            continue
        itemsize = np.dtype(tensor.dtype).itemsize
        sharing = [other for other in tensors if other.region == tensor.region] if tensor.region else [tensor]
        assert all(other.dtype == tensor.dtype for other in sharing)
        end = start + max(_round_up(other.size, ALIGNMENT) for other in sharing) * itemsize
        places[tensor.name] = (start, end)
        if tensor.region:
            regions[tensor.region] = (start, end)
        start = end
    size = _round_up(start, shares * ALIGNMENT * np.dtype(tensors[-1].dtype).itemsize)
    if not tensors[-1].region:
        places[tensors[-1].name] = (places[tensors[-1].name][0], size)
    return places, size


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
