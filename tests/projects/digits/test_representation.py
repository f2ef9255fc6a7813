"""The evaluator of representations, with an oracle in the network's place: what belongs together is perfect, any pair is as any pair."""

import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmdiff import schedules
from mmdiff.data.modalities import Features, Images
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.processes import Aggregate, Gaussian, Hidden, MeanShift, moving_target, velocity
from mmdiff.projects.digits.representation import ImageRepresentation, cosine

SIZE, SETTINGS = 16, ("given", "given_unguided", "joint", "absent")
MATRIX = np.random.default_rng(0).normal(size=(64, SIZE))


def features(images):
    found = np.tanh((np.asarray(images, np.float64).reshape(-1, 64) + 0.7) @ MATRIX / 8)
    return (found / np.sqrt((found**2).mean(1, keepdims=True))).astype(np.float32)


def config():
    return ml_collections.ConfigDict({"seed": 3, "sample": {"steps": 6, "guidance": 1.5}})


def measured(train, test, belongs=True):
    """The results of a model that knows every image and its representation by heart, or (not `belongs`) gives those of another."""
    sources = []
    for source, count in ((train, 500), (test, 200)):
        arrays = {name: array[:count] for name, array in load_all(source).items()}
        sources.append(ArraySource({**arrays, "representation": features(arrays["image"])}))
    names = ("image", "representation")
    known = {name: jnp.concatenate([jnp.asarray(source.arrays[name]) for source in sources]) for name in names}
    guidances = []

    def row(known, name, array):
        flat, all_of_them = (a.reshape(len(a), -1) for a in (array, known[name]))
        found = ((flat[:, None] - all_of_them) ** 2).sum(-1).argmin(1)
        return found if belongs else (17 * found + 131) % len(all_of_them)

    def apply(known, x, t):
        return {"image": jnp.zeros_like(x["image"]), "representation": known["representation"][row(known, "image", x["image"])]}

    def sample(known, keys, given, *, steps, guidance, absent=(), history=False):
        assert steps == 6
        guidances.append(guidance)
        rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, 500))(keys)
        other = rows if belongs else (17 * rows + 131) % 500
        sampled = {"image": known["image"][rows], "representation": known["representation"][other]}
        if given:
            sampled = {**given, "image": known["image"][row(known, "representation", given["representation"])]}
        return {name: jnp.stack([array] * 7) for name, array in sampled.items()} if history else sampled

    experiment = types.SimpleNamespace(
        process=Aggregate(
            "image", {"representation": MeanShift(lambda x: jnp.zeros((len(x), 8, 8, 1)), moving_target())},
            image=Gaussian(schedules.flow(), velocity), representation=Hidden(0.0)),
        apply=apply, sample=sample, train_data=lambda: sources[0], test_data=lambda: sources[1],
        shape={"image": (8, 8, 1), "representation": (SIZE,)},
        modalities={"image": Images(8, 8, 1, levels=17), "representation": Features(SIZE)})  # fmt: skip
    found = ImageRepresentation(features, batch=250)(experiment, known, config(), jax.random.key(0), 7)
    assert guidances == [1.5, 1.0, 1.0, 1.0, 1.5]  # the settings in their order, and the chain
    return found


def test_what_belongs_together_is_perfect(train, test):
    found = measured(train, test)
    metrics = found.metrics
    assert set(metrics) == set(found.definitions)
    for name in ("given", "given_unguided", "joint", "predicted"):
        assert metrics[f"cosine_{name}"] == pytest.approx(1, abs=1e-4)
    assert metrics["class_agreement_given"] == metrics["class_agreement_given_unguided"] > 0.99
    assert all(metrics[f"frechet_ratio_{name}"] < 2 for name in SETTINGS)
    assert metrics["frechet_ratio_given"] == pytest.approx(1)  # the training images themselves
    assert not {"cosine_absent", "class_agreement_absent", "class_agreement_joint"} & set(metrics)
    json.dumps(found.settings)
    assert len(found.figures) == 2
    assert all(picture.caption and min(picture.image.size) > 100 for picture in found.figures.values())


def test_what_does_not_is_as_any_pair(train, test):
    metrics = measured(train, test, belongs=False).metrics
    assert metrics["cosine_any"] + 0.1 < metrics["cosine_same_class"] < 0.99
    for name in ("given", "given_unguided", "joint", "predicted"):
        assert metrics[f"cosine_{name}"] == pytest.approx(metrics["cosine_any"], abs=0.06)
    assert metrics["class_agreement_given"] < 0.2
    assert metrics["frechet_ratio_given"] < 2  # the images alone are right


def test_cosines():
    a = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(cosine(a, np.array([[5.0, 0.0], [1.0, -1.0], [0.0, -1.0]])), [1, 0, -1], atol=1e-7)
