"""Arrays that are read when they are needed: what a file of weights holds, and what keys and layouts are converted by.

A `Tensor` has a shape and a type; `read` gives NumPy values of all of it or of a part. Conversions (transpose, split, stack, ...) give
new tensors and read nothing, thus weights of any size pass leaf by leaf, and each host reads only the parts of its own devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is read on demand.

    Attributes:
      shape: of all of it.
      dtype: NumPy's (bfloat16 as ml_dtypes' type).
      read_part: one slice with step 1 for each axis -> NumPy array of that part.

    >>> weight = Tensor.of(np.arange(6).reshape(2, 3))
    >>> weight.transpose(1, 0).read((slice(2, 3), slice(0, 2)))
    array([[2, 5]])
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_part: Callable[[Index], np.ndarray] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, array: Any) -> Tensor:
        """A tensor of values that are there already."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, lambda index: array[index])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """The values of a part; by default of all."""
        index = tuple(index) + (slice(None),) * (self.ndim - len(index))
        return self.read_part(tuple(slice(*of.indices(length)[:2]) for of, length in zip(index, self.shape, strict=True)))

    def transpose(self, *axes: int) -> Tensor:
        """As `numpy.transpose`."""
        shape, inverse = tuple(self.shape[axis] for axis in axes), np.argsort(axes)
        return Tensor(shape, self.dtype, lambda index: self.read_part(tuple(index[i] for i in inverse)).transpose(axes))

    def part(self, start: int, stop: int, axis: int = 0) -> Tensor:
        """Rows start .. stop - 1 along one axis."""

        def read(index):
            of = index[axis]
            return self.read_part((*index[:axis], slice(of.start + start, of.stop + start), *index[axis + 1 :]))

        return Tensor((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), self.dtype, read)

    def split(self, parts: int, axis: int = 0) -> list[Tensor]:
        """Equal parts along one axis, as queries, keys and values of one fused product."""
        size = self.shape[axis] // parts
        return [self.part(i * size, (i + 1) * size, axis) for i in range(parts)]

    def map(self, function: Callable[[np.ndarray], np.ndarray], shape: Sequence[int] | None = None) -> Tensor:
        """`function` of all values: reads the whole tensor for each part. shape: of the result, by default as before."""
        return Tensor(tuple(self.shape if shape is None else shape), self.dtype, lambda index: function(self.read())[index])

    def reshape(self, *shape: int) -> Tensor:
        """As `numpy.reshape`, without -1."""
        return self.map(lambda array: array.reshape(shape), shape)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape and type along a new first axis."""
    first = tensors[0]

    def read(index):
        return np.stack([tensor.read_part(index[1:]) for tensor in tensors[index[0]]])

    return Tensor((len(tensors), *first.shape), first.dtype, read)
