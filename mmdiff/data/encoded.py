"""Images (and captions) as published encoders see them: examples that are read on the host and encoded by the devices.

The training images are encoded twice, as they are and mirrored. `mmdiff.encoded_caches` writes what encoders make of a set.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff.data import image_datasets, shards
from mmdiff.data.named_encoders import NamedEncoder, prepared
from mmdiff.data.network_cache import network_fingerprint
from mmdiff.data.sources import digest
from mmdiff.data.stored_images import Records, threads
from mmdiff.errors import UserError
from mmdiff.files import FileError

log = logging.getLogger(__name__)
BATCH, PIXELS = 512, 2**25  # images of a batch at most: so many, with so many pixels in all
SHARD = 2**30  # bytes of a shard, about
NAMED = 20  # damaged images in a message


@dataclasses.dataclass(frozen=True)
class Read:
    """Examples whose images are decoded, cropped and normalised.

    Attributes:
      images: how many images were read.
      views: of each encoder of images its batch of them, mirrored where an example is, each once.
      view: of each example, where its image is among them.
      texts: its caption. labels: its class, None where there are no classes.
      skipped: (number, name, reason) of the images that cannot be read, whose examples are left out.
    """

    images: int
    views: list[np.ndarray]
    view: np.ndarray
    texts: list[str]
    labels: np.ndarray | None
    skipped: list[tuple[int, str, str]]

    def __len__(self):
        return len(self.view)


class Encoded:
    """What encoders make of images: the arrays of their modalities, and label where the images have classes.

    Example i is image i // (2 k), with its caption i // 2 mod k, mirrored where i is odd; k is 1 unless captions are encoded, and without
    `mirrored` an image comes once a caption. An image or caption that occurs several times in a batch is encoded once.

    Args:
      records: the images, as they are stored.
      encoders: of images and captions.
      mirrored: whether the mirror images are examples, too.
      max_skipped: how many images may be damaged, and are then left out.

    Attributes:
      names: of the classes, by label; none where there are no classes.
      of_image: examples of an image, one after another.
      skipped: number -> (name, reason) of the damaged images that were met.
    """

    def __init__(self, records: Records, encoders: Sequence[NamedEncoder], mirrored: bool = False, max_skipped: int = 0):
        self._records, self._encoders, self._times, self.names = records, encoders, 1 + mirrored, tuple(records.names)
        with_captions = any(encoder.of == "caption" for encoder in encoders)
        if with_captions and not records.captions:
            raise UserError("the images have no captions, which the config needs: see mmdiff/data/image_folders.py and config.data.set.")
        self._captions = records.captions if with_captions else 1
        self.of_image, self.skipped, self._max_skipped = self._captions * self._times, {}, max_skipped

    def __len__(self):
        return len(self._records) * self.of_image

    @functools.cached_property
    def batch(self) -> int:
        """How many examples are read and encoded at once: it depends on nothing that computes them."""
        pixels = max((math.prod(shape[:2]) for shape in self._shapes), default=1)
        return max(1, min(BATCH, PIXELS // pixels) // self._times) * self.of_image

    def read(self, first: int, last: int) -> Read:
        """The examples first .. last - 1. Raises UserError for more damaged images than may be; a thread may call it ahead of `encode`."""
        rows, which = np.divmod(np.arange(first, last), self.of_image)
        captions, mirrored = np.divmod(which, self._times)
        records, images, skipped = self._sound(range(int(rows[0]), int(rows[-1]) + 1), self._of("image"))
        kept = np.isin(rows, list(images))
        rows, captions, mirrored = rows[kept], captions[kept], mirrored[kept]
        places, view = np.unique(2 * rows + mirrored, return_inverse=True)
        views = [
            np.stack([images[place // 2][number][:, :: -1 if place % 2 else 1] for place in places.tolist()])
            if len(places) else np.zeros((0, *shape), np.float32) for number, shape in enumerate(self._shapes)]  # fmt: skip
        texts = [records[row].get("captions", [""]) for row in rows.tolist()]
        texts = [each[caption % len(each)] for each, caption in zip(texts, captions.tolist())]
        labelled = all("label" in record for record in records.values())
        labels = np.array([records[row]["label"] for row in rows.tolist()], np.int32) if labelled else None
        return Read(len(records), views, view.reshape(-1), texts, labels, skipped)

    def encode(self, examples: Read) -> dict[str, np.ndarray]:
        """One array [n, ...] of each modality."""
        found = {}
        for encoder, batch in zip(self._of("image"), examples.views):
            found |= {name: array[examples.view] for name, array in encoder.encode(batch).items()}
        texts = list(dict.fromkeys(examples.texts))
        numbers = {text: number for number, text in enumerate(texts)}
        of_text = np.array([numbers[text] for text in examples.texts], np.int64)
        for encoder in self._of("caption"):
            found |= {name: array[of_text] for name, array in encoder.encode(texts or [""]).items()}
        return found if examples.labels is None else {**found, "label": examples.labels}

    def batches(self, count: int, encoder: NamedEncoder) -> Iterator[np.ndarray]:
        """Images prepared for one encoder, `count` of them, evenly spread."""
        rows = np.unique(np.linspace(0, len(self._records) - 1, min(count, len(self._records))).astype(np.int64))
        each = self.batch // self.of_image * self._times
        for start in range(0, len(rows), each):
            if found := self._sound(rows[start : start + each].tolist(), [encoder])[1]:
                yield np.stack([views[0] for views in found.values()])

    def skip(self, damaged: Sequence[tuple[int, str, str]]) -> None:
        """Leaves images out. Raises UserError, which names all, for more than may be."""
        self.skipped |= {number: (name, reason) for number, name, reason in damaged}
        if len(self.skipped) > self._max_skipped:
            reasons = [reason.rstrip(".") for _, reason in self.skipped.values()]
            more = f"; and {len(reasons) - NAMED:,} more" if len(reasons) > NAMED else ""
            raise UserError(
                f"{len(reasons):,} of {len(self._records):,} images {'is' if len(reasons) == 1 else 'are'} damaged, more than "
                f"config.data.max_skipped={self._max_skipped} allows to leave out: {'; '.join(reasons[:NAMED])}{more}.")

    @functools.cached_property
    def images(self) -> str:
        """The fingerprint of the images alone."""
        return digest(len(self._records), self._identity)

    def fingerprint(self) -> str:
        """Of all that the examples depend on."""
        encoders = [[encoder.kind, encoder.fingerprint()] for encoder in self._encoders]
        return digest(len(self), encoders, self._captions, self._times, list(self._records.names), self._identity)

    def _of(self, what: str) -> list[NamedEncoder]:
        return [encoder for encoder in self._encoders if encoder.of == what]

    @functools.cached_property
    def _identity(self) -> Any:
        return self._records.identity()  # of a million files it takes seconds

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of an image as each encoder takes it."""
        from PIL import Image

        return [encoder.prepare(Image.new("RGB", (64, 64))).shape for encoder in self._of("image")]

    def _sound(self, rows: Sequence[int], encoders: Sequence[NamedEncoder]) -> tuple[dict, dict, list[tuple[int, str, str]]]:
        """-> (row -> record, row -> what each encoder takes of its image, what cannot be read)."""

        def view(record):
            try:
                return prepared(record["image"], encoders)
            except FileError as error:
                return error

        records = dict(zip(rows, self._records.get(rows)))
        found = dict(zip(rows, threads().map(view, records.values())))
        bad = [(row, str(records[row]["image"]), str(error)) for row, error in found.items() if isinstance(error, FileError)]
        if bad:
            self.skip(bad)
            for row, _, reason in bad:
                log.warning("image %d is left out: %s", row, reason)
        return records, {row: views for row, views in found.items() if not isinstance(views, FileError)}, bad


@dataclasses.dataclass(frozen=True)
class EncodedCache:
    """What `mmdiff cache` writes for a config whose data are encoded by published networks (`mmdiff.encoded_caches`): no run is needed.

    Attributes:
      data: the config's section: set (see `mmdiff.data.image_datasets`), images (its folder), and perhaps max_skipped, how many of a
        split may be damaged, and are then left out.
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

    def holds(self, folder: str | os.PathLike) -> str:
        """The content of a folder that was written, for a person to read."""
        counts = [f"{split} {sum(meta['lengths']):,}" for split in shards.SPLITS if (meta := shards.read_meta(folder, split))]
        return f"{', '.join(self.modalities)} ({', '.join(counts)})"

    @property
    def splits(self) -> list[str]:
        """Those of the set that are cached."""
        return [split for split in shards.SPLITS if split in image_datasets.SPLITS.get(self.data.set, shards.SPLITS)]

    def source(self, split: str) -> Encoded:
        """The examples of a split. Raises UserError for images or classes that are not there."""
        records = image_datasets.records_of(self.data.set, split, self.data.images)
        return Encoded(records, self.encoders, self.mirrored and split == "train", self.data.get("max_skipped", 0))

    @property
    def shard(self) -> int:
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
