"""Laws of Gaussian diffusion, over every schedule and parameterisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import PREDICTS, SCHEDULES, SCHEDULES64, keys

from mmdiff import processes, schedules
from mmdiff.errors import UserError
from mmdiff.processes import Gaussian, LearnedSigma, Noised, gaussian

EVERY = [(s, p) for s in SCHEDULES for p in PREDICTS if p != "eps" or s in ("linear_beta", "edm")]  # the others end without signal
TIMES = jnp.asarray([0.0, 1e-6, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999, 1.0], jnp.float32)
EPS = float(jnp.finfo(jnp.float32).eps)


def at_times(seed=0, t=TIMES):
    x0 = jax.random.normal(jax.random.key(seed), (len(t), 3, 2))
    return x0, t


@pytest.mark.parametrize("schedule, predict", EVERY)
def test_clean_undoes_the_target(schedule, predict):
    process = Gaussian(SCHEDULES[schedule], PREDICTS[predict])
    x0, t = at_times()
    noised = process.corrupt(keys(len(t)), x0, t)
    inside = jnp.where(t > 0, t, 0.5)
    alpha, sigma = (np.asarray(c, np.float64)[:, None, None] for c in process.schedule(inside))
    p, q = (np.asarray(c, np.float64)[:, None, None] for c in process.predict(process.schedule, inside))
    target = (p * x0 + q * noised.noise).astype(np.float32)
    got = np.asarray(process.clean(jnp.asarray(target), noised.xt, t), np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[0], x0[0])  # t = 0: known
    # Elsewhere to the accuracy that float32 inputs allow: (|q x_t| + |sigma out|) eps / |det|.
    determinant = np.abs(q * alpha - sigma * p)
    error = np.abs(got - x0)[1:]
    allowed = (8 * EPS * (np.abs(q * noised.xt) + sigma * np.abs(target)) / np.maximum(determinant, 1e-30) + 1e-6)[1:]
    solvable = np.broadcast_to(determinant[1:] > 10 * EPS, error.shape)
    assert (error <= allowed)[solvable].all(), (error / allowed)[solvable].max()
    # What is not solvable: eps where no signal is left, and x0 within 1e-6 of clean, where the system is clamped.
    unsolved = np.asarray(t)[1:][~solvable.all((1, 2))]
    assert not unsolved.size or (predict in ("eps", "x0") and set(unsolved) <= {np.float32(1e-6), np.float32(1.0)})


@pytest.mark.parametrize("schedule, predict", EVERY)
def test_a_perfect_network_has_no_loss(schedule, predict):
    process = Gaussian(SCHEDULES[schedule], PREDICTS[predict])
    x0, t = at_times()
    noised = process.corrupt(keys(len(t)), x0, t)
    p, q = (c[:, None, None] for c in process.predict(process.schedule, jnp.where(t > 0, t, 0.5)))
    out = p * x0 + q * noised.noise
    loss = process.loss(out, noised)
    assert loss.shape == t.shape and loss.dtype == jnp.float32
    assert float((loss / (1 + (out**2).mean((1, 2)))).max()) < 1e-12
    off = process.loss(out + 0.5, noised)
    np.testing.assert_allclose(off[1:], 0.25, rtol=1e-3)
    assert off[0] == 0


@pytest.mark.parametrize("schedule, predict", EVERY)
def test_eps_scale_turns_any_residual_into_the_error_in_eps(schedule, predict):
    process = Gaussian(SCHEDULES[schedule], PREDICTS[predict])
    t = jnp.linspace(0.05, 0.95, 7)
    x0, _ = at_times(t=t)
    noised = process.corrupt(keys(len(t)), x0, t)
    out = jax.random.normal(jax.random.key(5), x0.shape)
    x0_hat = process.clean(out, noised.xt, t)
    alpha, sigma = (c[:, None, None] for c in process.schedule(t))
    eps_hat = (noised.xt - alpha * x0_hat) / sigma
    residual = process.residual(out, noised) * process.eps_scale(t)[:, None, None]
    np.testing.assert_allclose(np.abs(residual), np.abs(eps_hat - noised.noise), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("schedule, predict", EVERY)
def test_loss_and_gradient_are_finite_and_zero_at_time_zero(schedule, predict):
    process = Gaussian(SCHEDULES[schedule], PREDICTS[predict])
    x0, t = at_times()
    noised = process.corrupt(keys(len(t)), x0, t)

    def losses(out):
        x0_hat = process.clean(out, noised.xt, t)
        s = jnp.maximum(t - 0.125, 0.0)
        bounded = jnp.where(s > 0, process.kl(noised, x0_hat, s), 0.0)  # a Gaussian's last step is the decoder's
        return process.loss(out, noised), process.elbo_rate(noised, x0_hat), bounded

    out = 0.1 * jnp.ones_like(x0)
    for i, value in enumerate(losses(out)):
        assert value[0] == 0
        gradient = jax.grad(lambda o, i=i: losses(o)[i].sum())(out)
        assert np.isfinite(value).all() and np.isfinite(gradient).all()
        assert not gradient[0].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_pinned_at_zero_and_standing_still(schedule, eta):
    process = Gaussian(SCHEDULES[schedule], eta=eta)
    x0 = jax.random.normal(jax.random.key(1), (6, 5))
    zero = jnp.zeros(6)
    noised = process.corrupt(keys(6), x0, zero)
    np.testing.assert_array_equal(noised.xt, x0)
    np.testing.assert_array_equal(process.step(keys(6), x0, 7.0 * x0, zero, zero), x0)
    np.testing.assert_array_equal(process.clean(jnp.ones_like(x0), x0, zero), x0)
    t = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    xt = process.corrupt(keys(6), x0, t).xt
    np.testing.assert_array_equal(process.step(keys(6), xt, jnp.zeros_like(xt), t, t), xt)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_steps_compose(schedule):
    """Chapman-Kolmogorov of DDIM: t -> s -> r is t -> r for a belief that does not change."""
    process = Gaussian(SCHEDULES[schedule])
    x0 = jax.random.normal(jax.random.key(1), (4, 5))
    t, s, r = jnp.asarray([1.0, 0.9, 0.5, 0.3]), jnp.asarray([0.7, 0.5, 0.4, 0.2]), jnp.asarray([0.3, 0.0, 0.1, 0.1])
    xt = process.corrupt(keys(4), x0, t).xt
    belief = x0 + 0.3
    twice = process.step(keys(4), process.step(keys(4), xt, belief, t, s), belief, s, r)
    once = process.step(keys(4), xt, belief, t, r)
    np.testing.assert_allclose(twice, once, rtol=1e-4, atol=1e-5 * float(jnp.abs(xt).max()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_with_the_true_x0_keeps_the_marginal(schedule, eta):
    """x_t ~ q(x_t | x_0) and x0_hat = x_0 give x_s ~ q(x_s | x_0), whatever eta."""
    process = Gaussian(SCHEDULES[schedule], eta=eta)
    count, t, s = 20_000, 0.7, 0.4
    x0 = jnp.full((count, 1), 0.8)
    t, s = jnp.full((count,), t), jnp.full((count,), s)
    xs = process.step(keys(count, 2), process.corrupt(keys(count, 1), x0, t).xt, x0, t, s)
    alpha, sigma = SCHEDULES64[schedule](np.float64(0.4))
    # Four standard errors of a mean and of a standard deviation.
    assert abs(float(xs.mean()) - alpha * 0.8) < 4 * sigma / count**0.5
    assert abs(float(xs.std()) - sigma) < 4 * sigma / (2 * count) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eta_one_is_the_exact_posterior(schedule):
    process = Gaussian(SCHEDULES[schedule], eta=1.0)
    count = 20_000
    x0, xt = jnp.full((count, 1), 0.8), jnp.full((count, 1), -1.3)
    t, s = jnp.full((count,), 0.7), jnp.full((count,), 0.4)
    xs = process.step(keys(count), xt, x0, t, s)
    (a_t, s_t), (a_s, s_s) = (SCHEDULES64[schedule](np.float64(u)) for u in (0.7, 0.4))
    # Bayes: prior N(a_s x0, s_s^2) on x_s, likelihood x_t = (a_t / a_s) x_s + N(0, s_t^2 - (a_t / a_s)^2 s_s^2).
    gain, rest = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
    precision = 1 / s_s**2 + gain**2 / rest
    mean = (a_s * 0.8 / s_s**2 + gain * -1.3 / rest) / precision
    std = precision**-0.5
    assert abs(float(xs.mean()) - mean) < 4 * std / count**0.5
    assert abs(float(xs.std()) - std) < 4 * std / (2 * count) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kl_is_that_of_the_posteriors(schedule):
    """KL(q(x_s | x_t, x_0) || q(x_s | x_t, x0_hat)) of the exact posteriors, two Gaussians of one variance."""
    process = Gaussian(SCHEDULES[schedule])
    x0, x0_hat = jnp.asarray([[0.8, -0.1]]), jnp.asarray([[0.2, 0.3]])
    for t, s in ((1.0, 0.9), (0.7, 0.4), (0.3, 0.299), (0.02, 0.01)):
        (a_t, s_t), (a_s, s_s) = (SCHEDULES64[schedule](np.float64(np.float32(u))) for u in (t, s))
        gain = a_t / a_s
        variance = s_s**2 * (s_t**2 - gain**2 * s_s**2) / s_t**2
        slope = a_s * (s_t**2 - gain**2 * s_s**2) / s_t**2  # d mean / d x_0
        expected = slope**2 * float(((x0 - x0_hat) ** 2).sum()) / (2 * variance)
        noised = process.corrupt(keys(1), x0, jnp.asarray([t]))
        got = float(process.kl(noised, x0_hat, jnp.asarray([s]))[0])
        np.testing.assert_allclose(got, expected, rtol=3e-3 if t - s < 0.01 else 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_is_the_limit_of_kl(schedule):
    process = Gaussian(SCHEDULES[schedule])
    # Midpoints between the nodes of the table, where its interpolant is smooth.
    t = (np.round(np.asarray([0.05, 0.2, 0.5, 0.8, 0.95]) * 1000) + 0.5) / 1000
    x0 = jax.random.normal(jax.random.key(0), (len(t), 4))
    x0_hat = x0 + 0.1
    noised = process.corrupt(keys(len(t)), x0, jnp.asarray(t, jnp.float32))
    got = process.elbo_rate(noised, x0_hat)
    dt = 1e-6

    def snr(u):
        alpha, sigma = SCHEDULES64[schedule](u)
        return (alpha / sigma) ** 2

    limit = (snr(t - dt) - snr(t + dt)) / (2 * dt) / 2 * np.asarray(((x0 - x0_hat) ** 2).sum(-1))
    np.testing.assert_allclose(got, limit, rtol=2e-3)
    s = jnp.asarray(t - 2.5e-4, jnp.float32)
    coarse = process.kl(noised, x0_hat, s) / (noised.t - s)
    np.testing.assert_allclose(coarse, got, rtol=2e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prior_is_the_end_of_the_chain(schedule):
    process = Gaussian(SCHEDULES[schedule])
    alpha, sigma = SCHEDULES64[schedule](np.float64(1.0))
    draw = process.prior(keys(5000), (2,))
    assert draw.shape == (5000, 2)
    assert abs(float(draw.std()) - sigma) < 4 * sigma / (2 * 10_000) ** 0.5
    x0 = jnp.asarray([[1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_allclose(process.prior_kl(x0), 0.5 * (alpha / sigma) ** 2 * np.asarray([5.0, 0.0]), rtol=1e-3, atol=1e-6)


def test_edm_preconditioning():
    """c_skip, c_out and c_in of EDM, equation 7, from the 2x2 system."""
    std = 0.5
    process = Gaussian(schedules.edm(), gaussian.edm(std), data_std=std)
    t = jnp.linspace(0.1, 1.0, 6)
    sigma = process.schedule(t)[1][:, None]
    xt, out = jax.random.normal(jax.random.key(0), (2, 6, 3))
    expected = std**2 / (sigma**2 + std**2) * xt + sigma * std / jnp.sqrt(sigma**2 + std**2) * out
    np.testing.assert_allclose(process.clean(out, xt, t), expected, rtol=1e-3, atol=1e-4)
    net_x, net_t = process.inputs(xt, t)
    np.testing.assert_allclose(net_x, xt / jnp.sqrt(sigma**2 + std**2), rtol=1e-5)
    np.testing.assert_array_equal(net_t, t)


def test_a_learned_sigma_head_is_ignored():
    process = Gaussian(schedules.flow())
    x0, t = jax.random.normal(jax.random.key(0), (4, 2, 2, 3)), jnp.asarray([0.1, 0.4, 0.6, 1.0])
    noised = process.corrupt(keys(4), x0, t)
    out = jax.random.normal(jax.random.key(1), (4, 2, 2, 6))
    np.testing.assert_array_equal(process.loss(out, noised), process.loss(out[..., :3], noised))
    np.testing.assert_array_equal(process.clean(out, noised.xt, t), process.clean(out[..., :3], noised.xt, t))


def test_scalars_are_data_too():
    process = Gaussian(schedules.cosine(), gaussian.v)
    x0, t = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 0.9])
    noised = process.corrupt(keys(2), x0, t)
    assert noised.xt.shape == (2,)
    assert process.loss(jnp.zeros(2), noised).shape == (2,)
    assert process.prior(keys(2), ()).shape == (2,)


def test_half_precision_outputs_are_read_in_float32():
    process = Gaussian(schedules.flow())
    x0, t = jax.random.normal(jax.random.key(0), (4, 8)), jnp.asarray([0.1, 0.4, 0.6, 1.0])
    noised = process.corrupt(keys(4), x0, t)
    out = jax.random.normal(jax.random.key(1), (4, 8)).astype(jnp.bfloat16)
    assert process.loss(out, noised).dtype == jnp.float32
    np.testing.assert_array_equal(process.loss(out, noised), process.loss(out.astype(jnp.float32), noised))


def test_the_noise_depends_on_the_example_s_key_alone():
    process = Gaussian(schedules.flow())
    x0, t = jax.random.normal(jax.random.key(0), (4, 3)), jnp.asarray([0.2, 0.4, 0.6, 1.0])
    order = np.asarray([2, 0, 3, 1])
    one, two = process.corrupt(keys(4), x0, t), process.corrupt(keys(4)[order], x0[order], t[order])
    np.testing.assert_array_equal(one.xt[order], two.xt)


def test_given_is_present_until_time_one():
    process = processes.Given(null=3)
    x0, t = jnp.asarray([0, 1, 2]), jnp.asarray([0.0, 0.99, 1.0])
    noised = process.corrupt(keys(3), x0, t)
    np.testing.assert_array_equal(noised.xt, [0, 1, 3])
    np.testing.assert_array_equal(process.prior(keys(2), (2,)), np.full((2, 2), 3))
    np.testing.assert_array_equal(process.step(keys(3), noised.xt, None, t, 0 * t), noised.xt)
    for nothing in (process.loss(None, noised), process.kl(noised, None, t), process.elbo_rate(noised, None), process.prior_kl(x0)):
        np.testing.assert_array_equal(nothing, np.zeros(3))
    features = processes.Given(null=np.asarray([0.5, -0.5], np.float32))
    vectors = jnp.ones((2, 2))
    np.testing.assert_array_equal(features.corrupt(keys(2), vectors, jnp.asarray([0.0, 1.0])).xt, [[1, 1], [0.5, -0.5]])


def test_the_interface_is_abstract():
    process = processes.Process()
    array = jnp.zeros(1)
    noised = Noised(array, array, array)
    for call in (
        lambda: process.prior(None, ()), lambda: process.corrupt(None, array, array), lambda: process.clean(array, array, array),
        lambda: process.loss(array, noised), lambda: process.step(None, array, array, array, array),
        lambda: process.kl(noised, array, array), lambda: process.prior_kl(array), lambda: process.elbo_rate(noised, array),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert process.inputs(array, array) == (array, array)


@pytest.mark.parametrize("schedule", ["flow", "cosine", "shifted", "linear_beta", "edm"])
def test_a_parameterisation_that_is_silent_somewhere_is_refused(schedule):
    """eps says nothing of x_0 where alpha = 0: DDIM would divide by a rounding error there. A little signal is enough."""
    for kind in (Gaussian, LearnedSigma):
        if schedule in ("linear_beta", "edm"):
            kind(SCHEDULES[schedule], PREDICTS["eps"])
        else:
            with pytest.raises(UserError, match="eps says nothing about x_0 at t = 1, .* predict v, velocity or x0"):
                kind(SCHEDULES[schedule], PREDICTS["eps"])
        for predict in ("x0", "v", "velocity", "edm"):
            jax.eval_shape(lambda x, predict=predict: kind(SCHEDULES[schedule], PREDICTS[predict]).schedule(x), jnp.ones(()))
    Gaussian(schedules.cosine_beta(), PREDICTS["eps"])
    for silent in (lambda schedule, t: (1.0 - t, t), lambda schedule, t: (0.0 * t, t - 0.305)):
        with pytest.raises(UserError, match="says nothing about x_0 at t = 0.0156"):
            Gaussian(schedules.edm(), silent) if silent(None, 0.5)[0] == 0 else Gaussian(schedules.flow(), silent)
