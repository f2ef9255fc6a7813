"""The configuration of a published network: given, beside its weights, or the published one that has these tensors."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from mmdiff.convert import state_dicts
from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.published_kinds import KINDS
from mmdiff.errors import UserError
from mmdiff.files import FileError, Missing, expand, folders, is_folder, read_json

LARGEST = 2**24  # a dimension; vocabularies have 250,000 entries
MOST_LAYERS = 1000
POSITIVE = ("scaling_factor", "latents_std", "eps", "epsilon")  # ends of names; 0 makes every latent 0, and decoded ones infinite


def network_of(kind: str, path: pathlib.Path, config: Any, weights: Mapping[str, Tensor]) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The network of weights, its parameters' shapes and the values of its configuration.

    Args:
      config: values, the name of one of the kind's published configurations, a path, or None: see `open_encoder`.

    Raises:
      UserError: no configuration, several that fit, one of another kind, or values that no network has.
    """
    of = KINDS[kind]
    published = getattr(of.module, "CONFIGS", {})
    if isinstance(config, str) and config in published:
        config = published[config]
    elif isinstance(config, (str, os.PathLike)):
        if not os.path.lexists(expand(config)):
            raise UserError(
                f"config={str(config)!r} is no file, nor one of the configurations of {kind}: {', '.join(published) or 'none'}."
            )
        config = read_config(expand(config))
    elif config is None:
        config = beside(path, "config.json") or beside(path, "open_clip_config.json")
        if config is not None and of.names and _name(config) not in (None, *of.names):
            raise FileError(path, f"is a {_name(config)}, not a {kind}", "give another kind, or the configuration (config=...)")
    if config is not None or not published:
        return *built(kind, config or {}, str(path)), dict(config or {})
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    fitting = {}
    for name, values in published.items():
        net, abstract = built(kind, values, name)
        if state_dicts.expected(abstract) == shapes:
            fitting[name] = net, abstract, dict(values)
    if not fitting:
        raise FileError(path, f"has no config.json, and no published {kind} has its tensors", "put its config.json beside it (config=...)")
    first = next(iter(fitting.values()))
    if any(net.config() != first[0].config() for net, _, _ in fitting.values()):
        raise FileError(
            path, f"has no config.json, and {', '.join(fitting)} have its tensors",
            f"put its config.json beside it, or name one (config={next(iter(fitting))!r})",
        )
    return first


def built(kind: str, config: Mapping[str, Any], name: str) -> tuple[nn.Module, Any]:
    """The network of a configuration and its parameters' shapes; `name` is what errors call the weights.

    Raises:
      UserError: a value that no network has, or values that do not fit each other.
    """
    cls = KINDS[kind].cls
    try:
        net = cls.from_config(config)
        for field in dataclasses.fields(net):
            if field.name not in ("parent", "name", "dtype"):
                _check(field.name, getattr(net, field.name), field.default)
        return net, abstract_params(net)
    except UserError:
        raise
    except Exception as error:  # whatever linen and jax say of sizes that do not fit
        what = (str(error).splitlines() or [""])[0][:100].rstrip(".") or type(error).__name__
        raise UserError(f"the configuration of {name} makes no {kind} ({what}): get it from where the weights were published.") from error


def _check(name: str, value: Any, default: Any) -> None:
    """Raises UserError for a value of another type than a field's default, or for a number that no network has."""
    for part in value if isinstance(value, tuple) else (value,):
        of = default[0] if isinstance(default, tuple) and default else default
        alike = part == of or type(part) is type(of) or (type(part), type(of)) == (int, float)
        most = MOST_LAYERS if "layers" in name or "blocks" in name else LARGEST
        least = -LARGEST if name.endswith("_id") or isinstance(part, float) else 0
        outside = isinstance(part, (int, float)) and not (least <= part <= most and (part > 0 or not name.endswith(POSITIVE)))
        if not (alike or of in (None, dataclasses.MISSING)) or outside:
            raise UserError(f"{name} = {repr(value)[:60]} in its configuration is no value that a network has.")


def abstract_params(net: nn.Module) -> Any:
    """Shapes and types of a network's parameters."""
    return jax.eval_shape(net.init, jax.random.key(0), *net.example_inputs())["params"]


# ------------------------------------------------------------------------------------------------------------------------- files


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """The values of a JSON file. Raises Missing, FileError."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise FileError(file, "is no configuration (a JSON object)", "get it from where the weights were published")
    return found


def beside(path: pathlib.Path, name: str) -> dict[str, Any] | None:
    """The values of a JSON file in the folder of the weights, if there is one."""
    try:
        return read_config((path if is_folder(path) else path.parent) / name)
    except Missing:
        return None


def part_of_pipeline(kind: str, path: pathlib.Path) -> pathlib.Path:
    """The folder of a pipeline's part of this kind; any other path as it is. Raises FileError: there is no such part, or several."""
    if not is_folder(path) or beside(path, "model_index.json") is None:
        return path
    parts = {name: _name(beside(path / name, "config.json") or {}) for name in folders(path)}
    fitting = [name for name, called in parts.items() if called in KINDS[kind].names]
    if len(fitting) == 1:
        return path / fitting[0]
    if fitting:
        raise FileError(path, f"has several parts of the kind {kind} ({', '.join(fitting)})", f"name one: {path / fitting[0]}")
    held = ", ".join(f"{name} ({called})" for name, called in parts.items() if called)
    raise FileError(path, f"has no part of the kind {kind}: it has {held or 'none with a config.json'}", "give the weights themselves")


def _name(config: Mapping[str, Any]) -> str | None:
    """What a config.json calls the network."""
    found = config.get("_class_name") or config.get("model_type")
    return None if found is None else str(found)[:60]
