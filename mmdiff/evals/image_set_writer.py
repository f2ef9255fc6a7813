"""Sets of images written part by part: ADM's npz, and numbered files. `image_sets` reads them."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.remote import RemotePath

THREADS = 8  # that compress images


def npz(path: pathlib.Path | RemotePath, arrays: Mapping[str, tuple[tuple[int, ...], Any, Iterable[np.ndarray]]]) -> None:
    """Writes a `.npz` file of arrays that need not fit the memory: name -> (shape, dtype, its parts along the first axis, in turn).

    The members are stored uncompressed, with headers of version 1.0, in C order: any reader can map or stream them. The same arrays make
    the same bytes.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
    >>> npz(path, {"arr_0": ((3,), np.uint8, iter([np.array([1, 2]), np.array([3])]))})
    >>> np.load(path)["arr_0"]
    array([1, 2, 3], dtype=uint8)
    """
    with files.whole(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, parts) in arrays.items():
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.ascontiguousarray(part, dtype).data)


def pictures(folder: pathlib.Path | RemotePath, parts: Iterable[np.ndarray]) -> None:
    """Writes uint8 images, parts [n, H, W, 1 or 3] in turn, to FOLDER/000000.png, 000001.png, ..."""
    from PIL import Image

    folder.mkdir(exist_ok=True)

    def save(number, image):
        with files.whole(folder / f"{number:06d}.png") as draft:
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(draft, "PNG")

    start = 0
    with ThreadPoolExecutor(THREADS) as threads:
        for part in parts:
            list(threads.map(save, range(start, start + len(part)), part))
            start += len(part)
