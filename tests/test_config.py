"""Config files: loading, typed overrides and comparison."""

import json
import textwrap

import ml_collections
import pytest

from mmdiff import config as configs
from mmdiff.errors import UserError

FILE = """
import ml_collections
from ml_collections import config_dict

def get_config():
    return ml_collections.ConfigDict({
        "seed": 0,
        "train": {"steps": 3000, "learning_rate": 1e-3, "tensorboard": True, "best": "",
                  "mesh": {"data": -1, "fsdp": 1}},
        "sample": {"steps": 50, "guidance": 1.5},
        "model": {"shape": (8, 8, 1), "widths": [1.0, 2.0], "names": ("a", "b"), "note": None,
                  "limit": config_dict.placeholder(int)},
    })

def build(config):
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(FILE)
    return str(path)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "7", 7),
        ("train.steps", "-20", -20),
        ("train.learning_rate", "3e-4", 3e-4),
        ("train.learning_rate", "1", 1.0),
        ("train.tensorboard", "False", False),
        ("train.tensorboard", "1", True),
        ("train.best", "label_accuracy", "label_accuracy"),
        ("train.best", "", ""),
        ("train.mesh.fsdp", "2", 2),
        ("model.shape", "16,16,3", (16, 16, 3)),
        ("model.shape", "(16, 16)", (16, 16)),
        ("model.widths", "[3, 4.5]", [3.0, 4.5]),
        ("model.names", "red,green", ("red", "green")),
        ("model.names", "('red',)", ("red",)),
        ("model.note", "none", None),
        ("model.note", "[1, 2]", [1, 2]),
        ("model.note", "plain words", "plain words"),
        ("model.limit", "3", 3),
    ],
)
def test_an_override_takes_the_type_of_the_value_it_replaces(file, key, text, value):
    config, _ = configs.load(file, [(key, text)])
    new = configs.flatten(config)[key]
    assert new == value and type(new) is type(value)
    assert configs.flatten(config) == configs.flatten(configs.load(file)[0]) | {key: value}


def test_the_last_override_of_a_key_wins(file):
    assert configs.load(file, [("seed", "1"), ("seed", "2")])[0].seed == 2


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("train.stpes", "7", "no config key 'train.stpes': did you mean 'train.steps'?"),
        ("steps", "7", "'train.steps'?"),
        ("learning_rate", "7", "'train.learning_rate'?"),
        ("train.guidance", "7", "'sample.guidance'?"),
        ("model.shape.0", "7", "'model.shape'?"),
        ("sead", "7", "'seed'?"),
        ("train", "7", "config.train is a section"),
        ("train.steps", "many", "config.train.steps must be an integer (it is 3000), not 'many'"),
        ("train.steps", "2.5", "must be an integer"),
        ("train.learning_rate", "fast", "must be a number"),
        ("train.tensorboard", "maybe", "must be true or false"),
        ("model.shape", "a,b", "must be like 1,2"),
        ("model.shape", "1.5,2", "must be like 1,2"),
        ("model.limit", "x", "must be an integer"),
    ],
)
def test_a_wrong_override_is_one_clear_sentence(file, key, text, words):
    with pytest.raises(UserError) as caught:
        configs.load(file, [(key, text)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("missing.py", None, "there is no config file"),
        ("config.json", "{}", "is no config file"),
        ("empty.py", "", "defines no function get_config"),
        ("half.py", "def get_config():\n    pass", "defines no function build"),
        ("broken.py", "x = 1\ndef get_config(:", "not valid Python: invalid syntax on line 2"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        configs.load(str(path))


def test_a_config_may_import_its_neighbour_from_any_working_directory(file, tmp_path, monkeypatch):
    (tmp_path / "variant_of_plain.py").write_text(textwrap.dedent("""
        from plain import build, get_config as base

        def get_config():
            config = base()
            config.seed = 5
            return config
    """))
    monkeypatch.chdir("/")
    config, module = configs.load(str(tmp_path / "variant_of_plain.py"))
    assert config.seed == 5 and module.build(config) is config


def test_a_loaded_config_takes_no_new_key(file):
    config, _ = configs.load(file)
    with pytest.raises(AttributeError):
        config.train.extra = 1


def test_flatten_and_json_hold_every_value(file):
    config, _ = configs.load(file)
    flat = configs.flatten(config)
    assert flat["train.mesh.data"] == -1 and flat["model.shape"] == (8, 8, 1) and len(flat) == 14
    assert ml_collections.ConfigDict(json.loads(configs.to_json(config))).train.steps == 3000


def test_difference_names_each_key_that_changed_and_takes_lists_for_tuples(file):
    config, _ = configs.load(file)
    stored = json.loads(configs.to_json(config))
    assert configs.difference(stored, config) == {}
    changed, _ = configs.load(file, [("train.steps", "5"), ("model.shape", "4,4,1")])
    assert configs.difference(stored, changed) == {"train.steps": (3000, 5), "model.shape": ([8, 8, 1], (4, 4, 1))}
    del stored["seed"]
    assert configs.difference(stored, config) == {"seed": (None, 0)}
