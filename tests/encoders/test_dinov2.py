"""DINOv2 against what transformers answers, and the published ways to resample its positions."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.dinov2 import CONFIGS, DINOv2, resample, swiglu_width
from mmdiff.errors import UserError


def net_of(name, **changes):
    return DINOv2.from_config(published.SMALL[name] | changes)


@pytest.mark.parametrize("name", ["dino", "dinoreg"])
def test_features_are_the_published_ones_at_any_size(name):
    net = net_of(name)
    params, apply = published.params(net), jax.jit(net.apply)
    for size, expected in published.golden(name).items():
        images = published.normal(name, (2, 3, *map(int, size.split("x")))).transpose(0, 2, 3, 1)
        found = apply({"params": params}, images)
        published.assert_close(np.concatenate([found["cls"][:, None], found["registers"], found["patches"]], 1), expected)
        assert found["registers"].shape[1] == (4 if name == "dinoreg" else 0)


def test_positions_are_resampled_in_each_published_way():
    table = published.normal("dino_positions", (7, 7, 4))
    for case, expected in published.golden("dino_positions").items():
        found = resample(table, expected.shape[:2], case.split()[0])
        published.assert_close(found, expected, 5e-6)


def test_positions_of_the_trained_size_stay_as_they_are():
    table = published.normal("dino_positions", (7, 7, 4))
    assert all(resample(table, (7, 7), name) is table for name in ("bicubic", "bicubic_offset", "antialiased"))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_say_how_their_program_resamples_positions(name):
    net = DINOv2.from_config(CONFIGS[name])
    registers = "reg" in name
    assert net.num_register_tokens == (4 if registers else 0)
    assert net.position_interpolation == ("antialiased" if registers else "bicubic_offset" if "_vit" in name else "bicubic")
    assert DINOv2.from_config(net.config()) == net


def facebookresearch(weights, chunk):
    """The original layout of weights in transformers' layout, with blocks in chunks of `chunk` layers, or not (0)."""
    found = {}
    for key, tensor in weights.items():
        if key.endswith((".key.weight", ".key.bias", ".value.weight", ".value.bias")):
            continue
        if ".query." in key:
            thirds = [weights[key.replace(".query.", f".{part}.")].read() for part in ("query", "key", "value")]
            key, tensor = key.replace("attention.attention.query", "attn.qkv"), Tensor.of(np.concatenate(thirds))
        if key.startswith("encoder.layer."):
            layer, rest = key.removeprefix("encoder.layer.").split(".", 1)
            key = f"blocks.{int(layer) // chunk}.{layer}.{rest}" if chunk else f"blocks.{layer}.{rest}"
        for new, original in {
            "embeddings.position_embeddings": "pos_embed", "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.": "",
            "layernorm.": "norm.", "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
            "layer_scale2.lambda1": "ls2.gamma", "weights_in": "w12", "weights_out": "w3",
        }.items():  # fmt: skip
            key = key.replace(new, original)
        found[key] = tensor
    return found


@pytest.mark.parametrize(("giant", "chunk"), [(False, 0), (False, 1), (True, 0)])
def test_all_layouts_give_the_same_parameters_which_come_back_bit_for_bit(giant, chunk):
    net = net_of("dinoreg", use_swiglu_ffn=giant)
    abstract = published.abstract(net)
    weights = {key: Tensor.of(published.weight(key, shape)) for key, shape in state_dicts.expected(abstract).items()}
    original = facebookresearch(weights, chunk)
    assert ("blocks.1.1.attn.qkv.weight" if chunk else "blocks.1.attn.qkv.weight") in original
    for layout in (weights, original, {f"backbone.{key}": tensor for key, tensor in original.items()}):
        back = state_dicts.state_dict(state_dicts.load_params(abstract, net.canonical(layout), "file"))
        assert back.keys() == weights.keys() and all(np.array_equal(back[key], tensor.read()) for key, tensor in weights.items())


def test_the_giants_mlp_is_as_wide_as_published():
    assert swiglu_width(4 * 1536) == 4096


def test_what_no_published_network_is_is_refused():
    with pytest.raises(UserError, match="one of bicubic, bicubic_offset, antialiased"):
        DINOv2(position_interpolation="nearest")
    with pytest.raises(UserError, match="qkv_bias"):
        DINOv2.from_config({"qkv_bias": False})


def test_bfloat16_is_near_float32():
    net, expected = net_of("dinoreg"), published.golden("dinoreg")["32x32"]
    images = published.normal("dinoreg", (2, 3, 32, 32)).transpose(0, 2, 3, 1)
    found = jax.jit(net.clone(dtype=jnp.bfloat16).apply)({"params": published.params(net)}, images)
    assert {array.dtype for array in found.values()} == {jnp.dtype(jnp.bfloat16)}
    published.assert_close(found["patches"].astype(jnp.float32), expected[:, 5:], 0.05)
