"""Caches of what published encoders make of images, written by all devices of all processes, and continued where a call has ended.

    FOLDER/train, FOLDER/val     as `mmdiff.data.shards` has them
    FOLDER/train/skipped.jsonl   where damaged images were left out: {"index", "image", "reason"} of each
    FOLDER/codes.json            where a tokenizer's codebook is used in part: its entries
    FOLDER/components.json       where features are cut down to principal components: their mean and projection

A split is written under another name and renamed when it is complete. Until then each shard has a file of its own, shard-00012.json, with
which it is whole: {"rows", "sha256", "statistics", "skipped"}. Shard s holds the examples s L .. (s + 1) L - 1 without those of damaged
images, and is made in batches of one size, whatever computes them: a call that was killed continues at the next shard, and the cache has
the bytes of one that was not. Process p of P makes the shards p, p + P, ...; process 0 joins them. At an address, where nothing is
renamed, a split is written where it stays, and whole with its meta.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from mmdiff import console, files, hosts
from mmdiff.data import drafts, shards
from mmdiff.data.arrays import read_array
from mmdiff.data.encoded import Encoded, EncodedCache, Read
from mmdiff.data.loader import prefetch
from mmdiff.data.modalities import Labels, Latents
from mmdiff.data.sources import digest
from mmdiff.errors import UserError
from mmdiff.remote import RemotePath
from mmdiff.training import distributed, lock

COUNTED = 50_000  # training images, evenly spread, whose codes are counted, and whose features have the components
AHEAD = 1  # batches that are read before they are encoded, beside the one that is being read
WAIT_SECONDS = 0.5  # between looks at what other processes have written
SKIPPED = "skipped.jsonl"


def write(cache: EncodedCache, folder: str | os.PathLike, splits: Sequence[str] = (), shard: int | None = None) -> bool:
    """Writes the splits that are not there yet, by default all that the set has; false if there is nothing to do.

    All processes of a run call it together, with a `folder` that they all see.

    Args:
      shard: examples in one; by default as many as fit into memory.

    Raises:
      UserError: no encoder or no images are named, an unknown split, a split that is there of other images or encoders, images without
        the classes that the config needs, too many damaged ones, or a folder that cannot be written.
    """
    folder, splits = files.target(folder), list(dict.fromkeys(splits or cache.splits))
    for encoder in cache.encoders:
        encoder.opened  # noqa: B018 - a path that is not there is said first
    if not cache.data.images:
        raise UserError("config.data.images is empty: name the folder of the images to encode, --config.data.images=FOLDER.")
    resolved = folder.resolve()
    if not shards.is_encoded(folder) and files.target(cache.data.images).resolve() in (resolved, *resolved.parents):
        raise UserError(f"{folder} lies in {cache.data.images}, whose folders are read as classes: write the cache elsewhere.")
    sources = {split: cache.source(split) for split in splits}
    for labels in cache.modalities.values():
        for source in sources.values():
            if isinstance(labels, Labels) and len(source.names) > labels.count:
                has = f"{cache.data.images} has images of {len(source.names):,} classes, and the config's model takes {labels.count:,}"
                raise UserError(f"{has}: leave the others out, or copy the config and set their number in it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fit(cache, folder, sources)
        written = [_Split(cache, folder / split, source, shard or cache.shard).write() for split, source in sources.items()]
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another folder.") from error
    return any(written)


def _fit(cache: EncodedCache, folder: pathlib.Path | RemotePath, sources: Mapping[str, Encoded]) -> None:
    """Notes what encoders fit to the training images, unless it is noted already, of these images or of examples that are there."""
    finished = any(shards.read_meta(folder, split) for split in shards.SPLITS)
    for encoder in cache.encoders:
        if not encoder.fitted:
            continue
        encoder.folder = folder
        network, stored = encoder.opened.fingerprint, encoder.noted()
        if finished and stored:
            if stored["encoder"] != network:
                raise UserError(f"{folder} holds what another network than config.{encoder.key}.path has made: write elsewhere.")
            continue
        source = sources.get("train") or cache.source("train")
        made_of = {"format": 1, "encoder": network, "images": source.images, **encoder.fitted_for}

        def noted():
            stored = encoder.noted()  # noqa: B023 (used at once)
            return stored is not None and {name: stored.get(name) for name in made_of} == made_of  # noqa: B023 (used at once)

        if not hosts.is_first():
            _wait(noted)
        elif not noted():
            (folder / encoder.fitted).unlink(missing_ok=True)
            files.write_json(folder / encoder.fitted, {**made_of, **encoder.fit(source.batches(COUNTED, encoder))})


def _wait(done: Callable[[], bool]) -> None:
    """Until another process, whose end would be the end of this one too, has written what is waited for."""
    while not done():
        time.sleep(WAIT_SECONDS)


@dataclasses.dataclass(frozen=True)
class _Split:
    """One split that is written: its folder, examples, and how many are in a shard."""

    cache: EncodedCache
    folder: pathlib.Path | RemotePath
    source: Encoded
    length: int

    def write(self) -> bool:
        """False if it is there."""
        starts = range(0, len(self.source), self.length)
        with contextlib.ExitStack() as held:
            draft = distributed.from_first(lambda: self._claim(held))
            if draft is None:
                return False
            draft = files.target(draft)

            def missing(numbers):
                there = files.names(draft)
                return [number for number in numbers if _shard(draft, number).name not in there]

            for number in range(jax.process_index(), len(starts), jax.process_count()):
                self._check(draft, number)
            for name in sorted(files.names(draft)):
                if re.fullmatch(r"shard-\d+\.json", name):
                    self.source.skip(files.read_json(draft / name)["skipped"])
            self._encode(draft, missing(range(jax.process_index(), len(starts), jax.process_count())))
            if hosts.is_first():
                _wait(lambda: not missing(range(len(starts))))
                self._join(draft, len(starts))
        _wait((self.folder / shards.META).exists)
        return True

    @functools.cached_property
    def identity(self) -> str:
        """What tells it from others."""
        return digest(len(self.source), self.source.fingerprint(), shards.stamp(self.cache.modalities), self.length)

    @property
    def moments(self) -> list[str]:
        """The modalities that are stored as mean and deviation."""
        return [name for encoder in self.cache.encoders for name in getattr(encoder, "moments", ())]

    def _claim(self, held: contextlib.ExitStack) -> str | None:
        """The folder to write in for as long as `held` lasts, which then takes its place; None if the split is there."""
        if meta := shards.read_meta(self.folder.parent, self.folder.name):
            if meta.get("made_of") != self.identity:
                raise UserError(f"{self.folder} was written of other images, or by other encoders: remove it, or write elsewhere.")
            return None
        if isinstance(self.folder, RemotePath):
            return self._claim_address(held)
        return str(held.enter_context(drafts.draft(self.folder, self.identity, keep=True)))

    def _claim_address(self, held: contextlib.ExitStack) -> str:
        """As `_claim`: its meta.json comes last, so the files of a split that is not whole are written where they stay."""
        held.enter_context(lock.held_at(self.folder))
        made_of, there = self.folder / drafts.IDENTITY, self.folder.names()
        if shards.META in there:
            raise files.FileError(self.folder / shards.META, "cannot be read", "remove the folder, or write elsewhere")
        if foreign := made_of.name not in there and there - {lock.WRITER}:  # which nothing says that a call of this command has left
            raise UserError(f"{self.folder} is there already (it holds {min(foreign)}): choose another folder, or remove it.")
        if made_of.name not in there or files.read_json(made_of) != self.identity:
            for name in there - {lock.WRITER, made_of.name}:
                (self.folder / name).remove()
            files.write_json(made_of, self.identity)
        return str(self.folder)

    def _check(self, draft: pathlib.Path | RemotePath, number: int) -> None:
        """A shard that a killed call, or a machine that went down with it, has left cut short is made again."""
        if isinstance(draft, RemotePath):
            return  # all that is there is whole
        try:
            note = files.read_json(_shard(draft, number))
            cut = any(len(read_array(draft / file, mmap=True)) != note["rows"] for file in note["sha256"])
        except (files.FileError, KeyError, TypeError):
            cut = True
        if cut:
            _shard(draft, number).unlink(missing_ok=True)

    def _encode(self, draft: pathlib.Path | RemotePath, numbers: Sequence[int]) -> None:
        """Makes shards: the next batch is read and the last one stored, in threads, while the devices encode one."""
        source, size = self.source, self.source.batch
        parts = [
            (number, first, min(first + size, stop), stop) for number in numbers for start in [number * self.length]
            for stop in [min(start + self.length, len(source))] for first in range(start, stop, size)]  # fmt: skip
        images = sum(-(-last // source.of_image) - first // source.of_image for _, first, last, _ in parts)
        progress = console.Rate(images, "image", jax.process_index(), jax.process_count())
        reads = itertools.chain((source.read(first, last) for _, first, last, _ in parts), itertools.repeat(None))
        waiting: list[tuple[int, dict[str, np.ndarray], list]] = []  # of one shard
        with contextlib.closing(progress), prefetch(reads, AHEAD) as ready, ThreadPoolExecutor(1, "shards") as storing:
            stored = storing.submit(int)
            for (number, _, last, stop), examples in zip(parts, ready):
                found = source.encode(examples)
                stored.result()
                stored = storing.submit(self._store, draft, number, waiting, examples, found, last == stop)
                progress.add(examples.images)
            stored.result()

    def _store(
        self, draft: pathlib.Path | RemotePath, number: int, waiting: list, examples: Read, found: dict[str, np.ndarray], whole: bool,
    ) -> None:
        """Puts examples, once checked, to those that are `waiting`, and writes all of these if their shard is `whole`."""
        if missing := [name for name in self.cache.modalities if name not in found]:
            raise UserError(f"the images in {self.cache.data.images} have no {missing[0]}, which the config needs: see config.data.set.")
        packed = {}
        for name, modality in self.cache.modalities.items():
            array = found[name]
            if len(examples) and name in self.moments:
                for part in np.split(array, 2, axis=-1):
                    modality.check(part)
            elif len(examples):
                array = modality.check(array)
            packed[name] = shards.pack(array, name)
        waiting.append((len(examples), packed, examples.skipped))
        if not whole:
            return
        arrays = {name: np.concatenate([packed[name] for _, packed, _ in waiting]) for name in packed}
        floats = [name for name, array in arrays.items() if array.dtype.kind == "f"]
        statistics = {name: shards.merged([shards.channel_moments(packed[name]) for _, packed, _ in waiting]) for name in floats}
        files.write_json(_shard(draft, number), {
            "rows": sum(count for count, _, _ in waiting),
            "sha256": shards.write(draft, number, arrays),
            "statistics": {name: (count, mean.tolist(), squares.tolist()) for name, (count, mean, squares) in statistics.items()},
            "skipped": [each for _, _, skipped in waiting for each in skipped],
        })  # fmt: skip
        waiting.clear()

    def _join(self, draft: pathlib.Path | RemotePath, count: int) -> None:
        """Writes what is known of all shards, with which the split is whole."""
        notes = [files.read_json(_shard(draft, number)) for number in range(count)]
        for note in notes:
            self.source.skip(note["skipped"])
        if not any(note["rows"] for note in notes):
            raise UserError(f"no image in {self.cache.data.images} can be read: copy the images again.")
        statistics = {}
        for name in notes[0]["statistics"]:
            total, mean, squares = shards.merged([note["statistics"][name] for note in notes])
            statistics[name] = {"count": total, "mean": mean.tolist(), "std": np.sqrt(squares / total).tolist()}
        made = {name: encoder for encoder in self.cache.encoders for name in encoder.modalities}
        modalities = dict(self.cache.modalities)
        for name, each in modalities.items():
            if isinstance(each, Latents):
                modalities[name] = dataclasses.replace(each, scale=getattr(made[name].opened.net, "scaling_factor", 1.0))
        skipped = [{"index": i, "image": name, "reason": reason} for i, (name, reason) in sorted(self.source.skipped.items())]
        if skipped:
            files.write_whole(draft / SKIPPED, "".join(json.dumps(each) + "\n" for each in skipped))
        shards.write_meta(
            draft, modalities, [note["rows"] for note in notes], {file: sha for note in notes for file, sha in note["sha256"].items()},
            moments=self.moments, encoders={name: made[name].described() for name in modalities if name in made},
            made_of=self.identity, images=self.source.images, names=list(self.source.names), statistics=statistics,
            skipped=len(skipped), of_image=self.source.of_image)  # fmt: skip
        for number in range(count):
            _shard(draft, number).unlink()
        if isinstance(draft, RemotePath):
            (draft / drafts.IDENTITY).unlink()


def _shard(draft: pathlib.Path | RemotePath, number: int) -> pathlib.Path | RemotePath:
    """The file with which a shard is whole."""
    return draft / f"shard-{number:05d}.json"
