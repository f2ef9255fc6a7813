"""Weights and inputs of the golden files, made from names by NumPy's frozen legacy stream: no weights are stored.

`make_golden.py` loads them into the published implementations and stores what these answer; the tests make the same from our networks'
own shapes, which tests the keys, too.
"""

import functools
import math
import pathlib
import sys
import types
import zlib

import jax
import numpy as np

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor

GOLDEN = pathlib.Path(__file__).parent / "golden"
POSITIONS = ("embedding", "shared", "embed_tokens", "token", "pos_embed", "probe")

# 90 ends a text: in the second there are larger ids, and it comes twice.
CLIP_IDS = [[98, 5, 17, 90, 0, 0, 0, 0], [98, 3, 90, 99, 95, 90, 1, 0], [98, 2, 4, 6, 8, 10, 12, 90]]
CLIP_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

# Reduced sizes: what the config.json of a golden file's network states.
SMALL = {
    "bert": {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64},
    "clip": {
        "projection_dim": 16,
        "text_config": CLIP_SIZES | {"vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 90, "bos_token_id": 98},
        "vision_config": CLIP_SIZES | {"image_size": 32, "patch_size": 8}},
    "open_clip": {
        "embed_dim": 16, "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}},
    "t5": {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    "dino": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    "dinoreg": {
        "model_type": "dinov2_with_registers", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8},
}  # fmt: skip


def normal(name, shape):
    """Standard normal numbers float32 that belong to a name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weight(key, shape):
    """The weights of a published key."""
    stream = np.random.RandomState(zlib.crc32(key.encode()))
    x = stream.standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return (0.5 + stream.random_sample(shape)).astype(np.float32)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * x
    if len(shape) <= 1:
        return 1 + 0.1 * x
    if any(part in key for part in POSITIONS):
        return 0.5 * x
    return (x / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def token_ids(name, shape, size):
    """Token ids int32 in 0 .. size - 1 that belong to a name."""
    return np.random.RandomState(zlib.crc32(name.encode())).randint(0, size, shape).astype(np.int32)


def masked(shape, padding):
    """Attention mask int32 of texts whose last one has `padding` tokens at the end that do not count."""
    mask = np.ones(shape, np.int32)
    mask[-1, shape[-1] - padding :] = 0
    return mask


def prepare_torchvision():
    """Beside a PyTorch for CPUs only, PyPI's torchvision fails as it describes its compiled operators: its transforms do without them."""
    import torch

    if torch.version.cuda is None:
        for name in ("torchvision._meta_registrations", "torchvision._autograd_registrations"):
            sys.modules.setdefault(name, types.ModuleType(name))


def torch_model(model):
    """A published model, with the weights of its keys."""
    import torch

    found, first = {}, {}
    for key, tensor in model.state_dict().items():
        name = first.setdefault(tensor.data_ptr() or key, key)  # a tied parameter has the weights of its first key
        found[key] = torch.from_numpy(np.asarray(weight(name, tuple(tensor.shape)))) if tensor.is_floating_point() else tensor
    model.load_state_dict(found)
    return model.eval()


@functools.cache
def abstract(net):
    """The parameters' shapes."""
    return jax.eval_shape(net.init, jax.random.key(0), *net.example_inputs())["params"]


def params(net):
    """The network's parameters, by the keys that it has."""
    shapes = abstract(net)
    weights = {key: Tensor.of(weight(key, shape)) for key, shape in state_dicts.expected(shapes).items()}
    return state_dicts.load_params(shapes, weights, "golden")


def golden(name):
    """What the published implementation answered."""
    with np.load(GOLDEN / f"{name}.npz") as found:
        return dict(found)


def assert_close(found, expected, tolerance=2e-5):
    """max |found - expected| <= tolerance * max(1, max |expected|)."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    error, size = np.abs(found - expected).max(), max(1.0, np.abs(expected).max())
    assert error <= tolerance * size, f"max |difference| {error:.2e} of {size:.2f}"
