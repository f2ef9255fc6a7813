"""Classifiers of pictures of emoji that are no part of a model: the tone of the skin by its colour, the category by a small network."""

from __future__ import annotations

import collections
import functools

import numpy as np

from mmdiff.evals import image_classifier
from mmdiff.evals.evaluator import best
from mmdiff.projects.emoji.emoji import CATEGORIES, TONES, Emoji, emoji_source

DARKER = 8.0  # levels of 256 by which skin gets darker from one tone to the next, and hair and clothes do not
NEAR = 15.0  # levels


class ToneClassifier:
    """Images float32 [n, H, W, 3] in [-1, 1] -> the number of the tone whose mean colour most pixels are near to: int [n], -1 of none.

    A pixel at the distance d of a colour counts exp(-(d / 15)^2) for it. The colours are the means over real pictures of the pixels that
    get darker from every tone of a name to its next.
    """

    def __init__(self, train: Emoji):
        rows, found = collections.defaultdict(dict), collections.defaultdict(list)
        for row, (name, tones) in enumerate(zip(train.names, train.tones)):
            if len(tones) == 1:
                rows[name][tones[0]] = row
        for own in rows.values():
            tones = sorted(own)
            pixels = _levels(train.take(np.array([own[tone] for tone in tones]))["image"])
            skin = (-np.diff(pixels.mean(-1), axis=0) > DARKER).all(0) & (len(tones) > 2)
            for tone, each in zip(tones, pixels):
                found[tone].append(each[skin])
        self.colours = np.stack([np.concatenate(found[tone]).mean(0) for tone in range(len(TONES))])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        near = [np.exp(-((_levels(images) - colour) ** 2).sum(-1) / NEAR**2).sum((1, 2)) for colour in self.colours]
        return best("nearness to the tones", np.stack(near, 1))


def category_classifier(train: Emoji, steps: int) -> image_classifier.Classifier:
    """The classifier `images uint8 [n, 32, 32, 3] -> numbers in CATEGORIES [n]`, trained on real pictures, as many of every category."""
    rows = [np.flatnonzero(train.categories == category) for category in range(len(CATEGORIES))]
    most = max(map(len, rows))
    chosen = np.concatenate([np.resize(own, most) for own in rows if len(own)])
    images = np.rint(_levels(train.take(chosen)["image"])).astype(np.uint8)
    return image_classifier.trained(images, train.categories[chosen], len(CATEGORIES), steps)


@functools.lru_cache(maxsize=2)
def independent_classifiers(file: str, steps: int) -> tuple[ToneClassifier, image_classifier.Classifier | None]:
    """Both of the training pictures in a file, that of categories after `steps` (None after 0); evaluators of one process share them."""
    train = emoji_source("train", file)
    return ToneClassifier(train), category_classifier(train, steps) if steps else None


def _levels(images: np.ndarray) -> np.ndarray:
    return (np.asarray(images, np.float32) + 1) * np.float32(127.5)
