"""The main job in small: the real config on the real digits, through the command line, far enough to learn something."""

import json

import jax
import numpy as np
import pytest

from mmdiff import __main__ as cli
from mmdiff import config as configs
from mmdiff.data.sources import load_all

CONFIG = "configs/digits_joint.py"
SMALL = [
    "--config.train.steps=300", "--config.train.global_batch=64", "--config.train.warmup_steps=30", "--config.train.ema=0.98",
    "--config.model.width=48", "--config.model.depth=2", "--config.train.log_every=50", "--config.train.eval_every=150",
    "--config.train.tensorboard=false", "--config.sample.steps=6", "--config.label_weight=1.0", "--config.train.weight_decay=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits_joint")
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(workdir), *SMALL]) == 0
    return workdir


@pytest.mark.slow
def test_the_loss_falls_and_labels_are_read(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.75 * losses[0]
    assert [line["step"] for line in lines if "val/loss" in line] == [150, 300]

    from mmdiff.evals.evaluator import predict_batched
    from mmdiff.training.averaged_weights import restore_for_inference

    config, module = configs.load(CONFIG, [tuple(arg.removeprefix("--config.").split("=")) for arg in SMALL])
    experiment = module.build(config)
    params, step = restore_for_inference(experiment, config, run)
    assert step == 300
    test = load_all(experiment.test_data())
    read = predict_batched(experiment, params, jax.random.key(0), {"image": test["image"]}, "label", 250)
    assert (read.argmax(-1) == test["label"]).mean() > 0.6  # chance is 0.1


@pytest.mark.slow
def test_one_model_draws_pairs_images_of_a_label_and_labels_of_an_image(run, capsys, tmp_path):
    base = ["sample", "--config", CONFIG, "--workdir", str(run), *SMALL, "--number", "8"]
    assert cli.main([*base, "--given", "label=7", "--out", str(tmp_path / "sevens")]) == 0
    sevens = np.load(tmp_path / "sevens" / "samples.npz")
    assert sevens["image"].shape == (8, 8, 8, 1) and set(sevens["label"]) == {7}
    assert cli.main([*base, "--absent", "label", "--out", str(tmp_path / "bare")]) == 0
    assert set(np.load(tmp_path / "bare" / "samples.npz")) == {"image"}
    capsys.readouterr()
    given = f"image={tmp_path / 'sevens' / 'samples.npz'}"
    assert cli.main([*base, "--given", given, "--out", str(tmp_path / "named")]) == 0
    named = np.load(tmp_path / "named" / "samples.npz")
    np.testing.assert_allclose(named["image"], sevens["image"], atol=1 / 16 + 1e-6)  # to the nearest of 17 levels
    assert "label: " in capsys.readouterr().out and set(named["label"]) <= set(range(10))
