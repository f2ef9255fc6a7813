"""DiffDis' identities: the scale of the query, its exact denoiser and what leaks through it, the contrastive loss and its floors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff import losses, matching, sampling, schedules, times
from mmdiff.evals import retrieval
from mmdiff.evals.accuracy import denoising_losses
from mmdiff.evals.evaluator import example_keys
from mmdiff.processes import Gaussian, Given, Joint, Noised
from mmdiff.processes.gaussian import eps, v, velocity, x0
from mmdiff.training import sharding
from mmdiff.training.step import make_step

SD = schedules.scaled_linear_beta()
GAMMAS = (1.0, 0.5, 0.1)
STEPS = np.asarray([1, 250, 500, 750, 1000])
ABAR = np.asarray([0.99915, 0.67543, 0.27767, 0.05662, 0.00466])


def keys(count, seed=0):
    return example_keys(jax.random.key(seed), count)


def units(count, size, seed=0):
    return matching.l2_normalize(jax.random.normal(jax.random.key(seed), (count, size)))


# --------------------------------------------------------------------------------------------------------------- the query


def test_stable_diffusions_schedule():
    alpha, sigma = SD(jnp.asarray(STEPS / 1000, jnp.float32))
    np.testing.assert_allclose(alpha**2, ABAR, atol=6e-6)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    with pytest.raises(ValueError, match="steps >= 1"):
        schedules.scaled_linear_beta(0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gamma_is_a_shift_of_log_snr(gamma):
    t = jnp.linspace(0.001, 1, 100)
    for schedule in (SD, schedules.cosine(), schedules.flow()):
        gap = schedules.log_snr(schedules.scaled(schedule, gamma), t[:-1]) - schedules.log_snr(schedule, t[:-1])
        np.testing.assert_allclose(gap, 2 * math.log(gamma), atol=2e-5)
        alpha, sigma = schedules.scaled(schedule, gamma)(t)
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
        assert tuple(map(float, schedules.scaled(schedule, gamma)(0.0))) == (1.0, 0.0)
    # Straight lines scaled are straight lines at other times.
    pairs = (schedules.scaled(schedules.flow(), gamma), schedules.shift(schedules.flow(), 1 / gamma))
    one, two = (schedules.log_snr(schedule, t[:-1]) for schedule in pairs)
    np.testing.assert_allclose(one, two, atol=1e-4)
    with pytest.raises(ValueError, match="factor > 0"):
        schedules.scaled(SD, 0.0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_noised_query_is_the_papers_up_to_a_factor_of_time(gamma):
    """e_t = gamma sqrt(abar) e + sqrt(1 - abar) eps, times c_t = 1 / sqrt(gamma^2 abar + 1 - abar); for lines 1 / (gamma (1 - s) + s)."""
    e, t = units(6, 16), jnp.linspace(0.1, 1.0, 6)
    noised = Gaussian(schedules.scaled(SD, gamma), x0).corrupt(keys(6), e, t)
    alpha, sigma = (np.asarray(value, np.float64)[:, None] for value in SD(t))
    paper = gamma * alpha * e + sigma * noised.noise
    np.testing.assert_allclose(noised.xt, paper / np.sqrt(gamma**2 * alpha**2 + sigma**2), atol=1e-6)
    noised = Gaussian(schedules.shift(schedules.flow(), 1 / gamma), x0).corrupt(keys(6), e, t)
    s = np.asarray(t, np.float64)[:, None]
    np.testing.assert_allclose(noised.xt, ((1 - s) * gamma * e + s * noised.noise) / (gamma * (1 - s) + s), atol=1e-6)


@pytest.mark.parametrize("predict", [x0, eps, v, velocity])
def test_any_parameterisation_names_the_same_vector(predict):
    process, e, t = Gaussian(schedules.scaled(SD, 0.5), predict), units(5, 8), jnp.linspace(0.2, 0.8, 5)
    noised = process.corrupt(keys(5), e, t)
    p, q = (value[:, None] for value in predict(process.schedule, t))
    np.testing.assert_allclose(process.clean(p * e + q * noised.noise, noised.xt, t), e, atol=2e-5)


def test_a_step_with_the_truth_lands_on_the_chain():
    process, e = Gaussian(schedules.scaled(SD, 0.5), x0), units(4, 8)
    t, s = jnp.full(4, 0.9), jnp.full(4, 0.35)
    noised = process.corrupt(keys(4), e, t)
    alpha, sigma = process.schedule(s[0])
    np.testing.assert_allclose(process.step(keys(4), noised.xt, e, t, s), alpha * e + sigma * noised.noise, atol=2e-6)


# --------------------------------------------------------------------------------- the exact denoiser of finitely many texts


def bayes(process, prompts):
    """E[e | e_t, image] for unit prompts [C, D] and images that are p(prompt | image): a look-up with the prompts as keys and values."""

    def apply(params, x, t):
        alpha, sigma = process.schedule(t["query"])
        logits = (alpha / sigma**2)[:, None] * (x["query"] @ prompts.T) + jnp.log(x["image"])
        return {"query": jax.nn.softmax(logits) @ prompts}

    return apply


SHAPE = {"image": (10,), "query": (32,)}


def alignment(gamma=0.5, schedule=SD):
    return Joint(image=Given(0.1), query=Gaussian(schedules.scaled(schedule, gamma), x0))


def read(prompts, images, steps, schedule=SD, gamma=0.5):
    """Vectors that the whole read-out makes of `images`, which are the classes' probabilities."""
    process = alignment(gamma, schedule)
    apply = bayes(process.parts["query"], prompts)

    @jax.jit
    def run(keys, images):
        return retrieval.align(process, apply, None, keys, {"image": images}, SHAPE, steps=steps)

    return run(keys(len(images)), images)


def test_the_exact_denoiser_is_the_gaussian_posterior():
    """By the definition, with the densities of e_t under every prompt."""
    process, prompts = Gaussian(schedules.scaled(SD, 0.5), x0), units(10, 32)
    prior = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(10), 6), jnp.float32)
    t = {"query": jnp.linspace(0.2, 1.0, 6)}
    xt = process.corrupt(keys(6), units(6, 32, 1), t["query"]).xt
    alpha, sigma = (value[:, None] for value in process.schedule(t["query"]))
    distances = ((xt[:, None] - alpha[..., None] * prompts) ** 2).sum(-1)
    expected = jax.nn.softmax(jnp.log(prior) - distances / (2 * sigma**2)) @ prompts
    found = bayes(process, prompts)(None, {"image": prior, "query": xt}, t)["query"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_sure_images_are_named_right_from_noise(steps):
    """Also among prompts that are alike: with an average cosine of 0.7."""
    label = jnp.arange(40) % 10
    images = jax.nn.one_hot(label, 10) * (1 - 1e-6) + 1e-7
    for prompts in (units(10, 32), matching.l2_normalize(units(10, 32) + 1.5 * units(1, 32, 5))):
        found = read(prompts, images, steps)
        np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1, atol=1e-5)
        s = retrieval.scores(found, prompts)
        assert (s.argmax(1) == label).all() and s.min() >= -1 - 1e-6 and s.max() <= 1 + 1e-6
        # Whose answers they are is known to the image alone: the labels of other images are found as often as they agree by chance.
        assert np.mean(s.argmax(1) == jnp.roll(label, 3)) == 0


def test_one_step_from_noise_is_the_posterior_mean_and_many_are_draws():
    """With no signal at t = 1: scores are G pi. A trajectory ends at one of the prompts, at class j for about pi_j of the seeds."""
    prompts, pi = units(10, 32), jnp.asarray([0.4, 0.3, 0.2, *[0.1 / 7] * 7])
    images = jnp.tile(pi, (400, 1))
    once = read(prompts, images[:4], 1, schedule=schedules.cosine())
    np.testing.assert_allclose(once, jnp.tile(matching.l2_normalize(pi @ prompts), (4, 1)), atol=1e-4)
    process = alignment(0.5, schedules.cosine())
    apply = bayes(process.parts["query"], prompts)
    drawn = jax.jit(lambda k: sampling.sample(process, apply, None, k, sampling.uniform_grid(60), SHAPE, given={"image": images}))
    s = retrieval.scores(drawn(keys(400))["query"], prompts)
    assert np.mean(s.max(1) > 0.999) > 0.97
    np.testing.assert_allclose(np.bincount(s.argmax(1), minlength=10) / 400, pi, atol=4 * 0.5 / 20)


def test_a_network_that_answers_always_the_same_is_believed():
    answer, process = units(1, 32, 3)[0], alignment()

    def apply(params, x, t):
        return {"query": 5 * jnp.tile(answer, (len(x["query"]), 1))}

    for steps, seeds, guidance in ((1, 1, 1.0), (7, 2, 1.0), (3, 1, 3.0)):
        found = retrieval.align(
            process, apply, None, keys(3), {"image": jnp.zeros((3, 10))}, SHAPE, steps=steps, seeds=seeds, guidance=guidance,
            drop=("image",))  # fmt: skip
        np.testing.assert_allclose(found, jnp.tile(answer, (3, 1)), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- what leaks


def best_accuracy(delta, count):
    """The share of right answers of the best guess among orthonormal candidates: integral phi(u) Phi(u + delta)^(count - 1) du."""
    u = np.linspace(-9, 9, 4001)
    cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))(u + delta)
    return np.trapezoid(np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi) * cdf ** (count - 1), u)


def test_the_leakage_curve():
    """How often the noised vector gives itself away: hardly at high noise, and less the smaller gamma."""
    table = {
        (10, 1.0): (1.0, 0.489, 0.230, 0.143, 0.111),
        (10, 0.5): (1.0, 0.257, 0.156, 0.120, 0.105),
        (64, 1.0): (1.0, 0.208, 0.058, 0.027, 0.018),
    }
    count, n = 10, 4000
    for (size, gamma), expected in table.items():
        process = Gaussian(schedules.scaled(SD, gamma), x0)
        for step, value in zip(STEPS, expected):
            snr = float(jnp.exp(schedules.log_snr(process.schedule, jnp.float32(step / 1000))))
            np.testing.assert_allclose(best_accuracy(math.sqrt(snr), size), value, atol=6e-4)
    # The chain leaks so much and no more: the exact denoiser without an image, at once from e_t.
    process = Gaussian(schedules.scaled(SD, 1.0), x0)
    prompts, label = jnp.eye(32)[:count], jnp.arange(n) % count
    for step, value in zip(STEPS[1:], table[(10, 1.0)][1:]):
        noised = process.corrupt(keys(n, int(step)), prompts[label], jnp.full(n, step / 1000))
        x = {"image": jnp.full((n, count), 0.1), "query": noised.xt}
        belief = bayes(process, prompts)(None, x, {"query": noised.t})
        accuracy = np.mean(retrieval.scores(belief["query"], prompts).argmax(1) == label)
        assert abs(accuracy - value) < 4 * math.sqrt(value / n) + 1e-3


def test_a_vector_of_another_length_gives_itself_away_and_is_refused():
    """Among 512 texts x_t alone hardly names one at length 1, and always at that of 768 numbers of deviation 1: no image is needed."""
    count, n, process = 512, 4000, Gaussian(schedules.scaled(SD, 0.5), x0, norm=1.0)
    texts, label = np.eye(count, dtype=np.float32), np.arange(n) % count
    share = {}
    for length in (1.0, 27.7):
        noised = jax.jit(process.corrupt)(keys(n), length * texts[label], jnp.full(n, 0.25))
        share[length] = float(np.mean(np.asarray(noised.xt).argmax(1) == label))
    assert abs(share[1.0] - best_accuracy(0.5 * math.sqrt(0.67543 / 0.32457), count)) < 4 * math.sqrt(0.016 / n) and share[27.7] > 0.999
    process.check(texts)
    process.check(np.asarray(units(9, 768), np.float16))  # as a cache keeps them
    for wrong in (27.7 * texts, 0 * texts, np.where(texts > 0, np.nan, 0), texts[:1] * 0.97):
        with pytest.raises(ValueError, match="this process is for vectors of length 1 .*divide each vector by its length"):
            process.check(wrong)
    Gaussian(SD, x0).check(27.7 * texts)  # in general any length will do


# -------------------------------------------------------------------------------------------------- the contrastive loss


PROCESS = Joint(image=Given(0.0), query=Gaussian(schedules.scaled(SD, 0.5), x0))


@functools.partial(jax.jit, static_argnames="loss")
def value_of(beliefs, clean, scale=1.0, bias=0.0, loss="infonce"):
    """The loss [B] of denoised vectors and clean ones, at some time."""
    count = len(clean)
    t = {"image": jnp.zeros(count), "query": jnp.full(count, 0.5)}
    noised = Noised(x0={"image": None, "query": clean}, xt={"image": None, "query": jnp.zeros_like(clean)}, t=t)
    out = {"query": beliefs, "logit_scale": jnp.full(count, scale), "logit_bias": jnp.full(count, bias)}
    return matching.embedding_loss(PROCESS.parts["query"], "query", loss)(out, noised)


def reference(beliefs, clean, scale):
    s = scale * np.asarray(matching.l2_normalize(beliefs), np.float64) @ np.asarray(matching.l2_normalize(clean), np.float64).T
    both = [np.log(np.exp(m).sum(1)) - np.diag(m) for m in (s, s.T)]
    return (both[0] + both[1]) / 2


def test_the_loss_is_clips():
    one, two = jax.random.normal(jax.random.key(0), (9, 16)), 3 * jax.random.normal(jax.random.key(1), (9, 16))
    np.testing.assert_allclose(value_of(one, two, 5.0), reference(one, two, 5.0), rtol=1e-5)
    # The belief's length is free, and rows and columns may change places.
    np.testing.assert_allclose(value_of(0.01 * one, two, 5.0), value_of(one, two, 5.0), rtol=1e-5)
    np.testing.assert_allclose(value_of(two, one, 5.0), value_of(one, two, 5.0), rtol=1e-5)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(value_of(one[order], two[order], 5.0), value_of(one, two, 5.0)[order], rtol=1e-5)


@pytest.mark.parametrize("count", [8, 64])
def test_no_information_costs_log_b(count):
    same = jnp.tile(units(1, 64), (count, 1))
    np.testing.assert_allclose(value_of(same, units(count, 64, 1), 0.0), math.log(count), rtol=1e-6)
    np.testing.assert_allclose(value_of(jnp.zeros((count, 64)), units(count, 64, 1), 10.0), math.log(count), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07])
def test_the_floors(scale):
    """ln(1 + (B - 1) exp(-scale)) among orthonormal texts; a simplex has them further apart, and a floor below."""
    count = 512
    own = jnp.eye(count)
    found = value_of(own, own, scale)
    np.testing.assert_allclose(found, math.log1p((count - 1) * math.exp(-scale)), rtol=1e-5, atol=2e-6)
    simplex = own - 1 / count
    further = math.log1p((count - 1) * math.exp(-scale * count / (count - 1)))
    np.testing.assert_allclose(value_of(simplex, simplex, scale), further, rtol=1e-5, atol=2e-6)
    if scale == 1:
        np.testing.assert_allclose((found[0], further), (5.2417, 5.2397), atol=1e-4)


def test_equal_texts_need_no_care():
    """Diagonal InfoNCE is the one in which every copy of the text is right, to its gradient; the floor is the mean log count."""
    prompts = units(4, 8)
    label = jnp.asarray([0, 1, 1, 2, 0, 1, 3, 1])
    clean, beliefs = prompts[label], jax.random.normal(jax.random.key(2), (8, 8))
    same = (label[:, None] == label[None]).astype(jnp.float32)

    def diagonal(beliefs):
        return value_of(beliefs, clean, 7.0).mean()

    def every_copy(beliefs):
        s = 7.0 * matching.l2_normalize(beliefs) @ clean.T
        share = same / same.sum(1, keepdims=True)
        rows, columns = (-(share * jax.nn.log_softmax(s, axis)).sum() / 8 for axis in (1, 0))
        return (rows + columns) / 2

    np.testing.assert_allclose(diagonal(beliefs), every_copy(beliefs), rtol=1e-5)
    one, other = jax.jit(lambda x: (jax.grad(diagonal)(x), jax.grad(every_copy)(x)))(beliefs)
    np.testing.assert_allclose(one, other, atol=1e-6)
    orthonormal = jnp.eye(8)[label]
    floor = np.log(np.bincount(label)[label]).mean()
    np.testing.assert_allclose(value_of(orthonormal, orthonormal, 100.0).mean(), floor, rtol=1e-5)


def test_the_floor_of_ten_prompts():
    """A perfect model of ten classes at B = 64 shows 1.93, not 0, and the information it has is read off as log B minus that."""
    exact = sum(math.comb(63, k) * 0.1**k * 0.9 ** (63 - k) * math.log1p(k) for k in range(64))
    assert abs(exact - 1.9291) < 1e-4
    texts = jnp.eye(10)[np.random.default_rng(0).integers(0, 10, (40, 64))]
    draws = [value_of(e, e, 100.0).mean() for e in texts]
    np.testing.assert_allclose(np.mean(draws), exact, atol=4 * np.std(draws) / 40**0.5)


def test_gradients_of_the_loss():
    """None reaches the clean vectors; the scale's and the beliefs' do."""
    one, two = units(6, 8), units(6, 8, 1)
    by_belief, by_clean, by_scale = jax.jit(jax.grad(lambda *args: value_of(*args).mean(), argnums=(0, 1, 2)))(one, two, 2.0)
    assert by_belief.any() and not by_clean.any() and by_scale != 0
    assert np.isfinite(jax.jit(jax.grad(lambda x: value_of(x, two).sum()))(jnp.zeros((6, 8)))).all()


def test_vectors_of_any_size_have_unit_length_and_finite_gradients():
    sizes = jnp.asarray([0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])[:, None]
    x = sizes * units(6, 8)
    np.testing.assert_allclose(jnp.linalg.norm(matching.l2_normalize(x), axis=1), sizes[:, 0] > 0, rtol=1e-5)
    slope = jax.grad(lambda x: (matching.l2_normalize(x) @ jnp.arange(8.0)).sum())(x)
    assert np.isfinite(slope).all()
    along = (slope * x).sum(1)  # the length does not matter
    np.testing.assert_allclose(along, jnp.zeros(6), atol=1e-4)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_vectors_of_zeros_have_finite_gradients(loss):
    """A network's first outputs, and texts that are padding alone, which are like no other text."""
    one, two = units(5, 8).at[1].set(0.0), units(5, 8, 1).at[jnp.asarray([1, 3])].set(0.0)
    value, slopes = jax.jit(jax.value_and_grad(lambda *args: value_of(*args, loss=loss).mean(), argnums=(0, 1, 2, 3)))(one, two, 5.0, -1.0)
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)
    if loss == "siglip":  # each is its own pair
        s = 5.0 * np.asarray(one, np.float64) @ np.asarray(two, np.float64).T - 1.0
        np.testing.assert_allclose(value, np.log1p(np.exp(-(2 * np.eye(5) - 1) * s)).sum(1).mean(), rtol=1e-4)


def test_siglip():
    one, two = units(5, 8), units(5, 8, 1)
    s = 10.0 * np.asarray(one, np.float64) @ np.asarray(two, np.float64).T - 3.0
    signs = 2 * np.eye(5) - 1
    np.testing.assert_allclose(value_of(one, two, 10.0, -3.0, "siglip"), np.log1p(np.exp(-signs * s)).sum(1), rtol=1e-4)
    # An equal text is a pair, too.
    twice = two.at[3].set(two[1])
    signs[1, 3] = signs[3, 1] = 1
    s = 10.0 * np.asarray(one, np.float64) @ np.asarray(twice, np.float64).T - 3.0
    np.testing.assert_allclose(value_of(one, twice, 10.0, -3.0, "siglip"), np.log1p(np.exp(-signs * s)).sum(1), rtol=1e-4)
    with pytest.raises(Exception, match="no loss of embeddings 'triplet'; choose infonce or siglip"):
        matching.embedding_loss(PROCESS.parts["query"], "query", "triplet")


@functools.cache
def one_step(axes, loss, predict):
    """The parameters after a step of SGD at rate 1, i.e. minus the gradient, and the metrics, on a mesh."""
    process = Joint(image=Given(0.0), query=Gaussian(schedules.scaled(SD, 0.5), predict))

    def apply(params, x, t):
        h = jnp.concatenate([x["image"], x["query"], t["query"][:, None]], -1)
        out = {"query": jnp.tanh(h @ params["in"]) @ params["out"]}
        return out | {name: jnp.broadcast_to(params[name], len(h)) for name in ("logit_scale", "logit_bias")}

    def init(key):
        rng = np.random.default_rng(0)
        kernels = {name: jnp.asarray(rng.normal(size=size) / 4, jnp.float32) for name, size in (("in", (15, 16)), ("out", (16, 8)))}
        return kernels | {"logit_scale": jnp.float32(5.0), "logit_bias": jnp.float32(-2.0)}

    when = times.joint(image=times.constant(0.0), query=times.uniform())
    total = losses.diffusion(process, apply, when, {"embedding": (1.0, matching.embedding_loss(process.parts["query"], "query", loss))})
    mesh = sharding.make_mesh(dict(axes), jax.devices()[: math.prod(size for _, size in axes)])
    images = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)
    batch = {"image": images, "query": np.asarray(units(16, 8)), "index": np.arange(16, dtype=np.uint32)}
    optimizer = optax.sgd(1.0)
    program = sharding.lower_step(make_step(total, optimizer), sharding.abstract_state(init, optimizer, mesh, []), batch, mesh).compile()
    state, metrics = program(sharding.init_sharded_state(init, optimizer, jax.random.key(0), mesh, []), sharding.shard_batch(batch, mesh))
    return jax.device_get((state.params, metrics)), init(None)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_negatives_come_from_all_devices(loss):
    """Eight devices of two examples each have the loss and the gradients of one with sixteen."""
    (params, metrics), start = one_step((("data", 1),), loss, x0)
    (spread, same_metrics), _ = one_step((("data", 8),), loss, x0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), (spread, same_metrics), (params, metrics))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, params, jax.device_get(start))
    assert moved["in"] and moved["out"] and moved["logit_scale"] and (moved["logit_bias"] or loss == "infonce")
    assert metrics["loss"] > 0.5


# --------------------------------------------------------------------------------------------------- Diffusion Classifier


MEANS, STD = jnp.asarray([[1.0, 0.0, -0.5], [0.3, 0.8, 0.1]]), 0.6


def gaussian_network(process):
    """The exact eps of x ~ N(mean of the class, STD^2)."""

    def apply(params, x, t):
        alpha, sigma = (value[:, None] for value in process.schedule(t["x"]))
        spread = (alpha * STD) ** 2 + sigma**2
        return {"x": sigma * (x["x"] - alpha * MEANS[x["label"]]) / spread}

    return apply


def test_denoising_losses_of_gaussians():
    """d (a^2 s^2 / (a^2 s^2 + sig^2))^2 + sig^2 a^2 |x - mu_c|^2 / (a^2 s^2 + sig^2)^2 at one time, so each time ranks by distance."""
    process = Gaussian(lambda t: schedules.cosine()(0.999 * t), eps)
    joint = Joint(x=process, label=Given(0))
    x = jnp.asarray([[0.8, 0.1, 0.0], [0.2, 0.2, 0.6]])
    draws = 4000
    shape = {"x": (3,), "label": ()}
    found = jax.jit(lambda k: denoising_losses(joint, gaussian_network(process), None, k, {"x": x}, "label", 2, shape, draws))
    t = (np.arange(draws) + 0.5) / draws
    alpha, sigma = np.cos(0.999 * np.pi * t / 2), np.sin(0.999 * np.pi * t / 2)
    spread = (alpha * STD) ** 2 + sigma**2
    distance = ((np.asarray(x)[:, None] - np.asarray(MEANS)) ** 2).sum(-1)[..., None]
    expected = (3 * (alpha**2 * STD**2 / spread) ** 2 + sigma**2 * alpha**2 * distance / spread**2).mean(-1) / 3
    losses_found = found(keys(2))
    np.testing.assert_allclose(losses_found, expected, rtol=0.05)
    assert (losses_found.argmin(1) == distance[..., 0].argmin(1)).all()


@pytest.mark.slow
def test_errors_weighted_by_the_change_of_snr_are_the_likelihood_ratio():
    process = Gaussian(lambda t: schedules.cosine()(0.999 * t), eps)
    n = 4000
    t = (jnp.arange(n) + 0.5) / n
    x = jnp.tile(jnp.asarray([0.8, 0.1, 0.0]), (n, 1))
    alpha, sigma = (value[:, None] for value in process.schedule(t))
    noise = jax.random.normal(jax.random.key(0), (n, 3))

    def rate(label, noise):
        xt = alpha * x + sigma * noise
        out = gaussian_network(process)(None, {"x": xt, "label": jnp.full(n, label)}, {"x": t})["x"]
        return process.elbo_rate(Noised(x0=x, xt=xt, t=t, noise=noise), process.clean(out, xt, t))

    # In the difference of two classes the noise is linear: it and its opposite give the mean.
    found = np.mean([rate(0, sign * noise) - rate(1, sign * noise) for sign in (1, -1)])
    exact = (((x[0] - MEANS[0]) ** 2).sum() - ((x[0] - MEANS[1]) ** 2).sum()) / (2 * STD**2)
    np.testing.assert_allclose(found, exact, rtol=2e-3)
