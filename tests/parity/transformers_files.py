"""What every comparison with transformers does: its weights in our network, our file in its loader, key lists at full size."""

import json
import math

import jax
import numpy as np
import published
import torch
from safetensors.numpy import save_file

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor


def params(net, model):
    """Our parameters from a model's state dict, in the model's own precision; what we give back is equal bit for bit."""
    weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    dtype = next(iter(weights.values())).dtype
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), published.abstract(net))
    loaded = state_dicts.load_params(abstract, net.canonical({key: Tensor.of(array) for key, array in weights.items()}), "transformers")
    written = state_dicts.state_dict(loaded)
    assert all(np.array_equal(array, weights[key]) and array.dtype == dtype for key, array in written.items())
    return loaded


def reopened(net, loaded, folder, cls):
    """The model that transformers opens from what we write; it misses nothing and meets nothing that it does not know."""
    (folder / "config.json").write_text(json.dumps(net.config()), encoding="utf-8")
    save_file(state_dicts.state_dict(loaded), folder / "model.safetensors", {"format": "pt"})
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_keys(net, make):
    """The network's keys and shapes are those of the original, which takes no memory. Returns the number of parameters."""
    with torch.device("meta"):
        model = make()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    canonical = net.canonical({key: Tensor(shape, np.dtype(np.float32), None) for key, shape in shapes.items()})
    expected = state_dicts.expected(published.abstract(net))
    assert {key: tensor.shape for key, tensor in canonical.items()} == expected
    return sum(math.prod(shape) for shape in expected.values())
