"""Inception-v3 as FID, sFID and the Inception Score take it: the network of 2015-12-05, not torchvision's.

It differs from later ones: images are resized by TensorFlow 1's interpolation (`preprocessing.INCEPTION`), average pools exclude their
padding, the pool of the last block is a maximum, and there are 1,008 classes (0 background, 1..1000 ImageNet's, the rest unused).
Source: Szegedy et al. 2016 (arXiv:1512.00567); Heusel et al. 2017 (FID); Nash et al. 2021 (sFID); weights under Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import BatchNorm, conv

EPSILON = 1e-3
# Published keys: module by module, in the order in which they run. A branch is a chain of convolutions; each has
# (name, channels, (height, width) of its kernel, stride, whether the kernel reaches beyond the edges: padding keeps the size).
ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
AVERAGE, MAXIMUM = "average", "maximum"


def _block_a(pooled: int) -> tuple:
    return (
        (("branch1x1", 64, ONE),),
        (("branch5x5_1", 48, ONE), ("branch5x5_2", 64, FIVE)),
        (("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE)),
        (AVERAGE, ("branch_pool", pooled, ONE)),
    )


def _block_c(inner: int) -> tuple:
    def chain(name, *kernels):
        widths = [inner] * (len(kernels) - 1) + [192]
        return tuple((f"{name}_{i}", width, kernel) for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True), 1))

    return (
        (("branch1x1", 192, ONE),),
        chain("branch7x7", ONE, ROW, COLUMN),
        chain("branch7x7dbl", ONE, COLUMN, ROW, COLUMN, ROW),
        (AVERAGE, ("branch_pool", 192, ONE)),
    )


def _block_e(pool: str) -> tuple:
    def both(name):  # two convolutions of one input, side by side
        return ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))

    return (
        (("branch1x1", 320, ONE),),
        (("branch3x3_1", 384, ONE), both("branch3x3_2")),
        (("branch3x3dbl_1", 448, ONE), ("branch3x3dbl_2", 384, THREE), both("branch3x3dbl_3")),
        (pool, ("branch_pool", 192, ONE)),
    )


HALVED = "halved"  # a maximum over 3 x 3 with stride 2
BLOCKS = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (("branch3x3", 384, THREE, 2),),
        (("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE, 2)),
        (HALVED,)),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (("branch3x3_1", 192, ONE), ("branch3x3_2", 320, THREE, 2)),
        (("branch7x7x3_1", 192, ONE), ("branch7x7x3_2", 192, ROW), ("branch7x7x3_3", 192, COLUMN), ("branch7x7x3_4", 192, THREE, 2)),
        (HALVED,)),
    "Mixed_7b": _block_e(AVERAGE), "Mixed_7c": _block_e(MAXIMUM),
}  # fmt: skip


class ConvNormRelu(nn.Module):
    """A convolution without bias, batch normalization, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        padding = tuple((side // 2,) * 2 for side in self.kernel) if self.padded else 0
        x = conv(self.features, self.kernel, self.stride, padding, use_bias=False, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(EPSILON, self.dtype, name="bn")(x))


def pool(x: jax.Array, kind: str) -> jax.Array:
    """A pool over 3 x 3: "average" of what lies inside, and "maximum", keep the size, "halved" is a maximum with stride 2."""
    if kind == HALVED:
        return nn.max_pool(x, (3, 3), (2, 2))
    if kind == MAXIMUM:
        return nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


class Inception(nn.Module):
    """The network behind FID.

    Images float32 [B, 299, 299, 3] in [-1, 1] (`preprocessing.INCEPTION`) -> features:

        "2048"      mean over the last maps: FID, KID, precision and recall
        "spatial"   [B, 2023]: 7 channels of 17 x 17, ReLU of Mixed_6d.branch1x1 (mixed_6/conv of the graph): sFID
        "logits"    [B, 1008];  "logits_unbiased" without the bias: the Inception Score
        "64", "192", "768"   means over earlier maps

    Under `jit`, what is not used is not computed. Round generated images to uint8 before: stored images are.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def features(self, images: jax.Array) -> dict[str, jax.Array]:
        """Preprocessed images [B, H, W, 3] -> the features above, by name."""
        def layer(x, name, width, kernel, stride=1, padded=None):
            return ConvNormRelu(width, kernel, stride, stride == 1 if padded is None else padded, self.dtype, name=name)(x)

        def branch(x, block, steps):
            for step in steps:
                if isinstance(step, str):
                    x = pool(x, step)
                elif isinstance(step[0], tuple):
                    x = jnp.concatenate([layer(x, f"{block}.{name}", *of) for name, *of in step], -1)
                else:
                    x = layer(x, f"{block}.{step[0]}", *step[1:])
            return x

        def mean(x):
            return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))

        found = {}
        x = layer(images.astype(self.dtype), "Conv2d_1a_3x3", 32, THREE, 2)
        x = layer(x, "Conv2d_2a_3x3", 32, THREE, padded=False)
        x = pool(layer(x, "Conv2d_2b_3x3", 64, THREE), HALVED)
        found["64"] = mean(x)
        x = layer(x, "Conv2d_3b_1x1", 80, ONE)
        x = pool(layer(x, "Conv2d_4a_3x3", 192, THREE, padded=False), HALVED)
        found["192"] = mean(x)
        for block, branches in BLOCKS.items():
            outputs = [branch(x, block, steps) for steps in branches]
            x = jnp.concatenate(outputs, -1)
            if block == "Mixed_6d":
                found["spatial"] = outputs[0][..., :7].reshape(len(x), -1).astype(jnp.float32)
            if block == "Mixed_6e":
                found["768"] = mean(x)
        found["2048"] = mean(x)
        classify = nn.Dense(1008, dtype=jnp.float32, name="fc")
        found["logits"] = classify(found["2048"])
        found["logits_unbiased"] = found["logits"] - classify.variables["params"]["bias"]
        return found

    __call__ = features

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None) -> Inception:
        """There is one; its file has no config.json."""
        return cls()

    def config(self) -> dict[str, Any]:
        """What stands for a config.json where the weights are written."""
        return {"model_type": "inception", "architectures": ["InceptionV3-2015-12-05"]}

    @staticmethod
    def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """pytorch-fid's pt_inception-2015-12-05 and torch-fidelity's weights-inception-2015-12-05: one layout."""
        return {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}

    def example_inputs(self) -> tuple:
        """An image."""
        return (jnp.zeros((1, 299, 299, 3)),)
