"""The layout of improved MeanFlow's weights (Geng et al. 2025), those of its PyTorch branch, from and to `nets.MiT`.

    x_embedder.proj [W, C, p, p]                        image_in/kernel [p p C, W], as in `published_dit`
    shared_blocks.#.attn.q_proj, k_proj, v_proj         one product, q, k, v of each head; ours turns features D/2 apart, theirs neighbours
    shared_blocks.#.mlp.w1 (gate), w3 (value) [H, W]    one product, both of each hidden unit
    u_heads.#, v_heads.#                                the blocks of image_head and velocity_head
    class_tokens, omega_tokens, t_min_tokens, t_max_tokens, time_tokens [T, W]     tokens/embedding, in this order

Keys begin with "net.", and products and tables have "._flax_linear" or "._flax_embedding" before their last part. Weights for sampling lack
the head of velocities, but have its last layer: a network with `velocity=False` leaves that out.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from mmdiff.convert.layouts import Layout, each, joined, regrouped
from mmdiff.convert.published_dit import halves, halves_of_norm
from mmdiff.convert.tensors import Tensor
from mmdiff.nets.mit import TOKENS

BLOCK = {
    "attention/qkv": "attn.qkv", "attention/out": "attn.out_proj", "attention/q_norm": "attn.q_norm", "attention/k_norm": "attn.k_norm",
    "attention_norm": "norm1", "mlp_norm": "norm2", "mlp/in": "mlp.w13", "mlp/out": "mlp.w2", "attention_gate": "attn_scale",
    "mlp_gate": "mlp_scale",
}  # fmt: skip
STACKS = {"blocks": "shared_blocks", "image_head/blocks": "u_heads", "velocity_head/blocks": "v_heads"}
EMBEDDERS = {
    "guidance": "omega_embedder", "interval_start": "cfg_t_start_embedder", "interval_end": "cfg_t_end_embedder", "span": "h_embedder"}
NAMES = {
    "image_in": "x_embedder.proj", "label": "y_embedder.embedding_table", "tokens": "tokens",
    **{f"{ours}/{layer}": f"{theirs}.mlp.{i}" for ours, theirs in EMBEDDERS.items() for layer, i in (("in", 0), ("out", 2))},
    **{f"{stack}/{ours}": f"{name}.#.{theirs}" for stack, name in STACKS.items() for ours, theirs in BLOCK.items()},
    "image_norm": "u_final_layer.norm", "image_out": "u_final_layer.linear",
    "velocity_norm": "v_final_layer.norm", "velocity_out": "v_final_layer.linear",
}  # fmt: skip
NEEDS = {
    "norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True, "mlp_ratio": 4.0, "norm_eps": 1e-6, "time_scale": 1.0,
    "time_offset": 0.0}
PREFIX = {"label": "class", "guidance": "omega", "interval_start": "t_min", "interval_end": "t_max", "span": "time"}  # ..._tokens
PATCHES, QKV, GATES = "x_embedder.proj.weight", r".*\.attn\.qkv\.weight", r".*\.mlp\.w13\.weight"
NORM, VECTORS = r".*\.attn\.[qk]_norm\.weight", r".*\.(attn|mlp)_scale"
FLAX = {r".*\.(mlp\.(0|2|w[123])|(q|k|v|out)_proj|linear)": "_flax_linear", r".*\.embedding_table": "_flax_embedding"}
PARTS = {"attn.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp.w13": ("mlp.w1", "mlp.w3")}


def read(weights: Any, net: Any) -> dict[str, Tensor]:
    """See `Layout.read`."""
    names = {key: re.sub(r"\._flax_(linear|embedding)(?=\.)", "", key.removeprefix("net.")) for key in weights}
    found = {name: weights[key] for key, name in names.items() if net.velocity or not name.startswith(("v_heads.", "v_final_layer."))}
    for whole, parts in PARTS.items():
        for key in [key for key in found if f".{parts[0]}." in key]:
            each_of = [found.pop(key.replace(parts[0], part), None) for part in parts]
            if None not in each_of:
                found[key.replace(parts[0], whole)] = joined(each_of)
    rows = [found.pop(f"{PREFIX[name]}_tokens", None) for name in TOKENS]
    if None not in rows:
        found["tokens.weight"] = joined([part for part, name in zip(rows, TOKENS) for part in part.split(TOKENS[name])])
    found = {f"{key}.bias" if re.fullmatch(VECTORS, key) else key: tensor for key, tensor in found.items()}

    def by_head(fused):
        return regrouped(halves(net, False, fused), 3, net.heads)

    return each(found, {
        PATCHES: lambda kernel: kernel.transpose(0, 2, 3, 1).reshape(kernel.shape[0], kernel.size // kernel.shape[0]), QKV: by_head,
        GATES: lambda fused: regrouped(fused, 2, fused.shape[0] // 2), NORM: partial(halves_of_norm, False)})


def write(weights: Any, net: Any) -> dict[str, Tensor]:
    """See `Layout.write`."""
    side = net.patches.patch
    found = each(weights, {
        PATCHES: lambda rows: rows.reshape(rows.shape[0], side, side, rows.shape[1] // side**2).transpose(0, 3, 1, 2),
        QKV: lambda fused: halves(net, True, regrouped(fused, net.heads, 3)),
        GATES: lambda fused: regrouped(fused, fused.shape[0] // 2, 2), NORM: partial(halves_of_norm, True)})
    tokens, start, made = found.pop("tokens.weight"), 0, {}
    for name, count in TOKENS.items():
        made[f"{PREFIX[name]}_tokens"], start = tokens.part(start, start + count), start + count
    for key, tensor in found.items():
        whole = next((whole for whole in PARTS if f".{whole}." in key), None)
        if whole:
            made |= {key.replace(whole, part): rows for part, rows in zip(PARTS[whole], tensor.split(len(PARTS[whole])))}
        else:
            made[re.sub(rf"({VECTORS})\.bias", r"\1", key)] = tensor

    def published(key):
        module, _, leaf = key.rpartition(".")
        wrapped = [name for pattern, name in FLAX.items() if re.fullmatch(pattern, module)]
        return ".".join(filter(None, ["net", module, *wrapped, leaf]))

    return {published(key): tensor for key, tensor in made.items()}


IMF = Layout(NAMES, read, write)
