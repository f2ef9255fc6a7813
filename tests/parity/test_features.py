"""Inception against torch-fidelity, EfficientNet-Lite0 against its package, with the real weights of the latter."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
from originals import features as originals

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders import efficientnet_lite0, preprocessing
from mmdiff.encoders.efficientnet_lite0 import EfficientNetLite0
from mmdiff.encoders.inception import Inception


def tensors(net):
    return {key: Tensor.of(value.numpy()) for key, value in net.state_dict().items()}


def params(net, original):
    weights = net.canonical(tensors(original))
    assert {key: tensor.shape for key, tensor in weights.items()} == state_dicts.expected(published.abstract(net))
    loaded = state_dicts.load_params(published.abstract(net), weights, "torch")
    written = state_dicts.state_dict(loaded)
    assert all(np.array_equal(written[key], tensor.read()) for key, tensor in weights.items())  # the round trip, bit for bit
    original.load_state_dict({key: torch.from_numpy(value) for key, value in written.items()}, strict=False)
    return loaded


@pytest.mark.parametrize("shape", [(2, 64, 48, 3), (1, 301, 333, 3), (1, 299, 299, 3)])
def test_inception_of_images_of_any_size(shape):
    images = (np.random.RandomState(1).random_sample(shape) * 256).astype(np.uint8)
    net = Inception()
    loaded = params(net, originals._inception()[0])
    found = jax.jit(net.apply)({"params": loaded}, np.stack([preprocessing.INCEPTION(image) for image in images]))
    for name, answer in originals._inception_answers(images).items():
        print(shape, name, np.abs(found[name] - answer).max(), np.abs(answer).max())
        published.assert_close(found[name], answer)


@pytest.mark.parametrize("shape", [(2, 224, 224, 3), (1, 160, 192, 3), (1, 97, 131, 3)])
def test_efficientnet_lite0_with_its_real_weights(shape):
    original = originals._lite0(efficientnet_lite0.installed_weights())
    net = EfficientNetLite0()
    loaded = params(net, original)
    images = published.normal("images", shape)
    found = jax.jit(net.apply)({"params": loaded}, jnp.asarray(images))
    for name, answer in originals._lite0_answers(original, images).items():
        print(shape, name, np.abs(found[name] - answer).max(), np.abs(answer).max())
        published.assert_close(found[name], answer)
