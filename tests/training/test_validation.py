"""The loss on held-out data: a mean over its examples, whatever the batch and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import Mesh

from mmdiff.data.sources import ArraySource
from mmdiff.microbatches import whole_batch
from mmdiff.nets import target
from mmdiff.training import sharding
from mmdiff.training.validation import Validation


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1, 1), sharding.AXES)


def validation(config, loss, x, batch, devices=1):
    config.train.global_batch = batch
    experiment = dataclasses.replace(toy.build(config), loss=loss, validation_data=lambda: ArraySource({"x": x}))
    return Validation(experiment, config, mesh_of(devices))


def hardness(params, batch, key):
    return batch["x"].mean(), {"square": (batch["x"] ** 2).mean()}


@pytest.mark.parametrize("count, batch, devices", [(129, 128, 1), (129, 128, 8), (5, 8, 2), (16, 8, 1), (21, 8, 8)])
def test_every_example_counts_once(count, batch, devices, config):
    x = np.zeros(count, np.float32)
    x[-1] = 1.0  # only the last one is hard
    found = validation(config, hardness, x, batch, devices)(())
    assert found == pytest.approx({"val/loss": 1 / count, "val/square": 1 / count}, rel=1e-6)


def test_it_repeats_itself_and_does_not_depend_on_the_batch_or_the_mesh(config):
    """A loss whose noise comes of the examples' index."""
    x = toy.data(20, 1).arrays["x"]
    params = toy.init(jax.random.key(0))
    evaluate = validation(config, toy.loss, x, 16)
    first = evaluate(params)
    assert first == evaluate(params) and set(first) == {"val/loss", "val/loss/x", "val/error"}
    for batch, devices in (20, 1), (2, 1), (8, 8):
        other = validation(config, toy.loss, x, batch, devices)(params)
        assert other == pytest.approx(first, rel=2e-6), (batch, devices)


def test_examples_that_are_compared_are_compared_with_others(config):
    def spread(params, batch, key):
        x = whole_batch(batch["x"])
        return ((x[:, None] - x[None]) ** 2).mean(), {}

    x = np.random.default_rng(0).normal(size=11).astype(np.float32)
    batches = x[:8], x[np.arange(8, 16) % 11]
    first, last = (((b[:, None] - b[None]) ** 2).mean() for b in batches)
    assert validation(config, spread, x, 8)(())["val/loss"] == pytest.approx((8 * first + 3 * last) / 11, rel=1e-6)


def test_what_is_seen_while_training_never_reads_the_test_data(config):
    def never():
        raise AssertionError("the test data were read")

    experiment = dataclasses.replace(toy.build(config), test_data=never)
    evaluate = Validation(experiment, config, mesh_of(1))
    assert np.isfinite(evaluate(experiment.init(jax.random.key(0)))["val/loss"])
    assert experiment.split == "test" and experiment.on_validation().split == "validation"
    assert len(experiment.on_validation().test_data()) == len(experiment.validation_data())


def test_its_metrics_are_named_before_anything_runs(config):
    evaluate = validation(config, hardness, np.zeros(4, np.float32), 4)
    shapes = {"x": jax.ShapeDtypeStruct((4,), jnp.float32), "index": jax.ShapeDtypeStruct((4,), jnp.uint32)}
    assert evaluate.names((), shapes) == ["val/loss", "val/square"]


def test_it_is_meant_for_the_mesh_as_the_step_is(config):
    seen = []

    def loss(params, batch, key):
        seen.append((target.axis_size("fsdp"), target.single_cpu()))
        return toy.loss(params, batch, key)

    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 2, 1, 1), sharding.AXES)
    experiment = dataclasses.replace(toy.build(config), loss=loss)
    Validation(experiment, config, mesh)(experiment.init(jax.random.key(0)))
    assert seen == [(2, False)]
