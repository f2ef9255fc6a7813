r"""Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with a token's indices, so that the score of two
tokens of one modality depends on the difference of their indices alone.

An index of A axes (an image has rows and columns, a text its one) turns 1/A of a head's D/2 pairs of features each, pair i of n by

    index theta^(-i / n),        theta = 10000.

Each modality counts from 0: between two of them an angle is a constant and means nothing, and position 0 (a label) is not turned.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError


def angles(positions: np.ndarray, size: int, theta: float = 10000.0) -> np.ndarray:
    """The angles [N, size / 2] of tokens at positions [N, A], for heads that are `size` wide (A divides size / 2).

    >>> angles(np.array([[0], [2]]), 4).tolist()
    [[0.0, 0.0], [2.0, 0.02]]
    """
    axes = positions.shape[1]
    if size % (2 * axes):
        raise UserError(f"rotary positions with {axes} axes need heads whose width {2 * axes} divides, not {size}: change width or heads.")
    count = size // 2 // axes
    rates = theta ** -(np.arange(count) / count)
    return (positions[:, :, None] * rates).reshape(len(positions), -1)


def rotate(x: jax.Array, angles: np.ndarray, kept: jax.Array | None = None) -> jax.Array:
    """Queries or keys [B, N, H, D] turned by angles [N, D/2], in float32 or wider; features i and i + D/2 are a pair.

    Of tokens that are `kept` [B, N] out of more, angles are of all.
    """
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = (np.float32(function(angles)) for function in (np.cos, np.sin))
    cos, sin = (table[..., None, :] if kept is None else jnp.asarray(table)[kept][..., None, :] for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
