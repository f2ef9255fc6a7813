"""The paper's settings of MT-Diffusion: what they build is what their heads say, and they read, train and sample in small."""

import math
import pathlib

import jax
import numpy as np
import pytest
import small_sets
from PIL import Image

from mmdiff import config as configs
from mmdiff.data.latents import write_latents
from mmdiff.data.loader import batches
from mmdiff.errors import UserError
from mmdiff.nets.dit import SIZES
from mmdiff.training import perf, sharding
from mmdiff.training.step import init_state, make_step, step_of

FOLDER = pathlib.Path(__file__).parents[1] / "configs/mtdiffusion"
OTHERS = {
    "imagenet64_label": "label", "imagenet64_masked": "masked", "pairs_transition": "segmentation",
    "imagenet_representation": "representation"}
EVERY = pytest.mark.parametrize("name", OTHERS)


def load(name, **overrides):
    values = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    config, module = configs.load(str(FOLDER / f"{name}.py"), values)
    return module.build(config), config


def data_of(name):
    return {"data__source": "random", "data__vector": 24} if name == "imagenet_representation" else {"data__name": "random"}


def small(name, monkeypatch, **overrides):
    monkeypatch.setitem(SIZES, "XS", (2, 32, 4))
    size = {"model__patch": 16} if name == "imagenet_representation" else {"data__size": 16, "model__patch": 8}
    if name == "imagenet64_masked":
        size["patches__size"] = 4
    return load(name, model__size="XS", model__dtype="float32", **{**data_of(name), **size, **overrides})


@pytest.mark.parametrize("name, head, parameters", [
    ("imagenet64_label", "middle", 462_041_112), ("imagenet64_label", "output", 499_919_896), ("imagenet64_masked", "", 459_086_944),
    ("pairs_transition", "", 130_841_952), ("imagenet_representation", "", 680_307_472)])
def test_the_networks_and_settings_are_those_of_the_heads(name, head, parameters):
    experiment, config = load(name, **({"model__head": head} if head else {}))
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
    assert {key: modality.shape for key, modality in experiment.modalities.items()} == experiment.shape
    assert (config.head_weight, config.train.ema, config.train.learning_rate, config.sample.steps) == (0.1, 0.9999, 1e-4, 250)
    chain, schedule = experiment.process.chain, {"imagenet_representation": 4.036e-5}.get(name, 2.43e-9)
    assert chain.eta == 1 and float(chain.schedule(1.0)[0] ** 2) == pytest.approx(schedule, rel=1e-2)
    if name != "imagenet_representation":
        large, _ = load(name, data__size=128, model__patch=8)
        assert float(large.process.chain.schedule(1.0)[0] ** 2) == pytest.approx(4.036e-5, rel=1e-3)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name != "imagenet64_masked" else []) for name in OTHERS])
def test_the_shares_of_the_times(name, monkeypatch):
    """A new network predicts zeros: eps costs 1 where the image is noisy, the other modality its mean square (log K) where it is told."""
    experiment, config = small(name, monkeypatch)
    n, other, shares = 600, OTHERS[name], config.times
    batch = next(batches(experiment.train_data(), 0, n))
    _, metrics = jax.jit(experiment.loss)(jax.jit(experiment.init)(jax.random.key(0)), batch, jax.random.key(1))
    noisy = 1 - shares.get("clean", 0)
    told = shares.hidden if name == "imagenet64_masked" else 1 - shares.known
    # A pixel is uniform in [-1, 1]; of the masked ones 0.61 are seen: a tenth is hidden, of the others 32 % (ten of 4x4 in 16x16).
    size = {"label": math.log(1000), "segmentation": 1 / 3, "representation": 1.0, "masked": 0.61 / 3}[other]
    deviation = math.sqrt(0.25 / n)
    assert metrics["loss/image"] == pytest.approx(noisy, abs=4 * deviation)
    assert metrics[f"loss/{other}"] == pytest.approx(told * size, abs=4 * deviation * size)


@pytest.mark.slow
@EVERY
def test_a_step_and_samples(name, monkeypatch):
    experiment, config = small(name, monkeypatch)
    other = OTHERS[name]
    step = jax.jit(make_step(experiment.loss, experiment.optimizer))
    before = jax.jit(lambda key: init_state(experiment.init, experiment.optimizer, key, experiment.loss))(jax.random.key(0))
    batch = next(batches(experiment.train_data(), 0, 8))
    experiment.process.check(batch)
    after, metrics = step(before, batch)
    assert metrics["skipped"] == 0 and all(np.isfinite(value) for value in metrics.values())
    _, again = step(after, batch)
    assert np.isfinite(again["loss"])

    @jax.jit
    def draw(given):
        return experiment.sample(after.params, jax.random.split(jax.random.key(1), 2), given, steps=2, guidance=1.5)

    modality = experiment.modalities[other]
    held = {other: modality.random(np.random.default_rng(0), 2)}
    if name == "imagenet64_masked":
        held["mask"] = np.ones((2, 16, 16, 1), np.float32)
    for given in ({}, held, {"image": experiment.modalities["image"].random(np.random.default_rng(1), 2)}):
        drawn = jax.device_get(draw(given))
        assert {key: array.shape[1:] for key, array in drawn.items()} == experiment.shape
        assert all(np.isfinite(array).all() for array in drawn.values())
        for key, array in given.items():
            np.testing.assert_array_equal(drawn[key], array)
        if name != "imagenet_representation":
            assert np.abs(drawn["image"]).max() <= 1
        if name == "imagenet64_label":
            assert drawn["label"].max() < 1000  # no label stays hidden


def test_the_network_encodes_its_labels_in_one_more_pass(monkeypatch):
    """Also where there are 1,000 classes, and once in a step."""
    counts = {}
    for kind, shares in (("noisy", {}), ("plain", {"times__hidden": 0.0, "times__known": 1.0, "times__absent": 0.0, "times__clean": 0.0})):
        experiment, _ = small("imagenet64_label", monkeypatch, **shares)
        params = jax.eval_shape(experiment.init, jax.random.key(0))
        batch = {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in next(batches(experiment.train_data(), 0, 8)).items()}
        net = perf.flops(experiment.apply, params, *_inputs(experiment, batch))
        counts[kind] = perf.flops(experiment.loss, params, batch, jax.random.key(0)) / net
    assert 1.9 < counts["noisy"] < 2.2 and counts["noisy"] == counts["plain"], counts


def _inputs(experiment, batch):
    x = {key: batch[key] for key in experiment.shape}
    return x, {key: jax.ShapeDtypeStruct((8,), np.float32) for key in x}


@pytest.mark.slow
@EVERY
def test_the_full_width_lowers(name):
    experiment, config = load(name, **data_of(name))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    state = sharding.abstract_state(experiment.init, experiment.optimizer, mesh, experiment.rules, experiment.loss)
    example = {**experiment.train_data().take([0]), "index": np.zeros(1, np.uint32)}
    batch = {key: jax.ShapeDtypeStruct((config.train.global_batch, *array.shape[1:]), array.dtype) for key, array in example.items()}
    assert "bf16" in sharding.lower_step(step_of(experiment, config.train), state, batch, mesh).as_text()


def read(experiment, count, held_out):
    train = experiment.train_data()
    assert (len(train), len(experiment.test_data())) == (count, held_out)
    found = train.take(np.arange(2))
    experiment.process.check(found)
    return found


def test_imagenet(tmp_path, monkeypatch):
    small_sets.prepare(small_sets.ImageNet, tmp_path)
    for name in ("imagenet64_label", "imagenet64_masked"):
        found = read(small(name, monkeypatch, data__name="imagenet2012", data__dir=tmp_path)[0], 6, 3)
        assert found["image"].shape == (2, 16, 16, 3)
        np.testing.assert_array_equal(found["label"], [0, 7])


@pytest.mark.parametrize("name, other", [("cityscapes", "segmentation"), ("night2day", "night")])
def test_pairs(name, other, tmp_path, monkeypatch):
    for split, count in (("train", 3), ("val", 1)):
        (tmp_path / split).mkdir()
        for i in range(count):
            pixels = np.zeros((32, 64, 3), np.uint8)
            pixels[:, 32:] = 255
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
    experiment, _ = small("pairs_transition", monkeypatch, data__name=name, data__dir=tmp_path)
    found = read(experiment, 3, 1)
    assert set(found) == set(experiment.shape) == {"image", other}
    assert (found["image"] == (1 if name == "night2day" else -1)).all() and (found[other] == -found["image"]).all()


def test_latents_and_their_vectors(tmp_path, monkeypatch):
    made, _ = load("imagenet_representation", **data_of("imagenet_representation"))
    arrays = {key: modality.random(np.random.default_rng(0), 5) for key, modality in made.modalities.items()}
    for split in ("train", "val"):
        write_latents(tmp_path, split, [arrays], made.modalities)
    found = read(small("imagenet_representation", monkeypatch, data__source="latents", data__dir=tmp_path)[0], 5, 5)
    for key, array in arrays.items():
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], array[:2], atol=2e-3)  # stored in 16 bits


@EVERY
def test_mistakes(name):
    experiment, _ = load(name)  # without data: the doors are passed later
    with pytest.raises(UserError, match="config.data.dir is empty: name the folder of"):
        experiment.train_data()
    with pytest.raises(UserError, match="no DiT of size 'XXL'"):
        load(name, model__size="XXL")
