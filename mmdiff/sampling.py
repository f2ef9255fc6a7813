r"""Sampling: a time grid scanned over `process.step`.

Every method is the process's own step on an improved belief x0_hat, so a sampler is a list of **transforms** on one `SamplerState`:

    DDIM                      Gaussian(..., eta=0) and no transform
    ancestral (DDPM, SDE)     Gaussian(..., eta=1) and no transform; discrete processes always sample
    DPM-Solver++(2M)          dpmpp_2m(schedule)
    UniPC                     unipc(process), third order at one call a step
    Heun                      sample(..., heun=True), for eta=0
    clipping, thresholding    clip(-1, 1), threshold(0.995)
    truncation                top_p(0.9), temperature(0.8)
    confidence unmasking      confidence(process)
    first hitting             first_hitting(process) on hitting_grid(process, keys, tokens): exact, a call a token
    remasking                 absorbing(..., eta=0.5)
    another rule's strides    released_stride(steps, skip)
    average velocities        sample(..., jumps=("image",)) on staircase(steps, ("label", "image"))

Conditions are pinned at t = 0 (`given`), ignored modalities at t = 1 (`absent`). Exact strided sampling is a coarser grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.average_velocity import check_average
from mmdiff.errors import UserError
from mmdiff.grids import hitting_grid, karras_grid, settled_at, spaced_grid, staircase, uniform_grid
from mmdiff.guidance import at_one_time, autoguided, dropped, guided, guided_each, head_guided, interval, projected, ramp, sharing
from mmdiff.processes.base import Process, concrete, fold
from mmdiff.processes.discrete import Discrete
from mmdiff.spans import end_of
from mmdiff.transforms import (
    SamplerState,
    Transform,
    clip,
    confidence,
    dpmpp_2m,
    first_hitting,
    following,
    only,
    released_stride,
    sampled,
    temperature,
    threshold,
    top_p,
    unipc,
)

__all__ = [
    "SamplerState", "Transform", "autoguided", "clip", "confidence", "dpmpp_2m", "first_hitting", "following", "guided", "head_guided",
    "hitting_grid", "interval", "karras_grid", "make_sampler", "only", "projected", "ramp", "released_stride", "sample", "sample_prior",
    "sampled", "settled_at", "spaced_grid", "staircase", "temperature", "threshold", "top_p", "uniform_grid", "unipc",
]


def sample(
    process: Process,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    grid: Any,
    shape: Any,
    given: Mapping[str, jax.Array] | None = None,
    absent: Sequence[str] = (),
    transforms: Sequence[Transform] = (),
    heun: bool = False,
    history: bool = False,
    start: Any = None,
    jumps: Sequence[str] = (),
) -> Any:
    """Samples x_0 by following the grid from t = 1, or from `start`, to t = 0.

    Args:
      process, apply, params: as in training; `apply` may be `guided(...)`.
      keys: [B] typed keys, one per example. An example's sample depends on its own key alone.
      grid: times [N + 1], decreasing from 1 to 0, or one such array per modality (of one length); [N + 1, B] where examples differ. It may
        begin below 1 for what is in `start`.
      shape: the shape of one example, `(8, 8, 1)`, or one per modality.
      given: modalities pinned at t = 0, [B, ...] each; returned bit for bit.
      absent: modalities pinned at t = 1: the others are sampled without them.
      transforms: functions `SamplerState -> SamplerState`, applied in order at every step; `only(name, transform)` is one of a modality.
      heun: average the slopes at both ends of each step (`Process.heun`): second order, 2N - 1 network calls, for the step to t = 0 is
        Euler's. For deterministic Gaussians, and not with a transform that extrapolates (`dpmpp_2m`, `unipc`).
      history: return every state on the way, [N + 1, B, ...], from the prior's sample to x_0.
      start: x_t at the grid's first time in place of the prior's sample, [B, ...], or per modality for some of them. Between 0 and 1 there
        is no prior but what the data make of it, `process.corrupt(keys, x0, t).xt`: of an image to be edited (SDEdit), of a draft to be
        refined, of zeros (pure noise, see `karras_grid`).
      jumps: modalities of which the network, trained with `losses.averaged`, is told where each step ends: one call takes a step of any
        length. Not with heun or a transform that extrapolates, which are for velocities at a time.

    Returns x_0 with the structure of `shape`.

    >>> from mmdiff.processes import Joint, absorbing
    >>> process = Joint(label=absorbing(10), hour=absorbing(24))
    >>> net = lambda params, x, t: {"label": jnp.zeros((*x["label"].shape, 10)), "hour": jnp.zeros((*x["hour"].shape, 24))}
    >>> keys, shape = jax.random.split(jax.random.key(0), 3), {"label": (), "hour": ()}
    >>> x = sample(process, net, None, keys, uniform_grid(5), shape, given={"label": jnp.full(3, 7)})
    >>> x["label"].tolist(), bool((x["hour"] < 24).all())
    ([7, 7, 7], True)
    """
    process, given = process.bind(params), dict(given or {})
    joint = isinstance(shape, Mapping)
    if joint:
        unknown = [name for name in (*given, *absent) if name not in shape]
        if unknown:
            raise KeyError(f"sample: no modality {unknown}; there are {sorted(shape)}.")
        # A condition that is not given is absent: it has no trajectory of its own.
        absent = {*absent, *(name for name in process.conditions if name not in given)}
        twice = [name for name in given if name in absent]
        if twice:
            raise ValueError(f"sample: {twice} cannot be both given and absent.")
        for name, value in given.items():
            if jnp.shape(value) != (keys.shape[0], *shape[name]):
                raise ValueError(
                    f"sample: given {name!r} has shape {jnp.shape(value)}, but {keys.shape[0]} keys and examples of {shape[name]} "
                    f"need {(keys.shape[0], *shape[name])}."
                )
    elif given or absent:
        raise ValueError("sample: `given` and `absent` name modalities of a Joint; this process has only one.")
    if jumps and (heun or isinstance(jumps, str)):
        raise UserError(f"sample: jumps={jumps!r} must be several names, and without heun: both say what a step's velocity is.")
    for name in jumps:
        check_average(process, name)
    started = _started(process, start, shape, keys.shape[0], {*given, *absent})
    if isinstance(grid, Mapping) and (not joint or {*grid} < {*shape}):
        raise UserError(f"sample: grids of {sorted(grid)} do not fit {sorted(shape) if joint else 'one array'}: every modality needs one.")
    grid = jax.tree.map(jnp.asarray, dict(grid)) if isinstance(grid, Mapping) else jnp.asarray(grid)
    lengths = {len(g) for g in (grid.values() if isinstance(grid, Mapping) else [grid])}
    if len(lengths) > 1:
        raise ValueError(f"sample: grids of different lengths, {sorted(lengths)}; one step moves every modality.")
    steps = lengths.pop() - 1
    for name in shape if joint else (None,):
        g = grid[name] if isinstance(grid, Mapping) else grid
        if not concrete(g):
            continue
        g = np.asarray(g)
        if g.ndim > 1 and g.shape[1:] != (keys.shape[0],):
            raise UserError(f"sample: a grid of shape {g.shape} does not fit {keys.shape[0]} keys: it is [N + 1] or [N + 1, keys].")
        if not (steps >= 1 and np.all((0 < g[0]) & (g[0] <= 1) & (g[-1] == 0)) and np.all(np.diff(g, axis=0) <= 0)):
            raise UserError("sample: a grid of times runs from 1 down to 0 in at least one step; uniform_grid(steps) makes one.")
        if g[0].min() < 1 and name not in started and name not in given and name not in absent:
            of = "" if name is None else f" of {name!r}"
            raise UserError(
                f"sample: a grid runs from 1 down to 0, but that{of} starts at t = {g[0].min():g}, where there is no prior: give x_t "
                "there, as start=process.corrupt(keys, x0, t).xt.")
    count = keys.shape[0]

    def times(i):
        def of(name=None):
            value = (grid[name] if isinstance(grid, Mapping) else grid)[i]
            value = 0.0 if name in given else 1.0 if name in absent else value
            return jnp.full((count,), value, jnp.result_type(float))

        return {name: of(name) for name in shape} if joint else of()

    def belief(xt, t, s):
        fed = {**t, **{end_of(name): s[name] for name in jumps}} if jumps else t
        return process.clean(apply(params, *process.inputs(xt, fed)), xt, t)

    def refined(state):
        for transform in transforms:
            state = transform(state)
        return state

    xt = sample_prior(process, fold(keys, "prior"), shape, given)
    xt = {**xt, **started} if joint else started.get(None, xt)

    def body(carry, i):
        xt, last, earlier = carry
        t, s, step_keys = times(i), times(i + 1), fold(keys, i)
        x0 = belief(xt, t, s)
        # Before the first step there is no last one: transforms see last_t = t and the same belief.
        last = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), (x0, t, xt), last)
        earlier = jax.tree.map(lambda a, b: jnp.where(i <= 1, a, b), last[:2], earlier)
        own = fold(step_keys, "maps")
        past = {"last_x0": last[0], "last_t": last[1], "last_xt": last[2], "earlier_x0": earlier[0], "earlier_t": earlier[1]}
        state = refined(SamplerState(xt=xt, t=t, s=s, x0=x0, x0_for_history=x0, keys=own, **past))
        xt = state.xt
        xs = process.step(step_keys, xt, state.x0, state.t, state.s)
        if any(state.x0[name] is not state.x0_for_history[name] for name in jumps):
            raise UserError("sample: jumps and a transform that extrapolates (dpmpp_2m, unipc) do not go together: use one of them.")
        if heun:
            if any(a is not b for a, b in zip(jax.tree.leaves(state.x0), jax.tree.leaves(state.x0_for_history))):
                raise UserError("sample: heun and a transform that extrapolates (dpmpp_2m, unipc) are both solvers: use one of them.")

            def corrected(xs):
                x0 = belief(xs, s, s)
                end = refined(state.replace(xt=xs, t=s, s=s, x0=x0, last_x0=state.x0_for_history, last_t=t, x0_for_history=x0))
                return process.step(step_keys, xt, process.heun(state.x0, end.x0, state.t, state.s), state.t, state.s)

            # The last step, to t = 0, has no slope at its end: no second call.
            again = [(end > 0).any() & (end < start).any() for start, end in zip(jax.tree.leaves(t), jax.tree.leaves(s))]
            xs = jax.lax.cond(jnp.stack(again).any(), corrected, lambda xs: xs, xs)
        return (xs, (state.x0_for_history, t, xt), last[:2]), xt if history else None

    last = jax.eval_shape(belief, xt, times(0), times(0))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), last)
    (x, _, _), states = jax.lax.scan(body, (xt, (zeros, times(0), xt), (zeros, times(0))), jnp.arange(steps))
    return jax.tree.map(lambda before, last: jnp.concatenate([before, last[None]]), states, x) if history else x


def sample_prior(process: Process, keys: jax.Array, shape: Any, given: Mapping[str, jax.Array]) -> Any:
    """x at t = 1, a sample of the prior, with the modalities in `given` in place."""
    xt = process.prior(keys, shape)
    if not given:
        return xt
    process.check(given)
    # A condition may be wider than the prior it replaces (features for the null 0 of a `Given`): never narrow it.
    pinned = {name: jnp.asarray(value) for name, value in given.items()}
    pinned = {name: value.astype(jnp.promote_types(value.dtype, xt[name].dtype)) for name, value in pinned.items()}
    return process.condition_prior({name: pinned.get(name, xt[name]) for name in shape}, tuple(pinned))


def _started(process, start, shape, count, pinned):
    """`start` by modality, of a process that is no joint under the name None."""
    if start is None:
        return {}
    joint = isinstance(shape, Mapping)
    if joint != isinstance(start, Mapping):
        raise UserError(f"sample: start is {'a dict of arrays by modality' if joint else 'one array'} for this process.")
    found = {}
    for name, value in start.items() if joint else [(None, start)]:
        label = "start" if name is None else f"start of {name!r}"
        if joint and (name not in shape or name in pinned):
            raise UserError(f"sample: {label}: it must be one of {sorted({*shape} - pinned)}, the modalities that are sampled.")
        known = np.asarray(value) if concrete(value) else None  # under jit what jnp makes of constants is traced
        value, size = jnp.asarray(value), (count, *(shape[name] if joint else shape))
        if value.shape != size:
            raise UserError(f"sample: {label} has shape {value.shape}; {count} keys and this modality need {size}.")
        states = getattr(process.parts[name] if joint else process, "states", None)
        if states is None:
            value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
            wrong = known is not None and not np.isfinite(known).all()
        else:
            wrong = not jnp.issubdtype(value.dtype, jnp.integer)
            wrong = wrong or known is not None and known.size and not 0 <= known.min() <= known.max() < states
        if wrong:
            raise UserError(f"sample: {label} must hold {'finite numbers' if states is None else f'integers in 0..{states - 1}'}.")
        found[name] = value if states is None else value.astype(jnp.int32)
    return found


def make_sampler(
    process: Process,
    apply: Callable,
    shape: Mapping[str, Any],
    drop: Sequence[str] = (),
    paths: Mapping[str, Callable] | None = None,
    grid: Callable = lambda steps: (uniform_grid(steps), ()),
    channels: Mapping[str, int] | None = None,
    guided_during: tuple[str, float, float] | None = None,
    each: Sequence[str] | Mapping[str, Callable] = (),
    combine: Callable | None = None,
    order: Sequence[str] = (),
    hitting: str | None = None,
    shared: Sequence[Sequence[str]] = (),
    **options: Any,
) -> Callable:
    """The sampler of an `Experiment`: `sampler(params, keys, given, *, steps, guidance, absent=(), history=False, start=None)`.

    Args:
      process, apply, shape: as in `sample`.
      drop, channels: what guidance drops, and the channels that it guides (see `guided`). With guidance 1 the network runs once a step.
      each: what is guided by all other modalities, in place of `drop`, as far as it is sampled: `("image", "text")`. A mapping says by
        which weight, a function of `guidance`: `{"image": lambda w: w, "text": lambda w: ramp(w, "text")}`.
      combine: what is followed of the beliefs, `projected(eta, radius)` for instance, see `guided`.
      guided_during: (name, low, high): guidance acts only while that modality's time is in (low, high], see `interval`; always by default.
      paths: each modality's own time as a function of the trajectory's, [0, 1] -> [0, 1] with both ends fixed; the identity by
        default. A model trained at independent times may go from (1, ..., 1) to (0, ..., 0) along any path.
      grid: `steps -> (grid, transforms)`, the times and what transforms they need (see `released_stride`); uniform times by default. With
        `uniform_grid(steps, 0.6)` `start` is x_t at the time that each modality's path makes of 0.6.
      order: modalities that move one after the other, on a `staircase`, in place of paths and a grid. Those that are given or absent take
        no steps.
      hitting: a modality of an absorbing chain, sampled by `first_hitting` on its `hitting_grid` unless it is given or absent: `steps` must
        then be the number of its tokens. Not with `order`.
      shared: groups of modalities that have one time, [("image", "vision")]: those of a group are given, absent or sampled together, on one
        path, and do not guide each other.
      options: go to `sample` (transforms, heun, jumps).
    """
    transforms, drop = tuple(options.pop("transforms", ())), dropped(drop, process)
    paths = dict.fromkeys(shape, lambda t: t) | {name: path for name, path in (paths or {}).items() if name in shape}
    during = _interval_of(guided_during, shape)
    own = dict(each) if isinstance(each, Mapping) else {name: lambda w: w for name in guided_each(each, process)}
    guided_each(tuple(own), process)

    def network(keys, given, absent, guidance):
        def weight(w):
            return w if callable(w) or not during or w == 1 else interval(w, *during)

        # Guidance has nothing to compare where the condition is absent anyway.
        absent = {*absent, *(name for name in process.conditions if name not in given)}
        if guidance == 1:
            return apply
        if not own:
            return guided(apply, weight(guidance), [name for name in drop if name not in absent], process, channels, combine=combine)
        guiding = {name: {*shape} - {*at_one_time(name, shared), *absent} for name in own}
        weights = {name: weight(of(guidance)) for name, of in own.items() if name not in {*given, *absent} and guiding[name]}
        prior = process.prior(fold(keys, "absent"), shape)
        return guided(apply, weights, (), process, channels, each=tuple(weights), prior=prior, combine=combine, shared=shared)

    learnt = {name for name in shape if process.parts[name].learnt}
    if order and {*order} != learnt or hitting is not None and not isinstance(process.parts.get(hitting), Discrete):
        raise UserError(
            f"make_sampler: order has all of {sorted(learnt)}, and hitting is a discrete one, not {tuple(order)} and {hitting!r}.")
    if order and hitting is not None:
        raise UserError(f"make_sampler: first hitting moves {hitting!r} beside the others, at its own times: leave order or hitting out.")
    unmasking = () if hitting is None else (only(hitting, first_hitting(process.parts[hitting])),)

    shared = sharing(shared, process)
    for names in shared:
        if order or hitting in names or len({paths[name] for name in names}) > 1:
            raise UserError(
                f"make_sampler: {' and '.join(names)} have one time: they need one path, the same function, and neither order nor hitting.")

    def sampler(params, keys, given, *, steps, guidance, absent=(), history=False, start=None):
        for what, pinned in ("given", given or {}), ("absent", absent):
            _check_shared(shared, what, pinned)
        moving = [name for name in order if name not in (given or {}) and name not in absent]
        times, strides = (staircase(steps, moving), ()) if moving else grid(steps)
        times = {name: times.get(name, uniform_grid(steps)) if moving else path(times) for name, path in paths.items()}
        if hitting is not None and hitting not in (given or {}) and hitting not in absent:
            times[hitting], start = _hitting(process.parts[hitting], hitting, keys, shape[hitting], steps, start)
            strides = (*strides, *unmasking)
        rest = {"transforms": (*transforms, *strides), "history": history, "start": start, **options}
        return sample(process, network(keys, given or {}, absent, guidance), params, keys, times, shape, given=given, absent=absent, **rest)

    return sampler


def _check_shared(shared, what, pinned):
    """Raises UserError if of modalities that have one time some are pinned and others not."""
    for names in shared:
        some = [name for name in names if name in pinned]
        if 0 < len(some) < len(names):
            raise UserError(
                f"{' and '.join(names)} have one time, and {', '.join(some)} alone cannot be {what}: give, leave out or sample them all.")


def _hitting(part, name, keys, shape, steps, start):
    """The grid of a modality that is sampled by first hitting, and `start` with its masks."""
    tokens = math.prod(shape)
    if steps != tokens or name in (start or {}):
        raise UserError(f"first hitting of {name!r} begins with all its {tokens} tokens masked and takes a step for each, not {steps}.")
    masks = jnp.full((keys.shape[0], *shape), part.mask)
    return hitting_grid(part, fold(keys, name), tokens), {**(start or {}), name: masks}


def _interval_of(guided_during: tuple[str, float, float] | None, shape: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """(low, high, modality), as `interval` takes them; None without."""
    if guided_during is None:
        return None
    if len(guided_during) != 3 or guided_during[0] not in shape:
        raise UserError(f"guided_during is one of {sorted(shape)} and two of its times, low and high, not {tuple(guided_during)}.")
    name, low, high = guided_during
    interval(1.0, low, high, name)  # refuses times that make no interval
    return low, high, name
