"""A run that is opened samples and measures as the commands do."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from mmdiff.__main__ import main
from mmdiff.data import Features, Labels
from mmdiff.errors import UserError
from mmdiff.runs import IN_USE, open_run
from mmdiff.training.run_metadata import FOLDERS

FOLDER = """

def build(config):
    import dataclasses
    import types
    names = [f"class {i}" if i != 3 else "a new one" for i in range(10)]
    return dataclasses.replace(tiny(config), test_data=lambda: types.SimpleNamespace(names=names))
"""
TINY = str(pathlib.Path(__file__).parent / "tiny.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", TINY, "--workdir", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(TINY, workdir)


def test_it_samples_as_the_command(run, workdir, tmp_path):
    given = ["--given", "label=7", "--number", "3", "--seed", "5", "--guidance", "1.5"]
    assert main(["sample", "--config", TINY, "--workdir", str(workdir), "--out", str(tmp_path), *given]) == 0
    samples = run.sample(3, given={"label": "7"}, seed=5, guidance=1.5)
    with np.load(tmp_path / "samples.npz") as written:
        assert set(written) == set(samples)
        for name, array in samples.items():
            np.testing.assert_array_equal(array, written[name])


def test_what_is_neither_image_nor_words_is_stored_and_said(run, workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Labels, "show", Features(1).show)
    asked = ["--absent", "image", "--number", "2", "--out", str(tmp_path / "out")]
    assert main(["sample", "--config", TINY, "--workdir", str(workdir), *asked]) == 0
    assert "label: vectors [2], no images and no words: they are in samples.npz alone" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.npz"]
    both = run.write({"image": np.zeros((2, 8, 8, 1), np.float32), "label": np.zeros((2, 3), np.float32)}, tmp_path)
    assert [path.name for path in both] == ["samples.npz", "samples.png"]


def test_arrays_can_be_given_one_for_each_sample_or_one_for_all(run):
    samples = run.sample(given={"label": np.array([7, 2], np.int32)})
    assert samples["label"].tolist() == [7, 2] and samples["image"].shape == (2, 8, 8, 1)
    again = run.sample(given={"image": samples["image"]})  # samples are possible data
    np.testing.assert_array_equal(again["image"], samples["image"])
    assert run.sample(3, given={"image": samples["image"][:1]})["image"].shape == (3, 8, 8, 1)


def test_what_is_absent_is_not_in_the_answer(run):
    assert set(run.sample(2, absent=["label"])) == {"image"}


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"given": {"image": np.zeros((8, 8, 1))}}, r"image: images need the shape \[n, 8, 8, 1\], got \[8, 8, 1\]"),
        ({"given": {"label": np.array([10])}}, "label"),
        ({"given": {"lable": "7"}}, "unknown modality 'lable'.* did you mean 'label'"),
        ({"given": {"label": "7"}, "absent": ["label"]}, "label is set twice"),
        ({"absent": ["image", "label"]}, "no modality is left"),
        ({"number": 2, "given": {"label": np.array([1, 2, 3])}}, "holds 3 examples, not 2"),
        ({"number": 0}, "an integer of 1 or more, not 0"),
        ({"number": 2.5}, "an integer of 1 or more, not 2.5"),
        ({"guidance": "strong"}, "the weight of guidance must be a number, not 'strong'"),
        ({"given": {"image": np.zeros((1, 8, 8, 1), np.uint8)}}, "got uint8: divide"),
        ({"given": {"image": [["a"]]}}, "image is given as .*: give text, a file"),
        ({"given": {"label": [[1], [2, 3]]}}, "label is given as .*: give text, a file"),
        ({"given": {"image": pathlib.Path("/none/seven.png")}}, "no such file|/none/seven.png"),
    ],
)
def test_mistakes_are_sentences(run, asked, words):
    with pytest.raises(UserError, match=words):
        run.sample(**asked)


def test_it_measures_and_writes_the_report(run, workdir):
    found = run.evaluate()
    assert found["weight_norm"] > 0 and found["step"] == run.step == 4 and found["examples"] == 40
    assert all(path.is_file() for path in run.report_paths())
    before = run.report_paths()[0].stat().st_mtime_ns
    assert run.evaluate(reuse=True) == found and run.report_paths()[0].stat().st_mtime_ns == before
    assert run.evaluate("validation")["examples"] == 24  # in files of its own
    assert run.report_paths()[0].stat().st_mtime_ns == before


def test_nothing_but_test_and_validation_data_are_measured(run):
    for split in ("val", "train"):  # not the test data under another name
        with pytest.raises(UserError, match=f"split is 'test' or 'validation', not '{split}'"):
            run.evaluate(split)


def test_data_of_other_classes_are_not_measured(workdir, tmp_path):
    """A folder of classes is named by what lies in it: the run remembers what its labels meant."""
    shutil.copytree(workdir, tmp_path / "run")
    names = [f"class {i}" for i in range(10)]
    (tmp_path / "run/data.json").write_text(json.dumps({"fingerprint": "40-x", "classes": {"label": names}}))
    config = tmp_path / "folder.py"
    config.write_text((pathlib.Path(TINY).read_text().replace("def build(", "def tiny(")) + FOLDER)
    run = open_run(config, tmp_path / "run")
    assert run.show({"label": [3]}) == {"label": ["class 3"]}
    with pytest.raises(UserError, match="class 3 of label was class 3 in the data that the run .* and is a new one"):
        run.evaluate()


def test_its_values_are_those_of_the_run_and_some_can_be_set(run, workdir):
    assert run.config.train.steps == 4 and run.settings() == (2, 1.0, 0)
    assert open_run(TINY, workdir, {"sample.steps": 3, "seed": 5}).settings() == (3, 1.0, 5)
    with pytest.raises(UserError, match="config.train.ema is 0.9 in the run"):
        open_run(TINY, workdir, {"train.ema": 0.5})


def test_a_checkpoint_can_be_chosen(workdir):
    run = open_run(TINY, workdir, step=2)
    assert run.step == 2
    with pytest.raises(UserError, match="step is the number of a checkpoint or 'best', not '2'"):
        open_run(TINY, workdir, step="2")
    with pytest.raises(UserError, match="there is no checkpoint of step 3"):
        open_run(TINY, workdir, step=3).sample(1)


def test_the_run_of_another_config_is_refused_before_that_one_is_built(workdir):
    """own/images has no data here, and says so only of a run of its own."""
    with pytest.raises(UserError, match=r"holds a run of another config: .* and \d+ more; use that config"):
        open_run("own/images", workdir)


def test_there_must_be_a_run(tmp_path):
    with pytest.raises(UserError, match="there is no run in .*: train it first"):
        open_run(TINY, tmp_path / "none")


def test_the_files_that_a_run_needs_may_lie_elsewhere_when_it_is_opened():
    """What training lets lie elsewhere can be named when a run is opened, too; only `mmdiff cache` reads data.images and data.set."""
    needed = {key for key in FOLDERS if not key.endswith(".kind") and key not in ("data.images", "data.set")}
    assert needed <= {*IN_USE} and "feature_encoder.path" in needed
