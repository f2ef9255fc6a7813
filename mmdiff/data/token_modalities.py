"""Modalities whose examples are integers on a grid or in a row: sequences, images as tokens, class maps and texts.

Like those of `data.modalities` they `parse`, `check`, `show` and make examples up (`random`), on a leading axis of n examples.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from mmdiff import files
from mmdiff.data import media
from mmdiff.data.arrays import read_array
from mmdiff.data.bpe import Tokenizer
from mmdiff.data.modalities import Images, span
from mmdiff.errors import UserError


class DiscreteModality:
    """What modalities share whose examples are integers in 0..states-1: `check` and `random`.

    A subclass has `shape`, that of one example, `states` and `name`.
    """

    shape: tuple[int, ...]
    states: int
    name: str

    def check(self, array) -> np.ndarray:
        """`array` as int32 [n, *shape].

        Raises:
          UserError: a wrong shape, a type that is not integer, or a value outside 0..states-1.
        """
        array, name = np.asarray(array), self.name
        if array.ndim != 1 + len(self.shape) or array.shape[1:] != self.shape or array.dtype.kind not in "iu":
            size = ", ".join(map(str, self.shape))
            raise UserError(f"{name}: needs integers of shape [n, {size}], got {array.dtype} {list(array.shape)}.")
        if not array.size or array.min() < 0 or array.max() >= self.states:
            raise UserError(f"{name}: ids are 0..{self.states - 1}, got {span(array)}.")
        return array.astype(np.int32)

    def random(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Values with equal chances: int32 [count, *shape]."""
        return rng.integers(self.states, size=(count, *self.shape), dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Sequences(DiscreteModality):
    """Rows of tokens: int32 [n, length] in 0..states-1.

    >>> Sequences(4, 10).parse("3 1 4 1")
    array([[3, 1, 4, 1]], dtype=int32)

    Attributes:
      length, states: tokens in an example, and values of a token.
      name: the modality's name, which is its key in an `.npz` file.
    """

    length: int
    states: int
    name: str = "tokens"

    @property
    def shape(self) -> tuple[int]:
        """The shape of one example."""
        return (self.length,)

    def parse(self, text: str) -> np.ndarray:
        """One sequence from "3 1 4 ..." (blanks or commas between), or those of a `.npy`/`.npz` file: int32 [n, length].

        Raises:
          UserError: words that are no numbers, or what `check` refuses.
        """
        if pathlib.Path(text).suffix.lower() in files.ARRAY_SUFFIXES:
            return self.check(np.atleast_2d(read_array(files.expand(text), self.name)))
        try:
            numbers = np.array([[int(word) for word in text.replace(",", " ").split()]], np.int64)
        except (ValueError, OverflowError):
            raise UserError(f"{self.name}: {text!r} is not a row of numbers like '3 1 4'.") from None
        return self.check(numbers)

    def show(self, array) -> list[str]:
        """The numbers in a row, for every sequence; "-" for an id that is no token (a mask)."""
        return [" ".join(str(token) if 0 <= token < self.states else "-" for token in row) for row in np.asarray(array)]


@dataclasses.dataclass(frozen=True)
class TokenImages(DiscreteModality):
    """Images as tokens: int32 [n, height * width] in raster order, in 0..states-1.

    Attributes:
      height, width, states: tokens in a column and in a row, and values of a token.
      decode: tokens [n, height * width] -> images [n, H, W, C] in [-1, 1], as of a VQ autoencoder. By default a token is a pixel and
        its values are grey levels: 0 is -1, states - 1 is 1.
      name: the modality's name, which is its key in an `.npz` file.
    """

    height: int
    width: int
    states: int
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    name: str = "tokens"

    @property
    def shape(self) -> tuple[int]:
        """The shape of one example."""
        return (self.height * self.width,)

    def parse(self, text: str) -> np.ndarray:
        """The tokens in a `.npy`/`.npz` file, or (where tokens are pixels) of images as `Images` reads them: int32 [n, height * width].

        Raises:
          UserError: a file that is missing or is neither, or has the wrong size or range.
        """
        path = files.expand(text)
        if path.suffix.lower() in files.ARRAY_SUFFIXES:
            array = read_array(path, self.name)
            if array.dtype.kind in "iu" and array.shape[-1:] == self.shape:
                return self.check(np.atleast_2d(array))
        if self.decode is not None:
            raise UserError(f"{self.name}: give tokens in a .npy or .npz file, integers [n, {self.shape[0]}], not {path}.")
        pixels = Images(self.height, self.width, 1, self.states, self.name).parse(text)
        return np.rint((pixels + 1) * ((self.states - 1) / 2)).astype(np.int32).reshape(len(pixels), -1)

    def images(self, array) -> np.ndarray:
        """Tokens -> images, float32 [n, H, W, C] in [-1, 1]. An id beyond the tokens (a mask) counts as the last of them."""
        found = decoded(array, self.states, self.decode)
        return found.reshape(-1, self.height, self.width, 1) if self.decode is None else found

    def show(self, array) -> np.ndarray:
        """Pixels for the eye: uint8 [n, H, W, C], from 0 for -1 to 255 for 1."""
        return media.to_uint8(self.images(array))


@dataclasses.dataclass(frozen=True)
class ClassMaps(DiscreteModality):
    """A class for each pixel: int32 [n, height, width] in 0..K-1, shown in the colours of a palette.

    Attributes:
      height, width: the size.
      palette: the K classes' colours, (red, green, blue) in 0..255 each.
      name: the modality's name, which is its key in an `.npz` file.
    """

    height: int
    width: int
    palette: tuple[tuple[int, int, int], ...]
    name: str = "segmentation"

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of one example."""
        return self.height, self.width

    @property
    def states(self) -> int:
        """The number of classes."""
        return len(self.palette)

    def parse(self, text: str) -> np.ndarray:
        """The maps in a `.npy`/`.npz` file, or of images as `Images` reads them, by the colour that is nearest: int32 [n, height, width].

        Raises:
          UserError: a file that is missing or is neither, or has the wrong size or range.
        """
        path = files.expand(text)
        if path.suffix.lower() in files.ARRAY_SUFFIXES:
            array = read_array(path, self.name)
            return self.check(array[None] if array.ndim == 2 else array)
        pixels = (Images(self.height, self.width, 3, name=self.name).parse(text) + 1) * 127.5
        colours = np.array(self.palette, np.float32)
        return np.argmin((colours**2).sum(-1) - 2 * pixels @ colours.T, -1).astype(np.int32)

    def show(self, array) -> np.ndarray:
        """The colours: uint8 [n, height, width, 3]; grey for an id that is no class (a mask)."""
        colours = np.array([*self.palette, (128, 128, 128)], np.uint8)
        return colours[np.minimum(np.asarray(array), len(self.palette))]


@dataclasses.dataclass(frozen=True)
class Texts(DiscreteModality):
    """Sentences: int32 [n, tokenizer.length], the ids of a tokenizer; a row of padding is an absent text.

    Attributes:
      tokenizer: a `data.bpe.Tokenizer`, or a published one (`encoders.open_tokenizer`): what has their methods.
      name: the modality's name, which is its key in an `.npz` file.
    """

    tokenizer: Tokenizer
    name: str = "text"

    @property
    def shape(self) -> tuple[int]:
        """The shape of one example."""
        return (self.tokenizer.length,)

    @property
    def states(self) -> int:
        """The number of ids."""
        return self.tokenizer.size

    def parse(self, text: str) -> np.ndarray:
        """A sentence, one per line of a `.txt` file, or the ids in a `.npy`/`.npz` file: int32 [n, length].

        Raises:
          UserError: no such file, no words, words that no training text has, or what `check` refuses.
        """
        path = pathlib.Path(text)
        if path.suffix.lower() in files.ARRAY_SUFFIXES:
            return self.check(np.atleast_2d(read_array(path, self.name)))
        sentences = [text]
        if path.suffix.lower() == ".txt":
            try:
                sentences = [line for line in files.read_lines(path) if line.strip()]
            except files.FileError as error:
                why = f"cannot be read as text (it {error.reason})"
                raise files.FileError(path, why, "give a UTF-8 file, a sentence on every line") from error
        if not "".join(sentences).strip():
            raise UserError(f"{self.name}: there are no words in {text!r}; to leave the text out, use --absent {self.name}.")
        for sentence in sentences:
            files.check_text(sentence, f"the {self.name}")
            unseen = self.tokenizer.unseen(sentence)
            if unseen:
                raise UserError(f"{self.name}: none of the training texts has {', '.join(map(repr, unseen))}, spelled and spaced as here.")
        return self.tokenizer.encode(sentences)

    def show(self, array) -> list[str]:
        """The sentences; "-" for an absent one."""
        return [text or "-" for text in self.tokenizer.decode(array)]


def decoded(tokens, states: int, decode: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    """What `decode` makes of tokens, held in [-1, 1]; without it their values, from -1 for 0 to 1 for states - 1. A mask counts as the
    last of them."""
    tokens = np.clip(np.asarray(tokens), 0, states - 1)
    if decode is None:
        return tokens.astype(np.float32) / np.float32((states - 1) / 2) - 1
    return np.clip(np.asarray(decode(tokens), np.float32), -1, 1)
