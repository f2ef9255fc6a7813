"""The stand-in for ml_collections does what the real one does."""

import importlib
import json
import subprocess
import sys

import ml_collections
import pytest

from mmdiff import config as configs
from mmdiff import configdict
from mmdiff.errors import UserError

VALUES = {"b": {"rate": 1.5, "flag": True, "deep": {"names": ("x", "y")}}, "a": 1, "s": "text", "sizes": [1, 2], "none": None}
BOTH = pytest.mark.parametrize("kind", [ml_collections.ConfigDict, configdict.ConfigDict])


def trace(kind, action):
    """What an action does to a config: its values after it, or the kind of the error."""
    config = kind(VALUES)
    try:
        action(config)
    except Exception as error:
        return type(error)
    return config.to_dict()


def closed(action):
    return lambda config: action(config.lock())


def within(context, action):
    def act(config):
        config.lock()
        with getattr(config, context)():
            action(config)
        with pytest.raises(AttributeError):  # the context is over
            config.newer = 1
        with pytest.raises(TypeError):
            config.b.rate = "fast"

    return act


@pytest.mark.parametrize(
    "action",
    [
        lambda c: setattr(c, "a", 2),
        lambda c: setattr(c, "a", 2.5),
        lambda c: setattr(c, "a", None),
        lambda c: setattr(c, "a", "2"),
        lambda c: setattr(c.b, "rate", 2),
        lambda c: setattr(c.b, "flag", 1),
        lambda c: setattr(c.b, "rate", "fast"),
        lambda c: setattr(c, "b", 3),
        lambda c: setattr(c, "b", {"rate": 0.5}),
        lambda c: setattr(c, "none", "some"),
        lambda c: setattr(c, "sizes", (3, 4)),
        lambda c: setattr(c.b.deep, "names", ["z"]),
        lambda c: setattr(c, "new", {"inner": 1}) or setattr(c.new, "inner", 2),
        lambda c: c.__setitem__("a.b", 1),
        lambda c: c.update({"a": 3, "b": {"rate": 9.0}, "extra": 0}),
        lambda c: c.missing,
        lambda c: c["missing"],
        lambda c: c.get("missing").nothing,
        lambda c: c.__delitem__("a"),
        closed(lambda c: setattr(c, "a", 7)),
        closed(lambda c: setattr(c, "new", 7)),
        closed(lambda c: setattr(c.b.deep, "new", 7)),
        closed(lambda c: c.__setitem__("new", 7)),
        closed(lambda c: c.__delitem__("a")),
        within("unlocked", lambda c: setattr(c.b, "new", 7)),
        within("ignore_type", lambda c: setattr(c, "a", "seven")),
    ],
)
def test_every_action_has_the_same_effect(action):
    assert trace(configdict.ConfigDict, action) == trace(ml_collections.ConfigDict, action)


@BOTH
def test_reading(kind):
    config = kind(VALUES)
    assert list(config) == list(config.keys()) == sorted(VALUES)
    assert [key for key, _ in config.items()] == sorted(VALUES) and config.values()[0] == 1
    assert config.b.deep.names == config["b"]["deep"]["names"] == ("x", "y")
    assert dict(config.b)["rate"] == config.b.get("rate") == 1.5 and "a" in config and "z" not in config and len(config) == 5
    assert {key: config.get_type(key) for key in ("a", "none", "sizes")} == {"a": int, "none": type(None), "sizes": list}
    assert config.to_dict() == VALUES and not config.is_locked and config.lock() is config and config.b.is_locked


FILES = ["configs/digits_joint.py", "configs/imagenet256/dit_xl2.py", "configs/imagenet256/joint_xl2.py"]


def load_with(monkeypatch, module, path, overrides):
    """Loads a config with this module as ml_collections; to_json, flatten and the types of the leaves, or the mistake."""
    monkeypatch.setitem(sys.modules, "ml_collections", module)
    try:
        loaded = importlib.reload(configs)
        config, _ = loaded.load(path, overrides)
        flat = loaded.flatten(config)
        assert isinstance(config, module.ConfigDict) and config.is_locked
        return loaded.to_json(config), flat, {key: type(value) for key, value in flat.items()}
    except UserError as error:
        return str(error)
    finally:
        monkeypatch.undo()
        importlib.reload(configs)


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [("train.global_batch", "64"), ("train.learning_rate", "1"), ("train.tensorboard", "false"), ("train.mesh.fsdp", "2")],
        [("train.steps", "many")],
        [("train.stepps", "1")],
        [("train", "1")],
    ],
)
def test_the_config_files_load_alike(monkeypatch, path, overrides):
    ours, theirs = (load_with(monkeypatch, module, path, overrides) for module in (configdict, ml_collections))
    assert ours == theirs
    assert (len(overrides) == 1) == isinstance(ours, str)


def test_it_stands_in_only_where_the_real_one_is_missing(tmp_path):
    code = """
import sys
if {missing}:
    import importlib.abc

    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "ml_collections":
                raise ModuleNotFoundError(name=name)
    sys.meta_path.insert(0, Missing())
import mmdiff.config
from ml_collections import ConfigDict
print(ConfigDict.__module__)
"""
    modules = [
        subprocess.run([sys.executable, "-c", code.format(missing=missing)], capture_output=True, text=True, check=True).stdout.strip()
        for missing in (True, False)
    ]
    assert modules[0] == "mmdiff.configdict" and modules[1].startswith("ml_collections")


def test_a_stored_config_can_be_read_back():
    config = configdict.ConfigDict(VALUES)
    assert configdict.ConfigDict(json.loads(configs.to_json(config))).b.deep.names == ["x", "y"]
