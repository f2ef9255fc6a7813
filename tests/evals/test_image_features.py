"""Features of images by a published network, and their moments, batch by batch over all devices."""

import dataclasses
import types

import flax.linen as nn
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from mmdiff.data.modalities import Images
from mmdiff.data.sources import ArraySource
from mmdiff.encoders import preprocessing
from mmdiff.evals.frechet import Moments, moments
from mmdiff.evals.image_features import feature_moments, features_of, images_of, lite0_fd


class Means(nn.Module):
    """A network with features: means over images, by a weight; and the images themselves."""

    @nn.compact
    def features(self, images):
        return {"means": self.param("scale", nn.initializers.ones, (3,)) * images.mean((1, 2)), "images": images}


@pytest.fixture(scope="module")
def means():
    small = dataclasses.replace(preprocessing.SIGLIP, size=4)
    encoder = types.SimpleNamespace(net=Means(), params={"scale": np.float32([1, 2, 3])}, preprocessing=small)
    return features_of(encoder, ["means"], batch=2)


def test_features_of_images_of_any_size_are_those_of_each_alone(means):
    images = [(np.random.RandomState(i).random_sample((4 + i, 5, 3)) * 256).astype(np.uint8) for i in range(19)]
    small = dataclasses.replace(preprocessing.SIGLIP, size=4)
    found = means(images)
    assert found.keys() == {"means"}
    np.testing.assert_allclose(found["means"], [small(image).mean((0, 1)) * (1, 2, 3) for image in images], atol=1e-6)


def test_moments_of_a_source_are_those_of_all_features_at_once(means):
    grey = np.random.RandomState(0).uniform(-1, 1, (11, 4, 4, 1)).astype(np.float32)
    modality = Images(4, 4, 1)
    found = feature_moments(means, images_of(ArraySource({"image": grey}), modality, at_once=5), "means")
    mean, covariance = moments(((np.rint((grey + 1) * 127.5) / 127.5) - 1).mean((1, 2)) * np.float32([1, 2, 3]))
    assert found.count == 11
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-6)


def test_moments_in_parts_keep_the_digits_of_a_large_mean():
    features = np.random.default_rng(0).normal(size=(300, 3)) + 1e6
    parts = Moments()
    for part in np.split(features, [1, 7, 150]):
        parts.add(part)
    np.testing.assert_allclose(parts.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(parts.covariance, np.cov(features.T), rtol=1e-8)
    assert parts.squared_distance(Moments().add(features)) == pytest.approx(0, abs=1e-8)


@pytest.mark.slow
def test_lite0_fd_is_small_between_parts_of_one_photograph_and_large_between_two():
    def crops(photograph, start):
        return np.stack([photograph[i : i + 224, j : j + 224] for i in range(start, 200, 50) for j in range(start, 400, 50)])

    china, flower = load_sample_images().images
    same, other = lite0_fd([crops(china, 0)], [crops(china, 25)], 4), lite0_fd([crops(china, 0)], [crops(flower, 0)], 4)
    assert 0 < 10 * same < other
