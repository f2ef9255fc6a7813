"""Recall and prompt ensembles by hand, and what the read-out may not know."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.errors import UserError
from mmdiff.evals import retrieval
from mmdiff.evals.accuracy import accuracy, confusion, eliminated
from mmdiff.evals.evaluator import best, example_keys, in_batches
from mmdiff.processes import Gaussian, Given, Joint
from mmdiff.processes.gaussian import x0

PAIRS = np.eye(3, dtype=bool)
S = np.asarray([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.1, 0.5, 0.4]])


def test_recall_by_hand():
    """The right ones stand at the places 1, 3 and 2 of their rows, and 1, 3 and 1 of their columns."""
    found = retrieval.recalls(S, PAIRS, ks=(1, 2, 3))
    assert found == pytest.approx({
        "image_to_text_r1": 1 / 3, "image_to_text_r2": 2 / 3, "image_to_text_r3": 1.0,
        "text_to_image_r1": 2 / 3, "text_to_image_r2": 2 / 3, "text_to_image_r3": 1.0,
    })  # fmt: skip


def test_several_captions_of_an_image():
    """Any of the image's own will do; each of them looks for its image alone."""
    owner = np.repeat(np.arange(2), 3)
    scores = np.asarray([[0.1, 0.2, 0.9, 0.8, 0.0, 0.0], [0.5, 0.6, 0.7, 0.4, 0.3, 0.2]])
    relevant = owner == np.arange(2)[:, None]
    assert retrieval.recall(scores, relevant, 1) == 0.5 and retrieval.recall(scores, relevant, 3) == 0.5
    assert retrieval.recall(scores, relevant, 4) == 1.0
    assert retrieval.recall(scores.T, relevant.T, 1) == pytest.approx(3 / 6)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_are_averaged_over_their_orders(k):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (4, 5)).astype(float)
    relevant = rng.integers(0, 2, (4, 5)).astype(bool) | np.eye(4, 5, dtype=bool)
    orders = []
    for order in itertools.permutations(range(5)):
        ranked = np.asarray(order)[np.argsort(-scores[:, order], axis=1, kind="stable")]
        orders.append(np.take_along_axis(relevant, ranked[:, :k], 1).any(1).mean())
    assert retrieval.recall(scores, relevant, k) == pytest.approx(np.mean(orders))


def test_scores_that_know_nothing_have_the_recall_of_chance():
    scores = np.zeros((50, 50))
    assert retrieval.recall(scores, np.eye(50, dtype=bool), 5) == pytest.approx(0.1)


def test_recall_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="a relevant column in every row"):
        retrieval.recall(S, np.zeros((3, 3), bool), 1)
    with pytest.raises(ValueError, match="recall needs"):
        retrieval.recall(S, PAIRS[:2], 1)


def test_scores_are_cosines():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(4, 6)), rng.normal(size=(5, 6))
    found = retrieval.scores(one, two)
    np.testing.assert_allclose(found, retrieval.scores(10 * one, 0.1 * two))
    np.testing.assert_allclose(np.diag(retrieval.scores(one, one)), 1)
    assert np.abs(found).max() <= 1
    assert np.isfinite(retrieval.scores(0 * one, two)).all()


def test_ensembles_of_prompts():
    def encode(texts):
        return np.asarray([[len(text), text.count("a") + 1.0, text.count("t")] for text in texts])

    names, templates = ["cat", "hat stand"], ["a photo of a {}.", "the {}"]
    one = retrieval.class_vectors(encode, names, templates[:1])
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1)
    np.testing.assert_allclose(retrieval.class_vectors(encode, names, templates[:1] * 5), one)
    vectors = encode([template.format(name) for name in names for template in templates]).reshape(2, 2, 3)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    mean = (vectors / lengths).mean(1)
    np.testing.assert_allclose(retrieval.class_vectors(encode, names, templates), mean / np.linalg.norm(mean, axis=1, keepdims=True))
    for wrong in ([], ["a photo"]):
        with pytest.raises(UserError, match="prompt templates hold the class' name"):
            retrieval.class_vectors(encode, names, wrong)


def test_a_class_without_a_direction_is_named():
    """Opposite texts, and texts of zeros, gave NaN."""
    good = np.float32([[3, 4, 0], [3, 4, 0]])
    third = np.float32([1, 1, 1]) / 3
    for texts, why in (([third, -third], "its texts cancel out"), ([third, 0 * third], "a text of it has a vector of zeros")):
        with pytest.raises(UserError, match=f"class 1 has no direction, as .*{why}"):
            retrieval.ensemble(np.stack([good, texts]))
        with pytest.raises(UserError, match=f"class 'dog' has no direction, as .*{why}"):
            retrieval.class_vectors(lambda _: np.concatenate([good, texts]), ["cat", "dog"], ["a {}", "no {}"])
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(retrieval.ensemble(np.float64(good)[None] * scale), [[0.6, 0.8, 0]])


def test_mean_per_class():
    assert retrieval.mean_per_class([0, 0, 0, 1, 0], [0, 0, 0, 1, 1]) == pytest.approx((1 + 0.5) / 2)


PROCESS = Joint(image=Given(0.0), query=Gaussian(schedules.scaled(schedules.scaled_linear_beta(), 0.5), x0))
SHAPE = {"image": (4,), "query": (4,)}


def believed(noise):
    """A network that answers the image, and some of its own noisy input."""
    return lambda params, x, t: {"query": x["image"] + noise * x["query"]}


def test_seeds_are_averaged_and_belong_to_the_example():
    images, keys = jax.random.normal(jax.random.key(0), (64, 4)), example_keys(jax.random.key(1), 64)

    @jax.jit
    def error(keys):
        found = [retrieval.align(PROCESS, believed(0.5), None, keys, {"image": images}, SHAPE, steps=1, seeds=n) for n in (1, 16)]
        truth = images / jnp.linalg.norm(images, axis=1, keepdims=True)
        return [1 - (one * truth).sum(1).mean() for one in found], found

    (once, often), (one, _) = error(keys)
    assert once > 0.02 and often < 0.3 * once
    few = retrieval.align(PROCESS, believed(0.5), None, keys[5:7], {"image": images[5:7]}, SHAPE, steps=1)
    np.testing.assert_allclose(few, one[5:7], atol=1e-5)


def test_raw_outputs_are_guided_before_they_are_normalised():
    """Of an image 4 a and a null answer b: 4 a + (s - 1) (4 a - b), and not what unit vectors would give."""
    a, b = jnp.eye(4)[0], jnp.eye(4)[1]

    def apply(params, x, t):
        return {"query": jnp.where((t["image"] < 1)[:, None], 4 * a, b)}

    keys = example_keys(jax.random.key(1), 1)
    found = retrieval.align(PROCESS, apply, None, keys, {"image": jnp.ones((1, 4))}, SHAPE, steps=3, guidance=3.0, drop=("image",))
    expected = 12 * a - 2 * b
    np.testing.assert_allclose(found[0], expected / jnp.linalg.norm(expected), atol=1e-5)


@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_by_every_read_out(rows, value):
    """Nothing is larger than NaN: the right answer would always be the best one."""
    vectors, texts = (np.random.default_rng(seed).normal(size=(20, 16)) for seed in (0, 1))
    good = retrieval.scores(vectors, texts)
    broken, bad = vectors.copy(), good.copy()
    broken[rows], bad[rows] = value, value
    for call in (
        lambda: retrieval.scores(broken, texts), lambda: retrieval.scores(vectors, broken),
        lambda: retrieval.recalls(bad, np.eye(20, dtype=bool)), lambda: retrieval.ensemble(broken[None]), lambda: best("scores", bad),
        lambda: in_batches(lambda params, keys, x: x, None, example_keys(jax.random.key(0), 20), broken.astype(np.float32), 8),
    ):
        with pytest.raises(UserError, match="of (1|20) examples, the first of them .*not finite"):
            call()


def test_equal_scores_name_no_class():
    scores = np.asarray([[0.1, 0.9, 0.2], [0.7, 0.7, 0.1], [0.0, 0.0, 0.0]])
    predicted = best("scores", scores)
    assert predicted.tolist() == [1, -1, -1]
    assert accuracy(predicted, [1, 0, 0]) == pytest.approx(1 / 3) and accuracy([-1], [-1]) == 0
    assert confusion(predicted, [1, 0, 2], 3).sum() == 1


def test_elimination_names_no_class_where_losses_are_equal_or_not_finite():
    """A network of zeros tells no candidate from another; one of NaN tells nothing."""
    process = Joint(x=Gaussian(schedules.flow(), x0), label=Given(null=0))
    keys, given, shape = example_keys(jax.random.key(0), 3), {"x": jnp.ones((3, 2))}, {"x": (2,), "label": ()}
    labels = jnp.arange(4)

    def by(value):
        def apply(params, x, t):
            return {"x": value(x["label"])[:, None] * jnp.ones((1, 2))}

        return eliminated(process, apply, None, keys, given, "label", len(labels), shape, ((2, 2), (2, 1)))

    assert by(lambda label: 0.0 * label).tolist() == by(lambda label: jnp.nan * label).tolist() == [-1, -1, -1]
    assert by(lambda label: jnp.where(label == 2, 1.0, 0.0)).tolist() == [2, 2, 2]
