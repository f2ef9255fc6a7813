"""The VQ autoencoder: what its gradients reach, how unused codes come back, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import uniform

from mmdiff.errors import UserError
from mmdiff.nets.tokenizers import VQAutoencoder, nearest, revival, straight_through, usage, vq_loss
from mmdiff.training.accumulation import make_gradient
from mmdiff.training.step import init_state, make_step

KEY = jax.random.key(1, impl="rbg")  # its numbers take less time to compile
NET = VQAutoencoder(8, 8, 3, codes=16, code_size=4, features=8)
BATCH = {"image": uniform(0, (6, 8, 8, 3)), "index": jnp.arange(6, dtype=jnp.uint32)}


@functools.cache
def weights():
    return jax.jit(NET.init)(jax.random.key(1), BATCH["image"])


@functools.cache
def compiled(net, method):
    return jax.jit(lambda params, *args: net.apply(params, *args, method=method))


@functools.cache
def gradient(commitment, revive):
    grads, _ = jax.jit(jax.grad(vq_loss(NET, commitment=commitment, revive=revive), has_aux=True))(weights(), BATCH, jax.random.key(2))
    return grads["params"]


def run(method, *args, net=NET, params=None):
    return compiled(net, method)(weights() if params is None else params, *args)


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("halvings, grid", [(1, (4, 8)), (2, (2, 4))])
def test_shapes_and_ranges(halvings, grid):
    net = VQAutoencoder(8, 16, 1, codes=16, code_size=4, halvings=halvings, features=8)
    images = jax.random.uniform(jax.random.key(0), (3, 8, 16, 1), minval=-1, maxval=1)
    (ids, rendered), params = jax.jit(net.init_with_output)(KEY, images)
    assert net.grid == grid and ids.shape == (3, grid[0] * grid[1]) and ids.dtype == jnp.int32
    assert 0 <= ids.min() and ids.max() < 16 and len(np.unique(ids)) > 1
    assert rendered.shape == images.shape and rendered.dtype == jnp.float32 and jnp.abs(rendered).max() <= 1
    np.testing.assert_allclose(run("decode", ids, net=net, params=params), rendered, rtol=1e-5, atol=1e-6)
    loud = jax.tree.map(lambda x: 100 * x, params)
    assert jnp.abs(run("decode", ids, net=net, params=loud)).max() == 1


def test_a_picture_has_its_tokens_whatever_it_is_encoded_with():
    ids = run("encode", BATCH["image"])
    np.testing.assert_array_equal(ids, run("encode", BATCH["image"]))
    np.testing.assert_array_equal(run("encode", BATCH["image"][::-1])[::-1], ids)
    np.testing.assert_array_equal(run("encode", BATCH["image"][2:3])[0], ids[2])


def test_tokens_are_in_raster_order():
    ids = jnp.zeros((1, 16), jnp.int32)
    changed = run("decode", ids.at[0, 6].set(5)) - run("decode", ids)  # row 1, column 2
    size = jnp.abs(changed[0]).sum(-1)
    assert float(size[2:4, 4:6].mean()) > 2 * float(size[6:, :2].mean())


@pytest.mark.parametrize("options", [{"halvings": 4}, {"features": 12}])
def test_sizes_that_do_not_fit(options):
    with pytest.raises(UserError, match="does not fit images of 8 x 8"):
        VQAutoencoder(8, 8, 3, **options).init(jax.random.key(0), BATCH["image"])


def test_the_nearest_code():
    z, codes = jax.random.normal(jax.random.key(0), (5, 7, 3)), jax.random.normal(jax.random.key(1), (11, 3))
    expected = ((np.asarray(z)[..., None, :] - np.asarray(codes)) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest(z, codes), expected)
    np.testing.assert_array_equal(nearest(codes, codes), np.arange(11))


def test_straight_through_is_the_code_with_the_outputs_gradient():
    z, e, weight = jax.random.normal(jax.random.key(0), (3, 2, 4))
    value, (to_z, to_e) = jax.value_and_grad(lambda z, e: (weight * straight_through(z, e) ** 2).sum(), argnums=(0, 1))(z, e)
    np.testing.assert_allclose(value, (weight * e**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(to_z, 2 * weight * e, rtol=1e-5, atol=1e-6)  # as if e were z
    np.testing.assert_array_equal(to_e, jnp.zeros_like(e))


@pytest.mark.slow
def test_each_part_of_the_loss_trains_its_own_part_of_the_network():
    plain, committed, twice = gradient(0.0, 0.0), gradient(0.5, 0.0), gradient(1.0, 0.0)
    # Commitment moves the encoder alone, in proportion to its weight.
    for name in ("codebook", "decoder"):
        assert_close(plain[name], committed[name], rtol=1e-5, atol=1e-7)
    once = jax.tree.map(jnp.subtract, committed["encoder"], plain["encoder"])
    assert largest(once) > 1e-4
    assert_close(jax.tree.map(lambda x: 2 * x, once), jax.tree.map(jnp.subtract, twice["encoder"], plain["encoder"]), rtol=1e-3, atol=1e-6)
    # The image's error reaches the encoder, not the codebook: that one follows the outputs assigned to it.
    assert largest(plain["encoder"]) > 1e-4
    z, codes = run("embed", BATCH["image"])
    ids = nearest(z, codes)

    def codebook(raw):
        codes = raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)
        return ((codes[ids] - z) ** 2).sum(-1).mean()

    assert_close(plain["codebook"], jax.grad(codebook)(weights()["params"]["codebook"]), rtol=1e-4, atol=1e-6)


def test_revival_trains_unused_codes_and_nothing_else():
    plain, revived = gradient(0.25, 0.0), gradient(0.25, 1.0)
    for name in ("encoder", "decoder"):
        assert_close(plain[name], revived[name], rtol=1e-5, atol=1e-7)
    used = np.isin(np.arange(16), run("encode", BATCH["image"]))
    assert 0 < used.sum() < 16
    moved = np.abs(np.asarray(revived["codebook"] - plain["codebook"])).max(-1)
    assert (moved[used] < 1e-6).all() and (moved[~used] > 1e-4).all()
    assert np.abs(np.asarray(plain["codebook"]))[~used].max() == 0


def clusters(count=16, size=4, each=8):
    """Outputs [count, each, size] around `count` points of the sphere."""
    centres = jax.random.normal(jax.random.key(3), (count, 1, size))
    z = centres / jnp.linalg.norm(centres, axis=-1, keepdims=True)
    return z + 0.01 * jax.random.normal(jax.random.key(4), (count, each, size))


@pytest.mark.parametrize("weight, all_used", [(1.0, True), (0.0, False)])
def test_every_code_finds_a_place(weight, all_used):
    z = clusters()
    codes = 0.1 * jax.random.normal(jax.random.key(5), (16, 4)) + jnp.array([1.0, 0, 0, 0])  # in one corner: few are ever nearest

    def loss(codes, key):
        ids = nearest(z, codes)
        return ((codes[ids] - z) ** 2).sum(-1).mean() + weight * revival(z, codes, ids, jax.random.split(key, len(z)))

    adam = optax.adam(0.03)

    def step(carry, key):
        codes, state = carry
        updates, state = adam.update(jax.grad(loss)(codes, key), state)
        return (codes + updates, state), None

    (codes, _), _ = jax.jit(lambda codes: jax.lax.scan(step, (codes, adam.init(codes)), jax.random.split(jax.random.key(6), 600)))(codes)
    ids = nearest(z, codes)
    error = float(((codes[ids] - z) ** 2).sum(-1).mean())
    used = len(np.unique(ids))
    assert (used >= 14 and error < 0.03) if all_used else (used <= 12 and error > 0.05), (used, error)


@pytest.mark.slow
def test_revival_pulls_to_what_is_badly_described():
    codes = jnp.array([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]])
    z = jnp.tile(jnp.array([[1.0, 0.0]]), (40, 1)).at[17].set(jnp.array([0.0, -1.0])).reshape(4, 10, 2)
    ids = jnp.where(z[..., 1] < 0, 1, 0)  # the third is not used
    pull = jax.grad(lambda codes: revival(z, codes, ids, jax.random.split(jax.random.key(0), 4)))(codes)
    np.testing.assert_allclose(pull[2], 2 / 3 * (codes[2] - jnp.array([0.0, -1.0])), rtol=1e-5)
    np.testing.assert_array_equal(pull[:2], np.zeros((2, 2)))
    # Fewer outputs than codes, as in a tiny batch.
    assert np.isfinite(revival(z[:1, :2], codes, ids[:1, :2], jax.random.split(jax.random.key(0), 1)))


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    order = jnp.array([3, 0, 5, 1, 4, 2])
    loss = jax.jit(vq_loss(NET))
    value, metrics = loss(weights(), BATCH, jax.random.key(7))
    other, _ = loss(weights(), {name: array[order] for name, array in BATCH.items()}, jax.random.key(7))
    np.testing.assert_allclose(value, other, rtol=1e-5)
    parts = {name: float(metrics[f"loss/{name}"]) for name in ("reconstruction", "codebook", "commitment", "revival")}
    expected = parts["reconstruction"] + parts["codebook"] + 0.25 * parts["commitment"] + parts["revival"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert parts["codebook"] == parts["commitment"]


def test_codes_are_unused_by_the_batch_and_not_by_a_micro_batch():
    loss = vq_loss(NET)
    results = [jax.jit(make_gradient(loss, m))(weights(), BATCH, jax.random.key(7))[0] for m in (1, 3)]
    for one, other in zip(*results):  # the loss, its metrics, the gradient
        assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 0 < results[0][1]["codebook/usage"] < 1 and results[0][1]["loss/revival"] > 0
    part = {name: array[::3] for name, array in BATCH.items()}
    assert abs(jax.jit(loss)(weights(), part, jax.random.key(7))[1]["codebook/usage"] - results[0][1]["codebook/usage"]) > 1e-3


def test_usage_of_a_codebook():
    assert usage(jnp.full(8, 3.0)) == (1.0, pytest.approx(8.0, rel=1e-5))
    assert usage(jnp.zeros(8).at[2].set(5.0)) == (0.125, pytest.approx(1.0))
    share, perplexity = usage(jnp.array([1.0, 1.0, 2.0, 0.0]))
    assert (float(share), float(perplexity)) == (0.75, pytest.approx(2**1.5, rel=1e-5))
    ids = np.asarray(run("encode", BATCH["image"])).reshape(-1)
    _, metrics = jax.jit(vq_loss(NET))(weights(), BATCH, jax.random.key(0))
    share, perplexity = usage(np.bincount(ids, minlength=16))
    assert float(metrics["codebook/usage"]) == pytest.approx(len(set(ids)) / 16) == pytest.approx(float(share))
    assert float(metrics["codebook/perplexity"]) == pytest.approx(float(perplexity), rel=1e-5)


@pytest.mark.slow
def test_it_learns_by_the_ordinary_step():
    palette = jnp.array([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1], [-1, -1, 1]])
    blocks = palette[jax.random.randint(jax.random.key(8), (32, 4, 4), 0, 4)]  # a token of 2 x 2 pixels has one of four colours
    batch = {"image": blocks.repeat(2, 1).repeat(2, 2), "index": jnp.arange(32, dtype=jnp.uint32)}
    loss, optimizer = vq_loss(NET), optax.adam(1e-2)
    state = jax.jit(lambda key: init_state(lambda key: NET.init(key, batch["image"]), optimizer, key, loss))(jax.random.key(9))
    step, errors = jax.jit(make_step(loss, optimizer, ema=0.9)), []
    for _ in range(150):
        state, metrics = step(state, batch)
        errors.append(float(metrics["loss/reconstruction"]))
    assert errors[-1] < 0.1 * errors[0] and int(state.stats["skipped"]) == 0, errors[::10]
