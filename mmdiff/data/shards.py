"""Encoded examples on disk: of each modality a `.npy` file a shard, which `numpy.load` opens anywhere.

    FOLDER/train/image-00000.npy   float16 [n, height, width, channels], latents as a model has them: (z - shift) * scale
    FOLDER/train/label-00000.npy   int32 [n]
    FOLDER/train/image-00001.npy   ...: shards of one length, of which the last, and those of damaged images, have fewer
    FOLDER/train/meta.json         written last: lengths, shapes, scale, classes and a SHA-256 of every shard
    FOLDER/val/...

Entries of meta.json that only some caches have: "moments", the modalities that are stored as mean and deviation, [n, height, width,
2 channels]; "encoders", what published networks have made the examples (`mmdiff.encoded_caches`); "images", the fingerprint of the
images; "names", of the classes; "statistics", of each stored channel of floats the mean and the standard deviation over all examples,
{name: {"count", "mean", "std"}}; "skipped", how many damaged images were left out, which skipped.jsonl lists; "of_image", how many
examples in a row are of one image, with its captions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath

SPLITS = ("train", "val", "test")  # the last of sets that are published with one
META, LENGTH = "meta.json", 2**15  # LENGTH examples in a shard, which is held in memory
ENTRIES = {  # of meta.json
    "lengths": list, "modalities": dict, "sha256": dict, "moments": list, "encoders": dict, "names": list, "statistics": dict,
    "of_image": int}
UNSTAMPED = ("name", "names", "norm", "decode", "encoder", "sentences", "tokenizer")  # what says how a modality is seen, and not what it is


def file_name(name: str, number: int) -> str:
    """The file of a modality's shard."""
    return f"{name}-{number:05d}.npy"


def write(folder: pathlib.Path | RemotePath, number: int, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Writes the files of one shard, each whole or absent; -> {file: SHA-256}."""
    for name, array in arrays.items():
        _write(folder / file_name(name, number), functools.partial(_save, np.ascontiguousarray(array)))
    return {file_name(name, number): sha256(array) for name, array in arrays.items()}


def write_meta(
    folder: pathlib.Path | RemotePath, modalities: Mapping[str, Any], lengths: Sequence[int], hashes: Mapping[str, str], **more: Any,
) -> None:
    """Writes meta.json, with which a split is finished."""
    meta = {"format": 1, "lengths": list(lengths), "modalities": stamp(modalities), "sha256": dict(hashes), **more}
    _write(folder / META, lambda stream: stream.write(json.dumps(meta, indent=1).encode()))


def is_encoded(folder: str | os.PathLike) -> bool:
    """Whether `EncodedCache` wrote a folder, and not the run of a tokenizer."""
    return any("encoders" in (read_meta(folder, split) or {}) for split in SPLITS)


def read_meta(folder: str | os.PathLike, split: str) -> dict[str, Any] | None:
    """What the meta.json of a split says; None where there is none that can be read (`LatentSource` says why)."""
    try:
        return checked_meta(files.read_json(files.target(folder) / split / META))
    except (files.FileError, ValueError):
        return None


def checked_meta(found: Any) -> dict[str, Any]:
    """The values of a meta.json. Raises ValueError for those of another format or kind than are written."""
    if not isinstance(found, dict) or found.get("format", 1) != 1:
        raise ValueError("it is not of format 1")
    for name, kind in ENTRIES.items():
        value = found.get(name, kind())
        if not isinstance(value, kind) or name in ("modalities", "encoders") and not all(isinstance(each, dict) for each in value.values()):
            raise ValueError(f"its {name} are {str(value)[:60]}")
    return found


def stamp(modalities: Mapping[str, Any]) -> dict[str, dict]:
    """What a cache and a config must agree on: sizes, scale, the number of classes."""
    return {
        name: {
            field.name: value for field in dataclasses.fields(modality)
            if field.name not in UNSTAMPED and (value := getattr(modality, field.name)) is not None}
        for name, modality in modalities.items()}  # fmt: skip


def pack(array: np.ndarray, name: str) -> np.ndarray:
    """An array as a shard has it: floats as float16. Raises UserError for values that do not fit."""
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        packed = array.astype(np.float16)
    if not np.isfinite(packed).all():
        raise UserError(f"{name}: values up to {np.abs(array).max():g} do not fit float16: scale the latents to about unit deviation.")
    return packed


def sample_moments(moments: np.ndarray, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """mean + deviation * noise of moments float32 [n, ..., 2c] -> [n, ..., c]; the noise is a function of (epoch, index) alone.

    >>> moments = np.concatenate([np.full((2, 1, 1, 3), 5.0), np.zeros((2, 1, 1, 3))], -1)
    >>> sample_moments(moments, np.arange(2), np.zeros(2, int))[0].tolist()
    [[[5.0, 5.0, 5.0]]]
    """
    mean, deviation = np.split(moments, 2, axis=-1)
    noise = np.empty(mean.shape, np.float32)
    for row, index, epoch in zip(noise, indices.tolist(), epochs.tolist()):
        np.random.Generator(np.random.Philox(key=np.array([epoch, index], np.uint64))).standard_normal(out=row, dtype=np.float32)
    return mean + deviation * noise


Moments = tuple[int, np.ndarray, np.ndarray]  # of numbers by channel: how many, their mean [c], their summed squared deviations [c]


def channel_moments(array: np.ndarray) -> Moments:
    """Of an array [..., c], in float64.

    >>> channel_moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
    (2, array([2., 5.]), array([2., 0.]))
    """
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
    mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
    return len(rows), mean, ((rows - mean) ** 2).sum(0)


def merged(parts: Sequence[Moments]) -> Moments:
    """Of the numbers of all parts together, which nothing cancels (Chan et al. 1979)."""
    (count, mean, squares), *rest = [(count, np.asarray(mean, np.float64), np.asarray(squares)) for count, mean, squares in parts]
    for more, other, its_squares in rest:
        both, shift = max(count + more, 1), other - mean
        count, mean, squares = count + more, mean + shift * (more / both), squares + its_squares + shift**2 * (count * more / both)
    return count, mean, squares


def sha256(array: np.ndarray) -> str:
    """Of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def _save(array: np.ndarray, stream: Any) -> None:
    """As `numpy.save`, which does not say that the disk is full."""
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    stream.write(array.data)


def _write(path: pathlib.Path | RemotePath, write: Any) -> None:
    with files.whole(path) as draft, draft.open("wb") as stream:
        write(stream)
