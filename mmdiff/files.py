"""Files that come from outside: every reader of the library opens, decodes and lists them through here (`data.arrays` and
`data.media` decode what they hold).

A file that is not what it should be is a `FileError`, at once, that says what it is: nothing here waits for a pipe, runs what a file holds,
or takes one thing for another. The rules, for every reader:

* a file is a regular file, or a link to one; a folder holds what lies in it and below, in the order of names, without hidden and system
  files; a link that leads nowhere or in a circle is an error, not an absence;
* text is UTF-8, with or without a byte order mark, and ends its lines with \\n or \\r\\n and with nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from mmdiff import remote
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath

log = logging.getLogger(__name__)
ASIDE = ("samples", "snapshots")  # folders of a run that are not needed to use its weights
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
ARRAY_SUFFIXES = (".npy", ".npz")
UNREAD_SUFFIXES = (  # that are not read: among others they would be left out without a word
    ".jfif", ".jpe", ".apng", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".ppm", ".pgm", ".psd", ".svg", ".exr", ".hdr", ".dng",
    ".cr2", ".nef", ".arw")
SYSTEM = (  # names that operating systems and archivers leave behind; those that begin with a dot are hidden anyway
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found", "@eadir",
    "__pycache__")
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


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


def expand(path: str | os.PathLike | RemotePath, without: Sequence[str] = ()) -> pathlib.Path:
    """A path that is read: with ~ in it resolved; of an unknown user it stays. Of an address, gs://bucket/file, a copy on this machine,
    of a folder there `without` those in it.

    Raises:
      Missing: nothing is at an address. FileError: it cannot be read. UserError: what opens such addresses is not installed.
    """
    place = target(path)
    if isinstance(place, pathlib.Path):
        return place
    try:
        return remote.local_copy(str(place), without=without)
    except FileNotFoundError:
        raise Missing(place) from None
    except OSError as error:
        raise failed(place, error) from error


def target(path: str | os.PathLike | RemotePath) -> pathlib.Path | RemotePath:
    """A path that is written: as `expand`, but of an address the address. Raises FileError for file:// without a path from the root."""
    if isinstance(path, pathlib.PurePath) and len(path.parts[0:1] and path.parts[0]) > 2 and path.parts[0].endswith(":"):
        raise FileError(path, "was an address, of which pathlib has made a path", "give it as text")
    if not remote.is_remote(path):
        return pathlib.Path(os.path.expanduser(path))
    kind, _, place = str(path).partition("://")
    if kind not in ("file", "local"):
        return RemotePath(str(path))
    if not place.startswith("/"):
        raise FileError(path, "is no address of a file", f"write {kind}:///FOLDER/FILE, or the path alone")
    return pathlib.Path(place)


def on_disk(path: str | os.PathLike) -> pathlib.Path:
    """A path of which a folder is renamed, or files are changed where they lie: as `target`, and raises FileError for an address."""
    if isinstance(place := target(path), RemotePath):
        raise FileError(path, "is an address, and this is written to a disk", "name a folder, and copy it there (or mount the bucket)")
    return place


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


def write_json(path: pathlib.Path | RemotePath, value: Any) -> None:
    """Writes a JSON file, which is whole or as it was."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path: pathlib.Path | RemotePath, content: str | bytes) -> None:
    """Writes a small file so that it holds either the old content or the new one, whatever happens and whoever else writes it."""
    content = content if isinstance(content, bytes) else content.encode()
    if isinstance(path, RemotePath):
        return path.write_bytes(content)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole(path: pathlib.Path | RemotePath) -> Iterator[pathlib.Path]:
    """A file of this machine to write, which takes the place of `path` when the context ends; of one writer at a time.

    After an exception `path` is as it was. What a killed writer leaves has a name of its own, and the next one writes over it.
    """
    if isinstance(path, pathlib.Path):
        yield (partial := path.with_name(f".{path.name}.partial"))
        os.replace(partial, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (partial := pathlib.Path(folder, path.name))
        path.send(partial)


# ---------------------------------------------------------------------------------------------------------------------- folders


def names(path: pathlib.Path | RemotePath) -> set[str]:
    """Of all that lies in a folder; none where there is no such folder."""
    try:
        return path.names() if isinstance(path, RemotePath) else set(os.listdir(path))
    except FileNotFoundError:
        return set()


def remove_folder(path: pathlib.Path | RemotePath) -> None:
    """Removes a folder that is there, with all that is in it."""
    path.remove() if isinstance(path, RemotePath) else shutil.rmtree(path)


@contextlib.contextmanager
def folder_to_fill(path: pathlib.Path | RemotePath) -> Iterator[pathlib.Path]:
    """A folder of this machine to write in: `path`, which is made; of an address one whose files are sent there when the context ends."""
    if isinstance(path, pathlib.Path):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)
        for file in sorted(pathlib.Path(folder).iterdir()):
            (path / file.name).send(file)


def is_folder(path: str | os.PathLike | RemotePath) -> bool:
    """Whether a path is a folder's. Raises FileError where the system does not say."""
    if isinstance(path, RemotePath):
        return bool(path.names() - {path.name})  # a file lists itself
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
    """The names of the folders in a folder, in their order. Raises as `images`."""
    return [entry.name for entry in _entries(path) if entry.is_dir()]


def images(path: str | os.PathLike, below: bool = True) -> list[pathlib.Path]:
    """The images in a folder and, unless `below` is False, in all below it, by the names of folders and files.

    Raises:
      FileError: a folder that cannot be read; an image that is no regular file, or of a kind that is not read.
    """
    return matching(path, IMAGE_SUFFIXES, UNREAD_SUFFIXES, below)


def not_read(name: Any) -> FileError:
    """What is said of a file that is one of UNREAD_SUFFIXES."""
    reason = f"is a kind of image that is not read ({', '.join(IMAGE_SUFFIXES)} are)"
    return FileError(name, reason, "rename (.jfif is .jpg), convert or remove it")


def matching(path: str | os.PathLike, kinds: Sequence[str], refused: Sequence[str] = (), below: bool = True) -> list[pathlib.Path]:
    """As `images`, of files whose names end in one of `kinds`; one that ends in one of `refused` is an error."""
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
