"""A user's own data, whatever its form, as modalities and sources: `open_images` and `open_arrays`.

Images come from folders and tar files, which `data.image_folders` describes, with their classes' names or with captions; arrays from

    NAME.npz                   an entry for each modality, all of one length
    NAME.npy                   one modality, "x"
    FOLDER/train.npz           with val.npz and test.npz: the user's own split
    FOLDER/A.npy, B.npy, ...   a modality each

An array's type says what it is: uint8 [n, H, W] or [n, H, W, 1 or 3], and floats [n, H, W, 1 or 3] in [-1, 1], are images; floats [n] and
[n, d] vectors, which are standardised for the network (samples are in the units of the file); floats [n, k, d] several vectors each;
integers, booleans and texts [n] are labels; integers [n, L] sequences of tokens. Rows are split as images are.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff import console, files
from mmdiff.data import bpe, image_folders
from mmdiff.data.arrays import read_array, read_arrays
from mmdiff.data.modalities import Features, Images, Labels
from mmdiff.data.sources import ArraySource, Source, check_range, digest
from mmdiff.data.stored_images import Records, UndamagedReader, decode, square, values
from mmdiff.data.token_modalities import Sequences, Texts
from mmdiff.errors import UserError

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # of an experiment -> of a folder
MEMORY = 2**31  # bytes of images that are kept once they are decoded
RESERVED = ("index", "x0", "file", "allow_pickle", "self", "process", "parts")  # of batches, of numpy.savez and of what a config calls
IDS = 2**20  # of tokens; the network has a row of weights for each


@dataclasses.dataclass(frozen=True)
class OwnData:
    """What `open_images` and `open_arrays` found.

    Attributes:
      modalities: by name, as an `Experiment` takes them.
      source: split -> `Source`, of "train", "validation" and "test".
      summary: what was found, in one line.
      frozen_deps: the tokenizer of the captions, or the arrays' units, which the weights need: name -> `() -> fingerprint`.
    """

    modalities: Mapping[str, Any]
    source: Callable[[str], Source]
    summary: str
    frozen_deps: Mapping[str, Callable[[], str]] = dataclasses.field(default_factory=dict)

    @property
    def for_experiment(self) -> dict[str, Any]:
        """What it states of an `Experiment`, `Experiment(**own.for_experiment, ...)`."""
        return {"modalities": self.modalities, "data": self.source, "frozen_deps": self.frozen_deps}

    @property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """The shape of one example of every modality."""
        return {name: modality.shape for name, modality in self.modalities.items()}


def open_images(data: Any, kind: str = "image") -> OwnData:
    """A user's images: "image" and, by `kind`, "label" or "caption".

    Args:
      data: the section of a config: dir, size (of the side, in pixels), channels (1 is grey, 3 colour), damaged (the share of images that
        may be, see `stored_images.UndamagedReader`), validation and test (the shares that are split off); of captions length (the most ids
        of one) and vocabulary (the most ids).
      kind: of images, as `image_folders.read` has it: "label", "caption", or "image" for images alone.

    Raises:
      UserError: no data, another layout than is wanted, too few examples, another setting.
    """
    folder = _expanded(data)
    if folder.suffix.lower() in files.ARRAY_SUFFIXES:
        return _images_of_arrays(open_arrays(data), kind)
    if data.channels not in (1, 3):
        raise UserError(f"config.data.channels is 1 (grey) or 3 (colour), not {data.channels}.")
    parts = image_folders.read(folder, kind, {"val": data.validation, "test": data.test})
    records = {split: parts[part] for split, part in SPLITS.items()}
    train = records["train"]
    modalities, tokenizer = {"image": CroppedImages(data.size, data.size, data.channels)}, None
    found = f"{sum(map(len, records.values())):,} images"
    if kind == "label":
        modalities["label"] = Labels(len(train.names))
        found += f" in {len(train.names):,} classes ({_listed(train.names)})"
    if kind == "caption":
        tokenizer = _trained_tokenizer(train, data)
        modalities["caption"] = Texts(tokenizer, name="caption")
        found += f" with captions of {tokenizer.size:,} ids, up to {tokenizer.length} each"
    sources = {split: OwnImages(part, modalities["image"], tokenizer, data.damaged) for split, part in records.items()}
    frozen = {"captions' tokenizer": lambda: digest(tokenizer.size, dataclasses.asdict(tokenizer))} if tokenizer else {}
    kind = f"{data.size}x{data.size} pixels, {'grey' if data.channels == 1 else 'colour'}"
    return _announced(OwnData(modalities, sources.__getitem__, f"{folder}: {found}; {_counts(records)}; {kind}", frozen))


@dataclasses.dataclass(frozen=True)
class CroppedImages(Images):
    """Square images of which files of any size have the central part, resized, as the training data do."""

    def pixels(self, file: Any) -> np.ndarray:
        """A file, a path or a member of a tar file, as uint8 [height, width, channels]. Raises FileError for a damaged one."""
        image = square(decode(file), self.height)
        return np.asarray(image.convert("L") if self.channels == 1 else image).reshape(self.shape)

    def _picture(self, path: pathlib.Path) -> np.ndarray:
        return self.pixels(path)


class OwnImages:
    """A `Source` of a user's images: image float32 [n, size, size, channels] in [-1, 1], and label int32 [n] or caption int32 [n, length].

    With captions an example is an image with one of its captions: i is the image i // k with its caption i % k, k being the most that one
    has. Images are decoded once, as long as all of them together fit in `MEMORY`.
    """

    def __init__(self, records: Records, image: CroppedImages, tokenizer: bpe.Tokenizer | None = None, damaged: float = 0.0):
        self._records, self._image, self._tokenizer, self.names = records, image, tokenizer, tuple(records.names)
        self._reader, self._captions = UndamagedReader(records, damaged), max(records.captions, 1) if tokenizer else 1
        self._kept = None
        if len(records) * np.prod(image.shape) <= MEMORY:
            self._kept, self._known = np.zeros((len(records), *image.shape), np.uint8), {}

    def __len__(self):
        return len(self._records) * self._captions

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        rows, which = np.divmod(indices, self._captions)
        if self._kept is None:
            records, pixels = self._reader.read(rows.tolist(), self._decode)
            pixels = np.stack(pixels) if pixels else np.zeros((0, *self._image.shape), np.uint8)
        else:
            new = [row for row in dict.fromkeys(rows.tolist()) if row not in self._known]
            for row, record, image in zip(new, *self._reader.read(new, self._decode)):
                self._kept[row], self._known[row] = image, record
            records, pixels = [self._known[row] for row in rows.tolist()], self._kept[rows]
        found = {"image": values(pixels)}
        if self.names:
            found["label"] = np.array([record["label"] for record in records], np.int32)
        if self._tokenizer:
            texts = [record["captions"][i % len(record["captions"])] for record, i in zip(records, which.tolist())]
            found["caption"] = self._tokenizer.encode(texts)
        return found

    def fingerprint(self):
        return digest(len(self), "own", list(self.names), self._records.identity())

    def _decode(self, record):
        return self._image.pixels(record["image"])


def _trained_tokenizer(records: Records, data: Any) -> bpe.Tokenizer:
    """That of the captions of the training images: as long as the longest needs, and at most data.length."""
    parts = (records.get(range(start, min(start + 1000, len(records)))) for start in range(0, len(records), 1000))
    texts = [text for part in parts for record in part for text in record["captions"][: records.captions]]
    if data.length < 3 or data.vocabulary < 259:
        raise UserError("config.data.length must be 3 or more (start and end included), and config.data.vocabulary 259 or more.")
    tokenizer = bpe.train(texts, data.length, data.vocabulary)
    longest = int((tokenizer.encode(texts) != tokenizer.padding).sum(1).max())
    return dataclasses.replace(tokenizer, length=longest)


# ------------------------------------------------------------------------------------------------------------------------- arrays


@dataclasses.dataclass(frozen=True)
class Standardized(Features):
    """Vectors in a user's units, of which the network has `(vector - mean) / deviation`.

    Attributes:
      mean, deviation: float32 [size].
    """

    mean: np.ndarray | float = 0.0
    deviation: np.ndarray | float = 1.0

    def parse(self, text: str) -> np.ndarray:
        """The vectors in a `.npy` or `.npz` file, in the user's units, as the network has them: float32 [n, *shape]."""
        return self.standardize(super().parse(text))

    def standardize(self, array) -> np.ndarray:
        """The user's units -> the network's."""
        return ((np.asarray(array, np.float64) - self.mean) / self.deviation).astype(np.float32)

    def export(self, array) -> np.ndarray:
        """The network's units -> the user's, for files."""
        return (np.asarray(array, np.float64) * self.deviation + self.mean).astype(np.float32)


def open_arrays(data: Any) -> OwnData:
    """A user's arrays, an entry a modality; see the head of the module.

    Args:
      data: the section of a config: dir, validation and test (the shares that are split off).

    Raises:
      UserError: no data, arrays of different lengths or of a type that is none of those, too few rows.
    """
    path = _expanded(data)
    parts = _stored(path)
    modalities, arrays = {}, {part: {} for part in parts}
    for name in parts["train"]:
        columns = {part: np.asarray(found[name]) for part, found in parts.items()}
        modalities[name], columns = _modality(f"{name} in {path}", name, columns)
        for part, column in columns.items():
            arrays[part][name] = column
    missing = {part: share for part, share in (("val", data.validation), ("test", data.test)) if part not in arrays}
    if missing:
        whole = arrays["train"]
        count = len(next(iter(whole.values())))
        labels = next((whole[name].tolist() for name, modality in modalities.items() if isinstance(modality, Labels)), [0] * count)
        rows = image_folders.split_rows([str(row) for row in range(count)], labels, missing)
        if empty := [part for part, chosen in rows.items() if not len(chosen)]:
            raise UserError(f"{path} has {count:,} rows, too few to split off {empty[0]} data: add some, or give train, val and test.npz.")
        arrays |= {part: {name: array[chosen] for name, array in whole.items()} for part, chosen in rows.items()}
    for name, modality in modalities.items():
        if isinstance(modality, Standardized):
            train = arrays["train"][name].astype(np.float64)
            # What never changes keeps its value: the network learns 0 of it.
            deviation = np.where(train.max(0) > train.min(0), train.std(0), 1.0)
            modality = dataclasses.replace(modality, mean=train.mean(0), deviation=deviation)
            modalities[name] = modality
            for part in arrays.values():
                part[name] = modality.standardize(part[name])
    sources = {split: ArraySource(arrays[part]) for split, part in SPLITS.items()}
    found = ", ".join(f"{name} ({_kind(modality)})" for name, modality in modalities.items())
    return _announced(OwnData(modalities, sources.__getitem__, f"{path}: {found}; {_counts(sources)}", _units(modalities)))


def _stored(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays by part and name: "train" alone, or the user's own split."""
    if not files.is_folder(path):
        parts = {"train": read_arrays(path) if path.suffix.lower() == ".npz" else {"x": read_array(path)}}
    elif (path / "train.npz").exists():
        parts = {part: read_arrays(path / f"{part}.npz") for part in image_folders.PARTS if (path / f"{part}.npz").exists()}
    else:
        parts = {"train": {file.stem: read_array(file) for file in files.matching(path, (".npy",), below=False)}}
    if not parts["train"]:
        raise UserError(f"{path} holds no arrays: name a .npy or .npz file, or a folder of .npy files.")
    for name in parts["train"]:
        if name in RESERVED or not name or "/" in name:
            raise UserError(f"{path} has an array called {name!r}, which no modality can be called: rename it.")
    for part, arrays in parts.items():
        if set(arrays) != set(parts["train"]):
            raise UserError(f"{path} has the arrays {_listed([*parts['train']])} for training and {_listed([*arrays])} in {part}.")
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
            raise UserError(f"the arrays in {path} need one length, a row an example, and have {listed}: save one set in a file.")
    return parts


def _modality(where: str, name: str, parts: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """The modality that follows from an array's type, and its arrays as the network takes them."""
    train = parts["train"]
    kind, size = train.dtype.kind, train.shape[1:]
    if any(part.dtype.kind != kind or kind not in "iubUSf" or part.shape[1:] != size for part in parts.values()):
        found = f"{train.dtype} {list(train.shape)}"
        raise UserError(f"{where}: arrays hold numbers or texts, of one type and shape in all parts, not {found}.")
    if 0 in size:
        raise UserError(f"{where}: the rows hold nothing, {train.dtype} {list(train.shape)}.")
    pixels = train.dtype == np.uint8 and len(size) in (2, 3) or kind == "f" and len(size) == 3
    if pixels and len(size) == 3 and size[2] not in (1, 3):
        raise UserError(f"{where}: images have 1 or 3 channels, [n, height, width, channels], not {list(train.shape)}.")
    if pixels:
        modality = Images(*size[:2], size[2] if len(size) == 3 else 1, name=name)
        shaped = {part: array.reshape(len(array), *modality.shape) for part, array in parts.items()}
        return modality, {part: modality.check(values(array) if kind == "u" else array) for part, array in shaped.items()}
    if kind == "f" and len(size) < 3:
        shaped = {part: array.reshape(len(array), -1) if len(size) < 2 else array for part, array in parts.items()}
        rows = shaped["train"].shape[1:]
        modality = Standardized(rows[-1], name, rows[0] if len(rows) == 2 else None)
        return modality, {part: modality.check(array) for part, array in shaped.items()}
    if not size:
        names, every = np.unique(np.concatenate(list(parts.values()))), {}
        for part, array in parts.items():
            every[part] = np.searchsorted(names, array).astype(np.int32)
        numbered = kind in "iu" and np.array_equal(names, np.arange(len(names)))
        return Labels(len(names), None if numbered else tuple(map(str, names)), name), every
    if kind in "iu" and len(size) == 1:
        states = max(int(array.max()) for array in parts.values()) + 1
        if states > IDS:
            raise UserError(f"{where}: ids of tokens are below {IDS:,}, and one is {states - 1:,}: number them 0, 1, 2, ...")
        modality = Sequences(size[0], states, name)
        return modality, {part: modality.check(array) for part, array in parts.items()}
    found = f"{train.dtype} {list(train.shape)}"
    raise UserError(f"{where}: {found} are no images, vectors, labels or tokens (see mmdiff/data/own.py).")


def _images_of_arrays(found: OwnData, kind: str) -> OwnData:
    """The images and labels among arrays, under these names."""
    wanted = {"image": Images} | ({"label": Labels} if kind == "label" else {})
    if kind == "caption":
        raise UserError("captions come from a folder or tar files, not from arrays: see mmdiff/data/image_folders.py.")
    named = {}
    for name, modality_class in wanted.items():
        own = [key for key, modality in found.modalities.items() if isinstance(modality, modality_class)]
        if len(own) != 1 and name not in own:
            listed = _listed(sorted(found.modalities))
            raise UserError(f"config.data.dir has the arrays {listed}, and one of {name}s is needed: call it {name}, or use own/arrays.")
        named[name] = name if name in own else own[0]

    def source(split):
        arrays = found.source(split).arrays
        return ArraySource({name: arrays[key] for name, key in named.items()})

    modalities = {name: dataclasses.replace(found.modalities[key], name=name) for name, key in named.items()}
    return dataclasses.replace(found, modalities=modalities, source=source, frozen_deps=_units(modalities))


def _units(modalities: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """The units and class names of the arrays, which the weights do not hold: a run is refused with others."""
    found = [
        [name, list(getattr(each, "names", None) or ()), [f"{value:.6g}" for part in _scale(each) for value in np.ravel(part).tolist()]]
        for name, each in sorted(modalities.items())]
    return {"the arrays' units and classes": lambda: digest(len(found), found)}


def _scale(modality: Any) -> tuple[Any, ...]:
    return (modality.mean, modality.deviation) if isinstance(modality, Standardized) else ()


# -------------------------------------------------------------------------------------------------------------------------- parts


def _expanded(data: Any) -> pathlib.Path:
    if not data.dir:
        raise UserError("config.data.dir is empty: name your data, --config.data.dir=PATH; the config's head says what it may hold.")
    return files.expand(data.dir)


def _kind(modality: Any) -> str:
    """What an array was taken for, as the user would say it."""
    if isinstance(modality, Images):
        height, width, channels = modality.shape
        return f"images {height}x{width}x{channels}"
    if isinstance(modality, Standardized):
        return f"{modality.count} vectors of {modality.size}" if modality.count else f"vectors of {modality.size}"
    if isinstance(modality, Labels):
        return f"labels of {modality.count} classes"
    return f"{modality.length} tokens of {modality.states} states"


def _counts(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"{len(part):,} {split}" for split, part in parts.items())


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _announced(found: OwnData) -> OwnData:
    console.say(f"mmdiff: {found.summary}")
    return found
