"""Files of weights, read: a file or a folder gives its tensors by key, which are read on demand.

    *.safetensors                                   one file
    *.safetensors.index.json, *.bin.index.json      the parts of one, in the folder of the index
    .pt .pth .ckpt .bin                             what PyTorch has written, see `torch_files`
    a folder of diffusers or transformers           the one of these that it holds
    a folder of NAMEencoder.pth, NAMEdecoder.pth    both: keys "encoder....", "decoder...."

What a file is stands in its first bytes, not in its name. Nothing is executed, and nothing outside of the folder is opened.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from mmdiff.convert.tensors import Tensor, stored
from mmdiff.convert.torch_files import open_torch
from mmdiff.convert.torch_tensors import DTYPES
from mmdiff.files import FileError, expand, failed, is_folder, open_regular, parse_json, read_json

HEADER = 100_000_000  # bytes, as the format's own library has it
SAFETENSORS = {  # what a header calls a type
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile, before every key
COPY = "it is cut short or damaged, copy it again"

# The names of weights in a folder, the preferred ones first: safetensors, full precision, diffusers' and transformers' names.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
_NAME = re.compile(rf"({'|'.join(STEMS)})((?:\.\w+?)?)\.(safetensors|bin)(?:((?:\.\w+?)?)(\.index(?:\.\w+)?\.json))?")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def open_weights(path: str | os.PathLike, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file or folder, by key, without the prefix of a wrapper that trained them; each is read when it is used.

    Args:
      path: a file of weights, an index of several, or a folder with one of these.
      within: the sub-dictionary of a PyTorch checkpoint that is meant ("ema", "model", "state_dict", ...); by default see `open_torch`.

    Raises:
      Missing, FileError: there is none; it is damaged, of another kind, or could run something.

    >>> import tempfile
    >>> from mmdiff.convert.weight_writer import write_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_weights(f"{folder}/a.safetensors", {"proj.weight": np.ones((2, 3), np.float32)})
    ...     open_weights(f"{folder}/a.safetensors")["proj.weight"].read().sum()
    np.float32(6.0)
    """
    tensors: dict[str, Tensor] = {}
    halves = _halves(expand(path))
    for file, keys in weight_files(path).items():
        found = open_file(file, within)
        if file in halves:
            found = {f"{halves[file]}.{key}": tensor for key, tensor in found.items()}
        lacking = [key for key in keys or () if key not in found]
        if lacking:
            raise FileError(file, f"lacks {lacking[0][:80]!r}, which its index says it holds", COPY)
        tensors |= {key: found[key] for key in keys} if keys is not None else found
    if not tensors:
        raise FileError(path, "holds no tensors", "give a file of weights")
    for prefix in WRAPPERS + WRAPPERS:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def weight_files(path: str | os.PathLike) -> dict[pathlib.Path, list[str] | None]:
    """The files that hold the weights of a file, index or folder -> the keys that are meant, None for all. Raises as `open_weights`."""
    path = expand(path)
    if halves := _halves(path):
        return dict.fromkeys(halves)
    path = find_weights(path) if is_folder(path) else path
    if path.suffix != ".json":
        return {path: None}
    index = read_json(path)
    by_key = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(by_key, dict) or not by_key:
        raise FileError(path, 'is no index of weights (it has no "weight_map")', "give the folder or file of the weights")
    files: dict[pathlib.Path, list[str] | None] = {}
    for key, name in by_key.items():
        if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name.startswith(".") or not name:
            raise FileError(path, f"names {str(name)[:80]!r}, which is no file beside it", "get the weights from where they were published")
        files.setdefault(path.with_name(name), []).append(key)
    return files


def find_weights(folder: pathlib.Path) -> pathlib.Path:
    """The file or index of the weights in a folder.

    Raises:
      FileError: there is none, or several and none has one of the names that diffusers and transformers give.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise failed(folder, error) from error
    ranked = []
    for name in names:
        if match := _NAME.fullmatch(name):
            stem, before, kind, after, index = match.groups()
            variant = bool(before or after or (index or "").count(".") > 2)
            ranked.append((kind != "safetensors", variant, STEMS.index(stem), bool(index), name))
    if ranked:
        return folder / min(ranked)[-1]
    for suffixes in (SUFFIXES[:1], SUFFIXES[1:]):
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise FileError(folder, f"holds several files of weights ({', '.join(found[:5])})", "name one of them")
    raise FileError(folder, f"holds no weights ({', '.join(SUFFIXES)})", "give the folder or file of the weights")


def _halves(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """The two files of an autoencoder that was published in halves -> "encoder", "decoder"; none where a folder holds others."""
    try:
        files = [folder / name for name in sorted(os.listdir(folder)) if name.endswith(SUFFIXES)] if is_folder(folder) else []
    except OSError:  # `find_weights` says so
        return {}
    found = {file: part for file in files for part in ("encoder", "decoder") if file.stem.endswith(part)}
    stems = {file.stem.removesuffix(part) for file, part in found.items()}
    return found if len(files) == len(found) == 2 and len(stems) == 1 and len(set(found.values())) == 2 else {}


def open_file(path: pathlib.Path, within: str | None = None) -> dict[str, Tensor]:
    """As `open_weights`, of one file."""
    file = open_regular(path)
    try:
        return _tensors(path, file, within)
    except OSError as error:
        file.close()
        raise failed(path, error) from error
    except BaseException:
        file.close()
        raise


def _tensors(path: pathlib.Path, file: BinaryIO, within: str | None) -> dict[str, Tensor]:
    """The tensors of an open file, which stays open as long as one of them is used."""
    start = os.pread(file.fileno(), 16, 0)
    if start[:4] == b"PK\3\4" or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return open_torch(path, file, within)
    if start[8:9] == b"{":
        if within is not None:
            raise FileError(path, f"is a safetensors file, which has no {within!r} in it", "leave that out")
        return open_safetensors(path, file)
    if not start:
        raise FileError(path, "is an empty file", "copy it again")
    if start.startswith(b"version https:/"):
        raise FileError(path, "is a pointer of Git LFS, not the weights", "fetch them with `git lfs pull`")
    raise FileError(path, "is no file of weights that is read (safetensors, or PyTorch's .pt, .pth, .ckpt, .bin)", "give another file")


def open_safetensors(path: pathlib.Path, file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a safetensors file: eight bytes n, n bytes of JSON {key: {dtype, shape, data_offsets}}, the numbers."""
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", os.pread(file.fileno(), 8, 0))
    if length > min(HEADER, size - 8):
        raise FileError(path, f"is not a safetensors file that can be read (a header of {length:,} bytes in a file of {size:,})", COPY)
    header = parse_json(os.pread(file.fileno(), length, 8), path)
    start, tensors, spans = 8 + length, {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, key, entry)
        spans.append((begin, end, key))
        tensors[key] = stored(path, file, start + begin, dtype, shape)
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            raise _damaged(path, f"the numbers of {key[:80]!r} do not follow those before them")
        position = end
    if position != size - start:
        raise _damaged(path, f"its tensors have {position:,} bytes and the file has {size - start:,}")
    return tensors


def _entry(path: pathlib.Path, key: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape and the range of bytes that a header states for a tensor."""
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise _damaged(path, f"{key[:80]!r} is described without a type, shape or place")
    shape, offsets, name = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(name, str) or name not in SAFETENSORS:
        raise FileError(path, f"has {key[:80]!r} of the type {str(name)[:20]!r}, which is not read", "convert it to F32 or BF16")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(offsets) != 2 or len(shape) > 32:
        raise _damaged(path, f"{key[:80]!r} has a shape or place that is none")
    dtype = DTYPES[SAFETENSORS[name]]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise _damaged(path, f"{key[:80]!r} of the shape {str(shape)[:80]} does not have {offsets[1] - offsets[0]:,} bytes")
    return dtype, tuple(shape), *offsets


def _damaged(path: pathlib.Path, what: str) -> FileError:
    return FileError(path, f"is not a safetensors file that can be read ({what})", COPY)
