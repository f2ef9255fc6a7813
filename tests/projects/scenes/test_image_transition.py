"""The evaluator of pairs of images, with an oracle in the network's place: the truth is perfect, and what is no pair is found out."""

import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.data.modalities import Images
from mmdiff.data.sources import load_all
from mmdiff.data.token_modalities import ClassMaps
from mmdiff.evals.frechet import frechet_distance, real_distance
from mmdiff.processes import Aggregate, Gaussian, Hidden, MeanShift, absorbing, identity, moving_target, template, velocity
from mmdiff.projects.scenes import image_transition, paired_scenes
from mmdiff.projects.scenes.image_transition import ImageTransition, error, linear, miou
from mmdiff.projects.scenes.paired_scenes import PALETTE, PairedScenes

COUNT, SHAPE = 150, (16, 16, 3)
RATIOS = {"frechet_ratio_given", "frechet_ratio_joint", "frechet_ratio_absent"}
METRICS = {
    "night": {"error_joint", "error_shuffled"}
    | {f"error_{way}{name}" for way in ("predicted", "given") for name in ("", "_mean", "_linear")},
    "segmentation": {f"miou_{name}" for name in ("predicted", "given", "joint", "rule", "shuffled")},
}


@pytest.fixture(autouse=True)
def fewer_features(monkeypatch):
    """The Fréchet distance of 4 x 4 pixels: of all 768 numbers it takes seconds."""

    def few(images):
        return images.reshape(len(images), 4, 4, 4, 4, 3).mean((2, 4)).reshape(len(images), -1)

    for distance in (frechet_distance, real_distance):
        monkeypatch.setattr(image_transition, distance.__name__, lambda first, second, distance=distance: distance(first, second, few))


def config():
    return ml_collections.ConfigDict({"seed": 3, "sample": {"steps": 6, "guidance": 1.5}})


def measured(other, change=lambda figures, keys: figures):
    """The results of a model that knows the test scenes by heart, with a `change` of all that it draws or reads.

    The parameters are the scenes: what is found is tested to come from them.
    """
    train, test = PairedScenes("train", other, count=2 * COUNT), PairedScenes("test", other, count=COUNT)
    scenes = {name: jnp.asarray(load_all(test)[name]) for name in ("image", other)}

    def nearest(scenes, name, array):
        flat, known = (a.reshape(len(a), -1) for a in (array, scenes[name]))
        return ((known**2).sum(1) - 2 * flat @ known.T).argmin(1)

    def apply(scenes, x, t):
        found = scenes[other][nearest(scenes, "image", x["image"])]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(len(found)))
        out = jax.nn.one_hot(found, 11) if other == "segmentation" else found
        return {"image": jnp.zeros_like(x["image"]), other: change(out, keys)}

    def sample(scenes, keys, given, *, steps, guidance, absent=(), history=False):
        assert (steps, guidance) == (6, 1.5)
        rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, COUNT))(keys)
        if other in given:
            rows = nearest(scenes, other, given[other])
        sampled = {"image": change(scenes["image"][rows], keys), other: given.get(other, scenes[other][rows])}
        return {name: jnp.stack([array] * 7) for name, array in sampled.items()} if history else sampled

    encode, hidden, modality = {
        "segmentation": (template(np.zeros((11, 3))), absorbing(11, schedules.at_once()), ClassMaps(16, 16, PALETTE)),
        "night": (identity, Hidden(0.0), Images(*SHAPE, name="night")),
    }[other]
    experiment = types.SimpleNamespace(
        process=Aggregate(
            "image", {other: MeanShift(encode, moving_target())}, image=Gaussian(schedules.flow(), velocity), **{other: hidden}),
        apply=apply, sample=sample, train_data=lambda: train, test_data=lambda: test, shape={"image": SHAPE, other: modality.shape},
        modalities={"image": Images(*SHAPE), other: modality})  # fmt: skip
    return ImageTransition(other, batch=100)(experiment, scenes, config(), jax.random.key(0), 7)


def noise(figures, keys):
    return jax.vmap(lambda key: jax.random.uniform(key, figures.shape[1:], minval=-1.0, maxval=1.0))(keys)


def mean(figures, keys):
    return jnp.broadcast_to(figures.mean((0, 1, 2)), figures.shape)


@pytest.mark.parametrize("other", ["night", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_the_truth_is_perfect(other):
    found = measured(other)
    metrics = found.metrics
    assert set(metrics) == set(found.definitions) == METRICS[other] | RATIOS
    assert metrics["frechet_ratio_joint"] < 1  # draws are the test scenes, with replacement
    assert metrics["frechet_ratio_given"] == pytest.approx(1, rel=0.06)  # the test scenes, of which some share a segmentation
    if other == "night":
        assert metrics["error_predicted"] == metrics["error_given"] == 0
        assert metrics["error_joint"] < 1e-12 and metrics["error_shuffled"] > 0.1
        # The night is an affine map of the colours: one exact without a network, both ways.
        assert metrics["error_predicted_linear"] < 1e-10 and metrics["error_given_linear"] < 1e-10
        assert metrics["error_predicted_mean"] > 0.1 and metrics["error_given_mean"] > 0.3
    else:
        assert metrics["miou_predicted"] == 1 and metrics["miou_shuffled"] < 0.2
        assert metrics["miou_given"] == metrics["miou_rule"] > 0.9
        assert metrics["miou_joint"] > 0.9
    json.dumps(found.settings)
    assert found.settings["test_images"] == COUNT
    assert len(found.figures) == 6 and all(picture.caption and min(picture.image.size) > 100 for picture in found.figures.values())


@pytest.mark.parametrize("other", ["night", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_noise_is_as_bad_as_what_does_not_belong(other):
    metrics = measured(other, noise).metrics
    assert metrics["frechet_ratio_given"] > 3 and metrics["frechet_ratio_joint"] > 3 and metrics["frechet_ratio_absent"] > 3
    if other == "night":
        assert metrics["error_predicted"] > metrics["error_predicted_mean"]
        assert metrics["error_given"] > metrics["error_given_mean"] and metrics["error_joint"] > 0.1
        assert metrics["error_given_linear"] < 1e-10
    else:
        assert max(metrics["miou_given"], metrics["miou_joint"], metrics["miou_predicted"]) < 0.15 < 0.9 < metrics["miou_rule"]


def test_the_mean_scores_as_the_mean_fill():
    metrics = measured("night", mean).metrics
    for way in ("predicted", "given"):  # one colour for the whole batch and every pixel: a little worse than each pixel's mean
        assert 1 < metrics[f"error_{way}"] / metrics[f"error_{way}_mean"] < 1.25
    assert metrics["frechet_ratio_joint"] > 3


def test_miou_by_hand():
    true = np.array([[0, 0, 1, 1], [0, 0, 3, 3]])
    found = np.array([[0, 0, 1, 0], [0, 2, 3, 3]])
    # Class 0: 3 of 5; 1: 1 of 2; 2: 0 of 1; 3: 2 of 2; 4 is nowhere.
    assert miou(found, true, 5) == pytest.approx((3 / 5 + 1 / 2 + 0 + 1) / 4)
    assert miou(true, true, 5) == 1 and miou(found, true, 9) == miou(true, found, 4)


def test_linear_finds_an_affine_map_and_errors_are_mean_squares():
    rng = np.random.default_rng(0)
    train, test = (rng.uniform(-1, 1, (n, 4, 4, 3)) for n in (20, 5))
    np.testing.assert_allclose(linear(paired_scenes.night(test), paired_scenes.night(train), train), test, atol=1e-5)
    np.testing.assert_allclose(linear(test, train, np.full_like(train, 0.3)), 0.3, atol=1e-6)
    assert error(test, test + 2) == pytest.approx(4) and error(test.mean(0), test) == pytest.approx(test.var(0).mean())
