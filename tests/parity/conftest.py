"""Comparisons with the original implementations, in the environment that launch/parity.sh makes: without torch there is nothing to run."""

import importlib.util
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "encoders"))  # published.py and originals/
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*.py"]
else:
    import published

    published.prepare_torchvision()
