"""The loss and its gradient of one batch, computed at once or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss, MicroBatch, Pieces, added, compares_examples, join, split


def make_gradient(loss: Callable, microbatches: int = 1, noise_scale: bool = False) -> Callable:
    """`(params, batch, key, state, average) -> ((value, metrics, gradient), seen)`, in float32.

    The value of m micro-batches is the mean of theirs, except for a loss that compares examples: that is computed in two passes, see
    `microbatches`, and is the same for any m. `state`, `average` and `seen` are those of `BatchLoss`.

    Args:
      loss: `(params, batch, key) -> (scalar, metrics)`, a plain function or a `BatchLoss`.
      microbatches: m.
      noise_scale: adds the metric "noise_scale/part_sq", the mean squared norm of the micro-batches' gradients.

    Raises:
      UserError: when traced, for a loss with a state within a plain function; and for m >= 2 and a loss that compares examples, where this
        is hidden in a plain function, or with `noise_scale`.
    """
    loss = BatchLoss.of(loss)

    def evaluate(params, batch, key, state, average):
        (value, (metrics, seen)), grads = jax.value_and_grad(loss.evaluate, has_aux=True)(params, batch, key, state, average)
        value, metrics, seen, grads = float32((value, dict(metrics), seen, grads))
        if noise_scale:
            metrics = {**metrics, "noise_scale/part_sq": optax.tree.norm(grads, squared=True)}
        return (value, metrics, grads), seen

    def gradient(params, batch, key, state=None, average=None):
        if microbatches == 1:
            return evaluate(params, batch, key, state, average)
        parts = jax.tree.map(lambda x: split(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        traced, shapes = jax.make_jaxpr(evaluate, return_shape=True)(params, first, key, state, average)
        if compares_examples(traced):
            return compare(params, batch, parts, key, state, average)

        def add(total, part):
            return jax.tree.map(jnp.add, total, evaluate(params, part, key, state, average)), None

        (total, seen), _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        return jax.tree.map(lambda x: x / microbatches, total), seen

    def compare(params, batch, parts, key, state, average):
        if noise_scale:
            raise UserError(
                "config.train.noise_scale compares the gradients of micro-batches, which depend on each other here: the loss compares "
                "the examples of a batch (InfoNCE, SigLIP, negatives from the batch); set config.train.noise_scale=False."
            )

        def pieces(params, part, number):
            micro = MicroBatch(batch, number, microbatches)
            own = loss.pieces(params, part, key, state=state, average=average, micro=micro)
            value, metrics, seen = float32((own.value, dict(own.metrics), own.seen))
            return Pieces(value, metrics, own.embeddings, seen)

        places = parts, jnp.arange(microbatches)
        first = jax.tree.map(lambda x: x[0], places)
        traced, shapes = jax.make_jaxpr(pieces, return_shape=True)(params, *first)
        if compares_examples(traced):
            raise UserError(
                f"the loss compares the examples of a batch within a function of your own, and {microbatches} micro-batches would compare "
                "fewer: give make_step, losses.combine and losses.diffusion what mmdiff.losses, matching and contrastive make, unwrapped "
                "(or a mmdiff.microbatches.BatchLoss of your own), or set config.train.microbatches=1."
            )
        slopes, whole, by_params = [], Pieces(jnp.zeros((), jnp.float32), {}), None
        if jax.tree.leaves(shapes.embeddings):
            embeddings = jax.tree.map(join, jax.lax.map(lambda place: pieces(params, *place).embeddings, places))
            whole, (by_params, slopes) = _value_and_slopes(loss.contrast, params, embeddings)
            whole, by_params = float32((whole, by_params))
            slopes = [split(slope, microbatches) for slope in slopes]

        def objective(params, place, slopes):
            own = pieces(params, *place)
            linear = sum((leaf * slope).sum() for leaf, slope in zip(_floats(own.embeddings), slopes, strict=True))
            return own.value + microbatches * linear, (own.value, own.metrics, own.seen)

        def evaluate(place, slopes):
            grads, (value, metrics, seen) = jax.grad(objective, has_aux=True)(params, place, slopes)
            return (value, metrics, float32(grads)), seen

        def add(total, item):
            return jax.tree.map(jnp.add, total, evaluate(*item)), None

        shapes = jax.eval_shape(evaluate, first, [slope[0] for slope in slopes])
        (total, seen), _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), (places, slopes))
        own, own_metrics, grads = jax.tree.map(lambda x: x / microbatches, total)
        grads = grads if by_params is None else jax.tree.map(jnp.add, grads, by_params)
        return (own + whole.value, added(own_metrics, whole.metrics), grads), added(seen, whole.seen)

    return gradient


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _value_and_slopes(contrast: Callable, params: Any, embeddings: Any) -> tuple[Pieces, tuple[Any, list[jax.Array]]]:
    """The comparison, and its value's derivatives by the parameters and by all leaves of the embeddings that are floats."""
    leaves, structure = jax.tree.flatten(embeddings)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def of_floats(params, floats):
        filled = dict(enumerate(leaves)) | dict(zip(places, floats, strict=True))
        whole = contrast(params, jax.tree.unflatten(structure, [filled[i] for i in range(len(leaves))]))
        return whole.value, whole

    slopes, whole = jax.grad(of_floats, argnums=(0, 1), has_aux=True)(params, [leaves[i] for i in places])
    return whole, slopes
