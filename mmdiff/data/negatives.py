"""Negatives for the contrast that are chosen once for every example: partners of another class, by a table of indices."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmdiff.data.sources import Source, check_range, digest, fingerprint
from mmdiff.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class WithNegatives:
    """A `Source` whose examples bring negatives along: `name` [n, N, ...], the entry `of` of their partners, for `contrastive.table`.

        WithNegatives(source, partners(labels, count=10))

    Attributes:
      source: where examples and partners come from.
      partners: integers [len(source), N], the partners' numbers in the source.
      of: the entry that the contrast is about.
      name: the entry that is added.

    Raises:
      UserError: a table of another length, or one that names examples that are not there.
    """

    source: Source
    partners: np.ndarray
    of: str = "tokens"
    name: str = "negatives"

    def __post_init__(self):
        table = np.asarray(self.partners)
        if table.ndim != 2 or len(table) != len(self.source) or table.dtype.kind not in "iu":
            found = f"{table.dtype} {list(table.shape)}"
            raise UserError(f"the table of negatives is integer [{len(self.source)}, N] for this source, not {found}.")
        if table.size and (table.min() < 0 or table.max() >= len(self.source)):
            bad = table.min() if table.min() < 0 else table.max()
            raise UserError(f"the table of negatives names example {bad}, and the source holds 0..{len(self.source) - 1}.")
        object.__setattr__(self, "partners", table)

    def __len__(self):
        return len(self.source)

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        chosen = np.asarray(self.partners[indices])
        # One read for all: each partner once.
        rows, places = np.unique(chosen, return_inverse=True)
        return {**self.source.take(indices), self.name: self.source.take(rows)[self.of][places.reshape(chosen.shape)]}

    def fingerprint(self):
        return digest(len(self), "negatives", fingerprint(self.source), self.partners)


def partners(classes: np.ndarray, count: int = 10, seed: int = 0) -> np.ndarray:
    """For every example `count` others of another class, sampled uniformly with replacement: int64 [n, count], a function of the seed.

    Args:
      classes: [n] or, where a class is several values (a text's ids), [n, ...].

    Raises:
      UserError: all examples are of one class.
    """
    classes = np.asarray(classes)
    _, number = np.unique(classes.reshape(len(classes), -1), axis=0, return_inverse=True)
    number = number.reshape(-1)
    sizes = np.bincount(number)
    if len(sizes) < 2:
        raise UserError("negatives are of another class, and all these examples are of one.")
    by_class = np.argsort(number, kind="stable")
    first, size = (np.cumsum(sizes) - sizes)[number, None], sizes[number, None]
    uniform = np.random.Generator(np.random.Philox(seed)).random((len(classes), count))
    # A place among the others; from the example's own class on, those behind it.
    place = (uniform * (len(classes) - size)).astype(np.int64)
    return by_class[np.where(place < first, place, place + size)]
