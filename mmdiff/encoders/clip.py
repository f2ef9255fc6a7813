"""CLIP (Radford et al. 2021, arXiv:2103.00020): a text tower, an image tower, and both with their temperature.

The canonical layout is that of transformers; OpenAI's and open_clip's is renamed to it. A file of both towers opens as either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import LayerNorm, conv
from mmdiff.encoders.clip_layouts import CLIP_CONFIGS, renamed, tower_config, tower_fields
from mmdiff.encoders.encoder_blocks import Names, attended, causal, layers
from mmdiff.errors import UserError

LAYER = Names(
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"
)
CONFIGS = CLIP_CONFIGS
EOS_BY_ARGMAX = 2  # the eos_token_id of OpenAI's and Stable Diffusion's config.json, a mistake that is kept: the end is the largest id


class States(NamedTuple):
    """What a tower knows of a text or an image.

    Attributes:
      hidden: [B, N, width] after the layers, or `skip` layers before, without the final norm.
      tokens: the same with the final norm.
      pooled: [B, width], of the last layer, with the final norm: the text's end, the image's class token.
      embedding: [B, projection_dim], its projection, not of length 1; None in a tower without one.
    """

    hidden: jax.Array
    tokens: jax.Array
    pooled: jax.Array
    embedding: jax.Array | None


class CLIPText(nn.Module):
    """(ids int32 [B, N], mask int32 [B, N] or None, skip) -> `States` of texts: causal, pre-norm.

    Cross-attention in Stable Diffusion 1.x takes `tokens`, in 2.x `tokens` of skip=1 (its own file has a layer less and takes skip=0), in
    SDXL `hidden` of skip=1 of two towers and `embedding` of the second. A mask is for what follows a text's end: no published model needs
    one, and `embedding` does not depend on it.

    Attributes: as in config.json; projection_dim=None has no projection. A text ends at its first eos_token_id, or where that is 2 (see
    `EOS_BY_ARGMAX`) at its largest id.

    >>> net = CLIPText(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, eos_token_id=8)
    >>> variables = net.init(jax.random.key(0), *net.example_inputs())
    >>> net.apply(variables, jnp.array([[7, 3, 8, 0]])).tokens.shape
    (1, 4, 8)
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids, mask=None, skip=0):
        if ids.shape[1] > self.max_position_embeddings:
            raise UserError(f"CLIP's text tower has {self.max_position_embeddings} positions, the ids have {ids.shape[1]}: cut the texts.")
        h = text_embeddings(self, ids)
        bias = causal(ids.shape[1]) if mask is None else causal(ids.shape[1]) + attended(mask)
        h, hidden = layers("text_model.encoder.layers.#", self.num_hidden_layers, h, bias, skip, **layer_options(self))
        norm = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="text_model.final_layer_norm")
        ends = jnp.argmax(ids if self.eos_token_id == EOS_BY_ARGMAX else ids == self.eos_token_id, 1)
        pooled = norm(jnp.take_along_axis(h, ends[:, None, None], 1)[:, 0])
        return States(hidden, norm(hidden), pooled, _projected(self, pooled, "text_projection"))

    def encode(self, ids, mask=None, skip=0) -> States:
        """As `__call__`."""
        return self(ids, mask, skip)

    def example_inputs(self):
        """Ids."""
        return (jnp.zeros((1, 2), jnp.int32),)

    @classmethod
    def from_config(cls, config: Mapping) -> CLIPText:
        """Of a config.json: of this tower, of both, or open_clip's."""
        return cls(**tower_fields(cls, config, "clip", "text"))

    def config(self) -> dict:
        """The config.json of the tower alone."""
        return tower_config(self, "clip_text_model", "CLIPTextModel")

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """transformers' keys, those of the other tower left out."""
        return {key: tensor for key, tensor in renamed(weights, "text").items() if not key.startswith(("vis", "logit_"))}


class CLIPVision(nn.Module):
    """(images float32 [B, S, S, 3], skip) -> `States` of the class token and of the patches in raster order.

    Attributes: as in config.json; projection_dim=None has no projection.
    """

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, skip=0):
        h = patches(self, images, use_bias=False)
        token = self.param("vision_model.embeddings.class_embedding", nn.initializers.normal(), (self.hidden_size,)).astype(self.dtype)
        h = jnp.concatenate([jnp.broadcast_to(token, (len(h), 1, self.hidden_size)), h], 1)
        h = h + positions(self, h.shape[1], "vision_model")
        h = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="vision_model.pre_layrnorm")(h)
        h, hidden = layers("vision_model.encoder.layers.#", self.num_hidden_layers, h, None, skip, **layer_options(self))
        norm = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="vision_model.post_layernorm")
        pooled = norm(h[:, 0])
        return States(hidden, norm(hidden), pooled, _projected(self, pooled, "visual_projection"))

    def encode(self, images, skip=0) -> States:
        """As `__call__`."""
        return self(images, skip)

    def example_inputs(self):
        """Images."""
        return (jnp.zeros((1, self.image_size, self.image_size, self.num_channels)),)

    @classmethod
    def from_config(cls, config: Mapping) -> CLIPVision:
        """Of a config.json: of this tower, of both, or open_clip's."""
        return cls(**tower_fields(cls, config, "clip", "vision"))

    def config(self) -> dict:
        """The config.json of the tower alone."""
        return tower_config(self, "clip_vision_model", "CLIPVisionModel")

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """transformers' keys, those of the other tower left out."""
        return {key: tensor for key, tensor in renamed(weights, "vision").items() if not key.startswith(("text_", "logit_"))}


class CLIP(nn.Module):
    """Both towers: (ids, images) -> the logits of InfoNCE [images, texts], exp(logit_scale) times the cosines."""

    text: CLIPText
    vision: CLIPVision
    dtype: Any = jnp.float32

    def setup(self):
        self.open_towers()
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def open_towers(self):
        """The towers; their parameters are this network's own, as in the published layout."""
        self.towers = {name: tower.clone(dtype=self.dtype) for name, tower in (("text", self.text), ("vision", self.vision))}
        for tower in self.towers.values():
            nn.share_scope(self, tower)

    def __call__(self, ids, images):
        wide = jnp.promote_types(self.dtype, jnp.float32)
        image, text = (of.embedding.astype(wide) for of in (self.encode_image(images), self.encode_text(ids)))
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        return jnp.exp(self.logit_scale.astype(wide)) * image @ text.T

    def encode_text(self, ids, mask=None, skip=0) -> States:
        """What the text tower says."""
        return self.towers["text"](ids, mask, skip)

    def encode_image(self, images, skip=0) -> States:
        """What the image tower says."""
        return self.towers["vision"](images, skip)

    image_size = property(lambda self: self.vision.image_size, doc="Height and width of the images.")

    def example_inputs(self):
        """Ids and images."""
        return self.text.example_inputs() + self.vision.example_inputs()

    @classmethod
    def from_config(cls, config: Mapping) -> CLIP:
        """Of a config.json of both towers, or open_clip's."""
        return cls(CLIPText.from_config(config), CLIPVision.from_config(config))

    def config(self) -> dict:
        """The config.json."""
        return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": self.text.projection_dim} | self.tower_configs()

    def tower_configs(self) -> dict:
        """The part of the config.json that says what the towers are."""
        towers = {"text_config": self.text.config(), "vision_config": self.vision.config()}
        return {name: {key: value for key, value in tower.items() if key != "architectures"} for name, tower in towers.items()}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """transformers' keys."""
        return renamed(weights, "text")


def text_embeddings(net: nn.Module, ids: jax.Array) -> jax.Array:
    """Token and position embeddings [B, N, width], in a compact method of a text tower."""
    embed = nn.Embed(net.vocab_size, net.hidden_size, dtype=net.dtype, name="text_model.embeddings.token_embedding")
    return embed(ids) + positions(net, net.max_position_embeddings, "text_model")[: ids.shape[1]]


def positions(net: nn.Module, count: int, tower: str) -> jax.Array:
    """All position embeddings of a tower [count, width]."""
    return nn.Embed(count, net.hidden_size, dtype=net.dtype, name=f"{tower}.embeddings.position_embedding")(jnp.arange(count))


def patches(net: nn.Module, images: jax.Array, use_bias: bool) -> jax.Array:
    """Embedded patches [B, N, width] in raster order, in a compact method of an image tower."""
    size, patch = net.image_size, net.patch_size
    if images.shape[1:] != (size, size, net.num_channels):
        shape = list(images.shape)
        raise UserError(f"this image tower takes images [B, {size}, {size}, {net.num_channels}], not {shape}: resize them before.")
    name = "vision_model.embeddings.patch_embedding"
    embed = conv(net.hidden_size, patch, patch, use_bias=use_bias, dtype=net.dtype, name=name)
    return embed(images).reshape(len(images), -1, net.hidden_size)


def layer_options(net: nn.Module) -> dict:
    """What `encoder_blocks.Layer` takes, from a tower's fields."""
    return dict(
        names=LAYER, heads=net.num_attention_heads, hidden=net.intermediate_size, activation=net.hidden_act, epsilon=net.layer_norm_eps,
        dtype=net.dtype)  # fmt: skip


def _projected(net, pooled, name):
    return nn.Dense(net.projection_dim, use_bias=False, dtype=net.dtype, name=name)(pooled) if net.projection_dim else None
