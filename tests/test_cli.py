"""The command line: what each command writes and prints, and what it says to every mistake."""

import collections
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mmdiff.__main__ import main
from mmdiff.convert.kinds import KINDS

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


def test_classes_are_called_by_the_names_that_the_run_has_of_its_data(workdir, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    said = json.loads((run / "data.json").read_text())
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (run / "data.json").write_text(json.dumps(said | {"classes": {"label": words}}))
    assert sample(run, tmp_path / "named", "--given", "label=seven,two", "--steps", "1")["label"].tolist() == [7, 2]
    assert "label: seven two" in capsys.readouterr().out
    assert main(["sample", "--config", TINY, "--workdir", str(run), "--given", "label=ten"]) == 2
    assert "label 'ten' does not exist: labels are 0..9 or one of zero, one" in capsys.readouterr().err


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
    monkeypatch.setattr("mmdiff.runs.LARGEST_BATCH", 4)
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


def test_eval_of_the_validation_data_has_a_report_of_its_own_and_leaves_the_test_data_and_their_report_alone(workdir, capsys):
    run = ["eval", "--config", TINY, "--workdir", str(workdir)]
    assert main(run) == 0
    reported = {name: (workdir / name).read_bytes() for name in ("report.json", "report.html")}
    test = json.loads(reported["report.json"])
    assert (test["split"], test["examples"]) == ("test", 40)
    capsys.readouterr()
    assert main([*run, "--split", "validation", "--config.sample.guidance=1.7"]) == 0
    names = [str(workdir / f"report-validation.{end}") for end in ("json", "html")]
    assert capsys.readouterr().out.splitlines()[-2:] == names
    found = json.loads((workdir / "report-validation.json").read_text())
    assert (found["split"], found["examples"], found["config"]["sample"]["guidance"]) == ("validation", 24, 1.7)
    assert "validation data" in (workdir / "report-validation.html").read_text()
    assert {name: (workdir / name).read_bytes() for name in reported} == reported
    assert main([*run, "--split", "val"]) == 2 and "validation" in capsys.readouterr().err


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run whose values are not those of the file; each checkpoint is kept, and knows its loss."""
    path = tmp_path_factory.mktemp("runs") / "other"
    values = {"seed": 5, "train.steps": 6, "train.keep": 9, "train.eval_every": 2, "train.best": "val/loss", "sample.steps": 3}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    assert main(["train", "--config", TINY, "--workdir", str(path), *overrides]) == 0
    return path


def meta(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


def test_eval_and_sample_take_the_values_of_the_run(other, tmp_path, capsys):
    evaluate = ["eval", "--config", TINY, "--workdir", str(other)]
    assert main(evaluate) == 0
    report = json.loads((other / "report.json").read_text())
    assert report["config"] == json.loads((other / "config.json").read_text()) and report["seed"] == 5
    written = (other / "report.json").read_bytes()
    assert main([*evaluate, "--reuse"]) == 0 and (other / "report.json").read_bytes() == written
    own = "--config.train.steps=6"  # may be repeated
    assert main([*evaluate, own, "--config.sample.steps=4", "--config.seed=8"]) == 0
    changed = json.loads((other / "report.json").read_text())
    assert (changed["seed"], changed["config"]["sample"]["steps"]) == (8, 4)
    capsys.readouterr()
    sample(other, tmp_path, "--number", "2")
    assert "2 samples of step 6 (seed 5, 3 steps, guidance 1)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sample", "eval"])
@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.train.steps=7", "config.train.steps is 6 in the run in"),
        ("--config.train.ema=0.5", "only config.sample, config.eval, config.seed, config.data.dir, config.data.towers, config.encoder"),
        ("--config.sample.steps=0", "config.sample.steps must be 1 or more, not 0"),
        ("--config.sample.guidance=nan", "config.sample.guidance must be a finite number"),
        ("--step=5", "no checkpoint of step 5"),
        ("--step=last", "it must be the step of a checkpoint or best, not 'last'"),
        ("--resume", "unrecognized arguments: --resume"),
    ],
)
def test_eval_and_sample_refuse_what_does_not_fit_the_run(other, capsys, command, argument, words):
    assert words in complaint(capsys, [command, "--config", TINY, "--workdir", other, argument])


def test_a_config_file_that_changed_since_does_not_change_the_run(other, tmp_path):
    text = pathlib.Path(TINY).read_text()
    changed = tmp_path / "changed.py"
    changed.write_text(text.replace('"guidance": 1.0', '"guidance": 2.0').replace('"prefetch": 1', '"prefetch": 2, "new": 3'))
    assert main(["eval", "--config", str(changed), "--workdir", str(other)]) == 0
    config = json.loads((other / "report.json").read_text())["config"]
    assert config["train"].pop("new") == 3  # what the run did not know has the value of the file
    assert config == json.loads((other / "config.json").read_text())


def test_infinities_of_a_config_are_in_the_report_as_strict_json_has_them(other, tmp_path):
    """They were a traceback after the whole evaluation."""
    changed = tmp_path / "changed.py"
    values = '"limit": float("inf"), "bounds": (float("-inf"), 1.0), "prefetch": 1'
    changed.write_text(pathlib.Path(TINY).read_text().replace('"prefetch": 1', values))
    evaluate = ["eval", "--config", str(changed), "--workdir", str(other)]
    assert main(evaluate) == 0
    written = (other / "report.json").read_bytes()
    report = json.loads(written, parse_constant=pytest.fail)
    assert report["config"]["train"]["limit"] == "Infinity" and report["config"]["train"]["bounds"] == ["-Infinity", 1.0]
    assert main([*evaluate, "--reuse"]) == 0 and (other / "report.json").read_bytes() == written


def test_step_picks_the_checkpoint_and_the_report_has_its_cost(other, tmp_path, capsys):
    losses = {step: meta(other, step)["metrics"]["val/loss"] for step in (2, 4, 6)}
    best = min(losses, key=losses.get)
    for asked, step in ("2", 2), ("best", best):
        assert main(["eval", "--config", TINY, "--workdir", str(other), "--step", asked]) == 0
        report, cost = json.loads((other / "report.json").read_text()), meta(other, step)
        assert report["step"] == report["steps"] == step and report["train_seconds"] == cost["train_seconds"]
        assert report["images_per_second"] == 8 * step / cost["train_seconds"]
        sample(other, tmp_path, "--number", "2", "--step", asked)
        assert f"2 samples of step {step} " in capsys.readouterr().out


def test_the_cost_of_a_run_that_was_killed_after_its_last_checkpoint_is_known(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    argv = ["--config", TINY, "--workdir", str(tmp_path / "run")]
    assert main(["train", *argv]) == main(["eval", *argv]) == 0
    report, run = (json.loads(path.read_text()) for path in (tmp_path / "run" / "report.json", workdir / "run.json"))
    for name in "steps", "train_seconds", "images_per_second":
        assert report[name] == run[name]


def test_one_process_evaluates_whatever_the_cluster_says(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("it waits for other processes"))
    sample(workdir, tmp_path, "--number", "2")


def test_samples_are_what_the_image_shows_and_can_be_given(workdir, tmp_path, monkeypatch):
    beyond = np.random.default_rng(0).uniform(-1.6, 1.6, (4, 8, 8, 1)).astype(np.float32)  # a sampler may overshoot
    monkeypatch.setattr("mmdiff.evals.streaming.stream", lambda *args, **options: iter([(0, {"image": beyond, "label": np.arange(4)})]))
    arrays = sample(workdir, tmp_path / "out")
    np.testing.assert_array_equal(arrays["image"], np.clip(beyond, -1, 1))
    monkeypatch.undo()
    again = sample(workdir, tmp_path / "again", "--given", f"image={tmp_path / 'out' / 'samples.npz'}")
    np.testing.assert_array_equal(again["image"], arrays["image"])


def test_the_keys_of_the_commands_are_not_those_of_training():
    import jax

    from mmdiff.keys import key_of_use

    keys = [jax.random.key(3), *jax.random.split(jax.random.key(3)), key_of_use(3, "eval"), key_of_use(3, "sample"), key_of_use(4, "eval")]
    keys += [key_of_use(3, "grid"), key_of_use(3, "metrics")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 8


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
        (["sample", "--config", TINY, "--workdir", "x", "--guidance", "inf"], "must be a finite number, not 'inf'"),
        (["sample", "--config", TINY, "--workdir", "x", "--seed", "-1"], "--seed: it must be an integer from 0 to 2**64 - 1, not -1"),
        (["sample", "--config", TINY, "--workdir", "x", "--guidance", "much"], "must be a finite number, not 'much'"),
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
        (["--given", "label=1", "--absent", "image"], "no modality is left to sample"),
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


@pytest.mark.parametrize("variable, value, words", [
    ("JAX_NUM_PROCESSES", "two", "JAX_NUM_PROCESSES must be an integer of 1 or more, not 'two'"),
    ("JAX_PROCESS_ID", "-1", "JAX_PROCESS_ID must be an integer of 0 or more, not '-1'"),
    ("JAX_COORDINATOR_ADDRESS", "host:99999", "JAX_COORDINATOR_ADDRESS must be the HOST:PORT"),
])  # fmt: skip
def test_environment_variables_that_are_wrong(capsys, tmp_path, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    assert words in complaint(capsys, ["train", "--config", TINY, "--workdir", tmp_path / "new"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error, words", [
    (RuntimeError("Unable to initialize backend 'tqu': not in the list of known backends."), "correct JAX_PLATFORMS"),
    (ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"), "'JAX_ENABLE_X64': correct it"),
])  # fmt: skip
def test_what_jax_says_of_its_own_variables(capsys, tmp_path, monkeypatch, error, words):
    def unable(*args):
        raise error

    monkeypatch.setattr("mmdiff.training.loop.train", unable)
    assert words in complaint(capsys, ["train", "--config", TINY, "--workdir", tmp_path / "new"])


def test_a_workdir_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/mmdiff"):
        said = complaint(capsys, ["train", "--config", TINY, "--workdir", workdir])
        assert said.startswith("mmdiff: error: cannot write to /") and f"/{workdir.name} (" in said  # a long path is shortened
    assert files(tmp_path) == {"file": b"kept"}


def test_a_workdir_of_another_config_is_refused_and_kept(capsys, workdir):
    before = files(workdir)
    said = complaint(capsys, ["train", "--config", TINY, "--workdir", workdir, "--config.train.ema=0.5"])
    assert "train.ema" in said
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
    assert "examples:\n  mmdiff" in text and "--config digits_joint" in text
    words = {
        "train": ["--config.KEY=VALUE", "continues a run", "checkpoints"],
        "sample": ["--given NAME=VALUE", "--absent", "--guidance", "samples.npz"],
        "eval": ["report.json", "report.html"],
    }
    for word in words[command[0]] if command else ["train", "sample", "eval", "--config.train.steps=100"]:
        assert word in text


def test_the_help_of_convert_names_every_kind_of_weights(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    words = collections.Counter(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert all(words[kind] >= 2 for kind in [*KINDS, "mmdiff"]), words
