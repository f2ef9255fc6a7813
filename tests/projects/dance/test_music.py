"""Music is judged by what real clips sound like: exact metrics for a drawer that knows the answer, and for one that does not."""

import types
import xml.etree.ElementTree as xml

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data.sources import ArraySource
from mmdiff.errors import UserError
from mmdiff.evals import report
from mmdiff.projects.dance.beats import RATE
from mmdiff.projects.dance.music import Listener, MusicForDances, clip_figures, heard_before, timbre

SAMPLES, GENRES, COUNT = RATE // 2, ("low", "high"), 24
PARENTS = (-1, 0, 1)


def clips(seed, count=COUNT):
    """Two genres: low and high tones that begin at the beats, above a little noise."""
    rng = np.random.default_rng(seed)
    genre = (np.arange(count) % 2).astype(np.int32)
    beats, audio = np.full((count, 3), -1, np.float32), 1e-3 * rng.standard_normal((count, SAMPLES)).astype(np.float32)
    for row, sound, kind in zip(beats, audio, genre):
        row[:2] = rng.uniform(0.08, 0.15), rng.uniform(0.25, 0.4)
        for beat in row[:2]:
            start = int(beat * RATE)
            t = np.arange(SAMPLES - start) / RATE
            sound[start:] += (0.3 * np.sin(2 * np.pi * (300, 1500)[kind] * t) * np.exp(-t / 0.03)).astype(np.float32)
    motion = rng.standard_normal((count, 30, 3, 3)).astype(np.float32)
    return {"audio": audio, "genre": genre, "beats": beats, "motion": motion}


REAL, TRAINING = clips(0), clips(1, 40)


def judge(sample, count=COUNT, lacking=(), **changes):
    """The results for a drawer of one token for a clip; token i is decoded to held-out clip i. Clips can lack beats or genres."""
    told = tuple(name for name in ("motion", "genre") if name not in lacking)
    known = {name: REAL[name] for name in told} | {"music": np.arange(COUNT, dtype=np.int32)[:, None]}
    experiment = types.SimpleNamespace(sample=sample, split="test", test_data=lambda: ArraySource({**known, **changes}))
    evaluator = MusicForDances(
        decode=lambda tokens: REAL["audio"][np.asarray(tokens)[:, 0]],
        clips=lambda split: ArraySource({name: REAL[name] for name in REAL if name not in lacking}),
        training=lambda: ArraySource({name: TRAINING[name] for name in TRAINING if name not in lacking}),
        genres=() if "genre" in lacking else GENRES,
        given=told,
        count=count,
        batch=16,
        parents=PARENTS,
    )
    config = types.SimpleNamespace(sample=types.SimpleNamespace(steps=3, guidance=1.0))
    return evaluator(experiment, {}, config, jax.random.key(0), 0)


def knows(params, keys, given, *, steps, guidance, absent):
    """Finds the clip by its dance."""
    assert "motion" in given and steps == 3
    distance = jnp.abs(given["motion"][:, None] - REAL["motion"]).sum((2, 3, 4))
    return {"music": distance.argmin(1)[:, None]}


def guesses(params, keys, given, *, steps, guidance, absent):
    return {"music": jnp.full((len(given["genre"]), 1), 4)}


def test_timbre_knows_no_loudness_and_no_place_in_time():
    audio = REAL["audio"][:4]
    found = timbre(audio)
    assert found.shape == (4, 64)
    np.testing.assert_allclose(timbre(audio / 4), found, atol=1e-4)
    np.testing.assert_allclose(timbre(np.roll(audio, 512 * 5, 1)), found, atol=0.25)
    assert np.abs(found[0] - found[1]).max() > 1  # another genre


def test_a_listener_hears_genres():
    listener = Listener(TRAINING)
    np.testing.assert_array_equal(listener.genre(REAL["audio"]), REAL["genre"])
    found = listener.metrics(np.roll(REAL["audio"], 1, 0), REAL, "_rolled")
    assert found["genre_accuracy_rolled"] == 0 and found["frechet_audio_rolled"] < 1e-6  # the same set of clips
    noise = np.random.default_rng(3).uniform(-0.5, 0.5, REAL["audio"].shape)
    assert listener.metrics(noise, REAL)["frechet_audio"] > 1


def test_what_was_heard_before():
    """With genres the first clips, five for each that is measured; without, all of the source is gone through."""
    source = ArraySource({"audio": np.arange(100), "genre": np.arange(100) % 2})
    np.testing.assert_array_equal(heard_before(source, 10, GENRES)["audio"], np.arange(50))
    without = heard_before(source, 10, ())
    assert set(without) == {"audio"} and len(without["audio"]) == 10 and np.diff(without["audio"]).min() >= 9
    with pytest.raises(UserError, match="the genres low, high are to be classified, and the training clips have none"):
        heard_before(ArraySource({"audio": np.arange(100)}), 10, GENRES)


@pytest.mark.slow
def test_music_for_dances():
    perfect, chance = judge(knows), judge(guesses)
    for name in ("beat_f1", "beat_hit", "genre_accuracy"):
        assert perfect.metrics[name] == perfect.metrics[f"{name}_reconstructed"] == perfect.metrics[f"{name}_real"] > 0.9
        assert chance.metrics[f"{name}_real"] == perfect.metrics[f"{name}_real"]
    assert perfect.metrics["frechet_audio"] < 1e-6 < 1e-3 < perfect.metrics["frechet_audio_real"] < chance.metrics["frechet_audio"]
    assert chance.metrics["genre_accuracy"] == 0.5
    assert perfect.metrics["beat_f1"] > perfect.metrics["beat_f1_shuffled"] + 0.2
    assert abs(chance.metrics["beat_f1"] - chance.metrics["beat_f1_shuffled"]) < 0.1
    assert set(perfect.metrics) == set(perfect.definitions)
    assert len(perfect.figures) == 4 and list(perfect.figures)[0] == "Clip 1: low"


@pytest.mark.slow
def test_clips_whose_beats_and_genres_nobody_knows():
    found = judge(knows, lacking=("beats",))
    assert found.metrics["beat_f1"] == found.metrics["beat_f1_real"] == 1 > found.metrics["beat_f1_shuffled"] + 0.2
    assert "onsets of the real music" in found.definitions["beat_f1"] and found.metrics["genre_accuracy"] > 0.9
    found = judge(knows, lacking=("beats", "genre"))
    assert found.metrics["beat_hit"] == 1 and "genre_accuracy" not in found.metrics and set(found.metrics) == set(found.definitions)
    assert list(found.figures)[0] == "Clip 1" and "known beats" not in found.figures["Clip 1"].caption


@pytest.mark.slow
def test_clips_that_do_not_fit():
    with pytest.raises(UserError, match="the genre of the real clips is not the examples'"):
        judge(knows, genre=1 - REAL["genre"])
    with pytest.raises(UserError, match="the motion of the real clips is not the examples'"):
        judge(knows, lacking=("genre",), motion=np.roll(REAL["motion"], 1, 0))
    short = {name: array[:8] for name, array in clips(0).items() if name != "audio"} | {"music": np.zeros((8, 1), np.int32)}
    with pytest.raises(UserError, match="24 real clips do not fit 8 examples"):
        judge(knows, **short)


def test_pictures_with_players():
    shown = clip_figures({"sampled": REAL["audio"], "real": REAL["audio"]}, REAL, GENRES, PARENTS, "3 steps", count=1)
    (title, picture), = shown.items()
    tree = xml.fromstring(picture.image)
    tags = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert tags.count("image") == tags.count("polygon") == 2 and tags.count("path") == 8  # spectrograms, waveforms, skeletons
    assert tags.count("line") == (REAL["beats"][0] >= 0).sum() and tags.count("circle") >= 2
    page = report._figure(title, picture.image, picture.caption, picture.sounds)
    assert page.count("<audio controls") == 2 and "sampled<audio" in page and "data:audio/wav;base64," in page
