"""UniDiffuser's layouts (Bao et al. 2023), the authors' file and diffusers' `UniDiffuserModel`, from and to `nets.UViT`.

    patch_embed.proj [W, C, p, p]               image_in/kernel [p p C, W], as in `published_dit`
    pos_embed [1, N, W], pos_embed_token        positions/embedding, in the order of the tokens: the latter stands behind two of the former
    attn.qkv [3 W, W]                           q, k, v of each head

diffusers has queries, keys and values as three products, and a copy of the patches' layer that nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdiff.convert.layouts import Layout, each, joined, regrouped, renamed
from mmdiff.convert.tensors import Tensor, widest
from mmdiff.errors import UserError

BLOCK = {
    "attention/qkv": "attn.qkv", "attention/out": "attn.proj", "attention_norm": "norm2", "mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2",
    "mlp_norm": "norm3"}
SKIP = {"skip": "skip_linear", "skip_norm": "norm1"}
NAMES = {
    "image_in": "patch_embed.proj", "vision_in": "clip_img_embed", "text_in": "text_embed",
    "data_type_in": "token_embedding", "positions": "pos_embed",
    **{f"in/blocks/{ours}": f"in_blocks.#.{theirs}" for ours, theirs in BLOCK.items()},
    **{f"mid/blocks/{ours}": f"mid_block.{theirs}" for ours, theirs in BLOCK.items()},
    **{f"out/blocks/{ours}": f"out_blocks.#.{theirs}" for ours, theirs in (BLOCK | SKIP).items()},
    "norm": "norm", "image_out": "decoder_pred", "vision_out": "clip_img_out", "text_out": "text_out",
}  # fmt: skip
TIMES = 2  # tokens in front of that of the data's kind
IN_BLOCK = {"attn1.to_out.0": "attn.proj", "norm1": "norm2", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "norm3": "norm3"}
DIFFUSERS_NAMES = {
    "vae_img_in.proj": "patch_embed.proj", "clip_img_in": "clip_img_embed", "text_in": "text_embed",
    "data_type_pos_embed_token": "pos_embed_token", "data_type_token_embedding": "token_embedding",
    **{f"transformer.transformer_{block}.{theirs}": f"{name}.{ours}" for block, name in (
        ("in_blocks.#", "in_blocks.#"), ("mid_block", "mid_block"), ("out_blocks.#.block", "out_blocks.#"))
       for theirs, ours in (IN_BLOCK | {f"attn1.to_{part}": f"attn.{part}" for part in "qkv"}).items()},
    "transformer.transformer_out_blocks.#.skip.skip_linear": "out_blocks.#.skip_linear",
    "transformer.transformer_out_blocks.#.skip.norm": "out_blocks.#.norm1",
    "transformer.norm_out": "norm", "vae_img_out": "decoder_pred",
}  # fmt: skip
UNREAD = {"transformer.pos_embed.proj": "patch_embed.proj"}  # the copy in diffusers
NEEDS = {"norm_eps": 1e-5}
PATCHES, QKV = r"patch_embed\.proj\.weight", r".*\.attn\.qkv\.weight"


def read(weights: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """See `Layout.read`."""
    if "vae_img_in.proj.weight" in weights:
        weights = renamed({key: tensor for key, tensor in weights.items() if not key.startswith(tuple(UNREAD))}, DIFFUSERS_NAMES)
        for key in [key for key in weights if key.endswith(".attn.q.weight")]:
            parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
            if all(part in weights for part in parts):
                weights[key.replace(".attn.q.", ".attn.qkv.")] = joined([weights.pop(part) for part in parts])
    found = dict(weights)
    if (positions := found.pop("pos_embed", None)) is not None:
        _check_positions("pos_embed", positions, net)
        kind = found.pop("pos_embed_token", None) if net.data_types else None
        if kind is not None:
            _check_positions("pos_embed_token", kind, net)
        tables = [positions] if kind is None else [positions, kind]
        positions, *kinds = (table.astype(widest(tables)) for table in tables)

        def rows(array):
            return np.concatenate([array[0, :TIMES], *(of.read()[0] for of in kinds), array[0, TIMES:]])

        found["pos_embed.weight"] = positions.map(rows, (positions.shape[1] + len(kinds), positions.shape[2]))

    def patches(kernel):
        return kernel if kernel.ndim != 4 else kernel.transpose(0, 2, 3, 1).reshape(kernel.shape[0], math.prod(kernel.shape[1:]))

    def by_head(fused):
        return fused if fused.shape[:1] != (3 * net.width,) else regrouped(fused, 3, net.heads)

    return each(found, {PATCHES: patches, QKV: by_head})


def write(weights: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """See `Layout.write`."""
    side = net.image.patch
    found = each(weights, {
        PATCHES: lambda rows: rows.reshape(rows.shape[0], side, side, rows.shape[1] // side**2).transpose(0, 3, 1, 2),
        QKV: lambda fused: regrouped(fused, net.heads, 3)})
    positions = found.pop("pos_embed.weight")
    if net.data_types:
        found["pos_embed_token"] = positions.part(TIMES, TIMES + 1).reshape(1, 1, net.width)
        positions = positions.map(lambda array: np.delete(array, TIMES, 0), (positions.shape[0] - 1, net.width))
    found["pos_embed"] = positions.reshape(1, *positions.shape)
    return found


def write_diffusers(weights: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """See `Layout.write`."""
    found = write(weights, net)
    for key in [key for key in found if key.endswith(".attn.qkv.weight")]:
        found |= {key.replace(".qkv.", f".{part}."): rows for part, rows in zip("qkv", found.pop(key).split(3))}
    unread = {key.replace(name, copy): found[key] for copy, name in UNREAD.items() for key in list(found) if key.startswith(f"{name}.")}
    return renamed(found, {new: old for old, new in DIFFUSERS_NAMES.items()}) | unread


def stated(net: Any) -> dict[str, Any]:
    """What config.json of diffusers' `UniDiffuserModel` may state otherwise for another network."""
    return {
        "text_dim": net.text.size, "clip_img_dim": net.vision.size, "num_text_tokens": net.text.length, "num_attention_heads": net.heads,
        "attention_head_dim": net.width // net.heads, "in_channels": net.image.channels, "num_layers": net.depth,
        "sample_size": net.image.height, "patch_size": net.image.patch, "attention_bias": False, "activation_fn": "gelu",
        "norm_type": "layer_norm", "block_type": "unidiffuser", "pre_layer_norm": False, "use_timestep_embedding": False,
        "norm_elementwise_affine": True, "use_patch_pos_embed": False, "use_data_type_embedding": bool(net.data_types)}  # fmt: skip


def diffusers_config(net: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' `UniDiffuserModel`. Raises UserError for networks that diffusers does not have."""
    if net.image.height != net.image.width or net.data_types not in (0, 2):
        raise UserError("diffusers' UniDiffuser has square images and no or two kinds of data: write --to published.")
    return {
        "_class_name": "UniDiffuserModel", **stated(net), "out_channels": net.image.out_channels or net.image.channels,
        "num_embeds_ada_norm": 1000, "norm_num_groups": 32, "dropout": 0.0, "ff_final_dropout": True}  # fmt: skip


def _check_positions(key: str, stored: Tensor, net: Any) -> None:
    tokens = 1 if key.endswith("token") else TIMES + net.text.length + net.vision.length + net.image.length
    if stored.shape != (1, tokens, net.width):
        raise UserError(
            f"{key} {list(stored.shape)} is not the table of positions {[1, tokens, net.width]} that the network has: it holds weights of "
            "another size.")


UNIDIFFUSER, UNIDIFFUSER_DIFFUSERS = Layout(NAMES, read, write), Layout(NAMES, read, write_diffusers)
