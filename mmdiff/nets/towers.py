"""Two towers, an image's and a text's, whose vectors meet in one space (CLIP, Radford et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, Patches, xavier
from mmdiff.nets.fields import check_width
from mmdiff.nets.routes import kept_in
from mmdiff.nets.text import TextEncoder
from mmdiff.nets.tokens import Block
from mmdiff.nets.transformer import Transformer

MAX_LOGIT_SCALE = 100.0  # CLIP's


class TwoTowers(Transformer):
    """Images [B, H, W, C] and texts int [B, length] -> vectors [B, size] each, which need not have length 1.

    `__call__(x, t)`: dicts by modality, "image" and "text"; times are ignored. Returns, in float32, {"image_vector", "text_vector"
    [B, size], "logit_scale", "logit_bias" [B]} for `matching.clip_loss`. Either tower by itself:

        vectors = net.apply(params, images, method="encode_image")            [B, size]
        states, vectors = net.apply(params, ids, method="encode_text")        states [B, length, text_width], 0 at padding

    A vector is a linear map of the mean token; the mean of a text leaves out its padding.

    Attributes:
      patches: the image's. vocabulary, length: of a text. size: of the vectors.
      depth, width: of the image's tower. text_depth, text_width: of the text's. heads, ...: of both, see `Transformer`.
      logits: initial scale and bias: CLIP's 1 / 0.07; SigLIP starts from (10, -10).
      norm_eps: CLIP's. padding: the id that is none of a text's tokens.

    >>> net = TwoTowers(Patches(8, 8, 3, 4), vocabulary=100, length=6, size=8, depth=1, width=16, text_depth=1, text_width=16)
    >>> x = {"image": jnp.zeros((2, 8, 8, 3)), "text": jnp.zeros((2, 6), int)}
    >>> out = jax.eval_shape(lambda key: net.apply(net.init(key, x, {}), x, {}), jax.random.key(0))
    >>> out["image_vector"].shape, out["text_vector"].shape
    ((2, 8), (2, 8))
    """

    patches: Patches
    vocabulary: int
    length: int
    size: int
    text_depth: int
    text_width: int
    heads: int = dataclasses.field(default=4, kw_only=True)
    logits: tuple[float, float] = (1 / 0.07, 0.0)
    norm_eps: float = dataclasses.field(default=1e-5, kw_only=True)
    padding: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_width(self.text_width, self.heads, "TwoTowers", "text_")

    def setup(self):
        common = {name: getattr(self, name) for name in ("heads", "mlp_ratio", "norm_eps", "scan", "remat", "backend", "dtype")}
        self.image = ImageTower(self.patches, self.size, depth=self.depth, width=self.width, **common)
        self.text = TextEncoder(self.vocabulary, self.length, depth=self.text_depth, width=self.text_width, **common)
        self.text_out = Dense(self.size, use_bias=False, kernel_init=xavier, dtype=self.dtype)
        self.learned = learned_logits(self.param, self.logits)

    def encode_image(self, images):
        """Images [B, H, W, C] -> vectors [B, size]."""
        return self.image(images)

    def encode_text(self, ids):
        """Ids [B, length] -> (states [B, length, text_width], vectors [B, size])."""
        there = (ids != self.padding)[..., None].astype(self.dtype)
        states = self.text(ids) * there
        mean = states.sum(1) / jnp.maximum(there.sum(1), 1)
        return states.astype(jnp.float32), self.text_out(mean).astype(jnp.float32)

    def __call__(self, x, t):
        kept_in("TwoTowers", x, {}, None)
        vectors = {"image_vector": self.encode_image(x["image"]), "text_vector": self.encode_text(x["text"])[1]}
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


class ImageTower(Transformer):
    """A transformer over patches: images [B, H, W, C] -> vectors [B, size], float32."""

    patches: Patches
    size: int
    norm_eps: float = dataclasses.field(default=1e-5, kw_only=True)

    @nn.compact
    def __call__(self, images):
        h = self.patches.encode(images.astype(self.dtype), self.width, self.dtype, "image")
        h = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(self.stack(Block)(h)[0])
        return Dense(self.size, use_bias=False, kernel_init=xavier, dtype=self.dtype, name="out")(h.mean(1)).astype(jnp.float32)
