"""Dances and their music, made up from seeds: a skeleton moves to the beats of a song that drums and plays them, in one of ten genres.

Genres have AIST++'s names, in the order of its published one-hot vectors. A **song** has a genre, a tempo, some of the genre's patterns, a
key and a melody; it lasts as long as needed. A **clip** is one dancer's take on a few seconds of a song, from anywhere in it, so tempo
and phase say which music belongs to a dance. The splits, "train", "validation" and "test", have different songs.

Music: kick, snare, hat and a tone, whose sounds are always the same, at the sixteenths of the patterns; every beat has a kick or a snare.
Sounds start at multiples of `TICK` samples (5.8 ms), as in a sequencer, hence on the borders of an audio tokenizer's tokens.

Motion: SMPL's tree of 24 joints. A genre has a stance, limbs that move from one key pose to the next (which it reaches on the beat; a
sharp style waits and hurries), limbs that move twice a beat, and knees that are bent deepest on the beat. A dancer has a direction, an
own stance, own key poses for the four beats of a bar and errors of timing (5 ms); the rest is drift and noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from mmdiff.data.sources import check_range, digest
from mmdiff.errors import UserError

RATE = 22_050  # samples and
FPS = 60  # frames in a second
GENRES = ("break", "pop", "lock", "middle-hip-hop", "la-hip-hop", "house", "waack", "krump", "street-jazz", "ballet-jazz")
COUNTS = {"train": 2000, "validation": 200, "test": 200}
SONGS = {"train": 200, "validation": 40, "test": 40}
_STREAMS = {"train": 0, "test": 1, "validation": 2}  # independent random numbers
FASTEST = 132  # beats a minute
EDGE = 0.06  # seconds without a beat at both ends of a clip: no detector could find its onset there
TIMING = 0.005  # deviation of a dancer's beats, in seconds; none is off by more than twice that
TICK = 128  # samples
RING = 0.4  # the length of a sound, in seconds
LOUDEST = 32_767  # of 16-bit audio
LEVELS = {"X": 1.0, "x": 0.08}  # how loud a pattern's sixteenth is
KICKS = {"deep": (48, 138, 0.12, 0.2), "punch": (62, 302, 0.07, 0.25), "soft": (80, 140, 0.06, 0.1)}  # two pitches, decay in s, click
HATS = {"closed": 0.015, "open": 0.04}  # decay in s

# SMPL's tree: every joint's parent, and where it is from there in the T-pose, in metres (x to the dancer's left, y up, z to the front). The
# lengths are those of somebody of 1.7 m, rounded; SMPL's own need its licence.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
_LEFT = {  # left joint: (right joint, offset of the left one)
    1: (2, (0.06, -0.09, 0.0)),  # hip
    4: (5, (0.04, -0.38, 0.0)),  # knee
    7: (8, (-0.01, -0.42, -0.03)),  # ankle
    10: (11, (0.03, -0.06, 0.12)),  # foot
    13: (14, (0.08, 0.11, -0.02)),  # collar bone
    16: (17, (0.10, 0.04, -0.01)),  # shoulder
    18: (19, (0.26, -0.01, -0.02)),  # elbow
    20: (21, (0.25, 0.01, 0.0)),  # wrist
    22: (23, (0.08, -0.01, -0.01)),  # hand
}
_MIDDLE = {
    0: (0.0, 0.0, 0.0),  # pelvis
    3: (0.0, 0.12, -0.03),
    6: (0.0, 0.13, 0.02),
    9: (0.0, 0.06, 0.0),  # spine
    12: (0.0, 0.21, -0.03),  # neck
    15: (0.0, 0.09, 0.05),  # head
}
OFFSETS = np.zeros((len(PARENTS), 3))
for _joint, _offset in _MIDDLE.items():
    OFFSETS[_joint] = _offset
for _left, (_right, _offset) in _LEFT.items():
    OFFSETS[_left] = _offset
    OFFSETS[_right] = _offset * np.array([-1, 1, 1])
HIP, KNEE, ANKLE, SHOULDER, ELBOW, ROOT, WAIST, CHEST, NECK = 1, 4, 7, 16, 18, 0, 3, 9, 12


@dataclasses.dataclass(frozen=True)
class Style:
    """A genre.

    Attributes:
      tempo: beats a minute, from and to.
      wait: the share of a beat for which a key pose is held.
      bounce: how far the knees bend on the beat, in radians, and how short they do it.
      stance: joint -> rotation vector in radians, of left joints also for the right ones.
      moves: (joint, rotation vector, keys a beat, whether left and right move against each other).
      drums: the names of its kick, snare and hat in `_drum`.
      kick, snare, hat, tone: a pattern or some to choose from: 16 sixteenths, "X" loud, "x" soft, "." nothing.
      timbre: strengths of the harmonics of its tone, and seconds until it has decayed to 1/e.
      octave: the register of its melody, 0 from 110 Hz on.
    """

    tempo: tuple[int, int]
    wait: float
    bounce: tuple[float, float]
    stance: Mapping[int, tuple[float, float, float]]
    moves: tuple[tuple[int, tuple[float, float, float], int, bool], ...]
    drums: tuple[str, str, str]
    kick: tuple[str, ...]
    snare: tuple[str, ...]
    hat: tuple[str, ...]
    tone: tuple[str, ...]
    timbre: tuple[tuple[float, ...], float]
    octave: int


_BACKBEAT = ("....X.......X...",)
# In the order of GENRES.
STYLES = (
    Style(
        tempo=(105, 132),
        wait=0.2,
        bounce=(0.35, 2),
        stance={HIP: (-1.1, 0, 0.2), KNEE: (1.5, 0, 0), WAIST: (0.5, 0, 0), SHOULDER: (0.3, -0.4, -1.0), ELBOW: (0, -0.4, 0)},
        moves=(
            (HIP, (-0.5, 0, 0.2), 1, True),
            (KNEE, (0.4, 0, 0), 1, True),
            (SHOULDER, (0, -0.4, 0.3), 1, True),
            (ROOT, (0, 0.35, 0), 1, False),
        ),
        drums=("punch", "snare", "closed"),
        kick=("X.....x.X.......", "X.......X.x....."),
        snare=_BACKBEAT,
        hat=("X.x.X.x.X.x.X.x.", "X.x.X.xxX.x.X.x."),
        tone=("X.....x.........", "X.........x....."),
        timbre=((1, 0.6, 0.4, 0.3), 0.12),
        octave=0,
    ),
    Style(
        tempo=(90, 115),
        wait=0.6,
        bounce=(0.2, 3),
        stance={SHOULDER: (0.2, -0.5, -0.8), ELBOW: (0, -1.4, 0)},
        moves=(
            (SHOULDER, (0.3, -0.3, 0.3), 1, True),
            (ELBOW, (0, 0.7, 0.4), 1, True),
            (CHEST, (0.2, 0, 0), 2, False),
            (NECK, (0, 0.4, 0), 1, False),
        ),
        drums=("punch", "clap", "closed"),
        kick=("X.......X.......",),
        snare=_BACKBEAT,
        hat=("X...X...X...X...", "X...X..xX...X..x"),
        tone=("X..xX...X..xX...", "X..xX..xX...X..."),
        timbre=((1, 0, 0.6, 0, 0.4, 0, 0.3), 0.08),
        octave=1,
    ),
    Style(
        tempo=(100, 120),
        wait=0.45,
        bounce=(0.25, 2),
        stance={SHOULDER: (0, -0.2, 0.3), ELBOW: (0, -0.5, 0.5)},
        moves=(
            (SHOULDER, (0, -0.3, 0.8), 1, True),
            (ELBOW, (0, -0.6, 0), 1, True),
            (WAIST, (0.15, 0.2, 0), 1, False),
            (HIP, (-0.2, 0, 0), 1, True),
        ),
        drums=("deep", "snare", "open"),
        kick=("X.......X.......", "X..x....X......."),
        snare=_BACKBEAT,
        hat=("X.......X.......", "X.....x.X......."),
        tone=("X.x.....X.x.....", "X.....x.X.....x."),
        timbre=((1, 0.9, 0.8, 0.7, 0.6, 0.5), 0.06),
        octave=1,
    ),
    Style(
        tempo=(84, 105),
        wait=0.1,
        bounce=(0.55, 1.5),
        stance={SHOULDER: (0, -0.2, -1.1), ELBOW: (0, -0.9, 0), WAIST: (0.2, 0, 0), HIP: (-0.2, 0, 0.15), KNEE: (0.4, 0, 0)},
        moves=(
            (WAIST, (0.2, 0, 0.2), 1, False),
            (CHEST, (0.1, 0.2, 0.15), 1, False),
            (ELBOW, (0, -0.4, 0), 1, True),
            (SHOULDER, (0.3, 0, 0), 1, False),
        ),
        drums=("deep", "snare", "closed"),
        kick=("X.......X.x.....", "X.....x.X......."),
        snare=_BACKBEAT,
        hat=("X.x.X.x.X.x.X.x.",),
        tone=("X...............", "X.......X......."),
        timbre=((1, 0.3), 0.25),
        octave=0,
    ),
    Style(
        tempo=(84, 110),
        wait=0.3,
        bounce=(0.4, 2),
        stance={SHOULDER: (0, -0.9, -0.5), ELBOW: (0, -0.8, 0), WAIST: (0.1, 0, 0)},
        moves=(
            (SHOULDER, (0, 0.8, 0.2), 1, True),
            (ELBOW, (0, -0.5, 0), 1, False),
            (WAIST, (0, 0.35, 0), 1, False),
            (HIP, (-0.3, 0, 0), 1, True),
        ),
        drums=("deep", "clap", "closed"),
        kick=("X.......X.......", "X.......X..x...."),
        snare=_BACKBEAT,
        hat=("X.x.X.xxX.x.X.xx", "X.x.X.x.X.xxX.x."),
        tone=("X.....X.....X...", "X..X..X.....X..."),
        timbre=((1, 0.1, 0.4), 0.2),
        octave=2,
    ),
    Style(
        tempo=(110, 132),
        wait=0.0,
        bounce=(0.4, 1.2),
        stance={SHOULDER: (0, -0.3, -1.0), ELBOW: (0, -1.2, 0), HIP: (-0.3, 0, 0), KNEE: (0.5, 0, 0)},
        moves=(
            (HIP, (-0.3, 0, 0), 2, True),
            (KNEE, (0.3, 0, 0), 2, True),
            (CHEST, (0.2, 0, 0), 1, False),
            (SHOULDER, (0.2, 0, 0.1), 1, True),
        ),
        drums=("deep", "clap", "open"),
        kick=("X...X...X...X...",),
        snare=_BACKBEAT,
        hat=("X.x.X.x.X.x.X.x.", "X.x.X.x.X.x.X.xx"),
        tone=("X..X..X.X..X..X.", "X.....X.X.....X."),
        timbre=((1, 0.8, 0.5, 0.2), 0.1),
        octave=1,
    ),
    Style(
        tempo=(105, 130),
        wait=0.0,
        bounce=(0.15, 1),
        stance={SHOULDER: (0, -0.2, 0.9), ELBOW: (0, -0.9, 0.7)},
        moves=(
            (SHOULDER, (0.5, 0.5, 0.5), 2, True),
            (ELBOW, (0, -0.8, 0.5), 2, True),
            (ROOT, (0, 0.2, 0.05), 1, False),
            (HIP, (0, 0, 0.1), 1, False),
        ),
        drums=("punch", "clap", "open"),
        kick=("X...X...X...X...",),
        snare=_BACKBEAT,
        hat=("X...X...X...X...", "X..xX...X..xX..."),
        tone=("X.X.X.x.X.X.X.x.", "X.xXX.x.X.xXX.x."),
        timbre=((1, 0.5, 0.25, 0.12), 0.09),
        octave=2,
    ),
    Style(
        tempo=(84, 100),
        wait=0.4,
        bounce=(0.5, 4),
        stance={SHOULDER: (0.2, -0.6, -0.4), ELBOW: (0, -1.0, 0.3), WAIST: (0.4, 0, 0), HIP: (-0.4, 0, 0.35), KNEE: (0.6, 0, 0)},
        moves=(
            (CHEST, (0.4, 0, 0), 1, False),
            (SHOULDER, (0.4, 0.5, 0.5), 1, False),
            (HIP, (-0.6, 0, 0), 1, True),
            (KNEE, (0.6, 0, 0), 1, True),
        ),
        drums=("punch", "snare", "open"),
        kick=("X.x.....X.......", "X.......X.x....."),
        snare=("....X.......X...", "....X.......X.x."),
        hat=("X...X...X...X...",),
        tone=("X.......X.......", "X...X...X......."),
        timbre=((1, 0.9, 0.7, 0.5, 0.4, 0.3), 0.2),
        octave=0,
    ),
    Style(
        tempo=(90, 120),
        wait=0.15,
        bounce=(0.2, 1.5),
        stance={SHOULDER: (0, 0, -0.2), ELBOW: (0, -0.2, 0), WAIST: (-0.1, 0, 0)},
        moves=(
            (ROOT, (0, 0.1, 0.2), 1, False),
            (WAIST, (0, 0, -0.3), 1, False),
            (SHOULDER, (0, 0.2, 0.6), 1, False),
            (HIP, (0, 0, 0.25), 1, True),
        ),
        drums=("soft", "clap", "closed"),
        kick=("X.......X.......", "X......xX......."),
        snare=_BACKBEAT,
        hat=("X..xX..xX..xX..x", "X.xxX..xX.xxX..x"),
        tone=("X...X...X...X...", "X...X.x.X...X.x."),
        timbre=((1, 0.2, 0.1), 0.15),
        octave=2,
    ),
    Style(
        tempo=(84, 112),
        wait=0.0,
        bounce=(0.12, 1),
        stance={SHOULDER: (0, -0.3, 1.1), ELBOW: (0, -0.3, 0.3), CHEST: (-0.15, 0, 0)},
        moves=(
            (HIP, (-0.7, 0, 0.4), 1, True),
            (SHOULDER, (0, 0, 0.3), 1, False),
            (ROOT, (0, 0.5, 0), 1, False),
            (NECK, (-0.2, 0.2, 0), 1, False),
        ),
        drums=("soft", "rim", "closed"),
        kick=("X.......X.......",),
        snare=_BACKBEAT,
        hat=("X...X.x.X...X.x.", "X..xX...X..xX..."),
        tone=("X.......X.......", "X...X...X...X..."),
        timbre=((1, 0.5, 0, 0.3), 0.35),
        octave=3,
    ),
)


class DanceMusic:
    """A `Source` of dances with their music.

    motion float32 [n, 60 seconds, 24, 3], metres from the clip's mean pelvis; audio float32 [n, samples] in [-1, 1] at 22,050 Hz, whole
    blocks of 128 samples (44,032 in 2 s); genre int32 [n], numbered as in `GENRES`; beats float32 [n, most], seconds, -1 behind the last.

    Clip i is of song `i mod SONGS[split]`, so its genre is `i mod 10`. Clips are made when they are first asked for and then kept for every
    source: 125 kB for 2 s.

    Args:
      split: "train", "validation" or "test".
      seconds: the length of a clip.
      count: the number of clips; by default 2,000, 200 and 200. A larger source continues a smaller one.

    Raises:
      UserError: an unknown split, a length or a number below 1.
    """

    def __init__(self, split: str, seconds: int = 2, count: int | None = None):
        if split not in COUNTS:
            raise UserError(f"dance_music has no split {split!r}: choose one of {', '.join(COUNTS)}.")
        count = COUNTS[split] if count is None else count
        if count < 1 or seconds < 1:
            raise UserError(f"{count} clips of {seconds} s: choose one or more, of a second or more.")
        self.split, self.seconds, self._count = split, seconds, count

    def __len__(self):
        return self._count

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        clips = [_clip(self.split, self.seconds, int(i)) for i in indices]
        taken = {name: np.stack([clip[name] for clip in clips]) for name in ("motion", "audio", "genre", "beats")}
        return {**taken, "audio": taken["audio"].astype(np.float32) / LOUDEST}

    def fingerprint(self):
        return digest(len(self), "dance music", self.split, self.seconds)

    def poses(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The dance of one clip as SMPL has it: rotation vectors [frames, 24, 3] in radians, and the pelvis's path [frames, 3], metres."""
        check_range(np.array([index]), len(self))
        return _dance(*_cue(self.split, self.seconds, index), self.seconds)[:2]


@dataclasses.dataclass(frozen=True)
class Song:
    """What a song is made of.

    Attributes:
      genre: its number in `GENRES`.
      period: seconds a beat.
      patterns: of kick, snare, hat and tone, 16 sixteenths each.
      notes: of 16 beats, in hertz.
    """

    genre: int
    period: float
    patterns: tuple[str, ...]
    notes: tuple[float, ...]


def song(split: str, number: int) -> Song:
    """Song `number` of a split."""
    rng = _rng(split, 0, number)
    style = STYLES[number % len(GENRES)]
    period = 60 / rng.uniform(*style.tempo)
    patterns = tuple(some[rng.integers(len(some))] for some in (style.kick, style.snare, style.hat, style.tone))
    semitones = 12 * style.octave + rng.choice((0, 3, 5)) + rng.choice((0, 3, 5, 7, 10), 16)  # a key, and minor pentatonic degrees
    return Song(number % len(GENRES), period, patterns, tuple((110 * 2 ** (semitones / 12)).tolist()))


def joints(rotations: np.ndarray) -> np.ndarray:
    """Where the joints [..., 24, 3] are, in metres from the pelvis, by their rotation vectors [..., 24, 3] relative to their parents.

    Joint j is at `x_p + R_0 ... R_p offset_j`, p its parent, the product over the joints from the pelvis to p; R by Rodrigues' formula.
    """
    angle = np.linalg.norm(rotations, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(rotations / np.maximum(angle[..., 0], 1e-8), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    turned = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    found = np.zeros(rotations.shape)
    for joint, parent in enumerate(PARENTS[1:], 1):
        found[..., joint, :] = found[..., parent, :] + turned[..., parent, :, :] @ OFFSETS[joint]
        turned[..., joint, :, :] = turned[..., parent, :, :] @ turned[..., joint, :, :]
    return found


def centred(motion: np.ndarray) -> np.ndarray:
    """Joints [frames, joints, 3] from the mean place of joint 0, float32."""
    return (motion - motion[:, 0].mean(0)).astype(np.float32)


@functools.cache
def _clip(split: str, seconds: int, index: int) -> dict[str, np.ndarray]:
    """Clip `index`; its audio as int16."""
    rng, piece, first, times = _cue(split, seconds, index)
    ticks = _tick(times)
    heard = ticks[(ticks >= 0) & (ticks < seconds * RATE)] / RATE
    beats = np.full(seconds * FASTEST // 60 + 1, -1, np.float32)
    beats[: len(heard)] = heard
    audio = np.rint(LOUDEST * _play(piece, first, times, seconds)).astype(np.int16)
    *_, motion = _dance(rng, piece, first, times, seconds)
    return {"motion": centred(motion), "audio": audio, "genre": np.int32(piece.genre), "beats": beats}


def _cue(split: str, seconds: int, index: int) -> tuple[np.random.Generator, Song, int, np.ndarray]:
    """-> (the clip's randomness, its song, a beat's number in the song, the seconds at which that beat and all that follow come).

    The first two beats are before the clip and the last two behind it.
    """
    rng = _rng(split, 1, index, seconds)
    piece = song(split, index % SONGS[split])
    while True:
        start = rng.uniform(0, piece.period)
        inside = int((seconds - start) // piece.period)
        # Nor may a tick bring the beat before the clip into it.
        if EDGE <= start <= piece.period - TICK / RATE and start + inside * piece.period <= seconds - EDGE:
            return rng, piece, int(rng.integers(64)), start + piece.period * np.arange(-2, inside + 3)


def _play(piece: Song, first: int, times: np.ndarray, seconds: int) -> np.ndarray:
    """A song's samples in [-1, 1], whole blocks, its beats `first`, first + 1, ... being at `times`."""
    style = STYLES[piece.genre]
    length, before = seconds * RATE // TICK * TICK, _tick(-times[0])
    track = np.zeros(before + length + 2 * RATE)
    for number in range(4 * (len(times) - 1)):
        step = (4 * first + number) % 64
        at = before + _tick(times[0] + piece.period * number / 4)
        sounds = (*map(_drum, style.drums), _tone(piece.notes[step // 4], *style.timbre))
        for pattern, sound in zip(piece.patterns, sounds):
            if pattern[step % 16] != ".":
                track[at : at + len(sound)] += LEVELS[pattern[step % 16]] * sound
    return np.clip(track[before : before + length], -1, 1)


def _tick(seconds):
    """The sample of a time, on the grid of ticks."""
    return TICK * np.rint(np.asarray(seconds) * RATE / TICK).astype(int)


@functools.cache
def _drum(name: str) -> np.ndarray:
    """A recording of a drum."""
    t = np.arange(RING * RATE) / RATE
    noise = np.random.Generator(np.random.Philox(list(name.encode()))).uniform(-1, 1, len(t))
    bright = np.diff(noise, prepend=0)  # 6 dB more an octave
    if name in KICKS:
        low, high, decay, click = KICKS[name]
        swept = low * t + (high - low) * 0.03 * (1 - np.exp(-t / 0.03))  # from high to low within 30 ms
        return _faded(0.4 * np.sin(2 * np.pi * swept) * np.exp(-t / decay) + click * noise * np.exp(-t / 0.012))
    if name == "snare":
        return _faded(0.2 * np.sin(2 * np.pi * 190 * t) * np.exp(-t / 0.05) + 0.2 * noise * np.exp(-t / 0.05))
    if name == "clap":
        return _faded(0.3 * bright * (np.exp(-t / 0.03) + 0.5 * np.exp(-np.abs(t - 0.02) / 0.01)))
    if name == "rim":
        wood = np.sin(2 * np.pi * 820 * t) + np.sin(2 * np.pi * 1730 * t)
        return _faded(0.2 * wood * np.exp(-t / 0.02) + 0.1 * noise * np.exp(-t / 0.01))
    return _faded(0.16 * np.diff(bright, prepend=0) * np.exp(-t / HATS[name]))


@functools.cache
def _tone(hertz: float, harmonics: tuple[float, ...], decay: float) -> np.ndarray:
    """A recording of a note."""
    t = np.arange(RING * RATE) / RATE
    waves = sum(strength * np.sin(2 * np.pi * hertz * k * t) for k, strength in enumerate(harmonics, 1) if hertz * k < RATE / 2)
    return _faded(0.12 / sum(harmonics) ** 0.5 * waves * np.exp(-t / decay) * np.minimum(1, t / 0.003))


def _faded(sound: np.ndarray) -> np.ndarray:
    """A sound whose last 0.1 s fade out."""
    return sound * np.minimum(1, np.arange(len(sound), 0, -1) / (0.1 * RATE))


def _dance(rng, piece: Song, first: int, times: np.ndarray, seconds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A dance to a song's beats `first`, first + 1, ... at `times`.

    -> (rotation vectors [frames, 24, 3], the pelvis's path [frames, 3], where the joints are [frames, 24, 3]).
    """
    style, frames = STYLES[piece.genre], seconds * FPS
    felt = times + np.clip(rng.normal(0, TIMING, len(times)), -2 * TIMING, 2 * TIMING)
    place = first + np.interp(np.arange(frames) / FPS, felt, np.arange(len(times)))  # in beats of the song
    rotations = _drift(rng, frames, 0.05, (len(PARENTS), 3)) + rng.normal(0, 0.004, (frames, len(PARENTS), 3))
    for joint, vector in style.stance.items():
        _turn(rotations, joint, np.array(vector) + rng.normal(0, 0.1, 3))
    strength, wait = rng.uniform(0.75, 1.25), np.clip(style.wait + rng.normal(0, 0.05), 0, 0.7)
    for joint, vector, rate, against in style.moves:
        keys = np.where(np.arange(4 * rate) % 2, -1, 1) * rng.uniform(0.7, 1.3, 4 * rate)
        key, since = np.divmod(place * rate, 1)
        moving = np.clip((since - wait) / (1 - wait), 0, 1)
        here, there = (keys[(key.astype(int) + k) % len(keys)] for k in (0, 1))
        now = here + (there - here) * moving**2 * (3 - 2 * moving)
        _turn(rotations, joint, strength * now[:, None] * (np.array(vector) + rng.normal(0, 0.05, 3)), against)
    depth, sharpness = style.bounce
    bent = strength * depth * ((1 + np.cos(2 * np.pi * place)) / 2) ** sharpness
    for joint, share in ((HIP, -1), (KNEE, 2), (ANKLE, -1), (WAIST, 0.3)):
        _turn(rotations, joint, bent[:, None] * np.array([share, 0, 0]))
    rotations[:, 0, 1] += rng.normal(0, 0.3)  # the direction
    path = _drift(rng, frames, 0.04, (3,))
    motion = joints(rotations)
    path[:, 1] = -motion[..., 1].min(1)  # the lowest joint is on the floor
    return rotations, path, motion + path[:, None]


def _turn(rotations: np.ndarray, joint: int, vector: np.ndarray, against: bool = False) -> None:
    """Adds a vector [3] or [frames, 3] to a joint's rotations, and its mirror image, or the opposite of that, to the other side's."""
    rotations[:, joint] += vector
    if joint in _LEFT:
        rotations[:, _LEFT[joint][0]] += vector * np.array([1, -1, -1]) * (-1 if against else 1)


def _drift(rng, frames: int, size: float, shape: tuple[int, ...]) -> np.ndarray:
    """Slow noise [frames, *shape]: a normal number of deviation `size` every second, and cosines between them."""
    points = rng.normal(0, size, (frames // FPS + 2, *shape))
    second, since = np.divmod(np.arange(frames), FPS)
    share = ((1 - np.cos(np.pi * since / FPS)) / 2).reshape(-1, *[1] * len(shape))
    return points[second] * (1 - share) + points[second + 1] * share


def _rng(split: str, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox([_STREAMS[split], *key]))


class DanceMusicBuilder(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `dance_music`: the 2-s clips of `DanceMusic` on disk, for programs that read TFDS data sets.

    audio int16 [44032] (32,767 is 1), motion float32 [120, 24, 3], genre as a class label, beats float32 [5], in the splits train,
    validation and test.
    """

    name = "dance_music"
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "2,000 training and 200 test clips of 2 s.", "1.1.0": "200 more clips, for validation."}

    def _info(self):
        example = DanceMusic("test", count=1).take(np.zeros(1, np.int64))
        arrays = {name: tfds.features.Tensor(shape=example[name].shape[1:], dtype=np.float32) for name in ("motion", "beats")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Made-up dances of a skeleton in ten genres, with their music, genres and beat times.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=example["audio"].shape[1:], dtype=np.int16),
                    "genre": tfds.features.ClassLabel(names=GENRES),
                    **arrays,
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(DanceMusic(split)) for split in COUNTS}

    def _generate_examples(self, source):
        for i in range(len(source)):
            clip = {name: array[0] for name, array in source.take(np.array([i])).items()}
            yield i, {**clip, "audio": np.rint(LOUDEST * clip["audio"]).astype(np.int16), "genre": int(clip["genre"])}
