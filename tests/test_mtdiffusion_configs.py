"""The MT-Diffusion configs in small: each trains and is measured by the commands, and no label leaks into what reads labels."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import __main__ as cli
from mmdiff import config as configs
from mmdiff.data.sources import ArraySource, load_all
from mmdiff.errors import UserError
from mmdiff.evals import report
from mmdiff.evals.evaluator import predict_batched
from mmdiff.processes import fold
from mmdiff.projects.digits import digits

FOLDER = pathlib.Path(__file__).parents[1] / "configs/mtdiffusion"
SMALL = {
    "model.width": 16, "model.depth": 1, "model.heads": 2, "train.steps": 3, "train.global_batch": 8, "train.warmup_steps": 1,
    "train.log_every": 1, "train.eval_every": 3, "train.checkpoint_every": 3, "train.tensorboard": False, "sample.steps": 2,
}  # fmt: skip
CASES = {
    "digits_label": {},
    "digits_masked": {"eval.draws": 2},
    "digits_representation": {},
    "digits_transition": {"eval.count": 60},
}
BESIDE = {
    "digits_label": "label", "digits_masked": "masked", "digits_representation": "representation", "digits_transition": "segmentation",
}  # fmt: skip


def few(split, data_dir=None, real=digits.digits_source):
    return ArraySource({name: array[:200] for name, array in real(split, data_dir).arrays.items()})


def build(name, **overrides):
    config, module = configs.load(str(FOLDER / f"{name}.py"), [(key, str(value)) for key, value in {**SMALL, **overrides}.items()])
    return module.build(config)


def test_there_is_a_case_of_every_config():
    assert set(CASES) == {path.stem for path in FOLDER.glob("digits_*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_config_trains_and_all_its_figures_are_there_and_explained(name, tmp_path, monkeypatch):
    found = []

    def write(workdir, experiment, config, results, *rest, real=report.write):
        found.extend(results)
        return real(workdir, experiment, config, results, *rest)

    monkeypatch.setattr(digits, "digits_source", few)
    monkeypatch.setattr(report, "write", write)
    options = ["--config", str(FOLDER / f"{name}.py"), "--workdir", str(tmp_path)]
    options += [f"--config.{key}={value}" for key, value in {**SMALL, **CASES[name]}.items()]
    assert cli.main(["train", *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = {key for line in lines for key in line}
    assert {"loss/image", f"loss/{BESIDE[name]}", "val/loss"} <= seen
    assert all(np.isfinite(value) for line in lines for value in line.values() if isinstance(value, (int, float)))
    assert cli.main(["eval", *options]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["step"] == 3 and len(found) >= 1
    for part in found:
        assert part.metrics and set(part.metrics) == set(part.definitions)
        assert all(written[metric] is not None for metric in part.metrics)  # null is what is not finite
        assert len(part.figures) >= 2 and all(picture.caption for picture in part.figures.values())


@pytest.mark.slow
@pytest.mark.parametrize("encoder, head", [("belief", "middle"), ("network", "middle"), ("mean", "output")])
def test_labels_are_read_from_images_alone(encoder, head, monkeypatch):
    """The labels that are fed elsewhere, to the classes' means and in a batch, may be any; where they are in the mean they are seen."""
    data = few("train").arrays
    permuted = (3 * data["label"] + 1) % 10

    def wrong(split, data_dir=None):
        return ArraySource({**few(split, data_dir).arrays, "label": (3 * few(split, data_dir).arrays["label"] + 1) % 10})

    read = {}
    for name, source in (("right", few), ("wrong", wrong)):
        monkeypatch.setattr(digits, "digits_source", source)
        experiment = build("digits_label", encoder=encoder, **{"model.head": head, "model.depth": 2})
        params = jax.tree.map(  # nothing is zero, so that outputs depend on inputs
            lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), experiment.init(jax.random.key(0)))
        images = {"image": load_all(experiment.test_data())["image"]}
        read[name] = predict_batched(experiment, params, jax.random.key(1), images, "label", 100)
    np.testing.assert_array_equal(read["right"], read["wrong"])
    assert len(np.unique(read["right"].argmax(-1))) > 1 and read["right"].std(0).min() > 1e-4

    process, keys = experiment.process.bind(params), jax.random.split(jax.random.key(2), 200)

    def logits(labels, image_time, label_time):
        t = {"image": jnp.full(200, image_time), "label": jnp.full(200, label_time)}
        noised = process.corrupt(fold(keys, "corrupt"), {"image": jnp.asarray(data["image"]), "label": jnp.asarray(labels)}, t)
        return experiment.apply(params, *process.inputs(noised.xt, noised.t))["label"]

    for time in (0.0, 0.5):  # the path of the read-out, and plain DDPM's
        np.testing.assert_array_equal(logits(data["label"], time, 1.0), logits(permuted, time, 1.0))
    assert np.abs(logits(data["label"], 0.5, 0.5) - logits(permuted, 0.5, 0.5)).max() > 1e-3


@pytest.mark.parametrize("name, key, value, words", [
    ("digits_label", "encoder", "image", "config.encoder is 'image': choose belief or mean"),
    ("digits_transition", "pair", "winter", "config.pair is 'winter': choose segmentation or night"),
])
def test_what_a_config_does_not_know_is_refused(name, key, value, words):
    with pytest.raises(UserError, match=words):
        build(name, **{key: value})


def test_the_other_pictures_enter_as_large_as_the_images():
    for pair in ("segmentation", "night"):
        experiment = build("digits_transition", pair=pair)
        scenes = experiment.train_data().take(np.arange(1000))
        assert set(experiment.shape) == {"image", pair} <= set(scenes)
        images = {name: jnp.asarray(scenes[name]) for name in ("image", pair)}
        encoded = experiment.process.added[pair].encode(jax.nn.one_hot(images[pair], 11) if pair == "segmentation" else images[pair])
        ratio = np.sqrt((encoded**2).mean() / (images["image"] ** 2).mean())
        assert encoded.shape == images["image"].shape and 0.97 < ratio < 1.03


@pytest.mark.parametrize("name", ["mtdiffusion_experiments", "mtdiffusion_real_experiments"])
def test_the_experiments_name_values_that_exist(name, loaded_launch):
    program = loaded_launch(name)
    every = list(program.settings())
    assert len({(part, setting) for part, setting, *_ in every}) == len(every)
    for _, _, data, overrides in every:
        config = data if data in ("masked", "transition") else "label" if "sample.settle" in overrides else "representation"
        config, _ = configs.load(str(FOLDER / f"digits_{config}.py"), list(overrides.items()))
        assert config.model.width == 64 and config.train.steps == int(overrides["train.steps"])


@pytest.mark.slow
def test_an_experiment_on_real_pairs_runs(loaded_launch, tmp_path, monkeypatch):
    from tests.small_sets import fashion_mnist

    program, folder = loaded_launch("mtdiffusion_real_experiments"), str(fashion_mnist(tmp_path))
    for name, value in {"SAMPLES": 20, "CLASSIFIER_STEPS": 2, "COMPONENTS": 4}.items():
        monkeypatch.setattr(program, name, value)
    small = {name: str(SMALL[name]) for name in ("model.width", "model.depth", "train.steps", "train.global_batch", "sample.steps")}
    kinds = {data.split()[0]: (data, {**overrides, **small, "train.warmup_steps": "1"}) for _, _, data, overrides in program.settings()}
    found = {kind: program.run(1, data, overrides, folder)[0] for kind, (data, overrides) in kinds.items()}
    assert all(np.isfinite([*metrics.values()]).all() for metrics in found.values())
    assert set(found["label"]) == set(found["joint"]) > set(found["given"]) and set(found["features"]) == set(found["vectors"])
    assert set(found["alone"]) == {"lite0-FD, absent"} and found["label"] != found["joint"] and found["features"] != found["vectors"]
