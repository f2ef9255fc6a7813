"""Arrays that are read when they are needed: what a file of weights holds, and what keys and layouts are converted by.

A `Tensor` has a shape and a type; `read` gives NumPy values of all of it or of a part. Conversions (transpose, split, stack, ...) give
new tensors and read nothing, thus weights of any size pass leaf by leaf, and each host reads only the parts of its own devices.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.files import FileError, failed

BLOCK = 2**24  # bytes that are read at once

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

    def put(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """The values on the devices of a sharding, part by part: the host holds one part at a time, of its own devices only."""
        devices: dict[Any, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(of.indices(length)[:2] for of, length in zip(index, self.shape, strict=True))
            devices.setdefault(bounds, []).append(device)
        placed = []
        for bounds, of in devices.items():
            part = self.read([slice(*bound) for bound in bounds])
            placed += [jax.device_put(part, device).block_until_ready() for device in of]
        return jax.make_array_from_single_device_arrays(self.shape, sharding, placed)

    def astype(self, dtype: Any) -> Tensor:
        """As `numpy.ndarray.astype`, part by part."""
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else Tensor(self.shape, dtype, lambda index: self.read_part(index).astype(dtype))

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


def is_float(dtype: Any) -> bool:
    """Whether numbers of this type are floats, of those that NumPy lacks, too."""
    return jnp.issubdtype(dtype, jnp.floating)


def widest(tensors: Sequence[Tensor]) -> np.dtype:
    """The type that holds the numbers of all: the widest, float32 for bfloat16 with float16; one that is no float stays to be seen."""
    types = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    if others := [dtype for dtype in types if not is_float(dtype)]:
        return others[0]
    wide = [dtype for dtype in types if dtype.itemsize == max(each.itemsize for each in types)]
    return wide[0] if len(wide) == 1 else np.dtype(np.float32)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first axis, in the `widest` of their types."""
    first, dtype = tensors[0], widest(tensors)

    def read(index):
        found = np.empty([of.stop - of.start for of in index], dtype)
        for row, tensor in enumerate(tensors[index[0]]):
            found[row] = tensor.read_part(index[1:])
        return found

    return Tensor((len(tensors), *first.shape), dtype, read)


def stored(path: Any, file: BinaryIO, start: int, dtype: np.dtype, shape: Sequence[int]) -> Tensor:
    """Numbers that lie in row-major order in an open file, from byte `start`; `path` is what errors call the file."""
    shape = tuple(shape)
    rows = shape or (1,)
    row = math.prod(rows[1:]) * dtype.itemsize

    def load(into: np.ndarray, offset: int) -> None:
        view, done = memoryview(into.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            try:
                got = os.preadv(file.fileno(), [view[done : done + 2**30]], offset + done)
            except OSError as error:
                raise failed(path, error) from error
            if not got:
                raise FileError(path, "has become shorter since it was opened", "copy it again")
            done += got

    def read(index: Index) -> np.ndarray:
        index = index or (slice(0, 1),)
        found = np.empty([of.stop - of.start for of in index], dtype)
        if not found.size:
            return found
        if found.shape[1:] == rows[1:]:
            load(found, start + index[0].start * row)
            return found if shape else found.reshape(())
        step = max(1, BLOCK // row)
        for first in range(0, len(found), step):
            block = np.empty((min(step, len(found) - first), *rows[1:]), dtype)
            load(block, start + (index[0].start + first) * row)
            found[first : first + step] = block[(slice(None), *index[1:])]
        return found

    return Tensor(shape, dtype, read)
