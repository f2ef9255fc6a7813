"""The configs of Fashion-MNIST by the command line, in small: made-up clothes, trained, cached, sampled and measured."""

import json

import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.errors import UserError
from tests.small_sets import fashion_mnist

CONFIGS = "configs/fashion/"
TRAINED = [f"--config.train.{value}" for value in ("steps=2", "global_batch=8", "eval_every=2", "log_every=1", "tensorboard=false")]
SMALL = [f"--config.{value}" for value in (
    "model.width=16", "model.depth=1", "sample.steps=2", "eval.samples=20", "eval.batch=10", "eval.classifier_steps=5",
    "eval.in_loop.samples=10", "eval.in_loop.classifier_steps=5")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fashion_mnist(tmp_path_factory.mktemp("data"))


def run(command, name, workdir, *flags):
    assert main([command, "--config", f"{CONFIGS}{name}.py", "--workdir", str(workdir), *map(str, flags)]) == 0


def metrics(workdir):
    return json.loads((workdir / "report.json").read_text())


COMMON = {
    "lite0-FD", "lite0-precision", "lite0-recall", "lite0-FD_real", "lite0-precision_real", "lite0-recall_real", "conditional_agreement",
    "classifier_real_accuracy", "classification_accuracy_score"}  # fmt: skip


@pytest.mark.slow
def test_joint(folder, tmp_path):
    watched = ["--config.train.metrics_every=2", "--config.train.checkpoint_every=2", "--config.train.best=val/lite0-FD"]
    run("train", "joint", tmp_path / "run", f"--config.data.dir={folder}", *TRAINED, *SMALL, *watched)
    assert any("val/lite0-FD" in line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    run("eval", "joint", tmp_path / "run", "--step", "best")
    assert COMMON | {"label_accuracy"} <= set(metrics(tmp_path / "run"))
    run("sample", "joint", tmp_path / "run", "--given", "label=sandal", "--number", 3, "--out", tmp_path / "sandals")
    found = np.load(tmp_path / "sandals/samples.npz")
    assert found["image"].shape == (3, 32, 32, 1) and set(found["label"]) == {5}


@pytest.mark.slow
def test_fewstep(folder, tmp_path):
    run("train", "joint", tmp_path / "joint", f"--config.data.dir={folder}", *TRAINED, *SMALL)
    more = [f"--config.{value}" for value in (
        "pairs.samples=20", f"train.start={tmp_path / 'joint'}", "train.learning_rate=0.02", "train.warmup_steps=1", "train.ema=0.1")]
    run("train", "fewstep", tmp_path / "run", f"--config.data.dir={folder}", *TRAINED, *SMALL, *more)
    run("eval", "fewstep", tmp_path / "run")
    names = ("at_2_calls", "at_4_calls", "by_25_heun_steps", "at_1_call_on_one_grid")
    found = metrics(tmp_path / "run")
    assert COMMON | {f"joint_{metric}_{name}" for metric in ("agreement", "lite0-FD") for name in names} <= set(found)
    assert len({found[f"joint_lite0-FD_{name}"] for name in names}) == 4  # each has its own samples


@pytest.fixture
def experiments(loaded_launch):
    return loaded_launch("cdcd_tokens_experiments")


def test_the_contrasts_with_the_best_samples_are_reported(experiments):
    every, best = list(experiments.weights()), ("step-intra x1000", "sample-inter x1")
    rows = [{"setting": name, "metrics": {"lite0-FD_at_40_calls": 8.0 if name in best else 9.0}} for _, name, *_ in every]
    found = list(experiments.reported(rows))
    assert [name for _, name, *_ in found] == ["vanilla", *best]
    for _, name, _, overrides in (*every, *found):
        config, _ = configs.load(str(experiments.CONFIG), list(overrides.items()))
        assert ("step-intra x1000" in name) == (config.loss.step_intra == 0.05)
    assert not list(experiments.reported(rows[1:]))


@pytest.mark.slow
def test_tokens(folder, tmp_path, experiments, monkeypatch):
    data = f"--config.data.dir={folder}"
    small = ["--config.model.features=8", "--config.model.codes=256"]
    run("train", "vq_tokenizer", tmp_path / "tokenizer", data, *TRAINED, *small)
    run("eval", "vq_tokenizer", tmp_path / "tokenizer")
    run("cache", "vq_tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "tokens")
    run("train", "vq_class", tmp_path / "run", data, f"--config.data.tokens={tmp_path / 'tokens'}", *TRAINED, *SMALL)
    run("eval", "vq_class", tmp_path / "run")
    assert COMMON <= set(metrics(tmp_path / "run")) and "label_accuracy" not in metrics(tmp_path / "run")
    for name, value in (("SAMPLES", 20), ("HELD_OUT", 10), ("CLASSIFIER_STEPS", 5), ("BATCH", 10)):
        monkeypatch.setattr(experiments, name, value)
    *_, overrides = experiments.setting("fashion", "validation", **{"step-intra": 1, "sample-inter": 1})
    small = {**overrides, "data.tokens": str(tmp_path / "tokens"), "model.width": "16", "train.steps": "2", "train.global_batch": "8"}
    found, seconds = experiments.run(1, "validation", small, str(folder))
    of_samples = {f"{name}_at_{calls}_calls" for name in ("agreement", "lite0-FD") for calls in experiments.CALLS}
    assert set(found) == {*of_samples, "nats_per_token"} and np.isfinite(list(found.values())).all() and seconds > 0


@pytest.mark.parametrize("name", ["joint", "fewstep", "vq_tokenizer"])
def test_a_config_without_its_data_says_where_they_are(name, tmp_path):
    for value, words in (("", "config.data.dir is empty"), (tmp_path, "put Fashion-MNIST's four files there")):
        experiment = configs.build(*configs.load(f"{CONFIGS}{name}.py", [("data.dir", str(value))]))
        with pytest.raises(UserError, match=words):
            experiment.train_data()
