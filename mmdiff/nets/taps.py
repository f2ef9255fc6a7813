"""Taps: tokens that a network returns from between its blocks, for a term that compares them with features of the clean data."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from mmdiff.errors import UserError
from mmdiff.nets.embed import Dense, Patches, xavier
from mmdiff.nets.fields import check_fields


@dataclasses.dataclass(frozen=True)
class Tap:
    """A modality's tokens behind `depth` blocks, projected to features, [B, N, size]: see `losses.aligned`.

    The projection has three layers with `hidden` units between (REPA, Yu et al. 2025), or is one 3 x 3 convolution over the patches
    (`conv`; iREPA, Singh et al. 2025). It is part of the network: sampling leaves it out. A tap divides the stack of blocks, whose layers
    behind it are found below "from_DEPTH", so that weights with and without it have different names.

        MMDiT({"image": Patches(32, 32, 4, 2), ...}, taps={"dino": Tap("image", depth=8, size=768)}, ...)

    Attributes:
      of: the modality.
      depth: blocks before it, fewer than the network has.
      size: numbers in a feature.
      hidden, conv: of the projection.
    """

    of: str
    depth: int
    size: int
    hidden: int = 2048
    conv: bool = False

    def __post_init__(self):
        check_fields(self)

    def project(self, h: jax.Array, stream: Any, dtype: Any, name: str) -> jax.Array:
        """Tokens [B, N, W] -> [B, N, size], in the module that calls it."""
        if self.conv:
            if not isinstance(stream, Patches):
                raise UserError(f"the tap {name!r} has a convolution, which needs the patches of an image, not {type(stream).__name__}.")
            grid = h.reshape(len(h), *stream.grid, -1)
            return nn.Conv(self.size, (3, 3), padding=1, dtype=dtype, name=f"{name}_tap")(grid).reshape(*h.shape[:2], -1)
        for i, size in enumerate((self.hidden, self.hidden, self.size)):
            h = Dense(size, kernel_init=xavier, dtype=dtype, name=f"{name}_tap_{i}")(h if i == 0 else nn.silu(h))
        return h
