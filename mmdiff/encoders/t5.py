"""The encoder of T5 v1.1 and Flan-T5 (Raffel et al. 2020; Shazeer 2020): the states that SD3, FLUX, Imagen and PixArt are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.encoder_blocks import Names, RMSNorm, attended, config_fields, layers
from mmdiff.errors import UserError

V1_1 = {"vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5-v1_1-small": {**V1_1, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "t5-v1_1-base": {**V1_1, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "t5-v1_1-large": {**V1_1, "d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "t5-v1_1-xl": {**V1_1, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "t5-v1_1-xxl": {**V1_1, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
ATTENTION, MLP = "layer.0.SelfAttention", "layer.1.DenseReluDense"
NAMES = Names(
    norm1="layer.0.layer_norm", query=f"{ATTENTION}.q", key=f"{ATTENTION}.k", value=f"{ATTENTION}.v", out=f"{ATTENTION}.o",
    norm2="layer.1.layer_norm", fc1=f"{MLP}.wi", fc2=f"{MLP}.wo")  # fmt: skip


class T5Encoder(nn.Module):
    """Token ids -> states. Field names and defaults are those of the published config.json.

    Attention is softmax(q k + b(distance)) v: scores are not divided by the root of the head's size, and all layers share the table b.

    Attributes:
      feed_forward_proj: "gated-gelu" (v1.1, Flan; the tanh form), or the MLP's activation ("relu": the first T5).
      dtype: of the computation, not float16 (the MLPs of the published weights pass its largest number); parameters are float32.

    >>> net = T5Encoder(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    >>> ids, mask = jnp.array([[3, 4, 1, 0]]), jnp.array([[1, 1, 1, 0]])
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), ids, mask)[0].shape
    (1, 4, 8)
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.dtype == jnp.float16:
            raise UserError("T5 overflows in float16: use bfloat16 or float32.")
        super().__post_init__()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> T5Encoder:
        """The network of a published config.json."""
        return cls(**config_fields(cls, config))

    def config(self) -> dict[str, Any]:
        """Its config.json, as transformers reads it."""
        return {"architectures": ["T5EncoderModel"], "model_type": "t5", "tie_word_embeddings": False, **config_fields(self)}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The token table is `shared` or `encoder.embed_tokens`, or both, of the same values; the decoder is left out."""
        alias = "encoder.embed_tokens.weight"
        found = {key: tensor for key, tensor in weights.items() if not key.startswith(("decoder.", "lm_head.")) and key != alias}
        return {"shared.weight": weights[alias], **found} if alias in weights else found

    def example_inputs(self) -> tuple[jax.Array, jax.Array]:
        """Ids and mask."""
        return jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids and mask (1 for a token, 0 for padding) int32 [B, L] -> states [B, L, d_model]."""
        gated, activation = self.feed_forward_proj.startswith("gated-"), self.feed_forward_proj.removeprefix("gated-")
        names = NAMES._replace(fc1=f"{MLP}.wi_0", gate=f"{MLP}.wi_1") if gated else NAMES
        activation = "gelu_new" if self.feed_forward_proj == "gated-gelu" else activation
        x = nn.Embed(self.vocab_size, self.d_model, dtype=self.dtype, name="shared")(ids)
        # Published as block 0's; outside the scan, for the other blocks have none.
        table = nn.Embed(self.relative_attention_num_buckets, self.num_heads, name=f"encoder.block.0.{ATTENTION}.relative_attention_bias")
        buckets = relative_buckets(ids.shape[1], self.relative_attention_num_buckets, self.relative_attention_max_distance)
        bias = table(buckets).transpose(2, 0, 1) + attended(mask)
        x, _ = layers(
            "encoder.block.#", self.num_layers, x, bias, names=names, heads=self.num_heads, head_size=self.d_kv, scale=1.0, use_bias=False,
            rms=True, hidden=self.d_ff, activation=activation, epsilon=self.layer_norm_epsilon, dtype=self.dtype)  # fmt: skip
        return RMSNorm(self.layer_norm_epsilon, self.dtype, name="encoder.final_layer_norm")(x)

    def encode(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """As `__call__`."""
        return self(ids, mask)


def relative_buckets(length: int, buckets: int = 32, furthest: int = 128) -> np.ndarray:
    """The row of the bias for each query and key: int [length, length].

    Half of the buckets are for keys after the query. Of each half, n = buckets / 4 are for one distance d < n each, the others grow with
    it: n + floor(n log(d / n) / log(furthest / n)), at most the last.

    >>> relative_buckets(4, buckets=8)[1]
    array([1, 0, 5, 6])
    """
    half, exact = buckets // 2, buckets // 4
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    size = np.abs(distance)
    logs = np.log(np.maximum(size, 1).astype(np.float32) / exact) / np.float32(math.log(furthest / exact))  # in float32, as published
    far = np.minimum(exact + (logs * (half - exact)).astype(np.int64), half - 1)
    return np.where(size < exact, size, far) + half * (distance > 0)
