"""What a run samples and measures while it trains: grids, metrics, and that they change nothing of it."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from PIL import Image

from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.evals.evaluator import EvalResult
from mmdiff.evals.sample_grid import SampleGrid
from mmdiff.evals.sampled_images import SampleMetrics
from mmdiff.training import averaged_weights, in_loop, loop, sharding
from mmdiff.training.metrics_logger import TIMING


@pytest.fixture
def config():
    config = tiny.get_config()
    with config.unlocked():
        config.train.update(steps=8, checkpoint_every=4, log_every=4, tensorboard=True, sample_every=3, evaluation_share=1.0)
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def experiment():
    """Shared, so that its sampler is compiled once."""
    return dataclasses.replace(tiny.build(tiny.get_config()), sampler={"drop": ("label",)})


def same_leaves(one, other):
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.opt, one.ema), (other.params, other.opt, other.ema))


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def grids(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "grids").iterdir()}


def interrupted(experiment, config, workdir, read):
    """Trains until a signal comes while a batch is read; -> the step that was saved."""

    class Stopping(ArraySource):
        reads = 0

        def take(self, indices):
            Stopping.reads += 1
            if Stopping.reads == read:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().take(indices)

    source = Stopping(experiment.train_data().arrays)
    with pytest.raises(SystemExit):
        loop.train(dataclasses.replace(experiment, train_data=lambda: source), config, workdir)
    return json.loads((workdir / "run.json").read_text())["steps"]


def test_grids_change_nothing_of_a_run_and_are_the_same_after_a_stop(config, experiment, tmp_path, capsys):
    whole = loop.train(experiment, config, tmp_path / "whole")
    assert sorted(grids(tmp_path / "whole")) == ["00000003.png", "00000006.png", "00000008.png"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "whole"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("grid")] == [3, 6, 8]
    assert events.Images("grid")[0].encoded_image_string == grids(tmp_path / "whole")["00000003.png"]
    assert Image.open(tmp_path / "whole/grids/00000003.png").width > 600  # eight in a row, their labels below them

    assert 0 < interrupted(experiment, config, tmp_path / "torn", 7) < 8
    torn = loop.train(experiment, config, tmp_path / "torn")
    assert grids(tmp_path / "torn") == grids(tmp_path / "whole")
    config.train.sample_every = 0
    without = loop.train(experiment, config, tmp_path / "without")
    same_leaves(whole, torn)
    same_leaves(whole, without)
    assert losses(tmp_path / "whole") == losses(tmp_path / "torn") == losses(tmp_path / "without")
    assert not (tmp_path / "without/grids").exists()


def test_a_grid_that_fails_or_takes_too_long_does_not_stop_a_run(config, experiment, tmp_path, capsys, monkeypatch):
    def broken(self, *of_grid):
        if of_grid[-1] == 2:
            raise MemoryError("RESOURCE_EXHAUSTED: Out of memory")
        raise UserError("the samples hold values that are not finite.")

    monkeypatch.setattr(SampleGrid, "_show", broken)
    config.train.update(sample_every=2, tensorboard=False, evaluation_share=1.0)
    loop.train(experiment, config, tmp_path / "fails")
    said = capsys.readouterr().err
    assert "step 2: no grid, training continues: MemoryError: 'RESOURCE_EXHAUSTED: Out of memory'" in said
    assert "step 8: no grid, training continues: the samples hold values that are not finite." in said

    monkeypatch.setattr(SampleGrid, "_show", lambda self, *of_grid: EvalResult({}))
    monkeypatch.setattr(in_loop.Cadence, "taken", lambda self, step, seconds, pace: setattr(self, "next", step + 5))
    loop.train(experiment, config, tmp_path / "slow")
    assert "of the time; next at step 8 (config.train.evaluation_share)" in capsys.readouterr().err


def test_what_has_no_images_is_refused_a_grid(config, experiment, tmp_path):
    alone = {"label": experiment.modalities["label"]}
    with pytest.raises(UserError, match="config.train.sample_every asks for grids of images, and this model samples none: set it to 0"):
        loop.train(dataclasses.replace(experiment, modalities=alone), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Known:
    """An evaluator whose numbers follow from the weights."""

    better = {"norm": "max", "flaw": "min"}
    fails = ()

    def __call__(self, experiment, params, config, key, step):
        assert experiment.split == "validation"
        if step in self.fails:
            raise UserError("nothing can be measured.")
        norm = sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(params))
        noise = float(jax.random.uniform(key))
        return EvalResult({"norm": norm, "flaw": np.nan if step == 4 else step + noise}, {"norm": "the squared length of the weights"})


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_measured_in_the_loop_and_the_best_checkpoint_is_kept(config, experiment, tmp_path, capsys):
    config.train.update(steps=10, sample_every=0, metrics_every=2, checkpoint_every=2, keep=1, best="val/flaw", tensorboard=False)
    measured = dataclasses.replace(experiment, in_loop=(Known(),))
    whole = loop.train(measured, config, tmp_path / "whole")
    said = capsys.readouterr().err
    assert "val/norm: the squared length of the weights" in said and "step 2: val/norm" in said
    found = {row["step"]: row for row in rows(tmp_path / "whole") if "val/flaw" in row}
    assert list(found) == [2, 4, 6, 8, 10] and found[4]["val/flaw"] is None
    noise = {round(row["val/flaw"] - step, 5) for step, row in found.items() if step != 4}
    assert len(noise) == 1  # the same noise each time
    kept = sorted(int(path.name) for path in (tmp_path / "whole/checkpoints").iterdir())
    assert kept == [2, 10] and averaged_weights.restore_for_inference(measured, config, tmp_path / "whole", step="best")[1] == 2

    assert 0 < interrupted(measured, config, tmp_path / "torn", 9) < 10
    torn = loop.train(measured, config, tmp_path / "torn")
    strip = [[{k: v for k, v in row.items() if k not in TIMING} for row in rows(tmp_path / run)] for run in ("whole", "torn")]
    assert sorted(strip[0], key=str) == sorted(strip[1], key=str)
    without = loop.train(experiment, tiny_like(config, metrics_every=0, best=""), tmp_path / "without")
    same_leaves(whole, torn)
    same_leaves(whole, without)
    assert losses(tmp_path / "whole") == losses(tmp_path / "without")

    largest = tiny_like(config, best="max:val/flaw", keep=1)
    loop.train(measured, largest, tmp_path / "largest")
    assert averaged_weights.restore_for_inference(measured, largest, tmp_path / "largest", step="best")[1] == 10


def tiny_like(config, **changes):
    config = config.copy_and_resolve_references()
    config.train.update(changes)
    return config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"best": "val/FID", "eval_every": 4}, "'val/FID', but an evaluation gives .*val/norm, val/flaw: choose one of these"),
        ({"best": "max:val/norm", "metrics_every": 3}, r"metrics_every \(3\) be a multiple of config.train.checkpoint_every \(4\)"),
        ({"best": "val/norm", "metrics_every": 0}, r"needs a checkpoint where it is measured"),
    ],
)
def test_what_would_never_be_the_best_is_refused(config, experiment, tmp_path, changes, message):
    config.train.update({"metrics_every": 4, "sample_every": 0, **changes})
    with pytest.raises(UserError, match=message):
        loop.train(dataclasses.replace(experiment, in_loop=(Known(),)), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_that_are_not_stated_or_whose_reference_is_missing_end_the_run_before_it_begins(config, experiment, tmp_path):
    config.train.update(metrics_every=4, sample_every=0)
    with pytest.raises(UserError, match="states none as in_loop: set it to 0"):
        loop.train(experiment, config, tmp_path / "run")
    evaluator = SampleMetrics({"kind": "efficientnet_lite0"}, reference=str(tmp_path / "statistics.npz"), limits=False)
    with pytest.raises(UserError, match="statistics.npz"):
        loop.train(dataclasses.replace(experiment, in_loop=(evaluator,)), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_spread_over_devices_are_measured_whole(config, experiment, tmp_path, monkeypatch):
    config.train.update(steps=4, sample_every=4, metrics_every=4, tensorboard=False)
    found = {}
    for count in (1, 4):
        monkeypatch.undo()
        make_mesh = sharding.make_mesh
        monkeypatch.setattr(sharding, "make_mesh", lambda axes, count=count, make=make_mesh: make(axes, jax.devices()[:count]))
        config.train.mesh.fsdp = count
        rules = [("image", PartitionSpec(None, "fsdp")), (".*", PartitionSpec())]
        state = loop.train(dataclasses.replace(experiment, in_loop=(Known(),), rules=rules), config, tmp_path / str(count))
        assert state.ema["params"]["image"].is_fully_replicated == (count == 1)
        found[count] = next(row["val/norm"] for row in rows(tmp_path / str(count)) if "val/norm" in row)
        assert list(grids(tmp_path / str(count))) == ["00000004.png"]
    assert found[1] == pytest.approx(found[4], rel=1e-5)
