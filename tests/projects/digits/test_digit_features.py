"""Features of the digits: fixed, of unit size, saying what a digit is; the projection keeps them whole."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data.masks import hide
from mmdiff.data.modalities import Features
from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.evals.plots import grid
from mmdiff.projects.digits.digit_features import SIZE, digit_features, distance, projection, represented
from mmdiff.projects.digits.digits import digits_source


@functools.cache
def digits():
    return digits_source("test").arrays


def test_features_have_root_mean_square_one_and_are_always_the_same():
    found = digit_features()(digits()["image"])
    assert found.shape == (500, SIZE) and found.dtype == np.float32
    np.testing.assert_allclose(np.sqrt((found**2).mean(1)), 1, atol=1e-6)
    assert digit_features() is digit_features()
    digit_features.cache_clear()
    np.testing.assert_array_equal(digit_features()(digits()["image"]), found)
    np.testing.assert_allclose(digit_features()(digits()["image"][7:9]), found[7:9], atol=1e-6)


def test_they_say_what_a_digit_is():
    """A test digit's class is that of the nearest mean of training digits, most of the time."""
    train = digits_source("train").arrays
    of_train, of_test = (digit_features()(arrays["image"]) for arrays in (train, digits()))
    means = np.stack([of_train[train["label"] == c].mean(0) for c in range(10)])
    assert (np.argmin(((of_test[:, None] - means) ** 2).mean(-1), 1) == digits()["label"]).mean() > 0.95


def test_distance():
    images, other = digits()["image"][:-1], digits()["image"][1:]
    far = distance(images, other)
    assert far.shape == (499,) and far.min() > 0 and far.max() <= 4
    np.testing.assert_array_equal(distance(images, images), 0)
    np.testing.assert_array_equal(distance(other, images), far)
    a, b = (digit_features()(x) for x in (images, other))
    np.testing.assert_allclose(far, 2 * (1 - (a * b).mean(1)), atol=1e-5)
    same = digits()["label"][:-1] == digits()["label"][1:]
    assert far[~same].mean() > 3 * far[same].mean()
    # The more of a digit is hidden, the further it is from itself.
    rows = np.arange(8)[:, None, None]
    hidden = [distance(images, np.asarray(hide(images, np.broadcast_to(rows < count, (8, 8, 1))))).mean() for count in (0, 2, 4, 6)]
    assert hidden[0] == 0 and (np.diff(hidden) > 0.1).all()


def test_digits_with_their_features():
    source = ArraySource({name: array[:20] for name, array in digits().items()})
    found = represented(source).take(np.array([3, 19, 3]))
    assert set(found) == {"image", "label", "representation"}
    np.testing.assert_array_equal(found["image"], digits()["image"][[3, 19, 3]])
    np.testing.assert_allclose(found["representation"], digit_features()(digits()["image"][[3, 19, 3]]), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 2, 4)])
def test_a_projection_keeps_angles_and_can_be_undone(shape):
    rng = np.random.default_rng(0)
    vectors = Features(32).random(rng, 40)
    arrays = np.asarray(projection(32, shape, 0.85)(jnp.asarray(vectors)), np.float64)
    assert arrays.shape == (40, *shape)
    flat = arrays.reshape(40, -1)
    np.testing.assert_allclose(np.sqrt((flat**2).mean(1)), 0.85, atol=1e-5)  # the root mean square asked for
    np.testing.assert_allclose(flat @ flat.T / flat.shape[1], 0.85**2 * vectors @ vectors.T / 32, atol=1e-5)
    np.testing.assert_array_equal(projection(32, shape, 0.85)(jnp.asarray(vectors)), arrays.astype(np.float32))
    columns = np.asarray(projection(32, shape, 0.85)(jnp.eye(32)), np.float64).reshape(32, -1)
    np.testing.assert_allclose(flat @ np.linalg.pinv(columns), vectors, atol=1e-4)
    assert np.abs(columns).max() < 0.9 * np.linalg.norm(columns, axis=1).min() or np.prod(shape) == 32  # it spreads a number out


def test_a_projection_into_less():
    with pytest.raises(ValueError, match=r"of 32 numbers into the shape \(5, 5, 1\) would lose some: it holds 25"):
        projection(32, (5, 5, 1), 1.0)


def test_the_modality(tmp_path):
    modality = Features(6)
    vectors = modality.random(np.random.default_rng(0), 5)
    assert modality.shape == (6,) and vectors.dtype == np.float32
    np.testing.assert_allclose((vectors**2).mean(1), 1, atol=1e-6)
    np.savez(tmp_path / "samples.npz", representation=vectors, label=np.arange(5))
    np.save(tmp_path / "one.npy", vectors[0].astype(np.float64))
    np.testing.assert_array_equal(modality.parse(str(tmp_path / "samples.npz")), vectors)
    np.testing.assert_array_equal(modality.parse(str(tmp_path / "one.npy")), vectors[:1])
    wrong = {r"\[n, 6\], got \[2, 5\]": np.zeros((2, 5)), "not finite": np.full((1, 6), np.nan), "finite floats": np.zeros((1, 6), int)}
    for message, array in wrong.items():
        with pytest.raises(UserError, match=message):
            modality.check(array)
    with pytest.raises(UserError, match="come in .npy or .npz"):
        modality.parse("7.png")


def test_words_beside_rows_are_whole():
    images = np.full((4, 28, 28, 1), 255, np.uint8)
    narrow, wide = (np.asarray(grid(images, 2, rows=rows)) for rows in (["0", "9"], ["T-shirt", "Ankle boot"]))
    pictures = 2 * 84 + 8
    assert narrow.shape[1] == 44 + pictures and wide.shape[1] > 44 + pictures
    for sheet in (narrow, wide):
        left = sheet[:, : sheet.shape[1] - pictures, 3] > 0  # where something is written
        assert left.any() and not left[:, :2].any() and not left[:, -4:].any()
