"""Where examples come from: a length and a way to take some by number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

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
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"examples {indices.min()}..{indices.max()} asked of a source that holds 0..{len(self) - 1}.")
        return {name: array[indices] for name, array in self.arrays.items()}


def whole(source: Source) -> dict[str, np.ndarray]:
    """Every example of a source that fits in memory, in its own order."""
    return source.take(np.arange(len(source), dtype=np.int64))
