"""The configs that come with the package, by name: "digits_joint", "cdcd/digits_class". In a checkout they are the folder `configs`."""

from __future__ import annotations

import ast
import pathlib
import re
import shutil

from mmdiff import checks, files, suggest
from mmdiff.errors import UserError

LIST = "mmdiff configs lists those that come with mmdiff"


def paths() -> dict[str, pathlib.Path]:
    """name -> its file, sorted by system.

    >>> paths()["digits_joint"].name
    'digits_joint.py'
    """
    package = pathlib.Path(__file__).parent
    folder = package / "_configs"  # where setup.py puts the folder `configs` in a wheel
    folder = folder if folder.is_dir() else package.parent / "configs"
    files = sorted(folder.rglob("*.py"), key=lambda file: (len(file.relative_to(folder).parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files if file.name != "__init__.py"}


def find(name: str) -> pathlib.Path:
    """The file of a config. Raises UserError if there is none of this name; it says which is meant."""
    known = paths()
    if name in known:
        return known[name]
    raise UserError(f"there is no shipped config {name!r}{meant(name) or f': {LIST}.'}")


def meant(name: str) -> str:
    """", did you mean ...?", or nothing: for a name or path that does not exist."""
    known = paths()
    stem = pathlib.PurePath(name).stem
    whole = pathlib.PurePath(name).with_suffix("").as_posix().removeprefix("configs/")
    near = whole if whole in known else suggest.word(whole, known)
    if not near:  # by the last part of the names
        last = suggest.word(stem, {file.stem for file in known.values()})
        near = next((name for name, file in known.items() if file.stem == last), None)
    return f", did you mean {near}?" if near else ""


def docstring(file: pathlib.Path) -> str:
    """What the head of a config says. Nothing is run or imported."""
    return ast.get_docstring(ast.parse(file.read_bytes())) or ""


def head(name: str) -> str:
    """What the head of a config says, whose commands have the names of configs for their paths in a checkout: they work anywhere."""
    return re.sub(r"(--config +)configs/([\w/]+)\.py", r"\1\2", docstring(find(name)))


def table() -> str:
    """A line for each config: its name and its purpose, the first sentence of its head."""
    known = paths()
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:<{width}}  {docstring(file).partition(chr(10))[0]}" for name, file in known.items())


def copy(name: str, target: str) -> list[pathlib.Path]:
    """Copies a config to a file, and the neighbours that it imports to the folder of that; -> what was written.

    Raises:
      UserError: no such config, a target that exists or is no Python file, a folder that cannot be written.
    """
    source, remedy = find(name), "write --to FILE.py"
    try:
        target = files.on_disk(target).expanduser()
        if target.suffix != ".py":
            raise UserError(f"--to {target} is not the name of a Python file: {remedy}.")
        pairs = [(source, target), *((file, target.parent / file.name) for file in neighbours(source))]
        for old, new in pairs:
            if new.exists():
                raise UserError(f"{new} exists already: choose another file, or remove it.")
            if new == target and old != source:
                raise UserError(f"--to {target} has the name of a config that {name} imports: choose another file.")
        target.parent.mkdir(parents=True, exist_ok=True)
        for old, new in pairs:
            shutil.copyfile(old, new)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {checks.short(str(target))[1:-1]} ({reason}): choose another file.") from error
    return [new for _, new in pairs]


def neighbours(file: pathlib.Path) -> list[pathlib.Path]:
    """The configs of the same folder that one imports, and those that these import."""
    found = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in getattr(node, "names", ())]
        for other in (file.parent / f"{name}.py" for name in names if isinstance(node, (ast.Import, ast.ImportFrom))):
            if other.is_file() and other not in found:
                found += [other, *neighbours(other)]
    return list(dict.fromkeys(found))
