"""A cache of latents on disk, read by memory map: any example by its number, from any number of processes, without a library.

`mmdiff.data.shards` describes the files: FOLDER/train and FOLDER/val, of each modality a `.npy` file a shard. `mmdiff cache` writes them
with a published autoencoder (`mmdiff.data.encoded`), `write_latents` whatever else has made latents. FOLDER is a local disk, a mount
(gcsfuse with its file cache on, NFS), or an address (gs://bucket/folder), of which every machine makes itself a copy; 32 x 32 x 4 latents
take 8 KiB an example, ImageNet 10 GiB. For DiT's horizontal flips the mirrored images are encoded too, as examples of their own: an epoch
is then twice as long, and each example comes once in it.

A cache may hold the moments of latents, mean and deviation, in the place of latents: then every epoch sees another sample of each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmdiff import files
from mmdiff.data import arrays, shards
from mmdiff.data.shards import META
from mmdiff.data.sources import Source, check_range, digest, made_up
from mmdiff.errors import UserError

IMAGENET = 1_281_167  # training examples, and as many made-up ones


def write_latents(
    folder: str | os.PathLike,
    split: str,
    batches: Iterable[Mapping[str, Any]],
    modalities: Mapping[str, Any],
    shard: int = shards.LENGTH,
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
    target = files.target(folder) / split
    if (target / META).exists():
        raise UserError(f"{target} holds a finished cache: remove it first, or write elsewhere.")
    target.mkdir(parents=True, exist_ok=True)
    waiting: dict[str, list] = {name: [] for name in modalities}
    lengths, hashes, ready = [], {}, 0

    def flush(count):
        joined = {name: np.concatenate(parts) for name, parts in waiting.items()}
        hashes.update(shards.write(target, len(lengths), {name: array[:count] for name, array in joined.items()}))
        waiting.update({name: [array[count:]] for name, array in joined.items()})
        lengths.append(count)
        return ready - count

    for batch in batches:
        packed = {name: shards.pack(modality.check(batch[name]), name) for name, modality in modalities.items()}
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
    shards.write_meta(target, modalities, lengths, hashes)
    return sum(lengths)


class LatentSource:
    """A `Source` of one split of a cache: floats as float32, integers as int32. Opening it reads the labels, but no latents.

    Of moments an example is the sample mean + deviation * noise, whose noise is a function of (example, epoch); `take` has epoch 0.

    Args:
      folder, split: as in `write_latents`.
      modalities: what the config expects: name -> `Latents`, `Labels`.

    Attributes:
      names: of the classes. of_image: how many examples in a row are of one image, with its captions.

    Raises:
      UserError: a missing or unfinished cache, one of other modalities, shapes or scale, a shard that is missing or cut short, a
        label out of range; from `take`, latents that are not finite.
    """

    def __init__(self, folder: str | os.PathLike, split: str, modalities: Mapping[str, Any]):
        self._path = files.target(folder) / split
        try:
            self._meta = shards.checked_meta(files.read_json(self._path / META))
            lengths, found = self._meta["lengths"], dict(self._meta["modalities"])
            self._ends = np.cumsum(np.array(lengths, np.int64))
            if not any(lengths) or min(lengths) < 0:
                raise ValueError(f"lengths {lengths}")
        except files.Missing:
            what = "is not finished (it has no meta.json)" if files.is_folder(self._path) else "does not exist"
            raise UserError(f"the latent cache {self._path} {what}: write it with mmdiff cache (the config's head says how).") from None
        except files.FileError as error:
            raise UserError(f"{self._path / META} cannot be read (it {error.reason}): write the cache again.") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{self._path / META} cannot be read ({error!r}): write the cache again.") from error
        self._path = files.expand(self._path)
        encoded, self._moments = "encoders" in self._meta, self._meta.get("moments", [])
        self.names = tuple(self._meta.get("names", ()))  # of the classes
        self.of_image = max(1, self._meta.get("of_image", 1))
        for name, expected in shards.stamp(modalities).items():
            scale = {"scale": found[name]["scale"]} if encoded and "scale" in expected and name in found else {}  # the encoder's
            if found.get(name) != expected | scale:
                raise UserError(f"the latent cache {self._path} holds {name}={found.get(name)}, but the config needs {expected}.")
        self._shards = {
            name: [self._open(name, i, (n, *self._stored(name, modality))) for i, n in enumerate(lengths)]
            for name, modality in modalities.items()
        }
        self._tokens = {}
        for name, parts in self._shards.items():
            if parts[0].dtype.kind == "i" and parts[0].ndim == 1:
                modalities[name].check(np.concatenate(parts))
            elif parts[0].dtype.kind == "i":
                self._tokens[name] = modalities[name]  # too large to be read whole

    def __len__(self):
        return int(self._ends[-1])

    def take(self, indices):
        return self.take_in_epochs(indices, np.zeros(np.shape(indices), np.int64))

    def take_in_epochs(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """As `take`, of moments the samples of these epochs [n]."""
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        which = np.searchsorted(self._ends, indices, side="right")
        places = [(shard, np.flatnonzero(which == shard)) for shard in np.unique(which)]
        result = {}
        for name, parts in self._shards.items():
            dtype = np.float32 if parts[0].dtype.kind == "f" else parts[0].dtype
            out = result[name] = np.empty((len(indices), *parts[0].shape[1:]), dtype)
            for shard, rows in places:
                out[rows] = parts[shard][indices[rows] - (self._ends[shard] - len(parts[shard]))]
            if out.dtype.kind == "f" and not np.isfinite(out.sum()):  # one pass, no second array
                bad = indices[~np.isfinite(out.reshape(len(out), -1).sum(1))][0]
                raise UserError(f"{name} {bad} in {self._path} is not finite: the copy is damaged, recreate it.")
            if name in self._tokens and len(out):
                self._tokens[name].check(out)
            if name in self._moments:
                result[name] = shards.sample_moments(out, indices, epochs)
        return result

    def fingerprint(self):
        names = [shards.file_name(name, i) for name, parts in sorted(self._shards.items()) for i in range(len(parts))]
        return digest(len(self), {file: self._meta.get("sha256", {}).get(file) for file in names})

    def verify(self) -> None:
        """Reads everything and compares it with what was written; UserError names the first damaged shard."""
        for name, parts in self._shards.items():
            for i, array in enumerate(parts):
                if shards.sha256(array) != self._meta["sha256"][shards.file_name(name, i)]:
                    raise UserError(f"{self._path / shards.file_name(name, i)} is not what was written: copy it again.")

    def _stored(self, name: str, modality: Any) -> tuple[int, ...]:
        """The shape of an example in the files: of moments twice as many channels."""
        return (*modality.shape[:-1], 2 * modality.shape[-1]) if name in self._moments else modality.shape

    def _open(self, name: str, index: int, shape: tuple[int, ...]) -> np.ndarray:
        path = self._path / shards.file_name(name, index)
        try:
            array = arrays.read_array(path, mmap=shape[0] > 0)
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
            "config.data.dir is empty: name the folder of a latent cache (the config's head says how to write one), "
            "or try the config out on made-up latents with config.data.source=random."
        )
    if data.source == "tfds":
        raise UserError(
            "images from TFDS (imagenet2012) must be encoded first: write their latents with mmdiff cache (config.data.set=imagenet2012), "
            "then set config.data.source=latents and config.data.dir to the folder."
        )
    raise UserError(f"config.data.source is {data.source!r}: choose latents, random or tfds.")
