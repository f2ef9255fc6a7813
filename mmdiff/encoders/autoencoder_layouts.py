"""Keys of the published convolutional autoencoders in the layouts that their files have, and values of their config.json.

The canonical layout is diffusers'. Others: latent diffusion's (`.ckpt` files of Stable Diffusion, taming's VQGAN, FLUX, VA-VAE), which
counts the decoder's levels from the largest size; LlamaGen's; and diffusers' first names of the attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff.convert.tensors import Tensor
from mmdiff.encoders.encoder_blocks import config_fields
from mmdiff.errors import UserError

# Parts of keys, "{}" for a number: (theirs, diffusers'), replaced one pair after another.
_PARTS = [
    (".nin_shortcut.", ".conv_shortcut."),
    ("coder.norm_out.", "coder.conv_norm_out."),
    (".attentions.{}.norm.", ".attentions.{}.group_norm."),
    (".attentions.{}.q.", ".attentions.{}.to_q."),
    (".attentions.{}.k.", ".attentions.{}.to_k."),
    (".attentions.{}.v.", ".attentions.{}.to_v."),
    (".attentions.{}.proj_out.", ".attentions.{}.to_out.0."),
]
LDM = [
    ("encoder.down.{}.block.{}.", "encoder.down_blocks.{}.resnets.{}."),
    ("encoder.down.{}.attn.{}.", "encoder.down_blocks.{}.attentions.{}."),
    ("encoder.down.{}.downsample.", "encoder.down_blocks.{}.downsamplers.0."),
    ("decoder.up.{}.block.{}.", "decoder.up_blocks.{}.resnets.{}."),
    ("decoder.up.{}.attn.{}.", "decoder.up_blocks.{}.attentions.{}."),
    ("decoder.up.{}.upsample.", "decoder.up_blocks.{}.upsamplers.0."),
    ("coder.mid.block_1.", "coder.mid_block.resnets.0."),
    ("coder.mid.attn_1.", "coder.mid_block.attentions.0."),
    ("coder.mid.block_2.", "coder.mid_block.resnets.1."),
    *_PARTS,
]
LLAMAGEN = [
    ("encoder.conv_blocks.{}.res.{}.", "encoder.down_blocks.{}.resnets.{}."),
    ("encoder.conv_blocks.{}.attn.{}.", "encoder.down_blocks.{}.attentions.{}."),
    ("encoder.conv_blocks.{}.downsample.", "encoder.down_blocks.{}.downsamplers.0."),
    ("decoder.conv_blocks.{}.res.{}.", "decoder.up_blocks.{}.resnets.{}."),
    ("decoder.conv_blocks.{}.attn.{}.", "decoder.up_blocks.{}.attentions.{}."),
    ("decoder.conv_blocks.{}.upsample.", "decoder.up_blocks.{}.upsamplers.0."),
    ("coder.mid.0.", "coder.mid_block.resnets.0."),
    ("coder.mid.1.", "coder.mid_block.attentions.0."),
    ("coder.mid.2.", "coder.mid_block.resnets.1."),
    *_PARTS,
]
_FIRST_NAMES = [
    (".attentions.{}.query.", ".attentions.{}.to_q."),
    (".attentions.{}.key.", ".attentions.{}.to_k."),
    (".attentions.{}.value.", ".attentions.{}.to_v."),
    (".attentions.{}.proj_attn.", ".attentions.{}.to_out.0."),
]
PREFIX = "first_stage_model."  # of the autoencoder in the checkpoint of a whole latent diffusion model
# What training left in the file: losses with their own networks, VA-VAE's foundation model, averaged weights beside the ones used.
_DROPPED = ("loss", "perceptual_loss", "discriminator", "foundation_model", "linear_proj", "model_ema", "quantize.codebook_used")


def is_llamagen(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict has LlamaGen's keys."""
    return any(".conv_blocks." in key for key in weights)


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any of the layouts in diffusers'; what belongs to training alone is dropped."""
    if any(key.startswith(PREFIX) for key in weights):
        weights = {key[len(PREFIX) :]: tensor for key, tensor in weights.items() if key.startswith(PREFIX)}
    weights = {key: tensor for key, tensor in weights.items() if not any(f"{key}.".startswith(f"{name}.") for name in _DROPPED)}
    if is_llamagen(weights):
        weights = _renamed(weights, LLAMAGEN)
    elif any(".mid.block_1." in key for key in weights):
        weights = _decoder_levels_reversed(_renamed(weights, LDM))
    return {key: _matrix(key, tensor) for key, tensor in _renamed(weights, _FIRST_NAMES).items()}


def to_ldm(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse for latent diffusion's layout: arrays by diffusers' keys -> arrays by that layout's."""
    return _renamed(_decoder_levels_reversed(_as_convolutions(weights)), LDM, backwards=True)


def to_llamagen(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse for LlamaGen's layout (whose codes are normalised when they are used)."""
    return _renamed(_as_convolutions(weights), LLAMAGEN, backwards=True)


def _renamed(weights, pairs, backwards=False):
    rules = []
    for old, new in [(new, old) for old, new in reversed(pairs)] if backwards else pairs:
        numbers = iter(range(1, 9))
        rules.append((re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), re.sub(r"\{\}", lambda _: rf"\g<{next(numbers)}>", new)))  # noqa: B023
    found = {}
    for key, array in weights.items():
        for pattern, replacement in rules:
            key = pattern.sub(replacement, key)
        found[key] = array
    return found


def _decoder_levels_reversed(weights):
    level = re.compile(r"(?<=decoder\.up_blocks\.)\d+")
    last = max((int(number) for key in weights for number in level.findall(key)), default=0)
    return {level.sub(lambda number: str(last - int(number[0])), key): array for key, array in weights.items()}


_PRODUCT = re.compile(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$")


def _matrix(key, tensor):
    """Weights of the attention's products are convolutions of one pixel in some files: [out, in, 1, 1]."""
    return tensor.reshape(*tensor.shape[:2]) if tensor.ndim == 4 and _PRODUCT.search(key) else tensor


def _as_convolutions(weights):
    return {key: array[..., None, None] if _PRODUCT.search(key) else array for key, array in weights.items()}


COMPUTED = ("slicing", "tiling")  # fields that say how, not what is computed


def fields_of_config(network: type, config: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The values of a network's fields that a published config.json states; what it does not state keeps diffusers' default.

    Args:
      network: a linen module whose fields have the names of the config's values, and diffusers' defaults.
      fixed: values of the config that the network has no field for, and what they may be.

    Raises:
      UserError: another one of these values.
    """
    for name, allowed in fixed.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(f"{network.__name__}: {name} = {config[name]!r} in its configuration is not supported, only {allowed[0]!r}.")
    values = config_fields(network, config)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name not in COMPUTED}


def levels(channels: list[int], attention: bool = False) -> dict[str, Any]:
    """Config values of published levels of these channels: with attention in the smallest, or in none."""
    down, up = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D") if attention else ("DownEncoderBlock2D", "UpDecoderBlock2D")
    others = len(channels) - 1
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * others + [down],
        "up_block_types": [up] + ["UpDecoderBlock2D"] * others,
        "layers_per_block": 2,
    }


def attention_of_levels(net: Any) -> tuple[bool, ...]:
    """Whether each level of an encoder has attention in it, from the largest size to the smallest: from the names of its blocks.

    Raises:
      UserError: blocks of another kind, another number of them than levels, decoder's that are not the encoder's backwards, or channels
        that do not make the groups of a normalisation.
    """
    name, channels = type(net).__name__, net.block_out_channels
    down = tuple(kind == "AttnDownEncoderBlock2D" for kind in net.down_block_types)
    up = tuple(kind == "AttnUpDecoderBlock2D" for kind in net.up_block_types)
    kinds = {*net.down_block_types, *net.up_block_types}
    if not kinds <= {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}:
        raise UserError(f"{name}: its config.json names blocks that are not supported: {', '.join(sorted(kinds))}.")
    if not len(channels) == len(down) == len(up) or down != up[::-1]:
        raise UserError(f"{name}: down_block_types, up_block_types and block_out_channels of its config.json do not fit each other.")
    if any(size % net.norm_num_groups for size in channels):
        raise UserError(f"{name}: block_out_channels {list(channels)} do not divide into norm_num_groups = {net.norm_num_groups} groups.")
    return down


def check_images(net: Any, images: Any) -> None:
    """Raises UserError unless images are [B, H, W, channels] and large enough to be halved between all levels."""
    name, least = type(net).__name__, net.downsampling
    if images.ndim != 4 or images.shape[3] != net.in_channels or min(images.shape[1:3]) < least:
        raise UserError(f"{name} encodes images [B, H, W, {net.in_channels}] of at least {least} pixels a side, not {list(images.shape)}.")


def config_of(network: Any, **more: Any) -> dict[str, Any]:
    """The config.json of a network: its fields, lists for tuples, and `more`."""
    values = {name: value for name, value in config_fields(network).items() if name not in COMPUTED}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"_class_name": type(network).__name__, "_diffusers_version": "0.39.0", **values, **more}
