"""VQ-Diffusion's and CDCD's transformers in their published layouts: the published functions, and round trips bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from mmdiff import nets
from mmdiff.convert import layouts, vq_diffusion
from mmdiff.convert.kinds import KINDS, kind_of
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError

SIZES = dict(classes=12, grid=(4, 4), positions=(6, 6), width=32, heads=4, depth=2, times=10, mlp_ratio=2.0)
FIELDS = {"text": dict(context=("text",)), "class": dict(labels=7, conv=True)}
LAYOUT = KINDS["vq-diffusion"].layout
X = {"tokens": jnp.asarray(published.token_ids("vq tokens", (3, 16), 13)), "label": jnp.asarray([0, 5, 6])}
T = {"tokens": (np.array([0, 4, 9]) + 1) / 10}


def net_of(of, **fields):
    return nets.TokenTransformer(**{**SIZES, **FIELDS[of], **fields})


def inputs(dtype=jnp.float32):
    return X | {"text": jnp.asarray(published.normal("vq context", (3, 7, 24)), dtype)}, {"tokens": jnp.asarray(T["tokens"], dtype)}


def shapes_of(net):
    return jax.eval_shape(net.init, jax.random.key(0), *inputs())["params"]


def weights(of):
    golden = published.golden(f"vq_diffusion_{of}")
    shapes = {key: tuple(map(int, shape.split())) for key, shape in zip(golden["keys"].tolist(), golden["shapes"].tolist())}
    return {key: published.weight(key, shape) for key, shape in shapes.items()}, golden["logits"]


def loaded(net, arrays):
    return layouts.load(LAYOUT, net, shapes_of(net), {key: Tensor.of(array) for key, array in arrays.items()}, "it.pth")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key].view(np.uint8), np.ascontiguousarray(array).view(np.uint8), err_msg=key)


@pytest.mark.parametrize("of", ["text", "class"])
def test_the_published_function_and_its_weights_back(of):
    arrays, logits = weights(of)
    # A checkpoint of the whole system: other parts, buffers, and the prefix of the model's or of its average's keys.
    whole = {f"transformer.transformer.{key}": array for key, array in arrays.items()}
    others = ("transformer.log_at", "content_codec.x", "transformer.transformer.blocks.0.attn2.mask")
    whole |= {key: np.zeros(1) for key in others}
    net = net_of(of)
    params = loaded(net, whole)
    written = layouts.state_dict(LAYOUT, net, params)
    assert_same(written, {f"transformer.{key}": array for key, array in arrays.items()})
    jax.tree.map(np.testing.assert_array_equal, loaded(net_of(of), written), params)

    assert kind_of(net) == "vq-diffusion"
    published.assert_close(jax.jit(net.apply)({"params": params}, *inputs())["tokens"], logits)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        if of == "class":  # as the published code averages the table, in double precision
            table = double["blocks"]["mlp_table"]["embedding"]
            double["blocks"]["mlp_table"]["embedding"] = table.at[:, -1].set(table[:, :-1].mean(1))
        found = jax.jit(net.copy(dtype=jnp.float64).apply)({"params": double}, *inputs(jnp.float64))["tokens"]
        published.assert_close(found, logits, 1e-10)


def test_a_null_that_was_trained_is_one_more_class():
    net, (arrays, _) = net_of("class"), weights("class")
    params = loaded(net, arrays)
    params["blocks"]["mlp_table"]["embedding"] = params["blocks"]["mlp_table"]["embedding"] + np.float32(1) * (np.arange(7) == 6)[:, None]
    written = layouts.state_dict(LAYOUT, net, params)
    assert written["transformer.blocks.1.ln2.emb.weight"].shape == (7, 32)
    jax.tree.map(np.testing.assert_array_equal, loaded(net, written), params)


def test_diffusers_layout_has_the_same_weights():
    net, (arrays, _) = net_of("text"), weights("text")
    params = loaded(net, arrays)
    written = layouts.state_dict(vq_diffusion.VQ_DIFFUSION_DIFFUSERS, net, params)
    assert len(written) == len(arrays)
    jax.tree.map(np.testing.assert_array_equal, loaded(net, written), params)
    with pytest.raises(UserError, match="write --to published"):
        layouts.state_dict(vq_diffusion.VQ_DIFFUSION_DIFFUSERS, net_of("class"), loaded(net_of("class"), weights("class")[0]))


@pytest.mark.parametrize("of, fields, words", [
    ("class", {"conv": False}, r"it.pth has other shapes than the network: blocks.0.mlp.0.weight \[64, 32, 3, 3\] for \[64, 32\]"),
    ("class", {"labels": 6}, None), ("class", {"labels": 5}, r"blocks.0.ln2.emb.weight \[6, 32\] for \[5, 32\]"),
    ("text", {"times": 20}, r"blocks.0.ln1.emb.weight \[10, 32\] for \[20, 32\]"), ("text", {"depth": 3}, "it.pth lacks blocks.2"),
    ("text", {"context": ()}, "it.pth has blocks.0.ln1_1.emb.weight"),
])  # fmt: skip
def test_other_networks_are_refused(of, fields, words):
    net = net_of(of, **fields)
    if words is None:  # as published: without a row for the null
        arrays = weights(of)[0]
        written = layouts.state_dict(LAYOUT, net, loaded(net, arrays))
        return assert_same(written, {f"transformer.{key}": array for key, array in arrays.items()})
    with pytest.raises(UserError, match=words):
        loaded(net, weights(of)[0])
    with pytest.raises(UserError, match="no transformer of VQ-Diffusion"):
        loaded(net, {"x": np.zeros(1)})
