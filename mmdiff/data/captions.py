"""Captions of images, and images with captions or classes in tar files (WebDataset), as img2dataset and others write them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import posixpath
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff import files
from mmdiff.data import arrays
from mmdiff.data.sources import sizes
from mmdiff.errors import UserError
from mmdiff.files import IMAGE_SUFFIXES, FileError

log = logging.getLogger(__name__)
INDEX = "index.npz"
FORMATS = {"captions": 2, "label": 3}  # 2 knows several captions of an image, and refuses what is none
SIDECARS = {"captions": (".txt", ".json"), "label": (".cls",)}  # what lies beside an image
MOST = 10  # captions of an image that are used; the rest is left out
BELONGS = 'put a .txt of its name next to it, or a .json with "caption", a text or a list of texts'


def captions_of(value: Any, name: Any) -> list[str]:
    """The captions that a value of JSON is: a text, or several in a list.

    Raises:
      FileError: null, a number, an empty list or text, or anything else; `name` is what it calls the image.
    """
    captions = value if isinstance(value, list) and value else [value]
    kinds = {type(None): "null", bool: "true or false", float: "a number", int: "a number", list: "a list without texts"}
    for each in captions:
        if not isinstance(each, str):
            what = kinds.get(type(each), "an object")
            raise FileError(name, f"has {what} for a caption", "write a text, or a list of texts, or remove the image")
    return [caption(each, name) for each in captions]


def caption(text: str, name: Any) -> str:
    """An image's caption, without blanks around it. Raises FileError for one without words, or that is no text."""
    if not (captions := files.check_text(text, f"the caption of {name}").strip()):
        raise FileError(name, "has an empty caption", "write one, or remove the image")
    return captions


def read_captions(name: Any, sidecars: Mapping[str, Callable[[], bytes]]) -> list[str]:
    """An image's captions, by what reads the "txt" or else the "json" of its name. Raises FileError where there are none."""
    try:
        if "txt" in sidecars:
            return [caption(files.decode(sidecars["txt"](), f"the caption of {name}"), name)]
        return captions_of(files.parse_json(sidecars["json"](), f"the .json of {name}")["caption"], name)
    except FileError as error:
        if " is not valid JSON " not in str(error):
            raise
        raise FileError(name, f"has no caption ({error.reason})", BELONGS) from error
    except (KeyError, TypeError) as error:
        raise FileError(name, "has no caption", BELONGS) from error


def of_each(paths: Sequence[pathlib.Path]) -> list[list[str]]:
    """The captions of images in a folder, each next to a `.txt` or a `.json` of its name.

    Raises:
      FileError: two images of one name, which would share a caption; an image without one.
    """
    found, seen = [], {}
    for path in paths:
        other = seen.setdefault(path.with_suffix(""), path)
        if other is not path:
            raise FileError(path, f"has the name of {other.name}, and a caption belongs to one image", "rename or remove one")
        sidecars = {kind: path.with_suffix(f".{kind}") for kind in ("txt", "json")}
        readers = {kind: functools.partial(files.read_bytes, each) for kind, each in sidecars.items() if os.path.lexists(each)}
        found.append(read_captions(path, readers))
    return found


class Member(NamedTuple):
    """An image in a tar file: where its content starts, and how long it is."""

    path: pathlib.Path
    start: int
    size: int

    def read(self) -> bytes:
        """The content."""
        with files.open_regular(self.path) as file:
            file.seek(self.start)
            return file.read(self.size)

    def __str__(self):
        name = b""
        with contextlib.suppress(OSError, UserError):  # it stands in the block before the content
            name = Member(self.path, self.start - tarfile.BLOCKSIZE, 100).read().rstrip(b"\0")
        return f"{name.decode('utf-8', 'replace')} in {self.path}"


def _class_of(name: Any, sidecars: Mapping[str, Callable[[], bytes]]) -> int:
    """An image's class, by what reads the "cls" of its name. Raises FileError where there is none, or no number."""
    remedy = "put a .cls of its name next to it, which holds the number of its class, from 0"
    if "cls" not in sidecars:
        raise FileError(name, "has no class", remedy)
    text = files.decode(sidecars["cls"](), f"the class of {name}").strip()
    if not text.isdecimal() or len(text) > 6:
        raise FileError(name, f"has {text[:20]!r} for a class", remedy)
    return int(text)


class Shards:
    """`Records` of images with captions, or with classes (`what` is "label"), in tar files of one folder, in their order.

    The names of the classes are their numbers.

    What is where, and all captions, is kept beside them in index.npz (or in `index`): the first time every file is gone through, and again
    when one has changed. A folder that cannot be written is gone through every time.
    """

    def __init__(self, paths: Sequence[pathlib.Path], index: pathlib.Path | None = None, what: str = "captions"):
        self._paths, self._what, kept = paths, what, index or paths[0].parent / INDEX
        stats = [path.stat() for path in paths]
        stamps = {
            "format": np.array(FORMATS[what]),
            "shards": np.array([path.name for path in paths]),
            "stamps": np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64),
        }
        index = {}
        with contextlib.suppress(UserError):
            index = arrays.read_arrays(kept)
        if not all(np.array_equal(array, index.get(name)) for name, array in stamps.items()):
            index = stamps | _index(paths, what)
            with (
                contextlib.suppress(OSError),
                tempfile.TemporaryDirectory(dir=kept.parent, prefix=".index-", ignore_cleanup_errors=True) as own,
            ):
                np.savez(pathlib.Path(own) / INDEX, **index)
                os.replace(pathlib.Path(own) / INDEX, kept)
        self._members, self._counts, self._ends, self._captions = (index[name] for name in ("members", "counts", "ends", "captions"))
        self._last, self._labels = np.cumsum(self._counts), index.get("labels")
        self.names = () if self._labels is None else tuple(map(str, range(int(self._labels.max()) + 1)))
        self.captions = int(self._counts.max())

    def __len__(self):
        return len(self._members)

    def identity(self):
        beside = self._captions if self._labels is None else self._labels
        return [len(self), hashlib.sha256(beside).hexdigest(), sizes(self._paths, self._paths[0].parent)]

    def get(self, indices):
        found = []
        for i in indices:
            shard, start, size = self._members[i].tolist()
            image = {"image": Member(self._paths[shard], start, size)}
            if self._labels is not None:
                found.append(image | {"label": int(self._labels[i])})
                continue
            captions = [
                self._captions[self._ends[j - 1] if j else 0 : self._ends[j]].tobytes().decode()
                for j in range(self._last[i] - self._counts[i], self._last[i])
            ]
            found.append(image | {"captions": captions})
        return found


def _index(paths: Sequence[pathlib.Path], what: str) -> dict[str, np.ndarray]:
    """What is in tar files, in their order.

    "members" int64 [n, 3]: shard, start and size of every image; "counts" [n]: its captions; "captions" uint8: the texts of all one after
    the other; "ends": where each ends in it; "labels" int64 [n], of images with classes alone.
    """
    members, counts, texts, labels, kinds = [], [], [], [], SIDECARS[what]
    for shard, path in enumerate(paths):
        images, sidecars, end, left_out = {}, {}, 0, []
        try:
            with files.open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    own_path = posixpath.normpath(member.name)  # some begin with ./
                    folder, _, name = own_path.rpartition("/")
                    stem, _, kind = name.partition(".")
                    kind = kind.lower()
                    unseen = any(map(files.hidden, own_path.split("/")))
                    if posixpath.splitext(kind)[1] in (*IMAGE_SUFFIXES, *files.UNREAD_SUFFIXES) and not unseen:
                        left_out.append(member.name)  # a.mask.png, or cat v1.0.png
                    if f".{kind}" in files.UNREAD_SUFFIXES and not files.hidden(name):
                        raise files.not_read(f"{member.name} in {path}")
                    if member.isdir() or unseen or f".{kind}" not in (*IMAGE_SUFFIXES, *kinds):
                        continue
                    if not member.isreg() or member.issparse():
                        remedy = "write the tar file with --hard-dereference --dereference and without --sparse"
                        raise FileError(f"{member.name} in {path}", "is a link or a sparse file, not a file", remedy)
                    group, own = (images, (folder, stem)) if f".{kind}" in IMAGE_SUFFIXES else (sidecars, (folder, stem, kind))
                    if own in group:
                        what = f"is the second of its key there, after {group[own].name}"
                        raise FileError(f"{member.name} in {path}", what, "remove or rename one of them")
                    group[own] = member
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what ends a tar file
                    raise tarfile.ReadError(f"no end after {len(images)} images")
                for key, member in images.items():
                    own = {kind[1:]: sidecars[*key, kind[1:]] for kind in kinds if (*key, kind[1:]) in sidecars}
                    readers = {kind: functools.partial(_content, tar, each) for kind, each in own.items()}
                    members.append((shard, member.offset_data, member.size))
                    if what == "label":
                        labels.append(_class_of(f"{member.name} in {path}", readers))
                    captions = read_captions(f"{member.name} in {path}", readers)[:MOST] if what == "captions" else []
                    counts.append(len(captions))
                    texts += [each.encode() for each in captions]
            if left_out:
                log.warning(
                    "%s: %d images are left out, the first of them %s: a name ends at its first dot, and what follows is no ending of an "
                    "image; rename them if they are examples of their own.", path, len(left_out), left_out[0])
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read as a tar file ({error}): it is damaged or compressed, copy it again.") from error
    if not members:
        raise UserError(f"there are no images ({', '.join(IMAGE_SUFFIXES)}) in the tar files of {paths[0].parent}.")
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    captions = np.frombuffer(b"".join(texts), np.uint8)
    found = {"labels": np.array(labels, np.int64)} if labels else {}
    return found | {"members": np.array(members, np.int64), "counts": np.array(counts, np.int64), "ends": ends, "captions": captions}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return tar.extractfile(member).read()
