"""Feature networks of images: equal to the originals."""

import jax
import numpy as np
import published

from mmdiff.encoders import preprocessing
from mmdiff.encoders.efficientnet_lite0 import EfficientNetLite0
from mmdiff.encoders.inception import Inception


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
