"""Settings that must stand before jax starts: CPU, eight simulated devices, and compiled programs kept between test runs."""

import gc
import importlib
import os
import pathlib
import sys
import tempfile

import pytest
import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if xla_flags.DEVICES not in os.environ.get("XLA_FLAGS", ""):  # else a worker of this run, which inherits them
    flags = [os.environ.get("XLA_FLAGS", ""), xla_flags.DEVICES, *xla_flags.IN_TURN, *xla_flags.CHEAP, *xla_flags.CHEAPEST]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

# Compiled programs are kept between runs, and shared by the workers and the programs that a run starts.
CACHE = pathlib.Path(tempfile.gettempdir()) / f"mmdiff-tests-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("NUMBA_OPT", "0")  # what librosa compiles when it is imported is used for milliseconds
# One process each: two that fill librosa's cache at the same time can crash each other.
os.environ.setdefault("NUMBA_CACHE_DIR", str(CACHE / "numba" / os.environ.get("PYTEST_XDIST_WORKER", "main")))


LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="session")
def loaded_launch():
    """`name -> module` of a program in launch/, which is no package: its folder is on the path, as when the program runs."""
    sys.path.insert(0, str(LAUNCH))
    yield importlib.import_module
    sys.path.remove(str(LAUNCH))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of TFDS with the digits."""
    from mmdiff.projects.digits.digits import digits_source

    folder = tmp_path_factory.mktemp("tfds")
    digits_source("train", folder)
    return folder


@pytest.fixture(scope="session")
def train(data_dir):
    from mmdiff.projects.digits.digits import digits_source

    return digits_source("train", data_dir)


@pytest.fixture(scope="session")
def test(data_dir):
    from mmdiff.projects.digits.digits import digits_source

    return digits_source("test", data_dir)


@pytest.fixture(scope="module")
def one_device():
    """JAX knows one of the simulated devices, in the tests of a file that use it."""
    import jax  # not before the settings above

    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "local_devices", lambda: first)
        yield


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory):
    """A tiny one with random weights, as published: (folder, network, parameters)."""
    import tiny_encoders

    return tiny_encoders.autoencoder(tmp_path_factory.mktemp("kl") / "vae")


@pytest.fixture(scope="module", autouse=True)
def programs_forgotten():
    """Compiled programs are forgotten between files once there are many: each is a few memory maps, and a process that kept those of two
    thousand tests would run out of them (vm.max_map_count, 65,530 by default) and die of a segmentation fault."""
    yield
    maps = pathlib.Path("/proc/self/maps")  # of Linux, whose limit it is
    if maps.exists() and maps.read_bytes().count(b"\n") > 12_000:
        import jax  # not before the settings above

        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run also what is marked slow: full grids of laws, long kills, configs one by one")


def pytest_collection_modifyitems(config, items):
    """Without --all, tests marked slow run only when they are asked for by name (a node id) or by -m."""
    if config.option.all or config.option.markexpr or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish(session):
    """What collecting has made stays until the end: the garbage collector need not look at it again whenever a program is traced."""
    import jax

    jax.devices()  # XLA has read its flags now; libtpu and the programs that a test starts get those that all of them know
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if flag not in xla_flags.CHEAPEST)
    gc.collect()
    gc.freeze()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The address of an empty folder that is no path of a disk."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    from mmdiff.remote import RemotePath
    from mmdiff.training import lock

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    monkeypatch.setattr(lock, "SETTLE_SECONDS_REMOTE", 0.01)
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield RemotePath("memory://bucket")
    memory.store.clear()
