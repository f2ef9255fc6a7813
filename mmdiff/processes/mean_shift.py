"""What an `Aggregate` adds to the mean of its target: weights a(t), encoders E and the two of them together, `MeanShift`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import schedules

Weight = Callable[[schedules.Schedule, jax.Array], jax.Array]  # (schedule of z, t) -> a(t)


def moving_target(kappa: float = 1.0, progress: Callable[[jax.Array], jax.Array] = lambda t: t) -> Weight:
    """`a = kappa alpha(t) P(t)`: the mean is alpha (z_0 + kappa P E), from z_0 to z_0 + kappa E as time goes on; P(t) = t by default.

    At t = 1 it is as small as alpha, whatever E: the prior stays that of z alone. E should be as large as z_0 (in root mean square).
    """
    return lambda schedule, t: kappa * schedule(t)[0] * progress(t)


def card() -> Weight:
    """`a = 1 - alpha(t)`: CARD (Han et al. 2022), w = alpha(s) / alpha(t) - 1. The chain ends at N(E(x), sigma^2): for a known x."""
    return lambda schedule, t: 1.0 - schedule(t)[0]


def stepwise(w: Sequence[float]) -> Weight:
    """The paper's w_1 .. w_T on a chain of T steps: `a_i = sqrt(alpha_i) (w_i + a_(i-1))`, exact at t = i / T, a / alpha linear between.

    Constants are `stepwise([0.001] * 1000)`; their end is not that of z alone, but that plus a_T E.
    """
    w = np.asarray(w, np.float64)
    if w.ndim != 1 or not w.size:
        raise ValueError(f"stepwise needs one weight per step of the chain, [T], not an array of shape {w.shape}.")

    def weight(schedule, t):
        with jax.ensure_compile_time_eval():
            alpha = np.asarray(schedule(jnp.arange(w.size) / w.size)[0], np.float64)
        drift = np.cumsum(np.append(0.0, w / alpha))  # a / alpha at the nodes
        return schedule(t)[0] * jnp.interp(t, jnp.arange(w.size + 1) / w.size, jnp.asarray(drift))

    return weight


def transition(weight: Weight, schedule: schedules.Schedule, t: jax.Array, s: jax.Array) -> jax.Array:
    """`w = a(t) alpha(s) / alpha(t) - a(s)`, so that z_t = (alpha(t) / alpha(s)) (z_s + w E) + noise: what `stepwise` inverts."""
    return weight(schedule, t) * schedule(s)[0] / schedule(t)[0] - weight(schedule, s)


def identity(x: jax.Array) -> jax.Array:
    """The encoder of what already lives in the space of z."""
    return x


def template(table: Any) -> Callable[[jax.Array], jax.Array]:
    """The encoder of classes by one array each, `table` [K, *shape]: probabilities [B, K] -> their mean [B, *shape].

    A frozen generator of labels is such a table, too: `template(generator(jnp.arange(K)))`.
    """
    table = jnp.asarray(table)

    def encode(probabilities):
        return jnp.tensordot(probabilities, table, 1, precision=jax.lax.Precision.HIGHEST)

    return encode


@dataclasses.dataclass(frozen=True)
class MeanShift:
    """How a modality enters the mean.

    Attributes:
      encode: E, from what `clean` says of the modality (probabilities [B, ..., K] of a discrete one, else its array) to an array of the
        target's shape; a fixed function, through which no gradient passes.
      weight: a, as `(schedule, t) -> a(t)`; a(0) counts as 0.
      shared: E is the network itself, `encode(params, x)`. It then has to be bound to parameters, which losses and samplers do: in
        training to the averaged ones, which move slowly.
    """

    encode: Callable[..., jax.Array]
    weight: Weight
    shared: bool = False
