"""The encoder and the decoder that the published convolutional autoencoders share: AutoencoderKL and VQModel.

Levels of residual blocks, halved or doubled in size between them, around a middle with attention over all pixels. Module names are
diffusers' keys. Images and latents are [B, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.encoders.blocks import GroupNorm, attention, conv

EPSILON = 1e-6
SCORES = 2**24  # of an image that are held at once: 4,096 positions (512 pixels, halved three times) attend to all in one product


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))); the shortcut is a product where the number of channels changes."""

    channels: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = x
        for i in (1, 2):
            h = jax.nn.silu(GroupNorm(self.groups, epsilon=EPSILON, dtype=self.dtype, name=f"norm{i}")(h))
            h = conv(self.channels, 3, padding=1, dtype=self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + out(softmax(q k^T / sqrt(C)) v) with one head over all pixels; q, k and v of norm(x)."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = GroupNorm(self.groups, epsilon=EPSILON, dtype=self.dtype, name="group_norm")(x)
        h = h.reshape(len(h), -1, h.shape[-1])
        q, k, v = (nn.Dense(h.shape[-1], dtype=self.dtype, name=name)(h) for name in ("to_q", "to_k", "to_v"))
        h = nn.Dense(h.shape[-1], dtype=self.dtype, name="to_out.0")(attention_by_parts(q, k, v))
        return x + h.reshape(x.shape)


def attention_by_parts(q: jax.Array, k: jax.Array, v: jax.Array, scores: int = SCORES) -> jax.Array:
    """`attention` with one head, in equal parts of the queries one after another, such that at most `scores` of an image exist at once."""
    batch, length, channels = q.shape
    size = max(1, scores // k.shape[1])
    if length <= size:
        return attention(q, k, v, 1)
    parts = -(-length // size)
    size = -(-length // parts)
    q = jnp.pad(q, ((0, 0), (0, parts * size - length), (0, 0))).reshape(batch, parts, size, channels).swapaxes(0, 1)
    found = jax.lax.map(lambda part: attention(part, k, v, 1), q)
    return found.swapaxes(0, 1).reshape(batch, -1, channels)[:, :length]


class UpsampledConv(nn.Module):
    """A 3 x 3 convolution of [B, H, W, C] with each pixel repeated along both sides, [B, 2H, 2W, channels], in 4/9 of its products.

    The three rows that a row of the result sees are two rows of x, one of them twice: for row 2i rows i - 1 and i, with the weights w0 and
    w1 + w2; for row 2i + 1 rows i and i + 1, with w0 + w1 and w2; columns likewise. Parameters are those of the convolution.
    """

    channels: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.channels))
        dimensions = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))

        def phase(row, column):
            weights = _pairs(_pairs(kernel, row, 0), column, 1).astype(self.dtype)
            return jax.lax.conv_general_dilated(
                x.astype(self.dtype), weights, (1, 1), ((1 - row, row), (1 - column, column)), dimension_numbers=dimensions)  # fmt: skip

        batch, height, width, _ = x.shape
        rows = [jnp.stack([phase(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
        x = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, self.channels)
        return x + self.param("bias", nn.initializers.zeros, (self.channels,)).astype(self.dtype) if self.use_bias else x


def _pairs(kernel, odd, axis):
    """(w0, w1 + w2), or (w0 + w1, w2) for odd rows of the result."""
    w0, w1, w2 = jnp.split(jnp.asarray(kernel), 3, axis)
    return jnp.concatenate([w0 + w1, w2] if odd else [w0, w1 + w2], axis)


class Coder(nn.Module):
    """What encoder and decoder have in common.

    Attributes:
      channels: of each level, from the largest size to the smallest.
      attention: whether each level has attention after its residual blocks, in the same order.
      layers: residual blocks of a level of the encoder; the decoder has one more.
      groups: of the normalisations. out_channels: of the result.
      middle_attention: whether the middle has attention.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int
    groups: int
    out_channels: int
    middle_attention: bool = True
    dtype: Any = jnp.float32

    def _level(self, x, name, channels, layers, attention):
        for j in range(layers):
            x = ResnetBlock(channels, self.groups, self.dtype, name=f"{name}.resnets.{j}")(x)
            if attention:
                x = AttentionBlock(self.groups, self.dtype, name=f"{name}.attentions.{j}")(x)
        return x

    def _middle(self, x):
        x = ResnetBlock(self.channels[-1], self.groups, self.dtype, name="mid_block.resnets.0")(x)
        if self.middle_attention:
            x = AttentionBlock(self.groups, self.dtype, name="mid_block.attentions.0")(x)
        return ResnetBlock(self.channels[-1], self.groups, self.dtype, name="mid_block.resnets.1")(x)

    def _conv(self, x, name, channels, stride=1, padding=1):
        return conv(channels, 3, stride, padding, dtype=self.dtype, name=name)(x)

    def _out(self, x):
        x = GroupNorm(self.groups, epsilon=EPSILON, dtype=self.dtype, name="conv_norm_out")(x)
        return self._conv(jax.nn.silu(x), "conv_out", self.out_channels)


class Encoder(Coder):
    """Images -> [B, h, w, out_channels], each side halved (rounded down) between two levels."""

    @nn.compact
    def __call__(self, x):
        x = self._conv(x, "conv_in", self.channels[0])
        for i, channels in enumerate(self.channels):
            x = self._level(x, f"down_blocks.{i}", channels, self.layers, self.attention[i])
            if i < len(self.channels) - 1:  # zeros at the right and the bottom, whether the side is even or odd
                x = self._conv(x, f"down_blocks.{i}.downsamplers.0.conv", channels, 2, ((0, 1), (0, 1)))
        return self._out(self._middle(x))


class Decoder(Coder):
    """[B, h, w, c] -> images, each side doubled between two levels. Its levels are numbered from the smallest size."""

    @nn.compact
    def __call__(self, x):
        x = self._middle(self._conv(x, "conv_in", self.channels[-1]))
        for i, channels in enumerate(reversed(self.channels)):
            x = self._level(x, f"up_blocks.{i}", channels, self.layers + 1, self.attention[-1 - i])
            if i < len(self.channels) - 1:
                x = UpsampledConv(channels, dtype=self.dtype, name=f"up_blocks.{i}.upsamplers.0.conv")(x)
        return self._out(x)


class Autoencoder(nn.Module):
    """What AutoencoderKL and VQModel share; the fields are theirs."""

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one position of the latents, or one code."""
        return 2 ** (len(self.block_out_channels) - 1)

    def example_inputs(self) -> tuple[jax.Array]:
        """The smallest image."""
        return (jnp.zeros((1, self.downsampling, self.downsampling, self.in_channels)),)


def coders(net: Autoencoder, attention: Sequence[bool], latent_channels: int) -> tuple[Encoder, Decoder]:
    """Encoder and decoder, in `setup`. attention: of each level, latent_channels: what the encoder ends with."""
    shared = dict(
        channels=net.block_out_channels, attention=attention, layers=net.layers_per_block, groups=net.norm_num_groups,
        middle_attention=net.mid_block_add_attention, dtype=net.dtype)  # fmt: skip
    return Encoder(out_channels=latent_channels, **shared), Decoder(out_channels=net.out_channels, **shared)


def by_images(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function` of one image after another: memory of one."""
    return jax.lax.map(lambda one: function(one[None])[0], x)


def by_tiles(function: Callable[[jax.Array], jax.Array], x: jax.Array, tile: int, out_tile: int) -> jax.Array:
    """`function` of overlapping square tiles, joined with linear weights: memory of one tile, and not the same result as in one piece.

    A tile begins every 3/4 of its side. A quarter of its result is blended with the tile above, then with the one at its left, both as
    blended before. (diffusers' enable_tiling.)

    Args:
      x: [B, H, W, C]. tile: the side of a tile of x. out_tile: the side of its result.
    """
    step, extent = int(tile * 0.75), int(out_tile * 0.25)
    keep = out_tile - extent
    corners = [(i, j) for i in range(0, x.shape[1], step) for j in range(0, x.shape[2], step)]
    tiles = {(i, j): x[:, i : i + tile, j : j + tile] for i, j in corners}
    by_shape: dict[tuple, list] = {}
    for corner, part in tiles.items():
        by_shape.setdefault(part.shape, []).append(corner)
    for same in by_shape.values():  # the network is compiled once for each shape
        tiles |= zip(same, jax.lax.map(function, jnp.stack([tiles[corner] for corner in same])), strict=True)
    for i, j in corners:
        if i:
            tiles[i, j] = _blend(tiles[i - step, j], tiles[i, j], extent, 1)
        if j:
            tiles[i, j] = _blend(tiles[i, j - step], tiles[i, j], extent, 2)
    rows = [[tiles[i, j][:, :keep, :keep] for j in range(0, x.shape[2], step)] for i in range(0, x.shape[1], step)]
    return jnp.concatenate([jnp.concatenate(row, axis=2) for row in rows], axis=1)


def _blend(before, tile, extent, axis):
    extent = min(before.shape[axis], tile.shape[axis], extent)
    start, rest = jax.lax.slice_in_dim(tile, 0, extent, axis=axis), jax.lax.slice_in_dim(tile, extent, None, axis=axis)
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    share = jnp.expand_dims((jnp.arange(extent) / max(extent, 1)).astype(tile.dtype), [other for other in range(4) if other != axis])
    return jnp.concatenate([end * (1 - share) + start * share, rest], axis=axis)
