"""Features of the digits, a vector for each: what CLIP's are to photographs, from a network that is trained here and then fixed.

The network is scikit-learn's `MLPClassifier`, 64-64-32-10 with tanh, trained for 60 epochs on the 1,097 training digits from a fixed
seed (under a second). A digit's features are its last hidden layer, scaled to a root mean square of 1.

Measured: the network classifies 97.2 % of the test digits correctly; between two of one class `distance` is 0.44 on average, of two
classes 2.1.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data.sources import ArraySource, Source, fingerprint, load_all
from mmdiff.projects.digits.digits import digits_source

SIZE = 32


@functools.cache
def digit_features() -> Callable[[np.ndarray], np.ndarray]:
    """`images [n, 8, 8, 1] in [-1, 1] -> features float32 [n, 32]`, each row of root mean square 1. Trained once in a process."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    digits = digits_source("train").arrays
    network = MLPClassifier((64, SIZE), activation="tanh", max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stops early, on purpose
        network.fit(digits["image"].reshape(-1, 64).astype(np.float64), digits["label"])
    layers = list(zip(network.coefs_, network.intercepts_))[:-1]

    def features(images):
        x = np.asarray(images, np.float64).reshape(-1, 64)
        for weights, biases in layers:
            x = np.tanh(x @ weights + biases)
        return (x / np.sqrt((x**2).mean(1, keepdims=True))).astype(np.float32)

    return features


def distance(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """A perceptual distance of digits, [n]: the mean squared difference of their features, 2 (1 - cosine), in 0..4.

    In the place of LPIPS, which knows photographs.
    """
    features = digit_features()
    return ((features(images) - features(others)) ** 2).mean(1)


def represented(source: Source) -> ArraySource:
    """The examples of a source of digits, in memory, with their features as "representation", float32 [n, 32]."""
    arrays = load_all(source)
    return ArraySource({**arrays, "representation": digit_features()(arrays["image"])}, fingerprint(source))


@functools.lru_cache(maxsize=2)
def _orthonormal(numbers: int, size: int) -> np.ndarray:
    """[numbers, size]: seconds of work for CLIP's vectors in Stable Diffusion's latents."""
    q, r = np.linalg.qr(np.random.Generator(np.random.Philox(0)).standard_normal((numbers, size)))
    return q * np.sign(np.diag(r))  # of the two signs of a column the library's choice would decide


def projection(size: int, shape: Sequence[int], scale: float) -> Callable[[jax.Array], jax.Array]:
    """An encoder of vectors into a space of arrays: `representation [B, size] -> [B, *shape]`, linear, fixed and without loss.

        E(r) = scale sqrt(prod(shape) / size) Q r,        Q^T Q = 1

    with random orthonormal columns Q, always the same: a representation of root mean square 1 becomes an array of root mean square
    `scale`, which should be that of the images (0.85 for the digits).

    Raises:
      ValueError: a shape with fewer than `size` numbers.
    """
    numbers = math.prod(shape)
    if numbers < size:
        raise ValueError(f"a projection of {size} numbers into the shape {tuple(shape)} would lose some: it holds {numbers}.")
    matrix = jnp.asarray(scale * math.sqrt(numbers / size) * _orthonormal(numbers, size).T, jnp.float32)

    def encode(representation):
        return jnp.matmul(representation, matrix, precision=jax.lax.Precision.HIGHEST).reshape(-1, *shape)

    return encode
