"""Times: functions `(key, index) -> t` that say at which noise level each example, and each of its modalities, is trained.

`index` [B] holds the examples' global positions, `key` is the step's: an example's time depends on these two alone, never on the
mesh, the micro-batching or its place in the batch. A time is float32 [B], or a dict of them by modality for a `Joint`.

    joint(image=uniform(), label=uniform())                          independent (UniDiffuser)
    shared("image", "label")                                         one time for both
    joint(image=uniform(), label=constant(0.0))                      image given label
    mixture((0.9, joint(image=uniform(), label=constant(0.0))),      class-conditional training with label dropout
            (0.1, joint(image=uniform(), label=constant(1.0))))
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff.errors import UserError

Times = Callable[[jax.Array, jax.Array], Any]

# Irrational steps, independent over the rationals: modalities that walk by different ones fill the square (Kronecker sequences).
STEPS = (0.6180339887498949, 0.4142135623730951, 0.7320508075688772, 0.6457513110645906)


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per example, `fold_in(key, index)`, [B]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _named(key, name):
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def uniform(low: float = 0.0, high: float = 1.0) -> Times:
    """t ~ U(low, high], independently; never exactly `low`, so that t = 0 keeps its meaning of "given"."""
    if not 0 <= low < high <= 1:
        raise UserError(f"uniform times need 0 <= low < high <= 1, got {low} and {high}.")

    def times(key, index):
        u = jax.vmap(jax.random.uniform)(example_keys(key, index))
        return high - u * (high - low)

    return times


def stratified(walk: int = 0) -> Times:
    """Evenly spread over any run of consecutive positions: `t = frac(u + index * step)`, u one draw per step.

    A Kronecker sequence has the low variance of antithetic or stratified times (VDM, appendix I.1) without knowing the batch.
    Modalities that are to be independent need different walks, 0 to 3: `joint(image=stratified(0), label=stratified(1))`.
    """
    if walk not in range(len(STEPS)):
        raise UserError(f"stratified has the walks 0 to {len(STEPS) - 1}, not {walk}.")

    def times(key, index):
        # step * 2^32 in wrapping integers is exact where floats would lose the index's low bits.
        place = index.astype(jnp.uint32) * jnp.uint32(round(STEPS[walk] * 2**32))
        fraction = (place >> 8).astype(jnp.float32) / 2**24
        t = jnp.mod(jax.random.uniform(key) + fraction, 1.0)
        return 1.0 - t

    return times


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """`t = sigmoid(mean + std n)`, n normal: more weight in the middle (Esser et al. 2024, section 3.1)."""

    def times(key, index):
        n = jax.vmap(jax.random.normal)(example_keys(key, index))
        return jax.nn.sigmoid(mean + std * n)

    return times


def on_grid(steps: int) -> Times:
    """t uniform on 1/T, 2/T, ..., 1: the times of a chain with T steps."""
    if steps < 1:
        raise UserError(f"on_grid needs at least one step, got {steps}.")

    def times(key, index):
        i = jax.vmap(lambda k: jax.random.randint(k, (), 1, steps + 1))(example_keys(key, index))
        return i.astype(jnp.float32) / steps

    return times


def constant(value: float) -> Times:
    """Pinned: 0 makes a modality a condition, 1 makes it absent."""
    if not 0 <= value <= 1:
        raise UserError(f"a time lies in [0, 1], got {value}.")
    return lambda key, index: jnp.full(index.shape, value, jnp.float32)


def joint(**times: Times) -> Times:
    """Independent times, one rule per modality."""
    return lambda key, index: {name: rule(_named(key, name), index) for name, rule in times.items()}


def shared(*names: str, times: Times | None = None) -> Times:
    """One time for all the named modalities; uniform by default."""
    rule = times or uniform()

    def shared_times(key, index):
        t = rule(key, index)
        return {name: t for name in names}

    return shared_times


def mixture(*choices: tuple[float, Times]) -> Times:
    """Each example follows one of several rules, with the given weights: `mixture((0.5, a), (0.5, b))`."""
    weights = [weight for weight, _ in choices]
    if not weights or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"mixture: the weights must be >= 0 and sum to 1, got {weights}.")

    def times(key, index):
        u = jax.vmap(jax.random.uniform)(example_keys(_named(key, "mixture"), index))
        chosen = choices[-1][1](jax.random.fold_in(key, len(choices) - 1), index)
        edge = sum(weights)
        for i in range(len(choices) - 2, -1, -1):
            edge -= weights[i + 1]
            other = choices[i][1](jax.random.fold_in(key, i), index)
            if jax.tree.structure(other) != jax.tree.structure(chosen):
                raise UserError("mixture: the rules give times for different modalities; each must name all of them.")
            chosen = jax.tree.map(lambda a, b, e=edge: jnp.where(u < e, a, b), other, chosen)
        return chosen

    return times
