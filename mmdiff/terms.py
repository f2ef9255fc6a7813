r"""Terms: functions `(out, noised) -> [B]` of the network's output and the corrupted batch, that share one forward pass.

`losses.diffusion` takes any number of them with weights, and all of them are names of `losses`, too: `losses.vlb(process)`.

    losses.diffusion(process, net.apply, t, {
        "image": (1.0, on("image", mse(process.parts["image"], min_snr(5.0)))),
        "label": (0.1, on("label", vlb(process.parts["label"]))),
    })
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import schedules
from mmdiff.checks import is_whole
from mmdiff.errors import UserError
from mmdiff.lazy_logits import tokenwise
from mmdiff.microbatches import whole_batch
from mmdiff.processes.base import Noised, per_example_mean
from mmdiff.processes.discrete import LOG_FLOOR

Term = Callable[[Any, Noised], Any]
"""`(out, noised) -> [B]`: the network's output and the corrupted batch to one number for each example."""


@dataclasses.dataclass(frozen=True)
class InBatchTerm:
    """A term that compares the examples of a batch: `contrast(embed(out, noised))`, [B].

    Attributes:
      embed: `(out, noised) -> ` a pytree of arrays [B, ...], each example's own: what the comparison needs, no more. It is held for the
        whole batch, `out` for a micro-batch.
      contrast: that pytree, of the whole batch -> [B]. It has no parameters but those in it.
    """

    embed: Callable[[Any, Noised], Any]
    contrast: Callable[[Any], jax.Array]

    def __call__(self, out, noised):
        return self.contrast(whole_batch(self.embed(out, noised)))


def on(name: str, term: Term) -> Term:
    """A term of one modality, applied within a joint pass."""
    if isinstance(term, InBatchTerm):
        return dataclasses.replace(term, embed=on(name, term.embed))

    def joint_term(out, noised):
        return term(out[name], noised.of(name))

    return joint_term


def weighted(process, **weights: float) -> dict[str, tuple[float, Term]]:
    """The process's own losses as `terms`, one per modality, with these weights, else 1.

    >>> from mmdiff.processes import Gaussian, Joint, absorbing
    >>> terms = weighted(Joint(image=Gaussian(schedules.flow()), label=absorbing(10)), label=0.1)
    >>> {name: weight for name, (weight, term) in terms.items()}
    {'image': 1.0, 'label': 0.1}

    Raises UserError for a modality that the process does not have.
    """
    unknown = [name for name in weights if name not in process.parts]
    if unknown:
        raise UserError(f"weighted: no modality {', '.join(unknown)}; there are {', '.join(process.parts)}.")

    def of(name):
        return lambda out, noised: process.loss(out, noised)[name]

    return {name: (weights.get(name, 1.0), of(name)) for name, part in process.parts.items() if part.learnt}


def of_parts(process, **weights: float) -> dict[str, tuple[float, Term]]:
    """The modalities' own losses with these weights, in this order, each by itself: `of_parts(process, image=1.0, label=0.1)`.

    Of an `Aggregate`, other than by `weighted`, a modality also counts where it is absent: its head learns to predict it from the target.
    """
    return {name: (weight, on(name, process.parts[name].loss)) for name, weight in weights.items()}


def adaptive(term: Term, p: float = 1.0, c: float = 0.01) -> Term:
    """`value / sg(value + c)^p`: hard examples count less, as if under the power 1 - p of the value (Geng et al. 2025, section 4.3).

    Published: p = 1 and c = 0.01 on the sum over an example's D dimensions, i.e. c = 0.01 / D on their mean. What it returns is about 1
    everywhere: report the term itself, with weight 0, and sample times by that.
    """
    if not (0 <= p < math.inf and 0 < c < math.inf):
        raise UserError(f"adaptive needs a finite p of 0 or more and a c above 0, got {p} and {c}.")

    def weigh(values):
        return jax.tree.map(lambda value: value / jax.lax.stop_gradient(value + c) ** p, values)

    if isinstance(term, InBatchTerm):
        return dataclasses.replace(term, contrast=lambda embedded: weigh(term.contrast(embedded)))
    return lambda out, noised: weigh(term(out, noised))


# Weights of the squared error in eps, functions of (schedule, t). Constant 1 is DDPM's simple loss.


def snr() -> Callable:
    """The error in x_0 weighted by SNR, i.e. the plain error in eps."""
    return lambda schedule, t: jnp.ones_like(t)


def min_snr(gamma: float = 5.0) -> Callable:
    """`min(SNR, gamma)` on x_0, i.e. `min(1, gamma / SNR)` on eps (Hang et al. 2023)."""
    if not 0 < gamma < math.inf:
        raise UserError(f"min_snr needs a finite gamma above 0, got {gamma}.")

    def weight(schedule, t):
        return jnp.minimum(1.0, gamma * jnp.exp(-schedules.log_snr(schedule, t)))

    return weight


def sigmoid(bias: float = 0.0) -> Callable:
    """`-dlogSNR/dt sigmoid(bias - logSNR)` on eps (Kingma & Gao 2023; Hoogeboom et al. 2024)."""
    if not math.isfinite(bias):
        raise UserError(f"sigmoid needs a finite bias, got {bias}.")

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


def error_in(process, row: Callable, floor: float = 0.0) -> Term:
    """The squared error of a `Gaussian` in another parameterisation (p, q) than the one that is predicted,

        ((p sigma - q alpha) / (p' sigma - q' alpha))^2 process.loss,        (p', q') of process.predict,

    zero at t = 0. The factor is that of the time max(t, floor). A network that predicts x_0 and is trained by its error in `velocity`
    (floor 0.05; with `schedules.flow` the factor is 1 / max(t, floor)^2) can work on large patches of pixels, whose noise has more
    dimensions than a token (Li & He 2025, JiT). Other than by `mse`, examples at t = 1 count.

    >>> from mmdiff.processes import Gaussian, velocity, x0
    >>> term = error_in(Gaussian(schedules.flow(), x0), velocity, floor=0.05)
    """
    if not 0 <= floor < 1:
        raise UserError(f"error_in needs a floor of 0 or more and below 1, a time, got {floor}.")

    def term(out, noised):
        t = jnp.maximum(jnp.where(noised.t > 0, noised.t, 0.5), floor)
        alpha, sigma = process.schedule(t)
        wanted, own = (p * sigma - q * alpha for p, q in (each(process.schedule, t) for each in (row, process.predict)))
        return (wanted / jnp.maximum(jnp.abs(own), jnp.finfo(jnp.float32).eps)) ** 2 * process.loss(out, noised)

    return term


def vlb(process, steps: int | None = None) -> Term:
    """One Monte-Carlo term of the variational bound, in nats per dimension of the data; of a `Joint` a dict of them by modality.

    With `steps` = T it is `T KL(q(x_{t-1/T} | x_t, x_0) || p)` at t on the grid i/T (use `times.on_grid(T)`); without, the
    continuous-time integrand. The constant prior term is left out, and so is a Gaussian's step to t = 0, which a decoder without
    parameters takes.
    """
    if steps is not None:
        _check_steps("vlb", steps)

    @tokenwise
    def term(out, noised):
        x0_hat = process.clean(out, noised.xt, noised.t)
        if steps is None:
            nats = process.elbo_rate(noised, x0_hat)
        else:
            # i/T - 1/T in float32 may miss (i-1)/T by an ulp: snap to the grid.
            s = jax.tree.map(lambda t: jnp.maximum(jnp.round(t * steps) - 1.0, 0.0) / steps, noised.t)
            nats = jax.tree.map(lambda n: jnp.where(jnp.isinf(n), 0.0, steps * n), process.kl(noised, x0_hat, s))
        return jax.tree.map(lambda n, x0: n / max(1, x0.size // x0.shape[0]), nats, noised.x0)

    return term


def x0_ce(process) -> Term:
    """Cross-entropy of the softmax of `process.logits`, -log p(x_0 | x_t), at all positions, masked or not; in nats per dimension.

    Unlike `process.loss` it does not condition on x_t, so it has a value for any x_0 (a negative). No position costs more than 70
    nats, and beyond them it has no gradient.
    """

    @tokenwise
    def term(out, noised):
        if out.shape[-1] != process.classes:
            raise ValueError(f"x0_ce needs logits of {process.classes} classes, got an output of shape {out.shape}.")
        log_p = jax.nn.log_softmax(process.logits(out, noised.xt, noised.t))
        nll = -jnp.take_along_axis(log_p, noised.x0[..., None], axis=-1)[..., 0]
        return jnp.where(noised.t > 0, per_example_mean(jnp.minimum(nll, -LOG_FLOOR)), 0.0)

    return term


def masked_ce(process, weight: Callable | None = None, classes: Mapping[int, float] | None = None, by: str = "token") -> Term:
    """Cross-entropy of the belief about x_0 at masked tokens, `weight(keep, t) sum_i c_i -log p(x_0i | x_t) / n`, in nats.

    Args:
      process: a `Categorical`, such as `absorbing`.
      weight: of the time, see `masked_elbo`; 1 by default.
      classes: the weights c of tokens by their class, else 1: `{tokenizer.padding: 0.1}` still learns where a text ends.
      by: "token": n is the length, so that all masked tokens of a batch weigh the same. "example": n is the sum of c over the example's
        masked tokens, so that all examples do, and a token of one that has few of them weighs more. The metric says which,
        "loss/text/by_token".

    >>> from mmdiff.processes import absorbing
    >>> process, t = absorbing(4), jnp.array([0.5])
    >>> noised = Noised(x0=jnp.array([[1, 2, 0, 0]]), xt=jnp.array([[4, 2, 4, 4]]), t=t)  # three of four are masked, two of them padding
    >>> flat = jnp.zeros((1, 4, 4))                                                       # each token costs log 4
    >>> [round(float(value[0] / math.log(4)), 6) for by in ("token", "example")
    ...  for value in masked_ce(process, masked_elbo(cap=5.0), {0: 0.1}, by)(flat, noised).values()]
    [0.6, 2.0]
    """
    if by not in ("token", "example"):
        raise UserError(f"masked_ce weighs by='token' or by='example', not {by!r}.")
    for name, factor in (classes or {}).items():
        if not (is_whole(name, 0) and name < process.classes and 0 <= factor < math.inf):
            raise UserError(f"masked_ce: weights are of classes 0..{process.classes - 1}, finite and at least 0, not {factor} of {name}.")
    if weight and not hasattr(process, "keep"):
        raise UserError(f"masked_ce weighs times of a Categorical, by its schedule `keep`; {type(process).__name__} has none.")

    def factors(x0):
        found = jnp.ones(x0.shape, jnp.float32)
        for name, factor in (classes or {}).items():
            found = jnp.where(x0 == name, factor, found)
        return found

    @tokenwise
    def per_position(out, noised):
        return jnp.where(noised.t > 0, per_example_mean(factors(noised.x0) * process.token_nll(out, noised)), 0.0)

    def term(out, noised):
        value = per_position(out, noised)
        if by == "example":
            share = per_example_mean(jnp.where(noised.xt == process.mask, factors(noised.x0), 0.0))
            value = value / jnp.where(share > 0, share, 1.0)
        scale = weight(process.keep, jnp.where(noised.t > 0, noised.t, 0.5)) if weight else 1.0
        return {f"by_{by}": scale * value}

    return term


def masked_elbo(cap: float = math.inf) -> Callable:
    """The weight of the bound on the likelihood, `min(cap, -a'(t) / (1 - a(t)))` of the share a(t) of tokens that are kept: 1/t for `flow`.

    With an infinite cap `masked_ce` by token is `vlb` (MD4, Shi et al. 2024). A cap, as `min_snr` has, bounds the gradient near t = 0,
    where few tokens are masked and weigh much (UniDisc: 5).
    """
    if not cap > 0:
        raise UserError(f"masked_elbo needs a cap above 0, got {cap}.")

    def weight(keep, t):
        return jnp.minimum(cap, -schedules.derivative(keep, t)[0] / keep(t)[1])

    return weight


def aligned(features: str, of: str, center: float | None = None) -> Term:
    """REPA: `mean_n 1 - cos(out_n, y_n)` of a network's tap (`nets.Tap`) and frozen features y of the clean data, from 0 to 2.

    Zero for examples in which what is tapped is absent. The features are in the batch, from a cache: no encoder runs in the step.

    Args:
      features: the name of both, the output [B, N, D] and the entry of the batch, [B, N, D] or [B, rows, columns, D].
      of: the modality that is tapped.
      center: iREPA's g, `y <- (y - g mean_n y) / (std_n y + 1e-6)`, in training 0.6 (Singh et al. 2025); y as it is by default.

    Source: Yu et al. 2025, with 1 - cos for -cos.
    """
    if center is not None and not (isinstance(center, int | float) and 0 <= center <= 1):
        raise UserError(f"aligned: center is the share of the mean that is taken away, from 0 to 1, or None, not {center!r}.")

    def term(out, noised):
        if features not in (noised.batch or {}):
            raise UserError(f"aligned: the batch has no {features!r}: the data need the features of {of!r}, from a cache for instance.")
        predicted, y = (x.astype(jnp.float32) for x in (out[features], noised.batch[features]))
        y = y.reshape(len(y), -1, y.shape[-1])
        if y.shape != predicted.shape:
            here, tap = ("{1} tokens of {2} numbers".format(*x.shape) for x in (y, predicted))
            raise UserError(f"aligned: {features!r} has {here} in the batch, and {tap} in the network's tap.")
        if center is not None:
            if y.shape[1] < 2:
                raise UserError(f"aligned: center takes the mean and deviation over tokens, and {features!r} has one: leave it out.")
            y = (y - center * y.mean(1, keepdims=True)) / (y.std(1, keepdims=True, ddof=1) + 1e-6)
        unit = (x / jnp.sqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24)) for x in (predicted, y))  # a gradient also at 0
        cosine = math.prod(unit).sum(-1)
        return jnp.where(noised.t[of] < 1, per_example_mean(1.0 - cosine), 0.0)

    return term


def auxiliary(process, steps: int, falling: bool = True) -> Term:
    """VQ-Diffusion's auxiliary loss, `a(t) x0_ce` with a = 2 - i / T, or a = 1 + i / T if not `falling`, at t = (i + 1) / T.

    `vlb(process, T)` counts all T steps and this one does not: a weight lambda of theirs, on one step's sum, is T lambda here.
    """
    _check_steps("auxiliary", steps)
    plain = x0_ce(process)

    def term(out, noised):
        share = (jnp.round(noised.t * steps) - 1.0) / steps
        return (2.0 - share if falling else 1.0 + share) * plain(out, noised)

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


def _check_steps(where: str, steps: int) -> None:
    """Raises UserError unless T is a whole number of 1 or more."""
    if not is_whole(steps, 1):
        raise UserError(f"{where} needs at least one step, got {steps}.")
