"""Where examples come from: a length and a way to take some by number."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """A finite set of examples, numbered from 0."""

    def __len__(self) -> int:
        """The number of examples."""

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples `indices` (int64 [n], repeats allowed), one array [n, ...] per modality."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples in memory: arrays [N, ...] by modality name, all of the same length N.

        ArraySource({"image": images, "label": labels}).take(np.array([3, 1]))

    Raises:
      ValueError: no arrays, no examples, or arrays of different lengths.
      IndexError: from `take`, for an index outside 0..N-1.
    """

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self):
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"a source needs arrays of one length above 0, got {lengths or 'none'}.")

    def __len__(self):
        return len(next(iter(self.arrays.values())))

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        return {name: array[indices] for name, array in self.arrays.items()}


class RandomSource:
    """Made-up examples with the shapes and types of real ones: for timing and for trying a config out without its data.

    Example i is row i modulo `POOL` of arrays that are made once, so taking it costs no more than from data in memory and is a pure
    function of i, the same in every process.

        RandomSource({"image": Latents(32, 32, 4), "label": Labels(1000)})

    Args:
      modalities: name -> object with `random(rng, count)` (`data.modalities`).
      size: the number of examples that it says it has.
    """

    POOL = 256

    def __init__(self, modalities: Mapping[str, Any], size: int = 1_000_000):
        self._size = size
        rngs = {name: np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))) for name in modalities}
        self._pool = ArraySource({name: modality.random(rngs[name], self.POOL) for name, modality in modalities.items()})

    def __len__(self):
        return self._size

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, self._size)
        return self._pool.take(indices % self.POOL)


class Some:
    """A `Source` of `count` examples of another, evenly spread over it; all of them, if it has no more."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))

    def __len__(self):
        return self._count

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        return self._source.take(indices * len(self._source) // self._count)


def whole(source: Source) -> dict[str, np.ndarray]:
    """Every example of a source that fits in memory, in its own order."""
    return source.take(np.arange(len(source), dtype=np.int64))


def check_range(indices: np.ndarray, size: int) -> None:
    """Raises IndexError unless all `indices` are in 0..size-1 (numpy would count negative ones from the end)."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"examples {indices.min()}..{indices.max()} asked of a source that holds 0..{size - 1}.")
