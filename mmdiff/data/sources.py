"""Where examples come from: a length, a way to take some by number, and a fingerprint that tells two sets apart."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

HASHED = 2**26  # bytes of an array that a fingerprint reads, and
HASHED_ROWS = 4096  # rows of a larger one
SIZED = 10_000  # files whose sizes a fingerprint asks for


class Source(Protocol):
    """A finite set of examples, numbered from 0.

    A source may have `fingerprint() -> str`, which `fingerprint` calls: the length and a digest of what the examples are (`digest`), the
    same in every process and for a folder that was moved, another one where an example was added, removed, renamed or replaced.

    A source whose examples are random in part has `take_in_epochs(indices, epochs)`, too: another sample of an example in each epoch, a
    pure function of both. Training calls it, and everything else `take`.
    """

    def __len__(self) -> int:
        """The number of examples."""

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples `indices` (int64 [n], repeats allowed), one array [n, ...] per modality."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples in memory: arrays [N, ...] by modality name, all of the same length N.

    Attributes:
      arrays: as above.
      made_of: what the fingerprint says instead of the arrays' bytes, where these are computed (another machine rounds otherwise).

    Raises:
      ValueError: no arrays, no examples, or arrays of different lengths.
      IndexError: from `take`, for an index outside 0..N-1.

    >>> source = ArraySource({"image": np.zeros((3, 8, 8, 1), np.float32), "label": np.arange(3)})
    >>> len(source), source.take([2, 0])["label"].tolist()
    (3, [2, 0])
    """

    arrays: Mapping[str, np.ndarray]
    made_of: str | None = None

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

    def fingerprint(self):
        arrays = [] if self.made_of else [np.asarray(self.arrays[name]) for name in sorted(self.arrays)]
        return digest(len(self), sorted(self.arrays), self.made_of, *arrays)


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
        self._size, self._shapes = size, {
            name: [type(each).__name__, list(getattr(each, "shape", ()))] for name, each in modalities.items()}
        rngs = {name: np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))) for name in modalities}
        self._pool = ArraySource({name: modality.random(rngs[name], self.POOL) for name, modality in modalities.items()})

    def __len__(self):
        return self._size

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, self._size)
        return self._pool.take(indices % self.POOL)

    def fingerprint(self):
        return digest(self._size, "random", self._shapes)


def made_up(modalities: Mapping[str, Any], split: str, train: int = 1_000_000) -> RandomSource:
    """A `RandomSource` in place of a split of a data set: `train` examples for training, and few enough to evaluate on otherwise."""
    return RandomSource(modalities, train if split == "train" else 1024)


class Subset:
    """A `Source` of `count` examples of another, evenly spread over it; all of them, if it has no more."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))

    def __len__(self):
        return self._count

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        return self._source.take(indices * len(self._source) // self._count)

    def fingerprint(self):
        return digest(self._count, "some", fingerprint(self._source))


class OneOfSeveral:
    """A `Source` with one of the several values (captions) that an example of another has: entries `names` [n, k, ...] become [n, ...].

    Training takes another one in every epoch: of example i in epoch e it is (i + e) mod k, so that k epochs see each of them once, in the
    order of examples that the source has anyway. What evaluates takes those of epoch 0.

    >>> source = OneOfSeveral(ArraySource({"text": np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])}), "text")
    >>> source.take([0, 1])["text"].tolist(), source.take_in_epochs([0, 1], [1, 1])["text"].tolist()
    ([[1, 2], [7, 8]], [[3, 4], [5, 6]])
    """

    def __init__(self, source: Source, *names: str):
        self._source, self._names = source, names

    def __len__(self):
        return len(self._source)

    def take(self, indices):
        return self.take_in_epochs(indices, np.zeros(np.shape(indices), np.int64))

    def take_in_epochs(self, indices, epochs):
        indices, epochs = np.asarray(indices, np.int64), np.asarray(epochs, np.int64)
        own = getattr(self._source, "take_in_epochs", None)
        found = own(indices, epochs) if own else self._source.take(indices)
        chosen = {name: found[name][np.arange(len(indices)), (indices + epochs) % found[name].shape[1]] for name in self._names}
        return {**found, **chosen}

    def fingerprint(self):
        return digest(len(self), "one of several", list(self._names), fingerprint(self._source))


def published(open_split: Callable[[str], Source], count: int = 0, validation: str = "val", test: str = "val") -> Callable[[str], Source]:
    """The `data` of an `Experiment` from a set that is published with other splits: its names of them, the same where there is one alone.

    Args:
      open_split: the set's own split -> source.
      count: of what is held out, so many examples are measured, evenly spread over all of them; all by default.
      validation, test: the set's own names.
    """

    def data(split: str) -> Source:
        source = open_split({"validation": validation, "test": test}.get(split, split))
        return Subset(source, count) if count and split != "train" else source

    return data


def load_all(source: Source) -> dict[str, np.ndarray]:
    """Every example of a source that fits in memory, in its own order."""
    return source.take(np.arange(len(source), dtype=np.int64))


def fingerprint(source: Source) -> str:
    """"LENGTH-DIGEST" of a source: equal for equal examples in the same order, wherever they lie; cheap, so not every byte is read.

    What lies in files is told apart by names and sizes, caches by their manifests, arrays in memory by their bytes, made-up examples by
    what makes them, and a source without a `fingerprint` of its own by its length, its first and its last example.
    """
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return own()
    ends = source.take(np.array([0, len(source) - 1], np.int64))
    return digest(len(source), sorted(ends), *(np.asarray(ends[name]) for name in sorted(ends)))


def digest(length: int, *parts: Any) -> str:
    """"LENGTH-DIGEST" of arrays (of those above 64 MiB up to 4,096 rows, evenly spread) and JSON values."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str} {part.shape}".encode())
            if part.nbytes > HASHED:
                rows = min(len(part), HASHED_ROWS, max(2, HASHED * len(part) // part.nbytes))
                part = part[np.linspace(0, len(part) - 1, rows).astype(np.int64)]
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
        found.update(b"\0")
    return f"{length}-{found.hexdigest()}"


def sizes(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> list[list[Any]]:
    """[[name below `folder`, bytes], ...] of files; of more than 10,000 only that many, evenly spread, are asked for their size.

    One that cannot be asked has none: what reads it says so.
    """
    asked = set(np.linspace(0, len(paths) - 1, min(len(paths), SIZED)).astype(int).tolist())
    found, prefix = [], os.path.join(folder, "")
    for number, path in enumerate(paths):
        size = None
        if number in asked:
            with contextlib.suppress(OSError):
                size = path.stat().st_size
        name = str(path)
        found.append([name[len(prefix) :] if name.startswith(prefix) else os.path.relpath(name, folder), size])
    return found


def first_non_finite(batch: Mapping[str, np.ndarray], indices: np.ndarray) -> tuple[str, int] | None:
    """(name, index) of the first example of `indices` [n] with a NaN or an infinity in the arrays [n, ...] of `batch`, or None."""
    for name, array in batch.items():
        with np.errstate(over="ignore", invalid="ignore"):
            finite = array.dtype.kind not in "fcV" or np.isfinite(array.sum(dtype=np.float32))  # one pass, no second array
        if not finite:
            bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))
            if bad.size:  # a sum may overflow
                return name, int(indices[bad[0]])
    return None


def check_range(indices: np.ndarray, size: int) -> None:
    """Raises IndexError unless all `indices` are in 0..size-1 (numpy would count negative ones from the end)."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"examples {indices.min()}..{indices.max()} asked of a source that holds 0..{size - 1}.")
