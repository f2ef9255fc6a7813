"""The pages of the API, by pdoc: `bash launch/docs.sh` installs what it needs and calls it.

    python launch/api_pages.py FOLDER
"""

import importlib
import pathlib
import sys
import warnings

import pdoc

# Their names are imported when first used: pdoc wants them there.
PACKAGES = ("mmdiff", "mmdiff.convert", "mmdiff.data", "mmdiff.encoders", "mmdiff.evals", "mmdiff.training")


def build(folder: str | pathlib.Path, *names: str) -> None:
    """Writes a page for each of the modules and packages `names`, and for the public modules in them, as HTML files."""
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            getattr(package, name)
    pdoc.render.configure(docformat="google", footer_text="mmdiff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # annotations of named tuples that it cannot evaluate are shown as they are written
        pdoc.pdoc(*names, output_directory=pathlib.Path(folder))


if __name__ == "__main__":
    build(sys.argv[1], "mmdiff")
