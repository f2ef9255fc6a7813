"""Laws of the learned variance: between the two bounds, a true KL, and at its optimum the variance of the exact reverse process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import SCHEDULES

from mmdiff import losses
from mmdiff.processes import Gaussian, LearnedSigma, Noised, eps, v

COUNT = 4000


def setting(schedule, t, s, size=3):
    """Random (keys, noised, x0_hat) at times t with a target s, as [B]."""
    keys = jax.random.split(jax.random.key(0), COUNT)
    x0, x0_hat = jax.random.normal(jax.random.key(1), (2, COUNT, size))
    t, s = jnp.full(COUNT, t), jnp.full(COUNT, s)
    return keys, Gaussian(schedule).corrupt(keys, x0, t), x0_hat, s


def belief(x0_hat, share):
    return jnp.concatenate([x0_hat, jnp.full_like(x0_hat, share)], -1)


def bounds(schedule, t, s):
    """(beta~, beta) of the step from t to s in float64, from the definition."""
    (alpha, sigma), (alpha_s, sigma_s) = (np.float64(schedule(u)) for u in (t, s))
    beta = sigma**2 - (alpha / alpha_s * sigma_s) ** 2
    return beta * (sigma_s / sigma) ** 2, beta


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear_beta", "flow", "edm"])
def test_without_a_share_it_is_the_posterior(schedule):
    keys, noised, x0_hat, s = setting(SCHEDULES[schedule], 0.6, 0.55)
    learned, plain = LearnedSigma(SCHEDULES[schedule]), Gaussian(SCHEDULES[schedule], eta=1.0)
    for end in (s, jnp.zeros(COUNT), noised.t):
        args = noised.t, end
        np.testing.assert_allclose(
            learned.step(keys, noised.xt, belief(x0_hat, 0.0), *args), plain.step(keys, noised.xt, x0_hat, *args), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(learned.kl(noised, belief(x0_hat, 0.0), end), plain.kl(noised, x0_hat, end), rtol=1e-6)
        for share in (0.3, 1.0):  # what no noise enters, no variance changes
            if end is not s:
                np.testing.assert_array_equal(
                    learned.step(keys, noised.xt, belief(x0_hat, share), *args), plain.step(keys, noised.xt, x0_hat, *args))
    np.testing.assert_allclose(learned.elbo_rate(noised, belief(x0_hat, 0.7)), plain.elbo_rate(noised, x0_hat), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear_beta", "flow", "edm"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.7])
def test_steps_have_the_interpolated_variance_and_the_posterior_s_mean(schedule, share):
    t, s = 0.6, 0.4
    keys, noised, x0_hat, end = setting(SCHEDULES[schedule], t, s)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), (noised.xt, x0_hat))
    drawn = LearnedSigma(SCHEDULES[schedule]).step(keys, same[0], belief(same[1], share), noised.t, end)
    low, high = bounds(SCHEDULES[schedule], t, s)
    expected = low ** (1 - min(share, 1)) * high ** min(share, 1)  # guidance may overshoot; the step does not
    np.testing.assert_allclose(np.var(drawn, 0), expected, rtol=5 * np.sqrt(2 / COUNT))
    mean = np.mean(Gaussian(SCHEDULES[schedule], eta=1.0).step(keys, *same, noised.t, end), 0)
    np.testing.assert_allclose(np.mean(drawn, 0), mean, atol=6 * np.sqrt(expected / COUNT))


@pytest.mark.parametrize("schedule", ["linear_beta", "flow", "edm"])
def test_kl_is_that_of_two_gaussians(schedule):
    t, s, share = 0.6, 0.4, 0.3
    _, noised, x0_hat, end = setting(SCHEDULES[schedule], t, s)
    low, high = bounds(SCHEDULES[schedule], t, s)
    wide = low ** (1 - share) * high**share
    (alpha, sigma), (alpha_s, sigma_s) = (np.float64(SCHEDULES[schedule](u)) for u in (t, s))
    slope = alpha_s * low / sigma_s**2  # of the posterior's mean in x_0
    apart = slope**2 * (np.float64(noised.x0) - np.float64(x0_hat)) ** 2
    expected = 0.5 * (np.log(wide / low) + (low + apart) / wide - 1).sum(-1)
    np.testing.assert_allclose(LearnedSigma(SCHEDULES[schedule]).kl(noised, belief(x0_hat, share), end), expected, rtol=2e-4)


@pytest.mark.slow
def test_the_term_trains_the_variance_alone_and_to_the_exact_one():
    """Data N(0, c^2) has a known reverse process, a Gaussian: with the true mean the best Sigma is its variance."""
    schedule, steps, i, c = SCHEDULES["linear_beta"], 1000, 300, 0.5
    process = LearnedSigma(schedule, eps)
    t, s = i / steps, (i - 1) / steps
    (alpha, sigma), (alpha_s, _) = (np.float64(schedule(u)) for u in (t, s))
    low, high = bounds(schedule, t, s)
    spread = c**2 * sigma**2 / (alpha**2 * c**2 + sigma**2)  # Var(x_0 | x_t)
    exact = low + (alpha_s * low / np.float64(schedule(s)[1]) ** 2) ** 2 * spread
    best = np.log(exact / low) / np.log(high / low)
    assert 0.05 < best < 0.95

    keys = jax.random.split(jax.random.key(0), 200_000)
    noised = process.corrupt(keys, c * jax.random.normal(jax.random.key(1), (len(keys), 1)), jnp.full(len(keys), t, jnp.float32))
    eps_hat = sigma * noised.xt / (alpha**2 * c**2 + sigma**2)  # E[eps | x_t]
    term = losses.sigma_vlb(process, steps)

    def loss(mean, share):
        out = jnp.concatenate([mean, jnp.full_like(mean, 2 * share - 1)], -1)
        return term(out, noised).mean()

    slope_mean, slope = jax.grad(loss, (0, 1))(eps_hat, best)
    assert not slope_mean.any()
    below, above = (jax.grad(loss, 1)(eps_hat, best + d) for d in (-0.1, 0.1))
    assert below < 0 < above and abs(slope) < 0.1 * min(-below, above)


@pytest.mark.slow
def test_the_hybrid_loss_is_finite_everywhere():
    process = LearnedSigma(SCHEDULES["linear_beta"], eps)
    t = jnp.arange(0, 1001, 50) / 1000
    t = t.at[1].set(1 / 1000)
    keys = jax.random.split(jax.random.key(0), len(t))
    noised = process.corrupt(keys, jnp.ones((len(t), 2, 2, 3)), t)

    def loss(out):
        return (process.loss(out, noised) + losses.sigma_vlb(process, 1000)(out, noised)).sum()

    out = jax.random.normal(jax.random.key(1), (len(t), 2, 2, 6))
    value, slope = jax.value_and_grad(loss)(out)
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert not slope[0].any()  # t = 0: nothing to learn
    assert not slope[1, ..., 3:].any() and slope[1, ..., :3].any()  # the last step draws nothing
    assert np.abs(slope[2:, ..., 3:]).min() > 0


def test_sampling_reproduces_the_exact_law():
    """Twenty ancestral steps with the exact mean and variance: the draws have the data's variance; with beta or beta~ they do not."""
    from mmdiff import sampling

    schedule, c, size = SCHEDULES["cosine"], 0.3, 20_000
    process = LearnedSigma(schedule, v)
    grid = sampling.uniform_grid(20)

    def draw(kind):
        def apply(params, x, t):
            alpha, sigma = (a[:, None] for a in schedule(t))
            mean = alpha * c**2 / (alpha**2 * c**2 + sigma**2) * x
            eps_hat = (x - alpha * mean) / sigma
            sigma_s = schedule(jnp.maximum(t - 0.05, 1e-6))[1][:, None]
            alpha_s = schedule(t - 0.05)[0][:, None]
            narrow = sigma_s**2 * (1 - (alpha * sigma_s / (sigma * alpha_s)) ** 2)
            exact = narrow + (alpha_s * narrow / sigma_s**2) ** 2 * c**2 * sigma**2 / (alpha**2 * c**2 + sigma**2)
            share = {"exact": jnp.log(exact / narrow) / (2 * jnp.log(sigma / sigma_s)), "beta": 1.0, "beta~": 0.0}[kind]
            return jnp.concatenate([alpha * eps_hat - sigma * mean, jnp.broadcast_to(2 * share - 1, x.shape)], -1)

        x = sampling.sample(process, apply, None, jax.random.split(jax.random.key(0), size), grid, (1,))
        return float(jnp.std(x))

    # The last step, to s = 0, returns the mean: what it lacks of the data's variance is that of x_0 given x_t there.
    alpha, sigma = (float(a) for a in schedule(0.05))
    last = (alpha * c**2) ** 2 / (alpha**2 * c**2 + sigma**2)
    assert abs(draw("exact") / np.sqrt(last) - 1) < 4 / np.sqrt(2 * size)
    assert draw("beta~") / np.sqrt(last) < 0.95 and draw("beta") / np.sqrt(last) > 1.02


def test_it_reads_what_a_joint_hands_it():
    from mmdiff.processes import Given, Joint

    process = Joint(image=LearnedSigma(SCHEDULES["linear_beta"], eps), label=Given(null=3))
    keys = jax.random.split(jax.random.key(0), 4)
    data, times = {"image": jnp.ones((4, 2, 2, 1)), "label": jnp.arange(4)}, {"image": jnp.ones(4) / 2, "label": jnp.ones(4)}
    noised = process.corrupt(keys, data, times)
    x0_hat = process.clean({"image": jnp.zeros((4, 2, 2, 2))}, noised.xt, noised.t)
    assert x0_hat["image"].shape == (4, 2, 2, 2)
    assert isinstance(noised, Noised) and process.step(keys, noised.xt, x0_hat, noised.t, noised.t)["image"].shape == (4, 2, 2, 1)


@pytest.mark.parametrize("known", [True, False])
def test_as_the_target_of_an_aggregate(known):
    """What is added to the mean leaves the variance as it is: steps and KL are those of the chain without it."""
    from mmdiff.processes import Aggregate, Hidden, MeanShift, fold, identity, moving_target

    chain = LearnedSigma(SCHEDULES["linear_beta"], eps)
    process = Aggregate("image", {"other": MeanShift(identity, moving_target())}, image=chain, other=Hidden())
    keys = jax.random.split(jax.random.key(0), 8)
    x0 = {name: jax.random.normal(jax.random.key(i), (8, 3)) for i, name in enumerate(("image", "other"))}
    t, s = ({"image": u, "other": jnp.where(known, 0.0, u)} for u in (jnp.full(8, 0.6), jnp.full(8, 0.4)))
    out = {"image": jax.random.normal(jax.random.key(2), (8, 6)), "other": 0.5 * x0["other"]}

    @jax.jit
    def run():
        noised = process.corrupt(keys, x0, t)
        x0_hat = process.clean(out, noised.xt, noised.t)
        xs = process.step(keys, noised.xt, x0_hat, t, s)
        a_t, a_s = (chain.schedule(u["image"])[0] * u["image"] for u in (t, s))
        carried = x0["other"] if known else out["other"]  # what is hidden is believed
        y = noised.xt["image"] - a_t[:, None] * carried
        belief = chain.clean(out["image"], y, t["image"])
        ys = chain.step(fold(keys, "image"), y, belief, t["image"], s["image"])
        bare = process.split(noised)["image"]
        mine = x0_hat["image"], xs["image"] - a_s[:, None] * carried, process.kl(noised, x0_hat, s)["image"]
        return mine, (belief, ys, chain.kl(bare, x0_hat["image"], s["image"]))

    mine, right = run()
    for name, one, other in zip(("belief", "step", "kl"), mine, right):
        if name != "kl" or known:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
        else:  # an error about what is hidden is paid for in the mean
            assert (one != other).all()
