"""The ten genres of the made-up dances: how each moves, and how its music sounds. Names and order are AIST++'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mmdiff.projects.dance.skeleton import CHEST, ELBOW, HIP, KNEE, NECK, ROOT, SHOULDER, WAIST

GENRES = ("break", "pop", "lock", "middle-hip-hop", "la-hip-hop", "house", "waack", "krump", "street-jazz", "ballet-jazz")


@dataclasses.dataclass(frozen=True)
class Style:
    """A genre.

    Attributes:
      tempo: beats a minute, from and to.
      wait: the share of a beat for which a key pose is held.
      bounce: how far the knees bend on the beat, in radians, and how briefly.
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
        tempo=(105, 132), wait=0.2, bounce=(0.35, 2),
        stance={HIP: (-1.1, 0, 0.2), KNEE: (1.5, 0, 0), WAIST: (0.5, 0, 0), SHOULDER: (0.3, -0.4, -1.0), ELBOW: (0, -0.4, 0)},
        moves=(
            (HIP, (-0.5, 0, 0.2), 1, True), (KNEE, (0.4, 0, 0), 1, True),
            (SHOULDER, (0, -0.4, 0.3), 1, True), (ROOT, (0, 0.35, 0), 1, False)),
        drums=("punch", "snare", "closed"),
        kick=("X.....x.X.......", "X.......X.x....."), snare=_BACKBEAT,
        hat=("X.x.X.x.X.x.X.x.", "X.x.X.xxX.x.X.x."),
        tone=("X.....x.........", "X.........x....."),
        timbre=((1, 0.6, 0.4, 0.3), 0.12), octave=0,
    ),
    Style(
        tempo=(90, 115), wait=0.6, bounce=(0.2, 3),
        stance={SHOULDER: (0.2, -0.5, -0.8), ELBOW: (0, -1.4, 0)},
        moves=(
            (SHOULDER, (0.3, -0.3, 0.3), 1, True), (ELBOW, (0, 0.7, 0.4), 1, True),
            (CHEST, (0.2, 0, 0), 2, False), (NECK, (0, 0.4, 0), 1, False)),
        drums=("punch", "clap", "closed"),
        kick=("X.......X.......",), snare=_BACKBEAT,
        hat=("X...X...X...X...", "X...X..xX...X..x"),
        tone=("X..xX...X..xX...", "X..xX..xX...X..."),
        timbre=((1, 0, 0.6, 0, 0.4, 0, 0.3), 0.08), octave=1,
    ),
    Style(
        tempo=(100, 120), wait=0.45, bounce=(0.25, 2),
        stance={SHOULDER: (0, -0.2, 0.3), ELBOW: (0, -0.5, 0.5)},
        moves=(
            (SHOULDER, (0, -0.3, 0.8), 1, True), (ELBOW, (0, -0.6, 0), 1, True),
            (WAIST, (0.15, 0.2, 0), 1, False), (HIP, (-0.2, 0, 0), 1, True)),
        drums=("deep", "snare", "open"),
        kick=("X.......X.......", "X..x....X......."), snare=_BACKBEAT,
        hat=("X.......X.......", "X.....x.X......."),
        tone=("X.x.....X.x.....", "X.....x.X.....x."),
        timbre=((1, 0.9, 0.8, 0.7, 0.6, 0.5), 0.06), octave=1,
    ),
    Style(
        tempo=(84, 105), wait=0.1, bounce=(0.55, 1.5),
        stance={SHOULDER: (0, -0.2, -1.1), ELBOW: (0, -0.9, 0), WAIST: (0.2, 0, 0), HIP: (-0.2, 0, 0.15), KNEE: (0.4, 0, 0)},
        moves=(
            (WAIST, (0.2, 0, 0.2), 1, False), (CHEST, (0.1, 0.2, 0.15), 1, False),
            (ELBOW, (0, -0.4, 0), 1, True), (SHOULDER, (0.3, 0, 0), 1, False)),
        drums=("deep", "snare", "closed"),
        kick=("X.......X.x.....", "X.....x.X......."), snare=_BACKBEAT,
        hat=("X.x.X.x.X.x.X.x.",),
        tone=("X...............", "X.......X......."),
        timbre=((1, 0.3), 0.25), octave=0,
    ),
    Style(
        tempo=(84, 110), wait=0.3, bounce=(0.4, 2),
        stance={SHOULDER: (0, -0.9, -0.5), ELBOW: (0, -0.8, 0), WAIST: (0.1, 0, 0)},
        moves=(
            (SHOULDER, (0, 0.8, 0.2), 1, True), (ELBOW, (0, -0.5, 0), 1, False),
            (WAIST, (0, 0.35, 0), 1, False), (HIP, (-0.3, 0, 0), 1, True)),
        drums=("deep", "clap", "closed"),
        kick=("X.......X.......", "X.......X..x...."), snare=_BACKBEAT,
        hat=("X.x.X.xxX.x.X.xx", "X.x.X.x.X.xxX.x."),
        tone=("X.....X.....X...", "X..X..X.....X..."),
        timbre=((1, 0.1, 0.4), 0.2), octave=2,
    ),
    Style(
        tempo=(110, 132), wait=0.0, bounce=(0.4, 1.2),
        stance={SHOULDER: (0, -0.3, -1.0), ELBOW: (0, -1.2, 0), HIP: (-0.3, 0, 0), KNEE: (0.5, 0, 0)},
        moves=(
            (HIP, (-0.3, 0, 0), 2, True), (KNEE, (0.3, 0, 0), 2, True),
            (CHEST, (0.2, 0, 0), 1, False), (SHOULDER, (0.2, 0, 0.1), 1, True)),
        drums=("deep", "clap", "open"),
        kick=("X...X...X...X...",), snare=_BACKBEAT,
        hat=("X.x.X.x.X.x.X.x.", "X.x.X.x.X.x.X.xx"),
        tone=("X..X..X.X..X..X.", "X.....X.X.....X."),
        timbre=((1, 0.8, 0.5, 0.2), 0.1), octave=1,
    ),
    Style(
        tempo=(105, 130), wait=0.0, bounce=(0.15, 1),
        stance={SHOULDER: (0, -0.2, 0.9), ELBOW: (0, -0.9, 0.7)},
        moves=(
            (SHOULDER, (0.5, 0.5, 0.5), 2, True), (ELBOW, (0, -0.8, 0.5), 2, True),
            (ROOT, (0, 0.2, 0.05), 1, False), (HIP, (0, 0, 0.1), 1, False)),
        drums=("punch", "clap", "open"),
        kick=("X...X...X...X...",), snare=_BACKBEAT,
        hat=("X...X...X...X...", "X..xX...X..xX..."),
        tone=("X.X.X.x.X.X.X.x.", "X.xXX.x.X.xXX.x."),
        timbre=((1, 0.5, 0.25, 0.12), 0.09), octave=2,
    ),
    Style(
        tempo=(84, 100), wait=0.4, bounce=(0.5, 4),
        stance={SHOULDER: (0.2, -0.6, -0.4), ELBOW: (0, -1.0, 0.3), WAIST: (0.4, 0, 0), HIP: (-0.4, 0, 0.35), KNEE: (0.6, 0, 0)},
        moves=(
            (CHEST, (0.4, 0, 0), 1, False), (SHOULDER, (0.4, 0.5, 0.5), 1, False),
            (HIP, (-0.6, 0, 0), 1, True), (KNEE, (0.6, 0, 0), 1, True)),
        drums=("punch", "snare", "open"),
        kick=("X.x.....X.......", "X.......X.x....."), snare=("....X.......X...", "....X.......X.x."),
        hat=("X...X...X...X...",),
        tone=("X.......X.......", "X...X...X......."),
        timbre=((1, 0.9, 0.7, 0.5, 0.4, 0.3), 0.2), octave=0,
    ),
    Style(
        tempo=(90, 120), wait=0.15, bounce=(0.2, 1.5),
        stance={SHOULDER: (0, 0, -0.2), ELBOW: (0, -0.2, 0), WAIST: (-0.1, 0, 0)},
        moves=(
            (ROOT, (0, 0.1, 0.2), 1, False), (WAIST, (0, 0, -0.3), 1, False),
            (SHOULDER, (0, 0.2, 0.6), 1, False), (HIP, (0, 0, 0.25), 1, True)),
        drums=("soft", "clap", "closed"),
        kick=("X.......X.......", "X......xX......."), snare=_BACKBEAT,
        hat=("X..xX..xX..xX..x", "X.xxX..xX.xxX..x"),
        tone=("X...X...X...X...", "X...X.x.X...X.x."),
        timbre=((1, 0.2, 0.1), 0.15), octave=2,
    ),
    Style(
        tempo=(84, 112), wait=0.0, bounce=(0.12, 1),
        stance={SHOULDER: (0, -0.3, 1.1), ELBOW: (0, -0.3, 0.3), CHEST: (-0.15, 0, 0)},
        moves=(
            (HIP, (-0.7, 0, 0.4), 1, True), (SHOULDER, (0, 0, 0.3), 1, False),
            (ROOT, (0, 0.5, 0), 1, False), (NECK, (-0.2, 0.2, 0), 1, False)),
        drums=("soft", "rim", "closed"),
        kick=("X.......X.......",), snare=_BACKBEAT,
        hat=("X...X.x.X...X.x.", "X..xX...X..xX..."),
        tone=("X.......X.......", "X...X...X...X..."),
        timbre=((1, 0.5, 0, 0.3), 0.35), octave=3,
    ),
)
