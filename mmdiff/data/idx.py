"""Arrays in the idx format, which MNIST and its kin are published in, plain or compressed by gzip.

Two zero bytes, the type (8: uint8), the number of axes, their lengths (big-endian uint32), and the values in C order.
"""

from __future__ import annotations

import gzip
import io
import math
import pathlib
import zlib

import numpy as np

from mmdiff import files
from mmdiff.files import FileError

BYTES = 8  # the type of all sets that are published in this format
RATIO = 1032  # the most that deflate can compress


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The array uint8 in an idx file; one whose name ends in .gz is decompressed.

    Raises:
      FileError: no such file, another format or type, a file that is cut short, too long or damaged.
    """
    content, again = files.read_bytes(path), "download it again"
    compressed = str(path).endswith(".gz")
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if compressed else io.BytesIO(content)
    try:
        magic = stream.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 8:
            raise FileError(path, "is no idx file (it does not begin with the bytes of one)", again)
        if magic[2] != BYTES:
            raise FileError(path, f"holds values of the idx type {magic[2]:#04x}, not bytes (0x08)", "give the images and labels as bytes")
        lengths = stream.read(4 * magic[3])
        shape = tuple(np.frombuffer(lengths, ">u4").tolist()) if len(lengths) == 4 * magic[3] else (0,)
        size = math.prod(shape)
        # What it claims is not read before it can be true.
        values = stream.read(size + 1) if 0 < size <= len(content) * (RATIO if compressed else 1) else b""
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(path, f"is damaged ({error})", again) from error
    if len(values) != size or not size:
        raise FileError(path, f"is cut short or too long for the {' x '.join(map(str, shape))} bytes that it claims", again)
    return np.frombuffer(values, np.uint8).reshape(shape)
