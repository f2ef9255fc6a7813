"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): a text tower, an image tower, and both, in transformers' layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import ACTIVATIONS, LayerNorm, attention
from mmdiff.encoders.clip import CLIP, States, layer_options, patches, positions, text_embeddings
from mmdiff.encoders.clip_layouts import renamed, tower_config, tower_fields
from mmdiff.encoders.encoder_blocks import attended, layers
from mmdiff.errors import UserError

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
CONFIGS = {
    "siglip-base-patch16-224": {"model_type": "siglip", "text_config": {}, "vision_config": {}},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip", "text_config": SO400M, "vision_config": SO400M | {"image_size": 384, "patch_size": 14}},
}  # fmt: skip


class SigLIPText(nn.Module):
    """(ids int32 [B, N], mask int32 [B, N] or None, skip) -> `clip.States` of texts; every token attends to all.

    `pooled` is the last token, thus texts are padded to the full length (the published tokenizer pads with its end), without a mask.

    Attributes: as in config.json.
    """

    vocab_size: int = 32000
    max_position_embeddings: int = 64
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids, mask=None, skip=0):
        if ids.shape[1] > self.max_position_embeddings:
            raise UserError(f"this text tower has {self.max_position_embeddings} positions, the ids have {ids.shape[1]}: cut the texts.")
        h, bias = text_embeddings(self, ids), None if mask is None else attended(mask)
        h, hidden = layers("text_model.encoder.layers.#", self.num_hidden_layers, h, bias, skip, **layer_options(self))
        norm = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="text_model.final_layer_norm")
        pooled = norm(h[:, -1])
        head = nn.Dense(self.projection_size or self.hidden_size, dtype=self.dtype, name="text_model.head")
        return States(hidden, norm(hidden), pooled, head(pooled))

    def encode(self, ids, mask=None, skip=0) -> States:
        """As `__call__`."""
        return self(ids, mask, skip)

    def example_inputs(self):
        """Ids."""
        return (jnp.zeros((1, 2), jnp.int32),)

    @classmethod
    def from_config(cls, config: Mapping) -> SigLIPText:
        """Of a config.json of this tower or of both."""
        return cls(**tower_fields(cls, config, "siglip", "text"))

    def config(self) -> dict:
        """The config.json of the tower alone."""
        return tower_config(self, "siglip_text_model", "SiglipTextModel") | {"projection_size": self.projection_size or self.hidden_size}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """transformers' keys, those of the other tower left out."""
        return {key: tensor for key, tensor in renamed(weights, "text").items() if not key.startswith(("vision_model.", "logit_"))}


class SigLIPVision(nn.Module):
    """(images float32 [B, S, S, 3], skip) -> `clip.States` of the patches in raster order, which a query of the network's own pools.

    `embedding` is `pooled`: there is no projection. vision_use_head=False has neither.

    Attributes: as in config.json.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, skip=0):
        h = patches(self, images, use_bias=True)
        h = h + positions(self, h.shape[1], "vision_model")
        h, hidden = layers("vision_model.encoder.layers.#", self.num_hidden_layers, h, None, skip, **layer_options(self))
        norm = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="vision_model.post_layernorm")
        pooled = self._pool(norm(h)) if self.vision_use_head else None
        return States(hidden, norm(hidden), pooled, pooled)

    def encode(self, images, skip=0) -> States:
        """As `__call__`."""
        return self(images, skip)

    def _pool(self, tokens):
        width, name = self.hidden_size, "vision_model.head"

        def dense(features, part):
            return nn.Dense(features, dtype=self.dtype, name=f"{name}.{part}")

        probe = self.param(f"{name}.probe", nn.initializers.normal(), (1, 1, width)).astype(self.dtype)
        weight = self.param(f"{name}.attention.in_proj_weight", nn.initializers.lecun_normal(), (3 * width, width)).astype(self.dtype)
        bias = self.param(f"{name}.attention.in_proj_bias", nn.initializers.zeros, (3 * width,)).astype(self.dtype)
        probe = jnp.broadcast_to(probe, (len(tokens), 1, width))
        q, k, v = (x @ w.T + b for x, w, b in zip((probe, tokens, tokens), jnp.split(weight, 3), jnp.split(bias, 3)))
        h = dense(width, "attention.out_proj")(attention(q, k, v, self.num_attention_heads))
        inner = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name=f"{name}.layernorm")(h)
        inner = ACTIVATIONS[self.hidden_act](dense(self.intermediate_size, "mlp.fc1")(inner))
        return (h + dense(width, "mlp.fc2")(inner))[:, 0]

    def example_inputs(self):
        """Images."""
        return (jnp.zeros((1, self.image_size, self.image_size, self.num_channels)),)

    @classmethod
    def from_config(cls, config: Mapping) -> SigLIPVision:
        """Of a config.json of this tower or of both."""
        return cls(**tower_fields(cls, config, "siglip", "vision"))

    def config(self) -> dict:
        """The config.json of the tower alone."""
        return tower_config(self, "siglip_vision_model", "SiglipVisionModel")

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """transformers' keys, those of the other tower left out."""
        return {key: tensor for key, tensor in renamed(weights, "vision").items() if not key.startswith(("text_model.", "logit_"))}


class SigLIP(CLIP):
    """Both towers: (ids, images) -> logits [images, texts], exp(logit_scale) times the cosines plus logit_bias, each for a sigmoid."""

    text: SigLIPText
    vision: SigLIPVision

    def setup(self):
        self.open_towers()
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(10)), (1,))
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), (1,))

    def __call__(self, ids, images):
        return super().__call__(ids, images) + self.logit_bias

    @classmethod
    def from_config(cls, config: Mapping) -> SigLIP:
        """Of a config.json of both towers."""
        return cls(SigLIPText.from_config(config), SigLIPVision.from_config(config))

    def config(self) -> dict:
        """The config.json."""
        return {"architectures": ["SiglipModel"], "model_type": "siglip"} | self.tower_configs()
