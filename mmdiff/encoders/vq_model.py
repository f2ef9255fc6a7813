"""Vector-quantised autoencoders: taming's VQGAN and GumbelVQ, diffusers' VQModel and LlamaGen's tokenizer.

    net = VQModel.from_config(CONFIGS["vqgan-f16-16384"])
    codes = net.apply({"params": params}, images, method="encode")                   # images in [-1, 1]; int32 [B, H/16, W/16]
    images = net.apply({"params": params}, codes, method="decode")

Source: Esser et al. 2021 (arXiv:2012.09841); LlamaGen: Sun et al. 2024 (arXiv:2406.06525).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import autoencoder_blocks as blocks
from mmdiff.encoders import autoencoder_layouts as layouts
from mmdiff.encoders.blocks import conv
from mmdiff.errors import UserError

QUANTIZERS = ("nearest", "gumbel")


class Codebook(nn.Module):
    """Vectors of codes: `nearest(h)`, and `__call__(codes)`.

    Attributes:
      logits: the code of h is that of the largest logit, a linear map of h, not of the nearest vector.
    """

    codes: int
    channels: int
    logits: bool = False

    def setup(self):
        self.embedding = nn.Embed(self.codes, self.channels)
        if self.logits:
            self.proj = conv(self.codes, 1, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """The vectors [..., channels] of codes; NaN for what is no code."""
        return jnp.asarray(self.embedding.embedding).at[codes].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def nearest(self, h: jax.Array) -> jax.Array:
        """argmin |h - e|^2, or the argmax of the logits, int32 [...]: in float32 or wider, of several the lowest."""
        vectors = self.embedding.embedding
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        if self.logits:
            return jnp.argmax(self.proj(h), axis=-1).astype(jnp.int32)
        products = jnp.einsum("...c,nc->...n", h, vectors, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(jnp.square(vectors).sum(-1) - 2 * products, axis=-1).astype(jnp.int32)  # |h|^2 is the same for all


class VQModel(blocks.Autoencoder):
    """Images -> codes, argmin_k |h - e_k|^2 of the encoder's output h -> images.

    Fields: those of the published config.json (diffusers' `VQModel`) and dtype, of the computation.

    LlamaGen compares normalised vectors. With normalised codes, the nearest to a vector is the nearest to the normalised vector, so that
    `canonical` normalises that layout's codes and nothing else differs.

    taming's GumbelVQ (quantizer="gumbel") has a logit for each code, by which training samples; here an image's code is the likeliest.

    >>> net = VQModel(norm_num_groups=4, block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2)
    >>> net.downsampling  # pixels of a side for one code
    2
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 3
    sample_size: int = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int = 3
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    quantizer: str = "nearest"
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VQModel:
        """The network of a published config.json; missing values are diffusers' defaults."""
        if config.get("vq_embed_dim") is None:
            config = {**config, "vq_embed_dim": config.get("latent_channels", cls.latent_channels)}
        net = cls(**layouts.fields_of_config(cls, config, {"act_fn": ("silu", "swish"), "norm_type": ("group",)}))
        layouts.attention_of_levels(net)
        return net

    def config(self) -> dict[str, Any]:
        """Its config.json, as diffusers reads it."""
        found = layouts.config_of(self, act_fn="silu", norm_type="group")
        if self.quantizer == "nearest":  # the only one that diffusers has
            del found["quantizer"]
        return found

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of taming's, LlamaGen's or diffusers' layout in diffusers'."""
        found = layouts.canonical(weights)
        if layouts.is_llamagen(weights) and "quantize.embedding.weight" in found:
            found["quantize.embedding.weight"] = found["quantize.embedding.weight"].map(_normalised)
        return {key.replace("quantize.embed.", "quantize.embedding."): tensor for key, tensor in found.items()}  # GumbelVQ's

    def setup(self):
        self.encoder, self.decoder = blocks.coders(self, layouts.attention_of_levels(self), self.latent_channels)
        self.quant_conv = conv(self.vq_embed_dim, 1, dtype=self.dtype)
        self.post_quant_conv = conv(self.latent_channels, 1, dtype=self.dtype)
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"VQModel: quantizer = {self.quantizer!r} in its configuration is none of {', '.join(QUANTIZERS)}.")
        self.codebook = Codebook(self.num_vq_embeddings, self.vq_embed_dim, self.quantizer == "gumbel", name="quantize")

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction of images."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> codes, int32 [B, H/f, W/f]. Sides are rounded down."""
        return self.quantize(self.latents(images))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [B, h, w] -> images [B, f h, f w, 3], about in [-1, 1]; NaN for what is no code."""
        vectors = self.codebook(codes).astype(self.dtype)
        return self.decoder(self.post_quant_conv(vectors)).astype(jnp.promote_types(self.dtype, jnp.float32))

    def latents(self, images: jax.Array) -> jax.Array:
        """Images -> vectors [B, H/f, W/f, vq_embed_dim] before they are quantised.

        Raises:
          UserError: images of another shape, or too small.
        """
        layouts.check_images(self, images)
        return self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.promote_types(self.dtype, jnp.float32))

    def quantize(self, latents: jax.Array) -> jax.Array:
        """The code of the nearest vector for each of `latents`, int32: the lowest of several."""
        return self.codebook.nearest(latents)


def _normalised(vectors):
    return vectors / np.maximum(np.sqrt(np.square(vectors).sum(-1, keepdims=True)), 1e-12)


_F16 = {**layouts.levels([128, 128, 256, 256, 512], attention=True), "latent_channels": 256, "vq_embed_dim": 256, "sample_size": 256}
_LLAMAGEN = {**_F16, "num_vq_embeddings": 16384, "vq_embed_dim": 8}

# Published configurations; only diffusers' files come with a config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "vqgan-f16-1024": {**_F16, "num_vq_embeddings": 1024},
    "vqgan-f16-16384": {**_F16, "num_vq_embeddings": 16384},
    "vqgan-gumbel-f8-8192": {
        **_F16, **layouts.levels([128, 128, 256, 512], attention=True), "num_vq_embeddings": 8192, "quantizer": "gumbel"},
    "llamagen-vq-16": _LLAMAGEN,
    "llamagen-vq-8": {**_LLAMAGEN, **layouts.levels([128, 256, 256, 512], attention=True)},
}
