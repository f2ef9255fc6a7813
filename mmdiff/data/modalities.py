"""How a person writes a modality on the command line, and how they see it.

A modality's `parse` turns text into examples, `check` refuses what would otherwise go wrong silently (JAX clamps an index that
is out of range), `show` makes images or words of arrays (None of vectors, which are neither), and `random` makes examples up, for
where only their shape and type matter. All four work on a leading axis of n examples.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import media
from mmdiff.data.arrays import read_array
from mmdiff.errors import UserError
from mmdiff.files import IMAGE_SUFFIXES

# Samplers end a little outside the data's range: such values are clipped, whereas others are a different convention.
OVERSHOOT = 0.25


@dataclasses.dataclass(frozen=True)
class Images:
    """Images: float32 [n, height, width, channels] in [-1, 1].

    >>> images = Images(8, 8, levels=17)
    >>> images.shape, images.quantize([[-1.2, 0.06, 0.1]])
    ((8, 8, 1), array([[-1.   ,  0.   ,  0.125]], dtype=float32))

    Attributes:
      height, width, channels: the size; 1 channel is grey, 3 are red, green, blue.
      levels: the number of equally spaced values a pixel takes in the data (17 for the digits), or None if they are continuous.
      name: the modality's name, which is its key in an `.npz` file.
    """

    height: int
    width: int
    channels: int = 1
    levels: int | None = None
    name: str = "image"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one example."""
        return self.height, self.width, self.channels

    def parse(self, text: str) -> np.ndarray:
        """The images in a file or folder: float32 [n, height, width, channels].

        Reads PNG, JPEG and the like as `media.read_image` does (grey and colour are converted into each other; 0..255 becomes -1..1),
        `.npy` and `.npz` (the entry named like the modality, or else the only one; one image or several; floats in [-1, 1] or uint8 in
        0..255), and all images in a folder in the order of their names. With `levels`, pixels go to the nearest one.

        Raises:
          UserError: a file that is missing, is no image, or has the wrong size or range.
        """
        path = files.expand(text)
        if files.is_folder(path):
            found = files.images(path)
            if not found:
                raise UserError(f"the folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
            return np.concatenate([self.parse(str(file)) for file in found])
        array = read_array(path, self.name) if path.suffix.lower() in files.ARRAY_SUFFIXES else self._picture(path)
        return self.quantize(self._sized(array, path))

    def check(self, array) -> np.ndarray:
        """`array` as float32 [n, height, width, channels].

        Raises:
          UserError: a wrong shape or type, values that are not finite or outside [-1, 1].
        """
        array = np.asarray(array)
        if array.dtype == np.uint8:  # a dark one would pass for floats
            raise UserError(f"{self.name}: pixels must be floats in [-1, 1], got uint8: divide them by 127.5 and subtract 1.")
        array = array.astype(np.float32)
        if array.ndim != 4 or array.shape[1:] != self.shape:
            raise UserError(f"{self.name}: images need the shape [n, {self._size}], got {list(array.shape)}.")
        if not array.size or not np.isfinite(array).all() or np.abs(array).max() > 1:
            raise UserError(f"{self.name}: pixels must be numbers in [-1, 1], got {span(array)}.")
        return array

    def quantize(self, array) -> np.ndarray:
        """Pixels clipped to [-1, 1] and, with `levels` = L, moved to the nearest of -1 + 2 i / (L - 1), i = 0..L-1."""
        array = np.clip(np.asarray(array, np.float32), -1, 1)
        if self.levels is None:
            return array
        steps = np.float32((self.levels - 1) / 2)
        return np.rint((array + 1) * steps) / steps - 1

    def show(self, array) -> np.ndarray:
        """Pixels for the eye: uint8 [n, height, width, channels], from 0 for -1 to 255 for 1; not-a-number becomes 0."""
        return media.to_uint8(self.quantize(array))

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Noise images: float32 [count, height, width, channels], uniform in [-1, 1] (on the levels, where there are some)."""
        return self.quantize(rng.uniform(-1, 1, (count, *self.shape)))

    @property
    def _size(self) -> str:
        return f"{self.height}, {self.width}, {self.channels}"

    def _picture(self, path: pathlib.Path) -> np.ndarray:
        return np.asarray(media.read_image(path).convert("L" if self.channels == 1 else "RGB"))

    def _sized(self, array: np.ndarray, path: pathlib.Path) -> np.ndarray:
        """Any of [H, W], [n, H, W], [H, W, C], [n, H, W, C] as float32 [n, H, W, C] in [-1, 1]."""
        shape = self.shape
        shapes = [shape, shape[:2]] if self.channels == 1 else [shape]
        if not any(array.shape[-len(s):] == s and array.ndim - len(s) in (0, 1) for s in shapes) or not array.size:
            found = f"{array.shape[0]} x {array.shape[1]} pixels" if path.suffix.lower() in IMAGE_SUFFIXES else f"{list(array.shape)}"
            raise UserError(
                f"{path} has the size {found}, but the model needs {self.height} x {self.width} pixels "
                f"(height x width) with {self.channels} channel(s)."
            )
        if array.dtype == np.uint8:
            return array.reshape(-1, *shape).astype(np.float32) / 127.5 - 1
        if array.dtype.kind not in "fiu" or not (np.abs(array.astype(np.float64)) <= 1 + OVERSHOOT).all():
            raise UserError(f"{path} holds {span(array)}: pixels must be floats in [-1, 1], or uint8 in 0..255.")
        return array.reshape(-1, *shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Latents:
    """An autoencoder's latents: float32 [n, height, width, channels] of about unit deviation.

    Attributes:
      height, width, channels: the size; 32, 32, 4 for 256-pixel images of the Stable Diffusion autoencoder.
      scale: examples are the autoencoder's latents times this (0.18215 for that autoencoder); a decoder divides by it.
      name: the modality's name, which is its key in an `.npz` file.
    """

    height: int
    width: int
    channels: int
    scale: float = 0.18215
    name: str = "image"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one example."""
        return self.height, self.width, self.channels

    def parse(self, text: str) -> np.ndarray:
        """The latents in a `.npy` or `.npz` file, one example or several, already scaled: float32 [n, height, width, channels].

        Raises:
          UserError: a file that is missing or no NumPy file, or what `check` refuses.
        """
        path = files.expand(text)
        if path.suffix.lower() not in files.ARRAY_SUFFIXES:
            raise UserError(f"{self.name}: latents come in .npy or .npz files, not {path}: encode the images first.")
        array = read_array(path, self.name)
        return self.check(array[None] if array.ndim == 3 else array)

    def check(self, array) -> np.ndarray:
        """`array` as float32 [n, height, width, channels].

        Raises:
          UserError: a wrong shape or type, or values that are not finite.
        """
        array = np.asarray(array)
        if array.ndim != 4 or array.shape[1:] != self.shape:
            size = ", ".join(map(str, self.shape))
            raise UserError(f"{self.name}: latents need the shape [n, {size}], got {list(array.shape)}.")
        if not finite_floats(array):
            raise UserError(f"{self.name}: latents must be finite floats, got {span(array)}.")
        return array.astype(np.float32)

    def show(self, array) -> np.ndarray:
        """The first three channels (or the first) as colours, -3..3 becoming 0..255: uint8 [n, height, width, 3 or 1].

        Not a decoded image, but what it shows can be made out.
        """
        array = np.nan_to_num(np.asarray(array, np.float32))[..., : 3 if self.channels >= 3 else 1]
        return np.rint((np.clip(array, -3, 3) + 3) * 42.5).astype(np.uint8)

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Standard normal: float32 [count, height, width, channels]."""
        return rng.standard_normal((count, *self.shape), np.float32)


@dataclasses.dataclass(frozen=True)
class Features:
    """Vectors that a fixed network makes of something: float32 [n, size], or [n, count, size].

    Attributes:
      size: the numbers in a vector.
      name: the modality's name, which is its key in an `.npz` file.
      count: vectors in an example, one for each token of a text; one without a dimension of its own by default. A vector of zeros is
        padding.
      norm: the length of every vector; by default any, and made-up ones have the root mean square 1.
    """

    size: int
    name: str = "representation"
    count: int | None = None
    norm: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return (self.size,) if self.count is None else (self.count, self.size)

    def parse(self, text: str) -> np.ndarray:
        """The vectors in a `.npy` or `.npz` file, of one example or several: float32 [n, *shape].

        Raises:
          UserError: a file that is missing or no NumPy file, or what `check` refuses.
        """
        path = files.expand(text)
        if path.suffix.lower() not in files.ARRAY_SUFFIXES:
            raise UserError(f"{self.name}: vectors come in .npy or .npz files, not {path}.")
        array = read_array(path, self.name)
        return self.check(array[None] if array.ndim == len(self.shape) else array)

    def check(self, array) -> np.ndarray:
        """`array` as float32 [n, *shape].

        Raises:
          UserError: a wrong shape or type, values that are not finite, or vectors of another length.
        """
        array = np.asarray(array)
        if array.ndim != len(self.shape) + 1 or array.shape[1:] != self.shape:
            raise UserError(f"{self.name}: vectors need the shape [n, {', '.join(map(str, self.shape))}], got {list(array.shape)}.")
        if not finite_floats(array):
            raise UserError(f"{self.name}: vectors must be finite floats, got {span(array)}.")
        lengths = np.linalg.norm(array.astype(np.float32), axis=-1)
        if self.norm is not None and np.abs(lengths - self.norm).max() > 0.01 * self.norm:
            raise UserError(
                f"{self.name}: vectors must have the length {self.norm:g}, got {lengths.min():.4g} to {lengths.max():.4g}: "
                "divide each vector by its length.")
        return array.astype(np.float32)

    def show(self, array) -> Any:
        """None: numbers of a vector are no pixels, and no words."""
        return None

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Directions with equal chances: float32 [count, *shape]."""
        array = rng.standard_normal((count, *self.shape), np.float32)
        length = self.norm or self.size**0.5
        return array * (length / np.linalg.norm(array, axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Labels:
    """Classes: int32 [n] in 0..count-1, optionally with names.

    >>> animals = Labels(3, ("cat", "dog", "cow"))
    >>> animals.parse("dog,cat"), animals.show([2, 0])
    (array([1, 0], dtype=int32), ['cow', 'cat'])

    Attributes:
      count: the number of classes.
      names: what to call them, or None for their numbers.
      synonyms: other words for them that `parse` takes as well.
      name: the modality's name, which is its key in an `.npz` file.
    """

    count: int
    names: Sequence[str] | None = None
    name: str = "label"
    synonyms: Sequence[str] | None = None

    @property
    def shape(self) -> tuple[()]:
        """The shape of one example."""
        return ()

    def parse(self, text: str) -> np.ndarray:
        """Labels int32 [n] from "7", "3,1,4", names of classes, or a `.npy`/`.npz` file.

        Raises:
          UserError: neither a name, nor a number in 0..count-1, nor such a file.
        """
        if pathlib.Path(text).suffix.lower() in files.ARRAY_SUFFIXES:
            return self.check(np.atleast_1d(read_array(files.expand(text), self.name)))
        words = [text] if text in (self.names or ()) else text.split(",")  # a name may hold a comma
        return np.array([self._number(word.strip()) for word in words], np.int32)

    def check(self, array) -> np.ndarray:
        """`array` as int32 [n].

        Raises:
          UserError: a wrong shape, a type that is not integer, or a class outside 0..count-1.
        """
        array = np.asarray(array)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            raise UserError(f"{self.name}: labels must be integers of shape [n], got {array.dtype} {list(array.shape)}.")
        wrong = array[(array < 0) | (array >= self.count)]
        if wrong.size:
            raise self._out_of_range(wrong[0])
        return array.astype(np.int32)

    def show(self, array) -> list[str]:
        """A word for every label; "-" for an id that is no class (the mask of a label that was never sampled)."""
        names = self.names or [str(number) for number in range(self.count)]
        return [str(names[i]) if 0 <= i < self.count else "-" for i in np.asarray(array).astype(int)]

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Classes with equal chances: int32 [count]."""
        return rng.integers(self.count, size=count, dtype=np.int32)

    def _number(self, word: str) -> int:
        for words in filter(None, (self.names, self.synonyms)):
            if places := [place for place, each in enumerate(words) if each == word]:
                if len(places) > 1:
                    raise UserError(f"{self.name} {word!r} is the name of several classes: write the number of one, {places}.")
                return places[0]
        try:
            number = int(word)
        except ValueError:
            raise self._out_of_range(repr(word)) from None
        if not 0 <= number < self.count:
            raise self._out_of_range(number)
        if self.names and all(str(each).isdecimal() for each in self.names):
            named = ", ".join(map(str, self.names[:20]))
            raise UserError(f"{self.name} {number} is the name of no class, and the classes have numbers for names: write one of {named}.")
        return number

    def _out_of_range(self, found) -> UserError:
        names = [str(word) for word in self.names or self.synonyms or ()]
        named = f" or one of {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""
        return UserError(f"{self.name} {found} does not exist: labels are 0..{self.count - 1}{named}.")


def finite_floats(array: np.ndarray) -> bool:
    """Whether an array holds something, and all of it floats that are finite in float32."""
    return bool(array.size) and array.dtype.kind == "f" and bool((np.abs(array) <= np.finfo(np.float32).max).all())


def span(array: np.ndarray) -> str:
    """What an array holds, in words."""
    if not array.size:
        return "nothing"
    if array.dtype.kind not in "fiu":
        return f"{array.dtype} values"
    if not np.isfinite(array).all():
        return "values that are not finite"
    return f"{array.dtype} values from {array.min():g} to {array.max():g}"
