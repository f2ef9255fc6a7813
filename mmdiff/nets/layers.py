"""Layers that blocks of transformers consist of: norms and their modulation, MLPs, attention among streams of tokens and to a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmdiff.nets.attention import attention, self_attention, split_heads
from mmdiff.nets.embed import Dense, ProductAndBias, product, xavier
from mmdiff.nets.rotary import angles, rotate

zeros = nn.initializers.zeros
normal = nn.initializers.normal(0.02)


def modulate(x, shift, scale):
    """`x (1 + scale) + shift` of tokens x [B, N, W]; shift and scale per example [B, W] or per token, a shift of None is left out."""
    scaled = x * (1 + per_token(scale))
    return scaled if shift is None else scaled + per_token(shift)


def per_token(c):
    """What is [B, W] as [B, 1, W]; [B, N, W] as it is."""
    return c if c.ndim == 3 else c[:, None]


def layer_norm(x, eps: float = 1e-6):
    """`(x - mean) / sqrt(var + eps)` without parameters, statistics in float32 or wider, result in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)).astype(x.dtype)


class MLP(nn.Module):
    """Dense, tanh-GELU, Dense ("erf_gelu": GELU itself); or "swiglu", Dense(silu(a) b) with a and b of one product (Shazeer 2020).

    That has 2/3 of the hidden units, so that its three matrices have the size of the other's two.
    """

    ratio: float = 4.0
    kind: str = "gelu"
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = dict(kernel_init=xavier, use_bias=self.bias, dtype=self.dtype, name="in")
        if self.kind == "swiglu":
            hidden = checkpoint_name(Pairs(2 * int(x.shape[-1] * self.ratio * 2 / 3), **options)(x), "mlp_in")
            hidden = nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
        else:
            hidden = checkpoint_name(Dense(int(x.shape[-1] * self.ratio), **options)(x), "mlp_in")
            hidden = nn.gelu(hidden, approximate=self.kind != "erf_gelu")
        return Dense(x.shape[-1], kernel_init=xavier, use_bias=self.bias, dtype=self.dtype, name="out")(hidden)


class Pairs(nn.Dense):
    """A Dense whose features are pairs, one after the other, so that a split of them is a split of pairs: [..., 2, features / 2]."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else jnp.zeros(self.features)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        # The weights are put in order, not the many more features.
        kernel, bias = (leaf.reshape(*leaf.shape[:-1], -1, 2).swapaxes(-1, -2) for leaf in (kernel, bias))
        out = product(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())))
        return out + bias if self.use_bias else out


class Vector(nn.Module):
    """A learned vector [features], 0 at first."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self):
        return self.param("bias", zeros, (self.features,), jnp.float32).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention among streams of tokens, {name: [B, N, W]}; a network's only stream has the name "".

    Attributes:
      heads: of them.
      attends: stream -> the streams that its tokens attend to, all by default.
      weights: stream -> the prefix of its layers, its name by default: streams of one prefix share them.
      parts: (prefix, length) of the parts of the stream "", if it consists of several: "" for layers that all of them share, which run as
        one product over all tokens.
      qk_norm: normalise queries and keys per head (RMS, learned scale; shared by all streams).
      rope: stream -> the `embed.Stream`s whose tokens it consists of, for rotary positions of these; others are not turned.
      bias: of the products. qkv_bias: without, that of queries, keys and values has none. kernel_init: their initialiser.
    """

    heads: int
    attends: Mapping[str, tuple[str, ...]] | None = None
    weights: Mapping[str, str] | None = None
    parts: tuple[tuple[str, int], ...] = ()
    qk_norm: bool = False
    rope: Mapping[str, tuple[Any, ...]] | None = None
    bias: bool = True
    kernel_init: Callable = xavier
    backend: str | None = None
    dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, streams, visible={}, cache={}, kept={}):
        """-> the streams' updates, and their keys and values {name: (k, v)}, [B, N, H, D] each.

        Args:
          streams: tokens by name.
          visible: name -> bool [B, N], False for masked tokens; a stream that is left out is not masked.
          cache: keys and values of streams that are not there, from an earlier call.
          kept: name -> int [B, N], which of the stream's positions its tokens have, where some are left out.
        """
        made = Layers(self.weights, self.parts, self.dtype)
        queries, keys, updates, outputs = {}, dict(cache), {}, {}
        alone = len(streams) == 1 and not cache and not visible and not self.qk_norm and not self.rope
        qkv_bias = self.bias and self.qkv_bias
        alone = alone and qkv_bias and not any(prefix for prefix, _ in self.parts)
        for name, x in streams.items():
            kind = ProductAndBias if alone else Dense
            qkv = made(kind, name, "qkv", features=3 * x.shape[-1], kernel_init=self.kernel_init, use_bias=qkv_bias)(x)
            if alone:
                outputs[name], qkv = self_attention(*qkv, self.heads, self.backend), qkv[0] + qkv[1].reshape(1, 1, -1)
            q, k, v = split_heads(qkv, self.heads)
            if self.qk_norm:
                q, k = made.layer(nn.RMSNorm, "", "q_norm")(q), made.layer(nn.RMSNorm, "", "k_norm")(k)
            if name in (self.rope or {}):
                turns = np.concatenate([angles(part.positions(), q.shape[-1]) for part in self.rope[name]])
                q, k = (rotate(each, turns, kept.get(name)) for each in (q, k))
            queries[name], keys[name] = q, (k, v)
        for name, q in queries.items():
            read = [other for other in (self.attends or {}).get(name, streams) if other in keys]
            k, v = (join(pair) for pair in zip(*(keys[other] for other in read)))
            mask = None
            if any(other in visible for other in read):
                masks = [visible[other] if other in visible else jnp.ones(keys[other][0].shape[:2], bool) for other in read]
                mask = jnp.concatenate(masks, axis=1)[:, None, None]
            out = outputs[name] if alone else attention(q, k, v, mask, self.backend).reshape(*q.shape[:2], -1)
            layer = made(Dense, name, "out", features=out.shape[-1], kernel_init=self.kernel_init, use_bias=self.bias)
            updates[name] = layer(out)
        return updates, {name: keys[name] for name in streams}


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, N, W] to a context [B, M, C]: [B, N, W], or [B, 1, W] where there is one key.

    Attributes:
      heads: of them.
      prefix: of the layers' names.
      kernel_init: their initialiser.
    """

    heads: int
    prefix: str = ""
    kernel_init: Callable = xavier
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context, mask=None):
        """`mask`: bool [B, M], False for masked tokens; without any key the update is 0."""

        def dense(features, name, x):
            return Dense(features, kernel_init=self.kernel_init, dtype=self.dtype, name=self.prefix + name)(x)

        b, n, width = x.shape
        q = dense(width, "q", x).reshape(b, n, self.heads, -1)
        kv = dense(2 * width, "kv", context).reshape(b, context.shape[1], self.heads, 2, -1)  # by head first, as in `split_heads`
        k, v = kv[..., 0, :], kv[..., 1, :]
        # One key has weight 1, whatever the query.
        out = v if k.shape[1] == 1 else attention(q, k, v, None if mask is None else mask[:, None, None], self.backend)
        out = dense(width, "out", out.reshape(b, -1, width))
        # Where all keys are masked `attention` returns their mean.
        return out if mask is None else jnp.where(mask.any(1)[:, None, None], out, 0)


class Layers:
    """The layers of the module whose method constructs this, by stream and name: made at their first use, so one prefix is one layer."""

    def __init__(self, prefixes: Mapping[str, str] | None, parts: tuple[tuple[str, int], ...], dtype: Any):
        self._prefixes, self._parts, self._dtype, self._made = prefixes or {}, parts, dtype, {}

    def __call__(self, kind: type[nn.Module], stream: str, name: str, /, **fields: Any) -> Callable:
        """The layer of a stream, or a function that applies its layer to each of the stream's parts."""
        if stream or not any(prefix for prefix, _ in self._parts):
            return self.layer(kind, self._prefixes.get(stream, stream), name, **fields)
        layers, lengths = [self.layer(kind, prefix, name, **fields) for prefix, _ in self._parts], [length for _, length in self._parts]
        return lambda x: join([layer(part) for layer, part in zip(layers, cut(x, lengths))])

    def layer(self, kind: type[nn.Module], prefix: str, name: str, /, **fields: Any) -> nn.Module:
        path = f"{prefix}_{name}" if prefix else name
        if path not in self._made:
            self._made[path] = kind(**fields, dtype=self._dtype, name=path)
        return self._made[path]


def cut(x: jax.Array, lengths: Any) -> list[jax.Array]:
    """x [B, N, ...] in parts of so many tokens; in one without lengths."""
    return jnp.split(x, np.cumsum(lengths)[:-1], axis=1) if len(lengths) > 1 else [x]


def join(parts: Any) -> jax.Array:
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def spread(vectors: Any, lengths: Any) -> jax.Array:
    """Vectors [B, W] of so many tokens each -> [B, N, W], for products without a copy of each part: what TPUs are faster with."""
    found, token = vectors[0][:, None], jnp.arange(sum(lengths))[:, None]
    for vector, start in zip(vectors[1:], np.cumsum(lengths)):
        found = jnp.where(token >= start, vector[:, None], found)
    return found
