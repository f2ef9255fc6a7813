"""The examples of the docstrings run, and the API pages are built."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "mmdiff").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def test_what_users_start_from_has_examples():
    assert {f"mmdiff.{name}" for name in ("schedules", "times", "losses", "sampling", "processes.base", "experiment")} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not found.failed
