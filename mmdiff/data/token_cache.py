"""A cache of tokens on disk: images or music that a trained tokenizer has encoded once, and what turns tokens into these again.

    DIR/train/tokens.npy   int32 [n, L], in raster order
    DIR/train/text.npy     ...: the other arrays of the source, as they are; its images (or music) are left out
    DIR/test/...
    DIR/weights.npz        the tokenizer's averaged (EMA) weights
    DIR/words.json         of images with captions, the tokenizer of the captions: `text` is int32 [n, captions, length] in its ids
    DIR/cache.json         what made it: config, step, network, grid, codes, fingerprint of the weights; arrays of every split

`write` makes the folder under another name and renames it when all is there, so DIR is whole or absent; after a kill the same call
continues. A decoder needs DIR alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np

from mmdiff.data import arrays, drafts, files
from mmdiff.data.bpe import Tokenizer, read, train
from mmdiff.data.sources import ArraySource, RandomSource, Source, check_range, digest
from mmdiff.data.sources import fingerprint as source_fingerprint
from mmdiff.data.token_modalities import TokenImages
from mmdiff.errors import UserError
from mmdiff.nets.audio import AudioAutoencoder
from mmdiff.nets.tokenizers import Autoencoder, VQAutoencoder

META, WEIGHTS, TOKENIZER, BEGUN = "cache.json", "weights.npz", "words.json", "begun.json"
PART = 250  # examples that are encoded or decoded at once,
PIXELS = 2**20  # if they have no more pixels (samples) than these
NO_FOLDER = (
    "config.data.dir is empty: name the folder of a token cache (the head of configs/cdcd/pictures_tokenizer.py says how to write one), "
    "or try the config out on made-up tokens with config.data.source=random."
)
NETWORKS = {network.__name__: network for network in (VQAutoencoder, AudioAutoencoder)}


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """What `mmdiff cache` writes for an experiment that trains a tokenizer.

    Attributes:
      net: the tokenizer.
      splits: name -> `() -> source` of the images.
      image: their entry in the source.
      tokens: what their tokens are called in the cache.
      tokenizer: `() -> tokenizer` of their captions, which goes into the cache.
    """

    net: Autoencoder
    splits: Mapping[str, Callable[[], Source]]
    image: str = "image"
    tokens: str = "tokens"
    tokenizer: Callable[[], Tokenizer] | None = None

    def write(self, folder: str | os.PathLike, params: Any, made_by: Mapping[str, Any], splits: Sequence[str] = ()) -> bool:
        """As the function `write`."""
        return write(folder, self, params, made_by, splits)

    def holds(self, folder: str | os.PathLike, step: int) -> str:
        """What is in a folder that was written, for people."""
        counts = {split: arrays[self.tokens][1][0] for split, arrays in read_meta(folder)["splits"].items()}
        return f"the tokens of step {step} ({', '.join(f'{split} {count:,}' for split, count in counts.items())})"


def write(folder: str | os.PathLike, recipe: CacheWriter, params: Any, made_by: Mapping[str, Any], splits: Sequence[str] = ()) -> bool:
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
    weights = flat(params)
    meta = {
        "format": 1,
        **made_by,
        "network": type(recipe.net).__name__,
        "net": _fields(recipe.net),
        "tokens": recipe.tokens,
        "grid": list(recipe.net.grid),
        "codes": recipe.net.codes,
        "fingerprint": fingerprint(weights),
        "splits": {},
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = read_meta(folder)
        # An older cache lacks the fields that its network's class has got since.
        if [_fields(_net(found)), found["fingerprint"]] != [meta["net"], meta["fingerprint"]]:
            raise UserError(f"{folder} holds the tokens of other weights (step {found.get('step')}): remove it, or write elsewhere.")
        missing = [split for split in splits if split not in found["splits"]]
        if missing:
            raise UserError(f"{folder} was written without the split {missing[0]!r}: remove it, or write elsewhere.")
        return False
    encode = jax.jit(lambda images: recipe.net.apply(params, images, method="encode"))
    try:
        sources = {split: recipe.splits[split]() for split in splits}
        tokenizer = dataclasses.asdict(recipe.tokenizer()) if recipe.tokenizer else None
        made_of = [
            meta["fingerprint"], meta["net"], tokenizer, {split: source_fingerprint(source) for split, source in sources.items()}, PART]
        with drafts.draft(folder, json.loads(json.dumps(made_of))) as draft:
            for split, source in sources.items():
                meta["splits"][split] = _write_split(draft / split, recipe, source, encode)
            for split in sources:
                (draft / split / BEGUN).unlink(missing_ok=True)
            if tokenizer:
                files.write_json(draft / TOKENIZER, tokenizer)
            np.savez(draft / WEIGHTS, **weights)
            files.write_json(draft / META, meta)
    except OSError as error:
        raise UserError(f"the token cache {folder} cannot be written ({error.strerror or error}): choose another folder.") from error
    return True


def token_source(folder: str | os.PathLike, split: str) -> ArraySource:
    """A `Source` of one split, read by memory map: tokens int32 [n, L] and the other arrays of the images' source.

    Raises:
      UserError: no such cache or split, or files that are missing or cut short.
    """
    meta, folder = read_meta(folder), _path(folder)
    if split not in meta["splits"]:
        older = split == "validation"  # the test data, which took its place, is what is reported: no choice may see it
        way = "write a new one elsewhere, or train without evaluations, --config.train.eval_every=0" if older else "choose one of these"
        raise UserError(f"the token cache {folder} has no split {split!r}, only {', '.join(meta['splits'])}: {way}.")
    found = {}
    for name, (dtype, shape) in meta["splits"][split].items():
        path = folder / split / f"{name}.npy"
        try:
            found[name] = arrays.read_array(path, mmap=True)
        except files.FileError as error:
            raise UserError(f"{path} is missing or cut short (it {error.reason}): copy it again, or write the cache anew.") from error
        if [found[name].dtype.name, list(found[name].shape)] != [dtype, shape]:
            raise UserError(f"{path} is not the {dtype} {shape} that was written: copy it again, or write the cache anew.")
    return ArraySource(found)


def decoder(folder: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """`tokens [n, L] -> images (music) float32 [n, *shape]` in [-1, 1], by the weights in the cache.

    The folder is opened at the first call, so a config can name one that is not written yet.

    Raises:
      UserError: from the first call, no such cache, or weights that are not those of its fingerprint.
    """

    @functools.cache
    def decode():
        net, params = _network(folder)
        return jax.jit(lambda ids: net.apply(params, ids, method="decode")), part_of(net)

    def images(tokens):
        function, part = decode()
        return map_batched(function, np.asarray(tokens), part)

    return images


def open_tokens(data: Any, split: str, modalities: Mapping[str, Any]) -> Source:
    """The examples that a config's `data` section names: {"source": "tokens", "dir": FOLDER} or {"source": "random"}.

    Args:
      data: the section; "random" makes examples up and needs no folder.
      split: of the cache.
      modalities: what the config expects: name -> `TokenImages`, `Sequences`, `Labels`, `Texts`. Where an image has several captions,
        an example is an image with one of them (see `Captioned`).

    Raises:
      UserError: another source, no folder, what `token_source` refuses, or a cache of another grid, codebook or without a modality.
    """
    if data.source == "random":
        return RandomSource(modalities, 1_000_000 if split == "train" else 1024)
    if data.source != "tokens":
        raise UserError(f"config.data.source is {data.source!r}: choose tokens or random.")
    if not data.dir:
        raise UserError(NO_FOLDER)
    source, meta = token_source(data.dir, split), read_meta(data.dir)
    name = meta.get("tokens", "tokens")
    if name not in modalities:
        raise UserError(f"the token cache {data.dir} holds {name}, but the config needs {', '.join(modalities)}.")
    tokens = modalities[name]
    grid = [tokens.height, tokens.width] if isinstance(tokens, TokenImages) else list(tokens.shape)
    if [*meta["grid"], meta["codes"]] != [*grid, tokens.states]:
        found, needed = (" x ".join(map(str, sides)) for sides in (meta["grid"], grid))
        raise UserError(
            f"the token cache {data.dir} has {found} tokens of {meta['codes']} codes, but the config needs "
            f"{needed} of {tokens.states}: choose the cache of another tokenizer."
        )
    missing = [name for name in modalities if name not in source.arrays]
    if missing:
        raise UserError(f"the token cache {data.dir} has no {missing[0]}: it holds {', '.join(source.arrays)}.")
    for name in modalities:
        if source.arrays[name].ndim == 1:
            modalities[name].check(source.arrays[name])  # labels: small enough to be read whole
    source = ArraySource({name: source.arrays[name] for name in modalities})
    return Captioned(source) if "text" in modalities and source.arrays["text"].ndim == 3 else source


def open_tokenizer(data: Any, length: int) -> Tokenizer:
    """The tokenizer of the captions in the cache that a config's `data` section names; a small one where it names none.

    So a config can be built before its data are there (`open_tokens` asks for them), and on made-up data.

    Raises:
      UserError: no such cache, one without captions or of captions of another length.
    """
    if data.source == "random" or not data.dir:
        return train(["a picture"], length)
    read_meta(data.dir)
    path = _path(data.dir) / TOKENIZER
    try:
        tokenizer = read(path)
    except files.Missing:
        raise UserError(f"the token cache {data.dir} has no captions (no {TOKENIZER}): choose one of images with captions.") from None
    except files.FileError as error:
        raise UserError(f"{path} cannot be read (it {error.reason}): copy it again, or write the cache anew.") from error
    if tokenizer.length != length:
        raise UserError(f"the captions in the token cache {data.dir} have {tokenizer.length} ids, but the config needs {length}.")
    return tokenizer


class Captioned:
    """A `Source` of images with one caption each, from images with k: example `i` is image `i // k` with its caption `i % k`.

    An epoch so shows every caption once.

    Args:
      source: text int32 [n, k, length], and whatever else.
    """

    def __init__(self, source: Source):
        self._source = source
        self._captions = source.take(np.zeros(1, np.int64))["text"].shape[1]

    def __len__(self):
        return len(self._source) * self._captions

    def take(self, indices):
        indices = np.asarray(indices, np.int64)
        check_range(indices, len(self))
        picture, caption = np.divmod(indices, self._captions)
        found = self._source.take(picture)
        return {**found, "text": found["text"][np.arange(len(indices)), caption]}

    def fingerprint(self):
        return digest(len(self), "captioned", source_fingerprint(self._source))


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """The values of DIR/cache.json: "grid" [h, w], "codes", "config", "step", ... Raises UserError where there is no cache."""
    if not os.fspath(folder):
        raise UserError(NO_FOLDER)
    folder = _path(folder)
    try:
        meta = files.read_json(folder / META)
        if meta["format"] != 1:
            raise UserError(f"the token cache {folder} has the format {meta['format']}, not 1: write it anew.")
        return meta
    except files.Missing:
        what = f"{folder} is no token cache" if folder.exists() else f"there is no token cache {folder}"
        command = f"python -m mmdiff cache --config TOKENIZER.py --workdir RUN --out {folder}"
        raise UserError(
            f"{what}: train a tokenizer (configs/cdcd/scenes_tokenizer.py, pictures_tokenizer.py) and write one with {command}."
        ) from None
    except files.FileError as error:
        raise UserError(f"{folder / META} cannot be read (it {error.reason}): write the cache anew.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / META} cannot be read ({error!r}): write the cache anew.") from error


def tokenizer_fingerprint(folder: str | os.PathLike) -> str | None:
    """A fingerprint of the tokenizer that wrote a cache, and of the words of its captions; None where there is no cache."""
    folder = _path(folder)
    return with_tokenizer(folder, read_meta(folder)["fingerprint"]) if folder.name and (folder / META).exists() else None


def with_tokenizer(folder: pathlib.Path, found: str) -> str:
    """A fingerprint of weights and, where there are texts, of the tokenizer that gives their words numbers."""
    tokenizer = folder / TOKENIZER
    return hashlib.sha256(found.encode() + files.read_bytes(tokenizer)).hexdigest() if os.path.lexists(tokenizer) else found


def part_of(net: Autoencoder) -> int:
    """How many examples of a network are encoded or decoded at once."""
    return min(PART, max(1, PIXELS // math.prod(net.shape[:2])))


def map_batched(function: Callable[[np.ndarray], Any], array: np.ndarray, part: int) -> Any:
    """`function` [n, ...] -> pytree of [n, ...] over `part` examples at a time, always that many: it is compiled once."""
    starts = range(0, max(len(array), 1), part)
    parts = [jax.device_get(function(np.resize(array[i : i + part], (part, *array.shape[1:])))) for i in starts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(array)], *parts)


def _write_split(folder: pathlib.Path, recipe: CacheWriter, source: Source, encode: Callable) -> dict[str, Any]:
    """Encodes a source, from where a killed process has stopped; -> {name: [dtype, shape]}."""
    folder.mkdir(exist_ok=True)
    begun, written = folder / BEGUN, {}
    done, names = files.read_json(begun) if begun.exists() else (0, [])
    for name in names:
        written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "r+")
    for start in range(done, len(source), PART):
        part = dict(source.take(np.arange(start, min(start + PART, len(source)))))
        part[recipe.tokens] = map_batched(encode, part.pop(recipe.image), part_of(recipe.net))
        for name, array in part.items():
            if name not in written:
                shape = (len(source), *array.shape[1:])
                written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, shape)
            written[name][start : start + len(array)] = array
        for array in written.values():
            array.flush()
        files.write_json(begun, [start + PART, list(written)])
    return {name: [array.dtype.name, list(array.shape)] for name, array in written.items()}


def _network(folder: str | os.PathLike) -> tuple[Autoencoder, Any]:
    meta, path = read_meta(folder), _path(folder) / WEIGHTS
    try:
        weights = arrays.read_arrays(path)
        intact = fingerprint(weights) == meta["fingerprint"]
    except files.FileError as error:
        raise UserError(f"{path} cannot be read (it {error.reason}): copy it again, or write the cache anew.") from error
    except KeyError as error:
        raise UserError(f"{_path(folder) / META} cannot be read ({error!r}): write the cache anew.") from error
    if not intact:
        raise UserError(f"{path} is not what was written: copy it again, or write the cache anew.")
    return _net(meta), flax.traverse_util.unflatten_dict(weights, sep="/")


def _net(meta: Mapping[str, Any]) -> Autoencoder:
    """The network of a cache's values; one from before there were several kinds is of images."""
    return NETWORKS[meta.get("network", "VQAutoencoder")](**meta["net"])


def _fields(net: Autoencoder) -> dict[str, Any]:
    fields = {field.name: getattr(net, field.name) for field in dataclasses.fields(net) if field.name not in ("parent", "name")}
    return json.loads(json.dumps(fields))  # as they come back


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


def _path(folder: str | os.PathLike) -> pathlib.Path:
    return files.expand(folder)
