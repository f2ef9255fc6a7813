"""Runs and caches of an earlier version (tests/stored_runs) open: they continue, give the same samples, and their reports are read."""

import json
import pathlib
import tarfile

import numpy as np
import pytest

from mmdiff import config as configs
from mmdiff.__main__ import main
from mmdiff.data import token_cache
from mmdiff.data.tower_cache import Towers

ARCHIVES = pathlib.Path(__file__).parent / "stored_runs"
SMALL = ["model.width=8", "model.depth=1", "model.heads=2"]
CAPTION = "a small red seven on a blue background, top left"
RUNS = {  # name: config, what the command of the run said, what its golden samples were given
    "digits_joint": ("digits_joint", [*SMALL, "sample.steps=3"], "label=7"),
    "digits_class": ("cdcd/digits_class", [*SMALL, "chain.steps=4", "sample.steps=4"], "label=7"),
    "scenes_tokenizer": (
        "cdcd/scenes_tokenizer", ["model.codes=16", "model.code_size=4", "model.features=8", "model.decoder_blocks=1"], None),
    "scenes_text": (
        "cdcd/scenes_text", [*SMALL, "text.width=8", "text.heads=2", "chain.steps=4", "sample.steps=4"], f"text={CAPTION}"),
    "scenes_towers": (
        "diffdis/scenes_towers", [*SMALL, "model.size=8", "model.text_depth=1", "model.text_width=8"], None),
    "scenes": ("diffdis/scenes", [*SMALL, "model.shared=1", "query.size=8", "sample.steps=3"], f"text={CAPTION}"),
}  # fmt: skip
TRAIN = [
    "train.checkpoint_every=2", "train.keep=1", "train.global_batch=8", "train.log_every=1", "train.eval_every=0", "train.warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def opened(tmp_path):
    """`name -> the arguments that name its run`, a copy in the test's folder, where the cache that it was trained with lies, too."""

    def open_run(name):
        extract("golden", tmp_path)
        extract(name, tmp_path)
        run = ["--config", f"configs/{RUNS[name][0]}.py", "--workdir", str(tmp_path / name)]
        for key, cache in {"scenes_text": {"data.dir": "tokens"}, "scenes": {"data.towers": "towers"}}.get(name, {}).items():
            extract(cache, tmp_path)
            run.append(f"--config.{key}={tmp_path / cache}")
        return run

    return open_run


def extract(name, folder):
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def runs(*default, without=()):
    """Names of stored runs; those that are not `default` are for --all."""
    return [pytest.param(name, marks=() if name in default else pytest.mark.slow) for name in RUNS if name not in without]


@pytest.mark.parametrize("name", runs("scenes_text", "scenes_tokenizer"))
def test_training_continues(opened, tmp_path, name):
    run = opened(name)
    flags = [f"--config.{value}" for value in [*TRAIN, *RUNS[name][1], "train.steps=6"]]
    assert main(["train", *run, *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, golden in zip(lines[4:], json.loads((tmp_path / "golden" / f"{name}.json").read_text()), strict=True):
        assert {key: line[key] for key in ("loss", "grad_norm", "param_norm")} == {
            key: pytest.approx(golden[key], rel=1e-3) for key in ("loss", "grad_norm", "param_norm")}


@pytest.mark.parametrize("name", runs("digits_joint", "scenes_text", without=("scenes_tokenizer", "scenes_towers")))
def test_samples_are_the_same(opened, tmp_path, name):
    run = opened(name)
    assert main(["sample", *run, "--given", RUNS[name][2], "--number", "4", "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out" / "samples.npz") as found, np.load(tmp_path / "golden" / f"{name}.npz") as golden:
        assert set(found) == set(golden)
        for key in golden:
            np.testing.assert_allclose(found[key], golden[key], atol=1e-3, err_msg=key)


@pytest.mark.parametrize("name, metric", [("digits_joint", "label_accuracy"), ("digits_class", "frechet_ratio_at_2_steps")])
def test_reports_are_read(opened, capsys, tmp_path, name, metric):
    run, report = opened(name), tmp_path / name / "report.json"
    before, stored = report.read_bytes(), json.loads(report.read_text())
    assert main(["eval", *run, "--reuse"]) == 0
    assert report.read_bytes() == before  # it was not measured again
    assert f"{stored[metric]:.4f}" in capsys.readouterr().out


def test_a_token_cache_is_read(tmp_path):
    folder = extract("tokens", tmp_path)
    with np.load(extract("golden", tmp_path) / "tokens.npz") as golden:
        expected = configs.build(*configs.load("cdcd/scenes_text", [("data.dir", str(folder))])).modalities
        source = token_cache.token_source(folder, "validation", expected)  # 16 codes of 128: runs that were trained so continue
        for key, array in source.take(np.arange(4)).items():
            np.testing.assert_array_equal(array, golden[key])
        np.testing.assert_allclose(token_cache.decoder(folder)(golden["tokens"]), golden["image"], atol=1e-4)


def test_towers_are_read(tmp_path):
    folder = extract("towers", tmp_path)
    with np.load(extract("golden", tmp_path) / "towers.npz") as golden:
        np.testing.assert_allclose(Towers(str(folder)).encode([CAPTION]), golden["vector"], atol=1e-4)


def test_another_tokenizer_is_refused(opened, tmp_path, capsys):
    """The fingerprints of what a run was trained with are read, from beside.json, as this run has it, and from dependencies.json."""
    run = opened("scenes_text")
    noted = tmp_path / "scenes_text" / "beside.json"
    noted.write_text(json.dumps({"tokenizer": "0" * 64}))
    assert main(["sample", *run, "--given", RUNS["scenes_text"][2]]) == 2
    assert "was trained with tokenizer of fingerprint 000000000000" in capsys.readouterr().err
    noted.rename(noted.with_name("dependencies.json"))
    assert main(["sample", *run, "--given", RUNS["scenes_text"][2]]) == 2
    assert "was trained with tokenizer of fingerprint 000000000000" in capsys.readouterr().err
