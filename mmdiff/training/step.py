"""One training step as a pure function `(state, batch) -> (state, metrics)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmdiff.errors import UserError

Metrics = Mapping[str, jax.Array]
Step = Callable[["State", Mapping[str, jax.Array]], tuple["State", Metrics]]


@flax.struct.dataclass
class State:
    """Everything that training changes; a pytree of arrays.

    Attributes:
      step: int32 [], the number of steps taken, skipped ones included; step * global_batch is the data position.
      params: the weights.
      opt: the optimizer's state.
      ema: the running average of `params`, float32.
      key: a typed key that never changes: step i draws from fold_in(key, i).
      stats: counters, {"skipped": int32 []}: the steps that a non-finite loss or gradient made void.
    """

    step: jax.Array
    params: Any
    opt: Any
    ema: Any
    key: jax.Array
    stats: dict[str, jax.Array]


def init_state(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before the first step; pure, so that it can be jitted onto a mesh.

    Args:
      init: `key -> params`.
      optimizer: the gradient transformation whose state is initialised.
      key: a typed key; one half initialises the weights, the other drives the steps.
    """
    init_key, step_key = jax.random.split(key)
    params = init(init_key)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=optimizer.init(params),
        ema=_float32(params),
        key=step_key,
        stats={"skipped": jnp.zeros((), jnp.int32)},
    )


def make_step(loss: Callable, optimizer: optax.GradientTransformation, *, ema: float = 0.999, microbatches: int = 1) -> Step:
    """Makes the step of a loss and an optimizer. The step is pure and not jitted: sharding is applied from outside.

    With g = (1/m) sum_j grad loss(params, batch_j, fold_in(key, step)) over m micro-batches, in float32:

        params' = params + optimizer(g),   ema' = d ema + (1 - d) params',   d = min(ema, (1 + step) / (10 + step)).

    A non-finite loss or gradient norm leaves params, opt and ema as they were, bit for bit, and adds one to stats["skipped"].

    Args:
      loss: `(params, batch, key) -> (scalar, metrics)`, a mean over the batch. Every micro-batch gets the same key, so
        examples must take their randomness from their index (as `losses.diffusion` does).
      optimizer: what turns gradients into updates, clipping and the learning rate's schedule included.
      ema: the decay that the average's warm-up ends at.
      microbatches: m; the batch is split in m, which costs time and saves memory.

    Returns:
      A step whose metrics are the loss's own and "loss", "grad_norm" (before clipping), "param_norm" and "skipped" (0 or 1),
      float32 scalars.
    """

    def evaluate(params, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return _float32((value, metrics, grads))

    def accumulate(params, batch, key):
        if microbatches == 1:
            return evaluate(params, batch, key)
        parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
        shapes = jax.eval_shape(evaluate, params, jax.tree.map(lambda x: x[0], parts), key)

        def add(total, part):
            return jax.tree.map(jnp.add, total, evaluate(params, part, key)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        return jax.tree.map(lambda x: x / microbatches, total)

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        value, metrics, grads = accumulate(state.params, batch, key)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)  # the norm is finite only if every gradient is

        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32), state.ema, params)

        # A select, not a branch: it fuses with the update, and the step stays one straight program on every device.
        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        state = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            opt=keep(opt, state.opt),
            ema=keep(average, state.ema),
            stats={"skipped": state.stats["skipped"] + ~finite},
        )
        return state, {
            **metrics,
            "loss": value,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(_float32(state.params)),
            "skipped": (~finite).astype(jnp.float32),
        }

    return step


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B/parts, ...], micro-batch j being the rows j, j + parts, j + 2 parts, ...

    Of a batch whose rows are spread over devices in blocks, every device so keeps its rows and gives an equal share of them to
    each micro-batch: nothing moves. (Splitting into blocks of rows would give each micro-batch to a few devices only.)
    """
    if x.shape[0] % parts:
        raise UserError(f"a batch of {x.shape[0]} cannot be split into {parts} equal micro-batches.")
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
