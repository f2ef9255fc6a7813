r"""Sampling: a time grid scanned over `process.step`.

Every method is the process's own step on an improved belief x0_hat, so a sampler is a list of **maps** on one `Move`:

    DDIM                      Gaussian(..., eta=0) and no map
    ancestral (DDPM, SDE)     Gaussian(..., eta=1) and no map; the discrete processes always draw
    DPM-Solver++(2M)          dpmpp_2m(schedule)
    Heun                      sample(..., heun=True), for eta=0
    clipping, thresholding    clip(-1, 1), threshold(0.995)
    truncation                top_p(0.9), temperature(0.8)
    confidence unmasking      confidence(process)
    another rule's strides    released_stride(steps, skip)

Conditions are pinned at t = 0 (`given`), ignored modalities at t = 1 (`absent`). Exact strided sampling is a coarser grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import schedules
from mmdiff.errors import UserError
from mmdiff.grids import karras_grid, spaced_grid, uniform_grid
from mmdiff.guidance import autoguided, dropped, guided, head_guided, interval
from mmdiff.processes.aggregate import Aggregate
from mmdiff.processes.base import Process, bcast, concrete, fold
from mmdiff.processes.discrete import sample_classes

__all__ = ["autoguided", "guided", "head_guided", "interval", "karras_grid", "spaced_grid", "uniform_grid"]  # and all that is defined here


@flax.struct.dataclass
class Move:
    """One step about to be taken: from (xt, t) to time s with the belief x0. Maps may change x0, and t and s of the step's posterior.

    `last_x0` and `last_t` are of the step before (last_t = t at first). What the next step will see as `last_x0` is `kept`: maps
    that correct the belief (clipping, truncation) change both, by `corrected`; those that extrapolate it change x0 alone.
    """

    xt: Any
    t: Any
    s: Any
    x0: Any
    last_x0: Any
    last_t: Any
    kept: Any
    keys: Any

    def corrected(self, x0: Any) -> Move:
        return self.replace(x0=x0, kept=x0)


Map = Callable[[Move], Move]


def sample(
    process: Process,
    apply: Callable,
    params: Any,
    keys: jax.Array,
    grid: Any,
    shape: Any,
    given: Mapping[str, jax.Array] | None = None,
    absent: Sequence[str] = (),
    maps: Sequence[Map] = (),
    heun: bool = False,
    history: bool = False,
    start: Any = None,
) -> Any:
    """Draws x_0 by walking the grid from t = 1, or from `start`, to t = 0.

    Args:
      process, apply, params: as in training; `apply` may be `guided(...)`.
      keys: [B] typed keys, one per example. An example's draw depends on its own key alone.
      grid: times [N + 1], decreasing from 1 to 0, or one such array per modality (of one length). It may begin below 1 for what is in
        `start`.
      shape: the shape of one example, `(8, 8, 1)`, or one per modality.
      given: modalities held at t = 0, [B, ...] each; returned bit for bit.
      absent: modalities held at t = 1: the others are drawn without them.
      maps: functions `Move -> Move`, applied in order at every step; `only(name, map)` applies one to a modality.
      heun: average the slopes at both ends of each step (`Process.heun`): second order, 2N - 1 network calls, for the step to t = 0 is
        Euler's. For deterministic Gaussians, and not with a map that extrapolates (`dpmpp_2m`).
      history: return every state on the way, [N + 1, B, ...], from the prior's draw to x_0.
      start: x_t at the grid's first time in place of the prior's draw, [B, ...], or per modality for some of them. Between 0 and 1 there
        is no prior but what the data make of it, `process.corrupt(keys, x0, t).xt`: of an image to be edited (SDEdit), of a draft to be
        refined, of zeros (pure noise, see `karras_grid`).

    Returns x_0 with the structure of `shape`.
    """
    process, given = process.bound(params), dict(given or {})
    joint = isinstance(shape, Mapping)
    if joint:
        unknown = [name for name in (*given, *absent) if name not in shape]
        if unknown:
            raise KeyError(f"sample: no modality {unknown}; there are {sorted(shape)}.")
        # A condition that is not given is absent: it has no way of its own to walk.
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
        if not (steps >= 1 and 0 < g[0] <= 1 and g[-1] == 0 and np.all(np.diff(g) <= 0)):
            raise UserError("sample: a grid of times runs from 1 down to 0 in at least one step; uniform_grid(steps) makes one.")
        if g[0] < 1 and name not in started and name not in given and name not in absent:
            of = "" if name is None else f" of {name!r}"
            raise UserError(
                f"sample: a grid runs from 1 down to 0, but that{of} starts at t = {g[0]:g}, where there is no prior: give x_t there, as "
                "start=process.corrupt(keys, x0, t).xt.")
    count = keys.shape[0]

    def times(i):
        def of(name=None):
            value = (grid[name] if isinstance(grid, Mapping) else grid)[i]
            value = 0.0 if name in given else 1.0 if name in absent else value
            return jnp.full((count,), value, jnp.result_type(float))

        return {name: of(name) for name in shape} if joint else of()

    def belief(xt, t):
        return process.clean(apply(params, *process.inputs(xt, t)), xt, t)

    def refined(move):
        for refine in maps:
            move = refine(move)
        return move

    xt = _prior(process, fold(keys, "prior"), shape, given)
    xt = {**xt, **started} if joint else started.get(None, xt)

    def body(carry, i):
        xt, last_x0, last_t = carry
        t, s, step_keys = times(i), times(i + 1), fold(keys, i)
        x0 = belief(xt, t)
        # Before the first step there is no last one: maps see last_t = t and the same belief.
        first = i == 0
        last_x0 = jax.tree.map(lambda a, b: jnp.where(first, a, b), x0, last_x0)
        last_t = jax.tree.map(lambda a, b: jnp.where(first, a, b), t, last_t)
        move = refined(Move(xt=xt, t=t, s=s, x0=x0, last_x0=last_x0, last_t=last_t, kept=x0, keys=fold(step_keys, "maps")))
        xs = process.step(step_keys, xt, move.x0, move.t, move.s)
        if heun:
            if any(a is not b for a, b in zip(jax.tree.leaves(move.x0), jax.tree.leaves(move.kept))):
                raise UserError("sample: heun and a map that extrapolates the belief (dpmpp_2m) are both second order: use one of them.")

            def corrected(xs):
                x0 = belief(xs, s)
                end = refined(move.replace(xt=xs, t=s, s=s, x0=x0, last_x0=move.kept, last_t=t, kept=x0))
                return process.step(step_keys, xt, process.heun(move.x0, end.x0, move.t, move.s), move.t, move.s)

            # The last step, to t = 0, has no slope at its end: no second call.
            again = [(end > 0).any() & (end < start).any() for start, end in zip(jax.tree.leaves(t), jax.tree.leaves(s))]
            xs = jax.lax.cond(jnp.stack(again).any(), corrected, lambda xs: xs, xs)
        return (xs, move.kept, t), xt if history else None

    last = jax.eval_shape(belief, xt, times(0))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), last)
    (x, _, _), states = jax.lax.scan(body, (xt, zeros, times(0)), jnp.arange(steps))
    return jax.tree.map(lambda before, last: jnp.concatenate([before, last[None]]), states, x) if history else x


def start(process: Process, keys: jax.Array, shape: Any, given: Mapping[str, jax.Array]) -> Any:
    """x at t = 1, a draw from the prior, with the modalities in `given` in place."""
    xt = process.prior(keys, shape)
    if not given:
        return xt
    process.check(given)
    # A condition may be wider than the prior it replaces (features for the null 0 of a `Given`): never narrow it.
    held = {name: jnp.asarray(value) for name, value in given.items()}
    held = {name: value.astype(jnp.promote_types(value.dtype, xt[name].dtype)) for name, value in held.items()}
    return process.begin({name: held.get(name, xt[name]) for name in shape}, tuple(held))


_prior = start  # `sample` has an argument of this name


def _started(process, start, shape, count, held):
    """`start` by modality, of a process that is no joint under the name None."""
    if start is None:
        return {}
    joint = isinstance(shape, Mapping)
    if joint != isinstance(start, Mapping):
        raise UserError(f"sample: start is {'a dict of arrays by modality' if joint else 'one array'} for this process.")
    found = {}
    for name, value in start.items() if joint else [(None, start)]:
        label = "start" if name is None else f"start of {name!r}"
        if joint and (name not in shape or name in held):
            raise UserError(f"sample: {label}: it must be one of {sorted({*shape} - held)}, the modalities that are sampled.")
        value, size = jnp.asarray(value), (count, *(shape[name] if joint else shape))
        if value.shape != size:
            raise UserError(f"sample: {label} has shape {value.shape}; {count} keys and this modality need {size}.")
        states = getattr(process.parts[name] if joint else process, "states", None)
        if states is None:
            value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
            wrong = concrete(value) and not bool(jnp.isfinite(value).all())
        else:
            wrong = not jnp.issubdtype(value.dtype, jnp.integer)
            wrong = wrong or concrete(value) and value.size and not 0 <= int(value.min()) <= int(value.max()) < states
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
    **options: Any,
) -> Callable:
    """The sampler of an `Experiment`: `sampler(params, keys, given, *, steps, guidance, absent=(), history=False, start=None)`.

    Args:
      process, apply, shape: as in `sample`.
      drop, channels: what guidance drops, and the channels that it guides (see `guided`). With guidance 1 the network runs once a step.
      guided_during: (name, low, high): guidance acts only while that modality's time is in (low, high], see `interval`; always by default.
      paths: each modality's own time as a function of the trajectory's, [0, 1] -> [0, 1] with both ends fixed; the identity by
        default. A model trained at independent times may go from (1, ..., 1) to (0, ..., 0) along any path.
      grid: `steps -> (grid, maps)`, the times and what maps they need (see `released_stride`); uniform times by default. With
        `uniform_grid(steps, 0.6)` `start` is x_t at the time that each modality's path makes of 0.6.
      options: go to `sample` (maps, heun).
    """
    maps, drop = tuple(options.pop("maps", ())), dropped(drop, process)
    paths = {name: (paths or {}).get(name, lambda t: t) for name in shape}
    during = _interval_of(guided_during, shape)

    def sampler(params, keys, given, *, steps, guidance, absent=(), history=False, start=None):
        # Guidance has nothing to compare where the condition is absent anyway.
        present = [name for name in drop if name not in absent]
        weight = interval(guidance, *during) if during else guidance
        network = guided(apply, weight, present, process, channels) if present and guidance != 1 else apply
        times, strides = grid(steps)
        times = {name: path(times) for name, path in paths.items()}
        rest = {"maps": (*maps, *strides), "history": history, "start": start, **options}
        return sample(process, network, params, keys, times, shape, given=given, absent=absent, **rest)

    return sampler


def _interval_of(guided_during: tuple[str, float, float] | None, shape: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """(low, high, modality), as `interval` takes them; None without."""
    if guided_during is None:
        return None
    if len(guided_during) != 3 or guided_during[0] not in shape:
        raise UserError(f"guided_during is one of {sorted(shape)} and two of its times, low and high, not {tuple(guided_during)}.")
    name, low, high = guided_during
    interval(1.0, low, high, name)  # refuses times that make no interval
    return low, high, name


# -------------------------------------------------------------------------------------------------------------------- maps


def only(name: str, refine: Map) -> Map:
    """Applies a map to one modality of a joint move."""

    def apply(move: Move) -> Move:
        fields = ("xt", "t", "s", "x0", "last_x0", "last_t", "kept")
        part = refine(Move(keys=fold(move.keys, name), **{field: getattr(move, field)[name] for field in fields}))
        return move.replace(**{field: {**getattr(move, field), name: getattr(part, field)} for field in ("x0", "t", "s", "kept")})

    return apply


def following(process: Aggregate, name: str, refine: Map) -> Map:
    """Applies a map to the belief about a modality that an `Aggregate` (bound) adds; the target's belief follows it, for the same eps_hat.

    By default the belief as it stands, e.g. the mean of E under the probabilities, stands in for a hidden modality. `drawn()` puts a draw
    in its place, which is right as well, and `top_p(0)` the best class, which is biased.
    """

    def apply(move: Move) -> Move:
        part = only(name, refine)(move)
        belief, kept = ({**tree, name: new[name]} for tree, new in ((move.x0, part.x0), (move.kept, part.kept)))
        x0 = process.follow(move.x0, move.t, **{name: belief[name]})
        kept[process.target] = x0[process.target]
        return part.replace(x0=x0, kept=kept)

    return apply


def drawn() -> Map:
    """Replaces probabilities by a class drawn from them."""

    def apply(move):
        classes = jax.vmap(sample_classes)(move.keys, move.x0)
        return move.corrected(jax.nn.one_hot(classes, move.x0.shape[-1]))

    return apply


def _on_data(move: Move, change: Callable) -> Move:
    """The belief changed in the data's channels alone: that of a `LearnedSigma` has the variance's share behind them."""
    size = move.xt.shape[-1] if move.x0.ndim > 1 and move.x0.ndim == move.xt.ndim else None
    changed = change(move.x0[..., :size])
    return move.corrected(changed if changed.shape == move.x0.shape else jnp.concatenate([changed, move.x0[..., size:]], -1))


def clip(low: float, high: float) -> Map:
    """Keeps the belief within the data's range."""
    if not low < high:
        raise UserError(f"clip needs low < high, got ({low}, {high}).")
    return lambda move: _on_data(move, lambda x0: jnp.clip(x0, low, high))


def threshold(quantile: float = 0.995, limit: float = 1.0) -> Map:
    """Dynamic thresholding: rescale an example whose `quantile` of |x0| exceeds `limit` (Saharia et al. 2022)."""

    if not (0 <= quantile <= 1 and 0 < limit < np.inf):
        raise UserError(f"threshold needs a quantile in [0, 1] and a limit > 0, got {quantile} and {limit}.")

    def rescale(x0):
        flat = jnp.abs(x0).reshape(x0.shape[0], -1)
        bound = bcast(jnp.maximum(jnp.quantile(flat, quantile, axis=-1), limit), x0)
        return jnp.clip(x0, -bound, bound) * (limit / bound)

    return lambda move: _on_data(move, rescale)


def dpmpp_2m(schedule: schedules.Schedule) -> Map:
    """DPM-Solver++(2M): extrapolates the belief to the middle of the step, linearly in log-SNR (Lu et al. 2022).

    The first step and the step to t = 0 are first order: there log-SNR is infinite. For `Gaussian(eta=0)`.
    """

    def apply(move):
        now, end, last = (0.5 * schedules.log_snr(schedule, u) for u in (move.t, move.s, move.last_t))
        ahead, behind = end - now, now - last
        usable = jnp.isfinite(ahead) & jnp.isfinite(behind) & (behind > 0)
        weight = jnp.where(usable, 0.5 * ahead / jnp.where(usable, behind, 1.0), 0.0)
        return move.replace(x0=move.x0 + bcast(weight, move.x0) * (move.x0 - move.last_x0))

    return apply


def top_p(p: float) -> Map:
    """Keeps the smallest set of classes whose probability reaches p (the best one always), renormalised."""
    if not 0 <= p <= 1:
        raise UserError(f"top_p is a probability in [0, 1] (1 keeps every class), got {p}.")

    def apply(move):
        if p == 1:
            return move
        # A class is kept if the mass of strictly better ones is below p. What divides the classes is found by bisection over the bits of
        # the probabilities, which are ordered as these are: exact, and several times faster than sorting.
        bits = jax.lax.bitcast_convert_type(move.x0.astype(jnp.float32), jnp.int32)

        def halve(_, bounds):
            low, high = bounds
            middle = low + (high - low) // 2
            enough = jnp.where(bits > middle, move.x0, 0.0).sum(-1, keepdims=True, dtype=jnp.float32) >= max(p, 1e-9)
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        best = bits.max(-1, keepdims=True)
        low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(best, -1), best))
        probs = jnp.where(bits > low, move.x0, 0.0)
        return move.corrected(probs / probs.sum(-1, keepdims=True))

    return apply


def temperature(value: float) -> Map:
    """Sharpens (value < 1) or flattens a belief: probabilities to the power 1 / value, renormalised. 0 leaves the best class alone."""
    if not 0 <= value < np.inf:
        raise UserError(f"temperature must be a finite number >= 0 (0 takes the best class, 1 changes nothing), got {value}.")
    if value == 0:
        return lambda move: move.corrected(jax.nn.one_hot(move.x0.argmax(-1), move.x0.shape[-1]))

    def apply(move):
        relative = move.x0 / jnp.maximum(move.x0.max(-1, keepdims=True), 1e-30)  # the best class is 1: no underflow to 0 / 0
        powered = jnp.where(relative > 0, relative ** (1.0 / value), 0.0)
        return move.corrected(powered / powered.sum(-1, keepdims=True))

    return apply


def confidence(process, noise: float = 0.0) -> Map:
    """Unmasks the most certain tokens first instead of random ones, as many per step as the schedule asks for.

    A chosen token moves to time 0, every other masked one stays at t: time may differ per token, so this too is a map on the move.
    Certainty is log max_k x0[k], plus `noise` times Gumbel noise (MaskGIT's temperature; VQ-Diffusion's purity). For `absorbing` and
    `MaskReplace`, whose unmasked tokens take their ordinary step.
    """

    mask = process.mask  # refused by a chain that has none
    if not 0 <= noise < np.inf:
        raise UserError(f"confidence: the noise must be a finite number >= 0, got {noise}.")

    def apply(move):
        count, size = move.xt.shape[0], max(1, move.xt.size // move.xt.shape[0])
        sure = jnp.log(jnp.maximum(move.x0.max(-1), 1e-30)).reshape(count, size)
        if noise:
            sure = sure + noise * jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(move.keys)
        hidden = move.xt.reshape(count, size) == mask
        sure = jnp.where(hidden, sure, jnp.inf)
        rank = jnp.argsort(jnp.argsort(-sure, axis=-1), axis=-1)
        # At s = 0 no share is masked: everything is revealed.
        masked = jnp.floor(process.masked(move.s) * size + 1e-4)
        reveal = rank < size - masked[:, None]
        s = jnp.where(hidden, jnp.where(reveal, 0.0, move.t[:, None]), move.s[:, None])
        return move.replace(s=s.reshape(move.xt.shape))

    return apply


def released_stride(steps: int, skip: int) -> tuple[jax.Array, Map]:
    """The strided walk of the released VQ-Diffusion and CDCD code, for comparison: a grid and its map, `sample(..., grid, maps=[stride])`.

    The network is called at every (skip + 1)-th of T = `steps` times and at 1 / T, but a step takes the posterior of one step of the
    chain, from s + 1/T to s (before the last call from t to t - 1/T). So masks stay longer than they should: with T = 100 and skip 9
    the last call finds 66 % of them. The exact walk is a coarser grid.
    """
    if not 0 <= skip < steps:
        raise UserError(f"released_stride needs 0 <= skip < steps, got skip {skip} of {steps} steps.")
    calls = sorted({*range(steps, 0, -skip - 1), 1}, reverse=True)  # t T

    def stride(move):
        place = jnp.round(move.t * steps)
        near = place <= skip + 1
        t, s = jnp.where(near, move.t, move.s + 1.0 / steps), jnp.where(near, (place - 1.0) / steps, move.s)
        moves = move.s < move.t
        return move.replace(t=jnp.where(moves, t, move.t), s=jnp.where(moves, s, move.s))

    return jnp.asarray([*calls, 0], jnp.float32) / steps, stride
