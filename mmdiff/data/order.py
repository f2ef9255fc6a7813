"""The order of the examples: a pure function of (seed, global position).

Position p, counted over the whole run, holds example pi_e(p mod N) with e = p div N, where pi_e is a random permutation of the
N examples that depends on (seed, e) alone. So every epoch sees every example once, the state of the input pipeline is one
integer (the step), and neither the number of hosts nor where a run was interrupted changes what any step sees.

Memory and the time to the first example do not grow with N: the permutation of a large set is a keyed bijection of [0, N), computed at
the positions that are asked for. Up to `LISTED` examples it is a list, which is uniform over all permutations.
"""

from __future__ import annotations

import functools

import numpy as np

from mmdiff.errors import UserError
from mmdiff.keys import check_seed

ORDER_VERSION = 2  # a run keeps the one it was started with; 1 lists the permutation of a set of any size
LISTED = 2**16
ROUNDS = 4  # each changes both halves


def positions(step: int, global_batch: int) -> np.ndarray:
    """The global positions of one step's batch: int64 [global_batch], from step * global_batch on (`step` counts from 0)."""
    return np.arange(global_batch, dtype=np.int64) + int(step) * int(global_batch)


def indices(seed: int, positions: np.ndarray, size: int, version: int = ORDER_VERSION) -> np.ndarray:
    """The examples at `positions`: int64 of the same shape, in 0..size-1. A batch may straddle epochs.

    >>> epochs = indices(seed=0, positions=positions(step=0, global_batch=6), size=3)
    >>> sorted(epochs[:3].tolist()), sorted(epochs[3:].tolist())  # each epoch holds each example once
    ([0, 1, 2], [0, 1, 2])

    Args:
      seed: an integer in 0..2**64-1; each is another order.
      positions: non-negative global positions, int64.
      size: the number of examples N, 0 < N < 2**62.
      version: 1 or 2, see `ORDER_VERSION`.

    Raises:
      UserError: another seed or version.
    """
    if version not in (1, ORDER_VERSION):
        raise UserError(f"the order of the examples has the version {version}, but this mmdiff knows 1 to {ORDER_VERSION}: update it.")
    check_seed(seed)
    positions = np.asarray(positions, np.int64)
    epochs, offsets = positions // size, positions % size
    result = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        if version == 1 or size <= LISTED:
            result[here] = permutation(int(seed), int(epoch), int(size))[offsets[here]]
        else:
            result[here] = bijection(int(seed), int(epoch), int(size), offsets[here])
    return result


def bijection(seed: int, epoch: int, size: int, x: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0..size-1 at the places `x`, int64 of the same shape: 0.2 ms for 4,096 of any size.

    A Feistel network of 8 rounds (Black and Rogaway 2002, section 5) on pairs (l, r), x = l + 2**k r, of which there are a few more than
    N; by turns

        l <- l xor f(r) mod 2**k        r <- r + f(l) mod ceil(N / 2**k)

    with f a multiplicative hash keyed by Philox-4x64 of (seed, epoch). A result outside of [0, N), at most one in sqrt(N), is put in
    again until it is inside: what is left is a bijection of [0, N), as the network is one of the pairs.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(2 * ROUNDS)
    bits = np.uint64((size - 1).bit_length() // 2)
    columns = np.uint64(-(-size // 2 ** int(bits)))
    low, half, shift = np.uint64(2 ** int(bits) - 1), np.uint64(32), np.uint64(64) - bits

    def network(x):
        left, right = x & low, x >> bits
        for key, other in keys.reshape(ROUNDS, 2):
            left = left ^ (_hash(right, key) >> shift)
            right = right + ((_hash(left, other) >> half) * columns >> half)
            right -= (right >= columns) * columns
        return left | (right << bits)

    found = network(np.asarray(x).astype(np.uint64))
    while (outside := found >= size).any():
        found[outside] = network(found[outside])
    return found.astype(np.int64)


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 well mixed bits of words: the finaliser of MurmurHash3, whose last step the callers make."""
    x = (x ^ key) * np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    return x


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
