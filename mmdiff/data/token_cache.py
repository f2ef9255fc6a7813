"""Sources of the examples that a tokenizer has encoded, and the decoder that turns tokens into images.

A tokenizer of one's own writes a folder as `network_cache` has it, with its weights; a published one, which the config names, a folder as
`mmdiff.data.encoded` has it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmdiff import files
from mmdiff.data import arrays
from mmdiff.data.bpe import Tokenizer, train
from mmdiff.data.latents import LatentSource
from mmdiff.data.named_encoders import NamedEncoder
from mmdiff.data.network_cache import TOKENS, map_batched, part_of, read_network, read_tokenizer
from mmdiff.data.network_cache import read_meta as read_network_meta
from mmdiff.data.shards import is_encoded
from mmdiff.data.sources import ArraySource, Source, check_range, digest, made_up
from mmdiff.data.sources import fingerprint as source_fingerprint
from mmdiff.data.token_modalities import DiscreteModality, TokenImages
from mmdiff.errors import UserError

NO_FOLDER = (
    "config.data.dir is empty: name the folder of a token cache (the config's head says how to write one), "
    "or try the config out on made-up tokens with config.data.source=random."
)


def token_source(folder: str | os.PathLike, split: str, modalities: Mapping[str, Any] | None = None) -> ArraySource:
    """A `Source` of one split, read by memory map: tokens int32 [n, L] and the other arrays of the images' source.

    Args:
      folder: of the cache.
      split: of it.
      modalities: what the config expects, all of which must be there, the tokens of its grid and of no more codes; by default any.

    Raises:
      UserError: no such cache or split, files that are missing or cut short, tokens of another name or grid, more codes, no such modality.
    """
    meta, folder = read_meta(folder), files.target(folder)
    if modalities is not None:
        _check_tokens(folder, meta, modalities)
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
            raise UserError(f"{path} is missing or cut short (it {error.reason}): copy it again, or write the tokens again.") from error
        if [found[name].dtype.name, list(found[name].shape)] != [dtype, shape]:
            raise UserError(f"{path} is not the {dtype} {shape} that was written: copy it again, or write the tokens again.")
    if missing := [name for name in modalities or () if name not in found]:
        raise UserError(f"the token cache {folder} has no {missing[0]}: it holds {', '.join(found)}.")
    return ArraySource(found)


def decoder(folder: str | os.PathLike, encoder: NamedEncoder | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """`tokens [n, L] -> images (music) float32 [n, *shape]` in [-1, 1], by the weights in the cache, or by the encoder that wrote it.

    The folder is opened at the first call, or by the function's `open()`, so a config can name one that is not written yet.

    Raises:
      UserError: then, no such cache, or weights that are not those of its fingerprint.
    """

    @functools.cache
    def decode():
        net, params = read_network(folder)
        return jax.jit(lambda ids: net.apply(params, ids, method="decode")), part_of(net)

    def by_encoder():
        return encoder and (not folder or is_encoded(folder))

    def images(tokens):
        if by_encoder():
            return encoder.decode(tokens)
        function, part = decode()
        return map_batched(function, np.asarray(tokens), part)

    images.open = lambda: encoder.network() if by_encoder() else decode()
    return images


def open_tokens(data: Any, split: str, modalities: Mapping[str, Any]) -> Source:
    """The examples that a config's `data` section names: {"source": "tokens", "dir": FOLDER} or {"source": "random"}.

    Args:
      data: the section; "random" makes examples up and needs no folder.
      split: of the cache.
      modalities: what the config expects: name -> `TokenImages`, `Sequences`, `Labels`, `Texts`. Where an image has several captions,
        an example is an image with one of them (see `Captioned`).

    Raises:
      UserError: another source, no folder, what `token_source` refuses, captions as ids for a published text encoder, labels out of range.
    """
    if data.source == "random":
        return made_up(modalities, split)
    if data.source != "tokens":
        raise UserError(f"config.data.source is {data.source!r}: choose tokens or random.")
    if not data.dir:
        raise UserError(NO_FOLDER)
    if is_encoded(data.dir):
        return LatentSource(data.dir, split, modalities)
    source = token_source(data.dir, split, modalities)
    if "text" in modalities and not isinstance(modalities["text"], DiscreteModality):
        raise UserError(
            f"the token cache {data.dir} has captions as ids, but the config needs what a published encoder makes of them: set "
            "config.text.published=false, or write a cache with that encoder.")
    for name in modalities:
        if source.arrays[name].ndim == 1:
            modalities[name].check(source.arrays[name])  # labels: small enough to be read whole
    source = ArraySource({name: source.arrays[name] for name in modalities})
    return Captioned(source) if "text" in modalities and source.arrays["text"].ndim == 3 else source


def _check_tokens(folder: str | os.PathLike, meta: Mapping[str, Any], modalities: Mapping[str, Any]) -> None:
    name = meta.get("tokens", "tokens")
    if name not in modalities:
        raise UserError(f"the token cache {folder} holds {name}, but the config needs {', '.join(modalities)}.")
    tokens = modalities[name]
    grid = [tokens.height, tokens.width] if isinstance(tokens, TokenImages) else list(tokens.shape)
    if meta["grid"] != grid or meta["codes"] > tokens.states:  # of a smaller codebook the network has classes that never occur
        found, needed = (" x ".join(map(str, sides)) for sides in (meta["grid"], grid))
        raise UserError(
            f"the token cache {folder} has {found} tokens of {meta['codes']} codes, but the config needs "
            f"{needed} of {tokens.states} at most: choose the cache of another tokenizer.")


def open_tokenizer(data: Any, length: int) -> Tokenizer:
    """The tokenizer of the captions in the cache that a config's `data` section names; a small one where it names none.

    So a config can be built before its data are there (`open_tokens` asks for them), and on made-up data.

    Raises:
      UserError: no such cache, one without captions or of captions of another length.
    """
    if data.source == "random" or not data.dir:
        return train(["a picture"], length)
    tokenizer = read_tokenizer(data.dir)
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
        image, caption = np.divmod(indices, self._captions)
        found = self._source.take(image)
        return {**found, "text": found["text"][np.arange(len(indices)), caption]}

    def fingerprint(self):
        return digest(len(self), "captioned", source_fingerprint(self._source))


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """The values of DIR/cache.json: "grid" [h, w], "codes", "config", "step", ... Raises UserError where there is no cache."""
    if not os.fspath(folder):
        raise UserError(NO_FOLDER)
    return read_network_meta(folder, TOKENS)
