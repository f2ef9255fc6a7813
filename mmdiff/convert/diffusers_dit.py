"""diffusers' layout of DiT (`DiTTransformer2DModel`) and its pipeline folder, from and to `nets.DiT`.

Every block has a copy of the embedders of times and classes, and queries, keys and values are three products. With the same weights
diffusers computes another function: its sinusoidal features have the periods 10000^(i / 127), the original 10000^(i / 128), and the second
LayerNorm of a block has norm_eps from the config, 1e-5 by default. `nets.DiT` has both: freq_shift and mlp_norm_eps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff.convert import published_dit
from mmdiff.convert.layouts import Layout, joined, renamed
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError

TO_DIT = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.#.norm1.linear": "blocks.#.adaLN_modulation.1",
    "transformer_blocks.#.attn1.to_out.0": "blocks.#.attn.proj",
    "transformer_blocks.#.ff.net.0.proj": "blocks.#.mlp.fc1", "transformer_blocks.#.ff.net.2": "blocks.#.mlp.fc2",
    "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear",
}  # fmt: skip
EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0", "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}  # fmt: skip
NEEDS = {name: value for name, value in published_dit.NEEDS["dit"].items() if name != "mlp_norm_eps"} | {"freq_shift": 1.0}
FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}


def is_diffusers(weights: Mapping[str, Any]) -> bool:
    return "pos_embed.proj.weight" in weights


def to_dit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' keys -> the original's. Raises UserError where the blocks' copies of the embedders differ."""
    weights, found = dict(weights), {}
    for part, name in EMBEDDERS.items():
        for leaf in ("weight", "bias"):
            copies = [key for key in weights if re.fullmatch(rf"transformer_blocks\.\d+\.norm1\.emb\.{re.escape(part)}\.{leaf}", key)]
            tensors = [weights.pop(key) for key in copies]
            for key, tensor in zip(copies[1:], tensors[1:]):
                if tensor.shape != tensors[0].shape or not np.array_equal(tensor.read(), tensors[0].read()):
                    raise UserError(
                        f"{key} is not {copies[0]}: the blocks have embedders of their own, and this network has one for all, so these "
                        "weights cannot be taken.")
            found |= {f"{name}.{leaf}": tensor for tensor in tensors[:1]}
    for key in [key for key in weights if re.fullmatch(r"transformer_blocks\.\d+\.attn1\.to_q\.(weight|bias)", key)]:
        parts = [key.replace("to_q", part) for part in ("to_q", "to_k", "to_v")]
        if all(part in weights for part in parts) and len({weights[part].shape for part in parts}) == 1:
            number, leaf = key.split(".")[1], key.split(".")[-1]
            found[f"blocks.{number}.attn.qkv.{leaf}"] = joined([weights.pop(part) for part in parts])
    return found | renamed(weights, TO_DIT)


def from_dit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's keys -> diffusers': the inverse of `to_dit`."""
    blocks = sorted({int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))})
    found = renamed(weights, {new: old for old, new in TO_DIT.items()})
    found.pop("pos_embed")
    for part, name in EMBEDDERS.items():
        for leaf in ("weight", "bias"):
            if (tensor := found.pop(f"{name}.{leaf}", None)) is not None:
                found |= {f"transformer_blocks.{i}.norm1.emb.{part}.{leaf}": tensor for i in blocks}
    for i in blocks:
        for leaf in ("weight", "bias"):
            parts = found.pop(f"blocks.{i}.attn.qkv.{leaf}").split(3)
            found |= {f"transformer_blocks.{i}.attn1.{name}.{leaf}": part for name, part in zip(("to_q", "to_k", "to_v"), parts)}
    return found


def transformer_config(net: Any) -> dict[str, Any]:
    """config.json of the transformer."""
    patches = net.patches
    return {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": net.heads, "attention_head_dim": net.width // net.heads,
        "in_channels": patches.channels, "out_channels": patches.out_channels or patches.channels, "num_layers": net.depth,
        "sample_size": patches.height, "patch_size": patches.patch, "num_embeds_ada_norm": net.classes, **FIXED,
        "norm_eps": net.norm_eps if net.mlp_norm_eps is None else net.mlp_norm_eps, "dropout": 0.0, "upcast_attention": False,
    }  # fmt: skip


def stated(net: Any, epsilon: bool = False) -> dict[str, Any]:
    """What config.json of the transformer may state otherwise for another network; `epsilon` counts where diffusers' function is meant."""
    left_out = {"_class_name", "dropout", *(() if epsilon else ("norm_eps",))}
    return {key: value for key, value in transformer_config(net).items() if key not in left_out}


def scheduler_config(steps: int) -> dict[str, Any]:
    """scheduler_config.json of the chain of linear betas that DiT is trained with."""
    return {
        "_class_name": "DDIMScheduler", "num_train_timesteps": steps, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "clip_sample": False, "steps_offset": 0, "set_alpha_to_one": True, "prediction_type": "epsilon"}  # fmt: skip


def model_index(classes: Sequence[str]) -> dict[str, Any]:
    """model_index.json of the pipeline's folder."""
    return {
        "_class_name": "DiTPipeline", "_diffusers_version": "0.39.0",
        "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"], "id2label": {str(number): words for number, words in enumerate(classes)}}  # fmt: skip


DIFFUSERS = Layout(
    published_dit.NAMES, lambda weights, net: published_dit.read(to_dit(weights) if is_diffusers(weights) else weights, net),
    lambda weights, net: from_dit(published_dit.write(weights, net)))
