"""The loss and its gradient of one batch, computed at once or in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss, MicroBatch, added, compares_examples, join, split


def make_gradient(loss: Callable, microbatches: int = 1, noise_scale: bool = False) -> Callable:
    """`(params, batch, key, stats, average) -> ((value, metrics, gradient), seen)`, in float32.

    The value of m micro-batches is the mean of theirs, except for a loss that compares examples: that is computed in two passes, see
    `microbatches`, and is the same for any m. `stats` and `average` are what a loss with statistics or an averaged network reads, `seen`
    the sums that statistics are updated with.

    Args:
      loss: `(params, batch, key) -> (scalar, metrics)`, a plain function or a `BatchLoss`.
      microbatches: m.
      noise_scale: adds the metric "noise_scale/part_sq", the mean squared norm of the micro-batches' gradients.

    Raises:
      UserError: when traced, for m >= 2 and a loss that compares examples: where this is hidden in a plain function, or with `noise_scale`.
    """
    learns, averaged = getattr(loss, "stats", None) is not None, getattr(loss, "averaged", False)

    def given(batch, stats, average):
        return batch | ({"stats": stats} if learns else {}) | ({"ema": average} if averaged else {})

    def evaluate(params, batch, key, stats, average):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, given(batch, stats, average), key)
        value, metrics, grads = float32((value, metrics, grads))
        seen = metrics.pop("stats", {})
        if noise_scale:
            metrics = {**metrics, "noise_scale/part_sq": optax.tree.norm(grads, squared=True)}
        return (value, metrics, grads), seen

    def gradient(params, batch, key, stats=None, average=None):
        if microbatches == 1:
            return evaluate(params, batch, key, stats, average)
        parts = jax.tree.map(lambda x: split(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        traced, shapes = jax.make_jaxpr(evaluate, return_shape=True)(params, first, key, stats, average)
        if compares_examples(traced):
            return compare(params, batch, parts, key, stats, average)

        def add(total, part):
            return jax.tree.map(jnp.add, total, evaluate(params, part, key, stats, average)), None

        (total, seen), _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        return jax.tree.map(lambda x: x / microbatches, total), seen

    def compare(params, batch, parts, key, stats, average):
        if noise_scale:
            raise UserError(
                "config.train.noise_scale compares the gradients of micro-batches, which depend on each other here: the loss compares "
                "the examples of a batch (InfoNCE, SigLIP, negatives from the batch); set config.train.noise_scale=False."
            )

        def pieces(params, part, number):
            micro = MicroBatch(batch, number, microbatches)
            value, metrics, embeddings = loss.pieces(params, given(part, stats, average), key, micro)
            return float32((value, metrics)), embeddings

        places = parts, jnp.arange(microbatches)
        first = jax.tree.map(lambda x: x[0], places)
        if not isinstance(loss, BatchLoss) or compares_examples(jax.make_jaxpr(pieces)(params, *first)):
            raise UserError(
                f"the loss compares the examples of a batch within a function of your own, and {microbatches} micro-batches would compare "
                "fewer: give make_step, losses.combine and losses.diffusion what mmdiff.contrastive and mmdiff.losses make, unwrapped (or "
                "a mmdiff.microbatches.BatchLoss of your own), or set config.train.microbatches=1."
            )
        _, embedded = jax.eval_shape(pieces, params, *first)
        slopes, value, metrics, by_params = [], jnp.zeros((), jnp.float32), {}, None
        if jax.tree.leaves(embedded):
            whole = jax.tree.map(join, jax.lax.map(lambda place: pieces(params, *place)[1], places))
            (value, metrics), (by_params, slopes) = _value_and_slopes(loss.contrast, params, whole)
            value, metrics, by_params = float32((value, metrics, by_params))
            slopes = [split(slope, microbatches) for slope in slopes]

        def objective(params, place, slopes):
            (value, metrics), embeddings = pieces(params, *place)
            linear = sum((leaf * slope).sum() for leaf, slope in zip(_floats(embeddings), slopes, strict=True))
            return value + microbatches * linear, (value, metrics)

        def evaluate(place, slopes):
            grads, (value, metrics) = jax.grad(objective, has_aux=True)(params, place, slopes)
            metrics = dict(metrics)
            seen = metrics.pop("stats", {})
            return (value, metrics, float32(grads)), seen

        def add(total, item):
            return jax.tree.map(jnp.add, total, evaluate(*item)), None

        shapes = jax.eval_shape(evaluate, first, [slope[0] for slope in slopes])
        (total, seen), _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), (places, slopes))
        own, own_metrics, grads = jax.tree.map(lambda x: x / microbatches, total)
        grads = grads if by_params is None else jax.tree.map(jnp.add, grads, by_params)
        metrics = added({**own_metrics, "stats": seen}, metrics)
        seen = metrics.pop("stats")
        return (own + value, metrics, grads), seen

    return gradient


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _value_and_slopes(contrast: Callable, params: Any, embeddings: Any) -> tuple[tuple[jax.Array, dict], tuple[Any, list[jax.Array]]]:
    """The comparison's value, its metrics and its derivatives by the parameters and by all leaves that are floats."""
    leaves, structure = jax.tree.flatten(embeddings)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def of_floats(params, floats):
        filled = dict(enumerate(leaves)) | dict(zip(places, floats, strict=True))
        return contrast(params, jax.tree.unflatten(structure, [filled[i] for i in range(len(leaves))]))

    return jax.value_and_grad(of_floats, argnums=(0, 1), has_aux=True)(params, [leaves[i] for i in places])
