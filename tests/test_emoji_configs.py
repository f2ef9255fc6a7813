"""The config of emoji by the command line, in small: made-up pictures, trained, measured while it trains and after it, sampled."""

import functools
import json

import jax
import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.data import CacheWriter
from mmdiff.data.sources import RandomSource
from mmdiff.errors import UserError
from mmdiff.nets.tokenizers import VQAutoencoder
from mmdiff.projects.emoji.emoji import SPLITS, emoji_source, emoji_tokenizer
from tests.small_sets import emoji

NAME = "configs/joint/emoji_tokens.py"
SMALL = [f"--config.{value}" for value in (
    "train.steps=2", "train.global_batch=8", "train.eval_every=2", "train.log_every=1", "train.tensorboard=false", "train.metrics_every=2",
    "train.checkpoint_every=2", "train.best=val/read_tone", "model.width=16", "model.depth=1", "sample.steps=2", "eval.most=10",
    "eval.candidates=3", "eval.draws=1", "eval.category_classifier_steps=3", "eval.batch=10", "eval.in_loop.most=6")]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return emoji(tmp_path_factory.mktemp("emoji") / "emoji64.tar")


def test_an_absent_text_changes_no_bit_and_padding_weighs_less(file):
    experiment = configs.build(*configs.load(NAME, [("data.dir", str(file)), ("model.width", "16"), ("model.depth", "1")]))
    assert experiment.shape == {"image": (32, 32, 3), "text": (16,)}
    batch = {**experiment.train_data().take(np.arange(6)), "index": np.arange(6)}
    params = jax.jit(experiment.init)(jax.random.key(0))
    loss = jax.jit(experiment.loss)
    value, metrics = loss(params, batch, jax.random.key(1))
    assert np.isfinite(value) and set(metrics) == {"loss/image", "loss/text/by_token"}
    # With logits that are flat a token costs the logarithm of their number, padding a tenth of it.
    assert metrics["loss/text/by_token"] < 0.8 * np.log(experiment.modalities["text"].states)
    [measured] = experiment.in_loop
    assert measured.absent_text_difference(experiment, params, jax.random.key(2), experiment.train_data()) == 0


@pytest.mark.parametrize("name", [NAME, "configs/cdcd/emoji_tokenizer.py", "configs/cdcd/emoji_text.py"])
def test_without_its_data_it_says_where_they_are(name, tmp_path):
    for value, words in (("", "config.data.dir is empty"), (tmp_path / "no.tar", "no.tar")):
        with pytest.raises(UserError, match=words):
            configs.build(*configs.load(name, [("data.dir", str(value))])).train_data()


@pytest.mark.slow
def test_tokens_given_captions_have_all_terms_of_cdcd(file):
    small = {"model.width": "16", "model.depth": "1", "model.heads": "2", "text.width": "16", "text.heads": "2"}
    weights = {"loss.sample_inter": "5e-6", "loss.count": "2"}
    config, module = configs.load("configs/cdcd/emoji_text.py", [*small.items(), *weights.items(), ("data.dir", str(file))])
    experiment = module.build(config)
    assert experiment.shape == {"tokens": (64,), "text": (16,)}
    batch = {**RandomSource(experiment.modalities).take(np.arange(4)), "index": np.arange(4, dtype=np.uint32)}
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), jax.eval_shape(experiment.init, jax.random.key(0)))
    value, metrics = jax.jit(experiment.loss)(params, batch, jax.random.key(1))
    assert np.isfinite(value) and {"loss/vlb", "loss/auxiliary", "loss/step_intra", "loss/sample_inter"} <= set(metrics)


def test_the_tokenizer_and_the_model_of_its_tokens_have_one_grid_and_codebook(file):
    experiment = configs.build(*configs.load("configs/cdcd/emoji_tokenizer.py", [("data.dir", str(file))]))
    _, module = configs.load("configs/cdcd/emoji_text.py")
    net = experiment.cache.net
    assert (net.grid, net.codes) == (module.GRID, module.CODES) and net.shape == experiment.shape["image"] == (32, 32, 3)


def test_tokens_of_other_pictures_or_of_another_tokenizer_are_refused_before_training(file, tmp_path):
    def experiment(tokens, of=file, codes=512):
        """Of a cache of these pictures, whose tokenizer is untrained."""
        pictures = functools.partial(emoji_source, file=str(of))
        net = VQAutoencoder(32, 32, 3, codes=codes, code_size=2, halvings=2, features=8, multipliers=(1, 1))
        params = net.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
        CacheWriter(net, {split: functools.partial(pictures, split) for split in SPLITS}).write(tokens, params, {"step": 0})
        return configs.build(*configs.load("configs/cdcd/emoji_text.py", [("data.dir", str(file)), ("data.tokens", str(tokens))]))

    own = experiment(tmp_path / "own")
    assert len(own.train_data()) == len(emoji_source("train", str(file)))
    with pytest.raises(UserError, match="8 x 8 tokens of 1024 codes, but the config needs 8 x 8 of 512 at most: choose the cache"):
        experiment(tmp_path / "large", codes=1024).train_data()
    other = emoji(tmp_path / "other.tar", "sign")
    for split in ("train", "validation"):
        with pytest.raises(UserError, match="the tokens are of other pictures than those in .*emoji64.tar: write their cache again"):
            getattr(experiment(tmp_path / "others", other), f"{split}_data")()


@pytest.mark.slow
def test_the_commands(file, tmp_path):
    def run(command, *flags):
        assert main([command, "--config", NAME, "--workdir", str(tmp_path / "run"), *map(str, flags)]) == 0

    run("train", f"--config.data.dir={file}", *SMALL)
    assert any("val/read_tone" in line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    run("eval", "--step", "best", "--split", "validation")
    report = json.loads((tmp_path / "run/report-validation.json").read_text())
    assert {"sampled_category", "read_category", "cycle_name", "text_to_image_r1"} <= set(report) and report["absent_text_difference"] == 0
    run("sample", "--given", "text=dark skin, hand b", "--number", 2, "--out", tmp_path / "hands")
    assert np.load(tmp_path / "hands/samples.npz")["image"].shape == (2, 32, 32, 3)


@pytest.mark.slow
def test_tokens_given_captions_by_the_commands(file, tmp_path, loaded_launch, monkeypatch):
    def run(command, name, *flags):
        assert main([command, "--config", f"configs/cdcd/{name}.py", "--workdir", str(tmp_path / name), *map(str, flags)]) == 0

    data, tokens = f"--config.data.dir={file}", tmp_path / "tokens"
    few = [f"--config.{value}" for value in (
        "train.steps=2", "train.global_batch=8", "train.eval_every=2", "train.log_every=1", "train.tensorboard=false", "eval.most=10",
        "eval.category_classifier_steps=3")]  # fmt: skip
    run("train", "emoji_tokenizer", data, "--config.model.features=8", *few)
    run("eval", "emoji_tokenizer")
    report = json.loads((tmp_path / "emoji_tokenizer/report.json").read_text())
    assert {"reconstruction_psnr", "codebook_usage", "reconstructed_tone", "reconstructed_category_real"} <= set(report)
    run("cache", "emoji_tokenizer", "--out", tokens)
    small = {"model.width": "16", "model.depth": "1", "text.width": "16", "text.heads": "2", "data.tokens": str(tokens)}
    run("train", "emoji_text", data, *few, *(f"--config.{name}={value}" for name, value in small.items()), "--config.sample.steps=2")
    run("eval", "emoji_text", "--split", "validation")
    report = json.loads((tmp_path / "emoji_text/report-validation.json").read_text())
    assert {f"sampled_{name}{kind}" for name in ("tone", "category") for kind in ("", "_real", "_reconstructed")} <= set(report)
    run("sample", "emoji_text", "--given", "text=dark skin, hand b", "--number", 2, "--out", tmp_path / "hands")
    assert np.load(tmp_path / "hands/samples.npz")["tokens"].shape == (2, 64) and (tmp_path / "hands/samples.png").exists()

    experiments = loaded_launch("cdcd_tokens_experiments")
    for name, value in (
            ("SAMPLERS", ((1, 1.0), (2, 1.0), (2, 1.5))), ("SAMPLES", 20), ("HELD_OUT", 10), ("CLASSIFIER_STEPS", 3), ("BATCH", 10)):
        monkeypatch.setattr(experiments, name, value)
    _, _, split, overrides = experiments.setting("emoji", "emoji", "test", **{"step-intra": 1, "sample-inter": 1})
    found, seconds = experiments.run(
        1, split, {**overrides, **small, "train.steps": "2", "train.global_batch": "8"}, str(file.parent))
    kinds = ("1_calls", "2_calls", "2_calls_guidance_1.5")
    names = {f"{name}_at_{kind}" for name in ("sampled_tone", "sampled_category", "lite0-FD") for kind in kinds}
    assert names | {"nats_per_token", "lite0-FD_reconstructed", "sampled_tone_real"} <= set(found)
    assert np.isfinite(list(found.values())).all() and seconds > 0


@pytest.mark.slow
def test_towers_give_the_vectors_that_diffdis_denoises(file, tmp_path):
    def run(command, name, *flags):
        assert main([command, "--config", f"configs/joint/{name}.py", "--workdir", str(tmp_path / name), *map(str, flags)]) == 0

    few = [flag for flag in SMALL if not any(word in flag for word in ("eval.", "best", "metrics_every"))]
    measured = [flag for flag in SMALL if "config.eval" in flag]
    run("train", "emoji_towers", f"--config.data.dir={file}", "--config.model.text_width=16", *few)
    run("eval", "emoji_towers", "--config.eval.most=10", "--config.eval.candidates=3", "--split", "validation")
    run("cache", "emoji_towers", "--out", tmp_path / "vectors")
    run("train", "emoji_diffdis", f"--config.data.dir={file}", f"--config.data.towers={tmp_path / 'vectors'}", "--config.query.size=64",
        "--config.model.shared=1", *few, *measured, "--config.train.metrics_every=2")
    run("eval", "emoji_diffdis", "--split", "validation")
    report = json.loads((tmp_path / "emoji_diffdis/report-validation.json").read_text())
    assert {"aligned_tone", "aligned_text_to_image_r1", "read_tone", "text_to_image_r1"} <= set(report)
    assert report["absent_text_difference"] == 0


def test_diffdis_without_vectors_says_what_to_name(file):
    config, module = configs.load("configs/joint/emoji_diffdis.py", [("data.dir", str(file))])
    with pytest.raises(UserError, match="config.text_encoder.path is empty"):
        configs.build(config, module).train_data()


@pytest.fixture(scope="module")
def experiments(loaded_launch):
    return loaded_launch("emoji_experiments")


def test_the_experiments_name_values_that_exist(experiments):
    """All arms of a part have equal steps, batches and rates, and what is measured on test data is what was chosen on validation data."""
    every = list(experiments.settings())
    chosen = {name: overrides for part, name, kind, overrides in every if kind == "choose"}
    assert chosen[f"both at {experiments.WEIGHT}"] == dict(experiments.TASKS)["both"][1] and experiments.GUIDED in experiments.GUIDANCE
    for part, _, kind, overrides in every:
        config, _ = configs.load(f"configs/joint/emoji_{'towers' if kind == 'towers' else 'diffdis'}.py", list(overrides.items()))
        common = experiments.TRAIN | ({"train.learning_rate": experiments.RATE} if part == "rate" else {})
        assert all(config.train[key.removeprefix("train.")] == float(value) for key, value in common.items() if "train." in key)


class Counted:
    """Vectors of captions by their letters."""

    def check(self, size):
        assert size == 384

    def texts(self, ids):
        found = np.random.default_rng(0).normal(size=(2000, 384)).astype(np.float32)[np.asarray(ids)].mean(1)
        return None, found / np.linalg.norm(found, axis=1, keepdims=True)

    def fingerprint(self):
        return "counted"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["choose", "towers", "generate", "without noise"])
def test_an_experiment_runs(experiments, file, monkeypatch, kind):
    vectors = Counted()
    vectors.encode = lambda texts: vectors.texts(emoji_tokenizer(str(file)).encode(list(texts)))[1]
    monkeypatch.setattr(experiments, "text_vectors", lambda folder: vectors)
    overrides = next(overrides for _, _, each, overrides in experiments.settings() if each == kind)
    few = {"train.steps": "1", "train.global_batch": "8", "model.width": "16"}
    metrics, seconds = experiments.run(1, kind, {**overrides, **few}, str(file.parent))
    wanted = {"image_loss", "sampled_tone"} if kind == "generate" else {"aligned_tone", "aligned_name", "aligned_image_to_text_r1"}
    assert wanted <= set(metrics) and all(np.isfinite(value) for value in metrics.values()) and seconds > 0
    assert ("sampled_tone_at_2" in metrics) == (kind == "choose")
