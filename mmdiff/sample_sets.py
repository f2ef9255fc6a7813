"""Sets of sampled images by the ten thousand, made by all devices of all processes of a run, and continued where a call has ended.

    OUT/samples.json              the settings, and whether the set is whole
    OUT/shards/image-00012.npy    uint8 [n, H, W, C], where the set is not whole yet; label-00012.npy int64 [n], where there is a label
    OUT/samples.npz               arr_0, the images uint8 [N, H, W, 3], and arr_1, the labels int64 [N]; what ADM's evaluator reads
    OUT/images/000000.png, ...    or numbered files, and labels.npy
    OUT/samples.png               a grid of the first

A shard is whole or absent, and holds so many batches of one size, whatever computes them: a call that was killed continues at the next
shard, and the set has the bits of one that was not. Process p of P makes the shards p, p + P, ...; process 0 joins them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmdiff import config as configs
from mmdiff import console, files
from mmdiff.data import shards
from mmdiff.data.arrays import read_array
from mmdiff.data.encoded_modalities import EncodedLatents, Sentences
from mmdiff.data.modalities import Images, Labels
from mmdiff.data.network_cache import fingerprint, flat
from mmdiff.data.token_modalities import TokenImages
from mmdiff.errors import UserError
from mmdiff.evals.image_set_writer import npz, pictures
from mmdiff.evals.plots import grid
from mmdiff.evals.streaming import count_of, joined
from mmdiff.remote import RemotePath
from mmdiff.training import distributed, lock

FORMATS = ("npz", "png")
BATCH = 64  # samples that a device computes at once
SHARD = 1024  # samples in a shard, about; fewer of small sets, so that several processes have some
FEW = 64  # in the grid
SETTINGS, SHARDS = "samples.json", "shards"
MADE = ("samples.npz", "samples.png", "labels.npy", "images")
SAID = ("number", "format", "steps", "guidance", "seed", "batch", "step")  # of the settings; the others are long
WAIT_SECONDS = 0.5  # between looks at what other processes have written


def classes(run: Any, how: str, number: int, seed: int, taken: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """{NAME: a class for each of `number` samples, int32} for the modality that holds classes; that of sample i depends on (seed, i) alone.

    "balanced": every K samples in a row have all K classes, in an order of their own. "random": classes with equal chances.

    Args:
      taken: modalities that have values already.

    Raises:
      UserError: not one modality of classes is left.
    """
    modalities = run.experiment.modalities
    names = [name for name in run.experiment.shape if isinstance(modalities[name], Labels) and name not in taken]
    if len(names) != 1:
        found = f"has several ({', '.join(names)})" if names else "has none that is left"
        raise UserError(f"--classes {how} is for a modality of classes, and this model {found}: write --given NAME=VALUE.")
    count = modalities[names[0]].count

    def drawn(place):
        return np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))

    if how == "balanced":
        found = np.concatenate([drawn(turn).permutation(count) for turn in range(count_of(number, count))])[:number]
    else:
        found = np.array([drawn(i).integers(count) for i in range(number)])
    return {names[0]: found.astype(np.int32)}


def shown(run: Any, given: Iterable[str], absent: Iterable[str]) -> tuple[str, str | None]:
    """(the modality whose images make a set, the one of the labels beside them or None).

    Raises:
      UserError: no images are sampled, or several; latents without the autoencoder that decodes them.
    """
    modalities, kinds = run.experiment.modalities, (Images, TokenImages, EncodedLatents)
    names = [name for name in run.experiment.shape if name not in absent]
    images = [name for name in names if isinstance(modalities[name], kinds) and name not in given]
    if len(images) != 1:
        raise UserError(
            f"--format writes the images of one modality, and of this model {', '.join(images) or 'none'} would be sampled: "
            + ("hold the others by --given, or leave them out by --absent." if images else "leave --format out."))
    if isinstance(modalities[images[0]], EncodedLatents) and not modalities[images[0]].encoder.path:
        raise UserError(f"{images[0]}: latents become images by an autoencoder: name it by --config.encoder.path=PATH.")
    silent = {name for name in getattr(run.experiment.process, "conditions", ()) if name not in given}  # its value says nothing
    return images[0], next((name for name in names if isinstance(modalities[name], Labels) and name not in silent), None)


def write(
    run: Any, out: str | os.PathLike, number: int, *, given: Mapping[str, Any], absent: Sequence[str] = (), steps: int, guidance: float,
    seed: int, form: str = "npz", batch: int = BATCH,
) -> list[pathlib.Path | RemotePath]:
    """Writes a set, or what is missing of it; -> its files. All processes of a run call it together, with an `out` that they all see.

    Args:
      run: an open run. out: a folder, or the address of one.
      number, given, absent, steps, guidance, seed, batch: as `Run.stream` takes them, and `given` as `Run.parse` returns it.
      form: one of FORMATS.

    Raises:
      UserError: nothing to make a set of, `out` holds something else or cannot be written, another call writes there.
    """
    image, label = shown(run, given, absent)
    out, asked = files.target(out), {"absent": sorted(absent), "steps": steps, "guidance": guidance, "seed": seed, "batch": batch}
    length = batch * max(1, min(SHARD // batch, number // (64 * batch)))
    process, processes = jax.process_index(), jax.process_count()
    names = [name for name in (image, label) if name]
    settings = {"number": number, "format": form, **asked, **_made_of(run, given)}  # the weights are read by all processes together

    def missing(numbers):
        there = files.names(out / SHARDS)
        return [k for k in numbers if not all(shards.file_name(name, k) in there for name in names)]

    with contextlib.ExitStack() as held:
        try:
            whole = distributed.from_first(lambda: _claim(out, held, settings))
            if not whole:
                options = {"given": given, **asked, "number": number}
                _sample(run, out / SHARDS, missing(range(process, count_of(number, length), processes)), length, image, label, options)
                if process == 0:
                    _wait(lambda: not missing(range(count_of(number, length))))
                    _join(run, out, number, length, image, label, form)
                else:
                    _wait(lambda: files.read_json(out / SETTINGS)["whole"])
        except OSError as error:
            raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}.") from error
    return [path for name in MADE if (path := out / name).exists()]


# ---- Parts ----


def _made_of(run: Any, given: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What else samples depend on: the weights, what decodes them, values that are given, and the sampler's section of the config."""
    encoders = {name: getattr(modality, "encoder", None) for name, modality in run.experiment.modalities.items()}
    return {
        "step": run.step,
        "weights": fingerprint(flat(run.params)),
        "encoders": {name: encoder.fingerprint() for name, encoder in encoders.items() if encoder is not None},
        "given": {name: _digest(array) for name, array in given.items()},
        "config.sample": json.loads(configs.to_json(run.config)).get("sample"),
    }  # fmt: skip


def _digest(array: np.ndarray | Sentences) -> str:
    found = hashlib.sha256()
    for row in array.lines if isinstance(array, Sentences) else array:
        found.update(f"{row}\n".encode() if isinstance(row, str) else np.ascontiguousarray(row))
    return found.hexdigest()


def _claim(out: pathlib.Path | RemotePath, held: contextlib.ExitStack, settings: Mapping[str, Any]) -> bool:
    """Makes `out` this set's, for as long as `held` lasts; -> whether the set is whole."""
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    if isinstance(out, RemotePath):
        held.enter_context(lock.held_at(out))
    else:
        file = held.enter_context(open(out / SHARDS / "lock", "w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process
        except BlockingIOError:
            raise UserError(f"another process is writing samples to {out}: wait for it, or choose another folder by --out.") from None
        except OSError:
            pass  # a file system without locks
    settings = json.loads(json.dumps(settings))
    try:
        stored = files.read_json(out / SETTINGS)
    except files.Missing:
        inside = sorted(files.names(out / SHARDS) - {"lock"})
        if there := [*(name for name in MADE if (out / name).exists()), *(f"{SHARDS}/{name}" for name in inside)]:
            (out / SHARDS / "lock").unlink(missing_ok=True)
            if not inside:
                files.remove_folder(out / SHARDS)
            raise UserError(f"{out} holds {there[0]} of another call: name another folder by --out, or remove it.") from None
        files.write_json(out / SETTINGS, {"whole": False, "settings": settings})
        return False
    stored = stored if isinstance(stored, Mapping) else {}
    old = stored["settings"] if isinstance(stored.get("settings"), Mapping) else {}
    different = [key for key in {**settings, **old} if old.get(key) != settings.get(key)]
    if different:
        key = different[0]
        text = f"{key} {old.get(key)}, not {settings.get(key)}" if key in SAID else f"other {key}"
        if stored.get("whole"):
            files.remove_folder(out / SHARDS)
        raise UserError(f"{out} holds samples of other settings ({text}): name another folder by --out, or remove it.")
    if stored.get("whole"):
        files.remove_folder(out / SHARDS)
    return bool(stored.get("whole"))


def _sample(
    run: Any, folder: pathlib.Path | RemotePath, missing: Sequence[int], length: int, image: str, label: str | None,
    options: dict[str, Any],
) -> None:
    """Samples shards and writes each as soon as it is whole."""
    batch, number = options["batch"], options["number"]
    each = length // batch
    batches = [k for shard in missing for k in range(shard * each, min((shard + 1) * each, count_of(number, batch)))]
    total = sum(min(batch, number - k * batch) for k in batches)
    waiting: list[dict[str, np.ndarray]] = []  # of one shard
    with contextlib.closing(console.Rate(total, "image", jax.process_index(), jax.process_count())) as progress:
        for k, samples in run.stream(options.pop("number"), only=batches, **options):
            # A batch is decoded on its own: where an image stands in it does not depend on which batches are together.
            waiting.append({image: run.show({image: samples[image]})[image], **({label: samples[label].astype(np.int64)} if label else {})})
            if (k + 1) % each == 0 or k + 1 == count_of(number, batch):
                shards.write(folder, k // each, {name: joined([part[name] for part in waiting]) for name in waiting[0]})
                waiting.clear()
            progress.add(len(samples[image]))


def _wait(done: Callable[[], bool]) -> None:
    """Until another process, whose end would be the end of this one too, has written what is waited for."""
    while not done():
        time.sleep(WAIT_SECONDS)


def _join(run: Any, out: pathlib.Path | RemotePath, number: int, length: int, image: str, label: str | None, form: str) -> None:
    """Makes the set of its shards, and removes them."""

    def parts(name) -> Iterator[np.ndarray]:
        rest = None  # of the shape
        for k in range(count_of(number, length)):
            path = out / SHARDS / shards.file_name(name, k)
            try:
                part = read_array(path)
            except files.FileError:
                part = np.zeros(())
            rest = part.shape[1:] if rest is None else rest
            if part.shape != (min(length, number - k * length), *rest):
                raise files.FileError(path, "is damaged", "remove it and run the same command again, which makes it anew")
            yield part

    first = next(parts(image))[:FEW]
    words = run.show({label: next(parts(label))[:FEW]})[label] if label else None
    labels = {"arr_1": ((number,), np.int64, parts(label))} if label else {}
    with files.whole(out / "samples.png") as draft:
        grid(first, min(8, len(first)), words).save(draft, "PNG")
    if form == "npz":
        colour = (part.repeat(3, -1) if part.shape[-1] == 1 else part for part in parts(image))
        npz(out / "samples.npz", {"arr_0": ((number, *first.shape[1:3], 3), np.uint8, colour), **labels})
    else:
        if label:
            with files.whole(out / "labels.npy") as draft, draft.open("wb") as stream:
                np.save(stream, np.concatenate(list(parts(label))))
        pictures(out / "images", parts(image))
    stored = files.read_json(out / SETTINGS)
    files.write_json(out / SETTINGS, {**stored, "whole": True})
    files.remove_folder(out / SHARDS)
