"""Two trained towers in a folder of their own, and sources whose texts they have turned into vectors.

    DIR/weights.npz    the averaged (EMA) weights of a `nets.TwoTowers`
    DIR/words.json     the tokenizer of the texts
    DIR/towers.json    what made them: config, step, sizes, fingerprint of the weights

`python -m mmdiff cache` writes it (`CacheWriter.write`) from a run of configs/diffdis/scenes_towers.py; the folder is whole or absent.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np

from mmdiff.data import arrays, bpe, drafts, files, token_cache
from mmdiff.data.bpe import Tokenizer
from mmdiff.data.sources import Source, digest, fingerprint
from mmdiff.errors import UserError
from mmdiff.nets.embed import Patches
from mmdiff.nets.towers import TwoTowers

META = "towers.json"
PART = 250  # examples of a network call
SIZES = ("vocabulary", "length", "size", "depth", "width", "text_depth", "text_width", "heads", "scan", "norm_eps")
OLDER = {"norm_eps": 1e-6}  # of towers that were written before it was a field


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """What `mmdiff cache` writes for an experiment that trains two towers: the towers themselves, with the tokenizer of their texts."""

    net: TwoTowers
    tokenizer: Callable[[], Tokenizer]

    def write(self, folder: str | os.PathLike, params: Any, made_by: Mapping[str, Any], splits: Sequence[str] = ()) -> bool:
        """Writes the folder, and returns False if it holds these weights already.

        Raises:
          UserError: splits (there are none), other weights or other files in `folder`, a folder that cannot be written.
        """
        if splits:
            raise UserError(f"towers are kept whole, without splits: leave out --split {' '.join(splits)}.")
        folder, weights = files.expand(folder), token_cache.flat(params)
        sizes = {name: getattr(self.net, name) for name in SIZES} | {"patches": dataclasses.asdict(self.net.patches)}
        meta = {"format": 1, **made_by, "net": sizes, "fingerprint": token_cache.fingerprint(weights)}
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if _meta(folder)["fingerprint"] != meta["fingerprint"]:
                raise UserError(f"{folder} holds other towers (step {_meta(folder).get('step')}): remove it, or write elsewhere.")
            return False
        try:
            with drafts.draft(folder, meta["fingerprint"]) as draft:
                np.savez(draft / token_cache.WEIGHTS, **weights)
                files.write_json(draft / token_cache.TOKENIZER, dataclasses.asdict(self.tokenizer()))
                files.write_json(draft / META, meta)
        except OSError as error:
            raise UserError(f"the towers' folder {folder} cannot be written ({error.strerror or error}): choose another.") from error
        return True

    def holds(self, folder: str | os.PathLike, step: int) -> str:
        """What is in a folder that was written, for people."""
        return f"the towers of step {step}"


@dataclasses.dataclass(frozen=True)
class Towers:
    """Frozen towers: texts and images -> unit vectors float32 [n, size].

    Attributes:
      folder: where they lie. It is opened at the first call, so a config can name one that is not written yet.
    """

    folder: str

    def texts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int [n, length] -> (states [n, length, width], vectors [n, size]); states are 0 where there is padding."""
        net, read, _ = _opened(self.folder)
        ids = np.asarray(ids)
        if ids.shape[1:] != (net.length,):
            raise UserError(f"the towers in {self.folder} read texts of {net.length} ids, not {list(ids.shape[1:])}.")
        return token_cache.map_batched(read, ids, PART)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> vectors [n, size]."""
        read = _opened(self.folder)[1]
        return token_cache.map_batched(lambda part: read(part)[1], tokenizer(self.folder).encode(list(texts)), PART)

    def images(self, images: np.ndarray) -> np.ndarray:
        """Images [n, H, W, C] -> vectors [n, size]."""
        net, _, see = _opened(self.folder)
        images, shape = np.asarray(images), (net.patches.height, net.patches.width, net.patches.channels)
        if images.shape[1:] != shape:
            raise UserError(f"the towers in {self.folder} see images of {list(shape)}, not {list(images.shape[1:])}.")
        return token_cache.map_batched(see, images, PART)

    def fingerprint(self) -> str | None:
        """Of their weights and words; None where there are none."""
        folder = files.expand(self.folder)
        return token_cache.with_tokenizer(folder, _meta(folder)["fingerprint"]) if folder.name and (folder / META).exists() else None

    def check(self, size: int) -> None:
        """Raises UserError unless vectors have this size."""
        if (found := _opened(self.folder)[0].size) != size:
            raise UserError(
                f"the towers in {self.folder} have vectors of {found} numbers, but the config needs {size}: choose other towers, or set "
                "config.query.size.")


class WithTextEmbedding:
    """A `Source` of images with texts, to which frozen towers add the text's vector, "query" float32 [n, size].

    Every text is encoded once, when the source is made; for that all examples are read once.

    Args:
      source: text int32 [n, length], and whatever else.
      towers: as in `Towers`.
      size: of the vectors.

    Raises:
      UserError: no towers, or of another size.
    """

    def __init__(self, source: Source, towers: Towers, size: int):
        towers.check(size)
        self._source = source
        ids = np.concatenate([
            source.take(np.arange(start, min(start + 1000, len(source))))["text"] for start in range(0, len(source), 1000)])
        texts, which = np.unique(ids, axis=0, return_inverse=True)
        self._which, self._vectors = which.reshape(-1), towers.texts(texts)[1]

    def __len__(self):
        return len(self._source)

    def take(self, indices):
        return {**self._source.take(indices), "query": self._vectors[self._which[np.asarray(indices, np.int64)]]}

    def fingerprint(self):
        return digest(len(self), "described", fingerprint(self._source))  # the towers have a fingerprint of their own


def tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of the towers' texts. Raises UserError where there are no towers."""
    path = files.expand(folder)
    _meta(path)
    try:
        return bpe.read(path / token_cache.TOKENIZER)
    except files.FileError as error:
        raise UserError(
            f"{path / token_cache.TOKENIZER} cannot be read (it {error.reason}): copy it again, or write the towers again.") from error


def _meta(folder: pathlib.Path) -> dict[str, Any]:
    try:
        meta = files.read_json(folder / META)
        if meta["format"] != 1:
            raise UserError(f"the towers in {folder} have the format {meta['format']}, not 1: write them anew.")
        return meta
    except files.Missing:
        raise UserError(
            f"there are no towers in {folder}: train some (configs/diffdis/scenes_towers.py) and write them with "
            f"python -m mmdiff cache --config TOWERS.py --workdir RUN --out {folder}.") from None
    except files.FileError as error:
        raise UserError(f"{folder / META} cannot be read (it {error.reason}): write the towers anew.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / META} cannot be read ({error!r}): write the towers anew.") from error


@functools.lru_cache(maxsize=4)
def _opened(folder: str):
    path = files.expand(folder)
    meta = _meta(path)
    try:
        weights = arrays.read_arrays(path / token_cache.WEIGHTS)
    except files.FileError as error:
        raise UserError(
            f"{path / token_cache.WEIGHTS} cannot be read (it {error.reason}): copy it again, or write the towers again.") from error
    if token_cache.fingerprint(weights) != meta["fingerprint"]:
        raise UserError(f"{path / token_cache.WEIGHTS} is not what was written: copy it again, or write the towers anew.")
    net = TwoTowers(**{**OLDER, **meta["net"], "patches": Patches(**meta["net"]["patches"])})
    params = flax.traverse_util.unflatten_dict(weights, sep="/")

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    read = jax.jit(lambda ids: net.apply(params, ids, method="read"))
    see = jax.jit(lambda images: net.apply(params, images, method="see"))

    def reading(ids):
        states, vectors = jax.device_get(read(ids))
        return states, unit(vectors)

    return net, reading, lambda images: unit(jax.device_get(see(images)))
