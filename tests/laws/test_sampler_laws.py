"""Laws of the samplers on data whose exact denoiser is known: the right law, and the right order of convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import PREDICTS, SCHEDULES, SCHEDULES64, Mixture, keys
from tiers import some

from mmdiff import processes, sampling
from mmdiff.errors import UserError
from mmdiff.processes import Gaussian, fold

TOY = Mixture([0.5, 0.3, 0.2], [[-1.0, 0.4], [0.3, 1.0], [1.0, -1.0]], 0.4)
NORMAL = Mixture([1.0], [[0.3, -0.2]], 0.5)


def draw(process, toy, count, steps, method="ddim", grid=None):
    solver = {"2m": lambda: sampling.dpmpp_2m(process.schedule), "unipc": lambda: sampling.unipc(process)}.get(method)
    transforms = [solver()] if solver else []

    grid = sampling.uniform_grid(steps) if grid is None else grid

    @jax.jit
    def run(k):
        return sampling.sample(process, toy.image_network(process), None, k, grid, (2,), transforms=transforms, heun=method == "heun")

    return np.asarray(run(keys(count)))


def exact_flow(process, toy, count):
    """Where the probability-flow ODE takes the very prior draws of `sample`, for one Gaussian: x / std(x_t) stays."""
    start = process.prior(fold(keys(count), "prior"), (2,))
    alpha, sigma = process.schedule(1.0)
    return np.asarray(toy.means[0] + toy.std * (start - alpha * toy.means[0]) / jnp.sqrt((alpha * toy.std) ** 2 + sigma**2))


@pytest.mark.parametrize("schedule", some(SCHEDULES, "cosine", "edm"))
def test_deterministic_samplers_follow_the_exact_flow(schedule):
    process = Gaussian(SCHEDULES[schedule], processes.x0)
    exact = exact_flow(process, NORMAL, 64)
    errors = {method: np.abs(draw(process, NORMAL, 64, 64, method) - exact).max() for method in ("ddim", "2m", "heun")}
    assert errors["ddim"] < 0.08 and errors["2m"] < 0.02 and errors["heun"] < 0.03, errors
    assert errors["heun"] < errors["ddim"] and errors["2m"] < errors["ddim"]


@pytest.mark.parametrize("schedule, predict", some([
    ("flow", "x0"), ("flow", "v"), ("flow", "velocity"), ("flow", "edm"), ("cosine", "v"), ("cosine", "velocity"), ("cosine", "edm"),
    ("linear_beta", "eps"), ("linear_beta", "v"), ("edm", "eps"), ("edm", "edm"), ("edm", "velocity"), ("shifted", "velocity"),
], ("flow", "velocity"), ("cosine", "v"), ("linear_beta", "eps"), ("edm", "edm"), ("shifted", "velocity")))
def test_every_parameterisation_samples_alike(schedule, predict):
    ours, plain = (draw(Gaussian(SCHEDULES[schedule], p), NORMAL, 64, 16) for p in (PREDICTS[predict], processes.x0))
    np.testing.assert_allclose(ours, plain, atol=2e-3)


@pytest.mark.parametrize("schedule", some(SCHEDULES, "flow", "linear_beta"))
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


@pytest.mark.parametrize("schedule", some(TIME_OF_LOG_SNR, "flow"))
@pytest.mark.parametrize("method, order", [("ddim", 1), ("2m", 2), ("heun", 2), ("unipc", 3)])
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


def test_unipc_is_the_published_solver():
    """Values of diffusers' UniPCMultistepScheduler (order 2, bh2, x0 predictions, in float64) with the same exact denoiser and nodes."""
    weights, means, std, process = np.asarray([0.5, 0.3, 0.2]), np.asarray([-1.0, 0.3, 1.2]), 0.3, Gaussian(SCHEDULES["flow"])

    def velocity(params, x, t):
        alpha, sigma = 1 - t[:, None], t[:, None]
        variance = (alpha * std) ** 2 + sigma**2
        away = x - alpha * means
        x0 = jax.nn.softmax(jnp.log(weights) - 0.5 * away**2 / variance) * (means + alpha * std**2 / variance * away)
        return (x - x0.sum(1, keepdims=True)) / sigma

    with jax.enable_x64(True):
        grid, start = jnp.append(jnp.linspace(0.9, 0.1, 8), 0.0), jnp.linspace(-2, 2, 5)[:, None]
        options = {"transforms": [sampling.unipc(process)], "history": True}
        states = jax.jit(lambda k: sampling.sample(process, velocity, None, k, grid, (1,), start=start, **options))(keys(5))
    expected = [-1.5451671328726395, -1.1806787202418234, -0.27648235754405165, 1.1307335465417734, 1.6491686729617254]
    np.testing.assert_allclose(states[-1, :, 0], expected, atol=1e-12)
    np.testing.assert_array_equal(states[0], start)


def test_unipc_is_for_deterministic_gaussians():
    for process in (Gaussian(SCHEDULES["flow"], eta=0.5), processes.absorbing(3), processes.Joint(image=Gaussian(SCHEDULES["flow"]))):
        with pytest.raises(UserError, match="Gaussian with eta=0"):
            sampling.unipc(process)
    process = processes.Joint(image=Gaussian(SCHEDULES["flow"]), label=processes.absorbing(3))
    network = lambda params, x, t: {"image": x["image"], "label": jnp.zeros((*x["label"].shape, 3))}  # noqa: E731
    options = {"grid": sampling.uniform_grid(4), "shape": {"image": (2,), "label": ()}, "keys": keys(4)}
    transforms = [sampling.only("image", sampling.unipc(process.parts["image"]))]
    known = jnp.arange(8.0).reshape(4, 2)
    run = jax.jit(functools.partial(sampling.sample, process, network, None, transforms=transforms, **options))
    x = run(given={"image": known})
    np.testing.assert_array_equal(x["image"], known)  # what stands still stays bit for bit
    plain, solved = jax.jit(lambda: sampling.sample(process, network, None, **options))(), run()
    np.testing.assert_array_equal(plain["label"], solved["label"])
    assert np.isfinite(solved["image"]).all() and not np.array_equal(plain["image"], solved["image"])
    with pytest.raises(UserError, match="both solvers"):
        sampling.sample(process, network, None, transforms=transforms, heun=True, **options)


def test_an_example_s_draw_depends_on_its_key_alone():
    process = Gaussian(SCHEDULES["flow"], eta=1.0)
    network = TOY.image_network(process)

    @jax.jit
    def run(k):
        return sampling.sample(process, network, None, k, sampling.uniform_grid(4), (2,))

    order = np.asarray([3, 1, 0, 2])
    np.testing.assert_allclose(run(keys(4))[order], run(keys(4)[order]), atol=1e-6)


# -------------------------------------------------------------------------------------------------------------------- Heun


def textbook(slope, x, nodes):
    """Heun's method in float64 from the first of `nodes` to 0, where it takes Euler's step; and how often it called `slope(x, u)`."""
    calls = 0
    for now, then in zip(nodes[:-1], nodes[1:]):
        first, calls = slope(x, now), calls + 1
        ahead = x + (then - now) * first
        if then > 0:
            x, calls = x + (then - now) * (first + slope(ahead, then)) / 2, calls + 1
        else:
            x = ahead
    return x, calls


def denoised(x, alpha, sigma):
    """E[x_0 | alpha x_0 + sigma eps = x] for TOY, in float64 numpy."""
    means, weights, spread = TOY.means.astype(np.float64), TOY.weights.astype(np.float64), alpha**2 * TOY.std**2 + sigma**2
    gap = x[:, None] - alpha * means
    scores = np.log(weights) - 0.5 * (gap**2).sum(-1) / spread
    share = np.exp(scores - scores.max(1, keepdims=True))
    return ((share / share.sum(1, keepdims=True))[..., None] * (means + alpha * TOY.std**2 / spread * gap)).sum(1)


def network64(process):
    def apply(params, x, t):
        means, weights = jnp.asarray(TOY.means, jnp.float64), jnp.asarray(TOY.weights, jnp.float64)
        inside = jnp.where(t > 0, t, 0.5)[:, None]
        alpha, sigma = process.schedule(inside)
        p, q = process.predict(process.schedule, inside)
        spread, gap = alpha**2 * TOY.std**2 + sigma**2, x[:, None] - alpha[..., None] * means
        share = jax.nn.softmax(jnp.log(weights) - 0.5 * (gap**2).sum(-1) / spread)
        mean = (share[..., None] * (means + (alpha * TOY.std**2 / spread)[..., None] * gap)).sum(1)
        return p * mean + q * (x - alpha * mean) / sigma

    return apply


@pytest.mark.parametrize("schedule, predict", [
    ("flow", "velocity"), ("flow", "v"), ("edm", "edm"), ("edm", "x0"), ("cosine", "v"), ("shifted", "velocity")])
def test_heun_is_the_textbook_s(schedule, predict):
    """In t with the velocity for flow, in sigma for EDM (Karras et al. 2022, algorithm 1), in sigma / (alpha + sigma) for others."""
    grid, calls = np.asarray([1.0, 0.8, 0.55, 0.5, 0.21, 0.0]), []
    with jax.enable_x64(True):
        process = Gaussian(SCHEDULES[schedule], PREDICTS[predict])

        def apply(params, x, t):
            jax.debug.callback(lambda: calls.append(1))
            return network64(process)(params, x, t)

        states = jax.jit(lambda k: sampling.sample(process, apply, None, k, grid, (2,), heun=True, history=True))(keys(32))
        jax.effects_barrier()
        ours, start = np.asarray(states[-1]), np.asarray(states[0])
    alpha, sigma = SCHEDULES64[schedule](grid)
    scale = 1.0 if schedule == "edm" else alpha + sigma
    rise = 0.0 if schedule == "edm" else -1.0  # of alpha / scale against u = sigma / scale
    nodes = sigma / scale

    def slope(x, u):
        """Of x / scale against u."""
        i = int(np.argmin(np.abs(nodes - u)))
        c = 1.0 if schedule == "edm" else (alpha + sigma)[i]
        mean = denoised(c * x, alpha[i], sigma[i])
        return rise * mean + (c * x - alpha[i] * mean) / sigma[i]

    expected, count = textbook(slope, start / np.broadcast_to(scale, grid.shape)[0], nodes)
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == count == 2 * (len(grid) - 1) - 1


@pytest.mark.parametrize("schedule", ["flow", "cosine", "edm"])
def test_heun_is_of_second_order_on_uniform_grids(schedule):
    with jax.enable_x64(True):
        process, k = Gaussian(SCHEDULES[schedule], processes.x0), keys(64)

        @jax.jit  # coarser grids stay at t = 1 for a while: one program for all
        def run(grid):
            return sampling.sample(process, network64(process), None, k, grid, (2,), heun=True)

        steps = np.asarray([16, 32, 64, 128, 1024])
        ends = [np.asarray(run(np.append(np.ones(1024 - n), np.linspace(1, 0, n + 1)))) for n in steps]
    errors = [np.sqrt(((end - ends[-1]) ** 2).mean()) for end in ends[:-1]]
    slope = -np.polyfit(np.log(steps[:-1]), np.log(errors), 1)[0]
    assert slope >= 1.95, (slope, errors)
    if schedule == "flow":
        # Of the mean of the beliefs they would be two to three times as large.
        assert errors[0] < 5e-3 and errors[2] < 3e-4, errors


def test_heun_is_refused_where_it_is_not_defined():
    noisy, plain = (Gaussian(SCHEDULES["flow"], eta=eta) for eta in (1.0, 0.0))
    options = dict(params=None, keys=keys(2), grid=sampling.uniform_grid(3), shape=(2,), heun=True)
    with pytest.raises(UserError, match="eta=0"):
        sampling.sample(noisy, TOY.image_network(noisy), **options)
    with pytest.raises(UserError, match="are both solvers"):
        sampling.sample(plain, TOY.image_network(plain), transforms=[sampling.dpmpp_2m(plain.schedule)], **options)
    clipped = sampling.sample(plain, TOY.image_network(plain), transforms=[sampling.clip(-0.5, 0.5)], **options)
    assert np.abs(clipped).max() <= 0.5 + 1e-6
