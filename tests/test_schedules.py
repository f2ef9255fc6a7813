"""Schedules against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import schedules

T = np.linspace(0, 1, 41)


def linear_beta64(t, steps=1000):
    log_ab = np.interp(t * steps, np.arange(steps + 1), np.append(0, np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, steps)))))
    return np.exp(log_ab / 2), np.sqrt(-np.expm1(log_ab))


def cosine_beta64(t, steps=1000):
    ab = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - ab[1:] / ab[:-1], 0.999)
    log_ab = np.interp(t * steps, np.arange(steps + 1), np.log(np.append(1, np.cumprod(1 - beta))))
    return np.exp(log_ab / 2), np.sqrt(-np.expm1(log_ab))


def edm64(t):
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return np.ones_like(t), np.where(t > 0, (low + t * (high - low)) ** 7, 0.0)


CASES = {
    "flow": (schedules.flow(), lambda t: (1 - t, t)),
    "cosine": (schedules.cosine(), lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2))),
    "masked_cosine": (schedules.masked_cosine(), lambda t: (1 - np.sin(np.pi * t / 2), np.sin(np.pi * t / 2))),
    "linear_beta": (schedules.linear_beta(), linear_beta64),
    "cosine_beta": (schedules.cosine_beta(), cosine_beta64),
    "edm": (schedules.edm(), edm64),
    "shifted": (schedules.shift(schedules.flow(), 3.0), lambda t: ((1 - t) / (1 + 2 * t), 3 * t / (1 + 2 * t))),
}
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
def test_values(name):
    schedule, exact = CASES[name]
    t = jnp.asarray(T, jnp.float32)
    alpha, sigma = schedule(t)
    assert alpha.dtype == sigma.dtype == jnp.float32 and alpha.shape == sigma.shape == t.shape
    for got, expected in zip((alpha, sigma), exact(np.asarray(t, np.float64))):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


@EVERY
def test_time_zero_is_clean_and_noise_only_grows(name):
    schedule = CASES[name][0]
    alpha, sigma = schedule(jnp.zeros(()))
    assert (float(alpha), float(sigma)) == (1.0, 0.0)
    t = jnp.linspace(1e-4, 1, 500)
    alpha, sigma = schedule(t)
    assert (jnp.diff(sigma) > 0).all() and (jnp.diff(alpha) <= 0).all() and (alpha >= 0).all()
    assert (jnp.diff(schedules.log_snr(schedule, t)[:-1]) < 0).all()


@EVERY
def test_shapes_integers_and_tracing(name):
    schedule = CASES[name][0]
    grid = jnp.linspace(0, 1, 6).reshape(2, 3)
    assert schedule(grid)[0].shape == (2, 3)
    assert schedule(1)[1].dtype == jnp.float32 and schedule(np.float64(0.5))[0].dtype == jnp.float32
    for eager, traced in zip(schedule(grid), jax.jit(schedule)(grid)):
        np.testing.assert_allclose(eager, traced, rtol=1e-5, atol=1e-7)


@EVERY
def test_derivative_is_that_of_the_formula(name):
    schedule, exact = CASES[name]
    t = (np.round(T[1:-1] * 1000) + 0.5) / 1000  # between the nodes of the table
    h = 1e-6
    for got, up, down in zip(schedules.derivative(schedule, t), exact(t + h), exact(t - h)):
        np.testing.assert_allclose(got, (up - down) / (2 * h), rtol=2e-4, atol=2e-5)


@EVERY
@pytest.mark.parametrize("t", [1e-7, 1e-6, 1e-5, 1.0])
def test_derivatives_are_finite_off_zero(name, t):
    assert np.isfinite(schedules.derivative(CASES[name][0], jnp.asarray(t))).all()


def test_variance_is_preserved():
    for name in ("cosine", "linear_beta", "cosine_beta"):
        alpha, sigma = CASES[name][0](jnp.asarray(T, jnp.float32))
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


def test_probabilities_sum_to_one():
    for name in ("flow", "masked_cosine"):
        alpha, sigma = CASES[name][0](jnp.asarray(T, jnp.float32))
        np.testing.assert_allclose(alpha + sigma, 1, atol=1e-6)


def test_the_ends_without_signal_are_exact():
    for name in ("flow", "cosine", "masked_cosine", "shifted"):
        assert tuple(map(float, CASES[name][0](1.0))) == (0.0, 1.0)


@pytest.mark.parametrize("steps", [10, 1000, 4000])
def test_the_table_is_exact_on_its_nodes(steps):
    """t = i / T in float32, however it was rounded, reads node i and not a mixture with its neighbour."""
    i = np.arange(steps + 1)
    log_ab = np.append(0, np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, steps))))
    for t in ((i / steps).astype(np.float32), 1 - (steps - i).astype(np.float32) / np.float32(steps)):
        alpha, sigma = schedules.linear_beta(steps)(t)
        np.testing.assert_allclose(alpha, np.exp(log_ab / 2), rtol=3e-6)
        np.testing.assert_allclose(sigma[1:], np.sqrt(-np.expm1(log_ab))[1:], rtol=3e-6)


def test_published_values():
    """DDPM's alpha_bar_1000 = 4.0e-5, improved DDPM's 2.4e-9; EDM's ends."""
    assert float(schedules.linear_beta()(1.0)[0] ** 2) == pytest.approx(4.036e-5, rel=1e-3)
    assert float(schedules.cosine_beta()(1.0)[0] ** 2) == pytest.approx(2.43e-9, rel=1e-2)
    assert float(schedules.edm()(1.0)[1]) == pytest.approx(80.0, rel=1e-4)
    assert float(schedules.edm()(1e-7)[1]) == pytest.approx(0.002, rel=1e-4)


def test_shift_lowers_log_snr_of_flow_by_twice_the_log():
    t = jnp.linspace(0.05, 0.95, 10)
    gap = schedules.log_snr(schedules.flow(), t) - schedules.log_snr(schedules.shift(schedules.flow(), 3.0), t)
    np.testing.assert_allclose(gap, 2 * np.log(3.0), rtol=1e-4)
    same = schedules.shift(schedules.cosine(), 1.0)(t)
    np.testing.assert_allclose(same, schedules.cosine()(t), rtol=1e-6)


def test_log_snr_at_the_ends():
    assert schedules.log_snr(schedules.flow(), jnp.asarray(0.0)) == jnp.inf
    assert schedules.log_snr(schedules.flow(), jnp.asarray(1.0)) == -jnp.inf
    assert float(schedules.log_snr(schedules.flow(), jnp.asarray(0.5))) == 0


def test_bad_arguments_are_refused():
    for arguments in ({"steps": 0}, {"beta_min": 0.0}, {"beta_min": 0.1, "beta_max": 0.01}, {"beta_max": 1.0}):
        with pytest.raises(ValueError, match="linear_beta needs"):
            schedules.linear_beta(**arguments)
    for arguments in ({"steps": 0}, {"largest": 0.0}, {"largest": 1.0}):
        with pytest.raises(ValueError, match="cosine_beta needs"):
            schedules.cosine_beta(**arguments)
    for log_alpha_bar in ([0.0], [[0.0, -1.0]], [-0.1, -1.0], [0.0, -1.0, -1.0]):
        with pytest.raises(ValueError, match="decreases strictly"):
            schedules.table(np.asarray(log_alpha_bar))
    with pytest.raises(ValueError, match="factor > 0"):
        schedules.shift(schedules.flow(), 0.0)
    with pytest.raises(ValueError, match="edm needs"):
        schedules.edm(sigma_min=1.0, sigma_max=0.5)
