r"""What is measured of sets of features beside their moments: Inception Score, precision and recall, kernel distance (KID).

Each is a function of arrays, features [n, d] or logits [n, K], of any network: network, counts and settings belong to the result.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.data.network_cache import map_batched
from mmdiff.errors import UserError

SEED = 2020  # of subsets and splits: torch-fidelity's
BLOCK = 2**25  # distances at a time: 128 MiB
TIE = 2e-6  # of the squared lengths of two features: nearer ones are equal, since float32 does not tell them apart


def inception_score(logits: np.ndarray, splits: int = 10, seed: int | None = SEED) -> tuple[float, float]:
    r"""exp(mean_i KL(p_i || mean_j p_j)), p = softmax(logits): its mean and standard deviation over splits (Salimans et al. 2016).

    ADM's evaluator splits 50,000 samples into ten in the order of the file (seed=None), which samples in the order of classes ruin.

    >>> mean, _ = inception_score(1e4 * np.eye(10)[np.arange(1000) % 10])  # each sure of its class, all classes alike: almost their number
    >>> 9.5 < mean < 10
    True

    Args:
      logits: [n, K]; of Inception those without the bias ("logits_unbiased").
      splits: parts, as equal as can be.
      seed: of the order in which they are split (that of torch-fidelity), or None for the order in the array.

    Raises:
      UserError: fewer samples than splits, logits that are not finite.
    """
    logits = _checked("the Inception Score", logits, splits)
    order = np.arange(len(logits)) if seed is None else np.random.RandomState(seed).permutation(len(logits))
    scores = []
    for part in np.split(order, [i * len(logits) // splits for i in range(1, splits)]):
        logs = logits[part].astype(np.float64)
        logs -= logs.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        p = np.exp(logs)
        mean = p.mean(0)
        entropy = -np.sum(mean * np.log(np.where(mean > 0, mean, 1.0)))
        scores.append(np.exp(entropy + (p * logs).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), as ADM's evaluator measures them but in float32.

    A set's manifold is the union of balls about its features, each reaching to the k-th nearest other one. Precision is the share of
    generated features on the real manifold, recall that of real ones on the generated manifold. Both depend on both counts: tables made
    with ADM's evaluator have 50,000 samples and 10,000 real images. Memory: the features and 128 MiB.

    Args:
      generated, real: features [n, d] and [m, d], n, m > k.
      k: neighbours.

    Raises:
      UserError: too few features, features that are not finite or of two lengths.
    """
    generated, real = (_checked("precision and recall", features, k + 1).astype(np.float64) for features in (generated, real))
    _same_length(generated, real)
    center = real.mean(0)  # distances stay, and float32 has more digits for them
    generated, real = ((features - center).astype(np.float32) for features in (generated, real))
    return _share_within(generated, real, k), _share_within(real, generated, k)


def _share_within(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of queries on the manifold of points."""
    placed = jnp.asarray(points)
    rows = max(1, BLOCK // len(points))
    radii = map_batched(lambda part: _radii(part, placed, k), points, min(rows, len(points)))
    within = map_batched(lambda part: _within(part, placed, radii), queries, min(rows, len(queries)))
    return float(np.mean(within))


def _squared_distances(rows, points):
    lengths = (rows**2).sum(-1)[:, None] + (points**2).sum(-1)
    found = lengths - 2 * jnp.matmul(rows, points.T, precision="highest")
    return jnp.where(found <= TIE * lengths, 0.0, found)


@functools.partial(jax.jit, static_argnums=2)
def _radii(rows, points, k):
    """The squared distance [n] of each to the k-th nearest other point; the nearest of all is itself."""
    return -jax.lax.top_k(-_squared_distances(rows, points), k + 1)[0][:, k]


@jax.jit
def _within(rows, points, radii):
    return (_squared_distances(rows, points) <= radii).any(1)


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, kernel (x y / d + 1)^3, in float64 (Bińkowski et al. 2018).

    Of features [n, d] and [m, d]; its mean over samples is the value itself, 0 for equal laws, hence it can be negative.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """KID: the mean and the standard deviation of `squared_mmd` over random subsets of both, each without repetition.

    Subsets, and with them the value, are those of torch-fidelity. The deviation is of one subset, not of the mean.

    Raises:
      UserError: fewer features than `size` (of at least 2), features that are not finite or of two lengths.
    """
    generated, real = (_checked("KID", features, max(2, size)) for features in (generated, real))
    _same_length(generated, real)
    stream, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        parts = [features[stream.choice(len(features), size, replace=False)] for features in (generated, real)]
        found.append(squared_mmd(*parts))
    return float(np.mean(found)), float(np.std(found))


def _checked(name: str, array: np.ndarray, least: int) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 2:
        raise UserError(f"{name}: needs an array [n, d], got shape {list(array.shape)}.")
    if len(array) < max(1, least):
        raise UserError(f"{name}: {len(array):,} examples are too few, it takes {max(1, least):,} or more.")
    wrong = np.flatnonzero(~np.isfinite(array).all(1))
    if len(wrong):
        raise UserError(f"{name}: {len(wrong):,} of {len(array):,} examples, the first of them {wrong[0]}, are not finite.")
    return array


def _same_length(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape[1] != second.shape[1]:
        raise UserError(f"features of {first.shape[1]} and of {second.shape[1]} numbers cannot be compared: take them from one network.")
