"""The CDCD configs: each builds, learns from its data and samples in small; the experiments name values that exist."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff.data.loader import batches
from mmdiff.data.sources import RandomSource
from mmdiff.training.step import init_state, make_step

FOLDER = pathlib.Path(__file__).parents[1] / "configs/cdcd"
SMALL = {"model.width": "16", "model.depth": "1", "model.heads": "2", "chain.steps": "4"}


def build(name, **overrides):
    values = [*SMALL.items(), *((key.replace("__", "."), value) for key, value in overrides.items())]
    if name == "scenes_text":
        values += [("text.width", "16"), ("text.heads", "2")]
    config, module = configs.load(str(FOLDER / f"{name}.py"), values)
    return module.build(config), config


def source(name, experiment):
    # The scenes need a cache that a trained tokenizer writes.
    return RandomSource(experiment.modalities) if name == "scenes_text" else experiment.train_data()


@pytest.mark.parametrize("name, condition", [("digits_class", "label"), ("markov_class", "label"), ("scenes_text", "text")])
def test_a_config_trains_and_samples(name, condition):
    experiment, config = build(name, loss__step_intra="5e-5", loss__sample_inter="5e-6", loss__count="2")
    data = batches(source(name, experiment), config.seed, 16)
    first = next(data)
    experiment.process.check(first)
    step = jax.jit(make_step(experiment.loss, experiment.optimizer))
    state = init_state(experiment.init, experiment.optimizer, jax.random.key(0), experiment.loss)
    state, metrics = step(state, first)
    assert {"loss/vlb", "loss/auxiliary", "loss/step_intra", "loss/sample_inter"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["skipped"] == 0
    assert int(state.stats["loss"]["count"].sum()) == 16  # every example's time was counted
    given = {condition: first[condition][:3]}
    drawn = jax.jit(lambda params, keys, given: experiment.draw(params, keys, given, steps=2, guidance=1.5))(
        state.ema, jax.random.split(jax.random.key(1), 3), given)
    np.testing.assert_array_equal(drawn[condition], given[condition])
    tokens = np.asarray(drawn["tokens"])
    assert tokens.shape == (3, *experiment.shape["tokens"]) and tokens.min() >= 0
    assert tokens.max() < experiment.process.parts["tokens"].classes  # no mask is left


def test_a_contrast_of_weight_zero_is_left_out_and_forms_differ():
    values = {}
    for form in ("linear", "infonce"):
        experiment, _ = build("markov_class", loss__step_intra="0.1", loss__count="2", form=form)
        batch = next(batches(experiment.train_data(), 0, 8))
        params = experiment.init(jax.random.key(0))
        values[form], metrics = experiment.loss(params, batch, jax.random.key(1))
        assert "loss/sample_inter" not in metrics
    assert values["linear"] != values["infonce"]


def test_the_experiments_name_values_that_exist():
    spec = importlib.util.spec_from_file_location("experiments", FOLDER.parents[1] / "launch/cdcd_experiments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    every = list(module.settings())
    assert len({(part, name) for part, name, *_ in every}) == len(every)  # a finished run is known by its name
    for _, _, name, overrides in every:
        config, _ = configs.load(str(FOLDER / f"{name}.py"), list(overrides.items()))
        assert config.sample.steps <= config.chain.steps
