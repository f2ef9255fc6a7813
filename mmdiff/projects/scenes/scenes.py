"""Digit scenes: the real digits, coloured and placed on a coloured canvas, with captions; some combinations never occur in training.

    "a small red seven on a blue background, top left"

Nothing is random: the scenes of a split are all the combinations of a real digit (of the digits' split of that name; a test digit in
"held_out"), its colour, another colour behind it, a size and a position, and a source holds some of them in a fixed shuffled order. Scene i
is rendered when it is asked for.

**Held out** are the scenes with (digit + colour + 2 position) mod 10 = 0, numbered as in `COLOURS` and `POSITIONS`: one in ten triples
(digit, colour, position), three for every digit; any two of the three occur together in training. The other splits hold the others.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from mmdiff.data import bpe, media, order
from mmdiff.data.sources import check_range, digest
from mmdiff.errors import UserError
from mmdiff.projects.digits.digits import digits_tokens

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (216, 48, 40),
    "green": (40, 168, 72),
    "blue": (48, 80, 232),
    "yellow": (248, 216, 56),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
SIZES = {"small": 2 / 4, "large": 3 / 4}  # of the canvas
# The free space above and to the left of the digit, as shares of all that is free.
POSITIONS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1), "centre": (0.5, 0.5)}
COUNTS = {"train": 20_000, "validation": 2_000, "test": 2_000, "held_out": 2_000}
_STREAMS = {"train": 0, "test": 1, "held_out": 2, "validation": 3}  # of the order of the scenes
# What a scene is made of, besides its image; `background` is a colour, too.
ATTRIBUTES = {"digit": DIGITS, "colour": tuple(COLOURS), "background": tuple(COLOURS), "size": tuple(SIZES), "position": tuple(POSITIONS)}
TEXT_LENGTH = 16  # a caption has 11 or 12 pieces, start and end come on top


class Scenes:
    """A `Source` of scenes: image float32 [n, size, size, 3] in [-1, 1], text int32 [n, 16], and the attributes, int32 [n] each.

    Its `take` gives, by `ATTRIBUTES`, digit, colour, background, size and position, which are what the caption says.

    Args:
      split: "train", "validation" and "test" (other digits, the same combinations) or "held_out" (the test's digits, combinations that
        training lacks).
      size: the side of the canvas in pixels, a multiple of 4, at least 16. A small digit is half of it, a large one three quarters.
      count: the number of scenes; by default 20,000, or 2,000. A larger source continues a smaller one.
      data_dir: as in `digits_source`.

    Raises:
      UserError: an unknown split, another size, or more scenes than there are (some 296,000, 54,000, 135,000 and 15,000).
    """

    def __init__(self, split: str, size: int = 16, count: int | None = None, data_dir: str | os.PathLike | None = None):
        if split not in COUNTS:
            raise UserError(f"the digit scenes have no split {split!r}: choose one of {', '.join(COUNTS)}.")
        if size < 16 or size % 4:
            raise UserError(f"a canvas of {size} pixels: choose a multiple of 4, 16 or more.")
        digits = digits_tokens("test" if split == "held_out" else split, data_dir).arrays
        self.size = size
        self._ink = digits["tokens"].reshape(-1, 8, 8) / 16.0
        scenes = _combinations(digits["label"], split == "held_out")
        count = COUNTS[split] if count is None else count
        if not 0 < count <= len(scenes["digit"]):
            raise UserError(f"the {split} split has 1 to {len(scenes['digit']):,} scenes, not {count}.")
        chosen = order.permutation(0, _STREAMS[split], len(scenes["digit"]))[:count]
        self._scenes = {name: column[chosen] for name, column in scenes.items()}

    def __len__(self):
        return len(self._scenes["digit"])

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        scenes = {name: self._scenes[name][indices] for name in ATTRIBUTES}
        pixels = render(self.ink(indices), scenes, self.size)
        return {"image": pixels.astype(np.float32) / 127.5 - 1, "text": _texts()[tuple(scenes.values())], **scenes}

    def fingerprint(self):
        return digest(len(self), "digit scenes", self.size, *(self._scenes[name] for name in sorted(self._scenes)))

    def ink(self, indices: np.ndarray) -> np.ndarray:
        """The digits of scenes, [n, 8, 8] in [0, 1]."""
        return self._ink[self._scenes["row"][indices]]


def render(ink: np.ndarray, scenes: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Images uint8 [n, size, size, 3] of digits `ink` [n, 8, 8] in [0, 1] with the attributes in `scenes` [n].

    A pixel is `background + cover (colour - background)`, rounded.
    """
    palette = np.array(list(COLOURS.values()), np.float64)
    behind, front = (palette[scenes[name]][:, None, None] for name in ("background", "colour"))
    return np.rint(behind + cover(ink, scenes, size)[..., None] * (front - behind)).astype(np.uint8)


def cover(ink: np.ndarray, scenes: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """How far the digit covers a pixel, [n, size, size] in [0, 1]: its ink at its place; larger digits are interpolated linearly."""
    covered = np.zeros((len(ink), size, size))
    for number in range(len(SIZES)):
        for position in range(len(POSITIONS)):
            rows = np.flatnonzero((scenes["size"] == number) & (scenes["position"] == position))
            box, enlarge = footprint(size, number, position)
            covered[rows, box[0], box[1]] = enlarge @ ink[rows] @ enlarge.T
    return covered


def footprint(size: int, number: int, position: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where on the canvas a digit of the `number`-th size stands in a `position`, (rows, columns), and what enlarges it: [side, 8].

    The canvas holds `enlarge @ ink @ enlarge.T`; its pseudo-inverse brings the ink back.
    """
    side = round(size * list(SIZES.values())[number])
    top, left = (round(share * (size - side)) for share in list(POSITIONS.values())[position])
    # Pixel centres of the large grid on the small one; outside of its outermost centres the value is theirs.
    at = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    enlarge = np.zeros((side, 8))
    enlarge[np.arange(side), low] = 1 - (at - low)
    enlarge[np.arange(side), low + 1] = at - low
    return (slice(top, top + side), slice(left, left + side)), enlarge


def captions(scenes: Mapping[str, np.ndarray]) -> list[str]:
    """The captions of scenes with the attributes [n] in `scenes`."""
    columns = [[words[i] for i in scenes[name]] for name, words in ATTRIBUTES.items()]
    return [
        f"a {size} {colour} {digit} on a {background} background, {'in the ' if position == 'centre' else ''}{position}"
        for digit, colour, background, size, position in zip(*columns)
    ]


@functools.cache
def tokenizer() -> bpe.Tokenizer:
    """The tokenizer of the captions, trained on those of the training combinations, each of them once."""
    return bpe.train(captions(_combinations(np.arange(10), held_out=False)), TEXT_LENGTH)


@functools.cache
def _texts() -> np.ndarray:
    """The encoded caption of every combination, int32 [digits, colours, backgrounds, sizes, positions, length]."""
    shape = tuple(map(len, ATTRIBUTES.values()))
    columns = np.indices(shape).reshape(len(shape), -1)
    return tokenizer().encode(captions(dict(zip(ATTRIBUTES, columns)))).reshape(*shape, TEXT_LENGTH)


def _combinations(labels: np.ndarray, held_out: bool) -> dict[str, np.ndarray]:
    """Every scene that digits with `labels` [n] can be in, held out or not: the digit's row and the attributes, int32 [m]."""
    grid = np.indices((len(labels), len(COLOURS), len(COLOURS), len(SIZES), len(POSITIONS)), np.int32).reshape(5, -1)
    row, colour, background, size, position = grid
    digit = labels[row].astype(np.int32)
    kept = (colour != background) & (((digit + colour + 2 * position) % 10 == 0) == held_out)
    columns = {"row": row, "digit": digit, "colour": colour, "background": background, "size": size, "position": position}
    return {name: column[kept] for name, column in columns.items()}


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `digit_scenes`: the scenes of `Scenes` on disk, for programs that read TFDS data sets.

    image uint8 [16, 16, 3], caption, and the attributes as class labels, in the splits train, validation, test and held_out.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "20,000 training, 2,000 test and 2,000 held-out scenes.",
        "2.0.0": "2,000 scenes for validation, whose digits no longer occur in training; test and held-out scenes are the same.",
    }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Real handwritten digits, coloured and placed on a coloured canvas, with captions and held-out combinations.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(16, 16, 3), dtype=np.uint8),
                    "caption": tfds.features.Text(),
                    **{name: tfds.features.ClassLabel(names=words) for name, words in ATTRIBUTES.items()},
                }
            ),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(Scenes(split)) for split in COUNTS}

    def _generate_examples(self, source):
        for start in range(0, len(source), 1000):
            part = source.take(np.arange(start, min(start + 1000, len(source))))
            images = media.to_uint8(part["image"])
            for i, caption in enumerate(captions(part)):
                yield start + i, {"image": images[i], "caption": caption, **{name: int(part[name][i]) for name in ATTRIBUTES}}
