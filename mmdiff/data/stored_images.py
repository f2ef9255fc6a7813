"""Images as data sets store them: their records, those that can be read, and what becomes of one."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmdiff import files
from mmdiff.data import captions, media
from mmdiff.data.sources import ArraySource
from mmdiff.encoders.preprocessing import Preprocessing
from mmdiff.errors import UserError
from mmdiff.files import FileError

log = logging.getLogger(__name__)
NEAREST = 100  # images after a damaged one that may take its place


class Records(Protocol):
    """Images as they are stored. `names` are those of the classes, by label; `captions` how many the image with the most has."""

    names: Sequence[str]
    captions: int

    def __len__(self) -> int:
        """How many."""

    def identity(self) -> Any:
        """What tells these images from others, as JSON values, wherever they lie."""

    def get(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Of each "image", a file's path or content or a `Member`, and "label" (int) or "captions" (strings), or both."""


class Stored(NamedTuple):
    """An image in a TFDS data set: its content, and where it stands."""

    content: bytes
    index: int
    place: Sequence[str]

    def read(self) -> bytes:
        """The content."""
        return self.content

    def __str__(self):
        return f"image {self.index} of {'/'.join(self.place[:2])}, {self.place[2]},"


class UndamagedReader:
    """Images that can be read: `Records` of which a share may be damaged.

    Args:
      records: as above.
      share: of them that may be; each is named in the log, and the next one that can be read stands in its place.

    Raises:
      UserError: no share; from `read`, one damaged image more than that.
    """

    def __init__(self, records: Records, share: float = 0.0):
        if not 0 <= share < 1:
            raise UserError(f"config.data.damaged is the share of images that may be damaged, at least 0 and below 1, not {share}.")
        self._records, self._share, self._bad, self._lock = records, share, {}, threading.Lock()

    def read(self, indices: Sequence[int], see: Callable[[dict[str, Any]], np.ndarray]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
        """Records, and what `see` makes of each."""

        def sound(index, record):
            for _ in range(NEAREST):
                try:
                    return record, see(record)
                except FileError as error:
                    self._leave_out(index, error)
                index = (index + 1) % len(self._records)
                [record] = self._records.get([index])
            raise UserError(f"{NEAREST} images one after the other are damaged: copy the data again.")

        found = list(threads().map(sound, indices, self._records.get(indices)))
        return [record for record, _ in found], [seen for _, seen in found]

    def _leave_out(self, index: int, error: FileError) -> None:
        allowed, total = int(self._share * len(self._records)), len(self._records)
        with self._lock:
            if index in self._bad:
                return
            if not self._share:
                remedy = "a share of damaged images may be left out by config.data.damaged"
                raise UserError(f"{str(error).rstrip('.')} ({remedy}).") from error
            if len(self._bad) == allowed:
                why = f"{allowed + 1} of {total:,} images are damaged, more than config.data.damaged={self._share:g} allows"
                raise UserError(f"{why}: copy the data again, or raise it; the last is {error}") from error
            self._bad[index] = str(error)
            log.warning("%s It is left out: %d of at most %d damaged images, of %d in all.", error, len(self._bad), allowed, total)


def decode(file: pathlib.Path | captions.Member | Stored, ids: bool = False) -> Any:
    """A stored image as `media.read_image` reads it. Raises FileError for a missing or damaged file."""
    try:
        content = file if isinstance(file, pathlib.Path) else file.read()
        return media.read_image(content, str(file), ids)
    except files.Missing as error:
        raise FileError(file, "cannot be read as an image (No such file or directory)", "copy it again") from error


def values(image: Any) -> np.ndarray:
    """Values 0..255 of a Pillow image or an array as float32 in [-1, 1]."""
    return np.asarray(image, np.float32) / np.float32(127.5) - 1


class ByteImages:
    """A `Source` of arrays in memory, whose "image" is uint8 [n, H, W, C], a quarter as large as what is taken: float32 in [-1, 1]."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._stored = ArraySource(arrays)

    def __len__(self):
        return len(self._stored)

    def take(self, indices):
        found = self._stored.take(indices)
        return found | {"image": values(found["image"])}

    def fingerprint(self):
        return self._stored.fingerprint()


def square(image: Any, size: int, ids: bool = False) -> Any:
    """The central square of a Pillow image, `size` pixels wide: in colour, resampled (bicubic, antialiased); or ids, the nearest."""
    how = Preprocessing(size, "central", "nearest" if ids else "bicubic")
    return how.resized(image if ids else image.convert("RGB"))


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Pillow decodes outside of Python's lock."""
    return ThreadPoolExecutor(min(32, os.cpu_count() or 1), "images")
