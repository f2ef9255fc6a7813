"""The examples of the docstrings run, and the API pages are built."""

import doctest
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "mmdiff").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_what_users_start_from_has_examples():
    assert {f"mmdiff.{name}" for name in ("schedules", "times", "losses", "sampling", "processes.base", "experiment")} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not found.failed


def build(folder, *names):
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*names, output_directory=folder)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def test_a_page_of_the_api_is_built(tmp_path):
    pages = build(tmp_path, "mmdiff.schedules")
    assert "Moves a schedule towards noise" in pages["mmdiff/schedules.html"]


@pytest.mark.slow
def test_all_pages_of_the_api_are_built_by_the_settings_of_the_script(tmp_path):
    script = (ROOT / "launch/docs.sh").read_text(encoding="utf-8")
    assert re.search(r"-m pdoc --docformat google .* mmdiff$", script, flags=re.MULTILINE)
    pages = build(tmp_path, "mmdiff")
    assert {"mmdiff.html", "mmdiff/nets.html", "mmdiff/processes.html", "mmdiff/sampling.html"} <= set(pages)
    assert "MMDiT" in pages["mmdiff/nets.html"]
