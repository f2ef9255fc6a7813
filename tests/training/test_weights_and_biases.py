"""Weights & Biases, by a stand-in: no network, no account."""

import json
import sys
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from mmdiff.errors import UserError
from mmdiff.training import loop, sharding, weights_and_biases
from mmdiff.training.metrics_logger import MetricsLogger


@pytest.fixture
def config(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    config = tiny.get_config()
    with config.unlocked():
        config.train.update(steps=4, log_every=2, checkpoint_every=2, wandb="digits")
    return config


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what it gets: `runs`, one for each `init`."""
    module = types.ModuleType("wandb")
    module.runs, module.Image = [], lambda image: ("image", image.size)

    def init(**options):
        run = types.SimpleNamespace(options=options, logged=[], finished=False)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        module.runs.append(run)
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_curves_and_grids_are_sent_and_a_run_that_continues_is_the_same_one(config, wandb, tmp_path):
    loop.train(tiny.build(config), config, tmp_path / "run")
    config.train.steps = 6
    loop.train(tiny.build(config), config, tmp_path / "run")
    first, second = wandb.runs
    assert first.options["project"] == "digits" and first.options["name"] == "run" and first.options["resume"] == "allow"
    assert first.options["id"] == second.options["id"] == json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    assert first.options["config"]["train"]["global_batch"] == 8 and first.finished and second.finished
    told = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    sent = [(step, values["loss"]) for run in wandb.runs for step, values in run.logged]
    assert sent == [(row["step"], row["loss"]) for row in told] and [step for step, _ in sent] == [2, 4, 6]

    with MetricsLogger(tmp_path, config.train, start=0, seconds=0.0) as logger:
        logger.image(4, "", Image.fromarray(np.zeros((8, 16, 4), np.uint8)))
    assert wandb.runs[-1].logged == [(4, {"grid": ("image", (16, 8))})]


def test_what_fails_there_does_not_end_a_run(config, wandb, tmp_path, caplog):
    init = wandb.init

    def broken(**options):
        run = init(**options)

        def fail(values, step):
            raise ConnectionError("the network is gone")

        run.log = fail
        return run

    wandb.init = broken
    loop.train(tiny.build(config), config, tmp_path / "run")
    assert caplog.text.count("nothing more is sent to Weights & Biases: ConnectionError: the network is gone") == 1

    def refused(**options):
        raise RuntimeError("no API key")

    wandb.init = refused
    with pytest.raises(UserError, match=r"config.train.wandb='digits' cannot be reached \(no API key\): run wandb login"):
        loop.train(tiny.build(config), config, tmp_path / "other")


def test_a_package_that_is_missing_is_said_before_anything(config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"needs the package wandb .*: pip install 'mmdiff\[wandb\]', or leave it out"):
        loop.train(tiny.build(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    weights_and_biases.check("")
