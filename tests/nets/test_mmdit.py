"""MMDiT: any set of modalities, each with its own time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled

from mmdiff.nets import Label, MMDiT, Patches, Tokens, Vectors
from mmdiff.nets.transformer import Block

KEY = jax.random.key(1, impl="rbg")  # its numbers take less time to compile
STREAMS = {
    "image": Patches(4, 4, 1, 2),
    "label": Label(5, 4),
    "text": Tokens(3, 6, 5),
    "features": Vectors(6),
    "frames": Vectors(4, 2),
}
B = 4
X = {
    "image": normal(0, (B, 4, 4, 1)),
    "label": jnp.asarray([0, 1, 2, 4]),
    "text": jnp.asarray(np.arange(12, dtype=np.int32).reshape(4, 3) % 6),
    "features": normal(1, (B, 6)),
    "frames": normal(2, (B, 2, 4)),
}
T = {name: jnp.asarray(np.linspace(0.1, 0.9, B, dtype=np.float32) + np.float32(0.01 * i)) for i, name in enumerate(STREAMS)}
OUT = {"image": (B, 4, 4, 1), "label": (B, 4), "text": (B, 3, 5), "features": (B, 6), "frames": (B, 2, 4)}
SETS = [("label",), ("image", "label"), tuple(STREAMS)]


def net_of(names=("image", "label"), **options):
    return MMDiT({name: STREAMS[name] for name in names}, **{"depth": 2, "width": 16, "heads": 2, **options})


def inputs(names=("image", "label")):
    return {name: X[name] for name in names}, {name: T[name] for name in names}


@functools.cache
def weights(names=("image", "label"), shared=False, qk_norm=False):
    return filled(net_of(names, shared=shared, qk_norm=qk_norm), *inputs(names))


@functools.cache
def reference(names=("image", "label"), shared=False):
    return jax.jit(net_of(names, shared=shared).apply)(weights(names, shared), *inputs(names))


def close(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_any_set_of_modalities(names, shared):
    out = reference(names, shared)
    assert {name: value.shape for name, value in out.items()} == {name: OUT[name] for name in names}
    assert all(value.dtype == jnp.float32 and np.isfinite(value).all() and value.any() for value in out.values())


def test_starts_at_zero():
    net = net_of(tuple(STREAMS), depth=1)
    out, params = jax.jit(lambda k: net.init_with_output(k, X, T))(KEY)
    assert not any(value.any() for value in out.values())
    assert params["params"]["image_in"]["kernel"].any()


@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_the_dicts_does_not_matter(shared):
    turned, plain = ("label", "image"), reference(shared=shared)
    jax.tree.map(np.testing.assert_array_equal, weights(turned, shared), weights(shared=shared))
    jax.tree.map(np.testing.assert_array_equal, reference(turned, shared), plain)
    # And what it was not built for is not looked at.
    x, t = dict(reversed(X.items())), dict(reversed(T.items()))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(net_of(shared=shared).apply)(weights(shared=shared), x, t), plain)


@pytest.mark.parametrize("shared", [False, True])
def test_scan_is_the_loop(shared):
    params = weights(shared=shared)["params"]
    blocks = params["blocks"]
    loop = {"params": {k: v for k, v in params.items() if k != "blocks"}}
    loop["params"] |= {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(2)}
    close(jax.jit(net_of(shared=shared, scan=False).apply)(loop, *inputs()), reference(shared=shared))


@pytest.mark.slow
def test_remat_changes_neither_value_nor_gradient():
    x, t = inputs()

    def value_and_grad(remat):
        net = net_of(remat=remat)
        return jax.jit(jax.value_and_grad(lambda p: sum((v**2).mean() for v in net.apply(p, x, t).values())))(weights())

    plain = value_and_grad("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), value_and_grad(remat), plain)


@pytest.mark.parametrize("shared", [False, True])
def test_every_time_and_value_reaches_every_output(shared):
    """Also the other modality's: a condition and an absent one are told apart by their time alone."""
    x, t = inputs()
    apply = jax.jit(net_of(shared=shared).apply)
    for name in ("image", "label"):
        moved = apply(weights(shared=shared), x, {**t, name: 1 - t[name]})
        changed = {"image": -x["image"], "label": (x["label"] + 1) % 5}[name]
        other = apply(weights(shared=shared), {**x, name: changed}, t)
        for out in (moved, other):
            for part in ("image", "label"):
                assert float(jnp.abs(out[part] - reference(shared=shared)[part]).max()) > 1e-5, (name, part)


def test_examples_do_not_see_each_other():
    x, t = (jax.tree.map(lambda a: a[::-1], tree) for tree in inputs())
    close(jax.tree.map(lambda a: a[::-1], jax.jit(net_of().apply)(weights(), x, t)), reference())


def test_shared_weights_are_fewer():
    def count(shared):
        return sum(leaf.size for leaf in jax.tree.leaves(weights(shared=shared)["params"]["blocks"]))

    assert count(False) == 2 * count(True)


def test_backends_and_qk_norm():
    close(jax.jit(net_of(backend="xla").apply)(weights(), *inputs()), reference())
    normed = net_of(qk_norm=True)
    out = jax.jit(normed.apply)(weights(qk_norm=True), *inputs())
    assert all(np.isfinite(value).all() for value in out.values())
    assert {"q_norm", "k_norm"} <= set(weights(qk_norm=True)["params"]["blocks"])


@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_activations_keep_float32_parameters(shared):
    net = net_of(shared=shared, dtype=jnp.bfloat16)
    start = jax.eval_shape(net.init, jax.random.key(0), *inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    out = jax.jit(net.apply)(weights(shared=shared), *inputs())
    for name, value in out.items():
        expected = reference(shared=shared)[name]
        assert value.dtype == jnp.float32
        assert float(jnp.abs(value - expected).max() / jnp.abs(expected).max()) < 0.05


@pytest.mark.slow
def test_a_missing_modality_is_named():
    x, t = inputs()
    with pytest.raises(KeyError, match="no input or time for .*label"):
        net_of().apply(weights(), {"image": x["image"]}, t)
    with pytest.raises(KeyError, match="no input or time for .*image"):
        net_of().apply(weights(), x, {"label": t["label"]})
    with pytest.raises(ValueError, match="no remat policy"):
        net_of(remat="all").init(jax.random.key(0), x, t)


def test_conditions_of_streams_that_share_weights_may_be_of_each_token():
    """One product makes the modulations of conditions of one shape; a condition of a whole stream is that of all its tokens."""
    block = Block(heads=2, weights={"a": "", "b": ""}, merged=True)
    keys = jax.random.split(jax.random.key(0), 4)
    streams = {name: jax.random.normal(key, (2, n, 8)) for name, n, key in zip("ab", (3, 5), keys)}
    whole = {name: jax.random.normal(key, (2, 8)) for name, key in zip("ab", keys[2:])}
    of_tokens = {name: jnp.repeat(c[:, None], streams[name].shape[1], axis=1) for name, c in whole.items()}
    params = jax.tree.map(lambda x: x + 0.1, block.init(keys[0], streams, whole))
    run = jax.jit(block.apply)
    expected, _ = run(params, streams, whole)
    for conditions in (of_tokens, {**whole, "b": of_tokens["b"]}):
        found, _ = run(params, streams, conditions)
        for name in streams:
            np.testing.assert_allclose(found[name], expected[name], atol=2e-6)
