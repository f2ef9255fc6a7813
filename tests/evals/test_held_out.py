"""Metrics on held-out data, of models that are known exactly: what is right scores as right, copies as copies, nonsense as chance."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmdiff import losses, schedules, times
from mmdiff.data import bpe
from mmdiff.data.modalities import Features, Images, Labels
from mmdiff.data.sources import ArraySource
from mmdiff.data.token_modalities import Texts
from mmdiff.errors import UserError
from mmdiff.evals.held_out import HeldOut, LabelAccuracy
from mmdiff.experiment import Experiment
from mmdiff.processes import Gaussian, Given, Joint, absorbing, velocity

CONFIG = ConfigDict({"seed": 0, "sample": {"steps": 2, "guidance": 1.0}})
WORDS = bpe.train(["dark", "grey", "light"], length=8, size=300)
MEANS, NOISE = np.array([-0.8, 0.0, 0.8], np.float32), 0.05  # of the classes, and of a pixel


def split(name):
    """Images of three shades with a little noise, their classes, and captions that say the shade."""
    rng = np.random.default_rng(("train", "validation", "test").index(name))
    label = (np.arange(60 if name == "train" else 24) % 3).astype(np.int32)
    image = (MEANS[label][:, None, None, None] + rng.normal(0, NOISE, (len(label), 16, 16, 1))).astype(np.float32)
    image = np.rint(127.5 * (image + 1)) / np.float32(127.5) - 1  # as files have them
    return ArraySource({"image": image, "label": label, "caption": WORDS.encode(["dark", "grey", "light"])[label]})


def experiment(condition, sample="exact", learnt=True):
    """Knows the shade of every class. Its samples are exact, copies of training images, or of the class after the one that is asked for."""
    parts = {"image": Gaussian(schedules.flow(), velocity)}
    parts[condition] = absorbing(3) if condition == "label" and learnt else Given(null=3 if condition == "label" else 0)
    process = Joint(**parts)
    texts = jnp.asarray(WORDS.encode(["dark", "grey", "light"]))

    def known(value):
        """p(class | condition), [B, 3]."""
        match = value[:, None] == jnp.arange(3) if condition == "label" else (value[:, None] == texts).all(-1)
        return jnp.where(match.any(-1, keepdims=True), match, 1 / 3)

    def apply(params, x, t):
        level, time = x["image"].mean((1, 2, 3)), t["image"][:, None, None, None]
        mean = (known(x[condition]) @ jnp.asarray(MEANS))[:, None, None, None]
        # The posterior mean of N(mean, NOISE^2) given x = (1 - t) x0 + t eps.
        gain = (1 - time) * NOISE**2 / ((1 - time) ** 2 * NOISE**2 + time**2)
        clean = mean + gain * (x["image"] - (1 - time) * mean)
        out = {"image": (x["image"] - clean) / jnp.maximum(time, 1e-4)}
        return out | ({"label": -50 * (level[:, None] - jnp.asarray(MEANS)) ** 2} if condition == "label" else {})

    def draw(params, keys, given, *, steps, guidance, absent=(), history=False):
        value = given.get(condition, jnp.zeros((len(keys), *process.parts[condition].prior(keys, ()).shape[1:]), jnp.int32))
        value = value if condition in given or condition == "label" else jnp.broadcast_to(texts[0], (len(keys), 8))
        label = known(value).argmax(-1)
        if sample == "wrong":
            label = (label + 1) % 3
        noise = jax.vmap(lambda key: NOISE * jax.random.normal(key, (16, 16, 1)))(keys)
        images = jnp.asarray(MEANS)[label][:, None, None, None] + noise
        if sample == "copies":
            images = jnp.asarray(split("train").arrays["image"])[label]
        return {"image": images, condition: value}

    modalities = {"image": Images(16, 16, 1), "label": Labels(3), "caption": Texts(WORDS, name="caption")}
    modalities = {name: modalities[name] for name in ("image", condition)}
    noise_levels = times.joint(**{"image": times.uniform(), condition: 0.0})
    return Experiment(
        process=process, modalities=modalities, init=lambda key: {}, apply=apply, sample=draw, data=split, optimizer=None,
        loss=losses.diffusion(process, apply, noise_levels, losses.of_parts(process, image=1.0)))


@pytest.fixture(scope="module")
def exact():
    return HeldOut(condition="label", most=60, draws=16, batch=32)(experiment("label"), {}, CONFIG, jax.random.key(0), 7)


def test_an_exact_model_of_classes(exact):
    metrics = exact.metrics
    assert metrics["label_accuracy"] == metrics["sample_agreement"] == metrics["real_agreement"] == 1.0
    assert 0.8 < metrics["novelty"] < 1.2 and 0.3 < metrics["frechet_ratio"] < 3
    assert metrics["held_out_loss"] == metrics["held_out_loss_image"]
    entropy = 0.5 * math.log2(2 * math.pi * math.e * NOISE**2) - math.log2(2 / 255)  # of a pixel on levels 2 / 255 apart
    assert entropy - 0.05 < metrics["bits_per_dim"] < entropy + 0.8  # a bound: the model does not know of levels
    assert set(exact.definitions) == set(metrics) and exact.settings["held_out_examples"] == 24
    assert set(exact.figures) == {
        "Image to label", "Samples and their nearest training images", "Samples", "Joint samples", "Real data"}


def test_copies_and_samples_of_other_classes_are_told_from_good_ones(exact):
    evaluator = HeldOut(condition="label", most=60, draws=4, batch=32)
    train, test, keys = split("train").arrays, split("test").arrays, jax.random.split(jax.random.key(0), 60)
    for sample, metric, most in (("copies", "novelty", 0.05), ("wrong", "sample_agreement", 0.0)):
        made = experiment("label", sample).sample({}, keys, {"label": train["label"]}, steps=2, guidance=1)
        metrics = evaluator._quality(experiment("label"), np.asarray(made["image"]), train, test)[0]
        assert metrics[metric] <= most, (sample, metrics)


def test_captions_are_found_again():
    evaluator = HeldOut(condition="caption", most=60, draws=4, batch=32)
    metrics, definitions, _ = evaluator._recall(experiment("caption"), {}, jax.random.key(0), split("test").arrays)
    assert metrics == {"caption_recall": 1.0} and "24 held-out images" in definitions["caption_recall"]
    assert "(by chance 0.33)" in definitions["caption_recall"]
    one = {name: array[:3:3] for name, array in split("test").arrays.items()}
    assert evaluator._recall(experiment("caption"), {}, jax.random.key(0), one) == ({}, {}, {})


def test_the_accuracy_alone():
    found = LabelAccuracy(most=10, batch=4)(experiment("label"), {}, CONFIG, jax.random.key(0), 1)
    assert found.metrics == {"label_accuracy": 1.0} and "10 held-out examples" in found.definitions["label_accuracy"]
    assert list(found.figures) == ["Image to label"] and found.settings["label_accuracy_examples"] == 10


def test_vectors_have_no_grids_and_a_model_that_learns_no_label_no_accuracy():
    process = Joint(x=Gaussian(schedules.flow(), velocity), label=Given(null=2))

    def apply(params, x, t):
        return {"x": x["x"]}

    def draw(params, keys, given, **options):
        return {"x": jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys), **given}

    def data(name):
        rng = np.random.default_rng(len(name))
        return ArraySource({"x": rng.standard_normal((50, 2), np.float32), "label": (np.arange(50) % 2).astype(np.int32)})

    built = Experiment(
        process=process, modalities={"x": Features(2, "x"), "label": Labels(2)}, init=lambda key: {}, apply=apply, sample=draw, data=data,
        optimizer=None,
        loss=losses.diffusion(process, apply, times.joint(x=times.uniform(), label=0.0), losses.of_parts(process, x=1.0)))
    found = HeldOut("x", "label", most=50, batch=20)(built, {}, CONFIG, jax.random.key(0), 1)
    assert set(found.metrics) == {
        "held_out_loss", "held_out_loss_x", "novelty", "frechet_ratio", "sample_agreement", "real_agreement"} and not found.figures
    one = types.SimpleNamespace(test_data=lambda: ArraySource({"x": np.zeros((1, 2))}), train_data=lambda: data("train"))
    with pytest.raises(UserError, match="too few to measure"):
        HeldOut("x")(one, {}, CONFIG, jax.random.key(0), 1)
