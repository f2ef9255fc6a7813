"""Sound files and arrays as people give them."""

import io
import wave

import numpy as np
import pytest
import soundfile

from mmdiff.errors import UserError
from mmdiff.projects.dance.sounds import Waveforms, wav

SOUND = Waveforms(1000)


def tone(count, rate=22_050):
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)).astype(np.float32)


@pytest.mark.slow
def test_files_of_any_length_rate_and_channels(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(1500), 22_050, subtype="FLOAT")
    found = SOUND.parse(str(path))
    assert found.shape == (1, 1000) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], tone(1000), atol=1e-6)
    soundfile.write(path, np.stack([tone(600), -tone(600)], 1), 22_050, subtype="FLOAT")
    np.testing.assert_array_equal(SOUND.parse(str(path)), np.zeros((1, 1000)))  # opposite channels
    soundfile.write(path, tone(600), 22_050, subtype="FLOAT")
    np.testing.assert_allclose(SOUND.parse(str(path))[0], np.pad(tone(600), (0, 400)), atol=1e-6)
    soundfile.write(path, tone(4000, 44_100), 44_100, subtype="FLOAT")
    np.testing.assert_allclose(SOUND.parse(str(path))[0, 100:900], tone(1000)[100:900], atol=0.01)


def test_arrays(tmp_path):
    np.save(tmp_path / "two.npy", np.stack([tone(1000)] * 2))
    assert SOUND.parse(str(tmp_path / "two.npy")).shape == (2, 1000)
    np.savez(tmp_path / "one.npz", audio=tone(1000), label=np.zeros(3))
    assert SOUND.parse(str(tmp_path / "one.npz")).shape == (1, 1000)


def test_what_is_no_sound(tmp_path):
    def refusal(text):
        with pytest.raises(UserError) as caught:
            SOUND.parse(str(text))
        return str(caught.value)

    assert "no such file" in refusal(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no sound")
    assert "cannot be read as sound" in refusal(tmp_path / "text.wav")
    np.save(tmp_path / "short.npy", tone(999))
    assert "floats of the shape [n, 1000], not float32 [1, 999]" in refusal(tmp_path / "short.npy")
    np.save(tmp_path / "loud.npy", 3 * tone(1000))
    assert "must be numbers in [-1, 1]" in refusal(tmp_path / "loud.npy")


def test_show_and_random():
    noise = SOUND.random(np.random.default_rng(0), 3)
    assert noise.shape == (3, 1000) and (SOUND.check(noise) == noise).all()
    shown = Waveforms(4000).show(np.stack([tone(4000), np.zeros(4000, np.float32)]))
    assert shown.shape[:2] == (2, 128) and shown.shape[3] == 1 and shown.dtype == np.uint8
    assert shown[0, 64:].max() == 255 > shown[0, :32].max() and shown[1].max() == 0  # a low tone is at the bottom


def test_a_wav_file_in_memory(tmp_path):
    with wave.open(io.BytesIO(wav(np.array([0.0, 0.5, -1.0, 2.0]), 8000))) as read:
        assert (read.getframerate(), read.getnchannels(), read.getsampwidth()) == (8000, 1, 2)
        np.testing.assert_array_equal(np.frombuffer(read.readframes(9), "<i2"), [0, 16384, -32767, 32767])
    (tmp_path / "tone.wav").write_bytes(wav(tone(1000), 22_050))
    np.testing.assert_allclose(SOUND.parse(str(tmp_path / "tone.wav"))[0], tone(1000), atol=2e-4)
