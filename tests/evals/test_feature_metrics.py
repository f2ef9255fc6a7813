"""Inception Score, precision, recall and KID where their values are known."""

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.evals import feature_metrics
from mmdiff.evals.feature_metrics import inception_score, kernel_distance, precision_recall, squared_mmd


def one_hot(labels, scale=1e4):
    return scale * np.eye(10)[labels]


def test_inception_score_of_certain_classes_is_their_number():
    labels = np.arange(1000) % 10
    assert inception_score(one_hot(labels), seed=None) == pytest.approx((10, 0), abs=1e-12)
    assert inception_score(one_hot(np.sort(labels)), seed=None) == pytest.approx((1, 0), abs=1e-12)  # sorted by class,
    assert inception_score(one_hot(np.sort(labels)))[0] > 9  # and shuffled
    assert inception_score(np.zeros((100, 10))) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_of_smoothed_classes():
    p = 0.9 * np.eye(10)[np.arange(1000) % 10] + 0.01
    assert inception_score(np.log(p), splits=1)[0] == pytest.approx(6.06355983, rel=1e-8)
    # Splits of unequal sizes, each with its own mean: the plain formula.
    logits = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    parts = [logits[i * 23 // 4 : (i + 1) * 23 // 4].astype(np.float64) for i in range(4)]
    p = [np.exp(part) / np.exp(part).sum(1, keepdims=True) for part in parts]
    expected = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in p]
    np.testing.assert_allclose(inception_score(logits, 4, None), (np.mean(expected), np.std(expected)), rtol=1e-12)


def test_precision_and_recall_where_they_are_known(monkeypatch):
    features = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features, features + 100) == (0.0, 0.0)
    real = np.arange(10.0)[:, None]
    generated = np.array([0, 1, 2, 3, 4, 1000, 2000, 3000, 4000, 5000.0])[:, None]
    assert precision_recall(generated, real) == (0.5, 1.0)  # far apart, they have balls that reach everything
    assert precision_recall(np.repeat(features[:1], 1000, 0), features) == (1.0, 1 / 500)  # "<=": a ball of no radius has its center
    monkeypatch.setattr(feature_metrics, "BLOCK", 5000)  # 10 rows at a time, the last ones fewer
    assert precision_recall(features[:493], features) == (1.0, pytest.approx(exact_recall(features[:493], features)))


def exact_recall(generated, real, k=3):
    distances = np.linalg.norm(generated[:, None].astype(np.float64) - generated, axis=-1)
    radii = np.sort(distances, 1)[:, k]
    return float((np.linalg.norm(real[:, None].astype(np.float64) - generated, axis=-1) <= radii).any(1).mean())


def test_kernel_distance_is_unbiased():
    """Of laws N(0, 1) and N(mu, 1), mu = 1/2 in eight dimensions, from the kernel's moments; the same law has 0."""
    stream = np.random.default_rng(0)
    for shift, expected in ((0.0, 0.0), (0.5, 1.1171875)):
        found = [squared_mmd(stream.normal(size=(10, 8)), stream.normal(size=(10, 8)) + shift) for _ in range(4000)]
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(len(found))


def test_kernel_distance_is_the_mean_over_subsets():
    first, second = np.random.default_rng(0).normal(size=(2, 40, 6))
    stream = np.random.RandomState(7)
    parts = [(stream.choice(40, 25, replace=False), stream.choice(40, 25, replace=False)) for _ in range(5)]
    found = [squared_mmd(first[a], second[b]) for a, b in parts]
    assert kernel_distance(first, second, 5, 25, seed=7) == (pytest.approx(np.mean(found)), pytest.approx(np.std(found)))
    assert kernel_distance(first, second, 3, 40)[1] == pytest.approx(0)  # all of them, in any order
    everything = [((a @ b.T / 6 + 1) ** 3) for a, b in ((first, first), (second, second), (first, second))]
    sums = [(gram.sum() - np.trace(gram)) / (40 * 39) for gram in everything[:2]]
    assert kernel_distance(first, second, 1, 40)[0] == pytest.approx(sum(sums) - 2 * everything[2].mean())


def test_what_cannot_be_measured_is_a_sentence():
    good, bad = np.ones((20, 3)), np.full((20, 3), np.nan)
    for call, sentence in (
        (lambda: inception_score(np.ones((9, 3))), "9 examples are too few, it takes 10 or more"),
        (lambda: inception_score(bad), "20 of 20 examples, the first of them 0, are not finite"),
        (lambda: precision_recall(np.ones((3, 3)), good), "precision and recall: 3 examples are too few, it takes 4"),
        (lambda: precision_recall(np.ones((20, 4)), good), "features of 4 and of 3 numbers cannot be compared"),
        (lambda: precision_recall(good, bad), "are not finite"),
        (lambda: kernel_distance(good, good), "KID: 20 examples are too few, it takes 1,000"),
        (lambda: kernel_distance(good, np.ones((20, 4)), size=5), "features of 3 and of 4"),
        (lambda: kernel_distance(np.ones(5), good, size=5), r"needs an array \[n, d\], got shape \[5\]"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
