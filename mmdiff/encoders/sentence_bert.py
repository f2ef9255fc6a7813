"""BERT as an encoder of sentences (Devlin et al. 2019; Reimers and Gurevych 2019): the mean of the last states, of length 1."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import LayerNorm
from mmdiff.encoders.encoder_blocks import Names, attended, config_fields, layers
from mmdiff.errors import UserError

CONFIGS: dict[str, dict[str, Any]] = {
    "all-MiniLM-L6-v2": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "all-MiniLM-L12-v2": {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536},
    "bert-base-uncased": {},
}


NAMES = Names(
    norm1="attention.output.LayerNorm", query="attention.self.query", key="attention.self.key", value="attention.self.value",
    out="attention.output.dense", norm2="output.LayerNorm", fc1="intermediate.dense", fc2="output.dense")  # fmt: skip


class SentenceBERT(nn.Module):
    """Token ids -> states, and a vector for the text. Field names and defaults are those of the published config.json.

    With `method="encode"`: e = m / |m|, m = sum_i mask_i h_i / sum_i mask_i of the last states h.

    Attributes:
      dtype: of the computation; parameters are float32.

    >>> net = SentenceBERT(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> ids, mask = jnp.array([[3, 4, 1, 0]]), jnp.array([[1, 1, 1, 0]])
    >>> jax.eval_shape(lambda key: net.init_with_output(key, ids, mask, method="encode")[0], jax.random.key(0)).shape
    (1, 8)
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SentenceBERT:
        """Raises UserError: positions that are not absolute."""
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise UserError(f"position_embedding_type={config['position_embedding_type']!r}: only BERT with absolute positions is known.")
        return cls(**config_fields(cls, config))

    def config(self) -> dict[str, Any]:
        """Its config.json, as transformers reads it."""
        return {"architectures": ["BertModel"], "model_type": "bert", **config_fields(self)}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys with the prefix `bert.` and norms with `gamma` and `beta` are the same network; heads for pretraining are left out."""
        found = {}
        for key, tensor in weights.items():
            key = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            if not key.startswith("cls.") and key != "embeddings.position_ids":
                found[key] = tensor
        return found

    def example_inputs(self) -> tuple[jax.Array, jax.Array]:
        """Ids and mask."""
        return jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids and mask (1 for a token, 0 for padding) int32 [B, L] -> states [B, L, W], and BERT's pooled first token [B, W].

        Raises:
          UserError: more tokens than positions.
        """
        if ids.shape[1] > self.max_position_embeddings:
            raise UserError(f"texts of {ids.shape[1]} tokens, but this BERT has {self.max_position_embeddings} positions: truncate them.")
        embed = functools.partial(nn.Embed, features=self.hidden_size, dtype=self.dtype)
        x = embed(self.vocab_size, name="embeddings.word_embeddings")(ids)
        x += embed(self.type_vocab_size, name="embeddings.token_type_embeddings")(jnp.zeros_like(ids))
        x += embed(self.max_position_embeddings, name="embeddings.position_embeddings")(jnp.arange(ids.shape[1]))
        x = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="embeddings.LayerNorm")(x)
        x, _ = layers(
            "encoder.layer.#", self.num_hidden_layers, x, attended(mask), names=NAMES, heads=self.num_attention_heads, pre_norm=False,
            hidden=self.intermediate_size, activation=self.hidden_act, epsilon=self.layer_norm_eps, dtype=self.dtype)  # fmt: skip
        return x, jnp.tanh(nn.Dense(self.hidden_size, dtype=self.dtype, name="pooler.dense")(x[:, 0]))

    def encode(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids and mask int32 [B, L] -> the mean of the states of a text's tokens, divided by its norm [B, W]."""
        return self.pool(self(ids, mask)[0], mask)

    def pool(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        """`encode` of the states of `__call__`."""
        states = states.astype(jnp.promote_types(self.dtype, jnp.float32))
        mean = jnp.einsum("blw,bl->bw", states, mask.astype(states.dtype)) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
