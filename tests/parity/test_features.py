"""Inception against torch-fidelity, EfficientNet-Lite0 against its package, with the real weights of the latter."""

import types

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
from mmdiff.evals.image_features import feature_moments, features_of


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


def test_the_layout_of_pytorch_fid():
    import torchvision

    with torch.device("meta"):  # pytorch-fid loads its file into this class, with other poolings
        original = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    shapes = {key: tuple(value.shape) for key, value in original.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert shapes == state_dicts.expected(published.abstract(Inception()))


def test_frechet_distances_of_inceptions_features():
    from torch_fidelity import metric_fid

    sets = [(np.random.RandomState(i).random_sample((72, 32, 40, 3)) * (256 - 30 * i)).astype(np.uint8) for i in range(2)]
    original = originals._inception(["64"])[0]
    encoder = types.SimpleNamespace(net=Inception(), params=params(Inception(), original), preprocessing=preprocessing.INCEPTION)
    features = features_of(encoder, ["64"], batch=36)
    first, second = (feature_moments(features, np.split(images, 2), "64") for images in sets)
    found = first.squared_distance(second)
    theirs = [original(torch.from_numpy(images).permute(0, 3, 1, 2))[0] for images in sets]
    statistics = [metric_fid.fid_features_to_statistics(each) for each in theirs]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]
    print("FID of 64 features", found, expected)
    assert found == pytest.approx(expected, rel=1e-5)


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
