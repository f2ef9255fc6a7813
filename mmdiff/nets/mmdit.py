"""MMDiT: one stream of tokens per modality, one attention over all of them, each modality modulated by its own time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmdiff.nets.attention import attention, split_heads
from mmdiff.nets.dit import MLP, check_split, layer_norm, modulate, stack, zeros
from mmdiff.nets.embed import Dense, TimeEmbed, xavier
from mmdiff.nets.fields import Network


class JointBlock(nn.Module):
    """Self-attention over the concatenated streams and an MLP per token, with adaLN-Zero by stream.

    `shared`: one set of weights for all streams (the tokens run through each product together), else one per stream (Esser et
    al. 2024). The modulation is always a function of the stream's own condition.
    """

    heads: int
    shared: bool
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, streams, conditions):
        names = sorted(streams)
        width = streams[names[0]].shape[-1]
        lengths = [streams[name].shape[1] for name in names]
        cuts = [sum(lengths[: i + 1]) for i in range(len(names) - 1)]

        def scope(name, part):
            return part if self.shared else f"{name}_{part}"

        def dense(features, part, init=xavier):
            """A function of a dict of streams (or their modulations): one product if shared, else one each."""
            if self.shared:
                layer = Dense(features, kernel_init=init, dtype=self.dtype, name=part)
                return lambda x: layer(x)
            layers = {name: Dense(features, kernel_init=init, dtype=self.dtype, name=scope(name, part)) for name in names}
            return lambda x: jnp.concatenate([layers[n](piece) for n, piece in zip(names, jnp.split(x, cuts, axis=1))], axis=1)

        def by_stream(function, x, *modulations):
            """Applies `function(tokens, *per-example vectors)` to each stream of the concatenated tokens."""
            pieces = jnp.split(x, cuts, axis=1)
            return jnp.concatenate([function(piece, *parts) for piece, *parts in zip(pieces, *modulations)], axis=1)

        parts = [[] for _ in range(6)]
        adaln = Dense(6 * width, kernel_init=zeros, dtype=self.dtype, name="adaln") if self.shared else None
        for name in names:
            layer = adaln or Dense(6 * width, kernel_init=zeros, dtype=self.dtype, name=f"{name}_adaln")
            for part, value in zip(parts, jnp.split(layer(nn.silu(conditions[name])), 6, axis=-1)):
                part.append(value)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts

        def gated(x, update, gate):
            return x + by_stream(lambda piece, g: g[:, None] * piece, update, gate)

        x = jnp.concatenate([streams[name] for name in names], axis=1)
        b, n, _ = x.shape
        qkv = dense(3 * width, "qkv")(by_stream(modulate, layer_norm(x, self.norm_eps), shift_a, scale_a))
        q, k, v = split_heads(qkv, self.heads)
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        x = gated(x, dense(width, "out")(attention(q, k, v, backend=self.backend).reshape(b, n, width)), gate_a)
        normed = by_stream(modulate, layer_norm(x, self.norm_eps), shift_m, scale_m)
        if self.shared:
            update = MLP(self.mlp_ratio, self.dtype, name="mlp")(normed)
        else:
            pieces = zip(names, jnp.split(normed, cuts, axis=1))
            update = jnp.concatenate([MLP(self.mlp_ratio, self.dtype, name=f"{name}_mlp")(piece) for name, piece in pieces], axis=1)
        x = gated(x, update, gate_m)
        return dict(zip(names, jnp.split(x, cuts, axis=1)))


class MMDiT(Network):
    """A diffusion transformer over any set of modalities.

    `__call__(x, t)`: dicts by modality, x as the modality's stream takes it, t [B] in [0, 1]; returns a dict of outputs in float32.
    A condition at t = 1 and one at t = 0 are told apart by its own time, as everything else about it.

    Attributes:
      modalities: name -> stream (`Patches`, `Tokens`, `Label`, `Vectors`).
      shared: see `JointBlock`. scan, remat, dtype, backend, qk_norm, norm_eps, time_scale: as in `DiT`.

    >>> import jax
    >>> from mmdiff.nets import Label, Patches
    >>> net = MMDiT({"image": Patches(8, 8, 1, patch=2), "label": Label(states=11, classes=10)}, depth=1, width=16, heads=2)
    >>> x, t = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.zeros(2, int)}, {"image": jnp.ones(2), "label": jnp.ones(2)}
    >>> out = jax.eval_shape(lambda key: net.apply(net.init(key, x, t), x, t), jax.random.key(0))
    >>> out["image"].shape, out["label"].shape
    ((2, 8, 8, 1), (2, 10))
    """

    modalities: Mapping[str, Any]
    depth: int
    width: int
    heads: int
    shared: bool = False
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    time_scale: float = 1000.0
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, t):
        check_split(self.heads)
        names = sorted(self.modalities)  # the order in which jax flattens a dict
        missing = [name for name in names if name not in x or name not in t]
        if missing:
            raise KeyError(f"MMDiT: no input or time for {missing}; it was built for {sorted(names)}.")
        time = TimeEmbed(self.width, self.dtype, self.time_scale, name="time")
        kinds = self.param("modality", nn.initializers.normal(0.02), (len(names), self.width), jnp.float32)
        streams, conditions = {}, {}
        for i, name in enumerate(names):
            stream = self.modalities[name]
            value = x[name].astype(self.dtype) if jnp.issubdtype(x[name].dtype, jnp.floating) else x[name]
            streams[name] = stream.encode(value, self.width, self.dtype, name)
            conditions[name] = time(t[name]) + kinds[i].astype(self.dtype)
        block = partial(
            JointBlock, heads=self.heads, shared=self.shared, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm, norm_eps=self.norm_eps,
            backend=self.backend, dtype=self.dtype)
        streams = stack(block, self.depth, self.scan, self.remat)(streams, conditions)
        out = {}
        for name in names:
            layer = Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype, name=f"{name}_adaln")
            shift, scale = jnp.split(layer(nn.silu(conditions[name])), 2, axis=-1)
            tokens = modulate(layer_norm(streams[name], self.norm_eps), shift, scale)
            out[name] = self.modalities[name].decode(tokens, self.dtype, name).astype(jnp.float32)
        return out
