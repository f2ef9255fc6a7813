"""The published layout of DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024), from and to `nets.DiT`.

    x_embedder.proj [W, C, p, p]        image_in/kernel [p p C, W]: rows in the order row, column, channel
    blocks.#.attn.qkv [3 W, W]          rows q, k, v of all heads; ours has q, k, v of each head, so that tensors split by heads
    pos_embed [1, N, W]                 computed here, not stored; a file with other positions is refused

All else is transposed and stacked. Our times run from data to noise; `NEEDS` are the fields with which a network is fed the published time.
SiT's velocity is data - noise, that of `processes.velocity` noise - data: its last layer changes its sign.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mmdiff.convert.layouts import Layout, each, regrouped
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError
from mmdiff.nets.embed import sincos_2d

NAMES = {
    "image_in": "x_embedder.proj",
    "time/in": "t_embedder.mlp.0", "time/out": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "blocks/attention/qkv": "blocks.#.attn.qkv", "blocks/attention/out": "blocks.#.attn.proj",
    "blocks/mlp/in": "blocks.#.mlp.fc1", "blocks/mlp/out": "blocks.#.mlp.fc2",
    "blocks/adaln": "blocks.#.adaLN_modulation.1",
    "adaln": "final_layer.adaLN_modulation.1", "image_out": "final_layer.linear",
}  # fmt: skip
QKV = r"blocks\.\d+\.attn\.qkv\.(weight|bias)"
PATCHES = "x_embedder.proj.weight"
LAST = r"final_layer\.linear\.(weight|bias)"
NEEDS = {
    "dit": {"qk_norm": False, "time_scale": 1000.0, "time_offset": -1.0, "freq_shift": 0.0, "norm_eps": 1e-6, "mlp_norm_eps": 1e-6},
    "sit": {"qk_norm": False, "time_scale": -1.0, "time_offset": 1.0, "freq_shift": 0.0, "norm_eps": 1e-6, "mlp_norm_eps": 1e-6},
}


def sincos_positions(net: Any) -> np.ndarray:
    """The published buffer `pos_embed` [1, N, W]."""
    patches = net.patches
    return sincos_2d(net.width, patches.height // patches.patch, patches.width // patches.patch)[None]


def read(weights: Any, net: Any, sign: int = 1) -> dict[str, Tensor]:
    """See `Layout.read`."""
    weights = dict(weights)
    stored, expected = weights.pop("pos_embed", None), sincos_positions(net)
    if stored is not None and (stored.shape != expected.shape or not np.allclose(stored.read(), expected, atol=1e-3)):
        raise UserError(
            f"pos_embed {list(stored.shape)} is not the table of sines and cosines {list(expected.shape)} that the network has: "
            "it holds weights of another size, or with learned positions.")

    def rows(kernel):  # [W, C, p, p] -> [W, p p C]
        return kernel if kernel.ndim != 4 else kernel.transpose(0, 2, 3, 1).reshape(kernel.shape[0], int(np.prod(kernel.shape[1:])))

    def by_head(fused):
        return fused if fused.shape[0] != 3 * net.width else regrouped(fused, 3, net.heads)

    return each(weights, {PATCHES: rows, QKV: by_head, LAST: partial(_signed, sign)})


def write(weights: Any, net: Any, sign: int = 1) -> dict[str, Tensor]:
    """See `Layout.write`."""
    patches = net.patches

    def kernel(rows):
        return rows.reshape(rows.shape[0], patches.patch, patches.patch, patches.channels).transpose(0, 3, 1, 2)

    found = each(weights, {PATCHES: kernel, QKV: lambda fused: regrouped(fused, net.heads, 3), LAST: partial(_signed, sign)})
    return {"pos_embed": Tensor.of(sincos_positions(net)), **found}


def _signed(sign: int, tensor: Tensor) -> Tensor:
    return tensor if sign > 0 else tensor.map(np.negative)


DIT = Layout(NAMES, read, write)
SIT = Layout(NAMES, partial(read, sign=-1), partial(write, sign=-1))
