"""Published networks by kind: from a file or folder to a frozen network with its parameters, wherever it was published.

    vae = open_encoder("autoencoder_kl", "weights/sd-vae-ft-ema")
    moments = vae.apply(vae.preprocessing(image)[None], method="encode")             # image uint8 [H, W, 3] of the side that is meant
    clip, tokenizer = open_encoder("clip_text", folder), open_tokenizer("clip_text", folder)
    states = clip.apply(tokenizer.encode(["a red bird"])).tokens                     # [1, 77, width]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.convert.weight_files import open_weights, weight_files
from mmdiff.encoders.preprocessing import Preprocessing
from mmdiff.encoders.published_configs import beside, network_of, part_of_pipeline
from mmdiff.encoders.published_kinds import KINDS, Kind
from mmdiff.errors import UserError
from mmdiff.files import expand, open_regular

DTYPES = ("float32", "bfloat16", "float16", "float64")
SPLIT_SIZE = 2**14  # numbers; smaller arrays lie on every device


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A published network with its parameters, frozen.

    Attributes:
      kind: of KINDS.
      net, params: `encoder.apply(x, method="encode")` is `net.apply({"params": params}, x, method="encode")`.
      config: of the published config.json.
      preprocessing: of images, None where it takes none.
      licence: of the weights of this kind.
      counts: {"tensors", "parameters", "dtype"} of the file.
      files: that hold the weights; `fingerprint` is of these.
    """

    kind: str
    net: nn.Module
    params: Any
    config: Mapping[str, Any]
    preprocessing: Preprocessing | None
    licence: str
    counts: Mapping[str, Any]
    files: tuple[pathlib.Path, ...]

    def apply(self, *inputs: Any, **options: Any) -> Any:
        """The network of these parameters: `method="encode"`, "decode", "features", or by default its `__call__`."""
        return self.net.apply({"params": self.params}, *inputs, **options)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the kind, the network's configuration and the files' contents: what caches of its outputs are checked by."""
        parts = [self.kind, self.net.config(), [_file_digest(path) for path in self.files]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def open_encoder(
    kind: str,
    path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    sharding: Sharding | Callable[[tuple[str, ...], Any], Sharding] | None = None,
    config: Mapping[str, Any] | str | None = None,
    within: str | None = None,
) -> Encoder:
    """A published network, from where its weights lie.

    Args:
      kind: of KINDS.
      path: a file of weights; a folder of diffusers or transformers; a whole pipeline's folder, of which the part of this kind is taken.
      dtype: of the computation; parameters are float32.
      sharding: of the parameters, or (path, shape and type) -> sharding, e.g. `split_over(mesh)`; by default they lie on one device. Each
        host reads the parts of its own devices, one at a time.
      config: values as in config.json, its path, or one of the published configurations (CONFIGS of the network's module). By default the
        config.json beside the weights, else the one published configuration that has these tensors.
      within: the sub-dictionary of a checkpoint, see `open_weights`.

    Raises:
      UserError: an unknown kind, no weights, weights of another network (the first five wrong keys and a count), no configuration; float16
        where the network's activations pass its largest number.

    >>> import tempfile
    >>> from mmdiff.convert import write_weights
    >>> from mmdiff.encoders import SentenceBERT
    >>> from mmdiff.encoders.published_configs import abstract_params
    >>> net = SentenceBERT(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(net))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_weights(folder, state_dicts.state_dict(zeros), net.config())
    ...     encoder = open_encoder("sentence_bert", folder)
    >>> encoder.net.hidden_size, encoder.licence, encoder.counts["dtype"]
    (8, 'Apache-2.0', 'float32')
    """
    if kind not in KINDS:
        raise UserError(f"no published network is of the kind {kind!r}: there are {', '.join(KINDS)}.")
    of, path = KINDS[kind], expand(path)
    if str(getattr(dtype, "__name__", dtype)) not in DTYPES:
        raise UserError(f"dtype={dtype!r} of a published network must be one of {', '.join(DTYPES)}.")
    path = part_of_pipeline(kind, path)
    weights = of.cls.canonical(open_weights(path, within))
    net, abstract, values = network_of(kind, path, config, weights)
    net = net.clone(dtype=jnp.dtype(dtype))
    params = state_dicts.load_params(abstract, weights, str(path), place=functools.partial(_place, sharding))
    types = sorted({str(tensor.dtype) for tensor in weights.values()})
    counts = {"tensors": len(weights), "parameters": sum(tensor.size for tensor in weights.values()), "dtype": ", ".join(types)}
    return Encoder(kind, net, params, values, _preprocessing(of, net, path), of.licence, counts, tuple(weight_files(path)))


def split_over(mesh: Mesh) -> Callable[[tuple[str, ...], Any], Sharding]:
    """Shardings for `open_encoder`: each parameter split over all devices of a mesh along its longest dimension that they divide."""

    def of(path: tuple[str, ...], leaf: Any) -> Sharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if leaf.size < SPLIT_SIZE or not axes:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, mesh.axis_names))

    return of


def _place(sharding: Any, path: tuple[str, ...], tensor: Tensor, leaf: Any) -> jax.Array:
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return tensor.put(sharding if isinstance(sharding, Sharding) else sharding(path, leaf))


def _preprocessing(kind: Kind, net: nn.Module, path: pathlib.Path) -> Preprocessing | None:
    if kind.preprocessing is None:
        return None
    for name, read in (("preprocessor_config.json", Preprocessing.from_config), ("open_clip_config.json", Preprocessing.from_open_clip)):
        if (stated := beside(path, name)) is not None:
            return read(stated)
    return kind.preprocessing(net)


def _file_digest(path: pathlib.Path) -> str:
    status = os.stat(path)
    return _digest(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=1024)
def _digest(path: str, *unchanged: int) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
