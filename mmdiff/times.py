"""Times: functions `(key, index) -> t` that say at which noise level each example, and each of its modalities, is trained.

`index` [B] holds the examples' global positions, `key` is the step's: an example's time depends on these two alone, never on the
mesh, the micro-batching or its place in the batch. A time is float32 [B], or a dict of them by modality for a `Joint`.

    joint(image=uniform(), label=uniform())                          independent (UniDiffuser)
    shared("image", "label")                                         one time for both
    joint(image=uniform(), label=constant(0.0))                      image given label
    mixture((0.9, joint(image=uniform(), label=constant(0.0))),      class-conditional training with label dropout
            (0.1, joint(image=uniform(), label=constant(1.0))))
    joint(tokens=importance(100, "vlb"), label=constant(0.0))        most often where the loss is large
    spans("image", 0.5, rule)                                        those of a rule, and ends of steps (average velocities)

Importance-sampled times need statistics of the training so far: they, and combinations with them, are `Adaptive`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmdiff.checks import is_whole
from mmdiff.errors import UserError
from mmdiff.processes.class_sampling import sample_classes
from mmdiff.spans import end_of

Times = Callable[[jax.Array, jax.Array], Any]

# Irrational steps, independent over the rationals: modalities with different ones fill the square (Kronecker sequences).
STEPS = (0.6180339887498949, 0.4142135623730951, 0.7320508075688772, 0.6457513110645906)


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per example, `fold_in(key, index)`, [B]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _named(key, name):
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def uniform(low: float = 0.0, high: float = 1.0) -> Times:
    """t ~ U(low, high], independently; never exactly `low`, so that t = 0 keeps its meaning of "given".

    >>> uniform()(jax.random.key(0), jnp.arange(5)).shape
    (5,)
    """
    if not 0 <= low < high <= 1:
        raise UserError(f"uniform times need 0 <= low < high <= 1, got {low} and {high}.")

    def times(key, index):
        u = jax.vmap(jax.random.uniform)(example_keys(key, index))
        return high - u * (high - low)

    return times


def stratified(stride: int = 0) -> Times:
    """Evenly spread over any run of consecutive positions: `t = frac(u + index * step)`, u one sample per step.

    A Kronecker sequence has the low variance of antithetic or stratified times (VDM, appendix I.1) without knowing the batch.
    Modalities that are to be independent need different strides, 0 to 3: `joint(image=stratified(0), label=stratified(1))`.

    >>> t = stratified()(jax.random.key(0), jnp.arange(100))
    >>> bool((jnp.diff(jnp.sort(t)) < 0.03).all())  # independent times leave gaps of 0.05
    True
    """
    if stride not in range(len(STEPS)):
        raise UserError(f"stratified has the strides 0 to {len(STEPS) - 1}, not {stride}.")

    def times(key, index):
        # step * 2^32 in wrapping integers is exact where floats would lose the index's low bits.
        place = index.astype(jnp.uint32) * jnp.uint32(round(STEPS[stride] * 2**32))
        fraction = (place >> 8).astype(jnp.float32) / 2**24
        t = jnp.mod(jax.random.uniform(key) + fraction, 1.0)
        return 1.0 - t

    return times


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """`t = sigmoid(mean + std n)`, n normal: more weight in the middle (Esser et al. 2024, section 3.1)."""

    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise UserError(f"logit_normal times need a finite mean and a std above 0, got {mean} and {std}.")

    def times(key, index):
        n = jax.vmap(jax.random.normal)(example_keys(key, index))
        return jax.nn.sigmoid(mean + std * n)

    return times


def on_grid(steps: int) -> Times:
    """t uniform on 1/T, 2/T, ..., 1: the times of a chain with T steps."""
    if not is_whole(steps, 1):
        raise UserError(f"on_grid needs at least one step, got {steps}.")

    def times(key, index):
        i = jax.vmap(lambda k: jax.random.randint(k, (), 1, steps + 1))(example_keys(key, index))
        return i.astype(jnp.float32) / steps

    return times


def constant(value: float) -> Times:
    """Pinned: 0 makes a modality a condition, 1 makes it absent.

    >>> constant(1.0)(jax.random.key(0), jnp.arange(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    if not 0 <= value <= 1:
        raise UserError(f"a time lies in [0, 1], got {value}.")
    return lambda key, index: jnp.full(index.shape, value, jnp.float32)


class SampledTimes(NamedTuple):
    """Times as an `Adaptive` rule samples them.

    Attributes:
      t: the times.
      weight: [B], the factor `1 / (T p_t)` that makes a loss at t an unbiased estimate of its mean over all T times.
      place: int32 [B], the index i of t = (i + 1) / T; -1 for an example whose time comes from a rule without statistics.
    """

    t: Any
    weight: jax.Array
    place: jax.Array


@dataclasses.dataclass(frozen=True)
class Importance:
    r"""The statistics of importance-sampled times: of every t = (i + 1) / T, i = 0 .. T - 1, the count n_i of its samples and

        H_i <- 0.9 H_i + 0.1 mean l_i^2,        p_i ~ sqrt(H_i + 1e-10) + 1e-4,    p_0 ~ as p_1,

    where l_i are a step's values of one term of the loss at that time: the mean is over the whole batch, whatever the devices or
    micro-batches. Until every n_i exceeds 10, p is uniform. Source: Nichol & Dhariwal 2021, section 3.3; Gu et al. 2022's code.

    Attributes:
      steps: T.
      term: the name of the term.
    """

    steps: int
    term: str

    def init(self) -> dict[str, jax.Array]:
        return {"square": jnp.zeros(self.steps), "count": jnp.zeros(self.steps, jnp.int32)}

    def density(self, stats) -> jax.Array:
        """`T p` [T]: 1 where times are uniform."""
        size = jnp.sqrt(stats["square"] + 1e-10) + 1e-4
        size = size.at[0].set(size[1])
        return jnp.where(stats["count"].min() > 10, self.steps * size / size.sum(), 1.0)

    def observe(self, place: jax.Array, values: jax.Array) -> dict[str, jax.Array]:
        """What a part of the batch adds to the sums that `update` takes."""
        hits = jax.nn.one_hot(place, self.steps)
        return {"square": jax.lax.stop_gradient(values) ** 2 @ hits, "count": hits.sum(0)}

    def update(self, stats, seen) -> dict[str, jax.Array]:
        mean = seen["square"] / jnp.maximum(seen["count"], 1.0)
        square = jnp.where(seen["count"] > 0, 0.9 * stats["square"] + 0.1 * mean, stats["square"])
        return {"square": square, "count": stats["count"] + seen["count"].astype(jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Times that depend on statistics, `sample(key, index, stats) -> SampledTimes`; as `(key, index) -> t` those of a training's start."""

    source: Importance
    sample: Callable[[jax.Array, jax.Array, Any], SampledTimes]

    def __call__(self, key, index):
        return self.sample(key, index, self.source.init()).t


def importance(steps: int, term: str) -> Adaptive:
    """t on 1/T, 2/T, ..., 1 with probabilities in proportion to the typical size of the loss's term `term`; see `Importance`."""
    if not is_whole(steps, 2):
        raise UserError(f"importance needs at least two steps, got {steps}.")
    source = Importance(steps, term)

    def sample(key, index, stats):
        density = source.density(stats)
        place = jax.vmap(lambda k: sample_classes(k, density))(example_keys(key, index))
        return SampledTimes((place + 1).astype(jnp.float32) / steps, 1.0 / density[place], place)

    return Adaptive(source, sample)


def _rule(times: Times | float) -> Times:
    """A rule; a number stands for a constant one."""
    return times if callable(times) else constant(times)


def _sampled(times, key, index, stats):
    if isinstance(times, Adaptive):
        return times.sample(key, index, stats)
    return SampledTimes(times(key, index), jnp.ones(index.shape), jnp.full(index.shape, -1))


def _combined(sample, parts):
    """The times of a combination, adaptive if one of its parts is."""
    sources = {part.source for part in parts if isinstance(part, Adaptive)}
    if len(sources) > 1:
        raise UserError("a loss has importance-sampled times of one kind only: give every part the same steps and term.")
    return Adaptive(sources.pop(), sample) if sources else lambda key, index: sample(key, index, None).t


def joint(**times: Times | float) -> Times:
    """Independent times, one rule per modality (a number is constant); at most one of them is adaptive.

    >>> t = joint(image=uniform(), label=constant(0.0))(jax.random.key(0), jnp.arange(4))
    >>> sorted(t), t["image"].shape, float(t["label"].max())
    (['image', 'label'], (4,), 0.0)
    """
    times = {name: _rule(rule) for name, rule in times.items()}
    adaptive = [name for name, rule in times.items() if isinstance(rule, Adaptive)]
    if len(adaptive) > 1:
        raise UserError(f"joint: only one modality's times can be importance-sampled on their own, not {adaptive}; see shared.")

    def sample(key, index, stats):
        parts = {name: _sampled(rule, _named(key, name), index, stats) for name, rule in times.items()}
        deciding = parts[(adaptive or list(times))[0]]
        return deciding._replace(t={name: part.t for name, part in parts.items()})

    return _combined(sample, times.values())


def shared(*names: str, times: Times | None = None, **others: Times | float) -> Times:
    """One time for all the named modalities, uniform by default; `others` have their own: `shared("image", "text", mask=1.0)`.

    >>> t = shared("image", "label")(jax.random.key(0), jnp.arange(4))
    >>> bool((t["image"] == t["label"]).all())
    True
    """
    others = {name: _rule(other) for name, other in others.items()}
    rule, adaptive = times or uniform(), [name for name, other in others.items() if isinstance(other, Adaptive)]
    if adaptive:
        raise UserError(f"shared: only the time that is shared can be importance-sampled, not those of {adaptive}.")

    def sample(key, index, stats):
        one = _sampled(rule, key, index, stats)
        own = {name: other(_named(key, name), index) for name, other in others.items()}
        return one._replace(t={name: one.t for name in names} | own)

    return _combined(sample, [rule])


def conditional(*conditions: str, dropout: float, **noisy: Times) -> Times:
    """The modalities `noisy` given `conditions`, all of which are absent for a share `dropout` of the examples (classifier-free guidance).

    >>> rule = conditional("label", dropout=0.1, image=uniform())
    >>> rule(jax.random.key(0), jnp.arange(4))["label"].shape
    (4,)
    """
    return mixture(*(
        (share, joint(**noisy, **dict.fromkeys(conditions, time))) for share, time in ((1 - dropout, 0.0), (dropout, 1.0))))


def image_label(shares: Mapping[str, float]) -> Times:
    """Times of one network for pairs, images of a label, labels of an image and images alone, by the shares of the examples:

    joint (both noisy), image_given_label, label_given_image, label_given_noisy (an image at t up to 0.7, which keeps the classifier from
    memorising the training images), image_alone.
    """
    noisy = uniform()
    return mixture(
        (shares["joint"], joint(image=noisy, label=noisy)),
        (shares["image_given_label"], joint(image=noisy, label=0.0)),
        (shares["label_given_image"], joint(image=0.0, label=1.0)),
        (shares["label_given_noisy"], joint(image=uniform(0.0, 0.7), label=1.0)),
        (shares["image_alone"], joint(image=noisy, label=1.0)))


def multitask(
    target: str, other: str, noisy: Times, shares: Mapping[str, float], order: Sequence[str] = ("known", "hidden", "absent", "clean")
) -> Times:
    """MT-Diffusion's times of an `Aggregate`, by the shares of what an example trains (Chen et al. 2024):

    known: the target given the other modality (X). hidden: the other is in the target's mean alone, at one time with it (U).
    absent: the target alone (plain DDPM). clean: the other is to be predicted from a clean target. In which `order` the mixture has them
    decides which random number is whose.
    """
    rules = {
        "known": joint(**{target: noisy, other: 0.0}), "hidden": shared(target, other, times=noisy),
        "absent": joint(**{target: noisy, other: 1.0}), "clean": joint(**{target: 0.0, other: 1.0})}
    return mixture(*((shares[name], rules[name]) for name in order))


def spans(name: str, equal: float, rule: Times, other: Times | None = None) -> Times:
    """The times of `rule`, and where a step of the modality `name` ends: s = t for a share `equal` of the examples, else s ~ U[0, t).

    With `other`, a rule of one time, a step goes from the later of the rule's time and that one to the earlier (MeanFlow). For average
    velocities, see `averaged`; s is `t["NAME/end"]`. The share is each example's own chance, whatever its place in a batch.

    >>> t = spans("image", 0.5, joint(image=uniform(), label=0.0))(jax.random.key(0), jnp.arange(1000))
    >>> f'{(t["image/end"] == t["image"]).mean():.1f}', bool((t["image/end"] <= t["image"]).all())
    ('0.5', True)
    """
    if not 0 <= equal <= 1:
        raise UserError(f"spans: the share of examples with s = t lies in [0, 1], not {equal}.")
    if other is not None and isinstance(rule, Adaptive):
        raise UserError("spans: importance-sampled times are those of the rule alone: leave the other time out.")

    def sample(key, index, stats):
        found = _sampled(rule, key, index, stats)
        if not isinstance(found.t, Mapping) or name not in found.t:
            raise UserError(f"spans: the rule gives no time of a modality {name!r}: let it be joint({name}=...) or a mixture of such.")
        own = _named(key, end_of(name))
        u = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(example_keys(own, index))
        t = found.t[name]
        if other is None:
            end = t * jnp.where(u[:, 0] < equal, 1.0, u[:, 1])
        else:
            second = other(_named(own, "other"), index)
            t, end = jnp.maximum(t, second), jnp.where(u[:, 0] < equal, jnp.maximum(t, second), jnp.minimum(t, second))
        return found._replace(t={**found.t, name: t, end_of(name): end})

    return _combined(sample, [rule])


def mixture(*choices: tuple[float, Times | float]) -> Times:
    """Each example follows one of several rules, with the given weights: `mixture((0.5, a), (0.5, b))`.

    >>> dropout = mixture((0.9, joint(label=constant(0.0))), (0.1, joint(label=constant(1.0))))
    >>> f'{dropout(jax.random.key(0), jnp.arange(1000))["label"].mean():.1f}'
    '0.1'
    """
    choices = [(weight, _rule(rule)) for weight, rule in choices]
    weights = [weight for weight, _ in choices]
    if not (weights and min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):  # so that NaN is none
        raise UserError(f"mixture: the weights must be >= 0 and sum to 1, got {weights}.")

    def sample(key, index, stats):
        u = jax.vmap(jax.random.uniform)(example_keys(_named(key, "mixture"), index))
        chosen = _sampled(choices[-1][1], jax.random.fold_in(key, len(choices) - 1), index, stats)
        edge = sum(weights)
        for i in range(len(choices) - 2, -1, -1):
            edge -= weights[i + 1]
            other = _sampled(choices[i][1], jax.random.fold_in(key, i), index, stats)
            if jax.tree.structure(other) != jax.tree.structure(chosen):
                raise UserError("mixture: the rules give times for different modalities; each must name all of them.")
            chosen = jax.tree.map(lambda a, b, e=edge: jnp.where(u < e, a, b), other, chosen)
        return chosen

    return _combined(sample, [rule for _, rule in choices])
