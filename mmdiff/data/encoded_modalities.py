"""Modalities that published encoders make, as a person writes and sees them: images in the place of latents and tokens, and sentences."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import media
from mmdiff.data.modalities import Features, Latents
from mmdiff.data.named_autoencoders import Autoencoder, ImageTokens
from mmdiff.data.named_encoders import ImageVectors, NamedEncoder, TextStates, prepared
from mmdiff.data.named_features import ImagePatches
from mmdiff.data.token_modalities import TokenImages
from mmdiff.errors import UserError


def encoder_field() -> Any:
    """The encoder of a modality; it is no part of what a cache and a config agree on."""
    return dataclasses.field(default=None, kw_only=True, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class EncodedLatents(Latents):
    """Latents whose autoencoder a config names: images are read and shown. Without its path latents are shown as colours, see `Latents`.

    Attributes:
      encoder: an `Autoencoder`.
    """

    encoder: Autoencoder = encoder_field()

    def parse(self, text: str) -> np.ndarray:
        """Latents in a `.npy` or `.npz` file, or the most likely ones of an image file or of all images in a folder."""
        return super().parse(text) if _holds_arrays(text) else self.check(self.encoder.latents(_images(text, self.encoder)))

    def show(self, array) -> np.ndarray:
        """Decoded images, uint8 [n, H, W, 3]."""
        return media.to_uint8(self.encoder.decode(array)) if self.encoder.path else super().show(array)

    def write(self, array, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes every image to a file, FOLDER/NAME/00000.png, ...; -> their folder."""
        return _write(self, array, folder) if self.encoder.path else []


@dataclasses.dataclass(frozen=True)
class EncodedTokens(TokenImages):
    """Tokens whose tokenizer a config names: images are read and shown.

    Attributes:
      encoder: an `ImageTokens`. decode: another decoder, of a cache that has its own.
    """

    encoder: ImageTokens = encoder_field()

    def parse(self, text: str) -> np.ndarray:
        """Tokens in a `.npy` or `.npz` file, or those of an image file or of all images in a folder."""
        if _holds_arrays(text) or not self.encoder.path:
            return super().parse(text)
        return self.check(self.encoder.encode(_images(text, self.encoder))[self.encoder.modalities[0]])

    def write(self, array, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes every image to a file, FOLDER/NAME/00000.png, ...; -> their folder."""
        return _write(self, array, folder)


class OfImages:
    """A modality that a network makes of images, which are read, and cannot make images of."""

    def parse(self, text: str) -> np.ndarray:
        """Arrays in a `.npy` or `.npz` file, or those of an image file or of all images in a folder."""
        if _holds_arrays(text):
            return super().parse(text)
        return self.check(self.encoder.encode(_images(text, self.encoder))[self.encoder.modalities[0]])


@dataclasses.dataclass(frozen=True)
class EncodedMaps(OfImages, Latents):
    """Features of an image's patches whose network a config names; the first three channels are shown as colours.

    Attributes:
      encoder: an `ImagePatches`.
    """

    scale: float = 1.0
    name: str = "features"
    encoder: ImagePatches = encoder_field()


@dataclasses.dataclass(frozen=True)
class EncodedVectors(OfImages, Features):
    """Vectors whose image encoder a config names: those of images are read.

    Attributes:
      encoder: an `ImageVectors`.
    """

    encoder: ImageVectors = encoder_field()


@dataclasses.dataclass(frozen=True)
class EncodedTexts(Features):
    """States or vectors whose text encoder a config names: sentences are read, and those that were are shown.

    Attributes:
      encoder: a `TextStates`.
    """

    encoder: TextStates = encoder_field()
    sentences: dict[bytes, str] = dataclasses.field(default_factory=dict, kw_only=True, compare=False, repr=False)

    def parse(self, text: str) -> np.ndarray:
        """Arrays in a `.npy` or `.npz` file, or those of a sentence, or of one on every line of a `.txt` file."""
        if _holds_arrays(text):
            return super().parse(text)
        lines = self._lines(text)
        found = self.check(self.encoder.encode(lines)[self.name])
        self.sentences.update({_digest(array): line for array, line in zip(found, lines)})
        return found

    def lazily(self, text: str) -> np.ndarray | Sentences:
        """As `parse`, but the sentences of a `.txt` file are encoded when they are taken, `found[rows]`."""
        return self.parse(text) if pathlib.Path(text).suffix.lower() != ".txt" else Sentences(self, self._lines(text))

    def _lines(self, text: str) -> list[str]:
        lines = files.read_lines(text) if pathlib.Path(text).suffix.lower() == ".txt" else [text]
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise UserError(f"{self.name}: there are no words in {text!r}; to leave the text out, use --absent {self.name}.")
        for line in lines:
            files.check_text(line, f"the {self.name}")
        return lines

    def show(self, array) -> Any:
        """The sentences, where all are known; else None, as of `Features`."""
        array = np.asarray(array, np.float32)
        known = [self.sentences.get(_digest(each), "") for each in array]
        return known if all(known) else super().show(array)


@dataclasses.dataclass(frozen=True)
class Sentences:
    """What an `EncodedTexts` makes of sentences, too many to hold: those that are taken are encoded."""

    modality: EncodedTexts
    lines: list[str]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Of the sentences `rows`, [n, *shape]."""
        encoded = self.modality.encoder.encode([self.lines[row] for row in rows])
        return self.modality.check(encoded[self.modality.name])


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array, np.float32), digest_size=16).digest()


def _holds_arrays(text: str) -> bool:
    return pathlib.Path(text).suffix.lower() in files.ARRAY_SUFFIXES


def _images(text: str, encoder: NamedEncoder) -> np.ndarray:
    """An image file, or all images in a folder in the order of their names, prepared for an encoder."""
    path = files.expand(text)
    found = files.images(path) if files.is_folder(path) else [path]
    if not found:
        raise UserError(f"the folder {path} holds no images ({', '.join(files.IMAGE_SUFFIXES)}).")
    encoder.opened  # noqa: B018 - a path that is not there is said first
    return np.stack([prepared(file, [encoder])[0] for file in found])


def _write(modality: Any, array: np.ndarray, folder: pathlib.Path) -> list[pathlib.Path]:
    from PIL import Image

    target = folder / modality.name
    target.mkdir(exist_ok=True)
    for old in target.iterdir():  # of an earlier call with more samples
        if re.fullmatch(r"\d{5,}\.png", old.name):
            old.unlink()
    for number, image in enumerate(modality.show(array)):
        Image.fromarray(image).save(target / f"{number:05d}.png")
    return [target]
