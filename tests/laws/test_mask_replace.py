"""VQ-Diffusion's chain against its published numbers, its closed forms and dense float64 matrices, and its trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import dense_mask_replace, keys
from tiers import some

from mmdiff import losses, sampling, schedules, times
from mmdiff.processes import Given, Joint, MaskReplace, Noised, fold

K, T = 12, 80
PRESETS = {"released": schedules.vqd_released, "paper": schedules.vqd_paper}
PROCESSES = {name: MaskReplace(K, preset(T)) for name, preset in PRESETS.items()}
EVERY = pytest.mark.parametrize("name", PROCESSES)
DATA = np.random.default_rng(3).dirichlet(np.ones(K))


@functools.cache
def jitted(name, method):
    return jax.jit(getattr(PROCESSES[name], method))


# t T -> kept, masked, replaced so far; then kept, masked, replaced in the step to t (CDCD's released code with T = 80).
RELEASED = {
    1: (0.999990000, 0.000009000, 1e-6, 0.999990000, 0.000009000, 1.000e-6),
    2: (0.987332013, 0.012666987, 1e-6, 0.987341886, 0.012658101, 1.266e-8),
    8: (0.911384089, 0.088614911, 1e-6, 0.986301503, 0.013698482, 1.482e-8),
    40: (0.506328494, 0.493670506, 1e-6, 0.975610179, 0.024389774, 4.700e-8),
    79: (0.012666987, 0.987332013, 1e-6, 0.500177690, 0.499802574, 1.974e-5),
    80: (0.000009000, 0.999990000, 1e-6, 0.000710508, 0.999210609, 7.888e-5),
}


def one_step(rows, i):
    """(alpha, gamma, K beta) of step i in float64."""
    (kept, _, masked), (kept_s, _, masked_s) = rows[i], rows[i - 1]
    alpha, gamma = kept / kept_s, 1 - (1 - masked) / (1 - masked_s)
    return alpha, gamma, 1 - alpha - gamma


def test_the_released_table():
    rows = schedules.vqd_released(T).rows
    for i, (kept, masked, replaced, alpha, gamma, beta) in RELEASED.items():
        np.testing.assert_allclose(rows[i], (kept, replaced, masked), atol=1e-9)
        np.testing.assert_allclose(one_step(rows, i)[:2], (alpha, gamma), atol=1e-9)
        np.testing.assert_allclose(one_step(rows, i)[2], beta, rtol=1e-3)
    np.testing.assert_allclose(schedules.vqd_released(100).rows[10, [0, 2]], (0.909082636, 0.090916364), atol=1e-9)


def test_the_paper_s_table_is_linear():
    share = np.arange(T + 1) / T
    np.testing.assert_allclose(schedules.vqd_paper(T).rows, np.stack([1 - share, 0.1 * share, 0.9 * share], 1), atol=1e-15)


@EVERY
@pytest.mark.parametrize("steps", [10, 80, 1000])
def test_tables_are_chains_and_exact_on_their_nodes(name, steps):
    schedule = PRESETS[name](steps)
    rows, i = schedule.rows, np.arange(steps + 1)
    np.testing.assert_array_equal(rows[0], (1, 0, 0))
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-15)
    each = np.asarray([one_step(rows, j) for j in i[2:-1]])
    assert (each > 0).all() and (each < 1).all()
    for t in ((i / steps).astype(np.float32), 1 - (steps - i).astype(np.float32) / np.float32(steps)):
        np.testing.assert_array_equal(np.stack(schedule(t), 1), rows.astype(np.float32))
    between = np.stack(schedule(jnp.asarray([0.3, 0.8]) / steps), 1)
    np.testing.assert_allclose(between, rows[0] + np.asarray([[0.3], [0.8]]) * (rows[1] - rows[0]), rtol=1e-5)


@EVERY
def test_every_pair_of_times_keeps_its_digits(name):
    """push from s to t against the product of the steps' matrices, entry by entry, in relative terms."""
    pairs = np.asarray([(0, 1), (1, 2), (0, 79), (7, 8), (30, 55), (39, 40), (78, 79), (79, 80), (2, 80)]) / T
    eye, (s, t) = np.tile(np.eye(K + 1, dtype=np.float32), (9, 1, 1)), pairs.T.astype(np.float32)
    exact = np.stack([dense_mask_replace(PROCESSES[name], *pair) for pair in pairs])
    pushed = jitted(name, "push")(eye, s, t)
    np.testing.assert_allclose(pushed, exact, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(jitted(name, "pull")(eye, s, t), exact.swapaxes(1, 2), rtol=2e-5, atol=1e-12)
    np.testing.assert_array_equal(pushed[:, K], eye[:, K])  # a mask stays


def closed_form(rows, i, xt, x0):
    """q(x_{(i-1)/T} | x_{i/T}, x_0), in the cases of the VQ-Diffusion posterior, float64."""
    (kept, replaced, masked), (kept_s, replaced_s, masked_s) = rows[i], rows[i - 1]
    alpha, gamma, beta = one_step(rows, i)
    is_x0 = np.arange(K) == x0
    if xt == K:
        return np.append(gamma * (kept_s * is_x0 + replaced_s / K), masked_s) / masked
    forward = alpha * (np.arange(K) == xt) + beta / K
    return np.append(forward * (kept_s * is_x0 + replaced_s / K) / (kept * (xt == x0) + replaced / K), 0)


@EVERY
def test_posterior_has_the_closed_form(name):
    """A masked token, one that is right and one that is wrong, at t = 1/T, 2/T, the middle and both ends."""
    process = PROCESSES[name]
    cases = [(i, xt, 3) for i in (1, 2, 40, 79, 80) for xt in (K, 3, 5)]
    i, xt, x0 = (np.asarray(c) for c in zip(*cases))
    t, s = ((c / T).astype(np.float32) for c in (i, i - 1))
    got = jitted(name, "posterior")(xt, np.eye(K, dtype=np.float32)[x0], t, s)
    for row, case in zip(np.asarray(got), cases):
        np.testing.assert_allclose(row, closed_form(process.schedule.rows, *case), atol=1e-6)
        to, last = dense_mask_replace(process, 0, (case[0] - 1) / T), dense_mask_replace(process, (case[0] - 1) / T, case[0] / T)
        bayes = to[case[2]] * last[:, case[1]]
        np.testing.assert_allclose(row, bayes / bayes.sum(), atol=1e-6)


@EVERY
def test_a_belief_gives_the_mixture_of_the_posteriors(name):
    belief = np.random.default_rng(0).dirichlet(np.ones(K)).astype(np.float32)
    i, beliefs = np.asarray([1, 2, 40, 80]), np.concatenate([belief[None], np.eye(K, dtype=np.float32)])
    xt = np.broadcast_to(np.arange(K + 1, dtype=np.int32), (4, K + 1, K + 1))
    t, s = ((c / T).astype(np.float32) for c in (i, i - 1))
    # [times, beliefs, x_t, x_s]
    laws = np.asarray(jitted(name, "posterior")(xt, np.broadcast_to(beliefs[:, None], (4, K + 1, K + 1, K)), t, s))
    mixed, each = laws[:, 0], laws[:, 1:]
    np.testing.assert_allclose(mixed, np.einsum("k,tkxy->txy", belief, each), atol=1e-6)
    np.testing.assert_allclose(laws.sum(-1), 1, atol=1e-5)
    assert not laws[:, :, :K, K].any()  # a token does not turn into a mask on the way back
    np.testing.assert_allclose(mixed[0, :, :K], np.tile(belief, (K + 1, 1)), atol=1e-6)  # the last step draws from the belief


@EVERY
def test_corruption_is_a_fair_draw(name):
    """Chi-square over the K + 1 states; 40 is exceeded once in ten thousand."""
    count, t = 20_000, 40 / T
    corrupt, k, x0, at = jitted(name, "corrupt"), keys(200), np.full((200, 100), 3, np.int32), np.full(200, t, np.float32)
    xt = np.asarray(corrupt(k, x0, at).xt)
    expected = count * dense_mask_replace(PROCESSES[name], 0, t)[3]
    observed = np.bincount(xt.ravel(), minlength=K + 1)
    if name == "released":  # together the replaced ones are less than one
        expected, observed = (np.asarray([c[3], c[K], c.sum() - c[3] - c[K]]) + [0, 0, 1] for c in (expected, observed))
    assert ((observed - expected) ** 2 / expected).sum() < 40
    np.testing.assert_array_equal(corrupt(k[::-1], x0, at).xt, xt[::-1])  # an example has its own key


def test_the_prior_is_what_nothing_is_kept_of():
    np.testing.assert_allclose(PROCESSES["paper"].stationary, [*[0.1 / K] * K, 0.9], rtol=1e-12)
    np.testing.assert_allclose(PROCESSES["released"].stationary, [*[1e-6 / 0.999991 / K] * K, 0.99999 / 0.999991], rtol=1e-9)
    assert (PROCESSES["released"].prior(keys(50), (64,)) == K).all()


# ------------------------------------------------------------------------------------------------------------------- losses


def rows_of_every_kind():
    """x_t all masked, right and wrong, at the first, second, middle and last time: [12, 3] tokens."""
    x0 = jnp.tile(jnp.asarray([0, 3, 7]), (12, 1))
    xt = jnp.concatenate([jnp.full((4, 3), K), x0[:4], (x0[:4] + 2) % K])
    return Noised(x0, xt, jnp.tile(jnp.asarray([1, 2, 40, T]) / T, 3).astype(jnp.float32))


def terms_of(process):
    return {
        "own": process.loss,
        "vlb": lambda out, noised: losses.vlb(process, T)(out, noised) / T,
        "x0_ce": losses.x0_ce(process),
        "negative": lambda out, noised: losses.vlb(process, T)(out, process.with_x0(noised, (noised.x0 + 5) % K)) / T,
    }


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_finite_and_bounded_for_any_logits(name, dtype):
    """No term's gradient in a position's logits exceeds that of a cross-entropy, 1 (here over 3 positions, a third)."""
    process, noised = PROCESSES[name], rows_of_every_kind()

    @jax.jit
    def measure(out):
        def total(out):
            values = {term: function(out, noised) for term, function in terms_of(process).items()}
            return sum(value.sum() for value in values.values()), values

        gradients = {term: jax.grad(lambda o, f=function: f(o, noised).sum())(out) for term, function in terms_of(process).items()}
        return total(out)[1], gradients

    truth, other = jax.nn.one_hot(noised.x0, K), jax.nn.one_hot((noised.x0 + 5) % K, K)
    random = jax.random.normal(jax.random.key(0), truth.shape)
    for out in (0 * truth, 1e4 * truth, -1e4 * truth, 1e4 * other, -1e4 * other, 1e4 * random, 90 * random, 3 * random):
        values, gradients = measure(out.astype(dtype))
        for term in values:
            assert values[term].dtype == jnp.float32 and gradients[term].dtype == dtype
            assert np.isfinite(values[term]).all() and (np.asarray(values[term]) >= -1e-5).all(), term
            assert float(jnp.abs(gradients[term]).max()) <= 0.34, term
            assert term == "own" or float(values[term].max()) <= 70.01, term
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_a_certain_network_teaches_nothing_about_a_negative():
    """Log-probabilities end at -70: there the decoder's term is 70 nats, without a gradient; a little above it has one."""
    process = PROCESSES["released"]
    noised = Noised(jnp.asarray([[5]]), jnp.asarray([[3]]), jnp.asarray([1 / T]))
    for term in (lambda o, n: losses.vlb(process, T)(o, n) / T, losses.x0_ce(process)):
        at = jax.value_and_grad(lambda height, term=term: term(height * jax.nn.one_hot(jnp.asarray([[3]]), K), noised)[0])
        values, slopes = jax.jit(jax.vmap(at))(jnp.asarray([200.0, 60.0]))
        np.testing.assert_allclose(values, [70, 60], rtol=1e-5)
        np.testing.assert_allclose(slopes, [0, 1], rtol=1e-4)


@EVERY
def test_the_bound_telescopes_to_the_entropy_of_the_data(name):
    """L_T + sum_t L_t with the exact posterior is the entropy of the data; with any other model it is more."""
    process = PROCESSES[name]
    to = np.stack([dense_mask_replace(process, 0, i / T)[:K] for i in range(1, T + 1)])  # [T, x0, xt]
    i, x0, xt = (jnp.asarray(a.ravel()) for a in np.meshgrid(np.arange(T), np.arange(K), np.arange(K + 1), indexing="ij"))
    term = jax.jit(losses.vlb(process, T))

    def bound(data):
        """The expected bound over DATA of the model that is exact for `data`."""
        belief = data[:, None] * to / (data[:, None] * to).sum(1, keepdims=True)
        out = jnp.log(jnp.asarray(belief.swapaxes(1, 2), jnp.float32))[i, xt]
        each = np.asarray(term(out, Noised(x0, xt, (i + 1) / jnp.float32(T))), np.float64).reshape(to.shape) / T
        end = (to[-1] * np.log(to[-1] / (data @ to[-1]))).sum(1)
        return DATA @ (end + (to * each).sum((0, 2)))

    entropy = -(DATA * np.log(DATA)).sum()
    np.testing.assert_allclose(bound(DATA), entropy, atol=2e-5)
    np.testing.assert_allclose(bound(DATA[::-1]), -(DATA * np.log(DATA[::-1])).sum(), atol=5e-5)
    assert bound(DATA[::-1]) > entropy + 0.1


def test_a_masked_position_costs_its_share_of_the_cross_entropy():
    """omega_t (-log p(x_0)), omega_t = (C_t - C_{t-1}) / C_t, about 1 / (t T - 1), for the released schedule."""
    process = PROCESSES["released"]
    i = np.asarray([2, 10, 40, 79])
    masked = process.schedule.rows[:, 2]
    omega = (masked[i] - masked[i - 1]) / masked[i]
    np.testing.assert_allclose(omega, 1 / (i - 1), rtol=2e-3)
    noised = Noised(jnp.full((4, 3), 3), jnp.full((4, 3), K), jnp.asarray(i / T, jnp.float32))
    out = jax.random.normal(jax.random.key(0), (4, 3, K))
    bound, plain = jax.jit(lambda out, noised: (losses.vlb(process, T)(out, noised), losses.x0_ce(process)(out, noised)))(out, noised)
    np.testing.assert_allclose(bound / T, omega * plain, rtol=5e-4)


@pytest.mark.slow
def test_the_whole_loss_is_the_published_one():
    """1/(B L) sum_b T (l_t + lambda a(t) l^x0_t), with the sums over positions from dense float64 matrices."""
    process, weight, count, length = PROCESSES["paper"], 5e-4, 16, 3
    logits = np.asarray(jax.random.normal(jax.random.key(1), (count, length, K)), np.float64)
    batch = {"x0": jnp.arange(count * length).reshape(count, length) % K, "index": jnp.arange(count)}
    seen = []

    def spy(out, noised):
        seen.append(noised)
        return jnp.zeros(count)

    terms = {
        "vlb": (1.0, losses.vlb(process, T)), "aux": (weight * T, losses.auxiliary(process, T)), "spy": (0.0, spy),
    }
    loss = losses.diffusion(process, lambda params, x, t: jnp.asarray(logits, jnp.float32), times.on_grid(T), terms)
    run = jax.jit(lambda key: (loss(None, batch, key)[0], seen[0].t, seen[0].xt))
    value, t, xt = (np.asarray(x) for x in run(jax.random.key(0)))
    total, log_p = 0.0, logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for b in range(count):
        i = round(float(t[b]) * T)
        before, step = dense_mask_replace(process, 0, (i - 1) / T)[:K], dense_mask_replace(process, (i - 1) / T, i / T)
        for n in range(length):
            x0, back = int(batch["x0"][b, n]), step[:, xt[b, n]]
            posterior = before * back / (before @ back)[:, None]  # [x0, xs]
            q, p = posterior[x0], np.exp(log_p[b, n]) @ posterior
            bound = -np.log(p[x0]) if i == 1 else (q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum()
            total += T * (bound - weight * (2 - (i - 1) / T) * log_p[b, n, x0])
    np.testing.assert_allclose(value, total / (count * length), rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- sampling


@functools.cache
def stepping(process):
    return jax.jit(lambda k, i, xt, x0, t, s: process.step(fold(k, i), xt, x0, t, s))


def trajectory(process, grid, *transforms, count=200, length=100):
    """-> (x_0, [(t T, share of masks)] at every network call), for a network that knows nothing."""
    k, xt, seen = keys(count), jnp.full((count, length), process.mask), {}
    x0 = jnp.full((count, length, process.classes), 1 / process.classes)
    for i, (t, s) in enumerate(np.lib.stride_tricks.sliding_window_view(np.asarray(grid), 2)):
        seen[round(float(t) * process.schedule.steps)] = float((xt == process.mask).mean())
        t, s = (jnp.full(count, u) for u in (t, s))
        state = sampling.SamplerState(xt=xt, t=t, s=s, x0=x0, last_x0=x0, last_t=t, x0_for_history=x0, keys=k)
        for transform in transforms:
            state = transform(state)
        xt = stepping(process)(k, i, xt, state.x0, state.t, state.s)
    return np.asarray(xt), seen


CHAINS = {steps: MaskReplace(4, schedules.vqd_released(steps)) for steps in (80, 100)}


def test_ancestral_sampling_unmasks_as_the_schedule_says():
    out, seen = trajectory(CHAINS[T], sampling.uniform_grid(T))
    assert list(seen) == list(range(T, 0, -1)) and ((out >= 0) & (out < 4)).all()  # T calls, and no mask is left
    np.testing.assert_allclose(list(seen.values()), CHAINS[T].schedule.rows[:0:-1, 2], atol=0.015)


# (T, skip): network calls, the time about half way, masks there by the released and the exact rule, masks that the last call finds
STRIDES = {
    (100, 1): (51, 50, 0.702, 0.495, 7e-5),
    (100, 3): (26, 48, 0.827, 0.475, 0.245),
    (100, 9): (11, 50, 0.928, 0.495, 0.664),
    (80, 1): (41, 40, 0.700, 0.494, 6e-5),
    (80, 3): (21, 40, 0.834, 0.494, 0.259),
}


@pytest.mark.parametrize("steps, skip", some(STRIDES, (100, 9), (80, 3)))
def test_exact_and_released_strides(steps, skip):
    process = CHAINS[steps]
    calls, half, released, exact, last = STRIDES[steps, skip]
    grid, stride = sampling.released_stride(steps, skip)
    out, seen = trajectory(process, grid, stride)
    assert len(seen) == calls and (out < 4).all()
    np.testing.assert_allclose([seen[half], seen[1]], [released, last], atol=0.012)
    np.testing.assert_allclose(process.schedule.rows[half, 2], exact, atol=6e-4)
    if skip == 9:
        out, seen = trajectory(process, sampling.uniform_grid(steps // (skip + 1)))
        assert list(seen) == list(range(100, 0, -10)) and (out < 4).all()
        np.testing.assert_allclose(list(seen.values()), process.schedule.rows[list(seen), 2], atol=0.015)


def test_a_released_stride_touches_one_modality_and_nothing_that_is_held():
    process = Joint(tokens=MaskReplace(4, schedules.vqd_released(8)), label=Given(null=9))
    grid, stride = sampling.released_stride(8, 3)

    def apply(params, x, t):
        return {"tokens": 50 * jax.nn.one_hot(jnp.broadcast_to(x["label"][:, None] % 4, x["tokens"].shape), 4)}

    shape, label = {"tokens": (6,), "label": ()}, jnp.asarray([3, 1])

    def draw(grid, transforms, **options):
        run = lambda k: sampling.sample(process, apply, None, k, grid, shape, transforms=transforms, given={"label": label}, **options)  # noqa: E731
        return jax.jit(run)(keys(2))["tokens"]

    stride = sampling.only("tokens", stride)
    np.testing.assert_array_equal(draw(grid, [stride]), np.tile(label[:, None], (1, 6)))
    np.testing.assert_array_equal(draw(grid, [stride], absent=("tokens",)), np.full((2, 6), 4))
    # A released stride of one step is the chain's own.
    grid, stride = sampling.released_stride(8, 0)
    np.testing.assert_array_equal(draw(grid, [sampling.only("tokens", stride)]), draw(sampling.uniform_grid(8), []))
    for skip in (-1, 8):
        with pytest.raises(ValueError, match="0 <= skip < steps"):
            sampling.released_stride(8, skip)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_confidence_unmasks_as_many_as_the_schedule_says(name):
    process = MaskReplace(4, PRESETS[name](8))
    out, seen = trajectory(process, sampling.uniform_grid(8), sampling.confidence(process), count=20, length=40)
    assert ((out >= 0) & (out < 4)).all()
    expected = np.floor(40 * process.schedule.rows[[7, 6, 5, 4, 3, 2, 1], 2] + 1e-4) / 40
    np.testing.assert_allclose(list(seen.values())[1:], expected, atol=1e-6 if name == "released" else 0.02)


def test_truncation_keeps_the_smallest_set_and_any_scale():
    rng = np.random.default_rng(0)
    belief = jnp.asarray(rng.dirichlet(np.ones(K), 30), jnp.float32)
    t, s, xt = jnp.full(30, 0.5), jnp.full(30, 0.25), jnp.asarray(rng.integers(0, K + 1, 30))
    state = sampling.SamplerState(xt=xt, t=t, s=s, x0=belief, last_x0=belief, last_t=t, x0_for_history=belief, keys=keys(30))
    for r in (0.3, 0.86, 0.999):
        kept = np.asarray(sampling.top_p(r)(state).x0) > 0
        mass = np.where(kept, belief, 0).sum(-1)
        assert (mass >= r - 1e-6).all() and (mass - np.where(kept, belief, 2).min(-1) < r + 1e-6).all()  # and without its least, less
        assert (np.where(kept, belief, 2).min(-1) >= np.where(kept, 0, belief).max(-1)).all()
    np.testing.assert_allclose(sampling.top_p(1.0)(state).x0, belief, atol=1e-6)
    np.testing.assert_allclose(sampling.top_p(0.0)(state).x0, np.eye(K)[belief.argmax(-1)], atol=1e-6)
    # The draw does not care whether a truncated belief is normalised.
    step = jitted("paper", "step")
    np.testing.assert_array_equal(step(keys(30), xt, 0.125 * belief, t, s), step(keys(30), xt, belief, t, s))


@pytest.mark.slow
def test_generation_starts_from_masks_alone():
    """Nothing of the data can reach a draw: the first call sees masks, and tokens enter only as `given`, bit for bit."""
    process = Joint(tokens=MaskReplace(4, schedules.vqd_released(8)), label=Given(null=9))
    shape, first = {"tokens": (6,), "label": ()}, []

    def apply(params, x, t):
        jax.debug.callback(lambda x, t: first.append((t[0].item(), x)), x["tokens"], t["tokens"])
        return {"tokens": jnp.cos(x["tokens"][..., None] + jnp.arange(4.0))}

    sampler = sampling.make_sampler(process, apply, shape, drop=("label",))
    draw = jax.jit(lambda k, given: sampler(None, k, given, steps=4, guidance=1.0))
    out = draw(keys(5), {"label": jnp.arange(5)})
    jax.effects_barrier()
    assert (dict(first)[1.0] == 4).all() and (out["tokens"] < 4).all()
    truth = jnp.arange(30).reshape(5, 6) % 4
    np.testing.assert_array_equal(draw(keys(5), {"tokens": truth})["tokens"], truth)


def test_bad_tables_and_chains_are_refused():
    with pytest.raises(ValueError, match="at least two steps"):
        schedules.vqd_paper(1)
    for rows in (np.ones((3, 2)), np.ones((1, 3)), [[0.5, 0.5, 0], [0, 1, 0]]):
        with pytest.raises(ValueError, match=r"is \[T \+ 1, 3\] and starts with"):
            schedules.ReplaceTable(np.asarray(rows))
    with pytest.raises(ValueError, match="probability distribution"):
        schedules.mask_replace(4, kept=(0.9, 0.0), masked=(0.2, 0.9))
    for rows in ([[1, 0, 0], [0.5, 0, 0.5], [0.6, 0, 0.4]], [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.2, 0.3]]):
        with pytest.raises(ValueError, match="no chain"):
            schedules.ReplaceTable(np.asarray(rows))
    with pytest.raises(ValueError, match="at least one class"):
        MaskReplace(0, schedules.vqd_paper(4))
    with pytest.raises(ValueError, match=r"such as schedules.vqd_released\(steps\)"):
        MaskReplace(4, schedules.flow())
    assert MaskReplace(4, schedules.vqd_paper(4)).mask == 4


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [schedules.vqd_released(8), schedules.vqd_paper(8)])
def test_the_short_kl_is_the_sum_over_all_states(schedule):
    """Masked tokens, tokens that kept x_0 and tokens that did not; the first step, one between, the last; and a longer stride."""
    process, rng = MaskReplace(5, schedule), np.random.default_rng(0)
    t = jnp.repeat(jnp.array([1, 3, 8, 8]) / 8.0, 36)
    s = jnp.repeat(jnp.array([0, 2, 7, 2]) / 8.0, 36)
    x0 = jnp.asarray(rng.integers(0, 5, (144, 6)))
    xt = jnp.asarray(rng.integers(0, 6, (144, 6)))
    xt = jnp.where(jnp.asarray(rng.random((144, 6)) < 0.3), x0, xt)
    out = jnp.asarray(rng.normal(size=(144, 6, 5)) * 3, jnp.float32)
    noised = Noised(x0=x0, xt=xt, t=t)

    def value(kl):
        def total(out):
            nats = kl(noised, process.clean(out, xt, t), s)
            return nats.sum(), nats

        return jax.value_and_grad(total, has_aux=True)(out)

    (_, short), gradient = value(process.kl)
    (_, long), wanted = value(lambda *arguments: super(MaskReplace, process).kl(*arguments))
    np.testing.assert_allclose(short, long, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-4)


def test_evidence_is_bayes_rule_with_the_network_as_prior():
    schedule = schedules.vqd_paper(8)
    process, t = MaskReplace(4, schedule, evidence=True), jnp.full(5, 3 / 8)
    xt = jnp.arange(5)[:, None]  # every class, and the mask
    out = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1, 4)), jnp.float32)
    marginal = dense_mask_replace(process, 0, 3 / 8)[:4]  # q(x_t | x_0), rows x_0
    prior = np.exp(out) / np.exp(out).sum(-1, keepdims=True)
    wanted = prior * marginal[:, np.arange(5)].T[:, None]
    np.testing.assert_allclose(process.clean(out, xt, t), wanted / wanted.sum(-1, keepdims=True), rtol=1e-5)
    # The cross-entropy is that of the same belief, and the published form takes the logits as they are.
    noised = Noised(x0=jnp.zeros((5, 1), jnp.int32), xt=xt, t=t)
    np.testing.assert_allclose(losses.x0_ce(process)(out, noised), -np.log(process.clean(out, xt, t)[:, 0, 0]), rtol=1e-5)
    np.testing.assert_allclose(MaskReplace(4, schedule).clean(out, xt, t), prior, rtol=1e-5)
