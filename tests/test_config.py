"""Config files: loading, typed overrides and comparison."""

import json
import pathlib
import subprocess
import sys
import textwrap

import jax
import ml_collections
import pytest

from mmdiff import config as configs
from mmdiff.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

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


HEAD = "from ml_collections import ConfigDict\ndef get_config():\n"
BUILD = "def build(config):\n    pass\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(FILE)
    return str(path)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "7", 7),
        ("train.steps", "20", 20),
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
        ("train.lr", "7", "'train.learning_rate'?"),
        ("optimizer.lr", "7", "'train.learning_rate'?"),
        ("learn_rate", "7", "'train.learning_rate'?"),
        ("num_steps", "7", "'train.steps'?"),
        ("sample.num_steps", "7", "'sample.steps'?"),
        ("cfg_scale", "7", "'sample.guidance'?"),
        ("train.epochs", "7", "counted in steps, not in epochs: did you mean 'train.steps'?"),
        ("train.neptune", "7", "choose one of config."),
        ("train.beta1", "7", "'train.beta1': choose one of config."),
        ("train.path", "7", "'train.path': choose one of config."),
        ("data.path", "7", "'data.path': choose one of config."),  # this config reads no data from a folder
        ("train", "7", "config.train is a section"),
        ("train.steps", "many", "config.train.steps must be an integer (it is 3000), not 'many'"),
        ("train.steps", "2.5", "must be an integer"),
        ("train.learning_rate", "fast", "must be a number"),
        ("train.tensorboard", "maybe", "must be true or false"),
        ("model.shape", "a,b", "must be like 1,2"),
        ("model.shape", "1.5,2", "must be like 1,2"),
        ("model.limit", "x", "must be an integer"),
        ("model.note", "b'bytes'", "config.model.note must be a number, text, true, false, none or a list of these, not b'bytes'"),
        ("train.steps", "0", "config.train.steps must be 1 or more, not 0"),
        ("train.steps", "9" * 25, "config.train.steps must be at most 2,147,483,647"),
        ("train.steps", "9" * 5000, "config.train.steps must be an integer"),
        ("train.learning_rate", "nan", "config.train.learning_rate must be a finite number, not nan"),
        ("train.learning_rate", "0", "config.train.learning_rate must be above 0, not 0.0"),
        ("train.learning_rate", "1e38", "config.train.learning_rate must be at most 1,000"),
        ("train.mesh.data", "0", "config.train.mesh.data must be -1 or 1 or more, not 0"),
        ("sample.guidance", "inf", "config.sample.guidance must be a finite number"),
        ("model.widths", "1,-2", "config.model.widths must be 1 or more, not [1.0, -2.0]"),
        ("model.shape", "", "must be like 1,2"),
        ("seed", "-1", "config.seed must be 0 or more"),
        ("seed", str(2**64), "config.seed must be at most 18,446,744,073,709,551,615"),
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
        ("latin.py", b"name = '\xe9'", "not valid Python"),
        ("zero.py", b"x = 1\0", "cannot be imported|not valid Python"),
        ("raising.py", "x = 1\nwidth = depth", "cannot be imported: NameError: name 'depth' is not defined .line 2."),
        ("missing_package.py", "import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("leaving.py", "import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("circle.py", "from circle import build", "cannot be imported: ImportError"),
        ("fails.py", f"{HEAD}    return 1 / 0\n{BUILD}", "the get_config of .* fails: ZeroDivisionError: division by zero .line 3."),
        ("none.py", f"{HEAD}    pass\n{BUILD}", "its get_config returns a NoneType, not an ml_collections.ConfigDict"),
        ("dict.py", f"{HEAD}    return dict(seed=0)\n{BUILD}", "its get_config returns a dict"),
        ("seedless.py", f"{HEAD}    return ConfigDict(dict(train={{}}))\n{BUILD}", "its get_config has no seed"),
        ("trainless.py", f"{HEAD}    return ConfigDict(dict(seed=0))\n{BUILD}", "its get_config has no train"),
        ("set.py", f"{HEAD}    return ConfigDict(dict(seed=0, train=dict(x={{1}})))\n{BUILD}", "config.train.x must be a number, text"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
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
    assert flat["train.mesh.data"] == -1 and flat["model.shape"] == (8, 8, 1) and len(flat) == 14 + len(configs.OPTIONAL)
    assert ml_collections.ConfigDict(json.loads(configs.to_json(config))).train.steps == 3000


def test_difference_names_each_key_that_changed_and_takes_lists_for_tuples(file):
    config, _ = configs.load(file)
    stored = json.loads(configs.to_json(config))
    assert configs.difference(stored, config) == {}
    changed, _ = configs.load(file, [("train.steps", "5"), ("model.shape", "4,4,1")])
    assert configs.difference(stored, changed) == {"train.steps": (3000, 5), "model.shape": ([8, 8, 1], (4, 4, 1))}
    del stored["seed"]
    assert configs.difference(stored, config) == {"seed": (None, 0)}


def test_infinities_of_the_file_are_allowed_and_come_back_from_strict_json(tmp_path):
    path = tmp_path / "open.py"
    train = "dict(clip=float('inf'), bounds=(-1.0, 1.0))"
    path.write_text(f"{HEAD}    return ConfigDict(dict(seed=0, limit=float('inf'), train={train}))\n{BUILD}")
    config, _ = configs.load(str(path))
    stored = json.loads(configs.to_json(config), parse_constant=pytest.fail)
    assert stored["limit"] == "Infinity" and configs.difference(stored, config) == {}
    assert configs.difference(json.loads('{"limit": Infinity}'), {"limit": float("inf")}) == {}  # as it was written before
    other, _ = configs.load(str(path), [("limit", "2"), ("train.clip", "1"), ("train.bounds", "0,1")])
    configs.put(other, configs.flatten(stored))
    assert configs.flatten(other) == configs.flatten(config)
    for key, text, words in ("train.bounds", "-inf,1", "a finite number"), ("limit", "nan", "a finite number"):
        with pytest.raises(UserError, match=words):
            configs.load(str(path), [(key, text)])


def test_a_mistake_in_a_key_is_said_before_the_rest_of_the_file_is_run(tmp_path):
    (tmp_path / "heavy_base.py").write_text("raise SystemError('heavy')\nfrom ml_collections import ConfigDict\nSTEPS = 10 * 5\n"
        "def get_config():\n    return ConfigDict(dict(seed=0, train=dict(steps=STEPS)))\n")
    path = tmp_path / "heavy_variant.py"
    path.write_text("from heavy_base import build, get_config as base\ndef get_config():\n    return base()\n")
    for key, text, words in ("train.stpes", "1", "'train.steps'"), ("train.steps", "0", "1 or more"):
        with pytest.raises(UserError, match=words):
            configs.load(str(path), [(key, text)])
    with pytest.raises(UserError, match="cannot be imported: SystemError: heavy"):
        configs.load(str(path))


def built(tmp_path, body, overrides=()):
    path = tmp_path / "built.py"
    values = "dict(seed=0, train=dict(steps=3, keep=1), model=dict(width=8, name='a'))"
    path.write_text(f"{HEAD}    return ConfigDict({values})\ndef build(config):\n{body}\n")
    config, module = configs.load(str(path), list(overrides))
    with configs.blaming(config, module, overrides):
        experiment = configs.build(config, module)
        experiment.init(jax.random.key(0))
        raise ArithmeticError("later")


PARTS = """
    class Experiment:
        process = loss = optimizer = None
        def init(self, key):
            return jnp.zeros(3).reshape(config.model.width - 7, -1)
    return Experiment()"""


def test_what_an_experiment_does_not_take_is_a_sentence_that_names_the_overrides_it_needs(tmp_path):
    overrides = [("model.width", "9"), ("train.keep", "2")]
    body = "    import jax.numpy as jnp\n    jnp.zeros(8).reshape(config.model.width)" + PARTS
    with pytest.raises(UserError, match=r"built.py cannot be used: TypeError: cannot reshape .*line 6\) \(with config.model.width=9\)"):
        built(tmp_path, body, overrides)
    with pytest.raises(UserError, match=r"line 9\) \(with config.model.width=9\)"):  # when its shapes are asked for
        built(tmp_path, "    import jax.numpy as jnp" + PARTS, overrides)
    share = "    from mmdiff import times\n    times.mixture((config.model.width / 8, times.uniform()))\n    jnp = times.jnp" + PARTS
    with pytest.raises(UserError, match=r"mixture: .*with config.model.width=9\)"):
        built(tmp_path, share, overrides)
    with pytest.raises(UserError, match="line 5"):  # the file's own mistake
        built(tmp_path, "    return config.modle", overrides)
    with pytest.raises(UserError, match="its build returns a NoneType, not an Experiment"):
        built(tmp_path, "    pass")
    with pytest.raises(json.JSONDecodeError):  # a bug of another package, whatever is overridden
        built(tmp_path, "    import json\n    json.loads('x')", overrides)
    with pytest.raises(ArithmeticError, match="later"):  # not of the overrides
        built(tmp_path, "    import jax.numpy as jnp" + PARTS, [("model.width", "10")])


def test_no_config_of_ours_imports_what_is_heavy_before_its_keys_are_checked():
    """In a process of its own, for all of them: a wrong key is answered within 3 s of processor time, and the help at once."""
    program = f"""
import contextlib, io, pathlib, sys, time
from mmdiff import checks, config as configs
from mmdiff.__main__ import main
for path in sorted(pathlib.Path({str(CONFIGS)!r}).rglob("*.py")):
    began, said = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(["train", "--config", str(path), "--workdir", "x", "--config.train.lr=1"]) == 2
    assert "did you mean 'train.learning_rate'" in said.getvalue(), said.getvalue()
    assert time.process_time() - began < 3, path
    values = configs._values_alone(path)
    checks.check(configs.flatten(values))  # its own values are in their ranges
    heavy = [name for name in ("jax", "flax", "optax", "orbax", "sklearn", "librosa") if name in sys.modules]
    assert not heavy, (path, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_build_says_is_said_once_though_a_mistake_is_sought_by_building_again(tmp_path, capsys):
    says = "    from mmdiff import console\n    console.say('data found')\n"
    with pytest.raises(UserError, match="with config.model.width=9"):
        built(tmp_path, f"{says}    import jax.numpy as jnp\n    jnp.zeros(8).reshape(config.model.width){PARTS}", [("model.width", "9")])
    assert capsys.readouterr().err == "data found\n"
