"""Laws of discrete diffusion, over every chain, against dense float64 matrices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import (
    COSINE,
    DISCRETE,
    RANK_ONE,
    REMEMBER,
    SOME_DISCRETE,
    STEPS,
    dense,
    dense_belief,
    dense_posterior,
    flow64,
    keep64,
    keys,
    masked_cosine64,
)

from mmdiff import processes, schedules
from mmdiff.processes import Markov, Noised, class_sampling, fold

EVERY = list(DISCRETE)
# All kinds of pairs (s, t): from the data, to the end, neighbours, far apart.
PAIRS = [(s / STEPS, t / STEPS) for s, t in ((0, 1), (0, 3), (0, 8), (1, 2), (3, 5), (2, 7), (4, 8), (7, 8))]


@functools.cache
def jitted(name, method):
    return jax.jit(getattr(DISCRETE[name], method))


def rows(process, pairs):
    """One batch with every pair of times and every x_t: (s, t, x_t)."""
    every = [(s, t, x) for (s, t), x in itertools.product(pairs, range(process.states))]
    s, t, xt = (np.asarray(column) for column in zip(*every))
    return jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32), jnp.asarray(xt, jnp.int32)


def random_beliefs(process, count, sparse=True):
    rng = np.random.default_rng(1)
    beliefs = rng.dirichlet(np.ones(process.classes), count)
    if sparse:  # some classes get exactly nothing
        beliefs[::3, 0] = 0
        beliefs /= beliefs.sum(-1, keepdims=True)
    return beliefs.astype(np.float32)


@pytest.mark.parametrize("name", EVERY)
def test_push_and_pull_are_the_matrix_and_its_transpose(name):
    process = DISCRETE[name]
    eye = jnp.broadcast_to(jnp.eye(process.states), (len(PAIRS), process.states, process.states))
    s, t = np.asarray(PAIRS, np.float32).T
    pushed, pulled = jitted(name, "push")(eye, s, t), jitted(name, "pull")(eye, s, t)
    expected = np.stack([dense(name, *pair) for pair in PAIRS])
    np.testing.assert_allclose(pushed, expected, atol=2e-6)
    np.testing.assert_allclose(pulled, expected.swapaxes(1, 2), atol=2e-6)
    np.testing.assert_allclose(pushed.sum(-1), 1, atol=1e-5)  # probability is kept
    np.testing.assert_allclose(jitted(name, "pull")(jnp.ones_like(eye), s, t), 1, atol=1e-5)
    from_zero = jitted(name, "push")(eye, None, t)
    np.testing.assert_allclose(from_zero, np.stack([dense(name, 0, u) for _, u in PAIRS]), atol=2e-6)
    np.testing.assert_allclose(jitted(name, "pull")(eye, None, t), from_zero.swapaxes(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_push_and_pull_are_adjoint(name):
    """<push p, f> = <p, pull f>, with one time per example or per token."""
    process = DISCRETE[name]
    rng = np.random.default_rng(0)
    p, f = rng.uniform(size=(2, len(PAIRS), process.states, process.states)).astype(np.float32)
    per_token = np.sort(rng.integers(0, STEPS + 1, (2, len(PAIRS), process.states)), axis=0) / np.float32(STEPS)
    for s, t in (per_token.astype(np.float32), np.asarray(PAIRS, np.float32).T):
        for start in (s, None):
            left = (np.asarray(jitted(name, "push")(p, start, t)) * f).sum(-1)
            right = (p * np.asarray(jitted(name, "pull")(f, start, t))).sum(-1)
            np.testing.assert_allclose(left, right, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_chapman_kolmogorov(name):
    process = DISCRETE[name]
    rng = np.random.default_rng(0)
    r, s, t = (np.sort(rng.integers(0, STEPS + 1, (3, len(PAIRS))), axis=0) / STEPS).astype(np.float32)
    p, f = rng.dirichlet(np.ones(process.states), (2, len(PAIRS), process.states)).astype(np.float32)
    push, pull = jitted(name, "push"), jitted(name, "pull")
    np.testing.assert_allclose(push(push(p, r, s), s, t), push(p, r, t), atol=1e-6)
    np.testing.assert_allclose(push(push(p, None, s), s, t), push(p, None, t), atol=1e-6)
    np.testing.assert_allclose(pull(pull(f, s, t), r, s), pull(f, r, t), atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_posterior_is_bayes(name):
    process = DISCRETE[name]
    s, t, xt = rows(process, PAIRS)
    beliefs = random_beliefs(process, len(xt))
    got = np.asarray(jitted(name, "posterior")(xt, beliefs, t, s))
    assert (got >= 0).all()
    checked = 0
    for row in range(len(xt)):
        expected = dense_posterior(name, int(xt[row]), beliefs[row].astype(np.float64), float(t[row]), float(s[row]))
        if expected is None:  # nothing that the belief holds possible leads to this x_t
            continue
        np.testing.assert_allclose(got[row], expected, atol=3e-6)
        np.testing.assert_allclose(got[row].sum(), 1, atol=1e-5)
        checked += 1
    assert checked > len(xt) // 2


@pytest.mark.parametrize("name", EVERY)
def test_posterior_with_a_time_per_token(name):
    process = DISCRETE[name]
    s, t, xt = rows(process, PAIRS)
    beliefs = random_beliefs(process, len(xt), sparse=False)
    flat = jitted(name, "posterior")(xt, beliefs, t, s)
    tokens = jitted(name, "posterior")(*(x.reshape(len(PAIRS), process.states, *x.shape[1:]) for x in (xt, beliefs, t, s)))
    np.testing.assert_allclose(tokens.reshape(flat.shape), flat, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_kl_is_that_of_the_posteriors(name):
    """For any belief, also one that holds possible what x_t has ruled out."""
    process = DISCRETE[name]
    s, t, xt = rows(process, PAIRS)
    beliefs = random_beliefs(process, len(xt), sparse=False)
    x0 = np.asarray([max(range(process.classes), key=lambda k, r=r: dense(name, 0, float(t[r]))[k, int(xt[r])] * (1 + 0.1 * (k + r) % 3))
                     for r in range(len(xt))])
    got = jitted(name, "kl")(Noised(jnp.asarray(x0), xt, t), beliefs, s)
    for row in range(len(xt)):
        times = float(t[row]), float(s[row])
        q = dense_posterior(name, int(xt[row]), np.eye(process.classes)[x0[row]], *times)
        p = dense_posterior(name, int(xt[row]), beliefs[row].astype(np.float64), *times)
        if q is None:
            continue
        expected = sum(a * np.log(a / b) for a, b in zip(q, p) if a > 0)
        np.testing.assert_allclose(got[row], expected, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("name", SOME_DISCRETE)
def test_the_truth_has_no_kl_and_no_loss(name):
    process = DISCRETE[name]
    x0 = jnp.arange(32, dtype=jnp.int32) % process.classes
    t = jnp.asarray(np.arange(32) // 4 + 1, jnp.float32) / STEPS
    noised = jitted(name, "corrupt")(keys(32), x0, t)
    truth = jax.nn.one_hot(x0, process.classes)
    np.testing.assert_allclose(jitted(name, "kl")(noised, truth, t - 1 / STEPS), 0, atol=1e-5)
    np.testing.assert_allclose(jitted(name, "loss")(100 * truth, noised), 0, atol=1e-6)
    np.testing.assert_allclose(jitted(name, "elbo_rate")(noised, truth), 0, atol=1e-4)


@pytest.mark.parametrize("name", SOME_DISCRETE)
def test_corrupt_and_step_draw_what_push_and_posterior_say(name):
    process, count = DISCRETE[name], 20_000
    for t, s, x0 in ((0.5, 0.25, 1), (0.875, 0.5, 2)):
        full = functools.partial(jnp.full, (count,))
        noised = jitted(name, "corrupt")(keys(count, 1), full(x0), full(t))
        assert noised.xt.dtype == jnp.int32
        np.testing.assert_allclose(np.bincount(noised.xt, minlength=process.states) / count, dense(name, 0, t)[x0], atol=0.015)
        xt = int(noised.xt[0])
        belief = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
        xs = jitted(name, "step")(keys(count, 2), full(xt), np.tile(belief, (count, 1)), full(t), full(s))
        expected = dense_posterior(name, xt, belief.astype(np.float64), t, s)
        np.testing.assert_allclose(np.bincount(xs, minlength=process.states) / count, expected, atol=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_prior_draws_and_prior_kl(name):
    process = DISCRETE[name]
    draw = process.prior(keys(2000), (5,))
    assert draw.shape == (2000, 5) and draw.dtype == jnp.int32
    share = np.bincount(np.asarray(draw).ravel(), minlength=process.states) / draw.size
    np.testing.assert_allclose(share, process.stationary, atol=0.02)
    x0 = np.arange(process.classes)
    end = dense(name, 0, 1.0)[x0]
    ratio = np.where(end > 0, np.log(np.maximum(end, 1e-300) / np.maximum(process.stationary, 1e-300)), 0)
    np.testing.assert_allclose(process.prior_kl(jnp.asarray(x0)), (end * ratio).sum(1), atol=2e-6)
    pairs = process.prior_kl(jnp.asarray([[0, 1], [1, 2]]))
    np.testing.assert_allclose(pairs[0], process.prior_kl(jnp.asarray([0]))[0] + process.prior_kl(jnp.asarray([1]))[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_pinned_at_zero_and_standing_still(name):
    process = DISCRETE[name]
    x0 = jnp.asarray([[0, 1, 2], [3, 0, 1]])
    zero = jnp.zeros(2)
    wrong = jnp.full((2, 3, process.classes), 1 / process.classes)
    np.testing.assert_array_equal(process.corrupt(keys(2), x0, zero).xt, x0)
    np.testing.assert_array_equal(process.step(keys(2), x0, wrong, zero, zero), x0)
    t = jnp.asarray([0.5, 1.0])
    xt = process.corrupt(keys(2), x0, t).xt
    np.testing.assert_array_equal(process.step(keys(2), xt, wrong, t, t), xt)
    # What is pinned at t = 0 is known, whatever the network says.
    noised = Noised(x0, x0, zero)
    logits = jax.random.normal(jax.random.key(0), (2, 3, process.classes))
    np.testing.assert_array_equal(process.clean(logits, x0, zero), jax.nn.one_hot(x0, process.classes))
    for nothing in (process.loss(logits, noised), process.kl(noised, wrong, zero), process.elbo_rate(noised, wrong)):
        np.testing.assert_array_equal(nothing, [0, 0])


@pytest.mark.parametrize("name", SOME_DISCRETE)
def test_losses_and_gradients_are_finite_at_every_time(name):
    process = DISCRETE[name]
    t = jnp.asarray([0.0, 1e-6, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0], jnp.float32)
    x0 = jnp.asarray(np.arange(16).reshape(8, 2) % process.classes)
    noised = jitted(name, "corrupt")(keys(8), x0, t)
    s = jnp.maximum(jnp.round(t * STEPS) - 1, 0) / STEPS * (t > 1e-5)

    def losses(out):
        x0_hat = process.clean(out, noised.xt, t)
        values = jnp.stack([process.loss(out, noised), process.kl(noised, x0_hat, s), process.elbo_rate(noised, x0_hat)])
        return values.sum(), (values, x0_hat)

    value_and_grad = jax.jit(jax.value_and_grad(losses, has_aux=True))
    for out in (jnp.zeros((8, 2, process.classes)), 50 * jax.random.normal(jax.random.key(0), (8, 2, process.classes))):
        (_, (values, x0_hat)), gradient = value_and_grad(out)
        assert np.isfinite(values).all() and np.isfinite(gradient).all() and np.isfinite(x0_hat).all()
        np.testing.assert_allclose(x0_hat.sum(-1), 1, atol=1e-5)
        assert not gradient[0].any() and not values[:, 0].any()
        assert (values >= -1e-4).all()


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_half_precision_logits_are_read_in_float32(name):
    process = DISCRETE[name]
    x0, t = jnp.asarray([0, 1, 2, 3]), jnp.asarray([0.25, 0.5, 0.75, 1.0])
    noised = process.corrupt(keys(4), x0, t)
    out = jax.random.normal(jax.random.key(0), (4, process.classes)).astype(jnp.bfloat16)
    assert process.loss(out, noised).dtype == jnp.float32
    np.testing.assert_array_equal(process.loss(out, noised), process.loss(out.astype(jnp.float32), noised))


def data_of(process):
    return np.asarray([0.5, 0.3, 0.15, 0.05])[: process.classes]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [8, 2, 1])
def test_the_exact_denoiser_draws_exactly_the_data(name, steps):
    """By enumeration: the product of the steps' transition matrices maps the prior to the data, for any number of steps."""
    process = DISCRETE[name]
    data = data_of(process)
    law = data @ dense(name, 0, 1.0)[: process.classes]  # the prior, or the true end of a chain that does not forget everything
    if name not in REMEMBER:
        np.testing.assert_allclose(law, process.stationary, atol=1e-7)
    xt = jnp.arange(process.states)
    for i in range(steps, 0, -1):
        t, s = i / steps, (i - 1) / steps
        beliefs = [dense_belief(name, data, x, t) for x in range(process.states)]
        known = np.stack([np.zeros(process.classes) if b is None else b for b in beliefs])
        times = jnp.full(process.states, t), jnp.full(process.states, s)
        law = law @ np.asarray(jitted(name, "posterior")(xt, known.astype(np.float32), *times), np.float64)
    np.testing.assert_allclose(law[: process.classes], data, atol=1e-5)
    np.testing.assert_allclose(law[process.classes :], 0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [8, 2])
def test_vlb_bounds_the_log_likelihood(name, steps):
    """VLB(x_0) >= -log p(x_0), with equality for the true posterior; x_t enumerated, not drawn."""
    process = DISCRETE[name]
    data = data_of(process)

    def bound(belief_of):
        total = np.asarray(process.prior_kl(jnp.arange(process.classes)), np.float64)
        x0, xt = (jnp.asarray(a.ravel()) for a in np.meshgrid(np.arange(process.classes), np.arange(process.states), indexing="ij"))
        for i in range(1, steps + 1):
            t, s = i / steps, (i - 1) / steps
            weight = dense(name, 0, t)[: process.classes]
            beliefs = np.stack([belief_of(int(x), t) for x in xt]).astype(np.float32)
            full = functools.partial(jnp.full, x0.shape)
            kl = jitted(name, "kl")(Noised(x0, xt, full(t)), beliefs, full(s))
            kl = np.where(weight > 0, np.asarray(kl, np.float64).reshape(weight.shape), 0)
            total += (weight * kl).sum(1)
        return total

    def true_belief(xt, t):
        belief = dense_belief(name, data, xt, t)
        return np.zeros(process.classes) if belief is None else belief

    def other_belief(xt, t):
        """A model of its own: the exact denoiser of another distribution."""
        belief = dense_belief(name, data[::-1], xt, t)
        return np.zeros(process.classes) if belief is None else belief

    if name in REMEMBER:  # the prior is not the marginal: the bound is not tight
        assert (bound(true_belief) @ data) > -(data * np.log(data)).sum()
        return
    np.testing.assert_allclose(bound(true_belief), -np.log(data), atol=2e-5)
    np.testing.assert_allclose(bound(other_belief), -np.log(data[::-1]), atol=2e-5)
    uninformed = bound(lambda xt, t: np.full(process.classes, 1 / process.classes))
    assert uninformed @ data > -(data * np.log(data)).sum() + 0.01
    assert np.exp(-uninformed).sum() < 1 + 1e-4  # the model's own probabilities are at least these: they sum to at most one


@pytest.mark.parametrize("name", RANK_ONE)
def test_rate_is_the_limit_of_the_kl(name):
    """Against dense float64 posteriors a millionth apart."""
    process = DISCRETE[name]
    t, xt, x0 = (np.asarray(c) for c in zip(*itertools.product((0.05, 0.3, 0.6, 0.95), range(process.states), range(process.classes))))
    beliefs = random_beliefs(process, len(t), sparse=False)
    got = jitted(name, "elbo_rate")(Noised(jnp.asarray(x0), jnp.asarray(xt), jnp.asarray(t, jnp.float32)), beliefs)
    dt = 1e-6
    for row in range(len(t)):
        q = dense_posterior(name, xt[row], np.eye(process.classes)[x0[row]], t[row], t[row] - dt)
        p = dense_posterior(name, xt[row], beliefs[row].astype(np.float64), t[row], t[row] - dt)
        if q is None:
            continue
        limit = (q * np.log(np.maximum(q, 1e-300) / np.maximum(p, 1e-300))).sum() / dt
        np.testing.assert_allclose(got[row], limit, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["absorbing", "absorbing_cosine"])
def test_the_absorbing_rate_is_md4_s_weight_times_the_cross_entropy(name):
    """-alpha' / (1 - alpha) CE on masked tokens, nothing on others (MD4, equation 4); also at t = 1 itself."""
    process = DISCRETE[name]
    t = np.asarray([0.1, 0.4, 0.7, 0.99, 1.0, 0.5], np.float64)
    slope = np.full(6, -1.0) if name == "absorbing" else -np.pi / 2 * np.cos(np.pi * t / 2)
    alpha = (masked_cosine64 if name in COSINE else flow64)(t)[0]
    x0 = jnp.asarray([0, 1, 2, 3, 0, 1])
    xt = jnp.asarray([4, 4, 4, 4, 4, 1])
    out = jax.random.normal(jax.random.key(0), (6, 4))
    noised = Noised(x0, xt, jnp.asarray(t, jnp.float32))
    got = process.elbo_rate(noised, process.clean(out, xt, noised.t))
    expected = -slope / (1 - alpha) * np.asarray(process.loss(out, noised))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 if name in COSINE else 1e-6)
    assert got[-1] == 0


@pytest.mark.parametrize("name", ["absorbing", "mask_and_replace", "vqd_paper"])
def test_an_unmasked_token_stays(name):
    process = DISCRETE[name]
    wrong = jnp.tile(jnp.asarray([[0.01, 0.01, 0.49, 0.49]]), (5, 1))
    t, s = jnp.full(5, 0.75), jnp.full(5, 0.25)
    xt = jnp.asarray([0, 1, 2, 3, process.mask])
    xs = process.step(keys(5), xt, wrong, t, s)
    if name == "absorbing":
        np.testing.assert_array_equal(xs[:4], xt[:4])
    assert not (np.asarray(xs[:4]) == process.mask).any()  # a mask never comes back from a token


def test_small_steps_keep_their_digits():
    """At T = 10,000 neighbouring posteriors agree with float64 to 0.2 %."""
    steps = 10_000
    for name in ("absorbing", "absorbing_cosine", "uniform"):
        process = DISCRETE[name]
        t = np.asarray([2, 50, 5_000, 9_990], np.float32) / steps
        s = np.asarray([1, 49, 4_999, 9_989], np.float32) / steps
        f = jnp.tile(jax.nn.one_hot(process.states - 1, process.states), (4, 1))
        got = np.asarray(process.pull(f, jnp.asarray(s), jnp.asarray(t)))[:, 0]
        a_t, a_s = keep64(name, t), keep64(name, s)
        np.testing.assert_allclose(got, (1 - a_t / a_s) * process.redraw[-1], rtol=2e-3)


@pytest.mark.slow
def test_markov_equals_the_rank_one_chain_it_describes():
    chain = DISCRETE["mixed"]
    matrices = np.stack([dense("mixed", i / STEPS, (i + 1) / STEPS) for i in range(STEPS)])
    markov = Markov(matrices, classes=4)
    s, t, xt = rows(chain, PAIRS)
    beliefs = random_beliefs(chain, len(xt), sparse=False)
    np.testing.assert_allclose(markov.posterior(xt, beliefs, t, s), chain.posterior(xt, beliefs, t, s), atol=3e-6)
    x0 = jnp.asarray(np.arange(len(xt)) % 4)
    np.testing.assert_allclose(markov.kl(Noised(x0, xt, t), beliefs, s), chain.kl(Noised(x0, xt, t), beliefs, s), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(markov.corrupt(keys(len(t)), x0, t).xt, chain.corrupt(keys(len(t)), x0, t).xt)


@pytest.mark.slow
def test_a_markov_chain_s_rate_is_its_last_step():
    process = DISCRETE["banded"]
    x0, t = jnp.asarray([0, 1, 2]), jnp.asarray([0.25, 0.5, 0.125])
    noised = process.corrupt(keys(3), x0, t)
    beliefs = random_beliefs(process, 3, sparse=False)
    np.testing.assert_allclose(process.elbo_rate(noised, beliefs), STEPS * process.kl(noised, beliefs, t - 1 / STEPS), rtol=1e-6)


def test_bad_chains_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        processes.Categorical((0.5, 0.4))
    with pytest.raises(ValueError, match="do not fit"):
        processes.Categorical((0.5, 0.5), classes=3)
    with pytest.raises(ValueError, match="mask probability"):
        processes.mixed(3, 1.5)
    with pytest.raises(ValueError, match=r"shape \[T, S, S\]"):
        Markov(np.eye(3))
    with pytest.raises(ValueError, match="probability distribution"):
        Markov(np.ones((2, 3, 3)))
    with pytest.raises(ValueError, match="no mask state"):
        processes.uniform(3).mask
    with pytest.raises(ValueError, match="alpha \\+ sigma = 1"):
        processes.absorbing(3, schedules.cosine())
    assert processes.absorbing(3).mask == 3


# ------------------------------------------------------------------------------------------------------------ rare outcomes


MANY = [(2048, 256, 1000, 0.6, 0.58)]
MORE = [
    (2048, 1024, 80, 1.0, 0.5), (16384, 128, 80, 1.0, 0.5), (16384, 128, 1000, 0.6, 0.58), (50257, 64, 80, 1.0, 0.5),
    (50257, 64, 1000, 0.6, 0.58)]


@pytest.mark.parametrize("classes, tokens, steps, first, last", [*MANY, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)])
def test_tokens_of_a_large_vocabulary_are_unmasked_in_time(classes, tokens, steps, first, last):
    """A belief that is flat gives every class less than 1e-6 a step: the share that is still masked is `last / first` all the same."""
    process, count = processes.absorbing(classes), round((first - last) * steps)
    belief = jnp.full((4, tokens, classes), 1.0 / classes)

    @jax.jit
    def run(k):
        def body(xt, i):
            t = jnp.full(4, first) - i / steps
            return process.step(fold(k, i), xt, belief, t, t - 1.0 / steps), None

        return jax.lax.scan(body, jnp.full((4, tokens), process.mask), jnp.arange(count))[0]

    xt = np.asarray(run(keys(4)))
    share, expected = (xt == process.mask).mean(), last / first
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / xt.size), (share, expected)
    assert 0.4 < xt[xt < classes].mean() / classes < 0.6 or (xt < classes).sum() < 100


def test_a_thousandth_of_a_chain_over_50257_classes():
    process = processes.absorbing(50257)
    belief, one = jnp.full((1, 256, 50257), 1.0 / 50257), jnp.ones(1)
    run = jax.jit(lambda k: jax.lax.map(lambda key: process.step(key[None], jnp.full((1, 256), 50257), belief, one, one - 1e-3), k))
    unmasked = int((run(keys(48)) < 50257).sum())
    assert 0 < unmasked < 12.3 + 4 * 12.3**0.5


@pytest.mark.slow
def test_rare_classes_are_sampled_as_often_as_they_should():
    """40 among a million, 1e-9 each (a number of 23 bits finds none below 1e-8), and one that is left with 4e-5."""
    rare = jnp.full(40_000, 1e-9).at[17].set(1.0)
    sampled = jax.jit(lambda key: class_sampling.descend(key, class_sampling.tree_of_sums(rare), (1_000_000,)))(jax.random.key(0))
    assert abs(int((sampled != 17).sum()) - 40) < 4 * 40**0.5
    assert np.std(sampled[sampled != 17]) > 5000


@pytest.mark.parametrize("chance", [0.3, 1e-5, 2e-10, 3e-15])
def test_a_chance_has_the_resolution_of_64_bits(chance):
    for side in (chance, 1 - chance):  # of the first or, rare in its turn, of the second
        a, b = (jnp.float32(chance), jnp.float32(1.0)) if side == chance else (jnp.float32(1.0), jnp.float32(chance))
        for factor in (0.999, 1.001):
            number = int(factor * chance / (1 + chance) * 2.0**64)  # what the 64 bits say, near 0 or near 1
            number = number if side == chance else 2**64 - 1 - number
            words = jnp.asarray([number >> 32, number & 0xFFFFFFFF], jnp.uint32)
            assert bool(class_sampling._chance(words, a, b)) == ((factor < 1) == (side == chance))
    ends = jnp.asarray([[0, 0], [0xFFFFFFFF, 0xFFFFFFFF]], jnp.uint32)
    one, none = jnp.float32(1), jnp.float32(0)
    assert [bool(class_sampling._chance(words, *pair)) for words in ends for pair in ((one, none), (none, one))] == [True, False] * 2


def test_an_impossible_class_is_never_sampled():
    for size in (1, 3, 100):
        weights = jnp.zeros(size).at[size // 2].set(1e-3)
        sampled = class_sampling.descend(jax.random.key(1), class_sampling.tree_of_sums(weights), (200,))
        np.testing.assert_array_equal(sampled, np.full(200, size // 2))
    weights = jnp.asarray([0.1, 0.0, 0.2, 0.4, 0.3])
    sampled = np.asarray(class_sampling.sample_classes(jax.random.key(2), jnp.tile(weights, (40_000, 1))))
    np.testing.assert_allclose(np.bincount(sampled, minlength=5) / 40_000, weights, atol=4 * 0.5 / 200)
    assert (sampled != 1).all()
