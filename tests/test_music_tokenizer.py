"""The music tokenizer's config in small: train, encode, decode, reconstruct a file, measure."""

import json
import pathlib
import types

import numpy as np
import pytest

from mmdiff.__main__ import main
from mmdiff.data.sources import load_all
from mmdiff.data.token_cache import decoder, open_tokens, read_meta
from mmdiff.data.token_modalities import Sequences
from mmdiff.errors import UserError
from mmdiff.projects.dance import dance
from mmdiff.projects.dance.sounds import Waveforms, wav

CONFIG = "configs/cdcd/music_tokenizer.py"
SMALL = [
    "--config.train.steps=2", "--config.train.global_batch=8", "--config.train.tensorboard=false", "--config.train.log_every=1",
    "--config.model.codes=16", "--config.model.widths=(4, 4, 8)", "--config.model.encoder_blocks=(1, 1, 1)",
    "--config.model.decoder_blocks=(1, 1, 1)",
]  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for split in dance.COUNTS:
            patch.setitem(dance.COUNTS, split, 20)
        workdir = tmp_path_factory.mktemp("runs") / "music"
        assert main(["train", "--config", CONFIG, "--workdir", str(workdir), *SMALL]) == 0
        yield ["--config", CONFIG, "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def cache(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "music"
    assert main(["cache", *run, "--out", str(out)]) == 0
    return out


def data(cache):
    return types.SimpleNamespace(source="tokens", dir=str(cache))


def test_the_cache_holds_music_and_what_goes_with_it(cache):
    meta = read_meta(cache)
    assert meta["grid"] == [344] and meta["codes"] == 16 and meta["tokens"] == "music" and meta["network"] == "AudioAutoencoder"
    modalities = {"music": Sequences(344, 16, name="music")}
    found, real = load_all(open_tokens(data(cache), "test", modalities)), load_all(dance.DanceMusic("test", count=20))
    assert found["music"].shape == (20, 344) and found["music"].dtype == np.int32
    for name in ("motion", "genre", "beats"):
        np.testing.assert_array_equal(np.load(cache / "test" / f"{name}.npy"), real[name])
    assert not (cache / "test" / "audio.npy").exists()
    audio = decoder(cache)(found["music"][:2])
    assert audio.shape == (2, 44_032) and np.abs(audio).max() <= 1
    with pytest.raises(UserError, match="has 344 tokens of 16 codes, but the config needs 1033 of 16"):
        open_tokens(data(cache), "test", {"music": Sequences(1033, 16, name="music")})


def test_sample_reconstructs_a_file(run, cache, tmp_path):
    (tmp_path / "clip.wav").write_bytes(wav(dance.DanceMusic("test", count=1).take(np.zeros(1, int))["audio"][0], dance.RATE))
    assert main(["sample", *run, "--given", f"audio={tmp_path / 'clip.wav'}", "--number", "1", "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "samples.npz") as arrays:
        tokens = np.load(cache / "test" / "music.npy")[:1]
        np.testing.assert_allclose(arrays["reconstruction"], decoder(cache)(tokens), atol=1e-3)
        heard = Waveforms(44_032).parse(str(tmp_path / "reconstruction_0.wav"))
        np.testing.assert_allclose(heard, arrays["reconstruction"], atol=2e-4)
    assert (tmp_path / "samples_reconstruction.png").exists()


def test_eval_measures_the_reconstructions(run):
    assert main(["eval", *run]) == 0
    report = json.loads(pathlib.Path(run[-1], "report.json").read_text())
    assert report["waveform_snr"] == pytest.approx(-10 * np.log10(report["waveform_error"]))
    assert 0 < report["codebook_usage"] <= 1 and report["spectral_error"] > 0
    assert report["beat_f1_real"] > 0.9 > report["beat_f1_shuffled_real"] and report["frechet_audio"] > 1
    page = pathlib.Path(run[-1], "report.html").read_text()
    assert page.count("<audio controls") == 8 and "known beats" in page
