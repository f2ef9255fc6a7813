"""Laws of `Aggregate`: one Gaussian chain with other modalities in its mean, checked against the paper's own formulas in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from exact import SCHEDULES, Mixture, keys
from tiers import some

from mmdiff import losses, processes, sampling, schedules, times
from mmdiff.errors import UserError
from mmdiff.evals import accuracy, likelihood
from mmdiff.processes import Aggregate, Gaussian, Given, Hidden, Joint, MeanShift, fold, identity
from mmdiff.processes.mean_shift import by_network, card, moving_target, stepwise, template, transition

STEPS = 8
ALPHAS = np.asarray([0.99, 0.97, 0.9, 0.85, 0.8, 0.6, 0.5, 0.2])  # the paper's alpha_t, 1 - beta_t
W = np.asarray([0.3, 0.1, -0.2, 0.05, 0.4, 0.0, 0.2, 0.1])
WEIGHTS = {"moving": moving_target(), "late": moving_target(0.7, lambda t: t**2), "card": card(), "stepwise": stepwise(W)}


def chain64(alphas):
    """A schedule that knows the nodes i / T of a chain, in float64 under enable_x64."""
    bars = np.append(1.0, np.cumprod(alphas))

    def schedule(t):
        bar = jnp.take(jnp.asarray(bars), jnp.round(jnp.asarray(t) * len(alphas)).astype(int))
        return jnp.sqrt(bar), jnp.sqrt(1.0 - bar)

    return schedule


def pair(weight, schedule=None, eta=1.0, predict=processes.eps, encode=identity):
    """z and one array x of its shape, with E = identity."""
    chain = Gaussian(schedule or chain64(ALPHAS), predict, eta)
    return Aggregate("z", {"x": MeanShift(encode, weight)}, z=chain, x=Hidden())


def at(t, x=None, count=1):
    return {"z": jnp.full(count, t), "x": jnp.full(count, 0.5 if x is None else x)}


def scalars(**values):
    return {name: jnp.asarray([[value]]) for name, value in values.items()}


def coefficients(process, t, s, x=None):
    """(of z_t, of z_0, of E; standard deviation) of a step's mean, which is linear, by trying."""
    k = keys(1)

    def step(z, x0, e):
        hidden = scalars(z=z, x=e) if x == 0 else scalars(z=z, x=0.0)
        return float(process.step(k, hidden, scalars(z=x0, x=e), at(t, x), at(s, x))["z"][0, 0])

    still = step(0.0, 0.0, 0.0)
    noise = float(jax.random.normal(fold(k, "z")[0], (1,))[0])
    return np.asarray([step(1.0, 0.0, 0.0) - still, step(0.0, 1.0, 0.0) - still, step(0.0, 0.0, 1.0) - still]), still / noise


def chain_moments(w, alphas=ALPHAS):
    """(alpha, a, sigma) after each step of z_t = sqrt(alpha_t) (z_(t-1) + w_t E) + noise of variance 1 - alpha_t: the definition."""
    mean, drift, variance, rows = 1.0, 0.0, 0.0, [(1.0, 0.0, 0.0)]
    for alpha, w_t in zip(alphas, w):
        mean, drift, variance = mean * alpha**0.5, (drift + w_t) * alpha**0.5, variance * alpha + 1 - alpha
        rows.append((mean, drift, variance**0.5))
    return np.asarray(rows).T


def step_weights(weight, schedule, steps=STEPS):
    i = jnp.arange(1, steps + 1)
    return np.asarray(transition(weight, schedule, i / steps, (i - 1) / steps))


# ----------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.slow
def test_stepwise_is_the_paper_s_recursion():
    """a_t = sqrt(alpha_t) (w_t + a_(t-1)), its closed form, and back to w, in float64."""
    with jax.enable_x64(True):
        schedule, weight = chain64(ALPHAS), stepwise(W)
        a = np.asarray(weight(schedule, jnp.arange(STEPS + 1) / STEPS))
        np.testing.assert_allclose(a, chain_moments(W)[1], rtol=1e-12, atol=1e-14)
        bars = np.append(1.0, np.cumprod(ALPHAS))
        closed = [sum(W[j] * np.sqrt(bars[i] / bars[j]) for j in range(i)) for i in range(STEPS + 1)]
        np.testing.assert_allclose(a, closed, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(step_weights(weight, schedule), W, atol=1e-12)


@pytest.mark.slow
def test_card_and_the_moving_target_in_terms_of_w():
    with jax.enable_x64(True):
        schedule, bars = chain64(ALPHAS), np.append(1.0, np.cumprod(ALPHAS))
        np.testing.assert_allclose(step_weights(card(), schedule), ALPHAS**-0.5 - 1, rtol=1e-10)
        place = np.arange(STEPS + 1) / STEPS
        np.testing.assert_allclose(
            step_weights(moving_target(0.7, lambda t: t**2), schedule), 0.7 * np.sqrt(bars[:-1]) * np.diff(place**2), rtol=1e-10)
        # P = 1 from the first step on is DDPM of z_0 + kappa E; at t = 0 nothing is added, whatever P.
        process = pair(moving_target(0.7, jnp.ones_like))
        plain = Joint(z=process.chain, x=Hidden())
        x0 = scalars(z=0.4, x=-0.9)
        for t in np.arange(STEPS + 1) / STEPS:
            ours, theirs = process.corrupt(keys(1), x0, at(t)), plain.corrupt(keys(1), scalars(z=0.4 - 0.63 * (t > 0), x=0.0), at(t))
            np.testing.assert_allclose(ours.xt["z"], theirs.xt["z"], rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_finite_and_smooth_and_start_at_zero(schedule):
    t = jnp.linspace(0.0, 1.0, 41)

    @jax.jit
    def run(t):
        every = {name: lambda u, w=weight: w(SCHEDULES[schedule], u) for name, weight in WEIGHTS.items()}
        return {name: jax.jvp(weight, (t,), (jnp.ones_like(t),)) for name, weight in every.items()}

    found = run(t)
    for a, slope in found.values():
        assert a.shape == t.shape and np.isfinite(a).all() and np.isfinite(slope).all() and abs(a[0]) < 1e-7
    if schedule in ("flow", "cosine", "shifted"):
        assert abs(found["moving"][0][-1]) < 1e-7  # the prior stays that of z alone


@pytest.mark.slow
def test_the_default_weights_leave_the_prior_alone():
    """Section 1.5's table: with linear_beta and RMS(z_0) = RMS(E) = 0.5, nats per dimension at t = 1."""
    schedule, one = schedules.linear_beta(), jnp.ones(())
    alpha, sigma = schedule(one)
    costs = {
        name: float(0.5 * ((alpha * 0.5) ** 2 + (weight(schedule, one) * 0.5) ** 2 + sigma**2 - 1 - 2 * jnp.log(sigma)))
        for name, weight in {"moving": moving_target(), "card": card(), "constant": stepwise([0.01] * 1000)}.items()
    }
    np.testing.assert_allclose([costs["moving"], costs["card"], costs["constant"]], [1.0e-5, 0.123, 0.162], rtol=0.03)
    assert costs["moving"] < 1e-4
    peak = moving_target()(schedule, jnp.arange(1001) / 1000)
    assert int(jnp.argmax(peak)) == 314 and abs(float(peak.max()) - 0.189) < 1e-3


# ------------------------------------------------------------------------------------------------- marginal and posterior


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_chain_has_the_marginal(weight):
    """The recursion of the transitions gives what `corrupt` draws, for hidden and for known x; absent x leave no trace."""
    with jax.enable_x64(True):
        process = pair(WEIGHTS[weight])
        alpha, a, sigma = chain_moments(step_weights(WEIGHTS[weight], process.chain.schedule))
        x0 = scalars(z=0.8, x=-1.3)
        for i in range(STEPS + 1):
            for own in (0.0, 0.5, 1.0):
                noised = process.corrupt(keys(1), x0, at(i / STEPS, own))
                expected = alpha[i] * 0.8 + a[i] * (own < 1) * -1.3 + sigma[i] * noised.noise["z"]
                np.testing.assert_allclose(noised.xt["z"], expected, atol=1e-10)
                assert noised.xt["x"] == (-1.3 if own == 0 else 0.0)


@pytest.mark.parametrize("weight, own", [("moving", 0.0), ("late", 0.5), ("card", 0.5), ("stepwise", 0.0), *(
    pytest.param(*row, marks=pytest.mark.slow) for row in [("moving", 0.5), ("late", 0.0), ("card", 0.0), ("stepwise", 0.5)])])
def test_the_step_is_every_form_of_the_posterior(weight, own):
    """Bayes' product of Gaussians, and the forms A, B and C of section 1.4, to 1e-10; at the last step z_0 exactly."""
    with jax.enable_x64(True):
        process = pair(WEIGHTS[weight])
        w = step_weights(WEIGHTS[weight], process.chain.schedule)
        marginal = chain_moments(w)
        for i in range(2, STEPS + 1):
            step, (alpha, a, sigma), (alpha_s, a_s, sigma_s) = ALPHAS[i - 1], marginal[:, i], marginal[:, i - 1]
            got, std = coefficients(process, i / STEPS, (i - 1) / STEPS, own)
            bayes_var = 1 / (1 / sigma_s**2 + step / (1 - step))
            bayes = bayes_var * np.asarray([
                step**0.5 / (1 - step), alpha_s / sigma_s**2, a_s / sigma_s**2 - step * w[i - 1] / (1 - step)])
            k = (1 - step) * a / step**0.5 - sigma**2 * w[i - 1]
            form_a = np.asarray([step**0.5 * sigma_s**2, (1 - step) * alpha_s, k]) / sigma**2
            eps = np.asarray([1.0, -alpha, -a]) / sigma
            form_b = (np.asarray([1.0, 0, 0]) - (1 - step) / sigma * eps) / step**0.5 - np.asarray([0, 0, w[i - 1]])
            form_c = np.asarray([0, alpha_s, a_s]) + np.sqrt(sigma_s**2 - bayes_var) * eps
            for form in (bayes, form_a, form_b, form_c):
                np.testing.assert_allclose(got, form, atol=1e-10)
            np.testing.assert_allclose([std**2, bayes_var], (1 - step) * sigma_s**2 / sigma**2, atol=1e-10)
        got, std = coefficients(process, 1 / STEPS, 0.0, own)
        np.testing.assert_allclose([*got, std], [0, 1, 0, 0], atol=1e-10)


def test_card_s_gammas():
    """The posterior of CARD, y_t = alpha y_0 + (1 - alpha) f(x) + sigma eps, with its own three coefficients, to 1e-10."""
    with jax.enable_x64(True):
        process, bars = pair(card()), np.append(1.0, np.cumprod(ALPHAS))
        for i in range(2, STEPS + 1):
            step, bar, last = ALPHAS[i - 1], bars[i], bars[i - 1]
            gamma0 = (1 - step) * last**0.5 / (1 - bar)
            gamma1 = (1 - last) * step**0.5 / (1 - bar)
            gamma2 = 1 + (bar**0.5 - 1) * (step**0.5 + last**0.5) / (1 - bar)
            got, _ = coefficients(process, i / STEPS, (i - 1) / STEPS, 0.0)
            np.testing.assert_allclose(got, [gamma1, gamma0, gamma2], atol=1e-10)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_stride_keeps_the_marginal(weight, eta):
    """From z_t of the truth any step with the truth ends in the marginal at s: a, not w, is sub-sampled on a coarser grid."""
    with jax.enable_x64(True):
        process = pair(WEIGHTS[weight], eta=eta)
        marginal = chain_moments(step_weights(WEIGHTS[weight], process.chain.schedule))
        for i, j in ((8, 5), (8, 1), (5, 2), (3, 2), (4, 4)):
            (alpha, a, sigma), (alpha_s, a_s, sigma_s) = marginal[:, i], marginal[:, j]
            got, std = coefficients(process, i / STEPS, j / STEPS)
            mean = [got[0] * alpha + got[1], got[0] * a + got[2], np.hypot(got[0] * sigma, std)]
            np.testing.assert_allclose(mean, [alpha_s, a_s, sigma_s], atol=1e-10)
        # The implied weight of a stride makes one step of it the chain's posterior.
        coarse, stride = pair(WEIGHTS[weight]), (6 / STEPS, 4 / STEPS)
        w, ratio = float(transition(WEIGHTS[weight], coarse.chain.schedule, *stride)), np.prod(ALPHAS[4:6])
        assert abs(marginal[1, 6] - np.sqrt(ratio) * (marginal[1, 4] + w)) < 1e-12
        got, _ = coefficients(coarse, *stride)
        eps = np.asarray([1.0, -marginal[0, 6], -marginal[1, 6]]) / marginal[2, 6]
        form_b = (np.asarray([1.0, 0, 0]) - (1 - ratio) / marginal[2, 6] * eps) / ratio**0.5 - np.asarray([0, 0, w])
        np.testing.assert_allclose(got, form_b, atol=1e-10)


def test_an_image_that_is_its_own_modality():
    """x = z_0 and E = identity: DDPM with the signal alpha + a, and the best head follows from the best eps."""
    process = pair(moving_target(), schedules.cosine_beta())
    t = jnp.asarray([0.2, 0.6, 0.9])
    z0 = 0.5 * jax.random.normal(jax.random.key(0), (3, 4))
    noised = process.corrupt(keys(3), {"z": z0, "x": z0}, {"z": t, "x": t})
    alpha, sigma = (c[:, None] for c in process.chain.schedule(t))
    signal = alpha + moving_target()(process.chain.schedule, t)[:, None]
    np.testing.assert_allclose(noised.xt["z"], signal * z0 + sigma * noised.noise["z"], atol=1e-6)
    eps = noised.xt["z"] * sigma / (signal**2 * 0.25 + sigma**2)  # E[eps | z_t] for z_0 ~ N(0, 0.25)
    head = (noised.xt["z"] - sigma * eps) / signal
    np.testing.assert_allclose(head, signal * 0.25 / (signal**2 * 0.25 + sigma**2) * noised.xt["z"], atol=1e-5)
    x0_hat = process.clean({"z": eps, "x": head}, noised.xt, noised.t)
    np.testing.assert_allclose(x0_hat["z"], head, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- what it reduces to


LABEL = processes.absorbing(3, schedules.at_once())
TABLE = np.asarray([[0.5, -0.5], [1.0, 0.2], [-0.7, 0.9]], np.float32)
SHAPE = {"image": (2,), "label": ()}


def labelled(weight=moving_target(), label=LABEL, schedule=None, predict=processes.v, eta=0.0, table=TABLE, added=True):
    chain = Gaussian(schedule or schedules.cosine(), predict, eta)
    return Aggregate("image", {"label": MeanShift(template(table), weight)} if added else {}, image=chain, label=label)


def linear_network(params, x, t):
    features = jnp.concatenate([x["image"], jax.nn.one_hot(x["label"], 4), t["image"][:, None], t["label"][:, None]], axis=-1)
    return {name: features @ weights for name, weights in params.items()}


PARAMS = {"image": normal(0, (8, 2), 0.3), "label": normal(1, (8, 3))}
TIMES = {
    "hidden": (lambda t: t, lambda s: s),
    "known": (jnp.zeros_like, jnp.zeros_like),
    "absent": (jnp.ones_like, jnp.ones_like),
}
ZEROS = {
    "nothing added": dict(added=False),
    "w = 0": dict(weight=moving_target(0.0)),
    "E = 0": dict(table=np.zeros((3, 2), np.float32)),
}


def data(count=6):
    return {"image": jax.random.normal(jax.random.key(2), (count, 2)), "label": jnp.arange(count, dtype=jnp.int32) % 3}


@pytest.mark.slow
@pytest.mark.parametrize("zero, own", [*((z, o) for z in ZEROS for o in TIMES), ("absent", "absent")])
def test_without_a_sum_it_is_the_joint_bit_by_bit(zero, own):
    """Every method, with the same keys: DDPM, and DDPM with a head."""
    process = labelled(eta=1.0, **ZEROS.get(zero, {}))
    plain = Joint(image=process.chain, label=LABEL)
    t, s = jnp.asarray([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), jnp.asarray([0.0, 0.1, 0.4, 0.3, 0.0, 0.9])
    t, s = ({"image": u, "label": TIMES[own][i](u)} for i, u in enumerate((t, s)))
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    ours, theirs = (p.corrupt(keys(6), data(), t) for p in (process, plain))
    same(ours, theirs)
    out = linear_network(PARAMS, ours.xt, t)
    x0_hat = plain.clean(out, ours.xt, t)
    same(process.clean(out, ours.xt, t), x0_hat)
    same(process.step(keys(6), ours.xt, x0_hat, t, s), plain.step(keys(6), ours.xt, x0_hat, t, s))
    same(process.kl(ours, x0_hat, s), plain.kl(ours, x0_hat, s))
    same(process.elbo_rate(ours, x0_hat), plain.elbo_rate(ours, x0_hat))
    same(process.prior_kl(data()), plain.prior_kl(data()))
    same(process.prior(keys(6), SHAPE), plain.prior(keys(6), SHAPE))
    same(process.split(ours), plain.split(ours))
    negative = {"label": (data()["label"] + 1) % 3}
    same(process.with_x0(ours, {"image": 2 * data()["image"]}), plain.with_x0(ours, {"image": 2 * data()["image"]}))
    same(process.with_x0(ours, negative).x0, plain.with_x0(ours, negative).x0)
    one, two = process.loss(out, ours), plain.loss(out, theirs)
    counts = (t["label"] < 1) | (zero == "nothing added")  # an absent modality that is added has no loss
    same(one, {**two, "label": jnp.where(counts, two["label"], 0.0)})


@pytest.mark.parametrize("zero, pinned", some(
    [("w = 0", "nothing"), ("E = 0", "absent"), ("nothing added", "given"), ("w = 0", "given")], ("w = 0", "nothing"), ("E = 0", "absent")))
def test_without_a_sum_it_samples_like_the_joint(zero, pinned):
    process = labelled(eta=1.0, predict=processes.eps, schedule=schedules.linear_beta(), **ZEROS[zero])
    plain = Joint(image=process.chain, label=LABEL)
    given, absent = {"label": data()["label"]} if pinned == "given" else {}, ["label"] if pinned == "absent" else []
    ours, theirs = (
        sampling.sample(p, linear_network, PARAMS, keys(6), sampling.uniform_grid(5), SHAPE, given, absent) for p in (process, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_modality_drop_is_plain_ddpm():
    """An absent label: nothing in the mean, the null for the network, no loss of its head, nothing that depends on the label."""
    process, t = labelled(), {"image": jnp.linspace(0.1, 1.0, 6), "label": jnp.ones(6)}
    x0, other = data(), {**data(), "label": (data()["label"] + 1) % 3}
    one, two = (process.corrupt(keys(6), x, t) for x in (x0, other))
    jax.tree.map(np.testing.assert_array_equal, one.xt, two.xt)
    np.testing.assert_array_equal(one.xt["image"], Joint(image=process.chain).corrupt(keys(6), x0, t).xt["image"])
    np.testing.assert_array_equal(one.xt["label"], np.full(6, 3))
    out = linear_network(PARAMS, one.xt, t)
    np.testing.assert_array_equal(process.loss(out, one)["label"], np.zeros(6))
    jax.tree.map(np.testing.assert_array_equal, process.clean(out, one.xt, t), process.clean(out, two.xt, t))
    alone = process.parts["label"].loss(out["label"], one.of("label"))
    assert (alone > 0).all()  # what trains the head on a z_t that does not carry the label


# -------------------------------------------------------------------------------------------------------------------- bounds

BERNOULLI = dict(
    alphas=np.asarray([0.9, 0.8, 0.6, 0.4]), w=np.asarray([0.3, 0.1, 0.2, 0.05]), e=np.asarray([-1.0, 1.2]), z0=0.8, q=0.35,
    c=np.asarray([0.9, 0.8, 0.7, 0.5]), d=np.asarray([0.1, -0.05, 0.2, 0.0]), var=np.asarray([0.2, 0.15, 0.3, 0.4]),
    u=np.asarray([1.0, 0.5, -0.3, 0.7]), v=np.asarray([-0.2, 0.1, 0.0, 0.3]))


def normal_nll(x, mean, var):
    return 0.5 * ((x - mean) ** 2 / var + np.log(2 * np.pi * var))


@functools.cache
def bernoulli_parts():
    """(L_0, L_1, -log p(z_0 | z_1), sum CE) of a chain of four steps, from `corrupt` and `step` of the process: [2] by class each."""
    b, size = BERNOULLI, 4
    nodes, share = np.polynomial.hermite_e.hermegauss(80)
    share = share / share.sum()
    parts = np.zeros((4, 2))
    with jax.enable_x64(True):
        process = pair(stepwise(b["w"]), chain64(b["alphas"]))
        for label, e in enumerate(b["e"]):
            def moments(i, e=e):
                noised = process.corrupt(keys(1), scalars(z=b["z0"], x=e), at(i / size))
                sigma = float(process.chain.schedule(i / size)[1])
                return float((noised.xt["z"] - sigma * noised.noise["z"])[0, 0]), sigma**2

            mean, var = moments(size)
            parts[0, label] = 0.5 * (var + mean**2 - 1 - np.log(var))
            for i in range(1, size + 1):
                mean, var = moments(i)
                c, d, p_var = b["c"][i - 1], b["d"][i - 1], b["var"][i - 1]
                (of_z, of_z0, of_e), std = coefficients(process, i / size, (i - 1) / size)
                gap = (of_z - c) * mean + of_z0 * b["z0"] + of_e * e - d
                square = gap**2 + (of_z - c) ** 2 * var
                if i == 1:
                    parts[2, label] = 0.5 * (square / p_var + np.log(2 * np.pi * p_var))
                else:
                    parts[1, label] += 0.5 * (std**2 / p_var - 1 - np.log(std**2 / p_var) + square / p_var)
                logit = b["u"][i - 1] * (mean + var**0.5 * nodes) + b["v"][i - 1]
                parts[3, label] += share @ np.logaddexp(0, -logit if label else logit)
    return parts


def test_the_elbo_by_monte_carlo():
    """Mean of log q - log p over the chain, X emitted at every step, is L_0 + L_1 - E log p(z_0 | z_1) + sum CE; the sign matters."""
    b, rng, count = BERNOULLI, np.random.default_rng(0), 400_000
    l0, l1, l3, ce = bernoulli_parts() @ [1 - b["q"], b["q"]]
    # The reference values are Monte Carlo themselves.
    np.testing.assert_allclose([l0, l1, l3, ce, l0 + l1 + l3 + ce], [0.0922, 0.9285, 0.5119, 2.8649, 4.3974], atol=1e-3)
    label = rng.random(count) < b["q"]
    e, last, value = b["e"][label.astype(int)], np.full(count, b["z0"]), np.zeros(count)
    for i in range(4):
        mean = np.sqrt(b["alphas"][i]) * (last + b["w"][i] * e)
        z = mean + np.sqrt(1 - b["alphas"][i]) * rng.normal(size=count)
        value += normal_nll(last, b["c"][i] * z + b["d"][i], b["var"][i]) - normal_nll(z, mean, 1 - b["alphas"][i])
        logit = b["u"][i] * z + b["v"][i]
        value += np.logaddexp(0, np.where(label, -logit, logit))
        last = z
    value += normal_nll(last, 0.0, 1.0)
    error = value.std() / count**0.5
    assert abs(value.mean() - (l0 + l1 + l3 + ce)) < 4 * error
    assert abs(value.mean() - (l0 + l1 - l3 + ce)) > 100 * error  # as printed, with + log p(z_0 | z_1)


def test_the_elbo_is_a_bound():
    """-log p(z_0, X) by quadrature over z_1 .. z_4: with X emitted once, in the last step (`likelihood`), and at every step (the paper)."""
    b, grid = BERNOULLI, np.linspace(-9, 9, 1201)
    width, first = grid[1] - grid[0], []
    parts = bernoulli_parts()
    mean = np.sqrt(b["alphas"][0]) * (b["z0"] + b["w"][0] * b["e"])
    nodes, share = np.polynomial.hermite_e.hermegauss(80)
    z1 = mean[:, None] + np.sqrt(1 - b["alphas"][0]) * nodes
    for label in range(2):
        logit = b["u"][0] * z1[label] + b["v"][0]
        first.append(share @ np.logaddexp(0, -logit if label else logit) / share.sum())
        for every, bound in ((True, parts[:, label].sum()), (False, parts[:3, label].sum() + first[label])):
            law = np.exp(-normal_nll(grid, 0.0, 1.0))
            for i in (3, 2, 1, 0):
                logit = b["u"][i] * grid + b["v"][i]
                if every or i == 0:
                    law = law / (1 + np.exp(-logit if label else logit))
                end = grid if i else np.asarray([b["z0"]])
                law = np.exp(-normal_nll(end[:, None], b["c"][i] * grid + b["d"][i], b["var"][i])) @ law * width
            assert bound > -math.log(law[0]) + 0.05, (label, every)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_kl_has_the_paper_s_weights(weight):
    """True X: (1 - alpha_t) / (2 alpha_t (1 - bar alpha_s)) |eps - eps_hat|^2; believed: |c (eps - eps_hat) + w (E - E_hat)|^2 / 2 var."""
    with jax.enable_x64(True):
        process = pair(WEIGHTS[weight])
        w = step_weights(WEIGHTS[weight], process.chain.schedule)
        marginal, x0, eps_hat = chain_moments(w), scalars(z=0.8, x=-1.3), 0.37
        for i in range(2, STEPS + 1):
            step, (alpha, a, sigma), sigma_s = ALPHAS[i - 1], marginal[:, i], marginal[2, i - 1]
            for own, e_hat in ((0.0, -1.3), (0.5, 0.4)):
                noised = process.corrupt(keys(1), x0, at(i / STEPS, own))
                eps, z = float(noised.noise["z"][0, 0]), float(noised.xt["z"][0, 0])
                belief = scalars(z=(z - a * e_hat - sigma * eps_hat) / alpha, x=e_hat)
                c, var = (1 - step) / (step**0.5 * sigma), (1 - step) * sigma_s**2 / sigma**2
                expected = (c * (eps - eps_hat) + w[i - 1] * (-1.3 - e_hat)) ** 2 / (2 * var)
                if own == 0:
                    np.testing.assert_allclose(expected, (1 - step) / (2 * step * sigma_s**2) * (eps - eps_hat) ** 2, rtol=1e-9)
                got = process.kl(noised, belief, at((i - 1) / STEPS, own))
                np.testing.assert_allclose(got["z"][0], expected, rtol=1e-8)
                assert got["x"] == 0
                # It is the difference of what `step` does with the truth and with the belief.
                means = [process.step(keys(1), noised.xt, tree, noised.t, at((i - 1) / STEPS, own))["z"] for tree in (x0, belief)]
                np.testing.assert_allclose((means[0] - means[1])[0, 0] ** 2 / (2 * var), expected, rtol=1e-8)


@pytest.mark.parametrize("weight, own", [("moving", 0.0), ("moving", 1.0), ("late", 0.5), *(
    pytest.param(*row, marks=pytest.mark.slow) for row in [("moving", 0.5), ("late", 0.0), ("late", 1.0)])])
def test_rate_is_the_limit_of_kl(weight, own):
    with jax.enable_x64(True):
        def cosine(t):
            return jnp.cos(t * math.pi / 2), jnp.sin(t * math.pi / 2)

        process = pair(WEIGHTS[weight], cosine, predict=processes.v)
        for t in (0.1, 0.5, 0.9):
            noised = process.corrupt(keys(1), scalars(z=0.8, x=-1.3), at(t, own))
            belief = scalars(z=0.5, x=0.4)
            limit = process.kl(noised, belief, at(t - 1e-6, own))["z"] / 1e-6
            np.testing.assert_allclose(process.elbo_rate(noised, belief)["z"], limit, rtol=1e-4)


@pytest.mark.slow
def test_losses_of_the_heads():
    """One-hot KL = CE; soft labels: KL = CE - H; a Gaussian head of unit variance: KL = |.|^2 / 2; and which times count."""
    t = jnp.asarray([0.0, 0.3, 1.0])
    head, x0, out = Hidden(null=np.full(4, 7.0)), jax.random.normal(jax.random.key(0), (3, 4)), jnp.ones((3, 4))
    noised = head.corrupt(keys(3), x0, t)
    np.testing.assert_array_equal(noised.xt[1:], np.full((2, 4), 7.0))
    np.testing.assert_array_equal(noised.xt[0], x0[0])
    np.testing.assert_allclose(head.loss(out, noised), ((x0 - 1) ** 2).mean(-1) * jnp.asarray([0, 1, 1]), rtol=1e-6)
    belief = head.clean(out, noised.xt, t)
    entropy = 2 * math.log(2 * math.pi)  # of N(x_0, 1)'s peak, four dimensions
    np.testing.assert_allclose(head.kl(noised, belief, 0 * t) - jnp.asarray([0, entropy, entropy]),
                               0.5 * ((x0 - 1) ** 2).sum(-1) * jnp.asarray([0, 1, 1]), rtol=1e-5, atol=1e-5)
    assert not head.kl(noised, belief, jnp.asarray([0.0, 0.2, 0.9])).any() and not head.elbo_rate(noised, belief).any()
    wide = dataclasses.replace(head, std=2.0).kl(noised, belief, 0 * t)[1]
    np.testing.assert_allclose(wide, ((x0[1] - 1) ** 2).sum() / 8 + entropy + 4 * math.log(2), rtol=1e-5)
    np.testing.assert_array_equal(head.step(keys(3), noised.xt, belief, t, 0 * t), belief)
    np.testing.assert_array_equal(head.step(keys(3), noised.xt, belief, t, t / 2), noised.xt)

    process = labelled()
    logits = jax.random.normal(jax.random.key(1), (3, 3))
    labels = jnp.asarray([0, 1, 2])
    joint_t = {"image": jnp.full(3, 0.4), "label": t}
    noised = process.corrupt(keys(3), {"image": jnp.ones((3, 2)), "label": labels}, joint_t)
    ce = -jax.nn.log_softmax(logits)[jnp.arange(3), labels]
    values = process.loss({"image": jnp.zeros((3, 2)), "label": logits}, noised)["label"]
    np.testing.assert_allclose(values, [0, ce[1], 0], rtol=1e-6)
    np.testing.assert_allclose(process.nll("label", logits, labels), ce, rtol=1e-6)
    soft = jax.nn.softmax(jnp.asarray([0.2, -0.4, 1.0]))
    cross, own = -(soft * jax.nn.log_softmax(logits[0])).sum(), -(soft * jnp.log(soft)).sum()
    kl = (soft * (jnp.log(soft) - jax.nn.log_softmax(logits[0]))).sum()
    np.testing.assert_allclose(kl, sum(soft[k] * process.nll("label", logits[:1], jnp.asarray([k]))[0] for k in range(3)) - own, rtol=1e-5)
    np.testing.assert_allclose(kl, cross - own, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- exact toys

TOY = Mixture([0.3, 0.7], [[-1.5], [1.5]], 0.3)
SIGNS = np.asarray([[-1.0], [1.0]], np.float32)
THREE = Mixture([0.5, 0.3, 0.2], [[-1.0, 0.4], [0.3, 1.0], [1.0, -1.0]], 0.4)


def toy(weight=moving_target(), label=None, **chain):
    chain = {"schedule": schedules.linear_beta(), "predict": processes.eps, "eta": 1.0} | chain
    return labelled(weight, label or processes.absorbing(2, schedules.at_once()), table=SIGNS, **chain)


def network(process, mixture, table, sees=True):
    """What a perfect network returns for a labelled mixture; one that does not see the label takes any for hidden."""
    chain, label = process.chain, process.parts["label"]

    def apply(params, x, t):
        own = t["label"] if sees else jnp.where(t["label"] == 1, 1.0, 0.5)
        state = x["label"] if sees else jnp.full_like(x["label"], label.mask)
        inside = jnp.maximum(t["image"], 1e-4)
        alpha, sigma = (c[:, None, None] for c in chain.schedule(inside))
        p, q = (c[:, None] for c in chain.predict(chain.schedule, inside))
        shift = process.added["label"].weight(chain.schedule, inside) * (own < 1)
        spread = alpha**2 * mixture.std**2 + sigma**2
        gap = x["image"][:, None] - alpha * mixture.means - shift[:, None, None] * table
        likelihood = label.pull(jax.nn.one_hot(state, label.states), None, own)[:, : label.classes]
        scores = jnp.log(mixture.weights) - 0.5 * (gap**2 / spread).sum(-1) + jnp.log(likelihood)
        log_share = jax.nn.log_softmax(scores)
        share = jnp.exp(log_share)[..., None]
        z0, eps = mixture.means + alpha * mixture.std**2 / spread * gap, sigma / spread * gap
        return {"image": p * (share * z0).sum(1) + q * (share * eps).sum(1), "label": jnp.maximum(log_share, -1e4)}

    return apply


ESTIMATES = {"soft": lambda state: state, "sampled": sampling.sampled(), "argmax": sampling.top_p(0.0)}
FAMILIES = {"moving": moving_target(), "card": card(), "constant": stepwise([0.01] * 1000)}


@functools.cache
def trajectory(network_of):
    """The sampler of a network, for any of the weights and any estimate of a hidden label: compiled once."""

    @jax.jit
    def run(k, given, family, estimate):
        def chosen(state):
            return state.corrected(sum(estimate[i] * transform(state).x0 for i, transform in enumerate(ESTIMATES.values())))

        process = toy(lambda schedule, t: sum(family[i] * weight(schedule, t) for i, weight in enumerate(FAMILIES.values())))
        transforms = [sampling.following(process, "label", chosen)]
        grid = sampling.uniform_grid(80) ** 1.5
        return sampling.sample(process, network_of(process), None, k, grid, {"image": (1,), "label": ()}, given, transforms=transforms)

    return run


def draws(weight, network_of, estimate="soft", given=None, count=16_000):
    family, way = (jnp.asarray([float(one == name) for one in names]) for name, names in ((weight, FAMILIES), (estimate, ESTIMATES)))
    out = trajectory(network_of)(keys(count), {} if given is None else {"label": jnp.full(count, given)}, family, way)
    return np.asarray(out["image"]), np.asarray(out["label"])


def seeing(process):
    return network(process, TOY, SIGNS)


def blind(process):
    return network(process, TOY, SIGNS, sees=False)


def by_its_head(process):
    return sampling.head_guided(process, blind(process))


@pytest.mark.slow
@pytest.mark.parametrize("weight, estimate", [
    ("moving", "soft"), ("card", "argmax"), ("moving", "sampled"), ("moving", "argmax"), ("constant", "soft"), ("card", "soft")])
def test_joint_sampling_has_the_law_of_the_pairs(weight, estimate):
    """P = .700, modes at +-1.50 with deviation .30, labels that agree. The mean of E and draws are right, the best class is biased."""
    image, label = draws(weight, seeing, estimate)
    positive = image > 0
    assert abs(positive.mean() - 0.7) < (0.035 if estimate == "argmax" else 0.012)
    assert ((label == 1) == positive[:, 0]).mean() > 0.999
    for side in (image[positive], image[~positive]):
        assert abs(abs(side.mean()) - 1.5) < 0.03 and abs(side.std() - 0.3) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["moving", "card"])
def test_conditional_sampling(weight):
    """Asked for the rarer class: the X variant and the head's gradient never miss it; a known E(x) beside an unconditional eps does."""
    for network_of in (seeing, by_its_head):
        image, label = draws(weight, network_of, given=0, count=4000)
        assert (image < 0).all() and abs(image.mean() + 1.5) < 0.03 and abs(image.std() - 0.3) < 0.03
        assert not label.any()
    assert (draws(weight, blind, given=0, count=4000)[0] > 0).mean() > 0.7  # the literal plug-in


@functools.cache
def exact_three(predict, schedule, scaled=False):
    """(process, network) of three classes in the plane; `scaled` feeds the network as EDM does."""
    process = labelled(schedule=SCHEDULES[schedule], predict=getattr(processes, predict))
    apply = functools.partial(network, mixture=THREE, table=TABLE)
    if not scaled:
        return process, apply
    chain = dataclasses.replace(process.chain, data_std=0.5)

    def fed(process, sees=True):
        def unscaled(params, x, t):
            image = x["image"] / chain.inputs(jnp.ones_like(x["image"]), t["image"])[0]
            return apply(process, sees=sees)(params, {**x, "image": image}, t)

        return unscaled

    return Aggregate("image", process.added, image=chain, label=LABEL), fed


CHAINS = {name: SCHEDULES[name] for name in ("flow", "cosine", "linear_beta", "edm")} | {"cosine_beta": schedules.cosine_beta()}


@pytest.mark.parametrize("predict, schedule, data_std", [
    *((predict, schedule, None) for predict in ("x0", "v", "velocity") for schedule in CHAINS),
    *(("eps", schedule, None) for schedule in ("linear_beta", "cosine_beta", "edm")), ("eps", "edm", 0.5), ("x0", "edm", 0.5)])
@pytest.mark.parametrize("added", [False, True])
def test_the_network_s_encoding_points_to_the_mean_of_its_class(predict, schedule, data_std, added):
    """E is the class mean up to a factor, of networks that are exact for a chain without a sum or for one with that very sum."""
    means = jnp.asarray(THREE.means, jnp.float32)
    table = added * 0.7 * means / jnp.sqrt((means**2).mean(-1, keepdims=True))
    chain = Gaussian(CHAINS[schedule], getattr(processes, predict), data_std=data_std)
    process = Aggregate("image", {"label": MeanShift(template(table), moving_target())}, image=chain, label=LABEL)
    encoded = encoded_by(process, table, data_std)
    np.testing.assert_allclose(jnp.sqrt((encoded**2).mean(-1)), 0.7, rtol=1e-5)
    cosine = (encoded * means).sum(-1) / (jnp.linalg.norm(encoded, axis=-1) * jnp.linalg.norm(means, axis=-1))
    np.testing.assert_allclose(cosine, 1.0, atol=2e-3)


def test_the_network_s_encoding_finds_the_mean_of_its_class_from_anywhere():
    """The network is taught z_t with its own encoding in it: that settles where it should, also where all of it comes back (eps)."""
    means = jnp.asarray(THREE.means, jnp.float32)
    chain = Gaussian(CHAINS["linear_beta"], processes.eps)
    table = -0.7 * means[:, ::-1]
    for _ in range(12):
        process = Aggregate("image", {"label": MeanShift(template(table), moving_target())}, image=chain, label=LABEL)
        table = encoded_by(process, table)
    cosine = (table * means).sum(-1) / (jnp.linalg.norm(table, axis=-1) * jnp.linalg.norm(means, axis=-1))
    assert cosine.min() > 0.99


def encoded_by(process, table, data_std=None):
    """E of the three classes, by the network that is exact for the process."""
    exact = network(process, THREE, table)

    def apply(params, x, t):
        image = x["image"] if data_std is None else x["image"] / process.chain.inputs(jnp.ones_like(x["image"]), t["image"])[0]
        return exact(params, {**x, "image": image}, t)

    return by_network(apply, process.chain, (2,), "label", 3, rms=0.7)(None, jnp.eye(3))


@pytest.mark.slow
@pytest.mark.parametrize("predict, schedule, scaled", [
    ("eps", "linear_beta", False), ("eps", "linear_beta", True), ("v", "cosine", False), ("velocity", "flow", False),
    ("x0", "cosine", False)])
def test_the_head_s_gradient_is_the_conditional_score(predict, schedule, scaled):
    """E[eps | z, X] = E[eps | z] - sigma grad log p(X | z), and what it says in every parameterisation."""
    process, make = exact_three(predict, schedule, scaled)
    t, count = {"image": jnp.linspace(0.05, 0.95, 6), "label": jnp.zeros(6)}, 6
    x0 = THREE.draw(jax.random.key(3), count)
    noised = process.corrupt(keys(count), x0, t)
    net = process.inputs(noised.xt, t)
    seen, hidden = (make(process, sees=sees)(None, *net) for sees in (True, False))
    guided = sampling.head_guided(process, make(process, sees=False))(None, *net)
    scale = 1 + np.abs(seen["image"]).max()
    assert np.abs(seen["image"] - hidden["image"]).max() > 0.05
    np.testing.assert_allclose(guided["image"], seen["image"], atol=3e-4 * scale)
    if predict == "eps":  # scale 0 is no guidance, and the scale is that of a linear map
        none, twice = (sampling.head_guided(process, make(process, sees=False), s)(None, *net) for s in (0.0, 2.0))
        np.testing.assert_allclose(none["image"], hidden["image"], atol=1e-6)
        np.testing.assert_allclose(twice["image"] - hidden["image"], 2 * (guided["image"] - hidden["image"]), atol=1e-4)
    # Of a label that is not known nothing is known.
    later = {**t, "label": t["image"]}
    bare = {**net[0], "label": jnp.full(count, 3)}
    again = sampling.head_guided(process, make(process, sees=False))(None, bare, later)
    np.testing.assert_allclose(again["image"], make(process, sees=False)(None, bare, later)["image"], atol=1e-6)


@pytest.mark.parametrize("predict, schedule, scaled", some(
    [("eps", "linear_beta", True), ("v", "cosine", False)], ("v", "cosine", False)))
def test_guidance_compares_with_plain_ddpm(predict, schedule, scaled):
    """Classifier-free: the dropped label leaves the mean, too. Weight 1 is conditional, 0 the DDPM of y_t; hidden labels stay hidden."""
    process, make = exact_three(predict, schedule, scaled)
    apply, count = make(process), 6
    t = {"image": jnp.linspace(0.1, 0.9, count), "label": jnp.asarray([0.0, 0.5, 1.0] * 2)}
    x0 = THREE.draw(jax.random.key(3), count)
    noised = process.corrupt(keys(count), x0, t)
    net = process.inputs(noised.xt, t)
    plain = apply(None, *net)["image"]
    np.testing.assert_allclose(sampling.guided(apply, 1.0, ("label",), process)(None, *net)["image"], plain, atol=1e-6)
    ours = sampling.guided(apply, 0.0, ("label",), process)(None, *net)["image"]
    absent = {**t, "label": jnp.ones(count)}
    ddpm = process.corrupt(keys(count), x0, absent)
    expected = apply(None, *process.inputs(ddpm.xt, absent))["image"]
    known = np.asarray(t["label"] == 0)
    np.testing.assert_allclose(ours[known], expected[known], atol=1e-4)
    np.testing.assert_allclose(ours[~known], plain[~known], atol=1e-6)
    assert np.abs(plain - expected)[known].max() > 0.05


@pytest.mark.parametrize("label", ["at_once", "absorbing"])
def test_the_joint_law_is_reproduced(label):
    """A label that is revealed by one draw at the end, or unmasked on a chain of its own: shares, means and spreads by label."""
    chain = processes.absorbing(3, schedules.at_once() if label == "at_once" else None)
    process, count = labelled(label=chain), 8000
    run = jax.jit(lambda k: sampling.sample(process, network(process, THREE, TABLE), None, k, sampling.uniform_grid(64), SHAPE))
    out = jax.tree.map(np.asarray, run(keys(count)))
    np.testing.assert_allclose(np.bincount(out["label"], minlength=3) / count, THREE.weights, atol=0.03)
    for k in range(3):
        own = out["image"][out["label"] == k]
        np.testing.assert_allclose(own.mean(0), THREE.means[k], atol=4 * THREE.std / len(own) ** 0.5 + 0.03)
        np.testing.assert_allclose(own.std(0), THREE.std, atol=4 * THREE.std / (2 * len(own)) ** 0.5 + 0.03)


def test_a_label_may_be_told_on_the_way():
    """Drawn at half time, and known from there on: z carries what was drawn."""
    process = toy()
    paths = {"label": lambda t: jnp.maximum(2 * t - 1, 0.0)}
    draw = sampling.make_sampler(process, seeing(process), {"image": (1,), "label": ()}, paths=paths)
    out = jax.jit(functools.partial(draw, steps=80, guidance=1.0))(None, keys(4000), {})
    assert (out["label"] == (out["image"][:, 0] > 0)).mean() > 0.995 and abs(float(out["label"].mean()) - 0.7) < 0.03


def test_classification_is_by_the_image_alone():
    """Image clean, label absent: Bayes' p(label | image), from one call that no label enters."""
    process, _ = exact_three("v", "cosine")
    images = THREE.draw(jax.random.key(5), 6)["image"]
    belief = accuracy.posterior(process, network(process, THREE, TABLE), None, keys(6), {"image": images}, "label", SHAPE)
    _, exact = THREE.beliefs(images, jnp.ones((6, 1)), jnp.zeros((6, 1)), jnp.ones((6, 3)))
    np.testing.assert_allclose(belief, exact, atol=1e-3)
    t, xt = {"image": jnp.zeros(6), "label": jnp.ones(6)}, {"image": images, "label": jnp.full(6, 3)}
    for label in (jnp.zeros(6, jnp.int32), jnp.ones(6, jnp.int32)):
        jax.tree.map(np.testing.assert_array_equal, process.corrupt(keys(6), {"image": images, "label": label}, t).xt, xt)


def test_what_is_known_shifts_the_prior():
    """CARD starts at N(E(x), 1) for a given x; what is not given, and a given target, add nothing."""
    process, labels = labelled(card()), jnp.asarray([0, 1, 2])
    plain, known = (sampling.sample_prior(process, keys(3), SHAPE, given) for given in ({}, {"label": labels}))
    np.testing.assert_allclose(known["image"] - plain["image"], TABLE, atol=1e-6)
    np.testing.assert_array_equal(known["label"], labels)
    image = jnp.ones((3, 2))
    np.testing.assert_array_equal(sampling.sample_prior(process, keys(3), SHAPE, {"image": image, "label": labels})["image"], image)
    # A target that is given stays as it is while the label is sampled.
    out = sampling.sample(process, linear_network, PARAMS, keys(3), sampling.uniform_grid(3), SHAPE, given={"image": image})
    np.testing.assert_array_equal(out["image"], image)


@pytest.mark.parametrize("moved", ["image", "label"])
def test_another_x0_explains_the_same_noisy_state(moved):
    process, t = labelled(), {"image": jnp.linspace(0.1, 0.9, 6), "label": jnp.asarray([0.0, 0.5, 1.0] * 2)}
    noised = process.corrupt(keys(6), data(), t)
    other = {"image": -data()["image"]} if moved == "image" else {"label": (data()["label"] + 1) % 3}
    explained = process.with_x0(noised, other)
    np.testing.assert_array_equal(explained.x0[moved], other[moved])
    jax.tree.map(np.testing.assert_array_equal, explained.xt, noised.xt)
    alpha, sigma = (c[:, None] for c in process.chain.schedule(t["image"]))
    bare = process.split(explained)["image"].xt
    np.testing.assert_allclose(bare, alpha * explained.x0["image"] + sigma * explained.noise["image"], atol=1e-5)
    np.testing.assert_array_equal(process.with_x0(noised, {}).noise["image"], noised.noise["image"])


# ---------------------------------------------------------------------------------------------------------------- the losses


def test_gradients_stop_at_encoders_and_pass_through_heads():
    def apply(params, x, t):
        features = jnp.tanh(jnp.concatenate([x["image"], t["image"][:, None]], -1) @ params["trunk"])
        return {"image": features @ params["image"], "label": features @ params["label"]}

    draw = jax.random.normal
    params = {"trunk": draw(jax.random.key(0), (3, 5)), "image": draw(jax.random.key(1), (5, 2)), "label": draw(jax.random.key(2), (5, 3))}
    batch = data() | {"index": jnp.arange(6)}

    def value(params, table, head, bound=False):
        process = labelled(table=table, predict=processes.eps, schedule=schedules.linear_beta())
        terms = {"": (1.0, losses.vlb(process, 1000))} if bound else losses.weighted(process, label=head, image=1.0 - (head == 1.0))
        return losses.diffusion(process, apply, times.shared("image", "label"), terms)(params, batch, jax.random.key(3))[0]

    table, both = jnp.asarray(TABLE), jax.jit(jax.value_and_grad(value, (0, 1)), static_argnums=(2, 3))
    one, (none, stopped) = both(params, table, 0.0)
    two, _ = both(params, 2 * table, 0.0)
    _, (head_only, again) = both(params, table, 1.0)
    _, (_, bounded) = both(params, table, 0.1, True)
    assert abs(float(one - two)) > 1e-4 and not any(gradient.any() for gradient in (stopped, again, bounded))
    assert not none["label"].any() and none["trunk"].any()
    assert head_only["trunk"].any() and not head_only["image"].any()
    with pytest.raises(UserError, match="weighted: no modality lable"):
        losses.weighted(labelled(), lable=0.1)


def test_losses_and_gradients_are_finite_at_all_times():
    process = Aggregate(
        "image", {"label": MeanShift(template(TABLE), moving_target()), "other": MeanShift(lambda x: x[..., :2], card())},
        image=Gaussian(schedules.cosine(), processes.v), label=LABEL, other=Hidden(), more=Given())
    batch = data() | {"other": jnp.ones((6, 4)), "more": jnp.ones((6, 2)), "index": jnp.arange(6)}
    params = PARAMS | {"other": jnp.ones((8, 4))}
    terms = losses.weighted(process) | {"vlb": (0.1, losses.vlb(process)), "kl": (0.1, losses.vlb(process, 8))}
    assert sorted(terms) == ["image", "kl", "label", "other", "vlb"]

    @jax.jit
    def run(image, label):
        def when(key, index):
            return {name: jnp.full(index.shape, image if name == "image" else label) for name in process.parts}

        return jax.value_and_grad(losses.diffusion(process, linear_network, when, terms), has_aux=True)(params, batch, jax.random.key(0))

    for image in (0.0, 0.125, 0.5, 1.0):
        for label in (0.0, 0.5, 1.0):
            (value, metrics), gradient = run(image, label)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, metrics, gradient))), (image, label, metrics)
            assert (metrics["loss/label"] > 0) == (metrics["loss/other"] > 0) == (0 < label < 1)
            assert (metrics["loss/image"] > 0) == (image > 0)


@pytest.mark.slow
def test_the_bound_on_pairs():
    """`likelihood` takes it as any joint: for the exact network the bound in continuous time is tight, on pairs and on z for a known x."""
    process, count = toy(), 3000
    x0 = TOY.draw(jax.random.key(0), count)
    given = 0.5 * ((x0["image"][:, 0] - TOY.means[x0["label"], 0]) / 0.3) ** 2 + 0.5 * math.log(2 * math.pi * 0.09)
    for pinned, exact in (((), given - jnp.log(TOY.weights)[x0["label"]]), (("label",), given)):
        path = likelihood.along(process, likelihood.line(0.01), pinned)
        run = jax.jit(lambda k, x, path=path: likelihood.continuous_time(process, seeing(process), None, k, x, path, 50))
        gap = likelihood.total(run(keys(count), x0)) - exact
        assert abs(float(gap.mean())) < 4 * float(gap.std()) / count**0.5 < 0.2, float(gap.mean())


def test_mistakes_are_named():
    chain, shift = Gaussian(schedules.flow()), MeanShift(template(TABLE), moving_target())
    with pytest.raises(ValueError, match="target 'label' must be one of .* and a Gaussian"):
        Aggregate("label", {}, image=chain, label=LABEL)
    for name in ("image", "text"):
        with pytest.raises(ValueError, match=rf"cannot add \['{name}'\].*other than 'image' are \['label'\]"):
            Aggregate("image", {name: shift}, image=chain, label=LABEL)
    with pytest.raises(ValueError, match=r"encoder of 'label' gives the shape \(1, 2\), but 'image' has \(1, 3\)"):
        t = {"image": jnp.ones(1), "label": jnp.ones(1)}
        labelled().corrupt(keys(1), {"image": jnp.ones((1, 3)), "label": jnp.zeros(1, jnp.int32)}, t)
    with pytest.raises(ValueError, match=r"one weight per step of the chain, \[T\]"):
        stepwise([[0.1]])
    process = labelled()
    assert hash(process) == hash(process) and process.select(data()).keys() == {"image", "label"} and process.conditions == ()
    known = Aggregate("image", {"label": MeanShift(identity, moving_target())}, image=chain, label=Given())
    assert known.conditions == ("label",) and known.heads == ()
    with pytest.raises(UserError, match="head_guided: the process adds no modality that the network predicts"):
        sampling.head_guided(known, linear_network)
    x0, t = {"image": jnp.zeros((2, 3)), "label": jnp.ones((2, 3))}, {"image": jnp.full(2, 0.5), "label": jnp.arange(2.0)}
    noised = known.corrupt(keys(2), x0, t)
    np.testing.assert_allclose(noised.xt["image"] - 0.5 * noised.noise["image"], [[0.25] * 3, [0.0] * 3], atol=1e-6)


def test_heun_is_of_second_order_with_a_known_label():
    """The chain carries E(x) of a label that is given: Heun's slopes are those of y_t, and z_t follows."""
    process, given = labelled(schedule=schedules.flow()), {"label": jnp.arange(32) % 3}

    @jax.jit  # coarser grids stay at t = 1 for a while: one program for all
    def run(grid):
        apply = network(process, THREE, TABLE)
        return sampling.sample(process, apply, None, keys(32), grid, SHAPE, given=given, heun=True, history=True)["image"][-2]

    steps = np.asarray([8, 16, 32, 256])
    ends = [run(jnp.asarray([*np.ones(256 - n), *np.linspace(1, 0.125, n + 1), 0.0])) for n in steps]
    errors = [float(jnp.sqrt(((end - ends[-1]) ** 2).mean())) for end in ends[:-1]]
    assert -np.polyfit(np.log(steps[:-1]), np.log(errors), 1)[0] > 1.85, errors
