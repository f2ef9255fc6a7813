"""Laws of the bounds on the likelihood: equality for the true model on toys whose likelihood is known."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from exact import DISCRETE, REMEMBER, SCHEDULES, SOME_DISCRETE, STEPS, Mixture, dense_belief, gaussian_entropy, keys
from tiers import some

from mmdiff import processes, schedules
from mmdiff.evals import likelihood
from mmdiff.processes import Gaussian, Joint, LearnedSigma

DATA = np.asarray([0.5, 0.3, 0.15, 0.05])
TOY = Mixture([0.5, 0.3, 0.2], [[-1.0, 0.4], [0.3, 1.0], [1.0, -1.0]], 0.4)


def token_network(name, data):
    """The exact denoiser of one token with a law `data`, as logits, on times i / 8."""
    process = DISCRETE[name]
    beliefs = [[dense_belief(name, data, x, i / STEPS) for x in range(process.states)] for i in range(STEPS + 1)]
    tables = jnp.asarray([[np.ones(process.classes) if b is None else b for b in row] for row in beliefs], jnp.float32)
    return lambda params, xt, t: jnp.log(jnp.maximum(tables[jnp.round(t * STEPS).astype(int), xt], 1e-30))


@pytest.mark.parametrize("name", SOME_DISCRETE)
def test_discrete_time_is_tight_for_the_true_model(name):
    process = DISCRETE[name]
    count = 3000
    x0 = jnp.arange(4 * count, dtype=jnp.int32) % 4
    network = token_network(name, DATA)
    run = jax.jit(lambda k: likelihood.discrete_time(process, network, None, k, x0, likelihood.line(), STEPS))
    got = np.asarray(run(keys(4 * count))).reshape(count, 4)
    error = 4 * got.std(0) / count**0.5 + 1e-4
    if name in REMEMBER:
        assert (got.mean(0) > -np.log(DATA) - error).all()
    else:
        np.testing.assert_array_less(np.abs(got.mean(0) + np.log(DATA)), error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["absorbing", "uniform", "mixed"])
def test_continuous_time_is_tight_for_the_true_model(name):
    process = DISCRETE[name]

    def network(params, xt, t):
        likelihood_ = process.pull(jax.nn.one_hot(xt, process.states), None, t)[:, :4]
        return jnp.log(jnp.maximum(jnp.asarray(DATA, jnp.float32) * likelihood_, 1e-30))

    count = 1000
    x0 = jnp.arange(4 * count, dtype=jnp.int32) % 4
    # Along any path: from t = 0, or from a later time with a last step by the network.
    for path in (likelihood.line(), likelihood.line(0.1), likelihood.geometric(0.05)):
        run = jax.jit(lambda k, path=path: likelihood.continuous_time(process, network, None, k, x0, path, 64))
        got = np.asarray(run(keys(4 * count))).reshape(count, 4)
        error = 4 * got.std(0) / count**0.5 + 1e-3
        np.testing.assert_array_less(np.abs(got.mean(0) + np.log(DATA)), error)


@pytest.mark.slow
def test_tokens_that_depend_on_each_other():
    """Two equal tokens: unmasking both in one step misses the dependence, so few steps cost more, infinitely many nothing."""
    process = processes.absorbing(2)

    def network(params, xt, t):
        """Uniform unless the other token is seen."""
        other = xt[:, ::-1]
        return jnp.where(other[..., None] == 2, 0.0, 40.0 * jax.nn.one_hot(other, 2))

    x0 = jnp.tile(jnp.asarray([[0, 0], [1, 1]]), (2000, 1))

    def bound(steps):
        run = jax.jit(lambda k: likelihood.discrete_time(process, network, None, k, x0, likelihood.line(), steps))
        return float(run(keys(len(x0))).mean())

    # Both are unmasked in the same one of T equal steps with probability 1/T: then the bound pays log 2 twice.
    for steps in (1, 2, 8):
        np.testing.assert_allclose(bound(steps), math.log(2) * (1 + 1 / steps), atol=0.05)
    run = jax.jit(lambda k: likelihood.continuous_time(process, network, None, k, x0, likelihood.line(), 32))
    np.testing.assert_allclose(run(keys(len(x0))).mean(), math.log(2), atol=0.05)


def gaussian_network(process, mean, std):
    toy = Mixture([1.0], [[mean, mean]], std)
    return toy.image_network(process)


@pytest.mark.parametrize("schedule", some(SCHEDULES, "cosine", "edm"))
def test_gaussian_data_cost_their_entropy(schedule):
    process = Gaussian(SCHEDULES[schedule], processes.x0)
    mean, std, count = 0.3, 0.5, 2000
    x0 = mean + std * jax.random.normal(jax.random.key(3), (count, 2))
    # The true -log p of these very draws: less noise than the entropy, which is its expectation.
    truth = (0.5 * ((x0 - mean) / std) ** 2 + math.log(std) + 0.5 * math.log(2 * math.pi)).sum(-1)
    assert abs(float(truth.mean()) - gaussian_entropy(std, 2)) < 0.1
    network = gaussian_network(process, mean, std)
    path = likelihood.geometric(0.01)

    @jax.jit
    def bounds(k):
        continuous = likelihood.continuous_time(process, network, None, k, x0, path, 128)
        return continuous, *(likelihood.discrete_time(process, network, None, k, x0, path, steps) for steps in (128, 8))

    continuous, fine, coarse = (np.asarray(b) - np.asarray(truth) for b in bounds(keys(count)))
    error = 4 * continuous.std() / count**0.5
    # edm and the table begin their noise elsewhere, so t = 0.01 is another sigma; a hair of slack stays open at both ends.
    assert abs(continuous.mean()) < error + 0.02
    assert -error < fine.mean() < (1.0 if schedule == "edm" else 0.15) + error  # finitely many steps: a bound, closing with them
    assert coarse.mean() > fine.mean()


def test_quantised_data_cost_bits():
    """x_0 uniform on 4 levels: -log p = log 4, for the exact denoiser of those levels."""
    values = np.asarray([-1.0, -1 / 3, 1 / 3, 1.0], np.float32)
    process = Gaussian(schedules.cosine(), processes.x0)

    def network(params, xt, t):
        alpha, sigma = (c[:, None, None] for c in process.schedule(jnp.where(t > 0, t, 0.5)))
        share = jax.nn.softmax(-0.5 * ((xt[..., None] - alpha * values) / sigma) ** 2)
        return (share * values).sum(-1)

    count = 2000
    x0 = jnp.asarray(np.random.default_rng(0).choice(values, (count, 3)))
    path, decoder = likelihood.geometric(0.01), likelihood.levels(values)
    nats = np.asarray(jax.jit(lambda k: likelihood.continuous_time(process, network, None, k, x0, path, 64, decoder))(keys(count)))
    np.testing.assert_allclose(likelihood.bits_per_dim(nats, (3,)).mean(), 2.0, atol=4 * nats.std() / count**0.5 / 2 + 0.005)
    # The decoder alone, where the levels blur into each other: Bayes on a grid.
    t = jnp.full(count, 0.5)
    noised = process.corrupt(keys(count), x0, t)
    alpha = sigma = math.sqrt(0.5)
    scores = np.exp(-0.5 * ((np.asarray(noised.xt)[..., None] - alpha * values) / sigma) ** 2)
    right = scores[np.asarray(x0)[..., None] == values].reshape(count, 3)
    np.testing.assert_allclose(decoder(process, noised, None), -np.log(right / scores.sum(-1)).sum(-1), rtol=1e-3)


LEVELS = np.arange(256) / 127.5 - 1


def bin_bits(x0, mean, variance, values):
    """-log2 of the mass of x_0's bin under N(mean, variance), in float64; the outer bins are open."""
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    place = np.abs(x0[..., None] - values).argmin(-1)
    low, high = ((edges[place + i] - mean) / np.sqrt(variance) for i in (0, 1))
    low, high = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
    below, above = scipy.special.log_ndtr(low), scipy.special.log_ndtr(high)
    return -(above + np.log1p(-np.exp(below - above))) / math.log(2)


def first_variances(steps=1000):
    """(beta~ of the chain's second step, beta of its first) of the linear table: between them is the decoder's variance."""
    beta = np.linspace(1e-4, 0.02, steps)
    alpha_bar = np.cumprod(1 - beta)
    return beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]), beta[0]


def test_bits_of_8_bit_data_are_the_published_ones():
    """At t = 1/1000 of the linear table, pixels uniform on 256 levels: 1.299 bits for a network that knows x_0, whose error is the bin's
    alone, and 2.503 for one that takes x_t for it. (On a sample of images 1.295 and 2.508.)"""
    process = Gaussian(schedules.linear_beta(1000), processes.eps, prior_std=1.0)
    variance, beta = first_variances()
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    weights, sigma = weights / weights.sum(), math.sqrt(beta / (1 - beta))  # of x_t / alpha
    knows = bin_bits(LEVELS, LEVELS, variance, LEVELS).mean()
    ignores = (weights * bin_bits(LEVELS[:, None], LEVELS[:, None] + sigma * nodes, variance, LEVELS)).sum(-1).mean()
    assert (round(knows, 3), round(ignores, 3)) == (1.299, 2.503)

    x0, count = jnp.asarray(np.tile(LEVELS, (1000, 1)), jnp.float32), 1000
    decoder = likelihood.discretized(LEVELS, 1000)
    noised = process.corrupt(keys(count), x0, jnp.full(count, 1 / 1000))
    found = likelihood.bits_per_dim(jax.jit(lambda x0_hat: decoder(process, noised, x0_hat))(noised.xt / math.sqrt(1 - beta)), (256,))
    np.testing.assert_allclose(found.mean(), ignores, atol=4 * found.std() / count**0.5)

    # The whole bound of the network that knows: no step costs anything, and the prior is N(0, 1).
    def network(params, xt, t):
        alpha, sigma = (c[:, None] for c in process.schedule(t))
        return (xt - alpha * x0[:1]) / sigma

    run = jax.jit(lambda k: likelihood.discrete_time(process, network, None, k, x0[:1], likelihood.line(1 / 1000), 999, decoder))
    nats = likelihood.bits_per_dim(run(keys(1)), (256,))
    alpha, sigma = (float(c) for c in process.schedule(jnp.ones(())))
    prior = 0.5 * (alpha**2 * (LEVELS**2).mean() + sigma**2 - 1 - 2 * math.log(sigma)) / math.log(2)
    assert 1e-6 < prior < 1e-4
    np.testing.assert_allclose(nats, knows + prior, atol=5e-6)


@pytest.mark.parametrize("values", [LEVELS, np.asarray([-1.0, -0.8, 0.1, 3.0])], ids=["8 bits", "uneven"])
def test_the_mass_of_a_bin(values):
    schedule, (low, high) = schedules.linear_beta(1000), first_variances()
    rng = np.random.default_rng(0)
    x0 = rng.choice(values, (4, 50))
    mean = x0 + rng.normal(size=x0.shape) * np.asarray([[0.0], [0.01], [0.1], [1.0]])  # up to a hundred deviations off
    share = rng.uniform(size=x0.shape)
    t = jnp.full(4, 1 / 1000)
    noised = Gaussian(schedule).corrupt(keys(4), jnp.asarray(x0, jnp.float32), t)
    plain, learned = Gaussian(schedule), LearnedSigma(schedule)
    beliefs = [jnp.asarray(b, jnp.float32) for b in (mean, np.concatenate([mean, share], -1))]
    cases = [
        (plain, beliefs[0], 1000, low), (learned, beliefs[1], 1000, low ** (1 - share) * high**share),
        (plain, beliefs[0], None, high / (1 - high)), (learned, beliefs[1], None, high / (1 - high)),
    ]  # fmt: skip
    every = noised.replace(x0=jnp.asarray(values[:, None], jnp.float32), t=jnp.full(len(values), 1 / 1000))
    one = [jnp.broadcast_to(belief[:1, 7::50], (len(values), belief.shape[-1] // 50)) for belief in beliefs]

    @jax.jit
    def run():
        decoders = [likelihood.discretized(values, steps) for _, _, steps, _ in cases]
        nats = [d(process, noised, belief) for d, (process, belief, *_) in zip(decoders, cases)]
        slopes = [jax.grad(lambda b, d=d, p=p: d(p, noised, b).sum())(belief) for d, (p, belief, *_) in zip(decoders, cases)]
        return nats, slopes, [d(process, every, belief) for d, (process, *_), belief in zip(decoders, cases, one + one)]

    for nats, slope, each, (_, _, _, variance) in zip(*run(), cases):
        np.testing.assert_allclose(nats / math.log(2), bin_bits(x0, mean, variance, values).sum(-1), rtol=2e-4, atol=1e-3)
        assert np.isfinite(slope).all()
        np.testing.assert_allclose(np.exp(-np.float64(each)).sum(), 1.0, rtol=1e-4)  # what one belief gives to all levels


@pytest.mark.parametrize("kind", ["joint", "aggregate"])
def test_bits_of_one_modality_of_several(kind):
    """A network that knows all pays for the image what its bins cost at its learned variance, and the prior, whatever else there is."""
    image, other = LearnedSigma(schedules.linear_beta(1000), processes.x0), processes.Hidden()
    process = Joint(image=image, other=other)
    if kind == "aggregate":
        added = {"other": processes.MeanShift(processes.identity, processes.moving_target())}
        process = processes.Aggregate("image", added, image=image, other=other)
    x0 = {"image": jnp.asarray(np.tile(LEVELS, (2, 1)), jnp.float32), "other": jnp.ones((2, 256))}

    def network(params, x, t):
        return {"image": jnp.concatenate([x0["image"], jnp.full_like(x0["image"], 2 * 0.3 - 1)], -1), "other": x0["other"]}

    path, decoder = likelihood.along(process, likelihood.line(1 / 1000)), {"image": likelihood.discretized(LEVELS, 1000)}
    nats = jax.jit(lambda k: likelihood.discrete_time(process, network, None, k, x0, path, 1, decoder))(keys(2))
    low, high = first_variances()
    ratio = -0.3 * math.log(high)  # log (Sigma / beta~) of the one step to t = 1/1000
    step = 0.5 * 256 * (ratio + math.expm1(-ratio)) / math.log(2)
    bits = bin_bits(LEVELS, LEVELS, low**0.7 * high**0.3, LEVELS).sum() + step + float(image.prior_kl(x0["image"])[0]) / math.log(2)
    np.testing.assert_allclose(nats["image"] / math.log(2), bits, rtol=1e-4)


def log_normal(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["absorbing", "uniform"])
def test_joint_conditional_and_marginal(chain):
    """All three likelihoods of a mixture from one network: log p(x, k), log p(x | k), log p(k | x), log p(x)."""
    label = {"absorbing": processes.absorbing, "uniform": processes.uniform}[chain](3)
    process = Joint(image=Gaussian(schedules.cosine(), processes.x0), label=label)
    network, count = TOY.joint_network(process), 2000
    x0 = TOY.draw(jax.random.key(0), count)
    component = np.stack([log_normal(np.asarray(x0["image"]), m, TOY.std) for m in TOY.means], -1) + np.log(TOY.weights)
    joint = np.take_along_axis(component, np.asarray(x0["label"])[:, None], 1)[:, 0]
    marginal = np.log(np.exp(component).sum(-1))
    prior = np.log(TOY.weights)[np.asarray(x0["label"])]
    cases = {
        "joint": (-joint, {}),
        "label given image": (-(joint - marginal), {"pinned": ["image"]}),
        "image given label": (-(joint - prior), {"pinned": ["label"]}),
        "image": (-marginal, {"absent": ["label"]}),
        "label": (-prior, {"absent": ["image"]}),
    }
    for name, (truth, pinned) in cases.items():
        path = likelihood.along(process, likelihood.geometric(0.005), **pinned)
        nats = jax.jit(lambda k, path=path: likelihood.continuous_time(process, network, None, k, x0, path, 128))(keys(count))
        for still in itertools.chain(*pinned.values()):
            np.testing.assert_array_equal(nats[still], np.zeros(count))
        gap = np.asarray(likelihood.total(nats)) - truth
        assert abs(gap.mean()) < 4 * gap.std() / count**0.5 + 0.02, name


@pytest.mark.slow
def test_nothing_is_paid_for_what_is_held_in_discrete_time():
    process = Joint(image=Gaussian(schedules.flow(), processes.x0), label=processes.absorbing(3))
    network, x0 = TOY.joint_network(process), TOY.draw(jax.random.key(0), 8)
    path = likelihood.along(process, likelihood.line(), pinned=["image"])
    nats = likelihood.discrete_time(process, network, None, keys(8), x0, path, 3)
    np.testing.assert_array_equal(nats["image"], np.zeros(8))
    assert (nats["label"] >= 0).all() and (nats["label"] < 50).all()


@pytest.mark.slow
def test_a_gaussian_path_from_zero_has_no_bound():
    process = Gaussian(schedules.flow(), processes.x0)
    network = gaussian_network(process, 0.0, 1.0)
    assert np.isinf(likelihood.discrete_time(process, network, None, keys(2), jnp.ones((2, 2)), likelihood.line(), 2)).all()


def test_units_and_sums():
    assert likelihood.bits_per_dim(jnp.asarray(math.log(2) * 12), (2, 3, 2)) == pytest.approx(1.0)
    assert likelihood.bits_per_dim(jnp.asarray(math.log(2)), ()) == pytest.approx(1.0)
    np.testing.assert_array_equal(likelihood.total({"a": jnp.ones(2), "b": jnp.ones(2)}), [2, 2])
    np.testing.assert_array_equal(likelihood.total(jnp.ones(2)), [1, 1])
    u = jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(likelihood.line(0.2)(u), [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(likelihood.geometric(1e-4)(u), [1e-4, 1e-3, 1e-2, 1e-1, 1], rtol=1e-5)


def test_bad_arguments_are_refused():
    process = Joint(image=Gaussian(schedules.flow()), label=processes.absorbing(3))
    with pytest.raises(ValueError, match="no modality text; there are image, label"):
        likelihood.along(process, likelihood.line(), pinned=["text"])
    with pytest.raises(ValueError, match="nothing is left"):
        likelihood.along(process, likelihood.line(), pinned=["image"], absent=["label"])
    with pytest.raises(ValueError, match="only one"):
        likelihood.along(process.parts["image"], likelihood.line(), pinned=["image"])
    with pytest.raises(ValueError, match="t_min < 1"):
        likelihood.line(1.0)
    with pytest.raises(ValueError, match="t_min < 1"):
        likelihood.geometric(0.0)
    for decoder in (likelihood.levels, likelihood.discretized):
        for values in ([1.0], [1.0, 0.0], [[0.0, 1.0]], [0.0, np.inf], [-np.inf, 0.0], [0.0, np.nan], [0.0, 1e39]):
            with pytest.raises(ValueError, match="two finite values in a row that increase"):
                decoder(values)
    with pytest.raises(ValueError, match="belongs to a Gaussian; Categorical has no use for the levels"):
        likelihood.discretized([0, 1])(process.parts["label"], None, None)
    network, x0 = TOY.joint_network(process), {"image": jnp.zeros((2, 2)), "label": jnp.zeros(2, jnp.int32)}
    path = likelihood.along(process, likelihood.line(0.1))
    with pytest.raises(ValueError, match="decoders: no modality text"):
        likelihood.discrete_time(process, network, None, keys(2), x0, path, 2, {"text": likelihood.levels([0, 1])})
    for wrong, decoders, said in ((process, likelihood.levels([0, 1]), r"a dict by modality \(image, label\)"),
                                  (process.parts["image"], {"image": likelihood.levels([0, 1])}, "one function")):
        with pytest.raises(ValueError, match=f"decoders are {said} for this process"):
            likelihood.discrete_time(wrong, network, None, keys(2), x0, path, 2, decoders)
    with pytest.raises(ValueError, match="at least one step"):
        likelihood.discrete_time(process, network, None, keys(2), x0, path, 0)
    with pytest.raises(ValueError, match="at least one draw"):
        likelihood.continuous_time(process, network, None, keys(2), x0, path, 0)
