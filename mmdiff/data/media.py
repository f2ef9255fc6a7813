"""Images and sounds in files: read as every reader of the library sees them.

An image is upright, on white, with the values of its type mapped onto 0..255; of several frames it is the first. A sound has finite
samples, and all that its header says. Whatever else a file holds is a `FileError`.
"""

from __future__ import annotations

import io
import logging
import os
from typing import Any, BinaryIO

import numpy as np

from mmdiff.errors import import_extra
from mmdiff.files import IMAGE_SUFFIXES, FileError, expand, open_regular

log = logging.getLogger(__name__)
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")  # some others of Pillow's start programs
HEADS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP"}
LOUDEST = 4.0  # compressed sound comes back a little beyond 1, integers stored as floats far
RATES = 1_000, 1_000_000  # Hz
STREAMED = 2**31 - 2**16  # bytes that programs which do not know the length say that a wav file has, or more
MOST_SAMPLES = 2**29  # of all channels: 6 hours of one at 22,050 Hz


def read_image(file: str | os.PathLike | bytes, name: Any = None, ids: bool = False) -> Any:
    """A Pillow image of the mode L or RGB: upright (EXIF), over white where it is transparent, its type's values mapped onto 0..255.

    16 bits are divided by 257, other integers by the largest value of their type, and floats, which must be in [0, 1], multiplied by 255.

    Args:
      file: a path, or a file's content.
      name: what messages call it; the path by default.
      ids: leave the stored values as they are, as they are numbers of classes.

    Raises:
      Missing, FileError: as `open_regular`; a damaged file, one of another kind, one with more pixels than Pillow admits.
    """
    from PIL import Image

    name = file if name is None else name
    with io.BytesIO(file) if isinstance(file, bytes) else open_regular(file) as stream:
        try:
            with Image.open(stream, formats=FORMATS) as image:
                image.load()
                return image if ids else _plain(image, name)
        except FileError:
            raise
        except Image.DecompressionBombError as error:
            reason = f"has more pixels than are read ({str(error).partition(',')[0]})"
            raise FileError(name, reason, "shrink it, which loses nothing that a model sees") from error
        except Image.UnidentifiedImageError as error:
            what, remedy = _unidentified(stream)
            raise FileError(name, f"cannot be read as an image ({what})", remedy) from error
        except Exception as error:  # whatever a damaged file makes Pillow raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileError(name, f"cannot be read as an image ({reason})", "it is damaged, copy it again") from error


def _unidentified(stream: BinaryIO) -> tuple[str, str]:
    """What a file is that Pillow takes for no image, and what to do."""
    stream.seek(0)
    head = stream.read(8)
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        what = "it is a TIFF file of values that are not read, such as 64-bit floats, or damaged"
        return what, "save it with 8 or 16 bits, or as 32-bit floats"
    if kind := next((kind for start, kind in HEADS.items() if head.startswith(start)), None):
        return f"it begins as a {kind} file and continues as none", "it is damaged, copy it again"
    what = "it is none of " + ", ".join(IMAGE_SUFFIXES) if head else "it is empty"
    return what, "give a PNG or JPEG file, or copy it again"


def _signed(image: Any) -> bool:
    """Whether an image's values are integers with a sign, as those of a TIFF file can be."""
    return getattr(image, "tag_v2", {}).get(339, (1,))[0] == 2


def _plain(image: Any, name: Any) -> Any:
    """What `read_image` makes of an image that Pillow has read."""
    from PIL import Image, ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # the metadata are damaged, the pixels are not
        log.debug("the EXIF data of %s cannot be read: it is taken to be upright.", name)
    if image.mode.startswith("I") or image.mode == "F" or image.mode == "L" and _signed(image):
        return Image.fromarray(_bytes(image, name))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        whole = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
        seen = image.convert(whole).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _bytes(image: Any, name: Any) -> np.ndarray:
    """The pixels of one deep channel as uint8."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            low, high = np.min(values), np.max(values)
            raise FileError(name, f"holds floats from {low:g} to {high:g}", "an image's floats must be in [0, 1], scale them")
        top = 1
    else:
        bits, signed = tags.get(258, (16,))[0], _signed(image)
        if signed and bits == 8:  # Pillow takes them for unsigned ones, and those of 32 bits the other way round
            values = values.view(np.int8)
        if not signed and bits == 32:
            values = values.astype(np.int32).view(np.uint32)
        if values.min() < 0:
            raise FileError(name, f"holds negative numbers ({values.min()})", "an image's values must be 0 or more, shift them")
        top = 2 ** (bits - signed) - 1
    white = tags.get(262) == 0  # is zero
    if values.dtype == np.uint16:  # by a table: images can be large
        table = _scaled(np.arange(2**16), top, white)
        if isinstance(clear := image.info.get("transparency"), int):  # of a PNG: the value that is transparent
            table[clear] = 255
        return table[values]
    return _scaled(values, top, white)


def _scaled(values: np.ndarray, top: int, white: bool) -> np.ndarray:
    """0..`top` as 0..255, or as 255..0."""
    scaled = np.minimum(values.astype(np.float32) * np.float32(255 / top), 255)
    return np.rint(255 - scaled if white else scaled).astype(np.uint8)


def to_uint8(pixels: Any) -> np.ndarray:
    """Pixels in [-1, 1] as all images are written, shown and measured: floor(clip(127.5 x + 128, 0, 255)), halves upwards; NaN becomes 0.

    That is what the evaluations of DiT, SiT and EDM do. Every level survives: ADM's own (x + 1) * 127.5, cut off, is half a level too dark.

    >>> to_uint8(np.array([-1.1, -1, 0, 1])).tolist(), (to_uint8(np.arange(256) / np.float32(127.5) - 1) == np.arange(256)).all().item()
    ([0, 0, 128, 255], True)
    """
    levels = np.clip(np.nan_to_num(np.asarray(pixels, np.float32), nan=-1.0) * np.float32(127.5) + np.float32(128), 0, 255)
    return levels.astype(np.uint8)  # which cuts off


def read_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The samples of a wav, flac, ogg or mp3 file, float32 [n, channels], and their rate.

    Raises:
      Missing, FileError: as `open_regular`; no sound, or more than `MOST_SAMPLES`; samples that are not finite or far beyond [-1, 1].
    """
    soundfile = import_extra("soundfile", "audio")

    path, remedy = expand(path), "give a wav, flac, ogg or mp3 file"
    with open_regular(path) as file:
        head, size = file.read(8), file.seek(0, io.SEEK_END)
        claim = int.from_bytes(head[4:], "little") + 8 if head[:4] == b"RIFF" else 0
        if size < claim < STREAMED:  # libsndfile reads what there is
            raise FileError(path, f"is cut short: it has {size:,} of its {claim:,} bytes", "copy it again")
        file.seek(0)
        try:
            with soundfile.SoundFile(file) as sound:
                if sound.frames * sound.channels > MOST_SAMPLES:
                    claim = f"says that it has {sound.frames:,} samples of {sound.channels} channels"
                    raise FileError(path, claim, "cut it, or copy it again")
                if not RATES[0] <= sound.samplerate <= RATES[1]:
                    raise FileError(path, f"says that it has {sound.samplerate:,} samples a second", "correct its header, or copy it again")
                samples, rate = sound.read(dtype="float32", always_2d=True), sound.samplerate
        except FileError:
            raise
        except Exception as error:  # whatever a damaged file makes libsndfile raise
            raise FileError(path, f"cannot be read as sound ({str(error).rstrip('.')})", remedy) from error
    if not samples.size:
        raise FileError(path, "cannot be read as sound (it has no samples)", remedy)
    bad = np.flatnonzero(~np.isfinite(samples).all(1))
    if bad.size:
        raise FileError(path, f"has {bad.size:,} samples that are not finite, the first at {bad[0] / rate:.3f} s", "repair or remove it")
    if np.abs(samples).max() > LOUDEST:
        raise FileError(path, f"has samples up to {np.abs(samples).max():g}", "a sound's floats must be in [-1, 1], scale them")
    return samples, rate
