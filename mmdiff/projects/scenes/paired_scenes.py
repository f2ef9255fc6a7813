"""Digit scenes with another image of each, for MT-Diffusion's image transition (Chen et al. 2024, section 5.1):

    segmentation    what is where: a class for each pixel, 0 the background, 1 to 10 the digits; int32 [n, size, size]
    night           the same scene at night: a fixed linear map of every pixel's colour, which can be undone; float32 [n, size, size, 3]
"""

from __future__ import annotations

import numpy as np

from mmdiff.data.sources import digest, fingerprint
from mmdiff.errors import UserError
from mmdiff.projects.scenes import scenes

# The colours of the scenes' classes, background and digits 0 to 9: corners of the cube and middles of its faces, at least 180 apart.
PALETTE = (
    (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255), (255, 128, 128),
    (0, 128, 128), (128, 128, 255))  # fmt: skip
# Night's red, green and blue of day's, all in 0..1: the channels change places, darker, and everything turns blue.
DARKEN = np.array([[0.05, 0.4, 0.05], [0.05, 0.05, 0.45], [0.6, 0.1, 0.1]])
GLOW = np.array([0.0, 0.0, 0.15])


class PairedScenes:
    """A `Source` of digit scenes with another image of each: what `Scenes` gives, and `other`.

    Args:
      split, size, count: as of `Scenes`.
      other: "segmentation" (a pixel is of the digit's class where the digit covers more than half of it) or "night".

    Raises:
      UserError: another `other`, or what `Scenes` refuses.
    """

    def __init__(self, split: str, other: str, size: int = 16, count: int | None = None):
        if other not in ("segmentation", "night"):
            raise UserError(f"the digit scenes have no second image {other!r}: choose segmentation or night.")
        self._scenes, self._other = scenes.Scenes(split, size, count), other

    def __len__(self):
        return len(self._scenes)

    def take(self, indices):
        found = self._scenes.take(indices)
        return {**found, self._other: night(found["image"]) if self._other == "night" else self._classes(indices, found)}

    def fingerprint(self):
        return digest(len(self), self._other, fingerprint(self._scenes))

    def _classes(self, indices, found):
        inside = scenes.cover(self._scenes.ink(indices), found, self._scenes.size) > 0.5
        return np.where(inside, found["digit"][:, None, None] + 1, 0).astype(np.int32)


def night(day: np.ndarray) -> np.ndarray:
    """Day's images [..., 3] in [-1, 1] at night: `DARKEN u + GLOW` of every pixel u in 0..1."""
    return (2 * ((np.asarray(day, np.float64) + 1) / 2 @ DARKEN.T + GLOW) - 1).astype(np.float32)


def day(night: np.ndarray) -> np.ndarray:
    """The inverse of `night`; of what is no night it is outside [-1, 1]."""
    return (2 * (((np.asarray(night, np.float64) + 1) / 2 - GLOW) @ np.linalg.inv(DARKEN).T) - 1).astype(np.float32)
