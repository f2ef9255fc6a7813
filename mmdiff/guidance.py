r"""Guidance: networks wrapped so that a sampler follows a condition more closely than the model alone does.

Each takes `apply(params, x, t)` and returns one like it. All of them are names of `sampling`, too: `sampling.guided(...)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.lazy_logits import as_arrays
from mmdiff.processes.aggregate import Aggregate
from mmdiff.processes.base import Joint, bcast, concrete, per_example_sum
from mmdiff.processes.gaussian import Gaussian
from mmdiff.spans import end_of

Weight = float | Callable[[Mapping[str, jax.Array]], jax.Array]
"""A number, or a function of the network's times."""


def guided(
    apply: Callable,
    w: Weight | Mapping[str, Weight],
    drop: Sequence[str] = (),
    process: Joint | None = None,
    channels: Mapping[str, int] | None = None,
    *,
    each: Sequence[str] = (),
    prior: Mapping[str, jax.Array] | None = None,
    combine: Callable | None = None,
    shared: Sequence[Sequence[str]] = (),
) -> Callable:
    """Classifier-free guidance on raw outputs: `out = u + w (c - u)`; w = 1 is plain conditional, 0 unconditional.

    Linear in the output, hence right for eps, v, velocity and logits alike. u is of the same batch with some modalities at t = 1: with
    `drop` those, and they guide all others; with `each` every modality named there has a u of its own, from which all others are absent,
    so that modalities that are sampled together follow each other (UniDiffuser, Bao et al. 2023). All run as one batch, of 2B or (1 + M)B;
    a u that no weight other than the number 1 needs is left out.

    Args:
      w: a number, or a function of the network's times (`interval`, `ramp`); or one by modality, 1 for those that it leaves out.
      drop: the modalities that the unconditional branch is without: it is fed `process.null(name)`. Refused where that is random.
      process: the joint process; from an `Aggregate`'s mean the dropped modalities go, too.
      channels: modality -> how many of its output's first channels are guided; the others are those of the conditional branch. Published
        DiT guides 3 of 8, `{"image": 3}` (`forward_with_cfg`); ReDi guides the image alone, `{"features": 0}`. All channels by default.
      each: the modalities that are guided, in place of `drop`.
      prior: what is fed for modalities that are absent, where it is no null: a sample of `process.prior`, [B, ...] each.
      combine: of the beliefs of a `Gaussian`, (c, u) -> what takes the place of c - u, see `projected`. Others are guided as ever.
      shared: groups of modalities that have one time, [("image", "vision")]: with `each`, none of a group guides another of it.

    Raises UserError for a modality without a null, a weight that is not finite, or `channels` or a group of no modality.

    >>> from mmdiff import schedules
    >>> from mmdiff.processes import Gaussian, Given, Joint
    >>> process = Joint(image=Gaussian(schedules.flow()), label=Given(null=10))
    >>> def apply(params, x, t):                                 # here the output is 1 where a label is given, 0 where it is the null
    ...     return {"image": (x["label"] != 10).astype(jnp.float32)[:, None]}
    >>> x, t = {"image": jnp.zeros((2, 1)), "label": jnp.array([3, 7])}, {"image": jnp.ones(2), "label": jnp.zeros(2)}
    >>> guided(apply, 4.0, ("label",), process)(None, x, t)["image"].tolist()
    [[4.0], [4.0]]
    >>> guided(apply, {"image": 4.0}, process=process, each=("image",))(None, x, t)["image"].tolist()
    [[4.0], [4.0]]
    """
    if not isinstance(process, Joint) or (drop and each):
        raise UserError("guided: it needs the Joint process, and either drop, what guides, or each, what is guided.")
    if combine and getattr(process, "added", ()):
        raise UserError("guided: combine is of beliefs about x_0, and an Aggregate's target is not its own: leave combine out.")
    prior, drop, each, shared = dict(prior or {}), dropped(drop, process), guided_each(each, process), sharing(shared, process)
    for one in w.values() if isinstance(w, Mapping) else (w,):
        _check_weight("guided", one)
    for name, count in (channels or {}).items():
        if name not in process.parts or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f"guided: channels={channels} must give a modality of {sorted(process.parts)} its number of guided channels.")

    def weight(name):
        return w.get(name, 1.0) if isinstance(w, Mapping) else w

    def without(name):
        """The modalities that are absent from what this output is guided away from; () if it is not guided."""
        if _is_one(weight(name)) or name in drop or (each and name not in each):
            return ()
        return tuple(other for other in process.parts if other not in at_one_time(name, shared)) if each else drop

    branches = [*dict.fromkeys(filter(None, map(without, process.parts)))]
    for name in {*itertools.chain(*branches)} - {*prior}:
        process.null(name)
    if not branches:
        return apply

    def absent(name, x, t):
        if name not in prior:
            return process.null_like(name, x)
        fed = process.parts[name].inputs(prior[name], jnp.ones_like(t))[0]
        return jnp.where(bcast(t, x) == 1, x, fed.astype(x.dtype))  # what is absent is as it should be

    def apply_guided(params, x, t):
        batches, bound = [(dict(x), dict(t))], process.bind(params)
        for names in branches:
            null_x = {**x, **{name: absent(name, x[name], t[name]) for name in names}}
            gone = [key for name in names for key in (name, end_of(name)) if key in t]  # what is absent takes no step
            null_t = {**t, **{key: jnp.ones_like(t[key]) for key in gone}}
            batches.append(bound.unconditional_inputs(x, t, null_x, null_t))
        out = as_arrays(apply(params, *jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)))

        def mix(name, o):
            c, *others = jnp.split(o, len(batches))
            if (names := without(name)) not in branches:
                return c
            u, scale = others[branches.index(names)], weight(name)
            scale = jnp.asarray(scale(t)) if callable(scale) else scale
            scale = bcast(scale, c) if isinstance(scale, jax.Array) and scale.ndim else scale
            mixed = u + scale * (c - u)
            if combine and isinstance(part := process.parts.get(name), Gaussian):
                mixed = _by_belief(combine, part, x[name], t[name], c, u, scale, mixed)
            some = (channels or {}).get(name)
            return mixed if some is None else jnp.concatenate([mixed[..., :some], c[..., some:]], -1)

        return {name: mix(name, o) for name, o in out.items()}

    return apply_guided


def _by_belief(combine, part, x, t, c, u, scale, plain):
    """The output whose belief is that of c plus `(w - 1) combine(c, u)`; further channels (a sigma head) as in `plain`."""
    xt = x / part.inputs(jnp.ones_like(x), t)[0]
    change = (scale - 1) * combine(*(Gaussian.clean(part, out, xt, t) for out in (c, u)))
    change = Gaussian.output(part, change, jnp.zeros_like(xt), t)  # linear, so that w = 1 changes no bit
    size = change.shape[-1]
    return jnp.concatenate([c[..., :size] + change, plain[..., size:]], -1)


def projected(eta: float = 0.0, radius: float = math.inf) -> Callable:
    r"""Adaptive projected guidance, for `guided(..., combine=...)`: less of what only makes a belief longer (APG, Sadat et al. 2024).

    With D = c - u of one example, no longer than `radius`, and its parts along c and across it,

        x0_hat = c + (w - 1) (D_across + eta D_along):

    eta = 1 without a radius is plain guidance; eta = 0 avoids its oversaturation. D of an earlier step (momentum) is left out.

    >>> c, u = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, -1.0]])
    >>> projected(0.0)(c, u).tolist(), projected(0.5)(c, u).tolist()
    ([[0.0, 1.0]], [[0.5, 1.0]])
    """
    if not (math.isfinite(eta) and radius > 0):
        raise UserError(f"projected: eta is finite and the radius above 0, not {eta} and {radius}.")

    def combine(c, u):
        difference = c - u
        length = jnp.sqrt(per_example_sum(difference**2))
        difference *= bcast(jnp.minimum(1.0, radius / jnp.where(length > 0, length, 1.0)), c)
        square = per_example_sum(c**2)
        along = bcast(per_example_sum(difference * c) / jnp.where(square > 0, square, 1.0), c) * c
        return difference - (1.0 - eta) * along

    return combine


def dropped(drop: Sequence[str], process: Joint) -> tuple[str, ...]:
    """The names in `drop`, each of which has a null."""
    if isinstance(drop, str | Mapping):
        raise UserError(f"guidance drops modalities by name, as drop=('label',), and the process says what is fed for them; not {drop!r}.")
    for name in drop:
        process.null(name)
    return tuple(drop)


def guided_each(each: Sequence[str], process: Joint) -> tuple[str, ...]:
    """The names in `each`, modalities of the process; of an `Aggregate` that adds some to its target none can be guided by itself."""
    unknown = [each] if isinstance(each, str) else [name for name in each if name not in process.parts]
    if unknown:
        raise UserError(f"guidance of each modality takes several of {sorted(process.parts)}, not {', '.join(unknown)}.")
    if each and getattr(process, "added", ()):
        raise UserError("guidance of each modality needs a state of its own for each; of an Aggregate use drop, what guides its target.")
    return tuple(each)


def sharing(shared: Sequence[Sequence[str]], process: Joint) -> tuple[tuple[str, ...], ...]:
    """The groups in `shared`, each of several modalities of the process that have one time, and none in two of them."""
    for names in [shared] if isinstance(shared, str) else shared:
        joined = isinstance(names, str) or sum(not {*names}.isdisjoint(other) for other in shared) > 1
        if joined or len({*names}) < 2 or not {*names} <= {*process.parts}:
            raise UserError(f"shared is groups of {sorted(process.parts)}, as [('image', 'vision')], of two or more, not {names!r}.")
    return tuple(map(tuple, shared))


def at_one_time(name: str, shared: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The modalities that have the time of the modality `name`, itself among them.

    >>> at_one_time("vision", [("image", "vision")]), at_one_time("text", [("image", "vision")])
    (('image', 'vision'), ('text',))
    """
    return next((tuple(names) for names in shared if name in names), (name,))


def _is_one(w: Any) -> bool:
    return not callable(w) and concrete(w) and np.ndim(w) == 0 and float(w) == 1


def _check_weight(what: str, w: Any) -> None:
    if not callable(w) and concrete(w) and not np.all(np.abs(np.asarray(w, np.float64)) <= np.finfo(np.float32).max):
        raise UserError(f"{what}: the weight of guidance must be finite in float32 (1 is none), not {w}.")


def head_guided(process: Aggregate, apply: Callable, scale: float = 1.0) -> Callable:
    r"""Known modalities for a network that was never shown them: the gradient of its own outputs for them guides the target.

        E[eps | z_t, x] = E[eps | z_t] - scale sigma grad log p(x | z_t),

    exact for scale 1 and an exact p; a larger one guides. The network is fed the null for what is known (t = 0) of the modalities that
    `process` adds, at the target's time. Costs a backward pass through the network.

        sample(process, head_guided(process, apply), params, keys, grid, shape, given={"label": labels})
    """
    if not process.heads:
        raise UserError("head_guided: the process adds no modality that the network predicts, so there is no gradient.")

    def apply_guided(params, x, t):
        time = jnp.clip(t[process.target], 2.0**-24, 1 - 2.0**-24)  # neither known nor absent
        hidden_x, hidden_t, known, data = dict(x), dict(t), {}, {}
        for name in process.heads:
            known[name] = t[name] == 0
            pinned = bcast(known[name], x[name])
            hidden_x[name] = jnp.where(pinned, process.null_like(name, x[name]), x[name])
            hidden_t[name] = jnp.where(known[name], time, t[name])
            data[name] = jnp.where(pinned, x[name], 0)

        def log_p(z):
            out = apply(params, {**hidden_x, process.target: z}, hidden_t)
            nats = sum(jnp.where(known[name], process.nll(name, out[name], data[name]), 0.0) for name in known)
            return -nats.sum(), out

        score, out = jax.grad(log_p, has_aux=True)(x[process.target])
        data[process.target] = x[process.target]
        return {**out, process.target: process.bind(params).guided_output(out, data, t, scale * score)}

    return apply_guided


def autoguided(apply: Callable, w: Weight, weak: Any, weak_apply: Callable | None = None) -> Callable:
    """Autoguidance: `out = weak + w (good - weak)` with a worse network at the same inputs (Karras et al. 2024).

    Args:
      w: a number, of which 1 does not call the weak network, or a function of the network's times.
      weak: its parameters: of an earlier checkpoint, of a smaller network.
      weak_apply: the other network's `apply`, if it is not the same.
    """
    _check_weight("autoguided", w)
    if _is_one(w):
        return apply

    def apply_guided(params, x, t):
        scale = jnp.asarray(w(t)) if callable(w) else w

        def mix(good, bad):
            return bad + (bcast(scale, good) if callable(w) and scale.ndim else scale) * (good - bad)

        return jax.tree.map(mix, as_arrays(apply(params, x, t)), as_arrays((weak_apply or apply)(weak, x, t)))

    return apply_guided


def interval(w: float, low: float, high: float, of: str) -> Callable:
    """Guidance `w` only while modality `of` has low < t <= high, 1 elsewhere (Kynkäänniemi et al. 2024).

    >>> w = interval(1.5, 0.2, 0.7, "image")
    >>> [float(w({"image": jnp.float32(t)})) for t in (0.1, 0.5, 0.9)]
    [1.0, 1.5, 1.0]
    """
    _check_weight("interval", w)
    if not 0 <= low < high <= 1:
        raise UserError(f"interval: guidance acts while low < t <= high with 0 <= low < high <= 1, not ({low}, {high}].")
    return lambda t: jnp.where((t[of] > low) & (t[of] <= high), w, 1.0)


def ramp(w: float, of: str) -> Callable:
    """Guidance that grows from none at the prior to `w` at the data: `1 + (w - 1) (1 - t)`, t that of modality `of` (UniDisc).

    >>> [float(ramp(5.0, "text")({"text": jnp.float32(t)})) for t in (0.0, 0.5, 1.0)]
    [5.0, 3.0, 1.0]
    """
    _check_weight("ramp", w)
    return lambda t: 1.0 + (w - 1.0) * (1.0 - t[of])
