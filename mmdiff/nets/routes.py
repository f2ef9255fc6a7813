"""What networks do with tokens that skip blocks: see `mmdiff.routing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.errors import UserError
from mmdiff.nets.target import axis_size
from mmdiff.routing import kept_of, kept_tokens


def check_route(who: str, route: Sequence[int] | None, depth: int) -> None:
    """Raises UserError unless a route is (first, last) with 1 <= first < last <= depth."""
    if route is not None and not (len(route) == 2 and route[0] < route[1] <= depth):
        raise UserError(f"{who}: route counts the blocks before and up to the last that tokens skip, as (2, 8) of {depth}, not {route}.")


def kept_in(who: str, x: Mapping[str, Any], lengths: Mapping[str, int], route: Sequence[int] | None) -> dict[str, jax.Array]:
    """Of the inputs of a network whose streams have these lengths, name -> the tokens that are kept, int [B, M].

    Raises UserError for tokens of something else or too many, in a network without a route, or whose tokens are split over devices.
    """
    found = {name.removesuffix(kept_of("")): keep for name, keep in kept_tokens(x).items()}
    wrong = None
    if found and route is None:
        wrong = "it has no route, as DiT and MMDiT can: (2, 8)"
    elif found and axis_size("seq") > 1:
        wrong = "tokens are split over devices: set config.train.mesh.seq=1"
    elif unknown := [name for name, keep in found.items() if keep.shape[1] > lengths.get(name, 0)]:
        wrong = f"of {unknown[0]!r} it has {lengths.get(unknown[0], 0)} tokens and {found[unknown[0]].shape[1]} would be kept"
    if wrong:
        raise UserError(f"{who}: some tokens of {', '.join(map(repr, found))} are to skip blocks, but {wrong}.")
    return found


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
