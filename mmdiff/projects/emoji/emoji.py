"""Emoji: 3,786 coloured pictures of 64 x 64 pixels with their names, of which 1,875 show one of 315 names in a skin tone or two.

The pictures are Noto's (Apache-2.0), as the npm package emoji-datasource-google 16.0.0 has them (MIT); `python -m
mmdiff.projects.emoji.emoji_package` makes the tar file of it that is read here, KEY.png and KEY.json one after the other. A json holds
name, category (one of ten), and tones, in words. Here a picture has 32 x 32 pixels over white, and a caption says its tones and its name:

    "medium-dark skin, man getting massage"          "light and dark skin, handshake"          "paw prints"

**Held out** for validation and test is a tenth each of the pairs of a name and its tones: of the b-th name with tones, in the order of the
alphabet, the j-th variant is for the test where b + j is a multiple of ten, and for validation where it is one of five only. Every name and
every tone thus occurs in training. A twentieth each of the names without tones is held out as well, evenly of the categories: their words
mostly occur nowhere else, so what can be asked of them is the category.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import bpe, media
from mmdiff.data.image_folders import split_rows
from mmdiff.data.sources import Source
from mmdiff.data.stored_images import ByteImages, square
from mmdiff.data.token_cache import token_source
from mmdiff.errors import UserError
from mmdiff.files import FileError

SIZE = 32
SHAPE = (SIZE, SIZE, 3)
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CATEGORIES = (
    "Activities", "Animals & Nature", "Component", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion", "Symbols",
    "Travel & Places")
SPLITS = ("train", "validation", "test")
NAMES_HELD_OUT = 1 / 20  # for each of validation and test
LENGTH, VOCABULARY = 16, 1024  # ids of a caption, start and end included; ids at most
MADE_BY = "python -m mmdiff.projects.emoji.emoji_package PACKAGE.tgz emoji64.tar makes it"


class Emoji(ByteImages):
    """A `Source` of pictures with captions: image float32 [n, 32, 32, 3] in [-1, 1], text int32 [n, 16].

    Attributes:
      names: of the pictures, without tones. tones: of each, by number in `TONES`: none, one or two. categories: int32 [n] in `CATEGORIES`.
    """

    def __init__(self, records: Sequence[dict[str, Any]], tokenizer: bpe.Tokenizer):
        self.names, self.tones = [each["name"] for each in records], [each["tones"] for each in records]
        self.categories = np.array([each["category"] for each in records], np.int32)
        text = tokenizer.encode([caption(each["name"], each["tones"]) for each in records])
        super().__init__({"image": np.stack([each["image"] for each in records]), "text": text})


def emoji_source(split: str, file: str) -> Emoji:
    """The pictures of a split: of `validation` and `test` those with tones are held-out pairs, those without held-out names.

    Args:
      split: train, validation or test.
      file: the tar file.

    Raises:
      UserError: another split; no such file, one that is damaged, or one of other pictures.
    """
    if split not in SPLITS:
        raise UserError(f"the emoji have no split {split!r}: choose one of {', '.join(SPLITS)}.")
    return _sources(_path(file))[split]


def emoji_tokens(split: str, folder: str | os.PathLike, file: str, modalities: Mapping[str, Any]) -> Source:
    """The tokens and captions of a cache of these pictures, as `token_source`. UserError, too, for a cache of other pictures."""
    found = token_source(folder, split, modalities)
    check_tokens(found, emoji_source(split, file), file)
    return found


def check_tokens(tokens: Source, pictures: Source, file: str) -> None:
    """Raises UserError unless tokens are of these pictures: as many, with the same captions in the ids of the same tokenizer."""
    rows = np.arange(len(pictures))
    if len(tokens) != len(pictures) or not np.array_equal(tokens.take(rows)["text"], pictures.take(rows)["text"]):
        raise UserError(f"the tokens are of other pictures than those in {file}: write their cache again (mmdiff cache).")


def emoji_tokenizer(file: str) -> bpe.Tokenizer:
    """The tokenizer of the captions, byte pairs of those of the training pictures alone."""
    return _tokenizer(_path(file))


def caption(name: str, tones: Sequence[int]) -> str:
    """A picture's caption; the tones come first, since what is too long for a caption is cut at its end.

    >>> caption("handshake", (0, 4)), caption("paw prints", ())
    ('light and dark skin, handshake', 'paw prints')
    """
    return f"{' and '.join(TONES[tone] for tone in tones)} skin, {name}" if tones else name


def parsed(text: str) -> tuple[tuple[int, ...] | None, str]:
    """(tones, name) of a caption; tones are None where the words before " skin, " are none.

    >>> parsed("light and dark skin, handshake"), parsed("paw prints"), parsed("paw skin, prints")
    (((0, 4), 'handshake'), ((), 'paw prints'), (None, 'prints'))
    """
    words, skin, name = text.partition(" skin, ")
    if not skin:
        return (), text
    tones = words.split(" and ")
    return (tuple(map(TONES.index, tones)) if set(tones) <= set(TONES) else None), name


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of some rows, evenly spread over them.

    >>> evenly(np.array([3, 4, 5, 6]), 2)
    array([3, 5])
    """
    count = min(len(rows), most)
    return rows[np.arange(count) * len(rows) // max(count, 1)]


def _path(file: str) -> pathlib.Path:
    if not file:
        raise UserError(f"config.data.dir is empty: name the tar file of the emoji ({MADE_BY}).")
    return files.expand(file)


@functools.lru_cache(maxsize=4)
def _sources(path: pathlib.Path) -> dict[str, Emoji]:
    records, tokenizer = _splits(path), _tokenizer(path)
    return {split: Emoji(chosen, tokenizer) for split, chosen in records.items()}


@functools.lru_cache(maxsize=4)
def _tokenizer(path: pathlib.Path) -> bpe.Tokenizer:
    return bpe.train([caption(each["name"], each["tones"]) for each in _splits(path)["train"]], LENGTH, VOCABULARY)


@functools.lru_cache(maxsize=4)
def _splits(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each split."""
    records = _read(path)
    part = dict.fromkeys(range(len(records)), "train")
    bases = sorted({each["name"] for each in records if each["tones"]})
    places = {base: place for place, base in enumerate(bases)}
    variants = {tones: j for j, tones in enumerate([*itertools.combinations(range(5), 1), *itertools.product(range(5), repeat=2)])}
    for row, each in enumerate(records):
        if each["tones"]:
            part[row] = {0: "test", 5: "validation"}.get((places[each["name"]] + variants[each["tones"]]) % 10, "train")
    plain = {each["name"]: each["category"] for each in records if each["name"] not in places}
    chosen = split_rows(list(plain), list(plain.values()), dict.fromkeys(SPLITS[1:], NAMES_HELD_OUT))
    held = {name: split for split in SPLITS[1:] for name in np.array(list(plain), object)[chosen[split]]}
    for row, each in enumerate(records):
        part[row] = held.get(each["name"], part[row])
    found = {split: [each for row, each in enumerate(records) if part[row] == split] for split in SPLITS}
    if few := [split for split, rows in found.items() if {0, 1} - {len(each["tones"]) for each in rows}]:  # without a tone, of one
        raise UserError(f"{path} has {len(records)} pictures, too few for {few[0]} data: it is not the file of emoji ({MADE_BY}).")
    return found


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The pictures in a tar file, in the order of their keys: name, tones, category, and image uint8 [32, 32, 3]."""
    images, texts = {}, {}
    try:
        with files.open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, kind = posixpath.normpath(member.name).rpartition(".")
                if kind not in ("png", "json") or any(map(files.hidden, key.split("/"))):
                    continue
                found = {"png": images, "json": texts}[kind]
                if key in found or not member.isreg():
                    what = "is there twice" if key in found else "is no regular file"
                    raise FileError(f"{member.name} in {path}", what, f"make the file again ({MADE_BY})")
                found[key] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a tar file ({error}): {MADE_BY}.") from error
    if not images or set(images) != set(texts):
        lone = sorted(set(images) ^ set(texts))[:1]
        what = f"{lone[0]} lacks its .png or .json" if lone else "it holds none"
        raise UserError(f"{path} is no tar file of pictures with their names ({what}): {MADE_BY}.")
    return [_record(images[key], texts[key], f"{key} in {path}") for key in sorted(images)]


def _record(image: bytes, text: bytes, name: str) -> dict[str, Any]:
    found = files.parse_json(text, f"the .json of {name}")
    try:
        tones = tuple(TONES.index(each.removesuffix(" skin tone")) for each in found["tones"])
        record = {"name": found["name"], "tones": tones, "category": CATEGORIES.index(found["category"])}
        if not isinstance(found["name"], str) or not found["name"] or len(tones) > 2:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = "has a .json without a name, one of ten categories and at most two of five skin tones"
        raise FileError(name, reason, f"make the file again ({MADE_BY})") from error
    return record | {"image": np.asarray(square(media.read_image(image, name), SIZE))}
