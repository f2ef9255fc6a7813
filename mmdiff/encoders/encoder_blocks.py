"""The transformer of the published encoders, scanned over its layers: CLIP, SigLIP, T5, BERT and DINOv2 differ in options and names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.encoders.blocks import ACTIVATIONS, LayerNorm, attention


class Names(NamedTuple):
    """The published names of a layer's parts. Without a name there is no gate (of a gated MLP), and no scale of the two branches."""

    norm1: str
    query: str
    key: str
    value: str
    out: str
    norm2: str
    fc1: str
    fc2: str
    gate: str | None = None
    scale1: str | None = None
    scale2: str | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the mean in float32 or wider."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(self.dtype)


class BranchScale(nn.Module):
    """x * lambda, a factor for each channel."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return x * self.param("lambda1", nn.initializers.ones, x.shape[-1:]).astype(self.dtype)


class Layer(nn.Module):
    """Attention and an MLP: h + attend(norm1(h)), then h + mlp(norm2(h)); with pre_norm=False norm1(h + attend(h)), norm2(h + mlp(h)).

    Attributes:
      names: see `Names`.
      heads, hidden: attention heads, and the MLP's width.
      activation: a name of `blocks.ACTIVATIONS`; with a gate the MLP is fc2(activation(fc1(h)) * gate(h)).
      fused_gate: fc1 and the gate are one product, fc1's half first.
      epsilon: of the norms.
      pre_norm: see above.
      use_bias: the dense layers have biases.
      rms: the norms are `RMSNorm`, else LayerNorm.
      head_size: by default width / heads. scale: of the scores, by default head_size^-1/2.
      dtype: of products and activations.
    """

    names: Names
    heads: int
    hidden: int
    activation: str
    epsilon: float
    pre_norm: bool = True
    use_bias: bool = True
    fused_gate: bool = False
    rms: bool = False
    head_size: int | None = None
    scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, bias=None):
        names, width = self.names, h.shape[-1]

        def dense(features, name):
            return nn.Dense(features, self.use_bias, dtype=self.dtype, name=name)

        def attend(h):
            inner = self.heads * (self.head_size or width // self.heads)
            q, k, v = (dense(inner, name)(h) for name in (names.query, names.key, names.value))
            h = dense(width, names.out)(attention(q, k, v, self.heads, scale=self.scale, bias=bias))
            return BranchScale(self.dtype, name=names.scale1)(h) if names.scale1 else h

        def mlp(h):
            inner, gate = dense(self.hidden * (1 + self.fused_gate), names.fc1)(h), None
            if self.fused_gate:
                inner, gate = jnp.split(inner, 2, axis=-1)
            elif names.gate:
                gate = dense(self.hidden, names.gate)(h)
            inner = ACTIVATIONS[self.activation](inner) if gate is None else ACTIVATIONS[self.activation](inner) * gate
            h = dense(width, names.fc2)(inner)
            return BranchScale(self.dtype, name=names.scale2)(h) if names.scale2 else h

        norm = RMSNorm if self.rms else LayerNorm
        norm1, norm2 = (norm(epsilon=self.epsilon, dtype=self.dtype, name=name) for name in (names.norm1, names.norm2))
        if self.pre_norm:
            h = h + attend(norm1(h))
            return h + mlp(norm2(h))
        h = norm1(h + attend(h))
        return norm2(h + mlp(h))


def layers(name: str, count: int, h: jax.Array, bias: jax.Array | None = None, skip: int = 0, **layer) -> tuple[jax.Array, jax.Array]:
    """`count` layers, one after the other, in a compact method of a module.

    Args:
      name: the published name, with `#` for the number of the layer.
      h: [B, N, width]. bias: see `blocks.attention`; the same for all layers.
      skip: layers that `kept` leaves out at the end.
      **layer: see `Layer`.

    Returns:
      (h, kept): after the last layer, and after layer `count - skip`.
    """

    def step(layer, carry, bias):
        h, kept, left = carry
        h, left = layer(h, bias), left - 1
        return (h, None if kept is None else jnp.where(left == 0, h, kept), left), None

    scanned = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=count)
    carry = h, h if skip else None, jnp.asarray(count - skip)
    (h, kept, _), _ = scanned(Layer(**layer, name=name), carry, bias)
    return h, h if kept is None else kept


def causal(length: int) -> jax.Array:
    """The bias [length, length] with which a token attends to itself and to those before it."""
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -jnp.inf)


def attended(mask: jax.Array) -> jax.Array:
    """The bias [B, 1, 1, N] of a mask [B, N]: nothing attends where it is 0. Finite, for a text may be all padding."""
    return jnp.where(mask[:, None, None] != 0, 0.0, jnp.finfo(jnp.float32).min)


def config_fields(net: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a network that a published config.json states: their values in `config`, or those of the network itself.

    The type of the computation is the user's choice, not the file's.
    """
    names = [field.name for field in dataclasses.fields(net) if field.name not in ("parent", "name", "dtype")]
    return {name: getattr(net, name) for name in names} if config is None else {name: config[name] for name in names if name in config}
