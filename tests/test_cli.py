"""The command line: what each command writes and prints, and what it says to every mistake."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from mmdiff.__main__ import main

TINY = str(pathlib.Path(__file__).parent / "tiny.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of the tiny config."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", TINY, "--workdir", str(path)]) == 0
    return path


def files(folder):
    """Every file below a folder with its content."""
    folder = pathlib.Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sample(workdir, out, *args):
    assert main(["sample", "--config", TINY, "--workdir", str(workdir), "--out", str(out), *args]) == 0
    with np.load(pathlib.Path(out) / "samples.npz") as arrays:
        return dict(arrays)


# ---- What the commands do ----


def test_train_leaves_a_run_and_the_same_command_repeats_nothing(workdir, capsys):
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 4
    before = files(workdir / "checkpoints")
    assert before
    assert main(["train", "--config", TINY, "--workdir", str(workdir)]) == 0
    assert files(workdir / "checkpoints") == before
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2


def test_sample_writes_arrays_and_a_captioned_grid(workdir, tmp_path, capsys):
    arrays = sample(workdir, tmp_path, "--number", "5")
    assert arrays["image"].shape == (5, 8, 8, 1) and arrays["image"].dtype == np.float32
    assert arrays["label"].shape == (5,) and set(arrays["label"]) <= set(range(10))
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size[0] > 3 * 64 and grid.size[1] > 2 * 64  # five images in a 3 x 2 grid
    out = capsys.readouterr().out
    assert "5 samples of step 4" in out
    assert f"label: {' '.join(map(str, arrays['label']))}" in out
    assert str(tmp_path / "samples.png") in out and str(tmp_path / "samples.npz") in out


def test_sample_holds_what_is_given(workdir, tmp_path):
    assert set(sample(workdir, tmp_path, "--given", "label=7", "--number", "3")["label"]) == {7}
    assert list(sample(workdir, tmp_path, "--given", "label=3,1,4")["label"]) == [3, 1, 4]


def test_sample_takes_images_from_a_file_and_prints_their_labels(workdir, tmp_path, capsys):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    np.savez(tmp_path / "four.npz", image=images)
    arrays = sample(workdir, tmp_path, "--given", f"image={tmp_path / 'four.npz'}")
    np.testing.assert_array_equal(arrays["image"], images)
    assert f"label: {' '.join(map(str, arrays['label']))}" in capsys.readouterr().out


def test_what_is_absent_is_not_in_the_output(workdir, tmp_path):
    assert set(sample(workdir, tmp_path, "--absent", "label", "--number", "2")) == {"image"}


def test_a_sample_depends_on_the_seed_and_its_own_number_only(workdir, tmp_path, monkeypatch):
    few = sample(workdir, tmp_path, "--number", "2", "--seed", "3")
    monkeypatch.setattr("mmdiff.__main__.LARGEST_BATCH", 4)
    many = sample(workdir, tmp_path, "--number", "7", "--seed", "3")
    np.testing.assert_allclose(few["image"], many["image"][:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(few["label"], many["label"][:2])
    other = sample(workdir, tmp_path, "--number", "2", "--seed", "4")
    assert np.abs(few["image"] - other["image"]).max() > 0.1


def test_steps_and_guidance_come_from_the_config_unless_given(workdir, tmp_path):
    plain = sample(workdir, tmp_path, "--given", "label=7", "--number", "2")["image"]
    same = sample(workdir, tmp_path, "--given", "label=7", "--number", "2", "--steps", "2", "--guidance", "1")["image"]
    np.testing.assert_array_equal(plain, same)
    for change in ["--steps=3"], ["--guidance=2.5"], ["--config.sample.guidance=2.5"]:
        changed = sample(workdir, tmp_path, "--given", "label=7", "--number", "2", *change)["image"]
        assert np.abs(plain - changed).max() > 1e-4, change


def test_eval_prints_the_figures_and_writes_the_report(workdir, capsys):
    assert main(["eval", "--config", TINY, "--workdir", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((workdir / "report.json").read_text())
    assert (workdir / "report.html").exists()
    assert any(line.split() == ["seen", "3.0000"] for line in lines)
    assert lines[-2:] == [str(workdir / "report.json"), str(workdir / "report.html")]
    assert "weight_norm" in json.dumps(report)


def test_eval_measures_again_unless_told_to_reuse_a_report_of_the_same_weights_and_config(workdir, capsys):
    run = ["eval", "--config", TINY, "--workdir", str(workdir)]
    assert main(run) == 0
    report, first = workdir / "report.json", capsys.readouterr().out
    written = report.read_bytes()
    assert main([*run, "--reuse"]) == 0
    assert report.read_bytes() == written and capsys.readouterr().out == first
    for argv in run, [*run, "--reuse", "--config.sample.guidance=2.0"]:
        report.write_bytes(written.replace(b'"seen": 3.0', b'"seen": 4.0'))
        assert main(argv) == 0
        assert json.loads(report.read_text())["seen"] == 3


# ---- What they say to mistakes ----


def complaint(capsys, argv):
    """The one line that a mistake gives."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mmdiff: error: ") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "required: train | sample | eval"),
        (["tarin"], "invalid choice: 'tarin'"),
        (["train", "--config", TINY], "required: --workdir"),
        (["train", "--workdir", "x"], "required: --config"),
        (["train", "--config", "missing.py", "--workdir", "x"], "there is no config file missing.py"),
        (["train", "--config", __file__, "--workdir", "x"], "defines no function get_config"),
        (["train", "--config", TINY, "--workdir", "x", "--config.train.stepz=5"], "did you mean 'train.steps'?"),
        (["train", "--config", TINY, "--workdir", "x", "--config.train.steps=five"], "must be an integer"),
        (["train", "--config", TINY, "--workdir", "x", "--config.train.steps", "5"], "write --config.train.steps="),
        (["train", "--config", TINY, "--workdir", "x", "--step=5"], "unrecognized arguments: --step=5"),
        (["sample", "--config", TINY, "--workdir", "x", "--number", "0"], "must be an integer of 1 or more, not '0'"),
        (["sample", "--config", TINY, "--workdir", "x", "--steps", "many"], "must be an integer of 1 or more"),
        (["sample", "--config", TINY, "--workdir", "x"], "there is no run in x: train it first, with mmdiff train"),
        (["eval", "--config", TINY, "--workdir", "x"], "there is no run in x"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_sentence_and_leaves_nothing(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in complaint(capsys, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args, words",
    [
        (["--given", "lable=7"], "unknown modality 'lable': this model has image, label"),
        (["--absent", "text"], "unknown modality 'text': this model has image, label"),
        (["--given", "label"], "write --given label=VALUE"),
        (["--given", "label=10"], "label 10 does not exist: labels are 0..9"),
        (["--given", "label=-1"], "labels are 0..9"),
        (["--given", "label=seven"], "labels are 0..9"),
        (["--given", "label=1", "--given", "label=2"], "the modality label is set twice"),
        (["--given", "label=1", "--absent", "label"], "the modality label is set twice"),
        (["--given", "label=1", "--absent", "image"], "no modality is left to draw"),
        (["--given", "label=1,2,3", "--number", "2"], "holds 3 examples, not 2"),
        (["--given", "image=missing.png"], "no such file: missing.png"),
        (["--given", "image=large.png"], "9 x 8 pixels"),
        (["--given", "image=text.png"], "cannot be read as an image"),
        (["--given", "image=cut.png"], "cannot be read as an image"),
        (["--given", "image=text.npz"], "is not a NumPy file"),
        (["--out", "text.png/out"], "cannot write to text.png/out"),
    ],
)
def test_a_mistake_in_what_is_sampled_is_one_sentence_and_loses_nothing(
    workdir, capsys, tmp_path, monkeypatch, args, words
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("large.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)).save("whole.png")
    pathlib.Path("cut.png").write_bytes(pathlib.Path("whole.png").read_bytes()[:60])
    pathlib.Path("text.png").write_text("not an image")
    pathlib.Path("text.npz").write_text("not an array")
    before = files(tmp_path), files(workdir)
    assert words in complaint(capsys, ["sample", "--config", TINY, "--workdir", workdir, *args])
    assert (files(tmp_path), files(workdir)) == before


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_run_without_a_checkpoint_is_said_to_have_none(capsys, tmp_path, command):
    assert "checkpoint" in complaint(capsys, [command, "--config", TINY, "--workdir", tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in tmp_path / "file", tmp_path / "file" / "below", "/proc/mmdiff":
        assert f"cannot write to {workdir}" in complaint(capsys, ["train", "--config", TINY, "--workdir", workdir])
    assert files(tmp_path) == {"file": b"kept"}


def test_a_workdir_of_another_config_is_refused_and_kept(capsys, workdir):
    before = files(workdir)
    said = complaint(capsys, ["train", "--config", TINY, "--workdir", workdir, "--config.train.learning_rate=0.5"])
    assert "train.learning_rate" in said
    assert files(workdir) == before


def test_a_global_batch_that_does_not_divide_is_refused(capsys, tmp_path):
    argv = ["train", "--config", TINY, "--workdir", tmp_path / "new", "--config.train.microbatches=3"]
    said = complaint(capsys, argv)
    assert "does not divide the global batch 8" in said


def test_an_interrupt_is_no_traceback(capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmdiff.config.load", interrupted)
    assert main(["train", "--config", TINY, "--workdir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "mmdiff: interrupted\n"


def test_an_error_that_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr("mmdiff.config.load", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "--config", TINY, "--workdir", str(tmp_path)])


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["eval"]])
def test_help_shows_how_to_use_it(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  python -m mmdiff" in text and "--config configs/digits_joint.py" in text
    words = {
        "train": ["--config.KEY=VALUE", "continues a run", "checkpoints"],
        "sample": ["--given NAME=VALUE", "--absent", "--guidance", "samples.npz"],
        "eval": ["report.json", "report.html"],
    }
    for word in words[command[0]] if command else ["train", "sample", "eval", "--config.train.steps=100"]:
        assert word in text
