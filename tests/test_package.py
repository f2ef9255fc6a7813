"""What is installed, and what an import costs."""

import ast
import importlib
import os
import pathlib
import pkgutil
import re
import runpy
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
HEAVY = {"tensorflow", "tensorflow_datasets", "orbax", "sklearn", "matplotlib", "librosa", "clu", "PIL"}


def test_the_core_loads_nothing_heavy_and_works_from_any_folder(tmp_path):
    # In a process of its own: this one has loaded much already.
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import mmdiff
assert "jax" not in sys.modules
import jax
start = time.process_time()
for name in {CORE!r}:
    __import__("mmdiff." + name)
seconds = time.process_time() - start
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
print(seconds)
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Two seconds of processor time once Python has compiled the files; the first import is slower.
    assert float(run.stdout) < 10


@pytest.fixture(scope="module")
def packaging():
    """What setup.py declares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **given: None)
        return runpy.run_path(str(ROOT / "setup.py"))


MODULES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn", "pillow": "PIL"}  # where the module has not the package's name


def modules(requirements):
    names = [re.match("[A-Za-z0-9_-]+", each)[0] for each in requirements]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def test_every_import_is_declared_and_none_of_an_extra_is_needed_to_import(packaging):
    base, extra = modules(packaging["REQUIRED"]), modules([*packaging["EXTRAS"]["audio"], *packaging["EXTRAS"]["tpu-aot"]])
    for path in (ROOT / "mmdiff").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lazy = {id(node) for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = base | extra if id(node) in lazy else base
            unknown = {name.split(".")[0] for name in names} - allowed - sys.stdlib_module_names - {"mmdiff"}
            assert not unknown, f"{path}, line {node.lineno}: {unknown}"


def test_requirements_have_a_lower_and_an_upper_bound_and_tests_have_what_they_need(packaging):
    for requirement in packaging["REQUIRED"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement
    assert set(packaging["EXTRAS"]["audio"]) <= set(packaging["EXTRAS"]["test"])
    assert not {"tensorflow", "tensorflow_cpu", "librosa", "matplotlib"} & modules(packaging["REQUIRED"])


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
