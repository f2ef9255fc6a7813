r"""Whether music has its beats where it should: coverage and hit of seconds with onsets (D2M-GAN, CDCD), and a strict F1 of known beats.

    coverage = sum_s b_s / sum_s b*_s        hit = sum_s b_s b*_s / sum_s b*_s        (means over clips; b* of the real music)

b_s is 1 if second s has an onset. A clip of two seconds has two of these bits, so both metrics are high by chance, and coverage can
exceed 1: `beat_scores` gives the level of chance with every metric. An onset is librosa's, as the published scores take it: a frame of
512 samples at which the normalised onset strength (flux of the log-mel spectrum, from 0 to 1) jumps by at least 0.4, not right after
another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmdiff.errors import UserError, import_extra

RATE = 22_050
FRAME = 512  # samples: 23 ms
TOLERANCE = 0.05  # seconds
SHUFFLES = 10


def onsets(audio: np.ndarray) -> np.ndarray:
    """Where music [n, samples] at 22,050 Hz has onsets: bool [n, frames], of frames whose middles are `FRAME` samples apart, from 0."""
    librosa = import_extra("librosa", "audio")

    found = []
    for some in np.array_split(np.asarray(audio, np.float32), -(-len(audio) // 50)):  # of the spectra of all there may be no room
        envelope = librosa.onset.onset_strength(y=some, sr=RATE, hop_length=FRAME)
        options = {"wait": 1, "delta": 0.2, "pre_avg": 1, "post_avg": 1, "post_max": 1}
        found += [librosa.onset.onset_detect(onset_envelope=row, sr=RATE, hop_length=FRAME, sparse=False, **options) for row in envelope]
    return np.stack(found)


def times(found: np.ndarray) -> list[np.ndarray]:
    """The seconds of onsets bool [n, frames], one array for each clip."""
    return [np.flatnonzero(row) * (FRAME / RATE) for row in found]


def seconds_with_onsets(found: np.ndarray, samples: int) -> np.ndarray:
    """Onsets bool [n, frames] of clips of so many samples -> bool [n, seconds], a second that is begun counting as one."""
    bits = np.zeros((len(found), -(-samples // RATE)), bool)
    clips, frames = np.nonzero(found)
    bits[clips, np.minimum(frames * FRAME // RATE, bits.shape[1] - 1)] = True
    return bits


def coverage_and_hit(bits: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """(coverage, hit) of bool [n, seconds] against those of the real music, over the clips where that has an onset at all.

    Raises:
      UserError: clips of different lengths, or no onset in any real clip.
    """
    if bits.shape != real.shape:
        raise UserError(f"beats are compared of clips of one length, not of {bits.shape[1]} and {real.shape[1]} seconds.")
    counts = real.sum(1)
    some = counts > 0
    if not some.any():
        raise UserError("none of the real clips has an onset: beat coverage and hit are not defined; check that the audio is not silent.")
    counts = counts[some]
    return float((bits.sum(1)[some] / counts).mean()), float(((bits & real).sum(1)[some] / counts).mean())


def f1(found: Sequence[float], beats: Sequence[float], tolerance: float = TOLERANCE) -> float:
    """F1 of onsets at `found` seconds for the known beats: an onset within `tolerance` of a beat finds it, each at most one other.

    2 matches / (onsets + beats); 1 where there are neither.
    """
    found, beats = np.sort(found), np.sort(beats)
    i = j = matches = 0
    # On a line, with one tolerance for all, taking pairs from the left matches as many as can be.
    while i < len(found) and j < len(beats):
        distance = found[i] - beats[j]
        if abs(distance) <= tolerance:
            i, j, matches = i + 1, j + 1, matches + 1
        elif distance < 0:
            i += 1
        else:
            j += 1
    return 2 * matches / (len(found) + len(beats)) if len(found) + len(beats) else 1.0


def beat_scores(audio: np.ndarray, real: np.ndarray, beats: np.ndarray | None = None) -> dict[str, float]:
    """`beat_coverage`, `beat_hit` and `beat_f1` of music for the dances of real music, and each by chance, `..._shuffled`.

    By chance: the same music against other clips' real music and beats, the mean over some `SHUFFLES` ways to pair every clip with
    another one.

    Args:
      audio: [n, samples] at 22,050 Hz; real: the music of the same clips, as long.
      beats: the known beats in seconds, [n, most beats], filled up with -1; by default the onsets of the real music.

    Raises:
      UserError: as `coverage_and_hit`.
    """
    found = onsets(audio)
    heard = onsets(real)
    bits, real_bits = seconds_with_onsets(found, audio.shape[1]), seconds_with_onsets(heard, real.shape[1])
    at, known = times(found), times(heard) if beats is None else [row[row >= 0] for row in np.asarray(beats)]
    count = len(at)

    def scores(shift):
        other = (np.arange(count) + shift) % count
        return *coverage_and_hit(bits, real_bits[other]), np.mean([f1(at[i], known[j]) for i, j in enumerate(other)])

    # Evenly spaced: sources may have like clips next to each other.
    shifts = np.unique(np.linspace(1, max(count - 1, 1), SHUFFLES + 2).round().astype(int)[1:-1])
    names = "beat_coverage", "beat_hit", "beat_f1"
    chance = np.mean([scores(shift) for shift in shifts], 0)
    return {key: float(value) for name, own, by_chance in zip(names, scores(0), chance) for key, value in
            ((name, own), (f"{name}_shuffled", by_chance))}  # fmt: skip
