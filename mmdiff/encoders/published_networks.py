"""Published networks by kind: from a file or folder to a frozen network with its parameters, wherever it was published."""

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
from mmdiff.encoders.published_kinds import KINDS, Kind
from mmdiff.errors import UserError
from mmdiff.files import FileError, Missing, expand, folders, is_folder, open_regular, read_json

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
    """
    if kind not in KINDS:
        raise UserError(f"no published network is of the kind {kind!r}: there are {', '.join(KINDS)}.")
    of, path = KINDS[kind], expand(path)
    path = _part_of_pipeline(kind, path)
    weights = of.cls.canonical(open_weights(path, within))
    net, values = _network(kind, path, config, weights)
    if jnp.dtype(dtype) == jnp.float16 and values.get("force_upcast"):
        raise UserError(f"{path} overflows in float16 (force_upcast in its configuration): use bfloat16 or float32.")
    net = net.clone(dtype=jnp.dtype(dtype))
    params = state_dicts.load_params(abstract_params(net), weights, str(path), place=functools.partial(_place, sharding))
    types = sorted({str(tensor.dtype) for tensor in weights.values()})
    counts = {"tensors": len(weights), "parameters": sum(tensor.size for tensor in weights.values()), "dtype": ", ".join(types)}
    return Encoder(kind, net, params, values, _preprocessing(of, net, path), of.licence, counts, tuple(weight_files(path)))


def abstract_params(net: nn.Module) -> Any:
    """Shapes and types of a network's parameters."""
    return jax.eval_shape(net.init, jax.random.key(0), *net.example_inputs())["params"]


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


# ----------------------------------------------------------------------------------------------------------------- configurations


def _beside(path: pathlib.Path, name: str) -> dict[str, Any] | None:
    """The values of a JSON file in the folder of the weights, if there is one."""
    file = (path if is_folder(path) else path.parent) / name
    try:
        found = read_json(file)
    except Missing:
        return None
    if not isinstance(found, dict):
        raise FileError(file, "is no configuration (a JSON object)", "get it from where the weights were published")
    return found


def _name(config: Mapping[str, Any]) -> str | None:
    """What a config.json calls the network."""
    return config.get("_class_name") or config.get("model_type")


def _part_of_pipeline(kind: str, path: pathlib.Path) -> pathlib.Path:
    """The folder of a pipeline's part of this kind; any other path as it is."""
    if not is_folder(path) or _beside(path, "model_index.json") is None:
        return path
    parts = {name: _name(_beside(path / name, "config.json") or {}) for name in folders(path)}
    fitting = [name for name, called in parts.items() if called in KINDS[kind].names]
    if len(fitting) == 1:
        return path / fitting[0]
    if fitting:
        raise FileError(path, f"has several parts of the kind {kind} ({', '.join(fitting)})", f"name one: {path / fitting[0]}")
    held = ", ".join(f"{name} ({called})" for name, called in parts.items() if called)
    raise FileError(path, f"has no part of the kind {kind}: it has {held or 'none with a config.json'}", "give the weights themselves")


def _network(kind: str, path: pathlib.Path, config: Any, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The network and the values of its configuration: given, beside the weights, or the published one that has these tensors."""
    of = KINDS[kind]
    published = getattr(of.module, "CONFIGS", {})
    if isinstance(config, str) and config in published:
        config = published[config]
    elif isinstance(config, (str, os.PathLike)):
        if not os.path.lexists(expand(config)):
            raise UserError(f"config={config!r} is no file, nor one of the configurations of {kind}: {', '.join(published) or 'none'}.")
        config = read_json(config)
    elif config is None:
        config = _beside(path, "config.json") or _beside(path, "open_clip_config.json")
        if config is not None and of.names and _name(config) not in (None, *of.names):
            raise FileError(path, f"is a {_name(config)}, not a {kind}", "give another kind, or the configuration (config=...)")
    if config is not None:
        return of.cls.from_config(config), dict(config)
    if not published:
        return of.cls.from_config({}), {}
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    nets = {name: of.cls.from_config(values) for name, values in published.items()}
    fitting = [name for name, net in nets.items() if state_dicts.expected(abstract_params(net)) == shapes]
    if not fitting:
        raise FileError(path, f"has no config.json, and no published {kind} has its tensors", "put its config.json beside it (config=...)")
    if any(nets[name].config() != nets[fitting[0]].config() for name in fitting):
        raise FileError(path, f"has no config.json, and {', '.join(fitting)} have its tensors", f"name one (config={fitting[0]!r})")
    return nets[fitting[0]], dict(published[fitting[0]])


def _preprocessing(kind: Kind, net: nn.Module, path: pathlib.Path) -> Preprocessing | None:
    if kind.preprocessing is None:
        return None
    for name, read in (("preprocessor_config.json", Preprocessing.from_config), ("open_clip_config.json", Preprocessing.from_open_clip)):
        beside = _beside(path, name)
        if beside is not None:
            return read(beside)
    return kind.preprocessing(net)


def _file_digest(path: pathlib.Path) -> str:
    status = os.stat(path)
    return _digest(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=1024)
def _digest(path: str, *unchanged: int) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
