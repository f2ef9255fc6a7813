"""UniDiffuser's U-ViT: by hand in float64, with a time for each of the two modalities and none besides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled
from scipy.special import erf

from mmdiff.errors import UserError
from mmdiff.nets import Patches, UViT, Vectors
from mmdiff.training import sharding

B, W, HEADS = 3, 8, 2
NET = UViT(Patches(4, 4, 2, 2), Vectors(6), Vectors(5, 7), data_types=3, data_type=2, depth=4, width=W, heads=HEADS)
X = {"image": normal(0, (B, 4, 4, 2)), "vision": normal(1, (B, 6)), "text": normal(2, (B, 7, 5))}
T = {"image": np.float32([1, 0.3, 0]), "text": np.float32([0.2, 1, 0.7])}
T["vision"] = T["image"]
PARAMS = filled(NET, X, T)


def norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def block(p, x, skip=None):
    if skip is not None:
        x = norm(p["skip_norm"], dense(p["skip"], np.concatenate([x, skip], -1)))
    assert set(p["attention"]["qkv"]) == {"kernel"}
    q, k, v = np.moveaxis(dense(p["attention"]["qkv"], x).reshape(*x.shape[:2], HEADS, 3, W // HEADS), 3, 0)
    scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(W // HEADS))
    attended = np.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    x = norm(p["attention_norm"], x + dense(p["attention"]["out"], attended))
    hidden = dense(p["mlp"]["in"], x)
    return norm(p["mlp_norm"], x + dense(p["mlp"]["out"], hidden * (1 + erf(hidden / np.sqrt(2))) / 2))


def by_hand(p):
    p = jax.tree.map(np.float64, p["params"])

    def features(t):
        angles = 1000 * np.float64(t)[:, None] * 10000.0 ** (-np.arange(W // 2) / (W // 2))
        return np.concatenate([np.cos(angles), np.sin(angles)], -1)[:, None]

    rows = np.float64(X["image"]).reshape(B, 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 8)
    tokens = [
        features(T["image"]), features(T["text"]), np.tile(p["data_type_in"]["embedding"][2], (B, 1, 1)), dense(p["text_in"], X["text"]),
        dense(p["vision_in"], X["vision"])[:, None], dense(p["image_in"], rows)]
    h, behind = np.concatenate(tokens, 1) + p["positions"]["embedding"], []
    for i in range(2):
        h = block(jax.tree.map(lambda leaf, i=i: leaf[i], p["in"]["blocks"]), h)
        behind.append(h)
    h = block(p["mid"]["block_0"], h)
    for i in range(2):
        h = block(jax.tree.map(lambda leaf, i=i: leaf[i], p["out"]["blocks"]), h, behind.pop())
    h = norm(p["norm"], h)
    image = dense(p["image_out"], h[:, 11:]).reshape(B, 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 4, 2)
    return {"image": image, "vision": dense(p["vision_out"], h[:, 10]), "text": dense(p["text_out"], h[:, 3:10])}


def test_the_network_by_hand():
    out = jax.jit(NET.apply)(PARAMS, X, T)
    for name, answer in by_hand(PARAMS).items():
        np.testing.assert_allclose(out[name], answer, atol=3e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_its_layers_and_long_skips_are_split_over_the_tensor_axis(scan):
    net, mesh = NET.clone(scan=scan), sharding.make_mesh({"tensor": 2}, jax.devices()[:2])
    params = PARAMS if scan else filled(net, X, T)
    placed = jax.device_put(params, sharding.shardings(params, None, mesh))
    split = {"skip": (W, W), "attention/qkv": (W, 3 * W // 2), "attention/out": (W // 2, W), "mlp/in": (W, 2 * W), "mlp/out": (2 * W, W)}
    layers = placed["params"]["out"]["blocks" if scan else "block_1"]
    for name, shape in split.items():
        kernel = functools.reduce(lambda found, part: found[part], name.split("/"), layers)["kernel"]
        assert kernel.addressable_shards[1].data.shape[-2:] == shape, name
    with sharding.compiling_for_mesh(mesh):
        found = jax.jit(net.apply)(placed, X, T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, net.apply(params, X, T))


def test_an_image_and_its_vector_have_one_time():
    """Two are refused where they are known, and are NaN where they are traced: for the examples that have them."""
    two = {**T, "vision": np.float32([1, 0.4, 0])}
    with pytest.raises(UserError, match="UViT: the image and its vector have one time, and here they have two"):
        NET.apply(PARAMS, X, two)
    out, one = (jax.jit(NET.apply)(PARAMS, X, t) for t in (two, T))
    for name in X:
        assert np.isnan(out[name][1]).all()
        np.testing.assert_array_equal(out[name][::2], one[name][::2])


def test_what_it_cannot_be_is_refused():
    for fields, words in (
        ({"depth": 3}, "depth must be even, not 3"), ({"data_type": 3}, "data_type 3 is none of 3 data_types"),
        ({"data_types": 0}, "data_type 2 is none of 0 data_types"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            NET.copy(**fields)
    with pytest.raises(KeyError, match="no input or time for ..vision"):
        NET.apply(PARAMS, {name: X[name] for name in ("image", "text")}, T)
    with pytest.raises(UserError, match="takes no ends of steps, image/end"):
        NET.apply(PARAMS, X, {**T, "image/end": jnp.zeros(B)})


@pytest.mark.parametrize("remat", ["some", pytest.param("full", marks=pytest.mark.slow)])
def test_a_loop_and_rematerialisation_change_no_gradient(remat):
    def gradient(net, params):
        return jax.jit(jax.grad(lambda p: sum((value**2).mean() for value in net.apply({"params": p}, X, T).values())))(params)

    def unstacked(rows):
        return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], rows["blocks"]) for i in range(2)}

    params = PARAMS["params"]
    plain = gradient(NET, params)
    looped = gradient(NET.copy(scan=False, remat=remat), {**params, **{part: unstacked(params[part]) for part in ("in", "out")}})
    expected = {**plain, **{part: unstacked(plain[part]) for part in ("in", "out")}}
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), looped, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
