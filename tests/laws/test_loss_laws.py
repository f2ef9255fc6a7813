"""Laws of the losses: what they may and may not depend on, and what they are worth at the ends of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from exact import DISCRETE, PREDICTS, SCHEDULES, SOME_DISCRETE
from tiers import some

from mmdiff import losses, nets, processes, schedules, times
from mmdiff.processes import Gaussian, Joint

BATCH = 16


def linear_network(params, x, t):
    """Linear in everything, with parameters that a NaN anywhere would reach."""
    features = jnp.concatenate([x["image"], jax.nn.one_hot(x["label"], 6), t["image"][:, None], t["label"][:, None]], axis=-1)
    return {name: features @ weights for name, weights in params.items()}


PARAMS = {"image": normal(0, (11, 3), 0.1), "label": normal(1, (11, 4), 0.1)}


def batch(count=BATCH):
    return {
        "image": np.random.default_rng(2).normal(size=(count, 3)).astype(np.float32),
        "label": np.arange(count, dtype=np.int32) % 4,
        "index": np.arange(100, 100 + count, dtype=np.uint32),
    }


MIXTURE = times.mixture(
    (0.4, times.joint(image=times.uniform(), label=times.uniform())),
    (0.3, times.joint(image=times.uniform(), label=times.constant(0.0))),
    (0.3, times.joint(image=times.constant(0.0), label=times.constant(1.0))),
)
IMAGES = [(s, p) for s in SCHEDULES for p in PREDICTS if p != "eps" or s in ("linear_beta", "edm")]  # the others end without signal
ENDS = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.125, 0.125)]


def image_terms(image):
    return {
        "own": (1.0, losses.on("image", image.loss)),
        "snr": (0.1, losses.on("image", losses.mse(image, losses.snr()))),
        "min_snr": (0.1, losses.on("image", losses.mse(image, losses.min_snr(5.0)))),
        "sigmoid": (0.1, losses.on("image", losses.mse(image, losses.sigmoid(-1.0)))),
        "vlb": (0.1, losses.on("image", losses.vlb(image))),
        "kl": (0.1, losses.on("image", losses.vlb(image, steps=8))),
    }


def label_terms(label):
    return {
        "own": (1.0, losses.on("label", label.loss)),
        "vlb": (0.1, losses.on("label", losses.vlb(label))),
        "kl": (0.1, losses.on("label", losses.vlb(label, steps=8))),
    }


def assert_finite_at_the_ends(process, name, terms):
    @jax.jit
    def run(params, batch, key, image, label):
        def at(key, index):
            return {"image": jnp.full(index.shape, image), "label": jnp.full(index.shape, label)}

        return jax.value_and_grad(losses.diffusion(process, linear_network, at, terms), has_aux=True)(params, batch, key)

    for ends in ENDS:
        (value, metrics), gradient = run(PARAMS, batch(), jax.random.key(0), *ends)
        assert np.isfinite(value), metrics
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics, gradient))), metrics
        if dict(zip(("image", "label"), ends))[name] == 0:  # a condition costs nothing and teaches nothing
            assert value == 0 and not any(metrics.values()) and not gradient[name].any()


@pytest.mark.parametrize("schedule, predict", some(
    IMAGES, ("flow", "velocity"), ("cosine", "v"), ("linear_beta", "eps"), ("edm", "edm"), ("shifted", "x0")))
def test_image_terms_and_gradients_are_finite_at_the_ends_of_time(schedule, predict):
    image = Gaussian(SCHEDULES[schedule], PREDICTS[predict])
    assert_finite_at_the_ends(Joint(image=image, label=processes.absorbing(4)), "image", image_terms(image))


@pytest.mark.parametrize("label", SOME_DISCRETE)
def test_label_terms_and_gradients_are_finite_at_the_ends_of_time(label):
    assert_finite_at_the_ends(Joint(image=Gaussian(schedules.flow()), label=DISCRETE[label]), "label", label_terms(DISCRETE[label]))


@pytest.mark.parametrize("label", ["absorbing", "absorbing_cosine", "mask_and_replace", "vqd_released"])
def test_an_absent_label_is_still_learnt(label):
    """t = 1 with a mask is where a classifier is trained: every term about the label has a gradient there."""
    process = Joint(image=Gaussian(schedules.flow()), label=DISCRETE[label])
    at = times.joint(image=times.constant(0.0), label=times.constant(1.0))
    terms = label_terms(DISCRETE[label])
    if label == "absorbing_cosine":
        del terms["vlb"]  # its rate is 0 there: -alpha' vanishes

    @jax.jit
    def gradients(params):
        alone = {name: losses.diffusion(process, linear_network, at, {name: term}) for name, term in terms.items()}
        return {name: jax.grad(lambda p, loss=loss: loss(p, batch(), jax.random.key(0))[0])(params) for name, loss in alone.items()}

    for gradient in gradients(PARAMS).values():
        assert np.abs(gradient["label"]).max() > 1e-4


@pytest.mark.parametrize("label", some(DISCRETE, "absorbing", "vqd_released"))
def test_order_and_micro_batches_do_not_matter(label):
    process = Joint(image=Gaussian(schedules.cosine(), processes.v), label=DISCRETE[label])
    terms = {"": (1.0, process.loss)} | label_terms(DISCRETE[label])
    loss = jax.jit(losses.diffusion(process, linear_network, MIXTURE, terms))
    whole, key = batch(), jax.random.key(7)
    value, metrics = loss(PARAMS, whole, key)
    shuffled = jax.tree.map(lambda a: a[np.random.default_rng(0).permutation(BATCH)], whole)
    np.testing.assert_allclose(loss(PARAMS, shuffled, key)[0], value, rtol=1e-6)
    parts = [loss(PARAMS, jax.tree.map(lambda a, i=i: a[i::4], whole), key) for i in range(4)]
    np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(np.mean([part[1][name] for part in parts]), metrics[name], rtol=1e-5, atol=1e-7)
    assert abs(float(loss(PARAMS, whole, jax.random.key(8))[0] - value)) > 1e-4  # but the key does


def test_float32_loss_under_a_bfloat16_network():
    process = Joint(image=Gaussian(schedules.flow()), label=processes.absorbing(4))
    streams = {"image": nets.Patches(4, 4, 1, 2), "label": nets.Label(5, 4)}
    half, full = (nets.MMDiT(streams, depth=1, width=16, heads=2, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    data = {
        "image": normal(0, (8, 4, 4, 1)), "label": np.arange(8, dtype=np.int32) % 4, "index": np.arange(8, dtype=np.uint32),
    }
    at = {"image": jnp.ones(8), "label": jnp.ones(8)}
    rng, shapes = np.random.default_rng(0), jax.eval_shape(full.init, jax.random.key(1), data, at)
    params = jax.tree.map(lambda a: rng.normal(scale=0.2, size=a.shape).astype(a.dtype), shapes)

    def run(net):
        loss = losses.diffusion(process, net.apply, MIXTURE)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, data, jax.random.key(2))

    (value, metrics), gradient = run(half)
    (exact, _), reference = run(full)
    assert {leaf.dtype for leaf in jax.tree.leaves((value, metrics, gradient))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(value, exact, rtol=0.02)
    ours, theirs = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (gradient, reference))
    assert float(jnp.vdot(ours, theirs) / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)) > 0.99


def test_terms_share_one_forward_pass():
    calls = []

    def counted(params, x, t):
        calls.append(1)
        return linear_network(params, x, t)

    process = Joint(image=Gaussian(schedules.flow()), label=processes.absorbing(4))
    losses.diffusion(process, counted, MIXTURE, image_terms(process.parts["image"]))(PARAMS, batch(), jax.random.key(0))
    assert len(calls) == 1


def test_a_zero_weight_changes_nothing():
    process = Joint(image=Gaussian(schedules.flow()), label=processes.absorbing(4))
    plain = losses.diffusion(process, linear_network, MIXTURE, {"": (1.0, process.loss)})
    vlb = losses.on("label", losses.vlb(process.parts["label"]))
    extra = losses.diffusion(process, linear_network, MIXTURE, {"": (1.0, process.loss), "vlb": (0.0, vlb)})
    key = jax.random.key(0)
    assert plain(PARAMS, batch(), key)[0] == extra(PARAMS, batch(), key)[0]
