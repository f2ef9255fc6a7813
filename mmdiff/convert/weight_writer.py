"""Files of weights, written: safetensors in the layout of diffusers and transformers, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdiff.convert.tensors import BLOCK, Tensor
from mmdiff.convert.torch_tensors import DTYPES
from mmdiff.convert.weight_files import SAFETENSORS
from mmdiff.errors import UserError
from mmdiff.files import FileError, expand

SHARD = 5_000_000_000  # bytes of a file, as transformers has it
_CODES = {DTYPES[name]: code for code, name in SAFETENSORS.items()}


def write_weights(
    path: str | os.PathLike, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None, *, shard_size: int = SHARD
) -> list[pathlib.Path]:
    """Writes tensors such that diffusers, transformers and `safetensors.torch` read them.

    Args:
      path: a file that ends in .safetensors, or a folder, which gets `diffusion_pytorch_model.safetensors` where the config has a
        `_class_name` (diffusers), else `model.safetensors`; parts and an index of them where they are larger than `shard_size`.
      tensors: key -> Tensor or array.
      config: written as `config.json` beside the weights; of a folder only.
      shard_size: bytes of one part.

    Returns:
      What was written. All of it is there, or nothing is.

    Raises:
      UserError: there is something already; a type that safetensors does not have; the disk is full.
    """
    path = expand(path)
    tensors = {key: tensor if isinstance(tensor, Tensor) else Tensor.of(tensor) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise UserError(f"{key} is {tensor.dtype}, which safetensors files do not have: convert it before.")
    single = path.suffix == ".safetensors"
    if single and config is not None:
        raise UserError(f"a config.json lies in a folder of its own: give a folder, not {path}.")
    if os.path.lexists(path) and (single or not path.is_dir() or any(path.iterdir())):
        raise FileError(path, "is there already", "choose another name, or remove it")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if single:
            _write_file(partial, tensors)
            os.replace(partial, path)
            return [path]
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_folder(partial, tensors, config, shard_size)
        os.replace(partial, path)  # onto an empty folder, too
        return sorted(path.iterdir())
    except OSError as error:
        raise FileError(path, f"cannot be written ({error.strerror or error})", "check the disk, or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()


def _write_folder(folder: pathlib.Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, shard_size: int) -> None:
    stem = "diffusion_pytorch_model" if "_class_name" in (config or {}) else "model"
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_size
    for key, tensor in tensors.items():
        if shards[-1] and _bytes(tensor) > room:
            shards.append({})
            room = shard_size
        shards[-1][key] = tensor
        room -= _bytes(tensor)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    if len(shards) == 1:
        return _write_file(folder / f"{stem}.safetensors", tensors)
    by_key = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        by_key |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": by_key}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _bytes(tensor: Tensor) -> int:
    return tensor.size * tensor.dtype.itemsize


def _write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Numbers of the widest types come first, thus each tensor starts at a multiple of its type's size."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, transformers 4 refuses the file
    position = 0
    for key, tensor in ordered:
        end = position + _bytes(tensor)
        header[key] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            for part in _parts(tensor):
                # In row-major order, whatever the order in memory: most published tensors are transposed views of ours.
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _parts(tensor: Tensor):
    """A tensor by rows, some at a time."""
    if not tensor.ndim:
        yield tensor.read()
        return
    step = max(1, 4 * BLOCK // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for first in range(0, tensor.shape[0], step):
        yield tensor.read((slice(first, first + step),))
