"""DINOv2 against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
import transformers
from originals import dinov2 as originals
from transformers_files import assert_keys, params, reopened

from mmdiff.encoders.dinov2 import CONFIGS, DINOv2

COUNTS = {"dinov2-base": 86_580_480, "dinov2-with-registers-base": 86_583_552, "dinov2-giant": 1_136_480_768}


def ours(net, loaded, images):
    found = jax.jit(net.apply)({"params": loaded}, images.transpose(0, 2, 3, 1))
    return np.concatenate([found["cls"][:, None], found["registers"], found["patches"]], 1)


def theirs(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images)).last_hidden_state.numpy()


@pytest.mark.parametrize("giant", [False, True])
@pytest.mark.parametrize("name", ["dino", "dinoreg"])
def test_images_of_any_size(name, giant, tmp_path):
    model = getattr(originals, f"_{name}")(use_swiglu_ffn=giant)
    net = DINOv2.from_config(model.config.to_dict())
    loaded = params(net, model)
    again = reopened(net, loaded, tmp_path, type(model))
    for size in ((32, 32), (16, 64), (48, 40), (71, 9), (8, 25)):
        images = published.normal("images", (2, 3, *size))
        found, expected = ours(net, loaded, images), theirs(model, images)
        print(name, giant, size, np.abs(found - expected).max(), np.abs(expected).max())
        published.assert_close(found, expected)
        np.testing.assert_array_equal(theirs(again, images), expected)


@pytest.mark.parametrize("name", ["dino", "dinoreg"])
def test_double_precision(name):
    model = getattr(originals, f"_{name}")().double()
    images = published.normal("images", (2, 3, 32, 32)).astype(np.float64)
    with jax.enable_x64(True):
        net = DINOv2.from_config(model.config.to_dict()).clone(dtype=jnp.float64)
        found, expected = ours(net, params(net, model), images), theirs(model, images)
        assert found.dtype == expected.dtype == np.float64
    print(name, np.abs(found - expected).max(), np.abs(expected).max())
    published.assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_at_full_size(name):
    net = DINOv2.from_config(CONFIGS[name])
    kind = "Dinov2WithRegisters" if net.num_register_tokens else "Dinov2"
    config = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    make = getattr(transformers, f"{kind}Model")
    count = assert_keys(net, lambda: make(getattr(transformers, f"{kind}Config")(**config)))
    assert count == COUNTS.get(name, count)
