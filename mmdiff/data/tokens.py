"""A cache of tokens on disk: pictures that a trained tokenizer has encoded once, and what turns tokens into pictures again.

    DIR/train/tokens.npy   int32 [n, L], in raster order
    DIR/train/text.npy     ...: the other arrays of the source, as they are; its pictures are left out
    DIR/test/...
    DIR/weights.npz        the tokenizer's averaged (EMA) weights
    DIR/cache.json         what made it: config, step, network, grid, codes, fingerprint of the weights; arrays of every split

`write` makes the folder under another name and renames it when all is there, so DIR is whole or absent. A decoder needs DIR alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np

from mmdiff.data.sources import ArraySource, Source
from mmdiff.errors import UserError
from mmdiff.nets.tokenizers import VQAutoencoder

META, WEIGHTS = "cache.json", "weights.npz"
PART = 250  # examples that are encoded or decoded at once


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `mmdiff cache` writes for an experiment that trains a tokenizer.

    Attributes:
      net: the tokenizer.
      splits: name -> `() -> source` of the pictures.
      image: their entry in the source.
    """

    net: VQAutoencoder
    splits: Mapping[str, Callable[[], Source]]
    image: str = "image"


def write(folder: str | os.PathLike, recipe: Recipe, params: Any, made_by: Mapping[str, Any], splits: Sequence[str] = ()) -> bool:
    """Writes a cache, and returns False if it was there already: the same weights and splits.

    Args:
      folder: the cache's folder; its parents are made.
      recipe: the network and the data.
      params: its weights.
      made_by: JSON values that say what made it, {"config": ..., "step": ...}.
      splits: some of those of the recipe; by default all.

    Raises:
      UserError: another cache or other files in `folder`, an unknown split, a folder that cannot be written.
    """
    folder, splits = _path(folder), list(dict.fromkeys(splits or recipe.splits))
    unknown = [split for split in splits if split not in recipe.splits]
    if unknown:
        raise UserError(f"there is no split {unknown[0]!r} to cache: choose among {', '.join(recipe.splits)}.")
    weights = _flat(params)
    meta = {
        "format": 1,
        **made_by,
        "net": _fields(recipe.net),
        "grid": list(recipe.net.grid),
        "codes": recipe.net.codes,
        "fingerprint": _fingerprint(weights),
        "splits": {},
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = read_meta(folder)
        if any(found[key] != meta[key] for key in ("net", "fingerprint")):
            raise UserError(f"{folder} holds the tokens of other weights (step {found.get('step')}): remove it, or write elsewhere.")
        missing = [split for split in splits if split not in found["splits"]]
        if missing:
            raise UserError(f"{folder} was written without the split {missing[0]!r}: remove it, or write elsewhere.")
        return False
    encode = jax.jit(lambda images: recipe.net.apply(params, images, method="encode"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as own:
            draft = pathlib.Path(own) / "cache"
            for split in splits:
                meta["splits"][split] = _write_split(draft / split, recipe.splits[split](), recipe.image, encode)
            np.savez(draft / WEIGHTS, **weights)
            (draft / META).write_text(json.dumps(meta, indent=1) + "\n")
            os.rename(draft, folder)
    except OSError as error:
        raise UserError(f"the token cache {folder} cannot be written ({error.strerror or error}): choose another folder.") from error
    return True


def token_source(folder: str | os.PathLike, split: str) -> ArraySource:
    """A `Source` of one split, read by memory map: tokens int32 [n, L] and the other arrays of the pictures' source.

    Raises:
      UserError: no such cache or split, or files that are missing or cut short.
    """
    meta, folder = read_meta(folder), _path(folder)
    if split not in meta["splits"]:
        raise UserError(f"the token cache {folder} has no split {split!r}: it holds {', '.join(meta['splits'])}.")
    arrays = {}
    for name, (dtype, shape) in meta["splits"][split].items():
        path = folder / split / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is missing or cut short ({error}): copy it again, or write the cache anew.") from error
        if [arrays[name].dtype.name, list(arrays[name].shape)] != [dtype, shape]:
            raise UserError(f"{path} is not the {dtype} {shape} that was written: copy it again, or write the cache anew.")
    return ArraySource(arrays)


def decoder(folder: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """`tokens [n, L] -> pictures float32 [n, height, width, channels]` in [-1, 1], by the weights in the cache.

    The folder is opened at the first call, so a config can name one that is not written yet.

    Raises:
      UserError: from the first call, no such cache, or weights that are not those of its fingerprint.
    """

    @functools.cache
    def decode():
        net, params = _network(folder)
        return jax.jit(lambda ids: net.apply(params, ids, method="decode"))

    return lambda tokens: by_parts(decode(), np.asarray(tokens))


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """The values of DIR/cache.json: "grid" [h, w], "codes", "config", "step", ... Raises UserError where there is no cache."""
    folder = _path(folder)
    try:
        meta = json.loads((folder / META).read_text())
        if meta["format"] != 1:
            raise UserError(f"the token cache {folder} has the format {meta['format']}, not 1: write it anew.")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        what = f"{folder} is no token cache" if folder.exists() else f"there is no token cache {folder}"
        command = f"python -m mmdiff cache --config configs/cdcd/scenes_tokenizer.py --workdir RUN --out {folder}"
        raise UserError(f"{what}: train a tokenizer and write one with {command}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} cannot be read ({error!r}): write the cache anew.") from error


def by_parts(function: Callable[[np.ndarray], Any], array: np.ndarray) -> np.ndarray:
    """`function` [n, ...] -> [n, ...] over `PART` examples at a time, always that many: it is compiled once."""
    starts = range(0, max(len(array), 1), PART)
    parts = [np.asarray(function(np.resize(array[i : i + PART], (PART, *array.shape[1:])))) for i in starts]
    return np.concatenate(parts)[: len(array)]


def _write_split(folder: pathlib.Path, source: Source, image: str, encode: Callable) -> dict[str, Any]:
    """Encodes a source; -> {name: [dtype, shape]}."""
    folder.mkdir(parents=True)
    written: dict[str, np.ndarray] = {}
    for start in range(0, len(source), PART):
        part = dict(source.take(np.arange(start, min(start + PART, len(source)))))
        part["tokens"] = by_parts(encode, part.pop(image))
        for name, array in part.items():
            if name not in written:
                shape = (len(source), *array.shape[1:])
                written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, shape)
            written[name][start : start + len(array)] = array
    for array in written.values():
        array.flush()
    return {name: [array.dtype.name, list(array.shape)] for name, array in written.items()}


def _network(folder: str | os.PathLike) -> tuple[VQAutoencoder, Any]:
    meta, path = read_meta(folder), _path(folder) / WEIGHTS
    try:
        with np.load(path) as stored:
            weights = dict(stored)
        intact = _fingerprint(weights) == meta["fingerprint"]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again, or write the cache anew.") from error
    if not intact:
        raise UserError(f"{path} is not what was written: copy it again, or write the cache anew.")
    return VQAutoencoder(**meta["net"]), flax.traverse_util.unflatten_dict(weights, sep="/")


def _fields(net: VQAutoencoder) -> dict[str, Any]:
    return {field.name: getattr(net, field.name) for field in dataclasses.fields(net) if field.name not in ("parent", "name")}


def _flat(params: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in flax.traverse_util.flatten_dict(params, sep="/").items()}


def _fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all weights, by name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {weights[name].shape}".encode())
        found.update(np.ascontiguousarray(weights[name]))
    return found.hexdigest()


def _path(folder: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(folder).expanduser()
