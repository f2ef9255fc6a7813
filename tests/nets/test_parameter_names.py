"""Checkpoints outlive refactorings: the paths and shapes of every network's parameters are those of the file beside this one.

After a change that is meant to rename parameters, with a table that reads the old ones: `python tests/nets/test_parameter_names.py`.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mmdiff import nets
from mmdiff.nets.audio import AudioAutoencoder
from mmdiff.nets.tokenizers import VQAutoencoder
from mmdiff.projects.dance.motion import DanceEncoder, MotionEncoder

STORED = pathlib.Path(__file__).with_name("parameter_names.json")
SIZES = dict(depth=2, width=16, heads=2)
PATCHES, TEXT = nets.Patches(4, 4, 2, 2), nets.Tokens(5, 6, 5)
IMAGE, LABEL, TIME, IDS = jnp.zeros((2, 4, 4, 2)), jnp.zeros(2, int), jnp.ones(2), jnp.zeros((2, 5), int)
VECTOR, CONTEXT, MOTION = jnp.zeros((2, 4)), jnp.zeros((2, 7, 12)), jnp.zeros((2, 8, 3, 3))
RECIPE = dict(norm="rms", mlp="swiglu", rope=True, qk_norm=True, shift=False, shared_adaln=True)
JOINT = {"image": PATCHES, "label": nets.Label(5, 4), "text": TEXT, "vector": nets.Vectors(4)}
AUX = {
    "label": nets.Classes(4, 3), "other": nets.Classes(4, 3, "output"), "vector": nets.Vector(4), "grid": nets.Grid(PATCHES),
    "map": nets.ClassGrid(nets.Patches(4, 4, 3, 2)),
}  # fmt: skip
DANCE = MotionEncoder(stride=2, **SIZES)
X = {
    "image": IMAGE, "label": LABEL, "other": LABEL, "text": IDS, "tokens": IDS, "vector": VECTOR, "query": VECTOR, "grid": IMAGE,
    "map": jnp.zeros((2, 4, 4), int), "context": CONTEXT,
}  # fmt: skip
T = dict.fromkeys([*X, "vision"], TIME)
NETWORKS = {
    "DiT": (nets.DiT(PATCHES, 3, **SIZES), IMAGE, TIME, LABEL),
    "DiT, qk_norm, no scan": (nets.DiT(PATCHES, 3, qk_norm=True, scan=False, **SIZES), IMAGE, TIME, LABEL),
    "MMDiT": (nets.MMDiT(JOINT, qk_norm=True, **SIZES), X, T),
    "MMDiT, shared": (nets.MMDiT(JOINT, shared=True, **SIZES), X, T),
    "DiT, recipe": (nets.DiT(dataclasses.replace(PATCHES, bottleneck=3, head=(1, 24)), 3, **RECIPE, **SIZES), IMAGE, TIME, LABEL),
    "MMDiT, recipe": (nets.MMDiT(JOINT | {"image": dataclasses.replace(PATCHES, head=(1, 24))}, **RECIPE, **SIZES), X, T),
    "DiT, in context": (nets.DiT(PATCHES, 3, in_context=(3, 1), **RECIPE, **SIZES), IMAGE, TIME, LABEL),
    "MiT": (nets.MiT(PATCHES, 3, head_depth=1, **SIZES), X, T),
    "MultiTaskDiT": (nets.MultiTaskDiT(PATCHES, AUX, **SIZES), X, T),
    "DualStream": (nets.DualStream(PATCHES, TEXT, 4, shared=1, head_depth=1, qk_norm=True, captions=True, **SIZES), X, T),
    "DualStream, shared": (
        nets.DualStream(
            PATCHES, TEXT, 4, shared=1, head_depth=1, head_width=8, head_heads=2, fusion="shared", pooled=True, reinject=False, **SIZES),
        X, T),
    "TokenTransformer": (nets.TokenTransformer(6, (1, 5), labels=4, times=4, context=("context",), **SIZES), X, T),
    "TokenTransformer, encoder": (
        nets.TokenTransformer(
            6, (1, 5), pooled=True, aligned=4, context=("text",), encoder=nets.TextEncoder(6, 5, depth=1, width=8, heads=2), **SIZES),
        X, T),
    "TwoTowers": (nets.TwoTowers(PATCHES, 6, 5, 4, text_depth=1, text_width=8, **SIZES), X, T),
    "UViT": (nets.UViT(PATCHES, nets.Vectors(4), nets.Vectors(12, 7), data_types=2, **SIZES), X | {"vision": VECTOR, "text": CONTEXT}, T),
    "DanceEncoder": (DanceEncoder(DANCE, genres=4, video=True), MOTION, LABEL, VECTOR),
    "VQAutoencoder": (VQAutoencoder(8, 8, 3, features=8, codes=16), jnp.zeros((2, 8, 8, 3))),
    "AudioAutoencoder": (AudioAutoencoder(256, hop=32, codes=16, widths=(4, 4, 4)), jnp.zeros((2, 256))),
}  # fmt: skip


def names(net, *inputs):
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    assert set(shapes) == {"params"}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"])
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_keep_their_names_and_shapes(network):
    assert names(*NETWORKS[network]) == json.loads(STORED.read_text())[network]


if __name__ == "__main__":
    STORED.write_text(json.dumps({network: names(*arguments) for network, arguments in NETWORKS.items()}, indent=0) + "\n")
