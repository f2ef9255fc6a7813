"""Two towers: what the text's reads, and CLIP's loss on both."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled

from mmdiff import losses, matching, times
from mmdiff.errors import UserError
from mmdiff.nets import Patches, TwoTowers
from mmdiff.processes import Given, Joint

B = 5
X = {
    "image": normal(0, (B, 4, 4, 3)),
    "text": jnp.asarray([[1, 5, 2, 0, 0, 0], [1, 3, 4, 5, 2, 0], [1, 2, 0, 0, 0, 0], [1, 6, 6, 6, 6, 2], [1, 4, 2, 0, 0, 0]]),
}
PROCESS = Joint(image=Given(0.0), text=Given(0))
KNOWN = times.joint(image=times.constant(0.0), text=times.constant(0.0))


def net_of(**options):
    sizes = dict(vocabulary=7, length=6, size=10, depth=1, width=16, text_depth=1, text_width=8, heads=2, scan=False)
    return TwoTowers(Patches(4, 4, 3, 2), **{**sizes, **options})


@functools.cache
def weights(logits=(1 / 0.07, 0.0)):
    """Random ones, beside the initial scale and bias."""
    params = filled(net_of(), X, {})["params"]
    return {"params": params | {"logit_scale": np.float32(math.log(logits[0])), "logit_bias": np.float32(logits[1])}}


run = jax.jit(lambda params, x: net_of().apply(params, x, {}))
read = jax.jit(lambda params, ids: net_of().apply(params, ids, method="encode_text"))
see = jax.jit(lambda params, images: net_of().apply(params, images, method="encode_image"))


def test_shapes():
    found = run(weights(), X)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        "image_vector": ((B, 10), jnp.float32), "text_vector": ((B, 10), jnp.float32),
        "logit_scale": ((B,), jnp.float32), "logit_bias": ((B,), jnp.float32)}
    states, vectors = read(weights(), X["text"])
    assert states.shape == (B, 6, 8)
    np.testing.assert_allclose(vectors, found["text_vector"], atol=1e-5)
    np.testing.assert_allclose(see(weights(), X["image"]), found["image_vector"], atol=1e-5)
    low = jax.eval_shape(net_of(dtype=jnp.bfloat16).apply, weights(), X, {})
    assert {array.dtype for array in low.values()} == {jnp.dtype("float32")}


def test_padding_is_an_id_of_the_vocabularys_own():
    """The same texts in a vocabulary whose padding is the last id."""
    embedding = weights()["params"]["text"]["tokens_in"]["embedding"]
    text = weights()["params"]["text"] | {"tokens_in": {"embedding": jnp.roll(embedding, -1, 0)}}
    params = weights()["params"] | {"text": text}
    found = net_of(padding=6).apply({"params": params}, (X["text"] - 1) % 7, method="encode_text")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, read(weights(), X["text"]))


def test_examples_are_on_their_own():
    turned, found = run(weights(), jax.tree.map(lambda array: array[::-1], X)), run(weights(), X)
    others = run(weights(), jax.tree.map(lambda array: array.at[1:].set(array[0]), X))
    for name in ("image_vector", "text_vector"):
        np.testing.assert_allclose(turned[name][::-1], found[name], atol=1e-5)
        np.testing.assert_allclose(others[name][0], found[name][0], atol=1e-5)


def test_a_text_is_the_mean_of_what_is_not_padding():
    states, vectors = read(weights(), X["text"])
    there = np.asarray(X["text"]) != 0
    assert not np.asarray(states)[~there].any() and np.abs(np.asarray(states)[there]).min(-1).max() > 0
    kernel = weights()["params"]["text_out"]["kernel"]
    for state, own, vector in zip(np.asarray(states), there, vectors):
        np.testing.assert_allclose(state[own].mean(0) @ kernel, vector, atol=1e-5)


def test_padding_is_only_what_the_encoder_sees_of_it(monkeypatch):
    """With an encoder that reads every token by itself, further padding changes nothing."""
    from mmdiff.nets import towers

    class Alone(towers.TextEncoder):
        def __call__(self, ids):
            return jnp.sin(ids[..., None] * (1.0 + jnp.arange(self.width))) + 3.0

    monkeypatch.setattr(towers, "TextEncoder", Alone)
    short, long = X["text"][:1, :4], X["text"][:1]
    for ids in (short, long):
        net = net_of(length=ids.shape[1])
        params = {"params": {name: weights()["params"][name] for name in ("text_out", "logit_scale", "logit_bias")}}
        found = net.apply(params, ids, method="encode_text")[1]
        expected = (jnp.sin(ids[0, :3, None] * (1.0 + jnp.arange(8))) + 3.0).mean(0) @ params["params"]["text_out"]["kernel"]
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_an_absent_text_is_zero():
    states, vectors = read(weights(), jnp.zeros_like(X["text"]))
    assert not states.any() and not vectors.any()


def test_the_scale_ends_at_100():
    for given, expected in ((20.0, 20.0), (99.0, 99.0), (1e4, 100.0)):
        found = run(weights((given, -3.0)), X)
        np.testing.assert_allclose(found["logit_scale"], expected, rtol=1e-5)
        np.testing.assert_allclose(found["logit_bias"], -3.0)


@pytest.mark.parametrize("logits", [(1 / 0.07, 0.0), (10.0, -10.0)])
def test_the_initial_logits(logits):
    params = net_of(logits=logits).init(jax.random.key(0), method=lambda net: net.learned)["params"]
    np.testing.assert_allclose([np.exp(params["logit_scale"]), params["logit_bias"]], logits, rtol=1e-6)


def similarities(out):
    one, other = (np.asarray(out[name], np.float64) for name in ("image_vector", "text_vector"))
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
    return float(out["logit_scale"][0]) * one @ other.T + float(out["logit_bias"][0])


def infonce(out):
    s = np.exp(similarities(out))
    return -0.5 * (np.log(np.diag(s) / s.sum(1)) + np.log(np.diag(s) / s.sum(0))).mean()


def siglip(out):
    s = similarities(out)
    return np.log1p(np.exp(np.where(np.eye(B), -s, s))).sum(1).mean()


@pytest.mark.parametrize(("name", "by_hand", "logits"), [("infonce", infonce, (1 / 0.07, 0.0)), ("siglip", siglip, (10.0, -10.0))])
def test_the_loss_and_its_gradients(name, by_hand, logits):
    net, params = net_of(), weights(logits)
    loss = losses.diffusion(PROCESS, net.apply, KNOWN, {name: (1.0, matching.clip_loss(loss=name))})
    batch = {**X, "index": jnp.arange(B)}
    grad = jax.jit(jax.value_and_grad(lambda params: loss(params, batch, jax.random.key(1))[0]))
    value, gradients = grad(params)
    expected = by_hand(run(params, X))
    assert float(value) == pytest.approx(expected, rel=1e-4)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(g).max() for path, g in jax.tree.leaves_with_path(gradients)}
    still = {path for path, size in found.items() if size == 0}
    assert still <= {"params/logit_bias"} and (still == set() or name == "infonce"), still
    for tower in ("params/image/", "params/text/", "params/text_out/", "params/logit_scale"):
        assert max(size for path, size in found.items() if path.startswith(tower)) > 1e-4


def test_texts_of_another_length_are_refused():
    with pytest.raises(UserError, match="takes 6 ids a text"):
        read(weights(), X["text"][:, :5])
