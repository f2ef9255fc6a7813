"""A run that begins with the weights of another one: what fits is taken, the rest is said, and refused where everything is demanded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_checkpoints import INIT, WIDTH, make, mesh_of, save

from mmdiff.data.modalities import Labels
from mmdiff.errors import UserError
from mmdiff.training import run_metadata
from mmdiff.training.finetune import start_from


def other_init(key, drop=(), **shapes):
    """The toy's weights, without some and with others."""
    weights = {name: value for name, value in INIT(key)["params"].items() if name not in drop}
    return {"params": {**weights, **{name: {"kernel": jnp.full(shape, 0.5)} for name, shape in shapes.items()}}}


def experiment_of(**change):
    config = toy.get_config()
    config.model.width = WIDTH
    experiment = dataclasses.replace(toy.build(config), init=functools.partial(other_init, **change))
    return experiment, experiment.init(jax.random.key(9))


@pytest.mark.parametrize("devices", [1, 4])
def test_what_fits_is_taken_and_the_rest_begins_afresh(devices, tmp_path):
    save(tmp_path, 1)
    trained = make(mesh_of(1), 1)[0].ema["params"]
    mesh = mesh_of(1, devices)
    # The head has another number of classes, one array is gone, another one is new.
    experiment, fresh = experiment_of(drop=("first",), second=(WIDTH, 3), third=(2, 2))
    with pytest.raises(UserError, match="no array of .*checkpoints/1 fits this network, .*name a run of a like network"):
        start_from(tmp_path, experiment, {}, fresh, mesh)
    experiment, fresh = experiment_of(second=(WIDTH, 3), third=(2, 2))
    weights, [said] = start_from(tmp_path, experiment, {}, fresh, mesh)
    assert said.startswith(f"1 of 3 arrays are taken from {tmp_path / 'checkpoints/1'}")
    assert f"params/second/kernel (({WIDTH}, 4) there, ({WIDTH}, 3) here), params/third/kernel (absent there, (2, 2) here)" in said
    np.testing.assert_array_equal(weights["params"]["first"]["kernel"], trained["first"]["kernel"])
    assert len(weights["params"]["first"]["kernel"].devices()) == devices
    for name in ("second", "third"):
        np.testing.assert_array_equal(weights["params"][name]["kernel"], fresh["params"][name]["kernel"])
    with pytest.raises(UserError, match="1 of 3 arrays are taken .* set config.train.start_strict=false to take what fits"):
        start_from(tmp_path, experiment, {}, fresh, mesh, strict=True)


def test_nothing_is_said_where_everything_fits_and_labels_that_mean_something_else_are(tmp_path):
    save(tmp_path, 1)
    experiment, fresh = experiment_of()
    weights, said = start_from(tmp_path, experiment, {}, fresh, mesh_of(1), strict=True)
    assert said == []
    jax.tree.map(np.testing.assert_array_equal, weights, make(mesh_of(1), 1)[0].ema)
    experiment = dataclasses.replace(experiment, modalities={"label": Labels(2, ("cat", "dog"))})
    run_metadata.write_data(tmp_path, run_metadata.describe_data(experiment, toy.data(5, 0)))
    here = run_metadata.describe_data(dataclasses.replace(experiment, modalities={"label": Labels(2, ("cat", "cow"))}), toy.data(5, 0))
    _, [said] = start_from(tmp_path, experiment, here, fresh, mesh_of(1))
    assert f"class 1 of label is dog in {tmp_path} and cow here" in said
    with pytest.raises(UserError, match="class 1 of label is dog"):
        start_from(tmp_path, experiment, here, fresh, mesh_of(1), strict=True)
