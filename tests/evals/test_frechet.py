import numpy as np
import pytest
import scipy.linalg

from mmdiff.errors import UserError
from mmdiff.evals.frechet import Moments, bias, frechet_distance, frechet_ratio, moments, squared_distance


def psd(seed, size=12, rank=12):
    root = np.random.default_rng(seed).normal(size=(size, rank))
    return root @ root.T


def test_against_the_closed_form_for_commuting_covariances():
    """tr (C_1^{1/2} - C_2^{1/2})^2 for diagonal ones, rotated."""
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 4.0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    found = squared_distance(np.zeros(3), turn @ np.diag(a) @ turn.T, np.array([3.0, 0, 4.0]), turn @ np.diag(b) @ turn.T)
    assert found == pytest.approx(25 + 1 + 4 + 4, rel=1e-12)


def test_against_scipys_square_root():
    first, second, mean = psd(0), psd(1), np.arange(12.0)
    expected = mean @ mean + np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real)
    assert squared_distance(mean, first, 0 * mean, second) == pytest.approx(expected, rel=1e-9)


def test_values_in_closed_form():
    """Diagonal covariances, and two of 2 x 2: tr (C_1 C_2)^{1/2} = (tr C_1 C_2 + 2 (det C_1 C_2)^{1/2})^{1/2}."""
    found = squared_distance(np.zeros(3), np.diag([1.0, 4, 9]), np.array([1.0, 2, 2]), np.diag([4.0, 4, 1]))
    assert found == pytest.approx(14, rel=1e-13)
    first, second = np.array([[2.0, 1], [1, 2]]), np.array([[3.0, -1], [-1, 2]])
    assert squared_distance(np.zeros(2), first, np.zeros(2), second) == pytest.approx(1.0637624298626687, rel=1e-12)


@pytest.mark.parametrize("count, tolerance", [(1000, 1e-9), (40, 1e-6)])  # more and fewer samples than features
def test_against_the_published_formula_on_features(count, tolerance):
    """What FID's authors compute: scipy's square root of the product, the real part."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, count, 64)) * np.linspace(0.1, 3, 64)
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (first, second + 0.1))
    expected = (m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2)).real
    assert frechet_distance(first, second + 0.1) == pytest.approx(expected, rel=tolerance)


def test_moments_merge_to_those_of_everything():
    features = np.random.default_rng(0).normal(size=(999, 5)) * [1, 10, 0.1, 1, 1] + [0, 3, 1e4, -2, 1]
    whole = Moments().add(features)
    for hosts in (1, 2, 8):
        merged = Moments()
        for part in np.array_split(features, hosts):
            merged.merge(Moments().add(part[:5]).add(part[5:])).merge(Moments())
        assert merged.count == 999
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(merged.add(features[:3]).covariance, Moments().add(features).add(features[:3]).covariance, rtol=1e-8)


def test_bias_of_few_samples():
    """The mean over 20 sets of 1000 of a standard normal law in 16 dimensions against that law: d (d + 5) / (4 n)."""
    rng = np.random.default_rng(0)
    found = [squared_distance(*moments(rng.normal(size=(1000, 16))), np.zeros(16), np.eye(16)) for _ in range(20)]
    assert bias(np.eye(16)) / 1000 == pytest.approx(0.084)
    assert abs(np.mean(found) - 0.084) < 3 * np.std(found) / np.sqrt(20)
    assert bias(np.diag([2.0, 0, 0])) == pytest.approx(1.25 * 2 + 0.5)


def test_singular_covariances():
    """The distance of a matrix to itself is zero to the last digits, and subspaces that share nothing add their traces."""
    low = psd(2, rank=3)
    assert squared_distance(np.zeros(12), low, np.zeros(12), low) == pytest.approx(0, abs=1e-10 * np.trace(low))
    left, right = np.diag([1.0, 2, 0, 0]), np.diag([0, 0, 3.0, 4])
    assert squared_distance(np.zeros(4), left, np.zeros(4), right) == pytest.approx(10, rel=1e-12)


def test_what_is_too_large_for_a_distance_is_not_the_best_one():
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(squared_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2)))


def test_distance_of_samples_uses_float64_moments():
    rng = np.random.default_rng(0)
    shift = np.float32(4096)  # float32 moments would lose the variance next to the mean
    x, y = (rng.normal(size=(500, 3)).astype(np.float32) + shift for _ in range(2))
    mean, covariance = moments(x)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(covariance, np.cov((x - shift).T.astype(np.float64)), rtol=1e-9)
    assert 0 < frechet_distance(x, y) < 0.05
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_what_gives_no_distance_is_a_sentence():
    rng = np.random.default_rng(0)
    data, same = rng.normal(size=(8, 2)), np.ones((4, 2))
    with pytest.raises(UserError, match="the training and the test data have the same mean and covariance"):
        frechet_ratio(data, same, same)
    for bad in (1e200, -1e80, np.inf, np.nan):
        wrong = np.where(np.arange(8)[:, None] == 3, bad, data)
        for order in ((wrong, data, -data), (data, wrong, data), (data, data, wrong)):
            with pytest.raises(UserError, match="features of 1 of 8 examples, the first of them 3, are not finite or beyond 1e\\+70"):
                frechet_ratio(*order)
    assert np.isfinite(frechet_distance(1e69 * np.sign(data), data))


def test_ratio_has_no_unit_and_takes_features():
    rng = np.random.default_rng(0)
    generated, test, train = (rng.normal(size=(300, 2, 2)) for _ in range(3))
    ratio = frechet_ratio(generated, test, train)
    assert frechet_ratio(5 * generated, 5 * test, 5 * train) == pytest.approx(ratio)
    first = frechet_ratio(generated[:, 0], test[:, 0], train[:, 0])
    assert frechet_ratio(generated, test, train, lambda x: x[:, 0] * 5) == pytest.approx(first)
    assert frechet_ratio(train, test, train) == pytest.approx(1)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros(4), np.full((5, 2), np.nan)])
def test_moments_refuse(bad):
    with pytest.raises(ValueError, match="moments"):
        moments(bad)
