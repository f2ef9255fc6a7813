"""Published autoencoders and tokenizers where a config names them: images <-> latents, images <-> tokens. See `named_encoders`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmdiff import files
from mmdiff.convert.weight_files import open_weights
from mmdiff.data import arrays
from mmdiff.data.named_encoders import PART, NamedEncoder
from mmdiff.encoders.preprocessing import AUTOENCODER
from mmdiff.errors import UserError

CODES = "codes.json"
PIXELS = 2**20  # of images that are encoded or decoded at once


class SquareImages(NamedEncoder):
    """What encoders of square images share, whose result is `side` high and wide: the images' size, and how many are encoded at once.

    Attributes:
      functions: (encoding, decoding), each `(net, variables, batch) -> arrays`.
    """

    side: int
    functions: tuple[Callable[..., Any], Callable[..., Any]]
    _decoded: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def pixels(self) -> int:
        """The side of an image: that of the result times what the network shrinks by."""
        return self.side * self.opened.net.downsampling

    @property
    def part(self) -> int:
        """How many are encoded or decoded at once."""
        return part_of(self.pixels)

    def prepare(self, image):
        return dataclasses.replace(AUTOENCODER, size=self.pixels)(image)

    def images(self, array: np.ndarray) -> np.ndarray:
        """What is decoded. The last images are kept: samples are shown several times."""
        if self._decoded is None or not np.array_equal(self._decoded[0], array):
            self._decoded = array, self.call(self.functions[1], array, self.part)
        return self._decoded[1]


class Autoencoder(SquareImages):
    """Images [n, H, W, 3] in [-1, 1] <-> latents as a diffusion model has them, (z - shift) * scale by constants of the network's config.

    `encode` gives moments, the mean and the deviation of latents in the last axis, or of a network without moments its latents.
    """

    kinds, what = ("autoencoder_kl", "autoencoder_tiny"), "autoencoder"

    def __init__(self, section: Mapping[str, Any], side: int, key: str = "encoder", modality: str = "image"):
        super().__init__(section, key)
        self.side, self.modalities = side, (modality,)

    @property
    def moments(self) -> tuple[str, ...]:
        """The modalities that are encoded as mean and deviation."""
        return self.modalities if self.kind == "autoencoder_kl" else ()

    @property
    def functions(self):
        return _moments if self.moments else _encode, _decode_latents

    def encode(self, batch):
        return {self.modalities[0]: self.call(self.functions[0], batch, self.part)}

    def latents(self, images: np.ndarray) -> np.ndarray:
        """The most likely latents of images: [n, h, w, c]."""
        found = self.encode(images)[self.modalities[0]]
        return np.split(found, 2, axis=-1)[0] if self.moments else found

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [n, h, w, c] -> images [n, H, W, 3], clipped to [-1, 1]."""
        return self.images(np.asarray(latents, np.float32))


class ImageTokens(SquareImages):
    """Images [n, H, W, 3] in [-1, 1] <-> ids int32 [n, h * w] in raster order, of a network with a codebook.

    Of a larger codebook only `codes` entries are used, those that the training images use most (`choose`): an image's code is the nearest
    of them. Published models of tokens have a list of their own instead, the section's "codes" (.npy, or PyTorch's): the class of every
    entry of the codebook. One class stands for all entries of little use, and is decoded as the first of them.

    Attributes:
      side: of the grid of tokens. codes: how many entries are used.
      folder: of the cache, whose codes.json notes them.
    """

    kinds, what, fitted = ("vq_model",), "tokenizer", CODES
    _cut: tuple[list[int], tuple[Any, Any]] | None = None  # the network of some entries

    def __init__(
        self, section: Mapping[str, Any], side: int, codes: int, folder: str = "", key: str = "encoder", modality: str = "tokens",
    ):
        super().__init__(section, key)
        self.side, self.codes, self.folder, self.modalities = side, codes, folder, (modality,)
        self._list = section.get("codes", "")

    functions = property(lambda self: (_encode, _decode))
    fitted_for = property(lambda self: {"number": self.codes})

    @functools.cached_property
    def classes(self) -> np.ndarray | None:
        """The published class of each entry of the codebook, int32 [entries]; None without a list. Raises UserError for another list."""
        if not self._list:
            return None
        path, total = files.expand(self._list), self.opened.net.num_vq_embeddings
        found = arrays.read_array(path) if path.suffix == ".npy" else open_weights(path, "")[""].read()
        if found.shape != (total,) or found.dtype.kind not in "iu" or not np.array_equal(np.unique(found), np.arange(self.codes)):
            raise UserError(
                f"{path} holds {found.dtype} {list(found.shape)}, not for each of the {total:,} codes of {self.path} one of {self.codes:,} "
                f"classes: name the list that was published with it by --config.{self.key}.codes.")
        return found.astype(np.int32)

    def encode(self, batch):
        ids = self.call(self.functions[0], batch, self.part) if self.classes is None else self.classes[self._encode_whole(batch)]
        return {self.modalities[0]: ids.reshape(len(batch), -1)}

    def _encode_whole(self, batch: np.ndarray) -> np.ndarray:
        """Ids of the whole codebook."""
        return self.call(_encode, batch, self.part, super().network())

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids [n, h * w] -> images [n, H, W, 3], clipped to [-1, 1]."""
        return self.images(np.asarray(ids).reshape(-1, self.side, self.side))

    def network(self):
        net, params = super().network()
        if (entries := self.entries) is None:
            return net, params
        if self._cut is None or self._cut[0] != entries:
            rows = np.asarray(entries)
            quantize = {"embedding": {"embedding": params["quantize"]["embedding"]["embedding"][rows]}}
            if "proj" in params["quantize"]:  # logits
                quantize["proj"] = {name: array[..., rows] for name, array in params["quantize"]["proj"].items()}
            self._cut = entries, (net.clone(num_vq_embeddings=len(rows)), {**params, "quantize": quantize})
        return self._cut[1]

    @property
    def entries(self) -> list[int] | None:
        """The entries of the codebook that are used; None for all of them."""
        stored, total = read_codes(self.folder), self.opened.net.num_vq_embeddings
        if self.classes is not None:
            listed = np.unique(self.classes, return_index=True)[1].tolist()
            if stored and stored["codes"] != listed:
                raise UserError(f"{self.folder} holds tokens of other codes than those of config.{self.key}.codes: leave that out.")
            return listed
        if not stored and total != self.codes:
            raise UserError(
                f"{CODES} of a cache lists which {self.codes:,} of the {total:,} codes of {self.path} are used: name the cache's folder by "
                f"config.data.dir, or a published list by config.{self.key}.codes.")
        count, least = (len(stored["codes"]), max(stored["codes"], default=-1) + 1) if stored else (self.codes, 0)
        if count != self.codes or least > total:
            raise UserError(
                f"{files.target(self.folder) / CODES} lists {count:,} of {least:,} codes or more, and the config needs {self.codes:,} of "
                f"the {total:,} of {self.path}: name the cache that was written for it.")
        return stored["codes"] if stored and len(stored["codes"]) < total else None

    def noted(self) -> dict[str, Any] | None:
        return read_codes(self.folder)

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, Any]:
        return {"codes": self.choose(batches)}

    def choose(self, batches: Iterable[np.ndarray]) -> list[int]:
        """The `codes` entries of the codebook that prepared images use most, ascending.

        Raises:
          UserError: a codebook with fewer entries.
        """
        total = self.opened.net.num_vq_embeddings
        if self.classes is not None:
            return self.entries
        if total < self.codes:
            raise UserError(f"the tokenizer {self.path} has {total} codes, fewer than the {self.codes} that the config needs.")
        if total == self.codes:
            return list(range(total))
        uses = np.zeros(total, np.int64)
        for batch in batches:
            uses += np.bincount(self._encode_whole(batch).reshape(-1), minlength=total)
        return sorted(np.argsort(-uses, kind="stable")[: self.codes].tolist())

    def fingerprint(self):
        network, stored = super().fingerprint(), read_codes(self.folder)
        if network and self.classes is not None:
            return hashlib.sha256(f"{network} {self.classes.tolist()}".encode()).hexdigest()
        return hashlib.sha256(f"{network} {stored['codes']}".encode()).hexdigest() if network and stored else network


def part_of(pixels: int) -> int:
    """How many images of so many pixels high and wide are encoded or decoded at once."""
    return max(1, min(PART, PIXELS // pixels**2))


def read_codes(folder: str | os.PathLike) -> dict[str, Any] | None:
    """FOLDER/codes.json, {"encoder": fingerprint, "codes": entries}; None without one. Raises UserError for a damaged one."""
    if not folder:
        return None
    path = files.target(folder) / CODES
    try:
        found = files.read_json(path)
        codes = found["codes"]
        if not (isinstance(found["encoder"], str) and isinstance(codes, list) and all(type(code) is int and code >= 0 for code in codes)):
            raise ValueError("entries of a codebook are numbers")
        return found
    except files.Missing:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what mmdiff cache writes ({error}): write the cache again.") from error


def _moments(net, variables, images):
    moments = net.apply(variables, images, method="encode")
    mean, deviation = net.mode(moments), net.deviation(moments)
    return jnp.concatenate([net.scale_latents(mean), net.scale_latents(deviation) - net.scale_latents(jnp.zeros_like(mean))], -1)


def _decode_latents(net, variables, latents):
    latents = net.unscale(latents) if hasattr(net, "unscale") else latents  # AutoencoderTiny's are scaled
    return jnp.clip(net.apply(variables, latents, method="decode"), -1, 1)


def _encode(net, variables, images):
    return net.apply(variables, images, method="encode")


def _decode(net, variables, ids):
    return jnp.clip(net.apply(variables, ids, method="decode"), -1, 1)
