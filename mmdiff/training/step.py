"""One training step as a pure function `(state, batch) -> (state, metrics)`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss
from mmdiff.training import power_ema
from mmdiff.training.accumulation import float32, make_gradient

Metrics = Mapping[str, jax.Array]
Step = Callable[["State", Mapping[str, jax.Array]], tuple["State", Metrics]]

# Steps that are handed to the device before the host waits for the first of them. Enough that the device never waits for
# Python, few enough that a run that is asked to stop has saved itself within a scheduler's grace period.
IN_FLIGHT = 4


@flax.struct.dataclass
class State:
    """Everything that training changes; a pytree of arrays.

    Attributes:
      step: int32 [], the number of steps taken, skipped ones included; step * global_batch is the data position.
      params: the weights.
      opt: the optimizer's state.
      ema: the running average of `params`, float32.
      key: a typed key that never changes: step i uses fold_in(key, i).
      stats: {"skipped": int32 []}, the steps that were skipped because a number was not finite, under "loss" the loss's own state, if it
        has one (`BatchLoss.init`), and under "averages" those of `power_ema`, if it tracks some: {width: as ema}.
    """

    step: jax.Array
    params: Any
    opt: Any
    ema: Any
    key: jax.Array
    stats: dict[str, Any]


def init_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, key: jax.Array, loss: Callable | None = None,
    widths: Sequence[float] = (),
) -> State:
    """The state before the first step; pure, so that it can be jitted onto a mesh.

    Args:
      init: `key -> params`, float32.
      optimizer: the gradient transformation whose state is initialised.
      key: a typed key; one half initialises the weights, the other drives the steps.
      loss: the loss of the steps to come, whose own state this one holds.
      widths: of the averages that the steps also track, for others to be made of them after training (see `power_ema`).
    """
    init_key, step_key = jax.random.split(key)
    params = init(init_key)
    learned = None if loss is None else BatchLoss.of(loss).init(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
            where = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            raise UserError(
                f"the parameter {where} is {leaf.dtype}, but parameters are kept and updated in float32: initialise it so, and give "
                f"{leaf.dtype} to the network's dtype, in which it computes.")
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=optimizer.init(params),
        ema=float32(params),
        key=step_key,
        stats={"skipped": jnp.zeros((), jnp.int32)} | ({} if learned is None else {"loss": learned})
        | ({"averages": power_ema.init(params, widths)} if widths else {}),
    )


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    ema: float = 0.999,
    microbatches: int = 1,
    noise_scale: bool = False,
    norm_groups: Sequence[tuple[str, str]] = (),
) -> Step:
    """Makes the step of a loss and an optimizer. The step is pure and not jitted: sharding is applied from outside.

    With g = (1/m) sum_j grad loss(params, batch_j, fold_in(key, step)) over m micro-batches, in float32:

        params' = params + optimizer(g),   ema' = d ema + (1 - d) params',   d = min(ema, (1 + step) / (10 + step)).

    A step whose loss, gradient norm or result (params', numbers of the optimizer's own, the loss's state) is not finite leaves params,
    opt, ema and the loss's state as they were, bit for bit, and adds one to stats["skipped"].

    Args:
      loss: `(params, batch, key) -> (scalar, metrics)`, a mean over the batch of what each example gives on its own, or a `BatchLoss`
        that says how it compares them and what state it has (see `microbatches`). Every micro-batch gets the same key, so examples must
        take their randomness from their index (as `losses.diffusion` does).
      optimizer: what turns gradients into updates, clipping and the learning rate's schedule included. It may take the loss, `value`.
      ema: the decay that the average's warm-up ends at.
      microbatches: m; the batch is split in m, which costs time and saves memory.
      noise_scale: adds the metrics "noise_scale/trace" and "noise_scale/grad_sq", whose averages `noise_scale_of` divides; m >= 2, and
        a loss that compares no examples: its gradients would not be independent.
      norm_groups: pairs of a name and a regular expression that adds "grad_norm/<name>" and "param_norm/<name>". A parameter
        belongs to the first group whose expression is found in its path, or else to "other": the squares add up to the total's.

    Returns:
      A step whose metrics are the loss's own and "loss", "grad_norm" (before clipping), "param_norm" (of params', not finite if what
      goes with them is not) and "skipped" (0 or 1), float32 scalars.
    """
    if noise_scale and microbatches < 2:
        raise UserError("the gradient noise scale compares micro-batches: set config.train.microbatches to 2 or more.")
    for name, pattern in norm_groups:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.train.norm_groups: {pattern!r}, the group {name!r}, is no regular expression ({error}).") from error
    loss = BatchLoss.of(loss)
    gradient = make_gradient(loss, microbatches, noise_scale)
    takes_value = optax.with_extra_args_support(optimizer)  # the loss, for rates that follow it

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        learned = state.stats.get("loss")
        if learned is None and jax.eval_shape(loss.init, state.params) is not None:
            raise UserError("the loss has a state of its own, which this state does not hold: give it to init_state, too, loss=...")
        (value, metrics, grads), seen = gradient(state.params, batch, key, learned, state.ema)
        grad_norm = optax.tree.norm(grads)
        if noise_scale:
            metrics = _noise_moments(metrics, grad_norm**2, len(jax.tree.leaves(batch)[0]), microbatches)
        old = state.params, state.opt, state.ema, learned, state.stats.get("averages", {})

        def update(params, opt, average, learned, averages):
            updates, opt = takes_value.update(grads, opt, params, value=value)
            params = optax.apply_updates(params, updates)
            decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32), average, params)
            taken = state.step + 1 - state.stats["skipped"]
            return params, opt, average, loss.update(learned, seen), power_ema.update(averages, params, taken)

        new = update(*old)
        param_norm = _guarded_norm(new, old)  # a norm is finite only if every number is
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        params, opt, average, learned, averages = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt=opt,
            ema=average,
            stats={"skipped": state.stats["skipped"] + ~finite} | ({} if learned is None else {"loss": learned})
            | ({"averages": averages} if averages else {}),
        )
        return state, {
            **metrics,
            "loss": value,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            **_norms("grad_norm", grads, norm_groups),
            **_norms("param_norm", state.params, norm_groups),
            "skipped": (~finite).astype(jnp.float32),
        }

    return step


def step_of(experiment: Any, options: Mapping[str, Any]) -> Step:
    """The step of an experiment as config.train asks for it: ema, microbatches and, if there, noise_scale and norm_groups."""
    return make_step(
        experiment.loss,
        experiment.optimizer,
        ema=options["ema"],
        microbatches=options["microbatches"],
        noise_scale=options.get("noise_scale", False),
        norm_groups=options.get("norm_groups", ()),
    )


def checked(experiment: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch, unless its data would be silently taken for something else (a class id out of range): then UserError."""
    try:
        experiment.process.check(batch)
        BatchLoss.of(experiment.loss).check(batch)  # of processes that are trained with it
    except ValueError as error:
        raise UserError(f"the training data does not fit the process: {error}") from error
    return batch


def noise_scale_of(metrics: Mapping[str, float]) -> float:
    """The gradient noise scale in examples, `tr(Sigma) / |G|^2`, from "noise_scale/trace" and "noise_scale/grad_sq".

    Sigma is the covariance of one example's gradient, G the true gradient: where the batch is well below their ratio, doubling it
    nearly halves the steps. Both moments are unbiased, their ratio is not: average them over many steps *before* dividing. NaN if the
    average of "grad_sq", which noise can make negative, is not positive. Source: McCandlish et al. 2018, appendix A.1.
    """
    trace, grad_sq = metrics["noise_scale/trace"], metrics["noise_scale/grad_sq"]
    return trace / grad_sq if grad_sq > 0 else float("nan")


def _guarded_norm(new: Any, old: Any) -> jax.Array:
    """The norm of the new parameters; not finite if a new number of the optimizer's or the loss's own is not that was before.

    (Some are infinite on purpose: the best loss before the first.) What an optimizer keeps of each parameter, its moments, is not read,
    which would cost a pass over them: they are sums of what the gradient's norm has tested, and one that is not finite makes the next
    update so, which is skipped.
    """
    (params, opt, _, learned, _), (_, opt_before, _, learned_before, _) = new, old  # an average of finite numbers is finite
    total, moments = jnp.zeros(()), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += jnp.sum(jnp.abs(leaf.astype(jnp.float32)) ** 2)
        moments.add((_names(path), leaf.shape))
    rest = jax.tree_util.tree_leaves_with_path((opt, learned))
    for (path, leaf), before in zip(rest, jax.tree.leaves((opt_before, learned_before)), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (_names(path), leaf.shape) not in moments:
            total += jnp.sum(jnp.where(jnp.isfinite(before), leaf - leaf, 0).astype(jnp.float32))  # 0 or NaN
    return jnp.sqrt(total)


def _names(path: tuple) -> tuple:
    """The keys at the end of a path: those of a parameter, in params and in what an optimizer keeps of it."""
    keys = [getattr(entry, "key", None) for entry in path]
    start = max((i + 1 for i, key in enumerate(keys) if key is None), default=0)
    return tuple(keys[start:])


def _noise_moments(metrics: dict, whole_sq: jax.Array, size: int, parts: int) -> dict:
    """The moments from E|G_b|^2 = |G|^2 + tr(Sigma) / b, for the micro-batches (b = size / parts) and the batch (b = size)."""
    part_sq, small = metrics.pop("noise_scale/part_sq"), size / parts
    return {
        **metrics,
        "noise_scale/trace": (part_sq - whole_sq) / (1 / small - 1 / size),
        "noise_scale/grad_sq": (size * whole_sq - small * part_sq) / (size - small),
    }


def _norms(kind: str, tree: Any, groups: Sequence[tuple[str, str]]) -> dict[str, jax.Array]:
    members: dict[str, list] = {name: [] for name, _ in groups}
    if not groups:
        return {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        name = next((name for name, pattern in groups if re.search(pattern, path)), "other")
        members.setdefault(name, []).append(leaf)
    return {f"{kind}/{name}": jnp.sqrt(_squares(leaves)) for name, leaves in members.items()}


def _squares(tree: Any) -> jax.Array:
    return optax.tree.norm(float32(tree), squared=True)
