"""What a run's folder says of it, and what may change when it continues."""

import dataclasses
import functools
import json
import shutil

import pytest
import toy

from mmdiff.errors import UserError
from mmdiff.training.run_metadata import check_config, check_dependencies, write_config, write_dependencies


def test_a_run_continues_with_its_own_config_only(tmp_path):
    config = toy.get_config()
    write_config(tmp_path, config)
    config.seed = 9
    check_config(tmp_path, config)  # nothing is there yet that could be spoilt
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    config.model.width = 8
    config.train.ema = 0.5
    with pytest.raises(UserError) as error:
        check_config(tmp_path, config)
    for part in ("seed (there 3, here 9)", "model.width (there 32, here 8)", "train.ema (there 0.99, here 0.5)"):
        assert part in str(error.value)
    config = toy.get_config()
    config.train.update(steps=99, log_every=1, microbatches=2, keep=9, mesh={"data": 1, "fsdp": 1, "tensor": 1})
    config.sample.steps = 77
    changed = check_config(tmp_path, config)
    assert changed["train.steps"] == (40, 99) and changed["sample.steps"] == (2, 77) and len(changed) == 6
    (tmp_path / "config.json").write_text('{"seed":')
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        check_config(tmp_path, config)


def test_a_run_is_refused_with_other_frozen_networks(tmp_path):
    config = toy.get_config()
    said = {"tokenizer": "a" * 64, "towers": None}  # the towers are not available
    experiment = dataclasses.replace(toy.build(config), beside={name: functools.partial(said.get, name) for name in said})
    check_dependencies(tmp_path, experiment)  # nothing is there yet
    write_config(tmp_path, config)
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    check_dependencies(tmp_path, experiment)  # of before such things were noted
    write_dependencies(tmp_path, experiment)
    assert json.loads((tmp_path / "dependencies.json").read_text()) == {"tokenizer": "a" * 64}
    check_dependencies(tmp_path, experiment)
    said["towers"] = "c" * 64  # which the run says nothing of
    check_dependencies(tmp_path, experiment)
    said["tokenizer"] = "b" * 64
    with pytest.raises(UserError, match=r"trained with tokenizer of fingerprint aaaaaaaaaaaa, and available is bbbbbbbbbbbb"):
        check_dependencies(tmp_path, experiment)
    said["tokenizer"] = None
    check_dependencies(tmp_path, experiment)
    write_dependencies(tmp_path, experiment)  # what is not available is not forgotten
    assert json.loads((tmp_path / "dependencies.json").read_text()) == {"tokenizer": "a" * 64, "towers": "c" * 64}
    shutil.rmtree(tmp_path / "checkpoints")
    write_dependencies(tmp_path, experiment)  # but what an attempt without a checkpoint has left is
    assert json.loads((tmp_path / "dependencies.json").read_text()) == {"towers": "c" * 64}


