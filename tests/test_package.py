"""What is installed, and what an import costs."""

import importlib
import os
import pathlib
import pkgutil
import subprocess
import sys
import types

import pytest

import mmdiff

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_every_folder_of_the_package_is_installed():
    # setup.py takes the folders that hold an __init__.py, and only their Python files.
    files = [path for path in (ROOT / "mmdiff").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path for path in files if path.suffix != ".py"] == []
    assert [path for path in files if not (path.parent / "__init__.py").exists()] == []


CORE = ["schedules", "times", "losses", "sampling", "processes", "nets.mmdit", "nets.dit", "experiment"]


@pytest.mark.slow
def test_the_core_loads_neither_tensorflow_nor_orbax_and_works_from_any_folder(tmp_path):
    # In a process of its own: this one has loaded much already.
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import jax
start = time.process_time()
import mmdiff
for name in {CORE!r}:
    __import__("mmdiff." + name)
seconds = time.process_time() - start
heavy = {{"tensorflow", "tensorflow_datasets", "orbax", "sklearn", "matplotlib", "clu", "PIL"}} & set(sys.modules)
assert not heavy, heavy
print(seconds)
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Two seconds of processor time once Python has compiled the files; the first import is slower.
    assert float(run.stdout) < 10


def test_help_and_mistakes_load_no_jax(tmp_path):
    code = f"""
import sys
import types
sys.path.insert(0, {str(ROOT)!r})
from mmdiff.__main__ import main
assert main(["sample", "--config", "missing.py", "--workdir", "x"]) == 2
try:
    main(["train", "--help"])
except SystemExit as end:
    assert end.code == 0
assert not {{"jax", "tensorflow"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_name_of_a_package_shadows_one_of_its_modules():
    """`import mmdiff.nets.dit` and `mmdiff.nets.dit` are the same thing: what a package exports has other names than its modules."""
    found = pkgutil.walk_packages(mmdiff.__path__, "mmdiff.")
    packages = [mmdiff, *(importlib.import_module(module.name) for module in found if module.ispkg)]
    assert {"mmdiff.nets", "mmdiff.processes"} <= {package.__name__ for package in packages}
    for package in packages:
        for _, name, _ in pkgutil.iter_modules(package.__path__):
            assert isinstance(getattr(package, name, package), types.ModuleType), f"{package.__name__}.{name}"
