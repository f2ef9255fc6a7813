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
    every = list(experiments.weights())
    least, *_, most = experiments.SCALES
    best = {"emoji": (f"step-intra x{least}", f"sample-inter x{most}"), "fashion": (f"step-intra x{most}", f"sample-inter x{least}")}
    rows = [
        {"part": part, "setting": name, "metrics": {experiments.CHOSEN_BY: 8.0 if name in best[data] else 9.0}}
        for part, name, (data, _), _ in every]
    found = list(experiments.reported(rows))
    for data, (one, other) in best.items():
        assert [name for part, name, *_ in found if part == data] == ["vanilla", one, other, f"{one} and {other}"]
    for _, name, (data, split), overrides in (*every, *found):
        config, _ = configs.load(str(experiments.CONFIGS / experiments.DATA[data].config), list(overrides.items()))
        scales = dict(each.split(" x") for each in name.split(" and ") if each != "vanilla")
        for contrast, (key, weight) in experiments.RELEASED.items():
            assert config.loss[key.removeprefix("loss.")] == pytest.approx(weight * float(scales.get(contrast, 0)))
        assert max(calls for calls, _ in experiments.SAMPLERS) <= config.chain.steps
    assert {part for part, *_ in experiments.reported(rows[1:])} == {"fashion"}  # emoji lack vanilla


def test_contrasts_without_guidance_are_compared_with_vanilla_that_has_it(experiments):
    metrics = {"agreement_at_40_calls": 0.2, "agreement_at_10_calls": 0.5, "agreement_at_10_calls_guidance_1.5": 0.7, "nats_per_token": 4.0}
    metrics |= {"agreement_at_10_calls_guidance_2": 0.8}
    rows = [{"part": "fashion", "setting": "vanilla", "seed": 0, "metrics": metrics}]
    rows.append({**rows[0], "setting": "both", "metrics": {name: value + 0.1 for name, value in metrics.items()}})
    found, bases = experiments.against_guidance(rows)
    for (part, base), difference in zip(bases.items(), (0.6 - 0.7, 0.6 - 0.8), strict=True):
        own = [row for row in found if row["part"] == part]
        np.testing.assert_allclose(experiments.experiments.differences(own, "both", base, ["agreement"]), [[difference]])
    assert all(set(row["metrics"]) == {"agreement"} for row in found)


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
    for name, value in (
            ("SAMPLERS", ((1, 1.0), (2, 1.0), (2, 1.5))), ("SAMPLES", 20), ("HELD_OUT", 10), ("CLASSIFIER_STEPS", 5), ("BATCH", 10)):
        monkeypatch.setattr(experiments, name, value)
    _, _, data, overrides = experiments.setting("fashion", "fashion", "validation", **{"step-intra": 1, "sample-inter": 1})
    small = {**overrides, "data.tokens": str(tmp_path / "tokens"), "model.width": "16", "train.steps": "2", "train.global_batch": "8"}
    (tmp_path / "fashion-mnist").symlink_to(folder)
    found, seconds = experiments.run(1, data, small, str(tmp_path))
    kinds = ("_reconstructed", "_at_1_calls", "_at_2_calls", "_at_2_calls_guidance_1.5")
    assert set(found) == {"nats_per_token", *(f"{name}{kind}" for name in ("agreement", "lite0-FD") for kind in kinds)}
    assert np.isfinite(list(found.values())).all() and seconds > 0


@pytest.mark.parametrize("name", ["joint", "fewstep", "vq_tokenizer"])
def test_a_config_without_its_data_says_where_they_are(name, tmp_path):
    for value, words in (("", "config.data.dir is empty"), (tmp_path, "put Fashion-MNIST's four files there")):
        experiment = configs.build(*configs.load(f"{CONFIGS}{name}.py", [("data.dir", str(value))]))
        with pytest.raises(UserError, match=words):
            experiment.train_data()
