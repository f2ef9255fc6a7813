"""Feature networks: torch-fidelity's Inception, efficientnet_lite_pytorch's EfficientNet-Lite0, with the weights of `published`."""

import unittest.mock

import numpy as np
import published


def _inception(names=("64", "192", "768", "2048", "logits_unbiased", "logits")):
    """torch-fidelity's network with random weights, and a list that gets Mixed_6d.branch1x1 of each call."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with (
        unittest.mock.patch.object(module, "load_state_dict_from_url"),
        unittest.mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        net = module.FeatureExtractorInceptionV3("inception", list(names))
    _load(net, 1.4)
    maps = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    return net, maps


def _inception_answers(images):
    """Images uint8 [B, H, W, 3] -> features."""
    import torch

    net, maps = _inception()
    answers = dict(zip(net.features_list, net(torch.from_numpy(images).permute(0, 3, 1, 2)), strict=True))
    answers["spatial"] = maps[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    return {name: answer.numpy() for name, answer in answers.items()}


def _lite0(weights=None):
    """The network with weights of a file, or random ones; with padding for images of any size."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval().requires_grad_(False)
    if weights is None:
        _load(net, 1.4)
    else:
        net.load_state_dict(torch.load(weights))
    return net


def _lite0_answers(net, images):
    """Images float32 [B, H, W, 3] as the network takes them -> features."""
    import torch

    images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return {"1280": net.extract_features(images).mean((2, 3)).numpy(), "logits": net(images).numpy()}


def _load(net, gain):
    """Weights by key; those of convolutions times `gain`, which keeps signals from fading through ReLUs."""
    import torch

    state = {key: published.weight(key, tuple(value.shape)) for key, value in net.state_dict().items() if "num_batches" not in key}
    state = {key: value * np.float32(gain) if value.ndim == 4 else value for key, value in state.items()}
    net.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)


def _photographs():
    """The two that scikit-learn ships, uint8."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def inception():
    return _inception_answers((np.random.RandomState(0).random_sample((2, 64, 48, 3)) * 256).astype(np.uint8))


def efficientnet_lite0():
    return _lite0_answers(_lite0(), published.normal("images", (2, 65, 51, 3)))
