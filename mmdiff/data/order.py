"""The order of the examples: a pure function of (seed, global position).

Position p, counted over the whole run, holds example pi_e(p mod N) with e = p div N, where pi_e is a random permutation of the
N examples that depends on (seed, e) alone. So every epoch sees every example once, the state of the input pipeline is one
integer (the step), and neither the number of hosts nor where a run was interrupted changes what any step sees.
"""

from __future__ import annotations

import functools

import numpy as np


def positions(step: int, global_batch: int) -> np.ndarray:
    """The global positions of one step's batch: int64 [global_batch], from step * global_batch on (`step` counts from 0)."""
    return np.arange(global_batch, dtype=np.int64) + int(step) * int(global_batch)


def indices(seed: int, positions: np.ndarray, size: int) -> np.ndarray:
    """The examples at `positions`: int64 of the same shape, in 0..size-1. A batch may straddle epochs.

    Args:
      seed: any integer, taken modulo 2**64.
      positions: non-negative global positions, int64.
      size: the number of examples N > 0.
    """
    positions = np.asarray(positions, np.int64)
    epochs, offsets = positions // size, positions % size
    result = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = permutation(int(seed) % 2**64, int(epoch), int(size))[offsets[here]]
    return result


@functools.lru_cache(maxsize=4)  # the epoch in use and the one that a batch may reach into, for two sources
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """One epoch's permutation of 0..size-1, int64 [size], the same on every machine and with every numpy.

    The stable argsort of `size` raw 64-bit words of Philox-4x64 with the key (seed, epoch): numpy guarantees the stream of a
    bit generator for ever, but not what `Generator.permutation` makes of it.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False  # shared through the cache
    return order
