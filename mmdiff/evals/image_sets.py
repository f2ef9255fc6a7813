"""Sets of images in files, as samples are published: read some at a time, however many there are; and stored statistics of their features.

    FILE.npz    arr_0 uint8 [n, H, W, 3], as ADM's evaluator takes it; as a reference also, or only, mu, sigma, mu_s, sigma_s
    FILE.npy    uint8 [n, H, W, 3]
    FOLDER      images, at any depth; of a set that `mmdiff sample --format` wrote, its images alone
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from mmdiff import files
from mmdiff.data import media
from mmdiff.data.arrays import HEADER, RATIO, read_array
from mmdiff.data.stored_images import threads
from mmdiff.encoders.preprocessing import Preprocessing
from mmdiff.errors import UserError
from mmdiff.files import FileError

IMAGES = "arr_0"
MEANS = {"mu": "sigma", "mu_s": "sigma_s"}  # of the pooled features, and of sFID's spatial ones
TO_UINT8 = "store uint8 RGB: floor(clip(127.5 x + 128, 0, 255)) of x in [-1, 1]"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size: `read(at_once, rows)` gives uint8 [n, H, W, 3], again and again, `at_once` at a time, of consecutive rows."""

    path: str
    count: int
    size: tuple[int, int]
    read: Callable[[int, range], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Moments of features in a file. `convention` says which they are, {} in others' files; `count` is None where they do not state it."""

    path: str
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]]
    count: int | None
    convention: Mapping[str, Any]


def open_images(path: str | os.PathLike, size: int = 0) -> ImageSet:
    """A set of images.

    Args:
      path: one of the above.
      size: crop and resize the images of a folder to this height and width, as ADM does; 0 if they have one size already. The images of
        a file must have it.

    Raises:
      FileError: no such set; floats, grey images, another entry, a damaged file; images of several sizes.
    """
    path = _in_set(files.expand(path))
    if files.is_folder(path):
        return _folder(path, size)
    with _array(path) as (stream, bytes_of_it):
        shape = _header(stream, bytes_of_it, path)
    if size and shape[1:3] != (size, size):
        raise UserError(f"{path} has images of {shape[1]} x {shape[2]} pixels: --size {size} crops those of folders only.")

    def read(at_once, rows=range(shape[0])):
        with _array(path) as (stream, bytes_of_it):
            _header(stream, bytes_of_it, path)
            stream.seek(rows.start * math.prod(shape[1:]), os.SEEK_CUR)
            for start in range(0, len(rows), at_once):
                n = min(at_once, len(rows) - start)
                content = _exactly(stream, n * math.prod(shape[1:]))
                yield np.frombuffer(content, np.uint8).reshape(n, *shape[1:])

    return ImageSet(str(path), shape[0], shape[1:3], read)


def _in_set(path: pathlib.Path) -> pathlib.Path:
    """The images of a set that `mmdiff sample` wrote, beside which its folder has a grid. Raises FileError for a part of one."""
    if (path / "samples.json").is_file():
        found = next((found for name in ("samples.npz", "images") if (found := path / name).exists()), None)
        stored = files.read_json(path / "samples.json")
        if found is None or not isinstance(stored, Mapping) or not stored.get("whole"):
            raise FileError(path, "holds a set of samples that is not whole", "run the same mmdiff sample again, which continues")
        return found
    if all((path / f"samples.{kind}").is_file() for kind in ("npz", "png")):
        raise FileError(path, "holds a few samples to be looked at", "write a set of images, mmdiff sample --format npz")
    return path


def _folder(path, size):
    found = files.images(path)
    if not found:
        raise FileError(path, f"holds no images ({', '.join(files.IMAGE_SUFFIXES)})", "give a folder of images, or a .npz file")
    crop = Preprocessing(size, "adm") if size else None

    def load(file):
        image = media.read_image(file).convert("RGB")
        return crop.pixels(image) if crop else np.asarray(image)

    first = load(found[0]).shape

    def read(at_once, rows=range(len(found))):
        for start in range(0, len(rows), at_once):
            names = [found[row] for row in rows[start : start + at_once]]
            images = list(threads().map(load, names))
            for name, image in zip(names, images):
                if image.shape != first:
                    sizes = f"{image.shape[0]} x {image.shape[1]} pixels, and {found[0].name} {first[0]} x {first[1]}"
                    raise FileError(name, f"has {sizes}", "crop all to one size (--size)")
            yield np.stack(images)

    return ImageSet(str(path), len(found), first[:2], read)


def open_reference(path: str | os.PathLike, size: int = 0) -> tuple[ImageSet | None, Statistics | None]:
    """What there is to compare with: images, or statistics, or both. Raises as `open_images`, and FileError for damaged statistics."""
    path = _in_set(files.expand(path))
    if files.is_folder(path) or not _zipped(path):
        return open_images(path, size), None
    with _zip(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if not names & {IMAGES, *MEANS}:
        held = ", ".join(sorted(names)) or "nothing"
        reason = f"has neither images ({IMAGES}) nor statistics (mu, sigma): it holds {held[:100]}"
        raise FileError(path, reason, "name the entries so, as ADM's evaluator does")
    images = open_images(path, size) if IMAGES in names else None
    return images, _statistics(path, names) if "mu" in names else None


def _statistics(path, names):
    moments = {}
    for mean, covariance in MEANS.items():
        if mean in names:
            if covariance not in names:
                raise FileError(path, f"has {mean} without {covariance}", "store both")
            m, c = (np.asarray(read_array(path, name)) for name in (mean, covariance))
            if m.dtype.kind != "f" or c.dtype.kind != "f" or m.ndim != 1 or c.shape != (len(m), len(m)):
                reason = f"has {mean} {m.dtype} {list(m.shape)} and {covariance} {c.dtype} {list(c.shape)}"
                raise FileError(path, reason, "they must be the mean [d] and the covariance [d, d] of features")
            if not np.isfinite(m).all() or not np.isfinite(c).all():
                raise FileError(path, f"has values in {mean} or {covariance} that are not finite", "make the statistics again")
            if not np.allclose(c, c.T, rtol=1e-4, atol=1e-6 * abs(c).max(initial=0)):
                raise FileError(path, f"has a {covariance} that is not symmetric, hence no covariance", "make the statistics again")
            moments[mean] = m.astype(np.float64), c.astype(np.float64)
    convention = {}
    if "convention" in names:
        try:
            convention = dict(json.loads(str(read_array(path, "convention"))))
        except (ValueError, TypeError) as error:
            raise FileError(path, f"has a convention that cannot be read ({error})", "make the statistics again") from error
    return Statistics(str(path), moments, convention.get("count"), convention)


def write_statistics(path: str | os.PathLike, moments: Mapping[str, tuple[np.ndarray, np.ndarray]], convention: Mapping[str, Any]) -> None:
    """Stores moments, {"mu": (mean, covariance), "mu_s": ...}, as ADM's evaluator and pytorch-fid read them, and their "convention"."""
    path = files.target(path)
    arrays = {name: array for mean, pair in moments.items() for name, array in zip((mean, MEANS[mean]), pair, strict=True)}
    content = io.BytesIO()
    np.savez(content, **arrays, convention=np.array(json.dumps(convention)))
    try:
        files.write_whole(path, content.getvalue())
    except OSError as error:
        raise FileError(path, f"cannot be written ({error.strerror or error})", "choose another file") from error


# --------------------------------------------------------------------------------------------------------------------- NumPy's files


def _zipped(path) -> bool:
    with files.open_regular(path) as file:
        return file.read(2) == b"PK"


@contextlib.contextmanager
def _refusals(path) -> Iterator[None]:
    """What NumPy and zipfile raise for a damaged file becomes a FileError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = (str(error).splitlines() or [""])[0][:80].rstrip(".") or type(error).__name__
        raise FileError(path, f"is not a NumPy file that can be read ({what})", "copy it again, or save it with numpy.savez") from error


@contextlib.contextmanager
def _zip(path) -> Iterator[zipfile.ZipFile]:
    with files.open_regular(path) as file, _refusals(path), zipfile.ZipFile(file) as archive:
        yield archive


@contextlib.contextmanager
def _array(path) -> Iterator[tuple[BinaryIO, int]]:
    """The stream of the images' array, at its start, and how many bytes it may have."""
    if not _zipped(path):
        with files.open_regular(path) as file, _refusals(path):
            yield file, os.fstat(file.fileno()).st_size
        return
    with _zip(path) as archive:
        names = archive.namelist()
        if f"{IMAGES}.npy" not in names:
            held = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
            raise FileError(path, f"has no entry {IMAGES!r}: it holds {held[:100]}", f"name it so: numpy.savez(file, {IMAGES}=images)")
        info = archive.getinfo(f"{IMAGES}.npy")
        if info.compress_size > os.stat(path).st_size or info.file_size > RATIO * info.compress_size + 1000:
            raise FileError(path, "claims more than it can hold", "it is damaged, copy it again")
        with archive.open(info) as stream:
            yield stream, info.file_size


def _header(stream: BinaryIO, size: int, path: Any) -> tuple[int, int, int, int]:
    """The shape of images; the stream is behind it."""
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise FileError(path, f"has NumPy's format {version[0]}.{version[1]}", "save it with numpy.savez")
    shape, fortran, dtype = headers[version](stream, max_header_size=HEADER)
    if dtype != np.uint8:
        raise FileError(path, f"holds {dtype} {list(shape)}, no uint8 images", TO_UINT8)
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        what = "grey images" if len(shape) == 3 or len(shape) == 4 and shape[3] == 1 else "no RGB images [n, H, W, 3]"
        raise FileError(path, f"holds {what}: uint8 {list(shape)}", "store n images of H x W x 3, grey ones three times")
    if fortran:
        raise FileError(path, "holds images in Fortran's order", "save numpy.ascontiguousarray of them")
    if math.prod(shape) > size - stream.tell():
        raise FileError(path, f"claims {math.prod(shape):,} bytes and has {size:,}", "it is cut short or damaged, copy it again")
    return shape


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise ValueError("it is cut short")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
