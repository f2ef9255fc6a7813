"""Names of a package that are imported when they are first used, so that the package itself is cheap to import (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazily(package: str, *modules: str, **names: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__, __getattr__, __dir__ = lazily(__name__, "losses", experiment="Experiment")` in the `__init__.py` of a package.

    Args:
      package: its name.
      *modules: modules of the package that are public as such.
      **names: for a module of the package, the names in it that are the package's, too, separated by spaces.

    >>> names, get, _ = lazily("mmdiff.data", "order", sources="ArraySource Subset")
    >>> names
    ['ArraySource', 'Subset', 'order']
    >>> get("Subset").__module__
    'mmdiff.data.sources'
    """
    of = {name: module for module, several in names.items() for name in several.split()}

    def get(name: str) -> Any:
        if name in of:
            value = getattr(importlib.import_module(f"{package}.{of[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    public = sorted([*modules, *of])
    return public, get, lambda: sorted({*public, *vars(sys.modules[package])})
