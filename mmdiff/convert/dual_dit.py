"""The generator of a `nets.DualStream` from DiT's weights (Peebles & Xie 2023): all that it has in common with `nets.DiT`.

    blocks.#                          trunk/blocks and, of those that only generate, decoder/blocks
    adaLN_modulation.1 [6 W, W]       image_adaln [9 W, W]: cross-attention's shift, scale and gate are 0
    mlp                               image_mlp, and a copy of it query_mlp
    y_embedder [classes + 1, W]       its last row, that of no class, is added to the bias of image_time/out
    final_layer.linear [2 C p p, W]   image_out, without the variances' rows

All else is new. Thus the network generates at first as DiT does without a class, whatever the caption and the query.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mmdiff.convert import diffusers_dit
from mmdiff.convert.layouts import Layout, each
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError

BLOCK = {"image_qkv": "attn.qkv", "image_out": "attn.proj", "image_mlp/in": "mlp.fc1", "image_mlp/out": "mlp.fc2",
         "image_adaln": "adaLN_modulation.1"}
NAMES = {
    "image_in": "x_embedder.proj", "image_time/in": "t_embedder.mlp.0", "image_time/out": "t_embedder.mlp.2",
    **{f"{part}/blocks/{ours}": f"{part}.#.{name}" for part in ("trunk", "decoder") for ours, name in BLOCK.items()},
    "trunk/blocks/query_mlp/in": "trunk.#.query_mlp.fc1", "trunk/blocks/query_mlp/out": "trunk.#.query_mlp.fc2",
    "image_adaln": "final_layer.adaLN_modulation.1", "image_out": "final_layer.linear",
}  # fmt: skip
NEEDS = {name: value for name, value in diffusers_dit.NEEDS.items() if name != "freq_shift"} | {"fusion": "shared", "pooled": False}
CLASSES = "y_embedder.embedding_table.weight"


def read(weights: Any, net: Any) -> dict[str, Tensor]:
    """See `Layout.read`."""
    found = diffusers_dit.DIFFUSERS.read(weights, net)
    table, channels = found.pop(CLASSES, None), net.patches.channels
    if table is None or table.ndim != 2 or table.shape[1] != net.width:
        raise UserError(f"the weights have no classes ({CLASSES} [classes + 1, {net.width}]): they are not DiT's, or of another size.")

    def without_class(bias):
        return bias.map(lambda array: array + table.part(table.shape[0] - 1, table.shape[0]).read()[0])

    def with_cross(rows):
        zeros = [(0, rows.shape[0] // 2 if net.text is not None else 0)] + [(0, 0)] * (rows.ndim - 1)
        return rows.map(lambda array: np.pad(array, zeros), (rows.shape[0] + zeros[0][1], *rows.shape[1:]))

    def means(rows):  # [p, p, 2 C] outputs of a token -> [p, p, C]
        pixels = net.patches.patch**2
        if rows.shape[0] != 2 * channels * pixels:
            return rows
        shape = (channels * pixels, *rows.shape[1:])
        return rows.map(lambda array: array.reshape(pixels, 2 * channels, -1)[:, :channels].reshape(shape), shape)

    found = each(found, {
        r"t_embedder\.mlp\.2\.bias": without_class, r"blocks\.\d+\.adaLN_modulation\.1\.(weight|bias)": with_cross,
        r"final_layer\.linear\.(weight|bias)": means})
    placed = {}
    for key, tensor in found.items():
        if match := re.match(r"blocks\.(\d+)\.", key):
            number, rest = int(match[1]), key[match.end() :]
            shared = number < net.shared
            placed[f"trunk.{number}.{rest}" if shared else f"decoder.{number - net.shared}.{rest}"] = tensor
            if shared and rest.startswith("mlp."):
                placed[f"trunk.{number}.query_{rest}"] = tensor
        else:
            placed[key] = tensor
    return placed


def stated(net: Any) -> dict[str, Any]:
    """What config.json of diffusers' transformer states of the network."""
    return {
        "num_attention_heads": net.heads, "attention_head_dim": net.width // net.heads, "in_channels": net.patches.channels,
        "num_layers": net.depth, "sample_size": net.patches.height, "patch_size": net.patches.patch}


DUAL = Layout(NAMES, read, None, part=True)
