"""Losses that compare the examples of a batch have one value and one gradient, in however many micro-batches they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff import contrastive, losses, matching, schedules, times
from mmdiff.errors import UserError
from mmdiff.microbatches import BatchLoss, MicroBatch, Pieces, compares_examples, join, split, whole_batch
from mmdiff.processes import Gaussian, Given, Joint, absorbing, eps, x0
from mmdiff.training import sharding
from mmdiff.training.accumulation import make_gradient
from mmdiff.training.step import make_step

B, D, L, K, T = 64, 6, 8, 5, 4
KEY = jax.random.key(7)
IMAGE = Gaussian(schedules.cosine_beta(), eps)
QUERY = Gaussian(schedules.scaled(schedules.scaled_linear_beta(), 0.5), x0)
TOKENS = absorbing(K)
NAMING, DRAWING = Joint(image=Given(0.0), query=QUERY), Joint(image=IMAGE)
CHAIN = Joint(tokens=TOKENS, label=Given(null=3))
GRID = times.joint(tokens=times.on_grid(T), label=times.constant(0.0))


def make_batch():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, D)).astype(np.float32)
    return {
        "image": rng.normal(size=(B, D)).astype(np.float32),
        "query": query / np.linalg.norm(query, axis=1, keepdims=True),
        "tokens": rng.integers(0, K, (B, L)).astype(np.int32),
        "label": rng.integers(0, 3, B).astype(np.int32),
        "index": np.arange(100, 100 + B, dtype=np.uint32),
    }


BATCH = make_batch()


def init(key):
    shapes = {"name": (2 * D + 1, D), "draw": (D + 1, D), "tokens": (2 * (K + 1) + 4, K), "tower": (D, D)}
    kernels = {name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (name, shape) in enumerate(shapes.items())}
    return kernels | {"logit_scale": jnp.float32(5.0), "logit_bias": jnp.float32(-2.0)}


PARAMS = init(jax.random.key(0))


def logits(params, count):
    return {name: jnp.broadcast_to(params[name], count) for name in ("logit_scale", "logit_bias")}


def name(params, x, t):
    hidden = jnp.concatenate([x["image"], x["query"], t["query"][:, None]], -1)
    return {"query": jnp.tanh(hidden @ params["name"]), **logits(params, len(hidden))}


def draw(params, x, t):
    return {"image": jnp.tanh(jnp.concatenate([x["image"], t["image"][:, None]], -1) @ params["draw"])}


def predict(params, x, t):
    seen = jax.nn.one_hot(x["tokens"], K + 1)
    label = jnp.broadcast_to(jax.nn.one_hot(x["label"], 4)[:, None], (*seen.shape[:2], 4))
    return {"tokens": jnp.concatenate([seen, jnp.roll(seen, 1, axis=1), label], -1) @ params["tokens"]}


def towers(params, x, t):
    return {"image_vector": x["image"] @ params["tower"], "text_vector": x["query"] @ params["tower"], **logits(params, len(x["image"]))}


NAMED = times.joint(image=times.constant(0.0), query=times.uniform())


def matched(loss):
    return losses.diffusion(NAMING, name, NAMED, {loss: (1.0, matching.embedding_loss(QUERY, "query", loss))})


def contrasting(negatives, mode="sample_inter"):
    terms = contrastive.cdcd(TOKENS, T, **{mode: 0.5}, inter_negatives=negatives, count=3, chunks=4, of="tokens", given="label")
    return losses.diffusion(CHAIN, predict, GRID, terms)


def chains():
    term = losses.on("tokens", losses.vlb(TOKENS, T))
    return contrastive.resampled_negatives(CHAIN, predict, GRID, term, contrastive.inter(2), of="tokens")


def rolled(noised):
    """Negatives of a user's own, who knows nothing of micro-batches."""
    return jnp.roll(noised.x0, 3, axis=0)[None]


def adaptive():
    """Times that follow a term that compares examples, beside one that does not."""
    sampled = times.joint(image=times.constant(0.0), query=times.importance(8, "embedding"))
    return losses.diffusion(NAMING, name, sampled, {
        "embedding": (1.0, matching.embedding_loss(QUERY, "query")), "mse": (0.5, losses.on("query", QUERY.loss))})  # fmt: skip


TASKS = {
    "infonce": lambda: matched("infonce"),
    "siglip": lambda: matched("siglip"),
    "towers": lambda: losses.diffusion(
        Joint(image=Given(0.0), query=Given(0.0)), towers, times.joint(image=times.constant(0.0), query=times.constant(0.0)),
        {"siglip": (1.0, matching.clip_loss(loss="siglip"))}),
    "inter": lambda: contrasting(contrastive.inter(3)),
    "step_inter": lambda: contrasting(contrastive.shifted(3), "step_inter"),
    "rolled": lambda: contrasting(rolled),
    "resampled": chains,
    "diffdis": lambda: losses.combine(
        generate=(1.0, losses.diffusion(DRAWING, draw, times.joint(image=times.uniform()))), align=(0.3, matched("infonce"))),
    "several": lambda: losses.combine(
        align=(0.3, matched("infonce")),
        chain=(0.1, losses.prepared(contrasting(contrastive.inter(3)), lambda batch, keys: {"extra": batch["label"]}))),
    "adaptive": lambda: losses.combine(only=(2.0, adaptive())),
}  # fmt: skip


@functools.cache
def gradient(task, microbatches):
    loss = TASKS[task]()
    return jax.device_get(jax.jit(make_gradient(loss, microbatches))(PARAMS, BATCH, KEY, loss.init(PARAMS)))


CHEAP = {("infonce", 8), ("infonce", 16), ("siglip", 8), ("inter", 8), ("diffdis", 16), ("adaptive", 8)}
CASES = [
    pytest.param(task, m, marks=[] if (task, m) in CHEAP else pytest.mark.slow) for task in TASKS for m in (2, 8, 16)]


@pytest.mark.parametrize("task, microbatches", CASES)
def test_one_loss_and_one_gradient_for_any_number_of_micro_batches(task, microbatches):
    (whole, metrics, grads), seen = gradient(task, 1)
    (value, same, others), told = gradient(task, microbatches)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    assert set(same) == set(metrics) and (metrics or task == "resampled")
    for key in metrics:
        np.testing.assert_allclose(same[key], metrics[key], rtol=1e-5, atol=1e-6)
    size = float(optax.tree.norm(grads))
    assert size > 1e-3 and float(optax.tree.norm(jax.tree.map(np.subtract, others, grads))) < 1e-5 * size
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), told, seen)
    assert (task == "adaptive") == bool(jax.tree.leaves(seen))


@pytest.mark.parametrize("task", ["infonce", "inter"])
def test_for_a_part_of_the_batch_it_is_another_loss(task):
    """What micro-batches by themselves would have: the law above is none that holds for any loss."""
    alone = {key: array[:8] for key, array in BATCH.items()}
    value = jax.jit(TASKS[task]())(PARAMS, alone, KEY)[0]
    assert abs(value - gradient(task, 1)[0][0]) > 1e-3


@pytest.mark.parametrize("task", ["several", pytest.param("siglip", marks=pytest.mark.slow)])
def test_meshes_and_micro_batches_change_nothing(task):
    loss, optimizer = TASKS[task](), optax.sgd(1.0)
    results = []
    for axes, count, microbatches in (({}, 1, 1), ({"data": 2, "fsdp": 4}, 8, 4)):
        mesh, rules = sharding.make_mesh(axes, jax.devices()[:count]), [(".*", "fsdp")]
        abstract = sharding.abstract_state(init, optimizer, mesh, rules, loss)
        lowered = sharding.lower_step(make_step(loss, optimizer, microbatches=microbatches), abstract, BATCH, mesh)
        program = lowered.compile()
        state, metrics = program(sharding.init_sharded_state(init, optimizer, KEY, mesh, rules, loss), sharding.shard_batch(BATCH, mesh))
        results.append(jax.device_get((state.params, metrics)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


# ---------------------------------------------------------------------------------------------------------- what is refused


def scaled_by_hand(task):
    """A term within a function of one's own."""
    term = matching.embedding_loss(QUERY, "query")
    return losses.diffusion(NAMING, name, NAMED, {"x": (1.0, lambda out, noised: noised.t["query"] * term(out, noised))})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: lambda params, batch, key: loss(params, batch, key),
        lambda loss: jax.jit(loss),
        lambda loss: losses.combine(a=(1.0, jax.checkpoint(lambda params, batch, key: loss(params, batch, key)))),
        lambda loss: losses.prepared(lambda *args: loss(*args), lambda batch, keys: {}),
        scaled_by_hand,
    ],
)
@pytest.mark.parametrize("task", ["infonce", "inter"])
def test_a_comparison_within_a_plain_function_is_refused(task, wrap):
    loss = wrap(TASKS[task]())
    jax.eval_shape(loss, PARAMS, BATCH, KEY)  # traced before, and whole
    jax.eval_shape(make_gradient(loss), PARAMS, BATCH, KEY)
    with pytest.raises(UserError, match="compares the examples of a batch within a function of your own, and 2 micro-batches"):
        jax.eval_shape(make_gradient(loss, 2), PARAMS, BATCH, KEY)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: lambda params, batch, key: loss(params, batch, key),
        lambda loss: losses.combine(a=(1.0, loss), b=(1.0, jax.checkpoint(lambda params, batch, key: loss(params, batch, key)))),
        lambda loss: losses.prepared(jax.jit(loss), lambda batch, keys: {}),
    ],
)
def test_a_state_within_a_plain_function_is_refused(wrap, microbatches):
    loss = adaptive()
    jax.eval_shape(make_gradient(loss, microbatches), PARAMS, BATCH, KEY)  # without a state: that of `init`
    with pytest.raises(UserError, match="wraps a loss that has a state .* which would be lost"):
        jax.eval_shape(make_gradient(wrap(loss), microbatches), PARAMS, BATCH, KEY)
    own = jax.jit(lambda params, batch, key: loss(params, batch, key, loss.init(params)))  # one that says which
    jax.eval_shape(make_gradient(own), PARAMS, BATCH, KEY)


@pytest.mark.parametrize("task", ["infonce", "resampled", "diffdis"])
def test_the_noise_scale_is_refused(task):
    with pytest.raises(UserError, match="set config.train.noise_scale=False"):
        jax.eval_shape(make_gradient(TASKS[task](), 2, noise_scale=True), PARAMS, BATCH, KEY)


def test_other_losses_are_computed_as_they_are():
    """Neither a second pass nor anything else for losses of single examples: the same program as for a plain function."""
    plain = contrasting(contrastive.inter(3), "step_intra")
    assert not compares_examples(jax.make_jaxpr(plain)(PARAMS, BATCH, KEY))
    for noise_scale in (False, True):
        texts = {
            str(jax.make_jaxpr(make_gradient(loss, 4, noise_scale))(PARAMS, BATCH, KEY))
            for loss in (plain, lambda params, batch, key: plain(params, batch, key))
        }
        assert len(texts) == 1


def test_a_loss_of_ones_own_in_two_pieces():
    """Supervised contrast: labels, no floats, are embeddings as well, and the comparison has a parameter."""

    def pieces(params, batch, key, **_):
        vectors = matching.l2_normalize(batch["image"] @ params["tower"])
        return Pieces((batch["image"] @ params["draw"][:-1]).mean(), {"mean": vectors.mean()}, (vectors, batch["label"]))

    def contrast(params, embeddings):
        vectors, label = embeddings
        log_p = jax.nn.log_softmax(params["logit_scale"] * vectors @ vectors.T)
        return Pieces(-jnp.where(label[:, None] == label, log_p, 0.0).mean(), {"classes": jnp.unique(label, size=3).max()})

    loss = BatchLoss(pieces=pieces, contrast=contrast)
    one, many = (jax.jit(make_gradient(loss, m))(PARAMS, BATCH, KEY)[0] for m in (1, 8))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), many, one)
    assert one[2]["logit_scale"] != 0 and one[1]["classes"] == 2


def test_rows():
    x = jnp.arange(24).reshape(12, 2)
    assert split(x, 4).shape == (4, 3, 2) and (join(split(x, 4)) == x).all()
    for number in range(4):
        assert (MicroBatch({}, jnp.int32(number), 4).rows(x) == split(x, 4)[number]).all()
    with pytest.raises(UserError, match="12 cannot be split into 5"):
        split(x, 5)


def test_marks_change_nothing():
    tree = {"a": jnp.arange(3), "b": KEY}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), whole_batch(tree), tree))
