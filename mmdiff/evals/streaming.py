"""A function of single examples over as many as there are, block by block on all devices of a process, with bounded memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmdiff.data.spreading import Spread


def count_of(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` examples."""
    return -(-count // size)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one after another; a single one as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def stream(
    function: Callable, params: Any, key: jax.Array, given: Any, count: int, size: int, *, blocks: Sequence[int] | None = None,
) -> Iterator[tuple[int, Any]]:
    """`function(params, keys, given)` over `count` examples -> (k, its results as NumPy arrays [n, ...]) of every block k, in turn.

    Block k holds the examples k size .. (k + 1) size - 1. Each is computed by one device of this process, all by the same program, the last
    one with its last example repeated: so the bits of a result depend on `size` at most, not on the number of devices or of processes.

    Parameters that are spread over a mesh stay there: its devices compute together, a block on each share of the batch. Results are then
    those of one device to rounding.

    >>> double = lambda params, keys, given: 2 * given
    >>> [(k, found.tolist()) for k, found in stream(double, None, jax.random.key(0), np.arange(5), 5, 2, blocks=[0, 2])]
    [(0, [0, 2]), (2, [8])]

    Args:
      function: maps keys [size] and a pytree of arrays [size, ...] to such a pytree, every example on its own.
      key: example i's key is `fold_in(key, i)`; or the keys of all, [count].
      given: pytree of what rows can be taken of, `array[rows]`.
      blocks: which; all by default.
    """
    blocks, fold, mesh = range(count_of(count, size)) if blocks is None else blocks, _fold_in(), _mesh(params)

    def batch(block, device, each=1):
        rows = np.concatenate([k * size + np.arange(size) for k in np.resize(block, each)])
        rows = np.minimum(rows, count - 1)
        keys = key[rows] if key.ndim else fold(key, rows.astype(np.uint32))
        return jax.device_put((keys, jax.tree.map(lambda array: array[rows], given)), device)

    if mesh is not None:
        axes = tuple(name for name in mesh.axis_names if name not in ("seq", "tensor"))
        shares, together = math.prod(mesh.shape[name] for name in axes), _jitted(function)
        for start in range(0, len(blocks), shares):
            call = list(blocks[start : start + shares])
            found = jax.device_get(together(params, *batch(call, NamedSharding(mesh, PartitionSpec(axes)), shares)))
            parts = [jax.tree.map(lambda array: array[i * size : (i + 1) * size], found) for i in range(len(call))]  # noqa: B023
            yield from _parts(list(zip(call, parts)), count, size)
        return
    devices, run = jax.local_devices()[: len(blocks)], _spread(function)
    placed = run.place(params, devices)

    waiting = []  # the devices compute the next call while what the last one has found is used
    for start in range(0, len(blocks), max(1, len(devices))):
        call = blocks[start : start + len(devices)]
        found = run(placed, [batch(block, device) for block, device in zip(call, devices)])
        yield from _parts(waiting, count, size)
        waiting = list(zip(call, found))
    yield from _parts(waiting, count, size)


@functools.lru_cache
def _fold_in() -> Callable:
    return jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def _mesh(params: Any) -> Mesh | None:
    """The mesh of several devices that parameters are on, if they are."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


@functools.lru_cache(maxsize=16)
def _jitted(function: Callable) -> Callable:
    return jax.jit(function)


@functools.lru_cache(maxsize=16)
def _spread(function: Callable) -> Spread:
    """What is compiled of a function serves every call with it."""
    return Spread(function)


def _parts(computed: Sequence[tuple[int, Any]], count: int, size: int) -> Iterator[tuple[int, Any]]:
    for block, found in computed:
        yield block, jax.tree.map(lambda array: array[: count - block * size], jax.device_get(found))  # noqa: B023 (used at once)
