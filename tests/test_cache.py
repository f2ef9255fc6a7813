"""`mmdiff cache` and the other commands on the tokenizer's own config, in small: train, measure, reconstruct, encode, read."""

import json
import pathlib

import numpy as np
import pytest

from mmdiff import remote
from mmdiff.__main__ import main
from mmdiff.data.sources import load_all
from mmdiff.data.token_cache import decoder, read_meta, token_source
from mmdiff.projects.scenes.scenes import ATTRIBUTES, Scenes

CONFIG = "configs/cdcd/scenes_tokenizer.py"
SMALL = [
    "--config.train.steps=4", "--config.train.global_batch=8", "--config.train.eval_every=0", "--config.train.tensorboard=false",
    "--config.model.features=8", "--config.model.decoder_blocks=1", "--config.train.log_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tokenizer"
    assert main(["train", "--config", CONFIG, "--workdir", str(workdir), *SMALL]) == 0
    return ["--config", CONFIG, "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def cache(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "scenes"
    assert main(["cache", *run, "--out", str(out), "--split", "test", "--split", "held_out"]) == 0
    return out


def test_training_measures_the_codebook(run):
    lines = [json.loads(line) for line in (pathlib.Path(run[-1]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["loss/reconstruction"] > 0 and 0 < line["codebook/usage"] <= 1 and 1 <= line["codebook/perplexity"] <= 128


def test_the_cache_holds_the_scenes(cache):
    meta = read_meta(cache)
    assert meta["grid"] == [8, 8] and meta["codes"] == 128 and meta["step"] == 4
    assert meta["config"]["model"]["features"] == 8
    for split in ("test", "held_out"):
        found, real = load_all(token_source(cache, split)), load_all(Scenes(split))
        assert set(found) == {"tokens", "text", *ATTRIBUTES}
        assert found["tokens"].shape == (2000, 64) and 0 <= found["tokens"].min() and found["tokens"].max() < 128
        for name in ("text", *ATTRIBUTES):
            np.testing.assert_array_equal(found[name], real[name])
    images = decoder(cache)(found["tokens"][:10])
    assert images.shape == (10, 16, 16, 3) and images.dtype == np.float32 and np.abs(images).max() <= 1


def test_the_same_command_does_nothing(run, cache, capsys):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert main(["cache", *run, "--out", str(cache), "--split", "test"]) == 0
    assert f"nothing to do: {cache} holds the tokens of step 4 (test 2,000, held_out 2,000)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_cache_at_an_address_has_the_bytes_of_one_in_a_folder(run, cache, bucket, capsys):
    out = bucket / "scenes"
    for said in (f"{out} holds", f"nothing to do: {out} holds"):
        assert main(["cache", *run, "--out", str(out), "--split", "held_out"]) == 0
        assert capsys.readouterr().out.startswith(f"{said} the tokens of step 4 (held_out 2,000)")
    names = {f"held_out/{path.name}" for path in (cache / "held_out").iterdir()}
    assert set(remote.listed(str(out))) == {*names, "cache.json", "weights.npz"}
    for name in names:
        assert (out / name).read_bytes() == (cache / name).read_bytes()
    assert load_all(token_source(str(out), "held_out"))["tokens"].shape == (2000, 64)
    assert main(["cache", *run, "--out", str(out), "--split", "test"]) == 2
    assert f"{out} was written without the split 'test'" in capsys.readouterr().err


def test_mistakes(run, cache, capsys, tmp_path):
    def refused(*args):
        assert main(list(args)) == 2
        return capsys.readouterr().err

    assert "written without the split 'train'" in refused("cache", *run, "--out", str(cache))
    assert "choose among train, validation, test, held_out" in refused("cache", *run, "--out", str(tmp_path / "new"), "--split", "val")
    assert "there is no checkpoint of step 3" in refused("cache", *run, "--out", str(tmp_path / "new"), "--step", "3")
    assert "there is no run in" in refused("cache", "--config", CONFIG, "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "new"))
    other = str(pathlib.Path(__file__).parent / "tiny.py")
    assert "trains no tokenizer" in refused("cache", "--config", other, "--workdir", str(tmp_path), "--out", str(tmp_path / "new"))
    assert "give it something to encode, --given image=FILE" in refused("sample", *run, "--out", str(tmp_path))
    assert not (tmp_path / "new").exists()


def test_sample_reconstructs_what_is_given(run, cache, tmp_path):
    np.savez(tmp_path / "two.npz", image=Scenes("test").take(np.array([0, 1]))["image"])
    assert main(["sample", *run, "--given", f"image={tmp_path / 'two.npz'}", "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "samples.npz") as arrays:
        expected = decoder(cache)(token_source(cache, "test").take(np.array([0, 1]))["tokens"])
        np.testing.assert_allclose(arrays["reconstruction"], expected, atol=1e-5)
    assert (tmp_path / "samples_reconstruction.png").exists() and (tmp_path / "samples_image.png").exists()


@pytest.mark.slow
def test_eval_measures_the_reconstructions(run):
    assert main(["eval", *run]) == 0
    report = json.loads((pathlib.Path(run[-1]) / "report.json").read_text())
    assert report["reconstruction_psnr"] == pytest.approx(10 * np.log10(4 / report["reconstruction_mse"]))
    assert 0 < report["codebook_usage"] <= 1 and report["frechet_ratio"] > 1
    assert report["reading_correctness"] <= report["reading_correctness_real"] and report["reading_correctness_real"] > 0.97
