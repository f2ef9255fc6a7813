"""A user's own images: what a folder holds, with classes or captions, and how it is split.

    FOLDER/CLASS/NAME.png          images in folders of their classes: label, in the order of the classes' names
    FOLDER/00000.tar, ...          images with classes (WebDataset): NAME.png with NAME.cls, the number of its class; or one tar
    FOLDER/00000.tar, ...          images with captions (WebDataset): NAME.png with NAME.txt, or a NAME.json with "caption"; or one tar
    FOLDER/captions.tsv            a FILE, a tab and its caption on every line; captions.csv, a comma; captions.json, {FILE: CAPTION, ...}
    FOLDER/NAME.png, A/NAME.png    images with captions in NAME.txt, or a NAME.json with "caption"
    FOLDER/A/NAME.png              images alone

A user's own split is FOLDER/train with FOLDER/val (or validation) and FOLDER/test, each in one of these layouts. A missing validation or
test split is held out from the training data: the same share of every class, chosen by a hash of the file names, so that every run and
every machine makes the same choice. All captions of an image are in one split. Up to 10 captions of an image are used; an empty one is an
error.

Folders are read with all that lies below, in the order of names, without hidden and system files (see `mmdiff.files`).
"""

from __future__ import annotations

import csv
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import captions
from mmdiff.data.sources import digest, sizes
from mmdiff.data.stored_images import Records
from mmdiff.errors import UserError
from mmdiff.files import IMAGE_SUFFIXES

PARTS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}  # the folders of a user's own split
SHARES = {"val": 0.1, "test": 0.1}
LISTS = ("captions.tsv", "captions.csv", "captions.json")


class Files:
    """`Records` in memory, of images in the files of a folder."""

    def __init__(self, records: Sequence[dict[str, Any]], folder: pathlib.Path, names: Sequence[str] = ()):
        self._all, self._folder, self.names = records, folder, names
        self.captions = min(max((len(record.get("captions", ())) for record in records), default=0), captions.MOST)

    def __len__(self):
        return len(self._all)

    def identity(self):
        described = [[record.get("label"), record.get("captions")] for record in self._all]
        return [described, sizes([record["image"] for record in self._all], self._folder)]

    def get(self, indices):
        return [self._all[i] for i in indices]


class Part:
    """Some rows of other `Records`."""

    def __init__(self, records: Records, rows: np.ndarray):
        self._records, self._rows, self.names, self.captions = records, rows, records.names, records.captions

    def __len__(self):
        return len(self._rows)

    def identity(self):
        return [self._records.identity(), digest(len(self), self._rows)]

    def get(self, indices):
        return self._records.get(self._rows[np.asarray(indices, np.int64)].tolist())


def read(data_dir: str | os.PathLike, kind: str, shares: Mapping[str, float] = SHARES) -> dict[str, Records]:
    """A user's images: the `Records` of "train" and of every split in `shares`.

    Args:
      data_dir: the folder, or one tar file, as above.
      kind: what the images come with: "label", "caption", or "image" for images alone.
      shares: how much of the training data is held out for each split that the folder does not have.

    Raises:
      UserError: no such folder, another layout, nothing in it, too few images to split.
    """
    folder = files.expand(data_dir)
    named = _named_parts(folder, kind)
    found = {split: _read(folder, named, split, kind) for split in ("train", *shares) if split in named or split == "train"}
    missing, whole = {name: share for name, share in shares.items() if name not in named}, found["train"]
    if not missing:
        return found
    records = whole.get(range(len(whole)))
    keys = [_key(record["image"], folder) for record in records]
    rows = split_rows(keys, [record.get("label", 0) for record in records], missing)
    if empty := [name for name, chosen in rows.items() if not len(chosen)]:
        remedy = "add some, or make folders train, val and test"
        raise UserError(f"{folder} has {len(whole):,} image{'s' * (len(whole) != 1)}, too few to split off {empty[0]} data: {remedy}.")
    return found | {split: Part(whole, chosen) for split, chosen in rows.items()}


def read_set(data_dir: str | os.PathLike, kind: str, split: str) -> Records:
    """One split, "train" or "val", of images that are split by the user in both, or not at all; as of `read`."""
    folder = files.expand(data_dir)
    named = _named_parts(folder, kind)
    if not named:
        return read(data_dir, kind, {"val": SHARES["val"]})[split]
    if split not in named:
        raise UserError(f"there is no folder {folder / split}: make it next to {folder / named['train']}.")
    return _read(folder, named, split, kind)


def read_classes(data_dir: str | os.PathLike) -> Files:
    """Images to measure on, in folders of their classes: those of FOLDER/test or val if it is split, else all of it.

    Raises:
      UserError: no such folder, none of a class in it, or an image that is in none.
    """
    folder = files.expand(data_dir)
    if not files.is_folder(folder):
        raise UserError(f"there is no folder {folder} of images in folders of their classes, {folder}/CLASS/NAME.png.")
    present = files.folders(folder)
    parts = [name for part in ("test", "val", "train") for name in PARTS[part] if name in present]
    own = folder / parts[0] if len(parts) > 1 or parts and parts == present else folder  # a class may be called train
    return _classes(folder, own, own)


def split_rows(keys: Sequence[str], labels: Sequence[int], shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The rows of each part, ascending: {"train": int64 [n], ...}. Of every label the same shares, at least one of three or more.

    A hash of the keys alone chooses them: the choice is the same everywhere, and an added example moves few others.

    >>> rows = split_rows([f"{i}.png" for i in range(20)], [0] * 20, {"val": 0.1, "test": 0.1})
    >>> {part: len(chosen) for part, chosen in rows.items()}
    {'train': 16, 'val': 2, 'test': 2}

    Args:
      keys: one for each example.
      labels: what is split evenly.
      shares: of the parts other than "train", each above 0, in all below 1.

    Raises:
      UserError: other shares.
    """
    if not all(share > 0 for share in shares.values()) or sum(shares.values()) >= 1:
        listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"the shares of the data that are held out must be above 0 and in all below 1, not {listed}.")
    hashes = [hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys]
    groups: dict[int, list[int]] = {}
    for row in sorted(range(len(keys)), key=lambda row: (hashes[row], row)):
        groups.setdefault(labels[row], []).append(row)
    rows: dict[str, list[int]] = {name: [] for name in ("train", *shares)}
    for group in groups.values():
        least, rest = int(len(group) > len(shares)), group
        for name, share in shares.items():
            count = min(max(round(share * len(group)), least), len(rest) - 1)  # one remains for training
            rows[name], rest = rows[name] + rest[:count], rest[count:]
        rows["train"] += rest
    return {name: np.array(sorted(chosen), np.int64) for name, chosen in rows.items()}


def nonempty(records: Sequence[dict[str, Any]], folder: pathlib.Path, what: str, names: Sequence[str] = ()) -> Files:
    """The records of a folder as `Files`. Raises UserError if there are none of `what`."""
    if not records:
        raise UserError(f"there are no {what}.")
    return Files(records, folder, names)


# ------------------------------------------------------------------------------------------------------------------------ layouts


def _named_parts(folder: pathlib.Path, kind: str) -> dict[str, str]:
    """The user's own split: part -> its folder's name; {} where there is none."""
    if not files.is_folder(folder):
        if folder.suffix.lower() == ".tar" and os.path.lexists(folder):
            return {}
        raise UserError(f"there is no folder {folder} of images: set config.data.dir, or for mmdiff cache config.data.images.")
    present = files.folders(folder)
    named = {part: [name for name in names if name in present] for part, names in PARTS.items()}
    clear = present == named["train"] or named["val"] or named["test"] or kind == "caption"
    held_out = [name for name in named["val"] + named["test"] if files.folders(folder / name)]
    if not named["train"] and held_out and kind == "label":
        raise UserError(f"there is no folder {folder / 'train'}: with {folder / held_out[0]} belongs {folder}/train/CLASS.")
    if not named["train"] or not (clear or kind == "label" and files.folders(folder / "train")):
        return {}  # a class may be called train
    if len(named["val"]) > 1:
        raise UserError(f"{folder} has both {' and '.join(named['val'])}: keep one folder of validation data.")
    return {part: names[0] for part, names in named.items() if names}


def _read(folder: pathlib.Path, named: Mapping[str, str], split: str, kind: str) -> Records:
    """Everything in the folder of a split, or in the whole folder where the user has not split it."""
    own = folder / named[split] if split in named else folder
    if kind == "caption":
        return _captioned(own)
    shards = [own] if own.suffix.lower() == ".tar" and not files.is_folder(own) else files.matching(own, (".tar",), below=False)
    if kind == "label" and shards:
        if folders := files.folders(own) if files.is_folder(own) else []:
            raise UserError(f"{own} holds tar files and the folder {folders[0]}: choose one of both, and move the other elsewhere.")
        return captions.Shards(shards, None if files.is_folder(own) else own.with_suffix(".index.npz"), "label")
    if kind == "label":
        return _classes(folder, own, folder / named["train"] if named else folder)
    if shards:
        return _captioned(own)
    return nonempty([{"image": path} for path in files.images(own)], own, f"images ({', '.join(IMAGE_SUFFIXES)}) in {own}")


def _classes(top: pathlib.Path, folder: pathlib.Path, train: pathlib.Path) -> Files:
    for part in dict.fromkeys((train, folder)):
        if not files.is_folder(part):
            raise UserError(f"{part} is no folder: labelled images lie in folders of their classes, CLASS/NAME.png.")
        if loose := files.images(part, below=False):
            raise UserError(f"{loose[0]} is in no folder of a class: move it to {part}/CLASS, or remove it.")
    numbers = {name: i for i, name in enumerate(files.folders(train))}
    alike: dict[str, str] = {}
    for name in numbers:
        if (other := alike.setdefault(unicodedata.normalize("NFC", name), name)) is not name:
            written = " and ".join(map(ascii, (other, name)))
            raise UserError(f"{train} has two classes that read {name}, by other characters ({written}): make them one.")
    records = []
    for name in files.folders(folder):
        if name not in numbers:
            raise UserError(f"{folder} has a class {name!r}, but {train} has none of that name.")
        records += [{"image": path, "label": numbers[name]} for path in of_class(folder / name)]
    return nonempty(records, top, f"images ({', '.join(IMAGE_SUFFIXES)}) in folders of classes in {folder}", list(numbers))


def of_class(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images in the folder of a class, at least one."""
    if not (found := files.images(folder)):
        raise UserError(f"the class {folder.name!r} has no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}: add one or remove it.")
    return found


def _captioned(folder: pathlib.Path) -> Records:
    if not files.is_folder(folder):
        return captions.Shards([folder], folder.with_suffix(".index.npz"))
    shards = files.matching(folder, (".tar",), below=False)
    lists = [folder / name for name in LISTS if os.path.lexists(folder / name)]
    loose = files.images(folder, below=not shards and not lists)
    if len(lists) > 1 or shards and (loose or lists):
        first, other = [*(["tar files"] if shards else []), *(path.name for path in (*lists, *loose))][:2]
        raise UserError(f"{folder} holds {first} and {other}: choose one of both, and move the other elsewhere.")
    if shards:
        return captions.Shards(shards)
    if lists:
        records = [{"image": folder / name, "captions": found} for name, found in _listed(lists[0]).items()]
        return nonempty(records, folder, f"lines in {lists[0]}")
    records = [{"image": path, "captions": found} for path, found in zip(loose, captions.of_each(loose))]
    return nonempty(records, folder, f"tar files and no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}")


def _listed(path: pathlib.Path) -> dict[str, list[str]]:
    """The captions in a list of them, by the images' files."""
    if path.suffix == ".json":
        stored = files.read_json(path)
        if not isinstance(stored, Mapping):
            raise files.FileError(path, "is no object of captions by file", 'write {"NAME.png": "a caption", ...}')
        return {name: captions.captions_of(value, f"{name} in {path}") for name, value in stored.items()}
    lines = files.read_lines(path)
    if path.suffix == ".csv":
        rows = _comma_separated(path, lines)
        rows = rows[1:] if rows and os.path.splitext(rows[0][1][0])[1].lower() not in IMAGE_SUFFIXES else rows  # a header
        form = "comma: it is an image's file, a comma and its caption, in quotes if it holds commas"
    else:
        rows = [(number, line.split("\t", 1)) for number, line in enumerate(lines, 1)]
        form = "tab: it is an image's file, a tab and its caption"
    found: dict[str, list[str]] = {}
    for number, row in rows:
        if len(row) != 2:
            raise UserError(f"line {number} of {path} has {'no' if len(row) < 2 else 'more than one'} {form}.")
        found.setdefault(row[0], []).append(captions.caption(row[1], f"line {number} of {path}"))
    return found


def _comma_separated(path: pathlib.Path, lines: Sequence[str]) -> list[tuple[int, list[str]]]:
    """(the number of its last line, its fields) of every row. Raises FileError for quotes that do not end."""
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        reason = f"is not comma-separated ({error}, line {reader.line_num})"
        raise files.FileError(path, reason, 'end quotes that begin, and write "" for one in a caption') from error


def _key(image: Any, folder: pathlib.Path) -> str:
    """An image's name, wherever the folder lies."""
    if isinstance(image, captions.Member):
        return f"{image.path.name}/{image.start}"
    return os.path.relpath(image, folder)
