"""The published layouts of VQ-Diffusion (Gu et al. 2022) and CDCD (Zhu et al. 2023), from and to `nets.TokenTransformer`.

The original checkpoints hold a whole system: what lies under "transformer.transformer." (under "transformer." in their averages) is the
network, and all else is left out, the frozen text encoder and autoencoder among it. diffusers has the text-conditional network with
ordinary feed-forward layers (`Transformer2DModel` with num_vector_embeds). All compute the same function of the same weights.

    attn1.{query,key,value}     attention/qkv, of each head q, k, v; attn2's keys and values are cross/kv
    ln2.emb [1000, d]           mlp_table [1001, d] where a null of the label has a row: as published the mean of all classes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdiff.convert.layouts import Layout, joined, regrouped, renamed
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError

NAMES = {
    "tokens_in": "content_emb.emb", "rows": "content_emb.height_emb", "columns": "content_emb.width_emb",
    "blocks/attention_table": "blocks.#.ln1.emb", "blocks/attention_adaln": "blocks.#.ln1.linear",
    "blocks/attention/qkv": "blocks.#.attn1.qkv", "blocks/attention/out": "blocks.#.attn1.proj",
    "blocks/cross_table": "blocks.#.ln1_1.emb", "blocks/cross_adaln": "blocks.#.ln1_1.linear",
    "blocks/cross/q": "blocks.#.attn2.query", "blocks/cross/kv": "blocks.#.attn2.kv", "blocks/cross/out": "blocks.#.attn2.proj",
    "blocks/mlp_norm": "blocks.#.ln2", "blocks/mlp_table": "blocks.#.ln2.emb", "blocks/mlp_adaln": "blocks.#.ln2.linear",
    "blocks/mlp/in": "blocks.#.mlp.0", "blocks/mlp/out": "blocks.#.mlp.2",
    "norm": "to_logits.0", "tokens_out": "to_logits.1",
}  # fmt: skip
CONDITIONED = {"blocks.#.attn": "blocks.#.attn1"}  # networks of a label have no second attention
CONVOLUTIONS = {"blocks.#.mlp.conv1": "blocks.#.mlp.0", "blocks.#.mlp.conv2": "blocks.#.mlp.2"}
DIFFUSERS_NAMES = {
    "latent_image_embedding": "content_emb",
    "transformer_blocks.#.norm1": "blocks.#.ln1", "transformer_blocks.#.norm2": "blocks.#.ln1_1",
    "transformer_blocks.#.norm3": "blocks.#.ln2",
    **{f"transformer_blocks.#.attn{i}.to_{part}": f"blocks.#.attn{i}.{name}"
       for i in (1, 2) for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj"))},
    "transformer_blocks.#.ff.net.0.proj": "blocks.#.mlp.0", "transformer_blocks.#.ff.net.2": "blocks.#.mlp.2",
    "norm_out": "to_logits.0", "out": "to_logits.1",
}  # fmt: skip
FUSED = {"attn1.qkv": ("query", "key", "value"), "attn2.kv": ("key", "value")}
NEEDS = {"patch": 1, "aligned": 0, "pooled": False, "norm_eps": 1e-5}
PARTS = ("content_emb.", "blocks.", "to_logits.")


def read(weights: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """See `Layout.read`."""
    if any(key.startswith("latent_image_embedding.") for key in weights):
        found = renamed(weights, DIFFUSERS_NAMES)
    else:
        stripped = {re.sub(r"^(transformer\.){1,2}(?=content_emb|blocks|to_logits)", "", key): tensor for key, tensor in weights.items()}
        found = {key: tensor for key, tensor in stripped.items() if key.startswith(PARTS) and not re.search(r"\.attn[12]?\.mask$", key)}
        if not found:
            raise UserError("the weights have no transformer of VQ-Diffusion (transformer.transformer.blocks....) among them.")
        found = renamed(renamed(found, CONDITIONED), CONVOLUTIONS)
    for key in [key for key in found if re.fullmatch(r"blocks\.\d+\.attn[12]\.key\.(weight|bias)", key)]:
        number, attention, _, leaf = key.split(".")[1:]
        fused = "attn1.qkv" if attention == "attn1" else "attn2.kv"
        parts = [f"blocks.{number}.{attention}.{part}.{leaf}" for part in FUSED[fused]]
        if all(part in found for part in parts) and len({found[part].shape for part in parts}) == 1:
            rows = joined([found.pop(part) for part in parts])
            found[f"blocks.{number}.{fused}.{leaf}"] = regrouped(rows, len(parts), net.heads) if rows.shape[0] % net.heads == 0 else rows
    for key in [key for key in found if re.fullmatch(r"blocks\.\d+\.ln2\.emb\.weight", key)]:
        classes, width = found[key].shape
        if classes == net.labels - 1:
            found[key] = found[key].map(_with_null, (classes + 1, width))
    return found


def write(weights: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """See `Layout.write`: keys of an average, "transformer.blocks....", which the original code takes."""
    found = dict(weights)
    for key in [key for key in found if re.search(r"attn1\.qkv|attn2\.kv", key)]:
        number, attention, fused, leaf = key.split(".")[1:]
        parts = FUSED[f"{attention}.{fused}"]
        split = regrouped(found.pop(key), net.heads, len(parts)).split(len(parts))
        found |= {f"blocks.{number}.{attention}.{part}.{leaf}": tensor for part, tensor in zip(parts, split)}
    for key in [key for key in found if re.fullmatch(r"blocks\.\d+\.ln2\.emb\.weight", key)]:
        table = found[key].read()
        if np.array_equal(_with_null(table[:-1])[-1], table[-1]):  # a row that was trained stays, as one more class
            found[key] = found[key].part(0, len(table) - 1)
    if net.conv:
        found = renamed(found, {new: old for old, new in CONVOLUTIONS.items()})
    if not net.context:
        found = renamed(found, {new: old for old, new in CONDITIONED.items()})
    return {f"transformer.{key}": tensor for key, tensor in found.items()}


def write_diffusers(weights: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """See `Layout.write`. Raises UserError for networks that diffusers does not have."""
    if net.conv or net.labels or not net.context:
        raise UserError("diffusers has VQ-Diffusion with cross-attention and ordinary feed-forward layers alone: write --to published.")
    plain = {key.removeprefix("transformer."): tensor for key, tensor in write(weights, net).items()}
    return renamed(plain, {new: old for old, new in DIFFUSERS_NAMES.items()})


def diffusers_config(net: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' transformer. Raises UserError for grids that are not square."""
    rows, columns = net.positions or net.grid
    if rows != columns or net.grid[0] != net.grid[1]:
        raise UserError(f"diffusers has square grids of tokens alone, not {net.grid[0]}x{net.grid[1]}: write --to published.")
    return {
        "_class_name": "Transformer2DModel", **stated(net), "attention_head_dim": net.width // net.heads, "sample_size": rows,
        "cross_attention_dim": weights["transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "norm_type": "ada_norm", "norm_num_groups": 32, "dropout": 0.0}  # fmt: skip


def stated(net: Any) -> dict[str, Any]:
    """What config.json of diffusers' transformer states of a network."""
    return {
        "num_attention_heads": net.heads, "num_layers": net.depth, "num_vector_embeds": net.classes + 1, "num_embeds_ada_norm": net.times,
        "attention_bias": True, "activation_fn": "geglu-approximate"}  # fmt: skip


def _with_null(table: np.ndarray) -> np.ndarray:
    mean = table.astype(np.float64).mean(0, keepdims=True).astype(table.dtype)
    return np.concatenate([table, mean])


VQ_DIFFUSION, VQ_DIFFUSION_DIFFUSERS = Layout(NAMES, read, write), Layout(NAMES, read, write_diffusers)
