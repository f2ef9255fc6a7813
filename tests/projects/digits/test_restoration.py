"""The evaluator of hidden patches, with an oracle in the network's place: the truth has no error, and a fill is as good as the fill."""

import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmdiff.data.modalities import Images
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.projects.digits.restoration import Restoration, error, linear_fill

COUNTS, DRAWS = (5, 15), 4


def config():
    return ml_collections.ConfigDict({"seed": 3, "sample": {"steps": 6, "guidance": 1.5}})


def measured(train, test, fill):
    """The results of a model that draws `fill(images, train, keys)` where the true images, which it knows by heart, are `images`.

    From nothing it draws training images.
    """
    train, test = (ArraySource({"image": load_all(source)["image"][:count]}) for source, count in ((train, 300), (test, 120)))
    known = {"train": jnp.asarray(train.arrays["image"]), "test": jnp.asarray(test.arrays["image"])}

    def sample(known, keys, given, *, steps, guidance, absent=(), history=False):
        assert (steps, guidance) == (6, 1.5)
        any_row = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(known["train"])))(keys)
        images = known["train"][any_row]
        if given:
            apart = jnp.where(given["mask"][:, None] > 0, 0, given["masked"][:, None] - known["test"])
            sampled = fill(known["test"][(apart**2).sum((2, 3, 4)).argmin(1)], known["train"], keys)
            images = jnp.where(given["mask"].all((1, 2, 3), keepdims=True), images, sampled)
        assert given.keys() == ({"masked", "mask"} - set(absent))
        return {"image": jnp.stack([images] * 7) if history else images}

    experiment = types.SimpleNamespace(
        sample=sample, train_data=lambda: train, test_data=lambda: test, modalities={"image": Images(8, 8, 1)})
    evaluate = Restoration(2, 10, lambda a, b: ((a - b) ** 2).mean((1, 2, 3)), "pixels", counts=COUNTS, draws=DRAWS)
    return evaluate(experiment, known, config(), jax.random.key(0), 7)


def test_the_truth_has_no_error(train, test):
    found = measured(train, test, lambda images, train, keys: images)
    metrics = found.metrics
    assert set(metrics) == set(found.definitions)
    for count in COUNTS:
        assert metrics[f"hidden_error/{count}"] < 1e-12 and metrics[f"seen_error/{count}"] < 1e-12
        assert metrics[f"hidden_error_one/{count}"] < 1e-12 and metrics[f"perceptual/{count}"] < 1e-12
        assert 0.05 < metrics[f"hidden_error_linear/{count}"] < metrics[f"hidden_error_mean/{count}"] < 0.5
        assert 0 < metrics[f"perceptual_linear/{count}"] < metrics[f"perceptual_mean/{count}"] < metrics[f"perceptual_masked/{count}"]
    assert metrics["perceptual_masked/15"] > metrics["perceptual_masked/5"]
    assert 0 < metrics["frechet_ratio"] < 2 and 0 < metrics["frechet_ratio_absent"] < 2
    json.dumps(found.settings)
    assert found.settings["draws"] == DRAWS and len(found.figures) == len(COUNTS) + 2
    assert all(picture.caption and min(picture.image.size) > 100 for picture in found.figures.values())


def test_the_mean_is_as_good_as_the_mean_fill(train, test):
    metrics = measured(train, test, lambda images, train, keys: jnp.broadcast_to(train.mean(0), images.shape)).metrics
    for count in COUNTS:
        for name in ("hidden_error", "hidden_error_one"):
            assert metrics[f"{name}/{count}"] == pytest.approx(metrics[f"hidden_error_mean/{count}"], rel=1e-4)
        assert metrics[f"perceptual/{count}"] == pytest.approx(metrics[f"perceptual_mean/{count}"], rel=1e-4)  # seen pixels are copied in
        assert metrics[f"seen_error/{count}"] > 0.1  # as sampled, they are not


def test_noise_is_averaged_over_the_draws_and_no_more(train, test):
    """The mean of n draws x + e has the error var / n, one of them var."""

    def noisy(images, train, keys):
        return images * 0.5 + 0.5 * jax.vmap(lambda key: jax.random.uniform(key, (8, 8, 1), minval=-1.0, maxval=1.0))(keys)

    metrics = measured(train, test, noisy).metrics
    for count in COUNTS:
        one, mean = metrics[f"hidden_error_one/{count}"], metrics[f"hidden_error/{count}"]
        assert one - mean == pytest.approx((1 - 1 / DRAWS) / 12, rel=0.1)
        assert metrics[f"seen_error/{count}"] > 0.1 and one > metrics[f"hidden_error_linear/{count}"]


def test_linear_fill_is_the_regression():
    rng = np.random.default_rng(0)
    few = rng.uniform(-0.5, 0.5, (400, 3))
    images = (few @ rng.normal(size=(3, 16)) + 0.1).reshape(400, 4, 4, 1).astype(np.float32)  # three numbers decide all 16
    mask = np.zeros((400, 4, 4, 1))
    mask[:, :2] = 1
    filled = linear_fill(np.where(mask > 0, 0, images), mask, images, ridge=1e-8)
    np.testing.assert_allclose(filled, images, atol=1e-2)
    np.testing.assert_array_equal(filled[:, 2:], images[:, 2:])
    np.testing.assert_allclose(linear_fill(0 * images[:1], 0 * mask[:1] + 1, images)[0], images.mean(0), atol=1e-6)
    np.testing.assert_array_equal(linear_fill(images, 0 * mask, images), images)


def test_errors_count_where_they_are_asked_for():
    real, where = np.zeros((2, 2, 2, 3)), np.zeros((2, 2, 2, 1))
    sampled = real + 5
    where[0, 0, 0], sampled[0, 0, 0] = 1, 2
    assert error(sampled, real, where) == 4 and error(sampled, real, 1 - where) == 25
