"""The config of texts by the command line, in small, on made-up modules."""

import json

import pytest

from mmdiff.__main__ import main
from tests.small_sets import python_modules

NAME = "configs/text/absorbing.py"
SMALL = [f"--config.{value}" for value in (
    "train.steps=2", "train.global_batch=8", "train.eval_every=2", "train.log_every=1", "train.tensorboard=false", "model.width=16",
    "model.depth=1", "model.heads=2", "eval.samples=4", "eval.draws=2", "eval.batch=4")]  # fmt: skip


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    def run(command, *flags):
        return main([command, "--config", NAME, "--workdir", str(tmp_path / "run"), *map(str, flags)])

    assert run("train", f"--config.data.dir={python_modules(tmp_path / 'modules')}", *SMALL) == 0
    assert run("eval") == 0 and 0 < json.loads((tmp_path / "run/report.json").read_text())["bits_per_character"] < 30
    assert run("sample", "--number", 3, "--out", tmp_path / "texts") == 0
    capsys.readouterr()
    assert run("sample", "--number", 3, "--steps", 5, "--out", tmp_path / "no") == 2
    assert "takes a step for each, not 5" in capsys.readouterr().err
    assert run("sample", "--number", 3, "--steps", 5, "--config.sample.first_hitting=false", "--out", tmp_path / "few") == 0
