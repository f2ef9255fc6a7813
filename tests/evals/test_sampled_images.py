"""The evaluator of sampled images, of models whose samples are known."""

import types

import flax.linen as nn
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmdiff.data.encoded_modalities import EncodedLatents
from mmdiff.data.modalities import Images, Latents
from mmdiff.data.sources import ArraySource
from mmdiff.encoders import preprocessing
from mmdiff.errors import UserError
from mmdiff.evals import sampled_images
from mmdiff.evals.frechet import frechet_distance
from mmdiff.evals.sampled_images import SampleMetrics, sample_metrics

CONFIG = ConfigDict({"sample": {"steps": 2, "guidance": 1.0}})
LEVELS = np.array([-0.5, 0.0, 0.5], np.float32)


class Means(nn.Module):
    def features(self, images):
        return {"1280": images.mean(1)[..., 0], "logits": 50 * images[:, 0, :3, 0]}


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    preprocess = preprocessing.Preprocessing(8, "square", divisor=127.5, mean=1.0)
    encoder = types.SimpleNamespace(kind="efficientnet_lite0", net=Means(), params={}, preprocessing=preprocess, fingerprint="small")
    monkeypatch.setattr(sampled_images, "open_network", lambda kind, path: encoder)


def split(seed, count):
    """Images of three shades with noise, and their labels."""
    stream = np.random.default_rng(seed)
    label = (np.arange(count) % 3).astype(np.int32)
    image = np.clip(LEVELS[label][:, None, None, None] + stream.normal(0, 0.3, (count, 8, 8, 1)), -1, 1)
    return ArraySource({"image": np.rint(127.5 * image + 127.5).astype(np.float32) / np.float32(127.5) - 1, "label": label})


def experiment():
    return types.SimpleNamespace(
        modalities={"image": Images(8, 8, 1), "latent": Latents(8, 8, 4)}, train_data=lambda: split(0, 90), test_data=lambda: split(1, 45))


def measure(monkeypatch, made):
    """The evaluator, of samples that are these."""

    def sample_batched(experiment, params, key, given, count, *, batch, steps, guidance):
        assert (count, batch, steps, guidance) == (45, 7, 2, 1.0)
        np.testing.assert_array_equal(given["label"], np.arange(45) % 3)  # the conditions of the held-out images
        return {"image": made}

    monkeypatch.setattr(sampled_images, "sample_batched", sample_batched)
    return SampleMetrics({"kind": "efficientnet_lite0"}, condition="label", batch=7)(experiment(), None, CONFIG, None, 0)


def features(images):
    return (np.rint(127.5 * images + 127.5) / 127.5 - 1).mean(1)[..., 0]


def test_samples_as_good_as_training_images_are_as_far_from_held_out_ones(monkeypatch):
    train, test = split(0, 90).take(np.arange(45) * 2)["image"], split(1, 45).take(np.arange(45))["image"]
    found = measure(monkeypatch, train)
    metrics = found.metrics
    assert metrics["lite0-FD"] == pytest.approx(frechet_distance(features(train), features(test)), rel=1e-3)
    for name in ("FD", "IS", "precision", "recall", "KID"):
        assert metrics[f"lite0-{name}"] == metrics[f"lite0-{name}_real"]
    assert 0.5 < metrics["lite0-precision"] <= 1
    far = measure(monkeypatch, np.clip(train + 0.5, -1, 1)).metrics
    assert far["lite0-FD"] > 20 * metrics["lite0-FD"] and far["lite0-FD_real"] == metrics["lite0-FD_real"]
    assert far["lite0-KID"] > far["lite0-KID_real"]
    convention = found.settings["lite0-FD"]
    assert convention["network"] == "efficientnet_lite0" and convention["samples"] == convention["reference_images"] == 45
    assert set(found.definitions) == set(metrics)


def test_latents_are_measured_as_the_images_that_they_decode_to(monkeypatch):
    train, test = split(0, 90), split(1, 45)
    image = measure(monkeypatch, train.take(np.arange(45) * 2)["image"])

    def latent(source):  # an autoencoder that halves the range
        arrays = source.take(np.arange(len(source)))
        return ArraySource({"latent": arrays["image"] / 2, "label": arrays["label"]})

    autoencoder = types.SimpleNamespace(path="x", decode=lambda latents: np.repeat(2 * latents, 3, -1))
    modality = EncodedLatents(8, 8, 1, encoder=autoencoder)
    model = types.SimpleNamespace(modalities={"latent": modality}, train_data=lambda: latent(train), test_data=lambda: latent(test))
    made = {"latent": latent(train).take(np.arange(45) * 2)["latent"]}
    monkeypatch.setattr(sampled_images, "sample_batched", lambda *args, **options: made)
    found = SampleMetrics({"kind": "efficientnet_lite0"}, target="latent", condition="label", batch=7)(model, None, CONFIG, None, 0)
    assert found.settings["lite0-FD"]["decoded"] and not image.settings["lite0-FD"]["decoded"]
    for name, value in image.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=0.02, abs=1e-3), name


def test_only_images_have_features_and_only_if_a_network_is_named():
    with pytest.raises(UserError, match="latent is neither"):
        SampleMetrics({"kind": "inception", "path": "x"}, target="latent")(experiment(), None, CONFIG, None, 0)
    assert sample_metrics({"kind": "", "path": ""}, most=5) == ()
    assert sample_metrics(ConfigDict({"kind": "dinov2", "path": "x"}), most=5) == (SampleMetrics({"kind": "dinov2", "path": "x"}, most=5),)


@pytest.mark.parametrize("limits", [True, False])
def test_what_may_be_the_best_is_what_is_measured(limits, monkeypatch):
    evaluator = SampleMetrics({"kind": "efficientnet_lite0"}, condition="label", batch=7, limits=limits)
    prepared = evaluator.prepared(experiment(), CONFIG)
    made = split(0, 45).take(np.arange(45))["image"]
    monkeypatch.setattr(sampled_images, "sample_batched", lambda *args, **options: {"image": made})
    metrics = prepared(experiment(), None, CONFIG, None, 0).metrics
    plain = {name for name in metrics if not name.endswith(("_bias", "_std", "_real"))}
    assert set(prepared.better) == plain == set(evaluator.better) and prepared.better["lite0-FD"] == "min"
    assert ("lite0-FD_real" in metrics) == limits
    few = SampleMetrics({"kind": "efficientnet_lite0"}, condition="label", most=3, limits=False).prepared(experiment(), CONFIG)
    assert set(few.better) == {"lite0-FD", "lite0-KID"}  # too few for splits and for a third neighbour


def test_a_stored_reference_takes_the_place_of_held_out_images(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled_images, "sample_batched", lambda *args, **options: {"image": split(0, 45).take(np.arange(45))["image"]})
    held = SampleMetrics({"kind": "efficientnet_lite0"}, limits=False)(experiment(), None, CONFIG, None, 0).metrics
    shown = Images(8, 8, 1).show(split(1, 45).take(np.arange(45))["image"])
    np.savez(tmp_path / "images.npz", arr_0=shown.repeat(3, -1))
    stored = SampleMetrics({"kind": "efficientnet_lite0"}, limits=False, reference=str(tmp_path / "images.npz"))
    found = stored(experiment(), None, CONFIG, None, 0)
    assert found.metrics == pytest.approx(held, rel=1e-6)
    assert found.settings["lite0-FD"]["reference"] == str(tmp_path / "images.npz")
