"""Laws of the samplers on data whose exact denoiser is known: the right law, and the right order of convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import PREDICTS, SCHEDULES, Mixture, keys

from mmdiff import processes, sampling
from mmdiff.processes import Gaussian, fold

TOY = Mixture([0.5, 0.3, 0.2], [[-1.0, 0.4], [0.3, 1.0], [1.0, -1.0]], 0.4)
NORMAL = Mixture([1.0], [[0.3, -0.2]], 0.5)


def draw(process, toy, count, steps, method="ddim", grid=None):
    maps = [sampling.dpmpp_2m(process.schedule)] if method == "2m" else []

    grid = sampling.uniform_grid(steps) if grid is None else grid

    @jax.jit
    def run(k):
        return sampling.sample(process, toy.image_network(process), None, k, grid, (2,), maps=maps, heun=method == "heun")

    return np.asarray(run(keys(count)))


def exact_flow(process, toy, count):
    """Where the probability-flow ODE takes the very prior draws of `sample`, for one Gaussian: x / std(x_t) stays."""
    start = process.prior(fold(keys(count), "prior"), (2,))
    alpha, sigma = process.schedule(1.0)
    return np.asarray(toy.means[0] + toy.std * (start - alpha * toy.means[0]) / jnp.sqrt((alpha * toy.std) ** 2 + sigma**2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_samplers_follow_the_exact_flow(schedule):
    process = Gaussian(SCHEDULES[schedule], processes.x0)
    exact = exact_flow(process, NORMAL, 64)
    errors = {method: np.abs(draw(process, NORMAL, 64, 64, method) - exact).max() for method in ("ddim", "2m", "heun")}
    assert errors["ddim"] < 0.08 and errors["2m"] < 0.02 and errors["heun"] < 0.03, errors
    assert errors["heun"] < errors["ddim"] and errors["2m"] < errors["ddim"]


@pytest.mark.parametrize("schedule, predict", [(s, p) for s, p in [
    ("flow", "x0"), ("flow", "v"), ("flow", "velocity"), ("flow", "edm"), ("cosine", "v"), ("cosine", "velocity"), ("cosine", "edm"),
    ("linear_beta", "eps"), ("linear_beta", "v"), ("edm", "eps"), ("edm", "edm"), ("edm", "velocity"), ("shifted", "velocity"),
]])
def test_every_parameterisation_samples_alike(schedule, predict):
    ours, plain = (draw(Gaussian(SCHEDULES[schedule], p), NORMAL, 64, 16) for p in (PREDICTS[predict], processes.x0))
    np.testing.assert_allclose(ours, plain, atol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_sampling_has_the_law_of_the_data(schedule):
    process = Gaussian(SCHEDULES[schedule], processes.x0, eta=1.0)
    count = 8000
    x = draw(process, TOY, count, 128)
    mean = TOY.weights @ TOY.means
    between = (TOY.weights[:, None, None] * (TOY.means - mean)[:, :, None] * (TOY.means - mean)[:, None]).sum(0)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(x.T), between + TOY.std**2 * np.eye(2), atol=0.06)
    nearest = np.argmin(((x[:, None] - TOY.means) ** 2).sum(-1), axis=1)
    truth = np.asarray(TOY.draw(jax.random.key(9), 40_000)["image"])
    shares = np.bincount(np.argmin(((truth[:, None] - TOY.means) ** 2).sum(-1), axis=1), minlength=3) / len(truth)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / count, shares, atol=0.03)


TIME_OF_LOG_SNR = {"flow": lambda half: 1 / (1 + np.exp(half)), "cosine": lambda half: 2 / np.pi * np.arctan(np.exp(-half))}


@pytest.mark.parametrize("schedule", TIME_OF_LOG_SNR)
@pytest.mark.parametrize("method, order", [("ddim", 1), ("2m", 2), ("heun", 2)])
def test_order_of_convergence(schedule, method, order):
    """The slope of log error against log steps, by regression over 8 to 64 steps even in log-SNR, on a mixture.

    The first step and the last, at whose ends log-SNR is infinite, are the same for all; the reference takes 2,048 between them.
    """
    process = Gaussian(SCHEDULES[schedule], processes.x0)

    def end(steps):
        inner = TIME_OF_LOG_SNR[schedule](np.linspace(-2, 3, steps + 1))
        return draw(process, TOY, 64, steps, method, jnp.asarray([1.0, *inner, 0.0], jnp.float32))

    reference = end(2048)
    steps = np.asarray([8, 16, 32, 64])
    errors = [np.sqrt(((end(n) - reference) ** 2).mean()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, (slope, errors)


def test_an_example_s_draw_depends_on_its_key_alone():
    process = Gaussian(SCHEDULES["flow"], eta=1.0)
    network = TOY.image_network(process)

    @jax.jit
    def run(k):
        return sampling.sample(process, network, None, k, sampling.uniform_grid(4), (2,))

    order = np.asarray([3, 1, 0, 2])
    np.testing.assert_allclose(run(keys(4))[order], run(keys(4)[order]), atol=1e-6)
