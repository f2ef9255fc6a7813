"""Frozen towers, read from a folder (see `network_cache`), and sources with the embeddings that they give to texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from mmdiff.data import network_cache
from mmdiff.data.network_cache import TOWERS, map_batched
from mmdiff.data.sources import Source, digest, fingerprint
from mmdiff.errors import UserError


@dataclasses.dataclass(frozen=True)
class Towers:
    """Frozen towers: texts and images -> unit vectors float32 [n, size].

    Attributes:
      folder: see `network_cache`. It is opened at the first call, so a config can name one that is not written yet.
    """

    folder: str

    def texts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int [n, length] -> (states [n, length, width], vectors [n, size]); states are 0 where there is padding."""
        net, encode_text, _ = _opened(self.folder)
        ids = np.asarray(ids)
        if ids.shape[1:] != (net.length,):
            raise UserError(f"the towers in {self.folder} encode texts of {net.length} ids, not {list(ids.shape[1:])}.")
        return map_batched(encode_text, ids, network_cache.PART)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> vectors [n, size]."""
        return self.texts(network_cache.read_tokenizer(self.folder, TOWERS).encode(list(texts)))[1]

    def images(self, images: np.ndarray) -> np.ndarray:
        """Images [n, H, W, C] -> vectors [n, size]."""
        net, _, encode_image = _opened(self.folder)
        images, shape = np.asarray(images), (net.patches.height, net.patches.width, net.patches.channels)
        if images.shape[1:] != shape:
            raise UserError(f"the towers in {self.folder} encode images of {list(shape)}, not {list(images.shape[1:])}.")
        return map_batched(encode_image, images, network_cache.PART)

    def fingerprint(self) -> str | None:
        """Of their weights and tokenizer; None where there are none."""
        return network_cache.network_fingerprint(self.folder, TOWERS)

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


@functools.lru_cache(maxsize=4)
def _opened(folder: str):
    """-> (network, jitted text encoder, jitted image encoder), both encoders to unit vectors."""
    net, params = network_cache.read_network(folder, TOWERS)

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    text_tower = jax.jit(lambda ids: net.apply(params, ids, method="encode_text"))
    image_tower = jax.jit(lambda images: net.apply(params, images, method="encode_image"))

    def encode_text(ids):
        states, vectors = jax.device_get(text_tower(ids))
        return states, unit(vectors)

    return net, encode_text, lambda images: unit(jax.device_get(image_tower(images)))
