"""Files that come from outside: every reader of the library opens, decodes and lists them through here (arrays through `data.arrays`).

A file that is not what it should be is a `FileError`, at once, that says what it is: nothing here waits for a pipe, runs what a file holds,
or takes one thing for another. The rules, for every reader:

* a file is a regular file, or a link to one; a folder holds what lies in it and below, in the order of names, without hidden and system
  files; a link that leads nowhere or in a circle is an error, not an absence;
* text is UTF-8, with or without a byte order mark, and ends its lines with \\n or \\r\\n and with nothing else;
* a picture is seen upright, on white, with the values of its type mapped onto 0..255; of several frames the first;
* a sound has finite samples, and all that its header says.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from mmdiff.errors import UserError

log = logging.getLogger(__name__)
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
OTHER_PICTURES = (  # that are not read: beside others they would be left out without a word
    ".jfif", ".jpe", ".apng", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".ppm", ".pgm", ".psd", ".svg", ".exr", ".hdr", ".dng",
    ".cr2", ".nef", ".arw")
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")  # some others of Pillow's start programs
HEADS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP"}
SYSTEM = (  # names that operating systems and archivers leave behind; those that begin with a dot are hidden anyway
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found", "@eadir",
    "__pycache__")
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
LOUDEST = 4.0  # compressed sound comes back a little beyond 1, integers stored as floats far
RATES = 1_000, 1_000_000  # Hz
STREAMED = 2**31 - 2**16  # bytes that programs which do not know the length say that a wav file has, or more
MOST_SAMPLES = 2**29  # of all channels: 6 hours of one at 22,050 Hz


class FileError(UserError):
    """A file is not what it should be: `reason`, without the path."""

    def __init__(self, path: Any, reason: str, remedy: str):
        super().__init__(f"{path} {reason}: {remedy}.")
        self.reason = reason


class Missing(FileError):
    """There is no such file."""

    def __init__(self, path: Any):
        UserError.__init__(self, f"no such file: {path}.")
        self.reason = "does not exist (No such file or directory)"


# ---------------------------------------------------------------------------------------------------------------- bytes and text


def expand(path: str | os.PathLike) -> pathlib.Path:
    """A path with ~ in it resolved; of an unknown user it stays. Raises FileError for the address of a bucket or a page."""
    if "://" in str(path):
        raise FileError(path, "is an address, not a file or folder", "mount the bucket (gcsfuse), or copy it to a disk")
    return pathlib.Path(os.path.expanduser(path))


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The open file, for reading.

    Raises:
      Missing: there is none. FileError: it is a folder, a pipe, a socket or a device, or may not or cannot be read.
    """
    path = expand(path)
    try:
        if not stat.S_ISREG(kind := os.stat(path).st_mode):
            raise FileError(path, f"is {KINDS.get(stat.S_IFMT(kind), 'special')}, not a file", "give a regular file")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(path) from None
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise failed(path, error) from error


def failed(path: str | os.PathLike, error: Exception) -> FileError:
    """Why the operating system refuses a path."""
    number = getattr(error, "errno", None)
    if number == errno.ELOOP:
        return FileError(path, "is a circle of symbolic links", "link to the file itself")
    if number in (errno.EACCES, errno.EPERM):
        return FileError(path, "may not be read (permission denied)", "ask its owner, or change its mode (chmod)")
    if number == errno.ENAMETOOLONG:
        return FileError(f"{str(path)[:60]}...", "is too long for the name of a file", "give the path of a file")
    if isinstance(error, OSError):
        return FileError(path, f"cannot be read ({error.strerror or error})", "check the disk, or copy it again")
    return FileError(repr(str(path)[:60]), "is no name of a file", "give the path of a file")


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file. Raises as `open_regular`."""
    with open_regular(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise failed(path, error) from error


def decode(content: bytes, name: Any) -> str:
    """UTF-8 as text, without a byte order mark. Raises FileError for another encoding; `name` is what it calls the file."""
    remedy = "save it as UTF-8"
    for mark, encoding in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if content.startswith(mark):
            raise FileError(name, f"is {encoding} text, not UTF-8", remedy)
    try:
        found = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FileError(name, f"is not UTF-8 text (byte {error.object[error.start]:#04x} in line {line})", remedy) from error
    if "\0" in found:
        raise FileError(name, "has zero bytes, which UTF-16 and binary files have but no UTF-8 text", remedy)
    return found


def check_text(text: str, name: Any) -> str:
    """The text. Raises FileError if it holds half a character (a lone surrogate) or a zero byte, as JSON and command lines can."""
    if "\0" in text:
        raise FileError(name, "holds a zero byte, which is no text", "remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a character ({text[error.start]!a}, a lone surrogate)"
        raise FileError(name, f"holds {half}, which is no text", "write the character in UTF-8") from error
    return text


def lines(text: str) -> list[str]:
    """The lines of a text: \\n and \\r\\n end one; a line separator (U+2028), a form feed and the like are characters of it."""
    found = text.replace("\r\n", "\n").split("\n")
    return found[:-1] if not found[-1] else found


def read_text(path: str | os.PathLike) -> str:
    """The text of a file. Raises as `open_regular` and `decode`."""
    return decode(read_bytes(path), path)


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a file, without what ends them. Raises as `read_text`."""
    return lines(read_text(path))


def parse_json(content: bytes, name: Any) -> Any:
    """The value of a JSON text. Raises FileError for anything else."""
    try:
        return json.loads(decode(content, name), object_pairs_hook=_once)
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(name, f"is not valid JSON ({str(error).splitlines()[0]})", "write it again") from error


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"it has {twice[:40]!r} twice")
    return found


def read_names(path: str | os.PathLike) -> list[str]:
    """The lines of a list that are not empty, without blanks around them. Raises as `read_text`; FileError for a line that comes twice."""
    found: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        if (name := line.strip()) in found:
            raise FileError(path, f"has {name[:80]!r} twice, in lines {found[name]} and {number}", "remove one")
        if name:
            found[name] = number
    return list(found)


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file. Raises as `open_regular` and `parse_json`."""
    return parse_json(read_bytes(path), path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, which is whole or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------- folders


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder's. Raises FileError where the system does not say."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise failed(path, error) from error


def hidden(name: str) -> bool:
    """Whether a file's or folder's own name is one that people do not see, or that a system has left."""
    return name.startswith(".") or name.lower() in SYSTEM


def folders(path: str | os.PathLike) -> list[str]:
    """The names of the folders in a folder, in their order. Raises as `pictures`."""
    return [entry.name for entry in _entries(path) if entry.is_dir()]


def pictures(path: str | os.PathLike, below: bool = True) -> list[pathlib.Path]:
    """The pictures in a folder and, unless `below` is False, in all below it, by the names of folders and files.

    Raises:
      FileError: a folder that cannot be read; a picture that is no regular file, or of a kind that is not read.
    """
    return matching(path, PICTURES, OTHER_PICTURES, below)


def not_read(name: Any) -> FileError:
    """What is said of a file that is one of OTHER_PICTURES."""
    reason = f"is a kind of picture that is not read ({', '.join(PICTURES)} are)"
    return FileError(name, reason, "rename (.jfif is .jpg), convert or remove it")


def matching(path: str | os.PathLike, kinds: Sequence[str], refused: Sequence[str] = (), below: bool = True) -> list[pathlib.Path]:
    """As `pictures`, of files whose names end in one of `kinds`; one that ends in one of `refused` is an error."""
    found: list[pathlib.Path] = []

    def visit(folder, above):
        status = os.stat(folder)
        own = status.st_dev, status.st_ino
        if own in above:
            raise FileError(folder, "is a link to a folder that it lies in", "remove it")
        for entry in _entries(folder):
            kind = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                if below:
                    visit(entry.path, above | {own})
            elif kind in refused:
                raise not_read(entry.path)
            elif kind in kinds:
                if not entry.is_file():
                    open_regular(entry.path).close()  # says what it is
                found.append(pathlib.Path(entry.path))

    visit(os.path.expanduser(path), frozenset())
    return found


def _entries(path: str | os.PathLike) -> list[os.DirEntry]:
    """What lies in a folder and is seen, by name."""
    try:
        with os.scandir(path) as entries:
            found = sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except (OSError, ValueError) as error:
        raise failed(path, error) from error
    for entry in found:
        if entry.is_symlink():
            try:
                os.stat(entry.path)
            except FileNotFoundError:
                raise FileError(entry.path, "is a symbolic link to what is not there", "mount or copy its target, or remove it") from None
            except OSError as error:
                raise failed(entry.path, error) from error
    return found


# ------------------------------------------------------------------------------------------------------------ pictures and sound


def read_image(file: str | os.PathLike | bytes, name: Any = None, ids: bool = False) -> Any:
    """A Pillow picture of the mode L or RGB: upright (EXIF), over white where it is transparent, its type's values mapped onto 0..255.

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
            with Image.open(stream, formats=FORMATS) as picture:
                picture.load()
                return picture if ids else _plain(picture, name)
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
    """What a file is that Pillow takes for no picture, and what to do."""
    stream.seek(0)
    head = stream.read(8)
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        what = "it is a TIFF file of values that are not read, such as 64-bit floats, or damaged"
        return what, "save it with 8 or 16 bits, or as 32-bit floats"
    if kind := next((kind for start, kind in HEADS.items() if head.startswith(start)), None):
        return f"it begins as a {kind} file and goes on as none", "it is damaged, copy it again"
    what = "it is none of " + ", ".join(PICTURES) if head else "it is empty"
    return what, "give a PNG or JPEG file, or copy it again"


def _signed(picture: Any) -> bool:
    """Whether a picture's values are integers with a sign, as those of a TIFF file can be."""
    return getattr(picture, "tag_v2", {}).get(339, (1,))[0] == 2


def _plain(picture: Any, name: Any) -> Any:
    """What `read_image` makes of a picture that Pillow has read."""
    from PIL import Image, ImageOps

    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # what stands beside the pixels is damaged, they are not
        log.debug("the EXIF data of %s cannot be read: it is taken to be upright.", name)
    if picture.mode.startswith("I") or picture.mode == "F" or picture.mode == "L" and _signed(picture):
        return Image.fromarray(_bytes(picture, name))
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        whole = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode, picture.mode)
        seen = picture.convert(whole).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return picture if picture.mode in ("L", "RGB") else picture.convert("L" if picture.mode == "1" else "RGB")


def _bytes(picture: Any, name: Any) -> np.ndarray:
    """The pixels of one deep channel as uint8."""
    tags = getattr(picture, "tag_v2", {})
    values = np.asarray(picture)
    if picture.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            low, high = np.min(values), np.max(values)
            raise FileError(name, f"holds floats from {low:g} to {high:g}", "a picture's floats must be in [0, 1], scale them")
        top = 1
    else:
        bits, signed = tags.get(258, (16,))[0], _signed(picture)
        if signed and bits == 8:  # Pillow takes them for unsigned ones, and those of 32 bits the other way round
            values = values.view(np.int8)
        if not signed and bits == 32:
            values = values.astype(np.int32).view(np.uint32)
        if values.min() < 0:
            raise FileError(name, f"holds negative numbers ({values.min()})", "a picture's values must be 0 or more, shift them")
        top = 2 ** (bits - signed) - 1
    white = tags.get(262) == 0  # is zero
    if values.dtype == np.uint16:  # by a table: pictures can be large
        table = _scaled(np.arange(2**16), top, white)
        if isinstance(clear := picture.info.get("transparency"), int):  # of a PNG: the value that is transparent
            table[clear] = 255
        return table[values]
    return _scaled(values, top, white)


def _scaled(values: np.ndarray, top: int, white: bool) -> np.ndarray:
    """0..`top` as 0..255, or as 255..0."""
    scaled = np.minimum(values.astype(np.float32) * np.float32(255 / top), 255)
    return np.rint(255 - scaled if white else scaled).astype(np.uint8)


def read_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The samples of a wav, flac, ogg or mp3 file, float32 [n, channels], and their rate.

    Raises:
      Missing, FileError: as `open_regular`; no sound, or more than `MOST_SAMPLES`; samples that are not finite or far beyond [-1, 1].
    """
    import soundfile

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
