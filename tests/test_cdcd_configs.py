"""The CDCD configs: each builds, learns from its data and samples in small; the experiments name values that exist."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff.data.loader import batches
from mmdiff.data.sources import RandomSource
from mmdiff.errors import UserError
from mmdiff.training import optim
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


@pytest.mark.slow
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
    drawn = jax.jit(lambda params, keys, given: experiment.sample(params, keys, given, steps=2, guidance=1.5))(
        state.ema, jax.random.split(jax.random.key(1), 3), given)
    np.testing.assert_array_equal(drawn[condition], given[condition])
    tokens = np.asarray(drawn["tokens"])
    assert tokens.shape == (3, *experiment.shape["tokens"]) and tokens.min() >= 0
    assert tokens.max() < experiment.process.parts["tokens"].classes  # no mask is left


@pytest.mark.slow
def test_a_contrast_of_weight_zero_is_left_out_and_forms_are_read():
    """infonce at equal scores is log(N + 1): a new network says the same of every token, whatever the negative."""
    values = {}
    for form in ("linear", "infonce"):
        experiment, _ = build("markov_class", loss__step_intra="0.0", loss__sample_intra="0.1", loss__count="2", form=form)
        batch = next(batches(experiment.train_data(), 0, 8))
        params = jax.tree.map(jnp.zeros_like, experiment.init(jax.random.key(0)))
        _, metrics = experiment.loss(params, batch, jax.random.key(1))
        assert "loss/sample_inter" not in metrics and "loss/step_intra" not in metrics
        values[form] = float(metrics["loss/sample_intra"])
    assert values["linear"] < 0 and 1.0 * np.log(3) <= values["infonce"] <= 2.0 * np.log(3)  # times w(t) in [1, 2), over p_t
    with pytest.raises(UserError, match="no form of contrast 'info_nce': choose one of linear, weighted, infonce"):
        build("digits_class", form="info_nce")


@pytest.mark.slow
@pytest.mark.parametrize("name, condition", [("digits_class", "label"), ("scenes_text", "text")])
def test_all_four_contrasts_and_none_between_examples_without_a_condition(name, condition):
    weights = {f"loss__{each}": "1e-3" for each in ("step_intra", "step_inter", "sample_intra", "sample_inter")}
    for dropout in ("0.0", "1.0"):
        experiment, config = build(name, loss__count="2", **weights, **{f"{condition}_dropout": dropout})
        _, metrics = experiment.loss(experiment.init(jax.random.key(0)), next(batches(source(name, experiment), 0, 16)), jax.random.key(1))
        for each in ("step_intra", "step_inter", "sample_intra", "sample_inter"):
            gone = dropout == "1.0" and each.endswith("inter")
            assert (metrics[f"loss/{each}"] == 0) == gone, (each, dropout)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["false", "true"])
def test_a_frozen_text_encoder_keeps_its_weights(freeze):
    experiment, _ = build("scenes_text", text__freeze=freeze, train__warmup_steps="0")
    params = jax.tree.map(jnp.ones_like, experiment.init(jax.random.key(0)))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = experiment.optimizer.update(zeros, experiment.optimizer.init(params), params)
    encoder, rest = updates["params"].pop("encoder"), updates["params"]
    scales = optim.all_but("/scale$")(rest)  # those of norms never decay
    assert jax.tree.leaves(jax.tree.map(lambda leaf: bool(leaf.any()), rest)) == jax.tree.leaves(scales)
    assert any(leaf.any() for leaf in jax.tree.leaves(encoder)) == (freeze == "false")


def test_the_released_trajectory_refuses_what_does_not_divide_its_chain():
    experiment, _ = build("digits_class", chain__steps="8", eval__sampling_steps="(8, 3)")
    draw = experiment.evaluators[1].samplers["released"]
    with pytest.raises(UserError, match="divisor of the chain's 8 steps, not 3"):
        draw(None, jax.random.split(jax.random.key(0), 2), {}, steps=3, guidance=1.0)


@pytest.fixture(scope="module")
def experiments(loaded_launch):
    return loaded_launch("cdcd_experiments")


def test_the_experiments_name_values_that_exist(experiments):
    every = list(experiments.settings())
    assert len({(part, name) for part, name, *_ in every}) == len(every)  # a finished run is known by its name
    for _, _, data, overrides in every:
        config, _ = configs.load(str(FOLDER / f"{experiments.SETS[data][0]}.py"), list(overrides.items()))
        assert config.sample.steps <= config.chain.steps


@pytest.mark.slow
def test_an_experiment_runs(experiments, monkeypatch):
    monkeypatch.setattr(experiments, "SAMPLES", 100)
    small = {**experiments.MARKOV, **experiments.LOSSES["both"], "train.steps": "2", "chain.steps": "4", "sample.steps": "2"}
    metrics, seconds = experiments.run(1, "markov", small)
    assert set(metrics) == set(experiments.SETS["markov"][2]) and all(np.isfinite(value) for value in metrics.values()) and seconds > 0
