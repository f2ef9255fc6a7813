"""Writes the golden files: what the published implementations answer to the weights and inputs of `published.py`.

    python tests/encoders/make_golden.py [NAME ...]        (in the environment of launch/parity.sh: it needs torch)

`originals/` has a file for each family; each of its functions makes one golden file of its own name, {output: array}.
"""

import importlib
import inspect
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent


def cases():
    """name -> function, of all families."""
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    importlib.import_module("published").prepare_torchvision()
    found = {}
    for path in sorted((HERE / "originals").glob("*.py")):
        module = importlib.import_module(f"originals.{path.stem}")
        found |= {
            name: function for name, function in vars(module).items()
            if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")}  # fmt: skip
    return found


def main(names):
    found = cases()
    for name in names or found:
        answers = {key: np.asarray(array) for key, array in found[name]().items()}
        np.savez_compressed(HERE / "golden" / f"{name}.npz", **answers)
        print(name, {key: array.shape for key, array in answers.items()}, (HERE / "golden" / f"{name}.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
