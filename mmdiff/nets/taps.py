"""Features of an image in its network: aligned with a tap, tokens from between the blocks (REPA), or on the image's own tokens (ReDi)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    (`conv`; iREPA, Singh et al. 2025). It is part of the network: sampling leaves it out. All other parameters are those of the network
    without it.

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


def check_taps(
    who: str, taps: Mapping[str, Tap] | None, modalities: Mapping[str, Any], depth: int, route: tuple[int, int] | None
) -> None:
    """Raises UserError for a tap of no modality, with the name of one, behind all blocks, or between those that tokens skip."""
    for name, tap in (taps or {}).items():
        if name in modalities or tap.of not in modalities or not tap.depth < depth:
            raise UserError(
                f"{who}: the tap {name!r} of {tap.of!r} behind block {tap.depth} needs a name of its own, one of the modalities "
                f"{sorted(modalities)} and fewer than the {depth} blocks.")
        if route and route[0] < tap.depth < route[1]:
            raise UserError(f"{who}: the tap {name!r} behind block {tap.depth} lies where tokens skip blocks, {route}.")


def check_fused(who: str, name: str, stream: Any, host: str, tokens: Any) -> None:
    """Raises UserError unless the modality `name` can share the tokens of `host`."""
    fits = isinstance(stream, Patches) and isinstance(tokens, Patches) and stream.grid == tokens.grid
    if not fits or stream.stem or stream.bottleneck:
        raise UserError(
            f"{who}: {name!r} cannot share the tokens of {host!r}: both must be Patches with as many rows and columns of them, "
            f"{name!r} without a stem or a bottleneck.")
