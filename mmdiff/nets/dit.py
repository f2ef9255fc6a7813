"""DiT: the diffusion transformer with adaLN-Zero (Peebles & Xie 2023), parameter for parameter."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.attention import attention, split_heads
from mmdiff.nets.embed import Dense, Patches, TimeEmbed, xavier
from mmdiff.nets.fields import Network
from mmdiff.nets.target import one_cpu, placed, split

zeros = nn.initializers.zeros

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def sizes(size: str) -> tuple[int, int, int]:
    """(depth, width, heads) of the published sizes: "S", "B", "L" or "XL"."""
    if size not in SIZES:
        raise UserError(f"no DiT of size {size!r}; choose one of {', '.join(SIZES)}.")
    return SIZES[size]


def check_split(heads: int) -> None:
    """Raises UserError for heads that the mesh of the program does not divide."""
    if heads % split("tensor"):
        raise UserError(f"{heads} heads do not split into {split('tensor')} parts: set config.train.mesh.tensor to a divisor.")


def modulate(x, shift, scale):
    """`x (1 + scale) + shift` with one shift and scale per example, broadcast over its tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x, eps: float = 1e-6):
    """`(x - mean) / sqrt(var + eps)` without parameters, statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    return (centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def stack(block, depth: int, scan: bool, remat: str):
    """`depth` copies of a block `(carry, *constants) -> carry`, as a python loop or one scanned layer, each rematerialised by policy.

    `block` is a linen class with its fields bound (`partial(Block, ...)`). Returns a function of `(carry, *constants)`.
    """
    if remat not in REMAT:
        raise UserError(f"no remat policy {remat!r}; choose one of {', '.join(REMAT)}.")
    kind, fields = block.func, block.keywords
    if remat != "none":
        kind = nn.remat(kind, policy=REMAT[remat], prevent_cse=not scan)
    if not scan:

        def loop(carry, *constants):
            for i in range(depth):
                # XLA's CPU compiler would fuse the sum of all later blocks' gradients into each earlier block.
                carry = jax.lax.optimization_barrier(carry) if one_cpu() else carry
                carry = kind(**fields, name=f"block_{i}")(*placed((carry, *constants)))
            return carry

        return loop

    def scanned(carry, *constants):
        def body(module, carry, _):
            return module(*placed((carry, *constants))), None

        layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
        return layers(kind(**fields, name="blocks"), carry, None)[0]

    return scanned


class Attention(nn.Module):
    """Multi-head self-attention with one qkv product; `qk_norm` normalises queries and keys per head (RMS, learned scale)."""

    heads: int
    qk_norm: bool = False
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, n, h = x.shape
        qkv = Dense(3 * h, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
        q, k, v = split_heads(qkv, self.heads)
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        out = attention(q, k, v, backend=self.backend).reshape(b, n, h)
        return Dense(h, kernel_init=xavier, dtype=self.dtype, name="out")(out)


class MLP(nn.Module):
    """Dense, tanh-GELU, Dense."""

    ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        hidden = Dense(int(x.shape[-1] * self.ratio), kernel_init=xavier, dtype=self.dtype, name="in")(x)
        return Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="out")(nn.gelu(hidden, approximate=True))


class Block(nn.Module):
    """A transformer block whose norms and residual gates are functions of the condition, the identity at initialisation."""

    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, c):
        parts = Dense(6 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="adaln")(nn.silu(c))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(parts, 6, axis=-1)
        attend = Attention(self.heads, self.qk_norm, self.backend, self.dtype, name="attention")
        x = x + gate_a[:, None] * attend(modulate(layer_norm(x, self.norm_eps), shift_a, scale_a))
        mlp = MLP(self.mlp_ratio, self.dtype, name="mlp")
        return x + gate_m[:, None] * mlp(modulate(layer_norm(x, self.norm_eps), shift_m, scale_m))


class DiT(Network):
    """Class-conditional DiT on images or latents.

    `__call__(x, t, label)`: x [B, H, W, C] float, t [B] in [0, 1], label [B] int in 0 .. classes, where `classes` is the null row (a
    `Given(null=classes)` or the mask of `absorbing(classes)`). Returns [B, H, W, C], or 2C channels with `learn_sigma`, in float32.

    Attributes:
      patches: the image's shape and patch size.
      depth, width, heads: see `SIZES`; `DiT.preset("XL", 2)` builds the published ones.
      scan: compile one layer and scan it.
      remat: what the backward pass finds stored: "none" (no rematerialisation: everything), "dots" (products), "full" (each block's
        input) or "offload" (products, in the host's memory: TPU and GPU).
      norm_eps: added to the variance by every LayerNorm, 1e-6 as published.
      time_scale: what the time is multiplied by before its sinusoidal features. Published DiTs count steps, 0 of the least noise: theirs
        are the features of t - 1/1000 here. SiT feeds the time itself, time_scale 1, from noise to data: theirs are those of 1 - t here.
      dtype: activations and products; parameters are float32.
    """

    patches: Patches
    classes: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    time_scale: float = 1000.0
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    @classmethod
    def preset(
        cls, size: str, patch: int, *, image: int = 32, channels: int = 4, classes: int = 1000, learn_sigma: bool = True, **options
    ) -> DiT:
        """The published DiT-`size`/`patch`: `DiT.preset("XL", 2)` works on 32x32x4 latents of 256-pixel images."""
        depth, width, heads = sizes(size)
        patches = Patches(image, image, channels, patch, 2 * channels if learn_sigma else channels)
        return cls(patches, classes, depth, width, heads, **options)

    @nn.compact
    def __call__(self, x, t, label):
        check_split(self.heads)
        h = self.patches.encode(x.astype(self.dtype), self.width, self.dtype, "image")
        init = nn.initializers.normal(0.02)
        c = TimeEmbed(self.width, self.dtype, self.time_scale, name="time")(t)
        c = c + nn.Embed(self.classes + 1, self.width, embedding_init=init, dtype=self.dtype, name="label")(label)
        block = partial(
            Block, heads=self.heads, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm, norm_eps=self.norm_eps, backend=self.backend,
            dtype=self.dtype)  # fmt: skip
        h = stack(block, self.depth, self.scan, self.remat)(h, c)
        shift, scale = jnp.split(Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype, name="adaln")(nn.silu(c)), 2, axis=-1)
        return self.patches.decode(modulate(layer_norm(h, self.norm_eps), shift, scale), self.dtype, "image").astype(jnp.float32)


def as_joint(net: nn.Module, image: str = "image", label: str = "label"):
    """A DiT as the network of a `Joint`: `apply(params, {image, label}, times) -> {image: out}`. The label's time is in its null row."""

    def apply(params, x, t):
        return {image: net.apply(params, x[image], t[image], x[label])}

    return apply
