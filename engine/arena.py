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
    """One line of a resolved table."""

    name: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def room(self) -> int:
        """Elements that it takes in an arena, padding included."""
        return -(-self.size // ALIGNMENT) * ALIGNMENT


class Arena:
    """One zeroed allocation that holds `tensors` in their order.

    views: name -> array. flat: the whole as one array, padding included, if all have one dtype (the padding is zero,
    and stays zero under every operation on flat buffers).
    """

    def __init__(self, tensors: Iterable[Tensor], zeros: Callable[[tuple[int, ...], Any], Array]):
        self.tensors = tuple(tensors)
        self.nbytes = memory_of(self.tensors)
        self._bytes = zeros((self.nbytes,), np.uint8)
        self._starts = {}
        start = 0
        for tensor in self.tensors:
            self._starts[tensor.name] = start
            start += tensor.room * np.dtype(tensor.dtype).itemsize
        self.views = {tensor.name: self.view(tensor) for tensor in self.tensors}

    @property
    def flat(self) -> Array:
        (dtype,) = {tensor.dtype for tensor in self.tensors}
        return self._bytes.view(dtype)

    def view(self, tensor: Tensor) -> Array:
        """The memory of the tensor of this name, seen with another (smaller) shape."""
        start = self._starts[tensor.name]
        nbytes = tensor.size * np.dtype(tensor.dtype).itemsize
        return self._bytes[start : start + nbytes].view(tensor.dtype).reshape(tensor.shape)

    def spans(self) -> dict[str, slice]:
        """Where each tensor lies in `flat`, padding included."""
        spans, start = {}, 0
        for tensor in self.tensors:
            spans[tensor.name] = slice(start, start + tensor.room)
            start += tensor.room
        return spans


def memory_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of an arena of these tensors."""
    return sum(tensor.room * np.dtype(tensor.dtype).itemsize for tensor in tensors)
