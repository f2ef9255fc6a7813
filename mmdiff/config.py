"""Config files: plain values plus a constructor.

A config file defines `get_config() -> ml_collections.ConfigDict` and `build(config) -> Experiment`. Every value can be
replaced as `--config.section.key=value`; the text is read as the type of the value that it replaces.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from mmdiff.errors import UserError

try:
    import ml_collections
except ModuleNotFoundError:
    from mmdiff import configdict as ml_collections

    sys.modules["ml_collections"] = ml_collections  # config files import it by that name

SECTIONS = (Mapping, ml_collections.ConfigDict)


def load(path: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[ml_collections.ConfigDict, ModuleType]:
    """Reads a config file and applies overrides, in order.

    Args:
      path: a Python file with `get_config` and `build`.
      overrides: pairs of a dotted key and the text of its new value, `("train.steps", "100")`.

    Returns:
      The locked config and the file as a module; `module.build(config)` makes the experiment.

    Raises:
      UserError: the file is missing or is no config file, a key does not exist, or a text does not fit its key's type.
    """
    module = _module(path)
    config = module.get_config()
    for key, text in overrides:
        _override(config, key, text)
    config.lock()
    return config, module


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a (nested) config by dotted key, `{"train.steps": 3000, ...}`, in order."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, SECTIONS):
            flat.update({f"{key}.{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    """All values as indented JSON. Tuples become lists, which `difference` takes for equal."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with both values; a key that one side lacks has None there."""
    old, new = flatten(old), flatten(new)
    keys = dict.fromkeys([*old, *new])
    return {key: (old.get(key), new.get(key)) for key in keys if _plain(old.get(key)) != _plain(new.get(key))}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _module(path: str) -> ModuleType:
    file = pathlib.Path(path)
    remedy = "--config takes the path of a Python file such as configs/digits_joint.py"
    if not file.is_file():
        raise UserError(f"there is no config file {path}: {remedy}.")
    if file.suffix != ".py":
        raise UserError(f"{path} is no config file: {remedy}.")
    spec = importlib.util.spec_from_file_location(f"mmdiff_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # a config may import its neighbours, from wherever the command is run
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path} is not valid Python: {error.msg} on line {error.lineno}.") from error
    for name in ("get_config", "build"):
        if not callable(getattr(module, name, None)):
            raise UserError(f"{path} is no config file: it defines no function {name} (see configs/digits_joint.py).")
    return module


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    flat = flatten(config)
    if key not in flat:
        inside = [known for known in flat if known.startswith(f"{key}.")]
        if inside:
            raise UserError(f"config.{key} is a section, not a value: set one of {_listed(inside)}.")
        raise UserError(f"there is no config key {key!r}: did you mean {_nearest(key, list(flat))!r}?")
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    value = _parse(key, text, flat[key], section.get_type(name))
    # A placeholder may still refuse the value.
    try:
        section[name] = value
    except TypeError as error:
        raise UserError(f"config.{key} cannot be {text!r}: {error}.") from error


def _parse(key: str, text: str, old: Any, kind: type) -> Any:
    """`text` as a value of type `kind`."""
    wanted = {bool: "true or false", int: "an integer", float: "a number", tuple: "like 1,2", list: "like 1,2"}
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if kind in (tuple, list):
            return kind(_sequence(text, old))
        if kind is type(None):
            return _literal(text)
        if kind is str:
            return text
    except (KeyError, ValueError, SyntaxError, TypeError):
        raise UserError(f"config.{key} must be {wanted[kind]} (it is {old!r}), not {text!r}.") from None
    raise UserError(f"config.{key} is a {kind.__name__}, which no command line can set: change it in the config file.")


def _sequence(text: str, old: Sequence[Any] | None) -> list[Any]:
    """A sequence whose elements have the type of the old ones (any literals where there were none)."""
    body = text.strip()
    if body[:1] + body[-1:] in ("()", "[]"):
        body = body[1:-1]
    kinds = {type(v) for v in old or ()}
    if kinds == {str}:
        return [part.strip().strip("\"'") for part in body.split(",") if part.strip()]
    values = list(ast.literal_eval(f"[{body}]"))
    if kinds == {float}:
        return [float(v) for v in values]
    if kinds and {type(v) for v in values} - kinds:
        raise TypeError
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _nearest(key: str, known: list[str]) -> str:
    """The known key that a person most likely meant: one with the same last name, else the most similar."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    return difflib.get_close_matches(key, same or known, n=1, cutoff=0)[0]


def _listed(keys: Sequence[str], most: int = 6) -> str:
    return ", ".join(f"config.{key}" for key in keys[:most]) + (", ..." if len(keys) > most else "")
