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
SIGNAL = 0.1  # alpha / sigma at the time at which a class is encoded


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


def by_network(
    apply: Callable,
    chain: Any,
    shape: tuple[int, ...],
    name: str,
    classes: int,
    target: str = "image",
    rms: float = 0.8,
    mixed: bool = False,
) -> Callable:
    """An encoder `(params, probabilities [B, K]) -> [B, *shape]` of a class: what the network believes of z_0 where nothing else is there.

    E(c) = rms x0_hat / RMS(x0_hat), x0_hat = chain.clean(network(z = 0 at t, class c known)), near E[z_0 | c] up to a factor, whatever
    the network predicts. (The raw output of eps, v or velocity is *minus* that.) t is the last of 1/1000, ..., 1 at which
    alpha >= sigma / 10: where alpha is tiny, all of an output for eps is error. Of probabilities it is the mean of E (K network calls), or,
    for many classes, `mixed`: E of the mean embedding (B calls). It depends on no z_t, and no gradient passes. For a network of the two
    modalities alone.

    Args:
      apply: the network. classes: K. target: the name of z. rms: of what is returned.
      chain: the process of z without what is added, a `Gaussian`; None for the raw output at t = 1, which is what the weights of runs
        from before the belief know.
      shape: of z. name: of the class.
    """
    raw = chain is None
    with jax.ensure_compile_time_eval():
        t = 1.0 if raw else last_time(chain.schedule, SIGNAL)

    def images(params, x):
        z, end = jnp.zeros((len(x), *shape)), jnp.full(len(x), t, jnp.float32)
        net_z, net_t = (z, end) if raw else chain.inputs(z, end)
        out = apply(params, {target: net_z, name: x}, {target: net_t, name: jnp.zeros(len(x))})[target]
        believed = (out if raw else chain.clean(out, z, end))[..., : shape[-1]]
        square = (believed**2).mean(tuple(range(1, believed.ndim)), keepdims=True) + (1e-6 if raw else 0.0)
        return rms * believed / jnp.sqrt(jnp.where(square > 0, square, 1.0))

    def encode(params, probabilities):
        if mixed:
            return images(params, probabilities)
        return jnp.tensordot(probabilities, images(params, jnp.arange(classes)), 1)

    return encode


def last_time(schedule: Callable, signal: float) -> float:
    """The last of the times 1/1000, ..., 1 at which alpha >= signal sigma; the first if there is none."""
    t = np.arange(1, 1001, dtype=np.float32) / 1000
    alpha, sigma = (np.asarray(c) for c in schedule(jnp.asarray(t)))
    return float(t[max(np.flatnonzero(alpha >= signal * sigma), default=0)])


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
