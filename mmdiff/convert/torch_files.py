"""Checkpoints that PyTorch has written (.pt, .pth, .ckpt, .bin), in their zip and in their older form, without PyTorch.

Only tensors and the containers around them are built, by our own interpreter of pickles: a file cannot run anything. Classes and functions
that are not known are left out where they lie beside the weights (a trainer's callbacks, hyperparameters) and refused, by name, where they
lie among them. What a tensor claims is checked against what the file holds before anything is read; the values are read on demand.
"""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zipfile
from typing import Any, BinaryIO

from mmdiff.convert.tensors import Tensor
from mmdiff.convert.torch_tensors import Storages, View
from mmdiff.convert.unpickle import Damaged, Known, Unknown, unpickle
from mmdiff.files import FileError

# Where a checkpoint of a training run has its weights, the wanted ones first.
SUBDICTIONARIES = ("ema", "model_ema", "model_ema1", "state_dict_ema", "params_ema", "state_dict", "model", "params", "module", "net")
PICKLE = 2**26  # bytes of all that is not a tensor's values
MAGIC = 0x1950A86A20F9469CFC6C  # of the older form
SAFER = "copy it again, or convert it to safetensors where it comes from"


def open_torch(path: pathlib.Path, file: BinaryIO, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state dict, by key.

    Args:
      file: the open file; it stays open as long as a tensor of it is used.
      within: the sub-dictionary, by its name ("a/b" for one in another). By default the first of SUBDICTIONARIES that holds tensors, else
        the whole, else the only sub-dictionary that does. "" is a tensor that is all of the file: {"": tensor}.

    Raises:
      FileError: it is no such file, damaged, a program, or holds something else among the weights.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        start = os.pread(file.fileno(), 4, 0)
        content = (_read_zip if start == b"PK\3\4" else _read_older)(file, size)
        chosen = _choose(content, within)
        wrong = [(key, value) for key, value in chosen.items() if isinstance(value, (Unknown, Known))]
        if wrong:
            raise Damaged(f"it has {wrong[0][1].name[:80]} for {str(wrong[0][0])[:60]!r} among its weights, which is no tensor")
        views = {key: value for key, value in chosen.items() if isinstance(value, View)}
        odd = [key for key in views if not isinstance(key, str)]
        if odd:
            raise Damaged(f"it has a tensor under {repr(odd[0])[:60]}, which is no name")
        return {key: view.tensor(path, file) for key, view in views.items()}
    except FileError:
        raise
    except (Damaged, struct.error, OSError) as error:
        what = str(error) if isinstance(error, Damaged) else "it is cut short or damaged"
        raise FileError(path, f"is not a PyTorch checkpoint that can be read: {what}", SAFER) from error


def _choose(content: Any, within: str | None) -> dict:
    """The sub-dictionary of the weights."""

    def holds(value):
        return isinstance(value, dict) and any(isinstance(item, View) for item in value.values())

    if within == "" and isinstance(content, View):
        return {"": content}
    if not isinstance(content, dict):
        what = f"pickled {content.name[:80]}" if isinstance(content, (Unknown, Known)) else type(content).__name__
        raise Damaged(f"it is a {'single tensor' if isinstance(content, View) else what}, not a dictionary of tensors")
    if within is not None:
        for name in (within,) if within in content else within.split("/"):
            if not isinstance(content, dict) or name not in content:
                held = ", ".join(str(key)[:40] for key in list(content)[:10]) if isinstance(content, dict) else ""
                raise Damaged(f"it has no {within!r} (it holds {held or 'no dictionary there'})")
            content = content[name]
        if not holds(content):
            raise Damaged(f"its {within!r} is no dictionary of tensors")
        return content
    for name in SUBDICTIONARIES:
        if holds(content.get(name)):
            return content[name]
    if holds(content):
        return content
    several = [name for name, value in content.items() if holds(value)]
    if len(several) == 1:
        return content[several[0]]
    if several:
        raise Damaged(f"it has several dictionaries of tensors, name one: {', '.join(str(name)[:40] for name in several[:10])}")
    unread = [value.name for value in content.values() if isinstance(value, Unknown)]
    raise Damaged(f"it holds no tensors{f' that are read ({unread[0][:60]})' if unread else ''}")


# ------------------------------------------------------------------------------------------------------------------- the two forms


def _read_zip(file: BinaryIO, size: int) -> Any:
    """The content of the zip form: ARCHIVE/data.pkl and the storages ARCHIVE/data/KEY, none of them compressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    except Exception as error:  # whatever a damaged directory can raise
        raise Damaged("it is cut short or damaged") from error
    inside = {entry.filename.partition("/")[2]: entry for entry in entries}
    if len(inside) != len(entries) or len({entry.filename.partition("/")[0] for entry in entries}) != 1:
        raise Damaged("it is a zip file of another kind")
    if any(name.startswith("code/") or name == "constants.pkl" for name in inside):
        raise Damaged("it is a TorchScript program, not a state dict")
    if "data.pkl" not in inside:
        raise Damaged("it is a zip file of another kind")

    def find(name):
        entry = inside[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise Damaged(f"it has a compressed or encrypted part ({name[:60]}), as PyTorch writes none")
        header = os.pread(file.fileno(), 30, entry.header_offset) if entry.header_offset >= 0 else b""
        signature, lengths = struct.unpack("<4s22x2H", header)[0], struct.unpack("<4s22x2H", header)[1:]
        offset = entry.header_offset + 30 + sum(lengths)
        if signature != b"PK\3\4" or offset + entry.file_size > size:
            raise Damaged("it is cut short or damaged")
        return offset, entry.file_size

    def text(name, limit):
        offset, length = find(name)
        if length > limit:
            raise Damaged(f"its {name} has {length:,} bytes")
        return os.pread(file.fileno(), length, offset)

    if "byteorder" in inside and text("byteorder", 20) != b"little":
        raise Damaged("it was written on a big-endian machine")
    storages = Storages()
    content = unpickle(io.BytesIO(text("data.pkl", PICKLE)), storages.known, storages.refer)
    for key, storage in storages.by_key.items():
        if f"data/{key}" not in inside:
            raise Damaged(f"it lacks the storage {key[:40]!r}")
        storage.offset, length = find(f"data/{key}")
        if length != storage.bytes:
            raise Damaged(f"its storage {key[:40]!r} has {length:,} bytes for {storage.bytes:,}")
    if sum(storage.bytes for storage in storages.by_key.values()) > size:
        raise Damaged("it claims more than it holds")
    return content


def _read_older(file: BinaryIO, size: int) -> Any:
    """The content of the older form: five pickles (a number, a version, the machine, the content, the keys), then the storages."""
    start = os.pread(file.fileno(), PICKLE, 0)
    if start[:1] != b"\x80":
        raise Damaged("it is a tar file of the first PyTorch versions" if start[257:262] == b"ustar" else "it is a file of another kind")
    stream, storages = io.BytesIO(start), Storages()
    if unpickle(stream, {}) != MAGIC or unpickle(stream, {}) != 1001:
        raise Damaged("it is a file of another kind")
    machine = unpickle(stream, {})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Damaged("it was written on a big-endian machine")
    content = unpickle(stream, storages.known, storages.refer)
    keys, position = unpickle(stream, {}), stream.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages.by_key):
        raise Damaged("it has other storages than its tensors use")
    for key in keys:
        storage = storages.by_key[key]
        if os.pread(file.fileno(), 8, position) != struct.pack("<q", storage.count):
            raise Damaged(f"its storage {key[:40]!r} has another size than its tensors use, or is cut short")
        storage.offset = position + 8
        position = storage.offset + storage.bytes
        if position > size:
            raise Damaged("it is cut short or damaged")
    return content
