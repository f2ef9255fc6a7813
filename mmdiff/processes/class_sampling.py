"""Samples of classes by their probabilities, exact for rare ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmdiff.processes.base import Array


def sample_classes(key: Array, weights: Array) -> Array:
    """A sample of the last axis, class k with probability weights[k] / sum(weights): int32 [...], for weights >= 0 [..., K].

    Exact to float32's relative precision for every class and every group of classes, however rare: a binary tree of sums is descended
    from its root, and at each node the rarer side is compared with a uniform number of 64 bits. `jax.random.categorical` has 23 bits: it
    samples events below 1e-6 too seldom and those below 1e-8 never. Costs O(K) additions and 2 log2(K) random words a sample.
    """
    return descend(key, tree_of_sums(weights), weights.shape[:-1])


def tree_of_sums(weights):
    """The levels of the tree, root first. Node j of a level with n nodes has the children j and j + m of the next, m = n."""
    levels = [weights]
    while (size := levels[-1].shape[-1]) > 1:
        half = (size + 1) // 2
        left, right = levels[-1][..., :half], levels[-1][..., half:]
        levels.append(left.at[..., : size - half].add(right))
    return levels[::-1]


def descend(key, levels, shape):
    """The leaf that is reached, int32 of that shape; `levels` are of one tree, [n], or of one for each, [*shape, n]."""
    return follow(random_words(key, levels[-1].shape[-1], shape), levels)


def random_words(key, classes, shape):
    """What a sample of so many classes needs of randomness, uint32 [levels, 2, *shape]."""
    return jax.random.bits(key, ((classes - 1).bit_length(), 2, *shape), jnp.uint32)


def follow(words, levels):
    """`descend` with given `random_words`."""
    place = jnp.zeros(words.shape[2:], jnp.int32)
    for level, words in zip(levels[1:], words):
        size = level.shape[-1]
        other = place + (size + 1) // 2

        def weight(at, level=level):
            return jnp.take(level, at) if level.ndim == 1 else jnp.take_along_axis(level, at[..., None], axis=-1)[..., 0]

        here, there = weight(place), jnp.where(other < size, weight(jnp.minimum(other, size - 1)), 0.0)
        place = jnp.where(_chance(words, here, there), place, other)
    return place


def _chance(words, a, b):
    """True with probability a / (a + b), from two random words: the smaller of the two is compared with a number that is fine near 0."""

    def fraction(high, low):
        return high.astype(jnp.float32) * 2.0**-32 + low.astype(jnp.float32) * 2.0**-64

    high, low = words
    # The complement of the bits is the number's distance from 1.
    return jnp.where(a <= b, fraction(high, low) * (a + b) < a, fraction(~high, ~low) * (a + b) >= b)
