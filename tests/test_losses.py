"""Losses: weights and terms against their formulas, and how losses add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

from mmdiff import losses, processes, schedules, times
from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss, Pieces
from mmdiff.processes import Gaussian, Joint, Noised

B = 8


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def noised_by(process, seed=0, t=None):
    x0 = jax.random.normal(jax.random.key(seed), (B, 4))
    return process.corrupt(keys(B, seed), x0, jnp.linspace(0.1, 0.9, B) if t is None else t)


def batch(count=B):
    return {
        "image": jax.random.normal(jax.random.key(2), (count, 3)),
        "label": jnp.arange(count, dtype=jnp.int32) % 4,
        "index": jnp.arange(count, dtype=jnp.uint32),
    }


def network(params, x, t):
    out = {}
    if "image" in x:
        out["image"] = params * x["image"] * t["image"][:, None]
    if "label" in x:
        out["label"] = params * jnp.cos(x["label"][:, None] + jnp.arange(4.0))
    return out


PROCESS = Joint(image=Gaussian(schedules.flow()), label=processes.absorbing(4))
TIMES = times.joint(image=times.uniform(), label=times.uniform())


def test_diffusion_is_the_mean_of_the_process_s_loss():
    value, metrics = losses.diffusion(PROCESS, network, TIMES)(1.5, batch(), jax.random.key(0))
    assert set(metrics) == {"loss/image", "loss/label"}
    np.testing.assert_allclose(value, metrics["loss/image"] + metrics["loss/label"], rtol=1e-6)
    # By hand, for a network that says nothing at one fixed time.
    at = times.joint(image=times.constant(0.5), label=times.constant(1.0))
    _, metrics = losses.diffusion(PROCESS, network, at)(0.0, batch(), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss/label"], np.log(4), rtol=1e-6)  # everything is masked: uniform over four
    seen = []

    def spy(out, noised):
        seen.append(noised)
        return PROCESS.loss(out, noised)["image"]

    value, metrics = losses.diffusion(PROCESS, network, at, {"mine": (3.0, spy)})(0.0, batch(), jax.random.key(0))
    expected = ((seen[0].noise["image"] - seen[0].x0["image"]) ** 2).mean()
    np.testing.assert_allclose(metrics["loss/mine"], expected, rtol=1e-6)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-6)


def test_terms_are_named_and_weighted():
    image = PROCESS.parts["image"]
    terms = {"all": (2.0, PROCESS.loss), "again": (0.5, losses.on("image", image.loss))}
    value, metrics = losses.diffusion(PROCESS, network, TIMES, terms)(1.5, batch(), jax.random.key(0))
    assert set(metrics) == {"loss/all/image", "loss/all/label", "loss/again"}
    assert metrics["loss/again"] == metrics["loss/all/image"]
    np.testing.assert_allclose(
        value, 2 * metrics["loss/all/image"] + 2 * metrics["loss/all/label"] + 0.5 * metrics["loss/again"], rtol=1e-6)


def test_a_single_process_needs_no_joint():
    process = Gaussian(schedules.flow())
    loss = losses.diffusion(process, lambda params, x, t: params * x, times.uniform())
    value, metrics = loss(0.5, {"x0": jnp.ones((B, 3)), "index": jnp.arange(B)}, jax.random.key(0))
    assert set(metrics) == {"loss"} and metrics["loss"] == value


def test_combine_adds_whole_losses():
    one = losses.diffusion(Joint(image=PROCESS.parts["image"]), network, times.joint(image=times.uniform()))
    two = losses.diffusion(Joint(label=PROCESS.parts["label"]), network, times.joint(label=times.uniform()))
    both = losses.combine(generate=(1.0, one), align=(0.25, two))
    value, metrics = both(1.5, batch(), jax.random.key(0))
    assert set(metrics) == {"generate/loss", "generate/loss/image", "align/loss", "align/loss/label"}
    np.testing.assert_allclose(value, metrics["generate/loss"] + 0.25 * metrics["align/loss"], rtol=1e-6)
    # Each has its own key, by name: another loss beside it changes nothing.
    alone = losses.combine(generate=(1.0, one))(1.5, batch(), jax.random.key(0))[1]
    assert alone["generate/loss"] == metrics["generate/loss"]
    # Runs from before two names were changed continue bit for bit.
    assert losses.combine(draw=(1.0, one), name=(0.25, two))(1.5, batch(), jax.random.key(0))[0] == value
    gradient = jax.grad(lambda p: both(p, batch(), jax.random.key(0))[0])(1.5)
    assert np.isfinite(gradient)


@pytest.mark.parametrize("compared", [False, True])
def test_a_loss_of_weight_0_is_reported_and_nothing_else(compared):
    """0 times NaN is NaN, and so is a gradient of 0 times the slope of a square root at 0: of a loss, and of its embeddings."""
    def broken(params):
        return jnp.sqrt(0.0 * params)

    def pieces(params, batch, key, **_):
        return Pieces(jnp.zeros(()), {}, broken(params) * jnp.ones(B))

    bad = BatchLoss(pieces=pieces, contrast=lambda params, e: Pieces(jnp.nan * e.sum(), {})) if compared else (
        lambda params, batch, key: (jnp.nan * broken(params), {}))
    both = losses.combine(use=(1.0, lambda params, batch, key: (3.0 * params, {})), look=(0.0, bad))
    (value, metrics), gradient = jax.value_and_grad(both, has_aux=True)(1.5, batch(), jax.random.key(0))
    assert (value, gradient) == (4.5, 3.0) and np.isnan(metrics["look/loss"])
    # As micro-batches have it: the cotangents of the embeddings are arrays of zeros.
    embeddings, back = jax.vjp(lambda p: both.pieces(p, batch(), jax.random.key(0)).embeddings, 1.5)
    assert not compared or back(jax.tree.map(jnp.zeros_like, embeddings)) == (0.0,)


def test_on_picks_one_modality():
    noised = PROCESS.corrupt(keys(B), {k: batch()[k] for k in ("image", "label")}, {"image": jnp.full(B, 0.3), "label": jnp.full(B, 0.6)})
    out = network(1.5, noised.xt, noised.t)
    for name in ("image", "label"):
        np.testing.assert_array_equal(losses.on(name, PROCESS.parts[name].loss)(out, noised), PROCESS.loss(out, noised)[name])
    bare = Noised(noised.x0, noised.xt, noised.t)
    np.testing.assert_array_equal(losses.on("label", PROCESS.parts["label"].loss)(out, bare), PROCESS.loss(out, noised)["label"])


PREDICTS = {"x0": processes.x0, "eps": processes.eps, "v": processes.v, "velocity": processes.velocity, "edm": processes.edm(0.5)}
WEIGHTS = {
    "snr": (losses.snr(), lambda snr, slope: np.ones_like(snr)),
    "min_snr": (losses.min_snr(5.0), lambda snr, slope: np.minimum(1, 5 / snr)),
    "sigmoid": (losses.sigmoid(-1.0), lambda snr, slope: -slope / (1 + np.exp(1 + np.log(snr)))),
}


@pytest.mark.parametrize("predict", PREDICTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weighted_squared_error_is_the_same_for_all_parameterisations(weight, predict):
    process = Gaussian(lambda t: schedules.cosine()(0.99 * t), PREDICTS[predict])
    noised = noised_by(process)
    x0_hat = noised.x0 + 0.3 * noised.noise
    alpha, sigma = (np.asarray(c, np.float64) for c in process.schedule(noised.t))
    p, q = process.predict(process.schedule, noised.t)
    eps_hat = (noised.xt - alpha[:, None] * x0_hat) / sigma[:, None]
    out = p[:, None] * x0_hat + q[:, None] * eps_hat
    function, formula = WEIGHTS[weight]
    t = 0.99 * np.asarray(noised.t, np.float64)
    slope = -0.99 * np.pi * (np.tan(np.pi * t / 2) + 1 / np.tan(np.pi * t / 2))  # of 2 log(cos / sin)
    expected = formula((alpha / sigma) ** 2, slope) * np.asarray(((noised.noise - eps_hat) ** 2).mean(-1))
    np.testing.assert_allclose(losses.mse(process, function)(out, noised), expected, rtol=1e-3)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_are_finite_at_the_ends(weight):
    for schedule in (schedules.flow(), schedules.cosine(), schedules.edm(), schedules.linear_beta()):
        process = Gaussian(schedule)
        noised = noised_by(process, t=jnp.asarray([0.0, 1e-6, 0.3, 0.5, 0.9, 0.999, 1.0, 1.0]))
        values = losses.mse(process, WEIGHTS[weight][0])(jnp.zeros((B, 4)), noised)
        assert np.isfinite(values).all() and values[0] == 0, values


def test_an_error_in_another_parameterisation():
    """Of x_0 in velocity it is the squared error over max(t, floor)^2 to t = 1; in what is predicted the process's own loss."""
    t = jnp.asarray([0.0, 1e-3, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
    data = Gaussian(schedules.flow(), processes.x0)
    noised, error = noised_by(data, t=t), normal(5, (B, 4))
    curved = schedules.linear_beta()
    every = {name: Gaussian(curved, predict) for name, predict in PREDICTS.items()}

    @jax.jit
    def found(error):
        out = noised.x0 + error
        velocity = losses.error_in(data, processes.velocity, 0.05)
        values, slope = jax.vjp(lambda out: velocity(out, noised), out)
        ends = losses.error_in(data, processes.velocity)(out, noised), losses.error_in(data, processes.eps)(out, noised)
        own, other = {}, {}
        for name, process in every.items():
            bent = noised_by(process, t=jnp.maximum(t, 1e-3))
            own[name] = losses.error_in(process, process.predict)(error, bent), process.loss(error, bent)
            x0_hat = process.clean(error, bent.xt, bent.t)
            alpha, sigma = (c[:, None] for c in curved(bent.t))
            truth, belief = (alpha * (bent.xt - alpha * x) / sigma - sigma * x for x in (bent.x0, x0_hat))  # v
            other[name] = losses.error_in(process, processes.v)(error, bent), ((truth - belief) ** 2).mean(-1)
        return values, slope(jnp.ones(B))[0], ends, own, other

    values, slope, (whole, eps), own, other = found(error)
    squares = np.asarray((error**2).mean(-1))
    np.testing.assert_allclose(values[1:], squares[1:] * [400, 400, 100, 1 / 0.09, 4, 1 / 0.81, 1], rtol=1e-5)
    assert values[0] == 0 == np.abs(slope[0]).max() and np.isfinite(slope).all() and slope[-1].any()
    np.testing.assert_allclose(whole[2:], squares[2:] / np.asarray(t[2:]) ** 2, rtol=1e-5)
    np.testing.assert_allclose(eps[2:], squares[2:] * (1 / np.asarray(t[2:]) - 1) ** 2, rtol=1e-5, atol=1e-12)
    for name in PREDICTS:
        np.testing.assert_allclose(*own[name], rtol=1e-6)
        np.testing.assert_allclose(other[name][0][2:], other[name][1][2:], rtol=2e-3)
    with pytest.raises(UserError, match="floor of 0 or more and below 1"):
        losses.error_in(data, processes.velocity, 1.0)


@pytest.mark.slow
def test_vlb_terms():
    process = processes.absorbing(4)
    x0 = jnp.arange(24, dtype=jnp.int32).reshape(B, 3) % 4
    noised = process.corrupt(keys(B), x0, (jnp.arange(B) + 1.0) / B)
    out = jax.random.normal(jax.random.key(0), (B, 3, 4))
    x0_hat = process.clean(out, noised.xt, noised.t)
    np.testing.assert_allclose(losses.vlb(process)(out, noised), process.elbo_rate(noised, x0_hat) / 3, rtol=1e-6)
    expected = B * process.kl(noised, x0_hat, jnp.arange(B) / B) / 3
    np.testing.assert_allclose(losses.vlb(process, steps=B)(out, noised), expected, rtol=1e-5, atol=1e-6)


def test_x0_cross_entropy_counts_every_position_up_to_a_limit():
    process = processes.absorbing(4)
    x0 = jnp.arange(24, dtype=jnp.int32).reshape(B, 3) % 4
    t = jnp.arange(B) / B
    out = jax.random.normal(jax.random.key(0), (B, 3, 4))
    nll = np.log(np.exp(out).sum(-1)) - np.take_along_axis(np.asarray(out), np.asarray(x0)[..., None], -1)[..., 0]
    for xt in (x0, (x0 + 1) % 4, jnp.full((B, 3), 4)):  # known, contradicted and masked: all the same
        values = losses.x0_ce(process)(out, Noised(x0, xt, t))
        np.testing.assert_allclose(values, np.where(t > 0, nll.mean(-1), 0), rtol=1e-5)
    certain = 100 * jax.nn.one_hot((x0 + 1) % 4, 4)
    value, gradient = jax.value_and_grad(lambda out: losses.x0_ce(process)(out, Noised(x0, x0, t)).sum())(certain)
    np.testing.assert_allclose(value, 70 * (B - 1))
    assert not gradient.any()
    with pytest.raises(ValueError, match="logits of 4 classes"):
        losses.x0_ce(process)(jnp.zeros((B, 3, 5)), Noised(x0, x0, t))


def test_the_auxiliary_loss_is_weighted_by_time():
    """a(t) = 2 - i / T, or 1 + i / T, at t = (i + 1) / T."""
    process, steps = processes.absorbing(4), 5
    noised = Noised(jnp.zeros((5, 2), jnp.int32), jnp.full((5, 2), 4), (jnp.arange(5) + 1.0) / steps)
    out = jax.random.normal(jax.random.key(0), (5, 2, 4))
    plain = losses.x0_ce(process)(out, noised)
    np.testing.assert_allclose(losses.auxiliary(process, steps)(out, noised) / plain, [2.0, 1.8, 1.6, 1.4, 1.2], rtol=1e-5)
    np.testing.assert_allclose(losses.auxiliary(process, steps, falling=False)(out, noised) / plain, [1, 1.2, 1.4, 1.6, 1.8], rtol=1e-5)


def test_the_last_step_of_a_gaussian_is_left_to_its_decoder():
    process = Gaussian(schedules.cosine_beta(), processes.eps)
    noised = noised_by(process, t=(jnp.arange(B) + 1.0) / B)
    term = losses.vlb(process, steps=B)
    out = jnp.zeros((B, 4))
    values, gradient = term(out, noised), jax.grad(lambda o: term(o, noised)[:-1].sum())(out)
    assert np.isfinite(values[:-1]).all() and values[0] == 0 and (values[1:-1] > 0).all()
    assert np.isfinite(gradient).all()


def test_a_batch_without_a_modality_is_refused():
    with pytest.raises(KeyError, match="label"):
        losses.diffusion(PROCESS, network, TIMES)(1.0, {"image": jnp.ones((2, 3)), "index": jnp.arange(2)}, jax.random.key(0))


def test_flips_mirror_their_share_of_the_images_each_by_its_own_key():
    images = np.random.default_rng(0).normal(size=(400, 2, 3, 1)).astype(np.float32)
    mirror, own = losses.flips("image", 0.25), keys(400)
    found = np.asarray(mirror({"image": jnp.asarray(images), "label": jnp.zeros(400)}, own)["image"])
    flipped = (found == images[:, :, ::-1]).all((1, 2, 3))
    assert ((found == images).all((1, 2, 3)) ^ flipped).all() and 70 < flipped.sum() < 130
    np.testing.assert_array_equal(mirror({"image": jnp.asarray(images[7:9])}, own[7:9])["image"], found[7:9])
    np.testing.assert_array_equal(losses.flips("image", 0.0)({"image": jnp.asarray(images)}, own)["image"], images)
