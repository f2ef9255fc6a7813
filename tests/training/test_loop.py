"""The loop in this process, on a network that trains in a second."""

import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest
import toy
from clu.metrics import Average

from mmdiff.data import loader
from mmdiff.data.order import ORDER_VERSION
from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.training import averaged_weights, checkpoint_files, lock, loop, metrics_logger, run_metadata, sharding


@pytest.fixture
def config(config):
    config.train.steps = 12
    config.train.mesh.data = 1
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same_leaves(one, other):
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.opt, one.ema), (other.params, other.opt, other.ema))


@pytest.mark.slow
def test_a_run_leaves_its_files(config, tmp_path, capsys):
    state = loop.train(toy.build(config), config, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "data.json", "checkpoints", "metrics.jsonl", "run.json"}
    assert [(row["step"], "val/loss" in row) for row in rows(tmp_path)] == [
        (4, False), (8, False), (10, True), (12, False), (12, True)
    ]  # fmt: skip
    assert {"loss", "loss/x", "grad_norm", "param_norm", "skipped", "images_per_second", "train_seconds"} < set(rows(tmp_path)[0])
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps"] == 12 and run["finished"] and run["train_seconds"] > 0 and run["images_per_second"] > 0
    meta = checkpoint_files.read_meta(tmp_path, 12)
    assert checkpoint_files.cost(meta) == {name: run[name] for name in ("train_seconds", "images_per_second")}
    assert run["images_per_second"] == 12 * 16 / run["train_seconds"]
    text = capsys.readouterr().err
    assert "256 parameters" in text and "step 12/12" in text and "images/s  ETA 0:00:00" in text and "\r" not in text

    again = loop.train(toy.build(config), config, tmp_path)
    same_leaves(state, again)
    assert "nothing to do" in capsys.readouterr().err
    ema, step = averaged_weights.restore_for_inference(toy.build(config), config, tmp_path)
    assert step == 12
    jax.tree.map(np.testing.assert_array_equal, ema, state.ema)


def test_fine_tuning_starts_from_another_run_s_averaged_weights(config, tmp_path):
    config.train.update(steps=4, eval_every=0, checkpoint_every=4)
    first = loop.train(toy.build(config), config, tmp_path / "first")
    still = dataclasses.replace(toy.build(config), optimizer=optax.set_to_zero())
    config.train.start = str(tmp_path / "first")
    second = loop.train(still, config, tmp_path / "second")
    assert int(second.step) == 4
    jax.tree.map(np.testing.assert_array_equal, second.params, first.ema)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), second.ema, first.ema)
    # Its own checkpoints come first: what it starts from is read once.
    shutil.rmtree(tmp_path / "first")
    config.train.steps = 8
    again = loop.train(still, config, tmp_path / "second")
    assert int(again.step) == 8
    with pytest.raises(UserError, match="there is no checkpoint in"):
        loop.train(still, config, tmp_path / "third")


def test_means_are_over_the_interval_and_leave_void_steps_out(config, tmp_path):
    config.train.update(log_every=4, eval_every=0, steps=8)
    experiment = toy.build(config)
    source = experiment.train_data()
    poisoned = source.arrays["x"].copy()
    one, other = (source.take(row)["x"][0] for row in order_of(config, source, (17, 90)))
    poisoned[(poisoned == one).all(1) | (poisoned == other).all(1)] = np.nan
    loop.train(dataclasses.replace(experiment, train_data=lambda: ArraySource({"x": poisoned})), config, tmp_path)
    first, second = rows(tmp_path)
    assert first["skipped"] >= 1 and second["skipped"] >= first["skipped"] + 1  # counted over the whole run
    assert np.isfinite(first["loss"]) and np.isfinite(second["loss"])


def order_of(config, source, positions):
    from mmdiff.data import order

    return [order.indices(config.seed, np.array([position]), len(source)) for position in positions]


def test_an_interval_of_skipped_steps_is_null_and_seen_in_the_progress(config, tmp_path, capsys):
    config.train.update(log_every=2, eval_every=0, steps=4)

    class Late(ArraySource):
        reads = 0

        def take(self, indices):
            Late.reads += 1
            return super().take(indices) if Late.reads < 4 else {"x": np.full((len(indices), 4), np.nan, np.float32)}

    source = Late(toy.build(config).train_data().arrays)
    loop.train(dataclasses.replace(toy.build(config), train_data=lambda: source), config, tmp_path)
    first, second = rows(tmp_path)
    assert first["skipped"] == 0 and second["loss"] is None and second["skipped"] == 2
    text = capsys.readouterr().err
    assert "step 3 is skipped: its loss is not finite; it holds the examples at the positions 32 to 47" in text
    assert "step 4 is skipped" not in text and "step 4/4  loss" not in text and "step 4/4  2 skipped  " in text


@pytest.mark.parametrize("spoiled, cause", [("data", "loss"), ("rate", "update by the optimizer")])
def test_a_run_that_no_longer_learns_ends(spoiled, cause, config, tmp_path):
    config.train.update(max_skipped=5, steps=500, eval_every=0, checkpoint_every=4, other_data=True)
    experiment = toy.build(config)
    good = loop.train(experiment, config_with(config, steps=4), tmp_path)
    if spoiled == "data":
        data = ArraySource({"x": np.full((50, 4), np.nan, np.float32)})
        experiment = dataclasses.replace(experiment, train_data=lambda: data)
    else:
        experiment = dataclasses.replace(experiment, optimizer=optax.chain(experiment.optimizer, optax.scale(float("nan"))))
        like = optax.chain(toy.optimizer(), optax.scale(1.0)).init(good.params)
        assert jax.tree.structure(like) == jax.tree.structure(experiment.optimizer.init(good.params))
    where = tmp_path if spoiled == "data" else tmp_path / "new"
    with pytest.raises(UserError, match=f"5 steps in a row up to step .* as the {cause} was not finite: look at the learning rate"):
        loop.train(experiment, config, where)
    if spoiled == "data":
        params, step = averaged_weights.restore_for_inference(experiment, config, tmp_path)
        assert step in (4, 8)
        jax.tree.map(np.testing.assert_array_equal, params, good.ema)


def config_with(config, **train):
    other = config.copy_and_resolve_references()
    other.train.update(train)
    return other


def test_a_short_run_whose_steps_are_all_skipped_is_not_finished(config, tmp_path):
    config.train.update(steps=2, log_every=2, eval_every=0)
    data = ArraySource({"x": np.full((50, 4), np.nan, np.float32)})
    with pytest.raises(UserError, match="2 steps in a row up to step 2 were skipped"):
        loop.train(dataclasses.replace(toy.build(config), train_data=lambda: data), config, tmp_path)


def test_a_metric_that_is_not_finite_once_does_not_spoil_its_mean():
    accumulate = loop.make_accumulate()
    averages = {name: Average.empty() for name in ("loss", "error", "skipped")}
    for error in (1.0, np.nan, 3.0):
        metrics = {"loss": np.float32(2), "error": np.float32(error), "skipped": np.float32(0)}
        averages = accumulate(averages, metrics, {"skipped": np.int32(0)})
    assert {name: float(mean.compute()) for name, mean in averages.items()} == {"loss": 2, "error": 2, "skipped": 0}


@pytest.mark.slow
def test_an_interrupted_run_is_the_uninterrupted_one(config, tmp_path):
    config.train.update(log_every=5, checkpoint_every=100)
    whole = loop.train(toy.build(config), config, tmp_path / "whole")

    experiment = toy.build(config)
    source = experiment.train_data()

    class Pulled(ArraySource):
        calls = 0

        def take(self, indices):
            Pulled.calls += 1
            if Pulled.calls == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().take(indices)

    experiment = dataclasses.replace(experiment, train_data=lambda: Pulled(source.arrays))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        loop.train(experiment, config, tmp_path / "torn")
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    [at] = [int(p.name) for p in (tmp_path / "torn/checkpoints").iterdir()]
    assert 0 < at < 12 and json.loads((tmp_path / "torn/run.json").read_text())["steps"] == at

    # A run that was killed may have told more than it saved.
    with (tmp_path / "torn/metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 1.0}\n{"step": 13, "lo')
    same_leaves(whole, loop.train(toy.build(config), config, tmp_path / "torn"))
    strip = [[{k: v for k, v in row.items() if k not in metrics_logger.TIMING} for row in rows(tmp_path / w)] for w in ("whole", "torn")]
    assert strip[0] == strip[1]
    seconds = [row["train_seconds"] for row in rows(tmp_path / "torn") if "train_seconds" in row]
    assert seconds == sorted(seconds)  # cumulative over both runs


def test_prefetch_keeps_order_and_passes_errors_on():
    def items():
        yield from range(5)
        raise OSError("the disk is gone")

    for ahead in (0, 1, 3):
        with loader.prefetch(items(), ahead) as stream:
            assert [next(stream) for _ in range(5)] == list(range(5))
            with pytest.raises(OSError, match="the disk is gone"):
                next(stream)


def test_another_config_is_refused_and_nothing_is_lost(config, tmp_path):
    loop.train(toy.build(config), config, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    config.model.width = 8
    with pytest.raises(UserError, match=r"another config: model.width \(there 32, here 8\)"):
        loop.train(toy.build(config), config, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_differs_when_a_run_continues_is_said(config, tmp_path, capsys):
    loop.train(toy.build(config), config, tmp_path)
    assert "other values" not in capsys.readouterr().err
    config.train.update(steps=14, microbatches=2)
    loop.train(toy.build(config), config, tmp_path)
    assert "continuing with other values: train.microbatches 1 -> 2, train.steps 12 -> 14\n" in capsys.readouterr().err
    assert run_metadata.read_config(tmp_path) == config.to_dict()


def test_a_run_continues_with_batches_of_another_size_and_sees_every_example_once(config, tmp_path, capsys):
    config.train.update(steps=3, eval_every=0, log_every=1, prefetch=0)
    experiment, seen = toy.build(config), []
    source = experiment.train_data()

    class Seen(ArraySource):
        def take(self, indices):
            seen.extend(indices.tolist())
            return super().take(indices)

    experiment = dataclasses.replace(experiment, train_data=lambda: Seen(source.arrays))
    loop.train(experiment, config, tmp_path)
    for size, steps, at in ((8, 6, 3 * 16), (16, 7, 3 * 16 + 3 * 8)):
        seen.clear()
        config.train.update(global_batch=size, steps=steps, learning_rate=0.1 if size == 8 else 0.2)
        loop.train(experiment, config, tmp_path)
        asked = (steps - (3 if size == 8 else 6)) * size
        assert seen[-asked:] == [int(order_of(config, source, [p])[0][0]) for p in range(at, at + asked)]
        assert checkpoint_files.read_meta(tmp_path, steps)["position"] == at + asked
    said = capsys.readouterr().err
    assert "train.global_batch 16 -> 8" in said and "train.learning_rate 0.1 -> 0.2" in said and "schedules" in said


def test_a_data_set_that_grew_is_refused_unless_it_is_wanted(config, tmp_path, capsys):
    config.train.update(steps=2, eval_every=0)
    experiment = toy.build(config)
    loop.train(experiment, config, tmp_path)
    more = dataclasses.replace(experiment, train_data=lambda: toy.data(51, 0))
    config.train.steps = 4
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"50 examples then, 51 now.*config.train.other_data"):
        loop.train(more, config, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    with config.unlocked():
        config.train.other_data = True
    loop.train(more, config, tmp_path)
    assert "50 examples then, 51 now" in capsys.readouterr().err
    meta = checkpoint_files.read_meta(tmp_path, 4)
    assert meta["order"] == ORDER_VERSION and meta["data"]["fingerprint"].startswith("51-")
    assert run_metadata.read_data(tmp_path) == meta["data"]


def test_a_second_trainer_is_refused_and_nothing_is_touched(config, tmp_path):
    with lock.held(tmp_path):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match="is being trained by process .* on "):
            loop.train(toy.build(config), config, tmp_path)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    loop.train(toy.build(config), config, tmp_path)


@pytest.mark.parametrize("gone", ["run", "run/checkpoints"])
def test_a_folder_that_goes_while_a_run_trains_is_a_sentence(gone, config, tmp_path):
    config.train.update(steps=6, eval_every=0, checkpoint_every=2, prefetch=0)
    experiment = toy.build(config)

    class Going(ArraySource):
        reads = 0

        def take(self, indices):
            Going.reads += 1
            if Going.reads == 5:  # after that of the example whose shapes are asked for
                while not (tmp_path / "run/checkpoints/2").exists():  # its save, in the background, is done
                    time.sleep(0.01)
                (tmp_path / gone).rename(tmp_path / "elsewhere")
            return super().take(indices)

    data = Going(experiment.train_data().arrays)
    with pytest.raises(UserError, match="run/checkpoints was moved or removed while the run trains"):
        loop.train(dataclasses.replace(experiment, train_data=lambda: data), config, tmp_path / "run")
    assert not (tmp_path / gone).exists()  # none was made in its place
    run = tmp_path / "elsewhere" if gone == "run" else tmp_path / "run"
    if gone != "run":
        (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert int(loop.train(experiment, config, run).step) == 6


def test_the_config_of_a_run_changes_only_when_it_continues(config, tmp_path):
    loop.train(toy.build(config), config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config.train.update(steps=8, log_every=2)
    loop.train(toy.build(config), config, tmp_path)  # nothing to do
    config.train.update(steps=20, best="val/fid", eval_every=6)
    with pytest.raises(UserError, match="an evaluation gives"):
        loop.train(toy.build(config), config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(UserError, match="an evaluation gives"):
        loop.train(toy.build(config), config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_options_are_listed(config, tmp_path):
    with config.unlocked():
        del config.train.keep, config.train.prefetch
    with pytest.raises(UserError, match="lacks config.train.keep, config.train.prefetch: add them"):
        loop.train(toy.build(config), config, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "config.train.steps must be 1 or more, not 0"),
        ({"log_every": 0}, "config.train.log_every"),
        ({"prefetch": -1}, "config.train.prefetch must be 0 or more"),
        ({"ema": 1.0}, "config.train.ema"),
        ({"global_batch": 10, "microbatches": 4}, "does not divide the global batch 10.*global_batch=8"),
        ({"best": "val/loss"}, r"eval_every \(10\) divide config.train.checkpoint_every \(6\)"),
        ({"best": "val/fid", "eval_every": 6}, "'val/fid', but an evaluation gives val/error, val/loss, val/loss/x: choose one"),
        ({"best": "loss", "eval_every": 6}, "'loss', but an evaluation gives"),  # of the training data: no checkpoint has it
        ({"best": "val/grad_norm", "eval_every": 6}, "'val/grad_norm', but an evaluation gives"),
        ({"best": "val/loss", "eval_every": 0}, r"needs an evaluation at every checkpoint"),
    ],
)
def test_bad_options_are_refused(config, tmp_path, changes, message):
    config.train.update(changes)
    with pytest.raises(UserError, match=message):
        loop.train(toy.build(config), config, tmp_path)


@pytest.mark.slow
def test_tensorboard_gets_every_line_once(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.train.tensorboard = True
    loop.train(toy.build(config), config, tmp_path)
    lost = metrics_logger.Events(tmp_path, 12)
    lost.write(14, {"loss": 99.0})  # by a run that was killed before it saved this step
    lost.close()
    config.train.steps = 16
    loop.train(toy.build(config), config, tmp_path)

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in "loss", "val/loss", "images_per_second":
        told = [(row["step"], row[name]) for row in rows(tmp_path) if name in row]
        np.testing.assert_allclose([(event.step, event.value) for event in events.Scalars(name)], told, rtol=1e-6)


def test_data_that_the_process_cannot_hold_are_refused():
    import types

    from mmdiff.processes import Gaussian, Joint, absorbing
    from mmdiff.schedules import flow

    process = Joint(image=Gaussian(flow()), label=absorbing(10))
    batch = {"image": np.zeros((2, 4), np.float32), "label": np.array([3, 12]), "index": np.arange(2, dtype=np.uint32)}
    with pytest.raises(UserError, match="the training data does not fit the process: modality 'label': class id 12 is out of range"):
        loop.checked(types.SimpleNamespace(process=process, loss=None), batch)
    fine = batch | {"label": np.array([3, 9])}
    assert loop.checked(types.SimpleNamespace(process=process, loss=None), fine) is fine
