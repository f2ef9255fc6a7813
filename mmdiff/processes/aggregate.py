r"""MT-Diffusion: one Gaussian chain whose mean carries the other modalities (Chen et al. 2024, arXiv:2407.17571, theorem 2).

    z_t = alpha z_0 + sum_i a_i(t) E_i(x_i) + sigma eps,        a_i(0) = 0,

with fixed encoders E_i into the space of z and weights a_i (the paper's alpha-tilde). Without the sum, y_t = z_t - sum_i a_i E_i is what
a `Gaussian` makes of z_0, so that everything is the `Gaussian` between two shifts: its parameterisations read y_t, and its step from
t to s (the posterior, DDIM, any stride) is one of y. In the paper's terms the weight of a transition is
w = a(t) alpha(s) / alpha(t) - a(s): a coarser grid sub-samples a, never w.

Conditioning is time, here too, for a modality x_i by its own time t_i:

    t_i = 0        known: the network sees it, and E_i(x_i) is in the mean (the X variant)
    0 < t_i < 1    hidden, usually at z's time: E_i(x_i) is in the mean, the network sees the null and must predict x_i (the U variant)
    t_i = 1        absent: not in the mean, null to the network, no loss of its head; with all of them absent this is plain DDPM

Whatever knows known from hidden may be such a modality. For classes that is `absorbing(K, schedules.at_once())`, masked as soon as
time starts and sampled in the last step; for arrays it is `Hidden`, for what is always known `Given`. In sampling the belief about a
hidden x_i, from the network's output for it (its head), stands in for x_i: E_i of the probabilities or of the mean.

    process = Aggregate("image", {"label": MeanShift(template(table), moving_target())},
                        image=Gaussian(schedules.linear_beta(), eps), label=absorbing(10, schedules.at_once()))
    losses.diffusion(process, apply, times.shared("image", "label"), losses.weighted(process, label=0.1))
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import schedules
from mmdiff.processes.base import Joint, Noised, Process, bcast, check_time, fold, per_example, per_example_mean, per_example_sum
from mmdiff.processes.class_sampling import sample_classes
from mmdiff.processes.discrete import Discrete
from mmdiff.processes.gaussian import Gaussian
from mmdiff.processes.mean_shift import MeanShift


@dataclasses.dataclass(frozen=True)
class Hidden(Process):
    r"""Arrays that are known at t = 0 and hidden, `null`, at any later time; the network's output for them is a mean, `N(out, std^2)`.

    The last step, to s = 0, takes the mean. The continuous counterpart of `absorbing(K, schedules.at_once())`.

    Attributes:
      null: what a hidden one looks like: a scalar or an array of one example's shape.
      std: of the output's law, for likelihoods (`kl`, `sampling.head_guided`).
    """

    null: Any = 0.0
    std: float = 1.0

    def prior(self, keys, shape):
        return jnp.broadcast_to(jnp.asarray(self.null, jnp.float32), (keys.shape[0], *shape))

    def corrupt(self, keys, x0, t):
        check_time(t)
        hidden = jnp.broadcast_to(jnp.asarray(self.null, x0.dtype), x0.shape)
        return Noised(x0=x0, xt=jnp.where(bcast(t, x0) > 0, hidden, x0), t=t)

    def clean(self, out, xt, t):
        return jnp.where(bcast(t, xt) > 0, out.astype(jnp.float32), xt)

    def loss(self, out, noised):
        """Mean squared error, averaged over one example's dimensions."""
        return jnp.where(noised.t > 0, per_example_mean((out.astype(jnp.float32) - noised.x0) ** 2), 0.0)

    def step(self, keys, xt, x0_hat, t, s):
        return jnp.where(bcast((s < t) & (s == 0), xt), x0_hat, xt)

    def kl(self, noised, x0_hat, s):
        """-log N(x_0; x0_hat, std^2) for the step to s = 0, in which everything is revealed; nothing for the others."""
        nats = 0.5 * ((noised.x0 - x0_hat) / self.std) ** 2 + 0.5 * math.log(2 * math.pi * self.std**2)
        return jnp.where((s < noised.t) & (s == 0), per_example_sum(nats), 0.0)

    def prior_kl(self, x0):
        return jnp.zeros(x0.shape[0], jnp.float32)

    def elbo_rate(self, noised, x0_hat):
        return jnp.zeros_like(noised.t)


@dataclasses.dataclass(frozen=True, init=False)
class Aggregate(Joint):
    r"""A `Joint` of which one modality, the `target`, is a `Gaussian` that carries others in its mean, as the module says.

    What is not in `added` is a modality as in any `Joint`; with nothing added this is one. Whatever the weights, the prior is that of
    the target alone plus what is known of the others, a(1) E(x) (`condition_prior`): a hidden modality enters in the step from t = 1, which
    samples it for that. Weights far from 0 there (`card`, large constants) are therefore for modalities that are known: a hidden one makes
    that step, hence the bound, costly, and continuous time has none.

    Mistakes to avoid: the target's own `clean`, `kl` and `elbo_rate` do not know of the sum, so a bound is `losses.vlb(process)`, not one
    of `process.parts[target]`. And a network that was never shown a modality does not sample the target for a known one: use
    `sampling.head_guided`.

    Attributes:
      target: the name of z.
      added: name -> `MeanShift`.
      parts: all modalities.

    >>> from mmdiff.processes import absorbing, card, template
    >>> label = absorbing(10, schedules.at_once())
    >>> process = Aggregate(
    ...     "image", {"label": MeanShift(template(jnp.ones((10, 2))), card())}, image=Gaussian(schedules.flow()), label=label)
    >>> x0, t = {"image": jnp.zeros((2, 2)), "label": jnp.array([3, 7])}, {"image": jnp.full(2, 0.5), "label": jnp.array([0.0, 1.0])}
    >>> noised = jax.jit(process.corrupt)(jax.random.split(jax.random.key(0), 2), x0, t)
    >>> (noised.xt["image"] - 0.5 * noised.noise["image"]).round(5).tolist()      # a label that is known, and one that is absent
    [[0.5, 0.5], [0.0, 0.0]]
    """

    target: str
    added: Mapping[str, MeanShift]

    def __init__(self, target: str, added: Mapping[str, MeanShift], parts: Mapping[str, Process] | None = None, **named: Process):
        super().__init__(parts, **named)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "added", dict(added))
        if not isinstance(self.parts.get(target), Gaussian):
            raise ValueError(f"Aggregate: the target {target!r} must be one of the modalities {sorted(self.parts)}, and a Gaussian.")
        wrong = [name for name in self.added if name == target or name not in self.parts]
        if wrong:
            raise ValueError(f"Aggregate: cannot add {wrong}; the modalities other than {target!r} are {sorted({*self.parts} - {target})}.")

    def __hash__(self):
        return hash((self.target, *self.added.items(), *self.parts.items()))

    @property
    def chain(self) -> Gaussian:
        """The process of y_t, the target without what is added."""
        return self.parts[self.target]

    @property
    def heads(self) -> tuple[str, ...]:
        """What is added and may be hidden, so that the network has to predict it."""
        return tuple(name for name in self.added if self.parts[name].learnt)

    @property
    def shared(self) -> bool:
        """Whether an encoder is the network itself."""
        return any(shift.shared for shift in self.added.values())

    def bind(self, params):
        if not self.shared:
            return self

        def of(shift):
            return MeanShift(functools.partial(shift.encode, params), shift.weight) if shift.shared else shift

        return Aggregate(self.target, {name: of(shift) for name, shift in self.added.items()}, self.parts)

    def condition_prior(self, xt, known):
        if self.target in known:
            return xt
        keep = {name: xt[name] for name in self.added if name in known}
        t = {name: jnp.full(len(xt[self.target]), float(name == self.target)) for name in (self.target, *keep)}
        return self._shifted(xt, self._encoded(keep, xt[self.target]), t, 1)

    def corrupt(self, keys, x0, t):
        noised = super().corrupt(keys, x0, t)
        return noised.replace(xt=self._shifted(noised.xt, self._encoded(x0, x0[self.target]), t, 1))

    def with_x0(self, noised, x0):
        if self.target not in x0 and not any(name in self.added for name in x0):
            return super().with_x0(noised, x0)
        x0 = {**noised.x0, **x0}
        y = noised.replace(xt=self._shifted(noised.xt, self._encoded(x0, noised.xt[self.target]), noised.t, -1))
        return super().with_x0(y, x0).replace(xt=noised.xt)

    def clean(self, out, xt, t):
        x0_hat = super().clean(out, xt, t)
        if not self.added:
            return x0_hat
        y = self._shifted(xt, self._encoded(x0_hat, xt[self.target]), t, -1)[self.target]
        return {**x0_hat, self.target: self.chain.clean(out[self.target], y, t[self.target])}

    def loss(self, out, noised):
        """The modalities' own losses; zero for one that is added where it is known or absent.

        Its own loss is not zero where it is absent (as in any `Joint`): `on(name, process.parts[name].loss)` also trains the head to
        predict it from a z_t that does not carry it.
        """
        values = super().loss(out, noised)
        return values | {name: jnp.where(noised.t[name] < 1, values[name], 0.0) for name in self.added}

    def step(self, keys, xt, x0_hat, t, s):
        xs = super().step(keys, xt, x0_hat, t, s)
        if not self.added:
            return xs
        # A class that this step reveals or lets enter is sampled, and z_s carries the sample.
        for name, part in self.parts.items():
            if name in self.added and isinstance(part, Discrete):
                x0_hat = self.with_belief(x0_hat, t, **{name: self._pinned(fold(keys, name), name, xs[name], x0_hat[name], t, s)})
        z, start, end = (tree[self.target] for tree in (xt, t, s))
        encoded = self._encoded(x0_hat, z)
        y = self._shifted(xt, encoded, t, -1)[self.target]
        y = self.chain.step(fold(keys, self.target), y, x0_hat[self.target], start, end)
        moved = self._shifted({self.target: y}, encoded, s, 1)[self.target]
        return {**xs, self.target: jnp.where(bcast(end < start, z), moved, z)}

    def kl(self, noised, x0_hat, s):
        r"""As of any `Joint`; the target's is that of two posteriors with the true and the believed X,

            (SNR(s) - SNR(t)) / 2 |x_0 - x0_hat - k (E_hat - E)|^2,    k = (a_s / alpha_s - r a_t / alpha_t) / (1 - r), r = SNR(t) / SNR(s).
        """
        nats = super().kl(noised, x0_hat, s)
        t, end = noised.t[self.target], s[self.target]
        apart = (end < t) & (end > 0)
        safe_t, safe_s = noised.t | {self.target: jnp.where(apart, t, 0.75)}, s | {self.target: jnp.where(apart, end, 0.5)}
        (alpha, sigma), (alpha_s, sigma_s) = (self.chain.schedule(u[self.target]) for u in (safe_t, safe_s))
        log_t, log_s = (schedules.log_snr(self.chain.schedule, u[self.target]) for u in (safe_t, safe_s))
        back = alpha * sigma_s**2 / (alpha_s * sigma**2)

        def mean_weight(name):
            return (self._share(name, safe_s) - back * self._share(name, safe_t)) / (-alpha_s * jnp.expm1(log_t - log_s))

        part, belief = self._target_terms(noised, x0_hat, mean_weight)
        return {**nats, self.target: self.chain.kl(part, belief, end)}

    def elbo_rate(self, noised, x0_hat):
        """The limit of `kl`, in which k = c + c' / (log SNR)', c = a / alpha."""
        nats = super().elbo_rate(noised, x0_hat)
        t = jnp.clip(noised.t[self.target], 1e-6, 1.0 - 1e-6)
        slope = jax.jvp(lambda u: schedules.log_snr(self.chain.schedule, u), (t,), (jnp.ones_like(t),))[1]

        def mean_weight(name):
            def drift(u):
                return self._share(name, noised.t | {self.target: u}) / self.chain.schedule(u)[0]

            value, change = jax.jvp(drift, (t,), (jnp.ones_like(t),))
            return value + change / slope

        return {**nats, self.target: self.chain.elbo_rate(*self._target_terms(noised, x0_hat, mean_weight))}

    def split(self, noised):
        """One `Noised` per modality; the target's x_t is without what was added to it, y_t."""
        y = self._shifted(noised.xt, self._encoded(noised.x0, noised.xt[self.target]), noised.t, -1)
        return super().split(noised.replace(xt=y))

    def with_belief(self, x0_hat, t, **beliefs):
        """x0_hat with other `beliefs` about modalities that are added, and the target's belief that goes with them and the same eps_hat."""
        z, alpha = x0_hat[self.target], self.chain.schedule(t[self.target])[0]
        old, new = (self._encoded({name: tree[name] for name in beliefs}) for tree in (x0_hat, beliefs))
        for name in old:
            mean_weight = self._share(name, t) / jnp.where(alpha > 0, alpha, 1.0)
            z = widened(z, bcast(mean_weight, z) * (old[name] - new[name]))
        return {**x0_hat, **beliefs, self.target: z}

    def unconditional_inputs(self, x, t, null_x, null_t):
        """Dropping what is known takes it out of the mean as well: the plain DDPM of z then sees its own y_t. What is hidden stays so."""
        null_x, null_t, known = dict(null_x), dict(null_t), {}
        for name in self.added:
            known[name] = (t[name] == 0) & (null_t[name] == 1)
            changed = known[name] | (t[name] == 1)
            null_x[name] = jnp.where(bcast(changed, x[name]), null_x[name], x[name])
            null_t[name] = jnp.where(changed, null_t[name], t[name])
        encoded = self._encoded({name: x[name] for name in known}, x[self.target])
        when = {self.target: t[self.target]} | {name: jnp.where(known[name], 0.0, 1.0) for name in known}
        shift = self._shifted({self.target: jnp.zeros_like(x[self.target])}, encoded, when, -1)[self.target]
        return {**null_x, self.target: null_x[self.target] + self._fed(shift, t)}, null_t

    def guided_output(self, out, x, t, score):
        r"""The network's output for z_t once the modalities x are known, from its output `out` where they are hidden, any parameterisation.

            E[eps | z_t, x] = E[eps | z_t] - sigma score,      score = grad log p(x | z_t),

        and z_0 follows, with E(x) for what was believed of it. Nothing changes where alpha = 0, or where t of all x is not 0.

        Args:
          out: the network's outputs.
          x, t: its inputs, x with the data.
          score: the gradient with respect to its input for the target; scaled by a factor it makes guidance.
        """
        z, names = x[self.target], self.heads
        alpha, sigma, p, q = (bcast(c, z) for c in self.chain._rows(t[self.target]))
        known = {name: t[name] == 0 for name in names}
        beliefs = {name: self.parts[name].clean(out[name], self.null_like(name, x[name]), jnp.ones(len(z))) for name in names}
        believed, true = self._encoded(beliefs, z), self._encoded({name: x[name] for name in names}, z)
        change = -(q * alpha - sigma * p) * sigma * self._fed(score, t)
        for name in names:
            change = change - p * bcast(jnp.where(known[name], self._share(name, t), 0.0), z) * (true[name] - believed[name])
        usable = bcast(sum(known.values()) > 0, z) & (alpha > 0)
        return widened(out[self.target], jnp.where(usable, change / jnp.where(alpha > 0, alpha, 1.0), 0.0))

    def nll(self, name, out, x0):
        """-log p(x_0 | z_t) of a hidden modality by the network's output for it, in nats [B]; of an array up to a constant."""
        part = self.parts[name]
        total = part.loss(out, Noised(x0, self.null_like(name, x0), jnp.ones(len(x0)))) * (x0.size // len(x0))
        return total / (2 * part.std**2) if isinstance(part, Hidden) else total

    def _fed(self, z, t):
        """A difference of two z_t, as the network's input for it, or a gradient with respect to that input, as one with respect to z_t."""
        return self.chain.inputs(z, t[self.target])[0]

    def _share(self, name, t):
        """a(t) [B], 0 where the modality is absent or z clean."""
        end = t[self.target]
        weight = self.added[name].weight(self.chain.schedule, jnp.where(end > 0, end, 0.5))
        return jnp.where((t[name] < 1) & (end > 0), weight, 0.0)

    def _encoded(self, beliefs, z=None):
        """E of clean data or of beliefs about them, of those that are there, by name; each must be like z."""
        encoded = {}
        for name, shift in self.added.items():
            if name in beliefs:
                if shift.shared:
                    raise ValueError(f"Aggregate: the encoder of {name!r} is the network: use process.bind(params).")
                encoded[name] = jax.lax.stop_gradient(shift.encode(self._as_belief(name, beliefs[name])))
                if z is not None and encoded[name].shape != z.shape:
                    raise ValueError(
                        f"Aggregate: the encoder of {name!r} gives the shape {encoded[name].shape}, but {self.target!r} has {z.shape}.")
        return encoded

    def _as_belief(self, name, x):
        part = self.parts[name]
        discrete = isinstance(part, Discrete) and jnp.issubdtype(x.dtype, jnp.integer)
        return jax.nn.one_hot(x, part.classes) if discrete else x

    def _shifted(self, x, encoded, t, sign):
        """x with sign * sum_i a_i E_i added to the target."""
        z = x[self.target]
        for name, value in encoded.items():
            z = z + bcast(sign * self._share(name, t), z) * value
        return {**x, self.target: z}

    def _pinned(self, keys, name, xs, belief, t, s):
        """The belief about a discrete modality with which z moves: what x_s says, and a sample where the modality enters."""
        part = self.parts[name]
        known = part._conditioned(xs, belief, s[name])
        sampled = jax.nn.one_hot(per_example(sample_classes, keys, belief), part.classes)
        known = jnp.where(bcast((t[name] == 1) & (s[name] > 0), belief), sampled, known)
        return jnp.where(bcast(s[self.target] > 0, belief), known, belief)  # a clean z is x0_hat

    def _target_terms(self, noised, x0_hat, mean_weight):
        """The target's `Noised`, and its belief moved by what the errors about the others do to the mean of a step."""
        believed, true = (self._encoded(tree, noised.x0[self.target]) for tree in (x0_hat, noised.x0))
        z = x0_hat[self.target]
        for name in self.added:
            z = widened(z, bcast(mean_weight(name), noised.x0[self.target]) * (believed[name] - true[name]))
        return noised.of(self.target), z


def widened(wide: jax.Array, delta: jax.Array) -> jax.Array:
    """`wide + delta`, to the first channels alone where `wide` has more (a learned sigma's)."""
    if wide.shape == delta.shape:
        return wide + delta
    size = delta.shape[-1]
    return jnp.concatenate([wide[..., :size] + delta, wide[..., size:]], -1)
