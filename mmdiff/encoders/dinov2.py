"""DINOv2 (Oquab et al. 2023), with and without registers (Darcet et al. 2024): features of images and patches, learned without labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import LayerNorm, conv
from mmdiff.encoders.encoder_blocks import Names, config_fields, layers
from mmdiff.errors import UserError

# How the positions, trained for one size of images, are resampled for others. Each published program has a way of its own:
#   bicubic         transformers' Dinov2: a = -0.75, edges repeated
#   bicubic_offset  facebookresearch without registers: the same, with n / (size + 0.1) trained positions for each new one
#   antialiased     facebookresearch and transformers with registers, and REPA: a = -0.5, wider where the grid shrinks
INTERPOLATIONS = ("bicubic", "bicubic_offset", "antialiased")

_SIZES = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
}
_PLAIN = {"model_type": "dinov2", "image_size": 518, "patch_size": 14}
_REGISTERS = {**_PLAIN, "model_type": "dinov2_with_registers", "num_register_tokens": 4}
CONFIGS: dict[str, dict[str, Any]] = {  # the originals first, which come without a config.json
    **{f"dinov2_vit{size[0]}14": {**_PLAIN, **values, "position_interpolation": "bicubic_offset"} for size, values in _SIZES.items()},
    **{f"dinov2_vit{size[0]}14_reg4": {**_REGISTERS, **values} for size, values in _SIZES.items()},
    **{f"dinov2-{size}": {**_PLAIN, **values} for size, values in _SIZES.items()},
    **{f"dinov2-with-registers-{size}": {**_REGISTERS, **values} for size, values in _SIZES.items()},
}
NAMES = Names(
    norm1="norm1", query="attention.attention.query", key="attention.attention.key", value="attention.attention.value",
    out="attention.output.dense", scale1="layer_scale1", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2", scale2="layer_scale2")  # fmt: skip


class DINOv2(nn.Module):
    """Images -> features of the image and of each patch. Field names and defaults are those of the published config.json.

    Attributes:
      use_swiglu_ffn: the giant's MLP, silu(a) * b of one product.
      num_register_tokens: tokens between the class token and the patches.
      position_interpolation: of `INTERPOLATIONS`; features of one way are not those of another. By default what transformers does.
      dtype: of the computation; parameters are float32.

    >>> net = DINOv2(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    >>> features = jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.zeros((1, 28, 42, 3)))[0]
    >>> features["cls"].shape, features["patches"].shape  # 2 x 3 patches of 14 x 14
    ((1, 8), (1, 6, 8))
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int = 0
    position_interpolation: str = "bicubic"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.position_interpolation not in INTERPOLATIONS:
            raise UserError(f"position_interpolation={self.position_interpolation!r} must be one of {', '.join(INTERPOLATIONS)}.")
        super().__post_init__()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DINOv2:
        """Raises UserError: queries, keys and values without biases, which no published DINOv2 has."""
        if not config.get("qkv_bias", True):
            raise UserError("qkv_bias=false: no published DINOv2 lacks these biases.")
        registers = config.get("model_type") == "dinov2_with_registers" or config.get("num_register_tokens", 0) > 0
        others = {"num_register_tokens": 4, "patch_size": 16, "position_interpolation": "antialiased"} if registers else {}
        return cls(**others | config_fields(cls, config))

    def config(self) -> dict[str, Any]:
        """Its config.json, as transformers reads it."""
        model, kind = ("Dinov2WithRegistersModel", "dinov2_with_registers") if self.num_register_tokens else ("Dinov2Model", "dinov2")
        return {"architectures": [model], "model_type": kind, **config_fields(self)}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """transformers' layout, with the prefix of a classifier or without, and facebookresearch's, with chunks of blocks or without."""
        prefix = re.compile(r"^(dinov2|dinov2_with_registers|backbone)\.")
        heads = ("classifier.", "dino_head.", "ibot_head.")
        weights = {prefix.sub("", key): tensor for key, tensor in weights.items() if not key.startswith(heads)}
        return _from_facebookresearch(weights) if "cls_token" in weights else weights

    def example_inputs(self) -> tuple[jax.Array]:
        """An image."""
        return (jnp.zeros((1, self.image_size, self.image_size, self.num_channels)),)

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Preprocessed images [B, H, W, 3] of any size -> features after the last norm.

        Returns:
          cls [B, D]: of the image. registers [B, R, D]. patches [B, N, D]: of the N = floor(H / p) floor(W / p) patches, row by row.
        """
        width, patch = self.hidden_size, self.patch_size
        tokens, grid = {}, self.image_size // patch
        for name, shape in {
            "cls_token": (1, 1, width), "mask_token": (1, width), "register_tokens": (1, self.num_register_tokens, width),
            "position_embeddings": (1, 1 + grid * grid, width)}.items():  # fmt: skip
            if (name != "mask_token" or self.use_mask_token) and shape[1]:
                tokens[name] = self.param(f"embeddings.{name}", nn.initializers.normal(0.02), shape)
        x = conv(width, patch, patch, dtype=self.dtype, name="embeddings.patch_embeddings.projection")(images)
        batch, h, w, _ = x.shape
        positions = tokens["position_embeddings"]
        table = resample(positions[0, 1:].reshape(grid, grid, width), (h, w), self.position_interpolation).reshape(1, h * w, width)

        def repeated(token):
            return jnp.broadcast_to(token, (batch, *token.shape[1:])).astype(self.dtype)

        parts = [repeated(tokens["cls_token"] + positions[:, :1]), x.reshape(batch, h * w, width) + table.astype(self.dtype)]
        if self.num_register_tokens:  # without a position
            parts.insert(1, repeated(tokens["register_tokens"]))
        names, hidden, activation = NAMES, int(width * self.mlp_ratio), self.hidden_act
        if self.use_swiglu_ffn:
            names, hidden, activation = NAMES._replace(fc1="mlp.weights_in", fc2="mlp.weights_out"), swiglu_width(hidden), "silu"
        x, _ = layers(
            "encoder.layer.#", self.num_hidden_layers, jnp.concatenate(parts, 1), names=names, heads=self.num_attention_heads,
            hidden=hidden, activation=activation, fused_gate=self.use_swiglu_ffn, epsilon=self.layer_norm_eps,
            dtype=self.dtype)  # fmt: skip
        x = LayerNorm(epsilon=self.layer_norm_eps, dtype=self.dtype, name="layernorm")(x)
        first = 1 + self.num_register_tokens
        return {"cls": x[:, 0], "registers": x[:, 1:first], "patches": x[:, first:]}

    def encode(self, images: jax.Array) -> jax.Array:
        """Preprocessed images [B, H, W, 3] -> the feature `cls` of each [B, D]."""
        return self(images)["cls"]


def swiglu_width(hidden: int) -> int:
    """Two thirds of the MLP's width, as three products then cost what two did, in multiples of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def resample(table: jax.Array, size: tuple[int, int], interpolation: str) -> jax.Array:
    """A table of positions [n, n, D] for a grid of another size -> [h, w, D], in float32 or wider; see `INTERPOLATIONS`."""
    if table.shape[:2] == size:
        return table
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    if interpolation == "antialiased":
        return jax.image.resize(table, (*size, table.shape[-1]), "cubic", antialias=True, precision="highest")
    offset = 0.1 if interpolation == "bicubic_offset" else 0.0
    rows, columns = (jnp.asarray(bicubic(n, to, n / (to + offset)), table.dtype) for n, to in zip(table.shape[:2], size))
    return jnp.einsum("oi,pj,ijd->opd", rows, columns, table, precision="highest")


def bicubic(size: int, to: int, step: float, a: float = -0.75) -> np.ndarray:
    """PyTorch's bicubic interpolation as a matrix [to, size]: `step` old positions for each new one, edges repeated, not antialiased."""
    at = (np.arange(to) + 0.5) * step - 0.5
    matrix = np.zeros((to, size))
    for tap in range(-1, 3):
        old = np.floor(at).astype(int) + tap
        d = np.abs(at - old)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
        np.add.at(matrix, (np.arange(to), old.clip(0, size - 1)), np.where(d <= 1, near, far))
    return matrix


def _from_facebookresearch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renames = [
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"), (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."), (r"^norm\.", "layernorm."),
        (r"^blocks\.(?:\d+\.)?(\d+)\.", r"encoder.layer.\1."), (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"), (r"\.mlp\.w12\.", ".mlp.weights_in."),
        (r"\.mlp\.w3\.", ".mlp.weights_out.")]  # fmt: skip
    found = {}
    for key, tensor in weights.items():
        for pattern, new in renames:
            key = re.sub(pattern, new, key)
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), tensor.split(3)):
                found[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            found[key] = tensor
    return found
