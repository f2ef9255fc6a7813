"""Configs: plain values plus a constructor, in a file of the user's or one that comes with the package (`shipped_configs`).

A config file defines `get_config() -> ml_collections.ConfigDict` and `build(config) -> Experiment`. Every value can be
replaced as `--config.section.key=value`; the text is read as the type of the value that it replaces. `mmdiff.checks` has their ranges.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections

from mmdiff import checks, former_names, shipped_configs, suggest
from mmdiff.errors import UserError

SECTIONS = (Mapping, ml_collections.ConfigDict)
OPTIONAL = {  # what a config file need not state, nor an earlier run have stored
    "train.max_skipped": 100,
    "train.other_data": False,
    "train.start_strict": False,
    "train.ema_widths": (),
    "train.ema_every": 0,
    "train.sample_every": 0,
    "train.metrics_every": 0,
    "train.evaluation_share": 0.05,
    "train.wandb": "",
}
NOT_FINITE = ("Infinity", "-Infinity", "NaN")  # JSON has no word for them


def load(path: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[ml_collections.ConfigDict, ModuleType]:
    """Reads a config file and applies overrides, in order.

    Args:
      path: a Python file with `get_config` and `build`, or the name of a shipped config.
      overrides: pairs of a dotted key and the text of its new value, `("train.steps", "100")`.

    Returns:
      The locked config and the file as a module; `module.build(config)` makes the experiment.

    Raises:
      UserError: the file is missing or is no config file, a key does not exist, or a value does not suit its key.
    """
    file = _file(path)
    values = _values_alone(file)
    if values is not None:  # a mistake in a key is said before seconds are spent on importing what `build` needs
        _finish(path, values, overrides)
    module = _module(path, file)
    with _of_the_file(path, "get_config"):
        config = module.get_config()
    return _finish(path, config, overrides), module


def _finish(path: str, config: Any, overrides: Sequence[tuple[str, str]]) -> ml_collections.ConfigDict:
    """Checks what `get_config` returned, and puts the overrides on it."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path} is no config file: its get_config returns a {type(config).__name__}, not an ml_collections.ConfigDict.")
    missing = [name for name, kind in (("seed", int), ("train", SECTIONS)) if not isinstance(config.get(name), kind)]
    if missing:
        raise UserError(f"{path} is no config file: its get_config has no {missing[0]} (see configs/digits_joint.py).")
    for key, value in OPTIONAL.items():
        section, _, name = key.partition(".")
        if name not in config[section]:
            config[section][name] = value
    own = flatten(config)
    for key, text in overrides:
        _override(config, key, text)
    checks.check(flatten(config), own)
    config.lock()
    return config


def build(config: ml_collections.ConfigDict, module: ModuleType) -> Any:
    """`module.build(config)`; what is no experiment, and mistakes in the file itself, are a UserError. See `blaming`."""
    path = module.__file__
    try:
        experiment = module.build(config)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if not _is_of_the_file(error, path):
            raise
        raise UserError(f"{path} cannot be built: {_what(error, path)}.") from error
    if not all(hasattr(experiment, name) for name in ("process", "init", "loss", "optimizer")):
        raise UserError(f"{path} is no config file: its build returns a {type(experiment).__name__}, not an Experiment.")
    return experiment


def _is_of_the_file(error: BaseException, path: str) -> bool:
    """Whether an error is raised by the config file, or is a value that a constructor of this package refuses."""
    modules = [(frame.f_globals.get("__name__", ""), frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    name, file = next(module for module in reversed(modules) if not module[0].startswith("ml_collections."))
    refused = isinstance(error, (ValueError, TypeError)) and name.startswith("mmdiff.")
    return refused or isinstance(error, SystemExit) or os.path.abspath(file) == os.path.abspath(path)


@contextlib.contextmanager
def blaming(config: ml_collections.ConfigDict, module: ModuleType, overrides: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """A context in which an experiment is built and used: an error that does not come without the overrides is one sentence that names
    those that it needs. Any other error that is no UserError is a bug and keeps its traceback.

    It is then that experiments are built again, with fewer overrides, as far as the shapes of the parameters.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        named = isinstance(error, UserError) and any(key in str(error) for key, _ in overrides)
        guilty = [] if named or not overrides or isinstance(error, OSError) else _guilty(config, module, dict(overrides))
        if not guilty:
            raise
        path, text = module.__file__, str(error).rstrip(".")
        if not isinstance(error, UserError):
            text = f"{path} cannot be used: {_what(error, path)}"
        raise UserError(f"{text} (with {', '.join(guilty)}).") from error


def _guilty(config: ml_collections.ConfigDict, module: ModuleType, overrides: Mapping[str, str]) -> list[str]:
    """The overrides without which the experiment can be built: one, where one is enough, or all; none if they make no difference."""
    import jax

    own = flatten(module.get_config())

    def works_without(left_out):
        values = copy.deepcopy(config)
        put(values, {key: own[key] for key in left_out if key in own})
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what a build says of its data has been said
                jax.eval_shape(module.build(values).init, jax.random.key(0))
        except (Exception, SystemExit):
            return False
        return True

    if works_without([]):
        return []  # it fails for another reason, later
    found = next(([key] for key in overrides if works_without([key])), list(overrides) if works_without(overrides) else [])
    return [f"config.{key}={checks.short(overrides[key])[1:-1]}" for key in found]


def put(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Replaces the values of the dotted keys that the config has; they may come from `to_json`."""
    known = flatten(config)
    with config.ignore_type():  # what was stored was valid for the run
        for key, value in values.items():
            if key in known:
                *sections, name = key.split(".")
                section = config
                for part in sections:
                    section = section[part]
                section[name] = _like(value, known[key])


def is_like(value: Any, old: Any) -> bool:
    """Whether a stored value has the type of another: numbers are alike, and so are lists and tuples."""
    kinds = ((bool,), (int, float), (str,), (list, tuple))
    kind = next((kind for kind in kinds if isinstance(old, kind)), None)
    return kind is None or value in NOT_FINITE or isinstance(value, kind) and (kind == (bool,) or not isinstance(value, bool))


def _like(value: Any, old: Any) -> Any:
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(_like(item, old[0] if old else None) for item in value)
    return float(value) if isinstance(old, float) and value in NOT_FINITE else value


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
    """All values as indented JSON, in its strict form: tuples become lists and infinities text, which `difference` takes for equal."""
    return json.dumps(plain(config.to_dict()), indent=2, allow_nan=False) + "\n"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with both values; a key that one side lacks has None there."""
    old, new = flatten(old), flatten(new)
    keys = dict.fromkeys([*old, *new])
    return {key: (old.get(key), new.get(key)) for key in keys if plain(old.get(key)) != plain(new.get(key))}


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


# ---- The file ----


def _file(path: str) -> pathlib.Path:
    """The file of a config: a path, or a shipped one by name."""
    remedy = f"--config takes a name or the path of a Python file, and {shipped_configs.LIST}"
    try:
        file = pathlib.Path(path).expanduser()
        whole, exists = file.is_file() and file.suffix == ".py", file.exists()
        around = sorted(file.parent.glob("*.py"))[:1000]
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, holds a NUL character or is of no user (~nobody)
        raise UserError(f"{checks.short(path)} is no path of a file ({getattr(error, 'strerror', None) or error}): {remedy}.") from error
    if whole:
        return file
    name = former_names.CONFIGS.get(file.with_suffix("").as_posix().removeprefix("configs/"), path)
    if name in (shipped := shipped_configs.paths()):
        return shipped[name]
    if exists:
        raise UserError(f"{path} is no config file: {remedy}.")
    near = suggest.word(file.stem, {other.stem: other for other in around})
    meant = f", did you mean {file.with_name(f'{near}.py')}?" if near else shipped_configs.meant(path)
    raise UserError(f"there is no config file {checks.short(str(path))[1:-1]}{meant or f': {remedy}.'}")


def _values_alone(file: pathlib.Path) -> ml_collections.ConfigDict | None:
    """What `get_config` of a file returns, without running the rest of it; None where that is not enough."""
    with contextlib.suppress(Exception, SystemExit):
        return _part(file, ["get_config"])["get_config"]()
    return None


def _part(file: pathlib.Path, names: list[str]) -> dict[str, Any]:
    """Runs those statements of a file that define `names`, and what these need; -> its globals. Of its neighbours, too."""
    binds: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(file.read_bytes()).body:
        for name in _bound(statement):
            binds.setdefault(name, []).append(statement)
    space: dict[str, Any] = {"__name__": f"mmdiff_values_{file.stem}", "__file__": str(file)}
    wanted, seen, chosen = list(names), set(), []
    while wanted:
        name = wanted.pop()
        for statement in binds.get(name, ()) if name not in seen else ():
            neighbour = file.parent / f"{getattr(statement, 'module', None)}.py"
            if isinstance(statement, ast.ImportFrom):
                alias = next(alias for alias in statement.names if (alias.asname or alias.name) == name)
                if not statement.level and neighbour.is_file():
                    space[name] = _part(neighbour, [alias.name])[alias.name]
                else:  # of several names the one alone: others may take seconds to import
                    chosen.append(ast.copy_location(ast.ImportFrom(statement.module, [alias], statement.level), statement))
            elif statement not in chosen:
                chosen.append(statement)
                wanted += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
        seen.add(name)
    body = sorted(chosen, key=lambda statement: statement.lineno)
    exec(compile(ast.Module(body, []), str(file), "exec"), space)
    return space


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _module(path: str, file: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mmdiff_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # a config may import its neighbours, from wherever the command is run
    sys.modules[spec.name] = module
    with _of_the_file(path):
        spec.loader.exec_module(module)
    for name in ("get_config", "build"):
        if not callable(getattr(module, name, None)):
            raise UserError(f"{path} is no config file: it defines no function {name} (see configs/digits_joint.py).")
    return module


@contextlib.contextmanager
def _of_the_file(path: str, function: str = "") -> Iterator[None]:
    """Makes one sentence of what a config file does wrong."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        where = f" on line {error.lineno}" if error.lineno else ""
        raise UserError(f"{path} is not valid Python: {error.msg}{where}.") from error
    except (Exception, SystemExit) as error:
        if function:
            raise UserError(f"the {function} of {path} fails: {_what(error, path)}.") from error
        raise UserError(f"{path} cannot be imported: {_what(error, path)}.") from error


def _what(error: BaseException, path: str) -> str:
    """An error in words, with the last line of the config file that led to it."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if os.path.abspath(frame.f_code.co_filename) == os.path.abspath(path)]
    text = " ".join(str(error).split()).rstrip(".")
    kind = type(error).__name__
    return f"{f'{kind}: {text}' if text else kind}" + (f" (line {lines[-1]})" if lines else "")


# ---- Overrides ----


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    flat = flatten(config)
    if key not in flat:
        inside = [known for known in flat if known.startswith(f"{key}.")]
        if inside:
            raise UserError(f"config.{key} is a section, not a value: set one of {_listed(inside)}.")
        raise UserError(_no_key(key, list(flat)))
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    value = _parse(key, text, flat[key], section.get_type(name))
    # A placeholder may still refuse the value.
    try:
        section[name] = value
    except TypeError as error:
        raise UserError(f"config.{key} cannot be {checks.short(text)}: {error}.") from error


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
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        wanted = wanted.get(kind, "a value")
        raise UserError(f"config.{key} must be {wanted} (it is {checks.short(old)}), not {checks.short(text)}.") from None
    raise UserError(f"config.{key} is a {kind.__name__}, which no command line can set: change it in the config file.")


def _sequence(text: str, old: Sequence[Any] | None) -> list[Any]:
    """A sequence whose elements have the type of the old ones (any literals where there were none)."""
    body = text.strip()
    if not body.strip("()[], ") and old:
        raise ValueError  # nothing, where there was something
    if body[:1] + body[-1:] in ("()", "[]"):
        body = body[1:-1]
    kinds = {type(v) for v in old or ()}
    if kinds == {str}:
        return [part.strip().strip("\"'") for part in body.split(",") if part.strip()]
    if kinds == {float}:
        return [float(part) for part in body.split(",") if part.strip()]
    values = list(ast.literal_eval(f"[{body}]"))
    if kinds and {type(v) for v in values} - kinds:
        raise TypeError
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _no_key(key: str, known: list[str]) -> str:
    found, what = suggest.key(key, known), f"there is no config key {checks.short(key)}"
    if found and "epoch" in key.lower():
        return f"{what}: training is counted in steps, not in epochs: did you mean {found!r}?"
    return f"{what}: did you mean {found!r}?" if found else f"{what}: choose one of {_listed(known, 40)}."


def _listed(keys: Sequence[str], most: int = 6) -> str:
    return ", ".join(f"config.{key}" for key in keys[:most]) + (", ..." if len(keys) > most else "")
