"""The joint model of a few calls, in small and through the command line."""

import json

import numpy as np
import pytest

from mmdiff import __main__ as cli
from mmdiff import config as configs

CONFIG = "configs/digits_fewstep.py"
SMALL = [f"--config.{value}" for value in (
    "model.width=16", "model.depth=1", "model.heads=2", "train.steps=12", "train.global_batch=16", "train.warmup_steps=2",
    "train.log_every=4", "train.eval_every=12", "train.tensorboard=false", "train.learning_rate=0.02", "train.ema=0.5",
    "span.guidance=1.5")]  # fmt: skip


@pytest.mark.slow
def test_it_trains_samples_in_two_calls_and_measures(tmp_path, capsys):
    run = ["--config", CONFIG, "--workdir", str(tmp_path / "run")]
    assert cli.main(["train", *run, *SMALL]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss/image", "loss/image_error", "loss/label", "val/loss"} <= {name for line in lines for name in line}

    def sampled(name, *flags):
        assert cli.main(["sample", *run, "--number", "6", "--out", str(tmp_path / name), *flags]) == 0
        return np.load(tmp_path / name / "samples.npz")

    assert set(sampled("pairs")["label"]) <= set(range(10))
    one, two = (sampled(f"sevens{steps}", "--given", "label=7", "--steps", str(steps))["image"] for steps in (1, 2))
    assert (one != two).any()  # what is given takes no call of its own
    assert (sampled("heun", "--given", "label=7", "--steps", "2", "--config.sample.heun=true")["image"] != two).any()
    capsys.readouterr()
    assert cli.main(["sample", *run, "--steps", "1", "--out", str(tmp_path / "none")]) == 2
    assert "a staircase of label, image needs at least 2 steps" in capsys.readouterr().err
    assert cli.main(["eval", *run]) == 0
    found = json.loads((tmp_path / "run/report.json").read_text())
    for name in ("at_2_calls", "at_4_calls", "by_25_heun_steps", "at_1_call_on_one_grid"):
        assert 0 <= found[f"joint_agreement_{name}"] <= 1 and found[f"joint_frechet_ratio_{name}"] > 1


@pytest.fixture(scope="module")
def experiments(loaded_launch):
    return loaded_launch("fewstep_experiments")


def test_the_experiments_name_values_that_exist(experiments):
    every = list(experiments.settings())
    assert len({(part, name) for part, name, *_ in every}) == len(every)  # a finished run is known by its name
    found = [(part, configs.load(CONFIG, list(overrides.items()))[0].to_json()) for part, *_, overrides in every]
    assert len(set(found)) == len(found) and found[-1] == ("whole", configs.load(CONFIG)[0].to_json())


@pytest.mark.slow
def test_an_experiment_runs(experiments):
    small = dict(value.removeprefix("--config.").split("=") for value in SMALL)
    metrics, seconds = experiments.run(1, "both", small)
    assert {
        "over_heun_at_2_calls", "over_heun_test_at_4_calls", "label_accuracy_test", "joint_agreement_at_1_call_on_one_grid"} <= set(metrics)
    assert np.isfinite(list(metrics.values())).all() and seconds > 0
