r"""Variational bounds on -log p(x_0), in nats per example, for any process.

Both bounds have the same three parts, taken along a **path** u -> t from the data (u = 0) to the prior (u = 1),

    discrete time     prior_kl + sum_{i=1}^T KL(q(x_{u=(i-1)/T} | x_{u=i/T}, x_0) || p) + decoder
    continuous time   prior_kl + int_0^1 rate(t(u)) t'(u) du                            + decoder

The prior term is `process.prior_kl`, the middle one `process.kl` or `process.elbo_rate` at draws of x_t, and `process.decoder`,
-log p(x_0 | x_{t(0)}) by the network, closes what the path leaves open (nothing where it starts at t = 0). The first is the likelihood
bound of the sampler that takes these T steps, the second its limit. Both are unbiased estimates; average over keys for less variance.

For a `Joint` a path gives one time per modality. What it holds at t = 0 is a condition, what it holds at t = 1 is absent, and
the bound is on -log p(moving modalities | conditions):

    along(process, line())                                -log p(image, label), both at the same times
    along(process, line(), pinned=["image"])              -log p(label | image)
    along(process, geometric(), absent=["label"])         -log p(image)

Bits per dimension of 8-bit images in [-1, 1] as published for a chain of T steps, which draws T - 1 times and then decodes:

    nats = discrete_time(process, apply, params, keys, x0, line(1 / T), T - 1, discretized(jnp.linspace(-1, 1, 256), T))
    bits = bits_per_dim(nats, x0.shape[1:])

Sources: Ho et al. 2020, equation 5; Kingma et al. 2021 (VDM), equations 11 to 18; Austin et al. 2021 (D3PM); Shi et al. 2024 (MD4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.checks import is_whole
from mmdiff.errors import UserError
from mmdiff.evals.evaluator import example_keys, in_batches
from mmdiff.processes.base import Joint, Noised, Process, bcast, fold, per_example_sum

Path = Callable[[jax.Array], Any]
Decoder = Callable[[Process, Noised, Any], jax.Array]


def line(t_min: float = 0.0) -> Path:
    """`t = t_min + u (1 - t_min)`. With t_min = 0 and T steps these are the times i/T; with t_min = 1/T and T - 1 steps so are they."""
    _check_start(t_min, 0.0)
    return lambda u: t_min + u * (1.0 - t_min)


def geometric(t_min: float = 1e-3) -> Path:
    """`t = t_min^(1 - u)`: even in log t, for Gaussians, whose rate goes as 1/t towards the data."""
    _check_start(t_min, 1e-12)
    return lambda u: jnp.exp((1.0 - u) * math.log(t_min))


def along(process: Process, path: Path, pinned: Sequence[str] = (), absent: Sequence[str] = ()) -> Path:
    """The path of a `Joint` whose modalities move together, save those `pinned` at t = 0 and those `absent` at t = 1."""
    if not isinstance(process, Joint):
        if pinned or absent:
            raise ValueError("along: `pinned` and `absent` name modalities of a Joint; this process has only one.")
        return path
    unknown = [name for name in (*pinned, *absent) if name not in process.parts]
    if unknown:
        raise ValueError(f"along: no modality {', '.join(unknown)}; there are {', '.join(process.parts)}.")
    if len({*pinned, *absent}) == len(process.parts):
        raise ValueError("along: every modality is pinned or absent, so nothing is left to bound.")

    def joint(u):
        return {
            name: jnp.zeros_like(u) if name in pinned else jnp.ones_like(u) if name in absent else path(u) for name in process.parts
        }

    return joint


def discrete_time(
    process: Process,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    x0: Any,
    path: Path,
    steps: int,
    decoders: Any = None,
) -> Any:
    """The bound of the chain with `steps` equal steps in u, from one draw of x_t at each: T + 1 network calls.

    Args:
      process, apply, params: as in sampling.
      keys: [B], one per example.
      x0: clean data, or a dict of them for a `Joint`.
      path: u [B] -> t; see `along`.
      steps: T.
      decoders: -log p(x_0 | x_t) where the path begins, `(process, noised, x0_hat) -> [B]`; for a `Joint` a dict, by modality. By
        default `process.decoder`: a discrete process takes one last step to t = 0, a `Gaussian` has a density. For quantised data use
        `discretized(values, steps)` or `levels(values)`.

    Returns nats [B], or a dict of them by modality: their sum is the bound, zero for what does not move.
    """
    if not is_whole(steps, 1):
        raise ValueError(f"discrete_time needs at least one step, got {steps}.")
    process, count = process.bind(params), keys.shape[0]

    def body(total, i):
        t, s = (path(jnp.full(count, u, jnp.float32)) for u in (i / steps, (i - 1) / steps))
        noised, x0_hat = _look(process, apply, params, _fold_in(keys, i), x0, t)
        return jax.tree.map(jnp.add, total, process.kl(noised, x0_hat, s)), None

    ends = _ends(process, apply, params, keys, x0, path, decoders)
    return jax.lax.scan(body, ends, jnp.arange(1, steps + 1))[0]


def continuous_time(
    process: Process,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    x0: Any,
    path: Path,
    draws: int,
    decoders: Any = None,
) -> Any:
    """The bound of infinitely many steps, from stratified times `u_j = (j + U) / draws`, one U per example: draws + 1 network calls.

    The arguments and the result are those of `discrete_time`. The path may be any increasing function of u: its slope is part of
    the integrand. `Markov` chains have no continuous time; they get T times the KL of one step.
    """
    if not is_whole(draws, 1):
        raise ValueError(f"continuous_time needs at least one draw, got {draws}.")
    process, offset = process.bind(params), jax.vmap(jax.random.uniform)(fold(keys, "time"))

    def body(total, j):
        u = (j + offset) / draws
        t, slope = jax.jvp(path, (u,), (jnp.ones_like(u),))
        noised, x0_hat = _look(process, apply, params, _fold_in(keys, j + 1), x0, t)
        # What stands still has no rate, even where its own would be infinite.
        return jax.tree.map(
            lambda sum_, rate, v: sum_ + jnp.where(v > 0, rate * v, 0.0) / draws, total, process.elbo_rate(noised, x0_hat), slope
        ), None

    ends = _ends(process, apply, params, keys, x0, path, decoders)
    return jax.lax.scan(body, ends, jnp.arange(draws))[0]


def discretized(values: Sequence[float], steps: int | None = None) -> Decoder:
    r"""For data on known levels: the probability of x_0's bin under N(x0_hat, Sigma), DDPM's and improved DDPM's; see `Gaussian.decoder`.

    The bound is then on -log of a probability. Unlike `levels` it is the network's own: the better it knows x_0, the less is paid.

    Args:
      values: the levels, increasing; `jnp.linspace(-1, 1, 256)` for 8-bit data, `jnp.linspace(-1, 1, 17)` for the digits.
      steps: T of the chain, for beta~ as Sigma. Without it (continuous time), Sigma = (sigma / alpha)^2.
    """
    values = _increasing("discretized", values)
    if steps is not None and not is_whole(steps, 1):
        raise UserError(f"discretized needs at least one step, got {steps}.")

    def decoder(process, noised, x0_hat):
        return process.decoder(noised, x0_hat, values, None if steps is None else noised.t + 1.0 / steps)

    return decoder


def levels(values: Sequence[float]) -> Decoder:
    r"""For data on known levels v_1 .. v_L: `p(x_0 = v_i | x_t) = softmax_i(-(x_t - alpha v_i)^2 / (2 sigma^2))` (VDM, equation 36).

    The bound is then on -log of a probability, whatever the network: it suits a path that begins where the levels hardly blur. A value
    between the levels counts as the nearest one.
    """
    values = _increasing("levels", values)

    def decoder(process, noised, x0_hat):
        alpha, sigma = (bcast(c, noised.x0)[..., None] for c in process.schedule(noised.t))
        log_p = jax.nn.log_softmax(-0.5 * ((noised.xt[..., None] - alpha * values) / sigma) ** 2)
        nearest = jnp.argmin(jnp.abs(noised.x0[..., None] - values), axis=-1)
        return -per_example_sum(jnp.take_along_axis(log_p, nearest[..., None], axis=-1)[..., 0])

    return decoder


def total(nats: Any) -> jax.Array:
    """The sum over the modalities, [B]."""
    return sum(nats.values()) if isinstance(nats, Mapping) else nats


def bits_per_dim(nats: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Nats per example -> bits per dimension, for one example's `shape`: `nats / (log 2 * size)`.

    >>> float(bits_per_dim(jnp.array([64 * math.log(2)]), (8, 8, 1))[0])
    1.0
    """
    return nats / (math.log(2) * math.prod(shape))


def held_out_bits(experiment, params, key, data: Mapping[str, np.ndarray], target: str, steps: int, batch: int) -> np.ndarray:
    """The bound of a chain of `steps` steps on -log2 p(target | the other modalities) per token, [n]; one draw at every step."""
    process, shape = experiment.process, experiment.shape
    others = [name for name in shape if name != target]
    path = along(process, line(), pinned=others)

    def bound(params, keys, x0):
        nats = discrete_time(process, experiment.apply, params, keys, x0, path, steps)
        return bits_per_dim(nats[target], shape[target])

    x0 = {name: data[name] for name in shape}
    return in_batches(bound, params, example_keys(key, len(data[target])), x0, batch)


def _look(process, apply, params, keys, x0, t):
    """A draw of x_t and the network's belief about it."""
    noised = process.corrupt(keys, x0, t)
    return noised, process.clean(apply(params, *process.inputs(noised.xt, noised.t)), noised.xt, noised.t)


def _ends(process, apply, params, keys, x0, path, decoders):
    """prior_kl + decoder, for what moves."""
    if decoders and isinstance(process, Joint) != isinstance(decoders, Mapping):
        wanted = f"a dict by modality ({', '.join(process.parts)})" if isinstance(process, Joint) else "one function"
        raise UserError(f"decoders are {wanted} for this process.")
    if isinstance(process, Joint) and (unknown := [name for name in decoders or {} if name not in process.parts]):
        raise ValueError(f"decoders: no modality {', '.join(unknown)}; there are {', '.join(process.parts)}.")
    start, end = (path(jnp.full(keys.shape[0], u, jnp.float32)) for u in (0.0, 1.0))
    noised, x0_hat = _look(process, apply, params, _fold_in(keys, 0), x0, start)

    def of(process, noised, x0_hat, prior, end, decoder):
        last = (decoder or type(process).decoder)(process, noised, x0_hat)
        return jnp.where(end > noised.t, prior + last, 0.0)

    if not isinstance(process, Joint):
        return of(process, noised, x0_hat, process.prior_kl(x0), end, decoders)
    decoders = dict(decoders or {})
    parts, prior = process.split(noised), process.prior_kl(x0)
    return {
        name: of(part, parts[name], x0_hat[name], prior[name], end[name], decoders.get(name)) for name, part in process.parts.items()
    }


def _fold_in(keys, i):
    return jax.vmap(lambda key: jax.random.fold_in(key, i))(fold(keys, "noise"))


def _increasing(name, values):
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    if values.ndim != 1 or values.size < 2 or not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
        raise UserError(f"{name} needs at least two finite values in a row that increase, got {np.array2string(values, threshold=8)}.")
    return values


def _check_start(t_min, low):
    if not low <= t_min < 1:
        raise ValueError(f"a path starts at {low:g} <= t_min < 1, got {t_min}.")
