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

import numpy as np
import tensorflow_datasets as tfds

from mmdiff.data.sources import check_range, digest
from mmdiff.errors import UserError
from mmdiff.projects.dance.skeleton import ANKLE, FPS, HIP, KNEE, LEFT, PARENTS, WAIST, centred, joints
from mmdiff.projects.dance.styles import GENRES, STYLES

RATE = 22_050  # samples a second
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
    if joint in LEFT:
        rotations[:, LEFT[joint][0]] += vector * np.array([1, -1, -1]) * (-1 if against else 1)


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
