"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels in 10 classes (Xiao, Rasul and Vollgraf 2017; MIT licence).

A folder holds the four files as they are published, plain or compressed (.gz),

    train-images-idx3-ubyte.gz  train-labels-idx1-ubyte.gz  t10k-images-idx3-ubyte.gz  t10k-labels-idx1-ubyte.gz

or the TFDS data set fashion_mnist, prepared as array_record. Images get a black margin of two pixels, 32 x 32, which `central` cuts off.
"""

from __future__ import annotations

import functools
import pathlib

import numpy as np

from mmdiff import files
from mmdiff.data.idx import read_idx
from mmdiff.data.image_datasets import Tfds
from mmdiff.data.image_folders import split_rows
from mmdiff.data.stored_images import ByteImages, decode
from mmdiff.errors import UserError

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
STORED, MARGIN = 28, 2
SIZE = STORED + 2 * MARGIN
SPLITS = ("train", "validation", "test")
VALIDATION = 1 / 12  # of the training images: 5,000 of 60,000, evenly of every class
SOURCES = "github.com/zalandoresearch/fashion-mnist, or the Debian package dataset-fashion-mnist"


class Clothes(ByteImages):
    """A `Source`: image float32 [n, 32, 32, 1] in [-1, 1], label int32 [n]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        margin = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))
        super().__init__({"image": np.pad(images, margin)[..., None], "label": labels.astype(np.int32)})


def fashion_source(split: str, folder: str) -> Clothes:
    """One split: "train" (55,000), "validation" (5,000 of the published training images, 500 of a class) or "test" (10,000).

    Raises:
      UserError: an unknown split, no folder, files that are missing, damaged or do not belong together.
    """
    if split not in SPLITS:
        raise UserError(f"Fashion-MNIST has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    if not folder:
        raise UserError(f"config.data.dir is empty: name the folder of Fashion-MNIST's four idx files ({SOURCES}), or that of TFDS.")
    return _splits(files.expand(folder), split == "test")[split]


def central(images: np.ndarray) -> np.ndarray:
    """The images without the margin: [n, 32, 32, C] -> [n, 28, 28, C]."""
    return images[:, MARGIN:-MARGIN, MARGIN:-MARGIN]


@functools.lru_cache(maxsize=4)
def _splits(folder: pathlib.Path, test: bool) -> dict[str, Clothes]:
    images, labels = (_tfds if files.is_folder(folder / "fashion_mnist") else _idx)(folder, test)
    if test:
        return {"test": Clothes(images, labels)}
    rows = split_rows([str(row) for row in range(len(labels))], labels.tolist(), {"validation": VALIDATION})
    return {split: Clothes(images[chosen], labels[chosen]) for split, chosen in rows.items()}


def _idx(folder: pathlib.Path, test: bool) -> tuple[np.ndarray, np.ndarray]:
    part = "t10k" if test else "train"
    images, labels = (read_idx(path) for path in (_file(folder, f"{part}-images-idx3-ubyte"), _file(folder, f"{part}-labels-idx1-ubyte")))
    if images.shape != (len(labels), STORED, STORED) or labels.ndim != 1 or labels.max() >= len(NAMES):
        found = f"images {list(images.shape)} and labels {list(labels.shape)} up to {labels.max()}"
        raise UserError(f"the {part} files in {folder} are not Fashion-MNIST's, they hold {found}: download them again ({SOURCES}).")
    return images, labels


def _file(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise UserError(f"there is no {name} or {name}.gz in {folder}: put Fashion-MNIST's four files there ({SOURCES}).")


def _tfds(folder: pathlib.Path, test: bool) -> tuple[np.ndarray, np.ndarray]:
    records = Tfds("fashion_mnist", "test" if test else "train", folder)
    found = records.get(range(len(records)))
    return np.stack([np.asarray(decode(each["image"]).convert("L")) for each in found]), np.array([each["label"] for each in found])
