"""Arrays in files, .npy, .npz and pickled: what a header claims is checked before memory is asked for, and nothing is ever executed."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from mmdiff.files import FileError, expand, open_regular, read_bytes

SAVE = "save it with numpy.save or numpy.savez"
HEADER = 2000  # characters: 64 dimensions of 20 digits, and no table of fields
RATIO = 1100  # the most that deflate can shrink
OPERATIONS = 100_000  # of a pickle; a few arrays need some hundred


def read_array(path: str | os.PathLike, name: str | None = None, mmap: bool = False) -> np.ndarray:
    """The array in a `.npy` file, or the entry `name` (else the only one) of a `.npz` file.

    Args:
      path: the file; which of the two it is stands in its first bytes.
      name: of the entry.
      mmap: read a `.npy` file when it is used, not now.

    Raises:
      Missing, FileError: as `files.open_regular`; no such file of NumPy's, one that is cut short or claims more than is there, one that is
        larger than the memory, objects that would have to be unpickled, no such entry.
    """
    path = expand(path)
    with open_regular(path) as file:
        start = file.read(2)
        file.seek(0)
        if start == b"PK":
            entries = _Entries(file, path)
            if name not in entries and len(entries) != 1:
                held = ", ".join(entries) or "nothing"
                raise FileError(path, f"has no entry {name!r}: it holds {held[:100]}", "choose another file, or name the entry so")
            return entries[name if name in entries else next(iter(entries))]
        with _refusals(path):
            _check(file, os.fstat(file.fileno()).st_size, path, mmap)
            if mmap:
                return np.load(path, mmap_mode="r", allow_pickle=False)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All entries of a `.npz` file. Raises as `read_array`."""
    path = expand(path)
    with open_regular(path) as file:
        return dict(_Entries(file, path))


@contextlib.contextmanager
def _refusals(path: Any) -> Iterator[None]:
    """What NumPy and zipfile raise for a damaged file becomes a FileError."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        what = (str(error).splitlines() or [""])[0][:80].rstrip(".") or type(error).__name__
        raise FileError(path, f"is not a NumPy file that can be read ({what})", SAVE) from error


class _Entries(Mapping):
    """The arrays of a `.npz` file by name, read when they are asked for."""

    def __init__(self, file: BinaryIO, path: Any):
        self._path, self._size = path, os.fstat(file.fileno()).st_size
        with _refusals(path):
            self._zip = zipfile.ZipFile(file)
            infos = [info for info in self._zip.infolist() if not info.is_dir()]
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) != len(infos):
            raise FileError(path, "is not a NumPy file that can be read (it has two entries of one name)", SAVE)

    def __len__(self):
        return len(self._infos)

    def __iter__(self):
        return iter(self._infos)

    def __getitem__(self, name):
        info = self._infos[name]
        with _refusals(self._path):
            if info.compress_size > self._size or info.file_size > RATIO * info.compress_size + 1000:
                raise _claims(self._path, info.file_size, self._size)
            with self._zip.open(info) as stream:
                _check(stream, info.file_size, self._path)
            with self._zip.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)


def _check(stream: BinaryIO, size: int, path: Any, mmap: bool = False) -> None:
    """Raises FileError unless what the header at the start of `size` bytes says is there and can be read."""
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise FileError(path, f"is not a NumPy file that can be read (it has the format {version[0]}.{version[1]})", SAVE)
    shape, _, dtype = headers[version](stream, max_header_size=HEADER)
    if dtype.hasobject:
        reason = "is not a NumPy file that can be read (it holds Python objects, which could run anything when unpickled)"
        raise FileError(path, reason, "save plain numbers")
    bytes_of_it = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or bytes_of_it > size - stream.tell():
        raise _claims(path, bytes_of_it, size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if bytes_of_it > memory and not mmap:
        raise FileError(path, f"needs {bytes_of_it / 2**30:,.0f} GiB of the {memory / 2**30:,.0f} GiB of memory", "split it")


def _claims(path: Any, claimed: int, size: int) -> FileError:
    reason = f"is not a NumPy file that can be read (it says that it holds {claimed:,} bytes and has {size:,})"
    return FileError(path, reason, "it is cut short or damaged, copy it again")


# ------------------------------------------------------------------------------------------------------------------------ pickles


def read_pickled_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays and numbers in a pickled dictionary, by name, as float64; nothing else is unpickled, and what else it holds is left out.

    Raises:
      Missing, FileError: as `files.open_regular`; a file that is anything else.
    """
    path = expand(path)
    content = read_bytes(path)
    try:
        _check_size(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arrays that an old numpy has pickled
            stored = _Arrays(io.BytesIO(content), encoding="latin1").load()
        kinds = (np.ndarray, np.number, int, float)
        kept = {name: value for name, value in stored.items() if str(name).isprintable() and isinstance(value, kinds)}
        return {name: np.asarray(value, np.float64) for name, value in kept.items()}
    except Exception as error:  # whatever a damaged pickle can raise
        raise FileError(path, f"is no pickle of arrays ({(str(error).splitlines() or [''])[0][:80]})", "copy it again") from error


class _Arrays(pickle.Unpickler):
    """Unpickles arrays, numbers and what holds them, and nothing else: any other name in a pickle is refused before it is looked up."""

    # What pickled arrays call: the modules' names differ between versions of numpy.
    ADMITTED = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.empty(0).__reduce__()[0],
        "_frombuffer": np.empty(1).__reduce_ex__(5)[0],
        "scalar": np.float64(0).__reduce__()[0],
        "encode": str.encode,  # bytes, in an old pickle
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ADMITTED or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ADMITTED[name]


def _check_size(content: bytes) -> None:
    """Raises ValueError for a pickle whose tuples, written out, are too large to be hashed, however few bytes say them."""
    mark, memo, stack = object(), {}, []
    for number, (code, argument, _) in enumerate(pickletools.genops(content)):
        before, popped = code.stack_before, []
        if pickletools.markobject in before:
            while stack[-1] is not mark:
                popped.append(stack.pop())
            stack.pop()
            before = before[: before.index(pickletools.markobject)]
        popped += [stack.pop() for _ in before]
        weight = 1 + sum(popped) if code.name.startswith("TUPLE") else 1
        if number > OPERATIONS or weight > OPERATIONS:
            raise ValueError("it holds more than a few arrays")
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = popped[0]
        if code.name == "MARK":
            stack.append(mark)
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            stack += [popped[0] if code.name in ("DUP", "MEMOIZE") else weight] * len(code.stack_after)
