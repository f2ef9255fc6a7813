"""Published encoders where a config names them: images to latents, tokens and vectors and back, captions to states and vectors.

    "encoder": {"kind": "autoencoder_kl", "path": ""}     in get_config; an empty path is an encoder that is not there yet
    autoencoder = Autoencoder(config.encoder, 32)          in build (see `named_autoencoders`); nothing is read before it is needed

A named encoder is a frozen network with what surrounds it in its place. `encode` takes a batch of images, each prepared by `prepare`, or of
captions, and gives the arrays of one or more modalities; some also `decode`. `fingerprint` tells networks apart. Products are those of
float32 on every device.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from mmdiff import files
from mmdiff.convert.state_dicts import check_floats
from mmdiff.convert.weight_files import open_weights
from mmdiff.data.spreading import Spread
from mmdiff.data.stored_images import decode
from mmdiff.encoders.published_networks import open_encoder
from mmdiff.errors import UserError

PART = 64  # examples that are encoded at once
EPSILON = 1e-12


class NamedEncoder:
    """A published network that a section of a config names, {"kind", "path"}.

    Attributes:
      key: the section, "encoder" by default. kind, path: its values; the path is that of a file, or of a folder with a config.json.
      modalities: what `encode` gives.
      of: what it encodes, "image" or "caption".
      fitted: the file of a cache that has what `fit(batches of training images)` found, which `noted()` reads; "" where nothing is fitted.
      fitted_for: what else than network and images decides what is found; it is stored with it.

    Raises:
      UserError: a kind that has no place here.
    """

    kinds: tuple[str, ...] = ()
    what = "encoder"
    of = "image"
    fitted = ""
    fitted_for: Mapping[str, Any] = MappingProxyType({})
    modalities: tuple[str, ...] = ()
    _placed: tuple[tuple[jax.Device, ...], list[Any], list[Any]] | None = None

    def __init__(self, section: Mapping[str, Any], key: str = "encoder"):
        self.key, self.kind, self.path = key, section["kind"], section["path"]
        if self.kind not in self.kinds:
            raise UserError(f"config.{key}.kind is {self.kind!r}: the {self.what} is one of {', '.join(self.kinds)}.")

    @property
    def opened(self) -> Any:
        """The `mmdiff.encoders.Encoder`. Raises UserError for an empty path and whatever `open_encoder` refuses."""
        if not self.path:
            raise UserError(
                f"config.{self.key}.path is empty: name the published {self.what} of the kind {self.kind}, a file or the folder with its "
                f"config.json, by --config.{self.key}.path=PATH (the config's head says which).")
        try:
            return _opened(self.kind, self.path)
        except files.Missing as error:  # a relative path and another folder, or weights that were moved
            what = str(error).rstrip(".")
            raise UserError(f"{what}: name the published {self.what} where it lies now by --config.{self.key}.path=PATH.") from error

    def fingerprint(self) -> str | None:
        """Of the network; None where none is named."""
        return self.opened.fingerprint if self.path else None

    def described(self) -> dict[str, Any]:
        """What a cache notes of it."""
        return {"kind": self.kind, "fingerprint": self.fingerprint(), "licence": self.opened.licence}

    def prepare(self, image: Any) -> np.ndarray:
        """A Pillow image in colour -> float32 [size, size, 3] as the network takes it."""
        return self.opened.preprocessing(image)

    def encode(self, batch: Any) -> dict[str, np.ndarray]:
        """Prepared images [n, size, size, 3], or n captions -> {modality: [n, ...]}."""
        raise NotImplementedError

    def call(self, function: Callable[..., Any], batch: np.ndarray, part: int, network: tuple[Any, Any] | None = None) -> Any:
        """`function(net, variables, batch)` over `part` examples at a time, each on one device of this process, all by one program.

        A device computes while what the others have found comes back. `network` is another one than `network()`.
        """
        (net, params), batch = network or self.network(), np.asarray(batch)
        starts = range(0, max(len(batch), 1), part)
        devices = tuple(jax.local_devices()[: len(starts)])
        run, computed, parts = _spread(function, net), [], []
        with jax.default_matmul_precision("highest"):
            placed = self._place(params, devices)
            for first in range(0, len(starts), len(devices)):
                rows = [np.resize(batch[i : i + part], (part, *batch.shape[1:])) for i in starts[first : first + len(devices)]]
                now = run(placed[: len(rows)], [(jax.device_put(each, device),) for each, device in zip(rows, devices)])
                computed, before = now, computed
                parts += jax.device_get(before)
        parts += jax.device_get(computed)
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(batch)], *parts)

    def _place(self, params: Any, devices: tuple[jax.Device, ...]) -> list[Any]:
        """The parameters on each device, where they stay."""
        leaves = jax.tree.leaves(params)
        if self._placed is None or self._placed[0] != devices or [*map(id, self._placed[1])] != [*map(id, leaves)]:
            self._placed = devices, leaves, Spread.place({"params": params}, devices)
        return self._placed[2]

    def network(self) -> tuple[Any, Any]:
        """The network in its place, and its parameters."""
        return self.opened.net, self.opened.params


class ImageVectors(NamedEncoder):
    """Images, prepared as the network's publication says, -> vectors float32 [n, size] of the length sqrt(size).

    Of CLIP and SigLIP the projected vector, of DINOv2 the class token. Without `normalized` they are as long as the network makes them.
    """

    kinds, what = ("clip_vision", "siglip_vision", "dinov2"), "image encoder"

    def __init__(
        self, section: Mapping[str, Any], size: int, key: str = "vector_encoder", modality: str = "representation", *,
        normalized: bool = True,
    ):
        super().__init__(section, key)
        self.size, self.modalities, self._normalized = size, (modality,), normalized

    def fingerprint(self):
        network = super().fingerprint()
        return network if self._normalized or not network else hashlib.sha256(f"{network} of any length".encode()).hexdigest()

    def encode(self, batch):
        vectors = self.call(_vector, batch, PART)
        if vectors.shape[1] != self.size:
            raise UserError(f"the {self.what} {self.path} has vectors of {vectors.shape[1]} numbers, but the config needs {self.size}.")
        return {self.modalities[0]: np.float32(self.size**0.5) * unit(vectors) if self._normalized else np.float32(vectors)}


class TextStates(NamedEncoder):
    """Captions -> what a text encoder makes of them: the tokens' states [n, length, width], and where asked for a unit vector [n, size].

    The section may have "tokenizer", too, its file or folder; by default it lies where the weights do. And "reduce", the file or folder of
    UniDiffuser's text decoder, whose linear layer `encode_prefix` then makes fewer numbers of each state (64 of 768).

    Args:
      modality: the states', "" to leave them out. vector: the vector's modality, "" for none: CLIP's and SigLIP's projected one, or without
        a projection the pooled state; MiniLM's of the sentence. T5 has none.
      scaled: the vector's length is sqrt(size), as of `ImageVectors`, not 1.
      normalize: divide each state by its length, as CDCD does.
      masked: zeros after a text's end.
      padding: of CLIP, the id after it, where it is not the one that the tokenizer's files state.
      length: ids of a text for T5 and MiniLM; CLIP and SigLIP have as many as positions.
    """

    kinds, what, of = ("clip_text", "siglip_text", "t5", "sentence_bert"), "text encoder", "caption"

    def __init__(
        self, section: Mapping[str, Any], key: str = "text_encoder", modality: str = "text", vector: str = "", *,
        scaled: bool = False, normalize: bool = False, masked: bool = False, padding: int | None = None, length: int = 77,
    ):
        super().__init__(section, key)
        if vector and self.kind == "t5":
            raise UserError(f"config.{key}.kind is 't5', which has no vector of a text, but the config needs one: choose another kind.")
        if section.get("reduce") and self.kind != "clip_text":
            raise UserError(f"config.{key}.reduce is of CLIP's states, and config.{key}.kind is {self.kind!r}: leave it out.")
        self._names = (modality, vector)
        self.modalities = tuple(filter(None, self._names))
        self._files, self._normalize, self._masked, self._padding = section.get("tokenizer", ""), normalize, masked, padding
        self._length, self._scaled, self._reduce = length, scaled, section.get("reduce", "")

    @functools.cached_property
    def _reduction(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Matrix and offset of the layer that makes fewer numbers of a state. Raises UserError where the file has no such layer."""
        if not self._reduce:
            return None
        found = open_weights(self._reduce)
        names, width = [f"encode_prefix.{part}" for part in ("weight", "bias")], self.opened.net.hidden_size
        if not all(name in found for name in names) or found[names[0]].shape[1:] != (width,):
            raise UserError(
                f"{self._reduce} has no layer encode_prefix for states of {width} numbers: name UniDiffuser's text decoder by "
                f"--config.{self.key}.reduce.")
        check_floats({name: found[name] for name in names}, self._reduce)
        weight, bias = (found[name].read().astype(np.float32) for name in names)
        return weight.T, bias

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the texts. Raises UserError where its files are not found."""
        from mmdiff.encoders import open_tokenizer, read_clip_tokenizer

        path = files.expand(self._files or self.path)
        path = path if self._files or files.is_folder(path) else path.parent
        net = self.opened.net
        length = self._length if self.kind in ("t5", "sentence_bert") else net.max_position_embeddings
        try:
            if self.kind == "clip_text":
                found = read_clip_tokenizer(path, length, padding=self._padding)
            else:
                found = open_tokenizer(self.kind, path, length)
        except files.FileError as error:
            raise UserError(
                f"{str(error).rstrip('.')} (of the tokenizer, whose file or folder --config.{self.key}.tokenizer names where it does not "
                "lie with the weights).") from error
        if found.size > net.vocab_size:
            raise UserError(
                f"the tokenizer in {path} has {found.size:,} ids and the {self.what} {self.path} {net.vocab_size:,}: name the one that was "
                f"published with it by --config.{self.key}.tokenizer.")
        return found

    def fingerprint(self):
        network = super().fingerprint()
        if not network:
            return None
        reduced = b"".join(array.tobytes() for array in self._reduction or ())
        return hashlib.sha256(f"{network} {self.tokenizer.rules} {self.tokenizer.padding}".encode() + reduced).hexdigest()

    def encode(self, batch):
        ids = self.tokenizer.encode(list(batch))
        if self.kind == "clip_text":
            ends = ids == self.tokenizer.end
            mask = (np.cumsum(ends, 1) - ends == 0).astype(np.int32)
        else:
            mask = self.tokenizer.mask(ids)
        states, *vectors = self.call(STATES[self.kind], np.stack([ids, mask], 1), PART)
        states = unit(states) if self._normalize else states
        states = states * mask[..., None] if self._masked else states
        if self._reduction:
            states = states @ self._reduction[0] + self._reduction[1]
        vectors = [unit(each) * (each.shape[-1] ** 0.5 if self._scaled else 1) for each in vectors]
        return {name: array.astype(np.float32) for name, array in zip(self._names, (states, *vectors)) if name}


def prepared(file: Any, encoders: Sequence[NamedEncoder]) -> list[np.ndarray]:
    """A stored image as each encoder takes it. Raises FileError for a damaged one, and for a shape of which no square is cropped."""
    image = decode(file).convert("RGB")
    try:
        return [encoder.prepare(image) for encoder in encoders]
    except UserError as error:
        raise files.FileError(file, f"is not encoded ({str(error).rstrip('.')})", "leave it out") from error


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., d] of length 1; of zeros, zeros."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), EPSILON)


def _vector(net, variables, images):
    found = net.apply(variables, images)
    if isinstance(found, Mapping):  # DINOv2
        return found["cls"]
    return found.pooled if getattr(found, "embedding", None) is None else found.embedding


def _tower(net, variables, texts):  # trained without a mask: CLIP looks back only, SigLIP at padding, too
    found = net.apply(variables, texts[:, 0])
    return found.tokens, found.pooled if found.embedding is None else found.embedding


def _t5(net, variables, texts):
    return (net.apply(variables, texts[:, 0], texts[:, 1]),)


def _bert(net, variables, texts):
    states, _ = net.apply(variables, texts[:, 0], texts[:, 1])
    return states, net.pool(states, texts[:, 1])


STATES = {"clip_text": _tower, "siglip_text": _tower, "t5": _t5, "sentence_bert": _bert}  # texts [n, 2, length]: ids and mask


@functools.lru_cache(maxsize=4)
def _opened(kind: str, path: str) -> Any:
    return open_encoder(kind, path)


@functools.lru_cache(maxsize=16)
def _spread(function: Callable[..., Any], net: Any) -> Spread:
    return Spread(functools.partial(function, net))
