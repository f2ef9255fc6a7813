"""Sets of pictures with their labels or captions: ImageNet, COCO, CUB-200, the sets of zero-shot classification, or one's own.

    imagenet2012     TFDS, prepared as array_record in the folder: label (1,000 classes)
    coco_captions    TFDS, the same, "coco_captions/2014": 5 captions each (the few that have more lose the rest)
    cub200           a folder: 10 captions each, and the label; the classes of the two splits differ (Reed et al. 2016)
                         CUB_200_2011/images/CLASS/NAME.jpg            the official archive
                         text_c10/CLASS/NAME.txt                       a caption on every line
                         trainvalclasses.txt, testclasses.txt          a CLASS on every line: 150 and 50
    fgvc_aircraft    a folder with the official archive, fgvc-aircraft-2013b/data: label (100 variants)
    cifar10, cifar100, caltech101, dtd, eurosat, oxford_flowers102, food101, oxford_iiit_pet, cars196, sun397
                     TFDS, the same: label; "eurosat/rgb", and of SUN397 "standard-part1-120k", the first of the published partitions
    folder           one's own: train/CLASS/NAME.jpg and val/CLASS/NAME.jpg (or another format): label, the classes in the order of names
    captioned        one's own, or what img2dataset writes of CC3M: in train and val, each with a caption of its own,
                         00000.tar, ...                    NAME.jpg beside NAME.txt, or a NAME.json with "caption" (WebDataset); or
                         captions.tsv                      FILE, a tab and its caption on every line; or
                         NAME.jpg, FOLDER/NAME.jpg, ...    beside NAME.txt, or a NAME.json with "caption"

The splits are "train" and "val": of ImageNet the validation set, of COCO all of val2014 (40,504 pictures; TFDS calls its parts val,
restval and test), of CUB-200 the test classes, of EuroSAT all (it is published without splits, and has no "train"), else the test set.

A picture's central square, shrunk or enlarged, is what is seen of it, in training as in evaluation. The released CDCD crops at random
in training; here every picture is encoded once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmdiff.data import text
from mmdiff.data.modalities import PICTURES, Images, Labels
from mmdiff.data.sources import RandomSource, Source, check_range, digest, sizes
from mmdiff.errors import UserError

CAPTIONS = {"coco_captions": 5, "cub200": 10, "captioned": 1}  # of a picture
SPLITS = {
    "imagenet2012": {"train": "train", "val": "validation"},
    "coco_captions": {"train": "train", "val": "val+restval+test"},
    "cub200": {"train": "trainvalclasses.txt", "val": "testclasses.txt"},
    "folder": {"train": "train", "val": "val"},
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
INDEX = "index.npz"


class Absent(UserError):
    """Data that are not there at all."""


class Records(Protocol):
    """Pictures as they are stored. `names` are those of the classes, by label."""

    names: Sequence[str]

    def __len__(self) -> int:
        """How many."""

    def identity(self) -> Any:
        """What tells these pictures from others, as JSON values, wherever they lie."""

    def get(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Of each "image", a file's path or content or a `Member`, and "label" (int) or "captions" (strings), or both."""


class Pictures:
    """A `Source` of one split of a set: image float32 [n, size, size, 3] in [-1, 1], and label int32 [n] where there are classes.

    Args:
      name, split: of the set, as above.
      data_dir: its folder; of a TFDS set, where TFDS keeps data sets.
      size: the side of a picture.
      words: what encodes the captions; then text is int32 [n, captions, length]. A picture with fewer captions repeats its own.

    Attributes:
      names: of the classes, as they are stored, by label; none where there are no classes.

    Raises:
      UserError: an unknown set or split, data that are not there, and what to do about it; from `take`, a damaged picture.
    """

    def __init__(self, name: str, split: str, data_dir: str | os.PathLike, size: int = 256, words: text.Tokenizer | None = None):
        self._records, self._size, self._words = _records(name, split, data_dir), size, words
        self._captions, self.names = CAPTIONS.get(name, 0), tuple(self._records.names)

    def __len__(self):
        return len(self._records)

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        records = self._records.get(indices.tolist())
        images = list(threads().map(lambda record: decode(record["image"], lambda picture: square(picture, self._size)), records))
        found = {"image": np.stack(images) if images else np.zeros((0, self._size, self._size, 3), np.float32)}
        if all("label" in record for record in records):
            found["label"] = np.array([record["label"] for record in records], np.int32)
        if self._words:
            said = [itertools.islice(itertools.cycle(record["captions"]), self._captions) for record in records]
            ids = self._words.encode(list(itertools.chain.from_iterable(said)))
            found["text"] = ids.reshape(len(records), self._captions, self._words.length)
        return found

    def fingerprint(self):
        return digest(len(self), list(self.names), self._records.identity())


def open_pictures(data: Any, split: str, size: int, words: text.Tokenizer | None = None) -> Source:
    """What a config's `data` section names: {"name": SET, "dir": FOLDER}, or made-up pictures of 1,000 classes by {"name": "random"}.

    Raises:
      UserError: no folder, or what `Pictures` refuses.
    """
    if data.name == "random":
        return RandomSource({"image": Images(size, size, 3), "label": Labels(1000)}, 1_000_000 if split == "train" else 1024)
    return Pictures(data.name, split, data.dir, size, words)


def tokenizer(name: str, data_dir: str | os.PathLike, length: int = 77, size: int = VOCABULARY) -> text.Tokenizer:
    """The tokenizer of a set's captions, trained on those of its training pictures, of at most `size` ids.

    Raises:
      UserError: a set without captions, or what `Pictures` refuses.
    """
    if name not in CAPTIONS:
        raise UserError(f"the pictures of {name} have no captions: choose one of {', '.join(CAPTIONS)}.")
    records = _records(name, "train", data_dir)
    parts = (records.get(range(start, min(start + 1000, len(records)))) for start in range(0, len(records), 1000))
    said = itertools.chain.from_iterable(record["captions"][: CAPTIONS[name]] for part in parts for record in part)
    return text.train(said, length, size)


# ---------------------------------------------------------------------------------------------------------------- the sets


def _records(name: str, split: str, data_dir: str | os.PathLike) -> Records:
    if name not in SPLITS:
        raise UserError(f"there is no set of pictures {name!r}: set config.data.name to {', '.join(SPLITS)} or random.")
    if split not in SPLITS[name]:
        raise UserError(f"the set {name} has no split {split!r}: choose one of {', '.join(SPLITS[name])}.")
    if not data_dir:
        raise UserError(f"config.data.dir is empty: name the folder of the set {name} (mmdiff/data/pictures.py says what is in it).")
    folder, part = pathlib.Path(data_dir).expanduser(), SPLITS[name][split]
    folders = {"cub200": _cub200, "fgvc_aircraft": _aircraft, "folder": _folder, "captioned": _captioned}
    return folders[name](folder, part) if name in folders else Tfds(name, part, folder)


class Tfds:
    """The `Records` of a TFDS data set that somebody has prepared as array_record. Neither its code nor TensorFlow is imported.

    `images` names the entries that are pictures, and that a record has as they are stored.
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
        self._images = images
        newest = max(versions, key=lambda path: [int(part) if part.isdecimal() else -1 for part in path.name.split(".")])
        try:
            builder = tfds.builder_from_directory(str(newest))
            features = dict(builder.info.features.items())
            pictures = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
            self._source = builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in pictures})
        except (NotImplementedError, ValueError, OSError) as error:
            raise UserError(f"{newest} cannot be read ({str(error).splitlines()[0]}): prepare it anew, with {command}") from error
        self._identity = [full, newest.name, split]
        self.names = features["label"].names if isinstance(features.get("label"), tfds.features.ClassLabel) else ()

    def __len__(self):
        return len(self._source)

    def identity(self):
        return self._identity

    def get(self, indices):
        examples = self._source.__getitems__(list(indices))
        return [{image: bytes(example[image]) for image in self._images} | _said(example) for example in examples]


def _said(example: dict[str, Any]) -> dict[str, Any]:
    """What a TFDS example says of its picture."""
    if "label" in example:
        return {"label": int(example["label"])}
    if "captions" in example:
        return {"captions": [caption.decode("utf-8", "replace") for caption in example["captions"]["text"]]}
    return {}


class Files:
    """`Records` in memory, of pictures in the files of a folder."""

    def __init__(self, records: Sequence[dict[str, Any]], folder: pathlib.Path, names: Sequence[str] = ()):
        self._all, self._folder, self.names = records, folder, names

    def __len__(self):
        return len(self._all)

    def identity(self):
        said = [[record.get("label"), record.get("captions")] for record in self._all]
        return [said, sizes([record["image"] for record in self._all], self._folder)]

    def get(self, indices):
        return [self._all[i] for i in indices]


def _cub200(folder: pathlib.Path, classes: str) -> Files:
    images, texts, listed = folder / "CUB_200_2011/images", folder / "text_c10", folder / classes
    for path, source in ((images, "the official archive CUB_200_2011.tgz"), (texts, "the captions"), (listed, "the list of classes")):
        if not path.exists():
            raise UserError(
                f"{path} does not exist: unpack {source} into {folder}. CUB-200-2011 is published by Caltech (data.caltech.edu), captions "
                "and lists by Reed et al. 2016 (github.com/reedscot/cvpr2016, cvpr2016_cub.tar.gz)."
            )
    numbers = {name: i for i, name in enumerate(_folders(images))}
    records = []
    for name in listed.read_text().split():
        if name not in numbers:
            raise UserError(f"{listed} names the class {name!r}, but {images} has no such folder.")
        for path in files(images / name):
            said = texts / name / f"{path.stem}.txt"
            try:
                captions = [line.strip() for line in said.read_text("utf-8", "replace").splitlines() if line.strip()]
            except OSError as error:
                raise UserError(f"the captions {said} of {path} cannot be read ({error.strerror}): unpack them again.") from error
            if not captions:
                raise UserError(f"{said} holds no captions: unpack it again.")
            records.append({"image": path, "label": numbers[name], "captions": captions})
    return nonempty(records, folder, f"pictures of the classes in {listed}", list(numbers))


def _aircraft(folder: pathlib.Path, split: str) -> Files:
    data = folder / "fgvc-aircraft-2013b/data"
    variants, listed = data / "variants.txt", data / f"images_variant_{split}.txt"
    for path in (variants, listed):
        if not path.exists():
            source = "fgvc-aircraft-2013b.tar.gz (robots.ox.ac.uk/~vgg/data/fgvc-aircraft)"
            raise Absent(f"{path} does not exist: unpack {source} into {folder}.")
    numbers = {name: i for i, name in enumerate(variants.read_text().splitlines())}
    records = []
    for line in listed.read_text().splitlines():
        number, _, name = line.partition(" ")
        if name not in numbers:
            raise UserError(f"{listed} names the variant {name!r}, but {variants} has none of that name.")
        records.append({"image": data / f"images/{number}.jpg", "label": numbers[name]})
    return nonempty(records, folder, f"pictures in {listed}", list(numbers))


def _folder(folder: pathlib.Path, split: str) -> Files:
    for part in dict.fromkeys(("train", split)):
        if not (folder / part).is_dir():
            raise UserError(f"there is no folder {folder / part}: pictures lie in {folder}/train/CLASS and {folder}/val/CLASS.")
    numbers = {name: i for i, name in enumerate(_folders(folder / "train"))}
    records = []
    for name in _folders(folder / split):
        if name not in numbers:
            raise UserError(f"{folder / split} has a class {name!r}, but {folder / 'train'} has none of that name.")
        records += [{"image": path, "label": numbers[name]} for path in files(folder / split / name)]
    return nonempty(records, folder, f"pictures ({', '.join(PICTURES)}) in the folders of {folder / split}", list(numbers))


def nonempty(records: Sequence[dict[str, Any]], folder: pathlib.Path, what: str, names: Sequence[str] = ()) -> Files:
    """`Files` of the records of a folder, or a UserError: there are none of `what`."""
    if not records:
        raise UserError(f"there are no {what}.")
    return Files(records, folder, names)


def _folders(path: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The pictures in a folder, in the order of their names."""
    return sorted(entry for entry in path.iterdir() if entry.suffix.lower() in PICTURES)


# ------------------------------------------------------------------------------------------------------------ with captions


def _captioned(folder: pathlib.Path, split: str) -> Records:
    folder = folder / split
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: pictures with captions lie in {folder.parent}/train and {folder.parent}/val.")
    shards, listed = sorted(folder.glob("*.tar")), folder / "captions.tsv"
    if shards:
        return Shards(shards)
    records = []
    if listed.exists():
        for number, line in enumerate(listed.read_text("utf-8", "replace").splitlines(), 1):
            name, tab, caption = line.partition("\t")
            if not tab:
                raise UserError(f"line {number} of {listed} has no tab: it is a picture's file, a tab and its caption.")
            records.append({"image": folder / name, "captions": [caption.strip()]})
        return nonempty(records, folder, f"lines in {listed}")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            beside = {kind: path.with_suffix(f".{kind}") for kind in ("txt", "json")}
            said = _caption(path, {kind: file.read_bytes for kind, file in beside.items() if file.exists()})
            records.append({"image": path, "captions": [said]})
    return nonempty(records, folder, f"tar files and no pictures ({', '.join(PICTURES)}) in {folder}")


def _caption(picture: Any, said: dict[str, Callable[[], bytes]]) -> str:
    """A picture's caption, by what reads the "txt" or "json" beside it."""
    try:
        return (said["txt"]().decode("utf-8", "replace") if "txt" in said else str(json.loads(said["json"]())["caption"])).strip()
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f'{picture} has no caption: beside it belongs a .txt of its name, or a .json with "caption".') from error


class Member(NamedTuple):
    """A picture in a tar file: where its content starts, and how long it is."""

    path: pathlib.Path
    start: int
    size: int

    def read(self) -> bytes:
        """The content."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)

    def __str__(self):
        name = b""
        with contextlib.suppress(OSError):  # it stands in the block before the content
            name = Member(self.path, self.start - tarfile.BLOCKSIZE, 100).read().rstrip(b"\0")
        return f"{name.decode('utf-8', 'replace')} in {self.path}"


class Shards:
    """`Records` of pictures with captions in tar files of one folder, in their order.

    What is where, and all captions, is kept beside them in index.npz: the first time every file is gone through, and again when one has
    changed. A folder that cannot be written is gone through every time.
    """

    names = ()

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._paths, kept = paths, paths[0].parent / INDEX
        stats = [path.stat() for path in paths]
        files = {
            "shards": np.array([path.name for path in paths]),
            "stamps": np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64),
        }
        index = {}
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile), np.load(kept) as stored:
            index = dict(stored)
        if not all(np.array_equal(array, index.get(name)) for name, array in files.items()):
            index = files | _index(paths)
            with (
                contextlib.suppress(OSError),
                tempfile.TemporaryDirectory(dir=kept.parent, prefix=".index-", ignore_cleanup_errors=True) as own,
            ):
                np.savez(pathlib.Path(own) / INDEX, **index)
                os.replace(pathlib.Path(own) / INDEX, kept)
        self._members, self._ends, self._said = index["members"], index["ends"], index["captions"]

    def __len__(self):
        return len(self._members)

    def identity(self):
        return [len(self), hashlib.sha256(self._said).hexdigest(), sizes(self._paths, self._paths[0].parent)]

    def get(self, indices):
        found = []
        for i in indices:
            shard, start, size = self._members[i].tolist()
            caption = self._said[self._ends[i - 1] if i else 0 : self._ends[i]].tobytes().decode()
            found.append({"image": Member(self._paths[shard], start, size), "captions": [caption]})
        return found


def _index(paths: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
    """"members" int64 [n, 3]: shard, start and size of every picture; "captions" uint8, one after the other; where they end, "ends" [n]."""
    members, captions = [], []
    for shard, path in enumerate(paths):
        pictures, said, end = {}, {}, 0
        try:
            with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if f".{kind.lower()}" in PICTURES:
                        pictures[folder, stem] = member
                    elif kind in ("txt", "json"):
                        said.setdefault((folder, stem), {})[kind] = functools.partial(_content, tar, member)
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what ends a tar file
                    raise tarfile.ReadError(f"no end after {len(pictures)} pictures")
                for name, member in pictures.items():
                    members.append((shard, member.offset_data, member.size))
                    captions.append(_caption(f"{member.name} in {path}", said.get(name, {})).encode())
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read as a tar file ({error}): it is damaged or compressed, copy it again.") from error
    if not members:
        raise UserError(f"there are no pictures ({', '.join(PICTURES)}) in the tar files of {paths[0].parent}.")
    ends = np.cumsum([len(caption) for caption in captions], dtype=np.int64)
    return {"members": np.array(members, np.int64), "ends": ends, "captions": np.frombuffer(b"".join(captions), np.uint8)}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return tar.extractfile(member).read()


# --------------------------------------------------------------------------------------------------------------- a picture


def decode(file: pathlib.Path | bytes | Member, see: Callable[[Any], Any]) -> np.ndarray:
    """What `see` makes of a Pillow picture, values 0..255, as float32 in [-1, 1].

    Raises:
      UserError: a damaged file.
    """
    from PIL import Image

    try:
        content = file.read() if isinstance(file, Member) else file
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            return np.asarray(see(picture), np.float32) / np.float32(127.5) - 1
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        what = "a picture of the data set" if isinstance(file, bytes) else str(file)
        raise UserError(f"{what} cannot be read as an image ({error}): the file is missing or damaged, copy it again.") from error


def square(picture: Any, size: int, ids: bool = False) -> Any:
    """The central square of a Pillow picture, `size` pixels wide: in colour, resampled (bicubic, antialiased); or ids, the nearest."""
    from PIL import Image

    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    how = Image.Resampling.NEAREST if ids else Image.Resampling.BICUBIC
    return (picture if ids else picture.convert("RGB")).resize((size, size), how, (left, top, left + side, top + side))


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Pillow decodes outside of Python's lock."""
    return ThreadPoolExecutor(min(32, os.cpu_count() or 1), "pictures")
