"""Embeddings of times, positions and patches, and the streams: a modality's way to tokens and back."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.lazy_logits import LazyLogits
from mmdiff.nets.fields import check_fields
from mmdiff.nets.target import single_cpu

xavier = nn.initializers.xavier_uniform()


def product(x, kernel, dimensions, precision=None, preferred_element_type=None):
    """x [..., K] times kernel [K, M, ...], as `lax.dot_general` computes it.

    On one CPU device over all tokens at once: the kernel's gradient then contracts one dimension, while for two of them XLA first
    transposes copies of x and of the output's gradient (a quarter of a DiT's step).
    """
    if single_cpu() and x.ndim > 2:
        out = product(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision, preferred_element_type)
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])
    return jax.lax.dot_general(x, kernel, dimensions, precision=precision, preferred_element_type=preferred_element_type)


Dense = partial(nn.Dense, dot_general=product)


class ProductAndBias(nn.Dense):
    """The two addends of `Dense`, of the same parameters: [..., features] and [features]."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return product(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ()))), bias


def readout(dense: nn.Dense, h: jax.Array, chunks: int) -> jax.Array | LazyLogits:
    """The logits `dense(h)` of tokens h [B, L, W], or for chunks > 0 `LazyLogits` of the same parameters."""
    if not chunks:
        return dense(h)
    dense(h[:, :1])  # the parameters are made
    weights = dense.variables["params"]
    return LazyLogits(h, weights["kernel"], weights["bias"], chunks, dense.dtype)


def frequencies(
    t: jax.Array, size: int = 256, scale: float = 1000.0, max_period: float = 10000.0, offset: float = 0.0, freq_shift: float = 0.0
) -> jax.Array:
    """Sinusoidal features [..., size] of times [...], float32 or wider: cosines, then sines, of

        (scale t + offset) max_period^(-i / (half - freq_shift)),        i = 0 .. half - 1.

    Scale 1000 counts a time in [0, 1] in thousandths, as DiT does; scale -1 and offset 1 are SiT's, which feeds 1 - t itself. diffusers'
    DiT has freq_shift 1.

    >>> frequencies(jnp.zeros(3), size=4).tolist()[0]
    [1.0, 1.0, 0.0, 0.0]
    """
    half, t = size // 2, jnp.asarray(t)
    dtype = jnp.promote_types(t.dtype, jnp.float32)
    rates = np.exp(-math.log(max_period) * np.arange(half) / (half - freq_shift)).astype(dtype)
    place = scale * t[..., None].astype(dtype)
    angles = (place + offset if offset else place) * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbed(nn.Module):
    """`Dense(silu(Dense(frequencies(t, ...))))`: [...] -> [..., width]."""

    width: int
    dtype: Any = jnp.float32
    scale: float = 1000.0
    offset: float = 0.0
    freq_shift: float = 0.0

    @nn.compact
    def __call__(self, t):
        init = nn.initializers.normal(0.02)
        features = frequencies(t, scale=self.scale, offset=self.offset, freq_shift=self.freq_shift)
        h = Dense(self.width, kernel_init=init, dtype=self.dtype, name="in")(features)
        return Dense(self.width, kernel_init=init, dtype=self.dtype, name="out")(nn.silu(h))


def sincos_1d(size: int, positions: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of positions [n]: [n, size]."""
    rates = 1.0 / 10000 ** (np.arange(size // 2) / (size / 2.0))
    angles = np.outer(positions.reshape(-1), rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def grid_positions(height: int, width: int, spacing: float = 1.0) -> np.ndarray:
    """Rows and columns of a grid in raster order [height * width, 2], neighbours `spacing` apart."""
    return spacing * np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2).astype(np.float64)


def sincos_2d(size: int, height: int, width: int, spacing: float = 1.0) -> np.ndarray:
    """The fixed table of 2-d positions [height * width, size]: the first half of the features encodes the column, the second the row."""
    rows, columns = grid_positions(height, width, spacing).T
    return np.concatenate([sincos_1d(size // 2, columns), sincos_1d(size // 2, rows)], axis=1).astype(np.float32)


def patchify(x: jax.Array, patch: int | tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B, H/p * W/q, p * q * C], patches of p x q in raster order; q = p where `patch` is one number.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> patchify(x, 2)[0, 0].tolist(), bool((unpatchify(patchify(x, 2), 2, 4, 4) == x).all())
    ([0.0, 1.0, 4.0, 5.0], True)
    """
    (b, h, w, c), (p, q) = x.shape, _sides(patch)
    x = x.reshape(b, h // p, p, w // q, q, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // q), p * q * c)


def unpatchify(tokens: jax.Array, patch: int | tuple[int, int], height: int, width: int) -> jax.Array:
    """The inverse of `patchify`: [B, N, p * q * C] -> [B, height, width, C]."""
    b, (p, q) = tokens.shape[0], _sides(patch)
    x = tokens.reshape(b, height // p, width // q, p, q, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)


def _sides(patch: int | tuple[int, int]) -> tuple[int, int]:
    return (patch, patch) if isinstance(patch, int) else patch


class Stream:
    """A modality's tokens in a network. Both methods are called in a linen module; their parameters have the modality's name."""

    length: int  # tokens

    def positions(self) -> np.ndarray:
        """The tokens' positions [length, axes], for `rotary`."""
        return np.arange(self.length)[:, None]

    def encode(self, x, width, dtype, name):
        """What the process feeds the network -> tokens [B, length, width]."""
        raise NotImplementedError

    def decode(self, h, dtype, name):
        """The network's last tokens [B, length, width] -> its output for the modality."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Patches(Stream):
    """Images [B, H, W, C], one token per patch, with fixed 2-d positions. `out_channels` (default C) may hold more, e.g. a sigma head.

    With a `stem`, convolutions of 3 x 3 that halve the sides down to the grid of patches see past a patch's borders, and their result is
    added to the tokens. The last has the network's width, those before it stem, 2 stem, ... channels (Xiao et al. 2021).

    With a `bottleneck` a patch is first mapped to so many features, without a bias (Li & He 2025, JiT, for patches of many pixels).

    `spacing` is the distance of neighbouring patches in the units of positions: 0.5 for weights that know a grid half as fine.

    With `head` = (depth, width) the output is that of so many blocks of another width behind the network's, which read the noisy image
    again, in patches, and are modulated per token by the network's last tokens and their condition (DDT, Wang et al. 2025; the wide head
    of Zheng et al. 2025, for latents of many channels).
    """

    height: int
    width: int
    channels: int
    patch: int
    out_channels: int | None = None
    stem: int = 0
    bottleneck: int = 0
    spacing: float = 1.0
    head: tuple[int, int] | None = None

    def __post_init__(self):
        check_fields(self)
        if self.head is not None and len(self.head) != 2:
            raise UserError(f"Patches: head must be several numbers, (depth, width) as (2, 2048), not {self.head}.")
        if self.stem and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise UserError(f"a convolutional stem halves the sides of an image: a patch is 2, 4, 8, ..., not {self.patch}.")
        if self.height % self.patch or self.width % self.patch:
            raise UserError(f"patches of {self.patch} do not tile an image of {self.height}x{self.width}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch

    @property
    def length(self) -> int:
        return math.prod(self.grid)

    def positions(self):
        return grid_positions(*self.grid, self.spacing)

    def encode(self, x, width, dtype, name):
        tokens = self.embed(x, width, dtype, name)
        return tokens + sincos_2d(width, *self.grid, self.spacing).astype(tokens.dtype)

    def embed(self, x, width, dtype, name):
        """`encode` without the positions."""
        rows = patchify(x, self.patch)
        if self.bottleneck:
            rows = Dense(self.bottleneck, use_bias=False, kernel_init=xavier, dtype=dtype, name=f"{name}_bottleneck")(rows)
        tokens = Dense(width, kernel_init=xavier, dtype=dtype, name=f"{name}_in")(rows)
        halvings = self.patch.bit_length() - 1 if self.stem else 0
        for i in range(halvings):
            features = width if i == halvings - 1 else self.stem << i
            x = nn.Conv(features, (3, 3), (2, 2), padding=1, dtype=dtype, name=f"{name}_stem_{i}")(x if i == 0 else nn.gelu(x))
        if halvings:
            tokens = tokens + x.reshape(tokens.shape)
        return tokens

    def decode(self, h, dtype, name):
        size = self.patch**2 * (self.out_channels or self.channels)
        h = Dense(size, kernel_init=nn.initializers.zeros, dtype=dtype, name=f"{name}_out")(h)
        return unpatchify(h, self.patch, self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Tokens(Stream):
    """Integers [B, length] below `states`, with learned positions; outputs logits [B, length, classes].

    Where a network tells tokens from padding (`DualStream`), `padding` is its id, a text's tokenizer's. With `logit_chunks` the output is
    `LazyLogits` in so many chunks.
    """

    length: int
    states: int
    classes: int
    padding: int = 0
    logit_chunks: int = 0

    def __post_init__(self):
        check_fields(self)

    def encode(self, x, width, dtype, name):
        init = nn.initializers.normal(0.02)
        positions = nn.Embed(self.length, width, embedding_init=init, dtype=dtype, name=f"{name}_positions")(jnp.arange(self.length))
        return nn.Embed(self.states, width, embedding_init=init, dtype=dtype, name=f"{name}_in")(x) + positions

    def decode(self, h, dtype, name):
        return readout(Dense(self.classes, kernel_init=nn.initializers.zeros, dtype=dtype, name=f"{name}_out"), h, self.logit_chunks)


@dataclasses.dataclass(frozen=True)
class Label(Stream):
    """One integer [B] below `states` (the mask or null included), one token; outputs logits [B, classes]."""

    states: int
    classes: int
    length = 1

    def __post_init__(self):
        check_fields(self)

    def encode(self, x, width, dtype, name):
        return nn.Embed(self.states, width, embedding_init=nn.initializers.normal(0.02), dtype=dtype, name=f"{name}_in")(x)[:, None]

    def decode(self, h, dtype, name):
        return Dense(self.classes, kernel_init=nn.initializers.zeros, dtype=dtype, name=f"{name}_out")(h[:, 0])


@dataclasses.dataclass(frozen=True)
class Vectors(Stream):
    """Features [B, count, size], or [B, size] with count None: one token each, learned positions; outputs the same shape."""

    size: int
    count: int | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def length(self) -> int:
        return self.count or 1

    def encode(self, x, width, dtype, name):
        tokens, init = self.embed(x, width, dtype, name), nn.initializers.normal(0.02)
        return tokens + nn.Embed(self.length, width, embedding_init=init, dtype=dtype, name=f"{name}_positions")(jnp.arange(self.length))

    def embed(self, x, width, dtype, name):
        """`encode` without the positions."""
        return Dense(width, kernel_init=xavier, dtype=dtype, name=f"{name}_in")(x if self.count else x[:, None])

    def decode(self, h, dtype, name):
        h = Dense(self.size, kernel_init=nn.initializers.zeros, dtype=dtype, name=f"{name}_out")(h)
        return h if self.count else h[:, 0]


@dataclasses.dataclass(frozen=True)
class Prefixed(Stream):
    """The positions of a stream behind `count` tokens of a network's own, which are at position 0."""

    count: int
    stream: Stream

    @property
    def length(self) -> int:
        return self.count + self.stream.length

    def positions(self):
        own = self.stream.positions()
        return np.concatenate([np.zeros((self.count, own.shape[1])), own])
