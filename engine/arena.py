"""Memory declared once: a table of tensors becomes one allocation with named views.

Sizes, offsets, checkpoints and the memory report all derive from the table. Nothing is allocated in a step.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Every tensor starts at a multiple of this many elements: 16-byte accesses stay aligned in any dtype, and arenas of
# one table have the same element offsets whatever their dtype (parameters, gradients, moments, masters).
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


class Arena:
    """One zeroed allocation that holds `tensors` in their order.

    Each bucket is padded so that it divides into `shares` equal parts.
    views: name -> array. flat: the whole as one array, padding included, if all have one dtype (the padding is zero,
    and stays zero under every operation on flat buffers). buckets: the slice of flat that each bucket takes.
    """

    def __init__(self, tensors: Iterable[Tensor], zeros: Callable[[tuple[int, ...], Any], Array], shares: int = 1):
        self.tensors = tuple(tensors)
        self._places = _places(self.tensors, shares)
        self.nbytes = memory_of(self.tensors, shares)
        self._bytes = zeros((self.nbytes,), np.uint8)
        self.views = {tensor.name: self.view(tensor) for tensor in self.tensors}

    @property
    def flat(self) -> Array:
        return self._bytes.view(self._dtype)

    @property
    def buckets(self) -> list[slice]:
        ends: dict[int, int] = {}
        for tensor in self.tensors:
            ends[tensor.bucket] = self._places[tensor.name][1] // np.dtype(self._dtype).itemsize
        return [slice(start, end) for start, end in zip([0, *ends.values()], ends.values(), strict=False)]

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


def memory_of(tensors: Iterable[Tensor], shares: int = 1) -> int:
    """Bytes of an arena of these tensors."""
    return max((end for _, end in _places(tuple(tensors), shares).values()), default=0)


def _places(tensors: tuple[Tensor, ...], shares: int) -> dict[str, tuple[int, int]]:
    """(start, end) in bytes of each tensor, padding included: aligned, and a bucket's last one up to equal shares."""
    places: dict[str, tuple[int, int]] = {}
    regions: dict[str, tuple[int, int]] = {}
    bucket_start = start = 0
    for tensor, following in zip(tensors, (*tensors[1:], None), strict=True):
        if tensor.region in regions:
            places[tensor.name] = regions[tensor.region]
            continue
        itemsize = np.dtype(tensor.dtype).itemsize
        sharing = [other for other in tensors if other.region == tensor.region] if tensor.region else [tensor]
        assert all(other.dtype == tensor.dtype for other in sharing)
        end = start + max(_round_up(other.size, ALIGNMENT) for other in sharing) * itemsize
        if tensor.region:
            regions[tensor.region] = (start, end)
        if following is None or following.bucket != tensor.bucket:
            end = bucket_start + _round_up(end - bucket_start, shares * ALIGNMENT * itemsize)
            bucket_start = end
        places[tensor.name] = (start, end)
        start = end
    return places


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
