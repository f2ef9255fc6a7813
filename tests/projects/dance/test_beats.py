"""Onsets and beat scores: exact on small cases, the published rule on random clips, and the level of chance."""

import numpy as np
import pytest

from mmdiff.errors import UserError
from mmdiff.projects.dance.beats import FRAME, RATE, beat_scores, coverage_and_hit, f1, onsets, seconds_with_onsets, times

SAMPLES = 44_032


def clicks(seconds, samples=SAMPLES):
    """Music of short bursts at the given seconds."""
    rng, audio = np.random.default_rng(0), np.zeros(samples, np.float32)
    for second in seconds:
        start = int(second * RATE)
        burst = 0.8 * rng.standard_normal(1500) * np.exp(-np.arange(1500) / 300)
        audio[start : start + 1500] += burst[: samples - start].astype(np.float32)
    return audio


def random_clips(count):
    rng = np.random.default_rng(1)
    clips = [clicks(np.sort(rng.uniform(0, 1.9, rng.integers(0, 9)))) * rng.uniform(0.2, 1) for _ in range(count)]
    return np.stack(clips) + rng.uniform(0, 0.05, (count, 1)) * rng.standard_normal((count, SAMPLES))


def test_onsets_are_where_the_music_begins():
    beats = [0.25, 0.75, 1.5]
    found = times(onsets(np.stack([clicks(beats), np.zeros(SAMPLES, np.float32)])))
    np.testing.assert_allclose(found[0], beats, atol=1.5 * FRAME / RATE)
    assert len(found[1]) == 0


def test_the_published_rule_on_random_clips():
    import librosa.onset  # takes seconds

    clips = random_clips(120)
    envelopes = librosa.onset.onset_strength(y=clips.astype(np.float32), sr=RATE, hop_length=FRAME)
    count = 0
    for row, envelope in zip(onsets(clips), envelopes):
        o = (envelope - envelope.min()) / (envelope - envelope.min()).max()
        expected, last = [], -2
        for n in range(1, len(o)):
            if (o[n] - o[n - 1]) / 2 >= 0.2 and n - last > 1:
                expected.append(n)
                last = n
        np.testing.assert_array_equal(np.flatnonzero(row), expected)
        count += len(expected)
    assert count > 200


def test_seconds_with_onsets():
    found = np.zeros((2, 87), bool)
    found[0, [0, 43]], found[1, 44] = True, True  # frame 43 is at 0.998 s, frame 44 at 1.02 s
    np.testing.assert_array_equal(seconds_with_onsets(found, SAMPLES), [[True, False], [False, True]])
    assert seconds_with_onsets(found, 44_100).shape == (2, 2) and seconds_with_onsets(found, 44_101).shape == (2, 3)


def test_coverage_and_hit():
    def scores(bits, real):
        return coverage_and_hit(np.array(bits, bool), np.array(real, bool))

    assert scores([[1, 1, 0, 1]], [[1, 0, 1, 0]]) == (1.5, 0.5)
    assert scores([[1, 1, 1]], [[1, 0, 0]]) == (3.0, 1.0)
    # A mean over clips, without those whose real music has no onset.
    assert scores([[1, 1], [1, 0], [1, 1]], [[1, 0], [1, 1], [0, 0]]) == (1.25, 0.75)
    with pytest.raises(UserError, match="none of the real clips has an onset"):
        scores([[1, 1]], [[0, 0]])
    with pytest.raises(UserError, match="of 2 and 3 seconds"):
        scores([[1, 1]], [[0, 0, 1]])


def test_f1_matches_each_beat_once():
    assert f1([0.5, 1.0], [0.5, 1.0]) == 1 and f1([0.54, 0.96], [0.5, 1.0]) == 1
    assert f1([0.56], [0.5]) == 0 and f1([], [0.5]) == 0 and f1([], []) == 1
    assert f1([0.49, 0.51], [0.5]) == pytest.approx(2 / 3)
    assert f1([0.5, 0.75, 1.0], [1.0, 0.5]) == pytest.approx(0.8)
    assert f1([0.54, 0.47], [0.5, 0.58]) == 1  # the nearest pair alone would leave one over
    assert f1([0.1], [0.2], tolerance=0.2) == 1


def test_scores_and_their_level_of_chance():
    rng = np.random.default_rng(2)
    beats = np.full((24, 6), -1.0, np.float32)
    for row in beats:
        period, start = rng.uniform(0.35, 0.6), rng.uniform(0.05, 0.3)
        found = np.arange(start, 1.95, period)[:6]
        row[: len(found)] = found
    music = np.stack([clicks(row[row >= 0]) for row in beats])
    own = beat_scores(music, music, beats)
    assert own["beat_coverage"] == own["beat_hit"] == 1 and own["beat_f1"] > 0.97
    assert own["beat_f1_shuffled"] < 0.6 and 0.7 < own["beat_hit_shuffled"] <= 1
    # Music for other dances is no better than chance; silence has nothing.
    other = beat_scores(np.roll(music, 5, 0), music, beats)
    assert other["beat_f1"] < 0.6
    silent = beat_scores(np.zeros_like(music), music, beats)
    assert silent["beat_coverage"] == silent["beat_hit"] == silent["beat_f1"] == 0
