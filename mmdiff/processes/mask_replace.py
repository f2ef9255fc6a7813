"""VQ-Diffusion's chain of kept, replaced and masked tokens."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from mmdiff import schedules
from mmdiff.processes.base import bcast, per_example_sum
from mmdiff.processes.discrete import TINY, Discrete, check_classes, floored_log


@dataclasses.dataclass(frozen=True)
class MaskReplace(Discrete):
    r"""VQ-Diffusion's chain: a token is kept, replaced by a uniform class (perhaps its own) or masked; a mask stays for ever,

        q(x_t | x_s) = A 1[x_t = x_s] + U / K   (x_t < K),    q(mask | x_s) = C,    q(mask | mask) = 1,
        A = A_t / A_s,    1 - C = (1 - C_t) / (1 - C_s),    U = 1 - A - C.

    Not of rank one, but its push and pull cost O(K) a token all the same. Source: Gu et al. 2022, equations 7 and 8.

    Attributes:
      classes: K; the mask is state K.
      schedule: (A_t, U_t, C_t), such as `schedules.vqd_released(100)` or `schedules.vqd_paper(100)`.
      evidence: whether to add what a token says of its own clean value, log q(x_t | x_0), to the network's logits, which are then of
        x_0 given the *other* tokens: the network need not learn to copy what it sees. False is as published.

    >>> process = MaskReplace(16, schedules.vqd_released(100))
    >>> process.states, process.mask, process.null
    (17, 16, 16)
    """

    classes: int
    schedule: schedules.ReplaceTable
    evidence: bool = False

    def __post_init__(self):
        check_classes("MaskReplace", self.classes)
        if not isinstance(self.schedule, schedules.ReplaceTable):
            raise ValueError("MaskReplace needs a table of (kept, replaced, masked), such as schedules.vqd_released(steps).")

    @property
    def states(self):
        return self.classes + 1

    @property
    def stationary(self):
        """The law at t = 1 of what is not kept."""
        _, replaced, masked = self.schedule.rows[-1]
        return np.append(np.full(self.classes, replaced / self.classes), masked) / (replaced + masked)

    @property
    def null(self):
        """The mask, though the prior may hold a few tokens that were replaced."""
        return self.mask

    def push(self, p, s, t):
        kept, replaced, masked = self._weights(s, t, p)
        tokens, mask = p[..., :-1], p[..., -1:]
        total = tokens.sum(-1, keepdims=True)
        return jnp.concatenate([kept * tokens + replaced / self.classes * total, mask + masked * total], -1)

    def pull(self, f, s, t):
        kept, replaced, masked = self._weights(s, t, f)
        tokens, mask = f[..., :-1], f[..., -1:]
        return jnp.concatenate([kept * tokens + replaced * tokens.mean(-1, keepdims=True) + masked * mask, mask], -1)

    def logits(self, out, xt, t):
        out = super().logits(out, xt, t)
        if not self.evidence:
            return out
        return out + jnp.log(jnp.maximum(self._likelihood(xt, None, t)[..., : self.classes], TINY))

    def kl(self, noised, x0_hat, s):
        """As for any `Discrete`, but what x_0 says is counted at O(1) a token: an x_0 more, a negative, costs no sum over the classes."""
        xt, z, t = noised.xt, noised.x0, noised.t
        # The law by the belief, as a table; its sum over the classes stands for those that are neither x_0 nor x_t.
        p = self._likelihood(xt, s, t) * self._scaled(xt, self._conditioned(xt, x0_hat, t), t, s)
        log_p = floored_log(p)
        log_all, log_mask = log_p[..., :-1].sum(-1), log_p[..., -1]
        log_z, log_x = (jnp.take_along_axis(log_p, place[..., None], axis=-1)[..., 0] for place in (z, xt))

        whole, step, start = self._weights(None, t, xt), self._weights(s, t, xt), self._weights(None, s, xt)
        masked, same = xt == self.mask, xt == z
        u, u_t, u_s = (weights[1] / self.classes for weights in (step, whole, start))
        seen = jnp.where(masked, whole[2], jnp.where(same, whole[0], 0.0) + u_t)  # q(x_t | x_0)

        def law(back, forth):
            return jnp.where(seen > 0, back * forth / jnp.where(seen > 0, seen, 1.0), 0.0)

        apart = ~masked & ~same
        at_z = law(jnp.where(masked, step[2], jnp.where(same, step[0], 0.0) + u), start[0] + u_s)
        at_x = jnp.where(apart, law(step[0] + u, u_s), 0.0)
        other = law(jnp.where(masked, step[2], u), u_s)
        at_mask = jnp.where(masked, law(1.0, start[2]), 0.0)
        others = self.classes - 1.0 - apart
        rest = log_all - log_z - jnp.where(apart, log_x, 0.0)
        each = other * (others * floored_log(other) - rest)
        for q, log_there in ((at_z, log_z), (at_x, log_x), (at_mask, log_mask)):
            each = each + q * (floored_log(q) - log_there)
        return jnp.where(s < t, per_example_sum(each), 0.0)

    def elbo_rate(self, noised, x0_hat):
        return self._last_step(self.schedule.steps, noised, x0_hat)

    def _weights(self, s, t, like):
        """A, U and C from s to t, each from what keeps its digits."""
        kept, replaced, masked = (bcast(c, like) for c in self.schedule(t))
        if s is None:
            return kept, replaced, masked
        kept_s, replaced_s, masked_s = (bcast(c, like) for c in self.schedule(s))
        unmasked, unmasked_s = kept + replaced, kept_s + replaced_s
        kept = jnp.where(kept_s > 0, kept / jnp.where(kept_s > 0, kept_s, 1.0), 0.0)
        # Of two equal expressions the one that subtracts the smaller numbers.
        masked = jnp.where(masked < unmasked_s, masked - masked_s, unmasked_s - unmasked)
        replaced = replaced - kept * replaced_s
        alive, safe = unmasked_s > 0, jnp.where(unmasked_s > 0, unmasked_s, 1.0)
        replaced, masked = (jnp.maximum(c, 0.0) / safe for c in (replaced, masked))
        return kept, jnp.where(alive, replaced, 0.0), jnp.where(alive, masked, 1.0)
