"""Images (and captions) as published encoders see them: a source that encodes, and the cache that `mmdiff cache` writes of it.

    FOLDER/train, FOLDER/val     as `mmdiff.data.shards` has them, of images in folders of classes, with captions, or of a TFDS set
    FOLDER/codes.json            where a tokenizer's codebook is used in part: its entries

The training images are encoded twice, as they are and mirrored. A split is written under another name and renamed when it is complete;
after an interruption the same call continues at the first shard that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff import console, files
from mmdiff.data import drafts, image_datasets, shards
from mmdiff.data.modalities import Latents
from mmdiff.data.named_autoencoders import CODES, ImageTokens, read_codes
from mmdiff.data.named_encoders import NamedEncoder, prepared
from mmdiff.data.network_cache import network_fingerprint
from mmdiff.data.sources import Source, check_range, digest
from mmdiff.data.stored_images import Records, UndamagedReader
from mmdiff.errors import UserError

BATCH = 256  # images that are in memory at once
SHARD = 2**30  # bytes of a shard, about
COUNTED = 50_000  # training images, evenly spread, whose codes are counted


class Encoded:
    """A `Source` of what encoders make of images: the arrays of their modalities, and label where the images have classes.

    Example i is image i // (2 k), with its caption i // 2 mod k, mirrored where i is odd; k is 1 unless captions are encoded, and without
    `mirrored` an image comes once a caption. An image or caption that occurs several times in a batch is encoded once.

    Args:
      records: the images, as they are stored.
      encoders: of images and captions.
      mirrored: whether the mirror images are examples, too.
      damaged: the share of images that may be damaged, see `stored_images.UndamagedReader`.

    Attributes:
      names: of the classes, by label; none where there are no classes.
    """

    def __init__(self, records: Records, encoders: Sequence[NamedEncoder], mirrored: bool = False, damaged: float = 0.0):
        self._records, self._encoders, self._times, self.names = records, encoders, 1 + mirrored, tuple(records.names)
        self._reader = UndamagedReader(records, damaged)
        with_captions = any(encoder.of == "caption" for encoder in encoders)
        if with_captions and not records.captions:
            raise UserError("the images have no captions, which the config needs: see mmdiff/data/image_folders.py and config.data.set.")
        self._captions = records.captions if with_captions else 1

    def __len__(self):
        return len(self._records) * self._captions * self._times

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        pairs, mirrored = np.divmod(indices, self._times)
        rows, captions = np.divmod(pairs, self._captions)
        of_images = [encoder for encoder in self._encoders if encoder.of == "image"]
        unique, of_row = np.unique(rows, return_inverse=True)
        records, prepared = self._reader.read(unique.tolist(), lambda record: _prepared(record, of_images))
        found = {}
        views, of_view = np.unique(2 * of_row.reshape(-1) + mirrored, return_inverse=True)
        for number, encoder in enumerate(of_images):
            batch = np.stack([prepared[view // 2][number][:, :: -1 if view % 2 else 1] for view in views.tolist()])
            found |= {name: array[of_view.reshape(-1)] for name, array in encoder.encode(batch).items()}
        texts = [records[row].get("captions", [""]) for row in of_row.reshape(-1).tolist()]
        texts = [each[which % len(each)] for each, which in zip(texts, captions.tolist())]
        words = list(dict.fromkeys(texts))
        of_word = np.array([words.index(text) for text in texts], np.int64)
        for encoder in self._encoders:
            if encoder.of == "caption":
                found |= {name: array[of_word] for name, array in encoder.encode(words).items()}
        if all("label" in record for record in records):
            found["label"] = np.array([records[row]["label"] for row in of_row.reshape(-1).tolist()], np.int32)
        return found

    def batches(self, count: int, encoder: NamedEncoder) -> Any:
        """Images prepared for one encoder, `count` of them, evenly spread."""
        rows = np.unique(np.linspace(0, len(self._records) - 1, min(count, len(self._records))).astype(np.int64))
        for start in range(0, len(rows), BATCH):
            _, found = self._reader.read(rows[start : start + BATCH].tolist(), lambda record: _prepared(record, [encoder]))
            yield np.stack([views[0] for views in found])

    @property
    def images(self) -> str:
        """Of the images alone, as `fingerprint`."""
        return digest(len(self._records), self._records.identity())

    def fingerprint(self):
        encoders = [[encoder.kind, encoder.fingerprint()] for encoder in self._encoders]
        return digest(len(self), encoders, self._captions, self._times, list(self._records.names), self._records.identity())


@dataclasses.dataclass(frozen=True)
class EncodedCache:
    """What `mmdiff cache` writes for a config whose data are encoded by published networks: no run is needed.

    Attributes:
      data: the config's section: set (see `mmdiff.data.image_datasets`), images (its folder), and perhaps damaged.
      modalities: of the examples, by name.
      encoders: that make them. A modality that none makes is the images' own label.
      mirrored: whether the training images are encoded mirrored, too.
    """

    data: Any
    modalities: Mapping[str, Any]
    encoders: Sequence[NamedEncoder]
    mirrored: bool = True

    @property
    def for_experiment(self) -> dict[str, Any]:
        """What it states of an `Experiment`, `Experiment(**encoded.for_experiment, ...)`."""
        deps = {encoder.what: functools.partial(encoder_fingerprint, encoder, self.data.dir) for encoder in self.encoders}
        return {"cache": self, "frozen_deps": deps}

    def write(self, folder: str | os.PathLike, splits: Sequence[str] = (), shard: int | None = None) -> bool:
        """Writes the splits that are not there yet, by default "train" and "val"; false if there is nothing to do.

        Raises:
          UserError: no encoder or no images are named, an unknown split, a split that is there of other images or encoders, images without
            the classes that the config needs, or a folder that cannot be written.
        """
        folder, splits = files.expand(folder), list(dict.fromkeys(splits or shards.SPLITS))
        for encoder in self.encoders:
            encoder.opened  # noqa: B018 - a path that is not there is said first
        if not self.data.images:
            raise UserError("config.data.images is empty: name the folder of the images to encode, --config.data.images=FOLDER.")
        sources = {split: self._source(split) for split in splits}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._choose_codes(folder, sources)
            written = [self._write_split(folder / split, source, shard or self._shard_length()) for split, source in sources.items()]
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another folder.") from error
        return any(written)

    def holds(self, folder: str | os.PathLike) -> str:
        """The content of a folder that was written, for a person to read."""
        counts = [f"{split} {sum(meta['lengths']):,}" for split in shards.SPLITS if (meta := shards.read_meta(folder, split))]
        return f"{', '.join(self.modalities)} ({', '.join(counts)})"

    def _source(self, split: str) -> Encoded:
        records = image_datasets.records_of(self.data.set, split, self.data.images)
        return Encoded(records, self.encoders, self.mirrored and split == "train", self.data.get("damaged", 0.0))

    def _choose_codes(self, folder: pathlib.Path, sources: Mapping[str, Encoded]) -> None:
        """Notes the entries of the codebook that are used, unless they are noted already, of these images or of tokens that are there."""
        finished = any(shards.read_meta(folder, split) for split in shards.SPLITS)
        for encoder in self.encoders:
            if isinstance(encoder, ImageTokens):
                encoder.folder = folder
                network = encoder.opened.fingerprint
                stored = read_codes(folder)
                if finished and stored:
                    if stored["encoder"] != network:
                        raise UserError(f"{folder} holds the tokens of another network than config.{encoder.key}.path: write elsewhere.")
                    continue
                source = sources.get("train") or self._source("train")
                made_of = {"format": 1, "encoder": network, "images": source.images}
                if not stored or {name: stored.get(name) for name in made_of} != made_of:
                    (folder / CODES).unlink(missing_ok=True)
                    files.write_json(folder / CODES, {**made_of, "codes": encoder.choose(source.batches(COUNTED, encoder))})

    def _write_split(self, folder: pathlib.Path, source: Source, shard: int) -> bool:
        identity = digest(len(source), source.fingerprint(), shards.stamp(self.modalities), shard)
        if meta := shards.read_meta(folder.parent, folder.name):
            if meta.get("made_of") != identity:
                raise UserError(f"{folder} was written of other images, or by other encoders: remove it, or write elsewhere.")
            return False
        made = {name: encoder for encoder in self.encoders for name in encoder.modalities}
        described = {name: made[name].described() for name in self.modalities if name in made}
        modalities = dict(self.modalities)
        for name, each in modalities.items():
            if isinstance(each, Latents):
                modalities[name] = dataclasses.replace(each, scale=getattr(made[name].opened.net, "scaling_factor", 1.0))
        moments = [name for encoder in self.encoders for name in getattr(encoder, "moments", ())]
        starts, hashes, waiting = range(0, len(source), shard), {}, []
        with drafts.draft(folder, identity, keep=True) as draft:
            parts = [
                (number, first, min(first + BATCH, stop), stop) for number, start in enumerate(starts)
                for stop in [min(start + shard, len(source))] for first in range(start, stop, BATCH)]  # fmt: skip
            for number, first, last, stop in console.progress(parts, f"batch of {folder.name}"):
                names = [shards.file_name(name, number) for name in self.modalities]
                if not waiting and all((draft / name).exists() for name in names):
                    hashes |= {name: shards.sha256(np.load(draft / name)) for name in names if name not in hashes}
                    continue
                waiting.append(self._encoded(source, first, last, moments))
                if last == stop:
                    arrays = {name: np.concatenate([each[name] for each in waiting]) for name in self.modalities}
                    hashes |= shards.write(draft, number, arrays)
                    waiting.clear()
            shards.write_meta(
                draft, modalities, [min(shard, len(source) - start) for start in starts], hashes, moments=moments, encoders=described,
                made_of=identity, names=list(source.names))
        return True

    def _encoded(self, source: Source, first: int, last: int, moments: Sequence[str]) -> dict[str, np.ndarray]:
        """Examples as a shard has them, checked."""
        found = source.take(np.arange(first, last))
        if missing := [name for name in self.modalities if name not in found]:
            raise UserError(f"the images in {self.data.images} have no {missing[0]}, which the config needs: see config.data.set.")
        for name, modality in self.modalities.items():
            if name in moments:
                for part in np.split(found[name], 2, axis=-1):
                    modality.check(part)
            else:
                found[name] = modality.check(found[name])
        return {name: shards.pack(found[name], name) for name in self.modalities}

    def _shard_length(self) -> int:
        """Examples in a shard, as many as fit into memory."""
        numbers = sum(2 * math.prod(modality.shape) for modality in self.modalities.values())  # of moments twice as many
        return max(1, min(shards.LENGTH, SHARD // (2 * numbers)))


def encoder_fingerprint(encoder: NamedEncoder, folder: str) -> str | None:
    """Of the network that a run depends on: the one that is named, or else the one that wrote the cache; None where both are unknown.

    Of a token cache with a tokenizer of one's own it is that of the cache.

    Raises:
      UserError: the two are different networks.
    """
    if (own := network_fingerprint(folder)) and encoder.of == "image":
        return own
    meta = (shards.read_meta(folder, "train") or shards.read_meta(folder, "val")) if folder else None
    stored = ((meta or {}).get("encoders") or {}).get(encoder.modalities[0], {}).get("fingerprint")
    here = encoder.fingerprint()
    if stored and here and stored != here:
        raise UserError(
            f"{folder} was encoded by another network than config.{encoder.key}.path={encoder.path} (fingerprints {stored[:12]} and "
            f"{here[:12]}): name that one, or encode the images again.")
    return here or stored


def _prepared(record: Mapping[str, Any], encoders: Sequence[NamedEncoder]) -> list[np.ndarray]:
    return prepared(record["image"], encoders)
