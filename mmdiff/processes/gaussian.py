r"""Gaussian diffusion, every parameterisation one row of a 2x2 system.

    x_t = alpha x_0 + sigma eps         the corruption
    out =     p x_0 +     q eps         what the network predicts

Both hold at once, so the belief about x_0 is the solution of the system,

    x0_hat = (q x_t - sigma out) / (q alpha - sigma p),

and a parameterisation is the pair (p, q), a function of (schedule, t). A new one is one line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import schedules
from mmdiff.errors import UserError
from mmdiff.processes.base import Noised, Process, bcast, check_time, concrete, per_example, per_example_mean, per_example_sum

Predict = Callable[[schedules.Schedule, jax.Array], tuple[jax.Array, jax.Array]]


def x0(schedule, t):
    """out = x_0."""
    return jnp.ones_like(t), jnp.zeros_like(t)


def eps(schedule, t):
    """out = eps. Says nothing about x_0 where alpha = 0: use it with schedules that keep some signal at t = 1."""
    return jnp.zeros_like(t), jnp.ones_like(t)


def v(schedule, t):
    """out = alpha eps - sigma x_0 (Salimans & Ho 2022)."""
    alpha, sigma = schedule(t)
    return -sigma, alpha


def velocity(schedule, t):
    """out = dx_t/dt = alpha' x_0 + sigma' eps (flow matching; with `flow()` it is eps - x_0)."""
    return schedules.derivative(schedule, t)


def edm(data_std: float = 0.5) -> Predict:
    """Karras' F: the network's output after `x0_hat = c_skip x + c_out F` (EDM, equation 7), for data of that deviation."""

    def predict(schedule, t):
        alpha, sigma = schedule(t)
        norm = jnp.sqrt(sigma**2 + (alpha * data_std) ** 2)
        return sigma / (data_std * norm), -alpha * data_std / norm

    return predict


@dataclasses.dataclass(frozen=True)
class Gaussian(Process):
    """`x_t = alpha(t) x_0 + sigma(t) eps` on arrays [B, ...] of float32.

    Attributes:
      schedule: `t -> (alpha, sigma)`.
      predict: what the network's output means: `x0`, `eps`, `v`, `velocity`, `edm(data_std)`, or any `(schedule, t) -> (p, q)`.
      eta: randomness of `step`: 0 is DDIM (deterministic), 1 the exact posterior (DDPM).
      data_std: if given, the network is fed `x_t` scaled to unit variance for data of this standard deviation (EDM's c_in).
      norm: if given, clean data are vectors of this length (along the last dimension), and `check` refuses others.
      prior_std: the standard deviation of the prior, sigma(1) by default. Papers with tables of betas have N(0, 1), whose sigma(1) is
        a little less.

    An output with twice the channels of x (a learned-sigma head) is read by its first half. A parameterisation that says nothing about
    x_0 at some time, such as `eps` where alpha(1) = 0, is refused.

    >>> process = Gaussian(schedules.flow(), velocity)
    >>> keys, x0_ = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8, 8, 1))
    >>> noised = process.corrupt(keys, x0_, jnp.array([0.0, 0.5]))
    >>> bool((noised.xt[0] == 1).all())  # at t = 0 nothing is noised
    True
    >>> process.loss(noised.noise - x0_, noised).shape  # one number per example; this output is the true velocity
    (2,)
    """

    schedule: schedules.Schedule
    predict: Predict = velocity
    eta: float = 0.0
    data_std: float | None = None
    norm: float | None = None
    prior_std: float | None = None

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"Gaussian: eta is at least 0 (DDIM) and at most 1 (the exact posterior), not {self.eta}.")
        t = np.linspace(0.0, 1.0, 65, dtype=np.float32)[1:]
        with jax.ensure_compile_time_eval():
            rows = jax.jit(lambda t: (*self.schedule(t), *self.predict(self.schedule, t)))(t)
        alpha, sigma, p, q = (np.asarray(row) for row in rows)
        det = q * alpha - sigma * p
        # The output itself is x_0, times p, where q = 0.
        silent = (np.abs(det) < 1e-6) & ((q != 0) | (p == 0)) | (np.sign(det) * np.sign(det[-1]) < 0)
        if silent.any():
            place, name = silent.argmax(), getattr(self.predict, "__name__", "this parameterisation")
            raise UserError(
                f"Gaussian: {name} says nothing about x_0 at t = {t[place]:g}, where alpha = {alpha[place]:.3g}: predict v, velocity or x0 "
                "or take a schedule that keeps some signal (linear_beta, cosine_beta).")

    def check(self, x0):
        if self.norm is None or not concrete(x0):
            return
        found = np.linalg.norm(np.asarray(x0, np.float32), axis=-1)
        wrong = ~(np.abs(found - self.norm) <= 0.01 * self.norm)  # float16 keeps three digits; NaN is wrong, too
        if wrong.any():
            raise ValueError(
                f"a vector of length {found[wrong][0]:.4g} among {found.size}, but this process is for vectors of length {self.norm:g} "
                "(a longer one gives itself away in x_t): divide each vector by its length.")

    def prior(self, keys, shape):
        noise = per_example(lambda key: jax.random.normal(key, shape), keys)
        return noise * (self.schedule(jnp.ones(()))[1] if self.prior_std is None else self.prior_std)

    def corrupt(self, keys, x0, t):
        check_time(t)
        noise = per_example(lambda key: jax.random.normal(key, x0.shape[1:]), keys)
        alpha, sigma = self._at(t, x0)
        xt = jnp.where(bcast(t, x0) > 0, alpha * x0 + sigma * noise, x0)
        return Noised(x0=x0, xt=xt, t=t, noise=noise)

    def with_x0(self, noised, x0):
        alpha, sigma = self._at(noised.t, x0)
        noise = jnp.where(sigma > 0, (noised.xt - alpha * x0) / jnp.where(sigma > 0, sigma, 1.0), noised.noise)
        return noised.replace(x0=x0, noise=noise)

    def inputs(self, xt, t):
        if self.data_std is None:
            return xt, t
        alpha, sigma = self._at(t, xt)
        return xt / jnp.sqrt((alpha * self.data_std) ** 2 + sigma**2), t

    def clean(self, out, xt, t):
        alpha, sigma, p, q = (bcast(c, xt) for c in self._rows(t))
        det = q * alpha - sigma * p
        tiny = jnp.finfo(jnp.float32).eps
        det = jnp.where(jnp.abs(det) < tiny, jnp.where(det < 0, -tiny, tiny), det)
        solved = (q * xt - sigma * self._mean(out, xt)) / det
        return jnp.where(bcast(t, xt) > 0, solved, xt)

    def output(self, x0_hat, xt, t):
        """The network's output of which `clean` makes the belief x0_hat, `(q x_t - (q alpha - sigma p) x0_hat) / sigma`; linear in both."""
        alpha, sigma, p, q = (bcast(c, xt) for c in self._rows(t))
        return (q * xt - (q * alpha - sigma * p) * x0_hat) / sigma

    def loss(self, out, noised):
        """Mean squared error of the network's output against `p x_0 + q eps`, averaged over one example's dimensions."""
        return jnp.where(noised.t > 0, per_example_mean(self.residual(out, noised) ** 2), 0.0)

    def residual(self, out, noised):
        """`out - (p x_0 + q eps)`: zero for a perfect network."""
        _, _, p, q = (bcast(c, noised.x0) for c in self._rows(noised.t))
        return self._mean(out, noised.x0) - (p * noised.x0 + q * noised.noise)

    def eps_scale(self, t):
        """The factor that turns `residual` into the error in eps, `alpha / |q alpha - sigma p|` [B]."""
        alpha, sigma, p, q = self._rows(t)
        return alpha / jnp.maximum(jnp.abs(q * alpha - sigma * p), jnp.finfo(jnp.float32).eps)

    def step(self, keys, xt, x0_hat, t, s):
        alpha, sigma = self._at(t, xt)
        alpha_s, sigma_s = self._at(s, xt)
        eps_hat = (xt - alpha * x0_hat) / jnp.where(sigma > 0, sigma, 1.0)
        if self.eta == 0:
            xs = alpha_s * x0_hat + sigma_s * eps_hat
        else:
            # Var q(x_s | x_t, x_0) = sigma_s^2 (1 - SNR_t / SNR_s).
            ratio = (alpha * sigma_s / (jnp.where(sigma > 0, sigma, 1.0) * jnp.where(alpha_s > 0, alpha_s, 1.0))) ** 2
            variance = self.eta**2 * sigma_s**2 * jnp.clip(1.0 - ratio, 0.0, 1.0)
            noise = per_example(lambda key: jax.random.normal(key, xt.shape[1:]), keys)
            direction = jnp.sqrt(jnp.maximum(sigma_s**2 - variance, 0.0))
            xs = alpha_s * x0_hat + direction * eps_hat + jnp.sqrt(variance) * noise
        return jnp.where(bcast(s < t, xt), xs, xt)

    def heun(self, x0_hat, x0_end, t, s):
        r"""Heun's method in the variable in which the schedule is a straight line, the chord from (alpha, sigma) at t = 0 to that at t = 1.

        x_t / c with c = alpha - k sigma, k = (alpha(1) - 1) / sigma(1), is (1 + k u) x_0 + u eps, u = sigma / c: a DDIM step is Euler's
        in u, and the mean of the slopes k x_0 + eps at both ends is that of the belief

            x0_hat + 1/2 (c_s sigma_t) / (c_t sigma_s) (x0_end - x0_hat).

        For `flow` u is t and the slope the velocity; for `edm` u is sigma and the slope (x - x0_hat) / sigma (Karras et al. 2022,
        algorithm 1). There and for all schedules the step to s = 0, where eps has no value, is Euler's.
        """
        if self.eta:
            raise UserError(f"Heun's method solves the ODE of a deterministic sampler: use eta=0 (here {self.eta:g}), or leave heun out.")
        moves = (s > 0) & (s < t)
        (alpha, sigma), (alpha_s, sigma_s) = (self.schedule(jnp.where(moves, u, other)) for u, other in ((t, 0.75), (s, 0.5)))
        alpha_1, sigma_1 = self.schedule(jnp.ones_like(t))
        slope = (alpha_1 - 1.0) / sigma_1
        weight = (alpha_s - slope * sigma_s) * sigma / ((alpha - slope * sigma) * sigma_s)
        return x0_hat + bcast(jnp.where(moves, 0.5 * weight, 0.0), x0_hat) * (x0_end - x0_hat)

    def kl(self, noised, x0_hat, s):
        """`(SNR(s) - SNR(t)) / 2 |x_0 - x0_hat|^2` (VDM, equation 15); infinite at s = 0, where a decoder takes over."""
        # Where the answer is 0 or infinite, any other times keep NaN out of the gradients.
        apart = (s < noised.t) & (s > 0)
        nats = self._nats(noised.x0, x0_hat, jnp.where(apart, noised.t, 0.75), jnp.where(apart, s, 0.5))
        return jnp.where(s < noised.t, jnp.where(apart, per_example_sum(nats), jnp.inf), 0.0)

    def elbo_rate(self, noised, x0_hat):
        """`-SNR'(t) / 2 |x_0 - x0_hat|^2` (VDM, equation 17)."""
        t = self._inside(noised.t)
        alpha, sigma = self.schedule(t)
        d_alpha, d_sigma = schedules.derivative(self.schedule, t)
        d_snr = 2.0 * alpha / sigma**2 * (d_alpha - alpha / sigma * d_sigma)
        return jnp.where(noised.t > 0, -0.5 * d_snr * per_example_sum((noised.x0 - x0_hat) ** 2), 0.0)

    def prior_kl(self, x0):
        """KL(N(alpha x_0, sigma^2) | N(0, prior_std^2)) at t = 1."""
        alpha, sigma = self.schedule(jnp.ones(()))
        std = sigma if self.prior_std is None else self.prior_std
        log_ratio = 2.0 * jnp.log(sigma / std)
        return per_example_sum(0.5 * (alpha * x0 / std) ** 2 + 0.5 * (jnp.expm1(log_ratio) - log_ratio))

    def decoder(self, noised, x0_hat, values=None, later=None):
        r"""-log p(x_0 | x_t) with p = N(x0_hat, Sigma), of continuous data a density, of quantised data the probability of a bin.

        Sigma cannot be the posterior's variance, which is 0 in this step. As published it is that of the step before in the chain,
        beta~ from `later` to t. Without `later` it is (sigma / alpha)^2, that of x_0 given x_t where the data's density is flat.

        Args:
          values: increasing levels, [L], of which every x_0 is one (else it counts as the nearest): bins end half way between two, the
            outer ones are open. 8-bit data in [-1, 1] are `jnp.linspace(-1, 1, 256)`.
          later: the node of the chain after t, [B]: t + 1/T for T equal steps.

        Infinite at t = 0. Source: Ho et al. 2020, section 3.3; Nichol & Dhariwal 2021, whose cdf is an approximation to 1e-3.
        """
        t = self._inside(noised.t)
        mean, log_variance = self._last(x0_hat, noised.x0, t, None if later is None else jnp.where(noised.t > 0, later, 0.75))
        if values is None:
            z = (noised.x0 - mean) * jnp.exp(-0.5 * log_variance)
            nats = 0.5 * (z**2 + log_variance + math.log(2 * math.pi))
        else:
            values = jnp.asarray(values, jnp.float32)
            far = jnp.asarray([1e6], jnp.float32)  # for infinite, without its NaN in gradients
            edges = jnp.concatenate([-far, 0.5 * (values[1:] + values[:-1]), far])
            bin_ = jnp.searchsorted(edges[1:-1], noised.x0)
            low, high = ((jnp.take(edges, bin_ + i) - mean) * jnp.exp(-0.5 * log_variance) for i in (0, 1))
            flip = low + high > 0  # to the side where small differences of Phi keep their digits
            low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
            below, above = jax.scipy.stats.norm.logcdf(low), jax.scipy.stats.norm.logcdf(high)
            nats = -above - jnp.log(-jnp.expm1(below - above))
        return jnp.where(noised.t > 0, per_example_sum(nats), jnp.inf)

    def _last(self, x0_hat, x0, t, later):
        """Mean and log variance of `decoder`."""
        alpha, sigma = self._at(t, x0)
        if later is None:
            return x0_hat, 2.0 * jnp.log(sigma / alpha)
        log_later, log_t = (schedules.log_snr(self.schedule, u) for u in (later, t))
        return x0_hat, 2.0 * jnp.log(sigma) + bcast(jnp.log(-jnp.expm1(log_later - log_t)), x0)

    def _nats(self, x0, x0_hat, t, s):
        """`kl` of every dimension, for 0 < s < t."""
        log_t, log_s = (schedules.log_snr(self.schedule, u) for u in (t, s))
        return bcast(-0.5 * jnp.exp(log_s) * jnp.expm1(log_t - log_s), x0) * (x0 - x0_hat) ** 2

    def _rows(self, t):
        t = self._inside(t)
        return *self.schedule(t), *self.predict(self.schedule, t)

    @staticmethod
    def _inside(t):
        # At t = 0 the answer is known and the coefficients may be infinite; any other time keeps NaN out of the gradients.
        return jnp.where(t > 0, t, 0.5)

    def _at(self, t, x):
        return tuple(bcast(c, x) for c in self.schedule(t))

    @staticmethod
    def _mean(out, x):
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return out[..., : x.shape[-1]] if x.ndim > 1 else out


@dataclasses.dataclass(frozen=True)
class LearnedSigma(Gaussian):
    r"""A `Gaussian` that samples its steps with a variance that the network predicts (Nichol & Dhariwal 2021, section 3.1).

    The output has twice the channels of x: what `predict` says, and v. With w = (v + 1) / 2, a step from t to s has the mean of the
    posterior and the variance between beta~ (the posterior's, w = 0) and beta (w = 1) of the chain on the sampler's own grid,

        Sigma = (1 - SNR_t / SNR_s) sigma_s^(2 (1 - w)) sigma_t^(2 w).

    The belief about x_0 has twice the channels, too: x0_hat and w, which a step clips to [0, 1], since guidance may overshoot.
    `loss` trains the first half of the output, `losses.sigma_vlb` the second. With `eta` 0 the process is DDIM and w is not used.
    """

    eta: float = 1.0

    def clean(self, out, xt, t):
        mean = super().clean(out, xt, t)
        return jnp.concatenate([mean, (out[..., xt.shape[-1] :].astype(mean.dtype) + 1) / 2], -1)

    def step(self, keys, xt, x0_hat, t, s):
        x0_hat, share = self._halves(x0_hat, xt)
        xs = super().step(keys, xt, x0_hat, t, s)  # the mean, and noise of the variance beta~
        moves = (s > 0) & (s < t)  # the step to s = 0 is deterministic
        t, s = jnp.where(moves, t, 0.75), jnp.where(moves, s, 0.5)
        sigma_s = self.schedule(s)[1]
        log_t, log_s = (schedules.log_snr(self.schedule, u) for u in (t, s))
        narrow = jnp.where(moves, self.eta * sigma_s * jnp.sqrt(-jnp.expm1(log_t - log_s)), 0.0)
        noise = per_example(lambda key: jax.random.normal(key, xt.shape[1:]), keys)  # the same as in xs
        return xs + bcast(narrow, xt) * jnp.expm1(0.5 * jnp.clip(share, 0.0, 1.0) * self._log_ratio(t, s, xt)) * noise

    def elbo_rate(self, noised, x0_hat):
        return super().elbo_rate(noised, self._halves(x0_hat, noised.x0)[0])

    def _last(self, x0_hat, x0, t, later):
        # Between that and beta, sigma_t^2 in the step to the data.
        x0_hat, share = self._halves(x0_hat, x0)
        mean, log_variance = super()._last(x0_hat, x0, t, later)
        if later is None:
            return mean, log_variance
        return mean, log_variance + share * (2.0 * jnp.log(self._at(t, x0)[1]) - log_variance)

    def _nats(self, x0, x0_hat, t, s):
        x0_hat, share = self._halves(x0_hat, x0)
        wider = share * self._log_ratio(t, s, x0)  # log (Sigma / beta~)
        return 0.5 * (wider + jnp.expm1(-wider)) + jnp.exp(-wider) * super()._nats(x0, x0_hat, t, s)

    def _log_ratio(self, t, s, x):
        """log (beta / beta~)."""
        return 2.0 * bcast(jnp.log(self.schedule(t)[1]) - jnp.log(self.schedule(s)[1]), x)

    @staticmethod
    def _halves(x0_hat, x):
        return x0_hat[..., : x.shape[-1]], x0_hat[..., x.shape[-1] :]
