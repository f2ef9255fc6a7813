r"""The Fréchet distance between two sets of features, each taken for a Gaussian (Dowson and Landau 1982; Heusel et al. 2017).

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1^{1/2} C_2 C_1^{1/2})^{1/2}

All moments are float64. The last trace is the nuclear norm of C_1^{1/2} C_2^{1/2}: square roots of symmetric matrices and
singular values only, so singular covariances (constant pixels, fewer examples than features) are no special case, whereas the
Schur-based square root of the non-symmetric product C_1 C_2 turns complex or loses half of its digits there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mmdiff import hosts
from mmdiff.errors import UserError

LARGEST = 1e70  # features whose products' products are within float64


class Moments:
    """The mean and the covariance of features that come in batches: sums in float64, about the first batch's mean, so that nothing cancels.

    >>> both = Moments().add(np.array([[0.0], [2.0]])).add(np.array([[4.0]]))
    >>> both.count, both.mean.tolist(), both.covariance.tolist()
    (3, [2.0], [[4.0]])
    """

    def __init__(self):
        self.count = 0

    def add(self, features: np.ndarray) -> Moments:
        """Some features [n, d] more, n >= 1.

        Raises:
          UserError: features that are not finite, or so large that a distance would not be. ValueError: of another shape.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or not len(features):
            raise ValueError(f"moments: needs features [n, d], got shape {features.shape}.")
        wrong = np.flatnonzero(~(np.abs(features) <= LARGEST).all(1))
        if len(wrong):
            raise UserError(
                f"moments: the features of {len(wrong):,} of {len(features):,} examples, the first of them {wrong[0]}, are not finite or "
                f"beyond {LARGEST:g}: check the examples and what makes features of them.")
        if not self.count:
            self._origin, self._sum, self._products = features.mean(0), 0.0, 0.0
        features = features - self._origin
        self.count += len(features)
        self._sum, self._products = self._sum + features.sum(0), self._products + features.T @ features
        return self

    def merge(self, other: Moments) -> Moments:
        """The features of another, too, as those of another host: exact to rounding, whatever the means (Chan et al. 1979)."""
        if not other.count:
            return self
        if not self.count:
            self.count, self._origin, self._sum, self._products = other.count, other._origin, other._sum, other._products
            return self
        count, shift, mean = self.count + other.count, other.mean - self.mean, self.mean
        self._products = self._centered() + other._centered() + np.outer(shift, shift) * (self.count * other.count / count)
        self._origin, self._sum, self.count = mean + shift * (other.count / count), np.zeros_like(mean), count
        return self

    def of_all(self) -> Moments:
        """Those of all processes of a run together, in every process, merged in the order of ranks: no digit is lost on the way."""
        alone = np.concatenate([[self.count], self.mean, self._centered().ravel()]) if self.count else np.zeros(0)
        merged = Moments()
        for found in hosts.gather(alone):
            if len(found):
                other, length = Moments(), math.isqrt(len(found))  # 1 + d + d^2 numbers
                other.count, other._origin, other._sum = int(found[0]), found[1 : length + 1], 0.0
                other._products = found[length + 1 :].reshape(length, length)
                merged.merge(other)
        return merged

    @property
    def mean(self) -> np.ndarray:
        """[d]"""
        return self._origin + self._sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, [d, d]. Raises ValueError with fewer than two examples."""
        if self.count < 2:
            raise ValueError(f"moments: a covariance needs features [n, d] with n >= 2, got n = {self.count}.")
        return self._centered() / (self.count - 1)

    def _centered(self) -> np.ndarray:
        """Summed products of deviations from the mean."""
        return self._products - np.outer(self._sum, self._sum) / self.count

    def squared_distance(self, other: Moments) -> float:
        """d^2 as above. It falls as either set grows: compare values of equal counts only."""
        return squared_distance(self.mean, self.covariance, other.mean, other.covariance)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean [d] and the unbiased covariance [d, d] of features [n, d], in float64. Raises what `Moments` does."""
    found = Moments().add(features)
    return found.mean, found.covariance


def squared_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """d^2 as above ("FID" is this squared distance). In units of the features, squared; never negative."""
    cross = np.linalg.svd(_root(cov_1) @ _root(cov_2), compute_uv=False).sum()
    return float(np.maximum(0.0, np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * cross))  # NaN stays


def bias(covariance: np.ndarray) -> float:
    r"""K: by how much n samples of this covariance raise d^2, K / n, as far as the features are Gaussian; heavy tails raise it more.

        K = 5/4 tr C + 1/2 sum_ij l_i l_j / (l_i + l_j),   l the eigenvalues of C

    >>> bias(np.eye(16))  # d (d + 5) / 4
    84.0
    """
    values = np.linalg.eigvalsh(covariance)
    values = values[values > 1e-12 * values.max(initial=0.0)]
    return float(1.25 * values.sum() + 0.5 * (values[:, None] * values / (values[:, None] + values)).sum())


def frechet_distance(first: np.ndarray, second: np.ndarray, features: Callable[[np.ndarray], np.ndarray] | None = None) -> float:
    """d^2 between two sets of examples [n, ...], by default with the raw values as features.

    >>> first = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(frechet_distance(first, first + 2.0), 6)  # equal covariances: the squared distance of the means
    8.0
    """
    features = features or flatten
    return Moments().add(features(first)).squared_distance(Moments().add(features(second)))


def frechet_ratio(
    generated: np.ndarray, test: np.ndarray, train: np.ndarray, features: Callable[[np.ndarray], np.ndarray] | None = None
) -> float:
    """d^2(generated, test) / d^2(train, test): 1 for samples as good as fresh real data.

    With as many generated as training examples the finite-sample bias of both distances is the same and cancels at the limit.
    It has no unit and does not change when the features are scaled.

    >>> train, test = (np.random.default_rng(seed).normal(size=(500, 4)) for seed in (0, 1))
    >>> frechet_ratio(train, test, train), frechet_ratio(train + 1.0, test, train) > 10
    (1.0, True)

    Raises:
      UserError: training and test data of the same moments, to which nothing can be compared; or what `moments` refuses.
    """
    return frechet_distance(generated, test, features) / real_distance(train, test, features)


def real_distance(train: np.ndarray, test: np.ndarray, features: Callable[[np.ndarray], np.ndarray] | None = None) -> float:
    """d^2(train, test), the unit of ratios. Raises UserError if it is 0."""
    unit = frechet_distance(train, test, features)
    if not unit > 0:
        raise UserError(
            "frechet_ratio: the training and the test data have the same mean and covariance, so there is no distance to compare with: "
            "measure on data that are not those of the training.")
    return unit


def flatten(examples: np.ndarray) -> np.ndarray:
    """The raw values as features: [n, ...] -> [n, d]."""
    return np.asarray(examples).reshape(len(examples), -1)


def pooled(images: np.ndarray, side: int) -> np.ndarray:
    """Means over fields as features: [n, H, W, C] -> [n, d] of at most side x side x C; what does not fit into fields, at the edges, is
    left out.

    >>> pooled(np.arange(16.0).reshape(1, 4, 4, 1), 2)
    array([[ 2.5,  4.5, 10.5, 12.5]])
    """
    n, height, width, channels = images.shape
    (rows, high), (columns, wide) = ((min(side, length), length // min(side, length)) for length in (height, width))
    fields = images[:, : rows * high, : columns * wide].reshape(n, rows, high, columns, wide, channels)
    return fields.mean((2, 4), dtype=np.float64).reshape(n, -1)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric positive semi-definite matrix; eigenvalues below zero are rounding errors."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
