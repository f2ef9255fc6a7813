"""A cache of latents on disk, read by memory map: any example by its number, from any number of processes, without a library.

    FOLDER/train/image-00000.npy   float16 [n, height, width, channels], the autoencoder's latents times `Latents.scale`
    FOLDER/train/label-00000.npy   int32 [n]
    FOLDER/train/image-00001.npy   ...: shards of one length, only the last may be shorter
    FOLDER/train/meta.json         written last: lengths, shapes, scale, classes and a SHA-256 of every shard
    FOLDER/val/...

One `.npy` file per modality and shard, so `numpy.load` opens a shard anywhere. FOLDER is a local disk or a mount (gcsfuse with its
file cache on, NFS); 32 x 32 x 4 latents take 8 KiB an example, ImageNet 10 GiB. For DiT's horizontal flips encode the flipped
images too and write them as examples of their own: an epoch is then twice as long, and each example comes once in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import arrays
from mmdiff.data.sources import Source, check_range, digest, made_up
from mmdiff.errors import UserError

META = "meta.json"
IMAGENET = 1_281_167  # training examples, and as many made-up ones


def write_latents(
    folder: str | os.PathLike,
    split: str,
    batches: Iterable[Mapping[str, Any]],
    modalities: Mapping[str, Any],
    shard: int = 2**15,
) -> int:
    """Writes FOLDER/SPLIT and returns the number of examples. Every file is whole or absent, and meta.json comes last.

        write_latents("latents/imagenet256", "train", batches, {"image": Latents(32, 32, 4), "label": Labels(1000)})

    An interrupted call leaves a folder that no reader takes for a cache; the same call again writes it again.

    Args:
      folder, split: where; "train" and "val" are what the configs read.
      batches: dicts of arrays [n, ...] by modality, of any length n; latents already scaled.
      modalities: name -> `Latents`, `Labels`, `Features`: what checks the arrays. Floats are stored as float16, integers as int32.
      shard: examples in a file. One shard is held in memory.

    Raises:
      UserError: the split is there already, nothing to write, or arrays that are no such examples.
    """
    target = _path(folder) / split
    if (target / META).exists():
        raise UserError(f"{target} holds a finished cache: remove it first, or write elsewhere.")
    target.mkdir(parents=True, exist_ok=True)
    waiting: dict[str, list] = {name: [] for name in modalities}
    lengths, hashes, ready = [], {}, 0

    def flush(count):
        for name, parts in waiting.items():
            joined = np.concatenate(parts)
            file = _shard(name, len(lengths))
            _write(target / file, lambda stream, rows=joined[:count]: np.save(stream, rows))
            hashes[file] = hashlib.sha256(np.ascontiguousarray(joined[:count])).hexdigest()
            waiting[name] = [joined[count:]]
        lengths.append(count)
        return ready - count

    for batch in batches:
        packed = {name: _pack(modality.check(batch[name]), name) for name, modality in modalities.items()}
        if len({len(array) for array in packed.values()}) != 1:
            raise UserError(f"a batch for {target} has arrays of different lengths: { {n: len(a) for n, a in packed.items()} }.")
        for name, array in packed.items():
            waiting[name].append(array)
        ready += len(array)
        while ready >= shard:
            ready = flush(shard)
    if ready:
        flush(ready)
    if not lengths:
        raise UserError(f"there is nothing to write to {target}: the batches are empty.")
    meta = {"format": 1, "lengths": lengths, "modalities": _stamp(modalities), "sha256": hashes}
    _write(target / META, lambda stream: stream.write(json.dumps(meta, indent=1).encode()))
    return sum(lengths)


class LatentSource:
    """A `Source` of one split of a cache: floats as float32, integers as int32. Opening it reads the labels, but no latents.

    Args:
      folder, split: as in `write_latents`.
      modalities: what the config expects: name -> `Latents`, `Labels`.

    Raises:
      UserError: a missing or unfinished cache, one of other modalities, shapes or scale, a shard that is missing or cut short, a
        label out of range; from `take`, latents that are not finite.
    """

    def __init__(self, folder: str | os.PathLike, split: str, modalities: Mapping[str, Any]):
        self._path = _path(folder) / split
        try:
            self._meta = files.read_json(self._path / META)
            lengths, found = self._meta["lengths"], dict(self._meta["modalities"])
            self._ends = np.cumsum(np.array(lengths, np.int64))
            if not lengths or min(lengths) < 1:
                raise ValueError(f"lengths {lengths}")
        except files.Missing:
            what = "is not finished (it has no meta.json)" if os.path.isdir(self._path) else "does not exist"
            raise UserError(f"the latent cache {self._path} {what}: write it with mmdiff.data.latents.write_latents.") from None
        except files.FileError as error:
            raise UserError(f"{self._path / META} cannot be read (it {error.reason}): write the cache again.") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{self._path / META} cannot be read ({error!r}): write the cache again.") from error
        for name, expected in _stamp(modalities).items():
            if found.get(name) != expected:
                raise UserError(f"the latent cache {self._path} holds {name}={found.get(name)}, but the config needs {expected}.")
        self._shards = {
            name: [self._open(name, i, (n, *modality.shape)) for i, n in enumerate(lengths)] for name, modality in modalities.items()
        }
        for name, shards in self._shards.items():
            if shards[0].dtype.kind == "i":
                modalities[name].check(np.concatenate(shards))

    def __len__(self):
        return int(self._ends[-1])

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        which = np.searchsorted(self._ends, indices, side="right")
        places = [(shard, np.flatnonzero(which == shard)) for shard in np.unique(which)]
        result = {}
        for name, shards in self._shards.items():
            dtype = np.float32 if shards[0].dtype.kind == "f" else shards[0].dtype
            out = result[name] = np.empty((len(indices), *shards[0].shape[1:]), dtype)
            for shard, rows in places:
                out[rows] = shards[shard][indices[rows] - (self._ends[shard] - len(shards[shard]))]
            if out.dtype.kind == "f" and not np.isfinite(out.sum()):  # one pass, no second array
                bad = indices[~np.isfinite(out.reshape(len(out), -1).sum(1))][0]
                raise UserError(f"{name} {bad} in {self._path} is not finite: the copy is damaged, recreate it.")
        return result

    def fingerprint(self):
        shards = [_shard(name, i) for name, shards in sorted(self._shards.items()) for i in range(len(shards))]
        return digest(len(self), {file: self._meta.get("sha256", {}).get(file) for file in shards})

    def verify(self) -> None:
        """Reads everything and compares it with what was written; UserError names the first damaged shard."""
        for name, shards in self._shards.items():
            for i, array in enumerate(shards):
                if hashlib.sha256(array).hexdigest() != self._meta["sha256"][_shard(name, i)]:
                    raise UserError(f"{self._path / _shard(name, i)} is not what was written: copy it again.")

    def _open(self, name: str, index: int, shape: tuple[int, ...]) -> np.ndarray:
        path = self._path / _shard(name, index)
        try:
            array = arrays.read_array(path, mmap=True)
        except files.FileError as error:
            why = f"missing or cut short (it {error.reason})"
            raise UserError(f"the shard {path} is {why}: copy it again, or write the cache again.") from error
        if array.dtype not in (np.float16, np.int32) or array.shape != shape:
            raise UserError(f"the shard {path} holds {array.dtype} {list(array.shape)}, not {list(shape)}: write the cache again.")
        return array


def open_source(data: Any, split: str, modalities: Mapping[str, Any]) -> Source:
    """The examples that a config's `data` section names: {"source": "latents", "dir": FOLDER} or {"source": "random"}.

    Args:
      data: the section; "random" makes examples up and needs no folder.
      split: "train" or "val".
      modalities: name -> `Latents`, `Labels`.

    Raises:
      UserError: another source, or what `LatentSource` refuses. "tfds" is one: images need an autoencoder before they are latents.
    """
    if data.source == "random":
        return made_up(modalities, split, IMAGENET)
    if data.source == "latents" and data.dir:
        return LatentSource(data.dir, split, modalities)
    if data.source == "latents":
        raise UserError(
            "config.data.dir is empty: name the folder of a latent cache (mmdiff/data/latents.py says how to write one), "
            "or try the config out on made-up latents with config.data.source=random."
        )
    if data.source == "tfds":
        raise UserError(
            "images from TFDS (imagenet2012) must be encoded first: write their latents with mmdiff.data.latents.write_latents, "
            "then set config.data.source=latents and config.data.dir to the folder."
        )
    raise UserError(f"config.data.source is {data.source!r}: choose latents, random or tfds.")


def _shard(name: str, index: int) -> str:
    return f"{name}-{index:05d}.npy"


def _path(folder: str | os.PathLike) -> pathlib.Path:
    if "://" in str(folder):
        raise UserError(f"latents are read from a folder, not from {folder}: mount the bucket (gcsfuse), or copy it to a disk.")
    return files.expand(folder)


def _stamp(modalities: Mapping[str, Any]) -> dict[str, dict]:
    """What a cache and a config must agree on: sizes, scale, the number of classes."""
    fields = {name: dataclasses.asdict(modality) for name, modality in modalities.items()}
    return {
        name: {key: value for key, value in of.items() if key not in ("name", "names", "norm") and value is not None}
        for name, of in fields.items()
    }


def _pack(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        packed = array.astype(np.float16)
    if not np.isfinite(packed).all():
        raise UserError(f"{name}: values up to {np.abs(array).max():g} do not fit float16: scale the latents to about unit deviation.")
    return packed


def _write(path: pathlib.Path, write: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        write(stream)
    os.replace(partial, path)
