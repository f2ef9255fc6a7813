"""What optax's constructors lack for large batches and scanned layers: scaled learning rates, masks, and per-layer Muon and LAMB.

An optimizer is an ordinary constructor call in a config. With `rate` a number or a schedule:

    optax.adamw(rate, weight_decay=0.0)
    optax.lion(rate, b2=0.99, weight_decay=0.0)                                  # about a tenth of AdamW's rate
    optax.contrib.muon(rate, consistent_rms=0.2, muon_weight_dimension_numbers=muon_dimensions)    # AdamW's rate
    optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4), trust_ratio(), optax.scale_by_learning_rate(rate))    # LAMB

AdamW and Lion work on single weights. Muon and LAMB work on one matrix or vector, and a network with `scan=True` holds those of
all its layers in one array [depth, ...]: `muon_dimensions` and `trust_ratio` make them do what they do to separate layers.
"""

from __future__ import annotations

import math
import operator
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mmdiff.errors import UserError

SCANNED = r"(^|/)blocks/"  # the path of what `nets.transformer.stack` stacks
LAYERS = r"(^|/)block(s|_\d+)/"  # scanned or not


def scaled(rate: float, batch: int, base_batch: int, rule: str) -> float:
    """The learning rate for `batch` examples where `rate` suits `base_batch`.

    With k = batch / base_batch: rate ("none"), k rate ("linear": SGD with warm-up, Goyal et al. 2017), or sqrt(k) rate ("sqrt": Adam and
    its kind, Malladi et al. 2022). The rules hold while the batch is below the gradient's noise scale.

    >>> scaled(1e-4, 1024, 256, "sqrt")
    0.0002

    Raises:
      UserError: another rule, or batches that are not positive.
    """
    if batch < 1 or base_batch < 1:
        raise UserError(f"the learning rate cannot be scaled from a batch of {base_batch} to one of {batch}: both must be positive.")
    factors = {"none": 1.0, "linear": batch / base_batch, "sqrt": math.sqrt(batch / base_batch)}
    if rule not in factors:
        raise UserError(f"config.train.scale_rule is {rule!r}: choose one of {', '.join(factors)}.")
    return rate * factors[rule]


def warmup(rate: float, steps: int) -> optax.Schedule:
    """`rate min(1, (step + 1) / steps)`: linear warm-up, then constant; constant from the start for `steps` 0.

    >>> [float(warmup(0.5, 2)(step)) for step in range(3)]
    [0.25, 0.5, 0.5]
    """
    return lambda step: rate * jnp.minimum(1.0, (step + 1) / max(steps, 1))


def cosine(train: Any) -> optax.Schedule:
    """From 0 to `train.learning_rate` in `train.warmup_steps`, then to 0 by half a cosine at `train.steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, max(train.steps, train.warmup_steps + 1))


def adamw(train: Any, mask: Any = None) -> optax.GradientTransformation:
    """The optimizer of the small configs: gradients clipped at `train.clip`, AdamW (b2 0.99) with the rate `cosine(train)`.

    Args:
      train: the section of a config: steps, learning_rate, warmup_steps, weight_decay, clip.
      mask: which weights may decay, see `all_but`; all by default. The scales of norms never do: from 1 they would shrink what they scale.
    """
    def decayed(params):
        allowed = all_but("/scale$")(params)
        return allowed if mask is None else jax.tree.map(operator.and_, allowed, mask(params))

    def decay(updates, params):
        return jax.tree.map(lambda may, u, w: u + train.weight_decay * w if may else u, decayed(params), updates, params)

    # Without `mask` no state of a masked transformation: runs from before norms were left out have none.
    decaying = optax.stateless(decay) if mask is None else optax.add_decayed_weights(train.weight_decay, decayed)
    adam = optax.chain(optax.scale_by_adam(b2=0.99), decaying, optax.scale_by_learning_rate(cosine(train)))
    return optax.chain(optax.clip_by_global_norm(train.clip), adam)


def muon(train: Any) -> optax.GradientTransformation:
    """As `adamw`, with Muon for the matrices of the transformer's layers (Jordan et al. 2024), whose updates have the size of AdamW's.

    Args:
      train: the section of a config: steps, learning_rate, warmup_steps, weight_decay, clip.
    """
    orthogonal = optax.contrib.muon(
        cosine(train), weight_decay=train.weight_decay, adam_b2=0.99, consistent_rms=0.2, muon_weight_dimension_numbers=muon_dimensions)
    return optax.chain(optax.clip_by_global_norm(train.clip), orthogonal)


def adm(train: Any) -> optax.GradientTransformation:
    """The optimizer of ADM and DiT: AdamW at a constant rate after `warmup`; `scaled` where the section has a scale_rule."""
    scaling = (train.global_batch, train.base_batch, train.scale_rule) if "scale_rule" in train else None
    rate = scaled(train.learning_rate, *scaling) if scaling else train.learning_rate
    return optax.adamw(warmup(rate, train.warmup_steps), weight_decay=train.weight_decay)


def vq_diffusion(train: Any, mask: Any = None) -> optax.GradientTransformationExtraArgs:
    """The released VQ-Diffusion's and CDCD's optimizer: gradients clipped at `train.clip`, AdamW (0.9, 0.96), `plateau` as the rate.

    Args:
      train: the section of a config: learning_rate, warmup_steps, patience, weight_decay, clip.
      mask: which weights decay, see `all_but`; all by default.
    """
    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.scale_by_adam(b1=0.9, b2=0.96),
        optax.add_decayed_weights(train.weight_decay, mask),
        plateau(train.learning_rate, train.warmup_steps, train.patience))


class Plateau(NamedTuple):
    """The state of `plateau`: updates done, the factor on the rate, the best loss and the updates since it was found."""

    count: jax.Array
    factor: jax.Array
    best: jax.Array
    waited: jax.Array


def plateau(
    rate: float, warmup_steps: int, patience: int, start: float = 3e-6, threshold: float = 0.1, floor: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """The learning rate of the released VQ-Diffusion and CDCD, the last link of a chain in place of `optax.scale_by_learning_rate`.

    For `warmup_steps` updates it rises linearly from `start` to `rate`. Then it is halved, down to `floor`, whenever `patience` updates
    in a row had no batch with a loss below `best - threshold |best|`, best being the lowest such loss so far. As a single batch is seldom
    that lucky, it is halved about every `patience` updates.

    The step passes the loss as `value`. Rates are per update, whatever the batch. For losses below zero the released code takes
    `best (1 - threshold)`, which is above best; here the bound is below best for either sign.
    """

    def init(params):
        del params
        return Plateau(jnp.zeros((), jnp.int32), jnp.ones(()), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, value, **others):
        del params, others
        warm = state.count < warmup_steps
        now = jnp.where(warm, start + (rate - start) * state.count / max(warmup_steps, 1), jnp.maximum(rate * state.factor, floor))
        found = jnp.asarray(value, jnp.float32)
        # inf - inf is no number: the first loss after the warm-up is the best.
        better = ~warm & (jnp.isinf(state.best) | (found < state.best - threshold * jnp.abs(state.best)))
        waited = jnp.where(warm | better, 0, state.waited + 1)
        halve = waited > patience
        state = Plateau(
            count=state.count + 1,
            factor=jnp.where(halve, 0.5, 1.0) * state.factor,
            best=jnp.where(better, found, state.best),
            waited=jnp.where(halve, 0, waited),
        )
        return jax.tree.map(lambda u: -now * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def all_but(pattern: str):
    """A mask for weight decay: True for the weights whose path, "params/encoder/...", does not match a regular expression.

    >>> all_but("/bias$")({"params": {"out": {"kernel": 0, "bias": 0}}})
    {'params': {'out': {'bias': False, 'kernel': True}}}
    """
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: not re.search(pattern, _name(path)), params)


def muon_dimensions(params: Any) -> Any:
    """`muon_weight_dimension_numbers` of `optax.contrib.muon`: kernels of blocks, one matrix [in, out] each; AdamW for the rest.

    Embeddings, biases and the layers at the network's ends are AdamW's (Jordan et al. 2024). Leading dimensions, a scanned
    network's depth, are a batch of matrices.
    """

    def dimensions(path, leaf):
        if re.search(LAYERS + r".*kernel$", _name(path)) and leaf.ndim >= 2:
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        return None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def trust_ratio() -> optax.GradientTransformation:
    """Scales every layer's update u by |w| / |u|, where neither is zero (LAMB, You et al. 2020): `optax.scale_by_trust_ratio` by layer.

    A layer is one array, or one entry of an array [depth, ...] that a scanned network stacks.
    """

    def update(updates, state, params=None):
        def scale(path, u, w):
            axes = tuple(range(1 if re.search(SCANNED, _name(path)) else 0, u.ndim))
            w_norm, u_norm = (jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axes, keepdims=True)) for x in (w, u))
            both = (w_norm > 0) & (u_norm > 0)
            return u * jnp.where(both, w_norm / jnp.where(both, u_norm, 1.0), 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
