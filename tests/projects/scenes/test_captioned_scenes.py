import types

import jax
import numpy as np
import pytest

from mmdiff.data.sources import load_all
from mmdiff.data.token_modalities import Texts
from mmdiff.experiment import Experiment
from mmdiff.projects.digits.digits import digits_tokens
from mmdiff.projects.scenes import scenes
from mmdiff.projects.scenes.captioned_scenes import CaptionedScenes, Judge
from mmdiff.projects.scenes.scenes import ATTRIBUTES, Scenes, captions, render, tokenizer

CONFIG = types.SimpleNamespace(sample=types.SimpleNamespace(steps=4, guidance=1.5))


@pytest.fixture(scope="module")
def judge():
    return Judge(16)


@pytest.mark.parametrize("split", ["test", "held_out"])
def test_the_judge_reads_real_scenes(judge, split):
    real = load_all(Scenes(split))
    found = judge(real["image"])
    right = {name: np.mean(found[name] == real[name]) for name in ATTRIBUTES}
    assert right["digit"] > 0.98
    assert min(right[name] for name in ("colour", "background", "size", "position")) >= 0.999
    noisy = judge(np.clip(real["image"] + np.random.default_rng(0).normal(0, 0.15, real["image"].shape), -1, 1))
    right = {name: np.mean(noisy[name] == real[name]) for name in ATTRIBUTES}
    assert right["digit"] > 0.97 and min(right.values()) > 0.97


@pytest.mark.slow
def test_the_judge_on_a_larger_canvas():
    real = load_all(Scenes("test", size=24, count=300))
    found = Judge(24)(real["image"])
    assert np.mean(found["digit"] == real["digit"]) > 0.97
    for name in ("colour", "background", "size", "position"):
        np.testing.assert_array_equal(found[name], real[name])


def test_the_judge_has_an_answer_to_anything(judge):
    odd = np.stack([np.full((16, 16, 3), -1.0), np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)), np.ones((16, 16, 3))])
    for name, found in judge(odd).items():
        assert found.shape == (3,) and set(found.tolist()) <= set(range(len(ATTRIBUTES[name])))


def painter(change=lambda said: said):
    """A decoder that paints what the caption, which it gets for tokens, says: with real training digits."""
    digits = digits_tokens("train").arrays
    first = [np.flatnonzero(digits["label"] == c)[:20] for c in range(10)]
    every = scenes._combinations(np.arange(10), False), scenes._combinations(np.arange(10), True)
    every = {name: np.concatenate([part[name] for part in every]) for name in ATTRIBUTES}
    place = {caption: i for i, caption in enumerate(captions(every))}

    def decode(tokens):
        rows = np.array([place[caption] for caption in tokenizer().decode(tokens)])
        said = change({name: every[name][rows] for name in ATTRIBUTES})
        ink = digits["tokens"][[first[c][i % 20] for i, c in enumerate(said["digit"])]].reshape(-1, 8, 8) / 16
        return render(ink, said, 16) / np.float32(127.5) - 1

    return decode


def experiment():
    def sample(params, keys, given, *, steps, guidance, absent=()):
        assert (steps, guidance) == (4, 1.5)
        return {"tokens": given["text"], **given}

    shape = {"tokens": (16,), "text": (16,)}
    modalities = {"tokens": types.SimpleNamespace(images=painter()), "text": Texts(tokenizer())}
    parts = {"process": None, "init": None, "apply": None, "loss": None, "optimizer": None, "train_data": None}
    parts |= {"validation_data": None, "test_data": None}
    return Experiment(**parts, shape=shape, sample=sample, modalities=modalities)


def measure(**options):
    return CaptionedScenes(count=400, batch=100, **options)(experiment(), None, CONFIG, jax.random.key(0), 7)


@pytest.mark.slow
def test_right_pictures_get_full_marks():
    found = measure()
    metrics = found.metrics
    assert set(metrics) == set(found.definitions)
    for name, value in metrics.items():
        if name.endswith("_correctness") or name.startswith("prompt_correctness"):
            assert value > 0.96, name
    assert 0.8 < metrics["frechet_ratio"] < 1.3
    assert found.settings["samples_per_caption_set"] == 400
    assert set(found.figures) == {"Caption to image", "Real scenes"}
    assert all(min(picture.image.size) > 500 and picture.caption for picture in found.figures.values())


def shift(name):
    return lambda said: {**said, name: (said[name] + 1) % len(ATTRIBUTES[name])}


@pytest.mark.parametrize("name", ["digit", pytest.param("position", marks=pytest.mark.slow)])
def test_one_wrong_attribute_makes_a_picture_wrong(name):
    metrics = measure(decode=painter(shift(name))).metrics
    assert metrics["prompt_correctness"] < 0.03 and metrics["prompt_correctness_seen"] < 0.03
    assert metrics[f"{name}_correctness"] < 0.03
    for other in {"digit", "colour", "position", "size", "background"} - {name}:
        assert metrics[f"{other}_correctness"] > 0.97
    assert metrics["prompt_correctness_real"] > 0.96


@pytest.mark.slow
def test_another_size_or_background_is_seen_but_allowed():
    def change(said):
        other = np.where(said["colour"] == 4, 5, 4)  # white, or black behind a white digit
        return {**said, "size": 1 - said["size"], "background": other}

    metrics = measure(decode=painter(change)).metrics
    assert metrics["prompt_correctness"] > 0.97 and metrics["size_correctness"] < 0.03 and metrics["background_correctness"] < 0.3


def test_noise_is_no_scene():
    metrics = measure(decode=lambda tokens: np.random.default_rng(0).uniform(-1, 1, (len(tokens), 16, 16, 3))).metrics
    assert metrics["prompt_correctness"] < 0.05 and metrics["frechet_ratio"] > 3
