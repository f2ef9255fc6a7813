"""One check of the fields of networks and their streams, at construction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmdiff.checks import number, short
from mmdiff.errors import UserError

LAYERS, SIZES, ENTRIES = 1024, 65_536, 2**24  # larger values are mistakes, and would take minutes to trace
LIMITS = {"depth": LAYERS, "head_depth": LAYERS, "text_depth": LAYERS, "shared": LAYERS, "encoder_blocks": LAYERS, "decoder_blocks": LAYERS}
LIMITS |= dict.fromkeys(("classes", "states", "vocabulary", "labels", "length", "count", "codes", "genres", "samples", "times"), ENTRIES)
SIGNED = {"time_scale", "time_offset"}  # floats that may be negative
OR_NONE = {"shared", "head_depth", "encoder_blocks", "decoder_blocks"}  # which may be 0


class Network(nn.Module):
    """A linen module whose fields are checked when it is constructed."""

    def __post_init__(self):
        check_fields(self)
        super().__post_init__()


def check_fields(owner: Any) -> None:
    """Raises UserError, which names the field, at the first field of a dataclass with an impossible value.

    Fields that are declared as integers are sizes: whole numbers of 1 or more (0 where that is the default or in `OR_NONE`), at most as
    many as `LIMITS` or `SIZES` says. Those declared as floats are finite, and above 0 (or 0 where that is the default; any in `SIGNED`). A
    `width` is a multiple of `heads` and of 4, and a `dtype` one of floats.
    """
    who = type(owner).__name__
    for field in dataclasses.fields(owner):
        value, kind = getattr(owner, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        if field.name == "dtype":
            _check_dtype(who, value)
        several = kind.startswith(("tuple[", "Sequence["))
        if several and not isinstance(value, (tuple, list)):
            what = "names, as ('image',)" if "[str" in kind else "numbers, as (8, 8)"
            raise UserError(f"{who}: {field.name} must be several {what}, not {short(value)}.")
        for item in value if several else (value,):
            if kind.split("[")[-1].startswith("int"):
                low = 0 if field.default == 0 or field.name in OR_NONE else 1
                _check_size(who, field.name, item, low, LIMITS.get(field.name, SIZES))
            elif kind.split("[")[-1].startswith("float"):
                _check_float(who, field.name, item, -math.inf if several or field.name in SIGNED else 0.0, field.default == 0)
    if hasattr(owner, "width") and hasattr(owner, "heads"):
        check_width(owner.width, owner.heads, who)
        ratio = getattr(owner, "mlp_ratio", 1.0)
        if not 1 <= owner.width * ratio < SIZES**2:
            raise UserError(f"{who}: mlp_ratio {ratio:g} of a width of {owner.width} is no number of hidden units.")


def check_width(width: int, heads: int, who: str = "the network", prefix: str = "") -> None:
    """Raises UserError for a width that does not split into heads, or into the sines and cosines of rows and columns."""
    if width % heads or width % 4:
        raise UserError(
            f"{who}: {prefix}width {width} does not fit {heads} heads: {prefix}heads must divide it, and so must 4 (for the positions).")


def _check_size(who, name, value, low, high):
    whole = not isinstance(value, bool) and hasattr(type(value), "__index__")
    if not whole or not low <= value <= high:
        raise UserError(f"{who}: {name} must be a whole number from {low} to {number(high)}, not {short(value)}.")


def _check_float(who, name, value, low, closed):
    try:
        fits = not isinstance(value, (bool, str)) and math.isfinite(value) and (value > low or closed and value == low)
    except TypeError:
        fits = False
    if not fits:
        limits = "" if low < 0 else " of 0 or more" if closed else " above 0"
        raise UserError(f"{who}: {name} must be a finite number{limits}, not {short(value)}.")


def _check_dtype(who, value):
    try:
        fits = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise UserError(f"{who}: dtype must be one of floats, as jnp.bfloat16 or jnp.float32, not {short(value)}.")
