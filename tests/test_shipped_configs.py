"""Configs are found by name, listed and copied; a wheel has them."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from mmdiff import config as configs
from mmdiff import shipped_configs
from mmdiff.__main__ import main
from mmdiff.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def test_every_file_in_configs_has_a_name():
    files = {path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py"}
    assert set(shipped_configs.paths().values()) == files
    assert {"digits_joint", "cdcd/digits_class"} <= set(shipped_configs.paths())


def test_a_config_is_found_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_joint").mkdir()  # a workdir, perhaps
    config, module = configs.load("digits_joint", [("train.steps", "3")])
    assert config.train.steps == 3 and module.__file__ == str(ROOT / "configs/digits_joint.py")
    (tmp_path / "digits_joint.py").write_text("")
    with pytest.raises(UserError, match="digits_joint.py is no config file"):  # a path is the file that it names
        configs.load("digits_joint.py")


@pytest.mark.parametrize("asked", ["cdcd/pictures_tokenizer", "configs/cdcd/pictures_tokenizer.py"])
def test_a_former_name_is_found(asked):
    assert configs.load(asked)[1].__file__ == str(ROOT / "configs/cdcd/images_tokenizer.py")


@pytest.mark.parametrize(
    "asked, meant",
    [
        ("digits_jont", "digits_joint"), ("digits_class", "cdcd/digits_class"), ("cdcd/digit_class", "cdcd/digits_class"),
        ("configs/digits_joint.py", "digits_joint"), ("diffdis/digits.py", "diffdis/digits"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist_suggests_one(tmp_path, monkeypatch, asked, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no config file {asked}, did you mean {meant}\\?"):
        configs.load(asked)


def test_the_list_has_a_purpose_for_each_and_imports_nothing(tmp_path):
    code = "import sys; from mmdiff.__main__ import main; main(['configs']); assert 'jax' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert set(lines) == set(shipped_configs.paths())
    assert "Joint image-label diffusion" in lines["digits_joint"]


def test_a_copy_is_a_config_with_the_neighbours_that_it_needs(tmp_path, capsys):
    target = tmp_path / "mine" / "birds.py"
    assert main(["configs", "cdcd/cub200_text", "--to", str(target)]) == 0
    assert capsys.readouterr().out.split() == [str(target), str(tmp_path / "mine" / "coco_text.py")]
    ours, theirs = (configs.flatten(configs.load(path)[0]) for path in (str(target), "cdcd/cub200_text"))
    assert ours == theirs
    for args, words in [
        (["cdcd/cub200_text", "--to", str(target)], "exists already"),
        (["digits_joint", "--to", str(tmp_path / "x")], "--to .*x is not the name"),
        (["digits_joint", "--to", "."], "is not the name"), (["digits_joint", "--to", "~nobody-at-all/x.py"], "cannot write"),
        (["digits_joint", "--to", "a" * 300 + ".py"], "cannot write"),
        (["cdcd/cub200_text", "--to", str(tmp_path / "coco_text.py")], "the name of a config that"),
        (["cub200", "--to", str(tmp_path / "x.py")], "did you mean cdcd/cub200_text"), (["--to", "x.py"], "of which config"),
    ]:  # fmt: skip
        assert main(["configs", *args]) == 2
        said = capsys.readouterr().err
        assert re.search(words, said), said


def test_a_name_shows_the_head(capsys):
    assert main(["configs", "digits_joint"]) == 0
    said = capsys.readouterr().out
    assert "Measured" in said and "mmdiff train --config digits_joint --workdir" in said and "configs/" not in said


def test_the_package_data_are_all_configs():
    """What setup.py calls packages holds every config: the wheel itself is built by the test below."""
    code = (
        "import setuptools, json, runpy; setuptools.setup = lambda **known: print(json.dumps([known['packages'], known['package_dir']])); "
        "runpy.run_path('setup.py')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    packages, folders = json.loads(done.stdout)
    assert folders["mmdiff._configs"] == "configs"
    for path in shipped_configs.paths().values():
        parts = path.relative_to(ROOT / "configs").parent.parts
        assert ".".join(["mmdiff._configs", *parts]) in packages, path


@pytest.mark.slow
def test_an_installed_wheel_finds_them(tmp_path):
    def run(*command, **options):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for name in ("mmdiff", "configs"):  # setuptools leaves a folder `build`, from which the next wheel would take what is gone
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path / "dist", tmp_path / "source")
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert "mmdiff/_configs/cdcd/digits_class.py" in archive.namelist()
    run("-m", "pip", "install", "--no-deps", "-q", "--target", tmp_path / "site", wheel)
    (tmp_path / "empty").mkdir()
    there = {"cwd": tmp_path / "empty", "env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}}
    assert set(line.split()[0] for line in run("-m", "mmdiff", "configs", **there).splitlines()) == set(shipped_configs.paths())
    where = "from mmdiff import config; print(config.load('cdcd/digits_class')[1].__file__)"
    assert run("-c", where, **there).strip() == str(tmp_path / "site/mmdiff/_configs/cdcd/digits_class.py")
    small = ["--config.model.width=8", "--config.model.depth=1", "--config.model.heads=2", "--config.train.steps=2"]
    run("-m", "mmdiff", "train", "--config", "digits_joint", "--workdir", "run", *small, "--config.train.eval_every=0", **there)
    run("-m", "mmdiff", "sample", "--config", "digits_joint", "--workdir", "run", "--number", "2", **there)
    assert (tmp_path / "empty/run/samples/samples.png").is_file()
