"""UniDiffuser's network in the authors' layout and in diffusers': the published function, round trips bit for bit, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff import nets
from mmdiff.convert import layouts, unidiffuser
from mmdiff.convert.kinds import KINDS, check_config, check_network, kind_of
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError

GOLDEN = published.golden("unidiffuser")
TIMES = {"image": np.array([1.0, 0.25, 0.0]), "text": np.array([0.037, 1.0, 0.4])}
AUTHORS, DIFFUSERS = unidiffuser.UNIDIFFUSER, unidiffuser.UNIDIFFUSER_DIFFUSERS


def net_of(**fields):
    modalities = dict(image=nets.Patches(8, 8, 4, 2), vision=nets.Vectors(6), text=nets.Vectors(5, 7))
    return nets.UViT(**{**modalities, **dict(depth=4, width=32, heads=4, data_types=2, data_type=1), **fields})


def inputs(dtype=jnp.float32):
    image = published.normal("image", (3, 4, 8, 8)).transpose(0, 2, 3, 1)
    x = {"image": image, "vision": published.normal("vision", (3, 1, 6))[:, 0], "text": published.normal("text", (3, 7, 5))}
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), (x, {**TIMES, "vision": TIMES["image"]}))


def shapes_of(net):
    shapes = {"image": (net.image.height, net.image.width, 4), "vision": (net.vision.size,), "text": (net.text.count, net.text.size)}
    x, t = {name: jnp.zeros((1, *shape)) for name, shape in shapes.items()}, dict.fromkeys(shapes, jnp.ones(1))
    return jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]


@functools.cache
def weights():
    """diffusers' state dict, with its copy of the patches' layer, key -> array."""
    shapes = {key: tuple(map(int, shape.split())) for key, shape in zip(GOLDEN["keys"].tolist(), GOLDEN["shapes"].tolist())}
    found = {key: published.weight(key, shape) for key, shape in shapes.items()}
    return found | {f"transformer.pos_embed.proj.{leaf}": found[f"vae_img_in.proj.{leaf}"] for leaf in ("weight", "bias")}


def loaded(net, arrays):
    return layouts.load(AUTHORS, net, shapes_of(net), {key: Tensor.of(array) for key, array in arrays.items()}, "uvit.pth")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype and found[key].flags.c_contiguous
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def assert_golden(out):
    out = jax.tree.map(np.asarray, out)
    for name, answer in {"image": out["image"].transpose(0, 3, 1, 2), "vision": out["vision"][:, None], "text": out["text"]}.items():
        published.assert_close(answer, GOLDEN[name], 5e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_the_published_function_and_its_weights_back_in_both_layouts(scan):
    """To the precision of the features of times, which diffusers has in float32."""
    net = net_of(scan=scan)
    params = loaded(net, weights())
    assert_same(layouts.state_dict(DIFFUSERS, net, params), weights())
    authors = layouts.state_dict(AUTHORS, net, params)
    jax.tree.map(np.testing.assert_array_equal, loaded(net, authors), params)
    if scan:
        assert_golden(jax.jit(net.apply)({"params": params}, *inputs()))
        with jax.enable_x64(True):
            wide = net.copy(dtype=jnp.float64).apply
            assert_golden(jax.jit(wide)({"params": jax.tree.map(np.float64, params)}, *inputs(jnp.float64)))


def test_the_authors_names():
    """As their file has them, at depth 4: two blocks on each side of the one in the middle."""
    net, leaves = net_of(), ("weight", "bias")
    block = ["attn.qkv.weight", *(f"{part}.{leaf}" for part in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "norm3") for leaf in leaves)]
    skip = [f"{part}.{leaf}" for part in ("norm1", "skip_linear") for leaf in leaves]
    outside = ("patch_embed.proj", "text_embed", "clip_img_embed", "norm", "decoder_pred", "clip_img_out", "text_out")
    expected = {"pos_embed", "pos_embed_token", "token_embedding.weight", *(f"{part}.{leaf}" for part in outside for leaf in leaves)}
    expected |= {f"{part}.{name}" for part in ("in_blocks.0", "in_blocks.1", "mid_block") for name in block}
    expected |= {f"out_blocks.{i}.{name}" for i in range(2) for name in block + skip}
    found = layouts.state_dict(AUTHORS, net, loaded(net, weights()))
    assert set(found) == expected
    assert found["pos_embed"].shape == (1, 2 + 7 + 1 + 16, 32) and found["pos_embed_token"].shape == (1, 1, 32)
    fused = [weights()[f"transformer.transformer_mid_block.attn1.to_{part}.weight"] for part in "qkv"]
    np.testing.assert_array_equal(found["mid_block.attn.qkv.weight"], np.concatenate(fused))


def test_the_first_version_has_no_kinds_of_data():
    net = net_of(data_types=0, data_type=0)
    first = {key: array for key, array in weights().items() if "data_type" not in key}
    assert_same(layouts.state_dict(DIFFUSERS, net, loaded(net, first)), first)
    with pytest.raises(UserError, match="has pos_embed_token, token_embedding.weight, which the network has no place for"):
        loaded(net, weights())
    with pytest.raises(UserError, match="lacks token_embedding.weight"):
        loaded(net_of(), first)


@pytest.mark.parametrize("types", [("bfloat16", "float8_e4m3fn"), ("float16", "bfloat16"), ("float16", "float32")])
def test_positions_and_the_kind_s_may_have_different_types(types):
    keys = ("pos_embed", "data_type_pos_embed_token")
    mixed = {next(own for own in weights() if own.endswith(key)): jnp.dtype(dtype) for key, dtype in zip(keys, types)}
    mixed = {key: weights()[key].astype(dtype) for key, dtype in mixed.items()}
    exact = {key: array.astype(np.float32) for key, array in mixed.items()}
    jax.tree.map(np.testing.assert_array_equal, loaded(net_of(), weights() | mixed), loaded(net_of(), weights() | exact))


def without(part):
    return lambda: {key: array for key, array in weights().items() if part not in key}


def cast(key, dtype):
    return lambda: weights() | {key: weights()[key].astype(dtype)}


@pytest.mark.parametrize("arrays, fields, words", [
    (without("mid_block.ff.net.2.bias"), {}, "uvit.pth lacks mid_block.mlp.fc2.bias"),
    (without("mid_block.attn1.to_k"), {}, "uvit.pth lacks mid_block.attn.qkv.weight"),
    (weights, {"depth": 6}, "uvit.pth lacks in_blocks.2.attn.proj.bias"),
    (weights, {"depth": 2}, "uvit.pth has in_blocks.1.attn.proj.weight"),
    (weights, {"width": 64}, r"pos_embed \[1, 26, 32\] is not the table of positions \[1, 26, 64\]"),
    (weights, {"image": nets.Patches(16, 16, 4, 2)}, r"pos_embed \[1, 26, 32\] is not the table of positions \[1, 74, 32\]"),
    (weights, {"vision": nets.Vectors(9)}, r"has other shapes than the network: clip_img_embed.weight \[32, 6\] for \[32, 9\]"),
    (lambda: weights() | {"data_type_pos_embed_token": np.zeros((1, 2, 32), np.float32)}, {}, r"pos_embed_token \[1, 2, 32\] is not"),
    (lambda: weights() | {"text_out.bias": np.full(5, np.nan, np.float32)}, {}, "has values that are not finite, of text_out.bias"),
    (cast("text_out.bias", bool), {}, r"uvit.pth has numbers that are no floats, as weights are: text_out.bias \(bool\). Get them"),
    (cast("transformer.transformer_mid_block.attn1.to_k.weight", np.int8), {}, r"no floats, .*: mid_block.attn.qkv.weight \(int8\)"),
    (cast("data_type_pos_embed_token", np.int64), {}, r"no floats, .*: pos_embed.weight \(int64\)"),
])  # fmt: skip
def test_other_weights_are_refused_in_one_sentence(arrays, fields, words):
    with pytest.raises(UserError, match=words) as raised:
        loaded(net_of(**fields), arrays())
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_another_function_is_refused():
    net, kind = net_of(), KINDS["unidiffuser"]
    assert kind_of(net) == "unidiffuser" and check_network("unidiffuser", net, "it") is kind and "AGPL" in kind.licence
    config = unidiffuser.diffusers_config(net, {})
    check_config(kind, config, net, "folder")
    for change, words in (
        ({"pre_layer_norm": True}, "folder has pre_layer_norm True in its config.json, and the network of the config False"),
        ({"_class_name": "AutoencoderKL"}, "folder is of AutoencoderKL by its config.json"),
    ):
        with pytest.raises(UserError, match=words):
            check_config(kind, config | change, net, "folder")
    with pytest.raises(UserError, match=r"for a network with norm_eps=1e-05 \(here 1e-06\)"):
        check_network("unidiffuser", net_of(norm_eps=1e-6), "it")
    with pytest.raises(UserError, match="diffusers' UniDiffuser has square images"):
        unidiffuser.diffusers_config(net_of(image=nets.Patches(8, 4, 4, 2)), {})
