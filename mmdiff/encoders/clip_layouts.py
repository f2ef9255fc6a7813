"""Published configurations and layouts of CLIP and SigLIP: config.json of one tower or both, open_clip's, and their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

import flax.linen as nn

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.blocks import ACTIVATIONS
from mmdiff.encoders.encoder_blocks import config_fields
from mmdiff.errors import UserError

WRAPPERS = ("cond_stage_model.transformer.", "cond_stage_model.model.")  # of whole Stable Diffusions
IGNORED = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")  # buffers and numbers
TOWER = ("embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.", "head.")
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
BARE = ("text_projection", "visual.proj")  # [in, out]
# What open_clip's model_cfg may say beside the sizes: the values that leave the network as it is.
PLAIN = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "pos_embed_type": ("learnable",), "block_type": ("default",)}
FREE = ("patch_dropout", "pad_id", "tokenizer_mode", "tokenizer_kwargs", "hf_tokenizer_name", "output_tokens", "eos_id")


def renamed(weights: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """Weights of any accepted layout by transformers' keys; those of a tower without its prefix are of `tower`, "text" or "vision"."""
    for prefix in WRAPPERS:
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)} or weights
    if any("transformer.resblocks." in key for key in weights):
        weights = _of_open_clip(weights)
    elif not any(key.startswith(("text_model.", "vision_model.")) for key in weights):
        weights = {f"{tower}_model.{key}" if key.startswith(TOWER) else key: tensor for key, tensor in weights.items()}
    return {key: tensor for key, tensor in weights.items() if not key.endswith(IGNORED)}


def _of_open_clip(weights):
    found = {}
    for key, tensor in weights.items():
        short = key.removeprefix("text.")  # of a custom text tower
        layer = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(\w+(?:\.\w+)?)[._](weight|bias)", short)
        if layer is None:
            found[OPEN_CLIP.get(short, key)] = tensor.transpose(1, 0) if short in BARE and tensor.ndim == 2 else tensor
            continue
        visual, number, part, leaf = layer.groups()
        prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
        if part == "attn.in_proj" and tensor.ndim:
            found |= {f"{prefix}.self_attn.{name}_proj.{leaf}": third for name, third in zip("qkv", tensor.split(3))}
        else:
            found[f"{prefix}.{OPEN_CLIP_LAYER.get(part, part)}.{leaf}"] = tensor
    return found


def tower_fields(cls: type[nn.Module], config: Mapping, family: str, tower: str) -> dict:
    """The fields of a tower's class that a config.json states.

    Args:
      config: transformers' of this tower or of both, or open_clip's open_clip_config.json.
      family: "clip" or "siglip", as in "model_type". tower: "text" or "vision".

    Raises:
      UserError: a config of another model, or one that asks for what this network is not.
    """
    if "embed_dim" in config.get("model_cfg", config):
        config = _of_open_clip_config(config.get("model_cfg", config))
    kind = config.get("model_type", family)
    if kind not in (family, f"{family}_model", f"{family}_{tower}_model"):
        raise UserError(f"this config.json is of model_type {kind!r}, not of the {tower} tower of a {family!r}.")
    both = f"{tower}_config" in config
    of = config
    if both:  # older files repeat the tower's values in text_config_dict, which then count
        of = next(config[key] for key in (f"{tower}_config_dict", f"{tower}_config") if config.get(key) is not None)
    defaults = config_fields(cls)
    found = {key: value for key, value in config_fields(cls, of).items() if value is not None}
    if "projection_dim" in defaults:
        if both:
            found["projection_dim"] = config.get("projection_dim", 512)
        elif any(not name.endswith("WithProjection") for name in config.get("architectures") or ()):
            found["projection_dim"] = None
    if found.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise UserError(f"hidden_act={found['hidden_act']!r} in the config.json is none of {', '.join(ACTIVATIONS)}.")
    return found


def tower_config(net: nn.Module, model_type: str, architecture: str) -> dict:
    """The config.json of a tower, from its fields."""
    stated = {key: value for key, value in config_fields(net).items() if value is not None}
    projects = "WithProjection" if "projection_dim" in stated else ""
    return {"architectures": [architecture + projects], "model_type": model_type} | stated


def _of_open_clip_config(config):
    """transformers' config of both towers."""
    text, vision = dict(config.get("text_cfg", {})), dict(config.get("vision_cfg", {}))
    for name, cfg, sizes in (
        ("text_cfg", text, ("context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio")),
        ("vision_cfg", vision, ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")),
    ):
        for key, value in cfg.items():
            if value and key not in (*sizes, *FREE) and value not in PLAIN.get(key, ()):
                raise UserError(f"{key}={value!r} in {name} of the open_clip config makes another network than CLIP's transformer.")
    width, vision_width = text.get("width", 512), vision.get("width", 768)
    if not isinstance(vision.get("layers", 12), int):
        raise UserError("the image tower of this open_clip config is a ResNet: only transformers are read.")
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return {
        "model_type": "clip", "projection_dim": config["embed_dim"],
        "text_config": {
            "vocab_size": text.get("vocab_size", 49408), "max_position_embeddings": text.get("context_length", 77), "hidden_size": width,
            "intermediate_size": int(width * text.get("mlp_ratio", 4)), "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8), "hidden_act": activation, "eos_token_id": 2},
        "vision_config": {
            "image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", 16), "hidden_size": vision_width,
            "intermediate_size": int(vision_width * vision.get("mlp_ratio", 4)), "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": vision_width // vision.get("head_width", 64), "hidden_act": activation},
    }  # fmt: skip


def both_towers(text, vision, projection, image_size, activation="quick_gelu"):
    """CLIP's config.json: text (width, layers, heads), vision (width, layers, heads, patch, MLP)."""
    of = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    text = dict(zip(of, text), intermediate_size=4 * text[0], hidden_act=activation, eos_token_id=2)
    vision = dict(zip((*of, "patch_size", "intermediate_size"), vision), image_size=image_size, hidden_act=activation)
    return {"model_type": "clip", "projection_dim": projection, "text_config": text, "vision_config": vision}


B, L, H = (512, 12, 8), (768, 12, 12), (1024, 24, 16)
# OpenAI's and LAION's have the same tensors and other activations: without its config.json a file does not say whose it is.
CLIP_CONFIGS = {
    "clip-vit-base-patch32": both_towers(B, (768, 12, 12, 32, 3072), 512, 224),
    "clip-vit-base-patch16": both_towers(B, (768, 12, 12, 16, 3072), 512, 224),
    "clip-vit-large-patch14": both_towers(L, (1024, 24, 16, 14, 4096), 768, 224),
    "clip-vit-large-patch14-336": both_towers(L, (1024, 24, 16, 14, 4096), 768, 336),
    "CLIP-ViT-B-32": both_towers(B, (768, 12, 12, 32, 3072), 512, 224, "gelu"),
    "CLIP-ViT-B-16": both_towers(B, (768, 12, 12, 16, 3072), 512, 224, "gelu"),
    "CLIP-ViT-L-14": both_towers(L, (1024, 24, 16, 14, 4096), 768, 224, "gelu"),
    "CLIP-ViT-H-14": both_towers(H, (1280, 32, 16, 14, 5120), 1024, 224, "gelu"),
    "CLIP-ViT-bigG-14": both_towers((1280, 32, 20), (1664, 48, 16, 14, 8192), 1280, 224, "gelu"),
}
