import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.data.modalities import Labels
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.data.token_modalities import TokenImages
from mmdiff.evals.likelihood import held_out_bits
from mmdiff.experiment import Experiment
from mmdiff.processes import Given, Joint, MaskReplace, absorbing
from mmdiff.projects.digits.calls import Calls
from mmdiff.projects.digits.class_token_images import ClassTokenImages, by_class, independent_bits, raster_markov_bits
from mmdiff.projects.digits.digits import digits_tokens

CONFIG = types.SimpleNamespace(sample=types.SimpleNamespace(steps=4, guidance=1.5))
SPACED = ("conditional_agreement", "classification_accuracy_score", "frechet_ratio")


@pytest.fixture(scope="module")
def tokens(data_dir):
    return {split: digits_tokens(split, data_dir) for split in ("train", "test")}


def experiment(tokens, wrong=0):
    """A model that draws real training digits of class label + wrong, and believes in pixels that are independent given the class.

    With fewer than four steps half of its samples are of another class.
    """
    train = load_all(tokens["train"])
    order = np.argsort(train["label"], kind="stable")
    digits = jnp.asarray(train["tokens"][order])
    starts, counts = jnp.searchsorted(train["label"][order], jnp.arange(10)), jnp.bincount(train["label"])
    frequencies = np.ones((10, 64, 17))
    np.add.at(frequencies, (train["label"][:, None], np.arange(64), train["tokens"]), 1)
    frequencies = frequencies / frequencies.sum(-1, keepdims=True)

    def apply(log_p, x, t):
        return {"tokens": jnp.where((x["label"] < 10)[:, None, None], log_p[jnp.minimum(x["label"], 9)], 0.0)}

    def sample(params, keys, given, *, steps, guidance, absent=()):
        assert guidance == 1.5 and not absent
        odd = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 0, 2))(keys) * (steps < 4)
        kind = (given["label"] + wrong + odd) % 10
        at = jax.vmap(lambda key, count: jax.random.randint(jax.random.fold_in(key, 1), (), 0, count))(keys, counts[kind])
        return {"tokens": digits[starts[kind] + at], "label": given["label"]}

    made = Experiment(
        process=Joint(tokens=absorbing(17), label=Given(null=10)),
        init=None,
        apply=apply,
        loss=None,
        optimizer=None,
        train_data=lambda: tokens["train"],
        validation_data=None,
        test_data=lambda: tokens["test"],
        shape={"tokens": (64,), "label": ()},
        sample=sample,
        modalities={"tokens": TokenImages(8, 8, 17), "label": Labels(10)},
    )
    return made, jnp.log(jnp.asarray(frequencies, jnp.float32))


@pytest.fixture(scope="module")
def results(tokens):
    made, params = experiment(tokens)
    return ClassTokenImages(bound_steps=10)(made, params, CONFIG, jax.random.key(0), 7)


def test_real_digits_get_full_marks(results):
    metrics = results.metrics
    assert set(metrics) == set(results.definitions)
    assert metrics["conditional_agreement"] > 0.99
    assert 0.97 < metrics["classification_accuracy_score"] <= 0.992 and metrics["svm_real_accuracy"] == pytest.approx(0.988, abs=0.004)
    assert 1 < metrics["frechet_ratio"] < 1.4  # sampling with replacement leaves out a third of the digits
    assert results.settings["label_conditioned_samples"] == 1097 and results.settings["sample_steps"] == 4
    assert {"conditional_samples", "bits_per_dim"} <= set(results.settings["evaluation_seconds"])


def test_wrong_digits_are_found_out(tokens):
    made, params = experiment(tokens, wrong=1)
    found = ClassTokenImages(bound_steps=1).samples(made, params, jax.random.key(0), 4, 1.5).metrics
    assert found["conditional_agreement"] < 0.05 and found["classification_accuracy_score"] < 0.05
    assert found["frechet_ratio"] < 1.5  # the images alone are right


def test_the_bound_of_an_independent_model_is_its_likelihood(results):
    """With independent pixels the absorbing chain's bound is tight, and what it estimates is known exactly."""
    metrics = results.metrics
    assert metrics["bits_per_dim"] == pytest.approx(metrics["bits_per_dim_independent_class"], rel=0.01)
    assert metrics["bits_per_dim_independent"] == pytest.approx(2.43, abs=0.005)
    assert metrics["bits_per_dim_raster_markov"] == pytest.approx(2.33, abs=0.005)
    assert metrics["bits_per_dim_independent_class"] == pytest.approx(2.23, abs=0.005)


def test_the_bound_knows_the_label(tokens):
    made, params = experiment(tokens)
    test = {name: array[:100] for name, array in load_all(tokens["test"]).items()}
    right = held_out_bits(made, params, jax.random.key(0), test, "tokens", 5, 64)
    wrong = held_out_bits(made, params, jax.random.key(0), {**test, "label": (test["label"] + 1) % 10}, "tokens", 5, 64)
    assert right.shape == (100,) and right.mean() < wrong.mean() - 0.5
    uniform = held_out_bits(made, 0 * params, jax.random.key(0), test, "tokens", 5, 64)
    assert uniform.mean() == pytest.approx(np.log2(17), rel=0.02)


def test_the_bound_of_the_exact_belief_is_the_entropy():
    """Uniform tokens, and a network that knows what a replaced or masked token leaves possible: log2 K, whatever the chain."""
    process = MaskReplace(16, schedules.vqd_paper(8))

    def apply(params, x, t):
        seen = jax.nn.one_hot(x["tokens"], 17)
        return {"tokens": jnp.log(jnp.maximum(process.pull(seen, None, t["tokens"])[..., :16], 1e-30))}

    joint = Joint(tokens=process, label=Given(null=10))
    made = types.SimpleNamespace(process=joint, apply=apply, shape={"tokens": (32,), "label": ()})
    data = {"tokens": np.random.default_rng(0).integers(0, 16, (400, 32), np.int32), "label": np.zeros(400, np.int32)}
    bits = held_out_bits(made, {}, jax.random.key(0), data, "tokens", 8, 400)
    assert bits.mean() == pytest.approx(4, abs=4 * bits.std() / np.sqrt(400))


def test_counting_models():
    """On data that are made by them they reach the entropy; add-one smoothing gives what never came up a chance."""
    rng = np.random.default_rng(0)
    coins = rng.integers(0, 2, (20_000, 3))
    repeated = np.repeat(rng.integers(0, 2, (20_000, 1)), 3, 1)
    assert independent_bits(coins, coins[:1000], 2) == pytest.approx(1, abs=1e-3)
    assert independent_bits(repeated, repeated[:1000], 2) == pytest.approx(1, abs=1e-3)
    assert raster_markov_bits(repeated, repeated[:1000], 2) == pytest.approx(1 / 3, abs=1e-3)
    assert independent_bits(np.zeros((6, 1), int), np.ones((1, 1), int), 2) == 3  # (0 + 1) / (6 + 2)
    labels = repeated[:, 0]
    known = by_class(independent_bits, repeated, repeated[:1000], labels, labels[:1000], 2)
    assert known == pytest.approx(0, abs=1e-3)


def test_pictures(results):
    assert set(results.figures) == {"Label to image", "Real images", "Label to image, as the SVM sees it"}
    for title, picture in results.figures.items():
        assert picture.caption
        assert picture.image.startswith("<svg") if "SVM" in title else min(picture.image.size) > 100


def test_quality_against_calls(tokens):
    made, params = experiment(tokens)
    small = ArraySource({name: array[:300] for name, array in load_all(tokens["train"]).items()})
    made = Experiment(**{**made.__dict__, "train_data": lambda: small})
    mismatched, _ = experiment(tokens, wrong=1)
    compare = Calls(ClassTokenImages(1, per_class=10), SPACED, steps=[4, 2], samplers={"other": mismatched.sample})
    found = compare(made, params, CONFIG, jax.random.key(0), 7)
    expected = {f"{name}{sampler}_at_{steps}_steps" for name in SPACED for sampler in ("", "_other") for steps in (4, 2)}
    assert set(found.metrics) == set(found.definitions) == expected
    assert found.metrics["conditional_agreement_at_4_steps"] > 0.9  # the SVM of 300 digits errs
    assert 0.3 < found.metrics["conditional_agreement_at_2_steps"] < 0.7
    assert found.metrics["conditional_agreement_other_at_4_steps"] < 0.1
    assert len(found.figures) == 3 and all(picture.image.startswith("<svg") for picture in found.figures.values())
    alone = ClassTokenImages(1, per_class=10).samples(made, params, jax.random.key(0), 4, 1.5)
    assert alone.metrics["frechet_ratio"] == found.metrics["frechet_ratio_at_4_steps"]
