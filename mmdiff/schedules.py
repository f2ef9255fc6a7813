r"""Noise schedules: functions `t -> (alpha, sigma)`.

A schedule says how much signal and how much noise is left at time t in [0, 1]:

    x_t = alpha(t) x_0 + sigma(t) eps,        alpha(0) = 1, sigma(0) = 0.

Continuous processes use the pair as it stands. Discrete ones read it as (probability to be kept, probability to be
replaced), for which `alpha + sigma = 1` must hold: `flow` and `masked_cosine` do. Mask-and-replace chains read three shares, from
a `ReplaceTable`.

Schedules work on arrays of any shape, are differentiable in t (`derivative`) and return float32, the analytic ones float64 for float64 t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.checks import is_whole

Schedule = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _floating(t) -> jax.Array:
    t = jnp.asarray(t)
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def flow() -> Schedule:
    """Straight lines, `(1 - t, t)`: rectified flow, flow matching; for discrete data the linear schedule of MD4.

    >>> alpha, sigma = flow()(0.25)
    >>> float(alpha), float(sigma)
    (0.75, 0.25)
    """

    def schedule(t):
        t = _floating(t)
        return 1.0 - t, t

    return schedule


def cosine() -> Schedule:
    r"""Variance preserving, `(cos(pi t / 2), sin(pi t / 2))` (Nichol & Dhariwal 2021 without the offset).

    alpha(1) is exactly 0, so the end of the chain is exactly the prior.

    >>> [float(c) for c in cosine()(jnp.float32(1.0))]
    [0.0, 1.0]
    """

    def schedule(t):
        t = _floating(t)
        angle = t * (math.pi / 2)
        # sin of the complement is exact at t = 1, where cos would leave -4e-8.
        return jnp.sin((1.0 - t) * (math.pi / 2)), jnp.sin(angle)

    return schedule


def masked_cosine() -> Schedule:
    """The mask schedule of MaskGIT for discrete data: `(1 - sin(pi t / 2), sin(pi t / 2))`; sums to one."""

    def schedule(t):
        t = _floating(t)
        sigma = jnp.sin(t * (math.pi / 2))
        # 1 - sin(a) = 2 sin^2((pi/2 - a) / 2) keeps its digits near t = 1; the plain form is exact at 0.
        return jnp.where(t < 0.5, 1.0 - sigma, 2.0 * jnp.sin((1.0 - t) * (math.pi / 4)) ** 2), sigma

    return schedule


def at_once() -> Schedule:
    """`(1, 0)` at t = 0 and `(0, 1)` at any later time: a chain that hides everything as soon as time starts, for discrete data."""

    def schedule(t):
        kept = (jnp.asarray(t, jnp.float32) == 0).astype(jnp.float32)
        return kept, 1.0 - kept

    return schedule


def linear_beta(steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> Schedule:
    r"""The DDPM table: `alpha_bar_i = prod_{j<=i} (1 - beta_j)`, beta linear from `beta_min` to `beta_max`.

    Exact at t = i / steps (i = 0 .. steps, alpha_bar_0 = 1); between the nodes log alpha_bar is interpolated linearly.
    The table is computed in float64. Source: Ho et al. 2020, section 4.

    >>> alpha, sigma = linear_beta(1000)(jnp.float32(0.001))               # after one step, beta = 1e-4
    >>> round(float(sigma) ** 2, 7)
    0.0001
    """
    if not is_whole(steps, 1) or not 0 < beta_min <= beta_max < 1:
        raise ValueError(f"linear_beta needs steps >= 1 and 0 < beta_min <= beta_max < 1, got {steps}, {beta_min}, {beta_max}.")
    return table(np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(beta_min, beta_max, steps)))]))


def scaled_linear_beta(steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> Schedule:
    """Stable Diffusion's table: as `linear_beta`, with sqrt(beta) linear instead. alpha_bar(1) is 0.00466: some signal is left."""
    if not is_whole(steps, 1) or not 0 < beta_min <= beta_max < 1:
        raise ValueError(f"scaled_linear_beta needs steps >= 1 and 0 < beta_min <= beta_max < 1, got {steps}, {beta_min}, {beta_max}.")
    betas = np.linspace(beta_min**0.5, beta_max**0.5, steps) ** 2
    return table(np.concatenate([[0.0], np.cumsum(np.log1p(-betas))]))


def cosine_beta(steps: int = 1000, largest: float = 0.999) -> Schedule:
    r"""The table of Nichol & Dhariwal 2021, as `linear_beta`: alpha_bar from `cos^2((t + 0.008) / 1.008 pi / 2)`, no beta above `largest`.

    Unlike `cosine` it keeps a little signal, alpha(1) = 4.9e-5: `eps` is of use with it.
    """
    if not is_whole(steps, 1) or not 0 < largest < 1:
        raise ValueError(f"cosine_beta needs steps >= 1 and 0 < largest < 1, got {steps}, {largest}.")
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return table(np.concatenate([[0.0], np.cumsum(np.log(np.maximum(alpha_bar[1:] / alpha_bar[:-1], 1 - largest)))]))


def table(log_alpha_bar: np.ndarray) -> Schedule:
    """A variance-preserving schedule from `log alpha_bar` at t = i / T, i = 0 .. T (decreasing from 0)."""
    log_alpha_bar = np.asarray(log_alpha_bar, np.float64)
    if log_alpha_bar.ndim != 1 or log_alpha_bar.size < 2 or log_alpha_bar[0] != 0 or np.any(np.diff(log_alpha_bar) >= 0):
        raise ValueError("a schedule table is 1-d, starts at log alpha_bar = 0 and decreases strictly.")
    steps = log_alpha_bar.size - 1
    nodes = log_alpha_bar.astype(np.float32)
    slopes = np.append(np.diff(log_alpha_bar), 0.0).astype(np.float32)

    def schedule(t):
        low, rest = _place(t, steps)
        log_ab = jnp.take(nodes, low) + jnp.take(slopes, low) * rest
        return jnp.exp(0.5 * log_ab), jnp.sqrt(-jnp.expm1(log_ab))

    return schedule


def _place(t, steps):
    """(i, r): t lies between the nodes i / steps and (i + 1) / steps, the share r of the way (1 at the last node)."""
    place = jnp.asarray(t, jnp.float32) * steps
    # i / steps * steps may miss i by one ulp: snap, so that the nodes are exact.
    nearest = jnp.round(place)
    # Not to 0, which is hit exactly: just above it sigma must stay positive and its derivative finite.
    close = (jnp.abs(place - nearest) < 1e-6 * steps + 1e-5) & (nearest > 0)
    snapped = jax.lax.stop_gradient(jnp.where(close, nearest - place, 0.0)) + place
    low = jax.lax.stop_gradient(jnp.clip(jnp.floor(snapped), 0, steps - 1)).astype(jnp.int32)
    return low, snapped - low


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceTable:
    """`t -> (kept, replaced, masked)`: the shares of a mask-and-replace chain, which sum to one; linear between the nodes t = i / T.

    A token is kept, or redrawn uniformly from the classes (perhaps as itself), or masked for good. All three are given, for each of
    them may be too small to be the float32 complement of the others.

    Attributes:
      rows: float64 [T + 1, 3], the shares at t = i / T, (1, 0, 0) at first.
    """

    rows: np.ndarray

    def __post_init__(self):
        rows = np.asarray(self.rows, np.float64)
        object.__setattr__(self, "rows", rows)
        if rows.ndim != 2 or rows.shape[1] != 3 or len(rows) < 2 or not np.array_equal(rows[0], (1, 0, 0)):
            raise ValueError(f"a table of (kept, replaced, masked) is [T + 1, 3] and starts with (1, 0, 0), not {rows.shape}.")
        kept, replaced, masked = rows.T
        if rows.min() < 0 or np.abs(rows.sum(1) - 1).max() > 1e-12:
            raise ValueError("a table of (kept, replaced, masked): every row must be a probability distribution.")
        back = np.diff(masked).min() < 0 or np.diff(kept).max() > 0
        if back or (replaced[1:] * kept[:-1] - replaced[:-1] * kept[1:]).min() < -1e-12:
            raise ValueError("a table of (kept, replaced, masked) is no chain: in some step a token would be unmasked or restored.")

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rows) - 1

    def __call__(self, t):
        low, rest = _place(t, self.steps)
        # Between neighbours as a mean of both: at the last node nothing is left of a difference's rounding.
        low_rows, high_rows = (jnp.take(jnp.asarray(self.rows, jnp.float32), low + i, axis=0) for i in (0, 1))
        shares = low_rows * (1.0 - rest)[..., None] + high_rows * rest[..., None]
        return shares[..., 0], shares[..., 1], shares[..., 2]


def mask_replace(steps: int, kept: tuple[float, float], masked: tuple[float, float]) -> ReplaceTable:
    """A table with T = `steps` whose kept and masked shares run linearly from their first value, at t = 1 / T, to their last, at t = 1.

    What is left, `1 - kept - masked`, is replaced. At t = 0 everything is kept.
    """
    if not is_whole(steps, 2):
        raise ValueError(f"mask_replace needs at least two steps, got {steps}.")
    kept, masked = (np.linspace(*ends, steps) for ends in (kept, masked))
    rest = 1.0 - kept - masked
    rest[np.abs(rest) < 1e-15] = 0.0
    return ReplaceTable(np.concatenate([[[1.0, 0.0, 0.0]], np.stack([kept, rest, masked], 1)]))


def vqd_released(steps: int) -> ReplaceTable:
    """The schedule of the released VQ-Diffusion and CDCD code: kept 0.99999 to 9e-6, masked the reverse, replaced 1e-6 throughout."""
    return mask_replace(steps, kept=(0.99999, 0.000009), masked=(0.000009, 0.99999))


def vqd_paper(steps: int) -> ReplaceTable:
    """The schedule of the VQ-Diffusion paper (Gu et al. 2022, section 4.1): masked 0 to 0.9 and replaced 0 to 0.1, linearly in t."""
    return mask_replace(steps, kept=(1.0 - 1.0 / max(steps, 1), 0.0), masked=(0.9 / max(steps, 1), 0.9))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    r"""Variance exploding with the grid of EDM: `alpha = 1`, `sigma(t) = (m + t (M - m))^rho`, `m, M = sigma_{min,max}^{1/rho}`.

    sigma(0) is 0, not `sigma_min`: time 0 means clean. Karras' grid of N calls, whose last is at sigma_min, is uniform in t but for
    its step to 0: `sampling.karras_grid`; with `uniform_grid(N)` the last call is at sigma(1 / N). Source: Karras et al. 2022, equation 5.
    """
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise ValueError(f"edm needs 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}.")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def schedule(t):
        t = _floating(t)
        sigma = (low + t * (high - low)) ** rho
        return jnp.ones_like(t), jnp.where(t > 0, sigma, 0.0)

    return schedule


def shift(schedule: Schedule, factor: float) -> Schedule:
    r"""Moves a schedule towards noise: `schedule(factor t / (1 + (factor - 1) t))`.

    For `flow` this multiplies sigma / alpha by `factor` exactly, i.e. log-SNR is lowered by `2 log factor`
    (Esser et al. 2024, section 5.3.2: more tokens need more noise).

    >>> alpha, sigma = shift(flow(), 3.0)(0.5)  # sigma / alpha was 1
    >>> float(sigma / alpha)
    3.0
    """
    if not 0 < factor < np.inf:
        raise ValueError(f"shift needs factor > 0, got {factor}.")

    def shifted(t):
        t = _floating(t)
        return schedule(factor * t / (1.0 + (factor - 1.0) * t))

    return shifted


def scaled(schedule: Schedule, factor: float) -> Schedule:
    r"""That of data scaled by `factor`, made variance preserving: `(factor alpha, sigma) / sqrt(factor^2 alpha^2 + sigma^2)`.

    Log-SNR rises by `2 log factor` at every t, whatever the schedule; for `flow`, `shift(flow(), 1 / factor)` has the same log-SNR.
    """
    if not 0 < factor < np.inf:
        raise ValueError(f"scaled needs factor > 0, got {factor}.")

    def rescaled(t):
        alpha, sigma = schedule(t)
        norm = jnp.sqrt((factor * alpha) ** 2 + sigma**2)
        return factor * alpha / norm, sigma / norm

    return rescaled


def log_snr(schedule: Schedule, t: jax.Array) -> jax.Array:
    """`2 log(alpha / sigma)`: +inf at t = 0, -inf where alpha is 0.

    >>> float(log_snr(flow(), 0.5))
    0.0
    """
    alpha, sigma = schedule(t)
    return 2.0 * (jnp.log(alpha) - jnp.log(sigma))


def derivative(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(alpha', sigma')` at t, by forward differentiation.

    >>> alpha, sigma = derivative(flow(), 0.5)
    >>> float(alpha), float(sigma)
    (-1.0, 1.0)
    """
    t = _floating(t)
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))[1]
