"""Contrast: its forms and negatives against their formulas, and what it must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import integers, normal, uniform

from mmdiff import losses, processes, schedules, times
from mmdiff.contrastive import cdcd, contrast, infonce, inter, intra, linear, resampled_negatives, shifted, table, time_weighted, weighted
from mmdiff.errors import UserError
from mmdiff.processes import Gaussian, Given, Joint, MaskReplace, Noised, absorbing

T, K, L, B, N = 8, 5, 16, 6, 3
TOKENS = MaskReplace(K, schedules.vqd_paper(T))
X0 = integers(0, (B, L), 0, K)
OUT = normal(1, (B, L, K))
Z = integers(2, (N, B, L), 0, K)
LABEL = jnp.asarray([0, 1, 2, 0, 1, 2])
INDEX = np.arange(B, dtype=np.uint32)
GRID = np.float32((np.arange(B) % T + 1.0) / T)  # the first step, 1 / T, among others
BATCH = {"tokens": X0, "label": LABEL, "index": INDEX, "negatives": np.moveaxis(Z, 0, 1)}
MODES = {"step": losses.vlb(TOKENS, T), "sample": losses.x0_ce(TOKENS)}
XT = jnp.where(np.abs(uniform(3, (B, L))) < GRID[:, None], integers(4, (B, L), 0, K + 1), X0)  # the more changed the later
NOISED = Noised(X0, XT, GRID, batch=BATCH, key=jax.random.key(4))
MASKED = NOISED.replace(xt=jnp.full((B, L), K))


def run(term, noised=NOISED, out=OUT):
    return jax.jit(term)(out, noised)


def gradient(term, noised=NOISED, out=OUT):
    return jax.jit(jax.grad(lambda out, noised: term(out, noised).sum()))(out, noised)


def network(params, x, t):
    """Every token's logits from itself, its neighbours and the label."""
    seen = jax.nn.one_hot(x["tokens"], K + 1)
    label = jnp.broadcast_to(jax.nn.one_hot(x["label"], 4)[:, None], (*seen.shape[:2], 4))
    return {"tokens": jnp.concatenate([seen, jnp.roll(seen, 1, axis=1), label], -1) @ params["w"]}


PROCESS = Joint(tokens=TOKENS, label=Given(null=3))
TIMES = times.joint(tokens=times.on_grid(T), label=times.constant(0.0))
PARAMS = {"w": normal(5, (2 * (K + 1) + 4, K))}


def loss_of(**terms):
    """The VLB and the given (weight, term of the tokens)."""
    terms = {name: (weight, losses.on("tokens", term)) for name, (weight, term) in terms.items()}
    return losses.diffusion(PROCESS, network, TIMES, {"vlb": (1.0, losses.on("tokens", MODES["step"]))} | terms)


# --------------------------------------------------------------------------------------------------------- the linear form


@pytest.mark.slow
def test_without_weight_or_negatives_nothing_changes():
    def value_and_grad(**terms):
        loss = loss_of(**terms)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, BATCH, jax.random.key(0))[0]))(PARAMS)

    def same(a, b):
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))

    base = value_and_grad()
    full = {mode: contrast(TOKENS, term, table("negatives")) for mode, term in MODES.items()}
    none = {mode: contrast(TOKENS, time_weighted(term, T), lambda noised: Z[:0]) for mode, term in MODES.items()}
    assert same(value_and_grad(**{mode: (0.0, term) for mode, term in full.items()}), base)
    assert same(value_and_grad(**{mode: (0.5, term) for mode, term in none.items()}), base)
    assert not same(value_and_grad(**{mode: (1e-3, term) for mode, term in full.items()}), base)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_negative_that_is_the_positive_takes_it_back(mode):
    same = lambda noised: jnp.stack([noised.x0] * N)  # noqa: E731
    value, positive = run(contrast(TOKENS, time_weighted(MODES[mode], T), same)), run(MODES[mode])
    w = 1 + (np.arange(B) % T) / T
    np.testing.assert_allclose(value, -w * positive, rtol=1e-5)
    # So a weight of lambda leaves (1 - lambda w) of the term.
    np.testing.assert_allclose(positive + 0.25 * value, (1 - 0.25 * w) * positive, rtol=1e-5)


def test_the_weight_over_time():
    noised = Noised(X0[:2], X0[:2], jnp.asarray([1 / T, 1.0]))
    np.testing.assert_allclose(time_weighted(lambda out, noised: jnp.ones(2), T)(None, noised), [1.0, 2 - 1 / T])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_are_those_of_each_negative(mode):
    term = MODES[mode]
    contrasted = contrast(TOKENS, term, table("negatives"))
    alone = [Noised(z, XT, GRID) for z in Z]  # by hand, without `with_x0`
    np.testing.assert_allclose(run(contrasted), -sum(run(term, noised) for noised in alone) / N, rtol=1e-5)
    np.testing.assert_allclose(gradient(contrasted), -sum(gradient(term, noised) for noised in alone) / N, atol=1e-5)
    # Their order does not matter.
    turned = NOISED.replace(batch=BATCH | {"negatives": BATCH["negatives"][:, ::-1]})
    np.testing.assert_allclose(run(contrasted, turned), run(contrasted), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_small_step_makes_the_negative_less_likely(mode):
    negative = lambda noised: jnp.full((1, B, L), 2)  # noqa: E731
    grad = gradient(contrast(TOKENS, MODES[mode], negative), MASKED.replace(x0=jnp.zeros((B, L), jnp.int32)))
    change = jax.nn.log_softmax(OUT - 1e-2 * grad) - jax.nn.log_softmax(OUT)
    assert float(change[..., 2].max()) < 0
    assert float((change[..., 0] - change[..., 2]).min()) > 0 and float(jnp.abs(change[..., 0]).max()) < 3e-3


def test_the_first_step_is_the_decoder():
    """At t = 1 / T a step's KL is the negative log-likelihood of x_0, here of the negative; step mode counts it T times."""
    step, sample = (run(contrast(TOKENS, MODES[mode], table("negatives")), MASKED.replace(t=jnp.full(B, 1 / T))) for mode in MODES)
    np.testing.assert_allclose(step, T * sample, rtol=1e-4)


def test_sample_mode_is_the_divergence_from_a_one_hot():
    p, one_hot = jax.nn.softmax(OUT), jax.nn.one_hot(Z, K)
    full = (one_hot * (jnp.log(jnp.maximum(one_hot, 1e-30)) - jnp.log(p))).sum((2, 3)) / L
    np.testing.assert_allclose(run(contrast(TOKENS, MODES["sample"], table("negatives"))), -full.mean(0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_reward_is_bounded_and_ends(mode):
    contrasted, bound = contrast(TOKENS, time_weighted(MODES[mode], T), table("negatives")), 2 * 70.01 * (T if mode == "step" else 1)
    grad_and_value = jax.jit(jax.grad(lambda out, noised: (lambda v: (v.sum(), v))(contrasted(out, noised)), has_aux=True))
    for size in (1.0, 50.0, 1e4):
        for xt in (XT, MASKED.xt, X0):
            grad, value = grad_and_value(size * OUT, NOISED.replace(xt=xt))
            assert np.abs(value).max() < bound and np.isfinite(grad).all()
    # Once a negative's log-probability is below -70 nothing is to be gained.
    chain = absorbing(K)
    one = contrast(chain, losses.vlb(chain, T) if mode == "step" else losses.x0_ce(chain), lambda noised: Z[:1])
    for depth, gain in ((60.0, True), (80.0, False)):
        far = -depth * jax.nn.one_hot(Z[0], K)
        assert (float(jnp.abs(gradient(one, MASKED, far)).max()) > 1e-6) == gain, depth


@pytest.mark.slow
def test_the_whole_of_the_released_loss():
    terms = cdcd(TOKENS, T, step_intra=5e-5, sample_inter=5e-6, inter_negatives=table("negatives"), chunks=4)
    assert {name: weight for name, (weight, _) in terms.items()} == {
        "vlb": 1.0, "auxiliary": T * 5e-4, "step_intra": 5e-5, "sample_inter": T * 5e-6}  # fmt: skip
    share, found = np.arange(B) % T / T, {name: run(term) for name, (_, term) in terms.items()}
    np.testing.assert_allclose(found["auxiliary"], (2 - share) * run(MODES["sample"]), rtol=1e-5)
    np.testing.assert_allclose(found["sample_inter"], (1 + share) * run(contrast(TOKENS, MODES["sample"], table("negatives"))), rtol=1e-5)
    np.testing.assert_allclose(found["step_intra"], (1 + share) * run(contrast(TOKENS, MODES["step"], intra(chunks=4))), rtol=1e-5)
    assert set(cdcd(TOKENS, T)) == {"vlb", "auxiliary"}
    with pytest.raises(UserError, match="the condition 'label' is one of a joint pass"):
        cdcd(TOKENS, T, given="label")
    # With another form the scores keep their temperature at all times.
    term = cdcd(TOKENS, T, sample_inter=5e-6, inter_negatives=table("negatives"), form=infonce())["sample_inter"][1]
    np.testing.assert_allclose(run(term), (1 + share) * run(contrast(TOKENS, MODES["sample"], table("negatives"), infonce())), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- the other forms


def scores(seed=0, valid=None):
    values = jax.random.normal(jax.random.key(seed), (N + 1, B))
    return values[0], values[1:], jnp.ones((N, B), bool) if valid is None else valid


@pytest.mark.slow
def test_infonce_and_its_gradient():
    positive, values, valid = scores()
    for temperature in (1.0, 0.3):
        form = infonce(temperature)
        s = -np.concatenate([positive[None], values]) / temperature
        np.testing.assert_allclose(form(positive, values, valid), np.log(np.exp(s).sum(0)) - s[0], rtol=1e-5)
        assert float(form(positive, values, valid).min()) >= 0
        w = np.exp(s) / np.exp(s).sum(0)
        to_positive, to_values = jax.grad(lambda p, v: form(p, v, valid).sum(), argnums=(0, 1))(positive, values)  # noqa: B023
        np.testing.assert_allclose(-temperature * to_positive, w[0] - 1, atol=1e-5)  # by the scores
        np.testing.assert_allclose(-temperature * to_values, w[1:], atol=1e-5)
    equal = infonce()(jnp.full(B, 0.7), jnp.full((N, B), 0.7), valid)
    np.testing.assert_allclose(equal, np.log(N + 1), rtol=1e-6)


def test_the_weighted_form_is_linear_with_weights_that_vanish():
    positive, values, valid = scores()
    w = jax.nn.softmax(-jnp.concatenate([positive[None], values]) / 0.5, axis=0)[1:]
    np.testing.assert_allclose(weighted(0.5)(positive, values, valid), -(w * values).sum(0), rtol=1e-5)
    to_values = jax.grad(lambda v: weighted(0.5)(positive, v, valid).sum())(values)
    np.testing.assert_allclose(to_values, -w, atol=1e-6)  # the weights are constants
    nce = jax.grad(lambda v: infonce(0.5)(positive, v, valid).sum())(values)
    np.testing.assert_allclose(to_values, 0.5 * nce, atol=1e-6)
    # Where the positive's share is nothing and the negatives are equal, it is the linear one.
    equal = jnp.broadcast_to(values[:1], values.shape)
    np.testing.assert_allclose(weighted()(positive + 100.0, equal, valid), linear()(positive, equal, valid), rtol=1e-6)
    # A negative that is hopeless already counts nothing, the linear form's worst case.
    assert float(jnp.abs(jax.grad(lambda v: weighted()(positive, v, valid).sum())(values + 100.0)).max()) < 1e-30


@pytest.mark.parametrize("form", [linear(), weighted(), infonce()])
def test_negatives_that_do_not_exist_count_nothing(form):
    valid = jnp.asarray([[True, True, False, False, True, False], [True, False, True, False, True, False], [True] * 3 + [False] * 3])
    positive, values, _ = scores()
    found = form(positive, jnp.where(valid, values, 1e3), valid)
    for b in range(B):
        left = np.flatnonzero(valid[:, b])
        expected = form(positive[b : b + 1], values[left][:, b : b + 1], jnp.ones((len(left), 1), bool))[0] if len(left) else 0.0
        np.testing.assert_allclose(found[b], expected, rtol=1e-5, atol=1e-7)
    grad = jax.grad(lambda v: form(positive, v, valid).sum())(values)
    assert np.isfinite(grad).all() and not np.asarray(grad)[~np.asarray(valid)].any()


@pytest.mark.slow
def test_infonce_bounds_the_mutual_information():
    rng = np.random.default_rng(0)
    joint = rng.uniform(0.02, 1, (4, 4)) + 3 * np.eye(4)
    joint /= joint.sum()
    z_law, c_law = joint.sum(1), joint.sum(0)
    ratio = np.log(joint / np.outer(z_law, c_law))
    information = (joint * ratio).sum()
    count, bounds = 60_000, []
    pairs = rng.choice(16, count, p=joint.ravel())
    for n in (1, 3, 10, 100):
        z = rng.choice(4, (n, count), p=z_law)
        positive, values = -ratio[pairs // 4, pairs % 4], -ratio[z, pairs % 4]
        value = infonce()(jnp.asarray(positive), jnp.asarray(values), jnp.ones((n, count), bool))
        bounds.append(np.log(n + 1) - float(value.mean()))
        assert bounds[-1] < min(information + 0.01, np.log(n + 1))
    assert bounds == sorted(bounds) and information - bounds[-1] < 0.02 < information - bounds[0]


# -------------------------------------------------------------------------------------------------------------- own chains


@pytest.mark.parametrize("t", [1.0, 1 / T])
def test_resampled_negatives_start_as_the_shared_ones(t):
    """All masked, both are the same; later the network sees z^j in the one case and z_0 in the other."""
    tokens = absorbing(K)
    process, seen = Joint(tokens=tokens, label=Given(null=3)), []
    rule = times.joint(tokens=times.constant(t), label=times.constant(0.0))
    term, on = losses.vlb(tokens, T), losses.on

    def spy(positive, values, valid):
        seen.append((positive, values))
        return linear()(positive, values, valid)

    @jax.jit
    def evaluate(params):
        terms = {"": (1.0, on("tokens", contrast(tokens, term, table("negatives"), spy)))}
        losses.diffusion(process, network, rule, terms)(params, BATCH, jax.random.key(0))
        chains = resampled_negatives(process, network, rule, on("tokens", term), table("negatives"), spy, of="tokens")
        return chains(params, BATCH, jax.random.key(0))[0], seen

    value, (shared, own) = evaluate(PARAMS)
    np.testing.assert_allclose(own[0], shared[0], rtol=1e-6)  # the positive is the same one at any time
    np.testing.assert_allclose(value, -own[1].mean(), rtol=1e-6)
    if t == 1:
        np.testing.assert_allclose(own[1], shared[1], rtol=1e-5)
    else:
        assert float(jnp.abs(own[1] - shared[1]).max()) > 0.1


@pytest.mark.slow
def test_network_calls():
    calls = []

    def counted(params, x, t):
        jax.debug.callback(lambda: calls.append(1))
        return network(params, x, t)

    def count(loss):
        calls.clear()
        jax.block_until_ready(jax.jit(loss)(PARAMS, BATCH, jax.random.key(0)))
        jax.effects_barrier()
        return len(calls)

    both = {
        "step": (1.0, losses.on("tokens", contrast(TOKENS, MODES["step"], shifted(5)))),
        "sample": (1.0, losses.on("tokens", contrast(TOKENS, MODES["sample"], table("negatives"), infonce()))),
    }
    assert count(losses.diffusion(PROCESS, counted, TIMES, both)) == 1
    term = losses.on("tokens", MODES["step"])
    assert count(resampled_negatives(PROCESS, counted, TIMES, term, table("negatives"), infonce(), of="tokens")) == N + 1


@pytest.mark.slow
def test_resampled_negatives_learn_beside_the_base():
    loss = losses.combine(
        base=(1.0, loss_of()),
        contrast=(0.1, resampled_negatives(PROCESS, network, TIMES, losses.on("tokens", MODES["step"]), table("negatives"), of="tokens")),
    )
    (value, metrics), grads = jax.jit(jax.value_and_grad(lambda p: loss(p, BATCH, jax.random.key(0)), has_aux=True))(PARAMS)
    np.testing.assert_allclose(value, metrics["base/loss"] + 0.1 * metrics["contrast/loss"], rtol=1e-6)
    assert metrics["contrast/loss"] < 0 and np.isfinite(grads["w"]).all()


def test_resampled_negatives_of_a_single_process():
    process = Gaussian(schedules.flow())
    loss = resampled_negatives(process, lambda p, x, t: p * x, times.constant(0.5), process.loss, shifted(2))
    x0 = jax.random.normal(jax.random.key(0), (B, 3))
    # A network that says nothing: (eps - z^j)^2, in which z^j runs through the batch.
    value, _ = jax.jit(loss)(0.0, {"x0": 100.0 * x0, "index": INDEX}, jax.random.key(0))
    np.testing.assert_allclose(value, -(1e4 * x0**2).mean(), rtol=0.05)


# --------------------------------------------------------------------------------------------------------------- negatives


@pytest.mark.parametrize("derange", [False, True])
def test_intra_shuffles_chunks(derange):
    length, chunks, count = 35, 8, 500
    x0 = jnp.stack([jnp.arange(length), jnp.arange(length) + 100])
    noised = Noised(x0, x0, jnp.ones(2), key=jax.random.key(0))
    z = np.asarray(intra(chunks, count, derange)(noised))
    assert z.shape == (count, 2, length)
    np.testing.assert_array_equal(np.sort(z, axis=-1), np.broadcast_to(x0, z.shape))
    np.testing.assert_array_equal(z[..., 32:], np.broadcast_to(x0[:, 32:], (count, 2, 3)))  # what 8 chunks of 4 leave over
    np.testing.assert_array_equal(z[:, 1] - 100, z[:, 0])  # one order for the whole batch
    pieces = z[:, 0, :32].reshape(count, chunks, 4)
    np.testing.assert_array_equal(pieces - pieces[..., :1], np.broadcast_to(np.arange(4), pieces.shape))
    order = pieces[..., 0] // 4
    fixed = (order == np.arange(chunks)).sum(1)
    if derange:
        assert not fixed.any()
    else:
        assert abs(fixed.mean() - 1) < 4 / np.sqrt(count)  # the count of fixed chunks has mean and variance 1
    # Every chunk goes everywhere else, negatives differ, and the key says which they are.
    assert all(len(set(order[:, place])) == chunks - derange for place in range(chunks))
    assert len(np.unique(order, axis=0)) > 400
    np.testing.assert_array_equal(z, intra(chunks, count, derange)(noised))
    assert (z != intra(chunks, count, derange)(noised.replace(key=jax.random.key(1)))).any()


def test_intra_cuts_the_published_lengths():
    for length, tail in ((344, 0), (1033, 1)):
        x0 = jnp.arange(length)[None]
        z = np.asarray(intra()(Noised(x0, x0, jnp.ones(1), key=jax.random.key(0))))
        assert z.shape == (10, 1, length)
        kept = (z[:, 0] == np.arange(length)).all(0)
        assert kept[length - tail :].all() and not kept[: length - tail].any()


def test_intra_shuffles_the_rows_of_an_image():
    x0 = jax.random.normal(jax.random.key(0), (2, 4, 3, 1))
    z = np.asarray(intra(chunks=4, count=5, derange=True)(Noised(x0, x0, jnp.ones(2), key=jax.random.key(0))))
    assert z.shape == (5, 2, 4, 3, 1)
    np.testing.assert_array_equal(np.sort(z, axis=2), np.broadcast_to(np.sort(x0, axis=1), z.shape))


def test_inter_takes_another_class():
    size, count = 60, 10
    label = jax.random.randint(jax.random.key(0), (size,), 0, 5)
    x0, index = jnp.arange(size)[:, None], jnp.arange(size, dtype=jnp.uint32) + 1000
    noised = Noised(x0, x0, jnp.ones(size), batch={"label": label, "index": index}, key=jax.random.key(1))
    z, valid = inter(count)(noised)
    who = np.asarray(z)[..., 0]
    assert who.shape == (count, size) and np.asarray(valid).all()
    assert (np.asarray(label)[who] != np.asarray(label)).all()  # never the class, hence never the example
    assert all(len(set(column)) == count for column in who.T)
    assert all((who == i).any() for i in range(size))
    # The same partners in any order of the batch, others at the next step.
    order = np.random.default_rng(0).permutation(size)
    turned = {"label": label[order], "index": index[order]}
    np.testing.assert_array_equal(inter(count)(noised.replace(x0=x0[order], batch=turned))[0], z[:, order])
    assert (np.asarray(inter(count)(noised.replace(key=jax.random.key(2)))[0]) != np.asarray(z)).any()


def test_inter_with_too_few_partners():
    noised = NOISED.replace(batch=BATCH | {"label": jnp.asarray([0, 0, 0, 0, 0, 1])})
    z, valid = inter(10)(noised)
    assert z.shape == (B, B, L)
    assert np.asarray(valid).sum(0).tolist() == [1, 1, 1, 1, 1, 5]
    np.testing.assert_array_equal(z[0, :5], np.broadcast_to(X0[5], (5, L)))
    # The mean is over those there are; a batch of one class contrasts nothing.
    term = MODES["sample"]
    value = run(contrast(TOKENS, term, inter(10)), noised)
    np.testing.assert_allclose(value[0], -run(term, noised.replace(x0=jnp.broadcast_to(X0[5], (B, L))))[0], rtol=1e-5)
    alike = noised.replace(batch=BATCH | {"label": jnp.zeros(B, jnp.int32)})
    for form in (linear(), weighted(), infonce()):
        contrasted = contrast(TOKENS, term, inter(10), form)
        assert not run(contrasted, alike).any() and not gradient(contrasted, alike).any()


def test_inter_by_a_text():
    text = jnp.asarray([[1, 2], [1, 3], [1, 2], [2, 1], [1, 2], [1, 2]])
    z, valid = inter(4, by="text")(NOISED.replace(batch=BATCH | {"text": text}))
    assert np.asarray(valid).sum(0).tolist() == [2, 4, 2, 4, 2, 2]
    assert {tuple(row) for row in np.asarray(z[:2, 0])} == {tuple(row) for row in np.asarray(X0[jnp.asarray([1, 3])])}


def test_shifted_and_table():
    z = shifted(2)(NOISED)
    np.testing.assert_array_equal(z[0, :-1], X0[1:])
    np.testing.assert_array_equal(z[1, 0], X0[2])
    np.testing.assert_array_equal(table("negatives")(NOISED), Z)


def test_mistakes_are_named():
    noised = NOISED
    with pytest.raises(KeyError, match="the batch's entry 'others': it holds .*'index', 'label', 'negatives', 'tokens'"):
        table("others")(noised)
    with pytest.raises(KeyError, match="it holds nothing"):
        inter()(noised.replace(batch=None))
    with pytest.raises(ValueError, match="sampled with the step's key"):
        intra()(noised.replace(key=None))
    with pytest.raises(ValueError, match="length 16 cannot be cut into 20 chunks"):
        intra(chunks=20)(noised)
    with pytest.raises(ValueError, match="at least two chunks"):
        intra(chunks=1)
    with pytest.raises(ValueError, match="a batch of 6 examples gives at most 5 negatives, not 6"):
        shifted(6)(noised)
    with pytest.raises(ValueError, match=r"negatives are \[N, \*x0.shape\], here \[N, 6, 16\], not \[6, 16\]"):
        contrast(TOKENS, MODES["step"], lambda noised: noised.x0)(OUT, noised)


# ------------------------------------------------------------------------------------------------------- continuous data


CONTINUOUS = [("mse", processes.eps), ("mse", processes.velocity), ("vlb", processes.velocity), ("vlb", processes.x0)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, predict", CONTINUOUS)
def test_the_continuous_counterpart(kind, predict):
    """A negative costs what it would if it were the clean image: its distance from the belief, in the term's weight."""
    process = Gaussian(lambda t: schedules.cosine()(0.99 * t), predict)
    x0, out = (jax.random.normal(jax.random.key(i), (B, 4, 4, 2)) for i in range(2))
    t = jnp.linspace(0.1, 0.9, B)
    noised = jax.jit(process.corrupt)(jax.random.split(jax.random.key(3), B), x0, t)
    term = losses.mse(process, losses.min_snr(5.0)) if kind == "mse" else losses.vlb(process, 100)
    z = shifted(2)(noised)
    x0_hat = process.clean(out, noised.xt, t)
    alpha, sigma = process.schedule(t)
    snr = (alpha / sigma) ** 2
    if kind == "mse":
        weight = jnp.minimum(snr, 5.0)
    else:
        alpha_s, sigma_s = process.schedule(jnp.round(100 * t - 1) / 100)
        weight = 50 * ((alpha_s / sigma_s) ** 2 - snr)
    expected = weight * ((z - x0_hat) ** 2).mean((2, 3, 4))
    contrasted, positive = contrast(process, term, shifted(2)), run(term, noised, out)
    np.testing.assert_allclose(run(contrasted, noised, out), -expected.mean(0), rtol=2e-3)
    # Its gradient is that of the negatives' own losses, and a negative that is the positive takes it back.
    each = [gradient(term, process.with_x0(noised, z), out) for z in z]
    np.testing.assert_allclose(gradient(contrasted, noised, out), -(each[0] + each[1]) / 2, rtol=1e-4, atol=1e-5)
    same = contrast(process, term, lambda noised: noised.x0[None])
    np.testing.assert_allclose(run(same, noised, out), -positive, rtol=1e-3)
