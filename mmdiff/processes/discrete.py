r"""Discrete diffusion: a chain is a linear map and its transpose.

    push(p, s, t)[y] = sum_x p[x] q(x_t = y | x_s = x)        moves a distribution forward
    pull(f, s, t)[x] = sum_y q(x_t = y | x_s = x) f[y]        moves a likelihood back

Everything else follows. Corruption samples push. The reverse step, Bayes-exact for a belief p0 over x_0 (D3PM's mixture
sum_k p0[k] q(x_s | x_t, x_0 = k)), is

    q(x_s | x_t, p0) = pull(1[x_t], s, t) * push(p0 / pull(1[x_t], 0, t), 0, s).

A belief gives no weight to what x_t has ruled out: that alone makes unmasked tokens of an absorbing chain stay as they are,
their cross-entropy zero, and a token pinned at t = 0 known.

Data are integers [B, ...] in 0 .. classes - 1; noisy data live in 0 .. states - 1, where states beyond the classes (a mask) are
never data. Beliefs are float32 [B, ..., classes]. All mathematics is float32, at O(states) a token for `Categorical` and `MaskReplace`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import schedules
from mmdiff.checks import is_whole
from mmdiff.errors import UserError
from mmdiff.lazy_logits import as_arrays, by_chunks, tokenwise
from mmdiff.processes.base import Noised, Process, bcast, check_time, concrete, per_example, per_example_mean, per_example_sum
from mmdiff.processes.class_sampling import descend, follow, random_words, sample_classes, tree_of_sums

TINY = 1e-30
WIDE, ENTRIES = 8192, 2**18  # more states than WIDE are sampled in chunks of tokens, tables of so many entries for each example
LOG_FLOOR = -70.0  # log-probabilities that are compared with data end here, and so do their gradients


class Discrete(Process):
    """What follows from `push` and `pull`. A subclass gives `classes`, `states`, `stationary` [states], `push` and `pull`.

    `s` and `t` have shape [B] or any prefix of the data's shape (a time per token); `s = None` stands for time 0.
    """

    classes: int
    states: int
    stationary: np.ndarray
    eta = 0.0

    def push(self, p, s, t):
        """The distribution at t of what has the distribution p [..., states] at s; at s = None p is over the clean classes."""
        raise NotImplementedError

    def pull(self, f, s, t):
        """The transpose of `push`: the likelihood, by the state at s, of what has the likelihood f [..., states] by the state at t."""
        raise NotImplementedError

    @property
    def mask(self) -> int:
        """The id of the mask state."""
        if self.states != self.classes + 1:
            raise UserError(f"a chain with {self.states} states over {self.classes} classes has no mask state.")
        return self.classes

    @property
    def null(self):
        """The state in which the prior always is, such as a mask."""
        best = int(np.argmax(self.stationary))
        return best if self.stationary[best] >= 1.0 - 1e-6 else super().null

    def masked(self, t):
        """The share of tokens that are masked at t, on average over the classes."""
        return self._likelihood(jnp.full(t.shape, self.mask), None, t)[..., : self.classes].mean(-1)

    def check(self, x0):
        if not concrete(x0):
            return
        values = np.asarray(x0)
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"discrete data are integers in 0..{self.classes - 1}, got {values.dtype}.")
        if values.size and (values.min() < 0 or values.max() >= self.classes):
            wrong = values.max() if values.max() >= self.classes else values.min()
            raise ValueError(f"class id {wrong} is out of range: this process has the classes 0..{self.classes - 1}.")

    def prior(self, keys, shape):
        levels = tree_of_sums(jnp.asarray(self.stationary, jnp.float32))
        return per_example(lambda key: descend(key, levels, shape), keys)

    def corrupt(self, keys, x0, t):
        self.check(x0)
        check_time(t)
        if self.states > WIDE and x0.ndim > 1 and t.ndim == 1:
            xt = self._corrupt_by_chunks(keys, x0, t)
        else:
            xt = per_example(sample_classes, keys, self.push(jax.nn.one_hot(x0, self.states), None, t))
        return Noised(x0=x0, xt=jnp.where(bcast(t, x0) > 0, xt, x0), t=t)

    def _corrupt_by_chunks(self, keys, x0, t):
        """The same samples of q(x_t | x_0), without its table [B, ..., states]."""
        words = per_example(lambda key: random_words(key, self.states, x0.shape[1:]), keys)
        flat, words = x0.reshape(len(x0), -1), jnp.moveaxis(words.reshape(*words.shape[:3], -1), 3, 1)

        def of_chunk(x0, words):
            return follow(jnp.moveaxis(words, (2, 3), (0, 1)), tree_of_sums(self.push(jax.nn.one_hot(x0, self.states), None, t)))

        size = min(flat.shape[1], max(1, ENTRIES // self.states))
        most, rest = by_chunks(of_chunk, size, flat, words)
        most = jnp.moveaxis(most, 0, 1).reshape(len(x0), -1)
        return (most if rest is None else jnp.concatenate([most, rest], 1)).reshape(x0.shape)

    def clean(self, out, xt, t):
        return jnp.exp(self.log_belief(out, xt, t))

    def logits(self, out, xt, t):
        """The network's output as logits of x_0 given x_t, float32."""
        return as_arrays(out).astype(jnp.float32)

    def log_belief(self, out, xt, t):
        """log softmax of the logits [B, ..., classes] over the classes that x_t leaves possible; -inf for the others."""
        possible = self._likelihood(xt, None, t)[..., : self.classes] > 0
        # A finite stand-in for -inf inside the softmax keeps its gradient free of NaN.
        logits = jnp.where(possible, self.logits(out, xt, t), jnp.finfo(jnp.float32).min)
        return jnp.where(possible, jax.nn.log_softmax(logits), -jnp.inf)

    def loss(self, out, noised):
        """Cross-entropy of the belief about x_0, averaged over one example's tokens."""
        return tokenwise(self._cross_entropy)(out, noised)

    def token_nll(self, out, noised):
        """-log p(x_0 | x_t) of every token by the belief, [B, ...]: 0 for one that is not masked or replaced."""
        log_belief = self.log_belief(out, noised.xt, noised.t)
        return -jnp.take_along_axis(log_belief, noised.x0[..., None], axis=-1)[..., 0]

    def _cross_entropy(self, out, noised):
        return jnp.where(noised.t > 0, per_example_mean(self.token_nll(out, noised)), 0.0)

    def posterior(self, xt, x0_hat, t, s):
        """q(x_s | x_t, x_0 ~ x0_hat), probabilities [B, ..., states]."""
        weights = self._likelihood(xt, s, t) * self._scaled(xt, x0_hat, t, s)
        return weights / jnp.maximum(weights.sum(-1, keepdims=True), TINY)

    def step(self, keys, xt, x0_hat, t, s):
        """With `eta` the step goes down to (1 - eta) s, and from there back up to s by the chain."""
        below = (1.0 - self.eta) * s
        chances = self.posterior(xt, x0_hat, t, below)
        xs = per_example(sample_classes, keys, self.push(chances, below, s) if self.eta else chances)
        return jnp.where(bcast(s, xt) < bcast(t, xt), xs, xt)

    def kl(self, noised, x0_hat, s):
        """The log-probabilities of both laws end at -70: no token costs more. An x_0 that x_t has ruled out costs nothing."""
        truth, x0_hat = jax.nn.one_hot(noised.x0, self.classes), self._conditioned(noised.xt, x0_hat, noised.t)
        pulled = self._likelihood(noised.xt, s, noised.t)
        # Normalised by construction.
        q, p = (pulled * self._scaled(noised.xt, belief, noised.t, s) for belief in (truth, x0_hat))
        each = jnp.where(q > 0, q * (floored_log(q) - floored_log(p)), 0.0).sum(-1)
        return jnp.where(s < noised.t, per_example_sum(each), 0.0)

    def prior_kl(self, x0):
        p = self.push(jax.nn.one_hot(x0, self.states), None, jnp.ones(x0.shape[0]))
        ratio = jnp.log(jnp.maximum(p, TINY)) - jnp.log(jnp.maximum(jnp.asarray(self.stationary, jnp.float32), TINY))
        return per_example_sum(jnp.where(p > 0, p * ratio, 0.0).sum(-1))

    def _last_step(self, steps, noised, x0_hat):
        """The `elbo_rate` of a chain with T steps, which has no continuous time: T times the KL of its own last step."""
        return steps * self.kl(noised, x0_hat, jnp.maximum(noised.t - 1.0 / steps, 0.0))

    def _likelihood(self, xt, s, t):
        """q(x_t | x_s = .) at the observed x_t, [B, ..., states]."""
        return self.pull(jax.nn.one_hot(xt, self.states), s, t)

    def _conditioned(self, xt, x0_hat, t):
        """A belief restricted to what x_t leaves possible, normalised; one from `clean` already is."""
        x0_hat = jnp.where(self._likelihood(xt, None, t)[..., : self.classes] > 0, x0_hat, 0.0)
        return x0_hat / jnp.maximum(x0_hat.sum(-1, keepdims=True), TINY)

    def _scaled(self, xt, x0_hat, t, s):
        """push(p0 / pull(1[x_t], 0, t), 0, s)."""
        likelihood = self._likelihood(xt, None, t)[..., : self.classes]
        possible = likelihood > 0
        ratio = jnp.where(possible, x0_hat / jnp.where(possible, likelihood, 1.0), 0.0)
        extra = [(0, 0)] * (ratio.ndim - 1) + [(0, self.states - self.classes)]
        return self.push(jnp.pad(ratio, extra), None, s)


@dataclasses.dataclass(frozen=True)
class Categorical(Discrete):
    r"""A rank-one chain: with probability `a` a token keeps its state, otherwise it is redrawn from a fixed distribution,

        q(x_t | x_s) = a_{t|s} 1[x_t = x_s] + (1 - a_{t|s}) pi[x_t],     a_{t|s} = a_t / a_s.

    Absorbing (pi on a mask), uniform, and any mixture of both are choices of `pi`; see `absorbing`, `uniform`, `mixed`.

    Attributes:
      redraw: pi, one probability per state, as a tuple.
      keep: a schedule with alpha + sigma = 1, read as (a, 1 - a).
      classes: how many of the states are data; all of them by default.
      eta: of sampling alone, from 0, the ancestral step, to 1, a sample of x_0 that is noised to s again. For a mask it is remasking
        (ReMDM, Wang et al. 2025) with the probability r = 1 - a_s / a_{(1 - eta) s}. Every eta keeps the law of a single token. Of
        several, each step draws more at once, as if they were independent: it helps imperfect networks in many steps, and harms exact ones.
    """

    redraw: tuple[float, ...]
    keep: schedules.Schedule = dataclasses.field(default_factory=schedules.flow)
    classes: int = 0
    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"Categorical: eta is at least 0 (ancestral) and at most 1 (noised again), not {self.eta}.")
        object.__setattr__(self, "redraw", tuple(float(p) for p in self.redraw))
        object.__setattr__(self, "classes", self.classes or len(self.redraw))
        if not (min(self.redraw, default=-1) >= 0 and abs(sum(self.redraw) - 1) <= 1e-6):  # so that NaN is none
            raise ValueError(f"Categorical: the redraw probabilities must be >= 0 and sum to 1, they sum to {sum(self.redraw):.6g}.")
        if not is_whole(self.classes, 1) or self.classes > len(self.redraw):
            raise ValueError(f"Categorical: {self.classes} classes do not fit {len(self.redraw)} states.")
        with jax.ensure_compile_time_eval():
            alpha, sigma = self.keep(jnp.linspace(0.0, 1.0, 5))
            if jnp.abs(alpha + sigma - 1).max() > 1e-5:
                raise ValueError("Categorical needs a schedule with alpha + sigma = 1, such as flow() or masked_cosine().")

    @property
    def states(self):
        return len(self.redraw)

    @property
    def stationary(self):
        return np.asarray(self.redraw)

    def push(self, p, s, t):
        kept, redrawn = self._weights(s, t, p)
        return kept * p + redrawn * p.sum(-1, keepdims=True) * jnp.asarray(self.redraw, jnp.float32)

    def pull(self, f, s, t):
        kept, redrawn = self._weights(s, t, f)
        return kept * f + redrawn * (f * jnp.asarray(self.redraw, jnp.float32)).sum(-1, keepdims=True)

    def _weights(self, s, t, like):
        """`(a_{t|s}, 1 - a_{t|s})`; the second from the schedule's own complement, which keeps its digits at small t."""
        a, b = (bcast(c, like) for c in self.keep(t))
        if s is not None:
            a_s, b_s = (bcast(c, like) for c in self.keep(s))
            alive = a_s > 0
            a = jnp.where(alive, a / jnp.where(alive, a_s, 1.0), 0.0)
            # Of two equal expressions the one that subtracts the smaller numbers.
            b = jnp.where(alive, jnp.where(b < a_s, (b - b_s) / jnp.where(alive, a_s, 1.0), 1.0 - a), 1.0)
        return a, b

    def elbo_rate(self, noised, x0_hat):
        r"""Continuous-time VLB integrand of the reverse jumps y != x_t (Campbell et al. 2022; for a mask it is MD4's weight times CE):

            sum_y  r_hat(y) - r(y) + r(y) log(r(y) / r_hat(y)),      r(y) = -a'/a pi[x_t] q_t(y | x_0) / q_t(x_t | x_0).
        """
        # At t = 1 the two factors are infinity and zero; a hair before it they are their limit.
        t = jnp.minimum(noised.t, 1.0 - 1e-6)
        a, _ = self.keep(t)
        da, _ = schedules.derivative(self.keep, t)
        hazard = jnp.where(a > 0, -da / jnp.where(a > 0, a, 1.0), 0.0)
        beta = bcast(hazard, noised.xt) * jnp.take(jnp.asarray(self.redraw, jnp.float32), noised.xt)
        truth = jax.nn.one_hot(noised.x0, self.classes)
        other = 1.0 - jax.nn.one_hot(noised.xt, self.states)
        x0_hat = self._conditioned(noised.xt, x0_hat, t)
        u, u_hat, change = (other * self._scaled(noised.xt, p, t, t) for p in (truth, x0_hat, x0_hat - truth))
        # Near t = 1 the rates of a uniform chain are large and nearly equal: d - log(1 + d) then keeps its digits.
        d = jnp.where(u > 0, change / jnp.maximum(u, TINY), 0.0)
        near = jnp.abs(d) < 0.5
        ratio = jnp.log(jnp.maximum(u, TINY)) - jnp.log(jnp.maximum(u_hat, TINY))
        excess = d + jnp.where(near, -jnp.log1p(jnp.where(near, d, 0.0)), ratio)
        each = jnp.where(u > 0, u * excess, u_hat).sum(-1)
        return jnp.where(noised.t > 0, per_example_sum(beta * each), 0.0)


def absorbing(classes: int, keep: schedules.Schedule | None = None, eta: float = 0.0) -> Categorical:
    """Masked diffusion: tokens turn into a mask, state `classes` (D3PM absorbing, MD4, MDLM); with `eta` samples are masked again.

    >>> process = absorbing(10)
    >>> process.states, process.mask
    (11, 10)
    >>> [int(x) for x in process.corrupt(jax.random.split(jax.random.key(0), 2), jnp.array([3, 3]), jnp.array([0.0, 1.0])).xt]
    [3, 10]
    """
    check_classes("absorbing", classes)
    return Categorical((0.0,) * classes + (1.0,), keep or schedules.flow(), classes, eta)


def uniform(classes: int, keep: schedules.Schedule | None = None) -> Categorical:
    """Tokens are redrawn uniformly from the classes (multinomial diffusion).

    >>> uniform(4).push(jax.nn.one_hot(jnp.array([1]), 4), None, jnp.array([1.0])).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    check_classes("uniform", classes)
    return Categorical((1.0 / classes,) * classes, keep or schedules.flow(), classes)


def mixed(classes: int, mask: float, keep: schedules.Schedule | None = None) -> Categorical:
    """A redraw hits the mask with probability `mask`, else a uniform class. Masks can be redrawn too: rank one, unlike VQ-Diffusion."""
    check_classes("mixed", classes)
    if not 0 <= mask <= 1:
        raise ValueError(f"mixed needs a mask probability in [0, 1], got {mask}.")
    return Categorical(((1.0 - mask) / classes,) * classes + (mask,), keep or schedules.flow(), classes)


@dataclasses.dataclass(frozen=True, eq=False)
class Markov(Discrete):
    """Any D3PM chain: row-stochastic matrices `steps` [T, S, S], the i-th taking time (i-1)/T to i/T. Times round to the nearest i/T.

    A constant chain of T steps is `np.broadcast_to(Q, (T, S, S))`. Memory is O(T S^2), once, on the host and in the program: for
    rank-one chains use `Categorical`, which needs none of it. `classes` counts the states that are data (default: all).
    """

    steps: np.ndarray
    classes: int = 0

    def __post_init__(self):
        steps = np.asarray(self.steps, np.float64)
        if steps.ndim != 3 or steps.shape[1] != steps.shape[2] or not steps.size:
            raise ValueError(f"Markov needs matrices of shape [T, S, S], got {steps.shape}.")
        if not is_whole(self.classes, 0) or self.classes > steps.shape[1]:
            raise ValueError(f"Markov: {self.classes} classes do not fit {steps.shape[1]} states.")
        if not (steps.min() >= 0 and np.abs(steps.sum(-1) - 1).max() <= 1e-6):
            raise ValueError("Markov: every row of every matrix must be a probability distribution.")
        total, products = np.eye(steps.shape[1]), [np.eye(steps.shape[1])]
        for matrix in steps:
            total = total @ matrix
            products.append(total)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "classes", self.classes or steps.shape[1])
        object.__setattr__(self, "_products", np.stack(products))

    @property
    def states(self):
        return self.steps.shape[1]

    @property
    def stationary(self):
        return self._products[-1][: self.classes].mean(0)

    def push(self, p, s, t):
        if s is None:
            return self._times(p, jnp.take(jnp.asarray(self._products, jnp.float32), self._index(t), axis=0))
        low, high = self._index(s), self._index(t)

        def body(i, p):
            moved = p @ jnp.asarray(self.steps, jnp.float32)[i]
            return jnp.where(bcast((low <= i) & (i < high), p), moved, p)

        return jax.lax.fori_loop(low.min(), high.max(), body, p)

    def pull(self, f, s, t):
        if s is None:
            return self._times(f, jnp.take(jnp.asarray(self._products, jnp.float32), self._index(t), axis=0).swapaxes(-1, -2))
        low, high = self._index(s), self._index(t)

        def body(n, f):
            i = high.max() - 1 - n
            moved = f @ jnp.asarray(self.steps, jnp.float32)[i].T
            return jnp.where(bcast((low <= i) & (i < high), f), moved, f)

        return jax.lax.fori_loop(0, high.max() - low.min(), body, f)

    def elbo_rate(self, noised, x0_hat):
        return self._last_step(self.steps.shape[0], noised, x0_hat)

    def _index(self, t):
        return jnp.clip(jnp.round(t * self.steps.shape[0]), 0, self.steps.shape[0]).astype(jnp.int32)

    @staticmethod
    def _times(p, matrix):
        """p [B, ..., S] times one matrix per leading index of `matrix` [..., S, S]."""
        matrix = matrix.reshape(matrix.shape[:-2] + (1,) * (p.ndim - matrix.ndim + 1) + matrix.shape[-2:])
        return (p[..., None, :] @ matrix)[..., 0, :]


def check_classes(what, classes):
    if not is_whole(classes, 1):
        raise UserError(f"{what} needs at least one class, and a whole number of them, got {classes}.")


def floored_log(p):
    return jnp.log(jnp.maximum(p, math.exp(LOG_FLOOR)))
