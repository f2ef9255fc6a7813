r"""Transforms: functions `SamplerState -> SamplerState` that improve a step of a sampler before `process.step` takes it.

Clipping, truncation, multistep solvers and confidence unmasking change the belief x0_hat, or the times of the step. All of them are
names of `sampling`, too: `sampling.sample(..., transforms=[sampling.only("image", sampling.clip(-1, 1))])`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import schedules
from mmdiff.errors import UserError
from mmdiff.processes.aggregate import Aggregate
from mmdiff.processes.base import Process, bcast, fold
from mmdiff.processes.class_sampling import sample_classes
from mmdiff.processes.gaussian import Gaussian


@flax.struct.dataclass
class SamplerState:
    """One step about to be taken: from (xt, t) to time s with the belief x0. Transforms may change xt and x0, and t and s of its posterior.

    `last_xt`, `last_x0` and `last_t` are of the step before (of this one at first), `earlier_x0` and `earlier_t` of the one before that (of
    the last one in the second step). What the next step will see as `last_x0` is `x0_for_history`: transforms that correct the belief
    (clipping, truncation) change both, by `corrected`; those that extrapolate it change x0 alone.
    """

    xt: Any
    t: Any
    s: Any
    x0: Any
    last_x0: Any
    last_t: Any
    x0_for_history: Any
    keys: Any
    last_xt: Any = None
    earlier_x0: Any = None
    earlier_t: Any = None

    def corrected(self, x0: Any) -> SamplerState:
        """With another belief, for this step and for the history of the next."""
        return self.replace(x0=x0, x0_for_history=x0)


Transform = Callable[[SamplerState], SamplerState]
"""Changes the step about to be taken, as `clip` and `dpmpp_2m` do; `sample` applies them in order."""


def only(name: str, transform: Transform) -> Transform:
    """Applies a transform to one modality of a joint state: `only("image", clip(-1, 1))`."""

    def apply(state: SamplerState) -> SamplerState:
        own = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "keys"}
        part = transform(SamplerState(keys=fold(state.keys, name), **{field: tree and tree[name] for field, tree in own.items()}))
        changed = ("xt", "x0", "t", "s", "x0_for_history")
        return state.replace(**{field: {**getattr(state, field), name: getattr(part, field)} for field in changed})

    return apply


def following(process: Aggregate, name: str, transform: Transform) -> Transform:
    """Applies a transform to the belief about a modality that an `Aggregate` (bound) adds, and to the target's, for the same eps_hat.

    By default the belief as it stands, e.g. the mean of E under the probabilities, stands in for a hidden modality. `sampled()` puts a
    sample in its place, which is right as well, and `top_p(0)` the best class, which is biased.
    """

    def apply(state: SamplerState) -> SamplerState:
        part = only(name, transform)(state)
        x0 = process.with_belief(state.x0, state.t, **{name: part.x0[name]})
        return part.replace(x0=x0, x0_for_history={**part.x0_for_history, process.target: x0[process.target]})

    return apply


def sampled() -> Transform:
    """Replaces probabilities by a class sampled from them."""

    def apply(state):
        classes = jax.vmap(sample_classes)(state.keys, state.x0)
        return state.corrected(jax.nn.one_hot(classes, state.x0.shape[-1]))

    return apply


def _on_data(state: SamplerState, change: Callable) -> SamplerState:
    """The belief changed in the data's channels alone: that of a `LearnedSigma` has the variance's share behind them."""
    size = state.xt.shape[-1] if state.x0.ndim > 1 and state.x0.ndim == state.xt.ndim else None
    changed = change(state.x0[..., :size])
    return state.corrected(changed if changed.shape == state.x0.shape else jnp.concatenate([changed, state.x0[..., size:]], -1))


def clip(low: float, high: float) -> Transform:
    """Keeps the belief within the data's range: x0 <- min(max(x0, low), high)."""
    if not low < high:
        raise UserError(f"clip needs low < high, got ({low}, {high}).")
    return lambda state: _on_data(state, lambda x0: jnp.clip(x0, low, high))


def threshold(quantile: float = 0.995, limit: float = 1.0) -> Transform:
    """Dynamic thresholding: rescale an example whose `quantile` of |x0| exceeds `limit` (Saharia et al. 2022)."""

    if not (0 <= quantile <= 1 and 0 < limit < np.inf):
        raise UserError(f"threshold needs a quantile in [0, 1] and a limit > 0, got {quantile} and {limit}.")

    def rescale(x0):
        flat = jnp.abs(x0).reshape(x0.shape[0], -1)
        bound = bcast(jnp.maximum(jnp.quantile(flat, quantile, axis=-1), limit), x0)
        return jnp.clip(x0, -bound, bound) * (limit / bound)

    return lambda state: _on_data(state, rescale)


def dpmpp_2m(schedule: schedules.Schedule) -> Transform:
    """DPM-Solver++(2M): extrapolates the belief to the middle of the step, linearly in log-SNR (Lu et al. 2022).

    The first step and the step to t = 0 are first order: there log-SNR is infinite. For `Gaussian(eta=0)`.
    """

    def apply(state):
        now, end, last = (0.5 * schedules.log_snr(schedule, u) for u in (state.t, state.s, state.last_t))
        ahead, behind = end - now, now - last
        usable = jnp.isfinite(ahead) & jnp.isfinite(behind) & (behind > 0)
        weight = jnp.where(usable, 0.5 * ahead / jnp.where(usable, behind, 1.0), 0.0)
        return state.replace(x0=state.x0 + bcast(weight, state.x0) * (state.x0 - state.last_x0))

    return apply


def unipc(process: Gaussian) -> Transform:
    r"""UniPC with B_2(h) (Zhao et al. 2023): of third order at one network call a step, for the image of a deterministic `Gaussian`.

    Once the belief m at (x_t, t) is known, the step that led there is taken again with a better one (the corrector, UniC-2), and then
    `dpmpp_2m` goes on (the predictor, UniP-2). With lambda = log(alpha / sigma), h = lambda_t - lambda_last, r = (lambda_earlier -
    lambda_last) / h and f = expm1(-h) the better belief is

        m_last + rho_1 (m_earlier - m_last) / r + rho_2 (m - m_last),
        rho_1 + rho_2 = phi_2 / f,  r rho_1 + rho_2 = 2 phi_3 / f,  phi_2 = -f / h - 1,  phi_3 = -phi_2 / h - 1/2.

    In the first step of finite h rho = (0, 1/2). Steps whose ends have infinite log-SNR are first order and stay as they are.
    """
    if not isinstance(process, Gaussian) or process.eta:
        raise UserError("unipc solves the ODE of a deterministic sampler: it is for a Gaussian with eta=0.")
    predict = dpmpp_2m(process.schedule)

    def apply(state):
        now, last, earlier = (0.5 * schedules.log_snr(process.schedule, u) for u in (state.t, state.last_t, state.earlier_t))
        moved = jnp.isfinite(now - last) & (now > last)
        h = jnp.where(moved, now - last, 1.0)
        second = moved & jnp.isfinite(earlier) & (earlier < last)
        r = jnp.where(second, (earlier - last) / h, -1.0)
        f = jnp.expm1(-h)
        phi_2 = -f / h - 1.0
        phi_3 = -phi_2 / h - 0.5
        rho_1 = jnp.where(second, (phi_2 - 2.0 * phi_3) / f / (1.0 - r), 0.0)
        rho_2 = jnp.where(second, phi_2 / f - rho_1, 0.5)
        weights = (bcast(w, state.x0) for w in (rho_1 / r, rho_2))
        better = state.last_x0 + sum(w * (x0 - state.last_x0) for w, x0 in zip(weights, (state.earlier_x0, state.x0)))
        again = process.step(state.keys, state.last_xt, better, state.last_t, state.t)
        return predict(state.replace(xt=jnp.where(bcast(moved, again), again, state.xt)))

    return apply


def top_p(p: float) -> Transform:
    """Keeps the smallest set of classes whose probability reaches p (the best one always), renormalised."""
    if not 0 <= p <= 1:
        raise UserError(f"top_p is a probability in [0, 1] (1 keeps every class), got {p}.")

    def apply(state):
        if p == 1:
            return state
        # A class is kept if the mass of strictly better ones is below p. What divides the classes is found by bisection over the bits of
        # the probabilities, which are ordered as these are: exact, and several times faster than sorting.
        bits = jax.lax.bitcast_convert_type(state.x0.astype(jnp.float32), jnp.int32)

        def halve(_, bounds):
            low, high = bounds
            middle = low + (high - low) // 2
            enough = jnp.where(bits > middle, state.x0, 0.0).sum(-1, keepdims=True, dtype=jnp.float32) >= max(p, 1e-9)
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        best = bits.max(-1, keepdims=True)
        low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(best, -1), best))
        probs = jnp.where(bits > low, state.x0, 0.0)
        return state.corrected(probs / probs.sum(-1, keepdims=True))

    return apply


def temperature(value: float) -> Transform:
    """Sharpens (value < 1) or flattens a belief: probabilities to the power 1 / value, renormalised. 0 leaves the best class alone."""
    if not 0 <= value < np.inf:
        raise UserError(f"temperature must be a finite number >= 0 (0 takes the best class, 1 changes nothing), got {value}.")
    if value == 0:
        return lambda state: state.corrected(jax.nn.one_hot(state.x0.argmax(-1), state.x0.shape[-1]))

    def apply(state):
        relative = state.x0 / jnp.maximum(state.x0.max(-1, keepdims=True), 1e-30)  # the best class is 1: no underflow to 0 / 0
        powered = jnp.where(relative > 0, relative ** (1.0 / value), 0.0)
        return state.corrected(powered / powered.sum(-1, keepdims=True))

    return apply


def confidence(process: Process, noise: float = 0.0) -> Transform:
    """Unmasks the most certain tokens first instead of random ones, as many per step as the schedule asks for.

    A chosen token moves to time 0, every other masked one stays at t: time may differ per token, so this too is a transform of the state.
    Certainty is log max_k x0[k], plus `noise` times Gumbel noise (MaskGIT's temperature; VQ-Diffusion's purity). For `absorbing` and
    `MaskReplace`, whose unmasked tokens take their ordinary step.
    """

    if not 0 <= noise < np.inf:
        raise UserError(f"confidence: the noise must be a finite number >= 0, got {noise}.")

    def order(state, size):
        sure = jnp.log(jnp.maximum(state.x0.max(-1), 1e-30)).reshape(-1, size)
        return sure + noise * jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(state.keys) if noise else sure

    # At s = 0 no share is masked: everything is revealed.
    return _revealing(process, order, lambda state, size, hidden: size - jnp.floor(process.masked(state.s) * size + 1e-4))


def first_hitting(process: Process) -> Transform:
    """Reveals one masked token a step, any of them as likely: the step of `hitting_grid`."""

    def order(state, size):
        return jax.vmap(lambda key: jax.random.uniform(key, (size,)))(state.keys)

    return _revealing(process, order, lambda state, size, hidden: size - hidden.sum(-1) + 1)


def _revealing(process: Process, order: Callable, revealed: Callable) -> Transform:
    """Masked tokens move to time 0, the highest of `order(state, size)` first, until `revealed(state, size, hidden)` [B] are known."""
    mask = process.mask  # refused by a chain that has none

    def apply(state):
        count, size = state.xt.shape[0], max(1, state.xt.size // state.xt.shape[0])
        hidden = state.xt.reshape(count, size) == mask
        first = jnp.where(hidden, order(state, size), jnp.inf)
        rank = jnp.argsort(jnp.argsort(-first, axis=-1), axis=-1)
        reveal = rank < revealed(state, size, hidden)[:, None]
        s = jnp.where(hidden, jnp.where(reveal, 0.0, state.t[:, None]), state.s[:, None])
        return state.replace(s=s.reshape(state.xt.shape))

    return apply


def released_stride(steps: int, skip: int) -> tuple[jax.Array, Transform]:
    """The strided trajectory of the released VQ-Diffusion and CDCD code, for comparison: `sample(..., grid, transforms=[stride])`.

    The network is called at every (skip + 1)-th of T = `steps` times and at 1 / T, but a step takes the posterior of one step of the
    chain, from s + 1/T to s (before the last call from t to t - 1/T). So masks stay longer than they should: with T = 100 and skip 9
    the last call finds 66 % of them. The exact trajectory is a coarser grid.
    """
    if not 0 <= skip < steps:
        raise UserError(f"released_stride needs 0 <= skip < steps, got skip {skip} of {steps} steps.")
    calls = sorted({*range(steps, 0, -skip - 1), 1}, reverse=True)  # t T

    def stride(state):
        place = jnp.round(state.t * steps)
        near = place <= skip + 1
        t, s = jnp.where(near, state.t, state.s + 1.0 / steps), jnp.where(near, (place - 1.0) / steps, state.s)
        moves = state.s < state.t
        return state.replace(t=jnp.where(moves, t, state.t), s=jnp.where(moves, s, state.s))

    return jnp.asarray([*calls, 0], jnp.float32) / steps, stride
