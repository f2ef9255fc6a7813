"""What networks do with tokens that skip blocks: see `mmdiff.routing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.nets.target import axis_size


def check_route(who: str, route: Sequence[int] | None, depth: int) -> None:
    """Raises UserError unless a route is (first, last) with 1 <= first < last <= depth."""
    if route is not None and not (len(route) == 2 and route[0] < route[1] <= depth):
        raise UserError(f"{who}: route counts the blocks before and up to the last that tokens skip, as (2, 8) of {depth}, not {route}.")


def check_kept(who: str, kept: Mapping[str, Any], route: Sequence[int] | None) -> None:
    """Raises UserError for tokens to be kept in a network without a route, or whose tokens are split over devices."""
    if kept and (route is None or axis_size("seq") > 1):
        what = "it has no route: set one, as (2, 8)" if route is None else "tokens are split over devices: set config.train.mesh.seq=1"
        raise UserError(f"{who}: some tokens of {', '.join(map(repr, kept))} are to skip blocks, but {what}.")


def take(h: jax.Array, keep: jax.Array) -> jax.Array:
    """The tokens keep [B, M] of h [B, N, W]."""
    return jnp.take_along_axis(h, keep[..., None], axis=1)


def put(h: jax.Array, keep: jax.Array, part: jax.Array) -> jax.Array:
    """h [B, N, W] with the tokens `part` [B, M, W] at keep [B, M]."""
    return jax.vmap(lambda each, at, new: each.at[at].set(new, unique_indices=True))(h, keep, part)


def places(kept: Mapping[str, jax.Array], names: Sequence[str], lengths: Sequence[int]) -> jax.Array:
    """The places [B, M] of the tokens of several streams, one after the other, of which `kept` says what is left of some."""
    batch, found = len(next(iter(kept.values()))), []
    for name, length, start in zip(names, lengths, np.cumsum([0, *lengths])):
        found.append(start + (kept[name] if name in kept else jnp.broadcast_to(jnp.arange(length), (batch, length))))
    return jnp.concatenate(found, axis=1)
