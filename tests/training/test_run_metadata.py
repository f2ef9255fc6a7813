"""What a run's folder says of it, and what may change when it continues."""

import dataclasses
import functools
import json
import os
import shutil

import numpy as np
import pytest
import toy

from mmdiff.data.modalities import Labels
from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.training.run_metadata import (
    check_classes,
    check_config,
    check_data,
    check_dependencies,
    describe_data,
    with_class_names,
    write_config,
    write_data,
    write_dependencies,
)


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
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints without their config.json"):
        check_config(tmp_path, config)
    assert check_config(tmp_path, config, in_use=True) == {}
    os.mkfifo(tmp_path / "config.json")  # nobody will ever write into it
    with pytest.raises(UserError, match="config.json is a named pipe"):
        check_config(tmp_path, config)


def test_a_run_of_before_pictures_could_be_damaged_continues(tmp_path):
    config = toy.get_config()
    write_config(tmp_path, config)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    config.data = {"damaged": 0.0}
    assert check_config(tmp_path, config) == {"data.damaged": (None, 0.0)}


def test_a_run_is_refused_with_other_frozen_networks(tmp_path):
    config = toy.get_config()
    said = {"tokenizer": "a" * 64, "towers": None}  # the towers are not available
    experiment = dataclasses.replace(toy.build(config), frozen_deps={name: functools.partial(said.get, name) for name in said})
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
    (tmp_path / "dependencies.json").rename(tmp_path / "beside.json")  # as earlier versions called it
    with pytest.raises(UserError, match="trained with tokenizer of fingerprint aaaaaaaaaaaa"):
        check_dependencies(tmp_path, experiment)
    said["tokenizer"] = None
    check_dependencies(tmp_path, experiment)
    write_dependencies(tmp_path, experiment)  # what is not available is not forgotten
    assert json.loads((tmp_path / "dependencies.json").read_text()) == {"tokenizer": "a" * 64, "towers": "c" * 64}
    shutil.rmtree(tmp_path / "checkpoints")
    write_dependencies(tmp_path, experiment)  # but what an attempt without a checkpoint has left is
    assert json.loads((tmp_path / "dependencies.json").read_text()) == {"towers": "c" * 64}




def experiment_of(source, **labels):
    return dataclasses.replace(toy.build(toy.get_config()), train_data=lambda: source, modalities={"label": Labels(3, **labels)})


class Folder(ArraySource):
    """A folder of classes: `names`, in their order."""

    names = ()


def folder(*names, count=6):
    source = Folder({"label": np.arange(count) % len(names)})
    object.__setattr__(source, "names", names)
    return source


def test_the_names_of_classes_are_those_of_the_config_or_of_the_data():
    for experiment, source, words in (
        (experiment_of(None, names=("a", "b", "c")), folder("x", "y", "z"), ["a", "b", "c"]),
        (experiment_of(None, synonyms=("one", "two", "three")), folder("x", "y", "z"), ["one", "two", "three"]),
        (experiment_of(None), folder("x", "y", "z"), ["x", "y", "z"]),
    ):
        assert describe_data(experiment, source)["classes"] == {"label": words}
    assert describe_data(experiment_of(None), ArraySource({"label": np.zeros(3)}))["classes"] == {}


def test_classes_are_called_by_the_names_that_a_run_has_stored(tmp_path):
    experiment = experiment_of(None)
    assert with_class_names(experiment, tmp_path) is experiment
    write_data(tmp_path, describe_data(experiment, folder("cat", "dog, wild")))
    label = with_class_names(experiment, tmp_path).modalities["label"]
    assert label.parse("cat").tolist() == [0] and label.parse("dog, wild").tolist() == [1] and label.parse("2,cat").tolist() == [2, 0]
    assert label.show(np.array([1, 2])) == ["dog, wild", "2"]
    with pytest.raises(UserError, match="label 'cow' does not exist: labels are 0..2 or one of cat, "):
        label.parse("cow")
    for text in ("", "[]", "{}", '{"fingerprint": 3, "classes": {}}', '{"fingerprint": "1-a", "classes": {"label": 5}}'):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(UserError, match="data.json is not "):
            with_class_names(experiment, tmp_path)


def test_what_is_measured_on_must_have_the_classes_that_were_trained_on(tmp_path):
    experiment = experiment_of(None)
    write_data(tmp_path, describe_data(experiment, folder("cat", "dog")))
    check_classes(tmp_path, dataclasses.replace(experiment, test_data=lambda: folder("cat", "dog", count=4)))
    other = dataclasses.replace(experiment, test_data=lambda: folder("cat", "cow", "dog"))
    with pytest.raises(UserError, match="class 1 of label was dog in the data .* trained on and is cow in those to measure on"):
        check_classes(tmp_path, other)
    check_classes(tmp_path, dataclasses.replace(other, modalities={"label": Labels(3, ("cat", "dog", "hen"))}))  # the config names them


def test_other_data_are_refused_or_said(tmp_path):
    experiment = experiment_of(None)
    stored = describe_data(experiment, folder("cat", "dog", count=6))
    assert check_data(tmp_path, stored, describe_data(experiment, folder("cat", "dog", count=6)), moved=["data.dir"]) == []
    grown = describe_data(experiment, folder("cat", "dog", count=8))
    with pytest.raises(UserError, match=r"are not those of the run in .* \(6 examples then, 8 now\): .* config.train.other_data=true"):
        check_data(tmp_path, stored, grown)
    [said] = check_data(tmp_path, stored, grown, other=True)
    assert "6 examples then, 8 now" in said
    shifted = describe_data(experiment, folder("cat", "cow", "dog", count=9))
    with pytest.raises(UserError, match="class 1 of label was dog and is cow now, so labels mean something else; the training data"):
        check_data(tmp_path, stored, shifted)
    # A run of before data were noted goes on with a note; whether a folder that was moved holds the same, nobody can say.
    assert "taken to be the same" in check_data(tmp_path, None, stored)[0]
    with pytest.raises(UserError, match="so the data cannot be compared: config.data.dir must stay as it is"):
        check_data(tmp_path, None, stored, moved=["data.dir"])


def test_a_folder_with_a_config_of_something_else_is_refused_and_left_alone(tmp_path):
    for text in ("[1]", "{}", '{"name": "a package"}', '{"train": 3}', "3", "{", "\udcff", "null"):
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        before = (tmp_path / "config.json").read_bytes()
        for use in (check_config, write_config):
            with pytest.raises(UserError, match=f"{tmp_path}/config.json is not .*(restore|choose)"):
                use(tmp_path, toy.get_config())
        assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json is a folder, not a file"):
        check_config(tmp_path, toy.get_config())


def test_what_a_config_need_not_state_is_no_difference(tmp_path):
    config = toy.get_config()
    write_config(tmp_path, config)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    config.train.update(other_data=False, start_strict=False, ema_widths=())
    assert check_config(tmp_path, config) == {}
    config.train.update(learning_rate=1.0, other_data=True)
    assert check_config(tmp_path, config) == {"train.learning_rate": (0.01, 1.0), "train.other_data": (False, True)}
    config.train.ema_widths = (0.05, 0.1)  # which no run of before can have tracked
    with pytest.raises(UserError, match=r"of another config: train.ema_widths \(there \(\), here \[0.05, 0.1\]\)"):
        check_config(tmp_path, config)
    config.train.ema_widths = ()
    config.seed += 1  # another run if it is trained on, the same weights if they are used
    with pytest.raises(UserError, match="holds a run of another config: seed "):
        check_config(tmp_path, config)
    assert set(check_config(tmp_path, config, in_use=True)) == {"seed", "train.learning_rate", "train.other_data"}
