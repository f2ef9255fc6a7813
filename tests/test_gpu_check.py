"""launch/gpu_check.sh, without a GPU and in small: its parts agree, fail apart from each other, and make one table."""

import argparse
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from mmdiff.nets.dit import SIZES

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def check(loaded_launch):
    return loaded_launch("gpu_check")


def test_without_a_gpu_it_says_so(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    tool.chmod(0o755)
    command = ["bash", str(ROOT / "launch/gpu_check.sh"), "--out", "here"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "there is no NVIDIA GPU here" in done.stdout and not (tmp_path / "here").exists()


def test_the_environment_is_where_venv_says(tmp_path):
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    for tool, words in ((tmp_path / "nvidia-smi", "exit 0"), (python, 'echo "$@"')):
        tool.write_text(f"#!/bin/sh\n{words}\n")
        tool.chmod(0o755)
    (tmp_path / "venv/mmdiff.stamp").write_text(f"extras: cuda\n{(ROOT / 'setup.py').read_text()}")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "PYTHON": "false"}
    command = ["bash", str(ROOT / "launch/gpu_check.sh"), "--out", "here"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{ROOT / 'launch/gpu_check.py'} --out here\n", done


def test_backends_are_compared_with_the_reference(check):
    shapes = [(2, 5, 7, 2, 8, True)]
    [same], [other] = check.parity("xla", shapes), check.parity("cudnn", shapes)
    assert same["agrees"] and same["milliseconds"] > 0 and 0 < max(same["errors"]) < check.BOUND
    assert jax.default_backend() != "cpu" or ("refused" in other and "errors" not in other)
    text = check.table([{"part": ["parity", "xla"], "found": [same | {"agrees": False}]}, {"part": ["parity", "cudnn"], "found": [other]}])
    assert "2, 5, 7, 2, 8 masked" in text and "DIFFERS" in text and "refused: " in text


def test_a_part_that_fails_leaves_the_others_their_turn(check, tmp_path, monkeypatch, capsys):
    asked = []

    def part(part, arguments, seconds):
        asked.append((*part, seconds))
        return {"found": []} if part[0] == "parity" else {"error": "CUDNN_STATUS_EXECUTION_FAILED"}

    monkeypatch.setattr(check, "ask", part)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--seconds", "300"])
    check.main()
    assert [each[:2] for each in asked[-2:]] in (
        [("bench", "cudnn"), ("bench", "reference")],
        [("bench", "reference"), ("bench", "tokamax")],
    )
    assert all(0 < seconds <= 300 for *_, seconds in asked)
    text = (tmp_path / "check.txt").read_text()
    assert "bench cudnn: CUDNN_STATUS_EXECUTION_FAILED" in text and capsys.readouterr().out.endswith(text)
    assert json.loads((tmp_path / "check.json").read_text())[-1]["part"][0] == "bench"
    row = {"shape": [1], "masked": False, "errors": [math.nan], "agrees": False, "milliseconds": 1.0}
    monkeypatch.setattr(check, "ask", lambda part, *_: {"found": [row]} if part == ("parity", "cudnn") else {"error": "none"})
    with pytest.raises(SystemExit, match="1 of 1 comparisons differ"):
        check.main()


@pytest.mark.slow
def test_the_step_is_timed_with_each_backend(check, monkeypatch):
    monkeypatch.setitem(SIZES, "XXS", (1, 32, 2))
    args = argparse.Namespace(batch=8, steps=1, rounds=1)
    found = check.bench("reference", args, [("model.size", "XXS"), ("model.dtype", "float32")])
    assert found["global_batch"] == 8 and found["step_seconds"] > 0 and found["peer"] is None
    assert f"{found['step_seconds']:.4g}" in check.table([{"part": ["bench", "reference"], "found": found}])


def test_the_peer_has_the_published_size_and_speaks_as_asked(loaded_launch, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    peer = loaded_launch("torch_dit")
    monkeypatch.setitem(peer.SIZES, "S", (1, 32, 2))
    monkeypatch.setattr(sys, "argv", ["torch_dit.py", "--size", "S", "--batch", "2", "--steps", "1"])
    peer.main()
    assert math.isfinite(json.loads(capsys.readouterr().out)["seconds_per_step"])
    with torch.device("meta"):  # shapes alone
        net = peer.DiT(*peer.SIZES["XL"])
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 674_834_720
