"""A trained network in a folder of its own, with the tokenizer of its texts and the examples that it has encoded once.

    DIR/train/tokens.npy   int32 [n, L]: what the network has made of the images (or music), a row for each example
    DIR/train/text.npy     ...: the other arrays of the source, unchanged; the images are left out
    DIR/test/...
    DIR/weights.npz        averaged (EMA) weights
    DIR/words.json         where there are texts, their tokenizer
    DIR/cache.json         config, step, network and its fields, fingerprint of the weights; type and shape of every array

`mmdiff cache` writes it (`CacheWriter.write`) under another name and renames it when it is complete, so DIR is whole or absent;
after a kill the same call continues. `token_cache` reads the folders of tokenizers, `tower_cache` those of two towers, which have no
splits and towers.json instead of cache.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

from mmdiff import files
from mmdiff.data import arrays, bpe, drafts
from mmdiff.data.sources import Source
from mmdiff.data.sources import fingerprint as source_fingerprint
from mmdiff.errors import UserError
from mmdiff.nets.audio import AudioAutoencoder
from mmdiff.nets.embed import Patches
from mmdiff.nets.tokenizers import VQAutoencoder
from mmdiff.nets.towers import TwoTowers

WEIGHTS, TOKENIZER, BEGUN = "weights.npz", "words.json", "begun.json"
PART = 250  # examples that are encoded or decoded at once,
PIXELS = 2**20  # if they have no more pixels (samples) than these
AUTOENCODERS = {network.__name__: network for network in (VQAutoencoder, AudioAutoencoder)}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What folders of one kind of networks are called, and how a network is stored in JSON.

    Attributes:
      meta: the name of the JSON file. content: what the folder holds. missing: what to do where there is none, with {folder}.
      fields: network -> JSON values. network: all values of the JSON file -> network; fields that older files lack have their defaults.
    """

    meta: str
    content: str
    missing: str
    fields: Callable[[nn.Module], dict[str, Any]]
    network: Callable[[Mapping[str, Any]], nn.Module]


def _autoencoder_fields(net):
    return {field.name: getattr(net, field.name) for field in dataclasses.fields(net) if field.name not in ("parent", "name")}


def _tower_fields(net):
    names = ("vocabulary", "length", "size", "depth", "width", "text_depth", "text_width", "heads", "mlp_ratio", "scan", "norm_eps")
    return {name: getattr(net, name) for name in names} | {"patches": dataclasses.asdict(net.patches)}


TOKENS = Kind(
    "cache.json", "tokens",
    "there is no token cache in {folder}: train a tokenizer (configs/cdcd/scenes_tokenizer.py, images_tokenizer.py) and write one with "
    "mmdiff cache --config TOKENIZER.py --workdir RUN --out {folder}.",
    _autoencoder_fields, lambda meta: AUTOENCODERS[meta.get("network", "VQAutoencoder")](**meta["net"]),
)  # fmt: skip
TOWERS = Kind(
    "towers.json", "towers",
    "there are no towers in {folder}: train some (configs/diffdis/scenes_towers.py) and write them with "
    "mmdiff cache --config TOWERS.py --workdir RUN --out {folder}.",
    _tower_fields, lambda meta: TwoTowers(**{"norm_eps": 1e-6, **meta["net"], "patches": Patches(**meta["net"]["patches"])}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """What `mmdiff cache` writes for an experiment that trains a tokenizer or two towers.

    Attributes:
      net: the network.
      splits: name -> `() -> source` of the images that a tokenizer encodes.
      image: their entry in the source.
      tokens: what their tokens are called in the cache.
      tokenizer: `() -> tokenizer` of their texts, which goes into the cache.
    """

    net: nn.Module
    splits: Mapping[str, Callable[[], Source]] = dataclasses.field(default_factory=dict)
    image: str = "image"
    tokens: str = "tokens"
    tokenizer: Callable[[], bpe.Tokenizer] | None = None

    @property
    def kind(self) -> Kind:
        return TOWERS if isinstance(self.net, TwoTowers) else TOKENS

    def write(self, folder: str | os.PathLike, params: Any, made_by: Mapping[str, Any], splits: Sequence[str] = ()) -> bool:
        """Writes a folder, and returns False if it was there already: the same weights and splits.

        Args:
          folder: where; its parents are made.
          params: the network's weights.
          made_by: JSON values that say what made it, {"config": ..., "step": ...}.
          splits: some of the writer's; by default all.

        Raises:
          UserError: another cache or other files in `folder`, an unknown split, a folder that cannot be written.
        """
        folder, splits, kind = files.on_disk(folder), list(dict.fromkeys(splits or self.splits)), self.kind
        unknown = [split for split in splits if split not in self.splits]
        if unknown:
            remedy = f"choose among {', '.join(self.splits)}" if self.splits else f"leave out --split {' '.join(splits)}"
            raise UserError(f"there is no split {unknown[0]!r} to cache: {remedy}.")
        weights, fields = flat(params), _as_json(kind.fields(self.net))
        meta = {"format": 1, **made_by, "network": type(self.net).__name__, "net": fields, "splits": {}}
        meta["fingerprint"] = fingerprint(weights)
        if kind is TOKENS:
            meta |= {"tokens": self.tokens, "grid": list(self.net.grid), "codes": self.net.codes}
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            found = read_meta(folder, kind)
            # An older cache lacks the fields that its network's class has got since.
            if [_as_json(kind.fields(kind.network(found))), found["fingerprint"]] != [fields, meta["fingerprint"]]:
                step = found.get("step")
                raise UserError(f"{folder} holds the {kind.content} of other weights (step {step}): remove it, or write elsewhere.")
            missing = [split for split in splits if split not in found["splits"]]
            if missing:
                raise UserError(f"{folder} was written without the split {missing[0]!r}: remove it, or write elsewhere.")
            return False
        encode = jax.jit(lambda images: self.net.apply(params, images, method="encode"))
        try:
            sources = {split: self.splits[split]() for split in splits}
            tokenizer = dataclasses.asdict(self.tokenizer()) if self.tokenizer else None
            prints = {split: source_fingerprint(source) for split, source in sources.items()}
            with drafts.draft(folder, _as_json([meta["fingerprint"], fields, tokenizer, prints, PART])) as draft:
                for split, source in sources.items():
                    meta["splits"][split] = self._write_split(draft / split, source, encode)
                for split in sources:
                    (draft / split / BEGUN).unlink(missing_ok=True)
                if tokenizer:
                    files.write_json(draft / TOKENIZER, tokenizer)
                np.savez(draft / WEIGHTS, **weights)
                files.write_json(draft / kind.meta, meta)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another folder.") from error
        return True

    def holds(self, folder: str | os.PathLike, step: int) -> str:
        """The content of a folder that was written, for a person to read."""
        counts = [f"{split} {found[self.tokens][1][0]:,}" for split, found in read_meta(folder, self.kind).get("splits", {}).items()]
        return f"the {self.kind.content} of step {step}" + (f" ({', '.join(counts)})" if counts else "")

    def _write_split(self, folder: pathlib.Path, source: Source, encode: Callable) -> dict[str, Any]:
        """Encodes a source, from where a killed process has stopped; -> {name: [dtype, shape]}."""
        folder.mkdir(exist_ok=True)
        begun, written = folder / BEGUN, {}
        done, names = files.read_json(begun) if begun.exists() else (0, [])
        for name in names:
            written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "r+")
        for start in range(done, len(source), PART):
            part = dict(source.take(np.arange(start, min(start + PART, len(source)))))
            part[self.tokens] = map_batched(encode, part.pop(self.image), part_of(self.net))
            for name, array in part.items():
                if name not in written:
                    shape = (len(source), *array.shape[1:])
                    written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, shape)
                written[name][start : start + len(array)] = array
            for array in written.values():
                array.flush()
            files.write_json(begun, [start + PART, list(written)])
        return {name: [array.dtype.name, list(array.shape)] for name, array in written.items()}


def read_meta(folder: str | os.PathLike, kind: Kind = TOKENS) -> dict[str, Any]:
    """The values of a folder's JSON file: "config", "step", of tokens also "grid" [h, w], "codes", ... UserError where there is none."""
    folder = files.target(folder)
    try:
        meta = files.read_json(folder / kind.meta)
        if meta["format"] != 1:
            raise UserError(f"the {kind.content} in {folder} have the format {meta['format']}, not 1: write them again.")
        return meta
    except files.Missing:
        raise UserError(kind.missing.format(folder=folder)) from None
    except files.FileError as error:
        raise UserError(f"{folder / kind.meta} cannot be read (it {error.reason}): write the {kind.content} again.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / kind.meta} cannot be read ({error!r}): write the {kind.content} again.") from error


def read_network(folder: str | os.PathLike, kind: Kind = TOKENS) -> tuple[nn.Module, Any]:
    """(network, parameters) of a folder. Raises UserError for weights that are missing, or not those of the fingerprint."""
    meta, path = read_meta(folder, kind), files.target(folder) / WEIGHTS
    try:
        weights = arrays.read_arrays(path)
        intact, net = fingerprint(weights) == meta["fingerprint"], kind.network(meta)
    except files.FileError as error:
        raise UserError(f"{path} cannot be read (it {error.reason}): copy it again, or write the {kind.content} again.") from error
    except KeyError as error:
        raise UserError(f"{path.parent / kind.meta} cannot be read ({error!r}): write the {kind.content} again.") from error
    if not intact:
        raise UserError(f"{path} is not what was written: copy it again, or write the {kind.content} again.")
    return net, flax.traverse_util.unflatten_dict(weights, sep="/")


def read_tokenizer(folder: str | os.PathLike, kind: Kind = TOKENS) -> bpe.Tokenizer:
    """The tokenizer of the texts. Raises UserError where there is none."""
    read_meta(folder, kind)
    path = files.target(folder) / TOKENIZER
    try:
        return bpe.read(path)
    except files.Missing:
        raise UserError(f"{path.parent} has no captions (no {TOKENIZER}): choose the cache of images with captions.") from None
    except files.FileError as error:
        raise UserError(f"{path} cannot be read (it {error.reason}): copy it again, or write the {kind.content} again.") from error


def network_fingerprint(folder: str | os.PathLike, kind: Kind = TOKENS) -> str | None:
    """SHA-256 of the weights and of the tokenizer of the texts, if any; None where there is no such folder."""
    folder = files.target(folder)
    if not folder.name or not (folder / kind.meta).exists():
        return None
    found, tokenizer = read_meta(folder, kind)["fingerprint"], folder / TOKENIZER
    return hashlib.sha256(found.encode() + files.read_bytes(tokenizer)).hexdigest() if TOKENIZER in files.names(folder) else found


def part_of(net: nn.Module) -> int:
    """How many examples of an autoencoder are encoded or decoded at once."""
    return min(PART, max(1, PIXELS // math.prod(net.shape[:2])))


def map_batched(function: Callable[[np.ndarray], Any], array: np.ndarray, part: int) -> Any:
    """`function` [n, ...] -> pytree of [n, ...] over `part` examples at a time, always that many: it is compiled once.

    >>> map_batched(lambda x: 2 * x, np.arange(5), part=2)
    array([0, 2, 4, 6, 8])
    """
    starts = range(0, max(len(array), 1), part)
    parts = [jax.device_get(function(np.resize(array[i : i + part], (part, *array.shape[1:])))) for i in starts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(array)], *parts)


def flat(params: Any) -> dict[str, np.ndarray]:
    """Weights as NumPy arrays by path, "params/...": what `np.savez` takes."""
    return {name: np.asarray(array) for name, array in flax.traverse_util.flatten_dict(params, sep="/").items()}


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all weights, by name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {weights[name].shape}".encode())
        found.update(np.ascontiguousarray(weights[name]))
    return found.hexdigest()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
