"""The examples of the docstrings run, and the API pages are built."""

import doctest
import importlib
import pathlib

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


@pytest.fixture
def build(loaded_launch, tmp_path):
    pages = loaded_launch("api_pages")

    def build(*names):
        pages.build(tmp_path, *names)
        return {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}

    return build


def test_a_page_of_the_api_is_built(build):
    assert "Moves a schedule towards noise" in build("mmdiff.schedules")["mmdiff/schedules.html"]


@pytest.mark.slow
def test_all_pages_of_the_api_are_built(build):
    pages = build("mmdiff")
    assert {"mmdiff.html", "mmdiff/nets.html", "mmdiff/processes.html", "mmdiff/sampling.html"} <= set(pages)
    expected = {
        "nets": "MMDiT", "data": "ArraySource", "training": "make_step", "encoders": "AutoencoderKL", "convert": "open_weights",
        "evals": "precision_recall"}
    for package, name in expected.items():
        assert name in pages[f"mmdiff/{package}.html"]
