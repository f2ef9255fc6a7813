"""The published layouts of DiT (Peebles & Xie 2023), SiT (Ma et al. 2024), REPA (Yu et al. 2025), LightningDiT (Yao et al. 2025) and JiT
(Li & He 2025), from and to `nets.DiT`.

    x_embedder.proj [W, C, p, p]        image_in/kernel [p p C, W]: rows in the order row, column, channel
    blocks.#.attn.qkv [3 W, W]          rows q, k, v of all heads; ours has q, k, v of each head, so that tensors split by heads
    pos_embed [1, N, W]                 computed here, not stored; a file with other positions is refused
    mlp.w12 [2 H, W]                    LightningDiT's rows gate, value of all hidden units; ours has both of each unit
    feat_rope.freqs_cos, _sin [N, D]    as pos_embed; LightningDiT and JiT turn neighbouring features of a head, ours are D/2 apart
    x_embedder.proj1, proj2             JiT's patches to a bottleneck, and that to W
    in_context_posemb [1, T, W]         in_context/embedding; JiT's keys begin with "net."

All else is transposed and stacked. Our times run from data to noise; `NEEDS` are the fields with which a network is fed the published time.
The velocity of SiT and LightningDiT is data - noise, that of `processes.velocity` and of REPA noise - data: their last layer changes its
sign.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mmdiff.convert.layouts import Layout, each, regrouped
from mmdiff.convert.tensors import Tensor
from mmdiff.errors import UserError
from mmdiff.nets.embed import sincos_2d
from mmdiff.nets.rotary import angles

NAMES = {
    "image_in": "x_embedder.proj",
    "time/in": "t_embedder.mlp.0", "time/out": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "blocks/attention/qkv": "blocks.#.attn.qkv", "blocks/attention/out": "blocks.#.attn.proj",
    "blocks/mlp/in": "blocks.#.mlp.fc1", "blocks/mlp/out": "blocks.#.mlp.fc2",
    "blocks/adaln": "blocks.#.adaLN_modulation.1",
    "adaln": "final_layer.adaLN_modulation.1", "image_out": "final_layer.linear",
}  # fmt: skip
REPA_NAMES = NAMES | {f"dino_tap_{i}": f"projectors.0.{2 * i}" for i in range(3)}  # between them is SiLU
LIGHTNING_NAMES = NAMES | {
    "blocks/mlp/in": "blocks.#.mlp.w12", "blocks/mlp/out": "blocks.#.mlp.w3", "norm": "final_layer.norm_final",
    "blocks/attention_norm": "blocks.#.norm1", "blocks/mlp_norm": "blocks.#.norm2",
}  # fmt: skip
JIT_NAMES = LIGHTNING_NAMES | {
    "image_bottleneck": "x_embedder.proj1", "image_in": "x_embedder.proj2", "in_context": "in_context_posemb",
    "blocks/attention/q_norm": "blocks.#.attn.q_norm", "blocks/attention/k_norm": "blocks.#.attn.k_norm",
}  # fmt: skip
QKV = r"blocks\.\d+\.attn\.qkv\.(weight|bias)"
PATCHES, BOTTLENECK = r"x_embedder\.proj1?\.weight", "x_embedder.proj2.weight"
QK_NORM = r"blocks\.\d+\.attn\.[qk]_norm\.weight"
LAST = r"final_layer\.linear\.(weight|bias)"
W12 = r"blocks\.\d+\.mlp\.w12\.(weight|bias)"
COMMON = {"qk_norm": False, "shift": True, "shared_adaln": False, "freq_shift": 0.0, "norm_eps": 1e-6, "mlp_norm_eps": 1e-6}
PLAIN, RECIPE = {"norm": "layer", "mlp": "gelu", "rope": False}, {"norm": "rms", "mlp": "swiglu", "rope": True}
NEEDS = {
    "dit": COMMON | PLAIN | {"time_scale": 1000.0, "time_offset": -1.0},
    "sit": COMMON | PLAIN | {"time_scale": -1.0, "time_offset": 1.0},
    "repa": COMMON | PLAIN | {"time_scale": 1.0, "time_offset": 0.0},
    "lightningdit": COMMON | RECIPE | {"time_scale": -1.0, "time_offset": 1.0},
}
NEEDS["jit"] = NEEDS["lightningdit"] | {"qk_norm": True}


def sincos_positions(net: Any) -> np.ndarray:
    """The published buffer `pos_embed` [1, N, W]."""
    return sincos_2d(net.width, *net.patches.grid, net.patches.spacing)[None]


def rotary_tables(net: Any) -> dict[str, np.ndarray]:
    """The published buffers `feat_rope.freqs_cos` and `feat_rope.freqs_sin` [N, D]."""
    turns = np.repeat(angles(net.patches.positions(), net.width // net.heads), 2, axis=-1)
    return {f"feat_rope.freqs_{name}": np.float32(getattr(np, name)(turns)) for name in ("cos", "sin")}


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

    return each(weights, {PATCHES: rows, BOTTLENECK: rows, QKV: by_head, LAST: partial(_signed, sign)})


def write(weights: Any, net: Any, sign: int = 1) -> dict[str, Tensor]:
    """See `Layout.write`."""
    def kernel(side, rows):
        return rows.reshape(rows.shape[0], side, side, rows.shape[1] // side**2).transpose(0, 3, 1, 2)

    found = each(weights, {
        PATCHES: partial(kernel, net.patches.patch), BOTTLENECK: partial(kernel, 1), QKV: lambda fused: regrouped(fused, net.heads, 3),
        LAST: partial(_signed, sign)})
    return {"pos_embed": Tensor.of(sincos_positions(net)), **found}


def _signed(sign: int, tensor: Tensor) -> Tensor:
    return tensor if sign > 0 else tensor.map(np.negative)


def halves(net: Any, back: bool, fused: Tensor) -> Tensor:
    """Rows q, k, v of all heads with each head's pairs of features side by side, as LightningDiT has them, or half a head apart."""
    if fused.shape[0] != 3 * net.width:
        return fused

    def function(array):
        rows = array.reshape(3, net.heads, *((2, -1) if back else (-1, 2)), *array.shape[1:])
        turned = rows[:2].swapaxes(2, 3).reshape(2, -1, *array.shape[1:])
        return np.concatenate([turned.reshape(-1, *array.shape[1:]), rows[2].reshape(-1, *array.shape[1:])])

    return fused.map(function)


def halves_of_norm(back: bool, scale: Tensor) -> Tensor:
    """The same order of the features of one head, [D]."""
    return scale.map(lambda array: array.reshape((2, -1) if back else (-1, 2)).T.reshape(array.shape))


def read_lightning(weights: Any, net: Any, sign: int = -1) -> dict[str, Tensor]:
    """See `Layout.read`."""
    weights = dict(weights)
    for name, expected in rotary_tables(net).items():
        stored = weights.pop(name, None)
        if stored is not None and (stored.shape != expected.shape or not np.allclose(stored.read(), expected, atol=1e-3)):
            raise UserError(f"{name} {list(stored.shape)} is not the table of rotary positions {list(expected.shape)} of the network.")
    ordered = each(weights, {
        QKV: partial(halves, net, False), QK_NORM: partial(halves_of_norm, False),
        W12: lambda rows: regrouped(rows, 2, rows.shape[0] // 2)})
    return read(ordered, net, sign)


def write_lightning(weights: Any, net: Any) -> dict[str, Tensor]:
    """See `Layout.write`."""
    return {name: Tensor.of(table) for name, table in rotary_tables(net).items()} | _written(weights, net, -1)


def _written(weights, net, sign):
    return each(write(weights, net, sign), {
        QKV: partial(halves, net, True), W12: lambda rows: regrouped(rows, rows.shape[0] // 2, 2), QK_NORM: partial(halves_of_norm, True)})


def read_jit(weights: Any, net: Any) -> dict[str, Tensor]:
    """See `Layout.read`."""
    weights = {key.removeprefix("net."): tensor for key, tensor in weights.items()}
    if (learned := weights.pop("in_context_posemb", None)) is not None:
        weights["in_context_posemb.weight"] = learned.reshape(*learned.shape[1:])
    return read_lightning(weights, net, sign=1)


def write_jit(weights: Any, net: Any) -> dict[str, Tensor]:
    """See `Layout.write`."""
    found = _written(weights, net, 1)
    if (learned := found.pop("in_context_posemb.weight", None)) is not None:
        found["in_context_posemb"] = learned.reshape(1, *learned.shape)
    return {f"net.{key}": tensor for key, tensor in found.items()}


DIT = Layout(NAMES, read, write)
LIGHTNING = Layout(LIGHTNING_NAMES, read_lightning, write_lightning)
JIT = Layout(JIT_NAMES, read_jit, write_jit)
REPA = Layout(REPA_NAMES, read, write)
SIT = Layout(NAMES, partial(read, sign=-1), partial(write, sign=-1))
