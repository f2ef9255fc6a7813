"""Two towers, an image's and a text's, whose vectors meet in one space (CLIP, Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.dit import check_split, stack
from mmdiff.nets.embed import Dense, Patches, xavier
from mmdiff.nets.fields import Network, check_width
from mmdiff.nets.text import TextEncoder
from mmdiff.nets.tokens import Block

MAX_LOGIT_SCALE = 100.0  # CLIP's


class TwoTowers(Network):
    """Images [B, H, W, C] and texts int [B, length] (0 is padding) -> vectors [B, size] each, which need not have length 1.

    `__call__(x, t)`: dicts by modality, "image" and "text"; times are ignored. Returns, in float32, {"image_vector", "text_vector"
    [B, size], "logit_scale", "logit_bias" [B]} for `matching.clip_loss`. Either tower by itself:

        vectors = net.apply(params, images, method="see")
        states, vectors = net.apply(params, ids, method="read")        states [B, length, text_width], 0 where there is padding

    A vector is a product of the mean token, of a text the mean of what is not padding.

    Attributes:
      patches: the image's. vocabulary, length: of a text. size: of the vectors.
      depth, width: of the image's tower. text_depth, text_width: of the text's. heads: of both.
      logits: scale and bias at first: CLIP's 1 / 0.07; SigLIP starts from (10, -10).
      norm_eps: added to the variance by every LayerNorm, CLIP's 1e-5.
      scan, remat, backend, dtype: as in `DiT`.
    """

    patches: Patches
    vocabulary: int
    length: int
    size: int
    depth: int
    width: int
    text_depth: int
    text_width: int
    heads: int = 4
    logits: tuple[float, float] = (1 / 0.07, 0.0)
    norm_eps: float = 1e-5
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_width(self.text_width, self.heads, "TwoTowers", "text_")

    def setup(self):
        options = dict(norm_eps=self.norm_eps, scan=self.scan, remat=self.remat, backend=self.backend, dtype=self.dtype)
        self.image = ImageTower(self.patches, self.size, self.depth, self.width, self.heads, **options)
        self.text = TextEncoder(self.vocabulary, self.length, self.text_depth, self.text_width, self.heads, **options)
        self.text_out = Dense(self.size, use_bias=False, kernel_init=xavier, dtype=self.dtype)
        self.learned = learned_logits(self.param, self.logits)

    def see(self, images):
        return self.image(images)

    def read(self, ids):
        there = (ids != 0)[..., None].astype(self.dtype)
        states = self.text(ids) * there
        mean = states.sum(1) / jnp.maximum(there.sum(1), 1)
        return states.astype(jnp.float32), self.text_out(mean).astype(jnp.float32)

    def __call__(self, x, t):
        vectors = {"image_vector": self.see(x["image"]), "text_vector": self.read(x["text"])[1]}
        return {**vectors, **logit_outputs(*self.learned, len(x["image"]))}


def learned_logits(param: Callable, first: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """The parameters of a module's `param` that a matching loss needs: the logarithm of a scale, and a bias; `first` are both at first."""
    if not first[0] > 0:
        raise UserError(f"logits are a scale above 0 and a bias, not {first}.")
    values = {"logit_scale": math.log(first[0]), "logit_bias": first[1]}
    return tuple(param(name, nn.initializers.constant(value), (), jnp.float32) for name, value in values.items())


def logit_outputs(scale: jax.Array, bias: jax.Array, count: int) -> dict[str, jax.Array]:
    """What the losses of `matching` read of `learned_logits`: "logit_scale", at most 100, and "logit_bias", [count] each."""
    values = {"logit_scale": jnp.exp(jnp.minimum(scale, math.log(MAX_LOGIT_SCALE))), "logit_bias": bias}
    return {name: jnp.broadcast_to(value, count) for name, value in values.items()}


class ImageTower(Network):
    """A transformer over patches: images [B, H, W, C] -> vectors [B, size], float32."""

    patches: Patches
    size: int
    depth: int
    width: int
    heads: int
    norm_eps: float = 1e-5
    scan: bool = True
    remat: str = "none"
    backend: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        check_split(self.heads)
        h = self.patches.encode(images.astype(self.dtype), self.width, self.dtype, "image")
        block = partial(Block, heads=self.heads, norm_eps=self.norm_eps, backend=self.backend, dtype=self.dtype)
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(stack(block, self.depth, self.scan, self.remat)(h))
        return Dense(self.size, use_bias=False, kernel_init=xavier, dtype=self.dtype, name="out")(h.mean(1)).astype(jnp.float32)
