"""The KL autoencoder of latent diffusion: Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1, and VA-VAE.

    net = AutoencoderKL.from_config(CONFIGS["sd-vae"])
    moments = net.apply({"params": params}, images, method="encode")                 # images in [-1, 1]
    latents = net.scale_latents(net.sample(moments, key))                            # what a diffusion model trains on
    images = net.apply({"params": params}, net.unscale(latents), method="decode")

Source: Rombach et al. 2022 (arXiv:2112.10752); VA-VAE: Yao et al. 2025 (arXiv:2501.01423).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.encoders import autoencoder_blocks as blocks
from mmdiff.encoders import autoencoder_layouts as layouts
from mmdiff.encoders.blocks import conv
from mmdiff.errors import UserError

LOGVAR = (-30.0, 20.0)  # log-variances are clipped to


class AutoencoderKL(blocks.Autoencoder):
    """Images -> mean m and log-variance v of a Gaussian over latents, z = m + exp(v / 2) n with n standard normal -> images.

    Its fields are those of the published config.json (diffusers' `AutoencoderKL`) and how it is computed. On a TPU, products are of
    bfloat16 unless `jax.default_matmul_precision("highest")` is set, as it should be where latents are stored.

    Attributes:
      block_out_channels, layers_per_block, norm_num_groups, latent_channels, mid_block_add_attention, use_quant_conv,
        use_post_quant_conv: the network; block types with `Attn` have attention in their level.
      sample_size: the side of a tile in pixels.
      scaling_factor, shift_factor, latents_mean, latents_std: see `scale_latents`.
      force_upcast: half precision overflows: dtype float16 is refused.
      slicing: encode and decode one image after another.
      tiling: encode and decode images larger than a tile by overlapping tiles. It changes the result, since attention and normalisation
        are of a tile; not for latents that are stored.
      dtype: of the computation. Moments and images are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    slicing: bool = False
    tiling: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.force_upcast and jnp.dtype(self.dtype) == jnp.float16:
            raise UserError("AutoencoderKL: float16 overflows here (its config.json says force_upcast): use bfloat16 or float32.")
        super().__post_init__()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoencoderKL:
        """The network of a published config.json; missing values are diffusers' defaults."""
        values = layouts.fields_of_config(cls, config, {"act_fn": ("silu", "swish")})
        if isinstance(values.get("sample_size"), tuple):  # height and width: a tile is a square of the height
            values["sample_size"] = values["sample_size"][0]
        net = cls(**values)
        layouts.attention_of_levels(net)
        return net

    def config(self) -> dict[str, Any]:
        """Its config.json, as diffusers reads it."""
        return layouts.config_of(self, act_fn="silu")

    canonical = staticmethod(layouts.canonical)

    def setup(self):
        self.encoder, self.decoder = blocks.coders(self, layouts.attention_of_levels(self), 2 * self.latent_channels)
        if self.use_quant_conv:
            self.quant_conv = conv(2 * self.latent_channels, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv(self.latent_channels, 1, dtype=self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction of images."""
        return self.decode(self.mode(self.encode(images)))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> moments [B, H/f, W/f, 2c]: means, then log-variances. Sides are rounded down.

        Raises:
          UserError: images of another shape, or too small.
        """
        layouts.check_images(self, images)
        return self._compute("_encode", images, self.sample_size, self.sample_size // self.downsampling)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents [B, h, w, c] -> images [B, f h, f w, 3], about in [-1, 1]."""
        return self._compute("_decode", latents, self.sample_size // self.downsampling, self.sample_size)

    def mode(self, moments: jax.Array) -> jax.Array:
        """The mean of moments, unscaled latents [..., c]."""
        return jnp.split(moments, 2, axis=-1)[0]

    def deviation(self, moments: jax.Array) -> jax.Array:
        """The standard deviation of moments, exp(log-variance / 2): of unscaled latents [..., c]."""
        return jnp.exp(0.5 * jnp.clip(jnp.split(moments, 2, axis=-1)[1], *LOGVAR))

    def sample(self, moments: jax.Array, key: jax.Array) -> jax.Array:
        """mean + deviation n, n standard normal: unscaled latents [..., c]. A key for each image: `jax.vmap(net.sample)`."""
        mean = self.mode(moments)
        return mean + self.deviation(moments) * jax.random.normal(key, mean.shape, mean.dtype)

    def scale_latents(self, latents: jax.Array) -> jax.Array:
        """(z - b) s with the published scale s and shift b, or (z - mean) s / std with those of channels: what diffusion models train on.

        >>> net = AutoencoderKL(scaling_factor=0.5, shift_factor=1.0)
        >>> float(net.scale_latents(5.0)), float(net.unscale(2.0))
        (2.0, 5.0)
        """
        mean, std = self._statistics(latents)
        return (latents - mean) * self.scaling_factor / std

    def unscale(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scale_latents`."""
        mean, std = self._statistics(latents)
        return latents * std / self.scaling_factor + mean

    def _statistics(self, latents):
        mean = (self.shift_factor or 0.0) if self.latents_mean is None else self.latents_mean
        std = 1.0 if self.latents_std is None else self.latents_std
        return (jnp.asarray(np.asarray(value), jnp.result_type(latents, jnp.float32)) for value in (mean, std))

    def _encode(self, images):
        moments = self.encoder(images.astype(self.dtype))
        moments = self.quant_conv(moments) if self.use_quant_conv else moments
        return moments.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _decode(self, latents):
        latents = latents.astype(self.dtype)
        latents = self.post_quant_conv(latents) if self.use_post_quant_conv else latents
        return self.decoder(latents).astype(jnp.promote_types(self.dtype, jnp.float32))

    def _compute(self, method, x, tile, out_tile):
        tiling, slicing = self.tiling and max(x.shape[1:3]) > tile, self.slicing and len(x) > 1
        if self.is_initializing() or not (tiling or slicing):
            return getattr(self, method)(x)
        net, variables = self.unbind()  # a pure function, which jax.lax.map takes

        def function(x):
            return net.apply(variables, x, method=method)

        def tiles(x):
            return blocks.by_tiles(function, x, tile, out_tile) if tiling else function(x)

        return blocks.by_images(tiles, x) if slicing else tiles(x)


_F8 = layouts.levels([128, 256, 512, 512])
_C16 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}

# Published configurations, as their config.json files state them. VA-VAE comes without one: its latents are normalised by means and
# deviations of channels from a file of statistics (latents_mean, latents_std).
CONFIGS: dict[str, dict[str, Any]] = {
    "sd-vae": {**_F8, "latent_channels": 4, "scaling_factor": 0.18215, "sample_size": 256},  # 1.x, 2.x, sd-vae-ft-ema, sd-vae-ft-mse
    "sdxl-vae": {**_F8, "latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    "sd3-vae": {**_F8, **_C16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True},
    "flux-vae": {**_F8, **_C16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True},
    "va-vae-f16d32": {
        **layouts.levels([128, 128, 256, 256, 512], attention=True), "latent_channels": 32, "scaling_factor": 1.0, "sample_size": 256,
    },
}
