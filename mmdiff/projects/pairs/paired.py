"""Pairs of images of one scene, for MT-Diffusion's image transition (Chen et al. 2024, section 5.1): an image and another image.

The paper's sets (`Pairs`) lie in a folder, with the splits "train" and "val":

    cityscapes       segmentation: train/NAME.jpg, val/NAME.jpg (or another format), the photograph left, the segmentation right, both
                     square, in one file, as published with pix2pix (Isola et al. 2017): 2,975 and 500
    cityscapes_tfds  the same by TFDS ("cityscapes/semantic_segmentation"), prepared as array_record in the folder; the photographs are
                     2048 x 1024 pixels, and their central square is what is seen, whereas pix2pix squeezes them
    night2day        night: as cityscapes, the night left and the day, which is the image, right

All images, segmentations among them, are float32 [n, size, size, 3] in [-1, 1].
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import image_datasets
from mmdiff.data.modalities import Images
from mmdiff.data.sources import Source, check_range, digest, made_up
from mmdiff.data.stored_images import UndamagedReader, decode, square, values
from mmdiff.errors import UserError
from mmdiff.files import IMAGE_SUFFIXES

OTHER = {"cityscapes": "segmentation", "cityscapes_tfds": "segmentation", "night2day": "night"}  # the name of the other image
# The official colours of Cityscapes' ids 0 to 33; 255 is what its files have for id -1, a licence plate. The ids between do not occur.
CITYSCAPES = np.zeros((256, 3), np.uint8)
CITYSCAPES[5:34] = [
    [111, 74, 0], [81, 0, 81], [128, 64, 128], [244, 35, 232], [250, 170, 160], [230, 150, 140], [70, 70, 70], [102, 102, 156],
    [190, 153, 153], [180, 165, 180], [150, 100, 100], [150, 120, 90], [153, 153, 153], [153, 153, 153], [250, 170, 30], [220, 220, 0],
    [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60], [255, 0, 0], [0, 0, 142], [0, 0, 70], [0, 60, 100], [0, 0, 90],
    [0, 0, 110], [0, 80, 100], [0, 0, 230], [119, 11, 32]]
CITYSCAPES[255] = 0, 0, 142


class Pairs:
    """A `Source` of one split of a set of the paper: image and, under the name in `OTHER`, the other image.

    Args:
      name, split: of the set, as above.
      data_dir: its folder; of a TFDS set, where TFDS keeps data sets.
      size: the side of an image.
      damaged: the share of the pairs that may be damaged, and are then left out, as of `ImageDataset`.

    Raises:
      UserError: an unknown set or split, data that are not there, and what to do about it; from `take`, a file that is damaged or no pair.
    """

    def __init__(self, name: str, split: str, data_dir: str | os.PathLike, size: int = 64, damaged: float = 0.0):
        if name not in OTHER:
            raise UserError(f"there is no set of pairs {name!r}: set config.data.name to {', '.join(OTHER)} or random.")
        if split not in ("train", "val"):
            raise UserError(f"the set {name} has no split {split!r}: choose one of train, val.")
        if not data_dir:
            raise UserError(f"config.data.dir is empty: name the folder of the set {name} (see mmdiff/projects/pairs/paired.py).")
        folder = files.expand(data_dir)
        self._name, self._size = name, size
        if name == "cityscapes_tfds":
            part = {"train": "train", "val": "validation"}[split]
            self._records = image_datasets.Tfds("cityscapes", part, folder, ("image_left", "segmentation_label"))
            self._reader = UndamagedReader(self._records, damaged)
            return
        if not files.is_folder(folder / split):
            raise UserError(
                f"there is no folder {folder / split}: unpack pix2pix's {name}.tar.gz (efrosgans.eecs.berkeley.edu/pix2pix/datasets), "
                "and name the folder in which its train and val are.")
        records = [{"image": path} for path in files.images(folder / split)]
        self._records = image_datasets.nonempty(records, folder, f"images ({', '.join(IMAGE_SUFFIXES)}) in {folder / split}")
        self._reader = UndamagedReader(self._records, damaged)

    def __len__(self):
        return len(self._records)

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        _, found = self._reader.read(indices.tolist(), self._pair)
        pairs = np.stack(found) if found else np.zeros((0, 2, self._size, self._size, 3), np.float32)
        return {"image": pairs[:, 0], OTHER[self._name]: pairs[:, 1]}

    def fingerprint(self):
        return digest(len(self), self._name, self._records.identity())

    def _pair(self, record):
        """The image and the other image, [2, size, size, 3]."""
        if self._name == "cityscapes_tfds":
            photograph, classes = decode(record["image_left"]), decode(record["segmentation_label"], ids=True)
            colours = CITYSCAPES[np.asarray(square(classes, self._size, ids=True))]
            return np.stack([values(square(photograph, self._size)), values(colours)])
        image = decode(record["image"])
        width, height = image.size
        if width != 2 * height:
            raise UserError(f"{record['image']} has {width} x {height} pixels: a pair is one file with two squares side by side.")
        left, right = (image.crop((start, 0, start + height, height)) for start in (0, height))
        pair = np.stack([values(square(half, self._size)) for half in (left, right)])
        return pair[::-1] if self._name == "night2day" else pair


def open_pairs(data: Any, split: str, size: int) -> Source:
    """What a config's `data` section names: {"name": SET, "dir": FOLDER}, or made-up images, all of them, by {"name": "random"}.

    Raises:
      UserError: no folder, or what `Pairs` refuses.
    """
    if data.name == "random":
        names = ("image", *OTHER.values())
        return made_up({name: Images(size, size, 3, name=name) for name in names}, split)
    return Pairs(data.name, split, data.dir, size, data.get("damaged", 0.0))
