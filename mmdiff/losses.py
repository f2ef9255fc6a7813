r"""Losses: pure functions `(params, batch, key) -> (scalar, metrics)`, made from a process, a network, times and terms.

`diffusion` corrupts the batch once and runs the network once; any number of **terms** `(out, noised) -> [B]` share that pass.
`combine` adds whole **losses**, each with its own pass. Metrics are flat dicts with keys such as "loss/image".

    loss = diffusion(process, net.apply, times.joint(image=times.uniform(), label=times.uniform()))
    loss = diffusion(process, net.apply, t, terms={
        "image": (1.0, on("image", mse(process.parts["image"], min_snr(5.0)))),
        "label": (0.1, on("label", vlb(process.parts["label"]))),
    })

A batch holds the modalities by name and `index` [B], the examples' global positions: each example's randomness is
`fold_in(key, index)`, so the loss does not depend on the mesh, the number of hosts, the micro-batching or the batch's order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import schedules
from mmdiff.processes.base import Noised, Process, fold
from mmdiff.times import Times, example_keys

Loss = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Term = Callable[[Any, Noised], Any]


def diffusion(process: Process, apply: Callable, times: Times, terms: Mapping[str, tuple[float, Term]] | None = None) -> Loss:
    """The loss of one noisy forward pass: `sum_k weight_k mean_b term_k(out, noised)[b]`.

    Args:
      process: what corrupts the data.
      apply: `(params, net_x, net_t) -> out`.
      times: `(key, index) -> t`.
      terms: name -> (weight, term); a term may return [B], or a dict of [B] by modality. The process's own loss by default.

    Returns a `Loss`; its metrics are "loss/<term>" and, for terms that return a dict, "loss/<modality>".
    """
    if terms is None:
        terms = {"": (1.0, process.loss)}

    def loss(params, batch, key):
        index = batch["index"]
        keys = example_keys(key, index)
        t = times(jax.random.fold_in(key, zlib.crc32(b"times")), index)
        noised = process.corrupt(fold(keys, "corrupt"), process.take(batch), t)
        out = apply(params, *process.inputs(noised.xt, noised.t))
        total, metrics = jnp.zeros((), jnp.float32), {}
        for name, (weight, term) in terms.items():
            values = term(out, noised)
            for part, value in values.items() if isinstance(values, Mapping) else (("", values),):
                value = value.astype(jnp.float32).mean()
                metrics["/".join(["loss", *filter(None, (name, part))])] = value
                total = total + weight * value
        return total, metrics

    return loss


def combine(**losses: tuple[float, Loss]) -> Loss:
    """`sum_i weight_i loss_i`, each with its own key and its metrics under its name: `combine(draw=(1.0, a), name=(0.1, b))`."""

    def loss(params, batch, key):
        total, metrics = jnp.zeros((), jnp.float32), {}
        for name, (weight, part) in losses.items():
            value, extra = part(params, batch, jax.random.fold_in(key, zlib.crc32(name.encode())))
            total = total + weight * value
            metrics |= {f"{name}/loss": value, **{f"{name}/{key}": item for key, item in extra.items()}}
        return total, metrics

    return loss


def on(name: str, term: Term) -> Term:
    """A term of one modality, applied within a joint pass."""

    def joint_term(out, noised):
        pick = (None if tree is None else tree[name] for tree in (noised.x0, noised.xt, noised.t, noised.noise))
        return term(out[name], Noised(*pick))

    return joint_term


# Weights of the squared error in eps, functions of (schedule, t). Constant 1 is DDPM's simple loss.


def snr() -> Callable:
    """The error in x_0 weighted by SNR, i.e. the plain error in eps."""
    return lambda schedule, t: jnp.ones_like(t)


def min_snr(gamma: float = 5.0) -> Callable:
    """`min(SNR, gamma)` on x_0, i.e. `min(1, gamma / SNR)` on eps (Hang et al. 2023)."""

    def weight(schedule, t):
        return jnp.minimum(1.0, gamma * jnp.exp(-schedules.log_snr(schedule, t)))

    return weight


def sigmoid(bias: float = 0.0) -> Callable:
    """`-dlogSNR/dt sigmoid(bias - logSNR)` on eps (Kingma & Gao 2023; Hoogeboom et al. 2024)."""

    def weight(schedule, t):
        value, slope = jax.jvp(lambda u: schedules.log_snr(schedule, u), (t,), (jnp.ones_like(t),))
        return -slope * jax.nn.sigmoid(bias - value)

    return weight


def mse(process, weight: Callable) -> Term:
    """Weighted squared error of a `Gaussian`, whatever it predicts: `weight(schedule, t) mean (eps - eps_hat)^2`, zero at t = 0."""

    def term(out, noised):
        t = jnp.where(noised.t > 0, noised.t, 0.5)
        to_eps = process.eps_scale(t) ** 2
        # Where no signal is left a weight may be infinite, but x_t says nothing about eps - x_0 there: the product's limit is 0.
        scale = jnp.where(to_eps > 0, weight(process.schedule, jnp.where(to_eps > 0, t, 0.5)) * to_eps, 0.0)
        return scale * process.loss(out, noised)

    return term


def vlb(process, steps: int | None = None) -> Term:
    """One Monte-Carlo term of the variational bound, in nats per dimension of the data.

    With `steps` = T it is `T KL(q(x_{t-1/T} | x_t, x_0) || p)` at t on the grid i/T (use `times.on_grid(T)`); without, the
    continuous-time integrand. The constant prior term is left out, and so is a Gaussian's step to t = 0, which a decoder without
    parameters takes.
    """

    def term(out, noised):
        x0_hat = process.clean(out, noised.xt, noised.t)
        if steps is None:
            nats = process.rate(noised, x0_hat)
        else:
            # i/T - 1/T in float32 may miss (i-1)/T by an ulp: snap to the grid.
            s = jnp.maximum(jnp.round(noised.t * steps) - 1.0, 0.0) / steps
            nats = steps * process.kl(noised, x0_hat, s)
            nats = jnp.where(jnp.isinf(nats), 0.0, nats)
        return nats / max(1, noised.x0.size // noised.x0.shape[0])

    return term


def sigma_vlb(process, steps: int) -> Term:
    """`vlb(process, steps)` of a `LearnedSigma` with the gradient of its mean stopped: it trains the variance and nothing else.

    DiT, with 1,000 steps, adds it to the squared error of eps with the weight 1 / (1000 log 2): one step's KL in bits per dimension
    (the hybrid loss of Nichol & Dhariwal 2021, equation 16).
    """
    bound = vlb(process, steps)

    def term(out, noised):
        mean, sigma = jnp.split(out, 2, axis=-1)
        return bound(jnp.concatenate([jax.lax.stop_gradient(mean), sigma], -1), noised)

    return term
