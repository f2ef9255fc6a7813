"""TAESD, a small autoencoder of the latents of published diffusion models: previews.

Source: github.com/madebyollin/taesd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import autoencoder_layouts as layouts
from mmdiff.encoders.autoencoder_blocks import UpsampledConv
from mmdiff.encoders.blocks import conv
from mmdiff.errors import UserError

FIXED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}
BOUND = 3.0  # latents z are decoded as 3 tanh(z / 3)


class TinyBlock(nn.Module):
    """relu(conv4(relu(conv2(relu(conv0(x))))) + x)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = x
        for i in (0, 2, 4):
            h = conv(x.shape[-1], 3, padding=1, dtype=self.dtype, name=f"conv.{i}")(h)
            h = jax.nn.relu(h) if i < 4 else h
        return jax.nn.relu(h + x)


class Encoder(nn.Module):
    """Images in [0, 1] -> latents."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    out_channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        layer = 0
        for stage, (channels, blocks) in enumerate(zip(self.channels, self.blocks, strict=True)):
            options = dict(stride=2, use_bias=False) if stage else {}
            x = conv(channels, 3, padding=1, dtype=self.dtype, name=f"layers.{layer}", **options)(x)
            for i in range(blocks):
                x = TinyBlock(self.dtype, name=f"layers.{layer + 1 + i}")(x)
            layer += 1 + blocks
        return conv(self.out_channels, 3, padding=1, dtype=self.dtype, name=f"layers.{layer}")(x)


class Decoder(nn.Module):
    """Latents -> images in [0, 1]."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    out_channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(conv(self.channels[0], 3, padding=1, dtype=self.dtype, name="layers.0")(x))
        layer, last = 2, len(self.channels) - 1  # the activation and the upsampling are numbered, too
        for stage, (channels, blocks) in enumerate(zip(self.channels, self.blocks, strict=True)):
            for i in range(blocks):
                x = TinyBlock(self.dtype, name=f"layers.{layer + i}")(x)
            layer += blocks
            if stage < last:
                x = UpsampledConv(channels, use_bias=False, dtype=self.dtype, name=f"layers.{layer + 1}")(x)
            layer += 2
        return conv(self.out_channels, 3, padding=1, dtype=self.dtype, name=f"layers.{layer - 2}")(x)


class AutoencoderTiny(nn.Module):
    """Images -> latents -> images, without moments. Fields: those of the published config.json (diffusers' `AutoencoderTiny`) and dtype.

    Its latents are the *scaled* ones of the large autoencoder: a diffusion model's sample is decoded as it is.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoencoderTiny:
        """The network of a published config.json; missing values are diffusers' defaults."""
        net = cls(**layouts.fields_of_config(cls, config, FIXED))
        for part in ("encoder", "decoder"):
            channels, blocks = getattr(net, f"{part}_block_out_channels"), getattr(net, f"num_{part}_blocks")
            if len(channels) != len(blocks) or len(set(channels)) > 1:
                raise UserError(f"AutoencoderTiny: config.json has {part} stages of {list(channels)} channels and {list(blocks)} blocks.")
        return net

    def config(self) -> dict[str, Any]:
        """Its config.json, as diffusers reads it."""
        return layouts.config_of(self, **{name: values[0] for name, values in FIXED.items()})

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in diffusers' layout, or the original's two halves (keys `0.weight`, `taesd_encoder.0.weight`, `encoder.0.weight`).

        The original's layers are numbered as diffusers', the decoder's one higher: its first layer is the bound of the latents.
        """
        alone = "encoder" if "0.weight" in weights else "decoder"
        found = {}
        for key, tensor in weights.items():
            if original := re.fullmatch(r"(?:(?:taesd_)?(encoder|decoder)\.)?(\d+)\.(.+)", key):
                part = original[1] or alone
                key = f"{part}.layers.{int(original[2]) - (part == 'decoder')}.{original[3]}"
            found[key] = tensor
        return found

    def example_inputs(self) -> tuple[jax.Array]:
        """A small image."""
        return (jnp.zeros((1, self.downsampling, self.downsampling, self.in_channels)),)

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one position of the latents."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def setup(self):
        encoder, decoder = self.encoder_block_out_channels, self.decoder_block_out_channels
        self.encoder = Encoder(encoder, self.num_encoder_blocks, self.latent_channels, self.dtype)
        self.decoder = Decoder(decoder, self.num_decoder_blocks, self.out_channels, self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction of images."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> latents [B, H/8, W/8, c], sides rounded up."""
        return self.encoder((images.astype(self.dtype) + 1) / 2).astype(jnp.promote_types(self.dtype, jnp.float32))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, c] -> images [B, 8h, 8w, 3], about in [-1, 1]."""
        latents = latents.astype(self.dtype)
        return (self.decoder(jnp.tanh(latents / BOUND) * BOUND) * 2 - 1).astype(jnp.promote_types(self.dtype, jnp.float32))


# Published configurations: of Stable Diffusion 1.x, 2.x and XL, and of Stable Diffusion 3 and FLUX.1.
CONFIGS: dict[str, dict[str, Any]] = {
    "taesd": {"latent_channels": 4},
    "taesd-16": {"latent_channels": 16},
}
