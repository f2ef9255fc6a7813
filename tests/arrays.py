"""Random arrays from numpy. What a test file holds at its top is made whenever tests are collected: nothing is to be compiled for it."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


def uniform(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """In [-1, 1)."""
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def integers(seed: int, shape: tuple[int, ...], low: int, high: int) -> jax.Array:
    """low .. high - 1."""
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), jnp.int32)
