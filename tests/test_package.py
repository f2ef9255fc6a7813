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
from mmdiff.errors import UserError, import_extra

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
    base, extra = modules(packaging["REQUIRED"]), modules(packaging["EXTRAS"]["tpu-aot"])
    for path in (ROOT / "mmdiff").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lazy = {id(node) for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = base | extra if id(node) in lazy else base
            unknown = {name.split(".")[0] for name in names} - allowed - sys.stdlib_module_names - {"mmdiff"}
            assert not unknown, f"{path}, line {node.lineno}: {unknown}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_extra":
                module, name = (argument.value for argument in node.args)
                assert module.split(".")[0] in modules(packaging["EXTRAS"][name]), f"{path}, line {node.lineno}: {module}, {name}"


def test_what_the_base_install_does_not_bring_is_a_sentence():
    with pytest.raises(UserError, match=r"^this needs no_such_package, which is not installed: pip install 'mmdiff\[audio\]'\.$"):
        import_extra("no_such_package.part", "audio")
    assert import_extra("json", "audio").dumps([1]) == "[1]"


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


def test_public_names_exist_and_mmdiff_and_its_packages_are_cheap_to_import(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import mmdiff, mmdiff.data, mmdiff.evals, mmdiff.training
assert not {{"jax", "numpy", "flax"}} & set(sys.modules), "heavy imports"
from mmdiff import Experiment, data, evals, losses, nets, processes, sampling, schedules, times, training
for package in (mmdiff, data, evals, nets, processes, training):
    assert package.__all__ and set(package.__all__) <= set(dir(package))
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing, (package, missing)
try:
    mmdiff.loses
except AttributeError:
    pass
else:
    raise AssertionError("a wrong name")
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


# What a part of the package may import of it, inside functions too; a part is a module at the top, or a folder.
BASE = {  # only each other
    "exports", "former_names", "errors", "remote", "files", "checks", "keys", "suggest", "console", "microbatches", "hosts", "lazy_logits",
    "routing", "spans"}
OBJECTIVES = {"defaults", "times", "terms", "losses", "contrastive", "matching", "sampling", "transforms", "grids", "guidance",
    "average_velocity"}
CORE_PARTS = BASE | OBJECTIVES | {"schedules", "processes", "nets"}
ARROWS = {
    **dict.fromkeys(BASE, BASE),
    "schedules": BASE,
    "processes": BASE | {"schedules"},
    **dict.fromkeys(OBJECTIVES, BASE | OBJECTIVES | {"schedules", "processes"}),
    "nets": BASE,
    "convert": BASE | {"nets"},
    "encoders": BASE | {"convert"},
    "shipped_configs": BASE,
    "config": BASE | {"shipped_configs"},
    "data": BASE | {"nets", "convert", "encoders"},
    "evals": CORE_PARTS | {"config", "data", "convert", "encoders"},
    "experiment": CORE_PARTS,
    "training": CORE_PARTS | {"config", "data", "experiment", "evals"},
    "runs": CORE_PARTS | {"config", "convert", "encoders", "data", "evals", "experiment", "training"},
    "preflight": CORE_PARTS | {"config", "data", "evals", "experiment", "runs", "sample_sets", "training"},
    "sample_sets": CORE_PARTS | {"config", "data", "evals", "training"},
    "encoded_caches": CORE_PARTS | {"data", "training"},
    "inference_costs": CORE_PARTS | {"data", "encoders", "experiment", "training"},
    "aot_reports": CORE_PARTS | {"config", "inference_costs", "sample_sets", "training"},
    "projects": CORE_PARTS | {"config", "convert", "encoders", "data", "evals"},
    "conversion": CORE_PARTS | {"config", "convert", "data", "training"},
    "publishing": CORE_PARTS | {"config", "convert", "data", "training", "conversion"},
    "help_texts": BASE,
    "arguments": BASE | {"help_texts"},
    "commands": CORE_PARTS | {
        "config", "convert", "encoders", "evals", "shipped_configs", "training", "runs", "sample_sets", "encoded_caches", "aot_reports",
        "conversion", "publishing"},
    "__main__": BASE | {"arguments", "commands", "preflight"},
}
PLAIN = {"jax", "flax", "optax", "chex", "numpy"}
BESIDE_PLAIN = {"console": {"tqdm"}, "config": {"ml_collections"}, "aot": {"ml_collections", "libtpu"}}
# What may import more than PLAIN; of training these modules.
OUTER = {
    "convert", "encoders", "data", "evals", "projects", "runs", "sample_sets", "encoded_caches", "inference_costs", "conversion",
    "publishing", "commands", "__main__"}
OUTER_TRAINING = {
    "loop", "averaged_weights", "checkpoint_files", "checkpoints", "in_loop", "metrics_logger", "post_hoc_ema", "run_metadata", "skipped",
    "validation"}


def imports(path):
    """The modules that a file imports, anywhere in it, with the line: "mmdiff.files" for `from mmdiff.data import files`, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def files_of_parts():
    """(part, path) of every file of the package."""
    for path in sorted((ROOT / "mmdiff").rglob("*.py")):
        parts = path.relative_to(ROOT / "mmdiff").with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def test_imports_follow_the_layers():
    """schedules <- processes <- times, losses, contrastive, sampling <- training <- runs <- __main__; networks know no process, data and
    evaluators no trainer, and nothing in the package knows a project."""
    wrong = []
    for part, path in files_of_parts():
        assert part in ARROWS, f"{path.relative_to(ROOT)}: say in ARROWS what it may import"
        for name, line in imports(path):
            if name.startswith("mmdiff."):
                other = name.removeprefix("mmdiff.")
                target = other.split(".")[0]
                if target not in ARROWS[part] | {part, "__version__"}:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} must not import {other}")
    assert not wrong, "\n".join(wrong)


def test_the_core_needs_jax_flax_optax_chex_and_numpy_only():
    wrong = []
    for part, path in files_of_parts():
        if part in OUTER or (part == "training" and path.stem in OUTER_TRAINING):
            continue
        allowed = PLAIN | sys.stdlib_module_names | {"mmdiff"} | BESIDE_PLAIN.get(path.stem, set())
        wrong += [f"{path.relative_to(ROOT)}:{line}: {name}" for name, line in imports(path) if name.split(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)


def test_a_module_name_exists_once():
    names = [path.stem for _, path in files_of_parts() if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))
