"""Sets of images with their labels or captions: ImageNet, COCO, CUB-200, the sets of zero-shot classification, or one's own.

    imagenet2012     TFDS, prepared as array_record in the folder: label (1,000 classes)
    coco_captions    5 captions each (the few that have more lose the rest); of TFDS, "coco_captions/2014", or a folder
                         annotations/captions_train2014.json, captions_val2014.json    the official archives of 2014,
                         train2014/NAME.jpg, val2014/NAME.jpg                          or of 2017, whose val has 5,000 images
    coco_karpathy    the same images as Karpathy & Fei-Fei (2015) split them, 5 captions each, for captions and retrieval: a folder
                         dataset_coco.json                             theirs (caption_datasets.zip); "restval" counts as "train"
                         train2014/NAME.jpg, val2014/NAME.jpg          the official archives of 2014
    flickr30k        31,014 images, 5 captions each: a folder
                         dataset_flickr30k.json                        Karpathy's
                         flickr30k-images/NAME.jpg                     the archive of shannon.cs.illinois.edu/DenotationGraph
    cub200           a folder: 10 captions each, and the label; the classes of the two splits differ (Reed et al. 2016)
                         CUB_200_2011/images/CLASS/NAME.jpg            the official archive
                         text_c10/CLASS/NAME.txt                       a caption on every line
                         trainvalclasses.txt, testclasses.txt          a CLASS on every line: 150 and 50
    fgvc_aircraft    a folder with the official archive, fgvc-aircraft-2013b/data: label (100 variants)
    cifar10, cifar100, caltech101, dtd, eurosat, oxford_flowers102, food101, oxford_iiit_pet, cars196, sun397
                     TFDS, the same: label; "eurosat/rgb", and of SUN397 "standard-part1-120k", the first of the published partitions
    folder           one's own, in folders of classes or in tar files: label, the classes in the order of names or by number
    classes          one's own, to measure on alone: all images in folders of classes, of its test or val where it is split
    captioned        one's own, or what img2dataset writes of CC3M: captions, in tar files, in a list or next to the images

`data.image_folders` says what one's own folder may hold: train and val, or the images themselves, of which a tenth is then "val".
`mmdiff.files` says how files are found and read, `data.media` which kinds of images, and how one of any kind becomes values.

Karpathy's splits are "train", "val" and "test", 5,000 images each of COCO in the last two, and 1,014 and 1,000 of Flickr30k. The others'
are "train" and "val": of ImageNet the validation set, of COCO all of val2014 (40,504 images; TFDS calls its parts val, restval and test),
of CUB-200 the test classes, of EuroSAT all (it is published without splits), else the test set.

A damaged image ends the run with a sentence that names it. Where config.data.damaged is above 0, that share of the images may be: each
is named in the log, and the next sound one stands in its place.

An image's central square, shrunk or enlarged, is what is seen of it, in training as in evaluation. The released CDCD crops at random
in training; here every image is encoded once. Images are upright (EXIF) and, where transparent, on white.
"""

from __future__ import annotations

import itertools
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import bpe, image_folders
from mmdiff.data.image_folders import Files, nonempty, of_class
from mmdiff.data.modalities import Images, Labels
from mmdiff.data.sources import Source, check_range, digest, made_up
from mmdiff.data.stored_images import Records, Stored, UndamagedReader, decode, square, values
from mmdiff.errors import UserError
from mmdiff.files import FileError

log = logging.getLogger(__name__)
# Captions of an image; None is as many as the one with the most has.
CAPTIONS = {"coco_captions": 5, "coco_karpathy": 5, "flickr30k": 5, "cub200": 10, "captioned": None}
OWN = {"folder": "label", "captioned": "caption"}  # what `image_folders` reads
SPLITS = {
    "imagenet2012": {"train": "train", "val": "validation"},
    "coco_captions": {"train": "train", "val": "val+restval+test"},
    "coco_karpathy": {"train": "train", "val": "val", "test": "test"},
    "flickr30k": {"train": "train", "val": "val", "test": "test"},
    "cub200": {"train": "trainvalclasses.txt", "val": "testclasses.txt"},
    "folder": {"train": "train", "val": "val"},
    "classes": {"val": ""},
    "captioned": {"train": "train", "val": "val"},
    "eurosat": {"val": "train"},
    "fgvc_aircraft": {"train": "trainval", "val": "test"},
    "food101": {"train": "train", "val": "validation"},
} | {
    name: {"train": "train", "val": "test"}
    for name in ("cifar10", "cifar100", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "cars196", "sun397")
}
BUILDERS = {  # of TFDS, where a set has several
    "coco_captions": "coco_captions/2014",
    "cityscapes": "cityscapes/semantic_segmentation",
    "eurosat": "eurosat/rgb",
    "sun397": "sun397/standard-part1-120k",
}
VOCABULARY = 49408  # CLIP's
BY_HAND = {  # what TFDS cannot download
    "imagenet2012": "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of image-net.org",
    "cityscapes": "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com",
}
PREPARE = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('{}', data_dir='{}', file_format='array_record').download_and_prepare()\""
)


class Absent(UserError):
    """Data that are not there at all."""


class ImageDataset:
    """A `Source` of one split of a set: image float32 [n, size, size, 3] in [-1, 1], and label int32 [n] where there are classes.

    Args:
      name, split: of the set, as above.
      data_dir: its folder; of a TFDS set, where TFDS keeps data sets.
      size: the side of an image.
      tokenizer: what encodes the captions; then text is int32 [n, captions, length]. An image with fewer captions repeats its own.
      damaged: the share of the images that may be damaged, and are then left out; see above.

    Attributes:
      names: of the classes, as they are stored, by label; none where there are no classes.

    Raises:
      UserError: an unknown set or split, data that are not there, and what to do about it; from `take`, a damaged image.
    """

    def __init__(
        self, name: str, split: str, data_dir: str | os.PathLike, size: int = 256, tokenizer: bpe.Tokenizer | None = None,
        damaged: float = 0.0,
    ):
        self._records, self._size, self._tokenizer = records_of(name, split, data_dir), size, tokenizer
        self._reader, self.names = UndamagedReader(self._records, damaged), tuple(self._records.names)
        self._captions = CAPTIONS.get(name) or self._records.captions

    def __len__(self):
        return len(self._records)

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        records, images = self._reader.read(indices.tolist(), lambda record: values(square(decode(record["image"]), self._size)))
        found = {"image": np.stack(images) if images else np.zeros((0, self._size, self._size, 3), np.float32)}
        if all("label" in record for record in records):
            found["label"] = np.array([record["label"] for record in records], np.int32)
        if self._tokenizer:
            repeated = [itertools.islice(itertools.cycle(record["captions"]), self._captions) for record in records]
            ids = self._tokenizer.encode(list(itertools.chain.from_iterable(repeated)))
            found["text"] = ids.reshape(len(records), self._captions, self._tokenizer.length)
        return found

    def fingerprint(self):
        return digest(len(self), list(self.names), self._records.identity())


def open_image_dataset(data: Any, split: str, size: int, tokenizer: bpe.Tokenizer | None = None) -> Source:
    """What a config's `data` section names: {"name": SET, "dir": FOLDER}, or made-up images of 1,000 classes by {"name": "random"}.

    Raises:
      UserError: no folder, or what `ImageDataset` refuses.
    """
    if data.name == "random":
        return made_up({"image": Images(size, size, 3), "label": Labels(1000)}, split)
    return ImageDataset(data.name, split, data.dir, size, tokenizer, data.get("damaged", 0.0))


def tokenizer(name: str, data_dir: str | os.PathLike, length: int = 77, size: int = VOCABULARY) -> bpe.Tokenizer:
    """The tokenizer of a set's captions, trained on those of its training images, of at most `size` ids.

    Raises:
      UserError: a set without captions, or what `ImageDataset` refuses.
    """
    if name not in CAPTIONS:
        raise UserError(f"the images of {name} have no captions: choose one of {', '.join(CAPTIONS)}.")
    records = records_of(name, "train", data_dir)
    parts = (records.get(range(start, min(start + 1000, len(records)))) for start in range(0, len(records), 1000))
    count = CAPTIONS[name] or records.captions
    texts = itertools.chain.from_iterable(record["captions"][:count] for part in parts for record in part)
    return bpe.train(texts, length, size)


# ---------------------------------------------------------------------------------------------------------------- the sets


def records_of(name: str, split: str, data_dir: str | os.PathLike) -> Records:
    """The images of one split of a set as they are stored, with labels or captions. Raises UserError as `ImageDataset`."""
    if name not in SPLITS:
        raise UserError(f"there is no set of images {name!r}: set config.data.name to {', '.join(SPLITS)} or random.")
    if split not in SPLITS[name]:
        raise UserError(f"the set {name} has no split {split!r}: choose one of {', '.join(SPLITS[name])}.")
    if not data_dir:
        raise UserError(f"config.data.dir is empty: name the folder of the set {name} (mmdiff/data/image_datasets.py says what is in it).")
    if name == "classes":
        return image_folders.read_classes(data_dir)
    if name in OWN:
        return image_folders.read_set(data_dir, OWN[name], split)
    folder, part = files.expand(data_dir), SPLITS[name][split]
    if name == "coco_captions" and os.path.lexists(folder / "annotations"):
        return _coco(folder, split)
    readers = {"cub200": _cub200, "fgvc_aircraft": _aircraft, "coco_karpathy": _karpathy, "flickr30k": _karpathy}
    return readers[name](folder, part) if name in readers else Tfds(name, part, folder)


def test_split(name: str) -> str:
    """The split of a set that is reported: "test", or "val" of one that has no other."""
    return "test" if "test" in SPLITS.get(name, ()) else "val"


class Tfds:
    """The `Records` of a TFDS data set that somebody has prepared as array_record. Neither its code nor TensorFlow is imported.

    `images` names the entries that are images, and that a record has as they are stored.
    """

    def __init__(self, name: str, split: str, data_dir: pathlib.Path, images: Sequence[str] = ("image",)):
        import tensorflow_datasets as tfds

        full = BUILDERS.get(name, name)
        versions = [path.parent for path in (data_dir / full).glob("*/dataset_info.json")]
        command = PREPARE.format(full, data_dir)
        if not versions:
            first = f"put {BY_HAND.get(name)} into {data_dir}/downloads/manual, then run "
            what = first if name in BY_HAND else "download and prepare it with "
            raise Absent(f"there is no TFDS data set {full} in {data_dir}: {what}{command}")
        self._images, self.captions = images, CAPTIONS.get(name) or 0
        newest = max(versions, key=lambda path: [int(part) if part.isdecimal() else -1 for part in path.name.split(".")])
        try:
            builder = tfds.builder_from_directory(str(newest))
            features = dict(builder.info.features.items())
            encoded = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
            self._source = builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in encoded})
        except (NotImplementedError, ValueError, OSError, KeyError) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{newest} cannot be read ({what}): prepare it again, with {command}") from error
        self._identity = [full, newest.name, split]
        self.names = features["label"].names if isinstance(features.get("label"), tfds.features.ClassLabel) else ()

    def __len__(self):
        return len(self._source)

    def identity(self):
        return self._identity

    def get(self, indices):
        try:
            examples = self._source.__getitems__(list(indices))
        except Exception as error:  # whatever a damaged record makes TFDS and ArrayRecord raise
            what = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise UserError(f"{'/'.join(self._identity)} has a record that cannot be read ({what}): prepare it again.") from error
        return [
            {image: Stored(bytes(example[image]), i, self._identity) for image in self._images} | _annotations(example)
            for i, example in zip(indices, examples)
        ]


def _annotations(example: dict[str, Any]) -> dict[str, Any]:
    """What a TFDS example says of its image."""
    if "label" in example:
        return {"label": int(example["label"])}
    if "captions" in example:
        return {"captions": [files.decode(caption, "a caption of the data set") for caption in example["captions"]["text"]]}
    return {}


def _coco(folder: pathlib.Path, split: str) -> Files:
    years = [year for year in ("2014", "2017") if os.path.lexists(folder / f"annotations/captions_{split}{year}.json")]
    part = f"{split}{years[0] if years else '2014'}"
    listed, images = folder / f"annotations/captions_{part}.json", folder / part
    for path, archive in ((listed, f"annotations_trainval{part[-4:]}.zip"), (images, f"{part}.zip")):
        if not os.path.lexists(path):
            raise Absent(f"{path} does not exist: unpack {archive} (cocodataset.org) into {folder}.")
    try:
        found = files.read_json(listed)
        said: dict[int, list[str]] = {each["id"]: [] for each in found["images"]}
        for each in sorted(found["annotations"], key=lambda each: each["id"]):
            said[each["image_id"]].append(each["caption"].strip())
        records = [
            {"image": images / each["file_name"], "captions": said[each["id"]][: CAPTIONS["coco_captions"]]}
            for each in found["images"] if said[each["id"]]]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{listed} is not COCO's list of captions ({type(error).__name__}: {error}): unpack it again.") from error
    return nonempty(records, folder, f"captions in {listed}")


def _karpathy(folder: pathlib.Path, split: str) -> Files:
    listed = next((path for name in ("dataset_coco.json", "dataset_flickr30k.json") if os.path.lexists(path := folder / name)), None)
    if listed is None:
        raise Absent(
            f"{folder} has no dataset_coco.json or dataset_flickr30k.json: unpack Karpathy's caption_datasets.zip into it, next to the "
            "folders of the images.")
    parts = ("train", "restval") if split == "train" else (split,)
    try:
        records = [
            {"image": folder / each.get("filepath", "flickr30k-images") / each["filename"],
             "captions": [caption for said in each["sentences"] if (caption := said["raw"].strip())][: CAPTIONS["coco_karpathy"]]}
            for each in files.read_json(listed)["images"] if each["split"] in parts]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{listed} is not Karpathy's list of captions ({type(error).__name__}: {error}): unpack it again.") from error
    for images in sorted({record["image"].parent for record in records}):
        if not os.path.lexists(images):
            raise Absent(f"{images} does not exist: unpack the set's images there, next to {listed.name}.")
    return nonempty([record for record in records if record["captions"]], folder, f"captions of the split {split} in {listed}")


def _cub200(folder: pathlib.Path, classes: str) -> Files:
    images, texts, listed = folder / "CUB_200_2011/images", folder / "text_c10", folder / classes
    for path, source in ((images, "the official archive CUB_200_2011.tgz"), (texts, "the captions"), (listed, "the list of classes")):
        if not os.path.lexists(path):
            raise UserError(
                f"{path} does not exist: unpack {source} into {folder}. CUB-200-2011 is published by Caltech (data.caltech.edu), captions "
                "and lists by Reed et al. 2016 (github.com/reedscot/cvpr2016, cvpr2016_cub.tar.gz)."
            )
    numbers = {name: i for i, name in enumerate(files.folders(images))}
    records = []
    for name in files.read_names(listed):
        if name not in numbers:
            raise UserError(f"{listed} names the class {name!r}, but {images} has no such folder.")
        for path in of_class(images / name):
            file = texts / name / f"{path.stem}.txt"
            try:
                lines = [line.strip() for line in files.read_lines(file) if line.strip()]
            except FileError as error:
                raise UserError(f"the captions {file} of {path} cannot be read ({error.reason}): unpack them again.") from error
            if not lines:
                raise UserError(f"{file} holds no captions: unpack it again.")
            records.append({"image": path, "label": numbers[name], "captions": lines})
    return nonempty(records, folder, f"images of the classes in {listed}", list(numbers))


def _aircraft(folder: pathlib.Path, split: str) -> Files:
    data = folder / "fgvc-aircraft-2013b/data"
    variants, listed = data / "variants.txt", data / f"images_variant_{split}.txt"
    for path in (variants, listed):
        if not os.path.lexists(path):
            source = "fgvc-aircraft-2013b.tar.gz (robots.ox.ac.uk/~vgg/data/fgvc-aircraft)"
            raise Absent(f"{path} does not exist: unpack {source} into {folder}.")
    numbers = {name: i for i, name in enumerate(files.read_names(variants))}
    records = []
    for line in files.read_names(listed):
        number, _, name = line.partition(" ")
        if name not in numbers:
            raise UserError(f"{listed} names the variant {name!r}, but {variants} has none of that name.")
        records.append({"image": data / f"images/{number}.jpg", "label": numbers[name]})
    return nonempty(records, folder, f"images in {listed}", list(numbers))
